"""Too long clips are refused before anything heavy is imported."""

import pytest

from vireo import config
from vireo.errors import UserError
from vireo.models.motion_lengths import check_num_frames


def test_as_many_frames_as_there_are_places():
    check_num_frames(32)
    with pytest.raises(UserError, match="33 frames are too many"):
        check_num_frames(33)


def test_the_second_stage_asks():
    [problem] = config.problems(["experiment=diffueraser_stage2", "num_frames=40"])
    assert "40 frames are too many" in problem.message
    assert config.problems(["experiment=diffueraser_stage1", "num_frames=40"]) == []
