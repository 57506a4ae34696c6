"""Who the client is, and whom it believes: certificates and the bearer token, read once and checked at construction."""

import os
import re
import ssl
from pathlib import Path

import grpc

from lom_client.config import ClientConfig
from lom_client.targets import Scheme, Target

_OTHERS_MAY = 0o077
_TOKEN = re.compile(r"[!-~]{16,}")


def require_fitting(config: ClientConfig, target: Target) -> None:
    """Passes if every credential of `config` has a use on the way to `target`, and no harm.

    Raises:
        ValueError: TLS files without TLS; a token that others on the network could read, or that nobody asks for.
    """
    for name in ("tls_ca", "tls_certificate", "tls_key"):
        if getattr(config, name) is not None and target.scheme is not Scheme.GRPCS:
            raise ValueError(f"{name} needs a target grpcs://HOST:PORT, got a target {target.scheme}:")
    if config.token_file is None:
        return
    if target.scheme is Scheme.INPROC:
        raise ValueError("token_file needs a server that asks for a token; a policy in this process does not")
    if not target.is_private:
        raise ValueError(
            "token_file needs grpcs://, unix: or this machine's own address: anybody on the way could read the token"
        )


def channel_credentials(config: ClientConfig) -> grpc.ChannelCredentials:
    """TLS by the files that `config` names.

    Raises:
        ValueError: a file cannot be read, is not PEM, or the key is not the certificate's.
    """
    # gRPC takes any bytes, and then fails every handshake without a word about the file.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca = certificate = key = None
    try:
        if config.tls_ca is not None:
            ca = config.tls_ca.read_bytes()
            context.load_verify_locations(cadata=ca.decode("ascii"))
    except (OSError, ValueError):  # ssl.SSLError is an OSError
        raise ValueError(f"tls_ca: expected a readable file of PEM certificates, got {config.tls_ca}") from None
    try:
        if config.tls_certificate is not None and config.tls_key is not None:
            certificate, key = config.tls_certificate.read_bytes(), config.tls_key.read_bytes()
            # The password keeps an encrypted key from asking for one at the terminal.
            context.load_cert_chain(config.tls_certificate, config.tls_key, password="")
    except (OSError, ValueError):
        raise ValueError(
            "tls_certificate and tls_key: expected readable PEM files that belong together, the key without a "
            f"password, got {config.tls_certificate} and {config.tls_key}"
        ) from None
    return grpc.ssl_channel_credentials(ca, key, certificate)


def call_metadata(config: ClientConfig) -> tuple[tuple[str, str], ...]:
    """What every call carries beside its message: the token, where there is one.

    Raises:
        ValueError: `token_file` cannot be read, others may read it, or it does not hold exactly one token.
    """
    if config.token_file is None:
        return ()
    return (("authorization", f"Bearer {_read_token(config.token_file)}"),)


def _read_token(path: Path) -> str:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            lines = file.read().decode("ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"token_file: expected a readable file of ASCII text, got {path}") from None
    if mode & _OTHERS_MAY:
        raise ValueError(f"token_file: expected mode 0600 or 0400, got {mode & 0o777:04o} of {path}")
    entries = [words for line in lines if (words := line.split()) and not words[0].startswith("#")]
    # Quotes no word of the file: any of them may be a token in the wrong place.
    if len(entries) != 1 or len(entries[0]) not in (1, 3) or not _TOKEN.fullmatch(entries[0][-1]):
        raise ValueError(
            f"token_file: expected one line, TOKEN or ROLE NAME TOKEN, with a token of 16 characters or more, in {path}"
        )
    return entries[0][-1]
