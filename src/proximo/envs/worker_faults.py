"""Error messages for environments that fail, and for worker processes that die or do not answer."""

from __future__ import annotations

import pickle
import signal

from proximo.envs.shared_memory import NO_ENVIRONMENT
from proximo.envs.worker_handle import WorkerHandle
from proximo.envs.worker_process import ErrorReport
from proximo.errors import RunError, UserError


def environment_error(report: ErrorReport, process: str, when: str) -> UserError | RunError:
    """Return the error for an exception in `process`, with its traceback, and with the exception as its cause."""
    if report.environment is None:
        subject, location = process, ""
    else:
        subject, location = f"environment {report.environment}", f", in {process}"
    error = (UserError if report.is_user_error else RunError)(
        f"{subject} raised {report.summary}\nwhile {report.activity}, {when}{location}\n{report.traceback.rstrip()}"
    )
    error.__cause__ = _unpickle_error(report.error)
    return error


def exit_error(worker: WorkerHandle, environment: int, activity: str, when: str, is_starting: bool) -> RunError:
    """Return the error for a worker process that ended."""
    exitcode, hint = worker.process.exitcode, ""
    if exitcode == -signal.SIGKILL:
        hint = ". The kernel does this when memory runs out."
    elif exitcode == 1 and is_starting and worker.context != "spawn":
        hint = ". A script that uses a fork server must guard its code with `if __name__ == '__main__':`."
    where = "between calls" if environment == NO_ENVIRONMENT else f"while {activity} environment {environment}"
    return RunError(f"{worker} {_describe_exit(exitcode)} {where}, {when}{hint}")


def stuck_error(
    worker: WorkerHandle, environment: int, activity: str, when: str, timeout_s: float, setting: str
) -> RunError:
    """Return the error for a worker that did not answer in time and was killed."""
    if environment == NO_ENVIRONMENT:
        text = f"{worker} did not answer within {timeout_s:g} s between calls, {when}, and was killed"
    else:
        text = (
            f"environment {environment} did not return within {timeout_s:g} s while {activity}, {when}; "
            f"{worker} was killed"
        )
    return RunError(f"{text}. Fix the environment, or increase `{setting}`.")


def _unpickle_error(pickled: bytes | None) -> BaseException | None:
    """Return the exception, or None if it cannot be unpickled in this process."""
    try:
        error = pickle.loads(pickled) if pickled else None
    except Exception:
        return None
    return error if isinstance(error, BaseException) else None


def _describe_exit(exitcode: int | None) -> str:
    if exitcode is None:
        return "closed its connection"
    if exitcode >= 0:
        return f"exited with status {exitcode}"
    try:
        return f"was killed by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"was killed by signal {-exitcode}"
