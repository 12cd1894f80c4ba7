"""Signals that stop a training command."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import types

from proximo.machine import HANGUP, STOP_SIGNALS

GRACE_S = 10.0  # after a second signal


def stop_when_input_ends() -> None:
    """Ask this process to stop when whoever began it has ended."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def end_when_asked_twice(signals: socket.socket) -> None:
    """End this process some seconds after its second signal, unless it ends before."""
    asked: list[int] = []
    with signals:
        while len(asked) < 2:
            arrived = signals.recv(1)
            if not arrived:
                return
            asked += [number for number in arrived if asks(number, bool(asked))]
    time.sleep(GRACE_S)
    os._exit(128 + asked[-1])


def asks(number: int, again: bool) -> bool:
    """Whether a signal asks for a stop, or once more: a terminal that goes away may send SIGHUP twice."""
    return number in STOP_SIGNALS and not (again and number == HANGUP)


class Interrupt:
    """The first SIGINT, SIGTERM or SIGHUP asks for a stop after the iteration, a second SIGINT or SIGTERM ends it.

    SIGHUP, from a terminal that went away, is ignored where it was before, as under nohup. Where the second one meets C
    code that does not return, the process is ended some seconds later all the same.
    """

    def __init__(self, say: bool = True) -> None:
        self.signal: int | None = None
        self._say = say

    def __enter__(self) -> Interrupt:
        self._before = {
            number: signal.signal(number, self._ask)
            for number in STOP_SIGNALS
            if number != HANGUP or signal.getsignal(number) is not signal.SIG_IGN
        }
        # Written to when a signal arrives, and not only when Python gets to handle it.
        self._read, self._written = socket.socketpair()
        for end in (self._read, self._written):
            end.setblocking(end is self._read)
        self._woken_before = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=end_when_asked_twice, args=(self._read,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._woken_before)
        self._written.close()  # which ends the thread
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: types.FrameType | None) -> None:
        if not asks(number, self.signal is not None):
            return
        if self.signal is not None:
            raise KeyboardInterrupt(number)
        self.signal = number
        if self._say:
            with contextlib.suppress(OSError, ValueError):
                print("\nproximo: stopping after this iteration; once more stops at once", file=sys.stderr)
