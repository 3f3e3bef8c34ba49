"""The words before the options of a command: configurations, each with its overlays after a plus sign."""

from pathlib import Path


def leading_files(argv: list[str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Each leading word with the layers that it means, and the words from the first option on."""
    n = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    named = []
    for word in argv[:n]:
        files = [word] if Path(word).is_file() else word.split("+")
        named.append((word, [part for file in files for part in ("--config", file)]))
    return named, argv[n:]
