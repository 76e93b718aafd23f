"""open_clip: a small CLIP learns to read letters.

    python examples/open_clip_glyphs.py

`patch()` makes open_clip's losses fused; the rest is open_clip's own. The data are pictures of letters and their
Unicode names (glyphs.py). The measure is recall@10 on characters that training never saw: the names of all of them are
ranked for a picture. What the model knows of "e with acute" it has from other letters with an acute.
"""

from __future__ import annotations

import argparse
import time

import open_clip
import torch
from glyphs import SIDE, Glyphs, load_glyphs, name_of, one_style_each

import fusedloss.integrations
from fusedloss.integrations.open_clip import patch
from fusedloss.search import top_k

CONTEXT = 14  # tokens of a name
VISION = {"image_size": SIDE, "patch_size": 7, "width": 64, "layers": 2, "head_width": 16}
TEXT = {"context_length": CONTEXT, "width": 64, "heads": 4, "layers": 1}


@torch.no_grad()
def recall(model: open_clip.CLIP, tokens: dict[int, torch.Tensor], held_out: Glyphs) -> float:
    model.eval()
    names, answer = held_out.characters.unique(return_inverse=True)
    image = model.encode_image(held_out.images.expand(-1, 3, -1, -1), normalize=True)
    text = model.encode_text(torch.stack([tokens[int(name)] for name in names]), normalize=True)
    model.train()
    _, found = top_k(image, text, 10)
    return (found == answer[:, None]).any(1).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small CLIP on pictures of letters and their names.")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=256, help="pairs in a batch")
    parser.add_argument("--letters", type=int, default=1200, help="characters in all, at most")
    options = parser.parse_args()

    torch.manual_seed(0)
    patch()
    train, held_out = load_glyphs(options.letters)
    print(f"{len(train.images)} pictures to train on, {len(held_out.images)} of other characters held out")
    characters = torch.cat([train.characters, held_out.characters]).unique().tolist()
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    tokens = dict(zip(characters, tokenizer([name_of(character) for character in characters]), strict=True))

    model = open_clip.CLIP(64, open_clip.CLIPVisionCfg(**VISION), open_clip.CLIPTextCfg(**TEXT))
    loss_of = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.steps)
    before, started = recall(model, tokens, held_out), time.perf_counter()
    for step in range(options.steps):
        rows = one_style_each(train, options.batch)
        text = torch.stack([tokens[int(character)] for character in train.characters[rows]])
        loss = loss_of(*model(train.images[rows].expand(-1, 3, -1, -1), text))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % (options.steps // 4 or 1) == 0:
            print(f"step {step + 1}: loss {loss.item():.2f}, {time.perf_counter() - started:.0f} s", flush=True)
    print(f"Calls that ran fused: {dict(fusedloss.integrations.calls)}")
    print(f"Held out, recall@10: {before:.3f} before, {recall(model, tokens, held_out):.3f} after")


if __name__ == "__main__":
    main()
