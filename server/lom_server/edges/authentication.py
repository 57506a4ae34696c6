"""Who may call: bearer tokens from a file, and the certificates of both ends of a TLS connection."""

import hashlib
import hmac
import logging
import os
import re
import ssl
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias

import grpc

from lom_server.config import ServerConfig
from lom_server.errors import StartError

Metadata: TypeAlias = "Iterable[tuple[str, str | bytes]]"

MIN_TOKEN_CHARACTERS = 16

_logger = logging.getLogger(__name__)

_NAME = re.compile(r"[a-z0-9_-]{1,32}")
_TOKEN = re.compile(rf"[!-~]{{{MIN_TOKEN_CHARACTERS},}}")
_OTHERS_MAY = 0o077


class Role(StrEnum):
    """What a caller may ask for."""

    ACT = "act"
    ADMIN = "admin"

    def includes(self, other: "Role") -> bool:
        """Whether who has this role may do what `other` may."""
        return self is Role.ADMIN or self is other


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """A caller that is known."""

    name: str
    role: Role


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Identities by the sha256 of their token; the tokens themselves are not kept."""

    identities: Mapping[bytes, Identity] = field(repr=False)

    def identity_of(self, token: str) -> Identity | None:
        """Whose token it is. Takes as long for a token that is nearly right as for one that is not."""
        digest = _digest(token)
        found = None
        for known, identity in self.identities.items():
            if hmac.compare_digest(known, digest):
                found = identity
        return found


def read_tokens(path: Path) -> Tokens:
    """The tokens of a file with one `ROLE NAME TOKEN` a line, where `#` starts a line that is a comment.

    Raises:
        StartError: TOKENS_UNSAFE, where others than its owner may read or write the file; BAD_TOKENS, with the line.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & _OTHERS_MAY:
                raise StartError("TOKENS_UNSAFE", f"{path}: expected mode 0600 or 0400, got {mode & 0o777:04o}")
            lines = file.read().decode("ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        raise StartError("BAD_TOKENS", f"{path}: expected a readable file of ASCII text") from None
    identities: dict[bytes, Identity] = {}
    names: set[str] = set()
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        problem = _problem(words, names, identities)
        if problem:
            raise StartError("BAD_TOKENS", f"{path}, line {number}: {problem}")
        role, name, token = words
        names.add(name)
        identities[_digest(token)] = Identity(name=name, role=Role(role))
    if not identities:
        raise StartError("BAD_TOKENS", f"{path}: expected one token or more, got none")
    return Tokens(identities=identities)


def _problem(words: list[str], names: set[str], identities: Mapping[bytes, Identity]) -> str:
    """What is wrong with a line, or nothing. Quotes no word of it: any of them may be a token in the wrong place."""
    if len(words) != 3:
        return f"expected ROLE NAME TOKEN, got {len(words)} words"
    role, name, token = words
    if role not in list(Role):
        return f"expected a role of {' or '.join(Role)}"
    if not _NAME.fullmatch(name):
        return f"expected a name of {_NAME.pattern}"
    if name in names:
        return "expected a name that no other line has"
    if not _TOKEN.fullmatch(token):
        return f"expected a token of {MIN_TOKEN_CHARACTERS} characters or more"
    if _digest(token) in identities:
        return "expected a token that no other line has"
    return ""


class Authenticator:
    """Knows callers by the tokens of one file.

    Threads: `reload` may be called from any thread.
    """

    def __init__(self, path: Path) -> None:
        """Raises `StartError` as `read_tokens`."""
        self._path = path
        self._tokens = read_tokens(path)

    def identity_of(self, metadata: Metadata) -> Identity | None:
        """Who sent `metadata` with `authorization: Bearer TOKEN`; None for nobody that is known."""
        values = [value for key, value in metadata if key == "authorization"]
        if len(values) != 1 or not isinstance(values[0], str):
            return None
        scheme, _, token = values[0].partition(" ")
        return self._tokens.identity_of(token) if scheme.lower() == "bearer" else None

    def reload(self) -> None:
        """Reads the file again; where it is not usable, logs that and keeps the tokens that are known."""
        try:
            self._tokens = read_tokens(self._path)
        except StartError as error:
            _logger.error("tokens not reloaded, the previous ones stay valid: %s", error)
        else:
            _logger.info("tokens reloaded, %d of them", len(self._tokens.identities))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """TLS by the files that `config` names, read again when they change; None where it names none.

    Callers have to show a certificate where `config.tls_client_ca` is given.

    Raises:
        StartError: BAD_CERTIFICATE.
    """
    if config.tls_certificate is None or config.tls_key is None:
        return None
    files = _CertificateFiles(config.tls_certificate, config.tls_key, config.tls_client_ca)
    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
        files.configuration,
        files.changed_configuration,  # type: ignore[arg-type]  # None for no change: the stubs do not know
        require_client_authentication=config.tls_client_ca is not None,
    )
    return credentials


class _CertificateFiles:
    """A certificate, its key, and the authorities that sign clients, as they were when they last fitted together."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self.configuration = self._read()

    def changed_configuration(self) -> grpc.ServerCertificateConfiguration | None:
        """What a connection that begins now is to be met with, where that has changed.

        Threads: gRPC calls it in one of its own, for every handshake.
        """
        with self._lock:
            stamp = self._stamp()
            if stamp == self._seen:
                return None
            self._seen = stamp
            try:
                configuration = self._read()
            except StartError as error:
                _logger.error("certificate not reloaded, the previous one stays in use: %s", error)
                return None
            if self._stamp() != stamp:  # replaced while it was read: the next connection finds it settled
                self._seen = ()
                return None
            _logger.info("certificate reloaded")
            self.configuration = configuration
            return configuration

    def _stamp(self) -> tuple[tuple[int, int, int], ...]:
        paths = [path for path in (self._certificate, self._key, self._client_ca) if path is not None]
        try:
            return tuple((status.st_mtime_ns, status.st_size, status.st_ino) for status in map(os.stat, paths))
        except OSError:
            return ()

    def _read(self) -> grpc.ServerCertificateConfiguration:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            key, certificate = self._key.read_bytes(), self._certificate.read_bytes()
            client_ca = None if self._client_ca is None else self._client_ca.read_bytes()
            # gRPC takes any bytes and then fails every handshake. The password keeps an encrypted key from a prompt.
            context.load_cert_chain(self._certificate, self._key, password="")
            if client_ca is not None:
                context.load_verify_locations(cadata=client_ca.decode("ascii"))
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise StartError("BAD_CERTIFICATE", f"{self._key} is not the key of {self._certificate}") from None
            raise self._not_readable() from None
        except (OSError, ValueError):
            raise self._not_readable() from None
        return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca)

    def _not_readable(self) -> StartError:
        files = ", ".join(str(path) for path in (self._certificate, self._key, self._client_ca) if path is not None)
        return StartError("BAD_CERTIFICATE", f"expected readable PEM files, the key without a password, got {files}")
