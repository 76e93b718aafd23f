"""Epilogues of losses that are no softmax: sums over a row's similarities v, and the derivative by v times its weight.

Called as those of `softmax.py`, whose tables these write, too. They fold v itself and read no logit. Positives are the
columns of equal label, or without labels the target; all others are negatives, except the row's own column.

Of one matrix against itself a tile may stand for both places of its pairs. What is named `Col` is then that of its
columns as rows: v_ij = v_ji, and i is a positive of j where j is one of i.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .softmax import exponential, finite, hits, load_softmax

# maths.md: Folds


@triton.jit
def softplus(u):
    """Returns log(1 + exp(u)) and its derivative, the logistic function.

    Of e = exp(-|u|), log(1 + e) is e times a polynomial that meets log(1 + e) / e at Chebyshev's points of [0, 1]: with
    its rounding in fp32 1.04 ulp off, and 8 instructions fewer than the division of a series in e / (2 + e).
    """
    e = exponential(-tl.abs(u))
    series = 0.019542526 + e * -0.0031760571
    series = 0.10543624 + e * (-0.056373611 + e * series)
    series = 0.19663274 + e * (-0.1526967 + e * series)
    series = 0.3332971 + e * (-0.24951616 + e * series)
    log = e * (1 + e * (-0.49999893 + e * series))
    return tl.maximum(u, 0.0) + log, tl.where(u < 0, e, 1.0) / (1 + e)


@triton.jit
def _positives(sim, Target, offs_m, offs_n, mask_m, mask_n, pid_n, args):
    """Returns which columns are positives of their row; without labels and without a target, none."""
    if args.RowLabels is not None:
        rows = tl.load(args.RowLabels + offs_m, mask=mask_m, other=0)
        keys = tl.load(args.KeyLabels + offs_n, mask=mask_n, other=0)
        positive = rows[:, None] == keys[None, :]
    elif Target is not None:
        positive = hits(Target, offs_m, mask_m, pid_n, sim.shape[1])
    else:
        positive = tl.full(sim.shape, 0, tl.int1)
    return positive


@triton.jit
def _counts(sim, offs_m, mask_m, mask_n, pid_n, args):
    """Returns which columns there are, the row's own left out."""
    counts = mask_n[None, :]
    if args.Own is not None:
        counts &= ~hits(args.Own, offs_m, mask_m, pid_n, sim.shape[1])
    return counts


# Sums -----------------------------------------------------------------------------------------------------------------


class FoldArgs(NamedTuple):
    Scale: Any  # 0-dim
    Weight: Any  # [M]; 0 leaves a row out
    RowLabels: Any = None  # int64 [M]
    KeyLabels: Any = None  # int64 [N]
    Own: Any = None  # int64 [M]: the column that is the row itself
    TargetValue: Any = None  # [M]: margin_ranking's v at the target
    SigmoidBias: Any = None  # 0-dim
    margin: Any = None
    sign: Any = None
    pulls: Any = None  # pair_hinge: 1 sums over the positives, 0 over the negatives
    Loss: Any = None  # [n_tiles, M] each
    Count: Any = None
    ScaleGrad: Any = None
    BiasGrad: Any = None
    ColWeight: Any = None  # [N]: pair_hinge's, of both places
    ColLoss: Any = None  # [m_tiles, N]
    ColCount: Any = None


@triton.jit
def sigmoid(z, sim, Target, offs_m, offs_n, mask_m, mask_n, pid_m, pid_n, M, N, args):
    """`log(1 + exp(-y u))`, u = scale v + bias, y = 1 for positives and -1 for negatives."""
    positive = _positives(sim, Target, offs_m, offs_n, mask_m, mask_n, pid_n, args)
    counts = _counts(sim, offs_m, mask_m, mask_n, pid_n, args)
    scale, weight = tl.load(args.Scale), tl.load(args.Weight + offs_m, mask=mask_m, other=0.0)
    v = tl.where((weight != 0)[:, None], sim, 0.0)  # a row that is left out may be NaN
    u = v * scale + tl.load(args.SigmoidBias)
    loss, p = softplus(tl.where(positive, -u, u))
    dz = tl.where(counts, weight[:, None] * tl.where(positive, -p, p), 0.0)
    row = pid_n.to(tl.int64) * M + offs_m
    tl.store(args.Loss + row, tl.sum(tl.where(counts, loss, 0.0), axis=1), mask=mask_m)
    tl.store(args.BiasGrad + row, tl.sum(dz, axis=1), mask=mask_m)
    tl.store(args.ScaleGrad + row, tl.sum(dz * v, axis=1), mask=mask_m)
    return dz * scale


@triton.jit
def _open(hinge, chosen):
    """Returns which hinges are open; NaN is."""
    return chosen & ~(hinge <= 0)


@triton.jit
def _add_hinges(hinge, pays, Loss, Count, mask, axis: tl.constexpr):
    """Sums open hinges and counts them."""
    tl.store(Loss, tl.sum(tl.where(pays, hinge, 0.0), axis=axis), mask=mask)
    tl.store(Count, tl.sum(tl.where(pays, 1.0, 0.0), axis=axis), mask=mask)


@triton.jit
def margin_ranking(z, sim, Target, offs_m, offs_n, mask_m, mask_n, pid_m, pid_n, M, N, args):
    """`max(0, margin - v_t + v)` of all but the target, whose entry the host adds."""
    counts = _counts(sim, offs_m, mask_m, mask_n, pid_n, args)
    counts &= ~hits(Target, offs_m, mask_m, pid_n, sim.shape[1])
    target_value = tl.load(args.TargetValue + offs_m, mask=mask_m, other=0.0)
    weight = tl.load(args.Weight + offs_m, mask=mask_m, other=0.0)
    hinge, row = sim - target_value[:, None] + args.margin, pid_n.to(tl.int64) * M + offs_m
    pays = _open(hinge, counts)
    _add_hinges(hinge, pays, args.Loss + row, args.Count + row, mask_m, 1)
    return tl.where(pays, weight[:, None], 0.0)


@triton.jit
def pair_hinge(z, sim, Target, offs_m, offs_n, mask_m, mask_n, pid_m, pid_n, M, N, args):
    """`max(0, sign (v - margin))` of the positives or of the negatives."""
    positive = _positives(sim, Target, offs_m, offs_n, mask_m, mask_n, pid_n, args)
    counts = _counts(sim, offs_m, mask_m, mask_n, pid_n, args)
    counts &= positive ^ (args.pulls == 0)
    hinge, row = args.sign * (sim - args.margin), pid_n.to(tl.int64) * M + offs_m
    pays = _open(hinge, counts)
    _add_hinges(hinge, pays, args.Loss + row, args.Count + row, mask_m, 1)
    if args.ColLoss is not None:
        column = pid_m.to(tl.int64) * N + offs_n
        _add_hinges(hinge, pays & mask_m[:, None], args.ColLoss + column, args.ColCount + column, mask_n, 0)
    slope = (tl.load(args.Weight + offs_m, mask=mask_m, other=0.0) * args.sign)[:, None]
    if args.ColWeight is not None:
        slope += (tl.load(args.ColWeight + offs_n, mask=mask_n, other=0.0) * args.sign)[None, :]
    return tl.where(pays, slope, 0.0)


# Two log-sum-exps -----------------------------------------------------------------------------------------------------


class SidesArgs(NamedTuple):
    """Losses of the log-sum-exps of f(v) over a row's positives, which it pulls, and over its negatives, which it
    pushes.

    f(v) = pull (scale v - pull_base), push likewise; with gamma circle's, whose weights are constants to the gradient:
    -gamma max(0, 1 + margin - v) (v - 1 + margin) and gamma max(0, v + margin) (v - margin).
    """

    Scale: Any  # 0-dim
    RowLabels: Any = None  # as FoldArgs'
    KeyLabels: Any = None
    Own: Any = None
    pull: Any = None
    push: Any = None
    pull_base: Any = 0.0
    push_base: Any = 0.0
    margin: Any = None
    gamma: Any = None
    PullMax: Any = None  # statistics: [n_tiles, M] each
    PullSum: Any = None
    PushMax: Any = None
    PushSum: Any = None
    Count: Any = None  # of the positives
    ColPullMax: Any = None  # [m_tiles, N] each
    ColPullSum: Any = None
    ColPushMax: Any = None
    ColPushSum: Any = None
    PullShift: Any = None  # gradient: [M] each
    PullWeight: Any = None
    PushShift: Any = None
    PushWeight: Any = None
    ColPullShift: Any = None  # [N] each
    ColPullWeight: Any = None
    ColPushShift: Any = None
    ColPushWeight: Any = None
    Q: Any = None  # [n_tiles, M]


@triton.jit
def _side(v, positive, args):
    """Returns f(v) and its slope. positive: of each element, or of all."""
    if args.gamma is None:
        scale = tl.load(args.Scale)
        factor = tl.where(positive, args.pull, args.push)
        f = factor * (v * scale) - tl.where(positive, args.pull * args.pull_base, args.push * args.push_base)
        slope = factor * scale
    else:
        u = tl.where(positive, 1 - v, v)
        weight = args.gamma * tl.maximum(u + args.margin, 0.0)
        f = weight * (u - args.margin)
        slope = tl.where(positive, -weight, weight)
    return f, slope


@triton.jit
def _log_sum(f, Max, Sum, mask, axis: tl.constexpr):
    largest = tl.max(f, axis=axis)
    tl.store(Max, largest, mask=mask)
    tl.store(Sum, tl.sum(exponential(f - tl.expand_dims(finite(largest), axis)), axis=axis), mask=mask)


@triton.jit
def sides_stats(z, sim, Target, offs_m, offs_n, mask_m, mask_n, pid_m, pid_n, M, N, args):
    """Maxima of f and sums of exp(f - maximum), of each side.

    Two exponentials an element, one of them of -inf: to choose one would compare the labels again after the maxima, for
    every sum.
    """
    positive = _positives(sim, Target, offs_m, offs_n, mask_m, mask_n, pid_n, args)
    counts = _counts(sim, offs_m, mask_m, mask_n, pid_n, args)
    if args.ColPullMax is not None:
        counts &= mask_m[:, None]
    row = pid_n.to(tl.int64) * M + offs_m
    pull, _ = _side(sim, True, args)
    push, _ = _side(sim, False, args)
    pull = tl.where(counts & positive, pull, float("-inf"))
    push = tl.where(counts & ~positive, push, float("-inf"))
    _log_sum(pull, args.PullMax + row, args.PullSum + row, mask_m, 1)
    _log_sum(push, args.PushMax + row, args.PushSum + row, mask_m, 1)
    if args.ColPullMax is not None:
        column = pid_m.to(tl.int64) * N + offs_n
        _log_sum(pull, args.ColPullMax + column, args.ColPullSum + column, mask_n, 0)
        _log_sum(push, args.ColPushMax + column, args.ColPushSum + column, mask_n, 0)
    if args.Count is not None:
        # Always 1, but of the tile: a sum of labels alone has a layout of its own, to which Triton 3.7.1 converts the
        # tile.
        one = tl.where((sim == sim) | (sim != sim), 1.0, 0.0)
        tl.store(args.Count + row, tl.sum(tl.where(counts & positive, one, 0.0), axis=1), mask=mask_m)
    return sim


@triton.jit
def _softmax_of_side(f, positive, pull_shift, pull_weight, push_shift, push_weight):
    """Returns `weight exp(f - shift)`, of each element's side."""
    e = exponential(f - tl.where(positive, pull_shift, push_shift))
    return e * tl.where(positive, pull_weight, push_weight)


@triton.jit
def sides_grad(z, sim, Target, offs_m, offs_n, mask_m, mask_n, pid_m, pid_n, M, N, args):
    """`weight exp(f - shift)` times the slope of f, where weights hold the loss's derivative by the side's log-sum-exp
    over the side's sum. Q receives the row sums of what is before the slope, times v."""
    positive = _positives(sim, Target, offs_m, offs_n, mask_m, mask_n, pid_n, args)
    counts = _counts(sim, offs_m, mask_m, mask_n, pid_n, args)
    pull_shift, pull_weight = load_softmax(args.PullShift, args.PullWeight, offs_m, mask_m)
    push_shift, push_weight = load_softmax(args.PushShift, args.PushWeight, offs_m, mask_m)
    taken = ((pull_weight != 0) | (push_weight != 0))[:, None]
    if args.ColPullShift is not None:
        col_pull_shift, col_pull_weight = load_softmax(args.ColPullShift, args.ColPullWeight, offs_n, mask_n)
        col_push_shift, col_push_weight = load_softmax(args.ColPushShift, args.ColPushWeight, offs_n, mask_n)
        taken = taken | ((col_pull_weight != 0) | (col_push_weight != 0))[None, :]
    v = tl.where(taken, sim, 0.0)  # a row that is left out may be NaN
    f, slope = _side(v, positive, args)
    d = _softmax_of_side(
        f, positive, pull_shift[:, None], pull_weight[:, None], push_shift[:, None], push_weight[:, None]
    )
    if args.ColPullShift is not None:
        d += _softmax_of_side(
            f,
            positive,
            col_pull_shift[None, :],
            col_pull_weight[None, :],
            col_push_shift[None, :],
            col_push_weight[None, :],
        )
    d = tl.where(counts, d, 0.0)
    if args.Q is not None:
        tl.store(args.Q + pid_n.to(tl.int64) * M + offs_m, tl.sum(d * v, axis=1), mask=mask_m)
    return d * slope
