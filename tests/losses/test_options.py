"""The options that losses share: what is shown of them, and the record that is handed down."""

import dataclasses
import inspect
import re
from typing import Unpack, get_args, get_origin, get_type_hints

import contract
import pytest
import torch

import fusedloss
from fusedloss import functional
from fusedloss.core import checks
from fusedloss.losses._options import TEXTS, AcrossOptions, Call, SweepOptions, WorkspaceOptions

FIELDS = {field.name: field.default for field in dataclasses.fields(Call)}
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 0, 1, 1])


def shared(name):
    """The options that a loss unpacks, in the order in which its signature must show them, behind its own."""
    hints = get_type_hints(inspect.unwrap(getattr(functional, name))).values()
    unpacked = {option for hint in hints if get_origin(hint) is Unpack for option in get_args(hint)[0].__annotations__}
    return [option for option in FIELDS if option in unpacked]


SHARED = {name: shared(name) for name in functional.__all__ if shared(name)}
TAKES = {name: inspect.signature(getattr(functional, name)).parameters for name in functional.__all__}


@pytest.mark.parametrize("name", SHARED)
def test_a_signature_shows_each_option_and_its_default(name):
    parameters = list(inspect.signature(getattr(functional, name)).parameters.values())
    shown = parameters[-len(SHARED[name]) :]
    assert [p.name for p in shown] == SHARED[name]
    assert all(p.kind is p.KEYWORD_ONLY and p.default == FIELDS[p.name] for p in shown)
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters)


@pytest.mark.parametrize("name", SHARED)
def test_help_has_a_line_for_each_option(name):
    doc = inspect.getdoc(getattr(functional, name))
    if "\nArgs:\n" not in doc:  # they are another loss's, which it names
        assert re.search(r"[Pp]arameters.* `\w+`'s|`\w+`.* whose (other )?parameters", doc, re.DOTALL)
        return
    lines = doc.partition("\nArgs:\n")[2].partition("\n\n")[0]
    told = re.findall(r"^ {4}(\w+): ", lines, re.MULTILINE)
    assert set(SHARED[name]) <= set(told) and len(told) == len(set(told))
    (named,) = re.findall(r"^ {4}backend: (.*)", lines, re.MULTILINE)
    swept = "workspace_bytes" in told
    backends = ["auto", *(name for name in checks.BACKENDS if swept or name not in ("cuda", "dense"))]
    assert re.findall(r'"(\w+)"', named.partition(";")[0]) == backends
    assert all(len(line) <= 116 for line in doc.splitlines())


@pytest.mark.parametrize("name", sorted(functional.__all__))
def test_no_place_is_left_open_in_help(name):
    doc = inspect.getdoc(getattr(functional, name))
    assert not re.search(r"\{(backends|rows)\}", doc) and doc == inspect.cleandoc(doc)
    for text in re.findall(r'"auto", .*?"reference"', doc):
        without = [name for name in checks.BACKENDS if name not in ("cuda", "dense")]
        assert re.findall(r'"(\w+)"', text) in (["auto", *checks.BACKENDS], ["auto", *without])


@pytest.mark.parametrize("name", sorted(name for name in functional.__all__ if "backend" in TAKES[name]))
def test_a_backend_is_auto_and_stands_behind_the_loss_s_own(name):
    """Where a signature repeats torch's, alone."""
    assert TAKES[name]["backend"].default == FIELDS["backend"]
    assert "backend" in list(TAKES[name])[-len(SHARED.get(name, ["backend"])) :]


def test_every_option_is_documented_and_taken():
    assert set(TEXTS) == set(FIELDS) == {option for options in SHARED.values() for option in options}


@pytest.mark.parametrize("kind", [WorkspaceOptions, SweepOptions, AcrossOptions])
def test_no_option_is_required(kind):
    assert kind.__optional_keys__ == frozenset(kind.__annotations__) <= set(FIELDS)


@pytest.mark.parametrize("name", SHARED)
def test_an_unknown_name_is_told_what_there_is(name):
    with pytest.raises(
        TypeError, match=rf"^{name} got an unexpected argument 'workspace'; it takes \(.*backend='auto'"
    ):
        getattr(functional, name)(X, workspace=1)


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none'.*, got 'avg'"),
        ({"reduction": X}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got a Tensor"),
        ({"backend": "cudnn"}, ValueError, "backend must be one of 'auto', 'cuda', .*, got 'cudnn'"),
        ({"backend": None}, ValueError, "backend must be one of 'auto', .*, got None"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be at least 1 or None, got 0"),
        ({"workspace_bytes": 1.5}, TypeError, "workspace_bytes must be a whole number or None, got 1.5, a float"),
        ({"workspace_bytes": True}, TypeError, "workspace_bytes must be a whole number or None, got True, a bool"),
    ],
)
def test_what_does_not_fit_is_named(options, error, match):
    with pytest.raises(error, match=match):
        Call(**options)
    with pytest.raises(error, match=match):
        fusedloss.nt_xent(X, X, **options)
    with pytest.raises(error, match=match):
        fusedloss.arcface(X, LABELS, X, **options)


def test_a_string_that_is_made_is_the_same_as_one_that_is_written():
    """Checks are skipped for what is a default by identity."""
    made = {"reduction": "".join(["me", "an"]), "backend": "".join(["au", "to"])}
    assert Call(**made) == Call()
    assert torch.equal(fusedloss.nt_xent(X, X, **made), fusedloss.nt_xent(X, X))


@pytest.mark.parametrize("options", [{"strategy": "ring"}, {"grad_scale": "sum"}])
@pytest.mark.parametrize("name", ["nt_xent", "siglip", "matryoshka", "info_nce, negatives"])
def test_options_of_ranks_need_a_group(name, options):
    calls = {
        "nt_xent": lambda: fusedloss.nt_xent(X, X, **options),
        "siglip": lambda: fusedloss.siglip(X, X, 2.0, **options),
        "matryoshka": lambda: fusedloss.matryoshka(fusedloss.nt_xent, X, X, dims=(3, 2), **options),
        "info_nce, negatives": lambda: fusedloss.info_nce(X, X, negatives=X[:, None], **options),
    }
    with pytest.raises(
        ValueError, match=r"group must be given with strategy=.*, got None; pass a ProcessGroup, or 'world'"
    ):
        calls[name]()


FLAGS = {
    name: [p.name for p in TAKES[name].values() if p.annotation in ("bool", "bool | None")]
    for name in functional.__all__
    if not name.endswith("_loss") and "size_average" not in TAKES[name]  # of torch, which takes any object
}


@pytest.mark.parametrize("name", sorted(name for name, flags in FLAGS.items() if flags and name in contract.CASES))
def test_a_flag_is_true_or_false(name):
    """A mask in its place would count as True."""
    case = contract.CASES[name](contract.Batch(5))
    for flag in FLAGS[name]:
        for value, shown in ((torch.ones(5, dtype=torch.bool), "a Tensor"), ("no", "'no', a str"), (1, "1, an int")):
            with pytest.raises(TypeError, match=f"{flag} must be True or False, got {shown}; pass one of the two"):
                case.result(**{flag: value})
