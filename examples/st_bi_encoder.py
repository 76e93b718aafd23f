"""sentence-transformers, bi-encoder: code search, trained from scratch by the library's trainer.

    python examples/st_bi_encoder.py
    FUSEDLOSS_DISABLE=1 python examples/st_bi_encoder.py    # the library's own loss: compare time and memory

`patch()` makes the library's losses fused; the rest is an ordinary script. The model is a StaticEmbedding, whose
tokenizer and vectors are made from the training texts; a batch has 1024 pairs. The data are those of code_search.py:
docstrings and the source that belongs to them. The measure is recall@10 on modules that training never saw.
"""

from __future__ import annotations

import argparse
import tempfile
import time

from code_search import load_pairs, read_texts
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PrinterCallback

import fusedloss.integrations
from fusedloss.bench.measure import peak_memory
from fusedloss.integrations.sentence_transformers import patch


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    words = [pre_tokenizers.Split("_", "removed"), pre_tokenizers.BertPreTokenizer()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=8000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def evaluator_of(pairs: list[tuple]) -> InformationRetrievalEvaluator:
    queries, corpus = ({str(i): pair[part] for i, pair in enumerate(pairs)} for part in (0, 2))
    return InformationRetrievalEvaluator(queries, corpus, {i: {i} for i in queries}, name="code")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a sentence-transformers bi-encoder with fused losses.")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--batch", type=int, default=1024, help="pairs in a batch")
    parser.add_argument("--megabytes", type=float, default=2, help="of Python source to read, at most")
    options = parser.parse_args()

    patch()
    train, held_out = load_pairs(options.megabytes, read_texts)
    batch = min(options.batch, len(train))
    print(f"{len(train)} training pairs, {len(held_out)} held out; batch {batch}")
    columns = {"anchor": [pair[0] for pair in train], "positive": [pair[2] for pair in train]}

    model = SentenceTransformer(
        modules=[StaticEmbedding(train_tokenizer([*columns["anchor"], *columns["positive"]]), embedding_dim=256)],
        device="cpu",
    )
    loss = losses.MultipleNegativesRankingLoss(model)
    evaluator = evaluator_of(held_out)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=batch,
            learning_rate=0.05,
            warmup_steps=0.1,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,  # there is nothing to pin for on a CPU
            report_to="none",
        )
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=Dataset.from_dict(columns), loss=loss)
        trainer.remove_callback(PrinterCallback)
        before, started = evaluator(model), time.perf_counter()
        memory = peak_memory(trainer.train)
    seconds, after = time.perf_counter() - started, evaluator(model)
    print(f"{options.steps} steps in {seconds:.0f} s, at most {memory / 2**20:.0f} MiB above the model and its data")
    print(f"Calls that ran fused: {dict(fusedloss.integrations.calls)}")
    measure = "code_cosine_recall@10"
    print(f"Held out, recall@10: {before[measure]:.3f} before, {after[measure]:.3f} after")


if __name__ == "__main__":
    main()
