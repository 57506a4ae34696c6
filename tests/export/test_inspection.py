"""`lom-export inspect` and `verify`, as a user meets them."""

import re
from pathlib import Path

import numpy as np
import pytest

from lom_bundle import Manifest, read_bundle, write_bundle
from lom_export import main
from lom_export.exporter import ExportConfig, export_run
from tests.support.runs import save_untrained_run


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    save_untrained_run(folder / "run")
    export_run(ExportConfig(run=folder / "run", out=folder / "bundle", name="toy"))
    return folder / "bundle"


def test_inspect_says_what_a_bundle_is(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main.main(["inspect", str(bundle)])
    printed = capsys.readouterr().out
    for fact in ("toy", "float32[2] in [-inf, inf]", "greedy_mode (default)", "action_score", "warns at"):
        assert fact in printed


def test_verify_replays_the_golden_rows(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main.main(["verify", str(bundle)])
    printed = capsys.readouterr().out
    assert "files, digests, contract hash and structure hold" in printed
    assert "greedy_mode: 64 golden rows on CPUExecutionProvider" in printed
    assert "actor: 64 golden rows" in printed


def test_verify_refuses_answers_that_are_not_torchs(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every digest of this bundle holds: only the golden rows can tell."""
    intact = read_bundle(bundle)
    golden = {**intact.golden, "actor.action": intact.golden["actor.action"] + np.float32(1e-3)}
    manifest = Manifest.from_json((bundle / "manifest.json").read_text())
    write_bundle(
        tmp_path / "lying",
        manifest,
        graphs=intact.graphs,
        explain_graphs=intact.explain_graphs,
        golden=golden,
        card="",
    )
    with pytest.raises(SystemExit) as caught:
        main.main(["verify", str(tmp_path / "lying")])
    assert caught.value.code == 1
    assert re.search(r"SELF_TEST_FAILED: actor: row \d+: action", capsys.readouterr().err)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_no_bundle_is_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main([command, str(tmp_path / "gone")])
    assert caught.value.code == 1
    printed = capsys.readouterr().err
    assert "lom-export: BUNDLE_NOT_FOUND" in printed
    assert "Traceback" not in printed
