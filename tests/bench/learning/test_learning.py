"""The benchmark itself: roll-outs, hand-over of policies, resuming, statistics."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lom.config import TrainConfig
from lom.evaluation import evaluate, make_env
from tests.bench.learning import baselines, report, tasks
from tests.bench.learning.baselines import BaselineError, train_baseline
from tests.bench.learning.intervals import estimate, interquartile_mean, mean
from tests.bench.learning.methods import Budget, d3rlpy_config, lom_config, settings_of
from tests.bench.learning.results import Key, Results, key_of
from tests.bench.learning.rollouts import RANDOM, GivenPolicy, roll_out
from tests.bench.learning.runner import missing_jobs, run_jobs
from tests.bench.learning.tasks import DATA_VARIABLE, TASKS, MissingDataError, RollOut, Scale

FORK = TASKS["fork"]

needs_given_data = pytest.mark.skipif(DATA_VARIABLE not in os.environ, reason=f"{DATA_VARIABLE} names no folder")
needs_d3rlpy = pytest.mark.skipif(not baselines.PYTHON.is_file(), reason="the environment with d3rlpy is not there")


def write_policy(path: Path, *, head: str, **weights: Any) -> None:
    """A linear policy of two observations and one action that answers 2 o_0 - o_1 + 0.5 before its head."""
    values: dict[str, Any] = {
        "env": "lom/Fork-v0",
        "head": head,
        "act": "relu",
        "n_hidden": 0,
        "Wm": np.array([[2.0, -1.0]]),
        "bm": np.array([0.5]),
        "obs_mean": np.zeros(2),
        "obs_inv": np.ones(2),
        "obs_clip": np.inf,
        "in_clip": np.inf,
        "ls_clip": np.array([-20.0, 2.0]),
    }
    np.savez(path, **(values | weights))


# -------------------------------------------------------------------- roll-outs


@pytest.mark.parametrize(
    ("head", "expected"), [("tanh", np.tanh(0.6)), ("clip", 0.6), ("none", 0.6), ("tanh_gaussian", np.tanh(0.6))]
)
def test_a_policy_answers_by_its_head(tmp_path: Path, head: str, expected: float) -> None:
    write_policy(tmp_path / "p.npz", head=head)
    action = GivenPolicy.load(tmp_path / "p.npz").act(np.array([0.1, 0.1]), None)
    assert action == pytest.approx([expected])


def test_observations_are_normalised_and_hidden_layers_applied(tmp_path: Path) -> None:
    write_policy(
        tmp_path / "p.npz",
        head="clip",
        n_hidden=1,
        W0=np.array([[1.0, 0.0], [-1.0, 0.0]]),
        b0=np.zeros(2),
        obs_mean=np.array([1.0, 0.0]),
        obs_inv=np.array([0.5, 1.0]),
        Wm=np.array([[0.25, 0.5]]),
        bm=np.zeros(1),
    )
    policy = GivenPolicy.load(tmp_path / "p.npz")
    # (3 - 1) / 2 = 1: relu of (1, -1) is (1, 0); (-1 - 1) / 2 = -1: (0, 1).
    assert policy.act(np.array([3.0, 7.0]), None) == pytest.approx([0.25])
    assert policy.act(np.array([-1.0, 7.0]), None) == pytest.approx([0.5])


def test_what_leaves_the_bounds_is_clipped_and_noise_is_drawn_only_when_asked(tmp_path: Path) -> None:
    write_policy(tmp_path / "p.npz", head="clip_gaussian", std=np.array([0.1]))
    policy = GivenPolicy.load(tmp_path / "p.npz")
    assert policy.act(np.array([5.0, 0.0]), None) == pytest.approx([1.0])
    rng = np.random.default_rng(0)
    drawn = np.array([policy.act(np.zeros(2), rng) for _ in range(400)])
    assert drawn.mean() == pytest.approx(0.5, abs=0.02)
    assert drawn.std() == pytest.approx(0.1, abs=0.01)


def test_equal_rows_or_equal_episodes_each_cut_off_row_with_the_action_that_would_have_followed(tmp_path: Path) -> None:
    for name, target in (("left", -1.0), ("right", 0.1)):
        write_policy(tmp_path / f"{name}.npz", head="clip", Wm=np.zeros((2, 2)), bm=np.array([target, 0.0]))
    policies = ["left", "right", RANDOM]
    rows = roll_out("lom/Fork-v0", policies, tmp_path, rows=301, seed=0)
    assert np.bincount(rows["sources"]).tolist() == [101, 100, 100]
    ends = rows["terminals"] | rows["timeouts"]
    assert not (rows["terminals"] & rows["timeouts"]).any()
    # Inside an episode a' is what was done next, and s' where it was done.
    inside = np.flatnonzero(~ends)
    assert np.array_equal(rows["next_actions"][inside], rows["actions"][inside + 1])
    assert np.array_equal(rows["next_observations"][inside], rows["observations"][inside + 1])
    cut = rows["timeouts"] & (rows["sources"] == 1)
    assert cut.any()
    assert rows["next_actions"][cut] == pytest.approx(np.tile([0.1, 0.0], (cut.sum(), 1)))
    by_episode = roll_out("lom/Fork-v0", policies, tmp_path, rows=301, mixing="episodes", seed=0)
    episodes = np.concatenate([[0], np.flatnonzero(by_episode["terminals"] | by_episode["timeouts"])[:-1] + 1])
    counts = np.bincount(by_episode["sources"][episodes], minlength=3)
    assert counts.max() - counts.min() <= 1


@needs_given_data
@pytest.mark.parametrize(
    ("name", "sampled", "expected"),
    [("Hopper_sb3_a2c", True, (906.8, 187.5)), ("HalfCheetah_sb3_ppo", False, (5882.0, 18.9))],
)
def test_returns_that_others_measured_come_out_again(name: str, sampled: bool, expected: tuple[float, float]) -> None:
    policy = GivenPolicy.load(tasks.given_data() / "policies" / f"{name}.npz")
    rng = np.random.default_rng(0) if sampled else None
    env, returns = make_env(policy.env), []
    for episode in range(10):
        observation, ended, total = env.reset(seed=2000 + episode)[0], False, 0.0
        while not ended:
            observation, reward, terminal, truncated, _ = env.step(policy.act(observation, rng))
            total, ended = total + float(reward), terminal or truncated
        returns.append(total)
    assert np.mean(returns) == pytest.approx(expected[0], abs=0.1)
    assert np.std(returns) == pytest.approx(expected[1], abs=0.1)


def test_recipes_name_policies_of_their_environment(tmp_path: Path) -> None:
    for name in ("Hopper_b", "Hopper_a", "Walker2d_a"):
        (tmp_path / f"{name}.npz").touch()
    assert RollOut(policies=(RANDOM, "*")).names("Hopper", tmp_path) == [RANDOM, "Hopper_a", "Hopper_b"]
    assert RollOut(policies=("b",)).names("Hopper", tmp_path) == ["Hopper_b"]


def test_missing_files_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tasks, "CACHE", tmp_path)
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(MissingDataError, match="LOM_BENCH_DATA"):
        TASKS["hopper-medium-like"].transitions(0)


def test_generated_data_differs_by_seed_and_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tasks, "CACHE", tmp_path)
    first, second = TASKS["bandit4"].transitions(0), TASKS["bandit4"].transitions(1)
    assert first.fingerprint != second.fingerprint
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert TASKS["bandit4"].transitions(0).fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written


def test_scores_are_0_at_random_and_100_at_expert() -> None:
    scale = Scale(random=-50.0, expert=-10.0)
    assert [scale(value) for value in (-50.0, -10.0, -30.0)] == [0.0, 100.0, 50.0]


# -------------------------------------------------------------------- methods


def test_every_method_has_the_same_rows_sizes_and_gradient_steps() -> None:
    budget = Budget.of(FORK)
    ours, theirs = lom_config(FORK, "lom", budget, 3), d3rlpy_config(FORK, "td3_bc", budget, 3)
    assert theirs["steps"] == ours.mixture_steps + ours.steps
    assert tuple(theirs["hidden"]) == ours.hidden
    assert theirs["fields"]["batch_size"] == ours.batch
    assert ours.held_out_share == 0
    assert lom_config(FORK, "awr", budget, 0).imitated_actions == "data"


@needs_d3rlpy
@pytest.mark.timeout(300)  # it imports slowly
@pytest.mark.filterwarnings("ignore:.*torch.jit.load:DeprecationWarning")
def test_a_policy_of_d3rlpy_answers_here_as_it_did_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tasks, "CACHE", tmp_path)
    transitions = FORK.transitions(0)
    config = d3rlpy_config(FORK, "iql", Budget(mixture_steps=1, steps=5, rows=0), seed=0)
    trained = train_baseline(transitions, config, checkpoints=2)  # refuses answers that differ in one bit
    assert len(trained.policies) == 2
    actions = trained.policies[-1](transitions.observations[:200])
    assert actions.shape == (200, 2)
    assert np.abs(actions).max() <= 1
    assert trained.policies[-1](transitions.observations[:7]) == pytest.approx(actions[:7], abs=1e-6)
    assert not np.array_equal(actions, trained.policies[0](transitions.observations[:200]))
    evaluate(trained.policies[-1], FORK.env, episodes=2, seed=0)


def test_without_d3rlpy_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(baselines, "PYTHON", tmp_path / "python")
    monkeypatch.setattr(tasks, "CACHE", tmp_path)
    with pytest.raises(BaselineError, match="make bench-learning"):
        train_baseline(TASKS["bandit4"].transitions(0), {}, checkpoints=1)


# -------------------------------------------------------------------- results


def record(seed: int, value: float, *, settings: str = "a", method: str = "lom", task: str = "fork") -> dict[str, Any]:
    acted = {"curve": [value + 1, value], "episodes": 1, "return_mean": value, "return_std": 0.0, "success_rate": None}
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "settings": settings,
        "mixture_steps": 1,
        "steps": 2,
        "rows": 3,
        "train_cpu_s": 4.0,
        "variants": {"actor": acted},
    }


def test_results_stay_and_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    results = Results(path)
    budget = Budget.of(FORK, steps=2, mixture_steps=1)
    digest = results.digest_of(settings_of(FORK, "lom", budget))
    results.append(record(1, 3.0, settings=digest))
    read = Results(path)
    assert Key("fork", "lom", 1, digest) in read
    jobs = missing_jobs(read, ["fork"], ["lom"], range(3), steps=2, mixture_steps=1)
    assert [job.seeds for job in jobs] == [(0,), (2,)]
    together = missing_jobs(read, ["fork"], ["lom", "cql"], range(4), steps=2, mixture_steps=1, seeds_at_once=2)
    assert [job.seeds for job in together] == [(0, 2), (3,), (0,), (1,), (2,), (3,)]
    assert len(missing_jobs(read, ["fork"], ["lom"], range(3), steps=3, mixture_steps=1)) == 3


def test_settings_from_before_an_option_existed_are_those_with_its_default(tmp_path: Path) -> None:
    settings = dict(settings_of(FORK, "lom", Budget.of(FORK)))
    older = {name: value for name, value in settings.items() if name != "imitation_samples"}
    results = Results(tmp_path / "results.jsonl")
    digest = results.digest_of(older)
    assert settings["imitation_samples"] == TrainConfig().imitation_samples
    assert Results(tmp_path / "results.jsonl").digest_of(settings) == digest
    assert results.digest_of(settings | {"imitation_samples": 8}) != digest
    assert results.digest_of(settings | {"batch": 7}) != digest


def test_settings_of_an_option_that_is_gone_are_not_todays(tmp_path: Path) -> None:
    settings = dict(settings_of(FORK, "lom", Budget.of(FORK)))
    results = Results(tmp_path / "results.jsonl")
    assert results.digest_of(settings | {"novelty": 0.5}) != results.digest_of(settings)


@pytest.mark.timeout(300)  # it starts processes that load torch
def test_a_run_keeps_each_result_and_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    jobs = missing_jobs(results, ["bandit4"], ["lom"], range(2), steps=10, mixture_steps=10, seeds_at_once=2)
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    jobs = [*missing_jobs(results, ["hopper-real-mix"], ["lom"], range(1)), *jobs]
    failures = run_jobs(jobs, results, Console(quiet=True))
    assert len(failures) == 1
    assert "LOM_BENCH_DATA" in failures[0]
    kept, other = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines())
    assert key_of(kept) == ("bandit4", "lom", 0, jobs[-1].settings)
    assert key_of(other) == ("bandit4", "lom", 1, jobs[-1].settings)
    assert kept["data"] != other["data"]
    assert kept["variants"] != other["variants"]
    assert set(kept["variants"]) == {"actor", "greedy_mode", "bc"}
    assert len(kept["variants"]["actor"]["curve"]) == 10
    assert kept["rows"] == 10_000
    assert kept["train_cpu_s"] > 0
    assert kept["seeds_at_once"] == 2


# -------------------------------------------------------------------- statistics and report


def test_interquartile_mean_leaves_a_quarter_out_at_both_ends() -> None:
    assert interquartile_mean(np.array([100.0, 1.0, 2.0, 3.0, 4.0, -100.0, 5.0, 0.0])) == pytest.approx(2.5)
    assert interquartile_mean(np.array([1.0, 2.0, 6.0])) == pytest.approx(3.0)


def test_intervals_cover_the_mean_and_resample_within_tasks() -> None:
    rng = np.random.default_rng(0)
    of_mean = estimate([rng.normal(size=400)], mean)
    assert of_mean.high - of_mean.low == pytest.approx(2 * 1.96 / 20, rel=0.1)
    # Two tasks far apart, each without spread: resampling seeds within tasks leaves nothing to vary.
    apart = estimate([np.zeros(4), np.full(4, 100.0)], mean)
    assert (apart.low, apart.value, apart.high) == (50.0, 50.0, 50.0)


def test_tables_hold_the_newest_settings_alone_and_mark_the_leaders() -> None:
    old = [record(seed, -8.28, settings="old") for seed in range(3)]
    new = [record(seed, value) for seed, value in enumerate([3.47, 3.47 - 1.175, 3.47])]
    other = [record(seed, value, method="awr") for seed, value in enumerate([3.0, 3.1, 3.2])]
    worse = [record(seed, 0.0, method="cql", settings="b") for seed in range(2)]
    for result in worse:
        result["variants"] = {"policy": result["variants"]["actor"]}
    cells = report.cells_of([*old, *new, *other, *worse])
    assert cells["fork"]["lom"].last == pytest.approx([100, 90, 100])
    assert cells["fork"]["lom"].best == pytest.approx([100 + 100 / 11.75, 90 + 100 / 11.75, 100 + 100 / 11.75])
    # lom: mean 96.7, interval from 90; awr 96.9 leads by a hair, lom lies within its interval; cql does not.
    assert report.leaders(cells["fork"]) == {"lom", "awr"}
    cells["fork"]["bc"] = cells["fork"]["awr"]
    assert not report.is_below_cloning(cells["fork"], "lom")  # 96.7; awr is [96.0, 97.7]
    assert report.is_below_cloning(cells["fork"], "cql")
    text = report.render(cells)
    assert "**96.7 [90.0, 100.0]**" in text
    assert "| 70.5 [70.5, 70.5] |" in text


def test_options_do_not_compete_with_methods() -> None:
    better = [record(seed, 3.6, method="lom-no-limits") for seed in range(2)]
    cells = report.cells_of([*[record(seed, 3.47) for seed in range(2)], *better])
    methods, options = report.methods_and_options(cells)
    assert (set(methods["fork"]), set(options["fork"])) == ({"lom"}, {"lom", "lom-no-limits"})
    text = report.render(cells)
    assert "| fork | **100.0 [100.0, 100.0]** |" in text  # it leads, whatever an option of its own reaches
    assert "| fork | 100.0 [100.0, 100.0] | 101.1 [101.1, 101.1] |" in text
    assert report.methods_and_options(report.cells_of(better))[0] == {}


def test_cloning_counts_as_itself_also_beside_an_option_of_lom() -> None:
    beside = record(0, 3.6, method="lom-no-limits")
    beside["variants"]["bc"] = record(0, 0.0)["variants"]["actor"]
    methods, options = report.methods_and_options(report.cells_of([record(0, 3.47), beside]))
    assert methods["fork"]["bc"].returns == pytest.approx([0.0])
    assert options["fork"]["lom-no-limits"].returns == pytest.approx([3.6])


def test_only_what_stands_between_the_marks_is_renewed(tmp_path: Path) -> None:
    document = tmp_path / "results.md"
    document.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    results = Results(tmp_path / "results.jsonl")
    results.append(record(0, 3.0))
    report.write(results, document)
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale" not in text
    assert (tmp_path / "results-generated.png").stat().st_size > 1000
    document.write_text("no marks")
    with pytest.raises(SystemExit, match="expected the lines"):
        report.write(results, document)
    assert document.read_text() == "no marks"
