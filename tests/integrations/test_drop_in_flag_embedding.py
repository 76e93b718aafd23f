"""The drop-ins of FlagEmbedding's bi-encoders: the library's loss and gradients, on one process and on two."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks
from torch import distributed, nn

pytest.importorskip("FlagEmbedding.finetune.embedder.encoder_only.base", reason="needs FlagEmbedding")

from FlagEmbedding.finetune.embedder.decoder_only import base as decoders
from FlagEmbedding.finetune.embedder.decoder_only import icl
from FlagEmbedding.finetune.embedder.encoder_only import base as encoders

from fusedloss.integrations import FlagEmbedding as fused
from fusedloss.integrations import calls

pytestmark = pytest.mark.upstream
B, G, D = 5, 3, 8
STOCK = {
    "BiEncoderOnlyEmbedderModel": encoders,
    "BiDecoderOnlyEmbedderModel": decoders,
    "BiDecoderOnlyEmbedderICLModel": icl,
}
MODELS = list(STOCK)


class Config:
    hidden_size = D


class Base(nn.Module):
    """Stands in for a transformer: `encode` is replaced below."""

    config = Config()


def build(name, library=fused, **options):
    kind = getattr(library if library is fused else STOCK[name], name)

    class Model(kind):
        def encode(self, features):
            return features

    made = Model(Base(), temperature=0.3, **options)
    return made.train()


def reps(mrl=False, rows=slice(None), groups=G):
    generator = torch.Generator().manual_seed(0)
    q, p = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (B * 2, B * 2 * groups))
    part = slice(None) if rows == slice(None) else slice(rows.start * groups, rows.stop * groups)
    q, p = q[rows].requires_grad_(), p[part].requires_grad_()
    return ([q, q * 2], [p, p * 2], (q, p)) if mrl else (q, p, (q, p))


def run(model, given, **options):
    queries, passages, leaves = given
    loss = model(queries, passages, **options).loss
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def same(found, wanted):
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


TEACHER = torch.randn(2 * B * G, generator=torch.Generator().manual_seed(3)).tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("teacher", [None, TEACHER], ids=["alone", "distilled"])
@pytest.mark.parametrize("mrl", [False, True], ids=["", "mrl"])
def test_loss_and_gradients_are_the_librarys(name, teacher, mrl):
    options = {"use_mrl": True, "mrl_dims": [4, 8]} if mrl else {}
    before = calls[f"FlagEmbedding.{name}"]
    found, wanted = (run(build(name, kind, **options), reps(mrl), teacher_scores=teacher) for kind in (fused, None))
    assert calls[f"FlagEmbedding.{name}"] == before + 1 + mrl
    same(found, wanted)


def test_what_runs_the_librarys_code():
    name = MODELS[0]

    def other_criterion(model):
        model.cross_entropy = nn.CrossEntropyLoss(label_smoothing=0.1)

    def another_distillation(model):
        model.kd_loss_type = "m3_kd_loss"

    for change, teacher in ((other_criterion, None), (another_distillation, TEACHER)):
        results, before = [], calls.copy()
        for library in (fused, None):
            model = build(name, library)
            change(model)
            results.append(run(model, reps(), teacher_scores=teacher))
        assert calls == before
        same(*results)
    before = calls.copy()
    results = [run(build(name, kind), reps(), no_in_batch_neg_flag=True) for kind in (fused, None)]
    assert calls == before  # without in-batch negatives there is no matrix to save
    same(*results)


def test_the_patch_and_back():
    stock = encoders.BiEncoderOnlyEmbedderModel
    with fused.patch():
        assert encoders.BiEncoderOnlyEmbedderModel is fused.BiEncoderOnlyEmbedderModel
        assert encoders.runner.BiEncoderOnlyEmbedderModel is fused.BiEncoderOnlyEmbedderModel
    assert encoders.BiEncoderOnlyEmbedderModel is stock is encoders.runner.BiEncoderOnlyEmbedderModel


def on_a_rank(rank):
    def compare(teacher):
        part = None if teacher is None else teacher[rank * B * G : (rank + 1) * B * G]
        given = reps(rows=slice(rank * B, (rank + 1) * B))
        found = []
        for library in (fused, None):
            model = build(MODELS[0], library, negatives_cross_device=True)
            found.append(run(model, given, teacher_scores=part))
        distributed.barrier()
        return found

    return compare


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(2, on_a_rank)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("teacher", [None, TEACHER], ids=["alone", "distilled"])
def test_across_devices(teacher, two_ranks):
    """Values and each rank's gradients are the library's."""
    for found in two_ranks(teacher):
        same(*found)
