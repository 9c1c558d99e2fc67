"""Frozen encoders of Wan with references: its video VAE, UMT5 for text, and CLIP's vision tower for the references.

As the pipelines of diffusers use them (Wan 2.1, https://github.com/Wan-Video/Wan2.1; the vision tower is that of its
image-to-video models, and lies in https://huggingface.co/Skywork/SkyReels-A2 too). B batch, T frames, R references,
t h w latent grid, N tokens of a reference, L those of a text, D width of the text encoder.
"""

import functools
import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vireo.errors import UserError
from vireo.models import saved_networks
from vireo.models.encoders import Encoder, check_finite
from vireo.models.saved_networks import DTYPES
from vireo.pixels import to_pixels
from vireo.randomness import Draws

VIDEO, REFERENCES, CLIP = "video_latents", "reference_latents_raw", "clip_embeds"
EMBEDS = "prompt_embeds", "null_prompt_embeds"
PROCESSOR = "preprocessor_config.json"


class ReferenceEncoder(Encoder):
    """Clips, pictures of subjects and captions to latents, image tokens and embeddings.

    vae, text_encoder, tokenizer, image_encoder: folders as diffusers and transformers save them, or a pipeline's; the
        tokenizer's default is the pipeline's of the text encoder.
    image_processor: folder of the vision tower's preprocessor_config.json, by default the image_processor/ beside it.
    text_dtype: what UMT5 computes in and its output is cached in; VAE and vision tower are float32 always.
    max_sequence_length: tokens of every text, L; those behind its end are zeros, which the network sees, so it is what
        the weights were trained with: Wan's are 512.
    vae_batch: clips, or references, that the VAE sees at a time; more takes more memory, with the same result.

    Cached outputs, float32 but for texts: video_latents (B, 16, t, h, w) and reference_latents_raw (B, R, 16, h, w),
    the mean of the VAE's posterior, less latents_mean and divided by latents_std of its config, which is the scale that
    the network sees; clip_embeds (B, R, N, width), the last hidden states but one; (null_)prompt_embeds (B, L, D).
    Networks are loaded when they are first needed. Raises UserError for folders that do not suit.
    """

    parts = ("loaded_vae", "loaded_text_encoder", "loaded_image_encoder")

    def __init__(
        self,
        vae: str,
        text_encoder: str,
        image_encoder: str,
        image_processor: str | None = None,
        tokenizer: str | None = None,
        text_dtype: Literal["fp32", "bf16", "fp16"] = "bf16",
        max_sequence_length: int = 512,
        vae_batch: int = 1,
    ) -> None:
        if text_dtype not in DTYPES or min(max_sequence_length, vae_batch) < 1:
            raise UserError(
                f"model.encoder.text_dtype is one of {', '.join(DTYPES)}, max_sequence_length and vae_batch are at "
                f"least 1; got {text_dtype}, {max_sequence_length} and {vae_batch}."
            )
        self.text_dtype, self.max_sequence_length, self.vae_batch = text_dtype, max_sequence_length, vae_batch
        self.outputs = {VIDEO: "frames", REFERENCES: "references", CLIP: "clip_references"}
        self.outputs |= dict(zip(EMBEDS, ("prompt", '""'), strict=True))
        self.vae_part = saved_networks.find(vae, "vae", "model.encoder.vae")
        if self.vae_part.config.get("_class_name") != "AutoencoderKLWan":
            raise UserError(
                f"{self.vae_part.folder} holds a {self.vae_part.config.get('_class_name')}, not the AutoencoderKLWan "
                "of a Wan. Set model.encoder.vae to another folder."
            )
        self.text_part = saved_networks.find(text_encoder, "text_encoder", "model.encoder.text_encoder")
        self.image_part = saved_networks.find(image_encoder, "image_encoder", "model.encoder.image_encoder")
        self.tokenizer_folder = saved_networks.find_tokenizer(tokenizer or text_encoder)
        self.processor = _processor(image_processor, self.image_part.folder)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of a clip."""
        time, space = self._factors
        return self.vae_part.config["z_dim"], (num_frames - 1) // time + 1, height // space, width // space

    def identity(self, output: str) -> str:
        """Of JSON, so that `vireo prepare cache=status` can say what differs."""
        if output in (VIDEO, REFERENCES):
            return _identity("AutoencoderKLWan", weights=self.vae_part.identity())
        if output == CLIP:
            return _identity("CLIPVisionModel", weights=self.image_part.identity(), processor=self.processor)
        if output in self.outputs:
            vocabulary = sorted(p for p in self.tokenizer_folder.iterdir() if p.suffix in (".json", ".model"))
            tokenizer = saved_networks.digest("", vocabulary)
            about = {"weights": self.text_part.identity(), "dtype": self.text_dtype, "length": self.max_sequence_length}
            return _identity("UMT5EncoderModel", tokenizer=tokenizer, **about)
        return super().identity(output)

    @torch.no_grad()
    def encode(self, output: str, values: Any) -> Tensor:
        """One output of uint8 clips (B, T, 3, H, W), of uint8 pictures (..., 3, H, W) or of B texts; see the class.

        Raises UserError for shapes that the VAE does not take and for results that are not finite.
        """
        if output not in self.outputs:
            return super().encode(output, values)
        with torch.autocast(self.device.type, enabled=False):
            if output == VIDEO:
                return self._latents(values)
            if output == REFERENCES:
                return _each(lambda pictures: self._latents(pictures[:, None])[:, :, 0], values)
            if output == CLIP:
                return _each(self._image_tokens, values)
            return self._embeds(values)

    def condition(self, batch: dict[str, Any], draws: Draws) -> dict[str, Any]:
        """Adds latents (B, 16, t, h, w), reference_latents (B, 16, R, h, w) and reference_clip (B, R, N, width), as far
        as the batch has what they are made from; (null_)prompt_embeds become float32."""
        made = {name: batch[name].float() for name in EMBEDS if name in batch}
        if VIDEO in batch:
            made["latents"] = batch[VIDEO]
        if REFERENCES in batch:
            made["reference_latents"] = batch[REFERENCES].transpose(1, 2)
        if CLIP in batch:
            made["reference_clip"] = batch[CLIP]
        return {**batch, **made}

    def check_network(self, network: nn.Module, batch: dict[str, Any]) -> None:
        """Refuse a network that expects image tokens of another width. Raises UserError."""
        if "reference_clip" not in batch:
            return
        found = batch["reference_clip"].shape[-1]
        first = (p.shape for name, p in network.named_parameters() if name.endswith("clip_proj.proj.0.weight"))
        (expected,) = next(first, (found,))
        if expected not in (0, found):  # 0: in another process's part
            raise UserError(
                f"{self.image_part.folder} gives tokens of width {found}, model.network.clip_dim is {expected}: set it "
                f"to {found}, or model.encoder.image_encoder to another folder."
            )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clips, float32 (B, T, 3, H, W) in [0, 1], of latents (B, 16, t, h, w); T is 4 (t - 1) + 1."""
        mean, std = self._statistics(latents)
        raw = latents.float() * std + mean
        with torch.autocast(self.device.type, enabled=False):
            pixels = torch.cat([self.loaded_vae.decode(some).sample for some in raw.split(self.vae_batch)])
        return (pixels.transpose(1, 2) / 2 + 0.5).clamp(0, 1)

    def weight_bytes(self) -> dict[str, int]:
        """Of the frozen networks, once they are loaded."""
        count, text = saved_networks.count, DTYPES[self.text_dtype].itemsize
        return {
            "VAE": 4 * count(self.vae_part.weights),
            "text encoder": text * count(self.text_part.weights),
            "image encoder": 4 * count(self.image_part.weights),
        }

    @functools.cached_property
    def loaded_vae(self) -> Any:
        from diffusers import AutoencoderKLWan

        return self._loaded(self.vae_part, AutoencoderKLWan, "fp32")

    @functools.cached_property
    def loaded_text_encoder(self) -> Any:
        from transformers import UMT5EncoderModel

        return self._loaded(self.text_part, UMT5EncoderModel, self.text_dtype)

    @functools.cached_property
    def loaded_image_encoder(self) -> Any:
        from transformers import CLIPVisionModel

        return self._loaded(self.image_part, CLIPVisionModel, "fp32")

    @functools.cached_property
    def tokenizer(self) -> Any:
        from transformers import T5Tokenizer

        return T5Tokenizer.from_pretrained(self.tokenizer_folder, local_files_only=True)

    def _loaded(self, part: saved_networks.Part, kind: Any, dtype: str) -> Any:
        return saved_networks.load(part, kind, DTYPES[dtype]).to(self.device).requires_grad_(False)

    @property
    def _factors(self) -> tuple[int, int]:
        """Frames and pixels of a side that one latent stands for."""
        config = self.vae_part.config
        return 2 ** sum(config["temperal_downsample"]), 2 ** (len(config["dim_mult"]) - 1) * (config["patch_size"] or 1)

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (C, 1, 1, 1), where the latents are."""
        mean, std = (
            torch.tensor(self.vae_part.config[name], device=latents.device).view(-1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return mean, std

    def _latents(self, frames: Tensor) -> Tensor:
        """float32 (B, C, t, h, w) of uint8 clips (B, T, 3, H, W)."""
        _, num_frames, _, height, width = frames.shape
        time, space = self._factors
        if height % space or width % space or num_frames % time != 1:
            raise UserError(
                f"Clips of {num_frames}x{height}x{width} cannot be encoded: the VAE takes multiples of {space} pixels, "
                f"and one frame more than a multiple of {time}."
            )
        encoded = [
            self.loaded_vae.encode(to_pixels(some).transpose(1, 2)).latent_dist.mode()
            for some in frames.split(self.vae_batch)
        ]
        mean, std = self._statistics(encoded[0])
        latents = (torch.cat(encoded) - mean) / std
        check_finite(latents, "The VAE's latents", "fp32")
        return latents

    def _image_tokens(self, pictures: Tensor) -> Tensor:
        """float32 (M, N, width) of uint8 pictures (M, 3, H, W), as transformers' CLIPImageProcessor prepares them."""
        resized = _resized(pictures, self.processor["shortest_edge"])
        height, width = self.processor["crop"]
        top, left = (resized.shape[-2] - height) // 2, (resized.shape[-1] - width) // 2
        pixels = to_pixels(resized[..., top : top + height, left : left + width], low=0.0)
        mean, std = (pixels.new_tensor(self.processor[name]).view(-1, 1, 1) for name in ("mean", "std"))
        answer = self.loaded_image_encoder((pixels - mean) / std, output_hidden_states=True)
        tokens = answer.hidden_states[-2]
        check_finite(tokens, "The image encoder's tokens", "fp32")
        return tokens

    def _embeds(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            [clean(text) for text in texts],
            padding="max_length",
            max_length=self.max_sequence_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        embeds = self.loaded_text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        check_finite(embeds, "The text encoder's embeddings", self.text_dtype)
        return embeds * tokens.attention_mask[..., None].to(embeds.dtype)


def clean(text: str) -> str:
    """A caption as Wan was trained on them: entities of HTML resolved, white space single."""
    return " ".join(html.unescape(html.unescape(text)).split())


def _each(encode: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
    """Of pictures (..., 3, H, W), however many axes are before them."""
    return encode(pictures.flatten(0, -4)).unflatten(0, pictures.shape[:-3])


def _resized(pictures: Tensor, shortest_edge: int) -> Tensor:
    """uint8 (M, 3, h, w), bicubic and rounded to grey levels, which Pillow does as well."""
    height, width = pictures.shape[-2:]
    scale = shortest_edge / min(height, width)
    size = (max(shortest_edge, int(height * scale)), max(shortest_edge, int(width * scale)))
    return interpolate(pictures.float(), size, mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)


def _processor(path: str | None, image_encoder: Path) -> dict[str, Any]:
    """What a CLIPImageProcessor does, from its preprocessor_config.json."""
    places = [image_encoder.parent / "image_processor", image_encoder, image_encoder.parent / "feature_extractor"]
    if path is not None:
        places = [Path(path).expanduser() / "image_processor", Path(path).expanduser()]
    file = next((place / PROCESSOR for place in places if (place / PROCESSOR).is_file()), None)
    if file is None:
        raise UserError(
            f"There is no {PROCESSOR} in {', '.join(map(str, places))}. Set model.encoder.image_processor to its "
            "folder."
        )
    config = json.loads(file.read_text(encoding="utf-8"))
    size, crop = config["size"], config["crop_size"]
    return {
        "shortest_edge": size if isinstance(size, int) else size["shortest_edge"],
        "crop": [crop, crop] if isinstance(crop, int) else [crop["height"], crop["width"]],
        "mean": config["image_mean"],
        "std": config["image_std"],
    }


def _identity(name: str, **about: Any) -> str:
    return json.dumps({"network": name, **about}, sort_keys=True)
