"""One of two processes that train together: `python rank.py BACKEND RANK FOLDER ADDRESS`.

Read the rollout of all environments from FOLDER, keep the columns of this rank, update with sums over both processes,
and write the state.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np

from proximo.config.names import from_mapping
from proximo.learner.schedules import Hyper, hyper_at
from proximo.rollout.rollout import Rollout
from proximo.spaces.spaces import Spaces

RANKS = 2


def rank_share(union: Rollout, rank: int) -> Rollout:
    """The columns of this rank's environments."""
    count = union.num_envs // RANKS
    columns = slice(rank * count, (rank + 1) * count)
    share = Rollout(union.spaces, union.num_steps, count)
    for mine, whole in ((share.obs, union.obs), (share.action, union.action)):
        for path, value in whole.items():
            mine[path][:] = value[:, columns]
    for name in ("reward", "terminated", "truncated", "valid", "start"):
        getattr(share, name)[:] = getattr(union, name)[:, columns]
    return share


def update_torch(config, spaces, rollout, order, state, rank, address):
    import torch
    import torch.distributed as distributed

    from proximo.torch.learner import Learner

    distributed.init_process_group("gloo", init_method=f"tcp://{address}", rank=rank, world_size=RANKS)

    def reduce(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        distributed.all_reduce(x)
        return x

    learner = Learner(config, spaces, dtype="float64", reduce=reduce)
    learner.load(state)
    metrics = learner.update(rollout, order, hyper_at(config, 0))
    distributed.destroy_process_group()
    return learner.state(), metrics


def update_jax(config, spaces, rollout, order, state, rank, address):
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from proximo.jax.learner import Learner
    from proximo.jax.update import update
    from proximo.learner.arrays import PER_ENVIRONMENT, flatten
    from proximo.learner.state import State

    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(address, RANKS, rank)
    mesh = jax.make_mesh((RANKS,), ("rank",))
    learner = Learner(config, spaces, dtype="float64", reduce=lambda x: jax.lax.psum(x, "rank"))
    learner.load(state)

    alike, columns = P(), P(None, "rank")
    data = learner.transitions(rollout)
    own = {name: P("rank") for name in PER_ENVIRONMENT}
    state_spec = State(**{name: own.get(name, alike) for name in State._fields})
    hyper = Hyper(*(np.float64(value) for value in hyper_at(config, 0)))

    def spread(spec, x):
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), np.asarray(x))

    def spread_all(spec, tree):
        return jax.tree.map(partial(spread, spec), tree)

    shared = State(*(spread_all(spec, part) for spec, part in zip(state_spec, learner._state, strict=True)))
    step = jax.shard_map(
        partial(update, learner.spec),
        mesh=mesh,
        in_specs=(state_spec, columns, P(None, None, "rank"), alike),
        out_specs=(state_spec, alike),
        check_vma=False,
    )
    arguments = (spread_all(columns, data), spread(P(None, None, "rank"), order), spread_all(alike, hyper))
    new, metrics = jax.jit(step)(shared, *arguments)
    state, metrics = jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data), (new, metrics))
    return flatten(state), {name: float(value) for name, value in metrics.items()}


def main() -> None:
    backend, rank, folder, address = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    import json

    given = json.loads((folder / "settings.json").read_text())
    config, spaces = from_mapping(given["config"]), Spaces.from_dict(given["spaces"])
    facts = dict(np.load(folder / "rollout.npz"))
    union = Rollout(spaces, config.num_steps, RANKS * config.num_envs)
    union.obs[""][:], union.action[""][:] = facts.pop("obs"), facts.pop("action")
    for name, value in facts.items():
        getattr(union, name)[:] = value
    state = dict(np.load(folder / "state.npz"))
    order = np.load(folder / f"order{rank}.npy")
    run = update_torch if backend == "torch" else update_jax
    state, metrics = run(config, spaces, rank_share(union, rank), order, state, rank, address)
    np.savez(folder / f"{backend}{rank}.npz", **state)
    (folder / f"{backend}{rank}.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main()
