"""Connect Four of PettingZoo against a random player, with masks of the full columns.

    pip install 'pettingzoo>=1.27' pygame-ce && python examples/connect_four.py

A game for two becomes an environment for one agent: the other player belongs to the environment.
"""

import gymnasium as gym
import numpy as np
import pettingzoo

from proximo import PPO, evaluate_random

BOARD = (6, 7, 2)


class ConnectFour(gym.Env):
    """The agent or the other player begins, each with probability 1/2. A win is worth 1, a defeat −1.

    Observation: for each place, whether a piece of the agent and one of the other player lies there.
    """

    observation_space = gym.spaces.Dict(
        {"board": gym.spaces.Box(0, 1, BOARD, np.float32), "action_mask": gym.spaces.MultiBinary(7)}
    )
    action_space = gym.spaces.Discrete(7)

    def reset(self, *, seed=None, options=None):
        """Begin a game; the other player moves first if it begins."""
        super().reset(seed=seed)
        self.game = pettingzoo.make("aec", "classic/connect_four_v3")
        self.game.reset()
        self.agent = str(self.np_random.choice(self.game.possible_agents))
        self._let_the_other_play()
        return self._observe(), {}

    def step(self, action):
        """Make a move, and let the other player answer."""
        self.game.step(int(action))
        self._let_the_other_play()
        over = any(self.game.terminations.values())
        return self._observe(), float(self.game.rewards[self.agent]), over, False, {}

    def _let_the_other_play(self):
        while not any(self.game.terminations.values()) and self.game.agent_selection != self.agent:
            mask = self.game.observe(self.game.agent_selection)["action_mask"]
            self.game.step(int(self.np_random.choice(np.flatnonzero(mask))))

    def _observe(self):
        seen = self.game.observe(self.agent)
        over = any(self.game.terminations.values())
        mask = np.ones(7, np.int8) if over or not any(seen["action_mask"]) else seen["action_mask"]
        return {"board": seen["observation"].astype(np.float32), "action_mask": mask}


gym.register("ConnectFour-v0", ConnectFour)

if __name__ == "__main__":
    random = np.mean(evaluate_random(ConnectFour, 100).returns)
    with PPO(ConnectFour, num_envs=8, num_steps=128, minibatch_size=256, update_epochs=4, ent_coef=0.01) as agent:
        agent.learn(60_000)
        trained = np.mean(agent.evaluate(100, deterministic=False).returns)
    assert trained > random + 0.5
    print(f"trained {trained:.2f}, random {random:.2f}")
