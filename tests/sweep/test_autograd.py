"""How the losses behave inside autograd: derivatives, repeated backwards, contexts, compilation."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fusedloss
from fusedloss.backends import BACKENDS
from fusedloss.bench.machine import probe
from fusedloss.core.problem import Block, Problem
from fusedloss.sweep.packing import pack

PLAIN = ["dense", "chunked", "reference"]


def leaves(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def all_options(backend):
    """One call per way a loss reaches the sweep, with every differentiable argument; small enough for gradcheck."""
    target, weight = torch.tensor([3, 0, -100, 6, 1]), torch.tensor([0.5, 2.0, 1.0, 0.25, 1.5], dtype=torch.float64)
    bias = torch.tensor([0.3, -0.2, 0.1, -math.inf, 0.0, 0.4, -0.6], dtype=torch.float64)

    def everything(query, key, temperature, offset):
        return fusedloss.info_nce(
            query,
            key,
            target,
            temperature=temperature,
            key_bias=bias + offset,
            weight=weight,
            label_smoothing=0.1,
            reduction="none",
            backend=backend,
        )

    def everything_cosine(query, key, temperature, offset):
        return fusedloss.info_nce(
            query,
            key,
            target,
            temperature=temperature,
            key_bias=bias + offset,
            weight=weight,
            label_smoothing=0.1,
            normalize=True,
            backend=backend,
        )

    def cosine(query, key, temperature):
        return fusedloss.info_nce(query, key, temperature=temperature, normalize=True, backend=backend)

    def itself(x, temperature):
        return fusedloss.info_nce(x, x, torch.tensor([1, 0, 3, 2]), temperature=temperature, backend=backend)

    def clip(image, text, scale):
        return fusedloss.clip(image, text, scale, backend=backend)

    def clip_rows(image, text, scale):
        return fusedloss.clip(image, text, scale, reduction="none", backend=backend)

    def ranking(anchor, positive, hard, harder, scale):
        return fusedloss.multiple_negatives_ranking(anchor, positive, hard, harder, scale=scale, backend=backend)

    def scalar(value):
        return torch.tensor(value, dtype=torch.float64, requires_grad=True)

    return {
        "everything": (everything, [*leaves((5, 3), (7, 3)), scalar(0.7), *leaves((7,))]),
        "everything, cosine": (everything_cosine, [*leaves((5, 3), (7, 3)), scalar(0.7), *leaves((7,))]),
        "cosine": (cosine, [*leaves((4, 3), (6, 3)), scalar(0.3)]),
        "itself": (itself, [*leaves((4, 3)), scalar(0.9)]),
        "clip": (clip, [*leaves((5, 3), (5, 3)), scalar(1.3)]),
        "clip_rows": (clip_rows, [*leaves((5, 3), (5, 3)), scalar(1.3)]),
        "ranking": (ranking, [*leaves((3, 4), (5, 4), (3, 4), (2, 4)), scalar(2.0)]),
    }


@pytest.mark.parametrize("case", list(all_options("chunked")))
@pytest.mark.parametrize("backend", PLAIN)
def test_gradcheck(backend, case):
    function, inputs = all_options(backend)[case]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.lengthy
@pytest.mark.parametrize("case", list(all_options("chunked")))
@pytest.mark.parametrize("backend", PLAIN)
def test_second_derivatives(backend, case):
    function, inputs = all_options(backend)[case]
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_backwards_agree(reduction):
    """The first backward scales the saved gradients in place; the second recomputes them."""
    query, key = leaves((40, 8), (50, 8))
    loss = fusedloss.info_nce(query, key, reduction=reduction, backend="chunked").sum()
    first = torch.autograd.grad(loss * 3, [query, key], retain_graph=True)
    second = torch.autograd.grad(loss * 3, [query, key], retain_graph=True)
    third = torch.autograd.grad(loss, [query, key])
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-16)
        torch.testing.assert_close(a, 3 * c, rtol=1e-12, atol=1e-16)


def test_a_gradient_handed_out_is_not_changed_by_the_next_backward():
    query, key = leaves((6, 4), (6, 4))
    loss = fusedloss.info_nce(query, key, backend="chunked")
    loss.backward(retain_graph=True)
    kept, once = query.grad, query.grad.clone()
    query.grad = None
    loss.backward()
    torch.testing.assert_close(kept, once, rtol=0, atol=0)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient_and_changes_nothing(frozen):
    query, key = leaves((9, 5), (12, 5))
    full = torch.autograd.grad(fusedloss.info_nce(query, key, backend="chunked"), [query, key])
    inputs = [query, key]
    inputs[frozen] = inputs[frozen].detach()
    other = inputs[1 - frozen]
    (alone,) = torch.autograd.grad(fusedloss.info_nce(*inputs, backend="chunked"), [other])
    torch.testing.assert_close(alone, full[1 - frozen], rtol=1e-14, atol=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_value_is_the_same(context):
    query, key = leaves((30, 8), (30, 8))
    for loss in (fusedloss.info_nce, lambda q, k: fusedloss.clip(q, k, 3.0), fusedloss.multiple_negatives_ranking):
        with context():
            value = loss(query, key)
        assert not value.requires_grad
        torch.testing.assert_close(value, loss(query, key).detach(), rtol=1e-14, atol=0)


def test_inputs_are_never_written():
    query, key = leaves((20, 6), (25, 6))
    weight, bias = torch.rand(20), torch.randn(25)
    before = [t.detach().clone() for t in (query, key, weight, bias)]
    fusedloss.info_nce(query, key, weight=weight, key_bias=bias, normalize=True, label_smoothing=0.1).backward()
    for t, was in zip((query, key, weight, bias), before, strict=True):
        assert torch.equal(t, was)


def test_weight_receives_no_gradient():
    query, key = leaves((5, 4), (5, 4))
    weight = torch.rand(5, requires_grad=True)
    fusedloss.info_nce(query, key, weight=weight).backward()
    assert weight.grad is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    query, key = leaves((16, 6), (16, 6))
    tower = torch.nn.Linear(6, 6, dtype=torch.float64)

    def step(q, k):
        return fusedloss.info_nce(tower(q), tower(k), normalize=True, backend="chunked")

    plain = torch.autograd.grad(step(query, key), [query, key])
    again = [t.detach().clone().requires_grad_() for t in (query, key)]
    checkpoint(step, *again, use_reentrant=reentrant).backward()
    for x, wanted in zip(again, plain, strict=True):
        torch.testing.assert_close(x.grad, wanted, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("backend", PLAIN)
def test_autocast_takes_its_dtype_and_returns_fp32(dtype, label_smoothing, backend):
    query, key = leaves((32, 16), (32, 16), dtype=torch.float32)
    options = {"normalize": True, "label_smoothing": label_smoothing, "backend": backend}
    with torch.autocast("cpu", dtype=dtype):
        loss = fusedloss.info_nce(query, key, **options)
        loss.backward()  # also inside the region, where a stray matmul would be cast
    assert loss.dtype == torch.float32 and query.grad.dtype == torch.float32
    cast = [t.detach().to(dtype).requires_grad_() for t in (query, key)]
    wanted = fusedloss.info_nce(*cast, **options)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    if backend == "chunked":  # the reference's own matmuls ran outside, but their backward is in the region
        torch.testing.assert_close(query.grad, cast[0].grad.float(), rtol=0, atol=0)


def test_autocast_leaves_fp64_alone_and_brings_mixed_dtypes_together():
    double = leaves((8, 4), (8, 4))
    single = [t.detach().float() for t in double]
    wanted = fusedloss.info_nce(*double)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fusedloss.info_nce(*double)
        mixed = fusedloss.info_nce(single[0].bfloat16(), single[1])
        assert mixed == fusedloss.info_nce(*single)
        with pytest.raises(TypeError, match=r"key must be torch\.float32, like query, got torch\.float64"):
            fusedloss.info_nce(single[0], double[1])
    assert found.dtype == torch.float64 and found == wanted


def test_second_derivatives_are_exact_under_autocast():
    query, key = leaves((8, 4), (8, 4), dtype=torch.float32)
    loss = fusedloss.info_nce(query, key, backend="chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(loss, query, create_graph=True)[0]
    again = fusedloss.info_nce(query, key, backend="chunked")
    torch.testing.assert_close(found, torch.autograd.grad(again, query)[0], rtol=1e-5, atol=1e-7)


def test_fp16_under_a_loss_scale_keeps_its_gradients():
    """65536 / M enters in fp32: gradients of the mean alone would mostly be below fp16's 6e-8."""
    exact = leaves((256, 16), (256, 16))
    half = [t.detach().half().requires_grad_() for t in exact]
    fusedloss.info_nce(*[h.detach().double().requires_grad_() for h in half], temperature=0.5)
    loss = fusedloss.info_nce(*half, temperature=0.5)
    (loss * 65536).backward()
    again = [h.detach().double().requires_grad_() for h in half]
    fusedloss.info_nce(*again, temperature=0.5, backend="reference").backward()
    for h, e in zip(half, again, strict=True):
        error = (h.grad.double() / 65536 - e.grad).norm() / e.grad.norm()
        assert error < 1e-3, error


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_second_derivatives_of_kernels_are_the_formula_s(backend):
    """What `auto` takes may change with a verdict, and what worked goes on working."""
    query, key = leaves((6, 4), (6, 4), dtype=torch.float32)
    reason = BACKENDS[backend].why_not(probe("cpu"))
    if reason:
        pytest.skip(f"{backend}: {reason}")
    found = []
    for name in (backend, "reference"):
        (gradient,) = torch.autograd.grad(fusedloss.info_nce(query, key, backend=name), query, create_graph=True)
        found.append([gradient, *torch.autograd.grad(gradient.square().sum(), (query, key))])
    torch.testing.assert_close(*found)


# Second derivatives at the edges --------------------------------------------------------------------------------------

ALONE = torch.zeros(3, 4, dtype=torch.bool)  # no column may compete but the target


def without_negatives(backend):
    """Losses of rows that have none: one row, one class, or everything masked. All are 0, and so are derivatives."""
    on = {"backend": backend}
    x, y, key = (torch.randn(n, 4, dtype=torch.float64) for n in (1, 1, 4))
    few, zero = torch.randn(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    target, none = torch.tensor([2, 0, 1]), torch.zeros(1, dtype=torch.long)
    joint = ("query_to_doc", "query_to_query", "doc_to_query")
    return {
        "info_nce": (lambda x: fusedloss.info_nce(x, y, **on), x),
        "info_nce, masked": (lambda x: fusedloss.info_nce(x, key, target, mask=ALONE, **on), few),
        "info_nce, per row": (lambda x: fusedloss.info_nce(x, key, target, mask=ALONE, reduction="none", **on), few),
        "info_nce, keys' bias": (
            lambda x: fusedloss.info_nce(x, y.expand(2, 4), none, key_bias=torch.tensor([0.0, -math.inf]), **on),
            x,
        ),
        "info_nce, smoothed": (lambda x: fusedloss.info_nce(x, y, label_smoothing=0.1, **on), x),
        "clip": (lambda x: fusedloss.clip(x, y, 3.0, **on), x),
        "clip, masked": (lambda x: fusedloss.clip(x, few, 3.0, mask=torch.eye(3).bool(), **on), few + 1),
        "ranking": (lambda x: fusedloss.multiple_negatives_ranking(x, y, **on), x),
        "ranking, joint": (lambda x: fusedloss.multiple_negatives_ranking(x, y, directions=joint, **on), x),
        "gist": (lambda x: fusedloss.gist_embed(x, y, guide=(y, x.detach()), **on), x),
        "nt_xent": (lambda x: fusedloss.nt_xent(x, y, **on), x),
        "decoupled": (lambda x: fusedloss.decoupled_contrastive(x, y, **on), x),
        "sup_con": (lambda x: fusedloss.sup_con(x, zero[:2], **on), few[:2]),
        "sup_con, in": (lambda x: fusedloss.sup_con(x, zero, form="in", **on), few),
        "sup_con, nothing": (lambda x: fusedloss.sup_con(x, torch.arange(3), **on), few),
        "one class": (lambda x: fusedloss.linear_cross_entropy(x, y, zero, **on), few),
        "arcface": (lambda x: fusedloss.arcface(x, zero, y, **on), few),
        "cosface": (lambda x: fusedloss.cosface(x, zero, y, **on), few),
        "proxy_nca": (lambda x: fusedloss.proxy_nca(x, zero, y, **on), few),
        "contrastive_tension_in_batch": (lambda x: fusedloss.contrastive_tension_in_batch(x, y, **on), x),
        "matryoshka": (lambda x: fusedloss.matryoshka(fusedloss.info_nce, x, y, dims=(4, 2), **on), x),
        "circle": (lambda x: fusedloss.circle(x, zero, **on), few),
        "mega_batch_margin": (lambda x: fusedloss.mega_batch_margin(x, x.detach(), **on), x),
        "cosent": (lambda x: fusedloss.cosent(x, few, zero, **on), few + 1),
    }


@pytest.mark.parametrize("case", list(without_negatives("chunked")))
@pytest.mark.parametrize("backend", PLAIN)
def test_second_derivatives_of_rows_without_negatives_are_0(backend, case):
    if (case, backend) == ("cosent", "dense"):
        pytest.skip("cosent has no in-batch similarities")
    function, x = without_negatives(backend)[case]
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    second = torch.autograd.grad(first.sum() + first.square().sum(), x)[0] if first.requires_grad else 0 * x
    # "in" has the mean of the positives inside of the logarithm, which is not constant.
    assert second.isfinite().all() if case == "sup_con, in" else second.abs().max() < 1e-12, second


def far_apart(dtype):
    """Similarities of 1 and 0, 128 times: exp(128) is beyond fp32."""
    return 128.0 * torch.eye(4, dtype=dtype), torch.eye(4, dtype=dtype)


WELL_FITTED = {
    "info_nce": lambda x, y, **on: fusedloss.info_nce(x, y, temperature=1.0, **on),
    "clip": lambda x, y, **on: fusedloss.clip(x, y, 1.0, **on),
    "private": lambda x, y, **on: fusedloss.info_nce(x, y, temperature=1.0, negatives=y.roll(1, 0)[:, None], **on),
    "siglip": lambda x, y, **on: fusedloss.siglip(x, y, 2.0, -128.0, **on),
    "multi_similarity": lambda x, y, **on: fusedloss.multi_similarity(
        torch.cat([x, y]), torch.arange(4).repeat(2), alpha=256.0, beta=256.0, **on
    ),
    "circle": lambda x, y, **on: fusedloss.circle(torch.cat([x, y]), torch.arange(4).repeat(2), **on),
    "proxy_anchor": lambda x, y, **on: fusedloss.proxy_anchor(x, torch.arange(4), y, alpha=256.0, margin=0.4, **on),
    "batch_hard_soft_margin": lambda x, y, **on: fusedloss.batch_hard_soft_margin_triplet(
        torch.cat([x, 2 * x]), torch.arange(4).repeat(2), **on
    ),
}


@pytest.mark.parametrize("case", WELL_FITTED)
@pytest.mark.parametrize("backend", PLAIN)
def test_second_derivatives_of_well_fitted_pairs_are_finite(backend, case):
    """In fp32, as in fp64, whose exponentials hold them."""
    second = {}
    for dtype in (torch.float32, torch.float64):
        x, y = far_apart(dtype)
        x.requires_grad_()
        (first,) = torch.autograd.grad(WELL_FITTED[case](x, y, backend=backend).sum(), x, create_graph=True)
        (second[dtype],) = torch.autograd.grad((first * torch.arange(4.0, dtype=dtype)).sum(), x)
    assert second[torch.float32].isfinite().all()
    # A logit of 256 has half an ulp of 1.5e-5, the relative error of its exponential.
    assert (second[torch.float32] - second[torch.float64]).abs().max() <= 1e-3 * second[
        torch.float64
    ].abs().max() + 1e-38


def test_softplus_keeps_its_digits():
    from fusedloss.core.softmax import softplus

    x = torch.tensor([-math.inf, -700.0, -90.0, -20.0, 0.0, 1.0, 19.0, 25.0, 39.0, 41.0, 700.0], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        own = x.to(dtype).requires_grad_()
        value = softplus(own)
        (first,) = torch.autograd.grad(value.sum(), own, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), own)
        exact = torch.logaddexp(x, torch.zeros_like(x)), x.sigmoid(), x.sigmoid() * (-x).sigmoid()
        for found, wanted in zip((value, first, second), exact, strict=True):
            bound = 4 * torch.finfo(dtype).eps * wanted.clamp(min=1 if found is second else 0) + torch.finfo(dtype).tiny
            assert ((found.detach().double() - wanted).abs() <= bound).all(), (dtype, found, wanted)


@pytest.mark.lengthy
@pytest.mark.parametrize("partition_mode", ["joint", "per_direction"])
@pytest.mark.parametrize("backend", PLAIN)
def test_second_derivatives_of_directions_with_hard_negatives(backend, partition_mode):
    """From document to query the hard negatives are no operand."""

    def loss(anchor, positive, hard):
        return fusedloss.multiple_negatives_ranking(
            anchor,
            positive,
            hard,
            scale=2.0,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode=partition_mode,
            backend=backend,
        )

    assert torch.autograd.gradgradcheck(loss, leaves((3, 4), (3, 4), (3, 4)))


@pytest.mark.parametrize("backend", PLAIN)
def test_second_derivatives_of_one_tensor_in_two_places(backend):
    """Each place has its own share of the gradient, not the whole."""
    (scale,) = leaves(())
    x, y = (t.detach() for t in leaves((4, 3), (4, 3)))
    (z,) = leaves((4, 3))
    for function, leaf in (
        (lambda s: fusedloss.siglip(x, y, s, s, backend=backend), scale),
        (lambda z: fusedloss.proxy_anchor(z, torch.arange(4), z, alpha=3.0, backend=backend), z),
        (lambda z: fusedloss.info_nce(z, z, torch.tensor([1, 2, 3, 0]), backend=backend), z),
    ):
        assert torch.autograd.gradgradcheck(function, leaf)


# torch.func -----------------------------------------------------------------------------------------------------------


def transformable():
    """What a transform may go over: name -> loss, arguments."""
    q, k, own = (torch.randn(n, 4, dtype=torch.float64) for n in (3, 5, 6))
    target, t = torch.tensor([4, 0, 2]), torch.tensor(0.7, dtype=torch.float64)
    labels, on = torch.tensor([0, 0, 1]), {"backend": "reference"}

    def info_nce(q, k, target, t, own):
        return fusedloss.info_nce(q, k, target, temperature=t, negatives=own.reshape(3, 2, 4), **on)

    return {
        "info_nce": (lambda q, k, target, t: fusedloss.info_nce(q, k, target, temperature=t, **on), (q, k, target, t)),
        "info_nce, negatives": (info_nce, (q, k, target, t, own)),
        "batch_hard": (lambda x, y: fusedloss.batch_hard_triplet(x, y, **on), (q, labels)),
        "batch_hard, soft": (lambda x, y: fusedloss.batch_hard_soft_margin_triplet(x, y, **on), (q, labels)),
        "mega_batch": (lambda x, y: fusedloss.mega_batch_margin(x, y, **on), (q, q.flip(0) + 0.1)),
    }


@pytest.mark.parametrize("case", transformable())
def test_transforms_of_the_reference(case):
    """grad, vmap over each argument alone, and jvp."""
    function, arguments = transformable()[case]
    floating = [i for i, a in enumerate(arguments) if a.is_floating_point()]
    wanted = torch.autograd.functional.jacobian(
        lambda *f: function(*(f[floating.index(i)] if i in floating else a for i, a in enumerate(arguments))),
        tuple(arguments[i] for i in floating),
    )
    found = torch.func.grad(function, tuple(floating))(*arguments)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    _, along = torch.func.jvp(
        lambda *f: function(*(f[floating.index(i)] if i in floating else a for i, a in enumerate(arguments))),
        tuple(arguments[i] for i in floating),
        tuple(torch.ones_like(arguments[i]) for i in floating),
    )
    torch.testing.assert_close(along, sum(w.sum() for w in wanted), rtol=1e-12, atol=1e-12)
    for number, a in enumerate(arguments):
        stacked = torch.stack([a, a.flip(0) if a.dim() else 2 * a])
        dims = tuple(0 if i == number else None for i in range(len(arguments)))
        several = torch.func.vmap(function, in_dims=dims)(*arguments[:number], stacked, *arguments[number + 1 :])
        each = [function(*arguments[:number], one, *arguments[number + 1 :]) for one in stacked]
        torch.testing.assert_close(several, torch.stack(each), rtol=1e-12, atol=1e-12)


# torch.compile --------------------------------------------------------------------------------------------------------


@pytest.mark.lengthy
def test_compiles_in_one_graph_without_recompiling_for_another_batch():
    scale = torch.tensor(3.0, requires_grad=True)

    def step(x, y):
        loss = fusedloss.info_nce(x, y, temperature=scale, normalize=True, backend="chunked")
        loss = loss + fusedloss.clip(x, y, scale, backend="chunked")
        rows = fusedloss.multiple_negatives_ranking(x, y, y * 2, reduction="none", backend="chunked")
        return loss + rows.mean()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (64, 48, 130):
        eager_inputs = leaves((rows, 12), (rows, 12), dtype=torch.float32)
        inputs = [t.detach().clone().requires_grad_() for t in eager_inputs]
        wanted = torch.autograd.grad(step(*eager_inputs), [*eager_inputs, scale])
        loss = compiled(*inputs)
        found = torch.autograd.grad(loss, [*inputs, scale])
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.lengthy
@pytest.mark.parametrize("backend", ["dense", "chunked", "triton", "cuda"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_op_meets_torch_librarys_own_checks(backend, per_row, symmetric):
    reason = BACKENDS[backend].why_not(probe("cpu"))
    if reason:
        pytest.skip(f"{backend}: {reason}")
    x, y = leaves((6, 4), (6, 4), dtype=torch.float32)
    scale = torch.tensor(2.0, requires_grad=True)
    problem = Problem(
        (x, y),
        (Block(0, 1),),
        scale,
        torch.arange(6),
        torch.ones(6),
        cosine=True,
        symmetric=symmetric,
        wants_tally=True,
    )
    torch.library.opcheck(torch.ops.fusedloss.sweep, (*pack(problem), backend, per_row, [True] * 3))
