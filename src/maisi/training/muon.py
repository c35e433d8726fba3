"""Muon for the large weights and Adam for the rest, as one optimizer.

Muon (Jordan et al. 2024) replaces the momentum of a weight matrix by the nearest orthogonal matrix, found by
Newton-Schulz iterations: all directions of a weight learn equally fast. A convolution's weight counts as the matrix
(out, in x kernel). Updates are scaled to the size Adam's would have (Liu et al. 2025), so learning rates carry over.
PyTorch's own Muon takes 2D parameters only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration; they favour speed over exactness."""

SMALLEST_SIDE = 8
"""Matrices with a shorter side (a network's last convolution, say) are left to Adam."""


class MuonAdam(torch.optim.Optimizer):
    """See the module's description.

    Args:
        module: whose trainable parameters are optimized.
        lr: of the matrices; all others get `adam_fraction` of it. A last convolution has many weights that push one
            output the same way; at a tenth of the matrices' rate and more it made the output jump from step to step.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
        adam_fraction: float = 0.03,
    ) -> None:
        tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        trained = [p for p in module.parameters() if p.requires_grad]
        large = [p for p in trained if is_matrix(p) and id(p) not in tables]
        chosen = {id(p) for p in large}
        rest = [p for p in trained if id(p) not in chosen]
        groups: list[dict[str, Any]] = [{"params": large, "muon": True}, {"params": rest, "muon": False}]
        defaults = {"lr": lr, "betas": betas, "momentum": momentum, "adam_fraction": adam_fraction}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make one step with the gradients that are there."""
        for group in self.param_groups:
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not group["muon"]:
                for parameter in given:
                    self._adam(parameter, group)
                continue
            alike: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in given:
                alike.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
            for parameters in alike.values():
                self._muon(parameters, group)

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update weights that are matrices of one size together: on a GPU each product costs a launch."""
        updates = []
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(state["momentum"], group["momentum"])
            updates.append(update.reshape(update.shape[0], -1))
        matrices = orthogonal(torch.stack(updates))
        scale = 0.2 * max(matrices.shape[1:]) ** 0.5
        for parameter, matrix in zip(parameters, matrices, strict=True):
            parameter.add_(matrix.reshape(parameter.shape), alpha=-group["lr"] * scale)

    def _adam(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros((), dtype=torch.int64)
            state["mean"] = torch.zeros_like(parameter)
            state["square"] = torch.zeros_like(parameter)
        state["step"] += 1
        first, second = group["betas"]
        count = int(state["step"])
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].lerp_(gradient.square(), 1 - second)
        spread = (state["square"] / (1 - second**count)).sqrt_().add_(1e-8)
        rate = group["lr"] * group["adam_fraction"] / (1 - first**count)
        parameter.addcdiv_(state["mean"], spread, value=-rate)


def is_matrix(parameter: Tensor) -> bool:
    """Say whether Muon suits a parameter."""
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= SMALLEST_SIDE


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Return about the nearest matrix with orthonormal rows or columns: singular values come to 0.7 to 1.2.

    Every iterate is a polynomial in the small Gram matrix times `matrix`, so the iterations run on Gram matrices and
    the long side is multiplied twice in all, not in each of them. Matrices `... M N` are treated one by one.
    """
    a, b, c = NEWTON_SCHULZ
    x: Tensor = matrix / (torch.linalg.matrix_norm(matrix, keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    gram = x @ x.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    product = identity
    for _ in range(iterations):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x.mT if tall else x
