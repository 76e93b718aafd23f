"""What the modules of `nn` share: options in the constructor, tensors in `forward`."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn
from torch.nn import _reduction

from .. import distributed, transforms
from ..core import checks

# Checks that a constructor can run before there are embeddings. A name means the same in every loss.
CHECKS: dict[str, Callable[[Any], None]] = {
    "temperature": lambda value: checks.scalar("temperature", value, None, positive=True),
    "teacher_temperature": lambda value: (
        None if value is None else checks.scalar("teacher_temperature", value, None, positive=True)
    ),
    "scale": lambda value: checks.scalar("scale", value, None, positive=True),
    "label_smoothing": lambda value: checks.share("label_smoothing", value),
    "ignore_index": lambda value: None if value is None else checks.index("ignore_index", value),
    "similarity": lambda value: checks.choice("similarity", value, checks.SIMILARITIES),
    "distance": lambda value: checks.choice("distance", value, checks.DISTANCES),
    "z_loss": lambda value: checks.number("z_loss", value, least=0),
    "softcap": checks.softcap,
    "margin": lambda value: checks.number("margin", value),
    "reduction": lambda value: checks.choice("reduction", value, checks.REDUCTIONS),
    "backend": checks.backend,
    "workspace_bytes": lambda value: checks.count("workspace_bytes", value),
    "group": distributed.check_group,
    "transform": lambda value: transforms.bind(value) and None,
}


# Names of losses that take a model in sentence-transformers; those of CROSS_ENCODER take a cross-encoder.
MODEL = frozenset(
    """
    AnglELoss BatchAllTripletLoss BatchHardSoftMarginTripletLoss BatchHardTripletLoss BatchSemiHardTripletLoss
    CoSENTLoss ContrastiveLoss ContrastiveTensionLoss CosineSimilarityLoss DistillKLDivLoss EmbedDistillLoss
    GISTEmbedLoss GlobalOrthogonalRegularizationLoss MSELoss MarginMSELoss MegaBatchMarginLoss
    MultipleNegativesRankingLoss OnlineContrastiveLoss SoftmaxLoss TripletLoss
    """.split()
)
CROSS_ENCODER = frozenset(
    "ADRMSELoss CrossEntropyLoss LambdaLoss ListMLELoss ListNetLoss PListMLELoss RankNetLoss".split()
)


def where_models_go(owner: str) -> str:
    """Names the class that takes the model which `owner` was given."""
    package = "fusedloss.integrations.sentence_transformers"
    if owner in MODEL | CROSS_ENCODER:
        return f"{package}{'.cross_encoder' if owner in CROSS_ENCODER else ''}.{owner} takes a model"
    return checks.MODELS


class LossModule(nn.Module):
    """Base of the modules. The constructor takes `function`'s keyword-only parameters, except the tensors in `tensors`.

    choices: allowed values of an option, if they differ from those in CHECKS. learnt: options that may be modules or
    parameters; they are registered with this module. buffered: options whose tensors are buffers. named: options that
    the constructor takes by name alone, because they came later than those that it takes in their order. like: torch's
    class, whose constructor comes first; `function`'s further options are then passed by name.
    """

    function: ClassVar[Callable[..., Any]]
    choices: ClassVar[Mapping[str, tuple[str, ...]]]
    learnt: ClassVar[tuple[str, ...]]
    buffered: ClassVar[tuple[str, ...]]
    signature: ClassVar[inspect.Signature]
    inputs: ClassVar[tuple[str, ...]]
    required: ClassVar[tuple[str, ...]]
    most: ClassVar[int | None]  # how many inputs stand before any number of others
    options: ClassVar[tuple[str, ...]]
    counts: ClassVar[range]  # numbers of positional arguments that are right without keywords
    leading: ClassVar[int]  # how many inputs are the function's first arguments
    reduction: Any
    size_average: Any
    reduce: Any

    def __init_subclass__(
        cls,
        *,
        function: Callable[..., Any] | None = None,
        tensors: tuple[str, ...] = (),
        choices: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
        learnt: tuple[str, ...] = (),
        buffered: tuple[str, ...] = (),
        named: tuple[str, ...] = (),
        like: type[nn.Module] | None = None,
    ) -> None:
        super().__init_subclass__()
        if function is None:  # a user's own subclass
            return
        cls.function, cls.choices, cls.learnt, cls.buffered = staticmethod(function), choices, learnt, buffered
        parameters = inspect.signature(function).parameters.values()
        theirs = {} if like is None else inspect.signature(like).parameters
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if like is None else inspect.Parameter.KEYWORD_ONLY
        options = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in (*tensors, *theirs)]
        in_order = [p.replace(kind=kind) for p in options if p.name not in named]
        cls.signature = inspect.Signature([*theirs.values(), *in_order, *(p for p in options if p.name in named)])
        cls.__signature__ = cls.signature  # type: ignore[attr-defined]  # what help() and inspect show
        inputs = [p for p in parameters if p.name not in cls.signature.parameters and p.kind is not p.VAR_POSITIONAL]
        cls.inputs = tuple(p.name for p in inputs)
        cls.required = tuple(p.name for p in inputs if p.default is p.empty)
        several = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        cls.most = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in inputs) if several else None
        cls.options = tuple(cls.signature.parameters)
        least = 1 + max((cls.inputs.index(name) for name in cls.required), default=-1)
        cls.counts = range(least, len(inputs) + 1 if cls.most is None else sys.maxsize if least <= cls.most else 0)
        shared = zip(inputs, parameters, strict=False)
        cls.leading = sum(
            1 for _ in itertools.takewhile(lambda p: p[0] is p[1] and p[0].kind is p[0].POSITIONAL_OR_KEYWORD, shared)
        )
        cls.__doc__ = cls.__doc__ or cls._described()

    @classmethod
    def _described(cls) -> str:
        """What it computes, in the words of the function, and what goes where."""
        name, (what, *more) = cls.function.__name__, inspect.getdoc(cls.function).split("\n\n")  # type: ignore[union-attr]
        formula = [more[0]] if more and more[0].startswith(" ") else []
        use = f"`{name}` with its options in the constructor and `forward{cls._forward()}`."
        model = []
        if cls.__name__ in MODEL | CROSS_ENCODER:
            model = [f"{where_models_go(cls.__name__)}."]
        return "\n\n".join([what, *formula, use, *model])

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        where = where_models_go(type(self).__name__)
        if args:
            first = next(iter(self.signature.parameters), "model")
            checks.options_not_modules(where, **{first: args[0]})
        for name, value in kwargs.items():
            if name not in self.signature.parameters:
                raise TypeError(checks.unexpected(type(self).__name__, name, value, self.signature))
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"{type(self).__name__} got wrong arguments: {error}; it takes {checks.shown(self.signature)}"
            ) from None
        bound.apply_defaults()
        given = {n: value for n, value in bound.arguments.items() if n not in self.learnt}
        checks.options_not_modules(where, **given)
        for name, value in bound.arguments.items():
            if name in self.choices:
                checks.choice(name, value, self.choices[name])
            elif name in CHECKS and name not in self.learnt:
                CHECKS[name](value)
            if name in self.buffered and isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        if "reduce" in bound.arguments and (self.size_average is not None or self.reduce is not None):
            self.reduction = _reduction.legacy_get_string(self.size_average, self.reduce)
            self.size_average = self.reduce = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cls = type(self)
        if kwargs or len(args) not in cls.counts:
            self._check_inputs(args, kwargs)
        chosen = {name: getattr(self, name) for name in cls.options}
        if len(args) <= cls.leading or cls.most is not None:
            return cls.function(*args, **kwargs, **chosen)
        # Passed by name, because the function may have options between its tensors.
        return cls.function(**dict(zip(cls.inputs, args, strict=False)), **kwargs, **chosen)

    def _check_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cls = type(self)
        given = cls.inputs[: len(args)] if cls.most is None else cls.inputs[: min(len(args), cls.most)]
        for name in kwargs:
            if name not in cls.inputs:
                why = "pass this option to the constructor" if name in cls.signature.parameters else cls._takes()
                self._refuse(f"got an unexpected argument {name!r}; {why}")
        for name in cls.required:
            if name not in given and name not in kwargs:
                self._refuse(f"got no {name!r}; {cls._takes()}")
        if cls.most is None and len(args) > len(cls.inputs):
            self._refuse(f"got {len(args)} arguments; {cls._takes()}")

    def _refuse(self, what: str) -> NoReturn:
        """Raises on all ranks of a group."""
        error = TypeError(f"{type(self).__name__}.forward {what}")
        if getattr(self, "group", None) is not None:
            distributed.refuse(self.group, error)
        raise error

    @classmethod
    def _takes(cls) -> str:
        return f"it takes {cls._forward()}"

    @classmethod
    def _forward(cls) -> str:
        function = inspect.signature(cls.function).parameters
        inputs = [p for name, p in function.items() if name in cls.inputs or p.kind is p.VAR_POSITIONAL]
        return checks.shown(inspect.Signature(inputs))

    def extra_repr(self) -> str:
        always = ("temperature", "scale")
        hidden = [n for n in (*self.learnt, *self.buffered) if isinstance(getattr(self, n), nn.Module | Tensor)]
        shown = [p for p in self.signature.parameters.values() if p.name not in hidden]
        return checks.options(self, **{p.name: None if p.name in always else p.default for p in shown})
