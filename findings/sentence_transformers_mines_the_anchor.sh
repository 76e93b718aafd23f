#!/usr/bin/env bash
# mine_hard_negatives returns an anchor's own text as its hardest negative, where the corpus holds it.
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


class Texts(torch.nn.Module):
    """Looks embeddings up by the text."""

    rows = {"how to sort?": [1.0, 0.0], "call sorted": [0.9, 0.1], "call open": [0.5, 0.5]}

    def tokenize(self, texts, **options):
        return {"rows": torch.tensor([self.rows[text] for text in texts])}

    preprocess = tokenize

    def forward(self, features, **options):
        return {**features, "sentence_embedding": features["rows"]}

    def get_sentence_embedding_dimension(self):
        return 2

    get_embedding_dimension = get_sentence_embedding_dimension


model = SentenceTransformer(modules=[Texts()], device="cpu")
pairs = Dataset.from_dict({"question": ["how to sort?"], "answer": ["call sorted"]})
corpus = ["how to sort?", "call sorted", "call open"]  # as where questions and answers are of one kind: duplicates
found = mine_hard_negatives(pairs, model, corpus=corpus, num_negatives=1, verbose=False)["negative"][0]
print(f"sentence-transformers {sentence_transformers.__version__}")
print(f"expected: the negative of 'how to sort?' is 'call open'\nseen: {found!r}, the question itself")
raise SystemExit(found != "how to sort?")
PYTHON
