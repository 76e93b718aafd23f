"""The launches of `backends/folds.py` in CUDA."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core.folds import Folded, Part
from ...core.problem import Problem
from ...core.strips import Strip
from .. import folds
from .launching import Launch, struct
from .rows import merge


class _Kernel:
    def __init__(self, name: str, strip: Strip, columns: bool):
        self.name, self.run = name, Launch(strip, narrow=True)

    def row_table(self) -> Tensor:
        return self.run.row_table()

    def column_table(self) -> Tensor:
        return self.run.column_table()

    def __call__(self, fields: dict[str, Any], out: Tensor | None = None) -> None:
        self.run(self.name, struct("FoldArgs" if self.name in folds.FOLDS else "SidesArgs", **fields), out)


def half_fold(problem: Problem, part: Part) -> folds.TwoSides | folds.HalfHinges:
    return folds.half_fold(folds.Kernels(_Kernel, merge), problem, part)


def fold_rows(problem: Problem, strip: Strip, out: Tensor | None, part: Part, score: Tensor) -> Folded:
    return folds.fold_rows(folds.Kernels(_Kernel, merge), problem, strip, out, part, score)
