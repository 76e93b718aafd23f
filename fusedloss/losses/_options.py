"""The options that losses share: declared and documented here, checked here, and handed down as one record.

A loss takes them as `**options: Unpack[SweepOptions]` and makes a `Call` of them. `expanded` shows each of them, with
its default and its line of documentation, to `help()`, `inspect.signature` and the modules.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ParamSpec, TypedDict, TypeVar, get_args, get_type_hints

import torch.distributed as dist

from ..core import checks
from ..core.problem import Problem
from ..distributed import Request, World, world_of

P = ParamSpec("P")
R = TypeVar("R")
Function = TypeVar("Function", bound=Callable[..., Any])


class ReductionOptions(TypedDict, total=False):
    """reduction: "mean", "sum" or "none"."""

    reduction: str


class BackendOptions(TypedDict, total=False):
    """backend: {backends}."""

    backend: str


class RowBackendOptions(BackendOptions, total=False):
    """backend: {rows}."""


class RowOptions(ReductionOptions, RowBackendOptions, total=False):
    """Options of a loss that is computed row by row."""


class WorkspaceOptions(BackendOptions, total=False):
    """workspace_bytes: the most that the workspace for one chunk of similarities may take; None is the environment's
    FUSEDLOSS_WORKSPACE_BYTES, or else the device's default: 64 MiB on a CPU, about 900 MiB on a GPU. Less memory takes
    longer; results are the same to rounding.
    """

    workspace_bytes: int | None


class StatsOptions(TypedDict, total=False):
    """return_stats: return `(loss, Stats)`: accuracy, mean reciprocal rank and scores, counted in the same sweep."""

    return_stats: bool


class RankOptions(TypedDict, total=False):
    """group: a ProcessGroup whose other ranks' columns compete, too. The result is the mean (or sum) over all ranks'
    rows, on every rank; "none" gives this rank's. See `fusedloss.distributed`.
    strategy: how columns travel: "gather", all at once, or "ring", a shard at a time.
    grad_scale: "ddp" (right after DistributedDataParallel's average), "sum" (this rank's share) or "match:<library>".
    """

    group: dist.ProcessGroup | str | None
    strategy: str
    grad_scale: str


class GroupOptions(TypedDict, total=False):
    """Those of a loss that gathers, because it needs whole rows; see `RankOptions`."""

    group: dist.ProcessGroup | str | None
    grad_scale: str


class SweepOptions(ReductionOptions, WorkspaceOptions, total=False):
    """Options of a loss over in-batch similarities."""


class CountingOptions(SweepOptions, StatsOptions, total=False):
    """Options of one that can also return statistics."""


class AcrossOptions(SweepOptions, RankOptions, total=False):
    """Options of one that also runs over the batches of all ranks."""


class GatherOptions(SweepOptions, GroupOptions, total=False):
    """Options of one that also runs over the batches of all ranks, by whole rows."""


class CountingAcrossOptions(CountingOptions, RankOptions, total=False):
    """Options of one that does both."""


@dataclass(frozen=True)
class Call:
    """The options of one call of a loss; a loss without one of these options has its default."""

    reduction: str = "mean"
    backend: str = "auto"
    workspace_bytes: int | None = None
    return_stats: bool = False
    group: dist.ProcessGroup | str | None = None
    strategy: str = "gather"
    grad_scale: str = "ddp"

    def __post_init__(self) -> None:
        """Checks all but the rank options, which `ranks` checks and `distributed.agree` compares."""
        # A default needs no check, which saves half a microsecond a call.
        if self.reduction is not Call.reduction:
            checks.choice("reduction", self.reduction, checks.REDUCTIONS)
        if self.backend is not Call.backend:
            checks.backend(self.backend)
        if self.workspace_bytes is not None:
            checks.count("workspace_bytes", self.workspace_bytes)

    def request(
        self, what: str, *problems: Problem, ignore_index: int | None = None, stays: tuple[int, ...] = ()
    ) -> Request:
        """Returns this call as the request that ranks agree on."""
        return Request(what, problems, self.backend, self.reduction, ignore_index, stays, self.return_stats)


DEFAULTS = {field.name: field.default for field in fields(Call)}


def are_default(options: Any) -> bool:
    """Whether a call's options are those of a call without any."""
    return not options or options.items() <= DEFAULTS.items()


def ranks(options: RankOptions) -> World | None:
    """Returns the ranks that share the batch. Without a group strategy and grad_scale must be their defaults."""
    group = options.get("group")
    strategy, grad_scale = options.get("strategy", Call.strategy), options.get("grad_scale", Call.grad_scale)
    if group is not None:
        return world_of(group, strategy, grad_scale)
    if (strategy, grad_scale) != (Call.strategy, Call.grad_scale):
        raise ValueError(
            f"group must be given with strategy={strategy!r} and grad_scale={grad_scale!r}, got None; "
            "pass a ProcessGroup, or 'world'"
        )
    return None


def world_of_calls(loss: object, options: Mapping[str, Any]) -> World | None:
    """Returns the ranks over whose batches a modifier calls `loss`: of its options, a partial's, or a module's."""
    while isinstance(loss, functools.partial):
        options = {**loss.keywords, **options}
        loss = loss.args[0] if loss.args else loss.func
    group = options.get("group", getattr(loss, "group", None))
    if not isinstance(group, str) and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        return None  # or the loss refuses it
    named = {n: options.get(n, getattr(loss, n, getattr(Call, n))) for n in ("strategy", "grad_scale")}
    return world_of(group, **named)


def name_of(loss: object) -> str:
    return getattr(loss, "__name__", type(loss).__name__)


# What is shown of them ------------------------------------------------------------------------------------------------


def _named(text: str) -> str:
    """Fills in the names of backends; csrc/ has no kernels for row-wise losses."""
    for place, names in {
        "{backends}": checks.NAMES,
        "{rows}": [n for n in checks.NAMES if n not in ("cuda", "dense")],
    }.items():
        text = text.replace(place, " or ".join(", ".join(f'"{name}"' for name in names).rsplit(", ", 1)))
    return text


def _documented(*kinds: Any) -> Iterator[tuple[str, str]]:
    """Yields each option's name and text, on one line."""
    for kind in kinds:
        _, *parts = re.split(r"^ *(\w+): ", inspect.cleandoc(kind.__doc__ or ""), flags=re.MULTILINE)
        for name, text in zip(parts[::2], parts[1::2], strict=True):
            yield name, _named(" ".join(text.split()))


TEXTS = dict(_documented(ReductionOptions, BackendOptions, WorkspaceOptions, StatsOptions, RankOptions))
ROW_TEXTS = TEXTS | dict(_documented(RowBackendOptions))
FIELDS = {
    field.name: inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
    )
    for field in fields(Call)
}


def expanded(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates with `checks.explained`, and adds the shared options to the signature and to the docstring's `Args:`.

    An option that already has a line in the docstring keeps it.
    """
    *own, options = inspect.signature(function).parameters.values()
    (kind,) = get_args(get_type_hints(function)[options.name])  # of Unpack[kind]
    shared = [FIELDS[name] for name in kind.__annotations__]
    signature = inspect.signature(function).replace(parameters=[*own, *shared])
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__doc__ = _with_options(inspect.cleandoc(function.__doc__ or ""), [p.name for p in shared])
    return checks.explained(function)


def documented(function: Function) -> Function:
    """Fills the names of backends into the docstring of a function that enumerates its options."""
    function.__doc__ = _named(inspect.cleandoc(function.__doc__ or ""))
    return function


def _with_options(doc: str, names: list[str]) -> str:
    doc = _named(doc)
    before, args, after = doc.partition("\nArgs:\n")
    if not args:  # the docstring refers to another loss's arguments
        return doc
    told, blank, rest = after.partition("\n\n")
    known = re.findall(r"^ {4}(\w+): ", told, re.MULTILINE)
    all_texts = TEXTS if "workspace_bytes" in names else ROW_TEXTS
    texts = [f"{name}: {all_texts[name]}" for name in names if name not in known]
    lines = [textwrap.fill(text, 116, initial_indent="    ", subsequent_indent="        ") for text in texts]
    return before + args + "\n".join([told, *lines]) + blank + rest
