"""The variance-preserving diffusion of DDPM: noisy = sqrt(abar_t) clean + sqrt(1 - abar_t) noise.

abar_t, the share of the signal's power that is left at step t, is one table. It and what the network predicts belong to
the weights; training and every sampler use the same table.

Sources: Ho et al. 2020 (https://arxiv.org/abs/2006.11239), velocity: Salimans and Ho 2022
(https://arxiv.org/abs/2202.00512), zero terminal SNR: Lin et al. 2023 (https://arxiv.org/abs/2305.08891), the shift of
the SNR: CogVideoX (https://arxiv.org/abs/2408.06072). Names and defaults are those of diffusers' schedulers.
"""

import inspect
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vireo.errors import UserError

BETA_SCHEDULES = ("linear", "scaled_linear")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class NoiseSchedule:
    """A table of noise levels for timesteps 0 (almost clean) to num_train_timesteps - 1, and what is predicted.

    beta_start, beta_end, beta_schedule: the noise added at each step, linear in beta or in its square root. Defaults
        are Stable Diffusion 1.5's.
    prediction_type: "epsilon", the noise; "v_prediction", sqrt(abar) noise - sqrt(1 - abar) clean; "sample", the clean.
    snr_shift_scale: divides the signal-to-noise ratio at every step; CogVideoX-2b's is 3, the 5b's 1.
    rescale_betas_zero_snr: shift the table so that nothing of the signal is left at the last step.

    `alphas_cumprod` is the table, float32 (num_train_timesteps,). Raises UserError for values that make no schedule.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: Literal["linear", "scaled_linear"] = "scaled_linear",
        prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon",
        snr_shift_scale: float = 1.0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        if beta_schedule not in BETA_SCHEDULES or prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"model.noise_schedule: beta_schedule is one of {', '.join(BETA_SCHEDULES)} and prediction_type one of "
                f"{', '.join(PREDICTION_TYPES)}; got {beta_schedule!r} and {prediction_type!r}."
            )
        if num_train_timesteps < 2 or not 0 < beta_start <= beta_end < 1 or snr_shift_scale <= 0:
            raise UserError(
                "model.noise_schedule wants num_train_timesteps >= 2, 0 < beta_start <= beta_end < 1 and "
                f"snr_shift_scale > 0; got {num_train_timesteps}, {beta_start}, {beta_end} and {snr_shift_scale}."
            )
        if rescale_betas_zero_snr and prediction_type == "epsilon":
            raise UserError(
                "model.noise_schedule: with rescale_betas_zero_snr the last step is pure noise, and predicting it "
                "(prediction_type=epsilon) says nothing about the clean sample; use v_prediction or sample."
            )
        self.num_train_timesteps, self.prediction_type = num_train_timesteps, prediction_type
        self.settings: dict[str, Any] = {
            "num_train_timesteps": num_train_timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "beta_schedule": beta_schedule,
            "prediction_type": prediction_type,
            "snr_shift_scale": snr_shift_scale,
            "rescale_betas_zero_snr": rescale_betas_zero_snr,
        }
        power = 0.5 if beta_schedule == "scaled_linear" else 1.0
        roots = torch.linspace(beta_start**power, beta_end**power, num_train_timesteps, dtype=torch.float64)
        table = torch.cumprod(1 - roots ** (1 / power), dim=0)
        table = table / (snr_shift_scale + (1 - snr_shift_scale) * table)
        if rescale_betas_zero_snr:
            signal = table.sqrt()
            table = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])).square()
        self.alphas_cumprod = table.float()

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noisy sample. clean, noise: (B, ...) floats; timesteps: int64 (B,). Returns (B, ...) of clean's dtype."""
        signal, sigma = self._scales(timesteps, clean)
        return (signal * clean + sigma * noise).to(clean.dtype)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict, by `prediction_type`; shapes as in `add_noise`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean
        signal, sigma = self._scales(timesteps, clean)
        return (signal * noise - sigma * clean).to(clean.dtype)

    def to_clean(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The clean sample that a prediction means, in one step; shapes as in `add_noise`.

        Predictions of noise say little where there is little signal: errors are divided by sqrt(abar).
        """
        if self.prediction_type == "sample":
            return prediction
        signal, sigma = self._scales(timesteps, noisy)
        if self.prediction_type == "epsilon":
            return ((noisy - sigma * prediction) / signal).to(noisy.dtype)
        return (signal * noisy - sigma * prediction).to(noisy.dtype)

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Weights of the squared error at each timestep, float32 (B,), by Hang et al. 2023 (arXiv:2303.09556).

        min(SNR, gamma), the weight of the clean sample's error, in terms of what is predicted: divided by SNR for the
        noise and by SNR + 1 for the velocity. Where nothing of the signal is left it is 0.
        """
        left = self.alphas_cumprod.to(timesteps.device)[timesteps].double()
        snr = left / (1 - left)
        divisor = {"epsilon": snr.clamp(min=1e-12), "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
        return (snr.clamp(max=gamma) / divisor[self.prediction_type]).float()

    def scheduler(self, name: str, **settings: Any) -> Any:
        """diffusers' scheduler of class `name` (DDIMScheduler, EulerAncestralDiscreteScheduler, …) on this table.

        settings: arguments of that class, such as timestep_spacing. Latents are not clipped unless they say so.
        Raises UserError for a class that diffusers does not have or that cannot express this table.
        """
        import diffusers

        kind = getattr(diffusers, name, None)
        if kind is None or not hasattr(kind, "set_timesteps"):
            raise UserError(
                f"diffusers {diffusers.__version__} has no scheduler {name!r}; DDIMScheduler and "
                "EulerAncestralDiscreteScheduler are some it has."
            )
        known = inspect.signature(kind).parameters
        neutral = {"snr_shift_scale": 1.0, "rescale_betas_zero_snr": False}
        lost = [key for key, value in self.settings.items() if key not in known and neutral.get(key) != value]
        strange = sorted(settings.keys() - known.keys())
        if lost or strange:
            raise UserError(
                f"{name} of diffusers {diffusers.__version__} does not take "
                f"{', '.join(f'{key}={self.settings[key]}' for key in lost) or ', '.join(strange)}; "
                f"it takes {', '.join(known)}. Choose another scheduler."
            )
        own = {key: value for key, value in self.settings.items() if key in known}
        return kind(**{**({"clip_sample": False} if "clip_sample" in known else {}), **settings, **own})

    def _scales(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar), float32 (B, 1, …) on the sample's device."""
        self.alphas_cumprod = self.alphas_cumprod.to(like.device)  # moved once
        left = self.alphas_cumprod[timesteps.to(like.device)].view(-1, *[1] * (like.ndim - 1))
        return left.sqrt(), (1 - left).sqrt()


def saved_in(pipeline: str) -> NoiseSchedule:
    """The table of a pipeline's folder, from its scheduler/scheduler_config.json.

    What the file leaves out has the defaults of diffusers' class. Raises UserError where there is no such file.
    """
    import diffusers

    file = Path(pipeline).expanduser() / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise UserError(
            f"model.noise_schedule: there is no {file}, which says what the weights were trained with. Fetch the "
            "whole folder of the pipeline."
        )
    said = json.loads(file.read_text(encoding="utf-8"))
    kind = getattr(diffusers, said.get("_class_name", "DDIMScheduler"))
    said, known = kind.from_config(said).config, inspect.signature(NoiseSchedule).parameters
    return NoiseSchedule(**{name: value for name, value in said.items() if name in known})
