"""The HTML report: what it shows, and that a browser shows it without a network."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from proximo import PPO, UserError
from proximo.cli import main
from proximo.report.curves import read_runs
from proximo.report.page.content import MAX_EMBEDDED_BYTES, read_content
from proximo.report.page.write import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SMALL = {"num_envs": 2, "num_steps": 32, "minibatch_size": 32, "tensorboard": False, "preset": None}
VOID = {"meta", "link", "img", "input", "br", "path", "use", "source"}


class Balanced(HTMLParser):
    """Collects the open elements and all attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.wrong = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append(tag)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of two seeds with γ = 0.99 and one with 0.9."""
    folder = tmp_path_factory.mktemp("runs")
    for name, settings in (("a", {"seed": 0}), ("b", {"seed": 1}), ("c", {"seed": 0, "gamma": 0.9})):
        with PPO("CartPole-v1", **SMALL, **settings) as agent:
            agent.learn(640, run_dir=folder / name)
    return folder


def test_a_run_writes_its_report(runs):
    page = (runs / "a" / "report.html").read_text("utf-8")
    parser = Balanced()
    parser.feed(page)
    assert parser.open == parser.wrong == []
    links = [value for name, value in parser.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith(("data:", "#")) for value in links)  # nothing is loaded
    assert "url(http" not in page
    assert len(page) < 1_000_000


def test_results_are_those_of_the_metrics(runs):
    """Means and spreads of the last returns of two seeds; the third run is a group of its own."""
    folders = [runs / name for name in "abc"]
    content = read_content(folders, read_runs(folders))
    assert [len(group.runs) for group in content.groups] == [2, 1]
    last = [
        json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[-1])["rollout/episode_return_mean"]
        for name in "ab"
    ]
    assert float(content.groups[0].mean) == pytest.approx(np.mean(last), rel=1e-3)
    assert float(content.groups[0].spread) == pytest.approx(np.std(last, ddof=1), rel=1e-3)
    different = {setting.name for setting in content.settings if setting.differs}
    assert {"gamma", "num_envs", "num_steps"} <= different
    assert "gae_lambda" not in different
    assert "cores" in dict(content.versions)


def test_hostile_names_are_escaped(runs, tmp_path):
    """Names of folders, environments, settings and files cannot become markup."""
    evil = '<img src=x onerror=alert(1)>"{{7*7}}'
    run = tmp_path / "<b>{{ 7 * 7 }}"
    shutil.copytree(runs / "a", run)
    text = (run / "config.yaml").read_text("utf-8").replace("env: CartPole-v1", f"env: {json.dumps(evil)}")
    (run / "config.yaml").write_text(text, "utf-8")
    (run / "faults").mkdir()
    (run / "faults" / "<script>x").mkdir()
    (run / "versions.json").write_text(json.dumps({evil: evil}), "utf-8")
    (run / "analysis").mkdir()
    (run / "analysis" / "analysis.json").write_text(json.dumps({"verdicts": {"../../x": evil}}), "utf-8")
    page = write_report([run], tmp_path / "page.html").read_text("utf-8")
    assert evil not in page
    assert html.escape("<script>x") in page
    assert "<b>{{" not in page
    assert html.escape("<b>{{ 7 * 7 }}") in page
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", page)[0]
    parser = Balanced()
    parser.feed(page)
    assert not any(name.startswith("on") for name, _ in parser.attributes)


def test_long_runs_have_small_pages(runs, tmp_path):
    """20,000 iterations are drawn with at most about 1,500 points for each curve."""
    run = tmp_path / "run"
    shutil.copytree(runs / "a", run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    long = [{**rows[k % len(rows)], "iteration": k + 1, "global_step": 64 * (k + 1)} for k in range(20_000)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long), "utf-8")
    assert write_report([run]).stat().st_size < 3_000_000


def test_large_videos_are_named_and_links_are_not_followed(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "a", run)
    (run / "videos").mkdir()
    with (run / "videos" / "step_1.mp4").open("wb") as file:
        file.truncate(MAX_EMBEDDED_BYTES + 1)
    (content,) = read_content([run], read_runs([run])).videos
    assert content.uri == ""
    (run / "videos" / "step_2.mp4").write_bytes(b"small")
    (content,) = read_content([run], read_runs([run])).videos
    assert content.uri.startswith("data:video/mp4;base64,")
    (tmp_path / "secret").write_bytes(b"secret")
    (run / "videos" / "step_3.mp4").symlink_to(tmp_path / "secret")
    assert read_content([run], read_runs([run])).videos == []
    shutil.rmtree(run / "videos")
    for name in ("videos", "faults", "analysis"):
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
        (tmp_path / "elsewhere" / name / "private.mp4").write_bytes(b"private")
        (run / name).symlink_to(tmp_path / "elsewhere" / name)
    content = read_content([run], read_runs([run]))
    assert content.videos == content.faults == content.verdicts == []


def test_wrong_input_is_refused(runs, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="no HTML file"):
        write_report([runs / "a"], "page.png")
    with pytest.raises(UserError, match="cannot be written"):
        write_report([runs / "a"], tmp_path / "nowhere" / "page.html")
    assert main(["report", str(runs / "a"), str(runs / "b"), "--output", str(tmp_path / "p.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "p.html")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium; on Debian: apt-get install chromium")
def test_a_browser_filters_hides_and_zooms(runs, tmp_path):
    """A script in a copy of the page uses its controls as a reader would, and writes what it found into the title."""
    page = write_report([runs / name for name in "abc"], tmp_path / "page.html")
    steps = """<script>{
      const found = {}, seen = (name, value) => { found[name] = value; };
      const visible = () => [...document.querySelectorAll("#table tbody tr")].filter((row) => !row.hidden).length;
      const dispatch = (element, kind) => element.dispatchEvent(new Event(kind, {bubbles: true}));
      seen("differing", visible());
      const box = document.getElementById("differing"); box.checked = false; dispatch(box, "change");
      seen("all", visible());
      const filter = document.getElementById("filter"); filter.value = "gae_lambda"; dispatch(filter, "input");
      seen("filtered", visible());
      const picture = document.querySelector(".chart svg"), width = () => picture.viewBox.baseVal.width;
      const shown = (group) => [...picture.querySelectorAll(`[id^="g${group}-"]`)]
        .filter((line) => getComputedStyle(line).display !== "none").length;
      seen("before", [shown(0) > 0, shown(1) > 0]);
      const first = document.querySelector("[data-group='0']"); first.click();
      seen("hidden", [shown(0), shown(1) > 0]);
      const full = width();
      document.querySelector("[data-zoom='0.7']").click(); seen("in", width() / full);
      document.querySelector(".chart").dispatchEvent(new KeyboardEvent("keydown", {key: "-", bubbles: true}));
      seen("out", width() / full);
      const scheme = () => getComputedStyle(document.documentElement).colorScheme, old = scheme();
      document.getElementById("theme").click(); seen("theme", scheme() !== old);
      seen("overflow", document.documentElement.scrollWidth <= innerWidth);
      document.title = "found " + JSON.stringify(found);
    }</script></body>"""
    page.write_text(page.read_text("utf-8").replace("</body>", steps), "utf-8")
    for width in (390, 820, 1400):
        command = [
            BROWSER,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'chromium'}",
        ]
        command += [f"--window-size={width},900", "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        title = re.search(r"<title>found (.*?)</title>", done.stdout)
        assert title, done.stderr
        found = json.loads(html.unescape(title[1]))
        assert found["filtered"] == 1 < found["differing"] < found["all"]
        assert found["before"] == [True, True]
        assert found["hidden"] == [0, True]
        assert found["in"] == pytest.approx(0.7)
        assert found["out"] == pytest.approx(1.0, abs=0.01)
        assert found["theme"]
        assert found["overflow"], f"the page is wider than {width} pixels"
