"""torch → ONNX: one complete graph per variant, raw observations in, environment-unit actions out."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import onnx
import torch
from torch import Tensor, nn

from lom.policy import LomPolicy

OPSET_VERSION = 18
INPUT_NAME = "observation"
OUTPUT_NAMES: dict[str, tuple[str, ...]] = {
    "greedy_mode": (
        "action",
        "mode",
        "margin",
        "hyper_q",
        "mixing_weights",
        "component_means",
        "component_log_stds",
    ),
    "actor": ("action",),
    "bc": ("action",),
}

_CONTROL_FLOW = {"If", "Loop", "Scan"}


class GraphError(Exception):
    """A graph that breaks a promise of the bundle: symbolic rows, no control flow, no foreign or external parts."""


class _Variant(nn.Module):
    def __init__(self, policy: LomPolicy, variant: str) -> None:
        super().__init__()
        self.policy = policy
        self.variant = variant

    def forward(self, observation: Tensor) -> tuple[Tensor, ...]:
        outputs = self.policy(observation, self.variant)
        return tuple(outputs[name] for name in OUTPUT_NAMES[self.variant])


def export_graph(policy: LomPolicy, variant: str) -> bytes:
    """The variant as a checked, self-contained ONNX model.

    Raises:
        GraphError: the exporter produced something that a bundle must not hold.
    """
    # Two rows or more: traced with one, the exporter would bake the batch size in.
    example = torch.zeros(4, policy.observation_dim)
    rows = torch.export.Dim("rows", min=1, max=1 << 20)
    with _quiet_exporter():
        program = torch.onnx.export(
            _Variant(policy, variant).eval(),
            (example,),
            input_names=[INPUT_NAME],
            output_names=list(OUTPUT_NAMES[variant]),
            dynamic_shapes={INPUT_NAME: {0: rows}},
            opset_version=OPSET_VERSION,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _check(model, variant)
    return model.SerializeToString()


def _check(model: onnx.ModelProto, variant: str) -> None:
    onnx.checker.check_model(model, full_check=True)
    for node in model.graph.node:
        if node.op_type in _CONTROL_FLOW or node.domain not in ("", "ai.onnx"):
            raise GraphError(f"{variant}: expected standard operators without control flow, got {node.op_type!r}")
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise GraphError(f"{variant}: expected all weights inside the file, {tensor.name!r} is external")
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise GraphError(f"{variant}: {value.name}: expected a symbolic first axis, got a fixed one")


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keeps the exporter's notes on optional packages and shared axis names away from the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
