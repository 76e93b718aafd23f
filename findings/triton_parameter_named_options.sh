#!/usr/bin/env bash
# Triton decorates a kernel with a parameter called `options`, and fails at its first launch with a SyntaxError.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'triton==3.7.1'
cd "$folder"
"$folder/venv/bin/python" - << 'PYTHON'
import pathlib

pathlib.Path("kernels.py").write_text(
    "import triton\nimport triton.language as tl\n\n\n"
    "@triton.jit\ndef store(out, options):\n    tl.store(out, options)\n"
)
import kernels  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

# What a launch does first, and needs no GPU: a function that binds the arguments, whose own parameter is `options`.
kernel, seen = kernels.store, "nothing"
try:
    create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 80, 32)))
except SyntaxError as error:
    seen = f"SyntaxError: {error.msg}"
print(f"triton {triton.__version__}\nexpected: it works, or the decorator refuses the name\nseen at the launch: {seen}")
raise SystemExit(not seen.startswith("SyntaxError: duplicate argument 'options'"))
PYTHON
