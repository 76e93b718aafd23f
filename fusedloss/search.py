"""Exact nearest neighbours: `top_k` computes scores tile by tile, keeps k columns a row and stores no score matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .core import checks
from .core.numerics import cdiv, stats_dtype

SIMILARITIES = ("cos", "dot", "euclidean", "manhattan")
# A tile has TILE scores, 32 MiB in fp32. Wide tiles need fewer merges. A merge sorts k columns and the new ones, at 55
# ns each; torch.topk takes 3 to 12 ns for each column of a long row. But products of fewer than TALL rows are up to a
# third slower, and each of the short steps around a product waits for all threads.
TILE, TALL, MIN_ROWS, MIN_COLUMNS, COLUMNS_PER_K, LEAST_PER_K = 1 << 23, 400, 64, 2048, 256, 8
SLAB_BYTES = 32 << 20  # of the corpus that are converted, normalised or moved at a time
GROUP = 64  # columns whose largest score alone is compared first, in a sixth of the time of comparing all
CROWDED = 8  # a tile is merged in 8 parts if some row has more than an eighth of its groups above the threshold


@torch.no_grad()
def top_k(query: Tensor, corpus: Tensor, k: int, *, similarity: str = "cos") -> tuple[Tensor, Tensor]:
    """Returns the k most similar rows of `corpus` for each row of `query`, exactly.

        scores[i], indices[i] = topk over j of similarity(query[i], corpus[j])

    The result is that of `torch.topk(query @ corpus.T, k)`, without the `[M, N]` matrix. Beside inputs and results the
    search takes a tile of 2^23 scores (or 64 rows of 8 k), and 32 MiB of the corpus if it converts, normalises or moves
    it. Of equal scores, whose order torch.topk leaves open, the lowest index comes first, in every run. NaN ranks above
    every number, as in torch.topk.

    Args:
        query: `[M, D]`, float16, bfloat16, float32 or float64, any strides. The search runs on its device.
        corpus: `[N, D]`, of the same dtype, on the same device or on the CPU.
        k: a whole number from 1.
        similarity: "cos" (norms of at least 1e-12), "dot", or the negative of a distance, "euclidean" or "manhattan".

    Returns:
        scores: `[M, k]`, descending, float32, or float64 for float64 inputs; 16-bit embeddings are multiplied in fp32.
        indices: `[M, k]`, int64.
        If N < k, the columns from N on hold -inf and the index -1. The results have no gradient.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.

    Example:
        >>> scores, indices = fusedloss.search.top_k(encoder(questions), encoder(passages), 10)
    """
    checks.embeddings(query=query)
    moves = isinstance(corpus, Tensor) and corpus.device.type == "cpu"
    checks.embeddings(query=query[:0].cpu() if moves else query, corpus=corpus)
    checks.count("k", k, optional=False)
    checks.choice("similarity", similarity, SIMILARITIES)

    found = min(k, corpus.shape[0])
    scores = query.new_full((query.shape[0], k), -math.inf, dtype=stats_dtype(query.dtype))
    indices = query.new_full((query.shape[0], k), -1, dtype=torch.int64)
    if not found:
        return scores, indices
    columns = max(MIN_COLUMNS, TILE // max(MIN_ROWS, query.shape[0]), min(COLUMNS_PER_K * found, TILE // TALL))
    columns = max(columns, LEAST_PER_K * found)
    with torch.autocast(query.device.type, enabled=False):
        for first, slab in _slabs(corpus, max(MIN_COLUMNS, LEAST_PER_K * found), scores, similarity):
            width = _whole_groups(min(columns, slab.shape[0]), found)
            rows = max(MIN_ROWS, TILE // width)
            for start in range(0, query.shape[0], rows):
                part = slice(start, start + rows)
                held = scores[part, :found], indices[part, :found]
                x = _prepared(query[part], scores, similarity)
                space = x.new_empty(x.shape[0] * width)
                column = 0
                while column < slab.shape[0]:
                    y = slab[column : column + _whole_groups(min(width, slab.shape[0] - column), found)]
                    z = _scores(x, y, similarity, space[: x.shape[0] * y.shape[0]].view(x.shape[0], -1))
                    _merge_(held, z, first + column)
                    column += len(y)
    return scores, indices


def _prepared(x: Tensor, like: Tensor, similarity: str) -> Tensor:
    x = x.to(like)
    return F.normalize(x, dim=1) if similarity == "cos" else x


def _whole_groups(width: int, least: int) -> int:
    """Returns `width` rounded down to whole groups, unless that is below `least`: the first tile needs k columns.

    The remaining columns become a narrow tile.
    """
    whole = width - width % GROUP
    return whole if whole >= least else width


def _slabs(corpus: Tensor, least: int, like: Tensor, similarity: str) -> Iterator[tuple[int, Tensor]]:
    """Yields slabs of the corpus in order: the index of the first row, and the rows, ready to be scored."""
    if similarity != "cos" and corpus.dtype == like.dtype and corpus.device == like.device:
        yield 0, corpus
        return
    rows = max(least, SLAB_BYTES // (corpus.shape[1] * like.element_size()) // GROUP * GROUP)
    for start in range(0, corpus.shape[0], rows):
        yield start, _prepared(corpus[start : start + rows], like, similarity)


def _scores(x: Tensor, y: Tensor, similarity: str, out: Tensor) -> Tensor:
    if similarity in ("cos", "dot"):
        return torch.mm(x, y.T, out=out)
    return torch.cdist(x, y, p=2.0 if similarity == "euclidean" else 1.0).neg_()


def _merge_(held: tuple[Tensor, Tensor], z: Tensor, first: int) -> None:
    """Merges the scores `z`, of the columns from `first` on, into the best of the columns before."""
    if not first:
        _begin_(held, z)
        return
    scores, indices = held
    # A later column must beat the bound, because it loses a tie. A bound of NaN is +inf here, which only NaN beats.
    bound = scores[:, -1:].nan_to_num(math.inf, math.inf, -math.inf)
    group = math.gcd(z.shape[1], GROUP)
    above = ~(z.view(len(z), -1, group).amax(2) <= bound)
    parts = 1 if int(above.sum(1).amax()) * CROWDED <= above.shape[1] else CROWDED
    step = cdiv(len(z), parts)
    for start in range(0, len(z), step):
        part = slice(start, start + step)
        _add_(scores[part], indices[part], z[part], above[part], bound[part], first)


def _begin_(held: tuple[Tensor, Tensor], z: Tensor) -> None:
    """Writes the best of the first tile, from torch.topk, with equal scores in ascending order of their indices."""
    scores, indices = held
    k = scores.shape[1]
    best, where = z.topk(min(k + 1, z.shape[1]))
    scores.copy_(best[:, :k])
    indices.copy_(where[:, :k])
    tied = (~(best[:, 1:] < best[:, :-1])).any(1).nonzero()[:, 0]  # rows with equal scores, or NaN
    if not len(tied):
        return
    where, order = where[tied, :k].sort(dim=1)
    values, order = best[tied, :k].gather(1, order).sort(dim=1, descending=True, stable=True)
    scores[tied], indices[tied] = values, where.gather(1, order)
    if z.shape[1] <= k:
        return
    # If the score after the k-th is equal to it, columns that topk left out may have lower indices.
    tied = tied[~(best[tied, k] < best[tied, k - 1])]
    for part in tied.split(max(1, len(z) // (4 * CROWDED))):
        own, group = z[part], math.gcd(z.shape[1], GROUP)
        nothing = own.new_full((len(part), 1), math.nan)
        above = torch.ones(len(part), own.shape[1] // group, dtype=torch.bool, device=z.device)
        values, where = own.new_full((len(part), k), -math.inf), part.new_full((len(part), k), -1)
        _add_(values, where, own, above, nothing, 0)
        scores[part], indices[part] = values, where


def _add_(scores: Tensor, indices: Tensor, z: Tensor, above: Tensor, bound: Tensor, first: int) -> None:
    """Merges the scores in `z` that beat `bound` into the best of the columns before.

    above: whether a group holds any of them.
    """
    k, group = scores.shape[1], z.shape[1] // above.shape[1]
    row, block = above.nonzero(as_tuple=True)
    if not len(row):
        return
    values = z.view(-1, group).index_select(0, row * above.shape[1] + block)
    hit, lane = (~(values <= bound[row])).nonzero(as_tuple=True)
    row, column, values = row[hit], block[hit] * group + lane + first, values[hit, lane]
    counts = torch.bincount(row, minlength=len(z))
    if int(counts.max()) > 2 * k + GROUP:  # then only the k best of the tile are sorted
        least = z.topk(min(k, z.shape[1])).values[:, -1].nan_to_num(math.inf, math.inf, -math.inf)
        taken = ~(values < least[row])
        row, column, values = row[taken], column[taken], values[taken]
        counts = torch.bincount(row, minlength=len(z))

    place = torch.arange(len(row), device=z.device) - (counts.cumsum(0) - counts)[row]
    touched = counts.nonzero()[:, 0]
    order = torch.zeros_like(counts)
    order[touched] = torch.arange(len(touched), device=z.device)
    kept = k if first else 0
    shape = (len(touched), kept + int(counts.max()))
    all_scores, all_indices = z.new_full(shape, -math.inf), row.new_full(shape, -1)
    all_scores[:, :kept], all_indices[:, :kept] = scores[touched, :kept], indices[touched, :kept]
    all_scores[order[row], kept + place], all_indices[order[row], kept + place] = values, column
    all_scores, chosen = all_scores.sort(dim=1, descending=True, stable=True)
    scores[touched] = all_scores[:, :k]
    indices[touched] = all_indices.gather(1, chosen[:, :k])
