import json

import pytest

from vireo.data.listing import list_annotation, list_folder, shortened
from vireo.errors import UserError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")


def names(entries):
    return [entry.name for entry in entries]


def test_videos_are_found_in_all_folders(tmp_path):
    touch(tmp_path, "b.mp4", "a/2.MKV", "a/1.webm", "a/notes.txt", ".hidden/3.mp4", "a/._1.mp4", "first_frames/b.png")
    entries = list_folder(tmp_path)
    assert names(entries) == ["a/1.webm", "a/2.MKV", "b.mp4"]
    assert entries[0].path == tmp_path / "a" / "1.webm"
    assert entries[0].text is None


def test_without_videos_folders_of_frames_are_found(tmp_path):
    touch(tmp_path, "x/00000.jpg", "x/00001.jpg", "y/z/1.png", "y/notes.txt", "cover.png")
    assert names(list_folder(tmp_path)) == ["x", "y/z"]


def test_folders_of_frames_beside_videos_are_told(tmp_path, caplog):
    touch(tmp_path, "a/1.mp4", "a/1.jpg", "b.mp4", "b.jpg", "quiet/1.jpg", "quiet/.nomedia")
    assert names(list_folder(tmp_path)) == ["a/1.mp4", "b.mp4"] and not caplog.text, "thumbnails need no word"
    touch(tmp_path, "masks/boat/1.png")
    assert names(list_folder(tmp_path)) == ["a/1.mp4", "b.mp4"] and not caplog.text, "nor what lies elsewhere"
    touch(tmp_path, "bear/00000.jpg", "bear/00001.jpg", "a/boat/1.png")
    assert names(list_folder(tmp_path)) == ["a/1.mp4", "b.mp4"]
    assert f"{tmp_path}: 2 folders of pictures lie beside videos and are no clips" in caplog.text
    assert ".nomedia in each keeps this quiet:\n  a/boat\n  bear\n" in caplog.text


def test_a_folder_that_holds_something_else_is_kept_out(tmp_path):
    touch(tmp_path, "own.mp4", "other/.nomedia", "other/videos/1.mp4", "another/2.mp4")
    assert names(list_folder(tmp_path)) == ["another/2.mp4", "own.mp4"]
    assert names(list_folder(tmp_path / "other")) == ["videos/1.mp4"], "unless it is named itself"


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path, "elsewhere/clip.mp4", "root/own.mp4")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "circle").symlink_to(tmp_path / "root")
    assert names(list_folder(tmp_path / "root")) == ["linked/clip.mp4", "own.mp4"]


def test_a_missing_or_empty_folder_says_what_was_expected(tmp_path):
    with pytest.raises(UserError, match="no folder .*nowhere: expected a folder with videos"):
        list_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no clips in .*: expected videos \(.*\.mp4.*folder of \.jpg or \.png"):
        list_folder(tmp_path)
    touch(tmp_path, "picture.png")
    with pytest.raises(UserError, match="no clips"):
        list_folder(tmp_path)


def annotation(root, content):
    file = root / "clips.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_both_forms_of_an_annotation(tmp_path):
    items = [{"path": "b.mp4", "text": "a bee", "fps": 8}, {"path": "sub/./a.mp4", "text": ""}]
    for content in (items, {"total": 2, "list": items}, {"list": items}):
        entries = list_annotation(annotation(tmp_path, content), tmp_path)
        assert names(entries) == ["b.mp4", "sub/a.mp4"], "in the order of the file"
        assert [entry.text for entry in entries] == ["a bee", ""]
        assert entries[0].path == tmp_path / "b.mp4"


def test_full_paths_and_captions_are_understood(tmp_path):
    file = annotation(tmp_path, [{"full_path": str(tmp_path / "x.mp4"), "caption": "an ex"}])
    (entry,) = list_annotation(file, tmp_path)
    assert (entry.name, entry.path, entry.text) == ("x.mp4", tmp_path / "x.mp4", "an ex")
    assert list_annotation(annotation(tmp_path, [{"path": "a.mp4"}]), tmp_path)[0].text is None


@pytest.mark.parametrize("written", ["../outside.mp4", "sub/../../outside.mp4", "/etc/passwd", "link/x.mp4"])
def test_entries_outside_the_root_are_refused_unless_allowed(tmp_path, written):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    file = annotation(root, [{"path": "good.mp4"}, {"path": written}])
    with pytest.raises(
        UserError, match=r"list\[1\]: .* lies outside .*root: allow it with .data.allow_outside_root=true"
    ):
        list_annotation(file, root)
    assert len(list_annotation(file, root, allow_outside_root=True)) == 2


def test_malformed_json_is_found_by_line_and_column(tmp_path):
    file = annotation(tmp_path, '[\n  {"path": "a.mp4"},\n  {"path" "b.mp4"}\n]')
    with pytest.raises(UserError, match=r"clips\.json, line 3, column 11: malformed JSON: Expecting ':'"):
        list_annotation(file, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", 'expected a list of clips, or an object with one under "list"'),
        ('"clips"', "expected a list of clips"),
        ("[]", "the list is empty"),
        ('{"total": 3, "list": [{"path": "a.mp4"}]}', '"total" is 3, but "list" has 1 entries'),
        ('[{"path": "a.mp4"}, "b.mp4"]', r'list\[1\]: expected an object with "path", found str'),
        ('[{"name": "a.mp4"}]', r'list\[0\]: no "path"'),
        ('[{"path": 3}]', r'list\[0\]: no "path"'),
        ('[{"path": "a.mp4", "text": 3}]', r'list\[0\]: "text" is int, expected a string'),
        ('[{"path": "a.mp4", "text": "x"}, {"path": "b.mp4"}]', '1 of 2 entries have no "text", b.mp4 first'),
    ],
)
def test_what_is_wrong_with_an_annotation(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        list_annotation(annotation(tmp_path, content), tmp_path)


def test_all_wrong_entries_are_told_at_once(tmp_path):
    file = annotation(tmp_path, [{"path": ""}, {"path": "a.mp4"}, 7])
    with pytest.raises(UserError, match=r"list\[0\](.|\n)*list\[2\]"):
        list_annotation(file, tmp_path)


def test_an_annotation_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"clips\.json cannot be read: No such file"):
        list_annotation(tmp_path / "clips.json", tmp_path)
    (tmp_path / "clips.json").write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match="byte 2: not UTF-8"):
        list_annotation(tmp_path / "clips.json", tmp_path)


def test_long_lists_are_shortened_and_counted():
    assert shortened(["a", "b"]) == "  a\n  b"
    assert len(shortened([str(k) for k in range(10)]).splitlines()) == 10
    lines = shortened([str(k) for k in range(30)]).splitlines()
    assert len(lines) == 10 and lines[-1] == "  … and 21 more"
