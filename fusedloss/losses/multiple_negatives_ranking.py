"""Multiple negatives ranking: each anchor's positive against every other document of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Unpack

import torch
from torch import Tensor

from .. import masks, transforms
from ..core import checks
from ..core.mask import NO_MASK, Compare, Mask
from ..core.numerics import filled, row_numbers, savable
from ..core.problem import Block, Problem
from ..core.transforms import Transform
from ..distributed import Request, world_of
from . import _straight as straight
from ._duplicates import check_ids, without_duplicates
from ._options import Call, CountingAcrossOptions, expanded, ranks
from ._private import refusal, with_private
from ._softmax import Loss, as_scale, autocast, counted, distinct, result_of
from ._targets import check_debiased, counts

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PARTITION_MODES = ("joint", "per_direction")
HARD = ("hard_negatives", "all_negatives")  # that weigh the anchor's own hard negatives
HARDNESS_MODES = ("in_batch_negatives", "hard_negatives", "all_negatives")


@expanded
def multiple_negatives_ranking(
    anchor: Tensor,
    positive: Tensor,
    *negatives: Tensor,
    scale: float | Tensor = 20.0,
    similarity: str = "cos",
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    mask: masks.Mask | Tensor | None = None,
    anchors: Tensor | None = None,
    ids: Sequence[Tensor] | None = None,
    decoupled: bool = False,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    negatives_mask: Tensor | None = None,
    own_negatives: bool = False,
    debiased: float = 0.0,
    **options: Unpack[CountingAcrossOptions],
) -> Loss:
    """Multiple negatives ranking (Henderson et al. 2017), with the options of sentence-transformers 6.2.

        loss_i = logsumexp over the columns of row i  -  scale * s(anchor_i, positive_i)

    The columns of a row are, by direction (documents d are the positives and every column of hard negatives):

        query_to_doc    scale * s(anchor_i, d)          all documents
        query_to_query  scale * s(anchor_i, anchor_j)   j != i
        doc_to_query    scale * s(anchor_j, positive_i) all anchors
        doc_to_doc      scale * s(d, positive_i)        all documents but those of anchor i

    `partition_mode="joint"` (Li et al. 2023, GTE) puts all of them under one logsumexp; `"per_direction"` (Günther et
    al. 2024) takes one for each and their mean. Blocks share a row's normaliser in one sweep, without the score matrix
    or a concatenation of the documents.

    Args:
        anchor: `[B, D]`.
        positive: `[N, D]` with N >= B: row i belongs to anchor i, further rows are documents without an anchor
            (query_to_doc only; other directions and hardness need N = B).
        negatives: any number of `[K, D]` columns of hard negatives; K = B with doc_to_doc or hardness, where each
            belongs to an anchor.
        scale: the inverse temperature: a number, or a tensor of one element, which receives a gradient.
        similarity: "cos" (rows divided by `max(|row|, 1e-12)`) or "dot".
        directions: query_to_doc and any of the other three.
        partition_mode: "joint", or "per_direction" for query_to_doc and doc_to_query.
        hardness_mode: adds `hardness_strength * s` to the logits, as a constant, from query to document: to documents
            of other anchors ("in_batch_negatives"), to the anchor's own hard negatives ("hard_negatives"), or to all
            but the own positive ("all_negatives") (Lan et al. 2025).
        hardness_strength: at least 0.
        mask: which documents may compete from query to document: one of `fusedloss.masks`, or bool `[B, documents]`,
            over the positives and then each column of negatives.
        anchors: `[A, D]`, the anchors of all processes, `anchor` first, where `positive` and `negatives` are those of
            all processes: for who gathers beforehand, in the place of `group`.
        ids: `(anchor_ids, positive_ids, *negative_ids)`, an int64 `[rows]` for each of the embeddings (the first of
            `anchors` if given): equal numbers are the same text, see `masks.text_ids`. Such duplicates are no negatives
            in any direction: a pair whose anchor or positive is the row's own, and a hard negative that is the row's
            positive. `anchor_ids` may go on with those of the anchors of further positives.
        decoupled: leave the positive out of its row's normaliser, wherever it stands in it (DCL, Yeh et al. 2022): see
            `info_nce`.
        transform: a function of each row's own loss, under "per_direction" of each direction's, before their mean: one
            of `fusedloss.transforms`, or a function of a tensor `[B]`.
        negatives_mask: bool `[N, K]` for K columns of negatives of N rows each, True for those that exist; False for
            padding, which competes nowhere and must be finite.
        own_negatives: whether a row sees its own hard negatives alone, and no other row's. Each column then has a row
            for each anchor. Without group, mask, decoupled, return_stats and "per_direction" their scores are merged
            outside the sweep: B K of them instead of B^2 K.
        debiased: the share of the negatives that are none in truth (Chuang et al. 2020): see `info_nce`. The positive
            must stand once in its row: not with doc_to_query under "joint".
        reduction: "mean", "sum" or "none" (`[B]`).
        return_stats: return `(loss, Stats)`; under "per_direction" those of query_to_doc.

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> anchor, positive, hard = encode(questions), encode(answers), encode(near_misses)
        >>> fusedloss.multiple_negatives_ranking(anchor, positive, hard, scale=20.0).backward()
    """

    off: tuple[object, ...] = (hardness_mode, hardness_strength, mask, anchors, ids, decoupled, debiased, transform)
    off += (negatives != (), negatives_mask, own_negatives, similarity not in checks.SIMILARITIES)
    every = directions == DIRECTIONS
    off += (type(scale) is not float if every else directions != DIRECTIONS[:1], partition_mode != PARTITION_MODES[0])
    found = straight.mean(anchor, positive, scale, options, off, cosine=similarity == "cos", every=every)
    if found is not None:
        return found

    def problems_of(call: Call, apart: bool = False) -> list[Problem]:
        return multiple_negatives_ranking_problems(
            anchor,
            positive,
            *negatives,
            scale=scale,
            similarity=similarity,
            directions=directions,
            partition_mode=partition_mode,
            hardness_mode=hardness_mode,
            hardness_strength=hardness_strength,
            mask=mask,
            call=call,
            anchors=anchors,
            ids=ids,
            decoupled=decoupled,
            transform=transform,
            negatives_mask=negatives_mask,
            own_negatives=own_negatives,
            debiased=debiased,
            apart=apart,
        )

    def ask(call: Call) -> Request:
        problems = problems_of(call)
        named = f"directions {tuple(directions)}, {partition_mode}, hardness {hardness_mode}"
        return call.request(f"multiple_negatives_ranking, {named}", *problems)

    masked = mask is not None or ids is not None
    if own_negatives and negatives and not masked and partition_mode == "joint" and ranks(options) is None:
        call = Call(**options)
        (problem,) = problems_of(call, apart=True)
        if refusal(problem) is None:
            penalty = float(hardness_strength) if hardness_mode in HARD else 0.0
            return with_private(problem, call, [x[: len(anchor)] for x in negatives], negatives_mask, penalty)
    return result_of(options, ask)


def multiple_negatives_ranking_problems(
    anchor: Tensor,
    positive: Tensor,
    *negatives: Tensor,
    scale: float | Tensor,
    similarity: str,
    directions: Sequence[str],
    partition_mode: str,
    hardness_mode: str | None,
    hardness_strength: float,
    mask: masks.Mask | Tensor | None,
    call: Call,
    anchors: Tensor | None = None,
    ids: Sequence[Tensor] | None = None,
    decoupled: bool = False,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    negatives_mask: Tensor | None = None,
    own_negatives: bool = False,
    debiased: float = 0.0,
    elsewhere: Mask = NO_MASK,
    apart: bool = False,
) -> list[Problem]:
    """elsewhere: a mask of the columns beyond query to document, besides the row's own. apart: the negatives are
    checked and left out.
    """
    named = {f"negatives[{i}]": x for i, x in enumerate(negatives)}
    checks.embeddings(anchor=anchor, positive=positive, **named, **({} if anchors is None else {"anchors": anchors}))
    if anchors is not None and call.group is not None:
        raise ValueError("anchors must be None with group=, which gathers them, got a tensor; leave one of the two out")
    everyone = anchor if anchors is None else anchors
    if len(everyone) < len(anchor):
        raise ValueError(
            f"anchors must hold anchor's {len(anchor)} rows and then those of the other processes, got {len(everyone)} "
            "rows; gather anchor"
        )
    rows, owners = anchor.shape[0], everyone.shape[0]
    if positive.shape[0] < rows:
        raise ValueError(f"positive must have at least {rows} rows, one per row of anchor, got {positive.shape[0]}")
    checks.scalar("scale", scale, anchor, positive=True)
    checks.choice("similarity", similarity, checks.SIMILARITIES)
    check_directions(directions, partition_mode)
    check_hardness(hardness_mode, hardness_strength)
    owned = hardness_mode is not None or "doc_to_doc" in directions
    for name, x in {"positive": positive, **named}.items():
        why = "own_negatives" if own_negatives and not owned else "these directions or hardness_mode"
        needed = owned or (len(directions) > 1 if name == "positive" else own_negatives)
        if needed and x.shape[0] != owners:
            raise ValueError(f"{name} must have {owners} rows, one per row of anchor, with {why}, got {x.shape[0]}")
    widths = [x.shape[0] for x in (positive, *negatives)]
    check_ids(ids, {"anchor": everyone, "positive": positive, **named})
    of_anchors, *of_documents = without_duplicates(ids, rows, owners, 2 + len(negatives))
    bound = [
        part._replace(compare=part.compare + of_document.compare)
        for part, of_document in zip(masks.bind(mask, rows, widths, anchor), of_documents, strict=True)
    ]
    phi = transforms.bind(transform, decoupled)
    twice = partition_mode == "joint" and "doc_to_query" in directions
    check_debiased(debiased, decoupled=decoupled, **{"doc_to_query under partition_mode='joint'": twice})
    multiplier, scale_bound = as_scale(scale, anchor, inverse=False)
    belongs = _belonging(negatives, negatives_mask, own_negatives, anchor, call)
    if apart:
        negatives, bound = (), bound[:1]
    several = len(directions) > 1
    facing = (everyone, positive[:rows] if owners > rows else positive) if several else (anchor, positive)
    matrices, (query, queries, answer, *documents) = distinct(anchor, *facing, positive, *negatives)
    operands = autocast(*matrices)

    def beyond(same: Mask) -> Mask:
        return elsewhere._replace(compare=same.compare, skip=row_numbers(rows, anchor)) if several else NO_MASK

    strength = float(hardness_strength)
    others = strength if hardness_mode in ("in_batch_negatives", "all_negatives") else 0.0
    hard = strength if hardness_mode in HARD else 0.0

    def with_compare(part: Mask, number: int) -> Mask:
        return part._replace(compare=part.compare + belongs[number - 1]) if number else part

    parts = {
        "query_to_doc": [
            Block(query, key, None, with_compare(part, number), others, hard if number else 0.0)
            for number, (key, part) in enumerate(zip(documents, bound, strict=True))
        ],
        "query_to_query": [Block(query, queries, mask=beyond(of_anchors))],
        # Under "joint" the positive appears here once more, and is counted as a second copy of the target.
        "doc_to_query": [Block(answer, queries, mask=beyond(of_anchors) if partition_mode == "joint" else of_anchors)],
        "doc_to_doc": [
            Block(answer, key, mask=with_compare(beyond(same), number))
            for number, (key, same) in enumerate(
                zip(documents[:1] if own_negatives else documents, of_documents, strict=False)
            )
        ],
    }
    if partition_mode == "joint":
        sets = [[block for name in DIRECTIONS if name in directions for block in parts[name]]]
    else:
        sets = [parts[name] for name in DIRECTIONS if name in directions]
    # Both directions over one matrix share its products.
    symmetric = len(sets) == 2 and len(documents) == 1 and owners == rows and mask is None and not strength
    symmetric = symmetric and not counts(debiased, sets[0])  # which only a sweep of one direction does
    if symmetric:
        sets = sets[:1]
    return [
        Problem(
            operands=operands,
            blocks=tuple(blocks),
            scale=multiplier,
            **counted(operands, blocks[0], multiplier),
            cosine=similarity == "cos",
            symmetric=symmetric,
            scale_bound=scale_bound,
            workspace_bytes=call.workspace_bytes,
            copies=2 if twice else 1,
            guide_rule=masks.rule(mask),
            wants_tally=call.return_stats or counts(debiased, blocks),
            decoupled=decoupled,
            transform=phi,
            debiased=float(debiased),
        )
        for blocks in sets
    ]


def _belonging(
    negatives: Sequence[Tensor], real: Tensor | None, own: bool, anchor: Tensor, call: Call
) -> list[tuple[Compare, ...]]:
    """Returns what a row and a document of each column of negatives must have in common, so that no matrix is made."""
    if real is not None:
        if not negatives:
            raise ValueError("negatives must be given with negatives_mask, got the mask alone; pass columns [N, D]")
        checks.boolean("negatives_mask", real, (negatives[0].shape[0], len(negatives)), anchor)
        for i, x in enumerate(negatives):
            if x.shape[0] != negatives[0].shape[0]:
                raise ValueError(
                    f"negatives[{i}] must have {negatives[0].shape[0]} rows, like negatives[0], with negatives_mask, "
                    f"got {x.shape[0]}; pad it"
                )
    if real is None and not own:
        return [()] * len(negatives)
    # Those of an anchor have its number, which no other rank has; or all have 0. Padding has -1.
    first = 0
    if own and call.group is not None:
        first = world_of(call.group, call.strategy, call.grad_scale).rank << 32

    def numbers(x: Tensor) -> Tensor:
        return row_numbers(x.shape[0], x) + first if own else filled(x.shape[0], 0, torch.int64, x.device)

    rows = numbers(anchor)
    found: list[tuple[Compare, ...]] = []
    for number, x in enumerate(negatives):
        keys = numbers(x)
        if real is not None:
            keys = keys.masked_fill(~savable(real)[:, number], -1)
        found.append((Compare(rows, keys, True),))
    return found


def check_directions(directions: Sequence[str], partition_mode: str) -> None:
    if not isinstance(directions, str):
        checks.sequence("directions", directions, "names", str(DIRECTIONS[:2]))
    if isinstance(directions, str) or not all(name in DIRECTIONS for name in directions):
        raise ValueError(f"directions must be a sequence of {', '.join(map(repr, DIRECTIONS))}, got {directions!r}")
    if len(set(directions)) != len(directions):
        raise ValueError(f"directions must hold each name at most once, got {directions!r}")
    if "query_to_doc" not in directions:
        raise ValueError(f"directions must hold 'query_to_doc', got {directions!r}")
    checks.choice("partition_mode", partition_mode, PARTITION_MODES)
    within = [name for name in directions if name in ("query_to_query", "doc_to_doc")]
    if partition_mode == "per_direction" and within:
        raise ValueError(
            f"partition_mode must be 'joint' with directions {within}, whose logits hold no positive, "
            "got 'per_direction'"
        )


def check_hardness(mode: str | None, strength: float) -> None:
    if mode is not None:
        checks.choice("hardness_mode", mode, HARDNESS_MODES)
    checks.number("hardness_strength", strength, least=0)
