"""tools/cuda_resources.py reads the sm_90a kernel's schedule from its machine code: each rule is broken once here.

On text alone: what the built extension holds is asked in test_cuda_resources.py.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    """cuda_resources.py, as a module."""
    file = Path(__file__).parents[2] / "tools" / "cuda_resources.py"
    specification = importlib.util.spec_from_file_location("cuda_resources_schedule", file)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


# What ptxas makes of similarity_sm90, without all that is beside its schedule.
SM90 = """
        /*0000*/                   S2R R2, SR_TID.X ;
        /*0010*/                   BSSY B0, `(.L_x_0) ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   FENCE.VIEW.ASYNC.S ;
        /*0040*/                   SYNCS.EXCH.64 URZ, [UR8+0x38000], UR4 ;
        /*0050*/                   SYNCS.EXCH.64 URZ, [UR8+0x38020], UR6 ;
        /*0060*/                   MEMBAR.ALL.CTA ;
        /*0070*/                   FENCE.VIEW.ASYNC.S ;
.L_x_1:
        /*0080*/                   BSYNC B0 ;
.L_x_0:
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/              @!P0 BRA `(.L_x_2) ;
.L_x_3:
        /*00b0*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ;
        /*00c0*/              @!P0 BRA `(.L_x_3) ;
        /*00d0*/                   MOV R200, RZ ;
.L_x_4:
        /*00e0*/                   WARPGROUP.ARRIVE ;
        /*00f0*/                   HGMMA.64x256x16.F32 R24, gdesc[UR8], RZ, !UPT ;
        /*0120*/                   HGMMA.64x256x16.F32 R24, gdesc[UR8], R24, gsb0 ;
        /*0130*/              @!P0 BRA `(.L_x_5) ;
.L_x_7:
        /*0140*/                   WARPGROUP.ARRIVE ;
        /*0150*/                   HGMMA.64x256x16.F32 R24, gdesc[UR8], R24 ;
        /*0180*/                   HGMMA.64x256x16.F32 R24, gdesc[UR8], R24, gsb0 ;
        /*0190*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*01a0*/              @!P1 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR8+0x38020], RZ ;
        /*01b0*/              @!P0 BRA `(.L_x_7) ;
.L_x_5:
        /*01c0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*01d0*/                   FMUL R200, R201, R202 ;
        /*01e0*/                   BRA.DIV UR4, `(.L_x_4) ;
        /*01f0*/               @P0 BRA `(.L_x_4) ;
        /*0200*/                   EXIT ;
.L_x_2:
        /*0210*/                   USETMAXREG.DEALLOC.CTAPOOL 0x18 ;
        /*0220*/               @P0 BRA `(.L_x_6) ;
        /*0230*/                   LDC.64 R2, c[0x0][0x398] ;
.L_x_8:
        /*0240*/                   IMAD R20, R21.reuse, R7, R3 ;
        /*0250*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0260*/                   UTMALDG.2D [UR12], [UR6] ;
        /*0270*/               @P0 BRA `(.L_x_8) ;
.L_x_6:
        /*0280*/                   WARPSYNC.ALL ;
        /*0290*/                   EXIT ;
.L_x_9:
        /*02a0*/                   BRA `(.L_x_9);
"""
NAME = "similarity_sm90<bf16, Exp<false, true>, 256, 1>"
ASKED = {"HGMMA": 4, "UTMALDG": 2, "USETMAXREG": 2, "EX2": 8, "STG.128": 8, "registers": 168, "spilled": 0, "static": 0}
FIRST, SECOND = "/*00e0*/                   WARPGROUP.ARRIVE ;", "/*0140*/                   WARPGROUP.ARRIVE ;"


def broken(reader, text):
    entry = dict.fromkeys(reader.INSTRUCTIONS, 0) | ASKED
    counts = {name: text.count(f" {name}.") for name in ("HGMMA", "UTMALDG")}
    return reader.wrong(
        "sm_90a", "similarity_sm90<bf16, Exp<false, true>, 256, 1>", entry | counts | reader.schedule(text)
    )


def test_the_schedule_of_a_sound_kernel(reader):
    assert broken(reader, SM90) == []
    assert reader.schedule(SM90)["producer registers"] == 22  # R21; the consumers' 203 are on the other way


@pytest.mark.parametrize(
    "old, new, found",
    [
        (FIRST, "NOP ;", ["WARPGROUP.ARRIVE: 1, not 2"]),
        (SECOND, f"{SECOND}\n        /*0141*/  WARPGROUP.ARRIVE ;", ["WARPGROUP.ARRIVE: 3, not 2"]),
        (
            "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;",
            "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;",
            ["waits for all but one, then for all: 0, not 1"],
        ),
        (
            "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;",
            "NOP ;",
            ["WARPGROUP.DEPBAR: 1, not 2", "waits for all but one, then for all: 0, not 1"],
        ),
        (
            "R24, gdesc[UR8], R24 ;\n        /*0180*/",
            "R24, gdesc[UR8], R24, gsb0 ;\n        /*0180*/",
            ["commits: 3, not 2"],
        ),
        ("SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR8+0x38020], RZ ;", "MEMBAR.ALL.GPU ;", ["MEMBAR in a loop: 1, not 0"]),
        ("IMAD R20, R21.reuse, R7, R3 ;", "MEMBAR.SC.CTA ;", ["MEMBAR in a loop: 1, not 0"]),
        ("FMUL R200, R201, R202 ;", "MEMBAR.ALL.CTA ;", ["MEMBAR in a loop: 1, not 0"]),  # once a tile
        ("WARPSYNC.ALL ;", "MEMBAR.ALL.CTA ;", []),  # once a block
        ("IMAD R20, R21.reuse, R7, R3 ;", "CCTL.IVALL ;", ["CCTL.IVALL in a loop: 1, not 0"]),
        ("WARPSYNC.ALL ;", "CCTL.IVALL ;", []),
        ("MEMBAR.ALL.CTA ;", "NOP ;", ["barriers are fenced: 0, not 1"]),
        ("FENCE.VIEW.ASYNC.S ;\n.L_x_1", "NOP ;\n.L_x_1", ["barriers are fenced: 0, not 1"]),
        ("SYNCS.EXCH.64", "SYNCS.LD.64", ["barriers are fenced: 0, not 1"]),
        ("R21.reuse", "R24.reuse", ["producer registers: 25"]),
        ("IMAD R20, R21.reuse", "LDC.64 R23", ["producer registers: 25"]),
        ("IMAD R20, R21.reuse, R7, R3 ;", "IMAD R23, R2, R7, R3 ;", []),
        ("IMAD R20, R21.reuse, R7, R3 ;", "CALL.REL.NOINC `(.L_x_6) ;", ["producer calls: 1, not 0"]),
        (  # the producers get into the fold
            "WARPSYNC.ALL ;",
            "BRA `(.L_x_5) ;",
            ["producer products: 4, not 0", "producer registers: 203"],
        ),
        ("DEALLOC", "TRY_ALLOC", ["producer registers: 0", "producer loads: 0 of 2"]),
        ("UTMALDG.2D [UR12]", "UTMASTG.2D [UR12]", []),
        ("HGMMA.64x256x16.F32 R24, gdesc[UR8], RZ, !UPT ;", "NOP ;", ["HGMMA: 3, not 4"]),
    ],
)
def test_what_the_schedule_may_lose(reader, old, new, found):
    assert SM90.count(old) >= 1
    assert broken(reader, SM90.replace(old, new)) == found


def test_a_schedule_that_cannot_be_walked_is_an_error(reader):
    with pytest.raises(ValueError, match="a jump without a label: BRX"):
        reader.schedule(SM90.replace("BRA `(.L_x_8)", "BRX R2 -0x100"))
