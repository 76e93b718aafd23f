"""SigLIP, CLIP distillation, orthogonal regularisation and chosen pairs; and what all losses beside the softmax share:
per-row results, frozen sides, autocast, graphs that are kept, second derivatives, torch.compile, errors and modules.
"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import fusedloss
from fusedloss import masks, sweep, testing
from fusedloss.backends import chunked
from fusedloss.core import rows
from fusedloss.rowwise import pairs

BACKENDS = ["dense", "chunked", "reference"]
KERNELS = ["triton", "cuda"]
ALL = [*BACKENDS, *KERNELS]


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


@contextlib.contextmanager
def chunks(rows, columns):
    """Several row chunks and column tiles at a handful of rows; a context, because hypothesis repeats the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep.chunks, "chunk_rows", lambda M, *_: max(1, min(M, rows)))
        patch.setattr("fusedloss.backends.dense.MOST", {})
        patch.setattr(sweep.chunks, "STATS_ROWS", {"cpu": rows, "cuda": rows})
        patch.setattr(chunked.tiles, "TILE_COLUMNS", columns)
        yield


def both(ours, formula, tensors):
    """Value, gradients and, where there are several values, the gradients of a random mix of them: theirs and ours."""
    upstream = 0.1 + torch.rand_like(formula(*tensors), dtype=torch.float64)
    for f in (ours, formula):
        value, *gradients = testing.value_and_gradients(lambda *t, f=f: (f(*t) * upstream).sum(), tensors)
        yield [f(*tensors).detach(), value, *gradients]


def same(ours, formula, tensors, rtol=1e-10, atol=1e-12):
    for a, b in zip(*both(ours, formula, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def near(ours, formula, tensors):
    """In fp32 against a formula in fp64: the error of the whole: small entries are differences of large ones."""
    for a, b in zip(*both(ours, formula, tensors), strict=True):
        assert (a.double() - b).norm() <= 16 * torch.finfo(torch.float32).eps * b.norm()


def reduced(values, reduction):
    return {"none": values, "sum": values.sum(), "mean": values.sum() / max(len(values), 1)}[reduction]


# Formulas, one value a row --------------------------------------------------------------------------------------------


def sigmoid_rows(image, text, scale, bias=0.0, positive=None, normalize=False):
    if normalize:
        image, text = F.normalize(image, dim=1, eps=1e-12), F.normalize(text, dim=1, eps=1e-12)
    z = scale * (image @ text.T) + bias
    positive = torch.eye(*z.shape, dtype=torch.bool) if positive is None else positive
    return -F.logsigmoid(torch.where(positive, z, -z)).sum(1)


def distill_rows(image, text, scale, teacher_image, teacher_text, teacher_scale):
    z, teacher = scale * (image @ text.T), teacher_scale * (teacher_image @ teacher_text.T)
    by_row, by_column = (
        F.kl_div(a.log_softmax(1), b.log_softmax(1), reduction="none", log_target=True).sum(1)
        for a, b in ((z, teacher), (z.T, teacher.T))
    )
    return (by_row + by_column) / 2


def ranking_rows(anchor, positive, margin=0.5):
    s = F.normalize(anchor, dim=1) @ F.normalize(positive, dim=1).T
    other = ~torch.eye(*s.shape, dtype=torch.bool)
    return (F.relu(margin - s.diagonal()[:, None] + s) * other).sum(1) / (s.shape[1] - 1)


def mega_batch_rows(anchor, positive):
    s = F.normalize(anchor, dim=1) @ F.normalize(positive, dim=1).T
    other = s.masked_fill(torch.eye(len(s), dtype=torch.bool), -torch.inf).max(1).values
    return F.relu(0.8 - s.diagonal()) + F.relu(other - 0.3)


def relations(labels):
    equal = labels[:, None] == labels
    return equal & ~torch.eye(len(labels), dtype=torch.bool), ~equal


def apart(x, labels):
    positive, negative = relations(labels)
    squared = (x[:, None] - x[None]).square().sum(2)
    d = torch.where(squared == 0, 1, squared).sqrt().masked_fill(squared == 0, 0)
    return torch.where(positive, d, 0).max(1).values - torch.where(negative, d, torch.inf).min(1).values


def log_sum(x, mask):
    return x.masked_fill(~mask, -1e30).logsumexp(1)


def multi_similarity_rows(x, labels):
    s, (positive, negative) = F.normalize(x, dim=1) @ F.normalize(x, dim=1).T, relations(labels)
    pull, push = log_sum(-2 * (s - 0.5), positive), log_sum(50 * (s - 0.5), negative)
    zero = torch.zeros_like(pull)
    return torch.logaddexp(pull, zero) / 2 + torch.logaddexp(push, zero) / 50


def circle_rows(x, labels):
    s, (positive, negative) = F.normalize(x, dim=1) @ F.normalize(x, dim=1).T, relations(labels)
    fixed = s.detach()
    pull = log_sum(-80 * F.relu(1.4 - fixed) * (s - 0.6), positive)
    push = log_sum(80 * F.relu(fixed + 0.4) * (s - 0.4), negative)
    return torch.logaddexp(pull + push, torch.zeros_like(pull))


LABELS = torch.tensor([0, 1, 1, 2, 0, 1, 2, 0, 0, 2, 1, 1, 0])
TEACHERS = [torch.randn(13, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2)]
# loss, formula, number of matrices [13, D]
ROWS = {
    "siglip": (
        lambda x, y, **options: fusedloss.siglip(x, y, 2.5, -1.0, **options),
        lambda x, y: sigmoid_rows(x, y, 2.5, -1.0),
        2,
    ),
    "clip_distill": (
        lambda x, y, **options: fusedloss.clip_distill(x, y, 1.5, *(t.to(x.dtype) for t in TEACHERS), 2.0, **options),
        lambda x, y: distill_rows(x, y, 1.5, *TEACHERS, 2.0),
        2,
    ),
    "in_batch_margin_ranking": (fusedloss.in_batch_margin_ranking, ranking_rows, 2),
    "mega_batch_margin": (fusedloss.mega_batch_margin, mega_batch_rows, 2),
    "batch_hard_triplet": (
        lambda x, **options: fusedloss.batch_hard_triplet(x, LABELS, margin=0.5, **options),
        lambda x: F.relu(apart(x, LABELS) + 0.5),
        1,
    ),
    "batch_hard_soft_margin_triplet": (
        lambda x, **options: fusedloss.batch_hard_soft_margin_triplet(x, LABELS, **options),
        lambda x: F.softplus(apart(x, LABELS)),
        1,
    ),
    "multi_similarity": (
        lambda x, **options: fusedloss.multi_similarity(x, LABELS, **options),
        lambda x: multi_similarity_rows(x, LABELS),
        1,
    ),
    "circle": (
        lambda x, **options: fusedloss.circle(x, LABELS, **options),
        lambda x: circle_rows(x, LABELS),
        1,
    ),
}
# without a value for each row
SUMMED = {
    "batch_all_triplet": (lambda x, **options: fusedloss.batch_all_triplet(x, LABELS, margin=0.5, **options), 1),
    "batch_semi_hard_triplet": (
        lambda x, **options: fusedloss.batch_semi_hard_triplet(x, LABELS, margin=0.5, **options),
        1,
    ),
}
EVERY = {name: (loss, count) for name, (loss, _, count) in ROWS.items()} | SUMMED


def matrices(name, dtype=torch.float64):
    return [randn(13, 6).to(dtype) for _ in range(EVERY[name][1])]


# SigLIP ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", [None, "columns", "fewer columns", "ids"])
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_siglip_is_the_sum_of_log_sigmoids(target, reduction, backend, data):
    """Over all pairs, with every gradient: both sides, scale and bias."""
    M, D = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    N = max(1, M - 3) if target == "fewer columns" else M + data.draw(st.integers(0, 7))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    normalize, biased = data.draw(st.booleans()), data.draw(st.sampled_from([None, "number", "tensor"]))
    given, positive = None, None
    if target == "ids":
        ids = torch.randint(0, 4, (M,)), torch.randint(0, 4, (N,))
        given, positive = masks.same_id(*ids), ids[0][:, None] == ids[1]
    elif target is not None:
        given = torch.randint(0, N, (M,))
        positive = given[:, None] == torch.arange(N)
    tensors = [randn(M, D), randn(N, D), 1 + randn().exp()] + ([randn()] if biased == "tensor" else [])
    fixed = {None: None, "number": -2.25, "tensor": None}[biased]

    def ours(x, y, scale, bias=fixed):
        return fusedloss.siglip(
            x, y, scale, bias, target=given, normalize=normalize, reduction=reduction, backend=backend
        )

    def formula(x, y, scale, bias=fixed or 0.0):
        return reduced(sigmoid_rows(x, y, scale, bias, positive, normalize), reduction)

    with chunks(data.draw(st.integers(1, 10)), data.draw(st.integers(1, 10))):
        same(ours, formula, tensors)


@pytest.mark.parametrize("target", [None, "columns", "ids"])
@pytest.mark.parametrize("backend", KERNELS)
def test_siglip_in_kernels(target, backend):
    """The kernels' own tiles, in fp32, with a learnable scale and bias."""
    ids = torch.randint(0, 5, (19,)), torch.randint(0, 5, (27,))
    columns = torch.randint(0, 27, (19,))
    given = {None: None, "columns": columns, "ids": masks.same_id(*ids)}[target]
    positive = {None: None, "columns": columns[:, None] == torch.arange(27), "ids": ids[0][:, None] == ids[1]}[target]
    near(
        lambda x, y, s, b: fusedloss.siglip(x, y, s, b, target=given, normalize=True, backend=backend),
        lambda x, y, s, b: sigmoid_rows(x.double(), y.double(), s, b, positive, True).mean(),
        [torch.randn(19, 8), torch.randn(27, 8), torch.tensor(7.0), torch.tensor(-3.0)],
    )


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sign", [1, -1])
def test_siglip_at_logits_of_ten_thousand(sign, dtype, backend):
    """No exponential may overflow: where a pair is that wrong its loss is |z|, where it is that right it is 0."""
    if backend in KERNELS and dtype == torch.float64:
        pytest.skip("no kernel for it")
    x = torch.eye(3, dtype=dtype)
    y = 2 * torch.eye(3, dtype=dtype) - 1  # logits of +10,000 on the diagonal and of -10,000 elsewhere
    value, dx, dy, dscale = testing.value_and_gradients(
        lambda x, y, s: fusedloss.siglip(x, y, s, backend=backend), [x, y, torch.tensor(sign * 1e4, dtype=dtype)]
    )
    assert value == (0 if sign > 0 else 3e4)
    # A wrong pair's slope by its logit is -y / M: each row has three.
    wanted = torch.zeros_like(x) if sign > 0 else 1e4 / 3 * y.new_tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) @ y
    torch.testing.assert_close(dx, wanted)
    assert torch.isfinite(dy).all()
    torch.testing.assert_close(dscale, torch.tensor(0.0 if sign > 0 else -3.0, dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_siglip_of_well_separated_pairs_keeps_its_digits(backend):
    """A loss of 3e-18 is one; 1 - sigmoid would be 0."""
    x = torch.eye(2, dtype=torch.float64)
    y = 2 * x - 1
    value = fusedloss.siglip(x, y, 40.0, backend=backend)
    assert value.item() == pytest.approx(2 * math.log1p(math.exp(-40)), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_siglip_without_rows(backend):
    x, y = torch.empty(0, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    value = fusedloss.siglip(x, y, scale, backend=backend)
    value.backward()
    assert value == 0 and (y.grad == 0).all() and scale.grad == 0


# Distillation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_clip_distill_is_the_divergence_of_both_softmaxes(reduction, backend, data):
    """The teacher has a dimension and a scale of its own."""
    B, D, T = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    normalize = data.draw(st.booleans())
    teacher = randn(B, T), randn(B, T), data.draw(st.sampled_from([0.0, 0.5, 5.0, scalar(3.0)]))
    unit = (lambda x: F.normalize(x, dim=1, eps=1e-12)) if normalize else lambda x: x
    with chunks(data.draw(st.integers(1, 10)), data.draw(st.integers(1, 10))):
        same(
            lambda x, y, s: fusedloss.clip_distill(
                x, y, s, *teacher, normalize=normalize, reduction=reduction, backend=backend
            ),
            lambda x, y, s: reduced(distill_rows(unit(x), unit(y), s, *teacher), reduction),
            [randn(B, D), randn(B, D), 1 + randn().exp()],
        )


@pytest.mark.parametrize("backend", KERNELS)
def test_clip_distill_in_kernels(backend):
    teacher = torch.randn(19, 5), torch.randn(19, 5), 3.0
    near(
        lambda x, y, s: fusedloss.clip_distill(x, y, s, *teacher, backend=backend),
        lambda x, y, s: distill_rows(x.double(), y.double(), s, *(t.double() for t in teacher[:2]), 3.0).mean(),
        [torch.randn(19, 8), torch.randn(19, 8), torch.tensor(1.5)],
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_distill_has_the_gradient_of_soft_targets(backend):
    """The cross-entropy of open_clip's DistillClipLoss differs by the teacher's entropy, in which no student is."""
    teacher = randn(11, 3), randn(11, 3)
    logits = 4 * teacher[0] @ teacher[1].T
    found = testing.value_and_gradients(
        lambda x, y, s: fusedloss.clip_distill(x, y, s, *teacher, 4.0, backend=backend),
        tensors := [randn(11, 6), randn(11, 6), scalar(2.0)],
    )

    def soft(x, y, s):
        z = s * x @ y.T
        return (F.cross_entropy(z, logits.softmax(1)) + F.cross_entropy(z.T, logits.T.softmax(1))) / 2

    wanted = testing.value_and_gradients(soft, tensors)
    for a, b in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    entropy = [-(p * p.log()).sum(1).mean() for p in (logits.softmax(1), logits.T.softmax(1))]
    torch.testing.assert_close(found[0] + sum(entropy) / 2, wanted[0])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_student_that_is_its_teacher_loses_nothing(dtype, backend):
    if backend in KERNELS and dtype == torch.float64:
        pytest.skip("no kernel for it")
    x, y = randn(40, 6).to(dtype), randn(40, 6).to(dtype)
    found = testing.value_and_gradients(
        lambda a, b, s: fusedloss.clip_distill(a, b, s, x, y, 3.0, backend=backend),
        [x, y, torch.tensor(3.0, dtype=dtype)],
    )
    eps = torch.finfo(dtype).eps
    assert found[0] == 0 if backend == "chunked" else found[0] <= 4 * eps
    assert all((t.abs() <= 16 * eps).all() for t in found[1:])


@pytest.mark.parametrize("backend", ALL)
def test_the_teacher_receives_no_gradient(backend):
    student = [torch.randn(5, 4, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(5, 3, requires_grad=True) for _ in range(2)]
    scale = torch.tensor(2.0, requires_grad=True)
    fusedloss.clip_distill(*student, 1.0, *teacher, scale, backend=backend).backward()
    assert all(t.grad is None for t in (*teacher, scale)) and all(t.grad is not None for t in student)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teacher_that_is_sure_rules_the_rest_out(backend):
    """Probabilities of exactly 0 are 0 log 0 = 0: what is left is the student's cross-entropy."""
    eye = torch.eye(4, dtype=torch.float64)
    x, y = randn(4, 3), randn(4, 3)
    found = fusedloss.clip_distill(x, y, 2.0, eye, eye, 1e4, backend=backend)
    torch.testing.assert_close(found, fusedloss.clip(x, y, 2.0, backend=backend))


# Orthogonal regularisation --------------------------------------------------------------------------------------------


def orthogonal(x, similarity, mean_weight, second_moment_weight):
    """From the matrix [B, B] without its diagonal."""
    x = F.normalize(x, dim=1) if similarity == "cos" else x
    s = (x @ x.T) * (1 - torch.eye(len(x), dtype=x.dtype))
    number = max(len(x) * (len(x) - 1), 1)
    mean, second = s.sum() / number, s.square().sum() / number
    return mean_weight * mean**2 + second_moment_weight * F.relu(second - 1 / x.shape[1])


@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 2.5), (0.7, 0.0)])
@pytest.mark.parametrize("aggregation", ["mean", "sum"])
def test_orthogonal_regularization_is_its_formula(similarity, weights, aggregation):
    """Columns of their own lengths and dimensions, one of them of a single row."""
    columns = [randn(12, 4) + 1, randn(9, 7), randn(1, 5), randn(2, 3)]
    same(
        lambda *x: fusedloss.global_orthogonal_regularization(
            *x,
            similarity=similarity,
            mean_weight=weights[0],
            second_moment_weight=weights[1],
            aggregation=aggregation,
        ),
        lambda *x: getattr(torch.stack([orthogonal(c, similarity, *weights) for c in x]), aggregation)(),
        columns,
    )


@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize("rows", [1, 2, 24])
def test_orthogonal_regularization_as_in_sentence_transformers(similarity, aggregation, rows):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    util = pytest.importorskip("sentence_transformers.util")
    function = {"cos": util.cos_sim, "dot": util.dot_score}[similarity]
    theirs = losses.GlobalOrthogonalRegularizationLoss(torch.nn.Module(), function, 0.6, 1.3, aggregation)
    same(
        lambda *x: fusedloss.global_orthogonal_regularization(
            *x, similarity=similarity, mean_weight=0.6, second_moment_weight=1.3, aggregation=aggregation
        ),
        lambda *x: sum(theirs.compute_loss_from_embeddings(list(x)).values()),
        [randn(rows, 5) + 1, randn(rows, 5)],
    )


def test_orthogonal_regularization_of_one_row_is_0():
    x = torch.randn(1, 4, requires_grad=True)
    value = fusedloss.global_orthogonal_regularization(x)
    value.backward()
    assert value == 0 and (x.grad == 0).all()


def test_orthogonal_regularization_survives_its_cancellation_in_fp32():
    """Of nearly orthogonal rows the diagonal is nearly all of both sums, and what is left must still be right."""
    x = F.normalize(randn(2048, 256), dim=1).float()
    found, exact = (fusedloss.global_orthogonal_regularization(t, second_moment_weight=0.0) for t in (x, x.double()))
    assert found.dtype == torch.float32
    assert abs(found.double() - exact) <= 1e-3 * exact


def test_orthogonal_regularization_at_its_hinge():
    """Where M2 is 1/D, as of rows of +-1, relu has slope 0: the first moment alone has a gradient."""
    x = torch.tensor([[1.0], [-1.0], [1.0]], requires_grad=True)
    fusedloss.global_orthogonal_regularization(x, similarity="dot").backward()
    # M1 = (s_01 + s_02 + s_12) / 3 = -1/3, and dM1/dx_0 = (x_1 + x_2) / 3 = 0.
    torch.testing.assert_close(x.grad, 2 * -1 / 3 * torch.tensor([[0.0], [2 / 3], [0.0]]))


@pytest.mark.parametrize("similarity", ["cos", "dot"])
@pytest.mark.parametrize("longer", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("rows, dim", [(40, 64), (600, 24)])  # one block, and three
def test_orthogonal_regularization_holds_the_budget(rows, dim, longer, similarity):
    """Also where one row is far longer than the others, and its square all that a sum with the diagonal would hold."""
    x = torch.randn(rows, dim)
    x[3] *= longer
    formula = lambda x: orthogonal(x, similarity, 1.0, 1.0)
    ours = lambda x: fusedloss.global_orthogonal_regularization(x, similarity=similarity)
    draws = [testing.value_and_gradients(*call) for call in ((ours, [x]), (formula, [x]), (formula, [x.double()]))]
    for found, eager, exact in zip(*draws, strict=True):
        assert testing.budget_share(found, eager, exact, torch.float32) <= 1


# Chosen pairs ---------------------------------------------------------------------------------------------------------


PAIRWISE = {**pairs.DISTANCES, "dot": pairs.dot, "cos": pairs.cosine}


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(rows, "ROWS", 3)


@pytest.mark.parametrize("name", PAIRWISE)
def test_of_pairs_has_its_derivatives(name, few_rows):
    """First and second ones; over several chunks, with columns that repeat and rows that have none."""
    column = torch.tensor([2, -1, 2, 0, 4, 2, -1, 1])
    x, y = randn(8, 3).requires_grad_(), randn(5, 3).requires_grad_()
    function = lambda x, y: pairs.of_pairs(PAIRWISE[name], x, y, column)
    assert torch.autograd.gradcheck(function, (x, y))
    assert torch.autograd.gradgradcheck(function, (x, y))
    values = function(x, y)
    assert (values[column < 0] == 0).all()
    torch.testing.assert_close(values[column >= 0], PAIRWISE[name](x[column >= 0], y[column[column >= 0]]))


@pytest.mark.parametrize("name", PAIRWISE)
def test_of_pairs_within_one_matrix(name, few_rows):
    """Both sides' gradients meet in it; a row beside itself is at distance 0, where the root has no slope."""
    column = torch.tensor([2, -1, 2, 3, 1, 0, 5, 2])
    x = randn(8, 3)
    same(
        lambda x: pairs.of_pairs(PAIRWISE[name], x, x, column),
        lambda x: PAIRWISE[name](x, x[column.clamp(min=0)]).masked_fill(column < 0, 0),
        [x],
    )
    column[3] = 6
    function = lambda x: pairs.of_pairs(PAIRWISE[name], x, x, column)
    assert torch.autograd.gradcheck(function, x.requires_grad_())
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("name", PAIRWISE)
def test_of_pairs_in_a_list(name, few_rows):
    """Rows may repeat, as columns may."""
    row, column = torch.tensor([1, 1, 0, 3, 1, 3, 2]), torch.tensor([2, 0, 2, -1, 4, 4, 2])
    x, y = randn(4, 3).requires_grad_(), randn(5, 3).requires_grad_()
    function = lambda x, y: pairs.of_pairs(PAIRWISE[name], x, y, column, row)
    assert torch.autograd.gradcheck(function, (x, y))
    assert torch.autograd.gradgradcheck(function, (x, y))
    wanted = PAIRWISE[name](x[row], y[column.clamp(min=0)]).masked_fill(column < 0, 0)
    torch.testing.assert_close(function(x, y), wanted)


def test_of_pairs_computes_only_what_is_wanted():
    x, y, column = torch.randn(4, 3), torch.randn(4, 3, requires_grad=True), torch.tensor([1, 1, 0, -1])
    pairs.of_pairs(pairs.dot, x, y, column).sum().backward()
    torch.testing.assert_close(y.grad, torch.stack([x[2], x[0] + x[1], torch.zeros(3), torch.zeros(3)]))
    assert x.grad is None
    empty = pairs.of_pairs(pairs.dot, x[:0], y, column[:0])
    assert empty.shape == (0,) and empty.dtype == torch.float32


def test_of_pairs_of_16_bit_rows_is_in_fp32():
    x, y = (torch.randn(6, 8).bfloat16().requires_grad_() for _ in range(2))
    column = torch.tensor([0, 0, 0, 0, 0, 0])
    values = pairs.of_pairs(pairs.dot, x, y, column)
    values.sum().backward()
    assert values.dtype == torch.float32 and y.grad.dtype == torch.bfloat16
    # Six rows meet in one, added in fp32 and rounded once.
    assert torch.equal(y.grad[0], x.float().sum(0).bfloat16())


# What all share -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("name", ROWS)
def test_every_row_by_its_own_weight(name, reduction, backend):
    """ "none" may be weighed by anything; `same` does so at random."""
    loss, formula, _ = ROWS[name]
    tensors = matrices(name)
    assert (formula(*tensors) > 0).all()  # so that circle's mean is one over all rows
    with chunks(4, 5):
        same(
            lambda *t: loss(*t, reduction=reduction, backend=backend),
            lambda *t: reduced(formula(*t), reduction),
            tensors,
        )


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", KERNELS)
def test_every_row_by_its_own_weight_in_kernels(name, backend):
    loss, formula, _ = ROWS[name]
    near(
        lambda *t: loss(*t, reduction="none", backend=backend),
        lambda *t: formula(*(x.double() for x in t)),
        matrices(name, torch.float32),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_towers_train_scale_and_bias(backend):
    x, y = matrices("siglip")
    tensors = [scalar(2.0), scalar(-1.0)]
    same(
        lambda s, b: fusedloss.siglip(x, y, s, b, backend=backend),
        lambda s, b: sigmoid_rows(x, y, s, b).mean(),
        tensors,
    )
    same(
        lambda s: fusedloss.clip_distill(x, y, s, *TEACHERS, 2.0, backend=backend),
        lambda s: distill_rows(x, y, s, *TEACHERS, 2.0).mean(),
        tensors[:1],
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["siglip", "in_batch_margin_ranking", "clip_distill", "batch_hard_triplet"])
def test_second_derivatives(name, reduction):
    """Of a penalty on the gradient, which needs create_graph."""
    loss, formula, _ = ROWS[name]
    upstream = torch.rand(13, dtype=torch.float64) if reduction == "none" else scalar(1.3)

    def penalty(values, leaves):
        gradients = torch.autograd.grad((values * upstream).sum(), leaves, create_graph=True)
        return sum(g.square().sum() for g in gradients)

    leaves = [t.requires_grad_() for t in matrices(name)]
    with chunks(4, 5):
        found = torch.autograd.grad(penalty(loss(*leaves, reduction=reduction, backend="chunked"), leaves), leaves)
    wanted = torch.autograd.grad(penalty(reduced(formula(*leaves), reduction), leaves), leaves)
    for a, b in zip(found, wanted, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.lengthy
@pytest.mark.parametrize("name", ["siglip", "batch_hard_triplet", "batch_all_triplet", "clip_distill"])
def test_compiles_in_one_graph(name):
    """Labels, scale and bias are the graph's inputs."""
    labels = LABELS.clone()
    options = {"backend": "chunked"}
    steps = {
        "siglip": lambda x, y, s: fusedloss.siglip(x, y, s, -s, normalize=True, **options),
        "batch_hard_triplet": lambda x, y, s: s * fusedloss.batch_hard_triplet(x + y, labels, margin=0.5, **options),
        "batch_all_triplet": lambda x, y, s: s * fusedloss.batch_all_triplet(x + y, labels, margin=0.5, **options),
        "clip_distill": lambda x, y, s: fusedloss.clip_distill(x, y, s, y, x, 2.0, **options),
    }
    torch._dynamo.reset()
    compiled = torch.compile(steps[name], fullgraph=True, backend="aot_eager")
    tensors = [torch.randn(13, 6), torch.randn(13, 6), torch.tensor(1.5)]
    found, wanted = (testing.value_and_gradients(step, tensors) for step in (compiled, steps[name]))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# Errors ---------------------------------------------------------------------------------------------------------------

X, Y = torch.ones(4, 3), torch.ones(4, 3)
OF_LABELS = [
    fusedloss.batch_all_triplet,
    fusedloss.batch_hard_triplet,
    fusedloss.batch_hard_soft_margin_triplet,
    fusedloss.batch_semi_hard_triplet,
    fusedloss.multi_similarity,
    fusedloss.circle,
]


@pytest.mark.parametrize("loss", OF_LABELS)
def test_labels_that_do_not_fit(loss):
    with pytest.raises(TypeError, match=r"labels must be a tensor of int64 \[4\], got torch\.int32"):
        loss(X, torch.zeros(4, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"labels must be a tensor of int64 \[4\], got torch.float32"):
        loss(X, torch.zeros(4))
    with pytest.raises(TypeError, match=r"labels must be .*, got a list"):
        loss(X, [0, 1, 0, 1])
    for shape in [(3,), (4, 1), ()]:
        with pytest.raises(ValueError, match=r"labels must be int64 \[4\], got shape"):
            loss(X, torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"embeddings must have two dimensions \[rows, D\], got shape"):
        loss(X[0], torch.zeros(4, dtype=torch.int64))


LABELS4 = torch.tensor([0, 0, 1, 1])
WRONG = {
    "distance": (ValueError, "distance must be one of 'euclidean', 'squared', 'cosine', got 'manhattan'"),
    "similarity": (ValueError, "similarity must be one of 'cos', 'dot'.*, got 'euclidean'"),
    "reduction": (ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'median'"),
    "backend": (
        ValueError,
        "backend must be one of 'auto', 'cuda', 'triton', 'chunked', 'dense', 'reference', got 'numpy'",
    ),
    "margin": (ValueError, "margin must be a finite number, got nan"),
}
CALLS = [
    *(("distance", lambda f=f: f(X, LABELS4, distance="manhattan")) for f in OF_LABELS[:4]),
    ("similarity", lambda: fusedloss.in_batch_margin_ranking(X, Y, similarity="euclidean")),
    ("similarity", lambda: fusedloss.global_orthogonal_regularization(X, similarity="euclidean")),
    *(("reduction", lambda f=f: f(X, LABELS4, reduction="median")) for f in (*OF_LABELS[1:3], *OF_LABELS[4:])),
    ("reduction", lambda: fusedloss.siglip(X, Y, 1.0, reduction="median")),
    ("reduction", lambda: fusedloss.clip_distill(X, Y, 1.0, X, Y, 1.0, reduction="median")),
    ("reduction", lambda: fusedloss.mega_batch_margin(X, Y, reduction="median")),
    *(("backend", lambda f=f: f(X, LABELS4, backend="numpy")) for f in OF_LABELS),
    *(("margin", lambda f=f: f(X, LABELS4, margin=math.nan)) for f in (*OF_LABELS[:2], OF_LABELS[3])),
]


@pytest.mark.parametrize("what, call", CALLS)
def test_options_that_do_not_exist(what, call):
    error, message = WRONG[what]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: fusedloss.siglip(X, Y[:3], 1.0),
            "text_features must have at least 4 rows, one per image, for the default target, got 3",
        ),
        (
            lambda: fusedloss.clip_distill(X, Y[:3], 1.0, X, Y, 1.0),
            "text_features must have 4 rows, like image_features, got 3",
        ),
        (
            lambda: fusedloss.clip_distill(X, Y, 1.0, X[:2], Y[:2], 1.0),
            "teacher_image_features must have 4 rows, like image_features, got 2",
        ),
        (
            lambda: fusedloss.clip_distill(X, Y, 1.0, X, Y[:2], 1.0),
            "teacher_text_features must have 4 rows, like image_features, got 2",
        ),
        (
            lambda: fusedloss.clip_distill(X, Y, 1.0, X, Y[:, :2], 1.0),
            "teacher_text_features must have D = 3, like teacher_image_features, got D = 2",
        ),
        (lambda: fusedloss.clip_distill(X, Y, math.inf, X, Y, 1.0), "logit_scale must be a finite number, got inf"),
        (
            lambda: fusedloss.clip_distill(X, Y, 1.0, X, Y, math.inf),
            "teacher_logit_scale must be a finite number, got inf",
        ),
        (
            lambda: fusedloss.mega_batch_margin(X, Y[:3]),
            "positive must have at least 4 rows, one per row of anchor, got 3",
        ),
        (
            lambda: fusedloss.mega_batch_margin(X[:3], Y),
            "positive must have at least 3 rows, one per row of anchor, got 4",
        ),
        (
            lambda: fusedloss.mega_batch_margin(X, Y, positive_margin=math.inf),
            "positive_margin must be a finite number, got inf",
        ),
        (
            lambda: fusedloss.mega_batch_margin(X, Y, negative_margin=math.inf),
            "negative_margin must be a finite number, got inf",
        ),
        (
            lambda: fusedloss.in_batch_margin_ranking(X, Y[:3]),
            "positive must have at least 4 rows, one per row of anchor, got 3",
        ),
        (lambda: fusedloss.siglip(X, Y, math.nan), "logit_scale must be a finite number, got nan"),
        (lambda: fusedloss.siglip(X, Y, 1.0, math.inf), "logit_bias must be a finite number, got inf"),
        (
            lambda: fusedloss.siglip(X, Y, torch.ones(4)),
            r"logit_scale must have one element, shape \[\] or \[1\], got shape \[4\]",
        ),
        (
            lambda: fusedloss.siglip(X, Y, 1.0, target=torch.zeros(3, dtype=torch.int64)),
            r"target must have shape \[4\], one index per row, got \[3\]",
        ),
        (
            lambda: fusedloss.siglip(X, Y, 1.0, target=masks.same_group(LABELS4, LABELS4)),
            "target must be masks.same_id alone if it is a mask, got another one or several joined",
        ),
        (
            lambda: fusedloss.siglip(X, Y, 1.0, target=masks.not_self()),
            "target must be masks.same_id alone if it is a mask, got another one or several joined",
        ),
        (
            lambda: fusedloss.siglip(X, Y, 1.0, target=masks.same_id(LABELS4, LABELS4) & masks.not_self()),
            "target must be masks.same_id alone if it is a mask, got another one or several joined",
        ),
        (lambda: fusedloss.multi_similarity(X, LABELS4, alpha=0.0), "alpha must be a positive number, got 0.0"),
        (lambda: fusedloss.multi_similarity(X, LABELS4, beta=-1.0), "beta must be a positive number, got -1.0"),
        (lambda: fusedloss.multi_similarity(X, LABELS4, base=math.nan), "base must be a finite number, got nan"),
        (lambda: fusedloss.circle(X, LABELS4, gamma=0.0), "gamma must be a positive number, got 0.0"),
        (lambda: fusedloss.circle(X, LABELS4, m=math.nan), "m must be a finite number, got nan"),
        (
            lambda: fusedloss.global_orthogonal_regularization(),
            r"embeddings must hold at least one column \[B, D\], got none",
        ),
        (
            lambda: fusedloss.global_orthogonal_regularization(X, X[0]),
            r"embeddings\[1\] must have two dimensions \[rows, D\], got shape \[3\]",
        ),
        (
            lambda: fusedloss.global_orthogonal_regularization(X, aggregation="max"),
            "aggregation must be one of 'mean', 'sum', got 'max'",
        ),
        (
            lambda: fusedloss.global_orthogonal_regularization(X, mean_weight=math.nan),
            "mean_weight must be a finite number, got nan",
        ),
    ],
)
def test_values_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("wrong", [4, -1, -100, 2**40])
def test_siglip_names_the_target_outside(wrong):
    """On a CPU, where it can be read. There is no index to leave a row out by."""
    with pytest.raises(IndexError, match=rf"target\[2\] must be an index from 0 to 3, got {wrong}"):
        fusedloss.siglip(X, Y, 1.0, target=torch.tensor([0, 1, wrong, 3]))
    with pytest.raises(
        TypeError, match=r"target must be an int64 tensor \[4\] of column indices, got torch.int32 \[4\]"
    ):
        fusedloss.siglip(X, Y, 1.0, target=torch.zeros(4, dtype=torch.int32))
