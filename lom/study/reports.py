"""The experiments of `lom-study`: what each measures cell by cell, its picture, and its rows of the table."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lom.envs.bandit import CORNER_REWARDS
from lom.study import plots
from lom.study.cells import Cell, Result
from lom.study.checks import (
    RANDOM_SHARES,
    SKEWED_WEIGHTS,
    TASKS,
    measure_choices,
    measure_error_bound,
    measure_forced_modes,
    measure_sensitivity,
)
from lom.study.experiments import (
    DoubleCircle,
    Improvement,
    MixtureFit,
    ModeSelection,
    fit_synthetic_mixture,
    improve_on_mode,
    learn_double_circle,
    select_in_linear_quadratic,
)
from lom.study.hyper_policies import RULES, value_of_noisy_choice, value_of_random_share
from lom.study.statistics import mean_and_interval, mean_and_worst

Row = tuple[str, str, str]
"""What was measured, what was found over the seeds, and what is known of the answer."""
Measured = Sequence[tuple[Cell, Result]]
_Kind = TypeVar("_Kind")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One question to LOM.

    Attributes:
        cells: number of seeds -> what there is to measure.
        draw: results and a path -> a picture.
        rows: results -> rows of the table.
    """

    cells: Callable[[int], list[Cell]]
    draw: Callable[[Measured, Path], None]
    rows: Callable[[Measured], Iterable[Row]]


def _of(results: Measured, measure: Callable[..., Any], **arguments: object) -> list[Result]:
    """The results that a function gave for these arguments, one per seed."""
    return [
        result
        for cell, result in results
        if cell.measure is measure and all(cell.arguments[name] == value for name, value in arguments.items())
    ]


def _revived(kind: Callable[..., _Kind], results: Sequence[Result]) -> list[_Kind]:
    """Dataclasses from what JSON kept of them."""
    return [kind(**{k: np.asarray(v) if isinstance(v, list) else v for k, v in each.items()}) for each in results]


# ---------------------------------------------------------------- the first three


MODES = (1, 2, 3, 5, 8)
SEPARATIONS = (2.0, 4.0, 6.0)


def _mixture_cells(seeds: int) -> list[Cell]:
    return [
        Cell(
            name=f"mixture-{modes}-modes-{separation:g}-apart-seed{seed}",
            measure=fit_synthetic_mixture,
            arguments={
                "modes": modes,
                "separation": separation,
                "num_components": 2 * modes,
                "seed": seed,
                "steps": 3000,
            },
        )
        for modes in MODES
        for separation in SEPARATIONS
        for seed in range(seeds)
    ]


def _fits(results: Measured) -> dict[tuple[int, float], list[MixtureFit]]:
    return {
        (modes, separation): _revived(
            MixtureFit, _of(results, fit_synthetic_mixture, modes=modes, separation=separation)
        )
        for modes in MODES
        for separation in SEPARATIONS
    }


def _mixture_rows(results: Measured) -> Iterable[Row]:
    for (modes, separation), fits in _fits(results).items():
        name = f"{modes} modes {separation:g} sd apart"
        yield f"{name}: NLL above the truth, nat", mean_and_worst([fit.nll_gap for fit in fits], max), "0, below 0.05"
        distances = [fit.worst_mean_distance for fit in fits]
        yield "worst true mean to a component, sd", mean_and_worst(distances, max, digits=2), "below 0.5"


def _selection_cells(seeds: int) -> list[Cell]:
    return [
        Cell(name=f"selection-seed{seed}", measure=select_in_linear_quadratic, arguments={"seed": seed})
        for seed in range(seeds)
    ]


def _selections(results: Measured) -> list[ModeSelection]:
    return _revived(ModeSelection, _of(results, select_in_linear_quadratic))


def _selection_rows(results: Measured) -> Iterable[Row]:
    found = _selections(results)
    exact = found[0].exact_behaviour_value
    yield "selected mode is the optimal one", mean_and_worst([each.agreement for each in found]), "1, above 0.95"
    behaviour = np.mean([each.behaviour_value for each in found])
    yield "value of the behaviour, roll-outs", f"{behaviour:.3f}", f"{exact:.3f} exactly"
    greedy = [each.greedy_value for each in found]
    yield "value of greedy_mode, roll-outs", mean_and_worst(greedy), f"above {exact:.3f}"


def _imitation_cells(seeds: int) -> list[Cell]:
    cells = []
    for seed in range(seeds):
        for name, measure in (("improvement", improve_on_mode), ("double-circle", learn_double_circle)):
            cells.append(Cell(name=f"{name}-seed{seed}", measure=measure, arguments={"seed": seed}))
    return cells


def _improvements(results: Measured) -> list[Improvement]:
    return _revived(Improvement, _of(results, improve_on_mode))


def _circles(results: Measured) -> list[DoubleCircle]:
    return _revived(DoubleCircle, _of(results, learn_double_circle))


def _imitation_rows(results: Measured) -> Iterable[Row]:
    improvements, circles = _improvements(results), _circles(results)
    first = improvements[0]
    yield "reward of greedy_mode", mean_and_worst([each.greedy_reward for each in improvements]), "1 at the mode's mean"
    yield (
        "reward of the actor",
        mean_and_worst([each.actor_reward for each in improvements]),
        f"{first.tilted_reward:.3f} in closed form, {first.best_reward:.3f} outside the mode",
    )
    distances = [abs(each.actor_action - each.tilted_mean) for each in improvements]
    yield "actor's distance from the closed form", mean_and_worst(distances, max), "0; mode sd 0.1"
    for variant in ("actor", "greedy_mode", "bc"):
        rewards = [circle.rewards[variant] for circle in circles]
        yield f"double circle, reward of {variant}", mean_and_worst(rewards), "1; behaviour 0.5"


# ---------------------------------------------------------------- random mode against hyper-Q


RULE_TASKS = (("bandit4", 8), ("bandit4_skewed", 8), ("fork", 8), ("fetch4_reach", 8))
"""Tasks and numbers of components."""


def _choice_cells(tasks: Sequence[tuple[str, int]], seeds: int) -> list[Cell]:
    return [
        Cell(
            name=f"choices-{task}-M{components}-seed{seed}",
            measure=measure_choices,
            arguments={"task": task, "num_components": components, "seed": seed},
        )
        for seed in range(seeds)
        for task, components in tasks
    ]


def exact_rules(mixing_weights: Sequence[float]) -> dict[str, float | None]:
    """What every rule earns on bandit-4 with these weights of its corners; None where it is a matter of chance."""
    rewards, weights = CORNER_REWARDS.astype(np.float64), np.asarray(mixing_weights)
    heaviest = np.flatnonzero(weights == weights.max())
    return {
        "random_uniform": float(rewards.mean()),
        "random_alpha": float(weights @ rewards),
        "max_alpha": float(rewards[heaviest[0]]) if len(heaviest) == 1 else None,
        "hyper_q": float(rewards.max()),
        "oracle": float(rewards.max()),
        "worst": float(rewards.min()),
    }


EXACT_RULES = {"bandit4": exact_rules((0.25, 0.25, 0.25, 0.25)), "bandit4_skewed": exact_rules(SKEWED_WEIGHTS)}


def _values(results: Measured, task: str, components: int, kind: str) -> dict[str, list[float]]:
    """Values over the seeds by rule, by random share or by noise."""
    values = defaultdict(list)
    for result in _of(results, measure_choices, task=task, num_components=components):
        for name, value in result[kind].items():
            values[name].append(value)
    return values


def _random_mode_rows(results: Measured) -> Iterable[Row]:
    for task, components in RULE_TASKS:
        values = _values(results, task, components, "rules")
        for rule in RULES:
            exact = EXACT_RULES.get(task, {}).get(rule)
            known = "" if exact is None else f"{exact:g}"
            if task in EXACT_RULES and exact is None:
                known = "a tie: 0 to 5"
            yield f"{task}, {rule}", mean_and_interval(values[rule]), known
        for rule in ("random_uniform", "random_alpha", "max_alpha"):
            gains = np.subtract(values["hyper_q"], values[rule])
            yield f"{task}, hyper_q minus {rule}", mean_and_interval(gains), "above 0"


def _draw_random_mode(results: Measured, path: Path) -> None:
    plots.random_mode({task: _values(results, task, m, "rules") for task, m in RULE_TASKS}, EXACT_RULES, path)


# ---------------------------------------------------------------- sensitivity


SENSITIVITY_COMPONENTS = (1, 2, 5, 10, 15, 20, 50)
SENSITIVITY_TEMPERATURES = (0.1, 1.0, 5.0, 10.0)
DEFAULT_TEMPERATURE, DEFAULT_CEILING = 5.0, 50.0
OTHER_CEILINGS, CEILINGS_AT = (10.0, 100.0), (10, 10.0)
"""Other C, and the number of components and β at which they are tried, on the bandit."""
FORK_COMPONENTS = (1, 2, 5, 10, 20, 50)
FORK_TEMPERATURES_AT = 10
"""Number of components at which the fork sees every β; elsewhere the default's."""


def _settings(task: str, components: int) -> list[tuple[float, float]]:
    settings = [(beta, DEFAULT_CEILING) for beta in SENSITIVITY_TEMPERATURES]
    if task == "fork" and components != FORK_TEMPERATURES_AT:
        settings = [(DEFAULT_TEMPERATURE, DEFAULT_CEILING)]
    if task == "bandit4" and components == CEILINGS_AT[0]:
        settings += [(CEILINGS_AT[1], ceiling) for ceiling in OTHER_CEILINGS]
    return settings


def _sensitivity_cells(seeds: int) -> list[Cell]:
    return [
        Cell(
            name=f"sensitivity-{task}-M{components}-{seeds}-seeds",
            measure=measure_sensitivity,
            arguments={
                "task": task,
                "num_components": components,
                "seeds": list(range(seeds)),
                "settings": _settings(task, components),
            },
        )
        for task, every in (("bandit4", SENSITIVITY_COMPONENTS), ("fork", FORK_COMPONENTS))
        for components in every
    ]


Setting = tuple[str, int, float, float]
"""Task, M, β and C."""


def _settled(results: Measured) -> dict[Setting, dict[str, list[float]]]:
    """By setting and by what was measured: one value per seed."""
    found = {}
    for cell, result in results:
        task, components = cell.arguments["task"], cell.arguments["num_components"]
        for row in result:
            found[task, components, row["inverse_temperature"], row["max_imitation_weight"]] = row
    return dict(sorted(found.items()))


def _sensitivity_rows(results: Measured) -> Iterable[Row]:
    for (task, components, beta, ceiling), found in _settled(results).items():
        numbers = "; ".join(
            f"{label} {np.mean(found[name]):.{digits}f}"
            for label, name, digits in (
                ("σ", "mode_std", 3),
                ("active", "active_components", 1),
                ("clipped", "clipped_weights", 3),
            )
        )
        scores = (
            f"actor {mean_and_interval(found['actor'], 2)}, greedy_mode {mean_and_interval(found['greedy_mode'], 2)}"
        )
        yield f"{task}, M {components}, β {beta:g}, C {ceiling:g}", f"{scores}; {numbers}", ""


def _draw_sensitivity(results: Measured, path: Path) -> None:
    plots.sensitivity(_settled(results), DEFAULT_TEMPERATURE, DEFAULT_CEILING, path)


# ---------------------------------------------------------------- corrupted hyper-Q


CORRUPTED_BANDITS = (4, 8)
"""Numbers of components: as many as modes, and twice as many."""
ERRORS = tuple(float(f"{10 ** (k / 3 - 2):.4g}") for k in range(10))
PROBLEMS = 300


def _corrupted_cells(seeds: int) -> list[Cell]:
    bound = {"errors": ERRORS, "problems": PROBLEMS, "seed": 0}
    return [
        Cell(name="error-bound", measure=measure_error_bound, arguments=bound),
        *_choice_cells([("bandit4", components) for components in CORRUPTED_BANDITS] + [("fork", 8)], seeds),
        *(
            Cell(name=f"forced-modes-seed{seed}", measure=measure_forced_modes, arguments={"seed": seed})
            for seed in range(seeds)
        ),
    ]


def _corrupted_rows(results: Measured) -> Iterable[Row]:
    exact = CORNER_REWARDS.astype(np.float64)
    curves: tuple[tuple[str, str, Sequence[float], Callable[..., float]], ...] = (
        ("random_share", "p", RANDOM_SHARES, value_of_random_share),
        ("noise", "σ", TASKS["bandit4"].noise_stds, value_of_noisy_choice),
    )
    for components in CORRUPTED_BANDITS:
        for kind, symbol, amounts, curve in curves:
            values = _values(results, "bandit4", components, kind)
            for amount in amounts:
                known = f"{curve(exact, amount):.3f} with exact hyper-Q of four modes"
                name = f"bandit4, M {components}, {symbol} = {amount:g}"
                yield name, mean_and_interval(values[f"{amount:g}"]), known
        misled = _values(results, "bandit4", components, "rules")["worst"]
        yield f"bandit4, M {components}, worst mode", mean_and_interval(misled), f"{exact.min():g}"
    for kind, symbol in (("random_share", "p"), ("noise", "σ")):
        for amount_there, values_there in _values(results, "fork", 8, kind).items():
            yield f"fork, M 8, {symbol} = {amount_there}", mean_and_interval(values_there), ""
    fork = _values(results, "fork", 8, "rules")
    yield "fork, M 8, worst mode", mean_and_interval(fork["worst"]), ""
    (bound,) = _of(results, measure_error_bound)
    for index, error in enumerate(ERRORS):
        limit = 2 * error / (1 - bound["discount"])
        worst, uniform = (np.array(bound[name][index]) for name in ("worst", "uniform"))
        yield (
            f"tabular MDPs, ε = {error:g}: worst errors; uniform errors",
            f"{worst.max():.3g} (median {np.median(worst):.3g}); {uniform.max():.3g} (median {np.median(uniform):.3g})",
            f"at most {limit:.3g}",
        )
    forced = [row for result in _of(results, measure_forced_modes) for row in result]
    distances = [float(np.linalg.norm(np.subtract(row["action"], row["tilted_mean"]))) for row in forced]
    yield "forced mode: actor's distance from the closed form", mean_and_worst(distances, max), "0; mode sd 0.05"
    for reward in sorted(exact):
        rewards = [row["reward"] for row in forced if abs(row["reward"] - reward) < 0.5]
        yield (
            f"forced mode worth {reward:g}: reward of the actor",
            mean_and_interval(rewards),
            f"{reward:g}, the mode's own",
        )


def _draw_corrupted(results: Measured, path: Path) -> None:
    (bound,) = _of(results, measure_error_bound)
    corrupted = {
        (task, components, kind): _values(results, task, components, kind)
        for task, components in (("bandit4", 4), ("bandit4", 8), ("fork", 8))
        for kind in ("rules", "random_share", "noise")
    }
    forced = [row for result in _of(results, measure_forced_modes) for row in result]
    plots.corrupted(corrupted, ERRORS, bound, forced, path)


EXPERIMENTS = {
    "mixture": Experiment(
        cells=_mixture_cells, draw=lambda results, path: plots.mixture(_fits(results), path), rows=_mixture_rows
    ),
    "selection": Experiment(
        cells=_selection_cells,
        draw=lambda results, path: plots.selection(_selections(results), path),
        rows=_selection_rows,
    ),
    "imitation": Experiment(
        cells=_imitation_cells,
        draw=lambda results, path: plots.imitation(_improvements(results), _circles(results), path),
        rows=_imitation_rows,
    ),
    "random_mode": Experiment(
        cells=lambda seeds: _choice_cells(RULE_TASKS, seeds), draw=_draw_random_mode, rows=_random_mode_rows
    ),
    "sensitivity": Experiment(cells=_sensitivity_cells, draw=_draw_sensitivity, rows=_sensitivity_rows),
    "corrupted": Experiment(cells=_corrupted_cells, draw=_draw_corrupted, rows=_corrupted_rows),
}
