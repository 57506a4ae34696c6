"""`lom_server.engine` on real graphs."""

import dataclasses
import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from lom_api.reasons import Reason
from lom_bundle import Bundle, BundleError, read_bundle
from lom_server.batcher import Rows
from lom_server.engine import OnnxEngine
from lom_server.errors import PolicyError, StartError
from tests.support.bundles import (
    Flaws,
    actor_action,
    explain_graph,
    golden_observations,
    greedy_action,
    greedy_margin,
    greedy_mode,
    write_test_bundle,
)
from tests.support.servers import wait_until

GRAPHS = ("greedy_mode", "greedy_mode.explain", "actor")
HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def bundle_with(path: Path, flaws: Flaws) -> Bundle:
    write_test_bundle(path / "bundle", flaws=flaws)
    return read_bundle(path / "bundle")


@pytest.fixture
def bundle(toy_bundle: Path) -> Bundle:
    return read_bundle(toy_bundle)


@pytest.mark.parametrize("rows", [1, 2, 7, 16])
def test_answers_are_the_hand_worked_ones(bundle: Bundle, rows: int) -> None:
    engine = OnnxEngine(bundle, provider="cpu")
    observation = golden_observations()[:rows]
    greedy = engine.run("greedy_mode", ("action", "mode", "margin"), {"observation": observation})
    assert list(greedy) == ["action", "mode", "margin"]
    np.testing.assert_array_equal(greedy["mode"], greedy_mode(observation))
    np.testing.assert_allclose(greedy["margin"], greedy_margin(observation), rtol=1e-6)
    np.testing.assert_array_equal(greedy["action"], greedy_action(observation))
    actor = engine.run("actor", ("action",), {"observation": observation})
    assert list(actor) == ["action"]
    np.testing.assert_allclose(actor["action"], actor_action(observation), rtol=1e-6)


def test_a_row_alone_equals_the_row_in_a_batch(tmp_path: Path) -> None:
    engine = OnnxEngine(bundle_with(tmp_path, Flaws(burn_layers=1)), provider="cpu")
    observation = golden_observations()
    together = engine.run("greedy_mode", ("action", "mode"), {"observation": observation})
    for row in range(len(observation)):
        alone = engine.run("greedy_mode", ("action", "mode"), {"observation": observation[row : row + 1]})
        np.testing.assert_array_equal(alone["mode"], together["mode"][row : row + 1])
        np.testing.assert_allclose(alone["action"], together["action"][row : row + 1], rtol=1e-6)


def test_answers_own_their_memory(bundle: Bundle) -> None:
    engine = OnnxEngine(bundle, provider="cpu")
    rows = {"observation": golden_observations()}
    first = engine.run("actor", ("action",), rows)["action"]
    kept = first.copy()
    second = engine.run("actor", ("action",), {"observation": -rows["observation"]})["action"]
    assert not np.may_share_memory(first, second)
    np.testing.assert_array_equal(first, kept)


def test_the_runtimes_own_words_stay_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = OnnxEngine(bundle_with(tmp_path, Flaws(raise_above=10.0)), provider="cpu")
    fatal = np.full((1, 3), 11.0, dtype=np.float32)
    with caplog.at_level(logging.ERROR, "lom_server"), pytest.raises(PolicyError) as failure:
        engine.run("actor", ("action",), {"observation": fatal})
    assert failure.value.reason is Reason.INFERENCE_FAILED
    assert "Gather" not in failure.value.detail
    assert "Gather" in caplog.text
    assert failure.value.detail.split()[-1] in caplog.text
    engine.run("actor", ("action",), {"observation": -fatal})


def test_an_answer_of_another_shape_is_refused(bundle: Bundle) -> None:
    other_action = dataclasses.replace(bundle.manifest.action, shape=(3,), low=(-1.0,) * 3, high=(1.0,) * 3)
    lying = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, action=other_action))
    with pytest.raises(PolicyError) as failure:
        OnnxEngine(lying, provider="cpu").run("actor", ("action",), {"observation": golden_observations()})
    assert failure.value.reason is Reason.BAD_MODEL_OUTPUT
    assert "expected float32[16, 3], got float32[16, 2]" in failure.value.detail


def test_a_run_that_is_stopped_fails_and_the_next_one_runs(tmp_path: Path) -> None:
    engine = OnnxEngine(bundle_with(tmp_path, Flaws(burn_layers=64)), provider="cpu")
    endless = {"observation": np.zeros((4096, 3), dtype=np.float32)}
    failures: list[PolicyError] = []

    def run() -> None:
        try:
            engine.run("actor", ("action",), endless)
        except PolicyError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: engine.running_for_ns > 20_000_000, "the run is under way")
    engine.stop_run()
    thread.join()
    assert [failure.reason for failure in failures] == [Reason.INFERENCE_FAILED]
    assert engine.running_for_ns == 0
    engine.run("actor", ("action",), {"observation": golden_observations()})


def test_a_sound_bundle_passes_its_self_check(bundle: Bundle) -> None:
    OnnxEngine(bundle, provider="cpu").self_check()


@pytest.mark.parametrize(
    "flaws",
    [Flaws(wrong_golden=True), Flaws(nan_above=-0.5), Flaws(raise_above=-0.5)],
    ids=["wrong answers", "NaN", "raises"],
)
def test_a_bundle_that_does_not_reproduce_its_golden_rows_fails(tmp_path: Path, flaws: Flaws) -> None:
    engine = OnnxEngine(bundle_with(tmp_path, flaws), provider="cpu")
    with pytest.raises(BundleError) as failure:
        engine.self_check()
    assert failure.value.reason == "SELF_TEST_FAILED"


def test_the_self_check_also_runs_rows_one_by_one(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OnnxEngine(bundle, provider="cpu")
    sizes = []
    run = engine.run

    def watched_run(graph: str, outputs: Sequence[str], rows: Rows) -> Rows:
        sizes.append((graph, len(rows["observation"])))
        return run(graph, outputs, rows)

    monkeypatch.setattr(engine, "run", watched_run)
    engine.self_check()
    assert {(graph, size) for graph in GRAPHS for size in (1, 16)} == set(sizes)


def test_the_self_check_replays_the_explain_graph_too(bundle: Bundle) -> None:
    wrong = explain_graph(Flaws(action_offset=0.125)).SerializeToString()
    engine = OnnxEngine(dataclasses.replace(bundle, explain_graphs={"greedy_mode": wrong}), provider="cpu")
    with pytest.raises(BundleError, match=r"^SELF_TEST_FAILED: "):
        engine.self_check()


def test_every_graph_is_measured_at_powers_of_two(bundle: Bundle) -> None:
    costs = OnnxEngine(bundle, provider="cpu").measured_costs(20)
    assert costs.keys() == set(GRAPHS)
    for sizes in costs.values():
        assert list(sizes) == [1, 2, 4, 8, 16]
        assert min(sizes.values()) > 0


def test_sizes_that_would_take_too_long_are_not_measured(tmp_path: Path) -> None:
    engine = OnnxEngine(bundle_with(tmp_path, Flaws(burn_layers=64)), provider="cpu")
    (longest, *_), *_ = sorted((list(sizes)[::-1] for sizes in engine.measured_costs(2**20).values()), reverse=True)
    assert longest < 2**20


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (b"no graph at all", "expected a graph that loads on CPUExecutionProvider"),
        (b"", "expected a graph that loads on CPUExecutionProvider"),
    ],
)
def test_a_graph_that_does_not_load_is_named(bundle: Bundle, graph: bytes, message: str) -> None:
    broken = dataclasses.replace(bundle, graphs={**bundle.graphs, "actor": graph})
    with pytest.raises(StartError, match=f"^BAD_GRAPH: actor: {message}"):
        OnnxEngine(broken, provider="cpu")


def test_a_graph_with_other_inputs_is_refused(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path, Flaws(name_of_observation_in_graph="obs"))
    with pytest.raises(StartError, match=r"^BAD_GRAPH: greedy_mode: expected the inputs"):
        OnnxEngine(bundle, provider="cpu")


def test_a_variant_without_its_outputs_is_refused(bundle: Bundle) -> None:
    swapped = dataclasses.replace(bundle, graphs={**bundle.graphs, "greedy_mode": bundle.graphs["actor"]})
    with pytest.raises(StartError, match=r"^BAD_GRAPH: greedy_mode: expected a float32 or int32 output 'mode'"):
        OnnxEngine(swapped, provider="cpu")


@pytest.mark.skipif(HAS_CUDA, reason="this runtime has CUDA")
def test_a_provider_that_is_not_there_is_refused(bundle: Bundle) -> None:
    with pytest.raises(StartError, match=r"^PROVIDER_UNAVAILABLE: expected CUDAExecutionProvider"):
        OnnxEngine(bundle, provider="cuda")


@pytest.mark.skipif(HAS_CUDA, reason="this runtime has CUDA")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_silent_fallback_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lom_server.engine.ort.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(StartError, match=r"^PROVIDER_UNAVAILABLE: .*got CPUExecutionProvider"):
        OnnxEngine(bundle, provider="cuda")


@pytest.mark.skipif(HAS_CUDA, reason="this runtime has CUDA")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_auto_takes_the_processor_where_cuda_does_not_work(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert OnnxEngine(bundle).provider == "CPUExecutionProvider"
    monkeypatch.setattr(
        "lom_server.engine.ort.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    assert OnnxEngine(bundle).provider == "CPUExecutionProvider"
