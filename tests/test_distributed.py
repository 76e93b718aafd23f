"""group=: several processes together give what one process gives with the whole batch.

Every case runs once in one process on the concatenated batch, and on each rank of gloo groups of 1 to 4 processes with
its own rows: the same value on all ranks; gradients of features and of the loss's parameters that sum ("sum") or
average ("ddp") over ranks to those of the one process. Shards are uneven, and one has no rows.
"""

from __future__ import annotations

import ctypes
import datetime
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fusedloss
from fusedloss import masks, measure
from fusedloss.distributed import MATCH
from fusedloss.grad_cache import GradCache

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
        self.parameters = {
            "temperature": torch.tensor(0.4, dtype=dtype, requires_grad=True),
            "logit_bias": torch.tensor(-0.5, dtype=dtype, requires_grad=True),
        }

    def __getattr__(self, name):
        return {**self.constants, **self.leaves, **self.parameters}[name]

    def results(self, loss):
        value = loss if loss.dim() == 0 else loss.sum()
        named = {**self.leaves, **self.parameters}
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        zeros = (torch.zeros_like(x) if g is None else g for g, x in zip(found, named.values(), strict=True))
        return loss.detach(), dict(zip(named, zeros, strict=True))


ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
unit = torch.nn.functional.normalize
ranking = fusedloss.multiple_negatives_ranking
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
    "info_nce, guide": lambda b, **k: fusedloss.info_nce(b.x, b.y, mask=masks.guide(b.g0, b.g1), **k),
    "info_nce, one tensor": lambda b, **k: fusedloss.info_nce(b.x, b.x, temperature=b.temperature, **k),
    "clip": lambda b, **k: fusedloss.clip(b.x, b.y, 1 / b.temperature, **k),
    "clip, normalized, ids": lambda b, **k: fusedloss.clip(
        b.x, b.y, 1 / b.temperature, b.logit_bias, normalize=True, mask=masks.same_id(b.ids, b.ids), **k
    ),
    "clip, a number, sum": lambda b, **k: fusedloss.clip(b.x, b.y, 5.0, normalize=True, reduction="sum", **k),
    "ranking": lambda b, **k: ranking(b.x, b.y, b.n, b.m, scale=1 / b.temperature, **k),
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
    "gist_embed": lambda b, **k: fusedloss.gist_embed(b.x, b.y, guide=(b.g0, b.g1), temperature=b.temperature, **k),
    "gist_embed, negatives, relative": lambda b, **k: fusedloss.gist_embed(
        b.x, b.y, b.n, guide=(b.g0, b.g1, b.g2), margin_strategy="relative", margin=0.1, contrast_anchors=False, **k
    ),
    "siglip": lambda b, **k: fusedloss.siglip(b.x, b.y, 1 / b.temperature, b.logit_bias, **k),
    "siglip, ids, sum": lambda b, **k: fusedloss.siglip(
        b.x, b.y, 3.0, b.logit_bias, target=masks.same_id(b.ids, b.ids), normalize=True, reduction="sum", **k
    ),
    "sup_con": lambda b, **k: fusedloss.sup_con(b.x, b.labels, temperature=b.temperature, **k),
    "sup_con, in": lambda b, **k: fusedloss.sup_con(b.x, b.labels, temperature=b.temperature, form="in", **k),
    "nt_xent": lambda b, **k: fusedloss.nt_xent(b.x, b.y, temperature=b.temperature, **k),
}
DTYPES = (torch.float64, torch.float32)
OPTIONS = [
    (s, *o)
    for s in ("gather", "ring")
    for o in (("ddp", None), ("sum", None), ("match:tevatron", None), ("ddp", "none"))
]
WHOLE_ROWS = "sup_con, in"  # which a ring does not have


def on_a_rank(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store{size}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=30),
    )
    outcome = {}
    for sizes in SHARDS[size]:
        start = sum(sizes[:rank])
        for name, loss in CASES.items():
            for dtype in DTYPES:
                for strategy, grad_scale, reduction in OPTIONS:
                    if (reduction and "sum" in name) or (strategy == "ring" and name == WHOLE_ROWS):
                        continue
                    batch = Batch(sum(sizes), dtype, slice(start, start + sizes[rank]))
                    options = {"reduction": reduction} if reduction else {}
                    try:
                        value = loss(batch, group=dist.group.WORLD, strategy=strategy, grad_scale=grad_scale, **options)
                        found = batch.results(value)
                    except Exception as error:  # told by the test of the case
                        found = error
                    outcome[sizes, name, dtype, strategy, grad_scale, reduction] = found
    Path(folder, f"{size}-{rank}.pkl").write_bytes(pickle.dumps(outcome))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=SHARDS)
def outcomes(request, tmp_path_factory):
    """What each rank found."""
    size, folder = request.param, str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.start_processes(on_a_rank, (size, folder), nprocs=size, start_method="fork")
    return [pickle.loads(Path(folder, f"{size}-{rank}.pkl").read_bytes()) for rank in range(size)]


def close(found, wanted, what, terms=0.0):
    """To 1e-12 of the largest number in float64, and in float32 to 1e-6. terms: of which a number is the sum."""
    near = (1e-12 if found.dtype == torch.float64 else 1e-6) * max(wanted.abs().amax().item(), terms, 1e-3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=near, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_as_one_process(outcomes, name):
    for key in [key for key in outcomes[0] if key[1] == name]:
        sizes, _, dtype, _, grad_scale, reduction = key
        found = [outcome[key] for outcome in outcomes]
        for one in found:
            if isinstance(one, Exception):
                raise one
        whole = Batch(sum(sizes), dtype)
        value, gradients = whole.results(CASES[name](whole, **({"reduction": reduction} if reduction else {})))
        if reduction is None:
            for one in found:
                close(one[0], value, key)
        elif name == "nt_xent":  # both views of a rank, one after the other
            views = [one[0].view(2, -1) for one in found]
            close(torch.cat(views, 1).flatten(), value, key)
        else:
            close(torch.cat([one[0] for one in found]), value, key)
        # Ranks' shares add up to the gradient; DDP divides by their number, and one library has too much of the rest.
        factor = 1 if grad_scale == "sum" or reduction else len(sizes)
        of_parameters = factor * (len(sizes) if grad_scale == "match:tevatron" else 1)
        for leaf in whole.leaves:
            times = of_parameters if leaf == "bias" else factor
            close(torch.cat([one[1][leaf] for one in found]), times * gradients[leaf], (key, leaf))
        terms = sum((whole.leaves[k].norm(dim=-1) * gradients[k].norm(dim=-1)).sum().item() for k in "xynm")
        for parameter in whole.parameters:
            ours = torch.stack([one[1][parameter] for one in found]).sum(0)
            close(ours, of_parameters * gradients[parameter], (key, parameter), of_parameters * terms)


# Scales of the gradient -----------------------------------------------------------------------------------------------


def matching(rank, size, folder):
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": size, "timeout": datetime.timedelta(seconds=30)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", **options)
    outcome = {}
    for library in MATCH:
        batch = Batch(6, torch.float64, slice(3 * rank, 3 * rank + 3))
        scale = f"match:{library}"
        loss = fusedloss.info_nce(
            batch.x, batch.y, temperature=batch.temperature, group=dist.group.WORLD, grad_scale=scale
        )
        outcome[library] = batch.results(loss)[1]
    Path(folder, f"{rank}.pkl").write_bytes(pickle.dumps(outcome))
    dist.destroy_process_group()


def test_the_scales_of_libraries(tmp_path):
    """After an average over ranks, over the right gradient: of features, and of the loss's parameters."""
    torch.multiprocessing.start_processes(matching, (2, str(tmp_path)), nprocs=2, start_method="fork")
    found = [pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()) for rank in range(2)]
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


def by_kernels(rank, size, folder, backend):
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": size, "timeout": datetime.timedelta(seconds=120)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", **options)
    outcome = {}
    for name in KERNELS:
        for strategy in ("gather", "ring"):
            batch = Batch(7, torch.float32, slice(4) if rank == 0 else slice(4, 7))
            options = {"group": dist.group.WORLD, "strategy": strategy, "grad_scale": "sum", "backend": backend}
            outcome[name, strategy] = batch.results(CASES[name](batch, **options))
    Path(folder, f"{rank}.pkl").write_bytes(pickle.dumps(outcome))
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernels(tmp_path, backend):
    torch.multiprocessing.start_processes(by_kernels, (2, str(tmp_path), backend), nprocs=2, start_method="fork")
    found = [pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()) for rank in range(2)]
    for name, strategy in found[0]:
        whole = Batch(7, torch.float32)
        value, gradients = whole.results(CASES[name](whole))
        for leaf in whole.leaves:
            ours = torch.cat([one[name, strategy][1][leaf] for one in found])
            torch.testing.assert_close(ours, gradients[leaf], rtol=1e-4, atol=1e-5, msg=lambda m, k=name: f"{k}: {m}")
        for one in found:
            torch.testing.assert_close(one[name, strategy][0], value, rtol=1e-5, atol=1e-6)


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


def in_chunks(rank, size, folder):
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": size, "timeout": datetime.timedelta(seconds=30)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", **options)
    outcome = {}
    for strategy in ("gather", "ring"):
        batch = Batch(11, torch.float64, slice(7) if rank == 0 else slice(7, 11))
        encoder = torch.nn.parallel.DistributedDataParallel(Encoder())
        loss = fusedloss.ClipLoss(group=dist.group.WORLD, strategy=strategy)
        step = GradCache(lambda x, y, loss=loss: loss(x, y, 3.0), encoder, rows=3)  # three chunks here, two there
        value = step(batch.x.detach(), batch.y.detach())
        outcome[strategy] = value, [p.grad for p in encoder.parameters()]
    Path(folder, f"{rank}.pkl").write_bytes(pickle.dumps(outcome))
    dist.destroy_process_group()


def test_encoders_in_chunks_on_several_processes(tmp_path):
    torch.multiprocessing.start_processes(in_chunks, (2, str(tmp_path)), nprocs=2, start_method="fork")
    whole, encoder = Batch(11, torch.float64), Encoder()
    value = fusedloss.clip(encoder(whole.x.detach()), encoder(whole.y.detach()), 3.0)
    value.backward()
    for rank in range(2):
        for strategy, found in pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()).items():
            close(found[0], value.detach(), strategy)
            for ours, parameter in zip(found[1], encoder.parameters(), strict=True):
                close(ours, parameter.grad, strategy)


# 16 bits --------------------------------------------------------------------------------------------------------------

NARROW = {
    "info_nce": CASES["info_nce, normalized, sum"],
    "clip": CASES["clip, a number, sum"],
    "sup_con": lambda b, **k: fusedloss.sup_con(b.x, b.labels, reduction="sum", **k),
}


def under_autocast(batch, loss, **options):
    with torch.autocast("cpu", torch.bfloat16):
        return batch.results(loss(batch, **options))


def narrow(rank, size, folder):
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": size, "timeout": datetime.timedelta(seconds=30)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", **options)
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
    Path(folder, f"{rank}.pkl").write_bytes(pickle.dumps(outcome))
    dist.destroy_process_group()


def test_16_bits_are_as_exact_as_on_one_process(tmp_path):
    """Columns travel in 16 bits, the sums of their gradients in float32; in a gather each rank rounds its part."""
    torch.multiprocessing.start_processes(narrow, (2, str(tmp_path)), nprocs=2, start_method="fork")
    found = [pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()) for rank in range(2)]
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


def measured(rank, size, folder):
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": size, "timeout": datetime.timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", **options)
    # glibc keeps freed blocks of up to 32 MiB to itself, which hides what is alive: here they go back at once.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
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
        dist.barrier()
        outcome[strategy] = measure.peak_memory(lambda s=strategy: step(s))
    Path(folder, f"{rank}.pkl").write_bytes(pickle.dumps(outcome))
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="a CPU's peak can be reset on Linux only")
def test_a_ring_takes_half_of_what_gathering_takes(tmp_path):
    """Of four ranks with 8 MiB of keys each: beside the gradients that both return, 16 MiB."""
    torch.multiprocessing.start_processes(measured, (4, str(tmp_path)), nprocs=4, start_method="fork")
    for rank in range(4):
        found = pickle.loads((tmp_path / f"{rank}.pkl").read_bytes())
        extra = {strategy: peak - (16 << 20) for strategy, peak in found.items()}
        assert extra["ring"] <= extra["gather"] / 2, {k: v / 2**20 for k, v in extra.items()}
