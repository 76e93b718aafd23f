"""The matrix: every backend x epilogue x shape x dtype, values and all gradients inside the error budget against fp64.

A backend that is added to `backends.BACKENDS` is covered by adding its name here; a problem that it says it cannot run
is shown as skipped, with its reason.
"""

from __future__ import annotations

import pytest
import torch
from grids import DEVICES

import fusedloss
from fusedloss import sweep, testing
from fusedloss.backends import BACKENDS
from fusedloss.core.numerics import stats_dtype
from fusedloss.core.problem import Block, Problem

SHAPES = {  # (M, N, D): why
    "aligned": (64, 64, 64),
    "ragged": (37, 53, 29),
    "one row": (1, 167, 64),
    "one column": (1, 1, 8),
    "one dimension": (33, 40, 1),
    "wide rows": (21, 130, 131),
    "several chunks": (150, 160, 24),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# The kernels have no fp64.
RUNS = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
    for backend in ("reference", "dense", "chunked", "triton", "cuda")
    for dtype in DTYPES
    if backend in ("reference", "dense", "chunked") or dtype != torch.float64
]


def hard(key):
    """Nine hard negatives: linear in the keys, and no multiple of any of them."""
    return key.roll(1, dims=1)[:9] * 1.5


EPILOGUES = {
    "info_nce": (
        lambda q, k, s, **o: fusedloss.info_nce(q, k, temperature=1 / s, **o),
        lambda q, k, s: testing.eager_info_nce(q, k, 1 / s),
    ),
    "info_nce cosine": (
        lambda q, k, s, **o: fusedloss.info_nce(q, k, temperature=1 / s, normalize=True, **o),
        lambda q, k, s: testing.eager_info_nce(q, k, 1 / s, normalize=True),
    ),
    "clip": (
        lambda q, k, s, **o: fusedloss.clip(q, k[: len(q)], s, **o),
        lambda q, k, s: testing.eager_clip(q, k[: len(q)], s),
    ),
    "clip cosine": (
        lambda q, k, s, **o: fusedloss.clip(q, k[: len(q)], s, normalize=True, **o),
        lambda q, k, s: testing.eager_clip(q, k[: len(q)], s, normalize=True),
    ),
    "ranking": (
        lambda q, k, s, **o: fusedloss.multiple_negatives_ranking(q, k, hard(k), scale=s, **o),
        lambda q, k, s: testing.eager_multiple_negatives_ranking(q, k, hard(k), scale=s),
    ),
}


COSINE = ("info_nce cosine", "clip cosine", "ranking")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several row chunks and column tiles at tens of rows, so that merging and accumulation are exercised."""
    from fusedloss.backends import chunked

    monkeypatch.setattr(sweep.chunks, "chunk_rows", lambda M, *_: min(M, 32))
    monkeypatch.setattr("fusedloss.backends.dense.MOST", {})
    monkeypatch.setattr(sweep.chunks, "STATS_ROWS", {"cpu": 32, "cuda": 32})
    monkeypatch.setattr(sweep.chunks, "CONVERTED_COLUMNS", 48)
    monkeypatch.setattr(chunked.tiles, "TILE_COLUMNS", 48)


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("epilogue", list(EPILOGUES))
@pytest.mark.parametrize("backend, dtype", RUNS)
@pytest.mark.parametrize("device", DEVICES)
def test_inside_the_error_budget(device, backend, epilogue, dtype, shape):
    rows, columns, dim = SHAPES[shape]
    ours, eager = EPILOGUES[epilogue]
    query, key = (x.to(device) * 1.3 for x in testing.inputs("random", rows, columns, dim, dtype, seed=rows))
    scale = torch.tensor(7.0, dtype=stats_dtype(dtype), device=device)
    skip_if_unsupported(backend, query)
    query, key = in_two_dimensions(query, key, epilogue)
    found = testing.value_and_gradients(lambda *t: ours(*t, backend=backend), [query, key, scale])
    with torch.autocast(device, enabled=False):
        baseline = testing.value_and_gradients(eager, [query, key, scale])
    oracle = testing.value_and_gradients(eager, [t.double() for t in (query, key, scale)])
    for name, out, base, exact in zip(("loss", "dquery", "dkey"), found, baseline, oracle, strict=False):
        if dtype == torch.float64:  # as exact as the oracle: their difference says nothing about either
            torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-13)
            continue
        share = testing.budget_share(out, base, exact, dtype)
        assert share <= 1, f"{name}: {share:.2f} of the budget"
    precision = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 1e-2)
    bound = precision * scale_bound(query.double(), key.double(), scale.double(), epilogue)
    assert (found[3].double() - oracle[3]).abs() <= bound + 1e-14


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("epilogue", COSINE)
@pytest.mark.parametrize("chunks", ["several", "one"])
@pytest.mark.parametrize("backend", ["dense", "chunked", "triton", "cuda"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_scale_known_beforehand(monkeypatch, device, backend, chunks, epilogue, dtype, shape):
    """A number as scale bounds cosine logits: one fused sweep, and stored exponentials where all of them fit."""
    from fusedloss import sweep

    if chunks == "one":
        monkeypatch.setattr(sweep.chunks, "chunk_rows", lambda M, *_: M)
        monkeypatch.setattr("fusedloss.backends.dense.MOST", {})
    rows, columns, dim = SHAPES[shape]
    ours, eager = EPILOGUES[epilogue]
    query, key = (x.to(device) * 1.3 for x in testing.inputs("random", rows, columns, dim, dtype, seed=rows))
    skip_if_unsupported(backend, query)
    query, key = in_two_dimensions(query, key, epilogue)
    found = testing.value_and_gradients(lambda *t: ours(*t, 7.0, backend=backend), [query, key])
    baseline = testing.value_and_gradients(lambda *t: eager(*t, 7.0), [query, key])
    oracle = testing.value_and_gradients(lambda *t: eager(*t, 7.0), [query.double(), key.double()])
    for name, out, base, exact in zip(("loss", "dquery", "dkey"), found, baseline, oracle, strict=True):
        share = testing.budget_share(out, base, exact, dtype)
        assert share <= 1, f"{name}: {share:.2f} of the budget"


def in_two_dimensions(query, key, epilogue):
    """A cosine in one dimension is 1 or -1 and has no gradient to compare."""
    if query.shape[1] == 1 and epilogue in COSINE:
        return [torch.nn.functional.pad(x, (0, 1), value=0.5) for x in (query, key)]
    return query, key


def scale_bound(query, key, scale, epilogue):
    """`sum |p_ij (sim_ij - sim_it)|` over all directions: what rounding of the scale's gradient is measured against."""
    if epilogue == "ranking":
        key = torch.cat([key, hard(key)])
    if epilogue in COSINE:
        query, key = (torch.nn.functional.normalize(x, dim=1) for x in (query, key))
    symmetric = epilogue.startswith("clip")
    if symmetric:
        key = key[: len(query)]
    sim = query @ key.T
    total = 0
    for part in (sim, sim.T) if symmetric else (sim,):
        p = (part * scale).softmax(dim=1)
        total = total + (p * (part - part.diagonal()[:, None])).abs().sum() / len(part)
    return total / 2 if symmetric else total


def skip_if_unsupported(backend, x):
    scale = torch.ones((), dtype=stats_dtype(x.dtype), device=x.device)
    rows = torch.arange(x.shape[0], device=x.device)
    problem = Problem((x, x), (Block(0, 1),), scale, rows, torch.ones_like(rows, dtype=scale.dtype))
    reason = BACKENDS[backend].why_not(problem)
    if reason:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton", "cuda"])
@pytest.mark.parametrize("layout", ["transposed", "strided rows", "strided columns", "offset"])
def test_any_strides(backend, layout):
    query, key = testing.inputs("random", 20, 25, 12, seed=3)
    skip_if_unsupported(backend, query)
    wanted = testing.value_and_gradients(lambda q, k: fusedloss.info_nce(q, k, backend="chunked"), [query, key])

    def laid_out(x):
        if layout == "transposed":
            return x.T.contiguous().T
        if layout == "strided rows":
            return torch.stack([x, x * 0 + 9], dim=1).flatten(0, 1)[::2]
        if layout == "strided columns":
            return torch.stack([x, x * 0 + 9], dim=2).flatten(1, 2)[:, ::2]
        return torch.cat([torch.full((len(x), 1), 9.0), x], dim=1)[:, 1:]

    leaves = [laid_out(x).detach().requires_grad_() for x in (query, key)]
    assert all(torch.equal(a, b) for a, b in zip(leaves, (query, key), strict=True))
    loss = fusedloss.info_nce(*leaves, backend=backend)
    found = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton", "cuda"])
def test_runs_are_equal_bit_for_bit(backend):
    query, key = testing.inputs("random", 70, 90, 33)
    skip_if_unsupported(backend, query)
    scale = torch.tensor(9.0)
    runs = [
        testing.value_and_gradients(lambda q, k, s: fusedloss.info_nce(q, k, temperature=1 / s, backend=backend), t)
        for t in 2 * [[query, key, scale]]
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_auto_takes_the_first_that_can_and_catches_nothing(monkeypatch):
    query, key = testing.inputs("random", 8, 8, 4)
    monkeypatch.setattr(BACKENDS["dense"], "MOST", {})  # which otherwise takes so few rows
    called = []
    original = BACKENDS["chunked"].stats_rows
    monkeypatch.setattr(BACKENDS["chunked"], "stats_rows", lambda *args: called.append(1) or original(*args))
    fusedloss.info_nce(query, key)
    assert called

    def fail(*args):
        raise RuntimeError("a fault of the backend")

    monkeypatch.setattr(BACKENDS["chunked"], "stats_rows", fail)
    with pytest.raises(RuntimeError, match="a fault of the backend"):
        fusedloss.info_nce(query, key)


def test_the_environment_overrides_auto_only(monkeypatch):
    query, key = testing.inputs("random", 8, 8, 4)
    monkeypatch.setenv("FUSEDLOSS_BACKEND", "cuda")
    with pytest.raises(
        fusedloss.UnsupportedError,
        match=r"FUSEDLOSS_BACKEND=cuda cannot .*cuda: .*triton: .*chunked: .*reference: .*; unset FUSEDLOSS_BACKEND",
    ):
        fusedloss.info_nce(query, key)
    fusedloss.info_nce(query, key, backend="chunked")


def test_what_the_environments_backend_has_no_kernel_for_goes_to_auto(monkeypatch):
    query, key = testing.inputs("random", 8, 8, 4)
    monkeypatch.setenv("FUSEDLOSS_BACKEND", "cuda")  # none for elements, pairs, lists and classes, whatever the machine
    assert fusedloss.mse(query, key) == fusedloss.mse(query, key, backend="chunked")
    for loss in (fusedloss.cosent, fusedloss.cosine_similarity):
        assert loss(query, key, torch.ones(8)).isfinite()
    assert fusedloss.list_net(query, key).isfinite()
    assert fusedloss.cross_entropy(query, torch.zeros(8).long()).isfinite()
    with pytest.raises(fusedloss.UnsupportedError, match=r"^backend='cuda' cannot run this loss. cuda: .*no kernel"):
        fusedloss.mse(query, key, backend="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off")
def test_a_dtype_without_kernels_goes_to_auto_where_the_backend_runs(monkeypatch):
    query, key = (x.double() for x in testing.inputs("random", 8, 8, 4))
    monkeypatch.setenv("FUSEDLOSS_BACKEND", "triton")
    for loss in (fusedloss.info_nce, fusedloss.mse):
        assert loss(query, key) == loss(query, key, backend="chunked")
        with pytest.raises(fusedloss.UnsupportedError, match=r"^backend='triton' .* no kernel for torch.float64"):
            loss(query, key, backend="triton")
    # One that runs nothing here is not passed over.
    monkeypatch.setattr(BACKENDS["triton"], "why_not_on", lambda dtype, device: "no such card")
    for loss in (fusedloss.info_nce, fusedloss.mse):
        with pytest.raises(fusedloss.UnsupportedError, match=r"^FUSEDLOSS_BACKEND=triton cannot .* no such card"):
            loss(query, key)


def test_unsupported_is_a_not_implemented_error():
    assert issubclass(fusedloss.UnsupportedError, NotImplementedError)


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", ["dense", "chunked", "triton", "cuda"])
@pytest.mark.parametrize("norm", [0.003, 1.0, 300.0])
@pytest.mark.parametrize("weight", [1e-4, 1.0, 5.0])
def test_fp16_keeps_its_range_whatever_the_norms_and_weights(backend, norm, weight):
    """dz goes through an fp16 workspace: short rows (large 1/norm) and weights above 2 must not overflow it."""
    query, key = (norm * x for x in testing.inputs("random", 40, 50, 24, torch.float16))
    skip_if_unsupported(backend, query)

    def rows(q, k, backend):
        options = {"weight": torch.full((40,), weight), "normalize": True, "reduction": "sum"}
        return fusedloss.info_nce(q, k, backend=backend, **options)

    found = testing.value_and_gradients(lambda q, k: 64 * norm * rows(q, k, backend), [query, key])
    wanted = testing.value_and_gradients(
        lambda q, k: 64 * norm * rows(q, k, "reference"), [query.double(), key.double()]
    )
    for a, b in zip(found, wanted, strict=True):
        assert ((a.double() - b).norm() / b.norm()) < 5e-3


# The rest of the family -----------------------------------------------------------------------------------------------
# Against eager as users write it; their own files hold every option. These run on a GPU, too.


def cosines(x, y):
    return torch.nn.functional.normalize(wide(x), dim=1) @ torch.nn.functional.normalize(wide(y), dim=1).T


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def cross_entropy(z, target, dropped):
    dropped = dropped & (target[:, None] != torch.arange(z.shape[1], device=z.device))
    return torch.nn.functional.cross_entropy(z.masked_fill(dropped, -torch.inf), target)


def rows_of(x):
    return torch.arange(len(x), device=x.device)


def ids(x, modulus=7):
    return rows_of(x) % modulus


def eager_masked(q, k, s):
    return cross_entropy(cosines(q, k) * s, rows_of(q), ids(q)[:, None] == ids(k))


def eager_gist(q, k, s):
    g = cosines(q.detach(), k.detach())
    threshold = g.diagonal()[:, None] - 0.1
    sets = [(q, k), (q, q), (k, k)]
    z = torch.cat([cosines(*pair) for pair in sets], dim=1) * s
    dropped = torch.cat([cosines(*(x.detach() for x in pair)) > threshold for pair in sets], dim=1)
    return cross_entropy(z, rows_of(q), dropped)


def eager_nt_xent(q, k, s):
    u = torch.cat([q, k])
    return cross_entropy(cosines(u, u) * s, rows_of(u).roll(len(q)), torch.eye(len(u), device=u.device) > 0)


def eager_sup_con(q, k, s):
    u = torch.cat([q, k])
    own = torch.eye(len(u), device=u.device) > 0
    positive = (ids(u)[:, None] == ids(u)) & ~own
    z = (cosines(u, u) * s).masked_fill(own, -torch.inf)
    log_p = (z - z.logsumexp(1, keepdim=True)).masked_fill(~positive, 0)
    counted = positive.any(1)
    return -(log_p.sum(1) / positive.sum(1).clamp(min=1))[counted].sum() / counted.sum().clamp(min=1)


def eager_siglip(q, k, s):
    z = wide(q @ k.T) * s - 1.0
    return -torch.nn.functional.logsigmoid(z * (2 * torch.eye(len(q), device=q.device) - 1)).sum() / len(q)


def eager_joint(q, k, s):
    own = torch.eye(len(q), device=q.device) > 0
    parts = [(cosines(q, k), ~own & own), (cosines(q, q), own), (cosines(k, q), ~own & own), (cosines(k, k), own)]
    z, dropped = (torch.cat(side, dim=1) for side in zip(*parts, strict=True))
    return cross_entropy(z * s, rows_of(q), dropped)


ALL_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
FAMILY = {
    "masked": (
        lambda q, k, s, **o: fusedloss.info_nce(
            q, k, temperature=1 / s, normalize=True, mask=fusedloss.masks.same_id(ids(q), ids(k)), **o
        ),
        eager_masked,
    ),
    "gist": (
        lambda q, k, s, **o: fusedloss.gist_embed(q, k, guide=(q, k), temperature=1 / s, margin=0.1, **o),
        eager_gist,
    ),
    "nt_xent": (lambda q, k, s, **o: fusedloss.nt_xent(q, k, temperature=1 / s, **o), eager_nt_xent),
    "sup_con": (
        lambda q, k, s, **o: fusedloss.sup_con(torch.cat([q, k]), ids(torch.cat([q, k])), temperature=1 / s, **o),
        eager_sup_con,
    ),
    "siglip": (lambda q, k, s, **o: fusedloss.siglip(q, k, s, -1.0, **o), eager_siglip),
    "joint": (
        lambda q, k, s, **o: fusedloss.multiple_negatives_ranking(q, k, scale=s, directions=ALL_DIRECTIONS, **o),
        eager_joint,
    ),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", ["ragged", "one row", "several chunks"])
@pytest.mark.parametrize("loss", list(FAMILY))
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("backend, dtype", RUNS)
@pytest.mark.parametrize("device", DEVICES)
def test_the_family_inside_the_error_budget(device, backend, learnable, loss, dtype, shape):
    rows, _, dim = SHAPES[shape]
    ours, eager = FAMILY[loss]
    query, key = (x.to(device) * 1.3 for x in testing.inputs("random", rows, rows, dim, dtype, seed=rows))
    skip_if_unsupported(backend, query)
    scale = torch.tensor(7.0, dtype=stats_dtype(dtype), device=device) if learnable else 7.0
    found = testing.value_and_gradients(lambda *t: ours(*t, scale, backend=backend), [query, key])
    baseline = testing.value_and_gradients(lambda *t: eager(*t, 7.0), [query, key])
    oracle = testing.value_and_gradients(lambda *t: eager(*t, 7.0), [query.double(), key.double()])
    for name, out, base, exact in zip(("loss", "dquery", "dkey"), found, baseline, oracle, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(out, exact, rtol=1e-11, atol=1e-12)
            continue
        share = testing.budget_share(out, base, exact, dtype)
        assert share <= 1, f"{name}: {share:.2f} of the budget"


# Gradients by a temperature or a scale --------------------------------------------------------------------------------


def eager_decoupled(q, k, s):
    u, n = torch.cat([q, k]), len(q)
    z, target = cosines(u, u) * s, torch.arange(2 * n, device=u.device).roll(n)[:, None]
    others = z.scatter(1, target, -torch.inf).masked_fill(torch.eye(2 * n, device=u.device) > 0, -torch.inf)
    return (others.logsumexp(1) - z.gather(1, target)[:, 0]).mean()


def eager_in_both_directions(q, k, s):
    z = cosines(q, k) * s
    return (cross_entropy(z, rows_of(q), z > torch.inf) + cross_entropy(z.T, rows_of(q), z > torch.inf)) / 2


OF_A_SCALE = {
    "info_nce": (
        EPILOGUES["info_nce cosine"][0],
        lambda q, k, s: torch.nn.functional.cross_entropy(cosines(q, k) * s, rows_of(q)),
    ),
    "clip": (EPILOGUES["clip cosine"][0], eager_in_both_directions),
    "decoupled": (
        lambda q, k, s, **o: fusedloss.decoupled_contrastive(q, k, temperature=1 / s, **o),
        eager_decoupled,
    ),
    **FAMILY,
}
SHAPES_OF_LOGITS = {"gist": (1, 3), "joint": (1, 4), **dict.fromkeys(("nt_xent", "sup_con", "decoupled"), (2, 2))}
DRAWS = [(kind, scale, seed) for kind in testing.KINDS for scale in (7.0, 30.0) for seed in range(3)]


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", ["reference", "dense", "chunked", "triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", OF_A_SCALE)
def test_gradients_by_a_scale_are_within_their_condition(loss, dtype, backend):
    """Sums that cancel: of a single draw, eager's error may be anything, and is no bound."""
    ours, eager = OF_A_SCALE[loss]
    rows, columns = SHAPES_OF_LOGITS.get(loss, (1, 1))
    for kind, value, seed in DRAWS if backend in ("reference", "dense", "chunked") else DRAWS[::7]:
        query, key = testing.inputs(kind, 40, 40, 24, dtype, seed=seed)
        skip_if_unsupported(backend, query)
        scale = torch.tensor(value, requires_grad=True)
        (found,) = torch.autograd.grad(ours(query, key, scale, backend=backend), scale)
        # One scale an entry: the gradient by it is the entry's term.
        each = torch.full((40 * rows, 40 * columns), value, dtype=torch.float64, requires_grad=True)
        (terms,) = torch.autograd.grad(eager(query.double(), key.double(), each), each)
        share = testing.condition_share(found, terms.sum(), terms, value)
        assert share <= 1, f"{kind}, {value}, {seed}: {share:.2f} of the bound"


# Roundings of 16-bit gradients ----------------------------------------------------------------------------------------

CLASSES = torch.arange(300) % 47
OF_A_MEAN = {
    "linear_cross_entropy": lambda x, y, **o: fusedloss.linear_cross_entropy(x, y, CLASSES, **o),
    "linear_cross_entropy, weighted": lambda x, y, **o: fusedloss.linear_cross_entropy(
        x, y, CLASSES, weight=torch.linspace(0.5, 2, 320), **o
    ),
    "info_nce": lambda x, y, **o: fusedloss.info_nce(x, y, CLASSES, temperature=1.0, **o),
    "clip": lambda x, y, **o: fusedloss.clip(x, y[:300], 1.0, **o),
    "siglip": lambda x, y, **o: fusedloss.siglip(x, y, 1.0, -3.0, **o),
    "in_batch_margin_ranking": lambda x, y, **o: fusedloss.in_batch_margin_ranking(x, y, similarity="dot", **o),
    "multi_similarity": lambda x, y, **o: fusedloss.multi_similarity(torch.cat([x, y]), torch.arange(620) % 50, **o),
    "proxy_anchor": lambda x, y, **o: fusedloss.proxy_anchor(x, CLASSES, y, **o),
}


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", OF_A_MEAN)
def test_a_means_gradients_in_bf16_are_rounded_once(name, narrow, monkeypatch):
    """Their number is no power of 2, by which a division after the rounding would be exact.

    Where a CPU multiplies bf16, the workspace, its rows and what torch.mm returns are rounded as well: it has no
    other way to multiply them, and fp32 products take 1.8 times as long.
    """
    monkeypatch.setattr(sweep.gradients, "_cpu_multiplies_bf16", lambda: narrow)
    tensors = [torch.randn(300, 64).bfloat16(), (torch.randn(320, 64) / 8).bfloat16()]
    found = testing.value_and_gradients(lambda *t: OF_A_MEAN[name](*t, backend="chunked"), tensors)
    exact = testing.value_and_gradients(
        lambda *t: OF_A_MEAN[name](*t, backend="reference"), [t.double() for t in tensors]
    )
    for a, b in zip(found[1:], exact[1:], strict=True):
        once = (b.bfloat16().double() - b).norm()
        assert (a.double() - b).norm() <= 1.1 * (4**0.5 if narrow else 1) * once
