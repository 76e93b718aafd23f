"""`chunked` and `dense` as on a device that multiplies 16-bit matrices into fp32: the same budgets, with its rounding.

`products.narrow` says where that is, and the two products beside it are all that a CPU lacks: operands of 16 bits are
exact in fp32, in which it then multiplies and sums, as tensor cores do.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import test_backends as budgets
import torch
from contract import CASES, Batch
from test_backends import small_chunks  # noqa: F401  # a fixture
from torch import Tensor

import fusedloss
from fusedloss import masks, sweep, testing
from fusedloss.backends import BACKENDS
from fusedloss.core import products
from fusedloss.core.problem import Block, Fold, Problem

DTYPES = [torch.bfloat16, torch.float16]


of_backends = pytest.mark.parametrize("backend", ["chunked", "dense"])


def of_dtypes(function):
    return pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))(function)


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """The products of 16-bit matrices into fp32, by their form."""
    found: Counter[str] = Counter()

    def wide_mm(out: Tensor, a: Tensor, b: Tensor) -> None:
        assert a.dtype == b.dtype and a.dtype.itemsize == 2 and out.dtype == torch.float32
        found["mm"] += 1
        out.copy_(a.float() @ b.float())

    def add_wide_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
        assert a.dtype == b.dtype and a.dtype.itemsize == 2 and total.dtype == torch.float32
        found["addmm"] += 1
        total.add_(a.float() @ b.float())

    monkeypatch.setattr(products, "narrow", lambda dtype, device: dtype.itemsize == 2)
    monkeypatch.setattr(products, "wide_mm", wide_mm)
    monkeypatch.setattr(products, "add_wide_mm", add_wide_mm)
    monkeypatch.setattr(sweep.prefixes, "TILE_COLUMNS", 48)
    return found


@pytest.mark.pairwise
@of_backends
@of_dtypes
@pytest.mark.parametrize("shape", ["one column", "one dimension", "wide rows", "several chunks"])
@pytest.mark.parametrize("epilogue", budgets.EPILOGUES)
def test_inside_the_error_budget(asked, epilogue, shape, dtype, backend):
    budgets.test_inside_the_error_budget("cpu", backend, epilogue, dtype, shape)
    assert asked["mm"]


@pytest.mark.pairwise
@of_dtypes
@pytest.mark.parametrize("chunks", ["several", "one"])
@pytest.mark.parametrize("epilogue", budgets.COSINE)
def test_a_scale_known_beforehand(monkeypatch, asked, epilogue, chunks, dtype):
    backend = "chunked" if chunks == "several" else "dense"
    budgets.test_a_scale_known_beforehand(monkeypatch, "cpu", backend, chunks, epilogue, dtype, "several chunks")
    assert asked["mm"]


@pytest.mark.pairwise
@of_backends
@of_dtypes
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("shape", ["ragged", "several chunks"])
@pytest.mark.parametrize("loss", budgets.FAMILY)
def test_the_family_inside_the_error_budget(asked, loss, shape, learnable, dtype, backend):
    budgets.test_the_family_inside_the_error_budget("cpu", backend, learnable, loss, dtype, shape)
    assert asked["mm"]


@pytest.mark.parametrize("loss", budgets.OF_A_SCALE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.grid)], ids=str)
def test_gradients_by_a_scale_are_within_their_condition(monkeypatch, loss, dtype):
    monkeypatch.setattr(budgets, "DRAWS", budgets.DRAWS[::3])
    budgets.test_gradients_by_a_scale_are_within_their_condition(loss, dtype, "chunked")


@of_backends
@pytest.mark.parametrize("norm", [0.003, 1.0, 300.0])
@pytest.mark.parametrize("weight", [1e-4, 1.0, 5.0])
def test_fp16_keeps_its_range_whatever_the_norms_and_weights(norm, weight, backend):
    budgets.test_fp16_keeps_its_range_whatever_the_norms_and_weights(backend, norm, weight)


@pytest.mark.parametrize("name", budgets.OF_A_MEAN)
def test_a_means_gradients_in_bf16_are_rounded_twice(name, monkeypatch):
    """dz, or the exponentials and the rows that they meet, and the gradient; a CPU that multiplies bf16 has more."""
    budgets.test_a_means_gradients_in_bf16_are_rounded_once(name, True, monkeypatch)


def test_where_out_dtype_raises_inputs_are_cast_up(monkeypatch):
    """bf16 before sm_80, and fp16 where torch may add in fp16: both are checked by its CUDA code."""
    monkeypatch.undo()
    device = torch.device("cuda", 0)
    for capability in ((7, 5), (8, 0), (10, 0)):
        products._multiplies_bf16.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert products.narrow(torch.bfloat16, device) == (capability >= (8, 0))
        assert products.narrow(torch.float16, device)
    products._multiplies_bf16.cache_clear()
    assert not products.narrow(torch.float32, device) and not products.narrow(torch.bfloat16, torch.device("cpu"))
    before = torch.backends.cuda.matmul.allow_fp16_accumulation
    try:
        torch.backends.cuda.matmul.allow_fp16_accumulation = True
        assert not products.narrow(torch.float16, device)
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = before


# Every loss -----------------------------------------------------------------------------------------------------------

# Those without a matrix of similarities.
ROWWISE = {
    *("adr_mse", "angle", "binary_cross_entropy_with_logits", "contrastive", "contrastive_tension", "cosent"),
    *("cosine_similarity", "cross_entropy", "distill_kl_div", "embed_distill", "focal", "huber", "l1", "lambda_loss"),
    *(
        "global_orthogonal_regularization",
        "list_circle",
        "list_info_nce",
        "list_mle",
        "list_net",
        "margin_mse",
        "mse",
        "online_contrastive",
    ),
    *("plist_mle", "rank_net", "smooth_l1", "softmax_pair", "triplet", "matryoshka, cosent"),
}


# `dense` takes their distances in fp64, and their mined pairs from the reference.
ELSEWHERE = {*(name for name in CASES if name.startswith("batch_")), "mega_batch_margin"}
OF_SIMILARITIES = [name for name in CASES if not {name, name.split(",")[0]} & ROWWISE]


@pytest.mark.parametrize("name", OF_SIMILARITIES[::2])
def test_every_other_loss_of_similarities_in_fp16(asked, name):
    test_every_loss_of_similarities(asked, name, torch.float16, "chunked")


@of_backends
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.grid)], ids=["bfloat16", "float16"]
)
@pytest.mark.parametrize("name", OF_SIMILARITIES)
def test_every_loss_of_similarities(asked, name, dtype, backend):
    """Guides, masks, bends, margins, counts, smoothing, private negatives, prefixes, folds."""

    def run(kind: torch.dtype, backend: str) -> list[Tensor]:
        def held(place: int, x: Tensor) -> Tensor:
            return x.detach().to(dtype).to(kind).requires_grad_(x.requires_grad) if x.is_floating_point() else x

        batch = Batch(70, kind, held)
        value = CASES[name](batch).result(backend=backend)
        gradients = torch.autograd.grad(value.sum(), batch.leaves, materialize_grads=True)
        return [x.detach() for x in (value, *gradients)]

    found = run(dtype, backend)
    assert asked["mm"] or (backend == "dense" and name in ELSEWHERE)
    eager, exact = run(dtype, "reference"), run(torch.float64, "reference")
    for place, each in enumerate(zip(found, eager, exact, strict=True)):
        share = testing.budget_share(*each, dtype)
        assert share <= 1, f"output {place}: {share:.2f} of the budget"


# What is particular to 16 bits ----------------------------------------------------------------------------------------


def within_the_budget(call, leaves, dtype, backend="chunked"):
    """A number that is learnt is in fp32."""

    def run(taken: str, tensors: list[Tensor]) -> list[Tensor]:
        return testing.value_and_gradients(lambda *t: call(*t, backend=taken), tensors)

    exact = run("reference", [x.double() for x in leaves])
    for place, each in enumerate(zip(run(backend, leaves), run("reference", leaves), exact, strict=True)):
        share = testing.budget_share(*each, dtype)
        assert share <= 1, f"output {place}: {share:.2f} of the budget"


@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize("order", ["rising", "falling", "none before the last"])
def test_exponentials_of_earlier_tiles_follow_the_rows_maximum(order, scale):
    """Of later tiles whose logits are far above, or far below; and where every column before them is removed."""
    query, key = testing.inputs("clustered", 40, 200, 24)
    steps = torch.linspace(0.05, 1, 200)[:, None]
    leaves = [query.bfloat16(), (key * (steps if order == "rising" else steps.flip(0))).bfloat16()]
    bias, target = torch.zeros(200), torch.arange(160, 200)
    if order == "none before the last":
        bias[:150] = -torch.inf
    call = lambda q, k, **on: fusedloss.info_nce(q, k, target, temperature=1 / scale, key_bias=bias, **on)
    within_the_budget(call, leaves, torch.bfloat16)


IDS = torch.arange(90) % 7
OPTIONS = {
    "label smoothing": {"label_smoothing": 0.1},
    "smoothing of what a mask leaves": {"label_smoothing": 0.1, "mask": masks.same_id(IDS[:70], IDS)},
    "margin": {"mask": masks.score_margin(0.05)},
    "weights": {"weight": torch.linspace(0, 3, 70)},
    "bias": {"key_bias": torch.linspace(-2, 2, 90)},
    "cosine": {"normalize": True},
}


@pytest.mark.pairwise
@of_backends
@of_dtypes
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, learnable, reduction, dtype, backend):
    options = {"reduction": reduction, **OPTIONS[name]}

    def call(q: Tensor, k: Tensor, *scale: Tensor, **on: str) -> Tensor:
        loss = fusedloss.info_nce(q, k, temperature=1 / scale[0] if scale else 0.05, **options, **on)
        return loss if loss.dim() == 0 else (loss * torch.linspace(0.5, 2, 70)).sum()

    learnt = [torch.tensor(20.0)] if learnable else []
    within_the_budget(call, [*testing.inputs("pairs", 70, 90, 24, dtype), *learnt], dtype, backend)


@of_dtypes
def test_counts_are_of_fp32_logits(dtype):
    query, key = testing.inputs("random", 70, 90, 24, dtype)
    run = lambda x, y, on: fusedloss.info_nce(x, y, temperature=0.1, return_stats=True, backend=on)[1]
    found, exact = run(query.requires_grad_(), key, "chunked"), run(query.double(), key.double(), "reference")
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)


@of_dtypes
@pytest.mark.parametrize("cap", [3.0, 100.0])
def test_bent_logits(cap, dtype):
    leaves, target = [x * 4 for x in testing.inputs("random", 70, 90, 24, dtype)], torch.arange(70)
    call = lambda q, k, **on: fusedloss.linear_cross_entropy(q, k, target, softcap=cap, z_loss=0.01, **on)
    within_the_budget(call, leaves, dtype)


@of_dtypes
@pytest.mark.parametrize("loss", ["info_nce", "siglip", "matryoshka"])
def test_a_nan_stays_in_its_row(loss, dtype):
    query, key = testing.inputs("random", 70, 70, 24, dtype)
    query[40, 3] = torch.nan
    call = {
        "info_nce": lambda q: fusedloss.info_nce(q, key, normalize=True, backend="chunked"),
        "siglip": lambda q: fusedloss.siglip(q, key, 10.0, normalize=True, backend="chunked"),
        "matryoshka": lambda q: fusedloss.matryoshka(fusedloss.info_nce, q, key, dims=(24, 8), backend="chunked"),
    }[loss]
    value, gradient = testing.value_and_gradients(call, [query])
    others = torch.arange(70) != 40
    assert value.isnan() and gradient[40].isnan().all() and gradient[others].isfinite().all()


@pytest.mark.parametrize("weights", ["rising", "falling", "small", "large", "none"])
@pytest.mark.parametrize("kind", ["sigmoid", "batch_all"])
def test_a_folds_gain_falls_to_what_the_largest_chunk_allows(kind, weights):
    """In fp16; rows weigh from 1e-9 to 1e9, and the gradients of the chunks before were in another gain."""
    x, y = testing.inputs("random", 150, 150, 24, torch.float16)
    weight = {
        "rising": torch.logspace(-9, 9, 150),
        "falling": torch.logspace(9, -9, 150),
        "small": torch.full((150,), 1e-30),
        "large": torch.full((150,), 1e30),
        "none": torch.zeros(150),
    }[weights]
    labels = torch.arange(150) % 5
    fold = Fold("sigmoid", scalars=(torch.tensor(-2.0),))
    if kind == "batch_all":  # rows that are columns, too
        x, fold = y, Fold("batch_all", (0.5,), (labels, labels), itself=True, distance="euclidean")

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        wide = torch.float32 if dtype == torch.float16 else dtype
        block = Block(0, 0 if x is y else 1)
        operands = tuple(t.to(dtype) for t in ((x,) if x is y else (x, y)))
        scalars = tuple(t.to(wide) for t in fold.scalars)
        taken = replace(fold, scalars=scalars)
        problem = Problem(
            operands, (block,), torch.tensor(10.0, dtype=wide), torch.arange(150), weight.to(wide), fold=taken
        )
        wants = sweep.Wants((True,) * len(operands), True, (False,), (True,) * len(scalars))
        return sweep.run(problem, BACKENDS["chunked"], wants).operands

    beyond = []
    for found, exact in zip(gradients(torch.float16), gradients(torch.float64), strict=True):
        beyond.append((found.double() - exact).norm(dim=1) - 2e-3 * exact.norm(dim=1))
        assert (found.double() - exact).norm() <= 2e-3 * exact.norm()
    if weights == "rising" and x is not y:  # each chunk's rows were finished in its own gain
        assert beyond[0].max() <= 0


@of_dtypes
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("loss", ["batch_all_triplet", "clip_distill"])
def test_folds_in_torch_multiply_in_16_bits_beside_kernels(asked, backend, loss, dtype):
    query, key = testing.inputs("random", 70, 70, 24, dtype)
    budgets.skip_if_unsupported(backend, query)
    call = {
        "batch_all_triplet": lambda q, k, **on: fusedloss.batch_all_triplet(
            torch.cat([q, k]), IDS[:70].repeat(2), **on
        ),
        "clip_distill": lambda q, k, **on: fusedloss.clip_distill(q, k, 10.0, k.detach(), q.detach(), 5.0, **on),
    }[loss]
    within_the_budget(call, [query, key], dtype, backend)
    assert asked["mm"] and asked["addmm"]
