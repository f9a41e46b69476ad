"""The documentation as a site: every page is in it, every link works, and it loads nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mkdocs.structure.files import Files

from tools.docs.blocks import ROOT, blocks_of
from tools.docs.site import BEYOND, on_page_markdown

pytestmark = pytest.mark.slow
_LOADED = re.compile(
    r"<(?:script|img|iframe|source)[^>]+src=\"(?:https?:)?//"
    r"|<link[^>]+rel=\"(?:stylesheet|preconnect)\"[^>]+href=\"(?:https?:)?//"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder], cwd=ROOT,
        capture_output=True, text=True, timeout=120, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    beyond = {Path(name).with_suffix(".html") for source, name in BEYOND.items() if (ROOT / source).is_file()}
    built = {path.relative_to(site) for path in site.rglob("*.html")}
    assert pages | beyond <= built


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert not _LOADED.findall(path.read_text("utf-8")), path


def test_links_beyond_the_pages_are_rewritten_and_needs_are_shown(site: Path) -> None:
    cluster = (site / "operate" / "ray-cluster.html").read_text("utf-8")
    assert "needs several machines; no test runs this" in cluster
    assert 'href="../changelog.html"' in (site / "operate" / "upgrades.html").read_text("utf-8")
    assert 'href="structures.html"' in (site / "contributing.html").read_text("utf-8")


@pytest.mark.parametrize(("repository", "shown"), [
    (None, "see it"), ("https://e.org/h/", "[see it](https://e.org/h/blob/main/a/b.py)"),
])
def test_a_link_to_code_is_text_or_leads_to_the_repository(repository: str | None, shown: str) -> None:
    page, config = SimpleNamespace(file=SimpleNamespace(src_uri="x/y.md")), SimpleNamespace(repo_url=repository)
    assert on_page_markdown("[see it](../../a/b.py)", page, config, Files([])) == shown
    assert on_page_markdown("[a](../z.md#b) [c](../../CHANGELOG.md)", page, config, Files([])) == (
        "[a](../z.md#b) [c](../changelog.md)"
    )


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_lists_begin_after_an_empty_line(page: Path) -> None:
    """Markdown on the site needs it, the repository's page does not."""
    text = page.read_text("utf-8")
    for block in blocks_of(page):
        text = text.replace(block.text, "")
    broken = re.findall(r"^(?![-*\d|>#<\s]).+\n(?:[-*]|1\.) .*", text, flags=re.MULTILINE)
    assert not broken
