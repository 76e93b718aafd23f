"""Times of proved kernels, `chunked` and plain torch: entries of the tables that `auto` uses (`order.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

import fusedloss

from ..bench import measure
from ..core.errors import UnsupportedError
from ..trust import order
from ..trust.order import KINDS, Entry
from . import cases

ALL_KINDS = (*KINDS[0], *KINDS[1])
VERIFIED = tuple((N, N, D) for N in (1024, 4096, 16384, 65536) for D in (128, 384, 768, 1024, 4096))
SAMPLE = 2e-3  # least seconds of a sample, which has several steps if they are shorter
SCALE = 20.0
CPU_ROOM = 1 << 30  # bytes of plain torch's matrices
LEAST = 16384  # least rows and columns of the largest size around a loss
MOST = 1 << 42  # M N D of it: a bf16 step takes 50 ms of an H200's tensor cores, an fp32 one a second of most others
ROOM = 1 << 28  # elements of its embeddings: 1 GiB in fp32

Step = Callable[[], object]
Point = tuple[int, int, int]


def around(M: int, N: int, D: int) -> list[Point]:
    """Three sizes, by equal factors of rows and columns: a fourth, itself and four times that.

    The largest serves all sizes beyond; for a small loss it is LEAST. If it would take too long, or too much memory,
    all three are smaller. The one nearest to the given size is first.
    """
    fits = min(math.sqrt(MOST / (M * N * D)), ROOM / ((M + N) * D))
    top = min(max(4.0, LEAST / math.sqrt(M * N)), fits)
    bottom = min(1.0, top / 16)
    factors = sorted((bottom, math.sqrt(bottom * top), top), key=lambda factor: round(abs(math.log(factor)), 6))
    return [(max(1, round(M * factor)), max(1, round(N * factor)), D) for factor in factors]


def race(
    device: torch.device,
    backends: Sequence[str],
    precision: str,
    points: Iterable[Point],
    kinds: Sequence[str] = ALL_KINDS,
    *,
    rounds: int = 5,
    limit: float = 1.0,
) -> Iterator[Entry]:
    """Forward and backward of a loss of each kind at each point (M, N, D): M rows, N columns.

    Args:
        backends: those of "cuda" and "triton" that are proved there in this precision
        limit: seconds after which a backend runs no further round at a point

    Yields:
        an entry for each kind and point that two backends or more ran; one that raised has no time there

    Example:
        >>> next(race(torch.device("cuda:0"), ["triton"], "bf16", [(4096, 4096, 768)]))["backend"]
        'triton'
    """
    capability = order.capability(device)
    dtype = cases.DTYPES[precision]
    if dtype == torch.float16:  # fp16 has no safe shift: a bounded loss runs like an unbounded one
        kinds = [kind for kind in kinds if not kind.endswith("bounded")]
    for M, N, D in points:
        for kind in kinds:
            with cases.products(precision):
                seconds = _times(device, backends, dtype, (M, N, D), kind, rounds, limit)
            if len(seconds) > 1:
                place = {"capability": capability, "dtype": precision, "kind": kind, "N": N, "D": D}
                place |= {"M": M} if M != N else {}
                yield {**place, "backend": next(iter(seconds)), "seconds": seconds}


def _times(
    device: torch.device,
    backends: Sequence[str],
    dtype: torch.dtype,
    point: Point,
    kind: str,
    rounds: int,
    limit: float,
) -> dict[str, float]:
    """Returns times by backend, the fastest first."""
    M, N, D = point
    names = [*backends, "chunked", *([order.REFERENCE] if _materialises(device, M, N) else [])]
    calls, repeats = {}, {}
    try:
        query, key = (_embeddings(device, dtype, rows, D, seed) for seed, rows in enumerate((M, N)))
        for name in names:
            call = _step(kind, name, query, key)
            try:
                call()  # compiles
                repeats[name] = max(1, math.ceil(SAMPLE / max(measure.seconds(call), 1e-6)))
            except (UnsupportedError, RuntimeError):  # includes out of memory
                measure.free_memory()  # raises if the device is lost
                continue
            calls[name] = call
        seconds = measure.time_interleaved(calls, rounds, warmup=0, repeats=repeats, limit=limit)
    except torch.OutOfMemoryError:
        measure.free_memory()
        return {}
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def _materialises(device: torch.device, M: int, N: int) -> bool:
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_ROOM
    return order.MATERIALISED * 4 * M * N <= room


def _embeddings(device: torch.device, dtype: torch.dtype, N: int, D: int, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(N, D, generator=generator, device=device)
    return torch.nn.functional.normalize(x, dim=1).to(dtype).requires_grad_()


def _step(kind: str, backend: str, query: Tensor, key: Tensor) -> Step:
    bounded = kind.endswith("bounded")
    target = None if len(query) <= len(key) else torch.arange(len(query), device=query.device) % len(key)

    def step() -> tuple[Tensor, ...]:
        if kind.startswith("both"):
            loss = fusedloss.clip(query, key, SCALE, normalize=bounded, backend=backend)
        else:
            loss = fusedloss.info_nce(query, key, target, temperature=1 / SCALE, normalize=bounded, backend=backend)
        return torch.autograd.grad(loss, (query, key))

    return step
