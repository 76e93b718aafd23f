"""Rows of a run in fp64: what is planted is found, honest runs are not accused. Here "the device" is the CPU."""

from __future__ import annotations

import functools
import logging
import os
import random
import re
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss
from fusedloss import backends, sweep, testing
from fusedloss.backends import reference
from fusedloss.core.mask import Compare, Guide, Mask
from fusedloss.core.problem import Block, Fold, Margin, Problem, Ranks
from fusedloss.sweep import audit, packing
from fusedloss.trust import ask, families, verdicts
from fusedloss.trust.verdicts import FAILED, PROVED, Verdict

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there the device is a GPU, and Triton compiles")

CPU = torch.device("cpu")
NAMES = {f"triton {family} fp32" for family in ("rows", "stats", "exp", "grad")}


@pytest.fixture(autouse=True)
def proved(tmp_path, monkeypatch):
    """`auto` has Triton's kernels first, as on a GPU, and all are proved; every call is audited."""
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setenv("FUSEDLOSS_VERIFY", "off")
    monkeypatch.setenv("FUSEDLOSS_AUDIT", "1")
    monkeypatch.delenv("FUSEDLOSS_BACKEND", raising=False)
    monkeypatch.setitem(backends.AUTO, "cpu", ("triton", "chunked", "reference"))
    ask.forget()
    audit.forget()
    names = [verdicts.name_of("triton", family, "fp32") for family in families.of_backend("triton")]
    ask.learn(CPU, dict.fromkeys(names, Verdict(PROVED, 1)))
    yield
    ask.forget()
    audit.forget()


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(backend="auto", loss=fusedloss.info_nce, **options):
    """[loss, gradients] of a few rows."""
    query, key = draws(9, 5).requires_grad_(), draws(9, 5, seed=1).requires_grad_()
    value = loss(query, key, temperature=0.5, backend=backend, **options)
    return [value.detach(), *torch.autograd.grad(value.sum(), (query, key))]


def failed():
    return {name for name, verdict in verdicts.read(CPU).verdicts.items() if verdict.state == FAILED}


# Faults ---------------------------------------------------------------------------------------------------------------


def plant(monkeypatch, what):
    """In Triton's kernels: one element of the losses, or of a query's gradient."""
    module = backends.triton
    if what == "loss":
        settle = module.settle

        def off(*args, **options):
            found = settle(*args, **options)
            found.loss[3] *= 1.001
            return found

        monkeypatch.setattr(module, "settle", off)
    else:
        finish = module.finish

        def off(total, over_l, scale, gain, x, factor, out):
            finish(total, over_l, scale, gain, x, factor, out)
            out[3, 2] = {"gradient": out[3].abs().amax() * 1.01, "nan": torch.nan}[what]

        monkeypatch.setattr(module, "finish", off)


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("loss", {}),
        ("loss", {"normalize": True}),
        ("gradient", {}),
        ("gradient", {"normalize": True}),
        ("nan", {"reduction": "none"}),
    ],
    ids=str,
)
def test_a_fault_is_found_at_the_next_audited_call(what, options, monkeypatch, caplog):
    plant(monkeypatch, what)
    run(**options)
    if options != {"reduction": "none"}:  # its backward is a call, too
        assert not failed() and not caplog.records
    run(**options)
    assert failed() == (NAMES if options.get("normalize") else NAMES - {"triton exp fp32"})
    found, wanted = run(**options), run("reference", **options)  # elsewhere, and right
    torch.testing.assert_close(found, wanted)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    text = record.getMessage()
    assert record.name == "fusedloss" and "Please report" in text
    for part in ("device: ", "torch: ", "backend: triton, fp32", "M, N, D: (9, 9, 5), torch.float32", "marked failed"):
        assert part in text
    worst = float(re.search(r"loss ([0-9.einf+-]+), " if what == "loss" else r"gradient ([0-9.einf+-]+) ", text)[1])
    assert worst > audit.MISS


# Honest runs ----------------------------------------------------------------------------------------------------------


KINDS = ("plain", "symmetric", "itself", "blocks", "masks", "sigmoid")


def honest(seed):
    """A problem drawn at random, and what kind it is of."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    M, N, D = draw.choice([1, 2, 7, 40, 90]), draw.choice([2, 9, 70, 150]), draw.choice([1, 3, 16, 65])
    cosine = draw.random() < 0.6
    kind = KINDS[seed % len(KINDS)]
    if kind in ("symmetric", "itself"):
        N = M = max(M, 2)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    def whole(limit, count):
        return torch.randint(limit, (count,), generator=g)

    x, y = normal(M, D), normal(N, D)
    shared = min(M, N)
    if draw.random() < 0.5:  # trained: each row's target is near
        y[:shared] = x[:shared] + draw.choice([1e-3, 0.1]) * y[:shared]
    if draw.random() < 0.3:  # clusters, whose keys nearly cancel
        y += 5 * normal(1, D)
    length = draw.choice([1.0, 1e-3, 30.0]) if cosine or dtype != torch.float16 else 1.0
    x, y = (length * x).to(dtype), y.to(dtype)
    scale = draw.choice([1.0, 20.0, 100.0, 1000.0]) if cosine else draw.choice([0.05, 1.0, 14.0])
    bound = scale if draw.random() < 0.5 else None
    options = {"cosine": cosine, "scale_bound": bound}
    weight = torch.where(normal(M) > 1.5, 0, torch.rand(M, generator=g) / M)
    masks = (
        Mask(dense=torch.rand(M, N, generator=g) < 0.5),
        Mask(compare=(Compare(whole(4, M), whole(4, N), False),)),
        Mask(compare=(Compare(whole(3, M), whole(3, N), True),)),
    )
    mask = draw.choice(masks) if kind == "masks" or (kind == "symmetric" and seed % 4) else Mask()
    operands, blocks, target = (x, y), (Block(0, 1, mask=mask),), whole(N, M)
    if kind == "symmetric":
        target, options["symmetric"] = torch.arange(M), True
    elif kind == "itself":
        operands, target = (x,), (torch.arange(M) + 1) % M
        blocks = (Block(0, 0, mask=Mask(skip=torch.arange(M))),)
    elif kind == "blocks":
        blocks = (Block(0, 1, bias=normal(N) * 3), Block(0, 2))
        operands = (x, y, normal(draw.choice([1, 33]), D).to(dtype))
    elif kind == "sigmoid":
        labels = draw.choice([None, (whole(5, M), whole(5, N))])
        options["fold"] = Fold("sigmoid", labels=labels, scalars=(torch.tensor(-10.0),))
    if kind not in ("symmetric", "sigmoid") and draw.random() < 0.5:  # what losses have together
        parts = ({"label_smoothing": 0.1}, {"softcap": 20.0}, {"z_loss": 1e-3})
        given = draw.sample(parts, draw.randint(1, 3)) if draw.random() < 0.8 else [{"decoupled": True}]
        for part in given:
            options |= part
    return Problem(operands, blocks, torch.tensor(scale), target, weight, **options), kind


def swept(problem):
    scalars = () if problem.fold is None else (False,) * len(problem.fold.scalars)
    wants = sweep.Wants((True,) * len(problem.operands), False, (False,) * len(problem.blocks), scalars)
    result = sweep.run(problem, backends.chunked, wants)
    return result.rows, list(result.operands)


def largest(seeds, rows=None):
    """The largest share of the budget among honest runs."""
    found = 0.0
    for seed in seeds:
        problem, kind = honest(seed)
        assert audit.auditable(problem), kind
        count, g = random.Random(seed).choice([1, 2, 64]), torch.Generator().manual_seed(seed)
        some = torch.randint(problem.rows, (count,), generator=g)  # not in order: whatever is of a row is looked up
        found = max(found, *audit.shares(problem, *swept(problem), some if rows is None else rows).tolist())
    return found


def test_honest_runs_do_not_miss():
    assert largest(range(48)) < 1


def test_honest_bent_logits_do_not_miss():
    """Where tanh is flat no derivative is left, and a logit of 20 is rounded all the same, as is `1 - tanh^2`."""
    rows, eps = torch.arange(40), torch.finfo(torch.float32).eps
    x, weight = draws(40, 1).sign(), torch.full((40,), 1 / 40)
    problem = Problem((x, x.clone()), (Block(0, 1),), torch.tensor(1000.0), rows, weight, softcap=20.0)
    losses, (gradient, _) = swept(problem)
    rounded = losses + 20 * eps / 40, [gradient + eps / 2 * 1000 / 40, None]
    assert audit.shares(problem, *rounded, rows).max() < 1


def test_the_budget():
    """That of `testing.budget_share`, but for what the condition of each row adds, and what eager does not have."""
    exact = draws(8, 3).double()
    eager, out = exact + 1e-3 * draws(8, 3, seed=1), exact + 5e-3 * draws(8, 3, seed=2)
    share = functools.partial(audit._share, exact=exact, dtype=torch.bfloat16)
    none, nan = torch.zeros(8, 1), torch.where(exact == exact[2, 1], torch.nan, 0)
    wanted = testing.budget_share(out, eager, exact, torch.bfloat16)
    assert share(out, eager, moves=none).item() == pytest.approx(wanted) and 0.1 < wanted < 1
    third = (torch.arange(8) == 2)[:, None]
    wrong = exact + 100.0 * third
    assert share(wrong, exact, moves=none) > 1000
    assert share(wrong, exact, moves=100.0 * third) < 1
    assert share(wrong, exact, moves=100.0 * third.roll(1, 0)) > 1000
    assert share(exact + nan, eager, moves=none) == torch.inf
    assert share(exact + nan, exact + nan, moves=none) == 0


@pytest.mark.grid
@pytest.mark.parametrize("part", range(10))
def test_thousands_of_honest_runs_do_not_miss(part):
    assert largest(range(400 * part, 400 * (part + 1))) < audit.MISS / 2


def added_as_tensor_cores_do(x, y):
    """x @ y.T of 16-bit numbers: 8 features a step, and what fp32 cannot hold of the sum is cut, not rounded."""
    total = torch.zeros(len(x), len(y))
    for part in range(0, x.shape[1], 8):
        exact = total.double() + x[:, part : part + 8].double() @ y[:, part : part + 8].double().T
        total = exact.float()
        total = torch.where(total.double().abs() > exact.abs(), torch.nextafter(total, torch.zeros(())), total)
    return total


@pytest.mark.parametrize("D", [768, 4096])
def test_honest_tensor_cores_do_not_miss(D):
    """Sums that grow, as those of a fitted pair, lose a little at each step, and always on the same side."""
    rows = torch.arange(64)
    y = draws(64, D)
    x, y = (y + draws(64, D, seed=1)).bfloat16(), y.bfloat16()
    weight = torch.full((64,), 1 / 64)
    problem = Problem((x, y), (Block(0, 1),), torch.tensor(20.0), rows, weight, cosine=True)
    norms = x.float().norm(dim=1)[:, None] * y.float().norm(dim=1)
    losses = reference.losses_of(audit._cut(problem, rows, torch.float32), [added_as_tensor_cores_do(x, y) / norms])
    assert 1e-6 < losses.sum() < 1e-2
    assert audit.shares(problem, losses, [None, None], rows).max() < 1
    assert audit.shares(problem, losses * 1.01, [None, None], rows).max() > audit.MISS


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"loss": fusedloss.clip}, {"loss": fusedloss.siglip}])
def test_honest_kernels_stay(options):
    for _ in range(2):
        run(**options) if "loss" not in options else both_ways(options["loss"])
    assert not failed() and not audit._said and CPU in audit._held


def both_ways(loss):
    value = loss(
        draws(9, 5).requires_grad_(),
        draws(9, 5, seed=1),
        torch.tensor(2.0),
        *[torch.tensor(-1.0)] * (loss is fusedloss.siglip),
    )
    value.backward()


def moderate(kind):
    """A problem of that kind whose numbers fp32 has no trouble with."""
    x, y, M = draws(70, 16), draws(70, 16, seed=1), torch.arange(70)
    blocks = {
        "itself": (Block(0, 0, mask=Mask(skip=M)),),
        "blocks": (Block(0, 1, bias=draws(70, seed=2)), Block(0, 2)),
        "masks": (Block(0, 1, mask=Mask(dense=draws(70, 70) > 0)),),
    }.get(kind, (Block(0, 1),))
    operands = {"itself": (x,), "blocks": (x, y, draws(9, 16, seed=3))}.get(kind, (x, y))
    target = M.roll(1) if kind == "itself" else M
    fold = Fold("sigmoid", scalars=(torch.tensor(-1.0),)) if kind == "sigmoid" else None
    options = {"symmetric": kind == "symmetric", "fold": fold, "cosine": True}
    return Problem(operands, blocks, torch.tensor(10.0), target, torch.full((70,), 1 / 70), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_one_wrong_row_is_a_miss(kind):
    problem, rows = moderate(kind), torch.arange(70)
    losses, gradients = swept(problem)
    assert audit.shares(problem, losses, gradients, rows).max() < 1
    for what in [losses] if kind in ("itself", "symmetric") else [losses, gradients[0]]:
        kept = what[5].clone()
        what[5] *= 1.001
        found = audit.shares(problem, losses, gradients, rows).tolist()
        assert [share > audit.MISS for share in found] == [what is losses, what is gradients[0]]
        what[5] = kept


def test_what_cannot_be_audited_alone_is_left_out():
    def problem(mask=None, block=None, **options):
        x, ones = torch.ones(8, 4), torch.ones(8)
        return Problem((x, x), (block or Block(0, 1, mask=mask or Mask()),), ones[0], torch.arange(8), ones, **options)

    assert audit.auditable(problem())
    x, labels = torch.ones(8, 4), torch.arange(8)
    for other in (
        problem(Mask(margin=0.1)),
        problem(Mask(guide=Guide(x, x))),
        problem(block=Block(0, 1, penalty=1.0)),
        problem(block=Block(0, 1, own_penalty=1.0)),
        problem(prefixes=(2, 4), prefix_weights=(1.0, 1.0), cosine=True),
        problem(margin=Margin(0.5), cosine=True),
        problem(ranks=Ranks("group", 0, (8,)), symmetric=True),
        problem(label_smoothing=0.1, symmetric=True),
        problem(fold=Fold("margin_ranking", (1.0, 1.0))),
        problem(fold=Fold("sup_con_in", labels=(labels, labels), itself=True)),
    ):
        assert not audit.auditable(other)
        audit.look(other, "triton", None, ())
    assert not audit._held


# What it costs --------------------------------------------------------------------------------------------------------


class NothingRead(TorchDispatchMode):
    """Whatever makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_an_audited_call_reads_nothing_of_itself(kind):
    problem = moderate(kind)
    losses, gradients = swept(problem)
    with NothingRead():
        audit.look(problem, "triton", losses, gradients)
    assert CPU in audit._held
    with NothingRead(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        audit.look(problem, "triton", losses, gradients)  # of the one before


def test_draws_of_torch_and_python_stay():
    before = torch.get_rng_state(), random.getstate()
    problem = moderate("plain")
    audit.look(problem, "triton", *swept(problem))
    assert audit.due() and CPU in audit._held
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


def test_rows_are_drawn_and_fit():
    some = [audit._sample(1000, 64, CPU) for _ in range(2)]
    assert all(len(rows) == 64 and 0 <= rows.min() and rows.max() < 1000 for rows in some)
    assert not torch.equal(*some)
    audit.forget()
    assert torch.equal(some[0], audit._sample(1000, 64, CPU))  # the same in every run
    assert audit._sample(9, 64, CPU).tolist() == list(range(9))


def test_what_is_held_at_once_is_bounded(monkeypatch):
    """Rows become fewer as columns become more, and keys are cast tile by tile."""
    seen = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(x.numel() for x in (out if isinstance(out, (tuple, list)) else (out,)) if torch.is_tensor(x))
            return out

    monkeypatch.setattr(audit, "SIMILARITIES", 2000)
    monkeypatch.setattr(audit, "TILE", 1600)
    x, y = draws(70, 16), draws(1000, 16, seed=1)
    problem = Problem((x, y), (Block(0, 1),), torch.tensor(1.0), torch.arange(70), torch.ones(70), cosine=True)
    losses, gradients = swept(problem)
    whole = audit.shares(problem, losses, gradients, torch.arange(2))
    with Sizes():
        audit.look(problem, "triton", losses, gradients)
    # Views of whole keys apart, nothing is larger than two rows of similarities.
    assert sorted(set(seen))[-2:] == [2000, 16000]
    assert whole.max() < 1


def test_off_it_is_one_look_at_a_dictionary(monkeypatch):
    """0.2 us: `os.environ.get` would take 1.2, with calls of its own."""
    monkeypatch.delenv("FUSEDLOSS_AUDIT")
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(frame.f_code.co_name) if event == "call" else None)
    found = audit.due()
    sys.setprofile(None)
    assert not found and calls == ["due", "audit", "get"]


@pytest.mark.parametrize("given", [{}, {"FUSEDLOSS_AUDIT": "1"}], ids=["not set", "set"])
def test_an_environment_that_is_a_dictionary(given, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(os, "environ", given)
        found = audit.due()
    assert found == bool(given)


@pytest.mark.parametrize("value", ["0", "", " "])
def test_off(value, monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_AUDIT", value)
    monkeypatch.setattr(audit, "look", None)
    run()
    assert not audit._held


def test_the_share_of_calls(monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_AUDIT", "0.25")
    found = [audit.due() for _ in range(4000)]
    assert 900 < sum(found) < 1100 and 400 < sum(found[::2]) < 600
    audit.forget()
    assert [audit.due() for _ in range(4000)] == found


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "nan", "yes"])
def test_a_bad_value_is_an_error(value, monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_AUDIT", value)
    with pytest.raises(ValueError, match=f"FUSEDLOSS_AUDIT must be a number from 0 to 1.*got '{value}'; set 1e-3"):
        run()


def test_other_backends_graphs_and_compiled_calls_are_left_alone(monkeypatch):
    run("chunked")
    query, key = draws(9, 5), draws(9, 5, seed=1)
    problem = Problem((query, key), (Block(0, 1),), torch.tensor(1.0), torch.arange(9), torch.ones(9))
    torch.ops.fusedloss.sweep(*packing.pack(problem), "triton", False, [False] * 3)
    monkeypatch.setattr(ask, "capturing", lambda device: True)
    run()
    assert not audit._held


def test_without_memory_the_run_goes_on(monkeypatch, caplog):
    def full(*args):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(audit, "shares", full)
    found = [run(), run(normalize=True)][0]
    torch.testing.assert_close(found, run("reference"))
    (line,) = caplog.messages
    assert "no memory is left on cpu for an audit" in line and not audit._held


def test_autocast_narrows_no_formula():
    problem, rows = moderate("plain"), torch.arange(70)
    found = swept(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = audit.shares(problem, *found, rows)
    assert torch.equal(within, audit.shares(problem, *found, rows))


def test_under_inference_mode():
    with torch.inference_mode():
        query, key = draws(9, 5), draws(9, 5, seed=1)
        for _ in range(2):
            fusedloss.info_nce(query, key)
    assert CPU in audit._held and not failed()


def test_by_name_a_kernel_that_missed_is_reported_once(monkeypatch, caplog):
    plant(monkeypatch, "loss")
    for _ in range(4):
        run("triton")
    assert failed() and len(caplog.records) == 1
