"""Code search, trained from scratch on the Python source that is already on this machine, at a batch of 16384.

    python examples/code_search.py            # a few minutes on two CPU cores; uses a GPU if there is one
    python examples/code_search.py --quick    # half a minute

A query is the first paragraph of a docstring, its document the source that the docstring was taken out of (the name of
the function stays in, as it does in real code). The encoder sees words and letter trigrams, in no order. Every other
document of the batch is a negative: 16384 x 16384 similarities, which `fusedloss.info_nce` never holds at once.

Recall is measured on modules that training never saw. Before training the encoder is a random projection of the words
that a query shares with the source, so it is not at zero: what training adds is which words matter, and which mean
the same.
"""

from __future__ import annotations

# On the screen before torch is imported, which takes seconds, and at first many.
if __name__ == "__main__":
    print("Code search, trained on the Python source of this machine; importing torch", flush=True)

import argparse
import ast
import functools
import multiprocessing
import os
import re
import signal
import sysconfig
import time
import warnings
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import fusedloss
from fusedloss.bench.measure import isolated, peak_memory, time_interleaved

TEMPERATURE = 0.05
DIM = 256
BUCKETS = 2**16
MAX_FEATURES = 256  # of one text
HELD_OUT = 10  # one module in so many
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "testing", "__pycache__"}
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")  # splits snake_case and camelCase too
GIB = 2**30

console = Console()


# Data: (docstring, source) pairs


def find_modules(megabytes: float) -> list[tuple[int, str]]:
    """(hash, path) of the Python files of the standard library and of the installed packages, up to a total size.

    In the order of the hash, so that a cap takes a sample of every package instead of the first few.
    """
    modules = []
    for root in {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}:
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
            for file in files:
                path = os.path.join(folder, file)
                if file.endswith(".py") and os.path.isfile(path):
                    modules.append((zlib.crc32(os.path.relpath(path, root).encode()), path))
    modules.sort()
    sizes = np.cumsum([os.path.getsize(path) for _, path in modules])
    return modules[: int(np.searchsorted(sizes, megabytes * 1e6))]


def read_texts(path: str) -> list[tuple]:
    """(query, title, source) of each documented definition."""
    try:
        with open(path, encoding="utf-8") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            text = file.read()
            tree = ast.parse(text)
    except (SyntaxError, ValueError, OSError, RecursionError):
        return []
    lines = text.splitlines()
    documented = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        docstring, first = ast.get_docstring(node), node.body[0]
        if docstring is not None and first.lineno > node.lineno:
            # All of them go, not only this node's: a class must not contain the queries of its methods.
            lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
            documented.append((node, docstring))
    texts = []
    for node, docstring in documented:
        query = " ".join(docstring.split("\n\n")[0].split())
        source = [line.strip() for line in lines[node.lineno - 1 : node.end_lineno] if line.strip()]
        if len(query.split()) >= 3 and len(source) >= 2:
            texts.append((query, f"{os.path.basename(path)}: {node.name}", "\n".join(source)[:2000]))
    return texts


def read_pairs(path: str) -> list[tuple]:
    """(query, title, hash of the source, query features, source features) of each documented definition."""
    texts = read_texts(path)
    return [(query, title, hash_of(code), features(query), features(code)) for query, title, code in texts]


def hash_of(text: str) -> int:
    return zlib.crc32(text.encode(errors="replace"))


@functools.cache
def word_features(word: str) -> tuple[int, ...]:
    """Buckets of a word and of its letter trigrams, by which `sorted` meets `sort`."""
    marked = f"<{word}>"
    grams = [marked[i : i + 3] for i in range(len(marked) - 2)] if len(word) > 3 else []
    return tuple(hash_of(piece) % BUCKETS for piece in [marked, *grams])


def features(text: str) -> np.ndarray:
    found = dict.fromkeys(b for word in WORD.findall(text) for b in word_features(word.lower()))
    return np.array(list(found)[:MAX_FEATURES] or [0], dtype=np.int64)


def load_pairs(megabytes: float, read: Callable = read_pairs) -> tuple[list[tuple], list[tuple]]:
    """Training pairs, as `read` makes them, and those of held-out modules; no query and no source occurs twice."""
    modules = find_modules(megabytes)
    with multiprocessing.Pool(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        work = pool.imap(read, [path for _, path in modules], chunksize=16)
        found = list(shown(work, "Reading modules", len(modules)))
    seen: set = set()
    train, held_out = [], []
    for (module_hash, _), pairs in zip(modules, found, strict=True):
        for pair in pairs:
            keys = {pair[0].lower(), pair[2]}
            if not keys & seen:
                seen |= keys
                (held_out if module_hash % HELD_OUT == 0 else train).append(pair)
    return train, held_out


# Model, training, retrieval


class Encoder(nn.Module):
    """A weighted bag of features: vectors that queries and sources share, weights that each side has of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.EmbeddingBag(BUCKETS, DIM, mode="sum")
        self.log_weights = nn.Parameter(torch.zeros(2, BUCKETS))

    def forward(self, texts: list[np.ndarray], side: int) -> Tensor:
        device = self.log_weights.device
        ends = np.cumsum([len(text) for text in texts])
        offsets = torch.from_numpy(np.concatenate([[0], ends[:-1]])).to(device)
        buckets = torch.from_numpy(np.concatenate(texts)).to(device)
        weights = self.log_weights[side].gather(0, buckets).exp()
        return self.vectors(buckets, offsets, per_sample_weights=weights)


def train_encoder(encoder: Encoder, pairs: list[tuple], batch: int, steps: int, bf16: bool) -> None:
    groups = [
        {"params": encoder.vectors.parameters(), "lr": 0.03},
        {"params": [encoder.log_weights], "lr": 0.1},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.15)
    random = np.random.default_rng(0)
    order = random.permutation(len(pairs))
    note = [""]
    for _ in shown(range(steps), "Training", steps, note):
        if len(order) < batch:
            order = random.permutation(len(pairs))
        chosen, order = order[:batch], order[batch:]
        query = encoder([pairs[i][3] for i in chosen], side=0)
        key = encoder([pairs[i][4] for i in chosen], side=1)
        if bf16:
            query, key = query.bfloat16(), key.bfloat16()
        loss = fusedloss.info_nce(query, key, temperature=TEMPERATURE, normalize=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        note[0] = f"loss {loss.item():.2f}"


@torch.no_grad()
def encode(encoder: Encoder, texts: list[np.ndarray], side: int) -> Tensor:
    return torch.cat([F.normalize(encoder(texts[i : i + 4096], side), dim=1) for i in range(0, len(texts), 4096)])


def retrieval(encoder: Encoder, pairs: list[tuple]) -> dict[str, float]:
    query, key = encode(encoder, [p[3] for p in pairs], 0), encode(encoder, [p[4] for p in pairs], 1)
    ranks = []
    for start in range(0, len(pairs), 1024):  # in chunks: evaluation has no use for the whole matrix either
        scores = query[start : start + 1024] @ key.T
        own = scores.diagonal(start)[:, None]
        ranks.append((scores >= own).sum(dim=1))  # a tie counts against us
    rank = torch.cat(ranks).double()
    return {
        "recall@1": (rank <= 1).double().mean().item(),
        "recall@10": (rank <= 10).double().mean().item(),
        "MRR": rank.reciprocal().mean().item(),
    }


# The loss alone, against eager torch


def eager_loss(query: Tensor, key: Tensor) -> Tensor:
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    logits = query / TEMPERATURE @ key.T  # scaling the queries spares eager torch one copy of the matrix
    return F.cross_entropy(logits.float(), torch.arange(len(query), device=query.device))


def fused_loss(query: Tensor, key: Tensor) -> Tensor:
    return fusedloss.info_nce(query, key, temperature=TEMPERATURE, normalize=True)


LOSSES = {"eager": eager_loss, "fused": fused_loss}


def loss_step(name: str, batch: int, device: str, bf16: bool):
    """A function that runs one loss forward and backward on its own embeddings."""
    key = torch.randn(batch, DIM, device=device)
    query = key + torch.randn_like(key)  # pairs that are alike, as in training
    dtype = torch.bfloat16 if bf16 else torch.float32
    query, key = query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_()

    def step() -> None:
        query.grad = key.grad = None
        LOSSES[name](query, key).backward()

    return step


def step_memory(name: str, batch: int, device: str, bf16: bool) -> int:
    loss_step(name, 256, device, bf16)()  # what is loaded on first use is not the step's
    return peak_memory(loss_step(name, batch, device, bf16), device)


def compare(batches: list[int], budget: float, device: str, bf16: bool, results: dict) -> None:
    """Fills `results[name][batch]` with (seconds, bytes). Eager stops where three of its matrices pass `budget`."""
    measure = step_memory if device == "cuda" else functools.partial(isolated, step_memory)
    note = [""]
    for batch in shown(batches, "Measuring the loss", len(batches), note):
        note[0] = f"batch {batch}"
        names = [name for name in LOSSES if name == "fused" or 3 * 4 * batch**2 <= budget]
        memory = {name: measure(name, batch, device, bf16) for name in names}
        steps = {name: loss_step(name, batch, device, bf16) for name in names}
        short = device == "cuda" or batch < 8192
        seconds = time_interleaved(steps, rounds=5 if short else 1, warmup=int(short))
        for name in names:
            results[name][batch] = seconds[name], memory[name]


# Output


def shown(items, label: str, total: int, note: Sequence[str] = ("",)):
    """`items`, with a progress bar on a terminal and a line now and then elsewhere; `note[0]` is what to say beside."""
    start = time.perf_counter()
    if not console.is_terminal:
        console.print(f"{label} 0/{total}")
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        for done, item in enumerate(items, 1):
            yield item
            bar.update(task, advance=1, description=f"{label} {note[0]}")
            if not console.is_terminal and (done == total or done % -(-total // 5) == 0):
                console.print(f"{label} {done}/{total} {note[0]} {time.perf_counter() - start:.0f} s")


def size(value: float) -> str:
    return f"{value / GIB:.2f} GiB" if value >= GIB / 2 else f"{value / 2**20:.0f} MiB"


def recall_table(before: dict[str, float], after: dict[str, float], pool: int) -> Table:
    table = Table(title=f"Held-out modules: find the source among {pool}")
    for column in ("", *before):
        table.add_column(column, justify="right")
    for name, scores in (("before", before), ("after", after)):
        table.add_row(name, *(f"{score:.3f}" for score in scores.values()))
    return table


def search_table(encoder: Encoder, pairs: list[tuple], questions: list[str]) -> Table:
    table = Table(title="Search in the held-out modules")
    table.add_column("query")
    table.add_column("best three")
    key = encode(encoder, [pair[4] for pair in pairs], side=1)
    for question, scores in zip(
        questions, encode(encoder, [features(q) for q in questions], side=0) @ key.T, strict=True
    ):
        table.add_row(question, "\n".join(pairs[i][1] for i in scores.topk(3).indices))
    return table


def loss_table(results: dict) -> Table:
    table = Table(title=f"The loss alone, forward and backward, D = {DIM}")
    for column in ("batch", "eager time", "fused time", "eager peak memory", "fused peak memory"):
        table.add_column(column, justify="right")
    for batch in results["fused"]:
        cells = [results[name].get(batch) for name in LOSSES]
        times = [f"{cell[0]:.3g} s" if cell else "-" for cell in cells]
        table.add_row(str(batch), *times, *(size(cell[1]) if cell else "-" for cell in cells))
    return table


def plot(results: dict, budget: float, device: str, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    figure.suptitle(f"InfoNCE, forward and backward, D = {DIM}, on {device}")
    panels = ((1, GIB, "peak memory of the step (GiB)"), (0, 1, "time of the step (s)"))
    for axis, (field, unit, label) in zip(axes, panels, strict=True):
        lines = (("eager", "s--", "tab:red", "eager torch"), ("fused", "o-", "tab:blue", "fusedloss.info_nce"))
        for name, style, colour, label_of_line in lines:
            values = [value[field] / unit for value in results[name].values()]
            axis.plot(list(results[name]), values, style, color=colour, label=label_of_line)
        axis.set(xscale="log", yscale="log", xlabel="batch (pairs)", ylabel=label)
        axis.set_xticks(list(results["fused"]), [str(batch) for batch in results["fused"]])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.grid(alpha=0.3)
    axes[0].axhline(budget / GIB, color="grey", linestyle=":", label=f"memory budget of eager: {budget / GIB:.3g} GiB")
    axes[0].legend()
    axes[1].legend()
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train code search on the Python source on this machine, then compare the loss with eager torch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--quick", action="store_true", help="a small run: 20 MB of source, batch 2048")
    parser.add_argument("--batch", type=int, default=16384, help="pairs in a batch")
    # A CPU gets fewer steps and no race of 32768 rows: these take most of the time.
    parser.add_argument("--steps", type=int, default=20 if cuda else 12, help="training steps")
    parser.add_argument("--megabytes", type=float, default=60, help="of Python source to read, at most")
    parser.add_argument("--budget", type=float, default=4, help="GiB that eager torch may take in the comparison")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--bf16", action="store_true", help="give the loss bfloat16 embeddings")
    parser.add_argument("--ask", nargs="+", metavar="QUERY", help="what to look for after training",
                        default=["parse a date from a string", "remove a directory and everything in it"])  # fmt: skip
    parser.add_argument("--out", default="code_search.png", help="where the plot goes")
    parser.set_defaults(batches=[2048, 4096, 8192, 16384, *([32768] if cuda else [])])
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(batch=2048, steps=30, megabytes=20, batches=[512, 1024, 2048])
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    device, bf16, budget = options.device, options.bf16, options.budget * GIB
    torch.manual_seed(0)
    train, held_out = load_pairs(options.megabytes)
    batch = min(options.batch, len(train))
    console.print(f"{len(train)} training pairs, {len(held_out)} held out; batch {batch} on {device}")

    encoder = Encoder().to(device)
    before = retrieval(encoder, held_out)
    stopped = False
    try:
        train_encoder(encoder, train, batch, options.steps, bf16)
    except KeyboardInterrupt:
        stopped = True
        console.print("Stopped: this is what has been learnt so far.")
    console.print(recall_table(before, retrieval(encoder, held_out), len(held_out)))
    console.print(search_table(encoder, held_out, options.ask))
    if stopped:
        return

    results: dict = {name: {} for name in LOSSES}
    try:
        compare(options.batches, budget, device, bf16, results)
    except KeyboardInterrupt:
        console.print("Stopped: this is what has been measured so far.")
    if all(results.values()):
        console.print(loss_table(results))
        plot(results, budget, device, options.out)
        console.print(f"Plot: {options.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        console.print("Stopped.")
