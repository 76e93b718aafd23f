"""What a sweep is asked to do: operands, blocks of the similarity matrix, and the target of each row.

Every in-batch loss looks at logits

    z[i, j] = scale * f_i * f_j * <x_i, y_j> + bias_j

laid out in one or more blocks side by side that share one row normaliser. Plain InfoNCE is one block; each column of
hard negatives is one more. Operands are listed once and blocks point at them, so a matrix that stands on both sides,
or in several blocks, receives one gradient and is never copied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .mask import NO_MASK, Guide, GuideRule, Mask
from .numerics import SAFE_SCALE, UNSHIFTED_SCALE
from .transforms import Transform

Learned = Annotated[Tensor, "may receive a gradient"]  # as a field's type; other tensors receive none


class Margin(NamedTuple):
    """The margin of a target: its cosine becomes `cos(theta + angle) - cosine` (`softmax.marginal`)."""

    angle: float = 0.0  # radians
    cosine: float = 0.0


NO_MARGIN = Margin()


class RowRule(NamedTuple):
    """The options that turn a row's sums into its loss; `Problem` explains each. Columns' losses have `decoupled`.

    It is handed on whole, so that no sweep, ring or backend can leave out one of them.
    """

    label_smoothing: float = 0.0
    decoupled: bool = False
    copies: int = 1
    softcap: float = 0.0
    margin: Margin = NO_MARGIN
    z_loss: float = 0.0


NO_RULE = RowRule()


class Ranks(NamedTuple):
    """The processes that share a batch, for sweeps that use collectives."""

    group: str  # its name
    rank: int
    sizes: tuple[int, ...]  # rows of each

    @property
    def offset(self) -> int:
        return sum(self.sizes[: self.rank])


def _set(self: object, **fields: object) -> None:
    """Sets fields of a frozen dataclass. Vectors are made contiguous, because kernels take no stride."""
    for name, value in fields.items():
        object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Block:
    """Columns `operands[key]` for rows `operands[query]`, with an optional additive `bias` [N] per column.

    penalty: times the similarity, added to the logits of all columns but the target without a gradient of its own
        (hardness); `own_penalty` instead in row i's column i.
    """

    query: int
    key: int
    bias: Learned | None = None
    mask: Mask = NO_MASK
    penalty: float = 0.0
    own_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.mask.compare or self.mask.skip is not None:
            _set(self, mask=self.mask.contiguous())


class Targets(NamedTuple):
    """Several targets of each row, all of block 0. Its negatives are the other columns that compete."""

    columns: Tensor  # int64 [M, P], different in a row; the first is `Problem.target`, and -1 after it: none
    form: str  # "each" or "joint", see `targets.of_several`


class Beside(NamedTuple):
    """Columns of each row's own, behind those of all blocks, for a fold that has a teacher."""

    values: Learned  # [M, K] similarities
    teacher: Tensor  # [M, K], the teacher's
    admitted: Tensor | None = None  # [M, K] bool; None: all compete


@dataclass(frozen=True)
class Fold:
    """A loss of a row's similarities other than a softmax: `folds.FOLDS[name]` on whole rows of one chunk.

    options: its numbers. labels: of rows and columns. itself: column i is row i, which is not a pair. distance:
    "euclidean" or "squared" if the fold takes distances; "cosine": `1 - sim`. scalars: 0-dim tensors after the scale,
    maybe learnable. teachers: for each block, embeddings whose similarities are the second input. beside: each row's
    own columns. A fold that has teachers takes several blocks and masks. teacher_cosine: the teachers' rows enter as
    unit vectors, as the operands do under the problem's `cosine`.
    """

    name: str
    options: tuple[float, ...] = ()
    labels: tuple[Tensor, Tensor] | None = None
    itself: bool = False
    distance: str = ""
    scalars: tuple[Learned, ...] = ()
    teachers: tuple[Guide, ...] = ()
    teacher_scale: Tensor | None = None
    beside: Beside | None = None
    teacher_cosine: bool = False

    def __post_init__(self) -> None:
        if self.labels is not None:
            rows, keys = (x.contiguous() for x in self.labels)
            _set(self, labels=(rows, rows if self.labels[1] is self.labels[0] else keys))


@dataclass(frozen=True)
class Problem:
    """The description of one sweep. All blocks have the same M rows; the target's column is in block 0.

    operands: matrices [rows, D], each any floating dtype (all alike) and any strides.
    blocks: the parts of the row, side by side.
    scale: 0-dim tensor in the statistics dtype (fp32, or fp64 for fp64 operands).
    target: int64 [M], a column of block 0.
        -1 (where `decoupled`, or for a fold): none.
    weight: [M] in the statistics dtype: factor of each row's loss; 0 leaves a row out. cosine: rows of the operands
    enter as unit vectors; the 1/norms act on the fp32 accumulator. label_smoothing: share of the target mass spread
    evenly over the row's admissible columns. symmetric: columns are normalised too (CLIP): `weight[i]/2` of row i's
    loss plus `weight[j]/2` of column j's. scale_bound: `scale` as a Python number if the host knows it, else None. It
    only selects a faster way to the same result. workspace_bytes: the most that the workspace may take; None: the
    device's default. decoupled: the target stays out of its row's normaliser, too (DCL): `lse_neg - z_t`. copies:
    number of times the target appears in its row's normaliser. Further appearances (in other blocks) are skipped there
    and counted here; otherwise the gradient of a well-fitted pair would be the difference of two rounded numbers.
    guide_rule: the rule by which the blocks' guides mask. wants_tally: count the numbers of `Tally`. fold: replaces the
    softmax. prefixes, prefix_weights: compute the weighted sum of the losses of these prefixes of D, each divided by
    its own norms (`cosine`). softcap: logits become `cap * tanh(z / cap)` before the softmax; 0: no cap. With a
    softcap, as with a margin, the scale has no gradient. margin: applied to the targets' cosines, before the scale
    (`cosine`). z_loss: factor of the squared log-normaliser that is added to each row's loss. ranks: the columns are
    those of all these processes, this one's first. If `symmetric`, each column's normaliser is over the rows of all of
    them. top: compute each row's largest logit instead of a loss (`op.top_rows`). every_row: whether the host knows
    that every row counts, with weight 1; a mean then needs no sum of the weights. transform: of each row's loss (of
    each direction's, if `symmetric`), before its weight; with neither smoothing nor z_loss nor prefixes.
    bias_on_target: whether block 0's bias, which then has no gradient, is added to the targets' logits as well.
    mirrored: whether the host knows, where one matrix stands on both sides, that the mask admits (j, i) where it admits
    (i, j), and that row i is the target of its target, or that a fold's rows and columns have one list of labels. A
    device's values need not be read then to see it. targets: the row's targets, if it may have several. debiased: the
    share of negatives that are none, in truth (Chuang et al. 2020); it needs `wants_tally` where `negatives` is None.
    """

    operands: tuple[Learned, ...]
    blocks: tuple[Block, ...]
    scale: Learned
    target: Tensor
    weight: Tensor
    cosine: bool = False
    label_smoothing: float = 0.0
    symmetric: bool = False
    scale_bound: float | None = None
    workspace_bytes: int | None = None
    decoupled: bool = False
    copies: int = 1
    guide_rule: GuideRule = GuideRule()  # noqa: RUF009
    wants_tally: bool = False
    fold: Fold | None = None
    prefixes: tuple[int, ...] = ()
    prefix_weights: tuple[float, ...] = ()
    softcap: float = 0.0
    margin: Margin = NO_MARGIN
    z_loss: float = 0.0
    ranks: Ranks | None = None
    top: bool = False
    every_row: bool = False
    transform: Transform | None = None
    bias_on_target: bool = True
    mirrored: bool = False
    targets: Targets | None = None
    debiased: float = 0.0

    def __post_init__(self) -> None:
        _set(self, target=self.target.contiguous(), weight=self.weight.contiguous())

    @property
    def bends(self) -> bool:
        """Whether a row's loss is another function of its targets and its negatives' sum: `core/targets.py`."""
        return self.targets is not None or self.debiased != 0

    @property
    def negatives(self) -> int | None:
        """The number of each row's negatives, if the host knows that all rows have as many."""
        masks = [block.mask for block in self.blocks if block.mask.given]
        if any(block.bias is not None for block in self.blocks):
            return None
        if not masks:
            return self.columns - 1
        itself = self.mirrored and len(self.blocks) == 1 and masks[0]._replace(skip=None) == NO_MASK
        return self.columns - 2 if itself else None

    @property
    def all_targets(self) -> Tensor:
        """int64 [M, P]; -1: none."""
        return self.target[:, None] if self.targets is None else self.targets.columns

    def weighing(self, weight: Tensor) -> Problem:
        """Returns the problem with these weights of its rows."""
        return replace(self, weight=weight, every_row=False)

    @property
    def whole(self) -> Problem:
        """The problem of the whole embeddings, without prefixes."""
        return replace(self, prefixes=(), prefix_weights=()) if self.prefixes else self

    def apart(self) -> list[tuple[float, Problem]]:
        """Returns the problem of each prefix alone, and its weight in the sum."""
        return [
            (weight, replace(self.whole, operands=tuple(x[:, :dim] for x in self.operands), cosine=True))
            for dim, weight in zip(self.prefixes, self.prefix_weights, strict=True)
        ]

    @property
    def rule(self) -> RowRule:
        return RowRule(self.label_smoothing, self.decoupled, self.copies, self.softcap, self.margin, self.z_loss)

    @property
    def column_rule(self) -> RowRule:
        """The rule of the other direction of a symmetric problem, which knows neither smoothing nor a softcap."""
        return RowRule(decoupled=self.decoupled)

    @property
    def masked(self) -> bool:
        """Whether rows may have different admissible columns."""
        return any(block.mask.given for block in self.blocks)

    @property
    def smooths_by_row(self) -> bool:
        """Whether smoothing needs each row's own sum of logits; otherwise it is a rank-one correction."""
        return self.label_smoothing != 0 and (self.masked or self.softcap != 0)

    @property
    def bound(self) -> float | None:
        """A bound of every logit except the targets', if the host knows one."""
        if self.softcap:
            return self.softcap
        if not self.cosine or self.scale_bound is None:
            return None
        penalty = 0.0
        for block in self.blocks:
            if block.bias is not None:
                return None
            penalty = max(penalty, block.penalty, block.own_penalty)
        return abs(self.scale_bound) + penalty

    @property
    def unshifted(self) -> bool:
        """Whether the exponentials of the logits themselves, and sums of them, stay in range."""
        return self.bound is not None and self.bound <= UNSHIFTED_SCALE

    @property
    def has_safe_shift(self) -> bool:
        """Whether the host knows a shift that keeps every exponential and every row's sum normal, in the workspace."""
        bound = self.bound
        if bound is None or bound > SAFE_SCALE or self.operands[0].dtype is torch.float16:
            return False
        return self.label_smoothing == 0 or not self.smooths_by_row

    @property
    def rows(self) -> int:
        return self.operands[self.blocks[0].query].shape[0]

    @property
    def columns(self) -> int:
        return sum(self.operands[block.key].shape[0] for block in self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        return self.operands[0].dtype

    @property
    def device(self) -> torch.device:
        return self.operands[0].device


class TokenStats(NamedTuple):
    """Statistics of each row of `linear_cross_entropy`, of the shape of its target; 0 and False for left-out rows."""

    correct: Tensor  # bool: whether the target has the largest logit; ties count for it, a NaN does not
    entropy: Tensor  # of the row's softmax, in nats


class Stats(NamedTuple):
    """Statistics of a batch, over the rows that count; 0-dim tensors without gradient.

    Scores are logits divided by the scale: similarities if there is no bias.
    """

    accuracy: Tensor  # share of rows whose target has the largest logit; ties count for it: `masks.score_margin`
    mean_reciprocal_rank: Tensor  # of the target's rank among the row's admissible columns
    positive_score: Tensor  # mean over the rows of the target's score
    hardest_negative_score: Tensor  # mean of each row's largest negative score, over the rows that have one
    masked: Tensor  # share of the negatives that masks and biases of -inf drop
