"""Tile shapes as pure functions of the problem: no search, so every run is the same."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

from ...core.numerics import cdiv


class Config(NamedTuple):
    """How the similarities of one launch are computed.

    GEMM: "descriptors" (TMA) or "pointers" (cp.async) into `similarity_kernel`, or the vendor's
    "library" and `panel_kernel`. SUBTILES = 2 folds a tile in two halves of columns. `programs` run
    at once on a multiprocessor. SPECIALIZE: Triton gives loads, products and folds warps of their own (sm_100).
    """

    GEMM: str
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    GROUP_M: int = 8
    SUBTILES: int = 1
    num_warps: int = 8
    num_stages: int = 3
    programs: int = 1
    SPECIALIZE: bool = False

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def options(self) -> dict[str, int]:
        """The launch options of the kernels of tiles, not to be written to."""
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_D", "GROUP_M", "SUBTILES", "num_warps", "num_stages")
        return {name: getattr(self, name) for name in names}


# Not a compute capability: a GPU that is not NVIDIA's.
ELSEWHERE = (0, 0)
# Under half a wave of 128 x 128 tiles on 132 SMs, smaller tiles keep more SMs busy.
FEW_TILES = 66
# From this D on cuBLAS and a pass over fp32 panels should beat the fused GEMM, on paper: a kernel at 80 % of the peak
# where cuBLAS has 92 % loses 4.1e-16 D seconds an element, the pass costs 1e-12.
LIBRARY_D = 2304


# Their tiles hold more numbers of a row than 128 columns leave registers for.
WIDE_FOLDS = (
    *("fold, sigmoid", "fold, margin_ranking", "fold, sides_grad", "fold, circle_grad", "top, columns"),
    "fold, pair_hinge, columns",
    *(f"fold, {kind}_{pass_}, columns" for kind in ("sides", "circle") for pass_ in ("stats", "grad")),
)
NARROW = ("grad, columns, q", "grad, q, several", *WIDE_FOLDS)
# Whose folds run beside the products of the next tile on sm_100.
SPECIALIZED = ("exp, columns",)
RAGGED = ("grad, columns, q, masked", "top, masked")
# Have registers for a tile of 256 columns on sm_90; "exp, several" spills 8 to 40 bytes.
BROAD = ("stats", "stats, columns", "exp", "exp, columns", "grad", "stats, several", "grad, several")


def pick_config(M: int, N: int, D: int, dtype: str, capability: tuple[int, int] | None, mode: str) -> Config:
    """The config for M x N similarities over D features.

    `dtype` is "bf16", "fp16", "tf32" or "fp32" (full precision, no tensor cores); `capability` is the GPU's,
    ELSEWHERE for one that is not NVIDIA's, None in the interpreter; `mode` is the epilogue and its options:
    "stats", "exp", "grad, columns, q, masked" and so on. If measured.json has a config of the same GPU, dtype and mode,
    the one at the nearest D is taken.
    """
    if capability is None:
        return Config("pointers", 64, 64, 64)
    few = cdiv(M, 128) * cdiv(N, 128) < FEW_TILES
    if not few and (found := _measured(D, dtype, capability, mode)):
        return found
    if mode.startswith("prefixes"):
        # The accumulator outlives each fold: wider tiles spill up to 272 bytes, of "exp" 48 on sm_120.
        BLOCK_D = 32 if dtype in ("tf32", "fp32") else 64
        if few:
            return Config("pointers", 64, 64, BLOCK_D, num_warps=4, num_stages=4)
        if "grad" in mode or (capability[0] == 12 and "exp" in mode):
            return Config("pointers", 128, 64, BLOCK_D)
        return Config("pointers", 128, 128, BLOCK_D, SUBTILES=2)
    if dtype == "fp32" and capability == ELSEWHERE:
        # Of 128 x 64, two accumulators spill up to 84 bytes on gfx1100, and all masks with several targets 8.
        thin = mode.startswith("distill") or "several, masked" in mode
        return Config("pointers", 64 if thin else 128, 64, 16, num_stages=2)
    if dtype == "fp32":
        # On paper FMAs in a kernel reach 50 to 65 % of their peak, the vendor's 85 to 90 %.
        return Config("library", 32, 256, 32)
    if capability == ELSEWHERE:
        # Fits the 64 KiB of a workgroup on gfx942 and gfx1100, and gfx1100's 256 registers.
        small = few or "masked" in mode or mode == "guide" or mode.startswith("distill")
        return Config("pointers", 64 if small else 128, 64, 32, num_stages=2)
    narrow = dtype in ("bf16", "fp16")
    BLOCK_D = 64 if narrow else 32  # one 128-byte line of each row
    if mode.startswith("distill"):
        return _pick_distill(few, D, BLOCK_D, capability[0])
    if capability[0] in (9, 10):
        # Of sizes that are no multiples of 16, and with every mask at once, a tile of 64 columns spills up to 544 bytes
        # on sm_100, and on sm_90 up to 152 in two modes.
        odd = M % 16 != 0 or N % 16 != 0
        # On sm_100 at whole sizes, too: a bool mask alone beside a store does not compile there with 8 warps.
        ragged = "masked" in mode and (odd or capability[0] == 10)
        thin = mode in NARROW or ragged if capability[0] == 10 else ragged and mode in RAGGED
        columns = 32 if thin else 64
        # There a bool mask beside a store is more than OptimizeTMemLayouts takes with 8 warps (Triton 3.7.1): it fails.
        # Without a store, 8 warps spill 56 bytes with several targets, and 4 spill 176 with counts.
        few_warps = ragged and (mode.startswith(("exp", "grad")) or "several" in mode)
        warps = 4 if capability[0] == 10 and few_warps else 8
        if few:
            return Config("descriptors", 64, columns, BLOCK_D, num_warps=4, num_stages=4)
        if D >= LIBRARY_D:
            return Config("library", 32, 256, BLOCK_D, num_warps=8)
        if capability[0] == 9 and mode in BROAD:
            # In halves 176 KiB; whole, fp32 tiles take 272. With q halves spill 128 bytes, with the
            # columns' weights 96, with both 696.
            # 224 of 227 KiB in 16 bits. An fp32 tile to be stored takes 32 KiB more: three stages.
            return Config("descriptors", 128, 256, BLOCK_D, SUBTILES=2, num_stages=4 if narrow else 3)
        if capability[0] == 10 and mode in SPECIALIZED and not odd:
            # 168 registers of 384 threads. stats, exp and grad spill 24 to 80 bytes, and so do other sizes and modes.
            return Config("descriptors", 128, 128, BLOCK_D, num_stages=4, SPECIALIZE=True)
        few_columns = mode in WIDE_FOLDS or any(what in mode for what in (" q", "softcap", "fold"))
        few_columns = (capability[0] == 10 and few_columns) or (mode == "grad, q, several" and dtype == "tf32")
        if "masked" in mode or few_columns:
            # Every mask at once spills 208 bytes a thread at 128 columns on sm_90. On sm_100 tensor memory is
            # read a row per thread, with every column's vectors: 128 spill 104 with q alone. Halves of a tile
            # under a softcap, or of a fold, are more than Triton 3.7.1's OptimizeTMemLayouts pass takes: it fails.
            return Config("descriptors", 128, columns, BLOCK_D, num_warps=warps, num_stages=4)
        return Config("descriptors", 128, 128, BLOCK_D, SUBTILES=2, num_stages=4)
    if few:
        return Config("pointers", 64, 64, BLOCK_D, num_warps=4, num_stages=4)
    if mode in ("fold, circle_grad, columns", "grad, columns, q, masked"):
        return Config("pointers", 64, 64, BLOCK_D)  # 128 rows spill up to 24 bytes on sm_120, 48 on sm_80
    if "masked" in mode or mode in NARROW or (mode == "grad, q" and capability != (8, 0)):
        # Of sizes that are no multiples of 16 a wider one spills up to 216 bytes on sm_80. With q alone it spills 8 on
        # sm_89, 40 on sm_120.
        return Config("pointers", 128, 64, BLOCK_D)
    # 96 KiB of shared memory: within sm_120's 99.
    return Config("pointers", 128, 128, BLOCK_D, SUBTILES=2)


def _pick_distill(few: bool, D: int, BLOCK_D: int, major: int) -> Config:
    """Two accumulators are alive at once: of 128 x 128 they take 128 registers of a thread's 255."""
    if major in (9, 10):
        if few:
            return Config("descriptors", 64, 64, BLOCK_D, num_warps=4, num_stages=4)
        if D >= LIBRARY_D:
            return Config("library", 32, 256, BLOCK_D)
        if major == 10:
            return Config("descriptors", 128, 64, BLOCK_D, num_stages=4)
        return Config("descriptors", 128, 128, BLOCK_D, SUBTILES=2, num_stages=4)
    return Config("pointers", 64 if few else 128, 64, BLOCK_D, num_warps=4 if few else 8)


def pick_rows(kernel: str, *, interpreted: bool) -> dict[str, int]:
    """Returns launch options of the kernels in `rows.py`: 8 or 16 elements a thread and pass."""
    if interpreted:
        sizes = {"BLOCK_R": 64, "BLOCK_T": 16, "BLOCK_D": 128}
    elif kernel == "merge_kernel":
        sizes = {"BLOCK_R": 128, "BLOCK_T": 16}
    elif kernel == "settle_kernel":
        sizes = {"BLOCK_R": 32, "BLOCK_T": 64, "BLOCK_D": 64}
    else:
        sizes = {"BLOCK_R": 4, "BLOCK_D": 256}
    if kernel == "score_backward_kernel" and not interpreted:
        # With 4 warps 3 of its 6 variants, which use under 80 registers, spill a uniform register on sm_100 and sm_120.
        return sizes | {"num_warps": 8}
    used = {"merge_kernel": ("BLOCK_R", "BLOCK_T"), "settle_kernel": ("BLOCK_R", "BLOCK_T", "BLOCK_D")}
    return {name: sizes[name] for name in used.get(kernel, ("BLOCK_R", "BLOCK_D"))}


def _measured(D: int, dtype: str, capability: tuple[int, int], mode: str) -> Config | None:
    """Returns the config measured fastest at the nearest D, by ratio."""
    found = [
        entry
        for entry in _table()
        if (entry["dtype"], tuple(entry["capability"]), entry["mode"]) == (dtype, capability, mode)
    ]
    if not found:
        return None
    nearest = min(found, key=lambda entry: abs(math.log(entry["D"] / D)))
    return Config(**nearest["config"])


@functools.cache
def _table() -> list[dict]:
    """Written by benchmarks/tune.py on a GPU; empty until one has run it."""
    return json.loads((Path(__file__).parent / "measured.json").read_text())
