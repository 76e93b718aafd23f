"""The cases of the sweep's families: problems, swept by a backend and differentiated as a formula."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import sweep
from ..backends import SWEEPS, reference
from ..backends.dense import run as run_whole
from ..core.mask import Compare, Guide, GuideRule, Mask
from ..core.numerics import cdiv
from ..core.problem import Block, Fold, Margin, Problem, Targets
from ..core.rows import without_target
from ..sweep import Partial, Wants
from .draws import Draw, Outputs, Run

Make = Callable[[Draw], Run]
Masking = Callable[[Draw, int, int], Mask]  # rows and columns of the first block


def softmax(
    draw: Draw,
    rows: int,
    columns: int,
    dim: int,
    *,
    kind: str = "random",
    layout: str = "rows",
    keys: str = "",
    scale: float = 20.0,
    cosine: bool = False,
    learns: bool = False,
    backward: bool = True,
    symmetric: bool = False,
    bias: bool = False,
    weighted: bool = True,
    blocks: int = 1,
    mask: Masking | None = None,
    penalty: tuple[float, float] = (0.0, 0.0),
    guide: tuple[float, bool] | None = None,
    several: str = "",
    spoilt: bool = False,
    chunk: int | None = None,
    more: dict[str, Any] | None = None,
) -> Run:
    """A softmax over one or two blocks of columns.

    keys: the keys' layout, if it differs. learns: the scale is a tensor with a gradient, else a number. chunk: rows of
    a chunk. spoilt: a NaN in a row of the queries; only their gradient is wanted. several: targets a row, in this
    form: three, or two. more: fields of Problem.
    """
    M, N, dim = draw.size(rows), draw.size(columns), draw.length(dim)
    x, y = draw.pair(kind, M, N, dim)
    if spoilt:
        x[M // 2, dim // 2] = torch.nan
    exact = kind == "lattice"
    operands = [draw.matrix(x, layout, exact=exact), draw.matrix(y, keys or layout, exact=exact)]
    if blocks > 1:
        operands.append(draw.matrix(draw.pair(kind, N, M, dim)[0].flip(0), layout, exact=exact))
    own = symmetric or kind == "pairs" or any(penalty)
    target = (torch.arange(M) if own else 5 * torch.arange(M) + 3) % N
    weight = draw.normal(M).abs() + 0.1 if weighted else torch.ones(M)
    if weighted and not symmetric:
        weight[1 :: max(2, M // 3)] = 0  # the first row counts: there may be only one
    biases: list[Tensor | None] = [None] * blocks
    if bias:
        for number, count in enumerate((N, *(len(y) for y in operands[2:]))):
            values = draw.normal(count)
            values[torch.rand(count, generator=draw.generator) < 0.3] = -torch.inf
            biases[number] = values
    first = Mask() if mask is None else mask(draw, M, N)
    if guide is not None:
        first = first._replace(guide=_guide(draw, M, N))
    made = [Block(0, 1, _maybe(draw, biases[0]), first, penalty[0])]  # except the target
    for number in range(1, blocks):
        other = Mask() if guide is None else Mask(guide=_guide(draw, M, len(operands[1 + number])))
        made.append(Block(0, 1 + number, _maybe(draw, biases[number]), other, *penalty))
    weight = without_target(weight, target, biases[0], None if first.skip is None else first.skip.cpu())
    problem = Problem(
        tuple(operands),
        tuple(made),
        draw.number(scale),
        draw.fixed(target),
        draw.vector(weight),
        cosine,
        symmetric=symmetric,
        scale_bound=None if learns or bias else scale,
        guide_rule=GuideRule() if guide is None else GuideRule(*guide),
    )
    problem = replace(problem, **(more or {}))
    if several:
        places = (target[:, None] + torch.tensor([0, 1, N // 2])) % N
        places[::3, 1] = -1
        problem = replace(problem, targets=Targets(draw.fixed(places), several))
    if chunk is not None:
        problem = replace(problem, workspace_bytes=_budget(problem, draw, chunk))
    wants = Wants(
        tuple(backward and not (spoilt and number) for number in range(len(operands))),
        backward and learns and not problem.softcap,
        tuple(backward and bias for _ in made),
    )
    return _run(problem, wants, draw.lost(dim))


def itself(draw: Draw, rows: int, dim: int, *, learns: bool = False, chunk: int | None = None) -> Run:
    """One matrix of unit rows against itself, as pairs of views: half of the similarities, where chunks allow it."""
    M, dim = draw.size(rows) // 2 * 2, draw.length(dim)
    own, scale = torch.arange(M), 20.0
    problem = Problem(
        (draw.matrix(draw.pair("clustered", M, M, dim)[0]),),
        (Block(0, 0, mask=Mask(skip=draw.fixed(own))),),
        draw.number(scale),
        draw.fixed(own.roll(M // 2)),
        draw.vector(draw.normal(M).abs() + 0.1),
        cosine=True,
        scale_bound=None if learns else scale,
        mirrored=True,
    )
    if chunk is not None:
        problem = replace(problem, workspace_bytes=_budget(problem, draw, chunk))
    return _run(problem, Wants((True,), learns, (False,)), draw.lost(dim))


def fold(
    draw: Draw,
    rows: int,
    columns: int,
    dim: int,
    name: str,
    *,
    options: tuple[float, ...] = (),
    kind: str = "random",
    layout: str = "rows",
    cosine: bool = False,
    scale: float | None = None,
    scalars: tuple[float, ...] = (),
    labels: bool = False,
    same: bool = False,
    distance: str = "",
    teacher: bool = False,
    backward: bool = True,
    spoilt: bool = False,
    chunk: int | None = None,
    learns: bool = True,
    mask: Masking | None = None,
) -> Run:
    """A fold. same: one matrix on both sides; scale: of folds that have one, with a gradient if `learns`. mask: of
    folds with a teacher."""
    M, N, dim = draw.size(rows), draw.size(columns), draw.length(dim)
    x, y = draw.pair(kind, M, N, dim)
    if spoilt:
        x[M // 2, dim // 2] = torch.nan
    operands = [draw.matrix(t, layout, exact=kind == "lattice") for t in ((x,) if same else (x, y))]
    if same:
        N = M
    # Only the last row or column has the last label.
    ids = [torch.where(torch.arange(count) == count - 1, 6, draw.below(6, count)) for count in (M, N)]
    own = draw.fixed(ids[0])
    given = (own, own if same else draw.fixed(ids[1])) if labels else None
    weight = draw.normal(M).abs() + 0.1
    weight[1 :: max(2, M // 3)] = 0  # the first row counts: there may be only one
    made = Fold(
        name,
        options,
        given,
        same,
        distance,
        tuple(draw.number(value) for value in scalars),
        (Guide(*(draw.matrix(t[:, : dim // 2]) for t in draw.pair("random", M, N, dim))),) if teacher else (),
        draw.number(9.0) if teacher else None,
    )
    target = torch.full((M,), -1) if labels else (5 * torch.arange(M) + 3) % N
    problem = Problem(
        tuple(operands),
        (Block(0, len(operands) - 1, mask=Mask() if mask is None else mask(draw, M, N)),),
        draw.number(1.0 if scale is None else scale),
        draw.fixed(target),
        draw.vector(weight),
        cosine,
        fold=made,
        mirrored=same and labels,
    )
    if chunk is not None:
        problem = replace(problem, workspace_bytes=_budget(problem, draw, chunk))
    learnt = backward and learns and not spoilt
    wanted = tuple(backward and not (spoilt and number) for number in range(len(operands)))
    wants = Wants(wanted, learnt and scale is not None, (False,), tuple(learnt and name == "sigmoid" for _ in scalars))
    return _run(problem, wants, draw.lost(dim))


def top(draw: Draw, rows: int, columns: int, dim: int, *, mask: Masking | None = None, layout: str = "rows") -> Run:
    """Each row's largest logit and its column, exact on the lattice: the first of those that tie.

    The first rows' are the last columns.
    """
    M, N = draw.size(rows), draw.size(columns)
    _, y = draw.pair("lattice", M, N, dim)
    x = y.flip(0)[torch.arange(M) % N]
    operands = tuple(draw.matrix(t, layout, exact=True) for t in (x, y))
    problem = Problem(
        operands,
        (Block(0, 1, mask=Mask() if mask is None else mask(draw, M, N)),),
        draw.number(4.0),
        draw.fixed(torch.full((M,), -1)),
        draw.vector(torch.ones(M)),
        top=True,
    )

    def run(backend: str) -> Outputs:
        if backend in ("reference", "dense"):
            largest, column = reference.top_rows(problem)
        else:
            largest, column = sweep.top_rows(problem, SWEEPS[backend])
        return {"largest": largest, "column": column}

    return run


def opposed(draw: Draw, rows: int, dim: int) -> Run:
    """Each row's nearest of another label and its farthest of its own, exact on the lattice: the first of those that
    tie."""
    M, dim = draw.size(rows), draw.length(dim)
    x = draw.matrix(draw.pair("lattice", M, M, dim)[1], exact=True)
    labels, bias = draw.fixed(draw.below(5, M)), draw.vector(draw.below(3, M).double())
    others, own = (Compare(labels, labels, keep) for keep in (False, True))
    problem = Problem(
        (x,),
        (Block(0, 0, bias, Mask((others,))),),
        draw.number(2.0),
        draw.fixed(torch.full((M,), -1)),
        draw.vector(torch.ones(M)),
        top=True,
    )
    same = replace(
        problem,
        blocks=(Block(0, 0, draw.vector(-bias.cpu()), Mask((own,), skip=draw.fixed(torch.arange(M)))),),
        scale=draw.number(-2.0),
    )

    def run(backend: str) -> Outputs:
        if backend in ("reference", "dense"):
            found = reference.opposed_rows(problem)
        else:
            kernels = SWEEPS[backend]
            halves = sweep.opposed_rows(problem, kernels)
            found = halves or (sweep.top_rows(problem, kernels)[1], sweep.top_rows(same, kernels)[1])
        return dict(zip(("nearest", "farthest"), found, strict=True))

    return run


def partial(draw: Draw, rows: int, columns: int, dim: int, *, symmetric: bool) -> Run:
    """Sums over some of the columns, merged like those of other ranks: the log-sum-exps of rows and of columns."""
    M, N = draw.size(rows), draw.size(columns)
    operands = tuple(draw.matrix(t) for t in draw.pair("clustered", M, N, dim))
    target, weight = torch.full((M,), -1), torch.ones(M)
    problem = Problem(
        operands, (Block(0, 1),), draw.number(30.0), draw.fixed(target), draw.vector(weight), symmetric=symmetric
    )

    def run(backend: str) -> Outputs:
        if backend == "reference":
            z = operands[0].to(problem.scale.dtype) @ operands[1].to(problem.scale.dtype).T * problem.scale
            z = (1 - draw.lost(dim)) * z
            found = [z.logsumexp(1), z.logsumexp(0)]
        else:
            nothing = Wants((False, False), False, (False,))
            with torch.no_grad():
                sums = Partial(problem, SWEEPS[backend], nothing).sums()
            found = [side.shift + side.total.log() for side in sums if side is not None]
        names = ("rows' log-sum-exp", "columns' log-sum-exp")
        return dict(zip(names[: 1 + symmetric], found, strict=False))

    return run


# Both ways to the same outputs ----------------------------------------------------------------------------------------


def _run(problem: Problem, wants: Wants, lost: float) -> Run:
    def run(backend: str) -> Outputs:
        if backend == "reference":
            return _by_formula(problem, wants, lost)
        if backend == "dense":
            with torch.no_grad():
                found = run_whole(problem, wants)
        else:
            found = sweep.run(problem, SWEEPS[backend], wants)
        named: dict[str, Tensor | None] = {"losses": found.rows}
        named |= {f"gradient of operand {number}": g for number, g in enumerate(found.operands)}
        named |= {f"gradient of bias {number}": g for number, g in enumerate(found.biases)}
        named |= {"scale's gradient": found.scale}
        named |= {f"scalar {number}'s gradient": g for number, g in enumerate(found.scalars)}
        named |= {f"counted {number}": g for number, g in enumerate(_of_rows_left_in(problem, found.counted))}
        return {name: x for name, x in named.items() if x is not None}

    return run


def _by_formula(problem: Problem, wants: Wants, lost: float) -> Outputs:
    """In fp64 a scale and a scalar have a value for each pair, so that the terms of their gradients are seen."""
    wide = problem.scale.dtype == torch.float64
    pairs = (problem.rows, problem.columns)

    def number(x: Tensor, wanted: bool) -> Tensor:
        return x.expand(pairs if wide and wanted else x.shape).detach().clone().requires_grad_(wanted)

    operands = tuple(x.detach().requires_grad_(w) for x, w in zip(problem.operands, wants.operands, strict=True))
    scale = number(problem.scale, wants.scale)
    biases = [
        None if block.bias is None else block.bias.detach().clone().requires_grad_(wanted)
        for block, wanted in zip(problem.blocks, wants.biases, strict=True)
    ]
    blocks = tuple(replace(block, bias=bias) for block, bias in zip(problem.blocks, biases, strict=True))
    fold = problem.fold
    if fold is not None:
        scalars = tuple(number(x, w) for x, w in zip(fold.scalars, wants.scalars, strict=True))
        fold = replace(fold, scalars=scalars)
    leaves = {f"gradient of operand {i}": x for i, x in enumerate(operands)}
    leaves |= {f"gradient of bias {i}": x for i, x in enumerate(biases) if x is not None}
    leaves |= {"scale's gradient": scale}
    leaves |= {f"scalar {i}'s gradient": x for i, x in enumerate(fold.scalars if fold else ())}
    leaves = {name: x for name, x in leaves.items() if x.requires_grad}
    learning = replace(problem, operands=operands, blocks=blocks, scale=scale, fold=fold)
    rows, counted = reference.loss_rows(learning, lost)
    found = {"losses": rows.detach()}
    if leaves:
        found |= dict(zip(leaves, torch.autograd.grad(rows.sum(), list(leaves.values())), strict=True))
    for name in [name for name, x in leaves.items() if x.dim() == 2 and name.endswith("'s gradient")]:
        found[f"{name}: terms"], found[name] = found[name], found[name].sum()
    found["bound"] = _largest(problem)
    return found | {f"counted {number}": x for number, x in enumerate(_of_rows_left_in(problem, counted))}


def _of_rows_left_in(problem: Problem, counted: list[Tensor]) -> list[Tensor]:
    """Keeps the counts of rows that are not left out; others are undefined."""
    return [x.masked_fill(problem.weight == 0, 0) for x in counted]


def _largest(problem: Problem) -> Tensor:
    """Returns an upper bound of the logits: their rounding is a share of it."""
    lengths = [x.double().norm(dim=1).nan_to_num(0).amax() for x in problem.operands]
    bound = torch.ones_like(lengths[0]) if problem.cosine else lengths[0] * torch.stack(lengths[1:] or lengths).amax()
    largest = bound * problem.scale.double().abs()
    for block in problem.blocks:
        if block.bias is not None:
            largest = largest + block.bias.double().masked_fill(block.bias == -torch.inf, 0).abs().amax()
    return largest * (1 + sum(abs(option) for option in (problem.fold.options if problem.fold else ())))


def _budget(problem: Problem, draw: Draw, rows: int) -> int:
    """Returns the workspace_bytes for this many rows of a chunk."""
    count = draw.size(rows)
    return count * sum(cdiv(problem.operands[block.key].shape[0], 16) * 16 for block in problem.blocks) * 4


def _maybe(draw: Draw, x: Tensor | None) -> Tensor | None:
    return None if x is None else draw.vector(x)


# Masks ----------------------------------------------------------------------------------------------------------------


def _guide(draw: Draw, M: int, N: int) -> Guide:
    """Cosines of 0, 0.2, 0.8 and 1: none is within rounding of another minus the margin 0.1."""

    def embeddings(count: int, first: int) -> Tensor:
        place = torch.arange(count)
        x = torch.zeros(count, 19, dtype=torch.float64)
        x[place, (place * first) % 5], x[place, 5 + place % 14] = 2, 1
        return 4 * x

    query, key = embeddings(M, 1), embeddings(N, 3)
    return Guide(draw.matrix(query, exact=True), draw.matrix(key, "anywhere", exact=True))


def drops(draw: Draw, M: int, N: int) -> Mask:
    return Mask(compare=(_compare(draw, M, N, 7, False),))


def keeps(draw: Draw, M: int, N: int) -> Mask:
    """Also labels that agree only in 32 bits."""
    compare = _compare(draw, M, N, 3, True)
    keys = compare.keys + (compare.keys == 2) * 2**32
    return Mask(compare=(compare._replace(keys=draw.fixed(keys)),))


def dense(draw: Draw, M: int, N: int) -> Mask:
    """Has a row in which no column may compete, and one in which all may; by columns."""
    admitted = torch.rand(N, M, generator=draw.generator) < 0.6
    admitted[:, M // 2], admitted[:, 0] = False, True
    return Mask(dense=draw.fixed(admitted).T)


def nothing(draw: Draw, M: int, N: int) -> Mask:
    """Nothing may compete, except targets. One row of bits for all rows."""
    return Mask(dense=draw.fixed(torch.zeros(1, N, dtype=torch.bool)).expand(M, N))


def margin(draw: Draw, M: int, N: int) -> Mask:
    """A margin between two products of the lattice."""
    exempt = torch.stack([(torch.arange(M) + 1) % N, torch.where(torch.arange(M) % 2 == 0, -1, N - 1)], 1)
    return Mask(margin=0.53125, exempt=draw.fixed(exempt))


def skips(draw: Draw, M: int, N: int) -> Mask:
    place = torch.arange(M)
    return Mask(skip=draw.fixed(torch.where(place % 3 == 0, -1, (place + 1) % N)))


def everything(draw: Draw, M: int, N: int) -> Mask:
    compare = tuple(_compare(draw, M, N, 7, False) for _ in range(2)) + keeps(draw, M, N).compare
    bits, skip = dense(draw, M, N).dense, skips(draw, M, N).skip
    return margin(draw, M, N)._replace(compare=compare, dense=bits, skip=skip)


def _compare(draw: Draw, M: int, N: int, ids: int, keep: bool) -> Compare:
    return Compare(draw.fixed(draw.below(ids, M)), draw.fixed(draw.below(ids, N)), keep)


# The table ------------------------------------------------------------------------------------------------------------

RAGGED, ONE_ROW, ITSELF = (257, 391, 96), (1, 70, 3), (400, 400, 96)


def _case(function: Callable[..., Run], *shape: Any, **options: Any) -> Make:
    return functools.partial(_made, function, shape, options)


def _made(function: Callable[..., Run], shape: tuple[Any, ...], options: dict[str, Any], draw: Draw) -> Run:
    return function(draw, *shape, **options)


def _wave(draw: Draw, dim: int, *, whole: bool = False, **options: Any) -> Run:
    """whole: of whole tiles, as where sm_100 folds beside the next products."""
    size = draw.wave() // 128 * 128 if whole else draw.wave()
    return softmax(draw, size, size, dim, **options)


def _one_way(**options: Any) -> dict[str, Make]:
    """Cases that break tiles of any epilogue; with cosines if asked, because only they have a safe shift."""
    cosine = options.get("cosine", False)
    sharp, sharper = (59.0, -59.0) if cosine else (100.0, 1000.0)
    return {
        "ragged": _case(softmax, *RAGGED, **options),
        "one row": _case(softmax, *ONE_ROW, **options),
        "771 features, rows anywhere": _case(softmax, 65, 130, 771, layout="anywhere", **options),
        "by column": _case(softmax, 130, 200, 40, layout="columns", **options),
        "queries by column": _case(softmax, 70, 130, 33, layout="columns", keys="anywhere", **options),
        f"duplicates, scale {sharp:g}": _case(
            softmax, 66, 200, 64, **{**options, "kind": "duplicates", "scale": sharp}
        ),
        f"clusters, scale {sharper:g}": _case(
            softmax, 130, 130, 96, **{**options, "kind": "clustered", "scale": sharper}
        ),
        f"pairs, scale {sharp:g}": _case(softmax, 130, 130, 96, **{**options, "kind": "pairs", "scale": sharp}),
        "two blocks": _case(softmax, 67, 131, 24, blocks=2, **{**options, "learns": False}),
        "a row of NaN": _case(softmax, 70, 131, 40, spoilt=True, **{**options, "learns": False}),
        "more than a wave": _case(_wave, 40, **options),
        "more than a wave, whole tiles": _case(_wave, 328, whole=True, **options),
    }


def _both_ways(**options: Any) -> dict[str, Make]:
    options = {"symmetric": True, **options}
    cosine = options.get("cosine", False)
    return {
        "ragged": _case(softmax, 257, 257, 96, **options),
        "one row": _case(softmax, 1, 1, 3, **options),
        "771 features, rows anywhere": _case(softmax, 131, 131, 771, layout="anywhere", **options),
        "by column": _case(softmax, 130, 130, 40, layout="columns", **options),
        "pairs, sharp": _case(
            softmax, 129, 129, 96, **{**options, "kind": "pairs", "scale": 59.0 if cosine else 100.0}
        ),
        "duplicates": _case(softmax, 70, 70, 64, **{**options, "kind": "duplicates"}),
        "more than a wave": _case(_wave, 40, **options),
        "more than a wave, whole tiles": _case(_wave, 328, whole=True, **options),
    }


def _unsafe(**options: Any) -> dict[str, Make]:
    """Cases without a shift that is known to be safe."""
    return {
        "bias of -inf": _case(softmax, 130, 200, 48, bias=True, **options),
        "bias of -inf, two blocks": _case(softmax, 67, 131, 24, blocks=2, bias=True, **options),
        "rows of 1e4": _case(softmax, 70, 131, 96, kind="large", scale=2e-7, **options),
        "rows of 1e4, far apart in logits": _case(softmax, 70, 131, 96, kind="large", scale=1.0, **options),
        **_far(**options),
    }


def _far(**options: Any) -> dict[str, Make]:
    return {"rows beyond 2^31 elements": _case(softmax, 20, 40, 72, layout="far", **options)}


def _masked(**options: Any) -> dict[str, Make]:
    lattice = {"kind": "lattice", "scale": 1.0, "mask": margin, **options}
    return {
        "drops ids": _case(softmax, *RAGGED, mask=drops, **options),
        "keeps groups": _case(softmax, 70, 131, 40, mask=keeps, **options),
        "bits by column": _case(softmax, 130, 200, 40, mask=dense, **options),
        "nothing competes": _case(softmax, 33, 70, 24, mask=nothing, **options),
        "skips a column": _case(softmax, 70, 131, 40, mask=skips, **options),
        **({} if options.get("cosine") else {"score margin": _case(softmax, 70, 131, 40, **lattice)}),
        **(
            {}
            if options.get("cosine")
            else {"everything": _case(softmax, 130, 200, 40, **{**lattice, "mask": everything})}
        ),
    }


_DISTANT: dict[str, Any] = {"scale": 9.0, "teacher": True, "distance": "cosine"}  # which torch folds on every backend


def _prefixes(*dims: int) -> dict[str, Any]:
    return {"prefixes": dims, "prefix_weights": tuple(1.0 - 0.4 * place for place in range(len(dims)))}


def _together(**options: Any) -> dict[str, Make]:
    """Prefixes that share one product: they end at any multiple of 16, in any order, and some do not take part."""
    options = {"cosine": True, **options}
    return {
        "ragged": _case(softmax, *RAGGED, **options, more=_prefixes(96, 16, 64)),
        "one row": _case(softmax, 1, 70, 96, **options, more=_prefixes(32, 96)),
        "300 features, rows anywhere": _case(
            softmax, 65, 130, 300, layout="anywhere", **options, more=_prefixes(16, 300, 256, 100)
        ),
        "shorter than the rows": _case(softmax, 70, 131, 96, **options, more=_prefixes(48, 64)),
        "five, clusters": _case(
            softmax, 130, 130, 256, kind="clustered", scale=59.0, **options, more=_prefixes(256, 128, 64, 32, 16)
        ),
        "several chunks": _case(softmax, 300, 131, 64, chunk=480, **options, more=_prefixes(16, 32, 64)),
        "more than a wave": _case(_wave, 64, **options, more=_prefixes(16, 64)),
    }


CASES: dict[str, dict[str, Make]] = {
    "rows": {
        "cosine": _case(softmax, *RAGGED, cosine=True, learns=True),
        "cosine, one row": _case(softmax, *ONE_ROW, cosine=True, learns=True),
        "cosine, 4097 features": _case(softmax, 20, 45, 4097, cosine=True, layout="anywhere"),
        "cosine, by column": _case(softmax, 70, 131, 72, cosine=True, layout="columns", learns=True),
        "cosine, rows of 1e4": _case(softmax, 70, 131, 771, cosine=True, kind="large"),
        "cosine, short rows": _case(softmax, 70, 131, 40, cosine=True, kind="short"),
        "cosine, several chunks": _case(softmax, 130, 131, 40, cosine=True, chunk=30),
        "several chunks": _case(softmax, 130, 131, 40, chunk=30, learns=True),
        "one matrix on both sides": _case(softmax, 130, 130, 40, symmetric=True, cosine=True, learns=True, chunk=30),
        "decoupled": _case(softmax, 70, 131, 40, more={"decoupled": True}),
        "z loss": _case(softmax, 70, 131, 40, more={"z_loss": 0.1}),
        "smoothing": _case(softmax, 70, 131, 40, learns=True, more={"label_smoothing": 0.1}),
        "copies": _case(softmax, 70, 131, 40, blocks=2, more={"copies": 2}),
        "margins": _case(softmax, 70, 131, 40, cosine=True, kind="pairs", more={"margin": Margin(0.5, 0.1)}),
        "sums of a shard": _case(partial, 257, 391, 40, symmetric=False),
        "sums of a shard, columns too": _case(partial, 130, 391, 40, symmetric=True),
        **_far(),
    },
    "stats": _one_way(backward=False) | _unsafe(backward=False),
    "stats+columns": _both_ways(learns=True, backward=False),
    "exp": _one_way(cosine=True),
    "stored": _both_ways(cosine=True) | {"one matrix against itself": _case(itself, 130, 40)},
    "grad": _one_way(learns=True)
    | _unsafe()
    | {
        "without a gradient of the scale": _case(softmax, *RAGGED, scale=100.0),
        "4097 features": _case(softmax, 20, 45, 4097, learns=True),
    },
    "grad+columns": _both_ways(learns=True)
    | {
        "without a gradient of the scale": _case(softmax, 257, 257, 96, symmetric=True),
        "one matrix against itself, one chunk": _case(itself, 130, 40, learns=True),
        "one matrix against itself": _case(itself, 400, 96, chunk=128),
        "one matrix against itself, by the scale": _case(itself, 400, 96, learns=True, chunk=128),
    },
    "together": {
        **_together(learns=True),
        **{f"{name}, exp": make for name, make in _together().items()},
        "two blocks": _case(softmax, 67, 131, 96, cosine=True, blocks=2, more=_prefixes(96, 16, 48)),
        "forward": _case(softmax, 130, 200, 96, cosine=True, backward=False, more=_prefixes(96, 64)),
        "by column": _case(softmax, 70, 131, 96, cosine=True, layout="columns", more=_prefixes(96, 32)),
        "decoupled": _case(softmax, 70, 131, 64, cosine=True, more={**_prefixes(16, 64), "decoupled": True}),
    },
    "masks": {
        **_masked(learns=True),
        **{f"{name}, exp": make for name, make in _masked(cosine=True).items()},
        "both ways": _case(softmax, 131, 131, 40, symmetric=True, mask=dense, learns=True),
        "both ways, stored": _case(softmax, 131, 131, 40, symmetric=True, mask=drops, cosine=True),
        "hardness": _case(softmax, 60, 131, 40, blocks=2, penalty=(3.0, -2.0)),
        "several targets": _case(softmax, *RAGGED, several="each", learns=True),
        "several targets, exp": _case(softmax, *RAGGED, several="joint", blocks=2, cosine=True),
        "several targets, ids": _case(softmax, 70, 131, 40, several="each", mask=drops),
        "several chunks": _case(softmax, 130, 131, 40, kind="lattice", scale=1.0, mask=everything, chunk=30),
    },
    "softcap": {
        "stored exponentials": _case(softmax, *RAGGED, more={"softcap": 5.0}, scale=10.0),
        "gradients": _case(softmax, *RAGGED, more={"softcap": 80.0}, scale=100.0),
        "forward": _case(softmax, 130, 200, 40, more={"softcap": 5.0}, scale=10.0, backward=False),
        "bias of -inf, mask": _case(softmax, 70, 131, 40, more={"softcap": 3.0}, bias=True, mask=drops),
    },
    "tally": {
        "counts": _case(softmax, *RAGGED, kind="lattice", scale=0.5, backward=False, more={"wants_tally": True}),
        "counts, gradients": _case(softmax, 70, 131, 40, kind="lattice", scale=0.5, more={"wants_tally": True}),
        "counts, exp": _case(softmax, 70, 131, 40, cosine=True, more={"wants_tally": True}),
        "counts, both ways": _case(
            softmax, 131, 131, 40, kind="lattice", scale=0.5, symmetric=True, more={"wants_tally": True}
        ),
        "counts, masks": _case(
            softmax, 70, 131, 40, kind="lattice", scale=0.5, mask=everything, more={"wants_tally": True}
        ),
        "smoothing under a mask": _case(softmax, 130, 200, 40, mask=dense, learns=True, more={"label_smoothing": 0.1}),
        "smoothing under a softcap": _case(softmax, 70, 131, 40, more={"label_smoothing": 0.1, "softcap": 5.0}),
    },
    "top": {
        "ties": _case(top, *RAGGED),
        "one row": _case(top, *ONE_ROW),
        "771 features, rows anywhere": _case(top, 65, 130, 771, layout="anywhere"),
        "masks": _case(top, 130, 200, 40, mask=dense),
        "nothing competes": _case(top, 33, 70, 24, mask=nothing),
        "labels": _case(opposed, 130, 40),
    },
    "guide": {
        "absolute": _case(softmax, *RAGGED, guide=(0.1, False), learns=True),
        "relative": _case(softmax, 70, 131, 40, guide=(0.25, True)),
        "duplicates stay": _case(softmax, 130, 200, 40, guide=(0.0, False)),
        "two blocks, several chunks": _case(softmax, 130, 131, 24, blocks=2, guide=(0.1, False), chunk=30),
        "exp, under a mask": _case(softmax, 70, 131, 40, guide=(0.1, False), mask=drops, cosine=True),
        "one row": _case(softmax, *ONE_ROW, guide=(0.1, False)),
    },
    "similarities": {
        "distillation": _case(fold, *RAGGED, "distill", **_DISTANT),
        "one row": _case(fold, *ONE_ROW, "distill", **_DISTANT),
        "cosine, several chunks": _case(fold, 130, 131, 40, "distill", cosine=True, chunk=30, **_DISTANT),
        "771 features, rows anywhere": _case(fold, 65, 130, 771, "distill", layout="anywhere", **_DISTANT),
        "by column": _case(fold, 130, 200, 40, "sigmoid", scale=20.0, scalars=(-9.0,), layout="columns"),
        "itself": _case(fold, 131, 131, 40, "sup_con_in", scale=9.0, labels=True, same=True, cosine=True),
        "a row of NaN": _case(fold, 70, 131, 40, "sigmoid", scale=20.0, scalars=(-9.0,), spoilt=True),
    },
}

_TWO_SIDES = {"labels": True, "cosine": True}
_FOLDS: dict[str, dict[str, Any]] = {
    "sigmoid": {"scale": 20.0, "scalars": (-9.0,)},
    "margin_ranking": {"options": (0.53125, 1.0), "kind": "lattice"},
    "pair_hinge": {"options": (0.53125, 1.0, 0.0), "kind": "lattice", "labels": True},
    "multi_similarity": {"options": (2.0, 40.0, 0.5), **_TWO_SIDES},
    "proxy_anchor": {"options": (0.1, 32.0), "scalars": (1.5,), **_TWO_SIDES},
    "circle": {"options": (0.4, 80.0), **_TWO_SIDES},
    "sup_con_in": {"scale": 10.0, **_TWO_SIDES},
    **{name: {"scale": 20.0, "teacher": True, "cosine": True} for name in ("distill", "distill_ce", "distill_mse")},
}


def _of_fold(name: str, options: dict[str, Any]) -> dict[str, Make]:
    labelled = options.get("labels", False)
    # A BLAS may round the two places of a pair apart, by 1e-7 of gamma (1 + m)^2. Tensor cores have one order of sums.
    halved = {**options, "options": (0.4, 40.0)} if name == "circle" else options
    sharp = {**options, "kind": "pairs", "scale": 100.0} if "scale" in options else options
    return {
        "ragged": _case(fold, *RAGGED, name, **options),
        "one row": _case(fold, *ONE_ROW, name, **options),
        "771 features, rows anywhere": _case(fold, 65, 130, 771, name, layout="anywhere", **options),
        "by column": _case(fold, 130, 200, 40, name, layout="columns", **options),
        "forward": _case(fold, 70, 131, 40, name, backward=False, **options),
        "several chunks, sharp": _case(fold, 130, 131, 40, name, chunk=30, **sharp),
        **({"itself": _case(fold, 131, 131, 40, name, same=True, **options)} if labelled else {}),
        **({"itself, several chunks": _case(fold, *ITSELF, name, same=True, chunk=128, **halved)} if labelled else {}),
        **({"a row of NaN": _case(fold, 70, 131, 40, name, spoilt=True, **options)} if name == "sigmoid" else {}),
    }


CASES |= {f"fold:{name}": _of_fold(name, options) for name, options in _FOLDS.items()}
CASES["fold:distill"]["masked"] = _case(fold, 130, 200, 40, "distill", mask=dense, **_FOLDS["distill"])
CASES["fold:sigmoid"]["labels"] = _case(fold, 130, 200, 40, "sigmoid", labels=True, **_FOLDS["sigmoid"])
CASES["fold:pair_hinge"]["pulls"] = _case(
    fold, 130, 200, 40, "pair_hinge", options=(0.53125, -1.0, 1.0), kind="lattice", labels=True
)
