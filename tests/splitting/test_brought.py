"""Parts come to the CPU in order and whole, also while a GPU computes the next."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maisi.networks.autoencoder import Autoencoder, AutoencoderConfig
from maisi.splitting.autoencoder import brought, decoded
from maisi.splitting.execution import Execution

CONFIG = AutoencoderConfig(channels=(32, 32), num_res_blocks=(1, 1), norm_groups=8)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_each_part_is_brought_once_and_in_order(device: str) -> None:
    torch.manual_seed(0)
    model = Autoencoder(CONFIG).to(device).requires_grad_(False)
    z = torch.randn(1, 4, 40, 16, 16, device=device)
    image = torch.empty(1, 1, 80, 32, 32)
    starts = []

    def bring(start: int, rows: Tensor) -> int:
        image.narrow(2, start, rows.shape[2]).copy_(rows)
        return start

    with torch.inference_mode():
        execution = Execution(parts=7, devices=(torch.device(device),))
        starts += list(brought(decoded(model, z, execution, 0), bring))
        whole = model.decode(z).cpu()
    assert starts == sorted(set(starts))
    assert len(starts) == 7
    torch.testing.assert_close(image, whole, rtol=1e-3, atol=1e-4)
