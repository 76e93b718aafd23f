"""A problem apart from its tensors, and as an op takes it."""

from dataclasses import fields, is_dataclass, replace

import pytest
import torch

from fusedloss import UnsupportedError
from fusedloss.core.mask import Compare, Guide, GuideRule, Mask
from fusedloss.core.problem import Beside, Block, Fold, Margin, Problem, Ranks, Targets
from fusedloss.core.transforms import Transform
from fusedloss.sweep import packing


def whole():
    """A problem that leaves no field at its default."""
    number = iter(range(1, 1000))

    def vector(*shape, dtype=torch.float32):
        return torch.full(shape, next(number), dtype=dtype)

    def rows():
        return vector(3, dtype=torch.int64)

    mask = Mask(
        (Compare(rows(), rows(), True), Compare(rows(), rows(), False)),
        torch.ones(3, 3, dtype=torch.bool),
        0.25,
        vector(3, 2, dtype=torch.int64),
        Guide(vector(3, 2), vector(3, 2)),
        rows(),
        5,
        0.9,
        0.5,
    )
    fold = Fold(
        "sigmoid",
        (1.5, 2.5),
        (rows(), rows()),
        True,
        "cosine",
        (vector(), vector()),
        (Guide(vector(3, 2), vector(3, 2)), Guide(vector(3, 2), vector(3, 2))),
        vector(),
        Beside(vector(3, 2), vector(3, 2), torch.ones(3, 2, dtype=torch.bool)),
        True,
    )
    return Problem(
        (vector(3, 4), vector(3, 4), vector(3, 4)),
        (Block(0, 1, vector(3), mask, 0.5, 0.75), Block(0, 2, None, Mask(skip=rows()))),
        vector(),
        rows(),
        vector(3),
        True,
        0.125,
        True,
        8.0,
        4096,
        True,
        3,
        GuideRule(0.5, True),
        True,
        fold,
        (2, 4),
        (0.5, 1.0),
        30.0,
        Margin(0.1, 0.2),
        1e-3,
        Ranks("a group", 1, (2, 3)),
        True,
        True,
        Transform("focal", 2.0, True),
        False,
        True,
        Targets(vector(3, 2, dtype=torch.int64), "joint"),
        0.1,
    )


def plain():
    x = torch.ones(3, 4)
    return Problem((x, x + 1), (Block(0, 1),), torch.tensor(2.0), torch.arange(3), torch.ones(3))


def same(a, b):
    """Field by field; a tensor is only the same as itself."""
    if isinstance(a, torch.Tensor):
        return a is b
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("problem", [whole(), plain()], ids=["whole", "plain"])
def test_there_and_back(problem):
    empty, inputs, constants = packing.take_apart(problem)
    flat = packing.pack(problem)
    assert all(map(same, inputs, flat.inputs)) and all(map(same, constants, flat.constants))
    assert same(problem, packing.put_together(empty, inputs, constants))
    assert same(problem, packing.unpack(flat))
    assert (
        type(flat.names) is str and {type(n) for n in flat.ints} == {int} and {type(n) for n in flat.floats} == {float}
    )


def test_the_whole_problem_is_whole():
    """A field that is added has to be given above, or this test would not see that it is packed."""

    def differs(a, b):
        for f in fields(a):
            assert not same(getattr(a, f.name), getattr(b, f.name)), f"{type(a).__name__}.{f.name}"

    ours = whole()
    differs(ours, plain())
    differs(ours.blocks[0], Block(7, 7))
    differs(ours.fold, Fold(""))
    for mine, default in ((ours.blocks[0].mask, Mask()), (ours.margin, Margin()), (ours.guide_rule, GuideRule())):
        assert not any(map(same, mine, default))


def test_what_is_apart_holds_no_tensor():
    def tensors(value):
        if isinstance(value, torch.Tensor):
            return 1
        parts = [getattr(value, f.name) for f in fields(value)] if is_dataclass(value) else value
        return sum(map(tensors, parts)) if isinstance(parts, (list, tuple)) else 0

    problem = whole()
    empty, inputs, constants = packing.take_apart(problem)
    assert tensors(problem) == len(inputs) + len(constants) == 30 and tensors(empty) == 0


def test_inputs_are_in_the_order_of_gradients():
    problem = whole()
    biases = [block.bias for block in problem.blocks if block.bias is not None]
    wanted = [*problem.operands, *biases, problem.scale, *problem.fold.scalars, problem.fold.beside.values]
    assert all(map(same, packing.take_apart(problem)[1], wanted)) and len(wanted) == 8


def test_a_function_as_transform_stays_eager():
    problem = replace(plain(), transform=Transform("function", function=torch.square))
    empty, inputs, constants = packing.take_apart(problem)
    assert packing.put_together(empty, inputs, constants).transform is problem.transform
    with pytest.raises(UnsupportedError, match=r"transform must be one of fusedloss\.transforms under torch.compile"):
        packing.pack(problem)
