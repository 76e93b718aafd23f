"""The drop-ins for open_clip: its losses' values and gradients, at every option, on one rank and on two."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from ranks import on_ranks
from torch.nn import functional as F

pytest.importorskip("open_clip")
import open_clip.factory
from open_clip import loss as upstream

from fusedloss.integrations import _drop_in, calls
from fusedloss.integrations import open_clip as fused

pytestmark = pytest.mark.upstream

ROWS, DIM = 11, 6
NAMES = ("ClipLoss", "SigLipLoss", "CoCaLoss", "DistillClipLoss")


def features(rows=ROWS, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        F.normalize(torch.randn(rows, DIM, generator=generator, dtype=dtype), dim=1).requires_grad_() for _ in range(2)
    ]


def scalar(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def outcome(loss, arguments):
    """Values and gradients."""
    values = loss(**arguments)
    values = list(values.values()) if isinstance(values, dict) else values
    values = list(values) if isinstance(values, tuple | list) else [values]
    wanted = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    total = sum((k + 1) * value for k, value in enumerate(values))
    return [*values, *torch.autograd.grad(total, wanted, allow_unused=True)]


def same(name, arguments, options=(), counted=None, tolerance=1e-10):
    options = dict(options)
    if name == "CoCaLoss":
        options = {"caption_loss_weight": 2.0, "clip_loss_weight": 0.5} | options
    before = calls[f"open_clip.{name}"]
    found = outcome(getattr(fused, name)(**options), arguments)
    if counted is not None:
        assert (calls[f"open_clip.{name}"] > before) == counted
    wanted = outcome(getattr(upstream, name)(**options), arguments)
    for a, b in zip(found, wanted, strict=True):
        # The bias of a softmax has gradient 0, which upstream rounds.
        a, b = (torch.zeros(()) if x is None else x for x in (a, b))
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def arguments_of(name, dtype=torch.float64, rows=ROWS):
    image, text = features(rows, dtype)
    given = {"image_features": image, "text_features": text, "logit_scale": scalar(7.5, dtype)}
    if name == "SigLipLoss":
        given["logit_bias"] = scalar(-3.0, dtype)
    if name == "CoCaLoss":
        torch.manual_seed(1)
        labels = torch.randint(0, 9, (rows, 5))
        given |= {"logits": torch.randn(rows, 5, 9, dtype=dtype, requires_grad=True), "labels": labels}
    if name == "DistillClipLoss":
        teachers = [x.detach() for x in features(rows, dtype, seed=1)]
        given |= dict(dist_image_features=teachers[0], dist_text_features=teachers[1], dist_logit_scale=20.0)
    return given


@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name, output_dict):
    same(name, arguments_of(name) | {"output_dict": output_dict}, counted=True)
    ours, theirs = (
        getattr(module, name)(**({"caption_loss_weight": 1.0, "clip_loss_weight": 1.0} if name == "CoCaLoss" else {}))(
            **arguments_of(name), output_dict=True
        )
        for module in (fused, upstream)
    )
    assert list(ours) == list(theirs) and all(value.shape == () for value in ours.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_batches(name, rows):
    same(name, arguments_of(name, rows=rows), counted=True)


def test_scales_and_biases():
    for name in NAMES:
        given = arguments_of(name)
        for scale in (100.0, -2.0, scalar([14.0]), scalar(0.5, torch.float32), scalar(0.0)):
            same(name, given | {"logit_scale": scale}, counted=True, tolerance=1e-7 if scale == 0.5 else 1e-10)
    for bias in (-10.0, scalar(1.0), scalar([2.0]), None):
        same("ClipLoss", arguments_of("ClipLoss") | {"logit_bias": bias}, counted=True)
        same("SigLipLoss", arguments_of("SigLipLoss") | {"logit_bias": bias}, counted=True)
    same("DistillClipLoss", arguments_of("DistillClipLoss") | {"dist_logit_scale": torch.tensor(100.0).double()})


def test_captions():
    given = arguments_of("CoCaLoss")
    for options in ({"pad_id": 3}, {"pad_id": -100}, {"clip_loss_weight": 0}, {"caption_loss_weight": 0.0}):
        same("CoCaLoss", given, options)
    padded = given | {"labels": torch.zeros_like(given["labels"])}
    assert outcome(fused.CoCaLoss(1.0, 1.0), padded)[1].isnan()  # the mean of nothing, as torch has it
    before = calls["open_clip.CoCaLoss.caption_loss"]
    same("CoCaLoss", given | {"logits": given["logits"].detach().transpose(1, 2).contiguous().transpose(1, 2)})
    assert calls["open_clip.CoCaLoss.caption_loss"] == before + 1
    ours = fused.CoCaLoss(1.0, 1.0)
    ours.caption_loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    theirs = upstream.CoCaLoss(1.0, 1.0)
    theirs.caption_loss = ours.caption_loss
    torch.testing.assert_close(ours(**given), theirs(**given), rtol=1e-10, atol=1e-10)
    assert calls["open_clip.CoCaLoss.caption_loss"] == before + 1


@pytest.mark.parametrize("name", NAMES)
def test_fp32_is_as_near_to_fp64(name):
    given = arguments_of(name, torch.float32, 64)
    wide = {
        k: v.detach().double().requires_grad_(v.requires_grad)
        if isinstance(v, torch.Tensor) and v.is_floating_point()
        else v
        for k, v in given.items()
    }
    options = {"caption_loss_weight": 2.0, "clip_loss_weight": 0.5} if name == "CoCaLoss" else {}
    for a, b in zip(
        outcome(getattr(fused, name)(**options), given),
        outcome(getattr(upstream, name)(**options), wide),
        strict=True,
    ):
        assert a.dtype == torch.float32 and (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_gives_fp32(name):
    options = {"caption_loss_weight": 2.0, "clip_loss_weight": 0.5} if name == "CoCaLoss" else {}
    given = arguments_of(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(getattr(fused, name)(**options), given)
        wanted = outcome(getattr(upstream, name)(**options), given)
    assert found[0].dtype == torch.float32
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0.05, atol=0.05)


# What training scripts and subclasses rely on -------------------------------------------------------------------------


def test_the_labels_are_cached():
    for cache in (False, True):
        ours, theirs = fused.ClipLoss(cache_labels=cache), upstream.ClipLoss(cache_labels=cache)
        for loss in (ours, theirs):
            loss(**arguments_of("ClipLoss"))
        assert ours.prev_num_logits == theirs.prev_num_logits and list(ours.labels) == list(theirs.labels)


def test_logits_and_targets_are_there():
    image, text = features()
    for module in (fused, upstream):
        logits, _ = module.ClipLoss().get_logits(image, text, 2.0)
        assert logits.shape == (ROWS, ROWS) and module.ClipLoss().get_ground_truth(image.device, 3).tolist() == [
            0,
            1,
            2,
        ]


def test_unknown_arguments():
    """Those of other versions in constructors; whatever a model returns in calls."""
    for name in ("ClipLoss", "DistillClipLoss"):
        getattr(fused, name)(use_horovod=False, chunk_size=4)(**arguments_of(name), extra=1)
    fused.SigLipLoss(chunk_size=4, use_horovod=False)(**arguments_of("SigLipLoss"), extra=1)
    fused.CoCaLoss(1.0, 1.0, chunk_size=4)(**arguments_of("CoCaLoss"), logit_bias=1)
    for name in NAMES:
        with pytest.raises(TypeError, match="local_los"):
            getattr(fused, name)(local_los=True)
        theirs = inspect.signature(getattr(upstream, name).forward).parameters
        ours = inspect.signature(getattr(fused, name).forward).parameters
        assert list(ours)[:-1] == list(theirs) and [p.default for p in ours.values()][:-1] == [
            p.default for p in theirs.values()
        ]


def test_reasons_are_told(caplog, monkeypatch):
    monkeypatch.setattr(_drop_in, "_warned", set())

    class Mine(fused.ClipLoss):
        def get_logits(self, *arguments, **more):
            return super().get_logits(*arguments, **more)

    given, (image, text) = arguments_of("ClipLoss"), features()
    with caplog.at_level(logging.WARNING, logger="fusedloss"):
        torch.testing.assert_close(Mine()(**given), upstream.ClipLoss()(**given))
        assert fused.ClipLoss()(image[:0], text[:0], 1.0).isnan()
        assert fused.ClipLoss()(image, text, torch.tensor(torch.inf).double()).isnan()
        learns = arguments_of("DistillClipLoss")
        learns["dist_image_features"].requires_grad_()
        same("DistillClipLoss", learns, counted=False)
        for loss in (fused.ClipLoss(), upstream.ClipLoss()):
            with pytest.raises(RuntimeError, match="same dtype"):
                loss(image, text.float(), 1.0)
    reasons = [record.getMessage().split("because ")[1] for record in caplog.records]
    assert reasons[:2] == ["get_logits is overridden", "the batch is empty"]
    assert (
        "logit_scale must be a finite number, got inf" in reasons[2] and reasons[3] == "the teacher requires gradients"
    )
    assert "dtype" in reasons[4] or "float32" in reasons[4]


def test_nan_is_nan():
    for name in NAMES:
        given = arguments_of(name)
        with torch.no_grad():
            given["image_features"][2] = torch.nan
        options = {"caption_loss_weight": 1.0, "clip_loss_weight": 1.0} if name == "CoCaLoss" else {}
        assert outcome(getattr(fused, name)(**options), given)[0].isnan()


def test_patch(monkeypatch):
    originals = [getattr(upstream, name) for name in NAMES]
    with fused.patch():
        for name in NAMES:
            assert getattr(upstream, name) is getattr(open_clip.factory, name) is getattr(fused, name)
    assert [getattr(upstream, name) for name in NAMES] == originals
    monkeypatch.setenv("FUSEDLOSS_DISABLE", "1")
    with fused.patch():
        assert [getattr(upstream, name) for name in NAMES] == originals
    for name in NAMES:
        same(name, arguments_of(name), counted=False)


def test_the_training_script_gets_them():
    from types import SimpleNamespace

    args = dict(distill=False, model="ViT-B-32", siglip=False, local_loss=False, gather_with_grad=False)
    args |= dict(rank=0, world_size=1, horovod=False, loss_dist_impl=None)
    args |= dict(coca_caption_loss_weight=2.0, coca_contrastive_loss_weight=1.0)
    chosen = {"ClipLoss": {}, "SigLipLoss": {"siglip": True}, "CoCaLoss": {"model": "coca_ViT-B-32"}}
    with fused.patch():
        for name, changed in (chosen | {"DistillClipLoss": {"distill": True}}).items():
            assert type(open_clip.factory.create_loss(SimpleNamespace(**args | changed))) is getattr(fused, name)


# Two ranks ------------------------------------------------------------------------------------------------------------

CASES = [
    ("ClipLoss", {"local_loss": local, "gather_with_grad": grad}) for local in (False, True) for grad in (False, True)
]
CASES += [("SigLipLoss", {"dist_impl": kind}) for kind in ("bidir", "shift", "reduce", "gather")]
CASES += [("DistillClipLoss", {"gather_with_grad": True}), ("DistillClipLoss", {"local_loss": True})]
CASES += [("CoCaLoss", {"gather_with_grad": True})]


def on_a_rank(rank):
    for name, options in CASES:
        given = arguments_of(name)
        given |= dict(zip(("image_features", "text_features"), features(seed=10 + rank), strict=True))
        if name == "ClipLoss":
            given["logit_bias"] = scalar(-1.0)
        fuses = not (name == "DistillClipLoss" and options.get("local_loss"))
        same(name, given, options | {"rank": rank, "world_size": 2}, counted=fuses)


def test_on_two_ranks():
    on_ranks(2, on_a_rank)
