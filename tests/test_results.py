"""Pages and presets quote the measured results."""

import runpy
from pathlib import Path

import pytest
import yaml

from proximo.config import presets
from proximo.config.names import from_mapping

ROOT = Path(__file__).parents[1]
REPORT = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))
GALLERY = runpy.run_path(str(ROOT / "benchmarks" / "gallery.py"))


def test_pages_and_presets_quote_current_results():
    """`python benchmarks/report.py` has nothing to write."""
    for path, text in REPORT["wanted"]().items():
        assert path.read_text("utf-8") == text, f"{path}: run python benchmarks/report.py --write"


def test_the_gallery_shows_current_results():
    """Page, curves and covers are those of the results; a curve takes less than 30 kB."""
    assert GALLERY["stale"]() == [], "run python benchmarks/gallery.py --write"
    assert all(len(text) < 30_000 for path, text in GALLERY["wanted"]().items() if path.suffix == ".svg")


def test_the_gallery_draws_means_and_extremes_of_seeds():
    """Curves of two seeds are interpolated where both have values, from the later first to the earlier last step.

    These are 10 and 30. There one seed goes from 0 to 20 and the other stays at 40: means of 20 and 30.
    """
    curves = [[[10, 0.0], [30, 20.0], [50, 30.0]], [[0, 40.0], [30, 40.0]]]
    steps, mean, lowest, highest = GALLERY["mean_and_band"](curves)
    assert (steps[0], steps[-1]) == (10, 30)
    assert (mean[0], mean[-1]) == (20.0, 30.0)
    assert (lowest[0], lowest[-1]) == (0.0, 20.0)
    assert (highest == 40.0).all()
    for low, high in ((0, 1), (-1200.0, -140.0), (0, 10_002_432), (-0.3, 0.2)):
        ticks = GALLERY["ticks"](low, high)
        assert 2 <= len(ticks) <= 6
        assert low <= min(ticks) <= max(ticks) <= high


def test_the_gallery_lists_settings_that_differ_from_the_defaults():
    """Those recorded with the result, or else those of the preset; settings of the machine are left out."""
    changed = GALLERY["changed_settings"]
    recorded = {"gamma": 0.98, "gae_lambda": 0.95, "threads": 1, "hidden_sizes": [256, 256]}
    result = {"env": "CartPole-v1", "settings": {"jax": recorded}}
    assert changed(result, "jax") == {"gamma": 0.98, "hidden_sizes": (256, 256)}
    of_preset = changed({"env": "gymnax:Asterix-MinAtar"}, "jax")
    assert of_preset
    settings = presets.load_settings("gymnax:Asterix-MinAtar", "auto")
    assert of_preset.keys() <= settings.keys()


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


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_pages_quote_the_speeds_of_the_chart(page):
    """The alternative text of the chart has the measured median of every library, to two digits."""
    text = (ROOT / page).read_text("utf-8")
    chart = text.partition("![Steps per second")[2].partition("benchmarks/results/speed.png)")[0]
    for name, speed in runpy.run_path(str(ROOT / "benchmarks" / "speed_chart.py"))["medians"]().items():
        library = name.removeprefix("Proximo (").removesuffix(")")
        assert library in chart
        assert f"{round(speed, -2):,.0f}" in chart, name
