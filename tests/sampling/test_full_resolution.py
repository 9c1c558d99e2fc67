"""Clips at their own size beside their crops."""

import pytest
import torch
from tests.data import videos
from tests.toys import ToyDataset, ToyNetwork

from vireo.data.clips import Clips
from vireo.data.stream import Stream
from vireo.errors import UserError
from vireo.metrics import measure_video
from vireo.models.encoders import NoEncoder
from vireo.sampling.evaluation import Evaluated
from vireo.sampling.full_resolution import FullResolution

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def stream(tmp_path):
    """Two held-out videos of 20 frames, 44 x 72, cropped to 5 frames of 16 x 16."""
    for name in ("a", "b", "held/c", "held/d"):
        videos.write(tmp_path / "clips" / f"{name}.mp4", videos.pictures(20, 44, 72))
    clips = Clips(tmp_path / "clips", 5, 16, 16, split="validation", held_out="held")
    return Stream(clips, "validation", shuffle=False)


def rows(network, encoder, stream, tmp_path, **options):
    return FullResolution(**options)(Evaluated(network, encoder, None, stream, range(2), CPU, tmp_path / "shown"))


def test_whole_clips_beside_their_crops(tiny, stream, tmp_path):
    found = rows(tiny, NoEncoder(), stream, tmp_path)
    columns = ["own latents", "mean colour", "8x down and up"]
    assert [row["column"] for row in found] == columns * 3
    assert [row["clip"] for row in found[::3]] == ["held/c.mp4", "held/d.mp4", "mean of 2"]
    assert {(row["frames"], row["size"]) for row in found[:6]} == {(17, "40x72")}
    assert {tuple(row) for row in found} == {tuple(found[0])}
    for number in (0, 3):
        index = number // 3
        for frames, name in (
            (stream.dataset.whole(index, 17, 8)["frames"], "psnr"),
            (stream.dataset.sample(index)["frames"], "crop psnr"),
        ):
            target = frames.float() / 255
            expected = measure_video(tiny(target[None]).frames[0].clamp(0, 1), target)["psnr"]
            assert found[number][name] == pytest.approx(expected, abs=0.01)
    assert found[6]["psnr"] == pytest.approx((found[0]["psnr"] + found[3]["psnr"]) / 2)
    assert sorted(path.name for path in (tmp_path / "shown").iterdir()) == [
        f"full_00{index}.{kind}" for index in range(2) for kind in ("mp4", "png")
    ]


def test_frames_and_clips_have_a_limit(tiny, stream, tmp_path):
    found = rows(tiny, NoEncoder(), stream, tmp_path, max_frames=8, clips=1)
    assert {row["clip"] for row in found} == {"held/c.mp4", "mean of 1"} and found[0]["frames"] == 5


def test_with_the_teacher(tiny, teacher, stream, tmp_path):
    found = rows(tiny, teacher, stream, tmp_path, max_frames=5, clips=1, teacher=True)
    columns = ["teacher", "prediction", "own latents", "tiny to teacher", "mean colour", "8x down and up"]
    assert [row["column"] for row in found] == columns * 2
    assert all(row["psnr"] > 0 and row["crop psnr"] > 0 and row["note"] == "" for row in found)


def test_a_teacher_that_does_not_fit(tiny, teacher, stream, tmp_path, monkeypatch):
    decode = teacher.decode

    def small_only(latents):
        if latents.shape[-1] > 2:
            raise torch.OutOfMemoryError("full")
        return decode(latents)

    monkeypatch.setattr(teacher, "decode", small_only)
    found = rows(tiny, teacher, stream, tmp_path, max_frames=5, clips=1, teacher=True)
    own, *_, note = [row for row in found if row["clip"] == "held/c.mp4"]
    assert own["column"] == "own latents" and own["psnr"] > 0 and own["crop psnr"] > 0
    assert note["column"] == "teacher" and note["psnr"] is None and "does not fit" in note["note"]
    assert "teacher" not in [row["column"] for row in found if row["clip"] == "mean of 1"]


def test_a_teacher_that_fails_is_not_left_out(tiny, teacher, stream, tmp_path, monkeypatch):
    def broken(latents):
        raise RuntimeError("broken")

    monkeypatch.setattr(teacher, "decode", broken)
    with pytest.raises(RuntimeError, match="broken"):
        rows(tiny, teacher, stream, tmp_path, teacher=True)


def test_what_cannot_be_measured(tiny, stream, tmp_path):
    other = Stream(ToyDataset(), "validation", shuffle=False)
    [row] = rows(tiny, NoEncoder(), other, tmp_path)
    assert row["note"] == "not measured: ToyDataset has no clips at their own size"
    with pytest.raises(UserError, match="takes a TAEHV"):
        rows(ToyNetwork(), NoEncoder(), stream, tmp_path)
    with pytest.raises(UserError, match="teacher=true, but the model's encoder is no teacher"):
        rows(tiny, NoEncoder(), stream, tmp_path, teacher=True)
    with pytest.raises(UserError, match="from 1 on"):
        FullResolution(clips=0)
