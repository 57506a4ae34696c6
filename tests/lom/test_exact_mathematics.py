"""What training leaves out for speed changes no number: it is held against a naive transcription of the equations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lom.config import AS_PUBLISHED, PRESETS
from lom.learner import Learner
from tests.bench.training import NaivePolicyStage, random_transitions

SMALL = replace(
    PRESETS["small"],
    hyper_head="one_hot",
    mixture_steps=30,
    hidden=(32, 32),
    mixture_hidden=(32,),
    num_components=5,
    hyper_batch=64,
    **AS_PUBLISHED,
)


class SameDraws:
    """The random numbers that the learner will draw, in its order."""

    def __init__(self, learner: Learner) -> None:
        self._generator = torch.Generator()
        self._generator.set_state(learner.state()["generator"])

    def integers(self, below: int, count: int) -> NDArray[np.int64]:
        return torch.randint(below, (count,), generator=self._generator).numpy()

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generator)


@pytest.mark.parametrize("cache_bytes", [1 << 30, 0])
def test_twenty_steps_lose_what_a_naive_transcription_loses(cache_bytes: int) -> None:
    transitions = random_transitions(rows=500, observation_dim=5, action_dim=3)
    config = replace(SMALL, mixture_cache_bytes=cache_bytes)
    learner = Learner(transitions, config, -torch.ones(3), torch.ones(3))
    steps = learner.remaining()
    for _ in range(config.mixture_steps):
        next(steps)
    naive = NaivePolicyStage(transitions, learner, SameDraws(learner), torch.device("cpu"))
    for _ in range(20):
        next(steps)
        metrics, expected = learner.metrics(), naive.step()
        for name, loss in expected.items():
            assert metrics[f"{name}/loss"] == pytest.approx(loss, abs=1e-5, rel=1e-5), name
