"""A hook of mkdocs.yml: brings pages and pictures from outside of docs/ into the site, and mends links to them.

Markdown files link to each other by their places in the repository, so that links work wherever the repository is
shown. In the site, PAGES have an address of their own; pictures are copied to files/; any other file of the repository
becomes its path, as plain text, because the site does not hold it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).absolute().parent.parent
PAGES = {  # in the repository: in the site
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing/index.md",
    "DESIGN.md": "internals/architecture.md",
    "README.md": "index.md",  # docs/index.md takes its place
    "benchmarks/README.md": "results/method.md",
    "examples/README.md": "examples.md",
}
PICTURES = (".png", ".svg")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
FENCED = re.compile(r"^(```.*?^```)", flags=re.DOTALL | re.MULTILINE)
HOME = {there: here for here, there in PAGES.items() if here != "README.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for there, here in HOME.items():
        if (ROOT / here).exists():
            files.append(File.generated(config, there, abs_src_path=str(ROOT / here)))
    for page in files.documentation_pages():
        here = _here(page.src_uri)
        for picture, _, target, _ in LINK.findall((ROOT / here).read_text()):
            path = _path(here, target)
            if picture and not path.startswith("docs/") and path.endswith(PICTURES) and (ROOT / path).exists():
                there = f"files/{path}"
                if there not in files.src_uris:
                    files.append(File.generated(config, there, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here, there = _here(page.file.src_uri), page.file.src_uri

    def mended(link: re.Match) -> str:
        picture, words, target, anchor = link.groups()
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        path = _path(here, target)
        if path in PAGES:
            goal = PAGES[path]
        elif path.startswith("docs/"):
            goal = path.removeprefix("docs/")
        elif picture:
            goal = f"files/{path}"
        elif not (ROOT / path).exists():
            return link[0]  # mkdocs warns of it
        else:
            return words if "`" in words else f"{words} (`{path}`)" if words != path else f"`{path}`"
        return f"{picture}[{words}]({os.path.relpath(goal, os.path.dirname(there) or '.')}{anchor or ''})"

    parts = FENCED.split(markdown)  # every second one is code
    return "".join(part if part.startswith("```") else LINK.sub(mended, part) for part in parts)


def _here(there: str) -> str:
    """Where a page of the site stands in the repository."""
    return HOME.get(there, f"docs/{there}")


def _path(here: str, target: str) -> str:
    """A link's target from the repository's root."""
    return os.path.normpath(os.path.join(os.path.dirname(here), target)).replace(os.sep, "/")
