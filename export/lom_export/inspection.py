"""`lom-export inspect` and `lom-export verify`: what a bundle is, and whether this machine may believe it."""

import functools
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lom_bundle import Bundle, SpaceSpec, check_golden, read_bundle
from lom_bundle.signature import load_trusted_key
from lom_export.proof import cpu_session, named_outputs


def inspect_bundle(folder: Path) -> None:
    """Prints a summary of an intact bundle.

    Raises:
        BundleError: it is not intact.
    """
    bundle = read_bundle(folder)
    manifest = bundle.manifest
    table = Table(title=f"{manifest.policy}  {bundle.digest[:12]}", show_header=False, title_justify="left")
    for space in (*manifest.inputs, manifest.action):
        table.add_row(space.name, _describe(space))
    table.add_row("control period", f"{manifest.control_period_s} s" if manifest.control_period_s else "not stated")
    for name, variant in manifest.variants.items():
        default = " (default)" if name == manifest.default_variant else ""
        size = manifest.files[variant.graph]["bytes"] / 1024
        table.add_row(f"{name}{default}", f"{variant.graph}, {size:.0f} KiB: {', '.join(variant.outputs)}")
    mask = f"never chosen below a mixing weight of {manifest.min_mixing_weight:g}"
    table.add_row("components", f"{manifest.num_components}, {mask}; weights in {manifest.precision}")
    for name, warning in manifest.warnings.items():
        limits = ", ".join(f"{variant} > {limit:.3g}" for variant, limit in warning.thresholds.items())
        table.add_row(name, f"warns at {limits}")
    evaluation = manifest.evaluation
    if evaluation:
        returns = ", ".join(f"{name} {result['return_mean']:.2f}" for name, result in evaluation["variants"].items())
        table.add_row("evaluation", f"{evaluation['env']}, {evaluation['episodes']} episodes: {returns}")
    table.add_row(
        "trained on", f"{manifest.provenance.get('dataset_rows')} rows, {manifest.provenance.get('datasets')}"
    )
    table.add_row("contract hash", manifest.contract_hash)
    table.add_row("digest", bundle.digest)
    Console(highlight=False).print(table)


def verify_bundle(folder: Path, trusted_keys: tuple[Path, ...]) -> None:
    """Runs every check and prints what passed.

    Raises:
        BundleError: a check failed; nothing is printed of those before it.
    """
    bundle = read_bundle(folder, trusted_keys=[load_trusted_key(path) for path in trusted_keys])
    lines = [f"{bundle.manifest.policy} {bundle.digest[:12]}: files, digests, contract hash and structure hold"]
    if trusted_keys:
        lines.append("signed by a trusted key")
    lines += [_golden_line(bundle, variant) for variant in bundle.graphs]
    console = Console(highlight=False)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _golden_line(bundle: Bundle, variant: str) -> str:
    session = cpu_session(bundle.graphs[variant])
    outputs = bundle.manifest.variants[variant].outputs
    run = functools.partial(named_outputs, session, outputs)
    report = check_golden(bundle.manifest, variant, run, bundle.golden)
    return (
        f"{variant}: {report.rows} golden rows on {session.get_providers()[0]}, {report.ties} ties, "
        f"largest action error {report.action_error:.1e} of the range"
    )


def _describe(space: SpaceSpec) -> str:
    bounds = f"{space.dtype}{list(space.shape)} in [{min(space.low):g}, {max(space.high):g}]"
    return f"{bounds}: {space.elements}" if space.elements else bounds
