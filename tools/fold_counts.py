"""Instructions of a fold, counted in the machine code: from a tile's last product to the next one's first load.

    python tools/fold_counts.py sm_90                  # Triton's kernels, compiled here
    python tools/fold_counts.py build/fusedloss/_C.so  # those of csrc/, in an extension or cubin that nvcc has made

The shortest way that has the exponentials of every element and its stores counts: that of a tile inside of the matrix
that holds no target, as most are, where a kernel has one. Where others load, it goes on to the next tile's product.
"""

from __future__ import annotations

import heapq
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PRODUCT = re.compile(r"(?:HGMMA|HMMA|UTC\w*MMA)\b")
BEGINS = re.compile(r"(?:HGMMA|HMMA|UTC\w*MMA|UTMALDG|LDGSTS)\b")
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
END = re.compile(r"EXIT\b")  # of a block that has one tile
MARK = re.compile(r"MUFU\.EX2\b|STG\.E\.(?:\w+\.)*128\b")
# A call may be a jump in disguise. What comes back goes on behind it; the subroutine itself is not counted then.
JUMPS, LEAVES = ("BRA", "JMP", "CALL"), ("BRA", "JMP", "CALL", "EXIT", "RET")
EX2 = {"stats, columns": 2, "grad, columns": 2, "grad, columns, q": 2}  # by element, in both directions
MODES = {  # of csrc/epilogues/: whether by columns, whether with q
    ("Stats", "false"): "stats",
    ("Stats", "true"): "stats, columns",
    ("Exp", "false"): "exp",
    ("Exp", "true"): "exp, columns",
    ("Grad", "false, false"): "grad",
    ("Grad", "false, true"): "grad, q",
    ("Grad", "true, false"): "grad, columns",
    ("Grad", "true, true"): "grad, columns, q",
}


def functions(dump: str) -> dict[str, str]:
    """Of `cuobjdump -sass`: name -> text."""
    parts = re.split(r"^\s+Function : (\S+)$", dump, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def shortest(text: str, wanted: int, begins_next: re.Pattern[str] = BEGINS) -> int | None:
    """Returns the instructions on the shortest way from a product to the next tile's load that has `wanted`
    exponentials and 16-byte stores, or to the block's end if it has one tile; None if there is no such way."""
    code = [(int(at, 16), bool(guard), opcode, rest) for at, guard, opcode, rest in LINE.findall(text)]
    place = {at: number for number, (at, *_) in enumerate(code)}
    follow: dict[int, list[int]] = {}  # of jumps and ends, by place
    for number, (_, guarded, opcode, rest) in enumerate(code):
        base = opcode.partition(".")[0]
        if base in LEAVES:
            found = [place[int(t, 16)] for t in re.findall(r"\b0x([0-9a-f]+)\b", rest)[-1:] if int(t, 16) in place]
            conditional = guarded or base == "CALL" or (base in JUMPS and "," in rest)
            after = [number + 1] if conditional and number + 1 < len(code) else []
            follow[number] = (found if base in JUMPS else []) + after
    starts = sorted({0, *(n + 1 for n in follow), *(n for targets in follow.values() for n in targets)} - {len(code)})
    ends = dict(zip(starts, [*starts[1:], len(code)], strict=True))
    is_product, begins = ([bool(kind.match(opcode)) for _, _, opcode, _ in code] for kind in (PRODUCT, begins_next))
    is_mark = [bool(MARK.match(opcode)) for _, _, opcode, _ in code]

    def onward(start: int) -> list[int]:
        last = ends[start] - 1
        return follow.get(last, [last + 1] if last + 1 < len(code) else [])

    queue: list[tuple[int, int, int]] = []  # instructions, marks so far (negative), the next block
    for start, end in ends.items():
        places = [n for n in range(start, end) if is_product[n]]
        if places:
            rest = range(places[-1] + 1, end)
            queue += [(len(rest), -sum(is_mark[n] for n in rest), block) for block in onward(start)]
    heapq.heapify(queue)
    seen = set()
    while queue:
        cost, done, start = heapq.heappop(queue)
        if (start, done) in seen:
            continue
        seen.add((start, done))
        block, found = range(start, ends[start]), done
        for number in block:
            if is_mark[number]:
                found -= 1
            elif begins[number] and -found >= wanted:
                return cost + number - start
            elif is_product[number]:
                break
        else:
            for after in onward(start):
                heapq.heappush(queue, (cost + len(block), max(found, -wanted), after))
    return None if begins_next is END else shortest(text, wanted, END)


def sass(file: str) -> str:
    import compile_kernels

    return subprocess.run([compile_kernels.CUOBJDUMP, "-sass", file], capture_output=True, text=True, check=True).stdout


def of_triton(target: str) -> dict[str, tuple[float, int]]:
    """By mode: instructions by element, and the elements of a thread; of bf16, without a bias or a mask."""
    import compile_kernels as tool
    import torch

    from fusedloss.backends.triton import launching

    launching.capability_of = lambda device: divmod(tool.number(target), 10)
    launching.on_nvidia = lambda device: True
    tool.backend.multiprocessors = lambda device: 132
    for module in (tool.rows, tool.similarity):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, tool.Recorder(getattr(module, name), target))
    found = {}
    for mode in tool.MODES:
        tool.similarities(mode, torch.bfloat16, 8192, 768, plain=True)
        config = launching.picked(8192, 8192, 768, "bf16", launching.capability_of(None), mode)
        elements = config.BLOCK_M * config.BLOCK_N // (32 * config.num_warps)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(tool.Recorder.compiled.asm["cubin"])
            file.flush()
            (text,) = functions(sass(file.name)).values()
        stored = 0 if mode.startswith("stats") or config.GEMM == "descriptors" else elements // 8
        count = shortest(text, elements * EX2.get(mode, 1) + stored)
        if count is not None:
            found[mode] = (round(count / elements, 1), elements)
    return found


def of_extension(file: str) -> dict[str, tuple[float, int]]:
    """By kernel: likewise, of bf16."""
    import cuda_resources

    found = {}
    for mangled, text in functions(sass(file)).items():
        name = cuda_resources.kernel(mangled)
        if match := re.match(r"similarity_sm(80|90)<bf16, (\w+)<false, (.*?)>(?:, (\d+), 1)?>$", name):
            if (match[2], match[3]) not in MODES:
                continue
            elements = 64 if match[1] == "80" else int(match[4]) // 2
            mode = MODES[match[2], match[3]]
            stored = 0 if mode.startswith("stats") else elements // 8
            count = shortest(text, elements * EX2.get(mode, 1) + stored)
            if count is not None:
                found[name] = (round(count / elements, 1), elements)
    return found


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    (asked,) = sys.argv[1:]
    json.dump(of_extension(asked) if Path(asked).exists() else of_triton(asked), sys.stdout, indent=1)
