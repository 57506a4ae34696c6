"""torch → ONNX: one complete graph per variant, raw observations in, environment-unit actions out."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import onnx
import torch
from torch import Tensor, nn

from lom.networks import Mixture
from lom.policy import LomPolicy
from lom_bundle.onnx_structure import refuse_unsafe_graph
from lom_export.state_score import StateScore

OPSET_VERSION = 18
OBSERVATION = "observation"
FORCED_MODE = "forced_mode"
NOISE = "noise"
STATE_SCORE = "state_score"
ACTION_SCORE = "action_score"
METADATA_KEY = "lom.manifest"

_CHOICE = ("action", "mode", "margin")
_DIAGNOSTICS = ("hyper_q", "mixing_weights", "component_means", "component_log_stds")
_SMALLEST_WEIGHT = 1e-30  # its logarithm is finite


class GraphError(Exception):
    """A graph that breaks a promise of the bundle."""


class PolicyGraph(nn.Module):
    """One variant as it is exported: the policy's outputs, and the scores that a robot can be warned by.

    Attributes:
        input_names, output_names: in the order of the graph.
    """

    def __init__(
        self, policy: LomPolicy, variant: str, state_score: StateScore | None, *, explain: bool = False
    ) -> None:
        super().__init__()
        self.policy = policy
        self.variant = variant
        self.state_score = state_score
        self.explain = explain
        outputs = _CHOICE if policy.chooses_mode(variant) else ("action",)
        scores = () if state_score is None else (STATE_SCORE, ACTION_SCORE)
        self.input_names = (OBSERVATION, FORCED_MODE, NOISE) if explain else (OBSERVATION,)
        self.output_names = (*outputs, *scores, *(_DIAGNOSTICS if explain else ()))

    def forward(
        self, observation: Tensor, forced_mode: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Outputs in the order of `output_names`; shapes as `LomPolicy.greedy_mode`, scores float32[B]."""
        if self.policy.chooses_mode(self.variant):
            outputs = self.policy.by_mode(self.variant, observation, forced_mode, noise)
            behaviour = Mixture(
                log_weights=outputs["mixing_weights"].clamp(min=_SMALLEST_WEIGHT).log(),
                means=outputs["component_means"],
                log_stds=outputs["component_log_stds"],
            )
        else:
            outputs = dict(self.policy(observation, self.variant))
            behaviour = self.policy.behaviour(observation)
        if self.state_score is not None:
            outputs[STATE_SCORE] = self.state_score(self.policy.normaliser(observation))
            # -log π_b(a|s): high where the behaviour would hardly have acted like this.
            outputs[ACTION_SCORE] = -behaviour.log_prob(outputs["action"])
        return tuple(outputs[name] for name in self.output_names)


def export_graph(graph: PolicyGraph) -> bytes:
    """The graph as a checked, self-contained ONNX model.

    Raises:
        GraphError: the exporter produced something that a bundle must not hold.
        BundleError: likewise, refused by the check that every reader makes.
    """
    policy = graph.policy
    # Two rows or more: traced with one, the exporter would bake the batch size in.
    example: tuple[Tensor, ...] = (torch.zeros(4, policy.observation_dim),)
    if graph.explain:
        example += (torch.full((4,), -1, dtype=torch.int32), torch.zeros(4, policy.action_scaler.low.numel()))
    rows = torch.export.Dim("rows", min=1, max=1 << 20)
    with _quiet_exporter():
        program = torch.onnx.export(
            graph.eval(),
            example,
            input_names=list(graph.input_names),
            output_names=list(graph.output_names),
            dynamic_shapes={name: {0: rows} for name in graph.input_names},
            opset_version=OPSET_VERSION,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    content: bytes = model.SerializeToString()
    onnx.checker.check_model(model, full_check=True)
    refuse_unsafe_graph(graph.variant, content)
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise GraphError(f"{graph.variant}: {value.name}: expected a symbolic first axis, got a fixed one")
    return content


def with_metadata(graph: bytes, metadata: dict[str, str]) -> bytes:
    """The same graph with `metadata_props`, which a runtime shows without onnx being installed."""
    model = onnx.load_from_string(graph)
    onnx.helper.set_model_props(model, metadata)
    content: bytes = model.SerializeToString()
    return content


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
