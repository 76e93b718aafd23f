"""Memory as growth: what a step needs on top of inputs and gradients must not grow with M x N."""

from __future__ import annotations

import sys

import pytest
import torch

from fusedloss import measure, testing
from fusedloss.bench import Point, memory

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="a CPU's peak can be reset on Linux only")
@pytest.mark.parametrize("loss", ["info_nce", "clip", "multiple_negatives_ranking"])
def test_sixteen_times_the_logits_fit_the_same_bound(loss):
    """Logits of 64 MiB and of 1 GiB: both steps stay under 128 MiB, the workspace of 64 and its tiles."""
    for n in (4096, 16384):
        point = Point(loss=loss, n=n, d=32)
        assert measure.isolated(memory, point, "fusedloss") < 128 * MIB, f"N={n}"


@pytest.mark.skipif(sys.platform != "linux", reason="a CPU's peak can be reset on Linux only")
def test_the_yardstick_sees_the_logits_of_eager():
    """The same measurement on eager must find its three [N, N] matrices, or the test above could not fail."""
    point = Point(n=4096, d=32)
    assert measure.isolated(memory, point, "eager") > 0.6 * point.eager_bytes


def test_gradients_are_not_copied_on_their_way_out():
    """The accumulator of the forward becomes `.grad`: scaled in place, never doubled."""
    query, key = (x.requires_grad_() for x in testing.inputs("random", 64, 64, 16))
    import fusedloss

    loss = fusedloss.info_nce(query, key, backend="chunked")
    accumulators = {g.data_ptr() for g in loss.grad_fn.next_functions[0][0].gradients if g is not None}
    loss.backward()
    assert {query.grad.data_ptr(), key.grad.data_ptr()} == accumulators


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["chunked", "triton", "cuda"])
def test_on_a_gpu_the_workspace_is_bounded(backend):
    import fusedloss

    def step(query, key):
        fusedloss.info_nce(query, key, temperature=0.05, normalize=True, backend=backend).backward()

    for n in (16384, 65536):
        query, key = (torch.randn(n, 64, device="cuda", requires_grad=True) for _ in range(2))
        gradients = 2 * query.numel() * 4
        assert measure.peak_memory(lambda q=query, k=key: step(q, k), "cuda") - gradients < 1100 * MIB


def family_memory(loss: str) -> int:
    """Of one step at N = 8192, whose logits are 256 MiB a matrix: workspaces take up to 180, as the heap is cut up."""
    import fusedloss

    x, y, gx, gy = (torch.randn(8192, 32) for _ in range(4))
    labels = torch.arange(8192) // 4
    calls = {
        "gist_embed": lambda q, k: fusedloss.gist_embed(q, k, guide=(gx, gy)),
        "nt_xent": lambda q, k: fusedloss.nt_xent(q, k),
        "sup_con": lambda q, k: fusedloss.sup_con(q, labels),
        "siglip": lambda q, k: fusedloss.siglip(q, k, 10.0, -10.0),
        "clip_distill": lambda q, k: fusedloss.clip_distill(q, k, 10.0, gx, gy, 5.0),
        "batch_hard_triplet": lambda q, k: fusedloss.batch_hard_triplet(q, labels),
        "batch_all_triplet": lambda q, k: fusedloss.batch_all_triplet(q, labels),
        "mega_batch_margin": lambda q, k: fusedloss.mega_batch_margin(q, k),
        "matryoshka": lambda q, k: fusedloss.matryoshka(fusedloss.info_nce, q, k, dims=(32, 16, 8)),
    }

    def step(query: torch.Tensor, key: torch.Tensor) -> None:
        calls[loss](query.requires_grad_(), key.requires_grad_()).backward()

    return measure.peak_memory(lambda: step(x, y))


@pytest.mark.skipif(sys.platform != "linux", reason="a CPU's peak can be reset on Linux only")
@pytest.mark.parametrize(
    "loss",
    [
        "gist_embed",
        "nt_xent",
        "sup_con",
        "siglip",
        "clip_distill",
        "batch_hard_triplet",
        "batch_all_triplet",
        "mega_batch_margin",
        "matryoshka",
    ],
)
def test_the_family_stays_under_one_matrix_of_logits(loss):
    assert measure.isolated(family_memory, loss) < 256 * MIB
