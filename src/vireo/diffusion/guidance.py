"""Guidance by what conditions change in a prediction: of a text, or of pictures and a text with two scales."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vireo.errors import UserError


class TextGuidance:
    """e(-) + scale (e(T) - e(-)): classifier-free guidance, Ho and Salimans 2022 (https://arxiv.org/abs/2207.12598).

    scale: any finite number; with 1 the network is asked without a null text, once. dynamic: the number of inference
    steps, for a scale that changes with the timestep as `use_dynamic_cfg` of diffusers' CogVideoX pipelines; None: it
    stays. Raises UserError if the scale is not finite.
    """

    def __init__(self, scale: float, dynamic: int | None = None) -> None:
        if not math.isfinite(scale):
            raise UserError(f"a guidance scale must be a finite number, got guidance_scale={scale}")
        self.scale, self.dynamic = float(scale), dynamic
        self.passes = 1 if self.scale == 1 and dynamic is None else 2

    def conditions(
        self, others: Mapping[str, Tensor], text: Mapping[str, Tensor], null_text: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The network's conditions for all passes as one batch, (passes * B, ...) for each (B, ...).

        others: the same in each pass. text, null_text: the same names in both.
        """
        repeated = {name: self.repeat(value) for name, value in others.items()}
        if self.passes == 1:
            return repeated | dict(text)
        return repeated | {name: torch.cat([null_text[name], value]) for name, value in text.items()}

    def repeat(self, values: Tensor) -> Tensor:
        """(B, ...) -> (passes * B, ...), the same for each pass."""
        return torch.cat([values] * self.passes)

    def combine(self, predictions: Tensor, timestep: Tensor) -> Tensor:
        """(passes * B, ...) -> (B, ...). timestep: the scheduler's, a scalar."""
        if self.passes == 1:
            return predictions
        without, with_text = predictions.chunk(2)
        scale = self.scale if self.dynamic is None else self.at(int(timestep))
        return without + scale * (with_text - without)

    def at(self, timestep: int) -> float:
        """The scale at a timestep, where it is dynamic."""
        assert self.dynamic is not None
        # The formula mixes the timestep (to 999) and the number of steps; pipelines and published samples have it so.
        return 1 + self.scale * (1 - math.cos(math.pi * ((self.dynamic - timestep) / self.dynamic) ** 5.0)) / 2


TEXT_AND_IMAGE, IMAGE, NEITHER = "text and image", "image", "neither"


class TwoScaleGuidance:
    """e(-,-) + image (e(I,-) - e(-,-)) + text (e(I,T) - e(I,-)): Brooks et al. 2023 (arXiv:2211.09800), equation 3.

    text, image: any finite scales; 1 and 1 is the network without guidance. The formula holds for all of them, unlike
    in diffusers' pipeline, which gives up guidance unless text > 1 and image >= 1. Raises UserError if one is not
    finite.

    A prediction whose coefficient is zero is never asked for: one pass suffices for (1, 1), two for image = 1, for
    text = 0 and for image = text. What is asked for goes through the network as one batch.
    """

    def __init__(self, text: float, image: float) -> None:
        if not (math.isfinite(text) and math.isfinite(image)):
            raise UserError(f"guidance scales must be finite numbers, got text_guidance={text}, image_guidance={image}")
        self.text, self.image = float(text), float(image)
        coefficients = {TEXT_AND_IMAGE: self.text, IMAGE: self.image - self.text, NEITHER: 1 - self.image}
        self.coefficients = {name: value for name, value in coefficients.items() if value != 0}

    @property
    def passes(self) -> tuple[str, ...]:
        """The predictions that are needed, in the order of `conditions`, `repeat` and `combine`."""
        return tuple(self.coefficients)

    def conditions(
        self, image: Mapping[str, Tensor], text: Mapping[str, Tensor], null_text: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The network's conditions for all passes as one batch, (passes * B, ...) for each (B, ...).

        image: replaced by zeros where there is no image. text, null_text: the same names in both.
        """
        images = {
            name: torch.cat([torch.zeros_like(value) if this == NEITHER else value for this in self.passes])
            for name, value in image.items()
        }
        texts = {
            name: torch.cat([value if this == TEXT_AND_IMAGE else null_text[name] for this in self.passes])
            for name, value in text.items()
        }
        return images | texts

    def repeat(self, values: Tensor) -> Tensor:
        """(B, ...) -> (passes * B, ...), the same for each pass."""
        return torch.cat([values] * len(self.passes))

    def combine(self, predictions: Tensor, timestep: Tensor | None = None) -> Tensor:
        """(passes * B, ...) -> (B, ...), the same at every timestep."""
        parts = dict(zip(self.passes, predictions.chunk(len(self.passes)), strict=True))
        if len(parts) == 3:  # in this order of summation it is bit-equal to diffusers' pipeline
            whole, image, neither = parts.values()
            return neither + self.text * (whole - image) + self.image * (image - neither)
        if len(parts) == 1:  # its coefficient is 1, since all three sum to 1
            return predictions
        first, second = parts.values()  # a first + (1 - a) second
        return second + self.coefficients[self.passes[0]] * (first - second)
