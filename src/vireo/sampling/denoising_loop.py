"""From noise to latents: the loop over a diffusers scheduler's steps, with guidance."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vireo.diffusion.guidance import TextGuidance, TwoScaleGuidance


def denoise(
    predict: Callable[..., Tensor],
    scheduler: Any,
    noise: Tensor,
    guidance: TwoScaleGuidance | TextGuidance,
    conditions: Mapping[str, Tensor],
    num_inference_steps: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    *,
    start: Tensor | None = None,
    strength: float = 1.0,
    eta: float = 0.0,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> Tensor:
    """Latents (B, ...) of the noise's shape, scaled as the network knows them.

    predict: called once a step as predict(noisy, timesteps (passes * B,), **conditions), with one batch of all passes
        that the guidance needs. conditions: from `guidance.conditions`.
    scheduler: a diffusers scheduler; its state is set anew. noise: standard normal (B, ...).
    generator: for schedulers that draw at each step; one a sample makes a sample independent of its batch.
    start, strength: latents to start from, noised to where the last `strength` of the steps begin; only these are made.
        None: from noise alone, by all steps.
    eta: for DDIM, 0 draws nothing and 1 is as noisy as DDPM; other schedulers have none.
    progress: wraps the timesteps, to show how far the loop is.
    """
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    known = inspect.signature(scheduler.step).parameters
    generators = list(generator) if isinstance(generator, Sequence) else generator
    options = {name: value for name, value in (("eta", eta), ("generator", generators)) if name in known}
    looks_back = "old_pred_original_sample" in known  # CogVideoXDPMScheduler keeps its last step outside
    timesteps, latents, last, before = scheduler.timesteps, noise * scheduler.init_noise_sigma, None, None
    if start is not None:
        first = len(timesteps) - max(1, round(strength * len(timesteps)))
        timesteps = timesteps[first:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        latents = scheduler.add_noise(start, noise, timesteps[:1].expand(len(start)))
    for timestep in progress(timesteps):
        noisy = scheduler.scale_model_input(guidance.repeat(latents), timestep)
        predictions = predict(noisy, timestep.expand(len(noisy)), **conditions)
        combined = guidance.combine(predictions, timestep)
        if looks_back:
            latents, last = scheduler.step(combined, last, timestep, before, latents, **options, return_dict=False)
            before = timestep
        else:
            latents = scheduler.step(combined, timestep, latents, **options, return_dict=False)[0]
    return latents
