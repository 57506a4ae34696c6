"""Pictures of the experiments."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

from lom.study.experiments import (
    MODE_STD,
    DoubleCircle,
    Improvement,
    MixtureFit,
    ModeSelection,
    peak_reward,
)

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_TRUTH, _LEARNED, _OTHER, _DATA = "#444444", "#c0392b", "#2980b9", "#c8c8c8"


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
    observations = shown.observations[:, 0].numpy()
    right.plot(observations, shown.true_means[:, :, 0].numpy(), color=_TRUTH, linewidth=4, alpha=0.35)
    for component in range(shown.means.shape[1]):
        weights = shown.weights[:, component].numpy()
        right.scatter(observations, shown.means[:, component, 0].numpy(), s=30 * weights, color=_LEARNED, linewidths=0)
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
