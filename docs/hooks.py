"""
What the site has beyond Markdown, as hooks of MkDocs: the README as its first page, links into the repository, tables that
scripts write, formulas without a script from elsewhere, and Sphinx roles of docstrings.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent

#: A link or an image of Markdown, with its target and its anchor
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s#]*)(#[^)\s]*)?\)")
TABLE = re.compile(r"<!-- table (\S+) (\S+) -->")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def site_uri(path: Path) -> str:
    """:return: Where a file of the repository is in the site: the README first, `docs/` at the top, others as they lie"""
    if path == ROOT / "README.md":
        return "index.md"
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def targets(path: Path) -> list[Path]:
    """:return: The files of the repository that a page links to"""
    texts = FENCE.split(path.read_text())[::2]
    links = [link for text in texts for _, link, _ in LINK.findall(text)]
    return [file for link in links if link and "://" not in link if (file := _file(path, link)) is not None]


def _file(page: Path, link: str) -> Path | None:
    """:return: The file that is meant: of a folder, its README; `None`, where there is none"""
    path = (page.parent / link).resolve()
    path = path / "README.md" if path.is_dir() else path
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def table(file: str, name: str) -> str:
    """:return: The table that a script has written between two markers of a file, see `benchmarks/readme_tables.py`"""
    text = (ROOT / file).read_text()
    return text.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, and what pages link to in the repository."""
    todo = [ROOT / "README.md", *(Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path)]
    while todo:
        path = todo.pop()
        if files.get_file_from_path(site_uri(path)) is None:
            files.append(File.generated(config, site_uri(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            todo += [target for target in targets(path) if files.get_file_from_path(site_uri(target)) is None]
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Insert tables, and let links lead to where their files are in the site."""
    source = Path(page.file.abs_src_path or "")

    def relink(match: re.Match[str]) -> str:
        label, link, anchor = match[1], match[2], match[3] or ""
        if not link or "://" in link:
            return match[0]
        file = _file(source, link)
        if file is None:
            # A folder without a README has no page
            return label[1:-1] if (source.parent / link).is_dir() else match[0]
        return f"{label}({posixpath.relpath(site_uri(file), posixpath.dirname(page.file.src_uri))}{anchor})"

    markdown = TABLE.sub(lambda match: table(match[1], match[2]), markdown)
    parts = FENCE.split(markdown)
    # An image may be the label of a link
    parts[::2] = [LINK.sub(relink, text) for text in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas to MathML, which browsers draw themselves; Sphinx's roles to links."""
    html = re.sub(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', lambda m: _formula(m[1], "block"), html, flags=re.DOTALL)
    html = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: _formula(m[1], "inline"), html, flags=re.DOTALL)
    html = re.sub(r":(?:class|func|meth|attr|data):<code>~?([\w.]+)</code>", _reference, html)
    return html.replace("::</p>", ":</p>")


def _formula(latex: str, display: str) -> str:
    latex = latex.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    formula: str = convert(latex.strip(), display=display)
    return f'<p class="formula">{formula}</p>' if display == "block" else formula


def _reference(match: re.Match[str]) -> str:
    name = match[1]
    return f'<autoref identifier="{name}" optional><code>{name.rpartition(".")[2]}</code></autoref>'
