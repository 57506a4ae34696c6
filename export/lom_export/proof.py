"""Golden rows, and the parity gate: onnxruntime must answer as torch does, or there is no bundle."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from lom.policy import LomPolicy
from lom_bundle import BundleError, Manifest, check_golden
from lom_export.graph import FORCED_MODE, NOISE, OBSERVATION, PolicyGraph

GOLDEN_ROWS = 64
PARITY_ROWS = 2048
PARITY_BATCHES = (1, 2, 7, 64, 1000)
ACTION_TOLERANCE = 1e-5
# Scores are log-densities: at the smallest standard deviation, e^-5, an action's last bits become 1e-4 of a score.
OUTPUT_TOLERANCE = 1e-3

_CORNERS = slice(32, 48)
_ROWS_PER_BATCH_SIZE = 256
_TIE_SHARE = 1e-5
_MASK_EDGE = 1e-5

Array = NDArray[Any]
Arrays = Mapping[str, Array]


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
    """Rows to compare: dataset rows, corners of the data's range, and the dataset rows nearest to a mode tie.

    Shapes: sample float32[N, O] -> float32[R, O]; the first `GOLDEN_ROWS` become the bundle's golden rows.
    """
    rng = np.random.default_rng(seed)
    explained = answers(
        PolicyGraph(policy, "greedy_mode", None, explain=True),
        {OBSERVATION: sample, **free_choice(len(sample), policy)},
    )
    # Just clear of a tie: there a wrong weight shows first.
    margin = explained["margin"].astype(np.float64)
    margin[~(margin > 2.0 * tie_width(explained["hyper_q"]))] = np.inf
    ties = GOLDEN_ROWS - _CORNERS.stop
    nearest_ties = sample[np.resize(np.argsort(margin)[:ties], ties)]  # a tiny dataset: rows repeat
    low, high = sample.min(axis=0), sample.max(axis=0)
    corners = np.where(rng.random((_CORNERS.stop - _CORNERS.start, sample.shape[1])) < 0.5, low, high).astype(
        np.float32
    )
    ordinary = sample[rng.permutation(len(sample))[:PARITY_ROWS]]
    first = ordinary[np.resize(np.arange(min(len(ordinary), _CORNERS.start)), _CORNERS.start)]
    return np.concatenate([first, corners, nearest_ties, ordinary[_CORNERS.start :]])


def without_corners(rows: Array) -> Array:
    """`parity_observations` (or answers to them) without the rows at the corners of the data's range."""
    return np.delete(rows, _CORNERS, axis=0)


@torch.no_grad()
def answers(graph: PolicyGraph, inputs: Arrays) -> dict[str, Array]:
    """torch's outputs by name."""
    tensors = [torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in graph.input_names]
    return {name: tensor.numpy() for name, tensor in zip(graph.output_names, graph.eval()(*tensors), strict=True)}


def tie_width(hyper_q: Array) -> float:
    """Margin below which rounding alone may choose the other mode: 1e-5 of the largest hyper-Q."""
    return _TIE_SHARE * max(1.0, float(np.abs(hyper_q).max()))


def golden_arrays(
    graphs: Mapping[str, PolicyGraph], explains: Mapping[str, PolicyGraph], observations: NDArray[np.float32]
) -> dict[str, Array]:
    """Observations with torch's answers, named as `lom_bundle.Bundle.golden` names them.

    Args:
        graphs, explains: by variant, those that act and those that explain.

    Where a mixing weight sits on the edge of the support mask, rounding decides which components may be chosen; the
    margin of such a row is written as 0, which declares it a tie.
    """
    golden: dict[str, Array] = {OBSERVATION: observations}
    for variant, graph in graphs.items():
        golden |= {f"{variant}.{name}": array for name, array in answers(graph, golden).items()}
    for variant, explain in explains.items():
        explained = answers(explain, {**golden, **free_choice(len(observations), explain.policy)})
        on_edge = np.abs(explained["mixing_weights"] - explain.policy.min_mixing_weight) < _MASK_EDGE
        explained["margin"] = np.where(on_edge.any(axis=1), np.float32(0.0), explained["margin"])
        golden |= {f"{variant}.{name}": array for name, array in explained.items()}
    return golden


def free_choice(rows: int, policy: LomPolicy) -> dict[str, Array]:
    """The explain graph's further inputs where nothing is forced and nothing is sampled."""
    action_dim = policy.action_scaler.low.numel()
    return {FORCED_MODE: np.full(rows, -1, np.int32), NOISE: np.zeros((rows, action_dim), np.float32)}


def check_weights(module: PolicyGraph, graph: bytes) -> None:
    """Every matrix of the graph is a matrix of the policy, bit for bit; vectors that kept their name, too.

    Answers alone cannot tell: a weight into a unit that the compared rows never activate changes none of them.

    Raises:
        lom_bundle.BundleError: SELF_TEST_FAILED, naming the weight.
    """
    weights = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    for tensor in onnx.load_from_string(graph).graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if tensor.name in weights:
            candidates = [weights[tensor.name]]
        elif values.ndim >= 2:  # a parameter that the exporter transposed ahead of time, under a name of its own
            candidates = [turned for weight in weights.values() for turned in (weight, weight.T)]
        else:
            continue
        if not any(np.array_equal(values, candidate) for candidate in candidates):
            raise BundleError(
                "SELF_TEST_FAILED", f"{module.variant}: {tensor.name}: expected the policy's weight, bit for bit"
            )


def check_parity(
    manifest: Manifest, variant: str, graph: bytes, golden: Arrays, extra_inputs: Arrays | None = None
) -> ParityReport:
    """Compares a graph with torch's answers, alone and in batches: every output where it has one in `golden`.

    Raises:
        lom_bundle.BundleError: SELF_TEST_FAILED, naming variant, row, output and difference.
    """
    session = cpu_session(graph)
    outputs = [node.name for node in session.get_outputs()]
    worst, ties = 0.0, 0
    for batch_rows in PARITY_BATCHES:
        # Every row once in the largest batch; for the small ones a part is enough, the golden rows first.
        rows = slice(0, None if batch_rows == max(PARITY_BATCHES) else _ROWS_PER_BATCH_SIZE)
        part = {name: array[rows] for name, array in golden.items()}
        extra = {name: array[rows] for name, array in (extra_inputs or {}).items()}
        report = check_golden(manifest, variant, _in_batches(session, outputs, batch_rows, extra), part)
        worst, ties = max(worst, report.action_error), report.ties
    return ParityReport(rows=len(golden[OBSERVATION]), ties=ties, action_error=worst)


def check_overrides(manifest: Manifest, graph: bytes, explain: PolicyGraph, observations: NDArray[np.float32]) -> None:
    """Compares the explain graph under forced modes and sampling noise, which leave no choice and so no ties.

    Raises:
        lom_bundle.BundleError: SELF_TEST_FAILED, naming row and difference.
    """
    rng = np.random.default_rng(0)
    rows = len(observations)
    inputs = {
        OBSERVATION: observations,
        FORCED_MODE: rng.integers(manifest.num_components, size=rows, dtype=np.int32),
        NOISE: rng.standard_normal((rows, len(manifest.action.low))).astype(np.float32),
    }
    expected = answers(explain, inputs)
    action, mode = cpu_session(graph).run(["action", "mode"], inputs)
    action_range = np.subtract(manifest.action.high, manifest.action.low)
    error = np.abs(action - expected["action"]) / action_range
    if (mode != inputs[FORCED_MODE]).any() or not (error <= manifest.golden.action_tolerance).all():
        row = int(
            np.argwhere((mode != inputs[FORCED_MODE]) | ~(error <= manifest.golden.action_tolerance).all(axis=1))[0, 0]
        )
        raise BundleError(
            "SELF_TEST_FAILED",
            f"{explain.variant}: row {row}: action under forced mode {int(inputs[FORCED_MODE][row])}: expected within "
            f"{manifest.golden.action_tolerance:g} of the action range, got {float(error[row].max()):.3g}",
        )


def cpu_session(graph: bytes) -> onnxruntime.InferenceSession:
    """A one-thread CPU session, as the server's."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def named_outputs(session: onnxruntime.InferenceSession, names: Sequence[str], inputs: Arrays) -> dict[str, Array]:
    """One run: outputs by name, of which only `names` are fetched."""
    return dict(zip(names, session.run(list(names), dict(inputs)), strict=True))


def _in_batches(
    session: onnxruntime.InferenceSession, outputs: list[str], batch_rows: int, extra_inputs: Arrays
) -> Callable[[Arrays], Arrays]:
    def run(inputs: Arrays) -> Arrays:
        feeds = {**inputs, **extra_inputs}
        parts = [
            named_outputs(session, outputs, {name: rows[start : start + batch_rows] for name, rows in feeds.items()})
            for start in range(0, len(feeds[OBSERVATION]), batch_rows)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in outputs}

    return run
