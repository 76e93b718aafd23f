"""The registry of epilogues: what a chunk's logits become. Each is declared once, whichever backend computes it.

`tests/conformance/` runs every row on every backend that has it, and `docs/internals/epilogues.md` is printed from it.
The names are those of the families of kernels (`trust/families.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from .folds import FOLDS, SIDES, TEACHER

OPTIONS = ("masks", "softcap", "tally")  # branches of an epilogue; tally: also smoothing with a share for each row


class Epilogue(NamedTuple):
    """One row of the registry.

    name: `fold:NAME` for a fold. primitives: the functions of `backends/protocol.py` that compute it.
    sums: what it sums over a row. columns: whether it makes the same sums over a column.
    stores: what it writes in place of the logits; "" for nothing. options: the members of OPTIONS that it takes.
    """

    name: str
    primitives: tuple[str, ...]
    sums: str = ""
    columns: bool = False
    stores: str = ""
    options: tuple[str, ...] = ()


_ROW = ("operand", "inverse_norms", "prepare", "merge", "settle", "finish")
_TOGETHER, _BENT = ("stats_prefixes", "exp_prefixes", "grad_prefixes"), ("masks", "softcap")
_NORMALISER = "maximum, sum of exp(z - maximum)"

EPILOGUES: dict[str, Epilogue] = {
    row.name: row
    for row in (
        Epilogue("rows", _ROW, "once per row: norms, target's score, loss, weight/l, entry"),
        Epilogue("stats", ("stats_rows",), _NORMALISER, options=OPTIONS),
        Epilogue("stats+columns", ("stats_rows_and_columns",), _NORMALISER, True, options=OPTIONS),
        Epilogue("exp", ("exp_rows",), "E, q", stores="E = exp(z - shift)", options=OPTIONS),
        Epilogue("stored", ("exp_rows_and_columns", "weigh"), "E", True, "E, then dz", ("masks", "softcap")),
        Epilogue("grad", ("grad_rows",), "q", stores="gain * dz", options=OPTIONS),
        Epilogue("grad+columns", ("grad_rows",), "q", True, "gain * dz", ("masks", "softcap")),
        Epilogue("half", ("half_stats", "half_grad"), _NORMALISER, True, "dz_ij + dz_ji", ("tally",)),
        Epilogue("half+sides", ("half_sides", "half_sides_grad"), SIDES, True, "dloss/dvalue of both places"),
        Epilogue("half+fold", ("half_fold",), "what the fold sums", True, "dloss/dvalue of both places"),
        Epilogue("half+tops", ("half_tops",), "largest of another label, smallest of its own, their columns", True),
        Epilogue("top", ("top_rows",), "maximum and its column", options=("masks", "softcap")),
        Epilogue("guide", ("guide_room", "guide_rows", "guide_scores"), stores="one bit a column: dropped or not"),
        Epilogue("similarities", ("similarities",), stores="similarities"),
        Epilogue("prefixes", ("admitted",), "a log-sum-exp for each prefix", stores="dz of all prefixes"),
        Epilogue("together", _TOGETHER, "those of stats, exp, grad for each prefix", False, "E or gain * dz", _BENT),
        *(
            Epilogue(
                f"fold:{name}",
                ("distill_rows" if fold.sums == TEACHER else "fold_rows",),
                fold.sums,
                stores="dloss/dvalue",
            )
            for name, fold in FOLDS.items()
        ),
    )
}
