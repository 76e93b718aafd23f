"""Binary cross-entropy with logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..core import checks
from ..rowwise.pointwise import BinaryCrossEntropy, loss
from ._options import documented
from ._twin import check_weight, ordinary, promoted, reduction_of, tensors


@documented
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Binary cross-entropy of logits, a twin of `torch.nn.functional.binary_cross_entropy_with_logits`.

        loss_i = weight_i * ((1 - target_i) * softplus(input_i) + pos_weight_i * target_i * softplus(-input_i))

    The derivative is computed in the same pass, and only it is kept for the backward pass: half of what torch keeps. It
    is computed from sigmoid(-|input|), so it keeps its digits if the prediction is almost certain. So does the loss,
    which subtracts no large numbers. torch's formula loses both. Inputs of 16 bits are computed in fp32.

    Args:
        input: logits, any shape and strides.
        target: labels of the same shape, from 0 to 1; the formula also holds for others.
        weight: one for each element; broadcasts to `input`'s shape. The mean divides by the number of elements, as in
            torch.
        size_average, reduce: deprecated, as in torch.
        reduction: "mean" (NaN of nothing, as in torch), "sum" or "none".
        pos_weight: of the positive labels; broadcasts to `input`'s shape, e.g. `[C]`, one per class.
        backend: {rows}; second derivatives need "reference".

    All four tensors receive gradients. Tensor subclasses are left to torch.

    Returns:
        0-dim, or the losses for "none", in the dtype that torch returns: `target`'s.

    Raises:
        ValueError, TypeError, RuntimeError: where torch raises; options that do not fit.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> loss = fusedloss.binary_cross_entropy_with_logits(logits, labels, pos_weight=negatives / positives)
        >>> loss.backward()
    """
    reduction = reduction_of(size_average, reduce, reduction)
    if not ordinary(input, target):
        checks.backend(backend)
        tensors(input, target)
        try:
            return F.binary_cross_entropy_with_logits(input, target, weight, reduction=reduction, pos_weight=pos_weight)
        except RuntimeError as error:  # torch's type of error, with a remedy, which torch does not name
            if target.dtype.is_floating_point or not input.dtype.is_floating_point:
                raise
            message = f"target must be a floating tensor of 0 and 1, got {target.dtype}; call .float()"
            raise RuntimeError(message) from error
    if input.shape != target.shape:
        raise ValueError(f"Target size ({target.size()}) must be the same as input size ({input.size()})")
    for name, w in (("weight", weight), ("pos_weight", pos_weight)):
        if w is not None:
            check_weight(name, w, input)
    dtype = promoted(target, target)
    return loss(
        BinaryCrossEntropy(), input, target, weight, pos_weight, reduction=reduction, dtype=dtype, backend=backend
    )
