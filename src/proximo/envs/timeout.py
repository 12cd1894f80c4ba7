"""A time-out for environments that this process steps itself, as those of workers have one."""

from __future__ import annotations

import signal
import sys
import threading
import time
import types
import weakref
from typing import Any

from proximo.envs.env_slice import LOOKS, EnvSlice
from proximo.envs.shared_memory import NOWHERE
from proximo.errors import RunError, notify_user


def watch(share: EnvSlice, limit_s: float) -> None:
    """Raise RunError out of a reset or step of an attached share's environment that takes longer than `limit_s`.

    That can be done to Python code in the main thread, sleeping or not. Where it cannot be, as in C code, or where a
    debugger traces the code, a note is given. The thread that looks after the share ends with it.
    """
    if _signals() and threading.current_thread() is threading.main_thread():
        _alarm().shares.add(share)
    threading.Thread(target=_look, args=(weakref.ref(share), limit_s), daemon=True).start()


def _signals() -> bool:
    return hasattr(signal, "SIGURG") and hasattr(signal, "pthread_kill")


def _alarm() -> _Alarm:
    """What handles SIGURG, which nothing but sockets with urgent data sends, and whose default is to do nothing."""
    handler = signal.getsignal(signal.SIGURG)
    if not isinstance(handler, _Alarm):
        handler = _Alarm(handler)
        signal.signal(signal.SIGURG, handler)
    return handler


class _Alarm:
    """Raises out of a call that is late, if it has not returned meanwhile."""

    def __init__(self, before: Any) -> None:
        self.before = before
        self.shares: weakref.WeakSet[EnvSlice] = weakref.WeakSet()

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        own = [share for share in self.shares if share.thread == threading.get_ident()]
        for share in own:
            if share.late == share.place() and sys.gettrace() is None:
                share.late = None
                raise RunError(_stuck(share, frame))
        if callable(self.before):
            self.before(number, frame)


def _stuck(share: EnvSlice, frame: types.FrameType | None) -> str:
    where = f", in {frame.f_code.co_filename}, line {frame.f_lineno}" if frame else ""
    return (
        f"environment {share.current[0]} has not answered for {share.limit_s:g} s, while {share.doing}{where}: mend "
        "the environment, or give it more time with env_timeout"
    )


def _look(reference: weakref.ref[EnvSlice], limit_s: float) -> None:
    """Counts looks rather than seconds, so that a process that was itself stopped accuses nobody."""
    seen, looks = (NOWHERE, 0), 0
    while True:
        time.sleep(limit_s / LOOKS)
        share = reference()
        if share is None or share.closed:
            return
        before, seen = seen, share.place()
        looks = looks + 1 if seen == before and seen[0] != NOWHERE else 0
        if looks == LOOKS and _signals():
            share.late, share.limit_s = seen, limit_s
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)
        if looks == LOOKS + 1:
            notify_user(
                f"{share.doing} environment {seen[0]} takes longer than {limit_s:g} s and cannot be interrupted; with "
                "--isolate-envs it could be ended"
            )
        del share  # so that it can go while this sleeps
