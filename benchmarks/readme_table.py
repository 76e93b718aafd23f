"""Writes the tables of the README and of docs/ from the committed results; `--check` only says if they are up to date.

A table goes between the markers `<!-- name:start -->` and `<!-- name:end -->`, on any page, where name is its function
below.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from tabulate import tabulate

from fusedloss.backends import KERNELS
from fusedloss.bench.results import summary
from fusedloss.integrations import LIBRARY_UP_TO
from fusedloss.integrations._drop_in import ELEMENTS
from fusedloss.trust.order import is_entry, rows_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LARGE = 1 << 20  # elements: see rowwise.py
PAGES = ("README.md", "docs/index.md", "docs/exactness.md", "docs/results/*.md", "docs/integrations/index.md")
RACED = {"dtype": "bf16", "D": 768}  # of what users' GPUs report
GPU_RESULTS = ("gpu-full", "gpu")  # the first that is there


def why(folder: Path) -> str:
    """What speaks for fusedloss, with one figure each, and the machine that they are of."""
    found = json.loads((folder / "race.json").read_text())
    n, rows = largest(found["rows"])
    ours, eager = rows["fusedloss"], rows["eager"]
    return f"""\
* **Memory.** A step of InfoNCE with N = {n} takes {ours["memory_bytes"] / 2**20:.0f} MiB above its inputs and \
gradients. Eager torch takes {eager["memory_bytes"] / 2**20:.0f} MiB, which grows with N x N.
* **Speed.** The step takes {ours["ratio"]:.2f} times as long as the bare matrix products that its gradient needs. \
Eager torch takes {eager["ratio"]:.2f} times as long.
* **Exactness.** The gradient's relative error against fp64 is {ours["gradient_error"]:.1e}; that of eager torch is \
{eager["gradient_error"]:.1e}. Nothing is sampled or approximated.

Measured at D = {ours["d"]} in fp32 on {machine(found)}."""


def machine(found: dict) -> str:
    about = found["environment"]
    return f"{about['threads']} CPU cores ({about['cpu'].split(',')[0]}), torch {about['torch'].partition('+')[0]}"


def largest(rows: list[dict]) -> tuple[int, dict[str, dict]]:
    """The largest batch of a race, and the racers that ran there."""
    n = max(row["n"] for row in rows)
    return n, {row["racer"]: row for row in rows if row["n"] == n and "seconds" in row}


def speed(folder: Path) -> str:
    """The race at its largest batch."""
    found = json.loads((folder / "race.json").read_text())
    n, rows = largest(found["rows"])
    table = [
        [
            name,
            number(row, "seconds", "{:.0f}", 1e-3),
            number(row, "ratio", "{:.2f}"),
            number(row, "memory_bytes", "{:.0f}", 2**20),
        ]
        for name, row in rows.items()
    ]
    headers = [f"InfoNCE, N = {n}, D = {rows['fusedloss']['d']}, fp32", "ms", "x floor", "memory, MiB"]
    return tabulate(table, headers, tablefmt="github", disable_numparse=True)


def exact(folder: Path) -> str:
    """The race's errors of the gradient, a column for each batch."""
    rows = [row for row in json.loads((folder / "race.json").read_text())["rows"] if "gradient_error" in row]
    sizes = sorted({row["n"] for row in rows})
    at = {(row["racer"], row["n"]): row for row in rows}
    racers = [name for name in dict.fromkeys(row["racer"] for row in rows) if name in ("fusedloss", "eager")]
    table = [[name, *(number(at[name, n], "gradient_error", "{:.1e}") for n in sizes)] for name in racers]
    headers = ["gradient against fp64, relative error", *(f"N = {n}" for n in sizes)]
    return tabulate(table, headers, tablefmt="github", disable_numparse=True)


def status(folder: Path) -> str:
    """Whether a GPU has measured anything: one sentence, and where it stands."""
    raced = any((folder / f"{name}.json").exists() for name in GPU_RESULTS)
    reported = any((folder / "reports").glob("*.json"))
    if raced or reported:
        return "What GPUs have measured is in [the results](docs/results/gpu.md)."
    return """\
**No result of a GPU is committed yet.** The kernels, in Triton and in CUDA C++, compile for every architecture from \
sm_80 to sm_120, and their tests run on a CPU: in Triton's interpreter, and as C++ compiled for the host. On a GPU a \
kernel has to [prove itself](docs/gpu.md) against fp64 before `auto` uses it; until then the loss runs in plain torch, \
in the same bounded workspace. Nor has NCCL run: the losses across processes are tested on gloo."""


def claims(folder: Path) -> str:
    rows = [c for c in json.loads((folder / "claims.json").read_text())["claims"] if c["claim"] != "seconds"]
    verdict = {True: "yes", False: "**no**", None: ""}
    table = [[c["claim"], f"{c['measured']:.3g}", c["required"] or "", verdict[c["held"]]] for c in rows]
    return tabulate(table, ["", "measured", "required", "held"], tablefmt="github", disable_numparse=True)


def race(folder: Path) -> str:
    rows = json.loads((folder / "race.json").read_text())["rows"]
    here = [row for row in rows if "seconds" in row or not row.get("note", "").startswith("not run: ")]
    better = any("better_ratio" in row for row in here)
    table = [
        [
            str(row["n"]),
            row["racer"],
            number(row, "seconds", "{:.0f}", 1e-3),
            number(row, "ratio", "{:.2f}"),
            *([number(row, "better_ratio", "{:.2f}")] * better),
            number(row, "memory_bytes", "{:.0f}", 2**20),
            number(row, "gradient_error", "{:.1e}"),
            row.get("note", ""),
        ]
        for row in here
    ]
    headers = ["N", "racer", "ms", "x floor", *["x better floor"] * better, "memory, MiB", "gradient error", ""]
    return tabulate(table, headers, tablefmt="github", disable_numparse=True) + absent(rows)


def in_batch(folder: Path) -> str:
    """Claims of the in-batch family, and the libraries that it replaces at the sizes they survive."""
    path = folder / "in_batch.json"
    if not path.exists():
        return "**Not measured yet**; `benchmarks/in_batch.py` does."
    found = json.loads(path.read_text())
    verdict = {True: "yes", False: "**no**", None: ""}
    table = [[c["claim"], f"{c['measured']:.3g}", c["required"] or "", verdict[c["held"]]] for c in found["claims"]]
    text = tabulate(table, ["", "measured", "required", "held"], tablefmt="github", disable_numparse=True)
    rows = [
        [
            row["case"],
            str(row["n"]),
            row["racer"],
            number(row, "seconds", "{:.0f}", 1e-3),
            number(row, "memory_bytes", "{:.0f}", 2**20),
            row.get("note", "") + (f" (run of {row['kept_from'][:10]})" if "kept_from" in row else ""),
        ]
        for row in found["rows"]
    ]
    headers = ["loss", "N", "", "ms", "memory, MiB", ""]
    return text + "\n\n" + tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def options(folder: Path) -> str:
    """Options over the loss without them, and distillation over its bare products."""
    path = folder / "options.json"
    if not path.exists():
        return "**Not measured yet**; `benchmarks/options.py` does."
    verdict = {True: "yes", False: "**no**", None: ""}
    rows = [
        [
            row["case"],
            row["racer"],
            number(row, "seconds", "{:.0f}", 1e-3),
            number(row, "ratio", "{:.3f}"),
            "" if row["most"] is None else f"at most {row['most']}",
            verdict[row["held"]],
            number(row, "memory_bytes", "{:.0f}", 2**20),
        ]
        for row in json.loads(path.read_text())["rows"]
    ]
    headers = ["loss", "", "ms", "ratio", "required", "held", "memory, MiB"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def drop_in(folder: Path) -> str:
    """Claims of the drop-ins, and the loss stages of the libraries that they replace."""
    path = folder / "drop_in.json"
    if not path.exists():
        return "**Not measured yet**; `benchmarks/drop_in.py` does."
    found = json.loads(path.read_text())
    verdict = {True: "yes", False: "**no**", None: ""}
    table = [[c["claim"], f"{c['measured']:.3g}", c["required"] or "", verdict[c["held"]]] for c in found["claims"]]
    text = tabulate(table, ["", "measured", "required", "held"], tablefmt="github", disable_numparse=True)
    rows = [
        [
            row["case"],
            str(row["n"]),
            row["racer"],
            number(row, "seconds", "{:.0f}", 1e-3),
            number(row, "memory_bytes", "{:.1f}", 2**20),
        ]
        for row in found["rows"]
    ]
    headers = ["loss", "N", "", "ms", "memory, MiB"]
    return text + "\n\n" + tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def upstream(folder: Path) -> str:
    """The libraries' own tests, without the drop-ins and with them."""
    path = folder / "upstream.json"
    if not path.exists():
        return "**Not run yet**; `make test-upstream CHECKOUT=...` does."

    def said(counts: dict[str, int]) -> str:
        return ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items(), key=lambda c: -c[1]))

    table = [
        [
            f"{library} {found['version']}",
            said(found["stock"]),
            said(found["patched"]),
            str(len(found["broken"])),
            str(sum(found["calls"].values())),
        ]
        for library, found in json.loads(path.read_text()).items()
    ]
    headers = ["library", "its tests", "with patch()", "pass only without", "calls that ran fused"]
    return tabulate(table, headers, tablefmt="github", disable_numparse=True)


def library_up_to(folder: Path) -> str:
    """Up to which sizes a drop-in runs the library's code on a CPU, out of the rule itself."""
    table = []
    for name, most in LIBRARY_UP_TO.items():
        of, rows = "similarities", math.isqrt(most)
        if name in ELEMENTS:
            of, rows = "elements of a column", most // 384
        elif ".cross_encoder." in name:
            of, rows = "scores", most
        table.append([name.replace(".", " `", 1) + "`", str(most), of, str(rows)])
    headers = ["class", "most", "of", "rows: square, D = 384, one score each"]
    return tabulate(table, headers, tablefmt="github", disable_numparse=True)


def classes(folder: Path) -> str:
    """Losses over classes beside their bare products and the expressions they replace."""
    path = folder / "classes.json"
    if not path.exists():
        return "**Not measured yet**; `benchmarks/classes.py` does."
    rows = [
        [
            row["case"],
            row["racer"],
            number(row, "seconds", "{:.0f}", 1e-3),
            number(row, "ratio", "{:.2f}"),
            number(row, "memory_bytes", "{:.0f}", 2**20),
            row["note"],
        ]
        for row in json.loads(path.read_text())["rows"]
    ]
    return tabulate(rows, ["", "", "ms", "x floor", "memory, MiB", ""], tablefmt="github", disable_numparse=True)


def rowwise(folder: Path) -> str:
    """Losses without a sweep beside torch: the ratio from 2^20 elements on, and what is lost below it."""
    path = folder / "rowwise.json"
    if not path.exists():
        return "**Not measured yet**; `benchmarks/rowwise.py` does."
    rows = json.loads(path.read_text())["rows"]
    sizes = sorted({row["size"] for row in rows})
    at = {(row["loss"], row["size"]): row for row in rows}
    names = list(dict.fromkeys(row["loss"] for row in rows))

    def cell(row: dict | None) -> str:
        if row is None:
            return ""
        extra = f"{1e6 * (row['ours'] - row['torch']):+.0f} us"
        text = f"{row['ratio']:.2f}" if row["size"] >= LARGE else extra
        return text if row["held"] else f"**{text}**"

    table = [[name, *(cell(at.get((name, size))) for size in sizes)] for name in names]
    headers = ["loss", *(f"{size:,} elements".replace(",", " ") for size in sizes)]
    return tabulate(table, headers, tablefmt="github", disable_numparse=True)


FAMILIES = {
    "sweep": "Losses over a matrix of similarities",
    "rows": "Losses of rows",
    "pairs": "Losses of pairs",
    "lists": "Losses of lists",
    "elements": "Losses of elements",
    "drop-in": "Drop-ins",
    "drop-in lists": "Drop-ins of lists",
}


def small(folder: Path) -> str:
    """Every loss and every drop-in beside what it replaces: a table for each family and number of threads."""
    path = folder / "small.json"
    if not path.exists():
        return "**Not measured yet**; `benchmarks/small.py` does."
    found = json.loads(path.read_text())
    about, rows = found["environment"], found["rows"]
    commit = f" at commit {about['commit']}" if about["commit"] else ""
    versions = ", ".join([f"torch {about['torch']}", *(f"{name} {v}" for name, v in about["peers"].items())])
    text = f"{about['cpu']}, run of {about['date'][:10]}{commit}, medians of {found['rounds']} rounds: {versions}."
    raced = [row for row in rows if row["family"] in FAMILIES]
    for threads in sorted({row["threads"] for row in raced}):
        for family, title in FAMILIES.items():
            here = [row for row in raced if (row["family"], row["threads"]) == (family, threads)]
            if here:
                text += f"\n\n**{title}, {threads} thread{'s' * (threads > 1)}**\n\n" + by_size(here, small_cell)
    missed = [row for row in raced if row.get("held") is False]
    judged = [row for row in raced if row.get("held") is not None]
    text += f"\n\n{len(missed)} of {len(judged)} cells miss their bound."
    notes = dict.fromkeys(f"{row['loss']} at {row['size']}: {row['note']}" for row in raced if row.get("note"))
    left_out = [f"{name}: {why}" for name, why in found["left_out"].items()]
    if notes or left_out:
        text += f" Not run: {'; '.join([*notes, *left_out])}."
    return text


def small_compiled(folder: Path) -> str:
    """fusedloss beside torch.compile of the eager formula, where that was run."""
    path = folder / "small.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    compiled = [row for row in rows if "torch.compile" in row.get("ratios", {})]
    could = {row["loss"] for row in rows if "eager" in row.get("us", {})}
    never = sorted(could - {row["loss"] for row in compiled})
    without = f"torch.compile was not run for {', '.join(never)}." if never else ""
    if not compiled:
        return without or "**Not measured yet**; `benchmarks/small.py --compile` does."
    return by_size(compiled, lambda row: f"{row['ratios']['torch.compile']:.2f}" if row else "") + f"\n\n{without}"


def small_host(folder: Path) -> str:
    """The host's part of a step on a GPU, in us, beside eager's."""
    path = folder / "small_host.json"
    if not path.exists():
        return "**Not measured yet**; `benchmarks/small.py --host` does."
    found = json.loads(path.read_text())
    about, rows = found["environment"], found["rows"]
    commit = f" at commit {about['commit']}" if about["commit"] else ""
    text = f"{about['cpu']}, run of {about['date'][:10]}{commit}, medians of {found['rounds']} rounds, one thread: "
    text += f"torch {about['torch']}, triton {about['triton']}.\n\n" + by_size(rows, small_cell)
    notes = dict.fromkeys(f"{row['loss']}: {row['note']}" for row in rows if row.get("note"))
    return text + (f"\n\nNot run: {'; '.join(notes)}." if notes else "")


def by_size(rows: list[dict], cell: Callable[[dict | None], str]) -> str:
    """A line for each loss, a column for each size."""
    at = {(row["loss"], row["size"]): row for row in rows}
    names, sizes = (list(dict.fromkeys(row[what] for row in rows)) for what in ("loss", "size"))
    sizes.sort(key=lambda size: [int(part) for part in size.split("x")])
    table = [[name, *(cell(at.get((name, size))) for size in sizes)] for name in names]
    return tabulate(table, ["", *sizes], tablefmt="github", disable_numparse=True)


def small_cell(row: dict | None) -> str:
    """The ratio to the fastest of what is replaced and, where that is not eager, to eager. Few elements have a
    difference, the host's part two times. What misses its bound is bold."""
    if row is None or "us" not in row:
        return "" if row is None else "not run"
    if row["family"] == "host":
        text = f"{row['us']['fusedloss']:.0f} us, eager {row['us']['eager']:.0f}"
    elif "extra_us" in row:
        text = f"{row['extra_us']:+.0f} us"
    else:
        text = f"{row['ratio']:.2f}"
        if row["against"] != "eager" and "eager" in row["ratios"]:
            text += f" (eager {row['ratios']['eager']:.2f})"
    return f"**{text}**" if row["held"] is False else text


def absent(rows: list[dict]) -> str:
    """A sentence on who never ran, and why."""
    ran = {row["racer"] for row in rows if "seconds" in row}
    notes = {row["racer"]: row["note"] for row in rows if row["racer"] not in ran and row.get("note")}
    reasons: dict[str, list[str]] = {}
    for racer, note in notes.items():
        reasons.setdefault(note.removeprefix("not run: "), []).append(racer)
    if not reasons:
        return ""
    return "\n\nNot run: " + "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items()) + "."


def gpu(folder: Path) -> str:
    """What a GPU measured: fusedloss beside the fastest peer, a line per place; or that there is nothing."""
    path = next((folder / f"{name}.json" for name in GPU_RESULTS if (folder / f"{name}.json").exists()), None)
    if path is None:
        return "**No results of a GPU are committed yet**; `make gpu` writes them."
    found = json.loads(path.read_text())
    about, lines = found["environment"], summary(found["rows"])
    plain = [line for line in lines if (line["temperature"], line["kind"]) == (0.05, "random")]
    table = [
        [
            line["loss"],
            f"{line['n']} x {line['d']}",
            line["dtype"],
            number(line, "seconds", "{:.2f}", 1e-3) or line.get("note") or "",
            number(line, "ratio", "{:.2f}"),
            *(number(line["ratios"], backend, "{:.2f}") for backend in KERNELS),
            number(line, "normalize_ratio", "{:.2f}"),
            line.get("peer", ""),
            number(line, "peer_seconds", "{:.2f}", 1e-3),
            number(line, "gradient_error", "{:.1e}"),
            number(line, "peer_error", "{:.1e}"),
            number(line, "workspace_bytes", "{:.0f}", 2**20),
        ]
        for line in plain
    ]
    headers = ["loss", "N x D", "dtype", "ms", "x floor", *KERNELS, "normalized", "fastest peer", "its ms"]
    headers += ["error", "its error", "workspace, MiB"]
    versions = [f"torch {about['torch']}", f"triton {about['triton']}", f"driver {about.get('driver_version')}"]
    versions += [f"{name} {version}" for name, version in about["peers"].items()]
    commit = f" at commit {about['commit']}" if about["commit"] else ""
    text = f"{about['device']}, one run of {about['date'][:10]}{commit}: {', '.join(versions)}.\n\n"
    text += tabulate(table, headers, tablefmt="github", disable_numparse=True)
    text += "\n\nms and x floor are of fusedloss's fastest backend, `cuda` and `triton` the x floor of these two."
    text += " Scale 20, random inputs." + harder([line for line in lines if line not in plain])
    if found["left_out"]:
        text += f" {len(found['left_out'])} points did not fit into the run's time."
    text += absent(found["rows"])
    for plot in sorted(folder.glob(f"{path.stem}-*.png")):
        if plot.stem.removeprefix(f"{path.stem}-") in {row["loss"] for row in found["rows"]}:
            text += (
                f"\n\n![time and memory of every racer against the batch size](../../benchmarks/results/{plot.name})"
            )
    return text


def gpus(folder: Path) -> str:
    """What users' machines reported: a line for each machine, kind and size; or that none has."""
    rows = []
    for path in sorted((folder / "reports").glob("*.json")):
        found = json.loads(path.read_text())
        about = found["versions"]
        for device in found["devices"]:
            machine = f"{device['name']}; torch {about['torch']}, fusedloss {about['fusedloss']}"
            for entry in sorted(filter(is_entry, device["races"]), key=lambda e: (e["kind"], e["N"])):
                loss, _, bounded = entry["kind"].partition(", ")
                square = rows_of(entry) == entry["N"]
                if bounded and square and all(entry[name] == value for name, value in RACED.items()):
                    times = [number(entry["seconds"], name, "{:.3g}", 1e-3) for name in ("chunked", "reference")]
                    fastest = number(entry["seconds"], entry["backend"], "{:.3g}", 1e-3)
                    rows.append([machine, loss, str(entry["N"]), entry["backend"], fastest, *times])
                    machine = ""
    if not rows:
        return (
            "**No report of a GPU has come in yet.** After `python -m fusedloss verify`, `python -m fusedloss report` "
            "prints a block to paste into an issue."
        )
    headers = ["machine", "loss", "N", "fastest", "ms", "`chunked`, ms", "plain torch, ms"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def harder(lines: list[dict]) -> str:
    """The worst of the places at scale 100 or on clustered inputs; each of them is in the results."""
    ran = [line for line in lines if line.get("ratio") is not None]
    if not ran:
        return ""
    ratio = max(line["ratio"] for line in ran)
    error = max(line["gradient_error"] or 0.0 for line in ran)
    return f" At scale 100 or on clustered inputs, {len(ran)} places: x floor at most {ratio:.2f}, error {error:.1e}."


def number(row: dict, key: str, form: str, unit: float = 1) -> str:
    return form.format(row[key] / unit) if row.get(key) is not None else ""


TABLES = (
    why,
    speed,
    exact,
    status,
    claims,
    race,
    drop_in,
    upstream,
    library_up_to,
    in_batch,
    options,
    classes,
    rowwise,
    gpu,
    gpus,
    small,
    small_compiled,
    small_host,
)


def written(text: str, folder: Path = RESULTS) -> str:
    """The text of a page with its tables as the results have them now."""
    for table in TABLES:
        start, end = f"<!-- {table.__name__}:start -->", f"<!-- {table.__name__}:end -->"
        if start in text:
            before, rest = text.split(start)
            text = before + start + "\n" + table(folder) + "\n" + end + rest.split(end)[1]
    return text


def main() -> int:
    pages = [page for pattern in PAGES for page in sorted(ROOT.glob(pattern))]
    stale = {page: new for page in pages if (new := written(text := page.read_text())) != text}
    if "--check" in sys.argv[1:]:
        for page in stale:
            print(f"{page.relative_to(ROOT)} is out of date: run python benchmarks/readme_table.py", file=sys.stderr)
        return int(bool(stale))
    for page, text in stale.items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
