"""matryoshka: any loss over nested prefixes, and the losses whose prefixes share one similarity product."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fusedloss
from fusedloss import masks, testing
from fusedloss.backends import SWEEPS
from fusedloss.losses import matryoshka as module

B, D = 13, 9
LABELS = torch.arange(B) % 4


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def loop(loss, *embeddings, dims, weights=None, **options):
    """What the docstring says."""
    prefixes = [[F.normalize(x[:, :dim], dim=1) for x in embeddings] for dim in dims]
    return sum(w * loss(*xs, **options) for w, xs in zip(weights or [1.0] * len(dims), prefixes, strict=True))


@pytest.mark.parametrize("hardness", [None, "all_negatives"], ids=str)
def test_anchors_of_all_processes_are_cut_as_well(hardness):
    """Under hardness by a pass for each prefix, else in one for all."""
    torch.manual_seed(0)
    anchors, positives = (randn(6, D).requires_grad_() for _ in range(2))
    options = {"directions": ALL_DIRECTIONS[:2], "hardness_mode": hardness, "hardness_strength": 2.0}
    ranking = fusedloss.multiple_negatives_ranking
    found = fusedloss.matryoshka(ranking, anchors[:4], positives, dims=(D, 3), anchors=anchors, **options)
    wanted = sum(ranking(anchors[:4, :dim], positives[:, :dim], anchors=anchors[:, :dim], **options) for dim in (D, 3))
    torch.testing.assert_close(found, wanted)
    pairs = (torch.autograd.grad(loss, (anchors, positives)) for loss in (found, wanted))
    for own, other in zip(*pairs, strict=True):
        torch.testing.assert_close(own, other)


def guides(dtype):
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(B, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))


ALL_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
# loss, number of embeddings, options, whether it takes one pass
CASES = {
    "info_nce": (fusedloss.info_nce, 2, {"temperature": 0.3}, True),
    "info_nce, masked": (fusedloss.info_nce, 2, {"mask": masks.same_id(LABELS, LABELS) & masks.not_self(1)}, True),
    "info_nce, smoothed": (fusedloss.info_nce, 2, {"label_smoothing": 0.2}, False),
    "info_nce, score margin": (fusedloss.info_nce, 2, {"mask": masks.score_margin(0.2)}, False),
    "clip": (fusedloss.clip, 2, {"logit_scale": 5.0}, True),
    "clip, masked": (fusedloss.clip, 2, {"logit_scale": 5.0, "mask": masks.same_id(LABELS, 1 - LABELS)}, True),
    "ranking": (fusedloss.multiple_negatives_ranking, 3, {}, True),
    "ranking, all directions": (fusedloss.multiple_negatives_ranking, 3, {"directions": ALL_DIRECTIONS}, True),
    "ranking, per direction": (
        fusedloss.multiple_negatives_ranking,
        3,
        {"directions": ALL_DIRECTIONS[::2], "partition_mode": "per_direction"},
        True,
    ),
    "ranking, hardness": (
        fusedloss.multiple_negatives_ranking,
        3,
        {"hardness_mode": "all_negatives", "hardness_strength": 2.0},
        False,
    ),
    "gist": (fusedloss.gist_embed, 3, {"guide": guides, "temperature": 0.1}, True),
    "nt_xent": (fusedloss.nt_xent, 2, {}, True),
    "another loss": (lambda x, **o: fusedloss.batch_hard_triplet(x, LABELS, **o), 1, {}, False),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("backend", ["dense", "chunked", "reference", "triton", "cuda"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_is_the_weighted_sum_over_normalised_prefixes(case, backend, reduction):
    loss, count, options, _ = CASES[case]
    dtype = torch.float32 if backend in ("triton", "cuda") else torch.float64
    options = {name: value(dtype) if value is guides else value for name, value in options.items()}
    leaves = [randn(B, D, dtype=dtype).requires_grad_() for _ in range(count)]
    options |= {"reduction": reduction, "dims": (4, D, 2), "weights": (1.0, 0.5, 2.0)}
    found = fusedloss.matryoshka(loss, *leaves, backend=backend, **options)
    wanted = loop(loss, *leaves, backend="reference", **options)
    upstream = torch.randn_like(found)
    gradients = [torch.autograd.grad((value * upstream).sum(), leaves) for value in (found, wanted)]
    rtol = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=0)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=rtol * b.abs().max().item())


@pytest.mark.parametrize("case", list(CASES))
def test_one_pass_where_it_can(case, monkeypatch):
    """The loss itself is called for no prefix: one sweep a direction instead of one a prefix."""
    loss, count, options, once = CASES[case]
    options = {name: value(torch.float64) if value is guides else value for name, value in options.items()}
    swept = []
    from fusedloss import sweep
    from fusedloss.backends import dense

    monkeypatch.setattr(dense, "MOST", {})
    original = sweep._prefixed
    monkeypatch.setattr(sweep, "_prefixed", lambda *args: swept.append(1) or original(*args))
    fusedloss.matryoshka(loss, *(randn(B, D) for _ in range(count)), dims=(9, 4), **options)
    two = "clip" in case or "per direction" in case
    assert len(swept) == (0 if not once else 2 if two else 1)


@pytest.mark.parametrize("backend", ["dense", "chunked", "reference"])
def test_learnable_scale_and_bias(backend):
    leaves = [randn(B, D), randn(B + 3, D), torch.tensor(0.4, dtype=torch.float64), randn(B + 3)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def run(function, backend):
        options = {"temperature": leaves[2], "key_bias": leaves[3], "weight": torch.arange(B), "dims": (9, 3)}
        options["weight"] = options["weight"].double()
        return function(fusedloss.info_nce, *leaves[:2], backend=backend, **options)

    found, wanted = run(fusedloss.matryoshka, backend), run(loop, "reference")
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=0)
    for a, b in zip(*(torch.autograd.grad(v, leaves) for v in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["chunked", "dense", "reference"])
def test_a_bias_of_clip_has_a_gradient_of_0(backend):
    """And not none, which a wrapper that waits for every parameter's gradient would wait for."""
    x, y = randn(B, D).requires_grad_(), randn(B, D)
    bias = torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
    loss = fusedloss.matryoshka(fusedloss.clip, x, y, dims=(D, 4), logit_scale=5.0, logit_bias=bias, backend=backend)
    assert torch.autograd.grad(loss, bias)[0] == 0


@pytest.mark.lengthy
def test_inside_torch_compile():
    x, y = (randn(B, D).requires_grad_() for _ in range(2))
    step = lambda x, y: fusedloss.matryoshka(fusedloss.info_nce, x, y, dims=(9, 4))
    compiled = torch.compile(step, fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(x, y), (x, y)) for f in (step, compiled)), strict=True):
        torch.testing.assert_close(a, b)


def test_bf16_prefixes_are_not_rounded_as_unit_vectors():
    x, y = (randn(B, 64).bfloat16() for _ in range(2))
    for options in ({}, {"label_smoothing": 1e-9}):  # one pass, and a loop
        found = fusedloss.matryoshka(fusedloss.info_nce, x, y, dims=(64, 16), **options)
        wanted = loop(fusedloss.info_nce, x.double(), y.double(), dims=(64, 16))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"dims": ()}, "dims must hold at least one number, got none"),
        ({"dims": (4, 4)}, r"dims must be distinct numbers, got \(4, 4\)"),
        ({"dims": (10,)}, "dims must be numbers from 1 to D = 9, got 10"),
        ({"dims": (0,)}, "dims must be numbers from 1 to D = 9, got 0"),
        ({"dims": (4, 2), "weights": (1.0,)}, "weights must hold 2 numbers, one for each of dims, got 1"),
        ({"dims": (4, 2), "weights": (1.0, float("nan"))}, r"weights\[1\] must be a finite number, got nan"),
        ({"dims": (4,), "return_stats": True}, "return_stats"),
        ({"dims": (4,), "temperature": -1.0}, "temperature"),
    ],
)
def test_errors_name_the_argument(options, match):
    with pytest.raises(ValueError, match=match):
        fusedloss.matryoshka(fusedloss.info_nce, randn(B, D), randn(B, D), **options)


def test_the_table_holds_functions_of_the_package():
    assert all(getattr(fusedloss, function.__name__) is function for function in module.PROBLEMS)


def strips_of(backend, monkeypatch):
    """[(dtype, features)] of the statistics that are asked of a backend."""
    seen, original = [], backend.stats_rows

    def stats_rows(strips, *options):
        seen.extend((strip.x.dtype, strip.x.shape[1]) for strip in strips)
        return original(strips, *options)

    monkeypatch.setattr(backend, "stats_rows", stats_rows)
    monkeypatch.setattr(backend, "common_prefixes", lambda problem: ())  # tests/sweep/test_together.py
    return seen


@pytest.mark.parametrize(
    "backend, dtype", [("triton", torch.float16), ("cuda", torch.float16), ("cuda", torch.bfloat16)]
)
@pytest.mark.parametrize("rows", [1, 21])
def test_kernels_multiply_16_bit_embeddings_as_they_are(backend, dtype, rows, monkeypatch):
    """Not as unit vectors in fp32, whose products take 15 times as long on an H200."""
    seen = strips_of(SWEEPS[backend], monkeypatch)
    dims, weights = (16, 40, 8), (1.0, 0.5, -2.0)
    leaves = [3 * torch.randn(rows, 40), torch.randn(rows + 12, 40)]
    given = [x.to(dtype) for x in leaves]
    temperature = torch.tensor(0.125)

    def run(function, name, kind):
        own = [x.to(kind).requires_grad_() for x in given]
        options = {"dims": dims, "weights": weights, "temperature": temperature, "backend": name}
        value = function(fusedloss.info_nce, *own, **options)
        return [value, *torch.autograd.grad(value, own)]

    found, eager, exact = (
        run(fusedloss.matryoshka, backend, dtype),
        run(loop, "dense", torch.float32),
        run(loop, "dense", torch.float64),
    )
    assert set(seen) == {(dtype, dim) for dim in dims}
    for name, out, base, wanted in zip(("value", "dx", "dy"), found, eager, exact, strict=True):
        assert testing.budget_share(out, base, wanted, out.dtype) <= 1, name


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", ["transform", "decoupled", "hardness, all directions"])
def test_kernels_take_options_of_the_loss_alone(backend, name):
    """By a pass for each prefix."""
    loss, options = {
        "transform": (fusedloss.info_nce, {"transform": fusedloss.transforms.focal(2.0)}),
        "decoupled": (fusedloss.clip, {"decoupled": True, "logit_scale": 4.0}),
        "hardness, all directions": (
            fusedloss.multiple_negatives_ranking,
            {"directions": ALL_DIRECTIONS, "hardness_mode": "all_negatives", "hardness_strength": 2.0},
        ),
    }[name]
    leaves = [randn(B, D, dtype=torch.float32).requires_grad_() for _ in range(2)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    found = [fusedloss.matryoshka(loss, *leaves, dims=(5, D), backend=one, **options) for one in (backend, "chunked")]
    wanted = loop(loss, *wide, dims=(5, D), backend="reference", **options)
    exact = torch.autograd.grad(wanted, wide)
    for value in found:
        torch.testing.assert_close(value.double(), wanted, rtol=2e-6, atol=0)
        for a, b in zip(torch.autograd.grad(value, leaves), exact, strict=True):
            assert (a - b).abs().max() <= 2e-5 * b.abs().max()
