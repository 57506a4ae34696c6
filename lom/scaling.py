"""Between environment units and network units; both scalings travel inside the exported graph."""

import torch
from torch import Tensor, nn


class ObservationNormaliser(nn.Module):
    """(o - mean) / std per dimension.

    A dimension that never varied in the data is left at (o - mean): dividing by its zero spread would turn the first
    deviation at run time into a huge number.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, observation_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(observation_dim))
        self.register_buffer("std", torch.ones(observation_dim))

    def fit(self, observations: Tensor) -> None:
        """Takes mean and population std from observations, float32[N, O]."""
        wide = observations.double()
        std = wide.std(dim=0, correction=0)
        self.mean.copy_(wide.mean(dim=0))
        # Relative to the magnitude: a constant 1e6 stored in float32 shows a spread that is only rounding.
        smallest = 1e-6 * wide.abs().amax(dim=0).clamp(min=1.0)
        self.std.copy_(torch.where(std < smallest, torch.ones_like(std), std))

    def forward(self, observations: Tensor) -> Tensor:
        """float32[B, O] in environment units -> float32[B, O]."""
        return (observations - self.mean) / self.std


class ActionScaler(nn.Module):
    """Between [low, high] in environment units and [-1, 1] in network units, per dimension."""

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("low", low.float())
        self.register_buffer("high", high.float())

    @property
    def log_half_range(self) -> Tensor:
        """float32[A], what a log standard deviation gains on the way from unit to environment units."""
        return torch.log(0.5 * (self.high - self.low))

    def to_unit(self, actions: Tensor) -> Tensor:
        """float32[..., A], environment units -> [-1, 1]."""
        return 2.0 * (actions - self.low) / (self.high - self.low) - 1.0

    def from_unit(self, unit_actions: Tensor) -> Tensor:
        """float32[..., A], network units -> environment units, inside the bounds whatever the input."""
        return self.clamp(self.low + (unit_actions + 1.0) * 0.5 * (self.high - self.low))

    def clamp(self, actions: Tensor) -> Tensor:
        """float32[..., A], environment units, moved inside the bounds."""
        return torch.minimum(torch.maximum(actions, self.low), self.high)
