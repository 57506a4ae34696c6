"""A film of an environment's first episode."""

import importlib.util
import math
import os
import warnings
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import numpy as np
from numpy.typing import NDArray

_MOST_FRAMES_PER_S = 25.0


class FilmError(Exception):
    """The episode cannot be filmed; one line says why."""


class FilmedEpisode(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Films the first episode at the environment's own speed; the file is there, whole, once that episode is over.

    At most 25 frames a second: of an environment with more steps than that, every second, third, ... is shown.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], path: Path) -> None:
        """Films `env`, which renders `rgb_array`, into `path`.

        Raises:
            FilmError: as `require_film_format`.
        """
        require_film_format(path)
        super().__init__(env)
        frames_per_s = float(env.metadata.get("render_fps") or _MOST_FRAMES_PER_S)
        self._stride = math.ceil(frames_per_s / _MOST_FRAMES_PER_S)
        self._frames_per_s = frames_per_s / self._stride
        self._path = path
        self._unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
        self._film: _Film | None = None
        self._steps = 0
        self._is_over = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        first = super().reset(seed=seed, options=options)
        if not self._is_over:
            self._shoot()
        return first

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        if not self._is_over:
            self._steps += 1
            self._is_over = terminated or truncated
            if self._is_over or self._steps % self._stride == 0:
                self._shoot()
            if self._is_over:
                self._finish()
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        """An episode that was not played to its end leaves nothing."""
        super().close()
        self._film, self._is_over = None, True
        self._unfinished.unlink(missing_ok=True)

    def _shoot(self) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the reason alone is the user's
                frame = np.asarray(self.env.render())
            if self._film is None:
                make = _Mp4 if self._path.suffix == ".mp4" else _Gif
                self._film = make(self._unfinished, self._frames_per_s)
            self._film.append(frame)
        except Exception as error:  # what draws is foreign code
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise FilmError(f"cannot render: {reason} (MuJoCo without a display wants MUJOCO_GL=egl)") from None

    def _finish(self) -> None:
        assert self._film is not None
        self._film.close()
        os.replace(self._unfinished, self._path)


def require_film_format(path: Path) -> None:
    """Passes if a film can be written into a file of this name.

    Raises:
        FilmError: its folder does not exist, it is a folder, or its format is not known or not to be had here.
    """
    if not path.parent.is_dir():
        raise FilmError(f"folder {path.parent} does not exist")
    if path.is_dir():
        raise FilmError(f"{path} is a folder")
    if path.suffix not in (".gif", ".mp4"):
        raise FilmError(f"expected a name that ends in .gif or .mp4, got {path.name!r}")
    if path.suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise FilmError("an .mp4 needs imageio-ffmpeg: pip install imageio-ffmpeg (a .gif needs nothing more)")


class _Film(Protocol):
    def append(self, frame: NDArray[Any]) -> None: ...

    def close(self) -> None: ...


class _Gif:
    """Frames wait for the end with 256 colours each: a third of their memory."""

    def __init__(self, path: Path, frames_per_s: float) -> None:
        from PIL import Image

        self._from_array = Image.fromarray
        self._path = path
        self._duration_ms = 1000 / frames_per_s
        self._frames: list[Any] = []

    def append(self, frame: NDArray[Any]) -> None:
        self._frames.append(self._from_array(frame).quantize())

    def close(self) -> None:
        first, *others = self._frames
        first.save(self._path, format="GIF", save_all=True, append_images=others, duration=self._duration_ms, loop=0)


class _Mp4:
    def __init__(self, path: Path, frames_per_s: float) -> None:
        import imageio.v2

        self._writer: Any = imageio.v2.get_writer(path, format="FFMPEG", mode="I", fps=frames_per_s)
        self.append = self._writer.append_data
        self.close = self._writer.close
