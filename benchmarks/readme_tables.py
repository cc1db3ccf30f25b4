"""Tables of a Markdown file, between the markers ``<!-- name -->`` and ``<!-- /name -->``."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def write_tables(path: Path, tables: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Replace each named table in the file; the first row of a table is its header."""
    text = path.read_text()
    for name, (header, *lines) in tables.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        before, rest = text.split(start)
        rows = [header, ["---"] * len(header), *lines]
        text = before + start + "\n".join(f"| {' | '.join(row)} |" for row in rows) + end + rest.split(end)[1]
    path.write_text(text)
