"""What training can be asked to do differently must still export: the gate compares the graphs with torch."""

from pathlib import Path

import numpy as np
import pytest

from lom import train
from lom.envs.fork import fork_demonstrations
from lom_bundle import read_bundle
from lom_export.main import main as export

SMALL = ["--mixture-steps", "200", "--steps", "100", "--hidden", "16", "--mixture-hidden", "16", "--hyper-batch", "64"]


@pytest.mark.parametrize(
    "options",
    [
        ["--preset", "faithful", "--task", "hopper-medium", "--threads", "1"],
        ["--preset", "small", "--averaging-steps", "20", "--advantage-baseline", "hyper", "--imitation-samples", "4"],
    ],
)
def test_a_run_with_other_options_exports(tmp_path: Path, options: list[str]) -> None:
    np.savez(tmp_path / "fork.npz", **fork_demonstrations(episodes=40))  # type: ignore[arg-type]
    train.main([str(tmp_path / "fork.npz"), "--out", str(tmp_path / "run"), *options, *SMALL])
    export([str(tmp_path / "run"), "--out", str(tmp_path / "bundle")])
    assert set(read_bundle(tmp_path / "bundle").manifest.variants) >= {"greedy_mode", "actor"}
