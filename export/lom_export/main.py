"""`lom-export`: from a trained run to a bundle."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from lom.evaluation import UnsuitableEnvError
from lom.run import RunError
from lom_bundle import BundleError
from lom_export.exporter import ExportConfig, Exported, export_run
from lom_export.graph import GraphError
from lom_export.inspection import inspect_bundle, verify_bundle


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """Say what a bundle is, after checking that it is intact."""

    bundle: tyro.conf.Positional[Path]
    """Folder of the bundle."""


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """Run every check of a bundle on this machine: files, structure, signature, golden rows."""

    bundle: tyro.conf.Positional[Path]
    """Folder of the bundle."""
    trusted_keys: tuple[Path, ...] = ()
    """PEM public keys; when given, the bundle must be signed by one of them."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `lom-export RUN`, `lom-export inspect BUNDLE` and `lom-export verify BUNDLE`.

    Exits 0, or 1 with one line that says what was wrong; a refused export leaves no bundle.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console(stderr=True, highlight=False)
    command = arguments[0] if arguments and arguments[0] in ("inspect", "verify") else ""
    try:
        if command == "inspect":
            inspect_bundle(tyro.cli(InspectArguments, prog="lom-export inspect", args=arguments[1:]).bundle)
        elif command == "verify":
            chosen = tyro.cli(VerifyArguments, prog="lom-export verify", args=arguments[1:])
            verify_bundle(chosen.bundle, chosen.trusted_keys)
        else:
            config = tyro.cli(ExportConfig, prog="lom-export", args=arguments)
            with console.status("") as status:
                exported = export_run(config, report=status.update)
            _print_summary(exported, config.out, console)
    except (RunError, UnsuitableEnvError, GraphError, BundleError, ValueError) as error:
        console.print(f"lom-export: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(1) from None


def _print_summary(exported: Exported, out: Path, console: Console) -> None:
    manifest = exported.manifest
    table = Table(title=f"{manifest.policy}: onnxruntime against torch", title_justify="left")
    for heading in ("variant", "rows", "ties", "action error / range", "return"):
        table.add_column(heading)
    for name, parity in exported.parity.items():
        result = manifest.evaluation.get("variants", {}).get(name)
        returned = f"{result['return_mean']:.2f} ± {result['return_std']:.2f}" if result else ""
        default = " (default)" if name == manifest.default_variant else ""
        table.add_row(name + default, f"{parity.rows:,}", str(parity.ties), f"{parity.action_error:.1e}", returned)
    console.print(table)
    for name, cost in exported.precision.items():
        console.print(
            f"{name} in {manifest.precision}: action error {cost.action_error:.1e} of the range, "
            f"{len(cost.flipped)} of {cost.rows:,} rows flip their mode ({cost.flip_rate:.2%})",
            soft_wrap=True,
        )
    for name, warning in manifest.warnings.items():
        rates = ", ".join(f"{variant} {rate:.2%}" for variant, rate in warning.held_out_false_alarms.items())
        console.print(
            f"{name}: {warning.false_alarm_rate:.1%} false alarms asked for; {rates or 'not measured'} on "
            f"{warning.held_out_rows:,} rows of {warning.held_out_episodes} held-out episodes",
            markup=False,
            soft_wrap=True,
        )
    if not manifest.warnings:
        console.print("no warnings: the run holds fewer than two episodes to calibrate on", style="yellow")
    what = f"bundle {exported.digest[:12]}" if exported.digest else "Triton model repository"
    console.print(f"{what} written to {out} in {exported.seconds:.0f} s", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
