"""Draw the observations that a network receives from an Atari game.

    python docs/pictures/atari_frames.py [ENV_ID] [FILE.png]

Plays random actions and draws four observations, each with its four frames, the oldest on the left.
"""

import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from proximo.envs.make import make_envs

matplotlib.use("Agg")
env_id, path, *_ = [*sys.argv[1:], *["PongNoFrameskip-v4", "atari_frames.png"][len(sys.argv) - 1 :]]

rng = np.random.default_rng(0)
envs = make_envs(env_id, num_envs=1, engine="native")
actions = envs.single_action_space.n
shown = []
observation, _ = envs.reset(seed=0)
for step in range(64):
    if step % 16 == 0:
        shown.append(observation[0].copy())
    observation, *_ = envs.step(rng.integers(actions, size=1))
envs.close()

figure, axes = plt.subplots(len(shown), len(shown[0]), figsize=(8, 8.6), layout="constrained")
figure.suptitle(f"{env_id}: {shown[0].shape[1]} × {shown[0].shape[2]} pixels, gray")
for row, (picture, number) in enumerate(zip(shown, range(0, 64, 16), strict=True)):
    for column, frame in enumerate(picture):
        axis = axes[row, column]
        axis.imshow(frame, cmap="gray", vmin=0, vmax=255)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[row, 0].set_ylabel(f"step {number}")
figure.savefig(path, dpi=80)
print(path)
