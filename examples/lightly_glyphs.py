"""lightly: SimCLR with a memory bank, on pictures without labels.

    python examples/lightly_glyphs.py

`patch()` makes lightly's losses fused; head, loss and memory bank are lightly's. Two views of a picture (glyphs.py) are
shifted, turned and stretched at random; no label is used. The measure is recall@1 on characters that training never
saw: each in a serif font, under such a map, to be found among those of a sans-serif one.
"""

from __future__ import annotations

import argparse
import time

import torch
from glyphs import STYLES, Glyphs, load_glyphs
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import SimCLRProjectionHead
from metric_learning_glyphs import convolutions
from torch import Tensor, nn
from torch.nn import functional as F

import fusedloss.integrations
from fusedloss.integrations.lightly import patch
from fusedloss.search import top_k


def view(images: Tensor) -> Tensor:
    """Each picture under an affine map of its own, and paler or darker."""
    maps = torch.eye(2, 3) + torch.randn(len(images), 2, 3) * torch.tensor([0.12, 0.12, 0.08])
    moved = F.grid_sample(images, F.affine_grid(maps, list(images.shape), align_corners=False), align_corners=False)
    return moved * (0.5 + torch.rand(len(images), 1, 1, 1))


@torch.no_grad()
def recall(backbone: nn.Module, held_out: Glyphs) -> float:
    backbone.eval()
    torch.manual_seed(1)  # the same maps before and after
    sans, serif = (held_out.of(held_out.styles == style) for style in map(STYLES.index, ("Sans", "Serif")))
    _, found = top_k(backbone(view(serif.images)), backbone(sans.images), 1)
    backbone.train()
    return (sans.characters[found[:, 0]] == serif.characters).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an embedding of letters without labels.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=256, help="pictures in a batch, two views of each")
    parser.add_argument("--letters", type=int, default=1200, help="characters in all, at most")
    options = parser.parse_args()

    torch.manual_seed(0)
    patch()
    train, held_out = load_glyphs(options.letters)
    print(f"{len(train.images)} pictures to train on, {len(held_out.images)} of other characters held out")
    backbone, head = convolutions(128), SimCLRProjectionHead(128, 128, 64)
    loss_of = NTXentLoss(temperature=0.1, memory_bank_size=(2048, 64))
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=3e-3)
    before, started = recall(backbone, held_out), time.perf_counter()
    for step in range(1, options.steps + 1):
        images = train.images[torch.randperm(len(train.images))[: options.batch]]
        loss = loss_of(head(backbone(view(images))), head(backbone(view(images))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (options.steps // 4 or 1) == 0:
            print(f"step {step}: loss {loss.item():.2f}, {time.perf_counter() - started:.0f} s", flush=True)
    print(f"Calls that ran fused: {dict(fusedloss.integrations.calls)}")
    print(f"Held out, recall@1: {before:.3f} before, {recall(backbone, held_out):.3f} after")


if __name__ == "__main__":
    main()
