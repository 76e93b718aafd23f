"""GradCache (Gao et al. 2021): encoders run in small chunks, and the loss sees the whole batch.

A contrastive loss needs the embeddings of all rows at once, but not the activations behind them. Three passes give the
gradients of the plain step. The first encodes chunk by chunk without a graph. The second differentiates the loss by the
embeddings alone. The third encodes each chunk again, with the same random numbers, and runs the backward from the
chunk's part of that gradient. Memory holds one chunk and the embeddings; the encoders run one more forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_is_leaf, tree_leaves, tree_map, tree_unflatten

from .core import checks

Encoder = Callable[..., Any]


class GradCache:
    """Runs forward and backward of a loss in chunks, for a batch whose activations do not fit.

        step = GradCache(loss, encoders, rows=64)
        value = step(*inputs, **options)        # loss(*embeddings, **options), gradients added to every .grad

    Each chunk is encoded twice. Modules that keep statistics (BatchNorm) take them from chunks, and update them twice.
    Under `torch.no_grad()` a step only evaluates. An encoder that cannot receive a gradient runs once.

    Several processes: DistributedDataParallel, FSDP and FSDP2 modules, also inside of an encoder, exchange gradients
    only with the last chunk that passes through them. FSDP and SyncBatchNorm communicate in every forward, too, so all
    processes need equally many chunks. FSDP2's `set_requires_gradient_sync` is True afterwards.

    If a step fails, random states and synchronisation are restored, and every `.grad` of the encoders and the loss that
    was None is None again. A `.grad` that was not None may hold a part of this step's gradient.

    Args:
        loss: any function or module of embeddings, from this package or another; its parameters get gradients, too.
        encoders: a module or callable for all inputs, or a sequence with one for each input.
        rows: the number of rows of a chunk (the last of an input may have fewer).
        tokens: instead of `rows`, the largest product of a chunk's rows and its longest row; a chunk has at least one
            row. Rows keep their order, and padding is not cut: use it with encoders that skip or cut padding.
        lengths: a function from an input to the lengths of its rows, `lengths(input) -> [rows]`. None: the sums of its
            `attention_mask`. Lengths on a GPU are read back, which synchronises.
        embedding: a function from an encoder's output to the embeddings. None: encoders return a tensor `[rows, ...]`,
            or a tuple, list or dict of tensors, which the loss receives as one argument.
        unpack: call `encoder(**input)` for a dict and `encoder(*input)` for a list or tuple, as transformers' models
            need it, instead of `encoder(input)`.
        replay_rng: give a chunk's second pass the random numbers of its first (dropout). Otherwise the gradients belong
            to other activations than the loss.
        scaler: a `torch.amp.GradScaler`, which scales the gradients but not the returned loss.

    Raises:
        ValueError, TypeError: an option or input does not fit, an encoder returns other shapes or dtypes the second
            time, or the loss does not return one number.

    Example:
        >>> step = GradCache(functools.partial(fusedloss.info_nce, normalize=True), [query_tower, key_tower], rows=64)
        >>> for questions, answers in loader:
        ...     optimizer.zero_grad()
        ...     loss = step(questions, answers)  # in place of the forward and loss.backward()
        ...     optimizer.step()

        With mixed precision:

        >>> step = GradCache(loss, model, tokens=16384, scaler=scaler)
        >>> with torch.autocast("cuda", dtype=torch.float16):
        ...     loss = step(questions, answers)  # dicts of a tokenizer
        >>> scaler.step(optimizer)
        >>> scaler.update()

        Options of the loss, such as a memory bank, are options of the step: `step(x, y, bank=queue)`, see `info_nce`.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        encoders: Encoder | Sequence[Encoder],
        *,
        rows: int | None = None,
        tokens: int | None = None,
        lengths: Callable[[Any], Tensor | Sequence[int]] | None = None,
        embedding: Callable[[Any], Any] | None = None,
        unpack: bool = False,
        replay_rng: bool = True,
        scaler: torch.amp.GradScaler | None = None,
    ):
        if (rows is None) == (tokens is None):
            got = "neither" if rows is None else "both"
            raise ValueError(f"one of rows and tokens, the size of a chunk, must be given, got {got}")
        checks.count("rows", rows)
        checks.count("tokens", tokens)
        if lengths is not None and tokens is None:
            raise ValueError(
                "lengths must be None without tokens, got a function; chunks of rows do not depend on lengths"
            )
        self.encoders = list(encoders) if isinstance(encoders, list | tuple | nn.ModuleList) else None
        self.encoder = encoders if self.encoders is None else None  # of all inputs
        named = {"loss": loss, **{f"encoders[{i}]": one for i, one in enumerate(self.encoders or [])}}
        for name, one in (named if self.encoders is not None else {**named, "encoders": encoders}).items():
            if not callable(one):
                raise TypeError(f"{name} must be a module or a function, got {checks.a(one)}")
        for name, one in (("lengths", lengths), ("embedding", embedding)):
            if one is not None and not callable(one):
                raise TypeError(f"{name} must be a function or None, got {checks.a(one)}")
        self.loss, self.rows, self.tokens, self.lengths = loss, rows, tokens, lengths
        self.embedding, self.unpack, self.replay_rng, self.scaler = embedding, unpack, replay_rng, scaler

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Returns the loss's result, detached, and adds the gradients to `.grad`.

        Args:
            inputs: each a tensor `[rows, ...]`, or a dict, list or tuple of them. Every chunk gets all other values and
                tensors without a dimension unchanged. Inputs may have different numbers of rows.
            options: passed to the loss.
        """
        columns = [self._column(i, *pair) for i, pair in enumerate(zip(self._matched(inputs), inputs, strict=True))]
        devices = _generators(columns) if self.replay_rng else []
        with torch.no_grad():
            for column in columns:
                self._encode_all(column, devices)
        # Autocast's cache may hold weights that were cast without a graph; the second pass would use them.
        torch.clear_autocast_cache()
        if not torch.is_grad_enabled():
            return _detached(self.loss(*(column.embeddings() for column in columns), **options))
        known = [*_parameters(self.loss), *(p for column in columns for p in _parameters(column.encoder))]
        leaves = [x for x in [*known, *tree_leaves([options, inputs])] if isinstance(x, Tensor) and x.is_leaf]
        without = [x for x in leaves if x.requires_grad and x.grad is None]
        try:
            result = self._gradients(columns, options)
            self._encode_again([column for column in columns if column.wanted], devices)
        except BaseException:
            for leaf in without:
                leaf.grad = None
            raise
        return result

    # The three passes -------------------------------------------------------------------------------------------------

    def _encode_all(self, column: _Column, devices: list[torch.device]) -> None:
        """Encodes into `column.tensors`, chunk by chunk, because some encoders reuse the memory of their output."""
        for part in column.parts:
            if self.replay_rng:
                column.states.append(_rng_states(devices))
            found, returned = self._encode(column, part)
            if not column.tensors:
                column.returned = returned
                column.tensors = [x.new_empty(column.size, *x.shape[1:]) for x in found]
            for x, whole in zip(found, column.tensors, strict=False):
                if returned != column.returned or x.shape[1:] != whole.shape[1:] or x.dtype != whole.dtype:
                    raise ValueError(
                        f"{column.encodes} must return one dtype and shape of rows for every chunk, got {_shape(x)} "
                        f"for rows {part.start} to {part.stop - 1} and {_shape(whole[: part.start])} for those before"
                    )
                whole[part] = x

    def _gradients(self, columns: list[_Column], options: dict[str, Any]) -> Any:
        """Runs the loss and its backward up to the embeddings, whose gradients replace them in the columns."""
        for column in columns:
            for x in column.tensors if column.may_train else []:
                x.requires_grad_(x.is_floating_point())
        result = self.loss(*(column.embeddings() for column in columns), **options)
        loss = result[0] if isinstance(result, list | tuple) and result else result
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must return a tensor or a tuple that starts with one, got {checks.a(loss)}")
        if loss.numel() != 1:
            raise ValueError(f"loss must return one number, got {_shape(loss)}; pass reduction='mean' or 'sum'")
        if loss.requires_grad:
            with _outside_autocast(columns):
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        for column in columns:
            column.gradients = [x.grad for x in column.tensors]
            column.tensors = []
        return _detached(result)

    def _encode_again(self, columns: list[_Column], devices: list[torch.device]) -> None:
        work = [(column, number) for column in columns for number in range(len(column.parts))]
        last = {id(module): step for step, (column, _) in enumerate(work) for module in column.synced}
        with _rng_kept(devices if self.replay_rng else None):
            for step, (column, number) in enumerate(work):
                if column.constant:
                    continue
                with _unsynced([module for module in column.synced if last[id(module)] != step]):
                    self._chunk_backward(column, number, devices)

    def _chunk_backward(self, column: _Column, number: int, devices: list[torch.device]) -> None:
        part = column.parts[number]
        if self.replay_rng:
            _set_rng_states(devices, column.states[number])
        found, spec = self._encode(column, part)
        wanted = [(x, g[part]) for x, g in zip(found, column.gradients, strict=False) if g is not None]
        for x, g in wanted:
            if spec != column.returned or x.shape != g.shape or x.dtype != g.dtype:
                raise ValueError(
                    f"{column.encodes} must return the same dtypes and shapes when it encodes rows {part.start} to "
                    f"{part.stop - 1} again, got {_shape(g)} and then {_shape(x)}"
                )
        wanted = [(x, g) for x, g in wanted if x.requires_grad]
        if wanted:
            with _outside_autocast([column]):
                torch.autograd.backward([x for x, _ in wanted], [g for _, g in wanted])
        # An encoder without gradients in one chunk has none in the others, which are skipped.
        column.constant = not wanted and not column.synced

    # Inputs -----------------------------------------------------------------------------------------------------------

    def _matched(self, inputs: tuple[Any, ...]) -> list[Any]:
        if not inputs:
            raise ValueError("inputs must hold at least one input, got none")
        if self.encoders is None:
            return [self.encoder] * len(inputs)
        if len(self.encoders) != len(inputs):
            raise ValueError(
                f"encoders must hold {len(inputs)} encoders, one for each input, got {len(self.encoders)}; "
                "pass a single one, not in a list, for all inputs"
            )
        return self.encoders

    def _column(self, number: int, encoder: Encoder, given: Any) -> _Column:
        name = f"inputs[{number}]"
        if isinstance(given, Mapping) and tree_is_leaf(given):
            given = dict(given)  # a tokenizer's BatchEncoding
        leaves, spec = tree_flatten(given)
        sizes = {len(x) for x in leaves if _has_rows(x)}
        if not sizes:
            raise TypeError(f"{name} must hold at least one tensor [rows, ...], got {checks.a(given)} without")
        if len(sizes) > 1:
            raise ValueError(
                f"{name} must hold tensors of one number of rows, got {' and '.join(map(str, sorted(sizes)))}"
            )
        if torch.is_grad_enabled() and any(_has_rows(x) and x.grad_fn is not None for x in leaves):
            raise ValueError(f"{name} must be a leaf, got the result of a computation that autograd records; detach it")
        (size,) = sizes
        if self.rows is not None:
            parts = _parts(size, self.rows)
        else:
            parts = _budget(self._lengths(name, given, size), self.tokens or 1)
        owner = _owner(encoder)
        # A function whose parameters cannot be found may train something; its second pass shows whether it does.
        own = list(owner.parameters()) if isinstance(owner, nn.Module) else []
        trains = not own or any(x.requires_grad for x in [*own, *filter(_has_rows, leaves)])
        encodes = f"encoders, of {name}," if self.encoders is None else f"encoders[{number}]"
        return _Column(encodes, encoder, leaves, spec, size, parts, trains, _synced(owner))

    def _lengths(self, name: str, given: Any, size: int) -> list[int]:
        if self.lengths is not None:
            found = self.lengths(given)
        else:
            mask = given.get("attention_mask") if isinstance(given, Mapping) else None
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                raise ValueError(
                    f"{name} must have an attention_mask [rows, L] if tokens is given, got none; or pass lengths="
                )
            found = (mask != 0).sum(1)
        numbers = found.tolist() if isinstance(found, Tensor) else list(found)
        if len(numbers) != size:
            raise ValueError(
                f"lengths must return one number for each of the {size} rows of {name}, got {len(numbers)}"
            )
        return numbers

    def _encode(self, column: _Column, part: slice) -> tuple[list[Tensor], TreeSpec]:
        given = tree_unflatten([x[part] if _has_rows(x) else x for x in column.leaves], column.spec)
        if self.unpack and isinstance(given, Mapping):
            out = column.encoder(**given)
        else:
            out = column.encoder(*given) if self.unpack and isinstance(given, list | tuple) else column.encoder(given)
        out = out if self.embedding is None else self.embedding(out)
        found, spec = tree_flatten(out)
        if not found or not all(isinstance(x, Tensor) for x in found):
            raise TypeError(
                f"{column.encodes} must return a tensor [rows, D], got {checks.a(out)}; pass embedding=, a function "
                "that takes the tensor out of it"
            )
        for x in found:
            if not x.dim() or len(x) != part.stop - part.start:
                raise ValueError(
                    f"{column.encodes} must return {part.stop - part.start} rows, one per row of its input, "
                    f"got {_shape(x)}"
                )
        return found, spec


class WithMemory(nn.Module):
    """A loss of the batch and of the rows of earlier steps: a memory for each input (ContAccum, Kim et al. 2024).

        loss(cat([x_1, memory_1]), cat([x_2, memory_2]), ...)

    Row i of a memory belongs to row i of the others, so remembered queries are rows of the loss and remembered keys
    their positives. All are constants. A memory takes `rows` x D numbers, and the loss a copy of it.

    The newest rows are kept. Under `torch.no_grad()` the loss is that of the batch alone, and nothing is remembered. A
    batch with a number that is not finite is not remembered either: the memory stays as it was, so that one bad step
    does not spoil those after it. A full memory is kept so by the device alone; while it fills, its length depends on
    the batch's numbers, which the host then reads, once a step. A
    loss that raises leaves the memory as it was. With a loss that has a `group`, each process remembers its own rows.
    `memory`, a list of tensors, is not saved with the parameters; assign `[]` to forget it.

    Args:
        loss: a function or module of embeddings with as many rows each, such as `fusedloss.InfoNCELoss(0.05)` or
            `MultipleNegativesRankingLoss()` with its hard negatives. Its options must fit the longer embeddings.
        rows: how many rows are remembered, at most.

    Raises:
        ValueError, TypeError: rows that is no number above 0; embeddings with different numbers of rows, or of another
            dimension or number than those remembered.

    Example:
        >>> loss = WithMemory(fusedloss.InfoNCELoss(0.05, normalize=True), rows=4096)
        >>> step = GradCache(loss, [query_tower, key_tower], rows=64)
    """

    def __init__(self, loss: Callable[..., Any], rows: int):
        super().__init__()
        if not callable(loss):
            raise TypeError(f"loss must be a module or a function, got {checks.a(loss)}")
        checks.count("rows", rows, optional=False)
        self.loss, self.rows = loss, rows
        self.memory: list[Tensor] = []

    def forward(self, *embeddings: Tensor, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.loss(*embeddings, **options)
        self._check(embeddings)
        past = [m.to(x) for x, m in zip(embeddings, self.memory, strict=True)] if self.memory else []
        whole = [torch.cat(pair) for pair in zip(embeddings, past, strict=True)] if past else list(embeddings)
        result = self.loss(*whole, **options)
        self._remember([x[: self.rows].detach() for x in whole], [x.detach() for x in embeddings], past)
        return result

    def _remember(self, newest: list[Tensor], batch: list[Tensor], past: list[Tensor]) -> None:
        finite = torch.stack([x.isfinite().all().to(batch[0].device) for x in batch]).all()
        if past and len(past[0]) == len(newest[0]):
            kept = zip(newest, past, strict=True)
            self.memory = [torch.where(finite.to(x.device), x, old) for x, old in kept]
        elif bool(finite):
            self.memory = [x.clone() for x in newest]

    def _check(self, embeddings: Sequence[Tensor]) -> None:
        if not embeddings:
            raise ValueError("embeddings must hold at least one tensor, got none")
        checks.embeddings(**{f"embeddings[{number}]": x for number, x in enumerate(embeddings)})
        counts = [len(x) for x in embeddings]
        if len(set(counts)) > 1:
            raise ValueError(f"embeddings must have one number of rows, row by row of one sample, got {counts}")
        widths, known = [x.shape[1] for x in embeddings], [m.shape[1] for m in self.memory]
        if known and widths != known:
            raise ValueError(
                f"embeddings must have the dimensions of those remembered, {known}, got {widths}; assign [] to memory"
            )

    def extra_repr(self) -> str:
        return f"rows={self.rows}"


@dataclass
class _Column:
    """One input of a step, with its encoder, its chunks, and what each pass computes for it."""

    encodes: str  # the encoder's name in errors
    encoder: Encoder
    leaves: list[Any]
    spec: TreeSpec
    size: int
    parts: list[slice]
    may_train: bool
    synced: list[Any]
    # Written by the first pass.
    states: list[list[Tensor]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    returned: TreeSpec | None = None
    # Written by the loss's backward, and by the second pass.
    gradients: list[Tensor | None] = field(default_factory=list)
    constant: bool = False

    def embeddings(self) -> Any:
        assert self.returned is not None
        return tree_unflatten(self.tensors, self.returned)

    @property
    def wanted(self) -> bool:
        return any(g is not None for g in self.gradients)


def _has_rows(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0


def _shape(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _detached(result: Any) -> Any:
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, result)


def _owner(function: Any) -> Any:
    """Returns the module behind a bound method or a partial."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__self__", function)


def _parameters(function: Any) -> Iterator[Any]:
    """Yields the parameters that can be found: those of a module, and what a partial holds."""
    while isinstance(function, functools.partial):
        yield from tree_leaves([function.args, function.keywords])
        function = function.func
    owner = _owner(function)
    if isinstance(owner, nn.Module):
        yield from owner.parameters()


# Chunks ---------------------------------------------------------------------------------------------------------------


def _parts(size: int, rows: int) -> list[slice]:
    """Returns at least one chunk: an empty input needs embeddings, and its encoder must take part in exchanges."""
    return [slice(start, min(start + rows, size)) for start in range(0, max(size, 1), rows)]


def _budget(lengths: Sequence[int], tokens: int) -> list[slice]:
    parts, start, longest = [], 0, 0
    for row, length in enumerate(lengths):
        if row > start and (row + 1 - start) * max(longest, length) > tokens:
            parts.append(slice(start, row))
            start, longest = row, 0
        longest = max(longest, length)
    return [*parts, slice(start, len(lengths))]


# Surroundings ---------------------------------------------------------------------------------------------------------


def _synced(owner: Any) -> list[Any]:
    """Returns the outermost modules that average gradients among processes."""
    if hasattr(owner, "set_requires_gradient_sync") or hasattr(owner, "no_sync"):
        return [owner]
    return [m for child in owner.children() for m in _synced(child)] if isinstance(owner, nn.Module) else []


@contextmanager
def _unsynced(modules: Iterable[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "set_requires_gradient_sync"):  # FSDP2
                stack.callback(module.set_requires_gradient_sync, True)
                module.set_requires_gradient_sync(False)
            elif not _records(module):
                stack.enter_context(module.no_sync())
        yield


def _records(module: Any) -> bool:
    """Whether this is the first backward of a DistributedDataParallel(static_graph=True), which must exchange."""
    return getattr(module, "static_graph", False) and not getattr(
        module, "_static_graph_delay_allreduce_enqueued", True
    )


@contextmanager
def _outside_autocast(columns: Sequence[_Column]) -> Iterator[None]:
    """Leaves autocast for a backward, as a plain step does: autocast would cast the factors of the formulas."""
    with ExitStack() as stack:
        for kind in {
            x.device.type for column in columns for x in (*column.tensors, *column.gradients) if x is not None
        }:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _generators(columns: Sequence[_Column]) -> list[torch.device]:
    """Returns the devices besides the CPU on which encoders may draw: those of their inputs and parameters."""
    tensors = [x for column in columns for x in (*column.leaves, *_parameters(column.encoder)) if isinstance(x, Tensor)]
    devices = {x.device for x in tensors if x.device.type not in ("cpu", "meta")}
    if torch.cuda.is_initialized():  # a function may create tensors there
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    return sorted(devices, key=str)


def _rng_states(devices: Sequence[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(*_one_of(d)) for d in devices)]


def _set_rng_states(devices: Sequence[torch.device], states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.get_device_module(device).set_rng_state(state, *_one_of(device))


def _one_of(device: torch.device) -> list[torch.device]:
    return [] if device.type == "mps" else [device]  # there is one


@contextmanager
def _rng_kept(devices: list[torch.device] | None) -> Iterator[None]:
    """Restores the random states afterwards: the first pass and the loss left them as a plain step does."""
    if devices is None:
        yield
        return
    states = _rng_states(devices)
    try:
        yield
    finally:
        _set_rng_states(devices, states)
