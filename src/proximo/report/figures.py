"""The style of all figures: colours, axes and legends. Figures are made without pyplot, which has global state."""

from collections.abc import Sequence
from typing import Any

# Okabe and Ito's colours, which people with colour blindness can distinguish (jfly.uni-koeln.de/color).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
INK, MUTED, GRID = "#222222", "#666666", "#DDDDDD"
DPI = 130


def make_figure(width: float, height: float) -> Any:
    """A matplotlib figure of this size in inches, whose axes do not overlap."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def style_axes(axes: Any, title: str = "", x: str = "", y: str = "") -> Any:
    """Set title and labels, literally; return the axes."""
    axes.set_title(title, fontsize=10, loc="left", color=INK, parse_math=False)
    axes.set_xlabel(x, fontsize=9, color=MUTED, parse_math=False)
    axes.set_ylabel(y, fontsize=9, color=MUTED, parse_math=False)
    axes.tick_params(labelsize=8, colors=MUTED)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    return axes


def show_image(axes: Any, image: Any, title: str = "") -> None:
    """Show an image [H, W] or [H, W, 3] without ticks."""
    axes.imshow(image, cmap=None if image.ndim == 3 else "gray")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=8, color=INK, parse_math=False)


def add_legend(axes: Any, labels: Sequence[str] = ()) -> None:
    """Add a legend without a frame where there is something to distinguish."""
    if len(axes.get_legend_handles_labels()[1]) > 1:
        legend = axes.legend(fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
