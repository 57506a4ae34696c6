"""The client against the real server: the two agree on the contract, the answers and the reasons."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lom_client import ControlLoop, InvalidRequest, LoopConfig, PolicyClient, PolicyError, PolicyNotFound, Source
from lom_client.main import main
from tests.clients import toy_environments  # noqa: F401  registers Toy-v0
from tests.support import bundles
from tests.support.servers import running_server, wait_until


@pytest.fixture
def client(target: str) -> Iterator[PolicyClient]:
    with PolicyClient(target) as client:
        yield client


def test_the_spec_is_the_bundles(client: PolicyClient) -> None:
    spec = client.get_spec(deadline_s=10)
    assert (spec.policy, spec.default_variant) == (bundles.POLICY, "greedy_mode")
    assert (spec.observation.width, spec.action.width) == (bundles.OBSERVATION_DIM, bundles.ACTION_DIM)
    assert spec.num_components == bundles.NUM_COMPONENTS


@pytest.mark.parametrize("rows", [1, 2, 7, 16])
def test_both_variants_answer_what_can_be_computed_on_paper(client: PolicyClient, rows: int) -> None:
    observations = bundles.golden_observations()[:rows]
    greedy = client.act(observations, deadline_s=10, variant="greedy_mode")
    np.testing.assert_allclose(greedy.actions, bundles.greedy_action(observations), atol=1e-6)
    assert greedy.mode is not None
    assert greedy.margin is not None
    np.testing.assert_array_equal(greedy.mode, bundles.greedy_mode(observations))
    np.testing.assert_allclose(greedy.margin, bundles.greedy_margin(observations), atol=1e-6)
    actor = client.act(observations, deadline_s=10, variant="actor")
    np.testing.assert_allclose(actor.actions, bundles.actor_action(observations), atol=1e-6)
    assert actor.bundle_digest == greedy.bundle_digest == client.get_spec(deadline_s=10).bundle_digest


@pytest.mark.parametrize(
    "options",
    [{"explain": True}, {"mode": 0}, {"sampling_seed": 0}, {"previous_mode": 0, "hysteresis_width": 0.1}],
    ids=str,
)
def test_a_variant_without_modes_refuses_what_concerns_them(client: PolicyClient, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="variant 'actor': expected none of explain, mode") as caught:
        client.act(bundles.golden_observations()[0], deadline_s=10, variant="actor", **options)
    assert caught.value.reason == "BAD_OPTION"


@pytest.mark.parametrize("variant", ["greedy_mode", "actor"])
def test_a_row_unlike_the_training_data_is_worth_a_warning(client: PolicyClient, variant: str) -> None:
    observations = np.array([[0.1, -0.2, 0.3], [2.0, -2.0, 0.5]], np.float32)
    score = client.act(observations, deadline_s=10, variant=variant).scores["state_score"]
    np.testing.assert_allclose(score.values, [0.6, 4.5], atol=1e-6)
    assert score.threshold == bundles.STATE_THRESHOLD
    assert score.warns.tolist() == [False, True]
    single = client.act(observations[1], deadline_s=10, variant=variant).scores["state_score"]
    assert single.warns.shape == ()
    assert bool(single.warns)


def test_the_control_loop_is_fresh(client: PolicyClient) -> None:
    with ControlLoop(client, LoopConfig(period_s=10, kinds="position", safe_action=[0, 0])) as loop:
        assert {loop.step([0.1, 0.2, 0.3]).source for _ in range(20)} == {Source.FRESH}


def test_the_servers_refusals_are_typed(client: PolicyClient, target: str) -> None:
    spec = client.get_spec(deadline_s=10)
    too_many = np.zeros((spec.max_batch_rows + 1, spec.observation.width))
    with pytest.raises(InvalidRequest):
        client.act(too_many, deadline_s=10)
    with PolicyClient(target, policy="other") as other, pytest.raises(PolicyNotFound) as caught:
        other.act([0, 0, 0], deadline_s=10)
    assert caught.value.reason == "MODEL_NOT_FOUND"


def test_a_restart_is_survived(bundle: Path) -> None:
    with running_server(bundle) as server:
        client = PolicyClient(f"grpc://{server.address}")
        client.act([0, 0, 0], deadline_s=10)
        server.process.kill()
        server.wait()
        with client:
            with pytest.raises(PolicyError):
                client.act([0, 0, 0], deadline_s=0.5)
            with running_server(bundle, listen=server.address):

                def answers() -> bool:
                    try:
                        return client.act([0, 0, 0], deadline_s=0.5).policy == bundles.POLICY
                    except PolicyError:
                        return False

                wait_until(answers, "the restarted server to answer", patience_s=10)


def test_lom_act_plays(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--target", target, "--env", "Toy-v0", "--episodes", "2"]) == 0
    assert "mode 2" in capsys.readouterr().out
