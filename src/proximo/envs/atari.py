"""Atari games with the preprocessing of the literature: in ALE's vector environment, or one by one in Gymnasium's.

Both repeat an action for four frames, take the pixel-wise maximum of the last two, convert it to 84 × 84 gray, and
stack the last four (Mnih et al. 2015, Methods). Losing a life ends an episode for the learner, but the game continues.
Rewards are clipped to −1, 0 or 1. Reported episodes are whole games with unclipped rewards. A game is truncated after
108,000 frames (half an hour). `env_kwargs` change any of these, by the names of ALE's vector environment.

`ALE/Pong-v5` repeats the previous action with probability 0.25 in each frame (Machado et al. 2018);
`PongNoFrameskip-v4` never does. The frame skip that an id implies is replaced, so that it is 4 and never 16.
"""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv

from proximo.errors import UserError, suggest
from proximo.rollout.resets import Seeds, seed_per_env, split_reset_options

ENTRY_POINT = "ale_py.env:AtariEnv"
RAW = "obs_type"  # this keyword selects Gymnasium's environment without preprocessing
LEARNER_ONLY = ("episodic_life", "reward_clipping")  # settings that do not affect reported episodes
NOOP = 0

DEFAULTS: dict[str, Any] = dict.fromkeys(LEARNER_ONLY, True)
DEFAULTS |= {"frameskip": 4, "stack_num": 4, "img_height": 84, "img_width": 84, "noop_max": 30, "use_fire_reset": True}
GAME_SETTINGS = ("repeat_action_probability", "full_action_space", "max_num_frames_per_episode")
SINGLE_GAME_SETTINGS = ("mode", "difficulty", "render_mode")  # not available in ALE's vector environment


def has_atari_id(env_id: str) -> bool:
    """Whether an id looks like one of ALE's, registered or not."""
    return env_id.startswith("ALE/") or "NoFrameskip" in env_id


def is_atari(spec: EnvSpec | None, env_kwargs: Mapping[str, Any]) -> bool:
    """Whether an environment is a game that gets the preprocessing of this module."""
    return spec is not None and spec.entry_point == ENTRY_POINT and RAW not in env_kwargs


def supports_vector(spec: EnvSpec | None, env_kwargs: Mapping[str, Any]) -> bool:
    """Whether ALE's vector environment supports a game with these settings. A random frame skip is not supported."""
    if spec is None or not is_atari(spec, env_kwargs):
        return False
    settings = _settings(spec, env_kwargs)
    return isinstance(settings["frameskip"], int) and not any(name in settings for name in SINGLE_GAME_SETTINGS)


def _settings(spec: EnvSpec, env_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of a game; raise UserError if one is unknown."""
    known = {*DEFAULTS, *GAME_SETTINGS, *SINGLE_GAME_SETTINGS}
    for name in env_kwargs:
        if name not in known:
            raise UserError(
                f"{spec.id} has no setting {name!r}{suggest(name, known)} It has {', '.join(sorted(known))}; with "
                f"{RAW} it is Gymnasium's environment without preprocessing."
            )
    skip = spec.kwargs.get("frameskip")
    random_skip = {"frameskip": tuple(skip)} if isinstance(skip, (tuple, list)) else {}
    return {**spec.kwargs, **DEFAULTS, **random_skip, **env_kwargs}


class AtariVectorEnv(VectorEnv):
    """N games in ALE's threads.

    A lost life terminates an episode, like the end of a game. In the step after that (AutoresetMode.NEXT_STEP) the
    action is ignored: a finished game restarts, and in a game that continues the fire button is pressed if there is
    one, since some games wait for it. `info` reports the games that ended in a step: see
    `proximo.rollout.collector.Collector`.

    Raises:
        UserError: a setting is unknown or not supported by ALE's vector environment.
    """

    takes_seed_list = True
    returns_info = False
    reports_episodes = True

    def __init__(self, spec: EnvSpec, num_envs: int, env_kwargs: Mapping[str, Any]) -> None:
        from ale_py import Action, vector_env

        super().__init__()
        if not supports_vector(spec, env_kwargs):
            raise UserError(
                f"ALE's vector environment does not support {spec.id} with a random frame skip, mode, difficulty or "
                "render_mode. Use engine auto, workers or sync."
            )
        settings = _settings(spec, env_kwargs)
        self.num_envs, self.spec = num_envs, spec
        self._is_episodic_life, self._clips_rewards = (settings[name] for name in LEARNER_ONLY)
        settings |= {**dict.fromkeys(LEARNER_ONLY, False), "autoreset_mode": AutoresetMode.NEXT_STEP}
        self._games = vector_env.AtariVectorEnv(num_envs=num_envs, **settings)
        self.metadata = {**self._games.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}
        for space in ("observation_space", "action_space", "single_observation_space", "single_action_space"):
            setattr(self, space, getattr(self._games, space))
        buttons = list(self._games.ale.get_action_set())
        has_fire = settings["use_fire_reset"] and Action.FIRE in buttons
        self._action_between_lives = buttons.index(Action.FIRE) if has_fire else NOOP
        self._lives = np.zeros(num_envs, np.int32)
        self._life_lost, self._game_over = np.zeros((2, num_envs), bool)
        self._return, self._length = np.zeros(num_envs), np.zeros(num_envs, np.int64)

    def _begin_games(self, where: np.ndarray) -> None:
        self._life_lost[where] = self._game_over[where] = False
        self._return[where] = self._length[where] = 0

    def reset(self, *, seed: Seeds = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Restart all games, or those that `options["reset_mask"]` ([N] bool) selects, with `seed[n]` or seed + n."""
        mask, _ = split_reset_options(options, self.num_envs)
        seeds = np.array([-1 if one is None else one for one in seed_per_env(seed, self.num_envs)])
        self._begin_games(mask)
        partial = {} if mask.all() else {"options": {"reset_mask": mask}}
        observation, info = self._games.reset(seed=seeds[mask], **partial)
        self._lives = info["lives"].copy()
        return observation, {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Return observations, rewards [N], terminated [N], truncated [N], and the games that ended, as info."""
        if self._life_lost.any():
            actions = np.where(self._life_lost, self._action_between_lives, actions)
        observation, reward, terminated, truncated, info = self._games.step(np.asarray(actions, np.int64))
        restarted, between_lives, lives = self._game_over.copy(), self._life_lost.copy(), info["lives"]
        self._begin_games(restarted)
        self._return += np.where(restarted, 0, reward)
        self._length += ~restarted
        self._game_over = over = terminated | truncated
        lost = (lives < self._lives) & (lives > 0) & ~over & ~restarted
        self._life_lost = lost & self._is_episodic_life
        self._lives = lives.copy()
        report = {}
        if over.any():
            report = {"episode": {"r": self._return.copy(), "l": self._length.copy()}, "_episode": over.copy()}
        if (over & between_lives).any():  # this step already is the one that resets, so restart within it
            observation, _ = self.reset(options={"reset_mask": over & between_lives})
        reward = np.sign(reward) if self._clips_rewards else reward
        return observation, reward, terminated | self._life_lost, truncated, report

    def close_extras(self, **kwargs: Any) -> None:
        """End ALE's threads."""
        self._games.close()


def make_game(spec: EnvSpec, env_kwargs: Mapping[str, Any]) -> gym.Env:
    """Make one game from Gymnasium's environment and wrappers; raise UserError if a setting is unknown."""
    settings = _settings(spec, env_kwargs)
    skip, size = settings["frameskip"], (settings["img_width"], settings["img_height"])
    # The environment itself can skip a random number of frames, the wrapper a fixed one.
    game_skip, wrapper_skip = (1, skip) if isinstance(skip, int) else (skip, 1)
    kwargs = {name: settings[name] for name in (*GAME_SETTINGS, *SINGLE_GAME_SETTINGS) if name in settings}
    env = gym.make(spec, frameskip=game_skip, disable_env_checker=True, **kwargs)
    env = gym.wrappers.AtariPreprocessing(env, settings["noop_max"], wrapper_skip, size)
    env = gym.wrappers.RecordEpisodeStatistics(env)
    env = gym.wrappers.FrameStackObservation(env, settings["stack_num"], padding_type="zero")
    return AtariLearnerWrapper(env, settings["use_fire_reset"], *(settings[name] for name in LEARNER_ONLY))


class AtariLearnerWrapper(gym.Wrapper):
    """Episodes and rewards for the learner, as in `AtariVectorEnv`; `info["episode"]` reports a game when it ends."""

    reports_episodes = True

    def __init__(self, env: gym.Env, uses_fire: bool, is_episodic_life: bool, clips_rewards: bool) -> None:
        super().__init__(env)
        self._game: Any = env.unwrapped
        buttons = self._game.get_action_meanings()
        self._fire = buttons.index("FIRE") if uses_fire and "FIRE" in buttons else None
        self._is_episodic_life, self._clips_rewards = is_episodic_life, clips_rewards
        self._lives, self._game_continues = 0, False

    def episode_so_far(self) -> tuple[float, int] | None:
        """Return and length of the game so far, which the next reset ends; None if it continues."""
        if self._game_continues:
            return None
        return tuple(self.env.get_wrapper_attr(f"episode_{name}") for name in ("returns", "lengths"))

    def snapshot(self) -> bytes | None:
        """Return the emulator state with its random state before a new game; None inside a game."""
        return None if self._game_continues else self._game.clone_state(include_rng=True).serialize()

    def restore(self, snapshot: bytes) -> None:
        """Set the state to that of a snapshot."""
        from ale_py import ALEState

        self._game.restore_state(ALEState(snapshot))
        self._game_continues = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Begin a new game, or continue the game after a lost life if there is no seed."""
        continues = self._game_continues and seed is None
        observation, info = (None, {}) if continues else self.env.reset(seed=seed, options=options)
        if continues or self._fire is not None:
            action = NOOP if self._fire is None else self._fire
            observation, _, terminated, truncated, info = self.env.step(action)
            if terminated or truncated:
                observation, info = self.env.reset(options=options)
        self._lives, self._game_continues = info["lives"], False
        return observation, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        """Step the game; losing a life terminates the episode."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        lives = info["lives"]
        self._game_continues = self._is_episodic_life and 0 < lives < self._lives and not (terminated or truncated)
        self._lives = lives
        reward = float(np.sign(float(reward)) if self._clips_rewards else reward)
        return observation, reward, terminated or self._game_continues, truncated, info
