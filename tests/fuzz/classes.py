"""Logits, linear layers, and errors of numbers: cross-entropy, focal, regression."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Ops, Rows, drawer, lse, softplus
from .draw import Draw
from .in_batch import PHI, given, transform


def cross_entropies(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore: int,
    smoothing: float,
    z_loss: float,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses without the z term, the z term, what the mean of the losses is over) of `[R, C]` logits."""
    R, C = z.shape
    w = torch.ones(C, dtype=z.dtype) if weight is None else weight
    present = torch.ones(C, dtype=torch.bool) if present is None else present
    total = lse(z)
    if target.dtype.is_floating_point:
        share = (1 - smoothing) * target + smoothing / C
        losses = (share * w * (total[:, None] - z)).sum(1)
        return losses, z_loss * total.square(), torch.full((), float(R), dtype=z.dtype)
    counted = target != ignore
    index = target.masked_fill(~counted, 0)
    own = w[index] * (total - z.gather(1, index[:, None])[:, 0])
    spread = torch.where(present, w * (total[:, None] - torch.where(present, z, 0.0)), 0.0).sum(1) / present.sum()
    losses = (1 - smoothing) * own + smoothing * spread
    over = torch.where(counted, w[index], 0.0).sum()
    return torch.where(counted, losses, 0.0), torch.where(counted, z_loss * total.square(), 0.0), over.detach()


def logits(d: Draw, *shape: int) -> Tensor:
    z = d.normal(*shape) * d.pick(1, 1, 5, 30, 0.01)
    if d.chance(0.1):
        z = z.round()  # ties
    return z


def class_weight(d: Draw, C: int) -> Tensor:
    weight = d.uniform(0.1, 2, C)
    if d.chance(0.3) and C > 1:
        weight[d.whole(0, C - 1)] = 0
    return weight


@drawer("cross_entropy")
def cross_entropy(d: Draw) -> Case:
    C, N = d.dim(), d.rows()
    shape = d.pick((N, C), (N, C), (N, C), (C,), (min(N, 8), C, 3), (min(N, 5), C, 2, 3))
    rows = shape[:-1] if len(shape) < 3 else (shape[0], *shape[2:])
    t = {"input": d.lay(logits(d, *shape).to(d.dtype))}
    ignore = d.pick(-100, -100, -1, 0)
    probabilities = d.chance(0.3)
    options: dict[str, Any] = d.some({"label_smoothing": d.pick(0.1, 0.7), "z_loss": d.pick(1e-4, 0.1),
                                      "softcap": d.log(1, 50)}, 0.3)  # fmt: skip
    if probabilities:
        ignore = -100
        t["target"] = d.lay(d.normal(*shape).softmax(0 if len(shape) == 1 else 1).to(d.dtype))
    else:
        if ignore != -100:
            options["ignore_index"] = ignore
        count = 1
        for n in rows:
            count *= n
        t["target"] = d.lay(d.indices(count, C, ignore).contiguous().view(rows))
    if d.chance(0.4):
        t["weight"] = d.lay(class_weight(d, C).to(d.dtype))
    d.reduction(options)

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        z, target = v.input, v.target
        z = z[None] if z.dim() == 1 else z.movedim(1, -1).reshape(-1, C)
        if probabilities:
            target = target[None] if target.dim() == 1 else target.movedim(1, -1).reshape(-1, C)
        else:
            target = target.reshape(-1)
        if "softcap" in options:
            z = options["softcap"] * (z / options["softcap"]).tanh()
        z_loss, smoothing = options.get("z_loss", 0.0), options.get("label_smoothing", 0.0)
        losses, squares, over = cross_entropies(z, target, getattr(v, "weight", None), ignore, smoothing, z_loss)
        counted = len(losses) if probabilities else int((target != ignore).sum())
        # Of nothing NaN, with a gradient of 0.
        empty = float(over) == 0
        mean = losses.sum() / (1.0 if empty else over) + (squares.sum() / max(counted, 1) if z_loss else 0.0)
        mean = 0.0 * mean + float("nan") if empty else mean
        return Rows((losses + squares).reshape(rows), mean=mean)

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        return f(v["input"], v["target"], **({"weight": v["weight"]} if "weight" in v else {}), **o)

    flat = len(shape) == 2
    return Case(
        "cross_entropy", d.dtype, t, call, formula, ("input",) if d.chance(0.95) else (), options,
        axes={"input": ("row", None), "target": ("row", None)[: 2 if probabilities else 1]} if flat else {},
        rows_axis="row", result_dtype=d.dtype, module="CrossEntropyLoss",
        traits={"in_constructor": ("weight",), "probabilities": probabilities},
    )  # fmt: skip


@drawer("linear_cross_entropy")
def linear_cross_entropy(d: Draw) -> Case:
    N, D, C = d.rows(), d.dim(), d.rows()
    if d.chance(0.03):
        N = 0
    lead = d.pick((N,), (N,), (2, N), ())
    t = {"input": d.embeddings(N, D), "linear_weight": d.embeddings(C, D)}
    if lead == ():
        t["input"] = d.lay(d.normal(D).to(d.dtype))
    elif len(lead) == 2:
        t["input"] = d.lay(d.normal(2, N, D).to(d.dtype))
    ignore = d.pick(None, -100, -1, 0)
    count = 1
    for n in lead:
        count *= n
    target = d.indices(count, C, -100 if ignore is None else ignore).contiguous()
    options: dict[str, Any] = {} if ignore is None else {"ignore_index": ignore}
    left = -100 if ignore is None else ignore
    options |= d.some({"compact": d.pick(True, False), "label_smoothing": d.pick(0.1, 0.7)}, 0.3)
    smoothing = options.get("label_smoothing", 0.0)
    weighted = d.chance(0.35)
    if not (weighted and smoothing):
        options |= d.some({"softcap": d.log(1, 50), "z_loss": d.pick(1e-4, 0.1)}, 0.25)
    if weighted:
        t["weight"] = d.vector(class_weight(d, C))
    if d.chance(0.5):
        bias = d.normal(C)
        if not (weighted and smoothing) and d.chance(0.3) and C > 1:
            gone = d.whole(0, C - 1)
            other = (gone + 1) % C if (gone + 1) % C != left else (gone + 2) % C
            if other != gone:
                bias[gone] = -torch.inf
                target = torch.where((target == gone) & (target != left), other, target)
        t["linear_bias"] = d.vector(bias)
    t["target"] = d.lay(target.view(lead))
    d.reduction(options)
    if not smoothing and not options.get("z_loss") and d.chance(0.25):
        options["transform"] = d.pick(*PHI)
    options |= d.some({"temperature": d.log(0.3, 3)}, 0.3)
    bonus = d.pick(0.0, 0.0, 0.0, 0.5)  # of each row's entropy, beside the loss

    def logits_of(v: SimpleNamespace) -> Tensor:
        z = v.input.reshape(-1, D) @ v.linear_weight.T
        present = torch.ones(C, dtype=torch.bool)
        if "linear_bias" in t:
            present = v.linear_bias > -torch.inf
            z = z + torch.where(present, v.linear_bias, 0.0)
        cap = options.get("softcap")
        if cap:
            z = cap * (z / cap).tanh()
        return (z / options.get("temperature", 1.0)).masked_fill(~present, -torch.inf)

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        z = logits_of(v)
        present = v.linear_bias > -torch.inf if "linear_bias" in t else torch.ones(C, dtype=torch.bool)
        index, weight = v.target.reshape(-1), getattr(v, "weight", None)
        phi = "transform" in options  # before the weight
        losses, squares, over = cross_entropies(z, index, None if phi else weight, left, smoothing,
                                                options.get("z_loss", 0.0), present)  # fmt: skip
        counted = index != left
        of_target = torch.ones_like(losses) if weight is None else weight[index.masked_fill(~counted, 0)]
        if phi:
            losses = torch.where(counted, of_target * transform(o, options, losses), 0.0)
            over = torch.where(counted, of_target, 0.0).sum().detach()
        losses = losses + squares * of_target
        log_p = torch.where(present, torch.where(present, z, 0.0) - lse(z)[:, None], 0.0)
        entropy = torch.where(counted, -torch.where(present, log_p.exp() * log_p, 0.0).sum(1), 0.0)
        if not bonus:
            return Rows(losses.reshape(lead), over, float("nan"))
        total = losses.sum()
        mean = total * 0 + float("nan") if float(over) == 0 else total / over
        return Rows((losses + bonus * entropy).reshape(lead), mean=mean + bonus * entropy.sum())

    def stats(o: Ops, v: SimpleNamespace) -> dict[str, Tensor]:
        z = logits_of(v)
        index, counted = v.target.reshape(-1), v.target.reshape(-1) != left
        own = z.gather(1, index.masked_fill(~counted, 0)[:, None])
        at = torch.arange(C) == index[:, None]
        above = o.above(z, own.expand_as(z), 1.0, where=counted[:, None] & ~at)
        return {"correct": (~(above & ~at).any(1) & counted).double().sum()}

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        tensors = {n: v[n] for n in ("linear_bias", "weight") if n in v}
        if not bonus:
            return f(v["input"], v["linear_weight"], v["target"], **tensors, **given(o))
        more = tensors | {"return_stats": True, "entropy_gradient": True} | given(o)
        loss, found = f(v["input"], v["linear_weight"], v["target"], **more)
        entropy = bonus * found.entropy
        entropy = entropy if o.get("reduction") == "none" else entropy.sum()
        return loss + entropy, SimpleNamespace(correct=found.correct.double().sum())

    return Case(
        "linear_cross_entropy", d.dtype, t, call, formula,
        tuple(n for n in ("input", "linear_weight", "linear_bias") if n in t and d.chance(0.9)), options,
        axes={"input": ("row", None), "target": ("row",), "linear_weight": ("column", None), "linear_bias": ("column",),
              "weight": ("column",)} if len(lead) == 1 else {}, points={"target": "column"}, rows_axis="row",
        independent="row" if len(lead) == 1 and not bonus else None, counted=lambda o, v: v.target != left,
        stats=stats if bonus else None,
        module=None if bonus else "LinearCrossEntropyLoss",
        traits={"weighted": weighted, "empty_is_nan": True},
    )  # fmt: skip


@drawer("softmax_pair")
def softmax_pair(d: Draw) -> Case:
    B, D, C = d.rows(), d.dim(), d.whole(1, 9)
    if d.chance(0.03):
        B = 0
    listed = [n for n in ("difference", "rep", "multiplication") if d.chance(0.6)] or ["rep"]
    parts = [n for n in ("rep", "difference", "multiplication") if n in listed]
    width = D * (len(parts) + ("rep" in parts))
    t = {"u": d.embeddings(B, D), "v": d.embeddings(B, D), "weight": d.lay(d.normal(C, width).to(d.dtype))}
    if d.chance(0.7):
        t["bias"] = d.lay(d.normal(C).to(d.dtype))
    options: dict[str, Any] = {"concatenation": tuple(listed)}
    if parts == ["rep", "difference"] and d.chance(0.5):
        options = {}
    options |= d.some({"label_smoothing": d.pick(0.1, 0.7)}, 0.3)
    ignore, kind = -100, d.pick("classes", "classes", "probabilities", "none")
    if kind == "classes":
        ignore = d.pick(-100, -1, 0)
        options |= {} if ignore == -100 else {"ignore_index": ignore}
        t["target"] = d.indices(B, C, ignore)
    elif kind == "probabilities":
        t["target"] = d.lay(d.normal(B, C).softmax(1).to(d.dtype))
    else:
        options.pop("label_smoothing", None)
    if kind != "none":
        if d.chance(0.3):
            t["class_weight"] = d.lay(class_weight(d, C).to(d.dtype))
        d.reduction(options)

    def formula(o: Ops, x: SimpleNamespace) -> Rows | Tensor:
        apart = x.u - x.v
        pieces = {"rep": [x.u, x.v], "difference": [apart.abs()], "multiplication": [x.u * x.v]}
        z = torch.cat([y for n in parts for y in pieces[n]], 1) @ x.weight.T
        z = z + x.bias if "bias" in t else z
        if kind == "none":
            return z
        losses, _, over = cross_entropies(z, x.target, getattr(x, "class_weight", None), ignore,
                                          options.get("label_smoothing", 0.0), 0.0)  # fmt: skip
        return Rows(losses, over)

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        more = {"class_weight": v["class_weight"]} if "class_weight" in v else {}
        return f(v["u"], v["v"], v["weight"], v.get("bias"), v.get("target"), **more, **o)

    target_axes: tuple[str | None, ...] = ("row",) if kind == "classes" else ("row", None)
    return Case(
        "softmax_pair", d.dtype, t, call, formula,
        tuple(n for n in ("u", "v", "weight", "bias") if n in t and d.chance(0.9)),
        options, reductions=("mean", "sum", "none") if kind != "none" else (),
        axes={"u": ("row", None), "v": ("row", None), "target": target_axes}, rows_axis="row", module="SoftmaxLoss",
        traits={"parts": parts},
    )  # fmt: skip


@drawer("focal")
def focal(d: Draw) -> Case:
    classes = d.chance(0.5)
    C, N = d.dim(), d.rows()
    options: dict[str, Any] = d.some({"gamma": d.pick(0.0, 0.5, 1.0, 2.0, 3.7)}, 0.7)
    gamma, ignore = options.get("gamma", 2.0), -100
    t: dict[str, Tensor] = {}
    if classes:
        shape = d.pick((N, C), (N, C), (min(N, 8), C, 3))
        rows = (shape[0], *shape[2:])
        ignore = d.pick(-100, -1, 0)
        options |= {} if ignore == -100 else {"ignore_index": ignore}
        count = 1
        for n in rows:
            count *= n
        t["target"] = d.lay(d.indices(count, C, ignore).contiguous().view(rows))
        if d.chance(0.4):
            t["alpha"] = d.lay(class_weight(d, C).to(d.dtype))
    else:
        shape = d.pick((N,), (N, C), (min(N, 6), 2, 3), (0,))
        rows = shape
        labels = d.uniform(0, 1, *shape)
        t["target"] = d.lay((labels.round() if d.chance(0.6) else labels).to(d.dtype))
        options |= d.some({"alpha": d.pick(0.25, 0.0, 1.0)})
    t["input"] = d.lay((logits(d, *shape)).to(d.dtype))
    d.reduction(options)

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        x, target = v.input, v.target
        if not classes:
            cross = softplus(x) - x * target
            wrong = target * torch.sigmoid(-x) + (1 - target) * torch.sigmoid(x)
            share = 1.0
            if "alpha" in options:
                share = options["alpha"] * target + (1 - options["alpha"]) * (1 - target)
            losses = share * (wrong**gamma if gamma else 1.0) * cross
            return Rows(losses)
        z = x.movedim(1, -1).reshape(-1, C)
        index = target.reshape(-1)
        counted = index != ignore
        index = index.masked_fill(~counted, 0)
        at = index[:, None] == torch.arange(C)
        total = lse(z)
        log_p = z.gather(1, index[:, None])[:, 0] - total
        if C == 1:
            wrong = log_p * 0
        else:
            wrong = (lse(z.masked_fill(at, -torch.inf)) - total).exp()
        alone = wrong <= 0  # whose power has no derivative, and whose loss is 0
        power = torch.where(alone, 0.0 if gamma else 1.0, torch.where(alone, 1.0, wrong) ** gamma) if gamma else 1.0
        # -log p from the small side
        small = -torch.log1p(-torch.where(wrong < 0.5, wrong, 0.0))
        cross = torch.where(wrong < 0.5, small, -log_p) if C > 1 else -log_p
        losses = power * cross * (v.alpha[index] if "alpha" in t else 1.0)
        return Rows(torch.where(counted, losses, 0.0).reshape(rows), counted.sum())

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        return f(v["input"], v["target"], **({"alpha": v["alpha"]} if "alpha" in v else {}), **o)

    return Case(
        "focal", d.dtype, t, call, formula, ("input",) if d.chance(0.95) else (), options, rows_axis="row",
        axes={"input": ("row", None), "target": ("row", None)[: 1 if classes else 2]}
        if len(shape) == 2 else {}, module="FocalLoss",
        traits={"in_constructor": ("alpha",), "classes": classes},
    )  # fmt: skip


REGRESSION = ("mse", "l1", "huber", "smooth_l1", "mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss")


@drawer(*REGRESSION, "binary_cross_entropy_with_logits")
def pointwise(d: Draw, name: str) -> Case:
    kind = name.removesuffix("_loss")
    N, C = d.rows(), d.dim()
    shape = d.pick((N,), (N, C), (N, C), (min(N, 6), 2, 3), ())
    t = {"input": d.lay(logits(d, *shape).to(d.dtype))}
    options: dict[str, Any] = {}
    binary = kind == "binary_cross_entropy_with_logits"
    target = d.uniform(0, 1, *shape) if binary else d.normal(*shape)
    if binary and d.chance(0.5):
        target = target.round()
    t["target"] = d.lay(target.to(d.dtype))
    if not binary and d.chance(0.15):
        t["target"] = d.lay(t["input"].clone())
    by = shape[-1:] if d.chance(0.5) else shape
    if d.chance(0.4):
        t["weight"] = d.lay(d.uniform(0, 2, *d.pick(shape, by)).to(d.dtype))
    if binary and d.chance(0.4):
        t["pos_weight"] = d.lay(d.uniform(0, 3, *by).to(d.dtype))
    if kind == "huber":
        options |= d.some({"delta": d.log(0.05, 5)})
    if kind == "smooth_l1":
        options |= d.some({"beta": d.pick(0.0, d.log(0.05, 5))})
    if not binary:
        options |= d.some({"under": d.pick(0.0, 0.3, 2.0), "over": d.pick(0.0, 0.7, 3.0)}, 0.3)
    d.reduction(options)

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        x, y = v.input, v.target
        weight = v.weight if "weight" in t else torch.ones((), dtype=x.dtype)
        if binary:
            positive = v.pos_weight if "pos_weight" in t else 1.0
            losses = (1 - y) * softplus(x) + positive * y * softplus(-x)
            return Rows(weight * losses)
        apart = x - y
        far = apart.abs()
        if kind == "mse":
            losses = apart.square()
        elif kind == "l1":
            losses = far
        elif kind == "huber":
            delta = options.get("delta", 1.0)
            losses = torch.where(far <= delta, apart.square() / 2, delta * (far - delta / 2))
        else:
            beta = options.get("beta", 1.0)
            losses = torch.where(far < beta, apart.square() / (2 * beta), far - beta / 2) if beta else far
        side = torch.where(x < y, options.get("under", 1.0), options.get("over", 1.0))
        losses = weight * side * losses
        over = losses.numel() if kind == "huber" or "weight" not in t else weight.expand(losses.shape).sum().detach()
        return Rows(losses, mean=losses.sum() / over)

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        return f(v["input"], v["target"], **{n: v[n] for n in ("weight", "pos_weight") if n in v}, **o)

    modules = {"mse": "MSELoss", "l1": "L1Loss", "huber": "HuberLoss", "smooth_l1": "SmoothL1Loss"}
    learnt = ["input", "target"] + [n for n in ("weight", "pos_weight") if n in t and binary]
    whole = all(t[n].shape == shape for n in t) and len(shape) > 0
    axes = {n: ("row",) + (None,) * (len(shape) - 1) for n in t} if whole else {}
    return Case(
        name, d.dtype, t, call, formula, tuple(n for n in learnt if d.chance(0.8)), options, axes=axes, rows_axis="row",
        result_dtype=d.dtype, module=modules.get(kind, "BCEWithLogitsLoss"),
        traits={"in_constructor": ("weight", "pos_weight") if binary else ()},
    )  # fmt: skip
