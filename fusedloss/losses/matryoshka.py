"""Matryoshka representation learning: the same loss of several prefixes of the embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..backends import BACKENDS, select
from ..core import checks
from ..core.problem import Block, Problem
from ._options import FIELDS, Call, ranks
from ._softmax import distinct, mean_of
from .clip import clip, clip_problem
from .gist import gist_embed, gist_embed_problem
from .info_nce import info_nce, info_nce_problem
from .multiple_negatives_ranking import multiple_negatives_ranking, multiple_negatives_ranking_problems
from .nt_xent import nt_xent, nt_xent_problem

# Losses whose prefixes share one similarity product.
PROBLEMS: dict[Callable[..., Any], Callable[..., Problem | list[Problem]]] = {
    clip: clip_problem,
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

    `info_nce`, `clip`, `multiple_negatives_ranking`, `gist_embed` and `nt_xent` take one pass: prefixes accumulate
    along the features, so that all of them share one similarity product and one product for each gradient, the work of
    the longest prefix alone. Any other loss, label smoothing, `masks.score_margin`, hardness, and the triton backend
    take one pass for each prefix, with the same result.

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
        ValueError, TypeError: dims or weights that do not fit, and what the loss raises.

    Example:
        >>> fusedloss.matryoshka(fusedloss.info_nce, query, key, dims=(768, 256, 64), temperature=0.05).backward()
    """
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
    if loss in PROBLEMS and loss_options.get("group") is None:
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
        parts = [part for one in problems for part in _one_directional(one, dims, weights)]
        if all(_at_once(part, call) for part in parts):
            return mean_of(parts, call)
    total = None
    anchors = loss_options.get("anchors") if loss is multiple_negatives_ranking else None
    operands, places = distinct(*embeddings, *([] if anchors is None else [anchors]))
    for dim, weight in zip(dims, weights, strict=True):
        prefixes = [F.normalize(x[:, :dim].float() if _narrow(x) else x[:, :dim], dim=1) for x in operands]
        cut = [prefixes[place] for place in places]
        if anchors is not None:
            loss_options["anchors"] = cut.pop()
        value = weight * loss(*cut, **loss_options)
        total = value if total is None else total + value
    assert total is not None
    return total


def _narrow(x: Tensor) -> bool:
    """Unit vectors are not rounded to 16 bits."""
    return x.element_size() == 2


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


def _one_directional(problem: Problem, dims: tuple[int, ...], weights: Sequence[float]) -> list[Problem]:
    """Splits a symmetric loss into both directions, because each has its own normaliser for every prefix."""
    prefixed = replace(
        problem,
        cosine=True,
        symmetric=False,
        scale_bound=None,
        prefixes=dims,
        prefix_weights=tuple(float(weight) for weight in weights),
    )
    if not problem.symmetric:
        return [prefixed]
    (block,) = prefixed.blocks
    back = replace(prefixed, blocks=(Block(block.key, block.query, mask=block.mask.turned()),))
    return [prefixed, back]


def _at_once(problem: Problem, call: Call) -> bool:
    """Whether the backend that would run this sums all prefixes in one sweep."""
    if problem.transform is not None or any(problem.margin) or not problem.bias_on_target or problem.bends:
        return False
    plain = not (problem.label_smoothing or any(b.mask.margin is not None for b in problem.blocks))
    if not plain or any(b.penalty or b.own_penalty for b in problem.blocks):
        return False
    alone = replace(problem, prefixes=(), prefix_weights=())
    return _can_run(problem, select(alone, call.backend))


def _can_run(problem: Problem, backend: str) -> bool:
    return BACKENDS[backend].why_not(problem) is None
