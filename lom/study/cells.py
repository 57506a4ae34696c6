"""Cells of a study: each is measured once, kept as a JSON file, and found there by the next run."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lom.config import AS_PUBLISHED, PRESETS

STUDIED = replace(PRESETS["small"], **AS_PUBLISHED)
"""What every study starts from. Exact answers know no limit, neither of the choice nor of the tilt."""

Result = Any
"""What was measured, as JSON keeps it: numbers, lists of them, and dicts of both."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement.

    Attributes:
        name: of its file, unique in its folder.
        measure: a function of a module (other processes import it); returns a dict or a dataclass of plain numbers,
            arrays, lists and dicts of them.
        arguments: plain values that JSON knows; `measure` gets them by name.
    """

    name: str
    measure: Callable[..., Any]
    arguments: Mapping[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What a kept result must agree with."""
        measured_by = f"{self.measure.__module__}.{self.measure.__qualname__}"
        identity: dict[str, Any] = _plain({"measured_by": measured_by, "arguments": self.arguments})
        return identity

    def kept(self, folder: Path) -> Result | None:
        """The result that an earlier run left in `folder`; None where there is none, or another question's.

        Every field of the preset must be what it was; fields that are newer than the result do not count, as in runs.
        """
        try:
            document = json.loads((folder / f"{self.name}.json").read_text())
            preset = document["preset"].items() <= _preset().items()
            return document["result"] if document["cell"] == self.identity and preset else None
        except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
            return None

    def keep(self, folder: Path, result: Result, cpu_s: float) -> None:
        """Writes the whole file or nothing; `cpu_s` is the processor time that the measurement took."""
        path = folder / f"{self.name}.json"
        partial = path.with_suffix(".partial")
        document = {"cell": self.identity, "preset": _preset(), "cpu_s": round(cpu_s, 2), "result": result}
        partial.write_text(json.dumps(document))
        partial.replace(path)


def _preset() -> dict[str, Any]:
    """What every study starts from."""
    preset: dict[str, Any] = _plain(STUDIED)
    return preset


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return value.tolist()
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _die_silently() -> None:
    # Ctrl-C reaches the whole group: the parent says that it was stopped, nobody else has to.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _measure(cell: Cell) -> tuple[Result, float]:
    torch.set_num_threads(1)  # a second one costs more than it brings on nets of 64 units
    started = time.process_time()
    result = _plain(cell.measure(**cell.arguments))
    return result, time.process_time() - started


def measured(
    cells: Sequence[Cell], folder: Path, *, processes: int = 1, again: bool = False
) -> Iterator[tuple[Cell, Result]]:
    """Every cell with its result, in the order in which they are there; what `folder` keeps already comes first.

    Args:
        processes: how many cells are measured side by side.
        again: measures what is kept, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for cell in cells:
        result = None if again else cell.kept(folder)
        if result is None:
            missing.append(cell)
        else:
            yield cell, result
    if processes == 1 or len(missing) <= 1:
        for cell in missing:
            result, cpu_s = _measure(cell)
            cell.keep(folder, result, cpu_s)
            yield cell, result
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(missing)), context, initializer=_die_silently) as pool:
        try:
            running = {pool.submit(_measure, cell): cell for cell in missing}
            for future in as_completed(running):
                result, cpu_s = future.result()
                running[future].keep(folder, result, cpu_s)
                yield running[future], result
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()  # the pool would wait for cells that nobody wants any more
            raise


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
