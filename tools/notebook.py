"""Runs the cells of a notebook in order and writes their outputs into it.

    python tools/notebook.py examples/quickstart.ipynb

It does what Jupyter's "Restart kernel and run all" does for cells of plain Python: what they print, the value of a last
expression, and figures of matplotlib as PNG. Jupyter itself is not needed.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def execute(cells: list[dict[str, Any]]) -> None:
    """Replaces the outputs of code cells. An exception of a cell is raised."""
    names: dict[str, Any] = {"__name__": "__main__"}
    number = 0
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        number += 1
        cell["execution_count"] = number
        cell["outputs"] = run("".join(cell["source"]), names, number)


def run(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    name = f"cell {number}"
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())})
    if value is not None:
        result = {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": shown(value)}
        outputs.append(result)
    return outputs


def shown(value: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"text/plain": lines(repr(value))}
    if hasattr(value, "savefig"):
        image = io.BytesIO()
        value.savefig(image, format="png", dpi=100)
        data["image/png"] = base64.b64encode(image.getvalue()).decode()
    return data


def lines(text: str) -> list[str]:
    """As notebooks hold text."""
    return text.splitlines(keepends=True)


def main() -> None:
    path = Path(sys.argv[1])
    notebook = json.loads(path.read_text())
    execute(notebook["cells"])
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
