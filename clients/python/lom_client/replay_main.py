"""`lom-act replay PATH`: whether a policy still answers as a recording says it did."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from lom_api.recording import Golden, MissingH5pyError, read_recording
from lom_client.client import PolicyClient
from lom_client.errors import PolicyError
from lom_client.replay import ReplayReport, golden_of, replay
from lom_client.server_options import ServerOptions

_DIFFERS = 1
_WRONG_USE = 2
_INTERRUPTED = 130
_DIGEST_LENGTH = 12


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(ServerOptions):
    """Ask the questions of a recording again and compare the answers. Exits with 0 where all of them are the same
    within the tolerance, with 1 where one is not or the server did not answer, with 2 where nothing could be asked.

    Raises:
        ValueError: a value is outside the range that its field names.
    """

    path: Path
    """The recording: folder of its dataset, or the folder given to --record where it holds only one."""
    policy: str | None = None
    """Name of the policy; left out: the recorded one, or the only one that the server has."""
    version: int | None = None
    """The version to be asked; left out: the one that the server prefers."""
    tolerance: float | None = None
    """Largest difference of an action element, as a share of its range; left out: as the recording, the bundle of an
    inproc: target or else an unquantised export has it."""
    tie_width: float | None = None
    """Another mode is no difference where the margin was below it; left out: likewise."""
    deadline_s: float = 1.0
    """Seconds that each call may take, above 0 and at most 3600."""

    def __post_init__(self) -> None:
        if not 0 < self.deadline_s <= 3600:
            raise ValueError(f"--deadline-s must be above 0 and at most 3600, got {self.deadline_s}")
        for option, value in (("--tolerance", self.tolerance), ("--tie-width", self.tie_width)):
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{option} must be a finite number of 0 or more, got {value}")


def main(arguments: Sequence[str]) -> int:
    """Runs the program; the exit code as `ReplayConfig` says."""
    try:
        report = _replay(_parse(arguments))
    except MissingH5pyError as error:
        return _complain(str(error), _WRONG_USE)
    except ImportError as error:
        return _complain(f"{error.name or error} is missing: pip install 'lom[client,envs]'", _WRONG_USE)
    except ValueError as error:
        return _complain(str(error), _WRONG_USE)
    except PolicyError as error:
        return _complain(str(error), _DIFFERS)
    except OSError as error:
        return _complain(f"the recording cannot be read: {error}", _WRONG_USE)
    except KeyboardInterrupt:
        return _complain("interrupted", _INTERRUPTED)
    if not report.compared:
        return _complain("the recording holds no answer to compare", _WRONG_USE)
    return 0 if report.reproduces else _DIFFERS


def _parse(arguments: Sequence[str]) -> ReplayConfig:
    import tyro

    @dataclass(frozen=True, kw_only=True)
    class CommandLine(ReplayConfig):
        path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="The recording: folder of its dataset.")]

        def __post_init__(self) -> None:
            """Leaves the check to `ReplayConfig`, whose refusal fits on one line."""

    description = " ".join((ReplayConfig.__doc__ or "").split("Raises")[0].split())
    chosen = tyro.cli(CommandLine, prog="lom-act replay", description=description, args=list(arguments))
    return ReplayConfig(**vars(chosen))


def _replay(config: ReplayConfig) -> ReplayReport:
    from rich.console import Console
    from rich.progress import Progress

    recording = read_recording(config.path)
    known = golden_of(recording, config.target)
    golden = Golden(
        action_tolerance=known.action_tolerance if config.tolerance is None else config.tolerance,
        tie_width=known.tie_width if config.tie_width is None else config.tie_width,
    )
    policy = config.policy or recording.policy or None
    terminal = Console(stderr=True)
    with (
        PolicyClient(config.target, policy=policy, version=config.version, config=config.client_config()) as client,
        Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as progress,
    ):
        bar = progress.add_task(recording.path.name, total=recording.total_steps + recording.total_episodes)
        report = replay(
            recording,
            client,
            golden=golden,
            deadline_s=config.deadline_s,
            on_steps=lambda rows: progress.advance(bar, rows),
        )
    if report.compared:
        _print_table(recording.path.name, report)
    return report


def _print_table(name: str, report: ReplayReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=name)
    table.add_column("measure")
    table.add_column("value", justify="right")
    rows: list[tuple[str, Any]] = [
        ("observations", report.steps),
        ("compared", report.compared),
        (f"within {report.tolerance:g} of the range", report.within),
        ("ties, either mode", report.ties),
        ("largest difference", f"{report.largest_difference:.3g}"),
    ]
    first = report.first_difference
    if first is not None:
        rows += [
            ("first difference", f"episode {first.episode}, step {first.step}"),
            ("recorded", _shown(first.recorded, first.recorded_mode)),
            ("replayed", _shown(first.replayed, first.replayed_mode)),
        ]
    rows.append(("bundle", "the same" if report.has_same_bundle else "another"))
    if not report.has_same_bundle:
        rows += [("recorded bundle", _digests(report.recorded_digests))]
        rows += [("replayed bundle", _digests(report.replayed_digests))]
    for measure, value in rows:
        table.add_row(measure, str(value))
    Console().print(table)


def _shown(action: tuple[float, ...], mode: int) -> str:
    numbers = ", ".join(f"{value:.6g}" for value in action[:8])
    return f"({numbers}{', ...' if len(action) > 8 else ''})" + (f" mode {mode}" if mode >= 0 else "")


def _digests(digests: frozenset[str]) -> str:
    return ", ".join(sorted(digest[:_DIGEST_LENGTH] for digest in digests))


def _complain(text: str, exit_code: int) -> int:
    print(f"lom-act replay: {text}", file=sys.stderr)
    return exit_code
