"""The cases of the families without a sweep: functions of tensors, differentiated by autograd on every backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..rowwise import classes, pair_logits, pairs
from .draws import Draw, Outputs, Run

Make = Callable[[Draw], Run]


def differentiated(draw: Draw, leaves: Sequence[Tensor], function: Callable[..., Tensor]) -> Run:
    """function: of the leaves and the backend's name. Upstream gradients differ from row to row, if it returns rows."""
    upstream: list[Tensor] = []

    def run(backend: str) -> Outputs:
        fresh = [x.detach().requires_grad_() for x in leaves]
        losses = function(*fresh, backend)
        if not upstream:  # made once, for all runs
            drawn = torch.rand(losses.shape, generator=draw.generator, dtype=torch.float64) + 0.5
            upstream.append(draw.vector(drawn).to(losses.dtype))
        found = torch.autograd.grad(losses, fresh, upstream[0])
        return {"losses": losses.detach(), **{f"gradient of input {i}": g for i, g in enumerate(found)}}

    return run


# Classes --------------------------------------------------------------------------------------------------------------


def _cross_entropy(draw: Draw, rows: int, columns: int, *, places: int = 0, spread: float = 3.0, **options: Any) -> Run:
    R, C = draw.size(rows), draw.length(columns)
    shape = (R, C, places) if places else (R, C)
    z = spread * draw.normal(*shape)
    target = draw.below(C, *shape[:1], *shape[2:])
    target.view(-1)[1 :: max(2, R // 3)] = -100
    if options.pop("spoilt", False):
        z[R // 2] = torch.nan
    weight = options.pop("weight", False)
    given = draw.vector(draw.normal(C).abs() + 0.1).to(draw.dtype) if weight else None
    x = draw.matrix(z) if z.dim() == 2 else draw.fixed(z.to(draw.given).to(draw.dtype))
    if options.pop("by_column", False):
        x = draw.matrix(z, "columns")
    kept, reduction = draw.fixed(target), options.pop("reduction", "none")
    if options.pop("shares", False):
        kept = draw.fixed(draw.normal(*shape).softmax(1).to(draw.given).to(draw.dtype))

    def function(x: Tensor, backend: str) -> Tensor:
        return F.cross_entropy(x, kept, given, reduction=reduction, backend=backend, **options)

    return differentiated(draw, [x], function)


def _focal_classes(draw: Draw, rows: int, columns: int) -> Run:
    R = draw.size(rows)
    x, target = draw.matrix(2 * draw.normal(R, columns)), draw.fixed(draw.below(columns, R))
    alpha = draw.vector(draw.normal(columns).abs() + 0.1)
    return differentiated(draw, [x], lambda x, b: F.focal(x, target, alpha=alpha, reduction="none", backend=b))


def _soft(draw: Draw, rows: int, columns: int, *, masked: bool) -> Run:
    R = draw.size(rows)
    x, t = (draw.matrix(3 * draw.normal(R, columns)) for _ in range(2))
    mask = torch.rand(R, columns, generator=draw.generator) < 0.6
    mask[0], mask[R // 2] = True, False
    kept = draw.fixed(mask) if masked else None
    return differentiated(draw, [x], lambda x, b: classes.soft_cross_entropy_rows(x, t, kept, b))


def _pair_logits(draw: Draw, rows: int, dim: int, columns: int, parts: tuple[str, ...], bias: bool = True) -> Run:
    B = draw.size(rows)
    u, v = (draw.matrix(draw.normal(B, dim), "anywhere") for _ in range(2))
    width = sum(pair_logits.PARTS[part] for part in parts) * dim
    w = draw.matrix(draw.normal(columns, width) / width**0.5)
    leaves = [u, v, w, *([draw.matrix(draw.normal(1, columns))[0]] if bias else [])]

    def function(u: Tensor, v: Tensor, w: Tensor, *rest: Any) -> Tensor:
        return pair_logits.pair_logits(u, v, w, rest[0] if bias else None, parts, rest[-1])

    return differentiated(draw, leaves, function)


# Pairs, lists, elements -----------------------------------------------------------------------------------------------


def _pairs(
    draw: Draw, rows: int, dim: int, kind: str, others: int = 1, layout: str = "rows", spoilt: bool = False
) -> Run:
    M, dim = draw.size(rows), draw.length(dim)
    made = [draw.normal(M, dim) for _ in range(1 + others)]
    if spoilt:
        made[0][M // 2] = torch.nan
    leaves = [draw.matrix(x, layout) for x in made]
    return differentiated(draw, leaves, lambda *args: torch.stack(pairs.columns(kind, *args[:-1], backend=args[-1]), 1))


def _lists(
    draw: Draw, queries: int, documents: int, loss: Callable[..., Tensor], masked: bool = True, **options: Any
) -> Run:
    """Returns scores that differ by more than any rounding, so that their order is the same in all precisions."""
    Q, documents = draw.size(queries), draw.length(documents)
    order = torch.rand(Q, documents, generator=draw.generator).argsort(1)
    x = draw.matrix((order - documents / 2) * (8 / max(documents, 8)) if documents < 200 else (order - 1000) / 128)
    labels = draw.fixed(draw.below(5, Q, documents))
    mask = torch.rand(Q, documents, generator=draw.generator) < 0.8
    mask[0], mask[Q // 2] = True, False
    given = draw.fixed(mask) if masked else None
    return differentiated(draw, [x], lambda x, b: loss(x, labels, mask=given, reduction="sum", backend=b, **options))


def _elements(
    draw: Draw,
    rows: int,
    columns: int,
    loss: Callable[..., Tensor],
    reduction: str = "none",
    weights: Sequence[str] = (),
    shares: bool = False,
    spoilt: bool = False,
    **options: Any,
) -> Run:
    R = draw.size(rows)
    made = 2 * draw.normal(R, columns)
    if spoilt:
        made[R // 2] = torch.nan
    x = draw.matrix(made)
    drawn = draw.normal(R, columns)
    t = draw.matrix((drawn > 0).double() if shares else drawn, exact=shares)
    options |= {name: draw.vector(draw.normal(columns).abs() + 0.1) for name in weights}
    return differentiated(draw, [x], lambda x, b: loss(x, t, reduction=reduction, backend=b, **options))


# The table ------------------------------------------------------------------------------------------------------------


def _case(function: Callable[..., Run], *shape: Any, **options: Any) -> Make:
    return functools.partial(_made, function, shape, options)


def _made(function: Callable[..., Run], shape: tuple[Any, ...], options: dict[str, Any], draw: Draw) -> Run:
    return function(draw, *shape, **options)


CASES: dict[str, dict[str, Make]] = {
    "classes": {
        "ragged": _case(_cross_entropy, 257, 391),
        "one row": _case(_cross_entropy, 1, 3),
        "4097 classes": _case(_cross_entropy, 20, 4097, reduction="mean"),
        "by column": _case(_cross_entropy, 130, 70, by_column=True),
        "places behind the classes": _case(_cross_entropy, 33, 19, places=7, weight=True, reduction="mean"),
        "logits of 1000": _case(_cross_entropy, 70, 131, spread=1000.0),
        "weights, smoothing": _case(_cross_entropy, 70, 131, weight=True, label_smoothing=0.1, reduction="mean"),
        "z loss, softcap": _case(_cross_entropy, 70, 131, z_loss=0.1, softcap=5.0),
        "shares": _case(_cross_entropy, 70, 131, shares=True, label_smoothing=0.1),
        "a row of NaN": _case(_cross_entropy, 70, 131, spoilt=True),
        "focal": _case(_focal_classes, 130, 70),
        "soft targets": _case(_soft, 130, 70, masked=False),
        "soft targets, mask": _case(_soft, 130, 391, masked=True),
    },
    "pair_logits": {
        "rep, difference": _case(_pair_logits, 257, 96, 3, ("rep", "difference")),
        "all parts": _case(_pair_logits, 131, 771, 19, ("rep", "difference", "multiplication")),
        "one row": _case(_pair_logits, 1, 3, 2, ("multiplication",), bias=False),
    },
    "pairs": {
        **{f"{kind}, ragged": _case(_pairs, 257, 96, kind) for kind in pairs.KINDS},
        **{f"{kind}, three others, 771 features": _case(_pairs, 33, 771, kind, 3, "anywhere") for kind in pairs.KINDS},
        "one row": _case(_pairs, 1, 3, "cos"),
        "4097 features, by column": _case(_pairs, 20, 4097, "cos", 2, "columns"),
        "a row of NaN": _case(_pairs, 70, 40, "euclidean", spoilt=True),
        "rows beyond 2^31 elements": _case(_pairs, 20, 72, "dot", 1, "far"),
    },
    "lists": {
        **{
            f"lambda loss, {weighting}": _case(_lists, 9, 45, F.lambda_loss, weighting=weighting)
            for weighting in ("ndcg_loss2pp", "ndcg_loss2", "ndcg_loss1", "lambda_rank", None)
        },
        "lambda loss, k": _case(_lists, 5, 131, F.lambda_loss, k=10),
        "one query": _case(_lists, 1, 5, F.lambda_loss, masked=False),
        "ranks": _case(_lists, 9, 45, F.adr_mse, alpha=2.0),
        "ranks, more than a tile": _case(_lists, 2, 70, F.adr_mse),
        "likelihood": _case(_lists, 5, 45, F.list_mle),
        "likelihood, by label": _case(_lists, 3, 70, F.list_mle, respect_input_order=False),
        "position-aware likelihood": _case(_lists, 3, 45, F.plist_mle),
        "likelihood, long lists": _case(_lists, 1, 2047, F.list_mle, masked=False),
    },
    "pointwise": {
        "squares": _case(_elements, 257, 391, F.mse, under=2.0),
        "squares, sum": _case(_elements, 70, 131, F.mse, "sum"),
        "absolute": _case(_elements, 70, 131, F.l1, over=0.5),
        "clamped, weights": _case(_elements, 257, 131, F.huber, "mean", delta=0.7),
        "binary": _case(
            _elements, 70, 131, F.binary_cross_entropy_with_logits, "sum", ("weight", "pos_weight"), shares=True
        ),
        "focal": _case(_elements, 257, 131, F.focal, "sum", shares=True, alpha=0.25),
        "one element": _case(_elements, 1, 1, F.mse, "mean"),
        "a row of NaN": _case(_elements, 70, 131, F.mse, spoilt=True),
    },
}
