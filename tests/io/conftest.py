import numpy as np
import pytest

from maisi.volume import Volume


@pytest.fixture
def oblique() -> Volume:
    """A small CT, stored with axes toward left, superior, anterior, and tilted."""
    generator = np.random.default_rng(0)
    array = generator.integers(-1024, 3072, (5, 6, 7)).astype(np.int16)
    tilt = np.array([[np.cos(0.2), -np.sin(0.2), 0], [np.sin(0.2), np.cos(0.2), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.array([[-1.0, 0, 0], [0, 0, 2.0], [0, 1.5, 0]])
    affine[:3, 3] = (100.25, -50.5, 812.75)
    return Volume(array, affine)
