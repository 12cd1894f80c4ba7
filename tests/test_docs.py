"""The documentation is true: the site builds without a warning, links lead somewhere, and what pages show runs."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from proximo.cli import main
from proximo.config.names import ALIASES
from proximo.config.settings import SETTINGS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# First words of command lines that are not run here, and why.
NOT_RUN = {
    "pip": "changes the installation",
    "apt-get": "changes the machine",
    "make": "is what runs these tests, and more",
    "tensorboard": "serves until it is stopped",
}
NEEDS_A_WINDOW = "--render"
# Put behind what a page says; of two equal flags the last one wins.
CUT = {
    "train": ["--total-timesteps", "512", "--update-epochs", "1", "--histogram-interval", "0"],
    "resume": ["--total-timesteps", "4096"],
    "evaluate": ["--episodes", "2"],
    "plot": [],
    "presets": [],
}


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line that it begins at."""

    language: str
    text: str
    line: int


class Command(NamedTuple):
    """A command line, and the lines of its output that the page shows below it."""

    line: str
    shown: list[str]


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text("utf-8").splitlines()
    fence = re.compile(r" *```(\S*)")
    opened: tuple[str, int] | None = None
    for number, line in enumerate(lines):
        if match := fence.match(line):
            if opened is None:
                opened = match[1], number
            else:
                language, first = opened
                yield Block(language, "\n".join(lines[first + 1 : number]) + "\n", first + 2)
                opened = None
    assert opened is None, f"{page}: a block is not closed"


def commands(block: Block) -> list[Command]:
    """Command lines of a block: all of `sh`, and of `console` those behind `$ `, where the rest is output."""
    lines = re.sub(r"\\\n *", "", block.text).splitlines()
    if block.language == "sh":
        return [Command(line, []) for line in lines]
    found: list[Command] = []
    for line in lines:
        if line.startswith("$ "):
            found.append(Command(line[2:], []))
        else:
            found[-1].shown.append(line.rstrip())
    return found


def cut(code: str) -> str:
    """A snippet with its budgets cut."""
    code = re.sub(r"\b(learn|iterate)\([\d_]+", r"\1(512", code)
    code = re.sub(r"\b(total_timesteps=|global_step < )[\d_]+", r"\g<1>512", code)
    return re.sub(r"\bepisodes=\d+", "episodes=2", code)


def file_name(block: Block) -> str | None:
    """The name of the file that a block is, which its first line says in a comment."""
    match = re.match(r"# (\S+\.(?:py|yaml))\n", block.text)
    return match[1] if match else None


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """As for a program in this folder, and for `python -m` started in it."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def run_command(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """Run one line in this process, which has JAX loaded already; check its exit status, and the output shown."""
    words = shlex.split(command.line, comments=True)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)  # of the environment: how many threads, which conftest decides
    if words[0] in NOT_RUN or NEEDS_A_WINDOW in words:
        return
    *words, output = [*words[:-2], words[-1]] if words[-2:-1] == [">"] else [*words, None]
    module = words[:3] == ["python", "-m", "proximo"]
    assert module or words[0] == "proximo", f"neither run nor in NOT_RUN: {command.line}"
    arguments = words[3:] if module else words[1:]
    capsys.readouterr()
    with importable(Path.cwd()) if module else nullcontext():
        status = main([*arguments, *CUT[arguments[0]]])
    captured = capsys.readouterr()
    fails = any(line.startswith("proximo: error: ") for line in command.shown)
    assert status == (2 if fails else 0), f"{command.line}: {captured.err}"
    for line in command.shown:
        assert line in captured.out + captured.err, command.line
    if output:
        Path(output).write_text(captured.out, "utf-8")


RUN = [page for page in PAGES if {block.language for block in blocks(page)} & {"sh", "console", "python"}]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page, tmp_path, monkeypatch, capsys):
    """Files, commands and snippets of a page, from top to bottom in one folder, with training cut short."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if name := file_name(block):
            Path(name).write_text(block.text, "utf-8")
        elif block.language in ("sh", "console"):
            for command in commands(block):
                run_command(command, capsys)
        elif block.language == "python":
            # Compiled with its place, so that a traceback names the page's line.
            code = compile("\n" * (block.line - 1) + cut(block.text), str(page), "exec")
            with importable(tmp_path):
                exec(code, namespace)
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_the_site_builds(tmp_path):
    """Warnings, and links inside the site that lead nowhere, are errors. No link to elsewhere is followed."""
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html"]
    command += ["-d", str(tmp_path / "doctrees"), str(ROOT / "docs"), str(tmp_path / "html")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    settings = (tmp_path / "html" / "settings.html").read_text("utf-8")
    shown = set(re.findall(r'<span class="pre">(\w+)</span>', settings))
    assert {*SETTINGS, *ALIASES} <= shown


LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    """Also where pages are read as files: a relative link is to a file, and an anchor to a heading."""
    for target in LINK.findall(FENCED.sub("", page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as Sphinx and Git forges make them."""
    headings = re.findall(r"^#+ +(.+)$", FENCED.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
