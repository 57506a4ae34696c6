"""A bundle's graphs as a model repository of the Triton inference server, one model per variant.

The configuration is checked against Triton's own schema and the graphs are run by onnxruntime; neither was run inside a
Triton server. Such a server checks and knows less than ours: no golden rows, no contract, no bounds, no deadlines.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, ValueInfoProto

from lom_bundle import BundleError, Manifest
from lom_bundle.writer import write_folder

MAX_BATCH_ROWS = 1024

_DATA_TYPES: dict[int, str] = {
    TensorProto.BOOL: "TYPE_BOOL",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.DOUBLE: "TYPE_FP64",
}


def write_triton_repository(path: str | os.PathLike[str], manifest: Manifest, graphs: Mapping[str, bytes]) -> None:
    """Writes `<path>/<policy>-<variant>/config.pbtxt` and `.../1/model.onnx` for every graph.

    Names, types and shapes come from the graph itself. Contract hash, policy and default variant are parameters of
    each model, so that a client can compare them with its own.

    Raises:
        BundleError: DESTINATION_EXISTS; BAD_MANIFEST, a variant whose name is no folder name; BAD_GRAPH, a tensor that
            Triton cannot batch; NO_SPACE when the disk refuses. Nothing is left behind.
    """
    contents: dict[str, bytes] = {}
    for variant, graph in graphs.items():
        model = f"{manifest.policy}-{variant}"
        if Path(model).name != model:
            raise BundleError("BAD_MANIFEST", f"variant: expected a plain name, got {variant[:64]!r}")
        contents[f"{model}/config.pbtxt"] = _configuration(model, manifest, graph).encode()
        contents[f"{model}/1/model.onnx"] = graph
    write_folder(Path(path), contents)


def _configuration(model: str, manifest: Manifest, graph: bytes) -> str:
    tensors = onnx.load_from_string(graph).graph
    parameters = {
        "lom.policy": manifest.policy,
        "lom.contract_hash": manifest.contract_hash,
        "lom.default_variant": manifest.default_variant,
    }
    lines = [
        f"name: {_quoted(model)}",
        'platform: "onnxruntime_onnx"',
        'backend: "onnxruntime"',
        f"max_batch_size: {MAX_BATCH_ROWS}",
        *(f"input {{ {_tensor(model, value)} }}" for value in tensors.input),
        *(f"output {{ {_tensor(model, value)} }}" for value in tensors.output),
        "dynamic_batching {}",
        *(
            f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
            for key, value in parameters.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _tensor(model: str, value: ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    rows, dims = tensor.shape.dim[:1], [dim.dim_value for dim in tensor.shape.dim[1:]]
    if not rows or not rows[0].dim_param or not all(dims):
        raise BundleError("BAD_GRAPH", f"{model}: {value.name}: expected a symbolic first axis and fixed others")
    if tensor.elem_type not in _DATA_TYPES:
        got = TensorProto.DataType.Name(tensor.elem_type)
        raise BundleError(
            "BAD_GRAPH", f"{model}: {value.name}: expected one of {sorted(_DATA_TYPES.values())}, got {got}"
        )
    # Triton refuses empty dims: one number per row is [1] on the wire, and reshaped to what the graph has.
    shape = f"dims: {dims}" if dims else "dims: [1] reshape { shape: [] }"
    return f"name: {_quoted(value.name)} data_type: {_DATA_TYPES[tensor.elem_type]} {shape}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
