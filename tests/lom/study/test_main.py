"""`lom-study` as a user meets it."""

import subprocess
import sys
from pathlib import Path

import pytest

from lom.study import main as study


def test_an_experiment_leaves_its_picture_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study.main(["selection", "--seeds", "1", "--out", str(tmp_path)])
    picture = (tmp_path / "study-selection.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [tmp_path / "study-selection.png"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "-4.292 exactly" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds: expected 1 or more, got 0"),
        (["--out", "nowhere"], "--out nowhere: expected a folder, found none"),
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
    assert message in (printed.out + printed.err).replace("\n", " ")
    assert "Traceback" not in printed.err


def test_without_matplotlib_one_line_says_what_to_install() -> None:
    program = "import sys; sys.modules['matplotlib'] = None; import lom.study.__main__ as p; sys.exit(p.main())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.strip() == "lom-study: matplotlib is missing: pip install 'lom[study]'"
