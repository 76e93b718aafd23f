"""Shared by the drop-ins: the decision whether a call runs fused code, its log, and the patching of libraries."""

from __future__ import annotations

import copyreg
import functools
import importlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import ModuleType, TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import torch
from torch import Tensor

from fusedloss.core import environment

logger = logging.getLogger("fusedloss")

# Number of fused calls of each drop-in, by "library.Class". It shows whether a script is accelerated.
calls: Counter[str] = Counter()
_warned: set[tuple[str, str]] = set()
_running: ContextVar[list[str] | None] = ContextVar("running", default=None)
_standing: list[Patch] = []  # those that are not undone

P = ParamSpec("P")
R = TypeVar("R")


def disabled() -> bool:
    return environment.switch("FUSEDLOSS_DISABLE")


def runs_fused(name: str, why_not: str | None) -> bool:
    """Whether this call of drop-in `name` runs fused code. Counts it, or warns of the reason once.

    Inside a `counted` function, the call is counted when that function returns.

    why_not: the reason against it, worded to follow "because"; or None.
    """
    if disabled():
        return False
    if why_not is None:
        running = _running.get()
        if running is None:
            calls[name] += 1
        else:
            running.append(name)
        return True
    if (name, why_not) not in _warned:
        _warned.add((name, why_not))
        logger.warning("%s runs the library's own code, because %s", name, why_not)
    return False


# See LIBRARY_UP_TO: of losses of pairs, the elements of a column of embeddings. Rows of 384 were measured.
ELEMENTS: dict[str, int] = {
    "sentence_transformers.ContrastiveLoss": 1 << 13,  # 1.15 at 16 rows, 1.04 at 64
    "sentence_transformers.CosineSimilarityLoss": 1 << 15,  # 1.22 at 16, 1.07 at 64, 0.76 at 256
    "sentence_transformers.SparseCosineSimilarityLoss": 1 << 15,
    "sentence_transformers.MarginMSELoss": 1 << 19,  # 1.1 at 16, 1.09 at 256, 1.1 at 1024, 0.93 at 4096
    "sentence_transformers.SparseMarginMSELoss": 1 << 19,
    "sentence_transformers.DistillKLDivLoss": 1 << 19,  # 1.25 at 16, 1.2 at 256, 1.13 at 1024, 0.95 at 4096
    "sentence_transformers.SparseDistillKLDivLoss": 1 << 19,
    "sentence_transformers.EmbedDistillLoss": 1 << 15,  # 1.21 at 16, 1.09 at 64, 0.55 at 256
    "sentence_transformers.SoftmaxLoss": 1 << 17,  # 1.4 at 16, 1.3 at 256, 0.9 at 1024
}

# On a CPU the library's own code runs for at most so many similarities, scores or elements: up to there it takes less
# time than ours, and so many take 4 MiB at most. Measured by
# `FUSEDLOSS_BACKEND=dense python benchmarks/small.py --losses drop-in --threads 1`, which runs ours at every size;
# with an empty LIBRARY_UP_TO instead, where ours is `losses/_straight.py`.
# Left out are classes of which a page in docs/integrations/ promises what the library's code does not do, and sizes at
# which a class of cubic memory holds more than 1 MiB, with any labels.
LIBRARY_UP_TO: dict[str, int] = {
    "open_clip.ClipLoss": 1 << 10,  # 1.5 times its time at N = 2, 0.99 at 16 (1.5 of pairs that fit), 0.8 at 64
    "open_clip.SigLipLoss": 1 << 20,  # 2.5 at 64, 1.3 at 256, 1.07 at 1024
    "open_clip.DistillClipLoss": 1 << 20,  # 4.8 at 64, 2.2 at 256, 1.7 at 1024
    "sentence_transformers.MegaBatchMarginLoss": 1 << 13,  # 1.3 at 64, 0.85 at 128
    "sentence_transformers.GlobalOrthogonalRegularizationLoss": 1 << 20,  # 1.7 at 64, 1.3 at 1024: products of float64
    "sentence_transformers.ContrastiveTensionLossInBatchNegatives": 1 << 10,  # 1.2 at 16, 1.06 at 64, 0.96 at 128
    "sentence_transformers.BatchAllTripletLoss": 1 << 11,  # 1.8 at 32; at 64 1.8 of 32 labels, 0.8 of two
    "sentence_transformers.BatchHardTripletLoss": 1 << 17,  # 2.9 at 64, 1.5 at 256, 1.05 at 512
    "sentence_transformers.BatchHardSoftMarginTripletLoss": 1 << 17,  # 2.9 at 64, 1.7 at 256, 0.9 at 512
    "sentence_transformers.BatchSemiHardTripletLoss": 1 << 12,  # 1.5 at 64; beyond, its tensors are cubic
    # Of scores [N, C]: 1.98 at 2^14, 1.44 at 2^16, 0.57 at 2^18 of three classes; 1.3 at 2^17, 1.1 at 2^19 of ten
    "sentence_transformers.cross_encoder.CrossEntropyLoss": 1 << 17,
    "sentence_transformers.cross_encoder.MSELoss": 1 << 17,  # the same operator, 20 us sooner
    "sentence_transformers.cross_encoder.MarginMSELoss": 1 << 17,
    "sentence_transformers.cross_encoder.MultipleNegativesRankingLoss": 1 << 11,  # of scores: 1.2 at 320, 1.05 at 1280
    "sentence_transformers.cross_encoder.CachedMultipleNegativesRankingLoss": 1 << 11,
    "pytorch_metric_learning.NTXentLoss": 1 << 10,  # 2.0 at 32, 0.6 at 64
    "pytorch_metric_learning.SupConLoss": 1 << 18,  # 2.1 at 64, 1.4 at 256, 1.2 at 512
    "pytorch_metric_learning.MultiSimilarityLoss": 1 << 15,  # 1.6 at 64, 1.2 at 128, 0.9 at 256
    "pytorch_metric_learning.CircleLoss": 1 << 13,  # 1.3 at 64, 1.0 at 128
    "pytorch_metric_learning.ContrastiveLoss": 25 * 25,  # beyond, its distance of equal rows is not 0
    "pytorch_metric_learning.CosFaceLoss": 1 << 18,  # 1.7 at 64 and 256 rows of 1000 classes
    "pytorch_metric_learning.TripletMarginLoss": 1 << 11,  # 1.7 at 32; at 64 1.35 of 32 labels, 0.7 of two
    **ELEMENTS,
}


def library_is_faster(name: str, x: Any, number: int | None = None) -> bool:
    """Whether this call of drop-in `name` has so few similarities that the library's own code is to run: `number`, or
    those of the rows `x` with one another.

    Only in float32 and float64 on a CPU without autocast: of 16 bits the drop-ins promise fp32 logits. A backend that
    FUSEDLOSS_BACKEND names runs ours.
    """
    most = LIBRARY_UP_TO.get(name)
    if not most or type(x) is not Tensor or not x.is_cpu or not x.dim():
        return False
    if (x.shape[0] ** 2 if number is None else number) > most or x.dtype not in (torch.float32, torch.float64):
        return False
    if torch.is_autocast_enabled("cpu") or environment.backend() != "auto":
        return False
    if (name, "") not in _warned:
        _warned.add((name, ""))
        logger.info("%s runs the library's own code for up to %d similarities, because it is faster", name, most)
    return True


def counted(function: Callable[P, R]) -> Callable[P, R]:
    """Wraps `function` so that its fused calls count when it returns; a call that raises does not count."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # Dynamo has no context variables
            return function(*args, **kwargs)
        names: list[str] = []
        token = _running.set(names)
        try:
            result = function(*args, **kwargs)
        finally:
            _running.reset(token)
        for name in names:  # calls.update takes 2 us for one name
            calls[name] += 1
        return result

    return wrapped


def library(name: str, distribution: str, tested: str, least: str = "") -> ModuleType:
    """Imports the library, or raises an ImportError that says what to install. least: the oldest version that works."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        least = f"{distribution} {least} or newer" if least else distribution
        raise ImportError(
            f"fusedloss.integrations.{name.split('.')[0]} needs {least}, tested with {tested}: "
            f"pip install '{distribution}=={tested}' ({error})"
        ) from error


class Patch:
    """Replaces objects of a library by ours in every module that holds them. `undo()`, or the end of a `with`, reverts.

    Of several patches with the same replacement the last that is undone puts the original back, in whatever order.

    `undo()` also reverts modules imported in the meantime; a module that held ours beforehand keeps it. While the patch
    stands our classes carry the originals' `__module__`: model cards link to the library's documentation, and pickle
    finds them by that name. An object of an original class, made beforehand, is pickled and copied by the same name, so
    it comes back as ours while the patch stands, and as the library's elsewhere.
    """

    def __init__(self, replacements: Mapping[Any, Any]):
        self._replacements = {} if disabled() else dict(replacements)
        ours = {id(own): own for own in self._replacements.values()}
        self._chosen = {(module.__name__, name, id(own)) for module, name, own in _places(ours)}
        for module, name, own in _places({id(original): own for original, own in self._replacements.items()}):
            setattr(module, name, own)
        self._modules: dict[type, tuple[type, str]] = {}
        for original, own in self._replacements.items():
            if isinstance(own, type) and own.__module__ != original.__module__:  # else another patch is active
                self._modules[own] = original, own.__module__
                own.__module__ = original.__module__
                copyreg.pickle(original, functools.partial(_by_name, own))
        if self._replacements:
            _standing.append(self)

    def undo(self) -> None:
        """Puts the originals back, or leaves that to another patch that stands. A second call does nothing."""
        if self in _standing:
            _standing.remove(self)
        for original, own in list(self._replacements.items()):
            heir = next((patch for patch in _standing if patch._replacements.get(original) is own), None)
            if heir is not None:
                heir._chosen -= {place for place in heir._chosen - self._chosen if place[2] == id(own)}
                if own in self._modules:
                    heir._modules[own] = self._modules.pop(own)
                del self._replacements[original]
        places = _places({id(own): original for original, own in self._replacements.items()})
        for module, name, original in places:
            if (module.__name__, name, id(self._replacements[original])) not in self._chosen:
                setattr(module, name, original)
        for own, (original, name) in self._modules.items():
            own.__module__ = name
            copyreg.dispatch_table.pop(original, None)
        self._replacements, self._modules = {}, {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Patch({', '.join(sorted(own.__name__ for own in self._replacements.values()))})"


def replaced(found: Any) -> Any:
    """Returns what `found` stands for by a patch; any other object as it is."""
    originals = (original for patch in _standing for original, own in patch._replacements.items() if own is found)
    return next(originals, found)


def _by_name(own: type, instance: object) -> tuple[Any, ...]:
    """Pickles an object of the original class while its name leads to ours."""
    reduced = instance.__reduce_ex__(2)
    assert isinstance(reduced, tuple)
    return object.__new__, (own,), *reduced[2:]


def _places(wanted: Mapping[int, Any]) -> list[tuple[ModuleType, str, Any]]:
    """Returns (module, name, replacement) for every name of a loaded module that is bound to an object with that id.

    vars(), not getattr, because a lazy module would load everything that it lists. Our own modules hold the originals
    as bases. Modules that a module holds count as well: transformers puts itself into sys.modules twice, and a script
    may have imported the first. type(), not isinstance, because torch has objects that warn when asked for a class.
    """
    loaded = [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    held = [value for module in loaded for value in list(vars(module).values()) if issubclass(type(value), ModuleType)]
    return [
        (module, name, wanted[id(value)])
        for module in {id(module): module for module in (*loaded, *held)}.values()
        if not module.__name__.startswith("fusedloss.")
        for name, value in list(vars(module).items())
        if id(value) in wanted
    ]
