"""How many rows of a GEMM fill whole waves of a GPU's multiprocessors."""

from __future__ import annotations

from .numerics import cdiv

GEMM_TILE = (128, 256)  # of the vendor's GEMMs on large products
ACCUMULATION = 244  # reading and writing dy's fp32 sums once a chunk takes 244 / rows of the three products' time


def wave_rows(M: int, D: int, most: int, multiprocessors: int) -> int:
    """Rows a chunk for which dx's GEMM, rows x D, fills whole waves of the device, up to `most`.

    On 132 multiprocessors: 5632 at D = 768 (132 tiles; 4096 rows would fill 73 %), 8448 at D = 1024 and 4096.
    """
    tile_m, tile_n = GEMM_TILE
    if most >= M:
        return max(1, M)
    if most < 2 * tile_m:
        return max(1, most)
    columns = cdiv(D, tile_n)

    def filled(rows: int) -> float:
        tiles = rows // tile_m * columns
        return tiles / (cdiv(tiles, multiprocessors) * multiprocessors)

    candidates = range(tile_m, most + 1, tile_m)
    # An idle part of dx's third of the work costs (1 / filled - 1) / 3.
    return min(candidates, key=lambda rows: (1 / filled(rows) - 1) / 3 + ACCUMULATION / rows)
