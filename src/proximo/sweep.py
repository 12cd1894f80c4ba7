"""Several training runs in one process: combinations of settings, such as seeds and learning rates.

Runs on environments in JAX that differ only in their seed and in hyperparameters that are traced are computed together,
in one jitted call. Others are trained one after the other.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from gymnasium.vector import VectorEnv

from proximo.config.names import canonical_names
from proximo.config.settings import SETTINGS, Config
from proximo.device import DeviceGroup
from proximo.environments import TrainingEnvs
from proximo.errors import NOTES_OF, RunError, UserError
from proximo.learner.learner import Learner
from proximo.report.page.write import write_records
from proximo.report.plot import RETURN
from proximo.report.recorder import call_back
from proximo.rollout.rollout import Metrics
from proximo.run.console import Console, RunRow
from proximo.run.folder import require_empty
from proximo.run.metrics import METRICS
from proximo.run.progress import Progress
from proximo.spaces.spaces import Spaces
from proximo.train import find_fixed

MAX_NAME = 120  # characters of the name of a run folder
SHARED = ("env_kwargs", "wrappers", "update_epochs")  # settings that runs of one program share, besides fixed ones


class Trainable(Protocol):
    """What a sweep needs of an agent; see `proximo.PPO`."""

    config: Config
    spaces: Spaces
    envs: TrainingEnvs
    learner: Learner
    progress: Progress
    run_dir: Path | None

    def training(
        self, total_timesteps: int | None, run_dir: str | Path | None, show: bool
    ) -> Generator[Metrics, None, None]:
        """Yield an empty dictionary when the environments are ready, then the metrics of each iteration."""
        ...

    def close(self) -> None:
        """Close the environments."""
        ...


Agent = TypeVar("Agent", bound=Trainable)


class Sweep(Generic[Agent]):
    """Agents that differ in some settings; made by `PPO.sweep`.

    Attributes:
        agents: one for each combination of values.
        values: the settings in which each of them differs.
    """

    def __init__(self, agents: Sequence[Agent], values: Sequence[Mapping[str, Any]]) -> None:
        self.agents, self.values = list(agents), [dict(one) for one in values]
        self._units = group_by_program(self.agents)  # indices of agents that are computed together
        self._groups: dict[int, DeviceGroup] = {}  # by the first index of a unit
        for first, *others in self._units:
            for n in others:
                self.agents[n].learner.share_functions(self.agents[first].learner)

    def __enter__(self) -> Sweep[Agent]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.agents)

    def __iter__(self) -> Iterator[Agent]:
        return iter(self.agents)

    def __getitem__(self, index: int) -> Agent:
        return self.agents[index]

    def learn(
        self,
        total_timesteps: int | None = None,
        *,
        run_dir: str | Path | None = None,
        progress: bool = False,
        callback: Callable[[Agent, Metrics], Any] | None = None,
    ) -> Sweep[Agent]:
        """Train every agent as `PPO.learn` does.

        Args:
            total_timesteps: of each agent.
            run_dir: a folder in which each agent gets a run folder with a name such as `seed-0`; by default `run_dir`
                of the settings. Curves and a report of all runs are written there too.
            progress: show progress on the terminal.
            callback: called with an agent and the metrics of every iteration of it; False ends its run.

        Returns:
            self.

        Raises:
            RunError, UserError: as `PPO.learn`, preceded by the settings of the run that failed. The others end after
                their current iteration.
        """
        with closing(self._train(total_timesteps, run_dir, progress, callback)) as training:
            for _ in training:
                pass
        return self

    def iterate(
        self, total_timesteps: int | None = None, *, run_dir: str | Path | None = None, progress: bool = False
    ) -> Generator[tuple[Agent, Metrics], None, None]:
        """Train as `learn` does, but yield every agent with the metrics of each of its iterations."""
        yield from self._train(total_timesteps, run_dir, progress, None)

    def close(self) -> None:
        """Close all environments."""
        for agent in self.agents:
            agent.close()

    def _train(
        self,
        total_timesteps: int | None,
        run_dir: str | Path | None,
        show: bool,
        callback: Callable[[Agent, Metrics], Any] | None,
    ) -> Generator[tuple[Agent, Metrics], None, None]:
        if total_timesteps is not None:
            total_timesteps = SETTINGS["total_timesteps"].convert(total_timesteps)
        folder = self.agents[0].config.run_dir if run_dir is None else run_dir
        names = run_names(self.values)
        run_dirs = [Path(folder) / name if folder else None for name in names]
        for agent, path in zip(self.agents, run_dirs, strict=True):
            if path and path.resolve() != agent.run_dir:  # before anything is trained
                require_empty(path)
        ends = [agent.progress.global_step + (total_timesteps or 0) for agent in self.agents]
        if total_timesteps is None:
            ends = [agent.config.total_timesteps for agent in self.agents]
        with ExitStack() as stack:
            console = stack.enter_context(closing(Console(sum(ends), run_dir=str(folder or "")))) if show else None
            for unit in self._units:
                for n, metrics in self._train_unit(unit, total_timesteps, run_dirs, callback):
                    if console:
                        rows = zip(names, self.agents, ends, strict=True)
                        console.write(self._summary(), runs=[run_row(*row) for row in rows])
                    yield self.agents[n], metrics
        written = [path for path in run_dirs if path and (path / METRICS).exists()]
        if folder and written:
            write_records(written, folder)

    def _train_unit(
        self,
        unit: Sequence[int],
        total_timesteps: int | None,
        run_dirs: Sequence[Path | None],
        callback: Callable[[Agent, Metrics], Any] | None,
    ) -> Generator[tuple[int, Metrics], None, None]:
        """Train agents in turn, iteration by iteration; yield the index of each with its metrics."""
        with self._computed_together(unit), ExitStack() as stack:
            running: dict[int, Generator[Metrics, None, None]] = {}
            for n in unit:
                training = self.agents[n].training(total_timesteps, run_dirs[n], False)
                running[n] = stack.enter_context(closing(training))
                with naming(self.values[n]):
                    next(training)
            while running:
                for n, training in list(running.items()):
                    with naming(self.values[n]):
                        metrics = next(training, None)
                    if metrics is None:
                        del running[n]
                        continue
                    yield n, metrics
                    with naming(self.values[n]):
                        if callback and not call_back(lambda row, n=n: callback(self.agents[n], row), metrics):
                            running.pop(n).close()

    @contextmanager
    def _computed_together(self, unit: Sequence[int]) -> Iterator[None]:
        """Let the agents of a unit train from one group of runs within the block."""
        agents = [self.agents[n] for n in unit]
        if len(agents) == 1:
            yield
            return
        environments: list[Any] = [agent.envs.open(agent.config, agent.spaces) for agent in agents]
        if unit[0] not in self._groups:
            self._groups[unit[0]] = DeviceGroup([agent.learner for agent in agents], environments[0].env)
        for agent, source in zip(agents, self._groups[unit[0]].sources, strict=True):
            agent.envs.join(source)
        try:
            yield
        finally:
            for agent in agents:
                agent.envs.join(None)

    def _summary(self) -> Metrics:
        means = [mean for agent in self.agents if (mean := agent.progress.return_mean) is not None]
        steps = sum(agent.progress.global_step for agent in self.agents)
        return {"global_step": steps, RETURN: float(np.mean(means)) if means else None}


def combinations(env: Any, values: Mapping[str, Any], others: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All combinations of values of settings, the last setting varying fastest.

    Args:
        values: setting -> sequence of values.
        others: settings that all runs share.

    Raises:
        UserError: a setting is unknown or given twice, or has no sequence of values; or the environment is a vector
            environment, which several agents cannot share.
    """
    if isinstance(env, VectorEnv):
        raise UserError("several agents cannot share a vector environment. Give an id, or a function that makes one.")
    if not isinstance(values, Mapping):
        raise UserError(f'the sweep is {values!r}; expected lists of values, such as {{"seed": [0, 1, 2]}}.')
    values = {name: to_list(name, given) for name, given in canonical_names(values).items()}
    if "run_dir" in values:
        raise UserError("`run_dir` is the folder of the whole sweep, with one for each run in it. Give one value.")
    for name in values:
        if name in canonical_names(others):
            raise UserError(f"`{name}` is given both with a list of values and with one value. Use one of them.")
    if not values:
        raise UserError('the sweep has no settings. Give lists of values, such as {"seed": [0, 1, 2]}.')
    return [dict(zip(values, one, strict=True)) for one in itertools.product(*values.values())]


def to_list(name: str, given: Any) -> list[Any]:
    """The values of a setting, which all differ; UserError for something else than a list of them."""
    is_array = hasattr(given, "tolist") and np.ndim(given) == 1
    values = given.tolist() if is_array else given
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)) or not len(values):
        raise UserError(f"`{name}` is {given!r}; expected a list of values, such as [0, 1, 2].")
    known = SETTINGS[name].convert if name in SETTINGS else lambda value: value
    converted = [known(value) for value in values]
    repeated = [value for n, value in enumerate(converted) if value in converted[:n]]
    if repeated:
        raise UserError(f"`{name}` has the value {repeated[0]!r} twice. Give each value once.")
    return list(values)


def make_each(make: Callable[..., Agent], values: Sequence[Mapping[str, Any]]) -> list[Agent]:
    """An agent for each combination of values; if one fails, those before it are closed."""
    agents: list[Agent] = []
    try:
        for one in values:
            agents.append(make(**one))
    except BaseException:
        for agent in agents:
            agent.close()
        raise
    return agents


def run_names(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of run folders, such as `seed-0` or `learning_rate-0.001_seed-0`; all different."""
    names: list[str] = []
    for number, one in enumerate(values):
        name = re.sub(r"[^\w.,+-]+", "-", "_".join(f"{key}-{to_text(value)}" for key, value in one.items()))[:MAX_NAME]
        names.append(name if name not in names else f"{name}_{number}")
    return names


def run_row(name: str, agent: Trainable, end: int) -> RunRow:
    """What the terminal shows of a run."""
    return RunRow(name, agent.progress.global_step, end, agent.progress.return_mean)


def to_text(value: Any) -> str:
    """A value of a setting as part of the name of a folder."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value))
    return getattr(value, "__name__", None) or str(value)


@contextmanager
def naming(values: Mapping[str, Any]) -> Iterator[None]:
    """Name the settings of the run in errors and notes."""
    name = ", ".join(f"{name} {value}" for name, value in values.items())
    token = NOTES_OF.set(f"{name}: ")
    try:
        yield
    except (UserError, RunError) as error:
        kind = UserError if isinstance(error, UserError) else RunError
        raise kind(f"{name}: {error}") from error
    finally:
        NOTES_OF.reset(token)


def group_by_program(agents: Sequence[Trainable]) -> list[list[int]]:
    """Indices of agents in groups that one program can train; agents that it cannot are alone."""
    units: list[list[int]] = []
    for n, agent in enumerate(agents):
        unit = next((unit for unit in units if have_one_program(agents[unit[0]], agent)), None)
        if unit is None:
            units.append([n])
        else:
            unit.append(n)
    return units


def have_one_program(first: Trainable, second: Trainable) -> bool:
    """Whether two agents train on the device and differ only in what is traced."""
    if not (first.envs.is_on_device(first.learner) and second.envs.is_on_device(second.learner)):
        return False
    fixed = set(find_fixed(first.config, second.config, SETTINGS)) - {"seed", "run_dir"}
    is_same = all(getattr(first.config, name) == getattr(second.config, name) for name in SHARED)
    return is_same and not fixed and first.envs.env == second.envs.env
