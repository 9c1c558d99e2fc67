"""Videos of a text and reference images: all frames at once, or group after group with a key/value cache."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vireo.diffusion.flow_schedule import FlowSchedule
from vireo.diffusion.guidance import TwoScaleGuidance
from vireo.errors import UserError
from vireo.models.wan_attention import KeyValueCache
from vireo.pixels import to_pixels
from vireo.randomness import Draws
from vireo.sampling.denoising_loop import denoise
from vireo.sampling.reference_measures import MASK, colour_distance, flow_errors, without_references
from vireo.sampling.sampler import Sampler

GAIN_TIMESTEPS = (250.0, 500.0, 750.0)  # 1000 sigma, of the reference gain that validation measures


class ReferenceSampler(Sampler):
    """Denoises all latents of a clip at once, with guidance by the text and by the references.

    noise_schedule: what the network was trained with; its `scheduler(name)` gives the inference scheduler.
    scheduler, scheduler_settings: one of diffusers' classes for flows, and further arguments of it.
    inputs: names of the network's conditions in the batch. One with a `null_<name>` beside it is text, the others are
        the references'; where guidance leaves these out, their mask is false.
    num_frames, height, width: of the videos, in pixels.
    num_inference_steps, text_guidance: Wan's own are 50 and 5 to 6. reference_guidance: see `TwoScaleGuidance`; 1 has
        the references in both predictions, the value of text_guidance leaves them out of the negative one.
    reference_scale: factor of what the references add inside the network; below 1 the text has more of a say.

    Columns are float32 in [0, 1]: references (B, N, 3, H, W), target, prediction, vae (the target through the VAE,
    which is the ceiling), (B, T, 3, H, W) each, where the batch has them. Raises UserError for settings that make no
    sense.
    """

    unscored = ("references",)

    def __init__(
        self,
        noise_schedule: FlowSchedule,
        inputs: Sequence[str],
        num_frames: int,
        height: int,
        width: int,
        num_inference_steps: int = 50,
        text_guidance: float = 5.0,
        reference_guidance: float = 1.0,
        reference_scale: float = 1.0,
        scheduler: str = "UniPCMultistepScheduler",
        scheduler_settings: Mapping[str, Any] | None = None,
    ) -> None:
        if num_inference_steps < 1:
            raise UserError(f"the sampler needs at least one step, got num_inference_steps={num_inference_steps}")
        self.noise_schedule, self.inputs, self.shape = noise_schedule, list(inputs), (num_frames, height, width)
        self.num_inference_steps, self.reference_scale = num_inference_steps, reference_scale
        self.guidance = TwoScaleGuidance(text_guidance, reference_guidance)
        self.scheduler, self.scheduler_settings = scheduler, dict(scheduler_settings or {})

    @torch.no_grad()
    def __call__(self, network: nn.Module, encoder: Any, batch: dict, draws: Draws) -> dict[str, Tensor]:
        """batch: the encoder's outputs; references, uint8 (B, N, 3, H, W), and frames, uint8 (B, T, 3, H, W), if any.

        encoder: gives `latent_shape(num_frames, height, width)` and `decode`, latents to pixels (B, T, 3, H, W) in
        [0, 1].
        """
        columns = {}
        if "references" in batch:
            columns["references"] = to_pixels(batch["references"], low=0.0)
        if "frames" in batch:
            columns["target"] = to_pixels(batch["frames"], low=0.0)
        columns["prediction"] = _decoded(encoder, self.sample(network, encoder, batch, draws))
        if "frames" in batch:
            columns["vae"] = _decoded(encoder, batch["latents"])
        return columns

    @torch.no_grad()
    def sample(self, network: nn.Module, encoder: Any, batch: Mapping[str, Any], draws: Draws) -> Tensor:
        """Latents (B, C, t, h, w), normalised. Draws: "sampling noise", "sampling steps"."""
        return denoise(
            partial(network, reference_scale=self.reference_scale),
            self.noise_schedule.scheduler(self.scheduler, **self.scheduler_settings),
            draws.normal("sampling noise", *encoder.latent_shape(*self.shape)),
            self.guidance,
            self.conditions(batch),
            self.num_inference_steps,
            draws.generators("sampling steps"),
        ).float()

    def conditions(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The network's conditions for all passes of the guidance."""
        given = {name: batch[name] for name in self.inputs}
        null = {name: batch[f"null_{name}"] for name in given if f"null_{name}" in batch}
        references = {name: value for name, value in given.items() if name not in null}
        return self.guidance.conditions(references, {name: given[name] for name in null}, null)

    def baselines(self, batch: dict) -> dict[str, Tensor]:
        """The first reference as a still video, (B, T, 3, H, W); nothing where there are no references."""
        if "references" not in batch:
            return {}
        still = to_pixels(batch["references"][:, :1], low=0.0)
        return {"still reference": still.expand(-1, batch["frames"].shape[1], -1, -1, -1)}

    @torch.no_grad()
    def measure(
        self, network: nn.Module, encoder: Any, batch: dict, columns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """(B,) each: `reference_gain`, how much larger the flow's error is without the references, at fixed noise.

        colour_distance: of each column's colours to the subject's, see `vireo.sampling.reference_measures`.
        """
        figures: dict[str, Tensor] = {}
        if "latents" in batch and MASK in self.inputs:
            draws = Draws("reference gain", batch["position"], batch["latents"].device)
            conditions = {name: batch[name] for name in self.inputs}
            gains = []
            for timestep in GAIN_TIMESTEPS:
                errors = partial(flow_errors, network, self.noise_schedule, batch["latents"], draws, timestep)
                gains.append(errors(without_references(conditions)) - errors(conditions))
            figures["reference_gain"] = torch.stack(gains).mean(dim=0)
        if "references" in columns:
            for title, column in columns.items():
                if title != "references":
                    prefix = "" if title == "prediction" else f"{title}/"
                    figures[f"{prefix}colour_distance"] = colour_distance(
                        columns["references"], batch["reference_mask"], column
                    )
        return figures


class RollOutSampler(ReferenceSampler):
    """Denoises group after group of latent frames in a few steps; each sees the finished ones before it, by a cache.

    As LongLive and Self Forcing sample (https://github.com/NVlabs/LongLive, https://arxiv.org/abs/2506.08009): between
    steps the estimate of the clean latents is noised afresh, and when a group is finished, one more pass puts its keys
    and values into the cache. For causal networks, distilled ones by default: four steps without guidance.

    denoising_steps: of 1000, from noise to clean, before the shift; None: num_inference_steps of them, evenly spaced:
        1000, 750, 500 and 250 for four. context_noise: noise level, of 1000, at which finished frames are shown to
        later ones. group_frames: of the network. Further arguments: see `ReferenceSampler`.
    """

    def __init__(
        self,
        noise_schedule: FlowSchedule,
        inputs: Sequence[str],
        num_frames: int,
        height: int,
        width: int,
        num_inference_steps: int = 4,
        text_guidance: float = 1.0,
        reference_guidance: float = 1.0,
        reference_scale: float = 1.0,
        denoising_steps: Sequence[int] | None = None,
        context_noise: float = 0.0,
        group_frames: int = 3,
    ) -> None:
        guidance = (text_guidance, reference_guidance, reference_scale)
        super().__init__(noise_schedule, inputs, num_frames, height, width, num_inference_steps, *guidance)
        most = noise_schedule.num_train_timesteps
        if denoising_steps is None:
            denoising_steps = [most - most * step // num_inference_steps for step in range(num_inference_steps)]
        ordered = list(denoising_steps) == sorted(set(denoising_steps), reverse=True)
        if not denoising_steps or not ordered or min(denoising_steps) < 1 or max(denoising_steps) > most:
            raise UserError(
                f"model.sampler.denoising_steps are whole numbers from {most} down to 1, got {list(denoising_steps)}."
            )
        if group_frames < 1 or not 0 <= context_noise < most:
            raise UserError(
                f"model.sampler wants group_frames >= 1 and context_noise in [0, {most}); got {group_frames} and "
                f"{context_noise}."
            )
        self.timesteps = noise_schedule.timesteps(torch.tensor(list(denoising_steps)) - 1).tolist()
        self.context_noise, self.group_frames = context_noise, group_frames

    @torch.no_grad()
    def sample(self, network: nn.Module, encoder: Any, batch: Mapping[str, Any], draws: Draws) -> Tensor:
        """Latents (B, C, t, h, w), normalised. Draws: "sampling noise of group <g>, step <s>"."""
        channels, frames, *grid = encoder.latent_shape(*self.shape)
        if frames % self.group_frames:
            raise UserError(f"{frames} latent frames cannot be cut into groups of group_frames={self.group_frames}.")
        predict = partial(network, cache=KeyValueCache(), reference_scale=self.reference_scale)
        conditions, groups = self.conditions(batch), []
        for group in range(frames // self.group_frames):
            latents = torch.zeros(len(draws.positions), channels, self.group_frames, *grid, device=draws.device)
            for step, timestep in enumerate(self.timesteps):
                noise = draws.normal(f"sampling noise of group {group}, step {step}", *latents.shape[1:])
                times = latents.new_full((len(latents),), timestep)
                noisy = self.noise_schedule.add_noise(latents, noise, times)
                predictions = predict(self.guidance.repeat(noisy), self.guidance.repeat(times), **conditions).float()
                latents = self.noise_schedule.to_clean(self.guidance.combine(predictions), noisy, times)
            times = latents.new_full((len(latents),), self.context_noise)
            predict(self.guidance.repeat(latents), self.guidance.repeat(times), **conditions, keep=True)
            groups.append(latents)
        return torch.cat(groups, dim=2)


def _decoded(encoder: Any, latents: Tensor) -> Tensor:
    return encoder.decode(latents).float().clamp(0, 1)
