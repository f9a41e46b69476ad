"""What mkdocs does with the pages beyond converting them: links that leave docs/, and notes of what a block needs.

On the repository's page a link such as `../cluster/config.py` opens the file. The site has the pages of docs/ and those
in `BEYOND`; a link to anything else becomes the repository's own address where mkdocs.yml has a `repo_url`, and plain
text where it has none.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
BEYOND = {
    "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "helm/headrace/README.md": "chart.md",
    "README.md": "index.md",
}
"""Pages outside docs/ that the site has too, and under which name; the README's is the site's own first page."""
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|`[^`]*`)*)\]\((?P<target>[^)\s]+)\)")
_NEEDS = re.compile(r"^(?P<indent> *)<!-- test: (?P<why>needs|takes) (?P<what>.+?) -->$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs/."""
    for source, name in BEYOND.items():
        if name != "index.md" and (ROOT / source).is_file():
            files.append(File.generated(config, name, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links, and show what a block needs."""
    names = {name: source for source, name in BEYOND.items() if source != "README.md"}
    source = names.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    rewritten = _LINK.sub(lambda match: _link(match, source, page.file.src_uri, config.repo_url), markdown)
    return _NEEDS.sub(r'\g<indent><p class="needs">\g<why> \g<what>; no test runs this</p>\n', rewritten)


def _link(match: re.Match[str], source: str, name: str, repository: str | None) -> str:
    """source: the page in the repository; name: the same page within the site."""
    path, _, anchor = match["target"].partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return match[0]
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if target in BEYOND:
        there = BEYOND[target]
    elif target.startswith("docs/"):
        there = target.removeprefix("docs/")
    elif repository:
        return f"[{match['text']}]({repository.rstrip('/')}/blob/main/{target})"
    else:
        return str(match["text"])
    relative = posixpath.relpath(there, posixpath.dirname(name) or ".")
    return f"{match['image']}[{match['text']}]({relative}{'#' + anchor if anchor else ''})"
