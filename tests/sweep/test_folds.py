"""What each fold means: its textbook formula and autograd's gradient of it, and the libraries' losses of that name."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from grids import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fusedloss import sweep, testing
from fusedloss.backends import BACKENDS
from fusedloss.bench.machine import probe
from fusedloss.core.folds import FOLDS, Part
from fusedloss.core.numerics import stats_dtype
from fusedloss.core.problem import Fold
from fusedloss.losses._folded import fold_loss, fold_problem
from fusedloss.losses._options import Call

# scalars and options of each fold
CASES = {
    "sigmoid": ((3.0, -1.5), ()),
    "margin_ranking": ((), (0.3, 0.0)),
    "pair_hinge": ((), (0.3, -1.0, 0.0)),
    "multi_similarity": ((), (2.0, 10.0, 0.5)),
    "proxy_anchor": ((1.0, 2.5), (0.1, 8.0)),
    "circle": ((), (0.4, 8.0)),
    "sup_con_in": ((2.5,), ()),
    "batch_all": ((), (0.25,)),
    "semi_hard": ((), (0.25,)),
    "distill": ((1.7,), ()),
    "distill_ce": ((1.7,), ()),
    "distill_mse": ((1.7,), ()),
}
TRIPLETS = ("batch_all", "semi_hard")
CONSTANT = ("proxy_anchor",)  # scalars without a gradient: a scale of 1 and a count


def scalars_of(name, dtype=torch.float64):
    return tuple(torch.tensor(number, dtype=dtype) for number in CASES[name][0])


def run(name, values, part, scalars=None, options=None, gradient=True):
    """What a fold returns, and what it leaves in a copy of `values`."""
    slope = values.clone()
    scalars = scalars_of(name, values.dtype) if scalars is None else scalars
    options = CASES[name][1] if options is None else options
    return FOLDS[name].torch(slope, part, scalars, options, gradient), slope


def differentiate(name, values, part, scalars=None, options=None):
    """Loss, count, gradient by values and gradients by scalars, of the formula."""
    values = values.clone().requires_grad_()
    scalars = scalars_of(name, values.dtype) if scalars is None else scalars
    scalars = tuple(scalar.clone().requires_grad_() for scalar in scalars)
    loss, count = FOLDS[name].formula(values, part, scalars, CASES[name][1] if options is None else options)
    gradients = torch.autograd.grad(loss.sum(), (values, *(() if name in CONSTANT else scalars)))
    return loss.detach(), count, gradients[0], gradients[1:]


def close(found, wanted, rtol=1e-11, atol=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(wanted).to(found), rtol=rtol, atol=atol)


def same(name, values, part, scalars=None, options=None, gradient=True, **tolerance):
    """The fold against its formula."""
    found, slope = run(name, values, part, scalars, options)
    loss, count, by_values, by_scalars = differentiate(name, values, part, scalars, options)
    close(found.loss, loss, **tolerance)
    assert (found.count is None) == (count is None)
    if count is not None:
        assert found.count.dtype == values.dtype
        assert torch.equal(found.count, count)
    if gradient:
        close(slope, by_values, **tolerance)
        for one, other in zip(found.scalars, by_scalars, strict=True):
            close(one, other, **tolerance)
    assert torch.equal(run(name, values, part, scalars, options, gradient=False)[0].loss, found.loss)


def labelled(values, labels, rows=None, **more):
    """The part in which rows of `values` stand among its columns, as in a self-comparison."""
    rows = torch.arange(values.shape[0]) if rows is None else rows
    labels = torch.as_tensor(labels)
    more = {"weight": torch.ones(len(rows), dtype=values.dtype), "own": rows, "target": rows, "teacher": values} | more
    return Part(rows, row_labels=labels[rows], key_labels=labels, **more)


@st.composite
def problems(draw, grid=False):
    """A chunk that starts anywhere in the batch, and some of whose rows may stand beside the columns."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(rows, columns, dtype=torch.float64)
    if grid:
        values = torch.randint(0, 5, (rows, columns)).double() / 4
    number = draw(st.integers(0, 9)) + torch.arange(rows)
    weight = torch.rand(rows, dtype=torch.float64) * draw(st.sampled_from([1, -1, torch.randint(0, 2, (rows,))]))
    target = torch.randint(0, columns, (rows,))
    own = torch.where(number < columns, number, -1) if draw(st.booleans()) else None
    key_labels = row_labels = None
    if draw(st.booleans()):
        kinds = draw(st.integers(1, 4))
        key_labels = torch.randint(0, kinds, (columns,))
        row_labels = torch.randint(0, kinds, (rows,))
        if own is not None:
            row_labels = torch.where(own < 0, row_labels, key_labels[own])
    return values, Part(number, weight, target, row_labels, key_labels, own, torch.randn_like(values))


# Every fold -----------------------------------------------------------------------------------------------------------


@pytest.mark.lengthy
@pytest.mark.parametrize("name", FOLDS)
@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_fold_is_its_formula(name, problem):
    same(name, *problem)


@pytest.mark.lengthy
@pytest.mark.parametrize("name", FOLDS)
@given(problem=problems(grid=True))
@settings(max_examples=40, deadline=None)
def test_ties(name, problem):
    """A hinge of exactly 0 is no loss, no triplet and no gradient. Which of equal negatives is meant is left open."""
    same(name, *problem, gradient=name != "semi_hard")


@pytest.mark.parametrize("name", FOLDS)
@pytest.mark.parametrize("labels", [[4, 4, 4, 4], [0, 1, 2, 3], [0, 0, 1, 2]], ids=["one", "each its own", "mixed"])
@pytest.mark.parametrize("rows", [4, 1])
def test_degenerate_sets(name, labels, rows):
    values = torch.randn(rows, 4, dtype=torch.float64)
    same(name, values, labelled(values, labels))


@pytest.mark.parametrize("name", FOLDS)
def test_alone(name):
    """One row, whose only column is itself: nothing to attract or repel."""
    values = torch.randn(1, 1, dtype=torch.float64)
    found, slope = run(name, values, labelled(values, [0]))
    assert found.loss.item() == 0 and slope.item() == 0 and not any(found.scalars)


@pytest.mark.parametrize("name", FOLDS)
def test_weight_0_leaves_a_row_out_whatever_it_holds(name):
    values = torch.randn(6, 6, dtype=torch.float64)
    part = labelled(values, [0, 0, 0, 1, 1, 2], weight=torch.tensor([1, 0, 2, 0, 1, 1.0], dtype=torch.float64))
    found, slope = run(name, values, part)
    values[part.weight == 0] = torch.nan
    poisoned, poisoned_slope = run(name, values, part._replace(teacher=values))
    if name.startswith("distill"):
        found, slope = run(name, values.nan_to_num(), part._replace(teacher=values.nan_to_num()))
    for one, other in zip((slope, *found.scalars), (poisoned_slope, *poisoned.scalars), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(found.loss, poisoned.loss) and not found.loss[part.weight == 0].any()
    assert found.count is None or not found.count[part.weight == 0].any()


@pytest.mark.parametrize("name", FOLDS)
def test_rows_do_not_know_their_chunk(name):
    values = torch.randn(8, 8, dtype=torch.float64)
    labels = torch.randint(0, 3, (8,))
    whole, slope = run(name, values, labelled(values, labels))
    rows = torch.arange(3, 6)
    part, part_slope = run(name, values[rows], labelled(values[rows], labels, rows))
    assert torch.equal(part.loss, whole.loss[rows]) and torch.equal(part_slope, slope[rows])


@pytest.mark.parametrize("name", FOLDS)
def test_values_may_be_a_window_of_a_workspace(name):
    workspace = torch.randn(8, 11, dtype=torch.float64)
    window = workspace[1:7, 2:9]
    part = labelled(window.clone(), torch.randint(0, 3, (7,)), torch.arange(6))
    wanted, slope = run(name, window, part)
    around = workspace.clone()
    window.zero_(), around[1:7, 2:9].zero_()
    window += part.teacher
    found = FOLDS[name].torch(window, part, scalars_of(name), CASES[name][1], True)
    assert torch.equal(found.loss, wanted.loss) and torch.equal(window, slope)
    window.zero_()
    assert torch.equal(workspace, around)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FOLDS)
def test_a_gpu_agrees(name, device):
    values = torch.randn(40, 300, dtype=torch.float64)
    part = labelled(values, torch.randint(0, 20, (300,)), torch.arange(40))
    wanted, slope = run(name, values, part)
    there = Part(*(None if tensor is None else tensor.to(device) for tensor in part))
    found, found_slope = run(name, values.to(device), there)
    close(found.loss.cpu(), wanted.loss)
    close(found_slope.cpu(), slope)


@pytest.mark.parametrize("name", FOLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_values_stay_finite(name, dtype):
    values = (torch.randn(12, 12, dtype=dtype) * 1e4).clamp(-1e4, 1e4)
    values[0], values[1], values[2, ::2] = 1e4, -1e4, 1e4
    part = labelled(values, torch.randint(0, 3, (12,)), teacher=values.flip(0))
    one = tuple(torch.ones((), dtype=dtype) for _ in CASES[name][0])
    found, slope = run(name, values, part, one)
    for tensor in (found.loss, slope):
        assert tensor.isfinite().all() and tensor.dtype == dtype
    for tensor in found.scalars:  # rows' parts, which cancel, are added in fp64
        assert tensor.isfinite() and tensor.dtype == torch.float64
    if dtype == torch.float64:
        # Autograd's exp(z - lse) loses the digits of z, up to 1e9 in circle. Equal negatives are semi_hard's to choose.
        same(name, values, part, one, gradient=name != "semi_hard", rtol=1e-7)


@pytest.mark.parametrize("name", FOLDS)
def test_fp32_is_as_exact_as_its_input(name):
    """2048 columns, as unit vectors give them: a few units in the last place, of each row's loss and gradient."""
    x = F.normalize(torch.randn(2048, 32), dim=1)
    rows = torch.arange(700, 716)
    values = x[rows] @ x.T
    if name in TRIPLETS:
        values = (2 - 2 * values).clamp_min(0).sqrt()
    teacher = 20 * values + torch.randn_like(values)
    part = labelled(values, torch.randint(0, 64, (2048,)), rows, teacher=teacher, target=rows + 1)
    scalars = tuple(torch.tensor(number) for number in {"sigmoid": (10, -10)}.get(name, (20,) * len(CASES[name][0])))
    found, slope = run(name, values, part, scalars)
    wide = part._replace(teacher=teacher.double(), weight=part.weight.double())
    wanted, wanted_slope = run(name, values.double(), wide, tuple(scalar.double() for scalar in scalars))
    # The difference of two distributions has fewer digits than either.
    bound = 1e-5 if name.startswith("distill") else 1.5e-6
    assert error(found.loss, wanted.loss).max() < 1.5e-6
    assert error(slope, wanted_slope, dim=1).max() < bound
    for one, other in zip(found.scalars, wanted.scalars, strict=True):
        assert error(one, other) < bound


def error(found, wanted, dim=None):
    difference = found.double() - wanted
    if dim is None:
        return (difference / wanted).abs()
    return difference.norm(dim=dim) / wanted.norm(dim=dim)


# Single folds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sigmoid", "sup_con_in", "multi_similarity"])
@pytest.mark.parametrize("gap", [10, 20, 40])
def test_a_well_fitted_row_keeps_its_relative_precision(name, gap):
    """Where the positive leads by 20, softplus is 2e-9 and fp32 has no digits for 1 + 2e-9."""
    values = torch.rand(4, 64) - gap
    values[:, 0] += 2 * gap
    labels = torch.arange(64)
    part = Part(torch.arange(4), torch.ones(4), None, torch.zeros(4, dtype=torch.int64), labels)
    scalars = tuple(torch.tensor(number) for number in (1.0, 0.0)[: len(CASES[name][0])])
    options = (1.0, 1.0, 0.0) if name == "multi_similarity" else None
    found, slope = run(name, values, part, scalars, options)
    wide = part._replace(weight=part.weight.double())
    wanted, wanted_slope = run(name, values.double(), wide, tuple(scalar.double() for scalar in scalars), options)
    assert 0 < wanted.loss.max() < 1000 * math.exp(-gap)
    assert error(found.loss, wanted.loss).max() < 1e-5
    assert error(slope, wanted_slope).max() < 1e-5


@pytest.mark.parametrize("name", ["margin_ranking", "sup_con_in", "batch_all", "semi_hard", "distill"])
def test_what_all_columns_share_costs_no_digits(name):
    """These losses see differences only. The values are multiples of 1/64, so that fp32 holds them with the offset."""
    values = torch.randint(0, 320, (8, 64)) / 64
    part = labelled(values, torch.arange(64) // 2, torch.arange(8), teacher=values.flip(0))
    one = tuple(torch.ones(()) for _ in CASES[name][0])
    found, slope = run(name, values + 1e4, part._replace(teacher=part.teacher + 1e4), one)
    wide = part._replace(weight=part.weight.double(), teacher=part.teacher.double())
    wanted, wanted_slope = run(name, values.double(), wide, tuple(scalar.double() for scalar in one))
    close(found.loss.double(), wanted.loss, rtol=1e-6)
    close(slope.double(), wanted_slope, rtol=1e-6, atol=1e-7)


def test_sigmoid_takes_a_target_or_labels():
    values = torch.randn(3, 3, dtype=torch.float64)
    pairs = Part(torch.arange(3), torch.ones(3, dtype=torch.float64), target=torch.tensor([2, 0, 1]))
    labels = pairs._replace(target=None, row_labels=torch.tensor([7, 8, 9]), key_labels=torch.tensor([8, 9, 7]))
    assert torch.equal(run("sigmoid", values, pairs)[0].loss, run("sigmoid", values, labels)[0].loss)


@given(problem=problems())
@settings(max_examples=40, deadline=None)
def test_margin_ranking_over_the_number_of_negatives(problem):
    same("margin_ranking", *problem, options=(0.3, 1.0))


def test_circle_needs_a_positive_and_a_negative():
    values = torch.randn(4, 4, dtype=torch.float64)
    for labels in ([0, 0, 0, 0], [0, 1, 2, 3]):
        found, slope = run("circle", values, labelled(values, labels))
        assert not found.loss.any() and not slope.any()


def test_sup_con_in_without_negatives_is_the_entropy_it_cannot_lose():
    """log |P| at best: without a negative there is nothing else to lose, and nothing to learn."""
    values = torch.randn(5, 5, dtype=torch.float64)
    found, slope = run("sup_con_in", values, labelled(values, [0] * 5))
    close(found.loss, torch.full((5,), math.log(4), dtype=torch.float64))
    assert not slope.any() and not any(found.scalars)


def test_batch_all_at_4096_columns_loses_nothing_to_its_sums():
    """One positive just within reach of the nearest negatives: each triplet's loss is small beside the distances."""
    distance = 1.4 + 0.02 * torch.randn(8, 4096)
    labels = torch.arange(4096) // 2
    rows = torch.arange(8)
    partner = rows ^ 1
    distance[rows, partner] = distance.sort(dim=1).values[:, 64] - 1e-3
    part = labelled(distance, labels, rows)
    found, slope = run("batch_all", distance, part, options=(1e-3,))
    wide = distance.double()
    hinge = (wide.gather(1, partner[:, None]) - wide + 1e-3).clamp_min(0) * (labels[rows][:, None] != labels)
    eps = torch.finfo(torch.float32).eps
    assert 40 < found.count.min() and found.count.max() < 80
    # Rounding v_p + margin once moves each triplet by half a unit in the last place of the distances.
    assert ((found.loss - hinge.sum(dim=1)).abs() <= 4 * eps * hinge.sum(dim=1)).all()
    assert torch.equal(slope.sum(dim=1), torch.zeros(8))


def test_semi_hard_without_a_farther_negative_takes_the_farthest():
    values = torch.tensor([[0.0, 3.0, 1.0, 2.0]], dtype=torch.float64)
    found, slope = run("semi_hard", values, labelled(values, [0, 0, 1, 1], torch.tensor([0])), options=(0.5,))
    assert found.loss.item() == 1.5 and found.count.item() == 1
    assert slope.tolist() == [[0, 1, 0, -1]]


def test_semi_hard_without_any_negative_takes_the_nearest_column():
    values = torch.tensor([[0.0, 3.0, 1.0]], dtype=torch.float64)
    found, slope = run("semi_hard", values, labelled(values, [0, 0, 0], torch.tensor([0])), options=(0.5,))
    assert found.loss.item() == 3.5 + 1.5 and found.count.item() == 2
    assert slope.tolist() == [[-2, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distill_of_equals_is_exactly_0(dtype):
    values = torch.randn(9, 33, dtype=dtype) * 5
    scale = torch.tensor(3.3, dtype=dtype)
    part = Part(torch.arange(8), torch.ones(8, dtype=dtype), teacher=(values * scale)[1:])
    found, slope = run("distill", values[1:], part, (scale,))
    assert not found.loss.any() and not slope.any() and not any(found.scalars)


def test_distill_of_almost_equals_keeps_its_digits():
    values = torch.randn(16, 2048)
    teacher = values + 1e-3 * torch.randn_like(values)
    part = Part(torch.arange(16), torch.ones(16), teacher=teacher)
    found, _ = run("distill", values, part, (torch.tensor(1.0),))
    wide = part._replace(weight=part.weight.double(), teacher=teacher.double())
    wanted, _ = run("distill", values.double(), wide, (torch.tensor(1.0).double(),))
    assert wanted.loss.max() < 1e-6 and (found.loss >= 0).all()
    assert error(found.loss, wanted.loss).max() < 0.02


def test_distill_where_the_teacher_rules_columns_out():
    values = torch.randn(4, 6, dtype=torch.float64)
    teacher = torch.randn_like(values)
    teacher[:, 2] = -torch.inf
    same("distill", values, Part(torch.arange(4), torch.ones(4, dtype=torch.float64), teacher=teacher))


# The libraries' losses ------------------------------------------------------------------------------------------------


def clustered(classes):
    labels = torch.randint(0, classes, (24,))
    return torch.randn(24, 5, dtype=torch.float64) + torch.randn(classes, 5, dtype=torch.float64)[labels], labels


@pytest.mark.parametrize("classes", [1, 2, 7, 24])
@pytest.mark.parametrize("name", ["multi_similarity", "circle"])
def test_pytorch_metric_learning(name, classes):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")

    x, labels = clustered(classes)
    x.requires_grad_()
    if name == "circle":
        options, theirs = (0.4, 10.0), losses.CircleLoss(m=0.4, gamma=10, reducer=reducers.DoNothingReducer())
    else:
        options = (2.0, 10.0, 0.5)
        theirs = losses.MultiSimilarityLoss(*options, reducer=reducers.DoNothingReducer())
    wanted = theirs(x, labels)["loss"]["losses"][:, 0]
    (by_theirs,) = torch.autograd.grad(wanted.sum(), x)

    unit = F.normalize(x, dim=1)
    similarity = unit @ unit.T
    found, slope = run(name, similarity.detach(), labelled(similarity.detach(), labels), options=options)
    (by_ours,) = torch.autograd.grad(similarity, x, slope)
    close(found.loss, wanted.detach(), atol=3e-9)  # theirs is F.softplus
    close(by_ours, by_theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("classes", [1, 2, 7, 24])
@pytest.mark.parametrize("margin", [0.5, 5.0])
@pytest.mark.parametrize("name", TRIPLETS)
def test_sentence_transformers(name, margin, classes):
    losses = pytest.importorskip("sentence_transformers.losses")

    x, labels = clustered(classes)
    x.requires_grad_()
    theirs = {"batch_all": losses.BatchAllTripletLoss, "semi_hard": losses.BatchSemiHardTripletLoss}[name]
    model = torch.nn.Module()
    model.forward = lambda features: {"sentence_embedding": features["x"]}
    loss = theirs(model, margin=margin)
    wanted = loss([{"x": x}], labels)
    (by_theirs,) = torch.autograd.grad(wanted, x)

    distance = loss.distance_metric(x)
    found, slope = run(name, distance.detach(), labelled(distance.detach(), labels), options=(margin,))
    divisor = found.count.sum().clamp_min(1)
    (by_ours,) = torch.autograd.grad(distance, x, slope / divisor)
    close(found.loss.sum() / divisor, wanted.detach())
    close(by_ours, by_theirs)


# In a sweep -----------------------------------------------------------------------------------------------------------
# cuda and triton have kernels for these; in fp16, and on chunked, torch folds the similarities of a chunk.

OPTIONS = {
    "sigmoid": ("sigmoid", ()),
    "margin_ranking, mean": ("margin_ranking", (0.3, 1.0)),
    "margin_ranking, sum": ("margin_ranking", (0.1, 0.0)),
    "pair_hinge, pulls": ("pair_hinge", (0.6, -1.0, 1.0)),
    "pair_hinge, pushes": ("pair_hinge", (-0.1, 1.0, 0.0)),
    "multi_similarity": ("multi_similarity", (2.0, 10.0, 0.5)),
}
SIZES = {"one tile": (37, 53, 29), "several tiles": (140, 270, 40), "one row": (1, 167, 64), "one column": (9, 1, 8)}


class Swept(NamedTuple):
    """A fold in a sweep, as a function of its leaves: x, y (x itself where there is none), and a sigmoid's scalars."""

    name: str
    options: tuple[float, ...]
    weight: Tensor
    target: Tensor
    labels: tuple[Tensor, Tensor] | None = None
    cosine: bool = False
    itself: bool = False

    def split(self, leaves):
        matrices = 1 if self.itself else 2
        scalars = leaves[matrices:] or [torch.ones((), dtype=stats_dtype(leaves[0].dtype), device=self.weight.device)]
        return list(leaves[:matrices]), scalars

    def rows(self, *leaves, backend, per_row=True):
        """The rows' losses, or their sum; and the count, summed."""
        operands, (scale, *more) = self.split(leaves)
        fold = Fold(self.name, self.options, labels=self.labels, itself=self.itself, scalars=tuple(more))
        call = Call(reduction="none" if per_row else "sum", backend=backend)
        problem = fold_problem(operands, scale, self.weight, fold, call, cosine=self.cosine, target=self.target)
        return fold_loss(problem, call)

    def formula(self, *leaves):
        """In the leaves' own numbers, 16 bits as fp32."""
        operands, scalars = self.split(leaves)
        x, y = (t if t.dtype == torch.float64 else t.float() for t in (operands[0], operands[-1]))
        if self.cosine:
            x, y = (F.normalize(t, dim=1) for t in (x, y))
        rows = torch.arange(len(x), device=x.device)
        labels = (None, None) if self.labels is None else self.labels
        part = Part(rows, self.weight.to(x.dtype), self.target, *labels, rows if self.itself else None)
        scalars = tuple(s.to(x.dtype) for s in scalars) if self.name == "sigmoid" else ()
        loss, count = FOLDS[self.name].formula(x @ y.T, part, scalars, self.options)
        return loss, None if count is None else count.sum()


def swept(options, size, dtype, device, labelled=False, **more):
    """The fold, and its leaves: unit rows, so that the hinges are on both sides of 0."""
    M, N, D = SIZES[size]
    name, numbers = OPTIONS[options]
    N = M if more.get("itself") else N
    leaves = [x.to(device) for x in testing.inputs("random", M, N, D, dtype)]
    target = torch.randint(N, (M,), device=device)
    labels = None
    if labelled:
        values = torch.tensor([-(2**63), 2**32, 0, 1, 2**32 + 1], device=device)  # equal in half of their bits
        labels = values[torch.randint(5, (M,), device=device)], values[torch.randint(5, (N,), device=device)]
    if more.get("itself"):
        leaves = leaves[:1]
        labels = None if labels is None else (labels[0], labels[0])
    weight = torch.rand(M, device=device, dtype=stats_dtype(dtype)) + 0.1
    weight[2::3] = 0
    if name == "sigmoid":
        leaves += [torch.tensor(number, dtype=stats_dtype(dtype), device=device) for number in (5.0, -1.5)]
    return Swept(name, numbers, weight, target, labels, **more), leaves


def in_budget(fold, leaves, backend, dtype, upstream=None):
    wanted = [t.double() for t in leaves]

    def total(losses):
        return losses.sum() if upstream is None else (losses * upstream.to(losses)).sum()

    ours = lambda *t: total(fold.rows(*t, backend=backend, per_row=upstream is not None)[0])
    found = testing.value_and_gradients(ours, leaves)
    baseline, exact = (testing.value_and_gradients(lambda *t: total(fold.formula(*t)[0]), t) for t in (leaves, wanted))
    terms = fold._replace(weight=fold.weight.abs()).formula(*wanted)[0].sum().item()
    for number, (out, base, right) in enumerate(zip(found, baseline, exact, strict=True)):
        if right.dim():  # one number is as right as luck has it: bounded by what it sums
            share = testing.budget_share(out, base, right, dtype)
            assert share <= 1, f"{number}: {share:.2f} of the budget"
        else:
            assert (out.double() - right).abs() <= 1e-5 * (terms + right.abs()), number
    return found


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("labelled", [False, True], ids=["targets", "labels"])
@pytest.mark.parametrize("backend", ["chunked", "cuda", "triton"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_sweep_with_a_fold(device, backend, labelled, options, size, dtype):
    """Labels and targets, both sides and both scalars, weights of 0."""
    fold, leaves = swept(options, size, dtype, device, labelled)
    skip_unless_it_runs(backend, leaves)
    in_budget(fold, leaves, backend, dtype)


def skip_unless_it_runs(backend, leaves):
    if reason := BACKENDS[backend].why_not(probe(leaves[0].device.type, leaves[0].dtype)):
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.pairwise
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("labelled", [False, True], ids=["targets", "labels"])
@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("itself", [False, True], ids=["two", "itself"])
@pytest.mark.parametrize("backend", ["chunked", "cuda", "triton"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_sweep_with_a_fold_in_chunks_and_by_row(device, backend, itself, cosine, labelled, options, monkeypatch):
    """By the weights of an upstream gradient; rows that are their own columns; what is counted; without gradients."""
    monkeypatch.setattr(sweep.chunks, "chunk_rows", lambda M, *_: min(M, 16))
    monkeypatch.setattr("fusedloss.backends.dense.MOST", {})
    fold, leaves = swept(options, "one tile", torch.float32, device, labelled, cosine=cosine, itself=itself)
    skip_unless_it_runs(backend, leaves)
    leaves[0] = leaves[0] * (1.7 if cosine else 1.0)
    upstream = torch.linspace(-0.5, 1.5, len(fold.weight), device=device)
    in_budget(fold, leaves, backend, torch.float32, upstream)
    losses, count = fold.rows(*leaves, backend=backend)
    wanted, wanted_count = fold.formula(*(t.double() for t in leaves))
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-5)
    assert (losses[fold.weight == 0] == 0).all()
    total, summed = fold.rows(*(t.requires_grad_() for t in leaves), backend=backend, per_row=False)
    torch.testing.assert_close(total.detach().double(), wanted.sum(), rtol=1e-5, atol=1e-5)
    assert (count is None) == (summed is None) == (wanted_count is None)
    assert count is None or count == summed == wanted_count
    with torch.no_grad():
        assert fold.rows(*leaves, backend=backend, per_row=False)[0] == total


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("trained", range(4))
@pytest.mark.parametrize("backend", ["chunked", "cuda", "triton"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_sweep_with_a_fold_of_which_one_leaf_is_trained(device, backend, trained, options):
    """The others' gradients are not computed, and do not matter."""
    fold, leaves = swept(options, "one tile", torch.float32, device)
    if trained >= len(leaves):
        pytest.skip("has no scalars")
    skip_unless_it_runs(backend, leaves)
    everything = testing.value_and_gradients(lambda *t: fold.rows(*t, backend=backend, per_row=False)[0], leaves)
    leaves[trained].requires_grad_()
    value = fold.rows(*leaves, backend=backend, per_row=False)[0]
    value.backward()
    assert torch.equal(value.detach(), everything[0])
    torch.testing.assert_close(leaves[trained].grad, everything[1 + trained], rtol=1e-6, atol=1e-7)
    assert all(leaf.grad is None for number, leaf in enumerate(leaves) if number != trained)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["chunked", "cuda", "triton"])
def test_a_row_of_weight_0_may_hold_anything_in_a_sweep(backend, options):
    fold, leaves = swept(options, "one tile", torch.float32, "cpu")
    skip_unless_it_runs(backend, leaves)
    step = lambda *t: fold.rows(*t, backend=backend, per_row=False)[0]
    wanted = testing.value_and_gradients(step, leaves)
    leaves[0][fold.weight == 0] = 1e30  # NaN times an entry of 0 would be NaN in the products
    found = testing.value_and_gradients(step, leaves)
    assert torch.equal(found[0], wanted[0])
    for a, b in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(a, b)
