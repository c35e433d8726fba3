"""What `import maisi` offers, and how it answers what it cannot use."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import maisi


def test_public_names_can_be_completed() -> None:
    assert set(dir(maisi)) == set(maisi.__all__)
    assert all(getattr(maisi, name) is not None for name in dir(maisi))


def test_devices_and_memory_may_be_given_as_torch_and_numbers(model_folder) -> None:
    model = maisi.load(model_folder, device=torch.device("cpu"), memory=2 * 2**30)
    assert (model.device, model.memory) == (torch.device("cpu"), 2 * 2**30)
    with pytest.raises(maisi.MaisiError, match="write it like 6GiB"):
        maisi.load(model_folder, memory=4)


def test_a_mask_is_no_bare_array(model_folder) -> None:
    with pytest.raises(maisi.MaisiError, match="not ndarray; wrap an array"):
        maisi.load(model_folder).generate(mask=np.zeros((8, 8, 8), np.uint8))  # type: ignore[arg-type]
