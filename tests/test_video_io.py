import os
import pickle
import re
import resource
import signal
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.data import videos
from vireo import video_io
from vireo.errors import UserError
from vireo.video_io import (
    BadVideoError,
    VideoReader,
    probe,
    read_image,
    side_by_side,
    write_grid,
    write_row,
    write_video,
)

HAS_DECORD = video_io._decord() is not None
needs_decord = pytest.mark.skipif(not HAS_DECORD, reason="decord is not installed")


@pytest.fixture
def without_decord(monkeypatch):
    """As on a platform that decord has no wheel for."""
    monkeypatch.setitem(sys.modules, "decord", None)
    video_io._decord.cache_clear()
    yield
    video_io._decord.cache_clear()


@pytest.fixture(params=["decord", "pyav", "automatic", "without decord"])
def decoder(request, monkeypatch):
    """Every test that takes this runs with each decoder, with vireo's choice, and as if decord were not there."""
    if request.param == "without decord":
        request.getfixturevalue("without_decord")
    elif request.param == "automatic":
        monkeypatch.delenv("VIREO_DECODER", raising=False)
    else:
        if request.param == "decord" and not HAS_DECORD:
            pytest.skip("decord is not installed")
        monkeypatch.setenv("VIREO_DECODER", request.param)
    return request.param


KINDS = {  # files that both decoders show alike
    "closed.mp4": {},
    "one_group.mp4": {"options": {"g": "250", "bf": "3", "preset": "veryfast"}},
    "intra.mp4": {"options": {"g": "1", "preset": "veryfast"}},
    "fragmented.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}},
    "full_range.mov": {"pix_fmt": "yuvj420p"},
    "matroska.mkv": {},
    "one_frame.mp4": {"frames": videos.pictures(1)},
    "odd_sides.mp4": {"frames": videos.pictures()[:, :47, :61], "pix_fmt": "yuv444p"},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=10:open-gop=0:log-level=none"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "10", "deadline": "realtime", "lag-in-frames": "0"}},
}
HARD = {  # files of which decord shows other frames, or none
    "open_groups.mp4": {"options": {**videos.CLOSED_GOP, "x264-params": "open-gop=1:keyint=10"}},
    "open_hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=10:open-gop=1:log-level=none"}},
    "ten_bits.mp4": {"pix_fmt": "yuv420p10le"},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "10", "bf": "2"}},
}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    made = {name: videos.write(folder / name, **arguments) for name, arguments in {**KINDS, **HARD}.items()}
    made["variable_rate.mp4"], _ = videos.variable_rate(folder / "variable_rate.mp4")
    made["rotated.mp4"] = videos.rotated(folder / "rotated.mp4")
    made["cut.mp4"] = videos.cut_without_encoding(folder / "cut.mp4")
    return made


@pytest.fixture(scope="session")
def broken(tmp_path_factory):
    return videos.broken(tmp_path_factory.mktemp("broken"))


def decoded_in_order(path):
    """The reference: every frame, decoded one after the other without seeking; uint8 (T, C, H, W)."""
    with av.open(str(path)) as file:
        frames = [np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for f in file.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def check_every_frame(path):
    """Frames by index, each from a fresh reader, alone and with others, are those of decoding in order."""
    expected = decoded_in_order(path)
    n = len(expected)
    for first in range(0, n, 3):
        indices = [i for i in (first, first + 1, first + 4, first + 12) if i < n]
        with VideoReader(path) as video:
            assert len(video) == n
            frames = video.get(indices)
        assert frames.dtype == torch.uint8
        assert torch.equal(frames, expected[indices]), indices
    with VideoReader(path) as video:
        mixed = [n - 1, 0, n // 2, 0]
        assert torch.equal(video.get(mixed), expected[mixed])
        assert torch.equal(video.get(range(n)), expected)


@pytest.mark.parametrize("name", [*KINDS, "variable_rate.mp4"])
def test_every_frame_is_the_right_one(name, files, decoder):
    check_every_frame(files[name])


@pytest.mark.parametrize("name", [*HARD, "cut.mp4", "rotated.mp4"])
def test_files_that_decord_shows_wrongly_are_left_to_pyav(name, files, monkeypatch):
    monkeypatch.delenv("VIREO_DECODER", raising=False)
    check_every_frame(files[name])
    assert probe(files[name]).decoder == "pyav"


@pytest.mark.skipif("libsvtav1" not in av.codecs_available, reason="PyAV was built without an AV1 encoder")
def test_codecs_that_decord_lacks_are_left_to_pyav(tmp_path, monkeypatch):
    monkeypatch.delenv("VIREO_DECODER", raising=False)
    path = videos.write(tmp_path / "av1.mp4", videos.pictures(20, 64, 64), "libsvtav1", {"preset": "12"})
    check_every_frame(path)
    assert probe(path).decoder == "pyav"


@needs_decord
def test_decord_is_the_default(files, monkeypatch):
    monkeypatch.delenv("VIREO_DECODER", raising=False)
    for name in [*KINDS, "variable_rate.mp4"]:
        assert probe(files[name]).decoder == "decord", name
        with VideoReader(files[name]) as video:
            assert isinstance(video._video, video_io._DecordVideo), name


def test_what_is_known_of_a_video(files, decoder):
    with VideoReader(files["closed.mp4"]) as video:
        assert (len(video), video.fps, video.height, video.width) == (40, 25.0, 48, 64)
        assert video.get([3]).shape == (1, 3, 48, 64)
        torch.testing.assert_close(video.timestamps, torch.arange(40, dtype=torch.float64) / 25, atol=1e-6, rtol=0)
    info = probe(files["rotated.mp4"])
    assert (info.num_frames, info.fps, info.height, info.width) == (40, 25.0, 64, 48)


def test_times_of_a_variable_rate_are_exact(tmp_path, decoder):
    path, times = videos.variable_rate(tmp_path / "variable.mp4")
    with VideoReader(path) as video:
        expected = torch.tensor(times, dtype=torch.float64) / 25
        torch.testing.assert_close(video.timestamps, expected, atol=1e-5, rtol=0)
        assert (torch.arange(40) / video.fps - expected).abs().max() > 0.1, "the test's rate does not vary"


@pytest.mark.parametrize("kind", videos.REASONS)
def test_what_cannot_be_read_says_why(kind, broken, decoder):
    if decoder == "decord" and kind == "truncated between frames, index at front":
        with VideoReader(broken[kind]) as video:  # what is there is whole, and decord does not ask what is missing
            assert len(video) == 30
        return
    with pytest.raises(BadVideoError, match=videos.REASONS[kind]) as caught, VideoReader(broken[kind]) as video:
        video.get(range(len(video)))
    assert caught.value.path == broken[kind]
    assert "/src/" not in str(caught.value), "a place in decord's source is nothing for people"


@pytest.mark.parametrize("kind", videos.REASONS)
def test_probing_finds_what_cannot_be_read(kind, broken):
    with pytest.raises(BadVideoError, match=videos.REASONS[kind]):
        probe(broken[kind])


def test_damage_in_the_middle_costs_only_the_frames_around_it(files, tmp_path, decoder):
    path = videos.damaged(tmp_path / "damaged.mp4", files["closed.mp4"])
    expected = decoded_in_order(files["closed.mp4"])
    for indices in ([0, 1, 2], [30, 35, 39]):
        with VideoReader(path) as video:
            assert torch.equal(video.get(indices), expected[indices])
    with (
        pytest.raises(BadVideoError, match="frames? .*1[6-9].*(cannot be decoded|damaged)"),
        VideoReader(path) as video,
    ):
        video.get([16, 17, 18, 19])


@needs_decord
def test_decord_may_not_put_a_neighbour_in_the_place_of_a_frame(files, monkeypatch):
    monkeypatch.setenv("VIREO_DECODER", "decord")
    with pytest.raises(BadVideoError, match="recovered"), VideoReader(files["mpeg4.mp4"]) as video:
        video.get([37, 38, 39])


def test_a_failure_is_tried_again_with_a_fresh_reader(files, decoder, monkeypatch):
    path, expected = files["closed.mp4"], decoded_in_order(files["closed.mp4"])
    kind = video_io._PyAVVideo if decoder in ("pyav", "without decord") or not HAS_DECORD else video_io._DecordVideo
    read, failures = kind.read, []

    def failing_once(self, indices):
        if not failures:
            failures.append(self)
            raise BadVideoError(path, "for once")
        assert self is not failures[0], "the same reader was used again"
        return read(self, indices)

    monkeypatch.setattr(kind, "read", failing_once)
    with VideoReader(path) as video:
        assert torch.equal(video.get([5, 6]), expected[[5, 6]])
    assert len(failures) == 1


@needs_decord
def test_pyav_has_the_last_word_on_what_decord_fails_at(files, monkeypatch):
    monkeypatch.delenv("VIREO_DECODER", raising=False)
    tries = []

    def failing(self, indices):
        tries.append(indices)
        raise BadVideoError(files["closed.mp4"], "always")

    monkeypatch.setattr(video_io._DecordVideo, "read", failing)
    with VideoReader(files["closed.mp4"]) as video:
        assert torch.equal(video.get([7]), decoded_in_order(files["closed.mp4"])[[7]])
    assert len(tries) == 2


def test_a_file_that_keeps_failing_is_bad(files, monkeypatch):
    monkeypatch.setenv("VIREO_DECODER", "pyav")
    tries = []

    def failing(self, indices):
        tries.append(indices)
        raise BadVideoError(files["closed.mp4"], "always")

    monkeypatch.setattr(video_io._PyAVVideo, "read", failing)
    with VideoReader(files["closed.mp4"]) as video:
        for asked in (1, 2):
            with pytest.raises(BadVideoError, match="always"):
                video.get([0])
            assert len(tries) == 1 + asked, "first asked: a second try; later: one is enough"


def test_indices_outside_are_the_callers_fault(files, decoder):
    with VideoReader(files["closed.mp4"]) as video:
        for wrong in ([40], [-1], [0, 99], []):
            with pytest.raises(IndexError, match="there are 0 to 39"):
                video.get(wrong)


def test_readers_give_their_files_back(files, decoder):
    def open_files():
        return len(os.listdir("/proc/self/fd"))

    with VideoReader(files["closed.mp4"]) as video:
        video.get([0])
    before = open_files()
    for name in ("closed.mp4", "matroska.mkv", "cut.mp4"):
        for _ in range(5):
            with VideoReader(files[name]) as video:
                video.get([0, 9])
    assert open_files() == before


class _Frames(torch.utils.data.Dataset):
    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 8

    def __getitem__(self, index):
        with VideoReader(self.path) as video:
            return video.get([index, index + 9])


def test_workers_read_after_their_parent_has(files, decoder):
    with VideoReader(files["closed.mp4"]) as video:
        video.get([0])
    loader = DataLoader(_Frames(files["closed.mp4"]), batch_size=2, num_workers=2, timeout=30)
    batches = torch.cat(list(loader))
    expected = decoded_in_order(files["closed.mp4"])
    assert torch.equal(batches, torch.stack([expected[[i, i + 9]] for i in range(8)]))


def test_an_error_survives_the_way_out_of_a_worker():
    error = pickle.loads(pickle.dumps(BadVideoError("a/b.mp4", "is broken")))
    assert str(error) == "a/b.mp4: is broken"
    assert (str(error.path), error.reason) == ("a/b.mp4", "is broken")
    assert isinstance(error, UserError)


def test_an_unknown_decoder_is_refused(files, monkeypatch):
    monkeypatch.setenv("VIREO_DECODER", "ffmpeg")
    with pytest.raises(UserError, match="'ffmpeg', expected decord or pyav"):
        VideoReader(files["closed.mp4"])


def test_a_decoder_that_is_not_there_is_refused(files, monkeypatch, without_decord):
    monkeypatch.setenv("VIREO_DECODER", "decord")
    with pytest.raises(UserError, match="cannot be imported"):
        VideoReader(files["closed.mp4"])


# Folders of frames


@pytest.fixture
def frame_folder(tmp_path):
    """Frames 0 to 11 named frame0.png to frame11.jpg; frame k is grey of level 20 k."""
    for k in range(12):
        picture = Image.new("RGB", (30, 21), (20 * k,) * 3)
        picture.save(tmp_path / f"frame{k}.{'png' if k % 2 else 'jpg'}")
    (tmp_path / ".hidden.png").write_bytes(b"not a frame")
    (tmp_path / "notes.txt").write_text("not a frame")
    return tmp_path


def test_a_folder_of_frames_is_a_video(frame_folder, decoder):
    with VideoReader(frame_folder, folder_fps=6) as video:
        assert (len(video), video.fps, video.height, video.width) == (12, 6, 21, 30)
        frames = video.get([11, 2, 2, 0])
        assert frames.shape == (4, 3, 21, 30)
        assert frames.float().mean((1, 2, 3)).round().tolist() == [220, 40, 40, 0]
        assert video.timestamps[:3].tolist() == pytest.approx([0, 1 / 6, 2 / 6])
    assert probe(frame_folder).num_frames == 12


def test_pictures_of_every_mode_become_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    palette = Image.fromarray(grey).convert("P")
    Image.fromarray(grey).save(tmp_path / "0.png")
    palette.save(tmp_path / "1.png")
    Image.fromarray(np.dstack([grey] * 4)).save(tmp_path / "2.png")
    expected = torch.from_numpy(grey).expand(3, 8, 8)
    assert torch.equal(VideoReader(tmp_path).get([0, 1, 2]), expected.expand(3, 3, 8, 8))
    assert torch.equal(read_image(tmp_path / "1.png"), expected)


def test_a_broken_picture_is_named(frame_folder):
    whole = (frame_folder / "frame11.png").read_bytes()
    (frame_folder / "frame11.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadVideoError, match=r"frame11\.png: the picture is damaged"):
        probe(frame_folder)
    (frame_folder / "frame11.png").write_text("this is no picture")
    with pytest.raises(BadVideoError, match=r"frame11\.png: not a picture"):
        VideoReader(frame_folder).get([10, 11])
    with pytest.raises(BadVideoError, match="no such picture"):
        read_image(frame_folder / "frame99.png")


def test_frames_of_different_sizes_are_bad(frame_folder):
    Image.new("RGB", (30, 22)).save(frame_folder / "frame11.png")
    with pytest.raises(BadVideoError, match="different sizes: 30x21, 30x22"):
        VideoReader(frame_folder).get([10, 11])


# Writing


def smooth(num_frames=8, height=48, width=64):
    """Pictures that H.264 keeps well: uint8 (T, 3, H, W)."""
    t, y, x = torch.meshgrid(torch.arange(num_frames), torch.arange(height), torch.arange(width), indexing="ij")
    planes = [128 + 100 * torch.sin((x + 2 * t) / 15), 128 + 100 * torch.cos((y + t) / 15), 0 * x + 90]
    return torch.stack(planes, dim=1).to(torch.uint8)


@pytest.mark.parametrize("fps", [8, 23.976, 30])
def test_what_is_written_can_be_read(tmp_path, fps, decoder):
    frames = smooth()
    write_video(tmp_path / "new" / "clip.mp4", frames, fps)
    with VideoReader(tmp_path / "new" / "clip.mp4") as video:
        assert (len(video), video.height, video.width) == (8, 48, 64)
        assert video.fps == pytest.approx(fps, rel=1e-3)
        assert (video.get(range(8)).float() - frames.float()).square().mean() < 10 ** (-3.5) * 255**2  # 35 dB
    assert os.listdir(tmp_path / "new") == ["clip.mp4"]


def test_odd_sides_are_padded_with_their_border(tmp_path):
    frames = smooth(3, 33, 35)
    write_video(tmp_path / "odd.mp4", frames, 8)
    read = VideoReader(tmp_path / "odd.mp4").get([0, 1, 2]).float()
    assert read.shape == (3, 3, 34, 36)
    assert (read[:, :, :33, :35] - frames.float()).square().mean() < 10 ** (-3.5) * 255**2
    assert (read[:, :, 33, :35] - frames[:, :, 32].float()).abs().mean() < 6


def test_frames_of_the_wrong_kind_are_refused(tmp_path):
    for wrong in (smooth().float(), smooth()[0], smooth()[:, :2], smooth()[:0]):
        with pytest.raises(TypeError, match="expected uint8 RGB frames"):
            write_video(tmp_path / "wrong.mp4", wrong, 8)
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (lambda p: write_video(p, smooth(), 8), lambda p: write_grid(p, {"a": smooth()})):
        with pytest.raises(OSError, match=r"could not write .*file/clip"):
            write(tmp_path / "file" / "clip.mp4")


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """A limit of the file size stands for the full disk: the write call fails in the same place."""
    noise = torch.randint(0, 256, (30, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        for name, write in {
            "clip.mp4": lambda p: write_video(p, noise, 8),
            "grid.png": lambda p: write_grid(p, {"noise": noise}),
        }.items():
            with pytest.raises(OSError, match=f"could not write .*{name}"):
                write(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


def test_a_row_of_stills(tmp_path):
    inputs = torch.stack([torch.full((3, 16, 20), value, dtype=torch.uint8) for value in (10, 20, 30)])
    write_row(tmp_path / "row.png", {"inputs": inputs, "target": inputs[:1] + 90})
    row = read_image(tmp_path / "row.png")
    assert row.shape[2] == 4 * 20
    assert row[0, -16:, 10::20].unique(dim=0).tolist() == [[10, 20, 30, 100]]


def test_a_label_that_is_a_little_too_wide_is_written_smaller():
    clip = torch.zeros(1, 3, 8, 64, dtype=torch.uint8)
    whole, cut = (side_by_side({text: clip})[0, :, :-8] for text in ("copy-last vae", "copy-last va"))
    assert not torch.equal(whole, cut), "the end is cut off"
    assert not whole[:, :, -2:].any(), "nothing touches the next panel"


def test_side_by_side(tmp_path):
    left, right = smooth(8, 48, 64), smooth(5, 32, 40)
    both = side_by_side({"prediction": left, "target": right})
    label = both.shape[2] - 48
    assert both.shape == (8, 3, label + 48, 104)
    assert torch.equal(both[:, :, label:, :64], left)
    assert torch.equal(both[:5, :, label : label + 32, 64:], right)
    assert torch.equal(both[7, :, label : label + 32, 64:], right[4]), "a short clip holds its last frame"
    assert not both[:, :, label + 32 :, 64:].any()
    assert both[:, :, :label, :64].any(), "there is no label"
    write_video(tmp_path / "both.mp4", both, 8)


def test_a_grid_shows_the_first_and_the_last_frame(tmp_path):
    rows = {"a long clip": smooth(30, 48, 64), "a picture": smooth(1, 32, 40)}
    write_grid(tmp_path / "grid.png", rows, columns=5)
    sheet = read_image(tmp_path / "grid.png")
    label = (sheet.shape[1] - 48 - 32) // 2
    assert sheet.shape[2] == 5 * 64
    assert torch.equal(sheet[:, label : label + 48, :64], rows["a long clip"][0])
    assert torch.equal(sheet[:, label : label + 48, -64:], rows["a long clip"][29])
    assert torch.equal(sheet[:, -32:, :40], rows["a picture"][0])


# Real clips


@pytest.mark.skipif("VIREO_SAMPLE_DATA" not in os.environ, reason="VIREO_SAMPLE_DATA is not set: no real clips")
def test_real_clips(decoder):
    root = os.path.join(os.environ["VIREO_SAMPLE_DATA"], "cogvideox_sample", "videos")
    for name in sorted(os.listdir(root)):
        path = os.path.join(root, name)
        expected = decoded_in_order(path)
        with VideoReader(path) as video:
            assert (len(video), video.fps, video.height, video.width) == (49, 8, 480, 720)
            assert torch.equal(video.get([48, 3, 20]), expected[[48, 3, 20]])


def test_decoders_have_a_version_for_identities():
    assert video_io.decoder_version("pillow").startswith("pillow ")
    assert re.fullmatch(r"pyav \S+, libavcodec \d+\.\d+\.\d+", video_io.decoder_version("pyav"))
    if HAS_DECORD:
        assert re.fullmatch(r"decord \S+", video_io.decoder_version("decord"))
    with pytest.raises(UserError, match="expected pillow, pyav or decord"):
        video_io.decoder_version("opencv")
