"""RecurrentPPO of sb3-contrib.

Its LSTM comes before the hidden layers, ours after them. Its minibatches are padded sequences of whole episodes.
"""

from __future__ import annotations

from peers import common, sb3


def main() -> None:
    """Run what the flags ask for."""
    options = common.arguments().parse_args()
    common.limit_threads(options.threads)
    from sb3_contrib import RecurrentPPO

    packages = ["sb3-contrib", "stable-baselines3", "torch", "gymnasium", "numpy"]
    sb3.run(options, RecurrentPPO, packages)


if __name__ == "__main__":
    main()
