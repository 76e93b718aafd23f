"""What a case is, and what formulas share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .arithmetic import unit
from .draw import Draw

DRAWERS: dict[str, Callable[[Draw], Case]] = {}


def drawer(*names: str):
    """Registers what draws a case of a function of `fusedloss.functional`, or of several that share a drawer."""

    def register(draw: Callable[..., Case]) -> Callable[..., Case]:
        for name in names:
            DRAWERS[name] = draw if len(names) == 1 else (lambda d, name=name: draw(d, name))
        return draw

    return register


class Rows:
    """Losses of rows, `[M]` or more dimensions, and what the mean divides their sum by."""

    def __init__(
        self, losses: Tensor, over: Tensor | float | None = None, empty: float = 0.0, mean: Tensor | None = None
    ):
        self.losses, self.empty, self.mean = losses, empty, mean
        self.over = float(losses.numel()) if over is None else over

    def reduced(self, reduction: str) -> Tensor:
        if reduction == "none":
            return self.losses
        if reduction == "mean" and self.mean is not None:
            return self.mean
        total = self.losses.sum()
        if reduction == "sum":
            return total
        over = torch.as_tensor(self.over, dtype=total.dtype)
        if float(over) == 0:
            return total * 0 + self.empty
        return total / over


@dataclass
class Case:
    """tensors: everything that is one, by name. grads: those that receive gradients.

    call: (function, tensors, options) -> the loss, for the function and for its module alike.
    formula: (ops, tensors) -> Rows, or a tensor where there is nothing to reduce.
    axes: of each tensor, a name for each dimension that may be permuted: equal names together. points: tensors whose
        values are places along an axis. independent: an axis whose rows do not see one another, so that they may
        be doubled and left out. counted: which of these rows count, from ops and tensors.
    """

    name: str
    dtype: torch.dtype
    tensors: dict[str, Tensor]
    call: Callable[[Callable[..., Any], dict[str, Tensor], dict[str, Any]], Any]
    formula: Callable[[Ops, SimpleNamespace], Rows | Tensor]
    grads: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    reductions: tuple[str, ...] = ("mean", "sum", "none")
    default_reduction: str = "mean"
    axes: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    points: Mapping[str, str] = field(default_factory=dict)
    rows_axis: str | None = None  # that of the losses under "none"
    independent: str | None = None
    counted: Callable[[SimpleNamespace], Tensor] | None = None
    backends: tuple[str, ...] = ("chunked", "reference", "triton")
    takes_group: bool = False
    result_dtype: torch.dtype | None = None  # None: fp32, or fp64 for fp64
    stats: Callable[[Ops, SimpleNamespace], dict[str, Tensor]] | None = None
    module: str | None = None
    unsure: tuple[str, ...] = ()  # tensors whose gradients have no one right value here
    traits: dict[str, Any] = field(default_factory=dict)

    def reduction(self, options: Mapping[str, Any] | None = None) -> str | None:
        if not self.reductions:
            return None
        return (self.options if options is None else options).get("reduction", self.default_reduction)

    def exact(self, ops: Ops, reduction: str | None) -> Callable[[dict[str, Tensor]], Tensor]:
        def value(tensors: dict[str, Tensor]) -> Tensor:
            ops.again()
            found = self.formula(ops, SimpleNamespace(**tensors))
            return found.reduced(reduction or "mean") if isinstance(found, Rows) else found

        return value


class Ops:
    """Decisions of a formula: taken once, kept for its further runs, noted where a rounding could take another."""

    def __init__(self, dtype: torch.dtype):
        self.unit, self.unclear = unit(dtype), 0
        self.taken: list[Tensor] = []
        self.next = 0

    def again(self) -> None:
        self.next = 0

    def _once(self, decide: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        if self.next == len(self.taken):
            decision, unclear = decide()
            self.unclear += int(unclear.sum())
            self.taken.append(decision)
        self.next += 1
        return self.taken[self.next - 1]

    def above(self, x: Tensor, y: Tensor, size: Tensor | float = 0.0, where: Tensor | None = None) -> Tensor:
        """x > y. Equal numbers, to the roundings of this formula, are not; a difference within a few u of `size` or
        of x and y themselves is unclear."""

        def decide() -> tuple[Tensor, Tensor]:
            apart = (x - y).detach()
            scale = torch.maximum(x.detach().abs(), y.detach().abs()) + size
            scale = torch.where(scale.isfinite(), scale, 0)
            equal = apart.abs() <= 1e-14 * scale
            near = (apart.abs() <= 64 * self.unit * scale) & ~equal
            return (apart > 0) & ~equal, near if where is None else near & where

        return self._once(decide)

    def kink(self, x: Tensor, size: Tensor | float, where: Tensor | None = None) -> Tensor:
        """relu(x)."""
        return torch.where(self.above(x, torch.zeros_like(x), size, where), x, torch.zeros_like(x))

    def first_largest(self, x: Tensor) -> Tensor:
        """The first of the largest of each row, where several are equal to the formula's roundings; -inf is none."""

        def decide() -> tuple[Tensor, Tensor]:
            most = x.detach().amax(-1, keepdim=True)
            scale = torch.where(most.isfinite(), most.abs(), 0.0)
            near = (x.detach() >= most - 64 * self.unit * scale.clamp(min=1)) & (x.detach() > -torch.inf)
            return (x.detach() >= most - 1e-14 * scale).int().argmax(-1), near.sum(-1) > 1

        return self._once(decide)


def length(x: Tensor, eps: float = 1e-12) -> Tensor:
    """max(|row|, eps); without a gradient where it is eps, as torch's clamp."""
    norm = root(x.square().sum(-1))
    return torch.where(norm < eps, eps, norm)


def unit_rows(x: Tensor, eps: float = 1e-12) -> Tensor:
    return x / length(x, eps)[..., None]


def products(x: Tensor, y: Tensor, cosine: bool) -> Tensor:
    """Of all rows with all rows. Norms divide the products, not the rows: whoever computes so has, in the gradient, the
    difference of two sums that were rounded apart, and the budget is to know of that."""
    found = x @ y.T
    return found / (length(x)[:, None] * length(y)) if cosine else found


def root(x: Tensor) -> Tensor:
    """The square root whose gradient at 0 is 0."""
    zero = x <= 0
    return torch.where(zero, 1, x).sqrt().masked_fill(zero, 0)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), of every x."""
    return torch.logaddexp(x, torch.zeros_like(x))


def lse(z: Tensor, dim: int = -1) -> Tensor:
    """logsumexp, -inf and without gradient where there is nothing to sum."""
    empty = (z == -torch.inf).all(dim)
    safe = torch.where(empty.unsqueeze(dim), 0.0, z)
    return (
        torch.logsumexp(safe, dim).masked_fill(empty, -torch.inf)
        if z.shape[dim]
        else z.new_full(empty.shape, -torch.inf)
    )


def mean_over_counted(losses: Tensor, counted: Tensor, weight: Tensor | None = None, empty: float = 0.0) -> Rows:
    weight = counted.to(losses.dtype) if weight is None else torch.where(counted, weight, 0)
    return Rows(torch.where(counted & (weight != 0), losses * weight, 0.0), weight.detach().sum(), empty)
