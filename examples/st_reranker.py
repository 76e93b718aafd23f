"""sentence-transformers, cross-encoder: a small reranker of code, trained from scratch by the library's trainer.

    python examples/st_reranker.py

`patch()` makes the library's losses fused, here LambdaLoss, which in the library has a matrix of pairs for each list.
The model is K-NRM (Xiong et al. 2017): it counts how alike the words of a query and of a document are. A query is a
docstring of code_search.py's data; its list has the source that belongs to it and 15 others. The measure is MRR@10 on
modules that training never saw.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from typing import Any

import torch
from code_search import load_pairs, read_texts
from datasets import Dataset
from sentence_transformers.base.modules import InputModule
from sentence_transformers.cross_encoder import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    losses,
)
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from st_bi_encoder import train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PrinterCallback

import fusedloss.integrations
from fusedloss.integrations.sentence_transformers import patch

OTHERS = 15  # documents of a list that do not belong to its query
TOKENS = 64  # of a text, at most


class KernelPooling(InputModule):
    """score = w . sum over words q of the query: log sum over words d of the document: kernels(cos(q, d))"""

    def __init__(self, tokenizer: Tokenizer, dim: int = 64) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.tokenizer.enable_truncation(TOKENS)
        self.tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
        self.words = nn.Embedding(tokenizer.get_vocab_size(), dim, padding_idx=0)
        self.register_buffer("centers", torch.linspace(-0.8, 1.0, 10))
        self.head = nn.Linear(len(self.centers), 1)

    def preprocess(self, inputs: list[Any], prompt: str | None = None, **options: Any) -> dict[str, Tensor]:
        pairs = [(text, "") if isinstance(text, str) else text for text in inputs]  # the model card has single texts
        encoded = [self.tokenizer.encode_batch(list(texts)) for texts in zip(*pairs, strict=True)]
        query, document = (torch.tensor([text.ids for text in texts]) for texts in encoded)
        return {"query": query, "document": document}

    def forward(self, features: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
        query, document = features["query"], features["document"]
        similarity = F.normalize(self.words(query), dim=2) @ F.normalize(self.words(document), dim=2).mT
        kernels = torch.exp(-50 * (similarity[..., None] - self.centers) ** 2)  # of width 0.1
        found = (kernels * (document != 0)[:, None, :, None]).sum(2).clamp(min=1e-4).log()
        features["scores"] = self.head((found * (query != 0)[:, :, None]).sum(1) / 10)
        return features

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        self.save_torch_weights(output_path)
        self.save_tokenizer(output_path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a sentence-transformers reranker with fused losses.")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=16, help="queries in a batch, each with a list of 16 documents")
    parser.add_argument("--megabytes", type=float, default=4, help="of Python source to read, at most")
    options = parser.parse_args()

    torch.manual_seed(0)
    draw = random.Random(0)
    patch()
    train, held_out = load_pairs(options.megabytes, read_texts)
    print(f"{len(train)} queries to train on, {len(held_out)} held out; lists of {1 + OTHERS} documents")

    def others(pair: tuple, pairs: list[tuple]) -> list[str]:
        return [other[2] for other in draw.sample(pairs, OTHERS + 1) if other is not pair][:OTHERS]

    chosen = [draw.choice(train) for _ in range(options.steps * options.batch)]
    lists = {
        "query": [pair[0] for pair in chosen],
        "documents": [[pair[2], *others(pair, train)] for pair in chosen],
        "labels": [[1] + [0] * OTHERS for _ in chosen],
    }
    samples = [{"query": pair[0], "positive": [pair[2]], "negative": others(pair, held_out)} for pair in held_out]

    evaluator = CrossEncoderRerankingEvaluator(samples, at_k=10, name="code", write_csv=False)
    tokenizer = train_tokenizer([text for pair in train for text in (pair[0], pair[2])])
    model = CrossEncoder(modules=[KernelPooling(tokenizer)], device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        arguments = CrossEncoderTrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=options.batch,
            learning_rate=0.02,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,  # there is nothing to pin for on a CPU
            report_to="none",
        )
        loss = losses.LambdaLoss(model)
        trainer = CrossEncoderTrainer(model, arguments, train_dataset=Dataset.from_dict(lists), loss=loss)
        trainer.remove_callback(PrinterCallback)
        before, started = evaluator(model), time.perf_counter()
        trainer.train()
    print(f"{options.steps} steps in {time.perf_counter() - started:.0f} s")
    print(f"Calls that ran fused: {dict(fusedloss.integrations.calls)}")
    measure = "code_mrr@10"
    print(f"Held out, MRR@10: {before[measure]:.3f} before, {evaluator(model)[measure]:.3f} after")


if __name__ == "__main__":
    main()
