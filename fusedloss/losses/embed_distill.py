"""Distances from a student's embeddings to a teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import few
from ..core import checks
from ..core.numerics import savable, stats_dtype
from ..rowwise.pairs import columns
from ._options import Call, RowOptions, expanded
from ._pairs import check_rows
from ._softmax import of_rows

DISTANCES = ("cosine", "mse", "l2")


@expanded
def embed_distill(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    distance: str = "cosine",
    projection: Tensor | Callable[[Tensor], Tensor] | None = None,
    **options: Unpack[RowOptions],
) -> Tensor:
    """The distance from a student's embeddings to a teacher's (Kim et al. 2023), as in sentence-transformers.

        loss_i = mean over columns c of d(projection(student_ic), teacher_ic)

    With distance "mse" it is sentence-transformers' MSELoss (Reimers & Gurevych 2020).

    Args:
        student: `[B, D]`, or a list of columns of that shape: float16, bfloat16, float32 or float64, any strides.
        teacher: `[B, T]` for all columns, or `[B, columns, T]`, or a list; T is D unless there is a projection. Any
            floating dtype; it is not rounded to the student's and receives no gradient.
        distance: "cosine" (1 - cosine, norms of at least 1e-8), "mse" (the mean of squares over T) or "l2" (the norm of
            the difference, whose gradient is 0 at 0).
        projection: from the student's dimension to the teacher's: a weight `[T, D]`, multiplied in fp32 whatever its
            dtype, or a function or module such as `torch.nn.Linear(D, T)`, whose 16-bit outputs are rounded before the
            distance. It is trained with the student.
        reduction: "mean", "sum" or "none" (`[B]`).

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 for a float64 student. An empty batch gives 0.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> fusedloss.embed_distill(student(texts), teacher_embeddings, distance="mse").backward()
    """
    call = Call(**options)
    checks.choice("distance", distance, DISTANCES)
    if projection is None and type(student) is Tensor is type(teacher) and checks.alike(student, teacher):
        students, teachers = [student], [teacher.detach()]  # as below, in fewer checks
    else:
        students = _students(student, teacher, projection)
        teachers = _teachers(teacher, students)
    first = students[0]
    if (
        distance == "mse"
        and call.reduction == "mean"
        and len(students) == 1
        and first.dtype is teachers[0].dtype is stats_dtype(first.dtype)
        and first.numel()
        and few(call.backend, first, "squares")
    ):
        return checks.OPERATORS.mse_loss(savable(first), savable(teachers[0]), checks.CODES["mean"])
    kind, eps = {"cosine": ("cos", 1e-8), "mse": ("squared", 0.0), "l2": ("euclidean", 0.0)}[distance]
    if len(teachers) == 1:  # read once for all columns
        found = columns(kind, teachers[0], *students, eps=eps, backend=call.backend)
    else:
        pairs = zip(teachers, students, strict=True)
        found = tuple(columns(kind, t, x, eps=eps, backend=call.backend)[0] for t, x in pairs)
    losses = found[0] if len(found) == 1 else torch.stack(found).mean(0)
    if distance == "cosine":
        losses = 1 - losses
    elif distance == "mse":
        losses = losses / students[0].shape[1]
    return of_rows(losses, call.reduction)


def _students(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    projection: Tensor | Callable[[Tensor], Tensor] | None,
) -> list[Tensor]:
    """Returns the columns, projected."""
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor):
            checks.sequence(name, x, "columns [B, D], or a tensor", f"[{name}_a, {name}_b]")
    students = [student] if isinstance(student, Tensor) else list(student)
    if not students:
        raise ValueError("student must be [B, D] or hold at least one column [B, D], got none")
    names = ["student" if isinstance(student, Tensor) else f"student[{i}]" for i in range(len(students))]
    check_rows(**dict(zip(names, students, strict=True)))
    return projected(students, projection)


def projected(students: list[Tensor], projection: Tensor | Callable[[Tensor], Tensor] | None) -> list[Tensor]:
    return students if projection is None else [_projected(x, projection) for x in students]


def _projected(x: Tensor, projection: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
    if not isinstance(projection, Tensor):
        if not callable(projection):
            raise TypeError(f"projection must be a weight [T, D], a function or None, got {checks.a(projection)}")
        return projection(x)
    if projection.dim() != 2 or projection.shape[1] != x.shape[1]:
        raise ValueError(f"projection must have shape [T, {x.shape[1]}], got {list(projection.shape)}")
    dtype = stats_dtype(x.dtype)
    with torch.autocast(x.device.type, enabled=False):  # autocast would round the product to 16 bits
        return F.linear(savable(x.to(dtype)), savable(projection.to(dtype)))


def _teachers(teacher: Tensor | Sequence[Tensor], students: Sequence[Tensor]) -> list[Tensor]:
    """Returns one teacher for all columns, or one for each."""
    (rows, dim), count, first = students[0].shape, len(students), students[0]
    if isinstance(teacher, Tensor):
        if teacher.shape not in ((rows, dim), (rows, count, dim)):
            need = f"[{rows}, {dim}] or [{rows}, {count}, {dim}]"
            raise ValueError(f"teacher must have shape {need}, like student, got {list(teacher.shape)}")
        found = [teacher] if teacher.dim() == 2 else list(teacher.unbind(1))
    else:
        found = list(teacher)
        if len(found) != count:
            raise ValueError(f"teacher must have {count} columns, like student, got {len(found)}")
    for x in found:
        if not isinstance(x, Tensor) or x.dtype not in checks.FLOATING:
            got = x.dtype if isinstance(x, Tensor) else checks.a(x)
            raise TypeError(f"teacher must be float16, bfloat16, float32 or float64 embeddings, got {got}")
        checks.dense("teacher", x)
        if x.shape != first.shape:
            raise ValueError(f"teacher must have columns of shape [{rows}, {dim}], like student, got {list(x.shape)}")
        checks.same_device("teacher", x, "student", first)
    dtype = stats_dtype(first.dtype)
    return [x.detach() if stats_dtype(x.dtype) == dtype else x.detach().to(dtype) for x in found]
