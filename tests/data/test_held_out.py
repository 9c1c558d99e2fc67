import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vireo.data.held_out import held_out_names
from vireo.errors import UserError

names = st.text("abcdefgh/", min_size=1, max_size=8)
sets = st.sets(names, max_size=40)
fractions = st.floats(0.001, 0.999)
MANY = [f"{k:05d}.mp4" for k in range(2000)]


@given(sets, fractions)
def test_there_is_something_to_train_on_and_something_to_validate_on(all_names, fraction):
    held_out = held_out_names(all_names, fraction, None)
    assert held_out <= all_names
    if len(all_names) >= 2:
        assert 1 <= len(held_out) < len(all_names)
    else:
        assert not held_out


@settings(deadline=None, max_examples=30)
@given(sets, sets, fractions)
def test_clips_added_later_move_none(before, added, fraction):
    """Unless a set was so small that one clip had to be held out, or kept, against its hash."""
    (lowest,) = held_out_names(MANY, 1e-9, None)
    (highest,) = set(MANY) - held_out_names(MANY, 1 - 1e-9, None)
    below = {name for name in before if name in held_out_names({name, lowest, highest}, fraction, None)}
    if below and below != before:
        assert held_out_names(before, fraction, None) == below
        assert held_out_names(before | added, fraction, None) & before == below


def test_nothing_is_held_out_if_not_asked_for():
    assert held_out_names(MANY, 0, None) == set()


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_the_share_is_about_the_fraction(fraction):
    assert len(held_out_names(MANY, fraction, None)) / len(MANY) == pytest.approx(fraction, abs=0.03)


def test_the_choice_never_changes():
    """Recorded: another hash would put clips that old runs were trained on into new runs' validation."""
    recorded = ["00000.mp4", "00002.mp4", "00017.mp4"]
    assert sorted(held_out_names(MANY[:20], 0.1, None)) == recorded


CLIPS = ["a/1.mp4", "a/2.mp4", "b/1.mp4", "bb/1.mp4"]


def test_a_folder(tmp_path):
    for name in CLIPS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert held_out_names(CLIPS, "b", tmp_path) == {"b/1.mp4"}
    assert held_out_names(CLIPS, "a/", tmp_path) == {"a/1.mp4", "a/2.mp4"}
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="none of the clips lies in .*c"):
        held_out_names(CLIPS, "c", tmp_path)
    with pytest.raises(UserError, match="holds out all 2 clips"):
        held_out_names(CLIPS[:2], "a", tmp_path)


def test_a_list_file(tmp_path):
    file = tmp_path / "val.txt"
    file.write_text("# for validation\na/2.mp4\n\n  bb/1.mp4 \nbad.mp4\n")
    for rule in (str(file), "val.txt"):
        assert held_out_names(CLIPS, rule, tmp_path, unusable=["bad.mp4"]) == {"a/2.mp4", "bb/1.mp4"}
    with pytest.raises(UserError, match=r"val\.txt lists clips that are not in .*:\n  line 5: bad\.mp4"):
        held_out_names(CLIPS, "val.txt", tmp_path)
    file.write_text("# nothing\n")
    with pytest.raises(UserError, match="lists no clip"):
        held_out_names(CLIPS, "val.txt", tmp_path)
    file.write_text("\n".join(CLIPS))
    with pytest.raises(UserError, match="holds out all 4 clips"):
        held_out_names(CLIPS, "val.txt", tmp_path)
    with pytest.raises(UserError, match="expected a fraction, a folder in .*, or a list file"):
        held_out_names(CLIPS, "nothing.txt", tmp_path)
