"""`lom_server.proof` and the process behind it, `lom_server.verifier`."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from onnx import ModelProto, helper, numpy_helper

from lom_bundle import write_bundle
from lom_server.config import ServerConfig
from lom_server.control import ControlError
from lom_server.proof import Proof, prove
from tests.support.bundles import (
    Flaws,
    actor_action,
    explain_graph,
    golden_observations,
    greedy_action,
    toy_graphs,
    toy_manifest,
    write_test_bundle,
)
from tests.support.servers import PATIENCE_S, wait_until

GRAPHS = {"greedy_mode", "greedy_mode.explain", "actor"}
SLOW = Flaws(burn_layers=2000)  # its golden rows alone take several seconds


def config(bundle: Path, **choices: object) -> ServerConfig:
    return ServerConfig(models=bundle, max_batch_rows=16, **choices)  # type: ignore[arg-type]


async def refusal(bundle: Path, **choices: object) -> ControlError:
    with pytest.raises(ControlError) as error:
        await prove(bundle, config(bundle, **choices))
    return error.value


def verifiers_of(bundle: Path) -> list[int]:
    """Processes that prove `bundle` at this moment."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                arguments = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"lom_server.verifier" in arguments and os.fsencode(bundle) in arguments:
                found.append(int(process.name))
    return found


def write_hungry_bundle(path: Path, columns: int) -> None:
    """Each row takes `columns` times four bytes while it is answered."""

    def hungry(model: ModelProto) -> bytes:
        graph = model.graph
        last = graph.node.pop()
        for name, value in (("many", np.array([1, columns])), ("nought", np.array([0], np.float32))):
            graph.initializer.append(numpy_helper.from_array(value, name))
        graph.node.extend(
            [
                helper.make_node("Expand", ["first", "many"], ["wide"]),
                helper.make_node("ReduceSum", ["wide", "columns"], ["sum"], keepdims=1),
                helper.make_node("Mul", ["sum", "nought"], ["nothing"]),
                helper.make_node("Add", ["nothing", last.input[0]], ["action"]),
            ]
        )
        return bytes(model.SerializeToString())

    observation = golden_observations()
    write_bundle(
        path,
        toy_manifest(),
        graphs={name: hungry(model) for name, model in toy_graphs(Flaws()).items()},
        explain_graphs={"greedy_mode": explain_graph(Flaws()).SerializeToString()},
        golden={
            "observation": observation,
            "greedy_mode.action": greedy_action(observation),
            "actor.action": actor_action(observation),
        },
        card="A bundle for tests.\n",
    )


async def test_a_sound_bundle_is_proved_with_its_costs(tmp_path: Path) -> None:
    digest = write_test_bundle(tmp_path / "bundle")
    proof = await prove(tmp_path / "bundle", config(tmp_path))
    assert isinstance(proof, Proof)
    assert proof.digest == digest
    assert proof.provider == "CPUExecutionProvider"
    assert proof.costs.keys() == GRAPHS
    for sizes in proof.costs.values():
        assert list(sizes) == [1, 2, 4, 8, 16]
        assert all(run_ns > 0 for run_ns in sizes.values())


def damage_graph(bundle: Path) -> None:
    graph = bundle / "actor.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)


def add_file(bundle: Path) -> None:
    (bundle / "stowaway").write_text("not listed")


def replace_by_link(bundle: Path) -> None:
    (bundle / "golden.npz").rename(bundle.parent / "golden.npz")
    (bundle / "golden.npz").symlink_to(bundle.parent / "golden.npz")


def remove_golden(bundle: Path) -> None:
    (bundle / "golden.npz").unlink()


def empty_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{}")


async def test_damage_is_refused_with_its_reason(tmp_path: Path) -> None:
    damages: dict[str, tuple[Callable[[Path], None], str]] = {
        "changed": (damage_graph, "DIGEST_MISMATCH"),
        "more": (add_file, "BUNDLE_UNSAFE_FILE"),
        "linked": (replace_by_link, "BUNDLE_UNSAFE_FILE"),
        "less": (remove_golden, "BUNDLE_INCOMPLETE"),
        "empty": (empty_manifest, "BAD_MANIFEST"),
    }
    for name, (damage, _) in damages.items():
        write_test_bundle(tmp_path / name / "bundle")
        damage(tmp_path / name / "bundle")
    write_test_bundle(tmp_path / "wrong" / "bundle", flaws=Flaws(wrong_golden=True))
    expected = {name: reason for name, (_, reason) in damages.items()} | {
        "wrong": "SELF_TEST_FAILED",
        "absent": "BUNDLE_NOT_FOUND",
    }
    refusals = await asyncio.gather(*(refusal(tmp_path / name / "bundle") for name in expected))
    assert {name: error.reason for name, error in zip(expected, refusals, strict=True)} == expected
    assert not any("Traceback" in error.detail or "Error" in error.detail for error in refusals)


async def test_a_graph_with_a_forbidden_operator_is_not_loaded(tmp_path: Path) -> None:
    graphs = toy_graphs(Flaws())
    graphs["actor"].graph.node[0].op_type = "Loop"
    observation = golden_observations()
    write_bundle(
        tmp_path / "bundle",
        toy_manifest(),
        graphs={name: model.SerializeToString() for name, model in graphs.items()},
        explain_graphs={"greedy_mode": explain_graph(Flaws()).SerializeToString()},
        golden={
            "observation": observation,
            "greedy_mode.action": greedy_action(observation),
            "actor.action": actor_action(observation),
        },
        card="A bundle for tests.\n",
    )
    assert (await refusal(tmp_path / "bundle")).reason == "OP_FORBIDDEN"


async def test_only_who_is_trusted_may_sign(tmp_path: Path) -> None:
    ours, theirs = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(ours.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    for name, key in (("ours", ours), ("theirs", theirs)):
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_test_bundle(tmp_path / name, sign_key=pem)
    write_test_bundle(tmp_path / "unsigned")
    keys = {"trusted_keys": (trusted,)}
    unsigned, foreign, proof = await asyncio.gather(
        refusal(tmp_path / "unsigned", **keys),
        refusal(tmp_path / "theirs", **keys),
        prove(tmp_path / "ours", config(tmp_path, **keys)),
    )
    assert (unsigned.reason, foreign.reason) == ("BAD_SIGNATURE", "BAD_SIGNATURE")
    assert proof.digest


async def test_a_proof_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "bundle", flaws=SLOW)
    assert (await refusal(tmp_path / "bundle", load_limit_s=1.0)).reason == "WARMUP_TIMEOUT"
    assert verifiers_of(tmp_path / "bundle") == []


async def test_what_needs_more_memory_than_granted_is_refused(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "sound")
    write_hungry_bundle(tmp_path / "hungry", columns=2**24)  # 64 MiB for each of the 16 golden rows
    without_room, hungry = await asyncio.gather(
        refusal(tmp_path / "sound", load_memory_mb=256),  # less than the libraries themselves take
        refusal(tmp_path / "hungry", load_memory_mb=1024),
    )
    assert without_room.reason == "MODEL_TOO_LARGE"
    assert hungry.reason == "SELF_TEST_FAILED"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_verifier_that_dies_is_lost(tmp_path: Path, number: int) -> None:
    write_test_bundle(tmp_path / "bundle", flaws=SLOW)
    proving = asyncio.create_task(refusal(tmp_path / "bundle"))
    os.kill(await verifier_of(tmp_path / "bundle"), number)
    assert (await proving).reason == "VERIFIER_LOST"


async def test_cancelling_a_proof_ends_its_process(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "bundle", flaws=SLOW)
    proving = asyncio.create_task(prove(tmp_path / "bundle", config(tmp_path)))
    await verifier_of(tmp_path / "bundle")
    proving.cancel()
    await asyncio.wait({proving})
    assert proving.cancelled()
    assert verifiers_of(tmp_path / "bundle") == []


async def test_a_verifier_that_nobody_waits_for_ends_by_itself(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "bundle", flaws=SLOW)
    orphan = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lom_server.verifier", str(tmp_path / "bundle")),
        config(tmp_path, load_limit_s=1.0).to_json(),
        stdout=asyncio.subprocess.DEVNULL,
    )
    assert await asyncio.wait_for(orphan.wait(), PATIENCE_S) == -signal.SIGALRM


async def test_what_the_process_prints_is_not_its_answer(tmp_path: Path) -> None:
    digest = write_test_bundle(tmp_path / "bundle")
    (tmp_path / "sitecustomize.py").write_text("import atexit, os; atexit.register(os.system, 'echo noise')\n")
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lom_server.verifier", str(tmp_path / "bundle"), config(tmp_path).to_json()),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )
    output, _ = await child.communicate()
    assert json.loads(output)["digest"] == digest


async def verifier_of(bundle: Path) -> int:
    """The process that proves `bundle`, once it is there; nothing that a test does to it comes too late."""
    await asyncio.to_thread(wait_until, lambda: bool(verifiers_of(bundle)), "a verifier")
    (process,) = verifiers_of(bundle)
    return process


@pytest.mark.parametrize(("yields", "policy"), [(True, os.SCHED_IDLE), (False, os.SCHED_OTHER)])
async def test_a_proof_yields_to_those_who_answer(tmp_path: Path, yields: bool, policy: int) -> None:
    write_test_bundle(tmp_path / "bundle", flaws=SLOW)
    proving = asyncio.create_task(prove(tmp_path / "bundle", config(tmp_path), yields=yields))
    while not (found := verifiers_of(tmp_path / "bundle")):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0)  # its parent has its turn
    assert [os.sched_getscheduler(pid) for pid in found] == [policy]
    proving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await proving
