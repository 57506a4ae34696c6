"""`lom_server.edges.oip_schema`: the protocol's numbers, in a pool that lives beside any other."""

import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from tritonclient.grpc import model_config_pb2, service_pb2

from lom_server.edges import oip_schema
from lom_server.edges.oip_schema import POOL, SERVICE, message_type

OUR_FILE = SERVICE.file


def walk(messages: Mapping[str, Descriptor]) -> Iterator[Descriptor]:
    for message in messages.values():
        yield message
        yield from walk(message.nested_types_by_name)


OURS = {message.full_name: message for message in walk(OUR_FILE.message_types_by_name)}
THEIRS = {
    message.full_name: message
    for module in (service_pb2, model_config_pb2)
    for message in walk(module.DESCRIPTOR.message_types_by_name)
}

# Of a model's configuration we have what we fill in.
WHOLE_THERE = {f"inference.{name}" for name in ("ModelConfig", "ModelInput", "ModelOutput", "ModelDynamicBatching")}


def described(field: FieldDescriptor) -> tuple[object, ...]:
    """What two ends must agree on, and what makes a client's accessors."""
    inner = field.message_type or field.enum_type
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    oneof = field.containing_oneof
    return (
        field.number, field.type, field.is_repeated, inner and inner.full_name, is_map, oneof and oneof.name,
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(OURS.keys() - {"inference.ModelMetadataResponse.PropertiesEntry"}))
def test_fields_are_those_that_tritonclient_speaks(name: str) -> None:
    ours = {field.name: described(field) for field in OURS[name].fields}
    theirs = {field.name: described(field) for field in THEIRS[name].fields}
    if name == "inference.ModelMetadataResponse":
        del ours["properties"]
    if name == "inference.ModelConfig":  # one of several schedulers there, the only one here: the same bytes
        theirs["dynamic_batching"] = (*theirs["dynamic_batching"][:-1], None)
    if name in WHOLE_THERE:
        theirs = {field: theirs[field] for field in ours}
    assert ours == theirs


def test_enums_are_those_that_tritonclient_speaks() -> None:
    ours, theirs = OUR_FILE.enum_types_by_name["DataType"], model_config_pb2.DataType.DESCRIPTOR
    assert {value.name: value.number for value in ours.values} == {value.name: value.number for value in theirs.values}
    formats = message_type("ModelInput").DESCRIPTOR.enum_types_by_name["Format"]
    assert [value.name for value in formats.values] == ["FORMAT_NONE", "FORMAT_NHWC", "FORMAT_NCHW"]


def test_the_properties_of_a_model_are_the_protocols_map_of_texts() -> None:
    response = message_type("ModelMetadataResponse")(properties={"a": "b"})
    # Field 6, 6 bytes: key (field 1) 'a', value (field 2) 'b'.
    assert response.SerializeToString() == b"\x32\x06" + b"\x0a\x01a" + b"\x12\x01b"


def test_methods_are_those_that_tritonclient_calls() -> None:
    assert SERVICE.full_name == "inference.GRPCInferenceService"
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    for method in SERVICE.methods:
        assert method.full_name == theirs[method.name].full_name
        assert method.input_type.full_name == theirs[method.name].input_type.full_name
        assert method.output_type.full_name == theirs[method.name].output_type.full_name
        assert method.client_streaming == theirs[method.name].client_streaming
        assert method.server_streaming == theirs[method.name].server_streaming
    unserved = set(theirs) - {method.name for method in SERVICE.methods}
    assert len(unserved) == 8
    assert all("SharedMemory" in name or name in ("TraceSetting", "LogSettings") for name in unserved)


def test_a_message_travels_to_tritonclient_and_back() -> None:
    request = message_type("ModelInferRequest")(model_name="toy", id="7", raw_input_contents=[b"\0\0\0\0"])
    request.parameters["lom_mode"].int64_param = -(2**63)
    request.parameters["seed"].uint64_param = 2**64 - 1
    request.inputs.add(name="observation", datatype="FP32", shape=[1, 1]).contents.fp32_contents.append(0.5)
    theirs = service_pb2.ModelInferRequest.FromString(request.SerializeToString())
    assert theirs.parameters["seed"].WhichOneof("parameter_choice") == "uint64_param"
    assert list(theirs.inputs[0].contents.fp32_contents) == [0.5]
    back = message_type("ModelInferRequest").FromString(theirs.SerializeToString())
    assert back == request


def test_a_message_has_one_class() -> None:
    assert message_type("ModelInferRequest") is message_type("ModelInferRequest")
    assert message_type("ModelInferRequest") is not service_pb2.ModelInferRequest


def test_the_pool_can_describe_itself() -> None:
    """What reflection sends: a file that another pool builds the same messages from."""
    file = FileDescriptorProto()
    OUR_FILE.CopyToProto(file)
    assert file.package == "inference"
    assert POOL.FindFileContainingSymbol("inference.GRPCInferenceService").name == file.name


@pytest.mark.parametrize(
    "order",
    [
        ("lom_server.edges.oip_schema", "tritonclient.grpc"),
        ("tritonclient.grpc", "lom_server.edges.oip_schema"),
    ],
)
def test_both_schemas_live_in_one_process(order: tuple[str, str]) -> None:
    program = f"""
import {order[0]}, {order[1]}
from lom_server.edges.oip_schema import message_type
from tritonclient.grpc import service_pb2
message = message_type("ServerLiveResponse")(live=True)
assert service_pb2.ServerLiveResponse.FromString(message.SerializeToString()).live
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_default_pool_is_left_alone() -> None:
    program = f"""
import {oip_schema.__name__}
from google.protobuf import descriptor_pool
try:
    descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")
except KeyError:
    raise SystemExit(0)
raise SystemExit("found in the default pool")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
