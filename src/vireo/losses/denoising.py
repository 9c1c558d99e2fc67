"""Diffusion training: mix in noise at a random timestep, predict, compare. One loss for all latent diffusion recipes.

Conditions may be dropped so that a sampler can guide by the difference they make. Classifier-free guidance: Ho and
Salimans 2022 (https://arxiv.org/abs/2207.12598); of texts and pictures together: InstructPix2Pix, Brooks et al. 2023
(https://arxiv.org/abs/2211.09800).
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vireo.diffusion.noise_schedule import NoiseSchedule
from vireo.diffusion.timesteps import logit_normal
from vireo.errors import UserError
from vireo.losses.loss_by_timestep import LossByTimestep
from vireo.losses.objective import Loss, Objective
from vireo.randomness import Draws

GRID = (5, 25, 50, 75, 95)  # timesteps of the validation's loss, in percent of the schedule's


class Denoising(Loss):
    """Mean squared error, in float32, of what `noise_schedule` says is predicted.

    noise_schedule: the weights' own, from the model's configuration.
    inputs: names of the batch's entries that the network gets as keywords, the model's `inputs`.
    condition_dropout: probability p of each kind of dropped condition, 0 for none. One draw u for each sample decides.
        With `image_inputs`: only text for u < p, both for p <= u < 2p, only images for 2p <= u < 3p, so p <= 1/3.
        Without, or with `image_dropout`: text for u < p.
    image_inputs: which of `inputs` are pictures, (B, ...) latents; dropped ones are zero as a whole. Of the others
        those are texts that have a twin `null_<name>` in the batch, whose rows take the place of dropped ones.
    image_dropout: probability that the image inputs are zero, by a draw of its own, as diffusers' example of CogVideoX
        has it; None: `condition_dropout` decides on them too.
    history_dropout: probability, by another draw, that of image inputs (B, N, ...) only the last 1 to N - 1 frames are
        known, all numbers alike. Copies of the oldest known one stand for the others, as in every sampler, so a network
        that has seen this can also start where fewer frames are known.
    timestep_sampling: "uniform" over `timestep_range`, or "logit_normal", more often in its middle than at its ends.
    timestep_range: the first timestep, and the one after the last; None: all of the schedule's.
    min_snr_gamma: weighs samples by `NoiseSchedule.min_snr_weights`; None: all alike.
    skip_padding: leaves out of the mean the leading latent frames that `padding_frames` of the batch calls padding.
    timestep_bins: how many equal ranges of timesteps have a figure of their own, see `LossByTimestep`; 0: none.

    Validation (`learning` false) drops nothing, weighs nothing and asks at five fixed timesteps (`grid`).
    Raises UserError for values out of range and names that are not there.
    """

    def __init__(
        self,
        noise_schedule: NoiseSchedule,
        inputs: Sequence[str],
        condition_dropout: float = 0.0,
        image_inputs: Sequence[str] = (),
        image_dropout: float | None = None,
        history_dropout: float = 0.0,
        timestep_sampling: Literal["uniform", "logit_normal"] = "uniform",
        timestep_range: Sequence[int] | None = None,
        min_snr_gamma: float | None = None,
        skip_padding: bool = False,
        timestep_bins: int = 0,
    ) -> None:
        self.drops_jointly = bool(image_inputs) and image_dropout is None
        most = 1 / 3 if self.drops_jointly else 1
        if not 0 <= condition_dropout <= most:
            raise UserError(
                f"loss.condition_dropout={condition_dropout} must lie in [0, {most:.3g}]: "
                + ("it is the probability of each of three cases." if self.drops_jointly else "it is a probability.")
            )
        for name, value in (("image_dropout", image_dropout or 0.0), ("history_dropout", history_dropout)):
            if not 0 <= value <= 1:
                raise UserError(f"loss.{name}={value} must lie in [0, 1]: it is a probability.")
        strange = [name for name in image_inputs if name not in inputs]
        if strange or ((history_dropout or image_dropout) and not image_inputs):
            raise UserError(
                f"loss.image_inputs={list(image_inputs)} must name "
                + ("some of " if strange else "the pictures that are dropped, of ")
                + f"model.inputs={list(inputs)}."
            )
        count = noise_schedule.num_train_timesteps
        low, high = timestep_range or (0, count)
        if timestep_sampling not in ("uniform", "logit_normal") or not 0 <= low < high <= count:
            raise UserError(
                "loss.timestep_sampling is uniform or logit_normal, and loss.timestep_range two numbers from 0 to "
                f"{count}, the smaller one first; got {timestep_sampling} and [{low}, {high}]."
            )
        if (min_snr_gamma is not None and min_snr_gamma <= 0) or timestep_bins < 0:
            raise UserError(
                "loss.min_snr_gamma is above 0 (5 is usual) or null, loss.timestep_bins at least 0; "
                f"got {min_snr_gamma} and {timestep_bins}."
            )
        self.timestep_sampling, self.timestep_range = timestep_sampling, (int(low), int(high))
        self.min_snr_gamma, self.skip_padding = min_snr_gamma, skip_padding
        self.by_timestep = LossByTimestep(timestep_bins, count) if timestep_bins else None
        self.noise_schedule, self.inputs, self.image_inputs = noise_schedule, list(inputs), list(image_inputs)
        self.condition_dropout, self.image_dropout = condition_dropout, image_dropout
        self.history_dropout = history_dropout
        self.grid = [{"timestep": noise_schedule.num_train_timesteps * percent // 100} for percent in GRID]

    def __call__(self, network: nn.Module, batch: dict, draws: Draws) -> Objective:
        """batch: latents (B, ...), clean and scaled; an entry for each of `inputs`, and null_<name> for dropped texts.

        With skip_padding, latents are (B, C, t, h, w) and padding_frames is an integer (B,).
        Draws: "timestep", "noise"; where there is something to decide "condition_dropout", "image_dropout",
        "history_dropout" and "known_frames".
        """
        clean = batch["latents"].float()
        timesteps = self.timesteps(draws, clean)
        noise = draws.normal("noise", *clean.shape[1:])
        noisy = self.noise_schedule.add_noise(clean, noise, timesteps)
        prediction = network(noisy, timesteps, **self.conditions(batch, draws)).float()
        target = self.noise_schedule.target(clean, noise, timesteps)
        if self.is_plain:
            return Objective(F.mse_loss(prediction, target), {})
        errors = self.means((prediction - target).square(), batch)
        if self.learning and self.by_timestep:
            self.by_timestep.add(timesteps, errors.detach())
        if self.learning and self.min_snr_gamma is not None:
            errors = errors * self.noise_schedule.min_snr_weights(timesteps, self.min_snr_gamma)
        return Objective(errors.mean(), {})

    def end_step(self) -> dict[str, Tensor]:
        return self.by_timestep.end_step() if self.by_timestep else {}

    @property
    def is_plain(self) -> bool:
        """Whether the mean over everything is all that is wanted now."""
        of_training = self.min_snr_gamma is not None or self.by_timestep is not None
        return not self.skip_padding and not (self.learning and of_training)

    def timesteps(self, draws: Draws, clean: Tensor) -> Tensor:
        """int64 (B,), for clean (B, ...). Validation's are uniform, or pinned to its grid."""
        return self.drawn(draws)

    def drawn(self, draws: Draws, *shape: int) -> Tensor:
        """Places in the schedule, int64 (B, *shape)."""
        low, high = self.timestep_range
        if self.timestep_sampling == "uniform" or not self.learning:
            return draws.integers("timestep", low, high, *shape)
        return logit_normal(draws.normal("timestep", *shape), low, high)

    def means(self, squares: Tensor, batch: dict) -> Tensor:
        """Each sample's mean of the squared errors (B, ...), (B,)."""
        return _sample_means(squares, batch["padding_frames"] if self.skip_padding else None)

    def to(self, device: torch.device) -> None:
        if self.by_timestep:
            self.by_timestep.to(device)

    def state_dict(self) -> dict[str, Tensor]:
        return {"by_timestep": self.by_timestep.sums} if self.by_timestep else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.by_timestep is None:
            super().load_state_dict(state)
        else:
            self.by_timestep.load(state.get("by_timestep"))

    def conditions(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        """The network's keywords: the batch's entries, some of them dropped where the loss is learning."""
        given = {name: batch[name] for name in self.inputs}
        if not self.learning:
            return given
        if self.condition_dropout:
            given |= self._drop(given, batch, draws.uniform("condition_dropout"))
        if self.image_dropout:
            dropped = draws.uniform("image_dropout") < self.image_dropout
            given |= {name: _zeroed(given[name], dropped) for name in self.image_inputs}
        if self.history_dropout:
            dropped = draws.uniform("history_dropout") < self.history_dropout
            for name in self.image_inputs:
                if (count := given[name].shape[1]) > 1:
                    known = torch.where(dropped, draws.integers("known_frames", 1, count), count)
                    given[name] = _last_frames(given[name], known)
        return given

    def _drop(self, given: dict[str, Tensor], batch: dict, u: Tensor) -> dict[str, Tensor]:
        """What differs after conditions are dropped by u, (B,)."""
        p = self.condition_dropout
        texts = [name for name in self.inputs if f"null_{name}" in batch]
        if not texts:
            raise UserError(
                f"loss.condition_dropout={p} puts null_<name> in the place of a text, but the batch has it for none of "
                f"model.inputs={self.inputs}; set loss.condition_dropout=0 or let the encoder give it."
            )
        no_text = u < (2 * p if self.drops_jointly else p)
        dropped = {name: torch.where(_rows(no_text, given[name]), batch[f"null_{name}"], given[name]) for name in texts}
        if not self.drops_jointly:
            return dropped
        no_image = (p <= u) & (u < 3 * p)
        return dropped | {name: _zeroed(given[name], no_image) for name in self.image_inputs}


def _sample_means(errors: Tensor, padding: Tensor | None) -> Tensor:
    """Means of (B, ...) over all but the batch, (B,); without the first padding (B,) frames of (B, C, t, h, w)."""
    if padding is None:
        return errors.flatten(1).mean(1)
    by_frame = errors.mean(dim=(1, 3, 4))  # (B, t)
    kept = torch.arange(by_frame.shape[1], device=errors.device) >= padding[:, None].to(errors.device)
    return torch.where(kept, by_frame, 0.0).sum(1) / kept.sum(1)


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.ndim - 1))


def _zeroed(x: Tensor, rows: Tensor) -> Tensor:
    # Not a product with zero: what is not finite would stay.
    return torch.where(_rows(rows, x), torch.zeros_like(x), x)


def _last_frames(frames: Tensor, known: Tensor) -> Tensor:
    """(B, N, ...) in which copies of the oldest of the last `known` (B,) frames stand for those before it."""
    count = frames.shape[1]
    places = torch.arange(count, device=frames.device).maximum(count - known[:, None])
    return frames[torch.arange(len(frames), device=frames.device)[:, None], places]
