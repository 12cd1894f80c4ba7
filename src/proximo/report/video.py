"""Episodes as MP4 videos: H.264 in yuv420p, which browsers and QuickTime play.

One environment acts and renders; its frames go to the encoder as they come, so that the length of an episode
costs no memory.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv

from proximo.config.settings import Config
from proximo.envs.env_slice import reports_episodes
from proximo.envs.make import EnvLike, explain_make_error, make_one, require_matching_spaces
from proximo.errors import Exited, UserError
from proximo.rollout.randomness import Purpose, environment_seeds
from proximo.rollout.rollout import Actor
from proximo.spaces.spaces import Spaces

MAX_FRAMES = 10_000  # over five minutes at 30 frames per second
DEFAULT_FPS = 30
RENDER_MODE = "rgb_array"
NEEDS_AV = "recording video needs PyAV: pip install 'proximo[video]'"
OPENGL_CALLERS = ("OpenGL", "glfw", "mujoco.egl", "mujoco.glfw", "mujoco.osmesa")
OPENGL_PACKAGES = "libegl1 libgl1"  # Debian and Ubuntu; Mesa renders on the CPU where there is no GPU

Show = Callable[[np.ndarray], None]
"""Takes a frame, uint8 [H, W, 3]."""


class Video(NamedTuple):
    """A recorded episode: its file, undiscounted sum of raw rewards, number of steps, and whether it ended.

    The file holds `length + 1` frames. Where `ended` is false the video stops at the limit of frames, and
    return and length are those of the steps it shows.
    """

    path: Path
    episode_return: float
    length: int
    ended: bool


def require_video(env: EnvLike, env_kwargs: Mapping[str, Any] | None = None) -> None:
    """Refuse what `record` would refuse, before a long run: PyAV is there, and the environment shows a frame.

    Raises:
        UserError: as `record`.
    """
    import_av()
    with rendering(env, env_kwargs or {}) as world:
        world.reset(seed=0)
        rendered(world)


def record(
    actor: Actor,
    config: Config,
    spaces: Spaces,
    env: EnvLike,
    path: str | Path,
    *,
    episodes: int = 1,
    seed: int = 0,
    env_kwargs: Mapping[str, Any] | None = None,
    max_frames: int = MAX_FRAMES,
) -> list[Video]:
    """Run episodes in one environment and write each as an MP4 file: a frame for the reset, one for each step.

    Environments with `reports_episodes` (see `proximo.rollout.collector.Collector`) decide what an episode is.

    A deterministic actor's episodes are those that `evaluate` runs in one environment with the same seed. A
    file appears when it is complete, and replaces one of its name only then.

    Args:
        actor: (observation [1, ...], start [1] bool) -> raw samples [1, ...], which `spaces.action.to_env` maps.
        env: an id, or a function that makes one environment. It is called with render_mode="rgb_array" where
            it takes that keyword, and must make an environment of that mode itself where it does not.
        path: the file, NAME.mp4. Several episodes are numbered from 0: NAME-0.mp4, NAME-1.mp4, …
        env_kwargs: keywords for the environment that go before those of `config.env_kwargs`.
        max_frames: an episode is broken off, and its video complete, with this many frames.

    Raises:
        UserError: PyAV or something that rendering needs is not installed, the environment cannot be made, does
            not render or has other spaces, or the file cannot be written.
    """
    import_av()
    paths = file_names(Path(path), episodes)
    if max_frames < 2:
        raise UserError(f"max_frames must be a whole number in [2, ∞), got {max_frames}")
    with rendering(env, {**config.env_kwargs, **(env_kwargs or {})}) as world:
        require_matching_spaces(Spaces.of(world.observation_space, world.action_space), spaces)
        fps = Fraction((world.metadata or {}).get("render_fps") or DEFAULT_FPS).limit_denominator(1001)
        seeds = [*environment_seeds(seed, 1, Purpose.EVALUATION), *[None] * (episodes - 1)]
        return [
            film(file, fps, partial(run_episode, world, actor, config, spaces, max_frames, episode_seed))
            for file, episode_seed in zip(paths, seeds, strict=True)
        ]


def film(path: Path, fps: Fraction, play: Callable[[Show], tuple[float, int, bool]]) -> Video:
    """Encode what `play` shows."""
    with encoder(path, fps) as show:
        outcome = play(show)
    return Video(path, *outcome)


def run_episode(
    world: gym.Env,
    actor: Actor,
    config: Config,
    spaces: Spaces,
    max_frames: int,
    seed: int | None,
    show: Show,
) -> tuple[float, int, bool]:
    """Run one episode and show every frame: (return, length, whether it ended)."""
    observation, _ = world.reset(seed=seed)
    show(rendered(world))
    episode_return, length, ended = 0.0, 0, False
    dtypes = {leaf.path: leaf.dtype for leaf in spaces.observation}
    reports = reports_episodes(world)
    while not ended and length + 1 < max_frames:
        obs = {path: value.astype(dtypes[path])[None] for path, value in spaces.read(observation)}
        raw = actor(obs, np.array([length == 0]))
        observation, reward, terminated, truncated, info = world.step(spaces.action.to_env(raw, config)[0])
        show(rendered(world))
        episode_return += float(reward)
        length += 1
        ended = bool(terminated or truncated)
        if ended and reports and "episode" not in info:  # a life is over, and the game is not
            observation, _ = world.reset()
            ended = False
        elif ended and reports:
            episode_return = float(info["episode"]["r"])
    return episode_return, length, ended


def file_names(path: Path, episodes: int) -> list[Path]:
    """The file of each episode: `path` itself, or numbered copies of it with as many digits as they need.

    Raises:
        UserError: no episodes, or a name that does not end in .mp4.
    """
    if episodes < 1:
        raise UserError(f"episodes must be a whole number in [1, ∞), got {episodes}")
    if path.suffix.lower() != ".mp4" or path.is_dir():
        raise UserError(f"a video is written to a file whose name ends in .mp4, not to {path}")
    if episodes == 1:
        return [path]
    digits = len(str(episodes - 1))
    return [path.with_stem(f"{path.stem}-{number:0{digits}}") for number in range(episodes)]


@contextmanager
def without_display() -> Iterator[None]:
    """Where Linux has no display, have MuJoCo render through EGL and pygame in memory.

    Sets MUJOCO_GL and SDL_VIDEODRIVER in this process's environment while the block lasts, each only if it is
    unset: both libraries take their choice from there alone, and their own goes to a display first.
    """
    chosen: dict[str, str] = {}
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        drivers = {"MUJOCO_GL": "egl", "SDL_VIDEODRIVER": "dummy"}
        chosen = {name: value for name, value in drivers.items() if name not in os.environ}
    os.environ.update(chosen)
    try:
        yield
    finally:
        # Left behind, MUJOCO_GL would fail every import of mujoco, also to train, where EGL is not installed.
        for name in chosen:
            os.environ.pop(name, None)


@contextmanager
def rendering(env: EnvLike, env_kwargs: Mapping[str, Any]) -> Iterator[gym.Env]:
    """One environment that renders to arrays, with a display or without, closed afterwards.

    Raises:
        UserError: it cannot be made, or renders in another mode or not at all.
        Exited: it called `sys.exit`.
    """
    with without_display():
        try:
            world = make_rendering_env(env, env_kwargs)
            try:
                yield world
            finally:
                with suppress(Exception, SystemExit):  # nobody is left to hear of it
                    world.close()
        except SystemExit as error:
            raise Exited(f"the environment called sys.exit({error.code!r}) while it was filmed") from error


def make_rendering_env(env: EnvLike, env_kwargs: Mapping[str, Any]) -> gym.Env:
    """Make one environment that renders to arrays.

    Raises:
        UserError: it cannot be made, or renders in another mode or not at all.
    """
    if isinstance(env, VectorEnv) or not (isinstance(env, str) or callable(env)):
        raise UserError("recording needs an environment id or a function that makes one environment")
    keywords = dict(env_kwargs)
    if isinstance(env, str) or takes_render_mode(env):
        keywords["render_mode"] = RENDER_MODE
    try:
        world = make_one(env, **keywords) if isinstance(env, str) else env(**keywords)
    except Exception as error:
        remedy = opengl_remedy(error)  # importing mujoco already looks for what MUJOCO_GL names
        if remedy is None and isinstance(error, (gym.error.Error, ImportError)):
            remedy = explain_make_error(str(env), error)
        if remedy is None and keywords and isinstance(error, TypeError) and "argument" in str(error):
            remedy = f"{env} does not accept the keywords {keywords}: {error}"
        if remedy is None:
            raise
        raise UserError(remedy) from error
    if world.render_mode != RENDER_MODE:
        mode = world.render_mode
        world.close()
        raise UserError(
            f"recording needs an environment with render_mode {RENDER_MODE!r}, but this one's is {mode!r}: give "
            "a function that takes render_mode and passes it on, such as "
            "lambda render_mode=None: gymnasium.make(…, render_mode=render_mode)"
        )
    return world


def takes_render_mode(factory: Callable[..., gym.Env]) -> bool:
    """Whether a function can be called with the keyword render_mode."""
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # not written in Python
        return False
    named = parameters.get("render_mode")
    if named is not None:
        return named.kind is not inspect.Parameter.POSITIONAL_ONLY
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def rendered(world: gym.Env) -> np.ndarray:
    """What the environment shows now, uint8 [H, W, 3].

    Raises:
        UserError: it shows something else, or rendering needs something that is not installed.
    """
    try:
        frame: Any = world.render()
    except Exception as error:
        remedy = opengl_remedy(error) or package_remedy(error)
        if remedy is None:
            raise
        raise UserError(remedy) from error
    if not (isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.shape[2:] == (3,)):
        given = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise UserError(
            f"the environment's render() gave {given}: in mode {RENDER_MODE} it must return an array, uint8 "
            "[height, width, 3]"
        )
    return frame


def opengl_remedy(error: Exception) -> str | None:
    """What to install where OpenGL is the cause of this error, which comes in as many forms as it has callers."""
    text = f"{type(error).__name__}: {error}"
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    named = "OpenGL" in text or "MUJOCO_GL" in text
    if not named and not any(module.startswith(OPENGL_CALLERS) for module in modules):
        return None
    return (
        f"rendering needs OpenGL, which fails here (MUJOCO_GL is {os.environ.get('MUJOCO_GL')!r}; {text}); "
        f"without a display, on Debian or Ubuntu: apt-get install --no-install-recommends {OPENGL_PACKAGES}, and "
        "leave MUJOCO_GL unset or set it to egl"
    )


def package_remedy(error: Exception) -> str | None:
    """What to install where a Python package is missing."""
    if not isinstance(error, (gym.error.DependencyNotInstalled, ImportError)):
        return None
    if "pygame" in str(error):
        return "rendering needs pygame: pip install 'proximo[video]'"
    return f"rendering needs a package that is not installed: {error}"


def import_av() -> Any:
    """The module of PyAV, which brings FFmpeg along.

    Raises:
        UserError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UserError(NEEDS_AV) from error
    return av


@contextmanager
def encoder(path: Path, fps: Fraction) -> Iterator[Show]:
    """Take frames, uint8 [H, W, 3], into a video that stands at `path` once the block is left without an error.

    Odd heights and widths, which yuv420p has not, grow by a repeated row or column.

    Raises:
        UserError: the file cannot be written, or frames differ in size.
    """
    av = import_av()
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The index goes to the front, so that a browser plays the file while it loads.
        container = av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"})
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    try:
        stream = container.add_stream("libx264", rate=fps)
    except (ValueError, LookupError, OSError) as error:
        container.close()
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"this PyAV has no encoder for H.264 ({error}): pip install --force-reinstall av"
        ) from error
    stream.pix_fmt = "yuv420p"
    shapes: set[tuple[int, ...]] = set()

    def show(frame: np.ndarray) -> None:
        padded = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
        if not shapes:
            stream.height, stream.width = padded.shape[:2]
        shapes.add(frame.shape)
        if len(shapes) > 1:
            raise UserError(f"frames of one video must not differ in size, but these do: {sorted(shapes)}")
        container.mux(stream.encode(av.VideoFrame.from_ndarray(padded, format="rgb24")))

    try:
        with container:
            yield show
            container.mux(stream.encode(None))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
