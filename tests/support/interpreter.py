"""Triton's interpreter, which replaces the functions of triton.language at every call of a device function.

A launch replaces them and puts them back at its end; calls inside it find them replaced and look through all of
triton.language for what is left, 20 times a launch. That was a third of what a small launch took.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any


def replace_once() -> None:
    """From here on a call replaces only what no call of the same launch has."""
    try:
        interpreter = importlib.import_module("triton.runtime.interpreter")
    except ImportError:
        return
    if hasattr(interpreter, "_LangPatchScope") and not hasattr(interpreter._patch_lang, "__wrapped__"):
        interpreter._patch_lang = once(interpreter)


def once(interpreter: ModuleType) -> Callable[[Any], Any]:
    real, language = interpreter._patch_lang, (interpreter.tl, interpreter.tl.core)
    replaced: set[ModuleType] = set()

    class Scope(interpreter._LangPatchScope):
        """The launch's, which puts back."""

        def restore(self) -> None:
            super().restore()
            replaced.clear()

    @functools.cache
    def seen(function: Callable[..., Any]) -> frozenset[ModuleType]:
        """What the interpreter replaces for it."""
        return frozenset(x for x in function.__globals__.values() if inspect.ismodule(x) and x in language)

    @functools.wraps(real)
    def patch(function: Callable[..., Any]) -> Any:
        scope = Scope()
        modules = seen(function)
        if not modules or not modules <= replaced:
            scope._changes = real(function)._changes
            replaced.update(modules)
        return scope

    return patch
