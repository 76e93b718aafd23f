"""A student's embeddings against a teacher: its margins, its distribution, its embeddings.

Each is sentence-transformers' own class, value and gradients, in fp64.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

import fusedloss
from fusedloss import testing
from fusedloss.rowwise import pairs

losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
util = pytest.importorskip("sentence_transformers.util")

BACKENDS = ["chunked", "reference"]
SIMILARITIES = {
    "dot": util.pairwise_dot_score,
    "cos": util.pairwise_cos_sim,
    "euclidean": util.pairwise_euclidean_sim,
    "manhattan": util.pairwise_manhattan_sim,
    "angle": util.pairwise_angle_sim,
}


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def same(ours, theirs, tensors, rtol=1e-9, atol=1e-11):
    """Value and gradients, with an upstream weight so that it is not dropped on the way; small and block by block."""
    weighed = lambda f: lambda *t: 1.7 * f(*t)
    wanted = testing.value_and_gradients(weighed(theirs), tensors)
    for small in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not small:
                patch.setitem(pairs.BLOCK, "cpu", 2 * tensors[0].shape[1])
                patch.setattr(pairs, "_plain", lambda *_: False)
                patch.setattr(pairs, "few", lambda *_: False)
            found = testing.value_and_gradients(weighed(ours), tensors)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), rtol=rtol, atol=atol)


@st.composite
def batches(draw):
    """A query, a positive and negatives."""
    rows, dim, count = draw(st.integers(1, 6)), draw(st.integers(1, 7)), draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    found = [randn(rows, dim) for _ in range(2 + count)]
    if draw(st.booleans()):
        found[1][0] = found[0][0]
    return found


# Margins --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_margin_mse(similarity, backend, data):
    tensors = data.draw(batches())
    rows, count = len(tensors[0]), len(tensors) - 2
    forms = ["margins", "scores", *(["vector"] if count == 1 else [])]
    form = data.draw(st.sampled_from(forms))
    label = randn(*{"margins": (rows, count), "scores": (rows, count + 1), "vector": (rows,)}[form])
    theirs = losses.MarginMSELoss(None, SIMILARITIES[similarity])
    same(
        lambda *t: fusedloss.margin_mse(*t, label=label, similarity=similarity, backend=backend),
        lambda *t: theirs.compute_loss_from_embeddings(list(t), label),
        tensors,
    )


def test_scores_are_looked_for_before_margins():
    """A batch of 2 with one negative: [2, 2] is two scores a row."""
    q, p, n = (randn(2, 3) for _ in range(3))
    teacher = torch.tensor([[1.0, 0.25], [0.5, 0.75]])
    wanted = fusedloss.margin_mse(q, p, n, label=torch.tensor([0.75, -0.25]))
    torch.testing.assert_close(fusedloss.margin_mse(q, p, n, label=teacher), wanted)
    torch.testing.assert_close(fusedloss.margin_mse(q, p, n, label=torch.tensor([[0.75], [-0.25]])), wanted)


# Distributions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_distill_kl_div(similarity, backend, data):
    tensors = data.draw(batches())
    label = 3 * randn(len(tensors[0]), len(tensors) - 1)
    if data.draw(st.booleans()):
        label[0, -1] = -torch.inf  # a candidate left out
    temperatures = data.draw(
        st.sampled_from(
            [{}, {"temperature": 2.0}, {"student_temperature": 0.5}, {"teacher_temperature": 3.0, "temperature": 0.7}]
        )
    )
    theirs = losses.DistillKLDivLoss(None, SIMILARITIES[similarity], **temperatures)
    same(
        lambda *t: fusedloss.distill_kl_div(*t, label=label, similarity=similarity, backend=backend, **temperatures),
        lambda *t: theirs.compute_loss_from_embeddings(list(t), label),
        tensors,
    )


def test_a_teacher_that_underflows():
    """Its softmax is 0 in fp32: those candidates add nothing, and what is left is exact."""
    q, p, n = (torch.randn(3, 4) for _ in range(3))
    label = torch.tensor([[0.0, -1e4], [200.0, 0.0], [0.0, -90.0]])
    found = testing.value_and_gradients(lambda *t: fusedloss.distill_kl_div(*t, label=label), [q, p, n])
    wanted = testing.value_and_gradients(
        lambda *t: fusedloss.distill_kl_div(*t, label=label, backend="reference"), [t.double() for t in (q, p, n)]
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-6)


def test_a_student_infinitely_sure_against_a_teacher_that_agrees():
    """0 log 0 is 0: a candidate that neither takes has no loss and no gradient."""
    q, p, n = torch.ones(1, 1), torch.ones(1, 1), torch.full((1, 1), -torch.inf)
    label = torch.tensor([[0.0, -torch.inf]])
    found = testing.value_and_gradients(lambda p: fusedloss.distill_kl_div(q, p, n, label=label), [p])
    assert [t.item() for t in found] == [0, 0]


def test_close_distributions_have_a_loss_that_is_small():
    """A divergence of 1e-5 is of second order: in fp32 it would be off in the third digit."""
    q, p, n = (torch.randn(50, 8) for _ in range(3))
    dots = torch.stack([(q * p).sum(1), (q * n).sum(1)], 1)
    label = (dots + 1e-2 * torch.randn(50, 2)).detach()
    found = fusedloss.distill_kl_div(q, p, n, label=label)
    wanted = fusedloss.distill_kl_div(q.double(), p.double(), n.double(), label=label)
    assert 0 < wanted < 1e-4 and abs(found.item() / wanted.item() - 1) <= 1e-4


def test_learnt_temperatures():
    q, p, n, label = randn(4, 5), randn(4, 5), randn(4, 5), randn(4, 2)

    def formula(q, p, n, student, teacher):
        z = torch.stack([(q * p).sum(1), (q * n).sum(1)], 1) / student
        shares = (label / teacher).softmax(1)
        return F.kl_div(z.log_softmax(1), shares, reduction="batchmean") * student.square()

    ours = lambda q, p, n, s, t: fusedloss.distill_kl_div(
        q, p, n, label=label, student_temperature=s, teacher_temperature=t
    )
    same(ours, formula, [q, p, n, torch.tensor(1.5).double(), torch.tensor(0.7).double()])


# Embeddings -----------------------------------------------------------------------------------------------------------


class Student(nn.Module):
    """What the library's class asks of a model."""

    device = torch.device("cpu")

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def get_embedding_dimension(self):
        return self.dim

    def forward(self, features):
        return {"sentence_embedding": features["x"]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", ["cosine", "mse", "l2"])
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_embed_distill(distance, backend, data):
    rows, dim, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3))
    width = data.draw(st.sampled_from([None, 1, 5]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    theirs = losses.EmbedDistillLoss(Student(dim), distance_metric=distance, projection_dim=width).double()
    students = [randn(rows, dim) for _ in range(columns)]
    each = data.draw(st.booleans())  # a teacher for each column
    teacher = randn(rows, columns, width or dim) if each else randn(rows, width or dim)
    if width is None and data.draw(st.booleans()):
        students[0][0] = (teacher[:, 0] if each else teacher)[0]
        students[-1][-1] = 0
    upstream = lambda *t: theirs([{"x": x} for x in t], teacher)
    options = {"distance": distance, "projection": theirs.projection, "backend": backend}
    same(lambda *t: fusedloss.embed_distill(list(t), teacher, **options), upstream, students)
    if each:
        same(lambda *t: fusedloss.embed_distill(t, list(teacher.unbind(1)), **options), upstream, students)
    if columns == 1:
        same(lambda x: fusedloss.embed_distill(x, teacher, **options), upstream, students)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("distance", ["cosine", "mse", "l2"])
def test_a_projection_is_not_rounded_before_the_distance(distance, autocast, dtype):
    x, weight, teacher = torch.randn(20, 6).to(dtype), torch.randn(5, 6).to(dtype), torch.randn(20, 5)

    def ours(x, w):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return fusedloss.embed_distill(x, teacher, distance=distance, projection=w)

    exact = testing.value_and_gradients(ours, [x.double(), weight.double()])
    found = testing.value_and_gradients(ours, [x, weight])
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-6, atol=0)
    for a, b in zip(found[1:], exact[1:], strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= torch.finfo(dtype).eps * b.norm()


def test_a_projection_is_trained_alongside():
    student, teacher, weight = randn(5, 3), randn(5, 4), randn(4, 3)
    ours = lambda x, w: fusedloss.embed_distill(x, teacher, distance="mse", projection=w)
    same(ours, lambda x, w: F.mse_loss(x @ w.T, teacher), [student, weight])
    module = fusedloss.EmbedDistillLoss(distance="mse", projection=nn.Linear(3, 4).double())
    module(student, teacher).backward()
    assert [name for name, p in module.named_parameters() if p.grad.abs().max() > 0] == [
        "projection.weight",
        "projection.bias",
    ]


def test_the_teacher_is_not_rounded_to_the_students_dtype():
    """And has no gradient."""
    student, teacher = torch.randn(9, 16).bfloat16(), torch.randn(9, 16).requires_grad_()
    for distance in ("cosine", "mse", "l2"):
        for backend in (*BACKENDS, "triton"):
            leaf = student.clone().requires_grad_()
            found = fusedloss.embed_distill(leaf, teacher, distance=distance, backend=backend)
            wanted = fusedloss.embed_distill(student.double(), teacher.double(), distance=distance)
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
            found.backward()
            assert teacher.grad is None and leaf.grad.dtype == torch.bfloat16
    found = fusedloss.embed_distill(student.float(), teacher.double())
    assert found.dtype == torch.float32


# Every loss -----------------------------------------------------------------------------------------------------------


def columns(tensors, width):
    """What a teacher says, from what the tensors are: any numbers do."""
    return torch.linspace(-1, 1, len(tensors[0]) * width, device=tensors[0].device).reshape(len(tensors[0]), width)


ALL = {
    "margin_mse": lambda *t, **o: fusedloss.margin_mse(*t, label=columns(t, 2), **o),
    "margin_mse, cos": lambda *t, **o: fusedloss.margin_mse(*t, label=columns(t, 3), similarity="cos", **o),
    "distill_kl_div": lambda *t, **o: fusedloss.distill_kl_div(*t, label=columns(t, 3), temperature=2.0, **o),
    "distill_kl_div, angle": lambda *t, **o: fusedloss.distill_kl_div(*t, label=columns(t, 3), similarity="angle", **o),
    "embed_distill": lambda *t, **o: fusedloss.embed_distill(t[:3], t[3], **o),
    "embed_distill, mse": lambda *t, **o: fusedloss.embed_distill(t[:3], t[3], distance="mse", **o),
    "embed_distill, l2": lambda *t, **o: fusedloss.embed_distill(t[0], t[3], distance="l2", **o),
}


def embeddings(dtype=torch.float64, device="cpu", rows=7):
    torch.manual_seed(0)
    return [torch.randn(rows, 24, dtype=torch.float64).to(dtype).to(device) / 3 for _ in range(4)]


@pytest.mark.parametrize("name", ALL)
def test_reductions(name):
    tensors, loss = embeddings(), ALL[name]
    rows = loss(*tensors, reduction="none")
    assert rows.shape == (7,) and rows.dtype == torch.float64
    torch.testing.assert_close(loss(*tensors, reduction="sum"), rows.sum())
    torch.testing.assert_close(loss(*tensors), rows.mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("name", ALL)
def test_backends_and_dtypes(name, backend, dtype):
    check_backend(name, backend, dtype, "cpu")


def check_backend(name, backend, dtype, device):
    tensors = embeddings(dtype, device)
    ours = testing.value_and_gradients(lambda *t: ALL[name](*t, backend=backend), tensors)
    eager = testing.value_and_gradients(lambda *t: ALL[name](*(x.float() for x in t), backend="reference"), tensors)
    oracle = testing.value_and_gradients(lambda *t: ALL[name](*t, backend="reference"), [t.double() for t in tensors])
    # One number's error in eager may be 0 by luck.
    torch.testing.assert_close(ours[0].double(), oracle[0], rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    for a, b, c in zip(ours[1:], eager[1:], oracle[1:], strict=True):
        assert testing.budget_share(a, b, c, a.dtype) <= 1
    assert ours[0].dtype == torch.float32 and ours[0].shape == () and all(g.dtype == dtype for g in ours[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("name", ALL)
def test_backends_and_dtypes_on_a_gpu(name, backend, dtype):
    check_backend(name, backend, dtype, "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
def test_nan_in_nan_out(name, backend):
    for place in (0, 3):
        tensors = embeddings()
        tensors[place][2, 3] = torch.nan
        assert ALL[name](*tensors, backend=backend).isnan()


@pytest.mark.parametrize("loss", [fusedloss.margin_mse, fusedloss.distill_kl_div])
def test_a_teachers_nan_shows(loss):
    label = torch.tensor([[0.1, 0.2], [torch.nan, 1.0]])
    found = testing.value_and_gradients(lambda *t: loss(*t, label=label), [torch.randn(2, 3) for _ in range(3)])
    assert found[0].isnan() and found[1][1].isnan().all() and found[1][0].isfinite().all()


def beside_inputs(function, tensors):
    """Bytes saved for backward, but for the inputs themselves."""
    kept, own = {}, {t.untyped_storage().data_ptr() for t in tensors}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        function(*tensors)
    return sum(size for place, size in kept.items() if place not in own)


@pytest.mark.parametrize("rows", [5, 500])
@pytest.mark.parametrize("distance", ["cosine", "mse", "l2"])
def test_embed_distill_saves_no_more_than_the_library(distance, rows):
    student, teacher = torch.randn(rows, 256, requires_grad=True), torch.randn(rows, 256)
    theirs = losses.EmbedDistillLoss(Student(256), distance_metric=distance)
    ours = beside_inputs(lambda x, y: fusedloss.embed_distill(x, y, distance=distance), [student, teacher])
    # Its mean of squares keeps nothing; ours a number a row.
    most = beside_inputs(lambda x, y: theirs([{"x": x}], y), [student, teacher])
    assert ours <= max(most, 12 * rows)


@pytest.mark.parametrize("rows", [5, 500])
@pytest.mark.parametrize("name", ["margin_mse", "distill_kl_div"])
def test_distilled_scores_save_a_few_numbers_a_row(name, rows):
    tensors = [torch.randn(rows, 256, requires_grad=True) for _ in range(4)]
    label = torch.randn(rows, 3)
    ours, theirs = {
        "margin_mse": (fusedloss.margin_mse, losses.MarginMSELoss(None)),
        "distill_kl_div": (fusedloss.distill_kl_div, losses.DistillKLDivLoss(None)),
    }[name]
    found = beside_inputs(lambda *t: ours(*t, label=label), tensors)
    most = beside_inputs(lambda *t: theirs.compute_loss_from_embeddings(list(t), label), tensors)
    assert found <= most + 12 * rows * 4 and found <= 40 * rows * 4


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda x, y: fusedloss.margin_mse(x, x, label=y),
            ValueError,
            r"negatives must hold at least one matrix \[B, D\], got none",
        ),
        (
            lambda x, y: fusedloss.margin_mse(x, x, x[:2], label=y),
            ValueError,
            r"negatives\[0\] must have 3 rows, like query, got 2",
        ),
        (
            lambda x, y: fusedloss.margin_mse(x, x, x, x, label=y),
            ValueError,
            r"label must have shape \[3, 3\] or \[3, 2\], got \[3\]",
        ),
        (
            lambda x, y: fusedloss.distill_kl_div(x, x, label=y),
            ValueError,
            r"negatives must hold at least one matrix \[B, D\], got none",
        ),
        (
            lambda x, y: fusedloss.distill_kl_div(x, x, x, label=y),
            ValueError,
            r"label must have shape \[3, 2\], got \[3\]",
        ),
        (
            lambda x, y: fusedloss.distill_kl_div(x, x, x, label=x[:, :2], student_temperature=0.0),
            ValueError,
            "student_temperature must be a positive number, got 0.0",
        ),
        (
            lambda x, y: fusedloss.embed_distill([], x),
            ValueError,
            r"student must be \[B, D\] or hold at least one column \[B, D\], got none",
        ),
        (
            lambda x, y: fusedloss.embed_distill([x, x[:1]], x),
            ValueError,
            r"student\[1\] must have 3 rows, like student\[0\], got 1",
        ),
        (
            lambda x, y: fusedloss.embed_distill([x, x], x.reshape(3, 1, 4)),
            ValueError,
            r"teacher must have shape \[3, 4\] or \[3, 2, 4\], like student, got \[3, 1, 4\]",
        ),
        (
            lambda x, y: fusedloss.embed_distill([x, x], [x]),
            ValueError,
            "teacher must have 2 columns, like student, got 1",
        ),
        (
            lambda x, y: fusedloss.embed_distill(x, x.long()),
            TypeError,
            "teacher must be float16, bfloat16, float32 or float64 embeddings, got torch.int64",
        ),
        (
            lambda x, y: fusedloss.embed_distill(x, x, projection=x[:, :2]),
            ValueError,
            r"projection must have shape \[T, 4\], got \[3, 2\]",
        ),
        (
            lambda x, y: fusedloss.embed_distill(x, x, projection="linear"),
            TypeError,
            r"projection must be a weight \[T, D\], a function or None, got 'linear', a str",
        ),
        (
            lambda x, y: fusedloss.EmbedDistillLoss(distance="cos"),
            ValueError,
            "distance must be one of 'cosine', 'mse', 'l2', got 'cos'",
        ),
        (
            lambda x, y: fusedloss.EmbedDistillLoss(nn.Linear(1, 1)),
            TypeError,
            "distance must not be a model, got the nn.Module Linear",
        ),
        (
            lambda x, y: fusedloss.MarginMSELoss(similarity="l2"),
            ValueError,
            "similarity must be one of 'cos', 'dot', 'euclidean', 'manhattan', 'angle', got 'l2'",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 4), torch.rand(3))
