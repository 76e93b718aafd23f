"""What benchmarks/in_batch.py makes of its rows."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytest.importorskip("rich")

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    in_batch = importlib.import_module("in_batch")


def test_claims_divide_by_what_they_name():
    taken = {"floor": 4.0, "better floor": 2.0, "fusedloss": 3.0, "whole square": 6.0, "single": 2.0, "loop": 9.0}
    rows = [
        {"case": case, "n": n, "racer": racer, "seconds": seconds, "memory_bytes": 64 << 20}
        for case, (n, _) in in_batch.CPU_SIZES.items()
        for racer, seconds in {**taken, "by torch.mm": 3.0}.items()
    ]
    found = {c["claim"]: c for c in in_batch.claims(rows)}
    assert found["nt_xent, 2B=16384, D=384: time over its three bare products"]["measured"] == 0.75
    assert found["over the faster of MKL's and oneDNN's"]["measured"] == 1.5
    assert found["sup_con, N=8192, D=384: time over the whole square's"]["held"] is True
    assert found["how much faster than the loop over the dims"]["measured"] == 3.0
    assert found["its MiB above inputs and gradients"]["measured"] == 64
