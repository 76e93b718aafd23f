"""How exact a result can be: by how much it moves, in fp64, when its inputs move by a rounding.

Two roundings of one formula differ by luck of a CPU's products, so that no bound between them can be written down. Each
is held against fp64 instead, `|found - exact| <= 2 |other - exact| + moves`: the error budget, with what the condition
of the problem allows to anybody in the place of a rounding of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

ROUNDINGS = 4  # a product, its scale, exp and the sum after it
DRAWS = 3

Move = Callable[[Tensor], Tensor]


def exact_and_moves(
    run: Callable[[Move], Mapping[str, Tensor]], dtype: torch.dtype
) -> tuple[Mapping[str, Tensor], dict[str, float]]:
    """What `run` gives in fp64, and by how much each of it moves with the last bits of numbers of `dtype`.

    `run` must pass each of its floating inputs through the function that it is given.
    """
    step = ROUNDINGS * torch.finfo(dtype).eps / 2
    generator = torch.Generator().manual_seed(0)

    def nudged(x: Tensor) -> Tensor:
        return x * (1 + step * (2 * torch.randint(0, 2, x.shape, generator=generator) - 1))

    exact = run(lambda x: x)
    moves = {name: step * x.abs().max().item() if x.numel() else 0.0 for name, x in exact.items()}
    for _ in range(DRAWS):
        for name, x in run(nudged).items():
            if x.numel():
                moves[name] = max(moves[name], (x - exact[name]).abs().max().item())
    return exact, moves


def of_logits(z: Tensor) -> float:
    """How far apart two values of a softmax loss in fp32 may be, whose logits `z` are products that both have rounded.

    lse(z) - z_t moves by at most twice as much as a logit, and each side rounds a logit to an eps of the largest.
    """
    return 2 * 2 * torch.finfo(torch.float32).eps * z.abs().max().item()


def within(found: Tensor, other: Tensor, exact: Tensor, moves: float, what: object, times: float = 1.0) -> None:
    """`found` is `times` what `other` and `exact` are."""
    assert found.shape == other.shape == exact.shape, what
    if found.numel():
        error = (found.double() - times * exact).abs().max().item()
        allowed = times * (2 * (other.double() - exact).abs().max().item() + moves)
        assert error <= allowed, f"{what}: off by {error}, {allowed} are allowed"
