"""A digest of source files, by which a committed table says what it was made from."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]


def digest(*patterns: str) -> str:
    """Of the files' lines, without those that are blank or only a comment: patterns are relative to the repository."""
    found = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in ROOT.glob(pattern) if file.is_file()}):
        comment = "#" if file.suffix == ".py" else "//"
        lines = (line.strip() for line in file.read_text().splitlines())
        kept = [line for line in lines if line and not line.startswith(comment)]
        found.update("\n".join([file.relative_to(ROOT).as_posix(), *kept, ""]).encode())
    return found.hexdigest()[:16]
