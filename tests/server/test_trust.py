"""`lom-serve --trusted-keys`: serves what a trusted key signed, refuses the rest in one line."""

import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tests.support.bundles import write_test_bundle
from tests.support.servers import running_server, start_server_process


def write_key(path: Path) -> bytes:
    """A new private key in PEM; its public key goes to `path`."""
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """A bundle signed by the key whose public part is `trusted.pem` beside it."""
    write_test_bundle(tmp_path / "signed", sign_key=write_key(tmp_path / "trusted.pem"))
    write_key(tmp_path / "other.pem")
    return tmp_path / "signed"


def refused_start(bundle: Path, *options: str | Path) -> tuple[int, str]:
    """Exit status and the one line on stderr of a server that must not start."""
    server = start_server_process(bundle, *map(str, options))
    code = server.wait()
    assert server.stdout == []
    assert len(server.stderr) == 1, server.stderr
    return code, server.stderr[0]


def test_a_signed_bundle_is_served(signed: Path) -> None:
    keys = signed.parent
    with running_server(signed, "--trusted-keys", str(keys / "trusted.pem")) as server:
        assert server.terminate() == 0


def test_any_of_several_keys_will_do_and_the_option_does_not_swallow_the_bundle(signed: Path) -> None:
    keys = [part for name in ("other", "trusted") for part in ("--trusted-keys", str(signed.parent / f"{name}.pem"))]
    with running_server(signed, program=(sys.executable, "-m", "lom_server.main", *keys)) as server:
        assert server.terminate() == 0


def test_an_otherwise_signed_bundle_is_refused(signed: Path) -> None:
    code, line = refused_start(signed, "--trusted-keys", signed.parent / "other.pem")
    assert code == 1
    assert line.startswith("lom-serve: BAD_SIGNATURE: manifest.sig: expected one of the 1 trusted keys, got ")


def test_an_unsigned_bundle_is_refused(signed: Path, toy_bundle: Path) -> None:
    code, line = refused_start(toy_bundle, "--trusted-keys", signed.parent / "trusted.pem")
    assert code == 1
    assert line == "lom-serve: BAD_SIGNATURE: manifest.sig: expected the signature of a trusted key, found none"


def test_a_bundle_changed_after_it_was_signed_is_refused(signed: Path) -> None:
    manifest = signed / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    code, line = refused_start(signed, "--trusted-keys", signed.parent / "trusted.pem")
    assert code == 1
    assert line == "lom-serve: BAD_SIGNATURE: manifest.sig: expected the signature of this manifest, got another"


def test_a_key_that_cannot_be_read_is_one_line(signed: Path) -> None:
    code, line = refused_start(signed, "--trusted-keys", signed.parent / "nowhere.pem")
    assert code == 1
    assert line.startswith("lom-serve: BAD_KEY: ")
    assert "nowhere.pem" in line
    assert line.endswith("No such file or directory")


def test_one_bad_key_among_good_ones_is_refused(signed: Path) -> None:
    (signed.parent / "garbage.pem").write_text("no key")
    keys = ("--trusted-keys", signed.parent / "trusted.pem", "--trusted-keys", signed.parent / "garbage.pem")
    code, line = refused_start(signed, *keys)
    assert code == 1
    assert line.startswith("lom-serve: BAD_KEY: ")


def test_an_option_without_a_key_does_not_trust_everyone(signed: Path) -> None:
    server = start_server_process(signed, "--trusted-keys")
    assert server.wait() == 2
    assert server.stdout == []
    assert "Traceback" not in "\n".join(server.stderr)
