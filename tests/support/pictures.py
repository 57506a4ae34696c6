"""Looks at pictures that programs draw."""

from pathlib import Path

import numpy as np
from matplotlib.image import imread


def is_drawn(picture: Path) -> bool:
    """Whether a picture has more than its background."""
    colours = imread(picture)[..., :3]
    return bool(np.ptp(colours) > 0.5 and (colours < 0.9).any(axis=-1).mean() > 0.005)
