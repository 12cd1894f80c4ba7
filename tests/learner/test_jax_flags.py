"""Switches of JAX that users set to debug their own network or environment."""

import json
import os
import subprocess
import sys

import pytest

FLAGS = {
    "JAX_DEBUG_NANS": "1", "JAX_DEBUG_INFS": "1", "JAX_ENABLE_X64": "1", "JAX_ENABLE_CHECKS": "1",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
}  # fmt: skip
PROGRAM = """
import json
from proximo import PPO
from proximo.jax import custom_network

network = custom_network(policy=(lambda key, x: {"w": 0.0 * x.T}, lambda params, x: x @ params["w"].repeat(2, 1)))
rows = []
for env, given in (("CartPole-v1", {"network": network, "threads": 1}), ("CartPole-v1", {}), ("Pendulum-v1", {}),
                   ("Pendulum-v1", {"memory": "gru"})):
    agent = PPO(env, preset=None, num_envs=2, num_steps=64, minibatch_size=64, backend="jax", seed=1, device="cpu",
                normalize_observation=True, normalize_reward=True, lr_schedule="adaptive", target_kl=0.05, **given)
    for row in agent.iterate(256):
        rows.append({name: x for name, x in row.items() if name.startswith(("losses", "update"))})
    assert agent.learner.threads == 1
    assert {str(x.dtype) for x in agent.learner.state().values()} == {"float32", "int32"}
print(json.dumps(rows))
"""


def test_switches_of_jax_change_no_run():
    """All of them together: no NaN stands for a missing value, no type depends on 64 bits, every shape is allowed.

    The custom network comes first: JAX must not start with all cores while the network is created.
    """
    runs = []
    for flags in ({}, FLAGS):
        command = [sys.executable, "-W", "error", "-c", PROGRAM]
        run = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-2000:]
        runs.append(json.loads(run.stdout))
    assert len(runs[0]) == len(runs[1]) == 8
    for plain, flagged in zip(*runs, strict=True):
        assert flagged == pytest.approx(plain, rel=1e-3, abs=1e-5)
