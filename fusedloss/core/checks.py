"""Argument checks. Each error says what an argument must be, what it got, and what to do.

Messages are formatted only when they are raised, so that a passing check costs a microsecond; and under torch.compile a
size may be a symbol, which has no text.

Values inside tensors are checked on a CPU only: reading them back from a GPU would synchronise. There an out-of-range
target makes the loss NaN, and FUSEDLOSS_CHECK=1 turns these checks on everywhere.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from . import environment
from .errors import UnsupportedError
from .numerics import autocasting, stats_dtype

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIMILARITIES = ("cos", "dot")
DISTANCES = ("euclidean", "squared", "cosine")
REDUCTIONS = ("mean", "sum", "none")
CODES = {"none": 0, "mean": 1, "sum": 2}  # of reductions, as torch's operators take them
OPERATORS: Any = torch._C._nn  # whose stubs have these as str
BACKENDS = environment.BACKENDS
NAMES = ("auto", *BACKENDS)
WORKSPACE_BYTES = {"cpu": 64 << 20, "cuda": 896 << 20}  # the defaults


def embeddings(**tensors: Tensor) -> None:
    """Checks matrices [rows, D] of one floating dtype, one device and one D."""
    (first_name, first), *_ = tensors.items()
    for name, x in tensors.items():
        if _alike(x, first):
            continue
        if isinstance(x, nn.Module):
            raise TypeError(f"{name} must be a tensor of embeddings, got the nn.Module {type(x).__name__}; {MODELS}")
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor [rows, D], got {a(x)}{remedy(x)}")
        if x.dtype not in FLOATING:
            hint = "; labels and ids are not embeddings" if x.dtype == torch.int64 and x.dim() == 1 else ""
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}{hint}")
        dense(name, x)
        if x.dim() != 2:
            hint = f"; pass {name}.flatten(0, 1), and repeat labels likewise" if x.dim() == 3 else ""
            raise ValueError(f"{name} must have two dimensions [rows, D], got shape {list(x.shape)}{hint}")
        if x.shape[1] != first.shape[1]:
            raise ValueError(f"{name} must have D = {first.shape[1]}, like {first_name}, got D = {x.shape[1]}")
        if x.shape[1] == 0:
            raise ValueError(f"{name} must have at least one dimension D, got D = 0")
        if x.dtype != first.dtype and not (autocasts(x) and autocasts(first)):
            raise TypeError(f"{name} must be {first.dtype}, like {first_name}, got {x.dtype}; cast one of them")
        same_device(name, x, first_name, first)


def alike(first: Tensor, *others: Tensor) -> bool:
    """Whether `embeddings` would pass and all shapes are one, in two microseconds."""
    if not _alike(first, first):
        return False
    dtype, shape, device = first.dtype, first.shape, first.device
    for x in others:
        if not (
            type(x) is Tensor
            and x.dtype is dtype
            and x.layout is torch.strided
            and not x.is_nested
            and x.shape == shape
            and x.device == device
        ):
            return False
    return True


def _alike(x: object, first: object) -> bool:
    """Whether all checks pass, in one microsecond; the checks that word an error take four."""
    return (
        type(x) is Tensor is type(first)
        and x.dtype is first.dtype
        and x.dtype in FLOATING
        and x.layout is torch.strided
        and not x.is_nested
        and x.dim() == 2
        and x.shape[1] == first.shape[-1] > 0
        and x.device == first.device
    )


def autocasts(x: Tensor) -> bool:
    """Whether torch.autocast would cast `x` in a matmul."""
    return x.dtype != torch.float64 and autocasting(x)


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other.device}, like {other_name}, got {x.device}; move one of them")


def a(value: object) -> str:
    """Describes what was got: its type, and a short value."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    name = f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
    if isinstance(value, bool | int | float | str):
        return f"{value!r}, {name}"
    return "None" if value is None else name


def remedy(value: object) -> str:
    """Returns a remedy for a value that should be a tensor."""
    return "; torch.as_tensor makes one" if isinstance(value, list | tuple) or hasattr(value, "__array__") else ""


def vector(name: str, x: Tensor, length: int, what: str, like: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        got = x.dtype if isinstance(x, Tensor) else a(x)
        hint = "; call .float()" if isinstance(x, Tensor) and not x.dtype.is_complex else remedy(x)
        raise TypeError(f"{name} must be a floating tensor [{length}], got {got}{hint}")
    dense(name, x)
    if x.shape != (length,):
        raise ValueError(f"{name} must have shape [{length}], one number per {what}, got {list(x.shape)}")
    same_device(name, x, "the embeddings", like)


def dense(name: str, x: Tensor) -> None:
    if type(x) is not Tensor and hasattr(x, "to_local"):
        how = f"{name}.to_local(), with group= if its rows are sharded, or {name}.full_tensor()"
        raise TypeError(f"{name} must be a plain tensor, got a {type(x).__name__}; pass {how}")
    if x.is_nested:
        how = f"{name}.values() if it is jagged, else torch.cat({name}.unbind())"
        raise TypeError(f"{name} must be a dense tensor, got a nested one; pass {how}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}; call .to_dense()")


def choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        got = repr(value) if isinstance(value, str) else a(value)
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {got}")


def backend(value: object) -> None:
    choice("backend", value, NAMES)


def share(name: str, value: float) -> None:
    if type(value) is not float and (not isinstance(value, Real) or isinstance(value, bool)):
        raise TypeError(f"{name} must be a number from 0 to 1, got {a(value)}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")


def count(name: str, value: int | None, *, optional: bool = True) -> None:
    if value is None and optional:
        return
    other = " or None" if optional else ""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number{other}, got {a(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1{other}, got {value}")


def budget(workspace_bytes: int | None) -> tuple[str, int | None]:
    """Returns the name and value of the workspace's bound, argument or environment; None: the device's default."""
    if workspace_bytes is None and (given := environment.workspace_bytes()) is not None:
        return "FUSEDLOSS_WORKSPACE_BYTES", given
    return "workspace_bytes", workspace_bytes


def reads_values(x: Tensor) -> bool:
    """Whether this tensor's values may be read without a synchronisation that the user did not ask for.

    Under a compiler and under torch.func's transforms there are no values to read.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return x.is_cpu or environment.switch("FUSEDLOSS_CHECK")


def scalar(name: str, value: float | Tensor, like: Tensor | None, *, positive: bool) -> None:
    """Checks a Python number, or a tensor of one element on the embeddings' device (a CPU scalar beside CUDA is an
    error).

    `like` is None in a module's constructor, which has no embeddings yet.
    """
    need = "a positive number" if positive else "a finite number"
    if isinstance(value, Tensor):
        dense(name, value)
        if value.numel() != 1 or value.dim() > 1:
            raise ValueError(f"{name} must have one element, shape [] or [1], got shape {list(value.shape)}")
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name} must be a floating tensor or a Python number, got {value.dtype}")
        if like is not None:
            same_device(name, value, "the embeddings", like)
        if not reads_values(value):
            return
        number = float(value.detach())
    elif type(value) is float or (isinstance(value, Real) and not isinstance(value, bool)):
        try:
            number = float(value)
        except OverflowError:
            raise ValueError(f"{name} must be {need}, got one beyond the largest float") from None
    else:
        raise TypeError(f"{name} must be {need} or a tensor of one element, got {a(value)}")
    if isinstance(value, Tensor) and number != number:
        return  # as in torch, a tensor's NaN shows in the loss; a NaN written as a number is a mistake
    # Comparisons, not math.isfinite: torch.compile traces floats symbolically.
    if not (0 if positive else -math.inf) < number < math.inf:
        raise ValueError(f"{name} must be {need}, got {number}")
    dtype = torch.float64 if like is None else stats_dtype(like.dtype)
    most = torch.finfo(dtype).max
    if number != 0 and not 1 / most <= abs(number) <= most:
        raise ValueError(f"{name} must be representable in {dtype}, as must its inverse, got {number}")


def number(name: str, value: float, *, least: float | None = None) -> None:
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} must be a number, got {a(value)}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be a finite number, got {value}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be a number of at least {least:g}, got {value}")


def softcap(value: float | None) -> None:
    if value is not None:
        number("softcap", value)
        scalar("softcap", value, None, positive=True)


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {a(value)}; pass one of the two")


def sequence(name: str, value: object, what: str, example: str) -> None:
    """Checks for a list, a tuple or the like, but not a string."""
    if type(value) in (tuple, list):
        return
    if isinstance(value, nn.Module):
        raise TypeError(
            f"{name} must be a sequence of {what}, such as {example}, got the nn.Module {type(value).__name__}"
        )
    if isinstance(value, str | type) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of {what}, such as {example}, got {a(value)}")


def function(name: str, value: object, example: str) -> None:
    """Checks for a callable that is not a class: calling a class would construct it."""
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"{name} must be a function or a module's instance, such as {example}, got {a(value)}")


def integers(name: str, value: Tensor, shape: tuple[int | None, ...], like: Tensor) -> None:
    """Checks an int64 tensor of a shape; None is any length."""
    _typed(name, value, torch.int64, shape, like)


def boolean(name: str, value: Tensor, shape: tuple[int | None, ...], like: Tensor) -> None:
    _typed(name, value, torch.bool, shape, like)


def floating(name: str, value: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Checks a floating tensor of a shape."""
    need = f"a floating tensor {list(shape)}"
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        got = value.dtype if isinstance(value, Tensor) else a(value)
        hint = "; call .float()" if isinstance(value, Tensor) and not value.dtype.is_complex else remedy(value)
        raise TypeError(f"{name} must be {need}, got {got}{hint}")
    dense(name, value)
    if value.shape != shape:
        raise ValueError(f"{name} must be {need}, got shape {list(value.shape)}")
    same_device(name, value, "the embeddings", like)


def _typed(name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...], like: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype != dtype:
        got = value.dtype if isinstance(value, Tensor) else a(value)
        hint = f"; call .{'long' if dtype == torch.int64 else 'bool'}()" if isinstance(value, Tensor) else remedy(value)
        raise TypeError(f"{name} must be a tensor of {_described(dtype, shape)}, got {got}{hint}")
    dense(name, value)
    if value.dim() != len(shape) or any(n is not None and n != m for n, m in zip(shape, value.shape, strict=True)):
        raise ValueError(f"{name} must be {_described(dtype, shape)}, got shape {list(value.shape)}")
    same_device(name, value, "the embeddings", like)


def _described(dtype: torch.dtype, shape: tuple[int | None, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} [{', '.join('any' if n is None else str(n) for n in shape)}]"


def index(name: str, value: int) -> None:
    if type(value) is not int and (not isinstance(value, Integral) or isinstance(value, bool)):
        raise TypeError(f"{name} must be a whole number, got {a(value)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be a 64-bit integer, got {value}")


def target(
    name: str,
    value: Tensor,
    rows: int,
    columns: int | None,
    ignore_index: int | None,
    like: Tensor,
    *,
    several: bool = False,
) -> None:
    """Checks indices. `ignore_index` None: every row counts. `columns` None: their number is not known yet.

    several: whether a row may have several, `[rows, P]`.
    """
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else a(value)
        raise TypeError(f"{name} must be an int64 tensor [{rows}] of column indices, got {got}{_indices(value)}")
    dense(name, value)
    if value.shape != (rows,) and not (several and value.dim() == 2 and value.shape[0] == rows):
        need = (
            f"[{rows}, P], one index per positive" if several and value.dim() == 2 else f"[{rows}], one index per row"
        )
        raise ValueError(f"{name} must have shape {need}, got {list(value.shape)}")
    same_device(name, value, "the embeddings", like)
    if columns is not None and reads_values(value):
        outside = (value < 0) | (value >= columns)
        if ignore_index is not None:
            outside &= value != ignore_index
        if bool(outside.any()):
            place = tuple(outside.nonzero()[0].tolist())
            row = ", ".join(map(str, place))
            other = "" if ignore_index is None else f", or {ignore_index} to leave the row out"
            raise IndexError(f"{name}[{row}] must be an index from 0 to {columns - 1}{other}, got {int(value[place])}")


P = ParamSpec("P")
R = TypeVar("R")
# Options that are each other's inverse.
INVERSE = {"temperature": ("scale", "logit_scale"), "scale": ("temperature",), "logit_scale": ("temperature",)}


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """Wraps `function` so that an unknown keyword raises an error that names the right one.

    So does an option of type bool that is none: any other object, such as a mask, would count as True.
    """
    known = keywords(function)
    flags = frozenset(p.name for p in inspect.signature(function).parameters.values() if p.annotation == "bool")

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in kwargs.items():
            if name not in known:
                raise TypeError(unexpected(function.__name__, name, value, inspect.signature(function)))
            if name in flags and value is not True and value is not False:
                flag(name, value)
        return function(*args, **kwargs)

    return call


def keywords(function: Callable[..., Any]) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is not p.VAR_POSITIONAL)


def unexpected(owner: str, name: str, value: object, signature: inspect.Signature) -> str:
    inverse = next((other for other in INVERSE.get(name, ()) if other in signature.parameters), None)
    if inverse is not None:
        given = f": {inverse}={1 / value:.6g}" if isinstance(value, Real) and value else ""
        return f"{owner} got an unexpected argument {name!r}; pass {inverse}, its inverse{given}"
    same = {"scale": "logit_scale", "logit_scale": "scale"}.get(name)
    if same in signature.parameters:
        return f"{owner} got an unexpected argument {name!r}; pass {same}"
    return f"{owner} got an unexpected argument {name!r}; it takes {shown(signature)}"


def shown(signature: inspect.Signature) -> str:
    """Returns the signature's names and defaults."""
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in signature.parameters.values()]))


def _indices(value: object) -> str:
    """Returns a remedy for a value that is no target."""
    if isinstance(value, float):
        return f"; did you mean temperature={value}?"
    if isinstance(value, Tensor) and value.dim() == 2:
        return "; for several positives per row pass siglip masks.same_id(row_ids, key_ids)"
    return "; call .long()" if isinstance(value, Tensor) else remedy(value)


def untransformed(backend: str) -> None:
    """Raises under torch.func, vmap and forward-mode derivatives, which would fail or give NaN."""
    if torch.compiler.is_compiling():
        return
    functional = torch._C._are_functorch_transforms_active()
    if functional or torch.autograd.forward_ad._current_level >= 0:
        what = "torch.func transforms and torch.vmap" if functional else "forward-mode derivatives"
        raise UnsupportedError(f"backend must be 'reference' under {what}, got {backend!r}")


def options(module: nn.Module, **defaults: object) -> str:
    """Returns, for extra_repr, the options of `module` that differ from their defaults."""
    given = ((name, getattr(module, name), default) for name, default in defaults.items())
    return ", ".join(f"{name}={value!r}" for name, value, default in given if value != default)


MODELS = "losses that take a model are in fusedloss.integrations.sentence_transformers"


def options_not_modules(where: str = MODELS, /, **options: object) -> None:
    """where: says where losses that take a model are."""
    for name, value in options.items():
        if isinstance(value, nn.Module):
            raise TypeError(f"{name} must not be a model, got the nn.Module {type(value).__name__}; {where}")
