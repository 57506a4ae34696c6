"""Compares what a runtime answers with what torch answered: the same rule at export and before serving."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lom_bundle.errors import BundleError
from lom_bundle.manifest import Manifest

Outputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class GoldenReport:
    """What a comparison measured.

    Attributes:
        rows: rows compared.
        ties: rows whose margin was below the tie width; they are left out of `action_error` and of the mode check.
        action_error: largest action difference over the other rows, as a fraction of the action range.
    """

    rows: int
    ties: int
    action_error: float


def check_golden(
    manifest: Manifest,
    variant: str,
    run: Callable[[Outputs], Outputs],
    golden: Mapping[str, NDArray[Any]],
) -> GoldenReport:
    """Runs the golden inputs of `golden` through `run` and compares `variant`'s answers.

    argmax is discontinuous, so modes are compared where the margin exceeds `tie_width`; on the other rows either
    mode is right and only the finiteness and the bounds of the action are asked for.

    Args:
        run: inputs by name -> outputs by name (`action`, and `mode` where the variant has one).
        golden: arrays as `Bundle.golden`; may hold other rows than the bundle's own (the exporter's parity gate).

    Raises:
        BundleError: SELF_TEST_FAILED, naming row, output and difference.
    """
    inputs = {space.name: golden[space.name] for space in manifest.inputs}
    outputs = run(inputs)
    expected = golden[f"{variant}.action"]
    action = outputs["action"]
    rows = len(expected)
    if action.shape != expected.shape or action.dtype != np.float32:
        raise BundleError(
            "SELF_TEST_FAILED",
            f"{variant}: action: expected float32{list(expected.shape)}, got {action.dtype}{list(action.shape)}",
        )
    low = np.asarray(manifest.action.low, dtype=np.float64)
    high = np.asarray(manifest.action.high, dtype=np.float64)
    flat = action.reshape(rows, -1).astype(np.float64)
    outside = ~np.isfinite(flat) | (flat < low - 1e-6 * (high - low)) | (flat > high + 1e-6 * (high - low))
    if outside.any():
        row = int(np.argwhere(outside)[0, 0])
        raise BundleError("SELF_TEST_FAILED", f"{variant}: row {row}: action: expected a value inside the action space")

    tie = np.zeros(rows, dtype=bool)
    if f"{variant}.mode" in golden:
        tie = golden[f"{variant}.margin"] < manifest.golden.tie_width  # NaN (no runner-up) is no tie
        flipped = (outputs["mode"] != golden[f"{variant}.mode"]) & ~tie
        if flipped.any():
            row = int(np.argmax(flipped))
            raise BundleError(
                "SELF_TEST_FAILED",
                f"{variant}: row {row}: mode: expected {int(golden[f'{variant}.mode'][row])}, "
                f"got {int(outputs['mode'][row])} at margin {float(golden[f'{variant}.margin'][row]):.3g}",
            )
    error = np.abs(flat - expected.reshape(rows, -1)) / (high - low)
    error[tie] = 0.0
    for name, values in outputs.items():
        if name not in ("action", "mode") and f"{variant}.{name}" in golden:
            _check_output(manifest, variant, name, values, golden[f"{variant}.{name}"], tie)
    worst = float(error.max(initial=0.0))
    if worst > manifest.golden.action_tolerance:
        row = int(np.unravel_index(int(error.argmax()), error.shape)[0])
        raise BundleError(
            "SELF_TEST_FAILED",
            f"{variant}: row {row}: action: expected within {manifest.golden.action_tolerance:g} of the action range, "
            f"got {worst:.3g}",
        )
    return GoldenReport(rows=rows, ties=int(tie.sum()), action_error=worst)


def _check_output(
    manifest: Manifest,
    variant: str,
    name: str,
    values: NDArray[Any],
    expected: NDArray[Any],
    tie: NDArray[np.bool_],
) -> None:
    """Margins, scores and diagnostics: NaN where torch says NaN, else close to what torch says."""
    if values.shape != expected.shape:
        raise BundleError(
            "SELF_TEST_FAILED", f"{variant}: {name}: expected shape {list(expected.shape)}, got {list(values.shape)}"
        )
    rows = (len(expected), -1)
    wanted, got = expected.reshape(rows).astype(np.float64), values.reshape(rows).astype(np.float64)
    error = np.abs(got - wanted) / np.maximum(np.abs(wanted), 1.0)
    error = np.where(np.isnan(wanted) & np.isnan(got), 0.0, error)
    # Written so that a NaN on one side only is wrong.
    wrong = ~(error <= manifest.golden.output_tolerance) & ~tie[:, None]
    if wrong.any():
        row, element = (int(index) for index in np.argwhere(wrong)[0])
        raise BundleError(
            "SELF_TEST_FAILED",
            f"{variant}: row {row}: {name}: expected {wanted[row, element]:.6g} within "
            f"{manifest.golden.output_tolerance:g}, got {got[row, element]:.6g}",
        )
