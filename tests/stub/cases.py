"""The host's part of backend "cuda" over a runtime that runs nothing: `python cases.py build/stub` prints what failed.

For tests/backends/test_cuda_host.py, in a process of its own: torch believes there that it has two GPUs. Device 0 is
current, the tensors are on device 1.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from unittest import mock

HERE = Path(__file__).absolute().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support"), str(HERE.parent / "losses")]
import pose  # noqa: E402

if __name__ == "__main__":
    RUNTIME, MODULE = pose.load(Path(sys.argv[1]))

import contract  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode  # noqa: E402

import fusedloss  # noqa: E402
from fusedloss import functional as F  # noqa: E402
from fusedloss import masks  # noqa: E402
from fusedloss.bench import machine as info  # noqa: E402
from fusedloss.core.problem import Fold  # noqa: E402
from fusedloss.core.strips import Strip  # noqa: E402
from fusedloss.losses._folded import fold_loss, fold_problem  # noqa: E402
from fusedloss.losses._options import Call  # noqa: E402
from fusedloss.sweep import triangle  # noqa: E402
from fusedloss.trust import ask  # noqa: E402

ask.admits = lambda *asked: False  # what runs nothing proves nothing: `auto` is `chunked`

DEVICE = torch.device("cuda", 1)
Case = tuple[str, Callable[[], None]]
GROUPS: dict[str, Callable[[pose.Machine], Iterator[Case]]] = {}


def group(function: Callable[[pose.Machine], Iterator[Case]]) -> Callable[[pose.Machine], Iterator[Case]]:
    GROUPS[function.__name__] = function
    return function


def empty(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False, device: object = DEVICE) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device).requires_grad_(grad)


def there(place: int, x: Tensor) -> Tensor:
    return empty(*x.shape, dtype=x.dtype, grad=x.requires_grad)


def sound(machine: pose.Machine) -> None:
    """Every launch on the tensors' device, on the launching thread's stream of it, with living memory."""
    assert not machine.faults, machine.faults
    assert machine.current() == 0
    for found in machine.launches:
        stream = pose.STREAMS + (1 << 48) + found["thread"] % 4096 * 16 + 16
        assert (found["device"], found["stream"]) == (1, stream), found


def step(machine: pose.Machine, run: Callable[[], Tensor], **reset: int) -> set[tuple[object, str]]:
    """A loss and its backward: which matrices were multiplied, and where."""
    machine.reset(**reset)
    with pose.watch() as watched:
        value = run()
        assert value.device == DEVICE
        value.sum().backward()
    assert not watched.crossings, watched.crossings
    sound(machine)
    return watched.products


# Losses ---------------------------------------------------------------------------------------------------------------

ASKED: set[str] = set()


@group
def every_loss_by_the_kernels(machine: pose.Machine) -> Iterator[Case]:
    """bf16, which has kernels of sm_90a. What has none runs as `chunked`."""

    def run(make: Callable[[contract.Batch], contract.Case]) -> None:
        os.environ["FUSEDLOSS_BACKEND"] = "cuda"
        call = make(contract.Batch(8, torch.bfloat16, there))
        step(machine, call.result)
        ASKED.update(found["asked"] for found in machine.launches)
        if machine.launches:
            SWEPT.add(call_name[id(make)])

    call_name = {id(make): name for name, make in contract.CASES.items()}
    for name, make in contract.CASES.items():
        yield name, lambda make=make: run(make)


SWEPT: set[str] = set()


@group
def every_kernel(machine: pose.Machine) -> Iterator[Case]:
    """Those of search, of what is installed for other libraries, and of folds in torch; then all have been launched."""
    x, y = (empty(30, 64, dtype=torch.bfloat16, grad=True) for _ in range(2))

    def run(name: str, function: Callable[[], Tensor]) -> None:
        step(machine, function)
        found = {launch["asked"] for launch in machine.launches}
        assert name in found, found
        ASKED.update(found)

    def hinge() -> Tensor:
        ids = empty(30, dtype=torch.int64)
        fold = Fold("pair_hinge", (0.3, -1.0, 0.0), labels=(ids, ids))
        call = Call(reduction="sum", backend="cuda")
        return fold_loss(fold_problem([x, y], empty(), empty(30), fold, call, target=ids), call)[0]

    def bare(name: str) -> Tensor:
        strip = Strip(x.detach(), y.detach(), empty(), None, None, None, None)
        if name == "top":
            machine.cuda.top_rows([strip])
        elif name == "store":
            machine.cuda.similarities(strip, empty(30, 30))
        else:
            machine.rows._scaled(empty(30, 64), empty(30), torch.bfloat16)
        return empty(grad=True)

    yield "weigh", lambda: run("weigh", lambda: fusedloss.clip(x, y, 9.0, normalize=True, backend="cuda"))

    def searched() -> Tensor:
        return fusedloss.batch_hard_triplet(x, empty(30, dtype=torch.int64), backend="cuda")

    yield "pair_hinge", lambda: run("pair_hinge", hinge)
    yield "opposed", lambda: run("opposed", searched)
    for name in ("top", "store", "scale_rows"):
        yield name, lambda name=name: run(name, lambda: bare(name))

    def all_of_them() -> None:
        launches = {name for name in dir(MODULE) if callable(getattr(MODULE, name)) and name[0].islower()}
        assert launches - ASKED == {"build_info", "plan"}, launches - ASKED
        assert len(SWEPT) > 40

    yield "all of them", all_of_them


@group
def every_loss_in_torch(machine: pose.Machine) -> Iterator[Case]:
    """backend="chunked" where the kernels had been asked: nothing is read back, nothing copied from the host.

    And 16-bit embeddings are multiplied as they are, in each of the products but those of distances, in fp64.
    """

    def run(name: str, dtype: torch.dtype) -> None:
        os.environ["FUSEDLOSS_BACKEND"] = "chunked"
        if name in SWEPT or name.startswith("matryoshka"):
            found = step(machine, contract.CASES[name](contract.Batch(8, dtype, there)).result)
            assert not machine.launches
            own = {where for taken, where in found if taken == dtype}
            if dtype != torch.float32 and name != "matryoshka, cosent":
                wide = [x for x in found if x[0] == torch.float32]
                assert own and not wide, found

    for name in contract.CASES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield f"{name}, {dtype}", lambda name=name, dtype=dtype: run(name, dtype)


@group
def one_matrix_against_itself(machine: pose.Machine) -> Iterator[Case]:
    """Half of the similarities, in chunks whose columns start anywhere: nothing is read back to decide it."""

    def run(dtype: torch.dtype, capability: int, learned: bool, loss: Callable[..., Tensor]) -> None:
        x, temperature = empty(8192, 768, dtype=dtype, grad=True), empty(grad=True) if learned else 0.1
        with mock.patch.object(triangle.Staircase, "softmax", autospec=True, side_effect=SOFTMAX) as halved:
            step(machine, lambda: loss(x, temperature), capability=capability)
        assert halved.call_count == 1
        stored = not learned and dtype != torch.float16
        assert len([found for found in machine.launches if found["asked"] == ("exp" if stored else "grad")]) > 2

    losses: dict[str, Callable[..., Tensor]] = {
        "nt_xent": lambda x, t: fusedloss.nt_xent(x[:4096], x[4096:], temperature=t, backend="cuda"),
        "sup_con": lambda x, t: fusedloss.sup_con(x, empty(8192, dtype=torch.int64), temperature=t, backend="cuda"),
        "info_nce": lambda x, t: fusedloss.info_nce(x, x, temperature=t, normalize=True, backend="cuda"),
    }
    for name, loss in losses.items():
        for capability, dtype in ((80, torch.float16), (90, torch.bfloat16), (90, torch.float32)):
            for learned in (False, True):
                what = f"{name}, sm_{capability}, {dtype}{', learnt temperature' * learned}"
                yield what, lambda a=(dtype, capability, learned, loss): run(*a)


SOFTMAX = triangle.Staircase.softmax


@group
def lists_of_tensors(machine: pose.Machine) -> Iterator[Case]:
    """Their lengths are the host's: a mask is made of them without a copy."""

    def run(loss: Callable[..., Tensor], lengths: tuple[int, ...]) -> None:
        os.environ["FUSEDLOSS_BACKEND"] = "auto"
        scores, labels = ([empty(n, grad=grad) for n in lengths] for grad in (True, False))
        step(machine, lambda: loss(scores, labels))

    for loss in (F.rank_net, F.lambda_loss, F.list_net, F.list_mle, F.plist_mle, F.adr_mse):
        for lengths in ((3, 5, 1), (4, 4)):
            yield f"{loss.__name__}, {lengths}", lambda loss=loss, lengths=lengths: run(loss, lengths)


# Shapes, formats, GPUs ------------------------------------------------------------------------------------------------

SHAPES = ((1, 1, 8), (2, 1, 1), (300, 513, 72), (64, 64, 1000), (129, 300, 2400))
LOSSES: dict[str, Callable[..., Tensor]] = {
    "info_nce": lambda q, k, s: fusedloss.info_nce(q, k[: max(len(q), len(k))], temperature=1 / s, backend="cuda"),
    "clip": lambda q, k, s: fusedloss.clip(q, k, s, normalize=True, backend="cuda"),
    "siglip": lambda q, k, s: fusedloss.siglip(q, k, s, -4.0, backend="cuda"),
}


CLUSTERS: set[int] = set()


@group
def shapes_and_formats_on_every_gpu(machine: pose.Machine) -> Iterator[Case]:
    def run(capability: int, shape: tuple[int, int, int], dtype: torch.dtype, loss: str, tf32: bool) -> None:
        M, N, D = shape
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        columns = max(M, N) if loss == "info_nce" else M
        step(
            machine,
            lambda: LOSSES[loss](
                empty(M, D, dtype=dtype, grad=True), empty(columns, D, dtype=dtype, grad=True), empty(grad=True)
            ),
            capability=capability,
        )
        kernels = {found["kernel"] for found in machine.launches if "similarity" in found["kernel"]}
        sm90 = capability == 90 and (dtype != torch.float32 or tf32)
        assert kernels
        assert all(("similarity_sm90" in kernel) == sm90 for kernel in kernels), kernels
        wide = [
            found for found in machine.launches if "similarity_sm90" in found["kernel"] and "256" in found["kernel"]
        ]
        assert all(found["cluster"] == (2 if -(-M // 128) % 2 == 0 else 1) for found in wide), wide
        CLUSTERS.update(found["cluster"] for found in wide)
        torch.backends.cuda.matmul.fp32_precision = "ieee"

    formats = [(torch.bfloat16, False), (torch.float16, False), (torch.float32, False), (torch.float32, True)]
    for capability in (90, 80, 86, 89, 100, 120):
        for n, shape in enumerate(SHAPES):
            for m, (dtype, tf32) in enumerate(formats):
                loss = list(LOSSES)[(n + m) % 3]
                if capability == 90 or (n + m) % 3 == 0:
                    name = f"sm_{capability}, {shape}, {dtype}{' as tf32' * tf32}, {loss}"
                    yield name, lambda a=(capability, shape, dtype, loss, tf32): run(*a)

    def by_rows() -> None:
        assert CLUSTERS == {1, 2}

    yield "single blocks and clusters of two", by_rows


@group
def layouts(machine: pose.Machine) -> Iterator[Case]:
    """Rows that start anywhere, columns, expanded rows; strided labels, weights and targets."""

    def operand(kind: str, rows: int, D: int) -> Tensor:
        if kind == "shifted":
            return empty(rows, D + 1, dtype=torch.bfloat16)[:, 1:]
        if kind == "transposed":
            return empty(D, rows, dtype=torch.bfloat16).T
        if kind == "expanded":
            return empty(1, D, dtype=torch.bfloat16).expand(rows, D)
        return empty(rows, 2 * D, dtype=torch.bfloat16)[:, ::2]

    def run(kind: str, capability: int) -> None:
        leaves = [operand(kind, 40, 24).requires_grad_() for _ in range(2)]
        step(machine, lambda: fusedloss.info_nce(*leaves, normalize=True, backend="cuda"), capability=capability)

    for kind in ("shifted", "transposed", "expanded", "every other column"):
        for capability in (80, 90):
            yield f"{kind}, sm_{capability}", lambda a=(kind, capability): run(*a)

    def vectors(loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        x, y = (empty(40, 64, dtype=torch.bfloat16, grad=True) for _ in range(2))
        ids = empty(40, 2, dtype=torch.int64)[:, 1]
        step(machine, lambda: loss(x, y, ids, empty(1).expand(40)))
        # Strided, they were copied: none of the kernels was given them.
        space = machine.address(ids) // pose.ROOM
        assert not any(pointer // pose.ROOM == space for found in machine.launches for pointer in found["pointers"])

    uses: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
        "info_nce": lambda x, y, ids, w: fusedloss.info_nce(
            x, y, ids, weight=w, mask=masks.same_id(ids, ids), backend="cuda"
        ),
        "sup_con": lambda x, y, ids, w: fusedloss.sup_con(x, ids, form="in", backend="cuda"),
        "siglip": lambda x, y, ids, w: fusedloss.siglip(x, y, 2.0, target=masks.same_id(ids, ids), backend="cuda"),
        "circle": lambda x, y, ids, w: fusedloss.circle(x, ids, backend="cuda"),
    }
    for name, loss in uses.items():
        yield f"strided vectors, {name}", lambda loss=loss: vectors(loss)


# Devices and threads --------------------------------------------------------------------------------------------------


def leaves(dtype: torch.dtype = torch.bfloat16, device: object = DEVICE) -> list[Tensor]:
    return [empty(300, 72, dtype=dtype, grad=True, device=device) for _ in range(2)]


@group
def devices_and_threads(machine: pose.Machine) -> Iterator[Case]:
    def both() -> None:
        """What was set on one device is set on the other, too."""
        machine.reset()
        for index in (0, 1, 0):
            fusedloss.info_nce(*leaves(device=torch.device("cuda", index)), backend="cuda").backward()
        assert not machine.faults
        assert [device for device, _ in groupby(found["device"] for found in machine.launches)] == [0, 1, 0]
        assert machine.current() == 0

    yield "both devices in turn", both

    def unlike() -> None:
        """Each by its own capability."""
        machine.reset()
        machine.capabilities[0] = 80
        machine.runtime.stub_device(0, 80, 108)
        for index in (0, 1):
            fusedloss.info_nce(*leaves(device=torch.device("cuda", index)), backend="cuda").backward()
        assert not machine.faults
        kernels = {
            (found["device"], "sm90" in found["kernel"]) for found in machine.launches if "simil" in found["kernel"]
        }
        assert kernels == {(0, False), (1, True)}

    yield "two GPUs that are not alike", unlike

    def autograd() -> None:
        """A backward that sweeps runs in autograd's thread of the device."""
        x, y = leaves()
        machine.reset()
        loss = fusedloss.info_nce(x, y, reduction="none", backend="cuda")
        forward = len(machine.launches)
        loss.sum().backward()
        sound(machine)
        here = threading.get_native_id()
        assert {found["thread"] for found in machine.launches[:forward]} == {here}
        behind = {found["thread"] for found in machine.launches[forward:]}
        assert behind and here not in behind

    yield "autograd's thread", autograd

    def fresh(mode: FakeTensorMode) -> None:
        """A thread that has never called CUDA has device 0."""
        machine.reset()
        found: list[object] = []

        def work() -> None:
            with mode:
                found.append(machine.current())
                fusedloss.clip(*leaves(), 2.0, normalize=True, backend="cuda").backward()
                found.append(machine.current())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert found == [0, 0]
        assert threading.get_native_id() not in {one["thread"] for one in machine.launches}
        sound(machine)

    yield "a new thread", lambda: fresh(MODE[-1])

    def current() -> None:
        """The operands' device is current: nothing is switched."""
        machine.reset()
        machine.runtime.cudaSetDevice(1)
        fusedloss.info_nce(*leaves(), backend="cuda").backward()
        assert machine.current() == 1
        machine.runtime.cudaSetDevice(0)
        sound(machine)

    yield "the operands' device is current", current


# What would be noticed ------------------------------------------------------------------------------------------------


@group
def mutants_are_noticed(machine: pose.Machine) -> Iterator[Case]:
    launching = machine.launching

    def attempt(*, dtype: torch.dtype = torch.bfloat16) -> str:
        machine.reset()
        return found(lambda: fusedloss.info_nce(*leaves(dtype), temperature=empty(grad=True), backend="cuda"))

    def found(run: Callable[[], object]) -> str:
        try:
            run()
        except RuntimeError as error:
            machine.runtime.cudaSetDevice(0)
            return str(error)
        return "; ".join(machine.faults)

    def changed(module: object, name: str, value: object, run: Callable[[], str] = attempt) -> str:
        kept = getattr(module, name)
        setattr(module, name, value)
        try:
            return run()
        finally:
            setattr(module, name, kept)

    def unguarded(name: str, device: torch.device, *arguments: object) -> None:
        getattr(launching.extension(), name)(*arguments, launching.stream(device))

    def no_guard() -> None:
        assert "cudaErrorInvalidResourceHandle" in changed(launching, "call", unguarded)
        # On the default stream CUDA itself would not mind.
        text = changed(launching, "call", unguarded, lambda: changed(launching, "stream", lambda device: 0))
        assert "runs on device 0, an operand is on 1" in text, text

    yield "a launch on the current device", no_guard

    def stream() -> None:
        text = changed(launching, "stream", lambda device: machine.stream(torch.device("cuda", 0)))
        assert "cudaErrorInvalidResourceHandle" in text, text

    yield "a stream of the current device", stream

    def unaligned() -> None:
        def run() -> str:
            machine.reset()
            operands = [empty(300, 73, dtype=torch.bfloat16)[:, 1:].requires_grad_() for _ in range(2)]
            return found(lambda: fusedloss.info_nce(*operands, backend="cuda"))

        assert run() == ""
        text = changed(launching, "is_aligned", lambda x: True, run)
        assert "cudaErrorInvalidValue" in text, text

    yield "rows that the accelerator cannot load", unaligned

    def attributes() -> None:
        machine.reset()
        machine.runtime.stub_deaf()
        text = found(lambda: fusedloss.info_nce(*leaves(), backend="cuda"))
        assert "cudaErrorInvalidValue" in text, text

    yield "shared memory that was not asked for on this device", attributes

    def freed() -> None:
        machine.reset()
        fields = {"max": empty(2, 8), "sum": empty(2, 8), "running_max": empty(8), "running_sum": empty(8)}
        given = launching.struct("MergeParams", **fields, n_tiles=2, R=8)
        del fields
        launching.call("merge", DEVICE, given)
        assert machine.faults and all("a tensor that is gone" in fault for fault in machine.faults)

    yield "memory that was freed before its launch", freed

    def behind() -> None:
        machine.reset()
        table, sums = empty(2, 8), empty(8)
        given = launching.struct(
            "MergeParams", max=table, sum=table[2:], running_max=sums, running_sum=sums, n_tiles=2, R=8
        )
        launching.call("merge", DEVICE, given)
        assert [re.sub(r"\d+", "N", fault) for fault in machine.faults] == [
            "merge was given an address behind a tensor's N bytes"
        ]

    yield "an address behind a tensor", behind

    def host() -> None:
        machine.reset()
        given = launching.struct("MergeParams", max=empty(2, 8, device="cpu"), n_tiles=0, R=0)
        assert given and machine.faults == ["the address of a tensor on cpu is asked for"]

    yield "a tensor on the host", host


@group
def reading_back_is_noticed(machine: pose.Machine) -> Iterator[Case]:
    x = empty(4)

    def refused(read: Callable[[], object]) -> None:
        try:
            with pose.watch() as watched:
                read()
        except (DataDependentOutputException, RuntimeError) as error:
            assert "data" in str(error) or "dynamic" in str(error).lower() or "aten." in str(error), error
            return
        assert watched.crossings

    reads: dict[str, Callable[[], object]] = {
        "item": lambda: x.sum().item(),
        "bool": lambda: bool((x > 0).any()),
        "tolist": lambda: x.tolist(),
        "nonzero": lambda: x.nonzero(),
        "a mask as an index": lambda: x[x > 0],
        "repeat_interleave": lambda: x.repeat_interleave(torch.empty(4, dtype=torch.int64, device=DEVICE)),
        "torch.tensor": lambda: torch.tensor([3, 4], device=DEVICE),
        "torch.as_tensor": lambda: torch.as_tensor([3, 4], device=DEVICE),
        "to": lambda: torch.arange(4).to(DEVICE),
        "cpu": lambda: x.cpu(),
        "copy_": lambda: x.copy_(torch.zeros(4)),
        "a number into a place": lambda: x.__setitem__(0, 1),  # a copy of a 0-dim tensor on the host
        "an index on the host": lambda: x[torch.tensor([1, 2])],
        "an index that is a list": lambda: x[[1, 2]],
    }
    for name, read in reads.items():
        yield name, lambda read=read: refused(read)

    def allowed() -> None:
        with pose.watch() as watched:
            y = x[:, None].expand(4, 3) * 2.0 + torch.tensor(3.0)
            y[-1] = 1
            torch.arange(4, device=DEVICE), torch.full((3,), 2.0, device=DEVICE), y.new_zeros(3)
        assert not watched.crossings, watched.crossings

    yield "numbers go along with a launch", allowed


# Errors ---------------------------------------------------------------------------------------------------------------


@group
def a_failed_launch_says_what_to_run(machine: pose.Machine) -> Iterator[Case]:
    def run(code: int, *parts: str) -> None:
        machine.reset()
        running = machine.rows.RowSums(empty(8), empty(8))
        machine.runtime.stub_plant(code)
        try:
            machine.rows.merge(running, machine.rows.RowSums(empty(2, 8), empty(2, 8)))
        except RuntimeError as error:
            text = str(error)
        assert machine.current() == 0
        for part in (
            "backend 'cuda': kernel 'merge' was not launched on cuda:1 (sm_90). merge: ",
            "fusedloss._C was built with CUDA 13.0 for sm_80, sm_90, sm_90a, sm_100, sm_120, compute_80, the driver "
            "runs up to 13.0. Remedy: ",
            "`python -m fusedloss info` says what runs here, and backend='chunked' needs none of it",
            *parts,
        ):
            assert part in text, text
        # Nothing is left over: the next launch is none of it.
        machine.rows.merge(running, machine.rows.RowSums(empty(2, 8), empty(2, 8)))
        assert len(machine.launches) == 1

    errors = {
        2: ("cudaErrorMemoryAllocation: ", "free memory on cuda:1"),
        35: ("cudaErrorInsufficientDriver: ", "update the driver"),
        209: ("cudaErrorNoKernelImageForDevice: ", "install fusedloss again with FUSEDLOSS_CUDA_ARCHS=90;"),
        222: (
            "cudaErrorUnsupportedPtxVersion: ",
            "update the driver, or install fusedloss again with FUSEDLOSS_CUDA_ARCHS=",
        ),
        700: ("cudaErrorIllegalAddress: ", "CUDA_LAUNCH_BLOCKING=1"),
        1: ("cudaErrorInvalidValue: ",),
    }
    for code, parts in errors.items():
        yield parts[0].rstrip(": "), lambda a=(code, *parts): run(*a)

    def old() -> None:
        """What a driver of CUDA 12 does: every call fails, before the launch as in it."""
        machine.reset()
        machine.runtime.stub_driver(12040)
        x, y = leaves()
        unused = (empty(), None, None, None, None)
        for name, run in (
            ("store", lambda: machine.cuda.similarities(Strip(x, y, *unused), empty(300, 300))),
            ("prepare", lambda: machine.rows.inverse_norms(x)),
        ):
            try:
                run()
            except RuntimeError as error:
                text = str(error)
            assert "cudaErrorInsufficientDriver" in text and "the driver runs up to 12.4. Remedy: update" in text, (
                name,
                text,
            )

    yield "an old driver", old


@group
def an_old_driver_is_a_reason_against(machine: pose.Machine) -> Iterator[Case]:
    def run(driver: int, capability: int, reason: str | None) -> None:
        machine.reset(capability)
        machine.runtime.stub_driver(driver)
        found = machine.cuda.why_not_on(torch.bfloat16, DEVICE)
        assert (found is None) if reason is None else (reason in found), found
        line = info.extension()
        if driver:
            assert f"; the driver runs CUDA up to {driver // 1000}.{driver % 1000 // 10}" in line, line
        assert (f"; runs on cuda:1 (sm_{capability})" in line) == (reason is None), line
        if reason is not None:
            try:
                fusedloss.info_nce(*leaves(), backend="cuda")
            except fusedloss.UnsupportedError as error:
                assert reason in str(error)
            else:
                raise AssertionError("it ran")

    old = (
        "the driver runs CUDA up to 12.9, and fusedloss._C was built with 13.0: update the driver to one of CUDA 13.0 "
        "or newer, or install fusedloss again with an nvcc of CUDA 12 (CUDA_HOME)"
    )
    for name, driver, capability, reason in (
        ("of the build's CUDA", 13000, 90, None),
        ("newer", 13020, 90, None),
        ("a major version newer", 14000, 90, None),
        ("a major version older", 12090, 90, old),
        ("unknown", 0, 90, None),
        ("PTX for a GPU to come", 13000, 130, None),
    ):
        yield name, lambda a=(driver, capability, reason): run(*a)


MODE: list[FakeTensorMode] = []


def main() -> None:
    machine = pose.Machine(RUNTIME, MODULE)
    failed: dict[str, dict[str, str | None]] = {}
    for name, made in GROUPS.items():
        results = failed.setdefault(name, {})
        with FakeTensorMode() as mode:
            MODE[:] = [mode]
            for case, run in made(machine):
                try:
                    run()
                    results[case] = None
                except Exception:
                    results[case] = traceback.format_exc()
                    machine.runtime.cudaSetDevice(0)
    json.dump(failed, sys.stdout)


if __name__ == "__main__":
    main()
