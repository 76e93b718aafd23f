"""What small.py measures: every loss beside the formula as users write it and the library's class, every drop-in beside
the class that it replaces."""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import rowwise
import torch
from drop_in import Model
from torch import Tensor, nn
from torch.nn import functional as F

import fusedloss

D = 384
CLASSES = 1000
DIMS = (384, 256, 128, 64)
ST = "sentence_transformers"
ROWS = (2, 8, 16, 64, 256, 1024)
LISTS = ((4, 8), (8, 16), (16, 32), (32, 64), (64, 100))
NO_LIMIT, CUBES_UP_TO = 1 << 62, 256
ELEMENTS = (1, 1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
Loss = Callable[..., Any]


class Race(NamedTuple):
    """Functions of the same leaves, and what else a racer's own module has gradients of."""

    leaves: list[Tensor]
    racers: dict[str, Loss]
    parameters: Mapping[str, list[Tensor]] = MappingProxyType({})


class Case(NamedTuple):
    """A loss, or a drop-in. `most`: the largest size at which what is replaced fits; it holds cubes of N."""

    family: str
    at: Callable[[Any], Race]
    most: int = NO_LIMIT


CASES: dict[str, Case] = {}


def case(name: str, family: str = "sweep", most: int = NO_LIMIT) -> Callable[[Callable[[Any], Race]], Callable]:
    def register(at: Callable[[Any], Race]) -> Callable[[Any], Race]:
        CASES[name] = Case(family, at, most)
        return at

    return register


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(n: int, seed: int) -> Tensor:
    return F.normalize(normal(n, D, seed=seed), dim=1)


def two(n: int) -> list[Tensor]:
    return [unit(n, 0), unit(n, 1)]


def pairs_of_labels(n: int) -> Tensor:
    """Two rows of each."""
    return torch.arange(n) // 2


# One matrix of similarities -------------------------------------------------------------------------------------------


def cross(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits)))


def cosines(x: Tensor, y: Tensor) -> Tensor:
    return F.normalize(x, dim=1) @ F.normalize(y, dim=1).T


@case("info_nce")
def info_nce(n: int) -> Race:
    return Race(two(n), {"fusedloss": fusedloss.info_nce, "eager": lambda q, k: cross(q @ k.T / 0.05)})


@case("info_nce, normalize")
def info_nce_normalize(n: int) -> Race:
    ours = partial(fusedloss.info_nce, normalize=True)
    return Race(two(n), {"fusedloss": ours, "eager": lambda q, k: cross(cosines(q, k) / 0.05)})


@case("multiple_negatives_ranking")
def multiple_negatives_ranking(n: int) -> Race:
    racers = {"fusedloss": fusedloss.multiple_negatives_ranking, "eager": lambda a, p: cross(20.0 * cosines(a, p))}
    return Race(two(n), racers | sentence_transformers("MultipleNegativesRankingLoss"))


ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


@case("multiple_negatives_ranking, directions")
def every_direction(n: int) -> Race:
    def eager(a: Tensor, p: Tensor) -> Tensor:
        a, p = F.normalize(a, dim=1), F.normalize(p, dim=1)
        own = torch.eye(len(a), dtype=torch.bool)
        across, same = 20.0 * a @ p.T, [(20.0 * x @ x.T).masked_fill(own, -torch.inf) for x in (a, p)]
        return cross(torch.cat([across, same[0], across.T, same[1]], dim=1))

    ours = partial(fusedloss.multiple_negatives_ranking, directions=ALL)
    racers = {"fusedloss": ours, "eager": eager}
    return Race(two(n), racers | sentence_transformers("MultipleNegativesRankingLoss", directions=ALL))


def both(logits: Tensor) -> Tensor:
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@case("clip")
def clip(n: int) -> Race:
    racers = {
        "fusedloss": lambda x, y, scale: fusedloss.clip(x, y, scale),
        "eager": lambda x, y, scale: both(scale * x @ y.T),
    }
    return Race([*two(n), torch.tensor(20.0)], racers | open_clip("ClipLoss"))


@case("siglip")
def siglip(n: int) -> Race:
    def eager(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        signs = 2 * torch.eye(len(x)) - 1
        return -F.logsigmoid(signs * (scale * x @ y.T + bias)).sum() / len(x)

    leaves = [*two(n), torch.tensor(10.0), torch.tensor(-10.0)]
    return Race(leaves, {"fusedloss": fusedloss.siglip, "eager": eager} | open_clip("SigLipLoss"))


@case("clip_distill")
def clip_distill(n: int) -> Race:
    teacher = [unit(n, 2), unit(n, 3)]

    def eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        own, given = scale * x @ y.T, 20.0 * teacher[0] @ teacher[1].T
        parts = [
            F.kl_div(a.log_softmax(1), b.softmax(1), reduction="batchmean") for a, b in ((own, given), (own.T, given.T))
        ]
        return (parts[0] + parts[1]) / 2

    ours = lambda x, y, scale: fusedloss.clip_distill(x, y, scale, *teacher, 20.0)
    return Race([*two(n), torch.tensor(10.0)], {"fusedloss": ours, "eager": eager})


@case("info_nce_distill")
def info_nce_distill(n: int) -> Race:
    teacher = [unit(n, 2), unit(n, 3)]

    def eager(x: Tensor, y: Tensor) -> Tensor:
        own, given = 20.0 * x @ y.T, 20.0 * teacher[0] @ teacher[1].T
        return F.kl_div(own.log_softmax(1), given.softmax(1), reduction="batchmean")

    return Race(two(n), {"fusedloss": lambda x, y: fusedloss.info_nce_distill(x, y, *teacher), "eager": eager})


@case("gist_embed")
def gist_embed(n: int) -> Race:
    guide = (normal(n, D, seed=7), normal(n, D, seed=8))

    def eager(a: Tensor, p: Tensor) -> Tensor:
        given = cosines(*guide)
        threshold = given.diagonal()[:, None]
        columns = [
            cosines(x, y).masked_fill(g > threshold, -torch.inf)
            for x, y, g in ((a, p, given), (a, a, cosines(guide[0], guide[0])), (p, p, cosines(guide[1], guide[1])))
        ]
        return cross(torch.cat(columns, dim=1) / 0.05)

    ours = lambda a, p: fusedloss.gist_embed(a, p, guide=guide, temperature=0.05)
    racers = {"fusedloss": ours, "eager": eager}
    if n <= CUBES_UP_TO:
        racers |= sentence_transformers("GISTEmbedLoss", guide=guide, temperature=0.05)
    return Race(two(n), racers)


def views(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits of both views without each with itself, and where each row's other view is."""
    n, z = len(z1), torch.cat([z1, z2])
    logits = (cosines(z, z) / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    return logits, (torch.arange(2 * n) + n) % (2 * n)


@case("nt_xent")
def nt_xent(n: int) -> Race:
    racers: dict[str, Loss] = {
        "fusedloss": fusedloss.nt_xent,
        "eager": lambda z1, z2: F.cross_entropy(*views(z1, z2, 0.5)),
    }
    return Race(two(n), racers | lightly("NTXentLoss", temperature=0.5))


@case("decoupled_contrastive")
def decoupled_contrastive(n: int) -> Race:
    def eager(z1: Tensor, z2: Tensor) -> Tensor:
        logits, other = views(z1, z2, 0.1)
        own = logits.gather(1, other[:, None])
        return (logits.scatter(1, other[:, None], -torch.inf).logsumexp(1) - own[:, 0]).mean()

    racers = {"fusedloss": fusedloss.decoupled_contrastive, "eager": eager}
    return Race(two(n), racers | lightly("DCLLoss", temperature=0.1))


def same_label(labels: Tensor) -> tuple[Tensor, Tensor]:
    """[N, N]: other rows of the row's label, and rows of other labels."""
    same = labels[:, None] == labels
    return same & ~torch.eye(len(labels), dtype=torch.bool), ~same


@case("sup_con")
def sup_con(n: int) -> Race:
    labels = pairs_of_labels(n)

    def eager(x: Tensor) -> Tensor:
        positive, _ = same_label(labels)
        logits = (cosines(x, x) / 0.1).masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)
        log_p = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(~positive, 0.0)
        return -(log_p.sum(1) / positive.sum(1)).mean()

    racers: dict[str, Loss] = {"fusedloss": lambda x: fusedloss.sup_con(x, labels), "eager": eager}
    return Race([unit(n, 0)], racers | metric_learning("SupConLoss", labels)[0])


@case("multi_similarity")
def multi_similarity(n: int) -> Race:
    labels = pairs_of_labels(n)

    def eager(x: Tensor) -> Tensor:
        positive, negative = same_label(labels)
        s = cosines(x, x) - 0.5
        near = torch.log1p((-2.0 * s).exp().masked_fill(~positive, 0.0).sum(1)) / 2.0
        far = torch.log1p((50.0 * s).exp().masked_fill(~negative, 0.0).sum(1)) / 50.0
        return (near + far).mean()

    racers: dict[str, Loss] = {"fusedloss": lambda x: fusedloss.multi_similarity(x, labels), "eager": eager}
    return Race([unit(n, 0)], racers | metric_learning("MultiSimilarityLoss", labels)[0])


@case("circle")
def circle(n: int) -> Race:
    labels = pairs_of_labels(n)

    def eager(x: Tensor) -> Tensor:
        positive, negative = same_label(labels)
        s = cosines(x, x)
        z_p = (-80.0 * F.relu(1.4 - s.detach()) * (s - 0.6)).masked_fill(~positive, -torch.inf)
        z_n = (80.0 * F.relu(s.detach() + 0.4) * (s - 0.4)).masked_fill(~negative, -torch.inf)
        counts = positive.any(1) & negative.any(1)
        losses = F.softplus(z_p.logsumexp(1) + z_n.logsumexp(1)).masked_fill(~counts, 0.0)
        return losses.sum() / (losses > 0).sum().clamp(min=1)

    racers: dict[str, Loss] = {"fusedloss": lambda x: fusedloss.circle(x, labels), "eager": eager}
    return Race([unit(n, 0)], racers | metric_learning("CircleLoss", labels)[0])


@case("mega_batch_margin")
def mega_batch_margin(n: int) -> Race:
    def eager(a: Tensor, p: Tensor) -> Tensor:
        s = cosines(a, p)
        hardest = s.masked_fill(torch.eye(len(a), dtype=torch.bool), -torch.inf).amax(1)
        return (F.relu(0.8 - s.diagonal()) + F.relu(hardest - 0.3)).mean()

    racers = {"fusedloss": fusedloss.mega_batch_margin, "eager": eager}
    return Race(two(n), racers | sentence_transformers("MegaBatchMarginLoss", use_mini_batched_version=False))


@case("in_batch_margin_ranking")
def in_batch_margin_ranking(n: int) -> Race:
    def eager(a: Tensor, p: Tensor) -> Tensor:
        s = cosines(a, p)
        hinge = F.relu(0.5 - s.diagonal()[:, None] + s).masked_fill(torch.eye(len(a), dtype=torch.bool), 0.0)
        return hinge.sum() / (len(a) * (len(a) - 1))

    return Race(two(n), {"fusedloss": fusedloss.in_batch_margin_ranking, "eager": eager})


@case("contrastive_tension_in_batch")
def contrastive_tension_in_batch(n: int) -> Race:
    ours = fusedloss.contrastive_tension_in_batch
    return Race(two(n), {"fusedloss": ours, "eager": lambda a, b: both(20.0 * cosines(a, b))})


@case("global_orthogonal_regularization")
def global_orthogonal_regularization(n: int) -> Race:
    def eager(*columns: Tensor) -> Tensor:
        losses = []
        for x in columns:
            s = cosines(x, x)[~torch.eye(len(x), dtype=torch.bool)]
            losses.append(s.mean().square() + F.relu(s.square().mean() - 1 / D))
        return torch.stack(losses).mean()

    racers = {"fusedloss": fusedloss.global_orthogonal_regularization, "eager": eager}
    return Race(two(n), racers | sentence_transformers("GlobalOrthogonalRegularizationLoss"))


@case("matryoshka")
def matryoshka(n: int) -> Race:
    ours = lambda q, k: fusedloss.matryoshka(fusedloss.multiple_negatives_ranking, q, k, dims=DIMS)
    eager = lambda q, k: sum(cross(20.0 * cosines(q[:, :d], k[:, :d])) for d in DIMS)
    return Race(two(n), {"fusedloss": ours, "eager": eager})


def layers(n: int) -> list[Tensor]:
    """Of both columns: the last, and one before it."""
    return [torch.stack([unit(n, seed), unit(n, seed + 2)]) for seed in range(2)]


def eager_layers(loss: Loss, q: Tensor, k: Tensor) -> Tensor:
    total = loss(q[-1], k[-1]) + loss(q[0], k[0])
    for x in (q, k):
        teacher = (x[-1].detach() / 0.3).softmax(1)
        student = (x[0] / 0.3).log_softmax(1)
        total = total + 0.3 * F.kl_div(student, teacher, reduction="sum") / (len(q[0]) + len(k[0]))
    return total


@case("adaptive_layer")
def adaptive_layer(n: int) -> Race:
    ours = lambda q, k: fusedloss.adaptive_layer(fusedloss.multiple_negatives_ranking, q, k, kl_temperature=0.3)
    eager = partial(eager_layers, lambda q, k: cross(20.0 * cosines(q, k)))
    return Race(layers(n), {"fusedloss": ours, "eager": eager})


@case("matryoshka_2d")
def matryoshka_2d(n: int) -> Race:
    ours = lambda q, k: fusedloss.matryoshka_2d(
        fusedloss.multiple_negatives_ranking, q, k, dims=DIMS, kl_temperature=0.3
    )
    eager = partial(eager_layers, lambda q, k: sum(cross(20.0 * cosines(q[:, :d], k[:, :d])) for d in DIMS))
    return Race(layers(n), {"fusedloss": ours, "eager": eager})


# Triplets within a batch, of euclidean distances as sentence-transformers computes them -------------------------------


def distances(x: Tensor) -> Tensor:
    dot = x @ x.T
    square = dot.diagonal()
    squared = F.relu(square[None] - 2.0 * dot + square[:, None])
    zero = (squared == 0).float()
    return (1.0 - zero) * torch.sqrt(squared + zero * 1e-16)


def mined(name: str, library: str, eager: Callable[[Tensor, Tensor], Tensor], most: int = NO_LIMIT) -> None:
    function = getattr(fusedloss, name)

    def at(n: int) -> Race:
        labels = pairs_of_labels(n)
        racers: dict[str, Loss] = {"fusedloss": lambda x: function(x, labels), "eager": lambda x: eager(x, labels)}
        return Race([normal(n, D)], racers | sentence_transformers(library, labels))

    CASES[name] = Case("sweep", at, most)


def hardest(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    d = distances(x)
    positive, negative = same_label(labels)
    far = (d * positive).amax(1)
    return far, (d + d.amax(1, keepdim=True) * ~negative).amin(1)


def batch_hard(x: Tensor, labels: Tensor) -> Tensor:
    far, near = hardest(x, labels)
    return F.relu(far - near + 5.0).mean()


def batch_hard_soft_margin(x: Tensor, labels: Tensor) -> Tensor:
    far, near = hardest(x, labels)
    return torch.log1p((far - near).exp()).mean()


def batch_all(x: Tensor, labels: Tensor) -> Tensor:
    d = distances(x)
    positive, negative = same_label(labels)
    losses = F.relu(d[:, :, None] - d[:, None, :] + 5.0) * (positive[:, :, None] & negative[:, None, :])
    return losses.sum() / ((losses > 1e-16).sum() + 1e-16)


def batch_semi_hard(x: Tensor, labels: Tensor) -> Tensor:
    """Of each pair the nearest negative that is farther than it, or else the farthest."""
    d = distances(x)
    positive, negative = same_label(labels)
    beyond = negative[:, None, :] & (d[:, None, :] > d[:, :, None])
    nearest = d[:, None, :].expand(beyond.shape).masked_fill(~beyond, torch.inf).amin(2)
    farthest = d.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
    chosen = torch.where(beyond.any(2), nearest, farthest)
    losses = F.relu(d - chosen + 5.0)[positive]
    return losses.mean()


mined("batch_hard_triplet", "BatchHardTripletLoss", batch_hard)
mined("batch_hard_soft_margin_triplet", "BatchHardSoftMarginTripletLoss", batch_hard_soft_margin)
mined("batch_all_triplet", "BatchAllTripletLoss", batch_all, most=CUBES_UP_TO)
mined("batch_semi_hard_triplet", "BatchSemiHardTripletLoss", batch_semi_hard, most=CUBES_UP_TO)


# Classes as columns ---------------------------------------------------------------------------------------------------


def targets(n: int, classes: int = CLASSES) -> Tensor:
    return torch.arange(n) * 7919 % classes


@case("linear_cross_entropy")
def linear_cross_entropy(n: int) -> Race:
    t = targets(n)
    ours = lambda x, w: fusedloss.linear_cross_entropy(x, w, t)
    racers: dict[str, Loss] = {"fusedloss": ours, "eager": lambda x, w: F.cross_entropy(x @ w.T, t)}
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13 has it
        racers["F.linear_cross_entropy"] = lambda x, w: F.linear_cross_entropy(x, w, t)
    return Race([normal(n, D), normal(CLASSES, D, seed=1) / D**0.5], racers)


def of_classes(name: str, library: str, eager: Callable[..., Tensor], **options: Any) -> None:
    function = getattr(fusedloss, name)

    def at(n: int) -> Race:
        t, weight = targets(n), normal(CLASSES, D, seed=1)
        found, module = metric_learning(library, t, num_classes=CLASSES, embedding_size=D)
        for parameter in module.parameters() if module is not None else ():
            parameter.data.copy_(weight if parameter.shape == weight.shape else weight.T)
        racers = {"fusedloss": lambda x, w: function(x, t, w, **options), "eager": lambda x, w: eager(x, t, w)}
        own = {racer: list(module.parameters()) for racer in found if module is not None}
        return Race([normal(n, D), weight], racers | found, own)

    CASES[name] = Case("sweep", at)


def eager_arcface(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    c, rows, margin = cosines(x, w), torch.arange(len(x)), math.radians(28.6)
    own = c[rows, t].clamp(-1 + 1e-7, 1 - 1e-7)
    angle = own.acos()
    turned = torch.where(angle <= math.pi - margin, (angle + margin).cos(), own - margin * math.sin(margin))
    return F.cross_entropy(64.0 * c.index_put((rows, t), turned), t)


def eager_cosface(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return F.cross_entropy(64.0 * (cosines(x, w) - 0.35 * F.one_hot(t, CLASSES)), t)


def eager_proxy_nca(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return F.cross_entropy(-torch.cdist(F.normalize(x, dim=1), F.normalize(w, dim=1)).square(), t)


def eager_proxy_anchor(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    s, positive = cosines(x, w), F.one_hot(t, CLASSES).bool()
    near = torch.log1p((-32.0 * (s - 0.1)).exp().masked_fill(~positive, 0.0).sum(0))
    far = torch.log1p((32.0 * (s + 0.1)).exp().masked_fill(positive, 0.0).sum(0))
    return near.sum() / positive.any(0).sum() + far.sum() / CLASSES


of_classes("arcface", "ArcFaceLoss", eager_arcface, margin=math.radians(28.6))
of_classes("cosface", "CosFaceLoss", eager_cosface)
of_classes("proxy_nca", "ProxyNCALoss", eager_proxy_nca)
of_classes("proxy_anchor", "ProxyAnchorLoss", eager_proxy_anchor)


# Rows, pairs, elements, lists: the expressions of rowwise.py ----------------------------------------------------------


def of_rows(name: str, classes: int, ours: Loss, eager: Loss) -> None:
    def at(n: int) -> Race:
        t = targets(n, classes)
        return Race([normal(n, classes)], {"fusedloss": partial(ours, target=t), "eager": partial(eager, target=t)})

    CASES[f"{name}, C = {classes}"] = Case("rows", at)


of_rows("cross_entropy", 10, fusedloss.cross_entropy, F.cross_entropy)
of_rows("cross_entropy", CLASSES, fusedloss.cross_entropy, F.cross_entropy)
of_rows("focal", CLASSES, fusedloss.focal, rowwise.focal_in_torch)


@case("softmax_pair", "rows")
def softmax_pair(n: int) -> Race:
    labels = torch.arange(n) % 3

    def eager(u: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(torch.cat([u, v, (u - v).abs()], 1), w), labels)

    ours = lambda u, v, w: fusedloss.softmax_pair(u, v, w, None, labels)
    return Race([normal(n, D), normal(n, D, seed=1), normal(3, 3 * D) / D**0.5], {"fusedloss": ours, "eager": eager})


def of_rowwise(family: str, cases: Callable[..., list[rowwise.Case]], per_size: int) -> None:
    """The cases of one of rowwise.py's families, by name."""

    def at(name: str, size: int) -> Race:
        found = next(c for c in cases(size * per_size, "cpu", torch.float32) if c.name == name)
        return Race(list(found.leaves), {"fusedloss": found.ours, "eager": found.theirs})

    for found in cases(2 * per_size, "cpu", torch.float32):
        CASES[found.name] = Case(family, partial(at, found.name))


of_rowwise("pairs", rowwise.pairs, D)
of_rowwise("elements", rowwise.pointwise, 1)


def grades(size: tuple[int, int]) -> Tensor:
    return normal(*size, seed=1).mul_(2).round_().clamp_(0, 4)


def of_lists(name: str, eager: Loss) -> None:
    function = getattr(fusedloss, name)

    def at(size: tuple[int, int]) -> Race:
        labels = grades(size)
        ours = lambda scores: function(scores, labels)
        return Race([normal(*size)], {"fusedloss": ours, "eager": lambda scores: eager(scores, labels)})

    CASES[name] = Case("lists", at)


of_lists("lambda_loss", rowwise.eager_lambda_loss)
of_lists("rank_net", partial(rowwise.eager_lambda_loss, weighted=False))
of_lists("adr_mse", rowwise.eager_adr_mse)
of_lists("list_net", rowwise.eager_list_net)
of_lists("list_mle", rowwise.eager_list_mle)
of_lists("plist_mle", partial(rowwise.eager_list_mle, weighted=True))


def eager_list_info_nce(scores: Tensor, labels: Tensor) -> Tensor:
    positive = labels > 0
    others = scores.masked_fill(positive, -torch.inf).logsumexp(1, keepdim=True)
    number = positive.sum(1)
    rows = (F.softplus(others - scores) * positive).sum(1) / number.clamp(min=1)
    return rows.sum() / (number > 0).sum()


def eager_list_circle(scores: Tensor, labels: Tensor, m: float = 0.4, gamma: float = 80.0) -> Tensor:
    positive, fixed = labels > 0, scores.detach()
    pull = -gamma * (1 + m - fixed).relu() * (scores - (1 - m))
    push = gamma * (fixed + m).relu() * (scores - m)
    both = positive.any(1) & ~positive.all(1)
    z = pull.masked_fill(~positive, -torch.inf).logsumexp(1) + push.masked_fill(positive, -torch.inf).logsumexp(1)
    return F.softplus(z[both]).sum() / both.sum()


of_lists("list_info_nce", eager_list_info_nce)
of_lists("list_circle", eager_list_circle)


# The libraries' classes, where they are installed: imported when they are measured ------------------------------------


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def total_of(value: Any) -> Tensor:
    """Some return a loss of several parts."""
    parts = list(value.values()) if isinstance(value, dict) else value
    return sum(parts) if isinstance(parts, list | tuple) else parts


class Encoder(Model):
    """What some constructors ask of a model."""

    device = torch.device("cpu")

    def get_embedding_dimension(self) -> int:
        return D


Guide = tuple[Tensor, ...] | None


def made(module: Any, name: str, guide: Guide = None, **options: Any) -> nn.Module:
    """The loss `name` of sentence-transformers, or ours, around a model that hands out what is there."""
    kind = getattr(module, name)
    if guide is None:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations are for the library's users
            return kind(Encoder(), **options)
    loss = kind.__new__(kind)  # the constructor of a guided one wants tokenizers
    nn.Module.__init__(loss)
    loss.model, loss.guide, loss.must_retokenize = Encoder(), Encoder("guide"), False
    loss.temperature, loss.margin_strategy, loss.margin = options.get("temperature", 0.01), "absolute", 0.0
    loss.contrast_anchors = loss.contrast_positives = True
    loss.gather_across_devices, loss.mini_batch_size = False, 32
    loss.mini_batch_num_tokens, loss.show_progress_bar = None, False
    loss.similarity_fct, loss.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
    return loss


def score_stage(loss: Any, labels: Any = None, guide: Guide = None) -> Loss:
    """From embeddings on."""
    if hasattr(loss, "calculate_loss"):  # it runs backward itself, from mini-batches to their leaves
        size = loss.mini_batch_size

        def cached(*columns: Tensor) -> Tensor:
            given = [[[*x.split(size)] for x in kind] for kind in ((columns, guide) if guide else (columns,))]
            return loss.calculate_loss(*given, *([] if guide else [None]), with_backward=True)

        return cached
    if hasattr(loss, "compute_loss_from_embeddings"):
        return lambda *columns: total_of(loss.compute_loss_from_embeddings(list(columns), labels))
    if guide:
        return lambda *columns: loss([{"own": x, "guide": g} for x, g in zip(columns, guide, strict=True)], labels)
    return lambda *columns: total_of(loss([{"own": x} for x in columns], labels))


def sentence_transformers(name: str, labels: Any = None, guide: Guide = None, **options: Any) -> dict[str, Loss]:
    if not installed("sentence_transformers"):
        return {}
    module = importlib.import_module(f"{ST}.sentence_transformer.losses")
    return {"sentence-transformers": score_stage(made(module, name, guide, **options), labels, guide)}


def open_clip(name: str) -> dict[str, Loss]:
    if not installed("open_clip"):
        return {}
    return {"open_clip": getattr(importlib.import_module("open_clip.loss"), name)()}


def lightly(name: str, **options: Any) -> dict[str, Loss]:
    if not installed("lightly"):
        return {}
    return {"lightly": getattr(importlib.import_module("lightly.loss"), name)(**options)}


def metric_learning(name: str, labels: Tensor, **options: Any) -> tuple[dict[str, Loss], Any]:
    if not installed("pytorch_metric_learning"):
        return {}, None
    loss = getattr(importlib.import_module("pytorch_metric_learning.losses"), name)(**options)
    return {"pytorch-metric-learning": lambda x, *_: loss(x, labels)}, loss


# Drop-ins beside the classes that they replace ------------------------------------------------------------------------

KINDS = {"": "sentence_transformer", ".sparse_encoder": "sparse_encoder", ".cross_encoder": "cross_encoder"}


def both_of(library: str) -> tuple[Any, Any]:
    """The modules of the drop-ins and of the library's classes."""
    own = importlib.import_module(f"fusedloss.integrations.{library}")
    kind = KINDS.get(library.removeprefix(ST))
    stock = {"open_clip": "open_clip.loss", "lightly": "lightly.loss"}.get(library, "pytorch_metric_learning.losses")
    return own, importlib.import_module(stock if kind is None else f"{ST}.{kind}.losses")


def drop_in(library: str, name: str, at: Callable[..., Race], *given: Any, lists: bool = False) -> None:
    """`at` makes the race of both modules, the class's name, what is given, and a size."""
    if installed(library.partition(".")[0]):
        made_at = lambda size: at(both_of(library), name, *given, size)
        full = f"{library}.{name}"
        CASES[full] = Case("drop-in lists" if lists else "drop-in", made_at, CUBES_UP_TO if full in CUBES else NO_LIMIT)


def beside(leaves: list[Tensor], losses: Any, steps: Any) -> Race:
    """Steps and modules of ours and of the library's, in this order."""
    parameters = [[*loss.parameters()] if isinstance(loss, nn.Module) else [] for loss in losses]
    names = ("fusedloss", "library")
    return Race(leaves, dict(zip(names, steps, strict=True)), dict(zip(names, parameters, strict=True)))


def numbers(n: int, *more: int) -> Tensor:
    return torch.rand((n, *more), generator=torch.Generator().manual_seed(9))


def in_two(n: int) -> Tensor:
    return torch.arange(n) % 2


def in_three(n: int) -> Tensor:
    return torch.arange(n) % 3


# Classes that hold [N, N, N] or [N, N, D]: at N = 1024 a tensor of floats takes 4 GiB, and a step minutes.
CUBES = (
    f"{ST}.GISTEmbedLoss",
    f"{ST}.CachedGISTEmbedLoss",
    f"{ST}.BatchAllTripletLoss",
    f"{ST}.BatchSemiHardTripletLoss",
    "pytorch_metric_learning.NTXentLoss",
    "pytorch_metric_learning.TripletMarginLoss",
)
# Columns, labels of a batch, options. A teacher is one for each column.
Given = tuple[int, Callable[[int], Any] | None, dict[str, Any]]
OF_SENTENCE_TRANSFORMERS: dict[str, Given] = {
    "MultipleNegativesRankingLoss": (2, None, {}),
    "MultipleNegativesSymmetricRankingLoss": (2, None, {}),
    "CachedMultipleNegativesRankingLoss": (2, None, {}),
    "CachedMultipleNegativesSymmetricRankingLoss": (2, None, {}),
    "GISTEmbedLoss": (2, None, {}),
    "CachedGISTEmbedLoss": (2, None, {}),
    "MegaBatchMarginLoss": (2, None, {"use_mini_batched_version": False}),
    "ContrastiveTensionLossInBatchNegatives": (1, None, {}),
    "GlobalOrthogonalRegularizationLoss": (2, None, {}),
    "BatchAllTripletLoss": (1, pairs_of_labels, {}),
    "BatchHardTripletLoss": (1, pairs_of_labels, {}),
    "BatchHardSoftMarginTripletLoss": (1, pairs_of_labels, {}),
    "BatchSemiHardTripletLoss": (1, pairs_of_labels, {}),
    "ContrastiveLoss": (2, in_two, {}),
    "OnlineContrastiveLoss": (2, in_two, {}),
    "ContrastiveTensionLoss": (2, in_two, {}),
    "CosineSimilarityLoss": (2, numbers, {}),
    "CoSENTLoss": (2, numbers, {}),
    "AnglELoss": (2, numbers, {}),
    "TripletLoss": (3, None, {}),
    "MarginMSELoss": (3, numbers, {}),
    "DistillKLDivLoss": (3, lambda n: numbers(n, 2), {}),
    "EmbedDistillLoss": (2, lambda n: [numbers(n, D)] * 2, {}),
    "MSELoss": (1, lambda n: [numbers(n, D)], {}),
    "SoftmaxLoss": (2, in_three, {"embedding_dimension": D, "num_labels": 3}),
}
OF_SPARSE_ENCODERS: dict[str, Given] = {
    "SparseMultipleNegativesRankingLoss": (2, None, {}),
    "SparseMarginMSELoss": (3, numbers, {}),
    "SparseDistillKLDivLoss": (3, lambda n: numbers(n, 2), {}),
    "SparseTripletLoss": (3, None, {}),
    "SparseCoSENTLoss": (2, numbers, {}),
    "SparseAnglELoss": (2, numbers, {}),
    "SparseCosineSimilarityLoss": (2, numbers, {}),
    "SparseMSELoss": (1, lambda n: [numbers(n, D)], {}),
}
# Columns, labels, scores of a pair.
OF_CROSS_ENCODERS: dict[str, tuple[int, Callable[[int], Any] | None, int]] = {
    "BinaryCrossEntropyLoss": (2, numbers, 1),
    "CrossEntropyLoss": (2, in_three, 3),
    "MSELoss": (2, numbers, 1),
    "MarginMSELoss": (3, numbers, 1),
    "MultipleNegativesRankingLoss": (2, None, 1),
    "CachedMultipleNegativesRankingLoss": (2, None, 1),
}
OF_LISTS = ("LambdaLoss", "RankNetLoss", "ADRMSELoss", "ListNetLoss", "ListMLELoss", "PListMLELoss")
OF_PAIRS = ("NTXentLoss", "SupConLoss", "MultiSimilarityLoss", "CircleLoss", "ContrastiveLoss", "TripletMarginLoss")
OF_CLASSES = ("ArcFaceLoss", "CosFaceLoss", "ProxyAnchorLoss", "ProxyNCALoss")
# Drop-ins that are not measured, and why.
LEFT_OUT = {
    "CrossBatchMemory": "a step leaves its memory changed",
    "DenoisingAutoEncoderLoss": "its stage is a decoder",
    "AdaptiveLayerLoss": "it runs a transformer's layers",
    "Matryoshka2dLoss": "it runs a transformer's layers",
    "CSRLoss": "it takes an autoencoder's outputs",
    "MultiVectorMultipleNegativesRankingLoss": "fused on a GPU alone",
    "CachedMultiVectorMultipleNegativesRankingLoss": "fused on a GPU alone",
    "MultiVectorDistillKLDivLoss": "fused on a GPU alone",
    "MultiVectorMarginMSELoss": "fused on a GPU alone",
}


def of_a_model(modules: tuple[Any, Any], name: str, given: Given, n: int) -> Race:
    columns, labels, options = given
    guide = (normal(n, D, seed=7), normal(n, D, seed=8)) if "GIST" in name else None
    losses = [made(module, name, guide, **options) for module in modules]
    steps = [score_stage(loss, labels and labels(n), guide) for loss in losses]
    return beside([normal(n, D, seed=i) for i in range(columns)], losses, steps)


def nested(modules: tuple[Any, Any], name: str, n: int) -> Race:
    losses = []
    for module in modules:
        inner = module.MultipleNegativesRankingLoss(Encoder())
        losses.append(getattr(module, name)(inner.model, inner, list(DIMS)))
    return beside([normal(n, D), normal(n, D, seed=1)], losses, [score_stage(loss) for loss in losses])


def reranker(rows: int, labels: int) -> nn.Module:
    from sentence_transformers.cross_encoder import CrossEncoder

    class Reranker(CrossEncoder):
        """Its scores are a parameter's rows, from the first document's number on."""

        device = torch.device("cpu")
        num_labels = labels

        def __init__(self) -> None:
            nn.Sequential.__init__(self)
            self.score = nn.Parameter(normal(rows, labels))

        def preprocess(self, pairs: Any, prompt: Any = None, task: Any = None) -> dict[str, Any]:
            return {"input_ids": torch.empty(len(pairs), 1), "start": int(pairs[0][1])}

        def forward(self, features: dict[str, Any]) -> dict[str, Tensor]:
            n = len(features["input_ids"])
            start = features["start"] % (len(self.score) - n + 1)
            return {"scores": self.score[start : start + n]}

    return Reranker()


def of_texts(modules: tuple[Any, Any], name: str, given: Any, n: int) -> Race:
    columns, labels, scores = given
    texts = [[str(column * n + row) for row in range(n)] for column in range(columns)]
    losses = [getattr(module, name)(reranker(6 * n, scores)) for module in modules]
    labels = labels and labels(n)
    return beside([], losses, [lambda loss=loss: loss(texts, labels) for loss in losses])


def of_lists_of_texts(modules: tuple[Any, Any], name: str, size: tuple[int, int]) -> Race:
    q, n = size
    texts = [[str(i) for i in range(q)], [[str(i * n + j) for j in range(n)] for i in range(q)]]
    labels = list(grades(size))
    losses = [getattr(module, name)(reranker(q * n, 1)) for module in modules]
    return beside([], losses, [lambda loss=loss: loss(texts, labels) for loss in losses])


def of_images(modules: tuple[Any, Any], name: str, n: int) -> Race:
    weights = {"caption_loss_weight": 1.0, "clip_loss_weight": 1.0} if name == "CoCaLoss" else {}
    leaves, fixed = [*two(n), torch.tensor(20.0)], {}
    if name == "SigLipLoss":
        fixed = {"logit_bias": torch.tensor(-10.0)}
    if name == "CoCaLoss":
        leaves, fixed = [*leaves, normal(n, 8, 100)], {"labels": targets(8 * n, 100).view(n, 8)}
    if name == "DistillClipLoss":
        teacher = {"dist_image_features": unit(n, 2), "dist_text_features": unit(n, 3)}
        fixed = {**teacher, "dist_logit_scale": 20.0}

    def step(loss: Any, x: Tensor, y: Tensor, scale: Tensor, *logits: Tensor) -> Tensor:
        more = {"logits": logits[0]} if logits else {}
        return total_of(loss(image_features=x, text_features=y, logit_scale=scale, **more, **fixed))

    losses = [getattr(module, name)(**weights) for module in modules]
    return beside(leaves, losses, [partial(step, loss) for loss in losses])


def of_views(modules: tuple[Any, Any], name: str, n: int) -> Race:
    losses = [getattr(module, name)() for module in modules]
    return beside(two(n), losses, losses)


def labelled(modules: tuple[Any, Any], name: str, n: int) -> Race:
    options = {"num_classes": CLASSES, "embedding_size": D} if name in OF_CLASSES else {}
    labels = targets(n) if options else pairs_of_labels(n)
    losses = []
    for module in modules:
        torch.manual_seed(1)
        losses.append(getattr(module, name)(**options))
    return beside([normal(n, D)], losses, [lambda x, loss=loss: loss(x, labels) for loss in losses])


for name, given in OF_SENTENCE_TRANSFORMERS.items():
    drop_in(ST, name, of_a_model, given)
drop_in(ST, "MatryoshkaLoss", nested)
for name, given in OF_SPARSE_ENCODERS.items():
    drop_in(f"{ST}.sparse_encoder", name, of_a_model, given)
for name, texts in OF_CROSS_ENCODERS.items():
    drop_in(f"{ST}.cross_encoder", name, of_texts, texts)
for name in OF_LISTS:
    drop_in(f"{ST}.cross_encoder", name, of_lists_of_texts, lists=True)
for name in ("ClipLoss", "SigLipLoss", "CoCaLoss", "DistillClipLoss"):
    drop_in("open_clip", name, of_images)
for name in ("NTXentLoss", "DCLLoss", "DCLWLoss"):
    drop_in("lightly", name, of_views)
for name in (*OF_PAIRS, *OF_CLASSES):
    drop_in("pytorch_metric_learning", name, labelled)
