"""A Triton repository says of each graph what the graph says of itself."""

import importlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper

from lom_bundle import BundleError
from lom_export.triton import MAX_BATCH_ROWS, write_triton_repository
from tests.support.bundles import OBSERVATION_DIM, Flaws, golden_observations, greedy_action, toy_graphs, toy_manifest

GRAPHS = {name: graph.SerializeToString() for name, graph in toy_graphs(Flaws()).items()}
MANIFEST = toy_manifest()
# Triton's names of onnxruntime's types.
TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int32)": "TYPE_INT32"}


def parsed(path: Path) -> Any:
    schema = importlib.import_module("tritonclient.grpc.model_config_pb2")
    return text_format.Parse((path / "config.pbtxt").read_text(), schema.ModelConfig())


def test_configurations_are_triton_s_and_describe_their_graphs(tmp_path: Path) -> None:
    write_triton_repository(tmp_path / "new" / "models", MANIFEST, GRAPHS)
    assert sorted(folder.name for folder in (tmp_path / "new" / "models").iterdir()) == ["toy-actor", "toy-greedy_mode"]
    schema = importlib.import_module("tritonclient.grpc.model_config_pb2")
    for variant in GRAPHS:
        folder = tmp_path / "new" / "models" / f"toy-{variant}"
        config = parsed(folder)
        assert (config.name, config.platform, config.backend) == (folder.name, "onnxruntime_onnx", "onnxruntime")
        assert config.max_batch_size == MAX_BATCH_ROWS
        assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
        assert {key: value.string_value for key, value in config.parameters.items()} == {
            "lom.policy": "toy",
            "lom.contract_hash": MANIFEST.contract_hash,
            "lom.default_variant": "greedy_mode",
        }
        session = onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
        for described, actual in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
            assert [tensor.name for tensor in described] == [tensor.name for tensor in actual]
            for tensor, real in zip(described, actual, strict=True):
                assert schema.DataType.Name(tensor.data_type) == TYPES[real.type]
                # What reaches the graph: the reshape where there is one. Triton refuses empty dims.
                inside = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
                assert list(inside) == real.shape[1:]
                assert list(tensor.dims) == (real.shape[1:] or [1])


def test_the_written_model_answers(tmp_path: Path) -> None:
    write_triton_repository(tmp_path / "models", MANIFEST, GRAPHS)
    model = tmp_path / "models" / "toy-greedy_mode" / "1" / "model.onnx"
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    observations = golden_observations()
    (action,) = session.run(["action"], {"observation": observations})
    np.testing.assert_allclose(action, greedy_action(observations), atol=1e-6)


def test_an_existing_destination_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").write_text("mine")
    with pytest.raises(BundleError, match="DESTINATION_EXISTS"):
        write_triton_repository(tmp_path / "models", MANIFEST, GRAPHS)
    assert [file.name for file in tmp_path.rglob("*")] == ["models", "mine"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match=r"NO_SPACE: .*No space left on device"):
        write_triton_repository(tmp_path / "models", MANIFEST, GRAPHS)
    assert not list(tmp_path.iterdir())


def test_a_variant_cannot_lead_out_of_the_repository(tmp_path: Path) -> None:
    name = "/../../outside"
    manifest = replace(MANIFEST, variants={**MANIFEST.variants, name: MANIFEST.variants["actor"]})
    with pytest.raises(BundleError, match="BAD_MANIFEST: variant: expected a plain name"):
        write_triton_repository(tmp_path / "inner" / "models", manifest, {name: GRAPHS["actor"]})
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("shape", "element_type", "message"),
    [
        ([4, OBSERVATION_DIM], TensorProto.FLOAT, "expected a symbolic first axis and fixed others"),
        (["rows", "width"], TensorProto.FLOAT, "expected a symbolic first axis and fixed others"),
        ([], TensorProto.FLOAT, "expected a symbolic first axis and fixed others"),
        (["rows", OBSERVATION_DIM], TensorProto.COMPLEX64, "expected one of "),
    ],
)
def test_a_graph_that_triton_cannot_batch_is_refused(
    tmp_path: Path, shape: list[int | str], element_type: int, message: str
) -> None:
    values = [helper.make_tensor_value_info(name, element_type, shape) for name in ("observation", "action")]
    node = helper.make_node("Identity", ["observation"], ["action"])
    graph = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:])).SerializeToString()
    with pytest.raises(BundleError, match=f"BAD_GRAPH: toy-actor: observation: {message}"):
        write_triton_repository(tmp_path / "models", MANIFEST, {"actor": graph})
    assert not list(tmp_path.iterdir())
