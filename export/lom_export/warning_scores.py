"""Fits the state score and sets the thresholds of both scores that a robot can be warned by."""

import numpy as np
import torch
from numpy.typing import NDArray

from lom.policy import LomPolicy
from lom.run import DataSamples
from lom_bundle import WarningSpec
from lom_export.graph import ACTION_SCORE, OBSERVATION, STATE_SCORE, PolicyGraph
from lom_export.proof import answers
from lom_export.state_score import StateScore, conformal_quantile, fit_state_score

MIN_EPISODES = 2


def calibrate(
    policy: LomPolicy, samples: DataSamples, variants: tuple[str, ...], *, false_alarm_rate: float, seed: int
) -> tuple[StateScore | None, dict[str, WarningSpec]]:
    """The state score, and by score the thresholds at `false_alarm_rate`, measured on the held-out episodes.

    The state score's threshold comes from cross-fitting over the episodes that were trained on; the held-out ones
    check it. The action score depends on the mixture, which was fitted to the training episodes, so its thresholds
    come from the held-out ones, and from the training ones only where nothing was held out.

    Returns:
        (None, {}) where the sample has fewer than two episodes.
    """
    if len(np.unique(samples.trained_on_episodes)) < MIN_EPISODES:
        return None, {}
    with torch.no_grad():
        normalised: NDArray[np.float32] = policy.normaliser(torch.from_numpy(samples.trained_on)).numpy()
    state_score, state_threshold = fit_state_score(
        normalised, samples.trained_on_episodes, false_alarm_rate=false_alarm_rate, seed=seed
    )
    apart = len(samples.held_out) > 0
    observations = samples.held_out if apart else samples.trained_on
    episodes = samples.held_out_episodes if apart else samples.trained_on_episodes
    scores = {
        variant: answers(PolicyGraph(policy, variant, state_score), {OBSERVATION: observations}) for variant in variants
    }
    measured = {
        STATE_SCORE: {variant: _share_above(scores[variant][STATE_SCORE], state_threshold) for variant in variants},
        ACTION_SCORE: {
            variant: _cross_calibrated_share(scores[variant][ACTION_SCORE], episodes, false_alarm_rate)
            for variant in variants
            if len(np.unique(episodes)) >= MIN_EPISODES
        },
    }
    thresholds = {
        STATE_SCORE: dict.fromkeys(variants, state_threshold),
        ACTION_SCORE: {
            variant: conformal_quantile(scores[variant][ACTION_SCORE], false_alarm_rate) for variant in variants
        },
    }
    calibration = {
        STATE_SCORE: "cross-fitted over the episodes that were trained on; checked on the held-out ones",
        ACTION_SCORE: "quantile over the held-out episodes; checked by leaving one of them out at a time"
        if apart
        else "quantile over the training data: nothing was held out, expect more alarms than stated",
    }
    return state_score, {
        name: WarningSpec(
            thresholds=thresholds[name],
            false_alarm_rate=false_alarm_rate,
            calibration=calibration[name],
            held_out_episodes=len(np.unique(samples.held_out_episodes)),
            held_out_rows=len(samples.held_out),
            held_out_false_alarms=measured[name] if apart else {},
        )
        for name in (STATE_SCORE, ACTION_SCORE)
    }


def _share_above(scores: NDArray[np.float32], threshold: float) -> float:
    """NaN counts as above: what cannot be judged is worth a warning."""
    return float((~(scores <= threshold)).mean())


def _cross_calibrated_share(scores: NDArray[np.float32], episodes: NDArray[np.int32], rate: float) -> float:
    """Share of rows above the threshold that the other episodes would have set."""
    alarms = 0.0
    for episode in np.unique(episodes):
        inside = episodes == episode
        alarms += inside.sum() * _share_above(scores[inside], conformal_quantile(scores[~inside], rate))
    return float(alarms / len(scores))
