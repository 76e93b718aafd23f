"""The notebook's outputs are those of its cells, and what runs it does so as Jupyter would."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import notebook
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
NUMBER = re.compile(r"\d[\d.]*(e[-+]\d+)?%?")


@pytest.mark.slow
def test_the_notebook_has_what_its_cells_say():
    """But for numbers, which vary from machine to machine, and pictures."""
    pytest.importorskip("matplotlib", reason="the notebook draws")
    committed = json.loads(NOTEBOOK.read_text())["cells"]
    found = copy.deepcopy(committed)
    notebook.execute(found)
    assert [shape_of(cell) for cell in found] == [shape_of(cell) for cell in committed]
    before, after = map(float, re.search(r"([\d.]+) before, ([\d.]+) after training", json.dumps(found)).groups())
    assert after > before + 0.1


def shape_of(cell):
    texts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {"text/plain": output.get("text")})
        texts.append((output["output_type"], sorted(data), NUMBER.sub("#", "".join(data["text/plain"]))))
    return cell["cell_type"], cell.get("execution_count"), texts


def test_cells_run_in_order_in_one_namespace():
    cells = [
        {"cell_type": "code", "source": ["a = 1\n", "print('one')"]},
        {"cell_type": "markdown", "source": ["text"]},
        {"cell_type": "code", "source": ["a += 1\n", "a"]},
        {"cell_type": "code", "source": ["a = 3"]},
    ]
    notebook.execute(cells)
    assert [shape_of(cell) for cell in cells] == [
        ("code", 1, [("stream", ["text/plain"], "one\n")]),
        ("markdown", None, []),
        ("code", 2, [("execute_result", ["text/plain"], "#")]),
        ("code", 3, []),
    ]
    assert cells[2]["outputs"][0]["data"]["text/plain"] == ["2"]
    with pytest.raises(ZeroDivisionError):
        notebook.execute([{"cell_type": "code", "source": ["1 / 0"]}])
