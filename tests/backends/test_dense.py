"""`dense`: which batches `auto` gives it, and that what it computes is what the others compute."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss
from fusedloss import UnsupportedError
from fusedloss.backends import dense, select
from fusedloss.core.numerics import FOLD_COPIES, filled
from fusedloss.core.problem import Block, Fold, Problem


def problem(M, N, dtype=torch.float32, D=8, **options):
    x, y = (torch.empty(1, D, dtype=dtype).expand(rows, D) for rows in (M, N))
    one = torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return Problem((x, y), (Block(0, 1),), one, torch.zeros(M, dtype=torch.int64), one.expand(M), **options)


def test_auto_takes_it_up_to_one_size():
    assert dense.MOST["cpu"] == 1024 * 1024 * 4
    assert select(problem(1024, 1024), "auto") == "dense"
    assert select(problem(1024, 1025), "auto") != "dense"
    assert select(problem(512, 1024, torch.float64), "auto") == "dense"
    assert select(problem(1024, 1024, torch.float64), "auto") != "dense"
    assert select(problem(1024, 1024, torch.bfloat16), "auto") == "dense"  # its logits are fp32
    assert select(problem(4096, 1025), "dense") == "dense"


def test_auto_keeps_to_the_workspace():
    size = dense.MATRICES * 64 * 64 * 4
    assert select(problem(64, 64, workspace_bytes=size), "auto") == "dense"
    assert select(problem(64, 64, workspace_bytes=size - 1), "auto") == "chunked"


def test_auto_keeps_to_the_workspace_of_a_fold():
    """Which holds sorted values, their places and masks, too."""
    size = FOLD_COPIES * 64 * 64 * 4
    assert select(problem(64, 64, fold=Fold("semi_hard"), workspace_bytes=size), "auto") == "dense"
    assert select(problem(64, 64, fold=Fold("semi_hard"), workspace_bytes=size - 1), "auto") == "chunked"


def test_auto_keeps_to_the_environment_s_workspace(monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_WORKSPACE_BYTES", "20000")
    assert select(problem(64, 64), "auto") == "chunked"


def test_rows_without_similarities_name_it():
    with pytest.raises(UnsupportedError, match=r"'dense'.*in-batch similarities"):
        fusedloss.focal(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), backend="dense")


@pytest.mark.parametrize("apart", [10.0, 30.0, 60.0])
def test_the_loss_of_well_fitted_pairs_keeps_its_digits(apart):
    """`log(1 + exp(-apart))` each: 1 - p would be 0 from 17 on."""
    x = torch.eye(4, dtype=torch.float32).mul(apart).requires_grad_()
    loss = fusedloss.info_nce(x, torch.eye(4), temperature=1.0, reduction="none", backend="dense")
    wanted = math.log1p(3 * math.exp(-apart))
    torch.testing.assert_close(loss, torch.full((4,), wanted), rtol=2e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    share = math.exp(-apart) / (1 + 3 * math.exp(-apart))
    exact = torch.full((4, 4), share).fill_diagonal_(-3 * share)
    torch.testing.assert_close(gradient, exact, rtol=2e-5, atol=0)


def test_hardness_of_private_negatives_does_not_change_the_scale():
    """One block with `hard_negatives`, which it does not have: the strength is nowhere in the loss."""
    x, y = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
    given = {"hardness_mode": "hard_negatives", "hardness_strength": 3.0, "backend": "dense"}
    plain = torch.autograd.grad(fusedloss.multiple_negatives_ranking(x, y, backend="dense"), x)[0]
    found = torch.autograd.grad(fusedloss.multiple_negatives_ranking(x, y, **given), x)[0]
    torch.testing.assert_close(found, plain, rtol=0, atol=0)


def test_a_mean_is_the_sum_over_its_rows_in_16_bits_too():
    x, y = (torch.randn(8, 16).to(torch.bfloat16).requires_grad_() for _ in range(2))
    mean = torch.autograd.grad(fusedloss.info_nce(x, y, backend="dense"), (x, y))
    total = torch.autograd.grad(fusedloss.info_nce(x, y, reduction="sum", backend="dense") / 8, (x, y))
    for a, b in zip(mean, total, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=0)


def test_gradients_of_rows_take_their_own_upstream():
    x, y = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    upstream = torch.linspace(-1, 2, 6, dtype=torch.float64)
    found, wanted = (
        torch.autograd.grad(fusedloss.info_nce(x, y, reduction="none", backend=backend), (x, y), upstream)
        for backend in ("dense", "reference")
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("learns", [False, True])
def test_losses_of_rows_keep_the_gradient_by_the_similarities(dtype, learns):
    """Three products forward and backward, against the formula in fp64; a second backward finds the same."""
    x, y = torch.randn(2, 5, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([0.5, 0.0, -2.0, 1.0, 3.0], dtype=torch.float64)
    found = []
    for backend, wide in (("dense", dtype), ("reference", torch.float64)):
        leaves = [x.to(wide, copy=True).requires_grad_(), y.to(wide, copy=True).requires_grad_()]
        temperature = torch.tensor(0.3, dtype=torch.float64 if wide is torch.float64 else torch.float32)
        leaves += [temperature.requires_grad_()] * learns
        counted = Products()
        with counted:
            rows = fusedloss.info_nce(
                *leaves[:2],
                temperature=temperature,
                reduction="none",
                target=torch.tensor([0, 1, 2, -100, 4]),
                backend=backend,
            )
            first = torch.autograd.grad(rows, leaves, weight.to(rows.dtype), retain_graph=True)
        assert backend != "dense" or counted.count == 3
        again = torch.autograd.grad(rows, leaves, weight.to(rows.dtype))
        found.append([g.double() for g in (*first, *again)])
    near = 1e-12 if dtype is torch.float64 else 2**-8  # of bf16 one rounding, and of the temperature fp32's
    for own, other in zip(*found, strict=True):
        assert (own - other).norm() <= near * other.norm()


def test_a_row_of_weight_0_brings_no_nan():
    x, y = torch.randn(2, 5, 3)
    x[1] = torch.finfo(torch.float32).max  # its logits are infinite
    rows = fusedloss.info_nce(x.requires_grad_(), y.requires_grad_(), reduction="none", backend="dense")
    upstream = torch.tensor([0.5, 0.0, -2.0, 1.0, 3.0])
    assert all(g.isfinite().all() for g in torch.autograd.grad(rows, (x, y), upstream))


def test_losses_of_rows_refuse_inputs_that_were_written_to():
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    rows = fusedloss.info_nce(x, y, reduction="none", backend="dense")
    y.add_(1)
    with pytest.raises(RuntimeError, match="must stay as it is until the last backward"):
        rows.sum().backward()


def test_no_rows_leave_what_calls_share_without_a_graph():
    """It returned the rows' weights themselves, a constant of all calls, which then had the graph of the first."""
    weight = torch.ones(0)
    for given in ({}, {"weight": weight}):
        for _ in range(2):
            x = torch.randn(0, 4, requires_grad=True)
            loss = fusedloss.info_nce(x, torch.randn(3, 4), reduction="none", backend="dense", **given)
            assert loss.requires_grad and not weight.requires_grad
            (gradient,) = torch.autograd.grad(loss, x, torch.ones(0))
            assert gradient.shape == (0, 4)
    assert not filled(0, 1.0, torch.float32, weight.device).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_call_weighs_its_rows(reduction):
    """Where every row counts, the compiled sweep passed over the weights that made its sum a mean."""
    x, y = torch.randn(2, 6, 4, dtype=torch.float64)
    upstream = torch.linspace(0.5, 2, 6, dtype=torch.float64)

    def step(x, y):
        loss = fusedloss.info_nce(x, y, reduction=reduction, backend="dense")
        return loss if reduction == "mean" else (loss * upstream).sum()

    found = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        learnt = x.clone().requires_grad_(), y.clone().requires_grad_()
        loss = call(*learnt)
        found.append((loss, *torch.autograd.grad(loss, learnt)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)
