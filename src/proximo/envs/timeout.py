"""A timeout for environments that run in the training process."""

from __future__ import annotations

import signal
import sys
import threading
import time
import types
import weakref
from typing import Any

from proximo.envs.env_slice import CHECKS_PER_TIMEOUT, EnvSlice
from proximo.envs.shared_memory import NO_ENVIRONMENT
from proximo.errors import RunError, notify_user

HAS_SIGNAL = hasattr(signal, "SIGURG") and hasattr(signal, "pthread_kill")


def start_timeout_thread(env_slice: EnvSlice, timeout_s: float) -> None:
    """Raise RunError inside a reset or step of an attached slice that takes longer than `timeout_s` seconds.

    Only Python code in the main thread can be interrupted, including `time.sleep`. Elsewhere (C code, other threads,
    code under a debugger) a note is printed instead. The thread ends when the slice is closed or garbage-collected.
    """
    if HAS_SIGNAL and threading.current_thread() is threading.main_thread():
        # Only sockets with urgent data use this signal, and it is ignored by default.
        handler = signal.getsignal(signal.SIGURG)
        if not isinstance(handler, _TimeoutHandler):
            handler = _TimeoutHandler(handler)
            signal.signal(signal.SIGURG, handler)
        handler.slices.add(env_slice)
    threading.Thread(target=_check_repeatedly, args=(weakref.ref(env_slice), timeout_s), daemon=True).start()


class _TimeoutHandler:
    """Signal handler that raises RunError if the overdue call is still running."""

    def __init__(self, previous: Any) -> None:
        self.previous = previous
        self.slices: weakref.WeakSet[EnvSlice] = weakref.WeakSet()

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        for env_slice in [one for one in self.slices if one.thread == threading.get_ident()]:
            if env_slice.overdue_call == env_slice.current_call() and sys.gettrace() is None:
                env_slice.overdue_call = None
                location = f", in {frame.f_code.co_filename}, line {frame.f_lineno}" if frame else ""
                raise RunError(
                    f"environment {env_slice.current[0]} did not return within {env_slice.timeout_s:g} s while "
                    f"{env_slice.activity}{location}. Fix the environment, or increase `env_timeout`."
                )
        if callable(self.previous):
            self.previous(number, frame)


def _check_repeatedly(reference: weakref.ref[EnvSlice], timeout_s: float) -> None:
    """Count checks instead of seconds, so that suspending the whole process causes no timeout."""
    call, unchanged = (NO_ENVIRONMENT, 0), 0
    while True:
        time.sleep(timeout_s / CHECKS_PER_TIMEOUT)
        env_slice = reference()
        if env_slice is None or env_slice.closed:
            return
        previous, call = call, env_slice.current_call()
        unchanged = unchanged + 1 if call == previous and call[0] != NO_ENVIRONMENT else 0
        if unchanged == CHECKS_PER_TIMEOUT and HAS_SIGNAL:
            env_slice.overdue_call, env_slice.timeout_s = call, timeout_s
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)
        if unchanged == CHECKS_PER_TIMEOUT + 1:
            notify_user(
                f"{env_slice.activity} environment {call[0]} takes longer than {timeout_s:g} s and cannot be "
                "interrupted. With `isolate_envs` a worker process runs it and can be killed."
            )
        del env_slice  # so that it can be garbage-collected during the sleep
