"""docs/internals/epilogues.md, from the registry: `python tools/epilogue_table.py > docs/internals/epilogues.md`."""

from __future__ import annotations

from fusedloss.backends import BACKENDS, forms
from fusedloss.core.epilogues import EPILOGUES, Epilogue

HEAD = """# What runs where

Printed from the registry `fusedloss/core/epilogues.py` by `python tools/epilogue_table.py`; `tests/conformance/` runs
every row on every backend that has it, against fp64. *kernel*: in the tile of a hand-written kernel. *torch*: plain
torch, for a fold on the similarities that the backend computes. *formula*: materialised and differentiated by autograd.
An empty cell: the sweep takes another mode there (`DESIGN.md`, "How a chunk is swept"). The names are those of the
families of kernels that `python -m fusedloss verify` proves; the formulas are in [maths.md](maths.md). `dense`, which
takes small batches whole, computes all of them in torch.
"""
SHOWN = [name for name in BACKENDS if name != "dense"]


def page() -> str:
    rows, folds = [], []
    for row in EPILOGUES.values():
        (folds if row.name.startswith("fold:") else rows).append(row)
    return "\n".join([HEAD, "## Epilogues", "", *_table(rows), "", "## Folds", "", *_table(folds), ""])


def _table(rows: list[Epilogue]) -> list[str]:
    head = ("epilogue", "sums by row", "by column too", "stores", "options", "primitives", *SHOWN)
    lines = [head, ("---",) * len(head)]
    for row in rows:
        found, primitives = forms(row), ", ".join(f"`{name}`" for name in row.primitives)
        what = (row.sums, "yes" if row.columns else "", row.stores, ", ".join(row.options), primitives)
        lines.append((f"`{row.name}`", *what, *(found.get(name, "") for name in SHOWN)))
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    print(page(), end="")
