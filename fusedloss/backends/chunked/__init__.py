"""The sweep's primitives in plain torch, on any device: a GEMM into a tile, then in-place passes while it is in cache.

`tiles` has the products, `masks` the columns that may compete, `softmax` the exponentials of whole rows. `half` and
`half_folds` are the same for one matrix against itself, from the tiles on and above the diagonal.
"""

from __future__ import annotations

import torch

from ...core import checks, products
from ...core.folds import FOLDS, SIDED
from ...core.numerics import inverse_norms as inverse_norms
from ...core.numerics import stats_dtype
from ...core.problem import Problem
from ...core.rows import finish as finish  # torch has no faster form of these, which are used as they are
from ...core.rows import merge as merge
from ...core.rows import operand as operand
from ...core.rows import prepare as prepare
from ...core.rows import settle as settle
from .half import half_grad as half_grad
from .half import half_start as half_start
from .half import half_stats as half_stats
from .half_folds import half_sides as half_sides
from .half_folds import half_sides_grad as half_sides_grad
from .half_folds import half_sides_start as half_sides_start
from .half_folds import half_tops as half_tops
from .masks import admitted as admitted
from .masks import guide_room as guide_room
from .masks import guide_rows as guide_rows
from .masks import guide_scores as guide_scores
from .softmax import exp_rows as exp_rows
from .softmax import grad_rows as grad_rows
from .softmax import stats_rows as stats_rows
from .softmax import stats_rows_and_columns as stats_rows_and_columns
from .softmax import top_rows as top_rows
from .tiles import similarities as similarities

# Most bytes of unit copies of the embeddings, which save two passes over every tile and one over the keys for every
# chunk. They take no more than a bounded workspace does.
UNIT_BYTES = 32 << 20


def why_not(problem: Problem) -> str | None:
    return None


def can_exp(problem: Problem) -> bool:
    """Whether `exp_rows` may run. It computes a row's maximum itself, but smoothing with a mask needs sums first.

    fp16 lacks the range for exponentials relative to a maximum that may still grow; it holds only dz and its gain.
    """
    if any(block.mask.factor is not None for block in problem.blocks) and not _multiplies(problem):
        return False
    return not problem.smooths_by_row and workspace_dtype(problem) != torch.float16


def _multiplies(problem: Problem) -> bool:
    """Whether `exp_rows` may multiply the exponentials by a mask's factor as it writes them.

    It does so in its pass without a shift. In the others the similarities are gone when the exponentials are there.
    """
    guided = any(block.mask.guide is not None for block in problem.blocks)
    plain = not problem.softcap and not problem.wants_tally and not guided
    return plain and problem.unshifted and workspace_dtype(problem) == stats_dtype(problem.dtype)


def can_store(problem: Problem) -> bool:
    return False  # rows and columns have shifts of their own


def takes_units(problem: Problem) -> bool:
    """Whether the sweep passes unit rows instead of factors: fp32 copies, so never of 16-bit embeddings."""
    size = sum(x.numel() * x.element_size() for x in problem.operands)
    wide = problem.dtype == stats_dtype(problem.dtype)
    if not problem.cosine or not wide or problem.label_smoothing:
        return False
    _, budget = checks.budget(problem.workspace_bytes)
    return size <= min(UNIT_BYTES, budget or UNIT_BYTES)


def can_fold(problem: Problem) -> bool:
    return False  # folds are in torch


def can_halve(problem: Problem) -> bool:
    """Its tiles stay in a CPU's caches. On a GPU, and where 16-bit matrices are multiplied as they are, they were not
    measured."""
    if problem.device.type != "cpu" or products.narrow(problem.dtype, problem.device):
        return False
    return problem.fold is None or problem.fold.name in SIDED


def can_halve_rows(problem: Problem) -> bool:
    """On a GPU the passes over half of the logits, for rows and for columns, are as many as those over all for rows."""
    return False


def shares_prefixes(problem: Problem) -> bool:
    """In one direction, of a plain softmax of logits without a term that differs between a row's columns."""
    if problem.symmetric or problem.bends or problem.transform is not None or any(problem.margin):
        return False
    if problem.label_smoothing or problem.softcap or problem.z_loss or not problem.bias_on_target:
        return False
    return not any(b.mask.margin is not None or b.penalty or b.own_penalty for b in problem.blocks)


def common_prefixes(problem: Problem) -> tuple[int, ...]:
    return ()


def workspace_copies(problem: Problem) -> float:
    """Returns a chunk's memory in matrices of its size; a guide's fp32 similarities of block 0 are one more."""
    if problem.fold is not None:
        return FOLDS[problem.fold.name].copies
    guide = problem.blocks[0].mask.guide
    if guide is None:
        return 1
    share = problem.operands[problem.blocks[0].key].shape[0] / max(1, problem.columns)
    return 1 + share * stats_dtype(guide.key.dtype).itemsize / workspace_dtype(problem).itemsize


def workspace_dtype(problem: Problem) -> torch.dtype:
    """Folds see the similarities."""
    narrow = problem.fold is None and products.narrow(problem.dtype, problem.device)
    return problem.dtype if narrow else stats_dtype(problem.dtype)
