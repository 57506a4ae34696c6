"""A bundle that balances gymnasium's `InvertedPendulum-v5`, built without torch.

Observation: position of the cart (m), angle of the pole (rad), and their rates; action: force in [-3, 3]. One variant,
`actor`: action = clip(o · GAIN, -3, 3), a linear-quadratic regulator of the environment's own linearisation (0.04 s a
step, Q = diag(1, 1, 0.1, 0.1), R = 1), rounded.
"""

import os

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from lom_bundle import GoldenSpec, Manifest, SpaceSpec, VariantSpec, write_bundle

ENV_ID = "InvertedPendulum-v5"
GAIN = np.array([[0.74], [6.02], [0.87], [1.01]], dtype=np.float32)
LIMIT = 3.0
_GOLDEN_ROWS = 16


def write_pendulum_bundle(path: str | os.PathLike[str]) -> str:
    """Writes the bundle described at the top of this module, and returns its digest."""
    width, action_width = GAIN.shape
    observation = np.random.default_rng(0).uniform(-1, 1, (_GOLDEN_ROWS, width)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["observation", "gain"], ["unbounded"]),
            helper.make_node("Clip", ["unbounded", "low", "high"], ["action"]),
        ],
        "actor",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["B", width])],
        [helper.make_tensor_value_info("action", TensorProto.FLOAT, ["B", action_width])],
        [
            numpy_helper.from_array(GAIN, "gain"),
            numpy_helper.from_array(np.array(-LIMIT, np.float32), "low"),
            numpy_helper.from_array(np.array(LIMIT, np.float32), "high"),
        ],
    )
    manifest = Manifest(
        policy="pendulum",
        inputs=(SpaceSpec(name="observation", shape=(width,), low=(-np.inf,) * width, high=(np.inf,) * width),),
        action=SpaceSpec(name="action", shape=(action_width,), low=(-LIMIT,), high=(LIMIT,)),
        variants={"actor": VariantSpec(graph="actor.onnx", outputs=("action",))},
        default_variant="actor",
        num_components=1,
        min_mixing_weight=0.0,
        golden=GoldenSpec(rows=_GOLDEN_ROWS, action_tolerance=1e-6, tie_width=0.0),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return write_bundle(
        path,
        manifest,
        graphs={"actor": model.SerializeToString()},
        explain_graphs={},
        golden={"observation": observation, "actor.action": np.clip(observation @ GAIN, -LIMIT, LIMIT)},
        card="A bundle for tests.\n",
    )
