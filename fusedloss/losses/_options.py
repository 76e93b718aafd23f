"""The options that losses share: declared and documented here, checked here, and handed down as one record.

A loss takes them as `**options: Unpack[SweepOptions]` and makes a `Call` of them. `expanded` shows each of them, with
its default and its line of documentation, to `help()`, `inspect.signature` and the modules.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
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
    """Of a loss that is computed row by row."""


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


class SweepOptions(ReductionOptions, WorkspaceOptions, total=False):
    """Of a loss over in-batch similarities."""


class CountingOptions(SweepOptions, StatsOptions, total=False):
    """Of one that can count what its rows look like."""


class AcrossOptions(SweepOptions, RankOptions, total=False):
    """Of one that also runs over the batches of all ranks."""


class CountingAcrossOptions(CountingOptions, RankOptions, total=False):
    """Of one that does both."""


@dataclass(frozen=True)
class Call:
    """What one call of a loss was asked for; a loss without one of these options has its default."""

    reduction: str = "mean"
    backend: str = "auto"
    workspace_bytes: int | None = None
    return_stats: bool = False
    group: dist.ProcessGroup | str | None = None
    strategy: str = "gather"
    grad_scale: str = "ddp"

    def __post_init__(self) -> None:
        """Those of the ranks are checked by `ranks` and, on all of them, by `distributed.agree`."""
        # A default needs none: half a microsecond a call.
        if self.reduction is not Call.reduction:
            checks.choice("reduction", self.reduction, checks.REDUCTIONS)
        if self.backend is not Call.backend:
            checks.backend(self.backend)
        if self.workspace_bytes is not None:
            checks.count("workspace_bytes", self.workspace_bytes)

    def request(self, what: str, *problems: Problem, ignore_index: int | None = None) -> Request:
        """As ranks agree on it."""
        return Request(what, problems, self.backend, self.reduction, ignore_index)


def ranks(options: RankOptions) -> World | None:
    """The ranks that share the batch, where a group is given; else the other two must be what they are by default."""
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


# What is shown of them ------------------------------------------------------------------------------------------------


def _named(text: str) -> str:
    """With the names of backends; csrc/ has no kernels for rows."""
    for place, names in {"{backends}": checks.NAMES, "{rows}": [n for n in checks.NAMES if n != "cuda"]}.items():
        text = text.replace(place, " or ".join(", ".join(f'"{name}"' for name in names).rsplit(", ", 1)))
    return text


def _documented(*kinds: Any) -> Iterator[tuple[str, str]]:
    """Each option's name and text, on one line."""
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
    """`checks.explained`, with each of the shared options in the signature and under `Args:` of the docstring.

    An option that the docstring has a line for keeps that line.
    """
    *own, options = inspect.signature(function).parameters.values()
    (kind,) = get_args(get_type_hints(function)[options.name])  # of Unpack[kind]
    shared = [FIELDS[name] for name in kind.__annotations__]
    signature = inspect.signature(function).replace(parameters=[*own, *shared])
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__doc__ = _with_options(inspect.cleandoc(function.__doc__ or ""), [p.name for p in shared])
    return checks.explained(function)


def documented(function: Function) -> Function:
    """The function itself, whose docstring has the names of backends: for one that enumerates its options."""
    function.__doc__ = _named(inspect.cleandoc(function.__doc__ or ""))
    return function


def _with_options(doc: str, names: list[str]) -> str:
    doc = _named(doc)
    before, args, after = doc.partition("\nArgs:\n")
    if not args:  # they are those of another loss, which it names
        return doc
    told, blank, rest = after.partition("\n\n")
    known = re.findall(r"^ {4}(\w+): ", told, re.MULTILINE)
    all_texts = TEXTS if "workspace_bytes" in names else ROW_TEXTS
    texts = [f"{name}: {all_texts[name]}" for name in names if name not in known]
    lines = [textwrap.fill(text, 116, initial_indent="    ", subsequent_indent="        ") for text in texts]
    return before + args + "\n".join([told, *lines]) + blank + rest
