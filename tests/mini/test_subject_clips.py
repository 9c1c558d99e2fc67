import json

import numpy as np
import pytest

from vireo.data import rle
from vireo.mini import scenes, subject_clips


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini") / "subject_clips"
    subject_clips.write(folder, 4)
    return folder / "demo_result"


def annotations(root):
    return json.loads((root / "step5/merge_final_json/mini.json").read_text())


def test_the_caption_says_all_but_what_the_thing_looks_like(root):
    for entry in annotations(root).values():
        words = set(entry["metadata"]["face_cap_qwen"].split())
        assert not words & {*scenes.COLOURS, *scenes.SHAPES} and "thing" in words


def test_both_clips_of_a_cluster_show_one_subject_and_are_a_pair(root):
    entries = annotations(root)
    clusters = json.loads((root / "step6/cross-frames-pairs/cluster_videos.json").read_text())
    assert len(clusters) == 4 and len(entries) == 8
    for number, (name, members) in enumerate(clusters.items()):
        (pair,) = json.loads((root / f"step6/cross-frames-pairs/final_output/{name}.json").read_text())
        assert [pair["cur_id"], pair["aft_id"]] == members
        one, other = subject_clips._meanings(number)
        assert (one.colour, one.shape) == (other.colour, other.shape)
        assert [entries[key.removeprefix("mini/")]["metadata"]["face_cap_qwen"] for key in members] == [
            subject_clips.caption(one), subject_clips.caption(other)
        ]  # fmt: skip


def test_the_second_mask_is_the_thing_in_the_first_frame(root):
    import av

    for entry in annotations(root).values():
        with av.open(str(root / "step0/videos/mini" / entry["metadata"]["path"])) as video:
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert len(frames) == scenes.NUM_FRAMES
        masks = entry["annotation"]["mask_annotation"]["0"]
        ground, thing = (rle.decode(masks[n]["counts"], *masks[n]["size"]) for n in ("1", "2"))
        assert (ground != thing).all() and 0.02 < thing.mean() < 0.2
        difference = np.abs(frames[0][thing].mean(0) - frames[0][ground].mean(0)).max()
        assert difference > 30
