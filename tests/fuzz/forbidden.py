"""Calls that must raise, by the names of parameters: a name means the same in every loss.

The error must be a ValueError, TypeError or IndexError that names the argument, says what it got (a value, a dtype, a
shape, a type) and what would do; and nothing may have been written to.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .cases import DRAWERS, Case
from .draw import Draw
from .run import function

POSITIVE = (0.0, -1.0, math.inf, math.nan, "1", None, True, torch.ones(2), torch.ones(1, dtype=torch.int64))
FINITE = (math.inf, math.nan, "1", None, True)
CHOICE = ("avg", 3, None)
# Of options: values that none takes.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "temperature": POSITIVE,
    "scale": POSITIVE,
    "logit_scale": (math.inf, math.nan, "1", None, torch.ones(2)),
    "label_smoothing": (-0.1, 1.1, math.nan, "0", None),
    "ignore_index": (1.5, "0", True),
    "reduction": CHOICE,
    "backend": ("gpu", 3),
    "workspace_bytes": (0, -1, 1.5, "1"),
    "similarity": CHOICE,
    "distance": CHOICE,
    "margin": FINITE,
    "positive_margin": FINITE,
    "negative_margin": FINITE,
    "margin_strategy": CHOICE,
    "partition_mode": CHOICE,
    "directions": ("query_to_doc", ("doc_to_doc",), ("query_to_doc", "up")),
    "hardness_mode": ("avg", 3),
    "hardness_strength": (-1.0, math.nan, "1"),
    "form": CHOICE,
    "alpha": (math.nan, "1"),
    "beta": (-1.0, math.nan, "x"),
    "gamma": (-1.0, math.nan, "1"),
    "base": FINITE,
    "m": FINITE,
    "delta": (0.0, -1.0, "x"),
    "under": (-1.0, math.nan, "1"),
    "over": (-1.0, math.nan, "1"),
    "softcap": (0.0, -1.0, math.nan, "1"),
    "z_loss": (math.nan, "1"),
    "sigma": (0.0, -1.0, math.nan, "1", None),
    "mu": (math.nan, "1", None),
    "k": (0, -1, 1.5, "1"),
    "weighting": ("ndcg",),
    "reduction_log": CHOICE,
    "lambda_weight": ("linear",),
    "aggregation": CHOICE,
    "mean_weight": FINITE,
    "second_moment_weight": FINITE,
    "concatenation": ("rep", (), ("sum",)),
    "dims": ((), (0,), (10**6,), (1, 1), (1.5,)),
    "last_layer_weight": FINITE,
    "kl_temperature": (-1.0, math.nan, "1"),
    "layer_weighting": CHOICE,
    "group": ("everyone", 3),
    "strategy": ("scatter",),
}
# What a message says that offers a way out.
REMEDY = (
    "need",
    "must",
    "pass ",
    "move ",
    "cast ",
    "call ",
    "take",
    "leave",
    "agree",
    "expected",
    "should",
    "has not",
    "without",
)
# That beside others of their kind: those of torch's twins are torch's, and torch's error is theirs.
TORCH = ("mse", "l1", "huber", "smooth_l1", "mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss",
         "binary_cross_entropy_with_logits")  # fmt: skip


def bad_tensors(case: Case, name: str) -> Iterator[tuple[str, Tensor]]:
    """One tensor of a case made unfit: (what is wrong, the tensor)."""
    x = case.tensors[name]
    embeddings = name in (case.traits.get("embeddings") or ()) or (x.dim() == 2 and x.dtype.is_floating_point)
    integers = x.dtype == torch.int64
    if case.name in TORCH:
        return
    if embeddings and case.name not in ("cross_entropy", "focal", "softmax_pair", "margin_mse", "distill_kl_div"):
        yield "complex", x.to(torch.complex64)
        if name in case.grads and name != "labels":
            yield "int32", x.to(torch.int32)
            yield "3-D", x[None]
        if name in ("query", "key", "anchor", "positive", "z1", "a", "image_features", "embeddings"):
            yield "1-D", x[:, 0]
    if (
        integers
        and name in ("target", "labels")
        and not case.name.startswith(("list", "plist", "lambda", "rank", "adr"))
    ):
        yield "int32", x.int()
        yield (
            "float",
            x.double() + 0.5 if case.name not in ("cross_entropy", "softmax_pair", "focal") else x.to(torch.complex64),
        )
        yield "one row too many", torch.cat([x.reshape(-1), x.new_zeros(1)])
        if name == "target" and x.numel():
            yield "outside", torch.full_like(x, 10**6)


def calls(case: Case) -> Iterator[tuple[str, str, Any]]:
    """(argument, what it is given, how to call)."""
    f = function(case.name)
    takes = inspect.signature(f).parameters

    def options(name: str, value: Any) -> Any:
        def call() -> Any:
            return case.call(lambda *x, **o: f(*x, **{**o, name: value}), case.tensors, case.options)

        return call

    for name in takes:
        if name not in OPTIONS or name in case.tensors:
            continue
        if case.name in TORCH and name in ("reduction",):
            continue
        for value in OPTIONS[name]:
            yield name, repr(value), options(name, value)
    for name in case.tensors:
        for what, bad in bad_tensors(case, name):
            yield name, what, lambda name=name, bad=bad: case.call(f, {**case.tensors, name: bad}, case.options)


def complaint(case: Case, name: str, given: str, call: Any) -> str | None:
    """What is wrong with how a forbidden call ends; None: nothing."""
    before = {n: (x.clone(), x._version) for n, x in case.tensors.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = call()
    except (ValueError, TypeError, IndexError) as error:
        message = str(error)
    except Exception as error:
        return f"{name}={given} raises {type(error).__name__}: {error}"
    else:
        shown = found if not isinstance(found, Tensor) or found.numel() > 1 else found.item()
        return f"{name}={given} is accepted: {str(shown)[:60]}"
    for n, (x, version) in before.items():
        if case.tensors[n]._version != version or not torch.equal(case.tensors[n].nan_to_num(), x.nan_to_num()):
            return f"{name}={given} is refused after {n} was written to"
    if "multiple values for argument" in message:  # it was given by place: no call that anybody would make
        return None
    spoken = name.rstrip("0123456789")
    listed = ("embeddings[", "columns[", "guide[", "negatives[")  # tensors that the function knows by their place
    if spoken not in message and not (name in case.tensors and any(known in message for known in listed)):
        if (case.name, "text_features" in message) != ("contrastive_tension_in_batch", True):  # row B7 of the reports
            return f"{name}={given} is refused without its name: {message}"
    if not any(word in message for word in REMEDY):
        return f"{name}={given} is refused without a remedy: {message}"
    return None


def complaints(name: str, seed: int) -> tuple[int, list[str]]:
    """How many forbidden calls of a case were made, and what is wrong with them."""
    d = Draw(f"{name}:{seed}")
    case = DRAWERS[name](d)
    found, count = [], 0
    for argument, given, call in calls(case):
        count += 1
        if wrong := complaint(case, argument, given, call):
            found.append(wrong)
    return count, found
