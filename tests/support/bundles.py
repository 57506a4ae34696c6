"""Small hand-worked bundles, built without torch: every answer can be computed on paper.

Observation `o` in R^3, action in [-1, 1]^2, three components:

* `greedy_mode`: hyper-Q of component k is `o[k]`, so mode = argmax(o), margin = largest - second largest,
  action = `COMPONENT_MEANS[mode]`;
* `actor`: action = clip(o[:2] / 2, -1, 1);
* both: state_score = |o[0]| + |o[1]| + |o[2]|, worth a warning above `STATE_THRESHOLD`;
* `greedy_mode` explained: likewise for a forced mode, plus noise times `COMPONENT_STD`, clipped; every mixing weight
  1/3.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from lom_bundle import GoldenSpec, GraphSpec, Manifest, SpaceSpec, VariantSpec, WarningSpec, write_bundle

Array = NDArray[Any]

POLICY = "toy"
OBSERVATION_DIM = 3
ACTION_DIM = 2
COMPONENT_MEANS = np.array([[-0.5, -0.25], [0.0, 0.25], [0.5, 0.75]], dtype=np.float32)
NUM_COMPONENTS = len(COMPONENT_MEANS)
GOLDEN_ROWS = 16
STATE_THRESHOLD = 2.5

_BURN_WIDTH = 512
_OPSET = 17
_IR_VERSION = 10
COMPONENT_LOG_STD = -1.0
COMPONENT_STD = np.float32(np.exp(COMPONENT_LOG_STD))

_ANSWERS = ("action", "mode", "margin", "state_score")
_DIAGNOSTICS = ("hyper_q", "mixing_weights", "component_means", "component_log_stds")


@dataclass(frozen=True, kw_only=True)
class Flaws:
    """What a bundle is made to do wrong; by default nothing.

    Attributes:
        nan_above: a row whose o[0] is above it gets a NaN action.
        raise_above: a batch with an o[0] above it makes the runtime raise.
        overshoot_above: a row whose o[0] is above it gets an action of 5, far outside the action space.
        burn_layers: dense layers of 512 x 512 that each row passes through for nothing but their cost
            (about 0.1 ms of one core each, for one row).
        wrong_golden: the golden actions are not the ones that the graphs answer.
        name_of_observation_in_graph: differs from the manifest's where it is not `observation`.
        action_offset: no flaw, but a mark: added to every component's mean (at most 0.25), so that answers tell bundles
            apart.
        observation_bound: no flaw: every element of the observation has to stay within it, in size.
        has_goal: no flaw: a second input `goal`, float32[B, 3], which changes nothing.
    """

    nan_above: float | None = None
    raise_above: float | None = None
    overshoot_above: float | None = None
    burn_layers: int = 0
    wrong_golden: bool = False
    name_of_observation_in_graph: str = "observation"
    action_offset: float = 0.0
    observation_bound: float = np.inf
    has_goal: bool = False


def write_test_bundle(
    path: str | os.PathLike[str],
    *,
    policy: str = POLICY,
    default_variant: str = "greedy_mode",
    flaws: Flaws | None = None,
    actor: ModelProto | None = None,
    sign_key: bytes | None = None,
) -> str:
    """Writes the bundle described at the top of this module, and returns its digest; `actor` replaces that graph."""
    flaws = flaws or Flaws()
    observation = golden_observations()
    golden = {
        "observation": observation,
        "greedy_mode.action": greedy_action(observation) + np.float32(flaws.action_offset),
        "greedy_mode.mode": greedy_mode(observation),
        "greedy_mode.margin": greedy_margin(observation),
        "actor.action": actor_action(observation),
        "greedy_mode.state_score": state_score(observation),
        "actor.state_score": state_score(observation),
    }
    if flaws.has_goal:
        golden["goal"] = np.zeros_like(observation)
    if flaws.wrong_golden:
        golden["greedy_mode.action"] = -golden["greedy_mode.action"]
    return write_bundle(
        path,
        toy_manifest(policy=policy, default_variant=default_variant, flaws=flaws),
        graphs={
            name: (actor if actor is not None and name == "actor" else graph).SerializeToString()
            for name, graph in toy_graphs(flaws).items()
        },
        explain_graphs={"greedy_mode": explain_graph(flaws).SerializeToString()},
        golden=golden,
        card="A bundle for tests.\n",
        sign_key=sign_key,
    )


def write_test_repository(path: str | os.PathLike[str], versions: Mapping[str, Mapping[int, Flaws]]) -> None:
    """Writes POLICY/VERSION/ bundles below `path`, each with the flaws given."""
    for policy, by_version in versions.items():
        for version, flaws in by_version.items():
            write_test_bundle(os.path.join(path, policy, str(version)), policy=policy, flaws=flaws)


def toy_manifest(*, policy: str = POLICY, default_variant: str = "greedy_mode", flaws: Flaws | None = None) -> Manifest:
    """The manifest of the bundle, without its files."""
    flaws = flaws or Flaws()
    high = (flaws.observation_bound,) * OBSERVATION_DIM
    low = tuple(-bound for bound in high)
    names = ("observation", "goal") if flaws.has_goal else ("observation",)
    return Manifest(
        policy=policy,
        inputs=tuple(SpaceSpec(name=name, shape=(OBSERVATION_DIM,), low=low, high=high) for name in names),
        action=SpaceSpec(name="action", shape=(ACTION_DIM,), low=(-1.0,) * ACTION_DIM, high=(1.0,) * ACTION_DIM),
        variants={
            "greedy_mode": VariantSpec(
                graph="greedy_mode.onnx",
                outputs=_ANSWERS,
                explain=GraphSpec(
                    graph="greedy_mode_explain.onnx",
                    outputs=(*_ANSWERS, *_DIAGNOSTICS),
                    inputs=("forced_mode", "noise"),
                ),
            ),
            "actor": VariantSpec(graph="actor.onnx", outputs=("action", "state_score")),
        },
        default_variant=default_variant,
        num_components=NUM_COMPONENTS,
        min_mixing_weight=0.0,
        warnings={
            "state_score": WarningSpec(
                thresholds={"greedy_mode": STATE_THRESHOLD, "actor": STATE_THRESHOLD},
                false_alarm_rate=0.01,
                calibration="by hand",
                held_out_episodes=0,
                held_out_rows=0,
                held_out_false_alarms={},
            )
        },
        golden=GoldenSpec(rows=GOLDEN_ROWS, action_tolerance=1e-6, output_tolerance=1e-6, tie_width=1e-4),
    )


def golden_observations() -> Array:
    """float32[16, 3] in [-1, 1], no two largest values within 0.01."""
    observation = np.random.default_rng(7).uniform(-1, 1, (20 * GOLDEN_ROWS, OBSERVATION_DIM)).astype(np.float32)
    sound: Array = observation[greedy_margin(observation) > 0.01][:GOLDEN_ROWS]
    return sound


def state_score(observation: Array) -> Array:
    """float32[B]: what both variants answer."""
    score: Array = np.abs(observation).sum(axis=1)
    return score


def greedy_mode(observation: Array) -> Array:
    """int32[B]: what `greedy_mode` answers."""
    mode: Array = np.argmax(observation, axis=1).astype(np.int32)
    return mode


def greedy_margin(observation: Array) -> Array:
    """float32[B]: what `greedy_mode` answers."""
    ordered: Array = np.sort(observation, axis=1)
    margin: Array = ordered[:, -1] - ordered[:, -2]
    return margin


def greedy_action(observation: Array) -> Array:
    """float32[B, 2]: what `greedy_mode` answers."""
    action: Array = COMPONENT_MEANS[greedy_mode(observation)]
    return action


def actor_action(observation: Array) -> Array:
    """float32[B, 2]: what `actor` answers."""
    action: Array = np.clip(observation[:, :ACTION_DIM] * np.float32(0.5), -1, 1)
    return action


def toy_graphs(flaws: Flaws) -> Mapping[str, ModelProto]:
    """The two graphs as ONNX models, by variant."""
    return {"greedy_mode": _greedy_graph(flaws), "actor": _actor_graph(flaws)}


def explain_graph(flaws: Flaws) -> ModelProto:
    """The explained `greedy_mode` as an ONNX model."""
    return _greedy_graph(flaws, explain=True)


def _greedy_graph(flaws: Flaws, *, explain: bool = False) -> ModelProto:
    observation = flaws.name_of_observation_in_graph
    constants: dict[str, Array] = {
        "identity": np.eye(OBSERVATION_DIM, dtype=np.float32),
        "means": COMPONENT_MEANS + np.float32(flaws.action_offset),
        "two": np.array([2], dtype=np.int64),
        "zero_scalar": np.array(0, dtype=np.int64),
        "one_scalar": np.array(1, dtype=np.int64),
    }
    nodes = [
        helper.make_node("MatMul", [observation, "identity"], ["hyper_q"]),
        helper.make_node("ArgMax", ["hyper_q"], ["own_mode"], axis=1, keepdims=0),
        helper.make_node("TopK", ["hyper_q", "two"], ["best_two", "best_two_modes"], axis=1),
        helper.make_node("Gather", ["best_two", "zero_scalar"], ["best"], axis=1),
        helper.make_node("Gather", ["best_two", "one_scalar"], ["second"], axis=1),
        helper.make_node("Sub", ["best", "second"], ["margin"]),
    ]
    outputs: dict[str, tuple[int, list[int]]] = {
        "action": (TensorProto.FLOAT, [ACTION_DIM]),
        "mode": (TensorProto.INT32, []),
        "margin": (TensorProto.FLOAT, []),
        "state_score": (TensorProto.FLOAT, []),
    }
    if not explain:
        nodes += [
            helper.make_node("Identity", ["own_mode"], ["mode_int64"]),
            helper.make_node("Cast", ["mode_int64"], ["mode"], to=TensorProto.INT32),
            helper.make_node("Gather", ["means", "mode_int64"], ["sound_action"], axis=0),
        ]
        return _model("greedy_mode", flaws, nodes, constants, outputs)
    constants |= {
        "zero_float": np.array(0, dtype=np.float32),
        "weight": np.array(1 / NUM_COMPONENTS, dtype=np.float32),
        "log_std": np.array(COMPONENT_LOG_STD, dtype=np.float32),
        "std": np.array(COMPONENT_STD, dtype=np.float32),
        "low": np.array(-1, dtype=np.float32),
        "high": np.array(1, dtype=np.float32),
    }
    nodes += [
        helper.make_node("Cast", ["forced_mode"], ["forced_int64"], to=TensorProto.INT64),
        helper.make_node("GreaterOrEqual", ["forced_int64", "zero_scalar"], ["is_forced"]),
        helper.make_node("Where", ["is_forced", "forced_int64", "own_mode"], ["mode_int64"]),
        helper.make_node("Cast", ["mode_int64"], ["mode"], to=TensorProto.INT32),
        helper.make_node("Gather", ["means", "mode_int64"], ["mean"], axis=0),
        helper.make_node("Mul", ["noise", "std"], ["scaled_noise"]),
        helper.make_node("Add", ["mean", "scaled_noise"], ["sampled"]),
        helper.make_node("Clip", ["sampled", "low", "high"], ["sound_action"]),
        helper.make_node("Mul", ["hyper_q", "zero_float"], ["zeros"]),
        helper.make_node("Add", ["zeros", "weight"], ["mixing_weights"]),
        helper.make_node("Unsqueeze", ["zeros", "two"], ["zeros_by_component"]),
        helper.make_node("Add", ["zeros_by_component", "means"], ["component_means"]),
        helper.make_node("Mul", ["component_means", "zero_float"], ["zeros_by_action"]),
        helper.make_node("Add", ["zeros_by_action", "log_std"], ["component_log_stds"]),
    ]
    outputs |= {
        "hyper_q": (TensorProto.FLOAT, [NUM_COMPONENTS]),
        "mixing_weights": (TensorProto.FLOAT, [NUM_COMPONENTS]),
        "component_means": (TensorProto.FLOAT, [NUM_COMPONENTS, ACTION_DIM]),
        "component_log_stds": (TensorProto.FLOAT, [NUM_COMPONENTS, ACTION_DIM]),
    }
    extra_inputs = {"forced_mode": (TensorProto.INT32, []), "noise": (TensorProto.FLOAT, [ACTION_DIM])}
    return _model("greedy_mode_explain", flaws, nodes, constants, outputs, extra_inputs)


def _actor_graph(flaws: Flaws) -> ModelProto:
    observation = flaws.name_of_observation_in_graph
    constants: dict[str, Array] = {
        "halves": np.eye(OBSERVATION_DIM, ACTION_DIM, dtype=np.float32) / 2,
        "low": np.array(-1, dtype=np.float32),
        "high": np.array(1, dtype=np.float32),
    }
    nodes = [
        helper.make_node("MatMul", [observation, "halves"], ["unbounded"]),
        helper.make_node("Clip", ["unbounded", "low", "high"], ["sound_action"]),
    ]
    outputs = {"action": (TensorProto.FLOAT, [ACTION_DIM]), "state_score": (TensorProto.FLOAT, [])}
    return _model("actor", flaws, nodes, constants, outputs)


def _model(
    name: str,
    flaws: Flaws,
    nodes: list[NodeProto],
    constants: dict[str, Array],
    outputs: Mapping[str, tuple[int, list[int]]],
    extra_inputs: Mapping[str, tuple[int, list[int]]] | None = None,
) -> ModelProto:
    """`nodes` answer `sound_action`; the flaws turn it into `action`."""
    observation = flaws.name_of_observation_in_graph
    rng = np.random.default_rng(0)
    action = "sound_action"
    constants["first_column"] = np.array([0], dtype=np.int64)
    nodes.append(helper.make_node("Gather", [observation, "first_column"], ["first"], axis=1))
    constants["columns"] = np.array([1], dtype=np.int64)
    nodes.append(helper.make_node("Abs", [observation], ["sizes"]))
    nodes.append(helper.make_node("ReduceSum", ["sizes", "columns"], ["state_score"], keepdims=0))
    if flaws.burn_layers:
        constants["burn_in"] = rng.normal(size=(OBSERVATION_DIM, _BURN_WIDTH)).astype(np.float32)
        constants["burn"] = rng.normal(0, _BURN_WIDTH**-0.5, (_BURN_WIDTH, _BURN_WIDTH)).astype(np.float32)
        constants["burn_out"] = np.zeros((_BURN_WIDTH, ACTION_DIM), dtype=np.float32)
        nodes.append(helper.make_node("MatMul", [observation, "burn_in"], ["heat_0"]))
        for layer in range(flaws.burn_layers):
            nodes.append(helper.make_node("MatMul", [f"heat_{layer}", "burn"], [f"product_{layer}"]))
            nodes.append(helper.make_node("Tanh", [f"product_{layer}"], [f"heat_{layer + 1}"]))
        nodes.append(helper.make_node("MatMul", [f"heat_{flaws.burn_layers}", "burn_out"], ["no_heat"]))
        nodes.append(helper.make_node("Add", [action, "no_heat"], ["burnt_action"]))
        action = "burnt_action"
    if flaws.nan_above is not None:
        constants["nan_above"] = np.array(flaws.nan_above, dtype=np.float32)
        constants["nan"] = np.array(np.nan, dtype=np.float32)
        nodes.append(helper.make_node("Greater", ["first", "nan_above"], ["is_poisoned"]))
        nodes.append(helper.make_node("Where", ["is_poisoned", "nan", action], ["poisoned_action"]))
        action = "poisoned_action"
    if flaws.overshoot_above is not None:
        constants["overshoot_above"] = np.array(flaws.overshoot_above, dtype=np.float32)
        constants["far_outside"] = np.array(5, dtype=np.float32)
        nodes.append(helper.make_node("Greater", ["first", "overshoot_above"], ["overshoots"]))
        nodes.append(helper.make_node("Where", ["overshoots", "far_outside", action], ["overshot_action"]))
        action = "overshot_action"
    if flaws.raise_above is not None:
        # A Gather past the end of its table: the shape checker cannot see it, the runtime raises.
        constants["raise_above"] = np.array(flaws.raise_above, dtype=np.float32)
        constants["table"] = np.zeros((1, 1), dtype=np.float32)
        constants["squeezed_axis"] = np.array([1], dtype=np.int64)
        nodes.append(helper.make_node("Greater", ["first", "raise_above"], ["is_fatal"]))
        nodes.append(helper.make_node("Squeeze", ["is_fatal", "squeezed_axis"], ["is_fatal_row"]))
        nodes.append(helper.make_node("Cast", ["is_fatal_row"], ["place"], to=TensorProto.INT64))
        nodes.append(helper.make_node("Gather", ["table", "place"], ["looked_up"], axis=0))
        nodes.append(helper.make_node("Add", [action, "looked_up"], ["risky_action"]))
        action = "risky_action"
    if flaws.has_goal:
        constants["no_weight"] = np.zeros((OBSERVATION_DIM, ACTION_DIM), dtype=np.float32)
        nodes.append(helper.make_node("MatMul", ["goal", "no_weight"], ["nothing"]))
        nodes.append(helper.make_node("Add", [action, "nothing"], ["goal_action"]))
        action = "goal_action"
    nodes.append(helper.make_node("Identity", [action], ["action"]))
    graph = helper.make_graph(
        nodes,
        name,
        [
            helper.make_tensor_value_info(value, dtype, ["B", *shape])
            for value, (dtype, shape) in (
                {observation: (TensorProto.FLOAT, [OBSERVATION_DIM])}
                | ({"goal": (TensorProto.FLOAT, [OBSERVATION_DIM])} if flaws.has_goal else {})
                | dict(extra_inputs or {})
            ).items()
        ],
        [helper.make_tensor_value_info(output, dtype, ["B", *shape]) for output, (dtype, shape) in outputs.items()],
        [numpy_helper.from_array(value, constant) for constant, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
