"""Writes a bundle beside its destination and renames it: a reader never meets half of one."""

import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lom_bundle.errors import BundleError
from lom_bundle.manifest import CARD_FILE, GOLDEN_FILE, MANIFEST_FILE, Manifest
from lom_bundle.signature import SIGNATURE_FILE, sign


def write_bundle(
    path: str | os.PathLike[str],
    manifest: Manifest,
    *,
    graphs: Mapping[str, bytes],
    golden: Mapping[str, NDArray[Any]],
    card: str,
    explain_graphs: Mapping[str, bytes] | None = None,
    sign_key: bytes | None = None,
) -> str:
    """Writes `manifest` (its `files` are filled in here), graphs by variant, golden arrays and the card.

    Args:
        sign_key: Ed25519 private key in PEM; the bundle gets its signature.

    Returns:
        The bundle's digest (sha256 of manifest.json, hexadecimal).

    Raises:
        BundleError: DESTINATION_EXISTS, BAD_KEY, SIGNING_UNAVAILABLE, or NO_SPACE when the disk refuses; nothing is
            left behind in any case.
    """
    contents = {manifest.variants[name].graph: graph for name, graph in graphs.items()}
    for name, graph in (explain_graphs or {}).items():
        explain = manifest.variants[name].explain
        assert explain is not None, f"the manifest names no explain graph of {name}"
        contents[explain.graph] = graph
    contents[GOLDEN_FILE] = _pack_golden(golden)
    contents[CARD_FILE] = card.encode()
    listed = replace(
        manifest,
        files={
            name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for name, content in sorted(contents.items())
        },
    )
    manifest_bytes = listed.to_json().encode()
    if sign_key is not None:
        contents[SIGNATURE_FILE] = sign(manifest_bytes, sign_key)
    contents[MANIFEST_FILE] = manifest_bytes  # written last: without it, the folder is no bundle
    write_folder(Path(path), contents)
    return hashlib.sha256(manifest_bytes).hexdigest()


def write_folder(destination: Path, contents: Mapping[str, bytes]) -> None:
    """Writes files by relative name into a new folder, in order: whole and durable, or not at all.

    Raises:
        BundleError: DESTINATION_EXISTS, or NO_SPACE when the disk refuses; nothing is left behind.
    """
    if destination.exists() or destination.is_symlink():
        raise BundleError("DESTINATION_EXISTS", f"expected a new folder, {str(destination)!r} is there already")
    staging: Path | None = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        for name, content in contents.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            _write_durably(staging / name, content)
        staging.chmod(0o755)
        os.rename(staging, destination)
    except OSError as error:
        raise BundleError("NO_SPACE", f"could not write {str(destination)!r}: {error.strerror}") from error
    finally:
        if staging is not None and staging.exists():  # an interrupted writer cleans up, too
            shutil.rmtree(staging, ignore_errors=True)


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _pack_golden(golden: Mapping[str, NDArray[Any]]) -> bytes:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = dict(golden)
    np.savez(buffer, **arrays)
    return buffer.getvalue()
