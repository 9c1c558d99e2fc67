"""The generic Model, Dataset and Loss objects of a run, made from its resolved config.

`_target_` names a class, the other keys are its arguments; nothing here knows which recipe it builds.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vireo import config, weights
from vireo.cache import Cache
from vireo.data.stream import Dataset
from vireo.errors import UserError
from vireo.freezing import FreezePolicy
from vireo.losses.objective import Loss
from vireo.models.encoders import Encoder
from vireo.models.network import Network
from vireo.randomness import seed_default
from vireo.sampling.evaluation import Evaluation
from vireo.sampling.sampler import Sampler
from vireo.schedules import Schedule
from vireo.strategies.strategy import Strategy
from vireo.tracking import Tracker

Settings = dict[str, Any]


def strategy(settings: Settings) -> Strategy:
    return config.instantiate(
        settings["strategy"], precision=settings["precision"], timeout=settings["launcher"]["timeout"]
    )


def dataset(settings: Settings, split: str) -> Dataset:
    """The training or the held-out part ("train", "validation") of the run's data."""
    return config.instantiate(settings["data"], split=split)


def encoder(settings: Settings) -> Encoder:
    return config.instantiate(settings["model"]["encoder"])


def cache(settings: Settings, encoder: Encoder) -> Cache | None:
    """The encoder's part of the cache, if the run has one."""
    node = settings["cache"]
    if not node["enabled"]:
        return None
    return Cache.of(encoder, Path(node["folder"]).expanduser().absolute(), node["memory"])


def loss(settings: Settings) -> Loss:
    """The objective; initial weights of a learner that it owns are keyed by the seed, as the network's are."""
    seed_default(settings["seed"], "init", "loss")
    return config.instantiate(settings["loss"])


def sampler(settings: Settings) -> Sampler:
    return config.instantiate(settings["model"]["sampler"])


def evaluations(settings: Settings) -> dict[str, Evaluation]:
    return {
        name: config.instantiate(node) for name, node in (settings["model"].get("evaluations") or {}).items() if node
    }


def network(settings: Settings) -> Network:
    """The network with its weights: the model's own, then `init_from`, then the adapter that is added to it.

    Weights of an adapter can only be taken in once there is one; all others come first, since it is made for them.
    Initial weights are keyed by the seed and drawn on the CPU, so they are the same on every rank.
    """
    seed_default(settings["seed"], "init", "network")
    made: Network = config.instantiate(settings["model"]["network"])
    source = weights.initial(settings["init_from"]) if settings["init_from"] else None
    has_adapter = source is not None and bool(settings["adapter"]) and weights.has_adapter(source)
    if source is not None and not has_adapter:
        weights.initialize_from(made, source)
    if settings["adapter"]:
        seed_default(settings["seed"], "init", "adapter")
        config.instantiate(settings["adapter"])(made)
    if source is not None and has_adapter:
        if settings["adapter"].get("weights"):
            raise UserError("init_from and adapter.weights both name an adapter's weights: leave one of them out.")
        weights.initialize_from(made, source)
    return made


def freeze_policy(settings: Settings) -> FreezePolicy:
    return config.instantiate(settings["freeze_policy"])


def optimizer(settings: Settings) -> Callable[..., torch.optim.Optimizer]:
    """Called with parameter groups and lr."""
    return config.instantiate(settings["optimizer"])


def schedule(settings: Settings) -> Schedule:
    return config.instantiate(settings["schedule"])


def tracker(settings: Settings) -> Tracker | None:
    return config.instantiate(settings["tracker"]) if settings["tracker"] else None
