"""FID, Inception Score and CLIP: against what is known, and what is said without weights."""

import math

import pytest
import torch
import transformers
from tests.edit_toys import Drifts, Editor, Halving
from torch import nn

from vireo.data.stream import Stream
from vireo.diffusion.noise_schedule import NoiseSchedule
from vireo.errors import UserError
from vireo.mini import tokenizers
from vireo.models.inception import InceptionOutput
from vireo.sampling import distribution_metrics
from vireo.sampling.distribution_metrics import (
    ClipSimilarity,
    InceptionMeasures,
    TemporalConsistency,
    VideoFid,
    frechet_distance,
    inception_score,
)
from vireo.sampling.edits import EditSampler
from vireo.sampling.evaluation import Evaluated

CPU = torch.device("cpu")


def evaluate(evaluation, clips=4):
    sampler = EditSampler(NoiseSchedule(), ["condition_latents", "prompt_embeds"], 2)
    stream = Stream(Drifts(clips), "validation", shuffle=False)
    return {
        row["column"]: row
        for row in evaluation(Evaluated(Editor(), Halving(), sampler, stream, range(clips), CPU, None))
    }


class Colours(nn.Module):
    """Stands for Inception: the mean colours."""

    def forward(self, pictures):
        means = pictures.double().mean(dim=(2, 3))
        return InceptionOutput(means, means)


def test_the_distance_of_two_gaussians():
    features = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = 2 * features + torch.tensor([1.0, 0.0, -2.0])
    assert frechet_distance([features], [features]) == pytest.approx(0, abs=1e-6)
    covariance, mean = features.T.cov(), features.mean(0)
    shift = (mean - moved.mean(0)).square().sum()
    expected = shift + covariance.trace()  # trace of (1 + 4 - 2 * 2) times the covariance
    assert frechet_distance([features[:1000], features[1000:]], [moved]) == pytest.approx(float(expected), rel=1e-6)


def test_inception_score_of_extremes():
    sure = 100.0 * torch.eye(5)
    assert inception_score(sure) == pytest.approx(5), "each picture a class of its own"
    assert inception_score(sure[:1].repeat(5, 1)) == pytest.approx(1), "all pictures one class"
    assert inception_score(torch.zeros(5, 5)) == pytest.approx(1), "nothing is recognised"


def test_every_column_against_the_targets():
    evaluation = InceptionMeasures()
    evaluation.network = Colours()
    rows = evaluate(evaluation)
    assert set(rows) == {"target", "prediction", "vae", "copy-last vae", "copy-last", "copy-first"}
    assert rows["target"]["fid"] is None and rows["target"]["inception_score"] >= 1
    assert 0 <= rows["vae"]["fid"] < rows["prediction"]["fid"]
    assert all("4 pictures: not comparable" in row["note"] for row in rows.values())


def test_vfid_compares_one_vector_of_each_clip():
    class Means(nn.Module):
        def forward(self, video):
            assert video.shape[0] == 1 and video.shape[2] == 3 and video.dtype == torch.float32
            assert video.min() >= 0 and video.max() <= 1
            return video.mean(dim=(1, 3, 4))

    evaluation = VideoFid()
    evaluation.network = Means()
    rows = evaluate(evaluation)
    assert set(rows) == {"prediction", "vae", "copy-last vae", "copy-last", "copy-first"}
    assert 0 <= rows["vae"]["vfid"] < rows["prediction"]["vfid"]
    assert rows["vae"]["note"].startswith("4 clips: not comparable")
    assert evaluate(evaluation, clips=1)["vae"]["vfid"] is None, "one clip has no spread"


def test_without_weights_a_line_says_why():
    assert "i3d_rgb_imagenet" in evaluate(VideoFid())["all"]["note"]
    assert "pt_inception" in evaluate(InceptionMeasures())["all"]["note"]
    row = evaluate(ClipSimilarity())["all"]
    assert "clip-vit-large" in row["note"] and row["to_target"] is None and row["directional"] == "n/a: no captions"
    assert "clip-vit-large" in evaluate(TemporalConsistency())["all"]["note"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tokenizers.write_clip_tokenizer(folder)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vocabulary = {"vocab_size": 700, "bos_token_id": 698, "eos_token_id": 699}
    vision = {**small, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config={**small, **vocabulary}, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def test_similarities_of_clip(clip_folder):
    rows = evaluate(ClipSimilarity(str(clip_folder)))
    assert rows["copy-last"]["to_input"] == pytest.approx(1, abs=1e-5)
    assert rows["vae"]["to_target"] > rows["prediction"]["to_target"]
    for row in rows.values():
        assert -1 <= row["to_text"] <= 1 and not math.isnan(row["to_text"])
        assert row["directional"] == "n/a: no captions"
    assert len({row["to_text"] for row in rows.values()}) == len(rows)


def test_a_video_that_stands_still_is_consistent_and_one_that_changes_less_so(clip_folder, monkeypatch):
    def videos(given):
        generator = torch.Generator().manual_seed(0)
        for _ in given.indices:
            moving = torch.rand(4, 3, 16, 16, generator=generator)
            yield {}, {"target": moving, "still": moving[:1].expand_as(moving), "slow": moving[[0, 0, 1, 1]]}

    monkeypatch.setattr(distribution_metrics, "columns", videos)
    found = {name: row["temporal_consistency"] for name, row in evaluate(TemporalConsistency(str(clip_folder))).items()}
    assert found["still"] == pytest.approx(1, abs=1e-5) and found["target"] < found["slow"] < 1


def test_clips_of_a_single_frame_have_no_consistency(clip_folder):
    assert evaluate(TemporalConsistency(str(clip_folder))) == {}


def test_pictures_are_prepared_as_clips_own_processor_does(clip_folder):
    clip = ClipSimilarity(str(clip_folder)).clip
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(1, 3, 8, 12, generator=generator)
    frames = nn.functional.interpolate(small, size=(64, 96), mode="bilinear")
    size = {"shortest_edge": 32}
    crop = {"height": 32, "width": 32}
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = kind(size=size, crop_size=crop)
    picture = (frames[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    given = processor(images=[picture], return_tensors="pt").pixel_values
    pooled = clip.model.vision_model(pixel_values=given).pooler_output
    expected = nn.functional.normalize(clip.model.visual_projection(pooled), dim=-1)
    torch.testing.assert_close(clip.pictures(frames), expected, rtol=0, atol=5e-3)


def test_folders_that_are_no_clip(tmp_path):
    with pytest.raises(UserError, match="is no CLIPModel"):
        ClipSimilarity(str(tmp_path / "missing"))
