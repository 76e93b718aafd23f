"""Losses of a labelled batch, and of classes that are vectors."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Ops, Rows, drawer, lse, mean_over_counted, products, root, softplus, unit_rows
from .draw import Draw
from .in_batch import PHI, given, one_hot, softmax, transform


def both(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positives (without a row itself) and negatives."""
    same = labels[:, None] == labels
    return same & ~torch.eye(len(labels), dtype=torch.bool), ~same


@drawer("sup_con", "multi_similarity", "circle")
def labelled(d: Draw, name: str) -> Case:
    N, D = d.rows(), d.dim()
    t = {"embeddings": d.embeddings(N, D, zeros=True), "labels": d.labels(N)}
    options: dict[str, Any] = {}
    temperature: float | Tensor = 0.1
    if name == "sup_con":
        temperature = d.parameter(d.log(0.01, 10))
        options["form"] = d.pick("out", "in")
        if options["form"] == "out" and d.chance(0.3):
            options["transform"] = d.pick(*PHI)
        if isinstance(temperature, Tensor):
            t["temperature"] = temperature
    elif name == "multi_similarity":
        options = d.some({"alpha": d.log(0.5, 10), "beta": d.log(1, 60), "base": d.real(-0.5, 1)})
    else:
        options = d.some({"m": d.real(-0.2, 0.6), "gamma": d.log(1, 256)})
    d.reduction(options)

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        s = products(v.embeddings, v.embeddings, True)
        positive, negative = both(v.labels)
        if name == "sup_con":
            z = s / (v.temperature.reshape(()) if isinstance(temperature, Tensor) else temperature)
            counted = positive.any(1)
            count = positive.sum(1).clamp(min=1)
            total = lse(z.masked_fill(~(positive | negative), -torch.inf))[:, None]
            log_p = torch.where(positive, z - torch.where(total.isfinite(), total, 0.0), 0.0)
            if options["form"] == "out":
                # The positives' part by itself, as in the formula: it and the logarithm are rounded apart.
                again = products(v.embeddings, v.embeddings, True)
                again = again / (v.temperature.reshape(()) if isinstance(temperature, Tensor) else temperature)
                own = torch.where(positive, again, 0.0).sum(1) / count
                losses = torch.where(counted, total[:, 0], 0.0) - own
            else:
                losses = count.log() - lse(log_p.masked_fill(~positive, -torch.inf))
            return mean_over_counted(transform(o, options, torch.where(counted, losses, 0.0)), counted)

        def log1p_sum(z: Tensor, where: Tensor) -> Tensor:
            return softplus(lse(z.masked_fill(~where, -torch.inf)))

        if name == "multi_similarity":
            alpha, beta, base = (options.get(n, x) for n, x in (("alpha", 2.0), ("beta", 50.0), ("base", 0.5)))
            pulled = log1p_sum(-alpha * (s - base), positive) / alpha
            return Rows(pulled + log1p_sum(beta * (s - base), negative) / beta)
        m, gamma = options.get("m", 0.4), options.get("gamma", 80.0)
        a_n, a_p = (s + m).relu().detach(), (1 + m - s).relu().detach()
        z_n = lse((gamma * a_n * (s - m)).masked_fill(~negative, -torch.inf))
        z_p = lse((-gamma * a_p * (s - 1 + m)).masked_fill(~positive, -torch.inf))
        has = positive.any(1) & negative.any(1)
        losses = softplus(torch.where(has, z_n + z_p, 0.0)).masked_fill(~has, 0.0)
        return Rows(losses, (losses.detach().float() > 0).sum())

    grads = tuple(n for n in ("embeddings", "temperature") if n in t and d.chance(0.9))
    return Case(
        name, d.dtype, t,
        lambda f, v, o: f(v["embeddings"], labels=v["labels"], **({"temperature": v.get("temperature", temperature)}
                                                                 if name == "sup_con" else {}), **given(o)),
        formula, grads, options, axes={"embeddings": ("row", None), "labels": ("row",)}, rows_axis="row",
        takes_group=name == "sup_con", traits={"embeddings": ("embeddings",), "ring": options.get("form") != "in"},
        module={"sup_con": "SupConLoss", "multi_similarity": "MultiSimilarityLoss", "circle": "CircleLoss"}[name],
    )  # fmt: skip


TRIPLETS = {
    "batch_all_triplet": "BatchAllTripletLoss", "batch_hard_triplet": "BatchHardTripletLoss",
    "batch_hard_soft_margin_triplet": "BatchHardSoftMarginTripletLoss",
    "batch_semi_hard_triplet": "BatchSemiHardTripletLoss",
}  # fmt: skip


@drawer(*TRIPLETS)
def triplets(d: Draw, name: str) -> Case:
    hard = "hard_" in name and "semi" not in name
    N, D = d.rows() if hard else min(d.rows(), 40), d.dim()
    options: dict[str, Any] = d.some(
        {"distance": d.pick("euclidean", "squared", "cosine"), "margin": d.real(-0.2, 3)}, 0.7
    )
    if "soft" in name:
        options.pop("margin", None)
    distance, margin = options.get("distance", "euclidean"), options.get("margin", 5.0)
    t = {"embeddings": d.embeddings(N, D, zeros=distance == "cosine"), "labels": d.labels(N)}
    if hard:
        d.reduction(options)

    def formula(o: Ops, v: SimpleNamespace) -> Rows | Tensor:
        x = v.embeddings
        if distance == "cosine":
            apart, size = 1 - products(x, x, True), torch.ones(())
        else:
            squared = (x[:, None] - x).square().sum(2)
            apart = squared if distance == "squared" else root(squared)
            n = x.detach().square().sum(1)
            size = n[:, None] + n if distance == "squared" else (n[:, None] + n).sqrt()
        if distance == "euclidean":
            apart = apart.masked_fill(torch.eye(N, dtype=torch.bool), 0.0)
        positive, negative = both(v.labels)
        if hard:
            none = torch.zeros(N, dtype=x.dtype)
            p = apart.masked_fill(~positive, -torch.inf)
            hp = torch.where(positive.any(1), p.gather(1, o.first_largest(p)[:, None])[:, 0].clamp(min=0), none)
            q = (-apart).masked_fill(~negative, -torch.inf)
            hn = -q.gather(1, o.first_largest(q)[:, None])[:, 0]
            difference = torch.where(negative.any(1), hp - torch.where(negative.any(1), hn, none), none)
            if "soft" in name:
                return Rows(torch.logaddexp(difference, torch.zeros_like(difference)))
            largest = size.max() if size.numel() else 0.0
            lost = o.kink(difference + margin, largest, where=negative.any(1))
            return Rows(lost)
        largest = size.max() if size.numel() else torch.zeros(())
        if distance == "cosine" and D == 1 and N > 1 and name == "batch_semi_hard_triplet":
            o.unclear += 1  # every distance is 0 or 2, and roundings of these decide which is the larger
        if name == "batch_all_triplet":
            valid = positive[:, :, None] & negative[:, None, :]
            lost = apart[:, :, None] - apart[:, None, :] + margin
            over = o.above(lost, torch.zeros_like(lost), largest, where=valid) & valid
            return torch.where(over, lost, 0.0).sum() / (over.sum() + 1e-16)
        if not bool(positive.any()):
            return (apart * 0).sum()
        # [i, j, k]: k is a negative of i, farther than j
        farther = (
            o.above(
                apart[:, None, :].expand(N, N, N),
                apart[:, :, None].expand(N, N, N),
                largest,
                where=positive[:, :, None] & negative[:, None, :],
            )
            & negative[:, None, :]
        )
        nearest = -(-apart[:, None, :].expand(N, N, N)).masked_fill(~farther, -torch.inf).amax(2)
        farthest = apart.masked_fill(~negative, -torch.inf).amax(1)
        fallback = torch.where(negative.any(1), farthest, apart.amin(1))[:, None]
        neg = torch.where(farther.any(2), nearest, fallback)
        lost = o.kink(apart - neg + margin, largest, where=positive)
        return torch.where(positive, lost, 0.0).sum() / positive.sum()

    x = t["embeddings"].double()
    close = 1.0
    if N > 1:
        n = x.square().sum(1)
        ratio = (x[:, None] - x).square().sum(2) / (n[:, None] + n).clamp(min=1e-300)
        close = ratio.masked_fill(torch.eye(N, dtype=torch.bool), 1.0).min().item()
    return Case(
        name, d.dtype, t, lambda f, v, o: f(v["embeddings"], labels=v["labels"], **o), formula,
        ("embeddings",) if d.chance(0.9) else (), options, reductions=("mean", "sum", "none") if hard else (),
        axes={"embeddings": ("row", None), "labels": ("row",)}, rows_axis="row", module=TRIPLETS[name],
        traits={"distance": distance, "close": close},
    )  # fmt: skip


@drawer("proxy_nca", "proxy_anchor", "arcface", "cosface")
def proxies(d: Draw, name: str) -> Case:
    B, D, C = d.rows(), d.dim(), d.rows()
    if name == "proxy_nca" and d.chance(0.03):
        B = 0
    vectors = "weight" if name in ("arcface", "cosface") else "proxies"
    ignore = d.pick(-100, -100, -1, 0) if name != "proxy_anchor" else None
    t = {"embeddings": d.embeddings(B, D, zeros=True), "target": d.indices(B, C, ignore),
         vectors: d.embeddings(C, D, zeros=True)}  # fmt: skip
    options: dict[str, Any] = {} if ignore in (None, -100) else {"ignore_index": ignore}
    scale: float | Tensor = 1.0
    if name == "proxy_nca":
        scale = d.parameter(d.log(0.1, 30))
        options |= d.some({"decoupled": d.chance(0.5)})
        if isinstance(scale, Tensor):
            t["scale"] = scale
    elif name == "proxy_anchor":
        options |= d.some({"margin": d.real(-0.3, 0.5), "alpha": d.log(0.5, 64)})
    else:
        options |= d.some({"margin": d.real(0, 1.5 if name == "arcface" else 0.6), "scale": d.log(0.5, 80)})
    d.reduction(options)
    columns = torch.arange(C)

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        s = products(v.embeddings, getattr(v, vectors), True)
        u, p = unit_rows(v.embeddings), unit_rows(getattr(v, vectors))
        if name == "proxy_anchor":
            alpha, margin = options.get("alpha", 32.0), options.get("margin", 0.1)
            mine = v.target == columns[:, None]
            pulled = softplus(lse((-alpha * (s.T - margin)).masked_fill(~mine, -torch.inf)))
            pushed = softplus(lse((alpha * (s.T + margin)).masked_fill(mine, -torch.inf)))
            return Rows(C / max(int(mine.any(1).sum()), 1) * pulled + pushed)
        counted = v.target != ignore
        target = v.target.masked_fill(~counted, 0)
        at = one_hot(target, C)
        if name == "proxy_nca":
            factor = v.scale.reshape(()) if isinstance(scale, Tensor) else scale
            # |u - p|^2 of what may be rows of zeros
            z = -factor * (u.square().sum(1)[:, None] + p.square().sum(1) - 2 * s)
            if options.get("decoupled"):
                if C == 1:
                    return mean_over_counted((z * 0).sum(1), counted)
                losses = lse(z.masked_fill(at, -torch.inf)) - z.gather(1, target[:, None])[:, 0]
                return mean_over_counted(losses, counted)
        else:
            factor = options.get("scale", 64.0)
            if name == "cosface":
                bent = s - options.get("margin", 0.35)
            else:
                margin = options.get("margin", 0.5)
                cosine = s.clamp(-1, 1)
                # From the sine, whose root is that of a difference: by vectors it keeps its digits.
                sine = root((u[:, None] - s[:, :, None] * p).square().sum(2))
                theta = torch.acos(cosine.detach())
                turned = s * math.cos(margin) - sine * math.sin(margin)
                bent = torch.where(theta + margin > math.pi, s - margin * math.sin(margin), turned)
                o.above((theta + margin)[at & counted[:, None]], torch.full((), math.pi, dtype=s.dtype), 1000.0)
                # Where a row is parallel to its class vector the direction of the sine's gradient is rounding.
                o.unclear += int((at & counted[:, None] & (sine < 1e-2)).sum())
            z = factor * torch.where(at, bent, s)
        return mean_over_counted(softmax(z, torch.ones_like(at), target, counted), counted)

    names = {"proxy_nca": "ProxyNCALoss", "proxy_anchor": "ProxyAnchorLoss", "arcface": "ArcFaceLoss",
             "cosface": "CosFaceLoss"}  # fmt: skip

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        more = {"scale": v.get("scale", scale)} if name == "proxy_nca" else {}
        return f(v["embeddings"], v["target"], v[vectors], **more, **o)

    zero = t[vectors].numel() and bool((t[vectors] == 0).all(1).any())
    return Case(
        name, d.dtype, t, call, formula, tuple(n for n in ("embeddings", vectors, "scale") if n in t and d.chance(0.9)),
        options, axes={"embeddings": ("row", None), "target": ("row",), vectors: ("column", None)},
        points={"target": "column"}, rows_axis="row" if name != "proxy_anchor" else "column",
        independent=None if name == "proxy_anchor" else "row", module=names[name], traits={"zero_vector": bool(zero)},
        counted=None if name == "proxy_anchor" else lambda o, v: v.target != ignore,
    )  # fmt: skip


@drawer("global_orthogonal_regularization")
def orthogonal(d: Draw) -> Case:
    B, D, count = d.rows(), d.dim(), d.whole(1, 3)
    options: dict[str, Any] = d.some(
        {
            "similarity": d.pick("cos", "dot"),
            "mean_weight": d.real(0, 2),
            "second_moment_weight": d.real(0, 2),
            "aggregation": d.pick("mean", "sum"),
        }
    )
    cosine = options.get("similarity", "cos") == "cos"
    names = [f"embeddings{i}" for i in range(count)]
    t = {n: d.embeddings(d.pick(B, d.rows()), D, zeros=cosine) for n in names}

    def formula(o: Ops, v: SimpleNamespace) -> Tensor:
        terms = []
        for n in names:
            x = getattr(v, n)
            pairs = len(x) * (len(x) - 1)
            if not pairs:
                terms.append((x * 0).sum())
                continue
            s = products(x, x, cosine).masked_fill(torch.eye(len(x), dtype=torch.bool), 0.0)
            first, second = s.sum() / pairs, s.square().sum() / pairs
            kept = o.kink(second - 1 / D, 1.0)
            terms.append(
                options.get("mean_weight", 1.0) * first.square() + options.get("second_moment_weight", 1.0) * kept
            )
        stacked = torch.stack(terms)
        return stacked.sum() if options.get("aggregation") == "sum" else stacked.mean()

    return Case(
        "global_orthogonal_regularization", d.dtype, t, lambda f, v, o: f(*(v[n] for n in names), **o), formula,
        tuple(n for n in names if d.chance(0.9)), options, reductions=(), backends=(),
        axes={n: (f"row{i}", None) for i, n in enumerate(names)}, module="GlobalOrthogonalRegularizationLoss",
        traits={"similarity": "cos" if cosine else "dot"},
    )  # fmt: skip
