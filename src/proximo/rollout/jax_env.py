"""The protocol of environments written in JAX; `proximo.jax.env` steps them."""

from typing import Any, Protocol, TypeGuard, runtime_checkable

import gymnasium as gym
from gymnasium.vector import VectorEnv


@runtime_checkable
class JaxEnv(Protocol):
    """An environment written in JAX: one episode of one environment, as pure functions.

    There is no automatic reset and no time limit inside: `proximo.jax.env` adds both, in the same way for every
    environment, so that the final observation and the cause of an episode's end are right.

    Attributes:
        observation_space, action_space: Gymnasium spaces of one environment. Observations and actions are arrays, or
            dictionaries and tuples of arrays, as the spaces are nested.

    An environment may also have:

    - `time_limit`: steps after which an episode is truncated; without it, or None, there is no limit.
    - `pools_resets`: True where a reset takes much longer than a step. Then the start states of an iteration are taken
      from as many resets as there are environments, computed once in each iteration.
    - `render(state)`: an image of a state, uint8 [height, width, 3].
    """

    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]

    def reset(self, key: Any) -> tuple[Any, Any]:
        """Begin an episode with a random key of JAX; return a state, any pytree of arrays, and the observation."""
        ...

    def step(self, key: Any, state: Any, action: Any) -> tuple[Any, Any, Any, Any, Any]:
        """Return the next state and observation, the reward, and whether the episode was terminated or truncated.

        The observation is that of the next state, also where the episode ends. `truncated` is for reasons other than
        `time_limit`.
        """
        ...


def is_jax_env(env: Any) -> TypeGuard[JaxEnv]:
    """Whether an object is an environment written in JAX."""
    return isinstance(env, JaxEnv) and not isinstance(env, (gym.Env, VectorEnv, type))
