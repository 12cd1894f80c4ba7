"""Pages and presets quote what was measured, and nothing else."""

import runpy
from pathlib import Path

import yaml

from proximo.config import presets
from proximo.config.names import from_mapping

ROOT = Path(__file__).parents[1]
REPORT = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))


def test_figures_are_those_of_the_results():
    """`python benchmarks/report.py` finds nothing to write."""
    for path, text in REPORT["wanted"]().items():
        assert path.read_text("utf-8") == text, f"{path}: run python benchmarks/report.py --write"


def test_every_preset_has_the_settings_it_was_measured_with():
    """A preset that says what it reached holds the total that those runs trained for, to one rollout."""
    measured = REPORT["results"]()
    assert {"CartPole-v1", "HalfCheetah-v5"} <= set(measured)
    for name in presets.list_names():
        preset = presets.load(name)
        assert ("measured" in preset) == (name in measured), name
        for run in measured.get(name, {"runs": []})["runs"]:
            asked = int(preset["settings"]["total_timesteps"])
            assert asked <= run["steps"] < asked * 1.05
            assert run["command"].startswith(f"proximo train {name} --backend {run['backend']}")


def test_every_preset_is_a_valid_config():
    """Also those of older versions, which are the newer ones' settings."""
    for name in presets.list_names():
        assert from_mapping(presets.load_settings(name, "auto")).total_timesteps >= 100_000
    assert presets.load_settings("Hopper-v4", "auto") == presets.load_settings("Hopper-v5", "auto")


def test_a_stale_figure_is_found():
    """The comparison can fail: a changed mean changes the preset's text."""
    name, result = next(iter(REPORT["results"]().items()))
    text = (ROOT / f"src/proximo/config/presets/{name}.yaml").read_text("utf-8")
    backend, of = next(iter(result["summary"].items()))
    changed = REPORT["preset"](text, {backend: {**of, "mean": of["mean"] + 1.0}})
    assert yaml.safe_load(changed) != yaml.safe_load(text)
