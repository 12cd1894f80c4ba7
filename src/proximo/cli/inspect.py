"""`proximo inspect`: describe a run, a checkpoint or a debug bundle."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proximo.cli.flags import run_arguments
from proximo.errors import UserError, escape, format_number


def add_to(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "inspect",
        help="describe a run, a checkpoint or a debug bundle",
        usage="proximo inspect PATH",
        description="Describe a checkpoint (of a run folder, the latest), or a debug bundle of a failed run with the "
        "likely cause. Nothing is executed or imported.",
    )
    parser.add_argument("path", metavar="PATH", help="run folder, checkpoint folder, or debug bundle under faults/")


def run(options: Namespace) -> int:
    """Print the description; return the exit status."""
    path = Path(options.path)
    try:
        lines = list(describe_path(path))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is corrupt: its manifest or arrays are invalid ({error!r})") from error
    print("\n".join(escape(line).replace("\n", "\\n") for line in lines))
    return 0


def describe_path(path: Path) -> Iterator[str]:
    """Yield a description of a checkpoint or a debug bundle, line by line."""
    from proximo.run.checkpoint import CUSTOM_NETWORK, load
    from proximo.run.checkpoint_files import DEBUG_BUNDLE, MANIFEST, read_manifest
    from proximo.run.debug_bundle import describe_bundle

    if (path / MANIFEST).is_file() and read_manifest(path).get("format") == DEBUG_BUNDLE:
        yield from describe_bundle(path)
        return
    saved = load(path)
    manifest, progress, config = saved.manifest, saved.progress, saved.manifest["config"]
    network = "custom" if manifest["network"] == CUSTOM_NETWORK else manifest["network"]
    count, mean = len(progress.episodes), progress.return_mean
    exact, why = (manifest["progress"].get(name) for name in ("exact", "why"))
    yield f"{saved.path}: checkpoint, saved {manifest.get('saved')} by Proximo {manifest.get('proximo')}"
    yield f"environment {manifest.get('env')}, backend {manifest['backend']}, network {network}"
    yield f"step {progress.global_step:,} of {config.get('total_timesteps'):,}, iteration {progress.iteration}"
    yield f"seed {config.get('seed')}"
    yield (
        "no episode has finished"
        if mean is None
        else f"mean return over the last {count} episodes: {format_number(mean)}"
    )
    yield f"exact resume: {'supported' if exact else f'not supported ({why})'}"
    for one in progress.resumed:
        how = "exactly" if one["exact"] else f"not exactly ({one['why']})"
        yield f"resumed at step {one['global_step']:,}, {how}"
    versions = (manifest.get("versions") or {}).items()
    yield "versions:"
    yield from (f"  {name} {version}" for name, version in versions if version)
    parameters = sum(array.size for name, array in saved.arrays.items() if name.startswith("params/"))
    yield f"{parameters:,} parameters"
    named = run_arguments(path, manifest.get("env"), config.get("wrappers") or ())
    yield f"evaluate with: proximo evaluate {named}"
    if bundles := sorted(str(bundle) for bundle in path.glob("faults/*") if bundle.is_dir()):
        yield f"debug bundles: {', '.join(bundles)}"
