#!/usr/bin/env bash
# torch's chunked linear_cross_entropy adds the chunks' losses in bfloat16, so more chunks are less exact.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' numpy
cd "$folder"
"$folder/venv/bin/python" - << 'PYTHON'
import torch

F = torch.nn.functional
torch.manual_seed(0)
x, weight = torch.randn(4096, 16).bfloat16(), torch.randn(1024, 16).bfloat16()
target = torch.randint(1024, (4096,))
exact = F.cross_entropy(x.double() @ weight.double().T, target).item()
found = {}
for rows in (4096, 32):
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    found[4096 // rows] = F.linear_cross_entropy(x, weight, target, options=options).item()
half = 2.0 ** (torch.tensor(exact).log2().floor().item() - 8)  # of the distance between bfloat16 numbers there
print(f"torch {torch.__version__}\nexpected: {exact:.4f}, rounded once: within {half:.4f}\nseen, by number of chunks: {found}")
raise SystemExit(not abs(found[128] - exact) > 2 * half)
PYTHON
