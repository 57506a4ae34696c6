"""Records what a worker answers, outside the path of the answers, and has datasets made of it (`docs/recording.md`).

A worker hands every answer to a bounded queue, whose thread appends it to a spool in the folder. The supervisor has
spools made into Minari datasets by a process of their own: at the start those that an earlier server left, at the stop
those of this one. No process that answers imports h5py.
"""

import asyncio
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lom_api.reasons import Reason
from lom_api.recording import Golden, Layout, MissingH5pyError, Recorder, Step, require_h5py
from lom_api.recording.dataset import finishing_command, remove_drafts
from lom_api.recording.spool import NO_MODE, SpoolWriter
from lom_bundle import Manifest
from lom_server.child_process import run_to_end
from lom_server.errors import StartError
from lom_server.service import ActReply, ActRequest, Observer, PolicyVersions

# The bits of `lom_client.Flag`.
CLAMPED = 1
OUT_OF_DISTRIBUTION = 16

_LONGEST_GAP_NS = 1_000_000_000
_BYTES_OF_A_ROW = 256
_MOST_SOURCES = 65_536
_MOST_MANIFESTS = 256

_logger = logging.getLogger(__name__)

_Item = tuple[ActRequest, ActReply, int]


class TrafficRecorder:
    """Records the answers of one worker.

    **Threads**: belongs to one event loop; `recorded` and `dropped` may be read from any.
    """

    def __init__(self, folder: Path, *, max_mb: int, workers: int) -> None:
        """Raises StartError where the folder cannot be written."""
        try:
            self._recorder: Recorder[_Item] = Recorder(folder, self._steps, max_bytes=max_mb * 2**20, writers=workers)
        except OSError as error:
            raise _unwritable(folder, error) from None
        self._manifests: dict[str, Manifest] = {}
        self._layouts: dict[tuple[str, str], Layout] = {}
        self._streams: dict[tuple[str, str, int], int] = {}
        self._next_stream = 1
        self._requests = 0

    @property
    def recorded(self) -> int:
        """Answers that were taken."""
        return self._recorder.recorded

    @property
    def dropped(self) -> int:
        """Answers that are not in the recording."""
        return self._recorder.dropped

    def publish(self, policy: PolicyVersions) -> None:
        """Learns what the answers of `policy` look like; to be told before it answers."""
        for served in policy.versions.values():
            self._manifests.pop(served.bundle_digest, None)
            self._manifests[served.bundle_digest] = served.manifest
        while len(self._manifests) > _MOST_MANIFESTS:
            del self._manifests[next(iter(self._manifests))]

    def observing(self, observer: Observer) -> "Observer":
        """An observer that also records what `observer` is told."""
        return _RecordingObserver(observer, self)

    def put(self, request: ActRequest, reply: ActReply) -> None:
        """Has an answer recorded, or dropped; never blocks, never raises."""
        size = reply.action.nbytes + len(reply.action) * _BYTES_OF_A_ROW
        for _, array in request.inputs:
            size += array.nbytes
        self._recorder.put((request, reply, time.monotonic_ns()), size)

    def close(self) -> None:
        """Writes what waits. Blocks."""
        self._recorder.close()

    def _steps(self, item: _Item, epoch: int) -> Iterator[tuple[Layout, Step]]:
        """What an answer comes to, in the writing thread."""
        request, reply, monotonic_ns = item
        layout = self._layout(reply)
        inputs = dict(request.inputs)
        count = len(reply.action)
        columns = [np.asarray(inputs[name], "<f4").reshape(count, -1) for name, _ in layout.inputs]
        observations = columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)
        actions = np.asarray(reply.action, "<f4").reshape(count, -1)
        warns = np.zeros(count, np.bool_)
        for score in reply.scores.values():
            warns |= score.warns
        self._requests += 1
        stream = self._stream(request.source or request.client, reply.policy, count)
        for row in range(count):
            action = actions[row].tobytes()
            yield (
                layout,
                Step(
                    observation=observations[row].tobytes(),
                    action=action,
                    policy_action=action,
                    stream=stream,
                    row=row,
                    epoch=epoch,
                    version=reply.version,
                    flags=CLAMPED * reply.is_clamped | (OUT_OF_DISTRIBUTION if warns[row] else 0),
                    bundle_digest=reply.bundle_digest,
                    variant=reply.variant,
                    mode=NO_MODE if reply.mode is None else int(reply.mode[row]),
                    margin=math.nan if reply.margin is None else float(reply.margin[row]),
                    forced_mode=NO_MODE if request.mode is None else request.mode,
                    previous_mode=NO_MODE if request.previous_mode is None else int(request.previous_mode[row]),
                    hysteresis_width=request.hysteresis_width,
                    is_sampled=request.sampling_seed is not None,
                    sampling_seed=request.sampling_seed or 0,
                    sequence=self._requests,
                    answers=self._requests,
                    monotonic_ns=monotonic_ns,
                ),
            )

    def _layout(self, reply: ActReply) -> Layout:
        key = reply.policy, reply.bundle_digest
        layout = self._layouts.get(key)
        if layout is None:
            manifest = self._manifests[reply.bundle_digest]
            layout = self._layouts[key] = Layout(
                recorded_by="server",
                policy=reply.policy,
                inputs=tuple((space.name, tuple(space.shape)) for space in manifest.inputs),
                low=tuple(manifest.action.low),
                high=tuple(manifest.action.high),
                longest_gap_ns=_LONGEST_GAP_NS,
                is_numbered=False,
                golden=Golden(action_tolerance=manifest.golden.action_tolerance, tie_width=manifest.golden.tie_width),
            )
        return layout

    def _stream(self, source: str, policy: str, rows: int) -> int:
        key = source, policy, rows
        stream = self._streams.get(key)
        if stream is None:
            if len(self._streams) >= _MOST_SOURCES:  # connections come and go for as long as the server runs
                self._streams.clear()
            stream = self._streams[key] = self._next_stream
            self._next_stream += 1
        return stream


class _RecordingObserver:
    """Tells another observer first."""

    def __init__(self, observer: Observer, recorder: TrafficRecorder) -> None:
        self._observer = observer
        self._recorder = recorder

    def answered(self, request: ActRequest, reply: ActReply, total_ns: int) -> None:
        """As `Observer`."""
        self._observer.answered(request, reply, total_ns)
        self._recorder.put(request, reply)

    def refused(self, policy: str, reason: Reason) -> None:
        """As `Observer`."""
        self._observer.refused(policy, reason)


def require_recording(folder: Path) -> None:
    """Returns where recordings can be written into `folder` and made into datasets.

    Raises:
        StartError: RECORD_UNWRITABLE, RECORD_NEEDS_H5PY.
    """
    try:
        require_h5py()
        writer = SpoolWriter(folder)
        writer.close()
        writer.path.unlink()
    except MissingH5pyError as error:
        raise StartError("RECORD_NEEDS_H5PY", str(error)) from None
    except OSError as error:
        raise _unwritable(folder, error) from None


async def make_datasets(folder: Path, limit_s: float) -> None:
    """Has datasets made of the spools in `folder` that nobody writes any more, and logs them.

    What is not finished within `limit_s` is left for the next start; so is what the disk has no room for.
    """
    try:
        status, output, complaint = await run_to_end(
            finishing_command(folder), limit_s=limit_s, stderr=asyncio.subprocess.PIPE
        )
    except TimeoutError:
        _logger.warning("the recording is not finished after %g s: the next start goes on with it", limit_s)
        return
    except OSError:
        _logger.error("the recording is not finished: no process to do it in could be started")
        return
    for line in output.decode(errors="replace").splitlines():
        _logger.info("recorded: %s", line)
    if status:
        remove_drafts(folder)
        lines = complaint.decode(errors="replace").splitlines()
        is_said = status > 0 and lines
        _logger.error("%s", lines[-1] if is_said else "the recording could not be finished: is the disk full?")


def _unwritable(folder: Path, error: OSError) -> StartError:
    return StartError(
        "RECORD_UNWRITABLE", f"record: expected a folder that can be written, got {str(folder)!a}: {error.strerror}"
    )
