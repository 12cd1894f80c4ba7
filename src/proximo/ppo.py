"""The public face: an agent that learns, acts, saves and loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from proximo import checkpoint, presets
from proximo.config import FIELDS, Config, check, checked, from_mapping, override
from proximo.envs import EnvLike, engine_for, make_envs, require_same, spaces_of, with_version
from proximo.errors import UserError, note
from proximo.evaluate import Evaluation, evaluate, random, trained
from proximo.learner import Learner, choose_backend, make_learner
from proximo.parameters import architecture
from proximo.plot import plot, plot_run
from proximo.randomness import Purpose, generator
from proximo.record import Metrics, RunFolder
from proximo.spaces import Spaces
from proximo.trackers import import_wandb, recording
from proximo.train import Progress, iterations
from proximo.video import MAX_FRAMES, Video, require_video
from proximo.video import record as record_video

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
        self._predictions = generator(config.seed, Purpose.EVALUATION, iteration=2)

    @property
    def env_id(self) -> str | None:
        """The environment's id, where it has one."""
        return self._env if isinstance(self._env, str) else None

    def learn(
        self,
        total_timesteps: int | None = None,
        *,
        run_dir: str | Path | None = None,
        progress: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> PPO:
        """Train for `total_timesteps` more steps, or up to `config.total_timesteps`, or until `stop_at_return`.

        Schedules run over all the steps this agent will then have taken; each call begins new episodes, and
        averages training returns over those alone.

        Args:
            run_dir: keep config, metrics, checkpoints and the learning curve in this new folder (the first
                call's default: `config.run_dir`; nothing is written where both are None). What was learned is
                saved there also when the run fails.
            progress: show progress on the terminal.
            stop: asked after every iteration; True ends the run there, saved like any other.

        Raises:
            RunError: an environment or the update gave NaN or infinity.
            UserError: the run folder is in use or cannot be written, or `total_timesteps` is no whole number.
        """
        envs = self._open_envs()
        config = self._until(total_timesteps)
        run_dir = config.run_dir if run_dir is None else run_dir
        if run_dir is None and (config.capture_video or config.wandb):
            raise UserError("capture_video and wandb write into a run folder: give run_dir")
        if run_dir is not None:
            self._require_records(config)
        if progress and self.progress.global_step:
            note(f"schedules now end at step {config.total_timesteps:,}")
        with recording(run_dir, self.env_id, config, progress) as (folder, sinks):
            # Whether to compile is decided for each call anew.
            self.config = config.replace(run_dir=None, compile=self.config.compile)
            try:
                for metrics, samples in iterations(
                    self.config, envs, self.learner, self.progress, examine=folder is not None
                ):
                    for sink in sinks:
                        sink.write(metrics, samples)
                    if folder:
                        self._save_into(folder, config.checkpoint_interval)
                        self._film_into(folder, config.video_interval)
                    if stop():
                        break
            except (Exception, KeyboardInterrupt):
                # Parameters are those of the last complete iteration.
                if folder:
                    self._save_into(folder)
                raise
        if folder:
            self._finish(folder)
        return self

    def _finish(self, folder: RunFolder) -> None:
        """What a run leaves at its end: a checkpoint, a video, curves."""
        self._save_into(folder)
        self._film_into(folder, 1)
        if not folder.rows:
            return
        try:
            plot([folder.path])
            if self.progress.episodes:
                plot_run(folder.path)
        except Exception as error:
            note(f"curves of {folder.path} were not drawn: {error}")

    def _require_records(self, config: Config) -> None:
        """Refuse what cannot be recorded before anything is written."""
        if config.wandb:
            import_wandb()
        if config.capture_video:
            require_video(self._recordable(), config.env_kwargs)

    def _recordable(self) -> EnvLike:
        if self._env is None or isinstance(self._env, VectorEnv):
            raise UserError(
                "a video is made in an environment of its own: give env=…, an id or a function that makes one"
            )
        return self._env

    def _film_into(self, folder: RunFolder, interval: int) -> None:
        """Record an episode of the policy's mode every `interval` iterations; 0 is never."""
        path = folder.path / "videos" / f"step_{self.progress.global_step:012d}.mp4"
        due = interval and self.progress.iteration % interval == 0
        if not (self.config.capture_video and due) or path.exists():
            return
        try:
            self.record(path, max_frames=CAPTURED_FRAMES)
        except Exception as error:  # a picture less is no reason to lose a run
            note(f"{path} was not recorded: {error}")

    def iterate(self, total_timesteps: int | None = None) -> Iterator[Metrics]:
        """As `learn`, but hands over the metrics of each iteration; stop, save or evaluate in between."""
        self.config = self._until(total_timesteps).replace(compile=self.config.compile)
        for metrics, _ in iterations(self.config, self._open_envs(), self.learner, self.progress):
            yield metrics

    def _until(self, total_timesteps: int | None) -> Config:
        """The config of a call that trains for so many more steps, which the learner is told."""
        config, done = self.config, self.progress.global_step
        if total_timesteps is not None:
            steps = check(FIELDS["total_timesteps"], total_timesteps)
            config = config.replace(total_timesteps=done + steps)
        return config.replace(
            compile=self.learner.expect(config.minibatches_of(config.total_timesteps - done))
        )

    def _save_into(self, folder: RunFolder, interval: int = 1) -> None:
        """Save every `interval` iterations; 0 is never."""
        path = checkpoint.step_folder(folder.path, self.progress.global_step)
        if interval and self.progress.iteration % interval == 0 and not path.exists():
            self.save(path)

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
        """Record one episode as MP4, in an environment of its own, up to a number of frames; see `proximo.video`.

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
        own_network, progress = self._network is not None, self.progress
        manifest = checkpoint.describe(
            self.learner,
            self.config,
            self.spaces,
            self.env_id,
            own_network,
            progress.global_step,
            progress.iteration,
        )
        return checkpoint.save(path, self.learner.state(), manifest)

    @classmethod
    def load(
        cls, path: str | Path, env: EnvLike | None = None, *, network: Any = None, **changes: Any
    ) -> PPO:
        """Load a checkpoint folder, or the latest checkpoint of a run folder.

        Args:
            env: the environment to go on in; by default the id that the checkpoint names.
            network: the user's own network, where one was trained.
            changes: settings to change, such as `backend="torch"`.

        Raises:
            UserError: there is no checkpoint, it is damaged, or it does not fit.
        """
        arrays, manifest = checkpoint.load(path)
        given = given_for(env, changes)
        if env is not None or given.get("isolate_envs"):
            given.setdefault(
                "engine", "auto"
            )  # what was chosen may not run another environment, or isolate it
        env = manifest["env"] if env is None else env
        config = checkpoint.config_of(path, manifest, network, given)
        spaces = Spaces.from_dict(manifest["spaces"])
        agent = cls.__new__(cls)
        agent._bind(env, config, spaces, network, None)
        agent.learner.load(arrays)
        agent.progress.global_step = manifest["global_step"]
        agent.progress.iteration = manifest["iteration"]
        return agent

    def close(self) -> None:
        """Close the environments."""
        if self._envs is not None:
            self._envs.close()
            self._envs = None

    def _open_envs(self) -> VectorEnv:
        if self._envs is None:
            if self._env is None:
                raise UserError("this checkpoint names no environment: give one with PPO.load(path, env=…)")
            envs, self.config = opened(self._env, self.config)
            try:
                require_same(spaces_of(envs), self.spaces)
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
    engine = engine_for(env, count, config.engine, kwargs, config.total_timesteps, isolate)
    envs = make_envs(env, count, engine, kwargs, isolate, config.env_timeout)
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
