"""Network, encoder, sampler and exported pipeline together: two ways to the same frame."""

import pytest
import torch

from tests.pipelines import pixels, save_pipeline
from vireo.diffusion.noise_schedule import NoiseSchedule
from vireo.errors import UserError
from vireo.models.image_encoders import ImageTextEncoder
from vireo.models.video_ip2p import VideoEditor
from vireo.randomness import Draws
from vireo.sampling.edits import EditSampler
from vireo.sampling.video_ip2p_pipeline import VideoInstructPix2PixPipeline

PROMPTS = ["move the red disc up", "drop the blue square"]
DRAWS = Draws("validation", [0, 1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def network(folder):
    made = VideoEditor(3, str(folder), NoiseSchedule()).eval()
    generator = torch.Generator().manual_seed(0)
    weight = made.unet.conv_in.weight.data  # as if trained: every frame matters
    weight[:, 4:12] = 0.05 * torch.randn(weight[:, 4:12].shape, generator=generator)
    return made


@pytest.fixture(scope="module")
def pipeline(network, tmp_path_factory):
    exported = tmp_path_factory.mktemp("exported")
    network.export(exported, network.state_dict())
    loaded = VideoInstructPix2PixPipeline.from_pretrained(exported)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_an_export_is_judged_by_what_it_makes(network, tmp_path):
    network.export(tmp_path, network.state_dict())
    sampler().run_exported(tmp_path)
    gone = {name: torch.full_like(value, torch.nan) for name, value in network.state_dict().items()}
    network.export(tmp_path, gone)
    with pytest.raises(UserError, match="makes frames that are not finite"):
        sampler().run_exported(tmp_path)


def data():
    frames, target = pixels("ip2p/frames3", 2, 3, 3, 16, 16), pixels("ip2p/target", 2, 3, 16, 16)
    return {"frames": frames, "target": target, "prompt": PROMPTS, "position": torch.tensor([0, 1])}


def sampler(inputs=("condition_latents", "prompt_embeds"), **options):
    return EditSampler(NoiseSchedule(), list(inputs), 3, scheduler="DDIMScheduler", **options)


def noise(name="sampling noise"):
    return DRAWS.normal(name, 4, 8, 8)


def test_an_exported_folder_makes_the_frames_that_validation_showed(folder, network, pipeline):
    encoder = ImageTextEncoder(str(folder), str(folder))
    columns = sampler()(network, encoder, encoder(data(), DRAWS), DRAWS)
    pipeline.scheduler = NoiseSchedule().scheduler("DDIMScheduler")
    made = pipeline(PROMPTS, data()["frames"], num_inference_steps=3, latents=noise(), output_type="pt").images
    assert pipeline.num_condition_frames == 3
    torch.testing.assert_close(made, columns["prediction"][:, 0], rtol=0, atol=1e-3)
    assert not torch.allclose(made, columns["copy-last vae"][:, 0], atol=1e-2)


def test_roll_outs_of_both_agree(folder, network, pipeline):
    encoder = ImageTextEncoder(str(folder), str(folder))
    chosen = sampler(roll_out_noise="same")
    rolled = chosen.roll_out(network, encoder, encoder(data(), DRAWS), DRAWS, 3)
    pipeline.scheduler = NoiseSchedule().scheduler("DDIMScheduler")
    window = data()["frames"]
    for number in range(3):
        made = pipeline(PROMPTS, window, num_inference_steps=3, latents=noise(), output_type="pt").images
        shown = (made * 255).round().to(torch.uint8)
        assert (shown.int() - rolled[:, number].int()).abs().max() <= 1, number
        window = torch.cat([window[:, 1:], rolled[:, number, None]], dim=1)


def test_a_text_encoder_that_learns_is_sampled_through_the_network(folder, network):
    reading = VideoEditor(3, str(folder), NoiseSchedule(), text_encoder=str(folder)).eval()
    reading.unet.load_state_dict(network.unet.state_dict())
    ids = ImageTextEncoder(str(folder), None, str(folder))
    embeds = ImageTextEncoder(str(folder), str(folder))
    ours = sampler(["condition_latents", "prompt_ids"]).sample(reading, ids(data(), DRAWS), DRAWS)
    theirs = sampler().sample(network, embeds(data(), DRAWS), DRAWS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
