"""Softmax and sigmoid losses over the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .arithmetic import unit
from .cases import DRAWERS, Case, Ops, Rows, drawer, length, lse, mean_over_counted, products, softplus, unit_rows
from .draw import Draw


def one_hot(target: Tensor, columns: int) -> Tensor:
    return target[:, None] == torch.arange(columns)


# fusedloss.transforms' names and numbers, of which a case draws one, and a user's function.
PHI: dict[tuple[str, float, bool], Callable[[Tensor], Tensor]] = {
    ("focal", 2.0, False): lambda loss: (-torch.expm1(-loss)) ** 2 * loss,
    ("focal", 1.0, True): lambda loss: (-torch.expm1(-loss)).detach() * loss,
    ("generalised", 0.7, False): lambda loss: -torch.expm1(-0.7 * loss) / 0.7,
    ("clipped", 1.0, False): lambda loss: loss.clamp(max=1.0),
    ("function", 0.0, False): lambda loss: (1 + loss.square()).sqrt(),
}


def transform(o: Ops, options: dict[str, Any], loss: Tensor) -> Tensor:
    if "transform" not in options:
        return loss
    if options["transform"][0] == "clipped":
        o.above(loss, torch.ones_like(loss), 1.0)  # the slope's step
    return PHI[options["transform"]](loss)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options as the losses take them."""
    from fusedloss.transforms import Transform

    if "transform" not in options:
        return options
    phi = options["transform"]
    return options | {"transform": PHI[phi] if phi[0] == "function" else Transform(*phi)}


def of_rows(d: Draw) -> dict[str, Any]:
    """`transform` and `decoupled`, whose losses may be negative: a focal transform does not take them."""
    options: dict[str, Any] = {"transform": d.pick(*PHI)} if d.chance(0.25) else {}
    if options.get("transform", ("",))[0] != "focal":
        options |= d.some({"decoupled": True}, 0.2)
    return options


def softmax(
    z: Tensor,
    admissible: Tensor,
    target: Tensor,
    counted: Tensor,
    smoothing: float = 0.0,
    decoupled: bool = False,
) -> Tensor:
    """logsumexp of the admissible columns and the target, minus the target's."""
    taking = admissible | one_hot(target, z.shape[1])
    taking = torch.where(counted[:, None], taking, True)
    z = torch.where(counted[:, None], z, 0.0)
    z = torch.where(taking, z, -torch.inf)
    own = z.gather(1, target[:, None])[:, 0]
    if decoupled:
        total = lse(torch.where(one_hot(target, z.shape[1]), -torch.inf, z))
        return torch.where(total > -torch.inf, total - own, 0.0)
    total = lse(z)
    if not smoothing:
        return total - own
    taking = taking & (z > -torch.inf)
    spread = torch.where(taking, z, 0.0).sum(1) / taking.sum(1)
    return total - (1 - smoothing) * own - smoothing * spread


def debiased(
    o: Ops, share: float, z: Tensor, allowed: Tensor, target: Tensor, counted: Tensor, scale: Tensor | float
) -> Tensor:
    """log(1 + g) of Chuang et al. 2020, with g relative to the target's exponential."""
    z = torch.where(counted[:, None], z, 0.0)
    own = z.gather(1, target[:, None])
    negative = allowed & ~one_hot(target, z.shape[1]) & (z > -torch.inf)
    ratio = torch.exp(torch.where(negative, z - own, -torch.inf)).sum(1)
    number = negative.sum(1)
    free, bound = (ratio - share * number) / (1 - share), number * torch.exp(-scale - own[:, 0])
    above = o.above(free, bound, (ratio + share * number).detach() / (1 - share), where=counted)
    return torch.log1p(torch.where(above, free, bound))


def statistics(o: Ops, z: Tensor, admissible: Tensor, target: Tensor, counted: Tensor, scale: Tensor, copies: int = 1):
    """Of the rows that count: as `Stats` has it."""
    at = one_hot(target, z.shape[1])
    own = z.gather(1, target[:, None])
    negatives = torch.where(admissible & ~at, z, -torch.inf)
    above = o.above(negatives, own.expand_as(z), where=counted[:, None] & admissible & ~at).sum(1).double()
    rows = counted.double()
    most = negatives.amax(1)
    has = counted & (most > -torch.inf)
    count = rows.sum().clamp(min=1)
    possible = rows.sum() * (z.shape[1] - copies)
    there = ((negatives > -torch.inf).sum(1) * counted).sum()
    return {
        "accuracy": ((above == 0) * rows).sum() / count,
        "mean_reciprocal_rank": (rows / (1 + above)).sum() / count,
        "positive_score": (torch.where(counted, own[:, 0], 0.0) / scale).sum() / count,
        "hardest_negative_score": (torch.where(has, most, 0.0) / scale).sum() / has.sum().clamp(min=1),
        "masked": (possible - there) / possible if possible else torch.zeros(()),
    }


def unit_prefix(v: SimpleNamespace) -> bool:
    """Whether these are prefixes of `matryoshka`, which are divided by their norms whatever the loss does."""
    return getattr(v, "unit_prefix", False)


class MaskDraw:
    """A mask over [rows, columns] drawn at random; its tensors go into the case's."""

    def __init__(
        self,
        d: Draw,
        rows: int,
        columns: int,
        row_axis: str | None,
        column_axis: str | None,
        kinds: tuple[str, ...] = ("same_id", "same_group", "dense", "score_margin", "guide", "not_self"),
    ):
        self.tensors: dict[str, Tensor] = {}
        self.axes: dict[str, tuple[str | None, ...]] = {}
        self.points: dict[str, str] = {}
        self.options: dict[str, Any] = {}
        self.rows, self.columns = rows, columns
        number = d.pick(0, 1, 1, 1, 2, 3)
        self.kinds = tuple(dict.fromkeys(d.pick(*kinds) for _ in range(number)))
        for kind in self.kinds:
            if kind in ("same_id", "same_group"):
                groups = d.pick(2, 3, max(rows, 2))
                self.tensors[f"{kind}_rows"] = d.labels(rows, groups)
                self.tensors[f"{kind}_keys"] = d.labels(columns, groups)
                self.axes |= {f"{kind}_rows": (row_axis,), f"{kind}_keys": (column_axis,)}
            elif kind == "dense":
                self.tensors["dense"] = d.lay(d.uniform(0, 1, rows, columns) < d.pick(0.1, 0.5, 0.9))
                self.axes["dense"] = (row_axis, column_axis)
            elif kind == "score_margin":
                self.options["score_margin"] = d.pick((0.0, 1.0), (0.1, 1.0), (-0.1, 1.0), (1.0, 1.0), (0.0, 0.9))
                if d.chance(0.3) and columns:
                    self.tensors["exempt"] = d.lay(d.integers(-1, columns, rows, d.whole(1, 3)))
                    self.axes["exempt"] = (row_axis, None)
                    if column_axis:
                        self.points["exempt"] = column_axis
                if d.chance(0.3):
                    self.options["factor"] = d.pick(0.0, 0.5, 0.9)
            elif kind == "guide":
                self.options["guide"] = {
                    "margin": d.pick(0.0, 0.0, 0.1, -0.1),
                    "strategy": d.pick("absolute", "relative"),
                }
                dim, dtype = d.whole(1, 12), d.pick(d.dtype, d.dtype, torch.float32, torch.bfloat16)
                self.tensors["guide_rows"] = d.embeddings(rows, dim, dtype=dtype)
                self.tensors["guide_keys"] = d.embeddings(columns, dim, dtype=dtype)
                self.axes |= {"guide_rows": (row_axis, None), "guide_keys": (column_axis, None)}
            elif kind == "not_self":
                self.options["not_self"] = d.pick(0, 0, 0, 1, -1, 3)

    def build(self, masks: Any, t: dict[str, Tensor]) -> Any:
        """With `fusedloss.masks`, which a formula does not see."""
        mask = None
        for kind in self.kinds:
            if kind == "dense":
                part = t["dense"]
            elif kind == "score_margin":
                margin, relative = self.options["score_margin"]
                exempt, factor = t.get("exempt"), self.options.get("factor")
                part = masks.score_margin(margin, exempt=exempt, relative=relative, factor=factor)
            elif kind == "guide":
                part = masks.guide(t["guide_rows"], t["guide_keys"], **self.options["guide"])
            elif kind == "not_self":
                part = masks.not_self(self.options["not_self"])
            else:
                part = getattr(masks, kind)(t[f"{kind}_rows"], t[f"{kind}_keys"])
            mask = part if mask is None else mask & part
        return mask

    def admissible(self, o: Ops, t: SimpleNamespace, s: Tensor, size: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Columns that the masks admit, before the target is let in anyway; and those that `not_self` takes out."""
        allowed = torch.ones(self.rows, self.columns, dtype=torch.bool)
        itself = torch.zeros_like(allowed)
        for kind in self.kinds:
            if kind == "same_id":
                allowed &= t.same_id_rows[:, None] != t.same_id_keys
            elif kind == "same_group":
                allowed &= t.same_group_rows[:, None] == t.same_group_keys
            elif kind == "dense":
                allowed &= t.dense
            elif kind == "score_margin" and "factor" not in self.options:
                allowed &= ~self._above(o, t, s, size, target)
            elif kind == "guide":
                allowed &= ~guided(o, t.guide_rows, t.guide_keys, target, **self.options["guide"])
            elif kind == "not_self":
                itself = one_hot(torch.arange(self.rows) + self.options["not_self"], self.columns)
        return allowed & ~itself, itself

    def shrunk(self, o: Ops, t: SimpleNamespace, s: Tensor, size: Tensor, target: Tensor) -> Tensor:
        """The similarities, of which a margin with a factor multiplies those above it."""
        if "factor" not in self.options:
            return s
        above = self._above(o, t, s, size, target) & ~one_hot(target, self.columns)
        return torch.where(above, self.options["factor"] * s, s)

    def _above(self, o: Ops, t: SimpleNamespace, s: Tensor, size: Tensor, target: Tensor) -> Tensor:
        margin, relative = self.options["score_margin"]
        above = o.above(s, relative * s.gather(1, target[:, None]) + margin, size).clone()
        if hasattr(t, "exempt"):
            for column in t.exempt.T:
                above &= ~one_hot(column, self.columns)
        return above


def guided(
    o: Ops, rows: Tensor, keys: Tensor, target: Tensor, margin: float, strategy: str, threshold: Tensor | None = None
) -> Tensor:
    """What a guide drops. Without a target's column among these, its threshold is given."""
    rows, keys = unit_rows(rows), unit_rows(keys)
    cosines = rows @ keys.T
    if threshold is None:
        own = cosines.gather(1, target[:, None])
        threshold = own - margin if strategy == "absolute" else own - own.abs() * margin
    # The guide may be in fp32 beside embeddings in fp64.
    return o.above(cosines, threshold, 1.0 if o.unit == unit(torch.float32) else unit(torch.float32) / o.unit)


def norms(x: Tensor, y: Tensor, cosine: bool) -> Tensor:
    return torch.ones(len(x), len(y)) if cosine else x.detach().norm(dim=1)[:, None] * y.detach().norm(dim=1)


@drawer("info_nce")
def info_nce(d: Draw) -> Case:
    M, D = d.rows(), d.dim()
    N = d.pick(M, M, M + d.whole(1, 20), d.whole(1, 40))
    options: dict[str, Any] = {}
    normalize = d.chance(0.5)
    t: dict[str, Tensor] = {"query": d.embeddings(M, D, zeros=normalize), "key": d.embeddings(N, D, zeros=normalize)}
    if normalize:
        options["normalize"] = True
    ignore = d.pick(-100, -100, -1, 0)
    explicit = N < M or d.chance(0.4)
    if explicit:
        t["target"] = d.indices(M, N, ignore)
        if ignore != -100:
            options["ignore_index"] = ignore
    else:
        ignore = -100
    row_axis, column_axis = ("row", "column") if explicit else ("row", "row") if M == N else (None, None)
    temperature = d.parameter(d.log(0.01, 10))
    options["temperature"] = temperature
    kind = d.pick("plain", "plain", "plain", "negatives", "bank")
    K = d.whole(0 if d.chance(0.2) else 1, 12)
    columns = N + K if kind == "bank" else N
    if kind == "bank":
        t["bank"] = d.embeddings(K, D, zeros=normalize)
    elif kind == "negatives":
        t["negatives"] = d.lay(d.normal(M, K, D).to(d.dtype))
    behind = kind == "bank"
    if d.chance(0.35):
        bias = d.normal(columns) * 2
        if d.chance(0.5):
            bias[torch.rand(columns, generator=d.generator) < 0.2] = -torch.inf
        t["key_bias"] = d.vector(bias)
    if d.chance(0.35):
        weight = d.uniform(0, 2, M)
        weight[torch.rand(M, generator=d.generator) < d.pick(0.0, 0.3, 0.3)] = 0
        t["weight"] = d.vector(weight)
    mask = MaskDraw(d, M, columns, row_axis, None if behind else column_axis)
    t |= mask.tensors
    smoothing = 0.0
    if kind != "negatives" and d.chance(0.25):
        smoothing = options["label_smoothing"] = d.pick(0.1, 0.5, 1.0)
    d.reduction(options)
    if isinstance(temperature, Tensor):
        t["temperature"] = options.pop("temperature")
    grads = [n for n in ("query", "key", "negatives", "key_bias", "temperature") if n in t and d.chance(0.9)]
    if not smoothing:
        options |= of_rows(d)
    if kind == "negatives":
        options.pop("decoupled", None)
        if d.chance(0.4):
            t["negatives_mask"] = d.lay(d.uniform(0, 1, M, K) < d.pick(0.3, 0.8))
    elif normalize and "temperature" not in grads:
        options |= d.some({"margin": d.real(-0.2, 0.4)}, 0.3)
    if "key_bias" in t:
        options |= d.some({"bias_on_target": False}, 0.3)
    if "factor" in mask.options or "bias_on_target" in options:
        grads = [n for n in grads if n != "key_bias"]

    def target(v: SimpleNamespace) -> Tensor:
        return v.target if explicit else torch.arange(M)

    def parts(o: Ops, v: SimpleNamespace) -> dict[str, Any]:
        q, k = v.query, v.key
        if kind == "bank":
            k = torch.cat([k, v.bank.detach()])
        chosen = target(v)
        counted = chosen != ignore
        chosen = chosen.masked_fill(~counted, 0)
        cosine = normalize or unit_prefix(v)
        s, at = products(q, k, cosine), one_hot(chosen, columns)
        over = v.temperature.reshape(()) if isinstance(temperature, Tensor) else temperature
        bent = mask.shrunk(o, v, s, norms(q, k, cosine), chosen)
        z = torch.where(at, bent - options.get("margin", 0.0), bent) / over
        if "key_bias" in t:
            z = z + (v.key_bias if options.get("bias_on_target", True) else torch.where(at, 0.0, v.key_bias))
            counted = counted & (v.key_bias[chosen] > -torch.inf)
        allowed, itself = mask.admissible(o, v, s, norms(q, k, cosine), chosen)
        counted = counted & ~itself.gather(1, chosen[:, None])[:, 0]
        if "weight" in t:
            counted = counted & (v.weight != 0)
        if "key_bias" in t:
            allowed = allowed & (v.key_bias > -torch.inf)
        return {"z": z, "allowed": allowed, "target": chosen, "counted": counted, "over": over}

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        p = parts(o, v)
        z, allowed = p["z"], p["allowed"]
        if kind == "negatives" and K:
            own = (v.negatives * v.query[:, None]).sum(2)
            own = own / (length(v.negatives) * length(v.query)[:, None]) if normalize else own
            z = torch.cat([z, own / p["over"]], 1)
            real = v.negatives_mask if "negatives_mask" in t else torch.ones(M, K, dtype=torch.bool)
            allowed = torch.cat([allowed, real], 1)
        if "debiased" in options:
            losses = debiased(o, options["debiased"], z, allowed, p["target"], p["counted"], 1 / p["over"])
        else:
            losses = softmax(z, allowed, p["target"], p["counted"], smoothing, options.get("decoupled", False))
        losses = transform(o, options, losses)
        return mean_over_counted(losses, p["counted"], v.weight if "weight" in t else None)

    def stats(o: Ops, v: SimpleNamespace) -> dict[str, Tensor]:
        p = parts(o, v)
        return statistics(o, p["z"], p["allowed"], p["target"], p["counted"], 1 / torch.as_tensor(p["over"]))

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        import fusedloss

        names = ("target", "negatives", "negatives_mask", "bank", "key_bias", "weight")
        tensors = {n: v[n] for n in names if n in v}
        more = {"temperature": v["temperature"]} if "temperature" in v else {}
        return f(v["query"], v["key"], mask=mask.build(fusedloss.masks, v), **tensors, **more, **given(o))

    axes = {
        "query": (row_axis, None),
        "key": (column_axis, None),
        "target": ("row",),
        "weight": (row_axis,),
        "negatives": (row_axis, None, None),
        "negatives_mask": (row_axis, None),
        "key_bias": (None if behind else column_axis,),
        **mask.axes,
    }
    points = {"target": "column", **mask.points} if explicit else mask.points
    permutable = not behind and "not_self" not in mask.kinds
    if normalize and not (smoothing or kind == "negatives" or {"decoupled", "margin"} & set(options)):
        options |= d.some({"debiased": d.pick(0.05, 0.3)}, 0.5)
    if d.chance(0.12):
        return several_positives(d)
    return Case(
        "info_nce", d.dtype, t, call, formula, tuple(grads), options,
        axes=axes if permutable else {}, points=points, rows_axis=row_axis,
        independent="row" if explicit and permutable else None,
        counted=lambda o, v: parts(o, v)["counted"],
        takes_group=kind == "plain" and not smoothing and "dense" not in mask.kinds,
        stats=None if kind == "negatives" or d.duplicates else stats,
        module="InfoNCELoss",
        traits={"mask": mask.kinds, "kind": kind, "explicit": explicit, "ignore": ignore,
                "ring": not explicit or not {"guide", "score_margin"} & set(mask.kinds),
                "embeddings": ("query", "key"),
                "weight": "weight" in t, "smoothing": smoothing},
    )  # fmt: skip


def several_positives(d: Draw) -> Case:
    """info_nce of targets [M, P]."""
    M, D, N, P = d.rows(), d.dim(), d.whole(1, 40), d.pick(1, 2, 3, 5)
    normalize, ignore = d.chance(0.5), d.pick(-100, -100, -1, 0)
    t = {"query": d.embeddings(M, D, zeros=normalize), "key": d.embeddings(N, D, zeros=normalize)}
    target = d.integers(0, N, M, P)
    target[torch.rand(M, P, generator=d.generator) < d.pick(0.0, 0.3, 0.6)] = ignore
    t["target"] = d.lay(target)
    options: dict[str, Any] = {"normalize": True} if normalize else {}
    options |= {} if ignore == -100 else {"ignore_index": ignore}
    form = d.pick("each", "joint")
    options |= {} if form == "each" else {"positives": form}
    temperature = d.parameter(d.log(0.01, 10))
    if isinstance(temperature, Tensor):
        t["temperature"] = temperature
    else:
        options["temperature"] = temperature
    if d.chance(0.35):
        bias = d.normal(N)
        bias[torch.rand(N, generator=d.generator) < d.pick(0.0, 0.3)] = -torch.inf
        t["key_bias"] = d.vector(bias)
    if d.chance(0.35):
        weight = d.uniform(0, 2, M)
        weight[torch.rand(M, generator=d.generator) < 0.3] = 0
        t["weight"] = d.vector(weight)
    mask = MaskDraw(d, M, N, "row", "column", ("same_id", "same_group", "dense", "not_self"))
    t |= mask.tensors
    d.reduction(options)
    grads = tuple(n for n in ("query", "key", "key_bias", "temperature") if n in t and d.chance(0.9))
    if d.chance(0.25):
        options["transform"] = d.pick(*PHI)

    def sets(o: Ops, v: SimpleNamespace, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The columns of each row that are its positives and its negatives, and the rows that count."""
        allowed, itself = mask.admissible(o, v, s, norms(v.query, v.key, normalize), torch.zeros(M, dtype=torch.int64))
        there = v.target != ignore
        named = ((v.target[:, :, None] == torch.arange(N)) & there[:, :, None]).any(1)
        if "key_bias" in t:
            itself = itself | (v.key_bias == -torch.inf)
        positive = named & ~itself
        counted = positive.any(1)
        if "weight" in t:
            counted = counted & (v.weight != 0)
        return positive, allowed & ~named & ~itself, counted

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        s = products(v.query, v.key, normalize or unit_prefix(v))
        z = s / (v.temperature.reshape(()) if isinstance(temperature, Tensor) else temperature)
        if "key_bias" in t:
            z = z + v.key_bias
        positive, negative, counted = sets(o, v, s)
        total = lse(torch.where(negative, z, -torch.inf))
        if form == "each":
            each = softplus(total[:, None] - torch.where(positive, z, 0.0))
            losses = torch.where(positive, each, 0.0).sum(1) / positive.sum(1).clamp(min=1)
        else:
            some = torch.where(counted[:, None], positive, True)
            losses = softplus(total - lse(torch.where(some, torch.where(positive, z, 0.0), -torch.inf)))
        return mean_over_counted(transform(o, options, losses), counted, v.weight if "weight" in t else None)

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        import fusedloss

        tensors = {n: v[n] for n in ("target", "key_bias", "weight", "temperature") if n in v}
        return f(v["query"], v["key"], mask=mask.build(fusedloss.masks, v), **tensors, **given(o))

    axes = {"query": ("row", None), "key": ("column", None), "target": ("row", None), "weight": ("row",)}
    permutable = "not_self" not in mask.kinds
    return Case(
        "info_nce", d.dtype, t, call, formula, grads, options,
        axes=axes | {"key_bias": ("column",)} | mask.axes if permutable else {},
        points={"target": "column"}, rows_axis="row", independent="row" if permutable else None,
        counted=lambda o, v: sets(o, v, products(v.query, v.key, normalize))[2],
        backends=("chunked", "reference", "triton"), takes_group="dense" not in mask.kinds, module="InfoNCELoss",
        traits={"embeddings": ("query", "key"), "mask": mask.kinds, "several": form},
    )  # fmt: skip


@drawer("clip", "contrastive_tension_in_batch")
def clip(d: Draw, name: str) -> Case:
    M, D = d.rows(), d.dim()
    plain = name == "clip"
    names = ("image_features", "text_features") if plain else ("a", "b")
    normalize = not plain or d.chance(0.5)
    t = {n: d.embeddings(M, D, zeros=normalize) for n in names}
    options: dict[str, Any] = {"normalize": True} if plain and normalize else {}
    scale = d.parameter(d.log(0.1, 100) * (d.pick(1, 1, 1, -1) if plain else 1))
    mask = MaskDraw(d, M, M, "row", "row", ("same_id", "same_group", "dense")) if plain else None
    if mask is not None:
        t |= mask.tensors
    bias = None
    if plain and d.chance(0.3):
        bias = d.parameter(d.real(-3, 3))
        if isinstance(bias, Tensor):
            t["logit_bias"] = bias
    if isinstance(scale, Tensor):
        t["logit_scale"] = scale
    d.reduction(options)
    grads = [n for n in (*names, "logit_scale", "logit_bias") if n in t and d.chance(0.9)]
    if plain:
        options |= of_rows(d)
    if plain and normalize and bias is None and "decoupled" not in options:
        options |= d.some({"debiased": d.pick(0.05, 0.3)}, 0.5)

    def parts(o: Ops, v: SimpleNamespace) -> tuple[Tensor, Tensor, Any]:
        x, y = (getattr(v, n) for n in names)
        cosine = normalize or unit_prefix(v)
        s = products(x, y, cosine)
        factor = v.logit_scale.reshape(()) if isinstance(scale, Tensor) else scale
        z = s * factor
        if isinstance(bias, Tensor):
            z = z + v.logit_bias.reshape(())
        allowed = torch.ones(M, M, dtype=torch.bool)
        if mask is not None:
            allowed, _ = mask.admissible(o, v, s, norms(x, y, cosine), torch.arange(M))
        return z, allowed, factor

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        z, allowed, factor = parts(o, v)
        own, every, decoupled = torch.arange(M), torch.ones(M, dtype=torch.bool), options.get("decoupled", False)
        sides = [
            debiased(o, options["debiased"], *side, own, every, factor)
            if "debiased" in options
            else softmax(*side, own, every, decoupled=decoupled)
            for side in ((z, allowed), (z.T, allowed.T))
        ]
        return Rows(sum(transform(o, options, losses) for losses in sides) / 2)

    def stats(o: Ops, v: SimpleNamespace) -> dict[str, Tensor]:
        z, allowed, factor = parts(o, v)
        if isinstance(bias, Tensor):
            z = z - v.logit_bias.reshape(())
        return statistics(o, z, allowed, torch.arange(M), torch.ones(M, dtype=torch.bool), torch.as_tensor(factor))

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        import fusedloss

        more = {} if mask is None else {"mask": mask.build(fusedloss.masks, v)}
        if bias is not None:
            more["logit_bias"] = v.get("logit_bias", bias)
        return f(*(v[n] for n in names), logit_scale=v.get("logit_scale", scale), **more, **given(o))

    return Case(
        name, d.dtype, t, call, formula, tuple(grads), options,
        axes={names[0]: ("row", None), names[1]: ("row", None), **(mask.axes if mask else {})}, rows_axis="row",
        takes_group=plain and "dense" not in mask.kinds,
        stats=stats if plain and not d.duplicates and float(torch.as_tensor(scale)) > 0 else None,
        module="ClipLoss" if plain else "ContrastiveTensionInBatchLoss",
        traits={"embeddings": names, "mask": mask.kinds if mask else ()},
    )  # fmt: skip


@drawer("siglip")
def siglip(d: Draw) -> Case:
    M, D = d.rows(), d.dim()
    N = d.pick(M, M, M + d.whole(1, 20), d.whole(1, 40))
    normalize = d.chance(0.5)
    t = {"image_features": d.embeddings(M, D, zeros=normalize), "text_features": d.embeddings(N, D, zeros=normalize)}
    options: dict[str, Any] = {"normalize": True} if normalize else {}
    kind = d.pick("diagonal", "target", "ids") if N >= M else d.pick("target", "ids")
    axes: dict[str, tuple[str | None, ...]] = {}
    if kind == "target":
        t["target"] = d.indices(M, N)
        axes["target"] = ("row",)
    elif kind == "ids":
        groups = d.pick(2, 3, max(M, 2))
        t["row_ids"], t["key_ids"] = d.labels(M, groups), d.labels(N, groups)
        axes |= {"row_ids": ("row",), "key_ids": ("column",)}
    column = "column" if kind != "diagonal" else "row" if M == N else None
    row = "row" if column else None
    scale, bias = d.parameter(d.log(0.1, 100)), d.pick(None, d.parameter(d.real(-12, 3)))
    for n, x in (("logit_scale", scale), ("logit_bias", bias)):
        if isinstance(x, Tensor):
            t[n] = x
    d.reduction(options)
    grads = [n for n in ("image_features", "text_features", "logit_scale", "logit_bias") if n in t and d.chance(0.9)]

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        x, y = v.image_features, v.text_features
        z = products(x, y, normalize or unit_prefix(v)) * (
            v.logit_scale.reshape(()) if isinstance(scale, Tensor) else scale
        )
        z = z + (v.logit_bias.reshape(()) if isinstance(bias, Tensor) else bias or 0.0)
        if kind == "ids":
            positive = v.row_ids[:, None] == v.key_ids
        else:
            positive = one_hot(v.target if kind == "target" else torch.arange(M), N)
        return Rows(softplus(torch.where(positive, -z, z)).sum(1), M)

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        import fusedloss

        given: dict[str, Any] = {} if bias is None else {"logit_bias": v.get("logit_bias", bias)}
        if kind == "target":
            given["target"] = v["target"]
        elif kind == "ids":
            given["target"] = fusedloss.masks.same_id(v["row_ids"], v["key_ids"])
        return f(v["image_features"], v["text_features"], logit_scale=v.get("logit_scale", scale), **given, **o)

    return Case(
        "siglip", d.dtype, t, call, formula, tuple(grads), options,
        axes={"image_features": (row, None), "text_features": (column, None), **axes}, rows_axis=row,
        points={"target": "column"} if kind == "target" else {}, independent="row" if kind != "diagonal" else None,
        takes_group=kind != "target" and (kind == "ids" or N == M), module="SigLipLoss",
        traits={"embeddings": ("image_features", "text_features"), "kind": kind},
    )  # fmt: skip


def no_duplicates(B: int, N: int, anchor: Tensor, positive: Tensor, *negatives: Tensor) -> tuple[Tensor, Tensor]:
    """By `ids`: the pairs of B anchors, and the documents, that are no duplicates of a row's."""
    alone = torch.arange(N) >= len(anchor)  # positives without an anchor
    owners = torch.cat([anchor, anchor.new_zeros(N - len(anchor))])
    own = positive[:B, None]
    other = (own != positive) & ((anchor[:B, None] != owners) | alone)
    return other[:, :B], torch.cat([other, *(own != x for x in negatives)], 1)


DIRECTIONS = ("query_to_query", "doc_to_query", "doc_to_doc")


@drawer("multiple_negatives_ranking")
def multiple_negatives_ranking(d: Draw) -> Case:
    B, D = d.rows(), d.dim()
    similarity = d.pick("cos", "cos", "dot")
    zeros = similarity == "cos"
    partition = d.pick("joint", "joint", "per_direction")
    if partition == "joint":
        directions = ("query_to_doc", *(n for n in DIRECTIONS if d.chance(0.35)))
    else:
        directions = ("query_to_doc", *(("doc_to_query",) if d.chance(0.8) else ()))
    hardness = d.pick(None, None, "in_batch_negatives", "hard_negatives", "all_negatives")
    strength = d.pick(0.0, 0.5, 9.0) if hardness else 0.0
    count = d.pick(0, 0, 1, 2, 3)
    owned = hardness is not None or "doc_to_doc" in directions
    N = B if owned or len(directions) > 1 else d.pick(B, B, B + d.whole(1, 9))
    sizes = [B if owned else d.pick(B, d.whole(1, 20)) for _ in range(count)]
    names = [f"negative{i}" for i in range(count)]
    t = {"anchor": d.embeddings(B, D, zeros=zeros), "positive": d.embeddings(N, D, zeros=zeros)}
    t |= {n: d.embeddings(k, D, zeros=zeros) for n, k in zip(names, sizes, strict=True)}
    scale = d.parameter(d.log(0.1, 100))
    options: dict[str, Any] = {"similarity": similarity, "directions": directions, "partition_mode": partition}
    if directions == ("query_to_doc",) and d.chance(0.5):
        del options["directions"], options["partition_mode"]
        partition = "joint"
    if hardness:
        options |= {"hardness_mode": hardness, "hardness_strength": strength}
    widths = [N, *sizes]
    total = sum(widths)
    mask = MaskDraw(d, B, total, None, None) if d.chance(0.4) else None
    if mask is not None:
        t |= mask.tensors
    if isinstance(scale, Tensor):
        t["scale"] = scale
    d.reduction(options)
    grads = [n for n in ("anchor", "positive", *names, "scale") if n in t and d.chance(0.9)]
    options |= of_rows(d)
    if count and set(sizes) == {B}:
        options |= d.some({"own_negatives": True}, 0.4)
    if count and len(set(sizes)) == 1 and d.chance(0.3):
        t["negatives_mask"] = d.lay(d.uniform(0, 1, sizes[0], count) < d.pick(0.3, 0.8))
    ids = [f"{n}_ids" for n in ("anchor", "positive", *names)] if d.chance(0.3) else []
    if ids:
        groups = d.pick(2, 3, max(B, 2))
        rows_of = (d.pick(B, N), *widths)  # the first may go on with the anchors of further positives
        t |= {n: d.labels(rows, groups) for n, rows in zip(ids, rows_of, strict=True)}

    def parts(o: Ops, v: SimpleNamespace) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Any]:
        a, p, *n = (getattr(v, x) for x in ("anchor", "positive", *names))
        factor = v.scale.reshape(()) if isinstance(scale, Tensor) else scale
        docs, owner = torch.cat([p, *n]), torch.cat([torch.arange(k) for k in widths])
        own, every = torch.arange(B), torch.ones(B, dtype=torch.bool)
        cosine = zeros or unit_prefix(v)
        s = products(a, docs, cosine)
        if mask is not None:
            s = mask.shrunk(o, v, s, norms(a, docs, cosine), own)
        z = s * factor
        if strength:
            first = torch.arange(total) < N
            mine = owner[None] == own[:, None]
            other = ~mine if hardness in ("in_batch_negatives", "all_negatives") else torch.zeros_like(mine)
            hard = mine & ~first if hardness in ("hard_negatives", "all_negatives") else torch.zeros_like(mine)
            z = z + strength * s.detach() * (other | hard)
        apart, among = own[:, None] != own, torch.arange(total) >= N
        seen, other_pairs = torch.ones(B, total, dtype=torch.bool), torch.ones(B, B, dtype=torch.bool)
        if "negatives_mask" in t:
            seen &= torch.cat([torch.ones(N, dtype=torch.bool), v.negatives_mask.T.flatten()])
        beyond = seen & ~among if "own_negatives" in options else seen
        if "own_negatives" in options:
            seen = seen & (~among | (own[:, None] == owner))
        if ids:
            other_pairs, other_docs = no_duplicates(B, N, *(getattr(v, n) for n in ids))
            seen, beyond = seen & other_docs, beyond & other_docs
        allowed, counted = torch.ones(B, total, dtype=torch.bool), every
        if mask is not None:
            allowed, itself = mask.admissible(o, v, s, norms(a, docs, cosine), own)
            counted = ~itself.gather(1, own[:, None])[:, 0]
        blocks = {"query_to_doc": (z, allowed & seen)}
        copy = ~apart & ("decoupled" not in options)  # the positive once more
        blocks["query_to_query"] = (products(a, a, cosine) * factor, apart & other_pairs)
        blocks["doc_to_query"] = (products(p[:B], a, cosine) * factor, copy | (apart & other_pairs))
        blocks["doc_to_doc"] = (products(p[:B], docs, cosine) * factor, beyond & (own[:, None] != owner))
        return [blocks[x] for x in ("query_to_doc", *DIRECTIONS) if x in directions], counted, factor

    def losses_of(o: Ops, z: Tensor, allowed: Tensor, counted: Tensor) -> Tensor:
        decoupled = options.get("decoupled", False)
        return transform(o, options, softmax(z, allowed, torch.arange(B), counted, decoupled=decoupled))

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        blocks, counted, _ = parts(o, v)
        if partition == "joint":
            z, allowed = torch.cat([z for z, _ in blocks], 1), torch.cat([x for _, x in blocks], 1)
            return mean_over_counted(losses_of(o, z, allowed, counted), counted)
        # Each direction is a loss of its own, with its own rows that count.
        found = [
            mean_over_counted(losses_of(o, z, x, counted), counted)
            if not i
            else Rows(losses_of(o, z, x, torch.ones(B, dtype=torch.bool)))
            for i, (z, x) in enumerate(blocks)
        ]
        if len(found) == 1:
            return found[0]
        reduction = options.get("reduction", "mean")
        return Rows(torch.stack([x.reduced(reduction) for x in found]).mean(0), 1)

    def stats(o: Ops, v: SimpleNamespace) -> dict[str, Tensor]:
        blocks, counted, factor = parts(o, v)
        copies = 1
        if partition == "joint":
            z, allowed = torch.cat([z for z, _ in blocks], 1), torch.cat([x for _, x in blocks], 1)
        else:
            z, allowed = blocks[0]
        return statistics(o, z, allowed, torch.arange(B), counted, torch.as_tensor(factor), copies)

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        import fusedloss

        more: dict[str, Any] = {} if mask is None else {"mask": mask.build(fusedloss.masks, v)}
        if ids:
            more["ids"] = tuple(v[n] for n in ids)
        if "negatives_mask" in v:
            more["negatives_mask"] = v["negatives_mask"]
        negatives = [v[n] for n in names]
        return f(v["anchor"], v["positive"], *negatives, scale=v.get("scale", scale), **more, **given(o))

    once = len(directions) == 1 or partition == "joint"
    return Case(
        "multiple_negatives_ranking", d.dtype, t, call, formula, tuple(grads), options,
        reductions=("mean", "sum", "none") if once else (options.get("reduction", "mean"),),
        axes={**{n: ("row", None) for n in ("anchor", "positive", *names, "negatives_mask")},
              **dict.fromkeys(ids, ("row",))}
        if mask is None and N == B and all(k == B for k in sizes) else {}, rows_axis="row",
        takes_group=mask is None and N == B and all(k == B for k in sizes),
        stats=None if d.duplicates or len(directions) > 1 or strength else stats, module="MultipleNegativesRankingLoss",
        traits={"embeddings": ("anchor", "positive", *names), "mask": mask.kinds if mask else (),
                "directions": directions,
                "partition": partition, "hardness": hardness if strength else None},
    )  # fmt: skip


@drawer("gist_embed")
def gist_embed(d: Draw) -> Case:
    B, D = d.rows(), d.dim()
    N = d.pick(B, B, B, B + d.whole(1, 9))
    count = d.pick(0, 0, 1, 2)
    sizes = [d.pick(B, d.whole(1, 20)) for _ in range(count)]
    names = ["anchor", "positive", *(f"negative{i}" for i in range(count))]
    guides = [f"guide_{n}" for n in names]
    G, guide_dtype = d.whole(1, 12), d.pick(d.dtype, d.dtype, torch.float32, torch.bfloat16)
    t = {n: d.embeddings(k, D, zeros=True) for n, k in zip(names, (B, N, *sizes), strict=True)}
    t |= {n: d.embeddings(k, G, dtype=guide_dtype) for n, k in zip(guides, (B, N, *sizes), strict=True)}
    if d.chance(0.2) and N == B:
        t["guide_positive"] = t["guide_anchor"]
        d.duplicates = True
    temperature = d.parameter(d.log(0.01, 10))
    options: dict[str, Any] = d.some(
        {
            "margin_strategy": d.pick("absolute", "relative"),
            "margin": d.pick(0.1, -0.2, 0.0),
            "contrast_anchors": d.chance(0.5),
            "contrast_positives": d.chance(0.5),
        }
    )
    if isinstance(temperature, Tensor):
        t["temperature"] = temperature
    d.reduction(options)
    grads = [n for n in (*names, "temperature") if n in t and d.chance(0.9)]
    options |= of_rows(d)
    ids = [f"{n}_ids" for n in names] if d.chance(0.3) else []
    if ids:
        groups = d.pick(2, 3, max(B, 2))
        t |= {n: d.labels(rows, groups) for n, rows in zip(ids, (d.pick(B, N), N, *sizes), strict=True)}

    def parts(o: Ops, v: SimpleNamespace) -> tuple[Tensor, Tensor, Any]:
        a, p, *n = (getattr(v, x) for x in names)
        ga, gp, *gn = (unit_rows(getattr(v, x)) for x in guides)
        own = (ga * gp[:B]).sum(1, keepdim=True)
        margin = options.get("margin", 0.0)
        threshold = own - (own.abs() * margin if options.get("margin_strategy") == "relative" else margin)
        over = v.temperature.reshape(()) if isinstance(temperature, Tensor) else temperature
        sets = [(a, p, ga, gp)]
        sets += [(a, a, ga, ga)] if options.get("contrast_anchors", True) else []
        sets += [(p[:B], p, gp[:B], gp)] if options.get("contrast_positives", True) else []
        sets += [(a, x, ga, gx) for x, gx in zip(n, gn, strict=True)]
        z = torch.cat([products(x, y, True) / over for x, y, _, _ in sets], 1)
        dropped = [guided(o, gx, gy, torch.arange(B), margin, "", threshold) for _, _, gx, gy in sets]
        if ids:
            pairs, docs = no_duplicates(B, N, *(getattr(v, n) for n in ids))
            parts_of = docs.split([N, *sizes], 1)
            other = [parts_of[0]]
            other += [pairs] if options.get("contrast_anchors", True) else []
            other += [parts_of[0]] if options.get("contrast_positives", True) else []
            dropped = [x | ~y for x, y in zip(dropped, [*other, *parts_of[1:]], strict=True)]
        return z, ~torch.cat(dropped, 1), over

    every = torch.ones(B, dtype=torch.bool)

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        z, allowed, _ = parts(o, v)
        decoupled = options.get("decoupled", False)
        return Rows(transform(o, options, softmax(z, allowed, torch.arange(B), every, decoupled=decoupled)))

    def stats(o: Ops, v: SimpleNamespace) -> dict[str, Tensor]:
        z, allowed, over = parts(o, v)
        return statistics(o, z, allowed, torch.arange(B), every, 1 / torch.as_tensor(over))

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        more = {"ids": tuple(v[n] for n in ids)} if ids else {}
        return f(*(v[n] for n in names), guide=tuple(v[n] for n in guides),
                 temperature=v.get("temperature", temperature), **more, **given(o))  # fmt: skip

    same = N == B and all(k == B for k in sizes)
    return Case(
        "gist_embed", d.dtype, t, call, formula, tuple(grads), options,
        axes={**{n: ("row", None) for n in (*names, *guides)}, **dict.fromkeys(ids, ("row",))} if same else {},
        rows_axis="row", takes_group=same,
        stats=None if d.duplicates else stats, module="GISTEmbedLoss", traits={"embeddings": tuple(names)},
    )  # fmt: skip


@drawer("nt_xent", "decoupled_contrastive")
def nt_xent(d: Draw, name: str) -> Case:
    B, D = d.rows(), d.dim()
    t = {n: d.embeddings(B, D, zeros=True) for n in ("z1", "z2")}
    temperature = d.parameter(d.log(0.01, 10))
    options: dict[str, Any] = {}
    if isinstance(temperature, Tensor):
        t["temperature"] = temperature
    d.reduction(options)
    grads = [n for n in ("z1", "z2", "temperature") if n in t and d.chance(0.9)]
    if name == "nt_xent" and d.chance(0.25):
        options["transform"] = d.pick(*PHI)
    if name == "nt_xent":
        options |= d.some({"debiased": d.pick(0.05, 0.3)}, 0.25)
    own = torch.arange(2 * B)
    pair = (own + B) % max(2 * B, 1)

    def parts(o: Ops, v: SimpleNamespace) -> tuple[Tensor, Tensor, Any]:
        u = torch.cat([v.z1, v.z2])
        over = v.temperature.reshape(()) if isinstance(temperature, Tensor) else temperature
        return products(u, u, True) / over, own[:, None] != own, over

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        z, allowed, over = parts(o, v)
        every = torch.ones(2 * B, dtype=torch.bool)
        if "debiased" in options:
            return Rows(transform(o, options, debiased(o, options["debiased"], z, allowed, pair, every, 1 / over)))
        if name == "nt_xent":
            return Rows(transform(o, options, softmax(z, allowed, pair, every)))
        if B == 1:
            return Rows((z * 0).sum(1))
        return Rows(lse(z.masked_fill(~allowed | one_hot(pair, 2 * B), -torch.inf)) - z.gather(1, pair[:, None])[:, 0])

    def stats(o: Ops, v: SimpleNamespace) -> dict[str, Tensor]:
        z, allowed, over = parts(o, v)
        return statistics(o, z, allowed, pair, torch.ones(2 * B, dtype=torch.bool), 1 / torch.as_tensor(over))

    return Case(
        name, d.dtype, t,
        lambda f, v, o: f(v["z1"], v["z2"], temperature=v.get("temperature", temperature), **given(o)),
        formula, tuple(grads), options, axes={"z1": ("row", None), "z2": ("row", None)}, rows_axis="pairs",
        takes_group=name == "nt_xent", stats=None if d.duplicates or name != "nt_xent" else stats,
        module="NTXentLoss" if name == "nt_xent" else "DCLLoss", traits={"embeddings": ("z1", "z2")},
    )  # fmt: skip


@drawer("clip_distill")
def clip_distill(d: Draw) -> Case:
    M, D, T = d.rows(), d.dim(), d.dim()
    normalize = d.chance(0.5)
    names = ("image_features", "text_features")
    t = {n: d.embeddings(M, D, zeros=normalize) for n in names}
    dtype = d.pick(d.dtype, d.dtype, torch.float32, torch.bfloat16)
    t |= {f"teacher_{n}": d.embeddings(M, T, dtype=dtype) for n in names}
    scale, teacher_scale = d.parameter(d.log(0.1, 100)), d.parameter(d.log(0.1, 30))
    options: dict[str, Any] = {"normalize": True} if normalize else {}
    for n, x in (("logit_scale", scale), ("teacher_logit_scale", teacher_scale)):
        if isinstance(x, Tensor):
            t[n] = x
    d.reduction(options)
    grads = [n for n in (*names, "logit_scale") if n in t and d.chance(0.9)]

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        x, y = (getattr(v, n) for n in names)
        z = products(x, y, normalize) * (v.logit_scale.reshape(()) if isinstance(scale, Tensor) else scale)
        other = v.teacher_logit_scale.reshape(()) if isinstance(teacher_scale, Tensor) else teacher_scale
        w = v.teacher_image_features @ v.teacher_text_features.T * other
        losses = 0
        for student, teacher in ((z, w), (z.T, w.T)):
            log_p, log_q = teacher - lse(teacher)[:, None], student - lse(student)[:, None]
            losses = losses + (log_p.exp() * (log_p - log_q)).sum(1) / 2
        return Rows(losses)

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        return f(v["image_features"], v["text_features"], v.get("logit_scale", scale), v["teacher_image_features"],
                 v["teacher_text_features"], v.get("teacher_logit_scale", teacher_scale), **o)  # fmt: skip

    return Case(
        "clip_distill", d.dtype, t, call, formula, tuple(grads), options,
        axes={n: ("row", None) for n in (*names, *(f"teacher_{n}" for n in names))}, rows_axis="row",
        module="ClipDistillLoss",
    )  # fmt: skip


def _beside(x: Tensor, own: Tensor, cosine: bool) -> Tensor:
    found = (x[:, None] * own).sum(2)
    return found / (length(x)[:, None] * length(own)) if cosine else found


def _lse_of(z: Tensor, there: Tensor) -> Tensor:
    """0 where there is nothing."""
    total = lse(z.masked_fill(~there, -torch.inf))
    return torch.where(there.any(1), total, 0.0)


@drawer("info_nce_distill")
def info_nce_distill(d: Draw) -> Case:
    M, D, T = d.rows(), d.dim(), d.dim()
    directions = d.pick(("query_to_key",), ("key_to_query",), ("query_to_key", "key_to_query"))
    N = d.pick(M, M + d.whole(1, 20)) if directions == ("query_to_key",) else M
    normalize, form = d.chance(0.5), d.pick("kl", "ce", "mse")
    dtype = d.pick(d.dtype, d.dtype, torch.float32, torch.bfloat16)
    t = {"query": d.embeddings(M, D, zeros=normalize), "key": d.embeddings(N, D, zeros=normalize)}
    t |= {f"teacher_{n}": d.embeddings(rows, T, dtype=dtype, zeros=normalize) for n, rows in (("query", M), ("key", N))}
    temperature, taught = d.parameter(d.log(0.05, 10)), d.parameter(d.log(0.05, 10))
    options: dict[str, Any] = {"directions": directions, "form": form} | ({"normalize": True} if normalize else {})
    for n, x in (("temperature", temperature), ("teacher_temperature", taught)):
        if isinstance(x, Tensor):
            t[n] = x
    d.reduction(options)
    K = bank = 0
    if "query_to_key" in directions and d.chance(0.35):
        K = d.whole(0 if d.chance(0.2) else 1, 6)
        t["negatives"] = d.lay(d.normal(M, K, D).to(d.dtype))
        t["teacher_negatives"] = d.lay(d.normal(M, K, T).to(dtype))
        if d.chance(0.4):
            t["negatives_mask"] = d.lay(d.uniform(0, 1, M, K) < d.pick(0.3, 0.8))
    if "query_to_key" in directions and d.chance(0.3):
        bank = d.whole(0 if d.chance(0.2) else 1, 12)
        t["bank"] = d.embeddings(bank, D, zeros=normalize)
        t["teacher_bank"] = d.embeddings(bank, T, dtype=dtype, zeros=normalize)
    columns = "row" if N == M and "bank" not in t else None
    mask = MaskDraw(d, M, N + bank, "row", columns, ("same_id", "same_group", "dense", "not_self"))
    t |= mask.tensors
    grads = [n for n in ("query", "key", "negatives", "temperature") if n in t and d.chance(0.9)]

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        over = v.temperature.reshape(()) if "temperature" in t else temperature
        other = v.teacher_temperature.reshape(()) if "teacher_temperature" in t else taught
        keys, teachers = v.key, v.teacher_key
        if "bank" in t:
            keys, teachers = torch.cat([keys, v.bank.detach()]), torch.cat([teachers, v.teacher_bank])
        z, w = products(v.query, keys, normalize) / over, products(v.teacher_query, teachers, normalize) / other
        own = torch.arange(M)
        allowed, itself = mask.admissible(o, v, torch.zeros(M, N + bank), torch.zeros(()), own)
        allowed = allowed | (one_hot(own, N + bank) & ~itself)
        losses = []
        for direction in directions:
            if direction == "query_to_key":
                student, teacher, there = z, w, allowed
                if K:
                    student = torch.cat([z, _beside(v.query, v.negatives, normalize) / over], 1)
                    teacher = torch.cat([w, _beside(v.teacher_query, v.teacher_negatives, normalize) / other], 1)
                    real = v.negatives_mask if "negatives_mask" in t else torch.ones(M, K, dtype=torch.bool)
                    there = torch.cat([allowed, real], 1)
            else:
                student, teacher, there = z[:, :N].T, w[:, :N].T, allowed[:, :N].T
            logs = [torch.where(there, x, 0.0) - _lse_of(x, there)[:, None] for x in (teacher, student)]
            log_p, log_q = (torch.where(there, x, 0.0) for x in logs)
            p, q = (torch.where(there, x.exp(), 0.0) for x in (log_p, log_q))
            terms = {"kl": p * (log_p - log_q), "ce": -p * log_q, "mse": (q - p) ** 2}[form]
            losses.append(terms.sum(1))
        return Rows(torch.stack(losses).mean(0))

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        import fusedloss

        names = ("negatives", "teacher_negatives", "negatives_mask", "bank", "teacher_bank")
        more = {n: v[n] for n in names if n in v}
        return f(v["query"], v["key"], v["teacher_query"], v["teacher_key"],
                 temperature=v.get("temperature", temperature),
                 teacher_temperature=v.get("teacher_temperature", taught), mask=mask.build(fusedloss.masks, v),
                 **more, **o)  # fmt: skip

    return Case(
        "info_nce_distill", d.dtype, t, call, formula, tuple(grads), options,
        axes={"query": ("row", None), "teacher_query": ("row", None), "key": (columns, None),
              "teacher_key": (columns, None), "negatives": ("row", None, None), "negatives_mask": ("row", None),
              "teacher_negatives": ("row", None, None), **mask.axes}
        if columns and "not_self" not in mask.kinds else {}, rows_axis="row", module="InfoNCEDistillLoss",
        traits={"mask": mask.kinds},
    )  # fmt: skip


@drawer("mega_batch_margin", "in_batch_margin_ranking")
def margins(d: Draw, name: str) -> Case:
    B, D = d.rows(), d.dim()
    mega = name == "mega_batch_margin"
    N = B if mega else d.pick(B, B + d.whole(1, 20))
    options: dict[str, Any] = {}
    if mega:
        options = d.some({"positive_margin": d.real(-0.5, 1), "negative_margin": d.real(-0.5, 0.8)})
    else:
        options = d.some({"margin": d.real(-0.5, 1.5), "similarity": d.pick("cos", "dot")})
    cosine = mega or options.get("similarity", "cos") == "cos"
    t = {"anchor": d.embeddings(B, D, zeros=cosine), "positive": d.embeddings(N, D, zeros=cosine)}
    d.reduction(options)
    own = torch.arange(B)

    def formula(o: Ops, v: SimpleNamespace) -> Rows:
        a, p = v.anchor, v.positive
        s, size = products(a, p, cosine), norms(a, p, cosine)
        mine = s.gather(1, own[:, None])
        if mega:
            first = o.kink(options.get("positive_margin", 0.8) - mine[:, 0], 1)
            if B == 1:
                return Rows(first)
            others = s.masked_fill(one_hot(own, N), -torch.inf)
            hardest = others.gather(1, o.first_largest(others)[:, None])[:, 0]
            return Rows(first + o.kink(hardest - options.get("negative_margin", 0.3), 1))
        apart = options.get("margin", 0.5) - mine + s
        lost = o.kink(apart, size + size.gather(1, own[:, None]), where=~one_hot(own, N))
        return Rows(lost.masked_fill(one_hot(own, N), 0).sum(1) / max(N - 1, 1))

    return Case(
        name, d.dtype, t, lambda f, v, o: f(v["anchor"], v["positive"], **o), formula,
        tuple(n for n in t if d.chance(0.9)), options,
        axes={"anchor": ("row", None), "positive": ("row", None)} if N == B else {}, rows_axis="row",
        module="MegaBatchMarginLoss" if mega else "InBatchMarginRankingLoss",
    )  # fmt: skip


# Losses of losses -----------------------------------------------------------------------------------------------------

INNER = (
    "info_nce",
    "info_nce",
    "clip",
    "multiple_negatives_ranking",
    "gist_embed",
    "nt_xent",
    "sup_con",
    "siglip",
    "cosent",
)


def _inner(d: Draw) -> Case | None:
    """A loss with options that a prefix's loss may have."""
    for _ in range(20):
        case = DRAWERS[d.pick(*INNER)](d)
        if not {"negatives", "bank"} & set(case.tensors) and case.traits.get("embeddings"):
            return case
    raise AssertionError("no loss of embeddings alone in 20 draws")


def cut(o: Ops, inner: Case, v: SimpleNamespace, prefixes: dict[str, Tensor]) -> SimpleNamespace:
    # Divided by 1e-12 once or twice: gradients of 1e12 or 1e24, of which neither means anything.
    o.unclear += sum(int((x == 0).all(1).sum()) for x in prefixes.values())
    if inner.name == "cosent":  # some of whose similarities do not divide by norms
        prefixes = {n: unit_rows(x) for n, x in prefixes.items()}
    return SimpleNamespace(**{**vars(v), **prefixes, "unit_prefix": True})


def _dims(d: Draw, D: int) -> tuple[int, ...]:
    return tuple(int(x) + 1 for x in d.permutation(D)[: d.whole(1, min(3, D))])


def _over(parts: list[tuple[float, Rows | Tensor]], reduction: str) -> Rows | Tensor:
    """A weighted sum of losses, each reduced by itself."""
    if not isinstance(parts[0][1], Rows):
        return sum(w * x for w, x in parts)
    return Rows(sum(w * x.reduced(reduction) for w, x in parts), 1)


@drawer("matryoshka")
def matryoshka(d: Draw) -> Case:
    inner = _inner(d)
    names = inner.traits["embeddings"]
    dims = _dims(d, inner.tensors[names[0]].shape[1])
    weights = d.pick(None, [d.real(0, 2) for _ in dims])
    reduction = inner.reduction()

    def prefixes(o: Ops, v: SimpleNamespace, dim: int) -> SimpleNamespace:
        return cut(o, inner, v, {n: getattr(v, n)[:, :dim] for n in names})

    def formula(o: Ops, v: SimpleNamespace) -> Rows | Tensor:
        given = weights or [1.0] * len(dims)
        return _over(
            [(w, inner.formula(o, prefixes(o, v, k))) for k, w in zip(dims, given, strict=True)], reduction or "mean"
        )

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        import fusedloss

        loss = getattr(fusedloss.functional, inner.name)
        return inner.call(lambda *x, **k: f(loss, *x, dims=dims, weights=weights, **k), v, o)

    return Case(
        "matryoshka", inner.dtype, inner.tensors, call, formula, inner.grads, inner.options,
        takes_group=inner.takes_group,
        reductions=(reduction,) if reduction else (), default_reduction=inner.default_reduction, rows_axis=None,
        traits={**inner.traits, "inner": inner.name, "dims": dims},
    )  # fmt: skip


@drawer("adaptive_layer", "matryoshka_2d")
def adaptive_layer(d: Draw, name: str) -> Case:
    inner = _inner(d)
    inner.options.pop("reduction", None)
    if inner.name in ("multiple_negatives_ranking",):
        inner.reductions = ("mean",)
    names, layers = inner.traits["embeddings"], d.whole(1, 4)
    t = dict(inner.tensors)
    shapes = {n: t[n].shape for n in names}
    for n in names:
        t[n] = d.lay(d.normal(layers, *shapes[n]).to(inner.dtype))
    D = shapes[names[0]][1]
    dims = _dims(d, D) if name == "matryoshka_2d" else None
    options = d.some({
        "last_layer_weight": d.real(0, 2), "prior_layers_weight": d.real(0, 2), "kl_div_weight": d.real(0, 2),
        "kl_temperature": d.pick(0.0, 0.3, 1.0), "layer_weighting": d.pick("uniform", "log", "linear"),
    })  # fmt: skip
    if layers > 1 and d.chance(0.4):
        options["layer_indices"] = [int(x) for x in d.permutation(layers - 1)[: d.whole(1, layers - 1)]]
    given = {
        "last_layer_weight": 1.0,
        "prior_layers_weight": 1.0,
        "kl_div_weight": 1.0,
        "kl_temperature": 0.3,
        "layer_weighting": "uniform",
        "layer_indices": list(range(layers - 1)),
        **options,
    }
    weigh = {"uniform": lambda i: 1.0, "log": lambda i: 1 / (1 + math.log(1 + i)), "linear": lambda i: 1 / (1 + i)}[
        given["layer_weighting"]
    ]
    options |= inner.options

    def one(o: Ops, v: SimpleNamespace, layer: int) -> Tensor:
        def of(dim: int | None) -> Tensor:
            own = {n: getattr(v, n)[layer] for n in names}
            given = SimpleNamespace(**{**vars(v), **own})
            if dim is not None:
                given = cut(o, inner, v, {n: x[:, :dim] for n, x in own.items()})
            found = inner.formula(o, given)
            return found.reduced(inner.default_reduction) if isinstance(found, Rows) else found

        return of(None) if dims is None else sum(of(k) for k in dims)

    def formula(o: Ops, v: SimpleNamespace) -> Tensor:
        total = given["last_layer_weight"] * one(o, v, layers - 1)
        indices, T = given["layer_indices"], given["kl_temperature"]
        for i in indices:
            total = total + one(o, v, i) * given["prior_layers_weight"] * weigh(i) / len(indices)
            if T and given["kl_div_weight"]:
                own = torch.cat([getattr(v, n)[i] for n in names]) / T
                last = torch.cat([getattr(v, n)[layers - 1] for n in names]).detach() / T
                log_q, log_p = own - lse(own)[:, None], last - lse(last)[:, None]
                total = total + given["kl_div_weight"] * T * (log_p.exp() * (log_p - log_q)).sum() / max(len(own), 1)
        return total

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Any:
        import fusedloss

        loss = getattr(fusedloss.functional, inner.name)
        more = {} if dims is None else {"dims": dims}
        return inner.call(lambda *x, **k: f(loss, *x, **more, **k), v, o)

    return Case(name, inner.dtype, t, call, formula, inner.grads, options, reductions=(), takes_group=inner.takes_group,
                traits={**inner.traits, "inner": inner.name})  # fmt: skip
