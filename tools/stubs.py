"""Writes fusedloss/nn.pyi and fusedloss/functional.pyi from the functions' signatures: `python tools/stubs.py`.

A module's constructor is made at run time, where no type checker looks; and what a loss returns hangs on
`return_stats`, which takes overloads. `tests/house/test_types.py` holds the committed stubs to what this writes.
"""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fusedloss import functional, nn
from fusedloss.losses import _options
from fusedloss.losses._module import LossModule

PACKAGE = Path(nn.__file__).parent
WIDTH = 120
HEAD = "# Written by tools/stubs.py from the signatures of the functions.\n# ruff: noqa: I001\n\n"
PLAIN = (bool, int, float, str, tuple, type(None))
# return_stats as it is declared, and what is returned; {} is the class of the statistics.
STATS = {
    "Literal[False] = False": "Tensor",
    "Literal[True]": "tuple[Tensor, {}]",
    "bool": "Tensor | tuple[Tensor, {}]",
}
Parameters = list[inspect.Parameter]


def modules() -> dict[str, type[LossModule]]:
    """By each name, in the order in which they stand."""
    return {
        name: value for name, value in vars(nn).items() if inspect.isclass(value) and value.__module__ == nn.__name__
    }


class Names:
    """What the annotations name, as import lines."""

    def __init__(self) -> None:
        self.lines: set[str] = set()

    def add(self, annotation: str, *scopes: dict[str, Any]) -> None:
        for node in ast.walk(ast.parse(annotation)):
            if not isinstance(node, ast.Name):
                continue
            value = next((scope[node.id] for scope in scopes if node.id in scope), None)
            if isinstance(value, types.ModuleType):
                self.lines.add(f"import {value.__name__} as {node.id}")
            elif value is not None:
                home = getattr(value, "__module__", None) if getattr(value, "__name__", None) == node.id else None
                self.lines.add(f"from {home or scopes[0]['__name__']} import {node.id}")

    def __str__(self) -> str:
        return "\n".join(sorted(self.lines))


def text(parameters: Iterable[inspect.Parameter]) -> Iterator[str]:
    """Each as it is declared, with the marks between the kinds."""
    starred = False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not starred:
            yield "*"
        starred |= p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        mark = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        given = "" if p.default is p.empty else f" = {shown(p.default)}"
        yield f"{mark}{p.name}: {p.annotation}{given}"


def shown(default: object) -> str:
    return repr(default).replace("'", '"') if isinstance(default, PLAIN) else "..."


def definition(name: str, parameters: Iterable[str], result: str, indent: str = "") -> str:
    listed = list(parameters)
    line = f"{indent}def {name}({', '.join(listed)}) -> {result}: ..."
    if len(line) <= WIDTH:
        return line
    middle = f"{indent}    {', '.join(listed)}"
    body = middle if len(middle) <= WIDTH else "\n".join(f"{indent}    {p}," for p in listed)
    return f"{indent}def {name}(\n{body}\n{indent}) -> {result}: ..."


def annotated(parameters: Iterable[inspect.Parameter], names: Names, *scopes: dict[str, Any]) -> Parameters:
    """With annotations as text. Where torch gives none, or an old name, they are ours of the same name."""
    found = []
    for p in parameters:
        written = p.annotation
        if not isinstance(written, str):
            written = OURS.get(p.name) if written is p.empty else inspect.formatannotation(written)
            written = str(written).replace("torch.Tensor", "Tensor")
        names.add(written, *scopes)
        found.append(p.replace(annotation=written))
    return found


OURS = {"size_average": "bool | None", "reduce": "bool | None"}


def scope_of(function: Callable[..., Any]) -> tuple[dict[str, Any], ...]:
    return inspect.unwrap(function).__globals__, vars(_options)


def stats_of(function: Callable[..., Any]) -> str:
    return "TokenStats" if "TokenStats" in str(inspect.signature(function).return_annotation) else "Stats"


def overloaded(
    name: str, parameters: Parameters, first: str, result: str, indent: str = "", stats: str = "Stats"
) -> str:
    """One definition for each of STATS, or one. {} in `first` and `result` is for what is returned."""
    if all(p.name != "return_stats" for p in parameters):
        return definition(name, [first, *text(parameters)], result, indent)
    forms = []
    for declared, returned in ((declared, returned.format(stats)) for declared, returned in STATS.items()):
        told = [f"return_stats: {declared}" if t.startswith("return_stats: ") else t for t in text(parameters)]
        stars = [t for t in told[: told.index(f"return_stats: {declared}")] if t.startswith("*")]
        if "=" not in declared and not stars:  # required, behind others that are not
            told = ["*", *(t for t in told if t != "*")]
        before = [first.format(returned)] if first else []
        forms.append(f"{indent}@overload\n{definition(name, [*before, *told], result.format(returned), indent)}")
    return "\n".join(forms)


def functional_stub() -> str:
    names, parts = Names(), []
    for name in functional.__all__:
        function = getattr(functional, name)
        signature = inspect.signature(function)
        if "return_stats" not in signature.parameters:
            names.lines.add(f"from {inspect.unwrap(function).__module__} import {name} as {name}")
            continue
        parameters = annotated(signature.parameters.values(), names, *scope_of(function))
        parts.append(overloaded(name, parameters, "", "{}", stats=stats_of(function)))
    names.lines |= {"from typing import Literal", "from typing import overload", "from torch import Tensor"}
    names.lines |= {f"from fusedloss.core.problem import {stats}" for stats in ("Stats", "TokenStats")}
    return f"{HEAD}{names}\n\n" + "\n".join(parts) + "\n"


def nn_stub() -> str:
    names, parts = Names(), []
    for name, cls in modules().items():
        if name != cls.__name__:
            parts.append(f"{name} = {cls.__name__}")
            continue
        scopes = scope_of(cls.function)
        options = annotated(cls.signature.parameters.values(), names, *scopes)
        function = inspect.signature(cls.function).parameters
        inputs = [p for n, p in function.items() if n in cls.inputs or p.kind is p.VAR_POSITIONAL]
        counts = "return_stats" in cls.signature.parameters
        bases = [base.__name__ if base is LossModule else f"torch.nn.{base.__name__}" for base in cls.__bases__]
        first = f"self: {name}[{{}}]" if counts else "self"
        made = overloaded("__init__", options, first, "None", "    ", stats_of(cls.function))
        takes = ["self", *text(annotated(inputs, names, *scopes))]
        forward = definition("forward", takes, "R" if counts else "Tensor", "    ")
        bases += ["Generic[R]"] if counts else []
        parts.append(f"class {name}({', '.join(bases)}):\n{made}\n{forward}\n    __call__ = forward")
    names.lines |= {"from typing import Generic", "from typing import Literal", "from typing import overload"}
    names.lines |= {f"from fusedloss.core.problem import {stats}" for stats in ("Stats", "TokenStats")}
    names.lines |= {"import torch.nn", "from torch import Tensor"}
    names.lines |= {"from fusedloss.losses._module import LossModule", "from typing_extensions import TypeVar"}
    return f'{HEAD}{names}\n\nR = TypeVar("R", default=Tensor)\n\n' + "\n\n".join(parts) + "\n"


def stubs() -> dict[Path, str]:
    return {PACKAGE / "nn.pyi": nn_stub(), PACKAGE / "functional.pyi": functional_stub()}


if __name__ == "__main__":
    for path, content in stubs().items():
        path.write_text(content)
