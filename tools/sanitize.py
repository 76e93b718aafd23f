"""Every kernel of csrc/ at small sizes with ragged edges: what `make gpu-sanitize` runs under compute-sanitizer.

A few seconds without it. What the kernels compute is for the tests to say; here it must be finite.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fusedloss
from fusedloss import masks, sweep, testing
from fusedloss.backends import cuda
from fusedloss.core.problem import Fold
from fusedloss.core.strips import RowSums
from fusedloss.losses._folded import fold_loss, fold_problem
from fusedloss.losses._options import Call

SHAPES = [(129, 140, 40), (70, 260, 33), (1, 7, 1)]  # M, N, D: a tile and one row, three stages of fp32, nearly nothing


@contextlib.contextmanager
def several_chunks() -> Iterator[None]:
    rows, sweep.chunks.chunk_rows = sweep.chunks.chunk_rows, lambda M, *_: min(M, 100)
    yield
    sweep.chunks.chunk_rows = rows


def losses(q: Tensor, k: Tensor, s: Tensor) -> dict[str, Callable[..., Tensor]]:
    """What they are called with beside the embeddings and the scale."""
    M, N, device = len(q), len(k), q.device
    kinds = [torch.arange(count, device=device) % 7 for count in (M, N)]
    every = masks.same_id(*kinds) & masks.score_margin(0.3) & (torch.rand(M, N, device=device) < 0.8)
    smoothed = {"mask": every, "label_smoothing": 0.1}
    fold = Fold("pair_hinge", (0.3, -1.0, 1.0), labels=(kinds[0], kinds[1]))  # pytorch-metric-learning's drop-in has it
    both = k[:M]
    return {
        "stats, grad and q": lambda q, k, s, **o: fusedloss.info_nce(q, k, temperature=1 / s, **o),
        "exp": lambda q, k, s, **o: fusedloss.info_nce(q, k, temperature=0.1, normalize=True, **o),
        "masks and smoothing": lambda q, k, s, **o: fusedloss.info_nce(q, k, temperature=1 / s, **smoothed, **o),
        "counts": lambda q, k, s, **o: fusedloss.info_nce(q, k, normalize=True, return_stats=True, **smoothed, **o)[0],
        "both ways": lambda q, k, s, **o: fusedloss.clip(q, k[:M], s, **o),
        "both ways, stored": lambda q, k, s, **o: fusedloss.clip(q, k[:M], 10.0, normalize=True, **o),
        "no gradient": lambda q, k, s, **o: (
            fusedloss.clip(q.detach(), both, s, reduction="none", **o).sum() + 0 * q.sum()
        ),
        "guide": lambda q, k, s, **o: fusedloss.gist_embed(q, k[:M], guide=(q.detach(), both), **o),
        "softcap": lambda q, k, s, **o: fusedloss.linear_cross_entropy(q, k, kinds[0] % N, softcap=6.0, **o),
        "maxima": lambda q, k, s, **o: fusedloss.mega_batch_margin(q, k[:M], **o),
        "maxima, both places": lambda q, k, s, **o: fusedloss.batch_hard_triplet(q, kinds[0], **o),
        "similarities": lambda q, k, s, **o: fusedloss.multi_similarity(q, kinds[0], **o),
        "sigmoid": lambda q, k, s, **o: fusedloss.siglip(q, k, s, -1.0, target=masks.same_id(*kinds), **o),
        "ranking": lambda q, k, s, **o: fusedloss.in_batch_margin_ranking(q, k, **o),
        "circle": lambda q, k, s, **o: fusedloss.circle(q, kinds[0], **o),
        "proxy anchor": lambda q, k, s, **o: fusedloss.proxy_anchor(q, kinds[0] % N, k, **o),
        "mean inside": lambda q, k, s, **o: fusedloss.sup_con(q, kinds[0], temperature=0.2, form="in", **o),
        "hinges": lambda q, k, s, backend: fold_loss(
            fold_problem([q, k], s, torch.ones(M, device=device), fold, Call()), Call("sum", backend)
        )[0],
    }


def everything(device: str) -> None:
    for number, (dtype, precision) in enumerate(
        [(torch.bfloat16, "highest"), (torch.float16, "highest"), (torch.float32, "highest"), (torch.float32, "high")]
    ):
        torch.set_float32_matmul_precision(precision)
        for M, N, D in SHAPES:
            q, k = (x.to(device) for x in testing.inputs("random", M, N, D, dtype))
            if number % 2:
                q = q.T.contiguous().T  # by columns
            scale = torch.tensor(5.0, device=device)
            with several_chunks():
                for name, loss in losses(q, k, scale).items():
                    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (q, k, scale)]
                    value = loss(*leaves, backend="cuda")
                    value.backward()
                    found = [value.detach(), *(t.grad for t in leaves if t.grad is not None)]
                    assert all(t.isfinite().all() for t in found), (name, dtype, precision, M, N, D)
    torch.set_float32_matmul_precision("highest")
    part = RowSums(torch.zeros(3, 130, device=device), torch.ones(3, 130, device=device))
    merged = cuda.merge(RowSums.empty(130, part.total[0]), part)  # a ring's
    assert (merged.total == 3).all()


if __name__ == "__main__":
    torch.manual_seed(0)
    everything("cuda")
    torch.cuda.synchronize()
    print("every kernel ran")
