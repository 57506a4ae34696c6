"""`lom_server.loading`: from a bundle on disk to a policy that answers."""

import time
from pathlib import Path

import numpy as np
import pytest

from lom_bundle import BundleError
from lom_server.batcher import MicroBatcher
from lom_server.config import ServerConfig
from lom_server.loading import MESSAGE_OVERHEAD_BYTES, load_policy, max_rows_of
from lom_server.service import ActRequest, PolicyService, PolicyVersions
from tests.support.bundles import Flaws, toy_manifest, write_test_bundle

GRAPHS = {"greedy_mode", "greedy_mode.explain", "actor"}
# As a verifier would have measured: one row inline, more of them in the engine thread.
COSTS = {graph: {1: 100_000, 2: 2_000_000} for graph in GRAPHS}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    write_test_bundle(path, policy="arm")
    return path


async def test_what_is_loaded_answers_under_the_name_and_version_given(bundle: Path) -> None:
    digest = write_test_bundle(bundle.with_name("other"), policy="arm", flaws=Flaws(action_offset=0.25))
    config = ServerConfig(models=bundle)
    policy = load_policy("gripper", 7, bundle.with_name("other"), config, digest=digest, costs=COSTS).policy
    assert (policy.name, policy.version, policy.bundle_digest) == ("gripper", 7, digest)
    assert policy.manifest.policy == "arm"
    assert policy.provider == "CPUExecutionProvider"
    batcher = MicroBatcher(max_batch_rows=16, max_queue_rows=16)
    service = PolicyService(batcher=batcher)
    service.publish("gripper", PolicyVersions(versions={7: policy}, default_version=7))
    observation = np.array([[0.1, 0.3, 0.2]], dtype=np.float32)  # mode 1, whose mean is (0, 0.25)
    reply = await service.act(
        ActRequest(policy="gripper", inputs=[("observation", observation)]), time.monotonic_ns() + 10**10
    )
    np.testing.assert_allclose(reply.action, [[0.25, 0.5]])
    batcher.close()


def test_a_bundle_that_is_not_the_one_that_was_proved_is_refused(bundle: Path) -> None:
    with pytest.raises(BundleError) as refusal:
        load_policy("arm", 1, bundle, ServerConfig(models=bundle), digest="0" * 64, costs=COSTS)
    assert refusal.value.reason == "DIGEST_MISMATCH"


def test_golden_rows_are_replayed_here_too(bundle: Path) -> None:
    write_test_bundle(bundle.with_name("wrong"), flaws=Flaws(wrong_golden=True))
    with pytest.raises(BundleError) as refusal:
        load_policy("arm", 1, bundle.with_name("wrong"), ServerConfig(models=bundle), costs=COSTS)
    assert refusal.value.reason == "SELF_TEST_FAILED"


@pytest.mark.parametrize(("inference", "inline_rows"), [("auto", 1), ("inline", 1024), ("thread", 0)])
def test_measured_costs_place_batches_and_foresee_their_end(bundle: Path, inference: str, inline_rows: int) -> None:
    config = ServerConfig(models=bundle, inference=inference)  # type: ignore[arg-type]
    lanes = load_policy("arm", 1, bundle, config, costs=COSTS).policy.lanes
    assert lanes.keys() == GRAPHS
    now_ns = time.monotonic_ns()
    for lane in lanes.values():
        assert lane.inline_rows == inline_rows
        assert lane.cost.estimate_ns(2, now_ns) == 2_000_000


def test_without_costs_they_are_measured_here(bundle: Path) -> None:
    lanes = load_policy("arm", 1, bundle, ServerConfig(models=bundle, max_batch_rows=4)).policy.lanes
    now_ns = time.monotonic_ns()
    assert all(0 < lane.cost.estimate_ns(4, now_ns) < 10**9 for lane in lanes.values())


def test_answers_carry_what_robots_need_and_the_explain_graph_all_of_it(bundle: Path) -> None:
    lanes = load_policy("arm", 1, bundle, ServerConfig(models=bundle), costs=COSTS).policy.lanes
    assert set(lanes["actor"].outputs) == {"action", "state_score"}
    assert set(lanes["greedy_mode"].outputs) == {"action", "mode", "margin", "state_score"}
    assert set(lanes["greedy_mode.explain"].outputs) == {
        *("action", "mode", "margin", "state_score"),
        *("hyper_q", "mixing_weights", "component_means", "component_log_stds"),
    }


@pytest.mark.parametrize(
    ("message_bytes", "batch_rows", "rows"),
    [
        (4 * 1024 * 1024, 1024, 1024),  # a batch holds less than a message
        (MESSAGE_OVERHEAD_BYTES + 120, 1024, 10),  # three float32 a row
        (MESSAGE_OVERHEAD_BYTES, 1024, 1),  # one row must do
    ],
)
def test_a_request_fits_into_a_message_and_into_a_batch(message_bytes: int, batch_rows: int, rows: int) -> None:
    config = ServerConfig(models=Path("models"), max_message_bytes=message_bytes, max_batch_rows=batch_rows)
    assert max_rows_of(toy_manifest(), config) == rows
