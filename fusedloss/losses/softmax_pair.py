"""A softmax classifier over pairs of embeddings: Sentence-BERT's classification objective."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from ..core import checks
from ..core.numerics import savable
from ..rowwise import classes
from ..rowwise.pair_logits import PARTS, pair_logits
from ._options import Call, RowOptions, expanded


@expanded
def softmax_pair(
    u: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    *,
    concatenation: tuple[str, ...] = ("rep", "difference"),
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    **options: Unpack[RowOptions],
) -> Tensor:
    """Cross-entropy of a linear layer on [u; v; |u - v|; u v] (Reimers and Gurevych 2019), as in sentence-transformers.

        z_i    = weight @ [u_i; v_i; |u_i - v_i|; u_i v_i] + bias,   of the parts in `concatenation`
        loss_i = logsumexp_c z_ic - z_i,target_i

    The concatenation is never built: the parts are formed a block of rows at a time (in registers on "triton"), and
    again in backward, which runs torch products on every backend. u, v, weight and the gradient by z, `[B, C]`, are
    kept.

    Args:
        u, v: `[B, D]`, float16, bfloat16, float32 or float64, one dtype, any strides.
        weight: `[C, k D]` as in `torch.nn.Linear`, any floating dtype: D columns for each part, 2 D for "rep".
        bias: `[C]`, or None.
        target: int64 `[B]`, or class probabilities `[B, C]`; None gives the logits `[B, C]` instead of a loss.
        concatenation: some of "rep" (u and v), "difference" (|u - v|) and "multiplication" (u v). `weight` has them in
            this order, however they are listed.
        class_weight: `[C]`, no gradient; as `weight` of `cross_entropy`.
        ignore_index: rows with this target are left out.
        label_smoothing: from 0 to 1, the share of the target that is spread evenly over the classes.
        reduction: "mean" (0 if no row counts), "sum", or "none" (`[B]`, 0 for left-out rows).
        backend: {rows}; second derivatives need "reference".

    Returns:
        A 0-dim tensor (`[B]` for "none"), float32, or float64 where an input is.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        IndexError: on a CPU, a target out of range. On a GPU values are not read back and the loss is NaN.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> classifier = torch.nn.Linear(3 * 768, 3)
        >>> fusedloss.softmax_pair(encode(a), encode(b), classifier.weight, classifier.bias, labels).backward()
    """
    call = Call(**options)
    checks.embeddings(u=u, v=v)
    if u.dtype != v.dtype:  # under autocast
        v = v.to(u.dtype)
    if v.shape[0] != u.shape[0]:
        raise ValueError(f"v must have {u.shape[0]} rows, like u, got {v.shape[0]}")
    if not isinstance(concatenation, str):
        checks.sequence("concatenation", concatenation, "names", "('rep', 'difference')")
    if isinstance(concatenation, str) or not concatenation or not all(part in PARTS for part in concatenation):
        raise ValueError(f"concatenation must be one or more of {', '.join(map(repr, PARTS))}, got {concatenation!r}")
    parts = tuple(part for part in PARTS if part in concatenation)
    wanted = sum(PARTS[part] for part in parts) * u.shape[1]
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
        got = weight.dtype if isinstance(weight, Tensor) else checks.a(weight)
        raise TypeError(f"weight must be a floating tensor [C, {wanted}], got {got}")
    checks.dense("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != wanted or not weight.shape[0]:
        raise ValueError(
            f"weight must have shape [C, {wanted}], for {', '.join(parts)} of D = {u.shape[1]}, "
            f"got {list(weight.shape)}"
        )
    checks.same_device("weight", weight, "u", u)
    if bias is not None:
        checks.vector("bias", bias, weight.shape[0], "class", u)
    logits = pair_logits(u, v, weight, bias, parts, call.backend)
    if target is None:
        return logits
    checks.index("ignore_index", ignore_index)
    checks.share("label_smoothing", label_smoothing)
    if class_weight is not None:
        checks.vector("class_weight", class_weight, weight.shape[0], "class", u)
        class_weight = class_weight.detach()
    if isinstance(target, Tensor) and target.dtype.is_floating_point:
        checks.dense("target", target)
        if target.shape != logits.shape:
            raise ValueError(
                f"target must have shape {list(logits.shape)} if it holds probabilities, got {list(target.shape)}"
            )
        checks.same_device("target", target, "u", u)
    else:
        checks.integers("target", target, (u.shape[0],), u)
        if class_weight is None and not label_smoothing and logits.numel():
            found = classes.certain(logits, savable(target), ignore_index, call.reduction, call.backend)
            if found is not None:
                return found
    return classes.cross_entropy(
        logits,
        target,
        class_weight,
        ignore_index=ignore_index,
        reduction=call.reduction,
        label_smoothing=label_smoothing,
        empty=0.0,
        backend=call.backend,
    )
