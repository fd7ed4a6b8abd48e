"""A hook of the documentation build (mkdocs.yml)."""

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with links to files outside docs/ as plain text, since the built site does not hold these files."""
    return re.sub(r"(?<!!)\[([^]]*)\]\(\.\./[^)\s]*\)", r"\1", markdown)
