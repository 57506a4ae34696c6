"""Hyper-parameters of a training run, and presets of them."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple

_FEW_ROWS_MASK, _MANY_ROWS_MASK, _MANY_ROWS = 0.05, 0.001, 50_000


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
    min_mixing_weight: float | None = None
    """Components below this mixing weight are never chosen; capped at 0.5/M. None goes by the data, as a weight needs
    rows to stand on: 0.05 for fewer than 50,000, and 0.001 from there on, or a good policy is never joined where a bad
    one left most of the rows. 0 turns the mask off (not advised)."""
    hazard: float = 0.05
    """The chance of leaving the data in a step by what nobody in the data would do. A mode that a share u of the
    behaviour acts by, or nearly, has (1 - u) of it, and costs as much of what the state is worth above the worst ones;
    besides, less usual modes must be better by more than hyper-Q's noise (`LomPolicy.preference`). A gain that is real
    once need not be one in every step: the states are then no longer those of the data. 0 is neither, as published."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of critics, hyper-critic, actor and behaviour cloning."""
    mixture_hidden: tuple[int, ...] = (256, 256)
    """Widths of the mixture's trunk."""
    initial_means: Literal["data", "network"] = "data"
    """Where components start: at far-apart actions of the data (k-means++ seeding), or where random weights put them
    (as published), which is near the middle of the action space and misses modes more often."""
    log_std_min: float = -5.0
    """Floor of a component's log-std (the ceiling is 0), unit actions; a soft clamp, one for fitting, scoring and
    sampling. Lower fits nearly deterministic data more closely; such modes leave the actor nothing to improve on.
    Published: -15."""
    bound_margin: float = 0.05
    """Actions this near to a bound, unit actions, are likely as a whole: what the mixture is fitted to there is the
    probability of that margin and all beyond. A controller whose noise is clipped, or that saturates, puts many actions
    on one point, where a density has no limit: components then tell clipped from unclipped instead of left from right.
    0 is a density everywhere, as published."""
    widening_share: float = 0.6
    """First share of `mixture_steps` over which the widest std that a component may have rises from 0.25 to 1 (log-std
    linearly, unit actions). A component that is wide from the start covers several modes where few rows tell them
    apart, and keeps them: the others are elsewhere by then. 0 lets it be wide at once, as published."""
    hyper_head: Literal["components", "one_hot"] = "components"
    """Hyper-critic: one network with M outputs (fast), or a scalar network on a one-hot component (as published)."""
    num_critics: int = 1
    """C; the target takes their minimum (eq. 16), `critic_reduction` says what hyper-Q and advantages take."""
    critic_reduction: Literal["mean", "min", "first"] = "mean"
    """What C critics say together in hyper-Q's targets (eq. 17) and in advantages (eq. 18). The mean is the least
    noisy; the minimum distrusts modes on which critics disagree; the first alone is the authors' code. All are equal
    for C = 1."""
    advantage_baseline: Literal["mode_mean", "policy", "hyper"] = "mode_mean"
    """What an action's value is compared with (eq. 18). mode_mean: Q(s, μ) of the chosen mode, as published. policy:
    Q(s, π(s)), the authors' code; follows the actor, so that weights shrink as it improves. hyper: value and baseline
    are of the greedy hyper-policy instead of the behaviour, from critics of their own whose target acts by the chosen
    mode at s' (Theorem 2 holds only so); about a third dearer, and farther from the data."""
    normalise_advantages: bool = False
    """Divide advantages by their root mean square over the batch. Makes `inverse_temperature` independent of the
    reward's scale, but gives noise the same weight as signal where all actions of a mode are worth the same."""
    imitated_actions: Literal["samples", "data"] = "samples"
    """What the actor imitates. samples: actions drawn from the chosen component, as published. data: the action that
    the data took, times the probability that the chosen component brought it forth; the same optimum where the mixture
    is the behaviour, and nothing that nobody did is imitated where it is not. With one component this is
    advantage-weighted regression."""
    imitation_samples: int = 1
    """Actions of the chosen mode that each state is shown in an actor step. Above 1 the actor is fitted to their
    self-normalised weighted mean Σ w a / Σ w, the same optimum state by state (eq. 18) with less noise; costs that
    many critic evaluations."""
    actor_form: Literal["residual", "direct"] = "residual"
    """What the actor learns. residual: by how much to deviate from the chosen mode's mean, at most three of the mode's
    standard deviations; it jumps as the choice does, wrong choices included. direct: the action, as published; it
    needs neither mixture nor hyper-critic to act, and goes between modes where the choice jumps."""
    inverse_temperature: float = 5.0
    """β, multiplies the advantage in exp(β A). Higher imitates more sharply, and climbs errors of the critic."""
    max_imitation_weight: float = 50.0
    """C of eq. 18, the ceiling of an imitation weight."""
    max_drift: float = 10.0
    """D: how far weights may lead the actor from the chosen mode over the horizon H, in the mode's standard deviations.
    exp(β A) leans every action by about β rms(A) of them, and all may lean to one side: β is lowered to D / (H rms(A))
    where that is less. An action that is better once need not be better in every step: the states are then no longer
    those of the data. H is 1 / (1 - γ), or the length of episodes that ended earlier; mean over rows. 0 is no limit, as
    published."""
    imitation_noise_std: float = 0.0
    """Noise on the imitated action, unit actions. Above 0 the actor leaves the mode."""
    target_noise_std: float = 0.2
    """Noise on the next action in the critic's target (clipped at ±0.5), unit actions."""
    n_step: int = 1
    """Rewards that the critic's target sums before it bootstraps (eq. 16: one). More reach a horizon of a hundred in
    far fewer gradient steps, with more noise; data of several policies is not Markov, and long sums then say who
    acted."""
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
    """Adam; behaviour cloning has the same."""
    mixture_decay_share: float = 0.3
    """Last share of `mixture_steps` over which its learning rate falls linearly to 0; 0 keeps it constant (as
    published). Decay trades speed at the end for a fit that no longer jumps."""
    critic_learning_rate: float = 3e-4
    """Adam. 1e-3 for runs of 20,000 steps and fewer."""
    hyper_learning_rate: float = 1e-3
    """Adam."""
    actor_learning_rate: float = 1e-3
    """Adam."""
    target_update_rate: float = 0.005
    """τ: share of the critic that enters its target at every second step."""
    decay_share: float = 0.0
    """Last share of `steps` over which the rates of critics, hyper-critic and actor fall linearly to 0; 0 keeps them
    (as published). Decay settles the last weights, which are the ones that act, and learns less in the same steps."""
    averaging_steps: int = 0
    """Actor and hyper-critic that act are the averages of their weights over about this many last steps (all steps
    while there are fewer); 0 takes the last weights (as published). Averages are smoother and lag behind."""
    held_out_share: float = 0.05
    """Share of the episodes that nothing is trained on, at least one of ten: export calibrates its warnings there."""
    mixture_cache_bytes: int = 1 << 30
    """The frozen mixture's outputs for the whole dataset are kept where they fit in this many bytes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where data and networks are; auto is a GPU where torch sees one. It decides the random numbers too. Training on
    a GPU is untested."""
    threads: int = 0
    """torch's CPU threads; 0 leaves its default. Nets of 64 units are fastest with 1."""

    def __post_init__(self) -> None:
        positive = (
            "mixture_steps",
            "steps",
            "num_components",
            "num_critics",
            "mixture_batch",
            "batch",
            "hyper_batch",
            "imitation_samples",
            "n_step",
        )
        for name in positive:
            _require(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        for name in ("mixture_learning_rate", "critic_learning_rate", "hyper_learning_rate", "actor_learning_rate"):
            _require(0.0 < getattr(self, name) <= 1.0, name, "a rate in (0, 1]", getattr(self, name))
        for name in (
            "imitation_noise_std",
            "target_noise_std",
            "inverse_temperature",
            "max_drift",
        ):
            value = getattr(self, name)
            _require(value >= 0.0 and math.isfinite(value), name, "0 or more, finite", value)
        for name in ("hidden", "mixture_hidden"):
            widths = getattr(self, name)
            _require(bool(widths) and all(width >= 1 for width in widths), name, "one or more positive widths", widths)
        for name, choices in _CHOICES.items():
            _require(getattr(self, name) in choices, name, f"one of {choices}", getattr(self, name))
        for name in ("hazard", "mixture_decay_share", "decay_share", "widening_share"):
            _require(0.0 <= getattr(self, name) <= 1.0, name, "0 to 1", getattr(self, name))
        _require(
            self.imitated_actions == "samples" or self.imitation_samples == 1,
            "imitation_samples",
            "1 with imitated_actions = data, which has one action a state",
            self.imitation_samples,
        )
        _require(
            self.advantage_baseline != "hyper" or self.n_step == 1,
            "n_step",
            "1 with advantage_baseline = hyper, whose critics value other steps than the data's",
            self.n_step,
        )
        _require(-20.0 <= self.log_std_min <= -1.0, "log_std_min", "-20 to -1", self.log_std_min)
        _require(0.0 <= self.bound_margin <= 0.5, "bound_margin", "0 to 0.5", self.bound_margin)
        _require(self.averaging_steps >= 0, "averaging_steps", "0 or more", self.averaging_steps)
        _require(self.seed >= 0, "seed", "0 or more", self.seed)
        _require(
            self.min_mixing_weight is None or 0.0 <= self.min_mixing_weight < 1.0,
            "min_mixing_weight",
            "0 to below 1",
            self.min_mixing_weight,
        )
        _require(0.0 <= self.held_out_share <= 0.5, "held_out_share", "0 to 0.5", self.held_out_share)
        _require(0.0 <= self.discount <= 1.0, "discount", "0 to 1", self.discount)
        _require(0.0 < self.target_update_rate <= 1.0, "target_update_rate", "in (0, 1]", self.target_update_rate)
        _require(
            self.reward_scale > 0 and math.isfinite(self.reward_scale), "reward_scale", "above 0", self.reward_scale
        )
        _require(self.max_imitation_weight >= 1.0, "max_imitation_weight", "1 or more", self.max_imitation_weight)
        _require(self.threads >= 0, "threads", "0 or more", self.threads)
        _require(self.mixture_cache_bytes >= 0, "mixture_cache_bytes", "0 or more", self.mixture_cache_bytes)

    def for_rows(self, rows: int) -> "TrainConfig":
        """With the threshold that a dataset of so many rows supports, where none was chosen."""
        if self.min_mixing_weight is not None:
            return self
        return replace(self, min_mixing_weight=_FEW_ROWS_MASK if rows < _MANY_ROWS else _MANY_ROWS_MASK)

    @property
    def effective_min_mixing_weight(self) -> float:
        """The mask's threshold: with M equal weights of 1/M, a fixed one would exclude all or sit on them."""
        chosen = _FEW_ROWS_MASK if self.min_mixing_weight is None else self.min_mixing_weight
        return min(chosen, 0.5 / self.num_components)

    @property
    def effective_hazard(self) -> float:
        """With one component nothing is to be chosen, and nothing is paid."""
        return self.hazard if self.num_components > 1 else 0.0

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
        return cls(**{**AS_PUBLISHED, **values})  # a run from before an addition existed had none


_CHOICES = {
    "hyper_head": ("components", "one_hot"),
    "initial_means": ("data", "network"),
    "critic_reduction": ("mean", "min", "first"),
    "imitated_actions": ("samples", "data"),
    "actor_form": ("residual", "direct"),
    "device": ("auto", "cpu", "cuda"),
    "advantage_baseline": ("mode_mean", "policy", "hyper"),
}


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


AS_PUBLISHED: dict[str, Any] = {
    "hazard": 0.0,
    "max_drift": 0.0,
    "actor_form": "direct",
    "bound_margin": 0.0,
    "widening_share": 0.0,
}
"""Without what this project's defaults add to the published equations, whatever else is chosen."""

_STANDARD = TrainConfig()

_PAPER = replace(
    _STANDARD,
    **AS_PUBLISHED,
    mixture_steps=200_000,
    steps=1_000_000,
    mixture_hidden=(512, 512),
    min_mixing_weight=0.0,
    initial_means="network",
    log_std_min=-15.0,
    mixture_decay_share=0.0,
    target_noise_std=0.0,
    held_out_share=0.0,
)

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
        min_mixing_weight=0.05,
        hidden=(64, 64),
        mixture_hidden=(64, 64),
        mixture_batch=256,
        batch=128,
        hyper_batch=128,
        critic_learning_rate=1e-3,
        threads=1,
    ),
    # The paper's readings: every component may be chosen, no smoothing noise, one critic, no tricks of training.
    "paper": _PAPER,
    # The authors' code as it runs. Its defects (docs/algorithm.md) are not reproduced.
    "faithful": replace(
        _PAPER,
        hyper_head="one_hot",
        advantage_baseline="policy",
        critic_reduction="first",
        target_noise_std=0.2,
    ),
}


class TaskParameters(NamedTuple):
    """What the authors' code tunes per task (its table, 1 December 2024)."""

    num_critics: int
    num_components: int
    inverse_temperature: float
    imitation_noise_std: float
    target_noise_std: float
    max_imitation_weight: float


TASKS: dict[str, TaskParameters] = {
    "halfcheetah-medium-replay": TaskParameters(1, 5, 5.0, 0.4, 0.2, 100.0),
    "hopper-medium-replay": TaskParameters(1, 5, 5.0, 0.0, 0.2, 50.0),
    "walker2d-medium-replay": TaskParameters(1, 10, 5.0, 0.0, 0.2, 50.0),
    "halfcheetah-full-replay": TaskParameters(1, 10, 5.0, 0.4, 0.2, 100.0),
    "hopper-full-replay": TaskParameters(2, 10, 5.0, 0.0, 0.2, 50.0),
    "walker2d-full-replay": TaskParameters(1, 10, 5.0, 0.0, 0.2, 50.0),
    "halfcheetah-medium": TaskParameters(1, 2, 5.0, 0.4, 0.2, 100.0),
    "hopper-medium": TaskParameters(3, 5, 5.0, 0.0, 0.2, 50.0),
    "walker2d-medium": TaskParameters(1, 2, 5.0, 0.0, 0.2, 50.0),
    "halfcheetah-medium-expert": TaskParameters(2, 1, 0.1, 0.0, 0.0, 50.0),
    "hopper-medium-expert": TaskParameters(6, 2, 0.1, 0.0, 0.0, 50.0),
    "walker2d-medium-expert": TaskParameters(3, 5, 0.1, 0.2, 0.0, 50.0),
    "halfcheetah-expert": TaskParameters(1, 2, 0.1, 0.0, 0.0, 50.0),
    "hopper-expert": TaskParameters(1, 2, 0.1, 0.0, 0.2, 50.0),
    "walker2d-expert": TaskParameters(1, 5, 0.1, 0.2, 0.0, 50.0),
}
"""By D4RL name without its version. Values belong to those files and to the published budget."""

_PAPERS_OWN = ("num_components", "inverse_temperature", "max_imitation_weight")


def preset_config(preset: str, task: str | None = None) -> TrainConfig:
    """A preset, with the hyper-parameters of one of the 15 tasks laid over it.

    `task` is the name of D4RL; `-v2` and `-like` (other data of the same make) may follow. The paper has neither
    critic ensembles nor noise, so its preset takes M, β and C of a task only.

    Raises:
        ValueError: no such preset or task.
    """
    if preset not in PRESETS:
        raise ValueError(f"--preset: expected one of {sorted(PRESETS)}, got {preset!r}")
    if task is None:
        return PRESETS[preset]
    name = task.removesuffix("-like").removesuffix("-v2")
    if name not in TASKS:
        raise ValueError(f"--task: expected one of {sorted(TASKS)}, got {task!r}")
    values = TASKS[name]._asdict()
    return replace(PRESETS[preset], **{n: v for n, v in values.items() if preset != "paper" or n in _PAPERS_OWN})
