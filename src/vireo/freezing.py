"""What learns: a freeze policy says by pattern which parameters of the network are trained."""

import re
from collections.abc import Mapping, Sequence

from torch import nn

from vireo.errors import UserError
from vireo.models.network import Network


class FreezePolicy:
    """Trains the parameters whose names match one of the patterns, but for the network's constants; freezes the others.

    What learns becomes float32, since updates would be rounded away in half precision; what is frozen stays as it is.

    train: regular expressions, searched in parameter names (`'^unet\\.'`, `'motion_modules'`). A pattern without a
    match is an error, since a misspelt one would silently train nothing, or everything.
    groups: named optimizer groups with a learning rate of their own, {name: {match: pattern, lr_scale: factor}};
    the first group that matches a parameter takes it, the rest form the group "default".
    """

    def __init__(self, train: Sequence[str], groups: Mapping[str, Mapping] | None = None) -> None:
        self.train = list(train)
        self.groups_by_name = dict(groups or {})

    def __call__(self, network: nn.Module) -> None:
        """Set `requires_grad` of every parameter, in place; see the class.

        Raises UserError for a pattern that matches nothing, and for what the network refuses (`check_trained`).
        """
        names = [name for name, _ in network.named_parameters()]
        for pattern in [*self.train, *(group["match"] for group in self.groups_by_name.values())]:
            if not any(re.search(pattern, name) for name in names):
                parts = sorted({".".join(name.split(".")[:2]) for name in names})
                raise UserError(
                    f"freeze_policy: the pattern {pattern!r} matches none of the network's {len(names)} parameters. "
                    f"Their names begin with {', '.join(parts[:12])}{', …' if len(parts) > 12 else ''}"
                )
        constants = network.constants() if isinstance(network, Network) else ()
        for name, parameter in network.named_parameters():
            matches = any(re.search(pattern, name) for pattern in self.train)
            parameter.requires_grad_(matches and name not in constants)
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if isinstance(network, Network):
            network.check_trained()

    def groups(self, network: nn.Module, lr: float) -> list[dict]:
        """Optimizer groups of the trained parameters: {name, lr, params: [(parameter name, parameter), …]}."""
        members: dict[str, list] = {name: [] for name in [*self.groups_by_name, "default"]}
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                matches = (g for g, rule in self.groups_by_name.items() if re.search(rule["match"], name))
                members[next(matches, "default")].append((name, parameter))
        if not any(members.values()):
            raise UserError("freeze_policy: nothing is left to train; every parameter of the network is frozen")
        scales = {name: float(rule.get("lr_scale", 1.0)) for name, rule in self.groups_by_name.items()}
        return [
            {"name": name, "lr": lr * scales.get(name, 1.0), "params": params}
            for name, params in members.items()
            if params
        ]

    def train_mode(self, network: nn.Module) -> None:
        """Training mode for what learns, evaluation mode for what is frozen.

        A module without parameters (dropout, activation) follows the module it stands in, so dropout inside a frozen
        part stays off and inside a trained part is on. Bare `network.train()` would switch it on everywhere.
        """
        _set_mode(network, True)


def _set_mode(module: nn.Module, inherited: bool) -> None:
    parameters = list(module.parameters())
    module.training = any(p.requires_grad for p in parameters) if parameters else inherited
    for child in module.children():
        _set_mode(child, module.training)


def parameter_table(network: nn.Module) -> str:
    """Lines of `part  trained / all parameters`, one for each top-level part, and the total."""
    rows = []
    for name, part in [*network.named_children(), ("total", network)]:
        counts = [(p.numel(), p.requires_grad) for p in part.parameters()]
        rows.append((name, sum(n for n, learns in counts if learns), sum(n for n, _ in counts)))
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}}  {trained:>14,} / {total:>14,}" for name, trained, total in rows)
