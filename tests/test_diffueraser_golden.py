"""Networks, losses and sampling against the numbers of the published implementation."""

from types import SimpleNamespace

import pytest
import torch

from tests.eraser_weights import DESCRIBED, REFERENCE, save
from tests.golden.fill import noise
from vireo.diffusion.noise_schedule import NoiseSchedule
from vireo.losses.denoising import Denoising
from vireo.models.diffueraser import DiffuEraser
from vireo.models.unet_walk import walk
from vireo.sampling.inpainting import InpaintingSampler

B, T = 2, 3
INPUTS = ["masked_latents", "keep", "prompt_embeds"]
MOTION = {"stage1": "none", "stage2": "adapter"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save(tmp_path_factory.mktemp("golden"))


def network(folders, stage):
    made = DiffuEraser(**folders, unet_init="base", motion_init=MOTION[stage])
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(stage == "stage1" or "motion_modules" in name)
    return made.eval()


def video(rows):
    """(B * T, C, h, w) of the reference as (B, C, T, h, w)."""
    return rows.unflatten(0, (-1, T)).transpose(1, 2)


def rows(video):
    return video.transpose(1, 2).flatten(0, 1)


@pytest.fixture
def batch():
    return {
        "latents": video(noise("tiny.latents", 6, 4, 16, 16)),
        "masked_latents": video(noise("tiny.masked_latents", 6, 4, 16, 16)),
        "keep": video((noise("tiny.mask", 6, 1, 16, 16) > 0).float()),
        "prompt_embeds": noise("tiny.text", 2, 7, 16),
    }


TIMESTEPS = torch.tensor(DESCRIBED["inputs"]["timesteps_per_video"])
NOISY = video(REFERENCE["noisy"])
RECORDED = SimpleNamespace(
    integers=lambda purpose, low, high: TIMESTEPS,
    normal=lambda purpose, *shape: video(noise("tiny.noise", 6, 4, 16, 16)),
)


def close(found, name, tolerance=1e-5):
    """To `tolerance` of the tensor's largest number."""
    wanted = REFERENCE[name]
    size = max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * size, msg=lambda m: f"{name}: {m}")


def equal(found, name):
    """Bit for bit, on processors with the instructions that the reference was computed with."""
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert torch.equal(found, REFERENCE[name]), name
    close(found, name)


@torch.no_grad()
def test_brushnets_residuals(folders, batch):
    condition = rows(torch.cat([batch["masked_latents"], batch["keep"]], dim=1))
    brushnet = network(folders, "stage1").brushnet
    found = brushnet(REFERENCE["noisy"], TIMESTEPS, batch["prompt_embeds"], condition, T)
    names = [f"brush.down.{n}" for n in range(12)] + ["brush.mid"] + [f"brush.up.{n}" for n in range(15)]
    for value, name in zip(found, names, strict=True):
        equal(value[[1, 5]], name)
    given = (each.repeat_interleave(T, dim=0) for each in (TIMESTEPS, batch["prompt_embeds"]))
    for value, row_by_row in zip(found, brushnet(REFERENCE["noisy"], *given, condition), strict=True):
        assert torch.equal(value, row_by_row), "frames of a clip are rows like any others"


@torch.no_grad()
@pytest.mark.parametrize(("stage", "name"), [("stage1", "unet2d"), ("stage2", "motion")])
def test_the_prediction_with_and_without_brushnet(folders, batch, stage, name):
    """Any batch size; the middle block's last layer runs twice among motion modules; masks are 1 where kept."""
    made, alike = network(folders, stage), equal if stage == "stage1" else close
    prediction = made(NOISY, TIMESTEPS, *(batch[name] for name in INPUTS))
    alike(rows(prediction), f"{name}.brush")
    x = walk(made.unet, made.unet.conv_in(REFERENCE["noisy"]), TIMESTEPS, batch["prompt_embeds"], T)
    alike(made.unet.conv_out(made.unet.conv_act(made.unet.conv_norm_out(x))), f"{name}.plain")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_loss_and_gradients(folders, batch, stage, checkpointing):
    made = network(folders, stage)
    made.gradient_checkpointing = checkpointing
    total = Denoising(NoiseSchedule(), INPUTS)(made, batch, RECORDED).total
    total.backward()
    close(total.detach().view(1), f"{stage}.loss")
    gradients = {name: p.grad for name, p in made.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    for name in REFERENCE:
        kind, _, parameter = name.removeprefix(f"{stage}.").partition(".")
        if not name.startswith(f"{stage}.grad"):
            continue
        if kind == "grad":
            close(gradients[parameter if stage == "stage1" else f"unet.{parameter}"], name, 1e-4)
        else:
            part = [gradient for key, gradient in gradients.items() if key.startswith(parameter)]
            close(torch.nn.utils.get_total_norm(part).view(1), name, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_sampling(folders, batch, stage):
    """The sampler as the experiments have it; stage 1 starts all frames from one noise."""
    shape, name = ((1, 4, 16, 16), "start") if stage == "stage1" else ((T, 4, 16, 16), "start2")

    def start(purpose, *own):
        assert (purpose, own) == ("sampling noise", (4, shape[0], 16, 16))
        return noise(f"tiny.sample.{name}", *shape).transpose(0, 1)[None]

    recorded = SimpleNamespace(normal=start, generators=lambda purpose: [])
    sampler = InpaintingSampler(
        NoiseSchedule(), INPUTS, DESCRIBED["sampler"]["steps"], "shared" if stage == "stage1" else "independent"
    )
    asked, made = [], network(folders, stage)

    def remembering(noisy, timesteps, **conditions):
        asked.append(int(timesteps[0]))
        return made(noisy, timesteps, **conditions)

    one = {name: batch[name][:1] for name in INPUTS}
    close(rows(sampler.sample(remembering, one, recorded)), f"sample.{stage}", 1e-5)
    assert asked == REFERENCE["sample.timesteps"].tolist()
