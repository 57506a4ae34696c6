"""`lom-act`: plays episodes of an environment with a served policy, and reports how it went."""

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lom_api.recording import MissingH5pyError
from lom_client.client import PolicyClient
from lom_client.errors import PolicyError
from lom_client.flight_recorder import FlightRecorder
from lom_client.levels import Source
from lom_client.server_options import ServerOptions

if TYPE_CHECKING:
    import gymnasium

    from lom_client.episodes import AnyEnv, EpisodeReport
    from lom_client.spec import PolicySpec

_WRONG_USE = 2
_FAILED = 1
_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class ActConfig(ServerOptions):
    """Play episodes of a gymnasium environment with a served policy.

    Raises:
        ValueError: a value is outside the range that its field names.
    """

    env: str
    """Gymnasium environment id, for example lom/Fork-v0."""
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
    envs: int = 1
    """Environments that play side by side, 1 or more; each step asks once for all of them. The episodes stay the
    same."""
    rate_hz: float | None = None
    """Play in real time, so many steps a second, above 0 and at most 1000, through a control loop that bridges what
    comes late; left out: as quickly as answers come, and without an answer the run ends."""
    kind: Literal["position", "velocity", "torque"] = "torque"
    """With --rate-hz: what an action is, which decides how it is held."""
    video: Path | None = None
    """Film the first episode into this .gif or .mp4."""
    plot: Path | None = None
    """Draw returns, latencies and the first episode's modes into this .png."""
    record: Path | None = None
    """Record all steps into this folder, as a Minari dataset; `lom-act replay FOLDER` compares it with any server."""
    record_max_mb: float = 1024.0
    """MiB that all recordings in that folder may take, above 0."""
    stream: bool = False
    """Ask over one stream instead of a call for each action: quicker."""
    json: Path | None = None
    """Also write the report to this file; its folder must exist."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"--episodes must be 1 or more, got {self.episodes}")
        if self.seed < 0:
            raise ValueError(f"--seed must be 0 or more, got {self.seed}")
        if not 0 < self.deadline_s <= 3600:
            raise ValueError(f"--deadline-s must be above 0 and at most 3600, got {self.deadline_s}")
        if self.envs < 1:
            raise ValueError(f"--envs must be 1 or more, got {self.envs}")
        if self.rate_hz is not None and not 0 < self.rate_hz <= 1000:
            raise ValueError(f"--rate-hz must be above 0 and at most 1000, got {self.rate_hz}")
        if self.rate_hz is not None and self.envs > 1:
            raise ValueError(f"--rate-hz plays one environment in real time, got --envs {self.envs}")
        for option, path in (("--json", self.json), ("--plot", self.plot)):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"{option}: folder {path.parent} does not exist")
            if path is not None and path.is_dir():
                raise ValueError(f"{option}: {path} is a folder")
        if not 0 < self.record_max_mb < float("inf"):
            raise ValueError(f"--record-max-mb must be above 0, got {self.record_max_mb}")
        if self.plot is not None and self.plot.suffix != ".png":
            raise ValueError(f"--plot: expected a name that ends in .png, got {self.plot.name!r}")


class _UsageError(Exception):
    """Something that the user can put right; one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0, 1 when the run failed, 2 when it was asked for something impossible.

    `lom-act replay` is a program of its own, `lom_client.replay_main`.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments[:1]) == ["replay"]:
        from lom_client.replay_main import main as replay

        return replay(arguments[1:])
    try:
        config = _parse(arguments)
        report = _play(config)
        _print_table(config, report)
        if config.json is not None:
            text = json.dumps(report_json(config, report), indent=2, allow_nan=False) + "\n"
            _write_atomically(config.json, text.encode())
        if config.plot is not None:
            from lom_client.episode_plot import draw_report

            _write_atomically(config.plot, draw_report(report, _title(config, report)))
    except MissingH5pyError as error:
        return _complain(f"--record: {error}", _WRONG_USE)
    except ImportError as error:
        if (error.name or "").startswith("matplotlib"):
            return _complain("--plot needs matplotlib: pip install matplotlib", _WRONG_USE)
        return _complain(f"{error.name or error} is missing: pip install 'lom[client,envs]'", _WRONG_USE)
    except (ValueError, _UsageError) as error:
        return _complain(str(error), _WRONG_USE)
    except PolicyError as error:
        return _complain(str(error), _FAILED)
    except OSError as error:
        return _complain(f"cannot write: {error}", _FAILED)
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
        "envs": config.envs,
        "rate_hz": config.rate_hz,
        "steps": report.steps,
        "steps_per_s": report.steps / report.elapsed_s,
        "fresh": report.sources.get(Source.FRESH, 0),
        "source_share": {str(source): count / report.steps for source, count in report.sources.items()},
        "skipped_periods": report.skipped_periods,
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

    from lom_client.episode_film import FilmError, require_film_format
    from lom_client.episodes import play_episodes, play_episodes_in_real_time

    if config.plot is not None:
        import lom_client.episode_plot  # noqa: F401  that it is missing should be known before the run
    try:
        if config.video is not None:
            require_film_format(config.video)
        # The server is asked first: an environment may take seconds to load, a missing server is known at once.
        with PolicyClient(
            config.target,
            policy=config.policy,
            version=config.version,
            config=config.client_config(use_stream=config.stream),
        ) as client:
            spec = client.get_spec(deadline_s=max(config.deadline_s, 5.0))
            _require_served(config, spec)
            env = _make_envs(config)
            terminal = Console(stderr=True)
            try:
                with (
                    _recorder(config) as recorder,
                    Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as progress,
                ):
                    bar = progress.add_task(config.env, total=config.episodes)
                    play: Any = play_episodes
                    if config.rate_hz is not None:
                        play = partial(play_episodes_in_real_time, rate_hz=config.rate_hz, kinds=config.kind)
                    report: EpisodeReport = play(
                        env,
                        client,
                        episodes=config.episodes,
                        seed=config.seed,
                        variant=config.variant,
                        deadline_s=config.deadline_s,
                        on_episode=lambda *_: progress.advance(bar),
                        recorder=recorder,
                    )
                    return report
            finally:
                env.close()
    except FilmError as error:
        raise _UsageError(f"--video: {error}") from None


@contextmanager
def _recorder(config: ActConfig) -> "Iterator[FlightRecorder | None]":
    """What records the run, where that is asked for; says at its end what is missing."""
    if config.record is None:
        yield None
        return
    with FlightRecorder(config.record, max_mb=config.record_max_mb) as recorder:
        yield recorder
    if recorder.dropped:
        why = recorder.failure or "the disk was too slow"
        print(f"lom-act: --record: {recorder.dropped} steps are not in the recording: {why}", file=sys.stderr)


def _require_served(config: ActConfig, spec: "PolicySpec") -> None:
    if config.variant is not None and config.variant not in spec.variants:
        raise _UsageError(f"--variant: expected one of {', '.join(spec.variants)}, got {config.variant!r}")
    if config.envs > spec.max_batch_rows:
        raise _UsageError(f"--envs: the server answers at most {spec.max_batch_rows} rows at once, got {config.envs}")


def _make_envs(config: ActConfig) -> "AnyEnv":
    """One environment, or a vector of them; the one that plays the first episode is filmed where that is asked for."""
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    from lom_client.episode_film import FilmedEpisode

    envs = [_make_env(config.env)]
    if config.video is not None:
        modes = envs[0].metadata.get("render_modes", [])
        envs.pop().close()
        if "rgb_array" not in modes:
            raise _UsageError(f"--video: {config.env} does not render rgb_array, but {', '.join(modes) or 'nothing'}")
        envs = [FilmedEpisode(_make_env(config.env, render_mode="rgb_array"), config.video)]
    envs += [_make_env(config.env) for _ in range(1, min(config.envs, config.episodes))]
    if len(envs) == 1:
        return envs[0]
    made = iter(envs)
    return SyncVectorEnv([lambda: next(made)] * len(envs), autoreset_mode=AutoresetMode.DISABLED)


def _make_env(env_id: str, **options: Any) -> "gymnasium.Env[Any, Any]":
    import gymnasium

    try:
        # gymnasium 1.x reads this entry-point group no longer by itself.
        for plugin in entry_points(group="gymnasium.envs"):
            plugin.load()()
        with warnings.catch_warnings():
            # "-v4 is out of date": a policy belongs to exactly the version that it was trained on.
            warnings.simplefilter("ignore", DeprecationWarning)
            return gymnasium.make(env_id, **options)
    except Exception as error:  # plugins and an environment's constructor are foreign code
        raise _UsageError(f"--env: cannot make {env_id!r}: {_first_line(str(error))}") from None


def _title(config: ActConfig, report: "EpisodeReport") -> str:
    how = "" if config.rate_hz is None else f" · {config.rate_hz:g} Hz"
    return f"{config.env} · {report.policy} · {report.variant}{how}"


def _print_table(config: ActConfig, report: "EpisodeReport") -> None:
    from rich.console import Console
    from rich.table import Table

    numbers = report_json(config, report)
    title = f"{_title(config, report)} · {len(report.returns)} episodes"
    table = Table(title=title, min_width=len(title))
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("return", f"{numbers['return_mean']:.2f} ± {numbers['return_std']:.2f}")
    if report.success_rate is not None:
        table.add_row("success", f"{report.success_rate:.1%}")
    table.add_row("episode length", f"{numbers['length_mean']:.1f}")
    for source, share in numbers["source_share"].items():
        table.add_row(f"{source} actions", f"{share:.2%}")
    if config.rate_hz is not None:
        table.add_row("skipped periods", f"{report.skipped_periods}")
    rows = f", up to {config.envs} rows" if config.envs > 1 else ""
    table.add_row(f"latency p50{rows}", f"{numbers['latency_p50_us']:.0f} µs")
    table.add_row(f"latency p99{rows}", f"{numbers['latency_p99_us']:.0f} µs")
    table.add_row("steps per second", f"{numbers['steps_per_s']:.0f}")
    for name, share in report.warning_share.items():
        table.add_row(f"{name} warnings", f"{share:.2%}")
    for mode, share in report.mode_share.items():
        table.add_row(f"mode {mode}", f"{share:.1%}")
    Console().print(table)


def _write_atomically(path: Path, content: bytes) -> None:
    """A reader sees the old file or the whole new one, never a part."""
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
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
