"""What every loss and every module must do alike, for each row of contract.py."""

from __future__ import annotations

import inspect
import pickle
import traceback
from pathlib import Path

import pytest
import torch
from condition import exact_and_moves, within
from contract import CASES, MODULES, WITHOUT_TRITON, Batch, Case, missing
from torch import Tensor, nn

import fusedloss
from fusedloss import functional as F

# Compiled graphs compute in another order: 1e-10 is 4e5 eps of fp64, in which everything here is computed.
NEAR = {"rtol": 1e-10, "atol": 1e-10}
FIRST = [name for name in CASES if "," not in name]  # one of each loss
# Torch's means of nothing.
NAN_OF_NOTHING = {F.binary_cross_entropy_with_logits, F.cross_entropy, F.linear_cross_entropy}
NAN_OF_NOTHING |= {F.mse, F.l1, F.huber, F.smooth_l1, "cosine_similarity, functions"}
# Those with products of their own, which torch rounds.
LINEAR = {F.softmax_pair, F.adaptive_layer, F.matryoshka_2d, "embed_distill, columns"}
# Sweeps whose distances are of chosen or sorted pairs, in fp32 as upstream.
MINED = {F.batch_all_triplet, F.batch_hard_triplet, F.batch_hard_soft_margin_triplet, F.batch_semi_hard_triplet}
MINED |= {F.mega_batch_margin}


def test_every_public_loss_has_a_case():
    assert not missing()


def made(name, rows=6, dtype=torch.float64, change=lambda place, x: x):
    batch = Batch(rows, dtype, change)
    return CASES[name](batch), batch


# Which have no kernels of their own.
WITHOUT_KERNELS = {F.adaptive_layer, F.list_circle, F.list_info_nce, F.matryoshka, F.matryoshka_2d}


def on_backends(*names, kernels=()):
    """Each of them on each backend that it has, the first call of each loss on its kernels, in fp32. kernels: marks."""
    pairs = []
    for name in names:
        case, _ = made(name, 4)
        backends = ["chunked", "reference"] if case.takes("backend") else [None]
        if case.takes("workspace_bytes"):
            backends.append("dense")
        pairs += [pytest.param(name, backend) for backend in backends]
        if name in FIRST and case.takes("backend") and case.function not in WITHOUT_KERNELS:
            own = ["triton", "cuda"] if case.takes("workspace_bytes") else ["triton"]
            pairs += [pytest.param(name, backend, marks=kernels) for backend in own]
    return pytest.mark.parametrize("name, backend", pairs)


def setting(backend):
    """The dtype, the option, and how near two ways to the same numbers are."""
    if backend in ("triton", "cuda"):
        return torch.float32, {"backend": backend}, {"rtol": 1e-5, "atol": 1e-6}
    return torch.float64, {} if backend is None else {"backend": backend}, NEAR


def reductions(case):
    own = callable(case.options.get("loss"))  # a function of the user's, which reduces by itself
    return ("mean", "sum", "none") if case.takes("reduction") and not own else (None,)


def reduced(reduction):
    return {} if reduction is None else {"reduction": reduction}


def value_and_gradients(case, batch, **options):
    value = case.result(**options)
    total = value.sum()
    gradients = [torch.zeros_like(x) for x in batch.leaves]
    if total.requires_grad:
        gradients = torch.autograd.grad(total, batch.leaves, materialize_grads=True)
    return [value.detach(), *gradients]


def assert_near(found, wanted, near=NEAR):
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **near)


# Values and gradients -------------------------------------------------------------------------------------------------


@on_backends(*CASES)
def test_no_rows(name, backend):
    dtype, options, _ = setting(backend)
    case, batch = made(name, 0, dtype)
    for reduction in reductions(case):
        value, *gradients = value_and_gradients(case, batch, **options, **reduced(reduction))
        nan = name in NAN_OF_NOTHING or (case.loss in NAN_OF_NOTHING and reduction == "mean")
        assert value.isnan() if nan else (value == 0).all()
        assert reduction == "none" or value.shape == ()
        for leaf, gradient in zip(batch.leaves, gradients, strict=True):
            assert gradient.shape == leaf.shape and (gradient == 0).all()


@on_backends(*(name for name in CASES if len(made(name, 4)[1].leaves) > 1))
def test_frozen_sides(name, backend):
    """Each alone, and all but each: a gradient does not depend on whether others are wanted."""
    dtype, options, near = setting(backend)
    case, batch = made(name, dtype=dtype)
    _, *wanted = value_and_gradients(case, batch, **options)
    for place in range(len(wanted)):
        for alone in (True, False):
            seen = []

            def freeze(_, x, place=place, alone=alone, seen=seen):
                if x.requires_grad:
                    seen.append(x)
                    return x if (len(seen) - 1 == place) is alone else x.detach()
                return x

            some, left = made(name, dtype=dtype, change=freeze)
            _, *found = value_and_gradients(some, left, **options)
            assert_near(found, [wanted[place]] if alone else wanted[:place] + wanted[place + 1 :], near)


@on_backends(*CASES, kernels=pytest.mark.grid)
def test_without_a_gradient(name, backend):
    dtype, options, near = setting(backend)
    case, _ = made(name, dtype=dtype)
    wanted = case.result(**options)
    with torch.no_grad():
        found = case.result(**options)
    assert not found.requires_grad and wanted.requires_grad
    torch.testing.assert_close(found, wanted.detach(), **near)


@on_backends(*CASES)
def test_a_graph_that_is_kept_gives_its_gradient_again(name, backend):
    """Gradients are scaled in place on their way out: a second backward must not find them so."""
    dtype, options, near = setting(backend)
    case, batch = made(name, dtype=dtype)
    for reduction in reductions(case):
        value = case.result(**options, **reduced(reduction)).sum()
        backward = lambda v=value: torch.autograd.grad(
            v, batch.leaves, torch.full_like(v, 3.0), True, materialize_grads=True
        )
        given = backward()
        once = [x.clone() for x in given]
        assert any(x.abs().max() > 0 for x in once)
        for x in given:  # what is given away is not what is kept
            x.zero_()
        assert_near(backward(), once, near)


@on_backends(*CASES, kernels=pytest.mark.grid)
def test_any_strides_and_inputs_that_stay_as_they_are(name, backend):
    dtype, options, near = setting(backend)
    wanted = value_and_gradients(*made(name, dtype=dtype), **options)
    for spread in (lambda x: torch.stack([x, x], -1)[..., 0], lambda x: x.mT.contiguous().mT if x.dim() > 1 else x):
        given = []

        def apart(_, x, spread=spread, given=given):
            laid = spread(x.detach()).requires_grad_(x.requires_grad)
            given.append((laid, x.detach().clone()))
            return laid

        found = value_and_gradients(*made(name, dtype=dtype, change=apart), **options)
        assert_near(found, wanted, near)
        assert all(torch.equal(laid, before) for laid, before in given)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name):
    """Of a penalty on the gradient: the reference's, or an error that names it."""
    case, batch = made(name)
    if not case.takes("backend"):
        assert torch.autograd.gradgradcheck(lambda *_: case.result(), batch.leaves)
        return

    def penalty(backend, reduction):
        values = case.result(backend=backend, **reduced(reduction))
        value = (
            values * torch.linspace(0.5, 1.5, max(values.numel(), 1), dtype=values.dtype).reshape(values.shape)
        ).sum()
        found = torch.autograd.grad(value, batch.leaves, create_graph=True, materialize_grads=True)
        total = sum(x.square().sum() for x in found)
        return torch.autograd.grad(total, batch.leaves, materialize_grads=True)

    for reduction in reductions(case):
        wanted = penalty("reference", reduction)
        try:
            found = penalty("chunked", reduction)
        except fusedloss.UnsupportedError as error:
            assert "backend must be 'reference'" in str(error)
        else:
            assert_near(found, wanted, {"rtol": 1e-7, "atol": 1e-9})


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_under_autocast(name, backend):
    """Embeddings of a sweep are rounded as a matmul's operands; nothing else is. The result has fp32."""
    case, batch = made(name, dtype=torch.float32)
    options = {"backend": backend} if case.takes("backend") else {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = case.result(**options)
    found = [value.detach(), *torch.autograd.grad(value.sum(), batch.leaves, materialize_grads=True)]
    rounds = case.takes("workspace_bytes") and case.loss not in MINED
    constants = name in ("info_nce, bank", "info_nce, frozen")  # which are embeddings, too

    leaves = []

    def rounded(_, x):
        leaves.extend([x] if x.requires_grad else [])
        embeddings = x.dim() > 1 and (x.requires_grad or (constants and x.is_floating_point()))
        return x.bfloat16() if rounds and embeddings else x

    case, batch = made(name, dtype=torch.float32, change=rounded)
    batch.leaves = leaves
    wanted = value_and_gradients(case, batch, **options)
    assert all(x.dtype == torch.float32 for x in found)
    products = case.function in LINEAR or name in LINEAR
    assert_near(found, wanted, {"rtol": 3e-2, "atol": 3e-2} if products else {"rtol": 1e-5, "atol": 1e-6})


# Errors ---------------------------------------------------------------------------------------------------------------


MASKS = ("mask", "same_id", "same_group", "score_margin", "guide")  # which name their own arguments


def holders(value, wanted, name=""):
    """The names of the parameters that hold it."""
    if value is wanted:
        return {name}
    inner = (
        value.items() if isinstance(value, dict) else ((name, x) for x in value) if type(value) in (tuple, list) else ()
    )
    return {found for own, x in inner for found in holders(x, wanted, own)}


@pytest.mark.parametrize("kind", ["text", "module", "two more dimensions"])
@pytest.mark.parametrize("name", CASES)
def test_a_bad_input_is_named(name, kind):
    """Each tensor in turn."""
    case, batch = made(name)
    bce = F.binary_cross_entropy_with_logits
    twin = case.function in (F.mse, F.l1, F.huber, F.smooth_l1)  # whose shapes broadcast, as torch's
    for place in range(batch.asked):
        given = []

        def bad(at, x, place=place, given=given):
            if at != place:
                return x
            more = x.detach()[None, None] if x.dim() else x.detach().expand(3, 3)
            given.append({"text": "text", "module": nn.Linear(2, 2), "two more dimensions": more}[kind])
            return given[0]

        names, error = set(MASKS), None  # where one of them makes the error, before the loss is called
        try:
            case, _ = made(name, change=bad)
            bound = inspect.signature(case.function).bind(*case.arguments, **case.options).arguments
            names = holders(bound, given[0]) or names
            names |= set(case.options) if "loss_options" in names else set()
            if kind == "module" and "projection" in names:
                continue
            if kind == "two more dimensions":  # an error may name the one that does not fit it
                names |= set(bound)
            case.result()
        except (TypeError, ValueError) as raised:
            error = raised
        if twin and kind == "two more dimensions":
            continue
        assert error is not None, place
        assert any(own in str(error).lower() for own in names), (place, names, str(error))
        last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        assert Path(fusedloss.__file__).parent in last.parents or twin or case.function is bce, last


# Modules --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if made(name, 4)[0].function in MODULES])
def test_a_module_is_its_function(name):
    case, _ = made(name)
    module, tensors = case.as_module()
    options = {n: getattr(module, n) for n in case.options if n not in tensors}
    wanted = case.function(*case.arguments, **options, **tensors)
    for own in (module, pickle.loads(pickle.dumps(module))):
        found = own(*case.arguments, **tensors)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    declared = inspect.signature(type(module)).parameters
    shown = repr(module)
    for option, value in options.items():
        with pytest.raises(TypeError, match=f"forward got an unexpected argument '{option}'; pass this option to"):
            module(*case.arguments, **tensors, **{option: value})
        if isinstance(value, nn.Module):
            assert option in dict(module.named_children())
        elif isinstance(value, Tensor):
            assert f"{option}=" not in shown
        elif value != declared[option].default:
            assert f"{option}={value!r}" in shown
    assert not list(module.parameters()) and set(module.state_dict()) <= set(options)


@pytest.mark.parametrize("cls", MODULES.values(), ids=lambda cls: cls.__name__)
def test_a_module_shows_what_is_not_the_default(cls):
    shown = [part.split("=")[0] for part in cls().extra_repr().split(", ") if part]
    assert set(shown) <= {"temperature", "scale"} and f"`{cls.function.__name__}`" in cls.__doc__
    with pytest.raises(TypeError, match=r"must not be a model, got the nn\.Module Linear"):
        cls(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=f"{cls.__name__} got an unexpected argument 'colour'; it takes "):
        cls(colour=3)
    with pytest.raises(TypeError, match=f"{cls.__name__} got wrong arguments: too many positional arguments"):
        cls(*(p.default for p in cls.signature.parameters.values()), 1)
    for tensor in cls.inputs:
        with pytest.raises(TypeError, match=f"{cls.__name__} got an unexpected argument '{tensor}'"):
            cls(**{tensor: torch.ones(3)})
    for option in {"reduction", "backend"} & set(cls.signature.parameters):
        with pytest.raises(ValueError, match=f"{option} must be one of .*, got 'none of them'"):
            cls(**{option: "none of them"})


@pytest.mark.parametrize("cls", MODULES.values(), ids=lambda cls: cls.__name__)
def test_a_module_hands_each_option_to_its_function(cls, monkeypatch):
    """And each is one of the function's, with its default."""
    monkeypatch.setattr(cls, "function", staticmethod(lambda *tensors, **named: named))
    defaults = {name: p.default for name, p in cls.signature.parameters.items()}
    tensors = dict.fromkeys(cls.required[cls.most or len(cls.required) :])
    found = cls()(*cls.required[: cls.most], **tensors)
    assert {name: value for name, value in found.items() if name not in cls.required} == defaults


# Kernels --------------------------------------------------------------------------------------------------------------

# The parts of the sweep (statistics, stored exponentials, gradients, folds, masks, the highest), and each of Triton's
# kernels outside of it.
SWEEPS = [
    "arcface",
    "batch_all_triplet",
    "batch_hard_triplet",
    "batch_semi_hard_triplet",
    "circle",
    "clip",
    "clip_distill",
    "decoupled_contrastive",
    "in_batch_margin_ranking",
    "info_nce",
    "info_nce, guide",
    "info_nce, normalize",
    "info_nce, same_id",
    "info_nce, score_margin",
    "info_nce, target, bias, weight",
    "linear_cross_entropy",
    "mega_batch_margin",
    "multi_similarity",
    "multiple_negatives_ranking",
    "multiple_negatives_ranking, directions",
    "nt_xent",
    "proxy_anchor",
    "proxy_nca",
    "siglip",
    "sup_con",
    "sup_con, in",
]
OUTSIDE = [
    "binary_cross_entropy_with_logits",
    "contrastive",
    "cosent",
    "cosine_similarity",
    "cross_entropy",
    "distill_kl_div",
    "focal",
    "huber",
    "lambda_loss",
    "list_mle",
    "margin_mse",
    "softmax_pair",
    "triplet",
]


@pytest.mark.smoke
@pytest.mark.parametrize(
    "backend, name", [*(("cuda", n) for n in SWEEPS), *(("triton", n) for n in (*SWEEPS, *OUTSIDE))]
)
def test_each_kernel_on_a_small_batch(backend, name, monkeypatch):
    from fusedloss.backends import FEW
    from fusedloss.rowwise import pair_logits

    monkeypatch.setattr(pair_logits, "SMALL", 0)  # small inputs run as the formula: here they stand for large ones
    for what in FEW:
        monkeypatch.setitem(FEW, what, 0)

    def run(dtype, backend, move=lambda x: x):
        batch = Batch(37, dtype, lambda place, x: moved(x, move))
        call = CASES[name](batch)
        value = call.result(backend=backend)
        gradients = torch.autograd.grad(value.sum(), batch.leaves, materialize_grads=True)
        return {place: x.detach() for place, x in enumerate((value, *gradients))}

    found, eager = run(torch.float32, backend), run(torch.float32, "reference")
    exact, moves = exact_and_moves(lambda move: run(torch.float64, "reference", move), torch.float32)
    for place, out in found.items():
        within(out, eager[place], exact[place], moves[place], f"output {place}")


def moved(x, move):
    """Numbers that fp32 has, and what receives a gradient moved."""
    if not x.is_floating_point():
        return x
    held = x.detach().float().to(x.dtype)
    return move(held).requires_grad_() if x.requires_grad else held


# torch.compile --------------------------------------------------------------------------------------------------------


def assert_as_eager(compiled, make, rows):
    """`compiled` takes what a call does: its loss and gradients are eager's."""
    eager, batch = Batch(rows), Batch(rows)
    wanted = value_and_gradients(make(eager), eager)
    call = make(batch)
    found = value_and_gradients(call._replace(function=compiled), batch)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **NEAR)


@pytest.mark.lengthy
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.grid] if "," in name else []) for name in CASES]
)
def test_compiles_in_one_graph_for_every_batch_size(name):
    make = CASES[name]
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    compiled = torch.compile(make(Batch(4)).function, fullgraph=True, dynamic=True, backend="eager")
    for rows in (8, 5):
        assert_as_eager(compiled, make, rows)
    assert graphs["unique_graphs"] == 1


@pytest.mark.grid
@pytest.mark.lengthy
@pytest.mark.parametrize("name", [name for name in CASES if "," not in name])
def test_the_last_batch_may_be_smaller(name):
    """Without dynamic=True: the first size has a graph, and all others have the second. Of modules, where there are."""

    def make(batch):
        call = CASES[name](batch)
        module = call.as_module()
        return call if module is None else Case(module[0], call.arguments, module[1])

    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    loss = make(Batch(4)).function
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for rows in (8, 5):
        assert_as_eager(compiled, make, rows)
    assert graphs["unique_graphs"] == 2


@pytest.mark.slow
def test_inductor_compiles_an_op_a_scan_and_mined_pairs():
    """Dynamo's other tests stop before the code is made, which takes a C++ compiler some seconds for each of these."""
    for name in ("info_nce, same_id", "cosent", "batch_hard_triplet"):
        torch._dynamo.reset()
        assert_as_eager(torch.compile(CASES[name](Batch(4)).function, fullgraph=True), CASES[name], 8)


# Constants made under inference_mode ----------------------------------------------------------------------------------


def made_under_inference(x):
    with torch.inference_mode():
        return x.detach().clone()


INFERENCE = [(name, backend) for name in CASES for backend in ("chunked", "reference")]
OF_TRITON = [pytest.param(name, "triton", marks=pytest.mark.grid) for name in CASES if name not in WITHOUT_TRITON]


@pytest.mark.parametrize("name, backend", [*INFERENCE, *OF_TRITON])
def test_what_has_no_gradient_may_be_an_inference_tensor(name, backend):
    """Each argument in turn, a frozen side's embeddings included: what `encode(convert_to_tensor=True)` returns."""
    make, dtype = CASES[name], torch.float32 if backend == "triton" else torch.float64
    # The same numbers, computed the same way: what differs is where in memory they lie.
    near = {"rtol": 1e-4, "atol": 1e-5} if backend == "triton" else NEAR
    options = {} if name == "global_orthogonal_regularization" else {"backend": backend}

    def results(rows, change):
        batch = Batch(rows, dtype, change)
        call = make(batch)
        return value_and_gradients(call._replace(options=call.options | options), batch) if batch.leaves else None

    counted = Batch(6)
    make(counted)
    for place in range(counted.asked):
        wanted = results(6, lambda at, x, place=place: x.detach().clone() if at == place else x)
        found = results(6, lambda at, x, place=place: made_under_inference(x) if at == place else x)
        for a, b in zip(found or [], wanted or [], strict=True):
            torch.testing.assert_close(a, b, **near)


def test_an_inference_tensor_as_labels():
    """A value from elsewhere, and a bank that changes after the loss has read it."""
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = fusedloss.multi_similarity(x, made_under_inference(torch.arange(6) // 2))
    loss.backward()
    assert loss.item() == pytest.approx(0.8418868, abs=2e-7)
    bank = made_under_inference(torch.randn(5, 8))
    rows = fusedloss.info_nce(x, x.detach(), bank=bank, reduction="none")
    (wanted,) = torch.autograd.grad(rows.sum(), x, retain_graph=True)
    with torch.inference_mode():
        bank.zero_()
    (found,) = torch.autograd.grad(rows.sum(), x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
