"""What every public loss and module must do alike: run under torch.compile, and take constants of any origin."""

from __future__ import annotations

import pytest
import torch
from calls import CALLS, Batch, Call, missing

# Compiled graphs compute in another order: 1e-10 is 4e5 eps of fp64, in which everything here is computed.
NEAR = {"rtol": 1e-10, "atol": 1e-10}


def test_every_public_loss_has_a_call():
    assert not missing()


def value_and_gradients(call, batch):
    value = call.result()
    return [value.detach(), *torch.autograd.grad(value.sum(), batch.leaves, materialize_grads=True)]


# torch.compile --------------------------------------------------------------------------------------------------------


def assert_as_eager(compiled, make, rows):
    """`compiled` takes what a call does: its loss and gradients are eager's."""
    eager, batch = Batch(rows), Batch(rows)
    wanted = value_and_gradients(make(eager), eager)
    call = make(batch)
    found = value_and_gradients(call._replace(function=compiled), batch)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **NEAR)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_in_one_graph_for_every_batch_size(name):
    make = CALLS[name]
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    compiled = torch.compile(make(Batch(4)).function, fullgraph=True, dynamic=True, backend="eager")
    for rows in (8, 5):
        assert_as_eager(compiled, make, rows)
    assert graphs["unique_graphs"] == 1


@pytest.mark.parametrize("name", [name for name in CALLS if "," not in name])
def test_the_last_batch_may_be_smaller(name):
    """Without dynamic=True: the first size has a graph, and all others have the second. Of modules, where there are."""

    def make(batch):
        call = CALLS[name](batch)
        module = call.as_module()
        return call if module is None else Call(module[0], call.arguments, module[1])

    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    loss = make(Batch(4)).function
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for rows in (8, 5):
        assert_as_eager(compiled, make, rows)
    assert graphs["unique_graphs"] == 2


@pytest.mark.slow
def test_inductor_compiles_an_op_a_scan_and_mined_pairs():
    """Dynamo's other tests stop before the code is made, which takes a C++ compiler some seconds for each of these."""
    for name in ("info_nce, same_id", "cosent", "batch_hard_triplet"):
        torch._dynamo.reset()
        assert_as_eager(torch.compile(CALLS[name](Batch(4)).function, fullgraph=True), CALLS[name], 8)
