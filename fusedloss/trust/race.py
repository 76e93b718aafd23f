"""Times of what is proved beside `chunked` and plain torch: entries of the tables that `auto` goes by (`order.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

import fusedloss

from .. import measure
from ..errors import UnsupportedError
from . import cases
from .order import KINDS, MATERIALISED, REFERENCE, Entry

ALL_KINDS = (*KINDS[0], *KINDS[1])
VERIFIED = tuple((N, D) for N in (1024, 4096, 16384, 65536) for D in (128, 384, 768, 1024, 4096))
SAMPLE = 2e-3  # seconds that a sample takes at least: several steps where they are shorter
SCALE = 20.0
CPU_ROOM = 1 << 30  # of plain torch's matrices

Step = Callable[[], object]


def around(N: int, D: int) -> list[tuple[int, int]]:
    """Three sizes, the one asked for in their middle."""
    return [(max(1, N // 4), D), (N, D), (4 * N, D)]


def race(
    device: torch.device,
    backends: Sequence[str],
    precision: str,
    points: Iterable[tuple[int, int]],
    kinds: Sequence[str] = ALL_KINDS,
    *,
    rounds: int = 5,
    limit: float = 1.0,
) -> Iterator[Entry]:
    """Forward and backward of a loss of each kind at each point (N, D), of N rows and N columns.

    Args:
        backends: those of "cuda" and "triton" that are proved there in this precision
        limit: seconds after which a backend runs no further round at a point

    Yields:
        an entry for each kind and point that two backends or more ran; one that raised has no time there

    Example:
        >>> next(race(torch.device("cuda:0"), ["triton"], "bf16", [(4096, 768)]))["backend"]
        'triton'
    """
    capability = [*torch.cuda.get_device_capability(device)] if device.type == "cuda" else []
    dtype = cases.DTYPES[precision]
    if dtype == torch.float16:  # no shift is safe there: whatever is bounded runs as what is not
        kinds = [kind for kind in kinds if not kind.endswith("bounded")]
    for N, D in points:
        for kind in kinds:
            with cases.products(precision):
                seconds = _times(device, backends, dtype, N, D, kind, rounds, limit)
            if len(seconds) > 1:
                place = {"capability": capability, "dtype": precision, "kind": kind, "N": N, "D": D}
                yield {**place, "backend": next(iter(seconds)), "seconds": seconds}


def _times(
    device: torch.device,
    backends: Sequence[str],
    dtype: torch.dtype,
    N: int,
    D: int,
    kind: str,
    rounds: int,
    limit: float,
) -> dict[str, float]:
    """By backend, the fastest first."""
    names = [*backends, "chunked", *([REFERENCE] if _materialises(device, N) else [])]
    calls, repeats = {}, {}
    try:
        query, key = (_embeddings(device, dtype, N, D, seed) for seed in range(2))
        for name in names:
            call = _step(kind, name, query, key)
            try:
                call()  # compiles
                repeats[name] = max(1, math.ceil(SAMPLE / max(measure.seconds(call), 1e-6)))
            except (UnsupportedError, RuntimeError):  # out of memory is one
                measure.free_memory()  # raises where the device is lost
                continue
            calls[name] = call
        seconds = measure.time_interleaved(calls, rounds, warmup=0, repeats=repeats, limit=limit)
    except torch.OutOfMemoryError:
        measure.free_memory()
        return {}
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def _materialises(device: torch.device, N: int) -> bool:
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_ROOM
    return MATERIALISED * 4 * N * N <= room


def _embeddings(device: torch.device, dtype: torch.dtype, N: int, D: int, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(N, D, generator=generator, device=device)
    return torch.nn.functional.normalize(x, dim=1).to(dtype).requires_grad_()


def _step(kind: str, backend: str, query: Tensor, key: Tensor) -> Step:
    bounded = kind.endswith("bounded")

    def step() -> tuple[Tensor, ...]:
        if kind.startswith("both"):
            loss = fusedloss.clip(query, key, SCALE, normalize=bounded, backend=backend)
        else:
            loss = fusedloss.info_nce(query, key, temperature=1 / SCALE, normalize=bounded, backend=backend)
        return torch.autograd.grad(loss, (query, key))

    return step
