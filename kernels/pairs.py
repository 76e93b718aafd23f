"""Rows of one matrix with the same rows of others: their scores and gradients.

The K others are a tuple of pointers, visited one after the other. The query's rows of a program then stay in L1, so
every matrix is read from memory once, and every gradient written once.
"""

import triton
import triton.language as tl

from .rows import _load, _store
from .vectors import up


@triton.jit
def score_kernel(
    Query,  # [M, D]
    others,  # K matrices [M, D]
    Value,  # [K, M]: the scores, with sign for AnglE
    Norm,  # [1 + K, M] or None: the rows' lengths
    M,
    D,
    half,  # ceil(D / 2)
    eps,
    stride_qm,
    strides,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,  # divides D, half for AnglE, and the strides: see vectors.py
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = offs < M
    D, half, stride_qm = up(D, WIDE), up(half, WIDE), up(stride_qm, WIDE)
    for k in tl.static_range(len(others)):
        stride = up(strides[k], WIDE)
        value = tl.zeros((BLOCK_R,), tl.float32)
        x_squared = tl.zeros((BLOCK_R,), tl.float32)
        y_squared = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, half if KIND == "angle" else D, BLOCK_D):
            if KIND == "angle":
                x, x_hi, y, y_hi = _halves(Query, others[k], offs, stride_qm, stride, start, half, D, mask, BLOCK_D)
                value += tl.sum(x * y + x_hi * y_hi + x_hi * y - x * y_hi, axis=1)
                x_squared += tl.sum(x * x + x_hi * x_hi, axis=1)
                y_squared += tl.sum(y * y + y_hi * y_hi, axis=1)
            else:
                x = _load(Query, offs, stride_qm, start, D, mask, BLOCK_D)
                y = _load(others[k], offs, stride, start, D, mask, BLOCK_D)
                if KIND == "cos":
                    x_squared += tl.sum(x * x, axis=1)
                    y_squared += tl.sum(y * y, axis=1)
                if KIND == "cos" or KIND == "dot":
                    value += tl.sum(x * y, axis=1)
                else:
                    apart = _apart(x, y, eps, start, D, BLOCK_D)
                    value += tl.sum(tl.abs(apart) if KIND == "manhattan" else apart * apart, axis=1)
        if KIND == "euclidean":
            value = tl.sqrt_rn(value)
        if Norm is not None:
            x_norm = _length(x_squared, Query)
            y_norm = _length(y_squared, others[k])
            value *= _inverse(x_norm, eps)
            value *= _inverse(y_norm, eps)
            if k == 0:
                tl.store(Norm + offs, x_norm, mask=mask)
            tl.store(Norm + _place(k + 1, M, offs), y_norm, mask=mask)
        tl.store(Value + _place(k, M, offs), value, mask=mask)


@triton.jit
def score_backward_kernel(
    Upstream,  # [M, K]
    Query,
    others,
    Value,  # [K, M] or None
    Norm,
    DQuery,  # [M, D], or None if not wanted
    dothers,  # likewise, K of them
    M,
    D,
    half,
    eps,
    stride_um,
    stride_uk,
    stride_qm,
    strides,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,  # divides D, half for AnglE, and the strides: see vectors.py
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = offs < M
    D, half, stride_qm = up(D, WIDE), up(half, WIDE), up(stride_qm, WIDE)
    for start in range(0, half if KIND == "angle" else D, BLOCK_D):
        dx = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        if KIND == "angle":
            dx_hi = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        x_own = tl.zeros((BLOCK_R,), tl.float32)  # factor of the row itself, through its norm
        for k in tl.static_range(len(others)):
            stride = up(strides[k], WIDE)
            weight = tl.load(Upstream + offs * stride_um + k * stride_uk, mask=mask, other=0.0).to(tl.float32)
            if Value is not None:
                value = tl.load(Value + _place(k, M, offs), mask=mask, other=0.0)
            if Norm is not None:
                if KIND == "angle":
                    weight = tl.where(value == 0, 0.0, tl.where(value < 0, -weight, weight))
                x_norm = tl.load(Norm + offs, mask=mask, other=1.0)
                y_norm = tl.load(Norm + _place(k + 1, M, offs), mask=mask, other=1.0)
                along = -weight * value
                x_own += _through(along, x_norm, eps)
                y_own = _through(along, y_norm, eps)
                weight = weight * _inverse(x_norm, eps) * _inverse(y_norm, eps)
            if KIND == "squared":
                weight *= 2
            if KIND == "euclidean":
                weight = tl.where(value == 0, 0.0, weight / tl.where(value == 0, 1.0, value))
            if KIND == "angle":
                x, x_hi, y, y_hi = _halves(Query, others[k], offs, stride_qm, stride, start, half, D, mask, BLOCK_D)
                dx += weight[:, None] * (y - y_hi)
                dx_hi += weight[:, None] * (y_hi + y)
                if dothers[k] is not None:
                    dy = weight[:, None] * (x + x_hi) + y_own[:, None] * y
                    dy_hi = weight[:, None] * (x_hi - x) + y_own[:, None] * y_hi
                    _store(dothers[k], offs, D, start, half, mask, dy, BLOCK_D)
                    _store(dothers[k], offs, D, start + half, D, mask, dy_hi, BLOCK_D)
            else:
                x = _load(Query, offs, stride_qm, start, D, mask, BLOCK_D)
                y = _load(others[k], offs, stride, start, D, mask, BLOCK_D)
                if KIND == "cos" or KIND == "dot":
                    dx += weight[:, None] * y
                    dy = weight[:, None] * x
                    if Norm is not None:
                        dy += y_own[:, None] * y
                else:
                    apart = _apart(x, y, eps, start, D, BLOCK_D)
                    if KIND == "manhattan":
                        apart = tl.where(apart > 0, 1.0, tl.where(apart < 0, -1.0, 0.0))
                    dx += weight[:, None] * apart
                    dy = -weight[:, None] * apart
                if dothers[k] is not None:
                    _store(dothers[k], offs, D, start, D, mask, dy, BLOCK_D)
        if DQuery is not None:
            if Norm is not None:
                dx += x_own[:, None] * x
            if KIND == "angle":
                dx_hi += x_own[:, None] * x_hi
                _store(DQuery, offs, D, start, half, mask, dx, BLOCK_D)
                _store(DQuery, offs, D, start + half, D, mask, dx_hi, BLOCK_D)
            else:
                _store(DQuery, offs, D, start, D, mask, dx, BLOCK_D)


@triton.jit
def _place(k, M, offs):
    """Returns the offsets in row k of a [K, M] table."""
    return tl.full((), k, tl.int64) * M + offs


@triton.jit
def _halves(X, Y, rows, stride_x, stride_y, start, half, D, mask, BLOCK_D: tl.constexpr):
    """Loads AnglE's complex numbers, dims i and i + half; zeros past the end of an odd D."""
    x = _load(X, rows, stride_x, start, half, mask, BLOCK_D)
    x_hi = _load(X, rows, stride_x, start + half, D, mask, BLOCK_D)
    y = _load(Y, rows, stride_y, start, half, mask, BLOCK_D)
    y_hi = _load(Y, rows, stride_y, start + half, D, mask, BLOCK_D)
    return x, x_hi, y, y_hi


@triton.jit
def _apart(x, y, eps, start, D, BLOCK_D: tl.constexpr):
    """Returns x - y + eps, and 0 past D."""
    return tl.where((start + tl.arange(0, BLOCK_D) < D)[None, :], x - y + eps, 0.0)


@triton.jit
def _length(squared, X):
    length = tl.sqrt_rn(squared)
    if X.dtype.element_ty == tl.float16:
        length = tl.where(length == 0, 1.0, length)  # the gradient's 1 / eps would overflow fp16; the score is 0 anyway
    return length


@triton.jit
def _inverse(norm, eps):
    return 1.0 / tl.maximum(norm, eps, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _through(along, norm, eps):
    """Divides by the square of a norm; 0 if eps replaced the norm."""
    factor = _inverse(norm, eps)
    return tl.where(norm < eps, 0.0, along * factor * factor)
