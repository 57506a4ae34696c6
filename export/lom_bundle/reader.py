"""Reads a bundle and refuses it unless every byte is the one that was written."""

import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lom_bundle.errors import BundleError
from lom_bundle.manifest import GOLDEN_FILE, MANIFEST_FILE, Manifest
from lom_bundle.onnx_structure import refuse_unsafe_graph
from lom_bundle.signature import MAX_SIGNATURE_BYTES, SIGNATURE_FILE, verify

MAX_FILE_BYTES = 512 * 1024 * 1024
_MAX_MANIFEST_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A verified bundle in memory.

    Attributes:
        manifest: the checked manifest.
        digest: sha256 of manifest.json, hexadecimal; through the digests inside it names every byte.
        graphs: ONNX bytes by variant; exactly the bytes that were hashed.
        explain_graphs: likewise, of the variants that have one.
        golden: arrays by name: each input's name, and `VARIANT.OUTPUT` for the answers.
    """

    manifest: Manifest
    digest: str
    graphs: Mapping[str, bytes]
    golden: Mapping[str, NDArray[Any]]
    explain_graphs: Mapping[str, bytes] = field(default_factory=dict)


def read_bundle(path: str | os.PathLike[str], *, trusted_keys: Sequence[bytes] = ()) -> Bundle:
    """Reads and verifies the bundle at `path`.

    Args:
        trusted_keys: raw Ed25519 public keys (`lom_bundle.signature.load_trusted_key`); where any are given, one of
            them must have signed the manifest. Without them a signature says nothing.

    Raises:
        BundleError: BUNDLE_NOT_FOUND, BUNDLE_INCOMPLETE, BUNDLE_UNSAFE_FILE (link, device, unlisted file),
            BAD_MANIFEST, CONTRACT_MISMATCH, DIGEST_MISMATCH or MODEL_TOO_LARGE; BAD_SIGNATURE, BAD_KEY or
            SIGNING_UNAVAILABLE; BAD_GRAPH, OP_FORBIDDEN or EXTERNAL_DATA_FORBIDDEN.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BundleError("BUNDLE_NOT_FOUND", f"expected a bundle folder, got {str(folder)!r}")
    manifest_bytes = _read_regular_file(folder, MANIFEST_FILE, _MAX_MANIFEST_BYTES)
    signature = _read_signature(folder)
    if trusted_keys:
        verify(manifest_bytes, signature, trusted_keys)
    manifest = Manifest.from_json(manifest_bytes)
    present = {entry.name for entry in folder.iterdir()} - {MANIFEST_FILE, SIGNATURE_FILE}
    unlisted = present - manifest.files.keys()
    if unlisted:
        raise BundleError("BUNDLE_UNSAFE_FILE", f"expected only the files of the manifest, got {min(unlisted)[:64]!r}")
    graph_files = frozenset(manifest.graph_files)
    files = {}
    for name, entry in manifest.files.items():
        files[name] = _read_verified(folder, name, entry)
        if name in graph_files or name.endswith(".onnx"):
            refuse_unsafe_graph(name, files[name])
    try:
        graphs = {name: files[variant.graph] for name, variant in manifest.variants.items()}
        explain_graphs = {
            name: files[variant.explain.graph]
            for name, variant in manifest.variants.items()
            if variant.explain is not None
        }
        golden_bytes = files[GOLDEN_FILE]
    except KeyError as error:
        raise BundleError("BUNDLE_INCOMPLETE", f"expected a file {error.args[0]!r} in the manifest") from error
    return Bundle(
        manifest=manifest,
        digest=hashlib.sha256(manifest_bytes).hexdigest(),
        graphs=graphs,
        golden=_parse_golden(golden_bytes, manifest),
        explain_graphs=explain_graphs,
    )


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """What the bundle at `path` says of itself. Nothing of it is verified: it is good for a label, not for a decision.

    Raises:
        BundleError: BUNDLE_INCOMPLETE, BUNDLE_UNSAFE_FILE, BAD_MANIFEST, CONTRACT_MISMATCH or MODEL_TOO_LARGE.
    """
    return Manifest.from_json(_read_regular_file(Path(path), MANIFEST_FILE, _MAX_MANIFEST_BYTES))


def _read_signature(folder: Path) -> bytes | None:
    if not os.path.lexists(folder / SIGNATURE_FILE):
        return None
    return _read_regular_file(folder, SIGNATURE_FILE, MAX_SIGNATURE_BYTES)


def _read_verified(folder: Path, name: str, entry: Mapping[str, Any]) -> bytes:
    content = _read_regular_file(folder, name, MAX_FILE_BYTES)
    digest = hashlib.sha256(content).hexdigest()
    if len(content) != entry["bytes"] or digest != entry["sha256"]:
        raise BundleError(
            "DIGEST_MISMATCH",
            f"{name}: expected {entry['bytes']} bytes with sha256 {entry['sha256'][:12]}…, "
            f"got {len(content)} bytes with {digest[:12]}…",
        )
    return content


def _read_regular_file(folder: Path, name: str, max_bytes: int) -> bytes:
    """Opens without following links and without blocking on a FIFO; the checks are made on the open file."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise BundleError("BUNDLE_INCOMPLETE", f"{name}: expected a file, found none") from None
    except OSError as error:
        raise BundleError("BUNDLE_UNSAFE_FILE", f"{name}: expected a readable regular file") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise BundleError("BUNDLE_UNSAFE_FILE", f"{name}: expected a regular file that nothing else links to")
        if status.st_size > max_bytes:
            raise BundleError("MODEL_TOO_LARGE", f"{name}: expected at most {max_bytes} bytes, got {status.st_size}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(max_bytes + 1)
    finally:
        os.close(descriptor)


def _parse_golden(content: bytes, manifest: Manifest) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            unpacked_bytes = sum(member.file_size for member in archive.infolist())
        golden = _unpack(content) if unpacked_bytes <= MAX_FILE_BYTES else None
    except Exception as error:  # zipfile and numpy raise a dozen types for damaged bytes
        raise BundleError("BUNDLE_INCOMPLETE", f"{GOLDEN_FILE}: expected an archive of plain arrays") from error
    if golden is None:
        raise BundleError("MODEL_TOO_LARGE", f"{GOLDEN_FILE}: expected at most {MAX_FILE_BYTES} bytes when unpacked")
    expected = [space.name for space in manifest.inputs]
    expected += [f"{variant}.action" for variant in manifest.variants]
    rows = manifest.golden.rows
    for name in (*expected, *golden):
        if not _has_rows_of_numbers(golden.get(name), rows):
            raise BundleError("BUNDLE_INCOMPLETE", f"{GOLDEN_FILE}: expected {rows} rows of {name[:64]!r}")
    return golden


def _has_rows_of_numbers(member: object, rows: int) -> bool:
    return isinstance(member, np.ndarray) and member.dtype.kind in "biuf" and member.shape[:1] == (rows,)


def _unpack(content: bytes) -> dict[str, NDArray[Any]]:
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
