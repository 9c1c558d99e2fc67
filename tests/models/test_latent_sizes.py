import json
import subprocess
import sys

import pytest

from vireo.errors import UserError
from vireo.models.latent_sizes import check_clips, check_size


def test_both_sides_are_multiples_of_eight():
    check_size(256, 64)
    with pytest.raises(UserError, match="height=250 cannot be encoded.* such as 248 or 256"):
        check_size(250, 256)
    with pytest.raises(UserError, match="height=5 and width=20 .* such as 8 or 16 or 24"):
        check_size(5, 20)


def test_it_is_judged_without_torch():
    code = "import sys, vireo.models.latent_sizes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def transformer(tmp_path):
    """Writes what a transformer's config says; gives the folder."""

    def write(**config):
        (tmp_path / "transformer").mkdir(exist_ok=True)
        (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


def test_clips_have_8_n_plus_1_frames_and_sides_of_whole_patches(transformer):
    folder = transformer(patch_size=2)
    for shape in ((1, 16, 16), (9, 480, 720), (49, 480, 720), (81, 768, 1360)):
        check_clips(*shape, folder)
    with pytest.raises(UserError, match=r"^num_frames=48 is not 8 N \+ 1: 41 or 49 are the nearest$"):
        check_clips(48, 480, 720, folder)
    with pytest.raises(UserError, match=r"height=470 is not a multiple of 16: 464 or 480; width=8 .* of 16: 16$"):
        check_clips(49, 470, 8, folder)
    with pytest.raises(UserError, match="^num_frames=50 .*; width=700"):
        check_clips(49, 480, 720, folder, [[50, 480, 720], [49, 480, 700]])
    with pytest.raises(UserError, match=r"a bucket is \[num_frames, height, width\], got \[49, 480\]"):
        check_clips(49, 480, 720, folder, [[49, 480]])


def test_learned_positions_are_of_one_size(transformer):
    native = {"sample_height": 60, "sample_width": 90}
    check_clips(49, 480, 720, transformer(use_learned_positional_embeddings=True, **native))
    with pytest.raises(UserError, match="256x384 pixels: these weights have learnt positions of 480x720 alone"):
        check_clips(49, 256, 384, transformer(use_learned_positional_embeddings=True, **native))
    check_clips(49, 256, 384, transformer(use_learned_positional_embeddings=True, **native), learned_positions=False)
    check_clips(49, 256, 384, transformer(use_learned_positional_embeddings=False, **native))


def test_longer_clips_than_the_weights_have_seen_are_told(transformer, caplog):
    check_clips(49, 480, 720, transformer(sample_frames=49))
    assert not caplog.text
    check_clips(81, 480, 720, transformer(sample_frames=49))
    assert "clips of 81 frames: these weights were trained on 49" in caplog.text
    caplog.clear()
    check_clips(161, 768, 1360, transformer(sample_frames=81, patch_size_t=2))
    assert not caplog.text, "1.5 knows both lengths, 81 and 161"
    native = {"sample_height": 60, "sample_width": 90, "sample_frames": 49}
    check_clips(33, 480, 720, transformer(use_learned_positional_embeddings=True, **native))
    assert "learnt positions are of clips of 49 frames alone" in caplog.text


def test_weights_that_are_not_there_are_somebody_elses_complaint(tmp_path):
    check_clips(49, 480, 720, str(tmp_path / "nowhere"))
