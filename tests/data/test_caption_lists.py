import pytest

from tests.data import captions
from vireo.data import caption_lists
from vireo.errors import UserError

BOTH = {"prompts": None, "videos": None}


@pytest.fixture
def root(tmp_path):
    """Three files that are there, and lists of them."""
    (tmp_path / "videos").mkdir()
    for name in "abc":
        (tmp_path / "videos" / f"{name}.mp4").touch()
    captions.write_list(tmp_path / "prompts.txt", ["one", "two", "three"])
    captions.write_list(tmp_path / "videos.txt", [f"videos/{name}.mp4" for name in "abc"])
    return tmp_path


def read(root, **options):
    return caption_lists.read(root, BOTH, **options)


def test_lines_of_equal_number_belong_together(root):
    lists = read(root)
    assert len(lists) == 3 and not lists.problems
    assert lists.files["prompts"].lines == ["one", "two", "three"]
    assert lists.files["videos"].file(1) == root / "videos" / "b.mp4"


@pytest.mark.parametrize("alias", ["prompt.txt", "captions.txt", "caption.txt"])
def test_other_names_of_published_datasets(root, alias):
    (root / "prompts.txt").rename(root / alias)
    (root / "videos.txt").rename(root / "video.txt")
    assert len(read(root)) == 3
    captions.write_list(root / "prompts.txt", ["one", "two", "three"])
    with pytest.raises(UserError, match=rf"prompts.txt and {alias}: say which one by data.prompts=<name>"):
        read(root)
    assert len(caption_lists.read(root, {"prompts": alias, "videos": "video.txt"})) == 3
    with pytest.raises(UserError, match="data.videos=clips.txt: there is no such file"):
        caption_lists.read(root, {"prompts": alias, "videos": "clips.txt"})


def test_paths_start_at_the_list_file(root):
    (root / "lists").mkdir()
    captions.write_list(root / "lists" / "mine.txt", [f"../videos/{name}.mp4" for name in "abc"])
    assert not caption_lists.read(root, {"prompts": None, "videos": "lists/mine.txt"}).problems


def test_blank_lines(root):
    captions.write_list(root / "videos.txt", ["videos/a.mp4", "", "videos/c.mp4", "", "  "])
    captions.write_list(root / "prompts.txt", ["one", " ", "three", ""])
    lists = read(root)
    assert len(lists) == 3, "those at the end are none"
    assert lists.problems == ["prompts.txt, line 2: blank", "videos.txt, line 2: blank"]
    assert read(root, empty_captions=True).problems == ["videos.txt, line 2: blank"]


def test_counts_that_differ_name_the_first_line_without_partner(root):
    captions.write_list(root / "prompts.txt", ["one", "two", "three", "four"])
    captions.write_list(root / "images.txt", ["videos/a.mp4", "videos/b.mp4"])
    problems = caption_lists.read(root, {**BOTH, "images": None}).problems
    assert problems == [
        "the lists differ in length: prompts.txt 4, videos.txt 3, images.txt 2; "
        "prompts.txt, line 3 ('three') has no partner in images.txt"
    ]


def test_files_that_are_missing_or_come_twice(root):
    (root / "videos" / "again.mp4").symlink_to(root / "videos" / "a.mp4")
    captions.write_list(root / "videos.txt", ["videos/a.mp4", "videos/x.mp4", "videos/again.mp4"])
    assert read(root).problems == [
        f"videos.txt, line 2: there is no file videos/x.mp4 in {root}",
        "videos.txt, line 3: videos/again.mp4 is the file of line 1 already",
    ]


def test_pictures_may_come_twice(root):
    captions.write_list(root / "images.txt", ["videos/a.mp4"] * 3)
    assert not caption_lists.read(root, {**BOTH, "images": None}).problems


def test_what_cannot_be_read_at_all(root, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        read(root / "nowhere")
    with pytest.raises(UserError, match=r"no captions in .*videos: expected prompts.txt or .* has a.mp4, b.mp4, c.mp4"):
        read(root / "videos")
    (root / "prompts.txt").write_bytes("eins\nzw\xf6lf".encode("latin-1"))
    with pytest.raises(UserError, match="prompts.txt, line 2: not UTF-8"):
        read(root)
    (root / "prompts.txt").write_text("\n\n")
    with pytest.raises(UserError, match="prompts.txt is empty"):
        read(root)


def test_a_byte_order_mark_and_line_ends_are_no_text(root):
    (root / "prompts.txt").write_bytes("\ufeffone\r\ntwo\u2028and a half\r\nthree\r\n".encode())
    assert read(root).files["prompts"].lines == ["one", "two\u2028and a half", "three"]
