"""Distillation inside the batch: the student's softmax over all columns learns the teacher's, neither materialised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Unpack, cast

import torch
from torch import Tensor

from .. import masks
from ..core import checks
from ..core.mask import Guide, Mask
from ..core.numerics import filled, row_numbers, stats_dtype
from ..core.problem import Beside, Block, Fold, Problem
from ..distributed import Request
from ..rowwise.pairs import scores
from . import _straight as straight
from ._options import AcrossOptions, Call, GatherOptions, expanded
from ._softmax import Loss, as_scale, autocast, distinct, result_of

FORMS = {"kl": "distill", "ce": "distill_ce", "mse": "distill_mse"}  # the folds
DIRECTIONS = ("query_to_key", "key_to_query")


@expanded
def info_nce_distill(
    query: Tensor,
    key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    teacher_temperature: float | Tensor = 0.05,
    form: str = "kl",
    directions: Sequence[str] = ("query_to_key",),
    negatives: Tensor | None = None,
    teacher_negatives: Tensor | None = None,
    negatives_mask: Tensor | None = None,
    bank: Tensor | None = None,
    teacher_bank: Tensor | None = None,
    mask: masks.Mask | Tensor | None = None,
    normalize: bool = False,
    **options: Unpack[GatherOptions],
) -> Loss:
    """Distillation from embeddings inside the batch (Hinton et al. 2015): the student's softmax learns the teacher's.

        q_i    = softmax_j(<query_i, key_j> / temperature)
        p_i    = softmax_j(<teacher_query_i, teacher_key_j> / teacher_temperature)
        loss_i = sum_j p_ij (log p_ij - log q_ij)    (form "kl")
                 -sum_j p_ij log q_ij                (form "ce")
                 sum_j (q_ij - p_ij)^2               (form "mse")

    "kl" and "ce" differ by the teacher's entropy, a constant, and have the same gradient. Both matrices are computed by
    row chunks, once for each direction, and neither is stored.

    Args:
        query: `[M, D]`, float16, bfloat16, float32 or float64, any strides.
        key: `[N, D]`, the dtype and device of `query`.
        teacher_query, teacher_key: `[M, T]` and `[N, T]`, the teacher's embeddings of the same texts, of any dimension
            and floating dtype. No tensor of the teacher receives a gradient.
        temperature: a positive number, or a tensor of one element, which receives a gradient.
        teacher_temperature: a positive number, or a tensor of one element.
        form: "kl", "ce" or "mse". "mse" adds up over the columns, as NeMo Automodel's InfoNCEDistillLoss and
            ScoreDistillLoss do; the mean of torch's mse_loss is "mse" divided by the number of columns.
        directions: "query_to_key", "key_to_query", or both, whose mean is the loss. "key_to_query" needs N = M.
        negatives, teacher_negatives: `[M, K, D]` and `[M, K, T]`, K more columns for each query that no other query
            sees. Masks do not apply to them. They are columns of "query_to_key" alone, as the bank's are.
        negatives_mask: bool `[M, K]`, True for the negatives that compete. The others must still be finite.
        bank, teacher_bank: `[B, D]` and `[B, T]`, B more columns that every query sees, behind the keys. The bank is
            read in place and receives no gradient.
        mask: the keys that may compete in a row: `masks.same_id`, `masks.same_group`, `masks.not_self` or bool
            `[M, N]`, True for those that may. Query i's own key i always may, except under `not_self`. It covers N + B
            columns with a bank.
        normalize: divide each row of all embeddings, the teacher's included, by `max(|row|, 1e-12)` first. The norms
            act on the fp32 accumulator, so that unit vectors are never rounded to 16 bits.
        reduction: "mean", "sum", or "none" (`[M]`). A row in which no column competes has loss 0, and counts.

    Returns:
        A 0-dim tensor (`[M]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> with torch.no_grad():
        ...     teacher_query, teacher_key = teacher(questions), teacher(answers)
        >>> query, key = student(questions), student(answers)
        >>> fusedloss.info_nce_distill(query, key, teacher_query, teacher_key, normalize=True).backward()
    """

    off: tuple[object, ...] = (form != "kl", negatives, teacher_negatives, negatives_mask, bank, teacher_bank, mask)
    off += (directions not in (DIRECTIONS[:1], DIRECTIONS),)
    found = straight.divergence(
        query,
        key,
        temperature,
        (teacher_query, teacher_key, teacher_temperature),
        options,
        off,
        inverse=True,
        cosine=normalize,
        teacher_cosine=normalize,
        symmetric=directions == DIRECTIONS,
    )
    if found is not None:
        return found

    def ask(call: Call) -> Request:
        check_form(form, directions)
        student = Embeddings(query, key, negatives, bank)
        teacher = Embeddings(teacher_query, teacher_key, teacher_negatives, teacher_bank)
        _check_embeddings(student, teacher, directions, across=call.group is not None)
        checks.scalar("temperature", temperature, query, positive=True)
        checks.scalar("teacher_temperature", teacher_temperature, query, positive=True)
        student, own = student.cast(), None
        if negatives_mask is not None:
            if negatives is None:
                raise ValueError("negatives must be given with negatives_mask, got none; leave negatives_mask out")
            checks.boolean("negatives_mask", negatives_mask, tuple(negatives.shape[:2]), query)
        if negatives is not None and negatives.shape[1]:
            own = _beside(student, teacher, negatives_mask, normalize, call)
        bound = _bound(mask, student)
        scale, number = as_scale(temperature, query, inverse=True)
        taught = as_scale(teacher_temperature, query, inverse=True)[0].detach()
        fold = Fold(FORMS[form], teacher_scale=taught, teacher_cosine=normalize)
        problems = []
        for direction in directions:
            if direction == "query_to_key":
                one = distill_problem(student, teacher, bound, replace(fold, beside=own), scale, normalize, call)
            else:
                turned = [_turned(bound[0])]
                one = distill_problem(student.turned(), teacher.turned(), turned, fold, scale, normalize, call)
            problems.append(replace(one, scale_bound=number))
        return call.request(f"info_nce_distill, directions {tuple(directions)}", *problems)

    return result_of(cast(AcrossOptions, options), ask)


class Embeddings(NamedTuple):
    """A model's embeddings; `info_nce_distill` explains each."""

    query: Tensor
    key: Tensor
    negatives: Tensor | None = None
    bank: Tensor | None = None

    @property
    def keys(self) -> list[Tensor]:
        """Returns the columns that every query sees."""
        return [self.key] if self.bank is None or not self.bank.shape[0] else [self.key, self.bank.detach()]

    def turned(self) -> Embeddings:
        """Returns those of the other direction."""
        return Embeddings(self.key, self.query)

    def cast(self) -> Embeddings:
        """Returns the same in autocast's dtype, each matrix once."""
        query = autocast(self.query)[0]
        key = query if self.key is self.query else autocast(self.key)[0]
        return Embeddings(query, key, *(None if x is None else autocast(x)[0] for x in (self.negatives, self.bank)))


def distill_problem(
    student: Embeddings,
    teacher: Embeddings,
    bound: Sequence[Mask],
    fold: Fold,
    scale: Tensor,
    cosine: bool,
    call: Call,
) -> Problem:
    """Builds the problem of one direction. bound: each block's mask. Embeddings enter the products as they are."""
    matrices, (x, *keys) = distinct(student.query, *student.keys)
    rows, columns = student.query.shape[0], student.key.shape[0]
    target = row_numbers(rows, scale) if bound[0].given else filled(rows, -1, torch.int64, scale.device)
    return Problem(
        operands=tuple(matrices),
        blocks=tuple(Block(x, key, mask=mask) for key, mask in zip(keys, bound, strict=True)),
        scale=scale,
        target=target if columns >= rows else target.masked_fill(target >= columns, -1),
        weight=filled(rows, 1.0, scale.dtype, scale.device),
        cosine=cosine,
        workspace_bytes=call.workspace_bytes,
        fold=replace(fold, teachers=tuple(Guide(teacher.query.detach(), key.detach()) for key in teacher.keys)),
        every_row=True,
    )


def _beside(student: Embeddings, teacher: Embeddings, admitted: Tensor | None, normalize: bool, call: Call) -> Beside:
    """Returns the similarities of each query's own negatives; they cost M K D, as little as their gradient."""
    assert student.negatives is not None and teacher.negatives is not None
    kind = "cos" if normalize else "dot"
    backend = "auto" if call.backend in ("cuda", "dense") else call.backend  # which take no pairs of rows
    values = scores(kind, student.query, *student.negatives.unbind(1), backend=backend)
    with torch.no_grad():
        wide = stats_dtype(teacher.query.dtype) is values.dtype or values.dtype is torch.float32
        columns = [x if wide else x.to(values.dtype) for x in (teacher.query, *teacher.negatives.unbind(1))]
        taught = scores(kind, *columns, backend=backend)
    return Beside(values, taught.to(values.dtype), admitted)


def _bound(mask: masks.Mask | Tensor | None, student: Embeddings) -> list[Mask]:
    """Checks the mask, and returns that of the keys and of the bank."""
    bound = masks.bind(mask, len(student.query), [len(x) for x in student.keys], student.query)
    if bound[0].margin is not None or bound[0].guide is not None:
        raise ValueError(
            "mask must be masks.same_id, masks.same_group, masks.not_self or a bool matrix, got score_margin or guide, "
            "which compare with a positive; pass what they admit as a bool matrix"
        )
    return bound


def _turned(mask: Mask) -> Mask:
    """Returns the mask of the other direction: where row i skips column i + offset, column j skips row j - offset."""
    if mask.skip is None:
        return mask.turned() if mask.given else mask
    return mask.turned()._replace(skip=mask.skip - 2 * mask.skip_offset, skip_offset=-mask.skip_offset)


def check_form(form: str, directions: Sequence[str]) -> None:
    checks.choice("form", form, tuple(FORMS))
    if not isinstance(directions, str):
        checks.sequence("directions", directions, "names", str(DIRECTIONS))
    if isinstance(directions, str) or not all(name in DIRECTIONS for name in directions):
        raise ValueError(f"directions must be a sequence of {', '.join(map(repr, DIRECTIONS))}, got {directions!r}")
    if not directions or len(set(directions)) != len(directions):
        raise ValueError(f"directions must hold one or two names, each once, got {directions!r}")


def _check_embeddings(student: Embeddings, teacher: Embeddings, directions: Sequence[str], *, across: bool) -> None:
    for name, own, other in zip(Embeddings._fields, student, teacher, strict=True):
        if (own is None) != (other is None):
            given, missing = (name, f"teacher_{name}") if other is None else (f"teacher_{name}", name)
            raise ValueError(f"{missing} must be given with {given}, got None; pass both or none")
    for name in ("negatives", "bank"):
        if getattr(student, name) is not None and "query_to_key" not in directions:
            raise ValueError(f"directions must hold 'query_to_key' with {name}, got {directions!r}; leave {name} out")
    if across and student.bank is not None:
        raise ValueError("bank must not be given together with group, got both; leave one of them out")
    for prefix, model in (("", student), ("teacher_", teacher)):
        named = {"query": model.query, "key": model.key} | ({} if model.bank is None else {"bank": model.bank})
        named = {f"{prefix}{name}": x for name, x in named.items()}
        if model.negatives is not None:
            checks.embeddings(**named)
            name, own, (rows, dim) = f"{prefix}negatives", model.negatives, model.query.shape
            if not isinstance(own, Tensor) or own.dim() != 3 or own.shape[::2] != (rows, dim):
                got = f"shape {list(own.shape)}" if isinstance(own, Tensor) else checks.a(own)
                raise ValueError(f"{name} must be [M, K, D] = [{rows}, any, {dim}], got {got}")
            named |= {f"{name}[:, {k}]": x for k, x in enumerate(own.unbind(1))}
        checks.embeddings(**named)
    for name, x, other in zip(Embeddings._fields, student, teacher, strict=True):
        if x is not None and other is not None:
            if x.shape[:-1] != other.shape[:-1]:
                shape = ", ".join([*map(str, x.shape[:-1]), "any"])
                raise ValueError(f"teacher_{name} must be [{shape}], like {name}, got {list(other.shape)}")
            checks.same_device(f"teacher_{name}", other, name, x)
    rows, columns = student.query.shape[0], student.key.shape[0]
    if "key_to_query" in directions and rows != columns:
        raise ValueError(
            f"key must have {rows} rows, one per row of query, with the direction 'key_to_query', got {columns}"
        )
    if rows and not columns and not across:
        raise ValueError("key must have at least one row, got none")
