"""A group of ranks, and what is asked of them."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist

from ..core import checks

STRATEGIES = ("gather", "ring")
# Each library's gradient divided by the exact one, after DDP's average: for the embeddings, and for the loss's
# parameters (temperature, scale, bias); "W" is the world size. From reading their code and from a model of four ranks.
MATCH = {
    "sentence_transformers": ("1", "1"),
    "lightly": ("1", "1"),
    "open_clip": ("1/W", "1"),  # its default flags; with --local-loss --gather-with-grad it is ("1", "1")
    "flag_embedding": ("1/W", "1"),
    "grad_cache": ("1/W", "1"),
    "tevatron": ("1", "W"),
    "pytorch_metric_learning": ("1", "W"),
    "pylate": ("W", "W"),
    "contrastors": ("W", "W"),
}
GRAD_SCALES = ("ddp", "sum", *(f"match:{library}" for library in MATCH))


class World(NamedTuple):
    """The ranks of a group, the strategy and the gradient scale of a call."""

    group: dist.ProcessGroup
    rank: int
    size: int
    strategy: str
    grad_scale: str
    weight: float = 1.0

    @property
    def factors(self) -> tuple[float, float]:
        """Returns the factors of this rank's gradients, for embeddings and for the loss's parameters."""
        known = {"1": 1.0, "W": float(self.size), "1/W": 1.0 / self.size}
        if self.grad_scale == "sum":
            return 1.0, 1.0
        by_rows, by_parameters = MATCH.get(self.grad_scale.removeprefix("match:"), ("1", "1"))
        whole = self.size * self.weight
        return whole * known[by_rows], whole * known[by_parameters]

    def of_rows(self) -> World:
        """For `reduction="none"`, whose caller reduces the rows and averages over ranks as DDP does."""
        return self if self.grad_scale == "sum" else self._replace(weight=1.0 / self.size)


def world_of(group: dist.ProcessGroup | str, strategy: str, grad_scale: str) -> World:
    if isinstance(group, str):
        group = _named(group)
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        if group is getattr(getattr(dist, "GroupMember", None), "NON_GROUP_MEMBER", ()):
            raise ValueError("group must contain this rank, got what new_group returns to a rank outside the group")
        raise TypeError(f"group must be a ProcessGroup, or 'world' after init_process_group, got {checks.a(group)}")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"group must contain this rank, {dist.get_rank()}, got a group without it")
    return World(group, rank, dist.get_world_size(group), strategy, grad_scale)


def check_group(group: object) -> None:
    """Checks a group as far as possible before there are processes."""
    if isinstance(group, str) and group != "world":
        raise ValueError(f"group must be 'world' for all ranks, or a ProcessGroup, got {group!r}")


def _named(group: str) -> dist.ProcessGroup:
    check_group(group)
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group must be None before init_process_group, got 'world'; call init_process_group first")
    return dist.distributed_c10d._get_default_group()
