"""`lom_server.repository` on real folders."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lom_server.errors import StartError
from lom_server.repository import PROMOTED_FILE, open_repository
from tests.support.bundles import Flaws, write_test_bundle, write_test_repository


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository of `arm` in the versions 2 and 10, and of `gripper` in version 1; nothing is in the bundles."""
    for name in ("arm/10", "arm/2", "gripper/1"):
        (tmp_path / "models" / name).mkdir(parents=True)
    return tmp_path / "models"


def test_policies_and_versions_are_folders_in_order(folder: Path) -> None:
    found = open_repository(folder).scan()
    assert list(found) == ["arm", "gripper"]
    assert dict(found["arm"]) == {2: folder / "arm" / "2", 10: folder / "arm" / "10"}
    assert list(found["arm"]) == [2, 10]


@pytest.mark.parametrize(
    "name",
    ["Arm/1", "-arm/1", "ärm/1", "arm arm/1", ".arm/1", f"{'a' * 65}/1"]
    + [f"gripper/{version}" for version in ("0", "01", "v2", "-1", "1.0", "²", str(2**31), "99999999999")],
)
def test_names_that_no_request_could_carry_are_not_seen(folder: Path, name: str) -> None:
    (folder / name).mkdir(parents=True)
    found = open_repository(folder).scan()
    assert {policy: list(versions) for policy, versions in found.items()} == {"arm": [2, 10], "gripper": [1]}


def test_the_largest_names_are_seen(folder: Path) -> None:
    (folder / ("a" * 64) / str(2**31 - 1)).mkdir(parents=True)
    assert list(open_repository(folder).scan()["a" * 64]) == [2**31 - 1]


def test_links_are_not_followed(folder: Path) -> None:
    (folder / "linked").symlink_to(folder / "arm")
    (folder / "arm" / "3").symlink_to(folder / "arm" / "2")
    found = open_repository(folder).scan()
    assert "linked" not in found
    assert list(found["arm"]) == [2, 10]


def test_files_and_policies_without_a_version_are_not_seen(folder: Path) -> None:
    (folder / "readme").write_text("a file")
    (folder / "arm" / "3").write_text("a file")
    (folder / "empty").mkdir()
    assert list(open_repository(folder).scan()) == ["arm", "gripper"]


def test_a_folder_that_went_is_unreadable(folder: Path) -> None:
    repository = open_repository(folder)
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(StartError, match=r"^STORE_UNREADABLE: "):
        repository.scan()


def test_there_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"^BUNDLE_NOT_FOUND: "):
        open_repository(tmp_path / "nowhere")


def test_nothing_is_promoted_at_first(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert open_repository(folder).promoted_version("arm") is None
    assert open_repository(folder).promoted_version("unknown") is None
    assert caplog.records == []


def test_a_promotion_is_remembered(folder: Path) -> None:
    assert open_repository(folder).promote("arm", 2)
    assert open_repository(folder).promote("arm", 10)
    assert open_repository(folder).promoted_version("arm") == 10
    assert open_repository(folder).promoted_version("gripper") is None
    assert sorted(os.listdir(folder / "arm")) == ["10", "2", PROMOTED_FILE]
    assert (folder / "arm" / PROMOTED_FILE).stat().st_mode & 0o777 == 0o644


def test_a_promotion_replaces_the_file_and_never_writes_into_it(folder: Path) -> None:
    repository = open_repository(folder)
    repository.promote("arm", 2)
    with (folder / "arm" / PROMOTED_FILE).open() as seen_by_a_reader:
        repository.promote("arm", 10)
        assert seen_by_a_reader.read() == "2\n"


def test_a_promotion_that_cannot_be_written_says_so_and_leaves_nothing_behind(folder: Path) -> None:
    (folder / "arm" / PROMOTED_FILE).mkdir()
    assert not open_repository(folder).promote("arm", 2)
    assert sorted(os.listdir(folder / "arm")) == ["10", "2", PROMOTED_FILE]
    assert not open_repository(folder).promote("unknown", 2)
    assert sorted(os.listdir(folder)) == ["arm", "gripper"]


def write_garbage(path: Path) -> None:
    path.write_bytes(b"\xff\x00\n2\n")


def write_too_much(path: Path) -> None:
    path.write_text("2" * 1000)


def write_zero(path: Path) -> None:
    path.write_text("0\n")


def write_link(path: Path) -> None:
    path.with_name("target").write_text("2\n")
    path.symlink_to(path.with_name("target"))


@pytest.mark.timeout(10)
@pytest.mark.parametrize("place", [write_garbage, write_too_much, write_zero, write_link, os.mkfifo, os.mkdir])
def test_a_promotion_that_cannot_be_read_is_none_and_is_logged(
    folder: Path, place: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    place(folder / "arm" / PROMOTED_FILE)
    with caplog.at_level(logging.ERROR, "lom_server"):
        assert open_repository(folder).promoted_version("arm") is None
    (record,) = caplog.records
    assert record.getMessage().startswith("arm: ")


def test_a_name_is_never_joined_to_a_path(folder: Path) -> None:
    (folder.parent / PROMOTED_FILE).write_text("7\n")
    (folder / PROMOTED_FILE).write_text("7\n")
    repository = open_repository(folder)
    for name in ("..", ".", "", "../models", str(folder), "arm/../arm", "arm\0"):
        assert repository.promoted_version(name) is None
        assert not repository.promote(name, 2)


def test_a_single_bundle_is_version_1_of_the_policy_that_it_names(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "anything", policy="arm")
    repository = open_repository(tmp_path / "anything")
    assert repository.is_single_bundle
    assert {policy: dict(versions) for policy, versions in repository.scan().items()} == {
        "arm": {1: tmp_path / "anything"}
    }
    assert repository.promoted_version("arm") is None
    assert not repository.promote("arm", 1)
    assert not (tmp_path / "anything" / PROMOTED_FILE).exists()


def test_a_repository_of_bundles_is_no_single_bundle(tmp_path: Path) -> None:
    write_test_repository(tmp_path, {"arm": {1: Flaws()}})
    assert not open_repository(tmp_path).is_single_bundle


def huge(manifest: Path) -> None:
    with manifest.open("wb") as file:
        file.truncate(1 << 40)


def deep(manifest: Path) -> None:
    manifest.write_text("[" * 1_000_000)


def nameless(manifest: Path) -> None:
    document = json.loads(manifest.read_text())
    del document["policy"]
    manifest.write_text(json.dumps(document))


def dangling(manifest: Path) -> None:
    manifest.unlink()
    manifest.symlink_to("nowhere")


def pipe(manifest: Path) -> None:
    manifest.unlink()
    os.mkfifo(manifest)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (huge, "MODEL_TOO_LARGE"),
        (deep, "BAD_MANIFEST"),
        (nameless, "BAD_MANIFEST"),
        (dangling, "BUNDLE_UNSAFE_FILE"),
        (pipe, "BUNDLE_UNSAFE_FILE"),
    ],
)
def test_the_manifest_of_a_single_bundle_is_read_with_care(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    write_test_bundle(tmp_path / "arm")
    damage(tmp_path / "arm" / "manifest.json")
    with pytest.raises(StartError) as refusal:
        open_repository(tmp_path / "arm").scan()
    assert refusal.value.reason == reason
