"""The work done once per row, beside the similarity GEMM, in plain torch; `kernels/rows.py` has the same names.

Each function costs O(M D), or O(M) per tile of columns. Targets' scores are fp64 if the device has it, because the
loss of a well-fitted pair consists of their digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import products
from .folds import Part
from .mask import GuideRule
from .numerics import NORM_EPS, cdiv, inverse_norms, row_numbers, slices, stats_dtype, unit_rows, wide_dtype
from .problem import NO_RULE, Problem, RowRule
from .softmax import bent, decoupled_loss, marginal, softmax_loss
from .strips import Patch, Prepared, RowSums, Settled

# maths.md: Margin; Softcap; Online log-sum-exp; Settle; Masks and thresholds; Symmetric; Contraction
ROWS = 1024  # converted at a time, so that their fp32 copies stay in a CPU's caches
# Of dot products in fp64 on a CPU: 14 ms for 8192 of dimension 384, and 27 ms as vecdot of 1024 rows.
FEW_ROWS = 256


def columns_and_weights(target: Tensor, weight: Tensor, columns: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Returns targets that are valid columns, and the rows' weights.

    A row whose target is ignore_index gets weight 0; a row whose target is out of range gets NaN.
    """
    ignored = target == ignore_index
    outside = ~ignored & ((target < 0) | (target >= columns))
    return target.masked_fill(ignored | outside, 0), weight.masked_fill(ignored, 0).masked_fill(outside, torch.nan)


def several_targets(
    target: Tensor, weight: Tensor, columns: int, ignore_index: int, bias: Tensor | None, skip: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the targets of rows that may have several, [M, P], and the rows' weights.

    They come in order, each once, and -1 behind the first: none. A bias of -inf removes targets, and so does `skip`. A
    row without any gets weight 0, a row with one that is out of range NaN.
    """
    absent = target == ignore_index
    outside = ~absent & ((target < 0) | (target >= columns))
    inside = target.clamp(0, max(columns - 1, 0))
    if bias is not None:
        absent = absent | ((bias.detach()[inside] == -torch.inf) & ~outside)
    if skip is not None:
        absent = absent | (skip[:, None] == target)
    ordered = inside.masked_fill(absent | outside, columns).sort(1).values
    again = torch.cat([torch.zeros_like(absent[:, :1]), ordered[:, 1:] == ordered[:, :-1]], 1)
    ordered = torch.where(again | (ordered == columns), -1, ordered)
    weight = weight.masked_fill(ordered[:, 0] < 0, 0).masked_fill(outside.any(1), torch.nan)
    return torch.cat([ordered[:, :1].clamp(min=0), ordered[:, 1:]], 1), weight


def without_target(weight: Tensor, target: Tensor, bias: Tensor | None, skip: Tensor | None) -> Tensor:
    """Returns the rows' weights, 0 if a bias of -inf removes the target or the row skips it. A target of -1 is none."""
    if bias is not None:
        removed = bias.detach()[target.clamp(min=0)] == -torch.inf
        weight = weight.masked_fill(removed & (target >= 0), 0)
    if skip is not None:
        weight = weight.masked_fill((skip == target) & (target >= 0), 0)
    return weight


def operand(x: Tensor) -> Tensor:
    return x


def prepare(
    x: Tensor,
    y: Tensor,
    target: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rule: RowRule = NO_RULE,
    *,
    cosine: bool,
    wants_target_sim: bool,
) -> Prepared:
    """Returns both sides' 1/norms, and the target's logit `scale f_i f_t <x_i, y_t> + bias_t` with margin and softcap.

    The row dots are computed beside the sweep: inside a kernel's tile they would cost registers and spill.
    """
    margin, softcap = rule.margin, rule.softcap
    row_factor = inverse_norms(x) if cosine else None
    col_factor = row_factor if y is x else inverse_norms(y) if cosine else None
    wide = wide_dtype(x.device, scale.dtype)
    sim = torch.empty(x.shape[0], dtype=wide, device=x.device)
    none, target = target < 0, target.clamp(min=0)
    for chunk in row_chunks(x):
        own, other = x[chunk].to(wide), y[target[chunk]].to(wide)
        sim[chunk] = torch.linalg.vecdot(own, other)
        if any(margin):  # An angle is the root of a difference: rounded factors would cost it half of its digits.
            sim[chunk] /= _length(own) * _length(other)
    if row_factor is not None and col_factor is not None and not any(margin):
        sim = sim * row_factor * col_factor[target]
    sim = sim.masked_fill(none, 0)
    score, slope = marginal(sim, margin, torch.finfo(scale.dtype).eps) if any(margin) else (sim, None)
    score = score * scale
    if bias is not None:
        score = score + bias[target]
    if softcap:
        score = bent(score, softcap)
        slope = (1 if slope is None else slope) * (1 - (score / softcap).square())
    return Prepared(
        row_factor,
        col_factor,
        score,
        sim.to(scale.dtype) if wants_target_sim else None,
        None if slope is None else slope.to(scale.dtype),
    )


def further_targets(
    x: Tensor,
    y: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_factor: Tensor | None,
    col_factor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns the logits of targets besides the first, and their similarities, `[M, P]`; those of column -1 are any."""
    wide, columns = wide_dtype(x.device, scale.dtype), columns.clamp(min=0)
    sim = torch.empty(columns.shape, dtype=wide, device=x.device)
    for chunk in row_chunks(x, FEW_ROWS if x.is_cpu else ROWS):
        own = x[chunk].to(wide)
        for number, column in enumerate(columns[chunk].unbind(1)):
            sim[chunk, number] = y[column].to(wide).mul_(own).sum(1)
    if row_factor is not None and col_factor is not None:
        sim = sim * row_factor[:, None] * col_factor[columns]
    score = sim * scale
    return (score if bias is None else score + bias[columns]), sim


def _length(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1).clamp_min(NORM_EPS)


def merge(running: RowSums, part: RowSums) -> RowSums:
    """Merges the sums over two disjoint sets of columns."""
    mine, others = (torch.where(sums.total == 0, -torch.inf, sums.shift) for sums in (running, part))
    shift = torch.maximum(mine, others)
    shift = shift.masked_fill(shift == -torch.inf, 0)
    return RowSums(shift, running.total * torch.exp(mine - shift) + part.total * torch.exp(others - shift))


def settle(
    sums: RowSums,
    score: Tensor,
    weight: Tensor,
    rule: RowRule = NO_RULE,
    *,
    smooth: Tensor | None = None,
    slope: Tensor | None = None,
    patch: Patch | None = None,
    scaled: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
) -> Settled:
    """Returns each row's weighted loss, `weight / l`, and the target's entry in the gradient, from its negatives' sums.

    With `patch`, entries are relative to `weight / l`. They are added in fp32, rounded and written into the workspace.
    The result then also holds the rows of the matrices `scaled`, multiplied by `weight / l` and rounded to `dtype`.

    smooth: the amount that smoothing subtracts from every admissible entry of a row, if it is known by row.
    slope: multiplies the target's entry, see `Prepared`.
    """
    left_out = weight == 0
    if rule.decoupled:
        left_out = left_out | (sums.total == 0)
    # A score that is infinite in the other logits' dtype gives NaN, inf - inf, as torch's cross-entropy does.
    score = score.masked_fill(score.to(sums.total.dtype) == torch.inf, torch.nan)
    # A row without negatives takes its target's score as shift, so that 1 / l is 1 and not exp(-score). A row of weight
    # 0 does not, because its score may be -inf, and exp(-inf + inf) times its weight would be NaN.
    total = sums.total
    alone = (total == 0) & ~left_out
    shift = torch.where(alone, score.to(total.dtype), sums.shift)
    # A target's logit far above the others must not make l infinite. A smoothed entry is a share of l, and the limit of
    # 80 leaves room for the product with y. It loses probabilities below exp(-80), beside a share of 1 / N.
    most = 80.0 if rule.label_smoothing or rule.z_loss else 88.0 if total.dtype == torch.float32 else 700.0
    # A shift of 1e10 is rounded by up to 512: of a row without negatives the difference is 0, or NaN as its score is.
    above = torch.where(alone, 0 * score, score - shift)
    own = torch.exp(above.clamp(max=most).to(total.dtype))
    l = total.clone() if rule.decoupled else total + rule.copies * own
    loss = decoupled_loss(shift, total, score) if rule.decoupled else softmax_loss(shift, total, score, rule.copies)
    spread: float | Tensor = rule.label_smoothing
    if rule.z_loss:
        lse = (score + loss).to(total.dtype)
        spread = spread + 2 * rule.z_loss * lse
        l = l / (1 + 2 * rule.z_loss * lse)
        loss = loss + rule.z_loss * lse.square()
    over_l = (weight / l).masked_fill(left_out, 0)
    entry = spread * weight - over_l * total if patch is None else spread * l - total
    if smooth is not None:
        entry = entry - smooth
    if slope is not None:
        entry = entry * slope
    entry = entry.masked_fill(left_out, 0)
    if patch is not None:
        patch_target(patch, entry)
    loss = (weight * loss).masked_fill(left_out, 0)
    return Settled(loss, shift, over_l, entry, [(x * over_l[:, None]).to(dtype) for x in scaled])


def patch_target(patch: Patch, entry: Tensor) -> None:
    out, target, row_factor, col_factor = patch
    columns = out.shape[1]
    none, target = (target < 0) | (target >= columns), target.clamp(0, max(columns - 1, 0))
    if row_factor is not None and col_factor is not None:
        entry = entry * row_factor * col_factor[target]
    index, entry = target[:, None], entry[:, None].to(out.dtype)
    out.scatter_(1, index, torch.where(none[:, None], out.gather(1, index), entry))


# `torch.backends.cuda.matmul.fp32_precision` calls this, and takes six times as long. Every call of `auto` reads it.
_PRECISION = getattr(torch._C, "_get_fp32_precision_getter", None)


def tf32() -> bool:
    """Returns whether fp32 matmuls may use TF32, following torch's setting.

    Reads the new attribute first, because the old getter raises once the new setter has been used.
    """
    if _PRECISION is not None:
        return _PRECISION("cuda", "matmul") == "tf32"
    return torch.get_float32_matmul_precision() != "highest"


def cut_off(dim: int) -> float:
    """Returns the share of a sum of `dim` 16-bit products that tensor cores may cut off if the sum grows evenly.

    They add 8 or more products at a time and cut off digits below 2^-23 of the sum so far, half of that on average.
    """
    return dim / 8 * 2.0**-24


def tie(dim: int, dtype: torch.dtype) -> float:
    """Returns the largest difference at which two similarities of unit rows count as equal: that of duplicates.

    It is 4 eps for the products of a CPU, and eps for every 4 elements of the dimension because tensor cores cut off
    digits below the last place of the largest product. An A100 adds 4 products of tf32 at a time and loses up to
    eps / 2 of each and eps of their sum, half of that on average: 3/8 of eps an element, or about 1/8 for a sum that
    grows evenly to 1. In the tests' model of tensor cores (tests/host/) 2048 products of one sign, the worst case, are
    up to 247 eps short.
    """
    return (4 + math.ceil(dim / 4)) * torch.finfo(dtype).eps


def tie_to_exact(x: Tensor) -> float:
    """Returns `tie` between a product of rows like `x` and the fp64 score of the same rows.

    The score takes operands as they are. tf32 cuts up to 2^-10 off each operand (2^-11 if it rounds), and so up to
    2^-9 of both lengths off the product.
    """
    return tie(x.shape[1], stats_dtype(x.dtype)) + (2**-9 if x.dtype == torch.float32 and tf32() else 0.0)


def score_ties(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """Returns `tie_to_exact` of `<x_i, y_index[i]>`, relative to both lengths: a similarity may be near 0."""
    lengths = [torch.linalg.vector_norm(t, dim=1, dtype=stats_dtype(t.dtype)) for t in (x, y)]
    return tie_to_exact(x) * lengths[0] * lengths[1][index]


def above_ties(score: Tensor, ties: Tensor | float, scale: Tensor) -> Tensor:
    """Returns the logit above which a column ranks before the target.

    ties: the tolerance of the similarities. The rounding of scale and bias is added to it.
    """
    return score + (ties * scale).abs() + 4 * torch.finfo(score.dtype).eps * score.abs()


def guide_threshold(own: Tensor, rule: GuideRule, dim: int) -> Tensor:
    """Returns the cosine above which the guide drops a column, from its cosine `own` of row and target; ties stay."""
    margin = own.abs() * rule.margin if rule.relative else rule.margin
    return own - margin + tie(dim, own.dtype)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Returns `|x_i - y_j|^2`, `[R, N]`, in fp64 if the device has it; a distance within a tie of 0 becomes exactly 0.

    It follows from the product of the rows, whose rounding in fp32 puts duplicates 2e-4 to 2e-2 of their lengths apart.
    Differences of rows would be exact in fp32 but take a CPU 20 times as long: 11 s against 0.5 s, or 1 s in fp64, for
    [2048, 768].
    """
    wide = wide_dtype(x.device, stats_dtype(x.dtype))
    x, y = x.to(wide), y.to(wide)
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)
    squared = torch.addmm(lengths, x, y.T, alpha=-2)
    return squared.masked_fill(squared < tie(x.shape[1], wide) * lengths, 0)


def fold_scalars(problem: Problem) -> tuple[Tensor, ...]:
    return (problem.scale, *(problem.fold.scalars if problem.fold is not None else ()))


def fold_places(problem: Problem, pad: int = 1) -> list[slice]:
    """Returns the places of the blocks, and of the columns beside them, in a row of a fold's values.

    They start at multiples of `pad`.
    """
    assert problem.fold is not None
    beside, places, start = problem.fold.beside, [], 0
    widths = [problem.operands[block.key].shape[0] for block in problem.blocks]
    for width in [*widths, *([] if beside is None else [beside.values.shape[1]])]:
        places.append(slice(start, start + width))
        start += cdiv(width, pad) * pad
    return places


def fold_part(problem: Problem, chunk: slice, teacher: Tensor | None = None, admitted: Tensor | None = None) -> Part:
    """Returns the `Part` for a chunk of rows."""
    fold = problem.fold
    assert fold is not None
    rows = row_numbers(chunk.stop, problem.scale)
    rows = rows[chunk.start :] if chunk.start else rows
    row_labels, key_labels = fold.labels or (None, None)
    return Part(
        rows,
        problem.weight[chunk],
        problem.target[chunk],
        None if row_labels is None else row_labels[chunk],
        key_labels,
        rows if fold.itself else None,
        teacher,
        fold.teacher_scale,
        admitted,
    )


def teacher_sims(
    problem: Problem, chunk: slice, room: Tensor | None = None, places: Sequence[slice] = ()
) -> Tensor | None:
    """Returns a teacher's similarities of a chunk of rows to all columns, if the fold has one.

    room: where they are written, by `places`; None: a new tensor, by calls that torch.func can transform.
    """
    fold = problem.fold
    assert fold is not None
    if not fold.teachers:
        return None
    if room is None:
        wide = problem.scale.dtype
        pairs = [(query[chunk].to(wide), key.to(wide)) for query, key in fold.teachers]
        if fold.teacher_cosine:
            pairs = [(unit_rows(query), unit_rows(key)) for query, key in pairs]
        parts = [query @ key.T for query, key in pairs]
        parts += [] if fold.beside is None else [fold.beside.teacher[chunk]]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    for (query, key), place in zip(fold.teachers, places, strict=False):
        query, out = query[chunk], room[:, place]
        as_is = products.narrow(key.dtype, key.device) and query.dtype == key.dtype
        x, y = (query, key) if as_is else (query.to(room.dtype), key.to(room.dtype))
        products.mm(out, x, y.T)
        if fold.teacher_cosine:
            out.mul_(inverse_norms(x)[:, None]).mul_(inverse_norms(y))
    if fold.beside is not None:
        room[:, places[-1]] = fold.beside.teacher[chunk]
    return room


def weigh(patch: Patch, rows: Tensor, columns: Tensor, entry: Tensor) -> None:
    """Computes `dz = E (w_i / l_i + w_j / l_j)` in place. E was stored until both normalisers were known."""
    out = patch.out
    for tile in slices(out.shape[1], ROWS):
        out[:, tile] *= rows[:, None] + columns[tile]
    patch_target(patch, entry)


def finish(
    total: Tensor,
    over_l: Tensor | None,
    scale: Tensor,
    gain: Tensor | None,
    x: Tensor,
    factor: Tensor | None,
    out: Tensor,
) -> None:
    """Computes `out = scale / gain * over_l * total`, projected through the norms; `out` may be `total`.

    The projection `dx -= f^2 <dx, x> x` turns the gradient with 1/norms held fixed into the gradient through them. A
    row shorter than 1e-12 is divided by a constant and needs no projection.
    """
    multiplier = scale if gain is None else scale / gain
    squared = None if factor is None else (factor * factor).masked_fill(factor >= 1 / NORM_EPS, 0)
    for chunk in row_chunks(x):
        dx = total[chunk].mul_(multiplier if over_l is None else multiplier * over_l[chunk, None])
        if squared is not None:
            row = x[chunk].to(dx.dtype)
            dx.addcmul_(row, ((dx * row).sum(1) * squared[chunk])[:, None], value=-1)
        if out is not total:
            out[chunk] = dx


def row_chunks(x: Tensor, rows: int = ROWS) -> Iterator[slice]:
    if torch.compiler.is_compiling():  # the compiler fuses the steps; a loop would tie its graph to one number of rows
        yield slice(None)
        return
    yield from slices(x.shape[0], rows)


def largest_finite(x: Tensor) -> Tensor:
    """Returns the largest finite absolute value, 0-dim."""
    return x.nan_to_num(0, 0, 0).abs().amax()


def power_of_two(exponent: Tensor) -> Tensor:
    """Returns the largest power of two up to `2**exponent` that is a normal fp32 number; `exponent` may be infinite."""
    return torch.exp2(torch.floor(exponent).clamp(-126, 126))


def fresh(like: Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype | None = None) -> Tensor:
    """Returns memory for products to write. On a CPU it is filled with zeros first, which takes 0.25 ms a MiB.

    If the threads of a product touched its pages first, in strides, that would take 20 times as long.
    """
    out = like.new_empty(shape, dtype=dtype)
    return out.zero_() if like.device.type == "cpu" else out
