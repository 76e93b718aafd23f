"""Multiple negatives ranking: each anchor's positive against every other document of the batch."""

from __future__ import annotations

from torch import Tensor, nn

from .. import checks
from ..problem import Block
from ._in_batch import as_scale, autocast, softmax_loss

SIMILARITIES = ("cos", "dot")


def multiple_negatives_ranking(
    anchor: Tensor,
    positive: Tensor,
    *negatives: Tensor,
    scale: float | Tensor = 20.0,
    similarity: str = "cos",
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> Tensor:
    """Multiple negatives ranking (Henderson et al. 2017) as in sentence-transformers, from query to document.

        loss_i = logsumexp over all documents d of scale * s(anchor_i, d)  -  scale * s(anchor_i, positive_i)

    The documents are the positives and every column of hard negatives, each of which serves all anchors. Their columns
    are separate blocks of one softmax: neither the score matrix nor a concatenation of the documents is made.

    Args:
        anchor: `[B, D]`.
        positive: `[N, D]` with N >= B: row i belongs to anchor i, further rows are documents of no anchor.
        negatives: any number of `[K, D]` columns of hard negatives.
        scale: the inverse temperature: a number, or a tensor of one element, which receives a gradient.
        similarity: "cos" (rows divided by `max(|row|, 1e-12)`) or "dot".
        reduction: "mean", "sum" or "none" (`[B]`).
        backend: "auto", "triton", "chunked" or "reference".
        workspace_bytes: the most that the workspace for one chunk of similarities may take; None is the environment's
            FUSEDLOSS_WORKSPACE_BYTES, or else the device's default: 64 MiB on a CPU, about 900 MiB on a GPU. Less
            memory takes longer; results are the same to rounding.

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the backend asked for cannot run this.

    Example:
        >>> anchor, positive, hard = encode(questions), encode(answers), encode(near_misses)
        >>> fusedloss.multiple_negatives_ranking(anchor, positive, hard, scale=20.0).backward()
    """
    named = {f"negatives[{i}]": x for i, x in enumerate(negatives)}
    checks.embeddings(anchor=anchor, positive=positive, **named)
    if positive.shape[0] < anchor.shape[0]:
        raise ValueError(
            f"positive has {positive.shape[0]} rows and anchor {anchor.shape[0]}: every anchor needs its positive"
        )
    checks.scalar("scale", scale, anchor, positive=True)
    checks.choice("similarity", similarity, SIMILARITIES)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.count("workspace_bytes", workspace_bytes)
    multiplier, scale_bound = as_scale(scale, anchor, inverse=False)
    operands: list[Tensor] = []
    places = []
    for x in (anchor, positive, *negatives):
        place = next((i for i, known in enumerate(operands) if known is x), len(operands))
        operands += [x] if place == len(operands) else []
        places.append(place)
    return softmax_loss(
        autocast(*operands),
        [Block(places[0], key) for key in places[1:]],
        None,
        multiplier,
        scale_bound=scale_bound,
        cosine=similarity == "cos",
        reduction=reduction,
        backend=backend,
        workspace_bytes=workspace_bytes,
    )


class MultipleNegativesRankingLoss(nn.Module):
    """`multiple_negatives_ranking` with its options in the constructor and `forward(anchor, positive, *negatives)`.

    It takes embeddings: a class of this name that wraps a sentence-transformers model is not in this version.
    """

    def __init__(
        self,
        scale: float = 20.0,
        similarity: str = "cos",
        reduction: str = "mean",
        backend: str = "auto",
        workspace_bytes: int | None = None,
    ):
        super().__init__()
        checks.options_not_modules(scale=scale)
        checks.scalar("scale", scale, None, positive=True)
        checks.choice("similarity", similarity, SIMILARITIES)
        checks.choice("reduction", reduction, checks.REDUCTIONS)
        checks.backend(backend)
        checks.count("workspace_bytes", workspace_bytes)
        self.scale, self.similarity, self.reduction = scale, similarity, reduction
        self.backend, self.workspace_bytes = backend, workspace_bytes

    def forward(self, anchor: Tensor, positive: Tensor, *negatives: Tensor) -> Tensor:
        return multiple_negatives_ranking(
            anchor,
            positive,
            *negatives,
            scale=self.scale,
            similarity=self.similarity,
            reduction=self.reduction,
            backend=self.backend,
            workspace_bytes=self.workspace_bytes,
        )

    def extra_repr(self) -> str:
        return checks.options(
            self, scale=None, similarity="cos", reduction="mean", backend="auto", workspace_bytes=None
        )
