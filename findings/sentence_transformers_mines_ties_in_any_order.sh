#!/usr/bin/env bash
# mine_hard_negatives takes equal scores in the order that two calls of torch.topk happen to leave.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'sentence-transformers==6.2.0' 'datasets==5.2.0' 'torch==2.13.0' numpy
cd "$folder"
"$folder/venv/bin/python" - << 'PYTHON'
import torch
import sentence_transformers
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

TEXTS = [f"text {number}" for number in range(40)]


class Texts(torch.nn.Module):
    """Looks embeddings up by the text."""

    rows = {"question": [1.0, 0.0], "answer": [0.9, 0.1], **{text: [0.5, 0.5] for text in TEXTS}}

    def tokenize(self, texts, **options):
        return {"rows": torch.tensor([self.rows[text] for text in texts])}

    preprocess = tokenize

    def forward(self, features, **options):
        return {**features, "sentence_embedding": features["rows"]}

    def get_sentence_embedding_dimension(self):
        return 2

    get_embedding_dimension = get_sentence_embedding_dimension


model = SentenceTransformer(modules=[Texts()], device="cpu")
pairs = Dataset.from_dict({"question": ["question"], "answer": ["answer"]})
found = mine_hard_negatives(pairs, model, corpus=TEXTS, num_negatives=3, range_min=2, verbose=False)["negative"][:]
print(f"sentence-transformers {sentence_transformers.__version__}, torch {torch.__version__}")
print(f"expected, of 40 equal scores: the first by the corpus, {TEXTS[2:5]}, or at least an order\nseen: {found}")
raise SystemExit(found == sorted(found, key=TEXTS.index))
PYTHON
