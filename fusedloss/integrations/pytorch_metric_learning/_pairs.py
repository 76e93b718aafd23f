"""The pairs that labels define, without a matrix; the distances that sweeps compute; and reducers on sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from pytorch_metric_learning import distances, reducers
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from ...core.mask import Compare, Mask
from ...core.numerics import group_numbers, row_numbers, stats_dtype, unit_rows
from ...core.problem import Block, Fold, Problem
from ...losses import Call, as_scale, autocast, distinct, fold_loss, fold_problem, mean_of, over
from ...rowwise.pairs import cosine, dot, euclidean_distance, of_pairs, squared_distance
from .._fits import overridden, untouched

METHODS = "compute_mat", "pairwise_distance", "normalize", "maybe_normalize", "smallest_dist", "margin"  # of distances


class Kind(NamedTuple):
    """A distance, and whether rows are divided by their norms first."""

    name: str  # "dot", "euclidean" or "squared"
    unit: bool

    @property
    def inverted(self) -> bool:
        return self.name == "dot"


def kind_of(distance: Any) -> Kind | None:
    """Returns the Kind of a distance; None for a user's class, or a norm or power that no sweep has."""
    kind = type(distance)
    if distance.p != 2 or not untouched(distance, kind) or overridden(distance, kind, *METHODS):
        return None
    unit = bool(distance.normalize_embeddings)
    if type(distance) in (distances.CosineSimilarity, distances.DotProductSimilarity):
        return Kind("dot", unit) if distance.power == 1 and distance.is_inverted else None
    if type(distance) is distances.LpDistance and distance.power in (1, 2) and not distance.is_inverted:
        return Kind("euclidean" if distance.power == 1 else "squared", unit)
    return None


def record(distance: Any, x: Tensor, y: Tensor) -> None:
    """Updates the statistics that a distance records when it is called."""
    if distance.collect_stats:
        distance.reset_stats()
        distance.set_default_stats(x, y, distance.maybe_normalize(x), distance.maybe_normalize(y))


class AllPairs(Sequence[Tensor]):
    """All pairs of a batch with a memory that holds it, except each row with itself: the library's lists, made only
    where one is read.

    start: the place in the memory of the batch's first row; the others follow, and go on at the memory's beginning.
    """

    def __init__(self, labels: Tensor, memory_labels: Tensor, start: int):
        self.labels, self.memory_labels, self.start = labels, memory_labels, start

    @cached_property
    def _lists(self) -> tuple[Tensor, ...]:
        row, column, anchor, negative = lmu.get_all_pairs_indices(self.labels, self.memory_labels)
        other = column != (row + self.start) % len(self.memory_labels)
        return row[other], column[other], anchor, negative

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: Any) -> Any:
        return self._lists[index]


class Pairs:
    """Rows `x` [N, D] against columns `y` [M, D]: positives are columns with the row's label, except the row itself.

    start: the column of `y` and `ref_labels` that is row 0, where they hold the rows; the others follow.
    """

    def __init__(
        self, kind: Kind, x: Tensor, labels: Tensor, y: Tensor, ref_labels: Tensor | None, start: int | None = None
    ):
        self.kind = kind
        alike = ref_labels is None or ref_labels is labels  # the library's condition, for any `y`
        self.itself = alike or start is not None
        self.start = start or 0
        self.x, self.y = x, y.roll(-start, 0) if start else y
        self.labels = labels.long()
        self.ref_labels = self.labels
        if not alike and ref_labels is not None:
            self.ref_labels = (ref_labels.roll(-start, 0) if start else ref_labels).long()

    @cached_property
    def _groups(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns each row's group, each column's, and each group's number of columns."""
        same = self.ref_labels is self.labels
        group = group_numbers(self.labels if same else torch.cat([self.labels, self.ref_labels]))
        rows, columns = (group, group) if same else group.split([len(self.labels), len(self.ref_labels)])
        return rows, columns, torch.zeros_like(group).index_add_(0, columns, torch.ones_like(columns))

    @cached_property
    def positives(self) -> Tensor:
        """Returns each row's number of positives [N]."""
        rows, _, sizes = self._groups
        return sizes[rows] - int(self.itself)

    @property
    def negatives(self) -> Tensor:
        return len(self.y) - int(self.itself) - self.positives

    @cached_property
    def counts(self) -> tuple[int, int]:
        """Returns the numbers of positive and negative pairs, read back as the library reads its lists' lengths."""
        positive = int(self.positives.sum())
        return positive, len(self.x) * (len(self.y) - int(self.itself)) - positive

    def positive_pairs(self) -> tuple[Tensor, Tensor]:
        """Returns rows and columns of all positive pairs, in the library's order."""
        rows, columns, sizes = self._groups
        order = columns.argsort(stable=True)  # the members of each group, side by side
        start = (sizes.cumsum(0) - sizes)[rows]
        row = row_numbers(len(rows), rows).repeat_interleave(self.positives, output_size=self.counts[0])
        number = row_numbers(len(row), rows) - (self.positives.cumsum(0) - self.positives)[row]
        if self.itself:
            place = torch.empty_like(order).scatter_(0, order, row_numbers(len(order), rows))[: len(rows)] - start
            number += number >= place[row]
        return row, order[start[row] + number]

    def places(self, column: Tensor) -> Tensor:
        """Returns where columns stand in the library's order."""
        return (column + self.start) % len(self.y) if self.start else column

    def log_sum_exp(self, scale: float | Tensor, mask: Mask) -> Tensor:
        """Returns the log-sum-exp `[N]` of `scale` times the similarities that the mask admits; 0 for none."""
        assert self.kind.inverted
        operands, (query, key) = distinct(self.x, self.y)
        multiplier, bound = as_scale(scale, self.x, inverse=False)
        problem = Problem(
            operands=autocast(*operands),
            blocks=(Block(query, key, mask=mask),),
            scale=multiplier,
            target=torch.full((len(self.x),), -1, device=self.x.device),
            weight=self.x.new_ones(len(self.x), dtype=multiplier.dtype),
            cosine=self.kind.unit,
            scale_bound=bound,
            decoupled=True,
            mirrored=query == key and self.itself and self.ref_labels is self.labels,
        )
        return mean_of([problem], Call(reduction="none"))

    def log_sum_exp_of_negatives(self, scale: float | Tensor) -> Tensor:
        return self.log_sum_exp(scale, Mask((Compare(self.labels, self.ref_labels, False),)))

    def log_sum_exp_of_all(self, scale: float | Tensor) -> Tensor:
        return self.log_sum_exp(scale, Mask(skip=row_numbers(len(self.x), self.x) if self.itself else None))

    def mean_positive(self) -> Tensor:
        """Returns the mean similarity of each row's positives `[N]`, through the sums of each label; 0 for none."""
        assert self.kind.inverted
        rows, columns, _ = self._groups
        with torch.autocast(self.x.device.type, enabled=False):
            u, v = (self._wide(z) for z in autocast(self.x, self.y))
            sums = v.new_zeros(len(self._groups[2]), v.shape[1]).index_add(0, columns, v)[rows]
            return (u * (sums - v[: len(u)] if self.itself else sums)).sum(1) / self.positives.clamp(min=1)

    def _wide(self, z: Tensor) -> Tensor:
        z = z.to(stats_dtype(z.dtype))
        return unit_rows(z) if self.kind.unit else z

    def fold(self, name: str, options: tuple[float, ...], *, distance: str = "", summed: bool = False) -> Any:
        """(losses [N] or their sum, what the fold counted) of fusedloss.core.folds."""
        x, y, kind, call = self.x, self.y, self.kind, Call(reduction="sum" if summed else "none")
        if not kind.inverted:
            distance = kind.name
            if kind.unit:
                x = self._wide(self.x)
                y = x if self.y is self.x else self._wide(self.y)
        operands = autocast(*distinct(x, y)[0])
        one = torch.ones((), dtype=stats_dtype(x.dtype), device=x.device)
        weight = one.expand(len(x)).contiguous()
        fold = Fold(name, options, (self.labels, self.ref_labels), self.itself, distance)
        problem = fold_problem(operands, one, weight, fold, call, cosine=kind.inverted and kind.unit)
        return fold_loss(problem, call)


def listed(kind: Kind, x: Tensor, y: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Returns the similarity or distance of each of these pairs, computed in chunks."""
    function: Callable[[Tensor, Tensor], Tensor] = {"dot": dot, "euclidean": euclidean_distance}.get(
        kind.name, squared_distance
    )
    if kind.inverted:
        function = cosine if kind.unit else dot
    elif kind.unit:
        wide = unit_rows(x.to(stats_dtype(x.dtype)))
        x, y = wide, wide if y is x else unit_rows(y.to(stats_dtype(y.dtype)))
    return of_pairs(function, x, y, column, row)


STOCK = (reducers.MeanReducer, reducers.SumReducer, reducers.AvgNonZeroReducer)


def reducer_of(loss: Any, name: str) -> Any:
    """Returns the reducer of a sub-loss."""
    if type(loss.reducer) is reducers.MultipleReducers:
        inner = loss.reducer.reducers
        return inner[name] if name in inner else loss.reducer.default_reducer
    return loss.reducer


def takes_sums(reducer: Any) -> bool:
    """Whether a reducer needs only the sum of the losses and their number, in all or above 0."""
    if reducer.collect_stats or type(reducer) not in STOCK:
        return False
    return type(reducer) is not reducers.AvgNonZeroReducer or (reducer.low == 0 and reducer.high is None)


def takes_a_sum(reducer: Any) -> bool:
    """Whether a reducer needs only the sum of all losses."""
    return type(reducer) in STOCK[:2] and not reducer.collect_stats


def reduced(reducer: Any, total: Tensor, above: Tensor | None, number: int, dtype: torch.dtype) -> dict[str, Any]:
    """Applies the reducer to `number` losses with sum `total`, of which `above` are above 0."""
    if type(reducer) is reducers.MeanReducer:
        total = total / number
    elif type(reducer) is reducers.AvgNonZeroReducer:
        assert above is not None
        total = over(total, above)
    return {"losses": total.to(dtype), "indices": None, "reduction_type": "already_reduced"}
