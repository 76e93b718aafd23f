#!/usr/bin/env bash
# torch.compile of torch 2.10 takes one lambda for another of the same code that differs in a positional default: where
# losses are made in a loop with their options as defaults, the second runs as the first, silently. Right in 2.13.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
cd "$folder"
cat > losses.py << 'PYTHON'
import torch


def compiled(loss):
    return torch.compile(lambda x: loss(x), backend="eager", fullgraph=True)


x = torch.ones(())
positional = {scale: lambda x, scale=scale: x * scale for scale in (2, 3)}
keyword = {scale: lambda x, *, scale=scale: x * scale for scale in (2, 3)}
print(f"torch {torch.__version__}\nexpected: [2.0, 3.0] twice")
for name, losses in (("positional", positional), ("keyword-only", keyword)):
    torch._dynamo.reset()
    print(f"seen: {name} defaults: {[compiled(loss)(x).item() for loss in losses.values()]}")
PYTHON
run() {
    "$folder/venv/bin/pip" install --quiet "torch==$1" 'numpy==2.3.5'
    "$folder/venv/bin/python" losses.py | tee seen
}
run 2.10.0
grep -q 'seen: positional defaults: \[2.0, 2.0\]' seen
grep -q 'seen: keyword-only defaults: \[2.0, 3.0\]' seen
run 2.13.0
grep -q 'seen: positional defaults: \[2.0, 3.0\]' seen
