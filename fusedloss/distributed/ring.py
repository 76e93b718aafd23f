"""Losses over the columns of all ranks, which go around a ring: each rank holds one shard at a time.

    first time around    the sums of each row over the shard's columns, merged       2 M n D a shard
    second time around   dz of the shard, now that rows know their normaliser        6 M n D a shard
                         dx += dz @ y,   dy += dz.T @ x, which travels on with the shard and comes home complete

While a rank works on a shard, it receives the next. If columns have a normaliser, too (CLIP), their sums are sent along
in the first round and return complete; no product is computed twice for them. A loss that is a plain sum over columns
(SigLIP) goes around once. Prefixes (Matryoshka) go around together, as the longest one, with a sweep for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import sweep
from ..backends import SWEEPS
from ..backends.protocol import Sweeps
from ..core import targets as laws
from ..core.mask import Mask
from ..core.numerics import savable, without_autocast
from ..core.problem import Block, Problem, Ranks, RowRule
from ..core.rows import merge
from ..core.strips import RowSums, Settled, Softmax
from ..core.transforms import settled
from ..sweep import Partial, Wants
from ..sweep.collectives import group_of, ring_order

Join = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


# The ring -------------------------------------------------------------------------------------------------------------


class Parcel(NamedTuple):
    """A tensor of this rank's columns that goes around, and each rank's number of rows."""

    tensor: Tensor
    sizes: tuple[int, ...]


def go_around(
    parcels: Sequence[Parcel],
    ranks: Ranks,
    visit: Callable[[int, list[Tensor]], list[Parcel]],
    join: Join | None = None,
) -> list[Tensor]:
    """Calls `visit(shard, tensors)` for every rank's shard, this one's first, while receiving the next.

    `visit` returns as many tensors of the shard's columns on every rank. They are joined with the other ranks', and
    returned by the rank that owns the shard.
    """
    count, rank, group = len(ranks.sizes), ranks.rank, group_of(ranks)
    before, after = ((rank + step) % count for step in (-1, 1))
    held = [_padded(p) for p in parcels]
    coming: _Exchange | None = None
    travelling: _Exchange | None = None
    sizes: list[tuple[int, ...]] = []
    for step, shard in enumerate(ring_order(ranks)):
        if step < count - 1:
            coming = _Exchange(held, before, after, group)
        with without_autocast(held[0]):  # operands are already in autocast's dtype
            found = visit(shard, [x[: p.sizes[shard]] for x, p in zip(held, parcels, strict=True)])
        if found:
            sizes, mine = [p.sizes for p in found], [p.tensor for p in found]
            if travelling is not None:
                arrived = [x[: s[shard]] for x, s in zip(travelling.arrived(), sizes, strict=True)]
                mine = _sum(mine, arrived) if join is None else join(mine, arrived)
                del arrived
            del found
            mine = [_padded(Parcel(x, s)) for x, s in zip(mine, sizes, strict=True)]
            travelling = _Exchange(mine, before, after, group) if count > 1 else None
            last = mine if travelling is None else []
            del mine
        if coming is not None:
            held, coming = coming.arrived(), None
    if not sizes:
        return []
    home = last if travelling is None else travelling.arrived()
    return [x[: s[rank]] for x, s in zip(home, sizes, strict=True)]


def _sum(mine: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    return [a.add_(b) for a, b in zip(mine, others, strict=True)]


def _padded(parcel: Parcel) -> Tensor:
    """Pads to the largest shard's rows, because ranks receive before they know whose shard it is."""
    x, most = parcel.tensor.detach(), max(parcel.sizes)
    return x.contiguous() if len(x) == most else torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])


class _Exchange:
    """Sends tensors to one rank, and receives as many from another. Sent tensors are kept alive until then."""

    def __init__(self, tensors: Sequence[Tensor], to: int, source: int, group: Any):
        self.received = [torch.empty_like(x) for x in tensors]
        to, source = (dist.get_global_rank(group, rank) for rank in (to, source))
        operations = [dist.P2POp(dist.isend, x, to, group) for x in tensors]
        operations += [dist.P2POp(dist.irecv, x, source, group) for x in self.received]
        self.works, self.sent = dist.batch_isend_irecv(operations), tensors

    def arrived(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        received, self.received, self.works, self.sent = self.received, [], [], []
        return received


# A problem, shard by shard --------------------------------------------------------------------------------------------


class Shards:
    """A problem whose columns are spread over ranks; `problem` holds this rank's.

    sizes: of each block's key. target: of each row, its column among all ranks' in their order, `[M]`, or `[M, P]` if
    it has several; None: its own. A problem's keys, biases, and its masks' and folds' tensors of columns go around,
    except those of a block that stays, whose sizes are of this rank alone.
    """

    def __init__(self, problem: Problem, ranks: Ranks, sizes: Sequence[tuple[int, ...]], target: Tensor | None):
        self.problem, self.ranks, self.sizes, self.target = problem, ranks, sizes, target
        self.parcels: list[Parcel] = []
        self.places: dict[int, int] = {}
        self.stays = [len(counts) < len(ranks.sizes) for counts in sizes]
        for block, counts, stays in zip(problem.blocks, sizes, self.stays, strict=True):
            if stays:
                continue
            columns = [problem.operands[block.key], block.bias, *block.mask.keys]
            columns += [problem.fold.labels[1] if problem.fold and problem.fold.labels else None]
            for x in columns:
                if x is not None and id(x) not in self.places:
                    self.places[id(x)] = len(self.parcels)
                    self.parcels.append(Parcel(x, counts))
        self.keys = sorted({block.key for block in problem.blocks})
        self.queries = sorted({block.query for block in problem.blocks})

    def at(self, shard: int, held: list[Tensor], weight: Tensor) -> tuple[Problem, list[int]]:
        """Returns the problem of this rank's rows against that shard's columns, and the blocks that have any.

        Its operands are the queries, in order, and then the keys. Other ranks' shards hold no targets, and no column
        that is a row's own by its place: these are on this rank.
        """
        problem, home = self.problem, shard == self.ranks.rank

        def there(x: Tensor) -> Tensor:
            return held[self.places[id(x)]] if id(x) in self.places else x

        operands = [problem.operands[number] for number in self.queries]
        operands += [there(problem.operands[number]) for number in self.keys]
        blocks, kept = [], []
        for number, block in enumerate(problem.blocks):
            mask, key = block.mask, len(self.queries) + self.keys.index(block.key)
            if not home and (self.stays[number] or not len(operands[key])):
                continue
            skip = mask.skip if self.stays[number] else self._skip(mask, self.sizes[number], shard)
            mask = mask.map_keys(there)._replace(exempt=mask.exempt if home else None, skip=skip)
            bias = None if block.bias is None else there(block.bias)
            own = block.own_penalty if home else block.penalty
            blocks.append(Block(self.queries.index(block.query), key, bias, mask, block.penalty, own))
            kept.append(number)
        fold, target, targets = problem.fold, self._target(shard), problem.targets
        if fold is not None and fold.labels is not None:
            fold = replace(fold, labels=(fold.labels[0], there(fold.labels[1])))
        if targets is not None:
            target, targets = target[:, 0], targets._replace(columns=target)
        return replace(
            problem,
            operands=tuple(operands),
            blocks=tuple(blocks),
            target=target,
            targets=targets,
            weight=weight,
            fold=fold,
        ), kept

    @property
    def negatives(self) -> int | None:
        """The number of each row's negatives among all ranks' columns, if the host knows that all rows have as many."""
        here = self.problem.negatives
        return None if here is None else here + sum(map(sum, self.sizes)) - self.problem.columns

    def _target(self, shard: int) -> Tensor:
        if self.target is None:
            own = self.problem.target
            return own if shard == self.ranks.rank else torch.full_like(own, -1)
        return _within(self.target, self.sizes[0], shard)

    def _skip(self, mask: Mask, sizes: tuple[int, ...], shard: int) -> Tensor | None:
        if mask.skip is None or not mask.skip_offset:  # the row's own column
            return mask.skip if shard == self.ranks.rank else None
        index = (mask.skip + sum(sizes[: self.ranks.rank])) % max(sum(sizes), 1)
        return _within(torch.where(mask.skip < 0, -1, index), sizes, shard)


def _within(index: Tensor, sizes: tuple[int, ...], shard: int) -> Tensor:
    """Maps indices of all ranks' columns to those of the shard; -1 for the others."""
    start = sum(sizes[:shard])
    return torch.where((index >= start) & (index < start + sizes[shard]), index - start, -1)


class TwoRounds:
    """One loss across a ring: the rows' losses after one round, then the gradients of their sum.

    first, second: what is done at each shard. `EachPrefix` takes several of these around together.
    """

    def __init__(self, shards: Shards, backend: Sweeps, wants: Wants):
        self.shards, self.backend, self.wants = shards, backend, wants
        problem = shards.problem
        self.weight = problem.weight / 2 if problem.symmetric else problem.weight
        self.merged = RowSums.empty(problem.rows, problem.weight)
        self.elsewhere: sweep.Elsewhere | None = None
        # Of all targets [M, P].
        self.score = problem.weight.new_zeros(problem.all_targets.shape, dtype=torch.float64)
        self.sim = torch.zeros_like(self.score, dtype=problem.weight.dtype)
        self.slope = torch.ones_like(problem.weight) if problem.softcap or any(problem.margin) else None
        self.admitted = torch.zeros_like(problem.weight)  # the numbers of the rows' negatives, if they are counted
        self.by_scale: list[Tensor] = []  # `[M]` terms of the scale's gradient that no primitive returns
        self.columns: Settled | None = None

    def losses(self) -> Tensor:
        """`[M]`, weighted."""
        return self.settled(go_around(self.shards.parcels, self.shards.ranks, self.first, _merged))

    def gradients(self, factor: Tensor) -> list[Tensor | None]:
        """Returns the gradients of `(factor * losses).sum()` by scale, operands and biases. factor: 0-dim or `[M]`."""
        home = go_around(self.start(factor), self.shards.ranks, self.second)
        return self.found.all(home)

    def first(self, shard: int, held: list[Tensor]) -> list[Parcel]:
        """Adds a shard's part of the rows' sums, and returns its columns' sums if they have a loss."""
        columns: RowSums | None = RowSums.empty(0, self.weight)
        partial = self._partial(shard, held, self._nothing())
        if partial is not None:
            sums, columns = partial.sums()
            self.merged = merge(self.merged, sums)
            self._note(partial)
        if not self.shards.problem.symmetric or columns is None:
            return []
        assert isinstance(columns.shift, Tensor)
        return [Parcel(t, self.shards.parcels[0].sizes) for t in (columns.shift, columns.total)]

    def settled(self, home: list[Tensor]) -> Tensor:
        """Returns the weighted losses `[M]`. home: the sums of this rank's columns, if they have a loss."""
        problem = self.shards.problem
        self.rows = self._settled(self.merged, problem.rule, slope=self.slope)
        if not problem.symmetric:
            return self.rows.loss
        self.columns = self._settled(RowSums(*home), problem.column_rule)
        return self.rows.loss + self.columns.loss

    def _settled(self, sums: RowSums, rule: RowRule, slope: Tensor | None = None) -> Settled:
        problem = self.shards.problem
        if problem.bends:
            return self._bent(sums)

        def settle(weight: Tensor) -> Settled:
            return self.backend.settle(sums, self.score[:, 0], weight, rule, slope=slope)

        if problem.transform is None:
            return settle(self.weight)
        return settled(problem.transform, self.weight, settle, self.wants.any)

    def _bent(self, sums: RowSums) -> Settled:
        """Settles rows whose loss is no plain softmax."""
        problem = self.shards.problem
        here, count = problem.all_targets >= 0, self.shards.negatives
        law = laws.law_of(problem, here, self.score[:, 0], self.admitted if count is None else count)
        rows, entries, by_scale = laws.settle(
            sums, self.score, self.weight, law, problem.transform, wanted=self.wants.any
        )
        if self.wants.scale:
            self.by_scale.append(laws.scale_terms(entries, by_scale, self.sim, here))
        return rows

    def start(self, factor: Tensor) -> list[Parcel]:
        """Prepares for the second round, and returns what goes around in it. factor: of the rows' losses."""
        target_sim = self.sim[:, 0].contiguous() if self.wants.scale else None
        self.softmax = Softmax(self.rows.shift, self.rows.weight * factor, target_sim)
        self.entry = self.rows.entry * factor
        further = self.rows.further
        self.further = None if further is None else further * factor.reshape(-1, 1)
        self.found = _RingGradients(self)
        if self.found.scale is not None:
            for terms in self.by_scale:
                self.found.scale += (terms * factor).sum()
        parcels = list(self.shards.parcels)
        if self.columns is not None:
            self.entry = self.entry + self.columns.entry * factor
            own = [self.columns.shift, self.columns.weight * factor, *([] if target_sim is None else [target_sim])]
            parcels.append(Parcel(torch.stack(own, 1), self.shards.parcels[0].sizes))
        return parcels

    def second(self, shard: int, held: list[Tensor]) -> list[Parcel]:
        """Adds a shard's part of the rows' gradients, and returns those of its columns."""
        columns = None
        if self.columns is not None:
            *held, along = held
            parts = [t.contiguous() for t in along.unbind(1)]
            columns = Softmax(*parts, *[None] * (3 - len(parts)))
        partial = self._partial(shard, held, self.found.wants, self.found.rows)
        result = None
        if partial is not None:
            result = partial.differentiate(self.softmax, columns, self.entry, self.further)
        return self.found.take(result, self.kept, held)

    def _nothing(self) -> Wants:
        """No gradient, except that `prepared` must know whether the scale wants one."""
        shards = self.shards
        operands = (False,) * (len(shards.queries) + len(shards.keys))
        return Wants(operands, self.wants.scale, (False,) * len(shards.problem.blocks))

    def _partial(
        self, shard: int, held: list[Tensor], wants: Wants, into: dict[int, Tensor] | None = None
    ) -> Partial | None:
        problem, self.kept = self.shards.at(shard, held, self.weight)
        if not problem.blocks:
            return None
        wants = wants._replace(biases=tuple(wants.biases[number] for number in self.kept))
        elsewhere = self.elsewhere
        if elsewhere is not None:
            elsewhere = elsewhere._replace(thresholds=tuple(elsewhere.thresholds[number] for number in self.kept))
        partial = Partial(problem, self.backend, wants, elsewhere, into or {})
        if elsewhere is None:  # this rank's own shard, where the ring starts
            self.elsewhere = partial.taken_along()._replace(targets=self.shards.target is not None)
        return partial

    def _note(self, partial: Partial) -> None:
        """Stores the logits, similarities and slopes of the targets that are in this shard, and its numbers."""
        inputs, here = partial.inputs, partial.problem.all_targets >= 0
        self.score = torch.where(here, inputs.scores.reshape(here.shape).to(self.score.dtype), self.score)
        if inputs.sims is not None:
            self.sim = torch.where(here, inputs.sims.reshape(here.shape), self.sim)
        if self.slope is not None and partial.prepared.slope is not None:
            self.slope = torch.where(here[:, 0], partial.prepared.slope, self.slope)
        if inputs.admitted is not None:
            self.admitted += inputs.admitted


class EachPrefix:
    """The weighted sum of the losses of several prefixes, a sweep for each; their columns go around once for all."""

    def __init__(self, shards: Shards, backend: Sweeps, wants: Wants):
        self.shards, self.wants = shards, wants
        self.dims, apart = shards.problem.prefixes, shards.problem.apart()
        self.weights = [weight for weight, _ in apart]
        self.rings = [
            TwoRounds(Shards(own, shards.ranks, shards.sizes, shards.target), backend, wants) for _, own in apart
        ]
        operands = [shards.problem.operands[key] for key in shards.keys]
        self.cut = {shards.places[id(x)] for x in operands if id(x) in shards.places}

    def _prefix(self, held: list[Tensor], dim: int) -> list[Tensor]:
        return [x[:, :dim] if place in self.cut else x for place, x in enumerate(held)]

    def losses(self) -> Tensor:
        """`[M]`, weighted."""

        def visit(shard: int, held: list[Tensor]) -> list[Parcel]:
            for ring, dim in zip(self.rings, self.dims, strict=True):
                ring.first(shard, self._prefix(held, dim))
            return []

        go_around(self.shards.parcels, self.shards.ranks, visit)
        found = [weight * ring.settled([]) for weight, ring in zip(self.weights, self.rings, strict=True)]
        return torch.stack(found).sum(0)

    def gradients(self, factor: Tensor) -> list[Tensor | None]:
        """Returns the gradients of `(factor * losses).sum()` by scale, operands and biases. factor: 0-dim or `[M]`."""
        for ring, weight in zip(self.rings, self.weights, strict=True):
            ring.start(factor * weight)

        def visit(shard: int, held: list[Tensor]) -> list[Parcel]:
            found = [
                ring.second(shard, self._prefix(held, dim)) for ring, dim in zip(self.rings, self.dims, strict=True)
            ]
            return [Parcel(_added([p.tensor for p in one]), one[0].sizes) for one in zip(*found, strict=True)]

        home = go_around(self.shards.parcels, self.shards.ranks, visit)
        longest = self.dims.index(max(self.dims))
        found = [ring.found.all(home if k == longest else []) for k, ring in enumerate(self.rings)]
        given = ([g for g in one if g is not None] for one in zip(*found, strict=True))
        return [_added(one) if one else None for one in given]


def _added(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of gradients of prefixes, which all start at the first feature; overwrites the longest."""
    longest = max(gradients, key=lambda g: g.shape[-1:].numel())
    for g in gradients:
        if g is not longest:
            (longest[..., : g.shape[-1]] if g.dim() else longest).add_(g)
    return longest


class OneRound:
    """A loss that is a sum over columns. It needs no normaliser, and one round also gives its gradients."""

    def __init__(self, shards: Shards, backend: Sweeps, wants: Wants):
        self.shards, self.backend, self.wants = shards, backend, wants

    def losses(self) -> Tensor:
        return self._go(self.shards.problem.weight, False)[0]

    def gradients(self, factor: Tensor) -> list[Tensor | None]:
        return self._go(self.shards.problem.weight * factor, True)[1]

    def both(self) -> tuple[Tensor, list[Tensor | None]]:
        return self._go(self.shards.problem.weight, True)

    def _go(self, weight: Tensor, wanted: bool) -> tuple[Tensor, list[Tensor | None]]:
        found, rows = _RingGradients(self), torch.zeros_like(weight)
        wants = found.wants if wanted else _none(found.wants)

        def visit(shard: int, held: list[Tensor]) -> list[Parcel]:
            problem, kept = self.shards.at(shard, held, weight)
            result = sweep.run(problem, self.backend, wants) if kept else None
            if result is not None:
                rows.add_(result.rows)
            return found.take(result, kept, held) if wanted else []

        home = go_around(self.shards.parcels, self.shards.ranks, visit)
        return rows, found.all(home) if wanted else []


def _none(wants: Wants) -> Wants:
    operands, biases, scalars = ((False,) * len(part) for part in (wants.operands, wants.biases, wants.scalars))
    return Wants(operands, False, biases, scalars)


Ring = TwoRounds | EachPrefix | OneRound


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ring: Ring, per_row: bool, *tensors: Tensor) -> Tensor:
        ctx.ring, ctx.per_row = ring, per_row
        ctx.save_for_backward(*tensors)
        ctx.gradients = None
        if isinstance(ring, OneRound) and ring.wants.any and not per_row:
            rows, ctx.gradients = ring.both()
        else:
            rows = ring.losses()
            if ring.wants.any and not per_row:
                ctx.gradients = ring.gradients(torch.ones_like(rows))
        return rows if per_row else rows.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.per_row:
            gradients = ctx.ring.gradients(upstream)
        elif gradients is None:
            raise RuntimeError(
                "backward must run once through a loss with strategy='ring', got a second one; call the loss again"
            )
        else:
            gradients = [g if g is None else g.mul_(upstream) for g in gradients]
        cast = (None if g is None else g.to(x.dtype) for g, x in zip(gradients, tensors, strict=True))
        return None, None, *cast


class Summed(torch.autograd.Function):
    """Returns `function(x, y, *constants, *others)` `[M]`, summed over the shards of y and of the constants."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], ranks: Ranks, x: Tensor, *constants: Tensor) -> Tensor:
        ctx.function, ctx.ranks = function, ranks
        ctx.save_for_backward(x, *constants)
        total = torch.zeros_like(x[:, 0])

        def visit(shard: int, held: list[Tensor]) -> list[Parcel]:
            y, *others = held
            total.add_(function(x, y, *constants, *others))
            return []

        go_around([Parcel(t, ranks.sizes) for t in (x, *constants)], ranks, visit)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        x, *constants = ctx.saved_tensors
        dx = torch.zeros_like(x)

        def visit(shard: int, held: list[Tensor]) -> list[Parcel]:
            y, *others = held
            with torch.enable_grad():
                own, other = x.detach().requires_grad_(), y.detach().requires_grad_()
                value = ctx.function(own, other, *constants, *others)
            by_own, by_other = torch.autograd.grad(value, (own, other), upstream)
            dx.add_(by_own)
            return [Parcel(by_other, ctx.ranks.sizes)]

        (home,) = go_around([Parcel(t, ctx.ranks.sizes) for t in (x, *constants)], ctx.ranks, visit)
        return None, None, dx + home, *[None] * len(constants)


def ring_loss(shards: Shards, backend: str, per_row: bool) -> Tensor:
    """Returns the weighted losses of this rank's rows, or their sum."""
    problem = shards.problem
    biases = [block.bias for block in problem.blocks if block.bias is not None]
    scalars = problem.fold.scalars if problem.fold else ()
    tensors = [problem.scale, *problem.operands, *biases, *scalars]
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in tensors]
    by_scale, *rest = wanted
    flags = iter(rest)
    by_operand = tuple(next(flags) for _ in problem.operands)
    by_bias = tuple(block.bias is not None and next(flags) for block in problem.blocks)
    wants = Wants(by_operand, by_scale, by_bias, tuple(flags))
    kind = EachPrefix if problem.prefixes else TwoRounds if problem.fold is None else OneRound
    ring = kind(shards, SWEEPS[backend], wants)
    return _Ring.apply(ring, per_row, *map(savable, tensors))


class _RingGradients:
    """The gradients, accumulated shard by shard."""

    def __init__(self, ring: TwoRounds | OneRound):
        shards, wants = ring.shards, ring.wants
        self.shards = shards
        problem = shards.problem
        by_query = [wants.operands[number] for number in shards.queries]
        by_key = [wants.operands[number] for number in shards.keys]
        self.wants = Wants((*by_query, *by_key), wants.scale, wants.biases, wants.scalars)
        self.scalars = [torch.zeros_like(problem.scale) if wanted else None for wanted in wants.scalars]
        self.like, self.operands = problem.scale, problem.operands
        self.scale = torch.zeros_like(problem.scale) if wants.scale else None
        self.rows = {
            number: torch.zeros_like(self.operands[query], dtype=self.like.dtype, memory_format=torch.contiguous_format)
            for number, (query, wanted) in enumerate(zip(shards.queries, by_query, strict=True))
            if wanted
        }
        self.biased = [number for number, wanted in enumerate(wants.biases) if wanted]
        self.stayed: dict[int, Tensor | None] = {}  # gradients of biases that do not go around

    def take(self, result: sweep.Result | None, kept: list[int], held: list[Tensor]) -> list[Parcel]:
        """Adds the rows' gradients, and returns those of this shard's columns."""
        queries = len(self.shards.queries)
        if result is not None:
            if self.scale is not None and result.scale is not None:
                self.scale += result.scale
            for known, more in zip(self.scalars, result.scalars, strict=False):
                if known is not None and more is not None:
                    known += more
            for number, gradient in enumerate(result.operands[:queries]):
                if gradient is not None and gradient is not self.rows[number]:
                    self.rows[number] += gradient
        travels = []
        for number, key in enumerate(self.shards.keys):
            if self.wants.operands[queries + number]:
                place = self.shards.places[id(self.operands[key])]
                gradient = None if result is None else result.operands[queries + number]
                travels.append(self._parcel(gradient, held[place], self.shards.parcels[place].sizes))
        for number in self.biased:
            bias = self.shards.problem.blocks[number].bias
            gradient = result.biases[kept.index(number)] if result is not None and number in kept else None
            if self.shards.stays[number]:
                self.stayed[number] = self.stayed.get(number) if gradient is None else gradient
                continue
            place = self.shards.places[id(bias)]
            travels.append(self._parcel(gradient, held[place], self.shards.parcels[place].sizes))
        return travels

    def _parcel(self, gradient: Tensor | None, like: Tensor, sizes: tuple[int, ...]) -> Parcel:
        if gradient is None:
            return Parcel(torch.zeros_like(like, dtype=self.like.dtype), sizes)
        return Parcel(gradient.to(self.like.dtype), sizes)

    def all(self, home: list[Tensor]) -> list[Tensor | None]:
        """Returns the gradients by the scale, the operands, the biases and a fold's scalars.

        home: those of this rank's columns that have come around; [] leaves them out.
        """
        found = {self.shards.queries[number]: gradient for number, gradient in self.rows.items()}
        arrived = iter(home)
        queries = len(self.shards.queries)
        for number, key in enumerate(self.shards.keys):
            if self.wants.operands[queries + number]:
                gradient = next(arrived, None)
                if gradient is not None:
                    found[key] = found[key].add_(gradient) if key in found else gradient
        operands = [found.get(number) for number in range(len(self.operands))]
        blocks = enumerate(self.shards.problem.blocks)
        here = self.shards.stays
        biases = [
            (self.stayed[n] if here[n] else next(arrived, None)) if n in self.biased else None
            for n, block in blocks
            if block.bias is not None
        ]
        return [self.scale, *operands, *biases, *self.scalars]


def _merged(mine: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    found = merge(RowSums(*mine), RowSums(*others))
    return [found.shift if isinstance(found.shift, Tensor) else torch.full_like(found.total, found.shift), found.total]
