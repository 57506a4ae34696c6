"""Open Inference Protocol v2 as data, in a descriptor pool of its own.

Whoever imports another package with these messages (`tritonclient`, say) has them in the default pool, where a second
definition is an error. A private pool lives beside any other.

The numbers are the protocol's; where it is silent they are Triton's, which its clients speak.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    ServiceDescriptorProto,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

_PACKAGE = "inference"
_FILE = "open_inference.proto"

# By message: `number name [repeated | map | oneof] type`. A map's keys are strings.
_MESSAGES: Mapping[str, str] = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "1 live bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "1 ready bool",
    "ModelReadyRequest": "1 name string; 2 version string",
    "ModelReadyResponse": "1 ready bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "1 name string; 2 version string; 3 extensions repeated string",
    "ModelMetadataRequest": "1 name string; 2 version string",
    "ModelMetadataResponse": (
        "1 name string; 2 versions repeated string; 3 platform string; "
        "4 inputs repeated ModelMetadataResponse.TensorMetadata; "
        "5 outputs repeated ModelMetadataResponse.TensorMetadata; 6 properties map string"
    ),
    "ModelMetadataResponse.TensorMetadata": "1 name string; 2 datatype string; 3 shape repeated int64",
    "ModelInferRequest": (
        "1 model_name string; 2 model_version string; 3 id string; 4 parameters map InferParameter; "
        "5 inputs repeated ModelInferRequest.InferInputTensor; "
        "6 outputs repeated ModelInferRequest.InferRequestedOutputTensor; 7 raw_input_contents repeated bytes"
    ),
    "ModelInferRequest.InferInputTensor": (
        "1 name string; 2 datatype string; 3 shape repeated int64; 4 parameters map InferParameter; "
        "5 contents InferTensorContents"
    ),
    "ModelInferRequest.InferRequestedOutputTensor": "1 name string; 2 parameters map InferParameter",
    "ModelInferResponse": (
        "1 model_name string; 2 model_version string; 3 id string; 4 parameters map InferParameter; "
        "5 outputs repeated ModelInferResponse.InferOutputTensor; 6 raw_output_contents repeated bytes"
    ),
    "ModelInferResponse.InferOutputTensor": (
        "1 name string; 2 datatype string; 3 shape repeated int64; 4 parameters map InferParameter; "
        "5 contents InferTensorContents"
    ),
    "InferParameter": (
        "1 bool_param oneof bool; 2 int64_param oneof int64; 3 string_param oneof string; "
        "4 double_param oneof double; 5 uint64_param oneof uint64"
    ),
    "InferTensorContents": (
        "1 bool_contents repeated bool; 2 int_contents repeated int32; 3 int64_contents repeated int64; "
        "4 uint_contents repeated uint32; 5 uint64_contents repeated uint64; 6 fp32_contents repeated float; "
        "7 fp64_contents repeated double; 8 bytes_contents repeated bytes"
    ),
    "ModelStreamInferResponse": "1 error_message string; 2 infer_response ModelInferResponse",
    "RepositoryIndexRequest": "1 repository_name string; 2 ready bool",
    "RepositoryIndexResponse": "1 models repeated RepositoryIndexResponse.ModelIndex",
    "RepositoryIndexResponse.ModelIndex": "1 name string; 2 version string; 3 state string; 4 reason string",
    "RepositoryModelLoadRequest": (
        "1 repository_name string; 2 model_name string; 3 parameters map ModelRepositoryParameter"
    ),
    "RepositoryModelLoadResponse": "",
    "RepositoryModelUnloadRequest": (
        "1 repository_name string; 2 model_name string; 3 parameters map ModelRepositoryParameter"
    ),
    "RepositoryModelUnloadResponse": "",
    "ModelRepositoryParameter": (
        "1 bool_param oneof bool; 2 int64_param oneof int64; 3 string_param oneof string; 4 bytes_param oneof bytes"
    ),
    "ModelStatisticsRequest": "1 name string; 2 version string",
    "ModelStatisticsResponse": "1 model_stats repeated ModelStatistics",
    "ModelStatistics": (
        "1 name string; 2 version string; 3 last_inference uint64; 4 inference_count uint64; "
        "5 execution_count uint64; 6 inference_stats InferStatistics; 7 batch_stats repeated InferBatchStatistics; "
        "8 memory_usage repeated MemoryUsage; 9 response_stats map InferResponseStatistics"
    ),
    "InferStatistics": (
        "1 success StatisticDuration; 2 fail StatisticDuration; 3 queue StatisticDuration; "
        "4 compute_input StatisticDuration; 5 compute_infer StatisticDuration; 6 compute_output StatisticDuration; "
        "7 cache_hit StatisticDuration; 8 cache_miss StatisticDuration"
    ),
    "InferResponseStatistics": (
        "1 compute_infer StatisticDuration; 2 compute_output StatisticDuration; 3 success StatisticDuration; "
        "4 fail StatisticDuration; 5 empty_response StatisticDuration; 6 cancel StatisticDuration"
    ),
    "StatisticDuration": "1 count uint64; 2 ns uint64",
    "InferBatchStatistics": (
        "1 batch_size uint64; 2 compute_input StatisticDuration; 3 compute_infer StatisticDuration; "
        "4 compute_output StatisticDuration"
    ),
    "MemoryUsage": "1 type string; 2 id int64; 3 byte_size uint64",
    "ModelConfigRequest": "1 name string; 2 version string",
    "ModelConfigResponse": "1 config ModelConfig",
    "ModelConfig": (
        "1 name string; 2 platform string; 4 max_batch_size int32; 5 input repeated ModelInput; "
        "6 output repeated ModelOutput; 11 dynamic_batching ModelDynamicBatching; 17 backend string"
    ),
    "ModelInput": "1 name string; 2 data_type DataType; 3 format ModelInput.Format; 4 dims repeated int64",
    "ModelOutput": "1 name string; 2 data_type DataType; 3 dims repeated int64",
    "ModelDynamicBatching": "",
}

# By enum: the names of the values from 0 on.
_ENUMS: Mapping[str, str] = {
    "DataType": (
        "TYPE_INVALID TYPE_BOOL TYPE_UINT8 TYPE_UINT16 TYPE_UINT32 TYPE_UINT64 TYPE_INT8 TYPE_INT16 TYPE_INT32 "
        "TYPE_INT64 TYPE_FP16 TYPE_FP32 TYPE_FP64 TYPE_STRING TYPE_BF16"
    ),
    "ModelInput.Format": "FORMAT_NONE FORMAT_NHWC FORMAT_NCHW",
}

_SERVICE = "GRPCInferenceService"
# Method X asks with XRequest and is answered with XResponse.
_UNARY_METHODS = (
    "ServerLive ServerReady ModelReady ServerMetadata ModelMetadata ModelInfer ModelConfig ModelStatistics "
    "RepositoryIndex RepositoryModelLoad RepositoryModelUnload"
)

_ONEOF = "parameter_choice"
_SCALARS: Mapping[str, FieldDescriptorProto.Type.ValueType] = {
    "bool": FieldDescriptorProto.TYPE_BOOL,
    "bytes": FieldDescriptorProto.TYPE_BYTES,
    "double": FieldDescriptorProto.TYPE_DOUBLE,
    "float": FieldDescriptorProto.TYPE_FLOAT,
    "int32": FieldDescriptorProto.TYPE_INT32,
    "int64": FieldDescriptorProto.TYPE_INT64,
    "string": FieldDescriptorProto.TYPE_STRING,
    "uint32": FieldDescriptorProto.TYPE_UINT32,
    "uint64": FieldDescriptorProto.TYPE_UINT64,
}


def _file() -> FileDescriptorProto:
    file = FileDescriptorProto(name=_FILE, package=_PACKAGE, syntax="proto3")
    messages: dict[str, DescriptorProto] = {}
    # An outer message stands before those inside it, in either table.
    for name, fields in _MESSAGES.items():
        outer, _, inner = name.rpartition(".")
        message = messages[outer].nested_type.add() if outer else file.message_type.add()
        message.name = inner
        messages[name] = message
        for field in filter(None, fields.split("; ")):
            _add_field(message, name, field)
    for name, values in _ENUMS.items():
        outer, _, inner = name.rpartition(".")
        enum: EnumDescriptorProto = messages[outer].enum_type.add() if outer else file.enum_type.add()
        enum.name = inner
        for number, value in enumerate(values.split()):
            enum.value.add(name=value, number=number)
    service = file.service.add(name=_SERVICE)
    for name in _UNARY_METHODS.split():
        _add_method(service, name, f"{name}Request", f"{name}Response")
    _add_method(service, "ModelStreamInfer", "ModelInferRequest", "ModelStreamInferResponse", is_stream=True)
    return file


def _add_field(message: DescriptorProto, message_name: str, text: str) -> None:
    number, name, *labels, type_name = text.split()
    field = message.field.add(name=name, number=int(number))
    is_repeated = labels in (["repeated"], ["map"])
    field.label = FieldDescriptorProto.LABEL_REPEATED if is_repeated else FieldDescriptorProto.LABEL_OPTIONAL
    if labels == ["map"]:
        # What a map is in a descriptor: a repeated message of a key and a value, named after the field.
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _add_field(entry, f"{message_name}.{entry.name}", "1 key string")
        _add_field(entry, f"{message_name}.{entry.name}", f"2 value {type_name}")
        type_name = f"{message_name}.{entry.name}"
    elif labels == ["oneof"]:
        if not message.oneof_decl:
            message.oneof_decl.add(name=_ONEOF)
        field.oneof_index = 0
    if type_name in _SCALARS:
        field.type = _SCALARS[type_name]
    else:
        field.type = FieldDescriptorProto.TYPE_ENUM if type_name in _ENUMS else FieldDescriptorProto.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{type_name}"


def _add_method(
    service: ServiceDescriptorProto, name: str, request: str, response: str, *, is_stream: bool = False
) -> None:
    service.method.add(
        name=name,
        input_type=f".{_PACKAGE}.{request}",
        output_type=f".{_PACKAGE}.{response}",
        client_streaming=is_stream,
        server_streaming=is_stream,
    )


POOL = DescriptorPool()
"""Holds the protocol's messages and nothing else; reflection of the service reads it."""

POOL.AddSerializedFile(_file().SerializeToString())

SERVICE: ServiceDescriptor = POOL.FindServiceByName(f"{_PACKAGE}.{_SERVICE}")
"""`inference.GRPCInferenceService`: the methods that any listener of the server answers."""


@cache
def message_type(name: str) -> Any:
    """The class of the protocol's message `name`, e.g. `ModelInferRequest`; it exists at run time only."""
    return GetMessageClass(POOL.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
