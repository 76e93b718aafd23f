"""Compiles what the launchers launch, for one architecture and without a GPU.

    python tools/compile_kernels.py sm_90            # JSON on stdout
    python tools/compile_kernels.py --table          # docs/kernel-resources.md, for all of them; fails by the rules

The table names a digest of what was compiled. While it is that of the sources, tests compile for one architecture
alone: what the table says of the others held when it was written.

The launchers run on meta tensors with the kernels replaced by recorders, so that tiles, flags and signatures are
theirs. Run it in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from fusedloss.kernels import distill as distill_kernels
from fusedloss.kernels import rows, similarity
from sources import digest
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedloss.backends import distill
from fusedloss.backends import triton as backend
from fusedloss.backends.triton import classes as triton_classes
from fusedloss.backends.triton import launching
from fusedloss.backends.triton import pairs as triton_pairs
from fusedloss.backends.triton import rows as triton_rows
from fusedloss.backends.triton.config import ELSEWHERE
from fusedloss.core.folds import Part
from fusedloss.core.mask import Compare, GuideRule, StripMask
from fusedloss.core.problem import Block, Fold, Margin, Problem, RowRule
from fusedloss.core.strips import Extremes, Patch, RowSums, Softmax, Strip, Tally, Tile
from fusedloss.sweep.chunks import PAD

sys.path.append(str(Path(__file__).absolute().parents[1] / "tests" / "support"))
from patience import seconds

# Of a digest: the kernels, what launches them, and what is asked of it here.
SOURCES = (
    "kernels/*",
    "fusedloss/backends/distill.py",
    "fusedloss/backends/folds.py",
    "fusedloss/backends/triton/*",
    "fusedloss/rowwise/**/*.py",
    "tools/compile_kernels.py",
)
# Shared memory that a block may have, in KiB; a multiprocessor's; the instruction of its matrix products.
LIMITS = {
    "sm_80": (163, 164, "HMMA"),
    "sm_90": (227, 228, "HGMMA"),
    "sm_100": (227, 228, "UTCMMA"),
    "sm_120": (99, 100, "HMMA"),
    "gfx942": (64, 64, "MFMA"),
    "gfx950": (160, 160, "MFMA"),
    "gfx1100": (64, 128, "WMMA"),
}
TARGETS = tuple(LIMITS)
REGISTERS = 65536  # a multiprocessor's
SINGLE = 8  # accesses of one 16-bit number in a kernel that reads and writes rows as wide as they allow
# Under which Triton a kernel spills, and where: (mode, dtype) by architecture. Under any other nothing does.
SPILLS: dict[str, dict[str, set[tuple[str, str]]]] = {}
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
MODES = (
    "stats",
    "stats, columns",
    "exp",
    "exp, columns",
    "grad",
    "grad, q",
    "grad, columns",
    "grad, columns, q",
)
# With every mask and every count that a launch can have.
MASKED = (
    "stats, tally, masked",
    "stats, columns, tally, masked",
    "exp, tally, masked",
    "grad, columns, q, masked",
    "top, masked",
    "top, columns",
    "guide",
    "store",
)
# Losses without a softmax, with labels and own columns: the fold and its options.
SIDES, CIRCLE, SUP_CON = ("multi_similarity", (2.0, 40.0, 0.5)), ("circle", (0.4, 80.0)), ("sup_con_in", ())
FOLDS: dict[str, tuple[str, tuple[float, ...]]] = {
    "fold, sigmoid": ("sigmoid", ()),
    "fold, margin_ranking": ("margin_ranking", (0.1, 1.0)),
    "fold, pair_hinge": ("pair_hinge", (0.5, 1.0, 0.0)),
    "fold, sides_stats": SIDES,
    "fold, sides_grad": SIDES,
    "fold, circle_stats": CIRCLE,
    "fold, circle_grad": CIRCLE,
    # A tile of one matrix against itself, for its columns as rows, too.
    "fold, pair_hinge, columns": ("pair_hinge", (0.5, 1.0, 0.0)),
    "fold, sides_stats, columns": SUP_CON,
    "fold, sides_grad, columns": SUP_CON,  # the one with a gradient by the scale
    "fold, circle_stats, columns": CIRCLE,
    "fold, circle_grad, columns": CIRCLE,
}
# Of two similarity matrices: the fold and its options. "sums" writes no matrix, as the first launch of two does.
DISTILL = (
    "distill",
    "distill, sums",
    "distill, masked",
    "distill_ce",
    "distill_mse",
    "distill_mse, sums",
)
# Under a softcap, which stands in the way from similarities to logits and back.
SOFTCAP = ("stats, softcap", "stats, tally, softcap", "exp, softcap", "grad, softcap")
# With several targets a row.
SEVERAL = (
    *("stats, several", "exp, several", "grad, several", "grad, q, several"),
    *("stats, several, masked", "exp, several, masked", "grad, q, several, masked"),
)
TYPES = {
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
}
# In the machine code: products, copies by the tensor memory accelerator and by cp.async, exponentials, accesses of 16
# bytes and of one 16-bit number. What spills shows as LDL and STL.
INSTRUCTIONS = {
    "HGMMA": r"\bHGMMA\b",
    "UTCMMA": r"\bUTC\w*MMA\b",
    "HMMA": r"\bHMMA\b",
    "UTMALDG": r"\bUTMALDG\b",
    "UTMASTG": r"\bUTMASTG\b",
    "LDGSTS": r"\bLDGSTS\b",
    "LDGSTS.128": r"\bLDGSTS\.E\.(?:\w+\.)*128\b",
    "EX2": r"\bMUFU\.EX2\b",
    "LDG.128": r"\bLDG\.E\.(?:\w+\.)*128\b",
    "STG.128": r"\bSTG\.E\.(?:\w+\.)*128\b",
    "LDG.16": r"\bLDG\.E\.(?:\w+\.)*U16\b",
    "STG.16": r"\bSTG\.E\.(?:\w+\.)*U16\b",
    "local": r"\b(?:LDL|STL)\b",
}
AMD = {"MFMA": r"\bv_mfma_", "WMMA": r"\bv_wmma_", "EX2": r"\bv_exp_f32"}  # in AMD's


def empty(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=kind, device="meta")


def rows_of(size: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return backend.operand(empty(size, dim, kind=dtype))


def workspace(size: int, dtype: torch.dtype) -> torch.Tensor:
    return empty(size, math.ceil(size / PAD) * PAD, kind=dtype)[:, :size]


def similarities(mode: str, dtype: torch.dtype, size: int, dim: int, plain: bool = False) -> None:
    """The launcher of `mode` with every optional operand present: the most registers it needs. plain: without a bias,
    where sm_90 has a second path for tiles that need no test."""
    x, vector, target = rows_of(size, dim, dtype), empty(size), empty(size, kind=torch.int64)
    strip = Strip(x, x, empty(), vector, vector, None if plain else vector, target)
    tally = score = smooth = None
    if "masked" in mode:
        compare = tuple(Compare(target, target, keep) for keep in (False, True))
        dense, exempt = empty(size, size, kind=torch.bool), empty(size, 1, kind=torch.int64)
        bits = empty(size, math.ceil(size / 32), kind=torch.int32)
        mask = StripMask(compare, dense, vector, exempt, target, bits)
        strip = strip._replace(mask=mask, own=target, own_scale=empty())
        smooth = vector
    if "several" in mode:
        without, smooth = empty(size, 3, kind=torch.int64), None  # without a margin, a guide, a column of their own
        mask = StripMask(compare, dense, skip=target) if "masked" in mode else StripMask()
        strip = strip._replace(mask=mask._replace(without=without), own=None, own_scale=None)
    if "softcap" in mode:
        strip, smooth = strip._replace(softcap=30.0), vector
    if "tally" in mode:
        tally, score = Tally(*(vector.clone() for _ in Tally._fields)), vector
    problem = Problem((x,), (Block(0, 0),), empty(), target, vector, scale_bound=20.0)
    out = workspace(size, dtype)
    gain = empty() if dtype == torch.float16 else None
    softmax = Softmax(vector, vector, vector if " q" in mode else None)
    match mode.split(", ")[0], "columns" in mode:
        case "stats", False:
            backend.stats_rows([strip], tally, score)
        case "stats", True:
            backend.stats_rows_and_columns(strip, tally, score)
        case "exp", False:
            backend.exp_rows(problem, [strip], [out], None, tally, score)
        case "exp", True:
            backend.exp_rows_and_columns(problem, strip, out)
        case "grad", columns:
            backend.grad_rows([strip], [out], softmax, softmax if columns else None, vector, gain, smooth)
        case "top", False:
            backend.top_rows([strip])
        case "top", True:
            tile = Tile(slice(0, size), slice(0, size))
            strip = strip._replace(mask=StripMask((Compare(target, target, False),)))
            with mock.patch.object(Tile, "directions", [(tile.rows, 1), (tile.columns, 0)]):  # as in `half`
                backend.half_tops(problem, strip, [tile], Extremes(vector, target), Extremes(vector, target))
        case "guide", _:
            backend.guide_rows([strip], GuideRule(), empty())
        case "store", _:
            backend.similarities(strip, workspace(size, torch.float32))
        case ("distill" | "distill_ce" | "distill_mse") as form, _:
            mask = StripMask(dense=workspace(size, torch.bool)) if "masked" in mode else None
            strip, side = strip._replace(bias=None, target=None, mask=mask), distill.Side(empty(), *[vector] * 3)
            sums = "sums" in mode
            mean = vector if form == "distill_mse" and not sums else None
            rows = distill.Rows(form, side, side, vector, mean)
            backend._both(strip._replace(own=None, own_scale=None), strip, None if sums else out, rows)
        case "fold", columns:
            fold, part = Fold(*FOLDS[mode], scalars=(empty(),)), Part(target, vector, target, target, target, target)
            strip, problem = strip._replace(bias=None), replace(problem, fold=fold)
            with mock.patch.object(backend, "merge", lambda running, tables: running):  # is compiled by itself
                if columns:
                    half(problem, strip, None if "_stats" in mode else out, part)
                else:
                    backend.fold_rows(problem, strip, None if mode.endswith("_stats") else out, part, vector)


def half(problem: Problem, strip: Strip, out: torch.Tensor | None, part: Part) -> None:
    """A tile on the diagonal, with its rows' own columns and the sums of its columns, which no launch has at once."""
    size = len(part.weight)
    tile, fold = Tile(slice(0, size), slice(0, size)), backend.half_fold(problem, part)
    with mock.patch.object(Tile, "directions", [(tile.rows, 1), (tile.columns, 0)]):
        if out is None:
            fold.add(strip, tile)
        else:
            fold.settle()
            fold.write(strip, out, tile)


# Ends of prefixes, and the modes of the kernel that sums several of them, on the GPUs where `auto` shares a product.
ENDS = (64, 256, 768)
PREFIXES = ("prefixes, stats", "prefixes, exp", "prefixes, grad", "prefixes, grad, q")


def prefixes(mode: str, dtype: torch.dtype, size: int, ends: tuple[int, ...] = ENDS) -> None:
    """The launcher of several prefixes, which have neither masks nor biases."""
    x, vector, target = rows_of(size, ends[-1], dtype), empty(size), empty(size, kind=torch.int64)
    strip = Strip(x, x, empty(), vector, vector, None, target)
    strips = [[strip._replace(x=x[:, :end], y=x[:, :end])] for end in ends]
    outs, gain = [[workspace(size, dtype)] for _ in ends], empty() if dtype == torch.float16 else None
    problem = Problem((x,), (Block(0, 0),), empty(), target, vector, scale_bound=20.0)
    softmax = Softmax(vector, vector, vector if ", q" in mode else None)
    match mode.split(", ")[1]:
        case "stats":
            backend.stats_prefixes(strips)
        case "exp":
            backend.exp_prefixes(problem, strips, outs)
        case "grad":
            backend.grad_prefixes(strips, outs, [softmax for _ in ends], [vector for _ in ends], [gain for _ in ends])


def by_row(name: str, dtype: torch.dtype, size: int = 8192, dim: int = 768) -> None:
    """The launcher of a kernel of rows.py, likewise."""
    x, vector, target = rows_of(size, dim, dtype), empty(size), empty(size, kind=torch.int64)
    score, table = empty(size, kind=torch.float64), RowSums(empty(64, size), empty(64, size))
    patch = Patch(workspace(size, dtype), target, vector, vector)
    match name:
        case "prepare":
            y = rows_of(size, dim, dtype)
            backend.prepare(x, y, target, empty(), vector, cosine=True, wants_target_sim=True)
        case "prepare, softcap, margin":
            y, rule = rows_of(size, dim, dtype), RowRule(softcap=30.0, margin=Margin(0.5, 0.1))
            backend.prepare(x, y, target, empty(), vector, rule, cosine=True, wants_target_sim=True)
        case "norms":
            backend.inverse_norms(x)
        case "merge":
            backend.merge(RowSums(vector, vector), table)
        case "settle":
            backend.settle(table, score, vector, RowRule(0.1))
        case "settle, patch":
            backend.settle(
                RowSums(-20.0, table.total), score, vector, RowRule(0.1), patch=patch, scaled=[x], dtype=dtype
            )
        case "settle, z-loss, slope":
            backend.settle(table, score, vector, RowRule(0.1, z_loss=1e-4), smooth=vector, slope=vector)
        case "weigh":
            backend.weigh(patch, vector, vector, vector)
        case "finish":
            backend.finish(empty(size, dim), vector, empty(), None, x, vector, empty(size, dim, kind=dtype))


ROWWISE_KERNELS = [
    importlib.import_module(f"fusedloss.kernels.{name}") for name in ("pairs", "lists", "pointwise", "classes")
]
# Kernels of losses without a sweep: name -> the launcher with every optional operand, on meta tensors of a dtype.
Launches = dict[str, Callable[[torch.dtype], object]]


def pointwise() -> Launches:
    from fusedloss.backends.triton import pointwise as triton_pointwise
    from fusedloss.rowwise.pointwise import BinaryCrossEntropy, Difference, Focal

    rows, columns = 8192, 768
    formulas = {
        "squared": Difference(math.inf, 2.0, 0.5),
        "absolute": Difference(0.0),
        "clamped": Difference(1.0),
        "binary cross-entropy": BinaryCrossEntropy(),
        "focal": Focal(2.0, 0.25),
    }

    def of(formula: Any, by_element: bool = False) -> Callable[[torch.dtype], object]:
        def launch(dtype: torch.dtype) -> object:
            x, kept = (empty(rows, columns, kind=dtype) for _ in range(2))
            losses = empty(rows, columns, kind=dtype) if by_element else None
            weight = empty(1, columns).expand(rows, columns)
            pos_weight = weight if isinstance(formula, BinaryCrossEntropy) else None
            return triton_pointwise.evaluate(formula, x, x, weight, pos_weight, kept, 1.0, losses, columns)

        return launch

    def times(dtype: torch.dtype) -> object:
        kept = empty(rows, columns, kind=dtype)
        return triton_pointwise.times(kept, empty(), kept)

    found = {f"pointwise, {name}": of(formula) for name, formula in formulas.items()}
    return {**found, "pointwise, focal, no sum": of(formulas["focal"], True), "times": times}


def classes(C: int = 32000, dim: int = 768) -> Launches:
    from fusedloss.backends.triton import classes as triton_classes
    from fusedloss.rowwise.classes import Terms

    rows, S = 8192, 64
    row, target, weight = empty(rows), empty(rows, kind=torch.int64), empty(C)
    left_out, softcap = empty(rows, kind=torch.bool), 30.0

    def class_rows(dtype: torch.dtype) -> None:
        terms = Terms(target, None, weight, left_out, row, row, row, 2.0, softcap)
        triton_classes.rows(empty(rows, C, kind=dtype), terms, True)

    def plain_rows(dtype: torch.dtype) -> None:
        triton_classes.rows(empty(rows, C, kind=dtype), Terms(target, hard=0.5), True)

    def narrow_rows(dtype: torch.dtype) -> None:
        triton_classes.rows(empty(rows, 10, kind=dtype), Terms(target, hard=0.5), True)

    def strided_rows(dtype: torch.dtype) -> None:
        places = empty(rows, S, kind=torch.int64)
        triton_classes.rows(empty(rows, 128, S, kind=dtype), Terms(places, hard=0.5), True)

    def share_rows(dtype: torch.dtype) -> None:
        x = empty(rows, C, kind=dtype)
        triton_classes.rows(x, Terms(share=x, weight=weight, hard=0.5, smooth=0.5, square=0.5, softcap=softcap), True)

    def soft_rows(dtype: torch.dtype) -> None:
        x = empty(rows, 512, kind=dtype)
        triton_classes.soft_rows(x, (x, empty(rows, 512, kind=torch.bool)), True)

    def pair_logits(dtype: torch.dtype) -> None:
        u, parts = empty(rows, dim, kind=dtype), ("rep", "difference", "multiplication")
        triton_classes.pair_logits(u, u, empty(3, 4 * dim, kind=dtype), empty(3, kind=dtype), parts)

    return {
        "class rows": class_rows,
        "class rows, plain": plain_rows,
        "class rows, C = 10": narrow_rows,
        "class rows, [N, C, S]": strided_rows,
        "share rows": share_rows,
        "soft rows": soft_rows,
        "pair logits": pair_logits,
    }


def pairs(dim: int = 768) -> Launches:
    """Three others, with every gradient wanted."""

    def forward(kind: str) -> Callable[[torch.dtype], object]:
        return lambda dtype: triton_pairs.forward(kind, 1e-6, *_pairs(dtype, dim))

    def backward(kind: str) -> Callable[[torch.dtype], object]:
        def launch(dtype: torch.dtype) -> object:
            query, others = _pairs(dtype, dim)
            upstream, value, norm = empty(8192, 3), empty(3, 8192), empty(4, 8192) if kind in ("cos", "angle") else None
            kept = None if kind in ("dot", "manhattan") else value
            return triton_pairs.backward(kind, 1e-6, upstream, (query, *others), kept, norm, (True,) * 4)

        return launch

    kinds = ("dot", "cos", "angle", "euclidean", "manhattan")
    return {f"score, {kind}": forward(kind) for kind in kinds} | {
        f"score backward, {kind}": backward(kind) for kind in kinds
    }


def _pairs(dtype: torch.dtype, dim: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    query, *others = (empty(8192, dim, kind=dtype) for _ in range(4))
    return query, others


def lists() -> Launches:
    from fusedloss.backends.triton import lists as triton_lists

    n, vector = 1024, empty(64, kind=torch.int64)
    matrix, mask = empty(64, n), empty(64, n, kind=torch.bool)
    inverse = empty(n, kind=torch.float64)
    of = lambda dtype: empty(64, n, kind=dtype)
    pairs = lambda name: (
        lambda dtype: triton_lists.lambdas(matrix, matrix, vector, name, 10, inverse, 10.0, gradient=True)
    )
    return {
        "lambda, ndcg_loss2pp": pairs("ndcg_loss2pp"),
        "lambda, ndcg_loss1": pairs("ndcg_loss1"),
        "lambda, rank_net": pairs(None),
        "adr, ranks": lambda dtype: triton_lists.adr(of(dtype), of(dtype), mask, 1.0, 1e8, gradient=False),
        "adr, gradient": lambda dtype: triton_lists.adr(of(dtype), of(dtype), mask, 1.0, 1e8, gradient=True),
        "list_mle, n=1024": lambda dtype: triton_lists.list_mle(matrix, matrix, gradient=True),
        "list_mle, n=4096": lambda dtype: triton_lists.list_mle(*2 * [empty(64, 4096)], gradient=True),
    }


ROWWISE: Launches = {**pointwise(), **classes(), **pairs(), **lists()}

# Sizes that are no multiples of 16: rows of the workspace, and D, or the number of classes.
ODD_ROWS, ODD = 8191, (50, 100, 300, 1000)
ODD_KERNELS = (
    *("prepare", "norms", "settle, patch", "weigh", "finish"),
    *("score, cos", "score backward, cos", "class rows, plain", "pair logits"),
)

BY_ROW = (
    "prepare",
    "prepare, softcap, margin",
    "norms",
    "merge",
    "settle",
    "settle, patch",
    "settle, z-loss, slope",
    "weigh",
    "finish",
)


class Recorder:
    """Stands in for a kernel: compiles its arguments instead of launching them."""

    def __init__(self, kernel: Any, target: str):
        self.kernel, self.fn = kernel, kernel.fn
        warp = 64 if target.startswith("gfx9") else 32
        self.target = GPUTarget("hip", target, warp) if amd(target) else GPUTarget("cuda", number(target), warp)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(
        self, *args: Any, num_warps: int = 4, num_stages: int = 3, enable_fp_fusion: bool = True, **constants: Any
    ) -> None:
        signature, values, attributes = {}, {}, {}

        def type_of(value: Any, path: tuple[int, ...]) -> Any:
            if isinstance(value, tuple):
                types = [type_of(v, (*path, i)) for i, v in enumerate(value)]
                return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
            if isinstance(value, TensorDescriptor):
                return f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
            if isinstance(value, torch.Tensor):
                attributes[path] = [["tt.divisibility", 16]]
                return "*" + TYPES[value.dtype]
            if isinstance(value, float):
                return "fp32"
            specialized = self.kernel.arg_names[path[0]] not in self.kernel.do_not_specialize
            if isinstance(value, int) and not (specialized and value == 1):
                if specialized and value % 16 == 0:
                    attributes[path] = [["tt.divisibility", 16]]
                return "i32"
            values[path] = value
            return "constexpr"

        for index, name in enumerate(self.kernel.arg_names):
            if index < len(args):
                signature[name] = type_of(args[index], (index,))
            else:
                signature[name], values[index,] = "constexpr", constants[name]
        Recorder.compiled = triton.compile(
            ASTSource(self.kernel, signature, values, attributes),
            target=self.target,
            options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion},
        )
        Recorder.warps = num_warps


def amd(target: str) -> bool:
    return target.startswith("gfx")


def number(target: str) -> int:
    return int(target.removeprefix("sm_"))


def resources(compiled: Any) -> dict[str, int]:
    """Registers a thread, spilled bytes, shared memory, and counts of instructions."""
    counts = dict.fromkeys((*INSTRUCTIONS, *AMD), 0)
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        found = {name: int(n) for name, n in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", code)}
        counts |= {name: len(re.findall(pattern, code)) for name, pattern in AMD.items()}
        spilled, registers = 4 * found["vgpr_spill_count"], found["vgpr_count"]
        return {"registers": registers, "spilled": spilled, "shared": compiled.metadata.shared, **counts}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = lambda flag: (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
        )
        usage, code = dump("--dump-resource-usage"), dump("-sass")
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    counts |= {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()}
    shared = compiled.metadata.shared
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"], "shared": shared, **counts}


def cases() -> list[tuple[str, str, str, str, int, int]]:
    """(kernel, mode, dtype, precision, size, D): large and small batches, D where the library multiplies, odd sizes (of
    D, or of classes)."""
    large, few, wide = (8192, 768), (512, 768), (8192, 4096)
    narrow = [(mode, dtype, "highest", *large) for dtype in ("bfloat16", "float16") for mode in MODES]
    tf32 = [(mode, "float32", "high", *large) for mode in MODES]
    masked = [(mode, "bfloat16", "high", size, 768) for size in (8192, 8191) for mode in MASKED]
    bent = [(mode, dtype, "high", *large) for dtype in ("bfloat16", "float16", "float32") for mode in SOFTCAP]
    bent += [(mode, "bfloat16", "high", *wide) for mode in SOFTCAP]
    folds = [(mode, dtype, "high", *large) for dtype in ("bfloat16", "float32") for mode in FOLDS]
    folds += [(mode, "bfloat16", "high", 8191, 768) for mode in FOLDS]
    both = [(mode, dtype, "high", *large) for dtype in ("bfloat16", "float32") for mode in DISTILL]
    both += [(mode, "bfloat16", "high", *where) for where in ((8191, 768), wide, few) for mode in DISTILL]
    both += [(mode, "float32", "highest", *large) for mode in DISTILL]
    several = [(mode, dtype, "high", *large) for dtype in ("bfloat16", "float32") for mode in SEVERAL]
    several += [(mode, "bfloat16", "high", 8191, 768) for mode in SEVERAL]
    # In full precision the library multiplies.
    full = [(mode, "float32", "highest", *large) for mode in (MODES[0], MODES[-1])]
    small = [(MODES[-1], dtype, "high", *few) for dtype in ("bfloat16", "float32")]
    library = [(mode, dtype, "high", *wide) for dtype in ("bfloat16", "float32") for mode in MODES]
    sizes = (("bfloat16", 8192), ("bfloat16", 8191), ("float32", 8191))
    plain = [(mode, dtype, "high", size, 768) for dtype, size in sizes for mode in (*MODES, *SEVERAL)]
    odd = [("exp", dtype, "high", ODD_ROWS, dim) for dtype in ("bfloat16", "float32") for dim in ODD]
    odd += [("exp", "float32", "highest", ODD_ROWS, 1000)]
    odd += [(name, "bfloat16", "", ODD_ROWS, dim) for dim in ODD for name in ODD_KERNELS]
    shared = [(mode, dtype, "high", 8191, 768) for dtype in ("bfloat16", "float32") for mode in PREFIXES]
    shared += [("prefixes, grad, q", "bfloat16", "high", *few), ("prefixes, grad, q", "float16", "high", *large)]
    return [
        *(("similarities", *case) for case in (*narrow, *tf32, *masked, *bent, *folds, *both, *several)),
        *(("similarities", *case) for case in (*full, *small, *library)),
        *(("prefixes", *case) for case in shared),
        *(("plain", *case) for case in plain),
        *(("odd", *case) for case in odd),
        *(("rows", name, dtype, "", 8192, 768) for dtype in ("bfloat16", "float32") for name in (*BY_ROW, *ROWWISE)),
    ]


def compile_all(target: str) -> list[dict[str, Any]]:
    launching.capability_of = lambda device: ELSEWHERE if amd(target) else divmod(number(target), 10)
    launching.on_nvidia = triton_classes.on_nvidia = lambda device: not amd(target)
    backend.multiprocessors = lambda device: 132
    backend._multiply = lambda sim, x, y: None
    triton_rows.row_options = triton_pairs.row_options = lambda name, interpreted: {**row_options(name)}
    for module in (rows, similarity, distill_kernels, *ROWWISE_KERNELS):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Recorder(getattr(module, name), target))
    results, seen = [], set()
    for kernel, mode, dtype, precision, size, dim in cases():
        kind = getattr(torch, dtype)
        if (kernel == "plain" and target != "sm_90") or (kernel == "odd" and amd(target)):
            continue  # the others have one path; what an access takes is counted on NVIDIA's
        if kernel == "prefixes" and (amd(target) or number(target) // 10 not in backend.SHARING):
            continue
        if amd(target) and dtype == "float32" and precision:
            precision = "highest"  # fp32 is fp32 there
        torch.set_float32_matmul_precision(precision or "highest")
        entry = {"kernel": kernel, "mode": mode, "dtype": dtype, "precision": precision, "size": size, "D": dim}
        if kernel == "odd" and mode in ROWWISE:
            {**classes(dim, dim), **pairs(dim)}[mode](kind)
        elif mode in ROWWISE:
            ROWWISE[mode](kind)
        elif mode in BY_ROW:
            by_row(mode, kind, size, dim)
        else:
            where = (size, size, dim, {"float32": "tf32" if precision == "high" else "fp32"}.get(dtype, TYPES[kind]))
            config = launching.picked(*where, launching.capability_of(None), mode)
            place = (kernel, *where[3:], config, mode, size % 16)
            if place in seen and kernel != "odd":
                continue  # the library's D is like any other where there is no such way
            seen.add(place)
            if kernel == "prefixes":
                prefixes(mode, kind, size)
            else:
                similarities(mode, kind, size, dim, kernel == "plain")
            entry |= {"config": config._asdict()}
        results.append({**entry, "warps": Recorder.warps, **resources(Recorder.compiled)})
    return results


def row_options(name: str) -> dict[str, int]:
    from fusedloss.backends.triton.config import pick_rows

    return pick_rows(name, interpreted=False)


def wrong(target: str, entry: dict[str, Any]) -> list[str]:
    """What an entry breaks of the rules."""
    block, multiprocessor, products = LIMITS[target]
    found = []
    if entry["shared"] > block << 10:
        found.append("shared memory")
    # Few numbers are single: a target's logit or its entry, a bias.
    if entry["kernel"] == "odd" and entry["LDG.16"] + entry["STG.16"] > SINGLE:
        found.append(f"{entry['LDG.16']} numbers read and {entry['STG.16']} written one by one")
    if "config" not in entry:
        whole_rows = ("prepare", "prepare, softcap, margin", "norms", "settle, patch", "weigh", "finish")
        if entry["kernel"] == "rows" and entry["mode"] in whole_rows and not entry["LDG.128"] and not amd(target):
            found.append("narrow loads")
        return found
    config = entry["config"]
    narrow = entry["dtype"] != "float32"
    if amd(target):
        if bool(entry[products]) != (narrow or products == "MFMA"):  # which multiplies fp32 as well
            found.append(f"{products} {entry[products]}")
        return found
    programs = config["programs"]
    if programs * entry["registers"] * 32 * config["num_warps"] > REGISTERS:
        found.append("registers of all programs")
    if programs * (entry["shared"] + 1024) > multiprocessor << 10:
        found.append("shared memory of all programs")
    what = entry["mode"].removeprefix("prefixes, ")
    stores = not what.startswith(("stats", "top", "guide")) and "_stats" not in what and not what.endswith("sums")
    multiplies = config["GEMM"] != "library" and (narrow or entry["precision"] == "high")
    if bool(entry[products]) != multiplies:
        found.append(f"{products} {entry[products]}")
    if bool(entry["UTMALDG"]) != (config["GEMM"] == "descriptors"):
        found.append(f"UTMALDG {entry['UTMALDG']}")
    if config["SPECIALIZE"] and entry["UTMALDG"] != 2:  # one loop of loads, without a prologue
        found.append("not specialized")
    if bool(entry["UTMASTG"]) != (config["GEMM"] == "descriptors" and stores):
        found.append(f"UTMASTG {entry['UTMASTG']}")
    if bool(entry["LDGSTS"]) != (config["GEMM"] == "pointers") or entry["LDGSTS"] != entry["LDGSTS.128"]:
        found.append(f"LDGSTS {entry['LDGSTS']}, {entry['LDGSTS.128']} of them of 16 bytes")
    if stores and config["GEMM"] != "descriptors" and not entry["STG.128"]:
        found.append("narrow stores")
    return found


def faults(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A line for each kernel that breaks a rule or was passed over."""
    lines = []
    for target, entries in found.items():
        spilled = {(e["mode"], e["dtype"]) for e in entries if e["spilled"] or e["local"]}
        known = SPILLS.get(triton.__version__, {}).get(target, set())
        lines += [f"{target}: {one}: spills" for one in sorted(spilled - known)]
        lines += [f"{target}: {one}: no longer spills" for one in sorted(known - spilled)]
        lines += [f"{target}: {broken}: {e}" for e in entries if (broken := wrong(target, e))]
        there = {(e["mode"], e["dtype"], e["precision"] == "high") for e in entries if e["kernel"] == "similarities"}
        tf32 = ("float32", not amd(target))
        asked = {(mode, *kind) for mode in MODES for kind in (("bfloat16", False), ("float16", False), tf32)}
        asked |= {(mode, "bfloat16", True) for mode in (*MASKED, *SOFTCAP, *FOLDS, *DISTILL, *SEVERAL)}
        lines += [f"{target}: {one}: not compiled" for one in sorted(asked - there)]
        if not amd(target) and number(target) // 10 in backend.SHARING:
            shared = {e["mode"] for e in entries if e["kernel"] == "prefixes"}
            lines += [f"{target}: {one}: not compiled" for one in sorted(set(PREFIXES) - shared)]
        rows_there = {e["mode"] for e in entries if e["kernel"] == "rows"}
        lines += [f"{target}: {one}: not compiled" for one in sorted({*BY_ROW, *ROWWISE} - rows_there)]
        odd = {case[1:] for case in cases() if case[0] == "odd" and not amd(target)}
        odd -= {(e["mode"], e["dtype"], e["precision"], e["size"], e["D"]) for e in entries if e["kernel"] == "odd"}
        lines += [f"{target}: {one}: not compiled" for one in sorted(odd)]
    return lines


def in_processes(targets: tuple[str, ...] = TARGETS) -> dict[str, list[dict[str, Any]]]:
    """Two at a time."""

    def one(target: str) -> list[dict[str, Any]]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, __file__, target]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds(7200))
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(done.stdout)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(targets, pool.map(one, targets), strict=True))


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "# What the kernels take",
        "",
        f"Compiled by Triton {triton.__version__} from sources {digest(*SOURCES)} without a GPU, with every optional "
        "operand present; written by `python tools/compile_kernels.py --table` and compared with the compiler in "
        "`tests/backends/test_compile.py`. Tile: BLOCK_M x BLOCK_N x BLOCK_D, over 2 where the epilogue folds halves, "
        "warps, stages. MMA: HGMMA on sm_90, UTCMMA on sm_100, MFMA and WMMA on AMD's, HMMA elsewhere. TMA: loads and "
        "stores; cp.async: LDGSTS, all of 16 bytes. Registers are per thread, shared memory in KiB, spills in bytes a "
        "thread. Of sizes that are no multiples of 16 no 16-bit matrix is read or written element by element.",
    ]
    for target, entries in found.items():
        lines += ["", f"## {target}", ""]
        lines += [
            "| kernel | dtype | tile | registers | shared | spills | MMA | TMA | cp.async | ex2 |",
            "|---" * 10 + "|",
        ]
        for e in entries:
            config = e.get("config")
            halves = " / 2" if config and config["SUBTILES"] == 2 else ""
            tile = (
                f"{config['BLOCK_M']} x {config['BLOCK_N']}{halves} x {config['BLOCK_D']}, {config['num_warps']} w, "
                f"{config['num_stages']} st, {config['GEMM']}{', specialized' if config['SPECIALIZE'] else ''}"
                if config
                else f"{e['warps']} w"
            )
            precision = (
                {"high": " (tf32)", "highest": " (ieee)"}[e["precision"]] if e["dtype"] == "float32" and config else ""
            )
            mma = next((e[name] for name in ("HGMMA", "UTCMMA", "HMMA", "MFMA", "WMMA") if e[name]), "")
            tma = f"{e['UTMALDG']} + {e['UTMASTG']}" if e["UTMALDG"] else ""
            mode = e["mode"]
            if e["kernel"] == "plain":
                mode += f"; no bias, {e['size']} rows"
            elif e["kernel"] == "odd":
                mode += f"; {e['size']} rows, D = {e['D']}"
            elif e["size"] % 16:
                mode += f"; {e['size']} rows"
            cells = (mode, e["dtype"] + precision, tile, e["registers"], f"{e['shared'] / 1024:.0f}", e["spilled"])
            lines.append("| " + " | ".join(map(str, (*cells, mma, tma, e["LDGSTS"] or "", e["EX2"] or ""))) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        found = in_processes()
        if broken := faults(found):
            sys.exit("\n".join(broken))
        sys.stdout.write(table(found))
    else:
        json.dump(compile_all(sys.argv[1]), sys.stdout)
