"""Every example runs as a program, and its agent beats a random one by the margin that it asserts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
RESULT = ("trained", "last 20 training episodes")


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_beats_the_random_agent(name, tmp_path):
    """The last line of the output has both returns, after an assertion on their difference."""
    assert "assert trained > random +" in (EXAMPLES / name).read_text()
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip().splitlines()[-1].startswith(RESULT)
    if name == "cartpole_video.py":
        videos = sorted((tmp_path / "runs/cartpole-video/videos").glob("*.mp4"))
        assert len(videos) >= 1
        assert all(video.stat().st_size > 1000 for video in videos)
