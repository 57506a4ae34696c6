"""`lom-serve doctor`: what this machine lacks to serve what it was asked to, and what to do about it.

Changes nothing and listens to nobody. Never imports onnxruntime by itself: a broken one is among what it looks for, so
whatever touches it happens in a process that may die.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import re
import resource
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from importlib import metadata
from pathlib import Path

from lom_server.config import UNIX_SCHEME, ServerConfig, host_and_port, is_unix
from lom_server.control import ControlError
from lom_server.edges.authentication import read_tokens, server_credentials
from lom_server.errors import StartError
from lom_server.proof import prove
from lom_server.repository import open_repository

_PACKAGE_FLOORS = {"grpcio": "1.76", "protobuf": "6.31.1", "numpy": "2.0"}
_RUNTIME_WHEELS = ("onnxruntime", "onnxruntime-gpu")
_DESCRIPTORS_PER_CONNECTION = 4
_COARSEST_CLOCK_S = 1e-6
_RENEW_CERTIFICATE = timedelta(days=14)
_PROBE_LIMIT_S = 60.0
_LONGEST_LINE = 300
_CLOCK_UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

# y = x: an ONNX graph of one Identity node over float[1].
_IDENTITY_GRAPH = (
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112040a02"
    "080142040a001011"
)
# The engine comes first: what it does to the runtime as it is imported belongs to what is probed.
_PROBE = """
import json, sys
import lom_server.engine
import onnxruntime
available = onnxruntime.get_available_providers()
wanted, graph = sys.argv[1:]
session = wanted in available and onnxruntime.InferenceSession(bytes.fromhex(graph), providers=[wanted])
effective = session.get_providers()[0] if session else None
print(json.dumps({"version": onnxruntime.__version__, "available": available, "effective": effective}))
"""


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    FAIL = "FAIL"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check.

    Attributes:
        found: what is the case.
        advice: what to do; empty where there is nothing to do.
    """

    level: Level
    subject: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.level:<8} {self.subject}: {self.found}{advice}"


def run_doctor(config: ServerConfig) -> int:
    """Prints a line for each check; 1 where any of them says FAIL, else 0. Blocks; bundles take seconds each."""
    worst = 0
    for finding in examine(config):
        print(finding, flush=True)
        worst = max(worst, int(finding.level is Level.FAIL))
    return worst


def examine(config: ServerConfig) -> Iterator[Finding]:
    """Every finding, as it is found."""
    yield from _examine_packages()
    yield from _examine_wheels(config)
    runtime = list(_examine_runtime(config))
    yield from runtime
    yield from _examine_clocks()
    yield from _examine_addresses(config)
    yield from _examine_process(config)
    yield from _examine_tokens(config)
    yield from _examine_certificates(config)
    if any(finding.level is not Level.FAIL for finding in runtime):
        yield from _examine_bundles(config)
    else:
        yield Finding(level=Level.FAIL, subject="models", found="not checked, for want of a provider to run them on")


def _examine_packages() -> Iterator[Finding]:
    for package, floor in _PACKAGE_FLOORS.items():
        version = _installed_version(package)
        if version is None or _release(version) < _release(floor):
            yield Finding(
                level=Level.FAIL,
                subject=package,
                found=f"expected {floor} or newer, got {version or 'none'}",
                advice=f"pip install '{package}>={floor}'",
            )
        else:
            yield Finding(level=Level.OK, subject=package, found=version)


def _examine_wheels(config: ServerConfig) -> Iterator[Finding]:
    installed = {wheel: version for wheel in _RUNTIME_WHEELS if (version := _installed_version(wheel)) is not None}
    level, advice = Level.OK, ""
    if not installed:
        level, advice = Level.FAIL, "pip install 'lom[server]', or 'lom[gpu]' for CUDA"
    elif len(installed) > 1:
        level = Level.FAIL
        advice = "they overwrite each other's files: pip uninstall both, then install the one you want"
    elif config.provider == "cuda" and "onnxruntime-gpu" not in installed:
        level = Level.WARNING if config.allow_provider_fallback else Level.FAIL
        advice = "provider cuda needs onnxruntime-gpu: pip uninstall onnxruntime, pip install 'lom[gpu]'"
    yield Finding(
        level=level,
        subject="onnxruntime wheel",
        found=" and ".join(f"{wheel} {version}" for wheel, version in installed.items()) or "none",
        advice=advice,
    )


def _examine_runtime(config: ServerConfig) -> Iterator[Finding]:
    """Creates a session on each provider that the configuration may mean, in processes of their own."""
    for provider in ("cuda", "cpu") if config.provider == "auto" else (config.provider,):
        wanted = _PROVIDERS[provider]
        subject = f"provider {provider}"
        try:
            probe = subprocess.run(
                [sys.executable, "-c", _PROBE, wanted, _IDENTITY_GRAPH],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PROBE_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            yield Finding(level=Level.FAIL, subject=subject, found=f"no session after {_PROBE_LIMIT_S:g} s")
            continue
        complaint = _last_line(probe.stderr)
        try:
            facts = json.loads(probe.stdout)
        except ValueError:
            yield Finding(
                level=Level.FAIL,
                subject=subject,
                found=f"onnxruntime does not work (exit status {probe.returncode}): {complaint}",
                advice="install its wheel again",
            )
            continue
        if facts["effective"] == wanted:
            yield Finding(
                level=Level.OK, subject=subject, found=f"a session runs on {wanted}, onnxruntime {facts['version']}"
            )
        elif wanted not in facts["available"] and config.provider == "auto":
            yield Finding(level=Level.OK, subject=subject, found="not in this onnxruntime; auto takes the processor")
        else:
            is_demanded = config.provider == provider and not config.allow_provider_fallback
            got = facts["effective"] or f"a runtime that has only {', '.join(facts['available'])}"
            yield Finding(
                level=Level.FAIL if is_demanded else Level.WARNING,
                subject=subject,
                found=f"expected a session on {wanted}, got {got}" + (f": {complaint}" if complaint else ""),
                advice="check the driver, CUDA and cuDNN" if wanted in facts["available"] else "",
            )


def _examine_clocks() -> Iterator[Finding]:
    clock = time.get_clock_info("monotonic")
    is_fine = clock.monotonic and clock.resolution <= _COARSEST_CLOCK_S
    yield Finding(
        level=Level.OK if is_fine else Level.WARNING,
        subject="monotonic clock",
        found=f"resolution {clock.resolution * 1e9:g} ns",
        advice="" if is_fine else "deadlines are only as exact as this clock",
    )
    # All zeros asks and changes nothing; the buffer is longer than any struct timex.
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(1024))
    if state in (-1, _CLOCK_UNSYNCHRONISED):
        yield Finding(
            level=Level.WARNING,
            subject="wall clock",
            found="not known to be synchronised",
            advice="deadlines do not use it, but certificates, traces and logs do: run chrony or systemd-timesyncd",
        )
    else:
        yield Finding(level=Level.OK, subject="wall clock", found="synchronised")


def _examine_addresses(config: ServerConfig) -> Iterator[Finding]:
    for name in ("listen", "admin_listen", "metrics_listen"):
        address = getattr(config, name)
        if not address:
            continue
        try:
            _try_to_listen(name, address)
        except OSError as error:
            yield Finding(
                level=Level.FAIL,
                subject=name,
                found=f"{address} is not to be had: {error.strerror}",
                advice="choose another, or end what uses it",
            )
        else:
            yield Finding(level=Level.OK, subject=name, found=f"{address} is free")


def _try_to_listen(name: str, address: str) -> None:
    """Raises OSError where nobody could listen on `address` now."""
    if not is_unix(address):
        host, port = host_and_port(name, address)
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
        return
    path = Path(address.removeprefix(UNIX_SCHEME))
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OSError(None, f"expected a folder {str(path.parent)!r} to write to")
    if not os.path.lexists(path):
        return
    if not path.is_socket():
        raise OSError(None, "there is a file that is no socket")
    with socket.socket(socket.AF_UNIX) as caller, contextlib.suppress(ConnectionRefusedError):
        # Somebody answers, or it is what a server that was killed left behind.
        caller.connect(str(path))
        raise OSError(None, "another server answers there")


def _examine_process(config: ServerConfig) -> Iterator[Finding]:
    if os.geteuid() == 0:
        yield Finding(
            level=Level.WARNING,
            subject="user",
            found="root",
            advice="whatever goes wrong in a graph or a library goes wrong as root: use an account of its own",
        )
    else:
        yield Finding(level=Level.OK, subject="user", found=f"uid {os.geteuid()}")
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS_PER_CONNECTION * config.max_connections
    is_enough = limit == resource.RLIM_INFINITY or limit >= wanted
    yield Finding(
        level=Level.OK if is_enough else Level.FAIL,
        subject="file descriptors",
        found=f"limit {limit}, max_connections {config.max_connections} wants {wanted}",
        advice="" if is_enough else f"ulimit -n {wanted}, LimitNOFILE={wanted}, or fewer max_connections",
    )


def _examine_tokens(config: ServerConfig) -> Iterator[Finding]:
    if config.tokens is None:
        return
    try:
        tokens = read_tokens(config.tokens)
    except StartError as error:
        yield Finding(level=Level.FAIL, subject="tokens", found=str(error))
    else:
        yield Finding(level=Level.OK, subject="tokens", found=f"{config.tokens} holds {len(tokens.identities)}")


def _examine_certificates(config: ServerConfig) -> Iterator[Finding]:
    if config.tls_certificate is None or config.tls_key is None:
        return
    try:
        server_credentials(config)
    except StartError as error:
        yield Finding(level=Level.FAIL, subject="tls_certificate", found=str(error))
        return
    yield _certificate_age("tls_certificate", config.tls_certificate)
    if config.tls_client_ca is not None:
        yield _certificate_age("tls_client_ca", config.tls_client_ca)
    mode = stat.S_IMODE(config.tls_key.stat().st_mode)
    is_private = not mode & 0o077
    yield Finding(
        level=Level.OK if is_private else Level.WARNING,
        subject="tls_key",
        found=f"{config.tls_key} has mode {mode:04o}",
        advice="" if is_private else f"others may read it: chmod 600 {config.tls_key}",
    )


def _certificate_age(subject: str, path: Path) -> Finding:
    """How long every certificate in the PEM file at `path` is valid."""
    try:
        from cryptography.x509 import load_pem_x509_certificates
    except ImportError:
        return Finding(
            level=Level.WARNING,
            subject=subject,
            found=f"{path} loads; until when it is valid was not looked at",
            advice="pip install 'lom[signing]' to have that checked",
        )
    certificates = load_pem_x509_certificates(path.read_bytes())
    begin = max(certificate.not_valid_before_utc for certificate in certificates)
    end = min(certificate.not_valid_after_utc for certificate in certificates)
    now = datetime.now(UTC)
    level = Level.OK
    if not begin <= now < end:
        level = Level.FAIL
    elif end - now < _RENEW_CERTIFICATE:
        level = Level.WARNING
    return Finding(
        level=level,
        subject=subject,
        found=f"{path} is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}",
        advice="" if level is Level.OK else "renew it",
    )


def _examine_bundles(config: ServerConfig) -> Iterator[Finding]:
    """Proves every bundle as the server will: in a process of its own, within the configured time and memory."""
    try:
        policies = open_repository(config.models).scan()
    except StartError as error:
        yield Finding(level=Level.FAIL, subject="models", found=str(error))
        return
    if not policies:
        yield Finding(
            level=Level.FAIL,
            subject="models",
            found=f"{config.models} holds no bundle",
            advice="expected manifest.json in it, or folders POLICY/VERSION/ of bundles",
        )
    for policy, versions in policies.items():
        for version, folder in versions.items():
            yield _bundle_finding(f"bundle {policy}/{version}", folder, config)


def _bundle_finding(subject: str, folder: Path, config: ServerConfig) -> Finding:
    try:
        proof = asyncio.run(prove(folder, config))
    except ControlError as error:
        return Finding(level=Level.FAIL, subject=subject, found=_last_line(str(error)))
    return Finding(level=Level.OK, subject=subject, found=f"proved on {proof.provider}, digest {proof.digest[:12]}")


def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: enough to compare it with a floor."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def _last_line(text: str) -> str:
    """The last line of somebody else's complaint, short and printable."""
    lines = text.strip().splitlines() or [""]
    line = "".join(character if character.isprintable() else "?" for character in lines[-1])
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..."
