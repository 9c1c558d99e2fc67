import json
import shutil
from collections import Counter

import pytest
import torch
from PIL import Image

from tests.data import captions, videos
from vireo.data.captioned_clips import CaptionedClips
from vireo.data.source import ChangedError, Source
from vireo.data.stream import Stream, collate
from vireo.data.transforms import RESAMPLER
from vireo.errors import UserError
from vireo.randomness import Draws
from vireo.video_io import BadVideoError, read_image

SHAPE = (9, 32, 32)


def draws(position=0, seed=0, step=0):
    return Draws(seed, [position], step=step)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Clips of 20, 9 and 4 frames; clip k's first frame is the grey 4 k."""
    return captions.write(tmp_path_factory.mktemp("captioned"), [20, 9, 4])


def make(root, shape=SHAPE, **options):
    return CaptionedClips(root, *shape, **{"held_out": 0, **options})


def shown(sample) -> list[int]:
    """The numbers of the frames of the clip that its grey tells; the first clip's begin at 0."""
    return [round(float(frame.float().mean()) / 4) for frame in sample["frames"].load()]


def test_a_sample(root):
    clips = make(root, image="first_frame")
    sample = clips.sample(1, draws())
    assert len(clips) == 3 and sample.keys() == {"frames", "image", "prompt", "name"}
    assert (sample["prompt"], sample["name"]) == ("caption 1", "videos/1.mp4")
    frames, image = sample["frames"].load(), sample["image"].load()
    assert frames.shape == (9, 3, 32, 32) and frames.dtype == image.dtype == torch.uint8
    assert torch.equal(image, frames[0]), "the very same pixels"
    assert "image" not in make(root).sample(0, draws())


def test_batches_through_the_stream(root):
    batch = Stream(make(root, image="first_frame"), 0, shuffle=False).batch(range(3), torch.device("cpu"))
    assert batch["frames"].shape == (3, 9, 3, 32, 32) and batch["image"].shape == (3, 3, 32, 32)
    assert batch["prompt"] == ["caption 0", "caption 1", "caption 2"]


# ------------------------------------------------------------------ frames


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        ({"frame_policy": "uniform"}, [0, 2, 5, 7, 10, 12, 14, 17, 19]),
        ({"frame_policy": "clip"}, list(range(9))),
        ({"frame_policy": "clip", "start": "center"}, list(range(6, 15))),
        ({"frame_policy": "clip", "fps": 12.5}, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        ({"frame_policy": "clip", "fps": 12.5, "start": "center"}, [2, 4, 6, 8, 10, 12, 14, 16, 18]),
        ({"frame_policy": "clip", "fps": 50}, [0, 1, 1, 2, 2, 3, 3, 4, 4]),
    ],
)
def test_frame_policies(root, options, expected):
    assert shown(make(root, **options).sample(0, draws())) == expected


def test_short_clips(root):
    held = shown(make(root).sample(2, draws()))
    assert held == [2, 3, 4, 5, 5, 5, 5, 5, 5], "the grey of clip 2 begins two levels later"
    assert shown(make(root, pad="loop").sample(2, draws())) == [2, 3, 4, 5, 2, 3, 4, 5, 2]
    with pytest.raises(UserError, match=r"videos.txt, line 3: videos/2.mp4 gives 4 frames, 9 are needed"):
        make(root, pad="error")


def test_a_random_start_is_a_function_of_the_position(root):
    clips = make(root, frame_policy="clip", start="random")
    starts = [shown(clips.sample(0, draws(position)))[0] for position in range(40)]
    assert starts == [shown(clips.sample(0, draws(position)))[0] for position in range(40)]
    assert len(set(starts)) > 6 and set(starts) <= set(range(12))
    assert clips.sample(0, draws())["frames"].identity is None
    assert clips.sources(0).keys() == {"prompt"}, "nothing of it can be cached"


def test_windows_make_random_starts_finite(root):
    clips = make(root, frame_policy="clip", start="random", windows=3, image="first_frame")
    known = {field: {one.identity for one in clips.sources(0)[field]} for field in ("frames", "image")}
    assert 1 < len(known["frames"]) <= 3
    for position in range(20):
        sample = clips.sample(0, draws(position))
        assert sample["frames"].identity in known["frames"] and sample["image"].identity in known["image"]


def test_validation_is_never_random(root):
    held = CaptionedClips(root, *SHAPE, held_out=0.4, split="validation", frame_policy="clip", start="random")
    first, again = (held.sample(0, draws(position)) for position in (0, 7))
    assert first["frames"].identity == again["frames"].identity is not None
    assert first["fps"] == 25


# ------------------------------------------------------------------ pictures


def test_listed_pictures_are_resized_as_the_clips_are(tmp_path):
    root = captions.write(tmp_path, [9])
    pixels = videos.pictures(1, 48, 64)[0]
    Image.fromarray(pixels).save(root / "one.png")
    videos.write(root / "videos" / "0.mp4", videos.pictures(9, 48, 64))
    captions.write_list(root / "images.txt", ["one.png"])
    for how in ("crop", "pad", "stretch"):
        sample = make(root, (9, 16, 32), image="listed", resize=how).sample(0, draws())
        difference = sample["image"].load().float() - sample["frames"].load()[0].float()
        assert difference.abs().mean() < 6, "the codec's loss, no other place"
        assert sample["image"].load().shape == (3, 16, 32)


def test_prepare_extracts_first_frames(root, tmp_path):
    folder = shutil.copytree(root, tmp_path / "copy")
    told = CaptionedClips.prepare(folder)
    assert "3 first frames" in told and (folder / "images.txt").read_text().split() == [
        f"images/{number}.png" for number in range(3)
    ]
    assert read_image(folder / "images" / "1.png").shape == (3, 48, 64)
    sample = make(folder, image="listed").sample(1, draws())
    assert torch.equal(sample["image"].load(), sample["frames"].load()[0])
    with pytest.raises(UserError, match="exist: remove them"):
        CaptionedClips.prepare(folder)


def test_first_frames_elsewhere_are_found_by_the_words_that_are_told(root, tmp_path, monkeypatch):
    """As the page has it: `out` relative to where one is, a folder that need not have captions yet."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(root, tmp_path / "copy", ignore=shutil.ignore_patterns("prompts.txt"))
    told = CaptionedClips.prepare(folder, out="first_frames")
    words = dict(word.split("=") for word in told.splitlines()[-1].removeprefix("to start from them: ").split())
    assert words == {"data.image": "listed", "data.images": str(tmp_path / "first_frames" / "images.txt")}
    clips = make(root, image=words["data.image"], images=words["data.images"])
    assert torch.equal(clips.sample(1, draws())["image"].load(), clips.sample(1, draws())["frames"].load()[0])
    captions.write_list(tmp_path / "held" / "prompts.txt", ["up"])
    Image.new("RGB", (40, 40)).save(tmp_path / "held" / "one.png")
    captions.write_list(tmp_path / "held" / "images.txt", ["one.png"])
    assert len(make(root, split="validation", validation=str(tmp_path / "held"), image="listed",
                    images=words["data.images"])) == 1  # fmt: skip
    captions.write_list(tmp_path / "first_frames" / "images.txt", ["../copy/images/0.png"] * 3)
    with pytest.raises(UserError, match=r"images.txt, line 1: .* lies outside .*first_frames"):
        make(root, image="listed", images=words["data.images"])


def test_prepare_fails_on_a_clip_that_cannot_be_read(tmp_path):
    root = captions.write(tmp_path, [9, 9], names=["a/clip.mp4", "b/clip.mp4"])
    CaptionedClips.prepare(root)
    assert (root / "images.txt").read_text().split() == ["images/a/clip.png", "images/b/clip.png"], "stems collide"
    shutil.rmtree(root / "images")
    (root / "images.txt").unlink()
    (root / "b" / "clip.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="videos.txt, line 2: b/clip.mp4: "):
        CaptionedClips.prepare(root)
    assert not (root / "images.txt").exists() and not list(root.glob("*images*")), "nothing is left behind"


# ------------------------------------------------------------------ captions and splits


def test_the_id_token_is_put_before_captions_once(root, tmp_path):
    folder = shutil.copytree(root, tmp_path / "copy")
    captions.write_list(folder / "prompts.txt", ["TOY ship", "TOYS", "TOY"])
    found = [make(folder, id_token="TOY").sample(index, draws())["prompt"] for index in range(3)]
    assert found == ["TOY ship", "TOY TOYS", "TOY"]
    held = {"split": "validation", "validation": str(root), "id_token": "TOY"}
    assert make(root, **held).sample(0, draws())["prompt"] == "TOY caption 0"
    assert make(root, **held, validation_id_token=False).sample(0, draws())["prompt"] == "caption 0"
    assert make(root, id_token="TOY").sources(0)["prompt"] == ["TOY caption 0"], "its key in the cache"


def test_a_validation_folder(root, tmp_path):
    folder = shutil.copytree(root, tmp_path / "copy")
    captions.write_list(folder / "validation" / "prompts.txt", ["something else"])
    clips = make(folder, validation="validation", held_out=0.4)
    assert len(clips) == 3, "then nothing of root is held out"
    held = make(folder, validation="validation", split="validation")
    assert len(held) == 1
    sample = held.sample(0, draws())
    assert sample == {"prompt": "something else", "name": "prompt 1"}
    assert held.sources(0) == {"prompt": ["something else"]}
    of_pictures = {"validation": "validation", "split": "validation", "image": "first_frame"}
    with pytest.raises(UserError, match="there is no images.txt"):
        make(folder, **of_pictures)
    Image.new("RGB", (40, 40), (7, 8, 9)).save(folder / "validation" / "one.png")
    captions.write_list(folder / "validation" / "images.txt", ["one.png"])
    assert make(folder, **of_pictures).sample(0, draws())["image"].load()[:, 0, 0].tolist() == [7, 8, 9]
    captions.write(folder / "with_clips", [12])
    sample = make(folder, validation="with_clips", split="validation").sample(0, draws())
    assert sample["frames"].load().shape == (9, 3, 32, 32) and sample["fps"] == 25


def test_one_picture_may_have_several_captions(root, tmp_path):
    folder = tmp_path
    captions.write_list(folder / "prompts.txt", ["up", "down", "left"])
    Image.new("RGB", (40, 40), (7, 8, 9)).save(folder / "one.png")
    captions.write_list(folder / "images.txt", ["one.png"] * 3)
    held = make(root, validation=str(folder), split="validation", image="first_frame")
    assert len(held) == 3 and held.notes == [f"1 pictures come more than once, such as {folder / 'one.png'}"]
    assert [held.sample(index, draws())["prompt"] for index in range(3)] == ["up", "down", "left"]


def test_held_out_clips_are_not_trained_on(root):
    splits = [
        {clips.sample(index, draws())["name"] for index in range(len(clips))}
        for clips in (CaptionedClips(root, *SHAPE, held_out=0.4, split=split) for split in ("train", "validation"))
    ]
    assert splits[0] | splits[1] == {f"videos/{number}.mp4" for number in range(3)} and not splits[0] & splits[1]
    assert all(splits)


# ------------------------------------------------------------------ buckets and mixed folders


BUCKETS = [[17, 32, 48], [9, 32, 48], [9, 48, 32], [9, 64, 96]]


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """Eight wide long clips, three wide short ones, one tall short one."""
    root = tmp_path_factory.mktemp("varied")
    names = [f"videos/{number}.mp4" for number in range(12)]
    captions.write(root, [20] * 8 + [9] * 3 + [9], (32, 48), names)
    videos.write_flat(root / names[-1], 9, 48, 32)
    return root


def test_each_clip_has_the_longest_bucket_that_it_fills_and_the_nearest_shape(varied):
    clips = make(varied, buckets=BUCKETS)
    assert Counter(clip.bucket for clip in clips.clips) == {(17, 32, 48): 8, (9, 32, 48): 3, (9, 48, 32): 1}
    assert {
        clip.bucket for clip in make(varied, validation=str(varied), split="validation", buckets=BUCKETS).clips
    } == {SHAPE}, "held-out clips have one shape"


def test_a_step_has_one_bucket_and_all_are_seen(varied):
    clips = make(varied, buckets=BUCKETS)
    stream = Stream(clips, 3)
    names, shapes = Counter(), Counter()
    for step in range(40):
        some = [stream._draw(position, step).sample for position in range(4 * step, 4 * step + 4)]
        clip = {clip.name: clip for clip in clips.clips}
        found = {clip[sample["name"]].bucket for sample in some}
        assert len(found) == 1
        shapes.update(found)
        names.update(sample["name"] for sample in some)
    assert len(names) == 12 and shapes.most_common()[0][0] == (17, 32, 48)
    assert collate(stream.samples([(4, 1), (5, 1)]))["frames"].ndim == 5


def test_what_a_position_shows_depends_on_step_and_position_alone(varied):
    places = [(position, position // 4) for position in range(40)]
    whole = [Stream(make(varied, buckets=BUCKETS), 3)._draw(*place).sample["name"] for place in places]
    resumed = Stream(make(varied, buckets=BUCKETS), 3)
    assert [resumed._draw(*place).sample["name"] for place in places[20:]] == whole[20:]


def test_folders_are_mixed_by_weight_not_by_size(tmp_path):
    captions.write(tmp_path / "ships", [9] * 6)
    captions.write(tmp_path / "horses", [9] * 2)
    clips = make(tmp_path, mix={"ships": 1, "horses": 3})
    stream = Stream(clips, 0)
    names = [stream._draw(position, position).sample["name"] for position in range(400)]
    counts = Counter(names)
    assert len(counts) == 8 and all("/videos/" in name for name in counts)
    assert 260 < sum(count for name, count in counts.items() if name.startswith("horses")) < 340
    assert [Stream(clips, 0)._draw(position, position).sample["name"] for position in (7, 300)] == [
        names[7],
        names[300],
    ]
    assert {one["name"] for one in (clips.sample(index, draws(index)) for index in range(8))}
    assert clips.describe()["mix"] == ["ships: weight 1, 6 clips", "horses: weight 3, 2 clips"]
    held = [
        CaptionedClips(tmp_path, *SHAPE, mix={"ships": 1, "horses": 3}, held_out=0.3, split=split)
        for split in ("train", "validation")
    ]
    assert sum(map(len, held)) == 8 and len(held[1]) > 0


# ------------------------------------------------------------------ what people are told


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    root = captions.write(tmp_path, [9, 9, 9, 9])
    (root / "videos" / "1.mp4").write_bytes(b"no video")
    (root / "videos" / "2.mp4").unlink()
    captions.write_list(root / "prompts.txt", ["one", "two", "three", "", "five"])
    (root / "0.png").write_text("no picture")
    Image.effect_noise((40, 40), 50).save(root / "1.png")
    (root / "2.png").write_bytes((root / "1.png").read_bytes()[:900])
    captions.write_list(root / "images.txt", ["0.png", "1.png", "2.png", "3.png"])
    with pytest.raises(UserError) as error:
        make(root, image="listed")
    told = str(error.value)
    for part in (
        "prompts.txt 5, videos.txt 4, images.txt 4; "
        "prompts.txt, line 5 ('five') has no partner in videos.txt and images.txt",
        "prompts.txt, line 4: blank",
        f"videos.txt, line 3: there is no file videos/2.mp4 in {root}",
        "videos.txt, line 2: videos/1.mp4: not a video",
        "images.txt, line 1: 0.png: not a picture, or of an unknown format",
        "images.txt, line 3: 2.png: the picture is damaged",
        f"images.txt, line 4: there is no file 3.png in {root}",
        "take the lines out of all the lists",
    ):
        assert part in told, part


def test_what_check_prints(root, tmp_path, caplog):
    about = make(root, (9, 32, 32), resize="crop").describe()
    assert (about["clips"], about["frames"], about["fps"]) == (3, "4 to 20", "25.0")
    assert about["shown as"] == ["3 clips of 9x32x32"]
    assert about["each clip"][0] == (
        "videos/0.mp4: frames 0 to 16 of 20 (0.00 to 0.64 of 0.80 s); 48x64 -> 32x32, 25% cropped"
    )
    assert "frames 0 to 3 of 4 (0.00 to 0.12 of 0.16 s), 5 frames padded" in about["each clip"][2]
    assert (
        "17% black" not in about["each clip"][0] and "25% black" in make(root, resize="pad").describe()["each clip"][0]
    )
    assert "0.75 times wider" in make(root, resize="stretch").describe()["each clip"][0]


def test_departures_that_are_known_to_fail_are_told(root, tmp_path, caplog):
    make(root, resize="stretch")
    assert "3 clips: a new concept or style needs at least 25" in caplog.text
    assert "stretch makes pictures up to 0.75 times wider" in caplog.text
    assert "1 clips are too short and padded" in caplog.text
    folder = shutil.copytree(root, tmp_path / "copy")
    captions.write_list(folder / "prompts.txt", ["same", "same", "other"])
    assert "1 captions come more than once, such as 'same'" in make(folder).notes
    CaptionedClips.prepare(folder)
    assert any("images.txt is not read, since" in n for n in make(folder, image="first_frame").notes)
    for image in ("none", "listed"):
        assert not any("is not read" in note for note in make(folder, image=image).notes)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"resize": "squeeze"}, "resize is 'squeeze', expected crop, pad or stretch"),
        ({"fps": 8}, "fps and start are for frame_policy=clip"),
        ({"frame_policy": "clip", "fps": 0}, "fps is 0"),
        ({"windows": 3}, "windows is 3"),
        ({"buckets": []}, "buckets is empty"),
        ({"buckets": [[9, 32]]}, r"buckets\[0\] is \[9, 32\], expected three numbers"),
        ({"mix": {"a": 0}}, "mix.a is 0, expected more than 0"),
        ({"image": "listed"}, "there is no images.txt"),
        ({"images": "a.txt"}, "images=a.txt is read with image=listed alone, which is none"),
        ({"images": "a.txt", "image": "first_frame"}, "with image=listed alone, which is first_frame"),
        ({"pad": "x", "image": "y"}, "(?s)image is 'y'.*pad is 'x'"),
    ],
)
def test_arguments_that_make_no_sense(root, options, told):
    with pytest.raises(UserError, match=told):
        make(root, **options)


# ------------------------------------------------------------------ identities


def test_identities_say_content_and_all_that_shapes_the_pixels(root, tmp_path):
    def identity(folder, **options):
        source = make(folder, **options).sample(0, draws())["frames"]
        assert isinstance(source, Source)
        return source.identity

    moved = shutil.copytree(root, tmp_path / "moved")
    captions.write_list(moved / "prompts.txt", ["x", "y", "z"])
    assert identity(moved) == identity(root), "neither place nor captions matter"
    changes = [{"resize": "pad"}, {"frame_policy": "uniform"}, {"shape": (9, 16, 32)}, {"shape": (17, 32, 32)}]
    assert len({identity(root), *(identity(root, **change) for change in changes)}) == 5
    videos.write_flat(moved / "videos" / "0.mp4", 20, first=3)
    assert identity(moved) != identity(root), "another clip under the same name"
    said = json.loads(identity(root))
    assert said["frames"] == list(range(0, 17, 2)) and said["resampler"] == RESAMPLER


def test_content_that_changes_while_it_is_read_is_not_what_its_identity_says(root, tmp_path):
    folder = shutil.copytree(root, tmp_path / "changing")
    shutil.copytree(folder / "videos", tmp_path / "spare")
    frames = folder / "videos" / "frames"
    frames.mkdir()
    for number in range(9):
        Image.fromarray(videos.pictures(1, 32, 32)[0]).save(frames / f"{number}.png")
    captions.write_list(folder / "videos.txt", ["videos/0.mp4", "videos/1.mp4", "videos/frames"])
    captions.write_list(folder / "images.txt", [f"videos/frames/{number}.png" for number in range(3)])
    of_videos, of_pictures = make(folder, image="first_frame"), make(folder, image="listed")
    before = [of_videos.sample(0, draws()), of_videos.sample(2, draws()), of_pictures.sample(0, draws())]
    for sample in before:
        sample["frames"].load(), sample["image"].load()
    shutil.copy(tmp_path / "spare" / "1.mp4", folder / "videos" / "0.mp4")
    Image.new("RGB", (32, 32)).save(frames / "0.png")
    for sample in before:
        for source in (sample["frames"], sample["image"]):
            with pytest.raises(ChangedError, match="has changed since it was looked at"):
                source.load()
    (frames / "0.png").unlink()
    with pytest.raises(BadVideoError):
        before[2]["image"].load()


def test_a_clip_that_breaks_while_training_is_a_bad_video(root, tmp_path):
    folder = shutil.copytree(root, tmp_path / "copy")
    clips = make(folder)
    (folder / "videos" / "0.mp4").unlink()
    with pytest.raises(BadVideoError):
        clips.sample(0, draws())
