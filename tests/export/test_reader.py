"""A server can tell a good bundle from a bad one before onnxruntime sees a byte."""

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lom_bundle import BundleError, GoldenSpec, Manifest, SpaceSpec, VariantSpec, read_bundle, write_bundle
from tests.support.bundles import Flaws, toy_graphs

GRAPH = toy_graphs(Flaws())["actor"].SerializeToString()
SPACE = SpaceSpec(name="observation", shape=(2,), low=(-np.inf, -1.0), high=(np.inf, 1.0))
ACTION = SpaceSpec(name="action", shape=(1,), low=(-1.0,), high=(1.0,))
MANIFEST = Manifest(
    policy="toy",
    inputs=(SPACE,),
    action=ACTION,
    variants={"actor": VariantSpec(graph="actor.onnx", outputs=("action",))},
    default_variant="actor",
    num_components=1,
    min_mixing_weight=0.05,
    golden=GoldenSpec(rows=2, action_tolerance=1e-5, output_tolerance=1e-4, tie_width=1e-4),
)
GOLDEN = {"observation": np.zeros((2, 2), np.float32), "actor.action": np.zeros((2, 1), np.float32)}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "bundle"
    write_bundle(path, MANIFEST, graphs={"actor": GRAPH}, golden=GOLDEN, card="# toy\n")
    return path


def test_what_was_written_is_read(bundle: Path) -> None:
    read = read_bundle(bundle)
    assert read.graphs == {"actor": GRAPH}
    assert read.manifest.inputs == (SPACE,)  # infinite bounds included
    assert read.manifest.contract_hash == MANIFEST.contract_hash
    assert set(read.golden) == set(GOLDEN)
    assert len(read.digest) == 64


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    def digest(name: str, graph: bytes) -> str:
        return write_bundle(tmp_path / name, MANIFEST, graphs={"actor": graph}, golden=GOLDEN, card="")

    assert digest("a", b"graph") == digest("b", b"graph")
    assert digest("c", b"other") != digest("d", b"graph")


def test_the_contract_hash_covers_names_bounds_and_order() -> None:
    def contract_hash(**changes: object) -> str:
        return Manifest(**{**vars(MANIFEST), **changes}).contract_hash

    renamed = SpaceSpec(name="state", shape=SPACE.shape, low=SPACE.low, high=SPACE.high)
    wider = SpaceSpec(name="action", shape=(1,), low=(-2.0,), high=(1.0,))
    hashes = {
        contract_hash(),
        contract_hash(inputs=(renamed,)),
        contract_hash(action=wider),
        contract_hash(inputs=(SPACE, renamed)),
        contract_hash(inputs=(renamed, SPACE)),
    }
    assert len(hashes) == 5
    assert contract_hash(policy="other") == contract_hash()


def test_every_mutated_byte_is_refused_or_shows_in_the_digest(bundle: Path) -> None:
    """Without digests, onnxruntime would load about half of such graphs.

    A flip inside the manifest may leave a manifest that is still valid (a letter of its provenance): then it is
    another bundle, and its digest says so.
    """
    rng = random.Random(0)
    honest_digest = read_bundle(bundle).digest
    for path in sorted(bundle.iterdir()):
        original = path.read_bytes()
        for _ in range(60):
            mutated = bytearray(original)
            mutated[rng.randrange(len(mutated))] ^= 1 << rng.randrange(8)
            path.write_bytes(mutated)
            try:
                digest = read_bundle(bundle).digest
            except BundleError:
                continue
            assert path.name == "manifest.json"
            assert digest != honest_digest
        path.write_bytes(original)
    assert read_bundle(bundle).digest == honest_digest


def truncate(bundle: Path) -> None:
    path = bundle / "actor.onnx"
    path.write_bytes(path.read_bytes()[:-1])


def symlink(bundle: Path) -> None:
    target = bundle.parent / "elsewhere"
    shutil.move(bundle / "actor.onnx", target)
    (bundle / "actor.onnx").symlink_to(target)


def hardlink(bundle: Path) -> None:
    os.link(bundle / "actor.onnx", bundle.parent / "second_name")


def fifo(bundle: Path) -> None:
    (bundle / "actor.onnx").unlink()
    os.mkfifo(bundle / "actor.onnx")


def folder(bundle: Path) -> None:
    (bundle / "actor.onnx").unlink()
    (bundle / "actor.onnx").mkdir()


def manifest_change(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def apply(bundle: Path) -> None:
        path = bundle / "manifest.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return apply


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "DIGEST_MISMATCH"),
        (lambda bundle: (bundle / "actor.onnx").unlink(), "BUNDLE_INCOMPLETE"),
        (lambda bundle: (bundle / "manifest.json").unlink(), "BUNDLE_INCOMPLETE"),
        (lambda bundle: (bundle / "extra.so").touch(), "BUNDLE_UNSAFE_FILE"),
        (symlink, "BUNDLE_UNSAFE_FILE"),
        (hardlink, "BUNDLE_UNSAFE_FILE"),
        (fifo, "BUNDLE_UNSAFE_FILE"),
        (folder, "BUNDLE_UNSAFE_FILE"),
        (lambda bundle: (bundle / "manifest.json").write_text("{"), "BAD_MANIFEST"),
        (lambda bundle: (bundle / "manifest.json").write_text("[" * 100_000), "BAD_MANIFEST"),
        (lambda bundle: (bundle / "manifest.json").write_bytes(b"\xff\xfe\xff"), "BAD_MANIFEST"),
        (manifest_change(lambda d: d.update(schema_version=2)), "BAD_MANIFEST"),
        (manifest_change(lambda d: d.pop("action")), "BAD_MANIFEST"),
        (manifest_change(lambda d: d.update(policy="../up")), "BAD_MANIFEST"),
        (manifest_change(lambda d: d.update(default_variant="other")), "BAD_MANIFEST"),
        (manifest_change(lambda d: d.update(variants=[])), "BAD_MANIFEST"),
        (manifest_change(lambda d: d.update(variants={})), "BAD_MANIFEST"),
        (manifest_change(lambda d: d["files"].update({"../up": {"sha256": "", "bytes": 0}})), "BAD_MANIFEST"),  # type: ignore[attr-defined]
        (manifest_change(lambda d: d["files"].pop("golden.npz")), "BUNDLE_UNSAFE_FILE"),  # type: ignore[attr-defined]
        (manifest_change(lambda d: d["action"].update(high=[2.0])), "CONTRACT_MISMATCH"),  # type: ignore[attr-defined]
        (manifest_change(lambda d: d["golden"].update(action_tolerance=float("inf"))), "BAD_MANIFEST"),  # type: ignore[attr-defined]
        (manifest_change(lambda d: d["golden"].update(output_tolerance=float("nan"))), "BAD_MANIFEST"),  # type: ignore[attr-defined]
        (manifest_change(lambda d: d["golden"].update(tie_width=float("inf"))), "BAD_MANIFEST"),  # type: ignore[attr-defined]
        (manifest_change(lambda d: d["golden"].update(rows=0)), "BAD_MANIFEST"),  # type: ignore[attr-defined]
        (manifest_change(lambda d: d["golden"].update(rows=float("inf"))), "BAD_MANIFEST"),  # type: ignore[attr-defined]
        (manifest_change(lambda d: d.update(num_components=float("inf"))), "BAD_MANIFEST"),
        (manifest_change(lambda d: d["golden"].update(rows=3)), "BUNDLE_INCOMPLETE"),  # type: ignore[attr-defined]
    ],
)
def test_a_bad_bundle_is_refused_with_its_reason(bundle: Path, damage: Callable[[Path], None], reason: str) -> None:
    damage(bundle)
    with pytest.raises(BundleError) as caught:
        read_bundle(bundle)
    assert caught.value.reason == reason


def zip_of(content: bytes, **changes: int) -> bytes:
    """A golden archive with one member; `changes` to what the archive says of it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("observation.npy", content)
        for name, value in changes.items():
            setattr(archive.infolist()[0], name, value)
    return buffer.getvalue()


def npy(array: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)  # type: ignore[arg-type]
    return buffer.getvalue()


def npz(**changes: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{**GOLDEN, **changes})  # type: ignore[arg-type]
    return buffer.getvalue()


HUGE_ARRAY = npy(np.zeros(2)).replace(b"(2,), }" + b" " * 16, b"(99999999999999999,), }")


@pytest.mark.parametrize(
    ("golden", "reason"),
    [
        (npz(), None),
        (npz(**{"actor.margin": np.full(2, np.nan)}), None),
        (b"", "BUNDLE_INCOMPLETE"),
        (npy(GOLDEN["observation"]), "BUNDLE_INCOMPLETE"),
        (npz(observation=np.float32(3)), "BUNDLE_INCOMPLETE"),
        (npz(observation=np.zeros((3, 2))), "BUNDLE_INCOMPLETE"),
        (npz(observation=np.array(["a", "b"])), "BUNDLE_INCOMPLETE"),
        (npz(observation=np.array([{}, {}], dtype=object)), "BUNDLE_INCOMPLETE"),
        (npz(unexpected=np.zeros(7)), "BUNDLE_INCOMPLETE"),
        (zip_of(b"no"), "BUNDLE_INCOMPLETE"),
        (zip_of(npy(np.zeros(2))[:-1]), "BUNDLE_INCOMPLETE"),
        (zip_of(HUGE_ARRAY), "BUNDLE_INCOMPLETE"),
        (zip_of(npy(np.zeros(2)), flag_bits=1), "BUNDLE_INCOMPLETE"),
        (zip_of(npy(np.zeros(2)), compress_type=99), "BUNDLE_INCOMPLETE"),
        (zip_of(npy(np.zeros(2)), file_size=2**32 - 2), "MODEL_TOO_LARGE"),
    ],
)
def test_golden_rows_that_are_none_are_refused(bundle: Path, golden: bytes, reason: str | None) -> None:
    (bundle / "golden.npz").write_bytes(golden)
    entry = {"sha256": hashlib.sha256(golden).hexdigest(), "bytes": len(golden)}
    manifest_change(lambda d: d["files"].update({"golden.npz": entry}))(bundle)  # type: ignore[attr-defined]
    if reason is None:
        read_bundle(bundle)
        return
    with pytest.raises(BundleError) as caught:
        read_bundle(bundle)
    assert caught.value.reason == reason


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="BUNDLE_NOT_FOUND"):
        read_bundle(tmp_path / "nothing")


def test_an_existing_destination_is_refused_and_kept(bundle: Path) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with pytest.raises(BundleError, match="DESTINATION_EXISTS"):
        write_bundle(bundle, MANIFEST, graphs={"actor": b"new"}, golden=GOLDEN, card="")
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match="NO_SPACE"):
        write_bundle(tmp_path / "bundle", MANIFEST, graphs={"actor": b"graph"}, golden=GOLDEN, card="")
    assert list(tmp_path.iterdir()) == []


KILLED_WRITER = """
import os, sys
from tests.export.test_reader import GOLDEN, GRAPH, MANIFEST
from lom_bundle import write_bundle

survived, calls = int(sys.argv[2]), 0

def dying(real):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls > survived:
            os._exit(9)
        return real(*arguments, **options)
    return call

os.fsync, os.rename = dying(os.fsync), dying(os.rename)
write_bundle(sys.argv[1], MANIFEST, graphs={"actor": GRAPH}, golden=GOLDEN, card="card")
"""


@pytest.mark.parametrize("survived_calls", range(6))
def test_a_writer_killed_at_any_step_leaves_a_whole_bundle_or_none(tmp_path: Path, survived_calls: int) -> None:
    """Four files are made durable, then the folder is renamed: calls 1 to 5."""
    bundle = tmp_path / "bundle"
    command = [sys.executable, "-c", KILLED_WRITER, str(bundle), str(survived_calls)]
    code = subprocess.run(command, check=False, cwd=Path(__file__).parents[2]).returncode
    if survived_calls < 5:
        assert code == 9
        with pytest.raises(BundleError, match="BUNDLE_NOT_FOUND"):
            read_bundle(bundle)
    else:
        assert code == 0
        assert read_bundle(bundle).graphs == {"actor": GRAPH}
