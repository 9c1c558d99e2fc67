"""Videos made from captions, and of image-to-video from a caption and the first picture."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vireo.diffusion.guidance import TextGuidance
from vireo.errors import UserError
from vireo.pixels import to_pixels
from vireo.randomness import Draws
from vireo.sampling.denoising_loop import denoise
from vireo.sampling.sampler import Sampler

IMAGE = "image_latents"  # the input of networks that see a picture
DPM = "CogVideoXDPMScheduler"


class VideoSampler(Sampler):
    """Denoises latents of a whole clip and decodes them, step by step as diffusers' CogVideoX pipelines do.

    noise_schedule: what the network was trained with; its `scheduler(name)` gives the inference scheduler.
    scheduler, scheduler_settings: one of diffusers' classes, and further arguments of it. CogVideoXDPMScheduler draws
        at each step, CogVideoXDDIMScheduler only at the beginning. None is the published recipe's choice, DDIM for 2B
        and DPM for the others; of all, only 2B's noise schedule is shifted.
    inputs: names of the network's conditions in the batch; one with a `null_<name>` beside it is text.
    num_frames, height, width: of the videos.
    num_inference_steps, guidance_scale: the pipelines' defaults. dynamic_guidance: their `use_dynamic_cfg`, meant for
        CogVideoXDPMScheduler; None: with that one alone.

    Every clip has noise of its own, the same at each validation. All columns are float32 in [0, 1]: image
    (B, 1, 3, H, W) where one is given, target and prediction (B, T, 3, H, W). Raises UserError for settings that make
    no sense.
    """

    unscored = ("image",)

    def __init__(
        self,
        noise_schedule: Any,
        inputs: Sequence[str],
        num_frames: int,
        height: int,
        width: int,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        dynamic_guidance: bool | None = None,
        scheduler: str | None = None,
        scheduler_settings: Mapping[str, Any] | None = None,
    ) -> None:
        if num_inference_steps < 1:
            raise UserError(f"the sampler needs at least one step, got num_inference_steps={num_inference_steps}")
        self.noise_schedule, self.inputs, self.shape = noise_schedule, list(inputs), (num_frames, height, width)
        self.num_inference_steps = num_inference_steps
        if scheduler is None:
            scheduler = DPM if noise_schedule.settings["snr_shift_scale"] == 1 else "CogVideoXDDIMScheduler"
        is_dynamic = scheduler == DPM if dynamic_guidance is None else dynamic_guidance
        self.guidance = TextGuidance(guidance_scale, num_inference_steps if is_dynamic else None)
        self.scheduler, self.scheduler_settings = scheduler, dict(scheduler_settings or {})

    @torch.no_grad()
    def __call__(self, network: nn.Module, encoder: Any, batch: dict, draws: Draws) -> dict[str, Tensor]:
        """batch: the encoder's outputs; frames, uint8 (B, T, 3, H, W), and image, uint8 (B, 3, H, W), where given.

        encoder: gives `latent_shape(num_frames, height, width)`, `decode`, and `clean_image_latents` for networks that
        see a picture.
        """
        columns = {}
        if "image" in batch:
            columns["image"] = to_pixels(batch["image"][:, None], low=0.0)
        if "frames" in batch:
            columns["target"] = to_pixels(batch["frames"], low=0.0)
        latents = self.sample(network, encoder, batch, draws)
        return columns | {"prediction": encoder.decode(latents).float().clamp(0, 1)}

    @torch.no_grad()
    def sample(self, network: nn.Module, encoder: Any, batch: Mapping[str, Any], draws: Draws) -> Tensor:
        """Scaled latents (B, C, t, h, w), padding frames included.

        Draws: "sampling noise" and "sampling steps"; "image_posterior" where the network sees a picture.
        """
        if "image" in batch and IMAGE not in self.inputs:
            raise UserError(f"these weights take no picture: model.inputs is {self.inputs}. Leave it out.")
        given = {name: batch[name] for name in self.inputs if name != IMAGE}
        null = {name: batch[f"null_{name}"] for name in given if f"null_{name}" in batch}
        others = {name: value for name, value in given.items() if name not in null}
        if IMAGE in self.inputs:
            others[IMAGE] = encoder.clean_image_latents(batch, draws)
        channels, *grid = encoder.latent_shape(*self.shape)
        settings = {"timestep_spacing": "trailing", **self.scheduler_settings}

        def predict(noisy: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
            return network(noisy.transpose(1, 2), timesteps, **conditions).float().transpose(1, 2)

        # Time before channels, as in the pipelines, so that a scheduler's own numbers fall on the same places.
        latents = denoise(
            predict,
            self.noise_schedule.scheduler(self.scheduler, **settings),
            draws.normal("sampling noise", grid[0], channels, *grid[1:]),
            self.guidance,
            self.guidance.conditions(others, {name: given[name] for name in null}, null),
            self.num_inference_steps,
            draws.generators("sampling steps"),
        )
        return latents.transpose(1, 2)

    def baselines(self, batch: dict) -> dict[str, Tensor]:
        """The first frame held, which image-to-video is given; (B, T, 3, H, W)."""
        frames = to_pixels(batch["frames"], low=0.0)
        return {"first frame": frames[:, :1].expand_as(frames)}
