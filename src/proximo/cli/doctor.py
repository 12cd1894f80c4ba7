"""`proximo doctor`: describe the installation, and what is missing for what."""

import argparse
import importlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proximo.errors import describe_error, escape
from proximo.machine import cache_dir, cores

PURPOSES = {  # of the extras that users install
    "torch": "the PyTorch backend",
    "mujoco": "Gymnasium's MuJoCo environments",
    "box2d": "Gymnasium's Box2D environments",
    "atari": "Atari games",
    "envpool": "EnvPool's environments",
    "minigrid": "MiniGrid",
    "dm-control": "the DeepMind Control Suite",
    "video": "videos, and rendering of classic control",
    "gymnax": "gymnax, environments in JAX",
    "brax": "Brax, environments in JAX",
    "playground": "MuJoCo Playground, environments in JAX",
    "navix": "Navix, environments in JAX",
    "craftax": "Craftax, environments in JAX",
    "jumanji": "Jumanji, environments in JAX",
    "wandb": "Weights & Biases",
    "export": "export to ONNX",
}
SELF = "proximo"
MEGABYTE = 1 << 20


def add_to(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "doctor",
        help="describe the installation, and what is missing for what",
        usage="proximo doctor [--json]",
        description="Print versions, devices, extras with what is missing, and caches. Exit status 1 if a required "
        "package is missing or has a version that Proximo does not support.",
    )
    parser.add_argument("--json", action="store_true", help="print only a JSON object")


def run(options: argparse.Namespace) -> int:
    """Print the description; return the exit status."""
    found = examine()
    if options.json:
        print(json.dumps(found))
    else:
        print("\n".join(escape(line) for line in lines(found)))
    return int(bool(found["problems"]))


def examine() -> dict[str, Any]:
    """Versions, devices of each backend, problems of required packages, what each extra lacks, tools and caches."""
    from packaging.requirements import Requirement

    from proximo.learner.make import INSTALL, is_installed
    from proximo.run.versions import collect_versions

    requirements = [Requirement(text) for text in importlib.metadata.requires(SELF) or ()]
    required = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    extras = {
        extra: [
            one for one in requirements
            if one.marker and one.marker.evaluate({"extra": extra}) and one not in required
        ]
        for extra in PURPOSES
    }  # fmt: skip
    return {
        "versions": collect_versions(),
        "usable_cores": cores(),
        "devices": {name: devices_of(name) for name in INSTALL if is_installed(name)},
        "problems": [text for one in required if (text := problem_of(one))],
        "extras": {extra: [text for one in needed if (text := problem_of(one))] for extra, needed in extras.items()},
        "tools": {"c++ compiler": shutil.which(os.environ.get("CXX") or "g++")},
        "cache": cache_size(cache_dir()),
    }


def devices_of(backend: str) -> list[str]:
    """Devices of an installed backend, or why it does not start; starts it."""
    try:
        return importlib.import_module(f"proximo.{backend}.runtime").available_devices()
    except Exception as error:
        return [f"does not start: {describe_error(error)}"]


def problem_of(requirement: Any) -> str:
    """Why a requirement of `packaging` is not met, or ""."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} {version} is installed; {requirement.specifier} is needed"


def cache_size(folder: Path | None) -> dict[str, Any]:
    """Folder, number and bytes of compiled programs."""
    files = [path for path in folder.rglob("*") if path.is_file()] if folder and folder.is_dir() else []
    return {"folder": folder and str(folder), "files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The description for people."""
    versions = found["versions"]
    yield f"Proximo {versions['proximo']}, Python {versions['python']}, {versions['platform']}"
    yield f"{versions['machine']}, {versions['cores']} cores, of which {found['usable_cores']} can be used"
    yield ""
    for name, devices in found["devices"].items():
        yield f"backend {name} {versions.get(name)}: {', '.join(devices)}"
    yield ""
    for extra, missing in found["extras"].items():
        state = "installed" if not missing else f"pip install 'proximo[{extra}]'  ({'; '.join(missing)})"
        yield f"{extra:<11} {PURPOSES[extra]:<42} {state}"
    yield ""
    compiler = found["tools"]["c++ compiler"]
    yield f"C++ compiler, for --compile with PyTorch: {compiler or 'not found'}"
    cache = found["cache"]
    size = f"{cache['files']} files, {cache['bytes'] / MEGABYTE:.1f} MB"
    yield f"compiled programs: {cache['folder'] or 'not kept'}{f' ({size})' if cache['folder'] else ''}"
    yield ""
    yield from (f"problem: {text}" for text in found["problems"])
    yield "required packages: " + ("see above" if found["problems"] else "all installed")
