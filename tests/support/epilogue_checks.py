"""One check for each epilogue of the registry, of any backend: its primitives against formulas in fp64.

A check takes a backend's module and strips; `SETS` has what a strip may be given. `tests/conformance/` runs all of them
on every backend; the tests of one backend's kernels run them on its shapes, layouts and numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from strips import (
    assert_lse,
    assert_near,
    direction,
    dropped,
    factored,
    formula,
    gain_of,
    grad_formula,
    lse,
    with_entry,
)
from torch import Tensor

from fusedloss.backends import chunked, triton
from fusedloss.backends.triton.config import Config
from fusedloss.core.folds import FOLDS, SIDED
from fusedloss.core.mask import Compare, GuideRule, Mask, StripMask
from fusedloss.core.numerics import slices
from fusedloss.core.problem import Block, Fold, Problem
from fusedloss.core.rows import fold_part
from fusedloss.core.strips import Extremes, Patch, RowSums, Softmax, Strip, Tally, Tile

SCALE = 3.0
FENCE = -777.0  # around what a kernel may write


# Every way of Triton's kernels to compute similarities.
TILES = {
    "pointers": Config("pointers", 16, 32, 16, GROUP_M=2, num_warps=4, num_stages=1),
    "pointers, folded in halves": Config("pointers", 32, 64, 32, GROUP_M=1, SUBTILES=2, num_warps=4, num_stages=2),
    "descriptors": Config("descriptors", 16, 32, 16, GROUP_M=3, num_warps=4, num_stages=2),
    "descriptors, folded in halves": Config("descriptors", 16, 64, 32, SUBTILES=2, num_warps=4, num_stages=2),
    "library": Config("library", 16, 32, 16),
}


# What is written ------------------------------------------------------------------------------------------------------


def fenced(
    M: int, N: int, dtype: torch.dtype, device: torch.device, aligned: bool = True, padded: bool = False
) -> tuple[Tensor, Tensor]:
    """A matrix to be written, and all that lies around it: a row above and below, columns on both sides.

    padded: a row may be written up to the next 16 bytes, behind which the fence begins.
    """
    wide = 16 // torch.empty((), dtype=dtype).itemsize
    whole = -(-N // wide) * wide
    left, width = (wide, whole + 2 * wide) if aligned else (3, N + 6 + (N + 1) % 2)
    if padded and aligned:
        width = wide + whole
    buffer = torch.full((M + 2, width), FENCE, dtype=dtype, device=device)
    out = buffer[1 : 1 + M, left : left + N].fill_(math.nan)
    return out, buffer[:, : left + N] if padded and aligned else buffer


def assert_fenced(out: Tensor, buffer: Tensor) -> None:
    out.fill_(FENCE)
    assert (buffer == FENCE).all(), "written outside"


EXPONENTIAL = 1e-4  # what `assert_near` lets one be off, as a share


def assert_stored(out: Tensor, value: Tensor, buffer: Tensor, magnitude: Tensor | None = None) -> None:
    """Rounded once to the buffer's dtype."""
    info = torch.finfo(out.dtype)
    size = value.abs() if magnitude is None else magnitude
    slack = (info.eps + EXPONENTIAL) * size + info.smallest_normal * info.eps
    assert ((out.double() - value).abs() <= slack).all()
    assert_fenced(out, buffer)


# What a strip may be given --------------------------------------------------------------------------------------------


def with_factors(strip):
    return strip._replace(row_factor=1 / strip.x.float().norm(dim=1), col_factor=1 / strip.y.float().norm(dim=1))


def with_bias(strip):
    bias = torch.randn(len(strip.y), device=strip.x.device)
    return strip._replace(bias=bias.masked_fill(torch.rand_like(bias) < 0.3, -torch.inf))


def with_strange_targets(strip):
    """Out of range on either side, also where 32 bits would wrap around to a column."""
    strange = torch.tensor([-1, len(strip.y), 2**32 + 1, -(2**32), -(2**63), 2**63 - 1], device=strip.x.device)
    target = strip.target.clone()
    target[::2] = strange[torch.arange(len(target[::2])) % len(strange)]
    return strip._replace(target=target)


def masked(part):
    return lambda strip: strip._replace(mask=part(strip, strip.mask or StripMask()))


def compares(*keeps):
    """Numbers that agree in half of their bits, and are strided."""

    def add(strip, mask):
        M, N, device = len(strip.x), len(strip.y), strip.x.device
        values = torch.tensor([-(2**63), 2**32, 0, 1, 2**32 + 1, -1, 2**62], device=device)
        pick = lambda count: values[torch.randint(len(values), (count, 2), device=device)][:, 0]
        rare = lambda ids: torch.where(torch.rand(ids.shape, device=device) < 0.9, values[0], ids)
        # What is kept is nearly all of a kind, or nothing would be left.
        made = (Compare(rare(pick(M)), rare(pick(N)), True) if k else Compare(pick(M), pick(N), False) for k in keeps)
        return mask._replace(compare=(*mask.compare, *made))

    return masked(add)


def some(strip, share=0.7):
    return torch.rand(len(strip.x), len(strip.y), device=strip.x.device) < share


def packed(drop):
    """A guide's words."""
    M, N = drop.shape
    padded = torch.nn.functional.pad(drop, (0, -N % 32)).view(M, -1, 32).long()
    words = (padded << torch.arange(32, device=drop.device)).sum(2)
    return torch.where(words < 2**31, words, words - 2**32).int()


def with_threshold(strip, mask):
    """Between two similarities of each row: in the widest gap of the middle half."""
    sim = formula(strip)[0].sort(dim=1).values
    N = sim.shape[1]
    if N < 4:
        return mask._replace(threshold=(sim[:, 0] + 0.5).float())
    gaps = sim[:, N // 4 + 1 : 3 * N // 4 + 1] - sim[:, N // 4 : 3 * N // 4]
    first = N // 4 + gaps.argmax(dim=1, keepdim=True)
    return mask._replace(threshold=((sim.gather(1, first) + sim.gather(1, first + 1)) / 2)[:, 0].float())


def with_exempt(strip, mask):
    """Two columns a row, some of them none."""
    exempt = torch.randint(-1, len(strip.y), (len(strip.x), 2), device=strip.x.device)
    exempt[0] = torch.tensor([2**32, len(strip.y)], device=exempt.device)
    return with_threshold(strip, mask)._replace(exempt=exempt)


def with_skip(strip, mask):
    return mask._replace(skip=torch.randint(-1, len(strip.y), (len(strip.x),), device=strip.x.device))


def with_own(strip):
    own = torch.randint(-1, len(strip.y), (len(strip.x),), device=strip.x.device)
    return strip._replace(own=own, own_scale=torch.tensor(-0.75, device=strip.x.device))


GIVEN = {
    "factors": with_factors,
    "bias": with_bias,
    "strange targets": with_strange_targets,
    "no target": lambda strip: strip._replace(target=None),
    "dropped": compares(False),
    "kept": compares(True),
    "four dropped and two kept": compares(False, True, False, False, True, False),
    "dense": masked(lambda strip, mask: mask._replace(dense=some(strip))),
    "dense by columns": masked(lambda strip, mask: mask._replace(dense=some(strip).T.contiguous().T)),
    "dense for all rows": masked(lambda strip, mask: mask._replace(dense=some(strip)[:1].expand(len(strip.x), -1))),
    "dense, strided": masked(lambda strip, mask: mask._replace(dense=some(strip).repeat_interleave(2, 1)[:, ::2])),
    "bits": masked(lambda strip, mask: mask._replace(dropped=packed(some(strip, 0.3)))),
    "threshold": masked(with_threshold),
    "threshold, exempt": masked(with_exempt),
    "skip": masked(with_skip),
    "own": with_own,
    "softcap": lambda strip: strip._replace(softcap=4.0),
}
ALL_AT_ONCE = (
    *("factors", "bias", "strange targets", "four dropped and two kept", "dense by columns", "bits"),
    *("threshold, exempt", "skip", "own", "softcap"),
)
SETS = {"nothing else": (), **{name: (name,) for name in GIVEN}, "all at once": ALL_AT_ONCE}


def chosen(strip: Strip, names: tuple[str, ...]) -> Strip:
    for name in names:
        strip = GIVEN[name](strip)
    return strip


def problem_of(strip: Strip, scale_bound: float | None = SCALE, fold: Fold | None = None) -> Problem:
    """What a backend asks of the problem that a strip is of: a bound of its logits, and whether anything is masked."""
    M = len(strip.x)
    none, one = torch.full((M,), -1, device=strip.x.device), torch.ones(M, device=strip.x.device)
    masked = strip.mask is not None or strip.own is not None
    mask = Mask(dense=torch.ones((M, len(strip.y)), dtype=torch.bool, device=strip.x.device)) if masked else Mask()
    return Problem(
        (strip.x, strip.y),
        (Block(0, 1, strip.bias, mask),),
        strip.scale,
        none,
        one,
        cosine=strip.row_factor is not None,
        scale_bound=scale_bound,
        softcap=strip.softcap,
        fold=fold,
    )


def summed(sums: RowSums | Tensor) -> Any:
    """Without the axis of tiles, where there is one; in fp64."""
    if isinstance(sums, Tensor):
        return sums.double().sum(0) if sums.dim() == 2 else sums.double()
    return summed(sums.total)


def outs_of(backend: Any, problem: Problem, strips: list[Strip], aligned: bool = True) -> list[tuple[Tensor, Tensor]]:
    dtype = backend.workspace_dtype(problem)
    padded = getattr(backend, "backend", backend) is triton
    return [fenced(len(s.x), len(s.y), dtype, s.x.device, aligned, padded) for s in strips]


# Statistics -----------------------------------------------------------------------------------------------------------


def check_stats(backend: Any, strips: list[Strip]) -> None:
    assert_lse(backend.stats_rows(strips), torch.cat([formula(strip)[1] for strip in strips], 1))


def check_stats_with_columns(backend: Any, strip: Strip) -> None:
    z = formula(strip)[1]
    rows, columns = backend.stats_rows_and_columns(strip)
    assert_lse(rows, z)
    assert_lse(columns, z.T)


def check_tally(backend: Any, epilogue: str, strip: Strip) -> None:
    """What is counted is added. Sums of logits and similarities are owed by `stats_rows` alone."""
    sim, z = formula(strip)
    score = z.masked_fill(z == -torch.inf, 0).mean(1).float() + 1e-3
    assert ((z - score.double()[:, None]).abs() > 1e-5).all()
    tally = Tally.empty(len(strip.x), strip.scale)
    tally.admitted.fill_(100), tally.sim.fill_(-2), tally.maximum.fill_(0.5)
    if epilogue == "exp":
        problem = problem_of(strip)
        ((out, _),) = outs_of(backend, problem, [strip])
        backend.exp_rows(problem, [strip], [out], None, tally, score)
    elif epilogue == "stats+columns":
        backend.stats_rows_and_columns(strip, tally, score)
    else:
        backend.stats_rows([strip], tally, score)
    here = z > -torch.inf
    assert torch.equal(tally.admitted - 100, here.sum(1).float())
    assert torch.equal(tally.above, (z > score[:, None]).sum(1).float())
    assert_near(tally.maximum, z.amax(1).clamp_min(0.5), magnitude=1.0)
    for found, terms, start in ((tally.z, z, 0), (tally.sim, sim, -2)) if epilogue == "stats" else ():
        terms = terms.masked_fill(~here, 0)
        assert_near(found, terms.sum(1) + start, magnitude=terms.abs().sum(1) + 2)


def check_top(backend: Any, strip: Strip) -> None:
    z = formula(strip)[1]
    top, column = backend.top_rows([strip])
    none = z.amax(1) == -torch.inf
    assert torch.equal(column == -1, none) and torch.equal(top == -torch.inf, none)
    assert_near(top, z.amax(1), magnitude=1.0)
    found = z.gather(1, column.clamp_min(0)[:, None])[:, 0]
    assert_near(found[~none], z.amax(1)[~none], magnitude=1.0)


# Exponentials ---------------------------------------------------------------------------------------------------------


def check_exp(backend: Any, strips: list[Strip], aligned: bool = True) -> None:
    problem = problem_of(strips[0])
    outs = outs_of(backend, problem, strips, aligned)
    sums, q = backend.exp_rows(problem, strips, [out for out, _ in outs], None)
    assert q is None
    _assert_exponentials(strips, sums, outs)
    learns = replace(problem, scale_bound=None)
    if strips[0].softcap or not backend.can_exp(learns):  # a scale with a gradient has no shift known to be safe
        return
    outs, target_sim = (
        outs_of(backend, learns, strips, aligned),
        torch.randn(len(strips[0].x), device=outs[0][0].device),
    )
    sums, q = backend.exp_rows(learns, strips, [out for out, _ in outs], target_sim)
    terms = [_exponentials(s, sums) * (formula(s)[0] - target_sim.double()[:, None]) for s in strips]
    terms = torch.cat(terms, 1)
    assert_near(summed(q), terms.sum(1), magnitude=terms.abs().sum(1))
    _assert_exponentials(strips, sums, outs)


def check_stored(backend: Any, strip: Strip, aligned: bool = True) -> None:
    """Both directions' sums of what is stored; then dz in place."""
    problem = problem_of(strip)
    ((out, buffer),) = outs = outs_of(backend, problem, [strip], aligned)
    sums, columns = backend.exp_rows_and_columns(problem, strip, out)
    assert_near(summed(columns), _exponentials(strip, columns).sum(0))
    kept = out.clone()
    _assert_exponentials([strip], sums, outs)
    if strip.target is None:
        return
    M, N = out.shape
    out.copy_(kept)
    rows, columns, entry = (torch.rand(count, device=out.device) + 0.1 for count in (M, N, M))
    inside = (strip.target >= 0) & (strip.target < N)
    target = strip.target.masked_fill(~inside, -1)
    backend.weigh(Patch(out, target, strip.row_factor, strip.col_factor), rows, columns, entry)
    held = strip._replace(target=target)
    entries = factored(with_entry(torch.zeros_like(kept).double(), entry, held), strip)
    assert_stored(out, kept.double() * (rows.double()[:, None] + columns.double()) + entries, buffer)


def _exponentials(strip: Strip, sums: RowSums) -> Tensor:
    """Relative to the shift that the backend took: one number, or one for each row."""
    shift = sums.shift
    if isinstance(shift, Tensor):
        shift = shift.double()[:, None]
    return torch.exp(formula(strip)[1] - shift)


def _assert_exponentials(strips: list[Strip], sums: RowSums, outs: list[tuple[Tensor, Tensor]]) -> None:
    exponentials = [_exponentials(strip, sums) for strip in strips]
    assert_near(summed(sums), torch.cat(exponentials, 1).sum(1))
    for strip, e, (out, buffer) in zip(strips, exponentials, outs, strict=True):
        z = formula(strip)[1]
        size = factored(e * bend_room(z, strip), strip).abs()
        assert_stored(out, factored(e * bend(z, strip), strip), buffer, size)


def bend(z, strip):
    """The softcap's derivative; 1 at the target, whose entry has its own."""
    return (1 - (z / strip.softcap) ** 2).masked_fill(z == -torch.inf, 1) if strip.softcap else 1.0


def bend_room(z, strip):
    """1 - tanh^2 is off by 2^-21, however small it is: two ulp of exp2, and the roundings of tanh and of its square."""
    return bend(z, strip) + (2**-21 / EXPONENTIAL if strip.softcap else 0.0)


# Gradients ------------------------------------------------------------------------------------------------------------


def check_grad(
    backend: Any,
    strips: list[Strip],
    by_columns: bool = False,
    with_q: bool = True,
    smooth: Tensor | None = None,
    aligned: bool = True,
) -> None:
    """Rows that are left out may have any shift where a kernel reads it; in torch, 0 times NaN is NaN."""
    sims, zs = (torch.cat(both, 1) for both in zip(*map(formula, strips), strict=True))
    M, device = len(sims), sims.device
    problem = problem_of(strips[0])
    wild = backend is not chunked
    by_row, by_column = (direction(z, with_q, wild) for z in (zs, zs.T))
    by_row = by_row._replace(weight=by_row.weight / 8)  # all together within fp16
    by_column = by_column._replace(weight=by_column.weight / 8) if by_columns else None
    entry, gain = torch.rand(M, device=device) / 4 - 0.1, gain_of(strips[0].x.dtype, device)
    outs = outs_of(backend, problem, strips, aligned)
    q = backend.grad_rows(strips, [out for out, _ in outs], by_row, by_column, entry, gain, smooth)
    dz, terms = grad_formula(zs, sims, by_row)
    size, room = dz.abs(), terms.abs().sum(1) + by_row.weight.abs()
    wanted_q = terms.sum(1)
    if by_column is not None:
        more, terms = (t.T for t in grad_formula(zs.T, sims.T, by_column))
        dz, size = dz + more, size + more.abs()
        wanted_q, room = wanted_q + terms.sum(1), room + terms.abs().sum(1)
    if smooth is not None:
        here = (zs > -torch.inf) * smooth.double()[:, None]
        dz, size = dz - here, size + here
    if with_q:
        assert_near(summed(q), wanted_q, magnitude=room)
    else:
        assert q is None
    gain = 1 if gain is None else gain.double()
    widths = [len(strip.y) for strip in strips]
    parts = (t.split(widths, 1) for t in (zs, dz, size))
    for strip, (out, buffer), z, v, s in zip(strips, outs, *parts, strict=True):
        value, magnitude = (
            gain * factored(with_entry(t, e, strip), strip)
            for t, e in ((v * bend(z, strip), entry), (s * bend_room(z, strip), entry.abs()))
        )
        assert_stored(out, value, buffer, magnitude)


# One matrix against itself --------------------------------------------------------------------------------------------


def of_itself(strip: Strip, side: int = 16) -> tuple[Strip, list[list[Tile]]]:
    """The strip's columns against themselves, row i and row N - 1 - i each other's target; and its rows of tiles."""
    own = torch.arange(len(strip.y), device=strip.y.device)
    whole = Strip(strip.y, strip.y, strip.scale, strip.col_factor, strip.col_factor, None, own.flip(0))
    grid = list(slices(len(own), side))
    return whole._replace(mask=StripMask(skip=own)), [[Tile(a, b) for b in grid[i:]] for i, a in enumerate(grid)]


def _of_chunk(strip: Strip, tiles: list[Tile]) -> Strip:
    rows = tiles[0].rows
    factor = None if strip.row_factor is None else strip.row_factor[rows]
    mask = None if strip.mask is None else strip.mask.rows(rows)
    target = None if strip.target is None else strip.target[rows]
    return strip._replace(x=strip.x[rows], row_factor=factor, target=target, mask=mask)


def _of_tile(strip: Strip, tile: Tile) -> Strip:
    return _of_chunk(strip, [tile]).columns(tile.columns)


def _both_places(tiles: list[list[Tile]], found: list[Tensor], count: int) -> Tensor:
    """The whole matrix of what is found in its tiles."""
    whole = found[0].new_full((count, count), math.nan)
    for tile, values in zip((t for row in tiles for t in row), found, strict=True):
        whole[tile.columns, tile.rows], whole[tile.rows, tile.columns] = values.T, values
    return whole


def check_half(backend: Any, strip: Strip) -> None:
    """With a shift known to be safe and without, and with the gradient by the scale."""
    strip, tiles = of_itself(strip)
    sims, z = formula(strip)
    for bound, with_q in ((SCALE, False), (50.0, False), (None, False), (None, True)):
        problem = problem_of(strip, bound)
        sums = backend.half_start(problem)
        for row in tiles:
            backend.half_stats(problem, _of_chunk(strip, row), row, sums)
        assert_lse(RowSums(sums.shift.double() * math.log(2), sums.total), z)
        shift = torch.where(sums.shift == -torch.inf, 0, sums.shift)
        softmax = direction(z, with_q, wild=False)
        entry = torch.rand(len(z), device=z.device) / 4
        entry = entry + entry.flip(0)
        weight = softmax.weight / torch.exp2(shift - softmax.shift / math.log(2))
        q = torch.zeros_like(weight, dtype=torch.float64) if with_q else None
        given = Softmax(shift, weight, softmax.target_sim)
        found = []
        for row in tiles:
            found += [v.clone() for v in backend.half_grad(problem, _of_chunk(strip, row), row, given, entry, q)]
        dz, terms = grad_formula(z, sims, Softmax(shift.double() * math.log(2), weight.double(), softmax.target_sim))
        size = factored(with_entry(dz.abs() + dz.T.abs(), entry, strip), strip).abs()
        wanted = factored(with_entry(dz + dz.T, entry, strip), strip)
        assert_near(_both_places(tiles, found, len(z)), wanted, magnitude=size)
        if q is not None:
            assert_near(q.sum(), terms.sum(), magnitude=terms.abs().sum() + weight.abs().sum())


def check_half_tally(backend: Any, strip: Strip) -> None:
    strip, tiles = of_itself(strip)
    z = formula(strip)[1]
    score = z.masked_fill(z == -torch.inf, 0).mean(1).float() + 1e-3
    tally, problem = Tally.empty(len(z), strip.scale), problem_of(strip)
    for row in tiles:
        backend.half_stats(problem, _of_chunk(strip, row), row, backend.half_start(problem), tally, score)
    assert torch.equal(tally.admitted, (z > -torch.inf).sum(1).float())
    assert torch.equal(tally.above, (z > score[:, None]).sum(1).float())
    assert_near(tally.maximum, z.amax(1), magnitude=1.0)


HALF_SIDES: dict[str, tuple[float, ...]] = {
    "multi_similarity": (2.0, 9.0, 0.5),
    "circle": (0.4, 8.0),
    "sup_con_in": (),
}


def check_half_sides(backend: Any, strip: Strip) -> None:
    """Each fold's log-sum-exps, and their gradient by what each would have."""
    strip, tiles = of_itself(strip._replace(scale=torch.ones_like(strip.scale)))
    strip = strip._replace(target=None, mask=None)
    values, _ = formula(strip)
    labels = torch.arange(len(values), device=values.device) // 5
    for name, options in HALF_SIDES.items():
        fold = Fold(name, options, labels=(labels, labels), itself=True)
        problem = problem_of(strip, None, fold)
        part, sums = fold_part(problem, slice(0, len(values))), backend.half_sides_start(problem)
        for row in tiles:
            backend.half_sides(problem, _of_chunk(strip, row), row, part, sums)
        same = (labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        others = labels[:, None] != labels
        wanted, sides = torch.zeros_like(values), []
        for members, pulls, (shift, total) in zip((same, others), (True, False), sums, strict=True):
            u = torch.empty_like(values)
            slope = SIDED[name].logits(values, (strip.scale.double(),), options, pulls, u)
            u = u.masked_fill(~members, -torch.inf)
            assert_lse(RowSums(shift, total), u)
            shift = torch.where(shift == -torch.inf, 0, shift)
            weight = torch.rand(len(u), device=u.device) / total.masked_fill(total == 0, 1)
            sides.append(Softmax(shift, weight, None))
            dz = torch.exp(u - shift.double()[:, None]) * weight.double()[:, None] * slope
            wanted += dz + dz.T
        q = torch.zeros_like(wanted[0])
        found = []
        for row in tiles:
            given = _of_chunk(strip, row)
            found += [v.clone() for v in backend.half_sides_grad(problem, given, row, part, sides, q)]
        terms = wanted * values / 2
        assert_near(_both_places(tiles, found, len(values)), factored(wanted, strip), magnitude=_size(wanted, strip))
        assert_near(q.sum(), terms.sum(), magnitude=terms.abs().sum())


def check_half_fold(backend: Any, strip: Strip, side: int = 16) -> None:
    """Losses, counts and gradient of each fold that takes half, by chunks and the rows behind them."""
    strip, _ = of_itself(strip._replace(scale=torch.ones_like(strip.scale)))
    strip = strip._replace(target=None, mask=None)
    values, count = formula(strip)[0], len(strip.y)
    labels = torch.arange(count, device=values.device) // 5
    grid = list(slices(count, side))
    tiles = [Tile(a, b) for a in grid for b in (a, slice(a.stop, count)) if b.stop > b.start]
    hinge = (between(values, -0.1), 1.0, 0.0)
    for name, options in {**HALF_SIDES, "pair_hinge": hinge}.items():
        problem = problem_of(strip, None, Fold(name, options, labels=(labels, labels), itself=True))
        weight = torch.rand(count, device=values.device) + 0.1
        weight[1::3] = 0
        part = fold_part(problem, slice(0, count))._replace(weight=weight)
        slope, wide = values.clone(), part._replace(weight=weight.double())
        wanted = FOLDS[name].torch(slope, wide, (strip.scale.double(),), options, True)
        both, half = slope + slope.T, backend.half_fold(problem, part)
        found, q = torch.full_like(both, math.nan), 0.0
        for tile in tiles if half.sums_first else ():
            half.add(_of_tile(strip, tile), tile)
        folded = half.settle()
        for tile in tiles:
            shape = tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start
            out, buffer = fenced(*shape, strip.x.dtype, values.device, True, backend is triton)
            terms = half.write(_of_tile(strip, tile), out, tile)
            found[tile.columns, tile.rows], found[tile.rows, tile.columns] = out.double().T, out.double()
            assert_fenced(out, buffer)
            q += 0.0 if terms is None else terms.double().sum() / (2 if tile.rows == tile.columns else 1)
        folded = folded if half.sums_first else half.settle()
        assert_near(folded.loss, wanted.loss, magnitude=wide.weight)
        assert (folded.count is None) == (wanted.count is None)
        assert folded.count is None or torch.equal(folded.count.double(), wanted.count)
        value = factored(both, strip)
        once = torch.finfo(strip.x.dtype).eps * value.abs()  # is rounded to the buffer's dtype
        assert_near(found + (value - found).clamp(-once, once), value, magnitude=_size(both, strip))
        for total in wanted.scalars:
            assert_near(q, total, magnitude=(slope * values).abs().sum())


def between(values: Tensor, near: float) -> float:
    """In the widest gap of the values near a number: whether a hinge is open must not hang on a product's last bits."""
    close = values[(values - near).abs() < 0.1].sort().values
    if len(close) < 2:
        return near
    first = close.diff().argmax()
    return float((close[first] + close[first + 1]) / 2)


def check_half_tops(backend: Any, strip: Strip, side: int = 16) -> None:
    """Two of a label and many; with a bias by column, which the other half has by row."""
    strip, tiles = of_itself(strip, side)
    own = torch.arange(len(strip.y), device=strip.y.device)
    for labels, bias in ((own // 2, None), (own % 3, torch.rand(len(own), device=own.device)), (own * 0, None)):
        given = strip._replace(target=None, bias=bias, mask=StripMask((Compare(labels, labels, False),)))
        z = formula(given._replace(mask=None))[1]
        problem, found = problem_of(given), [Extremes.empty(len(z), strip.scale) for _ in range(2)]
        for row in tiles:
            backend.half_tops(problem, _of_chunk(given, row), row, *found)
        same = labels[:, None] == labels
        wanted = [z.masked_fill(same, -torch.inf), (-z).masked_fill(~same | (own[:, None] == own), -torch.inf)]
        for (value, column), values in zip(found, wanted, strict=True):
            none = values.amax(1) == -torch.inf
            assert torch.equal(column == -1, none) and torch.equal(value == -torch.inf, none)
            chosen_values = values.gather(1, column.clamp_min(0)[:, None])[:, 0]
            for one in (value, chosen_values):
                assert_near(one[~none], values.amax(1)[~none], magnitude=1.0)


def _size(values: Tensor, strip: Strip) -> Tensor:
    """Of a row's entries the largest: positives' and negatives' parts may cancel."""
    return factored(values.abs().amax().expand_as(values), strip)


# Without a softmax ----------------------------------------------------------------------------------------------------


def check_similarities(backend: Any, strip: Strip) -> None:
    """In fp32 whatever the operands are, with factors and nothing else."""
    out, buffer = fenced(len(strip.x), len(strip.y), torch.float32, strip.x.device, padded=backend is triton)
    backend.similarities(strip, out)
    size = strip.x.double().abs() @ strip.y.double().abs().T
    room = factored(size, strip) * (strip.x.shape[1] + 8) * 2**-24
    assert ((out.double() - formula(strip)[0]).abs() <= room).all()
    assert_fenced(out, buffer)


def check_guide(backend: Any, strip: Strip) -> None:
    """What it drops of its own columns, seen in sums over the others; its threshold, and that a target stays."""
    strip = strip._replace(bias=None, mask=None, own=None, own_scale=None, softcap=0.0)
    M, N = len(strip.x), len(strip.y)
    strip = strip._replace(target=strip.target.clamp(0, N - 1))
    room = torch.empty(backend.guide_room(strip), device=strip.x.device)
    sim, z = formula(strip)
    own = sim.gather(1, strip.target[:, None])[:, 0]
    assert_near(backend.guide_scores(strip, room), own, magnitude=strip.x.double().norm(dim=1) * sim.abs().amax(1))
    margin = 0.05
    threshold = with_threshold(strip, StripMask()).threshold
    (found,) = backend.guide_rows([strip], GuideRule(margin), room, own=threshold + margin)
    kept = z.masked_fill(sim > threshold.double()[:, None], -torch.inf)
    assert_lse(backend.stats_rows([strip._replace(mask=StripMask(dropped=found))]), kept)
    (found,) = backend.guide_rows([strip], GuideRule(), room)
    sums = backend.stats_rows([strip._replace(target=None, mask=StripMask(dropped=found))])
    assert (lse(sums) >= own * SCALE - 1e-4).all()  # the target's own is among them
    assert M == sums.total.shape[-1]


def check_admitted(backend: Any, strip: Strip) -> None:
    """Of a tile of columns, for masks that see no similarities."""
    mask, N = strip.mask, len(strip.y)
    tile = slice(N // 3, N)
    assert torch.equal(backend.admitted(mask, tile), ~dropped(mask, formula(strip)[0])[:, tile])


# Once per row ---------------------------------------------------------------------------------------------------------


def check_rows(backend: Any, strip: Strip) -> None:
    """A cosine row, from its norm to its loss and to a gradient that is projected."""
    x, y = (backend.operand(t) for t in (strip.x, strip.y))
    assert torch.equal(x, strip.x) and torch.equal(y, strip.y)
    (M, N), device = (len(x), len(y)), x.device
    target, bias = torch.randint(N, (M,), device=device), torch.randn(N, device=device)
    prepared = backend.prepare(x, y, target, strip.scale, bias, cosine=True, wants_target_sim=True)
    wide = strip._replace(
        row_factor=1 / x.double().norm(dim=1), col_factor=1 / y.double().norm(dim=1), bias=bias, target=None
    )
    sim, whole = formula(wide)
    at_target = lambda t: t.gather(1, target[:, None])[:, 0]
    for found, wanted in (
        (prepared.row_factor, wide.row_factor),
        (prepared.col_factor, wide.col_factor),
        (backend.inverse_norms(y), wide.col_factor),
        (prepared.score, at_target(whole)),
        (prepared.target_sim, at_target(sim)),
    ):
        assert_near(found, wanted, magnitude=1.0)
    own = strip._replace(row_factor=prepared.row_factor, col_factor=prepared.col_factor, bias=bias, target=target)
    halves = [part for part in (slice(0, N // 2), slice(N // 2, N)) if part.stop > part.start]
    sums = RowSums.empty(M, strip.scale)
    for part in halves:
        half = own._replace(y=y[part], col_factor=own.col_factor[part], bias=bias[part], target=target - part.start)
        sums = backend.merge(sums, backend.stats_rows([half]))
    z = formula(own._replace(row_factor=wide.row_factor, col_factor=wide.col_factor))[1]
    negatives = z.logsumexp(1)
    assert_near(lse(sums), negatives, magnitude=1.0)
    weight = torch.rand(M, device=device) + 0.1
    weight[1::3] = 0
    settled = backend.settle(sums, prepared.score, weight)
    loss = torch.logaddexp(negatives, at_target(whole)) - at_target(whole)
    assert_near(settled.loss, weight * loss, magnitude=weight.double())
    total = torch.logaddexp(negatives, at_target(whole))
    assert_near(settled.entry, -weight * torch.exp(negatives - total), magnitude=weight.double())
    assert_near(settled.weight.double() * torch.exp(total - settled.shift), weight.double(), magnitude=1.0)
    gradient, out = torch.randn(x.shape, device=device), torch.empty(x.shape, device=device)
    scaled = strip.scale.double() * weight.double()[:, None] * gradient.double()
    unit = x.double() * wide.row_factor[:, None]
    wanted = scaled - (scaled * unit).sum(1, keepdim=True) * unit
    backend.finish(gradient, weight, strip.scale, None, x, prepared.row_factor, out)
    assert_near(out, wanted, magnitude=scaled.abs().sum(1, keepdim=True))


# Prefixes -------------------------------------------------------------------------------------------------------------


class OfPrefix:
    """A backend whose functions of rows are those of one of several prefixes that share a product."""

    def __init__(self, backend: Any, by_prefix: list[list[Strip]], number: int):
        self.backend, self.by_prefix, self.number = backend, by_prefix, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def _among(self, own: Any, others: list[Any]) -> list[Any]:
        return [own if number == self.number else other for number, other in enumerate(others)]

    def _outs(self, outs: list[Tensor]) -> list[list[Tensor]]:
        """Of the other prefixes', which lie alike."""
        alike = lambda out: out.new_empty(len(out), out.stride(0))[:, : out.shape[1]]
        return self._among(outs, [[alike(out) for out in outs] for _ in self.by_prefix])

    def stats_rows(self, strips: list[Strip]) -> RowSums:
        return self.backend.stats_prefixes(self._among(strips, self.by_prefix))[self.number]

    def exp_rows(self, problem: Problem, strips: list[Strip], outs: list[Tensor], target_sim: None) -> Any:
        every = self._among(strips, self.by_prefix)
        return self.backend.exp_prefixes(problem, every, self._outs(outs))[self.number], target_sim

    def grad_rows(
        self,
        strips: list[Strip],
        outs: list[Tensor],
        rows: Softmax,
        columns: None,
        entry: Tensor,
        gain: Tensor | None,
        smooth: None,
    ) -> Tensor | None:
        every, count = self._among(strips, self.by_prefix), len(self.by_prefix)
        alike = lambda x: None if x is None else torch.ones_like(x)
        others = self._among(rows, [rows.map(torch.ones_like)] * count)
        entries = self._among(entry, [torch.ones_like(entry)] * count)
        gains = self._among(gain, [alike(gain)] * count)
        return self.backend.grad_prefixes(every, self._outs(outs), others, entries, gains)[self.number]


def check_together(backend: Any, strips: list[Strip]) -> None:
    """Every prefix of the strips, with factors of its own, as if it were swept alone."""
    D = strips[0].x.shape[1]
    by_prefix = [[_cut(strip, end) for strip in strips] for end in (*range(16, D, 16), D)]
    for number, own in enumerate(by_prefix):
        one = OfPrefix(backend, by_prefix, number)
        check_stats(one, own)
        if own[0].x.dtype != torch.float16:
            check_exp(one, own)
        for with_q in (True, False):
            check_grad(one, own, with_q=with_q)


def _cut(strip: Strip, end: int) -> Strip:
    factors = [None if f is None else f * (1 + torch.rand_like(f)) for f in (strip.row_factor, strip.col_factor)]
    return strip._replace(x=strip.x[:, :end], y=strip.y[:, :end], row_factor=factors[0], col_factor=factors[1])
