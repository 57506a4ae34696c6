"""`lom-serve list | load | unload | promote | rollback`: an operator's commands to a running server."""

import os
import ssl
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias, TypedDict

import grpc
import tyro

from lom_api.reasons import Reason
from lom_api.v1 import admin_pb2, admin_pb2_grpc
from lom_server.edges.authentication import Role, read_tokens
from lom_server.errors import StartError
from lom_server.service import LARGEST_VERSION

ADMIN_VARIABLE = "LOM_SERVE_ADMIN_LISTEN"
# A load takes as long as its proof; everything else is over at once.
_LIMIT_S = 600.0

_STATE_NAMES: Mapping[int, str] = {
    admin_pb2.LOAD_STATE_ON_DISK: "on disk",
    admin_pb2.LOAD_STATE_LOADING: "loading",
    admin_pb2.LOAD_STATE_READY: "ready",
    admin_pb2.LOAD_STATE_FAILED: "failed",
}

_Policy: TypeAlias = Annotated[str, tyro.conf.Positional]
_Version: TypeAlias = Annotated[int, tyro.conf.Positional]

Stub: TypeAlias = "admin_pb2_grpc.AdminServiceStub"


class Options(TypedDict):
    """What goes with every call."""

    timeout: float
    metadata: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class _Command(ABC):
    """What every command takes."""

    admin: str = ""
    """unix:/PATH or HOST:PORT that the server got as --admin-listen; by default LOM_SERVE_ADMIN_LISTEN."""

    tokens: Path | None = None
    """File of tokens, as the server's; its first `admin` token is shown."""

    tls_ca: Path | None = None
    """PEM certificate of the authority that signed the server's; TLS is used where it is given."""

    @abstractmethod
    def ask(self, stub: Stub, options: Options) -> Sequence[admin_pb2.PolicyState]:
        """Asks the server; returns what it answers."""


@dataclass(frozen=True, kw_only=True)
class _List(_Command):
    """Show every policy and version, on disk and loaded."""

    def ask(self, stub: Stub, options: Options) -> Sequence[admin_pb2.PolicyState]:
        return stub.ListPolicies(admin_pb2.ListPoliciesRequest(), **options).policies


@dataclass(frozen=True, kw_only=True)
class _Load(_Command):
    """Prove a version of the repository and load it beside the ones that serve."""

    policy: _Policy
    """Its name."""
    version: _Version = 0
    """Its number; 0 for the highest on disk."""
    promote: bool = False
    """Also make it the one that answers requests without a version."""

    def ask(self, stub: Stub, options: Options) -> Sequence[admin_pb2.PolicyState]:
        request = admin_pb2.LoadPolicyRequest(policy=self.policy, version=self.version, promote=self.promote)
        return [stub.LoadPolicy(request, **options)]


@dataclass(frozen=True, kw_only=True)
class _Unload(_Command):
    """Let a version go; what it accepted is finished."""

    policy: _Policy
    """Its name."""
    version: _Version = 0
    """Its number; 0 for every version."""
    force: bool = False
    """Also where it answers requests without a version."""

    def ask(self, stub: Stub, options: Options) -> Sequence[admin_pb2.PolicyState]:
        request = admin_pb2.UnloadPolicyRequest(policy=self.policy, version=self.version, force=self.force)
        return [stub.UnloadPolicy(request, **options)]


@dataclass(frozen=True, kw_only=True)
class _Promote(_Command):
    """Make a loaded version the one that answers requests without a version."""

    policy: _Policy
    """Its name."""
    version: _Version
    """Its number."""

    def ask(self, stub: Stub, options: Options) -> Sequence[admin_pb2.PolicyState]:
        request = admin_pb2.PromotePolicyRequest(policy=self.policy, version=self.version)
        return [stub.PromotePolicy(request, **options)]


@dataclass(frozen=True, kw_only=True)
class _RollBack(_Command):
    """Promote the version that was the default before the last promotion."""

    policy: _Policy
    """Its name."""

    def ask(self, stub: Stub, options: Options) -> Sequence[admin_pb2.PolicyState]:
        return [stub.RollBackPolicy(admin_pb2.RollBackPolicyRequest(policy=self.policy), **options)]


COMMANDS: Mapping[str, type[_Command]] = {
    "list": _List,
    "load": _Load,
    "unload": _Unload,
    "promote": _Promote,
    "rollback": _RollBack,
}


def run_command(name: str, arguments: Sequence[str], program: str) -> int:
    """Carries out one of `COMMANDS`, prints the state that it left, and returns the exit status.

    0, or with a line on stderr that says why: 1 where it was refused, 2 where it cannot be meant.
    """
    chosen = tyro.cli(COMMANDS[name], prog=f"{program} {name}", args=arguments)
    admin = chosen.admin or os.environ.get(ADMIN_VARIABLE, "")
    if not admin:
        print(f"{program}: expected --admin unix:/PATH or HOST:PORT, or {ADMIN_VARIABLE}, got neither", file=sys.stderr)
        return 2
    try:
        with _channel(admin, chosen.tls_ca) as channel:
            options = Options(timeout=_LIMIT_S, metadata=_credentials(chosen.tokens))
            policies = chosen.ask(admin_pb2_grpc.AdminServiceStub(channel), options)
    except grpc.RpcError as error:
        print(f"{program}: {_refusal(error, admin)}", file=sys.stderr)
        return 1
    except (StartError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except ValueError:  # before anything was sent
        print(f"{program}: expected names in UTF-8 and a version of 0 to {LARGEST_VERSION}", file=sys.stderr)
        return 2
    for policy in policies:
        _print_state(policy)
    return 0


def _refusal(error: grpc.RpcError, admin: str) -> str:
    """What the server said; a text without a reason is gRPC's own."""
    details = error.details() or ""
    if details.partition(":")[0] in list(Reason):
        return details
    return (
        f"no answer from {admin}: expected the --admin-listen of a running server, with a certificate that --tls-ca "
        "vouches for where it is HOST:PORT with TLS"
    )


def _channel(admin: str, tls_ca: Path | None) -> grpc.Channel:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    if tls_ca is None:
        return grpc.insecure_channel(admin, options)
    certificates = tls_ca.read_bytes()
    try:
        ssl.create_default_context(cadata=certificates.decode("ascii"))  # gRPC takes any bytes
    except (ssl.SSLError, ValueError):
        raise StartError("BAD_CERTIFICATE", f"{tls_ca}: expected PEM certificates") from None
    return grpc.secure_channel(admin, grpc.ssl_channel_credentials(certificates), options)


def _credentials(tokens: Path | None) -> tuple[tuple[str, str], ...]:
    if tokens is None:
        return ()
    read_tokens(tokens)  # says what is wrong with the file, if anything is
    for line in tokens.read_text("ascii").splitlines():
        role, *rest = line.split() or [""]
        if role == Role.ADMIN:
            return (("authorization", f"Bearer {rest[1]}"),)
    raise StartError("BAD_TOKENS", f"{tokens}: expected a token of role {Role.ADMIN}, got none")


def _print_state(policy: admin_pb2.PolicyState) -> None:
    if not policy.versions:
        print(f"{policy.policy}: nothing loaded, nothing on disk")
    for version in policy.versions:
        is_default = version.version == policy.default_version
        notes = [
            "default" if is_default else "",
            "previous" if version.version == policy.previous_version else "",
            "a restart would choose another" if is_default and not policy.survives_restart else "",
            version.reason,
        ]
        shown = ", ".join(filter(None, notes))
        print(
            f"{policy.policy}/{version.version}: {_STATE_NAMES.get(version.state, '?')}"
            f"{f' ({shown})' if shown else ''} {version.bundle_digest[:12]}".rstrip()
        )
