"""Holes in videos, filled by denoising, beside what fills them without a network."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vireo.diffusion.guidance import TwoScaleGuidance
from vireo.errors import UserError
from vireo.metrics import decibels, mean_where
from vireo.pixels import as_8_bit, to_pixels
from vireo.randomness import Draws
from vireo.sampling.denoising_loop import denoise
from vireo.sampling.holes import composite, harmonic_fill, ring_fill
from vireo.sampling.sampler import Sampler
from vireo.sampling.warping import correspondence, warp_error
from vireo.sampling.windows import Windows

WITHOUT_GUIDANCE = TwoScaleGuidance(1.0, 1.0)


class InpaintingSampler(Sampler):
    """Denoises the latents of a clip around its hole and decodes them, as DiffuEraser's validation does.

    noise_schedule: what the network was trained with. inputs: names of the network's conditions in the batch.
    num_inference_steps, scheduler, scheduler_settings: one of diffusers' classes and further arguments of it.
    noise: "shared", one for all frames, for a network that sees each frame alone; or "independent".
    window, overlap: frames that the network sees at once; longer clips are made of windows, see `windows.Windows`. They
        overlap by at most half a window.
    prior_strength: share of the steps that are made where the batch has "prior_frames", a video whose hole is filled
        already: it is noised to where these steps begin. 1 begins at the first step, where hardly anything of it is
        left.

    All columns are float32 (B, T, 3, H, W) in [0, 1]: input (black in the hole), mask (white in the hole), prediction
    (whole decoded frames), target, vae (the target through the VAE, which is the ceiling) and composite (the frames
    with the prediction in the hole). Of a batch with "has_truth" false, people's own videos whose hole shows what they
    want to be rid of, these are input, prediction and composite. Raises UserError for settings that make no sense.
    """

    unscored = ("input", "mask")
    result = "composite"

    def __init__(
        self,
        noise_schedule: Any,
        inputs: Sequence[str],
        num_inference_steps: int,
        noise: Literal["shared", "independent"],
        scheduler: str = "UniPCMultistepScheduler",
        scheduler_settings: Mapping[str, Any] | None = None,
        window: int = 22,
        overlap: int = 5,
        prior_strength: float = 0.5,
    ) -> None:
        if num_inference_steps < 1 or noise not in ("shared", "independent") or not 0 < prior_strength <= 1:
            raise UserError(
                "the sampler needs at least one step, noise shared or independent and a prior_strength above 0 to 1, "
                f"got num_inference_steps={num_inference_steps}, noise={noise}, prior_strength={prior_strength}"
            )
        self.noise_schedule, self.inputs = noise_schedule, list(inputs)
        self.num_inference_steps, self.noise = num_inference_steps, noise
        self.scheduler, self.scheduler_settings = scheduler, dict(scheduler_settings or {})
        self.window, self.overlap, self.prior_strength = window, min(overlap, window // 2), prior_strength
        Windows(lambda noisy, timesteps: noisy, self.window, self.overlap)  # to be told now

    @torch.no_grad()
    def __call__(self, network: nn.Module, encoder: Any, batch: dict, draws: Draws) -> dict[str, Tensor]:
        """batch: frames and masked_frames, uint8 (B, T, 3, H, W), hole, uint8 (B, T, 1, H, W), the encoder's outputs.

        encoder: gives `decode` (scaled latents (B, C, T, h, w) to frames in [0, 1]), `encode` and `scaling_factor`.
        """
        frames, hole = to_pixels(batch["frames"], low=0.0), batch["hole"].float()
        prediction = self.predict(network, encoder, batch, draws)
        filled = {"prediction": prediction, "composite": composite(prediction, frames, hole)}
        shown = {"input": to_pixels(batch["masked_frames"], low=0.0)}
        if not all(batch.get("has_truth", [True])):
            return shown | filled
        ceiling = encoder.decode(_latents(batch["frame_moments"], encoder)).float().clamp(0, 1)
        mask = hole.expand_as(frames)
        return {**shown, "mask": mask, "prediction": prediction, "target": frames, "vae": ceiling, **filled}

    @torch.no_grad()
    def predict(
        self, network: nn.Module, encoder: Any, batch: Mapping[str, Any], draws: Draws, number: int = 0
    ) -> Tensor:
        """The frames with their holes filled, float32 (B, T, 3, H, W) in [0, 1]; `number`: see `sample`."""
        prior = None
        if "prior_frames" in batch:
            prior = _latents(encoder.encode("frame_moments", batch["prior_frames"]), encoder)
        return encoder.decode(self.sample(network, batch, draws, number, prior)).float().clamp(0, 1)

    @torch.no_grad()
    def sample(
        self,
        network: nn.Module,
        batch: Mapping[str, Any],
        draws: Draws,
        number: int = 0,
        prior: Tensor | None = None,
    ) -> Tensor:
        """Scaled latents (B, C, T, h, w), given the batch's conditions and perhaps a prior's latents of this shape.

        number: which sample of the same clip this is; each has noise of its own. Draws "sampling noise" and, for
        schedulers that draw, "sampling steps".
        """
        conditions = {name: batch[name] for name in self.inputs}
        channels, frames, *size = batch["masked_latents"].shape[1:]
        own = f" {number}" if number else ""
        if self.noise == "shared":
            noise = draws.normal(f"sampling noise{own}", channels, 1, *size).expand(-1, -1, frames, -1, -1)
        else:
            noise = draws.normal(f"sampling noise{own}", channels, frames, *size)
        return denoise(
            Windows(network, self.window, self.overlap),
            self.noise_schedule.scheduler(self.scheduler, **self.scheduler_settings),
            noise,
            WITHOUT_GUIDANCE,
            conditions,
            self.num_inference_steps,
            draws.generators(f"sampling steps{own}"),
            start=prior,
            strength=1.0 if prior is None else self.prior_strength,
        ).float()

    def baselines(self, batch: dict) -> dict[str, Tensor]:
        """The frames with holes in the mean colour around them, and filled as smoothly as possible; (B, T, 3, H, W)."""
        frames, hole = to_pixels(batch["frames"], low=0.0), batch["hole"]
        return {"ring mean": ring_fill(frames, hole), "harmonic": harmonic_fill(frames, hole)}

    def measure(
        self, network: nn.Module, encoder: Any, batch: dict, columns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """`hole_psnr` and `background_psnr`, pooled over the clip's pixels in and outside the hole; `warp_error_lk`.

        A clip without a hole, or all hole, counts as 100 dB there. hole_fraction: how much of the clip is hole. The
        target has a warping error too, which is that of the flow; none is measured of a single frame. All on the pixels
        that an 8-bit video would have; (B,) each.
        """
        if "target" not in columns:
            return {}
        target, hole = columns["target"], batch["hole"].bool()
        moves = correspondence(target) if target.shape[1] > 1 else None
        figures = {"hole_fraction": hole.double().mean(dim=(1, 2, 3, 4))}
        for title, column in columns.items():
            if title in self.unscored or column.shape != target.shape:
                continue
            prefix, shown = "" if title == "prediction" else f"{title}/", as_8_bit(column)
            if title != "target":
                squares = (shown - target).double().square()
                figures[f"{prefix}hole_psnr"] = decibels(mean_where(hole, squares))
                figures[f"{prefix}background_psnr"] = decibels(mean_where(~hole, squares))
            if moves is not None:
                figures[f"{prefix}warp_error_lk"] = warp_error(shown, *moves)
        return figures


def _latents(moments: Tensor, encoder: Any) -> Tensor:
    """Scaled latents (B, C, T, h, w): the modes of posteriors (B, T, 2 C, h, w)."""
    return moments.chunk(2, dim=2)[0].transpose(1, 2) * encoder.scaling_factor
