"""A bundle answers as torch did, for every batch size, or it does not exist."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from lom.config import TrainConfig
from lom.evaluation import Evaluation
from lom.policy import LomPolicy
from lom.run import write_summary
from lom_bundle import Bundle, BundleError, read_bundle
from lom_export import exporter, main, proof
from lom_export import precision as precision_module
from lom_export.contract import ContractError
from lom_export.exporter import ExportConfig, export_run
from lom_export.graph import PolicyGraph, export_graph
from lom_export.precision import Precision, PrecisionBounds
from tests.support.runs import save_untrained_run

CONFIG = TrainConfig(mixture_steps=5, steps=4, num_components=4, hidden=(16, 16), mixture_hidden=(16, 16))
LOW, HIGH = (-2.0, 0.0), (2.0, 0.5)


def differences(got: NDArray[Any], expected: torch.Tensor) -> NDArray[Any]:
    """Relative where the value is above 1; a NaN on one side only counts as infinite."""
    wanted = expected.numpy()
    error = np.abs(got - wanted) / np.maximum(np.abs(wanted), 1.0)
    return np.where(np.isnan(wanted) & np.isnan(got), 0.0, np.nan_to_num(error, nan=np.inf))


@dataclass(frozen=True)
class Exported:
    """A run with random weights, and its bundle."""

    run: Path
    policy: LomPolicy
    bundle: Bundle
    folder: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exported")
    policy = save_untrained_run(folder / "Run 1", config=CONFIG, action_low=LOW, action_high=HIGH)
    export_run(ExportConfig(run=folder / "Run 1", out=folder / "bundle", with_bc=True))
    return Exported(folder / "Run 1", policy, read_bundle(folder / "bundle"), folder / "bundle")


@pytest.mark.parametrize(
    "choices",
    [
        {"num_components": 1},
        {"num_components": 7},
        {"hyper_head": "one_hot"},
        {"actor_form": "direct"},
    ],
    ids=str,
)
def test_graphs_answer_as_torch_at_every_batch_size(tmp_path: Path, choices: dict[str, Any]) -> None:
    config = replace(CONFIG, **choices)
    policy = save_untrained_run(tmp_path / "run", config=config, action_low=LOW, action_high=HIGH)
    export_run(ExportConfig(run=tmp_path / "run", out=tmp_path / "bundle"))
    bundle = read_bundle(tmp_path / "bundle")
    rng = np.random.default_rng(1)
    for variant in ("greedy_mode", "actor"):
        session = proof.cpu_session(bundle.graphs[variant])
        names = bundle.manifest.variants[variant].outputs
        for rows in (1, 2, 7, 64, 1000):
            observations = (3 + 2 * rng.standard_normal((rows, 2))).astype(np.float32)
            with torch.no_grad():
                expected = policy(torch.from_numpy(observations), variant)
            got = dict(zip(names, session.run(list(names), {"observation": observations}), strict=True))
            clear = np.ones(rows, bool)
            if policy.chooses_mode(variant):
                on_edge = (np.abs(expected["mixing_weights"].numpy() - policy.min_mixing_weight) < 1e-5).any(axis=1)
                clear = ~(expected["margin"].numpy() < 1e-4) & ~on_edge
                assert (got["mode"] == expected["mode"].numpy())[clear].all()
                assert differences(got["margin"], expected["margin"])[clear].max(initial=0.0) < 1e-4
            error = np.abs(got["action"] - expected["action"].numpy()) / np.subtract(HIGH, LOW)
            assert error[clear].max(initial=0.0) < 1e-5
            assert clear.mean() > 0.9
            assert np.isfinite(got["state_score"]).all()
            assert np.isfinite(got["action_score"]).all()


def test_a_residual_actor_names_its_mode_and_ties_are_known(tmp_path: Path) -> None:
    save_untrained_run(tmp_path / "run", config=CONFIG, action_low=LOW, action_high=HIGH)
    export_run(ExportConfig(run=tmp_path / "run", out=tmp_path / "bundle", precision="fp16"))
    bundle = read_bundle(tmp_path / "bundle")
    golden = bundle.golden
    assert bundle.manifest.variants["actor"].outputs[:3] == ("action", "mode", "margin")
    for name in ("mode", "margin"):
        np.testing.assert_array_equal(golden[f"actor.{name}"], golden[f"greedy_mode.{name}"])
    assert np.abs(golden["actor.action"] - golden["greedy_mode.action"]).max() > 0.05


def test_a_residual_actor_is_explained_too(tmp_path: Path) -> None:
    """Forced modes, noise and diagnostics, by the deviation that it learned."""
    policy = save_untrained_run(tmp_path / "run", config=CONFIG, action_low=LOW, action_high=HIGH)
    export_run(ExportConfig(run=tmp_path / "run", out=tmp_path / "bundle"))
    bundle = read_bundle(tmp_path / "bundle")
    explain = bundle.manifest.variants["actor"].explain
    assert explain is not None
    observations = (3 + 2 * np.random.default_rng(2).standard_normal((12, 2))).astype(np.float32)
    forced = np.arange(12, dtype=np.int32) % 5 - 1  # -1 leaves the choice free
    noise = np.random.default_rng(3).standard_normal((12, 2)).astype(np.float32)
    feeds = {"observation": observations, "forced_mode": forced, "noise": noise}
    session = proof.cpu_session(bundle.explain_graphs["actor"])
    answer = dict(zip(explain.outputs, session.run(list(explain.outputs), feeds), strict=True))
    (free,) = proof.cpu_session(bundle.graphs["actor"]).run(["mode"], {"observation": observations})
    np.testing.assert_array_equal(answer["mode"], np.where(forced >= 0, forced, free))
    with torch.no_grad():
        deviation = 3.0 * policy.actor(policy.normaliser(torch.from_numpy(observations))).numpy()
    rows = np.arange(12)
    means, stds = (answer[name][rows, answer["mode"]] for name in ("component_means", "component_log_stds"))
    expected = np.clip(means + np.exp(stds) * (deviation + noise), LOW, HIGH)
    np.testing.assert_allclose(answer["action"], expected, atol=1e-5)


def test_a_forced_mode_gives_that_components_mean_and_noise_its_spread(exported: Exported) -> None:
    policy, bundle = exported.policy, exported.bundle
    explain = bundle.manifest.variants["greedy_mode"].explain
    assert explain is not None
    assert set(explain.inputs) == {"forced_mode", "noise"}
    session = proof.cpu_session(bundle.explain_graphs["greedy_mode"])
    observations = (3 + 2 * np.random.default_rng(2).standard_normal((12, 2))).astype(np.float32)
    free = proof.free_choice(12, policy)
    forced = np.arange(12, dtype=np.int32) % 5 - 1  # -1 leaves the choice free
    ones = np.ones((12, 2), np.float32)

    def answer(**changes: NDArray[Any]) -> dict[str, NDArray[Any]]:
        feeds = {"observation": observations, **free, **changes}
        return dict(zip(explain.outputs, session.run(list(explain.outputs), feeds), strict=True))

    chosen, overridden, sampled = answer(), answer(forced_mode=forced), answer(forced_mode=forced, noise=ones)
    lean = proof.cpu_session(bundle.graphs["greedy_mode"]).run(["action", "mode"], {"observation": observations})
    np.testing.assert_array_equal(chosen["mode"], lean[1])
    np.testing.assert_allclose(chosen["action"], lean[0], atol=1e-5)
    acting = np.where(forced >= 0, forced, chosen["mode"])
    np.testing.assert_array_equal(overridden["mode"], acting)
    rows = np.arange(12)
    means = overridden["component_means"][rows, acting]
    stds = np.exp(overridden["component_log_stds"][rows, acting])
    np.testing.assert_allclose(overridden["action"], means, atol=1e-6)
    np.testing.assert_allclose(sampled["action"], np.clip(means + stds, LOW, HIGH), atol=1e-5)
    np.testing.assert_array_equal(overridden["margin"], chosen["margin"])  # the margin is the free choice's


def test_the_action_score_is_the_negative_log_density_of_the_behaviour(exported: Exported) -> None:
    """Recomputed in float64 from the diagnostics of the explain graph."""
    policy, bundle = exported.policy, exported.bundle
    observations = bundle.golden["observation"]
    feeds = {"observation": observations, **proof.free_choice(len(observations), policy)}
    names = ["action", "action_score", "mixing_weights", "component_means", "component_log_stds"]
    arrays = proof.cpu_session(bundle.explain_graphs["greedy_mode"]).run(names, feeds)
    action, score, weights, means, log_stds = (array.astype(np.float64) for array in arrays)
    standardised = (action[:, None] - means) / np.exp(log_stds)
    component = -(0.5 * standardised**2 + log_stds + 0.5 * np.log(2 * np.pi)).sum(axis=2)
    expected = -np.log((weights * np.exp(component)).sum(axis=1))
    np.testing.assert_allclose(score, expected, rtol=1e-4, atol=1e-4)


def test_the_bundle_describes_its_policy(exported: Exported) -> None:
    bundle = exported.bundle
    assert bundle.manifest.policy == "run-1"
    assert bundle.manifest.action.low == (-2.0, 0.0)
    assert set(bundle.manifest.variants) == {"greedy_mode", "actor", "bc"}
    assert bundle.manifest.default_variant == "greedy_mode"
    assert len(bundle.golden["observation"]) == 64
    assert bundle.manifest.provenance["commit"] is None or len(bundle.manifest.provenance["commit"]) == 40
    assert bundle.manifest.provenance["training_config_digest"] == CONFIG.digest
    for graph in (*bundle.graphs.values(), *bundle.explain_graphs.values()):
        model = onnx.load_from_string(graph)
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(metadata["lom.manifest"])["contract_hash"] == bundle.manifest.contract_hash
    card = (exported.folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert bundle.manifest.contract_hash in card


def test_golden_rows_reach_the_corners_and_the_near_ties_of_the_data(tmp_path: Path) -> None:
    policy = save_untrained_run(tmp_path / "run", config=CONFIG)
    sample = (3 + 2 * np.random.default_rng(0).standard_normal((500, 2))).astype(np.float32)
    golden = proof.parity_observations(sample, policy)[: proof.GOLDEN_ROWS]
    assert (golden.max(axis=0) == sample.max(axis=0)).all()
    assert (golden.min(axis=0) == sample.min(axis=0)).all()
    with torch.no_grad():
        of_sample, of_golden = (
            policy.greedy_mode(torch.from_numpy(rows))["margin"].numpy() for rows in (sample, golden)
        )
    assert np.sort(of_golden)[5] <= np.nanquantile(of_sample, 0.02)


def test_a_tiny_dataset_still_gives_all_golden_rows(tmp_path: Path) -> None:
    policy = save_untrained_run(tmp_path / "run", config=CONFIG)
    assert len(proof.parity_observations(np.ones((3, 2), np.float32), policy)) >= proof.GOLDEN_ROWS


def perturbed(graph: bytes, name: str) -> bytes:
    model = onnx.load_from_string(graph)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] += 1e-3
    weight.CopyFrom(onnx.numpy_helper.from_array(values, name))
    content: bytes = model.SerializeToString()
    return content


@pytest.mark.parametrize("explain", [False, True])
@pytest.mark.parametrize("head", ["components", "one_hot"])
def test_any_weight_changed_by_a_thousandth_is_noticed(tmp_path: Path, head: str, explain: bool) -> None:
    config = replace(CONFIG, hyper_head=head)  # type: ignore[arg-type]
    policy = save_untrained_run(tmp_path / "run", config=config)
    module = PolicyGraph(policy, "greedy_mode", None, explain=explain)
    graph = export_graph(module)
    proof.check_weights(module, graph)
    named = [tensor.name for tensor in onnx.load_from_string(graph).graph.initializer if tensor.data_type == 1]
    networks = [name for name in named if name.startswith("policy.")]
    assert len(networks) >= 15
    for name in networks:
        with pytest.raises(BundleError, match=f"SELF_TEST_FAILED: greedy_mode: {re.escape(name)}: expected the policy"):
            proof.check_weights(module, perturbed(graph, name))


def test_a_perturbed_graph_leaves_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_untrained_run(tmp_path / "run", config=CONFIG)

    def perturbing(module: PolicyGraph) -> bytes:
        return perturbed(export_graph(module), "policy.normaliser.mean")

    monkeypatch.setattr(exporter, "export_graph", perturbing)
    with pytest.raises(BundleError, match="SELF_TEST_FAILED"):
        export_run(ExportConfig(run=tmp_path / "run", out=tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


def test_wrong_answers_are_noticed_also_where_every_weight_is_right(exported: Exported) -> None:
    """A wrong operator: the same weights, the comparison of the support mask turned round."""
    bundle = exported.bundle
    model = onnx.load_from_string(bundle.graphs["greedy_mode"])
    masks = [node for node in model.graph.node if node.op_type == "GreaterOrEqual"]
    assert masks
    for node in masks:
        node.op_type = "LessOrEqual"
    with pytest.raises(BundleError, match=r"SELF_TEST_FAILED: greedy_mode: row \d+: "):
        proof.check_parity(bundle.manifest, "greedy_mode", model.SerializeToString(), bundle.golden)


def test_names_units_and_period_enter_the_contract(exported: Exported, tmp_path: Path) -> None:
    contract = {
        "observation": {"names": ["hip", "knee"], "units": ["rad", "rad"]},
        "action": {"names": ["hip_motor", "knee_motor"]},
        "control_period_s": 0.02,
    }
    (tmp_path / "contract.json").write_text(json.dumps(contract))
    export_run(ExportConfig(run=exported.run, out=tmp_path / "named", contract=tmp_path / "contract.json"))
    named, bare = read_bundle(tmp_path / "named"), exported.bundle
    assert named.manifest.inputs[0].element_names == ("hip", "knee")
    assert named.manifest.inputs[0].units == ("rad", "rad")
    assert named.manifest.control_period_s == 0.02
    assert named.manifest.contract_hash != bare.manifest.contract_hash
    metadata = proof.cpu_session(named.graphs["actor"]).get_modelmeta().custom_metadata_map
    assert metadata["observation_names"] == "hip,knee"
    assert metadata["joint_names"] == "hip_motor,knee_motor"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a readable JSON file"),
        ("[]", "the file: expected an object with action, control_period_s, observation"),
        ('{"observation": {"name": ["a", "b"]}}', "observation: expected an object with names, units"),
        ('{"observation": {"names": "ab"}}', "observation.names: expected a list of texts"),
        ('{"observation": {"names": ["a"]}}', "observation.names: expected 2, got 1"),
        ('{"action": {"units": ["m", "m", "m"]}}', "action.units: expected 2, got 3"),
        ('{"observation": {"names": ["a", "a"]}}', "element_names: expected each one once"),
        ('{"control_period_s": 0}', "control_period_s: expected seconds above 0, got 0"),
        ('{"control_period_s": NaN}', "control_period_s: expected seconds above 0, got nan"),
    ],
)
def test_a_contract_that_cannot_be_meant_is_refused(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, message: str
) -> None:
    monkeypatch.setattr(exporter, "export_graph", lambda module: b"")  # nothing may get as far as a graph
    (tmp_path / "contract.json").write_text(content)
    config = ExportConfig(run=exported.run, out=tmp_path / "bundle", contract=tmp_path / "contract.json")
    with pytest.raises((ContractError, BundleError), match=re.escape(message)):
        export_run(config)
    assert not (tmp_path / "bundle").exists()


def test_what_training_recommends_is_the_default_variant(tmp_path: Path) -> None:
    save_untrained_run(tmp_path / "run", config=CONFIG)
    recommended = {"variant": "actor", "reason": "actor - greedy_mode: 1", "warning": None}
    write_summary(tmp_path / "run", {"evaluation": {}, "off_policy_evaluation": {"recommended": recommended}})
    export_run(ExportConfig(run=tmp_path / "run", out=tmp_path / "bundle"))
    assert read_bundle(tmp_path / "bundle").manifest.default_variant == "actor"
    assert "what training recommends (actor - greedy_mode: 1)" in (tmp_path / "bundle" / "README.md").read_text()


@pytest.mark.parametrize(("gain", "chosen"), [((1.0, 1.0, 1.0), "actor"), ((9.0, 9.0, -9.0), "greedy_mode")])
def test_the_evaluation_at_export_has_the_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: Sequence[float], chosen: str
) -> None:
    """A gain in every episode is one beyond chance; a higher mean with losses among three episodes is none."""
    played = iter([np.zeros(3), np.array(gain)])  # greedy_mode, then actor
    monkeypatch.setattr(exporter, "evaluate", lambda *_, **__: Evaluation(returns=next(played), success_rate=None))
    save_untrained_run(tmp_path / "run", config=CONFIG, env="lom/Fork-v0")
    export_run(ExportConfig(run=tmp_path / "run", out=tmp_path / "bundle", env="lom/Fork-v0", episodes=3))
    manifest = read_bundle(tmp_path / "bundle").manifest
    assert set(manifest.evaluation["variants"]) == {"greedy_mode", "actor"}
    assert manifest.default_variant == chosen
    assert manifest.policy == "fork-v0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--env", "Pendulum-v1"], "expected 2 observation dimensions"),
        (["RUN", "--env", "lom/Spoon-v0"], "lom/Spoon-v0"),
        (["RUN", "--episodes", "0"], "--episodes: expected 1 or more, got 0"),
        (["RUN", "--name", "../up"], "policy: expected [a-z0-9]"),
        (["EMPTY"], "expected a training run"),
        (["gone"], "expected a training run"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    save_untrained_run(tmp_path / "run", config=CONFIG)
    (tmp_path / "empty").mkdir()
    places = {"RUN": str(tmp_path / "run"), "EMPTY": str(tmp_path / "empty")}
    with pytest.raises(SystemExit) as caught:
        main.main([*(places.get(word, word) for word in arguments), "--out", str(tmp_path / "bundle")])
    assert caught.value.code in (1, 2)
    captured = capsys.readouterr()
    printed = captured.err + captured.out
    assert message in printed.replace("\n", " ")
    assert "Traceback" not in printed
    assert not (tmp_path / "bundle").exists()


def test_an_existing_destination_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bundle").mkdir()
    with pytest.raises(SystemExit):
        main.main([str(tmp_path / "gone"), "--out", str(tmp_path / "bundle")])
    assert "DESTINATION_EXISTS" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_narrow_bundle_states_its_cost_and_proves_itself_within_it(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: Precision
) -> None:
    loose = {precision: PrecisionBounds(action_tolerance=0.2, max_flip_rate=0.2)}  # random weights, far from trained
    monkeypatch.setattr(precision_module, "PRECISION_BOUNDS", loose)
    result = export_run(ExportConfig(run=exported.run, out=tmp_path / "bundle", precision=precision))
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.manifest.precision == precision
    assert bundle.manifest.variants["greedy_mode"].explain is None
    costs = bundle.manifest.provenance["precision"]
    assert costs["greedy_mode"]["flip_rate"] == result.precision["greedy_mode"].flip_rate
    assert 0 < costs["actor"]["action_error"] <= 0.2
    main.main(["verify", str(tmp_path / "bundle")])


def test_a_precision_beyond_its_bounds_leaves_no_bundle(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    strict = {"int8": PrecisionBounds(action_tolerance=1e-6, max_flip_rate=0.0)}
    monkeypatch.setattr(precision_module, "PRECISION_BOUNDS", strict)
    with pytest.raises(BundleError, match="PRECISION_REFUSED: greedy_mode: int8: "):
        export_run(ExportConfig(run=exported.run, out=tmp_path / "bundle", precision="int8"))
    assert not (tmp_path / "bundle").exists()


def test_the_same_graphs_can_be_handed_to_triton(exported: Exported, tmp_path: Path) -> None:
    export_run(ExportConfig(run=exported.run, out=tmp_path / "models", format="triton"))
    observations = exported.bundle.golden["observation"]
    for variant in ("greedy_mode", "actor"):
        handed = (tmp_path / "models" / f"run-1-{variant}" / "1" / "model.onnx").read_bytes()
        action = proof.cpu_session(handed).run(["action"], {"observation": observations})[0]
        expected = proof.cpu_session(exported.bundle.graphs[variant]).run(["action"], {"observation": observations})
        np.testing.assert_array_equal(action, expected[0])
