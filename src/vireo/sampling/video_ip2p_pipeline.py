"""A trained editor as a diffusers pipeline: `VideoInstructPix2PixPipeline.from_pretrained(folder)`.

diffusers' own InstructPix2Pix pipeline loads a folder with more than one condition frame, but cannot run it: it stacks
four condition channels and the network wants 4 N.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, ImagePipelineOutput, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from vireo import randomness
from vireo.diffusion.guidance import TwoScaleGuidance
from vireo.errors import UserError
from vireo.pixels import to_pixels, to_uint8
from vireo.sampling.denoising_loop import denoise
from vireo.sampling.roll_out import Noise, Recycle, check_choice, padded, roll_out

VAE_BATCH = 8  # frames that are encoded at once: 21 of 512 x 512 would cost several GB
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Generator = torch.Generator | Sequence[torch.Generator] | None


class VideoInstructPix2PixPipeline(DiffusionPipeline):
    """The frame after a clip, by an instruction, from the clip's last N frames; N = 1 edits pictures.

    vae: frozen, latents of C channels. text_encoder, tokenizer: of CLIP's kind. unet: C + C N input channels, the noisy
    latents first and then the frames from the oldest to the latest. scheduler: any of diffusers'. num_frames: N, which
    the channels say too; model_index.json has it for readers.
    Raises UserError for a unet whose channels are not C + C N.
    """

    model_cpu_offload_seq: Any = "text_encoder->unet->vae"

    vae: Any
    text_encoder: Any
    tokenizer: Any
    unet: Any
    scheduler: Any
    _execution_device: Any  # diffusers': where the pipeline computes, also while parts are off-loaded

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        num_frames: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        channels, given = self.vae.config.latent_channels, self.unet.config.in_channels
        if given < 2 * channels or given % channels:
            raise UserError(
                f"the unet has {given} input channels; with latents of {channels} channels an editor of N frames has "
                f"{channels} + {channels} N, that is {2 * channels} for N = 1. A text-to-image unet must be widened."
            )
        self.num_condition_frames = given // channels - 1
        if num_frames not in (None, self.num_condition_frames):
            raise UserError(f"num_frames={num_frames}, but the unet is for {self.num_condition_frames} frames")
        self.register_to_config(num_frames=self.num_condition_frames)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "VideoInstructPix2PixPipeline":
        """A pipeline folder that vireo exported or converted, or any InstructPix2Pix folder of diffusers' layout.

        Reads this folder's JSON and safetensors files, nothing else; nothing is downloaded. kwargs: as of diffusers,
        such as torch_dtype. Raises UserError if there is no pipeline in the folder.
        """
        folder = Path(pretrained_model_name_or_path)
        if not (folder / "model_index.json").is_file():
            raise UserError(f"{folder} is no pipeline: there is no model_index.json in it. Name an exported folder.")
        return super().from_pretrained(str(folder), **{**kwargs, "local_files_only": True, "use_safetensors": True})

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        frames: Any,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 1.5,
        negative_prompt: str | Sequence[str] = "",
        repeat_oldest: bool = False,
        generator: Generator = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
    ) -> ImagePipelineOutput:
        """One next frame for each clip.

        prompt, negative_prompt: one for all clips, or one each. The latter stands where guidance leaves out the text.
        frames: N or more frames from the oldest to the latest, of which the last N count. PIL pictures of one clip, or
            a list of such lists; uint8 (B, T, 3, H, W); floats in [0, 1] of that shape; or latents, the VAE's mode and
            not scaled, as (B, T, C, h, w) or (B, T C, h, w). H and W must be multiples of 8 (of the VAE's factor).
        repeat_oldest: let copies of the oldest frame stand for missing ones; else fewer than N are refused.
        guidance_scale, image_guidance_scale: any, see `TwoScaleGuidance`.
        generator: of the initial noise and of schedulers that draw, one or one a clip; None: always the same numbers.
        latents: standard normal (B, C, h, w) instead of drawn initial noise. eta: see `denoise`.
        Returns `images`: a list of PIL pictures; np: float32 (B, H, W, 3) in [0, 1]; pt: float32 (B, 3, H, W) in
        [0, 1]; latent: (B, C, h, w), scaled. Raises UserError for arguments that do not fit.
        """
        _check_steps(num_inference_steps)
        window = self._window(frames, repeat_oldest)
        window, prompts = self._matched(window, prompt, output_type)
        guidance = TwoScaleGuidance(guidance_scale, image_guidance_scale)
        made = self._sample(
            window,
            guidance,
            self._embedded(prompts),
            self._embedded(_as_list(negative_prompt, len(prompts), "negative_prompt")),
            num_inference_steps,
            _generators(generator, len(prompts)),
            latents,
            eta,
        )
        return ImagePipelineOutput(
            images=made if output_type == "latent" else _output(self._decoded(made), output_type)
        )

    @torch.no_grad()
    def roll_out(
        self,
        prompt: str | Sequence[str],
        frames: Any,
        num_frames: int,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 1.5,
        negative_prompt: str | Sequence[str] = "",
        repeat_oldest: bool = False,
        generator: Generator = None,
        noise: Noise = "new",
        recycle: Recycle = "pixels",
        eta: float = 0.0,
        output_type: Literal["pil", "np", "pt"] = "pil",
    ) -> Any:
        """The next `num_frames` frames, each made from the N before it; arguments as for a call.

        noise: whether each frame starts from "new" numbers or all from the "same". recycle: see
            `vireo.sampling.roll_out`.
        Returns a list of PIL pictures for each clip; np: float32 (B, K, H, W, 3) in [0, 1]; pt: float32
        (B, K, 3, H, W) in [0, 1].
        """
        if num_frames < 1 or output_type == "latent":
            raise UserError(
                f"a roll-out has at least one frame, as pil, np or pt; got {num_frames} and {output_type!r}"
            )
        _check_steps(num_inference_steps)
        check_choice("noise", noise, Noise)
        check_choice("recycle", recycle, Recycle)
        window = self._window(frames, repeat_oldest)
        window, prompts = self._matched(window, prompt, output_type)
        guidance = TwoScaleGuidance(guidance_scale, image_guidance_scale)
        text = self._embedded(prompts)
        null_text = self._embedded(_as_list(negative_prompt, len(prompts), "negative_prompt"))
        generators = _generators(generator, len(prompts))
        each = generators if isinstance(generators, list) else [generators]
        start = [one.get_state() for one in each]

        def sample(conditions: Tensor, number: int) -> Tensor:
            if noise == "same":
                for one, state in zip(each, start, strict=True):
                    one.set_state(state)
            return self._sample(conditions, guidance, text, null_text, num_inference_steps, generators, None, eta)

        made = roll_out(
            sample,
            lambda latents: to_uint8(self._decoded(latents), low=0.0),
            lambda shown: self._encoded(to_pixels(shown)),
            window,
            num_frames,
            self.vae.config.scaling_factor,
            recycle,
        )
        return _output(to_pixels(made, low=0.0), output_type)

    def _sample(
        self,
        window: Tensor,
        guidance: TwoScaleGuidance,
        text: Tensor,
        null_text: Tensor,
        num_inference_steps: int,
        generator: Any,
        noise: Tensor | None,
        eta: float,
    ) -> Tensor:
        """Scaled latents (B, C, h, w) of the frame after the window."""
        shape = (len(window), *window.shape[2:])
        if noise is None:
            noise = randn_tensor(shape, generator, self._execution_device, self.unet.dtype)
        elif noise.shape != shape:
            raise UserError(f"latents: noise of the shape {shape} is expected, got {tuple(noise.shape)}")
        # Between the steps float32: with zero terminal SNR Euler's latents begin at 4096 times the noise, fp16 ends at
        # 65504 (huggingface/diffusers#6981), and bf16 would round at every step.
        latents = denoise(
            self._predict,
            self.scheduler,
            noise.to(self._execution_device, torch.float32),
            guidance,
            guidance.conditions({"frames": window}, {"text": text}, {"text": null_text}),
            num_inference_steps,
            generator,
            eta=eta,
            progress=self.progress_bar,
        )
        return latents.to(self.unet.dtype)

    def _predict(self, noisy: Tensor, timesteps: Tensor, frames: Tensor, text: Tensor) -> Tensor:
        stacked = torch.cat([noisy.to(self.unet.dtype), frames.flatten(1, 2)], dim=1)
        return self.unet(stacked, timesteps, encoder_hidden_states=text, return_dict=False)[0].float()

    def _window(self, frames: Any, repeat_oldest: bool) -> Tensor:
        """Unscaled latents (B, N, C, h, w) of whatever `frames` may be."""
        length = self.num_condition_frames
        if not isinstance(frames, Tensor):
            frames = _from_pictures(frames)
        channels = self.vae.config.latent_channels
        if frames.ndim == 4 and frames.shape[1] % channels == 0:
            frames = frames.unflatten(1, (-1, channels))
        if frames.ndim != 5 or frames.shape[2] not in (3, channels):
            raise UserError(
                f"frames: pictures, or a tensor (B, T, 3, H, W), or latents (B, T, {channels}, h, w) are expected; "
                f"got a tensor {tuple(frames.shape)}"
            )
        if frames.shape[1] < length and not repeat_oldest:
            raise UserError(
                f"frames: this editor sees {length} frames, got {frames.shape[1]}. Give more, or repeat_oldest=True "
                "to let copies of the oldest stand for those that are missing."
            )
        frames = frames[:, -length:]
        if frames.shape[2] != channels:
            height, width = frames.shape[-2:]
            if height % self.vae_scale_factor or width % self.vae_scale_factor:
                raise UserError(f"frames: {height}x{width} pixels are no multiples of {self.vae_scale_factor}")
            pixels = _in_range(frames)
            frames = self._encoded(pixels.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return padded(frames, length).to(self._execution_device, self.unet.dtype)

    def _matched(self, window: Tensor, prompt: str | Sequence[str], output_type: str) -> tuple[Tensor, list[str]]:
        """As many windows as prompts: one of either serves all of the other."""
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type is one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}")
        if not isinstance(prompt, str) and len(window) == 1:
            window = window.expand(len(prompt), *window.shape[1:])
        return window, _as_list(prompt, len(window), "prompt")

    def _embedded(self, prompts: list[str]) -> Tensor:
        """(B, L, D)."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self._execution_device))[0].to(self.unet.dtype)

    def _encoded(self, pixels: Tensor) -> Tensor:
        """The posterior's mode, not scaled: (M, 3, H, W) in [-1, 1] -> (M, C, h, w)."""
        # Laid out as pictures are, with the colours last, for which convolutions round as in diffusers' pipelines.
        pixels = pixels.to(self._execution_device, self.vae.dtype).clone(memory_format=torch.channels_last)
        chunks = pixels.split(VAE_BATCH)
        return torch.cat([self.vae.encode(chunk).latent_dist.mode() for chunk in chunks]).to(self.unet.dtype)

    def _decoded(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to float32 pixels (B, 3, H, W) in [0, 1]."""
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        return (self.vae.decode(latents, return_dict=False)[0].float() * 0.5 + 0.5).clamp(0, 1)


def _check_steps(num_inference_steps: int) -> None:
    if num_inference_steps < 1:
        raise UserError(f"num_inference_steps is {num_inference_steps}: without a step the frame would be bare noise")


def _from_pictures(frames: Any) -> Tensor:
    """uint8 (B, T, 3, H, W) from PIL pictures of one clip or from a list of clips."""
    if not len(frames) or (isinstance(frames[0], Sequence) and not all(len(clip) for clip in frames)):
        raise UserError(
            "frames: there is no picture in it; PIL pictures of a clip, or a list of such lists, are expected"
        )
    clips = [list(clip) for clip in frames] if isinstance(frames[0], Sequence) else [list(frames)]
    if {type(picture) for clip in clips for picture in clip if not isinstance(picture, Image.Image)}:
        raise UserError("frames: a list holds PIL pictures, or lists of PIL pictures; tensors are given whole")
    if len({(len(clip), picture.size) for clip in clips for picture in clip}) > 1:
        raise UserError("frames: all pictures have one size, and all clips one length")
    stacked = np.stack([[np.asarray(picture.convert("RGB")) for picture in clip] for clip in clips])
    return torch.from_numpy(stacked).permute(0, 1, 4, 2, 3)


def _in_range(frames: Tensor) -> Tensor:
    """uint8, or floats in [0, 1], to floats in [-1, 1]."""
    if frames.dtype == torch.uint8:
        return to_pixels(frames)
    if not frames.is_floating_point() or frames.min() < 0 or frames.max() > 1:
        low, high = float(frames.min()), float(frames.max())
        raise UserError(f"frames: uint8, or floats in [0, 1], are expected; got {frames.dtype} in [{low:g}, {high:g}]")
    return 2 * frames - 1


def _as_list(texts: str | Sequence[str], count: int, name: str) -> list[str]:
    found = [texts] * count if isinstance(texts, str) else list(texts)
    if len(found) != count:
        raise UserError(f"{name}: one text, or one for each of {count} clips, is expected; got {len(found)}")
    return found


def _generators(given: Generator, count: int) -> Any:
    if given is None:
        return [randomness.generator("pipeline", "noise", number) for number in range(count)]
    if isinstance(given, torch.Generator):
        return given
    if len(given) != count:
        raise UserError(f"generator: one, or one for each of {count} clips, is expected; got {len(given)}")
    return list(given)


def _output(pixels: Tensor, output_type: str) -> Any:
    """Pixels (B, …, 3, H, W) in [0, 1] as pt, as np with the colours last, or as (lists of) PIL pictures."""
    if output_type == "pt":
        return pixels
    if output_type == "np":
        return pixels.movedim(-3, -1).cpu().numpy()
    if pixels.ndim == 5:
        return [_output(clip, output_type) for clip in pixels]
    return [Image.fromarray(picture) for picture in to_uint8(pixels, low=0.0).movedim(-3, -1).cpu().numpy()]
