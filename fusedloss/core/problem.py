"""What a sweep is asked to do: operands, blocks of the similarity matrix, and the target of each row.

Every in-batch loss looks at logits

    z[i, j] = scale * f_i * f_j * <x_i, y_j> + bias_j

laid out in one or more blocks side by side that share one row normaliser. Plain InfoNCE is one block; each column of
hard negatives is one more. Operands are listed once and blocks point at them, so a matrix that stands on both sides,
or in several blocks, receives one gradient and is never copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .numerics import SAFE_SCALE

Learned = Annotated[Tensor, "may receive a gradient"]  # as a field's type; other tensors receive none


class Compare(NamedTuple):
    """A number per row and per column: a column with the row's own number is dropped, or nothing else is kept."""

    rows: Tensor  # int64 [M]
    keys: Tensor  # int64 [N]
    keep: bool


class Guide(NamedTuple):
    """Another model's embeddings of a block's rows and columns, of any dimension; they enter as unit vectors."""

    query: Tensor  # [M, G]
    key: Tensor  # [N, G]


class GuideRule(NamedTuple):
    """Drops what the guide finds closer than the row's own target, less a margin (a share of it if `relative`)."""

    margin: float = 0.0
    relative: bool = False


class Margin(NamedTuple):
    """What a target must win by: its cosine becomes `cos(theta + angle) - cosine` (`epilogues.marginal`)."""

    angle: float = 0.0  # radians
    cosine: float = 0.0


NO_MARGIN = Margin()


class RowRule(NamedTuple):
    """What becomes of a row's logits beside its weight: `Problem` explains each. Columns' losses have no rule.

    It travels whole, so that no sweep, ring or backend can leave out one of them.
    """

    label_smoothing: float = 0.0
    decoupled: bool = False
    copies: int = 1
    softcap: float = 0.0
    margin: Margin = NO_MARGIN
    z_loss: float = 0.0


NO_RULE = RowRule()


class Mask(NamedTuple):
    """Which columns of a block may compete; all that is given must agree. The target always may, but for `skip`.

    dense: bool [M, N], True: may compete.
    margin: drops columns whose similarity exceeds the target's by more.
    exempt: int64 [M, E], columns that the margin does not concern; -1: none.
    skip: int64 [M], the one column that the row leaves out (itself); -1: none. skip_offset: how far that is from the
        row's own; across ranks it may be another rank's.
    """

    compare: tuple[Compare, ...] = ()
    dense: Tensor | None = None
    margin: float | None = None
    exempt: Tensor | None = None
    guide: Guide | None = None
    skip: Tensor | None = None
    skip_offset: int = 0

    @property
    def given(self) -> bool:
        none = self.dense is None and self.margin is None and self.guide is None and self.skip is None
        return bool(self.compare) or not none

    def contiguous(self) -> Mask:
        compare = tuple(Compare(c.rows.contiguous(), c.keys.contiguous(), c.keep) for c in self.compare)
        return self._replace(compare=compare, skip=None if self.skip is None else self.skip.contiguous())

    @property
    def keys(self) -> list[Tensor]:
        """What it holds of columns, a row for each; `dense` has rows and columns."""
        return [*(c.keys for c in self.compare), *([] if self.guide is None else [self.guide.key])]

    def map_keys(self, function: Callable[[Tensor], Tensor]) -> Mask:
        """With each of `keys` replaced, as where other ranks' columns are added to them."""
        compare = tuple(c._replace(keys=function(c.keys)) for c in self.compare)
        guide = None if self.guide is None else Guide(self.guide.query, function(self.guide.key))
        return self._replace(compare=compare, guide=guide)

    def columns(self, part: slice) -> Mask:
        """Of some columns, counted from the first of them."""
        # Without a function that holds `part`: torch.compile would take the sizes in it for constants.
        compare = tuple(Compare(c.rows, c.keys[part], c.keep) for c in self.compare)
        dense = None if self.dense is None else self.dense[:, part]
        guide = None if self.guide is None else Guide(self.guide.query, self.guide.key[part])
        exempt, skip = self.exempt, self.skip
        if part.start:
            exempt, skip = (None if x is None else x - part.start for x in (exempt, skip))
        return self._replace(compare=compare, dense=dense, exempt=exempt, guide=guide, skip=skip)

    def turned(self) -> Mask:
        """Of columns as rows; a margin, a guide and what a row skips are one direction's alone."""
        compare = tuple(Compare(c.keys, c.rows, c.keep) for c in self.compare)
        return Mask(compare, None if self.dense is None else self.dense.T)


class Ranks(NamedTuple):
    """The processes that share a batch, where a sweep has to ask them (`collectives`)."""

    group: str  # its name
    rank: int
    sizes: tuple[int, ...]  # rows of each

    @property
    def offset(self) -> int:
        return sum(self.sizes[: self.rank])


def _set(self: object, **fields: object) -> None:
    """Of a frozen dataclass that is being made. Vectors enter contiguous: kernels take an address and no stride."""
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
    mask: Mask = Mask()  # noqa: RUF009  # immutable
    penalty: float = 0.0
    own_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.mask.compare or self.mask.skip is not None:
            _set(self, mask=self.mask.contiguous())


@dataclass(frozen=True)
class Fold:
    """A loss of a row's similarities that is no softmax: `folds.FOLDS[name]` on whole rows of one chunk.

    options: its numbers. labels: of rows and columns. itself: row i stands in column i and is not its own pair.
    distance: "euclidean" or "squared" where the fold sees distances; "cosine": `1 - sim`.
    scalars: 0-dim tensors after the scale, maybe learnable. teacher: embeddings whose logits are the second input.
    """

    name: str
    options: tuple[float, ...] = ()
    labels: tuple[Tensor, Tensor] | None = None
    itself: bool = False
    distance: str = ""
    scalars: tuple[Learned, ...] = ()
    teacher: Guide | None = None
    teacher_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.labels is not None:
            _set(self, labels=tuple(x.contiguous() for x in self.labels))


@dataclass(frozen=True)
class Problem:
    """One sweep. Rows of every block are the same M rows; the target column lies in block 0.

    operands: matrices [rows, D], each any floating dtype (all alike) and any strides.
    blocks: the parts of the row, side by side.
    scale: 0-dim tensor in the statistics dtype (fp32, or fp64 for fp64 operands).
    target: int64 [M], a column of block 0.
        -1 (where `decoupled`, or for a fold): none.
    weight: [M] in the statistics dtype: what each row's loss is multiplied by; 0 leaves a row out.
    cosine: rows of the operands enter as unit vectors; the 1/norms act on the fp32 accumulator.
    label_smoothing: share of the target mass spread evenly over the row's admissible columns.
    symmetric: columns are normalised too (CLIP): `weight[i]/2` of row i's loss plus `weight[j]/2` of column j's.
    scale_bound: `scale` as a Python number where the host knows it, else None. It only ever selects a faster way to
        the same result.
    workspace_bytes: the most that the workspace may take; None: the device's default.
    decoupled: the target stays out of its row's normaliser, too (DCL): `lse_neg - z_t`.
    copies: how often the target's logit stands in its row; what stands in other blocks, too, is skipped there and
        counted here, so that a well-fitted pair's gradient is not a difference of rounded halves.
    guide_rule: how blocks' guides mask.
    wants_tally: count what `Tally` holds.
    fold: instead of the softmax.
    prefixes, prefix_weights: instead of all of D, the weighted sum of the losses of these prefixes, each of whose rows
        is divided by its own norm (`cosine`).
    softcap: logits are bent to `cap * tanh(z / cap)` before the softmax; 0: they are not. The scale has no gradient
        then, as under a margin.
    margin: of the targets' cosines, before the scale (`cosine`).
    z_loss: of the squared log-normaliser, added to each row's loss.
    ranks: the columns are those of all these processes, this one's first; where `symmetric`, each column's normaliser
        is over the rows of all of them.
    top: no loss is asked for, but each row's largest logit (`op.top_rows`).
    every_row: whether the host knows that every row counts, with weight 1; a mean then needs no sum of the weights.
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

    def __post_init__(self) -> None:
        _set(self, target=self.target.contiguous(), weight=self.weight.contiguous())

    @property
    def rule(self) -> RowRule:
        return RowRule(self.label_smoothing, self.decoupled, self.copies, self.softcap, self.margin, self.z_loss)

    @property
    def masked(self) -> bool:
        """Whether rows may have different admissible columns."""
        return any(block.mask.given for block in self.blocks)

    @property
    def smooths_by_row(self) -> bool:
        """Whether smoothing needs each row's own sum of logits: otherwise it is a rank-one correction."""
        return self.label_smoothing != 0 and (self.masked or self.softcap != 0)

    @property
    def bound(self) -> float | None:
        """What no logit but a target's exceeds, as far as the host knows."""
        if self.softcap:
            return self.softcap
        if not self.cosine or self.scale_bound is None:
            return None
        for block in self.blocks:
            if block.bias is not None:
                return None
        return abs(self.scale_bound)

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
