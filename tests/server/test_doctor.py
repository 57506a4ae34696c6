"""`lom_server.doctor`: each fault is really there, and is found."""

import ctypes
import datetime
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from lom_server.config import ServerConfig
from lom_server.doctor import Finding, Level, examine, run_doctor
from tests.support.bundles import Flaws, write_test_bundle

LOOPBACK = "127.0.0.1:0"


def findings(models: Path, **choices: Any) -> dict[str, Finding]:
    """By subject. `models` that are none keep a test short: no bundle is proved."""
    choices = {"listen": LOOPBACK, "provider": "cpu"} | choices
    return {finding.subject: finding for finding in examine(ServerConfig(models=models, **choices))}


def install(folder: Path, package: str, version: str) -> None:
    """Makes `package` look installed to whoever looks into `folder` first."""
    file = folder / f"{package.replace('-', '_')}-{version}.dist-info" / "METADATA"
    file.parent.mkdir(parents=True)
    file.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def write_certificate(folder: Path, *, days: float, begun_days_ago: float = 30) -> dict[str, Path]:
    """A self-signed certificate that is valid for `days` from now, and its key, as the fields of a configuration."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=begun_days_ago))
        .not_valid_after(now + datetime.timedelta(days=days))
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(exist_ok=True)
    (folder / "server.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "server.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / "server.key").chmod(0o600)
    return {"tls_certificate": folder / "server.pem", "tls_key": folder / "server.key"}


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    return tmp_path / "nowhere"


def test_a_sound_machine_gets_a_line_for_each_check_and_status_0(
    toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_doctor(ServerConfig(models=toy_bundle, listen=LOOPBACK)) == 0
    lines = capsys.readouterr().out.splitlines()
    subjects = [line[9:].partition(":")[0] for line in lines]
    assert subjects == [
        "grpcio", "protobuf", "numpy", "onnxruntime wheel", "provider cuda", "provider cpu", "monotonic clock",
        "wall clock", "listen", "user", "file descriptors", "bundle toy/1",
    ]  # fmt: skip
    assert {line[:9] for line in lines} <= {"ok       ", "warning  "}
    assert "proved on CPUExecutionProvider, digest " in lines[-1]


def test_one_failure_is_status_1(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_doctor(ServerConfig(models=nowhere, listen=LOOPBACK)) == 1
    assert "FAIL     models: BUNDLE_NOT_FOUND: " in capsys.readouterr().out


def test_every_version_is_proved_and_the_bad_one_is_named(tmp_path: Path) -> None:
    models = tmp_path / "models"
    write_test_bundle(models / "toy" / "1")
    write_test_bundle(models / "toy" / "2", flaws=Flaws(wrong_golden=True))
    write_test_bundle(models / "other" / "7")
    graph = models / "other" / "7" / "actor.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    found = findings(models)
    assert found["bundle toy/1"].level is Level.OK
    assert found["bundle toy/2"].level is Level.FAIL
    assert found["bundle toy/2"].found.startswith("SELF_TEST_FAILED: ")
    assert found["bundle other/7"].level is Level.FAIL
    assert found["bundle other/7"].found.startswith("DIGEST_MISMATCH: ")


def test_a_folder_without_bundles_is_a_failure(tmp_path: Path) -> None:
    finding = findings(tmp_path)["models"]
    assert finding.level is Level.FAIL
    assert finding.found == f"{tmp_path} holds no bundle"


@pytest.mark.parametrize(("package", "version"), [("grpcio", "1.75.9"), ("protobuf", "6.31.0"), ("numpy", "1.26.4")])
def test_a_library_that_is_too_old(
    tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch, package: str, version: str
) -> None:
    install(tmp_path / "site", package, version)
    monkeypatch.syspath_prepend(tmp_path / "site")
    finding = findings(nowhere)[package]
    assert finding.level is Level.FAIL
    assert f"got {version}" in finding.found


@pytest.mark.parametrize(
    ("wheels", "provider", "level"),
    [
        (("onnxruntime", "onnxruntime-gpu"), "cpu", Level.FAIL),
        ((), "cpu", Level.FAIL),
        (("onnxruntime",), "cpu", Level.OK),
        (("onnxruntime",), "cuda", Level.FAIL),
        (("onnxruntime-gpu",), "cuda", Level.OK),
    ],
)
def test_one_wheel_of_the_runtime_and_the_right_one(
    tmp_path: Path,
    nowhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    wheels: tuple[str, ...],
    provider: str,
    level: Level,
) -> None:
    for wheel in wheels:
        install(tmp_path / "site", wheel, "1.31.1")
    elsewhere = [folder for folder in sys.path if "-packages" not in folder]
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *elsewhere])
    finding = findings(nowhere, provider=provider, load_memory_mb=0)["onnxruntime wheel"]
    assert finding.level is level
    assert finding.found == (" and ".join(f"{wheel} 1.31.1" for wheel in wheels) or "none")
    assert bool(finding.advice) == (level is Level.FAIL)


def test_a_runtime_that_does_not_load_is_found_from_outside(
    tmp_path: Path, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libfoo.so: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    found = findings(toy_bundle, provider="cpu")
    assert found["provider cpu"].level is Level.FAIL
    assert found["provider cpu"].found.endswith(": ImportError: libfoo.so: cannot open shared object file")
    assert found["models"].level is Level.FAIL
    assert "not checked" in found["models"].found


def test_a_runtime_that_crashes_takes_nobody_with_it(
    tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("import os; os.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    finding = findings(nowhere, provider="cpu")["provider cpu"]
    assert finding.level is Level.FAIL
    assert "exit status -6" in finding.found


def has_cuda() -> bool:
    return Path("/dev/nvidiactl").exists()


@pytest.mark.skipif(has_cuda(), reason="needs a machine on which CUDA does not work")
@pytest.mark.parametrize(("fallback", "level"), [(False, Level.FAIL), (True, Level.WARNING)])
def test_cuda_that_is_not_there(nowhere: Path, fallback: bool, level: Level) -> None:
    found = findings(nowhere, provider="cuda", load_memory_mb=0, allow_provider_fallback=fallback)
    assert found["provider cuda"].level is level
    assert "expected a session on CUDAExecutionProvider" in found["provider cuda"].found
    assert "provider cpu" not in found
    auto = findings(nowhere, provider="auto")
    has_cuda_wheel = any(wheel.name == "onnxruntime-gpu" for wheel in metadata.distributions())
    assert auto["provider cuda"].level is (Level.WARNING if has_cuda_wheel else Level.OK)
    assert auto["provider cpu"].level is Level.OK


def test_the_wall_clock_is_what_the_kernel_says(nowhere: Path) -> None:
    # Another name of the same call; all zeros only asks.
    is_synchronised = ctypes.CDLL(None).ntp_adjtime(ctypes.create_string_buffer(1024)) not in (-1, 5)
    found = findings(nowhere)
    assert found["wall clock"].level is (Level.OK if is_synchronised else Level.WARNING)
    assert found["monotonic clock"].level is Level.OK


@pytest.mark.parametrize("field", ["listen", "metrics_listen"])
def test_a_port_that_is_taken(nowhere: Path, field: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        finding = findings(nowhere, **{field: address})[field]
    assert finding.level is Level.FAIL
    assert finding.found.startswith(f"{address} is not to be had: Address already in use")


def test_a_host_that_is_not_this_machine(nowhere: Path) -> None:
    finding = findings(nowhere, metrics_listen="192.0.2.1:8002")["metrics_listen"]
    assert finding.level is Level.FAIL


def test_a_socket_file_and_who_is_behind_it(tmp_path: Path, nowhere: Path) -> None:
    def finding(path: Path) -> Finding:
        return findings(nowhere, admin_listen=f"unix:{path}")["admin_listen"]

    path = tmp_path / "admin.sock"
    assert finding(path).level is Level.OK
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        assert finding(path).level is Level.FAIL
        assert "another server answers there" in finding(path).found
    # What a killed server leaves behind stands in nobody's way.
    assert finding(path).level is Level.OK
    (tmp_path / "file").write_text("")
    assert "no socket" in finding(tmp_path / "file").found
    assert finding(tmp_path / "missing" / "admin.sock").level is Level.FAIL


@pytest.fixture
def low_descriptor_limit() -> Iterator[int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (800, hard))
    yield 800
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_need_four_descriptors_each(nowhere: Path, low_descriptor_limit: int) -> None:
    assert findings(nowhere, max_connections=low_descriptor_limit // 4)["file descriptors"].level is Level.OK
    finding = findings(nowhere, max_connections=low_descriptor_limit // 4 + 1)["file descriptors"]
    assert finding.level is Level.FAIL
    assert "ulimit -n 804" in finding.advice


@pytest.mark.skipif(os.getuid() != 0, reason="needs to be root to stop being root")
def test_root_is_warned(nowhere: Path) -> None:
    assert findings(nowhere)["user"].level is Level.WARNING
    try:
        for finding in examine(ServerConfig(models=nowhere, listen=LOOPBACK, provider="cpu")):
            if finding.subject == "listen":  # the last check before the user's
                os.seteuid(65534)
            if finding.subject == "user":
                assert finding.level is Level.OK
                assert finding.found == "uid 65534"
                break
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("content", "mode", "level"),
    [
        (f"act robot {'a' * 32}\n", 0o600, Level.OK),
        (f"act robot {'a' * 32}\n", 0o640, Level.FAIL),
        ("act robot short\n", 0o600, Level.FAIL),
        ("", 0o600, Level.FAIL),
    ],
)
def test_a_file_of_tokens(tmp_path: Path, nowhere: Path, content: str, mode: int, level: Level) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(content)
    tokens.chmod(mode)
    finding = findings(nowhere, tokens=tokens)["tokens"]
    assert finding.level is level
    assert "a" * 32 not in str(finding)


@pytest.mark.parametrize(
    ("days", "begun_days_ago", "level"),
    [(60, 30, Level.OK), (13, 30, Level.WARNING), (-1, 30, Level.FAIL), (60, -1, Level.FAIL)],
    ids=["valid", "nearly expired", "expired", "not valid yet"],
)
def test_a_certificate_and_its_age(
    tmp_path: Path, nowhere: Path, days: float, begun_days_ago: float, level: Level
) -> None:
    tls = write_certificate(tmp_path / "tls", days=days, begun_days_ago=begun_days_ago)
    found = findings(nowhere, **tls, tls_client_ca=tls["tls_certificate"])
    assert found["tls_certificate"].level is level
    assert found["tls_client_ca"].level is level
    assert found["tls_key"].level is Level.OK


def test_a_key_of_another_certificate(tmp_path: Path, nowhere: Path) -> None:
    tls = write_certificate(tmp_path / "tls", days=60)
    other = write_certificate(tmp_path / "other", days=60)
    finding = findings(nowhere, **(tls | {"tls_key": other["tls_key"]}))["tls_certificate"]
    assert finding.level is Level.FAIL
    assert finding.found.startswith("BAD_CERTIFICATE: ")


def test_a_key_that_others_may_read(tmp_path: Path, nowhere: Path) -> None:
    tls = write_certificate(tmp_path / "tls", days=60)
    tls["tls_key"].chmod(0o644)
    finding = findings(nowhere, **tls)["tls_key"]
    assert finding.level is Level.WARNING
    assert "mode 0644" in finding.found


def test_what_is_not_configured_is_not_examined(nowhere: Path) -> None:
    assert not {"admin_listen", "metrics_listen", "tokens", "tls_certificate", "tls_key"} & findings(nowhere).keys()


def test_the_doctor_touches_no_runtime_itself(toy_bundle: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from lom_server.config import ServerConfig\n"
        "from lom_server.doctor import run_doctor\n"
        f"assert run_doctor(ServerConfig(models=Path({str(toy_bundle)!r}), listen={LOOPBACK!r})) == 0\n"
        "assert 'onnxruntime' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
