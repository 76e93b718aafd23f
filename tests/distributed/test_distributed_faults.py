"""group= when something is wrong: every rank that is left raises within the group's timeout, and none hangs.

Each case has processes of its own, which the parent ends when they outlive their time. What ranks ask differently is
told on all of them alike, with what each rank asked.
"""

from __future__ import annotations

import datetime
import importlib
import os
import pickle
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from patience import delta, seconds

import fusedloss
from fusedloss import masks

pytestmark = pytest.mark.processes

if torch.cuda.is_available():
    pytest.skip("processes are forked here, which CUDA does not survive", allow_module_level=True)
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)

# A group's timeout where a rank is gone, which the others see at once; and where one is late, which they wait for. The
# margin is what a busy machine may take to say it.
TIMEOUT, SHORT, MARGIN = seconds(60.0), seconds(3.0), seconds(60.0)


def on_a_rank(rank, size, folder, case, timeout):
    torch.set_num_threads(1)
    options = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": size, "timeout": delta(300)}
    dist.init_process_group("gloo", **options)
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout))  # that of the case, not of the start
    start = time.monotonic()
    try:
        outcome = case(rank)
    except Exception as error:
        outcome = error
    told = Path(folder, f"{rank}.part")
    told.write_bytes(pickle.dumps((outcome, time.monotonic() - start)))
    told.rename(told.with_suffix(".pkl"))
    os._exit(0)  # tearing down a broken group may itself wait


def outcomes_of(case, size=2, timeout=TIMEOUT):
    """What each rank raised or returned, None where it is gone; fails where one is still running."""
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("fork")
        processes = [
            context.Process(target=on_a_rank, args=(rank, size, folder, case, timeout)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 2 * timeout + 4 * MARGIN  # with the start
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        assert not hung, f"ranks {hung} hang"
        files = [Path(folder, f"{rank}.pkl") for rank in range(size)]
        return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def errors_of(case, size=2, timeout=TIMEOUT):
    """What each rank raised, all of them in time."""
    found = outcomes_of(case, size, timeout)
    for one in found:
        assert one is None or isinstance(one[0], Exception), f"no error, but {one[0]}"
        assert one is None or one[1] < timeout + MARGIN, f"{one[1]:.1f} s for {one[0]!r}"
    return [one and one[0] for one in found]


def rows(count, d=4, dtype=torch.float64, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(count, d, generator=made, dtype=torch.float64).to(dtype).requires_grad_()


def world():
    return dist.group.WORLD


def info_nce(count=3, d=4, dtype=torch.float64, **options):
    return fusedloss.info_nce(rows(count, d, dtype), rows(count, d, dtype, 1), group=world(), **options)


def ranking(negatives=1, **options):
    columns = [rows(3, seed=number) for number in range(2 + negatives)]
    return fusedloss.multiple_negatives_ranking(*columns, group=world(), **options)


# Ranks that are gone or late ------------------------------------------------------------------------------------------

LOSSES = {
    "info_nce": info_nce,
    "clip": lambda: fusedloss.clip(rows(3), rows(3, seed=1), 2.0, group=world()),
    "siglip": lambda: fusedloss.siglip(rows(3), rows(3, seed=1), 2.0, group=world()),
    "ranking": ranking,
    "sup_con": lambda: fusedloss.sup_con(rows(3), torch.tensor([0, 1, 0]), group=world()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_rank_that_exits_before_the_call(name):
    def case(rank):
        if rank == 1:
            os._exit(7)
        LOSSES[name]()

    first, gone, last = errors_of(case, 3)
    assert gone is None and isinstance(first, RuntimeError) and isinstance(last, RuntimeError)


@pytest.mark.parametrize("name", LOSSES)
def test_a_rank_that_exits_before_the_backward(name):
    def case(rank):
        loss = LOSSES[name]()
        if rank == 1:
            os._exit(7)
        loss.backward()

    first, gone = errors_of(case)
    assert gone is None and isinstance(first, RuntimeError)


def test_a_rank_that_is_killed_in_between():
    """Between the exchange of sizes and that of embeddings."""

    def case(rank):
        if rank == 1:
            fusedloss.distributed.gather.gather = lambda *_: os.kill(os.getpid(), 9)
        info_nce().backward()

    first, gone = errors_of(case)
    assert gone is None and isinstance(first, RuntimeError)


@pytest.mark.parametrize("visits", [1, 3, 4, 6])  # of the first time around three ranks, and of the second
def test_a_rank_that_is_killed_within_the_ring(visits):
    def case(rank):
        go_around = fusedloss.distributed.ring.go_around
        left = [visits]

        def killed(parcels, ranks, visit, join=None):
            def counted(shard, held):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), 9)
                return visit(shard, held)

            return go_around(parcels, ranks, counted, join)

        if rank == 1:
            fusedloss.distributed.ring.go_around = killed
        info_nce(strategy="ring").backward()

    first, gone, last = errors_of(case, 3)
    assert gone is None and isinstance(first, RuntimeError) and isinstance(last, RuntimeError)


def late(rank, gave_up, call):
    """Rank 1 calls when the other has given up."""
    if rank == 1:
        gave_up.wait(TIMEOUT)
    try:
        call()
    finally:
        gave_up.set()


def test_a_rank_that_is_late():
    gave_up = torch.multiprocessing.get_context("fork").Event()
    first, last = errors_of(lambda rank: late(rank, gave_up, lambda: info_nce().backward()), timeout=SHORT)
    assert isinstance(first, RuntimeError) and isinstance(last, RuntimeError)


def test_a_rank_that_is_late_with_its_backward():
    gave_up = torch.multiprocessing.get_context("fork").Event()

    def case(rank):
        loss = info_nce()
        late(rank, gave_up, loss.backward)

    first, last = errors_of(case, timeout=SHORT)
    assert isinstance(first, RuntimeError) and isinstance(last, RuntimeError)


def skipped_batch(rank):
    """Its caller goes on with the next batch, where the others wait for the rest of this one."""
    for step in range(3):
        try:
            loss = info_nce(target=torch.tensor([0, 1, 6 if (rank, step) == (1, 1) else 5]))
        except IndexError:
            continue
        loss.backward()


def skipped_backward(rank):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4).double())
    for step in range(3):
        loss = fusedloss.clip(model(X()), model(rows(3, seed=1)), 2.0, group=world())
        if (rank, step) != (1, 1):
            loss.backward()


def another_collective(rank):
    if rank == 1:
        dist.all_reduce(torch.ones(5000))
    info_nce()


@pytest.mark.parametrize("case", [skipped_batch, skipped_backward, another_collective])
def test_ranks_that_are_out_of_step(case):
    importlib.import_module("torch._dynamo")  # DistributedDataParallel does: before the fork, not within the timeout
    # A refusal is told at once; the others wait for what does not come.
    first, second = errors_of(case, timeout=TIMEOUT if case is skipped_batch else SHORT)
    told = ValueError if case is skipped_batch else RuntimeError  # a refused target is told on all ranks
    assert isinstance(first, told) and isinstance(second, RuntimeError)


def test_a_rank_that_makes_one_more_call():
    """While the other is alive, and does something else."""
    gave_up = torch.multiprocessing.get_context("fork").Event()

    def case(rank):
        for _ in range(2):
            info_nce().backward()
        if rank == 0:
            gave_up.wait(TIMEOUT)
            raise RuntimeError("went on")
        late(0, gave_up, info_nce)

    first, second = errors_of(case, timeout=SHORT)
    assert "went on" in str(first) and isinstance(second, RuntimeError)


def test_a_target_that_one_rank_refuses():
    """Is told on the others at once."""

    def case(rank):
        info_nce(target=torch.tensor([0, 1, 6 if rank == 1 else 5]))

    first, second = errors_of(case)
    assert isinstance(second, IndexError) and "target[2] must be an index from 0 to 5" in str(second)
    assert isinstance(first, ValueError) and "rank 1 of group refuses: target must hold indices from 0 to " in str(
        first
    )


def test_a_rank_with_a_shape_of_its_own_that_is_wrong():
    def case(rank):
        fusedloss.clip(rows(3), rows(2 if rank == 1 else 3), 2.0, group=world())

    first, second = errors_of(case)
    assert isinstance(second, ValueError) and "one text per image" in str(second)
    assert isinstance(first, ValueError) and f"rank 1 of group refuses: {second}" in str(first)


# Ranks that do not make the same call ---------------------------------------------------------------------------------

X, IDS = (lambda: rows(3)), (lambda: torch.tensor([0, 1, 0]))
ONE_AND_OTHER = {
    # what rank 0 calls, what rank 1 calls, what is told of both
    "dtype": (
        lambda: info_nce(dtype=torch.float32),
        lambda: info_nce(dtype=torch.float64),
        "rank 0: matrix 0 [rows, 4] torch.float32 with grad, matrix 1 [rows, 4] torch.float32 with grad; "
        "rank 1: matrix 0 [rows, 4] torch.float64 with grad, matrix 1 [rows, 4] torch.float64 with grad",
    ),
    "D": (
        lambda: info_nce(d=4),
        lambda: info_nce(d=5),
        "rank 0: matrix 0 [rows, 4] torch.float64 with grad, matrix 1 [rows, 4] torch.float64 with grad; "
        "rank 1: matrix 0 [rows, 5] torch.float64 with grad, matrix 1 [rows, 5] torch.float64 with grad",
    ),
    "D and no rows": (lambda: info_nce(d=4), lambda: info_nce(0, d=5), "rank 1: matrix 0 [rows, 5] torch.float64"),
    "negatives": (
        lambda: ranking(1),
        lambda: ranking(2),
        "rank 0: 3 matrices; rank 1: 4 matrices, matrix 3 [rows, 4] torch.float64 with grad, block 2 ",
    ),
    "no negatives": (lambda: ranking(0), lambda: ranking(1), "rank 0: 2 matrices; rank 1: 3 matrices, matrix 2 "),
    "more negatives than are told at once": (lambda: ranking(20), lambda: ranking(30), "rank 0: 22 matrices"),
    "loss": (LOSSES["clip"], LOSSES["info_nce"], "rank 0: clip, reduction mean"),
    "loss of another family": (LOSSES["sup_con"], LOSSES["ranking"], "rank 0: sup_con out, scale 10.0"),
    "directions": (
        ranking,
        lambda: ranking(directions=("query_to_doc", "doc_to_query")),
        "rank 0: multiple_negatives_ranking, directions ('query_to_doc',), joint, hardness None, reduction mean;",
    ),
    "hardness": (
        lambda: ranking(hardness_mode="all_negatives", hardness_strength=1.0),
        lambda: ranking(hardness_mode="all_negatives", hardness_strength=2.0),
        "block 0 hardness 1.0, block 1 hardness 1.0, block 1 hardness of the own 1.0; rank 1: ",
    ),
    "similarity": (ranking, lambda: ranking(similarity="dot"), "rank 0: normalize True; rank 1: normalize False"),
    "temperature": (
        lambda: info_nce(temperature=0.5),
        lambda: info_nce(temperature=0.25),
        "rank 0: scale up to 2.0; rank 1: scale up to 4.0",
    ),
    "learnable temperature": (
        info_nce,
        lambda: info_nce(temperature=torch.tensor(0.05, requires_grad=True)),
        "rank 0: scale up to 20.0; rank 1: scale a tensor with grad",
    ),
    "reduction": (info_nce, lambda: info_nce(reduction="none"), "rank 0: info_nce, reduction mean; rank 1: info_nce, "),
    "target": (info_nce, lambda: info_nce(target=IDS()), "rank 1: info_nce with target"),
    "grad_scale": (info_nce, lambda: info_nce(grad_scale="sum"), "rank 0: grad_scale ddp; rank 1: grad_scale sum"),
    "no grad": (info_nce, torch.no_grad()(info_nce), "rank 1: matrix 0 [rows, 4] torch.float64 without grad"),
    "no rows and no graph": (
        info_nce,
        lambda: fusedloss.info_nce(torch.empty(0, 4).double(), torch.empty(0, 4).double(), group=world()),
        "rank 1: matrix 0 [rows, 4] torch.float64 without grad, matrix 1 [rows, 4] torch.float64 without grad",
    ),
    "one matrix of two": (
        info_nce,
        lambda: (lambda x: fusedloss.info_nce(x, x, group=world()))(X()),
        "rank 0: 2 matrices, matrix 1 [rows, 4] torch.float64 with grad",
    ),
    "ids": (
        info_nce,
        lambda: info_nce(mask=masks.same_id(IDS(), IDS())),
        "rank 0: nothing more; rank 1: block 0 ids differ",
    ),
    "bias": (info_nce, lambda: info_nce(key_bias=torch.zeros(3)), "rank 1: block 0 bias torch.float32 without grad"),
    "margin": (
        lambda: info_nce(mask=masks.score_margin(0.1)),
        lambda: info_nce(mask=masks.score_margin(0.2)),
        "rank 0: block 0 margin 0.1; rank 1: block 0 margin 0.2",
    ),
    "guide": (
        lambda: info_nce(mask=masks.guide(rows(3, 2), rows(3, 2))),
        lambda: info_nce(mask=masks.guide(rows(3, 3), rows(3, 3))),
        "rank 0: block 0 guide [rows, 2] torch.float64; rank 1: block 0 guide [rows, 3] torch.float64",
    ),
    "siglip's ids": (
        LOSSES["siglip"],
        lambda: fusedloss.siglip(X(), rows(3, seed=1), 2.0, target=masks.same_id(IDS(), IDS()), group=world()),
        "rank 1: siglip with ids",
    ),
    "siglip's bias": (
        LOSSES["siglip"],
        lambda: fusedloss.siglip(X(), rows(3, seed=1), 2.0, torch.zeros((), requires_grad=True), group=world()),
        "bias None, ",
    ),
    "sup_con's form": (
        LOSSES["sup_con"],
        lambda: fusedloss.sup_con(X(), IDS(), form="in", group=world()),
        "rank 0: sup_con out, scale 10.0, reduction mean",
    ),
}


@pytest.mark.parametrize("name", ONE_AND_OTHER)
def test_what_ranks_ask_differently_is_told_on_all(name):
    one, other, told = ONE_AND_OTHER[name]
    found = errors_of(lambda rank: (other if rank == 1 else one)())
    assert all(isinstance(error, ValueError) for error in found), found
    assert str(found[0]) == str(found[1])
    assert "all ranks of group must call one loss with tensors of the same dtypes and dimensions, got " in str(found[0])
    assert told in str(found[0])


def test_after_a_refusal_the_ranks_are_still_in_step():
    def case(rank):
        with pytest.raises(ValueError, match="rank 2: grad_scale sum"):
            info_nce(grad_scale="sum" if rank == 2 else "ddp")
        return info_nce(2 + rank).item()

    first, *others = [one[0] for one in outcomes_of(case, 3)]
    assert isinstance(first, float) and others == [first, first]


def test_many_negatives():
    """More than the first exchange has room for."""
    first, other = (one[0] for one in outcomes_of(lambda rank: ranking(20).item()))
    assert isinstance(first, float) and first == other


# Calls that are wrong on every rank -----------------------------------------------------------------------------------


def refused(call, size=2):
    """The one message of all ranks, told without waiting for each other."""
    found = outcomes_of(lambda rank: call(), size)
    kinds = {type(error) for error, _ in found}
    messages = {str(error) for error, _ in found}
    assert len(kinds) == len(messages) == 1 and all(took < TIMEOUT for _, took in found), found
    return f"{kinds.pop().__name__}: {messages.pop()}"


def twice_differentiated(loss):
    x = rows(3)
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    gradient.square().sum().backward()


BOTH = rows(3, seed=1)
REFUSED = {
    "a word": (
        lambda: fusedloss.info_nce(X(), X(), group="all"),
        "ValueError: group must be 'world' for all ranks, or a ProcessGroup, got 'all'",
    ),
    "strategy": (lambda: info_nce(strategy="mail"), "ValueError: strategy must be one of 'gather', 'ring', got 'mail'"),
    "grad_scale": (
        lambda: info_nce(grad_scale="mean"),
        "ValueError: grad_scale must be one of 'ddp', 'sum'",
    ),
    "label_smoothing": (
        lambda: info_nce(label_smoothing=0.1),
        "ValueError: label_smoothing must not be given together with group",
    ),
    "return_stats": (
        lambda: info_nce(return_stats=True),
        "ValueError: return_stats must not be given together with group",
    ),
    "a bool mask": (
        lambda: info_nce(mask=torch.ones(3, 3, dtype=torch.bool)),
        "ValueError: a bool mask must not be given together with group",
    ),
    "private negatives": (
        lambda: info_nce(negatives=torch.randn(3, 2, 4, dtype=torch.float64), target=IDS()),
        "ValueError: target must be None with negatives and group",
    ),
    "siglip's columns": (
        lambda: fusedloss.siglip(X(), X(), 2.0, target=IDS(), group=world()),
        "ValueError: target must be None or masks.same_id if group is given, got a tensor",
    ),
    "reference": (
        lambda: fusedloss.clip(X(), X(), 2.0, backend="reference", group=world()),
        "UnsupportedError: backend='reference' cannot run this problem",
    ),
    "second derivatives": (
        lambda: twice_differentiated(lambda x: fusedloss.info_nce(x, x + 0 * BOTH, group=world())),
        "RuntimeError: trying to differentiate twice a function that was marked with @once_differentiable",
    ),
    "second derivatives, both ways": (
        lambda: twice_differentiated(lambda x: fusedloss.clip(x, BOTH.detach(), 2.0, group=world())),
        "UnsupportedError: group must be None for second derivatives (create_graph=True)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_rank(name):
    call, told = REFUSED[name]
    assert refused(call).startswith(told)


def test_a_group_that_a_rank_is_not_in():
    def case(rank):
        part = dist.new_group([0, 1], timeout=delta(300))
        return fusedloss.info_nce(X(), rows(3, seed=1), group=part).item()

    first, second, outside = (one[0] for one in outcomes_of(case, 3))
    assert isinstance(first, float) and first == second
    assert isinstance(outside, ValueError) and "group must contain this rank, got what new_group returns" in str(
        outside
    )


def test_without_init_process_group():
    assert not dist.is_initialized()
    with pytest.raises(TypeError, match=r"group must be a ProcessGroup, .* after init_process_group, got an object"):
        fusedloss.info_nce(X(), X(), group=object())
    with pytest.raises(ValueError, match=r"group must be given with .*grad_scale='sum', got None; pass a ProcessGroup"):
        fusedloss.info_nce(X(), X(), group=world(), grad_scale="sum")


def test_after_destroy_process_group():
    def case(rank):
        group = world()
        dist.destroy_process_group()
        fusedloss.info_nce(X(), X(), group=group)

    for error in errors_of(case):
        assert isinstance(error, ValueError) and "group" in str(error)
