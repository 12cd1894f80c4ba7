"""Pages and presets quote the measured results."""

import runpy
from pathlib import Path

import yaml

from proximo.config import presets
from proximo.config.names import from_mapping

ROOT = Path(__file__).parents[1]
REPORT = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))


def test_pages_and_presets_quote_current_results():
    """`python benchmarks/report.py` has nothing to write."""
    for path, text in REPORT["wanted"]().items():
        assert path.read_text("utf-8") == text, f"{path}: run python benchmarks/report.py --write"


def test_every_preset_has_the_settings_it_was_measured_with():
    """A preset with results has the total steps of those runs, to within one rollout."""
    measured = REPORT["results"]()
    assert {"CartPole-v1", "HalfCheetah-v5"} <= set(measured)
    for name in presets.list_names():
        preset = presets.load(name)
        assert ("measured" in preset) == (name in measured), name
        for run in measured.get(name, {"runs": []})["runs"]:
            steps = int(preset["settings"]["total_timesteps"])
            assert steps <= run["steps"] < steps * 1.05
            assert run["command"].startswith(f"proximo train {name} --backend {run['backend']}")


def test_every_preset_is_a_valid_config():
    """So are presets of older environment versions, which equal those of the newer versions."""
    for name in presets.list_names():
        assert from_mapping(presets.load_settings(name, "auto")).total_timesteps >= 100_000
    assert presets.load_settings("Hopper-v4", "auto") == presets.load_settings("Hopper-v5", "auto")


def test_a_stale_figure_is_found():
    """A changed mean changes the text of the preset, so the comparison can fail."""
    name, result = next(iter(REPORT["results"]().items()))
    text = (ROOT / f"src/proximo/config/presets/{name}.yaml").read_text("utf-8")
    backend, summary = next(iter(result["summary"].items()))
    changed = REPORT["preset"](text, {backend: {**summary, "mean": summary["mean"] + 1.0}})
    assert yaml.safe_load(changed) != yaml.safe_load(text)


def test_the_readme_quotes_the_speeds_of_the_chart():
    """The alternative text of the chart has the measured median of every library, to two digits."""
    text = (ROOT / "README.md").read_text("utf-8")
    chart = text.partition("![Steps per second")[2].partition("](benchmarks/results/speed.png)")[0]
    for name, speed in runpy.run_path(str(ROOT / "benchmarks" / "speed_chart.py"))["medians"]().items():
        library = name.removeprefix("Proximo (").removesuffix(")")
        assert library in chart
        assert f"{round(speed, -2):,.0f}" in chart, name
