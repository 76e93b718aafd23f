"""The numbers of a case, the same for a backend, for the formula in its precision and for the formula in fp64."""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..core.numerics import cdiv, stats_dtype
from ..core.rows import cut_off
from ..testing import inputs
from .zones import Zones

FAR = 1 << 31  # elements, which 32 bits do not count
ALIGNMENT = 16  # bytes: see `operand` of the backends
# Where kernels are emulated, an interpreted tile takes milliseconds. More rows and columns than EMULATED are halved: a
# tile has 64 or 128 of them. What is longer than LONG is quartered: a step has 16 to 128 of it.
EMULATED, LONG = 128, 1024

Outputs = dict[str, Tensor]
Run = Callable[[str], Outputs]  # by the backend's name


class Draw:
    """What `make` of a case takes its tensors from.

    wide: everything in fp64, from the same rounded numbers. cut: operands rounded as tf32 rounds them, where the
    device has no tensor cores that would. nudged: a number, of a draw in which each operand is off by a share `step`.
    short: similarities are, by what tensor cores may cut off.
    zones: what all tensors lie between, and in the layout that is asked for.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        *,
        wide: bool = False,
        cut: bool = False,
        nudged: int | None = None,
        step: float = 0.0,
        short: bool = False,
        zones: Zones | None = None,
    ):
        self.seed = zlib.crc32(name.encode())
        self.generator = torch.Generator().manual_seed(self.seed)
        self.given, self.device, self.wide, self.cut, self.zones = dtype, device, wide, cut, zones
        self.dtype = torch.float64 if wide else dtype
        self.nudges = None if nudged is None else torch.Generator().manual_seed(nudged)
        self.step, self.short = step, short
        self.emulated = device.type == "cpu"

    # Sizes ------------------------------------------------------------------------------------------------------------

    def size(self, count: int) -> int:
        """Of rows and columns: as ragged, and several tiles."""
        return count // 2 + 1 if self.emulated and count > EMULATED else count

    def length(self, count: int) -> int:
        """Of what is walked in steps: features, classes, documents."""
        return count // 4 + 1 if self.emulated and count > LONG else count

    def wave(self) -> int:
        """Rows and columns of more tiles of 128 x 128 than the device's multiprocessors take at once, two each."""
        if self.emulated:
            return 193
        found = torch.get_device_module(self.device).get_device_properties(self.device)
        tiles = 2 * (found.max_compute_units if self.device.type == "xpu" else found.multi_processor_count)
        return 128 * int(tiles**0.5 + 1) + 3

    def lost(self, dim: int) -> float:
        """The share that similarities are short of."""
        return cut_off(dim) if self.short else 0.0

    # Numbers ----------------------------------------------------------------------------------------------------------

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def below(self, end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, generator=self.generator)

    def pair(self, kind: str, rows: int, columns: int, dim: int) -> tuple[Tensor, Tensor]:
        """Queries and keys, fp64.

        random, pairs, clustered: of testing.inputs. duplicates: keys stand several times, queries are keys.
        large: of length 1e4. lattice: products are multiples of 1/16 in every precision, and exact. short: lengths
        from 1e-3 to 1, and a row of zeros on either side.
        """
        self.seed += 1  # the next ones are others
        if kind == "lattice":
            x, y = ((self.below(5, count, dim) - 2).double() / 4 for count in (rows, columns))
            y[1 :: max(1, columns // 5)] = y[0].clone()  # ties, none of them in the last column
            return x, y
        if kind == "duplicates":
            _, y = inputs("random", rows, columns, dim, torch.float64, self.seed)
            y = y[torch.arange(columns) % max(1, columns // 4)]
            return y[(7 * torch.arange(rows)) % columns].clone(), y
        if kind in ("large", "short"):
            x, y = inputs("random", rows, columns, dim, torch.float64, self.seed)
            if kind == "large":
                return 1e4 * x, 1e4 * y
            x, y = (t * 10.0 ** (self.below(4, len(t), 1) - 3) for t in (x, y))
            x[-1], y[len(y) // 2] = 0, 0
            return x, y
        return inputs(kind, rows, columns, dim, torch.float64, self.seed)

    # Tensors ----------------------------------------------------------------------------------------------------------

    def matrix(self, x: Tensor, layout: str = "rows", *, exact: bool = False) -> Tensor:
        """In the dtype of the operands. exact: whoever moves it changes which columns compete."""
        x = x.to(self.given)
        if self.cut and x.dtype == torch.float32:
            x = _as_tf32(x)
        x = x.to(self.dtype)
        if self.nudges is not None and not exact:
            x = x * (1 + self.step * (2 * torch.randint(2, x.shape, generator=self.nudges) - 1))
        x = x.to(self.device)
        return x if self.zones is None else LAYOUTS[layout](x, self.zones)

    def vector(self, x: Tensor) -> Tensor:
        """In the dtype of statistics, which is fp32 for all operands."""
        return self.fixed(x.float().to(stats_dtype(self.dtype)))

    def number(self, value: float) -> Tensor:
        return self.vector(torch.tensor(value, dtype=torch.float64))

    def fixed(self, x: Tensor) -> Tensor:
        """As it is: integers, bits."""
        x = x.to(self.device)
        return x if self.zones is None else self.zones.holding(x)


def _as_tf32(x: Tensor) -> Tensor:
    """To the nearest, ties away from 0."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


# Layouts --------------------------------------------------------------------------------------------------------------


def _rows(x: Tensor, zones: Zones) -> Tensor:
    """Rows that start on 16 bytes, poison between them: what kernels read as it is."""
    wide = ALIGNMENT // x.itemsize
    return zones.between(x.shape, (cdiv(x.shape[1], wide) * wide + wide, 1), x.dtype).copy_(x)


def _columns(x: Tensor, zones: Zones) -> Tensor:
    return _rows(x.T, zones).T


def _anywhere(x: Tensor, zones: Zones) -> Tensor:
    """Rows of which none starts on 16 bytes but by chance, the first one element behind."""
    rows, dim = x.shape
    step = dim | 1
    return zones.between((1 + rows * step,), (1,), x.dtype)[1:].as_strided((rows, dim), (step, 1)).copy_(x)


def _far(x: Tensor, zones: Zones) -> Tensor:
    """Rows so far apart that the last one lies beyond 2^31 elements; what lies between is never touched."""
    rows, dim = x.shape
    step = FAR // (rows - 1) // ALIGNMENT * ALIGNMENT + 4 * ALIGNMENT
    count = (rows - 1) * step + dim
    if x.device.type == "cpu":
        memory = mmap.mmap(-1, count * x.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        flat = torch.frombuffer(memory, dtype=x.dtype)
    else:
        flat = torch.empty(count, dtype=x.dtype, device=x.device)
    return flat.as_strided((rows, dim), (step, 1)).copy_(x)


_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # in Python since 3.13; Linux's number

LAYOUTS: dict[str, Callable[[Tensor, Zones], Tensor]] = {
    "rows": _rows,
    "columns": _columns,
    "anywhere": _anywhere,
    "far": _far,
}


def far_bytes(dtype: torch.dtype) -> int:
    """What a card needs free for a matrix in layout "far"."""
    return (FAR + FAR // 8) * dtype.itemsize
