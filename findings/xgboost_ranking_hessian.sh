#!/usr/bin/env bash
# xgboost doubles the Hessian of its ranking objectives: a tree's steps are half of Newton's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps 'xgboost==3.2.0' numpy scipy  # not NCCL
cd "$folder"
"$folder/venv/bin/python" - << 'PYTHON'
import numpy
import xgboost

# One query of two documents, one tree with a leaf for each, no regularisation. At equal scores the pair's loss
# log(1 + exp(-(s1 - s0))) has, by s1, the gradient -1/2 and the second derivative 1/4: Newton's step is 2.
data = xgboost.DMatrix(numpy.array([[0.0], [1.0]]), label=numpy.array([0, 1]), qid=numpy.array([0, 0]))
options = {"eta": 1, "reg_lambda": 0, "min_child_weight": 0, "max_depth": 1, "base_score": 0}
found = []
for objective in ("rank:pairwise", "rank:ndcg"):
    booster = xgboost.train({**options, "objective": objective}, data, 1)
    found.append(booster.predict(data, output_margin=True).tolist())
print(f"xgboost {xgboost.__version__}\nexpected: leaves of -2 and 2\nseen: {found}")
raise SystemExit(not numpy.allclose(found, [[-1, 1], [-1, 1]]))
PYTHON
