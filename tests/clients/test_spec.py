"""A spec that contradicts itself is refused before anything is asked of its policy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lom_api.v1 import policy_pb2
from lom_client import BadReply, ContractMismatch, PolicyClient
from lom_client.exchange import PolicyExchange
from lom_client.spec import read_spec
from tests.support.fake_policy_server import FakePolicyServer, honest_spec


def change(text: str) -> Callable[[policy_pb2.PolicySpec], None]:
    def apply(spec: policy_pb2.PolicySpec) -> None:
        exec(text, {"nan": float("nan"), "huge": 2**40}, {"spec": spec})

    return apply


BAD_SPECS = [
    "del spec.inputs[:]",
    "spec.inputs.append(spec.inputs[0])",
    "spec.inputs[0].name = ''",
    "spec.inputs[0].name = 'x' * 65",
    "spec.variants.append('\\x1b[2J')",
    "spec.inputs[0].dtype = 2",
    "spec.inputs[0].shape[:] = []",
    "spec.inputs[0].shape[:] = [3, 0]",
    "spec.inputs[0].shape[:] = [3, 2]",
    "spec.action.shape[:] = [1, 2]",
    "spec.inputs[0].shape[:] = [-3]",
    "spec.action.shape[:] = [huge]",
    "spec.action.shape[:] = [0]; spec.action.low[:] = []; spec.action.high[:] = []",
    "spec.action.ClearField('low')",
    "spec.action.low[0] = nan",
    "spec.action.low[0] = 2",
    "spec.policy = ''",
    "spec.contract_hash = ''",
    "spec.bundle_digest = ''",
    "spec.max_batch_rows = 0",
    "spec.num_components = 0",
    "spec.default_variant = 'other'",
    "del spec.variants[:]",
]


@pytest.mark.parametrize("text", BAD_SPECS)
def test_a_bad_spec_is_refused_and_nothing_is_asked(text: str) -> None:
    spec = honest_spec()
    change(text)(spec)
    with FakePolicyServer(spec=spec) as server, PolicyClient(server.target) as client:
        with pytest.raises(BadReply) as caught:
            client.act([0, 0, 0], deadline_s=10)
        assert caught.value.reason == "BAD_SPEC"
        assert client.spec is None
        assert server.requests == []


@pytest.mark.parametrize(
    ("asked", "reason"), [({"policy": "other"}, "WRONG_POLICY"), ({"version": 2}, "WRONG_VERSION")]
)
def test_the_spec_of_something_else_is_refused(asked: dict[str, Any], reason: str) -> None:
    exchange = PolicyExchange(asked.get("policy"), asked.get("version"))
    with pytest.raises(BadReply) as caught:
        exchange.agree(honest_spec())
    assert caught.value.reason == reason
    assert exchange.spec is None


@pytest.mark.parametrize("version", [0, -1, 2**31])
def test_an_impossible_version_is_refused_at_construction(version: int) -> None:
    with pytest.raises(ValueError, match="version must be between"):
        PolicyClient("grpc://127.0.0.1:8001", version=version)


def test_a_policy_may_have_several_inputs_and_then_has_no_single_observation() -> None:
    message = honest_spec()
    image = message.inputs.add()
    image.CopyFrom(message.inputs[0])
    image.name = "image"
    image.shape[:] = [1, 3]
    spec = read_spec(message)
    assert [(space.name, space.shape, space.width) for space in spec.inputs] == [
        ("observation", (3,), 3),
        ("image", (1, 3), 3),
    ]
    with pytest.raises(ContractMismatch, match="observation, image"):
        _ = spec.observation


def test_a_sound_spec_is_kept() -> None:
    with FakePolicyServer() as server, PolicyClient(server.target) as client:
        spec = client.get_spec(deadline_s=10)
        assert client.spec is spec
        assert client.get_spec(deadline_s=10) is spec
        assert server.spec_requests == 1
    assert (spec.observation.width, spec.action.width) == (3, 2)
    assert spec.variants == ("greedy_mode", "actor")
    np.testing.assert_array_equal(spec.action.low, [-1, -1])
    assert spec.observation.high[0] == np.inf
