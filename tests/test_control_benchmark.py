"""The runner and the report of `benchmarks/control`: nothing runs twice, and the statistics are those of rows made by hand."""

import inspect
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch as th
from stable_baselines3 import PPO

from sb3_r2vpo import R2VPO
from sb3_r2vpo.zoo.cli import main as command_line

pytest.importorskip("envpool")
pytest.importorskip("rliable")
FOLDER = Path(__file__).parents[1] / "benchmarks" / "control"
sys.path.insert(0, str(FOLDER))

import benchmark  # noqa: E402
import experiment  # noqa: E402
import report  # noqa: E402


@pytest.fixture
def evaluations(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "evaluations.csv"
    monkeypatch.setattr(benchmark, "EVALUATIONS", path)
    return path


def rows_of(method: str, task: str, seed: int, final: float) -> list[dict[str, object]]:
    """A run that rises linearly to its final score."""
    n = experiment.N_EVALUATIONS
    return [
        {"method": method, "task": task, "seed": seed, "mean_return": final * 1000 * (i + 1) / n, "cpu_seconds": i}
        for i in range(n)
    ]


def test_finished_runs_are_not_run_again(evaluations):
    benchmark.append_rows(evaluations, rows_of("ppo", "cheetah-run", 1, 0.5))
    benchmark.append_rows(evaluations, rows_of("r2vpo", "cheetah-run", 0, 0.5))
    assert len(evaluations.read_text().splitlines()) == 1 + 2 * experiment.N_EVALUATIONS
    open_runs = set(benchmark.planned_runs(["ppo", "r2vpo"], ["cheetah-run"], 2)) - benchmark.finished(
        evaluations, benchmark.Run
    )
    assert open_runs == {benchmark.Run(0, "cheetah-run", "ppo"), benchmark.Run(1, "cheetah-run", "r2vpo")}


def test_every_method_has_a_first_seed_before_any_has_a_second():
    seeds = [run.seed for run in benchmark.planned_runs(experiment.METHODS, experiment.TASKS, None)]
    assert seeds == sorted(seeds)
    assert len(seeds) == len(experiment.TASKS) * sum(benchmark.N_SEEDS.values())


def test_a_run_is_reproducible_and_evaluated_at_even_intervals():
    method = experiment.METHODS["r2vpo_off"]
    settings = {**method.settings("cartpole-swingup"), "n_envs": 4, "n_steps": 32, "batch_size": 64, "n_epochs": 1}
    first, second = (experiment.train(method.algorithm, settings, "cartpole-swingup", 0, 2560) for _ in range(2))
    assert [row["timesteps"] for row in first] == [128 * i for i in range(1, 21)]
    assert {(row["task"], row["seed"]) for row in first} == {("cartpole-swingup", 0)}
    assert first[0]["ratio_variance"] == ""  # before the first update
    assert float(first[-1]["ratio_variance"]) > 0
    for row in (*first, *second):
        del row["cpu_seconds"]
    assert first == second


@pytest.mark.parametrize("name", ["r2vpo", "r2vpo_off"])
def test_the_command_line_trains_what_the_benchmark_trains(name, tmp_path, monkeypatch):
    """Bit for bit, so that `r2vpo train` has the table's numbers, whatever its evaluations are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(th, "set_num_threads", lambda num_threads: None)
    method = experiment.METHODS[name]
    model = experiment.make_model(method.algorithm, {**method.settings("cheetah-run"), "compile": False}, "cheetah-run", 3)
    model.learn(3 * 4096)
    run = ["train", "--algo", name, "--env", "dm_control/cheetah-run-v0", "--vec-env", "envpool", "--seed", "3"]
    command_line([*run, "-n", str(3 * 4096), "--eval-freq", "4096", "--eval-episodes", "1"])
    saved = method.algorithm.load(f"logs/{name}/dm_control-cheetah-run-v0_1/dm_control-cheetah-run-v0.zip")
    assert model._n_updates == saved._n_updates > 0
    for weights, saved_weights in zip(model.policy.parameters(), saved.policy.parameters(), strict=True):
        assert th.equal(weights, saved_weights)


def test_hard_tasks_are_run_with_their_networks(monkeypatch):
    monkeypatch.setattr(experiment, "N_EVALUATIONS", 1)
    monkeypatch.setattr(experiment, "N_EVAL_EPISODES", 1)
    method = experiment.METHODS["ppo"]
    settings = {**method.settings("humanoid-run"), "n_envs": 2, "n_steps": 16, "batch_size": 16, "n_epochs": 1}
    (row,) = experiment.train(*experiment.in_our_loop(method.algorithm, settings), "humanoid-run", 0, 32)
    assert row["timesteps"] == 32
    assert row["mean_return"] >= 0


def test_ppo_in_our_loop_gets_the_returns_of_sb3s_ppo(monkeypatch):
    monkeypatch.setattr(experiment, "N_EVALUATIONS", 2)
    method = experiment.METHODS["ppo"]
    settings = {**method.settings("cheetah-run"), "n_envs": 4, "n_steps": 64, "batch_size": 64, "n_epochs": 5}
    algorithm, arguments = experiment.in_our_loop(method.algorithm, settings)
    assert (method.algorithm, algorithm) == (PPO, R2VPO)
    sb3s = experiment.train(PPO, settings, "cheetah-run", 0, 2048)
    ours = experiment.train(algorithm, arguments, "cheetah-run", 0, 2048)
    returns = [[(row["mean_return"], row["std_return"], row["std"]) for row in rows] for rows in (sb3s, ours)]
    assert returns[0] == returns[1]
    assert returns[0][0] != returns[0][1]


@pytest.mark.parametrize("task", ["cheetah-run", "dog-run"])
def test_methods_share_ppos_settings_but_for_their_own(task):
    ppo = experiment.METHODS["ppo"].settings(task)
    for name in ("spo", "exact_kl", "r2vpo_fixed"):
        method = experiment.METHODS[name]
        assert method.settings(task) == {**{key: value for key, value in ppo.items() if key != "clip_range"}, **method.own}


# Those with policies or networks of their own have no others for the hard tasks
@pytest.mark.parametrize(
    "name", [name for name, method in experiment.METHODS.items() if not {"policy", "policy_kwargs"} & method.own.keys()]
)
def test_a_method_has_one_setting_for_the_ten_tasks_and_other_networks_for_hard_ones(name):
    method = experiment.METHODS[name]
    first, *others = (method.settings(task) for task in experiment.TASKS)
    assert all(settings == first for settings in others)
    for task in experiment.HARD_TASKS:
        networks = {"policy": "sb3_r2vpo.r2vpo.LayerNormMlpPolicy", "policy_kwargs": {"net_arch": [256, 256]}}
        # R2VPO's and R2VPOOff's critic has not been run on them
        before = {"r2vpo": "r2vpo_joint", "r2vpo_off": "r2vpo_off_short"}
        others = experiment.METHODS[before.get(method.shipped, name)].settings(experiment.TASKS[0])
        assert method.settings(task) == {**others, **method.own, **networks}


def test_every_method_has_as_many_finalists_and_they_take_its_arguments():
    assert len({len(finalists) for finalists in benchmark.FINALISTS.values()}) == 1
    for name, finalists in benchmark.FINALISTS.items():
        algorithm = benchmark.TUNED[name].algorithm
        for settings in finalists.values():
            arguments = {name for base in algorithm.__mro__ for name in inspect.signature(base).parameters}
            assert set(settings) <= {*arguments, "n_envs"}
            assert "learning_rate" in experiment.split_schedules(settings)[0]


def test_the_final_round_would_run_the_settings_of_its_rows(monkeypatch):
    """Whatever the files in `hyperparams/` have become."""
    monkeypatch.setattr(benchmark, "train", lambda algorithm, settings, *run: [{"settings": settings, "mean_return": 0}])
    rows = pd.read_csv(benchmark.FINALS)
    rows = rows[[name in benchmark.FINALISTS[method] for method, name in zip(rows.method, rows.finalist, strict=True)]]
    assert set(rows.method) == set(benchmark.FINALISTS)
    for run, recorded in zip(rows[list(benchmark.Final._fields)].itertuples(index=False), rows.settings, strict=True):
        (row,) = benchmark.execute_final(benchmark.Final(*run))
        # An argument that came later, with a value that leaves all as it was
        settings = experiment.old_names(row["settings"])
        assert not settings.pop("compensate_entropy", False)
        assert settings == json.loads(recorded)


def test_report_on_rows_made_by_hand(monkeypatch):
    monkeypatch.setattr(report, "N_BOOTSTRAPS", 50)
    rows = [
        {name: str(value) for name, value in row.items()}
        for task in experiment.TASKS
        for seed in range(3)
        for method, final in (("ppo", 0.5), ("r2vpo", 0.75))
        for row in rows_of(method, task, seed, final)
    ]
    # A seed that is missing on other tasks takes no part
    rows += [{name: str(value) for name, value in row.items()} for row in rows_of("ppo", "cheetah-run", 3, 0.9)]
    scores = report.complete_scores(rows)
    assert {method: curves.shape for method, curves in scores.items()} == {"ppo": (3, 10, 20), "r2vpo": (3, 10, 20)}
    np.testing.assert_allclose(scores["r2vpo"][:, :, -1], 0.75)
    header, ppo, r2vpo = report.summary_table(scores, {"ppo": 1.0, "r2vpo": 2.0})
    columns = dict(zip(header, r2vpo, strict=True))
    assert dict(zip(header, ppo, strict=True))["IQM (95% interval)"] == "0.500 (0.500 to 0.500)"
    assert columns["over PPO"] == "1.50"
    assert columns["P(better than PPO)"] == "1.00 (1.00 to 1.00)"
    # 0.5 is two thirds of 0.75: the first evaluation beyond it is the 14th of 20
    assert columns["steps to PPO's IQM"] == "70%"
    assert columns["best minus final"] == "0.000"
    # The mean of 0.8, 0.85, ... and 1 times the last one
    assert columns["IQM of the last quarter"] == "0.675"
    # Half of the run's way is half of its rise from 0.05 to 1 times the last one
    assert columns["IQM half of the way"] == "0.375"
    one_draw = {**scores, "r2vpo": scores["r2vpo"].copy()}
    one_draw["r2vpo"][0, experiment.TASKS.index("fish-swim"), -1] = 0.5
    header, *by_task, overall = report.pairs_table(one_draw)
    assert header == ["task", "R2VPO better than PPO"]
    assert [p for _, p in by_task] == ["83%" if task == "fish-swim" else "100%" for task, _ in by_task]
    assert overall[1].startswith("0.98 (")
    assert report.annealed_table(scores)[1:] == [["PPO", "", "", ""], ["R2VPO", "", "", ""]]
    annealed = report.annealed_table({**scores, "ppo_annealed": 1.25 * scores["ppo"]})
    assert annealed[1:] == [
        ["PPO", "0.80", "0.00 (0.00 to 0.00)", "not reached"],
        ["PPO, annealed entropy bonus", "1.00", "", "100%"],
        ["R2VPO", "1.20", "1.00 (1.00 to 1.00)", "85%"],
    ]


def test_report_writes_tables_and_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "N_BOOTSTRAPS", 20)
    for name in ("README.md", "TUNING.md"):
        (tmp_path / name).write_text((FOLDER / name).read_text())
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "finals.csv").write_text(
        "task,method,finalist,mean_return\nwalker-run,r2vpo,best,80\ncheetah-run,r2vpo,best,600\nwalker-run,ppo,best,82\n"
    )
    (tmp_path / "results" / "coefficients.csv").write_text(
        "seed,task,method,coefficient,mean_return\n0,walker-run,spo,0.1,50\n0,cheetah-run,spo,0.1,500\n0,cheetah-run,spo,0.2,400\n"
    )
    (tmp_path / "results" / "networks.csv").write_text(
        "seed,task,method,network,mean_return\n301,walker-run,ppo_annealed,wide,700\n302,walker-run,ppo_annealed,wide,600\n"
    )
    (tmp_path / "results" / "exploration.csv").write_text(
        "seed,task,method,exploration,mean_return\n301,walker-run,r2vpo_off,pink noise,475\n"
    )
    (tmp_path / "results" / "critics.csv").write_text(
        "seed,task,method,critic,mean_return\n301,walker-run,r2vpo_off,64 rollouts,384\n"
    )
    (tmp_path / "results" / "cost.csv").write_text(
        "arm,wall_us_a_step,cpu_us_a_step,over_sb3_ppo_wall,over_sb3_ppo_cpu\nPPO,200.4,100,1,1\nR2VPO,100,90,0.5,0.9\n"
    )
    # A run of twenty evaluations that ends at 700, 600 in the last quarter, where that of the comparison is at 750 and 675
    returns = [*[0] * 15, 500, 600, 600, 600, 700]
    runs = "".join(f'r2vpo,dm_control/walker-run-v0,1,"{{""compile"": true}}",{score}\n' for score in returns)
    (tmp_path / "results" / "command_line.csv").write_text(f"algo,env,seed,hyperparams,mean_return\n{runs}")
    for task in experiment.TASKS:
        runs = [
            (method, seed, final)
            for method, final in (("ppo", 0.5), ("r2vpo", 0.75), ("r2vpo_joint", 0.75))
            for seed in (0, 1)
        ]
        runs += [("spo", 0, 0.9)]
        # Apart enough for intervals to depend on the bootstrap's draws
        runs += [
            (method, seed, (len(task) + 7 * seed) % 10 / 10)
            for method in ("r2vpo_off", "r2vpo_off_short")
            for seed in range(4)
        ]
        for method, seed, final in runs:
            benchmark.append_rows(tmp_path / "results" / "evaluations.csv", rows_of(method, task, seed, final))
        for seed in range(2):
            for final, (method, file) in zip((0.25, 0.35, 0.8), report.VARIANTS.values(), strict=True):
                benchmark.append_rows(tmp_path / "results" / file, rows_of(method, task, seed, final))
    texts = []
    for _ in range(2):  # the second time in place of the first, and to the last digit
        report.main()
        texts.append("".join((tmp_path / name).read_text() for name in ("README.md", "TUNING.md")))
    text = texts[0]
    assert texts[1] == text
    assert text.count("| R2VPO | 2 | 0.750 (0.750 to 0.750) | 1.50 |") == 1
    # One seed has no interval
    assert "| SPO | 1 |" not in text
    assert text.count("| PPO | best | 82 |  |  |\n| R2VPO | best | 80 | 600 | 340 |") == 1
    assert text.count("| SPO | 0.1 | 50 | 500 | 275 |\n| SPO | 0.2 |  | 400 |  |") == 1
    # The mean of two seeds
    assert text.count("| PPO, annealed entropy bonus | wide | 650 | 650 |") == 1
    assert text.count("| R2VPOOff | pink noise | 475 | 475 |") == 1
    assert text.count("| R2VPOOff | 64 rollouts | 384 | 384 |") == 1
    assert text.count("| PPO | 200 | 100 | 1.00 | 1.00 |\n| R2VPO | 100 | 90 | 0.50 | 0.90 |") == 1
    assert text.count("| R2VPO | walker-run | compile:True | 1 | 700 (700) | 750 (750) | 600 (600) | 675 (675) |") == 1
    assert text.count("| PPO |" + " 500 ± 0 |" * len(experiment.TASKS)) == 1
    assert text.count("| R2VPO |" + " **750 ± 0** |" * len(experiment.TASKS)) == 1
    assert text.count("| IQM (95% interval) | 0.250 (0.250 to 0.250) | 0.350 (0.350 to 0.350) | ") == 1
    assert text.count(" | 0.800 (0.800 to 0.800) | 0.750 (0.750 to 0.750) |") == 1
    # Of the 40 scores with short rollouts, one for each task and seed, 26 are beyond 0.25 and 22 beyond 0.35
    assert re.search(
        r"\| P\(better as it is\) \| 0\.65 \([^|]+\) \| 0\.55 \([^|]+\) \|  \| 0\.00 \(0\.00 to 0\.00\) \|  \|", text
    )
    pairs = ("R2VPO better than PPO", "R2VPOOff better than PPO", "R2VPOOff better than R2VPO")
    assert len(re.findall("".join(rf"\| {pair} \| .* \|\n" for pair in pairs), text)) == 1
    assert text.count("| R2VPO better than PPO |" + " 100% |" * len(experiment.TASKS)) == 1
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"tasks.png", "aggregates.png"}


def test_hard_tasks_are_reported_apart():
    rows = [row for seed in range(2) for row in rows_of("r2vpo", "dog-run", seed, 0.1)]
    rows[-1]["mean_return"] = 50.0
    assert report.hard_table(rows)[1:] == [["dog-run", "R2VPO", "100, 95", "100, 50"]]


def test_either_policy_is_compared_on_the_seeds_that_have_both():
    rows = [row for seed in (0, 1, 2) for row in rows_of("r2vpo_off_short", "walker-run", seed, 0.1 * (seed + 1))]
    rows += [row for seed in (1, 2, 3) for row in rows_of("r2vpo_off_short_censored", "walker-run", seed, 0.1 * (seed + 3))]
    columns = {"`MlpPolicy`": "", "`CensoredMlpPolicy`": "_censored"}
    expected = ["walker-run", "R2VPOOff, short rollouts", "1, 2", "250 (200, 300)", "450 (400, 500)"]
    rows = [{**row, "seed": str(row["seed"])} for row in rows]
    assert report.policies_table(rows, columns)[1:] == [expected]
    # With all tasks, the IQM of the seeds that all of them have
    rows += [
        {**row, "seed": "2"}
        for task in report.TASKS
        for method, score in (("r2vpo_off_short", 0.1), ("r2vpo_off_short_censored", 0.2))
        for row in rows_of(method, task, 2, score)
        if task != "walker-run"
    ]
    table = report.policies_table(rows, columns)
    assert table[0] == ["task", "method", "seeds", "`MlpPolicy`", "`CensoredMlpPolicy`"]
    assert table[-1] == ["IQM", "R2VPOOff, short rollouts", "2", "0.100", "0.200"]


def test_every_value_of_a_coefficient_takes_the_place_of_the_methods_own():
    for name, values in benchmark.COEFFICIENTS.items():
        method = experiment.METHODS[name]
        for settings in values.values():
            assert settings.keys() <= method.own.keys()
        assert any(settings.items() <= method.own.items() for settings in values.values())
