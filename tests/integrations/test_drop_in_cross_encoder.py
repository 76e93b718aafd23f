"""The cross-encoder drop-ins of sentence-transformers: the library's numbers and gradients, over every option.

Each loss is built twice, from the library's class and from ours, around a stand-in whose score of a document is one
number. The library's losses of lists compute in float32; for digits to compare, its `.float()` is made `.double()`.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math

import pytest
import torch
from old_torch import of_two_dtypes
from torch import nn

pytest.importorskip("sentence_transformers.base.losses.merged_forward", reason="sentence-transformers 6 is needed")

from sentence_transformers.cross_encoder import CrossEncoder
from sentence_transformers.cross_encoder import losses as stock

import fusedloss
from fusedloss.backends import FEW
from fusedloss.integrations import calls
from fusedloss.integrations import sentence_transformers as package
from fusedloss.integrations.sentence_transformers import cross_encoder as fused

pytestmark = pytest.mark.upstream

B = 6
LENGTHS = (4, 1, 7, 3, 0, 5)


class Reranker(CrossEncoder):
    """A query is a number's text and so is a document: its score is in that row of a parameter."""

    device = torch.device("cpu")

    def __init__(self, labels=1, dtype=torch.float64, scores=None):
        nn.Sequential.__init__(self)
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(64, labels, generator=generator, dtype=torch.float64) * 2
        if scores is not None:
            start[: len(scores)] = torch.tensor(scores, dtype=torch.float64)[:, None]
        self.score = nn.Parameter(start.to(dtype))
        self.calls = []

    @property
    def num_labels(self):
        return self.score.shape[1]

    def preprocess(self, pairs, prompt=None, task=None):
        return {"input_ids": torch.tensor([int(document) for _, document in pairs]), "prompt": prompt, "task": task}

    def forward(self, features):
        self.calls.append((len(features["input_ids"]), features["prompt"], features["task"]))
        return {"scores": self.score[features["input_ids"]]}


@pytest.fixture
def in_double(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def columns(count, rows=B):
    return [[str(row + column * rows) for row in range(rows)] for column in range(count)]


def lists(lengths=LENGTHS):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    documents = [[str(start + j) for j in range(length)] for start, length in zip(starts, lengths, strict=True)]
    return [[str(i) for i in range(len(lengths))], documents]


def grades(lengths=LENGTHS, kind="grades"):
    generator = torch.Generator().manual_seed(3)
    draw = {
        "grades": lambda n: torch.randint(0, 4, (n,), generator=generator),
        "real": lambda n: torch.randn(n, generator=generator, dtype=torch.float64),
        "equal": lambda n: torch.ones(n),
        "binary": lambda n: torch.rand(n, generator=generator) < 0.4,
    }[kind]
    return [draw(n) for n in lengths]


def build(library, name, labels=1, dtype=torch.float64, scores=None, **options):
    return getattr(library, name)(Reranker(labels, dtype, scores), **copy.deepcopy(options))


def run(loss, inputs, labels, **kwargs):
    """The loss, and the gradient of the scores."""
    torch.manual_seed(0)
    given = copy.deepcopy(inputs)
    value = loss(given, copy.deepcopy(labels), **kwargs)
    assert given == inputs
    (value if value.dim() == 0 else value.sum()).backward()
    return value.detach(), loss.model.score.grad


def same(ours, theirs, tolerance=1e-10):
    for own, wanted in zip(ours, theirs, strict=True):
        if wanted is None or own is None:
            assert own is wanted
            continue
        scale = wanted.nan_to_num(0, 0, 0).abs().max().clamp(min=1e-6).item() if wanted.numel() else 1.0
        torch.testing.assert_close(own, wanted, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def counted(name):
    return calls[f"sentence_transformers.cross_encoder.{name}"]


def check(name, inputs, labels, tolerance=1e-10, runs_fused=True, model=None, **options):
    stocks, owns = (build(library, name, **(model or {}), **options) for library in (stock, fused))
    before = counted(name)
    same(run(owns, inputs, labels), run(stocks, inputs, labels), tolerance)
    assert counted(name) == before + runs_fused
    assert owns.model.calls == stocks.model.calls
    assert set(vars(owns)) == set(vars(stocks)) and list(owns._modules) == list(stocks._modules)


# Pairs of texts -------------------------------------------------------------------------------------------------------

SHARES = torch.linspace(0, 1, B)
BCE = [
    {},
    {"pos_weight": torch.tensor(3.0)},
    {"pos_weight": torch.tensor([3.0])},
    {"weight": torch.linspace(0.5, 2, B)},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"activation_fn": nn.Tanh()},
]


@pytest.mark.parametrize("options", BCE, ids=str)
@pytest.mark.parametrize(
    "labels", [SHARES, (SHARES > 0.5).long(), SHARES[:, None]], ids=["shares", "classes", "column"]
)
def test_binary_cross_entropy(options, labels, in_double):
    check("BinaryCrossEntropyLoss", columns(2), labels, **options)


@pytest.mark.parametrize("labels", [SHARES, SHARES.double() * 3, torch.arange(B)[:, None]], ids=["f", "d", "column"])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"activation_fn": nn.Sigmoid()}], ids=str)
def test_mse(options, labels, in_double):
    check("MSELoss", columns(2), labels, **options)


CLASSES = torch.tensor([0, 2, 1, 1, 0, 2])
CE = [
    ({}, CLASSES),
    ({}, CLASSES[:, None]),
    ({}, torch.rand(B, 3).softmax(1).double()),
    ({"label_smoothing": 0.1}, CLASSES),
    ({"ignore_index": 1}, CLASSES),
    ({"weight": torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)}, CLASSES),
    ({"reduction": "sum", "activation_fn": nn.Tanh()}, CLASSES),
    ({"reduction": "none"}, CLASSES),
]


@pytest.mark.parametrize("options, labels", CE, ids=[f"{i}" for i in range(len(CE))])
def test_cross_entropy(options, labels):
    check("CrossEntropyLoss", columns(2), labels, model={"labels": 3}, **options)


MARGINS = torch.randn(B, 3, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "count, labels",
    [
        (3, MARGINS[:, 0]),
        (3, MARGINS[:, :1]),
        (3, MARGINS[:, :2]),
        (4, MARGINS[:, :2]),
        (4, MARGINS),
        (4, list(MARGINS)),
    ],
    ids=["margin", "column", "scores", "margins", "more scores", "list"],
)
@pytest.mark.parametrize("options", [{}, {"activation_fn": nn.Sigmoid(), "reduction": "sum"}], ids=str)
def test_margin_mse(count, labels, options, in_double):
    check("MarginMSELoss", columns(count), labels, **options)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    "options",
    [
        *({}, {"num_negatives": None}, {"num_negatives": 100}, {"scale": 3.0, "num_negatives": 2}, {"scale": 0}),
        *({"activation_fn": None}, {"activation_fn": nn.Tanh()}),
    ],
    ids=str,
)
def test_multiple_negatives_ranking(count, options):
    check("MultipleNegativesRankingLoss", columns(count), None, **options)
    check("CachedMultipleNegativesRankingLoss", columns(count), None, mini_batch_size=4, **options)


def test_one_pair_alone():
    check("MultipleNegativesRankingLoss", columns(2, 1), None)
    check("CachedMultipleNegativesRankingLoss", columns(3, 1), None)


def test_a_cached_loss_under_no_grad():
    ours, theirs = (build(library, "CachedMultipleNegativesRankingLoss") for library in (fused, stock))
    with torch.no_grad():
        torch.manual_seed(0)
        own = ours(columns(3), None)
        torch.manual_seed(0)
        wanted = theirs(columns(3), None)
    torch.testing.assert_close(own, wanted)
    assert not own.requires_grad


@pytest.mark.parametrize("name", ["BinaryCrossEntropyLoss", "MSELoss", "MultipleNegativesRankingLoss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_scores(name, dtype):
    labels = None if name.startswith("Multiple") else SHARES
    own = run(build(fused, name, dtype=dtype), columns(2), labels)
    with of_two_dtypes():
        wanted = run(build(stock, name, dtype=dtype), columns(2), labels)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert own[0].dtype == torch.float32 and own[1].dtype == wanted[1].dtype == dtype
    same([x.float() for x in own], [x.float() for x in wanted], tolerance)


@pytest.mark.parametrize("name", ["BinaryCrossEntropyLoss", "MSELoss", "CrossEntropyLoss", "MarginMSELoss"])
def test_scores_that_are_not_finite(name, in_double):
    labels = (SHARES > 0.5).long() if name == "CrossEntropyLoss" else SHARES
    for bad in (math.nan, math.inf, -math.inf):
        model = {"labels": 2 if name == "CrossEntropyLoss" else 1, "scores": [1.0, 2.0, 0.5, 0.1, 0.2, 0.3, 0.7, bad]}
        if name == "BinaryCrossEntropyLoss" and bad == -math.inf:  # torch: inf - inf
            assert run(build(fused, name, **model), columns(2), labels)[0] == math.inf
            assert run(build(stock, name, **model), columns(2), labels)[0].isnan()
        else:
            check(name, columns(3 if name == "MarginMSELoss" else 2), labels, model=model)


# Lists of documents ---------------------------------------------------------------------------------------------------

SCHEMES = ["NoWeightingScheme", "NDCGLoss1Scheme", "NDCGLoss2Scheme", "LambdaRankScheme", "NDCGLoss2PPScheme"]
KINDS = ["grades", "real", "equal", "binary"]
LISTWISE = ["LambdaLoss", "RankNetLoss", "ListNetLoss", "ListMLELoss", "PListMLELoss", "ADRMSELoss"]
SIZES = {
    "padded": (4, 1, 7, 3, 5),
    "with an empty list": LENGTHS,
    "of one length": (4, 4, 4),
    "one": (1,),
    "two": (2, 1),
}


def scheme(name, **options):
    return getattr(stock, name)(**options)


@pytest.mark.parametrize("k", [None, 0, 1, 2, 99])
@pytest.mark.parametrize("name", SCHEMES)
def test_lambda_loss(name, k, in_double):
    for kind in KINDS:
        check("LambdaLoss", lists(), grades(kind=kind), weighting_scheme=scheme(name), k=k)


@pytest.mark.parametrize(
    "options",
    [
        *({"sigma": 2.5}, {"eps": 10.0}, {"reduction_log": "natural"}, {"mini_batch_size": 3}, {"mini_batch_size": -1}),
        *({"weighting_scheme": None}, {"activation_fn": nn.Sigmoid()}, {"activation_fn": None}),
        {"weighting_scheme": stock.NDCGLoss2PPScheme(mu=3.0)},
    ],
    ids=str,
)
def test_lambda_loss_options(options, in_double):
    check("LambdaLoss", lists(), grades(), **options)
    if "weighting_scheme" not in options:
        check("RankNetLoss", lists(), grades(kind="real"), **options)


@pytest.mark.parametrize("name", LISTWISE)
@pytest.mark.parametrize("size", SIZES)
def test_lists_of_all_lengths(name, size, in_double):
    for kind in KINDS:
        check(name, lists(SIZES[size]), grades(SIZES[size], kind))


@pytest.mark.parametrize("name", LISTWISE)
@pytest.mark.parametrize("options", [{"mini_batch_size": 4}, {"mini_batch_size": 0}, {"activation_fn": torch.tanh}])
def test_options_of_all_lists(name, options, in_double):
    check(name, lists(), grades(), **options)


@pytest.mark.parametrize("name", ["ListMLELoss", "PListMLELoss"])
@pytest.mark.parametrize("respect", [True, False])
def test_list_mle_orders(name, respect, in_double):
    check(name, lists(), grades(kind="real"), respect_input_order=respect)
    if name == "PListMLELoss":
        check(name, lists(), grades(kind="real"), respect_input_order=respect, lambda_weight=None)


def test_a_list_too_long_for_powers_of_two(in_double):
    scores = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    inputs = [["0", "1"], [[str(i % 64) for i in range(200)], ["1", "2"]]]
    check("PListMLELoss", inputs, grades((200, 2)), model={"scores": scores[:64]})


def test_single_documents_give_a_constant_as_there(in_double):
    for name in ("ListMLELoss", "PListMLELoss"):
        value, grad = run(build(fused, name), lists((1, 1)), grades((1, 1)))
        assert value == 0 and grad is None


@pytest.mark.parametrize("alpha", [0.3, 1.0, 20.0])
def test_adr_mse(alpha, in_double):
    for kind in KINDS:
        check("ADRMSELoss", lists(), grades(kind=kind), alpha=alpha)


@pytest.mark.parametrize("name", ["LambdaLoss", "RankNetLoss", "ADRMSELoss"])
def test_no_square_of_a_list_is_kept(name, monkeypatch):
    monkeypatch.setitem(FEW, "lists", 0)  # few scores run as formulas, which keep what they like
    n, saved = 60, []
    loss = build(fused, name, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        loss(lists((n,)), grades((n,)))
    assert sum(saved) < 12 * n < n * n


@pytest.mark.parametrize("name", LISTWISE)
def test_lists_in_float32(name):
    check(name, lists(SIZES["padded"]), grades(SIZES["padded"]), 1e-5, model={"dtype": torch.float32})


@pytest.mark.parametrize("name", LISTWISE)
def test_lists_in_half(name):
    """The library's matrix is float32 whatever the model's dtype; the gradient returns in it."""
    check(name, lists(SIZES["padded"]), grades(SIZES["padded"]), 1e-2, model={"dtype": torch.bfloat16})


@pytest.mark.parametrize("name", LISTWISE)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e12])
def test_scores_that_are_no_numbers_are_the_librarys(name, bad, in_double):
    model = {"scores": [1.0, bad, 0.5, -1.0, 2.0, bad]}
    check(name, lists(), grades(), model=model, runs_fused=name == "ListNetLoss")


@pytest.mark.parametrize("name", LISTWISE)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1000.0])
def test_labels_that_are_no_numbers_are_the_librarys(name, bad, in_double):
    labels = [x.double() for x in grades()]
    labels[0][1] = labels[2][2] = bad
    fits = name == "ListNetLoss" or (bad == 1000 and name not in ("LambdaLoss", "RankNetLoss"))
    check(name, lists(), labels, runs_fused=fits)


# What runs the library's code -----------------------------------------------------------------------------------------


class Custom(stock.NDCGLoss1Scheme):
    def forward(self, gain, discount, true_sorted):
        return (gain + 1)[:, :, None].sqrt()


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


def halves(mask):
    return 0.5 ** mask.cumsum(1) * mask


FALLBACKS = [
    ("LambdaLoss", {"weighting_scheme": Custom()}, "its weighting_scheme is not one of the library's"),
    ("LambdaLoss", {"weighting_scheme": hooked(scheme("LambdaRankScheme"))}, "its weighting_scheme is not one"),
    ("LambdaLoss", {"weighting_scheme": scheme("NDCGLoss2PPScheme", mu=torch.tensor(3.0))}, "mu must be a number"),
    ("LambdaLoss", {"k": -1}, "its k is not a number of documents"),
    ("LambdaLoss", {"sigma": -1.0}, "sigma is not positive"),
    ("ADRMSELoss", {"alpha": 0.0}, "alpha is not positive"),
    ("PListMLELoss", {"lambda_weight": stock.PListMLELambdaWeight(halves)}, "its lambda_weight is not the library's"),
]


@pytest.mark.parametrize("name, options, reason", FALLBACKS, ids=[f"{n}-{r}" for n, _, r in FALLBACKS])
def test_options_of_ones_own(name, options, reason, in_double, caplog):
    from fusedloss.integrations import _drop_in

    _drop_in._warned.clear()
    with caplog.at_level(logging.WARNING, logger="fusedloss"):
        for _ in range(2):
            check(name, lists(SIZES["padded"]), grades(SIZES["padded"]), runs_fused=False, **options)
    (record,) = caplog.records
    expected = f"sentence_transformers.cross_encoder.{name} runs the library's own code, because {reason}"
    assert record.getMessage().startswith(expected)


def test_a_hook_of_adr_mse_that_is_overridden():
    class ADRMSELoss(fused.ADRMSELoss):
        def approximate_ranks(self, scores, mask):
            return scores * 0 + 1.0

    before = counted("ADRMSELoss")
    loss = ADRMSELoss(Reranker(dtype=torch.float32))
    assert loss(lists(), grades()).item() > 0 and counted("ADRMSELoss") == before


@pytest.mark.parametrize(
    "name, attribute, criterion",
    [
        ("BinaryCrossEntropyLoss", "bce_with_logits_loss", nn.MSELoss()),
        ("MSELoss", "loss_fct", nn.L1Loss()),
        ("MarginMSELoss", "loss_fct", hooked(nn.MSELoss())),
        ("MultipleNegativesRankingLoss", "cross_entropy_loss", nn.MultiMarginLoss()),
        ("CachedMultipleNegativesRankingLoss", "cross_entropy_loss", nn.MultiMarginLoss()),
    ],
)
def test_a_criterion_of_ones_own(name, attribute, criterion):
    ours, theirs = (build(library, name, dtype=torch.float32) for library in (fused, stock))
    before = counted(name)
    results = []
    for loss in (ours, theirs):
        setattr(loss, attribute, copy.deepcopy(criterion))
        labels = None if "Negatives" in name else SHARES
        results.append(run(loss, columns(3 if name == "MarginMSELoss" else 2), labels))
    same(*results)
    assert counted(name) == before


@pytest.mark.parametrize("name", LISTWISE)
def test_an_activation_of_another_dtype_fails_as_there(name):
    errors = []
    for library in (stock, fused):
        with pytest.raises(RuntimeError) as error:
            build(library, name, activation_fn=torch.Tensor.double)(lists(), grades())
        errors.append(str(error.value))
    if name != "ListNetLoss":
        assert errors[0] == errors[1]


def test_labels_that_do_not_fit_fail_as_there():
    given = [
        ("BinaryCrossEntropyLoss", columns(2), SHARES[:3]),
        ("BinaryCrossEntropyLoss", columns(3), SHARES),
        ("MSELoss", columns(2), SHARES[:3]),
        ("MarginMSELoss", columns(3), MARGINS),
        ("CrossEntropyLoss", columns(2), CLASSES.int()),
        ("CrossEntropyLoss", columns(2), CLASSES + 7),
        *((name, lists(), torch.zeros(6, 2)) for name in LISTWISE),
        *((name, lists(), grades((1, 2))) for name in LISTWISE),
        *((name, lists((2, 2)), [x[:, None] for x in grades((2, 2))]) for name in LISTWISE),
        *((name, lists((2, 2)) * 2, grades((2, 2))) for name in LISTWISE),
        *((name, lists(()), []) for name in LISTWISE),
        *((name, lists((0, 0)), grades((0, 0))) for name in LISTWISE),
    ]
    for name, inputs, labels in given:
        errors = []
        for library in (stock, fused):
            loss = build(library, name, labels=3 if name == "CrossEntropyLoss" else 1, dtype=torch.float32)
            with pytest.raises((ValueError, RuntimeError, IndexError)) as error:
                loss(inputs, labels)
            errors.append((type(error.value), str(error.value)))
            assert not {"activation_fn", "loss_fct", "cross_entropy_loss", "ce_loss"} & set(vars(loss))
        assert errors[0] == errors[1]


def test_a_type_error_does_not_reach_the_trainer(monkeypatch):
    def broken(*args, **kwargs):
        raise TypeError("a slip of ours")

    for function in ("mse", "adr_mse"):
        monkeypatch.setattr(fusedloss, function, broken)
    for name, inputs, labels in (("MSELoss", columns(2), SHARES), ("ADRMSELoss", lists(), grades())):
        with pytest.raises(RuntimeError, match="a slip of ours"):
            build(fused, name, dtype=torch.float32)(inputs, labels, prompt=None, task=None)


def test_subclasses_keep_their_state():
    class Seen(fused.MarginMSELoss):
        seen = 0

        def logits_from_pairs(self, *args, **kwargs):
            self.seen += 1
            return super().logits_from_pairs(*args, **kwargs)

    loss = Seen(Reranker(dtype=torch.float32))
    loss(columns(4), MARGINS)
    assert loss.seen == 3


# The classes ----------------------------------------------------------------------------------------------------------


def test_there_is_one_for_every_loss_of_the_library():
    mapping = package.drop_ins(fused)
    losses = [getattr(stock, name) for name in stock.__all__ if name.endswith("Loss")]
    assert set(mapping) == set(losses) and len(losses) == 12
    for theirs, own in mapping.items():
        assert issubclass(own, theirs) and own.__name__ == theirs.__name__
        assert inspect.signature(own) == inspect.signature(theirs)
        for other, twin in mapping.items():
            assert issubclass(theirs, other) == issubclass(own, twin)
    for name in stock.__all__:
        assert name.endswith("Loss") or getattr(fused, name) is getattr(stock, name)


@pytest.mark.parametrize("name", [name for name in stock.__all__ if name.endswith("Loss")])
def test_card_and_parameters_are_the_librarys(name):
    ours, theirs = (build(library, name) for library in (fused, stock))
    assert getattr(ours, "citation", None) == getattr(theirs, "citation", None)
    assert not hasattr(ours, "loss")  # a card would follow it
    if hasattr(theirs, "get_config_dict"):
        assert ours.get_config_dict() == theirs.get_config_dict()
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]


def test_prompts_reach_the_model():
    for name, inputs, labels in (("MSELoss", columns(2), SHARES), ("LambdaLoss", lists(), grades())):
        loss = build(fused, name, dtype=torch.float32)
        loss(inputs, labels, prompt="query: ", task="rerank")
        assert {call[1:] for call in loss.model.calls} == {("query: ", "rerank")}


@pytest.mark.parametrize("whole", [False, True])
def test_patch(whole):
    original = stock.LambdaLoss
    with (package if whole else fused).patch():
        assert stock.LambdaLoss is fused.LambdaLoss and stock.RankNetLoss is fused.RankNetLoss
        loss = stock.LambdaLoss(Reranker(dtype=torch.float32))
        assert type(loss).__module__ == original.__module__
        before = counted("LambdaLoss")
        loss(lists(), grades())
        assert counted("LambdaLoss") == before + 1
    assert stock.LambdaLoss is original and fused.LambdaLoss.__module__ == fused.__name__


def test_the_environment_turns_it_off(monkeypatch, in_double, caplog):
    monkeypatch.setenv("FUSEDLOSS_DISABLE", "1")
    for name in LISTWISE:
        check(name, lists(), grades(), runs_fused=False)
    check("MSELoss", columns(2), SHARES, runs_fused=False)
    assert not caplog.records


# Labels of any layout -------------------------------------------------------------------------------------------------

GIVEN = {
    "BinaryCrossEntropyLoss": ({}, columns(2), SHARES),
    "MSELoss": ({}, columns(2), SHARES),
    "CrossEntropyLoss": ({"labels": 3}, columns(2), CLASSES),
    "MarginMSELoss": ({}, columns(4), MARGINS),
    **{name: ({}, lists(), grades()) for name in LISTWISE},
}


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("name", GIVEN)
def test_labels_of_any_stride(name, backend, monkeypatch):
    """Bit by bit what contiguous ones give: kernels read addresses."""
    monkeypatch.setenv("FUSEDLOSS_BACKEND", backend)
    model, inputs, labels = GIVEN[name]
    of = lambda layout: [layout(x) for x in labels] if isinstance(labels, list) else layout(labels)
    strided = lambda x: torch.stack([x, x.flip(0)], dim=-1)[..., 0]
    expanded = lambda x: x.clone()[:1].expand(x.shape) if len(x) else x
    before = counted(name)
    for given, copied in ((strided, torch.clone), (expanded, lambda x: expanded(x).contiguous())):
        found = [
            run(build(fused, name, dtype=torch.float32, **model), inputs, of(layout)) for layout in (given, copied)
        ]
        same(*found, tolerance=0)
    assert counted(name) == before + 4
