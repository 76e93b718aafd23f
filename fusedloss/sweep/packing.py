"""A `Problem` apart from its tensors, and as the flat lists that an op's schema can hold.

Both walk the fields that the records declare: a field that is added to one of them is packed without a line here.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import is_dataclass
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from ..core.errors import UnsupportedError
from ..core.mask import NO_MASK, Compare, Guide, GuideRule, Mask
from ..core.problem import Beside, Block, Fold, Learned, Margin, Problem, Ranks, Targets
from ..core.transforms import Transform


class Kind(NamedTuple):
    """What a field holds: a leaf (`input`, `constant`, `int`, `bool`, `float`, `str`, `function`), or others."""

    name: str
    of: tuple[Kind, ...] = ()  # optional, many (a tuple of any length), each (a tuple of these)
    record: type | None = None


def _kind(hint: Any) -> Kind:
    if hint is Learned:
        return Kind("input")
    if hint is Tensor:
        return Kind("constant")
    if hint in (int, bool, float, str):
        return Kind(hint.__name__)
    if get_origin(hint) is Callable:
        return Kind("function")
    arguments = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = (_kind(a) for a in arguments if a is not type(None))
        return Kind("optional", (inner,))
    if get_origin(hint) is tuple:
        if arguments[-1] is ...:
            return Kind("many", (_kind(arguments[0]),))
        return Kind("each", tuple(_kind(a) for a in arguments))
    return Kind("record", (), hint)


def _holds_tensors(kind: Kind) -> bool:
    if kind.record is not None:
        return any(_holds_tensors(k) for _, k in FIELDS[kind.record])
    return kind.name in ("input", "constant") or any(_holds_tensors(k) for k in kind.of)


_ROOT = Kind("record", (), Problem)
FIELDS: dict[type, tuple[tuple[str, Kind], ...]] = {
    record: tuple((name, _kind(hint)) for name, hint in get_type_hints(record, include_extras=True).items())
    for record in (Compare, Guide, GuideRule, Margin, Mask, Ranks, Transform, Targets, Beside, Block, Fold, Problem)
}
# Those that hold tensors, where they are not None; and the name of the leaf, of a field that is one.
_TENSORS = {
    record: tuple(
        (name, inner, inner.name if inner.name in ("input", "constant") else "")
        for name, kind in fields
        if _holds_tensors(kind)
        for inner in (kind.of if kind.name == "optional" else (kind,))
    )
    for record, fields in FIELDS.items()
}
_DATACLASSES = frozenset(record for record in FIELDS if is_dataclass(record))
_EMPTY = ()


# Apart from its tensors -----------------------------------------------------------------------------------------------


class _Place:
    """Where a tensor was."""


_PLACE = _Place()


def take_apart(problem: Problem) -> tuple[Problem, list[Tensor], list[Tensor]]:
    """The problem with its tensors taken out; those that may receive a gradient, and the others."""
    inputs: list[Tensor] = []
    constants: list[Tensor] = []

    def take(tensor: Tensor, name: str) -> _Place:
        (inputs if name == "input" else constants).append(tensor)
        return _PLACE

    return _mapped(problem, _ROOT, take), inputs, constants


def put_together(empty: Problem, inputs: Iterable[Tensor], constants: Iterable[Tensor]) -> Problem:
    """The inverse of `take_apart`."""
    tensors = {"input": iter(inputs), "constant": iter(constants)}
    return _mapped(empty, _ROOT, lambda _, name: next(tensors[name]))


def _mapped(value: Any, kind: Kind, function: Any) -> Any:
    """The value with each tensor replaced, in the order of fields; a record that holds none stays as it is."""
    if kind.record is None:
        if kind.name in ("input", "constant"):
            return function(value, kind.name)
        return tuple([_mapped(v, k, function) for v, k in zip(value, _inner(kind, len(value)), strict=True)])
    found = {}
    for name, k, leaf in _TENSORS[kind.record]:
        field = getattr(value, name)
        if field is not None and field is not _EMPTY and field is not NO_MASK:
            found[name] = function(field, leaf) if leaf else _mapped(field, k, function)
    if not found:
        return value
    if kind.record not in _DATACLASSES:
        return value._replace(**found)
    copy: Any = object.__new__(kind.record)  # past __post_init__, which takes tensors
    copy.__dict__.update(value.__dict__, **found)
    return copy


def _inner(kind: Kind, length: int) -> tuple[Kind, ...]:
    return kind.of * length if kind.name == "many" else kind.of


# As an op takes it ----------------------------------------------------------------------------------------------------


class Flat(NamedTuple):
    """Each leaf in the order of fields; before what is optional, whether it is there, before many, how many."""

    inputs: list[Tensor]
    constants: list[Tensor]
    ints: list[int]
    floats: list[float]
    names: str  # one a line


def pack(problem: Problem) -> Flat:
    """torch.compile traces this."""
    flat: dict[str, list[Any]] = {name: [] for name in ("input", "constant", "int", "float", "str")}
    _write(problem, _ROOT, flat)
    return Flat(flat["input"], flat["constant"], flat["int"], flat["float"], "\n".join(flat["str"]))


def _write(value: Any, kind: Kind, flat: dict[str, list[Any]]) -> None:
    if kind.record is not None:
        for name, k in FIELDS[kind.record]:
            _write(getattr(value, name), k, flat)
    elif kind.name == "optional":
        flat["int"].append(int(value is not None))
        if value is not None:
            _write(value, kind.of[0], flat)
    elif kind.name in ("many", "each"):
        if kind.name == "many":
            flat["int"].append(len(value))
        for v, k in zip(value, _inner(kind, len(value)), strict=True):
            _write(v, k, flat)
    elif kind.name == "function":
        raise UnsupportedError(
            "transform must be one of fusedloss.transforms under torch.compile, got a function; keep the loss outside "
            "of the compiled part"
        )
    elif kind.name == "bool":
        flat["int"].append(int(value))
    else:
        flat[kind.name].append(value)


def unpack(flat: Flat) -> Problem:
    """The inverse of `pack`."""
    leaves = {
        "input": iter(flat.inputs),
        "constant": iter(flat.constants),
        "int": iter(flat.ints),
        "float": iter(flat.floats),
        "str": iter(flat.names.split("\n")),
    }
    return _read(_ROOT, leaves)


def _read(kind: Kind, leaves: dict[str, Iterator[Any]]) -> Any:
    if kind.record is not None:
        return kind.record(**{name: _read(k, leaves) for name, k in FIELDS[kind.record]})
    if kind.name == "optional":
        return _read(kind.of[0], leaves) if next(leaves["int"]) else None
    if kind.name in ("many", "each"):
        length = next(leaves["int"]) if kind.name == "many" else len(kind.of)
        return tuple([_read(k, leaves) for k in _inner(kind, length)])
    return bool(next(leaves["int"])) if kind.name == "bool" else next(leaves[kind.name])
