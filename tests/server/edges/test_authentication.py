"""`lom_server.edges.authentication`: tokens and certificates, through real sockets wherever a caller is involved."""

import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lom_api.reasons import Reason
from lom_server.config import ServerConfig
from lom_server.edges.authentication import (
    MIN_TOKEN_CHARACTERS,
    Authenticator,
    Identity,
    Role,
    Tokens,
    read_tokens,
    server_credentials,
)
from lom_server.edges.listener import Call, Listener, ListenerLimits
from lom_server.errors import StartError
from tests.support.certificates import CertificateAuthority, CertificateFiles

PATIENCE_S = 20.0
ACT_TOKEN = "act-token-0123456789"
ADMIN_TOKEN = "admin-token-0123456789"
NEW_TOKEN = "new-token-0123456789"
TOKENS = f"# who may call\n\nact robot-1 {ACT_TOKEN}\n  admin operator\t{ADMIN_TOKEN}\n"
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def write_tokens(path: Path, text: str = TOKENS, mode: int = 0o600) -> Path:
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    return write_tokens(tmp_path / "tokens")


# The file.


def test_a_token_has_its_identity(token_file: Path) -> None:
    tokens = read_tokens(token_file)
    assert tokens.identity_of(ACT_TOKEN) == Identity(name="robot-1", role=Role.ACT)
    assert tokens.identity_of(ADMIN_TOKEN) == Identity(name="operator", role=Role.ADMIN)
    for wrong in ("", ACT_TOKEN[:-1], ACT_TOKEN + "0", ACT_TOKEN.upper(), "robot-1", "\u0430ct-token-0123456789"):
        assert tokens.identity_of(wrong) is None


def test_an_admin_may_act_and_not_the_other_way_round() -> None:
    assert Role.ADMIN.includes(Role.ACT)
    assert Role.ADMIN.includes(Role.ADMIN)
    assert Role.ACT.includes(Role.ACT)
    assert not Role.ACT.includes(Role.ADMIN)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o644, 0o666])
def test_a_file_that_others_reach_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(StartError, match=rf"^TOKENS_UNSAFE: .*: expected mode 0600 or 0400, got {mode:04o}$"):
        read_tokens(write_tokens(tmp_path / "tokens", mode=mode))


def test_a_file_that_may_not_be_written_is_fine(tmp_path: Path) -> None:
    assert read_tokens(write_tokens(tmp_path / "tokens", mode=0o400)).identity_of(ACT_TOKEN)


BAD_FILES: Mapping[str, tuple[str, str]] = {
    "empty": ("", "expected one token or more, got none"),
    "only comments": ("# act robot-1 x\n", "expected one token or more, got none"),
    "two words": (f"act {ACT_TOKEN}", "line 1: expected ROLE NAME TOKEN, got 2 words"),
    "four words": (f"\nact robot-1 {ACT_TOKEN} more", "line 2: expected ROLE NAME TOKEN, got 4 words"),
    "unknown role": (f"root robot-1 {ACT_TOKEN}", "line 1: expected a role of act or admin"),
    "role and token swapped": (f"{ACT_TOKEN} robot-1 act", "line 1: expected a role of act or admin"),
    "name and token swapped": (f"act {'T' * 20} robot-1", r"line 1: expected a name of \[a-z0-9_-\]\{1,32\}"),
    "long name": (f"act {'n' * 33} {ACT_TOKEN}", r"line 1: expected a name of"),
    "short token": (f"act robot-1 {'t' * (MIN_TOKEN_CHARACTERS - 1)}", "line 1: expected a token of 16 characters"),
    "name twice": (f"act a {ACT_TOKEN}\nact a {NEW_TOKEN}", "line 2: expected a name that no other line has"),
    "token twice": (f"act a {ACT_TOKEN}\nadmin b {ACT_TOKEN}", "line 2: expected a token that no other line has"),
    "not ASCII": ("act robot-1 t\u00f6ken-0123456789abc", "expected a readable file of ASCII text"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_without_a_word_of_it(tmp_path: Path, name: str) -> None:
    text, problem = BAD_FILES[name]
    with pytest.raises(StartError, match=rf"^BAD_TOKENS: .*{problem}") as error:
        read_tokens(write_tokens(tmp_path / "file", text))
    for word in text.split():
        if len(word) >= MIN_TOKEN_CHARACTERS - 1:
            assert word not in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"^BAD_TOKENS: .*expected a readable file"):
        Authenticator(tmp_path / "none")


def test_tokens_are_in_no_representation(token_file: Path) -> None:
    tokens, authenticator = read_tokens(token_file), Authenticator(token_file)
    for shown in (repr(tokens), str(tokens), repr(authenticator), repr(vars(authenticator)), repr(Tokens)):
        assert ACT_TOKEN not in shown
    assert ACT_TOKEN not in repr(tokens.identities)
    assert repr(tokens) == "Tokens()"


# Callers with tokens.


@asynccontextmanager
async def listening(
    authenticator: Authenticator | None = None,
    credentials: grpc.ServerCredentials | None = None,
    observe_refusal: Callable[[Reason], None] = lambda _: None,
) -> AsyncIterator[tuple[str, list[str]]]:
    """The address of a listener with a method for each role, and the list of who called."""
    callers: list[str] = []

    async def who(_: bytes, call: Call) -> bytes:
        callers.append(call.client)
        return call.client.encode()

    async def talk(messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[bytes]:
        async for _ in messages:
            yield call.client.encode()

    listener = Listener(
        ListenerLimits.of(ServerConfig(models=Path("unused"))),
        authenticator=authenticator,
        credentials=credentials,
        observe_refusal=observe_refusal,
    )
    listener.add_service("test.Act", unary={"Who": who}, streams={"Talk": talk}, role=Role.ACT)
    listener.add_service("test.Admin", unary={"Who": who}, streams={"Talk": talk}, role=Role.ADMIN)
    try:
        yield await listener.listen("127.0.0.1:0"), callers
    finally:
        await listener.drain(0)


async def asked(channel: Any, method: str, *values: str) -> str:
    """The name under which the server knows the caller, who sends `values` as its authorization."""
    metadata = tuple(("authorization", value) for value in values)
    if method.endswith("/Talk"):
        stream = channel.stream_stream(method)(metadata=metadata, timeout=PATIENCE_S)
        await stream.write(b"")
        return str((await stream.read()).decode())
    return str((await channel.unary_unary(method)(b"", metadata=metadata, timeout=PATIENCE_S)).decode())


ACT_METHODS = ("/test.Act/Who", "/test.Act/Talk")
ADMIN_METHODS = ("/test.Admin/Who", "/test.Admin/Talk")


async def test_who_may_call_what(token_file: Path) -> None:
    refused: list[Reason] = []
    async with (
        listening(Authenticator(token_file), observe_refusal=refused.append) as (address, callers),
        grpc.aio.insecure_channel(address) as channel,
    ):
        for method in ACT_METHODS:
            assert await asked(channel, method, f"Bearer {ACT_TOKEN}") == "robot-1"
        for method in ACT_METHODS + ADMIN_METHODS:
            assert await asked(channel, method, f"bearer {ADMIN_TOKEN}") == "operator"
        assert refused == []
        called = len(callers)
        for method in ADMIN_METHODS:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await asked(channel, method, f"Bearer {ACT_TOKEN}")
            assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert error.value.details() == "ROLE_REQUIRED: expected a token of role admin"
        assert refused == [Reason.ROLE_REQUIRED] * 2
        assert len(callers) == called


NO_TOKEN: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "empty": ("",),
    "no scheme": (ACT_TOKEN,),
    "another scheme": (f"Basic {ACT_TOKEN}",),
    "wrong": ("Bearer wrong-token-0123456789",),
    "nearly right": (f"Bearer {ACT_TOKEN[:-1]}",),
    "two spaces": (f"Bearer  {ACT_TOKEN}",),
    "several at once": (f"Bearer {ACT_TOKEN} {ADMIN_TOKEN}",),
    "two headers": (f"Bearer {ACT_TOKEN}", f"Bearer {ADMIN_TOKEN}"),
    "only the scheme": ("Bearer",),
}


async def test_no_token_and_a_wrong_one_are_told_the_same(token_file: Path) -> None:
    answers = set()
    refused: list[Reason] = []
    async with (
        listening(Authenticator(token_file), observe_refusal=refused.append) as (address, callers),
        grpc.aio.insecure_channel(address) as channel,
    ):
        for method in ACT_METHODS + ADMIN_METHODS:
            for values in NO_TOKEN.values():
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await asked(channel, method, *values)
                answers.add((error.value.code(), error.value.details(), tuple(error.value.trailing_metadata() or ())))
        assert callers == []
    assert len(answers) == 1
    code, message, _ = answers.pop()
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert str(message).startswith("AUTH_REQUIRED: ")
    assert set(refused) == {Reason.AUTH_REQUIRED}
    assert len(refused) == 4 * len(NO_TOKEN)


async def test_health_needs_no_token(token_file: Path) -> None:
    async with (
        listening(Authenticator(token_file)) as (address, _),
        grpc.aio.insecure_channel(address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)).status == NOT_SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert (await watch.read()).status == NOT_SERVING


async def test_reloaded_tokens_replace_the_old_ones(token_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    authenticator = Authenticator(token_file)
    async with listening(authenticator) as (address, _), grpc.aio.insecure_channel(address) as channel:
        write_tokens(token_file, f"act robot-2 {NEW_TOKEN}\n")
        assert await asked(channel, "/test.Act/Who", f"Bearer {ACT_TOKEN}") == "robot-1"  # not before it is told
        authenticator.reload()
        assert await asked(channel, "/test.Act/Who", f"Bearer {NEW_TOKEN}") == "robot-2"
        with pytest.raises(grpc.aio.AioRpcError):
            await asked(channel, "/test.Act/Who", f"Bearer {ACT_TOKEN}")
        for spoil in (
            lambda: write_tokens(token_file, f"act robot-3 {ADMIN_TOKEN}\nrubbish {ACT_TOKEN}\n"),
            lambda: write_tokens(token_file, mode=0o644),
            token_file.unlink,
        ):
            spoil()
            authenticator.reload()
            assert await asked(channel, "/test.Act/Who", f"Bearer {NEW_TOKEN}") == "robot-2"
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 3
    assert all("the previous ones stay valid" in record.getMessage() for record in errors)
    for token in (ACT_TOKEN, ADMIN_TOKEN, NEW_TOKEN):
        assert token not in caplog.text


async def test_tokens_are_in_no_log(
    token_file: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    async with (
        listening(Authenticator(token_file)) as (address, _),
        grpc.aio.insecure_channel(address) as channel,
    ):
        await asked(channel, "/test.Act/Who", f"Bearer {ACT_TOKEN}")
        for value in (f"Bearer {NEW_TOKEN}", f"Basic {ACT_TOKEN}"):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await asked(channel, "/test.Act/Who", value)
            assert "0123456789" not in repr(error.value)
    out, err = capfd.readouterr()
    assert "0123456789" not in out + err + caplog.text


# Certificates.


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority(tmp_path / "ca")


def credentials_of(files: CertificateFiles, client_ca: Path | None = None) -> grpc.ServerCredentials:
    credentials = server_credentials(
        ServerConfig(
            models=Path("unused"), tls_certificate=files.certificate, tls_key=files.key, tls_client_ca=client_ca
        )
    )
    assert credentials is not None
    return credentials


def secure_channel(address: str, authority: CertificateAuthority, client: CertificateFiles | None = None) -> Any:
    return grpc.aio.secure_channel(
        address,
        grpc.ssl_channel_credentials(
            authority.certificate.read_bytes(),
            *((client.key.read_bytes(), client.certificate.read_bytes()) if client else ()),
        ),
        [("grpc.use_local_subchannel_pool", 1)],
    )


async def assert_no_handshake(channel: Any) -> None:
    async with channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await asked(channel, "/test.Act/Who")
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE


def test_without_a_certificate_there_is_no_tls() -> None:
    assert server_credentials(ServerConfig(models=Path("unused"))) is None


async def test_tls_serves_who_trusts_the_authority(authority: CertificateAuthority, tmp_path: Path) -> None:
    async with listening(credentials=credentials_of(authority.server())) as (address, _):
        async with secure_channel(address, authority) as channel:
            assert (await asked(channel, "/test.Act/Who")).startswith("ipv4:127.0.0.1:")
        await assert_no_handshake(secure_channel(address, CertificateAuthority(tmp_path / "other")))
        await assert_no_handshake(grpc.aio.insecure_channel(address))


@pytest.mark.parametrize("flaw", [{"host": "127.0.0.2"}, {"is_expired": True}], ids=["another host", "expired"])
async def test_a_client_does_not_take_any_certificate(authority: CertificateAuthority, flaw: dict[str, Any]) -> None:
    async with listening(credentials=credentials_of(authority.server(**flaw))) as (address, _):
        await assert_no_handshake(secure_channel(address, authority))


async def test_mutual_tls_knows_callers_by_their_certificate(authority: CertificateAuthority, tmp_path: Path) -> None:
    other = CertificateAuthority(tmp_path / "other", name="another authority")
    impostor = CertificateAuthority(tmp_path / "impostor")  # of the same name as the right one
    credentials = credentials_of(authority.server(), authority.certificate)
    async with listening(credentials=credentials) as (address, callers):
        async with secure_channel(address, authority, authority.client("robot-7")) as channel:
            assert await asked(channel, "/test.Act/Who") == "robot-7"
            assert await asked(channel, "/test.Act/Talk") == "robot-7"
        for stranger in (
            None,
            other.client("robot-7"),
            impostor.client("robot-7"),
            authority.client("robot-8", is_expired=True),
        ):
            await assert_no_handshake(secure_channel(address, authority, stranger))
        assert callers == ["robot-7"]


async def test_a_token_names_a_caller_before_its_certificate(authority: CertificateAuthority, token_file: Path) -> None:
    credentials = credentials_of(authority.server(), authority.certificate)
    async with (
        listening(Authenticator(token_file), credentials) as (address, _),
        secure_channel(address, authority, authority.client("robot-7")) as channel,
    ):
        assert await asked(channel, "/test.Act/Who", f"Bearer {ACT_TOKEN}") == "robot-1"
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await asked(channel, "/test.Act/Who")  # a certificate is no token
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_rotated_certificate_is_picked_up(
    authority: CertificateAuthority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when its authority is another one, and when the files do not fit together for a while."""
    caplog.set_level(logging.INFO)
    successor = CertificateAuthority(tmp_path / "successor")
    files = authority.server()
    async with (
        listening(credentials=credentials_of(files)) as (address, _),
        secure_channel(address, authority) as old_channel,
    ):
        await asked(old_channel, "/test.Act/Who")
        new_files = successor.server()
        os.replace(new_files.certificate, files.certificate)  # its key comes later
        for _ in range(3):
            async with secure_channel(address, authority) as channel:
                await asked(channel, "/test.Act/Who")
        refusals = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(refusals) == 1
        assert "is not the key of" in refusals[0].getMessage()
        os.replace(new_files.key, files.key)
        async with secure_channel(address, successor) as channel:
            await asked(channel, "/test.Act/Who")
        await assert_no_handshake(secure_channel(address, authority))
        await asked(old_channel, "/test.Act/Who")  # a connection keeps what it began with
        files.key.unlink()
        async with secure_channel(address, successor) as channel:
            await asked(channel, "/test.Act/Who")


async def test_a_rotation_loses_no_call(authority: CertificateAuthority) -> None:
    files = authority.server()
    async with listening(credentials=credentials_of(files)) as (address, _):
        for number in range(100):
            if number % 5 == 0:
                authority.server()
            async with secure_channel(address, authority) as channel:
                for _ in range(10):
                    await asked(channel, "/test.Act/Who")


async def test_a_rotated_client_authority_is_picked_up(authority: CertificateAuthority, tmp_path: Path) -> None:
    successor = CertificateAuthority(tmp_path / "successor")
    client_ca = tmp_path / "clients.pem"
    client_ca.write_bytes(authority.certificate.read_bytes())
    async with listening(credentials=credentials_of(authority.server(), client_ca)) as (address, _):
        await assert_no_handshake(secure_channel(address, authority, successor.client("robot-7")))
        client_ca.write_bytes(successor.certificate.read_bytes())
        async with secure_channel(address, authority, successor.client("robot-7")) as channel:
            assert await asked(channel, "/test.Act/Who") == "robot-7"
        await assert_no_handshake(secure_channel(address, authority, authority.client("robot-7")))


def test_bad_files_are_refused_at_the_start(authority: CertificateAuthority, tmp_path: Path) -> None:
    files, other = authority.server(), authority.server("other")
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_bytes(b"\xff not a PEM file")
    encrypted = tmp_path / "encrypted.pem"
    encrypted.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
    with pytest.raises(StartError, match=r"^BAD_CERTIFICATE: .*other-key\.pem is not the key of .*server\.pem$"):
        credentials_of(CertificateFiles(certificate=files.certificate, key=other.key))
    for certificate, key, client_ca in (
        (rubbish, files.key, None),
        (files.certificate, rubbish, None),
        (files.certificate, encrypted, None),
        (tmp_path / "none", files.key, None),
        (files.certificate, tmp_path / "none", None),
        (files.certificate, files.key, rubbish),
        (files.certificate, files.key, tmp_path / "none"),
    ):
        with pytest.raises(StartError, match=r"^BAD_CERTIFICATE: expected readable PEM files"):
            credentials_of(CertificateFiles(certificate=certificate, key=key), client_ca)
