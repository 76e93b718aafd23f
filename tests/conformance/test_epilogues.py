"""Every epilogue of the registry on every backend that has it, against formulas in fp64.

`RUNS` is made from the registry: a row without a check, a backend's primitive that no row names, and a fold without a
case fail here. On a CPU `triton` is Triton's interpreter and `cuda` is csrc/ compiled for the host.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import epilogue_checks as checks
import pytest
import torch
from epilogue_checks import ALL_AT_ONCE, SCALE, SETS, TILES, chosen
from strips import dropped

from fusedloss.backends import BACKENDS, chunked, forms, protocol, triton
from fusedloss.core.epilogues import EPILOGUES, OPTIONS
from fusedloss.core.mask import StripMask
from fusedloss.core.strips import Strip
from fusedloss.proof import cases, sweeps
from fusedloss.proof.draws import Draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {  # M, N, D
    "several tiles, all edges ragged": (40, 70, 33),
    "full tiles only": (32, 64, 16),
    "one row": (1, 33, 17),
    "one column": (20, 1, 8),
    "one feature": (17, 40, 1),
}
# How a backend may go about it: columns of a tile in torch, Triton's tiles and its three ways to multiply.
WAYS: dict[str, dict[str, Any]] = {
    "chunked": {"tiles of 16": 16, "one tile": 1024},
    "triton": TILES,
    "cuda": {"sm_80": None},
}
# One tile each: Triton's interpreter takes 0.1 s for one of them with every mask.
ONE_WAY, ONE_SHAPE = {"chunked": "tiles of 16", "triton": "pointers, folded in halves", "cuda": "sm_80"}, (18, 40, 20)
# Triton's interpreter multiplies no bf16; `cuda` stores no exponentials in fp16.
NUMBERS = {"chunked": ("fp32", "bf16"), "triton": ("fp32", "fp16"), "cuda": ("fp32", "bf16")}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# What a row of the registry is held to --------------------------------------------------------------------------------


def _two(backend: Any, strip: Strip) -> list[Strip]:
    """With a second block of other columns, which has no target."""
    other = strip.y.flip(0)[: max(1, len(strip.y) - 3)]
    factor = None if strip.col_factor is None else strip.col_factor.flip(0)[: len(other)].contiguous()
    bias = None if strip.bias is None else strip.bias[: len(other)].contiguous()
    more = strip._replace(y=other.contiguous(), col_factor=factor, bias=bias, target=None, mask=None, own=None)
    return [strip, as_taken(backend, more._replace(y=_laid_out(more.y), own_scale=None))]


def _grad(backend: Any, strip: Strip, by_columns: bool) -> None:
    for with_q in (True, False):
        checks.check_grad(backend, [strip] if by_columns else _two(backend, strip), by_columns, with_q)


def _prefixes(backend: Any, strip: Strip) -> None:
    """Masks that do not hang on similarities, of which each prefix has others."""
    if strip.mask is not None:
        mask = strip.mask._replace(threshold=None, exempt=None)
        if mask != StripMask():
            checks.check_admitted(backend, strip._replace(mask=mask))


CHECKS: dict[str, Any] = {
    "rows": lambda backend, strip: checks.check_rows(backend, strip._replace(mask=None, own=None, softcap=0.0)),
    "stats": lambda backend, strip: checks.check_stats(backend, _two(backend, strip)),
    "stats+columns": checks.check_stats_with_columns,
    "exp": lambda backend, strip: checks.check_exp(backend, _two(backend, strip)),
    "stored": checks.check_stored,
    "grad": lambda backend, strip: _grad(backend, strip, False),
    "grad+columns": lambda backend, strip: _grad(backend, strip, True),
    "half": checks.check_half,
    "half+sides": checks.check_half_sides,
    "half+fold": checks.check_half_fold,
    "half+tops": checks.check_half_tops,
    "top": checks.check_top,
    "guide": checks.check_guide,
    "similarities": checks.check_similarities,
    "prefixes": _prefixes,
    "together": lambda backend, strip: checks.check_together(backend, _two(backend, strip)),
}


def _tally(backend: Any, name: str, strip: Strip) -> None:
    if name == "grad":
        smooth = torch.rand(len(strip.x), device=strip.x.device) / 8
        checks.check_grad(backend, [strip], smooth=smooth)
    elif name == "half":
        checks.check_half_tally(backend, strip)
    else:
        checks.check_tally(backend, name, strip)


# The folds' numbers are those of their proofs; the others are those of their losses.
FOLDS = sweeps._FOLDS | {
    "batch_all": {"options": (0.5,), "labels": True, "same": True, "kind": "lattice"},
    "semi_hard": {"options": (0.5,), "labels": True, "same": True},
}


def test_every_row_has_a_case():
    rows = {name for name in EPILOGUES if not name.startswith("fold:")}
    assert set(CHECKS) == rows and {f"fold:{name}" for name in FOLDS} == set(EPILOGUES) - rows
    assert all(set(row.options) <= set(OPTIONS) for row in EPILOGUES.values())
    assert set(SHAPES) and {row.name for row in EPILOGUES.values() if "masks" in row.options} >= {"stats", "grad"}


def test_every_primitive_has_a_row():
    """A method of the protocols that takes more than the problem computes something; the others are questions."""
    found = set()
    kinds = (protocol.Rows, protocol.Sweeps, protocol.Stores, protocol.FoldsRows, protocol.Halves, protocol.Admits)
    for kind in (*kinds, protocol.Distills, protocol.Prefixes, protocol.HalvesFolds, protocol.HalvesTops):
        for name, method in vars(kind).items():
            if not name.startswith("_") and list(inspect.signature(method).parameters) != ["self", "problem"]:
                found.add(name)
    assert found == {name for row in EPILOGUES.values() for name in row.primitives}


def test_every_backend_is_run():
    assert set(BACKENDS) == {*WAYS, "dense", "reference"} and set(NUMBERS) == set(WAYS)


# Epilogues ------------------------------------------------------------------------------------------------------------


def has(backend: str, row: Any) -> bool:
    return backend in forms(row) and not row.name.startswith("fold:")


def cases_of(backend: str, row: Any) -> Iterator[Any]:
    """Every set of what a strip may be given, every way with every shape."""
    sets = list(SETS) if "masks" in row.options or row.name == "prefixes" else ["nothing else", "factors"]
    ways, numbers, shapes = list(WAYS[backend]), NUMBERS[backend], list(SHAPES)
    for k in range(max(len(sets), len(ways) * len(shapes))):
        turn = k // len(ways)
        number = numbers[(k + turn) % 2]
        if row.name in ("exp", "stored", "half+fold") and number == "fp16":  # which stores neither there
            number = "fp32"
        given, shape = sets[(k + turn * (len(sets) == 2)) % len(sets)], shapes[turn % len(shapes)]
        case = (backend, row.name, ways[k % len(ways)], number, shape, given)
        yield pytest.param(*case, id="-".join(case))


RUNS = [case for row in EPILOGUES.values() for backend in WAYS if has(backend, row) for case in cases_of(backend, row)]
SMALL = [
    pytest.param(backend, ONE_WAY[backend], row.name, id=f"{backend}-{row.name}")
    for row in EPILOGUES.values()
    for backend in WAYS
    if has(backend, row)
]


def go(monkeypatch, backend: str, way: str) -> Any:
    module = BACKENDS[backend]
    if reason := module.why_not(checks.problem_of(strip_of((2, 2, 2), torch.float32))):
        pytest.skip(f"{backend}: {reason}")
    config = WAYS[backend][way]
    if backend == "chunked":
        monkeypatch.setattr(chunked.tiles, "TILE_COLUMNS", config)
    elif backend == "triton":
        monkeypatch.setattr(triton, "config_of", lambda strip, mode: config)
        monkeypatch.setattr(triton, "_panel_columns", lambda strip, config: 2 * config.BLOCK_N)
    return module


def _laid_out(x: torch.Tensor) -> torch.Tensor:
    """Rows that start on 16 bytes, as every `operand` leaves them, with NaN in between: see `as_taken`."""
    wide = 16 // x.itemsize
    padded = x.new_full((len(x), (x.shape[1] + wide - 1) // wide * wide + wide), torch.nan)
    return padded[:, : x.shape[1]].copy_(x)


def strip_of(shape: tuple[int, int, int], dtype: torch.dtype, *given: str) -> Strip:
    M, N, D = shape
    x, y = (_laid_out((torch.randn(count, D) / D**0.25).to(DEVICE, dtype)) for count in (M, N))
    target = torch.randint(N, (M,), device=DEVICE)
    return chosen(Strip(x, y, torch.tensor(SCALE, device=DEVICE), None, None, None, target), given)


def as_taken(backend: Any, strip: Strip) -> Strip:
    """In torch a target is a column or -1, and what a guide drops is a matrix. Triton's rows end in zeros up to the
    next 16 bytes."""
    if backend is triton:
        for x in (strip.x, strip.y):
            columns = -(-x.shape[1] * x.itemsize // 16) * 16 // x.itemsize
            x.as_strided((len(x), columns), x.stride())[:, x.shape[1] :] = 0
    if backend is not chunked:
        return strip
    if strip.target is not None:
        outside = (strip.target < 0) | (strip.target >= len(strip.y))
        strip = strip._replace(target=strip.target.masked_fill(outside, -1))
    mask = strip.mask
    if mask is not None and mask.dropped is not None:
        stored = dropped(StripMask(dropped=mask.dropped), torch.zeros(len(strip.x), len(strip.y), device=DEVICE))
        none = torch.empty(0, device=DEVICE)
        drops = chunked.masks.Drops(stored.float(), strip, chunked.tiles.Rows(none), none, none)
        strip = strip._replace(mask=mask._replace(dropped=drops))
    return strip


@pytest.mark.parametrize("backend, epilogue, way, number, shape, given", RUNS)
def test_an_epilogue(monkeypatch, backend, epilogue, way, number, shape, given):
    run(monkeypatch, backend, way, number, epilogue, SHAPES[shape], SETS[given])


@pytest.mark.smoke
@pytest.mark.parametrize("backend, way, epilogue", SMALL)
def test_an_epilogue_with_all_at_once(monkeypatch, backend, way, epilogue):
    run(monkeypatch, backend, way, "fp32", epilogue, ONE_SHAPE, ALL_AT_ONCE)


def run(monkeypatch, backend, way, number, epilogue, shape, given):
    row = EPILOGUES[epilogue]
    module = go(monkeypatch, backend, way)
    if "masks" not in row.options and epilogue != "prefixes":
        given = tuple(name for name in given if name == "factors")
    strip = as_taken(module, strip_of(shape, DTYPES[number], *given))
    CHECKS[epilogue](module, strip)
    if "tally" in row.options:
        _tally(module, epilogue, strip)


# Folds ----------------------------------------------------------------------------------------------------------------


def _made(name: str, shape: tuple[int, int, int], draw: Draw) -> Any:
    return sweeps.fold(draw, *shape, name, **FOLDS[name])


@pytest.mark.smoke
@pytest.mark.parametrize("name", FOLDS)
@pytest.mark.parametrize("backend", WAYS)
def test_a_fold(monkeypatch, backend, name):
    """Its losses, what it counts and all gradients, within the budget of its proof."""
    go(monkeypatch, backend, ONE_WAY[backend])
    make, device = lambda draw: _made(name, (20, 31, 12), draw), torch.device(DEVICE)
    found = make(Draw(name, torch.float32, device))(backend)
    shares = cases.shares_of(found, name, make, "fp32", device)
    assert max(shares.values()) <= 1, shares


@pytest.mark.parametrize("name", FOLDS)
def test_a_folds_formula(name):
    """`reference` differentiates the formula, `chunked` has the derivative written out: in fp64 they are equal."""
    make = lambda backend: _made(name, (20, 31, 12), Draw(name, torch.float32, torch.device("cpu"), wide=True))(backend)
    found, wanted = make("chunked"), make("reference")
    for what, x in found.items():
        torch.testing.assert_close(x, wanted[what].to(x.dtype), rtol=1e-10, atol=1e-12)


# The reference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["nothing else", "factors", "bias", "dropped", "kept", "dense", "skip", "softcap"])
def test_the_reference(given):
    """Its losses and gradients against the strips' formula, which the other backends are held to."""
    strip = strip_of((12, 17, 8), torch.float32, *SETS[given])
    strip = strip._replace(x=strip.x.double(), y=strip.y.double(), scale=strip.scale.double())
    strip = strip._replace(x=strip.x.contiguous(), y=strip.y.contiguous())
    if given == "factors":
        norms = [1 / t.norm(dim=1) for t in (strip.x, strip.y)]
        strip = strip._replace(row_factor=norms[0], col_factor=norms[1])
    if strip.bias is not None:
        strip.bias[strip.target] = 0.5  # a target competes
        strip = strip._replace(bias=strip.bias.double())
    if strip.mask is not None and strip.mask.skip is not None:
        skip = torch.where(strip.mask.skip == strip.target, -1, strip.mask.skip)
        strip = strip._replace(mask=StripMask(skip=skip))
    problem = problem_of_reference(strip)
    x, y = (t.clone().requires_grad_() for t in (strip.x, strip.y))
    rows, _ = BACKENDS["reference"].loss_rows(replace(problem, operands=(x, y)))
    found = torch.autograd.grad(rows.sum(), (x, y))
    _, z = checks.formula(strip._replace(target=None, mask=None))
    negatives, own = checks.formula(strip)[1], z.gather(1, strip.target[:, None])
    loss = torch.cat([negatives, own], 1).logsumexp(1) - own[:, 0]
    torch.testing.assert_close(rows.detach(), problem.weight * loss, rtol=1e-12, atol=1e-12)
    p = torch.exp(negatives - torch.cat([negatives, own], 1).logsumexp(1, keepdim=True))
    dz = (p.scatter_add(1, strip.target[:, None], -p.sum(1, keepdim=True))) * problem.weight[:, None] * strip.scale
    if strip.softcap:
        dz = dz * (1 - (z / strip.softcap) ** 2)
    for number, (dx, own_side, other) in enumerate(((dz, strip.x, strip.y), (dz.T, strip.y, strip.x))):
        units = [t / t.norm(dim=1, keepdim=True) if given == "factors" else t for t in (own_side, other)]
        wanted = dx @ units[1]
        if given == "factors":
            wanted = wanted - (wanted * units[0]).sum(1, keepdim=True) * units[0]
            wanted = wanted / own_side.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found[number], wanted, rtol=1e-10, atol=1e-12)


def problem_of_reference(strip: Strip) -> Any:
    from fusedloss.core.mask import Mask
    from fusedloss.core.problem import Block, Problem

    mask = strip.mask or StripMask()
    block = Block(0, 1, strip.bias, Mask(mask.compare, mask.dense, skip=mask.skip))
    return Problem(
        (strip.x, strip.y),
        (block,),
        strip.scale,
        strip.target,
        torch.rand(len(strip.x), dtype=torch.float64, device=strip.x.device) + 0.1,
        cosine=strip.row_factor is not None,
        softcap=strip.softcap,
    )


def test_the_references_largest():
    strip = strip_of((12, 17, 8), torch.float32)._replace(target=None)
    problem = replace(problem_of_reference(strip._replace(target=torch.full((12,), -1, device=DEVICE))), top=True)
    top, column = BACKENDS["reference"].top_rows(problem)
    z = checks.formula(strip)[1]
    assert torch.equal(column, z.argmax(1))
    checks.assert_near(top, z.amax(1), magnitude=1.0)
