"""Lengths that Wan can encode."""

import pytest

from vireo.errors import UserError
from vireo.models.wan_lengths import check_length


def accepted(group):
    lengths = []
    for num_frames in range(-3, 84):
        try:
            check_length(num_frames, group)
            lengths.append(num_frames)
        except UserError:
            pass
    return lengths


def test_causal_groups_take_what_the_recipe_lists():
    assert accepted(3) == [9, 21, 33, 45, 57, 69, 81]


def test_without_groups():
    assert accepted(None) == list(range(1, 84, 4))


@pytest.mark.parametrize(
    ("num_frames", "group", "says"), [(49, 3, "33, 45, 57, 69"), (13, 3, "9, 21"), (20, None, "17, 21")]
)
def test_the_message_names_legal_lengths(num_frames, group, says):
    with pytest.raises(UserError, match=says):
        check_length(num_frames, group)
