"""Losses of lists of documents. One query after the other, as the formulas are written."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Ops, Rows, drawer, lse, softplus
from .draw import REAL, Draw


def weights_by_place(mask: Tensor) -> Tensor:
    """A `lambda_weight`: 1 / place of the documents, 0 for padding."""
    return mask.to(torch.float64) / mask.cumsum(1).clamp(min=1)


def by_difference(gain: Tensor, discount: Tensor, labels: Tensor) -> Tensor:
    """A `weighting`: how far apart the gains of a pair are."""
    return (gain[:, :, None] - gain[:, None, :]).abs() + 0.25


@drawer("lambda_loss", "rank_net", "list_net", "list_mle", "plist_mle", "adr_mse", "list_info_nce", "list_circle")
def lists(d: Draw, name: str) -> Case:
    Q, n = d.pick(1, 2, 3, 5), d.pick(1, 2, 3, d.whole(4, 12), d.whole(4, 12), d.whole(13, 40))
    if name in ("list_mle", "plist_mle", "list_net") and d.chance(0.05):
        Q, n = 2, d.whole(120, 140)
    ragged = d.chance(0.25)
    pairs, contrasts = name in ("lambda_loss", "rank_net"), name in ("list_info_nce", "list_circle")
    scores = d.normal(Q, n) * d.pick(1, 1, 5, 0.1)
    if d.chance(0.2):
        scores = scores.round()  # ties
    kind = d.pick(*REAL)
    labels = d.integers(0, d.pick(2, 3, 6), Q, n).double()
    if kind.is_floating_point and d.chance(0.4):
        labels = d.uniform(-1 if kind != torch.float16 else 0, 4, Q, n)
    if kind == torch.bool:
        labels = labels.clamp(max=1)
    t: dict[str, Tensor] = {}
    lengths = [d.whole(0 if d.chance(0.2) else 1, n) for _ in range(Q)] if ragged else []
    if ragged:
        lengths[d.whole(0, Q - 1)] = n
        t |= {f"scores{i}": d.lay(scores[i, :k].to(d.dtype)) for i, k in enumerate(lengths)}
        t |= {f"labels{i}": d.lay(labels[i, :k].to(kind)) for i, k in enumerate(lengths)}
    else:
        t = {"scores": d.lay(scores.to(d.dtype)), "labels": d.lay(labels.to(kind))}
        if d.chance(0.5):
            mask = d.uniform(0, 1, Q, n) < d.pick(0.2, 0.7, 0.9)
            if d.chance(0.5):
                mask = mask.sort(dim=1, descending=True).values
            t["mask"] = d.lay(mask)
    options: dict[str, Any] = {}
    weighting: Any = None
    if pairs:
        options = d.some({"k": d.whole(1, n + 1), "sigma": d.log(0.1, 5), "reduction_log": d.pick("binary", "natural")})
        if name == "lambda_loss":
            weighting = d.pick("ndcg_loss2pp", "ndcg_loss2", "ndcg_loss1", "lambda_rank", None, by_difference)
            options |= d.some({"mu": d.real(0, 12)})
            if weighting != "ndcg_loss2pp" or d.chance(0.5):
                options["weighting"] = weighting
    elif name in ("list_mle", "plist_mle"):
        options = d.some({"respect_input_order": d.pick(True, False)}, 0.7)
        if name == "plist_mle" and d.chance(0.5):
            options["lambda_weight"] = d.pick("default", None, weights_by_place)
    elif name == "adr_mse":
        options = d.some({"alpha": d.log(0.2, 5)})
    elif name == "list_info_nce":
        options = d.some({"temperature": d.parameter(d.log(0.2, 5)), "positives": d.pick("each", "joint")})
        if isinstance(options.get("temperature"), Tensor):
            t["temperature"] = options.pop("temperature")
    elif name == "list_circle":
        options = d.some({"m": d.real(-0.2, 0.6), "gamma": d.log(0.5, 5)})
    d.reduction(options)
    soft = name == "rank_net" and not ragged and d.chance(0.35)
    if soft:  # a pair that nobody judged has 0 in both places; what is not read is NaN
        del t["labels"]
        upper = d.uniform(0, 1, Q, n, n).triu(1)
        judged = (d.uniform(0, 1, Q, n, n) < d.pick(0.3, 1.0)).triu(1)
        kind = d.pick(torch.float32, torch.float64, torch.bfloat16, torch.float16)
        targets = torch.where(judged, upper, 0.0) + torch.where(judged, 1 - upper, 0.0).mT
        unread = torch.eye(n, dtype=torch.bool).expand(Q, n, n)
        if "mask" in t:
            unread = unread | ~(t["mask"][:, :, None] & t["mask"][:, None])
        t["soft"] = d.lay(targets.masked_fill(unread, math.nan).to(kind))
    against = name == "rank_net" and d.chance(0.3)
    if against:
        t |= {x.replace("scores", "reference"): d.lay(d.normal(*t[x].shape).to(d.dtype)) for x in t if "scores" in x}

    def queries(v: SimpleNamespace) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Scores and labels of the documents, or targets of their pairs, and which places these are."""

        def score(i: int, suffix: object = "") -> Tensor:
            own = getattr(v, f"scores{suffix}")
            own = own - getattr(v, f"reference{suffix}").detach() if against else own
            return own if ragged else own[i]

        if ragged:
            return [(score(i, i), getattr(v, f"labels{i}").double(), torch.arange(n) < k)
                    for i, k in enumerate(lengths)]  # fmt: skip
        masks = v.mask if "mask" in t else torch.ones(Q, n, dtype=torch.bool)
        if soft:
            return [(score(i)[m], v.soft[i][m][:, m], m) for i, m in enumerate(masks)]
        return [(score(i)[m], v.labels[i][m].double(), m) for i, m in enumerate(masks)]

    def ranked(o: Ops, s: Tensor) -> Tensor:
        """The best first; differences of scores are rounded, which may make others of these equal."""

        def decide() -> tuple[Tensor, Tensor]:
            best = s.detach().sort(descending=True, stable=True)
            apart = best.values[:-1] - best.values[1:]
            near = (apart > 0) & (apart <= 64 * o.unit * best.values.abs().max()) if len(s) else apart > 0
            return best.indices, near & (against and "k" in options)

        return o._once(decide)

    def of_pairs(o: Ops, s: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        order = ranked(o, s)
        s, p = s[order], p[order][:, order]
        place = torch.arange(len(s))
        k = options.get("k") or len(s)
        pair = (place[:, None] != place) & ((place[:, None] < k) | (place < k))
        p = torch.where(pair, p, 0.0).detach()
        lost = torch.where(pair, p * softplus(-options.get("sigma", 1.0) * (s[:, None] - s)), 0.0)
        return lost.sum() / (math.log(2) if options.get("reduction_log", "binary") == "binary" else 1), p.sum()

    def lambda_sums(o: Ops, s: Tensor, y: Tensor) -> tuple[Tensor, int]:
        m = len(s)
        k = options.get("k") or m
        sigma, mu = options.get("sigma", 1.0), options.get("mu", 10.0)
        order = ranked(o, s)
        s, y = s[order], y[order]
        place = torch.arange(1, m + 1, dtype=torch.float64)
        D = torch.log2(1 + place)
        gains = 2.0 ** y.clamp(min=0) - 1
        best = gains.sort(descending=True).values[:k]
        G = gains / (best / D[:k]).sum().clamp(min=options.get("eps", 1e-10))
        top = (place <= k)[:, None] | (place <= k)
        pair = top & (y[:, None] > y)
        apart = (place[:, None] - place).abs()
        near = (1 / torch.log2(1 + apart) - 1 / torch.log2(2 + apart)).abs()
        near = torch.where(apart > 0, near, 0.0)
        loss2 = near * (G[:, None] - G).abs()
        rank = (1 / D[:, None] - 1 / D).abs() * (G[:, None] - G).abs()
        if weighting == "ndcg_loss1":
            w, pair = (G / D)[:, None].expand(m, m), top
        elif callable(weighting):
            w = (G[:, None] - G).abs() + 0.25
        else:
            w = {"ndcg_loss2pp": mu * loss2 + rank, "ndcg_loss2": loss2, "lambda_rank": rank,
                 None: torch.ones_like(rank)}[weighting]  # fmt: skip
        lost = w.detach() * softplus(-sigma * (s[:, None] - s))
        if options.get("reduction_log", "binary") == "binary":
            lost = lost / math.log(2)
        return torch.where(pair, lost, 0.0).sum(), int(pair.sum())

    def contrast(s: Tensor, y: Tensor, temperature: Tensor | None) -> tuple[Tensor, int]:
        none = (s * 0).sum()
        if name == "list_circle":
            m, gamma = options.get("m", 0.4), options.get("gamma", 80.0)
            pull = -gamma * torch.relu(1 + m - s.detach()) * (s - 1 + m)
            push = gamma * torch.relu(s.detach() + m) * (s - m)
            both = bool(y.any() and (~y).any())
            return softplus(lse(pull[y]) + lse(push[~y])) if both else none, int(both)
        z = s / (temperature.reshape(()) if "temperature" in t else options.get("temperature", 1.0))
        if not y.any() or y.all():
            return none, int(y.any())
        above = lse(z[~y]) - (lse(z[y]) if options.get("positives") == "joint" else z[y])
        return softplus(above).mean(), 1

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        found, counts = [], 0
        for s, y, place in queries(v):
            m = len(s)
            if not m:
                found.append((s * 0).sum())
                counts += name in ("list_net", "list_mle", "plist_mle")
                continue
            if soft:
                loss, count = of_pairs(o, s, y)
            elif pairs:
                loss, count = lambda_sums(o, s, y)
            elif name == "list_net":
                count = 1
                loss = -((y - lse(y)).exp() * (s - lse(s))).sum()
            elif contrasts:
                loss, count = contrast(s, y > 0, getattr(v, "temperature", None))
            elif name == "adr_mse":
                alpha = options.get("alpha", 1.0)
                R = 1 + (alpha * (s - s[:, None])).sigmoid().masked_fill(torch.eye(m, dtype=torch.bool), 0.0).sum(1)
                rank = (y[:, None] < y).sum(1) + ((y[:, None] == y).sum(1) + 1) / 2
                loss, count = ((rank - R).square() / torch.log2(1 + rank)).sum(), m
            else:
                count = 1
                if not options.get("respect_input_order", True):
                    s = s[y.sort(descending=True, stable=True).indices]
                left = torch.stack([lse(s[i:]) for i in range(m)]) - s
                w = options.get("lambda_weight", "default" if name == "plist_mle" else None)
                if w is None:
                    loss = left.sum()
                else:
                    if w == "default":
                        w = 2.0 ** (m - torch.arange(1, m + 1, dtype=torch.float64)) - 1
                    else:
                        real = (
                            torch.ones(1, m, dtype=torch.bool)
                            if not options.get("respect_input_order", True)
                            else place[None]
                        )
                        w = weights_by_place(real)[0]
                        w = w[w > 0]
                    loss = (w * left).sum() / (w.sum() + 1e-10)
            found.append(loss)
            counts += count
        return Rows(torch.stack(found), counts)

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        names = ("mask", "soft", *(() if ragged else ("reference",)), "temperature")
        more: dict[str, Any] = {x: v[x] for x in names if x in v}
        if ragged:
            if against:
                more["reference"] = [v[f"reference{i}"] for i in range(Q)]
            return f([v[f"scores{i}"] for i in range(Q)], [v[f"labels{i}"] for i in range(Q)], **more, **o)
        return f(v["scores"], v.get("labels"), **more, **o)

    modules = {"lambda_loss": "LambdaLoss", "rank_net": "RankNetLoss", "list_net": "ListNetLoss",
               "list_info_nce": "ListInfoNCELoss", "list_circle": "ListCircleLoss",
               "list_mle": "ListMLELoss", "plist_mle": "PListMLELoss", "adr_mse": "ADRMSELoss"}  # fmt: skip
    learnt = [x for x in t if x.startswith(("scores", "temperature"))]
    if name == "list_net" and kind.is_floating_point:
        learnt += [x for x in t if x.startswith("labels")]
    return Case(
        name, d.dtype, t, call, formula, tuple(learnt) if d.chance(0.95) else (), options,
        axes={} if ragged else {x: ("row", None, None)[: y.dim()] for x, y in t.items() if x != "temperature"},
        rows_axis="row", module=modules[name],
        traits={"labels": kind, "ragged": ragged, "weighting": weighting},
        backends=("chunked", "reference", *(() if callable(weighting) or contrasts or soft else ("triton",))),
    )  # fmt: skip
