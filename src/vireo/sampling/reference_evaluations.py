"""Whether a network looks at its references, and whether it is still the base without them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vireo.diffusion.latent_masks import latent_mask
from vireo.errors import UserError
from vireo.randomness import Draws
from vireo.sampling.columns import Remembered
from vireo.sampling.evaluation import Evaluated
from vireo.sampling.reference_measures import flow_errors, with_references_of, without_references
from vireo.sampling.reference_videos import ReferenceSampler

TIMESTEPS = (100.0, 300.0, 500.0, 700.0, 900.0)  # 1000 sigma


class ReferenceGain:
    """The flow's error at fixed noise with the right references, with those of another clip, and with none.

    The quickest proof that references are used: errors with wrong ones are larger, and nothing but the references has
    changed. Rows: {"timestep", "region", "right", "other", "none", "gain_over_other", "gain_over_none", "clips"}, means
    over the clips; the gains are 0 before the first step. region: "frame", and "subject", inside the batch's
    `subject_mask`, where there is one. A row with timestep "all" is the mean over the timesteps.

    clips: how many of the held-out clips, from the first; None: all. Another clip is the next one, in turn.
    timesteps: 1000 sigma. batch_size: clips at a time.
    """

    def __init__(self, clips: int | None = 64, timesteps: Sequence[float] = TIMESTEPS, batch_size: int = 4) -> None:
        if not timesteps or not all(0 < timestep <= 1000 for timestep in timesteps):
            raise UserError(f"timesteps of a reference gain are 1000 sigma, in (0, 1000]; got {list(timesteps)}")
        self.clips, self.timesteps, self.batch_size = clips, list(timesteps), batch_size

    @torch.no_grad()
    def __call__(self, given: Evaluated) -> Sequence[Mapping[str, Any]]:
        """See `vireo.sampling.evaluation.Evaluation`. Raises UserError for a sampler without references."""
        network, encoder, stream, device = given.network, given.encoder, given.stream, given.device
        sampler, indices = _reference_sampler(given.sampler), list(given.indices)[: self.clips]
        if len(indices) < 2:
            raise UserError("a reference gain needs two held-out clips at least, to take the references of another")
        found: dict[tuple[Any, str], dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        others = [*indices[1:], indices[0]]
        for start in range(0, len(indices), self.batch_size):
            some, their = (
                _encoded(stream, encoder, s[start : start + self.batch_size], device) for s in (indices, others)
            )
            draws = Draws(stream.seed, some["position"], device)
            right = {name: some[name] for name in sampler.inputs}
            cases = {"right": right, "other": with_references_of(right, their), "none": without_references(right)}
            regions: dict[str, Tensor | None] = {"frame": None}
            if "subject_mask" in some:
                regions["subject"] = latent_mask(some["subject_mask"], some["latents"])
            for timestep in self.timesteps:
                for region, mask in regions.items():
                    for case, conditions in cases.items():
                        errors = flow_errors(
                            network, sampler.noise_schedule, some["latents"], draws, timestep, conditions, mask
                        )
                        found[timestep, region][case].append(errors)
                        found["all", region][case].append(errors)
        rows = []
        for (timestep, region), cases_of in sorted(found.items(), key=lambda entry: entry[0][0] == "all"):
            means = {case: float(torch.cat(errors).mean()) for case, errors in cases_of.items()}
            gains = {f"gain_over_{case}": means[case] - means["right"] for case in ("other", "none")}
            rows.append({"timestep": timestep, "region": region, **means, **gains, "clips": len(indices)})
        return rows


class BasePreservation:
    """How far the network without references is from the base that training began with.

    It is 0 at any step, unless parts of the base learnt (the fused path, a LoRA). Rows: {"timestep", "largest",
    "relative"}: the largest difference of a prediction and the norm of the differences over the norm of the base's.

    clips, timesteps: as for `ReferenceGain`. The base is loaded once more, beside the network.
    """

    def __init__(self, clips: int | None = 4, timesteps: Sequence[float] = (500.0,)) -> None:
        self.clips, self.timesteps = clips, list(timesteps)

    @torch.no_grad()
    def __call__(self, given: Evaluated) -> Sequence[Mapping[str, Any]]:
        """See `vireo.sampling.evaluation.Evaluation`. Raises UserError for a network that is not made around a base."""
        network: Any = given.network
        if not hasattr(network, "base"):
            raise UserError(f"a {type(network).__name__} has no base to compare with: take base out of the evaluations")
        sampler, own, base = _reference_sampler(given.sampler), network.transformer, network.base()
        found: dict[float, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for index in list(given.indices)[: self.clips]:
            batch = _encoded(given.stream, given.encoder, [index], given.device)
            conditions = without_references({name: batch[name] for name in sampler.inputs})
            draws = Draws(given.stream.seed, batch["position"], given.device)
            noise = draws.normal("noise", *batch["latents"].shape[1:])
            for timestep in self.timesteps:
                times = noise.new_full((1,), timestep)
                noisy = sampler.noise_schedule.add_noise(batch["latents"].float(), noise, times)
                predictions = []
                for transformer in (own, base):
                    network.transformer = transformer
                    try:
                        predictions.append(network(noisy, times, **conditions).float())
                    finally:
                        network.transformer = own
                found[timestep].append((predictions[0], predictions[1]))
        return [
            {
                "timestep": timestep,
                "largest": max(float((one - other).abs().max()) for one, other in pairs),
                "relative": float(
                    torch.stack([(one - other).square().sum() for one, other in pairs]).sum().sqrt()
                    / torch.stack([other.square().sum() for _, other in pairs]).sum().sqrt()
                ),
            }
            for timestep, pairs in found.items()
        ]


def _reference_sampler(sampler: Any) -> ReferenceSampler:
    sampler = sampler.sampler if isinstance(sampler, Remembered) else sampler
    if not isinstance(sampler, ReferenceSampler):
        raise UserError(
            f"this evaluation needs a sampler of vireo.sampling.reference_videos, got {type(sampler).__name__}: remove "
            "it from model.evaluations"
        )
    return sampler


def _encoded(stream: Any, encoder: Any, indices: Sequence[int], device: torch.device) -> dict[str, Any]:
    batch = stream.batch(list(indices), device)
    return encoder(batch, Draws(stream.seed, batch["position"], device))
