"""`fusedloss.cost`: what a step of an in-batch loss takes, before it runs.

Mode and workspace are what the sweep's own rules answer. Seconds are those of GPUs in a table, on paper: the vendor's
products at a published rate, and the similarities by a model of Triton's kernels (`docs/results/gpu-model.md`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .backends import chunked, dense, shared
from .core import checks
from .core.mask import Guide, Mask
from .core.numerics import stats_dtype
from .core.problem import Block, Problem
from .core.waves import ACCUMULATION, half_rows
from .sweep import chunks

LOSSES = ("info_nce", "multiple_negatives_ranking", "clip", "nt_xent", "gist_embed", "linear_cross_entropy")
COSINE = ("multiple_negatives_ranking", "nt_xent", "gist_embed")
SQUARE = ("clip", "nt_xent", "gist_embed")  # as many rows as columns
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Cost(NamedTuple):
    """What one forward and backward takes: see `cost`.

    mode: how the sweep walks its chunks. products: matrix products of M x N x D, flops: 2 M N D times as many
    operations. workspace_bytes, peak_bytes: bytes. share: from 0 to 1, or None. seconds: or None.
    """

    mode: str
    products: float
    flops: float
    workspace_bytes: int
    peak_bytes: int
    share: float | None
    seconds: float | None


class Gpu(NamedTuple):
    """tflops: what the vendor's bf16 products reach. bandwidth: bytes a second. folds: by `MODES`, a and b of the share
    D / (a D + b) of that rate that a similarity kernel reaches; none where that is not known."""

    multi_processor_count: int
    total_memory: int
    tflops: float
    bandwidth: float
    folds: tuple[tuple[float, int], ...] = ()


# `tools/pipeline_model.py`, of Triton's kernels in bf16: tests/public/test_cost.py holds them to it.
MODES = ("stats", "exp", "grad", "stats, columns", "exp, columns", "grad, columns")
HOPPER = ((1, 361), (1, 383), (1, 375), (1, 653), (1, 487), (1.33, 643))
FOLDS = {
    "a100": ((1, 361), (1, 378), (1, 362), (1, 459), (1, 416), (1, 409)),
    "l40s": ((1, 180), (1, 189), (1, 181), (1, 229), (1, 208), (1, 204)),
    "h100": HOPPER,
    "h200": HOPPER,
    "b200": ((2, 1057), (2, 1589), (2, 1189), (2, 2233), (2, 2077), (2, 1481)),
}
# tflops: the most that bf16 matmuls were measured to reach ("Maximum Achievable Matmul FLOPS" of
# github.com/stas00/ml-engineering); of the L40S 0.8 of the data sheet's, since the others reach 0.78 to 0.86.
# bandwidth: 0.9 of the data sheet's.
GPUS = {
    "a100": Gpu(108, 80 << 30, 267.9, 1.84e12),
    "l40s": Gpu(142, 48 << 30, 290.0, 0.78e12),
    "h100": Gpu(132, 80 << 30, 794.5, 3.0e12),
    "h200": Gpu(132, 141 << 30, 794.5, 4.3e12),
    "b200": Gpu(148, 180 << 30, 1745.0, 7.2e12),
}
# The kernels that compute similarities, by mode, and the products beside them.
KERNELS = {
    "exp": (("exp",), 2),
    "stats, then grad": (("stats", "grad"), 2),
    "stored": (("exp, columns",), 2),
    "symmetric": (("stats, columns", "grad, columns"), 2),
    "half, stored": (("exp, columns",), 1),
    "half": (("stats, columns", "grad, columns"), 1),
}
STEP_BYTES = 20 << 10  # by feature: scaled rows, a tile's columns, products of a chunk (`docs/memory.md`)
VECTORS = 40  # bytes by row and column: sums, weights, targets, norms


def cost(
    loss: str,
    M: int,
    N: int,
    D: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    bound: float | None = None,
    workspace_bytes: int | None = None,
) -> Cost:
    """What a forward and backward of an in-batch loss takes, before it runs. Nothing of M x N is allocated.

        flops   = 2 M N D * products
        seconds = similarities / (share * rate) + other products / rate,  each at least its bytes / bandwidth

    Args:
        loss: "info_nce", "multiple_negatives_ranking", "clip", "nt_xent", "gist_embed" (anchors and positives alone) or
            "linear_cross_entropy", whose N are the classes.
        M, N: the rows and columns of the similarities; of `nt_xent` both are the rows of both views.
        D: the dimension of an embedding.
        dtype: of the embeddings.
        device: "cpu", a CUDA device of this machine, or "a100", "l40s", "h100", "h200", "b200".
        bound: a bound of the logits that the loss knows beforehand: `1 / temperature` where the temperature is a
            number and rows are unit vectors (`normalize=True`, or a loss of cosines). None: none is known. The kernels
            compute similarities twice without one.
        workspace_bytes: as the losses take it.

    Returns:
        A `Cost`. mode: how the sweep walks (`DESIGN.md`), "dense" for a small batch. products: matrix products of
        M x N x D, without those of a guide. workspace_bytes: the buffer of similarities. peak_bytes: memory above
        inputs and gradients. share: of the tensor cores' peak, by the similarities, on paper. seconds: on paper, for
        16-bit embeddings and a GPU of the table; None elsewhere and on a CPU, where `python -m fusedloss bench` times.

    Raises:
        ValueError, TypeError: an argument that does not fit.

    Example:
        >>> cost = fusedloss.cost("info_nce", 65536, 65536, 768, torch.bfloat16, "h200", bound=20.0)
        >>> cost.products, cost.workspace_bytes >> 20  # three products, MiB
    """
    checks.choice("loss", loss, LOSSES)
    for name, value in {"M": M, "N": N, "D": D}.items():
        checks.count(name, value, optional=False)
    checks.count("workspace_bytes", workspace_bytes)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}; pass the embeddings' dtype")
    if bound is not None:
        checks.number("bound", bound, least=0)
    if loss in SQUARE and M != N:
        raise ValueError(f"N must be M for {loss}, {M}, got {N}; both are its rows")
    kind = "cuda" if device in GPUS else str(device).partition(":")[0]
    if kind not in ("cpu", "cuda"):
        names = ", ".join(map(repr, GPUS))
        raise ValueError(f"device must be 'cpu', 'cuda' or one of {names}, got {str(device)!r}; pass one of them")
    if kind == "cpu":
        return _on_cpu(loss, _problem(loss, M, N, D, dtype, bound, workspace_bytes, "cpu"))
    return _on_gpu(loss, _problem(loss, M, N, D, dtype, bound, workspace_bytes, "meta"), _gpu(device))


def _gpu(device: str | torch.device) -> Gpu:
    if isinstance(device, str) and device in GPUS:
        return GPUS[device]._replace(folds=FOLDS[device])
    here = torch.cuda.get_device_properties(device)
    name = next((name for name in GPUS if name in here.name.lower()), None)
    if name is None:
        return Gpu(here.multi_processor_count, here.total_memory, 0.0, 0.0)
    own = GPUS[name]._replace(multi_processor_count=here.multi_processor_count, total_memory=here.total_memory)
    return own._replace(folds=FOLDS[name])


def _problem(
    loss: str, M: int, N: int, D: int, dtype: torch.dtype, bound: float | None, workspace_bytes: int | None, device: str
) -> Problem:
    """The problem of the loss, of operands that have one number each."""
    one = torch.zeros(1, 1, dtype=dtype, device=device)
    x, y = one.expand(M, D), one.expand(N, D)
    mask = Mask(guide=Guide(x, y)) if loss == "gist_embed" else Mask()
    both = (Block(0, 0, mask=mask), Block(1, 1, mask=mask)) if loss == "gist_embed" else ()
    alone = loss == "nt_xent"
    vector = torch.zeros(1, dtype=stats_dtype(dtype), device=device)
    return Problem(
        operands=(x,) if alone else (x, y),
        blocks=(Block(0, 0 if alone else 1, mask=mask), *both),
        scale=vector[0],
        target=torch.zeros(1, dtype=torch.int64, device=device),
        weight=vector,
        cosine=loss in COSINE or bound is not None,
        symmetric=loss == "clip",
        scale_bound=bound,
        workspace_bytes=workspace_bytes,
        mirrored=alone,
    )


def _on_cpu(loss: str, problem: Problem) -> Cost:
    size, (M, D) = problem.dtype.itemsize, problem.operands[0].shape
    N, wide = problem.columns, stats_dtype(problem.dtype).itemsize
    held = sum(math.prod(x.shape) for x in problem.operands)  # elements
    beside = VECTORS * (M + N) + (4 * held if size == 2 else 0) + (M * D * size if loss == "nt_xent" else 0)
    if chunked.takes_units(problem):
        beside += held * wide * (2 if loss == "gist_embed" else 1)
    if dense.fits(problem):
        matrix = M * N * wide
        return _cost("dense", 3 * len(problem.blocks), problem, 0, dense.MATRICES * matrix + beside)
    if loss == "nt_xent":
        side, most = chunks.half_sides(problem, chunked)
        tiles = -(-M // side) * (-(-M // side) + 1) // 2
        workspace = min(most, tiles) * side * side * wide
        return _cost(
            "half",
            1 + 2 * _above(M, side) / M**2,
            problem,
            workspace,
            workspace + 2 * side * side * wide + beside + STEP_BYTES * D,
        )
    (rows, width), kind = chunks.workspace_shape(problem, chunked)
    workspace = math.ceil(rows * width * chunked.workspace_copies(problem)) * kind.itemsize
    tile = rows * min(chunked.tiles.TILE_COLUMNS, N) * wide
    if loss == "clip":
        return _cost("symmetric", 4, problem, workspace, workspace + 3 * tile + beside + STEP_BYTES * D // 2)
    more = tile if loss == "gist_embed" else 0
    mode, products = ("exp", 3) if chunked.can_exp(problem) else ("stats, then grad", 4)
    peak = workspace + more + beside + STEP_BYTES * D
    return _cost(mode, products * len(problem.blocks), problem, workspace, peak)


def _on_gpu(loss: str, problem: Problem, gpu: Gpu) -> Cost:
    """By the kernels' rules, which do not ask for a device."""
    size, (M, D), N = problem.dtype.itemsize, problem.operands[0].shape, problem.columns
    width, safe = chunks.width_of(problem), shared.can_exp(problem)
    rows = chunks.gpu_rows(M, D, width * size, gpu, problem.workspace_bytes)
    room = chunks.gpu_bytes(width * size, gpu, problem.workspace_bytes) // size
    mode, products, stored = "exp", 3.0, rows * width
    if M * N * 4 <= dense.MOST["cuda"]:
        peak = dense.MATRICES * M * N * 4 + VECTORS * (M + N)
        return _cost("dense", 3 * len(problem.blocks), problem, 0, peak)
    side = 0
    if loss == "nt_xent":
        most = min(chunks.CUDA_ROWS, room // width)
        side = half_rows(M, D, most, gpu.multi_processor_count, rows, room if safe else None)
    if side:
        half = _above(M, side)
        once = safe and half <= room
        similarities = half if once else half + _above(M, min(side, chunks.STRIP_STATS_ROWS))
        mode, products = ("half, stored" if once else "half"), 1 + similarities / M**2
        stored = half if once else side * M
    elif loss == "clip":
        mode, products = ("stored", 3.0) if safe and rows == M else ("symmetric", 4.0)
    elif not safe:
        mode, products = "stats, then grad", 4.0
    beside = VECTORS * (M + N) + (4 * sum(math.prod(x.shape) for x in problem.operands) if size == 2 else 0)
    found = _cost(mode, products * len(problem.blocks), problem, stored * size, stored * size + beside)
    return _timed(found, problem, gpu, rows) if gpu.folds and size == 2 else found


def _above(M: int, side: int) -> int:
    """Returns the elements of an M x M matrix in chunks of `side` rows against themselves and the rows behind them."""
    number, rest = divmod(M, side)
    return (number * M - side * number * (number - 1) // 2) * side + rest * rest


def _cost(mode: str, products: float, problem: Problem, workspace: int, peak: int) -> Cost:
    M, D, N = problem.rows, problem.operands[0].shape[1], problem.operands[problem.blocks[0].key].shape[0]
    return Cost(mode, products, 2 * products * M * N * D, workspace, peak, None, None)


def _timed(found: Cost, problem: Problem, gpu: Gpu, rows: int) -> Cost:
    """Seconds of products alone: launches and what is once a row are left out."""
    D, size, blocks = problem.operands[0].shape[1], problem.dtype.itemsize, len(problem.blocks)
    kernels, others = KERNELS[found.mode]
    each = (found.products - others * blocks) / len(kernels)  # products of similarities, by kernel
    one = found.flops / found.products  # operations of a product of M x N x D
    moved = one / (2 * D) * size / gpu.bandwidth  # seconds of its M x N numbers, to or from memory
    rate, seconds, useful = gpu.tflops * 1e12, 0.0, 0.0
    for kernel in kernels:
        a, b = gpu.folds[MODES.index(kernel)]
        stores = 0.0 if kernel.startswith("stats") else moved
        seconds += each * max(one / rate * (a * D + b) / D, stores)
        useful += each * one / rate
    share = useful / seconds
    seconds += others * blocks * max(one / rate, moved) + blocks * one / rate * 3 * ACCUMULATION / rows
    return found._replace(share=share, seconds=seconds)
