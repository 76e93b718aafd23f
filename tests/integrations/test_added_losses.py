"""SupConLoss and SigLIPLoss, which sentence-transformers and lightly do not have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytestmark = [pytest.mark.upstream, pytest.mark.filterwarnings("ignore")]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def forward(self, features):
        return {"sentence_embedding": self.linear(features["x"])}


def columns(count):
    torch.manual_seed(0)
    return [{"x": torch.randn(10, 8)} for _ in range(count)]


LABELS = torch.arange(10) % 3


def sup_con(x, labels, temperature):
    """Khosla et al.'s L_out."""
    u = F.normalize(x, dim=1)
    own = torch.eye(len(x), dtype=torch.bool)
    log_p = (u @ u.T / temperature).masked_fill(own, -torch.inf).log_softmax(1)
    positive = (labels[:, None] == labels) & ~own
    return -(torch.where(positive, log_p, 0).sum(1) / positive.sum(1)).mean()


def siglip(x, y, scale, bias):
    z = scale * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T + bias
    sign = 2 * torch.eye(len(x)) - 1
    return -F.logsigmoid(sign * z).sum() / len(x)


def test_of_sentence_transformers():
    pytest.importorskip("sentence_transformers")
    from fusedloss.integrations import sentence_transformers as losses

    model, (one, two) = Encoder(), columns(2)
    x, y = model(one)["sentence_embedding"], model(two)["sentence_embedding"]
    loss = losses.SupConLoss(model, temperature=0.2)
    torch.testing.assert_close(loss([one], LABELS), sup_con(x, LABELS, 0.2))
    assert loss.get_config_dict() == {"temperature": 0.2, "form": "out"}
    loss = losses.SigLIPLoss(model, scale=5.0, bias=-2.0)
    found = loss([one, two])
    torch.testing.assert_close(found, siglip(x, y, 5.0, -2.0))
    found.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())
    assert loss.get_config_dict() == pytest.approx({"scale": 5.0, "bias": -2.0, "learnable": True})
    assert not any(
        p.requires_grad for name, p in losses.SigLIPLoss(model, learnable=False).named_parameters(recurse=False)
    )
    assert not {losses.SupConLoss, losses.SigLIPLoss} & set(losses.drop_ins(losses).values())
    with pytest.raises(ValueError, match="sentence_features must hold two columns, got 1"):
        loss([one])
    with pytest.raises(ValueError, match="sentence_features must hold one column"):
        losses.SupConLoss(model)([one, two], LABELS)
    with pytest.raises(ValueError, match="form must be one of"):
        losses.SupConLoss(model, form="mean")


def test_of_lightly():
    pytest.importorskip("lightly")
    from fusedloss.integrations import lightly as losses

    x, y = (torch.randn(10, 6, requires_grad=True) for _ in range(2))
    both = torch.cat([LABELS, LABELS])
    found = losses.SupConLoss(0.2)(x, y, LABELS)
    torch.testing.assert_close(found, sup_con(torch.cat([x, y]), both, 0.2))
    loss = losses.SigLIPLoss(5.0, -2.0)
    found = loss(x, y)
    torch.testing.assert_close(found, siglip(x, y, 5.0, -2.0))
    found.backward()
    assert loss.log_scale.grad != 0 and loss.bias.grad != 0
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        losses.SupConLoss(0.0)
