"""Runs a bundle's graphs. The only file that imports onnxruntime."""

import functools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from lom_api.reasons import Reason
from lom_bundle import Bundle, BundleError, check_golden
from lom_server.batcher import Rows
from lom_server.config import Provider
from lom_server.errors import PolicyError, StartError, log_incident

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ORT_DTYPES = {"tensor(float)": np.dtype(np.float32), "tensor(int32)": np.dtype(np.int32)}
_ONE_NUMBER_A_ROW = ("mode", "margin", "state_score", "action_score")
_SILENT = 4  # fatal only: every exception is logged here, once, and ORT's own lines carry paths


class OnnxEngine:
    """One session for each variant of a bundle, all on the same execution provider.

    Threads: `run` may be called from any thread; it blocks.
    """

    def __init__(
        self, bundle: Bundle, *, provider: Provider = "auto", intra_op_threads: int = 1, allow_spinning: bool = False
    ) -> None:
        """Creates the sessions from the verified bytes in memory; blocks, and holds the GIL meanwhile.

        Raises:
            StartError: PROVIDER_UNAVAILABLE, where `provider` is not what would answer; BAD_GRAPH, for a graph that
                does not load or does not have the manifest's inputs and outputs.
        """
        self._manifest = bundle.manifest
        self._golden = bundle.golden
        self._run_options = ort.RunOptions()
        self._run_options.log_severity_level = _SILENT
        options = _session_options(intra_op_threads, allow_spinning)
        self.provider = _effective_provider(bundle, provider, options)
        self._sessions = {
            variant: _create_session(variant, graph, options, self.provider) for variant, graph in bundle.graphs.items()
        }
        # (dtype, shape without the batch axis) of every output that a graph declares.
        self._output_specs: dict[str, dict[str, tuple[np.dtype[Any], tuple[int, ...] | None]]] = {}
        for variant, session in self._sessions.items():
            self._check_signature(variant, session)

    def run(self, variant: str, outputs: Sequence[str], rows: Rows) -> Rows:
        """Answers `rows` (input name -> float32[B, ...]) with `outputs`; others are not fetched.

        Raises:
            PolicyError: INFERENCE_FAILED, where the runtime raised; BAD_MODEL_OUTPUT, where an answer does not have
                the manifest's dtype and shape.
        """
        try:
            arrays = self._sessions[variant].run(outputs, rows, self._run_options)
        except Exception as error:  # ORT raises what it likes, UnicodeDecodeError included
            incident = log_incident("inference failed", error)
            raise PolicyError(Reason.INFERENCE_FAILED, f"the policy could not be run, id {incident}") from None
        count = len(next(iter(rows.values())))
        specs = self._output_specs[variant]
        for name, array in zip(outputs, arrays, strict=True):
            dtype, shape = specs[name]
            if array.dtype != dtype or (shape is not None and array.shape != (count, *shape)):
                raise PolicyError(
                    Reason.BAD_MODEL_OUTPUT,
                    f"{name}: expected {dtype}{[count, *(shape or ())]}, got {array.dtype}{list(array.shape)}",
                )
        return dict(zip(outputs, arrays, strict=True))

    def abort(self) -> None:
        """Ends the run under way and refuses every later one, with INFERENCE_FAILED. Threads: any."""
        self._run_options.terminate = True

    def self_check(self) -> None:
        """Replays the golden rows through every variant, all at once and one by one.

        One by one because a batch of one takes other kernels than a batch of many.

        Raises:
            BundleError: SELF_TEST_FAILED, naming variant, row, output and difference.
        """
        for variant in self._sessions:
            for batch_rows in (self._manifest.golden.rows, 1):
                run = functools.partial(self._run_in_batches, variant, batch_rows)
                try:
                    check_golden(self._manifest, variant, run, self._golden)
                except PolicyError as error:
                    raise BundleError("SELF_TEST_FAILED", f"{variant}: {error}") from error

    def measured_run_ns(self, variant: str, outputs: Sequence[str], count: int) -> int:
        """Nanoseconds of one run over `count` golden rows: the best of several, so that a neighbour's burst of work
        is not taken for the graph's own cost. Warms the variant up at that size.
        """
        rows = {
            space.name: np.resize(self._golden[space.name], (count, *space.shape)) for space in self._manifest.inputs
        }
        best_ns = None
        for _ in range(5):
            start_ns = time.perf_counter_ns()
            self.run(variant, outputs, rows)
            elapsed_ns = time.perf_counter_ns() - start_ns
            best_ns = elapsed_ns if best_ns is None else min(best_ns, elapsed_ns)
        assert best_ns is not None
        return best_ns

    def _run_in_batches(self, variant: str, batch_rows: int, inputs: Rows) -> Rows:
        outputs = [name for name in self._output_specs[variant] if f"{variant}.{name}" in self._golden]
        parts = [
            self.run(variant, outputs, {name: array[first : first + batch_rows] for name, array in inputs.items()})
            for first in range(0, self._manifest.golden.rows, batch_rows)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in outputs}

    def _check_signature(self, variant: str, session: ort.InferenceSession) -> None:
        inputs = {node.name: node.type for node in session.get_inputs()}
        expected_inputs = {space.name: "tensor(float)" for space in self._manifest.inputs}
        if inputs != expected_inputs:
            raise StartError("BAD_GRAPH", f"{variant}: expected the inputs {expected_inputs}, got {inputs}")
        outputs = {node.name: node.type for node in session.get_outputs()}
        known_shapes = {"action": self._manifest.action.shape} | dict.fromkeys(_ONE_NUMBER_A_ROW, ())
        expected_dtypes = dict.fromkeys(("action", *_ONE_NUMBER_A_ROW), "tensor(float)") | {"mode": "tensor(int32)"}
        specs: dict[str, tuple[np.dtype[Any], tuple[int, ...] | None]] = {}
        for name in self._manifest.variants[variant].outputs:
            if name not in outputs or outputs[name] not in _ORT_DTYPES:
                raise StartError("BAD_GRAPH", f"{variant}: expected a float32 or int32 output {name!r}")
            if outputs[name] != expected_dtypes.get(name, outputs[name]):
                raise StartError(
                    "BAD_GRAPH", f"{variant}: {name}: expected {expected_dtypes[name]}, got {outputs[name]}"
                )
            specs[name] = (_ORT_DTYPES[outputs[name]], known_shapes.get(name))
        self._output_specs[variant] = specs


def _session_options(intra_op_threads: int, allow_spinning: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _SILENT
    # Bytes that are ONNX and ORT's own format at once were checked as the first; they must not run as the second.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if allow_spinning else "0")
    return options


def _effective_provider(bundle: Bundle, provider: Provider, options: ort.SessionOptions) -> str:
    """The provider that will answer: the one demanded, or the best that works."""
    if provider != "auto":
        return _PROVIDERS[provider]
    cuda = _PROVIDERS["cuda"]
    if cuda in ort.get_available_providers():
        try:
            variant, graph = next(iter(bundle.graphs.items()))
            _create_session(variant, graph, options, cuda)
        except StartError:
            return _PROVIDERS["cpu"]
        return cuda
    return _PROVIDERS["cpu"]


def _create_session(variant: str, graph: bytes, options: ort.SessionOptions, provider: str) -> ort.InferenceSession:
    if provider not in ort.get_available_providers():
        raise StartError("PROVIDER_UNAVAILABLE", f"expected {provider}, got {ort.get_available_providers()}")
    try:
        session = ort.InferenceSession(graph, options, providers=[provider])
    except Exception as error:
        log_incident(f"{variant}: the graph does not load", error)
        raise StartError("BAD_GRAPH", f"{variant}: expected a graph that loads on {provider}") from error
    # ORT falls back to another provider without raising; what it reports first is what runs.
    if session.get_providers()[0] != provider:
        raise StartError("PROVIDER_UNAVAILABLE", f"expected {provider}, got {session.get_providers()[0]}")
    return session
