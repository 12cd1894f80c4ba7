"""The `proximo` command: parsing and printing, nothing else."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import signal
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from proximo import presets
from proximo.config import ALIASES, AMBIGUOUS, FIELDS, expected
from proximo.config import to_int as _to_int
from proximo.errors import RunError, UserError, suggest
from proximo.version import __version__

if TYPE_CHECKING:
    from proximo.evaluate import Evaluation

GROUPS = {
    "run": "run",
    "update": "update (the algorithm)",
    "network": "network",
    "policy": "policy (continuous actions)",
    "normalisation": "normalisation",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        """Hand bad usage to `main`, as any other bad input."""
        raise UserError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 1 (the run failed), 2 (bad input), 130 or 143 (a signal)."""
    try:
        return dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        print(f"proximo: error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"proximo: the run stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def dispatch(arguments: list[str]) -> int:
    """Parse and run one command; return the exit status."""
    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    chosen = commands.choices.get(arguments[0], parser) if arguments else parser
    flags = set(chosen._option_string_actions)
    options, unknown = parser.parse_known_args(_spelled(arguments, flags))
    if unknown:
        raise UserError(
            f"unknown argument {unknown[0]!r}{suggest(unknown[0], flags)}; see {chosen.prog} --help"
        )
    if options.command is None:
        parser.print_help()
        return 0
    return options.run(options)


def build_parser() -> Parser:
    """The parser of all commands; a flag for every setting comes from the table in `proximo.config`."""
    parser = Parser(prog="proximo", description="PPO for Gymnasium environments.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"proximo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    train = commands.add_parser(
        "train", help="train on an environment", usage="proximo train ENV_ID [options]", allow_abbrev=False
    )
    train.add_argument("env", metavar="ENV_ID", help="environment id, such as CartPole-v1, or MODULE:ID")
    train.add_argument(
        "--preset",
        default="auto",
        help="settings to start from: auto (the environment's own, where there is one), none, or a name; "
        f"there are: {', '.join(presets.available())}",
    )
    train.add_argument("--quiet", action="store_true", help="print nothing while training")
    groups = {key: train.add_argument_group(title) for key, title in GROUPS.items()}
    for field in FIELDS.values():
        _add_setting(groups[field.metadata["group"]], field)
    train.set_defaults(run=run_train)

    evaluate = commands.add_parser("evaluate", help="run episodes with a trained policy", allow_abbrev=False)
    evaluate.add_argument(
        "path", metavar="RUN", help="run folder (its latest checkpoint), or a checkpoint folder"
    )
    evaluate.add_argument("--episodes", type=_whole, default=100, help="complete episodes to run [100]")
    evaluate.add_argument("--seed", type=_whole, default=0, help="seed of the environments [0]")
    evaluate.add_argument(
        "--deterministic", action=argparse.BooleanOptionalAction, default=True,
        help="take the policy's mode rather than a sample",
    )  # fmt: skip
    evaluate.add_argument("--env", help="environment id, instead of the one trained on")
    evaluate.add_argument("--backend", help="jax or torch, instead of the one trained with")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    evaluate.set_defaults(run=run_evaluate)
    return parser


def run_train(options: argparse.Namespace) -> int:
    """`proximo train`: a run in a folder of its own."""
    from proximo.ppo import PPO
    from proximo.record import default_run_dir

    settings = {name: getattr(options, name) for name in FIELDS if getattr(options, name) is not None}
    agent = PPO(options.env, preset=options.preset, **settings)
    config, backend = agent.config, agent.learner.backend
    run_dir = Path(config.run_dir or default_run_dir(options.env, backend, config.seed))
    used = presets.chosen(options.env, options.preset) or "none"
    say = (lambda line: None) if options.quiet else (lambda line: print(line, flush=True))
    say(
        f"{options.env}: backend {backend}, {config.num_envs} environments × {config.num_steps} steps, "
        f"preset {used}, seed {config.seed}"
    )
    say(f"run folder: {run_dir}")

    try:
        with Interrupt() as interrupt:
            agent.learn(
                run_dir=run_dir, progress=not options.quiet, stop=lambda: interrupt.signal is not None
            )
    except RunError as error:
        raise RunError(f"{error}\n  what was learned up to then is in {run_dir}") from error
    finally:
        agent.close()
    step, reached = agent.progress.global_step, agent.progress.return_mean
    what = (
        "no episode ended"
        if reached is None
        else f"mean return of the last {len(agent.progress.episodes)} episodes {reached:.1f}"
    )
    say(f"{'interrupted' if interrupt.signal else 'finished'} after {step:,} steps: {what}")
    say(
        f"learning curve: {run_dir / 'learning_curve.png'}" if reached is not None else "learning curve: none"
    )
    say(f"evaluate with: proximo evaluate {run_dir}")
    if (
        config.stop_at_return is not None
        and not interrupt.signal
        and (reached or -math.inf) < config.stop_at_return
    ):
        say(f"stop_at_return {config.stop_at_return:g} was not reached")
    return 128 + interrupt.signal if interrupt.signal else 0


def run_evaluate(options: argparse.Namespace) -> int:
    """`proximo evaluate`: statistics of complete episodes."""
    from proximo.ppo import PPO

    agent = PPO.load(options.path, **({"backend": options.backend} if options.backend else {}))
    result = agent.evaluate(
        options.episodes, deterministic=options.deterministic, seed=options.seed, env=options.env
    )
    print(json.dumps(result.to_dict()) if options.json else describe(result, options.env or agent.env_id))
    return 0


def describe(result: Evaluation, env: str | None) -> str:
    """An evaluation in words."""
    values = result.to_dict()
    low, high = values["return_ci95"]
    policy = "deterministic" if result.deterministic else "stochastic"
    return (
        f"{env}: {values['episodes']} episodes, {policy} policy\n"
        f"return {values['return_mean']:.2f} ± {values['return_std']:.2f} (standard deviation), "
        f"95 % interval of the mean [{low:.2f}, {high:.2f}]\n"
        f"length {values['length_mean']:.1f}"
    )


class Interrupt:
    """The first SIGINT or SIGTERM asks for a stop after the iteration; a second one stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> Interrupt:
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: types.FrameType | None) -> None:
        if self.signal is not None:
            raise SystemExit(128 + number)
        self.signal = number
        print("\nproximo: stopping after this iteration; once more stops at once", file=sys.stderr)


def _add_setting(group: Any, field: dataclasses.Field[Any]) -> None:
    rule = field.metadata
    flag = "--" + field.name.replace("_", "-")
    default = field.default if field.default is not dataclasses.MISSING else {}
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default).lower()
    text = f"{rule['meaning']} [{shown}]".replace("%", "%%")
    if rule["kind"] == "bool":
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif rule["kind"] == "ints":
        group.add_argument(flag, default=None, metavar="N N …", help=text)
    elif rule["kind"] == "mapping":
        group.add_argument(flag, type=_mapping, default=None, metavar="YAML", help=text)
    else:
        metavar = "{" + ",".join(rule["choices"]) + "}" if rule["choices"] else rule["kind"].upper()
        limits = "" if rule["choices"] else f"; {expected(field)}"
        group.add_argument(flag, default=None, metavar=metavar, help=text + limits)


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"expected names with values such as '{{gravity: -5}}', got {text!r}"
        )
    return value


def _whole(text: str) -> int:
    try:
        number = _to_int(text)
    except (ValueError, OverflowError):
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number in [0, ∞), got {text!r}")
    return number


def _spelled(words: list[str], flags: set[str]) -> list[str]:
    """Arguments as argparse wants them: our names of flags, and numbers tied to the flag they follow.

    Tied, `-1e2` is not taken for a flag, nor an environment's id for the width of a layer.
    """
    spelled: list[str] = []
    for word in words:
        last = spelled[-1] if spelled else ""
        if last.startswith("--") and last in flags and _is_number(word):
            spelled[-1] = f"{last}={word}"
        elif last.startswith("--hidden-sizes=") and _is_number(word):
            spelled[-1] = f"{last},{word}"
        else:
            spelled.append(_canonical_flag(word, flags))
    return spelled


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _canonical_flag(word: str, flags: set[str]) -> str:
    """Our spelling of a flag: underscores become hyphens, and other libraries' names become ours."""
    if not word.startswith("--") or word == "--":
        return word
    flag, equals, value = word.partition("=")
    flag = "--" + flag[2:].replace("_", "-")
    if flag not in flags:
        name = flag[2:].replace("-", "_")
        if name in AMBIGUOUS:
            raise UserError(AMBIGUOUS[name])
        canonical = "--" + ALIASES.get(name, name).replace("_", "-")
        if canonical not in flags:
            return flag + equals + value
        print(f"proximo: note: {flag} is {canonical} here", file=sys.stderr)
        flag = canonical
    return flag + equals + value


if __name__ == "__main__":
    sys.exit(main())
