"""Masks: the columns that may compete in a row's loss. Small specifications, evaluated tile by tile, joined by `&`.

    mask = masks.same_id(document_ids, document_ids) & masks.score_margin(0.1)
    fusedloss.info_nce(query, key, mask=mask)

A column competes if every part admits it. The row's own target always competes, except under `not_self`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .core import checks
from .core import mask as core
from .core.numerics import row_numbers

STRATEGIES = ("absolute", "relative")
LARGEST_TOKEN = 2**31 - 1  # each token and place is another int64


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask made by this module's functions; `a & b` admits the columns that both admit."""

    compare: tuple[tuple[str, core.Compare], ...] = ()  # with the name of the function that made each
    dense: Tensor | None = None
    margin: float | None = None
    exempt: Tensor | None = None
    guide: core.Guide | None = None
    rule: core.GuideRule = field(default_factory=core.GuideRule)
    offset: int | None = None
    relative: float = 1.0  # of score_margin, as is `factor`
    factor: float | None = None

    def __and__(self, other: Mask | Tensor) -> Mask:
        if isinstance(other, Tensor):
            other = Mask(dense=other)
        if not isinstance(other, Mask):
            raise TypeError(
                f"a mask must be joined with one of fusedloss.masks or a bool tensor [M, N], got {checks.a(other)}"
            )
        for part in (self.dense, other.dense):
            if part is not None and part.dtype != torch.bool:
                raise TypeError(
                    f"a mask must be joined with a bool tensor [M, N], True for what may compete, got {part.dtype}"
                )
        if self.dense is not None and other.dense is not None and self.dense.shape != other.dense.shape:
            shapes = f"{list(self.dense.shape)} and {list(other.dense.shape)}"
            raise ValueError(
                f"bool tensors joined in a mask must have one shape [M, N], got {shapes}; expand the smaller"
            )
        for name in ("margin", "guide", "offset"):
            if getattr(self, name) is not None and getattr(other, name) is not None:
                made_by = {"margin": "score_margin", "guide": "guide", "offset": "not_self"}[name]
                raise ValueError(f"a mask must hold at most one masks.{made_by}, got two")
        dense = self.dense if other.dense is None else other.dense if self.dense is None else self.dense & other.dense
        chosen = replace(self if self.guide is not None else other, compare=self.compare + other.compare, dense=dense)
        return replace(
            chosen,
            margin=self.margin if self.margin is not None else other.margin,
            exempt=self.exempt if self.margin is not None else other.exempt,
            relative=self.relative if self.margin is not None else other.relative,
            factor=self.factor if self.margin is not None else other.factor,
            offset=self.offset if self.offset is not None else other.offset,
        )

    __rand__ = __and__


def same_id(row_ids: Tensor, key_ids: Tensor) -> Mask:
    """Drops columns with the row's id (duplicates, the same label), except the target.

    row_ids: int64 `[M]`. key_ids: int64 `[N]`.
    """
    return Mask(compare=(("same_id", core.Compare(row_ids, key_ids, False)),))


def same_group(row_groups: Tensor, key_groups: Tensor) -> Mask:
    """Keeps only columns of the row's own group (a data set, a language). int64 `[M]` and `[N]`."""
    return Mask(compare=(("same_group", core.Compare(row_groups, key_groups, True)),))


def score_margin(
    margin: float = 0.0, exempt: Tensor | None = None, *, relative: float = 1.0, factor: float | None = None
) -> Mask:
    """Drops negatives whose similarity is above `relative` times the target's plus `margin`, before temperature and
    bias.

    `relative=0.95` is NV-Retriever's rule (arXiv 2407.15831): above 95 % of a positive's score a negative is a false
    one. `margin=0.1` is Qwen3-Embedding's.

    exempt: int64 `[M, E]`, columns that are never dropped (curated hard negatives); -1 for none. factor: from 0 to 1,
    multiplies the similarity of such a negative instead of dropping it, as colpali's `filter_factor` (its
    `filter_threshold` is `relative`); on backends "chunked", "dense" and "reference". A similarity below 0 rises.
    Scores within (4 + D / 4) eps of the threshold, times both lengths, are ties and stay; within 2^-9 more if torch's
    switch allows TF32 for fp32 products.
    """
    checks.number("margin", margin)
    checks.number("relative", relative)
    if factor is not None:
        checks.share("factor", factor)
        factor = float(factor)
    return Mask(margin=float(margin), exempt=exempt, relative=float(relative), factor=factor)


def guide(guide_query: Tensor, guide_key: Tensor, *, margin: float = 0.0, strategy: str = "absolute") -> Mask:
    """Drops columns that a guide model finds closer than the row's own target (GISTEmbed, Solatorio 2024).

        dropped where cos(gq_i, gk_j) > t_i - margin          (absolute), or
                      cos(gq_i, gk_j) > t_i - |t_i| * margin  (relative);    t_i = cos(gq_i, gk_target_i)

    guide_query: `[M, G]` and guide_key: `[N, G]`, of any dimension and floating dtype; they receive no gradient.
    Ties within (4 + G / 4) eps count as not dropped.
    """
    checks.embeddings(guide_query=guide_query, guide_key=guide_key)
    checks.number("margin", margin)
    checks.choice("strategy", strategy, STRATEGIES)
    rule = core.GuideRule(float(margin), strategy == "relative")
    return Mask(guide=core.Guide(guide_query.detach(), guide_key.detach()), rule=rule)


def not_self(offset: int = 0) -> Mask:
    """Drops column `i + offset` of row i, the row itself. If that is the target, the row is left out."""
    checks.index("offset", offset)
    return Mask(offset=int(offset))


def text_ids(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """A number for each text, equal where all tokens are: for `same_id`, and `ids=` of the ranking losses.

        id = sum over its tokens of mix(token, place)    mod 2^64

    mix is splitmix64 (Steele et al. 2014), which gives each token and place another number. Numbers do not depend on
    the padding's width and side, the device or the process. Two different texts have one number with probability 2^-64:
    among 131072 texts 5e-10 that any two do.

    Args:
        input_ids: `[rows, places]`, integers from 0 to 2^31 - 1, on a CPU, where values are read; those of the padding
            may be any.
        attention_mask: `[rows, places]`, integers or bool, 0 for padding; None: no padding.

    Returns:
        int64 `[rows]`.

    Raises:
        ValueError, TypeError: a shape, dtype or token that does not fit.

    Example:
        >>> tokens = tokenizer(answers, padding=True, return_tensors="pt")
        >>> ids = masks.text_ids(tokens["input_ids"], tokens["attention_mask"])
        >>> fusedloss.info_nce(query, key, mask=masks.same_id(ids, ids)).backward()
    """
    for name, x in {"input_ids": input_ids, "attention_mask": attention_mask}.items():
        if x is None and name == "attention_mask":
            continue
        if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex():
            got = x.dtype if isinstance(x, Tensor) else checks.a(x)
            raise TypeError(f"{name} must be a tensor of integers, got {got}; tokens are made by a tokenizer")
        if x.dim() != 2 or x.shape != input_ids.shape:
            wanted = "[rows, places]" if x is input_ids else f"{list(input_ids.shape)}, like input_ids"
            raise ValueError(f"{name} must be {wanted}, got shape {list(x.shape)}; pad the texts to one length")
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    if checks.reads_values(input_ids) and input_ids.numel():
        least, most = (int(end) for end in input_ids.where(real, 0).aminmax())
        if least < 0 or most > LARGEST_TOKEN:
            outside = least if least < 0 else most
            raise ValueError(
                f"input_ids must hold numbers from 0 to {LARGEST_TOKEN}, got {outside}; pass attention_mask, "
                "0 for padding"
            )
    mixed = _mixed(input_ids.long() * 2**32 + real.cumsum(1))
    return mixed.masked_fill_(~real, 0).sum(1)


def _mixed(x: Tensor) -> Tensor:
    """Returns splitmix64's last steps, a permutation of the int64s. Torch shifts the sign in, so it is cut off."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x


def bind(mask: Mask | Tensor | None, rows: int, widths: Sequence[int], like: Tensor) -> list[core.Mask]:
    """Checks the mask against the batch, and returns that of each block; blocks stand side by side.

    A mask that is None has no tensors at all, so that compiled graphs keep one shape for it.
    """
    if mask is None:
        return [core.NO_MASK] * len(widths)
    if isinstance(mask, Tensor):
        mask = Mask(dense=mask)
    if not isinstance(mask, Mask):
        raise TypeError(
            f"mask must be one of fusedloss.masks or a bool tensor, got {checks.a(mask)}{checks.remedy(mask)}"
        )
    columns = sum(widths)
    for name, (row_ids, key_ids, _) in mask.compare:
        side = ("row_groups", "key_groups") if name == "same_group" else ("row_ids", "key_ids")
        checks.integers(f"{name}'s {side[0]}", row_ids, (rows,), like)
        checks.integers(f"{name}'s {side[1]}", key_ids, (columns,), like)
    if mask.dense is not None:
        checks.boolean("mask", mask.dense, (rows, columns), like)
    if mask.exempt is not None:
        checks.integers("score_margin's exempt", mask.exempt, (rows, None), like)
        if checks.reads_values(mask.exempt) and mask.exempt.numel():
            low, high = (int(end) for end in mask.exempt.aminmax())
            if low < -1 or high >= columns:
                got = low if low < -1 else high
                raise IndexError(
                    f"score_margin's exempt must hold columns from 0 to {columns - 1}, or -1 for none, got {got}"
                )
    if mask.guide is not None:
        for name, x, count in zip(("guide_query", "guide_key"), mask.guide, (rows, columns), strict=True):
            if x.shape[0] != count:
                raise ValueError(f"{name} must have {count} rows, as many as the loss has, got {x.shape[0]}")
            checks.same_device(name, x, "the embeddings", like)
    own = None if mask.offset is None else row_numbers(rows, like) + mask.offset
    compare = tuple(c for _, c in mask.compare)
    offset = mask.offset or 0
    whole = core.Mask(
        compare, mask.dense, mask.margin, mask.exempt, mask.guide, own, offset, mask.relative, mask.factor
    )
    masks, start = [], 0
    for width in widths:
        masks.append(whole.columns(slice(start, start + width)))
        start += width
    return masks


def mirrored(mask: Mask | Tensor | None) -> bool:
    """Whether a mask of rows against themselves admits (j, i) where it admits (i, j), by what it is made of."""
    if not isinstance(mask, Mask):
        return mask is None
    by_row = mask.dense is not None or mask.margin is not None or mask.guide is not None or bool(mask.offset)
    return not by_row and all(c.rows is c.keys for _, c in mask.compare)


def rule(mask: Mask | Tensor | None) -> core.GuideRule:
    return mask.rule if isinstance(mask, Mask) else core.GuideRule()
