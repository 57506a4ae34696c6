"""A bundle answers as torch did, for every batch size, or it does not exist."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from lom.config import TrainConfig
from lom.policy import LomPolicy
from lom_bundle import BundleError, read_bundle
from lom_export import exporter, main, proof
from lom_export.exporter import ExportConfig, export_run
from lom_export.graph import export_graph
from tests.support.runs import save_untrained_run

CONFIG = TrainConfig(mixture_steps=5, steps=4, num_components=4, hidden=(16, 16), mixture_hidden=(16, 16))
LOW, HIGH = (-2.0, 0.0), (2.0, 0.5)


@pytest.mark.parametrize("components", [1, 2, 7])
@pytest.mark.parametrize("head", ["components", "one_hot"])
def test_graphs_answer_as_torch_at_every_batch_size(tmp_path: Path, components: int, head: str) -> None:
    config = replace(CONFIG, num_components=components, hyper_head=head)  # type: ignore[arg-type]
    policy = save_untrained_run(tmp_path / "run", config=config, action_low=LOW, action_high=HIGH)
    export_run(ExportConfig(run=tmp_path / "run", out=tmp_path / "bundle"))
    bundle = read_bundle(tmp_path / "bundle")
    rng = np.random.default_rng(1)
    for variant, outputs in (("greedy_mode", bundle.manifest.variants["greedy_mode"].outputs), ("actor", ("action",))):
        session = proof.cpu_session(bundle.graphs[variant])
        for rows in (1, 2, 7, 64, 1000):
            observations = (3 + 2 * rng.standard_normal((rows, 2))).astype(np.float32)
            with torch.no_grad():
                expected = policy(torch.from_numpy(observations), variant)
            got = dict(zip(outputs, session.run(list(outputs), {"observation": observations}), strict=True))
            clear = np.ones(rows, bool)
            if variant == "greedy_mode":
                margin = expected["margin"].numpy()
                on_edge = (np.abs(expected["mixing_weights"].numpy() - policy.min_mixing_weight) < 1e-5).any(axis=1)
                clear = ~(margin < 1e-4) & ~on_edge
                assert np.isnan(got["margin"][clear]).tolist() == np.isnan(margin[clear]).tolist()
            for name, array in got.items():
                difference = np.abs(array - expected[name].numpy())[clear]
                assert np.nan_to_num(difference).max(initial=0.0) < 1e-4, (variant, rows, name)
            scale = np.subtract(HIGH, LOW)
            assert (np.abs(got["action"] - expected["action"].numpy())[clear] / scale).max(initial=0.0) < 1e-5


def test_the_bundle_describes_its_policy(tmp_path: Path) -> None:
    save_untrained_run(tmp_path / "Run 1", config=CONFIG, action_low=LOW, action_high=HIGH)
    exported = export_run(ExportConfig(run=tmp_path / "Run 1", out=tmp_path / "bundle", with_bc=True))
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.digest == exported.digest
    assert bundle.manifest.policy == "run-1"
    assert bundle.manifest.action.low == (-2.0, 0.0)
    assert set(bundle.manifest.variants) == {"greedy_mode", "actor", "bc"}
    assert bundle.manifest.default_variant == "greedy_mode"
    assert len(bundle.golden["observation"]) == 64
    assert bundle.manifest.provenance["training_config_digest"] == CONFIG.digest
    for graph in bundle.graphs.values():
        model = onnx.load_from_string(graph)
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert card.startswith("---\n")
    assert bundle.manifest.contract_hash in card


def test_golden_rows_reach_the_corners_and_the_ties_of_the_data(tmp_path: Path) -> None:
    policy = save_untrained_run(tmp_path / "run", config=CONFIG)
    sample = (3 + 2 * np.random.default_rng(0).standard_normal((500, 2))).astype(np.float32)
    golden = proof.parity_observations(sample, policy)[: proof.GOLDEN_ROWS]
    assert (golden.max(axis=0) == sample.max(axis=0)).all()
    assert (golden.min(axis=0) == sample.min(axis=0)).all()
    margins = proof.answers(policy, "greedy_mode", sample)["margin"]
    assert np.nanmin(margins) in proof.answers(policy, "greedy_mode", golden)["margin"]


def test_a_tiny_dataset_still_gives_all_golden_rows(tmp_path: Path) -> None:
    policy = save_untrained_run(tmp_path / "run", config=CONFIG)
    assert len(proof.parity_observations(np.ones((3, 2), np.float32), policy)) >= proof.GOLDEN_ROWS


@pytest.mark.parametrize("variant", ["greedy_mode", "actor"])
def test_one_weight_changed_by_a_thousandth_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    save_untrained_run(tmp_path / "run", config=CONFIG)

    def perturbing(policy: LomPolicy, name: str) -> bytes:
        graph = export_graph(policy, name)
        if name != variant:
            return graph
        model = onnx.load_from_string(graph)
        weight = next(t for t in model.graph.initializer if len(t.dims) == 2 and t.dims[0] == 16)
        values = onnx.numpy_helper.to_array(weight).copy()
        values[0, 0] += 1e-3
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        return model.SerializeToString()

    monkeypatch.setattr(exporter, "export_graph", perturbing)
    with pytest.raises(BundleError, match=rf"SELF_TEST_FAILED: {variant}: row \d+: "):
        export_run(ExportConfig(run=tmp_path / "run", out=tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


def test_the_evaluation_chooses_the_default_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_untrained_run(tmp_path / "run", config=CONFIG, env="lom/Fork-v0")
    export_run(ExportConfig(run=tmp_path / "run", out=tmp_path / "bundle", env="lom/Fork-v0", episodes=3))
    manifest = read_bundle(tmp_path / "bundle").manifest
    returns = {name: result["return_mean"] for name, result in manifest.evaluation["variants"].items()}
    assert set(returns) == {"greedy_mode", "actor"}
    assert returns[manifest.default_variant] == max(returns.values())
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
    assert caught.value.code == 1
    printed = capsys.readouterr().err
    assert message in printed.replace("\n", " ")
    assert "Traceback" not in printed
    assert not (tmp_path / "bundle").exists()


def test_an_existing_destination_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bundle").mkdir()
    with pytest.raises(SystemExit):
        main.main([str(tmp_path / "gone"), "--out", str(tmp_path / "bundle")])
    assert "DESTINATION_EXISTS" in capsys.readouterr().err
