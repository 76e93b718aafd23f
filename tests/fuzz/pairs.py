"""Losses of pairs, triplets and teachers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .cases import Case, Ops, Rows, drawer, length, lse, root, softplus
from .draw import REAL, Draw


def cosines(x: Tensor, y: Tensor, eps: float = 1e-12) -> Tensor:
    return (x * y).sum(1) / (length(x, eps) * length(y, eps))


def angles(x: Tensor, y: Tensor) -> Tensor:
    """AnglE: dims i and i + ceil(D / 2) of a unit row are one complex number; |Re + Im| of the sum of x conj(y)."""
    half = (x.shape[1] + 1) // 2
    over = length(x) * length(y)
    pad = [0, 2 * half - x.shape[1]]
    x, y = F.pad(x, pad), F.pad(y, pad)
    a, b, c, e = x[:, :half], x[:, half:], y[:, :half], y[:, half:]
    return (((a * c + b * e).sum(1) + (b * c - a * e).sum(1)) / over).abs()


def similarity(name: str, x: Tensor, y: Tensor) -> Tensor:
    if name == "dot":
        return (x * y).sum(1)
    if name == "cos":
        return cosines(x, y)
    if name == "angle":
        return angles(x, y)
    return -root((x - y).square().sum(1)) if name == "euclidean" else -(x - y).abs().sum(1)


def distance(name: str, x: Tensor, y: Tensor, eps: float, cosine_eps: float) -> Tensor:
    if name == "cosine":
        return 1 - cosines(x, y, cosine_eps)
    apart = x - y + eps
    return root(apart.square().sum(1)) if name == "euclidean" else apart.abs().sum(1)


def sizes(*x: Tensor) -> Tensor:
    return sum(v.detach().abs().sum(1) for v in x) + 1


def pair(d: Draw, zeros: bool = False, duplicates: bool = True) -> dict[str, Tensor]:
    B, D = d.rows(), d.dim()
    if d.chance(0.04):
        B = 0
    t = {n: d.embeddings(B, D, zeros=zeros, duplicates=duplicates) for n in ("a", "b")}
    if B and d.chance(0.1):
        t["b"] = d.lay(t["a"].clone())  # equal rows
    return t


def label(d: Draw, x: Tensor, *dtypes: torch.dtype) -> Tensor:
    dtype = d.pick(*(dtypes or REAL))
    return d.lay(x.round().to(dtype) if not dtype.is_floating_point else x.to(dtype))


@drawer("contrastive", "online_contrastive", "cosine_similarity", "contrastive_tension")
def pairs(d: Draw, name: str) -> Case:
    options: dict[str, Any] = {}
    far = d.pick("cosine", "euclidean", "manhattan")
    if "contrastive" in name and "tension" not in name:
        options = d.some({"distance": far, "margin": d.real(0, 2)})
    far, margin = options.get("distance", "cosine"), options.get("margin", 0.5)
    t = pair(d, zeros=far == "cosine" and name != "contrastive_tension")
    B = len(t["a"])
    shares = d.uniform(0, 1, B)
    if name != "cosine_similarity" or d.chance(0.3):
        shares = (shares < d.pick(0.0, 0.5, 0.5, 1.0)).double()
    t["label"] = label(d, shares)
    transform, loss = None, None
    if name == "cosine_similarity":
        transform = d.pick(None, None, "sigmoid")
        loss = d.pick(None, None, "l1")
    if name != "online_contrastive" and loss is None:
        d.reduction(options)
    default = "sum" if name == "contrastive_tension" else "mean"

    def formula(o: Ops, v: SimpleNamespace) -> Rows | Tensor:
        y = v.label.double()
        if name == "contrastive_tension":
            dots = (v.a * v.b).sum(1)
            return Rows(softplus(dots) - y * dots)
        if name == "cosine_similarity":
            s = cosines(v.a, v.b, 1e-8)
            s = s.sigmoid() if transform else s
            if loss:
                o.above(s, y, 1.0)
                return (s - y).abs().mean()
            return Rows((s - y).square())
        apart = distance(far, v.a, v.b, 1e-6, 1e-8)
        size = 1.0 if far == "cosine" else sizes(v.a, v.b)
        pushed = o.kink(margin - apart, size, where=y != 1).square()
        if name == "contrastive":
            return Rows((y * apart.square() + (1 - y) * pushed) / 2)
        one, zero = y == 1, y == 0
        if not B:
            return (apart * 0).sum()
        fixed = apart.detach()
        near = fixed[zero].min() if bool(zero.any()) else fixed[one].mean() if bool(one.any()) else fixed.sum() * 0
        farthest = fixed[one].max() if bool(one.any()) else fixed[zero].mean() if bool(zero.any()) else fixed.sum() * 0
        size = torch.as_tensor(size).max()
        hard_one = one & o.above(apart, near.expand(B), size, where=one)
        hard_zero = zero & o.above(farthest.expand(B), apart, size, where=zero)
        # Other pairs that are as far, and a mean of equal numbers: a rounding decides.
        ties = (one & ((fixed - near).abs() <= 64 * o.unit * size)) | (
            zero & ((fixed - farthest).abs() <= 64 * o.unit * size)
        )
        o.unclear += int(ties.sum())
        return (apart.square() * hard_one).sum() + (pushed * hard_zero).sum()

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        more: dict[str, Any] = {}
        if transform:
            more["transform"] = torch.nn.Sigmoid()
        if loss:
            more["loss"] = torch.nn.L1Loss()
        return f(v["a"], v["b"], v["label"], **more, **o)

    module = {"contrastive": "ContrastiveLoss", "online_contrastive": "OnlineContrastiveLoss",
              "cosine_similarity": "CosineSimilarityLoss", "contrastive_tension": "ContrastiveTensionLoss"}  # fmt: skip
    rows = name != "online_contrastive" and loss is None
    if loss and not B:
        return pairs(d, name)
    return Case(
        name, d.dtype, t, call, formula, tuple(n for n in ("a", "b") if d.chance(0.9)), options,
        reductions=("mean", "sum", "none") if rows else (), default_reduction=default,
        axes={"a": ("row", None), "b": ("row", None), "label": ("row",)}, rows_axis="row",
        independent="row" if rows else None, module=None if transform or loss else module[name],
        traits={"distance": far},
    )  # fmt: skip


SIMILARITIES = ("cos", "dot", "angle", "euclidean", "manhattan")


@drawer("cosent", "angle")
def cosent(d: Draw, name: str) -> Case:
    kind = d.pick(*SIMILARITIES) if name == "cosent" else "angle"
    t = pair(d, zeros=kind in ("cos", "angle"))
    B, D = t["a"].shape
    scale = d.parameter(d.log(0.1, 60))
    options = {"similarity": kind} if name == "cosent" and (kind != "cos" or d.chance(0.5)) else {}
    count = d.pick(0, 0, 1, 2) if name == "angle" else 0
    others = [f"negative{i}" for i in range(count)]
    t |= {n: d.embeddings(B, D, zeros=True) for n in others}
    gold = d.uniform(0, 1, B) if d.chance(0.6) else d.integers(0, d.pick(1, 2, 5), B).double()
    if not count or d.chance(0.5):
        t["score"] = label(d, gold)
    if isinstance(scale, Tensor):
        t["scale"] = scale

    def formula(o: Ops, v: SimpleNamespace) -> Tensor:
        s = torch.cat([similarity(kind, v.a, getattr(v, n)) for n in ("b", *others)])
        s = s * (v.scale.reshape(()) if isinstance(scale, Tensor) else scale)
        if kind == "angle":  # |x| at 0
            o.unclear += int((s.detach().abs() < 1e-4).sum())
        gold = v.score if "score" in t else torch.ones(B, dtype=torch.float64)
        # Only compared: as it was given.
        gold = t["score"].double() if "score" in t else gold
        if count:
            gold = torch.cat([gold, *([1 - gold] * count)])
            if "score" in t and t["score"].dtype.is_floating_point and t["score"].dtype != torch.float64:
                gold = torch.cat([t["score"], *([1 - t["score"]] * count)]).double()
        pair = gold[:, None] < gold
        z = (s[:, None] - s).masked_fill(~pair, -torch.inf).flatten()
        return softplus(lse(z))

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        more = {"scale": v.get("scale", scale)}
        if count:
            if "score" in v:
                more["label"] = v["score"]
            return f(v["a"], v["b"], *(v[n] for n in others), **more, **o)
        return f(v["a"], v["b"], score=v["score"], **more, **o)

    names = ("a", "b", *others)
    axes: dict[str, tuple[str | None, ...]] = {n: ("row", None) for n in names}
    return Case(
        name, d.dtype, t, call, formula, tuple(n for n in (*names, "scale") if n in t and d.chance(0.9)), options,
        reductions=(), axes={**axes, "score": ("row",)}, module="CoSENTLoss" if name == "cosent" else "AnglELoss",
        traits={"embeddings": ("a", "b") if not count else None, "similarity": kind},
    )  # fmt: skip


@drawer("triplet")
def triplet(d: Draw) -> Case:
    options: dict[str, Any] = d.some(
        {"distance": d.pick("euclidean", "cosine", "manhattan"), "margin": d.real(-1, 3)}, 0.7
    )
    far = options.get("distance", "euclidean")
    t = pair(d, zeros=far == "cosine")
    names = ("anchor", "positive", "negative")
    B, D = t["a"].shape
    t = dict(zip(names, (t["a"], t["b"], d.embeddings(B, D, zeros=far == "cosine")), strict=True))
    d.reduction(options)

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        near, other = (distance(far, v.anchor, x, 0.0, 1e-12) for x in (v.positive, v.negative))
        size = 1.0 if far == "cosine" else sizes(v.anchor, v.positive, v.negative)
        return Rows(o.kink(near - other + options.get("margin", 5.0), size))

    return Case(
        "triplet", d.dtype, t, lambda f, v, o: f(*(v[n] for n in names), **o), formula,
        tuple(n for n in names if d.chance(0.9)), options, axes={n: ("row", None) for n in names}, rows_axis="row",
        independent="row", module="TripletLoss", traits={"distance": far},
    )  # fmt: skip


@drawer("margin_mse", "distill_kl_div")
def teachers(d: Draw, name: str) -> Case:
    kind = d.pick(*SIMILARITIES)
    options: dict[str, Any] = {"similarity": kind} if kind != "dot" or d.chance(0.5) else {}
    B, D, K = d.rows(), d.dim(), d.whole(1, 4)
    if d.chance(0.04):
        B = 0
    zeros = kind in ("cos", "angle")
    names = ("query", "positive", *(f"negative{i}" for i in range(K)))
    t = {n: d.embeddings(B, D, zeros=zeros) for n in names}
    margins = name == "margin_mse"
    shape = d.pick((B, K + 1), (B, K), *([(B,)] if K == 1 else [])) if margins else (B, K + 1)
    gold = d.normal(*shape) * d.pick(1, 5)
    if not margins and d.chance(0.1) and B:
        gold[0, 0] = -torch.inf
        t["label"] = d.lay(gold.to(torch.float32))
    else:
        t["label"] = label(d, gold, torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int8)
    over: dict[str, float | Tensor] = {}
    if not margins:
        over = d.some({n: d.parameter(d.log(0.1, 5)) for n in
                       ("temperature", "student_temperature", "teacher_temperature")})  # fmt: skip
        t |= {n: x for n, x in over.items() if isinstance(x, Tensor)}
    d.reduction(options)

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        s = torch.stack([similarity(kind, v.query, getattr(v, n)) for n in names[1:]], 1)
        if kind == "angle":
            o.unclear += int((s.detach() < 1e-4).sum())
        gold = v.label.double()
        if margins:
            if shape == (B, K + 1):
                gold = gold[:, :1] - gold[:, 1:]
            return Rows((s[:, :1] - s[:, 1:] - gold.reshape(B, K)).square().mean(1))
        both = v.temperature.reshape(()) if "temperature" in t else over.get("temperature", 1.0)
        student, teacher = (
            getattr(v, n).reshape(()) if n in t else over.get(n, both)
            for n in ("student_temperature", "teacher_temperature")
        )
        log_p = s / student - lse(s / student)[:, None]
        log_q = gold / teacher - lse(gold / teacher)[:, None]
        q = log_q.exp()
        terms = q * torch.where(q > 0, torch.where(q > 0, log_q, 0.0) - log_p, 0.0)
        return Rows(student**2 * terms.sum(1))

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        return f(*(v[n] for n in names), label=v["label"], **{n: v.get(n, x) for n, x in over.items()}, **o)

    learnt = [n for n in over if n in t]
    row: tuple[str | None, ...] = ("row", None)
    return Case(
        name, d.dtype, t, call, formula, tuple(n for n in (*names, *learnt) if d.chance(0.9)), options,
        axes={**{n: row for n in names}, "label": row[: t["label"].dim()]}, rows_axis="row", independent="row",
        module="MarginMSELoss" if margins else "DistillKLDivLoss", traits={"similarity": kind},
    )  # fmt: skip


@drawer("embed_distill")
def embed_distill(d: Draw) -> Case:
    kind = d.pick("cosine", "mse", "l2")
    options: dict[str, Any] = {"distance": kind} if kind != "cosine" or d.chance(0.5) else {}
    B, D, columns = d.rows(), d.dim(), d.pick(1, 1, 2, 3)
    if d.chance(0.04):
        B = 0
    projected = d.chance(0.3)
    T = d.dim() if projected else D
    names = [f"student{i}" for i in range(columns)]
    t = {n: d.embeddings(B, D, zeros=kind == "cosine") for n in names}
    dtype = d.pick(d.dtype, torch.float32, torch.float64, torch.bfloat16)
    form = d.pick("one", "stacked", "list")
    if form == "stacked":
        t["teacher"] = d.lay(d.normal(B, columns, T).to(dtype))
    else:
        t |= {f"teacher{i}": d.embeddings(B, T, zeros=kind == "cosine", dtype=dtype)
              for i in range(columns if form == "list" else 1)}  # fmt: skip
    if projected:
        t["projection"] = d.lay(d.normal(T, D).to(d.dtype))
    d.reduction(options)

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        found = []
        for i, n in enumerate(names):
            x = getattr(v, n)
            x = x @ v.projection.T if projected else x
            y = (v.teacher[:, i] if form == "stacked" else getattr(v, f"teacher{i if form == 'list' else 0}")).detach()
            found.append(1 - cosines(x, y, 1e-8) if kind == "cosine" else (x - y).square().mean(1) if kind == "mse"
                         else root((x - y).square().sum(1)))  # fmt: skip
        return Rows(torch.stack(found).mean(0))

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        given = [v[n] for n in names]
        teacher: Any = v["teacher"] if form == "stacked" else v["teacher0"]
        if form == "list":
            teacher = [v[f"teacher{i}"] for i in range(columns)]
        more = {"projection": v["projection"]} if projected else {}
        return f(given[0] if columns == 1 else given, teacher, **more, **o)

    axes: dict[str, tuple[str | None, ...]] = {n: ("row", None) for n in names}
    axes |= {n: ("row",) + (None,) * (x.dim() - 1) for n, x in t.items() if n.startswith("teacher")}
    return Case(
        "embed_distill", d.dtype, t, call, formula,
        tuple(n for n in (*names, "projection") if n in t and d.chance(0.9)), options, axes=axes, rows_axis="row",
        independent="row", module=None if projected else "EmbedDistillLoss", traits={"projected": projected},
    )  # fmt: skip
