"""The frame after a clip, made from the clip and an instruction."""

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vireo.diffusion.guidance import TwoScaleGuidance
from vireo.errors import UserError
from vireo.metrics import decibels, mean_where, ssim_map
from vireo.pixels import as_8_bit, to_pixels, to_uint8
from vireo.randomness import Draws
from vireo.sampling.denoising_loop import denoise
from vireo.sampling.roll_out import Noise, Recycle, check_choice, padded, roll_out
from vireo.sampling.sampler import Sampler

logger = logging.getLogger(__name__)

SHOWN_INPUTS = 3  # 00, 10 and 19 of 20 frames
UNEVEN = "the frames of data.condition_frames and the one to be made are not evenly spaced, so no window can move on"


class EditSampler(Sampler):
    """Denoises the next frame's latents with two-scale guidance and decodes them (InstructPix2Pix, arXiv:2211.09800).

    noise_schedule: what the network was trained with; its `scheduler(name)` gives the inference scheduler.
    scheduler, scheduler_settings: one of diffusers' classes, and further arguments of it (timestep_spacing, ...).
    inputs: names of the network's conditions in the batch. One with a `null_<name>` beside it is text, the others are
        pictures, whose null is zero.
    num_inference_steps, text_guidance, image_guidance: the published ones by default, and the published scheduler.
    further_guidance: pairs of text_guidance and image_guidance, each of which is a further column by the same noise.
    change_threshold: a pixel counts as changed where one of its colours differs by more than this from the last frame,
        in [0, 1]; 0.1 is above what video codecs and sensors do to a still picture.
    roll_out_frames: length of the roll-outs that `vireo sample` shows, at most the number of condition frames.
    roll_out_noise: whether each of their frames starts from "new" noise or all from the "same".
    recycle: how a new frame comes back as a condition, see `vireo.sampling.roll_out`.

    All columns are float32 in [0, 1]; "inputs" is (B, up to 3, 3, H, W), the others (B, 1, 3, H, W): target,
    prediction, one such as "text 3 image 1.5" for each further pair, vae (the target through the VAE, which is the
    ceiling) and "copy-last vae". Raises UserError for settings that make no sense.
    """

    unscored = ("inputs",)

    def __init__(
        self,
        noise_schedule: Any,
        inputs: Sequence[str],
        num_inference_steps: int = 100,
        text_guidance: float = 7.5,
        image_guidance: float = 1.5,
        scheduler: str = "EulerAncestralDiscreteScheduler",
        scheduler_settings: Mapping[str, Any] | None = None,
        change_threshold: float = 0.1,
        roll_out_frames: int = 8,
        roll_out_noise: Noise = "new",
        recycle: Recycle = "pixels",
        further_guidance: Sequence[tuple[float, float]] = (),
    ) -> None:
        if num_inference_steps < 1 or roll_out_frames < 1:
            found = f"num_inference_steps={num_inference_steps}, roll_out_frames={roll_out_frames}"
            raise UserError(f"the sampler needs at least one step and one frame, got {found}")
        check_choice("roll_out_noise", roll_out_noise, Noise)
        check_choice("recycle", recycle, Recycle)
        self.noise_schedule = noise_schedule
        self.inputs = list(inputs)
        self.num_inference_steps = num_inference_steps
        self.guidance = TwoScaleGuidance(text_guidance, image_guidance)
        self.further_guidance = {
            f"text {text:g} image {image:g}": TwoScaleGuidance(text, image) for text, image in further_guidance
        }
        self.scheduler = scheduler
        self.scheduler_settings = dict(scheduler_settings or {})
        self.change_threshold = change_threshold
        self.roll_out_frames = roll_out_frames
        self.roll_out_noise = roll_out_noise
        self.recycle = recycle
        self._has_told = False  # why there is no roll-out, once for all clips

    @torch.no_grad()
    def __call__(self, network: nn.Module, encoder: Any, batch: dict, draws: Draws) -> dict[str, Tensor]:
        """batch: frames, uint8 (B, N, 3, H, W), oldest first; target, uint8 (B, 3, H, W); and the encoder's outputs.

        encoder: gives `decode` (scaled latents (B, C, h, w) to pixels in [0, 1]) and `scaling_factor`.
        """
        frames, factor = batch["frames"], encoder.scaling_factor
        count = frames.shape[1]
        shown = torch.linspace(0, count - 1, min(SHOWN_INPUTS, count)).round().long()
        return {
            "inputs": to_pixels(frames[:, shown.to(frames.device)], low=0.0),
            "target": to_pixels(batch["target"][:, None], low=0.0),
            "prediction": self.predict(network, encoder, batch, draws),
            **{
                title: _decoded(encoder, self.sample(network, batch, draws, guidance=guidance))
                for title, guidance in self.further_guidance.items()
            },
            "vae": _decoded(encoder, _mode(batch["target_moments"]) * factor),
            "copy-last vae": _decoded(encoder, batch["condition_latents"][:, -1] * factor),
        }

    @torch.no_grad()
    def predict(self, network: nn.Module, encoder: Any, batch: Mapping[str, Any], draws: Draws) -> Tensor:
        """The next frame, float32 (B, 1, 3, H, W) in [0, 1]; only the network's conditions are read from the batch."""
        return _decoded(encoder, self.sample(network, batch, draws))

    @torch.no_grad()
    def sample(
        self,
        network: nn.Module,
        batch: Mapping[str, Any],
        draws: Draws,
        number: int = 0,
        guidance: TwoScaleGuidance | None = None,
    ) -> Tensor:
        """Scaled latents (B, C, h, w) of the next frame, given the batch's conditions.

        number: which frame of a roll-out this is; it has noise of its own where roll_out_noise is "new".
        guidance: another one than the sampler's own.
        """
        guidance = guidance or self.guidance
        given = {name: batch[name] for name in self.inputs}
        null_text = {name: batch[f"null_{name}"] for name in given if f"null_{name}" in batch}
        conditions = guidance.conditions(
            {name: value for name, value in given.items() if name not in null_text},
            {name: value for name, value in given.items() if name in null_text},
            null_text,
        )
        own = f" of frame {number}" if number and self.roll_out_noise == "new" else ""
        return denoise(
            network,
            self.noise_schedule.scheduler(self.scheduler, **self.scheduler_settings),
            draws.normal(f"sampling noise{own}", *batch["condition_latents"].shape[2:]),
            guidance,
            conditions,
            self.num_inference_steps,
            draws.generators(f"sampling steps{own}"),
        ).float()

    @torch.no_grad()
    def roll_out(
        self, network: nn.Module, encoder: Any, batch: Mapping[str, Any], draws: Draws, num_frames: int
    ) -> Tensor:
        """The `num_frames` frames after the batch's window, each a condition of the next, uint8 (B, K, 3, H, W).

        encoder: also gives `encode("target_moments", uint8 frames (B, 3, H, W))`, called once a new frame.
        """
        return roll_out(
            lambda window, number: self.sample(network, {**batch, "condition_latents": window}, draws, number),
            lambda latents: to_uint8(encoder.decode(latents), low=0.0),
            lambda frames: _mode(encoder.encode("target_moments", frames)),
            batch["condition_latents"],
            num_frames,
            encoder.scaling_factor,
            self.recycle,
        )

    @torch.no_grad()
    def within(
        self, network: nn.Module, encoder: Any, batch: Mapping[str, Any], draws: Draws, num_frames: int
    ) -> dict[str, Tensor]:
        """A roll-out whose truth is known: target, prediction and copy-last, float32 (B, K, 3, H, W) in [0, 1].

        The batch knows N + 1 frames, so a roll-out of the last K of them starts from the N + 1 - K before; the window's
        missing frames are copies of the oldest. K: `num_frames`, at most N. The frames must be `evenly_spaced`:
        only then is what follows a window that has moved on the frame that the network was trained to make.
        """
        frames = torch.cat([batch["frames"], batch["target"][:, None]], dim=1)
        length = batch["frames"].shape[1]
        num_frames = min(num_frames, length)
        earlier = length + 1 - num_frames
        window = padded(batch["condition_latents"][:, :earlier], length)
        made = self.roll_out(network, encoder, {**batch, "condition_latents": window}, draws, num_frames)
        return {
            "target": to_pixels(frames[:, earlier:], low=0.0),
            "prediction": to_pixels(made, low=0.0),
            "copy-last": to_pixels(frames[:, earlier - 1, None], low=0.0).expand(-1, num_frames, -1, -1, -1),
        }

    def videos(self, network: nn.Module, encoder: Any, batch: dict, draws: Draws) -> dict[str, dict[str, Tensor]]:
        """A roll-out beside the truth and beside the last frame held, see `within`.

        None of a single frame, nor where the frames are not evenly spaced, which is told.
        """
        if not evenly_spaced(batch):
            if not self._has_told:
                logger.warning("there is no roll-out: %s", UNEVEN)
            self._has_told = True
            return {}
        columns = self.within(network, encoder, batch, draws, self.roll_out_frames)
        return {"roll_out": columns} if columns["target"].shape[1] > 1 else {}

    def baselines(self, batch: dict) -> dict[str, Tensor]:
        """The last condition frame and the first, in place of the prediction; (B, 1, 3, H, W)."""
        frames = to_pixels(batch["frames"][:, [-1, 0]], low=0.0)
        return {"copy-last": frames[:, :1], "copy-first": frames[:, 1:]}

    def measure(
        self, network: nn.Module, encoder: Any, batch: dict, columns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Mean absolute error `l1`; `changed_l1`, `changed_psnr` and `changed_ssim` where target and last frame differ.

        changed_fraction: how much of the frame that is. Where it is none, the whole frame counts. All on the pixels
        that an 8-bit picture would have; (B,) each.
        """
        target = columns["target"]
        changed = self.changed(batch)
        figures = {"changed_fraction": changed.double().mean(dim=(1, 2, 3, 4))}
        region = changed | ~changed.any(dim=-1, keepdim=True).any(dim=-2, keepdim=True)
        for title, column in columns.items():
            if title == "target" or title in self.unscored or column.shape != target.shape:
                continue
            prefix = "" if title == "prediction" else f"{title}/"
            shown = as_8_bit(column)
            error = (shown - target).double()
            figures[f"{prefix}l1"] = error.abs().mean(dim=(1, 2, 3, 4))
            figures[f"{prefix}changed_l1"] = mean_where(region, error.abs())
            figures[f"{prefix}changed_psnr"] = decibels(mean_where(region, error.square()))
            figures[f"{prefix}changed_ssim"] = mean_where(region, ssim_map(shown, target))
        return figures

    def run_exported(self, folder: Path) -> None:
        """One step for one frame by the pipeline. Raises UserError if it is not finite, and whatever stops it."""
        from vireo.sampling.video_ip2p_pipeline import VideoInstructPix2PixPipeline

        pipeline = VideoInstructPix2PixPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        side = 8 * pipeline.vae_scale_factor  # UNets halve latents three times
        frames = torch.zeros(1, pipeline.num_condition_frames, 3, side, side)
        made: Any = pipeline("", frames, num_inference_steps=1, output_type="pt")
        if not made.images.isfinite().all():
            raise UserError(f"{folder} makes frames that are not finite: the network's weights have gone wrong")

    def changed(self, batch: Mapping[str, Any]) -> Tensor:
        """Pixels of the target that differ from the last frame by more than the threshold, bool (B, 1, 1, H, W)."""
        target, last = (to_pixels(frames, low=0.0) for frames in (batch["target"], batch["frames"][:, -1]))
        return ((target - last).abs().amax(dim=1, keepdim=True) > self.change_threshold)[:, None]


def evenly_spaced(batch: Mapping[str, Any]) -> bool:
    """Whether the target follows the last frame at the distance at which all frames follow one another.

    batch: "frame_numbers", for each clip those of its frames and its target; without, they are consecutive.
    """
    return all(
        len({later - earlier for earlier, later in pairwise(numbers)}) == 1
        for numbers in batch.get("frame_numbers", ())
    )


def _mode(moments: Tensor) -> Tensor:
    """The posterior's mode, (B, 2 C, h, w) -> (B, C, h, w)."""
    return moments.chunk(2, dim=1)[0]


def _decoded(encoder: Any, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) to pixels (B, 1, 3, H, W) in [0, 1]."""
    return encoder.decode(latents).float().clamp(0, 1)[:, None]
