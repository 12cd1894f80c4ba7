"""Progress of training on a terminal: pseudo-terminals, and what they receive."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from proximo.cli import main
from proximo.run.console import Console, RunRow, View, status_line

pty = pytest.importorskip("pty")
display = pytest.importorskip("proximo.run.display")

TINY = ["--preset=none", "--num-steps=16", "--minibatch-size=16", "--update-epochs=1", "--num-envs=2"]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOR = re.compile(r"\x1b\[(?:[0-9;]*;)?[34][0-9][0-9;]*m")
METRICS = {
    "global_step": 2_000, "rollout/episode_return_mean": 12.5, "losses/policy": -0.0123, "losses/value": 45.6,
    "losses/entropy": 0.69, "update/approx_kl": 0.0071, "update/clip_fraction": 0.11,
    "update/explained_variance": 0.87, "update/learning_rate": 2.5e-4, "policy/std": 0.61,
    "evaluation/return_mean": 33.25,
}  # fmt: skip


@contextlib.contextmanager
def terminal(columns, rows=24):
    """Yield a pseudo-terminal of this size and a list, which holds the received text after the block."""
    import fcntl
    import struct
    import termios

    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    parts, received = [], []

    def read():
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while part := os.read(reader, 65_536):
                parts.append(part)

    thread = threading.Thread(target=read)
    thread.start()
    stream = os.fdopen(writer, "w", encoding="utf-8")
    try:
        yield stream, parts
    finally:
        stream.close()
        thread.join()
        os.close(reader)
        received.append(b"".join(parts).decode())
        parts[:] = received


def frames(text):
    """The states of the display, each a list of lines without control sequences."""
    plain = CONTROL.sub("", text).replace("\r", "")
    return [frame.splitlines() for frame in re.findall(r"╭.*?╯", plain, re.DOTALL)]


@pytest.fixture
def environment(monkeypatch):
    """Variables of an ordinary terminal."""
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "COLUMNS", "LINES", "COLORTERM", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def train(environment, columns, run_dir, *flags):
    """Train for 640 steps on a terminal in this process; return what it received."""
    with terminal(columns) as (stream, received):
        environment.setattr(sys, "stderr", stream)
        command = ["train", "CartPole-v1", *TINY, "--total-timesteps=640", "--run-dir", str(run_dir), *flags]
        assert main(command) == 0
        assert sys.stderr is stream  # restored
    return received[0]


def test_a_training_ends_with_its_return_and_a_full_bar(environment, tmp_path, capsys):
    """The last frame has 640 of 640 steps, and the return that the summary prints; names are no markup."""
    run_dir = tmp_path / "[red]x[" / "red]" / "[/]"
    text = train(environment, 200, run_dir, "--evaluation-interval=5", "--evaluation-episodes=2")
    last = "\n".join(frames(text)[-1])
    mean = re.search(r"finished after 640 steps: mean return .* episodes (\S+)", capsys.readouterr().out)[1]
    assert f"mean return  {mean}" in last
    assert "640 / 640 steps" in last
    assert "100 %" in last
    assert re.search(r"evaluation +\S+ at step 640", last)
    for label in ("policy loss", "value loss", "entropy", "KL", "clip fraction", "expl. variance", "learning rate"):
        assert label in last
    assert "[red]x[/red]/[/]" in "".join(line.strip("│ ") for line in frames(text)[-1])
    assert COLOR.search(text)
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")


def test_without_colors_and_on_a_narrow_terminal(environment, tmp_path):
    """NO_COLOR leaves no color; 40 columns are never exceeded; TERM=dumb and a pipe receive no control sequence."""
    environment.setenv("NO_COLOR", "1")
    text = train(environment, 40, tmp_path / "run")
    assert not COLOR.search(text)
    assert "\x1b" in text
    assert {len(line) for frame in frames(text) for line in frame} == {40}
    environment.setenv("TERM", "dumb")
    assert "\x1b" not in (text := train(environment, 80, tmp_path / "dumb"))
    assert "640 / 640  100 %" in text


def test_a_pipe_receives_plain_lines(capsys, tmp_path):
    """Lines without control characters, the last with the end of the run; with --quiet nothing."""
    command = ["train", "CartPole-v1", *TINY, "--total-timesteps=64", "--run-dir"]
    assert main([*command, str(tmp_path / "run")]) == 0
    errors = capsys.readouterr().err
    assert "64 / 64  100 %" in errors
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", errors)
    assert main([*command, str(tmp_path / "quiet"), "--quiet"]) == 0
    assert not any(capsys.readouterr())


@pytest.mark.parametrize("interrupts", [1, 2])
def test_an_interrupted_training_leaves_a_clean_terminal(environment, tmp_path, interrupts):
    """After Ctrl-C the cursor is visible and at the start of a line, and the note is above the last frame."""
    with terminal(80) as (stream, received):
        run_dir = tmp_path / "run"
        command = [sys.executable, "-m", "proximo", "train", "CartPole-v1", *TINY, "--run-dir", str(run_dir)]
        process = subprocess.Popen(command, stdin=stream, stdout=stream, stderr=stream, start_new_session=True)
        while b"policy loss" not in b"".join(received):
            assert process.poll() is None, b"".join(received)
            time.sleep(0.02)
        for _ in range(interrupts):
            process.send_signal(signal.SIGINT)
            time.sleep(0.001)
        assert process.wait() == 130
    text = received[0]
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")
    assert text.endswith("\n")
    plain = CONTROL.sub("", text)
    note, last_frame = plain.rfind("proximo: stopping after"), plain.rfind("╭─ CartPole-v1")
    assert note < last_frame
    assert note > 0 or interrupts == 2  # the second can come before the note is printed


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_closed_terminal_does_not_stop_the_run(environment, is_terminal):
    """A failed write raises nothing, later writes are skipped, and standard error is restored."""

    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

        def isatty(self):
            return is_terminal

    environment.setattr(sys, "stderr", gone := Gone())
    console = Console(100)
    for step in (10, 20):
        console.write({"global_step": step, "rollout/episode_return_mean": None})
        console.show_step(0)
    console.close()
    assert sys.stderr is gone


def test_a_pipe_gets_a_line_every_few_seconds():
    """The first state at once, the last one at the end."""
    console = Console(100, stream=(stream := io.StringIO()))
    for step in (10, 20, 30):
        console.write({"global_step": step, "rollout/episode_return_mean": 1.0})
    console.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["10", "30"]
    assert all(line.endswith("mean return 1.000") for line in lines)


def test_output_during_training_stays_above_the_display(environment, capsys):
    """Lines and unfinished lines are printed literally, and in front of the last frame."""
    with terminal(80) as (stream, received):
        environment.setattr(sys, "stderr", stream)
        console = Console(1000, title="a[/]\x1b[31m", run_dir="[red]x[/red]")
        console.write(METRICS)
        print("[red]note[/red] [/]", file=sys.stderr)
        with status_line(True) as show:  # of an evaluation meanwhile, which cannot rewrite its line here
            show("episode 1 of 10")
        print("unfinished [/b]", end="", file=sys.stderr)
        console.close()
        print("after", file=sys.stderr)
    raw = received[0]
    text = CONTROL.sub("", raw)
    assert "\x1b[K" not in raw
    for line in ("[red]note[/red] [/]", "unfinished [/b]", "episode 1 of 10"):
        assert 0 < text.index(line) < text.rindex("╭─ a[/]\\x1b[31m")
        place = raw.index(line)
        assert "\x1b[2K" in raw[raw.rindex("╯", 0, place) : place]  # the display was erased before
    assert text.rstrip().endswith("after")
    assert "[red]x[/red]" in text


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("is_ascii", [False, True])
def test_the_display_fits(columns, is_ascii):
    """At most 12 lines of exactly the width, with everything shown, even for large numbers and long names."""
    view = View(
        200_000_000, "Name" * 50, "runs/" * 50, 123_456_789, 40_000.0, 20_000.0, 12_345.0, -12345.678,
        list(range(500)), 12345.678, (-12345.678, 123_000_000), METRICS, (), "collecting step 1 of 2",
    )  # fmt: skip
    from rich.console import Console as Rich

    stream = io.TextIOWrapper(io.BytesIO(), "ascii" if is_ascii else "utf-8")
    Rich(file=stream, width=columns).print(display.build(view, columns, 24, is_ascii))
    stream.seek(0)
    lines = stream.read().splitlines()
    assert len(lines) <= 12
    assert {len(line) for line in lines} == {columns}
    text = "\n".join(lines)
    for expected in (
        "61 %", "11:06:40 elapsed", "5:33:20 left", "123,456,789 / 200,000,000 steps", "12,345 steps/s",
        "mean return  -12345.7", "best 12345.7", "-12345.7 at step 123,000,000", "records in   runs/",
        "collecting step 1 of 2",
    ):  # fmt: skip
        assert expected in text, expected
    for name, value in (("KL", "0.0071"), ("learning rate", "0.00025"), ("expl. variance", "0.87"), ("std", "0.61")):
        assert re.search(rf"{re.escape(name)} +{value}", text), name


@pytest.mark.parametrize(("height", "shown"), [(24, [*range(20, 30), *range(5)]), (50, range(30))])
def test_a_group_of_runs_fits_into_the_terminal(height, shown):
    """Each run has a line. If 24 − 8 lines are too few, 15 runs are shown, incomplete ones first, and 15 counted."""
    from rich.console import Console as Rich

    runs = [RunRow(f"seed {n}", 100 if n < 20 else 50, 100, None if n == 25 else n / 2) for n in range(30)]
    stream = io.StringIO()
    Rich(file=stream, width=80).print(display.build(View(3000, runs=runs), 80, height))
    text = stream.getvalue()
    assert len(text.splitlines()) < height
    assert [int(n) for n in re.findall(r"seed (\d+)", text)] == list(shown)
    assert ("and 15 more" in text) == (height == 24)
    assert re.search(r"seed 21 .* 50 %  mean return 10\.50", text)
    assert re.search(r"seed 3 .*100 %  mean return 1\.500", text)


def test_sparkline():
    """Pairs of 8 rising values are the 4 means 0.5, 2.5, 4.5 and 6.5, at the levels 0, 7/3, 14/3 and 7."""
    assert display.sparkline(range(8), 4) == "▁▃▆█"
    assert display.sparkline([3.0, np.inf, 3.0], 10) == "▁▁"
    assert display.sparkline([], 4) == display.sparkline([1.0], 0) == ""


def test_the_curve_keeps_a_bounded_history():
    """A million iterations are stored as at most 513 points, the latest of each 512th of the run."""
    console = Console(1_000_000, stream=type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    console._status_due = np.inf
    for step in range(0, 1_000_001, 100):
        console.write({"global_step": step, "rollout/episode_return_mean": float(step)})
    history = list(console._returns.values())
    assert len(history) == 513
    assert history == sorted(history)
    assert history[-1] == 1e6
