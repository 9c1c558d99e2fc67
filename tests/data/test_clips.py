import json
import os
import shutil
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from tests.data import videos
from vireo import video_io
from vireo.data.clips import Clips
from vireo.errors import UserError
from vireo.randomness import Draws
from vireo.video_io import BadVideoError

DECODERS = ["decord", "pyav"] if video_io._decord() else ["pyav"]


@pytest.fixture(scope="session")
def flat(tmp_path_factory):
    """Eight videos of 30 frames; frame k of each is plain grey of level 4 k."""
    root = tmp_path_factory.mktemp("flat")
    for name in "abcdefgh":
        videos.write_flat(root / f"{name}.mp4", 30)
    return root


@pytest.fixture(scope="session")
def moving(tmp_path_factory):
    root = tmp_path_factory.mktemp("moving")
    for name in "abcd":
        videos.write(root / f"{name}.mp4", videos.pictures(20, 96, 128))
    return root


def draws(position=0, step=0, seed=0):
    return Draws(seed, [position], step=step)


def levels(frames):
    """The frame numbers of a flat clip."""
    return (frames.float().mean((1, 2, 3)) / 4).round().int().tolist()


def test_a_sample(moving):
    clips = Clips(moving, 5, 32, 48, flip=0.5, jitter=0.7)
    assert len(clips) + len(Clips(moving, 5, 32, 48, split="validation")) == 4
    sample = clips.sample(0, draws())
    assert set(sample) == {"frames", "name"}
    assert sample["frames"].shape == (5, 3, 32, 48) and sample["frames"].dtype == torch.uint8
    assert sample["frames"].is_contiguous()
    assert sample["name"] == clips.entries[0].name
    assert clips.sources(0) == {}


def test_a_sample_is_a_function_of_its_position(moving):
    options = dict(flip=0.5, jitter=0.7, frame_step=(1, 3), held_out=0)
    clips = Clips(moving, 5, 32, 48, **options)
    first = [clips.sample(1, draws(position))["frames"] for position in range(4)]
    again = [Clips(moving, 5, 32, 48, **options).sample(1, draws(position))["frames"] for position in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(first[0], other) for other in first[1:])
    assert not torch.equal(first[0], clips.sample(1, draws(0, seed=1))["frames"])


@pytest.mark.skipif(len(DECODERS) < 2, reason="decord is not installed")
def test_both_decoders_give_the_same_samples(moving, monkeypatch):
    clips = Clips(moving, 5, 32, 48, flip=0.5, jitter=0.7, frame_step=(1, 3), held_out=0)
    samples = []
    for decoder in DECODERS:
        monkeypatch.setenv("VIREO_DECODER", decoder)
        samples.append(torch.stack([clips.sample(p % 3, draws(p))["frames"] for p in range(9)]))
    assert torch.equal(*samples)


@pytest.mark.parametrize("decoder", DECODERS)
def test_workers_give_the_same_samples(moving, decoder, monkeypatch):
    monkeypatch.setenv("VIREO_DECODER", decoder)
    clips = Clips(moving, 5, 32, 48, flip=0.5, jitter=0.7, held_out=0)

    class Samples(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, position):
            return clips.sample(position % 3, draws(position))["frames"]

    alone = torch.stack([Samples()[position] for position in range(12)])
    together = torch.cat(list(DataLoader(Samples(), batch_size=3, num_workers=2, timeout=60)))
    assert torch.equal(alone, together)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 14), st.integers(1, 4), st.integers(0, 3), st.integers(0, 2**40))
def test_frames_follow_one_another_at_one_distance(flat, num_frames, smallest, more, position):
    clips = Clips(flat, num_frames, 32, 32, frame_step=(smallest, smallest + more), min_frames=1)
    numbers = levels(clips.sample(position % len(clips), draws(position))["frames"])
    gaps = {b - a for a, b in zip(numbers, numbers[1:], strict=False)}
    if (num_frames - 1) * smallest < 30:
        assert len(gaps) <= 1 and all(smallest <= gap <= smallest + more for gap in gaps)
    else:
        assert numbers[0] == 0 and numbers[-1] == 29 and min(gaps) >= 0


def test_flips_and_colors_come_with_their_probability(moving):
    plain = Clips(moving, 2, 96, 128)  # the whole frame: no crop
    flipped = Clips(moving, 2, 96, 128, flip=1.0)
    sometimes = Clips(moving, 2, 96, 128, flip=0.5)
    jittered = Clips(moving, 2, 96, 128, jitter=1.0)
    count = 0
    for position in range(40):
        frames = plain.sample(0, draws(position))["frames"]
        assert torch.equal(flipped.sample(0, draws(position))["frames"], frames.flip(-1))
        assert not torch.equal(jittered.sample(0, draws(position))["frames"], frames)
        count += torch.equal(sometimes.sample(0, draws(position))["frames"], frames.flip(-1))
    assert 8 < count < 32


def test_one_size_for_all_samples_of_a_step(moving):
    clips = Clips(moving, 2, 32, 48, sizes=[16, 24, 64], held_out=0)
    shapes = {}
    for step in range(30):
        shapes[step] = {tuple(clips.sample(p % 3, draws(p, step))["frames"].shape[2:]) for p in range(3)}
    assert all(len(shape) == 1 for shape in shapes.values())
    assert set.union(*shapes.values()) == {(16, 16), (24, 24), (64, 64)}
    assert Clips(moving, 2, 32, 48, sizes=[16], split="validation").sample(0)["frames"].shape == (2, 3, 32, 48)


def test_validation_clips_are_fixed(flat):
    clips = Clips(flat, 5, 32, 32, split="validation", frame_step=(2, 4), flip=1.0, jitter=1.0)
    first = clips.sample(0)
    assert levels(first["frames"]) == [10, 12, 14, 16, 18]
    assert torch.equal(first["frames"], clips.sample(0, draws(7))["frames"])
    with pytest.raises(TypeError, match="a training clip is random"):
        Clips(flat, 5, 32, 32).sample(0)


def test_a_validation_clip_knows_its_rate(flat):
    assert Clips(flat, 5, 32, 32, split="validation").sample(0)["fps"] == 25
    assert Clips(flat, 5, 32, 32, split="validation", frame_step=(2, 5)).sample(0)["fps"] == 12.5


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 31), st.integers(1, 4))
def test_the_middle_of_a_video_at_its_own_size(flat, num_frames, step):
    clips = Clips(flat, 3, 16, 16, split="validation", frame_step=(step, step))
    longest = clips.longest(0)
    assert (longest - 1) * step < 30 <= longest * step
    sample = clips.whole(0, min(num_frames, longest))
    numbers = levels(sample["frames"])
    assert sample["frames"].shape == (min(num_frames, longest), 3, 48, 64) and sample["fps"] == 25 / step
    assert {b - a for a, b in zip(numbers, numbers[1:], strict=False)} <= {step}
    assert abs(numbers[0] - (29 - numbers[-1])) <= 1, "as much is left out before as behind"


def test_only_the_borders_of_a_whole_clip_are_cut(moving):
    clips = Clips(moving, 3, 16, 16, split="validation")
    everything, cut = clips.whole(0, 5), clips.whole(0, 5, multiple=40)
    assert everything["frames"].shape == (5, 3, 96, 128) and everything["name"] == cut["name"]
    assert torch.equal(cut["frames"], everything["frames"][:, :, 8:88, 4:124]) and cut["frames"].is_contiguous()
    with pytest.raises(UserError, match="96x128 pixels, at least 100x100"):
        clips.whole(0, 5, multiple=100)


def test_validation_shows_the_largest_centre_crop(tmp_path):
    frames = videos.pictures(4, 64, 96)
    frames[:, :, :16] = frames[:, :, -16:] = 0  # what is left and right of the square in the middle
    frames[:, :, 16:-16] |= 128
    for name in "ab":
        videos.write(tmp_path / f"{name}.mp4", frames, pix_fmt="yuv444p", options={"crf": "5"})
    clips = Clips(tmp_path, 2, 32, 32, split="validation")
    assert clips.sample(0)["frames"][:, :, :, [0, -1]].float().mean() > 100
    train = Clips(tmp_path, 2, 32, 32, crop="center")
    assert train.sample(0, draws())["frames"][:, :, :, [0, -1]].float().mean() > 100


@pytest.mark.parametrize("held_out", [0.3, "validation", "val.txt"])
def test_no_clip_is_in_both_parts(flat, tmp_path, held_out):
    shutil.copytree(flat, tmp_path / "root")
    (tmp_path / "root" / "validation").mkdir()
    shutil.move(tmp_path / "root" / "a.mp4", tmp_path / "root" / "validation" / "a.mp4")
    (tmp_path / "root" / "val.txt").write_text("b.mp4\nc.mp4\n")
    both = [Clips(tmp_path / "root", 5, 32, 32, split=split, held_out=held_out) for split in ("train", "validation")]
    names = [{entry.name for entry in clips.entries} for clips in both]
    assert names[0] and names[1] and not names[0] & names[1]
    assert len(names[0] | names[1]) == 8
    expected = {"validation": {"validation/a.mp4"}, "val.txt": {"b.mp4", "c.mp4"}}.get(held_out, names[1])
    assert names[1] == expected


def test_a_single_clip_is_trained_on(tmp_path):
    videos.write_flat(tmp_path / "a.mp4", 5)
    assert len(Clips(tmp_path, 5, 32, 32)) == 1
    assert len(Clips(tmp_path, 5, 32, 32, split="validation")) == 0


def test_an_annotation_gives_names_and_texts(flat, tmp_path):
    items = [{"path": f"{name}.mp4", "text": f"a film called {name}"} for name in "dcba"]
    (tmp_path / "clips.json").write_text(json.dumps({"total": 4, "list": items}))
    clips = Clips(flat, 5, 32, 32, annotations=tmp_path / "clips.json", held_out=0)
    assert [entry.name for entry in clips.entries] == ["d.mp4", "c.mp4", "b.mp4", "a.mp4"]
    sample = clips.sample(1, draws())
    assert (sample["name"], sample["text"]) == ("c.mp4", "a film called c")


def test_an_annotation_below_the_root(flat, tmp_path):
    shutil.copytree(flat, tmp_path / "root")
    (tmp_path / "root" / "clips.json").write_text(json.dumps([{"path": "a.mp4"}, {"path": "b.mp4"}]))
    assert len(Clips(tmp_path / "root", 5, 32, 32, annotations="clips.json", held_out=0)) == 2
    with pytest.raises(UserError, match=r"nothing\.json cannot be read"):
        Clips(tmp_path / "root", 5, 32, 32, annotations="nothing.json")
    with pytest.raises(UserError, match="no folder .*expected the one that the annotation's paths start from"):
        Clips(tmp_path / "nowhere", 5, 32, 32, annotations=tmp_path / "root" / "clips.json")


def test_folders_of_frames(tmp_path):
    for clip in "abc":
        (tmp_path / clip).mkdir()
        for k in range(12):
            Image.new("RGB", (40, 33), (4 * k,) * 3).save(tmp_path / clip / f"{k}.png")
    clips = Clips(tmp_path, 5, 32, 32)
    assert len(clips) == 2
    numbers = levels(clips.sample(0, draws())["frames"])
    assert numbers == list(range(numbers[0], numbers[0] + 5)), "frame 10 comes after frame 9"


def test_small_videos_are_reflected_not_enlarged(moving):
    frames = Clips(moving, 2, 160, 256, split="validation").sample(0)["frames"]
    inside = frames[:, :, 32:-32, 64:-64]
    assert inside.shape == (2, 3, 96, 128)
    assert torch.equal(frames[:, :, :32, 64:-64], inside[:, :, 1:33].flip(2))
    assert torch.equal(frames[:, :, 32:-32, :64], inside[:, :, :, 1:65].flip(3))


def test_short_videos_are_left_out_or_held(flat, tmp_path):
    shutil.copytree(flat, tmp_path / "root")
    videos.write_flat(tmp_path / "root" / "short.mp4", 3)
    clips = Clips(tmp_path / "root", 5, 32, 32, held_out=0)
    assert len(clips) == 8
    assert clips.describe()["too_short"] == ["short.mp4: 3 frames, 5 are needed"]
    (tmp_path / "list.json").write_text('[{"path": "short.mp4"}]')
    held = Clips(tmp_path / "root", 5, 32, 32, annotations=tmp_path / "list.json", min_frames=2)
    assert levels(held.sample(0, draws())["frames"]) == [0, 1, 2, 2, 2]
    with pytest.raises(
        UserError, match="no clip of .* can be used:\n  short.mp4: 3 frames, 5 are needed\n.*lower num_frames"
    ):
        Clips(tmp_path / "root", 5, 32, 32, annotations=tmp_path / "list.json")


@pytest.mark.parametrize("decoder", DECODERS)
def test_bad_videos_are_left_out_within_limits(flat, tmp_path, decoder, monkeypatch, caplog):
    monkeypatch.setenv("VIREO_DECODER", decoder)
    shutil.copytree(flat, tmp_path / "root")
    bad = videos.broken(tmp_path / "root" / "bad")
    bad = {kind for kind in bad if kind not in ("missing", "other container", "folder without pictures")}
    with pytest.raises(
        UserError, match=f"{len(bad)} of {8 + len(bad)} videos .* more than max_bad_fraction=0.01"
    ) as caught:
        Clips(tmp_path / "root", 5, 32, 32)
    assert "bad/audio.mp4: there is no video stream" in str(caught.value)
    clips = Clips(tmp_path / "root", 5, 32, 32, held_out=0, max_bad_fraction=0.5)
    assert len(clips) == 8
    assert len(clips.describe()["bad"]) == len(bad)
    assert "left out" in caplog.text and "bad/empty.mp4: the file is empty" in caplog.text


def test_a_long_list_of_bad_videos_is_cut_and_counted(tmp_path):
    for k in range(30):
        (tmp_path / f"{k:02d}.mp4").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        Clips(tmp_path, 5, 32, 32)
    message = str(caught.value).splitlines()
    assert message[0].startswith("30 of 30 videos") and "  … and 21 more" in message
    assert sum("empty" in line for line in message) == 9


def test_a_listed_video_that_is_missing_is_bad(flat, tmp_path):
    (tmp_path / "clips.json").write_text(json.dumps([{"path": "a.mp4"}, {"path": "gone.mp4"}]))
    with pytest.raises(UserError, match="gone.mp4: there is no such file"):
        Clips(flat, 5, 32, 32, annotations=tmp_path / "clips.json")


def test_a_video_that_breaks_during_the_run_is_bad(flat, tmp_path):
    shutil.copytree(flat, tmp_path / "root")
    clips = Clips(tmp_path / "root", 5, 32, 32, held_out=0)
    (tmp_path / "root" / "c.mp4").write_text("overwritten")
    with pytest.raises(BadVideoError, match="not a video") as caught:
        clips.sample(2, draws())
    assert caught.value.path == tmp_path / "root" / "c.mp4"
    clips.sample(3, draws())


def test_what_is_described(flat, moving, tmp_path):
    shutil.copytree(flat, tmp_path / "root")
    shutil.copy(moving / "a.mp4", tmp_path / "root" / "z.mp4")
    told = Clips(tmp_path / "root", 5, 32, 32, held_out=0.2).describe()
    validation = Clips(tmp_path / "root", 5, 32, 32, held_out=0.2, split="validation").describe()
    assert told["clips"] + validation["clips"] == 9
    assert told["frames"] + validation["frames"] == 8 * 30 + 20
    assert told["held_out"] == validation["held_out"] and len(told["held_out"]) == validation["clips"]
    everything = Clips(tmp_path / "root", 5, 32, 32, held_out=0).describe()
    assert (everything["fps"], everything["height"], everything["width"]) == ("25.0", "48 to 96", "64 to 128")
    assert everything["hours"] == round(260 / 25 / 3600, 3)


def test_all_wrong_arguments_are_told_at_once(flat):
    wrong = {
        "num_frames": 0,
        "height": -1,
        "split": "test",
        "held_out": 1.0,
        "frame_step": (3, 2),
        "sizes": [],
        "crop": "left",
        "crop_scale": (0.9, 0.8),
        "flip": 1.5,
        "jitter_strength": (0.1, 0.1, -0.1, 0),
    }
    with pytest.raises(UserError) as caught:
        Clips(**{"root": flat, "width": 32, **wrong})
    for name in wrong:
        assert f"\n  {name} is " in str(caught.value), name


@pytest.mark.skipif("VIREO_SAMPLE_DATA" not in os.environ, reason="VIREO_SAMPLE_DATA is not set: no real clips")
@pytest.mark.parametrize("layout", ["cogvideox_sample/videos", "ytvos_sample/JPEGImages", "davis_sample/JPEGImages"])
def test_real_clips(layout):
    clips = Clips(os.path.join(os.environ["VIREO_SAMPLE_DATA"], layout), 9, 64, 96, flip=0.5, jitter=0.7, held_out=0)
    for index in range(len(clips)):
        frames = clips.sample(index, draws(index))["frames"]
        assert frames.shape == (9, 3, 64, 96)
        assert frames.float().std() > 10, "an empty picture"


def test_the_dataset_needs_no_decord(moving, monkeypatch):
    expected = Clips(moving, 5, 32, 48).sample(0, draws())["frames"]
    monkeypatch.setitem(sys.modules, "decord", None)
    video_io._decord.cache_clear()
    try:
        assert torch.equal(Clips(moving, 5, 32, 48).sample(0, draws())["frames"], expected)
    finally:
        video_io._decord.cache_clear()
