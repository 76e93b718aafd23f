"""Losses without a sweep beside the torch expressions they replace, forward and backward, in one run.

    python benchmarks/rowwise.py --out benchmarks/results/rowwise.json
    python benchmarks/rowwise.py --family pairs --size 1048576            # one family, to the terminal
    python benchmarks/rowwise.py --device cuda --out benchmarks/results/gpu-rowwise.json

A size is the number of elements of the prediction (or of each embedding matrix). On a CPU the figures are the ratio of
both times, and below 2^20 elements their difference. On a GPU also the share of the rate at which the device copies,
for the bytes that the loss must move: `bytes` in a case; and torch.compile's time, and Liger's where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import fusedloss
from fusedloss.bench import measure, results, tables
from fusedloss.rowwise import classes as rowwise_classes

LARGE = 1 << 20  # from here on the ratio is asked for, below it the difference
SIZES = {"cpu": (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 23), "cuda": (1 << 16, 1 << 20, 1 << 24, 1 << 26)}
MOST_RATIO, MOST_EXTRA = 1.1, 30e-6


class Case(NamedTuple):
    """One loss: ours and torch's, functions of the same leaves; `bytes` moved by the least that a step can do."""

    name: str
    leaves: Sequence[Tensor]
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    bytes: int = 0
    liger: Callable[..., Tensor] | None = None


def normal(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def sigmoid_focal_loss(x: Tensor, t: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """As in torchvision.ops."""
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    p_t = p * t + (1 - p) * (1 - t)
    return ((alpha * t + (1 - alpha) * (1 - t)) * ce * (1 - p_t) ** gamma).mean()


def pointwise(size: int, device: str, dtype: torch.dtype) -> list[Case]:
    x = normal(size, device=device, dtype=dtype)
    score = normal(size, device=device, dtype=dtype, seed=1)
    label = (score > 1).to(dtype)
    weight = score.abs()
    logits = x.view(-1, min(size, 16))
    by_class = torch.rand(logits.shape[1], device=device, dtype=dtype) + 1
    bce, theirs = fusedloss.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits
    # Forward reads both and writes the derivative, backward reads that and writes the gradient.
    least = 5 * size * x.itemsize

    def asymmetric(x: Tensor) -> Tensor:
        return (torch.where(x < score, 5.0, 1.0) * F.mse_loss(x, score, reduction="none")).mean()

    return [
        Case("mse", [x], lambda x: fusedloss.mse(x, score), lambda x: F.mse_loss(x, score), least),
        Case("l1", [x], lambda x: fusedloss.l1(x, score), lambda x: F.l1_loss(x, score), least),
        Case("huber", [x], lambda x: fusedloss.huber(x, score), lambda x: F.huber_loss(x, score), least),
        Case("smooth_l1", [x], lambda x: fusedloss.smooth_l1(x, score), lambda x: F.smooth_l1_loss(x, score), least),
        Case(
            "mse, weight",
            [x],
            lambda x: fusedloss.mse(x, score, weight=weight),
            lambda x: F.mse_loss(x, score, weight=weight),
            least + size * x.itemsize,
        ),
        Case("mse, under", [x], lambda x: fusedloss.mse(x, score, under=5.0), asymmetric, least),
        Case(
            "mse, none",
            [x],
            lambda x: fusedloss.mse(x, score, reduction="none").sum(),
            lambda x: F.mse_loss(x, score, reduction="none").sum(),
            least + 3 * size * x.itemsize,
        ),
        Case("bce", [x], lambda x: bce(x, label), lambda x: theirs(x, label), least),
        Case(
            "bce, pos_weight",
            [logits],
            lambda x: bce(x, label.view_as(x), pos_weight=by_class),
            lambda x: theirs(x, label.view_as(x), pos_weight=by_class),
            least,
        ),
        Case(
            "focal",
            [x],
            lambda x: fusedloss.focal(x, label, alpha=0.25),
            lambda x: sigmoid_focal_loss(x, label),
            least,
        ),
        Case(
            "focal, gamma",
            [x],
            lambda x: fusedloss.focal(x, label, alpha=0.25, gamma=1.5),
            lambda x: sigmoid_focal_loss(x, label, gamma=1.5),
            least,
        ),
    ]


def classes(size: int, device: str, dtype: torch.dtype) -> list[Case]:
    item = torch.finfo(dtype).bits // 8
    cases = []

    def rows(name: str, C: int, ours: Callable[..., Tensor], theirs: Callable[..., Tensor], **more: object) -> None:
        """Logits are read, their gradient written."""
        M = max(1, size // C)
        x, target = normal(M, C, device=device, dtype=dtype), torch.arange(M, device=device) * 7919 % C
        liger = None if more.get("liger") is None else partial(more["liger"], target=target)
        own, torchs = partial(ours, target=target), partial(theirs, target=target)
        cases.append(Case(f"{name}, C = {C}", [x], own, torchs, 2 * M * C * item, liger))

    for C in (10, 100, 1000, 32000):
        rows("cross_entropy", C, fusedloss.cross_entropy, F.cross_entropy, liger=liger_cross_entropy())
    smoothed = {"label_smoothing": 0.1}
    rows(
        "cross_entropy, smoothed",
        1000,
        partial(fusedloss.cross_entropy, **smoothed),
        partial(F.cross_entropy, **smoothed),
    )
    for C in (10, 1000):
        rows("focal", C, rowwise_classes.focal_classes, focal_in_torch)

    N, S = max(1, size // (21 * 4096)), min(4096, max(1, size // 21))  # segmentation: 21 classes, 64 x 64 places
    x, target = normal(N, 21, S, device=device, dtype=dtype), torch.arange(N * S, device=device).view(N, S) * 7919 % 21
    cases.append(
        Case(
            "cross_entropy, [N, 21, 64 x 64]",
            [x],
            partial(fusedloss.cross_entropy, target=target),
            partial(F.cross_entropy, target=target),
            2 * x.numel() * item,
        )
    )
    M = max(1, size // 1000)
    x, share = normal(M, 1000, device=device, dtype=dtype), normal(M, 1000, device=device, dtype=dtype).softmax(1)
    own, torchs = partial(fusedloss.cross_entropy, target=share), partial(F.cross_entropy, target=share)
    cases.append(Case("cross_entropy, probabilities, C = 1000", [x], own, torchs, 3 * x.numel() * item))

    B, D = max(1, size // 768), 768
    u, v, weight = (normal(*shape, device=device, dtype=dtype) for shape in ((B, D), (B, D), (3, 3 * D)))
    labels = torch.arange(B, device=device) % 3

    def theirs(u: Tensor, v: Tensor, weight: Tensor) -> Tensor:  # sentence-transformers' SoftmaxLoss
        return F.cross_entropy(F.linear(torch.cat([u, v, (u - v).abs()], 1), weight), labels)

    pair = lambda u, v, weight: fusedloss.softmax_pair(u, v, weight, None, labels)
    # u and v are read twice, and their gradients written.
    cases.append(Case("softmax_pair", [u, v, weight / D**0.5], pair, theirs, 6 * B * D * item))
    return cases


def focal_in_torch(x: Tensor, target: Tensor) -> Tensor:
    """As users write it."""
    log_p = F.log_softmax(x, 1).gather(1, target[:, None])[:, 0]
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


def liger_cross_entropy() -> Callable[..., Tensor] | None:
    if importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available():
        return None
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy


def pairs(size: int, device: str, dtype: torch.dtype) -> list[Case]:
    """Beside what sentence-transformers 6.2.0 computes, D = 384."""
    rows = max(2, size // 384)
    a, b, c = (normal(rows, 384, device=device, dtype=dtype, seed=seed) for seed in range(3))
    label = torch.arange(rows, device=device) % 2
    gold = torch.rand(rows, generator=torch.Generator(device).manual_seed(3), device=device)
    teacher = normal(rows, 2, device=device, seed=4)

    def wide(*tensors: Tensor) -> list[Tensor]:
        return [x.float() if x.dtype.itemsize < 4 else x for x in tensors]

    def dot(x: Tensor, y: Tensor) -> Tensor:
        x, y = wide(x, y)
        return (x * y).sum(-1)

    def cos(x: Tensor, y: Tensor) -> Tensor:
        x, y = wide(x, y)
        return (F.normalize(x, dim=-1) * F.normalize(y, dim=-1)).sum(-1)

    def angle(x: Tensor, y: Tensor) -> Tensor:
        x, y = (F.normalize(t, dim=1) for t in wide(x, y))
        (x_lo, x_hi), (y_lo, y_hi) = x.chunk(2, dim=1), y.chunk(2, dim=1)
        return ((x * y).sum(1) + (x_hi * y_lo - x_lo * y_hi).sum(1)).abs()

    def euclidean(x: Tensor, y: Tensor) -> Tensor:
        x, y = wide(x, y)
        return torch.linalg.vector_norm(x - y, dim=-1)

    def contrastive(d: Tensor) -> Tensor:
        return (0.5 * (label.float() * d.pow(2) + (1 - label).float() * F.relu(0.5 - d).pow(2))).mean()

    def online(d: Tensor) -> Tensor:
        negatives, positives = d[label == 0], d[label == 1]
        pushed = negatives[negatives < (positives.max() if len(positives) else negatives.mean())]
        pulled = positives[positives > (negatives.min() if len(negatives) else positives.mean())]
        return pulled.pow(2).sum() + F.relu(0.5 - pushed).pow(2).sum()

    def ranked(scores: Tensor) -> Tensor:
        labels, order = gold.sort()
        z = 20.0 * scores[order]
        above = torch.searchsorted(labels, labels, right=True)
        suffix = torch.cat([torch.logcumsumexp(-z.flip(0), dim=0).flip(0), z.new_full((1,), -torch.inf)])
        return torch.cat([z.new_zeros(1), z + suffix[above]]).logsumexp(0)

    def kl(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        student = torch.stack([dot(x, y), dot(x, z)], dim=1)
        return F.kl_div((student / 4.0).log_softmax(1), (teacher / 4.0).softmax(1), reduction="batchmean") * 16.0

    def apart(x: Tensor, y: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(x, y)

    ones, two, three = [a], [a, b], [a, b, c]
    table: list[tuple[str, list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = [
        ("contrastive", two, lambda x, y: fusedloss.contrastive(x, y, label), lambda x, y: contrastive(apart(x, y))),
        (
            "contrastive, euclidean",
            two,
            lambda x, y: fusedloss.contrastive(x, y, label, distance="euclidean"),
            lambda x, y: contrastive(F.pairwise_distance(x, y)),
        ),
        (
            "contrastive, manhattan",
            two,
            lambda x, y: fusedloss.contrastive(x, y, label, distance="manhattan"),
            lambda x, y: contrastive(F.pairwise_distance(x, y, p=1)),
        ),
        (
            "online_contrastive",
            two,
            lambda x, y: fusedloss.online_contrastive(x, y, label),
            lambda x, y: online(apart(x, y)),
        ),
        (
            "triplet",
            three,
            lambda x, y, z: fusedloss.triplet(x, y, z),
            lambda x, y, z: F.relu(euclidean(x, y) - euclidean(x, z) + 5.0).mean(),
        ),
        (
            "triplet, cosine",
            three,
            lambda x, y, z: fusedloss.triplet(x, y, z, distance="cosine"),
            lambda x, y, z: F.relu((1 - cos(x, y)) - (1 - cos(x, z)) + 5.0).mean(),
        ),
        (
            "cosine_similarity",
            two,
            lambda x, y: fusedloss.cosine_similarity(x, y, gold),
            lambda x, y: F.mse_loss(F.cosine_similarity(x, y), gold.to(x.dtype)),
        ),
        (
            "contrastive_tension",
            two,
            lambda x, y: fusedloss.contrastive_tension(x, y, label),
            lambda x, y: F.binary_cross_entropy_with_logits(dot(x, y), label.float(), reduction="sum"),
        ),
        ("cosent", two, lambda x, y: fusedloss.cosent(x, y, gold), lambda x, y: ranked(cos(x, y))),
        ("angle", two, lambda x, y: fusedloss.angle(x, y, gold), lambda x, y: ranked(angle(x, y))),
        (
            "margin_mse",
            three,
            lambda x, y, z: fusedloss.margin_mse(x, y, z, label=gold),
            lambda x, y, z: F.mse_loss((dot(x, y) - dot(x, z))[:, None], gold[:, None]),
        ),
        (
            "distill_kl_div",
            three,
            lambda x, y, z: fusedloss.distill_kl_div(x, y, z, label=teacher, temperature=4.0),
            kl,
        ),
        ("embed_distill", ones, lambda x: fusedloss.embed_distill(x, b), lambda x: apart(x, b).mean()),
        (
            "embed_distill, mse",
            ones,
            lambda x: fusedloss.embed_distill(x, b, distance="mse"),
            lambda x: F.mse_loss(x, b),
        ),
        (
            "embed_distill, l2",
            ones,
            lambda x: fusedloss.embed_distill(x, b, distance="l2"),
            lambda x: torch.norm(x - b, dim=-1).mean(),
        ),
    ]
    itemsize = a.element_size()
    # Every matrix is read twice, every gradient written once.
    return [
        Case(name, leaves, ours, theirs, (2 * max(2, len(leaves)) + len(leaves)) * a.numel() * itemsize)
        for name, leaves, ours, theirs in table
    ]


def lists(size: int, device: str, dtype: torch.dtype) -> list[Case]:
    """Lists of 20 documents, of 100, and from 2^16 scores on of 1024; pairs of long lists only up to 2^16 scores."""
    import fusedloss

    cases = []
    for n in (20, 100, 1024):
        Q = size // n
        if not Q or (n == 1024 and size < 1 << 16):
            continue
        scores = normal(Q, n, device=device, dtype=dtype)
        labels = normal(Q, n, device=device, seed=1).mul_(2).round_().clamp_(0, 4)

        def case(name: str, ours: Callable, theirs: Callable, n: int = n, scores: Tensor = scores, **given) -> None:
            moved = scores.numel() * (2 * scores.itemsize + 4)  # scores and labels read, a gradient written
            cases.append(Case(f"{name}, n={n}", [scores], partial(ours, **given), partial(theirs, **given), moved))

        if size * n <= 1 << 26:
            case("lambda_loss", fusedloss.lambda_loss, eager_lambda_loss, labels=labels)
            case("lambda_loss k=10", fusedloss.lambda_loss, eager_lambda_loss, labels=labels, k=10)
            case("rank_net", fusedloss.rank_net, partial(eager_lambda_loss, weighted=False), labels=labels)
            case("adr_mse", fusedloss.adr_mse, eager_adr_mse, labels=labels)
        case("list_net", fusedloss.list_net, eager_list_net, labels=labels)
        case("list_mle", fusedloss.list_mle, eager_list_mle, labels=labels)
        case("plist_mle", fusedloss.plist_mle, partial(eager_list_mle, weighted=True), labels=labels)
    return cases


# What sentence-transformers 6.2.0 computes once it has put scores and labels into matrices without padding.


def eager_lambda_loss(scores: Tensor, labels: Tensor, k: int | None = None, weighted: bool = True) -> Tensor:
    """NDCG-Loss2++, or RankNet."""
    scores, n = scores.float(), scores.shape[1]
    z, order = scores.sort(descending=True, dim=-1)
    best = labels.sort(descending=True, dim=-1).values.clamp_(min=0.0)
    y = labels.gather(1, order)
    apart = y[:, :, None] - y[:, None, :]
    counts = torch.isfinite(apart) & (apart > 0)
    top = torch.zeros((n, n), dtype=torch.bool, device=scores.device)
    top[:k, :] = 1
    top[:, :k] = 1
    y.clamp_(min=0.0)
    place = torch.arange(1, n + 1, device=scores.device)
    discount = torch.log2(1.0 + place.float())[None, :]
    ideal = torch.sum(((torch.pow(2, best) - 1) / discount)[:, :k], dim=-1).clamp(min=1e-10)
    gain = (torch.pow(2, y) - 1) / ideal[:, None]
    if weighted:
        distance = torch.abs(place[:, None] - place[None, :])
        near = torch.abs(torch.pow(discount[0, distance - 1], -1.0) - torch.pow(discount[0, distance], -1.0))
        near.diagonal().zero_()
        near = near[None, :, :] * torch.abs(gain[:, :, None] - gain[:, None, :])
        far = torch.abs(torch.pow(discount[:, :, None], -1.0) - torch.pow(discount[:, None, :], -1.0))
        weights = 10.0 * near + far * torch.abs(gain[:, :, None] - gain[:, None, :])
    else:
        weights = torch.tensor(1.0, device=scores.device)
    differences = (z[:, :, None] - z[:, None, :]).clamp(min=-1e8, max=1e8)
    differences.masked_fill_(torch.isnan(differences), 0.0)
    losses = weights * F.logsigmoid(1.0 * differences) / math.log(2)
    chosen = losses[counts & top]
    return -chosen.sum() / max(chosen.numel(), 1)


def eager_adr_mse(scores: Tensor, labels: Tensor) -> Tensor:
    scores = scores.float()
    mask = torch.ones_like(scores, dtype=torch.bool)
    y_i, y_j, valid = labels.unsqueeze(2), labels.unsqueeze(1), mask.unsqueeze(1)
    greater = ((y_j > y_i) & valid).sum(dim=-1).float()
    equal = ((y_j == y_i) & valid).sum(dim=-1).float()
    true = greater + (equal + 1.0) / 2.0
    above = torch.sigmoid(scores.unsqueeze(1) - scores.unsqueeze(2)) * mask.unsqueeze(1).float()
    soft = 1.0 + above.sum(dim=2) - 0.5 * mask.float()
    loss = 1.0 / torch.log2(true + 1.0) * (true - soft) ** 2 * mask.float()
    return loss.sum() / mask.sum()


def eager_list_net(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores.float(), labels.softmax(dim=1))


def eager_list_mle(scores: Tensor, labels: Tensor, weighted: bool = False) -> Tensor:
    scores = scores.float()
    mask = torch.ones_like(scores, dtype=torch.bool)
    if not torch.any(mask):
        return torch.tensor(0.0, requires_grad=True)
    z = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    log_probs = scores - torch.flip(torch.logcumsumexp(torch.flip(z, [1]), dim=1), [1])
    if weighted:
        n = mask.sum(dim=1, keepdim=True)
        ranks = torch.arange(1, mask.size(1) + 1, device=mask.device).expand_as(mask)
        scale = (n - 127).clamp_min(0)
        weights = (torch.pow(2.0, n - ranks - scale) - torch.pow(2.0, -scale)) * mask
        log_probs = log_probs * (weights / (weights.sum(dim=1, keepdim=True) + 1e-10))
    log_probs[~mask] = 0.0
    losses = -torch.sum(log_probs, dim=1)
    if not torch.any(losses):
        return torch.tensor(0.0, requires_grad=True)
    return torch.mean(losses)


FAMILIES = {"pointwise": pointwise, "classes": classes, "pairs": pairs, "lists": lists}


def step(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Callable[[], None]:
    own = [x.detach().clone().requires_grad_() for x in leaves]

    def run() -> None:
        for leaf in own:
            leaf.grad = None
        function(*own).backward()

    return run


def compare(case: Case, rounds: int, compiled: bool) -> dict[str, float]:
    """Seconds of a step by whom, medians, and `ratio`: the median of the rounds' own ratios, which noise leaves alone.

    Short steps are repeated until a sample takes 5 ms. Before each sample its racer takes a step that is not timed: the
    first after another's step pays for pages that the allocator had given to that one, up to 1.9 times a step.
    """
    racers = {"ours": case.ours, "torch": case.theirs}
    if case.liger is not None:
        racers["liger"] = case.liger
    if compiled:
        racers["torch.compile"] = torch.compile(case.theirs)
    steps = {name: step(function, case.leaves) for name, function in racers.items()}
    repeats = {}
    for name, run in steps.items():
        run()
        run()
        began = time.perf_counter()
        run()
        measure.synchronize()
        repeats[name] = max(1, round(5e-3 / (time.perf_counter() - began)))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in sorted(steps, reverse=bool(number % 2)):
            steps[name]()
            measure.synchronize()
            began = time.perf_counter()
            for _ in range(repeats[name]):
                steps[name]()
            measure.synchronize()
            samples[name].append((time.perf_counter() - began) / repeats[name])
    found = {name: statistics.median(taken) for name, taken in samples.items()}
    found["ratio"] = statistics.median(a / b for a, b in zip(samples["ours"], samples["torch"], strict=True))
    return found


def copy_rate(device: str, size: int = 1 << 28) -> float:
    """Bytes read and written a second by a copy of 256 MiB."""
    x = torch.empty(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    best = float("inf")
    for _ in range(5):
        measure.synchronize()
        began = time.perf_counter()
        y.copy_(x)
        measure.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size / best


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--size", nargs="*", type=int, help="elements of the prediction")
    parser.add_argument("--loss", nargs="*", help="only cases whose name starts so")
    parser.add_argument("--device", default="cpu", choices=tuple(SIZES))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--compile", action="store_true", help="torch.compile's time, too (on CUDA always)")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    rate = copy_rate(options.device)
    rows: list[dict] = []
    with tables.progress() as tick:
        for size in options.size or SIZES[options.device]:
            for family in options.family:
                for case in FAMILIES[family](size, options.device, dtype):
                    if options.loss and not case.name.startswith(tuple(options.loss)):
                        continue
                    tick(f"{case.name}, {size} elements")
                    compiled = options.compile or options.device == "cuda"
                    found = compare(case, options.rounds, compiled)
                    share = case.bytes / found["ours"] / rate if case.bytes else None
                    rows.append({"family": family, "loss": case.name, "size": size, **found, "copy_share": share})
    table = []
    for row in rows:
        extra = row["ours"] - row["torch"]
        held = row["ratio"] <= MOST_RATIO if row["size"] >= LARGE else extra <= MOST_EXTRA or row["ratio"] <= MOST_RATIO
        row["held"] = held if options.device == "cpu" else None
        cells = (f"{row['ours'] * 1e6:.0f}", f"{row['torch'] * 1e6:.0f}", f"{row['ratio']:.2f}", f"{extra * 1e6:+.0f}")
        share = "" if row["copy_share"] is None else f"{row['copy_share']:.2f}"
        table.append([row["loss"], str(row["size"]), *cells, share, "" if held else "no"])
    columns = ["loss", "elements", "us", "torch, us", "ratio", "extra, us", "of the copy rate", "held"]
    tables.table(f"{options.dtype} on {options.device}, forward and backward", columns, table)
    if options.out:
        found = {"environment": results.environment(__file__), "dtype": options.dtype, "copy_rate": rate, "rows": rows}
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
