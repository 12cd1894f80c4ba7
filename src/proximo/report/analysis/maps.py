"""V, the most probable action and its spread over two observation dimensions."""

from collections.abc import Sequence

import numpy as np

from proximo.errors import UserError, suggest
from proximo.report.analysis.episodes import Episodes
from proximo.report.analysis.sensitivity import Input
from proximo.report.analysis.view import Unavailable, View, number, percent
from proximo.report.figures import INK, make_figure, style_axes
from proximo.spaces.trees import leaves

GRID = 48  # points along each dimension
RANGE = (0.01, 0.99)  # quantiles of the visited values that the map spans
CONTOURS = np.geomspace(0.05, 0.8, 4)  # of the density of visits, relative to its maximum
COLOR_MAPS = ("viridis", "coolwarm", "magma")  # of V, action and spread
NEAR = 2.5  # cells to the nearest visited state, beyond which a point is left blank


def is_number(one: Input) -> bool:
    """Whether an input is a number of a vector."""
    return one.position is not None and one.leaf.kind == "vector"


def find_dimensions(inputs: Sequence[Input], names: Sequence[str]) -> tuple[Input, Input]:
    """Two inputs by their names or indices.

    Raises:
        UserError: a name is unknown, or no number of a vector, or there are not two.
    """
    names = [str(name).strip() for name in names]
    known = {name: one for k, one in enumerate(inputs) if is_number(one) for name in (one.name, str(k))}
    if not known:
        raise UserError("a map needs numbers of a vector, and the policy sees images or discrete values. Omit `dims`.")
    for name in names:
        if name not in known:
            available = ", ".join([one.name for one in inputs if is_number(one)][:20])
            raise UserError(f"there is no dimension {name!r}{suggest(name, known)} Available: {available}")
    if len({known[name] for name in names}) != 2 or len(names) != 2:
        raise UserError(f"`dims` is {', '.join(names)}; expected two different dimensions.")
    return known[names[0]], known[names[1]]


def choose_dimensions(inputs: Sequence[Input], value: np.ndarray, policy: np.ndarray) -> tuple[Input, Input]:
    """The two numbers of vectors with the largest effect on V and policy, [I] each; Unavailable without two."""
    effect = value / max(value.max(), 1e-30) + policy / max(policy.max(), 1e-30)
    ranked = [inputs[k] for k in np.argsort(-effect, kind="stable") if is_number(inputs[k])]
    if len(ranked) < 2:
        raise Unavailable("a map needs two numbers of a vector, and the policy sees images or discrete values")
    return ranked[0], ranked[1]


def column(episodes: Episodes, of: Input) -> np.ndarray:
    """Values of a dimension at every step, [B]."""
    return episodes.obs[of.leaf.path].reshape(len(episodes.value), -1)[:, of.position].astype(np.float64)


def view_map(episodes: Episodes, pair: tuple[Input, Input]) -> View:
    """V, the mode of the first action dimension and the policy's spread on a grid of two dimensions.

    The other dimensions, the mask and the memory are those of the nearest visited state.
    """
    columns = [column(episodes, one) for one in pair]
    low, high = (np.array([np.quantile(x, q) for x in columns]) for q in RANGE)
    if (high <= low).any():
        raise Unavailable(f"{pair[int(np.argmin(high - low))].name} does not vary in these episodes")
    axis = [np.linspace(a, b, GRID) for a, b in zip(low, high, strict=True)]
    points = np.stack(np.meshgrid(*axis, indexing="ij"), axis=-1).reshape(-1, 2)
    distance, rows = nearest(np.stack(columns, axis=-1), points, (high - low) / (GRID - 1))
    obs = {path: value[rows].copy() for path, value in episodes.obs.items()}
    for one, values in zip(pair, points.T, strict=True):
        flat = obs[one.leaf.path].reshape(len(rows), -1)
        flat[:, one.position] = values
        obs[one.leaf.path] = flat.reshape(obs[one.leaf.path].shape)
    found = episodes.examine(rows, obs)
    mode, label = most_probable(episodes, rows, obs)
    spread, spread_label = spread_of(found.policy, found.entropy)
    blank = distance > NEAR
    panels = {"V": found.value, label: mode, spread_label: spread}
    density = smooth(np.histogram2d(*columns, bins=GRID, range=list(zip(low, high, strict=True)))[0])
    figure = make_figure(11.0, 3.5)
    for axes, (name, values), color in zip(figure.subplots(1, 3), panels.items(), COLOR_MAPS, strict=True):
        style_axes(axes, name, pair[0].name, pair[1].name)
        axes.grid(visible=False)
        shown = np.where(blank, np.nan, values).reshape(GRID, GRID).T
        image = axes.pcolormesh(*axis, shown, cmap=color, shading="nearest", rasterized=True)
        figure.colorbar(image, ax=axes).ax.tick_params(labelsize=8)
        if density.max() > 0:
            axes.contour(*axis, density.T, levels=CONTOURS * density.max(), colors=INK, linewidths=0.5, alpha=0.5)
    table = {pair[0].name: points[:, 0], pair[1].name: points[:, 1], **panels, "near_visited_state": ~blank}
    inside = found.value[~blank]
    top, bottom = (points[~blank][pick(inside)] for pick in (np.argmax, np.argmin))
    verdict = (
        f"Over {pair[0].name} and {pair[1].name}, V is highest ({number(float(inside.max()))}) at "
        f"({number(top[0])}, {number(top[1])}) and lowest ({number(float(inside.min()))}) at ({number(bottom[0])}, "
        f"{number(bottom[1])}); {percent(float(blank.mean()))} of the map is blank because no state was visited there."
    )
    return View("map", "Value function and policy over two dimensions", verdict, table, figure)


def nearest(states: np.ndarray, points: np.ndarray, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance in cells and index of the state nearest to each point, [P] each."""
    from scipy.spatial import KDTree

    distance, index = KDTree(states / cell).query(points / cell)
    return np.asarray(distance), np.asarray(index)


def smooth(density: np.ndarray) -> np.ndarray:
    """A density on the grid, blurred so that its contours can be read."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(density, 1.5)


def most_probable(episodes: Episodes, rows: np.ndarray, obs: dict[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """The first dimension of the policy's mode as the environment receives it, [B], and its name."""
    raw, _ = episodes.learner.act(obs, episodes.carry[rows], None)
    path, action = next(iter(leaves(episodes.spaces.action.to_env(raw, episodes.config))))
    flat = np.asarray(action, np.float64).reshape(len(rows), -1)
    name = f"action {path}".strip() if path else "action"
    return flat[:, 0], f"most probable {name}{'[0]' if flat.shape[1] > 1 else ''}"


def spread_of(policy: dict[str, np.ndarray], entropy: np.ndarray) -> tuple[np.ndarray, str]:
    """The standard deviation of the first continuous dimension, or the entropy, [B], and its name."""
    stds = [value for name, value in policy.items() if name.endswith("std")]
    return (stds[0].reshape(len(entropy), -1)[:, 0], "standard deviation σ") if stds else (entropy, "entropy")
