"""A narrow graph answers like the wide one, never outside the bounds, and whoever else is in the batch."""

import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from lom.config import TrainConfig
from lom_bundle import BundleError
from lom_bundle.onnx_structure import refuse_unsafe_graph
from lom_export.graph import PolicyGraph, export_graph
from lom_export.precision import PRECISION_BOUNDS, Precision, PrecisionReport, convert, measure, refuse_beyond_bounds
from lom_export.proof import cpu_session
from tests.support.runs import save_untrained_run

Array = NDArray[Any]

# No fp16 number: rounded, 0.3 becomes 0.30005 and lets an action out.
BOUND = np.float32(0.3)
ROWS = (3 + 2 * np.random.default_rng(5).standard_normal((2000, 2))).astype(np.float32)
NARROW: tuple[Precision, ...] = ("fp16", "int8")


def graph_of(folder: Path, variant: str, *, components: int = 4, explain: bool = False) -> bytes:
    config = TrainConfig(
        mixture_steps=5,
        steps=4,
        num_components=components,
        hidden=(32, 32, 32),
        mixture_hidden=(32, 32),
        hyper_head="one_hot" if components > 1 else "components",
        actor_form="direct",
    )
    bound = (float(BOUND),) * 2
    policy = save_untrained_run(folder, config=config, action_low=(-bound[0], -bound[1]), action_high=bound)
    return export_graph(PolicyGraph(policy, variant, None, explain=explain))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "actor": graph_of(folder / "actor", "actor"),
        "greedy_mode": graph_of(folder / "greedy", "greedy_mode", explain=True),
        "one_component": graph_of(folder / "one", "greedy_mode", components=1),
    }


def inputs_of(graph: bytes, observations: Array) -> dict[str, Array]:
    rows = len(observations)
    values = {
        "observation": observations,
        "forced_mode": np.full(rows, -1, np.int32),
        "noise": np.zeros((rows, 2), np.float32),
    }
    return {value.name: values[value.name] for value in onnx.load_from_string(graph).graph.input}


def answers(graph: bytes, observations: Array) -> dict[str, Array]:
    session = cpu_session(graph)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs_of(graph, observations)), strict=True))


def narrowed(graph: bytes, precision: Precision) -> bytes:
    return convert(graph, precision, inputs_of(graph, ROWS[:500]))


def with_constants(graph: bytes, changes: dict[str, Array]) -> bytes:
    model = onnx.load_from_string(graph)
    for tensor in model.graph.initializer:
        if tensor.name in changes:
            tensor.CopyFrom(numpy_helper.from_array(changes[tensor.name], tensor.name))
    content: bytes = model.SerializeToString()
    return content


def constant(graph: bytes, operator: str) -> tuple[str, Array]:
    """Name and value of the constant that the first such node of the graph reads."""
    model = onnx.load_from_string(graph)
    node = next(node for node in model.graph.node if node.op_type == operator)
    return node.input[1], numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == node.input[1]))


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("variant", ["actor", "greedy_mode", "one_component"])
def test_a_narrow_graph_keeps_its_bounds_its_contract_and_the_rules_of_a_bundle(
    graphs: dict[str, bytes], variant: str, precision: Precision
) -> None:
    wide, narrow = graphs[variant], narrowed(graphs[variant], precision)
    refuse_unsafe_graph(variant, narrow)
    before, after = onnx.load_from_string(wide).graph, onnx.load_from_string(narrow).graph
    assert list(after.input) == list(before.input)
    assert list(after.output) == list(before.output)
    narrow_type = {"fp16": TensorProto.FLOAT16, "int8": TensorProto.UINT8}[precision]
    weights = [tuple(t.dims) for t in after.initializer if t.data_type == narrow_type and len(t.dims) == 2]
    # Between two ReLUs: two layers of the actor; one of the mixture and two of the hyper-critic.
    assert weights == [(32, 32)] * (2 if variant == "actor" else 3)
    expected, got = answers(wide, ROWS[500:]), answers(narrow, ROWS[500:])
    report = measure(expected, got, np.array([2 * BOUND] * 2), tie_width=1e-4)
    refuse_beyond_bounds(variant, precision, report)
    assert report.action_error > 1e-6  # it is narrow


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("variant", ["actor", "greedy_mode"])
def test_a_row_answers_alone_as_beside_outliers(graphs: dict[str, bytes], variant: str, precision: Precision) -> None:
    narrow = narrowed(graphs[variant], precision)
    outliers = np.full((7, 2), 1e4, np.float32)
    for row in ROWS[500:520]:
        alone = answers(narrow, row[np.newaxis])
        beside = answers(narrow, np.concatenate([outliers, row[np.newaxis], -outliers]))
        for name, array in alone.items():
            np.testing.assert_allclose(beside[name][7], array[0], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("variant", ["actor", "greedy_mode"])
def test_actions_reach_the_bounds_and_never_pass_them(
    graphs: dict[str, bytes], variant: str, precision: Precision
) -> None:
    far = (ROWS * 1e4).astype(np.float32)
    action = answers(narrowed(graphs[variant], precision), far)["action"]
    assert action.max() <= BOUND
    assert action.min() >= -BOUND
    if precision == "fp16":  # int8 activations end where the calibration rows ended
        assert (np.abs(action) == BOUND).any()


@pytest.mark.parametrize("precision", NARROW)
def test_a_missing_runner_up_stays_nan(graphs: dict[str, bytes], precision: Precision) -> None:
    assert np.isnan(answers(narrowed(graphs["one_component"], precision), ROWS)["margin"]).all()
    expected = answers(graphs["greedy_mode"], ROWS)["margin"]
    got = answers(narrowed(graphs["greedy_mode"], precision), ROWS)["margin"]
    assert 0.0 < np.isnan(expected).mean() < 1.0
    assert (np.isnan(got) == np.isnan(expected)).mean() > 0.97


@pytest.mark.parametrize("precision", NARROW)
def test_observations_of_ten_thousand_keep_their_last_digits(graphs: dict[str, bytes], precision: Precision) -> None:
    name, mean = constant(graphs["actor"], "Sub")
    wide = with_constants(graphs["actor"], {name: (mean + 1e4).astype(np.float32)})
    far = (ROWS + 1e4).astype(np.float32)
    narrow = convert(wide, precision, {"observation": far[:500]})
    report = measure(answers(wide, far), answers(narrow, far), np.array([2 * BOUND] * 2), tie_width=0.0)
    refuse_beyond_bounds("actor", precision, report)


def test_fp16_does_not_overflow_where_float32_does_not(graphs: dict[str, bytes]) -> None:
    far = np.array([[1e9, -1e9], [1e30, 1e30], [-1e30, 1e9]], np.float32)
    for variant, graph in graphs.items():
        # onnxruntime's CPU provider would compute in float32 and hide an overflow.
        model = onnx.load_from_string(narrowed(graph, "fp16"))
        with np.errstate(all="ignore"):
            outputs = ReferenceEvaluator(model).run(None, inputs_of(graph, far))
        for output, array in zip(model.graph.output, outputs, strict=True):
            if output.name != "margin":
                assert np.isfinite(array).all(), (variant, output.name)


def test_weights_that_fp16_cannot_hold_are_refused(graphs: dict[str, bytes]) -> None:
    model = onnx.load_from_string(graphs["actor"])
    weight = next(t for t in model.graph.initializer if tuple(t.dims) == (32, 32))
    huge = with_constants(graphs["actor"], {weight.name: np.full((32, 32), 2000, np.float32)})
    with pytest.raises(
        BundleError, match=r"PRECISION_REFUSED: fp16: layer '.+': expected .* below 32752, got 6.4e\+04"
    ):
        narrowed(huge, "fp16")


def test_nothing_to_convert_and_nothing_to_calibrate_with_are_refused(graphs: dict[str, bytes]) -> None:
    observation = helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["rows", 2])
    action = helper.make_tensor_value_info("action", TensorProto.FLOAT, ["rows", 2])
    linear = helper.make_graph([helper.make_node("Neg", ["observation"], ["action"])], "g", [observation], [action])
    with pytest.raises(BundleError, match="PRECISION_REFUSED: int8: expected a layer between two ReLUs"):
        convert(helper.make_model(linear).SerializeToString(), "int8", {"observation": ROWS})
    for calibration in ({}, {"observation": ROWS[:0]}):
        with pytest.raises(BundleError, match=r"PRECISION_REFUSED: int8: .* rows of \['observation'\], got none"):
            convert(graphs["actor"], "int8", calibration)


def test_conversion_is_silent_leaves_no_file_and_keeps_metadata(
    graphs: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = onnx.load_from_string(graphs["greedy_mode"])
    helper.set_model_props(model, {"lom.manifest": "{}"})
    described = model.SerializeToString()
    for precision in NARROW:
        converted = onnx.load_from_string(narrowed(described, precision))
        assert {entry.key: entry.value for entry in converted.metadata_props} == {"lom.manifest": "{}"}
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not list(tmp_path.iterdir())


def test_float32_is_the_graph_itself(graphs: dict[str, bytes]) -> None:
    assert convert(graphs["actor"], "fp32", {}) == graphs["actor"]
    assert set(PRECISION_BOUNDS) == set(get_args(Precision))


def test_measure_by_hand() -> None:
    expected = {
        "action": np.array([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], np.float32),
        "mode": np.array([0, 1, 2, 0, 1], np.int32),
        "margin": np.array([0.75, np.nan, 0.5, 0.0625, np.nan], np.float32),
    }
    got = {
        # Of ranges 2 and 4: 0.125, then 0.25; the other rows chose another mode.
        "action": np.array([[0.25, 0.0], [1.0, 2.0], [2.0, 2.0], [2.0, 2.0], [2.0, 2.0]], np.float32),
        # Agrees, agrees, flips at 0.5, differs at a tie, flips without a runner-up.
        "mode": np.array([0, 1, 0, 1, 0], np.int32),
    }
    report = measure(expected, got, np.array([2.0, 4.0]), tie_width=0.125)
    assert report == PrecisionReport(rows=5, flipped=(2, 4), action_error=0.25)
    assert report.flip_rate == 0.4
    unchanged = measure(expected, expected, np.array([2.0, 4.0]), tie_width=0.125)
    assert unchanged == PrecisionReport(rows=5, flipped=(), action_error=0.0)


def test_a_variant_without_modes_has_no_flips() -> None:
    action = np.zeros((3, 1), np.float32)
    report = measure({"action": action}, {"action": action + 0.5}, np.array([2.0]), tie_width=0.125)
    assert report == PrecisionReport(rows=3, flipped=(), action_error=0.25)


def test_nan_is_refused_even_where_the_mode_differs() -> None:
    expected = {"action": np.zeros((2, 1)), "mode": np.array([0, 1]), "margin": np.array([1.0, 0.0])}
    got = {"action": np.array([[0.0], [np.nan]]), "mode": np.array([0, 0])}
    report = measure(expected, got, np.array([2.0]), tie_width=0.125)
    assert report.flipped == ()
    with pytest.raises(BundleError, match="action error"):
        refuse_beyond_bounds("greedy_mode", "int8", report)


@pytest.mark.parametrize("precision", NARROW)
def test_a_figure_beyond_its_bound_is_named(precision: Precision) -> None:
    bounds = PRECISION_BOUNDS[precision]

    def report(action_error: float, flip_rate: float) -> PrecisionReport:
        return PrecisionReport(rows=1000, flipped=tuple(range(round(1000 * flip_rate))), action_error=action_error)

    refuse_beyond_bounds("actor", precision, report(bounds.action_tolerance, bounds.max_flip_rate))
    with pytest.raises(BundleError) as caught:
        refuse_beyond_bounds("actor", precision, report(0.125, 0.0))
    assert caught.value.reason == "PRECISION_REFUSED"
    bound = f"{bounds.action_tolerance:g}"
    assert caught.value.detail == (
        f"actor: {precision}: action error: expected at most {bound} of the action range, got 0.125"
    )
    with pytest.raises(BundleError, match=rf"greedy_mode: {precision}: flip rate: .* of 1000 rows, got 0.25"):
        refuse_beyond_bounds("greedy_mode", precision, report(0.0, 0.25))
