#!/usr/bin/env bash
# ArcFaceLoss of pytorch-metric-learning: NaN gradients on the class's direction, and a jump at pi - margin.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'pytorch-metric-learning==2.9.0' 'torch==2.13.0' numpy
cd "$folder"
"$folder/venv/bin/python" - << 'PYTHON'
import pytorch_metric_learning
import torch
from pytorch_metric_learning.losses import ArcFaceLoss

loss = ArcFaceLoss(num_classes=2, embedding_size=2, margin=28.6, scale=64)
with torch.no_grad():
    loss.W.copy_(torch.eye(2))
target = torch.tensor([0])
nan = []
for sign in (1.0, -1.0):  # at 0 and 180 degrees from its class: a perfect embedding, and the worst
    x = torch.tensor([[sign, 0.0]], requires_grad=True)
    loss(x, target).backward()
    nan.append(bool(x.grad.isnan().all()))


def at(degrees: float) -> float:
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return loss(torch.stack([angle.cos(), angle.sin()])[None].float(), target).item()


step, before = at(151.41) - at(151.39), at(151.39) - at(151.37)
print(f"pytorch-metric-learning {pytorch_metric_learning.__version__}, torch {torch.__version__}")
print("expected: finite gradients at 0 and 180 degrees, and a loss that is continuous in the angle")
print(f"seen: NaN {nan}; two steps of 0.02 degrees: {before:.4f} below 180 - margin, {step:.4f} across it")
raise SystemExit(not (all(nan) and abs(step) > 10 * abs(before)))
PYTHON
