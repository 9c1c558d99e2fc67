"""Weights of Wan transformers in files and folders: diffusers' layout, Wan's own names, LongLive's and the published.

Wan's own names (https://github.com/Wan-Video/Wan2.1) are those of native checkpoints and of LongLive
(https://github.com/NVlabs/LongLive): `{"generator": {"model.blocks.0.self_attn.q.weight": …}}`. In checkpoints of the
published recipe the text's keys and values are called `k_fused` and so on; they are the base's.
"""

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vireo import tensor_files
from vireo.errors import UserError
from vireo.models import saved_networks

log = logging.getLogger(__name__)

KEY = "model.network.transformer"
CONTAINERS = ("generator", "generator_ema", "model", "generator_lora", "critic")  # of files that hold more than weights

# Wan's own name to diffusers', for whole modules and for lone parameters.
ROOT = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "patch_embedding": "patch_embedding",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "clip_proj": "clip_proj",
    "vae_proj": "vae_proj",
}
BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",  # the one before cross-attention, whose number differs
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{name}": f"attn1.to_{name}" for name in "qkv"},
    **{f"cross_attn.{name}": f"attn2.to_{name}" for name in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    **{f"self_attn.{name}": f"attn1.{name}" for name in ("norm_q", "norm_k")},
    **{f"cross_attn.{n}": f"attn2.{n}" for n in ("norm_q", "norm_k", "k_vae", "v_vae", "norm_k_vae", "clip_gate")},
}
FUSED = {
    "cross_attn.k_fused": "attn2.to_k",
    "cross_attn.v_fused": "attn2.to_v",
    "cross_attn.norm_k_fused": "attn2.norm_k",
}


def to_diffusers(name: str) -> str:
    """A parameter's name as diffusers has it; unknown ones, and those that are diffusers' already, stay."""
    return _renamed(name, ROOT, {**BLOCK, **FUSED})


def to_published(name: str) -> str:
    """A parameter's name in a checkpoint of the published recipe, without its prefix, from diffusers'."""
    own = {**{theirs: ours for ours, theirs in BLOCK.items()}, **{theirs: ours for ours, theirs in FUSED.items()}}
    return _renamed(name, {theirs: ours for ours, theirs in ROOT.items()}, own)


def read(path: Path, container: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file under diffusers' names, on the CPU.

    path: `.safetensors`, or `.pt` and `.pth`, of which only tensors are read. A pickled file may hold more than one
    state: container names the one that is meant ("generator_ema"), by default the first of generator, generator_ema
    and model that there is. Raises UserError for a file that is none of this.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    if path.suffix not in (*tensor_files.PICKLED, ".safetensors"):
        raise UserError(f"{path}: weights are read from .safetensors, .pt or .pth")
    state, _ = tensor_files.read(path)
    state = state if path.suffix == ".safetensors" else _contained(path, state, container)
    return {to_diffusers(_bare(name)): value for name, value in state.items()}


def save_published(path: Path, state: Mapping[str, Tensor]) -> Path:
    """Write {"generator": …} as the published recipe reads it; state: all parameters, under diffusers' names.

    Gates have no place in its formula, where all are 1: they are written, its loader passes over them, and others are
    told of.
    """
    gates = torch.cat([value.float().flatten().cpu() for name, value in state.items() if name.endswith("clip_gate")])
    if not torch.equal(gates, torch.ones_like(gates)):
        says = "%s: the published code knows no clip_gate, its output will differ: they are %.3g to %.3g, not 1"
        log.warning(says, path, gates.min(), gates.max())
    generator = {f"model.{to_published(name)}": value.detach().cpu().contiguous() for name, value in state.items()}
    torch.save({"generator": generator}, path)
    return path


def load_transformer(
    folder: str,
    generator: str | None,
    generator_key: str | None,
    lora: str | None,
    lora_alpha: float,
    dtype: torch.dtype,
) -> Any:
    """A diffusers WanTransformer3DModel on the CPU; arguments as of `WanReferences`.

    What diffusers keeps in float32 stays so in every dtype. Raises UserError for a folder or file that does not suit,
    and for tensors that are missing or of no use.
    """
    from diffusers import WanTransformer3DModel

    place, config = saved_networks.find_config(folder, "transformer", KEY)
    if config.get("_class_name") != "WanTransformer3DModel":
        raise UserError(
            f"{place} holds a {config.get('_class_name')}, not a WanTransformer3DModel. Set {KEY} to the folder of a "
            "text-to-video pipeline of Wan 2.1, such as Wan2.1-T2V-1.3B-Diffusers."
        )
    if generator is None and lora is None:
        part = saved_networks.find(folder, "transformer", KEY)
        return saved_networks.load(part, WanTransformer3DModel, dtype)
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        made = WanTransformer3DModel.from_config(config)
    own = made.state_dict()
    if generator is None:
        part = saved_networks.find(folder, "transformer", KEY)
        state, source = saved_networks.tensors(part), part.folder
    else:
        source = Path(generator).expanduser()
        state = read(source, generator_key)
    if any(".k_vae." in name for name in state):
        raise UserError(
            f"{source} has the modules of the references in it: it is no base. Start from it with init_from={source}, "
            "and set model.network.generator to what it was trained from, or to null."
        )
    compare(state, own, own.keys(), source)
    if lora is not None:
        state = merged(state, Path(lora).expanduser(), lora_alpha)
    whole = set(made._keep_in_fp32_modules)
    kept = {name: torch.float32 if whole & set(name.split(".")) else dtype for name in state}
    made.load_state_dict({name: value.to(kept[name], copy=True) for name, value in state.items()}, assign=True)
    return made.eval()


def compare(found: Mapping[str, Tensor], own: Mapping[str, Tensor], needed: Collection[str], source: Path) -> None:
    """Raise UserError, with names, unless `found` has all that is needed and nothing that `own` has not."""
    faults = [f"  {name}: missing" for name in sorted(needed - found.keys())]
    faults += [f"  {name}: not used by this network" for name in sorted(found.keys() - own.keys())]
    for name in sorted(found.keys() & own.keys()):
        if found[name].shape != own[name].shape:
            faults.append(f"  {name}: {tuple(found[name].shape)}, here {tuple(own[name].shape)}")
    if faults:
        more = f"\n  … and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise UserError(f"{source} does not fit (names as in diffusers):\n" + "\n".join(faults[:20]) + more)


def merged(state: Mapping[str, Tensor], path: Path, alpha: float) -> dict[str, Tensor]:
    """Weights with a LoRA added to them: W + alpha / rank B A (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    state: under diffusers' names. path: a file with lora_A.weight and lora_B.weight of linear layers, in peft's layout
    under either kind of names. Raises UserError for a LoRA of other layers.
    """
    lora = {name.replace(".default.", "."): value for name, value in read(path, "generator_lora").items()}
    result, used = dict(state), set()
    for name, down in lora.items():
        layer, found, _ = name.partition(".lora_A.")
        up = lora.get(f"{layer}.lora_B.weight")
        weight = result.get(f"{layer}.weight")
        if found and up is not None and weight is not None and weight.shape == (up.shape[0], down.shape[1]):
            change = alpha / down.shape[0] * (up.float() @ down.float())
            result[f"{layer}.weight"] = weight.float() + change
            used |= {name, f"{layer}.lora_B.weight"}
    if unused := sorted(lora.keys() - used):
        raise UserError(f"{path}: {len(unused)} tensors of this LoRA fit no layer, such as {', '.join(unused[:5])}")
    return result


def _contained(path: Path, content: Mapping[str, Any], container: str | None) -> dict[str, Tensor]:
    wanted = CONTAINERS if container is None else (container,)
    inner = next((content[name] for name in wanted if isinstance(content.get(name), dict)), dict(content))
    others = [name for name, value in inner.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(
            f"{path} has no weights under {', '.join(wanted)}; it has {', '.join(map(str, list(content)[:8]))}"
        )
    return inner


def _bare(name: str) -> str:
    """Without what wrappers put before names."""
    return re.sub(r"^(base_model\.model\.|module\.|model\.)+", "", name.replace("_fsdp_wrapped_module.", ""))


def _renamed(name: str, root: Mapping[str, str], block: Mapping[str, str]) -> str:
    match = re.match(r"(blocks\.\d+\.)(.+)", name)
    before, inner, table = (match[1], match[2], block) if match else ("", name, root)
    for old, new in table.items():
        if inner == old or inner.startswith(f"{old}."):
            return before + new + inner[len(old) :]
    return name
