"""What a user installs: six import packages, and roads that only go one way."""

import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
PACKAGES = {"lom", "lom_bundle", "lom_export", "lom_api", "lom_server", "lom_client"}
FIXED_TOP_LEVEL = {"lom", "export", "server", "protos", "clients", "tests"}


def modules_after(statement: str) -> set[str]:
    """Top-level names in `sys.modules` of a fresh interpreter after `statement`."""
    program = f"{statement}\nimport sys\nprint(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return set(output.split())


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import lom_client", {"torch", "onnxruntime", "onnx", "gymnasium", "lom", "lom_server", "lom_bundle"}),
        ("import lom_server.main", {"torch", "onnx", "lom", "lom_export", "lom_client", "gymnasium"}),
        ("import lom_bundle", {"torch", "onnx", "onnxruntime", "grpc", "google", "lom"}),
        ("import lom", {"torch", "gymnasium"}),
        ("import lom.envs", {"torch"}),
    ],
)
def test_a_room_loads_only_what_it_may(statement: str, forbidden: set[str]) -> None:
    assert modules_after(statement) & forbidden == set()


@pytest.mark.parametrize(
    ("package", "missing", "said"),
    [
        ("lom", "torch", "lom-train: torch is missing: pip install 'lom[train]'"),
        ("lom_export", "onnx", "lom-export: onnx is missing: pip install 'lom[export]'"),
        ("lom_server", "onnxruntime", "lom-serve: onnxruntime is missing: pip install 'lom[server]'"),
        ("lom_client", "tyro", "lom-act: tyro is missing: pip install 'lom[client,envs]'"),
    ],
)
def test_a_missing_extra_is_one_line(package: str, missing: str, said: str) -> None:
    module = "lom_client.main" if package == "lom_client" else f"{package}.__main__"
    program = f"import sys; sys.modules[{missing!r}] = None; import {module} as p; sys.exit(p.main())"
    # A folder for those who complain of nothing before they have one.
    done = subprocess.run([sys.executable, "-c", program, "."], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.strip() == said


def test_the_wheel_holds_the_six_packages_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=PROJECT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.split("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == PACKAGES
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    assert "lom_api/v1/policy_pb2.py" in names
    assert "lom_api/v1/policy.proto" in names


def test_the_top_level_is_the_one_that_users_know() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    folders = {line.split("/")[0] for line in tracked.splitlines() if "/" in line}
    assert folders == FIXED_TOP_LEVEL | {".ci", "docs", "requirements"}


def test_no_file_names_a_registry_and_pins_are_bare() -> None:
    for path in sorted((PROJECT / "requirements").glob("*.txt")):
        text = path.read_text()
        assert "://" not in text, path.name
        assert "+cpu" not in text, path.name
    assert "torch==2.13.0" in (PROJECT / "requirements" / "dev.txt").read_text().splitlines()
    assert not (PROJECT / "uv.lock").exists()


@pytest.mark.parametrize("name", ["policy", "admin"])
def test_the_stubs_belong_to_the_contract(name: str) -> None:
    """The checked-in descriptor says what the .proto file says, to the comment-free letter."""
    text = (PROJECT / "protos" / "lom_api" / "v1" / f"{name}.proto").read_text()
    file = importlib.import_module(f"lom_api.v1.{name}_pb2").DESCRIPTOR
    for name, message in file.message_types_by_name.items():
        body = text.split(f"message {name} {{", 1)[1].split("}", 1)[0]
        declared = [line.split("//")[0].strip() for line in body.splitlines()]
        fields = {
            line.split("=")[0].split()[-1]: int(line.split("=")[1].strip(" ;")) for line in declared if "=" in line
        }
        assert fields == {field.name: field.number for field in message.fields}, name
    (service,) = file.services_by_name.values()
    for method in service.methods:
        asked = "stream " * method.client_streaming + method.input_type.name
        answered = "stream " * method.server_streaming + method.output_type.name
        assert f"rpc {method.name}({asked}) returns ({answered})" in text
