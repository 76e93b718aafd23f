"""The drop-ins for lightly: its losses' values and gradients, with memory banks, weights, and on two ranks."""

from __future__ import annotations

import logging

import pytest
import torch
from ranks import on_ranks

pytest.importorskip("lightly")
import lightly.loss as upstream
from lightly.loss.dcl_loss import negative_mises_fisher_weights

from fusedloss.integrations import _drop_in, calls
from fusedloss.integrations import lightly as fused

pytestmark = [pytest.mark.upstream, pytest.mark.filterwarnings("ignore:To copy construct")]  # lightly's weights
NAMES = ("NTXentLoss", "DCLLoss", "DCLWLoss")


def views(rows=9, dim=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, dim, generator=generator, dtype=dtype).requires_grad_() for _ in range(2)]


def outcome(loss, out0, out1):
    value = loss(out0, out1)
    return [value, *torch.autograd.grad(value, (out0, out1), allow_unused=True)]


def made(module, name, options):
    torch.manual_seed(4)  # of the bank
    return getattr(module, name)(**options).double()


def same(name, options, tensors, counted=True, steps=1, tolerance=1e-10):
    ours, theirs = made(fused, name, options), made(upstream, name, options)
    for _ in range(steps):
        before = calls[f"lightly.{name}"]
        found = outcome(ours, *tensors)
        assert (calls[f"lightly.{name}"] > before) == counted
        for a, b in zip(found, outcome(theirs, *tensors), strict=True):
            a, b = (torch.zeros(()) if x is None else x for x in (a, b))
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return ours, theirs


@pytest.mark.parametrize("temperature", [0.05, 0.5, 7])
@pytest.mark.parametrize("rows, dim", [(2, 5), (9, 1), (9, 5), (40, 16)])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name, rows, dim, temperature):
    same(name, {"temperature": temperature}, views(rows, dim))
    same(name, {"temperature": temperature, "gather_distributed": True}, views(rows, dim))


def test_a_batch_of_one():
    same("NTXentLoss", {}, views(1))
    for name in ("DCLLoss", "DCLWLoss"):
        same(name, {}, views(1), counted=False)


WEIGHTS = {
    "von Mises-Fisher": negative_mises_fisher_weights,
    "with a gradient": lambda a, b: ((a - b) ** 2).sum(1),
    "a number": lambda a, b: 0.25,
    "a column": lambda a, b: (a * a.detach()).sum(1, keepdim=True),
}


@pytest.mark.parametrize("weight_fn", WEIGHTS.values(), ids=WEIGHTS)
def test_weights(weight_fn):
    same("DCLLoss", {"weight_fn": weight_fn}, views())
    same("DCLWLoss", {"sigma": 2.0}, views())


@pytest.mark.parametrize("rows, bank", [(4, 1), (4, 7), (4, 8), (4, 64), (1, 3)])
def test_memory_banks(rows, bank):
    """The same negatives and the same update, also over several rounds."""
    ours, theirs = same("NTXentLoss", {"memory_bank_size": (bank, 5), "temperature": 0.2}, views(rows), steps=5)
    assert torch.equal(ours.memory_bank.bank, theirs.memory_bank.bank)
    assert torch.equal(ours.memory_bank.bank_ptr, theirs.memory_bank.bank_ptr)
    before = ours.memory_bank.bank.clone()
    ours(*(x.detach() for x in views(rows)))
    assert torch.equal(ours.memory_bank.bank, before)  # without a gradient it is not updated


@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name):
    for a, b in zip(
        outcome(made(fused, name, {}).float(), *views(32, dtype=torch.float32)),
        outcome(made(upstream, name, {}), *(x.double() for x in views(32, dtype=torch.float32))),
        strict=True,
    ):
        assert a.dtype == torch.float32 and (a - b).norm() <= 1e-5 * b.norm()
    half = made(fused, name, {})(*(x.bfloat16() for x in views()))
    torch.testing.assert_close(half, made(upstream, name, {})(*views()).float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_nan_and_zeros(name):
    out0, out1 = views()
    with torch.no_grad():
        out0[3] = 0
    torch.testing.assert_close(made(fused, name, {})(out0, out1), made(upstream, name, {})(out0, out1))
    with torch.no_grad():
        out0[3] = torch.nan
    assert made(fused, name, {})(out0, out1).isnan()


def test_by_lightlys_code(caplog, monkeypatch):
    monkeypatch.setattr(_drop_in, "_warned", set())
    with caplog.at_level(logging.WARNING, logger="fusedloss"):
        same("NTXentLoss", {"temperature": -1.0}, views(), counted=False)
        loss = fused.NTXentLoss()
        loss.cross_entropy = torch.nn.CrossEntropyLoss(reduction="none")
        assert loss(*views()).shape == (18,)
        for module in (fused, upstream):
            with pytest.raises(RuntimeError, match="cannot reshape"):
                module.NTXentLoss()(torch.zeros(0, 3), torch.zeros(0, 3))

        class Mine(fused.DCLLoss):
            def _loss(self, *arguments):
                return super()._loss(*arguments)

        torch.testing.assert_close(Mine()(*views()), upstream.DCLLoss()(*views()))
    reasons = [record.getMessage().split("because ")[1] for record in caplog.records]
    assert "temperature must be a positive number, got -1.0" in reasons[0]
    assert reasons[1:] == [
        "cross_entropy is not the CrossEntropyLoss of the constructor",
        "the batch is empty",
        "_loss is overridden",
    ]


def test_errors_of_the_constructor():
    for module in (fused, upstream):
        with pytest.raises(ValueError, match="Illegal temperature"):
            module.NTXentLoss(temperature=0.0)


def test_patch(monkeypatch):
    originals = [getattr(upstream, name) for name in NAMES]
    with fused.patch():
        assert [getattr(upstream, name) for name in NAMES] == [getattr(fused, name) for name in NAMES]
    assert [getattr(upstream, name) for name in NAMES] == originals
    monkeypatch.setenv("FUSEDLOSS_DISABLE", "1")
    for name in NAMES:
        same(name, {}, views(), counted=False)


def on_a_rank(rank):
    gathers = {"gather_distributed": True}
    same("NTXentLoss", gathers, views(seed=rank))
    same("NTXentLoss", gathers | {"temperature": 0.1}, views(1, seed=rank))
    same("NTXentLoss", gathers | {"memory_bank_size": (31, 5)}, views(seed=rank), steps=3)
    same("DCLLoss", gathers, views(seed=rank), counted=False)
    same("DCLLoss", {}, views(seed=rank))


def test_on_two_ranks():
    on_ranks(2, on_a_rank)
