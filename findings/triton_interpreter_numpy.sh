#!/usr/bin/env bash
# The interpreter of Triton 3.6, which torch 2.10 and 2.11 pin, cannot take a range's end from an argument beside numpy 2.4.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'numpy==2.4.6'
"$folder/venv/bin/pip" install --quiet --no-deps 'triton==3.6.0'
cd "$folder"
cat > total.py << 'PYTHON'
import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def total(x, out, n, BLOCK: tl.constexpr):
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        sums += tl.load(x + offs, mask=offs < n, other=0.0)
    tl.store(out, tl.sum(sums))


x, out = torch.ones(10), torch.zeros(1)
seen = "nothing"
try:
    total[(1,)](x, out, 10, BLOCK=4)
    seen = f"{out.item():g}"
except Exception as error:
    seen = f"{type(error).__name__}: {error}"
print(f"triton {triton.__version__}, numpy {numpy.__version__}\nexpected: 10\nseen: {seen}")
PYTHON
run() { TRITON_INTERPRET=1 "$folder/venv/bin/python" total.py | tee seen; }
run
grep -q 'seen: InterpreterError: TypeError' seen
"$folder/venv/bin/pip" install --quiet 'numpy==2.3.5'
run
grep -q 'seen: 10' seen
