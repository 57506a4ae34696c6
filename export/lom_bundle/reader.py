"""Reads a bundle and refuses it unless every byte is the one that was written."""

import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lom_bundle.errors import BundleError
from lom_bundle.manifest import GOLDEN_FILE, MANIFEST_FILE, Manifest

MAX_FILE_BYTES = 512 * 1024 * 1024
_MAX_MANIFEST_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A verified bundle in memory.

    Attributes:
        manifest: the checked manifest.
        digest: sha256 of manifest.json, hexadecimal; through the digests inside it names every byte.
        graphs: ONNX bytes by variant; exactly the bytes that were hashed.
        golden: arrays by name: each input's name, and `VARIANT.OUTPUT` for the answers.
    """

    manifest: Manifest
    digest: str
    graphs: Mapping[str, bytes]
    golden: Mapping[str, NDArray[Any]]


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Reads and verifies the bundle at `path`.

    Raises:
        BundleError: BUNDLE_NOT_FOUND, BUNDLE_INCOMPLETE, BUNDLE_UNSAFE_FILE (link, device, unlisted file),
            BAD_MANIFEST, CONTRACT_MISMATCH, DIGEST_MISMATCH or MODEL_TOO_LARGE.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BundleError("BUNDLE_NOT_FOUND", f"expected a bundle folder, got {str(folder)!r}")
    manifest_bytes = _read_regular_file(folder, MANIFEST_FILE, _MAX_MANIFEST_BYTES)
    manifest = Manifest.from_json(manifest_bytes)
    present = {entry.name for entry in folder.iterdir()} - {MANIFEST_FILE}
    unlisted = present - manifest.files.keys()
    if unlisted:
        raise BundleError("BUNDLE_UNSAFE_FILE", f"expected only the files of the manifest, got {min(unlisted)[:64]!r}")
    files = {name: _read_verified(folder, name, entry) for name, entry in manifest.files.items()}
    try:
        graphs = {name: files[variant.graph] for name, variant in manifest.variants.items()}
        golden_bytes = files[GOLDEN_FILE]
    except KeyError as error:
        raise BundleError("BUNDLE_INCOMPLETE", f"expected a file {error.args[0]!r} in the manifest") from error
    return Bundle(
        manifest=manifest,
        digest=hashlib.sha256(manifest_bytes).hexdigest(),
        graphs=graphs,
        golden=_parse_golden(golden_bytes, manifest),
    )


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
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            golden = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise BundleError("BUNDLE_INCOMPLETE", f"{GOLDEN_FILE}: expected an archive of plain arrays") from error
    expected = [space.name for space in manifest.inputs]
    expected += [f"{variant}.action" for variant in manifest.variants]
    for name in expected:
        if name not in golden or len(golden[name]) != manifest.golden.rows:
            raise BundleError("BUNDLE_INCOMPLETE", f"{GOLDEN_FILE}: expected {manifest.golden.rows} rows of {name!r}")
    return golden
