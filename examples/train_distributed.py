"""Code search on several processes: a global batch whose every column is a negative of every row, on any rank.

    python examples/train_distributed.py                                          # one process
    torchrun --nproc-per-node 2 examples/train_distributed.py --steps 20 --batch 512
    torchrun --nproc-per-node 8 examples/train_distributed.py --batch 131072      # NCCL where there are GPUs, else gloo

Data and encoder are those of code_search.py. Three things differ from a script for one process: the model, with its
temperature, is wrapped by DistributedDataParallel; each rank encodes its part of a global batch; the loss is told whose
columns compete, `group=`. Losses are those of one process with the whole batch, so a run may be stopped and resumed on
another number of processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from code_search import TEMPERATURE, Encoder, console, load_pairs, retrieval, shown
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fusedloss

LOSSES = {
    "info_nce": lambda query, key, temperature, **ranks: fusedloss.info_nce(
        query, key, temperature=temperature, normalize=True, **ranks
    ),
    "clip": lambda query, key, temperature, **ranks: fusedloss.clip(
        query, key, 1 / temperature, normalize=True, **ranks
    ),
}
WARMUP = 10  # steps; then the rates stay as they are, so that a run can always be given more steps


class Model(nn.Module):
    """Encoder and temperature in one module: DDP averages the gradients of what it wraps, and of nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(TEMPERATURE)))

    def forward(self, queries: list[np.ndarray], keys: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        return self.encoder(queries, side=0), self.encoder(keys, side=1), self.log_temperature.exp()


class Shuffle:
    """Global batches, the same on every rank: epochs in random order, what does not fill a batch left out."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count, self.batch = count, batch
        self.random = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)

    def next(self) -> Tensor:
        if len(self.order) < self.batch:
            self.order = torch.randperm(self.count, generator=self.random)
        chosen, self.order = self.order[: self.batch], self.order[self.batch :]
        return chosen

    def state_dict(self) -> dict[str, Tensor]:
        return {"random": self.random.get_state(), "order": self.order.clone()}  # a view would save the whole epoch

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.random.set_state(state["random"])
        self.order = state["order"]


class Run:
    """All that training changes, and where it stands; what a checkpoint holds."""

    def __init__(self, options: argparse.Namespace, pairs: int, device: torch.device) -> None:
        torch.manual_seed(options.seed)
        self.model = Model().to(device)
        groups = [
            {"params": self.model.encoder.vectors.parameters(), "lr": 0.03},
            {"params": [self.model.encoder.log_weights], "lr": 0.1},
            {"params": [self.model.log_temperature], "lr": 0.01},
        ]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1, (step + 1) / WARMUP))
        self.shuffle = Shuffle(pairs, options.batch, options.seed)
        self.step = 0
        self.of = {"--batch": options.batch, "--seed": options.seed, "--loss": options.loss, "training pairs": pairs}

    @property
    def parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "optimizer", "schedule", "shuffle")}

    def save(self, path: Path) -> None:
        """Whole or not at all: who is killed while it writes leaves the checkpoint of before."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        new = path.with_name(path.name + ".new")
        torch.save({"step": self.step, "of": self.of, **state}, new)
        new.replace(path)

    def load(self, state: dict[str, Any], path: Path) -> None:
        for name, value in self.of.items():
            if state["of"][name] != value:
                raise SystemExit(
                    f"--checkpoint {path} is of a run with {name} {state['of'][name]}, this one has {value}: "
                    "go on with the same, or name another file"
                )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step = state["step"]


# Ranks


def start(device: str) -> torch.device:
    """This rank's device, in a group of all ranks; without torchrun of one."""
    backend = "gloo"
    if device == "cuda":
        number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if number >= count:
            raise SystemExit(f"LOCAL_RANK is {number} and there are {count} GPUs: start one process for each GPU")
        torch.cuda.set_device(number)
        backend = "cpu:gloo,cuda:nccl"  # gloo for objects
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def from_rank_0(value: Any) -> Any:
    """So that all ranks go on with the same, and only one machine needs to have it."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


@contextlib.contextmanager
def stopping(device: torch.device) -> Iterator[Callable[[], bool]]:
    """A function that says, on all ranks alike, whether one of them got Ctrl-C; a second one ends the process at once.

    A rank that left on its own would leave the others in a collective, waiting for it.
    """
    asked = False

    def note(*_: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)

    def stopped() -> bool:
        anywhere = torch.tensor(float(asked), device=device)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        return bool(anywhere)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


# Training


def train(run: Run, pairs: list[tuple], options: argparse.Namespace, device: torch.device) -> bool:
    """Until `--steps`, or Ctrl-C, which it returns."""
    rank, size = dist.get_rank(), dist.get_world_size()
    first = rank == 0
    model = DistributedDataParallel(run.model, device_ids=None if device.type == "cpu" else [device.index])
    ranks = {"group": dist.group.WORLD, "strategy": options.strategy, "grad_scale": "ddp"}
    note = [""]
    steps: Iterable[int] = range(run.step, options.steps)
    if first:
        steps = shown(steps, "Training", options.steps - run.step, note)
    with log_of(options.log_file if first else None, run.step) as log, stopping(device) as stopped:
        for _ in steps:
            began = time.perf_counter()
            mine = run.shuffle.next()[rank::size].tolist()
            query, key, temperature = model([pairs[i][3] for i in mine], [pairs[i][4] for i in mine])
            if options.bf16:
                query, key = query.bfloat16(), key.bfloat16()
            loss = LOSSES[options.loss](query, key, temperature, **ranks)
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
            run.schedule.step()
            run.step += 1
            enough = stopped()
            found = {"step": run.step, "loss": loss.item(), "temperature": temperature.item()}
            note[0] = f"loss {found['loss']:.3f}, temperature {found['temperature']:.3f}"
            log({**found, "seconds": time.perf_counter() - began})
            if enough:
                break
            if first and options.checkpoint and run.step % options.save_every == 0:
                run.save(options.checkpoint)
    if first and options.checkpoint:
        run.save(options.checkpoint)
    return run.step < options.steps


@contextlib.contextmanager
def log_of(path: Path | None, step: int) -> Iterator[Callable[[dict[str, float]], None]]:
    """A function that writes a line of JSON; on resume the lines of steps that were not saved go."""
    if path is None:
        yield lambda line: None
        return
    old = path.read_text().splitlines(keepends=True) if step and path.exists() else []
    with path.open("w") as file:
        file.writelines(line for line in old if json.loads(line)["step"] <= step)
        yield lambda line: print(json.dumps(line), file=file, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train code search on one or several processes, under torchrun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=50, help="in all, with those of a checkpoint")
    parser.add_argument("--batch", type=int, default=2048, help="pairs in a batch, of all ranks together")
    parser.add_argument("--megabytes", type=float, default=20, help="of Python source to read, at most")
    parser.add_argument("--loss", default="info_nce", choices=list(LOSSES))
    parser.add_argument("--strategy", default="gather", choices=["gather", "ring"], help="how columns travel")
    parser.add_argument("--bf16", action="store_true", help="give the loss bfloat16 embeddings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="written by rank 0, resumed from if it exists")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS", help="and at the end, and at Ctrl-C")
    # Not --log: torchrun takes that for one of its own.
    parser.add_argument("--log-file", type=Path, metavar="FILE", help="a line of JSON for each step")
    options = parser.parse_args()
    if options.checkpoint and not options.checkpoint.absolute().parent.is_dir():
        parser.error(f"--checkpoint must be in a folder that exists, got {options.checkpoint}")
    for name in ("steps", "batch", "save_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be a positive number, got {getattr(options, name)}")
    return options


def main() -> int:
    options = parse_arguments()
    first = int(os.environ.get("RANK", 0)) == 0
    # Before the group is there: load_pairs forks, which the threads of gloo and of CUDA do not survive.
    data = load_pairs(options.megabytes) if first else None
    device = start(options.device)
    train_pairs, held_out = from_rank_0(data)
    size = dist.get_world_size()
    options.batch = min(options.batch, len(train_pairs))
    if options.batch < size:
        raise SystemExit(f"--batch {options.batch} on {size} processes: each needs a pair; raise it or --megabytes")

    run = Run(options, len(train_pairs), device)
    path = options.checkpoint
    found = torch.load(path, weights_only=True, map_location="cpu") if first and path and path.exists() else None
    if (state := from_rank_0(found)) is not None:
        run.load(state, path)
    if first:
        counts = f"{len(train_pairs)} training pairs, {len(held_out)} held out"
        console.print(f"{counts}; batch {options.batch} on {size} x {device.type}, from step {run.step}")
    stopped = run.step < options.steps and train(run, train_pairs, options, device)
    if first:
        scores = ", ".join(f"{name} {score:.3f}" for name, score in retrieval(run.model.encoder, held_out).items())
        console.print(f"Held-out modules, find the source among {len(held_out)}: {scores}", soft_wrap=True)
        if stopped:
            advice = f"; the same command goes on from {path}" if path else ""
            console.print(f"Stopped after step {run.step}{advice}")
    return 130 if stopped else 0


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
        console.print("Stopped.")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(code)
