"""Only the bytes that a trusted key signed pass, and nothing else of the bundle is touched before."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed448, rsa, x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from lom_bundle import BundleError, Manifest, read_bundle
from lom_bundle.signature import load_trusted_key, sign, verify
from tests.support.bundles import write_test_bundle

MANIFEST = b'{"policy": "toy"}\n'

PrivateKey = Ed25519PrivateKey | rsa.RSAPrivateKey | x25519.X25519PrivateKey | ed448.Ed448PrivateKey


def private_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem(key: PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


KEY = Ed25519PrivateKey.from_private_bytes(b"a key for tests, known to all!!!")
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(b"another key, as public as a test")
TRUSTED = [KEY.public_key().public_bytes_raw()]
KEYS_OF_ANOTHER_KIND: dict[str, PrivateKey] = {
    "RSAPrivateKey": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "X25519PrivateKey": x25519.X25519PrivateKey.generate(),
    "Ed448PrivateKey": ed448.Ed448PrivateKey.generate(),
}


def refusal(manifest: bytes, signature_file: bytes | None, trusted_keys: list[bytes] = TRUSTED) -> str:
    """The reason for which the signature is refused."""
    with pytest.raises(BundleError) as caught:
        verify(manifest, signature_file, trusted_keys)
    return caught.value.reason


def test_a_signature_verifies_and_names_its_key() -> None:
    signature_file = sign(MANIFEST, private_pem(KEY))
    document = json.loads(signature_file)
    assert set(document) == {"algorithm", "key_id", "signature"}
    assert document["algorithm"] == "ed25519"
    others = [OTHER_KEY.public_key().public_bytes_raw()]
    assert verify(MANIFEST, signature_file, others + TRUSTED) == document["key_id"]
    assert len(document["key_id"]) == 16


def test_the_wrong_key_no_key_and_no_signature_are_refused() -> None:
    signature_file = sign(MANIFEST, private_pem(OTHER_KEY))
    assert refusal(MANIFEST, signature_file) == "BAD_SIGNATURE"
    assert refusal(MANIFEST, signature_file, []) == "BAD_SIGNATURE"
    assert refusal(MANIFEST, None) == "BAD_SIGNATURE"


def test_another_key_under_the_id_of_a_trusted_one_is_refused() -> None:
    trusted = json.loads(sign(MANIFEST, private_pem(KEY)))
    forged = json.loads(sign(MANIFEST, private_pem(OTHER_KEY)))
    assert refusal(MANIFEST, json.dumps({**forged, "key_id": trusted["key_id"]}).encode()) == "BAD_SIGNATURE"


def test_every_truncation_is_refused() -> None:
    signature_file = sign(MANIFEST, private_pem(KEY)).rstrip()
    for length in range(len(signature_file)):
        assert refusal(MANIFEST, signature_file[:length]) == "BAD_SIGNATURE"
        assert len(MANIFEST) <= length or refusal(MANIFEST[:length], signature_file) == "BAD_SIGNATURE"


def test_every_flipped_bit_is_refused() -> None:
    def flips(content: bytes) -> list[bytes]:
        return [
            content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
            for place in range(len(content))
            for bit in range(8)
        ]

    signature_file = sign(MANIFEST, private_pem(KEY))
    for flipped in flips(signature_file):
        assert refusal(MANIFEST, flipped) == "BAD_SIGNATURE", flipped
    for flipped in flips(MANIFEST):
        assert refusal(flipped, signature_file) == "BAD_SIGNATURE", flipped


def with_field(name: str, value: object) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({**json.loads(content), name: value}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"\xff\xfe" + content,
        lambda content: content.decode().encode("utf-16"),
        lambda content: content + content,
        lambda content: content.rstrip()[:-1] + b', "algorithm": "ed25519"}',
        lambda content: b"[" + content + b"]",
        lambda content: b"[" * 4000,
        lambda content: b"[" * 10_000_000,
        lambda content: b'{"a":' * 800,
        lambda content: b"9" * 4096,
        lambda content: content + b" " * 4096,
        with_field("note", ""),
        with_field("algorithm", "none"),
        with_field("algorithm", []),
        with_field("key_id", None),
        with_field("key_id", "0" * 15),
        with_field("key_id", "../../etc/passwd"),
        with_field("signature", ""),
        with_field("signature", 7),
        with_field("signature", "0" * 128),
        with_field("signature", "0" * 130),
        with_field("signature", "\u0660" * 128),
    ],
)
def test_a_signature_file_that_is_none_is_refused_without_quoting_it(damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(BundleError) as caught:
        verify(MANIFEST, damage(sign(MANIFEST, private_pem(KEY))), TRUSTED)
    assert caught.value.reason == "BAD_SIGNATURE"
    assert caught.value.detail.startswith("manifest.sig: expected ")
    assert len(caught.value.detail) < 120
    assert "passwd" not in caught.value.detail


def test_a_trusted_key_that_is_no_ed25519_key_is_refused() -> None:
    signature = json.loads(sign(MANIFEST, private_pem(KEY)))
    short_key_id = "6e340b9cffb37a98"  # of the one byte 0
    forged = json.dumps({**signature, "key_id": short_key_id}).encode()
    assert refusal(MANIFEST, forged, [b"\0"]) == "BAD_KEY"


@pytest.mark.parametrize("kind", KEYS_OF_ANOTHER_KIND)
def test_a_key_of_another_kind_is_named_and_not_shown(tmp_path: Path, kind: str) -> None:
    key = KEYS_OF_ANOTHER_KIND[kind]
    with pytest.raises(BundleError, match=f"BAD_KEY: .*Ed25519.*, got {kind}$"):
        sign(MANIFEST, private_pem(key))
    (tmp_path / "key.pem").write_bytes(public_pem(key))
    with pytest.raises(BundleError, match=f"BAD_KEY: .*Ed25519.*, got {kind.replace('Private', 'Public')}$"):
        load_trusted_key(tmp_path / "key.pem")


GARBAGE = [b"", b"\0" * 64, b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n", public_pem(KEY)]


@pytest.mark.parametrize("pem", [*GARBAGE, private_pem(KEY)[:-40]])
def test_what_is_no_private_key_is_refused_and_not_shown(pem: bytes) -> None:
    with pytest.raises(BundleError, match=r"BAD_KEY: signing key: expected .*, got something else$") as caught:
        sign(MANIFEST, pem)
    assert caught.value.__cause__ is None


def test_an_encrypted_private_key_is_named() -> None:
    encrypted = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password"))
    with pytest.raises(BundleError, match=r"BAD_KEY: .*unencrypted.*, got an encrypted one$"):
        sign(MANIFEST, encrypted)


@pytest.mark.parametrize("pem", [*GARBAGE[:3], private_pem(KEY)])
def test_what_is_no_public_key_is_refused_and_not_shown(tmp_path: Path, pem: bytes) -> None:
    (tmp_path / "key.pem").write_bytes(pem)
    with pytest.raises(BundleError, match=r"BAD_KEY: .*key.pem.*, got something else$"):
        load_trusted_key(tmp_path / "key.pem")


def test_a_public_key_is_read(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(public_pem(KEY))
    assert load_trusted_key(tmp_path / "key.pem") == TRUSTED[0]


@pytest.mark.parametrize("place", ["nowhere.pem", "."])
def test_a_public_key_that_cannot_be_read(tmp_path: Path, place: str) -> None:
    with pytest.raises(BundleError, match=r"BAD_KEY: .*could not read it"):
        load_trusted_key(tmp_path / place)


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    write_test_bundle(tmp_path / "signed", sign_key=private_pem(KEY))
    return tmp_path / "signed"


def read_refusal(bundle: Path, trusted_keys: list[bytes] = TRUSTED) -> str:
    with pytest.raises(BundleError) as caught:
        read_bundle(bundle, trusted_keys=trusted_keys)
    return caught.value.reason


def test_a_signed_bundle_is_read_with_its_key_and_without_any(signed: Path) -> None:
    assert read_bundle(signed, trusted_keys=TRUSTED).digest == read_bundle(signed).digest
    (signed / "manifest.sig").write_text("no signature at all")
    read_bundle(signed)


def test_a_bundle_that_is_unsigned_or_otherwise_signed_is_refused(tmp_path: Path, signed: Path) -> None:
    write_test_bundle(tmp_path / "other", sign_key=private_pem(OTHER_KEY))
    assert read_refusal(tmp_path / "other") == "BAD_SIGNATURE"
    (signed / "manifest.sig").unlink()
    assert read_refusal(signed) == "BAD_SIGNATURE"


def test_a_signature_of_another_manifest_is_refused(tmp_path: Path, signed: Path) -> None:
    write_test_bundle(tmp_path / "other", policy="other", sign_key=private_pem(KEY))
    os.replace(tmp_path / "other" / "manifest.sig", signed / "manifest.sig")
    assert read_refusal(signed) == "BAD_SIGNATURE"


def test_nothing_is_read_or_parsed_before_the_signature_holds(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real_open = os.open

    def open_and_note(path: Path, flags: int) -> int:
        opened.append(path.name)
        return real_open(path, flags)

    def parse(text: bytes) -> Manifest:
        raise AssertionError("parsed before it was trusted")

    manifest = signed / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b" ")
    monkeypatch.setattr(os, "open", open_and_note)
    monkeypatch.setattr(Manifest, "from_json", parse)
    assert read_refusal(signed) == "BAD_SIGNATURE"
    assert opened == ["manifest.json", "manifest.sig"]


def symlink(signature: Path) -> None:
    signature.rename(signature.parent.parent / "elsewhere")
    signature.symlink_to(signature.parent.parent / "elsewhere")


def dangling_symlink(signature: Path) -> None:
    signature.unlink()
    signature.symlink_to("nowhere")


def hardlink(signature: Path) -> None:
    os.link(signature, signature.parent.parent / "second_name")


def fifo(signature: Path) -> None:
    signature.unlink()
    os.mkfifo(signature)


def too_long(signature: Path) -> None:
    signature.write_bytes(signature.read_bytes() + b" " * 4096)


@pytest.mark.parametrize("trusted_keys", [TRUSTED, []], ids=["trusted", "no keys"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (symlink, "BUNDLE_UNSAFE_FILE"),
        (dangling_symlink, "BUNDLE_UNSAFE_FILE"),
        (hardlink, "BUNDLE_UNSAFE_FILE"),
        (fifo, "BUNDLE_UNSAFE_FILE"),
        (too_long, "MODEL_TOO_LARGE"),
    ],
)
def test_the_signature_is_a_file_like_the_others(
    signed: Path, damage: Callable[[Path], None], reason: str, trusted_keys: list[bytes]
) -> None:
    damage(signed / "manifest.sig")
    assert read_refusal(signed, trusted_keys) == reason


def test_a_trusted_manifest_still_binds_every_file(signed: Path) -> None:
    graph = signed / "actor.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    assert read_refusal(signed) == "DIGEST_MISMATCH"


def test_a_key_that_cannot_sign_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"BAD_KEY"):
        write_test_bundle(tmp_path / "bundle", sign_key=b"no key")
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_the_error_names_it(signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None)
    assert read_refusal(signed) == "SIGNING_UNAVAILABLE"
    with pytest.raises(BundleError, match=r"SIGNING_UNAVAILABLE: .*lom\[signing\]"):
        sign(MANIFEST, private_pem(KEY))
    with pytest.raises(BundleError, match=r"SIGNING_UNAVAILABLE: .*lom\[signing\]"):
        load_trusted_key(tmp_path / "key.pem")
    read_bundle(signed)


def test_without_trusted_keys_nothing_but_numpy_is_imported(signed: Path) -> None:
    code = (
        "import sys\nfrom lom_bundle import read_bundle\nread_bundle(sys.argv[1])\n"
        "print({'cryptography', 'onnx', 'onnxruntime'} & {name.partition('.')[0] for name in sys.modules})"
    )
    process = subprocess.run([sys.executable, "-c", code, str(signed)], capture_output=True, text=True, check=True)
    assert process.stdout == "set()\n"
