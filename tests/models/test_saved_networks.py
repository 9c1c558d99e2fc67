"""Folders of weights: found, named by content, counted by their headers."""

import json

import pytest
import torch
from safetensors.torch import save_file

from vireo.errors import UserError
from vireo.models import saved_networks


def save(folder, *names, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"_class_name": "AutoencoderKL"}))
    for number, name in enumerate(names):
        save_file({f"weight{number}": torch.full((2, 3), float(number))}, folder / name)
    return folder


@pytest.mark.parametrize("name", saved_networks.WEIGHTS)
def test_a_network_is_found_in_its_folder_and_in_a_pipelines(tmp_path, name):
    save(tmp_path / "vae", name)
    for path in (tmp_path, tmp_path / "vae"):
        part = saved_networks.find(path, "vae", "key")
        assert part.folder == tmp_path / "vae" and part.weights == [tmp_path / "vae" / name]
    assert saved_networks.count(part.weights) == 6


def test_shards_are_found_by_their_index(tmp_path):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save(tmp_path, *shards)
    index = {"weight_map": {"a": shards[1], "b": shards[0], "c": shards[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    part = saved_networks.find(tmp_path, "text_encoder", "key")
    assert [file.name for file in part.weights] == shards and saved_networks.count(part.weights) == 12
    (tmp_path / shards[0]).unlink()
    with pytest.raises(UserError, match=f"lacks {shards[0]}"):
        saved_networks.find(tmp_path, "text_encoder", "key")


def test_the_name_is_the_contents(tmp_path):
    one = saved_networks.find(save(tmp_path / "a", "model.safetensors"), "vae", "key").identity()
    again = {"_class_name": "AutoencoderKL", "transformers_version": "9", "_diffusers_version": "8"}
    assert saved_networks.find(save(tmp_path / "b", "model.safetensors", config=again), "vae", "key").identity() == one
    other = {"_class_name": "AutoencoderKL", "act_fn": "relu"}
    assert saved_networks.find(save(tmp_path / "c", "model.safetensors", config=other), "vae", "key").identity() != one


def test_what_is_missing_is_told_with_the_key_to_set(tmp_path):
    with pytest.raises(UserError, match="model.encoder.vae=.* has no vae: .*huggingface-cli download"):
        saved_networks.find(tmp_path, "vae", "model.encoder.vae")
    save(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="beside config.json there is model.bin.*can run code"):
        saved_networks.find(tmp_path, "vae", "model.encoder.vae")


def test_weights_that_are_pieces_of_one_buffer_are_saved_each_by_itself(tmp_path):
    from diffusers import UNet2DModel

    network = UNet2DModel(
        block_out_channels=(4,), norm_num_groups=2, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    state, taken = network.state_dict(), 0
    buffer = torch.randn(sum(value.numel() for value in state.values()))
    for name, value in state.items():
        state[name] = buffer[taken : taken + value.numel()].view(value.shape)
        taken += value.numel()
    saved_networks.save(network, state, tmp_path)
    again = saved_networks.tensors(saved_networks.Part(tmp_path, {}, [tmp_path / saved_networks.WEIGHTS[0]]))
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
