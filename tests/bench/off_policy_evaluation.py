"""Fitted-Q evaluation against roll-outs on the fork: does it rank the variants, and by how much is it wrong?

    python -m tests.bench.off_policy_evaluation --seeds 5

Each seed draws data, trains a policy by preset `small`, plays every variant for 100 episodes and values it from the
data alone, as `lom-train` without --env does. Prints a table in Markdown when all seeds are done.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from lom.config import PRESETS
from lom.dataset import load_transitions
from lom.envs.fork import fork_demonstrations
from lom.evaluation import EVALUATION_SEED, evaluate, policy_act
from lom.learner import Learner
from lom.off_policy_evaluation import FittedQConfig, OffPolicyEvaluation, evaluate_off_policy
from lom.policy import VARIANTS

Array = NDArray[np.float64]

_ENV = "lom/Fork-v0"
_BELOW = {"fork 50/50": 0.5, "fork 80/20": 0.2}


def run_one(below_probability: float, seed: int) -> tuple[dict[str, Array], OffPolicyEvaluation, float]:
    """True discounted returns, fitted values, and the time of fitting over that of training."""
    config = replace(PRESETS["small"], seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        np.savez(path, **fork_demonstrations(seed=seed, below_probability=below_probability))  # type: ignore[arg-type]
        transitions = load_transitions([path])
    trained_on, _ = transitions.hold_out(config.held_out_share, seed)
    started = time.process_time()
    learner = Learner(
        trained_on, config, torch.from_numpy(transitions.action_low), torch.from_numpy(transitions.action_high)
    )
    for _ in learner.remaining():
        pass
    trained = time.process_time()
    acts = {variant: policy_act(learner.policy, variant) for variant in VARIANTS}
    fitted = evaluate_off_policy(acts, trained_on, FittedQConfig.after(config))
    share = (time.process_time() - trained) / (trained - started)
    truth = {
        variant: evaluate(act, _ENV, episodes=100, seed=EVALUATION_SEED, discount=config.discount).returns
        for variant, act in acts.items()
    }
    return truth, fitted, share


def main() -> None:
    """Prints one row per task, seed and variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"| task | seed | behaviour: fitted, data | {', '.join(VARIANTS)}: fitted (truth) | recommended |",
        "| --- | --- | --- | --- | --- |",
    ]
    shares = []
    runs = [(task, seed) for seed in range(arguments.seeds) for task in _BELOW]
    for task, seed in track(runs, "fitted-Q evaluation"):
        truth, fitted, share = run_one(_BELOW[task], seed)
        shares.append(share)
        cells = [f"{fitted.values[v].mean():.2f} ({truth[v].mean():.2f})" for v in VARIANTS]
        marked = [f"{cell}?" if v in fitted.doubts() else cell for v, cell in zip(VARIANTS, cells, strict=True)]
        behaviour = f"{fitted.behaviour_values.mean():.2f}, {fitted.observed_returns.mean():.2f}"
        lines.append(f"| {task} | {seed} | {behaviour} | {', '.join(marked)} | {fitted.recommendation().variant} |")
        print(lines[-1], flush=True)
    print("\n".join(lines))
    print(f"processor time of fitting over training: median {np.median(shares):.2f}")


if __name__ == "__main__":
    main()
