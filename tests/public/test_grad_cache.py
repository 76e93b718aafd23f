"""`fusedloss.grad_cache`: encoders in chunks, the loss over the whole batch, and the gradients of the plain step."""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import NamedTuple

import pytest
import torch
from peaks import MIB, growth, measured
from torch import nn
from torch.nn import functional as F

import fusedloss
from fusedloss import masks
from fusedloss.bench import measure
from fusedloss.grad_cache import GradCache, WithMemory


def tower(width=5, dim=6, dropout=0.0, dtype=torch.float64):
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, dim)).to(dtype)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def trained(*functions):
    """Parameters by name, of modules that repeat, once."""
    modules = dict.fromkeys(f for f in functions if isinstance(f, nn.Module))
    return {f"{i}.{name}": p for i, m in enumerate(modules) for name, p in m.named_parameters()}


def gradients_of(functions):
    return {name: p.grad for name, p in trained(*functions).items()}


def plain(loss, encoders, inputs, **options):
    """The step that needs all activations: its value, and the gradients it leaves."""
    for p in trained(loss, *encoders).values():
        p.grad = None
    result = loss(*(encode(x) for encode, x in zip(encoders, inputs, strict=True)), **options)
    value = result[0] if isinstance(result, tuple) else result
    value.backward()
    return value.detach(), gradients_of([loss, *encoders])


def cached(loss, encoders, inputs, *, given, **options):
    for p in trained(loss, *encoders).values():
        p.grad = None
    value = GradCache(loss, encoders, **given)(*inputs, **options)
    return value, gradients_of([loss, *encoders])


def same(loss, encoders, inputs, given=None, rtol=1e-12, **options):
    wanted, gradients = plain(loss, encoders, inputs, **options)
    found, ours = cached(loss, encoders, inputs, given=given or {"rows": 4}, **options)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=0)
    assert any(g is not None for g in gradients.values())
    for name, g in gradients.items():
        torch.testing.assert_close(ours[name], g, rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name}: {text}")


# The plain step's gradients -------------------------------------------------------------------------------------------


class LearntClip(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.2, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def forward(self, image, text):
        return fusedloss.clip(image, text, self.log_scale.exp(), self.bias)


class LearntSigLip(LearntClip):
    def forward(self, image, text):
        return fusedloss.siglip(image, text, self.log_scale.exp(), self.bias)


def own_loss(a, b):
    """Nothing of this package's."""
    return F.cross_entropy(a @ b.T, torch.arange(len(a))) + (a.mean(0) - b.std(0)).square().sum()


DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
LABELS = torch.arange(10) // 2
LOSSES = {
    "info_nce": (functools.partial(fusedloss.info_nce, normalize=True, temperature=0.2), 2),
    "its module": (fusedloss.InfoNCELoss(0.5, label_smoothing=0.1), 2),
    "masked": (functools.partial(fusedloss.info_nce, mask=masks.score_margin(0.2)), 2),
    "clip with a learnt scale": (LearntClip(), 2),
    "siglip with a learnt scale and bias": (LearntSigLip(), 2),
    "ranking": (fusedloss.multiple_negatives_ranking, 4),
    "ranking in all directions": (
        functools.partial(fusedloss.multiple_negatives_ranking, directions=DIRECTIONS, scale=5.0),
        3,
    ),
    "gist_embed": (lambda a, p: fusedloss.gist_embed(a, p, guide=(GUIDE, GUIDE.flip(0))), 2),
    "nt_xent": (fusedloss.nt_xent, 2),
    "sup_con": (lambda x: fusedloss.sup_con(x, LABELS), 1),
    "matryoshka": (functools.partial(fusedloss.matryoshka, fusedloss.info_nce, dims=(6, 3)), 2),
    "batch_hard_triplet": (lambda x: fusedloss.batch_hard_triplet(x, LABELS), 1),
    "the user's own": (own_loss, 2),
}
GUIDE = torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shared", [False, True], ids=["an encoder each", "one encoder"])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_gradients_are_those_of_the_whole_batch(loss, shared):
    """Ten rows in chunks of four: the last one is smaller."""
    loss, count = LOSSES[loss]
    towers = [tower()] * count if shared else [tower() for _ in range(count)]
    same(loss, towers, [randn(10, 5) for _ in range(count)])


@pytest.mark.parametrize("rows", [1, 3, 10, 1000])
def test_chunks_of_any_size(rows):
    same(own_loss, [tower(), tower()], [randn(10, 5), randn(10, 5)], {"rows": rows})


def test_inputs_of_different_lengths():
    encoders = [tower(), tower(width=3), tower()]
    same(fusedloss.multiple_negatives_ranking, encoders, [randn(7, 5), randn(9, 3), randn(2, 5)])


def test_an_encoder_that_is_not_in_a_list_serves_all_inputs():
    encoder, inputs = tower(), [randn(10, 5), randn(10, 5)]
    wanted, gradients = plain(own_loss, [encoder, encoder], inputs)
    encoder.zero_grad()
    torch.testing.assert_close(GradCache(own_loss, encoder, rows=3)(*inputs), wanted, rtol=1e-12, atol=0)
    for p, g in zip(encoder.parameters(), gradients.values(), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-12)


def test_options_go_to_the_loss_and_get_their_gradients():
    inputs, towers = [randn(10, 5), randn(10, 5)], [tower(), tower()]
    temperature, bank = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), randn(20, 6)
    options = {"temperature": temperature, "bank": bank, "normalize": True}
    plain(fusedloss.info_nce, towers, inputs, **options)
    wanted, temperature.grad = temperature.grad, None
    cached(fusedloss.info_nce, towers, inputs, given={"rows": 4}, **options)
    torch.testing.assert_close(temperature.grad, wanted, rtol=1e-12, atol=0)
    temperature.grad = None
    same(fusedloss.info_nce, towers, inputs, **options)


def test_gradients_add_up_as_in_backward():
    encoder, x = tower(), randn(10, 5)
    step = GradCache(lambda e: e.square().sum(), encoder, rows=4)
    step(x)
    once = [p.grad.clone() for p in encoder.parameters()]
    step(x)
    for p, g in zip(encoder.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g, rtol=1e-12, atol=1e-12)


def test_inputs_that_are_leaves_get_gradients():
    encoder, x = tower().requires_grad_(False), randn(10, 5)
    leaf = x.clone().requires_grad_()
    GradCache(lambda e: e.square().sum(), encoder, rows=4)(leaf)
    again = x.clone().requires_grad_()
    encoder(again).square().sum().backward()
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-12, atol=1e-14)


def test_what_the_loss_returns_beside_its_value():
    """Detached, as the value is: nothing holds the graph of the loss."""
    inputs = [randn(10, 5), randn(10, 5)]
    towers = [tower(), tower()]
    loss, stats = GradCache(fusedloss.info_nce, towers, rows=4)(*inputs, return_stats=True)
    wanted = fusedloss.info_nce(*(f(x) for f, x in zip(towers, inputs, strict=True)), return_stats=True)[1]
    assert isinstance(stats, fusedloss.Stats) and not loss.requires_grad
    for one, other in zip(stats, wanted, strict=True):
        torch.testing.assert_close(one, other)


# What goes in, and what comes out -------------------------------------------------------------------------------------


class Reader(nn.Module):
    """A language model's ways: a dict of padded tokens in, several things out."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 6, dtype=torch.float64)
        self.calls: list[tuple[int, ...]] = []

    def forward(self, input_ids, attention_mask, scale=1.0):
        self.calls.append(tuple(attention_mask.sum(1).tolist()))
        tokens = self.table(input_ids) * attention_mask[..., None] * scale
        return {"tokens": tokens, "pooled": tokens.sum(1)}


LENGTHS = [3, 7, 2, 2, 2, 5, 1, 6, 6, 1]


def text(lengths=LENGTHS):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(50, mask.shape), "attention_mask": mask}


@pytest.mark.parametrize("given", [{"rows": 3}, {"tokens": 12}], ids=str)
def test_dicts_of_a_tokenizer(given):
    reader, inputs = Reader(), [text(), text()]
    wanted = own_loss(*(reader(**x)["pooled"] for x in inputs))
    wanted.backward()
    gradient, reader.table.weight.grad = reader.table.weight.grad, None
    found = GradCache(own_loss, reader, embedding=lambda out: out["pooled"], unpack=True, **given)(*inputs)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(reader.table.weight.grad, gradient, rtol=1e-12, atol=1e-12)


class Batch(dict):
    """Mappings of a class of their own, as transformers' BatchEncoding is one."""


@pytest.mark.parametrize("wrap", [dict, Batch, lambda x: [x["input_ids"], x["attention_mask"]]])
def test_containers(wrap):
    reader, given = Reader(), wrap({**text(), "scale": 2.0} if wrap is not Batch else text())
    step = GradCache(lambda out: out["pooled"].square().sum(), reader, rows=4, unpack=True)
    assert step(given).isfinite() and reader.table.weight.grad.any()


def test_without_unpack_an_encoder_gets_the_container():
    reader, x = Reader(), text()
    found = GradCache(lambda e: e.sum(), [lambda batch: reader(**batch)["pooled"]], rows=4)(x)
    torch.testing.assert_close(found, reader(**x)["pooled"].sum().detach(), rtol=1e-12, atol=0)
    assert reader.table.weight.grad is not None


def test_several_tensors_of_an_encoder_reach_the_loss_in_one_piece():
    reader, x = Reader(), text()
    loss = lambda out: out["pooled"].square().sum() + out["tokens"].cos().sum()
    wanted = torch.autograd.grad(loss(reader(**x)), reader.table.weight)[0]
    GradCache(loss, reader, rows=4, unpack=True)(x)
    torch.testing.assert_close(reader.table.weight.grad, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 8, 12, 20, 1000])
@pytest.mark.parametrize("by_mask", [True, False])
def test_a_chunk_keeps_to_its_tokens(tokens, by_mask):
    """Rows times the longest of them; a row that is too long goes alone; greedily, in order."""
    reader, x = Reader(), text()
    lengths = None if by_mask else lambda given: given["attention_mask"].sum(1).tolist()
    step = GradCache(lambda out: out["pooled"].sum(), reader, tokens=tokens, lengths=lengths, unpack=True)
    with torch.no_grad():
        step(x)
    assert [n for chunk in reader.calls for n in chunk] == LENGTHS
    for chunk, following in zip(reader.calls, [*reader.calls[1:], None], strict=True):
        assert len(chunk) == 1 or len(chunk) * max(chunk) <= tokens
        if following:
            longer = (*chunk, following[0])
            assert len(longer) * max(longer) > tokens


def test_an_input_without_rows():
    encoder = tower()
    found = GradCache(lambda a, b: a.square().sum() + b.sum(), encoder, rows=4)(randn(10, 5), randn(0, 5))
    assert found.isfinite() and encoder[0].weight.grad is not None


# Random numbers -------------------------------------------------------------------------------------------------------


def chunked(loss, encoders, inputs, rows):
    """A plain step over the same chunks, whose activations are all kept."""
    columns = [torch.cat([f(part) for part in x.split(rows)]) for f, x in zip(encoders, inputs, strict=True)]
    loss(*columns).backward()
    return gradients_of(encoders)


def test_dropout_is_replayed():
    """The second pass draws what the first drew, and the stream ends as a plain step leaves it."""
    towers, inputs = [tower(dropout=0.5), tower(dropout=0.3)], [randn(10, 5), randn(10, 5)]
    torch.manual_seed(7)
    wanted = chunked(own_loss, towers, inputs, 4)
    following = torch.rand(3)
    for t in towers:
        t.zero_grad()
    torch.manual_seed(7)
    _, found = GradCache(own_loss, towers, rows=4)(*inputs), trained(*towers)
    assert torch.equal(torch.rand(3), following)
    for name, g in wanted.items():
        torch.testing.assert_close(found[name].grad, g, rtol=1e-12, atol=1e-12)


def test_without_replay_the_second_pass_draws_its_own():
    encoder, x = tower(dropout=0.5), randn(10, 5)
    torch.manual_seed(7)
    wanted = chunked(lambda e: e.square().sum(), [encoder], [x], 4)["0.3.weight"]
    encoder.zero_grad()
    torch.manual_seed(7)
    GradCache(lambda e: e.square().sum(), encoder, rows=4, replay_rng=False)(x)
    assert not torch.allclose(encoder[3].weight.grad, wanted)


# Mixed precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
def test_autocast_and_a_gradient_scaler(scaled):
    """Rounding to bf16 is the same in both, but where gradients are summed; weights are cast once, with a graph."""
    towers = [tower(dtype=torch.float32), tower(dtype=torch.float32)]
    inputs = [torch.randn(12, 5), torch.randn(12, 5)]
    seen = []

    def loss(a, b):
        seen.append((a.dtype, b.dtype))
        return fusedloss.info_nce(a, b, temperature=0.5)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    for t in towers:
        t.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(*(f(x) for f, x in zip(towers, inputs, strict=True)))
    value.backward()
    wanted = gradients_of(towers)
    for t in towers:
        t.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = GradCache(loss, towers, rows=4, scaler=scaler)(*inputs)
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 2
    torch.testing.assert_close(found, value.detach(), rtol=1e-6, atol=0)
    factor = 1024.0 if scaled else 1.0
    ours, theirs = (torch.cat([g[name].flatten() for name in wanted]) for g in (gradients_of(towers), wanted))
    assert (ours / factor - theirs).norm() < 1e-2 * theirs.norm()
    if scaled:
        optimizer = torch.optim.SGD([p for t in towers for p in t.parameters()], lr=0.1)
        before = towers[0][0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(towers[0][0].weight, before - 0.1 * wanted["0.0.weight"], rtol=1e-2, atol=1e-4)


@pytest.mark.gpu
def test_on_a_gpu_dropout_is_replayed_under_fp16_and_a_scaler():
    towers, inputs = [tower(dropout=0.5, dtype=torch.float32).cuda() for _ in range(2)], torch.randn(2, 64, 5).cuda()
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    loss = functools.partial(fusedloss.info_nce, normalize=True, temperature=0.2)
    torch.manual_seed(7)
    with torch.autocast("cuda", dtype=torch.float16):
        columns = [torch.cat([f(part) for part in x.split(24)]) for f, x in zip(towers, inputs, strict=True)]
        value = loss(*columns)
    scaler.scale(value).backward()
    following, wanted = torch.rand(3, device="cuda"), gradients_of(towers)
    for t in towers:
        t.zero_grad()
    torch.manual_seed(7)
    with torch.autocast("cuda", dtype=torch.float16):
        found = GradCache(loss, towers, rows=24, scaler=scaler)(*inputs)
    assert torch.equal(torch.rand(3, device="cuda"), following)
    torch.testing.assert_close(found, value.detach(), rtol=1e-5, atol=0)
    ours, theirs = (torch.cat([g[name].flatten() for name in wanted]) for g in (gradients_of(towers), wanted))
    assert (ours - theirs).norm() < 1e-2 * theirs.norm()


@pytest.mark.gpu
def test_on_a_gpu_nothing_synchronises():
    towers, inputs = [tower(dropout=0.5, dtype=torch.float32).cuda() for _ in range(2)], torch.randn(2, 64, 5).cuda()
    step = GradCache(fusedloss.info_nce, towers, rows=24)
    step(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Processes ------------------------------------------------------------------------------------------------------------


class StandIn(nn.Module):
    """As DistributedDataParallel: a backward outside of `no_sync()` is an exchange."""

    def __init__(self, module):
        super().__init__()
        self.module, self.quiet, self.log = module, False, []

    @contextlib.contextmanager
    def no_sync(self):
        before, self.quiet = self.quiet, True
        try:
            yield
        finally:
            self.quiet = before

    def forward(self, x):
        out, quiet = self.module(x), self.quiet
        if out.requires_grad:
            out.register_hook(lambda g: self.log.append("quiet" if quiet or self.quiet else "exchange"))
        return out


class Sharded(nn.Module):
    """As FSDP2's modules, whose switch has no memory."""

    def __init__(self, module):
        super().__init__()
        self.module, self.quiet, self.log = module, False, []

    def set_requires_gradient_sync(self, value):
        self.quiet = not value

    forward = StandIn.forward


@pytest.mark.parametrize("kind", [StandIn, Sharded])
def test_gradients_are_exchanged_once(kind):
    """With the last of three chunks; also where it is inside of the encoder."""
    inner, other = kind(tower()), kind(tower())
    GradCache(own_loss, [nn.Sequential(inner, nn.Identity()), other], rows=4)(randn(10, 5), randn(10, 5))
    assert inner.log == other.log == ["quiet", "quiet", "exchange"]
    assert not inner.quiet and not other.quiet


@pytest.mark.parametrize("kind", [StandIn, Sharded])
def test_a_module_of_several_inputs_exchanges_with_its_very_last_chunk(kind):
    module = kind(tower())
    encoders = [module, functools.partial(module), module.forward]
    GradCache(fusedloss.multiple_negatives_ranking, encoders, rows=6)(*(randn(10, 5) for _ in range(3)))
    assert module.log == ["quiet"] * 5 + ["exchange"]


def test_an_input_that_the_loss_leaves_out_is_not_waited_for():
    module = StandIn(tower())
    GradCache(lambda a, b: a.square().sum(), module, rows=6)(randn(10, 5), randn(10, 5))
    assert module.log == ["quiet", "exchange"]


def test_inside_no_sync_nothing_is_exchanged():
    """As one step of several that accumulate."""
    module = StandIn(tower())
    with module.no_sync():
        GradCache(lambda a: a.square().sum(), module, rows=6)(randn(10, 5))
    assert module.log == ["quiet", "quiet"]


@pytest.fixture
def one_process(tmp_path):
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("option", [None, "find_unused_parameters", "gradient_as_bucket_view", "static_graph"])
def test_distributed_data_parallel(one_process, option):
    """Two steps, so that the second finds the module as the first left it; buckets are reduced once in each.

    A static graph is recorded in its first backward, which must be an exchange.
    """
    encoder = tower()
    inputs = [randn(10, 5), randn(10, 5)]
    module, reduced = (
        nn.parallel.DistributedDataParallel(copy.deepcopy(encoder), **({option: True} if option else {})),
        [],
    )

    def count(state, bucket):
        reduced.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    module.register_comm_hook(None, count)
    step = GradCache(own_loss, module, rows=4)
    for number in range(2):
        wanted, gradients = plain(own_loss, [encoder, encoder], inputs)
        module.zero_grad()
        torch.testing.assert_close(step(*inputs), wanted, rtol=1e-12, atol=0)
        for p, g in zip(module.parameters(), gradients.values(), strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-12)
        assert reduced.count(0) == number + 1 + (option == "static_graph")


# What needs no gradient -----------------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.calls, self.graphs = module, 0, 0

    def forward(self, x):
        out = self.module(x)
        self.calls, self.graphs = self.calls + 1, self.graphs + out.requires_grad
        return out


def test_a_frozen_encoder_runs_once():
    trains, frozen = Counting(tower()), Counting(tower()).requires_grad_(False)
    same(own_loss, [trains, frozen], [randn(10, 5), randn(10, 5)])
    trains.calls = frozen.calls = 0
    GradCache(own_loss, [trains, frozen], rows=4)(randn(10, 5), randn(10, 5))
    assert (trains.calls, frozen.calls) == (6, 3)


def test_a_function_that_turns_out_to_train_nothing_is_asked_once_more():
    frozen, encoder = Counting(tower()).requires_grad_(False), tower()
    GradCache(own_loss, [lambda x: frozen(x), lambda x: encoder(x)], rows=4)(randn(10, 5), randn(10, 5))
    assert frozen.calls == 4 and encoder[0].weight.grad is not None


def test_all_frozen_is_an_evaluation():
    frozen = Counting(tower()).requires_grad_(False)
    loss = GradCache(own_loss, frozen, rows=4)(randn(10, 5), randn(10, 5))
    assert frozen.calls == 6 and not loss.requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_step_only_evaluates(context):
    encoder, inputs = Counting(tower()), [randn(10, 5), randn(10, 5)]
    wanted = own_loss(*map(encoder, inputs)).detach()
    encoder.calls = encoder.graphs = 0
    with context():
        found = GradCache(own_loss, encoder, rows=4)(*inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert encoder.calls == 6 and not encoder.graphs and encoder.module[0].weight.grad is None


def test_what_an_encoder_returns_is_not_changed():
    """It may be a tensor of the user's, or one that the next call overwrites."""
    table, buffer = randn(10, 5), randn(4, 6)
    linear = nn.Linear(5, 6, dtype=torch.float64)

    def overwrites(x):
        return linear(x) if torch.is_grad_enabled() else buffer[: len(x)].copy_(linear(x))

    GradCache(lambda a, b: a.square().sum() + b.sum(), [lambda x: x, overwrites], rows=4)(table, table)
    assert not table.requires_grad
    wanted = linear(table).detach().sum() + table.square().sum()
    found = GradCache(lambda a, b: a.square().sum() + b.sum(), [lambda x: x, overwrites], rows=4)(table, table)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


# Memory ---------------------------------------------------------------------------------------------------------------


def encoder_memory(rows: int | None, batch: int) -> int:
    """Of a step through activations of 16384 features, 64 KiB a row."""
    encoder = nn.Sequential(nn.Linear(16, 16384), nn.Tanh(), nn.Linear(16384, 16))

    def step(x, y):
        if rows is None:
            fusedloss.info_nce(encoder(x), encoder(y), backend="chunked").backward()
        else:
            GradCache(fusedloss.info_nce, encoder, rows=rows)(x, y, backend="chunked")

    x, y = torch.randn(2, batch, 16)
    return measure.peak_memory(lambda: step(x, y))


@pytest.mark.slow
@measured
def test_activations_are_those_of_a_chunk():
    """Four matrices of 128 MiB and more of the whole batch; of 128 rows some of 8 MiB, and the loss's workspace."""
    whole, chunked = (growth(encoder_memory, rows, sizes=(8, 2048)) for rows in (None, 128))
    assert whole > 450 * MIB and chunked < 64 * MIB


# Errors ---------------------------------------------------------------------------------------------------------------

X = torch.randn(6, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({}, ValueError, "one of rows and tokens, the size of a chunk, must be given, got neither"),
        ({"rows": 2, "tokens": 8}, ValueError, "one of rows and tokens, the size of a chunk, must be given, got both"),
        ({"rows": 0}, ValueError, "rows must be at least 1 or None, got 0"),
        ({"rows": 2.0}, TypeError, "rows must be a whole number or None, got 2.0, a float"),
        ({"tokens": -1}, ValueError, "tokens must be at least 1 or None, got -1"),
        ({"rows": 2, "lengths": len}, ValueError, "lengths must be None without tokens, got a function"),
        ({"tokens": 2, "lengths": 3}, TypeError, "lengths must be a function or None, got 3, an int"),
        ({"rows": 2, "embedding": "pooled"}, TypeError, "embedding must be a function or None, got .*a str"),
        ({"rows": 2, "loss": None}, TypeError, "loss must be a module or a function, got None"),
        ({"rows": 2, "encoders": 5}, TypeError, "encoders must be a module or a function, got 5, an int"),
        (
            {"rows": 2, "encoders": [nn.Identity(), None]},
            TypeError,
            r"encoders\[1\] must be a module or a function, got None",
        ),
    ],
)
def test_errors_of_the_constructor(given, error, message):
    with pytest.raises(error, match=message):
        GradCache(**{"loss": own_loss, "encoders": nn.Identity(), **given})


@pytest.mark.parametrize(
    "given, inputs, error, message",
    [
        ({}, [], ValueError, "inputs must hold at least one input, got none"),
        ({"encoders": [tower()]}, [X, X], ValueError, "encoders must hold 2 encoders, one for each input, got 1"),
        (
            {},
            [X, "text"],
            TypeError,
            r"inputs\[1\] must hold at least one tensor \[rows, ...\], got 'text', a str without",
        ),
        ({}, [[X, X[:3]]], ValueError, r"inputs\[0\] must hold tensors of one number of rows, got 3 and 6"),
        (
            {},
            [X.clone().requires_grad_() * 2],
            ValueError,
            r"inputs\[0\] must be a leaf, got the result of a computation that autograd records",
        ),
        (
            {"rows": None, "tokens": 8},
            [X],
            ValueError,
            r"inputs\[0\] must have an attention_mask \[rows, L\] if tokens is given, got none",
        ),
        (
            {"rows": None, "tokens": 8, "lengths": lambda x: [1]},
            [X],
            ValueError,
            r"lengths must return one number for each of the 6 rows of inputs\[0\], got 1",
        ),
        (
            {"encoders": lambda x: [1.0]},
            [X],
            TypeError,
            r"encoders, of inputs\[0\], must return a tensor \[rows, D\], got a list",
        ),
        ({"encoders": [lambda x: None]}, [X], TypeError, r"encoders\[0\] must return a tensor \[rows, D\], got None"),
        (
            {"encoders": [lambda x: x[:1]]},
            [X],
            ValueError,
            r"encoders\[0\] must return 4 rows, one per row of its input, got float64 \[1, 5\]",
        ),
        (
            {"encoders": [lambda x: x[:, : len(x)]]},
            [X],
            ValueError,
            r"must return one dtype .*, got float64 \[2, 2\] for rows 4 to 5 and float64 \[4, 4\] for those before",
        ),
        ({"loss": lambda x: x.sum(1)}, [X], ValueError, r"loss must return one number, got float64 \[6\]"),
        (
            {"loss": lambda x: {"loss": x.sum()}},
            [X],
            TypeError,
            "loss must return a tensor or a tuple that starts with one, got a dict",
        ),
    ],
)
def test_errors_of_a_step_come_before_any_gradient(given, inputs, error, message):
    encoder = tower()
    with pytest.raises(error, match=message):
        GradCache(**{"loss": lambda *e: e[0].sum(), "encoders": encoder, "rows": 4, **given})(*inputs)
    assert all(p.grad is None for p in encoder.parameters())


class Odd(NamedTuple):
    """An encoder's second pass that goes wrong, and what that says."""

    returns: object
    error: type[Exception]
    message: str


@pytest.mark.parametrize(
    "odd",
    [
        Odd(
            lambda out: out[:, :3],
            ValueError,
            r"encoders\[1\] must return the same .* rows 8 to 9 again, got float64 \[2, 6\] and then float64 \[2, 3\]",
        ),
        Odd(
            lambda out: out.float(),
            ValueError,
            r"encoders\[1\] must return the same .* rows 8 to 9 again, got float64 \[2, 6\] and then float32 \[2, 6\]",
        ),
        Odd(lambda out: 1 / 0, ZeroDivisionError, "division"),
    ],
    ids=["shape", "dtype", "error"],
)
def test_a_second_pass_that_fails_leaves_nothing_behind(odd):
    """In the very last chunk: gradients that were None are so again, random numbers go on, modules exchange again."""
    first, second, loss = StandIn(tower(dropout=0.5)), StandIn(tower(dropout=0.5)), LearntClip()
    calls = []

    def fails(module, args, out):
        calls.append(len(out))
        return odd.returns(out) if len(calls) == 6 else out

    second.module.register_forward_hook(fails)
    inputs = [randn(10, 5), randn(10, 5)]
    torch.manual_seed(3)
    with torch.no_grad():
        GradCache(loss, [first, second], rows=4)(*inputs)
    following = torch.rand(3)
    calls.clear()
    torch.manual_seed(3)
    with pytest.raises(odd.error, match=odd.message):
        GradCache(loss, [first, second], rows=4)(*inputs)
    assert torch.equal(torch.rand(3), following)
    assert all(p.grad is None for p in trained(first, second, loss).values())
    assert not first.quiet and not second.quiet


def test_an_interrupt_passes_through():
    encoder = tower()

    def interrupted(module, args, out):
        if out.requires_grad:
            raise KeyboardInterrupt

    encoder.register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        GradCache(lambda e: e.sum(), encoder, rows=4)(X)
    assert all(p.grad is None for p in encoder.parameters())


# A memory of earlier steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunks"])
def test_a_memory_of_earlier_steps_is_the_formula(chunked):
    """Three steps with rows for two: cross-entropy of the rows and keys of the batch and of the newest seven before."""
    torch.manual_seed(0)
    encoder, loss = tower(), WithMemory(functools.partial(fusedloss.info_nce, temperature=0.4), rows=7)
    step = GradCache(loss, encoder, rows=2) if chunked else lambda x, y: loss(encoder(x), encoder(y))
    past = []
    for _ in range(3):
        inputs = randn(5, 5), randn(5, 5)
        encoder.zero_grad()
        found = step(*inputs)
        if not chunked:
            found.backward()
        own = [p.grad.clone() for p in encoder.parameters()]
        encoder.zero_grad()
        x, y = (encoder(given) for given in inputs)
        before = [torch.cat([old[side] for old in past])[:7] for side in (0, 1)] if past else [x[:0], y[:0]]
        q, k = torch.cat([x, before[0].detach()]), torch.cat([y, before[1].detach()])
        wanted = F.cross_entropy(q @ k.T / 0.4, torch.arange(len(q)))
        wanted.backward()
        torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-12, atol=0)
        for p, g in zip(encoder.parameters(), own, strict=True):
            torch.testing.assert_close(g, p.grad, rtol=1e-10, atol=1e-12)
        past.insert(0, (x.detach(), y.detach()))
    assert [m.shape for m in loss.memory] == [(7, 6)] * 2 and not any(m.requires_grad for m in loss.memory)


def test_a_memory_takes_hard_negatives_and_forgets():
    torch.manual_seed(0)
    columns = [randn(4, 6) for _ in range(3)]
    loss = WithMemory(fusedloss.MultipleNegativesRankingLoss(), rows=100)
    loss(*columns), loss(*columns)
    thrice = [torch.cat([x, x, x]) for x in columns]
    torch.testing.assert_close(loss(*columns), fusedloss.multiple_negatives_ranking(*thrice))
    loss.memory = []
    torch.testing.assert_close(loss(*columns), fusedloss.multiple_negatives_ranking(*columns))


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("full", [False, True])
def test_a_batch_that_is_not_finite_is_not_remembered(full, number):
    torch.manual_seed(0)
    loss, (x, y, spoilt) = WithMemory(fusedloss.InfoNCELoss(0.5), rows=4 if full else 10), randn(3, 4, 6)
    loss(x, y)
    before = list(loss.memory)
    spoilt[1, 2] = number
    assert not loss(x, spoilt).isfinite()
    assert all(map(torch.equal, loss.memory, before))
    torch.testing.assert_close(
        loss(y, x), fusedloss.info_nce(torch.cat([y, x]), torch.cat([x, y]), temperature=0.5), rtol=1e-12, atol=0
    )
    fresh = WithMemory(fusedloss.InfoNCELoss(0.5), rows=4)
    fresh(spoilt, x)
    assert fresh.memory == []


def test_evaluation_and_failure_leave_the_memory_alone():
    loss, x = WithMemory(fusedloss.InfoNCELoss(0.5), rows=8), randn(4, 6)
    loss(x, x)
    before = [m.clone() for m in loss.memory]
    with torch.no_grad():
        assert torch.equal(loss(-x, x), fusedloss.info_nce(-x, x, temperature=0.5))
    with pytest.raises(ValueError, match=r"weight must have shape \[8\]"):
        loss(x + 1, x, weight=torch.ones(4))  # of the eight rows
    with pytest.raises(ValueError, match=r"one number of rows, row by row of one sample, got \[4, 3\]"):
        loss(x, x[:3])
    with pytest.raises(ValueError, match=r"dimensions of those remembered, \[6, 6\], got \[5, 5\]; assign \[\]"):
        loss(x[:, :5], x[:, :5])
    assert all(map(torch.equal, loss.memory, before))
    assert "memory" not in str(loss.state_dict()) and "rows=8" in repr(loss)
    with pytest.raises(ValueError, match="embeddings must hold at least one tensor, got none"):
        loss()
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        WithMemory(fusedloss.info_nce, rows=0)
    with pytest.raises(TypeError, match="rows must be a whole number, got None"):  # would remember without a bound
        WithMemory(fusedloss.info_nce, rows=None)
    with pytest.raises(TypeError, match="loss must be a module or a function, got"):
        WithMemory(None, rows=4)
