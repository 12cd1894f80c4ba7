"""Signals that stop a training command."""

import math
import os
import signal
import socket
import sys
import threading
import time
import types
from contextlib import suppress
from typing import Self

from proximo.errors import print_error
from proximo.machine import HANGUP, STOP_SIGNALS

GRACE_S = 10.0  # after the second signal


def stop_when_input_ends() -> None:
    """Send SIGTERM to this process when its standard input ends, because its parent has ended."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def exit_after_second_signal(signals: socket.socket) -> None:
    """Exit `GRACE_S` seconds after the second stop signal, unless the command has ended, which closes the socket."""
    received: list[int] = []
    deadline = math.inf
    with signals:
        while time.monotonic() < deadline:
            signals.settimeout(None if math.isinf(deadline) else max(deadline - time.monotonic(), 0.01))
            with suppress(TimeoutError):
                numbers = signals.recv(1)
                if not numbers:
                    return
                received += [number for number in numbers if is_stop_signal(number, bool(received))]
            if len(received) > 1 and math.isinf(deadline):
                deadline = time.monotonic() + GRACE_S
    os._exit(128 + received[1])


def is_stop_signal(number: int, repeated: bool) -> bool:
    """Whether a signal counts as a stop signal. A repeated SIGHUP does not: a closing terminal may send it twice."""
    return number in STOP_SIGNALS and not (repeated and number == HANGUP)


class StopSignals:
    """Signal handlers for training.

    The first SIGINT, SIGTERM or SIGHUP sets `received`, so that the run stops after the current step or update. A
    second SIGINT or SIGTERM raises KeyboardInterrupt, and later ones do nothing, so that they cannot interrupt the last
    save. If C code keeps Python from handling the second, but releases the interpreter lock, the process exits after
    `GRACE_S` seconds. An ignored SIGHUP (as under nohup) stays ignored. In another thread than the main one nothing is
    handled.
    """

    def __init__(self, verbose: bool = True) -> None:
        self.received: int | None = None
        self._has_raised = False
        self._verbose = verbose

    def __enter__(self) -> Self:
        self._is_main_thread = threading.current_thread() is threading.main_thread()
        if not self._is_main_thread:  # the program handles signals itself
            return self
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in STOP_SIGNALS
            if number != HANGUP or signal.getsignal(number) is not signal.SIG_IGN
        }
        # The wakeup socket receives a signal at once, even while C code blocks Python's handlers.
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=exit_after_second_signal, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_main_thread:
            return
        signal.set_wakeup_fd(self._previous_wakeup)
        self._writer.close()  # ends the thread
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if not is_stop_signal(number, self.received is not None):
            return
        if self._has_raised:
            return
        if self.received is not None:
            self._has_raised = True
            raise KeyboardInterrupt(number)
        self.received = number
        if self._verbose:
            print_error("\nproximo: stopping after the current step or update (repeat to stop immediately)")
