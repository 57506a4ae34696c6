"""`lom_server.service` without a transport: every check, in process."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lom_api.reasons import Reason
from lom_bundle import SpaceSpec
from lom_server.batcher import Lane, MicroBatcher, Rows
from lom_server.errors import PolicyError
from lom_server.service import ActRequest, PolicyService, ServedPolicy
from tests.support.bundles import POLICY, STATE_THRESHOLD, toy_manifest
from tests.support.engines import BurningEngine

OBSERVATION = np.array([[0.1, 0.2, 0.3]], dtype=np.float32)
MAX_BATCH_ROWS = 8


def deadline_ns() -> int:
    return time.monotonic_ns() + 10_000_000_000


def served(engine: Any, *, name: str = POLICY, inputs: tuple[SpaceSpec, ...] | None = None) -> ServedPolicy:
    manifest = toy_manifest(policy=name)
    if inputs:
        object.__setattr__(manifest, "inputs", inputs)
    return ServedPolicy(
        manifest=manifest,
        bundle_digest=f"digest of {name}",
        lanes={
            "greedy_mode": Lane(
                engine=engine, variant="greedy_mode", outputs=("action", "mode", "margin"), inline_rows=8
            ),
            "actor": Lane(engine=engine, variant="actor", outputs=("action",), inline_rows=8),
        },
        provider="CPUExecutionProvider",
        max_batch_rows=MAX_BATCH_ROWS,
    )


@pytest.fixture
def engine() -> BurningEngine:
    return BurningEngine()


@pytest.fixture
async def empty_service() -> AsyncIterator[PolicyService]:
    batcher = MicroBatcher(max_batch_rows=MAX_BATCH_ROWS, max_queue_rows=16)
    yield PolicyService(batcher)
    batcher.close()


@pytest.fixture
def service(empty_service: PolicyService, engine: BurningEngine) -> PolicyService:
    empty_service.publish(served(engine))
    return empty_service


def asking(observation: NDArray[Any] = OBSERVATION, **choices: Any) -> ActRequest:
    return ActRequest(**{"policy": POLICY, "inputs": [("observation", observation)], **choices})


async def refusal(service: PolicyService, request: ActRequest) -> PolicyError:
    with pytest.raises(PolicyError) as error:
        await service.act(request, deadline_ns())
    return error.value


async def test_the_default_variant_answers_and_is_named(service: PolicyService) -> None:
    reply = await service.act(asking(), deadline_ns())
    np.testing.assert_array_equal(reply.action, 2 * OBSERVATION)
    assert (reply.policy, reply.version, reply.variant) == (POLICY, 1, "greedy_mode")
    assert reply.bundle_digest == f"digest of {POLICY}"
    assert reply.mode is not None
    assert reply.margin is not None
    assert reply.batch_rows == 1


async def test_the_actor_has_neither_mode_nor_margin(service: PolicyService) -> None:
    reply = await service.act(asking(variant="actor", version=1), deadline_ns())
    assert reply.variant == "actor"
    assert reply.mode is None
    assert reply.margin is None


async def test_scores_come_with_the_threshold_of_the_variant_that_ran(
    empty_service: PolicyService, engine: BurningEngine
) -> None:
    policy = served(engine)
    lanes = {name: replace(lane, outputs=(*lane.outputs, "state_score")) for name, lane in policy.lanes.items()}
    empty_service.publish(replace(policy, lanes=lanes))
    reply = await empty_service.act(asking(variant="actor"), deadline_ns())
    np.testing.assert_allclose(reply.scores["state_score"].values, [0.6], atol=1e-6)
    assert reply.scores["state_score"].threshold == STATE_THRESHOLD


async def test_an_uncalibrated_bundle_answers_without_scores(service: PolicyService) -> None:
    assert (await service.act(asking(), deadline_ns())).scores == {}


async def test_the_right_contract_hash_is_accepted(service: PolicyService) -> None:
    await service.act(asking(contract_hash=toy_manifest().contract_hash), deadline_ns())


@pytest.mark.parametrize("observation", [OBSERVATION * 0, -OBSERVATION * 0])
async def test_zeros_are_fine(service: PolicyService, observation: NDArray[Any]) -> None:
    await service.act(asking(observation), deadline_ns())


async def test_subnormals_reach_the_engine_as_zeros_and_nothing_else_changes(service: PolicyService) -> None:
    smallest = np.finfo(np.float32).tiny
    observation = np.array([[smallest / 2, -smallest / 4, smallest]], np.float32)
    reply = await service.act(asking(observation), deadline_ns())
    assert reply.action.tolist() == [[0.0, 0.0, 2 * float(smallest)]]


async def test_a_non_finite_action_fails_only_its_owner(empty_service: PolicyService) -> None:
    class PoisonableEngine:
        def run(self, variant: str, outputs: Any, rows: Rows) -> Rows:
            return {"action": np.where(rows["observation"] > 100, np.float32(np.nan), rows["observation"])}

    empty_service.publish(served(PoisonableEngine()))
    sound, poisoned = await asyncio.gather(
        empty_service.act(asking(variant="actor"), deadline_ns()),
        empty_service.act(asking(np.array([[1, 2, 3], [1, 2, 300]], dtype=np.float32), variant="actor"), deadline_ns()),
        return_exceptions=True,
    )
    assert isinstance(poisoned, PolicyError)
    assert poisoned.reason is Reason.NON_FINITE_ACTION
    assert "row 1" in poisoned.detail
    assert not isinstance(sound, BaseException)
    assert sound.batch_rows == 3
    np.testing.assert_array_equal(sound.action, OBSERVATION)


TWO_INPUTS = tuple(SpaceSpec(name=name, shape=(3,), low=(-1.0,) * 3, high=(1.0,) * 3) for name in ("arm", "hand"))


@pytest.mark.parametrize(
    ("inputs", "reason", "fact"),
    [
        ([("arm", OBSERVATION)], Reason.MISSING_INPUT, "'hand'"),
        ([("arm", OBSERVATION), ("hand", np.repeat(OBSERVATION, 2, 0))], Reason.BATCH_MISMATCH, "expected 1 rows"),
        ([("arm", OBSERVATION), ("hand", OBSERVATION), ("hand", OBSERVATION)], Reason.DUPLICATE_INPUT, "'hand'"),
        ([("arm", OBSERVATION), ("hand", OBSERVATION), ("leg", OBSERVATION)], Reason.UNKNOWN_INPUT, "'arm', 'hand'"),
    ],
)
async def test_several_inputs_are_checked_against_each_other(
    empty_service: PolicyService,
    engine: BurningEngine,
    inputs: list[tuple[str, NDArray[Any]]],
    reason: Reason,
    fact: str,
) -> None:
    empty_service.publish(served(engine, inputs=TWO_INPUTS))
    error = await refusal(empty_service, asking(inputs=inputs))
    assert error.reason is reason
    assert fact in error.detail
    assert not engine.batches


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_a_non_finite_value_anywhere_is_named_by_its_place(
    service: PolicyService, engine: BurningEngine, value: float, place: int
) -> None:
    observation = np.zeros((2, 3), dtype=np.float32)
    observation.flat[place] = value
    error = await refusal(service, asking(observation))
    assert error.reason is Reason.NON_FINITE
    assert error.detail == f"input 'observation': expected finite values, got none at flat index {place}"
    assert not engine.batches


async def test_nothing_is_served_before_the_policy_is_published(empty_service: PolicyService) -> None:
    assert (await refusal(empty_service, asking())).reason is Reason.MODEL_LOADING
    with pytest.raises(PolicyError) as error:
        empty_service.spec("")
    assert error.value.reason is Reason.MODEL_LOADING


async def test_a_draining_service_refuses(service: PolicyService, engine: BurningEngine) -> None:
    service.drain()
    assert (await refusal(service, asking())).reason is Reason.DRAINING
    assert not engine.batches


async def test_the_only_policy_needs_no_name_in_spec(service: PolicyService, engine: BurningEngine) -> None:
    assert service.spec("").manifest.policy == POLICY
    assert service.spec(POLICY) is service.spec("")
    service.publish(served(engine, name="another"))
    with pytest.raises(PolicyError) as error:
        service.spec("")
    assert error.value.reason is Reason.MISSING_MODEL
