"""Rows of a run, computed once more in fp64: FUSEDLOSS_AUDIT=1e-3 does it at one call in a thousand.

A row of a loss can be computed alone, given the keys: its loss out of its own logits, and its query's gradient,
`sum_j dz_j scale y_j`, through its norm where the loss is one of cosines. An audited call does it for some random rows,
and leaves on the device by how much of its budget the kernels missed. The next audited call of that device reads this.
A miss marks the families of that problem failed, so that `auto` runs elsewhere, and says so once.

    audited             loss    gradient of the query
    one direction       yes     yes; no where the same matrix is a key, too, whose gradient needs all rows
    both directions     yes     no: it needs the normaliser of every column
    the sigmoid fold    yes     as in one direction

Not audited: what reads a threshold (`score_margin`, guides, other folds), where fp32 and fp64 may rightly decide
differently; angular margins, prefixes, penalties of hardness; losses over a process group, whose rows lie
elsewhere; losses without a sweep; and what runs inside torch.compile or while a CUDA graph is captured.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import environment
from ..backends import KERNELS, reference
from ..problem import NORM_EPS, Block, Compare, Mask, Problem, stats_dtype, unit_rows, without_autocast
from . import ask, families, verdicts
from .verdicts import FAILED, Verdict

ROWS = 64
# The formula and its gradient hold up to 16 numbers of 8 bytes for each similarity: 64 MiB up to 524288 columns.
SIMILARITIES = (64 << 20) // (16 * 8)
TILE = 1 << 20  # numbers of a tile of keys: 8 MiB
# A miss is an error of more than 4 budgets. Of 64 rows eager's largest error is as much luck as ours, and it may be one
# row alone: 2100 honest calls, as tests/test_audit.py draws them, had 1.6 at most. There a loss off by 1e-3 of itself
# is a miss, and so is a gradient's row.
MISS = 4.0
# Four roundings of fp32 (a product, its scale, exp, the sum after it), one of tf32: as STEP and STEPS of cases.py.
STEP, TF32_STEP = 2 * torch.finfo(torch.float32).eps, 2.0**-11
FLUSHED = 2.0**-100  # of an exponential, a weight and a sum: what fp32 may lose where fp64 has it

logger = logging.getLogger("fusedloss")

_draws = random.Random(0)  # its own: a user's draws stay as they are without it
_held: dict[torch.device, _Held] = {}  # of each device's last audited call
_said: set[tuple[torch.device, tuple[str, ...]]] = set()


class _Held(NamedTuple):
    """A comparison that nobody has read."""

    shares: Tensor  # [2], of the budget: the losses' and the gradient's; on the host once `done`
    done: torch.Event | None
    names: tuple[str, ...]  # of the families that a miss concerns
    about: str


def due() -> bool:
    """Whether this call is one to look at. By chance, for a model with two losses has every other call."""
    share = environment.audit()
    return share > 0 and _draws.random() < share


def look(problem: Problem, backend: str, losses: Tensor, gradients: Sequence[Tensor | None]) -> None:
    """Read what the last audited call left, and compare some rows of this one.

    losses: [M], weighted. gradients: of their sum, by the operands, None where not wanted. Nothing waits for the device
    but the reading, for work of a call long past.
    """
    precision, device = families.precision(problem.dtype), problem.device
    if backend not in KERNELS or precision is None or not auditable(problem) or ask.capturing(device):
        return
    _read(device)
    room = SIMILARITIES // max(problem.columns, 1)
    rows = _sample(problem.rows, max(1, min(ROWS, room)), device)
    found = shares(problem, losses, gradients, rows)
    done = None
    if device.type != "cpu":
        found = found.to("cpu", non_blocking=True)  # into pinned memory
        done = torch.Event(device)
        done.record()
    names = tuple(verdicts.name_of(backend, name, precision) for name in families.of_problem(problem, backend))
    _held[device] = _Held(found, done, names, _described(problem, backend, precision))


def auditable(problem: Problem) -> bool:
    """Whether a row's loss hangs on nothing but its own similarities, and smoothly so."""
    fold, blocks = problem.fold, problem.blocks
    if problem.prefixes or problem.ranks is not None or any(problem.margin) or not (problem.rows and problem.columns):
        return False
    if fold is not None and (fold.name != "sigmoid" or fold.distance not in ("", "cosine") or fold.itself):
        return False
    for block in blocks:
        mask = block.mask
        if mask.margin is not None or mask.guide is not None or block.penalty or block.own_penalty:
            return False
        if problem.symmetric and (mask.skip is not None or block.bias is not None):  # no loss has these
            return False
    return True


def forget() -> None:
    """What this process has held and said; its draws begin anew."""
    _held.clear()
    _said.clear()
    _draws.seed(0)


# Comparing ------------------------------------------------------------------------------------------------------------


def shares(problem: Problem, losses: Tensor, gradients: Sequence[Tensor | None], rows: Tensor) -> Tensor:
    """[2]: the largest error of these rows' losses, and of their queries' gradient, as a share of the budget.

    It is that of `testing.budget_share`, with what the condition of each row allows: see `_Rows`.
    """
    query = problem.blocks[0].query
    gradient = None if problem.symmetric or query in [block.key for block in problem.blocks] else gradients[query]
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(losses):
        wide, narrow = torch.float64, stats_dtype(problem.dtype)
        exact, eager = _formula(problem, rows, wide), _formula(problem, rows, narrow)
        tf32 = families.precision(problem.dtype) == "tf32"
        logit = (TF32_STEP if tf32 else STEP) * exact.largest
        flushed = problem.columns * FLUSHED
        moves = logit * exact.terms + flushed
        found = [_share(losses[rows], eager.losses, exact.losses, torch.float32, moves)]
        if gradient is not None:
            moves = (torch.finfo(problem.dtype).eps + logit) * exact.gradient_terms + flushed * exact.unit
            if problem.softcap:  # 1 - tanh^2, of which only roundings are left where it is flat
                moves = moves + 2 * torch.finfo(narrow).eps * problem.weight.detach()[rows].abs() * exact.unit
            found.append(_share(gradient[rows], eager.gradient, exact.gradient, problem.dtype, moves[:, None]))
        return torch.stack([*found, *[torch.zeros_like(found[0])] * (2 - len(found))])


class _Rows(NamedTuple):
    """What the formula says of some rows, and by how much roundings may move it.

    A logit is off by `step * largest`, which moves a loss by that times `terms`, the sum of its derivatives' absolute
    values. The gradient is a sum of as many terms times keys, of which each is rounded to the embeddings' dtype.
    """

    losses: Tensor  # [R]
    gradient: Tensor  # [R, D]
    largest: Tensor  # [R], that a logit may be
    terms: Tensor  # [R], sum of |dz|
    gradient_terms: Tensor  # [R]
    unit: Tensor  # [R], what a logit's derivative of 1 is in the gradient, at most


def _formula(problem: Problem, rows: Tensor, dtype: torch.dtype) -> _Rows:
    found = _one_way(problem, rows, dtype)
    if not problem.symmetric:
        return found
    other = _one_way(_transposed(problem), rows, dtype)
    losses, terms = (found.losses + other.losses) / 2, (found.terms + other.terms) / 2
    largest = torch.maximum(found.largest, other.largest)
    return found._replace(losses=losses, terms=terms, largest=largest)


def _one_way(problem: Problem, rows: Tensor, dtype: torch.dtype) -> _Rows:
    cut = _cut(problem, rows, dtype)
    own = problem.blocks[0].query
    queries = {block.query: problem.operands[block.query].detach()[rows].to(dtype) for block in problem.blocks}
    similarities = []
    lengths = torch.zeros(len(rows), dtype=dtype, device=rows.device)  # |x_i| |y_j|, at most
    largest_entry = lengths.new_zeros(())
    for block in problem.blocks:
        x, key = queries[block.query], problem.operands[block.key].detach()
        x = unit_rows(x) if problem.cosine else x
        sim = x.new_empty((len(rows), len(key)))
        for tile in _tiles(key):
            y = _keys(problem, key[tile], dtype)
            torch.mm(x, y.T, out=sim[:, tile])
            if len(y):
                lengths = torch.maximum(lengths, x.norm(dim=1) * y.norm(dim=1).amax())
                largest_entry = torch.maximum(largest_entry, y.abs().amax())
        similarities.append(sim.requires_grad_())
    losses = reference.losses_of(cut, similarities)
    derivatives = torch.autograd.grad(losses.sum(), similarities)
    x = queries[own].requires_grad_()
    gradient, terms = torch.zeros_like(x), torch.zeros_like(lengths)
    for block, by_sim in zip(problem.blocks, derivatives, strict=True):
        terms = terms + by_sim.abs().sum(1)
        key = problem.operands[block.key].detach()
        for tile in _tiles(key) if block.query == own else ():
            gradient = gradient + by_sim[:, tile] @ _keys(problem, key[tile], dtype)
    by_similarity = largest_entry.expand_as(terms)
    if problem.cosine:
        (gradient,) = torch.autograd.grad(unit_rows(x), x, gradient)
        by_similarity = by_similarity / x.detach().norm(dim=1).clamp_min(NORM_EPS)
    scale = cut.scale.abs()
    added = [block.bias.detach() for block in problem.blocks if block.bias is not None]
    added += problem.fold.scalars if problem.fold is not None else ()
    largest = scale * lengths
    for bias in added:
        if bias.numel():
            largest = largest + bias.detach().to(dtype).abs().nan_to_num(0, 0, 0).amax()
    by_logit = terms / scale.clamp_min(torch.finfo(dtype).tiny)
    return _Rows(losses.detach(), gradient, largest, by_logit, terms * by_similarity, scale * by_similarity)


def _cut(problem: Problem, rows: Tensor, dtype: torch.dtype) -> Problem:
    """Of these rows alone, whose similarities come from elsewhere."""

    def up(x: Tensor) -> Tensor:
        return x.detach().to(dtype, copy=True)  # autograd saves it, and cannot save what inference_mode made

    fold = problem.fold
    if fold is not None:
        labels = None if fold.labels is None else (fold.labels[0][rows], fold.labels[1])
        fold = dataclasses.replace(fold, labels=labels, scalars=tuple(up(x) for x in fold.scalars))
    return dataclasses.replace(
        problem,
        operands=(problem.operands[problem.blocks[0].query].detach()[rows],),
        blocks=tuple(
            dataclasses.replace(
                block,
                query=0,
                key=0,
                bias=None if block.bias is None else up(block.bias),
                mask=_cut_mask(block.mask, rows),
            )
            for block in problem.blocks
        ),
        scale=up(problem.scale),
        target=problem.target[rows],
        weight=up(problem.weight[rows]),
        symmetric=False,
        wants_tally=False,
        fold=fold,
    )


def _cut_mask(mask: Mask, rows: Tensor) -> Mask:
    return mask._replace(
        compare=tuple(Compare(c.rows[rows], c.keys, c.keep) for c in mask.compare),
        dense=None if mask.dense is None else mask.dense[rows],
        skip=None if mask.skip is None else mask.skip[rows],
    )


def _transposed(problem: Problem) -> Problem:
    """The columns of both directions as rows."""
    (block,) = problem.blocks
    mask = block.mask
    turned = mask._replace(
        compare=tuple(Compare(c.keys, c.rows, c.keep) for c in mask.compare),
        dense=None if mask.dense is None else mask.dense.T,
    )
    return dataclasses.replace(
        problem,
        blocks=(Block(block.key, block.query, mask=turned),),
        target=torch.arange(problem.rows, device=problem.device),
        label_smoothing=0.0,
        decoupled=False,
        z_loss=0.0,
        copies=1,
    )


def _tiles(key: Tensor) -> list[slice]:
    size = max(1, TILE // max(key.shape[1], 1))
    return [slice(start, start + size) for start in range(0, len(key), size)]


def _keys(problem: Problem, key: Tensor, dtype: torch.dtype) -> Tensor:
    return unit_rows(key.to(dtype)) if problem.cosine else key.to(dtype)


def _sample(count: int, most: int, device: torch.device) -> Tensor:
    if count <= most:
        return torch.arange(count, device=device)
    generator = torch.Generator(device).manual_seed(_draws.getrandbits(63))
    return torch.randint(count, (most,), generator=generator, device=device)


def _share(out: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype, moves: Tensor) -> Tensor:
    """As `testing.budget_share`, without reading anything. Where eager is not finite, nothing is asked."""
    out, eager = out.double(), eager.double()
    counts = exact.isfinite() & eager.isfinite()
    error = torch.where(counts, (out - exact).abs(), 0).nan_to_num(torch.inf)
    eager_error, largest = (torch.where(counts, x.abs(), 0).amax() for x in (eager - exact, exact))
    budget = 2 * eager_error + torch.finfo(dtype).eps * largest + moves.nan_to_num(0)
    return torch.where(error == 0, 0, error / budget).amax()


# Reading --------------------------------------------------------------------------------------------------------------


def _read(device: torch.device) -> None:
    held = _held.pop(device, None)
    if held is None:
        return
    if held.done is not None:
        held.done.synchronize()
    loss, gradient = (share.item() for share in held.shares)
    worst = max(loss, gradient)
    if worst <= MISS or (device, held.names) in _said:
        return
    _said.add((device, held.names))
    reason = f"audit of a run: {'a loss' if loss > MISS else 'a gradient'} is off by {worst:.3g} of the budget"
    ask.learn(device, {name: Verdict(FAILED, 1, worst=worst, reason=reason) for name in held.names})
    about = "\n".join(f"    {name}: {value}" for name, value in verdicts.key(device).items())
    logger.warning(
        "fusedloss: kernels gave a wrong result in this run, and `auto` runs elsewhere from now on. Earlier steps may "
        "be wrong, too. Please report it with this block:\n%s\n%s\n    off by, in budgets: loss "
        "%.3g, gradient %.3g (more than %g is a miss)\n    marked failed: %s",
        about,
        held.about,
        loss,
        gradient,
        MISS,
        ", ".join(held.names),
    )


def _described(problem: Problem, backend: str, precision: str) -> str:
    options = [
        f"{field.name}={value!r}"
        for field in dataclasses.fields(problem)
        if isinstance(value := getattr(problem, field.name), (bool, int, float)) and value != field.default
    ]
    for number, block in enumerate(problem.blocks):
        given = [name for name in ("compare", "dense", "skip") if getattr(block.mask, name) not in (None, ())]
        given += ["bias"] if block.bias is not None else []
        options.append(f"block {number}: {', '.join(given) or 'plain'}")
    if problem.fold is not None:
        options.append(f"fold {problem.fold.name}")
    shape = (problem.rows, problem.columns, problem.operands[0].shape[1])
    return (
        f"    backend: {backend}, {precision}\n    M, N, D: {shape}, {problem.dtype}\n    options: {'; '.join(options)}"
    )
