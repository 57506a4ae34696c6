"""Lower precision: the same graph with narrow hidden layers, and the measure that decides whether it may ship.

Narrow become the layers between two ReLUs, which hold nearly all weights of a network. All else stays in float32:

* the normaliser (first Sub and Div): at an observation of 1e4 two neighbouring fp16 numbers are 8 apart;
* the first layer: a normalised observation has no bound, so it may overflow fp16 or leave any calibrated range;
* the output layers: fp16 would round a hyper-Q of 30 to 1/64, which is a tie made of rounding;
* mixing weights and log-densities (LogSoftmax, Exp, Log): a tail underflows, and the support mask compares with 0.05;
* mode and margin: -inf masks a component and NaN says "no runner-up"; both must come out as they went in;
* action scaling and the final Max and Min: a rounded bound lets an action leave the action space.

onnxruntime's own `convert_float_to_float16` is not used: it casts the observation, the normaliser and the bounds to
fp16 and back even around nodes that it is told to leave alone.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from lom_bundle import BundleError, Manifest
from lom_export.proof import cpu_session, named_outputs, without_corners

Precision = Literal["fp32", "fp16", "int8"]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class PrecisionBounds:
    """What a precision may cost.

    Attributes:
        action_tolerance: largest difference of an action element from float32, as a fraction of its range.
        max_flip_rate: largest share of rows that choose another mode although float32 is sure of its own.
    """

    action_tolerance: float
    max_flip_rate: float


# Chosen after measuring all variants of two trained policies (the fork, Hopper) on 4,898 and 9,967 rows of their data.
# fp16: error at most 1.8e-3, flips at most 0.0007 in ONNX's reference evaluator, which really computes in fp16;
# onnxruntime on a CPU rounds the weights only and computes in float32, which gives 4.6e-4 and 0.0001.
# int8, calibrated on 1,024 other rows: error 3.4e-3 to 5.6e-2, flips 0.012 and 0.020; on the corners of the data's
# range, which such a calibration never saw, errors up to 0.28. So fp16 passes with a reserve, and int8 is refused for
# some policies: a twentieth of the action range is not rounding any more.
PRECISION_BOUNDS: Mapping[Precision, PrecisionBounds] = {
    "fp32": PrecisionBounds(action_tolerance=1e-5, max_flip_rate=0.0),
    "fp16": PrecisionBounds(action_tolerance=5e-3, max_flip_rate=0.01),
    "int8": PrecisionBounds(action_tolerance=5e-2, max_flip_rate=0.03),
}

# Half of what fp16 can hold: the sums inside a layer are rounded as well.
_FP16_REACH = float(np.finfo(np.float16).max) / 2


@dataclass(frozen=True, kw_only=True)
class PrecisionReport:
    """What a precision costs one variant.

    Attributes:
        rows: rows compared.
        flipped: indices of those with another mode although the float32 margin is no tie.
        action_error: largest difference over the rows whose mode agrees, as a fraction of the action range; NaN if any
            row's action is.
    """

    rows: int
    flipped: tuple[int, ...]
    action_error: float

    @property
    def flip_rate(self) -> float:
        """Share of the rows that flipped."""
        return len(self.flipped) / max(self.rows, 1)


def convert(graph: bytes, precision: Precision, calibration: Arrays) -> bytes:
    """The float32 graph in another precision; names, dtypes and shapes of inputs and outputs stay.

    fp16: weights, bias and product of a hidden layer. Its input is limited first, so that no sum can overflow: an
    observation far from all data gets a wrong action, as it does in float32, but never NaN. Which machines compute in
    fp16 is theirs to decide: onnxruntime's CPU provider widens such layers again and gains nothing but a smaller file.

    int8: weights per output channel, activations by the range that `calibration` reaches. Static, never dynamic: a
    dynamic scale is taken over the whole batch, so that one caller's row would change its neighbour's action.

    Args:
        calibration: typical rows by input name, any number of them from 1; read for int8 only.

    Raises:
        BundleError: PRECISION_REFUSED; no hidden layer, weights that fp16 cannot hold, or no calibration rows.
    """
    if precision == "fp32":
        return graph
    model = onnx.load_from_string(graph)
    layers = _hidden_layers(model.graph)
    if not layers:
        raise BundleError("PRECISION_REFUSED", f"{precision}: expected a layer between two ReLUs, got none")
    converted = _in_fp16(model, layers) if precision == "fp16" else _in_int8(model, layers, calibration)
    del converted.graph.value_info[:]
    onnx.checker.check_model(converted, full_check=True)
    return converted.SerializeToString()


def measure(expected: Arrays, got: Arrays, action_range: NDArray[Any], tie_width: float) -> PrecisionReport:
    """Compares a precision's outputs with float32's.

    Args:
        expected: float32's outputs by name: `action` float32[R, A], and of a variant with modes also `mode` int32[R]
            and `margin` float32[R].
        got: the other precision's `action`, and `mode` if expected.
        action_range: high - low of every action element, float[A].
        tie_width: rows with a float32 margin below it are ties; NaN (no runner-up) is none.
    """
    rows = len(expected["action"])
    agrees = np.ones(rows, bool)
    flipped = np.zeros(rows, bool)
    if "mode" in expected:
        agrees = expected["mode"] == got["mode"]
        flipped = ~agrees & ~(expected["margin"] < tie_width)
    difference = got["action"].astype(np.float64) - expected["action"]
    error = np.abs(difference.reshape(rows, -1)) / np.asarray(action_range, np.float64).reshape(-1)
    error[~agrees] *= 0.0  # NaN stays NaN: no row may answer with it
    return PrecisionReport(
        rows=rows,
        flipped=tuple(int(row) for row in np.flatnonzero(flipped)),
        action_error=float(error.max(initial=0.0)),
    )


def narrow(
    manifest: Manifest, graphs: Mapping[str, bytes], rows: Arrays, precision: Precision, calibration: Arrays
) -> tuple[Manifest, dict[str, bytes], dict[str, NDArray[Any]], dict[str, PrecisionReport]]:
    """The same bundle in another precision, if every variant keeps its bounds against torch.

    The rows at the corners of the data's range are left out: int8 is calibrated on data and saturates beyond it. A row
    whose mode flips, or whose runner-up comes or goes at the edge of the support mask, is declared a tie (margin 0) in
    the rows returned: within the bound, either mode is accepted there. The explain graph stays behind, it explains
    float32.

    Args:
        graphs: float32 graphs by file name.
        rows: torch's answers, as `lom_export.proof.golden_arrays`.
        calibration: data rows by input name, from which int8 takes the range of every activation.

    Raises:
        BundleError: PRECISION_REFUSED, naming variant, figure and bound.
    """
    kept = {name: without_corners(array) for name, array in rows.items()}
    inputs = {space.name: kept[space.name] for space in manifest.inputs}
    action_range = np.subtract(manifest.action.high, manifest.action.low)
    variants = {name: replace(variant, explain=None) for name, variant in manifest.variants.items()}
    converted: dict[str, bytes] = {}
    reports: dict[str, PrecisionReport] = {}
    output_error = 0.0
    for name, variant in variants.items():
        graph = convert(graphs[variant.graph], precision, calibration)
        expected = {output: kept[f"{name}.{output}"] for output in variant.outputs}
        got = named_outputs(cpu_session(graph), variant.outputs, inputs)
        report = measure(expected, got, action_range, manifest.golden.tie_width)
        if precision == "fp16":
            # A CPU widens fp16 layers again and shows no rounding of activations; this evaluator does.
            narrow_answers = ReferenceEvaluator(onnx.load_from_string(graph)).run(list(variant.outputs), inputs)
            real = dict(zip(variant.outputs, narrow_answers, strict=True))
            report = _worse(report, measure(expected, real, action_range, manifest.golden.tie_width))
        refuse_beyond_bounds(name, precision, report)
        converted[variant.graph] = graph
        reports[name] = report
        clear = ~np.isin(np.arange(report.rows), report.flipped)
        if "margin" in expected:
            clear &= np.isnan(expected["margin"]) == np.isnan(got["margin"])
            kept[f"{name}.margin"] = np.where(clear, expected["margin"], np.float32(0.0))
        output_error = max(output_error, _output_error(expected, got, clear))
    golden = replace(
        manifest.golden,
        action_tolerance=PRECISION_BOUNDS[precision].action_tolerance,
        output_tolerance=max(manifest.golden.output_tolerance, 1.5 * output_error),
    )
    costs = {
        name: {"rows": report.rows, "flip_rate": report.flip_rate, "action_error": report.action_error}
        for name, report in reports.items()
    }
    narrowed = replace(
        manifest,
        precision=precision,
        variants=variants,
        golden=golden,
        provenance={**manifest.provenance, "precision": costs},
    )
    return narrowed, converted, kept, reports


def _worse(first: PrecisionReport, second: PrecisionReport) -> PrecisionReport:
    return PrecisionReport(
        rows=first.rows,
        flipped=tuple(sorted({*first.flipped, *second.flipped})),
        action_error=float(np.max([first.action_error, second.action_error])),  # NaN wins
    )


def _output_error(expected: Arrays, got: Arrays, clear: NDArray[np.bool_]) -> float:
    """Largest relative difference of margins and scores over the rows that are clear."""
    worst = 0.0
    for name in expected.keys() - {"action", "mode"}:
        error = np.abs(got[name] - expected[name]) / np.maximum(np.abs(expected[name]), 1.0)
        worst = max(worst, float(np.nan_to_num(error[clear]).max(initial=0.0)))
    return worst


def refuse_beyond_bounds(variant: str, precision: Precision, report: PrecisionReport) -> None:
    """Passes if the report keeps `PRECISION_BOUNDS`.

    Raises:
        BundleError: PRECISION_REFUSED, naming variant, precision, figure and bound.
    """
    bounds = PRECISION_BOUNDS[precision]
    for figure, got, bound, unit in (
        ("action error", report.action_error, bounds.action_tolerance, "of the action range"),
        ("flip rate", report.flip_rate, bounds.max_flip_rate, f"of {report.rows} rows"),
    ):
        if not got <= bound:  # NaN is beyond every bound
            raise BundleError(
                "PRECISION_REFUSED",
                f"{variant}: {precision}: {figure}: expected at most {bound:g} {unit}, got {got:.3g}",
            )


def _hidden_layers(graph: GraphProto) -> list[NodeProto]:
    """Products with a constant weight that read a ReLU and are read by one, a bias between them or not."""
    constants = {tensor.name for tensor in graph.initializer}
    rectified = {node.output[0] for node in graph.node if node.op_type == "Relu"}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def rectifies(name: str) -> bool:
        return any(
            reader.op_type == "Relu" or (reader.op_type == "Add" and rectifies(reader.output[0]))
            for reader in readers.get(name, ())
        )

    return [
        node
        for node in graph.node
        if node.op_type in ("Gemm", "MatMul")
        and node.input[0] in rectified
        and constants.issuperset(node.input[1:])
        and rectifies(node.output[0])
    ]


def _in_fp16(model: ModelProto, layers: list[NodeProto]) -> ModelProto:
    graph = model.graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    narrowed = {layer.output[0] for layer in layers}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.output[0] in narrowed:
            layer_nodes, tensors = _fp16_layer(node, [values[name] for name in node.input[1:]])
            nodes.extend(layer_nodes)
            graph.initializer.extend(tensors)
        else:
            nodes.append(node)
    used = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in graph.initializer if tensor.name in used]
    converted = ModelProto()
    converted.CopyFrom(model)
    del converted.graph.node[:], converted.graph.initializer[:]
    converted.graph.node.extend(nodes)
    converted.graph.initializer.extend(tensors)
    return converted


def _fp16_layer(layer: NodeProto, parameters: list[NDArray[Any]]) -> tuple[list[NodeProto], list[TensorProto]]:
    """Limit, cast, the layer itself, cast back; and the constants that they read."""
    name = layer.output[0]
    weight, *bias = parameters
    transposed = any(attribute.name == "transB" and attribute.i for attribute in layer.attribute)
    largest_sum = float((np.abs(weight).sum(axis=1 if transposed else 0) + np.abs(bias).sum(axis=0)).max())
    if not largest_sum <= _FP16_REACH:
        raise BundleError(
            "PRECISION_REFUSED",
            f"fp16: layer {name!r}: expected weights whose sums stay below {_FP16_REACH:g}, got {largest_sum:.3g}",
        )
    limit = np.array(_FP16_REACH / max(largest_sum, 1.0), np.float32)
    narrow = [f"{name}.fp16_parameter_{index}" for index in range(len(parameters))]
    product = NodeProto()
    product.CopyFrom(layer)
    product.input[:] = [f"{name}.fp16_input", *narrow]
    product.output[:] = [f"{name}.fp16"]
    nodes = [
        helper.make_node("Min", [layer.input[0], f"{name}.limit"], [f"{name}.limited"], f"{name}.limit"),
        helper.make_node("Cast", [f"{name}.limited"], [f"{name}.fp16_input"], f"{name}.narrow", to=TensorProto.FLOAT16),
        product,
        helper.make_node("Cast", [f"{name}.fp16"], [name], f"{name}.widen", to=TensorProto.FLOAT),
    ]
    halves = [values.astype(np.float16) for values in parameters]
    tensors = [numpy_helper.from_array(values, key) for key, values in zip(narrow, halves, strict=True)]
    tensors.append(numpy_helper.from_array(limit, f"{name}.limit"))
    return nodes, tensors


def _in_int8(model: ModelProto, layers: list[NodeProto], calibration: Arrays) -> ModelProto:
    missing = [value.name for value in model.graph.input if not len(calibration.get(value.name, ()))]
    if missing:
        raise BundleError("PRECISION_REFUSED", f"int8: expected calibration rows of {missing}, got none")
    for layer in layers:
        layer.name = layer.name or layer.output[0]
    metadata = list(model.metadata_props)
    add_pre_process_metadata(model)  # without it, the quantiser writes advice to the root logger
    with tempfile.TemporaryDirectory() as folder:
        quantise_to = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            quantise_to,
            _OneBatch({value.name: calibration[value.name] for value in model.graph.input}),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Gemm", "MatMul"],
            nodes_to_quantize=[layer.name for layer in layers],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            # Signed 8-bit weights saturate in the 16-bit sums of CPUs without VNNI: another machine, another action.
            weight_type=QuantType.QUInt8,
            # A layer's output goes on in float32; the output layers would otherwise read 8-bit features.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
        converted = onnx.load(quantise_to)
    del converted.metadata_props[:]
    converted.metadata_props.extend(metadata)
    return converted


class _OneBatch:
    """All calibration rows at once, in the form in which the quantiser asks for them."""

    def __init__(self, batch: dict[str, NDArray[Any]]) -> None:
        self._batches = iter([batch])

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._batches, None)
