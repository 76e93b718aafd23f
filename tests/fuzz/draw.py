"""Random numbers of a case: shapes, values, strides, options; all from one seed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
REAL = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


class Draw:
    def __init__(self, seed: str):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.dtype = self.pick(*DTYPES)
        self.duplicates = False  # whether equal rows were drawn

    def pick(self, *choices: T) -> T:
        return self.random.choice(choices)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def whole(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def real(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    def log(self, low: float, high: float) -> float:
        return math.exp(self.random.uniform(math.log(low), math.log(high)))

    def some(self, options: dict[str, Any], share: float = 0.5) -> dict[str, Any]:
        """Each of the options or, more often than not, nothing of it: defaults are part of the interface."""
        return {name: value for name, value in options.items() if self.chance(share)}

    def reduction(self, options: dict[str, Any], *choices: str) -> str:
        if self.chance(0.7):
            options["reduction"] = self.pick(*(choices or ("mean", "sum", "none")))
        return options.get("reduction", "mean")

    def rows(self) -> int:
        return self.pick(
            1,
            2,
            3,
            self.whole(4, 16),
            self.whole(4, 16),
            self.whole(17, 40),
            *([self.whole(130, 300)] * self.chance(0.1)),
        )

    def dim(self) -> int:
        return self.pick(1, 2, 3, self.whole(4, 16), self.whole(4, 16), 16, self.whole(17, 40))

    # Values -----------------------------------------------------------------------------------------------------------

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)

    def embeddings(
        self, rows: int, dim: int, *, zeros: bool = False, duplicates: bool = True, dtype: torch.dtype | None = None
    ) -> Tensor:
        kind = self.random.random()
        x = self.normal(rows, dim)
        if kind < 0.3:
            x = x / x.norm(dim=1, keepdim=True)
        elif kind < 0.4 and rows:
            centres = self.normal(3, dim)
            x = centres[self.integers(0, 3, rows)] + 0.1 * x
        elif kind < 0.5:
            x = x * self.log(0.01, 5)
        elif kind < 0.55:
            x = x * self.uniform(-2, 2, rows, 1).exp()
        elif kind < 0.65 and duplicates and rows > 1:
            x = x[self.integers(0, max(rows // 2, 1), rows)]
            self.duplicates = True
        elif kind < 0.68 and duplicates and rows > 1:
            x = x[:1].expand(rows, dim)
            self.duplicates = True
        if zeros and rows and self.chance(0.1):
            x = x.clone()
            x[self.whole(0, rows - 1)] = 0
        return self.lay(x.to(dtype or self.dtype))

    def labels(self, rows: int, classes: int | None = None) -> Tensor:
        classes = classes or self.pick(1, 2, 3, max(rows // 2, 1), max(rows, 1), 1000)
        values = self.integers(0, classes, rows)
        if self.chance(0.2):
            values = values * 2**33 - 5  # any int64
        return self.lay(values)

    def vector(
        self, x: Tensor, dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, torch.bfloat16)
    ) -> Tensor:
        """Of the embeddings' dtype, or of one of these."""
        return self.lay(x.to(self.dtype if self.chance(0.6) else self.pick(*dtypes)))

    def parameter(self, value: float) -> float | Tensor:
        """A number, or a tensor of one element."""
        if self.chance(0.5):
            return value
        dtype = self.pick(torch.float32, torch.float64) if self.dtype != torch.float64 else torch.float64
        return torch.full(self.pick((), (1,)), value, dtype=dtype)

    def indices(self, rows: int, columns: int, ignore: int | None = None) -> Tensor:
        values = self.integers(0, max(columns, 1), rows)
        if ignore is not None and self.chance(0.4):
            values[torch.rand(rows, generator=self.generator) < self.pick(0.2, 0.2, 1.0)] = ignore
        return self.lay(values)

    # Strides ----------------------------------------------------------------------------------------------------------

    def lay(self, x: Tensor) -> Tensor:
        """The same values somewhere else: in a wider matrix, in the other order, from an offset. Gaps hold NaN."""
        if not x.numel() or not x.dim():
            return x.clone()
        # One number for all rows, or all numbers: may be held once.
        if self.chance(0.5) and len(x) > 1 and bool((x == x[:1]).all()):
            return x[:1].clone().expand(x.shape)
        kind = self.pick("plain", "plain", "offset", "step", "rows", "turned", "columns")
        gap = float("nan") if x.dtype.is_floating_point else (True if x.dtype == torch.bool else 77)
        if kind == "offset":
            start = self.whole(1, 5)
            flat = torch.full((x.numel() + start,), gap, dtype=x.dtype)
            view = flat[start:].view(x.shape)
        elif kind == "step":
            view = torch.full((*x.shape[:-1], 2 * x.shape[-1]), gap, dtype=x.dtype)[..., ::2]
        elif kind == "rows":
            view = torch.full((3 * len(x), *x.shape[1:]), gap, dtype=x.dtype)[1::3]
        elif kind == "turned" and x.dim() > 1:
            view = torch.empty((*x.shape[:-2], x.shape[-1], x.shape[-2]), dtype=x.dtype).transpose(-1, -2)
        elif kind == "columns":
            left = self.whole(1, 3)
            view = torch.full((*x.shape[:-1], x.shape[-1] + left + 2), gap, dtype=x.dtype)[
                ..., left : left + x.shape[-1]
            ]
        else:
            return x.contiguous().clone()
        view.copy_(x)
        return view
