"""`lom_server.admin_client`: what an operator types, what is printed, and with which status it ends."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lom_server.admin_client import ADMIN_VARIABLE, COMMANDS, run_command
from tests.support.bundles import Flaws, write_test_bundle
from tests.support.certificates import CertificateAuthority
from tests.support.servers import PATIENCE_S, ServerProcess, running_server

ACT_LINE, ADMIN_LINE = f"act robot {'a' * 16}\n", f"admin operator {'b' * 16}\n"


@dataclass(kw_only=True)
class Server:
    """A server with an admin socket, and a repository that tests add policies to, each its own."""

    process: ServerProcess
    repository: Path
    admin: str

    def write(self, policy: str, *versions: int, flaws: Flaws | None = None) -> list[str]:
        """Adds versions to the repository, and returns how their digests are shown."""
        return [
            write_test_bundle(self.repository / policy / str(version), policy=policy, flaws=flaws)[:12]
            for version in versions
        ]


@dataclass(kw_only=True)
class SecureServer:
    """A server whose admin listener wants TLS and a token."""

    admin: str
    authority: Path
    tokens: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    write_test_bundle(folder / "models" / "toy" / "1")
    admin = f"unix:{folder}/admin.sock"
    with running_server(folder / "models", "--max-batch-rows", "16", "--admin-listen", admin) as process:
        yield Server(process=process, repository=folder / "models", admin=admin)


@pytest.fixture(scope="module")
def secure_server(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    folder = tmp_path_factory.mktemp("secure")
    authority = CertificateAuthority(folder / "authority")
    files = authority.server()
    tokens = written_tokens(folder, ACT_LINE + ADMIN_LINE)
    with running_server(
        *(toy_bundle, "--max-batch-rows", "16", "--admin-listen", "127.0.0.1:0", "--tokens", str(tokens)),
        *("--tls-certificate", str(files.certificate), "--tls-key", str(files.key)),
    ) as process:
        admin = process.stdout[0].split(" admin=")[1].split()[0]
        yield SecureServer(admin=admin, authority=authority.certificate, tokens=tokens)


def written_tokens(folder: Path, text: str) -> Path:
    path = folder / "tokens"
    path.write_text(text)
    path.chmod(0o600)
    return path


@dataclass(kw_only=True)
class Outcome:
    status: int
    stdout: list[str]
    stderr: list[str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    monkeypatch.delenv(ADMIN_VARIABLE, raising=False)

    def run(command: str, *arguments: str) -> Outcome:
        status = run_command(command, arguments, "lom-serve")
        output = capsys.readouterr()
        return Outcome(status=status, stdout=output.out.splitlines(), stderr=output.err.splitlines())

    return run


def refusal(outcome: Outcome, status: int = 1) -> str:
    """The one line that says why, without the program's name."""
    assert outcome.status == status
    assert outcome.stdout == []
    (line,) = outcome.stderr
    assert line.startswith("lom-serve: ")
    return line.removeprefix("lom-serve: ")


def test_every_command_prints_what_it_left(server: Server, run: Callable[..., Outcome]) -> None:
    one, two = server.write("arm", 1, 2)
    admin = ("--admin", server.admin)
    for command, shown in (
        (("load", "arm", "1"), [f"arm/1: ready (default, a restart would choose another) {one}", "arm/2: on disk"]),
        (
            ("load", "arm"),
            [f"arm/1: ready (default, a restart would choose another) {one}", f"arm/2: ready {two}"],
        ),
        (("promote", "arm", "2"), [f"arm/1: ready (previous) {one}", f"arm/2: ready (default) {two}"]),
        (("rollback", "arm"), [f"arm/1: ready (default) {one}", f"arm/2: ready (previous) {two}"]),
        (("unload", "arm", "2"), [f"arm/1: ready (default) {one}", "arm/2: on disk"]),
        (("load", "arm", "2", "--promote"), [f"arm/1: ready (previous) {one}", f"arm/2: ready (default) {two}"]),
        (
            ("unload", "arm", "2", "--force"),
            [f"arm/1: ready (default, a restart would choose another) {one}", "arm/2: on disk"],
        ),
        (("unload", "arm", "--force"), ["arm/1: on disk", "arm/2: on disk"]),
    ):
        outcome = run(*command, *admin)
        assert (outcome.status, outcome.stderr) == (0, [])
        assert outcome.stdout == shown, command


def test_the_list_shows_all_policies_with_what_went_wrong(server: Server, run: Callable[..., Outcome]) -> None:
    server.write("wrong", 3, flaws=Flaws(wrong_golden=True))
    server.write("untouched", 1)
    assert refusal(run("load", "wrong", "--admin", server.admin)).startswith("SELF_TEST_FAILED: ")
    lines = run("list", "--admin", server.admin).stdout
    assert lines == sorted(lines)
    assert "wrong/3: failed (SELF_TEST_FAILED)" in lines
    assert "untouched/1: on disk" in lines


def test_a_policy_that_is_nowhere_any_more_is_said_to_be(server: Server, run: Callable[..., Outcome]) -> None:
    server.write("gone", 1)
    assert run("load", "gone", "--admin", server.admin).status == 0
    (server.repository / "gone").rename(server.repository.parent / "gone")
    outcome = run("unload", "gone", "--force", "--admin", server.admin)
    assert (outcome.status, outcome.stdout) == (0, ["gone: nothing loaded, nothing on disk"])


def test_the_environment_may_name_the_server(
    server: Server, run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        refusal(run("list"), status=2) == f"expected --admin unix:/PATH or HOST:PORT, or {ADMIN_VARIABLE}, got neither"
    )
    monkeypatch.setenv(ADMIN_VARIABLE, server.admin)
    assert run("list").status == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("load", "unknown"), "BUNDLE_NOT_FOUND"),
        (("load", "../toy"), "BUNDLE_NOT_FOUND"),
        (("load", "toy", "7"), "BUNDLE_NOT_FOUND"),
        (("unload", "toy"), "LAST_VERSION"),
        (("unload", "toy", "1"), "LAST_VERSION"),
        (("unload", "toy", "7"), "VERSION_NOT_FOUND"),
        (("promote", "toy", "0"), "VERSION_NOT_FOUND"),
        (("promote", "unknown", "1"), "MODEL_NOT_FOUND"),
        (("rollback", "toy"), "NO_PREVIOUS_VERSION"),
        (("rollback", ""), "MODEL_NOT_FOUND"),
    ],
)
def test_a_refusal_is_the_servers_own_line(
    server: Server, run: Callable[..., Outcome], arguments: tuple[str, ...], reason: str
) -> None:
    assert refusal(run(*arguments, "--admin", server.admin)).startswith(f"{reason}: ")


@pytest.mark.parametrize(
    "arguments", [("load", "toy", "-1"), ("load", "toy", "99999999999999999999"), ("load", "toy\udcff")]
)
def test_what_no_request_could_carry_is_not_sent(
    server: Server, run: Callable[..., Outcome], arguments: tuple[str, ...]
) -> None:
    line = refusal(run(*arguments, "--admin", server.admin), status=2)
    assert line == "expected names in UTF-8 and a version of 0 to 2147483647"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("arguments", [("--nonsense",), ("--admin",), ("one", "two", "three", "four")])
def test_a_command_line_that_cannot_be_meant_ends_with_2(
    run: Callable[..., Outcome], capsys: pytest.CaptureFixture[str], command: str, arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(command, *arguments)
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("admin", ["unix:/nowhere", "127.0.0.1:1", "nonsense", "nonsense:nonsense", "unix:"])
def test_where_no_server_is_is_said(run: Callable[..., Outcome], admin: str) -> None:
    assert refusal(run("list", "--admin", admin)).startswith(f"no answer from {admin}: expected ")


def test_the_port_of_robots_is_no_admin_listener(server: Server, run: Callable[..., Outcome]) -> None:
    assert refusal(run("list", "--admin", server.process.address)).startswith("no answer from ")


def test_tls_and_a_token_open_a_secured_server(secure_server: SecureServer, run: Callable[..., Outcome]) -> None:
    keys = ("--tls-ca", str(secure_server.authority), "--tokens", str(secure_server.tokens))
    outcome = run("list", "--admin", secure_server.admin, *keys)
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout[0].startswith("toy/1: ready (default) ")


def test_what_does_not_open_it_is_said(
    secure_server: SecureServer, run: Callable[..., Outcome], tmp_path: Path
) -> None:
    (tmp_path / "garbage").write_text("no certificate\n")
    (tmp_path / "bytes").write_bytes(b"\xff\x00")
    stranger = CertificateAuthority(tmp_path / "stranger").certificate
    authority = ("--tls-ca", str(secure_server.authority))
    for number, text in enumerate((ACT_LINE, f"admin other {'c' * 16}\n", "nonsense\n")):
        (tmp_path / str(number)).mkdir()
        written_tokens(tmp_path / str(number), text)
    admin = ("--admin", secure_server.admin)
    nobody = "no answer from "
    for options, reason in (
        ((), nobody),  # plaintext
        (("--tls-ca", str(stranger)), nobody),
        (("--tls-ca", str(tmp_path / "garbage")), "BAD_CERTIFICATE: "),
        (("--tls-ca", str(tmp_path / "bytes")), "BAD_CERTIFICATE: "),
        (("--tls-ca", str(tmp_path / "absent")), "[Errno 2] No such file or directory"),
        (("--tls-ca", str(tmp_path)), "[Errno 21] Is a directory"),
        (authority, "AUTH_REQUIRED: "),
        ((*authority, "--tokens", str(tmp_path / "0" / "tokens")), "BAD_TOKENS: "),  # no admin's among them
        ((*authority, "--tokens", str(tmp_path / "1" / "tokens")), "AUTH_REQUIRED: "),  # not the server's
        ((*authority, "--tokens", str(tmp_path / "2" / "tokens")), "BAD_TOKENS: "),
        ((*authority, "--tokens", str(tmp_path / "absent")), "BAD_TOKENS: "),
    ):
        assert refusal(run("list", *admin, *options)).startswith(reason), options


def test_the_program_ends_with_the_commands_status() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "lom_server", "list", "--admin", "unix:/nowhere"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("lom-serve: no answer from unix:/nowhere: ")
    assert len(ended.stderr.splitlines()) == 1
