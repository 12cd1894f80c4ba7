"""Videos: decoded frames show the state of each step."""

import ctypes.util
import os
import sys

import av
import gymnasium as gym
import numpy as np
import pytest

from proximo.config.settings import Config
from proximo.errors import RunError, UserError
from proximo.ppo import PPO
from proximo.report.video import OPENGL_PACKAGES, record, require_video, without_display
from proximo.spaces.spaces import Spaces

EGL = [ctypes.util.find_library(name) for name in ("EGL", "GL")]
needs_egl = pytest.mark.skipif(
    sys.platform == "linux" and None in EGL, reason=f"rendering MuJoCo: apt-get install {OPENGL_PACKAGES}"
)


class Painter(gym.Env):
    """Renders step t of an episode in the gray 10 + 20 t with a black last row; episodes have 8 steps.

    Args:
        fail_at: Step that raises; -1 is the reset.
        paint: Changes the frame.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, render_mode=None, fail_at=None, paint=lambda frame: frame):
        self.render_mode, self.fail_at, self.paint = render_mode, fail_at, paint
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 12.5}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = -1
        return self._advance(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        return self._advance(), 0.5, False, self.t == 8, {}

    def _advance(self):
        if self.t == self.fail_at:
            raise ZeroDivisionError("division by zero")
        self.t += 1
        return np.array([self.t], np.float32)

    def render(self):
        frame = np.full((33, 47, 3), 10 + 20 * self.t, np.uint8)
        frame[-1] = 0
        return self.paint(frame)


SPACES = Spaces.of(Painter.observation_space, Painter.action_space)


def zeros(obs, start):
    return {"": np.zeros((1, 2), np.float32)}


def paint(path, actor=zeros, env=Painter, **options):
    return record(actor, Config(), SPACES, env, path, **options)


def decoded(path):
    """Frames [frames, H, W, 3], codec, pixel format and frame rate."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate


def test_every_frame_is_the_state_of_its_step(tmp_path):
    """All frames in order; odd sizes are padded by repeating the last row and column."""
    inputs = []

    def actor(obs, start):
        inputs.append((float(obs[""][0, 0]), bool(start[0])))
        return {"": np.full((1, 2), 7.0, np.float32)}  # out of bounds, so to_env clips it

    video = paint(tmp_path / "new" / "film.mp4", actor)
    assert inputs == [(t, t == 0) for t in range(8)]
    assert video == (tmp_path / "new" / "film.mp4", 4.0, 8, True)
    frames, codec, pixels, fps = decoded(video.path)
    assert (codec, pixels, fps) == ("h264", "yuv420p", 12.5)
    assert frames.shape == (9, 34, 48, 3)
    expected = np.broadcast_to(10 + 20 * np.arange(9)[:, None, None, None], (9, 24, 48, 3))
    np.testing.assert_allclose(frames[:, :24], expected, atol=4)
    assert frames[:, -2:].max() < 40, "the last row, twice"


def test_an_episode_without_end_stops_at_the_limit(tmp_path):
    video = paint(tmp_path / "film.mp4", max_frames=5)
    assert video == (tmp_path / "film.mp4", 2.0, 4, False)
    assert len(decoded(video.path)[0]) == 5


@pytest.mark.parametrize("fail_at", [-1, 0, 3])
def test_a_failed_recording_leaves_existing_files_unchanged(tmp_path, fail_at):
    """It leaves no new file, no temporary file, and an older video of the same name unchanged."""
    path = tmp_path / "film.mp4"
    for before in (None, b"older"):
        if before:
            path.write_bytes(before)
        with pytest.raises(RunError, match="the environment raised ZeroDivisionError"):
            paint(path, env=lambda render_mode: Painter(render_mode, fail_at))
        assert [file.name for file in tmp_path.iterdir()] == (["film.mp4"] if before else [])
    assert path.read_bytes() == b"older"
    paint(path)
    assert len(decoded(path)[0]) == 9


@needs_egl
@pytest.mark.parametrize(
    ("env", "env_kwargs", "size", "fps"),
    [
        ("CartPole-v1", {"max_episode_steps": 15}, (400, 600), 50),
        ("HalfCheetah-v5", {"max_episode_steps": 15, "width": 121, "height": 90}, (90, 122), 20),
    ],
)
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_video_shows_the_episode_that_evaluate_runs(tmp_path, env, env_kwargs, size, fps, deterministic):
    """The same seed gives the same return and length; frames change, and have the environment's size and rate."""
    with PPO(env, preset=None, num_envs=1, init_std=0.1, env_kwargs=env_kwargs) as agent:
        video = agent.record(tmp_path / "film.mp4", deterministic=deterministic, seed=5)
        expected = agent.evaluate(1, deterministic=deterministic, seed=5)
    assert video.episode_return == pytest.approx(expected.returns[0], rel=1e-6)
    assert video.length == expected.lengths[0]
    frames, *_, rate = decoded(video.path)
    assert frames.shape == (video.length + 1, *size, 3)
    assert rate == fps
    assert frames.mean() > 20
    assert np.ptp(frames.astype(int), axis=0).max() > 100, "something moved from dark to bright"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (lambda render_mode: Painter(render_mode, paint=lambda frame: None), r"render\(\) returned NoneType"),
        (lambda render_mode: Painter(render_mode, paint=lambda frame: frame / 255), r"returned float64 \(33, 47, 3"),
        (lambda: Painter(), "has render_mode None, but recording needs 'rgb_array'"),
        (lambda **options: gym.make("CartPole-v1", **options), "the policy was trained on"),
        (gym.make_vec("CartPole-v1", 2), "an environment id or a function"),
        ("CartPole-v7", "unknown environment"),
    ],
    ids=["none", "float", "mode", "spaces", "vector", "unknown"],
)  # fmt: skip
def test_environments_that_cannot_be_recorded_are_refused(tmp_path, env, message):
    with pytest.raises(UserError, match=message):
        paint(tmp_path / "film.mp4", env=env)
    assert not list(tmp_path.iterdir())


def test_frames_of_changing_size_are_refused(tmp_path):
    shrink = lambda render_mode: Painter(render_mode, paint=lambda frame: frame[: 33 - frame[0, 0, 0] // 30])
    with pytest.raises(UserError, match="must have the same size"):
        paint(tmp_path / "film.mp4", env=shrink)
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path, message in {"film.avi": "ends in .mp4", "file/film.mp4": "cannot be written"}.items():
        with pytest.raises(UserError, match=message):
            paint(tmp_path / path)


@pytest.mark.parametrize(
    ("module", "message"),
    [("av", r"PyAV: pip install 'proximo\[video\]'"), ("pygame", r"pygame: pip install 'proximo\[video\]'")],
)
def test_a_missing_package_is_named_before_a_run_begins(tmp_path, monkeypatch, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=message):
        require_video("CartPole-v1", Config())
    with pytest.raises(UserError, match=message), PPO("CartPole-v1", preset=None, num_envs=1) as agent:
        agent.record(tmp_path / "film.mp4")
    assert not list(tmp_path.iterdir())


# The destructor of Gymnasium's viewer fails if its constructor has failed.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <function OffScreenViewer")
def test_missing_opengl_gives_an_installation_hint(monkeypatch):
    """With an unknown MUJOCO_GL, MuJoCo fails as it does without OpenGL libraries."""
    monkeypatch.setenv("MUJOCO_GL", "none-such")
    with pytest.raises(UserError, match=rf"MUJOCO_GL is 'none-such'.*apt-get install .*{OPENGL_PACKAGES}"):
        require_video("HalfCheetah-v5", Config())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux renders through EGL")
@pytest.mark.parametrize(
    ("before", "chosen"),
    [
        ({}, {"MUJOCO_GL": "egl", "SDL_VIDEODRIVER": "dummy"}),
        ({"MUJOCO_GL": "osmesa"}, {"MUJOCO_GL": "osmesa", "SDL_VIDEODRIVER": "dummy"}),
        ({"DISPLAY": ":0"}, {}),
        ({"WAYLAND_DISPLAY": "wayland-0"}, {}),
    ],
)
def test_renderers_set_by_the_user_are_not_changed(monkeypatch, before, chosen):
    monkeypatch.setattr(os, "environ", dict(before))
    with without_display():
        assert os.environ == before | chosen
    assert os.environ == before


class Wrong(Painter):
    """Observes 7 in a space of three numbers."""

    observation_space = gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        return 2, super().reset(seed=seed)[1]

    def step(self, action):
        return 7, *super().step(action)[1:]


def test_observations_outside_their_space_are_refused(tmp_path):
    """As in training and evaluation."""
    with PPO(Wrong, num_envs=1, num_steps=4, minibatch_size=4) as agent, pytest.raises(UserError, match="is 7; expec"):
        agent.record(tmp_path / "film.mp4")


def test_functions_may_be_wrapped(tmp_path):
    """A function without `render_mode` gets none, also inside wrappers; one with it gets it."""
    limit = {"wrappers": ["gymnasium.wrappers:TimeLimit,max_episode_steps=5"], "num_envs": 1, "num_steps": 4}
    for env in (lambda: Painter("rgb_array"), Painter):
        with PPO(env, minibatch_size=4, **limit) as agent:
            assert agent.record(tmp_path / "film.mp4").length == 5
