"""`manifest.json` as typed, checked values."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lom_bundle.errors import BundleError

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
GOLDEN_FILE = "golden.npz"
CARD_FILE = "README.md"
# A variant's second graph goes by the variant's name and this.
EXPLAIN_SUFFIX = ".explain"

_POLICY_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class SpaceSpec:
    """One named array of the contract.

    Attributes:
        name: the graph's tensor name.
        shape: without the batch axis.
        low, high: bounds of every element, flattened row-major, in environment units; ±inf where unbounded.
        element_names: what each element is (a joint, say), in order; empty where the exporter was not told.
        units: unit of each element; empty where the exporter was not told.
    """

    name: str
    shape: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    dtype: str = "float32"
    element_names: tuple[str, ...] = ()
    units: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype != "float32":
            raise BundleError("BAD_MANIFEST", f"space {self.name!r}: expected dtype float32, got {self.dtype!r}")
        if not self.shape or any(dim < 1 for dim in self.shape):
            raise BundleError("BAD_MANIFEST", f"space {self.name!r}: expected positive dimensions, got {self.shape}")
        size = math.prod(self.shape)
        if len(self.low) != size or len(self.high) != size:
            raise BundleError(
                "BAD_MANIFEST",
                f"space {self.name!r}: expected {size} bounds, got {len(self.low)} low and {len(self.high)} high",
            )
        for field_name in ("element_names", "units"):
            told = len(getattr(self, field_name))
            if told not in (0, size):
                raise BundleError("BAD_MANIFEST", f"space {self.name!r}: {field_name}: expected {size}, got {told}")
        if len(set(self.element_names)) != len(self.element_names):
            raise BundleError("BAD_MANIFEST", f"space {self.name!r}: element_names: expected each one once")
        if not all(low < high for low, high in zip(self.low, self.high, strict=True)):
            raise BundleError("BAD_MANIFEST", f"space {self.name!r}: expected every low below its high")

    @property
    def elements(self) -> str:
        """Names with their units, in order, for people; empty where the exporter was not told any."""
        units = self.units or ("",) * len(self.element_names)
        return ", ".join(f"{name} {unit}".strip() for name, unit in zip(self.element_names, units, strict=True))


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """One ONNX graph.

    Attributes:
        graph: its file name.
        outputs: its tensor names; `action` always, for `greedy_mode` also `mode` and `margin`, and where the bundle
            is calibrated `state_score` and `action_score`.
        inputs: tensor names beyond those of the contract.
    """

    graph: str
    outputs: tuple[str, ...]
    inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "action" not in self.outputs:
            raise BundleError("BAD_MANIFEST", f"graph {self.graph[:64]!r}: expected an output 'action'")


@dataclass(frozen=True, kw_only=True)
class VariantSpec(GraphSpec):
    """One way to act.

    Attributes:
        explain: a second, slower graph of the same policy that also takes a forced mode and sampling noise, and also
            returns hyper-Q, mixing weights, means and standard deviations of every component. None where there is
            nothing to explain.
    """

    explain: GraphSpec | None = None


@dataclass(frozen=True, kw_only=True)
class GoldenSpec:
    """How an answer is compared with the golden rows.

    Attributes:
        rows: number of golden observations.
        action_tolerance: largest difference of an action element, as a fraction of that element's range.
        tie_width: a row whose margin (hyper-Q units) is below it is a tie: either mode is right there.
        output_tolerance: largest difference of any other output, relative to its size where that is above 1.
    """

    rows: int
    action_tolerance: float
    tie_width: float
    output_tolerance: float = 1e-4

    def __post_init__(self) -> None:
        # A hostile manifest must not be able to switch its own proof off.
        for name in ("action_tolerance", "tie_width", "output_tolerance"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise BundleError("BAD_MANIFEST", f"golden.{name}: expected a finite number of 0 or more, got {value}")
        if self.rows < 1:
            raise BundleError("BAD_MANIFEST", f"golden.rows: expected 1 or more, got {self.rows}")


@dataclass(frozen=True, kw_only=True)
class WarningSpec:
    """When a score of the graph is worth a warning: `score > threshold`, and always where it is NaN.

    Attributes:
        thresholds: by variant.
        false_alarm_rate: share of ordinary rows that the threshold was set to flag.
        calibration: how it was set, for people.
        held_out_episodes, held_out_rows: what the rates below were measured on; 0 where nothing was held out.
        held_out_false_alarms: by variant, the share of those rows above the threshold.
    """

    thresholds: Mapping[str, float]
    false_alarm_rate: float
    calibration: str
    held_out_episodes: int
    held_out_rows: int
    held_out_false_alarms: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that a server or a person must know before the first action.

    Attributes:
        policy: name under which it is served, `[a-z0-9][a-z0-9_-]{0,63}`.
        inputs, action: the contract; `contract_hash` is computed from them.
        variants: graphs by variant name.
        default_variant: the one that runs when a request names none.
        num_components: M of the behaviour mixture.
        min_mixing_weight: components below it are never chosen.
        control_period_s: seconds between two observations in the training data; None where the exporter was not told.
        precision: of the graphs' weights, `fp32`, `fp16` or `int8`.
        warnings: by score, `state_score` (is the observation like the training data?) and `action_score` (would the
            behaviour have acted like this?); empty where there was nothing to calibrate on.
        files: {file name: {"sha256": hexadecimal, "bytes": size}}; the writer fills it in.
        evaluation: what chose the default variant, at export or at the end of training; empty when nothing did.
        provenance: versions, dataset fingerprint, training configuration, parity measured at export.
    """

    policy: str
    inputs: tuple[SpaceSpec, ...]
    action: SpaceSpec
    variants: Mapping[str, VariantSpec]
    default_variant: str
    num_components: int
    min_mixing_weight: float
    golden: GoldenSpec
    control_period_s: float | None = None
    precision: str = "fp32"
    warnings: Mapping[str, WarningSpec] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _POLICY_NAME.fullmatch(self.policy):
            raise BundleError("BAD_MANIFEST", f"policy: expected {_POLICY_NAME.pattern}, got {self.policy[:64]!r}")
        if self.default_variant not in self.variants:
            raise BundleError(
                "BAD_MANIFEST",
                f"default_variant: expected one of {sorted(self.variants)}, got {self.default_variant!r}",
            )
        for file_name in self.files:
            if not _FILE_NAME.fullmatch(file_name):
                raise BundleError("BAD_MANIFEST", f"files: expected a plain file name, got {file_name[:64]!r}")
        if not math.isfinite(self.min_mixing_weight) or self.num_components < 1:
            raise BundleError("BAD_MANIFEST", "expected num_components of 1 or more and a finite min_mixing_weight")
        period = self.control_period_s
        if period is not None and not 0.0 < period < math.inf:
            raise BundleError("BAD_MANIFEST", f"control_period_s: expected a finite number above 0, got {period!r}")

    @property
    def graph_files(self) -> tuple[str, ...]:
        """File names of all graphs."""
        graphs = [graph for variant in self.variants.values() for graph in (variant, variant.explain)]
        return tuple(graph.graph for graph in graphs if graph is not None)

    @property
    def contract_hash(self) -> str:
        """sha256 over names, order, shapes, dtypes, units and bounds of inputs and action, and the control period."""
        contract = {
            "inputs": [_space_to_json(space) for space in self.inputs],
            "action": _space_to_json(self.action),
            "control_period_s": self.control_period_s,
        }
        return hashlib.sha256(json.dumps(contract, sort_keys=True, allow_nan=False).encode()).hexdigest()

    def to_json(self) -> str:
        """Strict JSON (no Infinity, no NaN), the text of `manifest.json`."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "policy": self.policy,
            "contract_hash": self.contract_hash,
            "inputs": [_space_to_json(space) for space in self.inputs],
            "action": _space_to_json(self.action),
            "variants": {name: asdict(variant) for name, variant in self.variants.items()},
            "default_variant": self.default_variant,
            "num_components": self.num_components,
            "min_mixing_weight": self.min_mixing_weight,
            "control_period_s": self.control_period_s,
            "precision": self.precision,
            "golden": asdict(self.golden),
            "warnings": {name: asdict(warning) for name, warning in self.warnings.items()},
            "evaluation": self.evaluation,
            "provenance": self.provenance,
            "files": self.files,
        }
        return json.dumps(document, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """Parses and checks.

        Raises:
            BundleError: BAD_MANIFEST, naming the field.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError("BAD_MANIFEST", "manifest.json: expected JSON") from error
        if not isinstance(document, dict):
            raise BundleError("BAD_MANIFEST", "manifest.json: expected a JSON object")
        version = document.get("schema_version")
        if version != SCHEMA_VERSION:
            raise BundleError("BAD_MANIFEST", f"schema_version: expected {SCHEMA_VERSION}, got {version!r}")
        try:
            manifest = cls(
                policy=document["policy"],
                inputs=tuple(_space_from_json(space) for space in document["inputs"]),
                action=_space_from_json(document["action"]),
                variants={name: _variant_from_json(variant) for name, variant in document["variants"].items()},
                default_variant=document["default_variant"],
                num_components=int(document["num_components"]),
                min_mixing_weight=float(document["min_mixing_weight"]),
                golden=GoldenSpec(
                    rows=int(document["golden"]["rows"]),
                    action_tolerance=float(document["golden"]["action_tolerance"]),
                    output_tolerance=float(document["golden"]["output_tolerance"]),
                    tie_width=float(document["golden"]["tie_width"]),
                ),
                control_period_s=_optional_float(document["control_period_s"]),
                precision=str(document["precision"]),
                warnings={name: _warning_from_json(warning) for name, warning in document["warnings"].items()},
                evaluation=dict(document["evaluation"]),
                provenance=dict(document["provenance"]),
                files={
                    name: {"sha256": str(entry["sha256"]), "bytes": int(entry["bytes"])}
                    for name, entry in document["files"].items()
                },
            )
        except KeyError as error:
            raise BundleError("BAD_MANIFEST", f"manifest.json: expected a field {error.args[0]!r}") from error
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise BundleError("BAD_MANIFEST", "manifest.json: a field has the wrong type") from error
        if document.get("contract_hash") != manifest.contract_hash:
            raise BundleError("CONTRACT_MISMATCH", "manifest.json: contract_hash does not belong to its spaces")
        return manifest


def _space_to_json(space: SpaceSpec) -> dict[str, Any]:
    return {
        "name": space.name,
        "dtype": space.dtype,
        "shape": list(space.shape),
        "low": [value if math.isfinite(value) else None for value in space.low],
        "high": [value if math.isfinite(value) else None for value in space.high],
        "element_names": list(space.element_names),
        "units": list(space.units),
    }


def _space_from_json(space: Mapping[str, Any]) -> SpaceSpec:
    return SpaceSpec(
        name=str(space["name"]),
        dtype=str(space["dtype"]),
        shape=tuple(int(dim) for dim in space["shape"]),
        low=tuple(-math.inf if value is None else float(value) for value in space["low"]),
        high=tuple(math.inf if value is None else float(value) for value in space["high"]),
        element_names=tuple(str(name) for name in space["element_names"]),
        units=tuple(str(unit) for unit in space["units"]),
    )


def _graph_from_json(graph: Mapping[str, Any]) -> GraphSpec:
    return GraphSpec(graph=str(graph["graph"]), outputs=tuple(graph["outputs"]), inputs=tuple(graph["inputs"]))


def _variant_from_json(variant: Mapping[str, Any]) -> VariantSpec:
    explain = variant["explain"]
    return VariantSpec(
        **vars(_graph_from_json(variant)), explain=None if explain is None else _graph_from_json(explain)
    )


def _warning_from_json(warning: Mapping[str, Any]) -> WarningSpec:
    return WarningSpec(
        thresholds={name: float(value) for name, value in warning["thresholds"].items()},
        false_alarm_rate=float(warning["false_alarm_rate"]),
        calibration=str(warning["calibration"]),
        held_out_episodes=int(warning["held_out_episodes"]),
        held_out_rows=int(warning["held_out_rows"]),
        held_out_false_alarms={name: float(value) for name, value in warning["held_out_false_alarms"].items()},
    )


def _optional_float(value: Any) -> float | None:
    return None if value is None else float(value)
