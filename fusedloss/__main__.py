"""python -m fusedloss info | check | bench"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m fusedloss", description="Fused losses: what runs here, how exactly, how fast."
    )
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, and every backend: available, or why not")
    commands.add_parser("check", help="each backend against fp64 on this machine; exit code 1 if one is out of budget")
    bench = commands.add_parser("bench", help="time, memory and error beside torch's own and the bare matrix products")
    bench.add_argument("--loss", choices=("info_nce", "clip", "multiple_negatives_ranking"), default="info_nce")
    bench.add_argument("--n", type=_positive, nargs="+", default=[2048, 4096, 8192], metavar="N", help="batch sizes")
    bench.add_argument("--d", type=_positive, default=384, help="embedding dimension")
    bench.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    bench.add_argument("--temperature", type=float, nargs="+", default=[0.05])
    bench.add_argument(
        "--kind", choices=("random", "pairs", "clustered"), default="random", help="how inputs are drawn"
    )
    bench.add_argument("--device", default=None, help="cpu or cuda; default: cuda where there is one")
    bench.add_argument("--rounds", type=_positive, default=5, help="interleaved rounds; medians are shown")
    bench.add_argument("--racers", nargs="+", help="only these, by the names in the table; also fusedloss:BACKEND")
    bench.add_argument("--no-memory", action="store_true", help="skip the memory runs, each a fresh process")
    bench.add_argument(
        "--claims",
        action="store_true",
        help="check the figures the README promises for a CPU; of the other options only --rounds and --out count",
    )
    bench.add_argument("--out", help="folder for JSON, CSV and PNG")
    bench.add_argument("--name", default="bench", help="their file name")
    return top


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: needs a positive number")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    arguments.command_line = list(sys.argv[1:] if argv is None else argv)
    if arguments.command == "info":
        from .info import lines

        print("\n".join(lines()))
        return 0
    if arguments.command == "check":
        from .check import main as check

        return check()
    import torch

    from .bench import main as bench

    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"--device {arguments.device}: torch {torch.__version__} sees no GPU here; --device cpu", file=sys.stderr)
        return 2
    return bench(arguments)


if __name__ == "__main__":
    sys.exit(main())
