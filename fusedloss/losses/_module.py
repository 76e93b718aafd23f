"""Every loss's `nn.Module` twin: options in the constructor, tensors in `forward`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from .. import checks, distributed

# Those that a constructor can check before there are embeddings, by name: a name means the same in every loss.
CHECKS: dict[str, Callable[[Any], None]] = {
    "temperature": lambda value: checks.scalar("temperature", value, None, positive=True),
    "scale": lambda value: checks.scalar("scale", value, None, positive=True),
    "label_smoothing": lambda value: checks.share("label_smoothing", value),
    "ignore_index": lambda value: None if value is None else checks.index("ignore_index", value),
    "similarity": lambda value: checks.choice("similarity", value, checks.SIMILARITIES),
    "distance": lambda value: checks.choice("distance", value, checks.DISTANCES),
    "margin": lambda value: checks.number("margin", value),
    "reduction": lambda value: checks.choice("reduction", value, checks.REDUCTIONS),
    "backend": checks.backend,
    "workspace_bytes": lambda value: checks.count("workspace_bytes", value),
    "group": distributed.check_group,
}


class LossModule(nn.Module):
    """Takes its constructor from `function`: the keyword-only parameters but for the tensors named in `tensors`.

    choices: of an option, where they are not those that the name has in CHECKS. learnt: options that may be modules or
        parameters, which are then this module's.
    """

    function: ClassVar[Callable[..., Any]]
    tensors: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
    learnt: ClassVar[tuple[str, ...]] = ()
    signature: ClassVar[inspect.Signature]

    def __init_subclass__(
        cls,
        *,
        function: Callable[..., Any],
        tensors: tuple[str, ...] = (),
        choices: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
        learnt: tuple[str, ...] = (),
    ) -> None:
        super().__init_subclass__()
        cls.function, cls.tensors, cls.choices, cls.learnt = staticmethod(function), tensors, choices, learnt
        parameters = inspect.signature(function).parameters.values()
        named = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in tensors]
        cls.signature = inspect.Signature([p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in named])
        cls.__signature__ = cls.signature  # type: ignore[attr-defined]  # what help() and inspect show

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        if args:
            first = next(iter(self.signature.parameters), "model")
            checks.options_not_modules(type(self).__name__, **{first: args[0]})
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}; it takes {self.signature}") from None
        bound.apply_defaults()
        given = {n: value for n, value in bound.arguments.items() if n not in self.learnt}
        checks.options_not_modules(type(self).__name__, **given)
        for name, value in bound.arguments.items():
            if name in self.choices:
                checks.choice(name, value, self.choices[name])
            elif name in CHECKS:
                CHECKS[name](value)
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name in self.signature.parameters:
                error = TypeError(f"{type(self).__name__}.forward got {name!r}: it is an option of the constructor")
                if getattr(self, "group", None) is not None:
                    distributed.refuse(self.group, error)
                raise error
        chosen = {name: getattr(self, name) for name in self.signature.parameters}
        return type(self).function(*args, **kwargs, **chosen)

    def extra_repr(self) -> str:
        always = [p.name for p in self.signature.parameters.values() if p.name in ("temperature", "scale")]
        shown_by_torch = [n for n in self.learnt if isinstance(getattr(self, n), nn.Module | Tensor)]
        defaults = {p.name: p.default for p in self.signature.parameters.values() if p.name not in shown_by_torch}
        return checks.options(self, **{n: None if n in always else default for n, default in defaults.items()})
