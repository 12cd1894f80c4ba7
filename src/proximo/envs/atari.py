"""Atari games as the literature plays them: in ALE's vector environment, and one by one in Gymnasium's.

Both repeat an action for four frames, take the greater of the last two in each pixel, make it gray and 84 × 84, and
show the last four (Mnih et al. 2015, Methods). An episode of the learner ends where a life is lost, though the game
goes on; rewards are −1, 0 or 1. Reports are of whole games, with the game's own rewards. After 108,000 frames, half an
hour, a game is truncated. `env_kwargs` change any of that, by the names of ALE's vector environment.

`ALE/Pong-v5` repeats the action before with probability 0.25 in each frame (Machado et al. 2018); `PongNoFrameskip-v4`
never does. The number in an id that says how many frames an action lasts is replaced, so that it is 4 and never 16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from proximo.envs.shared_memory import mask_of, seeds_of
from proximo.errors import UserError, suggest

ENTRY_POINT = "ale_py.env:AtariEnv"
RAW = "obs_type"  # who names it wants Gymnasium's environment as it is
FOR_THE_LEARNER = ("episodic_life", "reward_clipping")  # which change nothing that is reported
NOOP = 0

# What is done to a game, unless `env_kwargs` say otherwise.
DEFAULTS: dict[str, Any] = {
    "frameskip": 4,
    "stack_num": 4,
    "img_height": 84,
    "img_width": 84,
    "noop_max": 30,
    "use_fire_reset": True,
    **dict.fromkeys(FOR_THE_LEARNER, True),
}
GAMES = ("repeat_action_probability", "full_action_space", "max_num_frames_per_episode")
ONE_BY_ONE = ("mode", "difficulty", "render_mode")  # which ALE's vector environment does not have


def is_named(env_id: str) -> bool:
    """Whether an id looks like one of ALE's, registered or not."""
    return env_id.startswith("ALE/") or "NoFrameskip" in env_id


def is_atari(spec: EnvSpec | None, env_kwargs: Mapping[str, Any]) -> bool:
    """Whether an environment is a game that is to be played as described above."""
    return spec is not None and spec.entry_point == ENTRY_POINT and RAW not in env_kwargs


def has_vector(spec: EnvSpec, env_kwargs: Mapping[str, Any]) -> bool:
    """Whether ALE's vector environment can play it so: not with a frame skip drawn at random."""
    settings = _settings(spec, env_kwargs)
    return isinstance(settings["frameskip"], int) and not any(name in settings for name in ONE_BY_ONE)


def plays(spec: EnvSpec | None, env_kwargs: Mapping[str, Any]) -> bool:
    """Whether it is a game that ALE's vector environment plays."""
    return spec is not None and is_atari(spec, env_kwargs) and has_vector(spec, env_kwargs)


def _settings(spec: EnvSpec, env_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides how a game is played.

    Raises:
        UserError: an unknown name.
    """
    known = {*DEFAULTS, *GAMES, *ONE_BY_ONE}
    for name in env_kwargs:
        if name not in known:
            raise UserError(
                f"{spec.id} does not know {name!r}{suggest(name, known)}; it knows {', '.join(sorted(known))}, and "
                f"with {RAW} it is Gymnasium's own environment"
            )
    settings = {**spec.kwargs, **DEFAULTS, **env_kwargs}
    at_random = spec.kwargs.get("frameskip")
    if isinstance(at_random, (tuple, list)) and "frameskip" not in env_kwargs:
        settings["frameskip"] = tuple(at_random)
    return settings


class AtariGames(VectorEnv):
    """N games in ALE's threads.

    A life that is lost and a game that is over both end an episode: `terminated`. In the step that follows
    (AutoresetMode.NEXT_STEP) the action counts for nothing: a game that is over begins anew, and in one that goes on
    the fire button is pressed, where it has one, since some games wait for that.

    `info` has the whole games that ended in a step: `episode`, with `r` [N] (undiscounted sum of the game's own
    rewards) and `l` [N] (steps), where `_episode` [N] is True.

    Raises:
        UserError: a setting that it does not have.
    """

    takes_seed_list = True
    reports_episodes = True

    def __init__(self, spec: EnvSpec, num_envs: int, env_kwargs: Mapping[str, Any]) -> None:
        from ale_py import Action
        from ale_py.vector_env import AtariVectorEnv

        super().__init__()
        if not has_vector(spec, env_kwargs):
            raise UserError(
                f"ALE's vector environment plays no {spec.id} with a random frame skip, mode, difficulty or "
                "render_mode: use engine auto, workers or sync"
            )
        settings = _settings(spec, env_kwargs)
        self.num_envs, self.spec = num_envs, spec
        self._by_life, self._clips = (settings.pop(name) for name in FOR_THE_LEARNER)
        self._games = AtariVectorEnv(
            num_envs=num_envs,
            autoreset_mode=AutoresetMode.NEXT_STEP,
            episodic_life=False,
            reward_clipping=False,
            **settings,
        )
        self.metadata = {**self._games.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}
        self.single_observation_space = self._games.single_observation_space
        self.single_action_space = self._games.single_action_space
        self.observation_space, self.action_space = (
            batch_space(space, num_envs)
            for space in (self.single_observation_space, self.single_action_space)
        )
        buttons = list(self._games.ale.get_action_set())
        fires = settings["use_fire_reset"] and Action.FIRE in buttons
        self._between_lives = buttons.index(Action.FIRE) if fires else NOOP
        self._begin(np.ones(num_envs, bool))

    def _begin(self, where: np.ndarray) -> None:
        if where.all():
            self._lives = np.zeros(self.num_envs, np.int32)
            self._life_lost, self._over = np.zeros((2, self.num_envs), bool)
            self._return, self._length = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        self._life_lost[where] = self._over[where] = False
        self._return[where] = self._length[where] = 0

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin new games: everywhere, or where `options["reset_mask"]` ([N] bool) says.

        Args:
            seed: one per game; or one number, from which game n takes seed + n.
        """
        mask, _ = mask_of(options, self.num_envs)
        seeds = np.array([-1 if one is None else one for one in seeds_of(seed, self.num_envs)])
        self._begin(mask)
        whole = {} if mask.all() else {"options": {"reset_mask": mask}}
        observation, info = self._games.reset(seed=seeds[mask], **whole)
        self._lives = info["lives"].copy()
        return observation, {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take actions [N] everywhere: observations, rewards, terminated, truncated, info."""
        if self._life_lost.any():
            actions = np.where(self._life_lost, self._between_lives, actions)
        observation, reward, terminated, truncated, info = self._games.step(np.asarray(actions, np.int64))
        began, between, lives = self._over.copy(), self._life_lost.copy(), info["lives"]
        self._begin(began)
        self._return += np.where(began, 0, reward)
        self._length += ~began
        self._over = over = terminated | truncated
        self._life_lost = (lives < self._lives) & (lives > 0) & ~over & ~began & self._by_life
        self._lives = lives.copy()
        ended = {}
        if over.any():
            ended = {"episode": {"r": self._return.copy(), "l": self._length.copy()}, "_episode": over.copy()}
        if (over & between).any():  # the step that is no transition is over, and no other follows it
            observation, _ = self.reset(options={"reset_mask": over & between})
        return (
            observation,
            np.sign(reward) if self._clips else reward,
            terminated | self._life_lost,
            truncated,
            ended,
        )

    def close_extras(self, **kwargs: Any) -> None:
        """End ALE's threads."""
        self._games.close()


def make_game(spec: EnvSpec, env_kwargs: Mapping[str, Any]) -> gym.Env:
    """One game in Gymnasium's environment and wrappers.

    Raises:
        UserError: an unknown setting.
        gymnasium.error.DependencyNotInstalled: OpenCV is missing.
    """
    settings = _settings(spec, env_kwargs)
    at_random = not isinstance(settings["frameskip"], int)
    frameskip = settings["frameskip"] if at_random else 1
    own = {name: settings[name] for name in (*GAMES, *ONE_BY_ONE) if name in settings}
    env = gym.make(spec, frameskip=frameskip, disable_env_checker=True, **own)
    env = gym.wrappers.AtariPreprocessing(
        env,
        noop_max=settings["noop_max"],
        frame_skip=1 if at_random else settings["frameskip"],
        screen_size=(settings["img_width"], settings["img_height"]),
    )
    env = gym.wrappers.RecordEpisodeStatistics(env)
    env = gym.wrappers.FrameStackObservation(env, settings["stack_num"], padding_type="zero")
    return AtariGame(env, settings["use_fire_reset"], *(settings[name] for name in FOR_THE_LEARNER))


class AtariGame(gym.Wrapper):
    """What a learner is told of a game: the same as `AtariGames` tells of each of its own.

    `reset` after a life is lost goes on with the game, unless it is given a seed. `info["episode"]` is of the whole
    game, and stands where that ends.
    """

    reports_episodes = True

    def __init__(self, env: gym.Env, fires: bool, by_life: bool, clips: bool) -> None:
        super().__init__(env)
        game: Any = env.unwrapped
        buttons = game.get_action_meanings()
        self._fire = buttons.index("FIRE") if fires and "FIRE" in buttons else None
        self._by_life, self._clips = by_life, clips
        self._lives, self._goes_on = 0, False

    def snapshot(self) -> bytes | None:
        """The machine with its random numbers, before a new game; None inside a game."""
        game: Any = self.env.unwrapped
        return None if self._goes_on else game.clone_state(include_rng=True).serialize()

    def restore(self, snapshot: bytes) -> None:
        """The inverse of `snapshot`."""
        from ale_py import ALEState

        game: Any = self.env.unwrapped
        game.restore_state(ALEState(snapshot))
        self._goes_on = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Begin a new game, or go on with one after a life was lost."""
        goes_on = self._goes_on and seed is None
        observation, info = (None, {}) if goes_on else self.env.reset(seed=seed, options=options)
        if goes_on or self._fire is not None:
            action = NOOP if self._fire is None else self._fire
            observation, _, terminated, truncated, info = self.env.step(action)
            if terminated or truncated:
                observation, info = self.env.reset(options=options)
        self._lives, self._goes_on = info["lives"], False
        return observation, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        """Take an action."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        lives = info["lives"]
        self._goes_on = self._by_life and 0 < lives < self._lives and not (terminated or truncated)
        self._lives = lives
        reward = float(reward)
        if self._clips:
            reward = float(np.sign(reward))
        return observation, reward, terminated or self._goes_on, truncated, info
