"""Where a server's choices come from: command line, then environment, then configuration file, then default.

    lom-serve PATH --workers 2         command line
    LOM_SERVE_WORKERS=2                environment; lists are comma-separated
    --config lom-serve.toml            file, also named by LOM_SERVE_CONFIG: `workers = 2`

Every key is a field of `ServerConfig`; paths are relative to the working directory, wherever they are written.
"""

import ast
import difflib
import inspect
import json
import textwrap
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeAlias, TypedDict, get_origin

import tyro

from lom_server.config import FIELD_TYPES, ConfigError, PlainValue, ServerConfig, from_plain

Source: TypeAlias = Literal["cli", "env", "file", "default"]

ENVIRONMENT_PREFIX = "LOM_SERVE_"

_CONFIG_VARIABLE = f"{ENVIRONMENT_PREFIX}CONFIG"
_LARGEST_FILE_BYTES = 1024 * 1024


class SettingsError(ValueError):
    """Settings that no server can be started with; one line that names where the value came from."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server was asked to be.

    Attributes:
        sources: where each field of `config` came from.
        print_config: the configuration is to be printed, and nothing started.
    """

    config: ServerConfig
    sources: Mapping[str, Source]
    print_config: bool

    def to_toml(self) -> str:
        """A configuration file that means the same, with the source of each value in a comment."""
        lines = []
        for name, value in self.config.to_plain().items():
            # TOML has no word for nothing: what is not set is left out.
            setting = f"# {name}: not set" if value is None else f"{name} = {_to_toml(value)}"
            lines.append(f"{setting}  # {self.sources[name]}\n")
        return "".join(lines)


def read_settings(
    arguments: Sequence[str] | None,
    environ: Mapping[str, str],
    *,
    program: str = "lom-serve",
    description: str = "Serves policy bundles over gRPC.",
) -> Settings:
    """The settings of `arguments` (None: this process's), `environ` and the configuration file that these name.

    A command line that cannot be read ends the process with status 2 and says why; `--help` ends it with 0.

    Raises:
        SettingsError: a value is of the wrong type, outside its range or contradicts another; a name is unknown; the
            file cannot be read.
    """
    chosen = tyro.cli(
        _command_line(),
        prog=program,
        description=description,
        args=arguments,
        # An option that was left out is not in the result, but for these kinds, which tyro wants a default for.
        default={"print_config": False} | {name: () for name in FIELD_TYPES if _is_list(name)},
        config=(tyro.conf.UseAppendAction,),  # one value per option: no list that a shell left empty, trusting everyone
    )
    file = chosen.get("config") or environ.get(_CONFIG_VARIABLE)
    by_source: dict[Source, Mapping[str, Any]] = {
        "file": {} if not file else _file_values(Path(file)),
        "env": _environment_values(environ),
        "cli": {name: value for name, value in chosen.items() if name in FIELD_TYPES and value != ()},
    }
    values: dict[str, Any] = {}
    sources: dict[str, Source] = dict.fromkeys(FIELD_TYPES, "default")
    for source, found in by_source.items():  # later ones win
        values |= found
        sources |= dict.fromkeys(found, source)
    if "models" not in values:
        raise SettingsError(
            f"PATH: expected the folder of a bundle or repository on the command line, as {ENVIRONMENT_PREFIX}MODELS "
            "or as models in the configuration file, got none"
        )
    try:
        config = ServerConfig(**values)
    except ConfigError as error:
        raise SettingsError(f"{_label(error.field, sources[error.field], file)}: {error.detail}") from None
    return Settings(config=config, sources=MappingProxyType(sources), print_config=chosen["print_config"])


@cache
def _command_line() -> Any:
    """An option for each field, none of them required, so that what was left out can come from elsewhere."""
    documents = _field_documents()
    options: dict[str, Any] = {}
    for field in fields(ServerConfig):
        hint = Path if FIELD_TYPES[field.name] == Path | None else FIELD_TYPES[field.name]
        default = "" if field.default is MISSING else f"(default: {_shown(field.default)})"
        option = tyro.conf.arg(help=documents[field.name], help_behavior_hint=default)
        options[field.name] = Annotated[hint, option]
    options["models"] = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="[PATH]", help=documents["models"])]]
    options["config"] = Annotated[
        Path, tyro.conf.arg(help="TOML file with any of these settings.", help_behavior_hint=f"(or {_CONFIG_VARIABLE})")
    ]
    options["print_config"] = Annotated[
        bool,
        tyro.conf.FlagCreatePairsOff,
        tyro.conf.arg(help="Print the effective configuration as such a file and exit.", help_behavior_hint=""),
    ]
    return TypedDict("CommandLine", options, total=False)  # type: ignore[operator]


def _field_documents() -> Mapping[str, str]:
    """The text below each field of `ServerConfig`."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(ServerConfig))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(text.value.value).replace("\n", " ")
        for field, text in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _file_values(file: Path) -> Mapping[str, Any]:
    label = f"--config {str(file)!a}"
    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{label}: expected a readable file, got: {error.strerror}") from None
    if len(content) > _LARGEST_FILE_BYTES:
        raise SettingsError(f"{label}: expected at most {_LARGEST_FILE_BYTES} bytes")
    try:
        document = tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise SettingsError(f"{label}: expected TOML, got: {str(error).splitlines()[0]}") from None
    values = {}
    for name, value in document.items():
        if name not in FIELD_TYPES:
            raise SettingsError(f"{label}: {_unknown(name, FIELD_TYPES)}")
        try:
            values[name] = from_plain(name, value)
        except ConfigError as error:
            raise SettingsError(f"{_label(name, 'file', file)}: {error.detail}") from None
    return values


def _environment_values(environ: Mapping[str, str]) -> Mapping[str, Any]:
    fields_by_variable = {_variable(name): name for name in FIELD_TYPES}
    values = {}
    for variable, text in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == _CONFIG_VARIABLE:
            continue
        if variable not in fields_by_variable:
            raise SettingsError(f"environment: {_unknown(variable, fields_by_variable)}")
        name = fields_by_variable[variable]
        try:
            values[name] = from_plain(name, _parsed(name, text))
        except ConfigError as error:
            raise SettingsError(f"{variable}: {error.detail}") from None
    return values


def _parsed(name: str, text: str) -> PlainValue:
    """A variable's text as TOML would hold it; the text itself where it is none of that."""
    hint = FIELD_TYPES[name]
    if _is_list(name):
        return [element.strip() for element in text.split(",") if element.strip()]
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if hint in (int, float):
        try:
            number: PlainValue = hint(text)
        except ValueError:
            return text
        return number
    return text


def _label(name: str, source: Source, file: str | Path | None) -> str:
    """How a person finds the value again."""
    if source == "env":
        return _variable(name)
    if source == "file":
        return f"--config {str(file)!a}: {name}"
    return "PATH" if name == "models" else f"--{name.replace('_', '-')}"


def _variable(name: str) -> str:
    return f"{ENVIRONMENT_PREFIX}{name.upper()}"


def _unknown(name: str, known: Iterable[str]) -> str:
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    closest = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    hint = f"; did you mean {by_lower_case[closest[0]]}?" if closest else ""
    return f"expected the name of a setting, got {name!a}{hint}"


def _is_list(name: str) -> bool:
    return get_origin(FIELD_TYPES[name]) is tuple


def _shown(default: object) -> str:
    if default is None or default == "" or default == ():
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)


def _to_toml(value: PlainValue) -> str:
    """`value` as TOML writes it, which is JSON's way for these types."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
