"""Training progress: the state of a run besides settings and learner state."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from proximo.errors import UserError
from proximo.rollout.env_state import EnvState
from proximo.rollout.rollout import Episode

WINDOW = 100  # episodes that training returns are averaged over
MAX_FAILURES = 3  # consecutive discarded updates, failed evaluations or failed saves that stop a run
PREFIX = "run"  # of array names in a checkpoint
ENV_STATE_BYTES = 1 << 26  # JSON limit: parsed numbers take about ten times the memory of an array


@dataclass
class Progress:
    """Counters, latest episodes, best return and simulator state of a run."""

    global_step: int = 0
    iteration: int = 0
    episodes: deque[Episode] = field(default_factory=lambda: deque(maxlen=WINDOW))  # the last ones
    skipped: int = 0  # consecutive updates that diverged
    best: float | None = None  # mean return of the best checkpoint
    best_step: int | None = None  # step of the best checkpoint
    scored_by: str | None = None  # "training" or "evaluations", whose return `best` is
    env_state: EnvState | None = None  # None before the first reset
    resumed: list[dict[str, Any]] = field(default_factory=list)  # one record per resume

    def copy(self) -> Progress:
        """Return a snapshot that later iterations do not change."""
        return replace(self, episodes=self.episodes.copy(), resumed=list(self.resumed))

    def restore(self, snapshot: Progress) -> None:
        """Replace all fields with those of `snapshot`."""
        vars(self).update(vars(snapshot))

    def advance(self, steps: int, episodes: Iterable[Episode]) -> None:
        """Count one iteration."""
        self.global_step += steps
        self.iteration += 1
        self.episodes.extend(episodes)

    @property
    def return_mean(self) -> float | None:
        """Mean raw return of the latest training episodes; None before the first ends."""
        return float(np.mean([episode.episode_return for episode in self.episodes])) if self.episodes else None

    @property
    def length_mean(self) -> float | None:
        """Mean length of the same episodes, in steps."""
        return float(np.mean([episode.length for episode in self.episodes])) if self.episodes else None

    @property
    def info_means(self) -> dict[str, float]:
        """Means of logged `info` entries over those of the same episodes that had them."""
        names = dict.fromkeys(name for episode in self.episodes for name in episode.info)
        return {
            name: float(np.mean([episode.info[name] for episode in self.episodes if name in episode.info]))
            for name in names
        }

    def to_document(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return a JSON object and the arrays it refers to.

        A simulator state that cannot be stored is omitted; "exact" is then false, and "why" gives the reason.
        """
        arrays = {f"{PREFIX}/episodes": np.array([episode[:3] for episode in self.episodes], np.float64).reshape(-1, 3)}
        name, why = None, "no episode has started"
        if self.env_state:
            name, why = f"{PREFIX}/env_state", self.env_state.reset_reason
            try:
                state, state_arrays = self.env_state.to_document(name)
                text = json.dumps(state).encode()
                if len(text) > ENV_STATE_BYTES:
                    raise UserError(
                        f"the environment state takes {len(text):,} bytes as JSON: store its numbers in NumPy arrays"
                    )
                arrays |= state_arrays | {name: np.frombuffer(text, np.uint8)}
            except UserError as error:  # the snapshot holds an unsupported type, or is too large
                name, why = None, str(error)
        fields = ("global_step", "iteration", "skipped", "best", "best_step", "scored_by", "resumed")
        document = {field: getattr(self, field) for field in fields}
        document["episode_info"] = [dict(episode.info) for episode in self.episodes] if self.info_means else []
        return {**document, "exact": not why, "why": why, "env_state": name}, arrays

    @classmethod
    def from_document(cls, document: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Progress:
        """Invert `to_document`; an invalid document raises KeyError, TypeError or ValueError."""
        rows = arrays[f"{PREFIX}/episodes"]
        logged = document.get("episode_info") or [{}] * len(rows)
        infos = [{str(name): float(x) for name, x in info.items()} for info in logged]
        pairs = zip(rows, infos, strict=True)
        episodes = [Episode(float(total), int(length), int(index), info) for (total, length, index), info in pairs]
        text = None if document["env_state"] is None else arrays[document["env_state"]].tobytes()
        if text is not None and len(text) > ENV_STATE_BYTES:
            raise ValueError(f"the environment state has {len(text):,} bytes, more than {ENV_STATE_BYTES:,}")
        counts = {name: int(document[name]) for name in ("global_step", "iteration", "skipped")}
        if min(counts.values()) < 0:
            raise ValueError(f"a count is negative: {counts}")
        return cls(
            **counts,
            episodes=deque(episodes, maxlen=WINDOW),
            best=None if document["best"] is None else float(document["best"]),
            best_step=None if document["best_step"] is None else int(document["best_step"]),
            scored_by=None if document.get("scored_by") is None else str(document["scored_by"]),
            env_state=None if text is None else EnvState.from_document(json.loads(text), arrays),
            resumed=list(document["resumed"]),
        )
