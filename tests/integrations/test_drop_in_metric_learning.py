"""The drop-ins for pytorch-metric-learning: its values and gradients at every option, fused or by its own code."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers

from fusedloss.integrations import _drop_in, calls
from fusedloss.integrations import pytorch_metric_learning as fused

pytestmark = pytest.mark.upstream

PAIRS = ("NTXentLoss", "SupConLoss", "MultiSimilarityLoss", "CircleLoss", "ContrastiveLoss", "TripletMarginLoss")
CLASSES = ("ArcFaceLoss", "CosFaceLoss", "ProxyAnchorLoss", "ProxyNCALoss")
ROWS, DIM, KINDS = 33, 6, 5
LP, COSINE, DOT = distances.LpDistance, distances.CosineSimilarity, distances.DotProductSimilarity


EXACT = 25  # rows: of more, upstream's cdist takes products, and equal rows are apart by a rounding


def made(module, name, options):
    """The loss, of one seed: those of classes have weights."""
    torch.manual_seed(1)
    shape = {"num_classes": KINDS, "embedding_size": DIM} if name in CLASSES else {}
    return getattr(module, name)(**shape, **copy.deepcopy(options)).double()


def batch(rows=ROWS, kinds=KINDS, dtype=torch.float64):
    torch.manual_seed(2)
    labels = torch.randint(0, kinds, (rows,))
    return torch.randn(rows, DIM, dtype=dtype) + 0.5 * torch.randn(kinds, DIM, dtype=dtype)[labels], labels


def outcome(loss, arguments, ref_emb=None, ref_labels=None):
    """The value and all gradients."""
    x = arguments[0].clone().requires_grad_()
    ref = None if ref_emb is None else ref_emb.clone().requires_grad_()
    torch.manual_seed(3)  # for drawn triplets
    value = loss(x, *arguments[1:], ref_emb=ref, ref_labels=ref_labels)
    value.backward()
    parameters = [p.grad for p in loss.parameters()]
    return [value.detach(), x.grad, *([] if ref is None else [ref.grad]), *parameters]


def same(name, options, arguments, counted=True, tolerance=1e-10, **reference):
    """As upstream; `counted`: whether it ran fused."""
    ours = made(fused, name, options)
    before = calls[f"pytorch_metric_learning.{name}"]
    found = outcome(ours, arguments, **reference)
    assert (calls[f"pytorch_metric_learning.{name}"] > before) == counted
    wanted = outcome(made(losses, name, options), arguments, **reference)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return found


# Fused ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS + CLASSES)
def test_with_the_defaults(name):
    same(name, {}, batch())


@pytest.mark.parametrize("name", PAIRS + CLASSES)
def test_labels_made_under_inference_mode(name):
    """Autograd cannot keep such a tensor."""
    x, labels = batch()
    with torch.inference_mode():
        made_there = labels.clone()
    found, wanted = (outcome(made(fused, name, {}), (x, given)) for given in (made_there, labels))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


REDUCERS = [
    reducers.MeanReducer(),
    reducers.SumReducer(),
    reducers.AvgNonZeroReducer(),
    reducers.ThresholdReducer(low=0.1, high=2),
    reducers.ClassWeightedReducer(torch.arange(1, KINDS + 1).double()),
    reducers.PerAnchorReducer(reducers.AvgNonZeroReducer()),
]


@pytest.mark.parametrize("reducer", REDUCERS, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("name", [n for n in PAIRS + CLASSES if n not in ("ProxyAnchorLoss", "TripletMarginLoss")])
def test_reducers(name, reducer):
    sums = name != "ContrastiveLoss" or type(reducer) in (
        reducers.MeanReducer,
        reducers.SumReducer,
        reducers.AvgNonZeroReducer,
    )
    same(name, {"reducer": reducer}, batch(), counted=sums)


@pytest.mark.parametrize("reducer", REDUCERS[:4], ids=lambda r: type(r).__name__)
def test_reducers_of_triplets(reducer):
    same("TripletMarginLoss", {"reducer": reducer}, batch(), counted=reducer in REDUCERS[:3])


def test_the_losses_of_rows_themselves():
    for name in ("SupConLoss", "MultiSimilarityLoss", "CircleLoss", "ArcFaceLoss", "ProxyNCALoss", "NTXentLoss"):
        ours, theirs = (
            made(module, name, {"reducer": reducers.DoNothingReducer()})(*batch())["loss"] for module in (fused, losses)
        )
        assert ours["reduction_type"] == theirs["reduction_type"]
        torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours["indices"], theirs["indices"])


DISTANCES = [
    LP(),
    LP(power=2),
    LP(normalize_embeddings=False),
    LP(normalize_embeddings=False, power=2),
    COSINE(),
    DOT(),
]
DISTANCES += [DOT(normalize_embeddings=False)]


@pytest.mark.parametrize("distance", DISTANCES, ids=lambda d: f"{type(d).__name__}-{d.power}-{d.normalize_embeddings}")
@pytest.mark.parametrize("name", [n for n in PAIRS if n != "CircleLoss"])
def test_distances(name, distance):
    margins = {"ContrastiveLoss": {"pos_margin": 0.3, "neg_margin": 0.7}, "TripletMarginLoss": {"margin": 0.4}}
    knows = name in margins or name == "NTXentLoss" or isinstance(distance, DOT)
    same(name, {"distance": distance, **margins.get(name, {})}, batch(), counted=knows, tolerance=1e-9)


def test_the_distances_of_proxies():
    same("ProxyNCALoss", {"distance": COSINE(), "softmax_scale": 3}, batch())
    same("ProxyNCALoss", {"distance": LP(), "softmax_scale": 3}, batch(), counted=False)
    same("ProxyAnchorLoss", {"distance": DOT(normalize_embeddings=False)}, batch(), counted=False)


OPTIONS = {
    "NTXentLoss": [{"temperature": 0.5}, {"temperature": 1e-3}],
    "SupConLoss": [{"temperature": 0.02}],
    "MultiSimilarityLoss": [{"alpha": 1, "beta": 10, "base": 0.1}],
    "CircleLoss": [{"m": 0.25, "gamma": 5}],
    "ContrastiveLoss": [{"pos_margin": 0.5, "neg_margin": 1.5}],
    "TripletMarginLoss": [{"margin": 0.0}, {"margin": 3.0}],
    "ArcFaceLoss": [{"margin": 60, "scale": 4}, {"margin": 120, "scale": 4}],
    "CosFaceLoss": [{"margin": 0.1, "scale": 4}],
    "ProxyAnchorLoss": [{"margin": 0.3, "alpha": 5}],
    "ProxyNCALoss": [{"softmax_scale": 20}, {"softmax_scale": 100}],
}


@pytest.mark.parametrize("name, options", [(name, options) for name, all_of in OPTIONS.items() for options in all_of])
def test_options(name, options):
    same(name, options, batch())


def test_proxies_out_of_reach():
    """Upstream leaves out rows whose probability is 0; near that its gradient is NaN, and ours is not."""
    x, labels = batch()
    x, labels = x.requires_grad_(), labels.clone()
    ours, theirs = (made(module, "ProxyNCALoss", {"softmax_scale": 300})(x, labels) for module in (fused, losses))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    assert torch.autograd.grad(ours, x)[0].isfinite().all()
    labels[:4] = torch.tensor([-100, -1, KINDS, KINDS + 3])
    same("ProxyNCALoss", {}, (x.detach(), labels))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("apart", [1, 7, 20])
def test_with_references(name, apart):
    x, labels = batch()
    reference = {"ref_emb": x[apart:], "ref_labels": labels[apart:]}
    # F.softplus, of which CircleLoss is made, is the identity from 20.
    same(name, {}, (x[:apart], labels[:apart]), tolerance=1e-8 if name == "CircleLoss" else 1e-10, **reference)


@pytest.mark.parametrize("name", PAIRS)
def test_references_with_the_labels_of_the_batch_leave_out_the_diagonal(name):
    x, labels = batch(EXACT)
    for ref_labels in (labels, labels.clone()):  # distances of a rounding
        same(name, {}, (x, labels), tolerance=1e-8, ref_emb=x.flip(0), ref_labels=ref_labels)


@pytest.mark.parametrize("kinds", [1, 2, 33, 1000])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 16])
@pytest.mark.parametrize("name", PAIRS)
def test_degenerate_batches(name, rows, kinds):
    """Without positives, without negatives, without anything: a zero with a graph."""
    torch.manual_seed(2)
    x, labels = torch.randn(rows, DIM, dtype=torch.float64), torch.randint(0, kinds, (rows,))
    loss, *_ = same(name, {}, (x, labels))
    assert loss.shape == () and loss.isfinite()


@pytest.mark.parametrize("name", CLASSES)
def test_batches_of_one(name):
    x, labels = batch()
    same(name, {}, (x[:1], labels[:1]))


@pytest.mark.parametrize("name", PAIRS + CLASSES)
def test_duplicates_and_zeros(name):
    x, labels = batch(EXACT)
    x[3] = x[4]
    x[5] = x[4]
    labels[3] = labels[4]
    same(name, {}, (x, labels), tolerance=1e-7)  # cosines of 1: distances of a rounding, acos
    x[6] = 0  # at distance 1 from all others: not at the margin, where a rounding decides what is counted
    options = {"neg_margin": 0.9} if name == "ContrastiveLoss" else {}
    ours, theirs = (made(module, name, options)(x, labels) for module in (fused, losses))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_references_that_are_the_batch_are_at_distance_0(dtype):
    """Of which AvgNonZeroReducer counts none, however many rows there are."""
    x, labels = batch(EXACT, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    same("ContrastiveLoss", {}, (x, labels), ref_emb=x.clone(), ref_labels=labels.clone(), tolerance=tolerance)
    x, labels = batch(40, dtype=dtype)
    alike = labels[:, None] == labels
    distance = torch.nn.functional.normalize(x, dim=1)
    distance = (distance[:, None] - distance).square().sum(2).sqrt()
    wanted = (
        distance[alike].sum() / (alike.sum() - 40)
        + (1 - distance[~alike]).relu().sum() / ((distance < 1) & ~alike).sum()
    )
    found = fused.ContrastiveLoss()(x, labels, ref_emb=x.clone(), ref_labels=labels.clone())
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=0)


@pytest.mark.parametrize("reducer", REDUCERS[:3], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("distance", DISTANCES, ids=lambda d: f"{type(d).__name__}-{d.power}-{d.normalize_embeddings}")
def test_more_positive_pairs_than_are_listed(distance, reducer, monkeypatch):
    monkeypatch.setattr(fused, "FEW", 0)
    same("ContrastiveLoss", {"distance": distance, "reducer": reducer}, batch())


@pytest.mark.parametrize("name", PAIRS + CLASSES)
def test_nan(name):
    x, labels = batch()
    x[3] = torch.nan
    ours, theirs = (made(module, name, {})(x, labels) for module in (fused, losses))
    assert ours.isnan() == theirs.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PAIRS + CLASSES)
def test_dtypes(name, dtype):
    """Of the embeddings; fp32 is as near to fp64 as upstream. Only CircleLoss in float16 is upstream's own."""
    x, labels = batch(dtype=dtype)
    before = calls[f"pytorch_metric_learning.{name}"]
    found = outcome(made(fused, name, {}), (x, labels))
    fuses = name != "CircleLoss" or dtype != torch.float16
    assert (calls[f"pytorch_metric_learning.{name}"] > before) == fuses
    assert found[0].dtype == x.dtype and found[1].dtype == x.dtype
    if dtype == torch.float32:
        wanted = outcome(made(losses, name, {}), (x.double(), labels))
        for a, b in zip(found, wanted, strict=True):
            assert (a.double() - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("name", PAIRS)
def test_labels_of_any_integers(name):
    x, labels = batch()
    for other in (labels.int(), labels.to(torch.int8), labels * 2**40 - 2**62):
        same(name, {}, (x, other))


@pytest.mark.parametrize("name", PAIRS + CLASSES)
def test_regularizers(name):
    options = {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3}
    if name in CLASSES:
        options["weight_regularizer"] = regularizers.RegularFaceRegularizer()
    same(name, options, batch())


def test_wrappers_accept_them():
    x, labels = batch()
    for name in ("NTXentLoss", "SupConLoss", "TripletMarginLoss"):
        ours, theirs = (losses.SelfSupervisedLoss(made(module, name, {})) for module in (fused, losses))
        torch.testing.assert_close(ours(x, x.flip(0)), theirs(x, x.flip(0)))
        ours, theirs = (losses.CrossBatchMemory(made(module, name, {}), DIM, 64) for module in (fused, losses))
        for part in (slice(0, 12), slice(12, 24)):
            torch.testing.assert_close(ours(x[part], labels[part]), theirs(x[part], labels[part]))


@pytest.mark.parametrize("size", [20, 21, 64], ids=lambda n: f"{n} rows")
@pytest.mark.parametrize("name", PAIRS)
def test_a_memory_across_batches(name, size):
    """Until it wraps around, at a place within a batch (21) or between two (20), and after that."""
    x, labels = batch(60)
    options = {"reducer": reducers.MeanReducer()}
    ours = fused.CrossBatchMemory(made(fused, name, options), DIM, size)
    theirs = losses.CrossBatchMemory(made(losses, name, options), DIM, size)
    before = calls.copy()
    for start in range(0, 60, 10):
        part, found = slice(start, start + 10), []
        for loss in (ours, theirs):
            rows = x[part].clone().requires_grad_()
            value = loss(rows, labels[part])
            value.backward()
            found.append((value.detach(), rows.grad))
        for own, other in zip(*found, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-8)
        assert torch.equal(ours.embedding_memory, theirs.embedding_memory) and ours.queue_idx == theirs.queue_idx
    ran = calls - before
    assert ran["pytorch_metric_learning.CrossBatchMemory"] == 6
    assert ran[f"pytorch_metric_learning.{name}"] == 6


def test_a_memory_of_other_rows_and_of_mined_pairs():
    x, labels = batch(24)
    enqueued = torch.arange(24) % 3 == 0
    for loss in ("NTXentLoss", "ContrastiveLoss"):
        ours, theirs = (m.CrossBatchMemory(made(m, loss, {}), DIM, 64) for m in (fused, losses))
        for own, other in ((ours, theirs),) * 2:
            found, wanted = (memory(x, labels, enqueue_mask=enqueued) for memory in (own, other))
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
        before = calls.copy()
        ours, theirs = (
            m.CrossBatchMemory(made(m, loss, {}), DIM, 64, miner=miners.MultiSimilarityMiner()) for m in (fused, losses)
        )
        torch.testing.assert_close(ours(x, labels), theirs(x, labels), rtol=1e-8, atol=1e-8)
        assert not (calls - before)["pytorch_metric_learning.CrossBatchMemory"]


def test_a_memorys_pairs_are_the_librarys_lists():
    x, labels = batch(30)
    ours, theirs = (m.CrossBatchMemory(made(fused, "NTXentLoss", {}), DIM, 21) for m in (fused, losses))
    for part in (slice(0, 10), slice(10, 20), slice(20, 30)):
        found = []
        for memory in (ours, theirs):
            memory.loss.register_forward_pre_hook(lambda _, args, found=found: found.append(tuple(args[2])))
            memory(x[part], labels[part])
            memory.loss._forward_pre_hooks.clear()
        for own, other in zip(*found, strict=True):
            assert torch.equal(own, other)


# Pairs that are given -------------------------------------------------------------------------------------------------

MINERS = [
    miners.BatchHardMiner(),
    miners.MultiSimilarityMiner(),
    miners.TripletMarginMiner(type_of_triplets="semihard"),
]


@pytest.mark.parametrize("miner", MINERS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("name", PAIRS + CLASSES)
def test_miners(name, miner):
    x, labels = batch()
    few = isinstance(miner, miners.BatchHardMiner)
    counted = name in ("NTXentLoss", "ArcFaceLoss", "CosFaceLoss", "ProxyNCALoss") or (
        name == "TripletMarginLoss" and few
    )
    same(name, {}, (x, labels, miner(x, labels)), counted=counted)


@pytest.mark.parametrize("distance", DISTANCES, ids=lambda d: f"{type(d).__name__}-{d.power}-{d.normalize_embeddings}")
@pytest.mark.parametrize("options", [{}, {"swap": True}, {"smooth_loss": True}, {"swap": True, "margin": 0.5}])
def test_given_triplets(options, distance):
    x, labels = batch()
    triplets = torch.randint(0, ROWS, (3, 40))
    if isinstance(distance, LP) and distance.power == 1:
        # No row with itself, nor with itself in the mirrored reference: cdist takes the root of a difference of
        # products there, of a rounding, so that what is 0 is found to be up to 1e-8.
        triplets = torch.rand(40, ROWS // 2).argsort(1)[:, :3].T
        triplets = torch.where(torch.rand(3, 40) < 0.5, triplets, ROWS - 1 - triplets)
    triplets = tuple(triplets)
    for reducer in (None, reducers.MeanReducer(), reducers.ThresholdReducer(low=0.1)):
        options = {**options, "distance": distance, "reducer": reducer}
        same("TripletMarginLoss", options, (x, labels, triplets))
        same("TripletMarginLoss", options, (x, None, triplets), ref_emb=x.flip(0))


def test_drawn_triplets_are_upstreams():
    same("TripletMarginLoss", {"triplets_per_anchor": 3}, batch())
    same("TripletMarginLoss", {"triplets_per_anchor": 30}, batch(), counted=False)


def test_given_pairs_of_ntxent():
    """Duplicates count twice, anchors may lack negatives, and positives be another row's."""
    x, labels = batch()
    rows, anchors = torch.randint(0, 11, (30,)), torch.randint(0, 11, (50,))
    # Not a row with itself, whose distance is a rounding.
    drawn = (rows, (rows + torch.randint(1, 11, (30,))) % 11, anchors, (anchors + torch.randint(1, 11, (50,))) % 11)
    for distance in (COSINE(), LP(), DOT(normalize_embeddings=False)):
        same("NTXentLoss", {"distance": distance, "temperature": 0.3}, (x, None, drawn))
        same("NTXentLoss", {"distance": distance}, (x, labels, (drawn[0], drawn[1], drawn[2][:30])), ref_emb=x.flip(0))
    empty = torch.tensor([], dtype=torch.int64)
    same("NTXentLoss", {}, (x, labels, (drawn[0], drawn[1], empty, empty)))


# By upstream's code ---------------------------------------------------------------------------------------------------


def test_reasons_are_told(caplog, monkeypatch):
    monkeypatch.setattr(_drop_in, "_warned", set())
    x, labels = batch()

    class Mine(fused.SupConLoss):
        def _compute_loss(self, *arguments):
            return super()._compute_loss(*arguments)

    with caplog.at_level(logging.WARNING, logger="fusedloss"):
        Mine()(x, labels)
        fused.SupConLoss(distance=distances.SNRDistance())(x, labels)
        fused.MultiSimilarityLoss()(x, labels.double())
        fused.TripletMarginLoss(swap=True)(x, labels)
        fused.ProxyAnchorLoss(KINDS, DIM, reducer=reducers.MeanReducer())(x.float(), labels)
    assert [record.getMessage().split("because ")[1] for record in caplog.records] == [
        "_compute_loss is overridden",
        "of its distance, which has no fused form here",
        "labels are not integers",
        "swap and smooth_loss need every triplet",
        "of its reducer",
    ]


@pytest.mark.parametrize("options", [{"swap": True}, {"smooth_loss": True}, {"distance": distances.SNRDistance()}])
def test_triplets_by_upstream(options):
    same("TripletMarginLoss", options, batch(), counted=False)


@pytest.mark.parametrize("name", PAIRS + CLASSES)
def test_statistics(name, monkeypatch):
    monkeypatch.setattr("pytorch_metric_learning.utils.common_functions.COLLECT_STATS", True)
    x, labels = batch()
    ours, theirs = made(fused, name, {}), made(losses, name, {})
    torch.testing.assert_close(ours(x, labels), theirs(x, labels), rtol=1e-10, atol=1e-10)
    for one, other in zip(ours.modules(), theirs.modules(), strict=True):
        for stat in getattr(other, "_record_these_stats", []):
            assert getattr(one, stat) == pytest.approx(getattr(other, stat)), stat


@pytest.mark.parametrize("name", PAIRS + CLASSES)
def test_errors_are_upstreams(name):
    x, labels = batch()
    bad = [(x, labels[:-1]), (x[0], labels), (x, labels[:, None]), (x[None], labels)]
    bad += [(x, None)] if name not in CLASSES else [(x, None), (x, labels + KINDS)]
    for arguments in bad:
        raised = []
        for module in (losses, fused):
            try:
                raised.append(made(module, name, {})(*arguments).isnan())
            except Exception as error:
                raised.append((type(error), str(error)))
        assert raised[0] == raised[1]


def test_the_environment_turns_them_off(monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_DISABLE", "1")
    for name in PAIRS + CLASSES:
        same(name, {}, batch(), counted=False)


# patch() --------------------------------------------------------------------------------------------------------------


def test_patch():
    original = losses.NTXentLoss
    with fused.patch():
        from pytorch_metric_learning.losses import NTXentLoss

        assert NTXentLoss is fused.NTXentLoss is losses.NTXentLoss and issubclass(NTXentLoss, original)
        before = calls["pytorch_metric_learning.NTXentLoss"]
        losses.SelfSupervisedLoss(losses.NTXentLoss())(torch.randn(4, 3), torch.randn(4, 3))
        assert calls["pytorch_metric_learning.NTXentLoss"] == before + 1
        for name in PAIRS + CLASSES:
            assert getattr(losses, name) is getattr(fused, name) and getattr(losses, name).__name__ == name
    assert losses.NTXentLoss is original


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_nothing_of_the_batch_squared_is_kept(name):
    """No tensor of N^2 elements is saved for backward."""
    rows = 512
    x, labels = torch.randn(rows, 16, requires_grad=True), torch.arange(rows) // 2
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        made(fused, name, {}).float()(x, labels).backward()
    assert max(sizes, default=0) <= 16 * rows


# Labels of any layout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["chunked", "triton", "cuda"])
@pytest.mark.parametrize("name", PAIRS + CLASSES)
def test_labels_of_any_stride(name, backend, monkeypatch):
    """Bit by bit what contiguous ones give: kernels read addresses."""
    monkeypatch.setenv("FUSEDLOSS_BACKEND", backend)
    x, labels = batch(9, 3, torch.float32)
    strided = torch.stack([labels, labels.flip(0)], dim=1)[:, 0]
    expanded = labels.clone()[:1].expand(9)
    for given, copied in ((strided, labels), (expanded, expanded.contiguous())):
        losses_ = [outcome(made(fused, name, {}).float(), (x, y)) for y in (given, copied)]
        for a, b in zip(*losses_, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
