"""group= in training: after some steps several processes have the parameters of one that saw the whole batches.

Four gloo processes train an encoder with a learnable scale and bias, under DistributedDataParallel, under FSDP2 and
with gradients summed by hand; batches are uneven, and one rank has no rows. The rest is what surrounds a loss in
training: accumulation, evaluation, checkpointing, torch.compile, groups of some of the ranks.
"""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch
import torch.distributed as dist
from patience import delta
from ranks import COLLECTIVE, Ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedloss
from fusedloss import masks

pytestmark = pytest.mark.processes

if torch.cuda.is_available():
    pytest.skip("processes are forked here, which CUDA does not survive", allow_module_level=True)
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)

RANKS, D = 4, 5
# What each rank has in each step.
STEPS = [(3, 3, 3, 3), (2, 4, 1, 2), (4, 0, 3, 2)]
EVEN = [(2, 2, 2, 2)] * 3


class Model(nn.Module):
    """FSDP2 takes no parameter without dimensions, and so the scale has one."""

    def __init__(self, with_bias, checkpointed=False):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 6))
        self.log_scale = nn.Parameter(torch.tensor([0.7]))
        self.bias = nn.Parameter(torch.tensor([-0.3])) if with_bias else None
        self.checkpointed = checkpointed

    def encode(self, x):
        return checkpoint(self.encoder, x, use_reentrant=False) if self.checkpointed else self.encoder(x)

    def forward(self, *texts):
        return [self.encode(x) for x in texts], self.log_scale.exp(), None if self.bias is None else self.bias + 0


def model_of(case, checkpointed=False):
    torch.manual_seed(3)
    return Model("siglip" in case or "clip" in case, checkpointed).double()


def batch_of(step, rows, part=slice(None)):
    """A whole batch, or one rank's rows of it."""
    made = torch.Generator().manual_seed(100 + step)
    texts = [torch.randn(rows, D, generator=made, dtype=torch.float64)[part] for _ in range(3)]
    guides = [torch.randn(rows, 3, generator=made, dtype=torch.float64)[part] for _ in range(2)]
    return texts, guides, torch.randint(0, max(rows // 2, 1), (rows,), generator=made)[part]


def info_nce_with_ids(x, y, scale, ids, **options):
    return fusedloss.info_nce(x, y, temperature=1 / scale, mask=masks.same_id(ids, ids), **options)


# From two or three embeddings, the scale, the bias, guides and ids.
LOSSES = {
    "info_nce": lambda e, s, b, g, i, **k: fusedloss.info_nce(*e[:2], temperature=1 / s, normalize=True, **k),
    "info_nce, ids": lambda e, s, b, g, i, **k: info_nce_with_ids(*e[:2], s, i, **k),
    "clip": lambda e, s, b, g, i, **k: fusedloss.clip(*e[:2], s, b, normalize=True, **k),
    "siglip": lambda e, s, b, g, i, **k: fusedloss.siglip(*e[:2], s, b, normalize=True, **k),
    "ranking": lambda e, s, b, g, i, **k: fusedloss.multiple_negatives_ranking(*e, scale=s, **k),
    "sup_con": lambda e, s, b, g, i, **k: fusedloss.sup_con(e[0], i, temperature=1 / s, **k),
    "gist_embed": lambda e, s, b, g, i, **k: fusedloss.gist_embed(*e[:2], guide=g, temperature=1 / s, **k),
}
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.2, momentum=0.5),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02),
}
WRAPPERS = ("ddp", "fsdp", "none")


def loss_of(name, model, batch, **options):
    texts, guides, ids = batch
    used = texts if name == "ranking" else texts[:1] if name == "sup_con" else texts[:2]
    embeddings, scale, bias = model(*used)
    return LOSSES[name](embeddings, scale, bias, guides, ids, **options)


def rows_of(rank, sizes):
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


# One process ----------------------------------------------------------------------------------------------------------


def trained_alone(name, optimizer, steps=STEPS, micro=1, first=0):
    model = model_of(name)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    values = []
    for step, sizes in enumerate(steps, first):
        loss = loss_of(name, model, batch_of(step, sum(sizes)))
        (loss / micro).backward()
        values.append(loss.item())
        if (step + 1 - first) % micro == 0:
            optimizer.step()
            optimizer.zero_grad()
    return values, {key: x.detach() for key, x in model.state_dict().items()}


# Several --------------------------------------------------------------------------------------------------------------


def wrapped(model, wrapper, group):
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model, process_group=group)
    if wrapper == "fsdp":
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        mesh = DeviceMesh.from_group(group, "cpu")
        fully_shard(model.encoder, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return model


def summed(model, group):
    """For gradients that are each rank's share."""
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad, group=group)


def trained(name, wrapper, optimizer, group, steps=STEPS, micro=1, first=0, checkpointed=False, loss_of=loss_of):
    rank, inner = dist.get_rank(group), model_of(name, checkpointed)
    model = wrapped(inner, wrapper, group)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    values = []
    for step, sizes in enumerate(steps, first):
        ends = (step + 1 - first) % micro == 0
        with contextlib.nullcontext() if ends or wrapper != "ddp" else model.no_sync():
            batch = batch_of(step, sum(sizes), rows_of(rank, sizes))
            loss = loss_of(name, model, batch, group=group, grad_scale="sum" if wrapper == "none" else "ddp")
            (loss / micro).backward()
        values.append(loss.item())
        if ends:
            if wrapper == "none":
                summed(model, group)
            optimizer.step()
            optimizer.zero_grad()
    whole = {key: x.full_tensor() if hasattr(x, "full_tensor") else x for key, x in inner.state_dict().items()}
    return values, {key: x.detach().clone() for key, x in whole.items()}


def evaluated(name, group):
    sizes, model = STEPS[2], model_of(name)
    with torch.no_grad():
        loss = loss_of(name, model, batch_of(0, sum(sizes), rows_of(dist.get_rank(group), sizes)), group=group)
    return loss.item(), loss.requires_grad


def compiled(name, group):
    """The loss alone, as its caller would; a second number of rows does not break it."""
    found = []
    run = torch.compile(LOSSES[name], backend="eager")
    for rows in (3, 4):
        sizes = [rows + rank for rank in range(group.size())]
        texts, guides, ids = batch_of(0, sum(sizes), rows_of(dist.get_rank(group), sizes))
        embeddings = [x.requires_grad_() for x in texts[:2]]
        scale = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
        loss = run(embeddings, scale, None, guides, ids, group=group, grad_scale="sum")
        loss.backward()
        found.append((loss.item(), [x.grad for x in embeddings], scale.grad))
    return found


def twice_backward(name, group):
    """The second one computes its gradients again, across ranks."""
    model, sizes = model_of(name), STEPS[2]
    batch = batch_of(0, sum(sizes), rows_of(dist.get_rank(group), sizes))
    loss = loss_of(name, model, batch, group=group, grad_scale="sum")
    found = []
    for last in (False, True):
        loss.backward(retain_graph=not last)
        summed(model, group)
        found.append([x.grad for x in model.parameters()])
        model.zero_grad()
    return found


def no_rows_anywhere(name, group):
    model = model_of(name)
    loss = loss_of(name, model, batch_of(0, 0), group=group)
    loss.backward()
    return loss.item(), [x.grad for x in model.parameters()]


def zero_rows_by_slicing(name, group):
    """An encoder that takes no empty batch: one row that is cut off again, so that its graph is there."""

    def encoded(name, model, batch, **options):
        texts, guides, ids = batch
        padded = [torch.cat([x, x.new_zeros(1, D)]) for x in texts]
        embeddings, scale, bias = model(*padded[:2])
        return LOSSES[name]([x[:-1] for x in embeddings], scale, bias, guides, ids, **options)

    return trained(name, "ddp", "SGD", group, loss_of=encoded)


TRAINED = [(name, wrapper, optimizer) for name in LOSSES for wrapper in WRAPPERS for optimizer in OPTIMIZERS]
PAIRS = [[0, 2], [1, 3]]
OF_A_PAIR = [(2, 3), (4, 0), (1, 2)]


def on_a_rank(rank):
    """What runs a case there, by its name."""
    world, patience = dist.group.WORLD, delta(COLLECTIVE)
    pair = [dist.new_group(ranks, timeout=patience) for ranks in PAIRS][rank % 2]
    alone = [dist.new_group([one], timeout=patience) for one in range(RANKS)][rank]
    jobs = {("trained", *case): lambda case=case: trained(*case, world) for case in TRAINED}
    jobs |= {
        "accumulated": lambda: trained("clip", "ddp", "SGD", world, [*EVEN, *STEPS], micro=2),
        "accumulated, no wrapper": lambda: trained("clip", "none", "SGD", world, [*EVEN, *STEPS], micro=2),
        "checkpointed": lambda: trained("ranking", "ddp", "Adam", world, checkpointed=True),
        "sliced": lambda: zero_rows_by_slicing("info_nce", world),
        "compiled": lambda: compiled("info_nce", pair) if rank in PAIRS[0] else [],
        **{("pair", w): lambda w=w: trained("clip", w, "SGD", pair, OF_A_PAIR, first=rank % 2) for w in WRAPPERS},
        **{
            ("alone", name): lambda name=name: trained(name, "ddp", "SGD", alone, [(5,), (2,)], first=rank)
            for name in LOSSES
        },
        **{("twice", name): lambda name=name: twice_backward(name, world) for name in LOSSES},
        **{("empty", name): lambda name=name: no_rows_anywhere(name, world) for name in LOSSES},
        **{("evaluated", name): lambda name=name: evaluated(name, world) for name in LOSSES},
    }
    return lambda name: jobs[name]()


@pytest.fixture(scope="module")
def ranks():
    for heavy in ("torch._dynamo", "torch.distributed.fsdp"):
        importlib.import_module(heavy)  # once, before the fork
    ranks = Ranks(RANKS, on_a_rank)
    yield ranks
    ranks.stop()


def assert_as_alone(found, alone):
    for values, parameters in found:
        torch.testing.assert_close(values, alone[0], rtol=1e-12, atol=1e-14)
        for key, expected in alone[1].items():
            near = {"rtol": 1e-12, "atol": 1e-14}
            torch.testing.assert_close(parameters[key], expected, msg=lambda m, key=key: f"{key}: {m}", **near)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", LOSSES)
def test_training_is_that_of_one_process(ranks, name, wrapper, optimizer):
    alone = trained_alone(name, optimizer)
    untrained = model_of(name).state_dict()
    assert all(
        (alone[1][key] - x).abs().max() > 1e-3 for key, x in untrained.items() if (name, key) != ("clip", "bias")
    )
    assert_as_alone(ranks(("trained", name, wrapper, optimizer)), alone)


@pytest.mark.parametrize("key", ["accumulated", "accumulated, no wrapper"])
def test_accumulated_gradients(ranks, key):
    assert_as_alone(ranks(key), trained_alone("clip", "SGD", [*EVEN, *STEPS], micro=2))


def test_a_checkpointed_encoder(ranks):
    assert_as_alone(ranks("checkpointed"), trained_alone("ranking", "Adam"))


def test_a_row_that_is_cut_off_stands_for_no_rows(ranks):
    assert_as_alone(ranks("sliced"), trained_alone("info_nce", "SGD"))


@pytest.mark.parametrize("name", LOSSES)
def test_evaluation_has_the_value_of_the_whole_batch(ranks, name):
    with torch.no_grad():
        expected = loss_of(name, model_of(name), batch_of(0, sum(STEPS[2]))).item()
    for value, has_graph in ranks(("evaluated", name)):
        assert value == pytest.approx(expected, rel=1e-12) and not has_graph


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_backward(ranks, name):
    model = model_of(name)
    loss_of(name, model, batch_of(0, sum(STEPS[2]))).backward()
    for found in ranks(("twice", name)):
        for gradients in found:
            for ours, parameter in zip(gradients, model.parameters(), strict=True):
                torch.testing.assert_close(ours, parameter.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_no_rows_on_any_rank(ranks, name):
    for value, gradients in ranks(("empty", name)):
        assert value == 0 and all(x is None or not x.any() for x in gradients)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_group_of_two_of_four(ranks, wrapper):
    for rank, one in enumerate(ranks(("pair", wrapper))):
        assert_as_alone([one], trained_alone("clip", "SGD", OF_A_PAIR, first=rank % 2))


@pytest.mark.parametrize("name", LOSSES)
def test_a_group_of_one(ranks, name):
    for rank, one in enumerate(ranks(("alone", name))):
        assert_as_alone([one], trained_alone(name, "SGD", [(5,), (2,)], first=rank))


@pytest.mark.slow
def test_a_compiled_loss(ranks):
    found = ranks("compiled")
    for step, rows in enumerate((3, 4)):
        texts, guides, ids = batch_of(0, 2 * rows + 1)
        embeddings = [x.requires_grad_() for x in texts[:2]]
        scale = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
        loss = LOSSES["info_nce"](embeddings, scale, None, guides, ids)
        loss.backward()
        ours = [found[rank][step] for rank in PAIRS[0]]
        near = {"rtol": 1e-12, "atol": 1e-14}
        torch.testing.assert_close([one[0] for one in ours], [loss.item()] * 2, **near)
        torch.testing.assert_close(sum(one[2] for one in ours), scale.grad, **near)
        for side, x in enumerate(embeddings):
            torch.testing.assert_close(torch.cat([one[1][side] for one in ours]), x.grad, **near)
