"""GISTEmbed: multiple negatives ranking; a guide model removes false negatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Unpack

from torch import Tensor

from .. import masks, transforms
from ..core import checks
from ..core.mask import Guide, GuideRule, Mask
from ..core.problem import Block, Problem
from ..core.transforms import Transform
from ..distributed import Request
from ._duplicates import check_ids, without_duplicates
from ._options import Call, CountingAcrossOptions, expanded
from ._softmax import Loss, as_scale, autocast, counted, distinct, result_of


@expanded
def gist_embed(
    anchor: Tensor,
    positive: Tensor,
    *negatives: Tensor,
    guide: Sequence[Tensor],
    temperature: float | Tensor = 0.01,
    margin_strategy: str = "absolute",
    margin: float = 0.0,
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    ids: Sequence[Tensor] | None = None,
    decoupled: bool = False,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    **options: Unpack[CountingAcrossOptions],
) -> Loss:
    """GISTEmbed (Solatorio 2024) as in sentence-transformers: in-batch negatives that a guide model filters.

        t_i    = cos(guide_anchor_i, guide_positive_i)
        th_i   = t_i - margin                 ("absolute"),  t_i - |t_i| * margin  ("relative")
        loss_i = logsumexp over the columns of row i  -  cos(anchor_i, positive_i) / temperature

    The columns of row i, each a cosine over `temperature`, dropped where the guide's cosine of the same pair is larger
    than th_i: (anchor_i, positive_j); (anchor_i, anchor_j) with `contrast_anchors`; (positive_i, positive_j) with
    `contrast_positives`; (anchor_i, negative_j) of each column of negatives. The row's own positive always stays. As in
    sentence-transformers, a row's pair with itself (in the second and third set) is dropped only because the guide
    gives it similarity 1. If th_i is 1 or more (a guide with equal embeddings, a negative margin), the pair stays.

    A guide's cosine within (4 + G / 4) eps of the threshold is a tie, which stays, as does an exact duplicate of the
    positive. No [B, B] matrix is stored: the guide's products are computed beside the model's, and kept as a mask of
    one row chunk.

    Args:
        anchor: `[B, D]`. positive: `[N, D]` with N >= B: row i belongs to anchor i, further rows are positives without
            an anchor. negatives: any number of `[K, D]`.
        guide: `(guide_anchor, guide_positive, *guide_negatives)`, embeddings of the same texts by the guide, of any
            dimension; they receive no gradient.
        temperature: a positive number, or a tensor of one element, which receives a gradient.
        margin_strategy, margin: see above.
        contrast_anchors, contrast_positives: whether anchors compete with anchors, and positives with positives.
        ids: `(anchor_ids, positive_ids, *negative_ids)`: equal numbers are the same text, which is no negative, as in
            `multiple_negatives_ranking`.
        decoupled: leave the positive out of its row's normaliser (DCL, Yeh et al. 2022): see `info_nce`.
        transform: a function of each row's own loss: one of `fusedloss.transforms`, or a function of a tensor `[B]`.
        reduction: "mean", "sum" or "none" (`[B]`).
        return_stats: return `(loss, Stats)`; `Stats.masked` is the share of negatives that the guide drops.

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> guides = [teacher(texts) for texts in (questions, answers)]
        >>> fusedloss.gist_embed(model(questions), model(answers), guide=guides).backward()
    """

    def ask(call: Call) -> Request:
        problem = gist_embed_problem(
            anchor,
            positive,
            *negatives,
            guide=guide,
            temperature=temperature,
            margin_strategy=margin_strategy,
            margin=margin,
            contrast_anchors=contrast_anchors,
            contrast_positives=contrast_positives,
            ids=ids,
            decoupled=decoupled,
            transform=transform,
            call=call,
        )
        what = f"gist_embed {margin_strategy} {bool(contrast_anchors)} {bool(contrast_positives)}"
        return call.request(what, problem)

    return result_of(options, ask)


def gist_embed_problem(
    anchor: Tensor,
    positive: Tensor,
    *negatives: Tensor,
    guide: Sequence[Tensor],
    temperature: float | Tensor,
    margin_strategy: str,
    margin: float,
    contrast_anchors: bool,
    contrast_positives: bool,
    ids: Sequence[Tensor] | None,
    decoupled: bool,
    transform: Transform | Callable[[Tensor], Tensor] | None,
    call: Call,
) -> Problem:
    named = {"anchor": anchor, "positive": positive, **{f"negatives[{i}]": x for i, x in enumerate(negatives)}}
    checks.embeddings(**named)
    rows = anchor.shape[0]
    if positive.shape[0] < rows:
        raise ValueError(f"positive must have at least {rows} rows, one per row of anchor, got {positive.shape[0]}")
    guides = _guides(guide, named)
    check_ids(ids, named)
    of_anchors, *of_documents = without_duplicates(ids, rows, rows, len(named))
    checks.scalar("temperature", temperature, anchor, positive=True)
    checks.choice("margin_strategy", margin_strategy, masks.STRATEGIES)
    checks.number("margin", margin)
    scale, scale_bound = as_scale(temperature, anchor, inverse=True)
    own = positive[:rows] if contrast_positives and positive.shape[0] > rows else positive
    matrices, (a, q, p, *n) = distinct(anchor, own, positive, *negatives)
    operands = autocast(*matrices)
    guide_a, guide_p, *guide_n = guides

    def block(query: int, key: int, guide_query: Tensor, guide_key: Tensor, same: Mask) -> Block:
        return Block(query, key, mask=same._replace(guide=Guide(guide_query, guide_key)))

    blocks = [block(a, p, guide_a, guide_p, of_documents[0])]
    blocks += [block(a, a, guide_a, guide_a, of_anchors)] if contrast_anchors else []
    blocks += [block(q, p, guide_p[:rows], guide_p, of_documents[0])] if contrast_positives else []
    blocks += [
        block(a, key, guide_a, guide_key, same)
        for key, guide_key, same in zip(n, guide_n, of_documents[1:], strict=True)
    ]
    return Problem(
        operands=operands,
        blocks=tuple(blocks),
        scale=scale,
        **counted(operands, blocks[0], scale),
        cosine=True,
        scale_bound=scale_bound,
        workspace_bytes=call.workspace_bytes,
        guide_rule=GuideRule(float(margin), margin_strategy == "relative"),
        wants_tally=call.return_stats,
        decoupled=decoupled,
        transform=transforms.bind(transform, decoupled),
    )


def _guides(guide: Sequence[Tensor], named: dict[str, Tensor]) -> list[Tensor]:
    if not isinstance(guide, Tensor):
        checks.sequence("guide", guide, "embeddings", "(guide_anchor, guide_positive)")
    if isinstance(guide, Tensor) or len(guide) != len(named):
        got = "one tensor" if isinstance(guide, Tensor) else f"{len(guide)}"
        raise ValueError(f"guide must hold {len(named)} tensors, one for each of {', '.join(named)}, got {got}")
    checks.embeddings(**{f"guide[{i}]": x for i, x in enumerate(guide)})
    for i, (x, (name, own)) in enumerate(zip(guide, named.items(), strict=True)):
        if x.shape[0] != own.shape[0]:
            raise ValueError(f"guide[{i}] must have {own.shape[0]} rows, like {name}, got {x.shape[0]}")
        checks.same_device(f"guide[{i}]", x, name, own)
    return [x.detach() for x in guide]
