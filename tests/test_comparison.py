import av
import pytest
import torch
from PIL import Image

from vireo.comparison import show, with_error


def columns():
    target = torch.full((3, 3, 32, 48), 100, dtype=torch.uint8)
    prediction = target.clone()
    prediction[:, 0] = 110
    prediction[:, 1] = 95
    prediction[:, 2] = 255
    return {"target": target, "prediction": prediction, "other": target[:, :, :16]}


def test_the_error_stands_beside_the_prediction():
    shown = with_error(columns())
    assert list(shown) == ["target", "prediction", "4x error", "other"]
    assert shown["4x error"].dtype == torch.uint8 and shown["4x error"].shape == (3, 3, 32, 48)
    assert shown["4x error"][0, :, 0, 0].tolist() == [40, 20, 255]


@pytest.mark.parametrize("name", ["target", "prediction"])
def test_no_error_without_something_to_compare(name):
    one = columns()
    del one[name]
    assert with_error(one) == one
    different = {**columns(), name: one["other"]}
    assert list(with_error(different)) == list(different)


def test_videos_have_all_columns_and_the_rate(tmp_path):
    show(columns(), tmp_path / "clip_0.5", 12.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip_0.5.mp4", "clip_0.5.png"]
    with av.open(str(tmp_path / "clip_0.5.mp4")) as video:
        stream = video.streams.video[0]
        assert (stream.width, float(stream.average_rate), stream.frames) == (4 * 48, 12.5, 3)
    with Image.open(tmp_path / "clip_0.5.png") as picture:
        assert picture.width == 3 * 48


def test_a_gif_plays_for_ever_at_the_rate(tmp_path):
    written = show(columns(), tmp_path / "clip", 8.0, gif=True)
    assert [path.name for path in written] == ["clip.mp4", "clip.png", "clip.gif"]
    with Image.open(tmp_path / "clip.gif") as animation:
        assert (animation.n_frames, animation.width) == (1, 4 * 48), "frames that are equal are one"
        assert animation.info["loop"] == 0
    moving = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 8, 8) * 100
    show({"prediction": moving}, tmp_path / "moving", 8.0, gif=True)
    with Image.open(tmp_path / "moving.gif") as animation:
        assert (animation.n_frames, animation.info["duration"]) == (3, 120)
    show({"prediction": moving}, tmp_path / "fast", 300.0, gif=True)
    with Image.open(tmp_path / "fast.gif") as animation:
        assert animation.info["duration"] == 20


def test_a_single_frame_is_shown_as_a_picture(tmp_path):
    still = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert show({"prediction": still}, tmp_path / "a", 8.0) == [tmp_path / "a.png"]
    moving = {"prediction": still.repeat(2, 1, 1, 1)}
    assert show(moving, tmp_path / "b", 8.0) == [tmp_path / "b.mp4", tmp_path / "b.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.mp4", "b.png"]
