"""Sphinx configuration: Markdown pages, and tables generated from the code."""

import argparse
import importlib
import inspect
import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from proximo.cli import build_parser
from proximo.config.names import ALIASES
from proximo.config.settings import SETTINGS
from proximo.version import __version__

project = "Proximo"
version = release = __version__
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
highlight_language = "text"  # of blocks that name no language
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"Proximo {__version__}"
html_copy_source = False
html_show_copyright = False


class Generated(SphinxDirective):
    """Base of directives that insert a Markdown table; the page's own parser reads it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the parsed table."""
        return self.parse_text_to_nodes(self.table(self.arguments[0]))

    def table(self, argument: str) -> str:
        """Return the table as Markdown."""
        raise NotImplementedError


class Settings(Generated):
    """`{settings} GROUP` is a table of that group's settings, `{settings} aliases` one of alternative names."""

    def table(self, argument: str) -> str:
        """Return the table of a group or of the aliases."""
        return aliases() if argument == "aliases" else settings(argument)


class Options(Generated):
    """`{options} COMMAND` is a table of that command's options, without the settings."""

    def table(self, argument: str) -> str:
        """Return the table of a command."""
        return options(argument)


class Members(Generated):
    """`{members} MODULE.CLASS` is a table of a class's public methods and properties."""

    def table(self, argument: str) -> str:
        """Return the table of a class."""
        return members(argument)


def settings(group: str) -> str:
    """Every setting of a group: name, meaning, default, accepted values, source."""
    rows = [
        (f"`{name}`", setting.meaning, f"`{str(setting.default).lower()}`", setting.expected, setting.source or "–")
        for name, setting in SETTINGS.items()
        if setting.group == group
    ]
    if not rows:
        raise ValueError(f"there is no group of settings named {group!r}")
    return table(("setting", "meaning", "default", "accepts", "source"), rows)


def aliases() -> str:
    """Names of settings in other libraries."""
    names: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        names.setdefault(name, []).append(f"`{alias}`")
    rows = [(f"`{name}`", ", ".join(others)) for name, others in names.items()]
    return table(("setting", "also accepted"), rows)


def options(command: str) -> str:
    """Arguments and options of a command; settings are left out."""
    subparsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    rows = []
    for action in subparsers.choices[command]._actions:
        if action.help in (None, argparse.SUPPRESS) or action.dest == "help":
            continue
        if command == "train" and action.dest in SETTINGS:
            continue
        value = action.metavar or ("|".join(action.choices) if action.choices else action.dest.upper())
        takes_value = action.nargs != 0
        names = action.option_strings or [str(value)]
        shown = ", ".join(f"`{name} {value}`" if takes_value and name[0] == "-" else f"`{name}`" for name in names)
        rows.append((shown, str(action.help).replace("%%", "%")))
    return table(("argument", "meaning"), rows)


def members(path: str) -> str:
    """Public methods and properties of a class with the first sentence of their docstrings."""
    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    rows = []
    for attribute, value in vars(cls).items():
        function = value.__func__ if isinstance(value, classmethod) else value
        if attribute.startswith("_") or not (inspect.isfunction(function) or isinstance(value, property)):
            continue
        summary = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
        rows.append((f"`{attribute}{signature(function) if callable(function) else ''}`", summary))
    return table((f"`{name}`", "meaning"), rows)


def signature(function) -> str:
    """A signature without annotations and without `self` or `cls`."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    shown = inspect.Signature([parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters])
    return "(…)" if len(str(shown)) > 90 else str(shown)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


STYLE = """<style>
code.literal, td code.literal .pre { white-space: nowrap }  /* do not break a flag at its hyphens */
td code.literal { white-space: normal }
@media (max-width: 46em) { td code.literal .pre { white-space: normal; overflow-wrap: anywhere } }
@media (min-width: 110em) { .content { width: 60em !important } }  /* formulas in blocks are wide */
td:first-child:has(code) { min-width: 9rem }
td.text-left { min-width: 11rem }  /* lists of numbers */
td.text-right { white-space: nowrap }  /* numbers */
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: center; margin: 1rem 0 }
.pictures p { margin: 0 }
.pictures video { width: 360px; max-width: 100%; max-height: 240px; border-radius: .3rem; background: #8882 }
.content img[src$=".png"] { border-radius: .3rem }  /* their background stays white in dark mode */
</style>"""


def add_style(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Add the differences from the theme's style to a page's head."""
    context["metatags"] = context.get("metatags", "") + STYLE


def copy_files(app: Sphinx, failure: Exception | None) -> None:
    """Copy the videos of the gallery with their covers, and llms.txt with links to the pages of the site."""
    if failure or app.builder.format != "html":
        return
    root, output = Path(app.srcdir).parent, Path(app.outdir)
    (output / "videos").mkdir(exist_ok=True)
    for folder, pattern in (("benchmarks/results/videos", "*.mp4"), ("docs/pictures/gallery", "*.jpg")):
        for path in (root / folder).glob(pattern):
            shutil.copyfile(path, output / "videos" / path.name)
    text = (root / "llms.txt").read_text("utf-8")
    (output / "llms.txt").write_text(re.sub(r"\(docs/(.*)\.md\)", r"(\1.html)", text), "utf-8")


def setup(app: Sphinx) -> None:
    """Register the directives, the style and the files that Sphinx does not copy."""
    for directive in (Settings, Options, Members):
        app.add_directive(directive.__name__.lower(), directive)
    app.connect("html-page-context", add_style)
    app.connect("build-finished", copy_files)
