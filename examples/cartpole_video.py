"""Train on CartPole-v1, record videos during training, and compare the policy with random actions.

    python examples/cartpole_video.py [RUN_DIR]

Needs `pip install 'proximo[video]'`. Writes curves, checkpoints and videos to runs/cartpole-video.
"""

import sys

from proximo import PPO, evaluate_random

run_dir = sys.argv[1] if len(sys.argv) > 1 else "runs/cartpole-video"

agent = PPO("CartPole-v1", seed=0, stop_at_return=400.0, capture_video=True, video_interval=100)
agent.learn(100_000, run_dir=run_dir, progress=True)
agent.close()

trained = agent.evaluate(20).to_dict()["return_mean"]
random = evaluate_random("CartPole-v1", 20).to_dict()["return_mean"]
print(f"trained {trained:.0f}, random {random:.0f}; videos in {run_dir}/videos")
assert trained > random + 300
