"""A group of ranks, and what is asked of them."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist

STRATEGIES = ("gather", "ring")
# What each library's gradient is over the right one, after DDP's average: of the embeddings, and of the loss's own
# parameters (temperature, scale, bias); "W" is the world size. From reading and a model of four ranks.
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
    """The ranks of a group and what is asked of them."""

    group: dist.ProcessGroup
    rank: int
    size: int
    strategy: str
    grad_scale: str
    weight: float = 1.0

    @property
    def factors(self) -> tuple[float, float]:
        """What gradients by embeddings and by the loss's parameters are times the share."""
        known = {"1": 1.0, "W": float(self.size), "1/W": 1.0 / self.size}
        if self.grad_scale == "sum":
            return 1.0, 1.0
        by_rows, by_parameters = MATCH.get(self.grad_scale.removeprefix("match:"), ("1", "1"))
        whole = self.size * self.weight
        return whole * known[by_rows], whole * known[by_parameters]

    def of_rows(self) -> World:
        """For `reduction="none"`: what becomes of the rows is the caller's, who averages over ranks as DDP does."""
        return self if self.grad_scale == "sum" else self._replace(weight=1.0 / self.size)


def world_of(group: dist.ProcessGroup | str, strategy: str, grad_scale: str) -> World:
    if isinstance(group, str):
        group = _named(group)
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        if group is getattr(getattr(dist, "GroupMember", None), "NON_GROUP_MEMBER", ()):
            raise ValueError("group is what new_group gives a rank that is not in it: pass a group of this rank's own")
        raise TypeError(
            f"group is a {type(group).__name__}: needs a ProcessGroup, or 'world', all ranks after init_process_group"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"group is one that rank {dist.get_rank()} is not in: pass a group of this rank's own")
    return World(group, rank, dist.get_world_size(group), strategy, grad_scale)


def check_group(group: object) -> None:
    """What can be said of it before there are processes."""
    if isinstance(group, str) and group != "world":
        raise ValueError(f"group is {group!r}: needs 'world', all ranks, or a ProcessGroup")


def _named(group: str) -> dist.ProcessGroup:
    check_group(group)
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group='world' before init_process_group: call it first, or leave group out for one process")
    return dist.distributed_c10d._get_default_group()
