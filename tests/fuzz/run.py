"""A case in all its forms, each held against the same exact result; and a run of many cases."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fusedloss
from fusedloss import UnsupportedError

from . import classes, in_batch, labelled, lists, neighbours, pairs  # noqa: F401  # they register their drawers
from .arithmetic import Budget, compare, stats_dtype, wide_numbers
from .cases import DRAWERS, Case, Ops, Rows
from .draw import Draw
from .known import known

WORKSPACE = "workspace_bytes"


@dataclass
class Failure:
    form: str
    what: str
    row: str | None = None  # of the list of known faults

    def __str__(self) -> str:
        return f"{self.form}: {self.what}"


@dataclass
class Outcome:
    name: str
    seed: int
    case: Case | None = None
    unclear: bool = False
    compared: int = 0
    worst: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    shares: list[tuple[float, str]] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(f.row is None for f in self.failures)

    @property
    def known(self) -> list[str]:
        return sorted({f.row for f in self.failures if f.row})


@dataclass
class Form:
    """A way to call: what is called, with what, and what is exact then."""

    label: str
    function: Callable[..., Any]
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    value: Tensor
    gradients: dict[str, Tensor]
    deviations: Callable[[int], dict[str, Tensor]]  # of `eager`: its root mean square
    upstream: Tensor | None


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN: what is read before it is written shows."""
    deterministic = torch.utils.deterministic
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
              deterministic.fill_uninitialized_memory)  # fmt: skip
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = before[2]


def function(name: str) -> Callable[..., Any]:
    return fusedloss.search.top_k if name == "top_k" else getattr(fusedloss.functional, name)


def module(case: Case) -> Callable[..., Any]:
    """The module as a function: what its constructor takes goes there."""
    kind = getattr(fusedloss, case.module)
    takes = set(getattr(kind, "signature", inspect.signature(kind)).parameters) - {"self"}
    takes -= {n for n in takes if n in case.tensors and n not in case.traits.get("in_constructor", ())
              and n not in ("temperature", "scale", "student_temperature", "teacher_temperature")}  # fmt: skip

    def call(*args: Any, **kwargs: Any) -> Any:
        made = kind(**{n: x for n, x in kwargs.items() if n in takes})
        repr(made)
        return made(*args, **{n: x for n, x in kwargs.items() if n not in takes})

    return call


def group() -> Any:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


# Forms ----------------------------------------------------------------------------------------------------------------


def permuted(case: Case, base: Form, d: Draw) -> Form | None:
    """Rows and columns in another order."""
    ignored = case.options.get("ignore_index", -100) >= 0
    sizes: dict[str, int] = {}
    for name, axes in case.axes.items():
        if name in case.tensors:
            sizes |= {a: case.tensors[name].shape[i] for i, a in enumerate(axes) if a}
    orders = {a: d.permutation(n) for a, n in sizes.items() if n > 1 and not (ignored and a in case.points.values())}
    if not orders:
        return None

    def turn(name: str, x: Tensor) -> Tensor:
        for i, a in enumerate(case.axes.get(name, ())):
            if a in orders:
                x = x.index_select(i, orders[a])
        return x

    tensors = {n: turn(n, x) for n, x in base.tensors.items()}
    for name, axis in case.points.items():
        if axis in orders and name in tensors:
            x, inverse = tensors[name], orders[axis].argsort()
            inside = (x >= 0) & (x < len(inverse))
            tensors[name] = torch.where(inside, inverse[x.clamp(0, len(inverse) - 1)], x)
    value, upstream, order = base.value, base.upstream, None
    if value.dim():
        if case.rows_axis == "pairs" and "row" in orders:
            order = torch.cat([orders["row"], orders["row"] + len(orders["row"])])
        elif case.rows_axis in orders:
            order = orders[case.rows_axis]
        elif case.rows_axis is None and case.axes:
            return None
        else:
            order = torch.arange(len(value))
        value, upstream = value[order], None if upstream is None else upstream[order]

    def turned(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: turn(n, x) if n != "value" else x if order is None else x[order] for n, x in found.items()}

    return Form(
        f"permuted {' and '.join(orders)}", base.function, {n: d.lay(x) for n, x in tensors.items()}, base.options,
        value,
        turned(base.gradients), lambda draws: turned(base.deviations(draws)), upstream,
    )  # fmt: skip


def _rowwise(case: Case, base: Form, change: Callable[[Tensor, int], Tensor]) -> dict[str, Tensor]:
    found = dict(base.tensors)
    for name, axes in case.axes.items():
        if name in found and case.independent in axes:
            found[name] = change(found[name], axes.index(case.independent))
    return found


def doubled(case: Case, base: Form, reduction: str) -> Form | None:
    """Every row twice: the mean is the same."""
    tensors = _rowwise(case, base, lambda x, i: torch.cat([x, x], i))
    half, factor = (0.5, 1.0) if reduction == "mean" else (1.0, 2.0)

    def grad(name: str, x: Tensor) -> Tensor:
        axes = case.axes.get(name, ())
        if case.independent in axes:
            return half * torch.cat([x, x], axes.index(case.independent))
        return factor * x

    return Form("doubled", base.function, tensors, base.options, base.value * factor,
                {n: grad(n, x) for n, x in base.gradients.items()},
                lambda k: {n: x * factor if n == "value" else grad(n, x) for n, x in base.deviations(k).items()},
                None)  # fmt: skip


def left_out(case: Case, base: Form) -> Form | None:
    """Without the rows that do not count."""
    assert case.counted is not None
    wide = {n: x.double() if x.dtype.is_floating_point else x for n, x in case.tensors.items()}
    kept = case.counted(Ops(case.dtype), SimpleNamespace(**wide)).nonzero()[:, 0]
    if not len(kept) or len(kept) == len(case.tensors["target"]):
        return None

    def grad(name: str, x: Tensor) -> Tensor:
        axes = case.axes.get(name, ())
        return x.index_select(axes.index(case.independent), kept) if case.independent in axes else x

    return Form("without the rows that are left out", base.function,
                _rowwise(case, base, lambda x, i: x.index_select(i, kept)), base.options, base.value,
                {n: grad(n, x) for n, x in base.gradients.items()},
                lambda k: {n: x if n == "value" else grad(n, x) for n, x in base.deviations(k).items()},
                None)  # fmt: skip


def banked(base: Form) -> Form:
    """The bank among the keys."""
    tensors = {n: x for n, x in base.tensors.items() if n != "bank"}
    tensors["key"] = torch.cat([base.tensors["key"], base.tensors["bank"]])
    gradients = {n: x for n, x in base.gradients.items() if n != "key"}
    return Form("bank among the keys", base.function, tensors, base.options, base.value, gradients, base.deviations,
                base.upstream)  # fmt: skip


def forms(case: Case, d: Draw, shape: torch.Size, rows_shape: torch.Size, cuda: bool) -> Iterator[Form]:
    """The case by itself and in other forms, of which most are drawn."""
    call, options = function(case.name), dict(case.options)
    takes = inspect.signature(call).parameters
    reduction = case.reduction()

    def exact(label: str, chosen: str | None, options: dict[str, Any], shape: torch.Size) -> Form:
        upstream = d.normal(*shape).to(case.result_dtype or stats_dtype(case.dtype)) if len(shape) else None
        budget = Budget(case.exact(Ops(case.dtype), chosen), case.tensors, case.grads, case.dtype, upstream)
        return Form(label, call, case.tensors, options, budget.value, budget.gradients, budget.rms, upstream)

    base = exact("", reduction, options, shape)

    def like(label: str, source: Form = base, **changes: Any) -> Form:
        return Form(**{**vars(source), "label": label, **changes})

    backends = [b for b in case.backends if "backend" in takes or case.traits.get("inner")]
    size = sum(x.numel() for x in case.tensors.values())
    if not backends:
        yield like("as it is")
    for backend in backends:
        # Its interpreter takes a second or two a call.
        if backend == "triton" and not (size < 1500 and d.chance(0.004 if case.traits.get("inner") else 0.03)):
            continue
        yield like(f"backend={backend!r}", options={**options, "backend": backend})
    if WORKSPACE in takes and backends:  # of losses over in-batch similarities
        yield like("backend='dense'", options={**options, "backend": "dense"})
    if cuda and backends and size < 4000 and d.chance(0.3):
        yield like("backend='cuda'", options={**options, "backend": "cuda"})
    backend = {"backend": d.pick(*backends[:2])} if backends else {}
    if WORKSPACE in takes and d.chance(0.4):
        few = 2 ** d.whole(6, 14)
        yield like(f"{WORKSPACE}={few}", options={**options, **backend, WORKSPACE: few})
    if case.module and d.chance(0.4):
        yield like(f"{case.module}", function=module(case), options={**options, **backend})
    if case.takes_group and d.chance(0.35):
        strategy = d.pick("gather", "ring") if case.traits.get("ring", True) else "gather"
        given = {**options, "group": group(), "strategy": strategy}
        if d.chance(0.3):
            given["grad_scale"] = "sum"
        if backend.get("backend") == "chunked" and d.chance(0.5):
            given |= backend
        yield like(f"a group of one, {strategy}", options=given)
    chosen = like("", options={**options, **backend})
    if case.axes and d.chance(0.4) and (form := permuted(case, chosen, d)):
        yield form
    if case.independent and reduction in ("mean", "sum") and d.chance(0.3):
        yield doubled(case, chosen, reduction)
    if case.independent and case.counted and reduction in ("mean", "sum") and d.chance(0.4):
        if form := left_out(case, chosen):
            yield form
    if case.name == "info_nce" and "bank" in case.tensors and d.chance(0.5):
        yield banked(chosen)
    if "weight" in case.tensors and reduction == "mean" and d.chance(0.3):
        # A mean over class probabilities is one over rows.
        if case.name in ("info_nce", "linear_cross_entropy") or case.traits.get("probabilities") is False:
            yield like("weights doubled", chosen, tensors={**case.tensors, "weight": case.tensors["weight"] * 2})
    if case.stats and d.chance(0.3):
        yield like("statistics", options={**options, **backend, "return_stats": True})
    for other in case.reductions:
        if other != reduction and d.chance(0.3):
            sizes = rows_shape if other == "none" else torch.Size()
            yield exact(f"reduction={other!r}", other, {**options, **backend, "reduction": other}, sizes)


# One case -------------------------------------------------------------------------------------------------------------


def attempt(case: Case, form: Form, unclear: bool) -> tuple[list[str], list[tuple[float, str]]]:
    """What is wrong with a form's result, and each error as a share of what is allowed."""
    leaves, before, versions = {}, {}, {}
    wanted = [n for n in case.grads if n in form.gradients or n in form.tensors]
    for name, x in form.tensors.items():
        before[name], versions[name] = x.detach().clone(), x._version
        leaves[name] = x.detach().requires_grad_() if name in wanted else x
    options, stats = dict(form.options), None
    while True:
        try:
            found = case.call(form.function, leaves, options)
            break
        except ValueError as error:
            # Less than one row's room is refused, in so many words.
            if WORKSPACE not in options or WORKSPACE not in str(error) or options[WORKSPACE] > 2**24:
                raise
            options[WORKSPACE] *= 4
    if isinstance(found, tuple):
        found, stats = found
    wrong: list[str] = []
    result_dtype = case.result_dtype or stats_dtype(case.dtype)
    if found.dtype != result_dtype:
        wrong.append(f"the result is {found.dtype}, not {result_dtype}")
    if found.shape != form.value.shape:
        return [f"the result has shape {list(found.shape)}, not {list(form.value.shape)}"], []
    gradients: dict[str, Tensor] = {}
    learn = [n for n in wanted if n in form.gradients]
    if learn and found.requires_grad:
        total = found if form.upstream is None else (found * form.upstream.to(found.dtype)).sum()
        got = torch.autograd.grad(total, [leaves[n] for n in learn], allow_unused=True, materialize_grads=True)
        gradients = dict(zip(learn, got, strict=True))
    elif learn and any(bool((form.gradients[n] != 0).any()) for n in learn):
        wrong.append("the result has no gradient")
    for name, x in form.tensors.items():
        if x._version != versions[name]:
            wrong.append(f"{name} was written to")
        same = x == before[name]
        if x.dtype.is_floating_point:
            same = same | (x.isnan() & before[name].isnan())
        if not bool(same.all()):
            wrong.append(f"{name} was changed")
    results = {"value": found.detach(), **gradients}
    shares: list[tuple[float, str]] = []
    for name, x in results.items():
        exact = form.value if name == "value" else form.gradients[name]
        if name != "value" and x.dtype != form.tensors[name].dtype:
            wrong.append(f"the gradient of {name} is {x.dtype}")
        if unclear:
            if bool((x.isnan() & ~exact.isnan()).any()):
                wrong.append(f"{name} is NaN")
            continue
        if name in case.unsure:
            continue
        x = x.reshape(exact.shape)
        share = compare(x, exact, lambda draws, name=name: form.deviations(draws)[name])
        shares.append((share, f"{form.label}: {name}"))
        if not share <= 1:
            place = (x.double() - exact).abs().nan_to_num(math.inf).flatten().argmax()
            wrong.append(f"{name} is {x.flatten()[place].item():.9g} for {exact.flatten()[place].item():.9g}"
                         f" ({share:.3g} of what is allowed)")  # fmt: skip
    if stats is not None and case.stats is not None and not unclear:
        ops = Ops(case.dtype)
        wide = {n: x.double() if x.dtype.is_floating_point else x for n, x in form.tensors.items()}
        with wide_numbers():
            want = case.stats(ops, SimpleNamespace(**wide))
        for name, exact in want.items():
            got = getattr(stats, name)
            allowed = 64 * ops.unit * (1 + max(x.abs().item() for x in want.values()))
            if not ops.unclear and not (got.double() - exact).abs().item() <= allowed:
                wrong.append(f"stats.{name} is {got.item():.9g} for {exact.item():.9g}")
    return wrong, shares


def run(name: str, seed: int, *, cuda: bool = False) -> Outcome:
    outcome = Outcome(name, seed)
    d = Draw(f"{name}:{seed}")
    case = outcome.case = DRAWERS[name](d)
    ops = Ops(case.dtype)
    wide = {n: x.double() if x.dtype.is_floating_point else x for n, x in case.tensors.items()}
    with wide_numbers():
        found = case.formula(ops, SimpleNamespace(**wide))
    outcome.unclear = ops.unclear > 0
    rows = found.losses.shape if isinstance(found, Rows) else found.shape
    shape = found.reduced(case.reduction() or "mean").shape if isinstance(found, Rows) else rows
    with poisoned(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for form in forms(case, d, shape, rows, cuda):
            try:
                wrong, shares = attempt(case, form, outcome.unclear)
            except UnsupportedError:
                continue
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                wrong, shares = (
                    [f"{type(error).__name__}: {error} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"],
                    [],
                )
            outcome.compared += max(len(shares), 1)
            outcome.shares += shares
            outcome.failures += [Failure(form.label, what, known(case, form.label, what)) for what in wrong]
            finite = [share for share, _ in shares if share <= 1]
            outcome.worst = max([outcome.worst, *finite])
    return outcome


def describe(outcome: Outcome) -> str:
    case = outcome.case
    assert case is not None
    lines = [f"{case.name} {case.dtype}".replace("torch.", "")]
    for name, x in case.tensors.items():
        learnt = ", gradient" if name in case.grads else ""
        lines.append(f"    {name}: {str(x.dtype)[6:]} {list(x.shape)}, strides {list(x.stride())}{learnt}")
    lines += [f"    {name}={value!r}" for name, value in case.options.items()]
    lines += [f"    ({name}: {value})" for name, value in case.traits.items()]
    return "\n".join(lines)


# Many -----------------------------------------------------------------------------------------------------------------


@dataclass
class Count:
    cases: int = 0
    compared: int = 0
    unclear: int = 0
    known: int = 0
    failed: int = 0
    worst: float = 0.0

    def add(self, outcome: Outcome) -> None:
        self.cases += 1
        self.compared += outcome.compared
        self.unclear += outcome.unclear
        self.known += bool(outcome.known) and not outcome.failed
        self.failed += outcome.failed
        self.worst = max(self.worst, outcome.worst)


def table(counts: dict[str, Count]) -> str:
    rows = [("function", "cases", "comparisons", "at a threshold", "known faults", "failed", "largest share")]
    total = Count()
    for name, c in sorted(counts.items()):
        rows.append((name, *map(str, (c.cases, c.compared, c.unclear, c.known, c.failed)), f"{c.worst:.2f}"))
        for part in ("cases", "compared", "unclear", "known", "failed"):
            setattr(total, part, getattr(total, part) + getattr(c, part))
        total.worst = max(total.worst, c.worst)
    rows.append(
        (
            "all",
            *map(str, (total.cases, total.compared, total.unclear, total.known, total.failed)),
            f"{total.worst:.2f}",
        )
    )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def search(names: list[str], first: int, cases: int | None, seconds: float | None, cuda: bool) -> int:
    """Functions in turn, seeds from `first`. Gives the number of cases that failed."""
    counts: dict[str, Count] = {name: Count() for name in names}
    rows: dict[str, list[str]] = {}
    start, done, shown, failed = time.monotonic(), 0, 0.0, 0
    live = sys.stderr.isatty()
    try:
        while (cases is None or done < cases) and (seconds is None or time.monotonic() - start < seconds):
            name, seed = names[done % len(names)], first + done // len(names)
            outcome = run(name, seed, cuda=cuda)
            counts[name].add(outcome)
            done += 1
            for row in outcome.known:
                rows.setdefault(row, []).append(f"{name}:{seed}")
            if outcome.failed:
                failed += 1
                print(f"{name}:{seed} failed; python -m tests.fuzz --replay {name}:{seed}", flush=True)
                for failure in [f for f in outcome.failures if f.row is None][:4]:
                    print(f"    {str(failure)[:300]}", flush=True)
            passed = time.monotonic() - start
            if passed - shown > (0.2 if live else 60):
                shown = passed
                goal = "" if cases is None else f" of {cases}"
                left = "" if seconds is None else f" of {seconds:.0f}"
                print(f"{done}{goal} cases, {passed:.0f}{left} s, {failed} failed: {name}:{seed}".ljust(90),
                      end="\r" if live else "\n", file=sys.stderr, flush=True)  # fmt: skip
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
    print(table({n: c for n, c in counts.items() if c.cases}))
    for row, seeds in sorted(rows.items()):
        print(f"known, {row}: {len(seeds)} cases, such as {', '.join(seeds[:5])}")
    print(f"{done} cases in {time.monotonic() - start:.0f} s, seeds from {first}; {failed} failed")
    return failed
