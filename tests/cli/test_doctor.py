"""`proximo doctor`."""

import importlib.metadata
import json
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from proximo.cli import doctor, main

ROOT = Path(__file__).parents[2]


def test_every_extra_for_users_is_described():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert set(doctor.PURPOSES) == set(extras) - {"docs", "dev"}


def test_what_is_installed_has_no_problem(capsys):
    """The development installation has all extras but the suites in JAX."""
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["extras"]["video"] == found["extras"]["export"] == []
    assert found["versions"]["numpy"] == importlib.metadata.version("numpy")
    assert found["devices"]["jax"][0] == "cpu"
    assert main(["doctor"]) == 0
    assert "required packages: all installed" in capsys.readouterr().out


def test_missing_and_unsupported_packages_are_named(monkeypatch, capsys):
    """A version below the bound, one above the cap, and a package that does not exist."""
    version = importlib.metadata.version("numpy")
    wrong = [f"numpy<{version}", "no-such-package-x>=1", 'no-such-package-y; extra == "wandb"', "numpy>=1"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wrong)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert f"problem: numpy {version} is installed; <{version} is needed" in printed
    assert "problem: no-such-package-x is not installed" in printed
    assert "pip install 'proximo[wandb]'  (no-such-package-y is not installed)" in printed
    assert printed.count("problem:") == 2
    assert doctor.problem_of(Requirement("numpy>=1")) == ""
