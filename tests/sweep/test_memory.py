"""Memory as growth: what a step needs on top of inputs and gradients must not grow with M x N."""

from __future__ import annotations

import pytest
import torch
from grids import one_of
from peaks import MIB, at_sizes, growth, measured

from fusedloss import testing
from fusedloss.bench import measure
from fusedloss.bench.race import Point, memory


def peak_of(racer: str, loss: str, n: int) -> int:
    return memory(Point(loss=loss, n=n, d=32), racer)


@measured
@pytest.mark.parametrize("loss", one_of(["info_nce", "clip", "multiple_negatives_ranking"]))
def test_sixteen_times_the_logits_fit_the_same_bound(loss):
    """Logits of 64 MiB and of 1 GiB: the workspace of 64 MiB and its tiles, and what has a number for each row."""
    few, some, many = at_sizes(peak_of, "fusedloss", loss, sizes=(64, 4096, 16384))
    assert many - some < 64 * MIB and many - few < 128 * MIB, (few, some, many)


@pytest.mark.slow
@measured
def test_the_yardstick_sees_the_logits_of_eager():
    """The same measurement on eager must find its three [N, N] matrices, or the test above could not fail."""
    assert growth(peak_of, "eager", "info_nce", sizes=(64, 4096)) > 0.6 * Point(n=4096, d=32).eager_bytes


def test_gradients_are_not_copied_on_their_way_out():
    """The accumulator of the forward becomes `.grad`: scaled in place, never doubled."""
    query, key = (x.requires_grad_() for x in testing.inputs("random", 64, 64, 16))
    import fusedloss

    loss = fusedloss.info_nce(query, key, backend="chunked")
    accumulators = {g.data_ptr() for g in loss.grad_fn.gradients if g is not None}
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


def family_memory(loss: str, n: int) -> int:
    import fusedloss

    x, y, gx, gy = (torch.randn(n, 32) for _ in range(4))
    labels = torch.arange(n) // 4
    calls = {
        "gist_embed": lambda q, k: fusedloss.gist_embed(q, k, guide=(gx, gy)),
        "nt_xent": lambda q, k: fusedloss.nt_xent(q, k),
        "sup_con": lambda q, k: fusedloss.sup_con(q, labels),
        "siglip": lambda q, k: fusedloss.siglip(q, k, 10.0, -10.0),
        "clip_distill": lambda q, k: fusedloss.clip_distill(q, k, 10.0, gx, gy, 5.0),
        "info_nce_distill": lambda q, k: fusedloss.info_nce_distill(
            q, k, gx, gy, normalize=True, mask=fusedloss.masks.same_id(labels, labels)
        ),
        "batch_hard_triplet": lambda q, k: fusedloss.batch_hard_triplet(q, labels),
        "batch_all_triplet": lambda q, k: fusedloss.batch_all_triplet(q, labels),
        "mega_batch_margin": lambda q, k: fusedloss.mega_batch_margin(q, k),
        "matryoshka": lambda q, k: fusedloss.matryoshka(fusedloss.info_nce, q, k, dims=(32, 16, 8)),
    }

    def step(query: torch.Tensor, key: torch.Tensor) -> None:
        calls[loss](query.requires_grad_(), key.requires_grad_()).backward()

    return measure.peak_memory(lambda: step(x, y))


@measured
@pytest.mark.parametrize(
    "loss",
    one_of(
        [
            "gist_embed",
            "nt_xent",
            "sup_con",
            "siglip",
            "clip_distill",
            "info_nce_distill",
            "batch_hard_triplet",
            "batch_all_triplet",
            "mega_batch_margin",
            "matryoshka",
        ]
    ),
)
def test_the_family_stays_under_one_matrix_of_logits(loss):
    """At N = 8192 a matrix of logits is 256 MiB."""
    assert growth(family_memory, loss, sizes=(64, 8192)) < 256 * MIB


# What stands beside a small workspace as N grows, in sizes of the inputs: docs/memory.md.
BESIDE = {
    "info_nce, normalized": 0.25,
    "multiple_negatives_ranking": 0.25,
    "nt_xent": 1.25,  # both views, one behind the other
    "sup_con": 1.25,  # the gradient of its positive part
    "batch_hard_triplet": 1.25,  # the gradient by the nearest negatives
}
WIDE = 512


def beside_a_small_workspace(loss: str, n: int) -> int:
    """Of two matrices with n columns of similarities, or of one; without their gradients."""
    import fusedloss

    x, y = (torch.randn(n // 2 if loss == "nt_xent" else n, WIDE).requires_grad_() for _ in range(2))
    z, labels = torch.randn(n, WIDE).requires_grad_(), torch.arange(n) // 4
    small = {"workspace_bytes": 1 << 20}
    calls = {
        "info_nce, normalized": lambda: fusedloss.info_nce(x, y, normalize=True, **small),
        "multiple_negatives_ranking": lambda: fusedloss.multiple_negatives_ranking(x, y, **small),
        "nt_xent": lambda: fusedloss.nt_xent(x, y, **small),
        "sup_con": lambda: fusedloss.sup_con(z, labels, **small),
        "batch_hard_triplet": lambda: fusedloss.batch_hard_triplet(z, labels, **small),
    }
    taken = measure.peak_memory(lambda: calls[loss]().backward())
    return taken - sum(t.grad.nbytes for t in (x, y, z) if t.grad is not None)


@measured
@pytest.mark.parametrize("loss", one_of(BESIDE))
def test_what_stands_beside_a_small_workspace(loss):
    """Never more than one and a half times what a loss is given, and of most nothing that grows with N x D."""
    sizes = (2048, 4096)  # a tile has 2048 columns at most
    inputs = (sizes[1] - sizes[0]) * WIDE * 4 * (2 if BESIDE[loss] < 1 else 1)
    assert growth(beside_a_small_workspace, loss, sizes=sizes) <= BESIDE[loss] * inputs
