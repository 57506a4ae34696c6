"""Runs on disk without the training: random networks, real format."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lom.config import TrainConfig
from lom.policy import LomPolicy
from lom.run import DataSamples, RunSpec, create_run, save_checkpoint


def samples_of(observations: NDArray[np.float32], *, episode_rows: int = 50) -> DataSamples:
    """The first five sixths as trained on, the rest as held out, in episodes of `episode_rows` rows."""
    episodes = (np.arange(len(observations)) // episode_rows).astype(np.int32)
    cut = len(observations) * 5 // 6
    return DataSamples(
        trained_on=observations[:cut],
        trained_on_episodes=episodes[:cut],
        held_out=observations[cut:],
        held_out_episodes=episodes[cut:],
    )


def save_untrained_run(
    folder: Path,
    *,
    config: TrainConfig | None = None,
    observation_dim: int = 2,
    action_low: tuple[float, ...] = (-1.0, -1.0),
    action_high: tuple[float, ...] = (1.0, 1.0),
    steps_done: tuple[int, int] | None = None,
    env: str | None = None,
    seed: int = 0,
) -> LomPolicy:
    """Writes a run whose policy has random weights and a normaliser that matters; returns that policy."""
    config = config or TrainConfig(mixture_steps=5, steps=4, num_components=4, hidden=(16, 16), mixture_hidden=(16, 16))
    spec = RunSpec(
        env=env,
        datasets=("random.npz",),
        dataset_fingerprint="0" * 64,
        dataset_rows=3000,
        observation_low=(-np.inf,) * observation_dim,
        observation_high=(np.inf,) * observation_dim,
        action_low=action_low,
        action_high=action_high,
        config=replace(config),
    )
    rng = np.random.default_rng(seed)
    observations = (3.0 + 2.0 * rng.standard_normal((3000, observation_dim))).astype(np.float32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = LomPolicy(config, observation_dim, torch.tensor(action_low), torch.tensor(action_high))
        # Spread means and mixing weights out, so that modes differ and the mask has something to do.
        with torch.no_grad():
            policy.mixture.mixing_logits.weight.mul_(20)
            policy.mixture.raw_means.weight.mul_(5)
            if policy.is_residual:  # it would answer 0
                policy.actor.load_state_dict(policy.bc.state_dict())
    policy.normaliser.fit(torch.from_numpy(observations))
    tensors = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()}
    tensors["steps_done"] = torch.tensor(steps_done or (config.mixture_steps, config.steps))
    create_run(folder, spec)
    save_checkpoint(folder, tensors, samples_of(observations))
    return policy.eval()
