"""What every public loss and module must do alike: run under torch.compile, and take constants of any origin."""

from __future__ import annotations

import pytest
import torch
from calls import CALLS, Batch, Call, missing
from condition import exact_and_moves, within

import fusedloss

# Compiled graphs compute in another order: 1e-10 is 4e5 eps of fp64, in which everything here is computed.
NEAR = {"rtol": 1e-10, "atol": 1e-10}


def test_every_public_loss_has_a_call():
    assert not missing()


def value_and_gradients(call, batch):
    value = call.result()
    return [value.detach(), *torch.autograd.grad(value.sum(), batch.leaves, materialize_grads=True)]


# Kernels --------------------------------------------------------------------------------------------------------------

# The parts of the sweep (statistics, stored exponentials, gradients, folds, masks, the highest), and each of Triton's
# kernels outside of it.
SWEEPS = [
    "arcface",
    "batch_all_triplet",
    "batch_hard_triplet",
    "batch_semi_hard_triplet",
    "circle",
    "clip",
    "clip_distill",
    "decoupled_contrastive",
    "in_batch_margin_ranking",
    "info_nce",
    "info_nce, guide",
    "info_nce, normalize",
    "info_nce, same_id",
    "info_nce, score_margin",
    "info_nce, target, bias, weight",
    "linear_cross_entropy",
    "mega_batch_margin",
    "multi_similarity",
    "multiple_negatives_ranking",
    "multiple_negatives_ranking, directions",
    "nt_xent",
    "proxy_anchor",
    "proxy_nca",
    "siglip",
    "sup_con",
    "sup_con, in",
]
OUTSIDE = [
    "binary_cross_entropy_with_logits",
    "contrastive",
    "cosent",
    "cosine_similarity",
    "cross_entropy",
    "distill_kl_div",
    "focal",
    "huber",
    "lambda_loss",
    "list_mle",
    "margin_mse",
    "softmax_pair",
    "triplet",
]


@pytest.mark.smoke
@pytest.mark.parametrize(
    "backend, name", [*(("cuda", n) for n in SWEEPS), *(("triton", n) for n in (*SWEEPS, *OUTSIDE))]
)
def test_each_kernel_on_a_small_batch(backend, name, monkeypatch):
    from fusedloss.rowwise import pair_logits, pairs

    for module in (pairs, pair_logits):  # small inputs run as the formula: here they stand for large ones
        monkeypatch.setattr(module, "SMALL", 0)

    def run(dtype, backend, move=lambda x: x):
        batch = Batch(37, dtype, lambda place, x: moved(x, move))
        call = CALLS[name](batch)
        value = call.result(backend=backend)
        gradients = torch.autograd.grad(value.sum(), batch.leaves, materialize_grads=True)
        return {place: x.detach() for place, x in enumerate((value, *gradients))}

    found, eager = run(torch.float32, backend), run(torch.float32, "reference")
    exact, moves = exact_and_moves(lambda move: run(torch.float64, "reference", move), torch.float32)
    for place, out in found.items():
        within(out, eager[place], exact[place], moves[place], f"output {place}")


def moved(x, move):
    """Numbers that fp32 has, and what receives a gradient moved."""
    if not x.is_floating_point():
        return x
    held = x.detach().float().to(x.dtype)
    return move(held).requires_grad_() if x.requires_grad else held


# torch.compile --------------------------------------------------------------------------------------------------------


def assert_as_eager(compiled, make, rows):
    """`compiled` takes what a call does: its loss and gradients are eager's."""
    eager, batch = Batch(rows), Batch(rows)
    wanted = value_and_gradients(make(eager), eager)
    call = make(batch)
    found = value_and_gradients(call._replace(function=compiled), batch)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **NEAR)


@pytest.mark.lengthy
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.grid] if "," in name else []) for name in CALLS]
)
def test_compiles_in_one_graph_for_every_batch_size(name):
    make = CALLS[name]
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    compiled = torch.compile(make(Batch(4)).function, fullgraph=True, dynamic=True, backend="eager")
    for rows in (8, 5):
        assert_as_eager(compiled, make, rows)
    assert graphs["unique_graphs"] == 1


@pytest.mark.grid
@pytest.mark.lengthy
@pytest.mark.parametrize("name", [name for name in CALLS if "," not in name])
def test_the_last_batch_may_be_smaller(name):
    """Without dynamic=True: the first size has a graph, and all others have the second. Of modules, where there are."""

    def make(batch):
        call = CALLS[name](batch)
        module = call.as_module()
        return call if module is None else Call(module[0], call.arguments, module[1])

    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    loss = make(Batch(4)).function
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for rows in (8, 5):
        assert_as_eager(compiled, make, rows)
    assert graphs["unique_graphs"] == 2


@pytest.mark.slow
def test_inductor_compiles_an_op_a_scan_and_mined_pairs():
    """Dynamo's other tests stop before the code is made, which takes a C++ compiler some seconds for each of these."""
    for name in ("info_nce, same_id", "cosent", "batch_hard_triplet"):
        torch._dynamo.reset()
        assert_as_eager(torch.compile(CALLS[name](Batch(4)).function, fullgraph=True), CALLS[name], 8)


# Constants made under inference_mode ----------------------------------------------------------------------------------


def made_under_inference(x):
    with torch.inference_mode():
        return x.detach().clone()


@pytest.mark.parametrize("backend", ["chunked", "reference", pytest.param("triton", marks=pytest.mark.grid)])
@pytest.mark.parametrize("name", CALLS)
def test_what_has_no_gradient_may_be_an_inference_tensor(name, backend):
    """Each argument in turn, a frozen side's embeddings included: what `encode(convert_to_tensor=True)` returns."""
    make, dtype = CALLS[name], torch.float32 if backend == "triton" else torch.float64
    # The same numbers, computed the same way: what differs is where in memory they lie.
    near = {"rtol": 1e-4, "atol": 1e-5} if backend == "triton" else NEAR
    options = {} if name == "global_orthogonal_regularization" else {"backend": backend}

    def results(rows, change):
        batch = Batch(rows, dtype, change)
        call = make(batch)
        return value_and_gradients(call._replace(options=call.options | options), batch) if batch.leaves else None

    counted = Batch(6)
    make(counted)
    for place in range(counted.asked):
        wanted = results(6, lambda at, x, place=place: x.detach().clone() if at == place else x)
        found = results(6, lambda at, x, place=place: made_under_inference(x) if at == place else x)
        for a, b in zip(found or [], wanted or [], strict=True):
            torch.testing.assert_close(a, b, **near)


def test_an_inference_tensor_as_labels():
    """A value from elsewhere, and a bank that changes after the loss has read it."""
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = fusedloss.multi_similarity(x, made_under_inference(torch.arange(6) // 2))
    loss.backward()
    assert loss.item() == pytest.approx(0.8418868, abs=2e-7)
    bank = made_under_inference(torch.randn(5, 8))
    rows = fusedloss.info_nce(x, x.detach(), bank=bank, reduction="none")
    (wanted,) = torch.autograd.grad(rows.sum(), x, retain_graph=True)
    with torch.inference_mode():
        bank.zero_()
    (found,) = torch.autograd.grad(rows.sum(), x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
