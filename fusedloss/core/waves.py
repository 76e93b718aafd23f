"""How many rows of a GEMM fill whole waves of a GPU's multiprocessors."""

from __future__ import annotations

import functools

from .numerics import cdiv

GEMM_TILE = (128, 256)  # of the vendor's GEMMs on large products
ACCUMULATION = 244  # reading and writing dy's fp32 sums once a chunk takes 244 / rows of the three products' time


def _filled(rows: int, D: int, multiprocessors: int) -> float:
    """Returns the part of its waves that a GEMM of rows x D fills."""
    tiles = cdiv(rows, GEMM_TILE[0]) * cdiv(D, GEMM_TILE[1])
    return tiles / (cdiv(tiles, multiprocessors) * multiprocessors)


@functools.lru_cache(maxsize=256)
def wave_columns(rows: int, most: int, step: int, multiprocessors: int) -> int:
    """Returns the columns of a panel, a multiple of `step` up to `most`, whose GEMM [rows, columns] fills whole waves.

    On 132 multiprocessors 5632 rows get 768 columns (132 tiles; 1280, which fit 32 MiB, would fill 83 %).
    """
    candidates = range(step, max(step, most) + 1, step)
    return max(candidates, key=lambda columns: (_filled(rows, columns, multiprocessors), columns))


def wave_rows(M: int, D: int, most: int, multiprocessors: int) -> int:
    """Rows a chunk for which dx's GEMM, rows x D, fills whole waves of the device, up to `most`.

    On 132 multiprocessors: 5632 at D = 768 (132 tiles; 4096 rows would fill 73 %), 8448 at D = 1024 and 4096.
    """
    tile_m = GEMM_TILE[0]
    if most >= M:
        return max(1, M)
    if most < 2 * tile_m:
        return max(1, most)
    candidates = range(tile_m, most + 1, tile_m)
    # An idle part of dx's third of the work costs (1 / filled - 1) / 3.
    return min(candidates, key=lambda rows: (1 / _filled(rows, D, multiprocessors) - 1) / 3 + ACCUMULATION / rows)


@functools.lru_cache(maxsize=256)  # 0.2 ms for 66 candidates, and a step asks twice
def half_rows(M: int, D: int, most: int, multiprocessors: int, whole: int, room: int | None) -> int:
    """Rows a chunk, up to `most`, of one matrix of M rows against itself and the rows behind each; 0 if all take less.

    whole: the rows of a chunk against all. room: the elements that may be stored until all sums are known; None: none,
    for want of a safe shift, without which whole rows take four products of M x M x D instead of three. A gradient that
    needs no sums is as if all of them were stored. A chunk's part
    on and above the diagonal has dx's product and two of similarities, or one if they are stored, and the one above it
    dy's.
    """

    def half(rows: int) -> float:
        number, rest = divmod(M, rows)
        columns = number * M - rows * number * (number - 1) // 2  # of all whole chunks
        stored = rows * columns + rest * rest
        above = 1 - stored / M**2
        of_rows = rows * columns / _filled(rows, D, multiprocessors)
        of_rest = rest * rest / _filled(rest, D, multiprocessors) if rest else 0
        times = 1 if room is not None and stored <= room else 2
        return times * (1 - above) + (of_rows + of_rest) / M**2 + above + 3 * ACCUMULATION * (columns + rest) / M**2

    least = (2 if room is not None else 3) + 1 / _filled(whole, D, multiprocessors) + 3 * ACCUMULATION / whole
    candidates = [*range(GEMM_TILE[0], min(most, M - 1) + 1, GEMM_TILE[0]), *([M] if 0 < M <= most else [])]
    best = min(candidates, key=half, default=0)
    return best if best and half(best) < least else 0
