"""fusedloss info | check | verify | report | bench. Commands import torch late, where Ctrl-C is handled.

`fusedloss` is the entry point that an installation makes; `python -m fusedloss` is the same command.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core import ctrl_c
from ..core.version import VERSION

EXIT_CODES = """exit codes:
  0    all is well
  1    of check: a backend is out of budget; of verify: a family of kernels has failed; of bench: our own racer failed,
       a claim does not hold, the device is lost
  2    an argument is wrong, or names something that this machine lacks
  130  Ctrl-C, after the results until then are shown
"""
COMMANDS = {
    "info": "versions, devices, variables, and every backend: available, or why not",
    "check": "each backend against fp64 on this machine; exit code 1 if one is out of budget",
    "verify": "prove the kernels on this machine and keep the verdicts, which `auto` goes by",
    "report": "versions, verdicts and races as one block to paste into an issue",
    "bench": "time, memory and error beside torch's own and the bare matrix products",
}
# The arguments and what they do, by command; "" is the program's own.
EXAMPLES = {
    "": (
        ("info", "what runs here, and what does not and why"),
        ("check --json", "errors against fp64, as JSON"),
        ("bench --n 4096", "a race at one batch size"),
    ),
    "info": (("info", "as text"), ("info --json", "as JSON")),
    "check": (("check", "a table"), ("check --json", "a row for each backend, dtype and loss, as JSON")),
    "verify": (
        ("verify", "what is not proved yet, on each kind of GPU here"),
        ("verify --device cuda:0 --backend triton --no-race", "one backend, without times"),
        ("verify --again --json", "everything once more, as JSON"),
    ),
    "report": (("report", "a block for an issue"), ("report --json", "the same without its fences")),
    "bench": (
        ("bench --n 1024 4096 --d 256", "two batch sizes of one width"),
        ("bench --loss clip --dtype bf16 --racers fusedloss eager", "two racers, by the names in the table"),
        ("bench --out results --name mine", "also writes results/mine.json, .csv and .png"),
        ("bench --claims", "the figures that the README promises for a CPU"),
    ),
}


def parser() -> argparse.ArgumentParser:
    called = "fusedloss" if Path(sys.argv[0]).stem == "fusedloss" else "python -m fusedloss"

    def form(command: str) -> dict[str, Any]:
        lines = [f"  {called} {words}\n      {text}" for words, text in EXAMPLES[command]]
        epilog = "\n".join(["examples:", *lines, "", EXIT_CODES])
        return {"epilog": epilog, "formatter_class": argparse.RawDescriptionHelpFormatter}

    top = argparse.ArgumentParser(
        prog=called, description="Fused losses: what runs here, how exactly, how fast.", **form("")
    )
    top.add_argument("--version", action="version", version=f"fusedloss {VERSION}")
    commands = top.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, **form(name))
        command.add_argument("--json", action="store_true", help="print the result as JSON instead of text")
    verify, bench = commands.choices["verify"], commands.choices["bench"]
    verify.add_argument("--device", type=place, help="cpu, cuda, xpu or cuda:INDEX; default: each kind of GPU here")
    verify.add_argument("--backend", choices=("cuda", "triton"), help="default: both")
    verify.add_argument("--family", help="only this one, by its name in the table")
    verify.add_argument("--again", action="store_true", help="prove again what is proved already")
    verify.add_argument("--no-race", action="store_true", help="only the proof: no times of what is proved")
    verify.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    bench.add_argument("--loss", choices=("info_nce", "clip", "multiple_negatives_ranking"), default="info_nce")
    bench.add_argument("--n", type=count, nargs="+", default=[2048, 4096, 8192], metavar="N", help="batch sizes")
    bench.add_argument("--d", type=count, default=384, help="embedding dimension")
    bench.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    bench.add_argument("--temperature", type=positive, nargs="+", default=[0.05])
    bench.add_argument(
        "--kind", choices=("random", "pairs", "clustered"), default="random", help="how inputs are drawn"
    )
    bench.add_argument("--device", type=device, default=None, help="cpu or cuda; default: cuda where there is one")
    bench.add_argument("--rounds", type=count, default=5, help="interleaved rounds; medians are shown")
    bench.add_argument("--racers", nargs="+", help="only these, by the names in the table; also fusedloss:BACKEND")
    bench.add_argument("--no-memory", action="store_true", help="skip the memory runs, each a fresh process")
    bench.add_argument(
        "--claims",
        action="store_true",
        help="check the figures that the README promises for a CPU; uses no other options but --rounds and --out",
    )
    bench.add_argument("--out", type=folder, help="folder for JSON, CSV and PNG")
    bench.add_argument("--name", type=file_name, default="bench", help="their file name")
    return top


def count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return number


def device(text: str) -> str:
    kind, _, index = text.partition(":")
    if text not in ("cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:INDEX, got {text!r}")
    return text


def place(text: str) -> str:
    kind, _, index = text.partition(":")
    if text not in ("cpu", "cuda", "xpu") and not (kind in ("cuda", "xpu") and index.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda, xpu, cuda:INDEX or xpu:INDEX, got {text!r}")
    return text


def folder(text: str) -> str:
    """Makes the folder now, so that a race does not end without a place to write to."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"must be a folder, got {text!r} ({error.strerror})") from None
    return text


def file_name(text: str) -> str:
    if text != Path(text).name:
        raise argparse.ArgumentTypeError(f"must be a file name, got {text!r}; pass the folder to --out")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    arguments.command_line = list(sys.argv[1:] if argv is None else argv)
    try:
        return run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return ctrl_c.CODE


def run(arguments: argparse.Namespace) -> int:
    if arguments.command == "info":
        from ..bench.machine import main as info

        return info(arguments.json)
    if arguments.command == "check":
        from .check import main as check

        return check(arguments.json)
    if arguments.command == "verify":
        return run_verify(arguments)
    if arguments.command == "report":
        from .report import main as report

        return report(arguments.json)
    ctrl_c.importing()
    import torch

    from ..bench.race import main as bench

    ctrl_c.imported()
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return bench(arguments) if has(arguments.device) else 2


def run_verify(arguments: argparse.Namespace) -> int:
    if arguments.child is not None:
        from ..proof.child import main as child

        return child(arguments.child)
    from ..core.environment import cache_dir
    from ..trust import families
    from .verify import main as verify

    try:
        cache_dir()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    known = dict.fromkeys(family for backend in families.BACKENDS for family in families.of_backend(backend))
    if arguments.family not in (None, *known):
        print(f"--family must be one of {', '.join(known)}, got {arguments.family!r}", file=sys.stderr)
        return 2
    return verify(arguments) if has(arguments.device or "cpu") else 2


def has(device: str) -> bool:
    """Returns whether the device exists, and prints an error if it does not."""
    import torch

    kind, _, index = device.partition(":")
    count = 1 if kind == "cpu" else torch.get_device_module(kind).device_count()
    if int(index or 0) < count:
        return True
    found = f"{count} GPU{'s' * (count > 1)}" if count else "no GPU"
    print(f"--device {device}: torch {torch.__version__} sees {found} here; pass --device cpu", file=sys.stderr)
    return False
