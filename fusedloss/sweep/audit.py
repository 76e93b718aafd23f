"""Computes some rows of a run again in fp64: with FUSEDLOSS_AUDIT=1e-3 in one call of a thousand.

Given the keys, a row of a loss can be computed alone. Its similarities give its loss, and the derivatives dz_j of the
loss by its logits give its query's gradient, `sum_j dz_j scale y_j`. An audited call does this for up to 64 random rows
and compares. The result stays on the device until the next audited call reads it, so that no call waits for its own. A
miss marks the families of that call as failed, so that `auto` uses another backend, and warns once.

    audited             loss    gradient of the query
    one direction       yes     yes; not where the same matrix is a key, too, whose gradient needs all rows
    both directions     yes     no: it needs the normaliser of every column
    the sigmoid fold    yes     as in one direction

Not audited: what reads a threshold (`score_margin`, guides, other folds), where fp32 and fp64 may rightly decide
differently; several targets, debiased losses, angular margins, prefixes, penalties of hardness; losses over a process
group, whose rows lie elsewhere; losses without a sweep; and what runs inside torch.compile or while a CUDA graph is
captured.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import KERNELS, reference
from ..core import environment
from ..core.mask import Compare
from ..core.numerics import FLUSH, NORM_EPS, unit_rows, without_autocast
from ..core.problem import Block, Problem
from ..core.rows import cut_off
from ..trust import ask, families, verdicts
from ..trust.verdicts import FAILED, Verdict

ROWS = 64
# The formula and its gradient take up to 16 numbers of 8 bytes per similarity: 64 MiB up to 524288 columns.
SIMILARITIES = (64 << 20) // (16 * 8)
TILE = 1 << 20  # numbers of a tile of keys: 8 MiB
# A miss is an error of more than 4 budgets. The budget is of the sampled rows alone, in which eager may be lucky: the
# largest error of 4000 honest calls (tests/trust/test_audit.py draws them) was 0.6 budgets.
MISS = 4.0
# Four roundings of fp32 (a product, its scale, exp, the sum after it), one of tf32: as STEP and STEPS of cases.py.
STEP, TF32_STEP = 2 * torch.finfo(torch.float32).eps, 2.0**-11

logger = logging.getLogger("fusedloss")

_draws = random.Random(0)  # separate, so that a user's draws do not change
_held: dict[torch.device, _Held] = {}  # of each device's last audited call
_said: set[tuple[torch.device, tuple[str, ...]]] = set()


class _Held(NamedTuple):
    """A comparison that has not been read yet."""

    shares: Tensor  # [2], of the budget: the losses' and the gradient's; on the host once `done`
    done: torch.Event | None
    names: tuple[str, ...]  # of the families that a miss concerns
    about: list[str]


def due() -> bool:
    """Whether this call is audited. Drawn at random: every n-th call could always hit the same loss of a model."""
    share = environment.audit()
    return share > 0 and _draws.random() < share


def look(problem: Problem, backend: str, losses: Tensor, gradients: Sequence[Tensor | None]) -> None:
    """Reads the last audited call's comparison, and compares some rows of this call.

    losses: [M], weighted. gradients: of their sum, by the operands, None if not wanted. Only the reading waits for the
    device, for work of an earlier call.
    """
    precision, device = families.precision(problem.dtype), problem.device
    if backend not in KERNELS or precision is None or not auditable(problem) or ask.capturing(device):
        return
    _read(device)
    rows = _sample(problem.rows, max(1, min(ROWS, SIMILARITIES // problem.columns)), device)
    try:
        found, done = shares(problem, losses, gradients, rows), None
    except torch.OutOfMemoryError:  # it takes 100 MiB, which a step may not have left
        if (device, ()) not in _said:
            _said.add((device, ()))
            logger.warning("fusedloss: no memory is left on %s for an audit (FUSEDLOSS_AUDIT): it is left out", device)
        return
    if device.type != "cpu":
        found = found.to("cpu", non_blocking=True)  # into pinned memory
        done = torch.Event(device)
        done.record()
    needed = families.on(backend, families.of_problem(problem))
    names = tuple(verdicts.name_of(backend, name, precision) for name in needed)
    _held[device] = _Held(found, done, names, _described(problem, backend, precision))


def auditable(problem: Problem) -> bool:
    """Whether a row's loss depends only on its own similarities, and smoothly."""
    fold = problem.fold
    if problem.prefixes or problem.ranks is not None or any(problem.margin) or problem.transform is not None:
        return False
    if problem.bends or not (problem.rows and problem.columns and problem.operands[0].shape[1]):
        return False
    if fold is not None and (fold.name != "sigmoid" or fold.distance not in ("", "cosine") or fold.itself):
        return False
    for block in problem.blocks:
        mask = block.mask
        if mask.margin is not None or mask.guide is not None or block.penalty or block.own_penalty:
            return False
        if problem.symmetric and (mask.skip is not None or block.bias is not None):
            return False
    # No loss of both directions has these and those above.
    rest = problem.label_smoothing or problem.decoupled or problem.z_loss or problem.copies != 1
    return not (problem.symmetric and rest)


def forget() -> None:
    """Forgets this process's comparisons and warnings, and restarts its draws."""
    _held.clear()
    _said.clear()
    _draws.seed(0)


# Comparing ------------------------------------------------------------------------------------------------------------


def shares(problem: Problem, losses: Tensor, gradients: Sequence[Tensor | None], rows: Tensor) -> Tensor:
    """Returns the largest error of these rows' losses, and of their queries' gradient, as shares of the budget [2].

    The budget is that of `testing.budget_share`, 2 x eager's error and a rounding, and for each row what its condition
    allows: `_Rows.loss_moves`, `_Rows.gradient_moves`.
    """
    query = problem.blocks[0].query
    gradient = None if problem.symmetric or query in [block.key for block in problem.blocks] else gradients[query]
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(losses):
        exact, eager = (_formula(problem, rows, dtype) for dtype in (torch.float64, torch.float32))
        loss = _share(losses[rows], eager.losses, exact.losses, torch.float32, exact.loss_moves)
        if gradient is None:
            return torch.stack([loss, torch.zeros_like(loss)])
        moves = exact.gradient_moves[:, None]
        return torch.stack([loss, _share(gradient[rows], eager.gradient, exact.gradient, problem.dtype, moves)])


def _share(out: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype, moves: Tensor) -> Tensor:
    """Computes `testing.budget_share` without reading anything back. If eager is not finite, the share is 0."""
    out, eager = out.double(), eager.double()
    counts = exact.isfinite() & eager.isfinite()
    error = torch.where(counts, (out - exact).abs(), 0).nan_to_num(torch.inf)
    eager_error, largest = (torch.where(counts, x.abs(), 0).amax() for x in (eager - exact, exact))
    budget = 2 * eager_error + torch.finfo(dtype).eps * largest + moves.nan_to_num(0)
    return torch.where(error == 0, 0, error / budget).amax()


class _Rows(NamedTuple):
    """The formula's results for some rows, and how much roundings may move them."""

    losses: Tensor  # [R]
    gradient: Tensor  # [R, D], of the queries
    loss_moves: Tensor  # [R]
    gradient_moves: Tensor  # [R], each element of a row


def _formula(problem: Problem, rows: Tensor, dtype: torch.dtype) -> _Rows:
    found = _one_way(problem, rows, dtype)
    if not problem.symmetric:
        return found
    other = _one_way(_transposed(problem), rows, dtype)
    losses, moves = (found.losses + other.losses) / 2, (found.loss_moves + other.loss_moves) / 2
    return found._replace(losses=losses, loss_moves=moves)


def _one_way(problem: Problem, rows: Tensor, dtype: torch.dtype) -> _Rows:
    cut, own = _cut(problem, rows, dtype), problem.blocks[0].query
    queries = {block.query: problem.operands[block.query].detach()[rows].to(dtype) for block in problem.blocks}
    similarities = []
    lengths = torch.zeros(len(rows), dtype=dtype, device=rows.device)  # upper bound of |x_i| |y_j|
    entry = lengths.new_zeros(())  # largest entry of a key
    for block in problem.blocks:
        x = queries[block.query]
        x = unit_rows(x) if problem.cosine else x
        sim = x.new_empty((len(rows), len(problem.operands[block.key])))
        for part, y in _tiles(problem, block, dtype):
            torch.mm(x, y.T, out=sim[:, part])
            lengths = torch.maximum(lengths, x.norm(dim=1) * y.norm(dim=1).amax())
            entry = torch.maximum(entry, y.abs().amax())
        similarities.append(sim.requires_grad_())
    losses = reference.losses_of(cut, similarities)
    derivatives = torch.autograd.grad(losses.sum(), similarities)

    x = queries[own].requires_grad_()
    gradient = torch.zeros_like(x)
    for block, by_sim in zip(problem.blocks, derivatives, strict=True):
        for part, y in _tiles(problem, block, dtype) if block.query == own else ():
            gradient = gradient + by_sim[:, part] @ y
    moved = cut.scale.abs() * entry  # change of the gradient by a logit's derivative of 1
    if problem.cosine:
        (gradient,) = torch.autograd.grad(unit_rows(x), x, gradient)
        moved = moved / x.detach().norm(dim=1).clamp_min(NORM_EPS)

    # A logit is off by a step of the largest that it may be, which moves the loss by as much times the derivative. It
    # moves the derivative by as large a part of it, and that is rounded to the embeddings' dtype besides.
    scale = cut.scale.abs()
    largest = scale * lengths
    for bias in [b.bias for b in cut.blocks if b.bias is not None] + list(cut.fold.scalars if cut.fold else ()):
        largest = largest + bias.abs().nan_to_num(0, 0, 0).amax() if bias.numel() else largest
    terms = sum(by_sim.abs().sum(1) for by_sim in derivatives) / scale.clamp_min(torch.finfo(dtype).tiny)  # sum |dz|
    moves = _step(problem) * largest * terms + problem.columns * FLUSH
    # A softcapped logit keeps roundings where its derivative is 0: its own, and that of 1 - tanh^2.
    bent = STEP * cut.weight.abs() if problem.softcap else torch.zeros_like(moves)
    gradient_moves = (moves + torch.finfo(problem.dtype).eps * terms + bent) * moved
    return _Rows(losses.detach(), gradient, moves + problem.softcap * bent, gradient_moves)


def _step(problem: Problem) -> float:
    precision = families.precision(problem.dtype)
    if precision in ("bf16", "fp16"):
        return STEP + cut_off(problem.operands[0].shape[1])
    return TF32_STEP if precision == "tf32" else STEP


def _tiles(problem: Problem, block: Block, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yields a block's keys as they enter the similarities, some at a time, with their places."""
    key = problem.operands[block.key].detach()
    size = max(1, TILE // key.shape[1])
    for start in range(0, len(key), size):
        part = slice(start, start + size)
        y = key[part].to(dtype)
        yield part, unit_rows(y) if problem.cosine else y


# Some rows as a problem -----------------------------------------------------------------------------------------------


def _cut(problem: Problem, rows: Tensor, dtype: torch.dtype) -> Problem:
    """Returns the problem of these rows alone, for `reference.losses_of`, which reads no embeddings."""

    def up(x: Tensor) -> Tensor:
        return x.detach().to(dtype, copy=True)  # autograd saves it, and cannot save what inference_mode made

    fold = problem.fold
    if fold is not None:
        labels = None if fold.labels is None else (fold.labels[0][rows], fold.labels[1])
        fold = dataclasses.replace(fold, labels=labels, scalars=tuple(up(x) for x in fold.scalars))
    blocks = []
    for block in problem.blocks:
        mask = block.mask._replace(
            compare=tuple(Compare(c.rows[rows], c.keys, c.keep) for c in block.mask.compare),
            dense=None if block.mask.dense is None else block.mask.dense[rows],
            skip=None if block.mask.skip is None else block.mask.skip[rows],
        )
        blocks.append(Block(0, 0, None if block.bias is None else up(block.bias), mask))
    return dataclasses.replace(
        problem,
        operands=(problem.operands[problem.blocks[0].query].detach()[rows],),
        blocks=tuple(blocks),
        scale=up(problem.scale),
        target=problem.target[rows],
        weight=up(problem.weight[rows]),
        symmetric=False,
        wants_tally=False,
        fold=fold,
    )


def _transposed(problem: Problem) -> Problem:
    """Returns the columns of both directions as rows."""
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
    )


def _sample(count: int, most: int, device: torch.device) -> Tensor:
    if count <= most:
        return torch.arange(count, device=device)
    generator = torch.Generator(device).manual_seed(_draws.getrandbits(63))
    return torch.randint(count, (most,), generator=generator, device=device)


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
    lines = [
        *(f"{name}: {value}" for name, value in verdicts.key(device).items()),
        *held.about,
        f"off by, in budgets: loss {loss:.3g}, gradient {gradient:.3g} (more than {MISS:g} is a miss)",
        f"marked failed: {', '.join(held.names)}",
    ]
    logger.warning(
        "fusedloss: kernels gave a wrong result in this run, and `auto` runs elsewhere until "
        "`python -m fusedloss verify` has proved them again. Earlier steps may be wrong, too. "
        "Please report it with this block:\n%s",
        "\n".join("    " + line for line in lines),
    )


def _described(problem: Problem, backend: str, precision: str) -> list[str]:
    options = [
        f"{field.name}={value!r}"
        for field in dataclasses.fields(problem)
        if isinstance(value := getattr(problem, field.name), (bool, int, float)) and value != field.default
    ]
    for number, block in enumerate(problem.blocks):
        mask = block.mask
        parts = {"compare": mask.compare or None, "dense": mask.dense, "skip": mask.skip, "bias": block.bias}
        given = [name for name, part in parts.items() if part is not None]
        options.append(f"block {number}: {', '.join(given) or 'plain'}")
    if problem.fold is not None:
        options.append(f"fold {problem.fold.name}")
    shape = (problem.rows, problem.columns, problem.operands[0].shape[1])
    return [
        f"backend: {backend}, {precision}",
        f"M, N, D: {shape}, {problem.dtype}",
        f"options: {'; '.join(options)}",
    ]
