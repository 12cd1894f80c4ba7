"""The public face: an agent that learns, acts, saves and loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from proximo.config import presets
from proximo.config.names import checked, from_mapping, override
from proximo.config.settings import FIELDS, Config
from proximo.config.values import check
from proximo.envs.make import (
    EnvLike,
    make_envs,
    require_matching_spaces,
    resolve_engine,
    spaces_of,
    with_version,
)
from proximo.errors import Exited, NotFinite, RunError, UserError, describe_error, notify_user
from proximo.evaluate import Evaluation, evaluate, random, trained
from proximo.learner.architecture import architecture
from proximo.learner.make import choose_backend, make_learner
from proximo.learner.protocol import Learner
from proximo.report.plot import plot, plot_run
from proximo.report.video import MAX_FRAMES, Video, require_video
from proximo.report.video import record as record_video
from proximo.rollout.collector import Collector, state_adapters
from proximo.rollout.randomness import Purpose, environment_seeds, generator
from proximo.run import checkpoint
from proximo.run import debug_bundle as bundle
from proximo.run.checkpoint import Saved
from proximo.run.folder import RunFolder
from proximo.run.metrics import Metrics
from proximo.run.progress import Progress
from proximo.run.retention import CheckpointManager, require_latest
from proximo.run.trackers import import_wandb, recording, tell
from proximo.spaces.spaces import Spaces
from proximo.train import PATIENCE, Iteration, iterations

CAPTURED_FRAMES = (
    1_000  # of a video while training; MuJoCo takes about a tenth of a second a frame without a GPU
)


class PPO:
    """PPO on an environment.

        agent = PPO("CartPole-v1", num_envs=8, seed=0).learn(100_000)

    Args:
        env: an id registered with Gymnasium, a function that makes one environment, or a vector environment.
        preset: "auto" starts from the environment's preset where there is one, None from the defaults, and
            a name from that preset. Settings given here win.
        network: a network of your own, in the backend's form (`proximo.jax.networks.Network` or
            `proximo.torch.networks.Network`).
        settings: any setting of `proximo.Config`, such as `num_envs`, `learning_rate`, `backend`.

    Raises:
        UserError: an unknown environment or setting, a value out of range, or a space that is not supported.
    """

    def __init__(
        self, env: EnvLike, *, preset: str | None = "auto", network: Any = None, **settings: Any
    ) -> None:
        env = with_version(env) if isinstance(env, str) else env
        config = resolve(env, preset, settings)
        envs, config = opened(env, config)
        try:
            self._bind(env, config, spaces_of(envs), network, envs)
        except BaseException:
            if envs is not env:
                envs.close()
            raise

    def __enter__(self) -> PPO:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bind(
        self, env: EnvLike | None, config: Config, spaces: Spaces, network: Any, envs: VectorEnv | None
    ) -> None:
        self._env, self._envs, self._network = env, envs, network
        if network is None:
            config = config.replace(**architecture(config, spaces)._asdict())
        self.config = config.replace(backend=choose_backend(config, spaces, network))
        self.spaces = spaces
        self.learner: Learner = make_learner(self.config, spaces, network)
        self.config = self.config.replace(threads=self.learner.threads, device=self.learner.device.name)
        self.progress = Progress()
        self._collector: Collector | None = None
        self._saved: Saved | None = None  # the checkpoint that this agent was loaded from, until it learns
        self._home: Path | None = None  # the run folder that it may go on in
        self._unnamed: str | None = (
            None  # the environment, where a file names it and to make it is to import it
        )
        self._predictions = generator(config.seed, Purpose.EVALUATION, iteration=2)

    @property
    def env_id(self) -> str | None:
        """The environment's id, where it has one."""
        return self._env if isinstance(self._env, str) else None

    @property
    def home(self) -> Path | None:
        """The run folder in which a loaded agent may go on: that of its checkpoint, if it is the latest there."""
        return self._home

    @property
    def repeatable(self) -> bool:
        """Whether the environments' engine can bring them back to where they stood, in another process too."""
        return any(state_adapters(self._open_envs()))

    def no_environment(self) -> str:
        """What to say where an environment is needed and none is known."""
        if self._unnamed is None:
            return "this checkpoint names no environment: give one, with PPO.load(path, env=…) or --env"
        return (
            f"this was trained in {self._unnamed}, and what a file names is not imported: if "
            f"{self._unnamed.partition(':')[0]} is yours, name it again, with PPO.load(path, env=…) or --env"
        )

    def learn(
        self,
        total_timesteps: int | None = None,
        *,
        run_dir: str | Path | None = None,
        progress: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> PPO:
        """Train for `total_timesteps` more steps, or up to `config.total_timesteps`, or until `stop_at_return`.

        Schedules run over all the steps this agent will then have taken. Episodes go on where they stood when it last
        learned, in another process too, if the environments can be brought back: up to an unchanged
        total the result is then that of a run that never stopped, to the bit, with the same backend, versions and
        threads on the same machine. Otherwise new episodes begin, and a note says why; training returns are averaged
        over those alone.

        Args:
            run_dir: keep config, metrics, checkpoints and the learning curve in this new folder, or go on in the one
                whose latest checkpoint was loaded, or that this agent wrote last (the first call's default:
                `config.run_dir`; nothing is written where both are None). What was learned is saved there also when the
                run fails.
            progress: show progress on the terminal.
            stop: asked after every iteration; True ends the run there, saved like any other.

        Raises:
            RunError: an environment or the update gave NaN or infinity.
            UserError: the run folder is in use or cannot be written, or `total_timesteps` is no whole number.
        """
        self._open_envs()
        run_dir = self.config.run_dir if run_dir is None else run_dir
        if run_dir is None and (self.config.capture_video or self.config.wandb):
            raise UserError("capture_video and wandb write into a run folder: give run_dir")
        if run_dir is not None or self.config.evaluation_interval:
            self._require_records(self.config)
        goes_on = run_dir is not None and self._home is not None and Path(run_dir).resolve() == self._home
        total = self.config.total_timesteps
        config = self._until(total_timesteps)
        if progress and self.progress.global_step and config.total_timesteps != total:
            notify_user(f"schedules now end at step {config.total_timesteps:,}")
        after = self.progress if goes_on else None
        check = partial(require_latest, self.progress.global_step)
        with recording(run_dir, self.env_id, config, progress, after, check) as (folder, sinks):
            self._home = folder.path.resolve() if folder else self._home
            # Whether to compile is decided for each call anew.
            kept = config.replace(run_dir=None, compile=self.config.compile)
            collector, self.config = self._stage(kept), kept
            keeper = (
                CheckpointManager(folder.path, config, self.progress, self._saver(folder)) if folder else None
            )
            try:
                if keeper:
                    keeper.save()  # from which a run that dies early goes on
                for done in self._iterations(collector, examine=folder is not None):
                    tell(sinks, done.metrics, done.samples)
                    if folder and keeper:
                        keeper.after_iteration(done.evaluated)
                        self._film_into(folder, config.video_interval)
                    if stop():
                        break
                if keeper:
                    keeper.save()
            except BaseException as error:
                # Everything is as it was after the last complete iteration.
                if folder and keeper:
                    self._rescue(folder, keeper, error)
                raise
            if keeper and keeper.failures:
                raise RunError(
                    f"the last checkpoint could not be saved in {run_dir}: make room, and save again"
                )
        if folder:
            self._finish(folder)
        return self

    def _saver(self, folder: RunFolder) -> Callable[[Path], None]:
        """Saves a checkpoint, when the metrics up to it are on the disk."""

        def save(path: Path) -> None:
            folder.sync()
            self.save(path)

        return save

    def _stage(self, config: Config) -> Collector:
        """The environments, where they stood when this agent last learned, if they can be brought back.

        Args:
            config: of the call that is beginning.
        """
        envs, saved = self._open_envs(), self._saved
        made_here = envs is not self._env
        if (
            made_here
            and self._collector
            and self._collector.envs is envs
            and self._collector.state_is_current
        ):
            return self._collector
        world = self.progress.env_state
        if made_here and self._collector:
            self.close()  # repeating begins with new ones
        collector = Collector(self._open_envs(), self.spaces, config, resumable=True)
        why = (
            "the checkpoint does not say where they stood"
            if world is None
            else collector.restore_state(world)
        )
        if why:
            if self.progress.global_step:
                notify_user(f"new episodes begin, since environments could not be brought back: {why}")
            if made_here and world and not world.reset_reason:
                self.close()  # an attempt may have broken them
                collector = Collector(self._open_envs(), self.spaces, config, resumable=True)
            count, begun = config.num_envs, self.progress.iteration
            collector.reset(environment_seeds(config.seed, count, iteration=begun))
            self.progress.episodes.clear()
        if saved and self.progress.global_step:
            changed = checkpoint.inexact(saved, config, self.env_id, self.learner.compiled)
            if not why:
                but = f"; what is learned is not the same to the bit, since {'; '.join(changed)}"
                notify_user(
                    f"{config.num_envs} environments go on exactly where they stood{but if changed else ''}"
                )
            self.progress.resumed.append(
                {
                    "global_step": self.progress.global_step,
                    "exact": not why and not changed,
                    "why": why or "; ".join(changed),
                }
            )
        self._collector, self._saved = collector, None
        return collector

    def _iterations(self, collector: Collector, examine: bool = False) -> Iterator[Iteration]:
        return iterations(self.config, collector, self.learner, self.progress, self._evaluating(), examine)

    def _evaluating(self) -> Callable[[Metrics], float | None]:
        """Evaluates where it is time for it. One that fails is left out and said; the third in a row ends the run."""
        failures = 0

        def evaluated(metrics: Metrics) -> float | None:
            nonlocal failures
            try:
                found = self._evaluate_now(metrics)
            except Exited:
                raise
            except Exception as error:
                failures += 1
                said = f"the evaluation at step {self.progress.global_step:,} failed: {describe_error(error)}"
                if failures == PATIENCE:
                    raise RunError(f"{said} ({failures} in a row)") from error
                notify_user(f"{said} ({failures} in a row; {PATIENCE} end the run)")
                return None
            failures = 0 if found is not None else failures
            return found

        return evaluated

    def _evaluate_now(self, metrics: Metrics) -> float | None:
        """Evaluate where it is time for it: the mean return, which metrics then have as well."""
        config = self.config
        if not config.evaluation_interval:
            return None
        names = ("return_mean", "return_std", "length_mean")
        metrics |= {f"evaluation/{name}": None for name in names}
        if self.progress.iteration % config.evaluation_interval:
            return None
        found = self.evaluate(config.evaluation_episodes, seed=config.seed).to_dict()
        metrics |= {f"evaluation/{name}": found[name] for name in names}
        return found["return_mean"]

    def _rescue(self, folder: RunFolder, keeper: CheckpointManager, error: BaseException) -> None:
        """Save what was learned before an error, and what led to it where numbers did."""
        try:
            if not keeper.gave_up:
                keeper.save()
            if isinstance(error, NotFinite):
                path = bundle.save(folder.path, error, self.learner, self.config, self.env_id, self.progress)
                notify_user(f"what led to it is kept: proximo inspect {path}")
        except Exception as another:
            notify_user(f"not everything could be saved: {another}")

    def _finish(self, folder: RunFolder) -> None:
        """What a run leaves at its end besides a checkpoint: a video, curves."""
        self._film_into(folder, 1)
        if not folder.rows:
            return
        try:
            plot([folder.path])
            if self.progress.episodes:
                plot_run(folder.path)
        except Exception as error:
            notify_user(f"curves of {folder.path} were not drawn: {error}")

    def _require_records(self, config: Config) -> None:
        """Refuse what cannot be recorded before anything is written."""
        if config.wandb:
            import_wandb()
        if config.capture_video:
            require_video(self._recordable(), config.env_kwargs)
        self._require_evaluations()

    def _require_evaluations(self) -> None:
        if self.config.evaluation_interval:
            self._recordable("an evaluation runs episodes in environments of its own")

    def _recordable(self, why: str = "a video is made in an environment of its own") -> EnvLike:
        if self._env is None or isinstance(self._env, VectorEnv):
            raise UserError(f"{why}: give env=…, an id or a function that makes one")
        return self._env

    def _film_into(self, folder: RunFolder, interval: int) -> None:
        """Record an episode of the policy's mode every `interval` iterations; 0 is never."""
        path = folder.path / "videos" / f"step_{self.progress.global_step:012d}.mp4"
        due = interval and self.progress.iteration % interval == 0
        if not (self.config.capture_video and due) or path.exists():
            return
        try:
            self.record(path, max_frames=CAPTURED_FRAMES)
        except Exited:
            raise
        except Exception as error:  # a picture less is no reason to lose a run
            notify_user(f"{path} was not recorded: {describe_error(error)}")

    def iterate(self, total_timesteps: int | None = None) -> Iterator[Metrics]:
        """As `learn`, but hands over the metrics of each iteration; stop, save or evaluate in between."""
        self._open_envs()
        self._require_evaluations()
        config = self._until(total_timesteps).replace(compile=self.config.compile)
        collector, self.config = self._stage(config), config
        for done in self._iterations(collector):
            yield done.metrics

    def _until(self, total_timesteps: int | None) -> Config:
        """The config of a call that trains for so many more steps, which the learner is told."""
        config, done = self.config, self.progress.global_step
        if total_timesteps is not None:
            steps = check(FIELDS["total_timesteps"], total_timesteps)
            config = config.replace(total_timesteps=done + steps)
        # A run that goes on to its end as planned is one run, whatever is left of it.
        compiled, planned = self.learner.compiled if done else None, self.config.total_timesteps
        if self._saved:
            compiled = self._saved.manifest.get("compiled")
            planned = self._saved.manifest["config"].get("total_timesteps")
        if planned != config.total_timesteps:
            compiled = None
        minibatches = config.minibatches_of(config.total_timesteps - done)
        return config.replace(compile=self.learner.expect(minibatches, compiled))

    def predict(self, observation: Any, deterministic: bool = True) -> np.ndarray:
        """Environment actions for one observation, or for a batch of them along the first axis.

        Each is taken as the first of an episode: a recurrent network remembers nothing between calls.

        Raises:
            UserError: the observation has not the shape of the observation space, or is not finite.
        """
        obs = {path: np.asarray(value) for path, value in self.spaces.read(observation)}
        leading = {
            obs[leaf.path].shape[: obs[leaf.path].ndim - len(leaf.shape)] for leaf in self.spaces.observation
        }
        if len(leading) > 1 or len(max(leading)) > 1 or 0 in max(leading):
            raise UserError(
                f"expected one observation or a batch along the first axis, got leading axes {leading}"
            )
        if not all(np.isfinite(value).all() for value in obs.values()):
            raise UserError("the observation is not finite")
        single = leading == {()}
        obs = {leaf.path: obs[leaf.path].astype(leaf.dtype) for leaf in self.spaces.observation}
        if single:
            obs = {path: value[None] for path, value in obs.items()}
        rows = len(next(iter(obs.values())))
        noise = None if deterministic else [self.spaces.action.noise(self._predictions, (rows,))]
        raw = self.learner.actor(noise)(obs, np.ones(rows, bool))
        action = self.spaces.action.to_env(raw, self.config)
        return action[0] if single else action

    def evaluate(
        self,
        episodes: int = 100,
        *,
        deterministic: bool = True,
        seed: int = 0,
        env: EnvLike | None = None,
        render: bool = False,
        record: str | Path | None = None,
    ) -> Evaluation:
        """Complete episodes in fresh environments; see `proximo.evaluate`.

        Args:
            render: show them in a window.
            record: also record an episode, as `record` does.

        Raises:
            UserError: the environment is not known (give `env`), has other spaces, or cannot be shown.
        """
        env = self._env if env is None else env
        if env is None or isinstance(env, VectorEnv):
            raise UserError("evaluate needs an environment id or a function that makes one: give env=…")
        policy = trained(self.learner, self.spaces, deterministic, seed)
        result = evaluate(policy, self.config, self.spaces, env, episodes, deterministic, seed, render=render)
        if record is not None:
            self.record(record, deterministic=deterministic, seed=seed, env=env)
        return result

    def record(
        self,
        path: str | Path,
        *,
        deterministic: bool = True,
        seed: int = 0,
        env: EnvLike | None = None,
        max_frames: int = MAX_FRAMES,
    ) -> Video:
        """Record one episode as MP4, in an environment of its own; see `proximo.report.video`.

        Raises:
            UserError: something is not installed, or the environment cannot be rendered; the message says what to do.
        """
        policy = trained(self.learner, self.spaces, deterministic, seed)
        env = self._recordable() if env is None else env
        (video,) = record_video(
            policy(1), self.config, self.spaces, env, path, seed=seed, max_frames=max_frames
        )
        return video

    def save(self, path: str | Path) -> Path:
        """Write a checkpoint folder, readable by both backends.

        Raises:
            UserError: something that is no checkpoint stands there.
        """
        manifest, arrays = checkpoint.describe(
            self.learner, self.config, self.spaces, self.env_id or self._unnamed, self._network is not None,
            self.progress,
        )  # fmt: skip
        return checkpoint.save(path, arrays, manifest)

    @classmethod
    def load(
        cls, path: str | Path, env: EnvLike | None = None, *, network: Any = None, **changes: Any
    ) -> PPO:
        """Load a checkpoint folder, or the latest checkpoint of a run folder.

        Args:
            env: the environment to go on in; by default the id that the checkpoint names. One of the form MODULE:ID
                has to be given again, since what a file names is not imported.
            network: the user's own network, where one was trained.
            changes: settings to change, such as `backend="torch"`.

        Raises:
            UserError: there is no checkpoint, it is damaged, or it does not fit.
        """
        saved = checkpoint.load(path)
        manifest = saved.manifest
        given = given_for(env, changes)
        env = with_version(env) if isinstance(env, str) else env
        if env not in (None, manifest.get("env")) or given.get("isolate_envs"):
            given.setdefault(
                "engine", "auto"
            )  # what was chosen may not run another environment, or isolate it
        known = manifest.get("env")
        imports = env is None and isinstance(known, str) and ":" in known
        env = known if env is None and not imports else env
        config = checkpoint.config_of(path, manifest, network, given)
        spaces = checkpoint.spaces_in(saved, config)
        agent = cls.__new__(cls)
        try:
            agent._bind(env, config, spaces, network, None)
        except UserError as error:
            if "device" in given or "is not available" not in str(error):
                raise
            agent._bind(env, config.replace(device="auto"), spaces, network, None)  # there is none as before
        agent.learner.load(saved.arrays)
        agent.progress, agent._saved = saved.progress, saved
        agent._home, agent._unnamed = checkpoint.home_of(path), known if imports else None
        return agent

    def close(self) -> None:
        """Close the environments."""
        if self._envs is not None:
            self._envs.close()
            self._envs = self._collector = None

    def _open_envs(self) -> VectorEnv:
        if self._envs is not None and self._envs is not self._env and self._envs.closed:
            self._envs = None  # after a fault
        if self._envs is None:
            if self._env is None:
                raise UserError(self.no_environment())
            envs, self.config = opened(self._env, self.config)
            try:
                require_matching_spaces(spaces_of(envs), self.spaces)
            except UserError:
                envs.close()
                raise
            self._envs = envs
        return self._envs


def evaluate_random(
    env: EnvLike,
    episodes: int = 100,
    *,
    seed: int = 0,
    env_kwargs: Mapping[str, Any] | None = None,
    render: bool = False,
    record: str | Path | None = None,
) -> Evaluation:
    """Complete episodes with actions drawn from the action space: the baseline to compare with.

    Raises:
        UserError: as `PPO.evaluate`.
    """
    if isinstance(env, VectorEnv):
        raise UserError(
            "evaluate needs an environment id or a function that makes one, not a vector environment"
        )
    config = Config(env_kwargs=dict(env_kwargs or {}))
    envs = make_envs(env, 1, "sync", config.env_kwargs)
    spaces = spaces_of(envs)
    envs.close()
    policy = random(spaces, seed)
    result = evaluate(policy, config, spaces, env, episodes, False, seed, render=render)
    if record is not None:
        record_video(policy(1), config, spaces, env, record, seed=seed)
    return result


def opened(env: EnvLike, config: Config) -> tuple[VectorEnv, Config]:
    """The environments, and the config with the engine that runs them."""
    count, kwargs, isolate = config.num_envs, config.env_kwargs, config.isolate_envs
    engine = resolve_engine(
        env, count, config.engine, kwargs, config.total_timesteps, isolate, config.exact_resume
    )
    envs = make_envs(env, count, engine, kwargs, isolate, config.env_timeout)
    if config.exact_resume and not any(state_adapters(envs)):
        if envs is not env:
            envs.close()
        raise UserError(
            f"exact_resume: engine {engine} cannot bring its environments back to where they stood; use engine auto, "
            "workers or sync"
        )
    return envs, config.replace(engine=engine)


def given_for(env: EnvLike | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings under their own names, checked one by one; a vector environment decides num_envs.

    Raises:
        UserError: an unknown name or a bad value.
    """
    given = checked(settings)
    if isinstance(env, VectorEnv) and given.get("isolate_envs"):
        raise UserError("isolate_envs is for environments that Proximo makes, not for a vector environment")
    if isinstance(env, VectorEnv) and given.setdefault("num_envs", env.num_envs) != env.num_envs:
        raise UserError(f"num_envs is {given['num_envs']}, but the vector environment has {env.num_envs}")
    return given


def resolve(env: EnvLike, preset: str | None, settings: dict[str, Any]) -> Config:
    """The config that preset and given settings make together; given settings win.

    Raises:
        UserError: an unknown name, a bad value or a contradiction.
    """
    given = given_for(env, settings)
    base = presets.settings_for(env if isinstance(env, str) else None, preset)
    try:
        return from_mapping(override(base, given))
    except UserError as error:
        if not base:
            raise
        raise UserError(
            f"{error} (settings not given come from the preset; --preset none uses the defaults)"
        ) from error
