"""InstructPix2Pix for video: the UNet of Stable Diffusion 1.5 with N frames stacked before its first convolution.

It denoises the frame that follows N given ones, told by an instruction. Channels: the noisy latent, then frame 0 (the
oldest) to frame N - 1, four each, so 84 for N = 20; N = 1 is InstructPix2Pix itself (Brooks et al. 2023,
https://arxiv.org/abs/2211.09800).

B batch, N frames, h w latent grid, L tokens, D width of the text encoder.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vireo.diffusion.noise_schedule import NoiseSchedule
from vireo.errors import UserError
from vireo.models import saved_networks
from vireo.models.network import Network
from vireo.models.transformer_blocks import compile_each

log = logging.getLogger(__name__)

LATENT = 4  # channels of one latent
PIPELINE = "VideoInstructPix2PixPipeline"  # of vireo.sampling.video_ip2p_pipeline
CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}


class VideoEditor(Network):
    """Predicts, from a noisy latent, N condition latents and a text, what the noise schedule says.

    num_condition_frames: N.
    unet: a pipeline's folder or its `unet/`, of a text-to-image model (4 channels), of InstructPix2Pix (8) or of this
        network (4 + 4 M, M <= N): see `widen`.
    noise_schedule: what the weights are trained on; the exported pipeline's scheduler says it.
    text_encoder: a folder, or a pipeline's, if it learns too; then `forward` takes prompt_ids. None: it is frozen and
        elsewhere, and `forward` takes prompt_embeds.
    pipeline: the folder whose VAE, text encoder, tokenizer and scheduler an export takes over; by default the one that
        the UNet lies in.
    gradient_checkpointing: compute what learns twice in exchange for most of its activations' memory.
    compile: whether torch.compile makes kernels for the UNet, at its first call and for each shape.
    channels_last: whether activations lie in memory with their channels last, as GPUs' convolutions like them in half
        precision. Weights lie as ever, so files and shards are the same.

    All weights are float32; lower precision is autocast's affair. Raises UserError for folders that do not suit.
    """

    def __init__(
        self,
        num_condition_frames: int,
        unet: str,
        noise_schedule: NoiseSchedule,
        text_encoder: str | None = None,
        pipeline: str | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.num_condition_frames, self.noise_schedule = num_condition_frames, noise_schedule
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        folder = _find_unet(unet)
        self.pipeline = _Pipeline(Path(pipeline).expanduser() if pipeline else folder.parent)
        self.pipeline.compare(noise_schedule)
        self.unet = _load_unet(folder)
        widen(self.unet, num_condition_frames, str(folder))
        self.text_encoder = _load_text_encoder(text_encoder) if text_encoder else None
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            if self.text_encoder is not None:
                self.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
        if compile:
            compile_each([self.unet])
        self.train()

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        condition_latents: Tensor,
        prompt_embeds: Tensor | None = None,
        prompt_ids: Tensor | None = None,
    ) -> Tensor:
        """The prediction, (B, 4, h, w).

        noisy: (B, 4, h, w). timesteps: int64 (B,). condition_latents: (B, N, 4, h, w), unscaled, the oldest first.
        prompt_embeds: (B, L, D), or, with a text encoder that learns, prompt_ids: int64 (B, L).
        """
        if condition_latents.shape[1] != self.num_condition_frames:
            raise UserError(
                f"The network is made for {self.num_condition_frames} condition frames and was given "
                f"{condition_latents.shape[1]}: model.network.num_condition_frames and the data must agree."
            )
        if self.text_encoder is not None:
            prompt_embeds = self.text_encoder(prompt_ids).last_hidden_state
        stacked = torch.cat([noisy, condition_latents.flatten(1, 2).to(noisy.dtype)], dim=1)  # (B, 4 + 4 N, h, w)
        stacked = stacked.contiguous(memory_format=self.memory_format)
        return self.unet(stacked, timesteps, encoder_hidden_states=prompt_embeds).sample

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> list[Path]:
        """A complete pipeline folder: `from_pretrained` of `vireo.sampling.video_ip2p_pipeline`'s class reads it.

        What was not trained is taken over from `pipeline`, as hard links where the file system has them, else copies.
        """
        for part in self._write(folder, state):
            self.pipeline.copy(part, folder)
        return [folder]

    def try_export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """As `export`, without linking: a link would tell whoever watches the frozen weights that they have changed."""
        for part in self._write(folder, state):
            self.pipeline.files(part)

    def _write(self, folder: Path, state: Mapping[str, Tensor]) -> list[str]:
        """What an export makes itself; returns the parts that it takes over."""
        state = self.whole(state)
        saved_networks.save(self.unet, saved_networks.below("unet.", state), folder / "unet")
        parts = ["vae", "tokenizer"]
        if self.text_encoder is None:
            parts.append("text_encoder")
        else:
            text_encoder = saved_networks.below("text_encoder.", state)
            self.text_encoder.save_pretrained(folder / "text_encoder", state_dict=text_encoder)
        scheduler = self.pipeline.scheduler(self.noise_schedule)
        scheduler.save_pretrained(folder / "scheduler")
        classes = {**CLASSES, "scheduler": ("diffusers", type(scheduler).__name__)}
        index = {"_class_name": PIPELINE, "num_frames": self.num_condition_frames}
        index |= {name: list(where) for name, where in sorted(classes.items())}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return parts

    def load(self, path: Path) -> None:
        """Take in a pipeline's folder or its `unet/`, as `unet` of the class does; a learning text encoder as well."""
        part = saved_networks.find(path, "unet", "init_from")
        state = saved_networks.tensors(part)
        weight = state.get("conv_in.weight")
        if weight is not None:
            state["conv_in.weight"] = widened(weight, self.num_condition_frames, str(part.folder))
        saved_networks.load_strictly(self.unet, state, part.folder)
        if self.text_encoder is not None:
            folder = part.folder.parent / "text_encoder"
            text_encoder = _load_text_encoder(str(folder), "init_from")
            saved_networks.load_strictly(self.text_encoder, text_encoder.state_dict(), folder)


# ---------------------------------------------------------------------------------------------------------------------
# The first convolution


def widened(weight: Tensor, num_condition_frames: int, source: str = "the UNet") -> Tensor:
    """The kernel of a first convolution that sees N frames, (out, 4 + 4 N, k, k), from one for M <= N of them.

    weight: (out, 4 + 4 M, k, k). The channels of the noisy latent stay, and those of the M frames become those of the
    latest M; the older frames' are zero, so a network with this kernel gives what it gave before, whatever they show.
    Their gradient is not zero. Raises UserError for another number of channels or more frames than N.
    """
    channels, wanted = weight.shape[1], LATENT * (1 + num_condition_frames)
    if channels % LATENT or channels < LATENT:
        raise UserError(
            f"{source} has {channels} input channels. They must be 4 (text to image), 8 (InstructPix2Pix) or 4 + 4 for "
            "each condition frame; inpainting models (9) and the like have another meaning."
        )
    if channels > wanted:
        raise UserError(
            f"{source} has {channels} input channels, for {channels // LATENT - 1} condition frames, more than "
            f"num_condition_frames={num_condition_frames}. Frames cannot be taken away: set it to at least that."
        )
    zeros = weight.new_zeros(weight.shape[0], wanted - channels, *weight.shape[2:])
    return torch.cat([weight[:, :LATENT], zeros, weight[:, LATENT:]], dim=1)


def widen(unet: Any, num_condition_frames: int, source: str = "the UNet") -> None:
    """Give a diffusers UNet a first convolution for N condition frames, in place; bias and config included.

    See `widened`. The config, which `from_pretrained` reads, gets in_channels.
    """
    old = unet.conv_in
    weight = widened(old.weight.detach(), num_condition_frames, source)
    if weight.shape != old.weight.shape:
        kept = old.in_channels // LATENT - 1
        says = (
            "conv_in of %s: %d -> %d channels; of %d condition frames the last %d keep their weights, the rest is zero"
        )
        log.info(says, source, old.in_channels, weight.shape[1], num_condition_frames, kept)
        wider = nn.Conv2d(weight.shape[1], old.out_channels, old.kernel_size, padding=old.padding, device="meta")
        unet.conv_in = wider.to_empty(device=weight.device).to(weight.dtype)
        unet.conv_in.load_state_dict({"weight": weight, "bias": old.bias.detach()})
    # An attribute of the config would not be saved: the folder would say 8 and hold 84.
    unet.register_to_config(in_channels=weight.shape[1])


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def _find_unet(path: str) -> Path:
    folder, config = saved_networks.find_config(path, "unet", "model.network.unet")
    if config.get("_class_name") != "UNet2DConditionModel":
        raise UserError(
            f"{folder} holds a {config.get('_class_name')}, not a UNet2DConditionModel. Set model.network.unet to the "
            "folder of a Stable Diffusion 1.5 or InstructPix2Pix pipeline."
        )
    return folder


def _load_unet(folder: Path) -> Any:
    from diffusers import UNet2DConditionModel

    part = saved_networks.find(folder, "unet", "model.network.unet")
    return saved_networks.load(part, UNet2DConditionModel, torch.float32)


def _load_text_encoder(path: str, key: str = "model.network.text_encoder") -> Any:
    from transformers import CLIPTextModel

    return saved_networks.load(saved_networks.find(path, "text_encoder", key), CLIPTextModel, torch.float32)


class _Pipeline:
    """The folder of a pipeline that exports take over what was not trained from."""

    KEPT = (".json", ".txt", ".model", ".safetensors")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = folder / "scheduler" / "scheduler_config.json"
        self.scheduler_config = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}

    def compare(self, noise_schedule: NoiseSchedule) -> None:
        """Warn where the weights come from another noise schedule than the one they are trained on."""
        absent = "not said"
        for name, value in noise_schedule.settings.items():
            said = self.scheduler_config.get(name, absent)
            if said != value and (said is not absent or name == "prediction_type"):
                says = "%s: %s of the weights is %s, model.noise_schedule's is %s; they learn anew what differs"
                log.warning(says, self.folder, name, said, value)

    def files(self, part: str) -> list[Path]:
        """One part's files, without pickled ones and half-precision twins. Raises UserError if there are none."""
        source = self.folder / part
        files = [p for p in source.glob("*") if p.suffix in self.KEPT and ".fp16." not in p.name]
        if not files:
            raise UserError(
                f"An export is a complete pipeline, but {self.folder} has no {part}/. Set model.network.pipeline to a "
                "folder with vae, text_encoder, tokenizer and scheduler."
            )
        return files

    def copy(self, part: str, target: Path) -> None:
        """One part's files into `target`/part."""
        files = self.files(part)
        (target / part).mkdir(parents=True, exist_ok=True)
        for file in files:
            _link_or_copy(file.resolve(), target / part / file.name)

    def scheduler(self, noise_schedule: NoiseSchedule) -> Any:
        """The pipeline's own kind of scheduler with the table that was trained on."""
        import diffusers

        kind = getattr(diffusers, self.scheduler_config.get("_class_name", "DDIMScheduler"))
        own = noise_schedule.scheduler(kind.__name__)  # refuses a kind that cannot express the table
        given = {**self.scheduler_config, **noise_schedule.settings}
        return kind.from_config({**own.config, **{name: given[name] for name in own.config.keys() & given.keys()}})


def _link_or_copy(source: Path, target: Path) -> None:
    """Weights are linked; the other files are small, and whoever edits them means this folder alone."""
    if target.exists() and target.samefile(source):
        return
    target.unlink(missing_ok=True)
    if source.suffix == ".safetensors":
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without hard links
            log.debug("%s is copied: no link to %s can be made", target, source)
    shutil.copyfile(source, target)
