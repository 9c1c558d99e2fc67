"""What becomes of every kind of broken video, at the start and while a run reads it: docs/reliability.md's table."""

import re
from pathlib import Path

import pytest

from tests.data import captions, videos
from vireo.data.captioned_clips import CaptionedClips
from vireo.data.clips import Clips
from vireo.data.stream import Stream
from vireo.errors import UserError

CLIPS = 5
KINDS = {kind: says for kind, says in videos.REASONS.items() if kind not in ("other container", "missing")}
KINDS = {kind: says for kind, says in KINDS.items() if not kind.startswith("folder")}
KINDS |= {"missing": "no such file", "damaged in the middle": "(cannot be decoded|is damaged)"}


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """Bytes of a whole video of 40 frames, and of one of each broken kind."""
    folder = tmp_path_factory.mktemp("contents")
    whole = videos.write(folder / "whole.mp4")
    files = videos.broken(folder) | {"damaged in the middle": videos.damaged(folder / "damaged.mp4", whole)}
    return {"whole": whole.read_bytes()} | {k: files[k].read_bytes() for k in KINDS if k != "missing"}


@pytest.fixture(params=["clips", "captioned_clips"])
def made(request, tmp_path, monkeypatch, contents):
    """A dataset of whole videos in a folder, all of whose frames each sample has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "data"
    root.mkdir()
    names = [f"clip{number}.mp4" for number in range(CLIPS)]
    for name in names:
        (root / name).write_bytes(contents["whole"])
    if request.param == "clips":
        return root, lambda: Clips(root, 40, 16, 16, held_out=0)
    captions.write_list(root / "prompts.txt", names)
    captions.write_list(root / "videos.txt", names)
    return root, lambda: CaptionedClips(root, 40, 16, 16, held_out=0)


def spoil(path: Path, kind: str, contents: dict[str, bytes]) -> None:
    path.unlink()
    if kind != "missing":
        path.write_bytes(contents[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_while_training_another_sample_takes_its_place(made, contents, kind):
    root, dataset = made
    stream = Stream(dataset(), seed=0)
    spoil(root / "clip3.mp4", kind, contents)
    samples = stream.samples([(position, position) for position in range(CLIPS)])
    bad = [one for sample in samples for one in sample["bad"]]
    assert [Path(path).name for path, _ in bad] == ["clip3.mp4"]
    cut = "|it has 30 frames now, 40 when last looked at" if kind.startswith("truncated between") else ""
    assert re.search(f"{KINDS[kind]}|No such file{cut}", bad[0][1])
    names = [sample["name"] for sample in samples]
    assert "clip3.mp4" not in names and len(set(names)) == CLIPS - 1
    again = Stream(stream.dataset, seed=0).samples([(position, position) for position in range(CLIPS)])
    assert [sample["name"] for sample in again] == names, "the same one each time"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "damaged in the middle"])
def test_at_the_start_it_is_told_with_its_name(made, contents, kind):
    root, dataset = made
    spoil(root / "clip3.mp4", kind, contents)
    if kind == "missing" and "prompts.txt" not in {path.name for path in root.iterdir()}:
        assert len(dataset()) == CLIPS - 1, "what no list names is not missed"
        return
    with pytest.raises(UserError, match="clip3.mp4") as told:
        dataset()
    assert root.name in str(told.value)


def test_a_video_that_was_replaced_by_a_shorter_one(made):
    root, dataset = made
    stream = Stream(dataset(), seed=0)
    videos.write(root / "clip3.mp4", videos.pictures(8))
    samples = stream.samples([(position, position) for position in range(CLIPS)])
    bad = [reason for sample in samples for _, reason in sample["bad"]]
    assert len(bad) == 1 and re.search("it has 8 frames now, 40 when last looked at|has changed", bad[0])
