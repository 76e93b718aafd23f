"""Tile shapes as a pure function of the problem: no search, and every run is alike."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Launch options of `similarity_kernel`. SUBTILES = 2 folds a tile in two halves of columns."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    GROUP_M: int
    SUBTILES: int
    num_warps: int
    num_stages: int


# Under half a wave of 128 x 128 tiles on 132 SMs, smaller tiles keep more SMs busy.
FEW_TILES = 66


def pick_config(
    M: int,
    N: int,
    itemsize: int,
    capability: tuple[int, int] | None,
    *,
    tensor_cores: bool = True,
    pressure: int = 0,
) -> Config:
    """The tile for M x N similarities of operands with `itemsize` bytes an element.

    `capability` is the GPU's, None in the interpreter. `tensor_cores` is False for fp32 in full
    precision. `pressure` is what the epilogue keeps in registers: 0 one number per element, 1 also
    its similarity or weights, 2 both for rows and for columns.
    """
    if capability is None:
        return Config(16, 32, 16, GROUP_M=2, SUBTILES=1, num_warps=4, num_stages=1)
    if not tensor_cores:
        return Config(128, 64, 16, GROUP_M=8, SUBTILES=1, num_warps=8, num_stages=2)
    BLOCK_D = 128 // itemsize  # one 128-byte line of each row
    if _cdiv(M, 128) * _cdiv(N, 128) < FEW_TILES:
        return Config(64, 64, BLOCK_D, GROUP_M=8, SUBTILES=1, num_warps=4, num_stages=4)
    if pressure == 0 and itemsize == 2 and capability[0] == 9:
        # 192 KiB of shared memory. On sm_100 the same tile spills, elsewhere it does not fit.
        return Config(128, 256, BLOCK_D, GROUP_M=8, SUBTILES=1, num_warps=8, num_stages=4)
    if pressure == 2 and capability[0] == 10:
        # Tensor memory is read a row per thread, with the vectors of every column: 128 spill.
        return Config(128, 64, BLOCK_D, GROUP_M=8, SUBTILES=1, num_warps=8, num_stages=4)
    # 96 KiB, 128 on sm_90 and sm_100: within every limit, sm_120's 99 KiB included.
    return Config(128, 128, BLOCK_D, GROUP_M=8, SUBTILES=2, num_warps=8, num_stages=4)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
