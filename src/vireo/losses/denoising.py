"""Diffusion training: mix in noise at a random timestep, predict, compare. One loss for all latent diffusion recipes.

Conditions may be dropped so that a sampler can guide by the difference they make. Classifier-free guidance: Ho and
Salimans 2022 (https://arxiv.org/abs/2207.12598); of texts and pictures together: InstructPix2Pix, Brooks et al. 2023
(https://arxiv.org/abs/2211.09800).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vireo.diffusion.noise_schedule import NoiseSchedule
from vireo.errors import UserError
from vireo.losses.objective import Loss, Objective
from vireo.randomness import Draws

GRID = (5, 25, 50, 75, 95)  # timesteps of the validation's loss, in percent of the schedule's


class Denoising(Loss):
    """Mean squared error, in float32, of what `noise_schedule` says is predicted.

    noise_schedule: the weights' own, from the model's configuration.
    inputs: names of the batch's entries that the network gets as keywords, the model's `inputs`.
    condition_dropout: probability p of each kind of dropped condition, 0 for none. One draw u for each sample decides.
        With `image_inputs`: only text for u < p, both for p <= u < 2p, only images for 2p <= u < 3p, so p <= 1/3.
        Without: text for u < p.
    image_inputs: which of `inputs` are pictures, (B, ...) latents; dropped ones are zero as a whole. Of the others
        those are texts that have a twin `null_<name>` in the batch, whose rows take the place of dropped ones.
    history_dropout: probability that of image inputs (B, N, ...) all frames but the last are zero, by another draw: a
        network that sees this can also start where fewer frames are known.

    Validation (`learning` false) drops nothing and asks at five fixed timesteps (`grid`).
    Raises UserError for probabilities out of range and names that are not there.
    """

    def __init__(
        self,
        noise_schedule: NoiseSchedule,
        inputs: Sequence[str],
        condition_dropout: float = 0.0,
        image_inputs: Sequence[str] = (),
        history_dropout: float = 0.0,
    ) -> None:
        most = 1 / 3 if image_inputs else 1
        if not 0 <= condition_dropout <= most:
            raise UserError(
                f"loss.condition_dropout={condition_dropout} must lie in [0, {most:.3g}]: "
                + ("it is the probability of each of three cases." if image_inputs else "it is a probability.")
            )
        if not 0 <= history_dropout <= 1:
            raise UserError(f"loss.history_dropout={history_dropout} must lie in [0, 1]: it is a probability.")
        strange = [name for name in image_inputs if name not in inputs]
        if strange or (history_dropout and not image_inputs):
            raise UserError(
                f"loss.image_inputs={list(image_inputs)} must name "
                + ("some of " if strange else "what history_dropout drops, of ")
                + f"model.inputs={list(inputs)}."
            )
        self.noise_schedule, self.inputs, self.image_inputs = noise_schedule, list(inputs), list(image_inputs)
        self.condition_dropout, self.history_dropout = condition_dropout, history_dropout
        self.grid = [{"timestep": noise_schedule.num_train_timesteps * percent // 100} for percent in GRID]

    def __call__(self, network: nn.Module, batch: dict, draws: Draws) -> Objective:
        """batch: latents (B, ...), clean and scaled; an entry for each of `inputs`, and null_<name> for dropped texts.

        Draws: "timestep", "noise"; "condition_dropout" and "history_dropout" where there is something to decide.
        """
        clean = batch["latents"].float()
        timesteps = draws.integers("timestep", 0, self.noise_schedule.num_train_timesteps)
        noise = draws.normal("noise", *clean.shape[1:])
        noisy = self.noise_schedule.add_noise(clean, noise, timesteps)
        prediction = network(noisy, timesteps, **self.conditions(batch, draws))
        target = self.noise_schedule.target(clean, noise, timesteps)
        return Objective(F.mse_loss(prediction.float(), target), {})

    def conditions(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        """The network's keywords: the batch's entries, some of them dropped where the loss is learning."""
        given = {name: batch[name] for name in self.inputs}
        if not self.learning:
            return given
        if self.condition_dropout:
            given |= self._drop(given, batch, draws.uniform("condition_dropout"))
        if self.history_dropout:
            dropped = draws.uniform("history_dropout") < self.history_dropout
            given |= {name: _without_history(given[name], dropped) for name in self.image_inputs}
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
        no_text = u < (2 * p if self.image_inputs else p)
        no_image = (p <= u) & (u < 3 * p)
        dropped = {name: torch.where(_rows(no_text, given[name]), batch[f"null_{name}"], given[name]) for name in texts}
        return dropped | {name: _zeroed(given[name], no_image) for name in self.image_inputs}


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.ndim - 1))


def _zeroed(x: Tensor, rows: Tensor) -> Tensor:
    # Not a product with zero: what is not finite would stay.
    return torch.where(_rows(rows, x), torch.zeros_like(x), x)


def _without_history(frames: Tensor, rows: Tensor) -> Tensor:
    """frames (B, N, ...), of some rows only the last one."""
    return torch.cat([_zeroed(frames[:, :-1], rows), frames[:, -1:]], dim=1)
