"""`proximo inspect`: what a run, a checkpoint or a bundle of a fault holds, in words."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proximo.errors import UserError


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "inspect",
        help="say what a checkpoint holds, or what led to a fault",
        usage="proximo inspect PATH",
        description="Say what a run's latest checkpoint or a checkpoint holds, or explain what a run that failed left "
        "under faults/. Nothing is run and nothing is imported.",
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="PATH", help="run folder, checkpoint folder, or folder under faults/")
    parser.set_defaults(run=run)


def run(options: Namespace) -> int:
    """Print the description; return the exit status."""
    path = Path(options.path)
    try:
        lines = list(described(path))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from error
    for line in lines:
        print(line)
    return 0


def described(path: Path) -> Iterator[str]:
    """A checkpoint or a bundle in words, line by line."""
    from proximo.run import debug_bundle as bundle
    from proximo.run.checkpoint import BUNDLE, MANIFEST, load, manifest_of

    if (path / MANIFEST).is_file() and manifest_of(path).get("format") == BUNDLE:
        yield from bundle.explain(path)
        return
    saved = load(path)
    said, progress = saved.manifest, saved.progress
    mean = progress.return_mean
    yield f"{saved.path}: a checkpoint, saved {said.get('saved')} by Proximo {said.get('proximo')}"
    config = said["config"]
    yield f"environment {said.get('env')}, backend {said['backend']}, network {said['network']}"
    yield f"step {progress.global_step:,} of {config.get('total_timesteps'):,}, iteration {progress.iteration}"
    yield f"seed {config.get('seed')}"
    yield f"mean return of the last {len(progress.episodes)} episodes: {'none yet' if mean is None else f'{mean:.1f}'}"
    exact = (
        "exactly" if said["progress"].get("exact") else f"with new episodes: {said['progress'].get('why')}"
    )
    yield f"environments can be brought back {exact}"
    for one in progress.resumed:
        how = "exactly" if one["exact"] else f"not exactly: {one['why']}"
        yield f"resumed at step {one['global_step']:,}, {how}"
    versions = ", ".join(
        f"{name} {version}" for name, version in (said.get("versions") or {}).items() if version
    )
    yield f"versions: {versions or 'unknown'}"
    numbers = sum(array.size for name, array in saved.arrays.items() if name.startswith("params/"))
    yield f"{numbers:,} parameters; proximo evaluate {path}"
