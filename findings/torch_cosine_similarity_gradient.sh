#!/usr/bin/env bash
# torch.cosine_similarity of a row shorter than eps: the gradient is not that of the value.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' numpy
cd "$folder"
"$folder/venv/bin/python" - << 'PYTHON'
import torch

F = torch.nn.functional
# |x| is under eps = 1e-8, so the value is <x, y> / eps, which is linear in x: its gradient is y / eps = (1e8, 0).
x = torch.tensor([[3e-9, 4e-9]], dtype=torch.float64, requires_grad=True)
y = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
value = F.cosine_similarity(x, y)
value.sum().backward()
step = 1e-10 * torch.eye(2, dtype=torch.float64)
slope = [((F.cosine_similarity(x.detach() + h, y) - F.cosine_similarity(x.detach() - h, y)) / 2e-10).item() for h in step]
print(f"torch {torch.__version__}\nvalue {value.item():.3f}\nexpected: its slope, {slope}\nseen: {x.grad[0].tolist()}")
seen = torch.tensor([[8.2e7, -2.4e7]], dtype=torch.float64)
raise SystemExit(not (abs(slope[0] - 1e8) < 1 and torch.allclose(x.grad, seen, rtol=1e-6)))
PYTHON
