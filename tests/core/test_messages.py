"""What a mistake is told: the argument, what it must be, what it got, and the remedy."""

from __future__ import annotations

import os
import re

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn

import fusedloss
from fusedloss import masks

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
GUIDES = (X, X)
LINEAR = nn.Linear(4, 4)
SCORES = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def nested():
    return torch.nested.nested_tensor([X[:2], X[2:]], layout=torch.jagged)


def info_nce(*args, **options):
    return fusedloss.info_nce(X, X, *args, **options)


def ranking(*args, **options):
    return fusedloss.multiple_negatives_ranking(X, X, *args, **options)


def matryoshka(loss=fusedloss.info_nce, *args, dims=(4, 2), **options):
    return fusedloss.matryoshka(loss, *(args or (X, X)), dims=dims, **options)


# The call, the error, and all of its message but what is in "...".
MISTAKES = {
    # A knob by the other name.
    "scale of info_nce": (
        lambda: info_nce(scale=20),
        TypeError,
        "info_nce got 'scale': it takes temperature, the inverse: temperature=0.05",
    ),
    "temperature of ranking": (
        lambda: ranking(temperature=0.05),
        TypeError,
        "multiple_negatives_ranking got 'temperature': it takes scale, the inverse: scale=20",
    ),
    "temperature of clip": (
        lambda: fusedloss.clip(X, X, temperature=0.1),
        TypeError,
        "clip got 'temperature': it takes logit_scale, the inverse: logit_scale=10",
    ),
    "a tensor by the other name": (
        lambda: info_nce(logit_scale=torch.tensor(3.0)),
        TypeError,
        "info_nce got 'logit_scale': it takes temperature, the inverse",
    ),
    "scale of siglip": (
        lambda: fusedloss.siglip(X, X, scale=2.0),
        TypeError,
        "siglip got 'scale': it takes logit_scale",
    ),
    "an unknown option": (
        lambda: fusedloss.sup_con(X, LABELS, margin=1),
        TypeError,
        "sup_con got 'margin': it takes (embeddings, labels, *, temperature=0.1, form='out', ...)",
    ),
    "scale of a module": (
        lambda: fusedloss.InfoNCELoss(scale=20.0),
        TypeError,
        "InfoNCELoss got 'scale': it takes temperature, the inverse: temperature=0.05",
    ),
    "temperature of a module": (
        lambda: fusedloss.CoSENTLoss(temperature=0.1),
        TypeError,
        "CoSENTLoss got 'temperature': it takes scale, the inverse: scale=10",
    ),
    "a module's types": (
        lambda: fusedloss.MegaBatchMarginLoss(margin=1.0),
        TypeError,
        "MegaBatchMarginLoss got 'margin': it takes (positive_margin=0.8, negative_margin=0.3, reduction='mean', ...)",
    ),
    "too much for a module": (
        lambda: fusedloss.ListNetLoss("mean", "auto", 3),
        TypeError,
        "ListNetLoss: too many positional arguments; it takes (reduction='mean', backend='auto')",
    ),
    # What forward takes.
    "clip without a scale": (
        lambda: fusedloss.ClipLoss()(X, X),
        TypeError,
        "ClipLoss.forward got no 'logit_scale': it takes (image_features, text_features, logit_scale, logit_bias=None, "
        "*, mask=None)",
    ),
    "an option in forward": (
        lambda: fusedloss.InfoNCELoss()(X, X, temperature=1.0),
        TypeError,
        "InfoNCELoss.forward got 'temperature': it is an option of the constructor",
    ),
    "an unknown tensor in forward": (
        lambda: fusedloss.SupConLoss()(X, LABELS, mask=None),
        TypeError,
        "SupConLoss.forward got 'mask': it takes (embeddings, labels)",
    ),
    "one too many in forward": (
        lambda: fusedloss.MSELoss()(X, X, X, X),
        TypeError,
        "MSELoss.forward got 4 arguments: it takes (input, target, weight=None)",
    ),
    "gist without a guide": (
        lambda: fusedloss.GISTEmbedLoss()(X, X),
        TypeError,
        "GISTEmbedLoss.forward got no 'guide': it takes (anchor, positive, *negatives, guide)",
    ),
    # No tensors, or others.
    "a list": (
        lambda: fusedloss.info_nce([[1.0]], X),
        TypeError,
        "query is a list: needs a tensor [rows, D]; torch.as_tensor makes one",
    ),
    "an array": (
        lambda: fusedloss.nt_xent(X.numpy(), X),
        TypeError,
        "z1 is a ndarray: needs a tensor [rows, D]; torch.as_tensor makes one",
    ),
    "None": (lambda: fusedloss.clip(X, None, 1.0), TypeError, "text_features is None: needs a tensor [rows, D]"),
    "nested": (
        lambda: fusedloss.info_nce(nested(), X),
        TypeError,
        "query is nested: needs a dense tensor; .values() of a jagged one, or torch.cat of its .unbind(), has the rows "
        "of all",
    ),
    "sparse": (
        lambda: fusedloss.linear_cross_entropy(X.to_sparse(), X, LABELS),
        TypeError,
        "input is of layout torch.sparse_coo: needs a dense tensor; call .to_dense()",
    ),
    "views": (
        lambda: fusedloss.sup_con(X[:, None], LABELS),
        ValueError,
        "embeddings has shape [6, 1, 4]: needs two dimensions [rows, D]; embeddings.flatten(0, 1), and labels repeated "
        "likewise",
    ),
    "labels as negatives": (
        lambda: ranking(LABELS),
        TypeError,
        "negatives[0] has dtype torch.int64: needs float16, bfloat16, float32 or float64; labels and ids are no "
        "embeddings",
    ),
    "a teacher that is None": (
        lambda: fusedloss.embed_distill(X, None),
        TypeError,
        "teacher is None: needs a sequence of columns [B, D], or a tensor, such as [teacher_a, teacher_b]",
    ),
    "a student that is None": (
        lambda: fusedloss.embed_distill(None, X),
        TypeError,
        "student is None: needs a sequence of columns [B, D], or a tensor, such as [student_a, student_b]",
    ),
    "tension speaks of a and b": (
        lambda: fusedloss.contrastive_tension_in_batch(X, X[:3]),
        ValueError,
        "b has 3 rows and a 6: they must be the same sentences",
    ),
    "tension's own names": (
        lambda: fusedloss.contrastive_tension_in_batch(X, X[:, :2]),
        ValueError,
        "b has D = 2 and a has D = 4: they must agree",
    ),
    "mse of a list": (
        lambda: fusedloss.mse(X[0], [1.0]),
        TypeError,
        "target is a list: needs a tensor of input's shape, [4]; torch.as_tensor makes one",
    ),
    "mse of an array": (
        lambda: fusedloss.mse(X, X.numpy()),
        TypeError,
        "target is a ndarray: needs a tensor of input's shape, [6, 4]; torch.as_tensor makes one",
    ),
    "huber of a number": (lambda: fusedloss.huber(0.5, X), TypeError, "input is 0.5, a float: needs a tensor"),
    "bce of long labels": (
        lambda: fusedloss.binary_cross_entropy_with_logits(X, torch.ones(6, 4, dtype=torch.long)),
        RuntimeError,  # torch's kind
        "target is torch.int64: needs a floating tensor of 0 and 1; call .float()",
    ),
    "no dimension": (
        lambda: fusedloss.linear_cross_entropy(torch.zeros(6, 0), torch.zeros(3, 0), LABELS),
        ValueError,
        "input has shape [6, 0]: needs [..., D] with at least one dimension D",
    ),
    # Targets, labels, ids.
    "a temperature as target": (
        lambda: info_nce(0.05),
        TypeError,
        "target is 0.05, a float: needs an int64 tensor [6] of column indices; did you mean temperature=0.05?",
    ),
    "a list as target": (
        lambda: info_nce([0, 1, 2, 3, 4, 5]),
        TypeError,
        "target is a list: needs an int64 tensor [6] of column indices; torch.as_tensor makes one",
    ),
    "int32 target": (
        lambda: info_nce(LABELS.int()),
        TypeError,
        "target is torch.int32 [6]: needs an int64 tensor [6] of column indices; call .long()",
    ),
    "a matrix as siglip's target": (
        lambda: fusedloss.siglip(X, X, 1.0, target=torch.eye(6, dtype=torch.bool)),
        TypeError,
        "target is torch.bool [6, 6]: needs an int64 tensor [6] of column indices; masks.same_id(row_ids, key_ids) "
        "tells siglip of several positives a row",
    ),
    "siglip's target outside": (
        lambda: fusedloss.siglip(X, X, 1.0, target=torch.full((6,), -(2**63))),
        IndexError,
        "target[0] is -9223372036854775808: needs an index from 0 to 5",
    ),
    "int32 labels": (
        lambda: fusedloss.sup_con(X, LABELS.int()),
        TypeError,
        "labels is torch.int32: needs a tensor of int64 [6]; call .long()",
    ),
    "int32 ids": (
        lambda: info_nce(mask=masks.same_id(LABELS.int(), LABELS)),
        TypeError,
        "same_id's row_ids is torch.int32: needs a tensor of int64 [6]; call .long()",
    ),
    "labels in a list": (
        lambda: fusedloss.circle(X, [0, 0, 1, 1, 2, 2]),
        TypeError,
        "labels is list: needs a tensor of int64 [6]; torch.as_tensor makes one",
    ),
    "a weight of integers": (
        lambda: info_nce(weight=LABELS),
        TypeError,
        "weight is torch.int64: needs a floating tensor [6]; call .float()",
    ),
    "focal's labels": (
        lambda: fusedloss.focal(X, torch.full((6, 4), 2.0)),
        ValueError,
        "target holds 2: needs labels from 0 to 1",
    ),
    "focal's labels, whole": (
        lambda: fusedloss.focal(X, torch.ones(6, 4, dtype=torch.int32)),
        TypeError,
        "target has dtype torch.int32: needs floating labels, or int64 classes; call .float() or .long()",
    ),
    # Masks.
    "a mask of floats": (
        lambda: masks.not_self() & torch.ones(6, 6),
        TypeError,
        "mask joins a tensor of torch.float32: needs bool [M, N], True for what may compete",
    ),
    "masks of two shapes": (
        lambda: masks.not_self() & torch.ones(6, 6, dtype=torch.bool) & torch.ones(1, 6, dtype=torch.bool),
        ValueError,
        "mask joins bool tensors of the shapes [6, 6] and [1, 6]: needs [M, N] of both; expand the smaller",
    ),
    "a mask joined with a number": (
        lambda: masks.not_self() & 3,
        TypeError,
        "mask joins 3, an int: needs one of fusedloss.masks, or a bool tensor [M, N]",
    ),
    "a mask in a list": (
        lambda: info_nce(mask=[[True] * 6] * 6),
        TypeError,
        "mask is a list: needs one of fusedloss.masks, or a bool tensor; torch.as_tensor makes one",
    ),
    "exempt outside": (
        lambda: info_nce(mask=masks.score_margin(0.1, torch.full((6, 1), 99))),
        IndexError,
        "score_margin's exempt holds 99: needs columns from 0 to 5, or -1 for none",
    ),
    # Sequences.
    "dims": (
        lambda: matryoshka(dims=4),
        TypeError,
        "dims is 4, an int: needs a sequence of numbers from 1 to D, such as (768, 256)",
    ),
    "weights": (
        lambda: matryoshka(weights=0.5),
        TypeError,
        "weights is 0.5, a float: needs a sequence of numbers, such as (1.0, 1.0)",
    ),
    "directions": (
        lambda: ranking(directions=3),
        TypeError,
        "directions is 3, an int: needs a sequence of names, such as ('query_to_doc', 'query_to_query')",
    ),
    "a direction twice": (
        lambda: ranking(directions=("query_to_doc", "query_to_doc")),
        ValueError,
        "directions is ('query_to_doc', 'query_to_doc'): needs each at most once; leave the second out",
    ),
    "a model as guide": (
        lambda: fusedloss.gist_embed(X, X, guide=LINEAR),
        TypeError,
        "guide is a Linear, an nn.Module: needs a sequence of embeddings, such as (guide_anchor, guide_positive)",
    ),
    "layers": (
        lambda: fusedloss.adaptive_layer(fusedloss.info_nce, [X, X], [X, X], layer_indices=0),
        TypeError,
        "layer_indices is 0, an int: needs a sequence of layers, such as [0]",
    ),
    "columns": (
        lambda: fusedloss.adaptive_layer(fusedloss.info_nce, 3, 3),
        TypeError,
        "columns[0] is 3, an int: needs a sequence of every layer's embeddings, such as [layer_0, layer_1]",
    ),
    "concatenation": (
        lambda: fusedloss.softmax_pair(X, X, torch.randn(3, 12), None, LABELS, concatenation=2),
        TypeError,
        "concatenation is 2, an int: needs a sequence of names, such as ('rep', 'difference')",
    ),
    # A loss of a loss.
    "a class as loss": (
        lambda: matryoshka(fusedloss.InfoNCELoss),
        TypeError,
        "loss is the class InfoNCELoss: needs a function or a module's instance, such as fusedloss.info_nce",
    ),
    "a class as loss of layers": (
        lambda: fusedloss.adaptive_layer(fusedloss.InfoNCELoss, [X, X], [X, X]),
        TypeError,
        "loss is the class InfoNCELoss: needs a function or a module's instance, such as fusedloss.info_nce",
    ),
    "an unknown option of the loss": (
        lambda: matryoshka(scale=2.0),
        TypeError,
        "info_nce got 'scale': it takes temperature, the inverse: temperature=0.5",
    ),
    "a strategy without a group": (
        lambda: matryoshka(strategy="ring"),
        ValueError,
        "strategy='ring', grad_scale='ddp' without group: pass a ProcessGroup with them, or 'world'",
    ),
    # Numbers.
    "delta in words": (lambda: fusedloss.huber(X, X, delta="1"), TypeError, "delta is a str: needs a number"),
    "beta in words": (lambda: fusedloss.smooth_l1(X, X, beta="1"), TypeError, "beta is a str: needs a number"),
    "z_loss": (
        lambda: fusedloss.cross_entropy(X, LABELS, z_loss=-0.1),
        ValueError,
        "z_loss is -0.1: needs a number of at least 0",
    ),
    "z_loss of a module": (
        lambda: fusedloss.CrossEntropyLoss(z_loss=-0.1),
        ValueError,
        "z_loss is -0.1: needs a number of at least 0",
    ),
    "eps": (
        lambda: fusedloss.lambda_loss(SCORES, SCORES, eps=-1),
        ValueError,
        "eps is -1: needs a number of at least 0",
    ),
    "mu": (
        lambda: fusedloss.lambda_loss(SCORES, SCORES, mu=-1.0),
        ValueError,
        "mu is -1.0: needs a number of at least 0",
    ),
    # Transforms.
    "torch.func": (
        lambda: torch.func.grad(lambda q: fusedloss.info_nce(q, X, backend="chunked"))(X),
        fusedloss.UnsupportedError,
        "torch.func transforms and torch.vmap need backend='reference', got 'chunked'",
    ),
    "vmap": (
        lambda: torch.vmap(lambda q: fusedloss.info_nce(q, X, backend="chunked"))(X[None]),
        fusedloss.UnsupportedError,
        "torch.func transforms and torch.vmap need backend='reference', got 'chunked'",
    ),
    "torch.func of lists": (
        lambda: torch.func.grad(lambda s: fusedloss.list_net(s, SCORES, backend="chunked"))(SCORES),
        fusedloss.UnsupportedError,
        "torch.func transforms and torch.vmap need backend='reference', got 'chunked'",
    ),
    "torch.func of ordered pairs": (
        lambda: torch.func.grad(lambda a: fusedloss.cosent(a, X, X[:, 0], backend="chunked"))(X),
        fusedloss.UnsupportedError,
        "torch.func transforms and torch.vmap need backend='reference', got 'chunked'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_message(name):
    call, error, message = MISTAKES[name]
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    assert re.fullmatch(".*".join(re.escape(part) for part in message.split("...")), str(raised.value)), raised.value


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif("RANK" in os.environ, reason="a group stands already")
def test_a_sharded_tensor(mesh):
    from torch.distributed.tensor import DTensor, Shard

    sharded = DTensor.from_local(X, mesh, [Shard(0)])
    said = r" is a DTensor: needs a plain tensor; pass {0}\.to_local\(\), with group= where rows are sharded"
    for name, call in {
        "query": lambda: fusedloss.info_nce(sharded, X),
        "key": lambda: fusedloss.info_nce(X, sharded),
        "linear_weight": lambda: fusedloss.linear_cross_entropy(X, sharded, LABELS),
        "input": lambda: fusedloss.cross_entropy(sharded, LABELS),
        "temperature": lambda: info_nce(temperature=DTensor.from_local(X[0, :1], mesh, [Shard(0)])),
    }.items():
        with pytest.raises(TypeError, match=f"^{name}{said.format(name)}"):
            call()


# What must not be refused ---------------------------------------------------------------------------------------------


def test_forward_takes_its_tensors_in_order():
    weight = torch.rand(4)
    for cls, function in (
        (fusedloss.MSELoss, fusedloss.mse),
        (fusedloss.L1Loss, fusedloss.l1),
        (fusedloss.HuberLoss, fusedloss.huber),
        (fusedloss.SmoothL1Loss, fusedloss.smooth_l1),
    ):
        assert torch.equal(cls()(X, X * 2, weight), function(X, X * 2, weight=weight))
        assert not torch.equal(cls()(X, X * 2, weight), cls()(X, X * 2))
    mask = torch.tensor([[True, True, True, False]] * 3)
    for name in ("LambdaLoss", "RankNetLoss", "ListNetLoss", "ListMLELoss", "PListMLELoss", "ADRMSELoss"):
        loss = getattr(fusedloss, name)()
        assert torch.equal(loss(SCORES, SCORES.flip(1), mask), loss(SCORES, SCORES.flip(1), mask=mask))


def test_a_loss_of_prefixes_takes_its_losss_defaults():
    wanted = matryoshka()
    assert torch.equal(matryoshka(negatives=None, bank=None, group=None, strategy="gather", grad_scale="ddp"), wanted)
    gold = X[:, 0].sigmoid()
    found = fusedloss.matryoshka(fusedloss.cosine_similarity, X, X.flip(0), dims=(4, 2), score=gold, loss=nn.L1Loss())
    parts = [fusedloss.cosine_similarity(X[:, :d], X.flip(0)[:, :d], gold, loss=nn.L1Loss()) for d in (4, 2)]
    torch.testing.assert_close(found, sum(parts), rtol=1e-6, atol=0)
    layers = torch.stack([X, X.flip(1)])
    fusedloss.adaptive_layer(fusedloss.cosine_similarity, layers, layers.flip(1), score=gold, loss=nn.L1Loss())


def test_numpy_numbers_are_numbers():
    assert info_nce(temperature=numpy.float32(0.5)) == info_nce(temperature=0.5)
    assert fusedloss.huber(X, X * 2, delta=numpy.float64(0.5)) == fusedloss.huber(X, X * 2, delta=0.5)
