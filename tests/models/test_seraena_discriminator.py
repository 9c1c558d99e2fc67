"""The discriminator's shape; the golden sets of the loss check its numbers."""

import json
from pathlib import Path

import pytest
import torch

from vireo.errors import UserError
from vireo.models.seraena_discriminator import SeraenaDiscriminator, for_taehv

GOLDEN = Path(__file__).parents[1] / "golden" / "taehv"


def test_the_references_keys_and_sizes():
    described = json.loads((GOLDEN / "seraena_c9.json").read_text())["state_dict"]
    network = SeraenaDiscriminator(9, 16)
    assert {f"disc.{name}": list(value.shape) for name, value in network.state_dict().items()} == described
    assert sum(p.numel() for p in network.parameters()) == 7_491_456
    assert sum(p.numel() for p in SeraenaDiscriminator(3, 4).parameters()) == 7_481_088


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("learning", [True, False])
def test_scores_of_any_batch_and_size(batch, learning):
    network = SeraenaDiscriminator(6, 4, width=2).train(learning)
    assert network(torch.rand(batch, 6, 24, 40), torch.randn(batch, 4, 3, 5)).shape == (batch, 6, 3, 5)


def test_the_context_counts_and_lies_under_its_pixels():
    torch.manual_seed(0)
    network = SeraenaDiscriminator(3, 1, width=4).eval()
    images, context = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 4, 4)
    before = network(images, context)[:, 0]
    context[..., 0, 0] = 1
    changed = (network(images, context)[:, 0] - before).abs() > 1e-6  # the first block sees one pixel around
    assert changed[0, 0, 0]
    assert not changed[0, 2:, 2:].any()


def test_a_variants_discriminator():
    network = for_taehv("taew2_2", group_frames=4, width=2)
    assert (network.image_channels, network.context_channels) == (12, 48)
    with pytest.raises(UserError, match="taew2_9"):
        for_taehv("taew2_9", group_frames=3)
