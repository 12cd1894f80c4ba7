"""sbx's PPO: Stable-Baselines3's loop and environments around networks and a minibatch step in JAX.

Actor and critic have an optimizer each, and gradients are clipped over each alone; advantages are computed in NumPy.
"""

from __future__ import annotations

from peers import common, sb3


def main() -> None:
    """Run what the flags ask for."""
    options = common.arguments().parse_args()
    common.limit_threads(options.threads)
    from sbx import PPO

    packages = ["sbx-rl", "stable-baselines3", "jax", "jaxlib", "flax", "torch", "gymnasium", "mujoco", "numpy"]
    sb3.run(options, PPO, packages)


if __name__ == "__main__":
    main()
