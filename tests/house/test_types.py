"""What a type checker sees: stubs that are what tools/stubs.py writes, and calls that are right or wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import stubs

import fusedloss
from fusedloss import functional, nn

ROOT = Path(__file__).parents[2]
TENSOR, STATS = "Tensor", r"tuple\[[\w.]*Tensor, .*Stats\]+"
# A line and what mypy has to say of it: the type that it reveals, an error, or nothing.
LINES = {
    "reveal_type(fusedloss.info_nce(x, x))": TENSOR,
    "reveal_type(fusedloss.info_nce(x, x, return_stats=False))": TENSOR,
    "reveal_type(fusedloss.info_nce(x, x, return_stats=True))": STATS,
    "reveal_type(functional.gist_embed(x, x, x, guide=(x, x, x), return_stats=True))": STATS,
    "reveal_type(fusedloss.nt_xent(x, x, return_stats=flag))": rf"{TENSOR} \| {STATS}",
    "reveal_type(fusedloss.siglip(x, x, 2.0))": TENSOR,
    "reveal_type(fusedloss.InfoNCELoss(temperature=0.1)(x, x))": TENSOR,
    "reveal_type(fusedloss.InfoNCELoss(0.1, return_stats=False).forward(x, x))": TENSOR,
    "reveal_type(fusedloss.InfoNCELoss(return_stats=True)(x, x))": STATS,
    "reveal_type(fusedloss.CrossEntropyLoss(x, label_smoothing=0.1)(x, x))": TENSOR,
    "held: fusedloss.InfoNCELoss = fusedloss.InfoNCELoss()": "",
    "fusedloss.SupConLoss(group=dist.group.WORLD, strategy='ring')": "",
    "fusedloss.MSELoss(reduction='sum', under=2.0)(x, x, weight=x)": "",
    "fusedloss.InfoNCELoss(temprature=0.1)": 'Unexpected keyword argument "temprature"',
    "fusedloss.InfoNCELoss(temperature='warm')": "No overload variant",
    "fusedloss.InfoNCELoss()(x)": "Too few arguments",
    "fusedloss.InfoNCELoss()(x, x, masks=x)": 'Unexpected keyword argument "masks"',
    "fusedloss.SigLipLoss(group=3)": "incompatible type",
    "fusedloss.siglip(x, x, 2.0, bakend='triton')": 'Unexpected keyword argument "bakend"',
    "fusedloss.clip(x, x, 2.0, group=3)": "No overload variant",
    "fusedloss.info_nce(x, x, return_stats=True).backward()": "has no attribute",
}
HEAD = """import torch
import torch.distributed as dist
import fusedloss
from fusedloss import functional
x = torch.ones(2, 3)
flag = bool(x.sum())
"""


@pytest.mark.parametrize("path, text", stubs.stubs().items(), ids=lambda value: getattr(value, "name", ""))
def test_a_stub_is_what_the_script_writes(path, text):
    assert path.read_text() == text, f"{path.name}: run python tools/stubs.py"


def test_every_loss_has_one_module():
    """But for the modifiers, which take a loss, and torch's longer names."""
    modules = {cls.function: name for name, cls in stubs.modules().items() if name == cls.__name__}
    without = {name for name in functional.__all__ if getattr(functional, name) not in modules}
    assert without == {"adaptive_layer", "matryoshka", "matryoshka_2d"}
    assert len(modules) == len({cls for cls in stubs.modules().values()})
    for name in stubs.modules():
        assert getattr(fusedloss, name) is getattr(nn, name)


def test_tensors_go_to_forward():
    """`tensors=` in nn.py forgets none: what is declared as a tensor is no option, but buffers and what is learnt."""
    for cls in stubs.modules().values():
        for name, p in cls.signature.parameters.items():
            tensor = re.match(r"Tensor|torch\.Tensor|masks\.Mask", str(p.annotation))
            assert not tensor or name in (*cls.buffered, *cls.learnt), (cls, name)


@pytest.mark.processes
def test_mypy_knows_a_right_call_from_a_wrong_one(tmp_path):
    pytest.importorskip("mypy")
    file = tmp_path / "calls.py"
    file.write_text(HEAD + "\n".join(LINES) + "\n")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-codes", file]
    output = subprocess.run(command, cwd=ROOT, text=True, capture_output=True).stdout
    said = [re.match(r".*calls\.py:(\d+): (?:error|note): (.*)", line) for line in output.splitlines()]
    assert said and all(said), output
    first = HEAD.count("\n") + 1
    for place, (line, expected) in enumerate(LINES.items(), first):
        told = [m[2] for m in said if m and int(m[1]) == place]
        if not expected:
            assert not told, (line, told)
        elif line.startswith("reveal_type"):
            (revealed,) = told
            assert re.fullmatch(rf'Revealed type is "(torch\._tensor\.)?{expected}"', revealed), (line, revealed)
        else:
            assert any(expected in text for text in told), (line, told)
