"""`lom-export`: from a trained run to a bundle."""

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


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Export a trained run as a bundle of ONNX graphs that carries its own proof."""

    run: tyro.conf.Positional[Path]
    """Folder of a finished lom-train."""
    out: Path
    """The bundle's folder; must be new."""
    env: str | None = None
    """Gymnasium id; the variant that returns more there becomes the default. Without it: greedy_mode."""
    episodes: int = 20
    """Episodes per variant of that evaluation."""
    name: str | None = None
    """Name under which the policy is served; default: from the environment or the run's folder."""
    with_bc: bool = False
    """Also export behaviour cloning, as variant bc, to compare with."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `lom-export`; exits 0, or 1 with one line that says what was wrong and no bundle."""
    arguments = tyro.cli(ExportArguments, prog="lom-export", args=argv)
    console = Console(stderr=True, highlight=False)
    try:
        config = ExportConfig(**vars(arguments))
        with console.status("") as status:
            exported = export_run(config, report=status.update)
    except (RunError, UnsuitableEnvError, GraphError, BundleError, ValueError) as error:
        console.print(f"lom-export: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(1) from None
    _print_summary(exported, arguments.out, console)


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
    console.print(
        f"bundle {exported.digest[:12]} written to {out} in {exported.seconds:.0f} s", markup=False, soft_wrap=True
    )


if __name__ == "__main__":
    main()
