"""What the drop-ins share: whether a call runs fused code, how that is told, and how they take the originals' place."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping
from types import ModuleType, TracebackType
from typing import Any, Self

logger = logging.getLogger("fusedloss")

# How often each drop-in ran fused code, by "library.Class": what shows that an accelerated script is accelerated.
calls: Counter[str] = Counter()
_told: set[tuple[str, str]] = set()


def disabled() -> bool:
    return os.environ.get("FUSEDLOSS_DISABLE", "0") not in ("", "0")


def runs_fused(name: str, why_not: str | None) -> bool:
    """Whether this call of drop-in `name` runs fused code: counts it, or tells the reason once.

    why_not: what stands against it, in words that follow "because".
    """
    if disabled():
        return False
    if why_not is None:
        calls[name] += 1
        return True
    if (name, why_not) not in _told:
        _told.add((name, why_not))
        logger.warning("%s runs the library's own code, because %s", name, why_not)
    return False


def library(name: str, distribution: str, tested: str) -> ModuleType:
    """The library, imported; or an ImportError that says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"fusedloss.integrations.{name.split('.')[0]} needs {distribution}, tested with {tested}: "
            f"pip install '{distribution}=={tested}' ({error})"
        ) from error


class Patch:
    """Objects of a library replaced by ours in every module that holds them. `undo()`, or the end of a `with`, reverts.

    A name that was bound to the original while the patch stands (`from library import X` of a module loaded later finds
    ours) is reverted where we bound it. While it stands our classes carry the originals' `__module__`: model cards link
    to the library's documentation, and pickle finds them by that name.
    """

    def __init__(self, replacements: Mapping[Any, Any]):
        self._places: list[tuple[ModuleType, str, Any, Any]] = []
        self._names: list[tuple[type, str]] = []
        if disabled():
            return
        by_identity = {id(original): (original, ours) for original, ours in replacements.items()}
        for module in list(sys.modules.values()):
            # Ours hold the originals to subclass them. vars(), not dir(): a lazy module would load what it lists.
            if not isinstance(module, ModuleType) or module.__name__.startswith("fusedloss."):
                continue
            for name, value in list(vars(module).items()):
                if id(value) in by_identity:
                    original, ours = by_identity[id(value)]
                    self._places.append((module, name, original, ours))
                    setattr(module, name, ours)
        for original, ours in replacements.items():
            if isinstance(ours, type):
                self._names.append((ours, ours.__module__))
                ours.__module__ = original.__module__

    def undo(self) -> None:
        """Puts the originals back where ours still stand; a second time there is nothing to do."""
        places, names, self._places, self._names = self._places, self._names, [], []
        for module, name, original, ours in places:
            if vars(module).get(name) is ours:
                setattr(module, name, original)
        for ours, name in names:
            ours.__module__ = name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Patch({len(self._places)} names rebound)"
