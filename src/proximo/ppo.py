"""`PPO`: an agent that trains on an environment, acts, saves and loads."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from gymnasium.vector import VectorEnv

from proximo.apply import evaluate_and_record, initial_state, predict
from proximo.config import presets
from proximo.config.names import convert_settings, from_mapping, names_module, override
from proximo.config.resolved import Resolved
from proximo.config.settings import Config
from proximo.config.typed import Settings
from proximo.environments import TrainingEnvs, record_resume
from proximo.envs.make import EnvLike, spaces_of, with_version
from proximo.errors import UserError, refuse_pickling
from proximo.evaluate import NUM_ENVS, Evaluation, PeriodicEvaluation, trained_policy
from proximo.learner.learner import Learner
from proximo.learner.make import make_learner, resolved_by
from proximo.report.analysis.analyze import EPISODES, Analysis, analyze
from proximo.report.recorder import Callback, call_back, record_run
from proximo.report.video import MAX_FRAMES, Video, require_video
from proximo.report.video import record as record_video
from proximo.rollout.randomness import Purpose, generator
from proximo.rollout.rollout import Metrics
from proximo.run import checkpoint, checkpoint_files
from proximo.run.checkpoint import Checkpoint, RunInfo, load, restore
from proximo.run.console import status_line
from proximo.run.progress import Progress
from proximo.run.trackers import import_wandb
from proximo.sweep import Sweep, combinations, make_each
from proximo.train import iterations, plan_call

MAX_TRAINING_FRAMES = 1_000  # of a video during training; MuJoCo renders about ten frames a second without a GPU


class PPO:
    """PPO on an environment.

        agent = PPO("CartPole-v1", num_envs=8, seed=0).learn(100_000)

    Args:
        env: an id registered with Gymnasium, a function that makes one environment, or a vector environment.
        preset: "auto" starts from the environment's preset where there is one, None from the defaults, and a name from
            that preset. Settings given here override it.
        network: a custom network (`proximo.jax.custom_network` or `proximo.torch.custom_network`).
        settings: any setting of `proximo.Config`, such as `num_envs`, `learning_rate`, `backend`.

    Attributes:
        config: the settings as requested; "auto" stays "auto".
        envs: the environments that the agent trains in.
        progress: steps, iterations and recent episodes.

    Raises:
        UserError: an unknown environment or setting, a value out of range, or a space that is not supported.
    """

    def __init__(
        self, env: EnvLike, *, preset: str | None = "auto", network: Any = None, **settings: Unpack[Settings]
    ) -> None:
        env = with_version(env) if isinstance(env, str) else env
        self._bind(TrainingEnvs(env), config_for(env, preset, {**settings}))
        self.preset = presets.select_name(self.env_id, preset)
        try:
            self.spaces = spaces_of(self.envs.open(self.config), self.config.action_bins)
            self.learner: Learner = make_learner(self.config, self.spaces, network, self.envs.engine == "device")
        except BaseException:
            if self.envs.owns_envs:
                self.close()
            raise

    __reduce_ex__ = refuse_pickling

    def __enter__(self) -> PPO:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bind(self, envs: TrainingEnvs, config: Config) -> None:
        self.envs, self.config, self.preset, self.progress = envs, config, None, Progress()
        self.run_dir: Path | None = None
        self._saved: Checkpoint | None = None  # the loaded checkpoint, until training continues
        self._prediction_rng = generator(config.seed, Purpose.EVALUATION, iteration=2)

    @property
    def env_id(self) -> str | None:
        """The environment's id, if it has one."""
        return self.envs.env if isinstance(self.envs.env, str) else None

    @property
    def resolved(self) -> Resolved:
        """The choices made for this machine: backend, engine, device, threads, compilation and network."""
        return resolved_by(self.learner, self.envs.engine_for(self.learner))

    def learn(
        self,
        total_timesteps: int | None = None,
        *,
        run_dir: str | Path | None = None,
        progress: bool = False,
        callback: Callback | None = None,
    ) -> PPO:
        """Train for `total_timesteps` more steps, or up to `config.total_timesteps`, or until `stop_at_return`.

        Schedules end where this call ends. Episodes continue from the previous call, in another process too, if the
        simulator state can be restored (`proximo.rollout.env_state`): with the same total, backend, versions, threads
        and machine, the result is bit-identical to an uninterrupted run. Otherwise new episodes begin.

        Args:
            run_dir: a new folder for config, metrics, checkpoints and curves, or the one of the loaded checkpoint; by
                default `config.run_dir`. Nothing is written without one. A failing run saves what was learned.
            progress: show progress on the terminal.
            callback: called with the metrics of every iteration. Metrics that it adds, or returns as a dictionary, are
                recorded; False ends the run.

        Returns:
            self.

        Raises:
            RunError: an environment failed or returned NaN or infinity; or three updates, evaluations or saves in a row
                failed.
            UserError: the run folder is in use or cannot be written, a value is invalid, or a setting was changed that
                cannot change in the middle of training.
        """
        with closing(self.iterate(total_timesteps, run_dir=run_dir, progress=progress)) as training:
            for metrics in training:
                if callback and not call_back(callback, metrics):
                    break
        return self

    def iterate(
        self, total_timesteps: int | None = None, *, run_dir: str | Path | None = None, progress: bool = False
    ) -> Generator[Metrics, None, None]:
        """Train as `learn` does, but yield the metrics of each iteration; stop, save or evaluate in between.

        Metrics that are added to the dictionary are recorded. Settings that are changed in `config`, such as
        `agent.config = agent.config.replace(learning_rate=1e-4)`, apply from the next iteration on.
        """
        training = self.training(total_timesteps, run_dir, progress)
        next(training)
        yield from training

    def training(
        self, total_timesteps: int | None, run_dir: str | Path | None, show: bool
    ) -> Generator[Metrics, None, None]:
        """Yield an empty dictionary when the environments are ready, then the metrics of each iteration."""
        self.envs.open(self.config, self.spaces)
        run_dir = self.config.run_dir if run_dir is None else run_dir
        check_records(self.config, self.envs, run_dir)
        is_continued = run_dir is not None and Path(run_dir).resolve() == self.run_dir
        config = plan_call(self.config, self.learner, self.progress, self._saved, total_timesteps, show)
        info, film = self._info()._replace(config=config), partial(self.record, max_frames=MAX_TRAINING_FRAMES)
        given = (run_dir, info, self.learner, self.progress, self.save, film, is_continued, show)
        with record_run(*given, self.envs.is_stopping) as recorder:
            self.config = config
            source, reason = self.envs.start(lambda: self.config, self.spaces, self.progress, self.learner)
            record_resume(self._saved, self._info(), self.progress, reason)
            self._saved = None
            evaluate_if_due = PeriodicEvaluation(config, self.progress, self.evaluate)
            recorder.start()
            self.run_dir = recorder.folder.path.resolve() if recorder.folder else self.run_dir
            yield {}
            given = (lambda: self.config, source, self.learner, self.progress, bool(recorder.folder), recorder.on_step)
            yield from recorder.record(iterations(*given), evaluate_if_due)

    @classmethod
    def sweep(
        cls, env: EnvLike, values: Mapping[str, Any], *, preset: str | None = "auto", network: Any = None,
        **settings: Unpack[Settings],
    ) -> Sweep[PPO]:  # fmt: skip
        """Agents for all combinations of values of settings, which train together; see `proximo.sweep`.

            PPO.sweep("jax:CartPole-v1", {"learning_rate": [1e-3, 3e-4], "seed": range(8)}).learn(100_000)

        Raises:
            UserError: as for an agent; or a vector environment, which several agents cannot share.
        """
        each = combinations(env, values, settings)
        return Sweep(make_each(partial(cls, env, preset=preset, network=network, **settings), each), each)

    def predict(self, observation: Any, deterministic: bool = True, state: np.ndarray | None = None) -> Any:
        """Environment actions for one observation, or for a batch of N along the first axis.

        Args:
            state: [H] or [N, H] of a policy with memory: from `initial_state` where an episode begins, then from the
                previous call. Without it each observation is taken as the first of an episode.

        Returns:
            The actions; with a `state`, a tuple of the actions and the next state.

        Raises:
            UserError: an observation or a state of the wrong shape, or one that is not finite.
        """
        return predict(self.learner, self.spaces, self.config, self._prediction_rng, observation, deterministic, state)

    def initial_state(self, num_envs: int | None = None) -> np.ndarray:
        """State of the policy where an episode begins, for `predict`: zeros [H], or [N, H]; H is 0 without memory."""
        return initial_state(self.learner, num_envs)

    def evaluate(
        self,
        episodes: int = 100,
        *,
        deterministic: bool = True,
        seed: int = 0,
        env: EnvLike | None = None,
        num_envs: int = NUM_ENVS,
        render: bool = False,
        record: str | Path | None = None,
        max_frames: int = MAX_FRAMES,
        progress: bool = False,
    ) -> Evaluation:
        """Run complete episodes in new environments; see `proximo.evaluate`.

        Args:
            env: the environment; by default the one trained on.
            num_envs: environments at a time; where only one can exist, such as a robot, use 1 and `close` first.
            render: show the episodes in a window.
            record: also record an episode of at most `max_frames` frames to this file.
            progress: show progress on standard error.

        Raises:
            UserError: the environment is unknown (give `env`), has other spaces, or cannot be shown.
        """
        env = self.envs.env_for("an evaluation", env)
        policy = trained_policy(self.learner, self.spaces, deterministic, seed)
        given = (policy, self.config, self.spaces, env, episodes, deterministic, seed, num_envs)
        warn = not self.envs.is_open  # otherwise the user was warned when they were made
        return evaluate_and_record(*given, render, record, max_frames, progress, warn)

    def record(
        self,
        path: str | Path,
        *,
        deterministic: bool = True,
        seed: int = 0,
        env: EnvLike | None = None,
        max_frames: int = MAX_FRAMES,
    ) -> Video:
        """Record one episode as MP4 in a new environment; see `proximo.report.video`.

        Raises:
            UserError: a package is missing, or the environment cannot be rendered; the message says what to do.
        """
        env = self.envs.env_for("a video", env)
        actor = trained_policy(self.learner, self.spaces, deterministic, seed)(1)
        return record_video(actor, self.config, self.spaces, env, path, seed=seed, max_frames=max_frames)

    def analyze(
        self, folder: str | Path, *, episodes: int = EPISODES, dims: Sequence[str] | None = None, seed: int = 0,
        env: EnvLike | None = None, num_envs: int = NUM_ENVS, progress: bool = False,
    ) -> Analysis:  # fmt: skip
        """Analyse policy and value function on fresh episodes of sampled actions; see `proximo.report.analysis`.

        Args:
            folder: for a PNG and a CSV file of each view, and `analysis.json`.
            dims: names, such as `observation[0]`, or indices of the two dimensions of the map.

        The other arguments are those of `evaluate`.

        Raises:
            UserError: as `evaluate`; or a dimension is unknown, or the folder cannot be written.
        """
        env = self.envs.env_for("an analysis", env)
        actor_of = trained_policy(self.learner, self.spaces, False, seed)
        with status_line(progress) as show:
            given = (actor_of, self.learner, self.config, self.spaces, env, folder)
            return analyze(*given, episodes, dims, seed, num_envs, show)

    def save(self, path: str | Path) -> Path:
        """Write a checkpoint folder, readable by both backends.

        Raises:
            UserError: the path exists and is not a checkpoint.
        """
        return checkpoint.save(path, self.learner, self._info(), self.spaces, self.progress)

    def _info(self) -> RunInfo:
        return RunInfo(self.env_id or self.envs.unimported, self.preset, self.config, self.resolved)

    @classmethod
    def load(
        cls, path: str | Path, env: EnvLike | None = None, *, network: Any = None, **changes: Unpack[Settings]
    ) -> PPO:
        """Load a checkpoint folder, or the latest checkpoint of a run folder.

        Args:
            env: the environment to continue in; by default the id in the checkpoint. An id of the form MODULE:ID has to
                be given again, because modules named in a file are not imported.
            network: the custom network, where one was trained.
            changes: settings to change, such as `backend="torch"`.

        Raises:
            UserError: there is no checkpoint, it is corrupt, or it does not fit.
        """
        saved, agent = load(path), cls.__new__(cls)
        envs, given = environments_of(saved, env, {**changes})
        config, agent.spaces, agent.learner = restore(path, saved, network, given)
        agent._bind(envs, config)
        agent.preset, agent.progress, agent._saved = saved.manifest.get("preset"), saved.progress, saved
        agent.run_dir = checkpoint_files.find_resumable_run_dir(path)
        return agent

    def close(self) -> None:
        """Close the environments, a vector environment of the user as well."""
        self.envs.close()


def environments_of(
    saved: Checkpoint, env: EnvLike | None, changes: dict[str, Any]
) -> tuple[TrainingEnvs, dict[str, Any]]:
    """The environments in which a checkpoint continues, `env` or its own, and the changed settings."""
    given = settings_for(env, changes)
    known: str | None = saved.manifest.get("env")
    unimported = known if env is None and isinstance(known, str) and names_module(known) else None
    env = known if env is None and not unimported else env
    env = with_version(env) if isinstance(env, str) else env
    if env not in (None, known) or given.get("isolate_envs"):
        given.setdefault("engine", "auto")  # the saved engine may not run them
    return TrainingEnvs(env, unimported), given


def check_records(config: Config, envs: TrainingEnvs, run_dir: str | Path | None) -> None:
    """Raise UserError for what cannot be recorded, before anything is written."""
    if run_dir is None and (config.capture_video or config.wandb):
        raise UserError("`capture_video` and `wandb` write into a run folder. Give `run_dir`.")
    if config.wandb:
        import_wandb()
    if config.capture_video:
        require_video(envs.env_for("a video"), config)
    if config.evaluation_interval:
        envs.env_for("an evaluation")


def settings_for(env: EnvLike | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings under their canonical names; a vector environment determines `num_envs`. UserError if one is invalid."""
    given = convert_settings(settings)
    if isinstance(env, VectorEnv) and given.get("isolate_envs"):
        raise UserError("`isolate_envs` does not apply to a vector environment, which runs as it is. Turn it off.")
    if isinstance(env, VectorEnv) and given.setdefault("num_envs", env.num_envs) != env.num_envs:
        raise UserError(
            f"`num_envs` is {given['num_envs']}, but the vector environment has {env.num_envs}. Leave it out."
        )
    return given


def config_for(env: EnvLike, preset: str | None, settings: dict[str, Any]) -> Config:
    """The preset's settings, overridden by the given ones; UserError if they are invalid or contradict each other."""
    given = settings_for(env, settings)
    base = presets.load_settings(env if isinstance(env, str) else None, preset)
    try:
        return from_mapping(override(base, given))
    except UserError as error:
        if not base:
            raise
        raise UserError(
            f"{error} (Other settings come from the preset; preset=None, or --preset none, uses the defaults.)"
        ) from error
