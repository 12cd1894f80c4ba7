"""Records of a run: metrics, TensorBoard events, plots, videos, and a settings file that reproduces it."""

import json
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from rollouts import act_rollout
from scipy.stats import trim_mean
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from proximo.cli import main
from proximo.errors import UserError
from proximo.learner.schedules import hyper_at
from proximo.ppo import PPO
from proximo.report.curves import Run, bootstrap_band, group_by_settings, interquartile_mean, smooth
from proximo.report.plot import plot
from proximo.rollout.diagnostics import histograms_of
from proximo.rollout.minibatches import minibatch_order
from proximo.run.metrics import read_metrics

SMALL = {"preset": None, "num_steps": 16, "minibatch_size": 16, "update_epochs": 1}
TINY = ["--preset=none", "--num-steps=16", "--minibatch-size=16", "--update-epochs=1", "--quiet"]


def read_events(run):
    """Events of a run, read by TensorBoard."""
    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_tensorboard_has_the_same_values_as_the_metrics(tmp_path, backend):
    """Every scalar of metrics.jsonl at its step, and, with an interval of 2, histograms of 2 × 16 transitions in
    iterations 0, 2 and 4 of 5."""
    run = tmp_path / "run"
    settings = {**SMALL, "backend": backend, "num_envs": 2, "histogram_interval": 2, "seed": 3}
    with PPO("CartPole-v1", **settings) as agent:
        agent.learn(160, run_dir=run)
    rows = read_metrics(run)
    found = read_events(run)
    for name in ("losses/policy", "rollout/episode_return_mean", "update/learning_rate"):
        expected = {row["global_step"]: row[name] for row in rows if row[name] is not None}
        assert {event.step: event.value for event in found.Scalars(name)} == pytest.approx(expected, rel=1e-6)
    for name in ("return", "advantage", "value", "ratio", "action/0"):
        histograms = found.Histograms(f"histograms/{name}")
        assert [event.step for event in histograms] == [32, 96, 160], name
        assert [event.histogram_value.num for event in histograms] == [32, 32, 32]
    ratio = found.Histograms("histograms/ratio")[0].histogram_value
    assert 0.5 < ratio.min < 1.0 < ratio.max < 2.0
    assert rows[0]["action/frequency/0"] + rows[0]["action/frequency/1"] == pytest.approx(1.0)
    assert rows[0]["policy/probability/0"] == pytest.approx(0.5, abs=0.05)  # the head is initialized with gain 0.01
    assert "action/frequency/0" not in rows[1]


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_action_statistics_of_every_dimension(tmp_path, backend):
    """The policy's standard deviation starts at init_std; the environment clips torques to ±2."""
    run = tmp_path / "run"
    with PPO("Pendulum-v1", **SMALL, backend=backend, num_envs=4, init_std=0.5) as agent:
        agent.learn(64, run_dir=run)
    (row,) = read_metrics(run)
    assert row["policy/std/0"] == pytest.approx(0.5, rel=1e-5)
    assert abs(row["policy/mean/0"]) < 0.1
    # the mean of 64 samples with standard deviation 0.5 has a standard error of 0.0625
    assert row["action/mean/0"] == pytest.approx(row["policy/mean/0"], abs=0.25)
    assert row["action/std/0"] == pytest.approx(0.5, abs=0.2)
    assert "action/mean/1" not in row


def test_histograms_do_not_affect_training(tmp_path):
    """Runs with and without histograms have bit-identical parameters."""
    agents = [PPO("CartPole-v1", **SMALL, num_envs=2, histogram_interval=interval) for interval in (0, 1)]
    for agent in agents:
        agent.learn(128)
    one, other = (agent.learner.state() for agent in agents)
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value, err_msg=name)


def test_a_run_is_reproduced_from_its_config(tmp_path):
    """Training with a run's `config.yaml` gives the same metrics, except times."""
    first, second = tmp_path / "first", tmp_path / "second"
    command = ["train", "CartPole-v1", *TINY, "--num-envs", "2", "--lr", "1e-3", "--seed", "7"]
    assert main([*command, "--total-timesteps", "96", "--run-dir", str(first)]) == 0
    assert main(["train", "--config", str(first / "config.yaml"), "--quiet", "--run-dir", str(second)]) == 0

    def untimed(run):
        return [
            {name: value for name, value in row.items() if not name.startswith("time/")} for row in read_metrics(run)
        ]

    assert untimed(first) == untimed(second)


def test_flags_override_the_file_and_the_file_the_preset(tmp_path):
    """CartPole's preset has γ 0.98, λ 0.8 and learning rate 0.001."""
    file = tmp_path / "my.yaml"
    file.write_text("env_id: CartPole-v1\nn_envs: 4\ngamma: 0.9\nlr: 5e-4\nnum_minibatches: 2\n")
    run = tmp_path / "run"
    flags = ["--learning_rate", "2e-4", "--minibatch-size", "32", "--total_timesteps", "1_28", "--quiet"]
    assert main(["train", "--config", str(file), *flags, "--run-dir", str(run)]) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["gae_lambda"], config["gamma"], config["learning_rate"]) == (0.8, 0.9, 2e-4)
    assert (config["num_envs"], config["minibatch_size"], config["num_minibatches"]) == (4, 32, None)
    assert config["total_timesteps"] == 128


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gamma: 0.99", "no environment"),
        ("env: CartPole-v1\ngama: 0.9", "unknown setting 'gama'; did you mean 'gamma'?"),
        ("env: CartPole-v1\ngamma: 2", "`gamma` is 2.0; expected a number in [0, 1]."),
        ("env: CartPole-v1\nbatch_size: 64", "`batch_size` means"),
        ("env: CartPole-v1\nenv_id: Pendulum-v1", "expected one id"),
        ("- CartPole-v1", "expected names with values"),
        ("env: [", "is not valid YAML"),
        ("env: CartPole-v1\npreset: 3", "`preset` is 3"),
        ("env: !!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, capsys, text, message):
    """One line with the file and the problem; nothing is written."""
    file, run = tmp_path / "my.yaml", tmp_path / "run"
    file.write_text(text)
    assert main(["train", "--config", str(file), "--run-dir", str(run)]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert str(file) in errors
    assert errors.count("\n") == 1
    assert not run.exists()


def test_runs_that_differ_in_their_seed_form_one_group(tmp_path):
    """Three seeds, and one run with another γ, form two groups."""
    config = {"env": "E-v0", "backend": "jax", "gamma": 0.9}
    runs = [
        Run(f"run{seed}", {**config, "seed": seed}, [{"global_step": s, "x": s * seed} for s in (0, 10)])
        for seed in (1, 2, 3)
    ]
    other = Run("other", {**config, "gamma": 0.5, "seed": 1}, runs[0].rows)
    groups = group_by_settings([*runs, other])
    assert {label: len(members) for label, members in groups.items()} == {
        "gamma 0.9 (3 seeds)": 3,
        "gamma 0.5 (other)": 1,
    }


def test_the_mean_curve_covers_the_steps_of_all_runs():
    """Over the common steps 2 to 8, values s and 3 s have mean 2 s and the range [s, 3 s]."""
    long, short = np.arange(0.0, 11.0), np.arange(2.0, 9.0)
    band = bootstrap_band([(long, long), (short, 3.0 * short)])
    assert (band.steps[0], band.steps[-1]) == (2.0, 8.0)
    np.testing.assert_allclose(band.mean, 2.0 * band.steps)
    np.testing.assert_allclose(band.low, band.steps)
    np.testing.assert_allclose(band.high, 3.0 * band.steps)


@pytest.mark.parametrize("count", [3, 4, 5, 10])
def test_the_interquartile_mean_is_that_of_rliable(count):
    """rliable uses scipy.stats.trim_mean(…, 0.25); of 0, 1, 2, 3 and 100 it is the mean of 1, 2 and 3."""
    values = np.random.default_rng(0).normal(size=(count, 7))
    np.testing.assert_allclose(interquartile_mean(values), trim_mean(values, 0.25, axis=0))
    assert interquartile_mean(np.array([100.0, 0.0, 3.0, 1.0, 2.0])) == 2.0


def test_the_band_is_a_bootstrap_interval():
    """Constant curves at 0, …, 9: the interval covers the mean, and is that of resampled interquartile means."""
    steps = np.array([0.0, 1.0])
    band = bootstrap_band([(steps, np.full(2, float(k))) for k in range(10)])
    assert band.mean[0] == 4.5  # of 2 to 7
    rng = np.random.default_rng(1)
    means = interquartile_mean(rng.integers(10, size=(10, 20_000)).astype(float))
    np.testing.assert_allclose([band.low[0], band.high[0]], np.quantile(means, [0.025, 0.975]), atol=0.35)


def test_smoothing_keeps_the_mean_of_a_line():
    """A centred average leaves a line as it is, and divides the variance of noise by the number of points."""
    line = np.arange(1000.0)
    np.testing.assert_allclose(smooth(line)[20:-20], line[20:-20])
    noise = np.random.default_rng(0).normal(size=10_000)
    assert smooth(noise).var() == pytest.approx(1 / 301, rel=0.3)
    assert smooth(np.ones(3)).tolist() == [1.0, 1.0, 1.0]


def test_plots_of_runs(tmp_path, capsys):
    """Training plots the run's curves; `plot` writes several runs to a given file and selects metrics by name."""
    for seed in (0, 1):
        run = tmp_path / f"s{seed}"
        command = ["train", "CartPole-v1", *TINY, "--num-envs", "2", "--seed", str(seed)]
        assert main([*command, "--total-timesteps", "320", "--run-dir", str(run)]) == 0
    with Image.open(tmp_path / "s0" / "curves.png") as image:
        assert len(np.unique(np.asarray(image.convert("L")))) > 10  # not blank
    picture = tmp_path / "both.svg"
    capsys.readouterr()
    runs = [str(tmp_path / "s0"), str(tmp_path / "s1")]
    assert main(["plot", *runs, "--output", str(picture), "--metric", "losses/value"]) == 0
    assert capsys.readouterr().out.strip() == str(picture)
    assert picture.read_text().startswith("<?xml")
    with pytest.raises(UserError, match="losses/vale"):
        plot(runs, metrics=["losses/vale"])
    with pytest.raises(UserError, match="cannot be written"):
        plot(runs, output=tmp_path / "nowhere" / "x.png")
    assert main(["plot", str(tmp_path)]) == 2


def test_printed_presets_are_valid_settings_files(tmp_path, capsys):
    """`presets NAME` prints YAML that `train --config` accepts."""
    assert main(["presets"]) == 0
    table = capsys.readouterr().out
    assert "CartPole-v1" in table
    assert main(["presets", "CartPole-v1"]) == 0
    file, run = tmp_path / "preset.yaml", tmp_path / "run"
    file.write_text(capsys.readouterr().out)
    command = ["train", "--config", str(file), "--total-timesteps", "256", "--quiet", "--run-dir", str(run)]
    assert main(command) == 0
    assert main(["presets", "CartPole-v2"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_evaluation_of_a_random_policy(capsys):
    """CartPole lasts about 22 steps with random actions, and Pendulum always 200."""
    command = ["evaluate", "--policy", "random", "--json", "--env"]
    assert main([*command, "CartPole-v1", "--episodes", "200"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 19.0 < result["return_mean"] < 26.0
    assert result["deterministic"] is False
    assert main([*command, "Pendulum-v1", "--episodes", "20"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["length_mean"] == 200.0
    assert -1500.0 < result["return_mean"] < -900.0
    assert main(["evaluate", "--policy", "random"]) == 2
    assert "Add --env ENV_ID" in capsys.readouterr().err


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    """Without an account, metrics and histograms are logged in the run folder."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    with PPO("CartPole-v1", **SMALL, num_envs=2, wandb="proximo-test") as agent:
        agent.learn(64, run_dir=run)
    (log,) = (run / "wandb").glob("offline-run-*/*.wandb")
    written = log.read_bytes()
    assert b"losses/policy" in written
    assert b"histograms/ratio" in written


def test_missing_packages_are_reported_before_anything_is_written(tmp_path, monkeypatch, capsys):
    """Weights & Biases and PyAV are required only if requested."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "av", None)
    for flag, package in ((["--wandb", "mine"], "proximo[wandb]"), (["--capture-video"], "proximo[video]")):
        run = tmp_path / "run"
        assert main(["train", "CartPole-v1", *TINY, *flag, "--run-dir", str(run)]) == 2
        assert package in capsys.readouterr().err
        assert not run.exists()


def test_videos_are_recorded_during_and_after_training(tmp_path):
    """10 iterations with a video every 4: after the 4th, the 8th and the last iteration."""
    run = tmp_path / "run"
    command = ["train", "CartPole-v1", *TINY, "--num-envs", "2", "--capture-video", "--video-interval", "4"]
    assert main([*command, "--total-timesteps", "320", "--run-dir", str(run)]) == 0
    videos = sorted(path.name for path in (run / "videos").iterdir())
    assert videos == [f"step_{step:012d}.mp4" for step in (128, 256, 320)]


def test_a_failed_recording_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    """It is reported, and the run completes and has a checkpoint."""
    run = tmp_path / "run"
    with PPO("CartPole-v1", **SMALL, num_envs=2, capture_video=True) as agent:
        monkeypatch.setattr("proximo.ppo.MAX_TRAINING_FRAMES", 1)  # invalid: a video has at least two frames
        agent.learn(64, run_dir=run)
    assert "could not be recorded: max_frames must be" in capsys.readouterr().err
    assert list((run / "checkpoints").iterdir())


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_ratios_compare_the_policies_before_and_after_the_update(backend):
    """With learning rate 0 every ratio is 1; with a huge one, ratios are clipped at e¹⁰."""
    for rate, lowest, highest in ((0.0, 0.9999, 1.0001), (1e6, 0.0, np.exp(10.0))):
        settings = {**SMALL, "num_envs": 2, "backend": backend, "learning_rate": rate, "max_grad_norm": None}
        with PPO("Pendulum-v1", **settings) as agent:
            rollout, hyper = act_rollout(agent.learner, seed=0), hyper_at(agent.config, 0)
            before = agent.learner.inspect_rollout(rollout, hyper)
            agent.learner.update(rollout, minibatch_order(rollout.valid, 1, 2, np.random.default_rng(0)), hyper)
            after = agent.learner.inspect_rollout(rollout, hyper, before["carry"])
            ratio = histograms_of(rollout, agent.config, before, after)["ratio"]
        assert len(ratio) == rollout.valid.sum()
        assert lowest <= ratio.min() <= ratio.max() <= highest * (1 + 1e-6)
        assert np.isfinite(ratio).all()


def test_a_run_without_iterations_writes_a_checkpoint(tmp_path):
    """A second `learn` up to the same total has no iteration, so nothing is plotted."""
    with PPO("CartPole-v1", **SMALL, num_envs=2, total_timesteps=64) as agent:
        agent.learn().learn(run_dir=tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    assert not (tmp_path / "run" / "curves.png").exists()


def test_environment_keywords_survive_every_file(tmp_path):
    """config.yaml and the manifest store infinity, NumPy numbers and tuples."""
    run = tmp_path / "run"
    given = {"healthy_z_range": (np.float64(0.7), np.inf), "frame_skip": np.int64(4)}
    with PPO("Hopper-v5", **SMALL, num_envs=2, env_kwargs=given) as agent:
        agent.learn(32, run_dir=run)
    plain = {"healthy_z_range": [0.7, np.inf], "frame_skip": 4}
    assert yaml.safe_load((run / "config.yaml").read_text())["env_kwargs"] == plain
    assert PPO.load(run).config.env_kwargs == plain
    assert main(["evaluate", str(run), "--episodes", "1", "--json"]) == 0
    with pytest.raises(UserError, match=r"`env_kwargs` is .*; expected a mapping of names to numbers"):
        PPO("CartPole-v1", env_kwargs={"a": object()})


def test_a_tracker_that_fails_to_start_leaves_no_folder(tmp_path, monkeypatch):
    """The same command works once the problem is fixed."""
    wandb = pytest.importorskip("wandb")

    def refuse(**settings):
        raise wandb.Error("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with PPO("CartPole-v1", **SMALL, num_envs=2, wandb="mine") as agent, pytest.raises(UserError, match="wandb login"):
        agent.learn(32, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_default_video_file(tmp_path, capsys):
    """Videos go to videos/ of the run, or beside a checkpoint, never into it; FILE must end in .mp4."""
    run = tmp_path / "run"
    with PPO("CartPole-v1", **SMALL, num_envs=2) as agent:
        agent.learn(32, run_dir=run)
        agent.save(tmp_path / "saved")
    for path, video in (
        (run, run / "videos" / "trained-seed0.mp4"),
        (next((run / "checkpoints").iterdir()), run / "videos" / "trained-seed1.mp4"),
        (tmp_path / "saved", tmp_path / "saved-trained-seed0.mp4"),
    ):
        seed = video.stem[-1]
        assert main(["evaluate", str(path), "--episodes", "1", "--record", "--seed", seed]) == 0
        assert video.exists()
    assert main(["evaluate", "--record", str(run)]) == 2
    assert "put RUN before --record" in capsys.readouterr().err


def test_a_window_that_cannot_open_gives_one_clear_message(tmp_path, monkeypatch, capsys):
    """There is no display, or pygame is not installed."""
    with PPO("CartPole-v1", **SMALL, num_envs=2) as agent:
        agent.learn(32, run_dir=tmp_path / "run")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--episodes", "1", "--render"]) == 2
    assert "no display" in capsys.readouterr().err
    monkeypatch.setenv("DISPLAY", ":99")
    monkeypatch.setitem(sys.modules, "pygame", None)
    assert main(["evaluate", str(tmp_path / "run"), "--episodes", "1", "--render"]) == 2
    assert "cannot be shown in a window" in capsys.readouterr().err
