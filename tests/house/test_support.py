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
from torch.utils._pytree import tree_flatten, tree_unflatten

from fusedloss import UnsupportedError, masks
from fusedloss import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "losses"))
from contract import CASES, Batch, Case
from contract import D as DIM

PROGRAM = "python tests/house/test_support.py"
PAGE = Path(__file__).parents[2] / "docs" / "support.md"
PACKAGE = Path(F.__file__).parent
WRITES = "FUSEDLOSS_WRITE_SUPPORT" in os.environ
REFUSALS = (UnsupportedError, ValueError, TypeError)
BACKENDS = ("reference", "chunked", "dense", "triton", "cuda")
TORCH = BACKENDS[:3]  # in fp64
KERNELS = BACKENDS[3:]
STEP = 1e-5  # of differences in fp64: eps / STEP and STEP^2 are about 1e-11 and 1e-10
NONE = ""  # the loss has no such option


# Every loss, small ----------------------------------------------------------------------------------------------------

ROWS = 5
HELD = {"kl_div_weight": 0.0, "hardness_strength": 0.0}  # of terms that are constants to the gradient, not to the value


LOSSES = [name for name in CASES if "," not in name]  # the call that stands for its loss has the loss's name
FUNCTIONS = {name: getattr(F, name) for name in F.__all__}  # mse_loss and others are there twice


class Draw:
    """Tensors in fp64."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def x(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def index(self, columns: int, *rows: int) -> Tensor:
        return torch.randint(columns, rows or (ROWS,), generator=self.generator)

    def share(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)


class Given(Batch):
    """These tensors in the order in which a call asks for them; without draws, which vmap does not allow."""

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__(ROWS, change=lambda place, x: tensors[place])

    def _leaf(self, x: Tensor) -> Tensor:
        return self.constant(x)

    def _drawn(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bool)

    def _numbers(self, *shape: int) -> Tensor:
        return torch.empty(shape)


def drawn(name: str) -> Case:
    return CASES[name](Batch(ROWS))


def numbers(case: Case) -> dict[str, float]:
    """The parameters that may be tensors with a gradient and that the call gives as a number or not at all."""
    given = list(inspect.signature(case.function).parameters)[: len(case.arguments)]
    values = {
        name: case.options.get(name, 1.25)
        for name, p in inspect.signature(case.loss).parameters.items()
        if p.annotation == "float | Tensor" and name not in given and not name.startswith("teacher_")  # a constant
    }
    return {name: value for name, value in values.items() if isinstance(value, float)}


MODIFIERS = ("adaptive_layer", "matryoshka", "matryoshka_2d")  # which hand options on to info_nce here


def parameters(loss: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(FUNCTIONS[loss]).parameters)


def taken(loss: str) -> dict[str, inspect.Parameter]:
    """The options that a call may have, handed on or not."""
    return parameters("info_nce" if loss in MODIFIERS else loss)


def circle_held(at: Point, **_: Any) -> Callable[..., Tensor]:
    """circle with its weights as they are at the point, constants to its gradient, as its authors have it."""
    (at_point, labels), m, gamma = at.tensors, parameters("circle")["m"].default, at.case().options["gamma"]
    unit = torch.nn.functional.normalize
    same = labels[:, None] == labels
    positive, held = same & ~torch.eye(len(labels), dtype=torch.bool), unit(at_point) @ unit(at_point).T
    return lambda x: circle_of(unit(x) @ unit(x).T, held, positive, ~same, m, gamma)


def list_circle_held(at: Point, **options: Any) -> Callable[..., Tensor]:
    (held, labels, mask), m, gamma = at.tensors, parameters("list_circle")["m"].default, at.case().options["gamma"]
    mask = options.get("mask", mask)
    return lambda s: circle_of(s, held, (labels > 0) & mask, (labels <= 0) & mask, m, gamma)


def circle_of(s: Tensor, held: Tensor, positive: Tensor, negative: Tensor, m: float, gamma: float) -> Tensor:
    both = positive.any(1) & negative.any(1)
    pull = (-gamma * (1 + m - held).relu() * (s - 1 + m)).masked_fill(~positive, -torch.inf)[both].logsumexp(1)
    push = (gamma * (held + m).relu() * (s - m)).masked_fill(~negative, -torch.inf)[both].logsumexp(1)
    return (pull + push).exp().log1p().mean()


HELD_WEIGHTS = {"circle": circle_held, "list_circle": list_circle_held}


# Probes ---------------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """Where a loss is looked at: the tensors that a call draws, then its numbers; `learns`: which have a gradient."""

    name: str
    tensors: list[Tensor]
    learns: list[bool]

    @property
    def learn(self) -> list[Tensor]:
        return [t for t, learns in zip(self.tensors, self.learns, strict=True) if learns]

    @property
    def loss(self) -> str:
        return self.name.split(",")[0]

    @property
    def plain(self) -> bool:
        """Whether the loss has no backends."""
        return not drawn(self.name).takes("backend")

    def case(self) -> Case:
        case = CASES[self.name](Given(self.tensors))
        learnt = dict(zip(reversed(numbers(case)), reversed(self.tensors), strict=False))
        held = {option: value for option, value in HELD.items() if option in parameters(self.loss)}
        return case._replace(options=case.options | learnt | held)

    def call(self, backend: str, **options: Any) -> Callable[..., Tensor]:
        """The loss of `learn` alone. The draws are made here, where torch.compile does not trace them."""
        function, *given = self.case()
        values, structure = tree_flatten(given)
        places = {id(t): place for place, t in enumerate(self.learn)}
        slots = [(slot, places[id(value)]) for slot, value in enumerate(values) if id(value) in places]
        assert len(slots) == len(places)
        options |= {} if self.plain else {"backend": backend}

        def call(*learn: Tensor) -> Tensor:
            filled = list(values)
            for slot, place in slots:
                filled[slot] = learn[place]
            arguments, own = tree_unflatten(filled, structure)
            found = function(*arguments, **own | options)
            return found if "return_stats" in options else first_of(found)

        return call

    def at(self, *tensors: Tensor) -> Point:
        return self._replace(tensors=list(tensors))

    def to(self, *args: Any) -> Point:
        return self.at(*(t.to(*args) if t.is_floating_point() or args == ("meta",) else t for t in self.tensors))

    def other(self) -> Point:
        """Another one, of the same shapes, whose constants fit, too."""
        turned = [t.flip(0) if t.dim() else t for t in self.tensors]
        return self.at(*(1.25 * t if learns else t for t, learns in zip(turned, self.learns, strict=True)))


def point(name: str) -> Point:
    seen: list[Tensor] = []
    case = CASES[name](Batch(ROWS, change=lambda place, x: seen.append(x) or x))
    learnt = [torch.tensor(value, dtype=torch.float64) for value in numbers(case).values()]
    learns = [t.requires_grad for t in seen] + [True] * len(learnt)
    return Point(name, [t.detach() for t in (*seen, *learnt)], learns)


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def first_of(found: Any) -> Tensor:
    """Without statistics, and the sum of what is of rows."""
    return (found[0] if isinstance(found, tuple) else found).sum()


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


def works(probe: Callable[[], None], *remedies: str) -> bool:
    """Whether it does what it should; an error of ours that has one of `remedies` in it says that it does not."""
    try:
        probe()
    except REFUSALS as error:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        ours = frame is not None and PACKAGE in Path(frame.tb_frame.f_code.co_filename).parents
        assert ours and any(remedy in str(error) for remedy in remedies), f"{error}, which does not speak of {remedies}"
        return False
    return True


def held(at: Point, **options: Any) -> Callable[..., Tensor]:
    """The loss whose derivative is the gradient."""
    return HELD_WEIGHTS[at.loss](at, **options) if at.loss in HELD_WEIGHTS else at.call("reference", **options)


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
    if backend in TORCH:
        close(derived(at.call(backend, **options), at.learn), wanted, 1e-9)
        return
    narrow = at.to(torch.float32)
    options = {key: as_float(value) for key, value in options.items()}
    close(derived(narrow.call(backend, **options), narrow.learn), wanted, 2e-5)


def as_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def directions_of(at: Point) -> list[Tensor]:
    draw = Draw(99)
    return [draw.x(*t.shape) if t.dim() else draw.x() for t in at.learn]


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
    """Over all tensors, over each alone, and gradients over all."""
    both = at, at.other()
    count = len(at.tensors)
    options = {} if at.plain else {"backend": backend}
    loss = lambda *tensors: first_of(at.at(*tensors).case().result(**options))
    for dims in ((0,) * count, *(tuple(0 if i == n else None for i in range(count)) for n in range(count))):
        pairs = zip(*(here.tensors for here in both), strict=True)
        stacked = [torch.stack(pair) if dim == 0 else pair[0] for dim, pair in zip(dims, pairs, strict=True)]
        found = torch.func.vmap(loss, in_dims=dims)(*stacked)
        chosen = [at.at(*(t[i] if dim == 0 else t for t, dim in zip(stacked, dims, strict=True))) for i in range(2)]
        close([found], [torch.stack([formula(one)[0] for one in chosen])], 1e-9)
    learns = tuple(place for place, learns in enumerate(at.learns) if learns)
    stacked = [torch.stack(pair) for pair in zip(*(here.tensors for here in both), strict=True)]
    found = torch.func.vmap(torch.func.grad(loss, learns))(*stacked)
    close(found, [torch.stack(pair) for pair in zip(*(formula(here)[1:] for here in both), strict=True)], 1e-9)


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
    across = {"group": dist.group.WORLD, "grad_scale": "sum"}
    across |= {"strategy": strategy} if "strategy" in taken(at.loss) else {}
    close(derived(at.call("chunked", **across, **options), at.learn), formula(at, **options), 1e-9)


# Options --------------------------------------------------------------------------------------------------------------


def takes_masks(parameter: inspect.Parameter | None) -> bool:
    """Whether it may be one of fusedloss.masks."""
    return parameter is not None and "Mask" in str(parameter.annotation)


def options_of(loss: str) -> dict[str, dict[str, Any] | None]:
    """By column of the second table; None: the loss has no such option."""
    draw, has, case = Draw(7), parameters(loss), drawn(loss)
    first, *others = (x for x in case.arguments if isinstance(x, Tensor) and x.dim())
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(
        ("bool", "same_id", "same_group", "score_margin", "guide", "not_self", "smoothing", "stats", "bank", "weight")
    )
    if takes_masks(has.get("mask")):
        taught = sum(name.startswith("teacher_") for name, p in has.items() if p.kind is not p.KEYWORD_ONLY)
        N = sum(map(len, others[: len(others) - taught]))
        ids = draw.index(3, ROWS), draw.index(3, N)
        found["bool"] = {"mask": draw.share(ROWS, N) > 0.4}
        found["same_id"] = {"mask": masks.same_id(*ids)}
        found["same_group"] = {"mask": masks.same_group(*ids)}
        found["score_margin"] = {"mask": masks.score_margin(0.1)}
        found["guide"] = {"mask": masks.guide(draw.x(ROWS, 3).float(), draw.x(N, 3).float())}
        found["not_self"] = {"mask": masks.not_self(1)}
    elif "mask" in has:  # of lists
        found["bool"] = {"mask": (draw.share(*first.shape) > 0.4).index_fill(1, torch.tensor([0, 1]), True)}
    elif takes_masks(has.get("target")):
        found["same_id"] = {"target": masks.same_id(draw.index(3, ROWS), draw.index(3, ROWS))}
    if "label_smoothing" in has:
        found["smoothing"] = {"label_smoothing": 0.2}
    if "return_stats" in has:
        found["stats"] = {"return_stats": True}
    if "bank" in has:
        found["bank"] = {"bank": draw.x(3, first.shape[1])}
        found["bank"] |= {"teacher_bank": draw.x(3, others[-1].shape[1])} if "teacher_bank" in has else {}
    for option in ("weight", "class_weight"):
        if option in has and has[option].default is None:
            found["weight"] = {option: draw.share(*weight_shape(loss, option, first))}
    return found


def weight_shape(loss: str, option: str, first: Tensor) -> tuple[int, ...]:
    """As a call of the contract's table gives it, or else of each element."""
    cases = map(drawn, CASES)
    given = [case.options[option] for case in cases if case.function is FUNCTIONS[loss] and option in case.options]
    return tuple(given[0].shape if given else first.shape)


def argument(options: dict[str, Any]) -> str:
    return next(iter(options))


def with_option(at: Point, backend: str, options: dict[str, Any]) -> None:
    value_and_gradient(at, backend, **options)
    if "return_stats" in options:
        narrow = at if backend in TORCH else at.to(torch.float32)
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
    at = point(name)
    plain, has = at.plain, taken(at.loss)
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
    for strategy, option in (("gather", "group"), ("ring", "strategy")):
        cells.append(said(works(lambda s=strategy: with_group(at, s), "group", "strategy")) if option in has else NONE)
    return cells


def options_row(loss: str, runs_on: Sequence[str]) -> list[str]:
    options = options_of(loss)
    if not any(options.values()):
        return []
    cells = []
    for given in options.values():
        if given is None:
            cells.append(NONE)
            continue
        probed = {b: works(lambda b=b, g=given: with_option(point(loss), b, g), argument(given)) for b in runs_on}
        cells.append(of_backends(probed))
    return cells


def across_row(loss: str) -> list[str]:
    has = parameters(loss)
    if "group" not in has:
        return []
    draw, cells = Draw(8), []
    options = options_of(loss)
    keyword = "negatives" in has and has["negatives"].kind is inspect.Parameter.KEYWORD_ONLY
    options["negatives"] = {"negatives": draw.x(ROWS, 2, DIM)} if keyword else None
    if "teacher_negatives" in has:
        options["negatives"] = {"negatives": draw.x(ROWS, 2, DIM), "teacher_negatives": draw.x(ROWS, 2, 3)}
    options["columns"] = {"target": draw.index(ROWS)} if "target" in has else None
    for given in options.values():
        if given is None:
            cells.append(NONE)
            continue
        probed = {}
        for strategy in ("gather", "ring") if "strategy" in has else ("gather",):
            probe = lambda s=strategy, g=given: with_group(point(loss), s, **g)
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

* *reference, chunked, dense, triton, cuda*: `backend=`. The kernels ran without a GPU: Triton's in its interpreter,
  those of `csrc/` compiled for a CPU.
* *second derivatives* (`create_graph=True`), *torch.func.grad*, *vmap*, *forward mode* (`torch.func.jvp`): yes is on
  `reference` and on `chunked`; a name is the backend that has it. Kernels have second derivatives where `chunked`
  has them, by the formula that it reruns, and none of the others. Where only `reference` has second derivatives, one
  tensor, the gradient, is kept for backward, and there is nothing left to differentiate. vmap
  is over any of the arguments, targets, labels and temperatures too; inside of it, and of the other transforms,
  values are not looked at: a target out of range is a NaN loss. With `group=` there are none of the four.
* *compile*: `torch.compile(fullgraph=True)` on `chunked`, forward and backward.
* *capture*: as a CUDA graph, by the host's path: on tensors without values, forward and backward read nothing back.
  No GPU has run it. Not captured: anything with `group=`, which asks the other ranks' sizes, and `compact=True`.
* *group*, *ring*: `group=` with `strategy="gather"` and `"ring"`; a loss without a ring gathers.

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
    from fusedloss.backends import FEW, triton
    from fusedloss.backends.cuda import launching
    from fusedloss.bench.machine import probe
    from fusedloss.rowwise import pair_logits

    monkeypatch.setattr(launching, "extension", lambda: host_extension)
    if reason := triton.why_not(probe("cpu")):
        pytest.skip(f"triton: {reason}")
    monkeypatch.setattr(pair_logits, "SMALL", 0)  # small inputs run as the formula: here they stand for large ones
    for what in FEW:
        monkeypatch.setitem(FEW, what, 0)


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
    assert {drawn(loss).function for loss in LOSSES} == set(FUNCTIONS.values())
    assert all(drawn(name).function is FUNCTIONS[point(name).loss] for name in CASES)


@pytest.mark.grid
@pytest.mark.parametrize("name", CASES)
def test_the_page_says_what_works(name, kernels, group, found):
    """Of the call that stands for its loss; of any other call, that each cell is one of the good outcomes."""
    first, loss = first_row(name), name
    if loss not in LOSSES:
        return
    runs_on = [b for b, cell in zip(BACKENDS, first, strict=False) if cell == "yes"]
    found[loss] = Cells(first, options_row(loss, runs_on), across_row(loss))
    if WRITES:
        return
    page = PAGE.read_text()
    for head, cells in zip((FIRST, OPTIONS, ACROSS), found[loss], strict=True):
        row = table(head, {loss: cells}).splitlines()[2:]
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
