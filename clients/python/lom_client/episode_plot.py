"""A report of episodes as one picture."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lom_client.episodes import EpisodeReport

# Okabe and Ito's colours, which people with any colour vision tell apart, but for their yellow (too pale on white) and
# black (too heavy as an area).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#4D4D4D")
_HATCHES = ("", "///", "...", "xxx")
_INK, _PALE = "#333333", "#BBBBBB"
_MOST_COLUMNS = 60
_LATENCY_BINS = 50


def draw_report(report: EpisodeReport, title: str) -> bytes:
    """Returns of all episodes, latencies of all calls, modes of the first episode: a PNG 1,800 pixels wide.

    Where no mode acted in the first episode, there is no such panel.
    """
    has_modes = max(report.first_episode_modes) >= 0
    figure = Figure(figsize=(12, 8 if has_modes else 5), layout="constrained")
    figure.suptitle(f"{title}\n{_outcome(report)}", fontsize=13, color=_INK)
    if has_modes:
        panels = figure.subplot_mosaic([["returns", "latencies"], ["modes", "modes"]], height_ratios=(3, 2))
        _draw_modes(panels["modes"], report)
    else:
        panels = figure.subplot_mosaic([["returns", "latencies"]])
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=10)
    _draw_returns(panels["returns"], report)
    _draw_latencies(panels["latencies"], report.latencies_s * 1e3)
    png = io.BytesIO()
    figure.savefig(png, dpi=150, format="png")
    return png.getvalue()


def _outcome(report: EpisodeReport) -> str:
    parts = [
        f"{len(report.returns)} episodes, {report.steps:,} steps",
        f"{report.fresh_share:.1%} of the actions fresh",
    ]
    if report.success_rate is not None:
        parts.append(f"success {report.success_rate:.0%}")
    return " · ".join(parts)


def _draw_returns(axes: Axes, report: EpisodeReport) -> None:
    returns = np.array(report.returns)
    episodes = np.arange(len(returns))
    mean, spread = float(returns.mean()), float(returns.std())
    axes.axhspan(mean - spread, mean + spread, color=_COLOURS[0], alpha=0.12, linewidth=0)
    axes.axhline(mean, color=_COLOURS[0], linewidth=1.5)
    succeeded = np.ones(len(returns), bool) if report.successes is None else np.array(report.successes)
    size = float(np.clip(1500 / len(returns), 8, 40))
    axes.scatter(episodes[succeeded], returns[succeeded], s=size, color=_COLOURS[0], label="success", zorder=3)
    axes.scatter(
        episodes[~succeeded], returns[~succeeded], s=size, marker="X", color=_COLOURS[5], label="no success", zorder=3
    )
    if not succeeded.all():
        axes.legend(frameon=False, fontsize=10)
    axes.set_title(f"Return of each episode: {mean:,.2f} ± {spread:,.2f} (mean ± sd)", fontsize=12, loc="left")
    axes.set_xlabel("episode")
    axes.set_ylabel("return (sum of rewards)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(-0.5, len(returns) - 0.5)


def _draw_latencies(axes: Axes, latencies_ms: NDArray[np.float64]) -> None:
    low, high = float(latencies_ms.min()), float(latencies_ms.max())
    bins = np.geomspace(0.95 * low, 1.05 * high, _LATENCY_BINS)
    axes.hist(latencies_ms, bins=bins.tolist(), color=_COLOURS[4], edgecolor="white", linewidth=0.3)
    axes.set_xscale("log")
    for share, style in ((50, "-"), (99, "--")):
        value = float(np.percentile(latencies_ms, share))
        axes.axvline(value, color=_INK, linewidth=1.5, linestyle=style, label=f"p{share} {value:.3g} ms")
    axes.legend(fontsize=10, framealpha=1, edgecolor="white")
    digits = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)
    ticks = [digit * 10.0**decade for decade in range(-3, 6) for digit in digits]
    ticks = [tick for tick in ticks if bins[0] <= tick <= bins[-1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_title(f"Latency of {len(latencies_ms):,} calls", fontsize=12, loc="left")
    axes.set_xlabel("from asking to holding the action (ms, logarithmic)")
    axes.set_ylabel("calls")


def _draw_modes(axes: Axes, report: EpisodeReport) -> None:
    """Shares of the modes in equal pieces of the episode; where it is short, each step by itself."""
    modes = np.array(report.first_episode_modes)
    edges = np.linspace(0, len(modes), min(len(modes), _MOST_COLUMNS) + 1).round().astype(int)
    widths = np.diff(edges)
    bottom = np.zeros(len(widths))
    for mode in np.unique(modes):
        share = np.add.reduceat(modes == mode, edges[:-1], dtype=np.float64) / widths
        axes.bar(
            edges[:-1],
            share,
            widths,
            bottom,
            align="edge",
            color=_PALE if mode < 0 else _COLOURS[mode % len(_COLOURS)],
            hatch="" if mode < 0 else _HATCHES[mode // len(_COLOURS) % len(_HATCHES)],
            edgecolor="white",
            linewidth=0.3,
            label=f"{'no mode' if mode < 0 else f'mode {mode}'} ({np.mean(modes == mode):.0%})",
        )
        bottom += share
    steps = "each step" if len(modes) == len(widths) else f"pieces of about {len(modes) / len(widths):.0f} steps"
    axes.set_title(f"Modes of the first episode, {steps}", fontsize=12, loc="left")
    axes.legend(frameon=False, fontsize=10, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_xlabel("step")
    axes.set_ylabel("share of the steps")
    axes.set_xlim(0, len(modes))
    axes.set_ylim(0, 1)
