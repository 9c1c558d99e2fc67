"""The objective of a distilled video autoencoder: match a teacher's latents, and decode them back to the frames.

Source: madebyollin/seraena, TAEHV_Training_Example.ipynb. Two points decide whether the result is of use behind a
diffusion model: the decoder learns from the teacher's latents, and the target is the first K frames of the clip, where
K is what the decoder gives back (against the last K it would learn to predict the future).
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vireo.errors import UserError
from vireo.losses.objective import Loss, Objective
from vireo.metrics import decibels
from vireo.pixels import to_pixels
from vireo.randomness import Draws


class Step(NamedTuple):
    """What is compared.

    prediction, target: float32 (B, K, 3, H, W); the target is in [0, 1], the prediction is not clamped.
    latents, target_latents: (B, C, t, h, w), the network's own and the teacher's; the latter None without a teacher.
    decoded_latents: (B, C, t, h, w), of the two what the prediction was decoded from.
    num_frames: of the clip; at least K.
    """

    prediction: Tensor
    target: Tensor
    latents: Tensor
    target_latents: Tensor | None
    decoded_latents: Tensor
    num_frames: int


class Autoencoder(Loss):
    """Weighted sum of distances between frames and between latents.

    reconstruction, l1: weights of the mean squared and of the mean absolute error of the decoded frames.
    latent: weight of the mean squared error to batch["target_latents"]; the term is absent where the batch has none.
    decoder_input: whose latents the decoder gets: the "teacher"'s, the network's "own", or "mixed", drawn per sample.
        None is the teacher's where the batch has them, else the network's own.
    mix_probability: probability of the network's own in "mixed".
    detach: keep the decoder's gradient out of the network's own latents, lest the encoder drifts from the teacher. None
        does so where there is a teacher; without one this gradient is all that the encoder learns from.

    Metrics: every term without its weight, and `psnr` in dB of the clamped frames, the mean over the clips.
    """

    def __init__(
        self,
        reconstruction: float = 1.0,
        latent: float = 1.0,
        l1: float = 0.0,
        decoder_input: Literal["teacher", "own", "mixed"] | None = None,
        mix_probability: float = 0.5,
        detach: bool | None = None,
    ) -> None:
        own_probability = {None: 0.0, "teacher": 0.0, "mixed": mix_probability, "own": 1.0}
        if decoder_input not in own_probability or not 0 <= mix_probability <= 1:
            raise UserError(
                "loss.decoder_input must be teacher, own or mixed, and loss.mix_probability must lie in [0, 1]; got "
                f"{decoder_input!r} and {mix_probability}."
            )
        self.weights = {"reconstruction": reconstruction, "l1": l1, "latent": latent}
        self.decoder_input = decoder_input
        self.own_probability = own_probability[decoder_input]
        self.detach = detach

    def __call__(self, network: nn.Module, batch: dict, draws: Draws) -> Objective:
        """batch: frames, uint8 (B, T, 3, H, W), and, with a teacher, target_latents (B, C, t, h, w).

        Raises UserError if decoder_input asks for a teacher's latents and the batch has none.
        """
        terms, figures = self.compare(self.step(network, batch, draws), draws)
        total = torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()
        return Objective(total, {**{name: value.detach() for name, value in terms.items()}, **figures})

    def step(self, network: nn.Module, batch: dict, draws: Draws) -> Step:
        """The network's one call, and what its output is compared with."""
        frames, teacher = to_pixels(batch["frames"], low=0.0), batch.get("target_latents")
        if teacher is None and self.decoder_input in ("teacher", "mixed"):
            raise UserError(
                f"loss.decoder_input={self.decoder_input} decodes a teacher's latents, but the batch has no "
                "target_latents: choose a model whose encoder is a teacher, or loss.decoder_input=own."
            )
        use_given = None if teacher is None else draws.uniform("decoder_input") >= self.own_probability
        detach = teacher is not None if self.detach is None else self.detach
        output = network(frames, teacher, use_given=use_given, detach=detach)
        target = frames[:, : output.frames.shape[1]]
        decoded = output.latents
        if teacher is not None and use_given is not None:
            decoded = torch.where(use_given.view(-1, 1, 1, 1, 1), teacher, decoded)
        return Step(output.frames.float(), target, output.latents, teacher, decoded, frames.shape[1])

    def compare(self, step: Step, draws: Draws) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The scalars to minimise, by the names of their weights, and detached ones that are only logged."""
        terms = {"reconstruction": F.mse_loss(step.prediction, step.target)}
        if self.weights["l1"]:
            terms["l1"] = F.l1_loss(step.prediction, step.target)
        if step.target_latents is not None:
            terms["latent"] = F.mse_loss(step.latents.float(), step.target_latents.float())
        error = (step.prediction.detach().clamp(0, 1) - step.target).square().mean(dim=(1, 2, 3, 4))
        return terms, {"psnr": decibels(error).mean()}
