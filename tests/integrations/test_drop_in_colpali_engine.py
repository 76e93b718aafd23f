"""The drop-ins of colpali-engine's bi-encoders: the library's loss and gradients."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("colpali_engine.loss", reason="needs colpali-engine")

from colpali_engine.loss import bi_encoder_losses as losses

from fusedloss.integrations import calls
from fusedloss.integrations import colpali_engine as fused

pytestmark = pytest.mark.upstream
B, D = 7, 5


def embeddings(*rows):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, D, generator=generator, dtype=torch.float64).requires_grad_() for shape in rows]


def both(name, inputs, *arguments, change=lambda loss: None, **options):
    """Values and gradients of ours and of the library's, and how many calls ran fused."""
    found, before = [], calls.total()
    for library in (fused, losses):
        loss = getattr(library, name)(**options)
        change(loss)
        value = loss(*inputs, *arguments)
        found.append((value.detach(), *torch.autograd.grad(value, inputs)))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)
    return calls.total() - before


@pytest.mark.parametrize("temperature", [0.02, 1.0])
def test_values_and_gradients_are_the_librarys(temperature):
    query, doc, everyone, negatives = embeddings((B,), (B,), (3 * B,), (B, 2))
    assert both("BiEncoderLoss", [query, doc], temperature=temperature) == 1
    assert both("BiEncoderLoss", [query, everyone], B, temperature=temperature) == 1  # of the second of three processes
    assert both("BiPairedEncoderLoss", [query, doc], temperature=temperature) == 1
    assert both("BiNegativeCELoss", [query, doc, negatives], temperature=temperature) == 1
    assert both("BiNegativeCELoss", [query, everyone, negatives], B, temperature=temperature) == 1


def test_what_runs_the_librarys_code():
    query, doc = embeddings((B,), (B,))

    def another_criterion(loss):
        loss.ce_loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

    for name in ("BiEncoderLoss", "BiPairedEncoderLoss"):
        assert both(name, [query, doc], pos_aware_negative_filtering=True) == 0
        assert both(name, [query, doc], change=another_criterion) == 0
        for options, arguments in (({}, (1,)), ({"max_batch_size": B - 1}, ())):
            errors = []
            for library in (fused, losses):
                with pytest.raises(Exception) as raised:
                    getattr(library, name)(**options)(query, doc, *arguments)
                errors.append((raised.type, str(raised.value)))
            assert errors[0] == errors[1]


def test_the_patch_and_back():
    stock = losses.BiEncoderLoss
    with fused.patch():
        assert losses.BiEncoderLoss is fused.BiEncoderLoss
        assert type(losses.BiNegativeCELoss().inner_loss) is fused.BiEncoderLoss
    assert losses.BiEncoderLoss is stock is type(losses.BiNegativeCELoss().inner_loss)
    assert type(fused.BiNegativeCELoss().inner_loss) is fused.BiEncoderLoss
