"""A hook of mkdocs.yml: brings pages and pictures from outside of docs/ into the site, and mends links to them.

Markdown files link to each other by their places in the repository, so that links work wherever the repository is
shown. In the site, PAGES have an address of their own; pictures are copied to files/; any other file of the repository
becomes its path, as plain text, because the site does not hold it. The page of modules is written from `fusedloss.nn`,
whose signatures are made when it is imported.
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
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
HOME = {there: here for here, there in PAGES.items() if here != "README.md"}
PICTURES = (".png", ".svg")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
FENCED = re.compile(r"^(```.*?^```)", flags=re.DOTALL | re.MULTILINE)
MODULES = "<!-- modules -->"


def on_config(config: MkDocsConfig) -> None:
    """Puts a page that the navigation does not name behind the others of its folder; one of no folder, of the first."""
    sections = [pages for section in config.nav for pages in section.values()]
    named = [[page if isinstance(page, str) else next(iter(page.values())) for page in pages] for pages in sections]
    folders = {os.path.dirname(page): pages for pages, names in zip(sections, named, strict=True) for page in names}
    folders[""] = sections[0]
    for page in sorted((ROOT / "docs").rglob("*.md")):
        path = page.relative_to(ROOT / "docs").as_posix()
        if not any(path in names for names in named):
            folders[os.path.dirname(path)].append(path)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for there, here in HOME.items():
        files.append(File.generated(config, there, abs_src_path=str(ROOT / here)))
    for page in list(files.documentation_pages()):
        here = _here(page.src_uri)
        for picture, _, target, _ in LINK.findall((ROOT / here).read_text()):
            path = _path(here, target)
            outside = picture and not path.startswith("docs/") and path.endswith(PICTURES)
            if outside and (ROOT / path).exists() and f"files/{path}" not in files.src_uris:
                files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    parts = FENCED.split(markdown.replace(MODULES, modules()) if MODULES in markdown else markdown)
    mended = [part if part.startswith("```") else mend(part, page.file.src_uri) for part in parts]
    return "".join(mended)


def mend(text: str, there: str) -> str:
    """The text of a page, with its links as the site has them."""
    here = _here(there)

    def link(found: re.Match) -> str:
        picture, words, target, anchor = found.groups()
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = _path(here, target)
        if path in PAGES:
            goal = PAGES[path]
        elif path.startswith("docs/"):
            goal = path.removeprefix("docs/")
        elif not (ROOT / path).exists():
            return found[0]  # mkdocs warns of it
        elif picture:
            goal = f"files/{path}"
        else:
            return words if "`" in words else f"`{path}`" if words == path else f"{words} (`{path}`)"
        return f"{picture}[{words}]({os.path.relpath(goal, os.path.dirname(there) or '.')}{anchor or ''})"

    return LINK.sub(link, text)


def modules() -> str:
    """Every module's constructor, what its `forward` takes, and the page of its function."""
    from fusedloss import nn

    pages = {
        name: page.name
        for page in (ROOT / "docs" / "losses").glob("*.md")
        for name in re.findall(r"^::: fusedloss\.(\w+)$", page.read_text(), flags=re.MULTILINE)
    }
    text = ""
    for name, module in vars(nn).items():
        function = getattr(module, "function", None)
        if not inspect.isclass(module) or function is None:
            continue
        options = []
        for option in inspect.signature(module).parameters.values():
            if option.kind is option.KEYWORD_ONLY and "*" not in options:
                options.append("*")
            options.append(str(option.replace(annotation=option.empty)))
        call = f"{name}({', '.join(options)})"
        if len(call) > 80:
            call = f"{name}(\n" + "".join(f"    {option},\n" for option in options) + ")"
        takes = re.search(r"and\s+`(forward\(.*?\))`", inspect.getdoc(module), flags=re.DOTALL)
        page = f"[`{function.__name__}`](../losses/{pages[function.__name__]}#fusedloss.{function.__name__})"
        text += f"\n## {name}\n\n```python\n{call}\n```\n\n`{' '.join(takes[1].split())}`: {page}\n"
    return text


def _here(there: str) -> str:
    """Where a page of the site stands in the repository."""
    return HOME.get(there, f"docs/{there}")


def _path(here: str, target: str) -> str:
    """A link's target from the repository's root."""
    return os.path.normpath(os.path.join(os.path.dirname(here), target)).replace(os.sep, "/")
