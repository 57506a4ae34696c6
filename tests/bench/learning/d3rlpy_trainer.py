"""Trains one policy by d3rlpy; a program that runs where d3rlpy is installed, and knows nothing of this project.

    python d3rlpy_trainer.py JOB.json

JOB: `algorithm`, `fields` (of its configuration), `hidden`, `steps`, `seed`, `checkpoints` (how many), `data` (.npz:
observations, actions, rewards, next_observations, next_actions, terminals; observation_mean, observation_std),
`reward_scale`, `out` (an existing folder). Writes `policy-K.pt` (TorchScript, observations to actions) and `golden.npz`
(observations and what the last policy answers); prints one JSON line per checkpoint.
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

_GOLDEN_ROWS = 64


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    logging.disable(logging.WARNING)
    import d3rlpy  # type: ignore[import-not-found]
    from d3rlpy.dataset import TransitionMiniBatch  # type: ignore[import-not-found]
    from d3rlpy.models.encoders import VectorEncoderFactory  # type: ignore[import-not-found]
    from d3rlpy.optimizers import AdamFactory  # type: ignore[import-not-found]
    from d3rlpy.preprocessing import StandardObservationScaler  # type: ignore[import-not-found]

    class FusedAdam(AdamFactory):  # type: ignore[misc]
        """The same steps in a third less time, up to rounding: our methods have it too."""

        def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
            optimizer.param_groups[0]["fused"] = True
            return optimizer

    d3rlpy.seed(job["seed"])
    torch.set_num_threads(1)
    with np.load(job["data"]) as archive:
        data = {name: archive[name] for name in archive.files}
    rewards = (data["rewards"] * job["reward_scale"]).astype(np.float32)[:, None]
    terminals = data["terminals"].astype(np.float32)[:, None]
    intervals = np.ones((job["fields"]["batch_size"], 1), np.float32)
    kinds = {
        "bc-all-steps": d3rlpy.algos.BCConfig,
        "td3_bc": d3rlpy.algos.TD3PlusBCConfig,
        "iql": d3rlpy.algos.IQLConfig,
        "cql": d3rlpy.algos.CQLConfig,
    }
    defaults = kinds[job["algorithm"]]()
    config = kinds[job["algorithm"]](
        observation_scaler=StandardObservationScaler(
            mean=data["observation_mean"], std=data["observation_std"], eps=0.0
        ),
        **{
            name: VectorEncoderFactory(hidden_units=list(job["hidden"]))
            for name in vars(defaults)
            if name.endswith("encoder_factory")
        },
        **{name: FusedAdam() for name in vars(defaults) if name.endswith("optim_factory")},
        **job["fields"],
    )
    algorithm = config.create(device=False)
    algorithm.create_impl(data["observations"].shape[1:], data["actions"].shape[1])
    rng = np.random.default_rng(job["seed"])
    out, steps, checkpoints = Path(job["out"]), job["steps"], job["checkpoints"]
    train_s, train_cpu_s = 0.0, 0.0
    for checkpoint in range(1, checkpoints + 1):
        started, started_cpu = time.monotonic(), time.process_time()
        for _ in range(steps * (checkpoint - 1) // checkpoints, steps * checkpoint // checkpoints):
            rows = rng.integers(len(rewards), size=len(intervals))
            algorithm.update(
                TransitionMiniBatch(
                    observations=data["observations"][rows],
                    actions=data["actions"][rows],
                    rewards=rewards[rows],
                    next_observations=data["next_observations"][rows],
                    next_actions=data["next_actions"][rows],
                    terminals=terminals[rows],
                    intervals=intervals,
                    transitions=[],
                )
            )
        train_s += time.monotonic() - started
        train_cpu_s += time.process_time() - started_cpu
        algorithm.save_policy(str(out / f"policy-{checkpoint}.pt"))
        told = {"steps": steps * checkpoint // checkpoints, "train_s": train_s, "train_cpu_s": train_cpu_s}
        print(json.dumps(told), flush=True)
    golden = data["observations"][:_GOLDEN_ROWS]
    np.savez(out / "golden.npz", observations=golden, actions=algorithm.predict(golden))


if __name__ == "__main__":
    main()
