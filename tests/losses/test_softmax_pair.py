"""A softmax classifier on pairs of embeddings: sentence-transformers' SoftmaxLoss, and its expression written out."""

from __future__ import annotations

import contextlib
import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import fusedloss
from fusedloss import testing
from fusedloss.rowwise import classes
from fusedloss.rowwise import pair_logits as pairs

# A backend, and the sizes under which it walks: a CPU takes the concatenation of a small batch.
WAYS = {
    "reference": ("reference", {}),
    "chunked, small": ("chunked", {}),
    "chunked": ("chunked", {"SMALL": 0}),
    "chunked, in blocks": ("chunked", {"SMALL": 0, "BLOCK": {"cpu": 16, "cuda": 1 << 26}}),
    "triton": ("triton", {}),
}
WALKS = ["chunked", "chunked, in blocks", "triton"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
PARTS = {"rep": 2, "difference": 1, "multiplication": 1}
SUBSETS = [parts for n in (1, 2, 3) for parts in itertools.combinations(PARTS, n)]
OPTIONS = {
    "default": {},
    "class weights": {"class_weight": torch.tensor([0.5, 2.0, 1.0])},
    "ignored": {"ignore_index": 1},
    "smoothed": {"label_smoothing": 0.2},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "class_weight": torch.tensor([0.5, 2.0, 1.0]), "ignore_index": 1},
}


def identify(value):
    return "+".join(value) if isinstance(value, tuple) else str(value).removeprefix("torch.")


@contextlib.contextmanager
def walking(way):
    """Gives the name of the backend."""
    backend, sizes = WAYS[way]
    with mock.patch.multiple(pairs, **sizes) if sizes else contextlib.nullcontext():
        yield backend


def example(B=9, D=5, C=3, parts=("rep", "difference"), dtype=torch.float64, seed=0, device="cpu"):
    """[u, v, weight, bias] and classes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, D), (B, D), (C, sum(PARTS[part] for part in parts) * D), (C,)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).to(device) for s in shapes]
    return tensors, torch.randint(0, C, (B,), generator=generator).to(device)


def features(u, v, parts):
    made = {"rep": [u, v], "difference": [(u - v).abs()], "multiplication": [u * v]}
    return torch.cat([x for part in PARTS if part in parts for x in made[part]], dim=1)


def written_out(u, v, weight, bias, target, *, concatenation=("rep", "difference"), class_weight=None, **options):
    logits = F.linear(features(u, v, concatenation), weight, bias)
    class_weight = None if class_weight is None else class_weight.to(logits)
    return F.cross_entropy(logits, target, class_weight, **options)


def close(found, wanted, dtype=torch.float64):
    tolerance = TOLERANCE[dtype]
    scale = wanted.abs().nan_to_num(0, 0, 0).max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(
        found.double(), wanted.double(), rtol=tolerance, atol=tolerance * scale + 1e-13, equal_nan=True
    )


def same(tensors, target, way, dtype=torch.float64, **options):
    """Value and gradients of u, v, weight and bias (which may be None) are those of the expression in fp64."""
    given = [t for t in tensors if t is not None]
    optional = lambda t: (*t, None)[:4]
    wide = target.double() if target is not None and target.is_floating_point() else target
    upstream = torch.linspace(0.5, 2, len(given[0]), device=given[0].device)
    weigh = lambda loss: (loss * (upstream.to(loss.dtype) if loss.dim() else 1.3)).sum()
    with walking(way) as backend:
        found = testing.value_and_gradients(
            lambda *t: weigh(fusedloss.softmax_pair(*optional(t), target, backend=backend, **options)), given
        )
    wanted = testing.value_and_gradients(
        lambda *t: weigh(written_out(*optional(t), wide, **options)), [t.double() for t in given]
    )
    for a, b, leaf in zip(found, wanted, [None, *given], strict=True):
        assert a.dtype == (leaf.dtype if leaf is not None else classes.stats_dtype(dtype))
        close(a, b, dtype if leaf is not None else classes.stats_dtype(dtype))


# The value and its gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parts", SUBSETS, ids=identify)
def test_every_concatenation(parts, bias, way):
    dtype = torch.float32 if way == "triton" else torch.float64
    tensors, target = example(parts=parts, dtype=dtype)
    same(tensors if bias else tensors[:3], target, way, dtype, concatenation=parts)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_cross_entropy(name, way):
    dtype = torch.float32 if way == "triton" else torch.float64
    tensors, target = example(dtype=dtype)
    same(tensors, target, way, dtype, **OPTIONS[name])
    if "ignore_index" not in OPTIONS[name]:
        shares = torch.rand(9, 3).to(dtype)
        same(tensors, shares / shares.sum(1, keepdim=True), way, dtype, **OPTIONS[name])


@settings(deadline=None, max_examples=60)
@given(
    B=st.integers(1, 20),
    D=st.integers(1, 20),
    C=st.integers(1, 20),
    parts=st.sampled_from(SUBSETS),
    way=st.sampled_from(list(WAYS)),
    smoothing=st.sampled_from([0.0, 0.1]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    shares=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_sizes(B, D, C, parts, way, smoothing, reduction, shares, seed):
    dtype = torch.float32 if way == "triton" else torch.float64
    tensors, target = example(B, D, C, parts, dtype, seed)
    if shares:
        target = torch.rand(B, C, generator=torch.Generator().manual_seed(seed)).to(dtype)
    same(tensors, target, way, dtype, concatenation=parts, label_smoothing=smoothing, reduction=reduction)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=identify)
@pytest.mark.parametrize("parts", [("rep", "difference"), tuple(PARTS)], ids=identify)
def test_inside_the_error_budget(parts, dtype, way):
    tensors, target = example(33, 21, 3, parts, dtype)
    with walking(way) as backend:
        found = testing.value_and_gradients(
            lambda *t: fusedloss.softmax_pair(*t, target, concatenation=parts, backend=backend), tensors
        )
    eager = testing.value_and_gradients(lambda *t: written_out(*t, target, concatenation=parts), tensors)
    exact = testing.value_and_gradients(
        lambda *t: written_out(*t, target, concatenation=parts), [t.double() for t in tensors]
    )
    for a, b, c, leaf in zip(found, eager, exact, [None, *tensors], strict=True):
        assert a.dtype == (torch.float32 if leaf is None else dtype)
        # Of the loss 2: it is a sum of products with 1/B, whose own rounding and the additions' come on top.
        assert testing.budget_share(a, b, c, dtype) <= (2 if leaf is None else 1)


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_of_another_dtype_than_the_embeddings(way):
    """As under mixed precision: 16-bit embeddings and a classifier in fp32."""
    tensors, target = example(dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        u, v = (t.to(dtype) for t in tensors[:2])
        given = [u, v, *tensors[2:]]
        with walking(way) as backend:
            found = testing.value_and_gradients(
                lambda *t, b=backend: fusedloss.softmax_pair(*t, target, backend=b), given
            )
        wanted = testing.value_and_gradients(lambda *t: written_out(*t, target), [t.double() for t in given])
        for a, b, leaf in zip(found, wanted, [tensors[2], *given], strict=True):
            assert a.dtype == leaf.dtype
            close(a, b, leaf.dtype)


def test_fp64_is_not_the_kernels():
    tensors, target = example()
    for leaves in (tensors, [*(t.float() for t in tensors[:2]), *tensors[2:]]):
        with pytest.raises(fusedloss.UnsupportedError, match=r"no kernel for torch\.float64"):
            fusedloss.softmax_pair(*leaves, target, backend="triton")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("parts", SUBSETS, ids=identify)
def test_without_a_target_it_gives_the_logits(parts, way):
    dtype = torch.float32 if way == "triton" else torch.float64
    tensors, _ = example(parts=parts, dtype=dtype)
    upstream = torch.randn(9, 3, dtype=torch.float64)
    with walking(way) as backend:
        found = testing.value_and_gradients(
            lambda *t: (
                fusedloss.softmax_pair(*t, None, concatenation=parts, backend=backend) * upstream.to(dtype)
            ).sum(),
            tensors,
        )
        logits = fusedloss.softmax_pair(*tensors, None, concatenation=parts, backend=backend)
    wanted = testing.value_and_gradients(
        lambda u, v, w, b: (F.linear(features(u, v, parts), w, b) * upstream).sum(), [t.double() for t in tensors]
    )
    assert logits.shape == (9, 3) and logits.dtype == dtype
    for a, b in zip(found, wanted, strict=True):
        close(a, b, dtype)


@pytest.mark.parametrize("way", WAYS)
def test_the_order_of_the_parts_is_the_columns_however_they_are_listed(way):
    tensors, target = example(parts=tuple(PARTS), dtype=torch.float32)
    with walking(way) as backend:
        found = {
            fusedloss.softmax_pair(*tensors, target, concatenation=parts, backend=backend).item()
            for parts in itertools.permutations(PARTS)
        }
    assert len(found) == 1


@pytest.mark.parametrize("way", WAYS)
def test_gradients_only_of_what_requires_them(way):
    """Each subset of u, v, weight and bias."""
    dtype = torch.float32 if way == "triton" else torch.float64
    parts = tuple(PARTS)
    tensors, target = example(parts=parts, dtype=dtype)
    wanted = testing.value_and_gradients(
        lambda *t: written_out(*t, target, concatenation=parts), [t.double() for t in tensors]
    )[1:]
    for wants in itertools.product([False, True], repeat=4):
        leaves = [t.clone().requires_grad_(want) for t, want in zip(tensors, wants, strict=True)]
        with walking(way) as backend:
            loss = fusedloss.softmax_pair(*leaves, target, concatenation=parts, backend=backend)
            assert loss.requires_grad == any(wants)
            if any(wants):
                loss.backward()
        for leaf, want, b in zip(leaves, wants, wanted, strict=True):
            assert (leaf.grad is not None) == want
            if want:
                close(leaf.grad, b, dtype)


# Degenerate inputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_where_u_is_v_the_difference_has_no_slope(way):
    """As of torch.abs at 0, all over or in some entries."""
    dtype = torch.float32 if way == "triton" else torch.float64
    for parts in (("difference",), ("rep", "difference")):
        (u, v, *rest), target = example(parts=parts, dtype=dtype)
        for other in (u, torch.where(torch.rand(9, 5) < 0.5, u, v)):
            same([u, other, *rest], target, way, dtype, concatenation=parts)


@pytest.mark.parametrize("way", WAYS)
def test_no_pairs(way):
    tensors, target = example(B=0, dtype=torch.float32)
    for reduction in ("mean", "sum", "none"):
        with walking(way) as backend:
            found = testing.value_and_gradients(
                lambda *t, b=backend, r=reduction: fusedloss.softmax_pair(*t, target, reduction=r, backend=b).sum(),
                tensors,
            )
            rows = fusedloss.softmax_pair(*tensors, target, reduction=reduction, backend=backend)
        assert rows.shape == ((0,) if reduction == "none" else ())
        assert all((t == 0).all() for t in found)
        assert fusedloss.softmax_pair(*tensors, None, backend=backend).shape == (0, 3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_mean_of_ignored_rows_is_0(weighted, way):
    tensors, _ = example(dtype=torch.float32)
    options = {"class_weight": torch.ones(3)} if weighted else {}
    with walking(way) as backend:
        found = testing.value_and_gradients(
            lambda *t: fusedloss.softmax_pair(*t, torch.full((9,), -100), backend=backend, **options), tensors
        )
    assert all((t == 0).all() for t in found)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", range(4))
def test_nan_in_nan_out(place, way):
    tensors, target = example(parts=tuple(PARTS), dtype=torch.float32)
    tensors[place].view(-1)[1] = torch.nan
    with walking(way) as backend:
        found = testing.value_and_gradients(
            lambda *t: fusedloss.softmax_pair(*t, target, concatenation=tuple(PARTS), backend=backend), tensors
        )
    assert found[0].isnan() and all(t.isnan().any() for t in found[1:])


@pytest.mark.parametrize("way", WAYS)
def test_logits_of_any_size(way):
    """Embeddings of 1e4: logits far beyond where exp overflows."""
    tensors, target = example(dtype=torch.float32)
    same(
        [1e4 * tensors[0].round(), 1e4 * tensors[1].round(), tensors[2].round(), tensors[3]], target, way, torch.float32
    )


# sentence-transformers ------------------------------------------------------------------------------------------------


class Columns(torch.nn.Module):
    """A model that gives the embeddings it is asked for."""

    device = torch.device("cpu")

    def __init__(self, *columns):
        super().__init__()
        self.columns = torch.nn.ParameterList(columns)

    def forward(self, features):
        return {"sentence_embedding": torch.cat([self.columns[int(i)] for i in features["which"]])}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("parts", SUBSETS, ids=identify)
def test_sentence_transformers(parts, way):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    (u, v, _, _), target = example(dtype=torch.float32)
    model = Columns(u.double(), v.double())
    chosen = {f"concatenation_sent_{part}": part in parts for part in PARTS}
    theirs = losses.SoftmaxLoss(model, embedding_dimension=5, num_labels=3, **chosen).double()
    theirs.classifier.weight.data = theirs.classifier.weight.detach().float().double()
    theirs.classifier.bias.data = theirs.classifier.bias.detach().float().double()
    given = [u, v, theirs.classifier.weight.detach().float(), theirs.classifier.bias.detach().float()]
    dtype = torch.float32 if way == "triton" else torch.float64
    inputs = [{"which": torch.tensor([0])}, {"which": torch.tensor([1])}]
    shares = torch.rand(9, 3)
    for labels in (target, shares / shares.sum(1, keepdim=True)):
        wanted = theirs(inputs, labels.double() if labels.is_floating_point() else labels)
        leaves = [*model.columns, theirs.classifier.weight, theirs.classifier.bias]
        wanted = [wanted.detach(), *torch.autograd.grad(wanted, leaves)]
        with walking(way) as backend:
            found = testing.value_and_gradients(
                lambda *t, y=labels, b=backend: fusedloss.softmax_pair(*t, y, concatenation=parts, backend=b),
                [t.to(dtype) for t in given],
            )
        for a, b in zip(found, wanted, strict=True):
            close(a, b, dtype)
    with walking(way) as backend:
        found = fusedloss.softmax_pair(*(t.to(dtype) for t in given), None, concatenation=parts, backend=backend)
    close(found, theirs(inputs, None)[1].detach(), dtype)


# What is kept, and what is built --------------------------------------------------------------------------------------


def saved_bytes(function):
    saved = {}
    keep = lambda t: saved.setdefault((t.data_ptr(), t.numel()), t)  # a transposed weight is the weight
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function()
    return sum(t.numel() * t.itemsize for t in saved.values())


@pytest.mark.pairwise
@pytest.mark.parametrize("way", [way for way in WAYS if way != "reference"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=identify)
@pytest.mark.parametrize("parts", SUBSETS, ids=identify)
def test_no_more_is_kept_than_by_the_expression(parts, dtype, way):
    tensors, target = example(B=50, D=16, parts=parts, dtype=dtype)
    leaves = [t.requires_grad_() for t in tensors]
    with walking(way) as backend:
        found = saved_bytes(lambda: fusedloss.softmax_pair(*leaves, target, concatenation=parts, backend=backend))
    assert found <= saved_bytes(lambda: written_out(*leaves, target, concatenation=parts))
    if way != "chunked, small":
        own = sum(t.numel() * t.itemsize for t in tensors[:3])
        assert found == own + 50 * 3 * 4  # the gradient of the logits, in fp32


def largest(function):
    """Bytes of the largest tensor that any operation gives, views left out."""

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            found = op(*args, **(kwargs or {}))
            for t in found if isinstance(found, tuple | list) else [found]:
                if isinstance(t, torch.Tensor) and t._base is None:
                    self.most = max(self.most, t.numel() * t.itemsize)
            return found

    with Sizes() as sizes:
        function()
    return sizes.most


@pytest.mark.parametrize("way", WALKS)
def test_the_concatenation_is_never_built(way):
    """Nothing in either pass is larger than u, whose own gradient is that large."""
    parts = tuple(PARTS)
    tensors, target = example(B=200, D=32, parts=parts, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    with walking(way) as backend:
        step = lambda: fusedloss.softmax_pair(*leaves, target, concatenation=parts, backend=backend).backward()
        assert 0 < largest(step) <= tensors[0].numel() * 4
    assert largest(lambda: written_out(*leaves, target, concatenation=parts).backward()) >= 4 * tensors[0].numel() * 4


@pytest.mark.parametrize("way", WALKS)
def test_a_graph_that_is_kept_gives_the_same_gradients_again(way):
    tensors, target = example(dtype=torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    with walking(way) as backend:
        loss = fusedloss.softmax_pair(*leaves, target, backend=backend)
        first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)
            a.zero_()
        again = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(again, second, strict=True))


@pytest.mark.parametrize("way", WALKS)
def test_second_derivatives_are_the_references(way):
    tensors, target = example(dtype=torch.float32 if way == "triton" else torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    with walking(way) as backend:
        for labels in (target, None):
            loss = fusedloss.softmax_pair(*leaves, labels, backend=backend).sum()
            with pytest.raises(
                fusedloss.UnsupportedError,
                match=r"backend must be 'reference' for second derivatives \(create_graph=True\)",
            ):
                torch.autograd.grad(loss, leaves, create_graph=True)
    leaves = [t.double().detach().requires_grad_() for t in leaves]
    second = []
    for f, o in ((fusedloss.softmax_pair, {"backend": "reference"}), (written_out, {})):
        grads = torch.autograd.grad(f(*leaves, target, **o), leaves, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    for a, b in zip(*second, strict=True):
        close(a, b)


def test_a_class_weight_has_no_gradient():
    tensors, target = example()
    weight = torch.rand(3, dtype=torch.float64).requires_grad_()
    assert not fusedloss.softmax_pair(*tensors, target, class_weight=weight).requires_grad


@pytest.mark.parametrize("way", WAYS)
def test_any_strides_and_inputs_that_are_never_written_to(way):
    tensors, target = example(B=12, D=6, parts=tuple(PARTS), dtype=torch.float32)
    layouts = [
        lambda y: y.T.contiguous().T if y.dim() == 2 else torch.stack([y, y * 0], dim=-1)[:, 0],
        lambda y: torch.stack([y, y * 0 + 9], dim=-1)[..., 0],
        lambda y: torch.cat([y * 0 + 9, y], dim=0)[len(y) :],
    ]
    wanted = testing.value_and_gradients(
        lambda *t: written_out(*t, target, concatenation=tuple(PARTS)), [t.double() for t in tensors]
    )
    for i in range(3):
        leaves = [layouts[(i + j) % 3](t).detach().requires_grad_() for j, t in enumerate(tensors)]
        with walking(way) as backend:
            loss = fusedloss.softmax_pair(*leaves, target, concatenation=tuple(PARTS), backend=backend)
            loss.backward()
        close(loss.detach(), wanted[0], torch.float32)
        for leaf, own, b in zip(leaves, tensors, wanted[1:], strict=True):
            close(leaf.grad, b, torch.float32)
            assert torch.equal(leaf, own)


@pytest.mark.parametrize("way", WALKS)
def test_one_tensor_as_u_and_v(way):
    (u, _, weight, bias), target = example(dtype=torch.float32)
    with walking(way) as backend:
        found = testing.value_and_gradients(
            lambda u: fusedloss.softmax_pair(u, u, weight, bias, target, backend=backend), [u]
        )
    wanted = testing.value_and_gradients(
        lambda u: written_out(u, u, weight.double(), bias.double(), target), [u.double()]
    )
    for a, b in zip(found, wanted, strict=True):
        close(a, b, torch.float32)


def test_under_autocast_the_embeddings_may_differ_in_dtype():
    (u, v, weight, bias), target = example(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fusedloss.softmax_pair(u.bfloat16(), v, weight, bias, target)
    assert found.dtype == torch.float32
    close(found, written_out(u, v, weight, bias, target), torch.bfloat16)


def test_it_compiles_without_a_break():
    tensors, target = example()
    torch._dynamo.reset()
    compiled = torch.compile(fusedloss.softmax_pair, fullgraph=True, backend="aot_eager")
    with walking("chunked"):
        found, wanted = (
            testing.value_and_gradients(lambda *t, f=f: f(*t, target), tensors) for f in (compiled, written_out)
        )
    for a, b in zip(found, wanted, strict=True):
        close(a, b)


# Errors ---------------------------------------------------------------------------------------------------------------

U, W, B, T = torch.zeros(4, 3), torch.zeros(2, 9), torch.zeros(2), torch.tensor([0, 1, 1, 0])
BAD = [
    (lambda f: f([1.0], U, W, B, T), TypeError, "u must be a tensor .*got a list"),
    (
        lambda f: f(torch.nn.Linear(1, 1), U, W, B, T),
        TypeError,
        "u must be a tensor of embeddings, got the nn.Module Linear",
    ),
    (
        lambda f: f(U.long(), U.long(), W, B, T),
        TypeError,
        "u must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    (lambda f: f(U[0], U, W, B, T), ValueError, r"u must have two dimensions \[rows, D\], got shape \[3\]"),
    (lambda f: f(U, U[:, :2], W, B, T), ValueError, "v must have D = 3, like u, got D = 2"),
    (lambda f: f(U, U[:2], W, B, T), ValueError, "v must have 4 rows, like u, got 2"),
    (lambda f: f(U, U.double(), W, B, T), TypeError, "v must be torch.float32, like u, got torch.float64"),
    (lambda f: f(U, U, W.long(), B, T), TypeError, r"weight must be a floating tensor \[C, 9\], got torch\.int64"),
    (lambda f: f(U, U, None, B, T), TypeError, r"weight must be a floating tensor \[C, 9\], got None"),
    (
        lambda f: f(U, U, W[:, :6], B, T),
        ValueError,
        r"weight must have shape \[C, 9\], for rep, difference.*, got \[2, 6\]",
    ),
    (
        lambda f: f(U, U, W[:0], B[:0], T),
        ValueError,
        r"weight must have shape \[C, 9\], for rep, difference of D = 3, got \[0, 9\]",
    ),
    (lambda f: f(U, U, W.to("meta"), B, T), ValueError, "weight must be on cpu, like u, got meta"),
    (lambda f: f(U, U, W, B[:1], T), ValueError, r"bias must have shape \[2\], one number per class, got \[1\]"),
    (lambda f: f(U, U, W, B, T[:2]), ValueError, r"target must be int64 \[4\], got shape \[2\]"),
    (lambda f: f(U, U, W, B, [0, 1]), TypeError, r"target must be a tensor of int64 \[4\], got a list"),
    (lambda f: f(U, U, W, B, T.int()), TypeError, r"target must be a tensor of int64 \[4\], got torch.int32"),
    (
        lambda f: f(U, U, W, B, U),
        ValueError,
        r"target must have shape \[4, 2\] if it holds probabilities, got \[4, 3\]",
    ),
    (lambda f: f(U, U, W, B, T + 1), IndexError, r"target\[1\] must be a class from 0 to 1, or -100.*, got 2"),
    (
        lambda f: f(U, U, W, B, T, class_weight=U),
        ValueError,
        r"class_weight must have shape \[2\], one number per class, got \[4, 3\]",
    ),
    (
        lambda f: f(U, U, W, B, T, label_smoothing=2.0),
        ValueError,
        "label_smoothing must be a number from 0 to 1, got 2.0",
    ),
    (lambda f: f(U, U, W, B, T, ignore_index=1.0), TypeError, "ignore_index must be a whole number, got 1.0, a float"),
    (lambda f: f(U, U, W, B, T, reduction="all"), ValueError, "reduction must be one of.*, got 'all'"),
    (
        lambda f: f(U, U, W, B, T, concatenation=()),
        ValueError,
        r"concatenation must be one or more of 'rep'.*, got \(\)",
    ),
    (lambda f: f(U, U, W, B, T, concatenation="rep"), ValueError, "concatenation must be one or more of.*, got 'rep'"),
    (
        lambda f: f(U, U, W, B, T, concatenation=("sum",)),
        ValueError,
        r"concatenation must be one or more of 'rep', 'difference', 'multiplication', got \('sum',\)",
    ),
    (lambda f: f(U, U, W, B, T, backend="fast"), ValueError, "backend must be one of.*, got 'fast'"),
    (lambda f: f(U, U, W, B, T, backend="cuda"), fusedloss.UnsupportedError, "no kernel for this loss"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[str(i) for i in range(len(BAD))])
def test_errors_name_the_argument_and_what_it_needs(call, error, message):
    with pytest.raises(error, match=message):
        call(fusedloss.softmax_pair)


# GPU ------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=identify)
@pytest.mark.parametrize("parts", SUBSETS, ids=identify)
def test_on_a_gpu(parts, dtype, way):
    for B, D, C in ((333, 77, 3), (65, 768, 40)):
        tensors, target = example(B, D, C, parts, dtype, device="cuda")
        same([tensors[0], tensors[1], tensors[2] / D**0.5, tensors[3]], target, way, dtype, concatenation=parts)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_nothing_is_read_back_from_a_gpu(backend):
    tensors, target = example(64, 32, dtype=torch.float32, device="cuda")
    leaves = [t.requires_grad_() for t in tensors]
    fusedloss.softmax_pair(*leaves, target, backend=backend).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fusedloss.softmax_pair(*leaves, target, backend=backend).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
