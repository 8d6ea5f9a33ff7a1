"""Hooks of mkdocs: pages from files outside docs/, and links that work in the repository and on the site."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Path in the repository -> page of the site.
PAGES = {"README.md": "index.md", "benchmarks/README.md": "benchmarks.md", "CHANGELOG.md": "changelog.md",
         "CONTRIBUTING.md": "contributing.md"}  # fmt: skip
EXPORTS = re.compile(r"^from \.\S+ import (\w+) as \1$", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Add the pages of PAGES."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links to other documents at their pages; a link to any other file of the repository becomes its text."""
    if page.file.src_uri == "api.md":
        names = EXPORTS.findall((ROOT / "pisa_jax" / "__init__.pyi").read_text())
        return markdown + "".join(f"\n::: pisa_jax.{name}\n" for name in names)
    origin = {target: path for path, target in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewrite(match):
        mark, text, link, anchor = match.groups(default="")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
        target = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(target):
            return f"{mark}[{text}]({posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"
        return text if (ROOT / path).exists() else match.group()  # a broken link stays one, and fails the build

    return LINK.sub(rewrite, markdown)
