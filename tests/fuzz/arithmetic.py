"""What a result may be off by: Monte Carlo arithmetic (Parker 1997).

The project's budget is err(out, fp64) <= 2 err(eager, fp64) + eps max|fp64|. Of a single draw err(eager) is luck: one
number whose roundings happen to cancel would allow nothing. So `eager` is here the formula itself in fp64, with every
input and the result of every operation, forward and backward, moved by a random share of up to u: what an arithmetic of
precision u makes of this formula, sums that cancel included. The root of the mean square of the deviations over several
such runs estimates err(eager), and follows the condition of what is computed. Then

    |out - fp64| <= 2 SPREAD rms + eps(out's dtype) max|fp64|

for every element, with max and rms over the tensor. SPREAD is 2: the largest of a few errors is about twice their root
mean square. u is eps of the dtype that the product computes in: of fp32 for 16 bits, and of 16 bits only for the
operands of the products in the backward pass, which tensor cores need in 16 bits. For fp64 u is 256 eps, 6e-14, so that
the roundings of the formula itself are far below it.

Equal inputs are moved alike, else duplicates would not stay such. In every other run equal numbers of one result are,
too: rows that are duplicates are rounded alike, and no mean of them is nearer than one of them. What is above what is
decided once, without roundings (`Ops`). Where a rounding could decide otherwise the formula says so: such a case is
drawn, run and looked at for crashes, NaN and writes, but its numbers are not compared.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DRAWS, MORE_DRAWS = 5, 40
SPREAD = 2.0
MANY = 64  # terms, of which more may be of few sizes in one dimension
PRODUCTS = ("mm", "bmm", "dot", "mv")
ROUNDED = {
    *PRODUCTS,
    *"add sub rsub mul div sum mean exp log log1p expm1 logsumexp softplus sigmoid tanh sqrt rsqrt pow".split(),
    *"logaddexp linalg_vector_norm norm cumsum logcumsumexp reciprocal exp2 log2 sin cos acos atan2".split(),
    *"addcmul addcdiv lerp".split(),
    *"_log_softmax _softmax _log_softmax_backward_data _softmax_backward_data softplus_backward".split(),
    *"sigmoid_backward tanh_backward".split(),
}

KINDS: dict = {}  # of an operation: 0 exact, 1 rounded, 2 a product


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit(dtype: torch.dtype) -> float:
    return 256 * torch.finfo(dtype).eps if dtype == torch.float64 else torch.finfo(torch.float32).eps


def moved(x: Tensor, u: float, phase: float) -> Tensor:
    """x (1 + u s), s from -1 to 1 and a function of x alone."""
    mantissa, exponent = torch.frexp(x)
    return x + (x * (u * torch.sin(mantissa * 61.0 + exponent * 2.0 + phase))).nan_to_num(0, 0, 0)


def alike(terms: Tensor, roundings: float) -> Tensor:
    """How many roundings a sum of each row is off by: of terms of few sizes they have one sign, and add up.

    The products of fp32 are off by up to 57 eps for 474 terms of one size, and by 6 for others.
    """
    size = terms.abs().sort(1).values
    sizes = 1 + (size[:, 1:] - size[:, :-1] > 1e-4 * size[:, 1:]).sum(1)
    return torch.where(sizes * 16 < size.shape[1], size.shape[1] / 16, roundings)


class Rounding(TorchDispatchMode):
    """Moves what floating operations return. `backward`: the products' operands by another u."""

    def __init__(self, u: float, backward: float, draw: int):
        super().__init__()
        self.u, self.backward_u, self.phase, self.backward = u, backward, 1000.0 * draw, False
        self.by_value = draw % 2 == 0
        self.generator = torch.Generator().manual_seed(draw)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # nothing here is compiled, and asking costs a third of the time
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = KINDS.get(func)
        if kind is None:
            name = func._schema.name.removeprefix("aten::")
            kind = KINDS[func] = 2 if name in PRODUCTS else int(name in ROUNDED)
        if not kind:
            return func(*args, **(kwargs or {}))
        if kind != 2:
            return self._moved(func(*args, **(kwargs or {})), self.u)
        u = self.backward_u if self.backward else self.u
        found = func(*(self._moved(x, u) for x in args), **(kwargs or {}))
        # A sum of K terms, one after the other, is off by about sqrt(K) / 4 roundings of the sum of their sizes.
        sizes = func(*(x.abs() if isinstance(x, Tensor) else x for x in args), **(kwargs or {}))
        each = torch.empty_like(sizes).uniform_(-1, 1, generator=self.generator)
        roundings: Tensor | float = args[0].shape[-1] ** 0.5 / 4
        if func._schema.name == "aten::mm" and args[0].shape[1] > MANY and args[1].shape[1] == 1:
            roundings = alike(args[0] * args[1].T, roundings)[:, None]
        return found + each * sizes * (self.u * (1 + roundings))

    def _moved(self, x, u):
        if isinstance(x, Tensor) and x.dtype == torch.float64 and x.numel():
            if self.by_value:
                self.phase += 1
                return moved(x, u, self.phase)
            return x * torch.empty_like(x).uniform_(1 - u, 1 + u, generator=self.generator)
        return x


@contextlib.contextmanager
def wide_numbers() -> Iterator[None]:
    """Numbers become fp64 where a formula makes tensors of them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def evaluate(
    formula: Callable[[dict[str, Tensor]], Tensor],
    tensors: dict[str, Tensor],
    grads: tuple[str, ...],
    upstream: Tensor | None = None,
    mode: Rounding | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The value and the gradients of `grads`, in fp64; of the sum with `upstream` where the value has rows."""
    wide = {n: x.detach().double() if x.dtype.is_floating_point else x for n, x in tensors.items()}
    if mode is not None:
        # Whole numbers, labels above all, are exact in every dtype.
        wide = {
            n: torch.where(x == x.round(), x, moved(x, mode.u, mode.phase + i)) if x.dtype == torch.float64 else x
            for i, (n, x) in enumerate(wide.items())
        }
    leaves = {n: x.clone().requires_grad_() if n in grads else x for n, x in wide.items()}

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        with wide_numbers():
            value = formula(leaves)
        if mode is not None:
            mode.backward = True
        total = value if upstream is None else (value * upstream.double()).sum()
        if not grads or not total.requires_grad:
            return value.detach(), {n: torch.zeros_like(leaves[n]) for n in grads}
        found = torch.autograd.grad(total, [leaves[n] for n in grads], allow_unused=True, materialize_grads=True)
        return value.detach(), dict(zip(grads, found, strict=True))

    if mode is None:
        return run()
    with mode:
        return run()


class Budget:
    """The exact results of a case, and, once it is asked for, how far `eager` is from them."""

    def __init__(self, formula, tensors, grads, dtype: torch.dtype, upstream=None):
        self.dtype, self.grads = dtype, grads
        self.value, self.gradients = evaluate(formula, tensors, grads, upstream)
        self._run = lambda mode: evaluate(formula, tensors, grads, upstream, mode)
        self._squares: dict[str, Tensor] = {}
        self._draws = 0

    def rms(self, draws: int) -> dict[str, Tensor]:
        u = unit(self.dtype)
        backward = torch.finfo(self.dtype).eps if self.dtype.itemsize == 2 else u
        exact = {"value": self.value, **self.gradients}
        while self._draws < draws:
            self._draws += 1
            value, gradients = self._run(Rounding(u, backward, self._draws))
            for name, x in {"value": value, **gradients}.items():
                square = ((x - exact[name]) / self._size(exact[name])).square().nan_to_num(0, 0, 0)
                self._squares[name] = self._squares.get(name, 0) + square
        return {name: (x / self._draws).sqrt() * self._size(exact[name]) for name, x in self._squares.items()}

    @staticmethod
    def _size(x: Tensor) -> float:
        """Squares of 1e-250 are 0."""
        size = x.abs().nan_to_num(0, 0, 0).max().item() if x.numel() else 0.0
        return size if 0 < size < 1e-100 else 1.0


def allowed(exact: Tensor, dtype: torch.dtype, rms: Tensor | None) -> float:
    finite = exact.abs().nan_to_num(0, 0, 0)
    eps = torch.finfo(dtype).eps if dtype != torch.float64 else unit(dtype)
    # Rounding to a denormal, and in fp32 exponentials under 2^-100 = 8e-31 of their row's largest, which are 0: times a
    # scale of 100.
    least = max(torch.finfo(dtype).smallest_normal * eps, 1e-300 if dtype == torch.float64 else 1e-28)
    own = 0.0 if rms is None else 2 * SPREAD * rms.max().item()
    return own + eps * finite.max().item() + least


def compare(out: Tensor, exact: Tensor, deviation: Callable[[int], Tensor]) -> float:
    """The error as a share of what is allowed: at most 1 passes.

    An error within eps max|fp64| alone passes without the draws, which are most of a case's time: as 0. One that is
    beyond what few draws allow is held against many: of a single number the root mean square of five is too low by half
    every hundredth time.
    """
    if not out.numel():
        return 0.0
    share = _share(out, exact, None)
    if share <= 1:
        return 0.0
    for draws in (DRAWS, MORE_DRAWS):
        if share <= 1 or math.isinf(share):
            break
        share = _share(out, exact, deviation(draws))
    return share


def _share(out: Tensor, exact: Tensor, rms: Tensor | None) -> float:
    worst, wide = 0.0, out.double()
    # Rows of zeros have gradients of 1e12 where a norm is divided by: apart, or nothing else would be looked at.
    large = exact.abs().reshape(len(exact), -1).amax(1) > 1e9 if exact.dim() else torch.zeros((), dtype=torch.bool)
    for chosen in (large, ~large):
        if not bool(chosen.any()):
            continue
        o, e = wide[chosen], exact[chosen]
        over = e.abs() > torch.finfo(out.dtype).max  # infinite in this dtype
        o, e = (torch.where(over, 0.0, x) for x in (o, e))
        same = (o == e) | (o.isnan() & e.isnan())
        error = torch.where(same, 0.0, (o - e).abs()).max().item()
        if not math.isfinite(error):
            return math.inf
        worst = max(worst, error / allowed(e, out.dtype, None if rms is None else rms[chosen]))
    return worst
