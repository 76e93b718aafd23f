"""Faults that are known and being mended. A run reports them apart; a mended one leaves the list."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .cases import Case


class Known(NamedTuple):
    row: str
    what: str
    holds: Callable[[Case, str, str], bool]  # (case, form, what is wrong)


def zero_row(case: Case) -> bool:
    return any(x.dim() > 1 and x.numel() and bool((x == 0).all(-1).any()) for x in case.tensors.values())


KNOWN = [
    Known("A2", "distances of rows that are close together", lambda c, form, what: (
        c.name.startswith("batch_") and c.traits["distance"] != "cosine" and c.traits["close"] < 0.05)),
    Known("A2", "which of two duplicates is farther is decided by a rounding", lambda c, form, what: (
        c.name == "batch_semi_hard_triplet" and c.traits["close"] == 0)),
    Known("D2", "list_net's labels of bool and small integers on triton", lambda c, form, what: (
        c.name == "list_net" and "triton" in form
        and c.traits["labels"] in (torch.bool, torch.uint8, torch.int8, torch.int16))),
    Known("D3", "a guide beside other directions", lambda c, form, what: (
        c.traits.get("partition") is not None and "guide" in c.traits["mask"] and len(c.traits["directions"]) > 1
        and "AssertionError" in what)),
    Known("D7", "similarity='dot' in fp32", lambda c, form, what: (
        c.name == "global_orthogonal_regularization" and c.traits["similarity"] == "dot")),
    Known("D15", "a proxy of zeros", lambda c, form, what: c.name == "proxy_nca" and c.traits["zero_vector"]),
    Known("D15", "a projection in 16 bits", lambda c, form, what: (
        c.name == "embed_distill" and c.traits["projected"] and c.dtype.itemsize == 2)),
    Known("D16", "in 16 bits the sum of two gradients that were rounded apart", lambda c, form, what: (
        "of what is allowed" in what and c.dtype.itemsize == 2
        and {c.name, c.traits.get("inner")} & {"sup_con", "decoupled_contrastive"} != set())),
    Known("B6", "a row of zeros, or a prefix of one, in fp16", lambda c, form, what: (
        c.dtype == torch.float16 and not what.startswith("value")
        and (zero_row(c) or (c.name.startswith("matryoshka") and what.endswith("is NaN"))))),
    Known("T1", "triton, 16 bits: the gradient of a bias in fp32 or fp64 is a sum of entries rounded to 16 bits", (
        lambda c, form, what: "triton" in form and c.dtype.itemsize == 2
        and what.startswith(("linear_bias", "key_bias")))),
]  # fmt: skip


def known(case: Case, form: str, what: str) -> str | None:
    return next((k.row for k in KNOWN if k.holds(case, form, what)), None)
