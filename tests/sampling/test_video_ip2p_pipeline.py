"""The pipeline against the published one, the golden numbers, and what people may give it."""

import json
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tests.golden.fill import fill, noise
from tests.pipelines import CONFIG, golden, pixels, save_pipeline, text_encoder, token_ids, unet

from vireo.errors import UserError
from vireo.sampling.video_ip2p_pipeline import VideoInstructPix2PixPipeline

DDIM = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("image"), in_channels=8)


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("video"), in_channels=16)


def load(folder):
    """As `from_pretrained` does, for folders whose model_index.json is made here."""
    index = {
        "_class_name": "VideoInstructPix2PixPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    pipeline = VideoInstructPix2PixPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def image(image_folder):
    return load(image_folder)


@pytest.fixture
def video(video_folder):
    return load(video_folder)


class RecordedTokens:
    """The golden numbers' token ids; a prompt is the number of its row."""

    model_max_length = 77

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, texts, **options):
        return SimpleNamespace(input_ids=token_ids([self.rows[int(text)] if text else [] for text in texts]))


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def clip(frames=3, clips=1, side=16):
    return torch.randint(0, 256, (clips, frames, 3, side, side), generator=seeded(5), dtype=torch.uint8)


def pictures(frames):
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]


def widened(frames):
    """8 -> 4 + 4 N: the last frame keeps the condition's slice."""
    source, wide = unet(8), unet(4 + 4 * frames)
    state = source.state_dict()
    weight = torch.zeros_like(wide.conv_in.weight)
    weight[:, :4], weight[:, -4:] = state["conv_in.weight"][:, :4], state["conv_in.weight"][:, 4:]
    wide.load_state_dict({**state, "conv_in.weight": weight})
    return wide


@pytest.mark.parametrize("frames", [3, 20])
@pytest.mark.parametrize("case", ["guided_warm", "guided_surgery", "guided_original8"])
def test_golden_guided_latents(case, frames):
    described, reference = golden(f"video_train_n{frames}")
    network = {"guided_warm": lambda: unet(4 + 4 * frames), "guided_original8": lambda: unet(8)}
    pipeline = VideoInstructPix2PixPipeline(
        fill(diffusers.AutoencoderKL(**CONFIG["vae"])),
        text_encoder(),
        RecordedTokens(described["token_rows"]),
        network.get(case, lambda: widened(frames))(),
        diffusers.DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", **DDIM),
    )
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    step = pipeline.scheduler.step

    def recorded(prediction, timestep, latents, **options):
        result = step(prediction, timestep, latents, **options)
        seen.append((prediction, result[0]))
        return result

    pipeline.scheduler.step = recorded
    options = {"guidance_scale": 7.5, "image_guidance_scale": 1.5, "output_type": "latent"}
    shown, start = pixels(f"ip2p/frames{frames}", 2, frames, 3, 16, 16), noise("sample_latents", 2, 4, 8, 8)
    pipeline(["0", "1"], shown, num_inference_steps=3, latents=start, **options)
    torch.testing.assert_close(seen[0][0], reference[f"{case}.eps_guided"], rtol=1e-4, atol=1e-4)
    for number, (_, latents) in enumerate(seen):
        torch.testing.assert_close(latents, reference[f"{case}.latents_{number}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scales", [(7.5, 1.5), (3.0, 2.0)])
@pytest.mark.parametrize("negative", ["", "red square"])
def test_one_frame_is_bit_equal_to_the_stock_pipeline(image, scales, negative):
    stock = diffusers.StableDiffusionInstructPix2PixPipeline(
        **image.components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    [picture] = pictures(clip(1)[0])
    options = {
        "num_inference_steps": 3,
        "guidance_scale": scales[0],
        "image_guidance_scale": scales[1],
        "negative_prompt": negative,
    }
    for output in ("latent", "np"):
        theirs = stock("move the red disc up", picture, output_type=output, generator=seeded(), **options).images
        ours = image("move the red disc up", [picture], output_type=output, generator=seeded(), **options).images
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_where_the_stock_pipeline_gives_up_guidance_the_formula_still_holds(image):
    """s_T = 1 and s_I = 2: e(-,-) + 2 (e(I,-) - e(-,-)) + e(I,T) - e(I,-)."""
    options = {"num_inference_steps": 1, "output_type": "latent", "generator": None}
    predictions = {}
    for scales in ((1.0, 1.0), (0.0, 1.0), (0.0, 0.0), (1.0, 2.0)):
        step, seen = image.scheduler.step, []
        image.scheduler.step = lambda p, *a, step=step, seen=seen, **k: seen.append(p) or step(p, *a, **k)
        image("move", clip(1), guidance_scale=scales[0], image_guidance_scale=scales[1], **options)
        image.scheduler.step = step
        predictions[scales] = seen[0]
    whole, only, neither, guided = predictions.values()
    torch.testing.assert_close(guided, neither + 2 * (only - neither) + whole - only, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text, picture, passes", [(7.5, 1.5, 3), (7.5, 1.0, 2), (1.0, 1.0, 1)])
def test_no_pass_is_wasted(video, text, picture, passes):
    seen, forward = [], video.unet.forward
    video.unet.forward = lambda x, *a, **k: seen.append(len(x)) or forward(x, *a, **k)
    video("move", clip(), num_inference_steps=2, guidance_scale=text, image_guidance_scale=picture)
    assert seen == [passes] * 2


def run(pipeline, frames, **options):
    settings = {"num_inference_steps": 2, "output_type": "pt", "generator": seeded(), **options}
    return pipeline(settings.pop("prompt", "move"), frames, **settings).images


def test_frames_of_every_kind(video):
    frames = clip()
    expected = run(video, frames)
    latents = torch.stack([video._encoded(frame.float()[None] / 255 * 2 - 1)[0] for frame in frames[0]])[None]
    kinds = [pictures(frames[0]), [pictures(frames[0])], frames.float() / 255, latents, latents.flatten(1, 2)]
    for kind in kinds:
        torch.testing.assert_close(run(video, kind), expected, rtol=0, atol=1e-5)
    older = torch.cat([255 - frames, frames], dim=1)
    assert torch.equal(run(video, older), expected), "the last N frames count"


def test_missing_frames_are_repeated_only_if_asked(video):
    frames = clip(2)
    with pytest.raises(UserError, match="sees 3 frames, got 2.*repeat_oldest=True"):
        run(video, frames)
    repeated = torch.cat([frames[:, :1], frames], dim=1)
    assert torch.allclose(run(video, frames, repeat_oldest=True), run(video, repeated), atol=1e-5)
    assert not torch.allclose(run(video, frames, repeat_oldest=True), run(video, frames[:, [0, 1, 1]]), atol=1e-5)


def test_outputs(video):
    tensors = run(video, clip())
    array = run(video, clip(), output_type="np")
    [picture] = run(video, clip(), output_type="pil")
    assert tensors.shape == (1, 3, 16, 16) and tensors.dtype == torch.float32
    assert np.array_equal(array, tensors.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(picture), (array[0] * 255).round().astype(np.uint8))
    assert run(video, clip(), output_type="latent").shape == (1, 4, 8, 8)


def test_prompts_and_clips_are_matched(video):
    both = run(video, clip(), prompt=["move", "drop the disc"], generator=[seeded(0), seeded(1)])
    alone = run(video, clip(), prompt="drop the disc", generator=seeded(1))
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)
    clips = run(video, clip(clips=2), prompt="move", generator=[seeded(0), seeded(0)])
    assert clips.shape == (2, 3, 16, 16) and not torch.equal(clips[0], clips[1])


def test_without_a_generator_the_numbers_are_always_the_same(video):
    state = torch.get_rng_state()
    assert torch.equal(run(video, clip(), generator=None), run(video, clip(), generator=None))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(run(video, clip(), generator=seeded(1)), run(video, clip(), generator=seeded(2)))


def test_noise_that_is_drawn_within_steps(video):
    """eta for DDIM; a generator for each clip, so that a clip does not depend on the others."""
    noisy = run(video, clip(), eta=1.0)
    assert not torch.equal(noisy, run(video, clip()))
    video.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(video.scheduler.config)
    both = run(video, clip(clips=2), generator=[seeded(0), seeded(1)])
    alone = run(video, clip(clips=2)[1:], generator=[seeded(1)])
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)


def test_half_precision_holds_the_latents_of_zero_terminal_snr(video_folder):
    """Euler's begin at 4096 times the noise; above 65504 fp16 has but infinity."""
    half = load(video_folder).to(torch.float16)
    half.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        half.scheduler.config, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    start = torch.full((1, 4, 8, 8), 17.0)
    assert half.scheduler.init_noise_sigma * 17 > torch.finfo(torch.float16).max
    made = run(half, clip(), latents=start, output_type="latent")
    assert made.dtype == torch.float16 and made.isfinite().all()
    assert run(half, clip(), latents=start).isfinite().all()


def test_a_roll_out_encodes_once_a_step_and_equals_calls_on_everything(video):
    frames, settings = clip(), {"num_inference_steps": 2, "generator": seeded(), "output_type": "np"}
    counted, encode = [], video.vae.encode
    video.vae.encode = lambda pixels: counted.append(len(pixels)) or encode(pixels)
    made = video.roll_out("move", frames, 3, **settings)
    assert made.shape == (1, 3, 16, 16, 3)
    assert counted == [3, 1, 1], "the window, then each new frame but the last"
    known, generator = frames, seeded()
    for number in range(3):
        expected = run(video, known[:, -3:], generator=generator, output_type="np")
        assert np.abs(made[:, number] - expected).max() <= 0.51 / 255
        shown = torch.from_numpy((made[:, number] * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
        known = torch.cat([known, shown[:, None]], dim=1)


def test_choices_of_a_roll_out(video):
    def rolled(**options):
        return video.roll_out("move", clip(), 3, **{"num_inference_steps": 2, "generator": seeded(), **options})

    def arrays(clips):
        return np.stack([[np.asarray(picture) for picture in each] for each in clips])

    plain = arrays(rolled())
    for name, value in (("noise", "same"), ("recycle", "latents"), ("eta", 1.0), ("negative_prompt", "disc")):
        assert not np.array_equal(arrays(rolled(**{name: value})), plain), name
    assert np.array_equal(arrays(rolled(noise="same"))[:, 0], plain[:, 0])
    assert torch.equal((rolled(output_type="pt") * 255).round().byte(), torch.from_numpy(plain).permute(0, 1, 4, 2, 3))
    video.unet.conv_in.weight.data[:, 4:] = 0  # blind, so that only the noise tells frames apart
    same, new = arrays(rolled(noise="same")), arrays(rolled())
    assert np.array_equal(same[:, 0], same[:, 1]) and not np.array_equal(new[:, 0], new[:, 1])


def test_saved_and_loaded_again(video, tmp_path):
    video.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "model_index.json").read_text())
    assert about["_class_name"] == "VideoInstructPix2PixPipeline" and about["num_frames"] == 3
    again = VideoInstructPix2PixPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.num_condition_frames == 3
    assert torch.equal(run(again, clip()), run(video, clip()))


def test_a_released_folder_of_the_stock_class_loads(image, tmp_path):
    stock = diffusers.StableDiffusionInstructPix2PixPipeline(
        **image.components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    stock.save_pretrained(tmp_path)
    loaded = VideoInstructPix2PixPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded, clip(1)), run(image, clip(1)))


def test_pickled_weights_are_not_read(video, tmp_path):
    video.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        VideoInstructPix2PixPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"frames": clip(side=17)}, "17x17 pixels are no multiples of 2"),
        ({"frames": clip().float()}, r"floats in \[0, 1\], are expected; got torch.float32 in"),
        ({"frames": clip()[0, 0]}, "expected; got a tensor"),
        ({"frames": clip()[:, :, :2]}, "expected; got a tensor"),
        ({"frames": [*pictures(clip()[0])[:2], Image.new("RGB", (8, 8))]}, "one size"),
        ({"frames": [clip()[0, 0]] * 3}, "a list holds PIL pictures"),
        ({"prompt": ["a", "b"], "frames": clip(clips=3)}, "prompt: one text, or one for each of 3 clips"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: one text"),
        ({"generator": [seeded(), seeded()]}, "generator: one, or one for each of 1"),
        ({"frames": []}, "there is no picture in it"),
        ({"frames": [[]]}, "there is no picture in it"),
        ({"frames": [], "repeat_oldest": True}, "there is no picture in it"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": -1}, "num_inference_steps is -1"),
        ({"output_type": "jpeg"}, "output_type is one of pil"),
        ({"guidance_scale": float("nan")}, "must be finite"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, "noise of the shape"),
    ],
)
def test_mistakes(video, change, message):
    with pytest.raises(UserError, match=message):
        run(video, **{"frames": clip(), **change})


def test_folders_and_networks_that_are_no_editors(image, tmp_path):
    with pytest.raises(UserError, match="no model_index.json"):
        VideoInstructPix2PixPipeline.from_pretrained(tmp_path / "missing")
    for channels in (4, 10):
        with pytest.raises(UserError, match=f"has {channels} input channels"):
            VideoInstructPix2PixPipeline(**{**image.components, "unet": unet(channels)})
    with pytest.raises(UserError, match="num_frames=3, but the unet is for 1 frames"):
        VideoInstructPix2PixPipeline(**image.components, num_frames=3)
    with pytest.raises(UserError, match="at least one frame"):
        image.roll_out("move", clip(1), 0)
    with pytest.raises(UserError, match="num_inference_steps is 0"):
        image.roll_out("move", clip(1), 1, num_inference_steps=0)
    with pytest.raises(UserError, match="noise is 'foo'; expected 'same' or 'new'"):
        image.roll_out("move", clip(1), 1, noise="foo")
    with pytest.raises(UserError, match="recycle is 'latent'; expected 'pixels' or 'latents'"):
        image.roll_out("move", clip(1), 1, recycle="latent")
