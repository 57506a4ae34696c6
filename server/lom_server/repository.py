"""What is on disk: policies, their versions, and the one that was promoted last.

A repository is a folder `POLICY/VERSION/` of bundles. A name that a caller sends is only ever a key into what a scan
found: it is never joined to a path.
"""

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lom_bundle import BundleError, read_manifest
from lom_bundle.manifest import MANIFEST_FILE
from lom_server.errors import StartError

_logger = logging.getLogger(__name__)

PROMOTED_FILE = "promoted_version"
"""Beside a policy's versions: the number of the one that was promoted. A restart must not bring back another."""

_POLICY_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,9}")
_LARGEST_VERSION = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A folder of bundles, or one bundle that is served as version 1 of the policy that it names."""

    folder: Path
    is_single_bundle: bool

    def scan(self) -> Mapping[str, Mapping[int, Path]]:
        """Bundle folders by policy and version, both in order.

        Links, and names that no request could carry, are not seen.

        Raises:
            StartError: STORE_UNREADABLE.
        """
        try:
            if self.is_single_bundle:
                return {_policy_of(self.folder): {1: self.folder}}
            found = {}
            for policy, folder in sorted(self._policy_folders()):
                versions = _versions(folder)
                if versions:
                    found[policy] = versions
            return found
        except OSError as error:
            raise StartError("STORE_UNREADABLE", "expected a readable folder of policies") from error

    def promoted_version(self, policy: str) -> int | None:
        """The version that was promoted last; None where none was, or where, which is logged, nobody can tell."""
        if self.is_single_bundle:
            return None
        try:
            text = _read_line(self._folder_of(policy) / PROMOTED_FILE)
        except FileNotFoundError:
            return None
        except OSError:
            text = ""
        if _VERSION.fullmatch(text) and int(text) <= _LARGEST_VERSION:
            return int(text)
        _logger.error("%s: which version was promoted is not known: expected a number in %s", policy, PROMOTED_FILE)
        return None

    def promote(self, policy: str, version: int) -> bool:
        """Remembers `version` for the next start; False where the repository cannot be written."""
        if self.is_single_bundle:
            return False
        try:
            folder = self._folder_of(policy)
            descriptor, temporary = tempfile.mkstemp(prefix=f".{PROMOTED_FILE}.", dir=folder)
            try:
                with os.fdopen(descriptor, "w", encoding="ascii") as file:
                    file.write(f"{version}\n")
                    file.flush()
                    os.fchmod(file.fileno(), 0o644)  # as readable as the bundles beside it
                    os.fsync(file.fileno())
                os.replace(temporary, folder / PROMOTED_FILE)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError:
            return False
        return True

    def _folder_of(self, policy: str) -> Path:
        for name, folder in self._policy_folders():
            if name == policy:
                return folder
        raise FileNotFoundError(policy)

    def _policy_folders(self) -> Iterator[tuple[str, Path]]:
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _POLICY_NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    yield entry.name, Path(entry.path)


def open_repository(folder: Path) -> Repository:
    """The repository at `folder`, which may be a single bundle.

    Raises:
        StartError: BUNDLE_NOT_FOUND, where there is no such folder.
    """
    if not folder.is_dir():
        raise StartError("BUNDLE_NOT_FOUND", f"expected a bundle, or a folder of policies, got {str(folder)!r}")
    return Repository(folder=folder, is_single_bundle=os.path.lexists(folder / MANIFEST_FILE))


def _policy_of(bundle: Path) -> str:
    """The manifest's name. Only a label until the bundle is verified: whoever loads it reads it again."""
    try:
        return read_manifest(bundle).policy
    except BundleError as error:
        raise StartError(error.reason, error.detail) from error


def _read_line(path: Path) -> str:
    """The text of a file that holds no more than a line, whatever somebody has put in its place."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return os.read(descriptor, 64).decode("ascii", "replace").strip()
    finally:
        os.close(descriptor)


def _versions(policy: Path) -> dict[int, Path]:
    versions = {
        int(entry.name): Path(entry.path)
        for entry in os.scandir(policy)
        if _VERSION.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
    }
    return {version: versions[version] for version in sorted(versions) if version <= _LARGEST_VERSION}
