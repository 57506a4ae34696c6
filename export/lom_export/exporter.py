"""From a run to a bundle, or to an error and no bundle."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lom.evaluation import EVALUATION_SEED, UnsuitableEnvError, env_spaces, evaluate
from lom.run import RunSpec, TrainedRun, load_run
from lom_bundle import BundleError, GoldenSpec, Manifest, SpaceSpec, VariantSpec, write_bundle
from lom_export import proof
from lom_export.card import model_card
from lom_export.graph import INPUT_NAME, OPSET_VERSION, OUTPUT_NAMES, export_graph


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to export, and where to.

    Attributes:
        run: folder of a finished `lom-train`.
        out: the bundle's folder; must be new.
        env: gymnasium id; its evaluation chooses the default variant. None: `greedy_mode` is the default.
        episodes: episodes per variant of that evaluation.
        name: name under which the policy is served; None derives it from the environment or the run.
        with_bc: also export behaviour cloning, as variant `bc`, to compare with on the robot.
    """

    run: Path
    out: Path
    env: str | None = None
    episodes: int = 20
    name: str | None = None
    with_bc: bool = False

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"--episodes: expected 1 or more, got {self.episodes}")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A written bundle."""

    manifest: Manifest
    digest: str
    parity: Mapping[str, proof.ParityReport]
    seconds: float


def export_run(config: ExportConfig, report: Callable[[str], None] = lambda stage: None) -> Exported:
    """Exports, proves and writes.

    Args:
        report: is told the name of each stage as it begins.

    Raises:
        lom.run.RunError, UnsuitableEnvError, GraphError, BundleError: no bundle is left behind.
    """
    started = time.monotonic()
    if config.out.exists():
        raise BundleError("DESTINATION_EXISTS", f"--out: expected a new folder, {str(config.out)!r} is there already")
    report("reading the run")
    trained = load_run(config.run)
    if config.env is not None:
        _check_env(config.env, trained.spec)
    variants = ("greedy_mode", "actor", *(("bc",) if config.with_bc else ()))

    graphs = {}
    for variant in variants:
        report(f"tracing {variant}")
        graphs[variant] = export_graph(trained.policy, variant)

    report("comparing onnxruntime with torch")
    observations = proof.parity_observations(trained.samples.trained_on, trained.policy)
    manifest = _manifest(config, trained, variants, observations)
    rows = proof.golden_arrays(trained.policy, variants, observations)
    parity = proof.check_parity(manifest, graphs, rows)
    if config.env is not None:
        report(f"playing {config.episodes} episodes per variant in {config.env}")
        evaluation = _evaluate(graphs, config.env, config.episodes)
        candidates = {name: evaluation["variants"][name]["return_mean"] for name in ("greedy_mode", "actor")}
        manifest = replace(manifest, evaluation=evaluation, default_variant=max(candidates, key=candidates.__getitem__))
    manifest = replace(
        manifest,
        provenance={**manifest.provenance, "parity": {name: asdict(result) for name, result in parity.items()}},
    )
    report("writing the bundle")
    digest = write_bundle(
        config.out,
        manifest,
        graphs=graphs,
        golden={name: array[: proof.GOLDEN_ROWS] for name, array in rows.items()},
        card=model_card(manifest),
    )
    return Exported(manifest=manifest, digest=digest, parity=parity, seconds=time.monotonic() - started)


def _manifest(
    config: ExportConfig, trained: TrainedRun, variants: tuple[str, ...], observations: NDArray[np.float32]
) -> Manifest:
    spec = trained.spec
    return Manifest(
        policy=config.name or _default_name(spec.env or config.run.resolve().name),
        inputs=(
            SpaceSpec(
                name=INPUT_NAME,
                shape=(len(spec.observation_low),),
                low=spec.observation_low,
                high=spec.observation_high,
            ),
        ),
        action=SpaceSpec(name="action", shape=(len(spec.action_low),), low=spec.action_low, high=spec.action_high),
        variants={name: VariantSpec(graph=f"{name}.onnx", outputs=OUTPUT_NAMES[name]) for name in variants},
        default_variant="greedy_mode",
        num_components=spec.config.num_components,
        min_mixing_weight=spec.config.effective_min_mixing_weight,
        golden=GoldenSpec(
            rows=proof.GOLDEN_ROWS,
            action_tolerance=proof.ACTION_TOLERANCE,
            tie_width=proof.tie_width(trained.policy, observations),
        ),
        provenance={
            "datasets": list(spec.datasets),
            "dataset_rows": spec.dataset_rows,
            "dataset_fingerprint": spec.dataset_fingerprint,
            "training_env": spec.env,
            "training_config": asdict(spec.config),
            "training_config_digest": spec.config.digest,
            "onnx_opset": OPSET_VERSION,
            "versions": {name: version(name) for name in ("lom", "torch", "onnx", "onnxruntime", "numpy")},
        },
    )


def _default_name(origin: str) -> str:
    """`lom/Fork-v0` → `fork-v0`; every character that a policy name may not hold becomes a hyphen."""
    name = re.sub(r"[^a-z0-9_-]+", "-", origin.rsplit("/", 1)[-1].rsplit(":", 1)[-1].lower()).strip("-_")
    return name[:64] or "policy"


def _check_env(env_id: str, spec: RunSpec) -> None:
    spaces = env_spaces(env_id)
    trained_for = (len(spec.observation_low), spec.action_low, spec.action_high)
    found = (spaces.observation_low.size, tuple(spaces.action_low.tolist()), tuple(spaces.action_high.tolist()))
    if found != trained_for:
        raise UnsuitableEnvError(
            f"environment {env_id!r}: expected {trained_for[0]} observation dimensions and actions in "
            f"{list(trained_for[1])} to {list(trained_for[2])} as in training, got {found[0]} and "
            f"{list(found[1])} to {list(found[2])}"
        )


def _evaluate(graphs: Mapping[str, bytes], env_id: str, episodes: int) -> dict[str, Any]:
    """Plays the graphs themselves, not the torch modules that they came from."""
    results = {}
    for variant, graph in graphs.items():
        session = proof.cpu_session(graph)

        def act(observations: NDArray[np.float32], session: Any = session) -> NDArray[np.float32]:
            actions: NDArray[np.float32] = session.run(["action"], {INPUT_NAME: observations})[0]
            return actions

        results[variant] = evaluate(act, env_id, episodes=episodes, seed=EVALUATION_SEED).to_json()
    return {"env": env_id, "episodes": episodes, "seed": EVALUATION_SEED, "variants": results}
