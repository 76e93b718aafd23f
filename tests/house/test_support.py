"""What works with what: every loss, probed. `python tests/house/test_support.py` writes the outcome to docs/support.md.

A probe has two good outcomes. The value and the gradients are the formula's (in fp64, from `backend="reference"`, whose
own gradient is held against differences of its values): "yes". Or an error of ours that names the remedy: "no".
Anything else, a wrong number or somebody else's error, is a fault, which fails here.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fusedloss import UnsupportedError, masks
from fusedloss import functional as F

PROGRAM = "python tests/house/test_support.py"
PAGE = Path(__file__).parents[2] / "docs" / "support.md"
PACKAGE = Path(F.__file__).parent
WRITES = "FUSEDLOSS_WRITE_SUPPORT" in os.environ
REFUSALS = (UnsupportedError, ValueError, TypeError)
BACKENDS = ("reference", "chunked", "triton", "cuda")
KERNELS = ("triton", "cuda")
STEP = 1e-5  # of differences in fp64: eps / STEP and STEP^2 are about 1e-11 and 1e-10
NONE = ""  # the loss has no such option


# Every loss, small ----------------------------------------------------------------------------------------------------


class Draw:
    """Inputs of a few rows, in fp64."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def x(self, *shape: int) -> Tensor:
        return torch.randn(shape or (5, 4), generator=self.generator, dtype=torch.float64)

    def index(self, columns: int, *rows: int) -> Tensor:
        return torch.randint(columns, rows or (5,), generator=self.generator)

    def share(self, *shape: int) -> Tensor:
        return torch.rand(shape or (5,), generator=self.generator, dtype=torch.float64)

    def scalar(self) -> Tensor:
        return 0.5 + self.share(1)[0]

    def labels(self) -> Tensor:
        """Two of one, two of another and one alone."""
        return torch.tensor([0, 0, 1, 1, 2])[torch.randperm(5, generator=self.generator)]


class Loss(NamedTuple):
    learn: Callable[[Draw], list[Tensor]]  # arguments that receive a gradient
    fixed: Callable[[Draw], list[Tensor]]  # and those that do not
    call: Callable[..., Tensor]  # of all of them, and options


def _two(d: Draw) -> list[Tensor]:
    return [d.x(), d.x()]


def _two_scaled(d: Draw) -> list[Tensor]:
    return [d.x(), d.x(), d.scalar()]


def _one(d: Draw) -> list[Tensor]:
    return [d.x()]


def _labels(d: Draw) -> list[Tensor]:
    return [d.labels()]


def _nothing(d: Draw) -> list[Tensor]:
    return []


def _lists(name: str) -> Loss:
    function = getattr(F, name)
    return Loss(lambda d: [d.x(3, 5)], lambda d: [d.share(3, 5) * 3], lambda s, y, **o: function(s, y, **o))


def _of_labels(name: str) -> Loss:
    function = getattr(F, name)
    return Loss(_one, _labels, lambda x, y, **o: function(x, y, **o))


def _of_elements(name: str) -> Loss:
    function = getattr(F, name)
    return Loss(_two, _nothing, lambda x, t, **o: function(x, t, **o))


def _of_pairs(name: str, label: Callable[[Draw], Tensor]) -> Loss:
    function = getattr(F, name)
    return Loss(_two, lambda d: [label(d)], lambda a, b, y, **o: function(a, b, y, **o))


LOSSES: dict[str, Loss] = {
    "info_nce": Loss(
        lambda d: [d.x(5, 4), d.x(6, 4), d.scalar()],
        lambda d: [d.index(6)],
        lambda q, k, t, y, **o: F.info_nce(q, k, o.pop("target", y), temperature=t, **o),
    ),
    "clip": Loss(_two_scaled, _nothing, lambda a, b, s, **o: F.clip(a, b, s, **o)),
    "siglip": Loss(
        lambda d: [*_two_scaled(d), d.scalar()],
        lambda d: [d.index(5)],
        lambda a, b, s, c, y, **o: F.siglip(a, b, s, c, target=o.pop("target", y), **o),
    ),
    "clip_distill": Loss(
        _two_scaled,
        lambda d: [d.x(5, 3), d.x(5, 3)],
        lambda a, b, s, x, y, **o: F.clip_distill(a, b, s, x, y, 2.0, **o),
    ),
    "multiple_negatives_ranking": Loss(
        lambda d: [d.x(), d.x(), d.x(), d.scalar()],
        _nothing,
        lambda a, p, n, s, **o: F.multiple_negatives_ranking(a, p, n, scale=s, **o),
    ),
    "gist_embed": Loss(
        _two_scaled,
        lambda d: [d.x(5, 3), d.x(5, 3)],
        lambda a, p, t, g, h, **o: F.gist_embed(a, p, guide=(g, h), temperature=t, **o),
    ),
    "nt_xent": Loss(_two_scaled, _nothing, lambda a, b, t, **o: F.nt_xent(a, b, temperature=t, **o)),
    "decoupled_contrastive": Loss(
        _two_scaled, _nothing, lambda a, b, t, **o: F.decoupled_contrastive(a, b, temperature=t, **o)
    ),
    "sup_con": Loss(lambda d: [d.x(), d.scalar()], _labels, lambda x, t, y, **o: F.sup_con(x, y, temperature=t, **o)),
    "multi_similarity": _of_labels("multi_similarity"),
    "circle": Loss(_one, _labels, lambda x, y, **o: F.circle(x, y, m=0.25, gamma=8.0, **o)),
    "batch_all_triplet": _of_labels("batch_all_triplet"),
    "batch_semi_hard_triplet": _of_labels("batch_semi_hard_triplet"),
    "batch_hard_triplet": _of_labels("batch_hard_triplet"),
    "batch_hard_soft_margin_triplet": _of_labels("batch_hard_soft_margin_triplet"),
    "mega_batch_margin": Loss(_two, _nothing, lambda a, p, **o: F.mega_batch_margin(a, p, **o)),
    "in_batch_margin_ranking": Loss(_two, _nothing, lambda a, p, **o: F.in_batch_margin_ranking(a, p, **o)),
    "contrastive_tension_in_batch": Loss(
        _two_scaled, _nothing, lambda a, b, s, **o: F.contrastive_tension_in_batch(a, b, s, **o)
    ),
    "linear_cross_entropy": Loss(
        lambda d: [d.x(5, 4), d.x(6, 4), d.x(6)],
        lambda d: [d.index(6)],
        lambda x, w, b, y, **o: F.linear_cross_entropy(x, w, y, linear_bias=b, **o),
    ),
    "arcface": Loss(
        lambda d: [d.x(5, 4), d.x(6, 4)],
        lambda d: [d.index(6)],
        lambda x, w, y, **o: F.arcface(x, y, w, scale=4.0, **o),
    ),
    "cosface": Loss(
        lambda d: [d.x(5, 4), d.x(6, 4)],
        lambda d: [d.index(6)],
        lambda x, w, y, **o: F.cosface(x, y, w, scale=4.0, **o),
    ),
    "proxy_nca": Loss(
        lambda d: [d.x(5, 4), d.x(6, 4), d.scalar()],
        lambda d: [d.index(6)],
        lambda x, p, s, y, **o: F.proxy_nca(x, y, p, scale=s, **o),
    ),
    "proxy_anchor": Loss(
        lambda d: [d.x(5, 4), d.x(6, 4)],
        lambda d: [d.index(6)],
        lambda x, p, y, **o: F.proxy_anchor(x, y, p, alpha=4.0, **o),
    ),
    "contrastive": _of_pairs("contrastive", lambda d: d.index(2)),
    "online_contrastive": _of_pairs("online_contrastive", lambda d: d.index(2)),
    "cosine_similarity": _of_pairs("cosine_similarity", Draw.share),
    "contrastive_tension": _of_pairs("contrastive_tension", lambda d: d.index(2)),
    "triplet": Loss(lambda d: [d.x(), d.x(), d.x()], _nothing, lambda a, p, n, **o: F.triplet(a, p, n, **o)),
    "cosent": Loss(_two_scaled, lambda d: [d.share()], lambda a, b, s, y, **o: F.cosent(a, b, y, scale=s, **o)),
    "angle": Loss(_two_scaled, lambda d: [d.share()], lambda a, b, s, y, **o: F.angle(a, b, y, scale=s, **o)),
    "margin_mse": Loss(
        lambda d: [d.x(), d.x(), d.x()], lambda d: [d.x(5)], lambda q, p, n, y, **o: F.margin_mse(q, p, n, label=y, **o)
    ),
    "distill_kl_div": Loss(
        lambda d: [d.x(), d.x(), d.x()],
        lambda d: [d.x(5, 2)],
        lambda q, p, n, y, **o: F.distill_kl_div(q, p, n, label=y, **o),
    ),
    "embed_distill": Loss(_one, _one, lambda s, t, **o: F.embed_distill(s, t, **o)),
    "softmax_pair": Loss(
        lambda d: [d.x(), d.x(), d.x(3, 12), d.x(3)],
        lambda d: [d.index(3)],
        lambda u, v, w, b, y, **o: F.softmax_pair(u, v, w, b, y, **o),
    ),
    "mse": _of_elements("mse"),
    "l1": _of_elements("l1"),
    "huber": _of_elements("huber"),
    "smooth_l1": _of_elements("smooth_l1"),
    "binary_cross_entropy_with_logits": Loss(
        _one, lambda d: [d.share(5, 4)], lambda x, t, **o: F.binary_cross_entropy_with_logits(x, t, **o)
    ),
    "cross_entropy": Loss(_one, lambda d: [d.index(4)], lambda x, t, **o: F.cross_entropy(x, t, **o)),
    "focal": Loss(_one, lambda d: [d.index(4)], lambda x, t, **o: F.focal(x, t, **o)),
    **{name: _lists(name) for name in ("lambda_loss", "rank_net", "list_net", "list_mle", "plist_mle", "adr_mse")},
    "global_orthogonal_regularization": Loss(
        _two, _nothing, lambda x, y, **o: F.global_orthogonal_regularization(x, y, **o)
    ),
    "matryoshka": Loss(
        _two_scaled, _nothing, lambda a, b, t, **o: F.matryoshka(F.info_nce, a, b, dims=(4, 2), temperature=t, **o)
    ),
    "adaptive_layer": Loss(
        lambda d: [d.x(3, 5, 4), d.x(3, 5, 4), d.scalar()],
        _nothing,
        lambda a, b, t, **o: F.adaptive_layer(F.info_nce, a, b, temperature=t, **HELD, **o),
    ),
    "matryoshka_2d": Loss(
        lambda d: [d.x(3, 5, 4), d.x(3, 5, 4), d.scalar()],
        _nothing,
        lambda a, b, t, **o: F.matryoshka_2d(F.info_nce, a, b, dims=(4, 2), temperature=t, **HELD, **o),
    ),
}
HELD = {"kl_div_weight": 0.0}  # its teacher is a constant: the gradient would not be that of the value
ALIASES = {"mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss"}  # the same objects
PLAIN = {"global_orthogonal_regularization"}  # without backends


def parameters(name: str) -> set[str]:
    return set(inspect.signature(getattr(F, name)).parameters)


def circle_held(at: Point) -> Callable[..., Tensor]:
    """circle with its weights as they are at the point, constants to its gradient, as its authors have it."""
    (at_point,), (labels,), m, gamma = at.learn, at.fixed, 0.25, 8.0
    unit = torch.nn.functional.normalize
    same = labels[:, None] == labels
    positive, held = same & ~torch.eye(len(labels), dtype=torch.bool), unit(at_point) @ unit(at_point).T
    both = positive.any(1) & ~same.all(1)

    def loss(x: Tensor) -> Tensor:
        s = unit(x) @ unit(x).T
        pull = (-gamma * (1 + m - held).relu() * (s - 1 + m)).masked_fill(~positive, -torch.inf)[both].logsumexp(1)
        push = (gamma * (held + m).relu() * (s - m)).masked_fill(same, -torch.inf)[both].logsumexp(1)
        return (pull + push).exp().log1p().mean()

    return loss


# Probes ---------------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """Where a loss is looked at: `call` of `learn` alone."""

    name: str
    learn: list[Tensor]
    fixed: list[Tensor]

    def call(self, backend: str, **options: Any) -> Callable[..., Tensor]:
        call = LOSSES[self.name].call
        if self.name not in PLAIN:
            options["backend"] = backend
        return lambda *learn: call(*learn, *self.fixed, **options)

    def to(self, *args: Any) -> Point:
        fixed = [t.to(*args) if t.is_floating_point() or args == ("meta",) else t for t in self.fixed]
        return self._replace(learn=[t.to(*args) for t in self.learn], fixed=fixed)


def point(name: str, seed: int = 0) -> Point:
    draw = Draw(seed)
    return Point(name, LOSSES[name].learn(draw), LOSSES[name].fixed(draw))


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def first_of(found: Any) -> Tensor:
    """Without its statistics."""
    return found[0] if isinstance(found, tuple) else found


def derived(call: Callable[..., Any], learn: Sequence[Tensor]) -> list[Tensor]:
    """[loss, *gradients]"""
    inputs = leaves(learn)
    loss = first_of(call(*inputs))
    return [loss.detach(), *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)]


def formula(at: Point, **options: Any) -> list[Tensor]:
    return derived(at.call("reference", **options), at.learn)


def close(found: Sequence[Tensor], wanted: Sequence[Tensor], share: float) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(one.double(), other, rtol=0, atol=share * (other.abs().max().item() + 1e-3))


def works(probe: Callable[[], None], remedy: str) -> bool:
    """Whether it does what it should; an error of ours that has `remedy` in it says that it does not."""
    try:
        probe()
    except REFUSALS as error:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        ours = frame is not None and PACKAGE in Path(frame.tb_frame.f_code.co_filename).parents
        assert ours and remedy in str(error), f"{error}, which does not speak of {remedy}"
        return False
    return True


def held(at: Point, **options: Any) -> Callable[..., Tensor]:
    """The loss whose derivative is the gradient."""
    return circle_held(at) if at.name == "circle" else at.call("reference", **options)


def value_and_gradient(at: Point, backend: str, **options: Any) -> None:
    """By a kernel in fp32, whose 24 bits an exponential of logits up to 20 leaves at 1e-6 of the largest gradient."""
    wanted = formula(at, **options)
    if backend == "reference":
        directions = directions_of(at)
        loss = lambda *learn: first_of(held(at, **options)(*learn))
        found = sum((g * v).sum() for g, v in zip(wanted[1:], directions, strict=True))
        ahead, behind = (loss(*shifted(at, directions, step)) for step in (STEP, -STEP))
        close([found], [(ahead - behind) / (2 * STEP)], 1e-6)
        return
    if backend == "chunked":
        close(derived(at.call(backend, **options), at.learn), wanted, 1e-9)
        return
    narrow = at.to(torch.float32)
    options = {key: as_float(value) for key, value in options.items()}
    close(derived(narrow.call(backend, **options), narrow.learn), wanted, 2e-5)


def as_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def directions_of(at: Point) -> list[Tensor]:
    draw = Draw(99)
    return [draw.x(*t.shape) if t.dim() else draw.x(1)[0] for t in at.learn]


def shifted(at: Point, directions: list[Tensor], step: float) -> list[Tensor]:
    return [t + step * v for t, v in zip(at.learn, directions, strict=True)]


def second_derivatives(at: Point, backend: str) -> None:
    """The derivative of the gradient in one direction, against a difference of gradients."""
    directions, inputs = directions_of(at), leaves(at.learn)
    call = at.call(backend)
    first = torch.autograd.grad(call(*inputs), inputs, create_graph=True, allow_unused=True, materialize_grads=True)
    along = sum((g * v).sum() for g, v in zip(first, directions, strict=True))
    zeros = [torch.zeros_like(t) for t in inputs]
    found = torch.autograd.grad(along, inputs, materialize_grads=True) if along.requires_grad else zeros
    ahead, behind = (derived(held(at), shifted(at, directions, step))[1:] for step in (STEP, -STEP))
    close(found, [(a - b) / (2 * STEP) for a, b in zip(ahead, behind, strict=True)], 1e-6)


def func_grad(at: Point, backend: str) -> None:
    argnums = tuple(range(len(at.learn)))
    found = torch.func.grad_and_value(at.call(backend), argnums)(*at.learn)
    close([found[1], *found[0]], formula(at), 1e-9)


def vmap(at: Point, backend: str) -> None:
    """Over all arguments, over each alone, and gradients over all."""
    other = point(at.name, 1)
    call = LOSSES[at.name].call
    options = {} if at.name in PLAIN else {"backend": backend}
    all_of = [*at.learn, *at.fixed], [*other.learn, *other.fixed]
    count = len(all_of[0])
    for dims in ((0,) * count, *(tuple(0 if i == n else None for i in range(count)) for n in range(count))):
        stacked = [torch.stack(pair) if dim == 0 else pair[0] for dim, *pair in zip(dims, *all_of, strict=True)]
        found = torch.func.vmap(lambda *a: call(*a, **options), in_dims=dims)(*stacked)
        wanted = [
            call(*(t[i] if dim == 0 else t for t, dim in zip(stacked, dims, strict=True)), **options | reference(at))
            for i in range(2)
        ]
        close([found], [torch.stack(wanted)], 1e-9)
    gradient = torch.func.vmap(torch.func.grad(lambda *a: call(*a, **options), tuple(range(len(at.learn)))))
    stacked = [torch.stack(pair) for pair in zip(*all_of, strict=True)]
    wanted_gradients = zip(formula(at)[1:], formula(other)[1:], strict=True)
    close(gradient(*stacked), [torch.stack(pair) for pair in wanted_gradients], 1e-9)


def reference(at: Point) -> dict[str, str]:
    return {} if at.name in PLAIN else {"backend": "reference"}


def forward_mode(at: Point, backend: str) -> None:
    directions = tuple(directions_of(at))
    value, along = torch.func.jvp(at.call(backend), tuple(at.learn), directions)
    wanted, *gradients = formula(at)
    close([value, along], [wanted, sum((g * v).sum() for g, v in zip(gradients, directions, strict=True))], 1e-9)


def compiled(at: Point) -> None:
    torch._dynamo.reset()
    call = torch.compile(at.call("chunked"), fullgraph=True, backend="aot_eager")
    close(derived(call, at.learn), formula(at), 1e-9)


def nothing_read_back(at: Point) -> None:
    """Forward and backward of tensors that have no values, as a GPU's have none for the host."""
    with mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()):  # which knows no meta
        derived(at.to("meta").call("chunked"), at.to("meta").learn)


def with_group(at: Point, strategy: str, **options: Any) -> None:
    across = {"group": dist.group.WORLD, "strategy": strategy, "grad_scale": "sum"}
    options = {"target": None, **options} if at.name in ("info_nce", "siglip") else options
    close(derived(at.call("chunked", **across, **options), at.learn), formula(at, **options), 1e-9)


# Options --------------------------------------------------------------------------------------------------------------

COLUMNS = {"info_nce": 6, "clip": 5, "multiple_negatives_ranking": 10}  # of the losses with a mask of columns
LISTS = {"lambda_loss", "rank_net", "list_net", "list_mle", "plist_mle", "adr_mse"}
ROW_WEIGHT = {"info_nce": 5, "linear_cross_entropy": 6, "cross_entropy": 4}


def options_of(name: str) -> dict[str, dict[str, Any] | None]:
    """By column of the second table; None: the loss has no such option."""
    draw, has = Draw(7), parameters(name)
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(
        ("bool", "same_id", "same_group", "score_margin", "guide", "not_self", "smoothing", "stats", "bank", "weight")
    )
    if name in LISTS:
        found["bool"] = {"mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]]).bool()}
    elif "mask" in has:
        N = COLUMNS[name]
        ids = draw.index(3, 5), draw.index(3, N)
        found["bool"] = {"mask": draw.share(5, N) > 0.4}
        found["same_id"] = {"mask": masks.same_id(*ids)}
        found["same_group"] = {"mask": masks.same_group(*ids)}
        found["score_margin"] = {"mask": masks.score_margin(0.1)}
        found["guide"] = {"mask": masks.guide(draw.x(5, 3).float(), draw.x(N, 3).float())}
        found["not_self"] = {"mask": masks.not_self(1)}
    elif name == "siglip":
        found["same_id"] = {"target": masks.same_id(draw.index(3, 5), draw.index(3, 5))}
    if "label_smoothing" in has:
        found["smoothing"] = {"label_smoothing": 0.2}
    if "return_stats" in has:
        found["stats"] = {"return_stats": True}
    if "bank" in has:
        found["bank"] = {"bank": draw.x(3, 4)}
    if name == "softmax_pair":
        found["weight"] = {"class_weight": draw.share(3)}
    elif name in ROW_WEIGHT:
        found["weight"] = {"weight": draw.share(ROW_WEIGHT[name])}
    elif "weight" in has and name not in ("arcface", "cosface"):  # whose weight is the classes' vectors
        found["weight"] = {"weight": draw.share(5, 4)}
    return found


def argument(options: dict[str, Any]) -> str:
    return next(iter(options))


def with_option(at: Point, backend: str, options: dict[str, Any]) -> None:
    value_and_gradient(at, backend, **options)
    if "return_stats" in options:
        narrow = at if backend in ("reference", "chunked") else at.to(torch.float32)
        stats, wanted = (
            here.call(name, **options)(*here.learn)[1] for here, name in ((narrow, backend), (at, "reference"))
        )
        close(stats, [t.double() for t in wanted], 1e-5)
    else:  # it is not passed over
        plain, chosen = formula(at)[0], formula(at, **options)[0]
        assert (plain - chosen).abs() > 1e-6


# The tables -----------------------------------------------------------------------------------------------------------


class Cells(NamedTuple):
    """The row of one loss in each table; empty where it is in none."""

    first: list[str]
    options: list[str]
    across: list[str]


def said(worked: bool) -> str:
    return "yes" if worked else "no"


def of_backends(worked: dict[str, bool]) -> str:
    """yes: all of them."""
    return "yes" if all(worked.values()) else ", ".join(name for name, well in worked.items() if well) or "no"


def first_row(name: str) -> list[str]:
    at, has = point(name), parameters(name)
    plain = name in PLAIN
    cells = []
    for backend in BACKENDS:
        if plain and backend != "reference":
            cells.append(NONE)
            continue
        cells.append(said(works(lambda b=backend: value_and_gradient(at, b), "chunked: can run it")))
    backends = ("reference",) if plain else ("reference", "chunked")
    for probe in (second_derivatives, func_grad, vmap, forward_mode):
        cells.append(of_backends({b: works(lambda p=probe, b=b: p(at, b), "'reference'") for b in backends}))
    cells.append(said(works(lambda: compiled(at), "fullgraph")))
    cells.append(said(works(lambda: nothing_read_back(at), "capture")))
    for strategy in ("gather", "ring"):
        cells.append(said(works(lambda s=strategy: with_group(at, s), "group")) if "group" in has else NONE)
    return cells


def options_row(name: str, runs_on: Sequence[str]) -> list[str]:
    options = options_of(name)
    if not any(options.values()):
        return []
    cells = []
    for given in options.values():
        if given is None:
            cells.append(NONE)
            continue
        probed = {b: works(lambda b=b, g=given: with_option(point(name), b, g), argument(given)) for b in runs_on}
        cells.append(of_backends(probed))
    return cells


def across_row(name: str) -> list[str]:
    if "group" not in parameters(name):
        return []
    draw, cells = Draw(8), []
    options = options_of(name)
    options["negatives"] = {"negatives": draw.x(5, 2, 4)} if name == "info_nce" else None
    options["columns"] = {"target": draw.index(5)} if name in ("info_nce", "siglip") else None
    for given in options.values():
        if given is None:
            cells.append(NONE)
            continue
        probed = {}
        for strategy in ("gather", "ring"):
            probe = lambda s=strategy, g=given: with_group(point(name), s, **g)
            probed[strategy] = works(probe, argument(given))
        cells.append(of_backends(probed))
    return cells if any(cells) else []


FIRST = ("loss", *BACKENDS, "second derivatives", "torch.func.grad", "vmap", "forward mode", "compile", "capture")
FIRST += ("group", "ring")
OPTIONS = ("loss", *options_of("info_nce"))
ACROSS = (*OPTIONS, "negatives", "columns")
TEXT = """# What works with what

Written by `python tests/house/test_support.py`, which calls every loss for every cell; the test suite does the same and
compares. **yes**: value and gradients are the formula's. **no**: an error that says what to do instead. Empty: the
loss has no such option. Nothing is promised beyond this page.

## Every loss

* *reference, chunked, triton, cuda*: `backend=`. The kernels ran without a GPU: Triton's in its interpreter, those of
  `csrc/` compiled for a CPU.
* *second derivatives* (`create_graph=True`), *torch.func.grad*, *vmap*, *forward mode* (`torch.func.jvp`): yes is on
  `reference` and on `chunked`; a name is the backend that has it. Kernels have second derivatives where `chunked`
  has them, by the formula that it reruns, and none of the others. Where only `reference` has second derivatives, one
  tensor, the gradient, is kept for backward, and there is nothing left to differentiate. vmap
  is over any of the arguments, targets, labels and temperatures too; inside of it, and of the other transforms,
  values are not looked at: a target out of range is a NaN loss. With `group=` there are none of the four.
* *compile*: `torch.compile(fullgraph=True)` on `chunked`, forward and backward.
* *capture*: as a CUDA graph, by the host's path: on tensors without values, forward and backward read nothing back.
  No GPU has run it. Not captured: anything with `group=`, which asks the other ranks' sizes, and `compact=True`.
* *group*, *ring*: `group=` with `strategy="gather"` and `"ring"`.

{first}

The modifiers (`matryoshka`, `adaptive_layer`, `matryoshka_2d`) were called with `info_nce`, and have what their loss
has. `mse_loss`, `l1_loss`, `huber_loss` and `smooth_l1_loss` are the functions of the shorter names.

## Options

On every backend that the loss runs on, or on those that are named. *bool* to *not_self* are kinds of `mask=`: a bool
matrix, and those of `fusedloss.masks`; of lists, a bool matrix says which documents are there; of `siglip`, `same_id`
is its `target=`. *smoothing*: `label_smoothing`. *stats*: `return_stats`. *weight*: of rows (`info_nce`), of classes
(`cross_entropy`, `linear_cross_entropy`, `class_weight` of `softmax_pair`), of elements.

{options}

## Options with `group=`

With both strategies, or with the one that is named. *columns*: `target=` as column numbers, in a ring not beside a
margin or a guide. `form="in"` of `sup_con` needs "gather".

{across}
"""


def table(head: Sequence[str], rows: dict[str, list[str]]) -> str:
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    lines += [" | ".join([f"`{name}`", *cells]) for name, cells in rows.items() if cells]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


# The tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(host_extension, monkeypatch) -> None:
    """Both sets, on a CPU."""
    from fusedloss.backends import triton
    from fusedloss.backends.cuda import launching
    from fusedloss.bench.machine import probe
    from fusedloss.rowwise import pair_logits, pairs

    monkeypatch.setattr(launching, "extension", lambda: host_extension)
    if reason := triton.why_not(probe("cpu")):
        pytest.skip(f"triton: {reason}")
    for module in (pairs, pair_logits):  # small inputs run as the formula: here they stand for large ones
        monkeypatch.setattr(module, "SMALL", 0)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """Of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, Cells]]:
    rows: dict[str, Cells] = {}
    yield rows
    if WRITES and set(rows) == set(LOSSES):
        tables = {
            "first": table(FIRST, {name: rows[name].first for name in LOSSES}),
            "options": table(OPTIONS, {name: rows[name].options for name in LOSSES}),
            "across": table(ACROSS, {name: rows[name].across for name in LOSSES}),
        }
        PAGE.write_text(TEXT.format(**tables))


def test_every_loss_is_probed():
    assert set(F.__all__) == set(LOSSES) | ALIASES


@pytest.mark.grid
@pytest.mark.parametrize("name", LOSSES)
def test_the_page_says_what_works(name, kernels, group, found):
    first = first_row(name)
    runs_on = [b for b, cell in zip(BACKENDS, first, strict=False) if cell == "yes"]
    found[name] = Cells(first, options_row(name, runs_on), across_row(name))
    if WRITES:
        return
    page = PAGE.read_text()
    for head, cells in zip((FIRST, OPTIONS, ACROSS), found[name], strict=True):
        row = table(head, {name: cells}).splitlines()[2:]
        assert all(line in page for line in row), f"{row}\nis not in {PAGE.name}: run {PROGRAM}"


def test_the_page_has_nothing_else():
    """But rows of losses, whose cells the test above compares."""
    if WRITES:
        return
    page = PAGE.read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    names = [line.split("`")[1] for line in rows]
    assert sorted(set(names), key=names.index) == list(LOSSES) and len(rows) == len(set(rows))
    bare = "\n".join(line for line in page.splitlines() if not line.startswith("| `"))
    empty = {"first": table(FIRST, {}), "options": table(OPTIONS, {}), "across": table(ACROSS, {})}
    assert bare.rstrip() == TEXT.format(**empty).rstrip()


if __name__ == "__main__":
    os.environ["FUSEDLOSS_WRITE_SUPPORT"] = "1"
    sys.exit(pytest.main([__file__, "-q", "-p", "no:xdist"]))
