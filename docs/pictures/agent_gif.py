"""Render part of an episode of a policy trained on a MuJoCo environment as a small GIF.

python docs/pictures/agent_gif.py RUN FILE.gif [SECONDS]

Needs the extras mujoco and video, and MUJOCO_GL=egl on a machine without a display. docs/pictures/halfcheetah.gif is
from `proximo train HalfCheetah-v5 --preset HalfCheetah-v4 --seed 2`.
"""

import sys

import gymnasium as gym
from PIL import Image

from proximo import PPO

WIDTH, HEIGHT, SKY, FRAMES_PER_SECOND, COLOURS, SKIP_SECONDS = 320, 192, 40, 20, 64, 2.0

run, path, *rest = sys.argv[1:]
seconds = float(rest[0]) if rest else 4.0
agent = PPO.load(run)
env = gym.make(agent.env_id, render_mode="rgb_array", width=2 * WIDTH, height=2 * HEIGHT, camera_name="track")
every = max(round(env.metadata["render_fps"] / FRAMES_PER_SECOND), 1)
start = round(SKIP_SECONDS * env.metadata["render_fps"])

frames: list[Image.Image] = []
observation, _ = env.reset(seed=0)
for step in range(start + round(seconds * env.metadata["render_fps"])):
    observation, *_ = env.step(agent.predict(observation))
    if step >= start and step % every == 0:
        picture = Image.fromarray(env.render()).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        frames.append(picture.crop((0, SKY, WIDTH, HEIGHT)))
env.close()

# One palette for all frames, and no dithering: both make the file smaller.
palette = frames[0].quantize(COLOURS)
indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
indexed[0].save(
    path, save_all=True, append_images=indexed[1:], duration=1000 // FRAMES_PER_SECOND, loop=0, optimize=True
)
print(path, len(frames), "frames")
