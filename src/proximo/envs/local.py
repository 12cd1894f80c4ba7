"""Engine `sync`: all environments in the training process, stepped one after another."""

from __future__ import annotations

import mmap
from typing import Any

from proximo.envs.env_slice import Command, EnvFactory, EnvSlice
from proximo.envs.shared_memory import Allocator
from proximo.envs.shared_vector_env import NO_ARGUMENTS, SharedVectorEnv, SliceArguments
from proximo.envs.timeout import start_timeout_thread
from proximo.errors import Exited, RunError, UserError


class LocalVectorEnv(SharedVectorEnv):
    """N environments stepped in a loop in this process; see `SharedVectorEnv`.

    Exceptions of an environment are raised unchanged, with a note that has its index.

    Args:
        factory: makes one environment; called N times.
        timeout_s: limit in seconds for one step or reset of one environment (`proximo.envs.timeout`).

    Raises:
        UserError: the spaces differ, or Proximo does not support them.
        RunError: an environment calls `sys.exit`, or exceeds the timeout.
    """

    def __init__(self, factory: EnvFactory, num_envs: int, timeout_s: float = 60.0, copy: bool = True) -> None:
        super().__init__(num_envs, copy)
        self._slice = EnvSlice(range(num_envs))
        try:
            self._slice.make(factory)
            layout = self._set_spaces([self._slice.declare()], workers=1)
            self._arrays = layout.allocate(Allocator(mmap.mmap(-1, layout.size())))
            self._slice.attach(self._arrays, 0)
            start_timeout_thread(self._slice, timeout_s)
        except BaseException:
            self.close()
            raise

    def _run(self, command: Command, arguments: SliceArguments = NO_ARGUMENTS) -> None:
        values = arguments(self._slice.indices)
        self._interrupted = True
        if values is None:
            return
        try:
            self._slice.run(command, *values)
        except RunError:
            raise
        except UserError as error:
            raise UserError(f"environment {self._slice.last_index}: {error}") from error
        except SystemExit as error:
            raise Exited(
                f"environment {self._slice.last_index} called sys.exit({error.code!r}) while {self._slice.activity}"
            ) from error
        except Exception as error:
            error.add_note(f"raised by environment {self._slice.last_index} while {self._slice.activity}")
            raise

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environments."""
        self._slice.close()
