"""What every network that learns offers beside its forward."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from vireo.errors import UserError

if TYPE_CHECKING:
    from vireo.lora import LoRA

LORA = ".lora_"  # in the names of an adapter's parameters


class Network(nn.Module):
    """The one module that learns. It only predicts: it draws no noise and knows no loss, rank or config.

    Training calls it through its wrapper's `forward` alone, since nothing else is synchronised between processes.

    adapter: what was added to it and learns in its place, if anything. exports_adapter: whether `export` can write its
    file, and `load` read it; else exports are `whole`. initialized: whether it begins with weights of `init_from`.
    """

    adapter: "LoRA | None" = None
    initialized = False
    exports_adapter = False

    def whole(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The full `state` as it would be named without an adapter, whose updates are in the weights."""
        return state if self.adapter is None else self.adapter.merged(self, state)

    def called_in_parts(self) -> Collection[nn.Module]:
        """Modules whose parts are called one by one, their own forward never: sharding has to gather the parts."""
        return ()

    def figures(self) -> Mapping[str, Tensor]:
        """Detached scalars that are worth logging beside the loss's, of the last forward in training; by default none.

        They are read at logged steps only, and have the same names on all ranks.
        """
        return {}

    def begin_with(self, names: Collection[str], read: Callable[[], Mapping[str, Tensor]]) -> None:
        """Take note of parameters that were loaded, which `read` gives again, by names of this network's; by default
        nothing. For networks whose exports leave out what is in other files."""

    def constants(self) -> Collection[str]:
        """Names of parameters that no freeze policy trains."""
        return ()

    def check_trained(self) -> None:
        """Refuse (UserError) a choice of what learns that makes no sense, once it is made, or warn of it."""
        parts = [parameter for name, parameter in self.named_parameters() if LORA in name]
        if self.adapter is not None and not any(parameter.requires_grad for parameter in parts):
            raise UserError(
                "freeze_policy: nothing of the adapter learns, so it would change nothing. Choose "
                "freeze-policy=adapter, or new_modules_adapter where new modules learn too."
            )

    @abstractmethod
    def export(self, folder: Path, state: Mapping[str, Tensor]) -> list[Path]:
        """Write the full, unsharded `state` into `folder` in the ecosystem's format; returns the files or folders."""

    def try_export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Fail now where `export` would fail later; `folder` is thrown away. Files of others are only looked at."""
        self.export(folder, state)

    @abstractmethod
    def load(self, path: Path) -> None:
        """Take in what `export` wrote, by its folder, or the released weights it imitates. Strict; raises UserError."""
