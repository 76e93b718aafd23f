"""What the kernels in a built fusedloss._C take, read from the library itself: nothing is compiled again.

    python tools/cuda_resources.py --table > docs/cuda-resources.md     # 20 minutes of one core; fails by the rules

The table names a digest of what was compiled. While it is that of the sources, tests compile for sm_80, sm_90 and
sm_90a alone: what the table says of the others held when it was written.

Registers, spills and shared memory are of every architecture. Disassembly takes a second a megabyte, and machine code
of all architectures comes from the same PTX: instructions are counted where it is the oldest's, the newest's or
sm_90a's, which has sources of its own.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sources import digest

SOURCES = ("csrc/**/*", "setup.py", "tools/cuda_resources.py")
Entry = dict[str, int]  # a kernel's
Found = dict[str, dict[str, Entry]]  # architecture, kernel

# What a multiprocessor has in KiB. 1 of a block's is the system's, which ptxas counts from sm_90 on.
SHARED = {80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 100: 228, 103: 228, 110: 228, 120: 100, 121: 100}
REGISTERS = 65536  # a multiprocessor's and the most of a block

INSTRUCTIONS = {
    "HMMA": r"HMMA\..*",
    "LDSM": r"LDSM\..*",
    "LDGSTS": r"LDGSTS\.E\.(?:\w+\.)*128\b.*",
    "HGMMA": r"HGMMA\..*",
    "UTMALDG": r"UTMALDG\..*",
    "USETMAXREG": r"USETMAXREG\b.*",
    "EX2": r"MUFU\.EX2\b.*",
    "LDG.128": r"LDG\.E\.(?:\w+\.)*128\b.*",
    "STG.128": r"STG\.E\.(?:\w+\.)*128\b.*",
    "STG.64": r"STG\.E\.(?:\w+\.)*64\b.*",
    "local": r"(?:LDL|STL)\b.*",
}
# Of similarity_sm90, by schedule(): the two products' fences, their waits, and nothing that serialises them.
PRODUCER_REGISTERS = 24  # kProducerRegisters of csrc/similarity_sm90.cuh
SCHEDULE = {
    "HGMMA": 4,  # 2 of the first step, 2 in the loop
    "WARPGROUP.ARRIVE": 2,
    "WARPGROUP.DEPBAR": 2,
    "waits for all but one, then for all": 1,
    "commits": 2,
    "MEMBAR in a loop": 0,
    "CCTL.IVALL in a loop": 0,  # what a wait of the scope .cluster makes of it
    "barriers are fenced": 1,
    "producer calls": 0,
    "producer products": 0,
}
OPCODE = re.compile(r"^ +/\*[0-9a-f]+\*/ +(?:@!?U?P\w+ +)?([\w.]+)", re.MULTILINE)

# Which instances there are: the table of csrc/similarity.cuh, written a second time so that none is lost there.
EPILOGUES = (
    "Stats<false, false>",
    "Stats<false, true>",
    "Stats<true, true>",
    "Exp<false, false>",
    "Exp<false, true>",
    "Exp<true, true>",
    "Grad<false, false, false>",
    "Grad<false, false, true>",
    "Grad<false, true, false>",
    "Grad<false, true, true>",
    "Grad<true, true, true>",
    "Top",
    "Opposed",
    "Pick",
    "Guide",
    "Store",
    "Fold<sigmoid, false>",
    "Fold<margin_ranking, false>",
    "Fold<pair_hinge, false>",
    "Fold<pair_hinge, true>",
    "SidesStats<linear, false>",
    "SidesStats<linear, true>",
    "SidesStats<circle, false>",
    "SidesStats<circle, true>",
    "SidesGrad<linear, false>",
    "SidesGrad<linear, true>",
    "SidesGrad<circle, false>",
    "SidesGrad<circle, true>",
)
NAMES = {"FoldKind": ("sigmoid", "margin_ranking", "pair_hinge"), "SideKind": ("linear", "circle")}
DTYPES = ("float", "fp16", "bf16")
SIMILARITIES = [(T, e) for T in DTYPES for e in EPILOGUES if T != "fp16" or not e.startswith(("Exp", "Fold", "Sides"))]
PORTABLE = {f"similarity_sm80<{T}, {epilogue}>" for T, epilogue in SIMILARITIES}
PORTABLE |= {f"prepare_kernel<{T}, {margin}>" for T in DTYPES for margin in ("false", "true")}
PORTABLE |= {f"{name}<{a}, {b}>" for name in ("scale_rows_kernel", "finish_kernel") for a in DTYPES for b in DTYPES}
PORTABLE |= {f"weigh_kernel<{T}>" for T in DTYPES} | {"merge_kernel", "settle_kernel"}
# Of which there is a kernel of sm_90a, whatever its tiles are.
SM90A = set(SIMILARITIES)


def why_not() -> str | None:
    return None if tools() else "needs cuobjdump and nvdisasm: Triton's, or a toolkit's on PATH"


@functools.cache
def tools() -> dict[str, str] | None:
    places = [os.environ.get("PATH", "")]
    if (spec := importlib.util.find_spec("triton")) and spec.origin:
        places.insert(0, str(Path(spec.origin).parent / "backends/nvidia/bin"))
    found = {name: shutil.which(name, path=os.pathsep.join(places)) for name in ("cuobjdump", "nvdisasm")}
    return found if all(found.values()) else None


# Reading --------------------------------------------------------------------------------------------------------------


def read(library: Path, cache: Path) -> tuple[str, Found]:
    """The compiler and what it made, from `cache` for a library that was read before; several processes may ask."""
    key = hashlib.sha256(library.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    file = cache / f"{key[:16]}.json"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            for old in cache.glob("*.json"):
                old.unlink()
            file.write_text(json.dumps(disassemble(library)))
    compiler, found = json.loads(file.read_text())
    return compiler, found


def disassemble(library: Path) -> tuple[str, Found]:
    found = usage(run("cuobjdump", "--dump-resource-usage", str(library)))
    with tempfile.TemporaryDirectory() as folder:
        run("cuobjdump", "--extract-elf", "all", str(library), cwd=folder)
        cubins = sorted(Path(folder).iterdir(), key=lambda file: -file.stat().st_size)
        compiler = next(filter(None, (version(file.read_bytes()) for file in cubins)), "unknown")
        asked = [
            (arch, file) for arch in sampled(list(found)) for file in cubins if file.name.endswith(f".{arch}.cubin")
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # a process each
            for (arch, _), kernels in zip(asked, pool.map(lambda one: instructions(one[1]), asked), strict=True):
                for name, counts in kernels.items():
                    found[arch][name] |= counts
    return compiler, found


def sampled(archs: list[str]) -> list[str]:
    portable = sorted((arch for arch in archs if arch[3:].isdigit()), key=lambda arch: int(arch[3:]))
    return [*dict.fromkeys([*portable[:1], *portable[-1:]]), *(arch for arch in archs if not arch[3:].isdigit())]


def usage(dump: str) -> Found:
    found: Found = {}
    name = arch = ""
    for line in dump.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function (\w+):", line):
            name = kernel(match[1])
        elif "REG:" in line:
            numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line)}
            spilled = numbers["STACK"] + numbers["LOCAL"]
            entry = {"registers": numbers["REG"], "spilled": spilled, "static": numbers["SHARED"]}
            found.setdefault(arch, {})[name] = entry
    return found


def instructions(cubin: Path) -> dict[str, Entry]:
    counts: dict[str, Entry] = {}
    for section in run("nvdisasm", "--print-code", "--no-dataflow", str(cubin)).split("\n//-----")[1:]:
        if match := re.match(r"-+ \.text\.(\w+) ", section):
            opcodes = Counter(OPCODE.findall(section))
            name = kernel(match[1])
            counts[name] = {
                what: sum(count for opcode, count in opcodes.items() if re.fullmatch(pattern, opcode))
                for what, pattern in INSTRUCTIONS.items()
            }
            if name.startswith("similarity_sm90"):
                counts[name] |= schedule(section)
    return counts


LINE = re.compile(r"^(?:(\.L_\w+):| +/\*[0-9a-f]+\*/ +(@\S+ +)?([\w.]+)(.*);)", re.MULTILINE)


def schedule(text: str) -> Entry:
    """What `SCHEDULE` asks of a kernel with producers: by its control flow, with barriers and fences in their order."""
    code, labels = [], {}
    for label, predicate, opcode, operands in LINE.findall(text):
        if label:
            labels[label] = len(code)
        else:
            code.append((bool(predicate), opcode, operands))
    opcodes = [opcode for _, opcode, _ in code]
    follow = [_follow(place, line, labels, len(code)) for place, line in enumerate(code)]
    waits = [operands.strip() for _, opcode, operands in code if opcode.startswith("WARPGROUP.DEPBAR")]
    start = [place for place, opcode in enumerate(opcodes) if opcode.startswith("USETMAXREG.DEALLOC")]
    producers = _reached(start, follow) if start else set()
    return {
        "WARPGROUP.ARRIVE": sum(opcode == "WARPGROUP.ARRIVE" for opcode in opcodes),
        "WARPGROUP.DEPBAR": len(waits),
        "waits for all but one, then for all": int(waits == ["gsb0, 0x1", "gsb0, 0x0"]),
        "commits": sum(opcode.startswith("HGMMA") and "gsb0" in operands for _, opcode, operands in code),
        "MEMBAR in a loop": _in_loops("MEMBAR", opcodes, follow),
        "CCTL.IVALL in a loop": _in_loops("CCTL.IVALL", opcodes, follow),
        "barriers are fenced": int(_fenced(opcodes)),
        "producer registers": max((_registers(code[place]) for place in producers), default=0),
        "producer calls": sum(opcodes[place].startswith("CALL") for place in producers),
        "producer loads": sum(opcodes[place].startswith("UTMALDG") for place in producers),
        "producer products": sum(opcodes[place].startswith("HGMMA") for place in producers),
    }


def _follow(place: int, line: tuple[bool, str, str], labels: dict[str, int], end: int) -> list[int]:
    """Where a thread may be next. A BSSY's target is where its threads meet, at the latest."""
    conditional, opcode, operands = line
    targets = [labels[label] for label in re.findall(r"`\((\.L_\w+)\)", operands) if label in labels]
    base = opcode.partition(".")[0]
    if (base == "BRA" and not targets) or base in ("BRX", "JMX", "JMP", "BREAK"):
        raise ValueError(f"a jump without a label: {opcode}{operands}")
    leaves = base in ("BRA", "EXIT", "RET") and not conditional
    if base == "BRA" and re.match(r" *(?:!?U?P\w+ *,|\w+ *,)", operands):
        leaves = False  # BRA P0, `(.L_x_1), or BRA.DIV UR4, `(.L_x_1)
    return targets + ([place + 1] if not leaves and place + 1 < end else [])


def _reached(start: list[int], follow: list[list[int]]) -> set[int]:
    seen, left = set(start), list(start)
    while left:
        for place in follow[left.pop()]:
            if place not in seen:
                seen.add(place)
                left.append(place)
    return seen


def _in_loops(start: str, opcodes: list[str], follow: list[list[int]]) -> int:
    """Instructions that a thread may come back to."""
    places = (place for place, opcode in enumerate(opcodes) if opcode.startswith(start))
    return sum(place in _reached(follow[place], follow) for place in places)


def _fenced(opcodes: list[str]) -> bool:
    """After the last mbarrier is made: a MEMBAR, then a fence of the asynchronous proxy, then the block's barrier."""
    made = [place for place, opcode in enumerate(opcodes) if opcode.startswith("SYNCS.EXCH")]
    if not made:
        return False
    after = [opcode.partition(".")[0] for opcode in opcodes[made[-1] + 1 :]]
    meets = next((place for place, base in enumerate(after) if base in ("BAR", "UCGABAR_ARV")), 0)
    fences = [base for base in after[:meets] if base in ("MEMBAR", "FENCE")]
    return fences[:2] == ["MEMBAR", "FENCE"]


def _registers(line: tuple[bool, str, str]) -> int:
    """The highest register's number, plus one; of a wide operand, its last one's."""
    _, opcode, operands = line
    wide = 3 if ".128" in opcode else 1 if ".64" in opcode or ".64" in operands else 0
    return max((int(number) + 1 for number in re.findall(r"\bR(\d+)\b", operands)), default=-wide) + wide


def version(cubin: bytes) -> str | None:
    match = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", cubin)
    return match[1].decode() if match else None


@functools.cache
def kernel(mangled: str) -> str:
    """similarity_sm80<float, Fold<sigmoid>>: without namespaces and parameters."""
    name = demangle(mangled).removeprefix("void ")
    name = re.sub(r"\(fusedloss::(\w+)\)(\d)", lambda match: NAMES[match[1]][int(match[2])], name)
    name = re.sub(r"fusedloss::|sm80::|sm90::|\(anonymous namespace\)::", "", name)
    return name.partition("(")[0].replace("> >", ">>")


def demangle(mangled: str) -> str:
    function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle  # torch brings it wherever it runs
    function.restype = ctypes.c_void_p
    status = ctypes.c_int()
    made = function(mangled.encode(), None, None, ctypes.byref(status))
    assert status.value == 0, mangled
    return ctypes.string_at(made).decode()  # malloc'ed, and left: a hundred names


def run(name: str, *args: str, cwd: str | None = None) -> str:
    return subprocess.run([tools()[name], *args], cwd=cwd, check=True, capture_output=True, text=True).stdout


# Rules ----------------------------------------------------------------------------------------------------------------


def threads(name: str) -> int:
    return 384 if name.startswith("similarity_sm90") else 256


def dynamic_shared(name: str) -> int:
    """What the launcher asks for."""
    if name.startswith("similarity_sm80"):
        return 3 * 2 * 128 * 128  # stages, operands, rows, bytes of D
    if match := re.fullmatch(r"similarity_sm90<.*, (\d+), \d+>", name):
        stage = (128 + int(match[1])) * 64
        stages = (192 << 10) // stage
        return stages * stage + 2 * (16 << 10) + 2 * stages * 8  # for the folds; barriers
    return 256 * 8 if name in ("merge_kernel", "settle_kernel") else 0


def missing(arch: str, kernels: dict[str, Entry]) -> set[str]:
    """Also what is there and unknown here."""
    if arch != "sm_90a":
        return PORTABLE ^ set(kernels)
    found = {re.sub(r", \d+, \d+>$", "", name).removeprefix("similarity_sm90<") for name in kernels}
    return {", ".join(one) for one in SM90A} ^ found


def wrong(arch: str, name: str, entry: Entry) -> list[str]:
    """What a kernel breaks of the rules."""
    found = []
    number = int(arch[3:].rstrip("af"))
    if entry["registers"] * threads(name) > REGISTERS:
        found.append(f"{entry['registers']} registers")
    if entry["spilled"]:
        found.append(f"spills {entry['spilled']} bytes")
    if max(entry["static"], 1024) + dynamic_shared(name) > SHARED.get(number, 100) << 10:
        found.append(f"shared memory: {entry['static']} + {dynamic_shared(name)}")
    if "local" not in entry:
        return found
    found += [f"{what} {entry[what]}" for what, wanted in uses(name).items() if bool(entry[what]) != wanted]
    if name.startswith("similarity_sm90"):
        found += [f"{what}: {entry[what]}, not {wanted}" for what, wanted in SCHEDULE.items() if entry[what] != wanted]
        if not 0 < entry["producer registers"] <= PRODUCER_REGISTERS:
            found.append(f"producer registers: {entry['producer registers']}")
        if not 0 < entry["producer loads"] == entry["UTMALDG"]:
            found.append(f"producer loads: {entry['producer loads']} of {entry['UTMALDG']}")
    return found


def faults(found: Found) -> list[str]:
    """A line for each kernel that breaks a rule, or is not there."""
    lines = []
    for arch, kernels in found.items():
        lines += [f"{arch}: {name} is missing, or is not known here" for name in sorted(missing(arch, kernels))]
        for name, entry in kernels.items():
            if broken := wrong(arch, name, entry):
                lines.append(f"{arch}: {name}: {', '.join(broken)}")
    return lines


def uses(name: str) -> dict[str, bool]:
    """Which instructions a kernel has and which not."""
    wanted = {"local": False}
    base, _, rest = name.partition("<")
    if not base.startswith("similarity"):
        loads = base in ("prepare_kernel", "weigh_kernel", "finish_kernel", "scale_rows_kernel")
        wanted |= {"LDG.128": loads, "STG.128": loads and base != "prepare_kernel", "HMMA": False}
        return wanted | ({"EX2": True} if base in ("merge_kernel", "settle_kernel") else {})
    T, _, epilogue = rest.partition(", ")
    exponentials = epilogue.startswith(("Stats", "Exp", "Grad", "Top", "Fold<sigmoid", "Sides"))  # Top's: its softcap
    stores = epilogue.startswith(("Exp", "Grad", "Store", "Fold", "SidesGrad"))
    wide = "STG.64" if T == "float" or epilogue.startswith("Store") else "STG.128"
    sm90 = base == "similarity_sm90"
    wanted |= {name: sm90 for name in ("HGMMA", "UTMALDG", "USETMAXREG")}
    wanted |= {name: not sm90 for name in ("HMMA", "LDSM", "LDGSTS")}
    return wanted | {"EX2": exponentials} | ({wide: True} if stores else {"STG.128": False})


# The table ------------------------------------------------------------------------------------------------------------


def table(compiler: str, found: Found) -> str:
    portable = [arch for arch in found if arch != "sm_90a"]
    counted = [arch for arch in sampled(list(found)) if arch in portable]
    columns = [name for name in INSTRUCTIONS if name not in ("local", "HGMMA", "UTMALDG", "USETMAXREG", "STG.64")]
    lines = [
        "# What the CUDA kernels take",
        "",
        f"csrc/ as compiled by nvcc {compiler} from sources {digest(*SOURCES)}; written by `python "
        "tools/cuda_resources.py --table` and compared with the built extension in "
        "`tests/backends/test_cuda_resources.py`. "
        "Under an architecture: registers a thread, and the bytes that it spills where it does. Shared: what the "
        f"launch asks for, KiB. Instructions are counted in the code of {' / '.join(counted)}, once where both have "
        "as many.",
        "",
        head := f"| kernel | {' | '.join(portable)} | shared | {' | '.join(columns)} |",
        "|---" * (head.count("|") - 1) + "|",
    ]
    for name in sorted(found[portable[0]], key=order):
        registers = [registers_of(found[arch][name]) for arch in portable]
        counts = [[found[arch][name][column] for arch in counted] for column in columns]
        cells = [" / ".join(map(str, dict.fromkeys(count))) if any(count) else "" for count in counts]
        lines.append(f"| {' | '.join([f'`{name}`', *registers, shared(name), *cells])} |")
    if "sm_90a" in found:
        columns = ["HGMMA", "UTMALDG", "EX2", "STG.128"]
        lines += ["", f"| kernel | sm_90a | shared | {' | '.join(columns)} |", "|---" * (len(columns) + 3) + "|"]
        for name, entry in sorted(found["sm_90a"].items(), key=lambda one: order(one[0])):
            cells = [str(entry[column] or "") for column in columns]
            lines.append(f"| {' | '.join([f'`{name}`', registers_of(entry), shared(name), *cells])} |")
    return "\n".join(lines) + "\n"


def order(name: str) -> tuple[int, str]:
    return int(not name.startswith("similarity")), name


def registers_of(entry: Entry) -> str:
    return f"{entry['registers']}" + (f" + {entry['spilled']} B" if entry["spilled"] else "")


def shared(name: str) -> str:
    return f"{dynamic_shared(name) / 1024:g}" if dynamic_shared(name) else ""


if __name__ == "__main__":
    if sys.argv[1:] != ["--table"]:
        sys.exit(__doc__)
    sys.path.append(str(Path(__file__).absolute().parents[1] / "tests" / "support"))
    import cuda_build

    found = disassemble(cuda_build.build(""))
    if broken := faults(found[1]):
        sys.exit("\n".join(broken))
    sys.stdout.write(table(*found))
