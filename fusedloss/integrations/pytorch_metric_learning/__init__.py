"""Drop-ins for pytorch-metric-learning's losses: same constructors, distances, reducers and results.

    from fusedloss.integrations import pytorch_metric_learning as fused

    fused.patch()       # before `NTXentLoss(...)` is built

If labels define the pairs, nothing of size N x N is stored, also with `ref_emb` and in `CrossBatchMemory`: neither
similarities nor lists of indices. Losses of rows (SupCon, MultiSimilarity, Circle, ArcFace, CosFace, ProxyNCA) are
computed as vectors, so every reducer and regularizer of the library works. Losses of pairs and triplets are computed as
sums, for MeanReducer, SumReducer and AvgNonZeroReducer; with other reducers ContrastiveLoss and TripletMarginLoss run
the library's code.

With an `indices_tuple`, NTXentLoss is linear in the number of pairs (the library multiplies positive by negative
pairs), and TripletMarginLoss computes the distances of the listed triplets only, if those are fewer than the batch has
pairs.

Everything is computed in fp32 (fp64 for fp64) and returned in the embeddings' dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...core import checks
from ...core.numerics import autocasting, stats_dtype
from ...losses.margin_softmax import arcface, cosface
from ...losses.proxies import proxy_anchor, proxy_nca
from .._drop_in import Patch, counted, disabled, library, library_is_faster, runs_fused
from .._fits import a_class_is_outside, alike, overridden, plain, refusal

library("pytorch_metric_learning", "pytorch-metric-learning", "2.9.0")

from pytorch_metric_learning import reducers  # noqa: E402
from pytorch_metric_learning.losses import ArcFaceLoss as _ArcFaceLoss  # noqa: E402
from pytorch_metric_learning.losses import CircleLoss as _CircleLoss  # noqa: E402
from pytorch_metric_learning.losses import ContrastiveLoss as _ContrastiveLoss  # noqa: E402
from pytorch_metric_learning.losses import CosFaceLoss as _CosFaceLoss  # noqa: E402
from pytorch_metric_learning.losses import CrossBatchMemory as _CrossBatchMemory  # noqa: E402
from pytorch_metric_learning.losses import MultiSimilarityLoss as _MultiSimilarityLoss  # noqa: E402
from pytorch_metric_learning.losses import NTXentLoss as _NTXentLoss  # noqa: E402
from pytorch_metric_learning.losses import ProxyAnchorLoss as _ProxyAnchorLoss  # noqa: E402
from pytorch_metric_learning.losses import ProxyNCALoss as _ProxyNCALoss  # noqa: E402
from pytorch_metric_learning.losses import SupConLoss as _SupConLoss  # noqa: E402
from pytorch_metric_learning.losses import TripletMarginLoss as _TripletMarginLoss  # noqa: E402
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu  # noqa: E402

from ._pairs import AllPairs, Kind, Pairs, kind_of, listed, record, reduced, reducer_of, takes_a_sum, takes_sums  # noqa: E402

NAME = "pytorch_metric_learning."
SIMILARITIES = ("dot",)
criterion_fits, soft_plus_fits = plain(nn.CrossEntropyLoss, reduction="none"), plain(nn.Softplus)
# A listed pair costs about as much as this many pairs of a matrix product: it gathers, without reuse. Up to so many are
# listed nevertheless: their distances come from differences, so equal rows have exactly 0, and reducers count losses
# above 0.
LISTED, FEW = 8, 1 << 16


# Losses of pairs ------------------------------------------------------------------------------------------------------


def _fits(loss: Any, embeddings: Any, ref_emb: Any, kinds: tuple[str, ...]) -> str | None:
    kind = kind_of(loss.distance)
    if kind is None or kind.name not in kinds:
        return "of its distance, which has no fused form here"
    if alike(embeddings, ref_emb, same_rows=False):
        return None
    return refusal(checks.embeddings, embeddings=embeddings, ref_emb=ref_emb)


def _small(name: str, embeddings: Tensor, ref_emb: Tensor) -> bool:
    return library_is_faster(NAME + name, embeddings, embeddings.shape[0] * ref_emb.shape[0])


def _labelled(
    loss: Any, arguments: tuple[Any, ...], ours: type, *hooks: str, kinds: tuple[str, ...] = SIMILARITIES
) -> str | None:
    """Returns the reason against pairs by label, or None. arguments: those of compute_loss."""
    embeddings, labels, indices_tuple, ref_emb, ref_labels = arguments
    reason = overridden(loss, ours, *hooks) or _fits(loss, embeddings, ref_emb, kinds)
    if reason:
        return reason
    if indices_tuple is not None and not isinstance(indices_tuple, AllPairs):
        return "the pairs are given as an indices_tuple"
    for given, rows in ((labels, embeddings), (labels if ref_labels is None else ref_labels, ref_emb)):
        if not isinstance(given, Tensor) or given.dtype.is_floating_point or given.dtype.is_complex:
            return "labels are not integers"
        if given.shape != rows.shape[:1] or given.device != rows.device:
            return "labels are not one number per row on the device of the embeddings"
    return None


def _pairs(loss: Any, arguments: tuple[Any, ...]) -> Pairs:
    embeddings, labels, indices_tuple, ref_emb, ref_labels = arguments
    record(loss.distance, embeddings, ref_emb)
    kind = kind_of(loss.distance)
    assert kind is not None
    start = indices_tuple.start if isinstance(indices_tuple, AllPairs) else None
    return Pairs(kind, embeddings, labels, ref_emb, ref_labels, start)


def _elements(loss: Tensor, like: Tensor) -> dict[str, Any]:
    """Losses of rows."""
    indices = torch.arange(len(like), device=like.device)
    return {"losses": loss.to(like.dtype), "indices": indices, "reduction_type": "element"}


class NTXentLoss(_NTXentLoss):
    """NTXentLoss in O(N D) memory by labels, O(pairs) with an indices_tuple; the library's is cubic.

    By labels: one log-sum-exp of each row's negatives in a sweep, and the similarities of the positive pairs.
    """

    @counted
    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        arguments = embeddings, labels, indices_tuple, ref_emb, ref_labels
        if _small("NTXentLoss", embeddings, ref_emb):
            return super().compute_loss(*arguments)
        why_not = overridden(self, NTXentLoss, "_compute_loss", "pair_based_loss")
        why_not = why_not or refusal(checks.scalar, "temperature", self.temperature, None, positive=True)
        if labels is None and indices_tuple is None:
            why_not = why_not or "neither labels nor pairs are given"
        if not runs_fused(NAME + "NTXentLoss", why_not):
            return super().compute_loss(*arguments)
        swept = _labelled(self, arguments, NTXentLoss) is None
        return self._by_label(_pairs(self, arguments)) if swept else self._by_list(*arguments)

    def _by_label(self, pairs: Pairs) -> dict[str, Any]:
        if min(pairs.counts) == 0 or max(pairs.counts) <= 1:
            return self.zero_losses()
        row, column = pairs.positive_pairs()
        negative = pairs.log_sum_exp_of_negatives(1 / self.temperature)
        negative = negative.masked_fill(pairs.negatives == 0, -torch.inf)
        positive = listed(pairs.kind, pairs.x, pairs.y, row, column) / self.temperature
        return self._of_pairs(negative[row], positive, (row, pairs.places(column)), pairs.x)

    def _by_list(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        """Computes the loss of listed pairs, with any distance of the library; in fp32 for 16-bit embeddings."""
        row, column, anchors, others = lmu.convert_to_pairs(indices_tuple, labels, ref_labels)
        if min(len(row), len(anchors)) == 0 or max(len(row), len(anchors)) <= 1:
            return self.zero_losses()
        x = embeddings.to(stats_dtype(embeddings.dtype))
        y = x if ref_emb is embeddings else ref_emb.to(stats_dtype(ref_emb.dtype))
        matrix = self.distance(x, y)
        sign = 1 if self.distance.is_inverted else -1
        positive, negative = (sign * matrix[pair] / self.temperature for pair in ((row, column), (anchors, others)))
        logs = _log_sum_exp(negative.to(stats_dtype(negative.dtype)), anchors, len(x))
        return self._of_pairs(logs[row], positive.to(logs.dtype), (row, column), embeddings)

    @staticmethod
    def _of_pairs(
        negative: Tensor, positive: Tensor, indices: tuple[Tensor, Tensor], embeddings: Tensor
    ) -> dict[str, Any]:
        """Returns `log(1 + exp(negative - positive))`; the library adds the dtype's tiny to the probability."""
        loss = torch.logaddexp(negative - positive, torch.zeros_like(positive))
        least = math.log(torch.finfo(_product_dtype(embeddings)).tiny)
        loss = -torch.logaddexp(-loss, torch.full_like(loss, least))
        return {"loss": {"losses": loss.to(embeddings.dtype), "indices": indices, "reduction_type": "pos_pair"}}


def _product_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of a matrix product of `x`."""
    return torch.get_autocast_dtype(x.device.type) if autocasting(x) and x.dtype != torch.float64 else x.dtype


def _log_sum_exp(z: Tensor, group: Tensor, groups: int) -> Tensor:
    """Returns the log-sum-exp of each group's elements `[groups]`; -inf for none."""
    shift = z.new_full((groups,), -torch.inf).scatter_reduce_(0, group, z.detach(), "amax")
    shift = shift.masked_fill(shift.isinf(), 0)
    total = torch.zeros_like(shift).index_add(0, group, (z - shift[group]).exp())
    none = total == 0
    return (total.masked_fill(none, 1).log() + shift).masked_fill(none, -torch.inf)


class SupConLoss(_SupConLoss):
    """SupConLoss in O(N D) memory: one log-sum-exp of each row in a sweep; positives through the sums of each label."""

    @counted
    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        arguments = embeddings, labels, indices_tuple, ref_emb, ref_labels
        if _small("SupConLoss", embeddings, ref_emb):
            return super().compute_loss(*arguments)
        why_not = _labelled(self, arguments, SupConLoss, "_compute_loss", "mat_based_loss")
        why_not = why_not or refusal(checks.scalar, "temperature", self.temperature, embeddings, positive=True)
        if not runs_fused(NAME + "SupConLoss", why_not):
            return super().compute_loss(*arguments)
        pairs = _pairs(self, arguments)
        if min(pairs.counts) == 0 or max(pairs.counts) <= 1:
            return self.zero_losses()
        loss = pairs.log_sum_exp_of_all(1 / self.temperature) - pairs.mean_positive() / self.temperature
        return {"loss": _elements(loss.masked_fill(pairs.positives == 0, 0), embeddings)}


class MultiSimilarityLoss(_MultiSimilarityLoss):
    """MultiSimilarityLoss in one sweep, in O(N D) memory."""

    @counted
    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        arguments = embeddings, labels, indices_tuple, ref_emb, ref_labels
        if _small("MultiSimilarityLoss", embeddings, ref_emb):
            return super().compute_loss(*arguments)
        why_not = _labelled(self, arguments, MultiSimilarityLoss, "_compute_loss", "mat_based_loss")
        for name in ("alpha", "beta"):
            why_not = why_not or refusal(checks.scalar, name, getattr(self, name), None, positive=True)
            why_not = why_not or refusal(checks.number, name, getattr(self, name))
        why_not = why_not or refusal(checks.number, "base", self.base)
        if not runs_fused(NAME + "MultiSimilarityLoss", why_not):
            return super().compute_loss(*arguments)
        pairs = _pairs(self, arguments)
        if max(pairs.counts) <= 1:
            return self.zero_losses()
        summed = takes_a_sum(reducer := reducer_of(self, "loss"))
        options = float(self.alpha), float(self.beta), float(self.base)
        loss, _ = pairs.fold("multi_similarity", options, summed=summed)
        if summed:
            return {"loss": reduced(reducer, loss, None, len(embeddings), embeddings.dtype)}
        return {"loss": _elements(loss[:, None], embeddings)}


class CircleLoss(_CircleLoss):
    """CircleLoss in one sweep, in O(N D) memory; float16 embeddings run the library's code."""

    @counted
    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        arguments = embeddings, labels, indices_tuple, ref_emb, ref_labels
        if _small("CircleLoss", embeddings, ref_emb):
            return super().compute_loss(*arguments)
        why_not = _labelled(self, arguments, CircleLoss, "_compute_loss", "mat_based_loss")
        why_not = why_not or refusal(checks.number, "m", self.m)
        why_not = why_not or refusal(checks.scalar, "gamma", self.gamma, None, positive=True)
        why_not = why_not or refusal(checks.number, "gamma", self.gamma)
        if why_not is None:
            own = (self.op, self.on, self.delta_p, self.delta_n) == (1 + self.m, -self.m, 1 - self.m, self.m)
            if not own or soft_plus_fits(self.soft_plus):
                why_not = "op, on, delta_p, delta_n or soft_plus are not those of the constructor"
        if why_not is None and embeddings.dtype == torch.float16:
            # A rounding of fp16 times gamma is a whole number: the library's result depends on its order of operations.
            why_not = "in float16 gamma multiplies the rounding of upstream's cosines"
        if not runs_fused(NAME + "CircleLoss", why_not):
            return super().compute_loss(*arguments)
        pairs = _pairs(self, arguments)
        if max(pairs.counts) <= 1:
            return self.zero_losses()
        loss, _ = pairs.fold("circle", (float(self.m), float(self.gamma)))
        return {"loss": _elements(loss[:, None], embeddings)}


class ContrastiveLoss(_ContrastiveLoss):
    """ContrastiveLoss in O(N D) memory: a sweep of the negative pairs, and a list or a sweep of the positive ones."""

    @counted
    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        arguments = embeddings, labels, indices_tuple, ref_emb, ref_labels
        if disabled() or _small("ContrastiveLoss", embeddings, ref_emb):
            return super().compute_loss(*arguments)
        hooks = "_compute_loss", "pair_based_loss", "get_per_pair_loss", "pos_calc", "neg_calc"
        kinds = ("dot", "euclidean", "squared")
        why_not = _labelled(self, arguments, ContrastiveLoss, *hooks, kinds=kinds)
        why_not = why_not or refusal(checks.number, "pos_margin", self.pos_margin)
        why_not = why_not or refusal(checks.number, "neg_margin", self.neg_margin)
        found = self._swept(arguments) if why_not is None else None
        if (
            not runs_fused(NAME + "ContrastiveLoss", why_not or (None if found else "of its reducer, or a NaN"))
            or found is None
        ):
            return super().compute_loss(*arguments)
        return found

    def _swept(self, arguments: tuple[Any, ...]) -> dict[str, Any] | None:
        pairs = _pairs(self, arguments)
        if max(pairs.counts) <= 1:
            return self.zero_losses()
        # The library's margin(x, y) is x - y for distances and y - x for similarities.
        sign = -1.0 if pairs.kind.inverted else 1.0
        found = {"pos_loss": self.zero_loss(), "neg_loss": self.zero_loss()}
        for name, margin, slope, number in (
            ("pos_loss", self.pos_margin, sign, pairs.counts[0]),
            ("neg_loss", self.neg_margin, -sign, pairs.counts[1]),
        ):
            reducer, pulls = reducer_of(self, name), name == "pos_loss"
            if not number:
                continue
            if pulls and number <= max(FEW, len(pairs.x) * len(pairs.y) // LISTED):
                row, column = pairs.positive_pairs()
                loss = (slope * (listed(pairs.kind, pairs.x, pairs.y, row, column) - margin)).relu()
                found[name] = {
                    "losses": loss.to(pairs.x.dtype),
                    "indices": (row, pairs.places(column)),
                    "reduction_type": "pos_pair",
                }
                continue
            if not takes_sums(reducer):
                return None
            total, above = pairs.fold("pair_hinge", (float(margin), slope, float(pulls)), summed=True)
            if total.isnan():  # the library's AvgNonZeroReducer leaves NaN out
                return None
            found[name] = reduced(reducer, total, above, number, pairs.x.dtype)
        return found


class TripletMarginLoss(_TripletMarginLoss):
    """TripletMarginLoss over all triplets of the labels by sorting each row, in O(N D) memory; the library's is cubic.

    For given triplets, or those drawn by `triplets_per_anchor`, only the distances of their pairs are computed.
    """

    @counted
    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        arguments = embeddings, labels, indices_tuple, ref_emb, ref_labels
        if disabled() or _small("TripletMarginLoss", embeddings, ref_emb):
            return super().compute_loss(*arguments)
        kinds = ("dot", "euclidean", "squared")
        drawn = indices_tuple is None and self.triplets_per_anchor != "all" and labels is not None
        if drawn or not (indices_tuple is None or isinstance(indices_tuple, AllPairs)):
            chosen = lmu.convert_to_triplets(indices_tuple, labels, ref_labels, t_per_anchor=self.triplets_per_anchor)
            why_not = _fits(self, embeddings, ref_emb, kinds)
            if why_not is None and LISTED * len(chosen[0]) > embeddings.shape[0] * ref_emb.shape[0]:
                why_not = "there are more triplets than distances are saved"
            # Passes the drawn triplets to the library, which would draw others.
            arguments = embeddings, labels, chosen, ref_emb, ref_labels
            found = None if why_not else self._chosen(embeddings, ref_emb, chosen)
        else:
            why_not = _labelled(self, arguments, TripletMarginLoss, kinds=kinds)
            why_not = why_not or refusal(checks.number, "margin", self.margin)
            if why_not is None and (self.swap or self.smooth_loss):
                why_not = "swap and smooth_loss need every triplet"
            if why_not is None and not takes_sums(reducer_of(self, "loss")):
                why_not = "of its reducer"
            found = None if why_not else self._all(arguments)
            if found is None:
                why_not = why_not or "a distance is NaN"
        if not runs_fused(NAME + "TripletMarginLoss", why_not) or found is None:
            return super().compute_loss(*arguments)
        return found

    def _all(self, arguments: tuple[Any, ...]) -> dict[str, Any] | None:
        pairs = _pairs(self, arguments)
        number = int((pairs.positives * pairs.negatives).sum())
        if not number:
            return self.zero_losses()
        total, above = pairs.fold("batch_all", (float(self.margin),), distance="cosine", summed=True)
        if total.isnan():
            return None
        return {"loss": reduced(reducer_of(self, "loss"), total, above, number, pairs.x.dtype)}

    def _chosen(self, x: Tensor, y: Tensor, triplets: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
        anchor, positive, negative = triplets
        if not len(anchor):
            return self.zero_losses()
        record(self.distance, x, y)
        kind = kind_of(self.distance)
        assert kind is not None
        near, far = listed(kind, x, y, anchor, positive), listed(kind, x, y, anchor, negative)
        if self.swap:
            far = self.distance.smallest_dist(far, listed(kind, x, y, positive, negative))
        violation = self.distance.margin(near, far) + self.margin
        loss = nn.functional.softplus(violation) if self.smooth_loss else violation.relu()
        return {"loss": {"losses": loss.to(x.dtype), "indices": triplets, "reduction_type": "triplet"}}


IN_MEMORY = (NTXentLoss, SupConLoss, MultiSimilarityLoss, CircleLoss, ContrastiveLoss, TripletMarginLoss)


class CrossBatchMemory(_CrossBatchMemory):
    """CrossBatchMemory (XBM) without lists of pairs: the losses here know from the labels which pairs there are."""

    @counted
    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        E_mem: Tensor,
        L_mem: Tensor,
        input_indices_tuple: Any,
        do_remove_self_comparisons: bool,
    ) -> Any:
        why_not = None if type(self.loss) in IN_MEMORY else "its loss is none of those here"
        if self.miner is not None or input_indices_tuple is not None:
            why_not = why_not or "a miner lists the pairs"
        if not runs_fused(NAME + "CrossBatchMemory", why_not):
            return super().create_indices_tuple(
                embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons
            )
        if not do_remove_self_comparisons:  # the memory holds other rows
            return None
        return AllPairs(labels, L_mem, (self.queue_idx - len(embeddings)) % self.memory_size)


# Losses of classes ----------------------------------------------------------------------------------------------------


def _classed(
    loss: Any, arguments: tuple[Any, ...], vectors: Tensor, ours: type, *hooks: str, distance: Kind
) -> str | None:
    embeddings, labels, _, ref_emb, ref_labels = arguments
    reason = overridden(loss, ours, *hooks)
    if reason or labels is None or ref_emb is not embeddings or ref_labels is not labels:
        return reason or "labels are missing, or ref_emb is given"
    if kind_of(loss.distance) != distance:
        return "of its distance, which has no fused form here"
    reason = None if alike(embeddings) else refusal(checks.embeddings, embeddings=embeddings)
    if reason or vectors.dim() != 2 or vectors.shape[1] != embeddings.shape[1] or not vectors.shape[0]:
        return reason or "the class vectors have another shape, dtype or device"
    return None if len(embeddings) else "the batch is empty"


def _classes_fit(labels: Any, classes: int, embeddings: Tensor) -> str | None:
    """Checks for one class per row, of which there is at least one."""
    if (
        type(labels) is Tensor
        and labels.dtype is torch.int64
        and labels.shape == embeddings.shape[:1]
        and labels.device == embeddings.device
        and checks.reads_values(labels)
        and not a_class_is_outside(labels, classes, 0)  # one pass where checks.target, which names the row, takes four
    ):
        return None
    return refusal(checks.target, "labels", labels, len(embeddings), classes, None, embeddings)


COSINE = Kind("dot", True)


class _MarginSoftmax:
    """Shared by ArcFaceLoss and CosFaceLoss: the score stage of LargeMarginSoftmaxLoss.compute_loss."""

    HOOKS = (
        "modify_cosine_of_target_classes",
        "scale_logits",
        "get_cosine",
        "get_logits",
        "get_target_mask",
        "get_angles",
        "cast_types",
    )

    def _fits(self: Any, arguments: tuple[Any, ...], ours: type) -> str | None:
        embeddings, labels = arguments[:2]
        reason = _classed(self, arguments, self.W.t(), ours, *self.HOOKS, distance=COSINE)
        if reason is None and criterion_fits(self.cross_entropy):
            reason = "cross_entropy is not the CrossEntropyLoss of the constructor"
        if reason is None and self.collect_stats:
            reason = "its collect_stats is set"
        reason = reason or _classes_fit(labels, self.W.shape[1], embeddings)
        reason = reason or refusal(checks.number, "margin", self.margin)
        reason = reason or refusal(checks.number, "scale", self.scale)
        return reason or refusal(checks.scalar, "scale", self.scale, embeddings, positive=True)

    def _classes(self: Any) -> Tensor:
        """The class vectors, row by row: products and norms of columns take up to 1.6 times as long, one copy less."""
        return self.W.t().contiguous()

    def _losses(self: Any, function: Any, embeddings: Tensor, labels: Tensor, indices_tuple: Any) -> dict[str, Any]:
        """Of rows; as a sum where the reducer takes one, which spares a sweep."""
        summed = indices_tuple is None and takes_a_sum(reducer := reducer_of(self, "loss"))
        reduction = "sum" if summed else "none"
        margin, scale = float(self.margin), self.scale
        loss = function(embeddings, labels, self._classes(), margin=margin, scale=scale, reduction=reduction)
        if summed:
            found = {"loss": reduced(reducer, loss, None, len(embeddings), embeddings.dtype)}
        else:
            weights = lmu.convert_to_weights(indices_tuple, labels, dtype=loss.dtype)
            found = {"loss": _elements(loss * weights, embeddings)}
        self.add_weight_regularization_to_loss_dict(found, self.W.t())
        return found


class ArcFaceLoss(_MarginSoftmax, _ArcFaceLoss):
    """ArcFaceLoss without a [B, C] matrix; angles in fp64, and finite gradients at an angle of 0."""

    @counted
    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        arguments = embeddings, labels, indices_tuple, ref_emb, ref_labels
        why_not = self._fits(arguments, ArcFaceLoss)
        if why_not is None and not 0 <= self.margin < math.pi:
            why_not = "the margin is not from 0 to below 180 degrees"
        if not runs_fused(NAME + "ArcFaceLoss", why_not):
            return super().compute_loss(*arguments)
        self.cast_types(embeddings.dtype, embeddings.device)
        record(self.distance, embeddings, self.W.t())
        return self._losses(arcface, embeddings, labels, indices_tuple)


class CosFaceLoss(_MarginSoftmax, _CosFaceLoss):
    """CosFaceLoss without a [B, C] matrix."""

    @counted
    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        arguments = embeddings, labels, indices_tuple, ref_emb, ref_labels
        small = library_is_faster(NAME + "CosFaceLoss", embeddings, embeddings.shape[0] * self.W.shape[1])
        if small or not runs_fused(NAME + "CosFaceLoss", self._fits(arguments, CosFaceLoss)):
            return super().compute_loss(*arguments)
        self.cast_types(embeddings.dtype, embeddings.device)
        record(self.distance, embeddings, self.W.t())
        return self._losses(cosface, embeddings, labels, indices_tuple)


class ProxyNCALoss(_ProxyNCALoss):
    """ProxyNCALoss without a [B, C] matrix; rows whose probability is 0 in the embeddings' dtype are left out."""

    @counted
    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        arguments = embeddings, labels, indices_tuple, ref_emb, ref_labels
        kind = kind_of(self.distance) or COSINE
        kind = kind if kind in (COSINE, Kind("squared", True)) else COSINE
        hooks = "nca_computation", "get_logits", "cast_types"
        why_not = _classed(self, arguments, self.proxies, ProxyNCALoss, *hooks, distance=kind)
        why_not = why_not or refusal(checks.scalar, "softmax_scale", self.softmax_scale, embeddings, positive=True)
        if why_not is None and labels.dtype != torch.int64:
            why_not = "labels are not int64"
        if why_not is None:
            numbers = torch.arange(len(self.proxies), device=self.proxy_labels.device)
            if not torch.equal(self.proxy_labels, numbers):
                why_not = "proxy_labels are not those of the constructor"
        if not runs_fused(NAME + "ProxyNCALoss", why_not):
            return super().compute_loss(*arguments)
        self.cast_types(embeddings.dtype, embeddings.device)
        record(self.distance, embeddings, self.proxies)
        # For unit rows -|u - p|^2 is 2 <u, p> plus a constant.
        scale = self.softmax_scale / 2 if kind.inverted else self.softmax_scale
        known = (labels >= 0) & (labels < len(self.proxies))
        loss = proxy_nca(embeddings, labels.masked_fill(~known, -100), self.proxies, scale=scale, reduction="none")
        weights = lmu.convert_to_weights(indices_tuple, labels, dtype=loss.dtype, using_ref=True)
        counted = known & ((-loss.detach()).exp().to(embeddings.dtype) != 0)
        found = _elements(loss * weights, embeddings)
        found = {"loss": found | {"losses": found["losses"][counted], "indices": found["indices"][counted]}}
        self.add_weight_regularization_to_loss_dict(found, self.proxies)
        return found


class ProxyAnchorLoss(_ProxyAnchorLoss):
    """ProxyAnchorLoss in one sweep, without a [B, C] matrix. Both its parts are returned as the first."""

    @counted
    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        arguments = embeddings, labels, indices_tuple, ref_emb, ref_labels
        hooks = "get_logits", "cast_types"
        why_not = _classed(self, arguments, self.proxies, ProxyAnchorLoss, *hooks, distance=COSINE)
        classes = len(self.proxies)
        why_not = why_not or _classes_fit(labels, classes, embeddings)
        why_not = why_not or refusal(checks.number, "margin", self.margin)
        why_not = why_not or refusal(checks.number, "alpha", self.alpha)
        why_not = why_not or refusal(checks.scalar, "alpha", self.alpha, embeddings, positive=True)
        if why_not is None and indices_tuple is not None and any(len(x) for x in indices_tuple):
            why_not = "a miner weighs the rows"
        if why_not is None and classes != self.num_classes:
            why_not = "there are not num_classes proxies"
        for name in ("pos_loss", "neg_loss"):
            reducer = reducer_of(self, name)
            if why_not is None and (type(reducer) is not reducers.DivisorReducer or reducer.collect_stats):
                why_not = "of its reducer"
        if not runs_fused(NAME + "ProxyAnchorLoss", why_not):
            return super().compute_loss(*arguments)
        self.cast_types(embeddings.dtype, embeddings.device)
        record(self.distance, embeddings, self.proxies)
        loss = proxy_anchor(embeddings, labels, self.proxies, margin=self.margin, alpha=self.alpha)
        whole = {"losses": loss.to(embeddings.dtype), "indices": None, "reduction_type": "already_reduced"}
        found = {"pos_loss": whole, "neg_loss": self.zero_loss()}
        self.add_weight_regularization_to_loss_dict(found, self.proxies)
        return found


def patch() -> Patch:
    """Replaces the library's classes by these, wherever they are imported; `undo()` or `with` reverts it."""
    return Patch(
        {
            _ArcFaceLoss: ArcFaceLoss,
            _CircleLoss: CircleLoss,
            _ContrastiveLoss: ContrastiveLoss,
            _CrossBatchMemory: CrossBatchMemory,
            _CosFaceLoss: CosFaceLoss,
            _MultiSimilarityLoss: MultiSimilarityLoss,
            _NTXentLoss: NTXentLoss,
            _ProxyAnchorLoss: ProxyAnchorLoss,
            _ProxyNCALoss: ProxyNCALoss,
            _SupConLoss: SupConLoss,
            _TripletMarginLoss: TripletMarginLoss,
        }
    )
