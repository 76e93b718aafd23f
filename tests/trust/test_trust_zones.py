"""Red zones and poison: what a kernel writes beside its outputs, and what it reads that nobody wrote."""

from __future__ import annotations

import threading

import pytest
import torch

from fusedloss.backends import BACKENDS, triton
from fusedloss.backends.cuda import launching
from fusedloss.backends.cuda import rows as cuda_rows
from fusedloss.backends.triton import rows as triton_rows
from fusedloss.proof import cases
from fusedloss.proof.zones import ZONE, Zones

CPU = torch.device("cpu")
BACKEND = pytest.mark.parametrize("backend", ["cuda", "triton"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool])
def test_what_is_not_filled_is_poisoned(dtype):
    with Zones(CPU) as zones:
        like = torch.empty(3, 5, dtype=dtype)
        made = [like, torch.empty_like(like), like.new_empty(7), torch.empty_strided((3, 4), (1, 3), dtype=dtype)]
        made.append(like.T.new_empty_strided((2, 2), (4, 1)))
    for x in made:
        assert x.dtype == dtype
        if dtype.is_floating_point:
            assert x.isnan().all()
        else:
            assert (x == (True if dtype == torch.bool else torch.iinfo(dtype).max)).all()
        assert x.data_ptr() % 64 == 0
    assert len(zones.zoned) == 5 and zones.written() is None


def test_what_is_filled_keeps_its_numbers():
    with Zones(CPU) as zones:
        x = torch.zeros(4, 3)
        made = {
            0: [x, torch.zeros_like(x), x.new_zeros(2)],
            1: [torch.ones(2, 2)],
            7: [torch.full((3,), 7), x.new_full((2,), 7)],
        }
    assert all(bool((x == value).all()) for value, xs in made.items() for x in xs)
    assert len(zones.zoned) == 6 and zones.written() is None


def test_strides_and_empty_tensors_are_kept():
    with Zones(CPU) as zones:
        x = torch.empty_strided((3, 4), (10, 2))
        assert x.stride() == (10, 2) and torch.empty(0, 5).shape == (0, 5)
    assert len(zones.zoned) == 1
    held = zones.holding(torch.arange(12.0).view(3, 4).T)
    assert held.stride() == (1, 4) and held[1, 2] == 9


@pytest.mark.parametrize("place", [-ZONE // 2, -1, 0, ZONE // 2 - 1])
def test_one_element_beside_is_found(place):
    with Zones(CPU) as zones:
        torch.empty(3)
        x = torch.empty(7, dtype=torch.bfloat16)
    assert zones.written() is None
    offset = x.storage_offset() + place + (7 if place >= 0 else 0)
    x.as_strided((1,), (1,), offset).fill_(1.0)
    assert zones.written() == f"written {'before the start' if place < 0 else 'behind the end'} of bfloat16 [7]"


def test_an_output_that_is_given_is_left_alone():
    with Zones(CPU) as zones:
        out = torch.empty(2, 2)
        torch.mm(torch.ones(2, 2), torch.ones(2, 2), out=out)
    assert (out == 2).all() and zones.written() is None


def test_a_backward_allocates_between_zones():
    """Also on a thread of autograd's own, as a GPU's is."""

    class Ones(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            found.append(torch.empty_like(upstream))
            return found[-1].fill_(1)

    found, x = [], torch.zeros(5, requires_grad=True)
    with Zones(CPU) as zones:
        torch.autograd.grad(Ones.apply(x).sum(), x)
    assert found[0].storage_offset() > 0 and any(zoned.what == "float32 [5]" for zoned in zones.zoned)
    outside = threading.Thread(target=lambda: found.append(torch.empty(5)))
    with zones:
        outside.start()
        outside.join()
    assert found[-1].storage_offset() == 0  # somebody else's


# Planted in the backends, on the forms of theirs that run on a CPU ----------------------------------------------------


def proof(backend, family="rows"):
    return cases.prove(backend, family, "fp32", CPU)


@BACKEND
def test_a_kernel_that_writes_a_row_too_many(backend, monkeypatch):
    """The numbers that were asked for are right."""
    if backend == "cuda":
        launch = cuda_rows.launch

        def longer(name, device, **fields):
            launch(name, device, **(fields | {"R": fields["R"] + 1} if name == "finish" else fields))

        monkeypatch.setattr(cuda_rows, "launch", longer)
    else:
        by_row = triton_rows.by_row

        def longer(name, device, R, *args, **constants):
            if name == "finish_kernel":
                args = (*args[:7], R + 1, *args[8:])
                R += 1
            by_row(name, device, R, *args, **constants)

        monkeypatch.setattr(triton_rows, "by_row", longer)
    found = proof(backend)
    assert found.state == "failed" and "written behind the end of float32 [" in found.reason


@BACKEND
def test_a_kernel_that_reads_what_it_never_wrote(backend, monkeypatch):
    """A line of the tables of partial sums that no tile fills: mostly zeros, where memory is fresh."""
    if backend == "cuda":

        def taller(run):
            lines = -(-run.strip.y.shape[0] // run.plan.BLOCK_N)
            return run.strip.scale.new_empty((lines + 1, run.strip.x.shape[0]))

        monkeypatch.setattr(launching.Launch, "row_table", taller)
    else:
        row_table = triton._row_table

        def taller(strip, config):
            lines = row_table(strip, config)
            return strip.scale.new_empty((len(lines) + 1, lines.shape[1]))

        monkeypatch.setattr(triton, "_row_table", taller)
    found = proof(backend, "stats")
    assert found.state == "failed" and "losses is off by inf" in found.reason


@BACKEND
def test_a_kernel_that_reads_beyond_its_rows(backend, monkeypatch):
    module = cuda_rows if backend == "cuda" else triton_rows
    name = "launch" if backend == "cuda" else "by_row"
    right = getattr(module, name)

    def wider(kernel, device, *args, **fields):
        if kernel == "prepare":
            fields["D"] += 1
        elif kernel == "prepare_kernel":
            args = (*args[:13], args[13] + 1, *args[14:])
        right(kernel, device, *args, **fields)

    monkeypatch.setattr(module, name, wider)
    found = proof(backend)
    assert found.state == "failed" and "is off by inf" in found.reason


@BACKEND
def test_results_that_differ_from_run_to_run(backend, monkeypatch):
    module, calls = BACKENDS[backend], []
    settle = module.settle

    def unsteady(*args, **options):
        found = settle(*args, **options)
        calls.append(found)
        return found._replace(loss=found.loss * (1 + len(calls) * 2**-22))

    monkeypatch.setattr(module, "settle", unsteady)
    found = proof(backend)
    assert found.state == "failed" and found.reason.endswith("losses differs from run to run")


@BACKEND
def test_what_a_kernel_raises_is_its_failure(backend, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no such kernel\nand more of it")

    monkeypatch.setattr(BACKENDS[backend], "finish", broken)
    found = proof(backend)
    assert found.state == "failed" and found.reason.endswith(": RuntimeError: no such kernel")
    assert proof(backend, "top").state == "proved"  # it finishes nothing

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BACKENDS[backend], "finish", full)
    with pytest.raises(torch.OutOfMemoryError):  # which says nothing of a kernel
        proof(backend)
