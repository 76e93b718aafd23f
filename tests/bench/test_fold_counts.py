"""Counting instructions of a fold on a listing of known ways."""

from __future__ import annotations

import fold_counts

# A loop of products, a fold of two ways, and the next tile's load. 16 bytes a line, as in the listing of cuobjdump.
CODE = """
S2R R0, SR_TID
UTMALDG.2D [UR4], [UR8]
HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4]
@P0 BRA 0x20
FMUL R1, R1, R2
@P1 BRA 0x90
MUFU.EX2 R1, R1
MUFU.EX2 R2, R2
BRA 0xd0
FSEL R1, R1, R2, P2
MUFU.EX2 R1, R1
FSEL R2, R1, R2, P2
MUFU.EX2 R2, R2
STG.E.128 [R2], R4
@P3 BRA 0x10
EXIT
"""


def listing(lines: list[str]) -> str:
    return "\n".join(f"        /*{16 * number:04x}*/                   {line} ;" for number, line in enumerate(lines))


def test_the_shortest_way_with_all_exponentials_and_stores():
    text = listing(CODE.strip().splitlines())
    branches_and_product, exponentials, jump, store, back = 3, 2, 1, 1, 1
    assert fold_counts.shortest(text, 3) == branches_and_product + exponentials + jump + store + back
    assert fold_counts.shortest(text, 4) is None  # two exponentials and a store are all there are
    once = text.replace("@P3 BRA 0x10", "NOP")
    assert fold_counts.shortest(once, 3) == branches_and_product + exponentials + jump + store + 1


def test_a_way_that_skips_the_fold_does_not_count():
    skips = listing([*CODE.strip().splitlines()[:5], "@P1 BRA 0xe0", *CODE.strip().splitlines()[6:]])
    assert fold_counts.shortest(skips, 3) == 8  # past the branch, the two exponentials, the jump and the store


def test_functions_of_a_dump():
    dump = (
        f"\tcode for sm_90\n\t\tFunction : one\n{listing(['EXIT'])}\n\t\tFunction : two\n{listing(['NOP', 'EXIT'])}\n"
    )
    found = fold_counts.functions(dump)
    assert list(found) == ["one", "two"] and "NOP" in found["two"] and "NOP" not in found["one"]
