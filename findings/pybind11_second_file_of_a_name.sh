#!/usr/bin/env bash
# pybind11 3.1: a second extension file under a module's name is answered by the first file's module, which then tells
# the second one's origin: whoever compares two builds of a kernel library in one process compares one with itself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'pybind11==3.1.0'
cd "$folder"
for build in 1 2; do
    mkdir "build$build"
    echo "#include <pybind11/pybind11.h>
PYBIND11_MODULE(_C, m) { m.def(\"build\", [] { return $build; }); }" > "build$build/_C.cpp"
    # shellcheck disable=SC2046
    g++ -std=c++17 -O1 -shared -fPIC -fvisibility=hidden $(venv/bin/python -m pybind11 --includes) "build$build/_C.cpp" \
        -o "build$build/_C.so"
done
cat > load.py << 'PYTHON'
import importlib.machinery
import importlib.util

import pybind11


def load(file):
    loader = importlib.machinery.ExtensionFileLoader("package._C", file)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("package._C", file, loader=loader))
    loader.exec_module(module)
    return module


first, second = load("build1/_C.so"), load("build2/_C.so")
print(f"pybind11 {pybind11.__version__}\nexpected: build 2\nseen: build {second.build()}")
print(f"same module: {first is second}, origin: {second.__spec__.origin}, file: {second.__file__}")
PYTHON
venv/bin/python load.py | tee seen
grep -q 'seen: build 1' seen
grep -q 'same module: True, origin: .*build2/_C.so, file: .*build1/_C.so' seen
