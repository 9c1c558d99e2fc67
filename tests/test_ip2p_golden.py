"""Encoder, loss and network together against the numbers of the published training scripts."""

import pytest
import torch

from tests.golden.fill import fill
from tests.pipelines import RecordedDraws, golden, pixels, save_pipeline, text_encoder, token_ids, unet
from vireo.diffusion.noise_schedule import NoiseSchedule
from vireo.losses.denoising import Denoising
from vireo.models.image_encoders import ImageTextEncoder
from vireo.models.video_ip2p import VideoEditor
from vireo.optimizers import adamw

INPUTS = ["condition_latents", "prompt_embeds"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = save_pipeline(tmp_path_factory.mktemp("golden"))
    text_encoder().save_pretrained(made / "text_encoder")  # the tokens are given, see `encode`
    return made


def encode(folder, described, frames, target):
    rows = [*described["token_rows"]]
    encoder = ImageTextEncoder(str(folder), str(folder), vae_batch=3)
    encoder.tokenize = lambda texts: token_ids([rows[int(text)] if text else [] for text in texts])
    batch = {"frames": frames, "target": target, "prompt": [str(row) for row in range(len(rows))]}
    return encoder(batch, RecordedDraws(described, len(rows)))


def step(network, batch, described, dropout):
    """Loss, prediction, the first convolution's gradient, the norm, and that convolution after one AdamW step."""
    answers = []
    drops = 0.05 if dropout else 0.0
    objective = Denoising(NoiseSchedule(), INPUTS, condition_dropout=drops, image_inputs=["condition_latents"])

    def called(*arguments, **conditions):
        answers.append(network(*arguments, **conditions))
        return answers[0]

    total = objective(called, batch, RecordedDraws(described, len(batch["prompt"]))).total
    total.backward()
    gradient = network.unet.conv_in.weight.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer = adamw([{"params": list(network.named_parameters())}], lr=1e-4)
    optimizer.step()
    return {
        "loss": total.detach().view(1),
        "model_pred": answers[0].detach(),
        "conv_in_grad": gradient,
        "grad_norm": norm.view(1),
        "conv_in_after_step": network.unet.conv_in.weight.detach(),
    }


def compare(found, reference, case):
    wanted = {key.removeprefix(f"{case}."): value for key, value in reference.items() if key.startswith(f"{case}.")}
    assert {"loss", "model_pred", "grad_norm"} <= wanted.keys()
    torch.testing.assert_close(found["loss"], wanted.pop("loss"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["grad_norm"], wanted.pop("grad_norm"), rtol=1e-3, atol=0)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=f"{case} {name}")


def editor(folder, frames, in_channels=8):
    unet(in_channels).save_pretrained(folder / "unet")
    return VideoEditor(frames, str(folder), NoiseSchedule())


@pytest.mark.parametrize(
    ("case", "in_channels", "dropout"),
    [("sd_start", 4, True), ("ip2p_start", 8, True), ("ip2p_start_nodrop", 8, False)],
)
def test_the_image_recipe(folder, case, in_channels, dropout):
    described, reference = golden("image_train")
    shape = (4, 3, 16, 16)
    batch = encode(folder, described, pixels("ip2p/original", *shape)[:, None], pixels("ip2p/edited", *shape))
    torch.testing.assert_close(batch["condition_latents"][:, 0], reference["image_embeds"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch["latents"], reference["latents"], rtol=1e-5, atol=1e-5)
    sums = batch["prompt_embeds"].sum((1, 2))
    torch.testing.assert_close(sums, reference["text_embeds_sum"], rtol=1e-4, atol=1e-3)
    null = batch["null_prompt_embeds"][:1].sum().view(1)
    torch.testing.assert_close(null, reference["null_embeds_sum"], rtol=1e-4, atol=1e-3)
    compare(step(editor(folder, 1, in_channels), batch, described, dropout), reference, case)


@pytest.mark.parametrize("frames", [3, 20])
@pytest.mark.parametrize("case", ["surgery_nodrop", "warm_nodrop", "warm_drop"])
def test_the_video_recipe(folder, frames, case):
    described, reference = golden(f"video_train_n{frames}")
    shape = (2, frames, 3, 16, 16)
    batch = encode(folder, described, pixels(f"ip2p/frames{frames}", *shape), pixels("ip2p/target", 2, 3, 16, 16))
    torch.testing.assert_close(
        batch["condition_latents"].flatten(1, 2), reference["image_embeds"], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(batch["latents"], reference["latents"], rtol=1e-5, atol=1e-5)
    network = editor(folder, frames)
    if case.startswith("warm"):
        fill(network.unet)
    compare(step(network, batch, described, dropout=case.endswith("_drop")), reference, case)


@pytest.mark.parametrize("frames", [3, 20])
@torch.no_grad()
def test_nothing_changes_at_the_first_step(folder, frames):
    described, reference = golden(f"video_train_n{frames}")
    network = editor(folder, frames)
    noisy, condition = reference["latents"], reference["image_embeds"]
    batch = encode(folder, described, pixels("ip2p/frames3", 2, 3, 3, 16, 16), pixels("ip2p/target", 2, 3, 16, 16))
    timesteps = torch.tensor(described["timesteps"])
    stacked = torch.cat([noisy, condition[:, -4:]], dim=1)
    before = unet(8)(stacked, timesteps, encoder_hidden_states=batch["prompt_embeds"]).sample
    after = network(noisy, timesteps, condition.unflatten(1, (frames, 4)), batch["prompt_embeds"])
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
