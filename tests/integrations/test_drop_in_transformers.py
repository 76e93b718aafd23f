"""The drop-ins of transformers' image-text models: the library's loss, gradients and outputs, on tiny models."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

pytest.importorskip("transformers.models.metaclip_2.modeling_metaclip_2", reason="needs transformers 5")

import transformers
from transformers import AutoModel, BertConfig, CLIPVisionConfig, VisionTextDualEncoderConfig

from fusedloss.integrations import calls
from fusedloss.integrations import transformers as fused

pytestmark = pytest.mark.upstream
ROWS, WORDS = 6, 8
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = SIZES | {"image_size": 8, "patch_size": 4, "projection_dim": 8}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 16, "projection_dim": 8, "eos_token_id": 49}
TEXT |= {"bos_token_id": 0, "pad_token_id": 1}
NAMES = [
    "CLIPModel",
    "AltCLIPModel",
    "BlipModel",
    "ChineseCLIPModel",
    "CLIPSegModel",
    "MetaClip2Model",
    "VisionTextDualEncoderModel",
    "SiglipModel",
    "Siglip2Model",
]


def config(name):
    if name == "VisionTextDualEncoderModel":
        bert = BertConfig(**SIZES, vocab_size=50, max_position_embeddings=16)
        return VisionTextDualEncoderConfig.from_vision_text_configs(CLIPVisionConfig(**VISION), bert, projection_dim=8)
    kind = getattr(transformers, f"{name.removesuffix('Model')}Config")
    vision = VISION | {"num_patches": 4} if name == "Siglip2Model" else VISION
    text = TEXT | {"project_dim": 8} if name == "AltCLIPModel" else TEXT
    return kind(text_config=text, vision_config=vision, projection_dim=8)


def build(name, dtype=torch.float64, library=fused):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(library, name)(config(name)).to(dtype)


def batch(name, dtype=torch.float64, rows=ROWS):
    torch.manual_seed(1)
    words = torch.randint(2, 49, (rows, WORDS))
    words[:, -1] = 49
    if name != "Siglip2Model":
        return {"input_ids": words, "pixel_values": torch.randn(rows, 3, 8, 8, dtype=dtype)}
    return {
        "input_ids": words,
        "pixel_values": torch.randn(rows, 4, 48, dtype=dtype),
        "pixel_attention_mask": torch.ones(rows, 4, dtype=torch.int64),
        "spatial_shapes": torch.full((rows, 2), 2),
    }


def run(model, given, **options):
    output = model(**given, return_loss=True, **options)
    output["loss"].backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_loss_gradients_and_outputs_are_the_librarys(name):
    found, wanted = build(name), build(name, library=transformers)
    assert type(found) is not type(wanted)
    before = calls[f"transformers.{name}"]
    (output, grads), (expected, expected_grads) = (run(model, batch(name)) for model in (found, wanted))
    assert calls[f"transformers.{name}"] == before + 1
    assert list(output) == list(expected) and type(output) is type(expected)
    for key in ("loss", "logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        torch.testing.assert_close(output[key], expected[key], rtol=1e-10, atol=1e-12)
    assert grads.keys() == expected_grads.keys() and any("logit_scale" in name for name in grads)
    largest = max(g.abs().max() for g in expected_grads.values())
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[key], rtol=1e-8, atol=float(1e-11 * largest))


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_logits_are_not_rounded_in_16_bits(name):
    """The loss of the embeddings as they are, in float32; the library's is of bfloat16 logits."""
    model, given = build(name, torch.bfloat16), batch(name, torch.bfloat16)
    output, _ = run(model, given)
    text, image = output.text_embeds.double(), output.image_embeds.double()
    z = text @ image.T * model.logit_scale.detach().exp().double()
    if name == "SiglipModel":
        z = z + model.logit_bias.detach().double()
        sign = 2 * torch.eye(ROWS).double() - 1
        exact = -torch.nn.functional.logsigmoid(sign * z).sum(1).mean()
    else:
        target = torch.arange(ROWS)
        exact = (torch.nn.functional.cross_entropy(z, target) + torch.nn.functional.cross_entropy(z.T, target)) / 2
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss.double(), exact, rtol=1e-5, atol=0)


def test_without_a_loss_the_library_runs():
    model, before = build("CLIPModel"), calls.copy()
    assert model(**batch("CLIPModel")).loss is None and calls == before


def test_a_tuple_is_the_librarys(caplog):
    found, wanted = (build("CLIPModel", library=library) for library in (fused, transformers))
    before = calls.copy()
    (own, *_), (theirs, *_) = (m(**batch("CLIPModel"), return_loss=True, return_dict=False) for m in (found, wanted))
    assert torch.equal(own, theirs) and calls == before
    assert "transformers.CLIPModel runs the library's own code, because return_dict is False" in caplog.text


def test_return_loss_by_place_and_switched_off(monkeypatch):
    model, given = build("CLIPModel"), batch("CLIPModel")
    before = calls["transformers.CLIPModel"]
    by_place = model(given["input_ids"], given["pixel_values"], None, None, True)
    assert calls["transformers.CLIPModel"] == before + 1
    monkeypatch.setenv("FUSEDLOSS_DISABLE", "1")
    torch.testing.assert_close(by_place.loss, model(**given, return_loss=True).loss)
    assert calls["transformers.CLIPModel"] == before + 1


def test_batches_that_differ_are_the_librarys_error():
    given = batch("CLIPModel")
    given["pixel_values"] = given["pixel_values"][:4]
    errors = []
    for library in (fused, transformers):
        with pytest.raises(Exception) as raised:
            build("CLIPModel", library=library)(**given, return_loss=True)
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1]


def test_the_patch_reaches_the_auto_classes(tmp_path):
    stock = transformers.CLIPModel
    saved = build("CLIPModel", library=transformers)
    with fused.patch():
        assert transformers.CLIPModel is fused.CLIPModel
        made = AutoModel.from_config(config("CLIPModel"))
        assert type(made) is fused.CLIPModel and made.config.architectures is None
        made.load_state_dict(saved.state_dict())
        made.save_pretrained(tmp_path)
        assert type(AutoModel.from_pretrained(tmp_path)) is fused.CLIPModel
    assert transformers.CLIPModel is stock
    back = AutoModel.from_pretrained(tmp_path)
    assert type(back) is stock and back.config.architectures == ["CLIPModel"]
    assert all(torch.equal(p, q.to(p)) for p, q in zip(back.parameters(), saved.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_the_librarys(name):
    """The Trainer drops inputs that `forward` does not name."""
    ours, theirs = getattr(fused, name), getattr(transformers, name)
    assert issubclass(ours, theirs) and inspect.signature(ours.forward) == inspect.signature(theirs.forward)


class Tagged(torch.Tensor):
    """As libraries have that subclass tensors: no plain one."""


@pytest.mark.parametrize("name", ["CLIPModel", "BlipModel", "SiglipModel"])
def test_the_towers_run_once_where_the_loss_is_the_librarys(name):
    results, before = [], calls.copy()
    for library in (fused, transformers):
        model, seen = build(name, library=library), []
        model.text_model.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        head = model.text_model if name == "SiglipModel" else model.text_projection
        if name == "SiglipModel":
            head = model.text_model.head
        head.register_forward_hook(lambda *given: given[2].as_subclass(Tagged))
        results.append(run(model, batch(name)))
        assert len(seen) == 1
    (found, grads), (wanted, wanted_grads) = results
    assert calls == before and list(found) == list(wanted)
    torch.testing.assert_close(torch.Tensor(found.loss), torch.Tensor(wanted.loss), rtol=1e-12, atol=0)
    for key, grad in grads.items():
        torch.testing.assert_close(torch.Tensor(grad), torch.Tensor(wanted_grads[key]), rtol=1e-8, atol=1e-12)
