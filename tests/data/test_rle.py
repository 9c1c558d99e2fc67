import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vireo.data import rle


@given(arrays.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_a_mask_comes_back(mask):
    assert (rle.decode(rle.encode(mask), *mask.shape) == mask).all()


@pytest.mark.parametrize(
    ("counts", "mask"),
    [
        ("4", [[0, 0], [0, 0]]),
        ("04", [[1, 1], [1, 1]]),
        ("121", [[0, 1], [1, 0]]),  # down the columns: 0, 1 | 1, 0
        ("1110", [[0, 0], [1, 1]]),  # the fourth run is 1 + 0
        ("01100", [[1, 1], [0, 0]]),  # the fourth 1 + 0, the fifth 1 + 0
    ],
)
def test_runs_go_down_the_columns(counts, mask):
    assert rle.decode(counts, 2, 2).astype(int).tolist() == mask
    assert rle.encode(np.array(mask, bool)) == counts


def test_long_runs_take_several_characters():
    mask = np.zeros((100, 100), bool)
    mask[3, 77] = True
    assert len(rle.encode(mask)) > 3
    assert (rle.decode(rle.encode(mask), 100, 100) == mask).all()


@pytest.mark.parametrize(
    ("counts", "says"),
    [("3", "3 pixels"), ("", "no COCO"), ("Q", "no COCO"), ("é", "no COCO"), ("1O11", "no COCO|cover")],
)
def test_what_is_no_mask_is_refused(counts, says):
    with pytest.raises(ValueError, match=says):
        rle.decode(counts, 2, 2)
