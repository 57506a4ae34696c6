"""Refuses a graph by its structure, before any runtime sees a byte of it.

A walk over the protobuf wire format of ONNX with nothing but the standard library. The runtime's own parser is no
defence: it follows hardlinked external data, and a `Loop` may run for ever. What a LOM policy needs is a short list of
operators on tensors that are all inside the file; everything else is refused. So is every spelling that another parser
could read differently: a defence holds only if both see the same model.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from lom_bundle.errors import BundleError

MAX_NODES = 20_000
MAX_FIELDS = 2_000_000

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

# onnxruntime takes a file with these bytes here for its own format, whatever it is as ONNX.
_RUNTIME_FORMAT, _RUNTIME_FORMAT_PLACE = b"ORTM", slice(4, 8)

# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_OPSET, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 8, 20, 25
_GRAPH_NODE, _GRAPH_INITIALISER, _GRAPH_SPARSE = 1, 5, 15
_NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES = 22, 23
_SPARSE_VALUES, _SPARSE_INDICES = 1, 2
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14
_OPSET_DOMAIN = 1

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LARGEST_KEY = 2**32 - 1  # onnxruntime drops the bits above and sees another field


def refuse_unsafe_graph(name: str, content: bytes) -> None:
    """Passes if the ONNX file holds only what a policy graph needs.

    Raises:
        BundleError: BAD_GRAPH (no ONNX model), OP_FORBIDDEN (operator, foreign domain, subgraph, function, training
            part), EXTERNAL_DATA_FORBIDDEN, or MODEL_TOO_LARGE; names the file.
    """
    try:
        if content[_RUNTIME_FORMAT_PLACE] == _RUNTIME_FORMAT:
            raise _MalformedError
        _Walk(name).check_model(memoryview(content))
    except _MalformedError:
        raise BundleError("BAD_GRAPH", f"{name}: expected an ONNX model") from None


class _MalformedError(Exception):
    pass


@dataclass
class _Walk:
    """One pass over one file.

    Attributes:
        name: of the file.
        fields_left: bounds the time that a large file of tiny fields can take.
    """

    name: str
    fields_left: int = MAX_FIELDS

    def check_model(self, model: memoryview) -> None:
        graphs = 0
        for number, value in self._fields(model):
            if number == _MODEL_GRAPH:
                graphs += 1
                self._check_graph(_message(value))
            elif number == _MODEL_OPSET:
                for opset_number, domain in self._fields(_message(value)):
                    if opset_number == _OPSET_DOMAIN:
                        self._check_domain(domain)
            elif number in (_MODEL_TRAINING, _MODEL_FUNCTIONS):
                raise self._forbidden("one plain graph", "functions or a training part")
        if graphs != 1:
            raise _MalformedError

    def _check_graph(self, graph: memoryview) -> None:
        nodes = 0
        for number, value in self._fields(graph):
            if number == _GRAPH_NODE:
                nodes += 1
                if nodes > MAX_NODES:
                    raise self._too_large(f"{MAX_NODES} nodes")
                self._check_node(_message(value))
            elif number == _GRAPH_INITIALISER:
                self._check_tensor(_message(value))
            elif number == _GRAPH_SPARSE:
                self._check_sparse_tensor(_message(value))
        if nodes == 0:
            raise _MalformedError

    def _check_node(self, node: memoryview) -> None:
        has_operator = False
        for number, value in self._fields(node):
            if number == _NODE_OPERATOR:
                has_operator = True
                self._check_operator(_message(value))
            elif number == _NODE_DOMAIN:
                self._check_domain(value)
            elif number == _NODE_ATTRIBUTE:
                self._check_attribute(_message(value))
        if not has_operator:
            raise _MalformedError

    def _check_operator(self, operator: memoryview) -> None:
        shown = bytes(operator[:64]).decode("ascii", "backslashreplace")
        if shown not in ALLOWED_OPERATORS:
            raise self._forbidden("operators of a policy graph", repr(shown))

    def _check_domain(self, domain: "memoryview | int") -> None:
        if bytes(_message(domain)) not in _STANDARD_DOMAINS:
            raise self._forbidden("standard operators only", "a foreign domain")

    def _check_attribute(self, attribute: memoryview) -> None:
        for number, value in self._fields(attribute):
            if number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                raise self._forbidden("no control flow", "a graph inside a node")
            if number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                self._check_tensor(_message(value))
            elif number in (_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES):
                self._check_sparse_tensor(_message(value))

    def _check_sparse_tensor(self, tensor: memoryview) -> None:
        for number, value in self._fields(tensor):
            if number in (_SPARSE_VALUES, _SPARSE_INDICES):
                self._check_tensor(_message(value))

    def _check_tensor(self, tensor: memoryview) -> None:
        for number, value in self._fields(tensor):
            if number == _TENSOR_EXTERNAL or (number == _TENSOR_LOCATION and value != 0):
                raise BundleError("EXTERNAL_DATA_FORBIDDEN", f"{self.name}: expected every weight inside the file")

    def _fields(self, message: memoryview) -> "Iterator[tuple[int, memoryview | int]]":
        """(field number, value) pairs of one message; length-delimited values as views, numbers as they are."""
        position = 0
        while position < len(message):
            self.fields_left -= 1
            if self.fields_left < 0:
                raise self._too_large(f"{MAX_FIELDS} fields")
            key, position = _varint(message, position)
            number, wire_type = key >> 3, key & 7
            if number == 0 or key > _LARGEST_KEY:
                raise _MalformedError
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
            if position + length > len(message):
                raise _MalformedError
            view = message[position : position + length]
            position += length
            # A message spelt as a fixed number is one that onnxruntime skips: here it must not pass for a message.
            yield number, view if wire_type == _BYTES else int.from_bytes(view, "little")

    def _forbidden(self, expected: str, got: str) -> BundleError:
        return BundleError("OP_FORBIDDEN", f"{self.name}: expected {expected}, got {got}")

    def _too_large(self, most: str) -> BundleError:
        return BundleError("MODEL_TOO_LARGE", f"{self.name}: expected at most {most}, got more")


def _message(value: "memoryview | int") -> memoryview:
    if isinstance(value, int):
        raise _MalformedError
    return value


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
