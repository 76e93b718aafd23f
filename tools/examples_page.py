"""Runs the examples and writes examples/README.md from what they printed.

    python tools/examples_page.py                  # all of them, a quarter of an hour
    python tools/examples_page.py st_reranker      # some
    python tools/examples_page.py --check          # only says whether the page is that of the committed outputs

Outputs are kept in examples/outputs.json. An example prints its measure on modules, letters or lists that training
never saw, as `Held out, recall@10: 0.123 before, 0.456 after`.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).absolute().parent.parent
FOLDER = ROOT / "examples"
OUTPUTS, PAGE = FOLDER / "outputs.json", FOLDER / "README.md"

# What is run, and in which order the page has it.
SECTIONS = {
    "In the libraries people train with": {
        "st_bi_encoder": "",
        "st_reranker": "",
        "open_clip_glyphs": "",
        "metric_learning_glyphs": "",
        "lightly_glyphs": "",
    },
    "At a large scale": {
        "grad_cache": "",
        "memory_bank": "",
        "hard_negatives": "",
        "recipes": "",
        "vocabulary_head": "",
        "boosted_trees": "",
    },
}
ARGUMENTS = {name: arguments for section in SECTIONS.values() for name, arguments in section.items()}
DATA = ("glyphs",)  # what examples import, and nobody runs
HELD_OUT = re.compile(r"^Held out, (.+): ([\d.]+) before, ([\d.]+) after$", re.MULTILINE)
LOWER_IS_BETTER = ("perplexity",)
PROGRESS = re.compile(r"^(?:Reading modules \d+/\d+.*)?\n", re.MULTILINE)

HEAD = """# Examples

There is an example for each library and for each feature of large scale. Each runs in under two minutes on two CPU
cores. The data is on any machine: the installed Python source, or letters of the fonts that come with matplotlib.
Models
are small and trained from scratch. Nothing is downloaded. `pip install -e .[oracles,bench]`, in the root of the
checkout,
installs what the examples need.

`python tools/examples_page.py` wrote this page from one run of each. The measure is computed on data that training
never
saw, before and after training. In `hard_negatives` it is before and after mining. In `boosted_trees` it is of BM25's
order and of the order of the trees.
[quickstart.ipynb](quickstart.ipynb) is a notebook of the first steps. `make demo` runs
[code_search.py](code_search.py), which trains at a batch of 16384 and compares the loss with eager torch.
[train_distributed.py](train_distributed.py) trains the same encoder on several
processes ([scaling](../docs/scaling.md)).

"""


def command_of(name: str) -> str:
    return " ".join(["python", f"examples/{name}.py", ARGUMENTS[name]]).strip()


def measure_of(output: str) -> tuple[str, float, float]:
    found = HELD_OUT.findall(output)
    if len(found) != 1:
        raise ValueError(f"an example must print one line `Held out, ...`, got {len(found)}")
    name, before, after = found[0]
    return name, float(before), float(after)


def improved(output: str) -> bool:
    name, before, after = measure_of(output)
    return after < before if name in LOWER_IS_BETTER else after > before


def run(name: str, arguments: list[str]) -> str:
    """What the example prints on its standard output."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{name} ended with exit code {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return PROGRESS.sub("", done.stdout)


def recorded(name: str) -> dict[str, object]:
    before = sum(os.times()[2:4])  # of processes that ended
    output = run(name, ARGUMENTS[name].split())
    seconds = round(sum(os.times()[2:4]) - before)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{cores} CPU cores, Python {platform.python_version()}, torch {importlib.metadata.version('torch')}"
    return {"command": command_of(name), "cpu_seconds": seconds, "machine": machine, "output": output}


def committed() -> dict[str, dict[str, object]]:
    return json.loads(OUTPUTS.read_text()) if OUTPUTS.exists() else {}


def page(outputs: dict[str, dict[str, object]]) -> str:
    rows, parts = [], []
    for section, names in SECTIONS.items():
        parts.append(f"## {section}\n")
        for name in names:
            found = outputs[name]
            about = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())).split("\n")[0]
            measure, before, after = HELD_OUT.findall(str(found["output"]))[0]
            rows.append([f"[{name}](#{name})", about, str(found["cpu_seconds"]), measure, before, after])
            shown = str(found["output"]).strip("\n")
            parts.append(f"### {name}\n\n{about} [Source]({name}.py).\n")
            parts.append(f"```console\n$ {found['command']}\n{shown}\n```\n")
    headers = ["example", "", "CPU seconds", "held out", "before", "after"]
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    machines = "; ".join(dict.fromkeys(str(outputs[name]["machine"]) for name in ARGUMENTS))
    about_times = (
        "CPU seconds are of the whole script, with one thread for each process. The outputs below count seconds of the "
        f"clock, while other programs ran too. Machine: {machines}."
    )
    return f"{HEAD}{table}\n\n{about_times}\n\n" + "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the examples and write examples/README.md.")
    parser.add_argument("names", nargs="*", metavar="EXAMPLE", help=f"of {', '.join(ARGUMENTS)}; all if none is given")
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    options = parser.parse_args()
    if unknown := set(options.names) - set(ARGUMENTS):
        parser.error(f"EXAMPLE must be of {', '.join(ARGUMENTS)}, got {', '.join(sorted(unknown))}")
    if options.check:
        if PAGE.read_text() != page(committed()):
            print("examples/README.md is out of date: run python tools/examples_page.py", file=sys.stderr)
            return 1
        return 0
    for name in options.names or ARGUMENTS:
        print(command_of(name), flush=True)
        found = recorded(name)
        print(f"{found['cpu_seconds']} CPU seconds: {measure_of(str(found['output']))}", flush=True)
        outputs = committed() | {name: found}
        OUTPUTS.write_text(json.dumps(outputs, indent=1, ensure_ascii=False) + "\n")
    outputs = committed()
    if missing := set(ARGUMENTS) - set(outputs):
        print(f"no page yet, these have not run: {', '.join(sorted(missing))}", file=sys.stderr)
        return 1
    PAGE.write_text(page(outputs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
