"""`lom_server.service` without a transport: every check, in process."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lom_api.reasons import Reason
from lom_bundle import SpaceSpec
from lom_server.batcher import Lane, MicroBatcher, Rows
from lom_server.config import ServerConfig
from lom_server.errors import PolicyError
from lom_server.loading import load_policy
from lom_server.service import ActReply, ActRequest, PolicyService, PolicyVersions, ServedPolicy
from tests.support.bundles import COMPONENT_MEANS, COMPONENT_STD, POLICY, STATE_THRESHOLD, toy_manifest
from tests.support.engines import BurningEngine

OBSERVATION = np.array([[0.1, 0.2, 0.3]], dtype=np.float32)
MAX_BATCH_ROWS = 8
VERSION = 3


def deadline_ns() -> int:
    return time.monotonic_ns() + 10_000_000_000


def served(engine: Any, *, name: str = POLICY, inputs: tuple[SpaceSpec, ...] | None = None) -> ServedPolicy:
    manifest = toy_manifest(policy=name)
    # What the engine of these tests answers: twice the observation, however large.
    unbounded = SpaceSpec(name="action", shape=(3,), low=(-np.inf,) * 3, high=(np.inf,) * 3)
    object.__setattr__(manifest, "action", unbounded)
    if inputs:
        object.__setattr__(manifest, "inputs", inputs)
    return ServedPolicy(
        name=name,
        version=VERSION,
        manifest=manifest,
        bundle_digest=f"digest of {name}",
        lanes={
            "greedy_mode": Lane(
                engine=engine, graph="greedy_mode", outputs=("action", "mode", "margin"), inline_rows=8
            ),
            "actor": Lane(engine=engine, graph="actor", outputs=("action",), inline_rows=8),
        },
        provider="CPUExecutionProvider",
        max_batch_rows=MAX_BATCH_ROWS,
    )


def publish(service: PolicyService, *versions: ServedPolicy, default_version: int = VERSION) -> None:
    by_number = {policy.version: policy for policy in versions}
    service.publish(versions[0].name, PolicyVersions(versions=by_number, default_version=default_version))


@pytest.fixture
def engine() -> BurningEngine:
    return BurningEngine()


@pytest.fixture
async def empty_service() -> AsyncIterator[PolicyService]:
    batcher = MicroBatcher(max_batch_rows=MAX_BATCH_ROWS, max_queue_rows=16)
    yield PolicyService(batcher=batcher)
    batcher.close()


@pytest.fixture
def service(empty_service: PolicyService, engine: BurningEngine) -> PolicyService:
    publish(empty_service, served(engine))
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
    assert (reply.policy, reply.version, reply.variant) == (POLICY, VERSION, "greedy_mode")
    assert reply.bundle_digest == f"digest of {POLICY}"
    assert reply.mode is not None
    assert reply.margin is not None
    assert reply.batch_rows == 1


async def test_the_actor_has_neither_mode_nor_margin(service: PolicyService) -> None:
    reply = await service.act(asking(variant="actor", version=VERSION), deadline_ns())
    assert reply.variant == "actor"
    assert reply.mode is None
    assert reply.margin is None


async def test_scores_come_with_the_threshold_of_the_variant_that_ran(
    empty_service: PolicyService, engine: BurningEngine
) -> None:
    policy = served(engine)
    lanes = {name: replace(lane, outputs=(*lane.outputs, "state_score")) for name, lane in policy.lanes.items()}
    publish(empty_service, replace(policy, lanes=lanes))
    reply = await empty_service.act(asking(variant="actor"), deadline_ns())
    np.testing.assert_allclose(reply.scores["state_score"].values, [0.6], atol=1e-6)
    assert reply.scores["state_score"].threshold == STATE_THRESHOLD


async def test_an_uncalibrated_bundle_answers_without_scores(service: PolicyService) -> None:
    assert (await service.act(asking(), deadline_ns())).scores == {}


async def test_the_right_contract_hash_is_accepted(service: PolicyService) -> None:
    await service.act(asking(contract_hash=service.find(POLICY).contract_hash), deadline_ns())


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

    publish(empty_service, served(PoisonableEngine()))
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
    publish(empty_service, served(engine, inputs=TWO_INPUTS))
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
    empty_service.withdraw(POLICY, Reason.MODEL_LOADING)
    assert (await refusal(empty_service, asking())).reason is Reason.MODEL_LOADING
    with pytest.raises(PolicyError) as error:
        empty_service.find("")
    assert error.value.reason is Reason.MODEL_LOADING
    empty_service.withdraw(POLICY)
    with pytest.raises(PolicyError) as error:
        empty_service.find("")
    assert error.value.reason is Reason.MODEL_NOT_FOUND


async def test_a_draining_service_refuses(service: PolicyService, engine: BurningEngine) -> None:
    service.drain()
    assert (await refusal(service, asking())).reason is Reason.DRAINING
    assert not engine.batches


async def test_the_only_policy_needs_no_name(service: PolicyService, engine: BurningEngine) -> None:
    assert service.find("").manifest.policy == POLICY
    assert service.find(POLICY) is service.find("")
    publish(service, served(engine, name="another"))
    with pytest.raises(PolicyError) as error:
        service.find("")
    assert error.value.reason is Reason.MISSING_MODEL


async def test_a_request_without_a_version_goes_to_the_default_one(
    empty_service: PolicyService, engine: BurningEngine
) -> None:
    older, newer = served(engine), replace(served(engine), version=VERSION + 1)
    publish(empty_service, older, newer)
    assert (await empty_service.act(asking(), deadline_ns())).version == VERSION
    assert (await empty_service.act(asking(version=VERSION + 1), deadline_ns())).version == VERSION + 1
    publish(empty_service, older, newer, default_version=VERSION + 1)
    assert (await empty_service.act(asking(), deadline_ns())).version == VERSION + 1
    publish(empty_service, newer, default_version=VERSION + 1)
    error = await refusal(empty_service, asking(version=VERSION))
    assert error.reason is Reason.VERSION_NOT_FOUND
    assert f"expected one of {VERSION + 1}, got {VERSION}" in error.detail


async def test_a_request_ends_on_the_version_that_it_started_with(
    empty_service: PolicyService, engine: BurningEngine
) -> None:
    publish(empty_service, served(engine))
    engine.gate.clear()
    slow = replace(served(engine), lanes={n: replace(lane, inline_rows=0) for n, lane in served(engine).lanes.items()})
    publish(empty_service, slow)
    asked = asyncio.create_task(empty_service.act(asking(), deadline_ns()))
    while not engine.batches:
        await asyncio.sleep(0)
    publish(empty_service, replace(served(engine), bundle_digest="another"))
    engine.gate.set()
    assert (await asked).bundle_digest == f"digest of {POLICY}"
    assert (await empty_service.act(asking(), deadline_ns())).bundle_digest == "another"


@pytest.mark.parametrize("version", [-1, 2**31, 2**63])
async def test_a_version_out_of_range_is_no_unknown_version(service: PolicyService, version: int) -> None:
    assert (await refusal(service, asking(version=version))).reason is Reason.BAD_VERSION


async def test_a_policy_that_failed_to_load_or_is_loading_says_so(service: PolicyService) -> None:
    service.withdraw("walker", Reason.MODEL_FAILED)
    service.withdraw("arm", Reason.MODEL_LOADING)
    assert (await refusal(service, asking(policy="walker"))).reason is Reason.MODEL_FAILED
    loading = await refusal(service, asking(policy="arm"))
    assert loading.reason is Reason.MODEL_LOADING
    assert loading.retry_after_ms is not None
    assert (await refusal(service, asking(policy="leg"))).reason is Reason.MODEL_NOT_FOUND
    service.withdraw("walker")
    assert (await refusal(service, asking(policy="walker"))).reason is Reason.MODEL_NOT_FOUND


async def test_a_value_outside_the_contracts_range_is_refused_with_its_limits(
    empty_service: PolicyService, engine: BurningEngine
) -> None:
    bounded = SpaceSpec(name="observation", shape=(3,), low=(-1.0, -1.0, -np.inf), high=(1.0, 2.0, np.inf))
    publish(empty_service, served(engine, inputs=(bounded,)))
    await empty_service.act(asking(np.array([[1, 2, 1e30], [-1, -1, -1e30]], np.float32)), deadline_ns())
    rounded = np.nextafter(np.float32(1), np.float32(2))
    await empty_service.act(asking(np.array([[rounded, 0, 0]], np.float32)), deadline_ns())
    error = await refusal(empty_service, asking(np.array([[0, 0, 0], [0, 2.5, 0]], np.float32)))
    assert error.reason is Reason.OBS_OUT_OF_RANGE
    assert error.detail == "input 'observation': expected -1 to 2 at flat index 4, got 2.5"


async def test_an_action_outside_its_space_is_cut_and_flagged(
    empty_service: PolicyService, engine: BurningEngine
) -> None:
    policy = served(engine)
    bounded = SpaceSpec(name="action", shape=(3,), low=(-1.0,) * 3, high=(0.5,) * 3)
    object.__setattr__(policy.manifest, "action", bounded)
    publish(empty_service, policy)
    inside = await empty_service.act(asking(OBSERVATION / 4), deadline_ns())
    assert not inside.is_clamped
    outside = await empty_service.act(asking(), deadline_ns())
    assert outside.is_clamped
    np.testing.assert_allclose(outside.action, [[0.2, 0.4, 0.5]], rtol=1e-6)


async def test_whoever_observes_hears_of_every_answer_and_every_refusal(engine: BurningEngine) -> None:
    class Notes:
        def __init__(self) -> None:
            self.notes: list[object] = []

        def answered(self, request: ActRequest, reply: ActReply, total_ns: int) -> None:
            assert total_ns >= reply.inference_ns
            self.notes.append(reply.variant)

        def refused(self, policy: str, reason: Reason) -> None:
            self.notes.append((policy, reason))

    observer = Notes()
    batcher = MicroBatcher(max_batch_rows=MAX_BATCH_ROWS, max_queue_rows=16)
    service = PolicyService(batcher=batcher, observer=observer)
    publish(service, served(engine))
    await service.act(asking(variant="actor"), deadline_ns())
    await refusal(service, asking(policy="stranger"))
    await refusal(service, asking(OBSERVATION * np.nan))
    assert observer.notes == ["actor", ("", Reason.MODEL_NOT_FOUND), (POLICY, Reason.NON_FINITE)]
    batcher.close()


@pytest.mark.parametrize(("seconds", "reason"), [(10.0, Reason.CANCELLED), (0.01, Reason.DEADLINE_EXCEEDED)])
async def test_a_caller_who_goes_is_counted_as_gone_or_late(
    engine: BurningEngine, seconds: float, reason: Reason
) -> None:
    refusals: list[Reason] = []

    class Observer:
        def answered(self, request: ActRequest, reply: ActReply, total_ns: int) -> None:
            raise AssertionError("nobody is answered")

        def refused(self, policy: str, reason: Reason) -> None:
            refusals.append(reason)

    batcher = MicroBatcher(max_batch_rows=MAX_BATCH_ROWS, max_queue_rows=16)
    service = PolicyService(batcher=batcher, observer=Observer())
    policy = served(engine)
    lanes = {name: replace(lane, inline_rows=0) for name, lane in policy.lanes.items()}
    publish(service, replace(policy, lanes=lanes))
    engine.gate.clear()
    asked = asyncio.create_task(service.act(asking(), time.monotonic_ns() + int(seconds * 1e9)))
    while not engine.batches:
        await asyncio.sleep(0.001)
    await asyncio.sleep(min(seconds, 0.02))  # the time that a caller has, where it is short
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    engine.gate.set()
    assert refusals == [reason]
    batcher.close()


# What follows asks for more than the policy's own choice, of a real graph: hyper-Q of component k is o[k].


@pytest.fixture
async def explained(toy_bundle: Path) -> AsyncIterator[PolicyService]:
    loaded = load_policy(POLICY, 1, toy_bundle, ServerConfig(models=toy_bundle, provider="cpu", max_batch_rows=8))
    batcher = MicroBatcher(max_batch_rows=8, max_queue_rows=16)
    service = PolicyService(batcher=batcher)
    service.publish(POLICY, PolicyVersions(versions={1: loaded.policy}, default_version=1))
    yield service
    batcher.close()


async def test_an_explanation_says_what_every_component_would_have_meant(explained: PolicyService) -> None:
    plain = await explained.act(asking(), deadline_ns())
    assert plain.explanation == {}
    reply = await explained.act(asking(explain=True), deadline_ns())
    np.testing.assert_allclose(reply.explanation["hyper_q"], OBSERVATION)
    np.testing.assert_allclose(reply.explanation["mixing_weights"], [[1 / 3, 1 / 3, 1 / 3]], rtol=1e-6)
    np.testing.assert_allclose(reply.explanation["component_means"], COMPONENT_MEANS[None])
    np.testing.assert_allclose(reply.explanation["component_log_stds"], np.full((1, 3, 2), -1))
    np.testing.assert_array_equal(reply.action, plain.action)


async def test_a_forced_mode_acts(explained: PolicyService) -> None:
    reply = await explained.act(asking(mode=0), deadline_ns())
    assert reply.mode is not None
    assert reply.mode.tolist() == [0]
    np.testing.assert_array_equal(reply.action, COMPONENT_MEANS[:1])
    assert reply.explanation == {}


async def test_a_seed_samples_the_same_every_time_whatever_the_company(explained: PolicyService) -> None:
    mean = (await explained.act(asking(), deadline_ns())).action
    first, again, other = [
        (await explained.act(asking(sampling_seed=seed), deadline_ns())).action for seed in (7, 7, 8)
    ]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    noise = np.random.Generator(np.random.Philox(key=7)).standard_normal((1, 2), dtype=np.float32)
    np.testing.assert_allclose(first, np.clip(mean + noise * COMPONENT_STD, -1, 1), rtol=1e-6)
    two_rows = (await explained.act(asking(OBSERVATION.repeat(2, 0), sampling_seed=7), deadline_ns())).action
    np.testing.assert_array_equal(two_rows[:1], first)


@pytest.mark.parametrize(
    ("previous", "width", "mode"),
    [
        (2, 0.0, 2),  # the best one was chosen before
        (1, 0.05, 2),  # gain 0.1 exceeds the width
        (1, 0.125, 1),  # it does not
        (0, 0.125, 2),  # gain 0.2
        (-1, 9.0, 2),  # nothing to keep
    ],
)
async def test_a_mode_is_kept_unless_another_gains_more_than_the_width(
    explained: PolicyService, previous: int, width: float, mode: int
) -> None:
    request = asking(previous_mode=np.array([previous], np.int32), hysteresis_width=width)
    reply = await explained.act(request, deadline_ns())
    assert reply.mode is not None
    assert reply.mode.tolist() == [mode]
    np.testing.assert_array_equal(reply.action, COMPONENT_MEANS[mode : mode + 1])


async def test_every_row_keeps_a_mode_of_its_own(explained: PolicyService) -> None:
    request = asking(
        OBSERVATION.repeat(3, 0), previous_mode=np.array([1, -1, 0], np.int32), hysteresis_width=0.125, explain=True
    )
    reply = await explained.act(request, deadline_ns())
    assert reply.mode is not None
    assert reply.mode.tolist() == [1, 2, 2]


async def test_a_component_that_the_mask_excludes_is_not_kept(explained: PolicyService) -> None:
    policy = explained.find(POLICY)
    object.__setattr__(policy.manifest, "min_mixing_weight", 0.4)
    request = asking(previous_mode=np.array([1], np.int32), hysteresis_width=9.0)
    reply = await explained.act(request, deadline_ns())
    assert reply.mode is not None
    assert reply.mode.tolist() == [2]


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"mode": 3}, "mode: expected 0 to 2, got 3"),
        ({"mode": -1}, "mode: expected 0 to 2, got -1"),
        ({"previous_mode": np.array([3], np.int32)}, "expected -1 to 2"),
        ({"previous_mode": np.array([-2], np.int32)}, "expected -1 to 2"),
        ({"previous_mode": np.array([1, 1], np.int32)}, "expected int32[1], got int32[2]"),
        ({"previous_mode": np.array([1.0], np.float32)}, "expected int32[1], got float32[1]"),
        ({"hysteresis_width": 1.0}, "expected a previous mode"),
        ({"hysteresis_width": -1.0, "previous_mode": np.array([1], np.int32)}, "got -1"),
        ({"hysteresis_width": np.nan, "previous_mode": np.array([1], np.int32)}, "got nan"),
        ({"hysteresis_width": np.inf, "previous_mode": np.array([1], np.int32)}, "got inf"),
        ({"mode": 1, "previous_mode": np.array([1], np.int32)}, "expected no forced mode"),
        ({"variant": "actor", "explain": True}, "variant 'actor': expected none of explain"),
        ({"variant": "actor", "mode": 1}, "variant 'actor'"),
        ({"variant": "actor", "sampling_seed": 1}, "variant 'actor'"),
    ],
)
async def test_options_that_contradict_themselves_are_refused(
    explained: PolicyService, options: dict[str, Any], fact: str
) -> None:
    error = await refusal(explained, asking(**options))
    assert error.reason is Reason.BAD_OPTION
    assert fact in error.detail
