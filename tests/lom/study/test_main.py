"""`lom-study` as a user meets it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lom.study import main as study
from tests.support.pictures import is_drawn


def test_an_experiment_leaves_its_picture_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pictures").mkdir()
    places = ["--out", str(tmp_path / "pictures"), "--kept", str(tmp_path / "kept")]
    study.main(["selection", "--seeds", "1", *places])
    (picture,) = (tmp_path / "pictures").iterdir()
    assert picture.name == "study-selection.png"
    assert is_drawn(picture)
    assert "-4.292 exactly" in " ".join(capsys.readouterr().out.split())

    # What is kept is not measured again: the table tells what the file says.
    (kept,) = (tmp_path / "kept").iterdir()
    document = json.loads(kept.read_text())
    kept.write_text(json.dumps(document | {"result": document["result"] | {"agreement": 0.123}}))
    study.main(["selection", "--seeds", "1", *places])
    assert "0.123" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds: expected 1 or more, got 0"),
        (["--processes", "0"], "--processes: expected 1 or more, got 0"),
        (["--out", "nowhere"], "--out nowhere: expected a folder, found none"),
        (["--kept", "pyproject.toml"], "--kept pyproject.toml: expected a folder, found a file"),
        (["astrology"], "astrology"),
    ],
)
def test_a_mistake_is_named_and_nothing_runs(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        study.main(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert message in " ".join((printed.out + printed.err).split())
    assert "Traceback" not in printed.err


def test_a_stopped_study_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "measured", stop)
    with pytest.raises(SystemExit) as caught:
        study.main(["selection", "--out", str(tmp_path)])
    assert caught.value.code == 130
    assert "the same command goes on, build/study keeps" in " ".join(capsys.readouterr().err.split())


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        study.main(["selection", "--out", str(tmp_path), "--kept", str(tmp_path / "file" / "kept")])
    assert caught.value.code == 1
    printed = capsys.readouterr().err
    assert str(tmp_path / "file" / "kept") in "".join(printed.split("\n"))
    assert "Traceback" not in printed


def test_without_matplotlib_one_line_says_what_to_install() -> None:
    program = "import sys; sys.modules['matplotlib'] = None; import lom.study.__main__ as p; sys.exit(p.main())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.strip() == "lom-study: matplotlib is missing: pip install 'lom[study]'"
