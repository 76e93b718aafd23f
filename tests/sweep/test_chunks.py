"""How many rows a chunk has: whole waves of the device, inside a budget that the caller, the environment or we set."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

import fusedloss
from fusedloss import sweep, testing
from fusedloss.core.waves import wave_columns, wave_rows
from fusedloss.sweep.chunks import GIB, MIB, chunk_rows

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
H200 = SimpleNamespace(total_memory=143771 * MIB, multi_processor_count=132)
SMALL_CARD = SimpleNamespace(total_memory=24 * GIB, multi_processor_count=128)


@pytest.fixture(autouse=True)
def h200(monkeypatch):
    monkeypatch.delenv("FUSEDLOSS_WORKSPACE_BYTES", raising=False)
    monkeypatch.setattr(sweep.chunks, "_properties", lambda device: H200)


@pytest.mark.parametrize(
    "D, most, rows", [(768, 8448, 5632), (1024, 8448, 8448), (4096, 8448, 8448), (1024, 7168, 4224)]
)
def test_chunks_fill_whole_waves(D, most, rows):
    """dx's GEMM has rows / 128 x D / 256 tiles: 132 multiprocessors want a multiple of 132."""
    assert wave_rows(10**6, D, most, 132) == rows
    tiles = rows // 128 * -(-D // 256)
    assert tiles % 132 == 0


@pytest.mark.parametrize("most", [1, 7, 128, 200, 256, 1000, 5632])
@pytest.mark.parametrize("multiprocessors", [1, 16, 108, 132, 148])
def test_chunks_never_exceed_what_they_may_have(most, multiprocessors):
    for M in (1, 100, 5000, 10**6):
        for D in (1, 384, 768, 4097):
            assert 1 <= wave_rows(M, D, most, multiprocessors) <= min(M, most)


@pytest.mark.parametrize("rows, columns", [(5632, 768), (8448, 512), (4224, 1024)])
def test_panels_fill_whole_waves(rows, columns):
    """Of 132 multiprocessors, in 32 MiB; 1280 columns for 5632 rows would fill 83 %."""
    assert wave_columns(rows, (32 << 20) // 4 // rows, 256, 132) == columns
    assert rows // 128 * columns // 256 == 132


@pytest.mark.parametrize("most", [0, 100, 256, 1000, 65536])
def test_panels_are_whole_tiles_in_what_they_may_have(most):
    for rows in (1, 130, 8448):
        for multiprocessors in (1, 108, 148):
            columns = wave_columns(rows, most, 256, multiprocessors)
            assert columns % 256 == 0 and 256 <= columns <= max(256, most)


@pytest.mark.parametrize("N", [4096, 8192])
def test_small_batches_are_one_chunk(N):
    assert chunk_rows(N, N, 768, 2, CUDA) == N


@pytest.mark.parametrize("N, limit", [(16384, GIB), (65536, GIB), (131072, GIB), (2**20, 8 * GIB)])
@pytest.mark.parametrize("D", [384, 768, 1024, 4096])
def test_the_default_workspace_on_an_h200(N, D, limit):
    """With partial sums (row tables of 128 columns a tile, column tables) inside 1 GiB, and 8 GiB at 2**20."""
    rows = chunk_rows(N, N, D, 2, CUDA)
    partials = rows * -(-N // 128) * 4 + -(-rows // 128) * N * 4
    assert rows * N * 2 + partials <= limit
    assert rows >= 2048  # fewer: dy's accumulation takes more than a tenth of the time


def test_a_small_card_keeps_most_of_its_memory(monkeypatch):
    monkeypatch.setattr(sweep.chunks, "_properties", lambda device: SMALL_CARD)
    N = 2**20
    assert chunk_rows(N, N, 1024, 2, CUDA) * N * 2 <= 1.5 * GIB


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("budget", [4096 * 4, 100 * 4096 * 4, 3 * MIB])
def test_a_budget_is_kept(device, budget, monkeypatch):
    N = 4096
    rows = chunk_rows(N, N, 768, 4, device, budget)
    assert 1 <= rows and rows * N * 4 <= budget
    monkeypatch.setenv("FUSEDLOSS_WORKSPACE_BYTES", str(budget))
    assert chunk_rows(N, N, 768, 4, device) == rows
    assert chunk_rows(N, N, 768, 4, device, 2 * budget) >= rows  # the argument is before the environment


def test_a_budget_for_less_than_a_row_says_what_a_row_needs(monkeypatch):
    query, key = testing.inputs("random", 100, 100, 8)
    with pytest.raises(
        ValueError, match=r"workspace_bytes must be at least 448, the bytes of one row of 112 similarities, got 300"
    ):
        fusedloss.info_nce(query.requires_grad_(), key, workspace_bytes=300, backend="chunked")
    monkeypatch.setenv("FUSEDLOSS_WORKSPACE_BYTES", "a lot")
    with pytest.raises(ValueError, match="FUSEDLOSS_WORKSPACE_BYTES must be a positive number of bytes, got 'a lot'"):
        fusedloss.info_nce(query.requires_grad_(), key, backend="chunked")


@pytest.mark.parametrize("bad, error", [(0, ValueError), (-5, ValueError), (1.5, TypeError), (True, TypeError)])
def test_workspace_bytes_is_a_positive_number_of_bytes(bad, error):
    query, key = testing.inputs("random", 8, 8, 8)
    with pytest.raises(error, match=r"workspace_bytes must be .* or None, got"):
        fusedloss.info_nce(query, key, workspace_bytes=bad)


@pytest.mark.parametrize("backend", ["chunked", "triton", "cuda"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda q, k, **o: fusedloss.info_nce(q, k, **o),
        lambda q, k, **o: fusedloss.clip(q, k, 20.0, **o),
        lambda q, k, **o: fusedloss.multiple_negatives_ranking(q, k, k.flip(0), **o),
    ],
    ids=["info_nce", "clip", "ranking"],
)
def test_results_do_not_depend_on_the_budget(loss, backend):
    leaves = testing.inputs("random", 150, 150, 12)
    few = testing.value_and_gradients(lambda *t: loss(*t, backend=backend, workspace_bytes=20 * 304 * 4), leaves)
    many = testing.value_and_gradients(lambda *t: loss(*t, backend=backend), leaves)
    for a, b in zip(few, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_few_rows_against_themselves_need_no_more_than_their_similarities():
    """A tile of half a matrix was counted as 1024 columns wide, and 40 rows were refused 4000 bytes."""
    (x, _), labels = testing.inputs("random", 40, 40, 12), torch.arange(40) % 7
    for loss in (lambda x, **o: fusedloss.info_nce(x, x, **o), lambda x, **o: fusedloss.sup_con(x, labels, **o)):
        found = []
        for most in (4000, None):
            of_budget = functools.partial(loss, backend="chunked", workspace_bytes=most)
            found.append(testing.value_and_gradients(of_budget, [x]))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
