"""pytorch-metric-learning: letters in many styles, one place for each letter.

    python examples/metric_learning_glyphs.py

`patch()` makes the library's losses fused; sampler, loss and measure are the library's. The data are letters in up to
twelve styles (glyphs.py). The measure is MAP@R on characters that training never saw: of the R pictures that are
nearest to one, how many show the same character, where R others do.
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch
from glyphs import Glyphs, load_glyphs
from pytorch_metric_learning import distances, losses, samplers
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import nn

import fusedloss.integrations
from fusedloss.integrations.pytorch_metric_learning import patch


def convolutions(out: int) -> nn.Sequential:
    widths, layers = [1, 16, 32, 64], []
    for given, width in itertools.pairwise(widths):
        layers += [nn.Conv2d(given, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, out))


@torch.no_grad()
def map_at_r(model: nn.Module, held_out: Glyphs) -> float:
    model.eval()
    knn = CustomKNN(distances.CosineSimilarity())
    measure = AccuracyCalculator(include=("mean_average_precision_at_r",), k="max_bin_count", knn_func=knn)
    found = measure.get_accuracy(model(held_out.images), held_out.characters)
    model.train()
    return found["mean_average_precision_at_r"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an embedding of letters in which styles do not matter.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=512, help="pictures in a batch, four of each character")
    parser.add_argument("--letters", type=int, default=1200, help="characters in all, at most")
    options = parser.parse_args()

    torch.manual_seed(0)
    patch()
    train, held_out = load_glyphs(options.letters)
    print(f"{len(train.images)} pictures to train on, {len(held_out.images)} of other characters held out")
    sampler = samplers.MPerClassSampler(train.characters, m=4, length_before_new_iter=options.batch * options.steps)
    batches = torch.tensor(list(sampler)).split(options.batch)

    model = convolutions(64)
    loss_of = losses.NTXentLoss(temperature=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before, started = map_at_r(model, held_out), time.perf_counter()
    for step, rows in enumerate(batches, 1):
        loss = loss_of(model(train.images[rows]), train.characters[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (len(batches) // 4 or 1) == 0:
            print(f"step {step}: loss {loss.item():.2f}, {time.perf_counter() - started:.0f} s", flush=True)
    print(f"Calls that ran fused: {dict(fusedloss.integrations.calls)}")
    print(f"Held out, MAP@R: {before:.3f} before, {map_at_r(model, held_out):.3f} after")


if __name__ == "__main__":
    main()
