"""Train the autoencoders that the mini world ships. CPU only, one core, minutes each:

    OMP_NUM_THREADS=1 python -m vireo.mini.train_autoencoders wan
    OMP_NUM_THREADS=1 python -m vireo.mini.train_autoencoders kl --steps 20 5 --scratch try --output try   # seconds

The recipes are in `autoencoders.py`. One learning-rate curve spans all stages of one, every number drawn is keyed by
(seed, step), and a checkpoint is written every few hundred steps to --scratch: started again, the same command goes on
where it stopped, with the same result. Beside the weights, `figures.json` says how good they are on clips that were
never trained on.
"""

import argparse
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vireo.errors import UserError
from vireo.mini import scenes
from vireo.mini.autoencoders import RECIPES, TAEHV_ARGUMENTS, WEIGHTS, Autoencoder, Recipe, Stage
from vireo.muon import Muon
from vireo.pixels import to_pixels, to_uint8
from vireo.randomness import Draws, seed_default

TRAINING_SEEDS = range(1_000_000, 1_001_600)
HELD_OUT_SEEDS = range(2_000_000, 2_000_024)  # the seeds of the world's own clips are below a million


# ---------------------------------------------------------------------------------------------------------------------
# Data


def clips(seeds: range) -> Tensor:
    """Every frame of the clips of these seeds, uint8 (N, T, C, H, W)."""
    frames = np.stack([scenes.render(scenes.scene(seed)) for seed in seeds])
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 1, 4, 2, 3)))


def held_out() -> Tensor:
    """The last nine frames, in which things move, of clips that are never trained on: (24, 9, 3, 64, 64) in [-1, 1]."""
    return to_pixels(clips(HELD_OUT_SEEDS)[:, -9:])


def training_batch(everything: Tensor, stage: Stage, draws: Draws) -> Tensor:
    """Random clips, windows in time, crops and mirrorings: (B, T, C, size, size) in [-1, 1]."""
    clip = draws.integers("clip", 0, len(everything))
    start = draws.integers("start", stage.earliest, everything.shape[1] - stage.frames + 1)
    corner = draws.integers("corner", 0, everything.shape[-1] - stage.size + 1, 2)
    flip = draws.integers("flip", 0, 2)
    batch = []
    for n, first, (top, left), mirrored in zip(clip, start, corner, flip, strict=True):
        window = everything[n, first : first + stage.frames, :, top : top + stage.size, left : left + stage.size]
        batch.append(window.flip(-1) if mirrored else window)
    return to_pixels(torch.stack(batch))


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Of each clip in dB, (N,), of pixels in [-1, 1]; what lies outside counts as clamped."""
    return 10 * torch.log10(4 / (a.clamp(-1, 1) - b.clamp(-1, 1)).square().flatten(1).mean(1))


@torch.no_grad()
def reconstruct_all(network: Autoencoder, recipe: Recipe, pixels: Tensor) -> Tensor:
    """The clips through encoder and decoder, without noise, four at a time."""
    return torch.cat([recipe.reconstruct(network, part, None).clips for part in pixels.split(4)])


def baselines(pixels: Tensor) -> dict[str, float]:
    """Mean PSNR of what knows nothing: each frame's mean colour, and 8x down (area) and up (bilinear)."""
    small = F.interpolate(pixels.flatten(0, 1), scale_factor=1 / 8, mode="area")
    large = F.interpolate(small, scale_factor=8, mode="bilinear").unflatten(0, pixels.shape[:2])
    mean = pixels.mean((-1, -2), keepdim=True).expand_as(pixels)
    columns = {"mean_colour": mean, "down_and_up_8x": large}
    return {name: round(psnr(column, pixels).mean().item(), 3) for name, column in columns.items()}


def save_picture(path: Path, originals: Tensor, reconstructions: Tensor) -> None:
    """Rows of frames, each original above its reconstruction: the first, middle and last frame of eight clips."""
    from PIL import Image

    rows = []
    for pair in zip(originals[:8, ::4], reconstructions[:8, ::4], strict=True):
        rows += [torch.cat(list(frames), dim=-1) for frames in pair]
    columns = torch.cat([torch.cat(rows[:8], dim=-2), torch.cat(rows[8:], dim=-2)], dim=-1)
    image = to_uint8(columns).permute(1, 2, 0).numpy()
    Image.fromarray(image).resize((image.shape[1] * 2, image.shape[0] * 2), Image.Resampling.NEAREST).save(path)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def make_optimizer(network: Autoencoder, recipe: Recipe) -> Muon:
    """Muon for convolutions between hidden layers, AdamW for the ones that touch pixels, biases and norms."""
    named = list(network.named_parameters())
    others = [f"^{re.escape(name)}$" for name, p in named if p.ndim < 4 or min(p.shape[:2]) <= 3]
    groups = [{"name": "all", "params": named}]
    return Muon(groups, lr=recipe.muon_lr, adamw=others, adamw_lr_scale=recipe.adamw_lr / recipe.muon_lr)


def schedule(step: int, steps: int, restart: int | None = None) -> float:
    """Multiplier of the learning rates: linear warm-up over 100 steps, then half a cosine down to zero.

    From `restart` on, where there is one, the same again over the steps that remain, at half the height.
    """
    if restart is not None:
        return schedule(step, restart) if step < restart else schedule(step - restart, steps - restart) / 2
    return min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def train(name: str, recipe: Recipe, seed: int, scratch: Path, report_every: int = 250) -> tuple[Autoencoder, float]:
    """Train from nothing, or from the checkpoint in `scratch`. Returns the network and the CPU seconds it took."""
    seed_default(seed, "init", name)
    network = recipe.build()
    optimizer = make_optimizer(network, recipe)
    peaks = [group["lr"] for group in optimizer.param_groups]
    stages = [stage for stage in recipe.stages for _ in range(stage.steps)]
    checkpoint = scratch / f"{name}.pt"
    first, cpu_seconds = _resume(checkpoint, _text(recipe, seed), network, optimizer)
    everything, unseen = clips(TRAINING_SEEDS), held_out()

    for step in range(first, len(stages)):
        began = time.process_time()
        if step and stages[step].frames > stages[step - 1].frames:
            recipe.before_video(network)
        draws = Draws(seed, range(step * 64, step * 64 + stages[step].batch), step=step)
        target = training_batch(everything, stages[step], draws)
        output, _, penalty = recipe.reconstruct(network, target, draws)
        loss = F.l1_loss(output, target) + 2 * F.mse_loss(output, target) + recipe.kl_weight * penalty
        network.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0, error_if_nonfinite=True)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, len(stages), recipe.restart)
        optimizer.step()
        cpu_seconds += time.process_time() - began

        if (step + 1) % report_every == 0 or step + 1 == len(stages):
            quality = psnr(reconstruct_all(network, recipe, unseen), unseen).mean()
            print(
                f"{name} step {step + 1}/{len(stages)} loss {loss.item():.4f} KL {penalty.item():.2f} "
                f"held-out PSNR {quality.item():.2f} dB, {cpu_seconds:.0f} CPU s",
                flush=True,
            )
            _save(checkpoint, _text(recipe, seed), step + 1, cpu_seconds, network, optimizer)
    return network, cpu_seconds


def _save(
    path: Path, text: str, step: int, cpu_seconds: float, network: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    state = {"recipe": text, "step": step, "cpu_seconds": cpu_seconds, "network": network.state_dict()}
    state["optimizer"] = optimizer.state_dict()
    unfinished = path.with_suffix(".new")
    torch.save(state, unfinished)
    unfinished.replace(path)


def _resume(path: Path, text: str, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """The step to go on with and the CPU seconds so far; (0, 0) without a checkpoint."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    if state["recipe"] != text:
        raise UserError(f"{path} belongs to the recipe {state['recipe']}, not {text}; delete it or give --scratch")
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["cpu_seconds"]


def _text(recipe: Recipe, seed: int) -> str:
    """What must be equal for a checkpoint to be gone on with."""
    return json.dumps([seed, recipe.stages, recipe.muon_lr, recipe.adamw_lr, recipe.kl_weight, recipe.restart])


# ---------------------------------------------------------------------------------------------------------------------
# What is shipped


@torch.no_grad()
def latent_statistics(network: Autoencoder, recipe: Recipe, num_clips: int = 64) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel over training clips, posterior noise included."""
    pixels = to_pixels(clips(TRAINING_SEEDS[:num_clips])[:, -9:])
    latents = []
    for first, part in zip(range(0, num_clips, 4), pixels.split(4), strict=True):
        draws = Draws("latent statistics", range(first, first + len(part)))
        latents.append(recipe.reconstruct(network, part, draws).latents.transpose(0, 1).flatten(1))
    values = torch.cat(latents, dim=1)  # (C, everything else)
    return values.mean(1), values.std(1)


def ship(
    name: str, recipe: Recipe, network: Autoencoder, seed: int, cpu_seconds: float, folder: Path, picture: Path
) -> dict:
    """Write the weights in half precision, read them back, and write `figures.json` and a picture of what was read."""
    folder.mkdir(parents=True, exist_ok=True)
    mean, std = latent_statistics(network, recipe)
    overall = (std.square() + (mean - mean.mean()).square()).mean().sqrt().item()
    if name.startswith("taehv"):
        network.export(folder, {key: value.half() for key, value in network.state_dict().items()})
        (folder / "taecvx.json").write_text(json.dumps({"variant": "taecvx", **TAEHV_ARGUMENTS}, indent=1) + "\n")
        network.load(folder / "taecvx.safetensors")
    else:
        if name == "wan":
            network.register_to_config(latents_mean=_rounded(mean), latents_std=_rounded(std))
        else:
            network.register_to_config(scaling_factor=round(1 / overall, 4))
        network.half().save_pretrained(folder)
        network = type(network).from_pretrained(folder, torch_dtype=torch.float32)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes them private
    pixels = held_out()
    reconstructed = reconstruct_all(network, recipe, pixels)
    quality = psnr(reconstructed, pixels)
    by_frame = reconstructed.unbind(1), pixels.unbind(1)
    save_picture(picture, pixels, reconstructed)
    figures = {
        "held_out_psnr": round(quality.mean().item(), 3),
        "held_out_psnr_per_frame": _rounded(torch.stack([psnr(a, b).mean() for a, b in zip(*by_frame, strict=True)])),
        "held_out_psnr_per_clip": _rounded(quality),
        "held_out_seeds": [HELD_OUT_SEEDS.start, HELD_OUT_SEEDS.stop],
        "baselines": baselines(pixels),
        "parameters": sum(p.numel() for p in network.parameters()),
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "latent_std": round(overall, 4),
        "stages": [stage._asdict() for stage in recipe.stages],
        "seed": seed,
        "cpu_seconds": round(cpu_seconds),
        "torch": torch.__version__,
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--steps", type=int, nargs="+", help="of each stage, if not the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, default=Path.home() / ".cache" / "vireo" / "mini-training")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="the weights go to a folder in it")
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.name]
    if arguments.steps:
        stages = zip(recipe.stages, arguments.steps, strict=True)
        recipe = recipe._replace(stages=[stage._replace(steps=steps) for stage, steps in stages])
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    network, cpu_seconds = train(arguments.name, recipe, arguments.seed, arguments.scratch)
    folder, picture = arguments.output / recipe.folder, arguments.scratch / f"{arguments.name}.png"
    figures = ship(arguments.name, recipe, network, arguments.seed, cpu_seconds, folder, picture)
    print(f"{json.dumps(figures)}\n{folder}: weights and figures; {picture}: originals above their reconstructions")


if __name__ == "__main__":
    main()
