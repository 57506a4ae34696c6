"""No graph that reaches out of its file, calls foreign code or may run for ever gets as far as a runtime.

`onnx` is the independent witness: what passes, and parses there, holds nothing forbidden in its eyes either.
"""

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    StringStringEntryProto,
    TensorProto,
    TrainingInfoProto,
    helper,
    load_model_from_string,
    numpy_helper,
)

from lom_bundle import BundleError, GraphSpec, VariantSpec, read_bundle, write_bundle
from lom_bundle.onnx_structure import ALLOWED_OPERATORS, MAX_FIELDS, MAX_NODES, refuse_unsafe_graph
from tests.support.bundles import (
    Flaws,
    actor_action,
    golden_observations,
    toy_graphs,
    toy_manifest,
    write_test_bundle,
)
from tests.support.servers import start_server_process

IDENTITY = helper.make_node("Identity", ["x"], ["y"])
WEIGHT = numpy_helper.from_array(np.ones(2, np.float32), "weight")
SECRET_MARKER = b"SECRETMARKER"


def graph_of(nodes: Sequence[NodeProto], initialisers: Sequence[TensorProto] = ()) -> GraphProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 2]) for name in "xy"]
    return helper.make_graph(nodes, "graph", ends[:1], ends[1:], initialisers)


def model_of(nodes: Sequence[NodeProto] = (IDENTITY,), initialisers: Sequence[TensorProto] = ()) -> ModelProto:
    return helper.make_model(
        graph_of(nodes, initialisers), opset_imports=[helper.make_opsetid("", 17)], ir_version=10, producer_name="test"
    )


def external_tensor(location: str = "../secret", *, in_words: bool = True) -> TensorProto:
    """A tensor whose data is elsewhere; without words, only `data_location` says so."""
    tensor = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    if in_words:
        tensor.external_data.append(StringStringEntryProto(key="location", value=location))
    return tensor


def sparse(values: TensorProto, indices: TensorProto) -> SparseTensorProto:
    return SparseTensorProto(values=values, indices=indices, dims=[2])


def node_with(operator: str = "Identity", domain: str = "", **attributes: Any) -> NodeProto:
    return helper.make_node(operator, ["x"], ["y"], domain=domain, **attributes)


def node_with_attribute(attribute: AttributeProto) -> NodeProto:
    node = NodeProto(op_type="Constant", output=["y"])
    node.attribute.append(attribute)
    return node


def external_models() -> Iterator[tuple[str, ModelProto]]:
    external = external_tensor()
    yield "initialiser", model_of(initialisers=[external])
    yield "data_location alone", model_of(initialisers=[external_tensor(in_words=False)])
    default_location = external_tensor()
    default_location.data_location = TensorProto.DEFAULT
    yield "external_data alone", model_of(initialisers=[default_location])
    yield "Constant", model_of([node_with("Constant", value=external)])
    yield "list of tensors", model_of([node_with_attribute(AttributeProto(name="values", tensors=[WEIGHT, external]))])
    for name, tensor in {"values": sparse(external, WEIGHT), "indices": sparse(WEIGHT, external)}.items():
        model = model_of()
        model.graph.sparse_initializer.append(tensor)
        yield f"{name} of a sparse initialiser", model
        yield (
            f"{name} of a sparse Constant",
            model_of([node_with_attribute(AttributeProto(name="sparse_value", sparse_tensor=tensor))]),
        )
        yield (
            f"{name} in a list of sparse tensors",
            model_of([node_with_attribute(AttributeProto(name="sparse_values", sparse_tensors=[tensor]))]),
        )


def forbidden_models() -> Iterator[tuple[str, ModelProto]]:
    body = graph_of([IDENTITY])
    yield "Loop", model_of([node_with("Loop", body=body)])
    yield "If", model_of([node_with("If", then_branch=body, else_branch=body)])
    yield "Scan", model_of([node_with("Scan", body=body, num_scan_inputs=1)])
    yield "Loop without a body", model_of([node_with("Loop")])
    yield "graph in an allowed operator", model_of([node_with("Identity", body=body)])
    yield "list of graphs", model_of([node_with_attribute(AttributeProto(name="bodies", graphs=[body]))])
    yield (
        "external data in a subgraph",
        model_of([node_with("Identity", body=graph_of([IDENTITY], [external_tensor()]))]),
    )
    yield "custom domain of a node", model_of([node_with("Relu", "com.example")])
    yield "ML domain of a node", model_of([node_with("Scaler", "ai.onnx.ml")])
    yield "runtime's own domain", model_of([node_with("FusedGemm", "com.microsoft")])
    yield "unknown operator", model_of([node_with("Backdoor")])
    yield "operator that fills memory", model_of([node_with("ConstantOfShape")])
    yield "operator with a long name", model_of([node_with("Relu" + "\0" * 100)])
    yield "operator in other letters", model_of([node_with("relu")])
    imported = model_of()
    imported.opset_import.append(helper.make_opsetid("com.example", 1))
    yield "custom domain in opset_import", imported
    with_function = model_of()
    with_function.functions.append(FunctionProto(name="Relu", node=[IDENTITY]))
    yield "function", with_function
    with_training = model_of()
    with_training.training_info.append(TrainingInfoProto(algorithm=body))
    yield "training part", with_training


def good_models() -> Iterator[tuple[str, ModelProto]]:
    flaws = Flaws(nan_above=1.0, raise_above=2.0, burn_layers=2)
    yield from toy_graphs(Flaws()).items()
    yield from ((f"{name} with flaws", graph) for name, graph in toy_graphs(flaws).items())
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "scale")
    zero = numpy_helper.from_array(np.array(0, np.int8), "zero")
    yield (
        "int8",
        model_of(
            [
                helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["small"]),
                helper.make_node("DequantizeLinear", ["small", "scale", "zero"], ["y"]),
            ],
            [scale, zero],
        ),
    )
    yield (
        "fp16",
        model_of(
            [
                helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
                helper.make_node("Cast", ["half"], ["y"], to=TensorProto.FLOAT),
            ]
        ),
    )
    yield "Constant", model_of([helper.make_node("Constant", [], ["c"], value=WEIGHT), IDENTITY])
    yield "named standard domain", model_of([node_with("Relu", "ai.onnx")])
    with_sparse = model_of()
    with_sparse.graph.sparse_initializer.append(sparse(WEIGHT, WEIGHT))
    yield "sparse initialiser", with_sparse
    described = model_of()
    described.doc_string = "Loop com.example external_data"
    helper.set_model_props(described, {"author": "someone"})
    yield "words only", described


def by_name(models: Iterator[tuple[str, ModelProto]]) -> pytest.MarkDecorator:
    named = dict(models)
    return pytest.mark.parametrize("model", named.values(), ids=named)


def refusal(content: bytes) -> str | None:
    """The reason for which the graph is refused; None where it passes. Anything but a BundleError is raised."""
    refused: BundleError | None = None
    try:
        refuse_unsafe_graph("actor.onnx", content)
    except BundleError as error:
        refused = error
    if refused is None:
        return None
    assert refused.detail.startswith("actor.onnx: expected ")
    assert refused.detail.isascii()
    assert refused.detail.isprintable()
    return refused.reason


def forbidden_according_to_onnx(model: ModelProto) -> list[str]:
    found = [f"opset {opset.domain}" for opset in model.opset_import if opset.domain not in ("", "ai.onnx")]
    found += ["function"] * len(model.functions) + ["training part"] * len(model.training_info)
    for node in model.graph.node:
        if node.op_type not in ALLOWED_OPERATORS or node.domain not in ("", "ai.onnx"):
            found.append(f"operator {node.domain}::{node.op_type}")
        found += ["subgraph" for a in node.attribute if a.HasField("g") or a.graphs]
    if len(model.graph.node) > MAX_NODES:
        found.append("nodes")
    found += [f"external {t.name}" for t in tensors_of(model.graph) if t.data_location != 0 or t.external_data]
    return found


def tensors_of(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    sparse_tensors = list(graph.sparse_initializer)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield attribute.t
        yield from attribute.tensors
        sparse_tensors += [attribute.sparse_tensor, *attribute.sparse_tensors]
    for tensor in sparse_tensors:
        yield from (tensor.values, tensor.indices)


@by_name(good_models())
def test_what_a_policy_needs_passes(model: ModelProto) -> None:
    assert refusal(model.SerializeToString()) is None
    assert forbidden_according_to_onnx(model) == []


def test_the_bundles_of_the_tests_pass(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "bundle")
    read_bundle(tmp_path / "bundle")


@by_name(external_models())
def test_external_data_is_refused_wherever_it_is(model: ModelProto) -> None:
    assert refusal(model.SerializeToString()) == "EXTERNAL_DATA_FORBIDDEN"
    assert forbidden_according_to_onnx(model) != []


@by_name(forbidden_models())
def test_what_no_policy_needs_is_refused(model: ModelProto) -> None:
    assert refusal(model.SerializeToString()) == "OP_FORBIDDEN"
    assert forbidden_according_to_onnx(model) != []


def test_the_number_of_nodes_is_bounded() -> None:
    model = model_of([IDENTITY] * MAX_NODES)
    assert refusal(model.SerializeToString()) is None
    model.graph.node.append(IDENTITY)
    assert refusal(model.SerializeToString()) == "MODEL_TOO_LARGE"


def test_the_work_on_tiny_fields_is_bounded() -> None:
    assert refusal(model_of().SerializeToString() + field(6, b"") * MAX_FIELDS) == "MODEL_TOO_LARGE"


# What follows is written byte by byte: no library writes it, the runtime reads it.

VARINT, FIXED64, BYTES, GROUP, END_OF_GROUP, FIXED32 = range(6)


def varint(value: int) -> bytes:
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


def key(number: int, wire_type: int = BYTES) -> bytes:
    return varint(number << 3 | wire_type)


def field(number: int, content: bytes) -> bytes:
    return key(number) + varint(len(content)) + content


def with_graph(graph: bytes) -> bytes:
    """A model with these bytes for a graph."""
    model = model_of()
    model.ClearField("graph")
    return model.SerializeToString() + field(7, graph)


def with_node(node: bytes) -> bytes:
    return with_graph(field(1, node) + graph_of([]).SerializeToString())


def with_tensor(tensor: bytes) -> bytes:
    return with_graph(graph_of([IDENTITY]).SerializeToString() + field(5, tensor))


GRAPH = graph_of([IDENTITY]).SerializeToString()
LOCATION = StringStringEntryProto(key="location", value="../secret").SerializeToString()
PLAIN_TENSOR = WEIGHT.SerializeToString()
FOREIGN_NODE = node_with("RandomNormalLike").SerializeToString()


def test_the_bytes_written_here_are_those_of_a_model() -> None:
    assert refusal(with_graph(GRAPH)) is None
    assert refusal(with_node(IDENTITY.SerializeToString())) is None
    assert refusal(with_tensor(PLAIN_TENSOR)) is None
    assert refusal(with_tensor(PLAIN_TENSOR + field(13, LOCATION))) == "EXTERNAL_DATA_FORBIDDEN"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a model",
        b"\0" * 64,
        b"\xff" * 64,
        with_graph(b""),
        with_graph(GRAPH) + field(7, GRAPH),
        with_graph(GRAPH) + field(7, b""),
        with_node(b""),
        key(1, GROUP) * 10_000,
        with_graph(GRAPH) + key(7, GROUP) + GRAPH + key(7, END_OF_GROUP),
        with_graph(GRAPH) + key(99, END_OF_GROUP),
        with_graph(GRAPH) + bytes([6 << 3 | 6]),
        with_graph(GRAPH) + key(0, VARINT) + b"\0",
        with_graph(GRAPH) + field(0, b""),
        with_graph(GRAPH) + key(1, VARINT) + b"\x80" * 10 + b"\0",
        with_graph(GRAPH) + key(1, VARINT) + b"\x80" * 1000,
        with_graph(GRAPH) + b"\x80" * 10 + b"\x01",
        with_graph(GRAPH) + key(6) + varint(2**63),
        with_graph(GRAPH) + key(6) + varint(2**64 - 1),
        with_graph(GRAPH) + key(1, FIXED64) + b"1234567",
        with_graph(GRAPH) + key(7, VARINT) + b"\0",
        key(7, FIXED64) + field(1, field(4, b"Relu")),
        with_graph(key(1, VARINT) + b"\0"),
        with_tensor(PLAIN_TENSOR)[:-1],
    ],
)
def test_what_is_no_model_is_refused(content: bytes) -> None:
    assert refusal(content) == "BAD_GRAPH"


@pytest.mark.parametrize(
    "hidden",
    [
        # The runtime drops the bits above 32 of a key: it sees external data, functions, a training part.
        with_tensor(PLAIN_TENSOR + varint((13 << 3 | BYTES) + 2**32) + varint(len(LOCATION)) + LOCATION),
        with_tensor(PLAIN_TENSOR + varint((14 << 3) + 2**34) + b"\x01"),
        with_graph(GRAPH) + varint((25 << 3 | BYTES) + 2**33) + b"\0",
        # It skips what comes in an unexpected wire type: the operator stays the first one, the graph the other one.
        with_node(FOREIGN_NODE + key(4, FIXED64) + b"Identity"),
        with_node(FOREIGN_NODE + key(4, FIXED32) + b"Relu"),
        with_node(FOREIGN_NODE + field(4, b"Relu")),
        with_node(node_with("Relu", "com.example").SerializeToString() + field(7, b"ai.onnx")),
        # A location that is 0 in 32 bits only, or the last of two.
        with_tensor(PLAIN_TENSOR + key(14, VARINT) + varint(2**32)),
        with_tensor(PLAIN_TENSOR + key(14, VARINT) + b"\x01" + key(14, VARINT) + b"\0"),
        # Longer than needed, but the same keys.
        with_tensor(PLAIN_TENSOR + b"\xea\x80\x80\x80\x00" + varint(len(LOCATION)) + LOCATION),
        with_node(FOREIGN_NODE + b"\xa2\x00" + b"\x84\x00" + b"Relu"),
    ],
)
def test_a_second_reading_of_the_same_bytes_is_no_way_through(hidden: bytes) -> None:
    assert refusal(hidden) is not None


def test_a_model_that_is_also_a_file_of_the_runtimes_own_format_is_refused() -> None:
    model = model_of()
    model.producer_name = "ORTM"
    content = model.SerializeToString()
    assert content[4:8] == b"ORTM"
    assert forbidden_according_to_onnx(load_model_from_string(content)) == []
    assert refusal(content) == "BAD_GRAPH"
    model.producer_name = "harmless ORTM"
    assert refusal(model.SerializeToString()) is None


def passes_only_what_onnx_finds_harmless(content: bytes) -> bool:
    """Whether the mutant parses; asserts that passing it was right."""
    reason = refusal(content)
    try:
        model = load_model_from_string(content)
    except Exception:  # every protobuf backend has its own DecodeError
        return False
    assert reason is not None or forbidden_according_to_onnx(model) == []
    return True


def test_truncated_models_raise_nothing_else() -> None:
    for model in (*toy_graphs(Flaws()).values(), *dict(external_models()).values()):
        content = model.SerializeToString()
        for length in range(0, len(content), 97):
            passes_only_what_onnx_finds_harmless(content[:length])


def mutants(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    for _ in range(count):
        mutant = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            mutant[rng.randrange(len(mutant))] = rng.randrange(256)
        yield bytes(mutant)


def test_mutations_of_a_good_model_raise_nothing_else() -> None:
    content = toy_graphs(Flaws())["greedy_mode"].SerializeToString()
    parsed = sum(passes_only_what_onnx_finds_harmless(mutant) for mutant in mutants(content, 2000, seed=0))
    assert parsed > 200  # or onnx would witness nothing


def test_mutations_of_bad_models_find_no_way_through() -> None:
    bad = {**dict(external_models()), **dict(forbidden_models())}
    for seed, model in enumerate(bad.values()):
        for mutant in mutants(model.SerializeToString(), 100, seed):
            passes_only_what_onnx_finds_harmless(mutant)


def write_hostile_bundle(path: Path, hostile: ModelProto, *, graph_file: str, explains: bool = False) -> None:
    """A bundle with sound digests whose variant `actor` is `hostile`, or is explained by it."""
    observation = golden_observations()
    good = toy_graphs(Flaws())["actor"].SerializeToString()
    graph = GraphSpec(graph=graph_file, outputs=("action",))
    variant = VariantSpec(graph="good.onnx", outputs=("action",), explain=graph) if explains else graph
    write_bundle(
        path,
        replace(toy_manifest(default_variant="actor"), variants={"actor": VariantSpec(**vars(variant))}),
        graphs={"actor": good if explains else hostile.SerializeToString()},
        explain_graphs={"actor": hostile.SerializeToString()} if explains else None,
        golden={"observation": observation, "actor.action": actor_action(observation)},
        card="",
    )


@pytest.mark.parametrize("explains", [False, True], ids=["acts", "explains"])
@pytest.mark.parametrize("graph_file", ["actor.onnx", "actor.bin", "actor"])
def test_no_graph_of_a_bundle_is_left_out(tmp_path: Path, graph_file: str, explains: bool) -> None:
    write_hostile_bundle(tmp_path / "good", model_of(), graph_file=graph_file, explains=explains)
    read_bundle(tmp_path / "good")
    write_hostile_bundle(tmp_path / "bad", model_of([node_with("Loop")]), graph_file=graph_file, explains=explains)
    with pytest.raises(BundleError, match=f"OP_FORBIDDEN: {graph_file}: "):
        read_bundle(tmp_path / "bad")


def test_a_graph_that_no_variant_names_is_refused_too(tmp_path: Path) -> None:
    write_hostile_bundle(tmp_path / "bundle", model_of([node_with("Loop")]), graph_file="stray.onnx", explains=True)
    manifest_file = tmp_path / "bundle" / "manifest.json"
    document = json.loads(manifest_file.read_text())
    document["variants"]["actor"]["explain"] = None
    manifest_file.write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"OP_FORBIDDEN: stray\.onnx: "):
        read_bundle(tmp_path / "bundle")


def test_a_graph_is_hashed_before_it_is_walked(tmp_path: Path) -> None:
    write_hostile_bundle(tmp_path / "bundle", model_of([node_with("Loop")]), graph_file="actor.onnx")
    graph = tmp_path / "bundle" / "actor.onnx"
    graph.write_bytes(graph.read_bytes() + b"\0")
    with pytest.raises(BundleError, match="DIGEST_MISMATCH"):
        read_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("location", ["weights.bin", "../secret", "secret"])
def test_a_hardlinked_secret_is_not_read_through_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    """The runtime follows hardlinks, and resolves a graph that it got as bytes against the working folder."""
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET_MARKER)
    attack = model_of([helper.make_node("Add", ["x", "weight"], ["y"])], [external_tensor(location)])
    write_hostile_bundle(tmp_path / "bundle", attack, graph_file="actor.onnx")
    os.link(secret, tmp_path / "weights.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match=r"EXTERNAL_DATA_FORBIDDEN: actor\.onnx: ") as caught:
        read_bundle(tmp_path / "bundle")
    assert SECRET_MARKER.decode() not in str(caught.value)
    server = start_server_process(tmp_path / "bundle")
    assert server.wait() == 1
    assert server.stdout == []
    assert [line.partition(": expected")[0] for line in server.stderr] == [
        "lom-serve: EXTERNAL_DATA_FORBIDDEN: actor.onnx"
    ]
