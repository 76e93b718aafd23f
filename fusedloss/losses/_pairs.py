"""Shared by the losses of pairs: their checks, and similarities that are larger for nearer rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..core import checks
from ..core.numerics import savable
from ..rowwise.pairs import columns

SIMILARITIES = ("cos", "dot", "euclidean", "manhattan", "angle")


def similarities(name: str, query: Tensor, *others: Tensor, backend: str) -> tuple[Tensor, ...]:
    """Returns K similarities `[B]`; a distance counts as its negative, as in sentence-transformers."""
    found = columns(name, query, *others, backend=backend)
    return tuple(-x for x in found) if name in ("euclidean", "manhattan") else found


def squares(found: Tensor, wanted: Tensor, reduction: str) -> Tensor:
    """Reduces squared differences of rows that all count; the mean of no rows is 0."""
    if reduction == "mean" and not found.numel():
        reduction = "sum"
    return checks.OPERATORS.mse_loss(found, wanted, checks.CODES[reduction])  # F.mse_loss first broadcasts them


def check_rows(**embeddings: Tensor) -> None:
    """Checks matrices [B, D] of one B."""
    if checks.alike(*embeddings.values()):
        return
    checks.embeddings(**embeddings)
    (first_name, first), *others = embeddings.items()
    for name, x in others:
        if x.shape[0] != first.shape[0]:
            raise ValueError(f"{name} must have {first.shape[0]} rows, like {first_name}, got {x.shape[0]}")


def check_columns(query: Tensor, positive: Tensor, negatives: Sequence[Tensor]) -> None:
    if not negatives:
        raise ValueError("negatives must hold at least one matrix [B, D], got none; pass it after positive")
    if not checks.alike(query, positive, *negatives):
        check_rows(query=query, positive=positive, **{f"negatives[{i}]": x for i, x in enumerate(negatives)})


def check_not_negative(name: str, value: Tensor) -> None:
    """Checks, on a CPU, that a label of likeness is not negative."""
    if not (checks.reads_values(value) and value.dtype.is_signed and value.numel()) or value.min().item() >= 0:
        return  # the least is NaN if any is, so that the others are compared one by one
    if bool((value < 0).any()):
        row = int((value < 0).nonzero()[0, 0])
        raise ValueError(
            f"{name} must hold 1 for the same and 0 for not, got {value[row].item()} in row {row}; "
            f"for labels +1 and -1 pass ({name} > 0)"
        )


def check_numbers(name: str, value: Tensor, shapes: Sequence[tuple[int, ...]], like: Tensor) -> Tensor:
    """Checks a label of real numbers, of any dtype and one of these shapes; returns it as autograd can save it."""
    if not isinstance(value, Tensor) or value.dtype.is_complex:
        got = value.dtype if isinstance(value, Tensor) else checks.a(value)
        raise TypeError(f"{name} must be a tensor of real numbers {_either(shapes)}, got {got}")
    checks.dense(name, value)
    if value.shape not in shapes:
        raise ValueError(f"{name} must have shape {_either(shapes)}, got {list(value.shape)}")
    checks.same_device(name, value, "the embeddings", like)
    return savable(value)


def _either(shapes: Sequence[tuple[int, ...]]) -> str:
    return " or ".join(str(list(shape)) for shape in shapes)
