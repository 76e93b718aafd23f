"""Checks the links of the built site: `python tools/check_site.py build/site`.

Exit code 1 if a link or an anchor leads nowhere, or if a page loads anything from elsewhere. mkdocs has checked the
links of Markdown; this also sees those of the theme and of docstrings.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SWITCHES = "__"  # how names begin that the theme's script adds


class Html(HTMLParser):
    """A page's links, as (tag, target), and its anchors."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append((tag, value))
            elif name == "id" and value:
                self.anchors.add(value)


def faults(site: Path) -> list[str]:
    pages = {page.resolve(): Html(page.read_text(encoding="utf-8")) for page in sorted(site.rglob("*.html"))}
    found = [] if pages else [f"{site} holds no page"]
    for page, html in pages.items():
        if page.name == "404.html":  # served at any address, so its links begin at the root
            continue
        for tag, target in html.links:
            parts = urlsplit(target)
            fault = ""
            if parts.scheme or parts.netloc:
                fault = "" if tag == "a" or parts.scheme == "data" else "is loaded from elsewhere"
            else:
                goal = (page.parent / unquote(parts.path)).resolve() if parts.path else page
                goal = goal / "index.html" if goal.is_dir() else goal
                if not goal.exists():
                    fault = "leads nowhere"
                elif (
                    goal in pages and parts.fragment and not parts.fragment.startswith("__")
                ):  # the theme's own switches
                    fault = "" if unquote(parts.fragment) in pages[goal].anchors else "has no such anchor"
            if fault:
                found.append(f"{page.relative_to(site.resolve())}: {target} {fault}")
    return found


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    found = faults(Path(sys.argv[1]))
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
