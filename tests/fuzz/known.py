"""What differs from the formula and is left so, each with its reason. A run reports it apart."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch

from .cases import Case, Ops, Rows


class Known(NamedTuple):
    row: str
    what: str  # and why it is left
    holds: Callable[[Case, str, str], bool]  # (case, form, what is wrong)


def zero_row(case: Case) -> bool:
    return any(x.dim() > 1 and x.numel() and bool((x == 0).all(-1).any()) for x in case.tensors.values())


def overflows(case: Case) -> bool:
    """Whether a row's loss, and with it the slope of its transform, is beyond fp32 in what follows."""
    wide = {name: x.double() if x.dtype.is_floating_point else x for name, x in case.tensors.items()}
    found = case.formula(Ops(case.dtype), SimpleNamespace(**wide))
    return bool(((found.losses if isinstance(found, Rows) else found).abs() > 1e24).any())


KNOWN = [
    Known("ties", "of rows that are duplicates a rounding decides which is farther, and in one dimension their "
          "directions cancel to 0", lambda c, form, what: (
        c.name in ("batch_semi_hard_triplet", "batch_all_triplet") and c.traits["close"] < 0.05)),
    Known("fp16", "the gradient of a row of zeros, or of a prefix of one, is 1e12 times another: beyond "
          "fp16, where two infinities add up to NaN", lambda c, form, what: (
        c.dtype == torch.float16 and not what.startswith("value")
        and (zero_row(c) or (c.name.startswith("matryoshka") and what.endswith("is NaN"))))),
    Known("bias", "triton, 16 bits: the gradient of a bias in fp32 or fp64 is a sum of entries rounded to 16 bits", (
        lambda c, form, what: "triton" in form and c.dtype.itemsize == 2
        and what.startswith(("linear_bias", "key_bias")))),
    Known("slope", "generalised(q) of a decoupled loss below -88 / q: its slope e^(-q l) is beyond fp32, and "
          "times 0, of a column left out, NaN", lambda c, form, what: (
        c.dtype != torch.float64 and bool(c.options.get("decoupled"))
        and c.options.get("transform", ("",))[0] == "generalised" and "is nan" in what and overflows(c))),
]  # fmt: skip


def known(case: Case, form: str, what: str) -> str | None:
    return next((k.row for k in KNOWN if k.holds(case, form, what)), None)
