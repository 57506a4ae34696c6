"""From a run to a bundle, or to an error and no bundle."""

import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

import lom
from lom.evaluation import EVALUATION_SEED, UnsuitableEnvError, env_spaces, evaluate, recommend
from lom.observation_parts import element_names
from lom.run import RunSpec, TrainedRun, load_run
from lom_bundle import (
    BundleError,
    GoldenSpec,
    GraphSpec,
    Manifest,
    SpaceSpec,
    VariantSpec,
    WarningSpec,
    write_bundle,
)
from lom_export import proof
from lom_export.card import model_card
from lom_export.contract import Contract, ContractError, read_contract
from lom_export.graph import (
    METADATA_KEY,
    OBSERVATION,
    OPSET_VERSION,
    PolicyGraph,
    export_graph,
    with_metadata,
)
from lom_export.precision import Precision, PrecisionReport, narrow
from lom_export.triton import write_triton_repository
from lom_export.warning_scores import calibrate


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export a trained run as a bundle of ONNX graphs that carries its own proof.

    `lom-export inspect BUNDLE` says what a bundle is, `lom-export verify BUNDLE` runs all of its checks here.
    """

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
    contract: Path | None = None
    """JSON file: {"observation": {"names": [...], "units": [...]}, "action": {...}, "control_period_s": 0.02}."""
    with_bc: bool = False
    """Also export behaviour cloning, as variant bc, to compare with on the robot."""
    false_alarm_rate: float = 0.01
    """Share of ordinary observations that each warning may flag, above 0 to 0.5."""
    precision: Precision = "fp32"
    """Of the hidden layers' weights; refused beyond its bounds on action error and mode flips. Below fp32 the bundle
    has no explain graph."""
    format: Literal["bundle", "triton"] = "bundle"
    """triton: the same proven graphs as a Triton model repository (not run in a Triton server here)."""
    sign_key: Path | None = None
    """PEM file of an Ed25519 private key to sign the manifest with."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"--episodes: expected 1 or more, got {self.episodes}")
        if not 0.0 < self.false_alarm_rate <= 0.5:
            raise ValueError(f"--false-alarm-rate: expected above 0 to 0.5, got {self.false_alarm_rate}")
        if self.format == "triton" and self.sign_key is not None:
            raise ValueError("--sign-key: expected a bundle to sign, got --format triton")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        digest: the bundle's; empty for a Triton repository.
        parity: by variant, the float32 graphs against torch.
        precision: by variant, the written graphs against torch; empty for fp32.
    """

    manifest: Manifest
    digest: str
    parity: Mapping[str, proof.ParityReport]
    precision: Mapping[str, PrecisionReport]
    seconds: float


def export_run(config: ExportConfig, report: Callable[[str], None] = lambda stage: None) -> Exported:
    """Exports, proves and writes.

    Args:
        report: is told the name of each stage as it begins.

    Raises:
        lom.run.RunError, UnsuitableEnvError, ContractError, GraphError, BundleError: no bundle is left behind.
    """
    started = time.monotonic()
    if config.out.exists():
        raise BundleError("DESTINATION_EXISTS", f"--out: expected a new folder, {str(config.out)!r} is there already")
    contract = read_contract(config.contract) if config.contract else Contract()
    sign_key = _read_key(config.sign_key) if config.sign_key else None
    report("reading the run")
    trained = load_run(config.run)
    _check_contract(contract, trained.spec)
    if config.env is not None:
        _check_env(config.env, trained.spec)
    variants = ("greedy_mode", "actor", *(("bc",) if config.with_bc else ()))

    report("calibrating the warnings")
    state_score, warnings = calibrate(
        trained.policy, trained.samples, variants, false_alarm_rate=config.false_alarm_rate, seed=0
    )
    modules = {variant: PolicyGraph(trained.policy, variant, state_score) for variant in variants}
    explains = {
        variant: PolicyGraph(trained.policy, variant, state_score, explain=True)
        for variant in variants
        if trained.policy.chooses_mode(variant)
    }
    graphs = {}
    for file_name, module in [
        *((_graph_file(name), module) for name, module in modules.items()),
        *((_explain_file(name), module) for name, module in explains.items()),
    ]:
        report(f"tracing {file_name}")
        graphs[file_name] = export_graph(module)

    report("comparing onnxruntime with torch")
    rows = proof.golden_arrays(modules, explains, proof.parity_observations(trained.samples.trained_on, trained.policy))
    manifest = _manifest(config, contract, trained, modules, explains, warnings, rows)
    parity = _prove(manifest, graphs, modules, explains, rows)
    precision: dict[str, PrecisionReport] = {}
    if config.precision != "fp32":
        report(f"converting to {config.precision}")
        manifest, graphs, rows, precision = narrow(
            manifest, graphs, rows, config.precision, {OBSERVATION: trained.samples.trained_on[::8]}
        )
    if config.env is not None:
        report(f"playing {config.episodes} episodes per variant in {config.env}")
        keys = trained.spec.observation_keys
        evaluation = _evaluate(manifest, graphs, config.env, config.episodes, keys)
        manifest = replace(manifest, evaluation=evaluation, default_variant=evaluation["recommended"]["variant"])
    manifest = replace(
        manifest,
        provenance={**manifest.provenance, "parity": {name: asdict(result) for name, result in parity.items()}},
    )
    graphs = {name: with_metadata(graph, _metadata(manifest)) for name, graph in graphs.items()}
    golden = _golden_part(manifest, rows)
    for name, variant in manifest.variants.items():  # the bytes that are written, as their reader will check them
        proof.check_parity(manifest, name, graphs[variant.graph], golden)

    report(f"writing the {config.format}")
    by_variant = {name: graphs[variant.graph] for name, variant in manifest.variants.items()}
    digest = ""
    if config.format == "triton":
        write_triton_repository(config.out, manifest, by_variant)
    else:
        digest = write_bundle(
            config.out,
            manifest,
            graphs=by_variant,
            explain_graphs={n: graphs[v.explain.graph] for n, v in manifest.variants.items() if v.explain is not None},
            golden=golden,
            card=model_card(manifest),
            sign_key=sign_key,
        )
    seconds = time.monotonic() - started
    return Exported(manifest=manifest, digest=digest, parity=parity, precision=precision, seconds=seconds)


def _prove(
    manifest: Manifest,
    graphs: Mapping[str, bytes],
    modules: Mapping[str, PolicyGraph],
    explains: Mapping[str, PolicyGraph],
    rows: Mapping[str, NDArray[Any]],
) -> dict[str, proof.ParityReport]:
    """The gate: float32 graphs against torch, weights bit for bit, answers alone and in batches."""
    parity = {}
    for name, variant in manifest.variants.items():
        proof.check_weights(modules[name], graphs[variant.graph])
        parity[name] = proof.check_parity(manifest, name, graphs[variant.graph], rows)
    for name, explain in explains.items():
        graph = graphs[_explain_file(name)]
        proof.check_weights(explain, graph)
        nothing_forced = proof.free_choice(len(rows[OBSERVATION]), explain.policy)
        proof.check_parity(manifest, name, graph, rows, nothing_forced)
        proof.check_overrides(manifest, graph, explain, rows[OBSERVATION])
    return parity


def _graph_file(variant: str) -> str:
    return f"{variant}.onnx"


def _explain_file(variant: str) -> str:
    return f"{variant}_explain.onnx"


def _golden_part(manifest: Manifest, rows: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What the bundle carries of the compared rows: the first ones, and the outputs of the graphs that act."""
    names = [OBSERVATION, *(f"{name}.{output}" for name, spec in manifest.variants.items() for output in spec.outputs)]
    return {name: rows[name][: proof.GOLDEN_ROWS] for name in names}


def _manifest(
    config: ExportConfig,
    contract: Contract,
    trained: TrainedRun,
    modules: Mapping[str, PolicyGraph],
    explains: Mapping[str, PolicyGraph],
    warnings: Mapping[str, WarningSpec],
    rows: Mapping[str, NDArray[Any]],
) -> Manifest:
    spec = trained.spec
    explained = {
        name: GraphSpec(graph=_explain_file(name), outputs=explain.output_names, inputs=explain.input_names[1:])
        for name, explain in explains.items()
    }
    return Manifest(
        policy=config.name or _default_name(spec.env or config.run.resolve().name),
        inputs=(
            SpaceSpec(
                name=OBSERVATION,
                shape=(len(spec.observation_low),),
                low=spec.observation_low,
                high=spec.observation_high,
                # Of a dict observation the order must be known to whoever builds the vector.
                element_names=contract.observation_names or element_names(spec.observation_parts),
                units=contract.observation_units,
            ),
        ),
        action=SpaceSpec(
            name="action",
            shape=(len(spec.action_low),),
            low=spec.action_low,
            high=spec.action_high,
            element_names=contract.action_names,
            units=contract.action_units,
        ),
        variants={
            name: VariantSpec(graph=_graph_file(name), outputs=module.output_names, explain=explained.get(name))
            for name, module in modules.items()
        },
        default_variant=trained.recommended["variant"] if trained.recommended else "greedy_mode",
        num_components=spec.config.num_components,
        min_mixing_weight=spec.config.effective_min_mixing_weight,
        control_period_s=contract.control_period_s,
        golden=GoldenSpec(
            rows=proof.GOLDEN_ROWS,
            action_tolerance=proof.ACTION_TOLERANCE,
            output_tolerance=proof.OUTPUT_TOLERANCE,
            tie_width=proof.tie_width(rows["greedy_mode.hyper_q"]),
        ),
        warnings=warnings,
        evaluation={"recommended": trained.recommended} if trained.recommended else {},
        provenance={
            "datasets": list(spec.datasets),
            "dataset_rows": spec.dataset_rows,
            "dataset_fingerprint": spec.dataset_fingerprint,
            "training_env": spec.env,
            "training_config": asdict(spec.config),
            "training_config_digest": spec.config.digest,
            "onnx_opset": OPSET_VERSION,
            "versions": {name: version(name) for name in ("lom", "torch", "onnx", "onnxruntime", "numpy")},
            "commit": _commit(),
        },
    )


def _metadata(manifest: Manifest) -> dict[str, str]:
    """What the ONNX files say of themselves; the digests of the files cannot be among it.

    `observation_names` and `joint_names` are the keys that other robot tools look for.
    """
    metadata = {METADATA_KEY: manifest.to_json(), "lom.contract_hash": manifest.contract_hash}
    for key, names in (
        ("observation_names", manifest.inputs[0].element_names),
        ("joint_names", manifest.action.element_names),
    ):
        if names:
            metadata[key] = ",".join(names)
    return metadata


def _commit() -> str | None:
    """The commit of this source tree, where it is one; not that of a repository which only happens to hold the venv."""
    git = ["git", "-C", str(Path(lom.__file__).parent)]
    commands = ([*git, "ls-files", "--error-unmatch", "__init__.py"], [*git, "rev-parse", "HEAD"])
    try:
        outputs = [subprocess.run(c, capture_output=True, text=True, check=True, timeout=10).stdout for c in commands]
    except (OSError, subprocess.SubprocessError):
        return None
    return outputs[-1].strip()


def _read_key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError("BAD_KEY", f"--sign-key {path}: expected a readable PEM file") from error


def _check_contract(contract: Contract, spec: RunSpec) -> None:
    for name, texts, expected in (
        ("observation.names", contract.observation_names, len(spec.observation_low)),
        ("observation.units", contract.observation_units, len(spec.observation_low)),
        ("action.names", contract.action_names, len(spec.action_low)),
        ("action.units", contract.action_units, len(spec.action_low)),
    ):
        if len(texts) not in (0, expected):
            raise ContractError(f"--contract: {name}: expected {expected}, got {len(texts)}")


def _default_name(origin: str) -> str:
    """`lom/Fork-v0` → `fork-v0`; every character that a policy name may not hold becomes a hyphen."""
    name = re.sub(r"[^a-z0-9_-]+", "-", origin.rsplit("/", 1)[-1].rsplit(":", 1)[-1].lower()).strip("-_")
    return name[:64] or "policy"


def _check_env(env_id: str, spec: RunSpec) -> None:
    spaces = env_spaces(env_id, spec.observation_keys)
    trained_for = (len(spec.observation_low), spec.action_low, spec.action_high)
    found = (spaces.observation_low.size, tuple(spaces.action_low.tolist()), tuple(spaces.action_high.tolist()))
    if found != trained_for:
        raise UnsuitableEnvError(
            f"environment {env_id!r}: expected {trained_for[0]} observation dimensions and actions in "
            f"{list(trained_for[1])} to {list(trained_for[2])} as in training, got {found[0]} and "
            f"{list(found[1])} to {list(found[2])}"
        )


def _evaluate(
    manifest: Manifest, graphs: Mapping[str, bytes], env_id: str, episodes: int, observation_keys: Sequence[str]
) -> dict[str, Any]:
    """Plays the graphs themselves, not the torch modules that they came from; says which of them to act by."""
    results, returns = {}, {}
    for variant, spec in manifest.variants.items():
        session = proof.cpu_session(graphs[spec.graph])

        def act(observations: NDArray[np.float32], session: Any = session) -> NDArray[np.float32]:
            actions: NDArray[np.float32] = session.run(["action"], {OBSERVATION: observations})[0]
            return actions

        outcome = evaluate(act, env_id, episodes=episodes, seed=EVALUATION_SEED, observation_keys=observation_keys)
        results[variant], returns[variant] = outcome.to_json(), outcome.returns
    return {
        "env": env_id,
        "episodes": episodes,
        "seed": EVALUATION_SEED,
        "variants": results,
        "recommended": asdict(recommend(returns)),
    }
