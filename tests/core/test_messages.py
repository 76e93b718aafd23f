"""What a mistake is told: the argument, what it must be, what it got, and the remedy."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

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
        "info_nce got an unexpected argument 'scale'; pass temperature, its inverse: temperature=0.05",
    ),
    "temperature of ranking": (
        lambda: ranking(temperature=0.05),
        TypeError,
        "multiple_negatives_ranking got an unexpected argument 'temperature'; pass scale, its inverse: scale=20",
    ),
    "temperature of clip": (
        lambda: fusedloss.clip(X, X, temperature=0.1),
        TypeError,
        "clip got an unexpected argument 'temperature'; pass logit_scale, its inverse: logit_scale=10",
    ),
    "a tensor by the other name": (
        lambda: info_nce(logit_scale=torch.tensor(3.0)),
        TypeError,
        "info_nce got an unexpected argument 'logit_scale'; pass temperature, its inverse",
    ),
    "scale of siglip": (
        lambda: fusedloss.siglip(X, X, scale=2.0),
        TypeError,
        "siglip got an unexpected argument 'scale'; pass logit_scale",
    ),
    "an unknown option": (
        lambda: fusedloss.sup_con(X, LABELS, margin=1),
        TypeError,
        "sup_con got an unexpected argument 'margin'; it takes (embeddings, labels, *, temperature=0.1, "
        "form='out', ...)",
    ),
    "scale of a module": (
        lambda: fusedloss.InfoNCELoss(scale=20.0),
        TypeError,
        "InfoNCELoss got an unexpected argument 'scale'; pass temperature, its inverse: temperature=0.05",
    ),
    "temperature of a module": (
        lambda: fusedloss.CoSENTLoss(temperature=0.1),
        TypeError,
        "CoSENTLoss got an unexpected argument 'temperature'; pass scale, its inverse: scale=10",
    ),
    "a module's types": (
        lambda: fusedloss.MegaBatchMarginLoss(margin=1.0),
        TypeError,
        "MegaBatchMarginLoss got an unexpected argument 'margin'; it takes (positive_margin=0.8, "
        "negative_margin=0.3, reduction='mean', ...)",
    ),
    "too much for a module": (
        lambda: fusedloss.ListNetLoss("mean", "auto", 3),
        TypeError,
        "ListNetLoss got wrong arguments: too many positional arguments; it takes (reduction='mean', backend='auto')",
    ),
    # What forward takes.
    "clip without a scale": (
        lambda: fusedloss.ClipLoss()(X, X),
        TypeError,
        "ClipLoss.forward got no 'logit_scale'; it takes (image_features, text_features, logit_scale, "
        "logit_bias=None, *, mask=None)",
    ),
    "an option in forward": (
        lambda: fusedloss.InfoNCELoss()(X, X, temperature=1.0),
        TypeError,
        "InfoNCELoss.forward got an unexpected argument 'temperature'; pass this option to the constructor",
    ),
    "an unknown tensor in forward": (
        lambda: fusedloss.SupConLoss()(X, LABELS, mask=None),
        TypeError,
        "SupConLoss.forward got an unexpected argument 'mask'; it takes (embeddings, labels)",
    ),
    "one too many in forward": (
        lambda: fusedloss.MSELoss()(X, X, X, X),
        TypeError,
        "MSELoss.forward got 4 arguments; it takes (input, target, weight=None)",
    ),
    "gist without a guide": (
        lambda: fusedloss.GISTEmbedLoss()(X, X),
        TypeError,
        "GISTEmbedLoss.forward got no 'guide'; it takes (anchor, positive, *negatives, guide, ids=None)",
    ),
    # No tensors, or others.
    "a list": (
        lambda: fusedloss.info_nce([[1.0]], X),
        TypeError,
        "query must be a tensor [rows, D], got a list; torch.as_tensor makes one",
    ),
    "an array": (
        lambda: fusedloss.nt_xent(X.numpy(), X),
        TypeError,
        "z1 must be a tensor [rows, D], got a ndarray; torch.as_tensor makes one",
    ),
    "None": (lambda: fusedloss.clip(X, None, 1.0), TypeError, "text_features must be a tensor [rows, D], got None"),
    "nested": (
        lambda: fusedloss.info_nce(nested(), X),
        TypeError,
        "query must be a dense tensor, got a nested one; pass query.values() if it is jagged, else "
        "torch.cat(query.unbind())",
    ),
    "sparse": (
        lambda: fusedloss.linear_cross_entropy(X.to_sparse(), X, LABELS),
        TypeError,
        "input must be a dense tensor, got layout torch.sparse_coo; call .to_dense()",
    ),
    "views": (
        lambda: fusedloss.sup_con(X[:, None], LABELS),
        ValueError,
        "embeddings must have two dimensions [rows, D], got shape [6, 1, 4]; pass embeddings.flatten(0, 1), and "
        "repeat labels likewise",
    ),
    "labels as negatives": (
        lambda: ranking(LABELS),
        TypeError,
        "negatives[0] must be float16, bfloat16, float32 or float64, got torch.int64; labels and ids are not "
        "embeddings",
    ),
    "a teacher that is None": (
        lambda: fusedloss.embed_distill(X, None),
        TypeError,
        "teacher must be a sequence of columns [B, D], or a tensor, such as [teacher_a, teacher_b], got None",
    ),
    "a student that is None": (
        lambda: fusedloss.embed_distill(None, X),
        TypeError,
        "student must be a sequence of columns [B, D], or a tensor, such as [student_a, student_b], got None",
    ),
    "tension speaks of a and b": (
        lambda: fusedloss.contrastive_tension_in_batch(X, X[:3]),
        ValueError,
        "b must have 6 rows, one for each sentence of a, got 3",
    ),
    "tension's own names": (
        lambda: fusedloss.contrastive_tension_in_batch(X, X[:, :2]),
        ValueError,
        "b must have D = 4, like a, got D = 2",
    ),
    "mse of a list": (
        lambda: fusedloss.mse(X[0], [1.0]),
        TypeError,
        "target must be a tensor of input's shape, [4], got a list; torch.as_tensor makes one",
    ),
    "mse of an array": (
        lambda: fusedloss.mse(X, X.numpy()),
        TypeError,
        "target must be a tensor of input's shape, [6, 4], got a ndarray; torch.as_tensor makes one",
    ),
    "huber of a number": (lambda: fusedloss.huber(0.5, X), TypeError, "input must be a tensor, got 0.5, a float"),
    "bce of long labels": (
        lambda: fusedloss.binary_cross_entropy_with_logits(X, torch.ones(6, 4, dtype=torch.long)),
        RuntimeError,  # torch's kind
        "target must be a floating tensor of 0 and 1, got torch.int64; call .float()",
    ),
    "no dimension": (
        lambda: fusedloss.linear_cross_entropy(torch.zeros(6, 0), torch.zeros(3, 0), LABELS),
        ValueError,
        "input must be [..., D] with D of at least 1, got shape [6, 0]",
    ),
    # Targets, labels, ids.
    "a temperature as target": (
        lambda: info_nce(0.05),
        TypeError,
        "target must be an int64 tensor [6] of column indices, got 0.05, a float; did you mean temperature=0.05?",
    ),
    "a list as target": (
        lambda: info_nce([0, 1, 2, 3, 4, 5]),
        TypeError,
        "target must be an int64 tensor [6] of column indices, got a list; torch.as_tensor makes one",
    ),
    "int32 target": (
        lambda: info_nce(LABELS.int()),
        TypeError,
        "target must be an int64 tensor [6] of column indices, got torch.int32 [6]; call .long()",
    ),
    "a matrix as siglip's target": (
        lambda: fusedloss.siglip(X, X, 1.0, target=torch.eye(6, dtype=torch.bool)),
        TypeError,
        "target must be an int64 tensor [6] of column indices, got torch.bool [6, 6]; for several positives per "
        "row pass siglip masks.same_id(row_ids, key_ids)",
    ),
    "siglip's target outside": (
        lambda: fusedloss.siglip(X, X, 1.0, target=torch.full((6,), -(2**63))),
        IndexError,
        "target[0] must be an index from 0 to 5, got -9223372036854775808",
    ),
    "int32 labels": (
        lambda: fusedloss.sup_con(X, LABELS.int()),
        TypeError,
        "labels must be a tensor of int64 [6], got torch.int32; call .long()",
    ),
    "int32 ids": (
        lambda: info_nce(mask=masks.same_id(LABELS.int(), LABELS)),
        TypeError,
        "same_id's row_ids must be a tensor of int64 [6], got torch.int32; call .long()",
    ),
    "labels in a list": (
        lambda: fusedloss.circle(X, [0, 0, 1, 1, 2, 2]),
        TypeError,
        "labels must be a tensor of int64 [6], got a list; torch.as_tensor makes one",
    ),
    "a weight of integers": (
        lambda: info_nce(weight=LABELS),
        TypeError,
        "weight must be a floating tensor [6], got torch.int64; call .float()",
    ),
    "focal's labels": (
        lambda: fusedloss.focal(X, torch.full((6, 4), 2.0)),
        ValueError,
        "target must hold labels from 0 to 1, got 2",
    ),
    "focal's labels, whole": (
        lambda: fusedloss.focal(X, torch.ones(6, 4, dtype=torch.int32)),
        TypeError,
        "target must be floating labels or int64 classes, got torch.int32; call .float() or .long()",
    ),
    # Masks.
    "a mask of floats": (
        lambda: masks.not_self() & torch.ones(6, 6),
        TypeError,
        "a mask must be joined with a bool tensor [M, N], True for what may compete, got torch.float32",
    ),
    "masks of two shapes": (
        lambda: masks.not_self() & torch.ones(6, 6, dtype=torch.bool) & torch.ones(1, 6, dtype=torch.bool),
        ValueError,
        "bool tensors joined in a mask must have one shape [M, N], got [6, 6] and [1, 6]; expand the smaller",
    ),
    "a mask joined with a number": (
        lambda: masks.not_self() & 3,
        TypeError,
        "a mask must be joined with one of fusedloss.masks or a bool tensor [M, N], got 3, an int",
    ),
    "a mask in a list": (
        lambda: info_nce(mask=[[True] * 6] * 6),
        TypeError,
        "mask must be one of fusedloss.masks or a bool tensor, got a list; torch.as_tensor makes one",
    ),
    "exempt outside": (
        lambda: info_nce(mask=masks.score_margin(0.1, torch.full((6, 1), 99))),
        IndexError,
        "score_margin's exempt must hold columns from 0 to 5, or -1 for none, got 99",
    ),
    # Sequences.
    "dims": (
        lambda: matryoshka(dims=4),
        TypeError,
        "dims must be a sequence of numbers from 1 to D, such as (768, 256), got 4, an int",
    ),
    "weights": (
        lambda: matryoshka(weights=0.5),
        TypeError,
        "weights must be a sequence of numbers, such as (1.0, 1.0), got 0.5, a float",
    ),
    "directions": (
        lambda: ranking(directions=3),
        TypeError,
        "directions must be a sequence of names, such as ('query_to_doc', 'query_to_query'), got 3, an int",
    ),
    "a direction twice": (
        lambda: ranking(directions=("query_to_doc", "query_to_doc")),
        ValueError,
        "directions must hold each name at most once, got ('query_to_doc', 'query_to_doc')",
    ),
    "a model as guide": (
        lambda: fusedloss.gist_embed(X, X, guide=LINEAR),
        TypeError,
        "guide must be a sequence of embeddings, such as (guide_anchor, guide_positive), got the nn.Module Linear",
    ),
    "layers": (
        lambda: fusedloss.adaptive_layer(fusedloss.info_nce, [X, X], [X, X], layer_indices=0),
        TypeError,
        "layer_indices must be a sequence of layers, such as [0], got 0, an int",
    ),
    "columns": (
        lambda: fusedloss.adaptive_layer(fusedloss.info_nce, 3, 3),
        TypeError,
        "columns[0] must be a sequence of every layer's embeddings, such as [layer_0, layer_1], got 3, an int",
    ),
    "concatenation": (
        lambda: fusedloss.softmax_pair(X, X, torch.randn(3, 12), None, LABELS, concatenation=2),
        TypeError,
        "concatenation must be a sequence of names, such as ('rep', 'difference'), got 2, an int",
    ),
    # A loss of a loss.
    "a class as loss": (
        lambda: matryoshka(fusedloss.InfoNCELoss),
        TypeError,
        "loss must be a function or a module's instance, such as fusedloss.info_nce, got the class InfoNCELoss",
    ),
    "a class as loss of layers": (
        lambda: fusedloss.adaptive_layer(fusedloss.InfoNCELoss, [X, X], [X, X]),
        TypeError,
        "loss must be a function or a module's instance, such as fusedloss.info_nce, got the class InfoNCELoss",
    ),
    "an unknown option of the loss": (
        lambda: matryoshka(scale=2.0),
        TypeError,
        "info_nce got an unexpected argument 'scale'; pass temperature, its inverse: temperature=0.5",
    ),
    "a strategy without a group": (
        lambda: matryoshka(strategy="ring"),
        ValueError,
        "group must be given with strategy='ring' and grad_scale='ddp', got None; pass a ProcessGroup, or 'world'",
    ),
    # Numbers.
    "delta in words": (lambda: fusedloss.huber(X, X, delta="1"), TypeError, "delta must be a number, got '1', a str"),
    "beta in words": (lambda: fusedloss.smooth_l1(X, X, beta="1"), TypeError, "beta must be a number, got '1', a str"),
    "z_loss": (
        lambda: fusedloss.cross_entropy(X, LABELS, z_loss=-0.1),
        ValueError,
        "z_loss must be a number of at least 0, got -0.1",
    ),
    "z_loss of a module": (
        lambda: fusedloss.CrossEntropyLoss(z_loss=-0.1),
        ValueError,
        "z_loss must be a number of at least 0, got -0.1",
    ),
    "eps": (
        lambda: fusedloss.lambda_loss(SCORES, SCORES, eps=-1),
        ValueError,
        "eps must be a number of at least 0, got -1",
    ),
    "mu": (
        lambda: fusedloss.lambda_loss(SCORES, SCORES, mu=-1.0),
        ValueError,
        "mu must be a number of at least 0, got -1.0",
    ),
    # Transforms.
    "torch.func": (
        lambda: torch.func.grad(lambda q: fusedloss.info_nce(q, X, backend="chunked"))(X),
        fusedloss.UnsupportedError,
        "backend must be 'reference' under torch.func transforms and torch.vmap, got 'chunked'",
    ),
    "vmap": (
        lambda: torch.vmap(lambda q: fusedloss.info_nce(q, X, backend="chunked"))(X[None]),
        fusedloss.UnsupportedError,
        "backend must be 'reference' under torch.func transforms and torch.vmap, got 'chunked'",
    ),
    "torch.func of lists": (
        lambda: torch.func.grad(lambda s: fusedloss.list_net(s, SCORES, backend="chunked"))(SCORES),
        fusedloss.UnsupportedError,
        "backend must be 'reference' under torch.func transforms and torch.vmap, got 'chunked'",
    ),
    "torch.func of ordered pairs": (
        lambda: torch.func.grad(lambda a: fusedloss.cosent(a, X, X[:, 0], backend="chunked"))(X),
        fusedloss.UnsupportedError,
        "backend must be 'reference' under torch.func transforms and torch.vmap, got 'chunked'",
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
    said = r" must be a plain tensor, got a DTensor; pass {0}\.to_local\(\), with group= if its rows are sharded"
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


# The form -------------------------------------------------------------------------------------------------------------

KINDS = {"ValueError", "TypeError", "IndexError", "UnsupportedError", "ArgumentTypeError"}
# Messages that name no argument, by how they begin, and why they have another form.
OTHER_FORMS = {
    "{unexpected}": "a name that is no argument: what was got, and what to pass",
    "{} got wrong arguments: {}": "Python's own message, with the signature after it",
    "rank {} of group refuses: {}": "the message of another rank",
    "Target size (": "torch's message, word by word",
    "{} cannot run this problem. {}": "the reasons of all backends",
    "{} cannot run this loss. {}": "the reason of a backend",
    "backend={} proves nothing of {}": "the reason of a backend, in a report",
    "they ": "the end of a warning about a file: 'the verdicts in FILE are ignored: they ...'",
}


def raised(path):
    """The text of every error of KINDS that a file raises, with {} for what is filled in, or {NAME} for a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue
        kind = node.exc.func
        if (kind.id if isinstance(kind, ast.Name) else getattr(kind, "attr", "")) in KINDS and node.exc.args:
            yield node.lineno, written(node.exc.args[0])


def written(node):
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(written(part) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp):
        return written(node.left) + written(node.right)
    name = getattr(node, "func", node)
    return "{%s}" % (name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", ""))


def test_errors_say_what_an_argument_must_be_and_what_it_got():
    root = Path(fusedloss.__file__).parent
    found = [(path.relative_to(root), *one) for path in sorted(root.rglob("*.py")) for one in raised(path)]
    assert len(found) > 150  # the walk finds them
    others = {(path, line): text for path, line, text in found if not re.search(r"must .*\bgot ", text)}
    strange = {place: text for place, text in others.items() if not text.startswith(tuple(OTHER_FORMS))}
    assert not strange
    assert all(any(text.startswith(form) for text in others.values()) for form in OTHER_FORMS)
    assert not [text for _, _, text in found if text.endswith(".")]
