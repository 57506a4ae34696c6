"""The demo as `make demo` runs it, with fewer episodes."""

import json
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]


def test_the_demo_leaves_what_it_promises_and_lom_wins(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    program = [sys.executable, "clients/examples/fork_demo.py", "--out", str(out), "--episodes", "20"]
    demo = subprocess.run(program, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=115)
    assert demo.returncode == 0, demo.stderr
    numbers = json.loads((out / "report.json").read_text())
    assert numbers["actor"]["success_rate"] >= 0.95
    assert numbers["greedy_mode"]["success_rate"] >= 0.95
    assert numbers["bc"]["success_rate"] <= 0.3
    assert numbers["actor"]["return_mean"] >= 3.2
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "bundle" / "manifest.json").is_file()
    assert "lom-serve" in demo.stdout
