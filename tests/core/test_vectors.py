"""Vectors and rows of any layout: every tensor of every loss, strided, expanded, overlapping and at odd offsets.

Kernels take addresses: a vector that is read beside its stride gives another number, or what lies behind its storage.
What is arranged here stands among numbers of its own kind, so that such a read is wrong and not a crash.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fusedloss
from fusedloss import functional as F
from fusedloss import masks
from fusedloss.backends import cuda
from fusedloss.backends import triton as triton_backend
from fusedloss.backends.cuda import launching
from fusedloss.backends.shared import check_vector
from fusedloss.core.mask import Compare, Mask
from fusedloss.core.problem import Block, Fold, Problem

M, N, D, K = 6, 7, 8, 3
INTEGERS = (torch.int64,)
BOOLS = (torch.bool,)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REAL = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


class Case(NamedTuple):
    """A call of `function` with its tensors by name; those of `learnt` and the floating `rows` have gradients."""

    function: Callable[..., Any]
    rows: Mapping[str, Tensor]
    vectors: Mapping[str, tuple[Tensor, Sequence[torch.dtype]]] = {}  # and what dtypes they may have
    options: Mapping[str, Any] = {}
    learnt: Sequence[str] = ()
    call: Callable[..., Any] | None = None  # of the tensors and options by name, where that is not `function`
    sweep: bool = True  # whether it has a similarity matrix, which is what "cuda" has kernels for
    also: Sequence[str] = ()  # arguments of `function` that the tensors are made into
    backend: bool = True  # whether it has one
    own_dtypes: bool = False  # whether kernels read vectors in their own dtype: elsewhere torch converts them before
    sums: bool = False  # whether torch sums a vector, in another order for another layout


GENERATOR = torch.Generator().manual_seed(7)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, generator=GENERATOR) + 0.25


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=GENERATOR)


def one(value: float) -> tuple[Tensor, Sequence[torch.dtype]]:
    """A number as a tensor of one element."""
    return torch.tensor([value]), FLOATS


def may(*shape: int) -> tuple[Tensor, Sequence[torch.dtype]]:
    return torch.rand(shape, generator=GENERATOR) < 0.6, BOOLS


def embeddings(*names: str, rows: int = M) -> dict[str, Tensor]:
    return {name: normal(rows, D) for name in names}


LABELS = {"labels": (torch.tensor([0, 1, 1, 2, 0, 1]), INTEGERS)}
CLASSES = {"target": (integers(K, M), INTEGERS)}
PAIR = embeddings("a", "b")
TRIPLET = embeddings("query", "positive", "first", "second")
QUERIES = {"query": normal(M, D), "key": normal(N, D)}
FEATURES = embeddings("image_features", "text_features")
SCORES = {"scores": normal(4, 5)}
RELEVANCE = {"labels": (integers(2, 4, 5), REAL), "mask": may(4, 5)}


def with_masks(
    query: Tensor,
    key: Tensor,
    guide_query: Tensor,
    guide_key: Tensor,
    row_ids: Tensor,
    key_ids: Tensor,
    row_groups: Tensor,
    key_groups: Tensor,
    exempt: Tensor,
    dense: Tensor,
    **options: Any,
) -> Tensor:
    mask = masks.same_id(row_ids, key_ids) & masks.same_group(row_groups, key_groups) & dense
    mask = mask & masks.score_margin(0.1, exempt) & masks.guide(guide_query, guide_key, margin=-0.1)
    return F.info_nce(query, key, mask=mask, **options)


def by_ids(function: Callable[..., Any], name: str) -> Callable[..., Tensor]:
    def call(row_ids: Tensor, key_ids: Tensor, **given: Any) -> Tensor:
        return function(**given, **{name: masks.same_id(row_ids, key_ids)})

    return call


def behind(function: Callable[..., Any], *names: str, first: Sequence[str] = ("query", "positive")) -> Callable:
    """With the tensors of `names` as what stands behind the first ones."""

    def call(**given: Any) -> Tensor:
        others = [given.pop(name) for name in names]
        return function(*(given.pop(name) for name in first), *others, **given)

    return call


def lists_of(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Lists of lengths 5, 4, 3 and 2, each a row's beginning."""

    def call(scores: Tensor, labels: Tensor, **options: Any) -> Tensor:
        parts = [[x[i, : 5 - i] for i in range(4)] for x in (scores, labels)]
        return function(*parts, **options)

    return call


def rank_weight(mask: Tensor) -> Tensor:
    return mask.double() * torch.arange(1, mask.shape[1] + 1)


def gists(anchor: Tensor, positive: Tensor, negative: Tensor, **given: Any) -> Tensor:
    guide = [given.pop(f"guide_{name}") for name in ("anchor", "positive", "negative")]
    return F.gist_embed(anchor, positive, negative, guide=guide, **given)


def with_text_ids(call: Callable[..., Tensor], *names: str) -> Callable[..., Tensor]:
    """With the tensors of `names` as `ids`."""
    return lambda **given: call(**given | {"ids": [given.pop(name) for name in names]})


CASES = {
    "info_nce": Case(
        F.info_nce,
        QUERIES,
        {
            "target": (integers(N, M), INTEGERS),
            "temperature": one(0.5),
            "key_bias": (normal(N), FLOATS),
            "weight": (uniform(M), FLOATS),
        },
        learnt=("temperature", "key_bias"),
    ),
    "info_nce, known bound": Case(F.info_nce, QUERIES, {"weight": (uniform(M), FLOATS)}, {"normalize": True}),
    "info_nce, statistics": Case(
        F.info_nce,
        QUERIES,
        {"weight": (uniform(M), FLOATS)},
        {"return_stats": True, "temperature": 0.5},
        call=lambda **given: sum(x for x in [F.info_nce(**given)[0], *F.info_nce(**given)[1]]),
    ),
    "info_nce, rows": Case(
        F.info_nce,
        QUERIES,
        {"weight": (uniform(M), FLOATS), "target": (integers(N, M), INTEGERS)},
        {"reduction": "none", "temperature": 0.5},
        call=lambda **given: (F.info_nce(**given) * torch.arange(1.0, M + 1)).sum(),
    ),
    "info_nce, bank": Case(
        F.info_nce,
        {**QUERIES, "bank": normal(K, D), "negatives": normal(M, 2, D)},
        {"key_bias": (normal(N + K), FLOATS), "mask": may(M, N + K), "negatives_mask": may(M, 2)},
        {"temperature": 0.5},
        ("key_bias",),
    ),
    "info_nce, a teacher": Case(
        F.info_nce,
        {**QUERIES, "negatives": torch.cos(torch.arange(float(M * 2 * D))).reshape(M, 2, D)},
        {"teacher_scores": (torch.sin(torch.arange(float(3 * M))).reshape(M, 3), FLOATS), "negatives_mask": may(M, 2)},
        {"temperature": 0.5},
    ),
    "info_nce, masks": Case(
        F.info_nce,
        {**QUERIES, "guide_query": normal(M, 4), "guide_key": normal(N, 4)},
        {
            "row_ids": (integers(4, M), INTEGERS),
            "key_ids": (integers(4, N), INTEGERS),
            "row_groups": (integers(2, M), INTEGERS),
            "key_groups": (integers(2, N), INTEGERS),
            "exempt": (integers(N, M, 2), INTEGERS),
            "dense": may(M, N),
        },
        {"temperature": 0.5},
        call=with_masks,
        also=("mask",),
    ),
    "clip": Case(
        F.clip,
        FEATURES,
        {"logit_scale": one(2.0), "logit_bias": one(-1.0), "mask": may(M, M)},
        learnt=("logit_scale", "logit_bias"),
    ),
    "clip, ids": Case(
        F.clip,
        FEATURES,
        {"row_ids": (integers(4, M), INTEGERS), "key_ids": (integers(4, M), INTEGERS)},
        {"logit_scale": 2.0, "normalize": True},
        call=by_ids(F.clip, "mask"),
        also=("mask",),
    ),
    "siglip": Case(
        F.siglip,
        FEATURES,
        {"target": (integers(M, M), INTEGERS), "logit_scale": one(2.0), "logit_bias": one(-1.0)},
        learnt=("logit_scale", "logit_bias"),
    ),
    "siglip, ids": Case(
        F.siglip,
        FEATURES,
        {"row_ids": (integers(4, M), INTEGERS), "key_ids": (integers(4, M), INTEGERS)},
        {"logit_scale": 2.0},
        call=by_ids(F.siglip, "target"),
        also=("target",),
    ),
    "clip_distill": Case(
        F.clip_distill,
        {**FEATURES, **embeddings("teacher_image_features", "teacher_text_features")},
        {"logit_scale": one(2.0), "teacher_logit_scale": one(3.0)},
        learnt=("logit_scale",),
    ),
    "info_nce_distill": Case(
        F.info_nce_distill,
        {
            **embeddings("query", "key", "teacher_query", "teacher_key", "bank", "teacher_bank"),
            "negatives": normal(M, K, D),
            "teacher_negatives": normal(M, K, D),
        },
        {
            "temperature": one(0.5),
            "teacher_temperature": one(0.5),
            "mask": may(M, 2 * M),
            "negatives_mask": may(M, K),
        },
        learnt=("temperature",),
    ),
    "multiple_negatives_ranking": Case(
        F.multiple_negatives_ranking,
        TRIPLET,
        {"scale": one(3.0), "mask": may(M, 3 * M)},
        learnt=("scale",),
        call=behind(F.multiple_negatives_ranking, "first", "second"),
        also=("anchor", "negatives"),
    ),
    "multiple_negatives_ranking, ids": Case(
        F.multiple_negatives_ranking,
        embeddings("anchor", "positive"),
        {"anchor_ids": (integers(4, M), INTEGERS), "positive_ids": (integers(4, M), INTEGERS)},
        {"scale": 3.0, "directions": ("query_to_doc", "doc_to_doc")},
        call=with_text_ids(F.multiple_negatives_ranking, "anchor_ids", "positive_ids"),
        also=("ids",),
    ),
    "multiple_negatives_ranking, own": Case(
        F.multiple_negatives_ranking,
        TRIPLET,
        {"negatives_mask": may(M, 2)},
        {"scale": 3.0, "own_negatives": True, "directions": ("query_to_doc", "query_to_query")},
        call=behind(F.multiple_negatives_ranking, "first", "second"),
        also=("anchor", "negatives"),
    ),
    "multiple_negatives_ranking, anchors": Case(
        F.multiple_negatives_ranking,
        {"anchor": normal(M, D), "positive": normal(M + 3, D), "anchors": normal(M + 3, D)},
        {"scale": one(3.0)},
        {"directions": ("query_to_doc", "query_to_query")},
        learnt=("scale",),
    ),
    "gist_embed": Case(
        F.gist_embed,
        {
            **embeddings("anchor", "positive", "negative"),
            **{f"guide_{name}": normal(M, 4) for name in ("anchor", "positive", "negative")},
        },
        {"temperature": one(0.5)},
        learnt=("temperature",),
        call=gists,
        also=("guide", "negatives"),
    ),
    "gist_embed, ids": Case(
        F.gist_embed,
        {
            **embeddings("anchor", "positive", "negative"),
            **{f"guide_{name}": normal(M, 4) for name in ("anchor", "positive", "negative")},
        },
        {f"{name}_ids": (integers(4, M), INTEGERS) for name in ("anchor", "positive", "negative")},
        call=with_text_ids(gists, "anchor_ids", "positive_ids", "negative_ids"),
        also=("guide", "negatives", "ids"),
    ),
    "nt_xent": Case(F.nt_xent, embeddings("z1", "z2"), {"temperature": one(0.5)}, learnt=("temperature",)),
    "decoupled_contrastive": Case(
        F.decoupled_contrastive, embeddings("z1", "z2"), {"temperature": one(0.5)}, learnt=("temperature",)
    ),
    "sup_con": Case(F.sup_con, embeddings("embeddings"), {**LABELS, "temperature": one(0.5)}, learnt=("temperature",)),
    "sup_con, in": Case(F.sup_con, embeddings("embeddings"), LABELS, {"form": "in"}),
    "multi_similarity": Case(F.multi_similarity, embeddings("embeddings"), LABELS, {"beta": 5.0}),
    "circle": Case(F.circle, embeddings("embeddings"), LABELS, {"gamma": 5.0}),
    **{
        function.__name__: Case(function, embeddings("embeddings"), LABELS)
        for function in (
            F.batch_all_triplet,
            F.batch_hard_triplet,
            F.batch_hard_soft_margin_triplet,
            F.batch_semi_hard_triplet,
        )
    },
    "mega_batch_margin": Case(F.mega_batch_margin, embeddings("anchor", "positive")),
    "in_batch_margin_ranking": Case(F.in_batch_margin_ranking, embeddings("anchor", "positive")),
    "arcface": Case(F.arcface, {"embeddings": normal(M, D), "weight": normal(K, D)}, CLASSES, {"scale": 4.0}),
    "cosface": Case(F.cosface, {"embeddings": normal(M, D), "weight": normal(K, D)}, CLASSES, {"scale": 4.0}),
    "proxy_nca": Case(
        F.proxy_nca,
        {"embeddings": normal(M, D), "proxies": normal(K, D)},
        {**CLASSES, "scale": one(2.0)},
        learnt=("scale",),
    ),
    "proxy_nca, decoupled": Case(
        F.proxy_nca, {"embeddings": normal(M, D), "proxies": normal(K, D)}, CLASSES, {"decoupled": True}
    ),
    "proxy_anchor": Case(
        F.proxy_anchor, {"embeddings": normal(M, D), "proxies": normal(K, D)}, CLASSES, {"alpha": 4.0}
    ),
    "linear_cross_entropy": Case(
        F.linear_cross_entropy,
        {"input": normal(M, D), "linear_weight": normal(K, D)},
        {**CLASSES, "linear_bias": (normal(K), FLOATS), "weight": (uniform(K), FLOATS)},
        {"label_smoothing": 0.1},
        ("linear_bias",),
    ),
    "linear_cross_entropy, softcap": Case(
        F.linear_cross_entropy,
        {"input": normal(M, D), "linear_weight": normal(K, D)},
        {**CLASSES, "linear_bias": (normal(K), FLOATS), "weight": (uniform(K), FLOATS)},
        {"softcap": 3.0, "z_loss": 0.1},
        ("linear_bias",),
    ),
    "contrastive_tension_in_batch": Case(
        F.contrastive_tension_in_batch, PAIR, {"logit_scale": one(2.0)}, learnt=("logit_scale",)
    ),
    "matryoshka": Case(
        F.matryoshka,
        QUERIES,
        {"weight": (uniform(M), FLOATS)},
        call=lambda query, key, **given: F.matryoshka(F.info_nce, query, key, dims=(D, 3), **given),
        also=("embeddings",),
    ),
    "adaptive_layer": Case(
        F.adaptive_layer,
        {"a": normal(3, M, D), "b": normal(3, M, D)},
        {"score": (uniform(M), REAL)},
        call=lambda a, b, **given: F.adaptive_layer(F.cosent, a, b, last_layer_weight=1.0, **given),
        sweep=False,
        also=("columns",),
    ),
    "matryoshka_2d": Case(
        F.matryoshka_2d,
        {"a": normal(3, M, D), "b": normal(3, M, D)},
        {"score": (uniform(M), REAL)},
        call=lambda a, b, **given: F.matryoshka_2d(F.cosent, a, b, dims=(D, 3), **given),
        sweep=False,
        also=("columns",),
    ),
    "global_orthogonal_regularization": Case(
        F.global_orthogonal_regularization,
        embeddings("first", "second"),
        call=behind(F.global_orthogonal_regularization, first=("first", "second")),
        sweep=False,
        also=("embeddings",),
        backend=False,
    ),
    **{
        function.__name__: Case(function, PAIR, {"label": (integers(2, M), REAL)}, sweep=False)
        for function in (F.contrastive, F.online_contrastive, F.contrastive_tension)
    },
    "cosine_similarity": Case(F.cosine_similarity, PAIR, {"score": (uniform(M), REAL)}, sweep=False),
    "cosent": Case(
        F.cosent, PAIR, {"score": (integers(4, M), REAL), "scale": one(3.0)}, learnt=("scale",), sweep=False
    ),
    "angle": Case(F.angle, PAIR, {"score": (integers(4, M), REAL), "scale": one(3.0)}, learnt=("scale",), sweep=False),
    "angle, negatives": Case(
        F.angle,
        TRIPLET,
        {"label": (integers(2, M), REAL)},
        call=behind(F.angle, "first", "second"),
        sweep=False,
        also=("a", "b", "negatives"),
    ),
    "margin_mse": Case(
        F.margin_mse,
        TRIPLET,
        {"label": (integers(3, M, 2), REAL)},
        call=behind(F.margin_mse, "first", "second"),
        sweep=False,
        also=("negatives",),
    ),
    "margin_mse, one": Case(
        F.margin_mse,
        TRIPLET,
        {"label": (integers(3, M), REAL)},
        sweep=False,
        call=lambda query, positive, first, second, **given: F.margin_mse(query, positive, first - second, **given),
    ),
    "distill_kl_div": Case(
        F.distill_kl_div,
        TRIPLET,
        {"label": (integers(3, M, 3), REAL), "student_temperature": one(2.0), "teacher_temperature": one(3.0)},
        learnt=("student_temperature",),
        call=behind(F.distill_kl_div, "first", "second"),
        sweep=False,
        also=("negatives",),
    ),
    "distill_kl_div, one temperature": Case(
        F.distill_kl_div,
        TRIPLET,
        {"temperature": one(2.0)},
        {"label": normal(M, 3)},
        ("temperature",),
        call=behind(F.distill_kl_div, "first", "second"),
        sweep=False,
    ),
    "embed_distill": Case(
        F.embed_distill,
        {"student": normal(M, D), "teacher": normal(M, 4), "projection": normal(4, D)},
        sweep=False,
    ),
    "embed_distill, columns": Case(
        F.embed_distill,
        {"first": normal(M, D), "second": normal(M, D), "teacher": normal(M, 2, D)},
        {},
        {"distance": "l2"},
        call=lambda first, second, **given: F.embed_distill([first, second], **given),
        sweep=False,
    ),
    "triplet": Case(F.triplet, embeddings("anchor", "positive", "negative"), sweep=False),
    "softmax_pair": Case(
        F.softmax_pair,
        {"u": normal(M, D), "v": normal(M, D), "weight": normal(K, 3 * D)},
        {**CLASSES, "bias": (normal(K), FLOATS), "class_weight": (uniform(K), FLOATS)},
        learnt=("bias",),
        sweep=False,
    ),
    "cross_entropy": Case(
        F.cross_entropy,
        {"input": normal(M, K)},
        {"target": (integers(K, M), (torch.int64, torch.uint8)), "weight": (uniform(K), FLOATS)},
        {"label_smoothing": 0.1, "z_loss": 0.1},
        sweep=False,
    ),
    "cross_entropy, places": Case(
        F.cross_entropy,
        {"input": normal(2, K, 4)},
        {"target": (integers(K, 2, 4), (torch.int64, torch.uint8))},
        sweep=False,
    ),
    "cross_entropy, shares": Case(
        F.cross_entropy,
        {"input": normal(M, K)},
        {"target": (uniform(M, K), FLOATS), "weight": (uniform(K), FLOATS)},
        sweep=False,
    ),
    "focal": Case(F.focal, {"input": normal(M, K)}, {**CLASSES, "alpha": (uniform(K), FLOATS)}, sweep=False),
    "focal, labels": Case(
        F.focal, {"input": normal(M, K)}, {"target": (uniform(M, K).clamp(max=1), FLOATS)}, sweep=False
    ),
    "binary_cross_entropy_with_logits": Case(
        F.binary_cross_entropy_with_logits,
        {"input": normal(M, K)},
        {
            "target": (uniform(M, K), FLOATS),
            "weight": (1 + integers(3, M, 1), REAL),
            "pos_weight": (1 + integers(3, K), REAL),
        },
        sweep=False,
        own_dtypes=True,
        sums=True,
    ),
    **{
        f"{function.__name__}{name}": Case(
            function,
            {"input": normal(M, K)},
            # torch has no huber_loss of two dtypes
            {"target": (normal(M, K), FLOATS[: 1 if function is F.huber else 4]), "weight": (weight, REAL)},
            sweep=False,
            own_dtypes=True,
            sums=True,
        )
        for function in (F.mse, F.l1, F.huber, F.smooth_l1)
        for name, weight in {"": 1 + integers(3, M, K), ", by column": 1 + integers(3, K)}.items()
    },
    **{
        f"{function.__name__}{name}": Case(function, SCORES, RELEVANCE, options, sweep=False, own_dtypes=True)
        for function, name, options in (
            (F.lambda_loss, "", {}),
            (F.lambda_loss, ", ndcg_loss1", {"weighting": "ndcg_loss1", "k": 2}),
            (F.rank_net, "", {}),
            (F.list_net, "", {}),
            (F.list_mle, "", {"respect_input_order": False}),
            (F.plist_mle, "", {"respect_input_order": False}),
            (F.plist_mle, ", own weights", {"lambda_weight": rank_weight}),
            (F.adr_mse, "", {}),
        )
    },
    **{
        f"{function.__name__}, lists": Case(
            function, SCORES, {"labels": RELEVANCE["labels"]}, call=lists_of(function), sweep=False
        )
        for function in (F.lambda_loss, F.list_net, F.plist_mle, F.adr_mse)
    },
    "rank_net, soft": Case(
        F.rank_net,
        SCORES,
        {
            "soft": (uniform(4, 5, 5).clamp(max=1), FLOATS),
            "mask": RELEVANCE["mask"],
            "reference": (normal(4, 5), FLOATS),
        },
        backend=False,
        sweep=False,
    ),
    "list_info_nce": Case(F.list_info_nce, SCORES, {**RELEVANCE, "temperature": one(0.5)}, backend=False, sweep=False),
    "list_circle": Case(F.list_circle, SCORES, {**RELEVANCE, "gamma": one(4.0)}, backend=False, sweep=False),
}

BACKENDS = ("chunked", "triton", "cuda", "reference")
# One or more of each family of kernels: the launchers of a family take all of its rows alike, so that of the others two
# layouts of each argument run on them.
EVERY_LAYOUT = {"info_nce", "info_nce, masks", "siglip", "softmax_pair", "focal, labels", "mse", "cosent"}
EVERY_LAYOUT |= {
    "lambda_loss",
    "list_net",
    "plist_mle",
    "adr_mse",
    *(f"cross_entropy{of}" for of in ("", ", places", ", shares")),
}


# Layouts --------------------------------------------------------------------------------------------------------------


def strided(x: Tensor) -> Tensor:
    """Every second number."""
    return torch.stack([x, x.flip(0)], dim=-1)[..., 0]


def expanded(x: Tensor) -> Tensor:
    """The first number (or row) for all, at the head of the others."""
    return x.clone()[:1].expand(x.shape)


def expanded_columns(x: Tensor) -> Tensor:
    return x.clone()[..., :1].expand(x.shape)


def offset(x: Tensor) -> Tensor:
    """An element behind where 16 bytes begin."""
    flat = x.flatten()
    return torch.cat([flat[:1], flat])[1:].view(x.shape)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def overlapping(x: Tensor) -> Tensor:
    """Each row begins one number behind the one before."""
    flat, shape = x.flatten(), x.shape
    return flat.as_strided(shape, (*[1] * (len(shape) - 1), 1))


OF_VECTORS = (strided, expanded, offset)
OF_MATRICES = (*OF_VECTORS, expanded_columns, transposed)
OF_ROWS = (overlapping, transposed, expanded, offset, strided, expanded_columns)


# Runs -----------------------------------------------------------------------------------------------------------------


def found(case: Case, tensors: Mapping[str, Tensor], backend: str) -> list[Tensor]:
    """The loss, and the gradients by all that has one."""
    leaves = {name: x.detach() for name, x in tensors.items()}
    wanted = [name for name in (*case.rows, *case.learnt) if leaves[name].is_floating_point()]
    for name in wanted:
        leaves[name].requires_grad_()
    options = {**case.options, **({"backend": backend} if case.backend else {})}
    loss = (case.call or case.function)(**leaves, **options)
    inputs = [leaves[name] for name in wanted]
    return [loss.detach(), *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)]


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}


def given(case: Case) -> dict[str, Tensor]:
    return {**case.rows, **{name: x.to(dtypes[0]) for name, (x, dtypes) in case.vectors.items()}}


def same(out: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(out, other, strict=True))


def near(case: Case, tensors: Mapping[str, Tensor], out: Sequence[Tensor]) -> bool:
    """A vector that is read beside its stride is off by far more than 1e-3; how exact kernels are, others test."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in contiguous(tensors).items()}
    return all(
        bool((x.double() - y).abs().max() <= (1e-3 + 2 * torch.finfo(x.dtype).eps) * max(float(y.abs().max()), 0.1))
        for x, y in zip(out, found(case, wide, "reference"), strict=True)
    )


def backends(case: Case) -> tuple[str, ...]:
    """ "cuda" has kernels for similarity matrices alone."""
    return BACKENDS if case.sweep else ("chunked", "triton", "reference") if case.backend else ("reference",)


RUNS = [(name, backend) for name, case in CASES.items() for backend in backends(case)]
# The interpreter takes a second a case: `make test` has the names above.
SLOW = {run for run in RUNS if run[1] == "triton" and run[0] not in EVERY_LAYOUT}
PARTED = {run: pytest.param(*run, marks=[pytest.mark.grid] if run in SLOW else []) for run in RUNS}


def arranged(case: Case, layout: Callable[[Tensor], Tensor], number: int = 0) -> dict[str, Tensor]:
    """All vectors at once, in the last of their first `number` + 1 dtypes; those of one dimension may not have it."""
    tensors = dict(case.rows)
    for name, (x, dtypes) in case.vectors.items():
        typed = x.to(dtypes[min(number, len(dtypes) - 1)])
        tensors[name] = layout(typed) if typed.dim() > 1 or layout in OF_VECTORS else typed
    return tensors


@pytest.mark.parametrize(("name", "backend"), [PARTED[run] for run in RUNS if CASES[run[0]].vectors])
def test_vectors_of_any_layout_and_dtype(name, backend):
    """Bit by bit what their contiguous copies give: it is the same computation. Those of all arguments at once."""
    case, wrong = CASES[name], []
    matrices = any(x.dim() > 1 for x, _ in case.vectors.values())
    plain = found(case, given(case), backend)
    for layout in OF_MATRICES if matrices else OF_VECTORS:
        tensors = arranged(case, layout)
        out = found(case, tensors, backend)
        if layout in (expanded, expanded_columns):  # other numbers
            copied = found(case, contiguous(tensors), backend) if not case.sums else out
        else:
            copied = plain
        if not near(case, tensors, out) or not (case.sums or same(out, copied)):
            wrong.append(layout.__name__)
    # Where torch converts vectors before a kernel sees them, two dtypes are the way of all: the others run on torch.
    most = 10 if case.own_dtypes or backend in ("chunked", "reference") else 2
    for number in range(1, min(most, max(len(dtypes) for _, dtypes in case.vectors.values()))):
        tensors = arranged(case, strided, number)
        if not near(case, tensors, found(case, tensors, backend)):
            wrong.append(f"dtype {number}")
    assert not wrong


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_rows_of_any_layout(name, backend):
    """Products may take another way for another layout: as near to fp64, or bit by bit the copy's.

    (Equal rows are ties, and their distance, 0, is the difference of two roundings.)
    """
    case, wrong = CASES[name], []
    tensors = given(case)
    few = backend in ("triton", "cuda") and name not in EVERY_LAYOUT
    for number in range(2 if few else len(OF_ROWS)):
        layouts = {name: OF_ROWS[(number + 2 * place) % len(OF_ROWS)] for place, name in enumerate(case.rows)}
        ours = {**tensors, **{name: layout(case.rows[name]) for name, layout in layouts.items()}}
        out = found(case, ours, backend)
        if not near(case, ours, out) and not same(out, found(case, contiguous(ours), backend)):
            wrong.append({name: layout.__name__ for name, layout in layouts.items()})
    assert not wrong


def takes_a_tensor(annotation: object) -> bool:
    plain = re.sub(r"Callable\[(\.\.\.|\[[^]]*\]), Tensor\]", "", str(annotation))
    return "Tensor" in plain or plain == "Lists"


@pytest.mark.parametrize("name", F.__all__)
def test_no_tensor_of_a_loss_is_missing(name):
    function = getattr(F, name)
    covered = {
        argument
        for case in CASES.values()
        if case.function is function
        for argument in (*case.rows, *case.vectors, *case.also)
    }
    parameters = inspect.signature(function).parameters.values()
    assert {p.name for p in parameters if takes_a_tensor(p.annotation)} <= covered


def test_no_tensor_of_a_mask_is_missing():
    made = [getattr(masks, name) for name in ("same_id", "same_group", "score_margin", "guide", "not_self")]
    tensors = {
        p.name
        for function in made
        for p in inspect.signature(function).parameters.values()
        if takes_a_tensor(p.annotation)
    }
    case = CASES["info_nce, masks"]
    assert tensors <= {*case.rows, *case.vectors}
    functions = [value for value in vars(masks).values() if inspect.isfunction(value)]
    public = {f.__name__ for f in functions if f.__module__ == masks.__name__ and f.__annotations__["return"] == "Mask"}
    assert public == {function.__name__ for function in made}


# The nets -------------------------------------------------------------------------------------------------------------


def test_a_problem_holds_contiguous_vectors():
    x, labels, weight = normal(M, D), strided(integers(3, M)), torch.ones(1).expand(M)
    block = Block(0, 0, mask=Mask((Compare(labels, labels, True),), skip=labels))
    problem = Problem((x,), (block,), torch.ones(()), labels, weight, fold=Fold("circle", labels=(labels, labels)))
    mask = problem.blocks[0].mask
    held = [problem.target, problem.weight, *problem.fold.labels, *mask.compare[0][:2], mask.skip]
    assert all(v.is_contiguous() for v in held)
    assert all(torch.equal(v, labels) for v in (held[0], *held[2:]))


@pytest.mark.parametrize("vector", [torch.zeros(8)[::2], torch.zeros(1).expand(4)], ids=["strided", "expanded"])
def test_launchers_refuse_a_vector_of_another_stride(vector):
    for refused in (
        lambda: check_vector("labels", vector),
        lambda: launching.struct("SettleParams", weight=vector),
        lambda: launching.struct("Masks", drop_rows=[vector]),
        lambda: triton_backend.launch(SimpleNamespace(fn=check_vector), (1,), vector.device, 1, (None, (vector,))),
    ):
        with pytest.raises(RuntimeError, match=r"internal error: .* must be a vector of stride 1 .* got stride [02]"):
            refused()
    check_vector("labels", vector[:1])


@pytest.mark.parametrize("layout", OF_ROWS)
@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_operands_of_kernels_can_have_a_tensor_map(layout, dtype):
    """Rows that begin on 16 bytes and do not overlap."""
    x = layout(normal(M, 2 * D).to(dtype))
    for operand in (triton_backend.operand, cuda.operand):
        taken = operand(x)
        lines = taken if taken.stride(1) == 1 else taken.T
        assert torch.equal(taken, x)
        assert lines.stride(1) == 1 and lines.stride(0) >= lines.shape[1]
        assert lines.stride(0) * x.itemsize % 16 == 0 == lines.data_ptr() % 16
    aligned = normal(M, 2 * D).to(dtype)
    assert triton_backend.operand(aligned) is aligned is cuda.operand(aligned)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("value", [-(2**63), -1, M, 2**62])
def test_a_target_that_is_no_column_is_refused(backend, value):
    """No number stands for something else: -2**63 was taken, and gave NaN."""
    target = torch.arange(M)
    target[2] = value
    with pytest.raises(IndexError) as error:
        fusedloss.siglip(*FEATURES.values(), 2.0, target=target, backend=backend)
    assert str(error.value) == f"target[2] must be an index from 0 to {M - 1}, got {value}"
