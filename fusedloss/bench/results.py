"""The results of a race: a description of the machine, JSON, CSV in Liger-Kernel's columns, plots, and a summary."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import fusedloss

from ..core.version import VERSION
from . import peers
from .floors import FLOORS
from .machine import cpu_name

CONDITIONS = ("loss", "n", "d", "dtype", "temperature", "kind", "device")  # what makes two rows one place of the race
# The columns that Liger-Kernel's plotting scripts read, in their order; CSV_COLUMNS adds our own.
LIGER_COLUMNS = (
    *("kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name", "x_label"),
    *("x_value", "y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str", "gpu_name", "timestamp"),
    "liger_version",
)
CSV_COLUMNS = (*LIGER_COLUMNS, "fusedloss_version", "ranked", "note")


def environment(script: str | Path = __file__) -> dict[str, Any]:
    """Returns the versions, devices and settings that a figure depends on. script: a file of the checkout, if any."""
    cuda = torch.cuda.is_available()
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    return {
        "date": now(),
        "commit": _commit(Path(script)),
        "source": source(),
        "platform": platform.platform(),
        "cpu": f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "capability": [*torch.cuda.get_device_capability()] if cuda else None,
        "memory": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "cuda": torch.version.cuda,
        **(dict(zip(fields, smi(*fields), strict=False)) if cuda else {}),
        "threads": torch.get_num_threads(),
        "fusedloss": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peers": peers.versions(),
        "load before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def smi(*fields: str) -> list[str]:
    """Returns nvidia-smi's fields for the first GPU, or an empty list if it does not run."""
    found = _output("nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    return found.split(", ") if found else []


def source() -> str:
    """Returns a digest of the raced code. A commit's name would not tell a changed checkout from an unchanged one."""
    digest = hashlib.sha256()
    kernels = importlib.util.find_spec("fusedloss.kernels")
    folders = [Path(fusedloss.__file__).parent, *map(Path, (kernels and kernels.submodule_search_locations) or [])]
    files = {
        file.resolve(): file.name
        for folder in folders
        for file in folder.rglob("*.*")
        if file.suffix in (".py", ".json")
    }
    for file in sorted(files, key=lambda file: (files[file], file.read_bytes())):  # the same wherever it is installed
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _commit(here: Path) -> str | None:
    """Returns the commit of the checkout that tracks `here`, or None; "-dirty" if files other than results changed."""
    git = ("git", "-C", str(here.parent))
    if _output(*git, "ls-files", here.name) != here.name:
        return None
    changed = _output(
        *git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results"
    )
    name = _output(*git, "describe", "--always", "--exclude=*")
    return name and name + ("-dirty" if changed else "")


# Files ----------------------------------------------------------------------------------------------------------------


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Writes a new file and renames it: a run that is killed while it writes keeps the earlier file."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    new.replace(path)


def write_csv(path: Path, rows: Iterable[dict], about: dict[str, Any]) -> None:
    """Writes one line per racer, metric and mode, in the columns of Liger-Kernel's benchmark data."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        for row in rows:
            config = {key: row[key] for key in CONDITIONS if key not in ("loss", "n")}
            line = {
                "kernel_name": row["loss"],
                "kernel_provider": row["racer"],
                "x_name": "N",
                "x_label": "batch size",
                "x_value": row["n"],
                "extra_benchmark_config_str": json.dumps(config),
                "gpu_name": about["device"],
                "timestamp": about["date"],
                "liger_version": about["peers"].get("liger-kernel"),
                "fusedloss_version": about["fusedloss"],
                "ranked": row.get("ranked"),
                "note": row.get("note"),
            }
            for metric, unit, mode, values in _metrics(row):
                names = ("y_value_50", "y_value_20", "y_value_80")
                measured = dict(zip(names, values, strict=True))
                writer.writerow(
                    {**line, "metric_name": metric, "metric_unit": unit, "kernel_operation_mode": mode, **measured}
                )


def _metrics(row: dict) -> Iterable[tuple[str, str, str, tuple[float, float, float]]]:
    if "samples" in row:
        yield "speed", "ms", "full", spread(row["samples"])
    if "forward_samples" in row:
        yield "speed", "ms", "forward", spread(row["forward_samples"])
    if "backward_seconds" in row:
        yield "speed", "ms", "backward", (row["backward_seconds"] * 1e3, math.nan, math.nan)  # a difference of medians
    if row.get("memory_bytes") is not None:
        yield "memory", "MB", "full", (row["memory_bytes"] / 2**20,) * 3
    if row.get("gradient_error") is not None:
        yield "gradient error", "relative", "full", (row["gradient_error"],) * 3


def spread(samples: list[float]) -> tuple[float, float, float]:
    """Returns the median, the 20th and the 80th percentile, in ms."""
    ms = [s * 1e3 for s in samples]
    fifths = statistics.quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else ms * 4
    return statistics.median(ms), fifths[0], fifths[3]


def plot(path: Path, rows: list[dict], title: str) -> None:
    """Plots time over the floor, and memory, against the batch size: a row of panels per D, a line per racer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dims = sorted({row["d"] for row in rows})
    figure, axes = plt.subplots(len(dims), 2, figsize=(11, 1 + 3.2 * len(dims)), constrained_layout=True, squeeze=False)
    panels = [("ratio", "time over the bare products", 1), ("memory_bytes", "MiB above inputs and gradients", 2**20)]
    several = [key for key in ("temperature", "kind") if len({row[key] for row in rows}) > 1]
    lines = list(
        dict.fromkeys((row["racer"], *(row[key] for key in several)) for row in rows if row["racer"] not in FLOORS)
    )
    sizes = sorted({row["n"] for row in rows})
    for d, (time, memory) in zip(dims, axes, strict=True):
        for axis, (key, label, unit) in zip((time, memory), panels, strict=True):
            for number, line in enumerate(lines):
                mine = [r for r in rows if r["d"] == d and (r["racer"], *(r[key] for key in several)) == line]
                # A log axis cannot show 0 bytes, the result of a step that stays within its process's earlier memory.
                points = sorted((r["n"], r[key] / unit) for r in mine if (r.get(key) or 0) > 0)
                if points:
                    ranked = all(r.get("ranked", True) for r in mine)
                    name = ", ".join(map(str, line)) + ("" if ranked else " (not ranked)")
                    style = {"color": f"C{number % 10}", "linestyle": "-" if ranked else "--"}
                    marker = "osD^v"[number // 10 % 5]
                    axis.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=name, **style)
            axis.set(xscale="log", yscale="log", xlabel="batch size N", ylabel=label)
            axis.set_title(f"D = {d}", fontsize="medium")
            axis.set_xticks(sizes, [str(n) for n in sizes])
            axis.minorticks_off()
            axis.grid(True, alpha=0.3)
        time.axhline(1, color="black", linestyle=":", linewidth=1)
        low, high = time.get_ylim()
        ticks = [t for t in (1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= t <= high]
        time.set_yticks(ticks, [f"{t:g}" for t in ticks])
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# Summary --------------------------------------------------------------------------------------------------------------


def summary(rows: Iterable[dict]) -> list[dict[str, Any]]:
    """Returns a line per point of the race: fusedloss's fastest backend over the floor, and the fastest ranked peer.

    `ratios` holds that ratio for each ranked backend. `workspace_bytes` is the memory above inputs, gradients and one
    accumulator [N, D] in fp32.
    """
    places: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        places.setdefault(tuple(row[key] for key in CONDITIONS), {})[row["racer"]] = row
    found = []
    for place, racers in places.items():
        plain, normalized = (_fastest_by_backend(racers.values(), how) for how in ("", ", normalize=True"))
        ours = min(plain.values(), key=lambda r: r["seconds"], default=racers.get("fusedloss", {}))
        line = dict(zip(CONDITIONS, place, strict=True))
        for name in ("seconds", "ratio", "gradient_error", "note"):
            line[name] = ours.get(name)
        if ours.get("memory_bytes") is not None:
            line["workspace_bytes"] = ours["memory_bytes"] - 4 * ours["n"] * ours["d"]
        line["ratios"] = {backend: row["ratio"] for backend, row in plain.items()}
        line["normalize_ratio"] = min((row["ratio"] for row in normalized.values()), default=None)
        rivals = [r for name, r in racers.items() if name not in FLOORS and not name.startswith("fusedloss")]
        ranked = [r for r in rivals if r.get("ranked")]
        if ranked:
            best = min(ranked, key=lambda r: r["seconds"])
            line |= {"peer": best["racer"], "peer_seconds": best["seconds"], "peer_error": best["gradient_error"]}
        found.append(line)
    return found


def _fastest_by_backend(rows: Iterable[dict], how: str) -> dict[str, dict]:
    """Returns each backend's fastest ranked row. The racer `fusedloss` counts for the backend that it ran."""
    found: dict[str, dict] = {}
    for row in sorted((row for row in rows if row.get("ranked")), key=lambda row: row["seconds"]):
        backend = row.get("backend", "")
        if row["racer"] in (f"fusedloss{how}", f"fusedloss:{backend}{how}") and backend != "reference":
            found.setdefault(backend, row)
    return found
