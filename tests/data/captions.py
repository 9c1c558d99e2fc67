"""Folders of captioned clips, in the list files' layout."""

from collections.abc import Sequence
from pathlib import Path

from tests.data import videos


def write(
    root: Path, lengths: Sequence[int], size: tuple[int, int] = (48, 64), names: Sequence[str] | None = None
) -> Path:
    """Clips of flat grey that tells the frame (`videos.write_flat`); caption k is "caption k"."""
    names = names or [f"videos/{number}.mp4" for number in range(len(lengths))]
    for number, (name, length) in enumerate(zip(names, lengths, strict=True)):
        videos.write_flat(root / name, length, *size, first=number)
    write_list(root / "prompts.txt", [f"caption {number}" for number in range(len(lengths))])
    write_list(root / "videos.txt", names)
    return root


def write_list(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
