"""group=: what one rank refuses, or asks differently, is raised on all ranks at once, and they stay in step.

Cases run in the same two gloo processes, and each computes a loss after it: what a rank waited for in vain would be a
RuntimeError of gloo, and what it left half done would meet that loss.
"""

from __future__ import annotations

import importlib
import pickle

import pytest
import torch
import torch.distributed as dist
from patience import delta
from ranks import COLLECTIVE, Ranks, on_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedloss
from fusedloss import distributed, masks
from fusedloss.backends import reference
from fusedloss.core.problem import Block, Margin, Problem
from fusedloss.distributed import agreement

pytestmark = pytest.mark.processes

if torch.cuda.is_available():
    pytest.skip("processes are forked here, which CUDA does not survive", allow_module_level=True)
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)


def rows(count=3, d=4, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(count, d, generator=made, dtype=torch.float64).requires_grad_()


def two():
    return rows(), rows(seed=1)


LABELS = torch.tensor([0, 1, 0])
GUIDE = (torch.ones(3, 2), torch.ones(3, 2))
RIGHT = {
    "info_nce": lambda **k: fusedloss.info_nce(*two(), group="world", **k),
    "clip": lambda **k: fusedloss.clip(*two(), **{"logit_scale": 2.0} | k, group="world"),
    "siglip": lambda **k: fusedloss.siglip(*two(), **{"logit_scale": 2.0} | k, group="world"),
    "ranking": lambda **k: fusedloss.multiple_negatives_ranking(*two(), group="world", **k),
    "gist_embed": lambda **k: fusedloss.gist_embed(*two(), **{"guide": GUIDE} | k, group="world"),
    "nt_xent": lambda **k: fusedloss.nt_xent(*two(), group="world", **k),
    "sup_con": lambda **k: fusedloss.sup_con(rows(), **{"labels": LABELS} | k, group="world"),
    "info_nce, target": lambda **k: fusedloss.info_nce(*two(), **{"target": LABELS} | k, group="world"),
    "ring": lambda **k: fusedloss.info_nce(*two(), group="world", strategy="ring", **k),
    "12 rows": lambda **k: fusedloss.info_nce(rows(12), rows(12, seed=1), group="world", **k),
    "InfoNCELoss": lambda **k: fusedloss.InfoNCELoss(group="world")(*two(), **k),
    "matryoshka": lambda **k: fusedloss.matryoshka(fusedloss.info_nce, *two(), **{"dims": (4, 2)} | k, group="world"),
    "matryoshka of siglip": lambda **k: fusedloss.matryoshka(
        fusedloss.siglip, *two(), **{"dims": (4, 2)} | k, logit_scale=2.0, group="world"
    ),
    "adaptive_layer": lambda **k: fusedloss.adaptive_layer(
        fusedloss.InfoNCELoss(group="world"), [rows(), rows(), rows()], [rows(seed=1)] * 3, **k
    ),
    "clip's scale": lambda scale: fusedloss.clip(*two(), scale, group="world"),
    "siglip's bias": lambda bias: fusedloss.siglip(*two(), 2.0, bias, group="world"),
}
BOOL = torch.ones(3, 3, dtype=torch.bool)
# What rank 1 asks and rank 0 does not; what rank 1 raises; a part of what both say.
REFUSED = {
    **{
        f"{name}, {option}": (name, {option: value}, ValueError, f"{option} must not be given together with group")
        for name in ("info_nce", "clip", "ranking", "gist_embed", "nt_xent")
        for option, value in (("label_smoothing", 0.1), ("return_stats", True))
        if option == "return_stats" or name == "info_nce"
    },
    "negatives": (
        "info_nce, target",
        {"negatives": torch.ones(3, 2, 4)},
        ValueError,
        "target must be None with negatives and group",
    ),
    "a bool mask": ("info_nce", {"mask": BOOL}, ValueError, "a bool mask must not be given together with group"),
    "clip's bool mask": ("clip", {"mask": BOOL}, ValueError, "a bool mask must not be given together with group"),
    "a mask of another shape": (
        "info_nce",
        {"mask": BOOL[:2]},
        ValueError,
        "mask must be bool [3, 3], got shape [2, 3]",
    ),
    "a mask that is none": (
        "ranking",
        {"mask": "ids"},
        TypeError,
        "mask must be one of fusedloss.masks or a bool tensor, got 'ids', a str",
    ),
    "ids of another length": (
        "info_nce",
        {"mask": masks.same_id(LABELS[:2], LABELS)},
        ValueError,
        "same_id's row_ids must be int64 [3], got shape [2]",
    ),
    "temperature": ("info_nce", {"temperature": -1.0}, ValueError, "temperature must be a positive number, got -1.0"),
    "temperature, nt_xent": (
        "nt_xent",
        {"temperature": 0.0},
        ValueError,
        "temperature must be a positive number, got 0.0",
    ),
    "temperature, a word": ("sup_con", {"temperature": "cold"}, TypeError, "got 'cold', a str"),
    "scale": ("ranking", {"scale": float("nan")}, ValueError, "scale must be a positive number, got nan"),
    "logit_scale": (
        "clip",
        {"logit_scale": torch.ones(2)},
        ValueError,
        "logit_scale must have one element, shape [] or [1], got shape [2]",
    ),
    "logit_bias": ("siglip", {"logit_bias": float("inf")}, ValueError, "logit_bias must be a finite number, got inf"),
    "weight": (
        "info_nce",
        {"weight": torch.ones(2)},
        ValueError,
        "weight must have shape [3], one number per query, got [2]",
    ),
    "key_bias": (
        "info_nce",
        {"key_bias": LABELS},
        TypeError,
        "key_bias must be a floating tensor [3], got torch.int64",
    ),
    "target's dtype": (
        "info_nce, target",
        {"target": LABELS.int()},
        TypeError,
        "target must be an int64 tensor [3] of column indices, got torch.int32 [3]",
    ),
    "target's shape": (
        "info_nce, target",
        {"target": LABELS[:2]},
        ValueError,
        "target must have shape [3], one index per row, got [2]",
    ),
    "target": ("info_nce, target", {"target": torch.tensor([0, 6, 5])}, IndexError, "must be an index"),
    "target below 0": ("info_nce, target", {"target": torch.tensor([0, -7, 5])}, IndexError, "must be an index"),
    "ignore_index": (
        "info_nce, target",
        {"ignore_index": 0.5},
        TypeError,
        "ignore_index must be a whole number, got 0.5",
    ),
    "siglip's target": (
        "siglip",
        {"target": LABELS},
        ValueError,
        "target must be None or masks.same_id if group is given",
    ),
    "directions": ("ranking", {"directions": None}, TypeError, "directions must be a sequence of names, such as ("),
    "directions, a word": (
        "ranking",
        {"directions": ("there",)},
        ValueError,
        "directions must be a sequence of 'query",
    ),
    "similarity": ("ranking", {"similarity": "l2"}, ValueError, "similarity must be one of 'cos', 'dot', got 'l2'"),
    "hardness": ("ranking", {"hardness_mode": "soft"}, ValueError, "hardness_mode must be one of"),
    "anchors": ("ranking", {"anchors": rows(6)}, ValueError, "anchors must be None with group="),
    "guide": (
        "gist_embed",
        {"guide": GUIDE[:1]},
        ValueError,
        "guide must hold 2 tensors, one for each of anchor, positive, got 1",
    ),
    "guide's margin": ("gist_embed", {"margin": "wide"}, TypeError, "margin must be a number, got 'wide', a str"),
    "labels": ("sup_con", {"labels": LABELS[:2]}, ValueError, "labels must be int64 [3], got shape [2]"),
    "form": ("sup_con", {"form": "around"}, ValueError, "form must be one of 'out', 'in', got 'around'"),
    "reduction": (
        "siglip",
        {"reduction": "median"},
        ValueError,
        "reduction must be one of 'mean', 'sum', 'none', got 'median'",
    ),
    "backend": ("nt_xent", {"backend": "numpy"}, ValueError, "backend must be one of 'auto', "),
    "reference both ways": ("clip", {"backend": "reference"}, fusedloss.UnsupportedError, "backend='reference' cannot"),
    "reference in a ring": (
        "ring",
        {"backend": "reference"},
        fusedloss.UnsupportedError,
        "strategy must be 'gather' with backend='reference'",
    ),
    "workspace_bytes": (
        "gist_embed",
        {"workspace_bytes": 0},
        ValueError,
        "workspace_bytes must be at least 1 or None, got 0",
    ),
    # Enough for a row of this rank's columns, too little for one of all ranks'.
    "a small workspace": ("12 rows", {"workspace_bytes": 130}, ValueError, "workspace_bytes must be at least 256"),
    "a smaller one in a ring": ("ring", {"workspace_bytes": 100}, ValueError, "workspace_bytes must be at least 1"),
    "dims": ("matryoshka", {"dims": (4, 5)}, ValueError, "dims must be numbers from 1 to D = 4, got 5"),
    "weights of dims": ("matryoshka", {"weights": (1.0,)}, ValueError, "weights must hold 2 numbers, one for each"),
    "a prefix's option": ("matryoshka", {"temperature": -1.0}, ValueError, "temperature must be a positive number"),
    "a small workspace for prefixes": (
        "matryoshka",
        {"workspace_bytes": 50},
        ValueError,
        "workspace_bytes must be at least 96, the bytes of one row of 12 similarities",
    ),
    "dims of another loss": ("matryoshka of siglip", {"dims": ()}, ValueError, "dims must hold at least one number"),
    "layers": ("adaptive_layer", {"layer_indices": [2]}, IndexError, "layer_indices must be from 0 to 1, before the"),
    "module": (
        "InfoNCELoss",
        {"temperature": 0.1},
        TypeError,
        "forward got an unexpected argument 'temperature'; pass",
    ),
    "module's target": (
        "InfoNCELoss",
        {"target": LABELS[:2]},
        ValueError,
        "target must have shape [3], one index per row, got [2]",
    ),
}
# What rank 0 and rank 1 ask; a part of what both say.
DIFFERENT = {
    "temperatures": (
        "info_nce",
        {"temperature": torch.tensor(0.5)},
        {"temperature": torch.tensor(0.25)},
        "2 on rank 0",
    ),
    "scales": (
        "clip's scale",
        {"scale": torch.tensor([2.0])},
        {"scale": torch.tensor([2.001])},
        "2.00099993 on rank 1",
    ),
    "biases": ("siglip's bias", {"bias": torch.tensor(-1.0)}, {"bias": torch.tensor(1.0)}, "-1 on rank 0, 1 on rank 1"),
    "what is ignored": (
        "info_nce, target",
        {"ignore_index": 1},
        {"ignore_index": 2},
        "rank 0: ignore_index 1; rank 1: ignore_index 2",
    ),
    "gist_embed's margin": ("gist_embed", {"margin": 0.1}, {"margin": 0.2}, "guide's margin 0.1 absolute"),
    "contrast_anchors": ("gist_embed", {}, {"contrast_anchors": False}, "rank 1: gist_embed absolute False True"),
    "not_self": (
        "info_nce",
        {"mask": masks.not_self(1)},
        {"mask": masks.not_self(-1)},
        "block 0 leaves out column i + 1; rank 1: block 0 leaves out column i + -1",
    ),
    "a bank": ("info_nce", {}, {"bank": rows(2)}, "rank 0: 2 matrices; rank 1: 3 matrices"),
    "whose bank": (
        "info_nce",
        {"bank": rows(2)},
        {"bank": rows(2), "bank_across": True},
        "rank 0: bank of the rank; rank 1: bank of all ranks",
    ),
    "own negatives": ("info_nce", {}, {"negatives": rows(3)[:, None]}, "rank 1: negatives of each row"),
    "other dims": (
        "matryoshka",
        {},
        {"dims": (4,)},
        "rank 0: prefixes (4, 2) by (1.0, 1.0); rank 1: prefixes (4,) by (1.0,)",
    ),
    "other dims of another loss": (
        "matryoshka of siglip",
        {},
        {"dims": (4,)},
        "rank 0: dims (4, 2), weights (1.0, 1.0); rank 1: dims (4,), weights (1.0,)",
    ),
    "other layers": (
        "adaptive_layer",
        {"layer_indices": [0]},
        {"layer_indices": [1]},
        "rank 0: layers (0,) of 3; rank 1: layers (1,) of 3",
    ),
    "strategy": ("ring", {}, None, "rank 0: strategy ring; rank 1: strategy gather"),
}


def differently(name, rank):
    loss, one, other, _ = DIFFERENT[name]
    if other is None:
        return RIGHT["info_nce" if rank else loss]()
    return RIGHT[loss](**(other if rank else one))


def on_a_rank(rank):
    """What a case by its name gives or raises there."""
    jobs = {name: lambda n=name: RIGHT[REFUSED[n][0]](**(REFUSED[n][1] if rank else {})) for name in REFUSED}
    jobs |= {name: lambda n=name: differently(n, rank) for name in DIFFERENT}
    # Harmless: a rank's own weights, workspace and backend; and parameters that differ by less than a rounding.
    jobs["weights"] = lambda: RIGHT["info_nce"](**({"weight": torch.tensor([2.0, 0.5, 0.0])} if rank else {}))
    jobs["a workspace"] = lambda: RIGHT["info_nce"](**({"workspace_bytes": 1 << 20} if rank else {}))
    jobs["another backend"] = lambda: RIGHT["info_nce"](**({"backend": "reference"} if rank else {}))
    jobs["a rounding"] = lambda: RIGHT["info_nce"](
        temperature=torch.tensor(0.5, dtype=torch.float64) * (1 + rank * 1e-9)
    )
    jobs["right"] = lambda: RIGHT["info_nce"]()
    right = []

    def run(name):
        if not right:
            right.append(jobs["right"]().item())
        try:
            found = jobs[name]().item()
        except Exception as error:
            if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
                raise  # of gloo: the ranks are out of step
            found = error
        assert jobs["right"]().item() == right[0], "after it the ranks are out of step"
        return found

    return run


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(2, on_a_rank)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_rank_refuses_all_ranks_raise(ranks, name):
    other, own = ranks(name)
    _, _, kind, told = REFUSED[name]
    assert type(own) is kind and told in str(own), repr(own)
    assert type(other) is ValueError and "rank 1 of group refuses: " in str(other), repr(other)
    if kind is not IndexError:  # whose other rank knows the value, not the row
        assert str(own) in str(other)


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_ranks_ask_differently_all_ranks_raise(ranks, name):
    first, second = ranks(name)
    assert type(first) is type(second) is ValueError and str(first) == str(second), (first, second)
    assert DIFFERENT[name][3] in str(first), str(first)


def test_a_target_outside_is_named_with_its_value(ranks):
    other, own = ranks("target")
    assert "target[1] must be an index from 0 to 5, or -100 to leave the row out, got 6" in str(own)
    assert "rank 1 of group refuses: target must hold indices from 0 to 5, over the columns of all ranks, got 6" in str(
        other
    )


def whole(**options):
    x, y = (torch.cat([t, t]) for t in two())
    return fusedloss.info_nce(x, y, **options).item()


@pytest.mark.parametrize(
    "name, options",
    [
        ("right", {}),
        ("weights", {"weight": torch.tensor([1.0, 1.0, 1.0, 2.0, 0.5, 0.0])}),
        ("a workspace", {}),
        ("another backend", {}),
        ("a rounding", {"temperature": 0.5}),
    ],
)
def test_what_ranks_may_ask_differently(ranks, name, options):
    """And, after all of the refusals, the ranks are still in step."""
    for found in ranks(name):
        assert found == pytest.approx(whole(**options), rel=1e-6)


class Travels(TorchDispatchMode):
    """Counts what this rank hands to collectives, and notes the dtypes of all tensors."""

    def __init__(self):
        super().__init__()
        self.dtypes, self.calls = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.calls += 1
            self.dtypes |= {x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        return function(*args, **(kwargs or {}))


def with_gathered_anchors(rank, strategy, gathered):
    """Returns the error of rank `rank`, or None, and the dtypes that travelled."""
    options = {"anchors": rows(6)} if gathered else {}
    with Travels() as travels:
        try:
            RIGHT["ranking"](strategy=strategy, **options)
        except Exception as raised:
            return raised, travels.dtypes
    return None, travels.dtypes


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_gathered_anchors_are_refused_before_embeddings_travel(strategy):
    for error, travelled in on_ranks(2, with_gathered_anchors, strategy, True):
        assert type(error) is ValueError and "anchors must be None with group=, which gathers them" in str(error)
        assert travelled == {torch.int64}  # that there is an error
    for error, travelled in on_ranks(2, with_gathered_anchors, strategy, False):
        assert error is None and torch.float64 in travelled


def exchanges(rank, loss, strategy):
    with Travels() as travels:
        RIGHT[loss](strategy=strategy).backward()
    return travels.calls


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_all_prefixes_have_one_exchange(strategy):
    assert on_ranks(2, exchanges, "matryoshka", strategy) == on_ranks(2, exchanges, "info_nce", strategy)


# group="world" --------------------------------------------------------------------------------------------------------


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", RIGHT)
def test_world_before_init_process_group(name):
    argument = {"clip's scale": {"scale": 2.0}, "siglip's bias": {"bias": 0.0}}.get(name, {})
    with pytest.raises(ValueError, match=r"group must be None before init_process_group, got 'world'"):
        RIGHT[name](**argument)


@pytest.mark.parametrize("name", ["info_nce", "siglip", "sup_con"])
def test_world_is_the_default_group(name, group_of_one):
    alone = {
        "info_nce": lambda: fusedloss.info_nce(*two()),
        "siglip": lambda: fusedloss.siglip(*two(), 2.0),
        "sup_con": lambda: fusedloss.sup_con(rows(), LABELS),
    }
    assert RIGHT[name]().item() == pytest.approx(alone[name]().item(), rel=1e-12)


RULES = {
    "decoupled": {"decoupled": True},
    "copies": {"copies": 2},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 5.0},
    "margin": {"margin": Margin(0.3, 0.1), "cosine": True},
    "margin and softcap": {"margin": Margin(0.3, 0.1), "cosine": True, "softcap": 5.0},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_ring_follows_the_whole_rule_of_its_rows(rule, reduction, group_of_one):
    """Also what no loss with `group=` takes today."""
    around = distributed.world_of("world", "ring", "sum")

    def step(run):
        x, y = two()
        scale, weight = torch.tensor(4.0, dtype=x.dtype), torch.linspace(0.5, 1, 3, dtype=x.dtype)
        run(Problem((x, y), (Block(0, 1),), scale, torch.arange(3), weight, **RULES[rule])).sum().backward()
        return x.grad, y.grad

    found = step(lambda p: distributed.loss_across(around, lambda: distributed.Request("", (p,), "chunked", reduction)))
    wanted = step(lambda p: reference.loss_rows(p)[0])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_another_word():
    with pytest.raises(ValueError, match=r"group must be 'world' for all ranks, or a ProcessGroup, got 'all'"):
        fusedloss.info_nce(*two(), group="all")
    with pytest.raises(ValueError, match=r"group must be 'world' .*, got 'all'"):
        fusedloss.NTXentLoss(group="all")


def test_a_module_of_the_world_can_be_pickled(group_of_one):
    loss = pickle.loads(pickle.dumps(fusedloss.ClipLoss(group="world")))
    assert loss(*two(), 2.0).item() == pytest.approx(fusedloss.clip(*two(), 2.0).item(), rel=1e-12)


# Nothing is read back -------------------------------------------------------------------------------------------------


def without_values(rank, store):
    """Embeddings without values, whose group has gloo for the CPU beside its own backend: reading one back raises."""
    dist.destroy_process_group()  # for another
    options = {"init_method": f"file://{store}", "rank": rank, "world_size": 2, "timeout": delta(COLLECTIVE)}
    importlib.import_module("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("cpu:gloo,meta:fake", **options)
    outcome = {}
    with torch.device("meta"):
        n, ids = 3 + rank, torch.arange(3 + rank)
        scale = torch.ones((), requires_grad=True)
        losses = {
            "info_nce": lambda x, y: fusedloss.info_nce(x, y, ids, temperature=scale, group="world"),
            "clip": lambda x, y: fusedloss.clip(x, y, scale, mask=masks.same_id(ids, ids), group="world"),
            "siglip": lambda x, y: fusedloss.siglip(x, y, scale, scale, group="world"),
            "ranking": lambda x, y: fusedloss.multiple_negatives_ranking(x, y, scale=scale, group="world"),
            "gist_embed": lambda x, y: fusedloss.gist_embed(x, y, guide=(x, y), group="world"),
            "nt_xent": lambda x, y: fusedloss.nt_xent(x, y, group="world"),
            "sup_con": lambda x, y: fusedloss.sup_con(x + y, ids, group="world"),
        }
        for name, loss in losses.items():
            x, y = (torch.ones(n, 4, requires_grad=True) for _ in range(2))
            try:
                loss(x, y).backward()
                outcome[name] = list(x.grad.shape)
            except Exception as error:
                outcome[name] = error
    sizes = agreement._meeting(distributed.world_of("world", "gather", "ddp"), torch.ones(1, device="meta"))
    outcome["where"] = str(sizes)
    return outcome


def test_beside_a_cpu_backend_nothing_is_read_from_the_device(tmp_path):
    for rank, found in enumerate(on_ranks(2, without_values, str(tmp_path / "store"))):
        assert found.pop("where") == "cpu"
        if any(isinstance(value, NotImplementedError) for value in found.values()):
            pytest.skip(f"torch {torch.__version__} has no collectives of meta tensors")
        assert found == {name: [3 + rank, 4] for name in found} and len(found) == 7


def test_without_a_cpu_backend_numbers_meet_on_the_device():
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # collectives that do nothing
    dist.init_process_group("meta:fake", store=dist.HashStore(), rank=0, world_size=2)
    try:
        around = distributed.world_of("world", "gather", "ddp")
        assert agreement._meeting(around, torch.ones(1, device="meta")).type == "meta"
    finally:
        dist.destroy_process_group()
