"""What only the user knows about a robot's arrays: names, units and the control period."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ContractError(ValueError):
    """A contract file that cannot be meant; the message names the field."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """Names and units of every element, in order; empty where the file says nothing.

    Attributes:
        control_period_s: seconds between two observations; None where the file says nothing.
    """

    observation_names: tuple[str, ...] = ()
    observation_units: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()
    action_units: tuple[str, ...] = ()
    control_period_s: float | None = None


def read_contract(path: Path) -> Contract:
    """Reads JSON like `{"observation": {"names": [...], "units": [...]}, "action": {...}, "control_period_s": 0.02}`.

    Raises:
        ContractError: the file is missing, no JSON, or has an unknown or misshapen field.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ContractError(f"--contract {path}: expected a readable JSON file") from error
    fields: dict[str, Any] = {}
    for key, value in _object(path, "the file", document, {"observation", "action", "control_period_s"}).items():
        if key == "control_period_s":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ContractError(f"--contract {path}: control_period_s: expected seconds above 0, got {value!r}")
            fields[key] = float(value)
            continue
        for part, texts in _object(path, key, value, {"names", "units"}).items():
            if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
                raise ContractError(f"--contract {path}: {key}.{part}: expected a list of texts, got {texts!r:.64}")
            fields[f"{key}_{part}"] = tuple(texts)
    return Contract(**fields)


def _object(path: Path, name: str, value: Any, known: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or not value.keys() <= known:
        raise ContractError(f"--contract {path}: {name}: expected an object with {', '.join(sorted(known))}")
    return value
