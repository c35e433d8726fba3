"""Muon for the large weights and Adam for the rest, as one optimizer.

Muon (Jordan et al. 2024) replaces the momentum of a weight matrix by the nearest orthogonal matrix, found by
Newton-Schulz iterations: all directions of a weight learn equally fast. A convolution's weight counts as the matrix
(out, in x kernel). Updates are scaled to the size Adam's would have (Liu et al. 2025), so learning rates carry over.
PyTorch's own Muon takes 2D parameters only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        """Make one step with the gradients that are there; alike things together, for on a GPU each costs a launch."""
        for group in self.param_groups:
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            if given:
                (self._muon if group["muon"] else self._adam)(given, group)

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [_gradient(parameter) for parameter in parameters]
        momenta = self._kept("momentum", parameters)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
        matrices = orthogonal([update.reshape(len(update), -1) for update in updates])
        moves = [matrix.reshape(p.shape) for matrix, p in zip(matrices, parameters, strict=True)]
        torch._foreach_mul_(moves, [0.2 * max(matrix.shape) ** 0.5 for matrix in matrices])
        torch._foreach_add_(parameters, moves, alpha=-group["lr"])

    def _adam(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        means, squares = self._kept("mean", parameters), self._kept("square", parameters)
        gradients = [_gradient(parameter) for parameter in parameters]
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - second)
        spreads = torch._foreach_sqrt(squares)
        corrections, rates = [], []
        for parameter in parameters:
            state = self.state[parameter]
            count = int(state.setdefault("step", torch.zeros((), dtype=torch.int64)).add_(1))
            corrections.append((1 - second**count) ** -0.5)
            rates.append(-group["lr"] * group["adam_fraction"] / (1 - first**count))
        torch._foreach_mul_(spreads, corrections)
        torch._foreach_add_(spreads, 1e-8)
        torch._foreach_addcdiv_(parameters, means, spreads, rates)

    def _kept(self, name: str, parameters: list[Tensor]) -> list[Tensor]:
        """A tensor of each parameter's state, zero at first."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[parameter][name] for parameter in parameters]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def is_matrix(parameter: Tensor) -> bool:
    """Say whether Muon suits a parameter."""
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= SMALLEST_SIDE


def orthogonal(matrices: Sequence[Tensor], iterations: int = 5) -> list[Tensor]:
    """Return about the nearest matrices with orthonormal rows or columns: singular values come to 0.7 to 1.2.

    Every iterate is a polynomial in the small Gram matrix times the matrix `M N`, so the iterations run on Gram
    matrices, those of one size together, and the long side is multiplied twice in all, not in each of them.
    """
    norms = torch._foreach_add(torch._foreach_norm(list(matrices)), 1e-7)
    scaled = torch._foreach_div(list(matrices), norms)
    wide = [x.mT if x.shape[0] > x.shape[1] else x for x in scaled]
    alike: dict[int, list[int]] = {}
    for index, x in enumerate(wide):
        alike.setdefault(len(x), []).append(index)
    for indices in alike.values():
        polynomials = _iterated(torch.stack([wide[i] @ wide[i].mT for i in indices]), iterations)
        for i, polynomial in zip(indices, polynomials, strict=True):
            wide[i] = polynomial @ wide[i]
    return [x.mT if matrix.shape[0] > matrix.shape[1] else x for x, matrix in zip(wide, matrices, strict=True)]


def _iterated(gram: Tensor, iterations: int) -> Tensor:
    """The polynomial in Gram matrices `B M M`, as a matrix each."""
    a, b, c = NEWTON_SCHULZ
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    product = identity.expand_as(gram)
    for _ in range(iterations):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    return product
