"""What the documentation points at exists: files named in backticks, and relative links with their headings."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
SUFFIXES = ("py", "md", "json", "yaml", "yml", "toml", "sh", "svg", "png")
_CODE = re.compile(r"`([^`\n]+)`")
_FILE = re.compile(rf"(?<![\w./-])((?:[\w.-]+/)+[\w.-]+\.(?:{'|'.join(SUFFIXES)}))(?![\w/])")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_ELSEWHERE = ("outputs/fluid_memory/", "runs/", "ray/", "vllm/", "src/vllm_router/")
"""Paths of other repositories, and those that a reader's own command makes."""


def files_named(text: str) -> set[str]:
    """Paths with a folder and a known ending, in inline code."""
    named = {path for code in _CODE.findall(text) for path in _FILE.findall(code)}
    return {path for path in named if not path.startswith(_ELSEWHERE)}


def links_of(text: str) -> set[str]:
    """Relative targets of Markdown links and images."""
    return {target for target in _LINK.findall(text) if not re.match(r"[a-z]+:", target)}


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_named_in_a_page_exists(page):
    missing = {path for path in files_named(page.read_text()) if not (ROOT / path).exists()}
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    broken = set()
    for link in links_of(page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target.read_text())):
            broken.add(link)
    assert not broken


def test_files_and_links_are_found():
    text = "See `scheduler/gone.py` and `python a/b.py --model .models/x`, [this](x.md#a-b) and [that](https://e.org/x.md)."
    assert files_named(text) == {"scheduler/gone.py", "a/b.py"}
    assert links_of(text) == {"x.md#a-b"}
    assert anchors_of("## With which `engine` settings?\n") == {"with-which-engine-settings"}
