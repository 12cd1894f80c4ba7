"""What the value function and the policy depend on: inputs, regions of an image, and past observations.

An input is replaced by its value in another visited state, so that the network sees plausible numbers (permutation
importance, Breiman 2001), and the change of its outputs is measured.
"""

from typing import NamedTuple

import numpy as np

from proximo.report.analysis.episodes import Episodes, Examined, Play, examine
from proximo.report.analysis.view import Unavailable, View, number
from proximo.report.figures import COLORS, add_legend, make_figure, style_axes
from proximo.spaces.observations import Leaf, Obs
from proximo.spaces.spaces import Spaces
from proximo.spaces.trees import describe_path

STATES, ROUNDS = 500, 4  # visited states, and replacements of each input
MOST = 40  # inputs that are drawn
PATCHES, IMAGES = 14, 6  # patches along each axis of an image, and images
PAST, MOMENTS = 32, 64  # steps back, and moments at which the past is replaced


class Input(NamedTuple):
    """One number of an observation, or a whole image."""

    leaf: Leaf
    position: int | None  # in the flattened leaf; None for an image

    @property
    def name(self) -> str:
        """Name in tables and pictures."""
        path = describe_path(self.leaf.path) if self.leaf.path else "observation"
        return path if self.position is None else f"{path}[{self.position}]"


def inputs_of(spaces: Spaces) -> list[Input]:
    """Every number of the vectors and discrete values that the network reads, and every image."""
    found = []
    for leaf in spaces.observation:
        size = int(np.prod(leaf.shape, dtype=int))
        if leaf.kind == "image":
            found.append(Input(leaf, None))
        elif leaf.kind != "mask":
            found += [Input(leaf, index) for index in range(size)]
    return found


def replace_input(obs: Obs, of: Input, other: Obs) -> Obs:
    """Observations [B, ...] with one input taken from others [B, ...]."""
    path = of.leaf.path
    if of.position is None:
        return {**obs, path: other[path]}
    changed = obs[path].copy().reshape(len(obs[path]), -1)
    changed[:, of.position] = other[path].reshape(len(changed), -1)[:, of.position]
    return {**obs, path: changed.reshape(obs[path].shape)}


def policy_change(before: Examined, after: Examined) -> np.ndarray:
    """How far the policy moved at each of B steps, averaged over heads and dimensions: [B].

    The total variation of categorical policies, the change of the probability of bits, and the change of means in
    standard deviations.
    """
    changes = []
    for name, old in before.policy.items():
        new = after.policy[name]
        if name.endswith("probability"):
            is_categorical = bool(np.allclose(old.sum(axis=-1), 1.0, atol=1e-4))
            distance = np.abs(new - old)
            changes.append(0.5 * distance.sum(axis=-1) if is_categorical else distance.mean(axis=-1))
        elif name.endswith("mean"):
            std = before.policy[name.removesuffix("mean") + "std"]
            changes.append((np.abs(new - old) / np.maximum(std, 1e-8)).mean(axis=-1))
    return np.mean(changes, axis=0)


def measure_inputs(episodes: Episodes) -> tuple[list[Input], np.ndarray, np.ndarray]:
    """All inputs, and the mean changes of V and of the policy when each is replaced, [I] each."""
    rng = np.random.default_rng(0)
    count = min(STATES, len(episodes.value))
    rows = rng.choice(len(episodes.value), count, replace=False)
    obs = {path: value[rows] for path, value in episodes.obs.items()}
    before, inputs = episodes.examine(rows), inputs_of(episodes.spaces)
    value, policy = np.zeros(len(inputs)), np.zeros(len(inputs))
    for _ in range(ROUNDS):
        others = rng.permutation(count)
        other = {path: x[others] for path, x in obs.items()}
        for k, one in enumerate(inputs):
            after = episodes.examine(rows, replace_input(obs, one, other))
            value[k] += np.abs(after.value - before.value).mean() / ROUNDS
            policy[k] += policy_change(before, after).mean() / ROUNDS
    return inputs, value, policy


def view_inputs(inputs: list[Input], value: np.ndarray, policy: np.ndarray, spread: float) -> View:
    """The mean changes of V and policy when each input is replaced; `spread` is the standard deviation of V."""
    order = np.argsort(-value)
    names = [inputs[k].name for k in order]
    table = {"input": names, "value_change": value[order], "policy_change": policy[order]}
    shown = min(len(order), MOST)
    figure = make_figure(8.0, 1.2 + 0.22 * shown)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, numbers, color in zip(panels, ("V", "policy"), (value, policy), COLORS[:2], strict=True):
        style_axes(axes, f"Mean change of {'the policy' if name == 'policy' else name}")
        axes.barh(range(shown), numbers[order][:shown], color=color)
        axes.grid(visible=False, axis="y")
    panels[0].set_yticks(range(shown), names[:shown], fontsize=8, parse_math=False)
    panels[0].invert_yaxis()
    silent = int(((value < 0.01 * max(value.max(), 1e-30)) & (policy < 0.01 * max(policy.max(), 1e-30))).sum())
    by_policy = inputs[int(np.argmax(policy))].name
    verdict = (
        f"V depends most on {names[0]} (replacing it changes V by {number(float(value[order[0]]))}; V has standard "
        f"deviation {number(spread)}), the policy most on {by_policy}"
        + (f"; {silent} of {len(inputs)} inputs hardly matter for either" if silent else "")
        + "."
    )
    return View("inputs", "Sensitivity to each input", verdict, table, figure)


def view_saliency(episodes: Episodes) -> View:
    """The change of V and policy when a patch of an image is blurred, for the states of highest and lowest V.

    Perturbation saliency (Greydanus et al. 2018, arXiv:1711.00138).

    Raises:
        Unavailable: the policy sees no image.
    """
    leaf = next((leaf for leaf in episodes.spaces.observation if leaf.kind == "image"), None)
    if leaf is None:
        raise Unavailable("the policy sees no image")
    ranks = np.linspace(0.02, 0.98, IMAGES)
    rows = np.argsort(episodes.value, kind="stable")[(ranks * (len(episodes.value) - 1)).astype(int)]
    figure = make_figure(1.7 * IMAGES, 5.0)
    grid = figure.subplots(3, IMAGES)
    height, width = image_size(leaf)
    table: dict[str, list] = {"row": [], "value": [], "y": [], "x": [], "value_change": [], "policy_change": []}
    concentration = []
    for column, row in enumerate(rows):
        image = episodes.obs[leaf.path][row]
        blurred, masks = blur(image, leaf), patches(height, width)
        changed = np.stack([mix(image, blurred, mask, leaf) for mask in masks])
        obs = {path: np.repeat(value[row : row + 1], len(masks), axis=0) for path, value in episodes.obs.items()}
        repeated = np.full(len(masks), row)
        before = episodes.examine(repeated)
        after = episodes.examine(repeated, {**obs, leaf.path: changed})
        maps = np.abs(after.value - before.value), policy_change(before, after)
        shown = image if len(leaf.shape) == 2 else image[-1] if leaf.is_channels_first else image[..., -1]
        for axes, change, color in zip(grid[1:, column], maps, ("Reds", "Blues"), strict=True):
            axes.imshow(shown, cmap="gray")
            axes.imshow(
                change.reshape(PATCHES, PATCHES), cmap=color, alpha=0.6, extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                interpolation="bilinear",
            )  # fmt: skip
        grid[0, column].imshow(shown, cmap="gray")
        grid[0, column].set_title(f"V {number(float(episodes.value[row]))}", fontsize=9)
        concentration.append(float(np.sort(maps[0])[-len(masks) // 10 :].sum() / max(maps[0].sum(), 1e-30)))
        centres = [(y, x) for y in range(PATCHES) for x in range(PATCHES)]
        table["row"] += [int(row)] * len(masks)
        table["value"] += [float(episodes.value[row])] * len(masks)
        table["y"] += [y for y, _ in centres]
        table["x"] += [x for _, x in centres]
        table["value_change"] += maps[0].tolist()
        table["policy_change"] += maps[1].tolist()
    for axes, name in zip(grid[:, 0], ("seen", "V", "policy"), strict=True):
        axes.set_ylabel(name, fontsize=9)
    for axes in grid.ravel():
        axes.set_xticks([])
        axes.set_yticks([])
    share = float(np.mean(concentration))
    verdict = (
        f"A tenth of the image accounts for {100 * share:.0f} % of the change of V when patches are blurred "
        f"(10 % would mean that no region matters more); the largest change is {number(max(table['value_change']))}."
    )
    return View("saliency", "Regions of the image that matter", verdict, table, figure, {"share_of_a_tenth": share})


def image_size(leaf: Leaf) -> tuple[int, int]:
    """Height and width of an image."""
    shape = leaf.shape[1:] if leaf.is_channels_first else leaf.shape[:2]
    return int(shape[0]), int(shape[1])


def blur(image: np.ndarray, leaf: Leaf) -> np.ndarray:
    """An image blurred with a standard deviation of a fifteenth of its height."""
    from scipy.ndimage import gaussian_filter

    size = image_size(leaf)[0] / 15
    sigma = (size, size) if image.ndim == 2 else (0, size, size) if leaf.is_channels_first else (size, size, 0)
    return gaussian_filter(image.astype(np.float64), sigma)


def patches(height: int, width: int) -> np.ndarray:
    """Soft round masks on a grid, [P², H, W] in [0, 1]."""
    y, x = np.mgrid[:height, :width]
    middles = (np.arange(PATCHES) + 0.5) / PATCHES
    centres = [(height * a, width * b) for a in middles for b in middles]
    spread = 2.0 * (0.7 * height / PATCHES) ** 2
    return np.stack([np.exp(-((y - a) ** 2 + (x - b) ** 2) / spread) for a, b in centres])


def mix(image: np.ndarray, blurred: np.ndarray, mask: np.ndarray, leaf: Leaf) -> np.ndarray:
    """The image, blurred where the mask [H, W] is 1."""
    if image.ndim == 3:
        mask = mask[None] if leaf.is_channels_first else mask[..., None]
    mixed = image + mask * (blurred - image)
    return (np.round(mixed) if image.dtype.kind in "iu" else mixed).astype(image.dtype)


def view_past(episodes: Episodes) -> View:
    """The change of V and policy when the observation of k steps ago is replaced, for policies with memory.

    Raises:
        Unavailable: the policy has no memory, or no episode is long enough.
    """
    if not episodes.learner.spec.network.carry_size:
        raise Unavailable("the policy has no memory")
    depth = min(PAST, max(map(len, episodes.plays)) // 2)
    chosen = [(play, t) for play in episodes.plays for t in range(depth, len(play))]
    if depth < 1 or not chosen:
        raise Unavailable("episodes are too short to look back")
    rng = np.random.default_rng(0)
    moments = [chosen[k] for k in rng.choice(len(chosen), min(MOMENTS, len(chosen)), replace=False)]
    others = rng.integers(len(episodes.value), size=len(moments))
    before = replay_past(episodes, moments, depth, None, others)
    value, policy = [], []
    for back in range(depth + 1):
        after = replay_past(episodes, moments, depth, back, others)
        value.append(float(np.abs(after.value - before.value).mean()))
        policy.append(float(policy_change(before, after).mean()))
    figure = make_figure(6.4, 3.8)
    axes = style_axes(figure.subplots(), "", "steps ago", "share of the change by the current observation")
    shares = [np.array(x) / max(x[0], 1e-30) for x in (value, policy)]
    for share, name, color in zip(shares, ("V", "policy"), COLORS, strict=False):
        axes.plot(share, "o-", markersize=3, color=color, label=name)
    add_legend(axes)
    reach = max((k for k in range(depth + 1) if max(shares[0][k], shares[1][k]) > 0.05), default=0)
    most = int(np.argmax(policy[1:])) + 1
    verdict = (
        f"Observations of up to {reach} steps ago matter (more than 5 % of the current one's effect, of {depth} steps "
        f"examined); of the past, the policy depends most on the one {most} steps ago "
        f"({100 * shares[1][most]:.0f} % of the current one's effect)."
    )
    table = {"steps_ago": list(range(depth + 1)), "value_change": value, "policy_change": policy}
    return View("past", "Sensitivity to past observations", verdict, table, figure, {"reach": float(reach)})


def replay_past(
    episodes: Episodes, moments: list[tuple[Play, int]], depth: int, back: int | None, others: np.ndarray
) -> Examined:
    """Policy and critic at some moments, after the last `depth` steps were repeated from their recurrent states.

    Args:
        back: the observation of that many steps before is replaced by that of the steps `others`; None for none.
    """
    carry = np.stack([play.carry[t - depth] for play, t in moments])
    start = np.array([t == depth for _, t in moments])
    found = None
    for k in range(depth, -1, -1):
        obs = {path: np.stack([play.obs[path][t - k] for play, t in moments]) for path in moments[0][0].obs}
        if k == back:
            masks = {leaf.path for leaf in episodes.spaces.observation if leaf.kind == "mask"}
            obs = {path: x if path in masks else episodes.obs[path][others] for path, x in obs.items()}
        action = {path: np.stack([play.action[path][t - k] for play, t in moments]) for path in moments[0][0].action}
        found, carry = examine(episodes.learner, episodes.factor, obs, action, start, carry)
        start = np.zeros(len(moments), bool)
    assert found is not None
    return found
