"""The command line: files that it writes, and messages for invalid input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from commands import HEARD

from proximo.cli import main
from proximo.config.settings import SETTINGS
from proximo.errors import format_number
from proximo.ppo import PPO

PROXIMO = [sys.executable, "-m", "proximo"]
SMALL = ["--preset=none", "--num-envs=2", "--num-steps=16", "--minibatch-size=16", "--update-epochs=1"]


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_train_then_evaluate(tmp_path, backend, capsys):
    """A run folder has settings, versions, one metrics object per iteration, the latest checkpoint and a learning
    curve. An evaluation reports a confidence interval of the mean. 320 steps are 10 iterations of 32."""
    run = tmp_path / "run"
    arguments = ["train", "CartPole-v1", *SMALL, "--total-timesteps", "3.2e2", "--backend", backend]
    assert main([*arguments, "--run-dir", str(run)]) == 0
    assert f"backend {backend}" in capsys.readouterr().out

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["env"], config["backend"], config["total_timesteps"]) == ("CartPole-v1", backend, 320)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["global_step"] for row in rows] == [32 * (i + 1) for i in range(10)]
    expected = {
        "rollout/episode_return_mean", "rollout/episode_length_mean", "losses/policy", "losses/value",
        "losses/entropy", "losses/total", "update/approx_kl", "update/clip_fraction",
        "update/explained_variance", "update/gradient_norm", "update/epochs", "update/learning_rate",
        "update/critic_learning_rate", "policy/std", "time/steps_per_second", "time/fraction_env",
        "time/fraction_act", "time/fraction_update",
    }  # fmt: skip
    assert expected <= set(rows[-1])
    assert (run / "report.html").read_text("utf-8").startswith("<!doctype html>")
    assert json.loads((run / "versions.json").read_text())["gymnasium"]

    assert main(["evaluate", str(run), "--episodes", "6", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    low, high = result["return_ci95"]
    assert low <= result["return_mean"] <= high
    assert result["episodes"] == 6
    assert result["deterministic"] is True
    assert result["length_mean"] == result["return_mean"]  # CartPole pays 1 a step

    assert main([*arguments, "--run-dir", str(run)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_metrics_before_the_first_episode_ends_are_null(tmp_path):
    """Pendulum's episodes last 200 steps, so none ends in 2 × 16 steps; the report says so."""
    run = tmp_path / "run"
    assert main(["train", "Pendulum-v1", *SMALL, "--total-timesteps", "32", "--run-dir", str(run), "--quiet"]) == 0
    (row,) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert row["rollout/episode_return_mean"] is None
    assert "no episode ended" in (run / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train CartPol-v1", "did you mean 'CartPole-v1'"),
        ("train BabyAI/GoToObj-v0", "pip install minigrid"),
        ("train nosuchmodule:Env-v0", "nosuchmodule"),
        ("train CartPole-v1 --nm-envs 3", "did you mean '--num-envs'"),
        ("train CartPole-v1 --gamma 1.5", "`gamma` is 1.5; expected a number in [0, 1]."),
        ("train CartPole-v1 --num-envs many", "`num_envs` is 'many'; expected an integer ≥ 1."),
        ("train CartPole-v1 --std lerned", "did you mean 'learned'"),
        ("train CartPole-v1 --batch-size 64", "Use `minibatch_size`"),
        ("train CartPole-v1 --minibatch-size 100", "`minibatch_size` 100 does not divide the rollout"),
        ("train CartPole-v1 --num-minibatches 7", "`num_minibatches` 7 does not divide the rollout"),
        ("train CartPole-v1 --minibatch-size 64 --num-minibatches 4", "both given"),
        ("train CartPole-v1 --squash", "`squash` needs a Box action, and there is none"),
        ("train Blackjack-v1 --wrapper gymnasium.wrappers:FlattenObservation,x=1", "could not be applied"),
        ("train CartPole-v1 --env-kwargs 3", "'3' is not a mapping; expected names with values"),
        ("train CartPole-v1 --env-kwargs {nothing:\\ 1}", "nothing"),
        ("train CartPole-v1 --env-kwargs {foo:1}", "'{foo:1}' has no space after a colon; write foo: 1"),
        ("train Pong-v5", "did you mean 'ALE/Pong-v5'"),
        ("train CartPole\udcff-v1", "'CartPole\\udcff-v1' is not valid text"),
        ("train CartPole-v1 --preset CartPole-v2", "did you mean 'CartPole-v1'"),
        ("train", "no environment is given"),
        ("evaluate nowhere", "does not exist"),
        ("evaluate nowhere --seed -1", "whole number in [0, ∞), got '-1'"),
        ("evaluate nowhere --episode 3", "did you mean '--episodes'"),
        ("train Pendulum-v1 --engine native", "engine native"),
        ("fly", "unknown command"),
    ],
)
def test_wrong_input_gets_one_clear_message(arguments, message, capsys):
    """Status 2, a message that names the problem, and no traceback."""
    words = [word.replace("\\", "") for word in arguments.replace("\\ ", "\\\0").split(" ")]
    assert main([word.replace("\0", " ") for word in words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("proximo: error: ")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("retired", "successor"),
    [
        ("LunarLander-v2", "LunarLander-v3"),
        ("BipedalWalker-v2", "BipedalWalker-v3"),
        ("InvertedPendulum-v2", "InvertedPendulum-v5"),
        ("Reacher-v2", "Reacher-v5"),
        ("Pendulum-v0", "Pendulum-v1"),
    ],
)
def test_a_retired_environment_names_its_successor(retired, successor, capsys):
    """One line, without Gymnasium's own warning."""
    assert main(["train", retired]) == 2
    errors = capsys.readouterr().err
    assert errors == f"proximo: error: environment '{retired}' is retired. Use '{successor}'.\n"


def test_an_older_environment_version_runs_without_output(tmp_path, capsys):
    """MuJoCo's -v4 environments are not replaced by -v5."""
    run = ["--run-dir", str(tmp_path / "run"), "--total-timesteps", "32", "--quiet"]
    assert main(["train", "Hopper-v4", *SMALL, *run]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_names_and_spellings_of_other_libraries_are_accepted(tmp_path, capsys):
    """--n_envs and --lr are translated to --num-envs and --learning-rate, with a note; 1_6 is 16."""
    run = tmp_path / "run"
    flags = "--preset none --n_envs 2 --num_steps 1_6 --lr=1e-3 --mini-batch-size 16 --n-epochs 1 --total_timesteps 32"
    assert main(["train", "CartPole-v1", *flags.split(), "--run-dir", str(run)]) == 0
    assert "--n-envs is called --num-envs in Proximo" in capsys.readouterr().err
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["num_envs"], config["num_steps"], config["learning_rate"]) == (2, 16, 1e-3)


def test_a_preset_of_a_family_is_found_by_the_id_of_an_environment(capsys):
    assert main(["presets", "ALE/Breakout-v5"]) == 0
    assert "num_envs: 8" in capsys.readouterr().out


def test_env_kwargs_in_an_evaluation(tmp_path, capsys):
    """CartPole's reward of 0 per step under sutton_barto_reward, −1 at the end, instead of 1 per step."""
    run = str(tmp_path / "run")
    assert main(["train", "CartPole-v1", *SMALL, "--total-timesteps", "32", "--quiet", "--run-dir", run]) == 0
    for source in ([run], ["--policy", "random", "--env", "CartPole-v1"]):
        kwargs = ["--env-kwargs", "{sutton_barto_reward: true}", "--episodes", "3", "--json"]
        assert main(["evaluate", *source, *kwargs]) == 0
        assert json.loads(capsys.readouterr().out)["return_mean"] == -1.0


def test_resume_changes_any_setting_and_says_what_is_not_exact(tmp_path, capsys):
    run = tmp_path / "run"
    start = ["train", "CartPole-v1", *SMALL, "--preset", "none", "--lr-schedule", "constant", "--quiet"]
    assert main([*start, "--total-timesteps", "64", "--run-dir", str(run)]) == 0
    changes = ["--learning-rate", "1e-5", "--gamma", "0.5", "--total-timesteps", "128", "--quiet"]
    assert main(["resume", str(run), *changes]) == 0
    errors = capsys.readouterr().err
    assert "not bit-identical, because gamma changed from 0.99 to 0.5; learning_rate changed from" in errors
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [round(row["update/learning_rate"], 7) for row in rows] == [3e-4] * 2 + [1e-5] * 2
    assert main(["resume", str(run), "--hidden-sizes", "8", "--total-timesteps", "256"]) == 2
    assert "`hidden_sizes` is (8,), but the network in" in capsys.readouterr().err


def test_a_new_total_survives_a_kill_before_the_next_checkpoint(tmp_path):
    """The first thing that a resumed run saves is a checkpoint with its settings."""
    with PPO("CartPole-v1", num_envs=2, num_steps=16, minibatch_size=32, total_timesteps=32) as agent:
        agent.learn(run_dir=tmp_path / "run")
    with PPO.load(tmp_path / "run", total_timesteps=3200) as agent:
        training = agent.iterate(run_dir=tmp_path / "run")
        next(training)  # the checkpoint of step 64 does not exist, as if the process were killed here
        assert not (tmp_path / "run" / "checkpoints" / "step_000000000064").exists()
        assert PPO.load(tmp_path / "run").config.total_timesteps == 3200


def test_help_lists_every_setting(capsys):
    """--help-all; --help lists those that matter most, on little more than a screen."""
    flags = {"--" + name.removesuffix("s" * (name == "wrappers")).replace("_", "-") for name in SETTINGS}
    for command in ("train", "resume"):
        for arguments in (["--help"], ["--help-all"]):
            with pytest.raises(SystemExit) as exit_:
                main([command, *arguments])
            assert exit_.value.code == 0
            text = capsys.readouterr().out
            shown = {flag for flag in flags if re.search(rf"^  {flag}\b", text, re.MULTILINE)}
            assert shown == flags if "--help-all" in arguments else 15 <= len(shown) <= 25
            assert "--help-all" in arguments or text.count("\n") < 80


@pytest.mark.parametrize(
    ("engine", "number"), [("workers", signal.SIGINT), ("workers", signal.SIGTERM), ("sync", signal.SIGHUP)]
)
def test_a_run_can_be_stopped(engine, number, tmp_path):
    """SIGINT, SIGTERM or SIGHUP, sent to the whole process group including workers, stops the run after the current
    iteration and saves it. The exit status is 128 + signal, and the checkpoint can be evaluated."""
    run = tmp_path / "run"
    command = [*HEARD, *PROXIMO, "train", "CartPole-v1"]
    command += ["--run-dir", str(run), "--total-timesteps", "100_000_000"]
    command += ["--engine", engine, "--num-envs", "2", "--backend", "torch", "--no-compile"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        metrics = run / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, number)
        if number == signal.SIGHUP:  # sent by the shell, and by the system when the shell ends
            time.sleep(0.01)
            os.killpg(process.pid, number)
        try:
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + number, errors
    assert "interrupted after" in output
    assert "stopping after the current step or update" in errors
    assert "Traceback" not in errors
    assert main(["evaluate", str(run), "--episodes", "1", "--json"]) == 0


def test_ctrl_c_in_a_collection_drops_it_and_saves_the_rest(tmp_path):
    """What is going on is printed before the first iteration is complete, and the wait for it can be interrupted. A
    collection lasts a minute here; the interrupted run can be resumed from step 0."""
    (tmp_path / "slow.py").write_text(
        "import time\nimport gymnasium as gym\n"
        "class Slow(gym.Wrapper):\n    def step(self, action):\n        time.sleep(0.1)\n"
        "        return self.env.step(action)\n"
        "gym.register('Slow-v0', lambda **kwargs: Slow(gym.make('CartPole-v1', **kwargs)))\n"
    )
    command = [*PROXIMO, "train", "slow:Slow-v0", "--preset=none", "--num-envs=1", "--num-steps=640", "--backend=torch"]
    command += ["--run-dir=run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert line == "collecting step 1 of 640\n"
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert "interrupted after 0 steps" in output
    assert "Traceback" not in errors
    assert "step 0 of 1,000,000" in subprocess.check_output([*PROXIMO, "inspect", str(tmp_path / "run")], text=True)


def test_numbers_are_values_of_the_preceding_flag(tmp_path, capsys):
    """A negative number with an exponent is not a flag, and an environment id is not a layer width."""
    run = tmp_path / "run"
    arguments = ["train", *SMALL, "--hidden-sizes", "8", "4", "--critic-hidden-sizes", "6", "5", "Acrobot-v1"]
    arguments += ["--stop-at-return", "-1e2"]
    assert main([*arguments, "--total-timesteps", "32", "--run-dir", str(run)]) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["hidden_sizes"], config["critic_hidden_sizes"]) == ([8, 4], [6, 5])
    assert config["stop_at_return"] == -100.0
    assert "stop_at_return -100 was not reached" in capsys.readouterr().out


def test_importing_proximo_imports_no_framework():
    """Neither `import proximo` nor `proximo --help` imports JAX or PyTorch."""
    code = (
        "import sys, proximo, proximo.cli; proximo.cli.build_parser(); "
        "print([name for name in ('jax', 'torch', 'gymnasium', 'matplotlib') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_windows_is_refused_at_the_import():
    """With the alternative, before anything that Windows lacks is imported."""
    code = "import sys; sys.platform = 'win32'; import proximo"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: Proximo needs Linux or macOS")


def test_a_closed_pipe_prints_no_traceback():
    """`| head -1` closes the pipe after one line."""
    line = f"{sys.executable} -m proximo train --help | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage: proximo train")
    assert done.stderr == ""


def test_an_id_without_a_version_selects_the_latest(tmp_path, capsys):
    """Its preset is used, and Gymnasium prints no warning."""
    run = tmp_path / "run"
    assert main(["train", "CartPole", "--total-timesteps", "256", "--run-dir", str(run)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("CartPole-v1: ")
    assert "preset CartPole-v1" in captured.out
    assert "WARN" not in captured.err
    assert yaml.safe_load((run / "config.yaml").read_text())["env"] == "CartPole-v1"


def test_notes_explain_surprising_settings(tmp_path, capsys):
    """A run shorter than a rollout, and --compile with JAX."""
    run = ["--run-dir", str(tmp_path / "run"), "--total-timesteps", "10", "--compile"]
    assert main(["train", "CartPole-v1", *SMALL, *run]) == 0
    errors = capsys.readouterr().err
    assert "total_timesteps 10 is less than one rollout (num_envs 2 × num_steps 16 = 32 steps)" in errors
    assert "JAX always compiles" in errors


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_every_command_writes_to_a_terminal_of_few_characters(encoding, tmp_path):
    """Characters that the terminal lacks are spelled in ASCII: ">=" for "≥". The folder is named with one, too."""
    run = str(tmp_path / "läuft-∞")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    commands = [
        ["train", "--help"], ["resume", "--help"], ["evaluate", "--help"], ["presets"],
        ["train", "CartPole-v1", *SMALL, "--total-timesteps=32", f"--run-dir={run}", "--backend=jax"],
        ["evaluate", run, "--episodes=2"], ["inspect", run], ["plot", run],
    ]  # fmt: skip
    for command in commands:
        done = subprocess.run([*PROXIMO, *command], capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr.decode(encoding)
        done.stdout.decode(encoding)
        assert "∞" not in done.stdout.decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123456, "0.01235"), (0.2, "0.2000"), (-105.26, "-105.3"), (123456.78, "123456.8"), (0, "0")]
)
def test_returns_keep_their_significant_digits(value, text):
    """Returns of 0.01 and of 100,000 both show four digits or more."""
    assert format_number(value) == text


def test_commands_take_the_folder_of_several_seeds(tmp_path, capsys):
    """Evaluations print a line per seed; a larger total continues every seed; complete seeds are refused."""
    folder = tmp_path / "seeds"
    assert main(["train", "CartPole-v1", *SMALL, "--seeds=0,1", "--total-timesteps=64", f"--run-dir={folder}"]) == 0
    assert main(["plot", str(folder)]) == 0
    assert (folder / "curves.png").is_file()
    assert main(["resume", str(folder)]) == 2
    assert "has completed 64 steps" in capsys.readouterr().err
    assert main(["resume", str(folder), "--total-timesteps=96"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--episodes=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["CartPole-v1", "seed-0", "seed-1", "mean over 2 seeds"]
    (folder / "seed-2").mkdir()  # as when a run is interrupted while a seed waits for a core
    begun = (folder / "report.html").stat().st_mtime_ns
    assert main(["resume", str(folder), "--total-timesteps=96"]) == 0
    assert (folder / "report.html").stat().st_mtime_ns > begun
    assert [len((folder / f"seed-{n}" / "metrics.jsonl").read_text().splitlines()) for n in (0, 1, 2)] == [3, 3, 3]
    assert "seed: 2" in (folder / "seed-2" / "config.yaml").read_text()
    (folder / "seed-1-unfinished").mkdir()  # from an earlier time
    shutil.rmtree(folder / "seed-1" / "checkpoints")  # as when a run is killed before its first checkpoint
    assert main(["resume", str(folder), "--total-timesteps=96"]) == 0
    assert "seed-1 ended before its first checkpoint and begins again" in capsys.readouterr().err
    assert (folder / "seed-1-unfinished1" / "metrics.jsonl").is_file()
    assert (folder / "seed-1" / "checkpoints").is_dir()


def test_an_evaluation_shows_progress_and_limits_the_video(tmp_path, capsys):
    """A policy whose mode is far below its training returns is pointed to --stochastic."""
    from proximo.rollout.rollout import Episode

    agent = PPO("CartPole-v1", num_envs=1, num_steps=64, seed=0)
    agent.progress.episodes.append(Episode(500.0, 500, 0))
    agent.save(tmp_path / "checkpoint")
    agent.close()
    pytest.importorskip("av")
    command = ["evaluate", str(tmp_path / "checkpoint"), "--episodes=1", f"--record={tmp_path}/video.mp4"]
    assert main([*command, "--max-frames=5"]) == 0
    errors = capsys.readouterr().err
    assert "evaluating: " in errors
    assert "500.0 with sampled actions. Evaluate the same with --stochastic." in errors
