"""InfoNCE: softmax cross-entropy over in-batch similarities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import checks, masks
from ..epilogues import softplus
from ..problem import Block, stats_dtype
from ..rowwise.pairs import cosine, dot, of_pairs, scores
from ._in_batch import (
    Loss,
    Objective,
    as_scale,
    asked,
    autocast,
    distinct,
    objective,
    over,
    result_of,
)
from ._module import LossModule


@checks.explained
def info_nce(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.05,
    negatives: Tensor | None = None,
    bank: Tensor | None = None,
    key_bias: Tensor | None = None,
    mask: masks.Mask | Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: bool = False,
    group: Any = None,
    strategy: str = "gather",
    grad_scale: str = "ddp",
) -> Loss:
    """InfoNCE (van den Oord et al. 2018): each query's key against all the other keys of the batch.

        z_ij   = <query_i, key_j> / temperature + key_bias_j
        loss_i = logsumexp_j z_ij - z_i,target_i

    The matrix z is never stored: memory is O((M + N) D) plus a bounded workspace. Rows and keys that take no part
    (ignored, weight 0, bias -inf) must still be finite where gradients are wanted: in a product 0 times NaN is NaN.

    Args:
        query: `[M, D]`, float16, bfloat16, float32 or float64, any strides.
        key: `[N, D]`, the dtype and device of `query`.
        target: int64 `[M]`, the index into `key` of each row's positive. Default `arange(M)`, which needs N >= M.
        temperature: a positive number, or a tensor of one element, which receives a gradient.
        negatives: `[M, K, D]`, K more columns for each row that no other row sees. They have no bias, and masks do not
            concern them. The rows' sums are then merged outside of the sweep, which costs it a fourth product.
        bank: `[K, D]`, K more columns that every row sees, behind the keys: a queue (MoCo), a memory (XBM). It is read
            where it lies, in any strides, never copied (but for autocast, if it is not in its dtype, or if it was made
            under inference_mode: autograd cannot keep that), and receives no gradient, also where it requires one. It
            may be overwritten as soon as the loss is there; a backward that needs it again (reduction "none",
            `negatives`, a second backward, create_graph) then raises a RuntimeError that names it, and with backend
            "reference" torch's own.
        key_bias: `[N]`, added to every row's logits (logQ correction: minus the log of each key's sampling
            probability). -inf removes a key, and leaves out the rows whose target it is. Receives a gradient.
            With a bank `[N + K]`.
        mask: which keys may compete in a row: one of `fusedloss.masks`, or bool `[M, N]`, True for those that may. The
            target always may. With a bank it concerns N + K columns.
        weight: `[M]`, multiplies each row's loss; the mean is `sum(w * loss) / sum(w)`. Receives no gradient.
        label_smoothing: share of the target mass spread evenly over the row's admissible keys.
        ignore_index: rows whose target is this are left out. The default target ignores none.
        normalize: divide each row of both by `max(|row|, 1e-12)` first. The norms act on the fp32 accumulator, so unit
            vectors are never rounded to 16 bits.
        reduction: "mean" (over the rows that count; 0 if none does), "sum", or "none" (`[M]`, 0 for left-out rows).
        backend: "auto", "triton", "chunked" or "reference".
        workspace_bytes: the most that the workspace for one chunk of similarities may take; None is the environment's
            FUSEDLOSS_WORKSPACE_BYTES, or else the device's default: 64 MiB on a CPU, about 900 MiB on a GPU. Less
            memory takes longer; results are the same to rounding.
        return_stats: return `(loss, Stats)`: accuracy, mean reciprocal rank and scores, counted in the same sweep.
        group: a ProcessGroup whose other ranks' columns compete, too. The result is the mean (or sum) over all ranks'
            rows, on every rank; "none" gives this rank's. See `fusedloss.distributed`.
        strategy: how columns travel: "gather", all at once, or "ring", a shard at a time.
        grad_scale: "ddp" (right after DistributedDataParallel's average), "sum" (this rank's share) or
            "match:<library>".

    Returns:
        A 0-dim tensor (`[M]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        IndexError: on a CPU, a target outside `key`. On a GPU values are not read back and the loss is NaN.
        UnsupportedError: the backend asked for cannot run this.

    Example:
        >>> query, key = encode(questions), encode(answers)
        >>> fusedloss.info_nce(query, key, temperature=0.05, normalize=True).backward()

        MoCo (He et al. 2020), whose keys come from a slow copy of the encoder and whose queue is a ring:

        >>> queue, start = F.normalize(torch.randn(65536, 128)), 0
        >>> for first, second in loader:
        ...     with torch.no_grad():
        ...         key = F.normalize(slow_encoder(second))
        ...     loss = fusedloss.info_nce(F.normalize(encoder(first)), key, bank=queue, temperature=0.2)
        ...     queue[start : start + len(key)] = key  # the gradient is known already
        ...     start = (start + len(key)) % len(queue)  # of a length that batches divide
        ...     loss.backward()

        The batch's other keys compete as well, which MoCo's do not: `mask=masks.same_id(zeros, columns)`, with zeros
        `[M]` and columns M zeros and K ones, leaves them out. XBM (Wang et al. 2020) remembers the encoder's own
        embeddings and their labels:

        >>> memory, seen = torch.empty(8192, 128), torch.empty(8192, dtype=torch.long)
        >>> for step, (x, key_x, label) in enumerate(loader):
        ...     query, key, rows = encoder(x), encoder(key_x), len(label)
        ...     full = min(step * rows, len(memory))  # those that were filled before
        ...     mask = masks.same_id(label, torch.cat([label, seen[:full]]))  # equal labels are no negatives
        ...     loss = fusedloss.info_nce(query, key, bank=memory[:full], mask=mask, normalize=True)
        ...     start = step * rows % len(memory)
        ...     memory[start : start + rows], seen[start : start + rows] = key.detach(), label
        ...     loss.backward()
    """
    around = asked(group, strategy, grad_scale)

    def ask() -> tuple[str, list[Objective]]:
        for name, given in {"negatives": negatives, "bank": bank}.items():
            if around is not None and given is not None:
                what = "rows' own columns" if name == "negatives" else "a rank's own columns"
                raise ValueError(f"{name} with group=: {what} have no form across ranks; leave one of them out")
        one = info_nce_objective(
            query,
            key,
            target,
            temperature=temperature,
            bank=bank,
            key_bias=key_bias,
            mask=mask,
            weight=weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
            workspace_bytes=workspace_bytes,
            return_stats=return_stats,
            across=around is not None,
        )
        return "info_nce", [one]

    if negatives is not None and around is None:
        return _with_private(ask()[1][0], query, negatives)
    return result_of(ask, around)


def info_nce_objective(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.05,
    bank: Tensor | None = None,
    key_bias: Tensor | None = None,
    mask: masks.Mask | Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    return_stats: bool = False,
    across: bool = False,
) -> Objective:
    """across: the target is an index into the keys of all ranks, in their order."""
    if bank is None:
        checks.embeddings(query=query, key=key)
    else:
        checks.embeddings(query=query, key=key, bank=bank)
        bank = bank.detach() if len(bank) else None
    rows, columns = query.shape[0], key.shape[0]
    widths = [columns] if bank is None else [columns, bank.shape[0]]
    checks.index("ignore_index", ignore_index)
    if target is not None:
        checks.target("target", target, rows, None if across else columns, ignore_index, query)
    elif columns < rows:
        raise ValueError(
            f"key has {columns} rows and query {rows}: the default target, arange({rows}), needs a key for every "
            "query; pass target"
        )
    if rows and not columns and not across:
        raise ValueError("key has no rows: needs at least one")
    checks.scalar("temperature", temperature, query, positive=True)
    if key_bias is not None:
        checks.vector("key_bias", key_bias, sum(widths), "key" if bank is None else "key and row of the bank", query)
    if weight is not None:
        checks.vector("weight", weight, rows, "query", query)
    checks.share("label_smoothing", label_smoothing)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.count("workspace_bytes", workspace_bytes)
    bound = masks.bind(mask, rows, widths, query)
    scale, scale_bound = as_scale(temperature, query, inverse=True)
    operands, (x, y) = distinct(query, key)
    if bank is None:
        blocks = [Block(x, y, key_bias, bound[0])]
    else:
        biases = (None, None) if key_bias is None else (key_bias[:columns], key_bias[columns:])
        blocks = [Block(x, y, biases[0], bound[0]), Block(x, len(operands), biases[1], bound[1])]
        operands.append(bank)
    return objective(
        autocast(*operands),
        blocks,
        target,
        scale,
        scale_bound=scale_bound,
        weight=weight,
        ignore_index=ignore_index,
        cosine=normalize,
        label_smoothing=label_smoothing,
        guide_rule=masks.rule(mask),
        reduction=reduction,
        backend=backend,
        workspace_bytes=workspace_bytes,
        return_stats=return_stats,
        across=across and target is not None,
    )


def _with_private(one: Objective, query: Tensor, negatives: Tensor) -> Tensor:
    """With columns of each row's own: `log(exp(loss) + sum_k exp(z_ik - z_it))`, exact also where the loss is tiny."""
    problem = one.problem
    if not isinstance(negatives, Tensor) or negatives.dim() != 3 or negatives.shape[::2] != query.shape:
        got = list(negatives.shape) if isinstance(negatives, Tensor) else type(negatives).__name__
        raise ValueError(f"negatives is {got}: needs [M, K, D] = [{len(query)}, any, {query.shape[1]}]")
    columns = negatives.unbind(1)
    checks.embeddings(query=query, **{f"negatives[:, {k}]": x for k, x in enumerate(columns)})
    if problem.label_smoothing or problem.wants_tally:
        what = "label_smoothing" if problem.label_smoothing else "return_stats=True"
        raise ValueError(f"{what} with negatives: it counts the keys' columns alone; leave one of them out")
    weight = problem.weight
    # Rows that are left out stay so, whatever their own columns are; those that count are weighted afterwards.
    counted = torch.where(weight == 0, 0, torch.ones_like(weight))
    alone = one._replace(problem=replace(problem, weight=counted), reduction="none")
    loss = alone.result()
    if columns:
        block = problem.blocks[0]
        x, y = problem.operands[block.query], problem.operands[block.key]
        backend = "auto" if one.backend == "cuda" else one.backend  # which has no kernel for pairs of rows
        z = scores("cos" if problem.cosine else "dot", x, *autocast(*columns), backend=backend) * problem.scale
        own = of_pairs(cosine if problem.cosine else dot, x, y, problem.target) * problem.scale
        if block.bias is not None:
            own = own + block.bias.to(own.dtype)[problem.target]
        own = own.masked_fill(weight == 0, 0)
        loss = loss + softplus(torch.logsumexp(z, dim=1) - own - loss)
    loss = torch.where(weight == 0, 0, weight * loss).to(stats_dtype(query.dtype))
    if one.reduction == "none":
        return loss
    return over(loss.sum(), weight.sum()) if one.reduction == "mean" else loss.sum()


class InfoNCELoss(LossModule, function=info_nce, tensors=("negatives", "bank", "key_bias", "mask", "weight")):
    """`info_nce` with its options in the constructor and tensors in `forward(query, key, target=None, ...)`."""
