"""Distillation inside the batch, against the formula on whole matrices in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusedloss
from fusedloss import masks, testing
from fusedloss.core import folds

BACKENDS = ["dense", "chunked", "reference"]
KERNELS = ["triton", "cuda"]
FORMS = ("kl", "ce", "mse")
QUERY_TO_KEY, KEY_TO_QUERY = "query_to_key", "key_to_query"


def rows_of(z: Tensor, t: Tensor, admitted: Tensor, form: str) -> Tensor:
    """The losses of rows of logits, column by column that competes."""
    found = []
    for own, taught, keep in zip(z, t, admitted, strict=True):
        if not keep.any():
            found.append(0 * own.sum())
            continue
        log_q, log_p = own[keep].log_softmax(0), taught[keep].log_softmax(0)
        p, q = log_p.exp(), log_q.exp()
        found.append({"kl": p * (log_p - log_q), "ce": -p * log_q, "mse": (q - p) ** 2}[form].sum())
    return torch.stack(found)


def formula(query, key, teacher, temperature, teacher_temperature, *, form, directions, normalize, admitted, reduction):
    """teacher: (query, key, negatives, bank). admitted: bool [M, N + B + K], in the order of the columns."""
    query, key, negatives, bank = (query, key[0], key[1], key[2])
    unit = (lambda x: F.normalize(x, dim=-1)) if normalize else (lambda x: x)
    losses = []
    for direction in directions:
        scores = []
        for q, k, n, b in ((query, key, negatives, bank), teacher):
            z = [unit(q) @ unit(k).T]
            if direction == KEY_TO_QUERY:
                scores.append(z[0].T)
                continue
            z += [] if b is None else [unit(q) @ unit(b).T]
            z += [] if n is None else [torch.einsum("md,mkd->mk", unit(q), unit(n))]
            scores.append(torch.cat(z, 1))
        z, t = scores[0] / temperature, scores[1] / teacher_temperature
        keep = admitted[:, : len(key)].T if direction == KEY_TO_QUERY else admitted
        losses.append(rows_of(z, t, keep, form))
    loss = torch.stack(losses).mean(0)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


@st.composite
def cases(draw):
    """Tensors and options of a call, and which columns compete."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    directions = draw(st.sampled_from([(QUERY_TO_KEY,), (KEY_TO_QUERY,), (KEY_TO_QUERY, QUERY_TO_KEY)]))
    M = draw(st.integers(1, 8))
    N = M if KEY_TO_QUERY in directions else draw(st.integers(1, 9))
    D, T = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    options: dict = {"form": draw(st.sampled_from(FORMS)), "directions": directions, "normalize": draw(st.booleans())}
    admitted = [torch.ones(M, N, dtype=torch.bool)]
    tensors = {"query": randn(M, D), "key": randn(N, D), "temperature": randn().exp()}
    fixed = {"teacher_query": randn(M, T), "teacher_key": randn(N, T), "teacher_temperature": randn().exp().item()}
    ahead = QUERY_TO_KEY in directions  # which alone has further columns
    if ahead and draw(st.booleans()):
        B = draw(st.integers(0, 3))
        fixed |= {"bank": randn(B, D), "teacher_bank": randn(B, T)}
        admitted.append(torch.ones(M, B, dtype=torch.bool))
    kind = draw(st.sampled_from(["none", "dense", "ids", "groups", "not_self"]))
    width = sum(part.shape[1] for part in admitted)
    if kind != "none":
        own = torch.arange(width) == torch.arange(M)[:, None]
        own[:, N:] = False
        rows, columns = torch.randint(3, (M,)), torch.randint(3, (width,))
        if kind == "dense":
            fixed["mask"] = torch.rand(M, width) < 0.5
            admitted = [fixed["mask"] | own]
        elif kind == "ids":
            fixed["mask"], admitted = masks.same_id(rows, columns), [(rows[:, None] != columns) | own]
        elif kind == "groups":
            fixed["mask"], admitted = masks.same_group(rows, columns), [(rows[:, None] == columns) | own]
        else:
            offset = draw(st.integers(-2, 2))
            there = torch.arange(width) == torch.arange(M)[:, None] + offset
            fixed["mask"], admitted = masks.not_self(offset), [~there]
    if ahead and draw(st.booleans()):
        K = draw(st.integers(0, 3))
        tensors["negatives"], fixed["teacher_negatives"] = randn(M, K, D), randn(M, K, T)
        keep = torch.ones(M, K, dtype=torch.bool)
        if K and draw(st.booleans()):
            fixed["negatives_mask"] = keep = torch.rand(M, K) < 0.5
        admitted.append(keep)
    return tensors, fixed, options, torch.cat(admitted, 1)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def check(case, backend: str, reduction: str, **more) -> None:
    tensors, fixed, options, admitted = case
    names = list(tensors)
    teacher = tuple(fixed.get(f"teacher_{name}") for name in ("query", "key", "negatives", "bank"))

    def found(*given: Tensor) -> Tensor:
        return fusedloss.info_nce_distill(
            **dict(zip(names, given, strict=True)), **fixed, **options, backend=backend, reduction=reduction, **more
        )

    def wanted(*given: Tensor) -> Tensor:
        own = dict(zip(names, given, strict=True))
        return formula(
            own["query"],
            (own["key"], own.get("negatives"), fixed.get("bank")),
            teacher,
            own["temperature"],
            fixed["teacher_temperature"],
            admitted=admitted,
            reduction=reduction,
            **options,
        )

    leaves = list(tensors.values())
    values = [found(*leaves), wanted(*leaves)]
    upstream = 0.1 + torch.rand_like(values[1])
    gradients = [
        testing.value_and_gradients(lambda *given, f=f: (f(*given) * upstream).sum(), leaves) for f in (found, wanted)
    ]
    for one, other in zip(*([value, *g] for value, g in zip(values, gradients, strict=True)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@given(case=cases(), rows=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_it_is_the_formula(backend, reduction, case, rows):
    """In chunks and tiles of a few rows, where the backend has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusedloss.core.folds.distillation.DISTILL_TILE", 20)
        more = {"workspace_bytes": rows * folds.DISTILL_COPIES * 64 * 8} if backend == "chunked" else {}
        check(case, backend, reduction, **more)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("form", FORMS)
def test_in_kernels(backend, form):
    """With every option at once, in fp32; the blocks of a workspace's row have padding between them."""
    torch.manual_seed(0)
    M, N, B, K, D, T = 19, 21, 5, 2, 8, 6
    options = {"form": form, "directions": (QUERY_TO_KEY,), "normalize": True}
    keep, rows, columns = torch.rand(M, K) < 0.5, torch.randint(4, (M,)), torch.randint(4, (N + B,))
    own = F.pad(torch.eye(M, N, dtype=torch.bool), (0, B))
    admitted = torch.cat([(rows[:, None] != columns) | own, keep], 1)
    tensors = [randn(M, D), randn(N, D), randn(M, K, D), randn().exp()]
    teacher, bank = (randn(M, T), randn(N, T), randn(M, K, T), randn(B, T)), randn(B, D)
    narrow = [t.float() for t in teacher]

    def found(query, key, negatives, temperature):
        return fusedloss.info_nce_distill(
            query,
            key,
            *narrow[:2],
            negatives=negatives,
            teacher_negatives=narrow[2],
            negatives_mask=keep,
            bank=bank.float(),
            teacher_bank=narrow[3],
            temperature=temperature,
            teacher_temperature=0.3,
            mask=masks.same_id(rows, columns),
            backend=backend,
            **options,
        )

    def wanted(query, key, negatives, temperature):
        more = {"admitted": admitted, "reduction": "mean"}
        return formula(query, (key, negatives, bank), teacher, temperature, 0.3, **more, **options)

    wide = testing.value_and_gradients(wanted, tensors)
    for a, b in zip(testing.value_and_gradients(found, [t.float() for t in tensors]), wide, strict=True):
        assert (a.double() - b).norm() <= 16 * torch.finfo(torch.float32).eps * b.norm()


@pytest.mark.parametrize("backend", [*BACKENDS, *KERNELS])
def test_a_row_without_columns_has_loss_0_and_no_gradient(backend):
    query, key = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    dropped = masks.not_self() & (torch.arange(3)[:, None].expand(3, 3) > 0)  # leaves only the own column of row 0
    loss = fusedloss.info_nce_distill(query, key, key, query, mask=dropped, reduction="none", backend=backend)
    loss.sum().backward()
    assert loss[0] == 0 and (loss[1:] > 0).all() and not query.grad[0].any() and query.grad[1:].any()


@pytest.mark.parametrize("backend", [*BACKENDS, *KERNELS])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_spoils_only_itself(backend, value):
    query, key = torch.randn(4, 3), torch.randn(4, 3)
    query[1, 2] = value
    found = fusedloss.info_nce_distill(query, key, key, key, reduction="none", backend=backend)
    assert found.isnan().tolist() == [False, True, False, False]


def test_ce_is_kl_and_the_teachers_entropy():
    query, key, *teacher = randn(4, 7, 5).unbind(0)
    options = {"temperature": 0.5, "teacher_temperature": 0.25}
    kl, ce = (fusedloss.info_nce_distill(query, key, *teacher, form=form, **options) for form in ("kl", "ce"))
    p = ((teacher[0] @ teacher[1].T) / 0.25).softmax(1)
    torch.testing.assert_close(ce - kl, -(p * p.log()).sum(1).mean())


def test_both_directions_without_masks_are_clip_distill():
    query, key, *teacher = randn(4, 6, 5).unbind(0)
    both = fusedloss.info_nce_distill(
        query, key, *teacher, temperature=0.5, teacher_temperature=0.2, directions=(QUERY_TO_KEY, KEY_TO_QUERY)
    )
    torch.testing.assert_close(both, fusedloss.clip_distill(query, key, 2.0, *teacher, 5.0))


def test_mse_is_the_sum_over_the_columns_as_in_nemo_automodel():
    """Its InfoNCEDistillLoss, and its ScoreDistillLoss: each of both texts' matrices with itself, the diagonal kept."""
    query, key, *teacher = randn(4, 7, 5).unbind(0)
    options = {"temperature": 0.1, "teacher_temperature": 0.1, "form": "mse", "normalize": True}

    def softmax(x, y):
        return ((F.normalize(x, dim=1) @ F.normalize(y, dim=1).T) / 0.1).softmax(1)

    def summed(student, taught):
        return F.mse_loss(softmax(*student), softmax(*taught), reduction="sum") / len(query)

    def score(query, key):
        pairs = ((query, teacher[0]), (key, teacher[1]))
        return sum(fusedloss.info_nce_distill(x, x, y, y, **options) for x, y in pairs)

    def nemo_score(query, key):
        return sum(summed((x, x), (y, y)) for x, y in ((query, teacher[0]), (key, teacher[1])))

    for found, wanted in (
        (lambda q, k: fusedloss.info_nce_distill(q, k, *teacher, **options), lambda q, k: summed((q, k), teacher)),
        (score, nemo_score),
    ):
        for a, b in zip(*(testing.value_and_gradients(f, [query, key]) for f in (found, wanted)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_one_matrix(backend):
    """Self-similarities, each row's own left out: the matrix has one gradient, of both of its sides."""
    x, taught = randn(7, 4), randn(7, 3)
    others = ~torch.eye(7, dtype=torch.bool)
    options = {"form": "mse", "directions": (QUERY_TO_KEY,), "normalize": True}

    def found(x):
        mask, own = masks.not_self(), {"temperature": 0.5, "teacher_temperature": 0.25, "backend": backend}
        return fusedloss.info_nce_distill(x, x, taught, taught, mask=mask, **own, **options)

    def wanted(x):
        teacher = (taught, taught, None, None)
        return formula(x, (x, None, None), teacher, 0.5, 0.25, admitted=others, reduction="mean", **options)

    for a, b in zip(*(testing.value_and_gradients(f, [x]) for f in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_bank_may_be_overwritten_before_the_backward():
    query, key, bank = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3), torch.randn(5, 3)
    wanted = torch.autograd.grad(distilled(query, key, bank=bank.clone(), teacher_bank=bank), query)[0]
    loss = distilled(query, key, bank=bank, teacher_bank=bank.clone())
    bank.zero_()
    assert torch.equal(torch.autograd.grad(loss, query)[0], wanted)


def distilled(query: Tensor, key: Tensor, teacher_query=None, teacher_key=None, **options) -> Tensor:
    """With the student as its teacher, if there is none."""
    teacher = (query if teacher_query is None else teacher_query, key if teacher_key is None else teacher_key)
    return fusedloss.info_nce_distill(query, key, *teacher, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "js"}, "form must be one of 'kl', 'ce', 'mse', got 'js'"),
        ({"directions": ()}, r"directions must hold one or two names, each once, got \(\)"),
        ({"directions": "query_to_key"}, "directions must be a sequence of 'query_to_key', 'key_to_query', got"),
        ({"directions": ("key_to_key",)}, "directions must be a sequence of 'query_to_key', 'key_to_query', got"),
        ({"directions": (KEY_TO_QUERY,)}, "key must have 3 rows, one per row of query, with the direction"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"teacher_temperature": -1.0}, "teacher_temperature must be a positive number, got -1.0"),
        ({"teacher_query": torch.ones(2, 2)}, r"teacher_query must be \[3, any\], like query, got \[2, 2\]"),
        ({"bank": torch.ones(2, 2)}, "teacher_bank must be given with bank, got None; pass both or none"),
        ({"teacher_negatives": torch.ones(3, 1, 2)}, "negatives must be given with teacher_negatives, got None"),
        (
            {"negatives": torch.ones(3, 1, 3), "teacher_negatives": torch.ones(3, 1, 2)},
            r"negatives must be \[M, K, D\] = \[3, any, 2\], got shape \[3, 1, 3\]",
        ),
        (
            {"negatives": torch.ones(3, 1, 2), "teacher_negatives": torch.ones(3, 2, 2)},
            r"teacher_negatives must be \[3, 1, any\], like negatives, got \[3, 2, 2\]",
        ),
        (
            {"directions": (KEY_TO_QUERY,), "bank": torch.ones(2, 2), "teacher_bank": torch.ones(2, 2)},
            "directions must hold 'query_to_key' with bank, got",
        ),
        ({"negatives_mask": torch.ones(3, 1, dtype=torch.bool)}, "negatives must be given with negatives_mask, got"),
        (
            {
                "negatives": torch.ones(3, 0, 2),
                "teacher_negatives": torch.ones(3, 0, 2),
                "negatives_mask": torch.ones(3, 2, dtype=torch.bool),
            },
            r"negatives_mask must be bool \[3, 0\], got shape \[3, 2\]",
        ),
        ({"mask": masks.score_margin(0.1)}, "mask must be masks.same_id, masks.same_group, masks.not_self or a bool"),
    ],
)
def test_errors(options, message):
    query, key = torch.ones(3, 2), torch.ones(4, 2)
    with pytest.raises(ValueError, match=message):
        distilled(query, key, **options)


def test_the_module_checks_its_options():
    with pytest.raises(ValueError, match="form must be one of"):
        fusedloss.InfoNCEDistillLoss(form="js")
    query, key, *teacher = torch.randn(4, 6, 5).unbind(0)
    loss = fusedloss.InfoNCEDistillLoss(form="mse", normalize=True)
    assert torch.equal(
        loss(query, key, *teacher), fusedloss.info_nce_distill(query, key, *teacher, form="mse", normalize=True)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_a_narrow_teacher_of_a_wide_student(normalize, backend):
    """Its numbers are widened before they are multiplied, those of own negatives and of a bank as well."""
    torch.manual_seed(0)
    names = ("query", "key", "negatives", "bank")
    shapes = (5, 4), (5, 4), (5, 2, 4), (3, 4)
    student = {name: randn(*shape) for name, shape in zip(names, shapes, strict=True)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        teacher = {f"teacher_{name}": randn(*shape).to(dtype) for name, shape in zip(names, shapes, strict=True)}
        wide = {name: x.double() for name, x in teacher.items()}
        options = {"normalize": normalize, "backend": backend, "temperature": 0.3}
        found, wanted = (fusedloss.info_nce_distill(**student, **given, **options) for given in (teacher, wide))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
