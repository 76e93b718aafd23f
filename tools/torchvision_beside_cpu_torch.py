"""Lets `import torchvision` work where it was built for CUDA and torch was not.

    python tools/torchvision_beside_cpu_torch.py

PyPI's torchvision for Linux is built for CUDA. Beside a torch of the CPU index its library of operators does not load,
and then `import torchvision` fails with "operator torchvision::nms does not exist", and with it sentence-transformers,
open_clip and lightly. Where the torchvision of torch's own index can be had, install that and leave this alone.

This writes two files into the site-packages of the Python that runs it: itself, as a module, and a .pth file that has
Python import it at start. It waits for torchvision to be imported, and then declares the operators that torchvision
takes for granted. They have names, no code: calling one raises an error that says so, and whatever needs none of them
works. Where the import does not fail for want of operators nothing is written.
"""

import sys

HOOK = "_torchvision_beside_cpu_torch"
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
OPERATORS = ("nms", "qnms")  # those whose shapes torchvision registers whether or not its library has loaded


class Before:
    """Asked for every module, it knows none; but it declares the operators before the module that needs them runs."""

    library = None  # what is declared lasts as long as this

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision._meta_registrations" and self.library is None:
            self.library = declared()
        return None


def declared():
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + SCHEMA)
            library.impl(name, without_code(name), "CPU")
    return library


def without_code(name):
    def operator(*_):
        raise RuntimeError(
            f"torchvision::{name} has no code: this torchvision was built for CUDA, and torch was not; "
            "install torchvision from the index that torch came from"
        )

    return operator


def failure():
    """Of `import torchvision` in a process of its own: the last line, or none."""
    import subprocess

    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    return (done.stderr.strip() or "no reason given").splitlines()[-1] if done.returncode else None


def main():
    import importlib.util
    import sysconfig
    from pathlib import Path

    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed: nothing to do"
    why = failure()
    if why is None:
        return "torchvision is importable: nothing to do"
    if "operator torchvision::" not in why:
        raise SystemExit(f"import torchvision fails for a reason that this does not mend: {why}")
    site = Path(sysconfig.get_path("purelib"))
    (site / f"{HOOK}.py").write_text(Path(__file__).read_text())
    (site / f"{HOOK}.pth").write_text(f"import {HOOK}; {HOOK}.sys.meta_path.insert(0, {HOOK}.Before())\n")
    if why := failure():
        raise SystemExit(f"import torchvision still fails: {why}")
    return f"torchvision is importable, without its operators, by {HOOK}.py and .pth in {site}"


if __name__ == "__main__":
    print(main())
