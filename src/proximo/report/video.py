"""Record episodes as MP4 videos: H.264 in yuv420p, which browsers and QuickTime play.

Frames are encoded as they are rendered, so that memory does not grow with the length of an episode.
"""

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv

from proximo.config.settings import Config
from proximo.envs.env_slice import read_report, reports_episodes
from proximo.envs.make import EnvLike, explain_make_error, make_one, name_of, require_matching_spaces
from proximo.envs.wrappers import unwrapped, with_wrappers
from proximo.errors import Exited, RunError, UserError
from proximo.files import replace_atomically
from proximo.rollout.jax_env import is_jax_env
from proximo.rollout.randomness import Purpose, environment_seeds
from proximo.rollout.returned import reset, unpack_step
from proximo.rollout.rollout import Actor
from proximo.spaces.spaces import Spaces
from proximo.spaces.trees import select

MAX_FRAMES = 10_000  # over five minutes at 30 frames per second
DEFAULT_FPS = 30
RENDER_MODE = "rgb_array"
OPENGL_CALLERS = ("OpenGL", "glfw", "mujoco.egl", "mujoco.glfw", "mujoco.osmesa")
OPENGL_PACKAGES = "libegl1 libgl1"  # of Debian and Ubuntu; their Mesa renders on the CPU if there is no GPU


class Video(NamedTuple):
    """A recorded episode."""

    path: Path  # of `length + 1` frames
    episode_return: float  # undiscounted sum of raw rewards
    length: int  # steps
    ended: bool  # False if recording stopped at the frame limit


def require_video(env: EnvLike, config: Config) -> None:
    """Raise `UserError` as `record` would: PyAV must be installed, and the environment must render a frame."""
    import_av()
    with open_rendering_env(env, config) as rendering_env:
        rendering_env.reset(seed=0)
        render_frame(rendering_env)


def record(
    actor: Actor,
    config: Config,
    spaces: Spaces,
    env: EnvLike,
    path: str | Path,
    *,
    seed: int = 0,
    max_frames: int = MAX_FRAMES,
    on_progress: Callable[[str], object] = lambda text: None,
) -> Video:
    """Run an episode and write it to an MP4 file: a frame for the reset and for each step.

    With a deterministic actor, the episode is that of `evaluate` in one environment with the same seed. For
    environments with `reports_episodes` (see `proximo.rollout.collector.Collector`), an episode is a whole game.
    The file is written atomically.

    Args:
        actor: maps observation [1, ...] and start [1] bool to raw samples [1, ...] for `spaces.action.to_env`.
        env: an id, or a function that makes one environment. A function is called with render_mode="rgb_array" if it
            has that parameter; otherwise its environment must already use that mode.
        config: its `env_kwargs` and `wrappers` apply to the environment; `env_timeout` does not.
        max_frames: recording stops after this many frames.
        on_progress: called with a description of the progress, before every frame.

    Raises:
        UserError: PyAV or a rendering dependency is not installed, the environment cannot be made, does not render or
            has other spaces, or the file cannot be written.
    """
    import_av()
    path = Path(path)
    if path.suffix.lower() != ".mp4" or path.is_dir():
        raise UserError(f"{path} is not a video file. Use a file name that ends in .mp4.")
    if max_frames < 2:
        raise UserError(f"max_frames must be a whole number in [2, ∞), got {max_frames}")
    dtypes = {leaf.path: leaf.dtype for leaf in spaces.observation}
    with open_rendering_env(env, config) as rendering_env:
        given = (rendering_env.observation_space, rendering_env.action_space, config.action_bins)
        require_matching_spaces(Spaces.of(*given), spaces)
        reports = reports_episodes(rendering_env)
        fps = (rendering_env.metadata or {}).get("render_fps") or DEFAULT_FPS
        with open_encoder(path, Fraction(fps).limit_denominator(1001)) as write_frame:
            observation, _ = call(reset, rendering_env, environment_seeds(seed, 1, Purpose.EVALUATION)[0])
            write_frame(call(render_frame, rendering_env))
            episode_return, length, ended = 0.0, 0, False
            while not ended and length + 1 < max_frames:
                obs = {name: value.astype(dtypes[name])[None] for name, value in spaces.read(observation)}
                spaces.check_values(obs)
                action = select(spaces.action.to_env(actor(obs, np.array([length == 0])), config), 0)
                on_progress(f"recording: frame {length + 2:,} of at most {max_frames:,}")
                observation, reward, terminated, truncated, info = unpack_step(call(rendering_env.step, action))
                write_frame(call(render_frame, rendering_env))
                episode_return += reward
                length += 1
                ended = terminated or truncated
                if ended and reports:
                    report = read_report(rendering_env, info)
                    episode_return = report[0] if report else episode_return
                    if not report:  # a life was lost, but the game continues
                        observation, _ = reset(rendering_env)
                        ended = False
    return Video(path, episode_return, length, ended)


@contextmanager
def without_display() -> Iterator[None]:
    """On Linux without a display, make MuJoCo render through EGL and pygame in memory.

    Sets the environment variables MUJOCO_GL and SDL_VIDEODRIVER, if unset, for the duration of the block. The
    libraries have no other setting, and use a display by default.
    """
    added: dict[str, str] = {}
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        drivers = {"MUJOCO_GL": "egl", "SDL_VIDEODRIVER": "dummy"}
        added = {name: value for name, value in drivers.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        # A remaining MUJOCO_GL=egl would make every later import of mujoco fail if EGL is not installed.
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def open_rendering_env(env: EnvLike, config: Config) -> Iterator[gym.Env]:
    """Make one environment that renders to arrays, with its wrappers, with or without a display; close it afterwards.

    Raises `UserError` if that fails, and `Exited` if the environment calls `sys.exit`.
    """
    with without_display():
        try:
            rendering_env = make_rendering_env(with_wrappers(env, config.wrappers), config.env_kwargs)
            try:
                yield rendering_env
            finally:
                with suppress(Exception, SystemExit):  # the recording is complete
                    rendering_env.close()
        except SystemExit as error:
            raise Exited(f"the environment called sys.exit({error.code!r}) during a recording") from error


def call(method: Callable[..., Any], *arguments: Any) -> Any:
    """Call a method of an environment; raise RunError for what it raises."""
    try:
        return method(*arguments)
    except (UserError, RunError):
        raise
    except Exception as error:
        name = type(error).__name__
        raise RunError(f"the environment raised {name} during a recording: {error}") from error


def make_rendering_env(env: EnvLike, env_kwargs: Mapping[str, Any]) -> gym.Env:
    """Make one environment that renders to arrays; raise `UserError` if it cannot be made or does not."""
    factory: Any = env
    inner: Any = unwrapped(env)
    kwargs = dict(env_kwargs)
    is_made_here = isinstance(inner, str) or is_jax_env(inner)
    if isinstance(inner, VectorEnv) or not (is_made_here or callable(inner)):
        raise UserError("recording needs an environment id or a function that makes one environment")
    maker: Any = make_one if is_made_here else inner
    with suppress(TypeError, ValueError):  # no such parameter, or no signature because it is not written in Python
        inspect.signature(maker).bind_partial(render_mode=RENDER_MODE)
        kwargs["render_mode"] = RENDER_MODE
    try:
        with explain_opengl():  # `import mujoco` loads the library that MUJOCO_GL selects
            rendering_env = make_one(factory, **kwargs)
    except (gym.error.Error, ImportError) as error:
        raise UserError(explain_make_error(name_of(env), error)) from error
    except TypeError as error:
        if not kwargs or "argument" not in str(error):
            raise
        raise UserError(f"{name_of(env)} does not accept the keywords {kwargs}: {error}") from error
    if (mode := rendering_env.render_mode) != RENDER_MODE:
        rendering_env.close()
        raise UserError(
            f"the environment has render_mode {mode!r}, but recording needs {RENDER_MODE!r}. Pass a function that "
            "forwards it, such as lambda render_mode=None: gymnasium.make(…, render_mode=render_mode)"
        )
    return rendering_env


def render_frame(env: gym.Env) -> np.ndarray:
    """Render the current state, uint8 [H, W, 3]; raise `UserError` for anything else, or if a dependency is missing."""
    try:
        with explain_opengl():
            frame: Any = env.render()
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        if "pygame" in str(error):
            raise UserError("rendering needs pygame: pip install 'proximo[video]'") from error
        raise UserError(f"rendering needs a package that is not installed: {error}") from error
    if not (isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.shape[2:] == (3,)):
        actual = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise UserError(
            f"the environment's render() returned {actual}, expected a uint8 array [height, width, 3] in mode "
            f"{RENDER_MODE}"
        )
    return frame


@contextmanager
def explain_opengl() -> Iterator[None]:
    """Replace an error that OpenGL caused by a `UserError` with an installation hint."""
    try:
        yield
    except Exception as error:  # callers of OpenGL raise many types
        text = f"{type(error).__name__}: {error}"
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        is_named = "OpenGL" in text or "MUJOCO_GL" in text
        if not is_named and not any(module.startswith(OPENGL_CALLERS) for module in modules):
            raise
        raise UserError(
            f"rendering with OpenGL failed (MUJOCO_GL is {os.environ.get('MUJOCO_GL')!r}; {text}). Without a display, "
            f"on Debian or Ubuntu: apt-get install --no-install-recommends {OPENGL_PACKAGES}, and leave MUJOCO_GL "
            "unset or set it to egl"
        ) from error


def import_av() -> Any:
    """Import and return PyAV, which includes FFmpeg; raise `UserError` if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError("recording video needs PyAV: pip install 'proximo[video]'") from error
    return av


@contextmanager
def open_encoder(path: Path, fps: Fraction) -> Iterator[Callable[[np.ndarray], None]]:
    """Encode frames, uint8 [H, W, 3], to a video that appears at `path` if the block completes without an error.

    The last row or column of odd heights and widths is repeated, because yuv420p needs even ones.
    """
    av = import_av()
    with replace_atomically(path) as temporary:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # faststart moves the index to the front, so that browsers can play the file while loading it.
            container = av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"})
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}") from error
        with container:
            try:
                stream = container.add_stream("libx264", rate=fps)
            except (ValueError, LookupError, OSError) as error:
                raise UserError(
                    f"the installed PyAV has no H.264 encoder ({error}). Run: pip install --force-reinstall av"
                ) from error
            stream.pix_fmt = "yuv420p"
            shapes: set[tuple[int, ...]] = set()

            def write_frame(frame: np.ndarray) -> None:
                padded = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
                if not shapes:
                    stream.height, stream.width = padded.shape[:2]
                shapes.add(frame.shape)
                if len(shapes) > 1:
                    raise UserError(
                        f"frames have sizes {sorted(shapes)}, but all frames of a video must have the same size"
                    )
                container.mux(stream.encode(av.VideoFrame.from_ndarray(padded, format="rgb24")))

            yield write_frame
            container.mux(stream.encode(None))
