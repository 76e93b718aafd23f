"""The rule by which a drop-in leaves few similarities on a CPU to the library's own code."""

from __future__ import annotations

import importlib
import logging
import math
import random
from pathlib import Path

import pytest
import torch

from fusedloss.integrations import LIBRARY_UP_TO, _drop_in, calls

pytest.importorskip("tabulate")
pytestmark = [pytest.mark.upstream, pytest.mark.filterwarnings("ignore")]

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    small_cases = importlib.import_module("small_cases")

NAMES = sorted(LIBRARY_UP_TO)
N = 6
ST = "sentence_transformers"
# Others than N * N: rows times classes, scores, elements of a column of embeddings.
SIMILARITIES = {
    "pytorch_metric_learning.CosFaceLoss": N * small_cases.CLASSES,
    f"{ST}.cross_encoder.CrossEntropyLoss": N * 3,
    f"{ST}.cross_encoder.MSELoss": N,
    f"{ST}.cross_encoder.MarginMSELoss": N,
    f"{ST}.cross_encoder.MultipleNegativesRankingLoss": N * 5,
    f"{ST}.cross_encoder.CachedMultipleNegativesRankingLoss": N * 5,
}
SIMILARITIES |= dict.fromkeys(_drop_in.ELEMENTS, N * small_cases.D)


def case(name):
    """By the name that calls are counted under."""
    return small_cases.CASES[name.replace(f"{ST}.Sparse", f"{ST}.sparse_encoder.Sparse")]


def most(name, less=0):
    """Sets the rule of one class, which conftest.py undoes: what N rows have, or a little less."""
    LIBRARY_UP_TO[name] = SIMILARITIES.get(name, N * N) - less


def outcome(race, racer, dtype=torch.float32):
    leaves = [x.detach().to(dtype).requires_grad_() for x in race.leaves]
    parameters = race.parameters[racer]
    for x in parameters:
        x.grad = None
    random.seed(0)  # for losses that draw negatives
    torch.manual_seed(0)
    value = race.racers[racer](*leaves)
    if value.requires_grad:
        value.backward()
    return [value.detach(), *(x.grad for x in (*leaves, *parameters))]


def fused(name, race, dtype=torch.float32):
    """What ours gives, and whether it ran fused."""
    before = calls[name]
    found = outcome(race, "fusedloss", dtype)
    return found, calls[name] > before


@pytest.mark.parametrize("name", NAMES)
def test_few_similarities_run_the_librarys_code(name):
    race = case(name).at(N)
    most(name)
    found, ran = fused(name, race)
    assert not ran
    for own, wanted in zip(found, outcome(race, "library"), strict=True):
        assert torch.equal(own, wanted)
    most(name, less=1)
    assert fused(name, race)[1]


def test_named_backends_16_bits_and_autocast_run_ours(monkeypatch):
    name = "open_clip.SigLipLoss"
    race = small_cases.CASES[name].at(N)
    most(name)
    assert not fused(name, race)[1] and not fused(name, race, torch.float64)[1]
    assert fused(name, race, torch.bfloat16)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(name, race)[1]
    for backend in ("dense", "chunked"):
        monkeypatch.setenv("FUSEDLOSS_BACKEND", backend)
        assert fused(name, race)[1]


def test_ranks_gather_alike_whatever_their_batches(monkeypatch):
    """Two ranks, of which one has fewer rows, may not come to different exchanges."""
    name = "open_clip.ClipLoss"
    module = importlib.import_module("fusedloss.integrations.open_clip")
    monkeypatch.setattr(module._upstream, "gather_features", lambda image, text, **_: (image, text))
    most(name)
    x, y = torch.randn(2, N, 4)
    before = calls[name]
    module.ClipLoss(world_size=2)(x, y, torch.tensor(2.0))
    assert calls[name] == before + 1


def test_it_is_said_once_at_info(caplog, monkeypatch):
    name = "open_clip.SigLipLoss"
    monkeypatch.setattr(_drop_in, "_warned", set())
    race = small_cases.CASES[name].at(N)
    most(name)
    with caplog.at_level(logging.INFO, "fusedloss"):
        for _ in range(2):
            fused(name, race)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and name in record.message and str(N * N) in record.message


def test_what_the_pages_promise_at_every_size_is_left_out(ours_at_every_size):
    rule = ours_at_every_size
    assert "pytorch_metric_learning.ArcFaceLoss" not in rule
    assert "sentence_transformers.cross_encoder.BinaryCrossEntropyLoss" not in rule
    assert math.isqrt(rule["pytorch_metric_learning.ContrastiveLoss"]) == 25
    assert max(rule.values()) * 4 <= 4 << 20  # bytes of a float32 matrix
