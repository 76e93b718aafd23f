"""Rows of one matrix against the same rows of others, and mined pairs: nothing of M x D is kept or copied.

Pair, triplet and distillation losses are built on `scores`. It saves its inputs and a few numbers a row, and its
backward reads the inputs again: a normalised copy, or a difference, would cost another M x D of memory and a write.

`of_pairs` is for pairs found by a sweep (the hardest positive, the hardest negative). Their scores are computed again
here, where the gradient has two rows and is no matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import FEW, few, select_rowwise
from ..backends.triton import pairs as triton_pairs
from ..core.numerics import NORM_EPS, savable, slices, stats_dtype
from .pointwise import transformed

# Elements of a block. On a CPU each call wakes the other threads: blocks of 2^18 elements took up to 1.3 times as long
# as these of 4 MiB. On a GPU this only bounds the fp32 copies of 16-bit inputs.
BLOCK = {"cpu": 1 << 20, "cuda": 1 << 24}


# The formulas: what `backend="reference"` runs ------------------------------------------------------------------------


def dot(x: Tensor, y: Tensor, eps: float = 0.0) -> Tensor:
    return (x * y).sum(1)


def cosine(x: Tensor, y: Tensor, eps: float = NORM_EPS) -> Tensor:
    return dot(x, y) / (_length(x, eps) * _length(y, eps))


def angle(x: Tensor, y: Tensor, eps: float = NORM_EPS) -> Tensor:
    """AnglE's: rows as complex numbers (dims i and i + ceil(D / 2) of unit rows); |Re + Im| of the sum of x conj(y)."""
    half, rest = (x.shape[1] + 1) // 2, x.shape[1] // 2
    imaginary = dot(x[:, half:], y[:, :rest]) - dot(x[:, :rest], y[:, half:])
    return ((dot(x, y) + imaginary) / (_length(x, eps) * _length(y, eps))).abs()


def squared_distance(x: Tensor, y: Tensor, eps: float = 0.0) -> Tensor:
    return torch.nn.functional.mse_loss(x + eps if eps else x, y, reduction="none").sum(1)


def euclidean_distance(x: Tensor, y: Tensor, eps: float = 0.0) -> Tensor:
    """The gradient at distance 0 is 0 instead of infinity; second derivatives there are NaN, as in torch."""
    return torch.linalg.vector_norm(_difference(x, y, eps), dim=1)


def distance_of_mined(x: Tensor, y: Tensor) -> Tensor:
    """At distance 0, as between a row and itself, second derivatives are 0 as well."""
    squared = squared_distance(x, y)
    zero = squared == 0
    return squared.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def manhattan_distance(x: Tensor, y: Tensor, eps: float = 0.0) -> Tensor:
    return _difference(x, y, eps).abs().sum(1)


def _difference(x: Tensor, y: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    difference = torch.sub(x, y, out=out)
    return difference.add_(eps) if eps else difference


def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    return 1 - cosine(x, y)


def _length(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1).clamp_min(eps)


class Kind(NamedTuple):
    formula: Callable[[Tensor, Tensor, float], Tensor]
    eps: float  # the default of `scores`
    cosine: bool = False  # divides rows by their norms


KINDS = {
    "dot": Kind(dot, 0.0),
    "cos": Kind(cosine, NORM_EPS, cosine=True),
    "angle": Kind(angle, NORM_EPS, cosine=True),
    "euclidean": Kind(euclidean_distance, 0.0),
    "squared": Kind(squared_distance, 0.0),
    "manhattan": Kind(manhattan_distance, 0.0),
}
DISTANCES = {"euclidean": distance_of_mined, "squared": squared_distance, "cosine": cosine_distance}


# Rows against the same rows of others ---------------------------------------------------------------------------------


def scores(kind: str, query: Tensor, *others: Tensor, eps: float | None = None, backend: str = "auto") -> Tensor:
    """Returns `[M, K]`, the columns of `columns` stacked."""
    found = columns(kind, query, *others, eps=eps, backend=backend)
    return found[0][:, None] if len(found) == 1 else torch.stack(found, dim=1)


def columns(
    kind: str, query: Tensor, *others: Tensor, eps: float | None = None, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """Returns K scores `[M]`: each row of `query` [M, D] with the same row of the K others; fp32, fp64 for fp64
    queries.

    kind: "dot"; "cos" and "angle" (AnglE's), of rows divided by `max(|row|, eps)`; "euclidean", "squared" and
        "manhattan", of the difference plus `eps`, as in torch.nn.functional.pairwise_distance.
    eps: by default 1e-12 for cosines (torch.nn.functional.normalize's; cosine_similarity's is 1e-8), 0 for distances.
    """
    if eps is None:
        eps = KINDS[kind].eps
    if few(backend, query, _family(kind)) and not _made_in_inference(query, *others):
        return _formula(kind, eps, query, others)
    name = select_rowwise(backend, query, "pairs")
    query, others = savable(query), tuple(map(savable, others))
    if name == "reference" or transformed() or (name == "chunked" and _plain(kind, query, others)):
        return _formula(kind, eps, query, others)
    found: tuple[Tensor, ...] = _Scores.apply(kind, eps, name, query, *others).unbind(1)
    return found


def _family(kind: str) -> str:
    return "cosines" if KINDS[kind].cosine else "pairs"


def _made_in_inference(*tensors: Tensor) -> bool:
    return any([x.is_inference() for x in tensors])


def _plain(kind: str, query: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether the formula is as good: it makes no fp32 copies, and the batch is small or only inputs are kept."""
    inputs_only = kind in ("dot", "squared") and len(others) == 1
    wide = stats_dtype(query.dtype)
    return (inputs_only or query.numel() <= FEW[_family(kind)]) and all(x.dtype == wide for x in (query, *others))


def _formula(kind: str, eps: float, query: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, ...]:
    dtype, formula = stats_dtype(query.dtype), KINDS[kind].formula
    query = query if query.dtype is dtype else query.to(dtype)
    return tuple([formula(query, x if x.dtype is dtype else x.to(dtype), eps) for x in others])


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: str, eps: float, backend: str, query: Tensor, *others: Tensor) -> Tensor:
        forward = triton_pairs.forward if backend == "triton" else _forward
        value, norm = forward(kind, eps, query, others)
        ctx.kind, ctx.eps, ctx.backend, ctx.others = kind, eps, backend, len(others)
        kept = (value,) if kind == "euclidean" else () if norm is None else (value, norm)
        ctx.save_for_backward(query, *others, *kept)
        return value.abs().T if kind == "angle" else value.T

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[3:]
        matrices, (value, norm) = saved[: 1 + ctx.others], (*saved[1 + ctx.others :], None, None)[:2]
        if not torch.is_grad_enabled():
            backward = triton_pairs.backward if ctx.backend == "triton" else _backward
            return None, None, None, *backward(ctx.kind, ctx.eps, upstream, matrices, value, norm, wanted)
        # create_graph=True: the formula, which autograd can differentiate again.
        with torch.enable_grad():
            # Views, in case several are one tensor: otherwise each would get the gradient of all.
            query, *others = (x.view_as(x) for x in matrices)
            inputs = [x for x, want in zip((query, *others), wanted, strict=True) if want]
            values = torch.stack(_formula(ctx.kind, ctx.eps, query, others), dim=1)
            found = iter(torch.autograd.grad(values, inputs, upstream, create_graph=True))
        return None, None, None, *(next(found) if want else None for want in wanted)


def _blocks(x: Tensor) -> Iterator[slice | None]:
    """Yields blocks of rows; None: all rows, which saves the slicing of a small batch."""
    rows = max(1, BLOCK.get(x.device.type, BLOCK["cuda"]) // x.shape[1])
    if x.shape[0] <= rows:
        yield None
    else:
        yield from slices(x.shape[0], rows)


def _rows(x: Tensor, rows: slice | None) -> Tensor:
    return x if rows is None else x[rows]


def _forward(kind: str, eps: float, query: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Returns scores [K, M] (with AnglE's sign), and for cosines the norms [1 + K, M]."""
    dtype, M = stats_dtype(query.dtype), query.shape[0]
    value = query.new_empty((len(others), M), dtype=dtype)
    norm = query.new_empty((1 + len(others), M), dtype=dtype) if KINDS[kind].cosine else None
    for rows in _blocks(query):
        x = _rows(query, rows).to(dtype)
        room = torch.empty(x.shape, dtype=dtype, device=x.device)
        if norm is not None:
            torch.linalg.vector_norm(x, dim=1, out=_rows(norm[0], rows))
        for k, other in enumerate(others):
            y, out = _rows(other, rows).to(dtype), _rows(value[k], rows)
            if norm is not None:
                torch.linalg.vector_norm(y, dim=1, out=_rows(norm[k + 1], rows))
            if norm is not None or kind == "dot":
                torch.mul(x, y, out=room)
                if kind == "angle":
                    half, rest = (x.shape[1] + 1) // 2, x.shape[1] // 2
                    room[:, half:].addcmul_(x[:, half:], y[:, :rest])
                    room[:, :rest].addcmul_(x[:, :rest], y[:, half:], value=-1)
                torch.sum(room, 1, out=out)
                continue
            _difference(x, y, eps, room)
            if kind == "manhattan":
                torch.sum(room.abs_(), 1, out=out)
            else:
                torch.linalg.vector_norm(room, dim=1, out=out)
    if kind == "squared":
        value.square_()
    if norm is not None:
        for x, length in zip((query, *others), norm, strict=True):
            if x.dtype == torch.float16:
                length.masked_fill_(length == 0, 1)  # the gradient's 1 / eps would overflow fp16; the score is 0 anyway
        factor = norm.clamp_min(eps).reciprocal_()
        value.mul_(factor[0]).mul_(factor[1:])
    return value, norm


def _backward(
    kind: str,
    eps: float,
    upstream: Tensor,  # [M, K]
    matrices: Sequence[Tensor],
    value: Tensor | None,
    norm: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    dtype = stats_dtype(matrices[0].dtype)
    gradients = [torch.empty_like(x) if want else None for x, want in zip(matrices, wanted, strict=True)]
    weight, own = _factors(kind, eps, upstream.T.to(dtype), value, norm)
    of_products = own is not None or kind == "dot"
    for rows in _blocks(matrices[0]):
        x, *ys = (_rows(matrix, rows).to(dtype) for matrix in matrices)
        # A gradient is written to its tensor, or to fp32 before it is rounded.
        outs = [out if out is None else _rows(out, rows) for out in gradients]
        dx, *dys = (out if out is None or out.dtype == dtype else torch.empty_like(x) for out in outs)
        for k, (y, dy) in enumerate(zip(ys, dys, strict=True)):
            by = _rows(weight[k], rows)[:, None]
            if of_products:
                turn = int(kind == "angle")
                if dx is not None:
                    _times(by, y, dx, add=k > 0, turn=turn)
                if dy is not None:
                    _times(by, x, dy, turn=-turn)
            else:
                _times_difference(kind, eps, by, x, y, dx, dy, add=k > 0)
            if own is not None and dy is not None:
                dy.addcmul_(y, _rows(own[k + 1], rows)[:, None])
        if own is not None and dx is not None:
            dx.addcmul_(x, _rows(own[0], rows)[:, None])
        for out, found in zip(outs, (dx, *dys), strict=True):
            if out is not None and found is not None and found is not out:
                out.copy_(found)
    return gradients


def _factors(
    kind: str, eps: float, upstream: Tensor, value: Tensor | None, norm: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns factors [K, M] of the other side, or of the difference, and [1 + K, M] of each row itself, or None."""
    if norm is not None and value is not None:
        weight = upstream * value.sign() if kind == "angle" else upstream
        factor = norm.clamp_min(eps).reciprocal_()
        along = weight * value
        # Through the norms: -<dx, x> / |x|^2 times x itself; 0 if eps replaced the norm.
        own = torch.cat([along.sum(0, keepdim=True), along]).neg_() * factor.square().masked_fill_(norm < eps, 0)
        return weight * factor[0] * factor[1:], own
    if kind == "squared":
        return 2 * upstream, None
    if kind == "euclidean" and value is not None:
        return (upstream / value).masked_fill_(value == 0, 0), None
    return upstream, None


def _times(weight: Tensor, y: Tensor, out: Tensor, add: bool = False, turn: int = 0) -> None:
    """Writes `out = weight y`, or `out += weight y`; turn: for AnglE, y plus (+1) or minus (-1) the complex i y."""
    if add:
        out.addcmul_(y, weight)
    else:
        torch.mul(y, weight, out=out)
    if turn:
        half, rest = (y.shape[1] + 1) // 2, y.shape[1] // 2
        out[:, half:].addcmul_(y[:, :rest], weight, value=turn)
        out[:, :rest].addcmul_(y[:, half:], weight, value=-turn)


def _times_difference(
    kind: str, eps: float, weight: Tensor, x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None, add: bool
) -> None:
    """Writes `dx = weight d` (or adds it) and `dy = -weight d`, where d = x - y + eps, or its sign."""
    if dx is None and dy is None:
        return
    # The difference stands where one of them is to be: no third matrix.
    difference = dx if dx is not None and not add else dy if dy is not None else torch.empty_like(x)
    _difference(x, y, eps, difference)
    if kind == "manhattan":
        difference.sign_()
    difference.mul_(weight)
    if dx is not None and difference is not dx:
        dx.add_(difference)
    if dy is not None:
        torch.neg(difference, out=dy)


# Mined pairs ----------------------------------------------------------------------------------------------------------


def of_pairs(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, column: Tensor, row: Tensor | None = None
) -> Tensor:
    """Returns `function(x_i, y_column_i)` for each row i, `[M]`, fp32 or fp64; 0 if `column_i` is -1.

    row: int64, as long as `column`: `function(x_row_k, y_column_k)` for each k instead.
    """
    none = column < 0
    x, y, column, row = savable(x), savable(y), column.clamp(min=0), None if row is None else savable(row)
    # The compiler fuses the formula, but would unroll a loop over chunks. In 16 bits gradients would be rounded twice.
    plain = x.is_cpu and x.dtype.itemsize > 2 and column.numel() * x.shape[1] <= FEW["cosines"]
    if plain or transformed():
        values = function(*_wide(x if row is None else x[row], y[column]))
    else:
        values = _OfPairs.apply(function, x, y, column, row)
    return values.masked_fill(none, 0)


def _some_pairs(x: Tensor, column: Tensor) -> Iterator[slice]:
    """Returns the number of pairs whose matrix takes 1 MiB in fp32: some eight are alive in the backward."""
    rows = max(1, (1 << 18) // x.shape[1])
    return slices(len(column), rows)


def _at(x: Tensor, row: Tensor | None, chunk: slice = slice(None)) -> Tensor:
    return x[chunk] if row is None else x[row[chunk]]


def _wide(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dtype = stats_dtype(x.dtype)
    return x.to(dtype), y.to(dtype)


class _OfPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        column: Tensor,
        row: Tensor | None,
    ) -> Tensor:
        ctx.function, ctx.same = function, x is y
        ctx.save_for_backward(x, y, column, row)
        parts = [function(*_wide(_at(x, row, chunk), y[column[chunk]])) for chunk in _some_pairs(x, column)]
        return torch.cat(parts) if parts else x.new_empty(0, dtype=stats_dtype(x.dtype))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        x, y, column, row = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: once more, as a formula
            with torch.enable_grad():
                # Views, in case both are one tensor: otherwise each would get the gradient of both.
                x, y = x.view_as(x), y.view_as(y)
                values = ctx.function(*_wide(_at(x, row), y[column]))
                inputs = [t for t, want in zip((x, y), ctx.needs_input_grad[1:3], strict=True) if want]
                found = iter(torch.autograd.grad(values, inputs, upstream, create_graph=True))
            return (None, *(next(found) if want else None for want in ctx.needs_input_grad[1:3]), None, None)
        dtype = stats_dtype(x.dtype)
        dx = torch.zeros_like(x, dtype=dtype) if ctx.needs_input_grad[1] else None
        # One tensor on both sides has one gradient, which is written once instead of added up from two.
        dy = None if not ctx.needs_input_grad[2] else dx if ctx.same else torch.zeros_like(y, dtype=dtype)
        for chunk in _some_pairs(x, column):
            with torch.enable_grad():
                own, other = (t.detach().requires_grad_() for t in _wide(_at(x, row, chunk), y[column[chunk]]))
                values = ctx.function(own, other)
            by_own, by_other = torch.autograd.grad(values, (own, other), upstream[chunk])
            if dx is not None and row is None:
                dx[chunk] += by_own
            elif dx is not None:
                dx.index_add_(0, row[chunk], by_own)
            if dy is not None:
                dy.index_add_(0, column[chunk], by_other)
        by_y = None if dy is None or ctx.same else dy.to(y.dtype)
        return None, None if dx is None else dx.to(x.dtype), by_y, None, None
