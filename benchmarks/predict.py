"""Time `PPO.predict` of one observation beside the bare network: a 64 × 64 MLP in NumPy.

python benchmarks/predict.py

Both are timed alternately in one process, and the fastest of several repetitions counts.
"""

import timeit
from collections.abc import Callable
from functools import partial

import numpy as np

from proximo.machine import single_blas_thread
from proximo.ppo import PPO

REPEATS, CALLS, LIMIT = 3000, 20, 3.0  # short repetitions, some of which no other process disturbs
KINDS = {"discrete actions": "CartPole-v1", "continuous actions": "Pendulum-v1"}


def bare_network(agent: PPO) -> Callable[[np.ndarray], np.ndarray]:
    """The forward pass of the policy network, written by hand."""
    state = agent.learner.state()
    names = ("actor.0", "actor.1", "actor.head")
    (a, b), (c, d), (e, f) = ([state[f"params/{name}.{part}"] for part in ("weight", "bias")] for name in names)
    return lambda x: np.tanh(np.tanh(x @ a + b) @ c + d) @ e + f


def measure(env_id: str) -> tuple[float, float]:
    """Microseconds of one `predict`, and of one pass of the bare network."""
    with PPO(env_id, preset=None, hidden_sizes=(64, 64)) as agent, single_blas_thread():
        size = agent.spaces.observation[0].shape[0]
        observation = np.random.default_rng(0).standard_normal(size).astype(np.float32)
        network, row = bare_network(agent), observation[None]
        agent.predict(observation)
        predict, bare = partial(agent.predict, observation), partial(network, row)
        pairs = [[timeit.timeit(function, number=CALLS) for function in (predict, bare)] for _ in range(REPEATS)]
    fastest, bare_fastest = (1e6 * min(times) / CALLS for times in zip(*pairs, strict=True))
    return fastest, bare_fastest


if __name__ == "__main__":
    for kind, env_id in KINDS.items():
        predict, bare = measure(env_id)
        ratio = predict / bare
        verdict = "below" if ratio < LIMIT else "not below"
        print(f"{kind}: predict {predict:.1f} µs, bare network {bare:.1f} µs, ratio {ratio:.2f}, {verdict} {LIMIT:g}")
