"""Constant tensors that calls share: like new ones wherever a new one would differ."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fusedloss
from fusedloss.core import numerics
from fusedloss.core.numerics import LARGEST_KEPT, MOST_KEPT, constant, filled, row_numbers

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def none_kept(monkeypatch):
    monkeypatch.setattr(numerics, "_kept", {})


def test_values_and_dtypes():
    like = torch.zeros(2)
    torch.testing.assert_close(row_numbers(5, like), torch.arange(5), rtol=0, atol=0)
    torch.testing.assert_close(filled(3, -1, torch.int64, CPU), torch.full((3,), -1), rtol=0, atol=0)
    for dtype in (torch.float32, torch.float64):
        found = constant(0.1, dtype, CPU)
        assert found.dtype == dtype and found.shape == () and found.item() == torch.tensor(0.1, dtype=dtype).item()
        assert filled(2, 1.0, dtype, CPU).dtype == dtype


def test_the_same_again_and_another_for_each_difference():
    first = filled(3, 1.0, torch.float32, CPU)
    assert filled(3, 1.0, torch.float32, CPU) is first
    others = [
        filled(4, 1.0, torch.float32, CPU),
        filled(3, 2.0, torch.float32, CPU),
        filled(3, 1.0, torch.float64, CPU),
    ]
    assert all(other is not first for other in others)
    assert row_numbers(3, first) is row_numbers(3, first)


def test_large_ones_are_not_kept_and_few_are():
    large = filled(LARGEST_KEPT + 1, 1.0, torch.float32, CPU)
    assert filled(LARGEST_KEPT + 1, 1.0, torch.float32, CPU) is not large
    for value in range(3 * MOST_KEPT):
        constant(float(value), torch.float32, CPU)
        assert len(numerics._kept) <= MOST_KEPT


def test_one_made_under_inference_mode_serves_autograd():
    x = torch.randn(6, 4, requires_grad=True)
    with torch.inference_mode():
        fusedloss.info_nce(x.detach(), x.detach(), temperature=0.5)
        assert not constant(2.0, torch.float32, CPU).is_inference()
    fusedloss.info_nce(x, x.detach(), temperature=0.5).backward()
    assert bool(x.grad.isfinite().all())


def test_a_mode_s_tensors_are_its_own():
    with FakeTensorMode():
        assert isinstance(row_numbers(7, torch.zeros(1)), FakeTensor)
    assert not isinstance(row_numbers(7, torch.zeros(1)), FakeTensor)


def test_no_loss_writes_to_one():
    x, y = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    for backend in ("dense", "chunked", "reference"):
        fusedloss.info_nce(x, y, backend=backend, normalize=True).backward()
        fusedloss.clip(x, y, 5.0, backend=backend).backward()
        fusedloss.siglip(x, y, 5.0, -1.0, backend=backend).backward()
        fusedloss.nt_xent(x, y, backend=backend).backward()
        fusedloss.sup_con(x, labels, backend=backend).backward()
        fusedloss.multi_similarity(x, labels, backend=backend).backward()
        fusedloss.proxy_nca(x, labels, y, backend=backend).backward()
    assert numerics._kept
    for (make, rows, value, dtype, device, _), kept in numerics._kept.items():
        torch.testing.assert_close(kept, make(rows, value, dtype, device), rtol=0, atol=0)


@pytest.mark.parametrize("labels", [[], [4], [7, -3, 7, 7, 2**40, -3]])
def test_group_numbers(labels):
    """In the order of the labels; the same by the calls that a compiler traces."""
    labels = torch.tensor(labels, dtype=torch.int64)
    wanted = torch.tensor([sorted(set(labels.tolist())).index(label) for label in labels.tolist()], dtype=torch.int64)
    assert torch.equal(numerics.group_numbers(labels), wanted)
    if len(labels):
        assert torch.equal(torch.vmap(numerics.group_numbers)(labels[None])[0], wanted)
    with FakeTensorMode() as mode:
        assert numerics.group_numbers(mode.from_tensor(labels)).shape == labels.shape
