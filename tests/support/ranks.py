"""Gloo groups of forked processes, in which one case's fault is that case's alone.

    ranks = Ranks(2, setup)   # in each process, once it is in the group: run = setup(rank)
    ranks(case)               # [run(case) of rank 0, of rank 1]
    ranks.stop()

Where a rank raises, ends or hangs, the call raises that, and the next call has new processes.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from patience import delta, seconds

# A collective's, and a case's with all of its collectives. Where one rank has raised, what the others get to say why.
COLLECTIVE, CASE, AFTER_A_FAULT = 300.0, 600.0, 10.0

Run = Callable[[Any], Any]


class Ranks:
    def __init__(self, size: int, setup: Callable[[int], Run]) -> None:
        self.size, self.setup = size, setup
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def start(self) -> None:
        context = torch.multiprocessing.get_context("fork")
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(self.size):
            here, there = context.Pipe()
            arguments = (rank, self.size, f"{self.folder.name}/store", self.setup, there)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()  # so that its end is seen here
            self.processes.append(process)
            self.pipes.append(here)

    def stop(self) -> None:
        if not self.processes:
            return
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join()
            pipe.close()
        self.processes, self.pipes = [], []
        self.folder.cleanup()

    def __call__(self, case: Any) -> list[Any]:
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send(case)
        found: dict[int, Any] = {}
        faults: list[Exception] = []
        deadline = time.monotonic() + seconds(CASE)
        while len(found) < self.size:
            left = {self.pipes[rank]: rank for rank in range(self.size) if rank not in found}
            ready = wait(list(left), max(0.0, deadline - time.monotonic()))
            if not ready:
                faults.append(TimeoutError(f"ranks {list(left.values())} are still at it"))
                break
            for pipe in ready:
                rank = left[pipe]
                try:
                    found[rank], fault = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self.processes[rank].join()
                    found[rank] = None
                    fault = RuntimeError(f"rank {rank} ended with exit code {self.processes[rank].exitcode}")
                if fault is not None:
                    faults.append(fault)
                    deadline = min(deadline, time.monotonic() + seconds(AFTER_A_FAULT))
        if faults:
            self.stop()
            for other in faults[1:]:
                faults[0].add_note(f"and then: {other!r}")
            raise faults[0]
        return [found[rank] for rank in range(self.size)]


def on_ranks(size: int, run: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[run(rank, *arguments) of each rank], in processes of their own."""
    ranks = Ranks(size, lambda rank: lambda given: run(rank, *given))
    try:
        return ranks(arguments)
    finally:
        ranks.stop()


def _serve(rank: int, size: int, store: str, setup: Callable[[int], Run], pipe: Connection) -> None:
    torch.set_num_threads(1)
    run = error = None
    try:
        options = {"init_method": f"file://{store}", "rank": rank, "world_size": size, "timeout": delta(COLLECTIVE)}
        dist.init_process_group("gloo", **options)
        run = setup(rank)
    except Exception as why:  # told as the first case's
        error = _told(why, rank)
    while True:
        try:
            case = pipe.recv()
        except EOFError:  # who asked is gone
            os._exit(0)
        found = None
        try:
            found = run(case) if run is not None else None
        except Exception as why:
            error = _told(why, rank)
        pipe.send_bytes(pickle.dumps((found, error)))


def _told(error: Exception, rank: int) -> Exception:
    error.add_note(f"on rank {rank}: {traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"rank {rank}: {traceback.format_exc()}")
    return error
