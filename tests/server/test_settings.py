"""`lom_server.settings`: command line before environment before file before default."""

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from lom_server.config import ServerConfig
from lom_server.settings import Settings, SettingsError, read_settings


def settings(*arguments: str, file: str | None = None, folder: Path | None = None, **environ: str) -> Settings:
    """The settings of a command line, of variables without their prefix, and of a file with this content."""
    variables = {f"LOM_SERVE_{name}": text for name, text in environ.items()}
    if file is not None:
        assert folder is not None
        (folder / "serve.toml").write_text(file)
        arguments = (*arguments, "--config", str(folder / "serve.toml"))
    return read_settings(arguments, variables)


def refusal(*arguments: str, file: str | None = None, folder: Path | None = None, **environ: str) -> str:
    with pytest.raises(SettingsError) as error:
        settings(*arguments, file=file, folder=folder, **environ)
    assert str(error.value).isprintable()
    return str(error.value)


def test_a_path_is_enough() -> None:
    read = settings("models")
    assert read.config == ServerConfig(models=Path("models"))
    assert read.sources["models"] == "cli"
    assert {read.sources[field.name] for field in fields(ServerConfig)} == {"cli", "default"}
    assert not read.print_config


def test_each_source_gives_way_to_the_one_before_it(tmp_path: Path) -> None:
    file = 'models = "of the file"\nworkers = 2\nmax_queue_rows = 5000\ngrace_s = 3\n'
    read = settings("--workers", "4", file=file, folder=tmp_path, WORKERS="3", MAX_QUEUE_ROWS="6000")
    assert read.config == ServerConfig(models=Path("of the file"), workers=4, max_queue_rows=6000, grace_s=3.0)
    assert {name: source for name, source in read.sources.items() if source != "default"} == {
        "models": "file",
        "workers": "cli",
        "max_queue_rows": "env",
        "grace_s": "file",
    }


def test_a_value_equal_to_the_default_still_overrides(tmp_path: Path) -> None:
    read = settings("models", "--workers", "1", "--no-traces", file="workers = 2\ntraces = true\n", folder=tmp_path)
    assert (read.config.workers, read.config.traces) == (1, False)
    assert (read.sources["workers"], read.sources["traces"]) == ("cli", "cli")


def test_a_list_of_keys_replaces_the_list_before_it(tmp_path: Path) -> None:
    file = 'trusted_keys = ["file.pem"]\npin = ["fork=1"]\n'
    read = settings("models", "--trusted-keys", "a.pem", "--trusted-keys", "b.pem", file=file, folder=tmp_path)
    assert read.config.trusted_keys == (Path("a.pem"), Path("b.pem"))
    assert read.config.pin == ("fork=1",)


def test_the_environment_has_every_kind_of_value() -> None:
    read = settings(
        MODELS="models",
        TRUSTED_KEYS="a.pem, b.pem,",
        PIN="fork=1",
        INSECURE="true",
        TRACES="False",
        GRACE_S="0.5",
        MAX_BATCH_ROWS="16",
        PROVIDER="cpu",
        TOKENS="tokens",
    )
    assert read.config == ServerConfig(
        models=Path("models"),
        trusted_keys=(Path("a.pem"), Path("b.pem")),
        pin=("fork=1",),
        insecure=True,
        grace_s=0.5,
        max_batch_rows=16,
        provider="cpu",
        tokens=Path("tokens"),
    )


def test_an_empty_variable_unsets_what_the_file_set(tmp_path: Path) -> None:
    file = 'tokens = "tokens"\nadmin_listen = "unix:/run/admin.sock"\ntrusted_keys = ["a.pem"]\n'
    read = settings("models", file=file, folder=tmp_path, TOKENS="", ADMIN_LISTEN="", TRUSTED_KEYS="")
    assert (read.config.tokens, read.config.admin_listen, read.config.trusted_keys) == (None, "", ())


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("workers = 2")
    (tmp_path / "b.toml").write_text("workers = 3")
    assert settings("models", CONFIG=str(tmp_path / "a.toml")).config.workers == 2
    both = settings("models", "--config", str(tmp_path / "b.toml"), CONFIG=str(tmp_path / "a.toml"))
    assert both.config.workers == 3
    assert settings("models", CONFIG="").config.workers == 1


def test_other_variables_are_nobodys_business() -> None:
    assert read_settings(["models"], {"PATH": "/bin", "LOM_SERVER_WORKERS": "x"}).config.workers == 1


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({"WORKERS": "two"}, "LOM_SERVE_WORKERS: expected an integer, got 'two'"),
        ({"WORKERS": ""}, "LOM_SERVE_WORKERS: expected an integer, got ''"),
        ({"WORKERS": "65"}, "LOM_SERVE_WORKERS: expected 1 to 64, got 65"),
        ({"GRACE_S": "nan"}, "LOM_SERVE_GRACE_S: expected 0 to 3600, got nan"),
        ({"INSECURE": "1"}, "LOM_SERVE_INSECURE: expected true or false, got '1'"),
        ({"PROVIDER": "tpu"}, "LOM_SERVE_PROVIDER: expected one of auto, cpu, cuda, got 'tpu'"),
        ({"PIN": "fork=1,fork=2"}, "LOM_SERVE_PIN: expected each policy once, got fork=1, fork=2"),
        (
            {"WORKER": "2"},
            "environment: expected the name of a setting, got 'LOM_SERVE_WORKER'; did you mean LOM_SERVE_WORKERS?",
        ),
        (
            {"workers": "2"},
            "environment: expected the name of a setting, got 'LOM_SERVE_workers'; did you mean LOM_SERVE_WORKERS?",
        ),
    ],
)
def test_a_variable_that_is_wrong_is_named(environ: dict[str, str], line: str) -> None:
    with pytest.raises(SettingsError) as error:
        read_settings(["models"], {f"LOM_SERVE_{name}": text for name, text in environ.items()})
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("content", "end"),
    [
        ("workers = 65", ": workers: expected 1 to 64, got 65"),
        ('workers = "2"', ": workers: expected an integer, got '2'"),
        ("[workers]\nnumber = 2", ": workers: expected an integer, got {'number': 2}"),
        ("worker = 2", ": expected the name of a setting, got 'worker'; did you mean workers?"),
        ("zzz = 2", ": expected the name of a setting, got 'zzz'"),
        ("config = 'other.toml'", ": expected the name of a setting, got 'config'"),
        ('"a\\nb" = 2', ": expected the name of a setting, got 'a\\nb'"),
        ("workers = ", ": expected TOML, got: Invalid value (at end of document)"),
        ('listen = "a\\nb"', ": listen: expected printable characters, got 'a\\nb'"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, content: str, end: str) -> None:
    assert refusal("models", file=content, folder=tmp_path) == f"--config '{tmp_path}/serve.toml'{end}"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "huge").write_bytes(b"#" * (1024 * 1024 + 1))
    (tmp_path / "deep").write_text("workers = " + "[" * 100_000)
    for name in ("nowhere", ".", "binary", "huge", "deep"):
        assert refusal("models", "--config", str(tmp_path / name)).startswith("--config '"), name


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("models", "--workers", "65"), "--workers: expected 1 to 64, got 65"),
        (("models", "--max-batch-rows", "0"), "--max-batch-rows: expected 1 to 65536, got 0"),
        (("models", "--provider", "cuda"), "--load-memory-mb: expected 0 with provider cuda"),
        (("a\nb",), "PATH: expected printable characters, got 'a\\nb'"),
        ((), "PATH: expected the folder of a bundle or repository"),
    ],
)
def test_an_option_that_is_wrong_is_named(arguments: tuple[str, ...], line: str) -> None:
    assert refusal(*arguments).startswith(line)


def test_a_contradiction_names_the_source_of_the_field_at_fault(tmp_path: Path) -> None:
    file = 'models = "models"\nlisten = "unix:/run/lom.sock"\n'
    assert refusal(file=file, folder=tmp_path, WORKERS="2").startswith("LOM_SERVE_WORKERS: expected 1 on a Unix socket")


@pytest.mark.parametrize(
    "arguments",
    [("--no-such-option",), ("--workers", "many"), ("--provider", "tpu"), ("--trusted-keys",), ("--workers",)],
)
def test_a_command_line_that_cannot_be_read_ends_with_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as ended:
        settings("models", *arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        settings("--help")
    assert ended.value.code == 0
    help_text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    for field in fields(ServerConfig):
        assert field.name == "models" or f"--{field.name.replace('_', '-')}" in help_text, field.name
    assert "Serving processes that share the port (1 to 64)." in help_text
    for default in ("127.0.0.1:8001", "none", "false", "10.0"):
        assert f"(default: {default})" in help_text
    assert "--print-config" in help_text
    assert "--no-print-config" not in help_text


def test_what_is_printed_is_a_configuration_file_again(tmp_path: Path) -> None:
    first = settings(
        "a \"path\" with 'quotes', a \\ and 漢字",
        "--listen", "0.0.0.0:8001",
        "--trusted-keys", "a.pem",
        "--trusted-keys", "b.pem",
        "--tls-certificate", "server.pem",
        "--tls-key", "server.key",
        "--tokens", "tokens",
        "--print-config",
        file='grace_s = 1e-5\npin = ["fork=3"]\n',
        folder=tmp_path,
        WORKERS="2",
    )  # fmt: skip
    assert first.print_config
    text = first.to_toml()
    again = settings(file=text, folder=tmp_path)
    assert again.config == first.config
    lines = text.splitlines()
    assert len(lines) == len(fields(ServerConfig))
    assert "workers = 2  # env" in lines
    assert "grace_s = 1e-05  # file" in lines
    assert 'trusted_keys = ["a.pem", "b.pem"]  # cli' in lines
    assert "max_connections = 256  # default" in lines
    assert "# tls_client_ca: not set  # default" in lines
    assert "tls_client_ca" not in tomllib.loads(text)


def test_reading_settings_starts_no_runtime() -> None:
    program = (
        "import os, sys\n"
        "from lom_server.settings import read_settings\n"
        "read_settings(['models'], {})\n"
        "print(*sorted({'onnxruntime', 'grpc', 'numpy'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == "\n"
