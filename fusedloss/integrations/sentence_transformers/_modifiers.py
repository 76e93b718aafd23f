"""Losses around a loss: all Matryoshka dimensions of a ranking loss in one sweep; any other inner loss as it is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, Literal

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss as AdaptiveLayerLoss
from sentence_transformers.sentence_transformer.losses import Matryoshka2dLoss as _Matryoshka2dLoss
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss as _MatryoshkaLoss
from sentence_transformers.sentence_transformer.losses import matryoshka as _matryoshka
from torch import Tensor, nn

import fusedloss

from .._drop_in import counted, disabled, runs_fused
from .._fits import overridden
from . import _fits
from ._cached import CachedMultipleNegativesRankingLoss, _cached_ranking
from ._duplicates import text_ids
from ._fits import fused
from ._ranking import (
    MultipleNegativesRankingLoss,
    _ranking,
    ranking_arguments,
    ranking_fits,
    settled,
)


def prefixes_fit(loss: Any, dims: Sequence[int], weights: Sequence[Any], embeddings: Sequence[Tensor]) -> str | None:
    """Checks that one sweep computes all prefixes of the ranking loss `loss`."""
    why_not = ranking_fits(loss, embeddings)
    if why_not:
        return why_not
    if len(set(dims)) != len(dims) or max(dims) > embeddings[0].shape[-1]:
        return "its dimensions are not distinct ones of the embeddings"
    return next(filter(None, (_fits.number_fits("weight", weight) for weight in weights)), None)


def prefixes(
    loss: Any,
    library: ModuleType,
    dims: Sequence[int],
    weights: Sequence[float],
    embeddings: Sequence[Tensor],
    labels: Any,
) -> Tensor:
    tensors, options = ranking_arguments(loss, library, embeddings, labels)
    ranking = fusedloss.multiple_negatives_ranking
    return fusedloss.matryoshka(ranking, *tensors, dims=dims, weights=weights, **options)


def steps(count: int, chosen: int) -> Sequence[int]:
    """Returns the dimensions of this step; draws from `random` as the library does."""
    return random.sample(range(count), chosen) if 0 < chosen < count else range(count)


class CachedLossDecorator(_matryoshka.CachedLossDecorator):
    """All dimensions in one sweep, if the decorated loss is our CachedMultipleNegativesRankingLoss."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as the library's class, which loads without fusedloss; MatryoshkaLoss makes it ours again."""
        return object.__new__, (_matryoshka.CachedLossDecorator,), vars(self)

    @counted
    def __call__(self, reps: list[list[Tensor]], labels: Any = None, **kwargs: Any) -> Tensor:
        loss = self.fn.__self__
        columns = [torch.cat(column) for column in reps]
        why_not = prefixes_fit(loss, self.matryoshka_dims, self.matryoshka_weights, columns)
        if not runs_fused("sentence_transformers.MatryoshkaLoss", why_not):
            return super().__call__(reps, labels, **kwargs)
        chosen = steps(len(self.matryoshka_dims), self.n_dims_per_step)
        dims = [self.matryoshka_dims[i] for i in chosen]
        weights = [self.matryoshka_weights[i] for i in chosen]
        return settled(
            prefixes(loss, _cached_ranking, dims, weights, columns, labels), kwargs.get("with_backward", False)
        )


class MatryoshkaLoss(_MatryoshkaLoss):
    """sentence-transformers' loss of this name. Around our (cached) MultipleNegativesRankingLoss all dimensions share
    one similarity product and one for each gradient; around any other loss it is the library's loop.
    """

    def __init__(
        self,
        model: Any,
        loss: nn.Module,
        matryoshka_dims: Sequence[int],
        matryoshka_weights: Sequence[float] | Sequence[int] | None = None,
        n_dims_per_step: int = -1,
    ) -> None:
        super().__init__(model, loss, matryoshka_dims, matryoshka_weights, n_dims_per_step)
        self._share_products()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share_products()

    def _share_products(self) -> None:
        loss: Any = self.loss
        decorator = vars(loss).get("calculate_loss")
        method = getattr(decorator, "fn", None)
        own = CachedMultipleNegativesRankingLoss.calculate_loss
        if type(decorator) is _matryoshka.CachedLossDecorator and getattr(method, "__func__", None) is own:
            loss.calculate_loss = CachedLossDecorator(
                method, self.matryoshka_dims, self.matryoshka_weights, self.n_dims_per_step
            )

    @counted
    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any = None) -> Tensor:
        columns = list(sentence_features)
        if not self._around_ours() or disabled():
            return super().forward(columns, labels)
        if self.loss.duplicates == "texts":
            labels = text_ids(columns)
        embeddings = embed_columns(self.model, columns)
        why_not = prefixes_fit(self.loss, self.matryoshka_dims, self.matryoshka_weights, embeddings)
        chosen = steps(len(self.matryoshka_dims), self.n_dims_per_step)
        dims = [self.matryoshka_dims[i] for i in chosen]
        weights = [self.matryoshka_weights[i] for i in chosen]
        if fused(self, why_not):
            return prefixes(self.loss, _ranking, dims, weights, embeddings, labels)
        loss: Any = 0.0
        for dim, weight in zip(dims, weights, strict=True):
            cut = [_matryoshka.shrink(x, dim) for x in embeddings]
            loss = loss + weight * self.loss.compute_loss_from_embeddings(cut, labels)
        return loss

    def _around_ours(self) -> bool:
        inner = self.loss
        return (
            not self.uses_gradient_cache
            and isinstance(inner, MultipleNegativesRankingLoss)
            and inner.model is self.model
            and not (inner._forward_hooks or inner._forward_pre_hooks or inner._backward_hooks)
            and not overridden(inner, MultipleNegativesRankingLoss, "compute_loss_from_embeddings")
            and not overridden(inner, MultipleNegativesRankingLoss, "forward")
        )


class Matryoshka2dLoss(_Matryoshka2dLoss):
    """sentence-transformers' loss of this name, whose MatryoshkaLoss is ours."""

    def __init__(
        self,
        model: Any,
        loss: nn.Module,
        matryoshka_dims: list[int],
        matryoshka_weights: list[float | int] | None = None,
        n_layers_per_step: int = 1,
        n_dims_per_step: int = 1,
        last_layer_weight: float = 1.0,
        prior_layers_weight: float = 1.0,
        kl_div_weight: float = 1.0,
        kl_temperature: float = 0.3,
        layer_weighting: Literal["uniform", "log", "linear"] | Callable[[int], float] = "uniform",
    ) -> None:
        AdaptiveLayerLoss.__init__(
            self,
            model,
            MatryoshkaLoss(model, loss, matryoshka_dims, matryoshka_weights, n_dims_per_step),
            n_layers_per_step=n_layers_per_step,
            last_layer_weight=last_layer_weight,
            prior_layers_weight=prior_layers_weight,
            kl_div_weight=kl_div_weight,
            kl_temperature=kl_temperature,
            layer_weighting=layer_weighting,
        )
