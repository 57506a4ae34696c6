"""Hyper-parameters of a training run, and presets of them."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what is learned from a given dataset."""

    seed: int = 0
    """Seeds initialisation, batches and sampled actions; 0 or more."""
    mixture_steps: int = 50_000
    """Gradient steps of the behaviour mixture, and of behaviour cloning beside it."""
    steps: int = 200_000
    """Gradient steps of critics, hyper-critic and actor, after the mixture is frozen."""
    num_components: int = 10
    """M. More components than real modes is cheap insurance: unused ones are masked."""
    min_mixing_weight: float = 0.05
    """Components below this mixing weight are never chosen; capped at 0.5/M. 0 turns the mask off (not advised)."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of critics, hyper-critic, actor and behaviour cloning."""
    mixture_hidden: tuple[int, ...] = (256, 256)
    """Widths of the mixture's trunk."""
    hyper_head: Literal["components", "one_hot"] = "components"
    """Hyper-critic: one network with M outputs (fast), or a scalar network on a one-hot component (as published)."""
    num_critics: int = 1
    """C; the target takes their minimum, hyper-Q and advantages their mean."""
    inverse_temperature: float = 5.0
    """β, multiplies the advantage in exp(β A). Higher imitates more sharply, and climbs errors of the critic."""
    max_imitation_weight: float = 50.0
    """C of eq. 18, the ceiling of an imitation weight."""
    imitation_noise_std: float = 0.0
    """Noise on the imitated action, unit actions. Above 0 the actor leaves the mode."""
    target_noise_std: float = 0.2
    """Noise on the next action in the critic's target (clipped at ±0.5), unit actions."""
    discount: float = 0.99
    """γ, 0 to 1."""
    reward_scale: float = 1.0
    """Multiplies every reward before training; advantages scale with it."""
    mixture_batch: int = 512
    """Rows per mixture step."""
    batch: int = 256
    """Rows per critic and actor step."""
    hyper_batch: int = 1024
    """Rows per hyper-critic step; each brings M actions to value."""
    mixture_learning_rate: float = 1e-3
    """Adam, decays linearly to 0 over the last 30 % of `mixture_steps`; behaviour cloning has the same schedule."""
    critic_learning_rate: float = 3e-4
    """Adam. 1e-3 for runs of 20,000 steps and fewer."""
    hyper_learning_rate: float = 1e-3
    """Adam."""
    actor_learning_rate: float = 1e-3
    """Adam."""
    target_update_rate: float = 0.005
    """τ: share of the critic that enters its target at every second step."""
    held_out_share: float = 0.05
    """Share of the episodes that nothing is trained on, at least one of ten: export calibrates its warnings there."""
    mixture_cache_bytes: int = 1 << 30
    """The frozen mixture's outputs for the whole dataset are kept where they fit in this many bytes."""
    threads: int = 0
    """torch's CPU threads; 0 leaves its default. Nets of 64 units are fastest with 1."""

    def __post_init__(self) -> None:
        positive = ("mixture_steps", "steps", "num_components", "num_critics", "mixture_batch", "batch", "hyper_batch")
        for name in positive:
            _require(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        for name in ("mixture_learning_rate", "critic_learning_rate", "hyper_learning_rate", "actor_learning_rate"):
            _require(0.0 < getattr(self, name) <= 1.0, name, "a rate in (0, 1]", getattr(self, name))
        for name in ("imitation_noise_std", "target_noise_std", "inverse_temperature"):
            value = getattr(self, name)
            _require(value >= 0.0 and math.isfinite(value), name, "0 or more, finite", value)
        for name in ("hidden", "mixture_hidden"):
            widths = getattr(self, name)
            _require(bool(widths) and all(width >= 1 for width in widths), name, "one or more positive widths", widths)
        _require(self.seed >= 0, "seed", "0 or more", self.seed)
        _require(0.0 <= self.min_mixing_weight < 1.0, "min_mixing_weight", "0 to below 1", self.min_mixing_weight)
        _require(0.0 <= self.held_out_share <= 0.5, "held_out_share", "0 to 0.5", self.held_out_share)
        _require(0.0 <= self.discount <= 1.0, "discount", "0 to 1", self.discount)
        _require(0.0 < self.target_update_rate <= 1.0, "target_update_rate", "in (0, 1]", self.target_update_rate)
        _require(
            self.reward_scale > 0 and math.isfinite(self.reward_scale), "reward_scale", "above 0", self.reward_scale
        )
        _require(self.max_imitation_weight >= 1.0, "max_imitation_weight", "1 or more", self.max_imitation_weight)
        _require(self.threads >= 0, "threads", "0 or more", self.threads)
        _require(self.mixture_cache_bytes >= 0, "mixture_cache_bytes", "0 or more", self.mixture_cache_bytes)

    @property
    def effective_min_mixing_weight(self) -> float:
        """The mask's threshold: with M equal weights of 1/M, a fixed one would exclude all or sit on them."""
        return min(self.min_mixing_weight, 0.5 / self.num_components)

    @property
    def digest(self) -> str:
        """sha256 of all fields, hexadecimal."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "TrainConfig":
        """Inverse of `dataclasses.asdict` after a trip through JSON.

        Raises:
            ValueError: a field that this version does not know, or a bad value.
        """
        unknown = document.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"training configuration: expected known fields, got {sorted(unknown)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}
        return cls(**values)


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


_STANDARD = TrainConfig()

PRESETS: dict[str, TrainConfig] = {
    # Real datasets with time to train: the published sizes, with our mask, initialisation and hyper-critic head.
    "standard": _STANDARD,
    # Locomotion within minutes on two CPU cores; see docs/results.md for what that budget buys.
    "locomotion_cpu": replace(
        _STANDARD,
        mixture_steps=4_000,
        steps=8_000,
        num_components=5,
        hidden=(128, 128),
        mixture_batch=256,
        batch=128,
        hyper_batch=128,
        reward_scale=0.1,
        critic_learning_rate=1e-3,
        target_update_rate=0.01,
        threads=1,
    ),
    # Low-dimensional tasks within seconds: the fork and the bandit.
    "small": replace(
        _STANDARD,
        mixture_steps=1_500,
        steps=3_000,
        num_components=8,
        hidden=(64, 64),
        mixture_hidden=(64, 64),
        mixture_batch=256,
        batch=128,
        hyper_batch=128,
        critic_learning_rate=1e-3,
        threads=1,
    ),
}
