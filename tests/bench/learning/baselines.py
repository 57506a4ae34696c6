"""Other methods, trained by d3rlpy in an environment of its own; their policies come back as TorchScript."""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lom.dataset import Transitions
from lom.scaling import ObservationNormaliser

PYTHON = Path("build/baselines-venv/bin/python")
_TRAINER = Path(__file__).with_name("d3rlpy_trainer.py")

Array = NDArray[np.float32]
Act = Callable[[Array], Array]


class BaselineError(RuntimeError):
    """The other environment is missing, its training failed, or a policy does not answer here as it did there."""


@dataclass(frozen=True, kw_only=True)
class TrainedBaseline:
    """Policies in the order of training, observations float32[B, O] -> actions float32[B, A], and the time they took.

    `seconds` has train_s, on the wall, and train_cpu_s, of the processor.
    """

    policies: list[Act]
    seconds: dict[str, float]


def train_baseline(
    transitions: Transitions,
    config: Mapping[str, Any],
    *,
    checkpoints: int,
    on_steps: Callable[[int], None] = lambda steps: None,
) -> TrainedBaseline:
    """Trains one seed of one method on one thread of another process.

    Args:
        config: of `methods.d3rlpy_config`.
        checkpoints: how many policies to hand back, evenly spaced over the steps.
        on_steps: is told the number of steps done at every checkpoint.

    Raises:
        BaselineError: see there.
    """
    if not PYTHON.is_file():
        raise BaselineError(f"expected {PYTHON}, found none: `make bench-learning` installs it")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = {
            **config,
            "checkpoints": checkpoints,
            "data": str(folder / "data.npz"),
            "out": name,
            "reward_scale": _reward_scale(transitions, config["return_range"]),
        }
        _write_data(transitions, folder / "data.npz")
        (folder / "job.json").write_text(json.dumps(job))
        seconds = _run(folder / "job.json", on_steps)
        with np.load(folder / "golden.npz") as golden:
            policies = [_policy(folder / f"policy-{checkpoint}.pt") for checkpoint in range(1, checkpoints + 1)]
            answered = policies[-1](golden["observations"])
            if not np.array_equal(answered, golden["actions"]):
                raise BaselineError(
                    f"{config['algorithm']}: expected the actions that were answered where it was trained, got ones "
                    f"that differ by up to {np.abs(answered - golden['actions']).max():g}"
                )
        return TrainedBaseline(policies=policies, seconds=seconds)


def _reward_scale(transitions: Transitions, return_range: float | None) -> float:
    returns = transitions.episode_returns
    spread = float(returns.max() - returns.min())
    return 1.0 if return_range is None or spread == 0 else return_range / spread


def _write_data(transitions: Transitions, path: Path) -> None:
    normaliser = ObservationNormaliser(transitions.observations.shape[1])
    normaliser.fit(torch.from_numpy(transitions.observations))
    np.savez(
        path,
        observations=transitions.observations,
        actions=transitions.actions,
        rewards=transitions.rewards,
        next_observations=transitions.next_observations,
        next_actions=transitions.next_actions,
        terminals=transitions.terminals,
        observation_mean=normaliser.mean.numpy(),
        observation_std=normaliser.std.numpy(),
    )


def _run(job: Path, on_steps: Callable[[int], None]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [PYTHON, "-P", "-W", "ignore", _TRAINER, job],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    seconds = json.loads(line)
                    on_steps(int(seconds.pop("steps")))
        except BaseException:
            process.kill()
            raise
        if process.wait() != 0:
            errors.seek(0)
            raise BaselineError(f"d3rlpy ended with {process.returncode}: {errors.read()[-500:].strip()}")
    return seconds


def _policy(path: Path) -> Act:
    script = torch.jit.load(str(path))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def act(observations: Array) -> Array:
        actions: Array = script(torch.from_numpy(observations)).numpy()
        return actions

    return act
