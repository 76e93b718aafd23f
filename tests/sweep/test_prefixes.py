"""All prefixes in one sweep equal a loop over the dims: losses and gradients, exact in fp64, within budget below."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fusedloss
from fusedloss import testing
from fusedloss.core import softmax
from fusedloss.core.problem import Block, Problem
from fusedloss.sweep import Wants, prefixes
from fusedloss.sweep.prefixes import sweep_prefixes


def loop(operands, blocks, scale, target, weight, dims, dim_weights, admit=None, normalize=F.normalize):
    """The weighted losses, [M], as a user writes them: every prefix cut, normalised and multiplied by itself."""
    losses = 0
    for dim, c in zip(dims, dim_weights, strict=True):
        unit = [normalize(x[:, :dim], dim=1) for x in operands]
        parts = []
        for number, (query, key, bias) in enumerate(blocks):
            z = unit[query] @ unit[key].T * scale
            if bias is not None:
                z = z + bias
            if admit is not None:
                z = z.masked_fill(~admitted(admit, number, z, target), -torch.inf)
            parts.append(z)
        z = torch.cat(parts, 1).masked_fill((weight == 0)[:, None], 0)
        losses = losses + c * weight * softmax.softmax_rows(z, target)
    return losses


def admitted(admit, number, z, target):
    rows, columns = (slice(0, size) for size in z.shape)
    allowed = admit(number, rows, columns)
    allowed = torch.ones_like(z, dtype=torch.bool) if allowed is None else allowed.clone()
    return allowed.scatter_(1, target[:, None], True) if number == 0 else allowed


def value_and_gradients(operands, blocks, scale, target, weight, dims, dim_weights, admit=None):
    """[losses, *operands, scale, *biases] of the loop, through autograd."""
    leaves = [x.detach().clone().requires_grad_() for x in (*operands, scale)]
    biases = [None if b is None else b.detach().clone().requires_grad_() for _, _, b in blocks]
    biased = [(q, k, b) for (q, k, _), b in zip(blocks, biases, strict=True)]
    losses = loop(leaves[:-1], biased, leaves[-1], target, weight, dims, dim_weights, admit)
    wanted = [*leaves, *(b for b in biases if b is not None)]
    found = torch.autograd.grad(losses.sum(), wanted, allow_unused=True, materialize_grads=True)
    return [losses.detach(), *found]


def problem_of(operands, blocks, scale, target, weight, dims, dim_weights):
    blocks = tuple(Block(*block) for block in blocks)
    parts = {"cosine": True, "prefixes": tuple(dims), "prefix_weights": tuple(dim_weights)}
    return Problem(tuple(operands), blocks, scale, target, weight, **parts)


def swept(operands, blocks, scale, target, weight, dims, dim_weights, admit=None, chunk=1024):
    wants = Wants((True,) * len(operands), True, tuple(b is not None for _, _, b in blocks))
    problem = problem_of(operands, blocks, scale, target, weight, dims, dim_weights)
    found = sweep_prefixes(problem, wants, chunk, admit)
    return [found.losses, *found.gradients, found.scale, *(b for b in found.biases if b is not None)]


def assert_close(found, wanted, tolerance=1e-11):
    assert len(found) == len(wanted)
    for out, exact in zip(found, wanted, strict=True):
        assert out.shape == exact.shape and out.dtype == exact.dtype
        assert (out - exact).abs().max() <= tolerance * exact.abs().max().clamp_min(1)


def matrices(*rows, dim=8):
    return tuple(torch.randn(n, dim, dtype=torch.float64) for n in rows)


def case(name):
    """(operands, blocks, target, dims): 20 rows; keyed by what it is about."""
    x, y, negatives = matrices(20, 33, 14)
    target = torch.randint(0, 20, (20,))
    plain = [(0, 1, None)]
    return {
        "one block": ((x, y), plain, target, (2, 4, 8)),
        "descending": ((x, y), plain, target, (8, 4, 2)),
        "ragged": ((x, y), plain, target, (5, 3, 1)),
        "one dim": ((x, y), plain, target, (8,)),
        "shorter than D": ((x, y), plain, target, (3,)),
        "the same dim twice": ((x, y), plain, target, (4, 4, 8)),
        "two blocks": ((x, y, negatives), [(0, 1, None), (0, 2, None)], target, (3, 8)),
        "fewer keys than rows": ((x, y[:7]), plain, target % 7, (3, 8)),
        "one key": ((x, y[:1]), plain, target * 0, (3, 8)),
        "bias": ((x, y), [(0, 1, torch.randn(33, dtype=torch.float64))], target, (3, 8)),
        "bias of one of two": (
            (x, y, negatives),
            [(0, 1, None), (0, 2, torch.randn(14, dtype=torch.float64))],
            target,
            (3, 8),
        ),
        "itself": ((x,), [(0, 0, None)], target, (3, 8)),
        "itself, and more": ((x, y), [(0, 1, None), (0, 0, None)], target, (3, 8)),
        "a key of two blocks": ((x, y), [(0, 1, None), (0, 1, None)], target, (3, 8)),
        "another query": ((x, y, negatives), [(0, 1, None), (3, 2, None)], target, (3, 8)),
    }[name]


CASES = [
    *("one block", "descending", "ragged", "one dim", "shorter than D", "the same dim twice", "two blocks"),
    *("fewer keys than rows", "one key", "bias", "bias of one of two", "itself", "itself, and more"),
    *("a key of two blocks", "another query"),
]


@pytest.fixture(params=["one tile", "many tiles"])
def chunk(request, monkeypatch):
    """Rows a chunk; columns a tile by the same stroke."""
    if request.param == "one tile":
        return 1024
    monkeypatch.setattr(prefixes, "TILE_COLUMNS", 5)
    monkeypatch.setattr(prefixes, "SCORE_ROWS", 3)
    return 7


@pytest.mark.pairwise
@pytest.mark.parametrize("scale", [3.0, 100.0, -7.0])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_loop(name, scale, chunk):
    """Scale 100 searches maxima, 3 needs none; weights of 0 leave rows out, and one is negative."""
    operands, blocks, target, dims = case(name)
    if name == "another query":
        operands = (*operands, torch.randn(20, 8, dtype=torch.float64))
    weight = torch.rand(20, dtype=torch.float64)
    weight[3], weight[19], weight[5] = 0, 0, -0.5
    arguments = operands, blocks, torch.tensor(scale).double(), target, weight, dims, [1.0, 0.3, 0.2][: len(dims)]
    assert_close(swept(*arguments, chunk=chunk), value_and_gradients(*arguments))


def test_negative_and_zero_weights_of_dims(chunk):
    operands, blocks, target, _ = case("one block")
    arguments = (
        operands,
        blocks,
        torch.tensor(5.0).double(),
        target,
        torch.ones(20).double(),
        (8, 5, 2),
        (-1.0, 0.5, 0.0),
    )
    assert_close(swept(*arguments, chunk=chunk), value_and_gradients(*arguments))


@pytest.mark.parametrize("scale", [5.0, 60.0])
def test_masks(scale, chunk):
    """Of what a row may not compete with, nothing remains; a row without negatives loses nothing."""
    operands, blocks, target, dims = case("two blocks")
    masks = [torch.rand(20, 33) < 0.6, torch.rand(20, 14) < 0.5]
    masks[0][4], masks[1][4] = False, False
    admit = lambda block, rows, columns: masks[block][rows, columns]
    arguments = operands, blocks, torch.tensor(scale).double(), target, torch.ones(20).double(), dims, (1.0, 1.0)
    found = swept(*arguments, admit=admit, chunk=chunk)
    assert_close(found, value_and_gradients(*arguments, admit=admit))
    assert found[0][4] == 0 and (found[1][4] == 0).all()
    partial = lambda block, rows, columns: masks[1][rows, columns] if block else None
    assert_close(swept(*arguments, admit=partial, chunk=chunk), value_and_gradients(*arguments, admit=partial))


def test_a_removed_column(chunk):
    (x, y), _, target, dims = case("bias")
    bias = torch.randn(33, dtype=torch.float64)
    bias[[21, 32]] = -torch.inf
    arguments = (x, y), [(0, 1, bias)], torch.tensor(5.0).double(), target, torch.ones(20).double(), dims, (1.0, 0.5)
    found, wanted = swept(*arguments, chunk=chunk), value_and_gradients(*arguments)
    assert_close(found, wanted)
    assert (found[-1][[21, 32]] == 0).all()


def test_zero_rows_and_zero_prefixes(chunk):
    """F.normalize divides them by 1e-12, a constant: their gradients are large, and have no projection."""
    operands, blocks, target, dims = case("one block")
    x, y = operands
    x[2], y[5], y[int(target[0])] = 0, 0, 0
    x[4, :3], y[7, :2] = 0, 0
    arguments = (x, y), blocks, torch.tensor(5.0).double(), target, torch.ones(20).double(), dims, (1.0, 0.5, 0.2)
    found, wanted = swept(*arguments, chunk=chunk), value_and_gradients(*arguments)
    for out, exact in zip(found, wanted, strict=True):
        assert (out - exact).abs().max() <= 1e-11 * exact.abs().max()
    for number in (1, 2):  # and the ordinary rows, beside gradients of 1e12
        small = wanted[number].abs().amax(1) < 1e6
        assert small.sum() > 10
        assert (found[number] - wanted[number])[small].abs().max() < 1e-11


@pytest.mark.parametrize("kernels", ["chunked", "triton", "cuda"])
def test_zero_rows_in_fp16(kernels):
    """The same rule as in the other dtypes: 1e-9 of these gradients is what fp16 holds."""
    x, y = torch.randn(6, 8).half(), torch.randn(6, 8).half()
    x[2], y[4, :4] = 0, 0
    step = lambda x, y, backend=kernels: (
        1e-9 * fusedloss.matryoshka(fusedloss.info_nce, x, y, dims=[8, 4], temperature=1.0, backend=backend)
    )
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    found = torch.autograd.grad(step(*leaves), leaves)
    wide = [t.double().requires_grad_() for t in (x, y)]
    for a, b in zip(found, torch.autograd.grad(step(*wide, backend="reference"), wide), strict=True):
        large = b.abs() > 1e-3
        assert large.sum() >= 4 and (a.double() - b)[large].abs().max() <= 2**-9 * b.abs().max()


def test_a_scale_of_zero():
    operands, blocks, target, dims = case("one block")
    arguments = operands, blocks, torch.tensor(0.0).double(), target, torch.ones(20).double(), dims, (1.0, 0.5, 0.2)
    assert_close(swept(*arguments), value_and_gradients(*arguments))


@pytest.mark.parametrize("scale", [5.0, 60.0])
def test_without_gradients_there_is_no_workspace(scale, chunk):
    operands, blocks, target, dims = case("two blocks")
    arguments = operands, blocks, torch.tensor(scale).double(), target, torch.ones(20).double(), dims, (1.0, 0.5)
    found = sweep_prefixes(problem_of(*arguments), Wants((False,) * 3, False, (False,) * 2), chunk)
    assert found.gradients == (None,) * 3 and found.scale is None and found.biases == (None, None)
    assert_close([found.losses], [loop(*arguments)])


@pytest.mark.parametrize("wanted", ["query", "key", "scale"])
def test_only_what_is_wanted(wanted, chunk):
    operands, blocks, target, dims = case("one block")
    arguments = operands, blocks, torch.tensor(5.0).double(), target, torch.ones(20).double(), dims, (1.0, 0.5, 0.2)
    wants = [wanted == name for name in ("query", "key", "scale")]
    found = sweep_prefixes(problem_of(*arguments), Wants(wants[:2], wants[2], (False,)), chunk)
    results = [*found.gradients, found.scale]
    assert [r is not None for r in results] == wants
    number = wants.index(True)
    assert_close([found.losses, results[number]], [value_and_gradients(*arguments)[i] for i in (0, number + 1)])


def test_no_rows_and_strides():
    x, y = matrices(0, 4)
    one = torch.ones((), dtype=torch.float64)
    index, weight = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    losses, dx, dy, *_ = swept((x, y), [(0, 1, None)], one, index, weight, (8, 2), (1.0, 1.0))
    assert losses.shape == (0,) and dx.shape == (0, 8) and (dy == 0).all()
    operands, blocks, target, dims = case("one block")
    arguments = blocks, one * 5, target, torch.ones(20).double(), dims, (1.0, 0.5, 0.2)
    turned = tuple(x.T.contiguous().T for x in operands)
    assert_close(swept(turned, *arguments), swept(operands, *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", testing.KINDS)
@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
@pytest.mark.parametrize("dims, share", [((64, 32, 16), 1.5), ((64, 16, 5), 2.0)])
def test_error_budget(dims, share, scale, kind, dtype):
    """Against the loop in fp32 on the same inputs; 16-bit inputs are computed in fp32, and come out in it.

    The loop projects each prefix's finished gradient, which takes out that gradient's own error along x; here the
    prefixes share one. It shows where a prefix of a few numbers is a tenth of its row's length.
    """
    x, y = testing.inputs(kind, 300, 400, dims[0], dtype)
    x, y = (3 * x).to(dtype), (0.5 * y).to(dtype)

    def arguments(d):
        weight, blocks = torch.full((300,), 1 / 300).to(d), [(0, 1, None)]
        return (x.to(d), y.to(d)), blocks, torch.tensor(scale).to(d), torch.arange(300), weight, dims, (1.0, 0.5, 0.5)

    exact, eager = (value_and_gradients(*arguments(d)) for d in (torch.float64, torch.float32))
    _, *rest = arguments(torch.float32)
    found = swept((x, y), *rest, chunk=128)
    assert all(out.dtype == torch.float32 for out in found)
    for name, out, base, wanted in zip(("losses", "dx", "dy", "dscale"), found, eager, exact, strict=True):
        spent = testing.budget_share(out, base, wanted, torch.float32)
        assert spent <= share, f"{name}: {spent:.2f} of the budget"


@pytest.mark.parametrize("scale", [20.0, 29.0, 50.0])
def test_well_separated_pairs_keep_their_tiny_losses(scale):
    """Orthonormal pairs in every prefix: sum_k log1p((n_k - 1) exp(-scale)), where a log-sum-exp in fp32 gives 0."""
    x = torch.eye(4).repeat(1, 3)
    found = swept(
        (x, x.clone()), [(0, 1, None)], torch.tensor(scale), torch.arange(4), torch.ones(4), (12, 8, 4), [1.0] * 3
    )
    exact = 3 * torch.log1p(3 * torch.exp(torch.tensor(-scale, dtype=torch.float64)))
    assert torch.allclose(found[0].double(), exact.expand(4), rtol=2e-5, atol=0)
    double = [torch.tensor(scale).double(), torch.arange(4), torch.ones(4).double(), (12, 8, 4), [1.0] * 3]
    wanted = value_and_gradients((x.double(), x.double()), [(0, 1, None)], *double)
    for out, gradient in zip(found[1:3], wanted[1:3], strict=True):
        assert (out - gradient).abs().max() <= 2e-5 * gradient.abs().max()
