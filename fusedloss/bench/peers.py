"""Other libraries that compute these losses: one short function a peer, which says what it calls and what it avoids.

Each function takes a point of the race and returns a loss of (query, key), or the reason why the peer cannot run there.
A peer without a temperature gets `query * scale`, and autograd gives the gradient of a learnable scale. That copy is
part of the peer's time, as it is for its users. The race takes gradients with `loss.backward()`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .. import testing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
CHUNK_ROWS = {"cpu": 1024, "cuda": 4096}  # for peers whose caller chooses the chunk
SIGLIP_BIAS = -10.0  # SigLIP's bias at the start of training

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Point:
    """One point of the race: a loss, a size and how inputs are drawn."""

    loss: str = "info_nce"
    n: int = 4096
    d: int = 384
    dtype: str = "fp32"
    temperature: float = 0.05
    kind: str = "random"
    device: str = "cpu"

    def inputs(self, rows: int | None = None) -> tuple[Tensor, Tensor]:
        count = rows or self.n
        return testing.inputs(self.kind, count, count, self.d, DTYPES[self.dtype], device=self.device)

    @property
    def scale(self) -> float:
        return 1 / self.temperature

    @property
    def device_type(self) -> str:
        return torch.device(self.device).type

    @property
    def eager_bytes(self) -> int:
        """Returns eager's peak: logits, log-softmax and its gradient, in fp32 for 16-bit inputs."""
        return 3 * self.n * self.n * max(4, DTYPES[self.dtype].itemsize)


@dataclass(frozen=True)
class Peer:
    name: str
    build: Callable[[Point], Loss | str]
    package: str = ""  # the name for pip; empty: torch itself
    module: str = ""
    caveat: str = ""  # why the peer is shown but never ranked
    computes: str = ""  # the loss that the peer computes, if not the point's

    def enter(self, point: Point) -> Loss | str:
        """Returns the loss, or the reason why the peer has none."""
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"{self.package} is not installed"
        try:
            return self.build(point)
        except Exception as error:  # a failed import, for example; the other peers still race
            return f"cannot be set up: {type(error).__name__}: {error}".splitlines()[0]


PEERS: dict[str, Peer] = {}


Build = TypeVar("Build", bound=Callable[[Point], Loss | str])


def peer(name: str, **about: Any) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        PEERS[name] = Peer(name, build, **about)
        return build

    return register


def versions(*more: str) -> dict[str, str]:
    """Returns the versions of the packages of the race's peers, and of `more`, that are installed."""
    found = {}
    for package in sorted({p.package for p in PEERS.values() if p.package} | {*more}):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# torch's own ----------------------------------------------------------------------------------------------------------


@peer("eager")
def eager(point: Point) -> Loss:
    """The code that users write: the matmul in the inputs' dtype, F.cross_entropy in fp32."""
    scale = point.scale
    if point.loss == "clip":
        return lambda q, k: testing.eager_clip(q, k, scale)
    if point.loss == "multiple_negatives_ranking":
        return lambda q, k: testing.eager_multiple_negatives_ranking(q, k, scale=scale)
    return lambda q, k: testing.eager_info_nce(q, k, point.temperature)


@peer("torch.compile")
def compiled(point: Point) -> Loss:
    """torch.compile of eager, compiled for each size: dynamic shapes are slower, and dynamo gives up after 8 sizes."""
    return torch.compile(eager(point), dynamic=False)


@peer("checkpointed chunks")
def checkpointed_chunks(point: Point) -> Loss | str:
    """torch.utils.checkpoint over row chunks of eager, which bounds memory and computes the logits twice."""
    if point.loss not in ("info_nce", "clip"):
        return _other_loss(point)
    rows = CHUNK_ROWS[point.device_type]

    def chunk_loss(query: Tensor, key: Tensor, start: int) -> Tensor:
        logits = query @ key.T
        logits = (logits if logits.dtype == torch.float64 else logits.float()) * point.scale
        target = torch.arange(start, start + len(query), device=query.device)
        return F.cross_entropy(logits, target, reduction="sum")

    def mean(query: Tensor, key: Tensor) -> Tensor:
        losses = [
            checkpoint(chunk_loss, part, key, i * rows, use_reentrant=False, preserve_rng_state=False)
            for i, part in enumerate(query.split(rows))
        ]
        return torch.stack(losses).sum() / len(query)

    if point.loss == "clip":
        return lambda q, k: (mean(q, k) + mean(k, q)) / 2
    return mean


@peer("F.linear_cross_entropy")
def linear_cross_entropy(point: Point) -> Loss | str:
    """F.linear_cross_entropy with `options`, without which it materialises the logits."""
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has none (2.13 has)"
    rows = CHUNK_ROWS[point.device_type]
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return _classes(point, lambda x, y, target: F.linear_cross_entropy(x, y, target, options=options))


# Others' --------------------------------------------------------------------------------------------------------------


def _cached_mnrl(point: Point, mini_batch: int) -> Loss | str:
    """CachedMultipleNegativesRankingLoss.calculate_loss(with_backward=True), the whole loss except the encoder.

    It gets the embeddings in one piece; its GradCache passes pieces of `mini_batch` rows, which costs more. Its default
    similarity is the cosine, which has another gradient, so unit vectors get dot_score. The loss runs backward itself
    and returns a leaf, as its forward does.
    """
    if point.loss not in ("info_nce", "multiple_negatives_ranking"):
        return _other_loss(point)
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.util import cos_sim, dot_score

    similarity = dot_score if point.loss == "info_nce" else cos_sim
    encoder = torch.nn.Sequential(torch.nn.Identity())  # never called
    cached = CachedMultipleNegativesRankingLoss(
        encoder, scale=point.scale, similarity_fct=similarity, mini_batch_size=mini_batch
    )

    def loss(query: Tensor, key: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return cached.calculate_loss([[query], [key]])
        return cached.calculate_loss([[query], [key]], with_backward=True).detach().requires_grad_()

    return loss


SENTENCE_TRANSFORMERS = {"package": "sentence-transformers", "module": "sentence_transformers"}


@peer("sentence-transformers, mini-batch 32", **SENTENCE_TRANSFORMERS)
def cached_mnrl(point: Point) -> Loss | str:
    """With its default mini-batch."""
    return _cached_mnrl(point, 32)


@peer("sentence-transformers, mini-batch 4096", **SENTENCE_TRANSFORMERS)
def cached_mnrl_4096(point: Point) -> Loss | str:
    return _cached_mnrl(point, 4096)


@peer("Inf-CL", package="inf-cl", module="inf_cl")
def inf_cl(point: Point) -> Loss | str:
    """cal_flash_loss(...).mean(), once a direction; it computes in tf32 for every dtype.

    cal_inf_loss(scale=) is not used because its backward calls dist.all_reduce, which raises without a process group.
    head_dim must divide D (there is no mask), and a last block that is not full reads past the end of the log-sum-exps.
    """
    if reason := _cannot(point, "fp32", "bf16", "fp16") or _not_multiple("N", point.n, 64):
        return reason
    memory = getattr(torch.cuda.get_device_properties(point.device), "shared_memory_per_block_optin", 0)
    head_dim = math.gcd(point.d, 256 if memory >= 160 << 10 else 128)  # two fp32 tiles of 64 rows in shared memory
    if head_dim < 16:
        return f"D = {point.d} is no multiple of 16"
    from inf_cl.flash import cal_flash_loss

    return _directions(point, lambda x, y: cal_flash_loss(x, y, head_dim=head_dim).mean())


@peer("memeff", package="memeff", module="memeff")
def memeff(point: Point) -> Loss | str:
    """MemoryEfficientCLIPLoss, and MemoryEfficientQwen3Loss for one direction.

    stable=True, their default, rescales the gradient; margin=1e9 turns the false-negative mask off. The temperature
    is a Python float without a gradient. The shift is always 1 / temperature: where that is far above a row's best
    logit the loss is infinite.
    """
    if reason := _cannot(point, "fp32", "bf16", "fp16"):
        return reason
    from memeff import MemoryEfficientCLIPLoss, MemoryEfficientQwen3Loss

    options = {"temperature": point.temperature, "normalized_inputs": True, "stable": False}
    if point.loss == "clip":
        return MemoryEfficientCLIPLoss(**options)
    return MemoryEfficientQwen3Loss(margin=1e9, **options)


CCE = {"package": "cut-cross-entropy", "module": "cut_cross_entropy"}


@peer("cut-cross-entropy", **CCE)
def cut_cross_entropy(point: Point) -> Loss | str:
    """linear_cross_entropy with filter_eps=None: the default leaves out tiles of small gradients."""
    if reason := _cannot(point, "bf16", "fp16"):
        return reason
    from cut_cross_entropy import linear_cross_entropy

    return _classes(point, lambda x, y, target: linear_cross_entropy(x, y, target, filter_eps=None))


@peer("cut-cross-entropy, default filter", caveat="leaves out tiles of small gradients", **CCE)
def cut_cross_entropy_filtered(point: Point) -> Loss | str:
    """With the default filter, as its users call it, it is another function: it drops gradients below a threshold.

    At N > 4096 most negatives of a flat softmax are below that threshold.
    """
    if reason := _cannot(point, "bf16", "fp16"):
        return reason
    from cut_cross_entropy import linear_cross_entropy

    return _classes(point, linear_cross_entropy)


def _liger(point: Point, budget: int) -> Loss | str:
    """LigerFusedLinearCrossEntropyFunction, the key's gradient accumulated in fp32 (the default is the inputs' dtype).

    It synchronises once a call (`.item()`). Its chunks shrink with D / N: at `chunk_mem_const` 1, its default, to
    1024 rows for N = 65536, D = 768.
    """
    if reason := _cannot(point, "fp32", "bf16", "fp16"):
        return reason
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def rows(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        unused: tuple = (None, None, -100, 0.0, 0.0, "mean", None, False)  # bias .. return_z_loss
        accumulate: tuple = (torch.float32, False, False, False, None, None)  # accum_dtype .. ce_mode
        return LigerFusedLinearCrossEntropyFunction.apply(x, y, target, *unused, *accumulate, budget)[0]

    return _classes(point, rows)


@peer("Liger", package="liger-kernel", module="liger_kernel")
def liger(point: Point) -> Loss | str:
    """At its default chunk budget."""
    return _liger(point, 1)


@peer("Liger, chunk_mem_const=8", package="liger-kernel", module="liger_kernel")
def liger_larger_chunks(point: Point) -> Loss | str:
    return _liger(point, 8)


@peer(
    "siglip-kernel",
    package="siglip-kernel",
    module="siglip_kernel",
    caveat="another loss: sigmoid, no normaliser",
    computes="siglip",
)
def siglip_kernel(point: Point) -> Loss | str:
    """fused_siglip_loss: the same three products, and a simpler loss. Both scalars get a gradient, as in training.

    Its temperature multiplies the logits: log_temperature is log(scale).
    """
    if reason := _cannot(point, "bf16", "fp16"):
        return reason
    from siglip_kernel import fused_siglip_loss

    log_scale = torch.tensor(math.log(point.scale), device=point.device, requires_grad=True)
    bias = torch.tensor(SIGLIP_BIAS, device=point.device, requires_grad=True)
    return lambda q, k: fused_siglip_loss(q, k, log_scale, bias)


def _quack(point: Point, **options: Any) -> Loss | str:
    """chunked_linear_cross_entropy in chunks of 4096 rows, its default. It compiles each kernel at its first call."""
    if reason := _cannot(point, "bf16", "fp16") or _not_multiple("N", point.n, 8) or _not_multiple("D", point.d, 8):
        return reason
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return _classes(point, lambda x, y, target: chunked_linear_cross_entropy(x, y, target, chunk_size=4096, **options))


@peer("quack", package="quack-kernels", module="quack")
def quack(point: Point) -> Loss | str:
    """The pipeline that quack picks: scaled-exp on sm_90 in bf16 if N is a multiple of 128."""
    return _quack(point)


@peer("quack, base pipeline", package="quack-kernels", module="quack")
def quack_base(point: Point) -> Loss | str:
    return _quack(point, use_scaled_exp=False)


# Shared ---------------------------------------------------------------------------------------------------------------


def _directions(point: Point, mean: Callable[[Tensor, Tensor], Tensor]) -> Loss | str:
    """`mean(x, y)` is the mean over rows of x of the cross entropy of x @ y.T; CLIP calls it once a direction."""
    if point.loss not in ("info_nce", "clip"):
        return _other_loss(point)

    def loss(query: Tensor, key: Tensor) -> Tensor:
        query = query * point.scale
        return mean(query, key) if point.loss == "info_nce" else (mean(query, key) + mean(key, query)) / 2

    return loss


def _classes(point: Point, mean: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss | str:
    """For linear cross entropies: the classes are the keys, and row i belongs to class i."""
    return _directions(point, lambda x, y: mean(x, y, torch.arange(len(x), device=x.device)))


def _cannot(point: Point, *dtypes: str) -> str | None:
    if point.device_type != "cuda":
        return "needs CUDA"
    if point.dtype not in dtypes:
        return f"needs {' or '.join(dtypes)}, not {point.dtype}"
    return None if point.loss in ("info_nce", "clip") else _other_loss(point)


def _not_multiple(name: str, value: int, of: int) -> str | None:
    return f"{name} = {value} is no multiple of {of}" if value % of else None


def _other_loss(point: Point) -> str:
    return f"has no {point.loss}"
