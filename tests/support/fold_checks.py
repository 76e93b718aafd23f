"""A fold in the tile, of any backend with `fold_rows`, against `core/folds/` in fp64."""

from __future__ import annotations

from typing import Any

import torch
from epilogue_checks import assert_stored, between, fenced, problem_of
from strips import assert_near, factored, formula
from torch import Tensor

from fusedloss.backends import triton
from fusedloss.core.folds import FOLDS, SUM, Part
from fusedloss.core.problem import Fold
from fusedloss.core.strips import Strip

KINDS: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {  # name, options, scalars beside the scale
    "sigmoid": ("sigmoid", (), (-0.5,)),
    "margin_ranking": ("margin_ranking", (0.3, 1.0), ()),
    "pair_hinge, pulls": ("pair_hinge", (0.6, -1.0, 1.0), ()),
    "pair_hinge, pushes": ("pair_hinge", (-0.1, 1.0, 0.0), ()),
    "multi_similarity": ("multi_similarity", (2.0, 10.0, 0.5), ()),
    "proxy_anchor": ("proxy_anchor", (0.1, 8.0), (1.5,)),
    "circle": ("circle", (0.4, 8.0), ()),
    "sup_con_in": ("sup_con_in", (), ()),
}
SUMS = [kind for kind, (name, *_) in KINDS.items() if FOLDS[name].sums == SUM]
SCALED = ("sigmoid", "sup_con_in")  # of the others the scale is 1


def part_of(strip: Strip, kind: str, labelled: bool) -> Part:
    """Every third row is left out; labels agree in half of their bits; own columns are anywhere, or nowhere."""
    M, N, device = len(strip.x), len(strip.y), strip.x.device
    values = torch.tensor([-(2**63), 2**32, 0, 1, 2**32 + 1], device=device)
    labels = [values[torch.randint(5, (count,), device=device)] if labelled else None for count in (M, N)]
    own = torch.randint(-1, N, (M,), device=device)
    own = torch.where(own == strip.target, -1, own) if kind == "margin_ranking" else own
    weight = torch.rand(M, device=device) + 0.1
    weight[1::3] = 0
    return Part(torch.arange(M, device=device), weight, strip.target, *labels, own)


def fold_of(strip: Strip, kind: str, sim: Tensor, score: Tensor) -> tuple[Strip, Fold]:
    """With a hinge's margin between two values."""
    name, options, scalars = KINDS[kind]
    if name == "margin_ranking":
        options = (-between(sim - score[:, None], -options[0]), *options[1:])
    elif name == "pair_hinge":
        options = (between(sim, options[0]), *options[1:])
    strip = strip if name in SCALED else strip._replace(scale=torch.ones_like(strip.scale))
    return strip, Fold(name, options, scalars=tuple(strip.scale.new_tensor(value) for value in scalars))


def check_fold(
    backend: Any, strip: Strip, kind: str, labelled: bool, aligned: bool = True, stored: torch.dtype | None = None
) -> None:
    """Its loss, count, scalars' gradients and what it stores; without a gradient the losses are the same bits.

    stored: the dtype of what is stored, if it is not the operands'.
    """
    sim = formula(strip)[0]
    assert strip.target is not None
    score = sim.gather(1, strip.target[:, None])[:, 0]
    strip, fold = fold_of(strip, kind, sim, score)
    part, problem, slope = part_of(strip, kind, labelled), problem_of(strip, fold=fold), sim.clone()
    wide, scalars = part._replace(weight=part.weight.double()), tuple(x.double() for x in (strip.scale, *fold.scalars))
    wanted = FOLDS[fold.name].torch(slope, wide, scalars, fold.options, True)
    dtype, padded = stored or strip.x.dtype, backend is triton
    out, buffer = fenced(len(strip.x), len(strip.y), dtype, strip.x.device, aligned, padded)
    found = backend.fold_rows(problem, strip, out, part, score)
    assert_near(found.loss, wanted.loss, magnitude=wide.weight)
    assert (found.count is None) == (wanted.count is None)
    assert found.count is None or torch.equal(found.count.double(), wanted.count)
    for one, other in zip(found.scalars, wanted.scalars, strict=True):
        assert_near(one, other, magnitude=(slope * sim).abs().sum() + slope.abs().sum())
    value = factored(slope, strip)
    magnitude = value.abs()
    if kind == "circle":  # its slope is a difference: a few roundings of the row's largest
        magnitude = magnitude + magnitude.amax(1, keepdim=True) / 100
    assert_stored(out, value, buffer, magnitude)
    alone = backend.fold_rows(problem, strip, None, part, score)
    assert torch.equal(alone.loss, found.loss)
