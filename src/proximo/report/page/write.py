"""Write a report."""

import io
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from proximo.errors import UserError
from proximo.files import replace_atomically
from proximo.report.curves import Run, group_by_settings, read_runs
from proximo.report.figures import COLORS, GRID, INK, MUTED
from proximo.report.page.content import Content, read_content
from proximo.report.plot import CURVES, LABELS, draw, save
from proximo.version import __version__

REPORT = "report.html"
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)"}  # colours of a figure -> of the page


def write_report(run_dirs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write a report of runs; return its path.

    Args:
        output: an HTML file. Default: `report.html`, in the run folder if there is only one.

    Raises:
        UserError: a folder is no run, or the file cannot be written.
    """
    if isinstance(run_dirs, (str, Path)):
        run_dirs = [run_dirs]
    if output is not None and Path(output).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"output {output} is no HTML file. Use a file name that ends in .html.")
    path = Path(output or (Path(run_dirs[0]) / REPORT if len(run_dirs) == 1 else REPORT))
    return write_page(read_content(run_dirs, read_runs(run_dirs)), path)


def write_records(run_dirs: Sequence[str | Path], folder: str | Path) -> list[Path]:
    """Write `curves.png` and `report.html` of runs into a folder; return their paths."""
    runs, folder = read_runs(run_dirs), Path(folder)
    content = read_content(run_dirs, runs)
    figure = draw(group_by_settings(runs), names_in(runs))
    return [save(figure, folder / CURVES, is_in_run=True), write_page(content, folder / REPORT)]


def write_page(content: Content, path: Path) -> Path:
    """Fill the template."""
    import jinja2

    template = resources.files("proximo.report.page").joinpath("template.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    values = {**content._asdict(), "curves": curves_as_svg(content.curves), "colors": COLORS, "version": __version__}
    page = environment.from_string(template).render(values)
    try:
        with replace_atomically(path) as temporary:
            temporary.write_text(page, "utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}. Choose another file with --output.") from error
    return path


def names_in(runs: Sequence[Run]) -> list[str]:
    """The metrics to draw that have values."""
    return [name for name in LABELS if any(run.has(name) for run in runs)]


def curves_as_svg(groups: dict[str, list[Run]]) -> str:
    """The curves as an SVG element whose colours follow the page's."""
    import matplotlib

    names = names_in([run for members in groups.values() for run in members])
    if not names:
        return ""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "proximo", "font.family": "sans-serif"}):
        figure = draw(groups, names, has_heading=False)
        figure.patch.set_alpha(0)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(
        r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 role="img" aria-label="Learning curves">', svg, count=1
    )
    for color, variable in THEME.items():
        svg = svg.replace(color.lower(), variable)
    return svg
