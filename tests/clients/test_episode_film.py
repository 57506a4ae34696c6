"""A film is there whole, or not at all."""

import os
from pathlib import Path

import numpy as np
import pytest

from lom_client.episode_film import FilmedEpisode, FilmError
from tests.clients.toy_environments import STEPS, ToyFilmEnv


def play(env: FilmedEpisode) -> None:
    env.reset(seed=0)
    for _ in range(STEPS):
        env.step(np.zeros(2, np.float32))


def test_the_film_is_there_as_soon_as_the_first_episode_is_over(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    path = tmp_path / "episode.gif"
    env = FilmedEpisode(ToyFilmEnv(render_mode="rgb_array"), path)
    play(env)
    first = path.read_bytes()
    assert first.startswith(b"GIF89a")
    play(env)
    env.close()
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_what_could_not_be_put_in_place_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL.Image")

    def refuse(*_: object) -> None:
        raise PermissionError("no")

    env = FilmedEpisode(ToyFilmEnv(render_mode="rgb_array"), tmp_path / "episode.gif")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        play(env)
    assert len(list(tmp_path.iterdir())) == 1
    env.close()
    assert list(tmp_path.iterdir()) == []


def test_what_draws_badly_is_named(tmp_path: Path) -> None:
    env = FilmedEpisode(ToyFilmEnv(render_mode="rgb_array", breaks=True), tmp_path / "episode.gif")
    with pytest.raises(FilmError, match=r"^cannot render: no display \(MuJoCo"):
        env.reset()
