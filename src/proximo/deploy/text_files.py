"""A policy as one Python file that needs NumPy only, or as JSON for readers in other languages."""

import base64
import json
from importlib import resources
from pathlib import Path
from pprint import pformat
from typing import Any

import numpy as np

from proximo.deploy.description import Description

WIDTH = 120  # of lines of the Python file
HEADER = '''\
"""A trained policy, exported by Proximo. It needs Python 3.10 or later, and NumPy.

    policy = load()
    policy.reset()                      # where an episode begins
    action = policy.act(observation)    # one observation, or a batch of them along the first axis

The facts about the run, its inputs and outputs follow; SPEC, below the code, holds them for programs.
"""
'''
FOOTER = '''

def load() -> Policy:
    """The exported policy, at the beginning of an episode."""
    return Policy(SPEC, WEIGHTS)
'''


def write_python(description: Description, path: Path) -> None:
    """Write the code of `runtime.py`, the description as a literal, and the weights as base64."""
    source = resources.files("proximo.deploy").joinpath("runtime.py").read_text("utf-8")
    code = source.split('"""\n', 1)[1]  # without its docstring
    spec = pformat(description.spec, width=WIDTH, sort_dicts=False)
    lines = [
        HEADER,
        *(f"# {line}".rstrip() + "\n" for line in facts(description)),
        code,
        f"\n\nSPEC = {spec}\n\nWEIGHTS = {{\n",
    ]
    for name, array in description.arrays.items():
        text = encode_array(array)
        lines.append(f"    {name!a}: (\n        {array.shape},\n")
        lines += [f'        "{text[first : first + WIDTH - 10]}"\n' for first in range(0, len(text), WIDTH - 10)]
        lines.append("    ),\n")
    path.write_text("".join([*lines, "}\n", FOOTER]), "utf-8")


def facts(description: Description) -> list[str]:
    """Lines about the run, the inputs and the outputs; names are escaped, because they may come from other people."""
    spec = description.spec
    lines = ["", *(f"{name}: {value!a}" for name, value in spec["about"].items()), ""]
    for kind, leaves in (("input", spec["observation"]), ("output", spec["action"])):
        lines += [f"{kind} {x['name']!a}: {x['dtype']} {tuple(x['shape'])}, {x['kind']}" for x in leaves]
    return [*lines, ""]


def write_json(description: Description, path: Path) -> None:
    """Write the description, and `weights`: name -> shape and base64 of little-endian float32."""
    weights = {name: [list(x.shape), encode_array(x)] for name, x in description.arrays.items()}
    path.write_text(json.dumps({**description.spec, "weights": weights}, allow_nan=False), "utf-8")


def read_json(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The description and the weights of a file of `write_json`."""
    spec = json.loads(path.read_text("utf-8"))
    return spec, spec.pop("weights")


def encode_array(array: np.ndarray) -> str:
    """Base64 of an array as little-endian float32, in the order of C."""
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()
