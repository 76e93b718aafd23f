"""Each example learns; the page is that of the committed runs."""

from __future__ import annotations

import importlib.util
import re

import examples_page
import pytest

# Fewer steps than the page has, where a few are enough to be better than before.
STEPS = {
    "st_bi_encoder": 10,
    "open_clip_glyphs": 60,
    "metric_learning_glyphs": 20,
    "boosted_trees": 20,
    "vocabulary_head": 10,
}
ELSEWHERE = {"code_search": "test_demo.py", "train_distributed": "test_train_distributed.py"}
NEEDS = {
    "st_reranker": ["sentence_transformers", "datasets", "accelerate"],
    "st_bi_encoder": ["sentence_transformers", "datasets", "accelerate"],
    "open_clip_glyphs": ["open_clip", "matplotlib"],
    "metric_learning_glyphs": ["pytorch_metric_learning", "matplotlib"],
    "lightly_glyphs": ["lightly", "pytorch_metric_learning", "matplotlib"],
    "boosted_trees": ["lightgbm", "scipy"],
}
ROOT = examples_page.ROOT


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("name", sorted(set(examples_page.ARGUMENTS) - set(ELSEWHERE)))
def test_learns(name, monkeypatch):
    for module in ["rich", *NEEDS.get(name, [])]:
        if importlib.util.find_spec(module) is None:  # importing it here would take as long as the example does
            pytest.skip(f"examples/{name}.py needs {module}")
    monkeypatch.delenv("FUSEDLOSS_DISABLE", raising=False)
    steps = ["--steps", str(STEPS[name])] if name in STEPS else []
    output = examples_page.run(name, [*examples_page.ARGUMENTS[name].split(), *steps])
    assert examples_page.improved(output), output
    if section_of(name) == "In the libraries people train with":
        assert re.search(r"^Calls that ran fused: \{'.+': [1-9]\d*\}$", output, re.MULTILINE), output


def section_of(name):
    return next(section for section, names in examples_page.SECTIONS.items() if name in names)


def test_every_example_is_tested():
    files = {path.stem for path in examples_page.FOLDER.glob("*.py")} - set(examples_page.DATA)
    assert files == set(examples_page.ARGUMENTS) | set(ELSEWHERE)
    for name, test in ELSEWHERE.items():
        (found,) = ROOT.glob(f"tests/*/{test}")
        assert f'"{name}.py"' in found.read_text()


def test_the_page_is_that_of_the_committed_outputs():
    assert examples_page.PAGE.read_text() == examples_page.page(examples_page.committed())


@pytest.mark.parametrize("name", examples_page.ARGUMENTS)
def test_the_committed_run_learnt_in_two_minutes(name):
    found = examples_page.committed()[name]
    assert found["command"] == examples_page.command_of(name)
    assert examples_page.improved(found["output"]), found["output"]
    assert found["cpu_seconds"] < 120


def test_an_output_without_its_measure_is_refused():
    assert examples_page.improved("Held out, recall@10: 0.100 before, 0.200 after\n")
    assert not examples_page.improved("Held out, recall@10: 0.200 before, 0.200 after\n")
    assert examples_page.improved("Held out, perplexity: 900 before, 100 after\n")
    with pytest.raises(ValueError, match=r"must print one line `Held out, \.\.\.`, got 0"):
        examples_page.improved("recall@10: 0.100 before, 0.200 after\n")
