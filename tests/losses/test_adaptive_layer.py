"""adaptive_layer and matryoshka_2d: a loss of every layer, against sentence-transformers' own and the formula."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusedloss
from fusedloss.losses.adaptive_layer import WEIGHTINGS

LAYERS, B, D = 4, 6, 8


def columns(count=2, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYERS, B, D)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def formula(loss, stacks, indices, last=1.0, prior=1.0, kl=1.0, T=0.3, weight=lambda i: 1.0):
    """The docstring's, on whole tensors."""
    total = last * loss(*(s[-1] for s in stacks))
    teacher = F.softmax(torch.cat([s[-1] for s in stacks]).detach() / T, dim=1) if T else None
    for i in indices:
        total = total + prior * weight(i) / len(indices) * loss(*(s[i] for s in stacks))
        if T:
            student = F.log_softmax(torch.cat([s[i] for s in stacks]) / T, dim=1)
            total = total + kl * T * F.kl_div(student, teacher, reduction="batchmean")
    return total


def values(function, stacks):
    leaves = [s.clone().requires_grad_() for s in stacks]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def close(found, wanted, **tolerance):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("weighting", [*WEIGHTINGS, lambda i: 0.5 + i])
@pytest.mark.parametrize("indices", [None, [1], [2, 0]])
def test_it_is_the_weighted_sum_of_its_layers(weighting, indices):
    options = {"last_layer_weight": 0.7, "prior_layers_weight": 1.3, "kl_div_weight": 0.4, "kl_temperature": 0.5}
    found = values(
        lambda *s: fusedloss.adaptive_layer(
            fusedloss.info_nce, *s, layer_indices=indices, layer_weighting=weighting, temperature=0.2, **options
        ),
        columns(),
    )
    weight = weighting if callable(weighting) else WEIGHTINGS[weighting]
    loss = lambda x, y: fusedloss.info_nce(x, y, temperature=0.2, backend="reference")
    chosen = range(LAYERS - 1) if indices is None else indices
    close(found, values(lambda *s: formula(loss, s, chosen, 0.7, 1.3, 0.4, 0.5, weight), columns()))


def test_without_prior_layers_it_is_the_last_layers_loss():
    stacks = columns()
    alone = fusedloss.info_nce(stacks[0][-1], stacks[1][-1])
    assert fusedloss.adaptive_layer(fusedloss.info_nce, *stacks, layer_indices=[]) == alone
    assert fusedloss.adaptive_layer(fusedloss.info_nce, *(s[-1:] for s in stacks)) == alone


@pytest.mark.parametrize("switch", [{"kl_temperature": 0.0}, {"kl_div_weight": 0.0}])
def test_the_divergence_can_be_left_out(switch):
    found = values(lambda *s: fusedloss.adaptive_layer(fusedloss.info_nce, *s, **switch), columns())
    loss = lambda x, y: fusedloss.info_nce(x, y, backend="reference")
    close(found, values(lambda *s: formula(loss, s, range(LAYERS - 1), T=0), columns()))


def test_the_last_layer_is_a_teacher_without_gradient():
    """Its gradient is that of its own loss alone."""
    stacks = columns()
    zero = lambda x, y: (x * 0).sum() + (y * 0).sum()
    *_, by_query, by_key = values(lambda *s: fusedloss.adaptive_layer(zero, *s), stacks)
    for gradient in (by_query, by_key):
        assert gradient[-1].abs().max() == 0 < gradient[:-1].abs().amax((1, 2)).min()


def test_extreme_embeddings_keep_a_finite_divergence():
    stacks = [s * 1e4 for s in columns(dtype=torch.float32)]
    found = values(lambda *s: fusedloss.adaptive_layer(fusedloss.info_nce, *s, temperature=1e4), stacks)
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_layers_are_computed_in_fp32(dtype):
    stacks = columns(dtype=dtype)
    run = lambda *s: fusedloss.adaptive_layer(fusedloss.info_nce, *s, normalize=True)
    found, wanted = values(run, stacks), values(run, [s.double() for s in stacks])
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=1e-6)
    eps = torch.finfo(dtype).eps
    close([t.double() for t in found[1:]], wanted[1:], rtol=2 * eps, atol=4 * eps * wanted[1].abs().max().item())


@pytest.mark.parametrize("weights", [None, [1.0, 0.25]])
def test_matryoshka_2d_is_adaptive_layers_of_prefixes(weights):
    """With the divergence of whole embeddings."""
    options = {"dims": (8, 3), "weights": weights}
    found = values(
        lambda *s: fusedloss.matryoshka_2d(fusedloss.info_nce, *s, layer_indices=[0, 2], temperature=0.3, **options),
        columns(),
    )

    chosen = list(zip((8, 3), weights or [1, 1], strict=True))

    def prefixes(x, y):
        pairs = [(w, F.normalize(x[:, :d], dim=1), F.normalize(y[:, :d], dim=1)) for d, w in chosen]
        return sum(w * fusedloss.info_nce(a, b, temperature=0.3, backend="reference") for w, a, b in pairs)

    close(found, values(lambda *s: formula(prefixes, s, [0, 2]), columns()))


def layered_model():
    """An encoder for sentence-transformers' AdaptiveLayerLoss whose layers are the features themselves."""
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.base.modules import Transformer

    class First(Transformer):
        def __init__(self):
            nn.Module.__init__(self)
            self.model = nn.Module()  # what `auto_model` reads
            self.model.config = type("Config", (), {"output_hidden_states": False})()

        def forward(self, features, **_):
            return {
                **features,
                "all_layer_embeddings": features["layers"],
                "token_embeddings": features["layers"][-1],
            }

    class Last(nn.Module):
        def forward(self, features, **_):
            return {**features, "sentence_embedding": features["token_embeddings"]}

    class Model(st.SentenceTransformer):
        def __init__(self):
            nn.Module.__init__(self)
            self.add_module("0", First())
            self.add_module("1", Last())

        def __getitem__(self, i):
            return self._modules[str(i)]

        def get_embedding_dimension(self):
            return D

        def forward(self, features, **_):
            features.update(self[0].forward(features))
            features.update(self[1].forward(features))
            return features

    return Model()


@pytest.mark.parametrize("two_dimensional", [False, True])
@pytest.mark.parametrize("weighting", ["uniform", "log", "linear"])
def test_sentence_transformers_agrees(two_dimensional, weighting):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses

    model = layered_model()
    inner = losses.MultipleNegativesRankingLoss(model)
    options = {"n_layers_per_step": 2, "kl_div_weight": 0.6, "layer_weighting": weighting}
    if two_dimensional:
        upstream = losses.Matryoshka2dLoss(model, inner, [8, 4], n_dims_per_step=-1, **options)
    else:
        upstream = losses.AdaptiveLayerLoss(model, inner, **options)
    random.seed(5)
    drawn = random.sample(range(LAYERS - 1), 2)
    random.seed(5)
    wanted = values(lambda *s: upstream([{"layers": x} for x in s], None), columns())
    ours = fusedloss.matryoshka_2d if two_dimensional else fusedloss.adaptive_layer
    found = values(
        lambda *s: ours(
            fusedloss.multiple_negatives_ranking,
            *s,
            layer_indices=drawn,
            kl_div_weight=0.6,
            layer_weighting=weighting,
            **({"dims": [8, 4]} if two_dimensional else {}),
        ),
        columns(),
    )
    close(found, wanted)


@pytest.mark.parametrize(
    "arguments, options, error, said",
    [
        ([], {}, ValueError, "columns must hold every layer's embeddings, for each argument of the loss, got none"),
        (
            [torch.ones(2, 3)],
            {},
            ValueError,
            r"columns\[0\] must be \[layers, rows, D\] or a sequence of \[rows, D\], got shape \[2, 3\]",
        ),
        ([torch.ones(0, 2, 3)], {}, ValueError, r"columns\[0\] must have at least one layer, got none"),
        (
            [torch.ones(3, 2, 3), torch.ones(2, 2, 3)],
            {},
            ValueError,
            r"columns\[1\] must have 3 layers, like columns\[0\], got 2",
        ),
        (
            [[torch.ones(2, 3), torch.ones(2, 4)]],
            {},
            ValueError,
            r"columns\[0\]\[1\] must have D = 3, like columns\[0\]\[0\], got D = 4",
        ),
        (
            [torch.ones(3, 2, 3)] * 2,
            {"layer_indices": [2]},
            IndexError,
            "layer_indices must be from 0 to 1, before the last of 3 layers, got 2",
        ),
        ([torch.ones(3, 2, 3)] * 2, {"layer_indices": [1, 1]}, ValueError, "distinct"),
        (
            [torch.ones(3, 2, 3)] * 2,
            {"layer_weighting": "cubic"},
            ValueError,
            "layer_weighting must be one of 'uniform', 'log', 'linear', got 'cubic'",
        ),
        (
            [torch.ones(3, 2, 3)] * 2,
            {"kl_temperature": -1.0},
            ValueError,
            "kl_temperature must be a positive number, or 0 for no KL term, got -1.0",
        ),
        (
            [torch.ones(3, 2, 3)] * 2,
            {"last_layer_weight": float("nan")},
            ValueError,
            "last_layer_weight must be a finite number, got nan",
        ),
        ([torch.ones(3, 2, 3)] * 2, {"return_stats": True}, ValueError, "return_stats"),
    ],
)
def test_bad_input_is_named(arguments, options, error, said):
    with pytest.raises(error, match=said):
        fusedloss.adaptive_layer(fusedloss.info_nce, *arguments, **options)
