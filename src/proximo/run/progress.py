"""How far a run is: everything of it that is neither settings nor what the learner has learned."""

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
NAME = "run"  # begins the names of its arrays in a checkpoint
ENV_STATE_BYTES = 1 << 26  # of text, in which numbers take ten times the memory that they take in arrays


def window(episodes: Iterable[Episode] = ()) -> deque[Episode]:
    """The last episodes of these."""
    return deque(episodes, maxlen=WINDOW)


@dataclass
class Progress:
    """Where a run stands."""

    global_step: int = 0
    iteration: int = 0
    episodes: deque[Episode] = field(default_factory=window)  # the last that ended
    skipped: int = 0  # updates in a row that diverged
    best: float | None = None  # mean return of the best checkpoint
    best_step: int | None = None  # when that was
    env_state: EnvState | None = None  # where the environments stand; None where they have not begun
    resumed: list[dict[str, Any]] = field(
        default_factory=list
    )  # how each session went on from the one before

    def copy(self) -> Progress:
        """As it is now."""
        return replace(self, episodes=self.episodes.copy(), resumed=list(self.resumed))

    def restore(self, before: Progress) -> None:
        """Be as it was then."""
        vars(self).update(vars(before))

    @property
    def return_mean(self) -> float | None:
        """Mean raw return of the last 100 training episodes; None before the first ends."""
        returns = [episode.episode_return for episode in self.episodes]
        return float(np.mean(returns)) if returns else None

    @property
    def length_mean(self) -> float | None:
        """Mean length of the same episodes, in steps."""
        return float(np.mean([episode.length for episode in self.episodes])) if self.episodes else None

    def to_document(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """As JSON, and the arrays that lie beside it.

        A snapshot of an environment that no file can hold is left out, and the document says so.
        """
        document: dict[str, Any] = {
            "global_step": self.global_step,
            "iteration": self.iteration,
            "skipped": self.skipped,
            "best": self.best,
            "best_step": self.best_step,
            "resumed": self.resumed,
            "exact": self.env_state is not None and not self.env_state.reset_reason,
            "why": self.env_state.reset_reason if self.env_state else "no episode has begun",
            "env_state": None,
        }
        arrays = {f"{NAME}/episodes": np.array(list(self.episodes), np.float64).reshape(-1, 3)}
        if self.env_state is None:
            return document, arrays
        try:
            state, beside = self.env_state.to_document(f"{NAME}/env_state")
        except UserError as error:  # only a snapshot is missing then
            return {**document, "exact": False, "why": str(error)}, arrays
        text = json.dumps(state).encode()
        if len(text) > ENV_STATE_BYTES:
            why = f"where environments stand takes {len(text):,} bytes of text: keep numbers in arrays"
            return {**document, "exact": False, "why": why}, arrays
        document["env_state"] = f"{NAME}/env_state"
        return document, arrays | beside | {f"{NAME}/env_state": np.frombuffer(text, np.uint8)}

    @classmethod
    def from_document(cls, document: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Progress:
        """The inverse of `to_document`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        episodes = [Episode(float(one), int(length), int(n)) for one, length, n in arrays[f"{NAME}/episodes"]]
        text = None if document["env_state"] is None else arrays[document["env_state"]].tobytes()
        if text is not None and len(text) > ENV_STATE_BYTES:
            raise ValueError(
                f"where environments stand takes {len(text):,} bytes, more than {ENV_STATE_BYTES:,}"
            )
        counts = {name: int(document[name]) for name in ("global_step", "iteration", "skipped")}
        if min(counts.values()) < 0:
            raise ValueError(f"a count is below 0: {counts}")
        return cls(
            **counts,
            episodes=window(episodes),
            best=None if document["best"] is None else float(document["best"]),
            best_step=None if document["best_step"] is None else int(document["best_step"]),
            env_state=None if text is None else EnvState.from_document(json.loads(text), arrays),
            resumed=list(document["resumed"]),
        )
