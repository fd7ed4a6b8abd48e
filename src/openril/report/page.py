"""The page that `ril check` prints."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape


class Page:
    """Print findings as they come, and count those that stop the run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.errors = 0
        self.warnings = 0
        self._causes: set[str] = set()

    def heading(self, text: str) -> None:
        self.console.print(f"\n[bold]{escape(text)}[/bold]")

    def good(self, text: str) -> None:
        self.plain(text, "[green]ok[/green]     ")

    def error(self, text: str) -> None:
        """Print a problem, unless the same cause has been printed under the name of another setting."""
        cause = text.partition(": ")[2] or text
        if cause in self._causes:
            return
        self._causes.add(cause)
        self.errors += 1
        self.plain(text, "[red]problem[/red]")

    def warn(self, text: str) -> None:
        self.warnings += 1
        self.plain(text, "[yellow]warning[/yellow]")

    def plain(self, text: str, label: str = "       ") -> None:
        self.console.print(f"  {label}  {escape(text)}", highlight=False, soft_wrap=True)
