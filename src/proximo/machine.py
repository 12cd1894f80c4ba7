"""What a run takes of the machine: threads, and a folder for what it compiles.

Threads that wait for work spin, on cores that environments could use, and to hand small pieces of work about costs
more than it saves. So small networks learn on one thread, and what acts in NumPy always acts on one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from threadpoolctl import ThreadpoolController

from proximo.errors import DeviceUnavailable

SMALL = 5_000_000  # multiplications in one pass of a minibatch, below which one thread is quicker than two
HANGUP = getattr(signal, "SIGHUP", None)  # from a terminal that goes away; not on every system
STOP_SIGNALS = tuple(number for number in (signal.SIGINT, signal.SIGTERM, HANGUP) if number)  # ask for a stop


def cores() -> int:
    """Cores that this process may use: those it may run on, and no more than a container's share of the machine."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(min(here, round(int(quota) / int(period))), 1)
    except (OSError, ValueError):  # not Linux, no container, or no limit
        return here


def can_pin_to_cores() -> bool:
    """Whether processes can be kept on cores. Not where a container has a share of many: others would take the same."""
    return hasattr(os, "sched_setaffinity") and cores() == len(os.sched_getaffinity(0))


def pin_to_core(process: int, number: int) -> None:
    """Keep a process on the number-th of the cores that this one may run on, where `can_pin_to_cores`."""
    if can_pin_to_cores():
        own = sorted(os.sched_getaffinity(0))
        with suppress(OSError):  # it has ended, which its parent will notice
            os.sched_setaffinity(process, {own[number % len(own)]})


def choose_num_threads(asked_for: int | None, rows: int, parameters: int | None) -> int:
    """Threads that learn: as many as asked for, or one where a minibatch is small, or one for each core.

    OMP_NUM_THREADS, where it is set, is the most that nobody asked for.

    Args:
        rows: transitions in a minibatch.
        parameters: of the network; None where nobody knows.
    """
    if asked_for is not None:
        return asked_for
    if parameters is not None and rows * parameters < SMALL:
        return 1
    most = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores(), int(most)) if most.isdigit() and int(most) else cores()


class Device(NamedTuple):
    """Where a learner works, and why there."""

    name: str  # cpu, cuda or mps
    why: str


def choose_device(asked_for: str, available: Sequence[str], convolutional: bool, hint: str) -> Device:
    """The device that is asked for; or a CUDA device for networks with convolutions, and the CPU for others.

    Args:
        available: what the array library can use here.
        hint: how to have it use more.

    Raises:
        UserError: it is not available.
    """
    if asked_for != "auto":
        if asked_for not in available:
            raise DeviceUnavailable(
                f"device {asked_for} is not available: there is {', '.join(available)}; {hint}"
            )
        return Device(asked_for, "asked for")
    if "cuda" not in available:
        return Device("cpu", "no CUDA device was found")
    if not convolutional:
        return Device("cpu", "a GPU is for convolutions, unless asked for")
    return Device("cuda", "for the convolutions")


@contextmanager
def single_blas_thread() -> Iterator[None]:
    """Let NumPy multiply matrices on one thread within this block."""
    with _pools().limit(limits=1, user_api="blas"):
        yield


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()


def cache_dir() -> Path | None:
    """Where compiled programs are kept: PROXIMO_CACHE_DIR, or `proximo` among the user's caches.

    None where that variable is empty, or the folder cannot be written.
    """
    named = os.environ.get("PROXIMO_CACHE_DIR")
    if named == "":
        return None
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(named).expanduser() if named else Path(caches) / "proximo"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what lies there is run
    except (OSError, RuntimeError):  # the latter where there is no home
        return None
    return folder if os.access(folder, os.W_OK) else None
