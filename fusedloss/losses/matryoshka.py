"""Matryoshka representation learning: the same loss of several prefixes of the embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from ..backends import sums_prefixes
from ..core import checks
from ..core.problem import Problem
from ..distributed import Request, alike, loss_across
from ._options import FIELDS, Call, name_of, ranks, world_of_calls
from ._softmax import both_ways, distinct, mean_of
from .clip import clip, clip_problems, with_bias
from .gist import gist_embed, gist_embed_problem
from .info_nce import info_nce, info_nce_problem
from .multiple_negatives_ranking import multiple_negatives_ranking, multiple_negatives_ranking_problems
from .nt_xent import nt_xent, nt_xent_problem

# Losses whose prefixes share one similarity product.
PROBLEMS: dict[Callable[..., Any], Callable[..., Problem | list[Problem]]] = {
    clip: clip_problems,
    gist_embed: gist_embed_problem,
    info_nce: info_nce_problem,
    multiple_negatives_ranking: multiple_negatives_ranking_problems,
    nt_xent: nt_xent_problem,
}
KEYWORDS = {loss: checks.keywords(loss) for loss in PROBLEMS}
# Defaults of the options that only this loss has.
DEFAULTS = {
    loss: {
        p.name: p.default
        for p in inspect.signature(loss).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.default is not p.empty and p.name in inspect.signature(problem).parameters
    }
    for loss, problem in PROBLEMS.items()
}


def matryoshka(
    loss: Callable[..., Tensor],
    /,
    *embeddings: Tensor,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    **loss_options: Any,
) -> Tensor:
    """Matryoshka loss (Kusupati et al. 2022) as in sentence-transformers: a weighted sum over nested prefixes.

        total = sum_k weights_k * loss(*(x[:, :dims_k] / |x[:, :dims_k]| for x in embeddings), **loss_options)

    `info_nce`, `clip`, `multiple_negatives_ranking`, `gist_embed` and `nt_xent` read the embeddings as they are. On the
    `chunked` backend prefixes accumulate along the features, so that all of them share one similarity product and one
    product for each gradient, the work of the longest prefix alone. The kernels sweep once for each prefix. Any other
    loss, label smoothing, `masks.score_margin`, hardness and a transform take one pass for each prefix, normalised in
    fp32 if the embeddings have 16 bits. The result is the same.

    With `group=`, these five exchange the columns of the longest prefix once for all prefixes. "ring" then takes one
    pass for each prefix at every shard. Any other loss exchanges its own columns for each prefix. Dims and weights must
    be those of the other ranks.

    Args:
        loss: one of this package's functions, or any callable of embeddings.
        embeddings: what the loss takes first, each `[rows, D]`.
        dims: distinct numbers from 1 to D, in any order.
        weights: one for each of dims; None is 1 each.
        loss_options: given to the loss as they are (a guide's embeddings are not cut), except that `anchors` of
            `multiple_negatives_ranking` are embeddings, too.

    Returns:
        What the loss returns: a 0-dim tensor, or rows under `reduction="none"`.

    Raises:
        ValueError, TypeError: dims or weights that do not fit, and what the loss raises. With `group=`, on all ranks.

    Example:
        >>> fusedloss.matryoshka(fusedloss.info_nce, query, key, dims=(768, 256, 64), temperature=0.05).backward()
    """

    def plan() -> _Plan:
        return _checked(loss, embeddings, dims, weights, loss_options)

    world = world_of_calls(loss, loss_options)
    if world is not None and loss in PROBLEMS:
        across = loss_across(world, lambda: _request(loss, embeddings, plan(), loss_options))
        return with_bias(across, loss_options.get("logit_bias"))
    if world is not None:
        alike(world, lambda: "\n".join([f"matryoshka of {name_of(loss)}", *plan().said()]))
    found = plan()
    if loss in PROBLEMS and world is None:
        parts, call = _parts(loss, embeddings, found, loss_options)
        if all(sums_prefixes(part, call.backend) for part in parts):
            return with_bias(mean_of(parts, call), loss_options.get("logit_bias"))
    total = None
    anchors = loss_options.get("anchors") if loss is multiple_negatives_ranking else None
    operands, places = distinct(*embeddings, *([] if anchors is None else [anchors]))
    for dim, weight in zip(found.dims, found.weights, strict=True):
        prefixes = [F.normalize(x[:, :dim].float() if _narrow(x) else x[:, :dim], dim=1) for x in operands]
        cut = [prefixes[place] for place in places]
        if anchors is not None:
            loss_options["anchors"] = cut.pop()
        value = weight * loss(*cut, **loss_options)
        total = value if total is None else total + value
    assert total is not None
    return total


class _Plan(NamedTuple):
    dims: tuple[int, ...]
    weights: tuple[float, ...]

    def said(self) -> list[str]:
        """Returns what ranks must have in common, a line each."""
        return [f"dims {self.dims}", f"weights {self.weights}"]


def _narrow(x: Tensor) -> bool:
    """Unit vectors are not rounded to 16 bits."""
    return x.element_size() == 2


def _checked(
    loss: Callable[..., Tensor],
    embeddings: Sequence[Tensor],
    dims: Sequence[int],
    weights: Sequence[float] | None,
    loss_options: dict[str, Any],
) -> _Plan:
    checks.function("loss", loss, "fusedloss.info_nce")
    if not embeddings:
        raise ValueError("embeddings must hold the tensors that the loss takes, got none")
    checks.embeddings(**{f"embeddings[{i}]": x for i, x in enumerate(embeddings)})
    dims = _checked_dims(dims, embeddings[0].shape[1])
    if weights is not None:
        checks.sequence("weights", weights, "numbers", str((1.0,) * len(dims)))
    weights = [1.0] * len(dims) if weights is None else list(weights)
    if len(weights) != len(dims):
        raise ValueError(f"weights must hold {len(dims)} numbers, one for each of dims, got {len(weights)}")
    for i, weight in enumerate(weights):
        checks.number(f"weights[{i}]", weight)
    if loss_options.get("return_stats"):
        raise ValueError(
            "return_stats must be False, got True; statistics differ per prefix: call the loss itself on one prefix"
        )
    for name in ("negatives", "negatives_mask", "bank"):
        if loss is info_nce and loss_options.get(name) is not None:
            raise ValueError(
                f"{name} must not be given with info_nce under matryoshka, got it; pass it to "
                "multiple_negatives_ranking as columns"
            )
    return _Plan(dims, tuple(float(weight) for weight in weights))


def _parts(
    loss: Callable[..., Tensor], embeddings: Sequence[Tensor], plan: _Plan, loss_options: dict[str, Any]
) -> tuple[list[Problem], Call]:
    """Returns the problems of all prefixes whose mean the loss is, one for each direction, and its call."""
    absent = () if loss is not info_nce else ("negatives", "negatives_mask")
    options = {n: x for n, x in loss_options.items() if x is not None or n not in ("group", *absent)}
    for name in options:
        if name not in KEYWORDS[loss]:
            raise TypeError(checks.unexpected(loss.__name__, name, options[name], inspect.signature(loss)))
    shared: Any = {name: options.pop(name) for name in FIELDS if name in options}
    ranks(shared)
    call = Call(**shared)
    built = PROBLEMS[loss](*embeddings, **(DEFAULTS[loss] | options), call=call)
    problems = built if isinstance(built, list) else [built]
    # Each direction has its own normaliser for every prefix.
    return [_of_prefixes(part, plan) for one in problems for part in both_ways(one)], call


def _of_prefixes(problem: Problem, plan: _Plan) -> Problem:
    return replace(problem, cosine=True, prefixes=plan.dims, prefix_weights=plan.weights)


def _request(
    loss: Callable[..., Tensor], embeddings: Sequence[Tensor], plan: _Plan, loss_options: dict[str, Any]
) -> Request:
    """Returns the call as ranks agree on it; the columns that they exchange are the longest prefix's."""
    parts, call = _parts(loss, embeddings, plan, loss_options)
    longest = max(plan.dims)
    parts = [replace(part, operands=tuple(x[:, :longest] for x in part.operands)) for part in parts]
    ignored = loss_options.get("ignore_index", -100) if loss_options.get("target") is not None else None
    return call.request(f"matryoshka of {loss.__name__}", *parts, ignore_index=ignored)


def _checked_dims(dims: Sequence[int], D: int) -> tuple[int, ...]:
    checks.sequence("dims", dims, "numbers from 1 to D", "(768, 256)")
    if not len(dims):
        raise ValueError("dims must hold at least one number, got none")
    for dim in dims:
        checks.index("dims", dim)
        if not 1 <= dim <= D:
            raise ValueError(f"dims must be numbers from 1 to D = {D}, got {dim}")
    if len(set(dims)) != len(dims):
        raise ValueError(f"dims must be distinct numbers, got {tuple(dims)}")
    return tuple(int(dim) for dim in dims)
