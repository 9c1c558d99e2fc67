"""A trained network for the verbs: of a run (newest or a given step, averaged weights), or from a foreign file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vireo import checkpoint, objects, weights
from vireo.data.given import Given
from vireo.data.stream import Stream
from vireo.errors import UserError
from vireo.mini import world
from vireo.models.encoders import Encoder
from vireo.models.network import Network
from vireo.strategies.strategy import in_precision, resolve_precision
from vireo.validation import SEED
from vireo.verbs.arguments import Arguments, whole


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def network(arguments: Arguments) -> tuple[Network, str]:
    """The network in evaluation mode on the device, computing in the run's `precision`, and a line that says where its
    weights are from.

    Own keys: `step` of the run, `weights` a file or folder that the network's `load` reads. Without a run and without
    weights, the network is what training would start from.
    """
    settings, folder, own = arguments
    if settings["size"] == "mini":
        world.ensure()
    if "weights" in own:
        settings = {**settings, "model": {**settings["model"], "network": {**settings["model"]["network"]}}}
        if "weights" in settings["model"]["network"]:
            settings["model"]["network"]["weights"] = None  # the foreign ones replace them
    made = objects.network(settings)
    about = "initial weights"
    if "weights" in own:
        path = Path(own["weights"])
        made.load(path)
        about = str(path)
    elif folder is not None:
        found = _checkpoint(folder, whole(own, "step", None))
        objects.freeze_policy(settings)(made)
        weights.check_frozen(found, weights.frozen_digest(made))
        weights.load_trained(made, {**found.tensors("network"), **found.tensors("ema")}, found.folder)
        about = f"{found.folder}{' (averaged)' if found.tensors('ema') else ''}"
    made.eval().requires_grad_(False).to(device())
    precision = resolve_precision(settings["precision"])
    made.forward = in_precision(made.forward, device(), precision)  # type: ignore[method-assign]
    return made, about


def held_out(settings: dict[str, Any], encoder: Encoder) -> Stream:
    """The clips that validation sees, by number; what the encoding cache has of them is not encoded again."""
    cache = objects.cache(settings, encoder)
    return Stream(objects.dataset(settings, "validation"), SEED, shuffle=False, cache=cache, keep_fields=True)


def by_hand(sample: Mapping[str, Any], count: int) -> Stream:
    """Versions of one sample that a person made; by number, as held-out clips."""
    return Stream(Given(sample, count), SEED, shuffle=False)


def _checkpoint(folder: Path, step: int | None) -> checkpoint.Checkpoint:
    if step is not None:
        if step not in checkpoint.steps(folder):
            raise UserError(f"{folder} has no checkpoint of step {step}; it has {checkpoint.steps(folder)}")
        return checkpoint.verify(checkpoint.folder_of(folder, step))
    found = checkpoint.latest(folder)
    if found is None:
        raise UserError(f"{folder} has no checkpoint that can be read")
    return found
