"""Frozen encoders of image diffusion models: a VAE for pictures, CLIP for text, as Stable Diffusion 1.5 has them.

Latents exist on two scales. What the network denoises is `scaling_factor` times the VAE's latents, drawn from its
posterior. Pictures that are a condition of InstructPix2Pix are the posterior's mean and are *not* scaled, in training
as in every pipeline (https://github.com/timothybrooks/instruct-pix2pix); scaling them breaks all pretrained weights.
"""

import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vireo.errors import UserError
from vireo.models import saved_networks
from vireo.models.encoders import Encoder, check_finite, split
from vireo.models.saved_networks import DTYPES
from vireo.pixels import to_pixels
from vireo.randomness import Draws

MOMENTS = ("frame_moments", "target_moments")


class ImageTextEncoder(Encoder):
    """Frames and target to latents, the prompt and the empty prompt to embeddings or, where text learns, to token ids.

    vae, text_encoder, tokenizer: folders as diffusers and transformers save them, or a pipeline's folder with these
        names in it. The tokenizer's default is in the pipeline's folder of the text encoder.
    text_encoder: None where it learns inside the network; then the batch gets prompt_ids instead of prompt_embeds.
    vae_batch: pictures that the VAE sees at a time; less takes less memory, with the same result.
    dtype: what both compute in; latents and embeddings are float32 at the borders. fp16 overflows in some VAEs,
        SDXL's for one, which is told before the first step; bf16 does not.

    Cached outputs (float32): frame_moments (B, N, 2C, h, w) of frames, target_moments (B, 2C, h, w) of target (mean and
    log variance on the channel axis, as diffusers' posterior has them), prompt_embeds and null_prompt_embeds (B, L, D).
    Networks are loaded when they are first needed. Raises UserError for folders that do not suit.
    """

    parts: tuple[str, ...] = ("loaded_vae", "loaded_text_encoder")

    def __init__(
        self,
        vae: str,
        text_encoder: str | None,
        tokenizer: str | None = None,
        vae_batch: int = 16,
        dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> None:
        if dtype not in DTYPES or vae_batch < 1:
            raise UserError(
                f"model.encoder.dtype is one of {', '.join(DTYPES)}, vae_batch at least 1; got {dtype} and {vae_batch}."
            )
        if tokenizer is None and text_encoder is None:
            raise UserError("model.encoder.tokenizer must name a folder, since text_encoder is null.")
        self.dtype, self.vae_batch = dtype, vae_batch
        self.vae_part = saved_networks.find(vae, "vae", "model.encoder.vae")
        if self.vae_part.config.get("_class_name") != "AutoencoderKL":
            raise UserError(
                f"{self.vae_part.folder} holds a {self.vae_part.config.get('_class_name')}, not the AutoencoderKL of "
                "an image model. Set model.encoder.vae to another folder."
            )
        self.outputs = {"frame_moments": "frames", "target_moments": "target"}
        self.text_part = None
        if text_encoder is not None:
            self.text_part = saved_networks.find(text_encoder, "text_encoder", "model.encoder.text_encoder")
            self.outputs |= {"prompt_embeds": "prompt", "null_prompt_embeds": '""'}
        self.tokenizer_folder = saved_networks.find_tokenizer(tokenizer or str(text_encoder))

    @property
    def scaling_factor(self) -> float:
        """What the VAE's latents are multiplied by for the diffusion model; AutoencoderKL's default is SD 1.5's."""
        return float(self.vae_part.config.get("scaling_factor", 0.18215))

    def identity(self, output: str) -> str:
        """The same for frames and targets, so that a picture is encoded once, whatever it serves as."""
        if output in MOMENTS:
            return f"AutoencoderKL moments {self.vae_part.identity()} {self.dtype}"
        if output in self.outputs and self.text_part is not None:
            vocabulary = sorted(p for p in self.tokenizer_folder.iterdir() if p.suffix in (".json", ".txt"))
            return f"CLIPTextModel {self.text_part.identity()} {saved_networks.digest('', vocabulary)} {self.dtype}"
        return super().identity(output)

    @torch.no_grad()
    def encode(self, output: str, values: Any) -> Tensor:
        """Moments of uint8 pictures (..., 3, H, W), or embeddings (B, L, D) of B texts; see the class.

        Raises UserError for sides that are no multiples of the VAE's factor.
        """
        if output in MOMENTS:
            return self._moments(values)
        if output not in self.outputs:
            return super().encode(output, values)
        with torch.autocast(self.device.type, enabled=False):
            return self.loaded_text_encoder(self.tokenize(values)).last_hidden_state.float()

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token numbers, int64 (B, L) on the device: padded to the tokenizer's length, and cut there."""
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        return tokens.input_ids.to(self.device)

    def condition(self, batch: dict[str, Any], draws: Draws) -> dict[str, Any]:
        """Adds condition_latents (B, N, C, h, w), means as they are, and latents (B, C, h, w), drawn and scaled.

        Draws: "posterior". Where text learns, also prompt_ids and null_prompt_ids, int64 (B, L).
        """
        latents = self.drawn(batch["target_moments"], draws, "posterior")
        made = {"latents": latents, "condition_latents": split(batch["frame_moments"])[0]}
        if self.text_part is None:
            ids, null = self.tokenize(batch["prompt"]), self.tokenize([""])
            made |= {"prompt_ids": ids, "null_prompt_ids": null.expand(ids.shape)}
        return {**batch, **made}

    def drawn(self, moments: Tensor, draws: Draws, purpose: str) -> Tensor:
        """Scaled latents (B, ..., C, h, w), drawn from the posteriors with these moments (B, ..., 2C, h, w)."""
        mean, std = split(moments)
        return (mean + std * draws.normal(purpose, *mean.shape[1:])) * self.scaling_factor

    def check_network(self, network: nn.Module, batch: dict[str, Any]) -> None:
        """Raises UserError for encodings that are not finite, since these would poison every step.

        Once, before the first step: at every step the question would make the host wait for all that a GPU has queued.
        What overflows for single pictures alone is found by the filling of the cache, which names the file; without a
        cache the loop turns the step away and names its samples.
        """
        for output in self.outputs:
            check_finite(batch[output], f"The {output}", self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, float32 (B, 3, H, W) in [0, 1], of diffusion latents (B, C, h, w)."""
        raw = (latents.float() / self.scaling_factor).to(DTYPES[self.dtype])
        with torch.autocast(self.device.type, enabled=False):
            pixels = [self.loaded_vae.decode(some).sample.float() for some in raw.split(self.vae_batch)]
        return (torch.cat(pixels) / 2 + 0.5).clamp(0, 1)

    def weight_bytes(self) -> dict[str, int]:
        """Of the frozen networks, once they are loaded."""
        size = DTYPES[self.dtype].itemsize
        parts = {"VAE": self.vae_part, **({"text encoder": self.text_part} if self.text_part else {})}
        return {name: saved_networks.count(part.weights) * size for name, part in parts.items()}

    @functools.cached_property
    def loaded_vae(self) -> Any:
        from diffusers import AutoencoderKL

        vae = saved_networks.load(self.vae_part, AutoencoderKL, DTYPES[self.dtype])
        return vae.to(self.device).requires_grad_(False)

    @functools.cached_property
    def loaded_text_encoder(self) -> Any:
        from transformers import CLIPTextModel

        assert self.text_part is not None
        text_encoder = saved_networks.load(self.text_part, CLIPTextModel, DTYPES[self.dtype])
        return text_encoder.to(self.device).requires_grad_(False)

    @functools.cached_property
    def tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self.tokenizer_folder, local_files_only=True)

    @property
    def factor(self) -> int:
        """How many pixels a latent is high and wide."""
        return 2 ** (len(self.vae_part.config["block_out_channels"]) - 1)

    def _moments(self, frames: Tensor) -> Tensor:
        factor = self.factor
        height, width = frames.shape[-2:]
        if height % factor or width % factor:
            raise UserError(
                f"Frames of {height}x{width} cannot be encoded: the VAE takes multiples of {factor} pixels."
            )
        pictures = frames.flatten(0, -4)  # (M, 3, H, W)
        with torch.autocast(self.device.type, enabled=False):
            moments = torch.cat(
                [
                    self.loaded_vae.encode(to_pixels(some).to(DTYPES[self.dtype])).latent_dist.parameters.float()
                    for some in pictures.split(self.vae_batch)
                ]
            )
        return moments.unflatten(0, frames.shape[:-3])
