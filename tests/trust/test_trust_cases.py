"""Every family is proved where kernels run on a CPU, by cases that launch it and that notice what is wrong."""

from __future__ import annotations

import pytest
import torch
from primitives import record

from fusedloss.backends import BACKENDS, cuda, triton
from fusedloss.core.errors import UnsupportedError
from fusedloss.proof import cases, draws
from fusedloss.trust import families

CPU = torch.device("cpu")
BACKEND = pytest.mark.parametrize("backend", ["cuda", "triton"])


def test_every_family_has_cases():
    assert set(cases.CASES) == {*families.SWEEP, *families.ROWWISE}
    assert all(len(makes) >= 3 for makes in cases.CASES.values())


# In `make test`: all that csrc/ has in fp32, what stores 16 bits, and a part of Triton's, where a case takes a second.
# In `make test-all` the others, but what the interpreter runs as it does in fp32: tf32 is one rounding in `product`, of
# which each kernel that calls it has a case here, and whatever reads 16 bits computes in fp32.
ALONE = ("stats", "grad", "guide", "similarities", "together", "fold:sigmoid", "fold:distill", "pair_logits")
SHORT = {
    ("cuda", "fp32"): families.of_backend("cuda"),
    ("cuda", "bf16"): ("exp", "stored", "grad", "grad+columns", "fold:sigmoid", "fold:circle"),
    ("triton", "fp32"): ("stats+columns", "top", "pairs"),
}


def marks(backend, precision, family):
    if family in SHORT.get((backend, precision), ()):
        return []
    again = backend == "triton" and (precision == "bf16" or (precision == "tf32" and family not in ALONE))
    return [pytest.mark.whole if again else pytest.mark.slow]


RUNS = [
    pytest.param(
        *(backend, precision, family),
        marks=marks(backend, precision, family),
        id=f"{backend}-{precision}-{family}",
    )
    for backend in families.BACKENDS
    for precision in families.PRECISIONS
    for family in families.of_backend(backend, precision)
    # Triton's interpreter multiplies no bf16.
    if precision != "bf16" or backend == "cuda" or (family in families.ROWWISE and family != "pair_logits")
]


@pytest.mark.parametrize("backend, precision, family", RUNS)
def test_proved_here(backend, precision, family, monkeypatch):
    launched = record(backend, monkeypatch)
    before = torch.backends.cuda.matmul.fp32_precision
    found = cases.prove(backend, family, precision, CPU)
    assert (found.state, found.reason) == ("proved", "")
    assert found.cases == len(cases.CASES[family]) and found.worst <= 1
    assert found.worst > 0 or family == "top"  # which is exact
    assert family in launched
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, precision, family",
    [("cuda", p, family) for p in ("bf16", "fp16", "tf32") for family in families.of_backend("cuda", p)],
)
def test_an_honest_kernel_is_proved_as_a_gpu_rounds(backend, precision, family, monkeypatch):
    """Tensor cores cut off what they add, and an exponential is off by 2 ulps: csrc/ with both is still right."""
    monkeypatch.setenv("FUSEDLOSS_HOST_SUMS", "truncate")
    monkeypatch.setenv("FUSEDLOSS_HOST_ULPS", "1")
    found = cases.prove(backend, family, precision, CPU)
    assert (found.state, found.reason) == ("proved", "")


def test_what_cannot_be_proved_is_not_claimed():
    with pytest.raises(UnsupportedError, match="multiplies the bit patterns of bfloat16"):
        cases.prove("triton", "stats", "bf16", CPU)
    with pytest.raises(ValueError, match=r"family must be one of .* for cuda in fp16, got 'exp'"):
        cases.prove("cuda", "exp", "fp16", CPU)
    with pytest.raises(ValueError, match="got 'classes'"):
        cases.prove("cuda", "classes", "fp32", CPU)


# Faults, each of which must be found ----------------------------------------------------------------------------------


def of_strips(change):
    """A primitive that sees other strips."""

    def planted(module, monkeypatch, *names):
        for name in names:
            monkeypatch.setattr(module, name, changed(getattr(module, name)))

    def changed(function):
        def run(*args, **options):
            return function(*(seen(arg) for arg in args), **options)

        return run

    def seen(arg):
        if isinstance(arg, list):
            return [seen(x) for x in arg]
        return change(arg) if type(arg).__name__ == "Strip" else arg

    return planted


def without_the_last_column(strip):
    bias = torch.zeros(len(strip.y)) if strip.bias is None else strip.bias.clone()
    bias[-1] = -torch.inf
    return strip._replace(bias=bias)


def one_feature_short(strip):
    """The last one is 0, and so is what stands behind a row: kernels read up to the next 16 bytes."""

    def short(x):
        copy = x.new_zeros(x.shape[0], x.stride(0))[:, : x.shape[1]]
        copy[:, :-1] = x[:, :-1]
        return copy

    return strip._replace(x=short(strip.x), y=short(strip.y)) if strip.x.shape[1] > 3 else strip


def with_rounded_logits(strip):
    """As if they went through bf16 on the way."""
    return strip._replace(scale=strip.scale * (1 + 2**-9))


def with_the_last_row_twice(strip):
    x = strip.x.clone()
    if len(x) > 1:
        x[-1] = x[-2]
    return strip._replace(x=x)


def with_the_target_among_the_others(strip):
    return strip._replace(target=None)


def unmasked(strip):
    return strip._replace(mask=None)


def with_one_mask_bit_short(strip):
    if strip.mask is None or strip.mask.dense is None:
        return strip
    dense = strip.mask.dense.clone()
    dense[:, -1] = True
    return strip._replace(mask=strip.mask._replace(dense=dense))


def without_a_softcap(strip):
    return strip._replace(softcap=0.0)


def without_its_own_scale(strip):
    return strip._replace(own=None, own_scale=None)


STATS, EXP, GRAD = ("stats_rows",), ("exp_rows",), ("grad_rows",)
FAULTS = [
    ("stats", STATS, without_the_last_column),
    ("stats", STATS, one_feature_short),
    ("stats", STATS, with_rounded_logits),
    ("stats", STATS, with_the_last_row_twice),
    ("stats", STATS, with_the_target_among_the_others),
    ("stats+columns", ("stats_rows_and_columns",), without_the_last_column),
    ("stats+columns", ("stats_rows_and_columns",), with_the_last_row_twice),
    ("exp", EXP, without_the_last_column),
    ("exp", EXP, one_feature_short),
    ("exp", EXP, with_the_target_among_the_others),
    ("stored", ("exp_rows_and_columns",), without_the_last_column),
    ("stored", ("exp_rows_and_columns",), with_the_last_row_twice),
    ("grad", GRAD, without_the_last_column),
    ("grad", GRAD, one_feature_short),
    ("grad", GRAD, with_the_last_row_twice),
    ("grad+columns", GRAD, without_the_last_column),
    ("grad+columns", GRAD, with_the_last_row_twice),
    ("masks", STATS, unmasked),
    ("masks", GRAD, unmasked),
    ("masks", EXP, unmasked),
    ("masks", GRAD, with_one_mask_bit_short),
    ("masks", GRAD, without_its_own_scale),
    ("softcap", EXP, without_a_softcap),
    ("softcap", GRAD, without_a_softcap),
    ("top", ("top_rows",), without_the_last_column),
    ("top", ("top_rows",), unmasked),
    ("similarities", ("similarities",), one_feature_short),
    ("similarities", ("similarities",), with_the_last_row_twice),
    ("guide", ("guide_rows",), one_feature_short),
]


# The cases and their budgets are those of both backends: who notices on one does on the other.
SEEN = {("cuda", "fp32"): [], ("cuda", "fp16"): [pytest.mark.slow]}
PLANTED = [
    pytest.param(
        *(backend, precision, *fault),
        marks=SEEN.get((backend, precision), [pytest.mark.whole]),
        id=f"{backend} {precision} {fault[0]}: {fault[1][0]} {fault[2].__name__}",
    )
    for backend in families.BACKENDS
    for precision in ("fp32", "fp16")
    for fault in FAULTS
    # fp16 stores no exponentials.
    if fault[0] in families.of_backend(backend, precision) and not (precision == "fp16" and fault[1] == EXP)
]


@pytest.mark.parametrize("backend, precision, family, names, change", PLANTED)
def test_a_fault_is_found(backend, precision, family, names, change, monkeypatch):
    of_strips(change)(BACKENDS[backend], monkeypatch, *names)
    found = cases.prove(backend, family, precision, CPU)
    assert found.state == "failed" and "of the budget" in found.reason, found


@BACKEND
def test_a_nan_must_stay_in_its_row(backend, monkeypatch):
    """As a sum over all rows of a tile would spread it."""
    module = BACKENDS[backend]
    settle = module.settle

    def spread(*args, **options):
        found = settle(*args, **options)
        return found._replace(loss=found.loss + 0 * found.loss.sum())

    monkeypatch.setattr(module, "settle", spread)
    found = cases.prove(backend, "stats", "fp32", CPU)
    assert found.state == "failed" and found.reason.startswith("a row of NaN: losses is off by inf")


# Layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layouts(dtype):
    x = torch.randn(5, 8).to(dtype)
    made = {name: lay(x, cases.Zones(CPU)) for name, lay in draws.LAYOUTS.items()}
    assert all(torch.equal(found, x) for found in made.values())
    assert made["rows"].stride(1) == 1 and made["rows"].stride(0) * x.itemsize % 16 == 0
    assert made["columns"].stride(0) == 1 and made["columns"].stride(1) * x.itemsize % 16 == 0
    assert made["anywhere"].stride() == (9, 1) and made["anywhere"].data_ptr() % 16
    far = made["far"]
    assert far.stride(0) * 4 > 2**31 and far.stride(0) * x.itemsize % 16 == 0 and far.data_ptr() % 16 == 0
    for backend in (cuda, triton):  # read where they are
        assert backend.operand(far) is far and backend.operand(made["rows"]) is made["rows"]
    assert cuda.operand(made["columns"]) is made["columns"]
