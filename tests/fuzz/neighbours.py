"""`fusedloss.search.top_k`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Ops, drawer, products, root
from .draw import Draw


@drawer("top_k")
def top_k(d: Draw) -> Case:
    M, N, D = d.rows(), d.pick(d.rows(), d.rows(), 0), d.dim()
    if d.chance(0.03):
        N = d.whole(2040, 2300)  # more columns than a tile
    kind = d.pick("cos", "cos", "dot", "euclidean", "manhattan")
    k = d.pick(1, 2, d.whole(1, 20), max(N, 1), N + 3)
    t = {"query": d.embeddings(M, D, zeros=kind == "cos"), "corpus": d.embeddings(N, D, zeros=kind == "cos")}
    options: dict[str, Any] = {"similarity": kind} if kind != "cos" or d.chance(0.5) else {}

    def scores(v: SimpleNamespace) -> Tensor:
        x, y = v.query, v.corpus
        if kind in ("cos", "dot"):
            return products(x, y, kind == "cos")
        apart = x[:, None] - y
        return -(root(apart.square().sum(2)) if kind == "euclidean" else apart.abs().sum(2))

    def formula(o: Ops, v: SimpleNamespace) -> Tensor:
        s = scores(v)
        found = s.topk(min(k, N), dim=1).values
        return torch.cat([found, found.new_full((M, k - found.shape[1]), -torch.inf)], 1)

    def call(f: Any, v: dict[str, Tensor], o: dict[str, Any]) -> Tensor:
        values, indices = f(v["query"], v["corpus"], k, **o)
        s = scores(SimpleNamespace(**{n: x.double() for n, x in v.items()}))
        real = min(k, N)
        assert indices.dtype == torch.int64 and indices.shape == (M, k)
        assert bool((indices[:, real:] == -1).all()), "columns that are none have another index than -1"
        chosen = indices[:, :real]
        assert bool(((chosen >= 0) & (chosen < N)).all()), "an index is no row of the corpus"
        assert all(len(set(row)) == real for row in chosen.tolist()), "a row of the corpus was found twice"
        if real:
            size = (
                s.abs().max().item()
                + (v["query"].double().norm(dim=1).max() + v["corpus"].double().norm(dim=1).max()).item()
            )
            off = (s.gather(1, chosen) - values[:, :real].double()).abs().max().item()
            assert off <= 64 * Ops(v["query"].dtype).unit * size, f"scores are not those of the indices, by {off}"
        held = values[:, :real]
        ties = (held[:, 1:] == held[:, :-1]) & (chosen[:, 1:] < chosen[:, :-1])
        assert not bool(ties.any()), "of equal scores a later row stands before an earlier one"
        return values

    return Case(
        "top_k", d.dtype, t, call, formula, (), options, reductions=(), axes={"query": ("row", None)}, rows_axis="row",
        backends=(), traits={"similarity": kind},
    )  # fmt: skip
