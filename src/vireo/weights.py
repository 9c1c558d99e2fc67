"""Weights between a network, a checkpoint and what a run starts from."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vireo import checkpoint, lora, run_folder
from vireo.errors import UserError
from vireo.models.network import Network

log = logging.getLogger(__name__)


def trained_names(network: nn.Module) -> set[str]:
    """Trainable parameters, and the buffers of modules that own one: what changes while training."""
    names = set()
    for prefix, module in network.named_modules():
        own = list(module.named_parameters(recurse=False))
        if any(parameter.requires_grad for _, parameter in own):
            persistent = [
                n for n, _ in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set
            ]
            learned = [n for n, parameter in own if parameter.requires_grad]
            names |= {f"{prefix}.{name}" if prefix else name for name in [*learned, *persistent]}
    return names


def trained_state(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a full state that changes while training."""
    names = trained_names(network)
    return {name: value for name, value in state.items() if name in names}


def frozen_digest(network: nn.Module) -> str:
    """Hash of the names and values of all parameters that do not learn, which a checkpoint leaves out.

    A gigabyte takes about a second.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_frozen(found: checkpoint.Checkpoint, digest: str) -> None:
    """Raises UserError where a checkpoint was trained beside other frozen weights than those with this digest."""
    if found.state["frozen"] != digest:
        raise UserError(
            f"{found.folder} was trained beside other frozen weights than there are now: the files that the network or "
            "init_from names have changed since. Put them back, or start anew (resume=none, or another run=)."
        )


@torch.no_grad()
def load_trained(network: nn.Module, stored: Mapping[str, Tensor], source: Path) -> None:
    """Put a checkpoint's tensors into what the network trains; both sides must name the same tensors.

    Raises UserError with up to 20 differences: missing, unexpected, or of another shape.
    """
    own = network.state_dict()
    wanted = trained_names(network)
    problems = [f"  {name}: missing in the checkpoint" for name in sorted(wanted - stored.keys())]
    problems += [f"  {name}: not trained by this network" for name in sorted(stored.keys() - wanted)]
    for name in sorted(wanted & stored.keys()):
        if own[name].shape != stored[name].shape:
            problems.append(f"  {name}: {tuple(stored[name].shape)} stored, {tuple(own[name].shape)} here")
    if problems:
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"{source} does not fit the network:\n" + "\n".join(problems[:20]) + more)
    for name in wanted:
        own[name].copy_(stored[name])


def initial(init_from: str) -> checkpoint.Checkpoint | Path:
    """What `init_from` names: of a finished run its export, of another one the newest good checkpoint; a checkpoint;
    or an exported or released file or folder, which the network reads. Raises UserError where there is nothing.
    """
    path = run_folder.newest_stage(Path(init_from).expanduser())
    if not path.exists():
        raise UserError(f"init_from={path}: there is no such file or folder")
    if (path / "manifest.json").is_file():
        return checkpoint.verify(path)
    if run_folder.finished(path) and (path / "export").is_dir():
        return path / "export"
    if not (path / "checkpoints").is_dir():
        return path
    found = checkpoint.latest(path)
    if found is None:
        raise UserError(f"init_from={path}: this run has no checkpoint that can be read")
    return found


def has_adapter(source: checkpoint.Checkpoint | Path) -> bool:
    """Whether an adapter's weights are among those that `initial` found."""
    return lora.is_file(source if isinstance(source, Path) else source.folder / "network.safetensors")


def initialize_from(network: Network, source: checkpoint.Checkpoint | Path) -> None:
    """Take weights, and nothing else, from what `initial` found; of a checkpoint the averaged ones, if it has them.

    A checkpoint holds what learnt; what it leaves out has to be in the network as it was beside it. `requires_grad` is
    that of the checkpoint's run afterwards. Raises UserError for what does not fit.
    """
    network.initialized = True
    if isinstance(source, Path):
        network.load(source)
        log.info("weights from %s", source)
        return
    average = source.tensors("ema")
    stored = {**source.tensors("network"), **average}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in stored)
    load_trained(network, stored, source.folder)
    if frozen_digest(network) != source.state["frozen"]:
        left_out = next((name for name, p in network.named_parameters() if not p.requires_grad), "some frozen weights")
        raise UserError(
            f"{source.folder} holds what was trained, and this network is another one beside it: {left_out} and its "
            "like were not the same there. Start from an export, which has all that is needed: `vireo export "
            f"run={source.folder.parent.parent} step={source.step}`, and init_from=<the folder that it names>."
        )
    network.begin_with(stored.keys(), lambda: {**source.tensors("network"), **source.tensors("ema")})
    log.info("weights from %s%s", source.folder, " (averaged)" if average else "")
