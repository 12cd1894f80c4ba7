"""Use of the machine: cores, threads, device and compilation cache.

Small networks use one thread, and NumPy policies always do: distributing little work costs more than it saves, and
waiting threads spin on cores that environments could use.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from threadpoolctl import ThreadpoolController

from proximo.errors import DeviceUnavailable

MIN_PARALLEL_WORK = 8_000_000  # multiplications per minibatch pass from which two threads are much faster than one
HANGUP = getattr(signal, "SIGHUP", None)  # sent when the terminal closes; not available on every system
STOP_SIGNALS = tuple(number for number in (signal.SIGINT, signal.SIGTERM, HANGUP) if number)


def is_raised_by_environment(error: KeyboardInterrupt) -> bool:
    """Whether an environment raised it, not a signal.

    Only a handler of Proximo's tells: it passes the number of the signal. Others, such as Python's own or asyncio's,
    leave it open.
    """
    handler = signal.getsignal(signal.SIGINT)
    is_known = handler is signal.SIG_IGN or str(getattr(handler, "__module__", "")).startswith("proximo.")
    return not error.args and is_known


@contextmanager
def hold_signals() -> Iterator[None]:
    """Delay SIGINT, SIGTERM and SIGHUP within the block, so that they cannot interrupt it; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is not None]
    previous = {number: signal.signal(number, lambda number, _: received.append(number)) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for number in [number for number in received if previous[number] is not signal.SIG_IGN][:1]:
        signal.raise_signal(number)


def cores() -> int:
    """Number of cores available to this process, limited by CPU affinity and the container's CPU quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(min(allowed, round(int(quota) / int(period))), 1)
    except (OSError, ValueError):  # not Linux, no container, or no quota
        return allowed


def can_pin_to_cores() -> bool:
    """Whether processes can be pinned. With a CPU quota they are not: other containers would use the same cores."""
    return hasattr(os, "sched_setaffinity") and cores() == len(os.sched_getaffinity(0))


def pin_to_core(process: int, number: int) -> None:
    """Pin a process to the core `number` of those available to this process, if `can_pin_to_cores`."""
    if can_pin_to_cores():
        allowed = sorted(os.sched_getaffinity(0))
        with suppress(OSError):  # the process has ended; its parent handles that
            os.sched_setaffinity(process, {allowed[number % len(allowed)]})


def choose_num_threads(requested: int | None, work: float) -> int:
    """Number of threads for updates: the requested number, one if minibatches are small, otherwise one per core.

    OMP_NUM_THREADS is the default upper bound. `work` is the number of multiplications in one pass of a minibatch.
    """
    if requested is not None:
        return requested
    if work < MIN_PARALLEL_WORK:
        return 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores(), int(limit)) if limit.isdigit() and int(limit) else cores()


class Device(NamedTuple):
    """The device of a learner, and the reason for its choice."""

    name: str  # cpu, cuda or mps
    why: str


def choose_device(requested: str, available: Sequence[str], convolutional: bool, hint: str) -> Device:
    """Return the requested device. "auto" chooses CUDA for networks with convolutions, otherwise the CPU.

    Raises `DeviceUnavailable` if the device is not in `available`; `hint` tells how to install support for others.
    """
    if requested != "auto":
        if requested not in available:
            expected = ", ".join(("auto", *available))
            raise DeviceUnavailable(f"`device` {requested} is not available here; expected one of {expected}. {hint}.")
        return Device(requested, "requested")
    if "cuda" not in available:
        return Device("cpu", "no CUDA device found")
    if not convolutional:
        return Device("cpu", "faster than a GPU for networks without convolutions")
    return Device("cuda", "for convolutions")


_thread_pools = cache(ThreadpoolController)


def single_blas_thread() -> AbstractContextManager[Any]:
    """Limit NumPy's matrix multiplications to one thread within a `with` block."""
    return _thread_pools().limit(limits=1, user_api="blas")


def cache_dir() -> Path | None:
    """Folder for compiled programs: PROXIMO_CACHE_DIR, by default `proximo` in the user's cache folder.

    None if the variable is empty, or the folder cannot be written.
    """
    configured = os.environ.get("PROXIMO_CACHE_DIR")
    if configured == "":
        return None
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(configured).expanduser() if configured else Path(caches) / "proximo"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # private, because cached programs are executed
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return None
    return folder if os.access(folder, os.W_OK) else None
