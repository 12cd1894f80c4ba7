"""The environments that an agent trains in: made when needed, reused, restored, or reset."""

from collections.abc import Callable
from typing import Any

from gymnasium.vector import VectorEnv

from proximo.config.settings import Config
from proximo.device import DeviceGroup, DeviceSource
from proximo.envs.make import (
    EnvLike,
    make_envs,
    require_matching_spaces,
    resolve_engine,
    spaces_of,
    warn_of_info,
    warn_of_statistics,
)
from proximo.envs.wrappers import with_wrappers
from proximo.errors import UserError, notify_user
from proximo.learner.learner import Learner
from proximo.rollout.collector import Collector, state_adapters
from proximo.rollout.randomness import environment_seeds
from proximo.run.checkpoint import Checkpoint, RunInfo, find_differences
from proximo.run.progress import Progress
from proximo.source import HostSource
from proximo.spaces.spaces import Spaces


class TrainingEnvs:
    """The environments that an agent trains in."""

    def __init__(self, env: EnvLike | None, unimported: str | None = None) -> None:
        self.env = env  # as given by the user; None where it is unknown
        self.unimported = unimported  # the id MODULE:ID in a checkpoint; modules named in a file are not imported
        self.engine: str | None = None  # steps the environments; None until they are made
        self.is_stopping: Callable[[], bool] = lambda: False  # checked before every step; True ends a run
        self._envs: VectorEnv | None = None
        self._collector: Collector | None = None  # of the last call, which the next one may continue
        self._device_source: DeviceSource | None = None  # the same where environments run on the device

    @property
    def is_open(self) -> bool:
        """Whether the environments exist."""
        return self._envs is not None

    @property
    def owns_envs(self) -> bool:
        """Whether the environments were made here, not by the user."""
        return self._envs is not None and self._envs is not self.env

    def missing_message(self) -> str:
        """Error message for an unknown environment."""
        if self.unimported is None:
            return "the checkpoint names no environment. Give one, with PPO.load(path, env=…) or --env."
        module = self.unimported.partition(":")[0]
        return (
            f"the agent was trained in {self.unimported}, and modules named in a file are not imported. If you trust "
            f"{module}, give the environment again, with PPO.load(path, env=…) or --env."
        )

    def supports_exact_resume(self, config: Config, spaces: Spaces) -> bool:
        """Whether the engine can restore its environments exactly, in another process too."""
        return any(state_adapters(self.open(config, spaces)))

    def env_for(self, purpose: str, env: EnvLike | None = None) -> EnvLike:
        """The id or function that makes another environment; UserError if it is unknown or a vector environment."""
        env = self.env if env is None else env
        if env is None or isinstance(env, VectorEnv):
            raise UserError(
                f"{purpose} needs an environment that can be made again. Give an id or a function that makes one, to "
                "PPO or as env=…, or turn it off."
            )
        return env

    def open(self, config: Config, spaces: Spaces | None = None) -> VectorEnv:
        """The vector environment, made if it does not exist.

        Args:
            spaces: that it must have.

        Raises:
            UserError: the environment is unknown, cannot be made, or has other spaces.
        """
        if self._envs is not None and self.owns_envs and self._envs.closed:
            self._envs = self._collector = self._device_source = None  # after a fault
        if self._envs is None:
            if self.env is None:
                raise UserError(self.missing_message())
            self._envs, self.engine = make_or_wrap_envs(self.env, config, spaces)
            warn_of_statistics(self._envs)
        return self._envs

    def is_on_device(self, learner: Learner) -> bool:
        """Whether open environments run on the device, together with the update."""
        return self.engine_for(learner) == "device"

    def engine_for(self, learner: Learner) -> str | None:
        """The engine that trains this learner; None until the environments are made."""
        return "native" if self.engine == "device" and learner.backend != "jax" else self.engine

    def join(self, source: DeviceSource | None) -> None:
        """Use a source that belongs to a group of runs; None leaves it."""
        self._device_source = source

    def start(
        self, settings: Callable[[], Config], spaces: Spaces, progress: Progress, learner: Learner
    ) -> tuple[HostSource | DeviceSource, str]:
        """Environments that continue, are restored from `progress.env_state`, or begin new episodes.

        Returns:
            The source to train from, and why the simulator state was not restored, or "".
        """
        config = settings()
        envs: Any = self.open(config, spaces)
        if config.engine == "device" and not self.is_on_device(learner):
            raise UserError(
                f"`engine` device trains with backend jax, but the backend is {learner.backend}. Use --backend jax, or "
                "engine native, which steps the environments on the host."
            )
        if self.is_on_device(learner):
            self._device_source = self._device_source or DeviceGroup([learner], envs.env).sources[0]
            self._device_source.bind(settings, progress)
            return self._device_source, start_on_device(self._device_source, progress)
        last, state = self._collector, progress.env_state
        if self.owns_envs and last:
            if state and last.captured is state:
                return HostSource(last, config), ""
            self.close()  # episodes are repeated in new environments
        collector = self._new_collector(config, spaces)
        reason = "the checkpoint holds no simulator state" if state is None else collector.restore_state(state)
        if reason:
            notify_reset(progress, reason)
            if self.owns_envs and state and not state.reset_reason:
                self.close()  # the attempt may have broken them
                collector = self._new_collector(config, spaces)
            collector.reset(environment_seeds(config.seed, config.num_envs, iteration=progress.iteration))
            progress.episodes.clear()
        elif names := getattr(collector.envs.unwrapped, "generators", ""):
            notify_user(
                f"the environment has random generators of its own ({names}), which are not restored. Use np_random, "
                "or add snapshot() and restore(), see proximo.rollout.env_state"
            )
            reason = f"random generators of the environment ({names}) are not restored"
        return HostSource(collector, config), reason

    def _new_collector(self, config: Config, spaces: Spaces) -> Collector:
        self._collector = Collector(self.open(config, spaces), spaces, config, resumable=True)
        return self._collector

    def close(self) -> None:
        """Close the environments, a vector environment of the user as well."""
        if self._envs is not None:
            self._envs.close()
            self._envs = self._collector = self._device_source = None


def start_on_device(source: DeviceSource, progress: Progress) -> str:
    """Continue, restore or reset environments on the device; see `TrainingEnvs.start`."""
    state = progress.env_state
    if state and source.captured is state:
        return ""
    reason = "the checkpoint holds no simulator state" if state is None else source.restore(state)
    if reason:
        notify_reset(progress, reason)
        source.reset(progress.iteration)
        progress.episodes.clear()
    return reason


def notify_reset(progress: Progress, reason: str) -> None:
    """Notify the user that a run which has begun continues with new episodes."""
    if progress.global_step:
        notify_user(f"the simulator state could not be restored, so every environment was reset: {reason}")


def make_or_wrap_envs(env: EnvLike, config: Config, spaces: Spaces | None) -> tuple[VectorEnv, str]:
    """The vector environment of a run, and the engine that steps it; UserError if it does not have these `spaces`."""
    env = with_wrappers(env, config.wrappers)
    count, kwargs, isolate = config.num_envs, config.env_kwargs, config.isolate_envs
    engine = resolve_engine(env, count, config.engine, kwargs, config.total_timesteps, isolate, config.exact_resume)
    envs = make_envs(env, count, engine, kwargs, isolate, config.env_timeout, config.log_info)
    warn_of_info(envs, config.log_info)
    try:
        if config.exact_resume and not any(state_adapters(envs)):
            raise UserError(
                f"`exact_resume` is on, but engine {engine} cannot restore its environments. Use engine auto, workers "
                "or sync."
            )
        if spaces:
            require_matching_spaces(spaces_of(envs, config.action_bins), spaces)
    except UserError:
        if envs is not env:
            envs.close()
        raise
    return envs, engine


def record_resume(saved: Checkpoint | None, info: RunInfo, progress: Progress, reason: str) -> None:
    """Notify the user how a loaded run continues, and add it to `progress.resumed`.

    `reason` is the second result of `TrainingEnvs.start`.
    """
    if saved is None:
        return
    project = saved.manifest["config"].get("wandb")
    if project and not info.config.wandb:
        notify_user(f"the run was logged to Weights & Biases before, and is not now. Use --wandb {project}, or wandb=…")
    if not progress.global_step:
        return
    changes = "; ".join(find_differences(saved, info))
    if not reason:
        count, difference = (info.config.num_envs, f"; it is not bit-identical, because {changes}" if changes else "")
        notify_user(f"training resumes from the exact simulator state of {count} environments{difference}")
    elif changes:
        notify_user(f"also changed: {changes}")
    why = "; ".join(part for part in (reason, changes) if part)
    how = {"global_step": progress.global_step, "exact": not why, "why": why}
    progress.resumed.append(how)
