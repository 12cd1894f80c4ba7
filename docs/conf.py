"""Sphinx's configuration: pages in Markdown, and tables of settings that come from the code."""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

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


class Settings(SphinxDirective):
    """Makes `{settings} GROUP` a table of that group's settings, and `{settings} aliases` one of other names."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Write the table as Markdown, which the page's own parser reads."""
        (what,) = self.arguments
        return self.parse_text_to_nodes(aliases() if what == "aliases" else settings(what))


def settings(group: str) -> str:
    """Every setting of a group: name, meaning, default, what it accepts, source."""
    rows = [
        (
            f"`{name}`",
            setting.meaning,
            f"`{str(setting.default).lower()}`",
            setting.expected,
            setting.source or "–",
        )
        for name, setting in SETTINGS.items()
        if setting.group == group
    ]
    if not rows:
        raise ValueError(f"there is no group of settings named {group!r}")
    return table(("setting", "meaning", "default", "accepts", "source"), rows)


def aliases() -> str:
    """Other libraries' names of settings."""
    names: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        names.setdefault(name, []).append(f"`{alias}`")
    rows = [(f"`{name}`", ", ".join(others)) for name, others in names.items()]
    return table(("setting", "also taken as"), rows)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


STYLE = """<style>
code.literal { white-space: nowrap }  /* a flag has hyphens, at which no line should break */
@media (min-width: 110em) { .content { width: 60em !important } }  /* formulas in blocks are wide */
</style>"""


def add_style(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Put what differs from the theme's style into a page's head."""
    context["metatags"] = context.get("metatags", "") + STYLE


def setup(app: Sphinx) -> None:
    """Declare what this file adds to Sphinx."""
    app.add_directive("settings", Settings)
    app.connect("html-page-context", add_style)
