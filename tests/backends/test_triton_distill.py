"""A tile of the student's similarities and one of the teacher's, folded together, against the formula in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from epilogue_checks import TILES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss
from fusedloss import masks, testing
from fusedloss.backends import _in_tile_first, chunked, cuda, triton
from fusedloss.backends.triton.launching import why_not_on
from fusedloss.core.problem import Block, Fold, Problem

FORMS = ("kl", "ce", "mse")
SHAPES = {  # M, N, D, T
    "all edges ragged": (20, 37, 17, 9),
    "full tiles": (16, 64, 16, 32),
    "one row": (1, 33, 17, 5),
    "one column": (20, 1, 8, 3),
    "one feature": (17, 40, 1, 1),
}
TEMPERATURE, TAUGHT = 0.2, 0.1


@pytest.fixture(autouse=True)
def _interpreted():
    if reason := why_not_on(torch.float32, torch.device("cpu")):
        pytest.skip(reason)


def losses(z: Tensor, t: Tensor, keep: Tensor, form: str) -> Tensor:
    """Of rows of logits, over the columns that compete; 0 without one."""
    log_q, log_p = (x.masked_fill(~keep, -1e30).log_softmax(1) for x in (z, t))
    p, q = log_p.exp(), log_q.exp()
    terms = {"kl": p * (log_p - log_q), "ce": -p * log_q, "mse": (q - p) ** 2}[form]
    return terms.masked_fill(~keep, 0).sum(1)


def wanted(tensors: list[Tensor], keep: Tensor, form: str, normalize: bool, upstream: Tensor) -> list[Tensor]:
    """The losses, and the gradients by query, key and temperature."""
    query, key, temperature = (x.detach().requires_grad_() for x in (*tensors[:2], tensors[4]))
    unit = (lambda x: F.normalize(x, dim=1)) if normalize else (lambda x: x)
    z, t = unit(query) @ unit(key).T / temperature, unit(tensors[2]) @ unit(tensors[3]).T / TAUGHT
    found = losses(z, t, keep, form)
    return [found.detach(), *torch.autograd.grad((found * upstream).sum(), (query, key, temperature))]


def check(
    monkeypatch, shape: tuple[int, int, int, int], way: str, dtype: torch.dtype, form: str, normalize: bool, mask: str
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(triton, "config_of", lambda strip, mode: TILES[way])
    monkeypatch.setattr(triton, "_panel_columns", lambda strip, config: 2 * config.BLOCK_N)
    M, N, D, T = shape
    tensors = [torch.randn(n, d).div(d**0.25).to(dtype) for n, d in ((M, D), (N, D), (M, T), (N, T))]
    tensors.append(torch.tensor(TEMPERATURE))
    keep, given = torch.ones(M, N, dtype=torch.bool), None
    if mask == "ids":
        rows, columns = torch.randint(4, (M,)), torch.randint(4, (N,))
        keep, given = (rows[:, None] != columns) | torch.eye(M, N, dtype=torch.bool), masks.same_id(rows, columns)
    elif mask == "not_self":  # of one column row 0 has none
        keep, given = ~torch.eye(M, N, dtype=torch.bool), masks.not_self()
    upstream = torch.rand(M) + 0.1
    upstream[2::5] = 0
    query, key, temperature = (x.clone().requires_grad_() for x in (*tensors[:2], tensors[4]))
    loss = fusedloss.info_nce_distill(
        query, key, *tensors[2:4], temperature=temperature, teacher_temperature=TAUGHT, form=form, mask=given,
        normalize=normalize, reduction="none", backend="triton",
    )  # fmt: skip
    found = [loss.detach(), *torch.autograd.grad((loss * upstream).sum(), (query, key, temperature))]
    exact = wanted([x.double() for x in tensors], keep, form, normalize, upstream.double())
    eager = wanted([x.float() for x in tensors], keep, form, normalize, upstream)
    for name, one, other, right, kind in zip(
        ("loss", "query", "key", "temperature"), found, eager, exact, (torch.float32, dtype, dtype, torch.float32),
        strict=True,
    ):  # fmt: skip
        # The budget has room for one more rounding of the largest logit, which eager may lack by luck.
        moves = 16 * torch.finfo(torch.float32).eps * right.abs().max().item() / TEMPERATURE
        assert testing.budget_share(one, other, right, kind, moves) <= 1, name


@pytest.mark.parametrize(("way", "form"), [*((way, "kl") for way in TILES), ("pointers", "ce"), ("library", "mse")])
def test_every_way_to_multiply(monkeypatch, way, form):
    check(monkeypatch, SHAPES["all edges ragged"], way, torch.float32, form, True, "ids")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", ["none", "not_self"])
def test_sizes(monkeypatch, shape, mask):
    """Of a teacher of another dimension; rows may have no column."""
    check(monkeypatch, SHAPES[shape], "pointers", torch.float32, "kl", False, mask)


@pytest.mark.parametrize("form", FORMS)
def test_fp16(monkeypatch, form):
    check(monkeypatch, SHAPES["all edges ragged"], "pointers, folded in halves", torch.float16, form, True, "none")


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_teacher_of_another_dtype(dtypes):
    """Each is multiplied in its own."""
    query, key = (torch.randn(9, 12, dtype=dtypes[0]) for _ in range(2))
    taught = [torch.randn(9, 7).to(dtypes[1]) for _ in range(2)]
    found = fusedloss.info_nce_distill(query, key, *taught, temperature=0.5, teacher_temperature=1, backend="triton")
    z, t = (a.double() @ b.double().T for a, b in ((query, key), taught))
    right = losses(z / 0.5, t, torch.ones(9, 9, dtype=torch.bool), "kl").mean()
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)


def test_a_student_that_is_its_teacher_has_neither_loss_nor_gradient():
    x, y = (torch.randn(40, 24, requires_grad=True) for _ in range(2))
    loss = fusedloss.info_nce_distill(x, y, x, y, normalize=True, reduction="none", backend="triton")
    assert 0 <= loss.min() and loss.max() < 1e-7
    for gradient in torch.autograd.grad(loss.sum(), (x, y)):
        assert gradient.abs().max() < 1e-6


def test_both_directions_are_clip_distill():
    x, y, u, v = (torch.randn(12, 5) for _ in range(4))
    options: dict[str, Any] = {"backend": "triton"}
    both = fusedloss.info_nce_distill(
        x, y, u, v, temperature=0.5, teacher_temperature=0.2, directions=("query_to_key", "key_to_query"), **options
    )
    torch.testing.assert_close(both, fusedloss.clip_distill(x, y, 2.0, u, v, 5.0, **options))


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that a call makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize(("form", "mask"), [("kl", masks.not_self()), ("mse", None)])
def test_nothing_grows_with_the_matrix(form, mask):
    """Neither matrix is stored: of 128 x 128 numbers, 64 KiB, a chunk of 16 KiB, masks among them."""
    x, y, u, v = (torch.randn(128, 4) for _ in range(4))
    budget = 1 << 14
    with Largest() as largest:
        loss = fusedloss.info_nce_distill(
            x.requires_grad_(), y, u, v, form=form, mask=mask, workspace_bytes=budget, backend="triton"
        )
        loss.backward()
    assert largest.bytes <= budget


def problem_of(dtype: torch.dtype, name: str = "distill") -> Problem:
    x, one = torch.ones(4, 8, dtype=dtype), torch.ones(())
    return Problem((x,), (Block(0, 0),), one, torch.zeros(4, dtype=torch.int64), torch.ones(4), fold=Fold(name))


def test_a_chunk_has_one_matrix_where_torch_has_six():
    bf16 = problem_of(torch.bfloat16)
    assert triton.workspace_dtype(bf16) is torch.bfloat16 and triton.workspace_copies(bf16) == 1
    assert cuda.workspace_dtype(bf16) is torch.float32
    assert cuda.workspace_copies(bf16) == chunked.workspace_copies(bf16) == 6


def test_auto_takes_the_backend_that_folds_in_its_tile():
    names = ("cuda", "triton", "chunked", "reference")
    assert _in_tile_first(names, problem_of(torch.bfloat16)) == ("triton", "cuda", "chunked", "reference")
    for other in (problem_of(torch.bfloat16, "sigmoid"), problem_of(torch.bfloat16, "batch_all")):
        assert _in_tile_first(names, other) == names
    assert _in_tile_first(("chunked",), problem_of(torch.bfloat16)) == ("chunked",)
