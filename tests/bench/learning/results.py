"""Results, a JSON line for each (task, method, seed, settings); the settings stand once, in a file beside them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from lom.config import TrainConfig

RESULTS = Path("docs/results/learning.jsonl")

Record = dict[str, Any]
Settings = Mapping[str, Any]


class Key(NamedTuple):
    """What a result is of; `settings` is a digest."""

    task: str
    method: str
    seed: int
    settings: str


class Results:
    """The results that are there, and where the next ones go. One process writes."""

    def __init__(self, path: Path = RESULTS) -> None:
        self._path = path
        self._settings_path = path.with_name(f"{path.stem}-settings.json")
        self._settings: dict[str, dict[str, Any]] = {}
        self.records: list[Record] = []
        if self._settings_path.is_file():
            self._settings = json.loads(self._settings_path.read_text())
        if path.is_file():
            self.records = [json.loads(line) for line in path.read_text().splitlines()]

    def __contains__(self, key: Key) -> bool:
        return any(key == key_of(record) for record in self.records)

    def append(self, record: Record) -> None:
        """Writes one line at once."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.records.append(record)

    def digest_of(self, settings: Settings) -> str:
        """The digest under which these settings are known, or by which they are known from now on.

        Fields that did not exist when settings were stored are taken to have had today's defaults: an option whose
        default changes what is learned has to be written into the stored settings, with the value that says "without".
        Settings of an option that is gone are never today's, unless it is taken out of them where it said "without".
        """
        defaults = {name: _DEFAULTS[name] for name in settings.keys() & _DEFAULTS.keys()}
        for digest, known in self._settings.items():
            if {**defaults, **known} == settings:
                return digest
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        self._settings[digest] = dict(settings)
        self._settings_path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in self._settings.items()]
        self._settings_path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return digest


_DEFAULTS: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(TrainConfig()).items()}


def key_of(record: Record) -> Key:
    """What a record is a result of."""
    return Key(record["task"], record["method"], record["seed"], record["settings"])
