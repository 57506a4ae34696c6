"""What every program of `lom-act` may be told of the server that it asks."""

from dataclasses import dataclass
from pathlib import Path

from lom_client.config import ClientConfig


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where a server is, and how to be let in."""

    target: str = "grpc://127.0.0.1:8001"
    """The server: grpc://HOST:PORT, grpcs://HOST:PORT for TLS, unix:/PATH, or inproc:BUNDLE for none at all."""
    tls_ca: Path | None = None
    """PEM certificates of the authorities that certify a grpcs:// server; left out: the public ones."""
    tls_certificate: Path | None = None
    """PEM certificate that a grpcs:// server may ask for; needs --tls-key."""
    tls_key: Path | None = None
    """PEM private key of --tls-certificate."""
    token_file: Path | None = None
    """File with the token that a server may ask for, mode 0600."""

    def client_config(self, *, use_stream: bool = False) -> ClientConfig:
        """For a client of that server. Raises ValueError where the options do not go together."""
        return ClientConfig(
            tls_ca=self.tls_ca,
            tls_certificate=self.tls_certificate,
            tls_key=self.tls_key,
            token_file=self.token_file,
            use_stream=use_stream,
        )
