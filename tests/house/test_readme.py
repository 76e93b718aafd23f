"""The README runs: every Python snippet, and its tables are what the committed results say."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedloss

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run(number):
    exec(compile(SNIPPETS[number], f"README.md, snippet {number + 1}", "exec"), {})


def test_there_are_snippets():
    assert len(SNIPPETS) >= 3


def test_every_loss_stands_there():
    public = {name: value for name, value in vars(fusedloss).items() if not name.startswith("_")}
    functions = {name for name, value in public.items() if inspect.isfunction(value)}
    modules = {n for n, v in public.items() if inspect.isclass(v) and issubclass(v, torch.nn.Module)}
    assert len(functions) > 50 and len(modules) > 45
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`\n]+`", README))))
    assert functions | modules <= named


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
    assert hasattr(fusedloss, name) or f"| `{name}`" in README or f", `{name}`" in README


def test_tables_are_generated_from_the_committed_results():
    subprocess.run([sys.executable, "benchmarks/readme_table.py", "--check"], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", ["README.md", "DESIGN.md"])
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
        assert (ROOT / target).exists(), target
