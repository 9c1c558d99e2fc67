import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from tests.caching import Latents, NeverLoaded, Pictures, cache_of, write_picture, write_pictures
from vireo import cache, cache_filling, cache_manifests, digests, faults
from vireo.cache import entries, text_identity
from vireo.data.stream import Stream, collate
from vireo.errors import UserError
from vireo.randomness import Draws

PICTURES, TEXTS = 5 * 4, 3  # "", "move 0", "move 1"


@pytest.fixture(autouse=True)
def own_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    digests._remembered.clear()


@pytest.fixture
def data(tmp_path):
    return write_pictures(tmp_path / "data")


def splits(root, **options):
    return {split: Pictures(str(root), split=split, **options) for split in ("train", "validation")}


def fill(folder, datasets, encoder, **options):
    """What was encoded: {output: how many}."""
    filled = cache_filling.fill(cache_of(encoder, folder), datasets, encoder, "toy", **{"batch_size": 8, **options})
    counts: dict[str, int] = {}
    for output, number in encoder.encoded:
        counts[output] = counts.get(output, 0) + number
    assert filled.encoded == sum(counts.values())
    return counts


def test_everything_is_encoded_once_and_shared(tmp_path, data):
    counts = fill(tmp_path / "cache", splits(data), Latents())
    assert sum(counts[name] for name in ("frame_moments", "target_moments")) == PICTURES
    assert counts["prompt_embeds"] + counts["null_prompt_embeds"] == TEXTS
    assert len(list(entries(tmp_path / "cache"))) == PICTURES + TEXTS


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_filling_loads_and_decodes_nothing(tmp_path, data, workers):
    fill(tmp_path / "cache", splits(data), Latents(), workers=workers)
    datasets, encoder = splits(data), NeverLoaded()
    assert fill(tmp_path / "cache", datasets, encoder, workers=workers) == {}
    assert not datasets["train"].decoded and not datasets["validation"].decoded


def test_values_are_those_of_the_encoder(tmp_path, data):
    """Bitwise where they are computed in batches of the same shape."""
    fill(tmp_path / "cache", splits(data), Latents(), batch_size=1)
    dataset, encoder = splits(data)["train"], Latents()
    store = cache_of(encoder, tmp_path / "cache")
    for source in dataset.sources(0)["frames"]:
        value = store.read("frame_moments", source.identity)
        assert value.dtype == torch.float32
        assert torch.equal(value, encoder.encode("frame_moments", source.load()[None])[0])


def test_progress_counts_what_is_encoded_not_what_is_written(tmp_path, data, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(cache_filling, "PROGRESS_EVERY", -1.0)
    fill(tmp_path / "cache", splits(data), Latents(), batch_size=4)
    told = [record.getMessage() for record in caplog.records if "s left" in record.getMessage()]
    shares = [int(line.split()[2]) for line in told]
    assert shares == sorted(shares) and len(set(shares)) == len(shares) > 3 and shares[-1] == PICTURES + TEXTS


def test_weights_are_freed_afterwards_and_work_again(tmp_path, data):
    encoder = Latents()
    fill(tmp_path / "cache", splits(data), encoder)
    assert encoder.loads == 2 and "loaded" not in vars(encoder), "once for texts, once for pictures"
    encoder.encode("prompt_embeds", ["a"])
    assert encoder.loads == 3


def test_a_changed_file_is_encoded_anew_and_nothing_else(tmp_path, data):
    fill(tmp_path / "cache", splits(data), Latents())
    write_picture(data / "1_2.raw", 222)
    digests._remembered.clear()
    assert fill(tmp_path / "cache", splits(data), Latents()) == {"frame_moments": 1}


def test_a_changed_setting_encodes_all_pictures_and_no_text(tmp_path, data):
    fill(tmp_path / "cache", splits(data), Latents())
    counts = fill(tmp_path / "cache", splits(data, flip=True), Latents())
    assert sum(counts.values()) == PICTURES and "prompt_embeds" not in counts
    assert fill(tmp_path / "cache", splits(data), Latents()) == {}  # the old ones are still there


def test_changed_weights_encode_what_they_make_anew(tmp_path, data):
    weights = tmp_path / "weights"
    weights.write_bytes(b"1")
    fill(tmp_path / "cache", splits(data), Latents(str(weights)))
    weights.write_bytes(b"22")
    counts = fill(tmp_path / "cache", splits(data), Latents(str(weights)))
    assert sum(counts.values()) == PICTURES and "prompt_embeds" not in counts


def test_a_moved_folder_encodes_nothing(tmp_path, data):
    fill(tmp_path / "cache", splits(data), Latents())
    data.rename(tmp_path / "moved")
    assert fill(tmp_path / "cache", splits(tmp_path / "moved"), NeverLoaded()) == {}


def test_an_added_row_encodes_what_it_brings(tmp_path, data):
    fill(tmp_path / "cache", splits(data), Latents())
    for frame in range(4):
        write_picture(data / f"0a_{frame}.raw", 240 + frame)
    assert sum(fill(tmp_path / "cache", splits(data), Latents()).values()) == 4


def test_damaged_entries_are_made_anew(tmp_path, data, caplog):
    fill(tmp_path / "cache", splits(data), Latents())
    short, flipped, *_ = sorted(entries(tmp_path / "cache"))
    short.write_bytes(short.read_bytes()[:-3])
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x7f")
    assert sum(fill(tmp_path / "cache", splits(data), Latents()).values()) == 1 and "counts as missing" in caplog.text
    assert sum(fill(tmp_path / "cache", splits(data), Latents(), thorough=True).values()) == 1
    assert all(cache.verify(path) for path in entries(tmp_path / "cache"))


def test_a_killed_filling_goes_on_where_it_stopped(tmp_path, data):
    def fill_and_die():
        original = os.replace
        written = []

        def replace(*arguments):
            original(*arguments)
            written.append(arguments)
            if len(written) == 10:  # the first one is the manifest
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace
        fill(tmp_path / "cache", splits(data), Latents(), batch_size=2)

    process = multiprocessing.get_context("fork").Process(target=fill_and_die)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    there = len(list(entries(tmp_path / "cache")))
    assert there == 9
    assert sum(fill(tmp_path / "cache", splits(data), Latents()).values()) == PICTURES + TEXTS - there


def test_a_request_to_stop_is_heard_between_batches(tmp_path, data):
    encoder, asked = Latents(), faults.StopRequest()
    asked.signal = signal.SIGTERM
    for name, stop in (("asked", asked), ("late", faults.StopRequest(deadline=time.time() - 1))):
        filled = cache_filling.fill(
            cache_of(encoder, tmp_path / name), splits(data), encoder, "toy", batch_size=2, stop=stop
        )
        assert filled.stopped and 0 < filled.encoded == len(list(entries(tmp_path / name))) <= 2


def test_two_processes_fill_at_once(tmp_path, data):
    def child(number):
        fill(tmp_path / "cache", splits(data), Latents(), batch_size=2)
        os._exit(0)

    processes = [multiprocessing.get_context("fork").Process(target=child, args=(n,)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    paths = list(entries(tmp_path / "cache"))
    assert len(paths) == PICTURES + TEXTS and all(cache.verify(path) for path in paths)
    assert fill(tmp_path / "cache", splits(data), NeverLoaded()) == {}


def test_ranks_share_the_work(tmp_path, data, monkeypatch):
    """Two ranks, one after the other: no rank encodes what is another's."""
    alone = len(cache_filling.wanted(cache_of(Latents(), tmp_path), splits(data)))
    encoded = []
    for rank in range(2):
        monkeypatch.setattr(cache_filling.distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(cache_filling.distributed, "world_size", lambda: 2)
        encoded.append(sum(fill(tmp_path / "cache", splits(data), Latents()).values()))
    assert sum(encoded) == alone == PICTURES + TEXTS and min(encoded) > 0


@pytest.mark.parametrize("kind", [RuntimeError, UserError])
def test_what_ends_one_rank_ends_all_with_its_error(tmp_path, data, kind):
    def fails():
        raise kind("out of memory, say")

    def child(rank, queue):
        store = f"file://{tmp_path}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        encoder = Disturbed(lambda: None, *([fails] if rank else []))
        try:
            cache_filling.fill(cache_of(encoder, tmp_path / "cache"), splits(data), encoder, "toy", batch_size=2)
        except Exception as error:
            torch.distributed.barrier()  # the other one is there, it waits for nothing else
            queue.put((rank, type(error).__name__, str(error)))
        os._exit(0)

    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    ranks = [fork.Process(target=child, args=(rank, queue)) for rank in range(2)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(60)
    assert [one.exitcode for one in ranks] == [0, 0]
    (_, *others), (_, *failing) = sorted(queue.get() for _ in ranks)
    assert failing[0] == kind.__name__ and failing[1].startswith("out of memory, say")
    told = "the encoding cache cannot be filled: rank 1: RuntimeError: " if kind is RuntimeError else ""
    assert others == [kind.__name__, f"{told}{failing[1]}"]


def test_files_that_cannot_be_read_are_left_out_with_a_warning(tmp_path, data, caplog):
    (data / "1_2.raw").write_bytes(b"short")
    encoder = Latents()
    filled = cache_filling.fill(cache_of(encoder, tmp_path / "cache"), splits(data), encoder, "toy", batch_size=8)
    assert filled.encoded == PICTURES + TEXTS - 1 and len(filled.unreadable) == 1
    assert "1_2.raw: is cut off" in caplog.text


class Disturbed(Latents):
    """Before the n-th encoding something happens to the files."""

    def __init__(self, *happenings, weights=None):
        super().__init__(weights)
        self.happenings = list(happenings)

    def encode(self, output, values):
        if self.happenings:
            self.happenings.pop(0)()
        return super().encode(output, values)


def holds_what_its_keys_say(folder, root):
    """Whether every entry of a picture is the encoding of a file that is there now, computed afresh."""
    digests._remembered.clear()
    datasets, encoder, found = splits(root), Latents(), 0
    store = cache_of(encoder, folder)
    for dataset in datasets.values():
        for index in range(len(dataset)):
            for field in ("frames", "target"):
                for source in dataset.sources(index)[field]:
                    value = store.read("frame_moments", source.identity)
                    expected = encoder.encode("frame_moments", source.load()[None])[0]
                    found += value is not None
                    if value is not None and not torch.allclose(value, expected, atol=1e-5):
                        return False
    return found == len(list(entries(folder))) - TEXTS


def test_a_file_that_changes_meanwhile_is_encoded_as_what_it_became(tmp_path, data, caplog):
    encoder = Disturbed(lambda: write_picture(data / "2_3.raw", 231))
    filled = cache_filling.fill(cache_of(encoder, tmp_path / "cache"), splits(data), encoder, "toy", batch_size=2)
    assert "1 files changed while they were encoded" in caplog.text and "not cached" not in caplog.text
    assert filled.encoded == filled.entries == PICTURES + TEXTS and not filled.unreadable
    assert len(list(entries(tmp_path / "cache"))) == PICTURES + TEXTS
    assert holds_what_its_keys_say(tmp_path / "cache", data)


def test_a_file_that_changes_between_two_looks_is_not_stored(tmp_path, data, monkeypatch):
    """After its identity was compared, and before its bytes are read."""
    original = Pictures.checked

    def late(self, identity, file):
        if file.name == "2_3.raw" and not self.decoded.count("late"):
            self.decoded.append("late")
            write_picture(file, 231)
        return original(self, identity, file)

    monkeypatch.setattr(Pictures, "checked", late)
    fill(tmp_path / "cache", splits(data), Latents())
    assert holds_what_its_keys_say(tmp_path / "cache", data)


def test_a_file_that_keeps_changing_is_left_out(tmp_path, data, caplog, monkeypatch):
    levels, original = iter(range(100, 200)), Pictures.checked

    def restless(self, identity, file):
        if file.name == "2_3.raw":
            write_picture(file, next(levels))
        return original(self, identity, file)

    monkeypatch.setattr(Pictures, "checked", restless)
    encoder = Latents()
    filled = cache_filling.fill(cache_of(encoder, tmp_path / "cache"), splits(data), encoder, "toy", batch_size=1)
    assert filled.encoded == PICTURES + TEXTS - 1 and len(filled.unreadable) == filled.changed == 1
    assert "2_3.raw: has changed" in caplog.text


def test_weights_that_change_meanwhile_store_nothing(tmp_path, data):
    weights = tmp_path / "weights"
    weights.write_bytes(b"1")
    undisturbed = [lambda: None] * 3  # texts of two kinds, frames
    encoder = Disturbed(*undisturbed, lambda: weights.write_bytes(b"22"), weights=str(weights))
    with pytest.raises(UserError, match="the weights that make target_moments have changed"):
        cache_filling.fill(cache_of(encoder, tmp_path / "cache"), splits(data), encoder, "toy", batch_size=100)
    (manifest,) = cache_manifests.read(tmp_path / "cache")
    kept = {manifest.entries[path.stem].output for path in entries(tmp_path / "cache")}
    assert "target_moments" not in kept


def test_an_encoding_that_is_not_finite_names_the_file(tmp_path, data):
    class Overflowing(Latents):
        def encode(self, output, values):
            encoded = super().encode(output, values)
            return encoded / 0 if output == "target_moments" else encoded

    encoder = Overflowing()
    with pytest.raises(UserError, match=r"\d_3.raw: its target_moments have values that are not finite"):
        cache_filling.fill(cache_of(encoder, tmp_path / "cache"), splits(data), encoder, "toy", batch_size=8)
    assert "loaded" not in vars(encoder)


def test_a_full_disk_is_told(tmp_path, data, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_filling.Cache, "write_all", full)
    encoder = Latents()
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        cache_filling.fill(cache_of(encoder, tmp_path / "cache"), splits(data), encoder, "toy", batch_size=8)


def test_a_disk_without_room_for_all_is_told_by_the_first_entry(tmp_path, data, monkeypatch):
    monkeypatch.setattr(cache_filling.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    encoder = Latents()
    cache = cache_of(encoder, tmp_path / "cache")
    with pytest.raises(UserError, match=r"lacks \d+ entries of \w+, .* each and .* in all; .* are free. .*cache=off"):
        cache_filling.fill(cache, splits(data), encoder, "toy", batch_size=1)
    assert not list(entries(cache.folder))


def test_a_folder_that_cannot_be_made_is_told(tmp_path, data):
    (tmp_path / "file").write_text("")
    encoder = Latents()
    with pytest.raises(UserError, match="cannot be written.*cache=off"):
        cache_filling.fill(cache_of(encoder, tmp_path / "file"), splits(data), encoder, "toy", batch_size=8)


def test_random_sources_are_not_cached(tmp_path, data):
    class Random(Pictures):
        def source(self, file):
            return super().source(file).__class__(None, lambda: self.decode(file))

    assert sum(fill(tmp_path / "cache", {"train": Random(str(data))}, Latents()).values()) == TEXTS


def test_an_encoder_without_outputs_has_nothing_to_fill(tmp_path, data):
    class Nothing(Latents):
        outputs = {}

    assert fill(tmp_path / "cache", splits(data), Nothing()) == {}


def test_pictures_of_different_sizes_are_encoded_apart(tmp_path, data):
    class Growing(Pictures):
        def decode(self, file):
            frame = super().decode(file)
            return frame[:, :4] if file.name.startswith("1") else frame

    counts = fill(tmp_path / "cache", {"train": Growing(str(data))}, Latents(), batch_size=100)
    assert sum(counts.values()) == 3 * 4 + TEXTS


def test_a_batch_from_the_cache_equals_the_encoders(tmp_path, data):
    fill(tmp_path / "cache", splits(data), Latents())
    dataset = splits(data)["train"]
    batches = []
    for encoder, store in ((NeverLoaded(), cache_of(Latents(), tmp_path / "cache")), (Latents(), None)):
        batch = collate(Stream(dataset, 0, cache=store).samples([(position, 0) for position in range(3)]))
        batches.append(encoder(batch, Draws(0, batch["position"])))
    for name in (*Latents.outputs, "latents"):
        torch.testing.assert_close(batches[0][name], batches[1][name], rtol=1e-5, atol=1e-5)


def test_the_manifest_lists_what_is_wanted(tmp_path, data):
    fill(tmp_path / "cache", splits(data), Latents())
    (manifest,) = cache_manifests.read(tmp_path / "cache")
    assert manifest.entries.keys() == {path.stem for path in entries(tmp_path / "cache")}
    names = {one.name for one in manifest.entries.values()}
    assert {"0_0.raw", "4_3.raw", "'move 1'", "''"} <= names
    assert text_identity("move 1") in {one.source for one in manifest.entries.values()}
