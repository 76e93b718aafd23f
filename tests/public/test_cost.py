"""What `fusedloss.cost` says beside what a step takes: its workspace exactly, its peak nearly, its shares on paper."""

from __future__ import annotations

import pipeline_model as model
import pytest
import torch
from grids import one_of
from peaks import at_sizes, measured

import fusedloss
from fusedloss import costs, sweep
from fusedloss.bench import measure


def step(loss: str, n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs after a forward and backward; of nt_xent n rows in all."""
    rows = n // 2 if loss == "nt_xent" else n
    x, y = (torch.randn(rows, d).requires_grad_() for _ in range(2))
    if loss == "clip":
        value = fusedloss.clip(x, y, 20.0)
    elif loss == "gist_embed":
        value = fusedloss.gist_embed(x, y, guide=(x.detach(), y.detach()))
    elif loss == "linear_cross_entropy":
        value = fusedloss.linear_cross_entropy(x, y, torch.randint(n, (n,)))
    else:
        value = getattr(fusedloss, loss)(x, y)
    value.backward()
    return x, y


def beside_inputs(loss: str, size: tuple[int, int]) -> int:
    found: list[torch.Tensor] = []
    taken = measure.peak_memory(lambda: found.extend(step(loss, *size)))
    return taken - sum(t.nbytes + t.grad.nbytes for t in found if t.grad is not None)


@measured
@pytest.mark.parametrize("loss", one_of(costs.LOSSES))
def test_the_peak_of_a_step_on_a_cpu(loss):
    _, *taken = at_sizes(beside_inputs, loss, sizes=((64, 64), (8192, 64), (4096, 512)))
    said = [fusedloss.cost(loss, n, n, d).peak_bytes for n, d in ((8192, 64), (4096, 512))]
    assert said == pytest.approx(taken, rel=0.25)


@pytest.mark.parametrize("loss", sorted({*costs.LOSSES} - {"gist_embed"}))
def test_the_workspace_is_the_sweeps(loss, monkeypatch):
    sizes, fresh = [], sweep.chunks.fresh

    def recorded(like, shape, dtype=None):
        out = fresh(like, shape, dtype)
        sizes.append(out.nbytes)
        return out

    monkeypatch.setattr(sweep.chunks, "fresh", recorded)
    monkeypatch.setenv("FUSEDLOSS_BACKEND", "chunked")
    for n, workspace in ((1536, None), (1100, 1 << 20)):
        sizes.clear()
        with monkeypatch.context() as patch:
            if workspace:
                patch.setenv("FUSEDLOSS_WORKSPACE_BYTES", str(workspace))
            step(loss, n, 8)
            assert fusedloss.cost(loss, n, n, 8).workspace_bytes == max(sizes)


H200 = ("h200", torch.bfloat16)
EXPECTED = {  # mode and products of 65536 x 65536 in bf16, without and with a bound of the logits
    "info_nce": (("stats, then grad", 4), ("exp", 3)),
    "multiple_negatives_ranking": (("stats, then grad", 4), ("exp", 3)),
    "clip": (("symmetric", 4), ("symmetric", 4)),
    "nt_xent": (("half", 2.06), ("half", 2.06)),
    "gist_embed": (("stats, then grad", 12), ("exp", 9)),
    "linear_cross_entropy": (("stats, then grad", 4), ("exp", 3)),
}


@pytest.mark.parametrize("loss", EXPECTED)
def test_modes_and_work_on_a_gpu(loss):
    """As in the table of DESIGN.md, in products of 2 M N D; half by chunks is 4.12 M N D there."""
    size = 65536
    for bound, (mode, products) in zip((None, 20.0), EXPECTED[loss], strict=True):
        found = fusedloss.cost(loss, size, size, 768, torch.bfloat16, "h200", bound=bound)
        assert found.mode == mode and found.products == pytest.approx(products, abs=0.02)
        assert found.flops == 2 * found.products * size * size * 768
        assert found.workspace_bytes <= found.peak_bytes < 2 << 30
        assert found.seconds is not None and found.share is not None and 0 < found.share < 1
        assert found.seconds > found.flops / 794.5e12


def test_work_on_a_cpu():
    """`chunked` finds each row's maximum in the pass that stores, and half of the tiles at every size."""
    found = {loss: fusedloss.cost(loss, 8192, 8192, 64) for loss in costs.LOSSES}
    products = {"clip": 4, "gist_embed": 9, "nt_xent": 1 + 2 * 36 / 64}
    assert {loss: one.products for loss, one in found.items()} == {loss: products.get(loss, 3) for loss in found}
    assert all(one.seconds is None and one.share is None for one in found.values())


def test_stored_exponentials():
    clip = fusedloss.cost("clip", 8192, 8192, 768, torch.bfloat16, "h200", bound=20.0)
    views = fusedloss.cost("nt_xent", 16384, 16384, 768, torch.bfloat16, "h200", bound=2.0)
    assert (clip.mode, clip.products) == ("stored", 3)
    assert views.mode == "half, stored" and views.products == pytest.approx(3.33 / 2, abs=0.01)


def test_a_small_batch_is_dense_and_nothing_is_timed_on_a_cpu():
    small = fusedloss.cost("info_nce", 256, 256, 64)
    assert (small.mode, small.workspace_bytes, small.seconds) == ("dense", 0, None)
    assert fusedloss.cost("info_nce", 4096, 4096, 64).seconds is None
    assert fusedloss.cost("info_nce", 65536, 65536, 64, torch.float32, "h200").seconds is None


@pytest.mark.parametrize("name", costs.GPUS)
def test_shares_are_the_models(name):
    device = model.DEVICES[name]
    for mode, (a, b) in zip(costs.MODES, costs.FOLDS[name], strict=True):
        for D in (384, 1024):
            kernel = model.triton(device, mode, model.picked(device, mode, 8448, 65536, D))
            assert D / (a * D + b) == pytest.approx(model.share(kernel, device, D), rel=0.02), (mode, D)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("triplet", 8, 8, 8), "loss must be one of 'info_nce', .*, got 'triplet'"),
        (("info_nce", 0, 8, 8), "M must be at least 1, got 0"),
        (("clip", 8, 9, 8), "N must be M for clip, 8, got 9; both are its rows"),
        (("info_nce", 8, 8, 8, torch.int64), "dtype must be one of .*, got torch.int64; pass the embeddings' dtype"),
        (("info_nce", 8, 8, 8, torch.float32, "v100"), "device must be 'cpu', 'cuda' or one of .*, got 'v100'; pass"),
    ],
)
def test_what_a_mistake_is_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        fusedloss.cost(*arguments)
