"""Losses that need more of a row than a softmax over its columns, in plain torch. A fold computes a chunk of rows.

A fold takes `values` [R, N], the similarities or distances of R rows to all N columns. It returns the rows' losses and
overwrites `values` with `weight_i dloss_i/dvalues_ij`. Each fold has a formula: the same loss, differentiated by
autograd, without a bound on its memory.
"""

# maths.md: Folds
from __future__ import annotations

from typing import NamedTuple

from ..numerics import FOLD_COPIES
from .distillation import DISTILL_COPIES as DISTILL_COPIES
from .distillation import DISTILL_TILE as DISTILL_TILE
from .distillation import distill, distill_ce, distill_ce_formula, distill_formula, distill_mse, distill_mse_formula
from .parts import FAR as FAR
from .parts import Fold, Formula
from .parts import Folded as Folded
from .parts import LogSum as LogSum
from .parts import Part as Part
from .sides import SIDED as SIDED
from .sides import Sides as Sides
from .sides import (
    circle,
    circle_formula,
    multi_similarity,
    multi_similarity_formula,
    proxy_anchor,
    proxy_anchor_formula,
    sup_con_in,
    sup_con_in_formula,
)
from .sides import circle_row as circle_row
from .sides import multi_similarity_row as multi_similarity_row
from .sides import proxy_anchor_row as proxy_anchor_row
from .sides import sup_con_in_row as sup_con_in_row
from .terms import margin_ranking, margin_ranking_formula, pair_hinge, pair_hinge_formula, sigmoid, sigmoid_formula
from .triplets import batch_all, batch_all_formula, semi_hard, semi_hard_formula

# How a fold reads a row: one similarity at a time; two log-sum-exps and then similarities; the whole row at once.
SUM, SIDES, TEACHER, ROW = (
    "loss; count, or gradients by the scalars",
    "log-sum-exps of positives and of negatives",
    "log-sum-exps of student and teacher; loss, gradient by the scale",
    "the whole row",
)


class Forms(NamedTuple):
    """A fold as the registry (`epilogues.py`) holds it."""

    torch: Fold
    formula: Formula
    sums: str  # ROW: the fold needs the whole row; the others a kernel can compute in its tile
    copies: int = FOLD_COPIES  # matrices of a chunk that it needs at most, its values included


FOLDS: dict[str, Forms] = {
    "sigmoid": Forms(sigmoid, sigmoid_formula, SUM),
    "margin_ranking": Forms(margin_ranking, margin_ranking_formula, SUM),
    "pair_hinge": Forms(pair_hinge, pair_hinge_formula, SUM),
    "multi_similarity": Forms(multi_similarity, multi_similarity_formula, SIDES),
    "proxy_anchor": Forms(proxy_anchor, proxy_anchor_formula, SIDES),
    "circle": Forms(circle, circle_formula, SIDES),
    "sup_con_in": Forms(sup_con_in, sup_con_in_formula, SIDES),
    "batch_all": Forms(batch_all, batch_all_formula, ROW),
    "semi_hard": Forms(semi_hard, semi_hard_formula, ROW),
    "distill": Forms(distill, distill_formula, TEACHER, DISTILL_COPIES),
    "distill_ce": Forms(distill_ce, distill_ce_formula, TEACHER, DISTILL_COPIES),
    "distill_mse": Forms(distill_mse, distill_mse_formula, TEACHER, DISTILL_COPIES),
}
