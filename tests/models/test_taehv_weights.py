"""Weights files: what is read, what is refused and how it is said."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vireo.errors import UserError
from vireo.models.taehv import TAEHV
from vireo.models.taehv_variants import VARIANTS
from vireo.models.taehv_weights import describe, read

SMALL = {"encoder_width": 8, "decoder_widths": (16, 12, 8, 4), "num_memblocks": 1}


def small(variant="taew2_1", seed=0, **arguments):
    torch.manual_seed(seed)
    return TAEHV(variant, **{**SMALL, **arguments})


def same(a, b):
    return list(a.state_dict()) == list(b.state_dict()) and all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_dict_tells_its_network(variant):
    with torch.device("meta"):
        released, reduced = TAEHV(variant), small(variant, num_memblocks=2)
    known = VARIANTS[variant]
    found = describe(released.state_dict())
    for fact in ("patch_size", "latent_channels", "block", "time_downscale", "time_upscale"):
        assert found[fact] == getattr(known, fact)
    assert (found["encoder_width"], found["num_memblocks"]) == (64, 3)
    found = describe(reduced.state_dict())
    assert (found["encoder_width"], found["num_memblocks"]) == (8, 2)
    assert found["decoder_widths"] == (16, 12, 8, 4)


@pytest.mark.parametrize("variant", ["taecvx", "taew2_2_super", "taeltx2_3_wide"])
def test_what_is_exported_reads_back(variant, tmp_path):
    network = small(variant)
    [file] = network.export(tmp_path / "export", network.state_dict())
    assert file == tmp_path / "export" / f"{variant}.safetensors"
    for weights in (file, file.with_suffix(""), file.parent):
        assert same(small(variant, seed=1, weights=str(weights)), network)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["variant"] == variant
    assert json.loads(metadata["decoder_widths"]) == [16, 12, 8, 4]


@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "step": 3}]
)
def test_pth_with_and_without_wrapping_in_half_precision(wrap, tmp_path):
    network = small().half().float()
    torch.save(wrap(network.half().state_dict()), tmp_path / "my.checkpoint.pth")
    loaded = small(seed=1, weights=str(tmp_path / "my.checkpoint"))
    assert same(loaded, network.float())
    assert next(loaded.parameters()).dtype == torch.float32


def test_a_preview_takes_the_last_frames_rows_of_full_weights(tmp_path):
    full = small("taew2_1")
    full.export(tmp_path / "full", full.state_dict())
    preview = small(decoder_time_upscale=(False,) * 3, weights=str(tmp_path / "full"))
    taken, given = preview.state_dict(), full.state_dict()
    for index, width in [(9, 12), (13, 8)]:  # the two layers that double the frame rate
        name = f"decoder.{index}.conv.weight"
        assert torch.equal(taken.pop(name), given.pop(name)[-width:])
    assert taken.keys() == given.keys()
    assert all(torch.equal(taken[name], given[name]) for name in taken)
    assert preview.decode(full.encode(torch.rand(1, 16, 3, 16, 16))).shape == (1, 4, 3, 16, 16)

    preview.export(tmp_path / "preview", preview.state_dict())
    with pytest.raises(UserError, match=r"time_upscale is \(False, False, False\), not \(False, True, True\)"):
        small(weights=str(tmp_path / "preview"))


def refused(words, **arguments):
    with pytest.raises(UserError, match=words):
        small(**arguments)


def test_a_missing_file_names_where_it_was_looked_for(tmp_path):
    refused(rf"{tmp_path}/taecvx.safetensors, {tmp_path}/taecvx.pth", weights=str(tmp_path / "taecvx"))
    refused(rf"looked for {tmp_path}/taecvx.pth\.", weights=str(tmp_path / "taecvx.pth"))
    refused(rf"{tmp_path}/taew2_1.safetensors", weights=str(tmp_path))


def test_another_variants_shapes_name_both(tmp_path):
    other = small("taew2_2")
    torch.save(other.state_dict(), tmp_path / "taew2_1.pth")
    refused(
        "network, which is variant taew2_1: patch_size is 2, not 1; latent_channels is 48, not 16.*variant taew2_2",
        weights=str(tmp_path / "taew2_1"),
    )


def test_the_metadata_tells_variants_of_equal_shape_apart(tmp_path):
    network = small("taecvx")
    [file] = network.export(tmp_path, network.state_dict())
    refused("metadata says variant taecvx, the network is variant taew2_1", weights=str(file))


def test_other_widths_name_them(tmp_path):
    network = small(decoder_widths=(16, 8, 8, 8), num_memblocks=2)
    network.export(tmp_path, network.state_dict())
    words = r"decoder_widths is \(16, 8, 8, 8\), not \(16, 12, 8, 4\); num_memblocks is 2, not 1"
    refused(words, weights=str(tmp_path))


def test_loading_is_strict(tmp_path):
    state = small().state_dict()
    torch.save({**state, "decoder.99.bias": torch.zeros(3)}, tmp_path / "more.pth")
    refused("decoder.99.bias", weights=str(tmp_path / "more.pth"))
    del state["encoder.0.bias"]
    torch.save(state, tmp_path / "less.pth")
    refused("encoder.0.bias", weights=str(tmp_path / "less.pth"))
    save_file({"first.weight": torch.zeros(3)}, tmp_path / "else.safetensors")
    refused("not the weights of a TAEHV", weights=str(tmp_path / "else"))


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_code_in_a_pickle_is_not_run(tmp_path):
    torch.save({"state_dict": small().state_dict(), "trap": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    refused("not loaded since they can run code", weights=str(tmp_path / "trap.pth"))
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "trap.pth", weights_only=False)
    assert (tmp_path / "sprung").exists()  # the trap works


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x80\x02garbage" * 20])
def test_damaged_files(content, suffix, tmp_path):
    file = tmp_path / f"taew2_1{suffix}"
    file.write_bytes(content)
    refused("cannot be read as weights", weights=str(file))


def test_something_else_than_tensors(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        read(tmp_path / "list.pth")
