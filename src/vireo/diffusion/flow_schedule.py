"""Rectified flow: noisy = (1 - sigma) clean + sigma noise, and the network predicts noise - clean.

Sources: Liu et al. 2022 (https://arxiv.org/abs/2209.03003), Lipman et al. 2022 (https://arxiv.org/abs/2210.02747), the
shift: Esser et al. 2024 (https://arxiv.org/abs/2403.03206). It has what `NoiseSchedule` has: losses and samplers take
either.
"""

import inspect
from typing import Any

from torch import Tensor

from vireo.errors import UserError


class FlowSchedule:
    """Noise levels sigma for what the network is told, timesteps = num_train_timesteps sigma; floats.

    A timestep is its own noise level, so the two cannot be paired wrongly. Training draws an index, 0 (almost clean) to
    num_train_timesteps - 1 (noise alone), and `timesteps` gives that of the shifted table: u = (index + 1) / number,
    sigma = shift u / (1 + (shift - 1) u).

    shift: how much more often high noise levels occur; 1 is none, Wan is trained with 5. Raises UserError for values
    that make no schedule.
    """

    prediction_type = "flow_prediction"

    def __init__(self, num_train_timesteps: int = 1000, shift: float = 5.0) -> None:
        if num_train_timesteps < 2 or shift <= 0:
            raise UserError(
                "model.noise_schedule wants num_train_timesteps >= 2 and shift > 0; got "
                f"{num_train_timesteps} and {shift}."
            )
        self.num_train_timesteps, self.shift = num_train_timesteps, float(shift)

    def timesteps(self, indices: Tensor) -> Tensor:
        """What the network is told, float32 in (0, num_train_timesteps], for int64 indices of the table, any shape."""
        share = (indices.double() + 1) / self.num_train_timesteps
        return (self.num_train_timesteps * self.shift * share / (1 + (self.shift - 1) * share)).float()

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noisy sample, of clean's dtype. clean, noise: (B, …).

        timesteps: (B,), or (B, t), one for each latent frame of (B, C, t, h, w).
        """
        sigmas = self._sigmas(timesteps, clean)
        return ((1 - sigmas) * clean + sigmas * noise).to(clean.dtype)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict; shapes as in `add_noise`."""
        return noise - clean

    def to_clean(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The clean sample that a prediction means, in one step; shapes as in `add_noise`."""
        return (noisy - self._sigmas(timesteps, noisy) * prediction).to(noisy.dtype)

    def scheduler(self, name: str, **settings: Any) -> Any:
        """diffusers' scheduler of class `name` with this shift: FlowMatchEulerDiscreteScheduler or one whose arguments
        have use_flow_sigmas (UniPCMultistepScheduler, DPMSolverMultistepScheduler).

        settings: further arguments of that class; shift (flow_shift) may be given, to sample with another one.
        Raises UserError for a class that diffusers does not have or that is not for flows.
        """
        import diffusers

        kind: Any = getattr(diffusers, name, None)
        known = inspect.signature(kind).parameters if hasattr(kind, "set_timesteps") else {}
        own: dict[str, Any] = {"num_train_timesteps": self.num_train_timesteps}
        if "use_flow_sigmas" in known:
            own |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": self.shift}
        elif name == "FlowMatchEulerDiscreteScheduler":
            kind, own = _euler(), {**own, "shift": self.shift}
        else:
            raise UserError(
                f"diffusers {diffusers.__version__} has no scheduler {name!r} for flows; "
                "FlowMatchEulerDiscreteScheduler and UniPCMultistepScheduler are some it has."
            )
        if strange := sorted(settings.keys() - known.keys()):
            raise UserError(f"{name} does not take {', '.join(strange)}; it takes {', '.join(known)}.")
        return kind(**{**own, **settings})

    def _sigmas(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """float32, (B, 1, …) or (B, 1, t, 1, …), on the sample's device."""
        sigmas = timesteps.to(like.device).float() / self.num_train_timesteps
        if sigmas.ndim == 2:
            sigmas = sigmas[:, None]
        return sigmas.view(*sigmas.shape, *[1] * (like.ndim - sigmas.ndim))


def _euler() -> Any:
    """diffusers' Euler steps with what its other schedulers have, and with Wan's own noise levels.

    Left to itself, it shifts a table that is shifted already, and spends the last step on almost clean samples.
    """
    import diffusers

    class FlowMatchEuler(diffusers.FlowMatchEulerDiscreteScheduler):
        init_noise_sigma = 1.0

        def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return sample

        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:  # type: ignore[override]
            levels = [1 - step / num_inference_steps for step in range(num_inference_steps)]
            super().set_timesteps(sigmas=levels, device=device)  # type: ignore[misc]

    return FlowMatchEuler
