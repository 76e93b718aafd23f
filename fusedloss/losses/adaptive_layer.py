"""Losses of several layers of an encoder, so that its last layers can be dropped; alone, or of prefixes as well."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import checks
from ..core.numerics import stats_dtype
from ..core.problem import Ranks
from ..distributed import World, alike, averaged, scaled
from ._options import name_of, world_of_calls
from .matryoshka import matryoshka

WEIGHTINGS: dict[str, Callable[[int], float]] = {
    "uniform": lambda layer: 1.0,
    "log": lambda layer: 1 / (1 + math.log(1 + layer)),
    "linear": lambda layer: 1 / (1 + layer),
}


def adaptive_layer(
    loss: Callable[..., Tensor],
    /,
    *columns: Tensor | Sequence[Tensor],
    layer_indices: Sequence[int] | None = None,
    last_layer_weight: float = 1.0,
    prior_layers_weight: float = 1.0,
    kl_div_weight: float = 1.0,
    kl_temperature: float = 0.3,
    layer_weighting: str | Callable[[int], float] = "uniform",
    **loss_options: Any,
) -> Tensor:
    """Adaptive layers (Li et al. 2024, 2DMSE) as in sentence-transformers' AdaptiveLayerLoss: a loss of every layer.

        total = last_layer_weight * loss(last)
              + sum_{i in layer_indices} prior_layers_weight * w_i / len(layer_indices) * loss(layer_i)
                                       + kl_div_weight * T * KL(softmax(last / T) || softmax(layer_i / T))

    with T = kl_temperature and the KL summed over the features, averaged over the rows of all columns. The last layer
    is the teacher in it and gets no gradient from it.

    With `group=` the loss of each layer and the KL term are those of all ranks' rows. Layers and their weights must be
    those of the other ranks: draw them alike.

    Args:
        loss: one of this package's functions, or any callable of embeddings.
        columns: for each of the embeddings that the loss takes, those of all layers, the last one last: a tensor
            `[layers, rows, D]` or a sequence of matrices `[rows, D]`.
        layer_indices: the layers before the last that count in this step, from 0 (the embedding layer's output); None:
            all. The paper draws one at random in each step: `random.sample(range(layers - 1), 1)`.
        last_layer_weight, prior_layers_weight, kl_div_weight: see the formula.
        kl_temperature: T of the KL term; 0 leaves the term out.
        layer_weighting: of the prior layers' losses, `w_i`: "uniform": 1, "log": `1 / (1 + ln(1 + i))`, "linear":
            `1 / (1 + i)`, or a function of i.
        loss_options: given to the loss as they are.

    Returns:
        What the loss returns, a 0-dim tensor.

    Raises:
        ValueError, TypeError, IndexError: columns of different numbers of layers, indices of no prior layer, an unknown
            weighting; and what the loss raises. With `group=`, on all ranks.

    Example:
        >>> layers = [model.layer(text, i) for i in range(13)], [model.layer(answer, i) for i in range(13)]
        >>> fusedloss.adaptive_layer(fusedloss.multiple_negatives_ranking, *layers, layer_indices=[4]).backward()
    """
    world = world_of_calls(loss, loss_options)

    def plan() -> _Plan:
        checks.function("loss", loss, "fusedloss.info_nce")
        count = _layers(columns)
        indices = _prior(layer_indices, count)
        for name, value in (
            ("last_layer_weight", last_layer_weight),
            ("prior_layers_weight", prior_layers_weight),
            ("kl_div_weight", kl_div_weight),
            ("kl_temperature", kl_temperature),
        ):
            checks.number(name, value)
        if kl_temperature < 0:
            raise ValueError(f"kl_temperature must be a positive number, or 0 for no KL term, got {kl_temperature}")
        if not callable(layer_weighting):
            checks.choice("layer_weighting", layer_weighting, tuple(WEIGHTINGS))
        weighting = layer_weighting if callable(layer_weighting) else WEIGHTINGS[layer_weighting]
        if loss_options.get("return_stats"):
            raise ValueError(
                "return_stats must be False, got True; statistics differ per layer: call the loss itself on one layer"
            )
        divergence = kl_temperature * kl_div_weight
        if world is not None and divergence and loss_options.get("reduction") == "none":
            raise ValueError(
                "reduction must be 'mean' or 'sum' with group and a KL term, which is of all ranks' rows, got 'none'; "
                "pass kl_div_weight=0"
            )
        weights = tuple(prior_layers_weight * weighting(i) / len(indices) for i in indices)
        return _Plan(count, tuple(indices), weights, divergence)

    if world is not None:
        alike(world, lambda: "\n".join([f"adaptive_layer of {name_of(loss)}", *plan().said()]))
    found = plan()
    last = [column[found.layers - 1] for column in columns]
    total = loss(*last, **loss_options) * last_layer_weight
    for i, weight in zip(found.indices, found.weights, strict=True):
        layer = [column[i] for column in columns]
        total = total + loss(*layer, **loss_options) * weight
        if found.divergence:
            total = total + _divergence(layer, last, kl_temperature, world) * found.divergence
    return total


class _Plan(NamedTuple):
    layers: int
    indices: tuple[int, ...]
    weights: tuple[float, ...]  # of the losses of these layers
    divergence: float  # the weight of the KL term

    def said(self) -> list[str]:
        """Returns what ranks must have in common, a line each."""
        return [f"layers {self.indices} of {self.layers}", f"weights {self.weights}", f"KL term {self.divergence}"]


def matryoshka_2d(
    loss: Callable[..., Tensor],
    /,
    *columns: Tensor | Sequence[Tensor],
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    layer_indices: Sequence[int] | None = None,
    last_layer_weight: float = 1.0,
    prior_layers_weight: float = 1.0,
    kl_div_weight: float = 1.0,
    kl_temperature: float = 0.3,
    layer_weighting: str | Callable[[int], float] = "uniform",
    **loss_options: Any,
) -> Tensor:
    """Two-dimensional Matryoshka (Li et al. 2024): `adaptive_layer` of `matryoshka` of a loss.

    The KL term is that of whole embeddings, as in sentence-transformers' Matryoshka2dLoss.

    Args:
        loss, columns, layer_indices, last_layer_weight, prior_layers_weight: as in `adaptive_layer`.
        kl_div_weight, kl_temperature, layer_weighting: as in `adaptive_layer`.
        dims, weights: as in `matryoshka`.
        loss_options: given to the loss as they are.

    Returns:
        What the loss returns, a 0-dim tensor.

    Raises:
        ValueError, TypeError, IndexError: what `adaptive_layer` and `matryoshka` raise.

    Example:
        >>> loss = fusedloss.matryoshka_2d(fusedloss.info_nce, query_layers, key_layers, dims=(384, 128, 32))
        >>> loss.backward()
    """
    return adaptive_layer(
        functools.partial(matryoshka, loss, dims=dims, weights=weights),
        *columns,
        layer_indices=layer_indices,
        last_layer_weight=last_layer_weight,
        prior_layers_weight=prior_layers_weight,
        kl_div_weight=kl_div_weight,
        kl_temperature=kl_temperature,
        layer_weighting=layer_weighting,
        **loss_options,
    )


def _layers(columns: Sequence[Tensor | Sequence[Tensor]]) -> int:
    if not columns:
        raise ValueError("columns must hold every layer's embeddings, for each argument of the loss, got none")
    for i, column in enumerate(columns):
        if not isinstance(column, Tensor):
            checks.sequence(f"columns[{i}]", column, "every layer's embeddings", "[layer_0, layer_1]")
        if isinstance(column, Tensor) and column.dim() != 3:
            raise ValueError(
                f"columns[{i}] must be [layers, rows, D] or a sequence of [rows, D], got shape {list(column.shape)}"
            )
        if not len(column):
            raise ValueError(f"columns[{i}] must have at least one layer, got none")
        if len(column) != len(columns[0]):
            raise ValueError(f"columns[{i}] must have {len(columns[0])} layers, like columns[0], got {len(column)}")
        checks.embeddings(**{f"columns[{i}][{layer}]": x for layer, x in enumerate(column)})
    return len(columns[0])


def _prior(indices: Sequence[int] | None, count: int) -> Sequence[int]:
    if indices is None:
        return range(count - 1)
    checks.sequence("layer_indices", indices, "layers", "[0]")
    for i in indices:
        checks.index("layer_indices", i)
        if not 0 <= i < count - 1:
            raise IndexError(f"layer_indices must be from 0 to {count - 2}, before the last of {count} layers, got {i}")
    if len(set(indices)) != len(indices):
        raise ValueError(f"layer_indices must be distinct, got {list(indices)}")
    return indices


def _divergence(
    students: Sequence[Tensor], teachers: Sequence[Tensor], temperature: float, world: World | None
) -> Tensor:
    """Returns the mean over all rows, and all ranks', of `KL(softmax(teacher / T) || softmax(student / T))`."""
    rows = sum(len(x) for x in students)
    if world is not None:
        students = [scaled(x, world.factors[0]) for x in students]
    total = None
    for student, teacher in zip(students, teachers, strict=True):
        dtype = stats_dtype(student.dtype)
        with torch.autocast(student.device.type, enabled=False):
            log_q = F.log_softmax(student.to(dtype) / temperature, dim=1)
            log_p = F.log_softmax(teacher.detach().to(dtype) / temperature, dim=1)
            part = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        total = part if total is None else total + part
    assert total is not None
    if world is None:
        return total / max(rows, 1)
    ranks = Ranks(world.group.group_name, world.rank, (0,) * world.size)
    return averaged(total, torch.full_like(total, rows), ranks, "mean")
