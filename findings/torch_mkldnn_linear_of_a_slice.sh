#!/usr/bin/env bash
# oneDNN's linear operator in torch takes hundreds of times as long with a weight whose rows are a slice of longer rows.
# The transpose of a contiguous matrix costs nothing, so it is not strides as such; torch.mm takes both alike.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' numpy
cd "$folder"
"$folder/venv/bin/python" - << 'PYTHON'
import time

import torch

torch.set_num_threads(1)
x = torch.ones(256, 384)
weights = {
    "contiguous": torch.ones(256, 384),
    "transposed": torch.ones(384, 256).T,
    "slice of longer rows": torch.ones(256, 1536)[:, :384],
}


def seconds(multiply):
    multiply()
    taken = []
    for _ in range(3):
        start = time.thread_time()
        multiply()
        taken.append(time.thread_time() - start)
    return min(taken)


by_onednn = lambda w: lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
ratios = {}
for name, multiply in {"oneDNN": by_onednn, "torch.mm": lambda w: lambda: torch.mm(x, w.T)}.items():
    times = {kind: seconds(multiply(w)) for kind, w in weights.items()}
    ratios[name] = {kind: taken / times["contiguous"] for kind, taken in times.items()}
print(f"torch {torch.__version__}\nexpected: no weight takes more than a copy of it would, some 2 times as long at most")
print("seen, times the contiguous weight's:", {n: {k: round(r, 1) for k, r in of.items()} for n, of in ratios.items()})
onednn, mm = ratios.values()
raise SystemExit(not (onednn["slice of longer rows"] > 20 and onednn["transposed"] < 5 > mm["slice of longer rows"]))
PYTHON
