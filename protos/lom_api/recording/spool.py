"""The spool of a recording: an append-only file that is whole up to wherever its writer was killed.

    file   = MAGIC frame*
    frame  = kind (1 byte), length of payload (u32), crc32 of kind and payload (u32), payload
    kinds  = "H" JSON facts of the process | "T" JSON texts by number | "L" JSON layout | "R" layout number (u16), rows

Rows are packed, little-endian, of one width in one layout. Whoever writes holds a lock on the file (flock), which ends
with the process; whoever reads stops at the first frame that is not whole.
"""

import fcntl
import itertools
import json
import os
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

SUFFIX = ".spool"
PREFIX = ".flight-"
STEP, OUTCOME = 0, 1
NO_MODE = -1

Array: TypeAlias = NDArray[Any]

_MAGIC = b"LOMFLT01"
_FRAME = struct.Struct("<cII")
_LAYOUT_NUMBER = struct.Struct("<H")
_MOST_TEXTS = 65_535
_OTHER_TEXT = "OTHER"
_LONGEST_TEXT = 64
_FULL_FRAME_BYTES = 1 << 20
_LARGEST_FRAME_BYTES = 1 << 30
_NUMBERS = itertools.count(1)

# name, struct's letter, numpy's type; texts are numbers of the file's table.
_FIELDS = (
    ("kind", "B", "u1"),
    ("begins", "B", "?"),
    ("is_answered", "B", "?"),
    ("has_outcome", "B", "?"),
    ("terminated", "B", "?"),
    ("truncated", "B", "?"),
    ("has_final", "B", "?"),
    ("is_sampled", "B", "?"),
    ("stream", "I", "<u4"),
    ("row", "I", "<u4"),
    ("epoch", "I", "<u4"),
    ("version", "I", "<u4"),
    ("flags", "I", "<u4"),
    ("bundle_digest", "I", "<u4"),
    ("variant", "I", "<u4"),
    ("level", "I", "<u4"),
    ("source", "I", "<u4"),
    ("reason", "I", "<u4"),
    ("mode", "i", "<i4"),
    ("forced_mode", "i", "<i4"),
    ("previous_mode", "i", "<i4"),
    ("margin", "f", "<f4"),
    ("hysteresis_width", "f", "<f4"),
    ("sequence", "Q", "<u8"),
    ("answers", "Q", "<u8"),
    ("sampling_seed", "Q", "<u8"),
    ("monotonic_ns", "q", "<i8"),
    ("age_s", "d", "<f8"),
    ("reward", "d", "<f8"),
)
TEXT_FIELDS = ("bundle_digest", "variant", "level", "source", "reason")
_ROW = struct.Struct("<" + "".join(letter for _, letter, _ in _FIELDS))


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Within what a bundle's answers reproduce; see `lom_bundle.check_golden`."""

    action_tolerance: float
    tie_width: float


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the rows of one dataset have in common.

    Attributes:
        recorded_by: `control loop`, `episodes` or `server`.
        policy: name of the policy; empty where it is not known.
        inputs: (name, shape of one row) of every input; a single input that is not named is called ``.
        low, high: bounds of the action, one for each element.
        longest_gap_ns: two steps that are further apart do not belong to one episode.
        is_numbered: the steps of a stream have numbers that follow one another.
        golden: of the bundle, where it is known.
    """

    recorded_by: str
    policy: str
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    longest_gap_ns: int
    is_numbered: bool = True
    golden: Golden | None = None

    @property
    def action_width(self) -> int:
        """Elements of an action."""
        return len(self.low)

    @cached_property
    def observation_width(self) -> int:
        """Numbers of one observation, all inputs together."""
        return sum(int(np.prod(shape)) for _, shape in self.inputs)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Of one row of a spool."""
        vectors = (
            ("observation", "<f4", (self.observation_width,)),
            ("action", "<f4", (self.action_width,)),
            ("policy_action", "<f4", (self.action_width,)),
        )
        return np.dtype([*((name, kind) for name, _, kind in _FIELDS), *vectors])

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote."""
        said = json.loads(text)
        said["inputs"] = tuple((name, tuple(shape)) for name, shape in said["inputs"])
        said["golden"] = None if said["golden"] is None else Golden(**said["golden"])
        return cls(**said | {"low": tuple(said["low"]), "high": tuple(said["high"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One row: a step, or (`kind` OUTCOME) what became of the step before it in its stream.

    Attributes:
        observation: float32 bytes of all inputs, one after the other; of an OUTCOME with `has_final` the observation
            that ended the episode.
        action: float32[A], what was put out.
        policy_action: float32[A], what the policy answered, before limits and blends; None without an answer.
        stream: who asked; steps of different streams never share an episode.
        row: place in a request of several rows.
        epoch: changes where something is missing between two steps.
        sequence: number of the step; `answers` is that of the observation that `policy_action` answers.
        begins: it does not follow the step before it.
        previous_mode, hysteresis_width, forced_mode, sampling_seed: what was asked for beside the observation.
    """

    observation: bytes
    action: bytes
    policy_action: bytes | None = None
    kind: int = STEP
    begins: bool = False
    has_outcome: bool = False
    terminated: bool = False
    truncated: bool = False
    has_final: bool = False
    is_sampled: bool = False
    stream: int = 0
    row: int = 0
    epoch: int = 0
    version: int = 0
    flags: int = 0
    bundle_digest: str = ""
    variant: str = ""
    level: str = ""
    source: str = ""
    reason: str = ""
    mode: int = NO_MODE
    forced_mode: int = NO_MODE
    previous_mode: int = NO_MODE
    margin: float = float("nan")
    hysteresis_width: float = 0.0
    sequence: int = 0
    answers: int = 0
    sampling_seed: int = 0
    monotonic_ns: int = 0
    age_s: float = float("nan")
    reward: float = float("nan")


@dataclass(eq=False)
class _Rows:
    parts: list[bytes] = field(default_factory=list)
    bytes_waiting: int = 0


class SpoolWriter:
    """Appends steps to a new spool in a folder, which is made where it is missing; file mode 0600, folder mode 0700.

    **Threads**: one.
    """

    def __init__(self, folder: Path) -> None:
        """Raises OSError where the folder cannot be written."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        began_ns = time.time_ns()
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(began_ns * 1e-9))
        self.path = folder / f"{PREFIX}{stamp}-{os.getpid()}-{next(_NUMBERS)}{SUFFIX}"
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._texts: dict[str, int] = {"": 0}
        self._new_texts: dict[int, str] = {}
        self._layouts: dict[Layout, int] = {}
        self._new_frames: list[bytes] = []
        self._rows: _Rows = _Rows()
        self._rows_layout = -1
        self.bytes_written = 0
        facts = {"wall_ns": began_ns, "monotonic_ns": time.monotonic_ns()}
        self._write(_MAGIC + _frame(b"H", json.dumps(facts).encode()))

    @property
    def bytes_waiting(self) -> int:
        """What the next flush will write, about."""
        return self._rows.bytes_waiting

    def add(self, layout: Layout, step: Step) -> None:
        """Puts `step` behind the others. Raises ValueError where it does not fit its layout."""
        if len(step.observation) != 4 * layout.observation_width or len(step.action) != 4 * layout.action_width:
            raise ValueError("expected an observation and an action of the layout's widths")
        number = self._layouts.get(layout)
        if number is None:
            number = len(self._layouts)
            _LAYOUT_NUMBER.pack(number)  # before it counts as known
            self._layouts[layout] = number
            self._close_frame()
            self._new_frames.append(_frame(b"L", layout.to_json().encode()))
        if number != self._rows_layout or self._rows.bytes_waiting > _FULL_FRAME_BYTES:
            self._close_frame()
            self._rows_layout = number
        packed = self._packed(layout, step)
        self._rows.parts.append(packed)
        self._rows.bytes_waiting += len(packed)

    def flush(self) -> None:
        """Hands everything to the kernel, which keeps it when this process is killed. Raises OSError."""
        self._close_frame()
        if self._new_frames:
            content, self._new_frames = b"".join(self._new_frames), []
            self._write(content)

    def close(self) -> None:
        """Lets go of the file; what was not flushed is lost."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)  # a process that was forked off meanwhile would keep it
        os.close(self._fd)

    def _packed(self, layout: Layout, step: Step) -> bytes:
        text = self._text_number
        answered = step.policy_action is not None
        head = _ROW.pack(
            step.kind,
            step.begins,
            answered,
            step.has_outcome,
            step.terminated,
            step.truncated,
            step.has_final,
            step.is_sampled,
            step.stream & 0xFFFFFFFF,
            step.row,
            step.epoch & 0xFFFFFFFF,
            step.version,
            step.flags,
            text(step.bundle_digest),
            text(step.variant),
            text(step.level),
            text(step.source),
            text(step.reason),
            step.mode,
            step.forced_mode,
            step.previous_mode,
            step.margin,
            step.hysteresis_width,
            step.sequence,
            step.answers,
            step.sampling_seed,
            step.monotonic_ns,
            step.age_s,
            step.reward,
        )
        policy_action = _nan_bytes(layout.action_width) if step.policy_action is None else step.policy_action
        if len(policy_action) != len(step.action):
            raise ValueError("expected a policy's action of the layout's width")
        return b"".join((head, step.observation, step.action, policy_action))

    def _text_number(self, text: str) -> int:
        number = self._texts.get(text)
        if number is not None:
            return number
        if len(self._texts) >= _MOST_TEXTS:  # a server can make up more reasons than a disk has room for
            text = _OTHER_TEXT
        number = self._texts.setdefault(text, len(self._texts))
        self._new_texts[number] = text[:_LONGEST_TEXT]
        return number

    def _close_frame(self) -> None:
        if self._new_texts:
            self._new_frames.append(_frame(b"T", json.dumps(self._new_texts).encode()))
            self._new_texts = {}
        if self._rows.parts:
            number = _LAYOUT_NUMBER.pack(self._rows_layout)
            self._new_frames.append(_frame(b"R", b"".join((number, *self._rows.parts))))
            self._rows = _Rows()

    def _write(self, content: bytes) -> None:
        left = memoryview(content)
        while left:
            written = os.write(self._fd, left)
            self.bytes_written += written
            left = left[written:]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """When the process began to record: the same instant on both clocks, in nanoseconds."""

    wall_ns: int
    monotonic_ns: int


class EmptySpoolError(ValueError):
    """Its writer was killed, or found the disk full, before anything was in it."""


def read_spool(file: BinaryIO) -> tuple[Facts, Iterator[tuple[Layout, Array, Mapping[int, str]]]]:
    """What a spool holds, in order: rows of one layout, and the texts that their numbers stand for.

    Raises:
        ValueError: it is no spool. One that is cut off anywhere is read up to there.
        EmptySpoolError: it is cut off before its first row could be.
    """
    magic = file.read(len(_MAGIC))
    if not _MAGIC.startswith(magic):
        raise ValueError("expected the spool of a recording")
    frames = _frames(file)
    kind, payload = next(frames, (b"", b""))
    if kind != b"H":
        raise EmptySpoolError("expected the spool of a recording that began")
    return Facts(**json.loads(payload)), _rows(frames)


def _rows(frames: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[Layout, Array, Mapping[int, str]]]:
    texts: dict[int, str] = {0: ""}
    layouts: list[Layout] = []
    for kind, payload in frames:
        if kind == b"T":
            texts |= {int(number): text for number, text in json.loads(payload).items()}
        elif kind == b"L":
            layouts.append(Layout.from_json(payload.decode()))
        elif kind == b"R":
            layout = layouts[_LAYOUT_NUMBER.unpack_from(payload)[0]]
            yield layout, np.frombuffer(payload, layout.dtype, offset=_LAYOUT_NUMBER.size), texts


def _frame(kind: bytes, payload: bytes) -> bytes:
    return b"".join((_FRAME.pack(kind, len(payload), zlib.crc32(payload, kind[0])), payload))


def _frames(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    while True:
        head = file.read(_FRAME.size)
        if len(head) < _FRAME.size:
            return
        kind, length, checksum = _FRAME.unpack(head)
        if length > _LARGEST_FRAME_BYTES:
            return
        payload = file.read(length)
        if len(payload) < length or zlib.crc32(payload, kind[0]) != checksum:
            return
        yield kind, payload


def _nan_bytes(width: int) -> bytes:
    return np.full(width, np.nan, "<f4").tobytes()


def floats(values: Sequence[float] | Array) -> bytes:
    """float32 bytes of `values`."""
    with np.errstate(over="ignore"):  # what overflows is infinite, and left out when the dataset is made
        return np.asarray(values, dtype="<f4").tobytes()
