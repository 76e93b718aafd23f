"""InfoNCE: softmax cross-entropy over in-batch similarities."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Unpack

from torch import Tensor

from .. import masks, transforms
from ..core import checks
from ..core.problem import NO_MARGIN, Block, Margin, Problem
from ..core.transforms import Transform
from ..distributed import Request, agree
from . import _straight as straight
from ._options import Call, CountingAcrossOptions, expanded, ranks
from ._private import refusal, with_private, with_private_across
from ._softmax import Loss, Rows, as_scale, autocast, counted, distinct, result_of
from ._targets import alone, check_debiased, counts, rows_of_several
from .contrast_lists import POSITIVES


@expanded
def info_nce(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.05,
    negatives: Tensor | None = None,
    bank: Tensor | None = None,
    bank_across: bool = False,
    key_bias: Tensor | None = None,
    mask: masks.Mask | Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    normalize: bool = False,
    bias_on_target: bool = True,
    margin: float = 0.0,
    decoupled: bool = False,
    transform: Transform | Callable[[Tensor], Tensor] | None = None,
    negatives_mask: Tensor | None = None,
    debiased: float = 0.0,
    positives: str = "each",
    teacher_scores: Tensor | None = None,
    **options: Unpack[CountingAcrossOptions],
) -> Loss:
    """InfoNCE (van den Oord et al. 2018): each query's key against all the other keys of the batch.

        z_ij   = <query_i, key_j> / temperature + key_bias_j
        loss_i = logsumexp_j z_ij - z_i,target_i

    The matrix z is never stored: memory is O((M + N) D) plus a bounded workspace. Rows and keys that take no part
    (ignored, weight 0, bias -inf) must still be finite where gradients are wanted: in a product 0 times NaN is NaN.

    Args:
        query: `[M, D]`, float16, bfloat16, float32 or float64, any strides.
        key: `[N, D]`, the dtype and device of `query`.
        target: int64 `[M]`, the index into `key` of each row's positive. Default `arange(M)`, which needs N >= M. Or
            `[M, P]`, up to P positives of each row, `ignore_index` for those that are none: see `positives`. One that
            stands twice in a row counts once. A row without any is left out.
        temperature: a positive number, or a tensor of one element, which receives a gradient.
        negatives: `[M, K, D]`, K more columns for each row that no other row sees. They have no bias, and masks do not
            apply to them. Their sums are merged outside the sweep, which costs a fourth product. With `group` they stay
            on their rank, and each row's positive must too: no target.
        bank: `[K, D]`, K more columns that every row sees, behind the keys: a queue (MoCo), a memory (XBM). It is read
            in place, with any strides, and never copied, except under autocast if its dtype differs, or if it was made
            under inference_mode, which autograd cannot save. It receives no gradient, even if it requires one. It may
            be overwritten as soon as the loss is computed. A backward that reads it again (reduction "none",
            `negatives`, a second backward, create_graph) then raises a RuntimeError that names it; backend "reference"
            raises torch's. With `group`, a rank's rows see its own bank, such as a queue that all ranks hold alike.
        bank_across: with `group`, whether the banks of all ranks compete; they may have different numbers of rows.
        key_bias: `[N]`, added to every row's logits (logQ correction: minus the log of each key's sampling
            probability). -inf removes a key, and leaves out the rows whose target it is. Receives a gradient. `[N + K]`
            with a bank.
        mask: the keys that may compete in a row: one of `fusedloss.masks`, or bool `[M, N]`, True for those that may.
            The target always may. It covers N + K columns with a bank.
        weight: `[M]`, multiplies each row's loss; the mean is `sum(w * loss) / sum(w)`. Receives no gradient.
        label_smoothing: share of the target mass spread evenly over the row's admissible keys.
        ignore_index: rows with this target are left out. The default target leaves out none.
        normalize: divide each row of both by `max(|row|, 1e-12)` first. The norms act on the fp32 accumulator, so unit
            vectors are never rounded to 16 bits.
        bias_on_target: whether `key_bias` is added to the targets' logits as well. False is the correction of sampled
            negatives alone (with `transforms.refined_logq`); `key_bias` receives no gradient then.
        margin: subtracted from the targets' cosines (additive margin: LaBSE, SimKGC), with `normalize=True` and a
            temperature that receives no gradient.
        decoupled: leave the target out of the normaliser (DCL, Yeh et al. 2022). The loss then has no lower bound, and
            a row without negatives has loss 0. Neither `negatives` nor `label_smoothing` can be given with it.
        transform: a function of each row's own loss, before its weight: one of `fusedloss.transforms`, or a function of
            a tensor `[M]`. `label_smoothing` must be 0 with it.
        debiased: the share tau of the negatives that are none in truth (Chuang et al. 2020), from 0 to below 1. With N
            negatives and S the sum of their exponentials,

                loss_i = log(1 + g / exp(z_it)),   g = max((S - tau N exp(z_it)) / (1 - tau), N exp(-1/temperature))

            `normalize=True` is its setting: the bound is the least that N unit vectors have. Columns that `mask` or a
            `key_bias` of -inf drops are not among the N.
        positives: of a target `[M, P]`, with N(i) the columns of row i that are none of its positives P(i):

                each:   loss_i = mean over p in P(i) of log(1 + sum_(n in N(i)) exp(z_in - z_ip))
                joint:  loss_i = log(1 + sum_(n in N(i)) exp(z_in) / sum_(p in P(i)) exp(z_ip))

            "each" has the positives not compete with each other; "joint" wants any of them at the top. No product is
            computed again for them.
        teacher_scores: `[M, 1 + K]`, a teacher's scores of the row's own key and of its K `negatives`, divided by the
            teacher's temperature. Their softmax t is the target instead of the key alone (Hinton et al. 2015), against
            the student's softmax over all columns of the row:

                loss_i = logsumexp_j z_ij - sum_c t_ic z_ic        c: the own key and the own negatives

            It receives no gradient. What `negatives_mask` drops has t = 0.
        reduction: "mean" (over the rows that count; 0 if none does), "sum", or "none" (`[M]`, 0 for left-out rows).

    Returns:
        A 0-dim tensor (`[M]` for "none"), float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        IndexError: on a CPU, a target outside `key`. On a GPU values are not read back and the loss is NaN.
        UnsupportedError: the chosen backend cannot run this.

    Example:
        >>> query, key = encode(questions), encode(answers)
        >>> fusedloss.info_nce(query, key, temperature=0.05, normalize=True).backward()

        MoCo (He et al. 2020), whose keys come from a slow copy of the encoder and whose queue is a ring:

        >>> queue, start = F.normalize(torch.randn(65536, 128)), 0
        >>> for first, second in loader:
        ...     with torch.no_grad():
        ...         key = F.normalize(slow_encoder(second))
        ...     loss = fusedloss.info_nce(F.normalize(encoder(first)), key, bank=queue, temperature=0.2)
        ...     queue[start : start + len(key)] = key  # allowed: the forward has computed the gradient
        ...     start = (start + len(key)) % len(queue)  # the batch size divides the length
        ...     loss.backward()

        The batch's other keys compete as well, unlike in MoCo: `mask=masks.same_id(zeros, columns)`, with zeros `[M]`
        and columns M zeros and K ones, leaves them out. XBM (Wang et al. 2020) remembers the encoder's own embeddings
        and their labels:

        >>> memory, seen = torch.empty(8192, 128), torch.empty(8192, dtype=torch.long)
        >>> for step, (x, key_x, label) in enumerate(loader):
        ...     query, key, rows = encoder(x), encoder(key_x), len(label)
        ...     full = min(step * rows, len(memory))  # the rows filled so far
        ...     mask = masks.same_id(label, torch.cat([label, seen[:full]]))  # equal labels are no negatives
        ...     loss = fusedloss.info_nce(query, key, bank=memory[:full], mask=mask, normalize=True)
        ...     start = step * rows % len(memory)
        ...     memory[start : start + rows], seen[start : start + rows] = key.detach(), label
        ...     loss.backward()
    """

    off: tuple[object, ...] = (negatives, bank, bank_across, key_bias, mask, weight, label_smoothing, margin, decoupled)
    off += (transform, negatives_mask, debiased, teacher_scores, positives != POSITIVES[0])
    off += (type(ignore_index) is not int or ignore_index != -100,)
    found = straight.mean(query, key, temperature, options, off, inverse=True, cosine=normalize, target=target)
    if found is not None:
        return found

    def ask(call: Call) -> Request:
        across = call.group is not None
        if across and negatives is not None and target is not None:
            raise ValueError(
                "target must be None with negatives and group, each row's positive its own rank's, got a tensor; "
                "leave one of the three out"
            )
        problem = info_nce_problem(
            query,
            key,
            target,
            temperature=temperature,
            bank=bank,
            bank_across=bank_across,
            key_bias=key_bias,
            mask=mask,
            weight=weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            normalize=normalize,
            bias_on_target=bias_on_target,
            margin=margin,
            decoupled=decoupled,
            transform=transform,
            debiased=debiased,
            positives=positives,
            call=call,
        )
        stays = () if bank_across else tuple(block.key for block in problem.blocks[1:])
        what = f"info_nce\nbank {'of all ranks' if bank_across else 'of the rank'}" if bank is not None else "info_nce"
        if negatives is not None:
            _check_private(problem, query, negatives, negatives_mask, teacher_scores)
            what += "\nnegatives of each row"
        ignored = ignore_index if across and target is not None else None
        return call.request(what, problem, ignore_index=ignored, stays=stays)

    if negatives_mask is not None and negatives is None:
        raise ValueError("negatives must be given with negatives_mask, got the mask alone; pass [M, K, D]")
    if teacher_scores is not None and negatives is None:
        raise ValueError("negatives must be given with teacher_scores, got the scores alone; pass [M, K, D]")
    if negatives is None:
        return result_of(options, ask)
    world = ranks(options)
    if world is not None:
        agreed = agree(world, lambda: ask(Call(**options)))
        return with_private_across(agreed, negatives.unbind(1), negatives_mask, teacher_scores)
    call = Call(**options)
    return with_private(ask(call).problems[0], call, negatives.unbind(1), negatives_mask, teacher=teacher_scores)


def info_nce_problem(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor,
    bank: Tensor | None,
    bank_across: bool,
    key_bias: Tensor | None,
    mask: masks.Mask | Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    normalize: bool,
    bias_on_target: bool,
    margin: float,
    decoupled: bool,
    transform: Transform | Callable[[Tensor], Tensor] | None,
    debiased: float = 0.0,
    positives: str = "each",
    call: Call,
) -> Problem:
    """Builds the problem. With a group, targets index the keys of all ranks, in rank order."""
    across = call.group is not None
    if bank_across and not across:
        raise ValueError("bank_across must be False without group, got True; pass a ProcessGroup, or 'world'")
    if bank is None:
        checks.embeddings(query=query, key=key)
    else:
        checks.embeddings(query=query, key=key, bank=bank)
        bank = bank.detach() if len(bank) or across else None  # another rank's may have rows
    rows, columns = query.shape[0], key.shape[0]
    widths = [columns] if bank is None else [columns, bank.shape[0]]
    checks.index("ignore_index", ignore_index)
    checks.choice("positives", positives, POSITIVES)
    if target is not None:
        checks.target("target", target, rows, None if across else columns, ignore_index, query, several=True)
    elif columns < rows:
        raise ValueError(
            f"key must have at least {rows} rows, one per row of query, for the default target arange({rows}), "
            f"got {columns}; pass target"
        )
    if rows and not columns and not across:
        raise ValueError("key must have at least one row, got none")
    checks.scalar("temperature", temperature, query, positive=True)
    if key_bias is not None:
        checks.vector("key_bias", key_bias, sum(widths), "key" if bank is None else "key and row of the bank", query)
    if weight is not None:
        checks.vector("weight", weight, rows, "query", query)
    checks.share("label_smoothing", label_smoothing)
    for name, given in {"transform": transform is not None, "decoupled": decoupled}.items():
        if given and label_smoothing:
            raise ValueError(f"label_smoothing must be 0 with {name}, got {label_smoothing}; leave one of them out")
    phi = transforms.bind(transform, decoupled)
    checks.number("margin", margin)
    if margin and not normalize:
        raise ValueError(f"normalize must be True with margin, which is of a cosine, got margin={margin} without it")
    if margin and isinstance(temperature, Tensor) and temperature.requires_grad:
        raise ValueError(
            f"temperature must not require a gradient with margin, got margin={margin}; pass temperature.detach()"
        )
    if not bias_on_target and key_bias is not None and key_bias.requires_grad:
        raise ValueError(
            "key_bias must not require a gradient with bias_on_target=False, got one that does; pass key_bias.detach()"
        )
    bound = masks.bind(mask, rows, widths, query)
    if across and bank is not None and rows > columns and bound[0].skip is not None:
        raise ValueError(
            f"key must have a row for each of query with masks.not_self, a bank and group, got {columns} for {rows}; "
            "leave the bank or the mask out"
        )
    if bound[0].factor is not None and key_bias is not None and key_bias.requires_grad:
        raise ValueError(
            "key_bias must not require a gradient with score_margin's factor, got one that does; pass key_bias.detach()"
        )
    facts = {"label_smoothing": label_smoothing != 0, "decoupled": decoupled, "margin": margin != 0}
    check_debiased(debiased, **facts)
    of_rows: Callable[..., Rows] = counted
    if target is not None and target.dim() == 2:
        of_rows = partial(rows_of_several, form=positives)
        alone(
            "target [M, P]",
            **facts,
            debiased=debiased != 0,
            return_stats=call.return_stats,
            score_margin=bound[0].margin is not None,
            guide=bound[0].guide is not None,
        )
    scale, scale_bound = as_scale(temperature, query, inverse=True)
    matrices, (x, y) = distinct(query, key)
    if bank is None:
        blocks: tuple[Block, ...] = (Block(x, y, key_bias, bound[0]),)
    else:
        biases = (None, None) if key_bias is None else (key_bias[:columns], key_bias[columns:])
        blocks = (Block(x, y, biases[0], bound[0]), Block(x, len(matrices), biases[1], bound[1]))
        matrices.append(bank)
    operands = autocast(*matrices)
    elsewhere = across and target is not None
    return Problem(
        operands=operands,
        blocks=blocks,
        scale=scale,
        **of_rows(operands, blocks[0], scale, target, weight, ignore_index=ignore_index, elsewhere=elsewhere),
        cosine=normalize,
        label_smoothing=label_smoothing,
        scale_bound=scale_bound,
        workspace_bytes=call.workspace_bytes,
        guide_rule=masks.rule(mask),
        wants_tally=call.return_stats or counts(debiased, blocks),
        bias_on_target=bias_on_target,
        margin=Margin(cosine=float(margin)) if margin else NO_MARGIN,
        decoupled=decoupled,
        transform=phi,
        mirrored=query is key and target is None and masks.mirrored(mask),
        debiased=float(debiased),
    )


def _check_private(
    problem: Problem, query: Tensor, negatives: Tensor, real: Tensor | None, teacher: Tensor | None
) -> None:
    if not isinstance(negatives, Tensor) or negatives.dim() != 3 or negatives.shape[::2] != query.shape:
        got = f"shape {list(negatives.shape)}" if isinstance(negatives, Tensor) else checks.a(negatives)
        raise ValueError(f"negatives must be [M, K, D] = [{len(query)}, any, {query.shape[1]}], got {got}")
    checks.embeddings(query=query, **{f"negatives[:, {k}]": x for k, x in enumerate(negatives.unbind(1))})
    if real is not None:
        checks.boolean("negatives_mask", real, tuple(negatives.shape[:2]), query)
    if teacher is not None:
        checks.floating("teacher_scores", teacher, (len(query), 1 + negatives.shape[1]), query)
    if any(problem.margin):
        raise ValueError("margin must be 0 with negatives, got both; leave one of them out")
    if what := refusal(problem):
        raise ValueError(f"negatives must not be given together with {what}, got both; leave one of them out")
