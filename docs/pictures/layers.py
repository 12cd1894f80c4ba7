"""Draw the import layers of pyproject.toml as docs/pictures/layers.svg.

python docs/pictures/layers.py
"""

import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
WIDTH, ROW, GAP, MARGIN = 640, 40, 16, 10
BACKENDS = ("jax", "torch")


def layers() -> list[list[str]]:
    """Return the layers of the import contract from top to bottom, without the package name."""
    project = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text("utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    found = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[name.strip().removeprefix("proximo.") for name in layer.replace(":", "|").split("|")] for layer in found]


def draw(rows: list[list[str]]) -> str:
    """Return the diagram as SVG: one row of boxes per layer, with arrows downwards."""
    height = len(rows) * (ROW + GAP) - GAP + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        'font-family="monospace" font-size="15" text-anchor="middle">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for index, names in enumerate(rows):
        top = MARGIN + index * (ROW + GAP)
        box = (WIDTH - 2 * MARGIN - GAP * (len(names) - 1)) / len(names)
        for column, name in enumerate(names):
            left = MARGIN + column * (box + GAP)
            fill = "#dce9f7" if name in BACKENDS else "#f1f2f4"
            parts.append(
                f'<rect x="{left:.1f}" y="{top}" width="{box:.1f}" height="{ROW}" rx="5" fill="{fill}" '
                'stroke="#8a929c"/>'
            )
            parts.append(f'<text x="{left + box / 2:.1f}" y="{top + ROW / 2 + 5:.0f}">{name}</text>')
        if index:
            middle, tip = WIDTH / 2, top - 3
            parts.append(
                f'<path d="M{middle:.0f} {top - GAP + 1} V{tip} m-4 -5 l4 5 l4 -5" fill="none" stroke="#555"/>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (HERE / "layers.svg").write_text(draw(layers()), "utf-8")
