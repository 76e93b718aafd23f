"""Writes what fusedloss/_C.pyi has below its marker: the structs and launches of csrc/*_fields.h.

python tools/extension_stub.py
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
STUB = ROOT / "fusedloss" / "_C.pyi"
MARKER = "# Written by tools/extension_stub.py from csrc/*_fields.h, where every field is explained.\n"
# What a launch takes beside its struct.
LAUNCHES = {
    "rows_fields.h": "params: {}, stream: int",
    "similarity_fields.h": "strip: Strip, dtype: DType, args: {}, plan: Plan, stream: int",
}
WORD = re.compile(r"^(STRUCT|FIELD|SIZE|LAUNCH)\(([^,)]+)(?:, (\w+))?.*\)", re.MULTILINE)


def written(head: str) -> str:
    """The whole stub, given what is above the marker."""
    structs: dict[str, list[str]] = {}
    launches = []
    for file, takes in LAUNCHES.items():
        for word, first, second in WORD.findall((ROOT / "csrc" / file).read_text()):
            if word == "STRUCT":
                fields = structs.setdefault(first, [])
            elif word == "LAUNCH":
                launches.append(f"def {first}({takes.format(second)}) -> None: ...\n")
            else:
                fields.append(f"        {second}: {annotation(first)} = ...,\n")
    classes = []
    for name, fields in structs.items():
        inside = "".join(["\n        self,\n        *,\n", *fields, "    "]) if fields else "self"
        classes.append(f"class {name}:\n    def __init__({inside}) -> None: ...\n\n")
    return "".join([head, MARKER, *classes, *launches])


def annotation(cpp: str) -> str:
    if cpp.startswith("Pointers<"):
        return "list[Pointer]"
    known = {"int64_t": "int", "double": "float"}
    return "Pointer" if cpp.endswith("*") else known.get(cpp, cpp)


if __name__ == "__main__":
    STUB.write_text(written(STUB.read_text().partition(MARKER)[0]))
