"""Golden rows, and the parity gate: onnxruntime must answer as torch does, or there is no bundle."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from lom.policy import LomPolicy
from lom_bundle import Manifest, check_golden
from lom_export.graph import INPUT_NAME, OUTPUT_NAMES

GOLDEN_ROWS = 64
PARITY_ROWS = 2048
PARITY_BATCHES = (1, 2, 7, 64, 1000)
ACTION_TOLERANCE = 1e-5

_ROWS_PER_BATCH_SIZE = 256
_TIE_SHARE = 1e-5
_MASK_EDGE = 1e-5

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """What the gate measured for one variant.

    Attributes:
        rows: distinct observations compared.
        ties: of them too close to call: margin below the tie width, or a weight on the edge of the support mask.
        action_error: largest difference, as a fraction of the action range, over all batch sizes.
    """

    rows: int
    ties: int
    action_error: float


def parity_observations(sample: NDArray[np.float32], policy: LomPolicy, seed: int = 0) -> NDArray[np.float32]:
    """Rows to compare: dataset rows, the corners of the data's range, and the dataset rows nearest to a mode tie.

    Shapes: sample float32[N, O] -> float32[R, O]; the first `GOLDEN_ROWS` become the bundle's golden rows.
    """
    rng = np.random.default_rng(seed)
    margin = np.nan_to_num(answers(policy, "greedy_mode", sample)["margin"], nan=np.inf)
    nearest_ties = sample[np.argsort(margin)[: GOLDEN_ROWS // 4]]
    low, high = sample.min(axis=0), sample.max(axis=0)
    corners = np.where(rng.random((GOLDEN_ROWS // 4, sample.shape[1])) < 0.5, low, high).astype(np.float32)
    ordinary = sample[rng.permutation(len(sample))[:PARITY_ROWS]]
    golden_ordinary = GOLDEN_ROWS - len(nearest_ties) - len(corners)
    if len(ordinary) < golden_ordinary:  # a tiny dataset: rows repeat
        ordinary = ordinary[rng.integers(len(ordinary), size=golden_ordinary)]
    return np.concatenate([ordinary[:golden_ordinary], corners, nearest_ties, ordinary[golden_ordinary:]])


@torch.no_grad()
def answers(policy: LomPolicy, variant: str, observations: NDArray[np.float32]) -> dict[str, Array]:
    """torch's outputs by name for observations float32[R, O]."""
    outputs = policy(torch.from_numpy(np.ascontiguousarray(observations)), variant)
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def tie_width(policy: LomPolicy, observations: NDArray[np.float32]) -> float:
    """Margin below which rounding alone may choose the other mode: 1e-5 of the largest hyper-Q."""
    hyper_q = answers(policy, "greedy_mode", observations)["hyper_q"]
    return _TIE_SHARE * max(1.0, float(np.abs(hyper_q).max()))


def golden_arrays(policy: LomPolicy, variants: tuple[str, ...], observations: NDArray[np.float32]) -> dict[str, Array]:
    """Observations with torch's answers, named as `lom_bundle.Bundle.golden` names them.

    Where a mixing weight sits on the edge of the support mask, rounding decides which components may be chosen; the
    margin of such a row is written as 0, which declares it a tie.
    """
    golden: dict[str, Array] = {INPUT_NAME: observations}
    for variant in variants:
        outputs = answers(policy, variant, observations)
        golden[f"{variant}.action"] = outputs["action"]
        if variant == "greedy_mode":
            on_edge = (np.abs(outputs["mixing_weights"] - policy.min_mixing_weight) < _MASK_EDGE).any(axis=1)
            golden[f"{variant}.mode"] = outputs["mode"]
            golden[f"{variant}.margin"] = np.where(on_edge, np.float32(0.0), outputs["margin"])
    return golden


def check_parity(
    manifest: Manifest, graphs: Mapping[str, bytes], golden: Mapping[str, Array]
) -> dict[str, ParityReport]:
    """Compares every graph with torch's answers, alone and in batches.

    Raises:
        lom_bundle.BundleError: SELF_TEST_FAILED, naming variant, row, output and difference.
    """
    reports = {}
    for variant, graph in graphs.items():
        session = cpu_session(graph)
        outputs: list[str] = [name for name in ("action", "mode", "margin") if name in OUTPUT_NAMES[variant]]
        worst, ties = 0.0, 0
        for batch_rows in PARITY_BATCHES:
            # Every row once in the largest batch; for the small ones a part is enough, the golden rows first.
            rows = slice(0, None if batch_rows == max(PARITY_BATCHES) else _ROWS_PER_BATCH_SIZE)
            part = {name: array[rows] for name, array in golden.items()}
            report = check_golden(manifest, variant, _in_batches(session, outputs, batch_rows), part)
            worst, ties = max(worst, report.action_error), report.ties
        reports[variant] = ParityReport(rows=len(golden[INPUT_NAME]), ties=ties, action_error=worst)
    return reports


def cpu_session(graph: bytes) -> onnxruntime.InferenceSession:
    """A one-thread CPU session, as the server's."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _in_batches(
    session: onnxruntime.InferenceSession, outputs: list[str], batch_rows: int
) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
    def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        rows = len(next(iter(inputs.values())))
        parts = [
            session.run(outputs, {name: array[start : start + batch_rows] for name, array in inputs.items()})
            for start in range(0, rows, batch_rows)
        ]
        return {name: np.concatenate(column) for name, column in zip(outputs, zip(*parts, strict=True), strict=True)}

    return run
