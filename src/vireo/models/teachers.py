"""Teachers: the frozen video VAEs of diffusers, whose latents a TAEHV learns to make and to decode.

A VAE's latents exist on two scales. *Raw* ones are what it gives; *diffusion* ones are what its video model sees,
`(raw - mean) / std`, with a mean and a std for each channel (Wan, LTX) or one number, `raw * scaling_factor`
(CogVideoX, HunyuanVideo). Released TAEHV weights hold diffusion latents, but for CogVideoX raw ones; a student that is
trained on the other scale is pulled away from what it knows.
"""

import functools
import logging
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vireo.errors import UserError
from vireo.models import saved_networks, teacher_lengths
from vireo.models.encoders import Encoder
from vireo.models.saved_networks import CONFIG, WEIGHTS, Part
from vireo.pixels import to_pixels
from vireo.randomness import Draws

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KEY = "model.encoder.vae"  # what the user sets
ONE_CLIP = ("AutoencoderKLHunyuanVideo15",)  # its attention mask does not broadcast over a batch (diffusers 0.42)
KNOWN = 0.5  # from this `latent_r2` on, a network is taken to have been trained for the latents


class Teacher(Encoder):
    """A frozen video VAE. It adds batch["target_latents"] and can decode, for comparison.

    family: which VAE it is in time, a key of `teacher_lengths.FAMILIES`; must agree with the VAE's own config.
    vae: a folder as diffusers saves it, a pipeline's folder that has it in `vae/`, or an id of the Hugging Face hub.
        Weights are read from safetensors alone, when they are first needed.
    latent_space: the scale of the latents, see the module's docstring.
    posterior: the target is the posterior's "mode", or a "sample" of it. A student's best answer to either is the same;
        the mode is without the noise, which no student can foresee.
    dtype: what the VAE computes in. Its latents and frames are float32 at the borders.
    slicing: run one clip at a time, with the same result, in the memory of one clip.
    strict_space: stop a network whose weights were made for the other latent space, see `check_network`.

    Clips are never tiled, neither in space nor in time (HunyuanVideo's VAE does so by default from 17 frames on): the
    seams would be taught. Raises UserError for a folder, class or file that does not suit.
    """

    parts = ("loaded",)

    def __init__(
        self,
        family: str,
        vae: str,
        latent_space: Literal["raw", "diffusion"],
        posterior: Literal["mode", "sample"] = "mode",
        dtype: Literal["bf16", "fp32"] = "bf16",
        slicing: bool = False,
        strict_space: bool = True,
    ) -> None:
        given = {"latent_space": latent_space, "posterior": posterior, "dtype": dtype}
        if latent_space not in ("raw", "diffusion") or posterior not in ("mode", "sample") or dtype not in DTYPES:
            raise UserError(
                f"A teacher's latent_space is raw or diffusion, its posterior mode or sample, its dtype "
                f"{' or '.join(DTYPES)}; got {given}."
            )
        teacher_lengths.find(family)
        self.family, self.vae = family, vae
        self.latent_space, self.posterior, self.dtype = latent_space, posterior, dtype
        self.slicing, self.strict_space = slicing, strict_space
        if not _is_hub_id(vae):  # a mistake that a look at the folder shows is told now
            _ = self.files

    def identity(self, output: str) -> str:
        """Of "target_latents": the VAE's config, the hash of its weights and the settings; no weights are loaded."""
        if output != "target_latents":
            return super().identity(output)
        name = self.files.config["_class_name"]
        return f"{name} {self.files.identity()} {self.latent_space} {self.posterior} {self.dtype}"

    def weight_bytes(self) -> dict[str, int]:
        """Of the VAE, once it is loaded."""
        return {"VAE": saved_networks.count(self.files.weights) * DTYPES[self.dtype].itemsize}

    def condition(self, batch: dict[str, Any], draws: Draws) -> dict[str, Any]:
        """frames: uint8 (B, T, 3, H, W). Adds target_latents: float32 (B, C, t, h, w) in `latent_space`."""
        pixels = to_pixels(batch["frames"]).transpose(1, 2)
        with torch.autocast(self.device.type, enabled=False):
            moments = self.loaded.vae.encode(pixels.to(DTYPES[self.dtype])).latent_dist
        latents = moments.mode().float()
        if self.posterior == "sample":
            std = torch.exp(0.5 * moments.logvar.float())
            latents = latents + std * draws.normal("posterior", *latents.shape[1:])
        return {**batch, "target_latents": self.loaded.to_diffusion(latents) if self._is_diffusion else latents}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames, float32 (B, T, 3, H, W) in [0, 1], of latents (B, C, t, h, w) in `latent_space`.

        Raises UserError for LTX decoders that are denoisers: they draw noise of their own.
        """
        injected = self.files.config.get("decoder_inject_noise")  # for each block or for all
        if self.files.config.get("timestep_conditioning") or injected is True or any(injected or ()):
            raise UserError(
                f"{self.files.folder}: the decoder of this VAE denoises (timestep_conditioning, decoder_inject_noise), "
                "so what it decodes is drawn anew each time. Set +model.sampler.teacher_decoder=false and, for vireo "
                "evaluate, +model.evaluations.speed.teacher=false."
            )
        raw = self.loaded.to_raw(latents.float()) if self._is_diffusion else latents
        with torch.autocast(self.device.type, enabled=False):
            pixels = self.loaded.vae.decode(raw.to(DTYPES[self.dtype])).sample
        return (pixels.float().transpose(1, 2) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def check_network(self, network: nn.Module, batch: dict[str, Any]) -> None:
        """Stop a network whose weights were made for the other latent space; for one call before the first step.

        network: gives `.latents` for (frames in [0, 1], decode=False), as TAEHV does. batch: with target_latents.

        Compares the network's latents with the teacher's on both scales by `latent_r2`, since a correlation does not
        see scales. A network that knows neither, such as a fresh one, has nothing to lose and passes.
        Raises UserError if the other space fits better, or for latents of another shape.
        """
        target = batch["target_latents"]
        latents = network(to_pixels(batch["frames"], low=0.0), decode=False).latents.float()
        if latents.shape != target.shape:
            raise UserError(
                f"The network makes latents {tuple(latents.shape)} (B, C, t, h, w), its teacher {self.vae} "
                f"{tuple(target.shape)} of the same frames: choose the variant that was made for this VAE."
            )
        other = "raw" if self._is_diffusion else "diffusion"
        moved = self.loaded.to_raw(target) if self._is_diffusion else self.loaded.to_diffusion(target)
        here, there = (
            {name: float(value) for name, value in compare_latents(_as_one(latents), _as_one(z)).items()}
            for z in (target, moved)
        )
        log.info("latents against the teacher's: %s, as %s ones %s", _rounded(here), other, _rounded(there))
        if self.strict_space and there["latent_r2"] > max(here["latent_r2"], KNOWN):
            raise UserError(
                f"model.encoder.latent_space={self.latent_space}, but the network's weights were made for {other} "
                f"latents. Against the teacher's {other} latents: {_rounded(there)}; against its {self.latent_space} "
                f"ones: {_rounded(here)}. Set model.encoder.latent_space={other}, or, to move the network to "
                f"{self.latent_space} latents on purpose, +model.encoder.strict_space=false."
            )

    @property
    def _is_diffusion(self) -> bool:
        return self.latent_space == "diffusion"

    @functools.cached_property
    def files(self) -> Part:
        """What the VAE is loaded from; fetched, if `vae` is an id of the hub."""
        return find(_fetch(self.vae) if _is_hub_id(self.vae) else Path(self.vae).expanduser(), self.family)

    @functools.cached_property
    def loaded(self) -> "Loaded":
        """The VAE, loaded when it is first asked for."""
        loaded = load(self.files, self.device, DTYPES[self.dtype])
        if self.slicing or self.files.config["_class_name"] in ONE_CLIP:
            loaded.vae.enable_slicing()
        return loaded


# ---------------------------------------------------------------------------------------------------------------------
# Latents beside latents


def compare_latents(latents: Tensor, target: Tensor) -> dict[str, Tensor]:
    """How close latents (B, C, t, h, w) are to target latents of the same shape, one value a clip. (B,)

    latent_mse. latent_r2: 1 - mse / variance of the target about its channels' means; 1 is perfect, 0 as good as these
    means. latent_correlation: Pearson's, the mean over the channels; blind to scales and shifts, which the others see.
    latent_mean_shift: distance of the channels' means, in standard deviations of the target (root mean square).
    latent_std_ratio: standard deviation of the latents, over that of the target (root mean square of the channels').
    """
    x, z = latents.double().flatten(2), target.double().flatten(2)  # (B, C, t h w)
    x_mean, z_mean = x.mean(2, keepdim=True), z.mean(2, keepdim=True)
    x_variance, z_variance = ((v - m).square().mean(2).clamp_min(1e-12) for v, m in ((x, x_mean), (z, z_mean)))
    covariance = ((x - x_mean) * (z - z_mean)).mean(2)  # (B, C)
    mse, variance = (x - z).square().mean((1, 2)), z_variance.mean(1)
    return {
        "latent_mse": mse,
        "latent_r2": 1 - mse / variance,
        "latent_correlation": (covariance / (x_variance * z_variance).sqrt()).mean(1),
        "latent_mean_shift": ((x_mean - z_mean).square().mean((1, 2)) / variance).sqrt(),
        "latent_std_ratio": (x_variance.mean(1) / variance).sqrt(),
    }


def _as_one(latents: Tensor) -> Tensor:
    """Clips one after the other as a single one, (B, C, t, h, w) -> (1, C, B t, h, w): statistics of a whole batch."""
    return latents.transpose(0, 1).flatten(1, 2)[None]


def _rounded(figures: dict[str, float]) -> str:
    return ", ".join(f"{name.removeprefix('latent_').replace('_', ' ')} {value:.3g}" for name, value in figures.items())


# ---------------------------------------------------------------------------------------------------------------------
# Files and weights


class Loaded(NamedTuple):
    """A VAE with the statistics of its raw latents, float32 (C, 1, 1, 1) or, where all channels share them, (1, …)."""

    vae: Any
    mean: Tensor
    std: Tensor

    def to_diffusion(self, latents: Tensor) -> Tensor:
        return (latents - self.mean) / self.std

    def to_raw(self, latents: Tensor) -> Tensor:
        return latents * self.std + self.mean


def find(path: Path, family: str) -> Part:
    """The VAE's files in the folder `path` or in `path`/vae; nothing is loaded but its config.

    Raises UserError if there is none, if its class is not of that family, or if its weights are no safetensors.
    """
    folder, config = saved_networks.find_config(path, "vae", KEY)
    name = config.get("_class_name")
    families = [key for key, known in teacher_lengths.FAMILIES.items() if name in known.classes]
    if family not in families:
        known = ", ".join(f"{c} ({key})" for key, f in teacher_lengths.FAMILIES.items() for c in f.classes)
        meant = f"of family {families[0]}" if families else f"no teacher; there are {known}"
        raise UserError(
            f"{folder / CONFIG} is of class {name}, which is {meant}; model.encoder.family is {family}. "
            "Change family or vae, so that both mean the same."
        )
    return saved_networks.find(folder, "vae", KEY)


def load(part: Part, device: torch.device, dtype: torch.dtype) -> Loaded:
    """The frozen VAE on its device. Raises UserError if a tensor is missing, left over, or damaged."""
    import diffusers

    name = part.config["_class_name"]
    if not hasattr(diffusers, name):
        raise UserError(f"{part.folder / CONFIG} is of class {name}, unknown to diffusers {diffusers.__version__}.")
    vae = saved_networks.load(part, getattr(diffusers, name), dtype)
    for tiling in ("use_tiling", "use_framewise_encoding", "use_framewise_decoding"):
        setattr(vae, tiling, False)
    vae = vae.to(device).requires_grad_(False)
    facts = {**vae.config, **dict(vae.named_buffers(recurse=False))}  # LTX has its statistics in buffers

    def statistic(name: str, otherwise: float) -> Tensor:
        value = facts.get(name)
        value = torch.as_tensor(otherwise if value is None else value, dtype=torch.float32, device=device)
        return value.view(-1, 1, 1, 1)

    std = statistic("latents_std", 1.0) / facts.get("scaling_factor", 1.0)
    return Loaded(vae, statistic("latents_mean", 0.0), std)


def _is_hub_id(vae: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", vae) is not None and not Path(vae).exists()


def _fetch(repository: str) -> Path:
    """The VAE of a repository of the Hugging Face hub in the hub's own cache, and nothing else of it."""
    from huggingface_hub import snapshot_download

    weights = WEIGHTS[0]
    files = (CONFIG, weights, f"{weights}.index.json", weights.replace(".", "-*-of-*.", 1))
    wanted = [f"{folder}{file}" for folder in ("", "vae/") for file in files]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except OSError as error:
        raise UserError(
            f"model.encoder.vae={repository} is no folder here, and the Hugging Face hub does not give it: {error}"
        ) from error
