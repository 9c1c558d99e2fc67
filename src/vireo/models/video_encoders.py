"""Frozen encoders of CogVideoX: its causal video VAE and T5, as the pipelines of diffusers use them.

What differs between the released models (https://github.com/THUDM/CogVideo) stands in the configs of their folders, and
is read from there. B batch, T frames, C latent channels, t h w latent grid, L tokens, D width of the text encoder.
"""

import functools
import hashlib
import json
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vireo.errors import UserError
from vireo.models import saved_networks
from vireo.models.encoders import Encoder, check_finite, split
from vireo.models.saved_networks import DTYPES
from vireo.pixels import to_pixels
from vireo.randomness import Draws

CHANNELS = -4  # axis of (..., C, t, h, w)
UNUSED = ("scaling_factor", "shift_factor", "invert_scale_latents")  # of a VAE's config, where moments are concerned
SCALES = ("auto", "scaling", "inverse", "none")


class VideoTextEncoder(Encoder):
    """Clips, captions and, for image-to-video weights, first pictures to latents and embeddings.

    vae, text_encoder, tokenizer: folders as diffusers and transformers save them, or a pipeline's folder; the
        tokenizer's default is the pipeline's of the text encoder. transformer: the folder whose config.json says how
        long texts are (max_text_seq_length), how many latent frames make a token (patch_size_t) and whether a picture
        is a condition (in_channels); its weights are not read.
    posterior: latents are a "sample" of the VAE's posterior, drawn anew at every step, or its "mean".
    image_latent_scale: what latents of pictures are multiplied by. "scaling" is the VAE's scaling_factor, "inverse" one
        over it, "none" 1; "auto" does what diffusers' pipeline does: inverse where the VAE says invert_scale_latents
        (1.5), else scaling. The published trainer always scales, and its models of 1.5 do not fit the pipeline.
    image_noise_mean, image_noise_std: pictures get noise of sigma = exp(normal(mean, std)) before they are encoded;
        pixels are in [-1, 1]. image_noise_per: one sigma for each "sample", or for the whole step ("batch", published).
    image_variants: how many encodings with different noise each picture has in the cache, of which one is drawn at each
        step: then the VAE is not needed in training. None noises and encodes at every step, which is exact.
    tiling: large pictures go through the VAE in overlapping tiles, in a fraction of the memory; changes the numbers a
        little. tile_height, tile_width: pixels, by default the VAE's. slicing: one clip at a time, the same result.
    dtype: what both compute in; latents and embeddings are float32 at the borders.

    Cached outputs (float32): video_moments (B, 2C, t, h, w), mean and log variance; prompt_embeds and
    null_prompt_embeds (B, L, D); with image_variants=K image_moments (B, 1 + K, 2C, 1, h, w), the first without noise.
    Raises UserError for folders that do not suit.
    """

    parts = ("loaded_vae", "loaded_text_encoder")

    def __init__(
        self,
        vae: str,
        text_encoder: str,
        transformer: str,
        tokenizer: str | None = None,
        posterior: Literal["sample", "mean"] = "sample",
        image_latent_scale: Literal["auto", "scaling", "inverse", "none"] = "auto",
        image_noise_mean: float = -3.0,
        image_noise_std: float = 0.5,
        image_noise_per: Literal["sample", "batch"] = "sample",
        image_variants: int | None = None,
        tiling: bool = False,
        tile_height: int | None = None,
        tile_width: int | None = None,
        slicing: bool = True,
        dtype: Literal["fp32", "bf16", "fp16"] = "bf16",
    ) -> None:
        _check_choices(dtype, posterior, image_latent_scale, image_noise_per, image_variants)
        self.posterior, self.image_latent_scale = posterior, image_latent_scale
        self.image_noise_mean, self.image_noise_std = image_noise_mean, image_noise_std
        self.image_noise_per, self.image_variants = image_noise_per, image_variants
        self.tiling, self.tile_height, self.tile_width, self.slicing = tiling, tile_height, tile_width, slicing
        self.dtype = dtype
        self.vae_part = saved_networks.find(vae, "vae", "model.encoder.vae")
        if self.vae_part.config.get("_class_name") != "AutoencoderKLCogVideoX":
            raise UserError(
                f"{self.vae_part.folder} holds a {self.vae_part.config.get('_class_name')}, not the "
                "AutoencoderKLCogVideoX of a CogVideoX. Set model.encoder.vae to another folder."
            )
        self.text_part = saved_networks.find(text_encoder, "text_encoder", "model.encoder.text_encoder")
        self.tokenizer_folder = saved_networks.find_tokenizer(tokenizer or text_encoder)
        folder, self.transformer = saved_networks.find_config(transformer, "transformer", "model.encoder.transformer")
        if self.patch_size_t not in (1, 2):  # two lengths of padding could not be told apart
            raise UserError(f"{folder}: patch_size_t is {self.patch_size_t}, expected null, 1 or 2")
        self.outputs = {"video_moments": "frames", "prompt_embeds": "prompt", "null_prompt_embeds": '""'}
        if self.has_image and image_variants is not None:
            self.outputs["image_moments"] = "image"

    @property
    def patch_size_t(self) -> int:
        """Latent frames that make one token."""
        return self.transformer.get("patch_size_t") or 1

    @property
    def has_image(self) -> bool:
        """Whether the weights are conditioned on a picture: they see its latents beside the noisy ones."""
        return self.transformer.get("in_channels", 16) > self.channels

    @property
    def max_length(self) -> int:
        """Tokens of every text."""
        return self.transformer.get("max_text_seq_length", 226)

    @property
    def channels(self) -> int:
        return self.vae_part.config["latent_channels"]

    @property
    def scaling_factor(self) -> float:
        """What latents of clips are multiplied by for the diffusion model; the default is diffusers' own."""
        return float(self.vae_part.config.get("scaling_factor", 1.15258426))

    @property
    def image_scaling_factor(self) -> float:
        """What latents of pictures are multiplied by, see `image_latent_scale`."""
        rule = self.image_latent_scale
        if rule == "auto":
            rule = "inverse" if self.vae_part.config.get("invert_scale_latents", False) else "scaling"
        return {"scaling": self.scaling_factor, "inverse": 1 / self.scaling_factor, "none": 1.0}[rule]

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of what the diffusion model sees of a clip, padding frames included."""
        t = (num_frames - 1) // self._time_factor + 1
        return self.channels, t + -t % self.patch_size_t, height // self._space_factor, width // self._space_factor

    def identity(self, output: str) -> str:
        """Of JSON, so that `vireo prepare cache=status` can say what differs."""
        if output not in self.outputs:
            return super().identity(output)
        if output in ("prompt_embeds", "null_prompt_embeds"):
            vocabulary = sorted(p for p in self.tokenizer_folder.iterdir() if p.suffix in (".json", ".txt", ".model"))
            return _identity(
                "T5EncoderModel",
                weights=self.text_part.identity(),
                tokenizer=saved_networks.digest("", vocabulary),
                max_length=self.max_length,
                dtype=self.dtype,
            )
        weights = self.vae_part.identity(UNUSED)
        about: dict[str, Any] = {"weights": weights, "dtype": self.dtype, "tiling": self.tiling}
        if self.tiling:
            about["tile"] = [self.tile_height, self.tile_width]
        if output == "image_moments":
            about |= {"variants": self.image_variants, "noise": [self.image_noise_mean, self.image_noise_std]}
        return _identity("AutoencoderKLCogVideoX moments", **about)

    @torch.no_grad()
    def encode(self, output: str, values: Any) -> Tensor:
        """Moments of uint8 clips (B, T, 3, H, W) or pictures (B, 3, H, W), or embeddings (B, L, D) of B texts.

        Raises UserError for shapes that the VAE does not take.
        """
        if output not in self.outputs:
            return super().encode(output, values)
        if output == "video_moments":
            return self._moments(to_pixels(values).transpose(1, 2))
        if output == "image_moments":
            return torch.stack([self._variants(picture) for picture in values])
        tokens = self.tokenizer(
            list(values), padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )
        with torch.autocast(self.device.type, enabled=False):  # without a mask: padding is attended to
            return self.loaded_text_encoder(tokens.input_ids.to(self.device)).last_hidden_state.float()

    def condition(self, batch: dict[str, Any], draws: Draws) -> dict[str, Any]:
        """Adds latents (B, C, t, h, w), drawn, scaled and padded; of image-to-video also image_latents (B, C, 1, h, w).

        A token of 1.5 is two latent frames: where their number is odd, a copy of the first one is put before it, as
        the pipelines do; padding_frames, int64 (B,), says how many. A batch without clips gets neither.
        Draws: "posterior"; "image_sigma", "image_noise" and "image_posterior", or "image_variant" in their place.
        Raises UserError for image-to-video weights and data without pictures.
        """
        made = {}
        if "video_moments" in batch:
            latents = self._drawn(batch["video_moments"], draws, "posterior") * self.scaling_factor
            padding = -latents.shape[2] % self.patch_size_t
            made["latents"] = torch.cat([latents[:, :, :1].expand(-1, -1, padding, -1, -1), latents], dim=2)
            made["padding_frames"] = torch.full((len(latents),), padding, device=latents.device)
        if self.has_image:
            made["image_latents"] = self._image_latents(self._noised_moments(batch, draws), draws)
        return {**batch, **made}

    def check_network(self, network: nn.Module, batch: dict[str, Any]) -> None:
        """Raises UserError for encodings that are not finite, once: see `ImageTextEncoder.check_network`."""
        for output in (*self.outputs, "image_latents"):
            if output in batch:
                check_finite(batch[output], f"The {output}", self.dtype)

    @torch.no_grad()
    def clean_image_latents(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        """As image_latents, of pictures without noise: what a pipeline is conditioned on. Draws: "image_posterior"."""
        moments = batch.get("image_moments")
        if moments is None:
            return self._image_latents(self._moments(to_pixels(_picture(batch))[:, :, None]), draws)
        return self._image_latents(moments[:, 0], draws)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clips, float32 (B, T, 3, H, W) in [0, 1], of latents (B, C, t, h, w), whose padding frames are dropped.

        T is 8 N + 1, so without padding t is odd.
        """
        padding = (latents.shape[2] - 1) % self.patch_size_t
        raw = (latents[:, :, padding:].float() / self.scaling_factor).to(DTYPES[self.dtype])
        with torch.autocast(self.device.type, enabled=False):
            pixels = self.loaded_vae.decode(raw).sample.float()
        return (pixels.transpose(1, 2) / 2 + 0.5).clamp(0, 1)

    def weight_bytes(self) -> dict[str, int]:
        """Of the frozen networks, once they are loaded."""
        size = DTYPES[self.dtype].itemsize
        parts = {"VAE": self.vae_part, "text encoder": self.text_part}
        return {name: saved_networks.count(part.weights) * size for name, part in parts.items()}

    @functools.cached_property
    def loaded_vae(self) -> Any:
        from diffusers import AutoencoderKLCogVideoX

        vae = saved_networks.load(self.vae_part, AutoencoderKLCogVideoX, DTYPES[self.dtype])
        if self.tiling:
            vae.enable_tiling(self.tile_height, self.tile_width)
        if self.slicing:
            vae.enable_slicing()
        return vae.to(self.device).requires_grad_(False)

    @functools.cached_property
    def loaded_text_encoder(self) -> Any:
        from transformers import T5EncoderModel

        text_encoder = saved_networks.load(self.text_part, T5EncoderModel, DTYPES[self.dtype])
        return text_encoder.to(self.device).requires_grad_(False)

    @functools.cached_property
    def tokenizer(self) -> Any:
        from transformers import T5Tokenizer

        return T5Tokenizer.from_pretrained(self.tokenizer_folder, local_files_only=True)

    @property
    def _space_factor(self) -> int:
        return 2 ** (len(self.vae_part.config["block_out_channels"]) - 1)

    @property
    def _time_factor(self) -> int:
        return int(self.vae_part.config.get("temporal_compression_ratio", 4))

    def _moments(self, pixels: Tensor) -> Tensor:
        """float32 (B, 2C, t, h, w) of pixels (B, 3, T, H, W) in [-1, 1], or beyond where there is noise on them."""
        _, _, num_frames, height, width = pixels.shape
        if height % self._space_factor or width % self._space_factor or num_frames % self._time_factor != 1:
            raise UserError(
                f"Clips of {num_frames}x{height}x{width} cannot be encoded: the VAE takes multiples of "
                f"{self._space_factor} pixels, and one frame more than a multiple of {self._time_factor}."
            )
        with torch.autocast(self.device.type, enabled=False):
            posterior = self.loaded_vae.encode(pixels.to(DTYPES[self.dtype])).latent_dist
        return posterior.parameters.float()

    def _drawn(self, moments: Tensor, draws: Draws, purpose: str) -> Tensor:
        mean, std = split(moments, CHANNELS)
        return mean if self.posterior == "mean" else mean + std * draws.normal(purpose, *mean.shape[1:])

    def _image_latents(self, moments: Tensor, draws: Draws) -> Tensor:
        return self._drawn(moments, draws, "image_posterior") * self.image_scaling_factor

    def _noised_moments(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        """(B, 2C, 1, h, w) of each picture with noise: made now, or one of the variants that were made before."""
        if "image_moments" in batch:
            variants = batch["image_moments"]
            chosen = draws.integers("image_variant", 1, variants.shape[1])
            return variants[torch.arange(len(variants), device=variants.device), chosen]
        pixels = to_pixels(_picture(batch))
        if self.image_noise_per == "batch":
            log_sigma = pixels.new_tensor(draws.once_normal("image_sigma"))
        else:
            log_sigma = draws.normal("image_sigma").view(-1, 1, 1, 1)
        sigma = torch.exp(self.image_noise_mean + self.image_noise_std * log_sigma)
        return self._moments((pixels + sigma * draws.normal("image_noise", *pixels.shape[1:]))[:, :, None])

    def _variants(self, picture: Tensor) -> Tensor:
        """(1 + K, 2C, 1, h, w) of one picture, uint8 (3, H, W). Its noise follows from its pixels alone."""
        assert self.image_variants is not None
        content = hashlib.blake2b(picture.cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()
        draws = Draws(("image variants", content), range(self.image_variants), self.device)
        pixels = to_pixels(picture)
        log_sigma = self.image_noise_mean + self.image_noise_std * draws.normal("image_sigma").view(-1, 1, 1, 1)
        noised = pixels + torch.exp(log_sigma) * draws.normal("image_noise", *pixels.shape)
        return self._moments(torch.cat([pixels[None], noised])[:, :, None])


def _picture(batch: dict[str, Any]) -> Tensor:
    if "image" not in batch:
        raise UserError(
            "these weights make videos of a picture and a text, and there is no picture: take "
            "data=captioned_clips_image, or image=<file> for vireo sample, or weights of text-to-video"
        )
    return batch["image"]


def _identity(name: str, **about: Any) -> str:
    return json.dumps({"network": name, **about}, sort_keys=True)


def _check_choices(dtype: str, posterior: str, scale: str, noise_per: str, variants: int | None) -> None:
    choices = {
        "dtype": (dtype, tuple(DTYPES)),
        "posterior": (posterior, ("sample", "mean")),
        "image_latent_scale": (scale, SCALES),
        "image_noise_per": (noise_per, ("sample", "batch")),
    }
    problems = [
        f"model.encoder.{name} is {value!r}, expected one of {', '.join(known)}"
        for name, (value, known) in choices.items()
        if value not in known
    ]
    if variants is not None and variants < 1:
        problems.append(f"model.encoder.image_variants is {variants}, expected at least 1, or null")
    if problems:
        raise UserError("; ".join(problems))
