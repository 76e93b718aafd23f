"""The number of rows in a chunk of a sweep, and the workspace that holds it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..backends.protocol import Sweeps
from ..core import checks
from ..core.folds import FOLDS, SIDES
from ..core.numerics import cdiv, stats_dtype
from ..core.problem import Problem
from ..core.rows import fold_places, fresh
from ..core.strips import Tile
from ..core.waves import half_rows, wave_rows

MIB = 1 << 20
GIB = 1 << 30
# The workspace holds one row chunk. CPU: 256 rows at N = 65536, 1024 at 16384.
CPU_BYTES, CPU_ROWS = checks.WORKSPACE_BYTES["cpu"], 1024
MIN_ROWS = 64  # fewer make dy's rank-k update memory-bound
# On a GPU dy's accumulation costs 244 / rows of the products' time on an H200 (6 % at 4096), at any N and D: a chunk of
# 4096 rows is worth 1 GiB at N = 131072, 8 GiB at N = 2**20, if the card has that memory.
CUDA_BYTES, CUDA_ROWS = checks.WORKSPACE_BYTES["cuda"], 8448
CUDA_LEAST_ROWS, CUDA_SHARE = 3840, 16  # the default exceeds CUDA_BYTES for so many rows; at most this part of the card
STATS_ROWS = {"cpu": 1024, "cuda": CUDA_ROWS}  # a sweep that stores nothing has partial sums only
STRIP_STATS_ROWS = 2048  # likewise, against itself and the rows behind it: itself, 128 tiles of 128 x 256, are a wave
CONVERTED_COLUMNS = 4096  # at a time, if a product needs the workspace in another dtype
PAD = 16  # elements: each block's part of a workspace row starts and ends so; kernels write 16 bytes at a time


def chunk_rows(M: int, N: int, D: int, itemsize: int, device: torch.device, workspace_bytes: int | None = None) -> int:
    """Returns the rows of a chunk, so that `rows * N * itemsize` fits the budget: argument, environment or default."""
    name, workspace_bytes = checks.budget(workspace_bytes)
    row_bytes = max(1, N * itemsize)
    if workspace_bytes is not None and workspace_bytes < row_bytes and M:
        raise ValueError(
            f"{name} must be at least {row_bytes}, the bytes of one row of {N} similarities, got {workspace_bytes}; "
            f"allow {MIN_ROWS} rows, {MIN_ROWS * row_bytes} bytes, or more"
        )
    if device.type == "cuda":
        return gpu_rows(M, D, row_bytes, _properties(device), workspace_bytes)
    rows = min(CPU_ROWS, (workspace_bytes or CPU_BYTES) // row_bytes)
    if rows < MIN_ROWS and workspace_bytes is not None:
        return min(max(rows, 1), max(M, 1))
    return max(1, min(max(MIN_ROWS, rows // MIN_ROWS * MIN_ROWS), M))


class Card(Protocol):
    """What the chunks' size asks of a GPU: torch's properties of a device, or a row of a table."""

    @property
    def multi_processor_count(self) -> int: ...
    @property
    def total_memory(self) -> int: ...


def gpu_rows(M: int, D: int, row_bytes: int, card: Card, workspace_bytes: int | None) -> int:
    """Returns the rows of a chunk on a GPU."""
    most = min(CUDA_ROWS, gpu_bytes(row_bytes, card, workspace_bytes) // row_bytes)
    return wave_rows(M, D, most, card.multi_processor_count)


def gpu_bytes(row_bytes: int, card: Card, workspace_bytes: int | None) -> int:
    """Returns the budget on a GPU."""
    least = min(CUDA_LEAST_ROWS * row_bytes, card.total_memory // CUDA_SHARE)
    return max(CUDA_BYTES, least) if workspace_bytes is None else workspace_bytes


def workspace_shape(problem: Problem, backend: Sweeps) -> tuple[tuple[int, int], torch.dtype]:
    """Returns (rows, columns) and dtype of the workspace; raises if the budget does not allow one."""
    dtype, D = backend.workspace_dtype(problem), problem.operands[0].shape[1]
    width = width_of(problem)
    beside = math.ceil(width * backend.workspace_copies(problem))
    rows = chunk_rows(problem.rows, beside, D, dtype.itemsize, problem.device, problem.workspace_bytes)
    return (rows, width), dtype


def prefix_rows(problem: Problem) -> int:
    """Returns the rows of a chunk that holds the logits of all prefixes; raises if the budget does not allow one."""
    width, D = len(problem.prefixes) * problem.columns, problem.operands[0].shape[1]
    itemsize = stats_dtype(problem.dtype).itemsize
    return chunk_rows(problem.rows, width, D, itemsize, problem.device, problem.workspace_bytes)


def rows_of_panels(problem: Problem, backend: Sweeps, count: int) -> int:
    """Returns the rows of a chunk with `count` parts of the workspace; 0 if the budget allows none."""
    width, dtype = count * width_of(problem), backend.workspace_dtype(problem)
    budget = checks.budget(problem.workspace_bytes)[1]
    if budget is not None and budget < width * dtype.itemsize:
        return 0
    D = problem.operands[0].shape[1]
    return chunk_rows(problem.rows, width, D, dtype.itemsize, problem.device, problem.workspace_bytes)


def strip_rows(problem: Problem, backend: Sweeps) -> int:
    """Returns the rows of a chunk that stands against itself and the rows behind it; 0 if that would save nothing.

    All of them, or a multiple of PAD: columns that start behind a chunk keep the alignment of the kernels' loads.
    """
    (rows, width), _ = workspace_shape(problem, backend)
    M, D = problem.operands[0].shape
    if problem.device.type == "cuda":
        room, processors = _room(problem, backend), _properties(problem.device).multi_processor_count
        most = min(CUDA_ROWS, room // width)
        rows = half_rows(M, D, most, processors, rows, _kept(problem, backend, room))
    return rows // PAD * PAD if rows < M else rows


def _kept(problem: Problem, backend: Sweeps, room: int) -> int | None:
    """Returns how many elements need not be multiplied again for the gradient; None: it needs sums of all first."""
    if problem.fold is not None:
        return None if FOLDS[problem.fold.name].sums == SIDES else problem.rows**2
    return room if backend.can_store(problem) else None


def _room(problem: Problem, backend: Sweeps) -> int:
    """Returns the elements that the budget allows for the workspace."""
    size, budget = backend.workspace_dtype(problem).itemsize, checks.budget(problem.workspace_bytes)[1]
    if problem.device.type == "cuda":
        return gpu_bytes(_block_widths(problem)[0] * size, _properties(problem.device), budget) // size
    return (budget or CPU_BYTES) // size


def tile_rooms(problem: Problem, backend: Sweeps, tiles: Sequence[Tile]) -> tuple[list[Tensor], bool]:
    """Returns workspace for tiles, and whether each has its own: the same for all, where they do not fit side by side
    or may not be stored."""
    shapes = [(tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start) for tile in tiles]
    sizes = [rows * cdiv(columns, PAD) * PAD for rows, columns in shapes]
    stores = problem.fold is None and backend.can_store(problem) and sum(sizes) <= _room(problem, backend)
    room = fresh(problem.scale, (sum(sizes) if stores else max(sizes),), backend.workspace_dtype(problem))
    parts = room.split(sizes) if stores else [room[:size] for size in sizes]
    return [part.view(rows, -1)[:, :columns] for part, (rows, columns) in zip(parts, shapes, strict=True)], stores


def _block_widths(problem: Problem) -> list[int]:
    return [cdiv(problem.operands[block.key].shape[0], PAD) * PAD for block in problem.blocks]


def width_of(problem: Problem) -> int:
    """Returns the columns of the workspace."""
    if problem.fold is None:
        return sum(_block_widths(problem))
    return cdiv(fold_places(problem, PAD)[-1].stop, PAD) * PAD


@functools.cache
def _properties(device: torch.device):
    return torch.cuda.get_device_properties(device)


def workspace(problem: Problem, backend: Sweeps) -> Tensor:
    shape, dtype = workspace_shape(problem, backend)
    return fresh(problem.scale, shape, dtype)


def half_sides(problem: Problem, backend: Sweeps) -> tuple[int, int]:
    """Returns the side of a square tile, and the number of tiles that the workspace has room for beside two of them."""
    dtype, D = backend.workspace_dtype(problem), problem.operands[0].shape[1]
    copies = max(2, math.ceil(backend.workspace_copies(problem)))
    row = min(CPU_ROWS, problem.rows) * copies
    side = chunk_rows(problem.rows, row, D, dtype.itemsize, problem.device, problem.workspace_bytes)
    budget = checks.budget(problem.workspace_bytes)[1] or CPU_BYTES
    return side, max(0, budget // (side * side * dtype.itemsize) - copies)


def rooms(problem: Problem, backend: Sweeps, count: int, side: int) -> Iterator[Tensor]:
    """Returns `count` parts of the workspace, each for a tile."""
    return iter(fresh(problem.scale, (count, side * side), backend.workspace_dtype(problem)).unbind(0))


def of_blocks(problem: Problem, workspace: Tensor, chunk: slice) -> list[Tensor]:
    """Returns each block's part of the workspace, for the rows of a chunk."""
    outs, start = [], 0
    rows = chunk.stop - chunk.start
    for block, width in zip(problem.blocks, _block_widths(problem), strict=True):
        shape = rows, problem.operands[block.key].shape[0]
        outs.append(workspace if workspace.shape == shape else workspace[:rows, start : start + shape[1]])
        start += width
    return outs


def stats_rows(device: torch.device) -> int:
    """Returns the rows of a chunk in a sweep that stores nothing."""
    return STATS_ROWS.get(device.type, STATS_ROWS["cpu"])
