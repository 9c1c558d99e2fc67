"""The verb on files that people have, in this process: a video with a hole, on the mini world's networks."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vireo.errors import UserError
from vireo.mini import world
from vireo.verbs import sample
from vireo.video_io import write_video

WORDS = ["experiment=diffueraser_stage2", "model.sampler.num_inference_steps=2"]


@pytest.fixture
def davis():
    return world.ensure() / "data" / "DAVIS"


def given(davis, **words):
    files = {"video": davis / "JPEGImages/480p/val-03", "mask": davis / "Annotations/480p/val-03", **words}
    return [f"{name}={value}" for name, value in files.items()]


def pictures(folder):
    return torch.stack(
        [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).float() for path in sorted(folder.iterdir())]
    )


def rate(path):
    with av.open(str(path)) as video:
        return video.streams.video[0].average_rate


def frames(path):
    with av.open(str(path)) as video:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in video.decode(video=0)]).float()


def test_a_hole_in_a_video_is_filled_and_the_rest_is_the_video(davis, tmp_path, capsys):
    assert sample.main([*WORDS, *given(davis), "clips=2", "validation.gif=true", f"out={tmp_path}"]) == 0
    names = {f"clip_00{n}{end}" for n in (0, 1) for end in (".mp4", ".png", ".gif", "_result.mp4")}
    assert {path.name for path in tmp_path.iterdir()} == names and "val-03" in capsys.readouterr().out
    made, other = (frames(tmp_path / f"clip_00{n}_result.mp4") for n in (0, 1))
    assert made.shape == (26, 64, 64, 3), "longer than what the network sees at once"
    video, mask = (pictures(davis / kind / "480p/val-03") for kind in ("JPEGImages", "Annotations"))
    hole = mask.amax(-1) > 0
    near = torch.nn.functional.max_pool2d(hole[:, None].float(), 31, stride=1, padding=15)[:, 0] > 0
    assert (made - video)[~near].abs().mean() < 8, "H.264's errors"
    assert (made - video)[hole].abs().mean() > 20
    assert (made - other)[hole].abs().mean() > 5, "each version has noise of its own"


def test_a_single_frame_becomes_a_picture_beside_nothing_of_an_earlier_clip(davis, tmp_path):
    (tmp_path / "one").mkdir()
    first = sorted((davis / "JPEGImages/480p/val-03").iterdir())[0]
    (tmp_path / "one" / first.name).write_bytes(first.read_bytes())
    words = [*WORDS, *given(davis, video=tmp_path / "one", mask=davis / "Annotations/480p/val-03/00000.png")]
    out = tmp_path / "out"
    out.mkdir()
    earlier = [out / name for name in ("clip_000.mp4", "clip_000_result.mp4", "clip_000.gif")]
    others = [out / name for name in ("clip_0001.mp4", "clip_001.mp4", "clip_000_mask.png", "first.mp4")]
    for path in (*earlier, *others):
        path.touch()
    assert sample.main([*words, f"out={out}"]) == 0
    assert {path.name for path in out.iterdir()} == {"clip_000.png", "clip_000_result.png", *(p.name for p in others)}
    assert sample.main([*words, "name=mine", f"out={tmp_path / 'named'}"]) == 0
    assert [path.name for path in (tmp_path / "named").iterdir()] == ["mine.png"]
    with Image.open(tmp_path / "named" / "mine.png") as made, Image.open(first) as was:
        assert made.size == was.size == (64, 64)


def test_a_prior_shows_through_at_the_rate_of_the_video(davis, tmp_path):
    """Of the last step alone hardly anything is the network's; of all steps hardly anything is the prior's."""
    frames_of, hole_of = (pictures(davis / kind / "480p/val-03")[:10] for kind in ("JPEGImages", "Annotations"))
    prior = torch.full_like(frames_of, 90).to(torch.uint8)
    prior[..., 0] = 200  # red
    write_video(tmp_path / "clip.mp4", frames_of.to(torch.uint8).permute(0, 3, 1, 2), 10)
    write_video(tmp_path / "prior.mp4", prior.permute(0, 3, 1, 2), 10)
    hole, apart = hole_of.amax(-1) > 0, {}
    (tmp_path / "masks").mkdir()
    for path in sorted((davis / "Annotations/480p/val-03").iterdir())[:10]:
        (tmp_path / "masks" / path.name).write_bytes(path.read_bytes())
    for strength in (0.01, 1.0):
        out = tmp_path / str(strength)
        words = given(davis, video=tmp_path / "clip.mp4", mask=tmp_path / "masks", prior=tmp_path / "prior.mp4")
        words += ["model.sampler.num_inference_steps=10", f"model.sampler.prior_strength={strength}", f"out={out}"]
        assert sample.main([*WORDS[:1], "validation.fps=8", *words]) == 0
        apart[strength] = (frames(out / "clip_000_result.mp4") - prior)[hole].abs().mean()
        assert [rate(out / f"clip_000{end}.mp4") for end in ("", "_result")] == [10, 10]
    assert apart[0.01] < 15 < 0.5 * apart[1.0], apart


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["video=a.mp4"], "needs mask"),
        (["video=a.mp4", "mask=b.png", "image=c.png"], "does not take image"),
        (["video=a.mp4", "mask=b.png"], "a.mp4: there is no such file"),
    ],
)
def test_mistakes_are_told(words, said, tmp_path):
    with pytest.raises(UserError, match=said):
        sample.main([*WORDS, *words, f"out={tmp_path}"])


def test_a_video_of_ones_own_needs_no_data(tmp_path, monkeypatch):
    monkeypatch.delenv("VIREO_DATA", raising=False)
    words = [*WORDS, "size=full", f"paths.weights={world.ensure() / 'weights'}"]
    with pytest.raises(UserError, match=r"paths\.data: size=full needs your data"):
        sample.main(words)
    with pytest.raises(UserError, match="a.mp4: there is no such file"):
        sample.main([*words, "video=a.mp4", "mask=b.png", f"out={tmp_path}"])


def test_recipes_without_files_say_so(tmp_path):
    with pytest.raises(UserError, match="Clips makes no samples of video"):
        sample.main(["experiment=taehv", "video=a.mp4", f"out={tmp_path}"])
