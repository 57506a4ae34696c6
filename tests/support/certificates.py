"""A throw-away certificate authority, and certificates of it that are right or wrong in one way."""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class CertificateFiles:
    """Where a certificate and its key were written.

    Attributes:
        certificate: PEM.
        key: PEM, without a password.
    """

    certificate: Path
    key: Path


class CertificateAuthority:
    """Signs what a test asks for.

    Attributes:
        certificate: PEM file of its own certificate.
    """

    def __init__(self, folder: Path, *, name: str = "test authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._name = _named(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(self._name, self._name, self._key.public_key(), is_expired=False)
        signed = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).sign(
            self._key, hashes.SHA256()
        )
        self.certificate = folder / "authority.pem"
        self.certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))

    def server(
        self, file_name: str = "server", *, host: str = "127.0.0.1", name: str = "lom-serve", is_expired: bool = False
    ) -> CertificateFiles:
        """A certificate for the IP address `host`, written over an earlier one of that file name."""
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
        return self._signed(file_name, name, [address], is_expired=is_expired)

    def client(self, name: str, *, is_expired: bool = False) -> CertificateFiles:
        """A certificate for the caller `name`."""
        return self._signed(name, name, [], is_expired=is_expired)

    def _signed(
        self, file_name: str, name: str, extensions: list[x509.ExtensionType], *, is_expired: bool
    ) -> CertificateFiles:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_named(name), self._name, key.public_key(), is_expired=is_expired)
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        files = CertificateFiles(
            certificate=self._folder / f"{file_name}.pem", key=self._folder / f"{file_name}-key.pem"
        )
        files.certificate.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, is_expired: bool
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 3 * _DAY)
        .not_valid_after(now - _DAY if is_expired else now + _DAY)
    )
