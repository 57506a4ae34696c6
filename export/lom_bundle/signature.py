"""Who made a bundle: Ed25519 over the exact bytes of its manifest, which names every other byte.

    manifest.sig    {"algorithm": "ed25519", "key_id": "0f3c…", "signature": "9a41…"}

The key id is the first 16 hexadecimal digits of the sha256 of the raw public key. Signing and verifying need the extra
`lom[signing]`; a bundle that nobody signs or verifies does without.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lom_bundle.errors import BundleError

SIGNATURE_FILE = "manifest.sig"
MAX_SIGNATURE_BYTES = 4096

_ALGORITHM = "ed25519"
_FIELDS = ["algorithm", "key_id", "signature"]
_KEY_ID = re.compile("[0-9a-f]{16}")
_SIGNATURE = re.compile("[0-9a-f]{128}")


def sign(manifest_bytes: bytes, private_key_pem: bytes) -> bytes:
    """The content of `manifest.sig`.

    Args:
        private_key_pem: an unencrypted Ed25519 private key.

    Raises:
        BundleError: BAD_KEY, or SIGNING_UNAVAILABLE.
    """
    with _signing_extra():
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    expected = "signing key: expected an unencrypted Ed25519 private key in PEM"
    try:
        key = load_pem_private_key(private_key_pem, password=None)
    except TypeError:
        raise BundleError("BAD_KEY", f"{expected}, got an encrypted one") from None
    except (ValueError, UnsupportedAlgorithm):
        raise BundleError("BAD_KEY", f"{expected}, got something else") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise BundleError("BAD_KEY", f"{expected}, got {type(key).__name__}")
    document = {
        "algorithm": _ALGORITHM,
        "key_id": _key_id(key.public_key().public_bytes_raw()),
        "signature": key.sign(manifest_bytes).hex(),
    }
    return (json.dumps(document) + "\n").encode()


def verify(manifest_bytes: bytes, signature_file: bytes | None, trusted_keys: Sequence[bytes]) -> str:
    """Passes if one of the trusted keys signed exactly these bytes.

    Args:
        signature_file: the content of `manifest.sig`; None where there is none.
        trusted_keys: as `load_trusted_key` returns them.

    Returns:
        The id of the key that signed.

    Raises:
        BundleError: BAD_SIGNATURE, BAD_KEY (a trusted key is no Ed25519 public key), or SIGNING_UNAVAILABLE.
    """
    with _signing_extra():
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    if signature_file is None:
        raise BundleError("BAD_SIGNATURE", f"{SIGNATURE_FILE}: expected the signature of a trusted key, found none")
    key_id, signature = _parse(signature_file)
    for trusted_key in trusted_keys:
        if _key_id(trusted_key) != key_id:
            continue
        try:
            Ed25519PublicKey.from_public_bytes(trusted_key).verify(signature, manifest_bytes)
        except InvalidSignature:
            raise BundleError(
                "BAD_SIGNATURE", f"{SIGNATURE_FILE}: expected the signature of this manifest, got another"
            ) from None
        except ValueError:
            raise BundleError("BAD_KEY", "trusted key: expected the 32 bytes of an Ed25519 public key") from None
        return key_id
    raise BundleError(
        "BAD_SIGNATURE",
        f"{SIGNATURE_FILE}: expected one of the {len(trusted_keys)} trusted keys, got the unknown key {key_id}",
    )


def load_trusted_key(path: str | os.PathLike[str]) -> bytes:
    """Reads an Ed25519 public key in PEM, and returns its 32 raw bytes.

    Raises:
        BundleError: BAD_KEY, or SIGNING_UNAVAILABLE.
    """
    with _signing_extra():
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    expected = f"{str(path)!r}: expected an Ed25519 public key in PEM"
    try:
        key = load_pem_public_key(Path(path).read_bytes())
    except OSError as error:
        raise BundleError("BAD_KEY", f"{expected}, could not read it: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm):
        raise BundleError("BAD_KEY", f"{expected}, got something else") from None
    if not isinstance(key, Ed25519PublicKey):
        raise BundleError("BAD_KEY", f"{expected}, got {type(key).__name__}")
    return key.public_bytes_raw()


@contextmanager
def _signing_extra() -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise BundleError("SIGNING_UNAVAILABLE", "signatures need cryptography: install lom[signing]") from None


def _key_id(raw_public_key: bytes) -> str:
    return hashlib.sha256(raw_public_key).hexdigest()[:16]


def _parse(signature_file: bytes) -> tuple[str, bytes]:
    """Key id and signature."""
    malformed = BundleError("BAD_SIGNATURE", f"{SIGNATURE_FILE}: expected JSON with {', '.join(_FIELDS)}")
    if len(signature_file) > MAX_SIGNATURE_BYTES:
        raise malformed
    try:
        pairs = json.loads(signature_file.decode("ascii"), object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        raise malformed from None
    # Pairs show a field that is there twice; a dict would hide it.
    if not isinstance(pairs, _Pairs) or sorted(name for name, _ in pairs) != _FIELDS:
        raise malformed
    values = dict(pairs)
    algorithm, key_id, signature = (values[name] for name in _FIELDS)
    if algorithm != _ALGORITHM:
        raise BundleError("BAD_SIGNATURE", f"{SIGNATURE_FILE}: expected the algorithm {_ALGORITHM}")
    if not (isinstance(key_id, str) and _KEY_ID.fullmatch(key_id)):
        raise malformed
    if not (isinstance(signature, str) and _SIGNATURE.fullmatch(signature)):
        raise malformed
    return key_id, bytes.fromhex(signature)


class _Pairs(list[tuple[str, object]]):
    """A JSON object as it is written."""
