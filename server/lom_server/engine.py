"""Runs a bundle's graphs. The only file that imports onnxruntime."""

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from lom_api.reasons import Reason
from lom_bundle import EXPLAIN_SUFFIX, Bundle, BundleError, GraphSpec, check_golden
from lom_server.batcher import Rows
from lom_server.config import Provider
from lom_server.errors import PolicyError, StartError, log_incident

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ORT_DTYPES = {"tensor(float)": np.dtype(np.float32), "tensor(int32)": np.dtype(np.int32)}
_ONE_NUMBER_A_ROW = ("mode", "margin", "state_score", "action_score")
# Inputs beyond the contract's: type, and whether they are as wide as an action.
_EXTRA_INPUTS = {"forced_mode": ("tensor(int32)", np.int32(-1), False), "noise": ("tensor(float)", np.float32(0), True)}
_SILENT = 4  # fatal only: every exception is logged here, once, and ORT's own lines carry paths
# A bucket whose run takes longer than this is not measured, nor any larger one: they are extrapolated.
_LONGEST_MEASURED_NS = 250_000_000
_LONGEST_WARM_UP_NS = 2_000_000
_MOST_MEASUREMENTS = 5
_LONGEST_MEASUREMENT_NS = 100_000_000


@dataclass(frozen=True, slots=True)
class _Run:
    options: ort.RunOptions
    started_ns: int


class OnnxEngine:
    """One session for each graph of a bundle, all on the same execution provider.

    A graph is named by its variant; a variant's explain graph by that name and `EXPLAIN_SUFFIX`.

    Threads: `run`, `stop_run` and `running_for_ns` may be called from any thread; `run` blocks, one run at a time.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        provider: Provider = "auto",
        allow_fallback: bool = False,
        intra_op_threads: int = 1,
        allow_spinning: bool = False,
        pause_s: float = 0.0,
    ) -> None:
        """Creates the sessions from the verified bytes in memory; blocks.

        Args:
            allow_fallback: answer on the processor where `provider` is not to be had.
            pause_s: rest between two sessions. Creating one holds the GIL, for milliseconds: with rests, what is
                served meanwhile waits for one session at most.

        Raises:
            StartError: PROVIDER_UNAVAILABLE, where `provider` is not what would answer; BAD_GRAPH, for a graph that
                does not load or does not have the manifest's inputs and outputs.
        """
        self._manifest = bundle.manifest
        self._golden = bundle.golden
        self._running: _Run | None = None
        options = _session_options(intra_op_threads, allow_spinning)
        self.provider = _effective_provider(bundle, provider, options, allow_fallback)
        self._specs: dict[str, GraphSpec] = {}
        self._sessions: dict[str, ort.InferenceSession] = {}
        # (dtype, shape without the batch axis) of every output that a graph declares.
        self._output_specs: dict[str, dict[str, tuple[np.dtype[Any], tuple[int, ...] | None]]] = {}
        for graph, spec, content in _graphs(bundle):
            if self._sessions:
                time.sleep(pause_s)
            self._specs[graph] = spec
            self._sessions[graph] = _create_session(graph, content, options, self.provider)
            self._output_specs[graph] = self._checked_outputs(graph)

    @property
    def graphs(self) -> Mapping[str, tuple[str, ...]]:
        """Output names by graph."""
        return {graph: tuple(specs) for graph, specs in self._output_specs.items()}

    @property
    def running_for_ns(self) -> int:
        """How long the run under way has taken; 0 where there is none."""
        run = self._running
        return 0 if run is None else time.monotonic_ns() - run.started_ns

    def run(self, graph: str, outputs: Sequence[str], rows: Rows) -> Rows:
        """Answers `rows` (input name -> array[B, ...]) with `outputs`; others are not fetched.

        Raises:
            PolicyError: INFERENCE_FAILED, where the runtime raised or was stopped; BAD_MODEL_OUTPUT, where an answer
                does not have the manifest's dtype and shape.
        """
        # Options of its own for every run: a flag that stops one run would stop all that share it.
        run = _Run(ort.RunOptions(), time.monotonic_ns())
        run.options.log_severity_level = _SILENT
        self._running = run
        try:
            arrays = self._sessions[graph].run(outputs, rows, run.options)
        except Exception as error:  # ORT raises what it likes, UnicodeDecodeError included
            incident = log_incident("inference failed", error)
            raise PolicyError(Reason.INFERENCE_FAILED, f"the policy could not be run, id {incident}") from None
        finally:
            self._running = None
        count = len(next(iter(rows.values())))
        specs = self._output_specs[graph]
        for name, array in zip(outputs, arrays, strict=True):
            dtype, shape = specs[name]
            if array.dtype != dtype or (shape is not None and array.shape != (count, *shape)):
                raise PolicyError(
                    Reason.BAD_MODEL_OUTPUT,
                    f"{name}: expected {dtype}{[count, *(shape or ())]}, got {array.dtype}{list(array.shape)}",
                )
        return dict(zip(outputs, arrays, strict=True))

    def stop_run(self) -> None:
        """Ends the run under way with INFERENCE_FAILED; the next one runs. Threads: any."""
        run = self._running
        if run is not None:
            run.options.terminate = True

    def self_check(self) -> None:
        """Replays the golden rows through every variant, all at once and one by one.

        One by one because a batch of one takes other kernels than a batch of many. An explain graph must answer what
        its variant answers.

        Raises:
            BundleError: SELF_TEST_FAILED, naming variant, row, output and difference.
        """
        for graph in self._sessions:
            variant = graph.removesuffix(EXPLAIN_SUFFIX)
            for batch_rows in (self._manifest.golden.rows, 1):
                run = functools.partial(self._run_in_batches, graph, batch_rows)
                try:
                    check_golden(self._manifest, variant, run, self._golden)
                except PolicyError as error:
                    raise BundleError("SELF_TEST_FAILED", f"{graph}: {error}") from error

    def measured_costs(self, max_rows: int) -> dict[str, dict[int, int]]:
        """Nanoseconds of a run by graph and number of rows, for powers of two up to `max_rows`.

        The best of several runs, so that a neighbour's burst of work is not taken for the graph's own cost. Sizes that
        would take too long to measure are left out.
        """
        costs: dict[str, dict[int, int]] = {}
        for graph, outputs in self.graphs.items():
            costs[graph] = {}
            rows = 1
            while rows <= max_rows:
                costs[graph][rows] = self._best_run_ns(graph, outputs, rows)
                if costs[graph][rows] > _LONGEST_MEASURED_NS:
                    break
                rows *= 2
        return costs

    def warm_up(self, costs: Mapping[str, Mapping[int, int]]) -> None:
        """Runs every graph once at every measured size, so that no caller pays for a first time.

        A size that takes long anyway is left out: others are being answered meanwhile.
        """
        for graph, sizes in costs.items():
            for rows, run_ns in sizes.items():
                if run_ns < _LONGEST_WARM_UP_NS:
                    self.run(graph, self.graphs[graph], self._sample(graph, rows))

    def _best_run_ns(self, graph: str, outputs: Sequence[str], count: int) -> int:
        sample = self._sample(graph, count)
        took_ns: list[int] = []
        while len(took_ns) < _MOST_MEASUREMENTS and sum(took_ns) < _LONGEST_MEASUREMENT_NS:
            start_ns = time.perf_counter_ns()
            self.run(graph, outputs, sample)
            took_ns.append(time.perf_counter_ns() - start_ns)
        return min(took_ns)

    def _sample(self, graph: str, count: int) -> Rows:
        rows = {
            space.name: np.resize(self._golden[space.name], (count, *space.shape)) for space in self._manifest.inputs
        }
        return rows | self._neutral_inputs(graph, count)

    def _neutral_inputs(self, graph: str, count: int) -> dict[str, Any]:
        """Those inputs beyond the contract that change nothing: no forced mode, no noise."""
        neutral = {}
        for name in self._specs[graph].inputs:
            _, value, is_wide = _EXTRA_INPUTS[name]
            neutral[name] = np.full((count, *(self._manifest.action.shape if is_wide else ())), value)
        return neutral

    def _run_in_batches(self, graph: str, batch_rows: int, inputs: Rows) -> Rows:
        variant = graph.removesuffix(EXPLAIN_SUFFIX)
        outputs = [name for name in self._output_specs[graph] if f"{variant}.{name}" in self._golden]
        parts = []
        for first in range(0, self._manifest.golden.rows, batch_rows):
            rows = {name: array[first : first + batch_rows] for name, array in inputs.items()}
            count = len(next(iter(rows.values())))
            parts.append(self.run(graph, outputs, rows | self._neutral_inputs(graph, count)))
        return {name: np.concatenate([part[name] for part in parts]) for name in outputs}

    def _checked_outputs(self, graph: str) -> dict[str, tuple[np.dtype[Any], tuple[int, ...] | None]]:
        session, spec = self._sessions[graph], self._specs[graph]
        inputs = {node.name: node.type for node in session.get_inputs()}
        expected_inputs = {space.name: "tensor(float)" for space in self._manifest.inputs}
        expected_inputs |= {name: _EXTRA_INPUTS[name][0] for name in spec.inputs if name in _EXTRA_INPUTS}
        if inputs != expected_inputs:
            raise StartError("BAD_GRAPH", f"{graph}: expected the inputs {expected_inputs}, got {inputs}")
        outputs = {node.name: node.type for node in session.get_outputs()}
        known_shapes = {"action": self._manifest.action.shape} | dict.fromkeys(_ONE_NUMBER_A_ROW, ())
        expected_dtypes = dict.fromkeys(("action", *_ONE_NUMBER_A_ROW), "tensor(float)") | {"mode": "tensor(int32)"}
        specs: dict[str, tuple[np.dtype[Any], tuple[int, ...] | None]] = {}
        for name in spec.outputs:
            if name not in outputs or outputs[name] not in _ORT_DTYPES:
                raise StartError("BAD_GRAPH", f"{graph}: expected a float32 or int32 output {name!r}")
            if outputs[name] != expected_dtypes.get(name, outputs[name]):
                raise StartError("BAD_GRAPH", f"{graph}: {name}: expected {expected_dtypes[name]}, got {outputs[name]}")
            specs[name] = (_ORT_DTYPES[outputs[name]], known_shapes.get(name))
        return specs


def available_providers() -> list[str]:
    """What this machine's onnxruntime could run on."""
    return list(ort.get_available_providers())


def _graphs(bundle: Bundle) -> Iterator[tuple[str, GraphSpec, bytes]]:
    for variant, spec in bundle.manifest.variants.items():
        yield variant, spec, bundle.graphs[variant]
        if spec.explain is not None:
            yield variant + EXPLAIN_SUFFIX, spec.explain, bundle.explain_graphs[variant]


def _session_options(intra_op_threads: int, allow_spinning: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _SILENT
    # Bytes that are ONNX and ORT's own format at once were checked as the first; they must not run as the second.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if allow_spinning else "0")
    return options


def _effective_provider(bundle: Bundle, provider: Provider, options: ort.SessionOptions, allow_fallback: bool) -> str:
    """The provider that will answer: the one demanded, or the best that works."""
    if provider == "cpu" or (provider == "cuda" and not allow_fallback):
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


def _create_session(name: str, graph: bytes, options: ort.SessionOptions, provider: str) -> ort.InferenceSession:
    if provider not in ort.get_available_providers():
        raise StartError("PROVIDER_UNAVAILABLE", f"expected {provider}, got {ort.get_available_providers()}")
    try:
        if provider == _PROVIDERS["cuda"]:
            ort.preload_dlls()  # CUDA and cuDNN as pip installs them lie where the system's loader does not look
        session = ort.InferenceSession(graph, options, providers=[provider])
    except Exception as error:
        log_incident(f"{name}: the graph does not load", error)
        raise StartError("BAD_GRAPH", f"{name}: expected a graph that loads on {provider}") from error
    # ORT falls back to another provider without raising; what it reports first is what runs.
    if session.get_providers()[0] != provider:
        raise StartError("PROVIDER_UNAVAILABLE", f"expected {provider}, got {session.get_providers()[0]}")
    return session
