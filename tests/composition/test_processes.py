"""Training in several processes: each has its environments, and sums are taken over all processes."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from backends import BACKENDS
from rollouts import CONTINUOUS, act_rollout, small

from proximo.learner.schedules import hyper_at
from proximo.rollout.minibatches import minibatch_order

RANKS, N, T = 2, 3, 8


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def union_order(orders: list[np.ndarray]) -> np.ndarray:
    """The order of one process with all environments: its minibatch m joins the minibatches m of both ranks.

    Row t * N + n of rank r is row t * 2 N + r N + n of the union; padding (T N) becomes padding (T 2 N).
    """
    parts = []
    for rank, order in enumerate(orders):
        t, n = np.divmod(order, N)
        parts.append(np.where(order == T * N, T * N * RANKS, t * N * RANKS + rank * N + n))
    return np.concatenate(parts, axis=2).astype(np.int32)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_two_processes_update_as_one_on_the_union(backend, tmp_path):
    """Two processes with three environments each against one process with all six: parameters, Adam's moments,
    normalisers and metrics to 1e-10, in float64. Ranks have different reset rows, hence minibatches of different
    sizes. Every setting that needs a sum is on: moments of advantages, observations, rewards and values, the KL stop,
    the gradient norm."""
    settings = {
        "num_steps": T, "minibatch_size": None, "num_minibatches": 4, "normalize_observation": True,
        "normalize_reward": True, "target_kl": 0.5, "learning_rate": 1e-2, "ent_coef": 0.01,
        "normalize_value": True, "recompute_advantages": True, "bound_coef": 0.1,
    }  # fmt: skip
    config, union = small(**settings, num_envs=N), small(**settings, num_envs=N * RANKS)
    with backend.float64():
        whole = backend.learner(union, CONTINUOUS, dtype="float64")
        rollout = act_rollout(whole, seed=1)
        start = backend.learner(config, CONTINUOUS, dtype="float64").state()
        orders = [
            minibatch_order(rollout.valid[:, r * N : (r + 1) * N], 2, 4, np.random.default_rng(r)) for r in range(RANKS)
        ]
        metrics = whole.update(rollout, union_order(orders), hyper_at(union, 0))
        expected = whole.state()

    (tmp_path / "settings.json").write_text(json.dumps({"config": config.to_dict(), "spaces": CONTINUOUS.to_dict()}))
    names = ("reward", "terminated", "truncated", "valid", "start")
    facts = {name: getattr(rollout, name) for name in names}
    np.savez(tmp_path / "rollout.npz", obs=rollout.obs[""], action=rollout.action[""], **facts)
    np.savez(tmp_path / "state.npz", **start)
    for rank, order in enumerate(orders):
        np.save(tmp_path / f"order{rank}.npy", order)

    script, address = Path(__file__).with_name("rank.py"), free_address()
    processes = [
        subprocess.Popen([sys.executable, script, backend.name, str(rank), str(tmp_path), address])
        for rank in range(RANKS)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    for rank in range(RANKS):
        mine = dict(np.load(tmp_path / f"{backend.name}{rank}.npz"))
        for name, value in expected.items():
            if name in ("running_return", "carry"):
                value = value[rank * N : (rank + 1) * N]
            np.testing.assert_allclose(mine[name], value, rtol=1e-10, atol=1e-10, err_msg=name)
        reported = json.loads((tmp_path / f"{backend.name}{rank}.json").read_text())
        for name, value in metrics.items():
            assert reported[name] == pytest.approx(value, rel=1e-8, abs=1e-10), name
