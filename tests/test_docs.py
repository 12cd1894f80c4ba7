"""The documentation: the site builds without warnings, links have targets, and all commands and snippets run."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from proximo.cli import main
from proximo.config.names import ALIASES
from proximo.config.settings import SETTINGS
from proximo.version import __version__

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *(page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts)]

# First words of command lines that are not run here, and why.
NOT_RUN = {
    "pip": "changes the installation",
    "apt-get": "changes the machine",
    "make": "runs these tests",
    "tensorboard": "does not return",
}
NEEDS_A_WINDOW = "--render"
# Appended to the commands of a page to shorten them; the last of two equal flags counts.
SHORTER = {
    "train": ["--total-timesteps", "512", "--update-epochs", "1", "--histogram-interval", "0"],
    "resume": ["--total-timesteps", "4096"],
    "evaluate": ["--episodes", "2"],
    "analyze": ["--episodes", "2"],
    "report": [],
    "export": [],
    "inspect": [],
    "plot": [],
    "presets": [],
}


class Block(NamedTuple):
    """A fenced block: language, text and first line number."""

    language: str
    text: str
    line: int


class Command(NamedTuple):
    """A command line, and the lines of its output that the page shows."""

    line: str
    shown: list[str]


def page_id(page: Path) -> str:
    """Path of a page below the root, which names its tests."""
    return str(page.relative_to(ROOT).with_suffix(""))


def blocks(page: Path) -> Iterator[Block]:
    """Fenced blocks of a page."""
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
    """Command lines of a block: every line of `sh`; in `console` the lines after `$ `, the others are output."""
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


def shorten(code: str) -> str:
    """A snippet with fewer steps and episodes."""
    code = re.sub(r"\b(learn|iterate)\([\d_]+", r"\1(512", code)
    code = re.sub(r"\b(total_timesteps=|global_step < )[\d_]+", r"\g<1>512", code)
    return re.sub(r"\bepisodes=\d+", "episodes=2", code)


def file_name(block: Block) -> str | None:
    """Name of the file that a block contains, from a comment in its first line."""
    match = re.match(r"# (\S+\.(?:py|yaml))\n", block.text)
    return match[1] if match else None


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Make modules of a folder importable, as for a program or `python -m` started there."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def run_command(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command line in this process, which has loaded JAX; check its exit status and the output shown."""
    words = shlex.split(command.line, comments=True)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)  # environment variables: conftest sets the number of threads
    if words[0] in NOT_RUN or NEEDS_A_WINDOW in words:
        return
    *words, output = [*words[:-2], words[-1]] if words[-2:-1] == [">"] else [*words, None]
    module = words[:3] == ["python", "-m", "proximo"]
    assert module or words[0] == "proximo", f"not run and not in NOT_RUN: {command.line}"
    arguments = words[3:] if module else words[1:]
    capsys.readouterr()
    with importable(Path.cwd()) if module else nullcontext():
        status = main([*arguments, *SHORTER[arguments[0]]])
    captured = capsys.readouterr()
    fails = any(line.startswith("proximo: error: ") for line in command.shown)
    assert status == (2 if fails else 0), f"{command.line}: {captured.err}"
    for line in command.shown:
        assert line in captured.out + captured.err, command.line
    if output:
        Path(output).write_text(captured.out, "utf-8")


RUN = [page for page in PAGES if {block.language for block in blocks(page)} & {"sh", "console", "python"}]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=page_id)
def test_commands_and_snippets_run(page, tmp_path, monkeypatch, capsys):
    """Files, commands and snippets of a page run from top to bottom in one folder, with less training."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if name := file_name(block):
            Path(name).write_text(block.text, "utf-8")
        elif block.language in ("sh", "console"):
            for command in commands(block):
                run_command(command, capsys)
        elif block.language == "python":
            # With its line number, so that a traceback names the line of the page.
            code = compile("\n" * (block.line - 1) + shorten(block.text), str(page), "exec")
            with importable(tmp_path):
                exec(code, namespace)
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. Sphinx reports no warning and no broken link within it. External links are not checked."""
    pytest.importorskip("sphinx")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html"]
    command += ["-d", str(folder / "doctrees"), str(DOCS), str(folder / "html")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "html"


def test_the_site_lists_every_setting(site):
    """The site builds, and its page of settings has all names."""
    settings = (site / "reference" / "settings.html").read_text("utf-8")
    shown = set(re.findall(r'<span class="pre">(\w+)</span>', settings))
    assert {*SETTINGS, *ALIASES} <= shown


class References(HTMLParser):
    """Collects the values of `href`, `src` and `poster`, and the ids, of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the attributes of a tag."""
        for name, value in attrs:
            if name in ("href", "src", "poster") and value:
                self.targets.append(value)
            elif name == "id" and value:
                self.ids.add(value)


@pytest.mark.slow
def test_everything_that_the_site_refers_to_exists(site):
    """Pages, anchors, pictures, videos, scripts and styles of every page, and the pages in its llms.txt."""
    pages = {path: References(path.read_text("utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 40
    missing, videos = [], 0
    for page, references in pages.items():
        for target in references.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            path = (page.parent / unquote(url.path)).resolve() if url.path else page
            videos += path.suffix == ".mp4"
            known = path.exists() and (not url.fragment or path not in pages or url.fragment in pages[path].ids)
            missing += [] if known else [f"{page.relative_to(site)}: {target}"]
    assert not missing
    assert videos >= 7
    listed = re.findall(r"^- \[.*?\]\((.*?)\): ", (site / "llms.txt").read_text("utf-8"), re.MULTILINE)
    assert len(listed) > 30
    assert all((site / path).is_file() for path in listed)


LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_have_targets(page):
    """Relative links work in the files as well: they name a file, and an anchor names a heading."""
    for target in LINK.findall(FENCED.sub("", page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, in the form of Sphinx and GitHub."""
    headings = re.findall(r"^#+ +(.+)$", FENCED.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


ARCHITECTURE = DOCS / "explanation" / "architecture.md"
DETAILS = DOCS / "explanation" / "implementation-details.md"


def test_the_architecture_page_lists_the_import_layers():
    """Its table and its diagram equal the layers of the import contract."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    expected = [re.findall(r"proximo\.(\w+)", layer) for layer in layers]
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", ARCHITECTURE.read_text("utf-8"), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(expected) + 1))
    assert [re.findall(r"`(\w+)`", modules) for _, modules in rows] == expected
    diagram = runpy.run_path(str(DOCS / "pictures" / "layers.py"))
    assert diagram["layers"]() == expected
    assert (DOCS / "pictures" / "layers.svg").read_text("utf-8") == diagram["draw"](expected)


def test_the_architecture_page_names_files_that_exist():
    """Every folder and every file in its tables exists, and so do the functions from the command line to the loss."""
    source = ROOT / "src" / "proximo"
    text = ARCHITECTURE.read_text("utf-8")
    folders = re.findall(r"^\| ((?:`\w+/`(?:, )?)+) \| (.+) \|$", text, re.MULTILINE)
    assert len(folders) >= 8
    for names, files in folders:
        for folder in re.findall(r"`(\w+)/`", names):
            for file in re.findall(r"`([\w/]+(?:\.py|/))`", files):
                assert (source / folder / file).exists(), f"{folder}/{file}"
    steps = re.findall(r"^\| (`\w+(?:/\w+)?\.py`(?: or `[\w/]+\.py`)?) \| ([^|]+) \|", text, re.MULTILINE)
    assert len(steps) == 6
    for files, functions in steps:
        for file in re.findall(r"`([\w/.]+)`", files):
            module = importlib.import_module("proximo." + file.removesuffix(".py").replace("/", "."))
            for name in re.findall(r"`([\w.]+)`", functions):
                assert has(module, name), f"{file}: {name}"


def test_implementation_details_name_code_and_tests_that_exist():
    """Each function in the column *code* exists in both backends or in shared code, and each test exists."""
    rows = re.findall(r"^\| .+ \|$", DETAILS.read_text("utf-8"), re.MULTILINE)[2:]
    assert len(rows) >= 40
    known = {path.stem: path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    for row in rows:
        code, tests = row.strip("| ").split(" | ")[-2:]
        references = re.findall(r"(shared )?`([\w.]+)`", code)
        assert references, row
        for shared, reference in references:
            for package in ("proximo",) if shared else ("proximo.jax", "proximo.torch"):
                assert resolves(package, reference), f"{package}: {reference}"
        for module, name in re.findall(r"`(test_\w+)::(test_\w+)`", tests):
            assert f"def {name}(" in known[module], f"{module}::{name}"


def has(thing: Any, path: str) -> bool:
    """Whether attributes separated by dots exist."""
    for name in path.split("."):
        if not hasattr(thing, name):
            return False
        thing = getattr(thing, name)
    return True


def resolves(package: str, path: str) -> bool:
    """Whether a path below a package names a module followed by attributes."""
    parts = path.split(".")
    for count in range(len(parts) - 1, 0, -1):
        with suppress(ModuleNotFoundError):
            module = importlib.import_module(".".join([package, *parts[:count]]))
            return has(module, ".".join(parts[count:]))
    return False


def test_llms_txt_lists_every_page():
    """In the format of llmstxt.org: a title, a summary, and sections of links with the titles of the pages."""
    text = (ROOT / "llms.txt").read_text("utf-8")
    assert text.startswith("# Proximo\n\n> ")
    listed = dict(re.findall(r"^- \[(.*)\]\((docs/.*\.md)\): .+$", text, re.MULTILINE))
    pages = [page for page in PAGES if page.parent != ROOT and page.name != "index.md"]
    assert {(ROOT / path).resolve() for path in listed.values()} == {page.resolve() for page in pages}
    for title, path in listed.items():
        assert (ROOT / path).read_text("utf-8").startswith(f"# {title}\n")


def test_the_citation_file_is_valid():
    """The keys that the Citation File Format 1.2.0 requires, and the current version."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == __version__
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["license"]
