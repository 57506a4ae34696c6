"""Refuses a graph by its structure, before any runtime sees a byte of it.

A walk over the protobuf wire format of ONNX with nothing but the standard library. The runtime's own parser is no
defence: it follows hardlinked external data, and a `Loop` may run for ever. What a LOM policy needs is a short list of
operators on tensors that are all inside the file; everything else is refused.
"""

from collections.abc import Iterator

from lom_bundle.errors import BundleError

MAX_NODES = 20_000

# fmt: off
ALLOWED_OPERATORS = frozenset({
    "Abs", "Add", "And", "ArgMax", "ArgMin", "Cast", "Clip", "Concat", "Constant", "DequantizeLinear", "Div",
    "Equal", "Exp", "Expand", "Flatten", "Gather", "GatherElements", "Gemm", "Greater", "GreaterOrEqual", "Identity",
    "IsInf", "IsNaN", "Less", "LessOrEqual", "Log", "LogSoftmax", "MatMul", "Max", "Min", "Mul", "Neg", "Not",
    "OneHot", "Or", "Pow", "QuantizeLinear", "Reciprocal", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt",
    "Squeeze", "Sub", "Sum", "Tanh", "TopK", "Transpose", "Unsqueeze", "Where",
})
# fmt: on
_STANDARD_DOMAINS = (b"", b"ai.onnx")

# Field numbers of onnx.proto3.
_MODEL_GRAPH, _MODEL_OPSET, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 8, 20, 25
_GRAPH_NODE, _GRAPH_INITIALISER, _GRAPH_SPARSE = 1, 5, 15
_NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES = 22, 23
_SPARSE_VALUES, _SPARSE_INDICES = 1, 2
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14
_OPSET_DOMAIN = 1

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def refuse_unsafe_graph(name: str, content: bytes) -> None:
    """Passes if the ONNX file holds only what a policy graph needs.

    Raises:
        BundleError: BAD_GRAPH (no ONNX model), OP_FORBIDDEN (operator, foreign domain, subgraph, function, training
            part), EXTERNAL_DATA_FORBIDDEN, or MODEL_TOO_LARGE; names the file.
    """
    try:
        _check_model(name, memoryview(content))
    except _MalformedError:
        raise BundleError("BAD_GRAPH", f"{name}: expected an ONNX model") from None


class _MalformedError(Exception):
    pass


def _check_model(name: str, model: memoryview) -> None:
    graphs = 0
    for number, value in _fields(model):
        if number == _MODEL_GRAPH:
            graphs += 1
            _check_graph(name, _message(value))
        elif number == _MODEL_OPSET:
            for opset_number, domain in _fields(_message(value)):
                if opset_number == _OPSET_DOMAIN:
                    _check_domain(name, domain)
        elif number in (_MODEL_TRAINING, _MODEL_FUNCTIONS):
            raise BundleError("OP_FORBIDDEN", f"{name}: expected one plain graph, got functions or a training part")
    if graphs != 1:
        raise _MalformedError


def _check_graph(name: str, graph: memoryview) -> None:
    nodes = 0
    for number, value in _fields(graph):
        if number == _GRAPH_NODE:
            nodes += 1
            _check_node(name, _message(value))
        elif number == _GRAPH_INITIALISER:
            _check_tensor(name, _message(value))
        elif number == _GRAPH_SPARSE:
            _check_sparse_tensor(name, _message(value))
    if nodes > MAX_NODES:
        raise BundleError("MODEL_TOO_LARGE", f"{name}: expected at most {MAX_NODES} nodes, got {nodes}")
    if nodes == 0:
        raise _MalformedError


def _check_node(name: str, node: memoryview) -> None:
    operator = b""
    for number, value in _fields(node):
        if number == _NODE_OPERATOR:
            operator = bytes(_message(value))
        elif number == _NODE_DOMAIN:
            _check_domain(name, value)
        elif number == _NODE_ATTRIBUTE:
            _check_attribute(name, _message(value))
    shown = operator[:64].decode("ascii", "replace")
    if shown not in ALLOWED_OPERATORS:
        raise BundleError("OP_FORBIDDEN", f"{name}: expected operators of a policy graph, got {shown!r}")


def _check_attribute(name: str, attribute: memoryview) -> None:
    for number, value in _fields(attribute):
        if number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
            raise BundleError("OP_FORBIDDEN", f"{name}: expected no control flow, got a graph inside a node")
        if number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
            _check_tensor(name, _message(value))
        elif number in (_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES):
            _check_sparse_tensor(name, _message(value))


def _check_sparse_tensor(name: str, tensor: memoryview) -> None:
    for number, value in _fields(tensor):
        if number in (_SPARSE_VALUES, _SPARSE_INDICES):
            _check_tensor(name, _message(value))


def _check_tensor(name: str, tensor: memoryview) -> None:
    for number, value in _fields(tensor):
        if number == _TENSOR_EXTERNAL or (number == _TENSOR_LOCATION and value != 0):
            raise BundleError("EXTERNAL_DATA_FORBIDDEN", f"{name}: expected every weight inside the file")


def _check_domain(name: str, domain: "memoryview | int") -> None:
    if bytes(_message(domain)) not in _STANDARD_DOMAINS:
        raise BundleError("OP_FORBIDDEN", f"{name}: expected standard operators only, got a foreign domain")


def _message(value: "memoryview | int") -> memoryview:
    if isinstance(value, int):
        raise _MalformedError
    return value


def _fields(message: memoryview) -> "Iterator[tuple[int, memoryview | int]]":
    """(field number, value) pairs of one message; length-delimited values as views, numbers as they are."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == _BYTES:
            length, position = _varint(message, position)
        elif wire_type in (_FIXED64, _FIXED32):
            length = 8 if wire_type == _FIXED64 else 4
        else:
            raise _MalformedError
        if number == 0 or position + length > len(message):
            raise _MalformedError
        yield number, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if position >= len(message) or shift > 63:
            raise _MalformedError
        byte = message[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
