"""Clips with holes from DAVIS, YouTube-VOS and other videos: which ones, which pixels, what is read when."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vireo.data.masked_clips import MaskedClips
from vireo.data.source import ChangedError
from vireo.data.stream import Stream, collate
from vireo.data.transforms import RESAMPLER
from vireo.errors import UserError
from vireo.randomness import Draws
from vireo.video_io import BadVideoError, write_video

GOLDEN = Path(__file__).parents[1] / "golden" / "diffueraser"
SAMPLES = os.environ.get("VIREO_SAMPLE_DATA")
samples = pytest.mark.skipif(not SAMPLES, reason="VIREO_SAMPLE_DATA names no folder with real clips")


def write_frames(folder, count, size=(24, 40), step=1, shade=0):
    """Frame k is a ramp, brighter by 5 with each frame."""
    folder.mkdir(parents=True)
    ramp = np.add.outer(np.arange(size[0]), np.arange(size[1]))
    for number in range(count):
        picture = np.stack([ramp + 40 + 5 * number, ramp + 60, np.full(size, shade)], axis=2).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{step * number:05d}.png")


@pytest.fixture
def roots(tmp_path):
    """DAVIS with two videos to train on, one short, and one held out with an annotation; YouTube-VOS with two."""
    davis = tmp_path / "DAVIS"
    for shade, (name, count) in enumerate({"bear": 6, "boat": 3, "dog": 7, "swan": 5}.items()):
        write_frames(davis / "JPEGImages/480p" / name, count, shade=shade)
    (davis / "ImageSets/2017").mkdir(parents=True)
    (davis / "ImageSets/2017/train.txt").write_text("bear\nboat\n\nswan\n")
    (davis / "ImageSets/2017/val.txt").write_text("dog\n")
    (davis / "Annotations/480p/dog").mkdir(parents=True)
    for number in range(7):
        index = np.zeros((24, 40), np.uint8)
        index[8:12, 10 + number : 16 + number] = 1
        picture = Image.fromarray(index, "P")
        picture.putpalette([0, 0, 0, 38, 0, 0] + [0] * 762)
        picture.save(davis / f"Annotations/480p/dog/{number:05d}.png")
    ytvos = tmp_path / "YouTubeVOS"
    write_frames(ytvos / "JPEGImages" / "0a", 12, step=5, shade=10)
    write_frames(ytvos / "JPEGImages" / "0b", 4, step=5, shade=11)
    return {"davis": davis, "ytvos": ytvos}


def clips(roots, split="train", num_frames=5, **changes):
    return MaskedClips(num_frames, 16, 16, split=split, **{**roots, **changes})


def load(sample):
    (loaded,) = Stream(_One(sample), 0, shuffle=False).samples([(0, 0)])
    return loaded


class _One:
    max_bad_fraction = 0.0

    def __init__(self, sample):
        self.given = sample

    def __len__(self):
        return 1

    def sample(self, index, draws):
        return self.given


def test_sources_are_repeated_and_short_videos_counted(roots, caplog):
    data = clips(roots, repeat={"davis": 10})
    names = [data.order[index] for index in range(len(data))]
    assert [names.count(name) for name in ("davis/bear", "davis/swan", "ytvos/0a")] == [10, 10, 1] and len(data) == 21
    about = data.describe()
    assert about["davis"] == f"2 videos, 11 frames, each 10 times, 1 too short ({roots['davis']})"
    assert about["ytvos"] == f"1 videos, 12 frames, 1 too short ({roots['ytvos']})"
    assert "1 videos of davis have fewer than 5 frames" in caplog.text
    held_out = clips(roots, "validation", repeat={"davis": 10})
    assert held_out.order == ["davis/dog"]


def test_a_clip_is_successive_frames_in_either_direction(roots):
    data = clips({**roots, "davis": None}, num_frames=4, held_out=0.0)
    starts, directions = set(), set()
    for position in range(60):
        sample = data.sample(data.order.index("ytvos/0a"), Draws(0, [position]))
        numbers = [int(source.name.rpartition("/")[2]) for source in sample["frames"]]
        assert set(np.diff(numbers)) in ({1}, {-1}), "consecutive as listed, though the files are numbered by fives"
        starts.add(min(numbers))
        directions.add(numbers[0] < numbers[1])
    assert starts == set(range(9)) and directions == {True, False}
    forwards = clips(roots, reverse=0.0).sample(0, Draws(0, [1]))["frames"]
    assert forwards[0].name < forwards[-1].name


def test_the_batch_has_what_the_recipe_needs(roots):
    data = clips(roots)
    batch = collate(Stream(data, 0).samples([(0, 0), (1, 0)]))
    assert batch["frames"].shape == batch["masked_frames"].shape == (2, 5, 3, 16, 16)
    assert batch["hole"].shape == (2, 5, 1, 16, 16) and set(batch["hole"].unique().tolist()) <= {0, 1}
    assert {batch[name].dtype for name in ("frames", "masked_frames", "hole")} == {torch.uint8}
    assert batch["prompt"] == ["clean background"] * 2
    again = collate(Stream(data, 0).samples([(1, 5)]))
    for name in ("frames", "masked_frames", "hole"):
        assert torch.equal(again[name][0], batch[name][1]), "the position alone says what is drawn"


def test_frames_are_decoded_once_and_holes_are_never_cached(roots, monkeypatch):
    from vireo.data import masked_clips

    asked = []

    class Counting(masked_clips.VideoReader):
        def get(self, indices):
            asked.append(list(indices))
            return super().get(indices)

    monkeypatch.setattr(masked_clips, "VideoReader", Counting)
    sample = clips(roots).sample(0, Draws(0, [0]))
    assert not asked, "nothing is decoded before it is needed"
    assert sample["masked_frames"].identity is None and sample["hole"].identity is None
    load(sample)
    assert len(asked) == 1 and len(asked[0]) == 5


def test_windows_share_their_frames_identities(roots):
    data = clips(roots)
    index = data.order.index("ytvos/0a")
    known = data.sources(index)
    assert known["prompt"] == ["clean background"] and len(known["frames"]) == 12
    by_identity = {source.identity: source for source in known["frames"]}
    assert len(by_identity) == 12
    assert {json.loads(identity)["resampler"] for identity in by_identity} == {RESAMPLER}
    for position in range(5):
        for source in data.sample(index, Draws(0, [position]))["frames"]:
            assert torch.equal(source.load(), by_identity[source.identity].load())
    other = clips(roots, crop="none").sources(index)["frames"]
    assert not {source.identity for source in other} & by_identity.keys(), "another size is another picture"


def test_a_frame_that_changes_is_not_taken_for_what_it_was(roots):
    data = clips(roots)
    index = data.order.index("ytvos/0a")
    sample, known = data.sample(index, Draws(0, [0])), data.sources(index)["frames"]
    for file in (roots["ytvos"] / "JPEGImages/0a").iterdir():
        Image.new("RGB", (40, 24), "red").save(file)
    for source in (sample["frames"][2], known[5]):
        with pytest.raises(ChangedError):
            source.load()
    assert data.sources(index)["frames"][5].load()[0].min() == 255, "asked again, it is another picture"


@samples
def test_pixels_are_those_of_the_published_dataset():
    """The frames, the masked ones and the masks, against `transform.*`; our resampler may differ by a grey level."""
    golden = load_file(GOLDEN / "transform.safetensors")

    class Recorded(Draws):
        def integers(self, purpose, low, high, *shape):
            return torch.tensor([5])

    def hole(num_frames, height, width, draws):
        made = torch.zeros(num_frames, height, width, dtype=torch.uint8)
        for k in range(num_frames):
            made[k, 60 + 3 * k : 140 + 3 * k, 150 + 5 * k : 260 + 5 * k] = 1
        return made

    videos = Path(SAMPLES) / "davis_sample/JPEGImages/480p"
    data = MaskedClips(3, 64, 64, davis=None, ytvos=None, videos=videos, held_out=0.0, mask=hole, reverse=0.0)
    found = load(data.sample(data.order.index("videos/bmx-trees"), Recorded(0, [0])))
    keep = 1 - found["hole"]
    assert torch.equal(keep.float(), golden["masks"])
    assert torch.equal(keep[..., ::8, ::8].float(), golden["latent_masks"])
    for ours, theirs in {"frames": "pixel_values", "masked_frames": "conditioning_pixel_values"}.items():
        levels = (golden[theirs] + 1) * 127.5
        assert (found[ours] - levels).abs().max() < 1.01 and (found[ours] - levels).abs().mean() < 0.01


@samples
def test_the_real_samples_are_read_in_both_layouts():
    roots = {"davis": Path(SAMPLES) / "davis_sample", "ytvos": Path(SAMPLES) / "ytvos_sample"}
    assert clips(roots, num_frames=10).describe()["davis"].startswith("2 videos, 92 frames")
    long = clips(roots, num_frames=22)
    assert long.describe()["davis"].startswith("1 videos, 80 frames, 1 too short"), "skatepark has 12 frames"
    (held_out,) = Stream(clips(roots, "validation", num_frames=10), "validation", shuffle=False).samples([(0, 0)])
    assert held_out["frames"].shape == (10, 3, 240, 432) and held_out["hole"].float().mean() > 0.02


def test_held_out_clips_have_annotations_dilated_at_native_size(roots):
    data = clips(roots, "validation")
    sample = load(data.sample(0, Draws(0, [9])))
    assert sample["frames"].shape == (5, 3, 24, 40) and sample["fps"] == 24.0
    hole = sample["hole"][0, 0]
    assert hole[8:12, 10:16].all() and hole[4, 12] and not hole[3].any() and not hole[4, 9], "a cross, four times"
    assert not sample["masked_frames"].permute(0, 2, 3, 1)[sample["hole"][:, 0].bool()].any()
    small = load(clips(roots, "validation", validation_size="crop").sample(0, Draws(0, [9])))
    assert small["frames"].shape == (5, 3, 16, 16)


def test_held_out_clips_without_annotation_have_the_same_hole_every_time(roots):
    data = clips(roots, "validation", annotations=False)
    first, second = (load(data.sample(0, Draws(seed, [seed]))) for seed in (1, 2))
    assert first["hole"].any() and torch.equal(first["hole"], second["hole"])
    assert not torch.equal(first["hole"], load(clips(roots, "validation").sample(0, Draws(1, [1])))["hole"])


def test_a_folder_of_masks_takes_the_place_of_drawn_ones(roots, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    one = np.zeros((24, 40), np.uint8)
    one[5:9, 8:30] = 255
    Image.fromarray(one).save(masks / "bear.png")
    write_frames(masks / "swan", 5)
    data = clips(roots, masks=masks, dilation=0, crop="none")
    assert data.describe()["holes"] == "2 videos have theirs, 1 drawn ones"
    bear = load(data.sample(data.order.index("davis/bear"), Draws(0, [0])))
    assert bear["hole"].shape == (5, 1, 16, 24) and bear["hole"][:, 0].float().mean() == pytest.approx(
        88 / 886, abs=0.02
    )
    assert load(data.sample(data.order.index("davis/swan"), Draws(0, [0])))["hole"].all()


def test_masks_of_no_video_are_refused_and_of_some_videos_told(roots, tmp_path, caplog):
    masks = tmp_path / "masks"
    (masks / "other").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has a mask of no video: .*bear/, bear\.png or bear\.mp4; there is other"):
        clips(roots, masks=masks)
    Image.new("L", (40, 24), 255).save(masks / "bear.png")
    assert len(clips(roots, masks=masks)) == 3
    assert f"2 of 3 videos (train) have no mask in {masks}, so their holes are drawn:\n  davis/swan\n" in caplog.text
    assert clips(roots, "validation", masks=masks).describe()["holes"] == "0 videos have theirs, 1 drawn ones"
    assert "1 of 1 videos (validation) have no mask" in caplog.text
    (masks / "swan.mp4").write_bytes(b"no video")
    bad = clips(roots, masks=masks, max_bad_fraction=0.5)
    assert bad.bad["davis/swan"].startswith(f"{masks / 'swan.mp4'}: not a video") and "davis/swan" not in bad.videos


def test_any_videos_are_a_source(tmp_path):
    frames = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 48) * 20
    for name in ("a.mp4", "sub/b.mp4", "c.mp4"):
        write_video(tmp_path / "videos" / name, frames, 12)
    write_video(tmp_path / "masks" / "sub" / "b.mp4", torch.full((12, 3, 32, 48), 255, dtype=torch.uint8), 12)
    roots = {"davis": None, "ytvos": None, "videos": tmp_path / "videos"}
    data, held_out = (clips(roots, split, held_out=0.2, masks=tmp_path / "masks") for split in ("train", "validation"))
    assert len(data) + len(held_out) == 3 and len(held_out) == 1
    everything = clips(roots, "validation", held_out="all", masks=tmp_path / "masks")
    assert len(everything) == 3 and len(clips(roots, held_out="all")) == 0
    whole = load(everything.sample(everything.order.index("videos/sub/b.mp4"), Draws(0, [0])))
    assert whole["hole"].all() and whole["fps"] == 12.0
    assert (whole["frames"][:, 0, 0, 0].int() - torch.arange(5) * 20).abs().max() < 4


def test_training_on_whole_pictures_of_several_sizes_needs_batches_of_one(roots):
    write_frames(roots["davis"] / "JPEGImages/480p/cow", 9, size=(24, 56))
    (roots["davis"] / "ImageSets/2017/train.txt").write_text("cow\nbear\n")
    stream = Stream(clips(roots, crop="none", ytvos=None), 0, shuffle=False)
    with pytest.raises(UserError, match="differ in shape, frames.*batch_size=1"):
        collate(stream.samples([(0, 0), (1, 0)]))
    assert collate(stream.samples([(0, 0)]))["frames"].shape == (1, 5, 3, 16, 32)


def test_upstreams_whole_pictures(roots):
    data = clips(roots, crop="none")
    sample = load(data.sample(0, Draws(0, [0])))
    assert sample["frames"].shape == (5, 3, 16, 24), "24 x 40 becomes 16 x 26, cut to multiples of 8"
    assert set(sample["hole"].unique().tolist()) <= {0, 1}


def test_names_are_held_out(roots):
    assert clips(roots, "validation", held_out=["bear", "ytvos/0a"]).order == ["davis/bear", "ytvos/0a"]
    assert clips(roots, held_out=["bear"]).order == ["davis/swan", "ytvos/0a"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"davis": "nowhere"}, "no folder nowhere/JPEGImages/480p.*data.davis=null"),
        ({"ytvos": "nowhere"}, "no folder nowhere/JPEGImages.*data.ytvos=null"),
        ({"held_out": "test-dev"}, "test-dev.txt, there are train, val"),
        ({"davis": None}, "held_out=val is a list of DAVIS, which is off"),
        ({"davis": None, "ytvos": None, "held_out": 0.1}, "all null"),
        ({"num_frames": 50}, "no video has num_frames=50"),
        ({"held_out": ["cow"]}, "held_out names cow"),
        ({"num_frames": 7, "ytvos": None}, r"left to train on: 1 of 4 have num_frames=7.*davis 3 are shorter"),
        ({"repeat": {"davs": 2}}, "repeat names davs"),
        ({"reverse": 2.0}, "reverse is 2.0"),
        ({"masks": "nowhere"}, "masks is nowhere"),
        ({"crop": "middle"}, "crop is 'middle'"),
        ({"dilation": -1}, "dilation is -1"),
    ],
)
def test_mistakes_are_told(roots, changes, said):
    with pytest.raises(UserError, match=said):
        clips(roots, **changes)


def test_a_listed_video_that_is_missing_is_reported(roots, caplog):
    with (roots["davis"] / "ImageSets/2017/train.txt").open("a") as lines:
        lines.write("ghost\n")
    with pytest.raises(UserError, match="davis/ghost"):
        clips(roots)
    assert clips(roots, max_bad_fraction=0.5).describe()["bad"] == ["davis/ghost: there is no such file"]
    assert "davis/ghost" in caplog.text


def test_masks_of_another_size_or_number_are_bad_before_training(roots, caplog):
    annotations, shrunk = roots["davis"] / "Annotations/480p/dog", clips(roots, "validation")
    for file in annotations.iterdir():
        Image.new("L", (20, 24), 255).save(file)
    with pytest.raises(BadVideoError, match="20x24 pixels for 40x24"):
        shrunk.sample(0, Draws(0, [0]))["hole"].load()
    (annotations / "00007.png").touch()
    (annotations / "00007.png").unlink()  # a picture that is overwritten in place goes unnoticed
    with pytest.raises(UserError, match=r"1 of 6 videos.*\n.*davis/dog.*480p/dog: masks of 20x24 pixels for 40x24"):
        clips(roots, "validation")
    (annotations / "00006.png").unlink()
    data = clips(roots, "validation", max_bad_fraction=0.5)
    assert data.describe()["bad"] == [f"davis/dog: {annotations}: {SIX}"] and len(data) == 0
    assert f"(validation) whose masks do not suit them are left out:\n  davis/dog: {annotations}: {SIX}" in caplog.text
    assert clips(roots, "validation", annotations=False).describe()["bad"] == [] == clips(roots).describe()["bad"]


SIX = "there are 6 masks for 7 frames: expected as many, or a single one for all"


def test_whole_videos_are_as_long_and_large_as_they_are(roots):
    data = clips(roots, "validation", num_frames=3, validation_size="crop")
    whole = data.whole(0)
    assert whole["frames"].shape == whole["masked_frames"].shape == (7, 3, 24, 40) and whole["name"] == "davis/dog"
    first = data.whole(0, 4)
    assert torch.equal(first["hole"], whole["hole"][:4]) and whole["hole"].any()
    native = load(clips(roots, "validation", num_frames=3).sample(0, Draws(0, [0])))
    for name in ("frames", "masked_frames", "hole"):
        assert torch.equal(native[name], whole[name][:3]), "validation sees its beginning"


def test_whole_files_become_a_sample(tmp_path):
    frames = (torch.arange(12)[:, None, None, None] * 20).to(torch.uint8).expand(-1, 3, 40, 68)
    write_video(tmp_path / "clip.mp4", frames, 10)
    mask = np.zeros((40, 68), np.uint8)
    mask[10:20, 20:40] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    given = {"video": str(tmp_path / "clip.mp4"), "mask": str(tmp_path / "mask.png"), "prompt": "x", "dilation": 2}
    sample = MaskedClips.from_files(**given, prior=str(tmp_path / "clip.mp4"))
    assert sample["frames"].shape == sample["prior_frames"].shape == (12, 3, 40, 64) and sample["fps"] == 10
    assert sample["hole"].sum() == 12 * (10 * 20 + 2 * 2 * (10 + 20) + 4), "a cross rounds the corners"
    small = MaskedClips.from_files(**given, max_side="34")
    assert small["frames"].shape == (12, 3, 16, 32)
    write_video(tmp_path / "short.mp4", frames[:5], 10)
    with pytest.raises(UserError, match="5 frames, the video 12"):
        MaskedClips.from_files(**given, prior=str(tmp_path / "short.mp4"))
    Image.new("L", (20, 24), 255).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="20x24 pixels, the video 68x40"):
        MaskedClips.from_files(**given)


def test_files_that_do_not_suit_are_told(tmp_path):
    write_frames(tmp_path / "video", 3, size=(40, 68))
    write_frames(tmp_path / "tiny", 3, size=(6, 68))
    mask = np.zeros((40, 68), np.uint8)
    mask[10:20, 20:40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(0 * mask).save(tmp_path / "black.png")
    Image.fromarray(255 - 0 * mask).save(tmp_path / "white.png")
    write_frames(tmp_path / "four", 4, size=(40, 68))
    for name, size in {"square": (40, 40), "double": (80, 136), "cut": (40, 64), "halved": (16, 32)}.items():
        write_frames(tmp_path / name, 3, size=size)
    given = {"video": str(tmp_path / "video"), "mask": str(tmp_path / "mask.png"), "dilation": 0}
    for changes, said in (
        ({"max_side": "abc"}, r"max_side=abc, .*at least 8"),
        ({"max_side": "0"}, r"max_side=0, .*at least 8"),
        ({"max_side": "-5"}, r"max_side=-5, .*at least 8"),
        ({"max_side": 4}, r"max_side=4, .*at least 8"),
        ({"max_side": 8}, r"is 68x40 pixels, 8x4 with max_side=8: at least 8x8"),
        ({"video": str(tmp_path / "tiny")}, r"is 68x6 pixels: at least 8x8"),
        ({"dilation": -3}, r"dilation=-3: .* and 0"),
        ({"mask": str(tmp_path / "black.png")}, r"black\.png makes 0% of the video a hole"),
        ({"mask": str(tmp_path / "white.png")}, r"white\.png makes 100% of the video a hole"),
        ({"mask": str(tmp_path / "four")}, r"there are 4 masks for 3 frames"),
        ({"prior": str(tmp_path / "square")}, r"prior=.*square is 40x40 pixels, the video 68x40"),
    ):
        with pytest.raises(UserError, match=said):
            MaskedClips.from_files(**{**given, **changes})
    for name in ("double", "cut", "halved"):
        sample = MaskedClips.from_files(**given, prior=str(tmp_path / name))
        assert sample["prior_frames"].shape == sample["frames"].shape == (3, 3, 40, 64)
