"""Peak memory and time of `lom-train` on a generated file: how many rows fit into a machine.

python -m tests.bench.dataset_memory --rows 1000000 --observation-dim 39 --action-dim 28
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import tyro
from rich.console import Console

_EPISODE_ROWS = 1000
_FEW_STEPS = ("--preset", "standard", "--mixture-steps", "3", "--steps", "3")
# Run inside the process that is measured: the peak of one that has ended cannot be read any more.
_PROGRAM = """
import re, sys
from pathlib import Path
from lom.train import main
for path in sys.argv[1].split(":"):
    main([path, "--out", path + ".run", *sys.argv[2:]])
    print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Generates a file in D4RL's layout and trains on it for a few steps."""

    rows: int = 1_000_000
    """Rows of the file."""
    observation_dim: int = 39
    """O; 39 is the door task's."""
    action_dim: int = 28
    """A; 28 is the door task's."""
    dtype: str = "float32"
    """What the file holds; float64 is what many recorders write."""


def write_file(path: Path, arguments: Arguments) -> Path:
    """D4RL's raw layout, in episodes of 1,000 rows, written in pieces."""
    rng = np.random.default_rng(0)
    rows = arguments.rows
    ends = np.arange(rows) % _EPISODE_ROWS == _EPISODE_ROWS - 1
    with h5py.File(path, "w") as file:
        for key, width in (("observations", arguments.observation_dim), ("actions", arguments.action_dim)):
            values = file.create_dataset(key, (rows, width), arguments.dtype)
            for start in range(0, rows, 50_000):
                piece = rng.uniform(-1, 1, (min(50_000, rows - start), width))
                values[start : start + len(piece)] = piece
        file["rewards"] = rng.normal(size=rows).astype(arguments.dtype)
        file["terminals"] = np.zeros(rows, np.bool_)
        file["timeouts"] = ends
    return path


def peak_bytes(paths: Sequence[Path]) -> list[int]:
    """VmHWM of one process that trains on one file after the other, after each of them."""
    command = [sys.executable, "-c", _PROGRAM, ":".join(map(str, paths)), *_FEW_STEPS]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [int(kilobytes) * 1024 for kilobytes in finished.stdout.split()]


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m tests.bench.dataset_memory")
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        with console.status("generating"):
            path = write_file(Path(folder) / "generated.hdf5", arguments)
        [peak] = peak_bytes([path])
        console.print(
            f"{arguments.rows:,} rows, O {arguments.observation_dim}, A {arguments.action_dim}, {arguments.dtype}: "
            f"file {path.stat().st_size / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    main()
