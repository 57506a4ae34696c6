"""`lom-act`: plays episodes of an environment with a served policy, and reports how it went."""

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lom_client.client import PolicyClient
from lom_client.config import ClientConfig
from lom_client.errors import PolicyError

if TYPE_CHECKING:
    import gymnasium

    from lom_client.episodes import EpisodeReport

_WRONG_USE = 2
_FAILED = 1
_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class ActConfig:
    """Play episodes of a gymnasium environment with a served policy.

    Raises:
        ValueError: a value is outside the range that its field names.
    """

    env: str
    """Gymnasium environment id, for example lom/Fork-v0."""
    target: str = "grpc://127.0.0.1:8001"
    """The server: grpc://HOST:PORT, grpcs://HOST:PORT for TLS, unix:/PATH, or inproc:BUNDLE for none at all."""
    policy: str | None = None
    """Name of the policy; left out: the only one that the server has."""
    version: int | None = None
    """The version to be acted by; left out: the one that the server prefers."""
    variant: str | None = None
    """greedy_mode or actor; left out: the policy's default."""
    episodes: int = 10
    """Episodes to play, 1 or more."""
    seed: int = 0
    """Episode i resets with seed + i; 0 or more."""
    deadline_s: float = 1.0
    """Seconds that each action may take, above 0 and at most 3600. One that comes later ends the run."""
    stream: bool = False
    """Ask over one stream instead of a call for each action: quicker."""
    tls_ca: Path | None = None
    """PEM certificates of the authorities that certify a grpcs:// server; left out: the public ones."""
    tls_certificate: Path | None = None
    """PEM certificate that a grpcs:// server may ask for; needs --tls-key."""
    tls_key: Path | None = None
    """PEM private key of --tls-certificate."""
    token_file: Path | None = None
    """File with the token that a server may ask for, mode 0600."""
    json: Path | None = None
    """Also write the report to this file; its folder must exist."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"--episodes must be 1 or more, got {self.episodes}")
        if self.seed < 0:
            raise ValueError(f"--seed must be 0 or more, got {self.seed}")
        if not 0 < self.deadline_s <= 3600:
            raise ValueError(f"--deadline-s must be above 0 and at most 3600, got {self.deadline_s}")
        if self.json is not None and not self.json.parent.is_dir():
            raise ValueError(f"--json: folder {self.json.parent} does not exist")
        if self.json is not None and self.json.is_dir():
            raise ValueError(f"--json: {self.json} is a folder")


class _UsageError(Exception):
    """Something that the user can put right; one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0, 1 when the run failed, 2 when it was asked for something impossible."""
    try:
        config = _parse(arguments)
        report = _play(config)
        _print_table(config, report)
        if config.json is not None:
            _write_atomically(config.json, report_json(config, report))
    except ImportError as error:
        return _complain(f"{error.name or error} is missing: pip install 'lom[client,envs]'", _WRONG_USE)
    except (ValueError, _UsageError) as error:
        return _complain(str(error), _WRONG_USE)
    except PolicyError as error:
        return _complain(str(error), _FAILED)
    except OSError as error:
        return _complain(f"--json: {error}", _FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", _INTERRUPTED)
    return 0


def report_json(config: ActConfig, report: "EpisodeReport") -> dict[str, Any]:
    """The report as it is written to a file. **Units**: latencies in microseconds, `return_std` of the population."""
    p50, p99 = np.percentile(report.latencies_s, (50, 99)) * 1e6
    return {
        "env": config.env,
        "seed": config.seed,
        "policy": report.policy,
        "variant": report.variant,
        "bundle_digest": report.bundle_digest,
        "episodes": len(report.returns),
        "return_mean": float(np.mean(report.returns)),
        "return_std": float(np.std(report.returns)),
        "returns": list(report.returns),
        "success_rate": report.success_rate,
        "length_mean": float(np.mean(report.lengths)),
        "fresh": len(report.latencies_s),
        "latency_p50_us": float(p50),
        "latency_p99_us": float(p99),
        "warning_share": report.warning_share,
        "mode_share": {str(mode): share for mode, share in report.mode_share.items()},
    }


def _parse(arguments: Sequence[str] | None) -> ActConfig:
    import tyro

    @dataclass(frozen=True, kw_only=True)
    class CommandLine(ActConfig):
        def __post_init__(self) -> None:
            """Leaves the check to `ActConfig`, whose refusal fits on one line."""

    chosen = tyro.cli(CommandLine, prog="lom-act", description=_first_line(ActConfig.__doc__ or ""), args=arguments)
    return ActConfig(**vars(chosen))


def _play(config: ActConfig) -> "EpisodeReport":
    from rich.console import Console
    from rich.progress import Progress

    from lom_client.episodes import play_episodes

    # The server is asked first: an environment may take seconds to load, a missing server is known at once.
    with PolicyClient(
        config.target, policy=config.policy, version=config.version, config=_client_config(config)
    ) as client:
        spec = client.get_spec(deadline_s=max(config.deadline_s, 5.0))
        if config.variant is not None and config.variant not in spec.variants:
            raise _UsageError(f"--variant: expected one of {', '.join(spec.variants)}, got {config.variant!r}")
        env = _make_env(config.env)
        terminal = Console(stderr=True)
        try:
            with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
                bar = progress.add_task(config.env, total=config.episodes)
                return play_episodes(
                    env,
                    client,
                    episodes=config.episodes,
                    seed=config.seed,
                    variant=config.variant,
                    deadline_s=config.deadline_s,
                    on_episode=lambda *_: progress.advance(bar),
                )
        finally:
            env.close()


def _client_config(config: ActConfig) -> ClientConfig:
    return ClientConfig(
        tls_ca=config.tls_ca,
        tls_certificate=config.tls_certificate,
        tls_key=config.tls_key,
        token_file=config.token_file,
        use_stream=config.stream,
    )


def _make_env(env_id: str) -> "gymnasium.Env[Any, Any]":
    import gymnasium

    try:
        # gymnasium 1.x reads this entry-point group no longer by itself.
        for plugin in entry_points(group="gymnasium.envs"):
            plugin.load()()
        with warnings.catch_warnings():
            # "-v4 is out of date": a policy belongs to exactly the version that it was trained on.
            warnings.simplefilter("ignore", DeprecationWarning)
            return gymnasium.make(env_id)
    except Exception as error:  # plugins and an environment's constructor are foreign code
        raise _UsageError(f"--env: cannot make {env_id!r}: {_first_line(str(error))}") from None


def _print_table(config: ActConfig, report: "EpisodeReport") -> None:
    from rich.console import Console
    from rich.table import Table

    numbers = report_json(config, report)
    table = Table(title=f"{config.env} · {report.policy} · {report.variant} · {len(report.returns)} episodes")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("return", f"{numbers['return_mean']:.2f} ± {numbers['return_std']:.2f}")
    if report.success_rate is not None:
        table.add_row("success", f"{report.success_rate:.1%}")
    table.add_row("episode length", f"{numbers['length_mean']:.1f}")
    table.add_row("latency p50", f"{numbers['latency_p50_us']:.0f} µs")
    table.add_row("latency p99", f"{numbers['latency_p99_us']:.0f} µs")
    for name, share in report.warning_share.items():
        table.add_row(f"{name} warnings", f"{share:.2%}")
    for mode, share in report.mode_share.items():
        table.add_row(f"mode {mode}", f"{share:.1%}")
    Console().print(table)


def _write_atomically(path: Path, content: dict[str, Any]) -> None:
    """A reader sees the old file or the whole new one, never a part."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _complain(text: str, exit_code: int) -> int:
    print(f"lom-act: {text}", file=sys.stderr)
    return exit_code


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
