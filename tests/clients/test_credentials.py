"""Certificates and tokens are right at construction, go where nobody reads along, and are told to nobody else."""

from pathlib import Path
from typing import Any

import grpc
import pytest

from lom_client import ClientConfig, PolicyClient, ServerFault
from lom_client.credentials import call_metadata
from tests.clients.conftest import AnyClient, Connect
from tests.support.certificates import CertificateAuthority
from tests.support.fake_policy_server import FakePolicyServer, refusing_act

TOKEN = "s3cret-" * 4
ELSEWHERE = "grpc://robot.example:8001"


def token_file(folder: Path, text: str = TOKEN, mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("text", [TOKEN, f"{TOKEN}\n", f"# robots\n\nact robot-7 {TOKEN}\n"])
def test_a_token_is_read_alone_or_from_a_servers_line(tmp_path: Path, text: str) -> None:
    config = ClientConfig(token_file=token_file(tmp_path, text))
    assert call_metadata(config) == (("authorization", f"Bearer {TOKEN}"),)


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("", 0o600, "expected one line"),
        ("short", 0o600, "16 characters or more"),
        (f"robot {TOKEN}", 0o600, "expected one line"),
        (f"act one {TOKEN}\nact two {TOKEN}x\n", 0o600, "expected one line"),
        (f"{TOKEN}\N{LATIN SMALL LETTER E WITH ACUTE}", 0o600, "ASCII"),
        (TOKEN, 0o640, "expected mode 0600 or 0400, got 0640"),
        (TOKEN, 0o604, "got 0604"),
        (TOKEN, 0o620, "got 0620"),
    ],
)
def test_a_file_that_is_no_secret_token_is_refused_without_quoting_it(
    tmp_path: Path, text: str, mode: int, words: str
) -> None:
    config = ClientConfig(token_file=token_file(tmp_path, text, mode))
    with pytest.raises(ValueError, match="token_file: ") as caught:
        PolicyClient("grpc://127.0.0.1:8001", config=config)
    assert words in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_missing_token_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a readable file"):
        PolicyClient("unix:/run/lom.sock", config=ClientConfig(token_file=tmp_path / "nowhere"))


def test_a_token_never_leaves_this_machine_in_the_clear(tmp_path: Path) -> None:
    config = ClientConfig(token_file=token_file(tmp_path))
    with pytest.raises(ValueError, match="anybody on the way could read the token"):
        PolicyClient(ELSEWHERE, config=config)
    with pytest.raises(ValueError, match="a policy in this process does not"):
        PolicyClient("inproc:bundle", config=config)
    for target in ("grpc://127.0.0.1:8001", "grpc://localhost:8001", "unix:/run/lom.sock", "grpcs://robot.example:1"):
        PolicyClient(target, config=config).close()


def test_every_call_carries_the_token_and_no_text_of_ours_does(
    server: FakePolicyServer, connect: Connect, tmp_path: Path
) -> None:
    config = ClientConfig(token_file=token_file(tmp_path))
    with connect(server.target, config=config) as client:
        client.act([0, 0, 0], deadline_s=10)
        server.act = refusing_act(grpc.StatusCode.INTERNAL, "INTERNAL_ERROR: id 1")
        with pytest.raises(ServerFault) as caught:
            client.act([0, 0, 0], deadline_s=10)
        assert TOKEN not in f"{config!r} {client!r} {vars(client)!r} {caught.value!r}"
    assert {metadata.get("authorization") for metadata in server.metadata} == {f"Bearer {TOKEN}"}


def test_without_a_token_there_is_no_metadata(server: FakePolicyServer, any_client: AnyClient) -> None:
    any_client.act([0, 0, 0], deadline_s=10)
    assert all("authorization" not in metadata for metadata in server.metadata)


@pytest.mark.parametrize("target", ["grpc://127.0.0.1:8001", "unix:/run/lom.sock", "inproc:bundle"])
@pytest.mark.parametrize("fields", [["tls_ca"], ["tls_certificate", "tls_key"]])
def test_tls_files_without_tls_are_refused(tmp_path: Path, target: str, fields: list[str]) -> None:
    files: dict[str, Any] = dict.fromkeys(fields, CertificateAuthority(tmp_path).certificate)
    with pytest.raises(ValueError, match=f"{fields[0]} needs a target grpcs://"):
        PolicyClient(target, config=ClientConfig(**files))


def test_files_that_no_handshake_could_use_are_refused_at_construction(tmp_path: Path) -> None:
    authority = CertificateAuthority(tmp_path)
    one, other = authority.client("one"), authority.client("other")
    garbage = tmp_path / "garbage.pem"
    garbage.write_bytes(b"\xff no PEM")
    refused: list[dict[str, Any]] = [
        {"tls_ca": tmp_path / "nowhere.pem"},
        {"tls_ca": garbage},
        {"tls_ca": one.key},
        {"tls_certificate": one.certificate, "tls_key": other.key},
        {"tls_certificate": garbage, "tls_key": one.key},
        {"tls_certificate": one.certificate, "tls_key": tmp_path / "nowhere.pem"},
    ]
    for files in refused:
        with pytest.raises(ValueError, match=r"^tls_"):
            PolicyClient("grpcs://127.0.0.1:8001", config=ClientConfig(**files))
    sound = ClientConfig(tls_ca=authority.certificate, tls_certificate=one.certificate, tls_key=one.key)
    PolicyClient("grpcs://127.0.0.1:8001", config=sound).close()
