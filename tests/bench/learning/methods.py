"""What learns: LOM and its degenerate cases here, other methods by d3rlpy; all with the preset's sizes and rates."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lom.config import AS_PUBLISHED, PRESETS, TrainConfig
from tests.bench.learning.tasks import Task

_ONE_COMPONENT: dict[str, Any] = {**AS_PUBLISHED, "num_components": 1, "min_mixing_weight": 0.05}

LOM_OPTIONS: dict[str, dict[str, Any]] = {
    "lom": {},
    "onestep": _ONE_COMPONENT,
    "awr": {**_ONE_COMPONENT, "imitated_actions": "data"},
    "lom-density": {"bound_margin": 0.0, "widening_share": 0.0},
    "lom-wide": {"widening_share": 0.0},
    "lom-direct": {"bound_margin": 0.0, "widening_share": 0.0, "actor_form": "direct"},
    "lom-no-limits": AS_PUBLISHED,
    "lom-no-hazard": {"hazard": 0.0},
    "lom-hyper8": {"advantage_baseline": "hyper", "imitation_samples": 8},
    "lom-data": {"imitated_actions": "data"},
    "lom-n-step": {"n_step": 50},
    "lom-no-mask": {"min_mixing_weight": 0.0},
}
"""Our methods: fields of the preset that they set. With one component the mask changes nothing."""

D3RLPY_ALGORITHMS: dict[str, dict[str, Any]] = {
    "bc-all-steps": {},
    "td3_bc": {},
    "iql": {},
    "cql": {},
}
"""Their methods: fields of the library's configuration that they set; everything else is its default."""

METHODS = (*LOM_OPTIONS, *D3RLPY_ALGORITHMS)

VARIANTS: dict[str, tuple[str, ...]] = {"lom": ("actor", "greedy_mode", "bc"), "onestep": ("actor",), "awr": ("actor",)}
"""Which ways to act one training is evaluated for; cloning is trained beside every mixture, and evaluated once."""

_IQL_RETURN_RANGE = 1000.0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Gradient steps and rows; every method takes `mixture_steps + steps` steps in all."""

    mixture_steps: int
    steps: int
    rows: int

    @classmethod
    def of(cls, task: Task, *, steps: int = 0, mixture_steps: int = 0, rows: int = 0) -> "Budget":
        """What was asked for; where that is 0 the task's, and where that is 0 the preset's."""
        preset = PRESETS[task.preset]
        return cls(
            mixture_steps=mixture_steps or task.mixture_steps or preset.mixture_steps,
            steps=steps or task.steps or preset.steps,
            rows=rows or task.rows,
        )


def variants_of(method: str) -> tuple[str, ...]:
    """Ways to act that one training of this method gives."""
    if method in D3RLPY_ALGORITHMS:
        return ("policy",)
    return VARIANTS.get(method, ("actor", "greedy_mode"))


def lom_config(task: Task, method: str, budget: Budget, seed: int) -> TrainConfig:
    """What one seed of one of our methods is trained by: all rows, one thread."""
    return replace(
        PRESETS[task.preset],
        **LOM_OPTIONS[method],
        mixture_steps=budget.mixture_steps,
        steps=budget.steps,
        seed=seed,
        threads=1,
        held_out_share=0.0,
    )


def d3rlpy_config(task: Task, method: str, budget: Budget, seed: int) -> dict[str, Any]:
    """The same for one of theirs, as d3rlpy_trainer.py reads it.

    Sizes, batch, discount and rates are the preset's. Rewards are the data's own; IQL's are scaled for locomotion as
    its authors do, to a range of returns of 1,000.
    """
    preset = PRESETS[task.preset]
    if method == "bc-all-steps":
        rates = {"learning_rate": preset.actor_learning_rate}
    else:
        rates = {
            "tau": preset.target_update_rate,
            "actor_learning_rate": preset.actor_learning_rate,
            "critic_learning_rate": preset.critic_learning_rate,
        }
    fields = {"batch_size": preset.batch, "gamma": preset.discount, **rates, **D3RLPY_ALGORITHMS[method]}
    return {
        "algorithm": method,
        "fields": fields,
        "hidden": list(preset.hidden),
        "steps": budget.mixture_steps + budget.steps,
        "return_range": _IQL_RETURN_RANGE if method == "iql" and task.group != "generated" else None,
        "seed": seed,
    }


def settings_of(task: Task, method: str, budget: Budget) -> Mapping[str, Any]:
    """Everything that decides a result but for its seed."""
    if method in LOM_OPTIONS:
        return _plain(asdict(lom_config(task, method, budget, seed=0)) | {"rows": budget.rows})
    return _plain(d3rlpy_config(task, method, budget, seed=0) | {"rows": budget.rows})


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, without what does not decide a result."""
    ignored = ("seed", "threads", "device", "mixture_cache_bytes")
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items() if k not in ignored}
