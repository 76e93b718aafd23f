"""torch's own losses: the proposed InfoNCE, and F.linear_cross_entropy under the patch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedloss
from fusedloss.integrations import calls
from fusedloss.integrations import torch as fused

needs_torch = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13 has no such loss")


def dense(query, positive, negative, temperature, reduction):
    """As the proposal has it: logits, and F.cross_entropy."""
    q, p = F.normalize(query, dim=1), F.normalize(positive, dim=1)
    if negative is None:
        return F.cross_entropy(q @ p.T / temperature, torch.arange(len(q)), reduction=reduction)
    z = torch.cat([(q * p).sum(1, keepdim=True), q @ F.normalize(negative, dim=1).T], 1) / temperature
    return F.cross_entropy(z, torch.zeros(len(q), dtype=torch.long), reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("negatives", ["none", "constant", "learned"])
def test_info_nce_is_the_formula(negatives, reduction):
    torch.manual_seed(0)
    q, p, n = (torch.randn(rows, 8, dtype=torch.float64, requires_grad=True) for rows in (5, 5, 9))
    given = {"none": None, "constant": n.detach(), "learned": n}[negatives]
    loss = fused.InfoNCELoss(0.3, reduction)
    found, wanted = loss(q, p, given), dense(q, p, given, 0.3, reduction)
    torch.testing.assert_close(found, wanted)
    inputs = [q, p, n][: 3 if negatives == "learned" else 2]
    for own, other in zip(*(torch.autograd.grad(x.sum(), inputs) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(own, other)
    assert repr(loss) == f"InfoNCELoss(temperature=0.3, reduction={reduction!r})"


def test_info_nce_refuses():
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match="positive_key must have 4 rows"):
        fused.info_nce_loss(x, torch.randn(5, 8))
    with pytest.raises(ValueError, match="negative_keys must have D = 8"):
        fused.info_nce_loss(x, x, torch.randn(5, 7))
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        fused.InfoNCELoss(0.0)


@needs_torch
def test_the_patch_fuses_linear_cross_entropy():
    torch.manual_seed(0)
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    target, probabilities = torch.randint(11, (6,)), torch.rand(6, 11).softmax(1)
    original = F.linear_cross_entropy
    wanted = original(x, w, target, label_smoothing=0.1)
    soft = original(x, w, probabilities)
    before = calls["torch.linear_cross_entropy"]
    with fused.patch() as patch:
        assert F.linear_cross_entropy is fused.linear_cross_entropy and "linear_cross_entropy" in repr(patch)
        found = F.linear_cross_entropy(x, w, target, label_smoothing=0.1)
        module = nn.LinearCrossEntropyLoss(8, 11)
        by_module = module(x.detach(), target)
        assert calls["torch.linear_cross_entropy"] == before + 2
        torch.testing.assert_close(F.linear_cross_entropy(x, w, probabilities), soft)
        assert calls["torch.linear_cross_entropy"] == before + 2
    assert F.linear_cross_entropy is original
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(by_module, module(x.detach(), target))
    for own, other in zip(*(torch.autograd.grad(loss, (x, w)) for loss in (found, wanted)), strict=True):
        torch.testing.assert_close(own, other)


def test_the_patch_replaces_what_a_later_torch_has(monkeypatch):
    def info_nce_loss():
        """torch's."""

    class InfoNCELoss(nn.Module):
        """torch's."""

    monkeypatch.setattr(F, "info_nce_loss", info_nce_loss, raising=False)
    monkeypatch.setattr(nn, "InfoNCELoss", InfoNCELoss, raising=False)
    with fused.patch():
        assert F.info_nce_loss is fused.info_nce_loss and nn.InfoNCELoss is fused.InfoNCELoss
        q = torch.randn(4, 8)
        torch.testing.assert_close(nn.InfoNCELoss(0.5)(q, q), fusedloss.info_nce(q, q, temperature=0.5, normalize=True))
    assert F.info_nce_loss is info_nce_loss and nn.InfoNCELoss is InfoNCELoss


@needs_torch
def test_an_inner_patch_outlives_the_outer():
    original = F.linear_cross_entropy
    outer, inner = fused.patch(), fused.patch()
    outer.undo()
    assert F.linear_cross_entropy is fused.linear_cross_entropy and "linear_cross_entropy" in repr(inner)
    inner.undo()
    assert F.linear_cross_entropy is original
