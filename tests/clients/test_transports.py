"""One policy, every way to it: over TCP, TLS with a token, a Unix socket or none, by calls or a stream, sync or async.

On one machine's processor the answers are equal to the last bit.
"""

import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lom_client import (
    Actions,
    BadReply,
    ClientClosed,
    ClientConfig,
    InvalidRequest,
    NotPermitted,
    PolicyClient,
    PolicyError,
    PolicyNotFound,
    ServerUnavailable,
    Superseded,
)
from tests.clients.blocking_client import BlockingClient
from tests.clients.conftest import AnyClient
from tests.support import bundles
from tests.support.certificates import CertificateAuthority
from tests.support.servers import running_server, wait_until

ROW = [0.1, -0.2, 0.3]
TOKEN = "0123456789abcdef"


@dataclass(frozen=True, kw_only=True)
class Way:
    """To the one policy."""

    target: str
    config: ClientConfig = field(default_factory=ClientConfig)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transports")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    bundles.write_test_bundle(folder / "toy")
    return folder / "toy"


@pytest.fixture(scope="module")
def authority(folder: Path) -> CertificateAuthority:
    return CertificateAuthority(folder / "certificates")


def secret_file(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def ways(folder: Path, bundle: Path, authority: CertificateAuthority) -> Iterator[Mapping[str, Way]]:
    tls = authority.server()
    tokens = secret_file(folder / "tokens", f"act robot {TOKEN}\n")
    security = ("--tls-certificate", str(tls.certificate), "--tls-key", str(tls.key), "--tokens", str(tokens))
    with (
        running_server(bundle, "--provider", "cpu") as tcp,
        running_server(bundle, "--provider", "cpu", *security) as secure,
        running_server(bundle, "--provider", "cpu", listen=f"unix:{folder}/socket") as local,
    ):
        yield {
            "grpc": Way(target=f"grpc://{tcp.address}"),
            "grpcs": Way(
                target=f"grpcs://{secure.address}",
                config=ClientConfig(tls_ca=authority.certificate, token_file=tokens),
            ),
            "unix": Way(target=local.address),
            "inproc": Way(target=f"inproc:{bundle}"),
        }


@pytest.fixture(
    params=[
        f"{way}, {kind}"
        for way in ("grpc", "grpcs", "unix", "inproc")
        for kind in ("calls", "stream", "async calls", "async stream")
    ]
)
def client(request: pytest.FixtureRequest, ways: Mapping[str, Way]) -> Iterator[AnyClient]:
    name, _, kind = request.param.partition(", ")
    way = ways[name]
    make = BlockingClient if "async" in kind else PolicyClient
    with make(way.target, config=replace(way.config, use_stream="stream" in kind)) as client:
        yield client


def bits(answer: Actions) -> dict[str, Any]:
    """Everything that an answer says of the policy, comparable to the last bit."""
    arrays: dict[str, Any] = {"actions": answer.actions, "mode": answer.mode, "margin": answer.margin}
    arrays |= {name: score.values for name, score in answer.scores.items()}
    if answer.explanation is not None:
        arrays |= vars(answer.explanation)
    said = {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items() if array is not None}
    return said | {
        "from": (answer.policy, answer.version, answer.variant, answer.bundle_digest, answer.is_clamped),
        "thresholds": {name: score.threshold for name, score in answer.scores.items()},
    }


ROWS = bundles.golden_observations()
QUESTIONS: list[tuple[Any, dict[str, Any]]] = [
    (ROWS, {}),
    (ROWS[0], {}),
    (ROWS, {"variant": "actor"}),
    ({"observation": ROWS[:3]}, {"explain": True}),
    (ROWS, {"mode": 1, "batch_priority": True}),
    (ROWS, {"sampling_seed": 2**64 - 1}),
    (ROWS, {"previous_mode": np.full(len(ROWS), 1), "hysteresis_width": 0.5}),
]


@pytest.fixture(scope="module")
def reference(ways: Mapping[str, Way]) -> list[dict[str, Any]]:
    with PolicyClient(ways["grpc"].target) as client:
        return [bits(client.act(rows, deadline_s=10, **options)) for rows, options in QUESTIONS]


def test_answers_are_equal_to_the_last_bit(client: AnyClient, reference: list[dict[str, Any]]) -> None:
    assert [bits(client.act(rows, deadline_s=10, **options)) for rows, options in QUESTIONS] == reference


def test_answers_are_those_on_paper(client: AnyClient) -> None:
    kept = client.act(ROWS, deadline_s=10, previous_mode=np.full(len(ROWS), 1), hysteresis_width=0.5)
    keeps = ROWS.max(axis=1) - ROWS[:, 1] <= 0.5
    assert keeps.any()
    assert not keeps.all()
    np.testing.assert_array_equal(kept.mode, np.where(keeps, 1, bundles.greedy_mode(ROWS)))
    np.testing.assert_array_equal(kept.actions, bundles.COMPONENT_MEANS[np.asarray(kept.mode)])
    forced = client.act(ROWS[0], deadline_s=10, mode=2)
    np.testing.assert_array_equal(forced.actions, bundles.COMPONENT_MEANS[2])
    explanation = client.act(ROWS, deadline_s=10, explain=True).explanation
    assert explanation is not None
    np.testing.assert_array_equal(explanation.hyper_q, ROWS)
    np.testing.assert_array_equal(explanation.component_means[3], bundles.COMPONENT_MEANS)
    one, other = (client.act(ROWS, deadline_s=10, sampling_seed=seed).actions for seed in (1, 2))
    assert (one != other).any()
    np.testing.assert_array_equal(one, client.act(ROWS, deadline_s=10, sampling_seed=1).actions)


def test_the_mode_of_an_answer_is_the_previous_mode_of_the_next(client: AnyClient) -> None:
    first = client.act(ROW, deadline_s=10)
    assert client.act([0.5, 0.0, 0.2], deadline_s=10, previous_mode=first.mode, hysteresis_width=0.4).mode == first.mode


def test_the_servers_refusals_are_typed_and_the_next_call_is_answered(client: AnyClient) -> None:
    with pytest.raises(InvalidRequest, match="expected 0 to 2, got 7") as caught:
        client.act(ROW, deadline_s=10, mode=7)
    assert (caught.value.reason, caught.value.retryable) == ("BAD_OPTION", False)
    assert client.act(ROW, deadline_s=10).mode == 2


def test_a_closed_client_says_so(client: AnyClient) -> None:
    client.act(ROW, deadline_s=10)
    client.close()
    with pytest.raises(ClientClosed):
        client.act(ROW, deadline_s=10)


@pytest.mark.parametrize("way", ["grpc", "inproc"])
def test_a_version_that_is_not_served_is_not_found(ways: Mapping[str, Way], way: str) -> None:
    with PolicyClient(ways[way].target, version=1) as client:
        assert client.act(ROW, deadline_s=10).version == 1
    with PolicyClient(ways[way].target, version=2) as client, pytest.raises(PolicyNotFound) as caught:
        client.act(ROW, deadline_s=10)
    assert caught.value.reason == "VERSION_NOT_FOUND"


def refusal(way: Way) -> PolicyError:
    with PolicyClient(way.target, config=way.config) as client, pytest.raises(PolicyError) as caught:
        client.act(ROW, deadline_s=10)
    return caught.value


def test_without_the_token_nobody_is_let_in(ways: Mapping[str, Way], tmp_path: Path) -> None:
    secure = ways["grpcs"]
    wrong = secret_file(tmp_path / "wrong", "f" * 16)
    for token_file in (None, wrong):
        error = refusal(replace(secure, config=replace(secure.config, token_file=token_file)))
        assert (type(error), error.reason, error.retryable) == (NotPermitted, "AUTH_REQUIRED", False)
    alone = secret_file(tmp_path / "alone", TOKEN)
    with PolicyClient(secure.target, config=replace(secure.config, token_file=alone)) as client:
        client.act(ROW, deadline_s=10)


def test_a_server_of_another_authority_is_not_believed(ways: Mapping[str, Way], tmp_path: Path) -> None:
    secure = ways["grpcs"]
    other = CertificateAuthority(tmp_path, name="somebody else")
    for tls_ca in (other.certificate, None):
        assert type(refusal(replace(secure, config=replace(secure.config, tls_ca=tls_ca)))) is ServerUnavailable


def test_a_client_can_show_a_certificate(bundle: Path, authority: CertificateAuthority) -> None:
    server, robot = authority.server(), authority.client("robot")
    ca = str(authority.certificate)
    security = ("--tls-certificate", str(server.certificate), "--tls-key", str(server.key), "--tls-client-ca", ca)
    with running_server(bundle, *security) as running:
        unknown = Way(target=f"grpcs://{running.address}", config=ClientConfig(tls_ca=authority.certificate))
        assert type(refusal(unknown)) is ServerUnavailable
        known = replace(unknown.config, tls_certificate=robot.certificate, tls_key=robot.key)
        with PolicyClient(unknown.target, config=known) as client:
            client.act(ROW, deadline_s=10)


@pytest.mark.parametrize("make", [PolicyClient, BlockingClient])
def test_on_a_stream_the_latest_observation_takes_the_place_of_earlier_ones(make: Any, tmp_path: Path) -> None:
    # A millisecond a run: long enough that others arrive before the first one is answered.
    bundles.write_test_bundle(tmp_path / "slow", flaws=bundles.Flaws(burn_layers=60))
    with (
        running_server(
            tmp_path / "slow", "--provider", "cpu", "--inference", "thread", "--max-batch-rows", "1"
        ) as server,
        make(f"grpc://{server.address}", config=ClientConfig(use_stream=True)) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        client.act(ROW, deadline_s=20)

        failures: list[BaseException] = []

        def have_overtaken() -> bool:
            asked = [pool.submit(client.act, ROW, deadline_s=20) for _ in range(8)]
            failures.extend(failure for call in asked if (failure := call.exception(20)) is not None)
            return bool(failures)

        wait_until(have_overtaken, "requests to overtake one another")
        assert {type(failure) for failure in failures} == {Superseded}
        client.act(ROW, deadline_s=20)


@pytest.mark.parametrize(
    ("path", "reason"), [("nowhere", "BUNDLE_NOT_FOUND"), (".", "BUNDLE_NOT_FOUND"), ("broken", "DIGEST_MISMATCH")]
)
@pytest.mark.parametrize("make", [PolicyClient, BlockingClient])
def test_a_bundle_that_cannot_be_served_in_process_is_refused_at_construction(
    folder: Path, make: Any, path: str, reason: str
) -> None:
    if not (folder / "broken").exists():
        bundles.write_test_bundle(folder / "broken")
        graph = folder / "broken" / "actor.onnx"
        graph.write_bytes(graph.read_bytes() + b" ")
    with pytest.raises(ValueError, match=f"inproc: {reason}: "):
        make(f"inproc:{folder / path}")


def test_without_the_servers_package_in_process_is_one_line(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ValueError, match=r"pip install 'lom\[server\]'"):
        PolicyClient(f"inproc:{bundle}")


def test_a_bad_action_is_refused_in_process_too(tmp_path: Path) -> None:
    bundles.write_test_bundle(tmp_path / "nan", flaws=bundles.Flaws(nan_above=1.5))
    with PolicyClient(f"inproc:{tmp_path / 'nan'}") as client:
        with pytest.raises(PolicyError) as caught:
            client.act([2, 0, 0], deadline_s=10)
        assert caught.value.reason == "NON_FINITE_ACTION"
        assert not isinstance(caught.value, BadReply)  # the server found it
        client.act(ROW, deadline_s=10)
