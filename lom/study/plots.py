"""Pictures of the experiments."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from lom.envs.bandit import ACTION_STD, CORNER_REWARDS, CORNERS
from lom.study.experiments import (
    MODE_STD,
    DoubleCircle,
    Improvement,
    MixtureFit,
    ModeSelection,
    peak_reward,
)
from lom.study.hyper_policies import RULES, value_of_noisy_choice, value_of_random_share
from lom.study.statistics import confidence_interval

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_TRUTH, _LEARNED, _OTHER, _DATA = "#444444", "#c0392b", "#2980b9", "#c8c8c8"
_COLOURS = (_OTHER, "#16a085", _LEARNED, "#8e44ad")


def _two_axes() -> tuple[Figure, Axes, Axes]:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure, left, right


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=90)
    plt.close(figure)


def mixture(fits: Mapping[tuple[int, float], Sequence[MixtureFit]], path: Path) -> None:
    """NLL gaps by number of modes, and one fit: true means and components along the observation."""
    figure, left, right = _two_axes()
    modes = sorted({number for number, _ in fits})
    separations = sorted({separation for _, separation in fits})
    for separation, colour in zip(separations, (_OTHER, "#8e44ad", _LEARNED), strict=False):
        gaps = np.array([[fit.nll_gap for fit in fits[number, separation]] for number in modes])
        left.plot(modes, gaps.mean(axis=1), "o-", color=colour, label=f"{separation:g} sd apart", markersize=4)
        left.vlines(modes, gaps.min(axis=1), gaps.max(axis=1), color=colour, linewidth=1)
    left.axhline(0.05, color=_TRUTH, linestyle=":", label="bar: 0.05 nat")
    left.set(xlabel="true modes k (2k components)", ylabel="NLL above the truth, nat")
    left.legend(frameon=False, fontsize=8)

    shown = fits[5, max(separations)][0] if (5, max(separations)) in fits else next(iter(fits.values()))[0]
    right.plot(shown.observations, shown.true_means[:, :, 0], color=_TRUTH, linewidth=4, alpha=0.35)
    for component in range(shown.means.shape[1]):
        sizes = 30 * shown.weights[:, component]
        right.scatter(shown.observations, shown.means[:, component, 0], s=sizes, color=_LEARNED, linewidths=0)
    right.plot([], [], color=_TRUTH, linewidth=4, alpha=0.35, label="true means")
    right.scatter([], [], s=15, color=_LEARNED, label="components (area: weight)")
    right.set(xlabel="observation", ylabel="first action dimension", title=f"{shown.true_means.shape[1]} modes")
    right.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
    right.set_ylim(top=1.25 * right.get_ylim()[1])
    right.locator_params(axis="x", nbins=5)
    _save(figure, path)


def selection(results: Sequence[ModeSelection], path: Path) -> None:
    """Learned and exact advantage of one mode over the other, and what choosing by it is worth."""
    figure, left, right = _two_axes()
    for number, result in enumerate(results):
        label = "learned (one line a seed)" if number == 0 else None
        left.plot(result.states, result.learned_advantage, color=_LEARNED, linewidth=0.8, label=label)
    left.plot(results[0].states, results[0].exact_advantage, color=_TRUTH, linewidth=2, label="exact")
    left.axhline(0, color=_DATA, linewidth=0.8, zorder=0)
    left.set(xlabel="state", ylabel="hyper-Q, right push minus left")
    left.legend(frameon=False, fontsize=8)
    exact = results[0].exact_behaviour_value
    right.axhline(exact, color=_TRUTH, linestyle=":", label="behaviour, exact")
    for position, (name, values) in enumerate(
        (
            ("behaviour,\nroll-outs", [result.behaviour_value for result in results]),
            ("greedy_mode,\nroll-outs", [result.greedy_value for result in results]),
        )
    ):
        right.scatter([position] * len(values), values, color=(_OTHER, _LEARNED)[position], s=25, alpha=0.7)
        right.text(position + 0.1, float(np.mean(values)), name, va="center", fontsize=8)
    right.set(ylabel="discounted return from 0.8", xticks=[], xlim=(-0.5, 2), ylim=(None, 0))
    right.legend(frameon=False, fontsize=8, loc="center right")
    _save(figure, path)


def imitation(improvements: Sequence[Improvement], circles: Sequence[DoubleCircle], path: Path) -> None:
    """Where the actor moves inside the better mode, and what it does on the double circle."""
    figure, left, right = _two_axes()
    actions = np.linspace(-0.9, 1.0, 400)
    left.plot(actions, peak_reward(actions[:, None]), color=_TRUTH, linewidth=1, label="reward")
    for mean in (-0.5, 0.4):
        left.axvspan(mean - 2 * MODE_STD, mean + 2 * MODE_STD, color=_DATA, alpha=0.5, linewidth=0)
    left.plot([], [], color=_DATA, linewidth=8, label="modes, ± 2 sd")
    first = improvements[0]
    left.axvline(first.tilted_mean, color=_TRUTH, linestyle=":", label="closed form")
    for name, colour, points in (
        ("greedy_mode", _OTHER, [(each.greedy_action, each.greedy_reward) for each in improvements]),
        ("actor", _LEARNED, [(each.actor_action, each.actor_reward) for each in improvements]),
    ):
        horizontal, vertical = zip(*points, strict=True)
        left.scatter(horizontal, vertical, color=colour, s=20, label=name, zorder=3)
    left.set(xlabel="action", ylabel="reward")
    left.locator_params(axis="x", nbins=5)
    left.legend(frameon=False, fontsize=8, loc="upper left")

    circle = circles[0]
    right.scatter(circle.data[:, 0], circle.data[:, 1], s=1, color=_DATA)
    for variant, colour in (("bc", _OTHER), ("actor", _LEARNED)):
        right.scatter(circle.states, circle.actions[variant], s=4, color=colour, label=variant)
    right.set(xlabel="state", ylabel="action", title="reward 1 where state and action have one sign", aspect="equal")
    right.title.set_fontsize(9)
    right.axhline(0, color=_TRUTH, linewidth=0.5)
    right.axvline(0, color=_TRUTH, linewidth=0.5)
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


BySeed = Mapping[str, Sequence[float]]
"""Values over the seeds by name."""


def _interval(
    axes: Axes, positions: Sequence[float], values: Sequence[Sequence[float]], colour: str, **line: Any
) -> None:
    """Means over seeds joined by a line, with 95 % confidence intervals."""
    bounds = np.array([confidence_interval(each) for each in values])
    axes.vlines(positions, bounds[:, 0], bounds[:, 1], color=colour, linewidth=1)
    axes.plot(positions, [np.mean(each) for each in values], color=colour, **line)


def random_mode(tasks: Mapping[str, BySeed], exact: Mapping[str, Mapping[str, float | None]], path: Path) -> None:
    """What every rule earns: one point a seed, the exact answer where there is one."""
    figure, every = plt.subplots(1, len(tasks), figsize=(10.5, 3.6), layout="constrained", squeeze=False)
    for axes, (task, values) in zip(every[0], tasks.items(), strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        for position, rule in enumerate(RULES):
            colour = _LEARNED if rule == "hyper_q" else _OTHER
            axes.scatter([position] * len(values[rule]), values[rule], color=colour, s=18, alpha=0.7, zorder=3)
            answer = exact.get(task, {}).get(rule)
            if answer is not None:
                axes.hlines(answer, position - 0.35, position + 0.35, color=_TRUTH, linewidth=1.5)
        if task in exact:
            axes.plot([], [], color=_TRUTH, linewidth=1.5, label="exact, four modes")
        axes.scatter([], [], color=_OTHER, s=18, label="trained, one point a seed")
        axes.set_xticks(range(len(RULES)), [rule.replace("_", " ") for rule in RULES], rotation=35, ha="right")
        axes.set(title=task.replace("_", ", "))
        axes.title.set_fontsize(10)
        axes.tick_params(labelsize=8)
    every[0, 0].set_ylabel("value of acting by the mode's mean")
    every[0, 0].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0.0, 0.93))
    _save(figure, path)


Settings = Mapping[tuple[str, int, float, float], BySeed]
"""Values over the seeds by (task, M, β, C)."""


def sensitivity(settings: Settings, temperature: float, ceiling: float, path: Path) -> None:
    """Scores, width of the chosen mode and clipped weights over M, and over β or C."""
    components = sorted({m for _, m, _, _ in settings})
    tasks = sorted({task for task, _, _, _ in settings})
    figure, every = plt.subplots(1, len(tasks) + 2, figsize=(3.2 * (len(tasks) + 2), 3.4), layout="constrained")
    *scores, width, clipped = every
    for axes, task, task_colour in zip(scores, tasks, (_LEARNED, _OTHER), strict=False):

        def curve(axes: Axes, beta: float, name: str, colour: str, task: str = task, **line: Any) -> None:
            there = [m for m in components if (task, m, beta, ceiling) in settings]
            values = [settings[task, m, beta, ceiling][name] for m in there]
            _interval(axes, [components.index(m) for m in there], values, colour, markersize=4, **line)

        temperatures = sorted({setting[2] for setting in settings if setting[0] == task})
        for beta, colour in zip(temperatures, _COLOURS, strict=True):
            curve(axes, beta, "actor", colour, marker="o", label=f"actor, β = {beta:g}")
            if task == "bandit4":
                curve(clipped, beta, "clipped_weights", colour, marker="o", label=f"{task}, β = {beta:g}")
        curve(axes, temperature, "greedy_mode", _TRUTH, linestyle=":", label="greedy_mode")
        curve(width, temperature, "mode_std", task_colour, marker="o", label=task)
        axes.set(title=task, ylabel="return")
    width.axhline(ACTION_STD, color=_LEARNED, linestyle=":", linewidth=1, label="bandit4, true σ")
    width.set(ylabel="mean σ of the chosen mode", yscale="log")
    width.minorticks_off()
    width.set_yticks([0.05, 0.1, 0.2, 0.5], ["0.05", "0.1", "0.2", "0.5"])
    clipped.set(ylabel=f"share of weights at C = {ceiling:g}")
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xticks(range(len(components)), [str(m) for m in components])
        axes.set_xlabel("M")
        axes.legend(frameon=False, fontsize=7)
    _save(figure, path)


def corrupted(
    values: Mapping[tuple[str, int, str], BySeed],
    errors: Sequence[float],
    bound: Mapping[str, Any],
    forced: Sequence[Mapping[str, Any]],
    path: Path,
) -> None:
    """What random choices, noise and bounded errors cost, and where imitation of a forced mode ends.

    Args:
        values: over the seeds, by (task, M, what hyper-Q was spoilt by) and amount.
        errors: sizes ε of errors; `bound` is the result of `measure_error_bound` for them.
        forced: rows of `measure_forced_modes`.
    """
    figure, ((share, noise, tabular), (fork_share, fork_noise, modes)) = plt.subplots(
        2, 3, figsize=(11, 6.2), layout="constrained"
    )
    exact = CORNER_REWARDS.astype(np.float64)
    shares, deviations = np.linspace(0, 1, 50), np.geomspace(0.3, 12, 50)
    share.plot(shares, [value_of_random_share(exact, p) for p in shares], color=_TRUTH, label="exact, four modes")
    noise.plot(deviations, [value_of_noisy_choice(exact, std) for std in deviations], color=_TRUTH, label="exact")
    for (task, components, kind), by_amount in values.items():
        if kind == "rules":
            continue
        axes = {("bandit4", "random_share"): share, ("bandit4", "noise"): noise}.get((task, kind))
        axes = axes or (fork_share if kind == "random_share" else fork_noise)
        amounts = {float(amount): each for amount, each in by_amount.items()}
        rules = values[task, components, "rules"]
        if kind == "random_share":
            amounts |= {0.0: rules["hyper_q"], 1.0: rules["random_uniform"]}
        colour = _LEARNED if task == "fork" or components == 4 else _OTHER
        line = {"linestyle": "-" if task == "fork" else "none", "marker": "o", "markersize": 4}
        _interval(
            axes, sorted(amounts), [amounts[a] for a in sorted(amounts)], colour, label=f"M = {components}", **line
        )
    for axes, kind in ((fork_share, "random_share"), (fork_noise, "noise")):
        rules = values["fork", 8, "rules"]
        if kind == "random_share":
            ends = [np.mean(rules["hyper_q"]), np.mean(rules["random_uniform"])]
            axes.plot([0, 1], ends, color=_TRUTH, linestyle=":", label="straight line")
        axes.axhline(float(np.mean(rules["worst"])), color=_DATA, label="always the worst mode")
    for axes, title in ((share, "bandit4"), (noise, "bandit4"), (fork_share, "fork"), (fork_noise, "fork")):
        axes.set(title=title, ylabel="value")
    for axes in (share, fork_share):
        axes.set(xlabel="share p of random choices")
    for axes in (noise, fork_noise):
        axes.set(xlabel="σ of the noise on hyper-Q", xscale="log")

    tabular.plot(errors, 2 * np.array(errors) / (1 - bound["discount"]), color=_TRUTH, label="bound 2ε/(1 - γ)")
    for name, colour in (("worst", _LEARNED), ("uniform", _OTHER)):
        losses = np.array(bound[name])
        tabular.plot(errors, losses.max(axis=1), "o-", color=colour, markersize=3, label=f"{name} errors, worst MDP")
        mean = losses.mean(axis=1)
        tabular.plot(errors, mean, "--", color=colour, linewidth=1, label=f"{name} errors, mean")
    tabular.set(
        xscale="log",
        yscale="log",
        xlabel="error ε of hyper-Q",
        ylabel="V of the behaviour minus V",
        title="tabular MDPs",
    )
    tabular.set_ylim(bottom=1e-2)

    best = CORNERS[exact.argmax()]
    means, tilted, actions = (
        np.array([row[name] for row in forced]) for name in ("mode_mean", "tilted_mean", "action")
    )
    missing, expected, moved = (np.linalg.norm(there - means, axis=1) for there in (best, tilted, actions))
    modes.scatter(missing, expected, s=40, facecolors="none", edgecolors=_TRUTH, label="closed form")
    modes.scatter(missing, moved, s=10, color=_LEARNED, label="actor")
    modes.axhline(float(np.mean([row["mode_std"] for row in forced])), color=_DATA, label="σ of the modes")
    modes.set(
        title="imitation of a forced mode",
        xlabel="from the forced mode to the best one",
        ylabel="from the forced mode to the actor",
    )
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
        axes.legend(frameon=False, fontsize=6.5)
    _save(figure, path)
