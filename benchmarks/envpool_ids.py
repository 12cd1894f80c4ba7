"""Run every environment of EnvPool for some steps and keep which of them Proximo can train on.

    python benchmarks/envpool_ids.py [--jobs 2] [--match TEXT]

Each runs in a process of its own, since a fault in C++ would end this one: two environments take random actions for
`STEPS` steps through `proximo.rollout.collector.Collector`, which checks observations, rewards and flags. The result is
benchmarks/results/envpool.json; ids that are already there are skipped. The page on environments quotes it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "envpool.json"
PAGE = ROOT / "docs" / "how-to" / "environments.md"  # with the table between these comments
BEGIN, END = "<!-- envpool: benchmarks/envpool_ids.py -->", "<!-- end of envpool -->"
STEPS, TIMEOUT_S = 200, 120
PROGRAM = """
import json, sys
import numpy as np
from proximo.config.settings import Config
from proximo.envs.make import make_envs, spaces_of
from proximo.rollout.collector import Collector
from proximo.rollout.rollout import Rollout

envs = make_envs(sys.argv[1], 2)
spaces, config = spaces_of(envs), Config(num_envs=2, num_steps=int(sys.argv[2]), num_minibatches=1)
collector, rollout = Collector(envs, spaces, config), Rollout(spaces, config.num_steps, 2)
rng = np.random.default_rng(0)
collector.reset([0, 1])
episodes = collector.collect(lambda obs, start: spaces.random_action(rng, obs, 2), rollout).episodes
ends = {"terminated": int(rollout.terminated.sum()), "truncated": int(rollout.truncated.sum())}
print(json.dumps({"observation": [leaf.kind for leaf in spaces.observation], **ends, "episodes": len(episodes)}))
envs.close()
"""


def names() -> dict[str, str]:
    """Id -> family of every environment, without second names in a namespace."""
    import envpool
    from envpool.registration import registry

    known = set(envpool.list_all_envs())
    return {
        name: registry.specs[name][0].removeprefix("envpool.")
        for name in sorted(known)
        if name.rpartition("/")[2] == name or name.rpartition("/")[2] not in known
    }


def try_one(name: str) -> dict:
    """What a run of one environment reported, or its error."""
    command = [sys.executable, "-c", PROGRAM, f"envpool:{name}", str(STEPS)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {TIMEOUT_S} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return {"error": said[-1][:300] if said else f"exit status {done.returncode}"}


def main() -> None:
    """Run what is missing in the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--match", default="", help="only ids and families that contain this text")
    options = parser.parse_args()
    result = json.loads(RESULT.read_text("utf-8")) if RESULT.exists() else {}
    due = {name: family for name, family in names().items() if name not in result}
    due = {name: family for name, family in due.items() if options.match in f"{family}/{name}"}
    with ThreadPoolExecutor(options.jobs) as pool:
        for (name, family), found in zip(due.items(), pool.map(try_one, due), strict=True):
            result[name] = {"family": family, **found}
            print(name, found.get("error", "runs"), flush=True)
            RESULT.write_text(json.dumps(dict(sorted(result.items())), indent=0) + "\n", "utf-8")
    before, begin, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    PAGE.write_text(f"{before}{begin}\n\n{table(result)}\n\n{end}{after}", "utf-8")


def shorten(error: str) -> str:
    """The first sentence of an error, without its type and the environment's id."""
    text = re.sub(r"^[\w.]+: (envpool:\S+: )?", "", error)
    return re.split(r"\. |, but ", text)[0].rstrip(".")


def table(result: dict[str, dict]) -> str:
    """How many ids of each family were tried and run, and the most frequent error of the others."""
    rows = ["| family | tried | run | most frequent error |", "|---|---:|---:|---|"]
    for family in sorted({entry["family"] for entry in result.values()}):
        entries = [entry for entry in result.values() if entry["family"] == family]
        errors = Counter(shorten(entry["error"]) for entry in entries if "error" in entry)
        reason = errors.most_common(1)[0][0].replace("|", "/") if errors else ""
        rows.append(f"| {family} | {len(entries)} | {len(entries) - errors.total()} | {reason} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
