"""group=: several processes together give what one process gives with the whole batch.

Every case runs once in one process on the concatenated batch, and on each rank of gloo groups of 1 to 4 processes with
its own rows: the same value on all ranks; gradients of features and of the loss's parameters that sum ("sum") or
average ("ddp") over ranks to those of the one process. Shards are uneven, and one has no rows.
"""

from __future__ import annotations

import ctypes
import functools
import sys

import pytest
import torch
import torch.distributed as dist
from condition import exact_and_moves, within
from grids import cover
from ranks import Ranks, on_ranks

import fusedloss
from fusedloss import masks
from fusedloss.bench import measure
from fusedloss.distributed import MATCH
from fusedloss.grad_cache import GradCache, WithMemory

pytestmark = pytest.mark.processes

if torch.cuda.is_available():
    pytest.skip("processes are forked here, which CUDA does not survive", allow_module_level=True)

D, G = 6, 3
SHARDS = {1: [(7,)], 2: [(4, 3), (0, 5)], 3: [(2, 4, 3)], 4: [(3, 3, 3, 3), (2, 0, 5, 1)]}


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(seed, rows, kinds):
    return torch.randint(0, kinds, (rows,), generator=torch.Generator().manual_seed(seed))


class Batch:
    """The whole batch's tensors, or one rank's rows of them."""

    def __init__(self, rows, dtype, part=slice(None)):
        self.rows = rows
        named = [("x", 1, D), ("y", 2, D), ("n", 3, D), ("m", 4, D)]
        self.leaves = {k: numbers(seed, rows, d)[part].to(dtype).requires_grad_() for k, seed, d in named}
        self.constants = {"ids": ids(7, rows, 4)[part], "labels": ids(8, rows, 3)[part]}
        self.constants |= {f"g{k}": numbers(20 + k, rows, G)[part].to(dtype) for k in range(4)}
        self.constants["weight"] = numbers(30, rows).abs()[part].to(dtype)
        self.constants["bias"] = self.leaves.setdefault("bias", numbers(31, rows)[part].to(dtype).requires_grad_())
        self.constants["target"] = ids(32, rows, rows)[part]
        self.constants |= {"queue": numbers(40, 5, D).to(dtype), "queue_ids": ids(41, 5, 4)}  # alike on all ranks
        self.parameters = {
            "temperature": torch.tensor(0.4, dtype=dtype, requires_grad=True),
            "logit_bias": torch.tensor(-0.5, dtype=dtype, requires_grad=True),
        }

    def __getattr__(self, name):
        return {**self.constants, **self.leaves, **self.parameters}[name]

    def in_float64(self, move):
        """The same numbers, each moved by `move`."""
        same = Batch(self.rows, torch.float64)
        for kind in ("leaves", "constants", "parameters"):
            given = getattr(self, kind).items()
            moved = {k: move(x.detach().double()) if x.is_floating_point() else x for k, x in given}
            setattr(same, kind, {k: x.requires_grad_() if kind != "constants" else x for k, x in moved.items()})
        same.constants["bias"] = same.leaves["bias"]
        return same

    def results(self, loss):
        value = loss if loss.dim() == 0 else loss.sum()
        named = {**self.leaves, **self.parameters}
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        zeros = (torch.zeros_like(x) if g is None else g for g, x in zip(found, named.values(), strict=True))
        return loss.detach(), dict(zip(named, zeros, strict=True))


ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
unit = torch.nn.functional.normalize
ranking = fusedloss.multiple_negatives_ranking


def distill(b, strategy="gather", **options):
    """With a teacher of dimension G; it has no other strategy."""
    assert strategy == "gather"
    return fusedloss.info_nce_distill(b.x, b.y, b.g0, b.g1, temperature=b.temperature, **options)


prefixes = functools.partial(fusedloss.matryoshka, dims=(4, D, 2), weights=(1.0, 0.5, -0.3))


CASES = {
    "info_nce": lambda b, **k: fusedloss.info_nce(b.x, b.y, temperature=b.temperature, **k),
    "info_nce, normalized, sum": lambda b, **k: fusedloss.info_nce(b.x, b.y, normalize=True, reduction="sum", **k),
    "info_nce, weight, bias": lambda b, **k: fusedloss.info_nce(
        b.x, b.y, temperature=b.temperature, key_bias=b.bias, weight=b.weight, **k
    ),
    "info_nce, target": lambda b, **k: fusedloss.info_nce(b.x, b.y, b.target, temperature=b.temperature, **k),
    "info_nce, target, ignored": lambda b, **k: fusedloss.info_nce(
        b.x, b.y, b.target.masked_fill(b.ids == 0, -100), key_bias=b.bias, mask=masks.same_id(b.ids, b.ids), **k
    ),
    "info_nce, target, 0 ignored": lambda b, **k: fusedloss.info_nce(
        b.x, b.y, b.target, temperature=b.temperature, ignore_index=0, **k
    ),
    "info_nce, target, keys removed": lambda b, **k: fusedloss.info_nce(
        b.x, b.y, b.target, key_bias=b.bias.masked_fill(b.ids == 1, -torch.inf), **k
    ),
    "info_nce, target, not_self": lambda b, **k: fusedloss.info_nce(b.x, b.y, b.target, mask=masks.not_self(), **k),
    "info_nce, not_self(1)": lambda b, **k: fusedloss.info_nce(
        b.x, b.y, mask=masks.not_self(1) & masks.same_id(b.ids, b.ids), **k
    ),
    "info_nce, target, not_self(-2)": lambda b, **k: fusedloss.info_nce(
        b.x, b.y, b.target, weight=b.weight, mask=masks.not_self(-2), normalize=True, **k
    ),
    "ranking, not_self(3)": lambda b, **k: ranking(b.x, b.y, b.n, mask=masks.not_self(3), scale=1 / b.temperature, **k),
    "info_nce, ids": lambda b, **k: fusedloss.info_nce(b.x, b.y, mask=masks.same_id(b.ids, b.ids), **k),
    "info_nce, margin": lambda b, **k: fusedloss.info_nce(
        b.x, b.y, mask=masks.score_margin(0.1) & masks.same_group(b.labels, b.labels), normalize=True, **k
    ),
    "info_nce, margin's factor": lambda b, **k: fusedloss.info_nce(
        b.x, b.y, temperature=b.temperature, mask=masks.score_margin(0.1, factor=0.5), normalize=True, **k
    ),
    "info_nce, guide": lambda b, **k: fusedloss.info_nce(b.x, b.y, mask=masks.guide(b.g0, b.g1), **k),
    "info_nce, queue": lambda b, **k: fusedloss.info_nce(
        b.x,
        b.y,
        bank=b.queue,
        mask=masks.same_id(b.ids, torch.cat([b.ids, b.queue_ids])) & masks.score_margin(0.3),
        temperature=b.temperature,
        **k,
    ),
    "info_nce, queue, target, bias": lambda b, **k: fusedloss.info_nce(
        b.x,
        b.y,
        b.target,
        bank=b.queue,
        key_bias=torch.cat([b.bias, b.logit_bias.expand(len(b.queue))]),
        mask=masks.not_self(2),
        normalize=True,
        **k,
    ),
    "info_nce, banks": lambda b, **k: fusedloss.info_nce(
        b.x,
        b.y,
        bank=b.n,
        bank_across="group" in k,
        key_bias=torch.cat([b.bias, b.bias * b.temperature]),
        mask=masks.same_group(b.ids, torch.cat([b.ids, b.labels])) & masks.score_margin(0.2),
        **k,
    ),
    "info_nce, debiased": lambda b, **k: fusedloss.info_nce(
        b.x, b.y, b.target, temperature=b.temperature, normalize=True, debiased=0.1, **k
    ),
    "info_nce, several targets": lambda b, **k: fusedloss.info_nce(
        b.x,
        b.y,
        torch.stack([b.target, b.target // 2, (b.target // 3).masked_fill(b.ids == 0, -100)], 1),
        temperature=b.temperature,
        key_bias=b.bias.masked_fill(b.ids == 1, -torch.inf),
        mask=masks.not_self() & masks.same_id(b.ids, b.ids),
        **k,
    ),
    "info_nce, several targets, joint": lambda b, **k: fusedloss.info_nce(
        b.x, b.y, torch.stack([b.target, b.target // 2], 1), positives="joint", normalize=True, ignore_index=0, **k
    ),
    "clip, debiased": lambda b, **k: fusedloss.clip(b.x, b.y, 1 / b.temperature, normalize=True, debiased=0.1, **k),
    "nt_xent, debiased": lambda b, **k: fusedloss.nt_xent(b.x, b.y, temperature=b.temperature, debiased=0.1, **k),
    "info_nce, debiased, columns dropped": lambda b, **k: fusedloss.info_nce(
        b.x,
        b.y,
        temperature=b.temperature,
        key_bias=b.bias.masked_fill(b.ids == 1, -torch.inf),
        mask=masks.same_id(b.labels, b.labels),
        transform=fusedloss.transforms.generalised(0.5),
        debiased=0.2,
        **k,
    ),
    "clip, debiased, ids": lambda b, **k: fusedloss.clip(
        b.x, b.y, 1 / b.temperature, normalize=True, mask=masks.same_id(b.ids, b.ids), debiased=0.1, **k
    ),
    "ranking, debiased, both directions, ids": lambda b, **k: ranking(
        b.x,
        b.y,
        directions=(ALL[0], ALL[2]),
        partition_mode="per_direction",
        ids=(b.ids, b.labels),
        scale=1 / b.temperature,
        debiased=0.1,
        **k,
    ),
    "info_nce, own negatives": lambda b, **k: fusedloss.info_nce(
        b.x,
        b.y,
        negatives=torch.stack((b.n, b.m), 1),
        negatives_mask=torch.stack([b.ids != 0, b.labels != 1], 1),
        key_bias=b.bias,
        weight=b.weight,
        temperature=b.temperature,
        transform=fusedloss.transforms.focal(1.5),
        **k,
    ),
    "info_nce, a teacher's scores": lambda b, **k: fusedloss.info_nce(
        b.x, b.y, negatives=b.n[:, None], teacher_scores=torch.stack((b.bias, b.weight), 1), normalize=True, **k
    ),
    "info_nce, own negatives, margin, sum": lambda b, **k: fusedloss.info_nce(
        b.x,
        b.y,
        negatives=b.n[:, None],
        mask=masks.score_margin(0.1) & masks.same_id(b.ids, b.ids),
        normalize=True,
        reduction="sum",
        **k,
    ),
    "info_nce, one tensor": lambda b, **k: fusedloss.info_nce(b.x, b.x, temperature=b.temperature, **k),
    "clip": lambda b, **k: fusedloss.clip(b.x, b.y, 1 / b.temperature, **k),
    "clip, normalized, ids": lambda b, **k: fusedloss.clip(
        b.x, b.y, 1 / b.temperature, b.logit_bias, normalize=True, mask=masks.same_id(b.ids, b.ids), **k
    ),
    "clip, a number, sum": lambda b, **k: fusedloss.clip(b.x, b.y, 5.0, normalize=True, reduction="sum", **k),
    "ranking": lambda b, **k: ranking(b.x, b.y, b.n, b.m, scale=1 / b.temperature, **k),
    "ranking, own negatives": lambda b, **k: ranking(
        b.x,
        b.y,
        b.n,
        b.m,
        scale=1 / b.temperature,
        own_negatives=True,
        negatives_mask=torch.stack([b.ids != 0, b.labels != 1], 1),
        **k,
    ),
    "ranking, all directions": lambda b, **k: ranking(b.x, b.y, b.n, directions=ALL, scale=1 / b.temperature, **k),
    "ranking, per direction": lambda b, **k: ranking(
        b.x, b.y, b.n, directions=(ALL[0], ALL[2]), partition_mode="per_direction", scale=1 / b.temperature, **k
    ),
    "ranking, symmetric": lambda b, **k: ranking(
        b.x, b.y, directions=(ALL[0], ALL[2]), partition_mode="per_direction", scale=1 / b.temperature, **k
    ),
    "ranking, hardness": lambda b, **k: ranking(
        b.x, b.y, b.n, hardness_mode="all_negatives", hardness_strength=3.0, **k
    ),
    "ranking, hard negatives": lambda b, **k: ranking(
        b.x, b.y, b.n, hardness_mode="hard_negatives", hardness_strength=3.0, similarity="dot", scale=0.5, **k
    ),
    "ranking, ids": lambda b, **k: ranking(
        b.x, b.y, b.n, ids=(b.ids, b.labels, b.ids), directions=ALL, scale=1 / b.temperature, **k
    ),
    "gist_embed": lambda b, **k: fusedloss.gist_embed(b.x, b.y, guide=(b.g0, b.g1), temperature=b.temperature, **k),
    "gist_embed, negatives, relative": lambda b, **k: fusedloss.gist_embed(
        b.x, b.y, b.n, guide=(b.g0, b.g1, b.g2), margin_strategy="relative", margin=0.1, contrast_anchors=False, **k
    ),
    "siglip": lambda b, **k: fusedloss.siglip(b.x, b.y, 1 / b.temperature, b.logit_bias, **k),
    "siglip, ids, sum": lambda b, **k: fusedloss.siglip(
        b.x, b.y, 3.0, b.logit_bias, target=masks.same_id(b.ids, b.ids), normalize=True, reduction="sum", **k
    ),
    "sup_con": lambda b, **k: fusedloss.sup_con(b.x, b.labels, temperature=b.temperature, **k),
    "sup_con, transform": lambda b, **k: fusedloss.sup_con(
        b.x, b.labels, temperature=b.temperature, transform=fusedloss.transforms.generalised(0.5), **k
    ),
    "sup_con, in": lambda b, **k: fusedloss.sup_con(b.x, b.labels, temperature=b.temperature, form="in", **k),
    "distill, both directions": lambda b, **k: distill(
        b, directions=("query_to_key", "key_to_query"), mask=masks.same_id(b.ids, b.ids), **k
    ),
    "distill, negatives, sum": lambda b, **k: distill(
        b,
        form="mse",
        normalize=True,
        negatives=torch.stack((b.n, b.m), 1),
        teacher_negatives=torch.stack((b.g2, b.g3), 1),
        mask=masks.not_self(1),
        reduction="sum",
        **k,
    ),
    "nt_xent": lambda b, **k: fusedloss.nt_xent(b.x, b.y, temperature=b.temperature, **k),
    "prefixes, info_nce": lambda b, **k: prefixes(
        fusedloss.info_nce,
        b.x,
        b.y,
        temperature=b.temperature,
        key_bias=b.bias,
        weight=b.weight,
        mask=masks.same_id(b.ids, b.ids),
        **k,
    ),
    # By a sweep for each prefix.
    "prefixes, info_nce, target, transform": lambda b, **k: prefixes(
        fusedloss.info_nce,
        b.x,
        b.y,
        target=b.target.masked_fill(b.ids == 0, -100),
        temperature=b.temperature,
        transform=fusedloss.transforms.focal(1.5),
        **k,
    ),
    "prefixes, info_nce, margin": lambda b, **k: prefixes(
        fusedloss.info_nce, b.x, b.y, mask=masks.score_margin(0.1), **k
    ),
    "prefixes, info_nce, several targets": lambda b, **k: prefixes(
        fusedloss.info_nce, b.x, b.y, target=torch.stack([b.target, b.target // 2], 1), temperature=b.temperature, **k
    ),
    "prefixes, clip, sum": lambda b, **k: prefixes(
        fusedloss.clip, b.x, b.y, logit_scale=1 / b.temperature, reduction="sum", **k
    ),
    "prefixes, ranking": lambda b, **k: prefixes(ranking, b.x, b.y, b.n, directions=ALL, scale=1 / b.temperature, **k),
    "prefixes, gist_embed": lambda b, **k: prefixes(
        fusedloss.gist_embed, b.x, b.y, guide=(b.g0, b.g1), temperature=b.temperature, **k
    ),
    "nt_xent, prefixes": lambda b, **k: prefixes(fusedloss.nt_xent, b.x, b.y, temperature=b.temperature, **k),
    "prefixes, siglip": lambda b, **k: prefixes(
        fusedloss.siglip, b.x, b.y, logit_scale=1 / b.temperature, logit_bias=b.logit_bias, **k
    ),
    "layers and prefixes, sum": lambda b, **k: fusedloss.matryoshka_2d(
        fusedloss.info_nce,
        torch.stack((b.n, b.x)),
        torch.stack((b.m, b.y)),
        dims=(D, 2),
        temperature=b.temperature,
        reduction="sum",
        **k,
    ),
}
# A gradient's scale is a factor, the same in each dtype.
OPTIONS = [
    (dtype, strategy, *scale_and_reduction)
    for dtype in (torch.float64, torch.float32)
    for strategy in ("gather", "ring")
    for scale_and_reduction in (("ddp", None), ("sum", None), ("match:tevatron", None), ("ddp", "none"))
    if dtype == torch.float64 or scale_and_reduction in (("ddp", None), ("ddp", "none"))
]
WHOLE_ROWS = ("sup_con, in", "distill, both directions", "distill, negatives, sum")  # which a ring does not have


def settings(name, size):
    """Shards and options with every pair of values; which triples those have differs from loss to loss."""
    cases = [
        (sizes, *options)
        for sizes in SHARDS[size]
        for options in OPTIONS
        if not (options[-1] and "sum" in name) and not (options[1] == "ring" and name in WHOLE_ROWS)
    ]
    first = list(CASES).index(name) % len(cases)
    cases = cases[first:] + cases[:first]
    axes = [(sizes, dtype, strategy, (scale, reduction)) for sizes, dtype, strategy, scale, reduction in cases]
    return [cases[place] for place in sorted(cover(axes))]


def on_a_rank(rank, size):
    """What finds a case's values and gradients there, by shards, dtype and options."""

    def run(name):
        found = {}
        for sizes, dtype, strategy, grad_scale, reduction in settings(name, size):
            start = sum(sizes[:rank])
            batch = Batch(sum(sizes), dtype, slice(start, start + sizes[rank]))
            options = {"group": dist.group.WORLD, "strategy": strategy, "grad_scale": grad_scale}
            options |= {"reduction": reduction} if reduction else {}
            loss = CASES[name](batch, **options)
            found[sizes, name, dtype, strategy, grad_scale, reduction] = batch.results(loss)
        return found

    return run


@pytest.fixture(scope="module", params=[1, 2, 4, pytest.param(3, marks=pytest.mark.grid)])
def ranks(request):
    size = request.param
    ranks = Ranks(size, lambda rank: on_a_rank(rank, size))
    yield ranks
    ranks.stop()


@functools.cache
def alone(name, rows, dtype, reduction):
    """What one process has of the whole batch: its own, that in fp64, and by how much another's may differ."""

    def run(batch):
        value, gradients = batch.results(CASES[name](batch, **({"reduction": reduction} if reduction else {})))
        return {"value": value, **gradients}

    whole = Batch(rows, dtype)
    own = run(whole)
    if dtype != torch.float64:
        return own, *exact_and_moves(lambda move: run(whole.in_float64(move)), dtype)
    # Nothing here is more exact: 1e-12 of the largest number, and of the numbers of which a parameter's is the sum.
    terms = sum((whole.leaves[k].norm(dim=-1) * own[k].norm(dim=-1)).sum().item() for k in "xynm")
    largest = {k: max(x.abs().amax().item(), terms if k in whole.parameters else 1e-3) for k, x in own.items()}
    return own, own, {k: 1e-12 * x for k, x in largest.items()}


def close(found, wanted, what):
    """To 1e-12 of the largest number, in float64."""
    near = 1e-12 * max(wanted.abs().amax().item(), 1e-3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=near, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_as_one_process(ranks, name):
    outcomes = ranks(name)
    for key in outcomes[0]:
        sizes, _, dtype, _, grad_scale, reduction = key
        found = [outcome[key] for outcome in outcomes]
        whole, exact, moves = alone(name, sum(sizes), dtype, reduction)

        def holds(ours, what, times=1, key=key, whole=whole, exact=exact, moves=moves):
            assert ours.dtype == whole[what].dtype
            within(ours, whole[what], exact[what], moves[what], (key, what), times)

        if reduction is None:
            for one in found:
                holds(one[0], "value")
        elif name.startswith("nt_xent"):  # both views of a rank, one after the other
            views = [one[0].view(2, -1) for one in found]
            holds(torch.cat(views, 1).flatten(), "value")
        else:
            holds(torch.cat([one[0] for one in found]), "value")
        # Ranks' shares add up to the gradient; DDP divides by their number, and one library has too much of the rest.
        factor = 1 if grad_scale == "sum" or reduction else len(sizes)
        of_parameters = factor * (len(sizes) if grad_scale == "match:tevatron" else 1)
        batch = Batch(sum(sizes), dtype)
        for leaf in batch.leaves:
            times = of_parameters if leaf == "bias" else factor
            holds(torch.cat([one[1][leaf] for one in found]), leaf, times)
        for parameter in batch.parameters:
            holds(torch.stack([one[1][parameter] for one in found]).sum(0), parameter, of_parameters)


# Banks ----------------------------------------------------------------------------------------------------------------


def with_banks(rank):
    """Banks of 0, 3 and 5 rows, whose mean loss and summed gradients are one process's, by strategy."""
    sizes, outcome = (0, 3, 5), {}
    for strategy in ("gather", "ring"):
        batch = Batch(7, torch.float64, slice((0, 3, 5)[rank], (3, 5, 7)[rank]))
        start = sum(sizes[:rank])
        bank = numbers(50, 8, D)[start : start + sizes[rank]]
        options = {"group": dist.group.WORLD, "strategy": strategy, "grad_scale": "sum", "temperature": 0.4}
        loss = fusedloss.info_nce(
            batch.x, batch.y, bank=bank, bank_across=True, mask=masks.score_margin(0.1), **options
        )
        outcome[strategy, "all"] = batch.results(loss)
        loss = fusedloss.info_nce(batch.x, batch.y, bank=bank[:0], **options)
        outcome[strategy, "none"] = batch.results(loss)
        # Rows see the rank's own bank: an InfoNCE of each rank's rows against all keys and that bank.
        loss = fusedloss.info_nce(batch.x, batch.y, bank=bank, **options, reduction="none")
        outcome[strategy, "own"] = batch.results(loss)
    return outcome


def test_banks_of_different_sizes():
    found, whole = on_ranks(3, with_banks), Batch(7, torch.float64)
    bank, mask = numbers(50, 8, D), masks.score_margin(0.1)
    for kind, options in (("all", {"bank": bank, "mask": mask}), ("none", {})):
        value, right = whole.results(fusedloss.info_nce(whole.x, whole.y, temperature=0.4, **options))
        for strategy in ("gather", "ring"):
            for one in found:
                close(one[strategy, kind][0], value, (strategy, kind))
            for leaf in "xy":
                close(torch.cat([one[strategy, kind][1][leaf] for one in found]), right[leaf], (strategy, kind, leaf))
    parts = [slice(3), slice(3, 5), slice(5, 7)]
    own = [
        fusedloss.info_nce(
            whole.x[p], whole.y, torch.arange(7)[p], bank=bank[start:end], temperature=0.4, reduction="none"
        )
        for p, (start, end) in zip(parts, ((0, 0), (0, 3), (3, 8)), strict=True)
    ]
    value, right = whole.results(torch.cat(own))
    for strategy in ("gather", "ring"):
        close(torch.cat([one[strategy, "own"][0] for one in found]), value, (strategy, "own"))
        for leaf in "xy":
            close(torch.cat([one[strategy, "own"][1][leaf] for one in found]), right[leaf], (strategy, "own", leaf))


# Scales of the gradient -----------------------------------------------------------------------------------------------


def matching(rank):
    outcome = {}
    for library in MATCH:
        batch = Batch(6, torch.float64, slice(3 * rank, 3 * rank + 3))
        scale = f"match:{library}"
        loss = fusedloss.info_nce(
            batch.x, batch.y, temperature=batch.temperature, group=dist.group.WORLD, grad_scale=scale
        )
        outcome[library] = batch.results(loss)[1]
    return outcome


def test_the_scales_of_libraries():
    """After an average over ranks, over the right gradient: of features, and of the loss's parameters."""
    found = on_ranks(2, matching)
    whole = Batch(6, torch.float64)
    _, right = whole.results(fusedloss.info_nce(whole.x, whole.y, temperature=whole.temperature))
    factor = {"1": 1.0, "W": 2.0, "1/W": 0.5}
    for library, (by_rows, by_parameters) in MATCH.items():
        for leaf in "xy":  # a row's gradient comes from its rank alone
            average = torch.cat([one[library][leaf] for one in found]) / 2
            close(average, factor[by_rows] * right[leaf], (library, leaf))
        average = sum(one[library]["temperature"] for one in found) / 2
        close(average, factor[by_parameters] * right["temperature"], library)


# Kernels --------------------------------------------------------------------------------------------------------------

KERNELS = [
    "info_nce, normalized, sum",
    "info_nce, weight, bias",
    "clip, normalized, ids",
    "gist_embed",
    "siglip",
    "sup_con",
]


def by_kernels(rank, backend):
    outcome = {}
    for name in KERNELS:
        for strategy in ("gather", "ring"):
            batch = Batch(7, torch.float32, slice(4) if rank == 0 else slice(4, 7))
            options = {"group": dist.group.WORLD, "strategy": strategy, "grad_scale": "sum", "backend": backend}
            outcome[name, strategy] = batch.results(CASES[name](batch, **options))
    return outcome


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernels(backend):
    found = on_ranks(2, by_kernels, backend)
    for name, strategy in found[0]:
        whole, exact, moves = alone(name, 7, torch.float32, None)
        for leaf in Batch(7, torch.float32).leaves:
            ours = torch.cat([one[name, strategy][1][leaf] for one in found])
            within(ours, whole[leaf], exact[leaf], moves[leaf], (name, strategy, leaf))
        for one in found:
            within(one[name, strategy][0], whole["value"], exact["value"], moves["value"], (name, strategy))


# In chunks ------------------------------------------------------------------------------------------------------------


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(D, D, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight.copy_(numbers(40, D, D))
            self.layer.bias.copy_(numbers(41, D))

    def forward(self, x):
        return self.layer(x).tanh()


def in_chunks(rank):
    outcome = {}
    for strategy in ("gather", "ring"):
        batch = Batch(11, torch.float64, slice(7) if rank == 0 else slice(7, 11))
        encoder = torch.nn.parallel.DistributedDataParallel(Encoder())
        loss = fusedloss.ClipLoss(group=dist.group.WORLD, strategy=strategy)
        step = GradCache(lambda x, y, loss=loss: loss(x, y, 3.0), encoder, rows=3)  # three chunks here, two there
        value = step(batch.x.detach(), batch.y.detach())
        outcome[strategy] = value, [p.grad for p in encoder.parameters()]
    return outcome


def test_encoders_in_chunks_on_several_processes():
    outcomes = on_ranks(2, in_chunks)
    whole, encoder = Batch(11, torch.float64), Encoder()
    value = fusedloss.clip(encoder(whole.x.detach()), encoder(whole.y.detach()), 3.0)
    value.backward()
    for outcome in outcomes:
        for strategy, found in outcome.items():
            close(found[0], value.detach(), strategy)
            for ours, parameter in zip(found[1], encoder.parameters(), strict=True):
                close(ours, parameter.grad, strategy)


def remembering(rank):
    loss = WithMemory(fusedloss.InfoNCELoss(0.4, group=dist.group.WORLD, grad_scale="sum"), rows=3)
    outcome = []
    for seed in (60, 70, 80):
        x, y = (numbers(seed + side, 4, D)[2 * rank : 2 * rank + 2].requires_grad_() for side in (0, 1))
        value = loss(x, y)
        outcome.append((value.detach(), *torch.autograd.grad(value, (x, y))))
    return outcome


def test_each_rank_remembers_its_own_rows():
    found, past = on_ranks(2, remembering), [[], []]
    for step, seed in enumerate((60, 70, 80)):
        x, y = (numbers(seed + side, 4, D).requires_grad_() for side in (0, 1))
        before = [[torch.cat([z[2 * r : 2 * r + 2] for z in side])[:3] for r in (0, 1)] for side in past if side]
        query, key = (torch.cat([z, *b]) for z, b in zip((x, y), before or [[], []], strict=True))
        value = fusedloss.info_nce(query, key, temperature=0.4, backend="reference")
        gradients = torch.autograd.grad(value, (x, y))
        for rank in (0, 1):
            close(found[rank][step][0], value.detach(), step)
        for number, right in enumerate(gradients):
            close(torch.cat([found[rank][step][1 + number] for rank in (0, 1)]), right, (step, number))
        past = [[z.detach(), *side] for z, side in zip((x, y), past, strict=True)]


# 16 bits --------------------------------------------------------------------------------------------------------------

NARROW = {
    "info_nce": CASES["info_nce, normalized, sum"],
    "clip": CASES["clip, a number, sum"],
    "sup_con": lambda b, **k: fusedloss.sup_con(b.x, b.labels, reduction="sum", **k),
}


def under_autocast(batch, loss, **options):
    with torch.autocast("cpu", torch.bfloat16):
        return batch.results(loss(batch, **options))


def narrow(rank):
    outcome = {}
    for name, loss in NARROW.items():
        for dtype in (torch.bfloat16, torch.float16):
            for strategy in ("gather", "ring"):
                batch = Batch(40, dtype, slice(20 * rank, 20 * rank + 20))
                value = loss(batch, group=dist.group.WORLD, strategy=strategy, grad_scale="sum")
                outcome[name, dtype, strategy] = batch.results(value)
        for strategy in ("gather", "ring"):
            batch = Batch(40, torch.float32, slice(20 * rank, 20 * rank + 20))
            options = {"group": dist.group.WORLD, "strategy": strategy, "grad_scale": "sum"}
            outcome[name, "autocast", strategy] = under_autocast(batch, loss, **options)
    return outcome


def test_16_bits_are_as_exact_as_on_one_process():
    """Columns travel in 16 bits, the sums of their gradients in float32; in a gather each rank rounds its part."""
    found = on_ranks(2, narrow)
    for name, dtype, strategy in found[0]:
        if dtype == "autocast":
            whole = Batch(40, torch.float32)
            value, gradients = under_autocast(whole, NARROW[name])
            for one in found:
                torch.testing.assert_close(one[name, dtype, strategy][0], value, rtol=1e-5, atol=0)
            for leaf in "xy":
                ours = torch.cat([one[name, dtype, strategy][1][leaf] for one in found])
                torch.testing.assert_close(
                    ours, gradients[leaf], rtol=0, atol=0.01 * gradients[leaf].abs().amax().item()
                )
            continue
        exact, whole = Batch(40, torch.float64), Batch(40, dtype)
        for leaf in "xy":
            exact.leaves[leaf] = whole.leaves[leaf].detach().double().requires_grad_()
        _, right = exact.results(NARROW[name](exact))
        value, alone = whole.results(NARROW[name](whole))
        for one in found:
            assert one[name, dtype, strategy][0].dtype == torch.float32
            torch.testing.assert_close(one[name, dtype, strategy][0], value, rtol=1e-5, atol=0)
        for leaf in "xy":
            together = torch.cat([one[name, dtype, strategy][1][leaf] for one in found])
            assert together.dtype == dtype
            errors = [(g.double() - right[leaf]).norm() for g in (together, alone[leaf])]
            # A gather rounds each rank's part and then their sum: twice the variance of one rounding, and more where
            # parts cancel.
            assert errors[0] <= (2 if strategy == "gather" else 1.2) * errors[1], (name, dtype, strategy, leaf, errors)


# Memory ---------------------------------------------------------------------------------------------------------------


def measured(rank):
    # glibc keeps freed blocks of up to 32 MiB to itself, which hides what is alive: here they go back at once, and
    # there is one heap. (The processes are forked: no environment variable says it.)
    M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    generator = torch.Generator().manual_seed(rank)
    x, y = (torch.randn(1024, 2048, generator=generator).requires_grad_() for _ in range(2))

    def step(strategy, rows=1024):
        loss = fusedloss.info_nce(
            x[:rows], y[:rows], group=dist.group.WORLD, strategy=strategy, workspace_bytes=1 << 20
        )
        return torch.autograd.grad(loss, (x, y))

    outcome = {}
    for strategy in ("ring", "gather"):  # the smaller first: what one leaves to the allocator is not the other's
        step(strategy, 64)
        peaks = []
        for rows in (64, 1024):
            dist.barrier()
            peaks.append(measure.peak_memory(lambda s=strategy, n=rows: step(s, n)))
        outcome[strategy] = peaks[1] - peaks[0]
    return outcome


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a CPU's peak can be reset on Linux only")
def test_a_ring_takes_half_of_what_gathering_takes():
    """Of four ranks with 8 MiB of keys each, beside what 64 rows take: the gradients that both return, 16 MiB."""
    for found in on_ranks(4, measured):
        assert found["ring"] <= found["gather"] / 2, {k: v / 2**20 for k, v in found.items()}
