import pytest
import torch

from tests.caching import Latents, Pictures, cache_of, write_pictures
from tests.toys import ToyDataset
from vireo.cache import text_identity
from vireo.data.source import Source, identify
from vireo.data.stream import Slices, Stream, collate, loader, to_device
from vireo.errors import UserError
from vireo.randomness import Draws
from vireo.video_io import BadVideoError


class WithBrokenFile(ToyDataset):
    def sample(self, index, draws):
        if index == 3:
            raise BadVideoError("three.mp4", "is cut off")
        return super().sample(index, draws)


def test_every_epoch_visits_every_entry_once_in_another_order():
    stream = Stream(ToyDataset(n=7), seed=0)
    epochs = [[stream.index(epoch * 7 + place) for place in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_bad_file_is_replaced_the_same_way_everywhere():
    streams = [Stream(WithBrokenFile(n=7), seed=0) for _ in range(2)]
    place = next(p for p in range(7) if streams[0].index(p) == 3)
    one, two = (stream[(place, 0)] for stream in streams)
    assert torch.equal(one["frames"], two["frames"])
    assert one["name"] == f"clip{streams[0].index(place, 1)}" and one["bad"] == [("three.mp4", "is cut off")]
    assert collate([one, two])["bad"] == [("three.mp4", "is cut off")] * 2


def test_if_nothing_can_be_read_the_message_says_so():
    class AllBroken(ToyDataset):
        def sample(self, index, draws):
            raise BadVideoError(f"{index}.mp4", "is empty")

    with pytest.raises(UserError, match="none of the 4 entries.*is empty"):
        Stream(AllBroken(n=4), 0)[(0, 0)]


def test_an_empty_dataset_is_refused():
    with pytest.raises(UserError, match="empty"):
        Stream(ToyDataset(n=0), 0)


def test_sources_are_loaded():
    class WithSources(ToyDataset):
        def sample(self, index, draws):
            one = Source("a", lambda: torch.ones(2))
            return {"one": one, "many": [one, one], "text": "hello"}

    batch = collate([Stream(WithSources(), 0)[(p, 0)] for p in range(3)])
    assert batch["one"].shape == (3, 2) and batch["many"].shape == (3, 2, 2) and batch["text"] == ["hello"] * 3
    assert batch["position"].tolist() == [0, 1, 2]


def test_a_resumed_loader_goes_on_where_it_was():
    whole = [b["frames"] for b in loader(Stream(ToyDataset(), 0), Slices(0, 0, 6, 2, 2, 0, 1), workers=0)]
    rest = [b["frames"] for b in loader(Stream(ToyDataset(), 0), Slices(12, 3, 6, 2, 2, 0, 1), workers=2, timeout=20)]
    assert len(rest) == 6 and all(torch.equal(a, b) for a, b in zip(whole[6:], rest, strict=True))


def test_positions_stay_on_the_host():
    batch = to_device({"position": torch.arange(2), "frames": torch.zeros(2), "name": ["a"]}, torch.device("meta"))
    assert batch["frames"].device.type == "meta" and batch["position"].device.type == "cpu"


# ------------------------------------------------------------------ with a cache


@pytest.fixture
def data(tmp_path):
    return write_pictures(tmp_path / "data")


def filled(folder, dataset, fields=("frames", "target", "prompt")):
    """A cache with these fields of all samples, and the null prompt if there are texts."""
    encoder = Latents()
    store = cache_of(encoder, folder)
    for index in range(len(dataset)):
        for field, sources in dataset.sources(index).items():
            for source in sources if field in fields else ():
                if isinstance(source, str):
                    store.write("prompt_embeds", text_identity(source), encoder.encode("prompt_embeds", [source])[0])
                else:
                    moments = encoder.encode("target_moments", source.load()[None])[0]
                    store.write("target_moments", source.identity, moments)
    if "prompt" in fields:
        store.write("null_prompt_embeds", text_identity(""), encoder.encode("null_prompt_embeds", [""])[0])
    return cache_of(encoder, folder)


def batch_of(stream, n=3):
    return collate(stream.samples([(position, 0) for position in range(n)]))


def test_what_is_cached_is_not_decoded(tmp_path, data):
    store, dataset = filled(tmp_path / "cache", Pictures(data)), Pictures(data)
    batch = batch_of(Stream(dataset, 0, cache=store))
    assert dataset.decoded == [] and "frames" not in batch and "target" not in batch
    assert batch["frame_moments"].shape == (3, 3, 4, 4, 4) and batch["target_moments"].shape == (3, 4, 4, 4)
    assert len(batch["prompt"]) == 3 and batch["prompt_embeds"].shape == (3, 1, 2)  # texts cost nothing


def test_cached_outputs_are_those_of_the_same_samples(tmp_path, data):
    store, dataset = filled(tmp_path / "cache", Pictures(data)), Pictures(data)
    cached, plain = batch_of(Stream(dataset, 0, cache=store)), batch_of(Stream(dataset, 0))
    computed = Latents()(plain, Draws(0, plain["position"]))
    for name in Latents.outputs:
        torch.testing.assert_close(cached[name], computed[name])
    assert cached["name"] == plain["name"] and torch.equal(cached["position"], plain["position"])


def test_the_null_prompt_is_a_view(tmp_path, data):
    store = filled(tmp_path / "cache", Pictures(data))
    batch = batch_of(Stream(Pictures(data), 0, cache=store))
    assert batch["null_prompt_embeds"].shape == (3, 1, 2) and batch["null_prompt_embeds"].stride(0) == 0
    copied = collate(Stream(Pictures(data), 0, cache=store).samples([(0, 0), (1, 0)]), views=False)
    assert copied["null_prompt_embeds"].is_contiguous() and copied["null_prompt_embeds"].shape == (2, 1, 2)


def test_a_field_is_decoded_for_all_samples_when_one_is_missing(tmp_path, data):
    store, dataset = filled(tmp_path / "cache", Pictures(data)), Pictures(data)
    store.path("target_moments", dataset.sources(1)["target"][0].identity).unlink()
    batch = batch_of(Stream(dataset, 0, cache=store))
    assert batch["target"].shape == (3, 3, 8, 8) and "target_moments" not in batch
    assert "frame_moments" in batch and "frames" not in batch
    assert sorted(dataset.decoded) == sorted(f"{row}_3.raw" for row in range(3))
    complete = Latents()(batch, Draws(0, batch["position"]))
    plain = batch_of(Stream(dataset, 0))
    computed = Latents()(plain, Draws(0, plain["position"]))
    torch.testing.assert_close(complete["latents"], computed["latents"])


def test_all_outputs_of_a_field_must_be_there(tmp_path, data):
    class Twice(Latents):
        outputs = {"frame_moments": "frames", "frame_embeds": "frames"}

        def identity(self, output):
            return output if output == "frame_embeds" else super().identity(output)

    dataset = Pictures(data)
    filled(tmp_path / "cache", dataset)
    batch = batch_of(Stream(dataset, 0, cache=cache_of(Twice(), tmp_path / "cache")))
    assert "frame_moments" not in batch and batch["frames"].shape == (3, 3, 3, 8, 8)


def test_an_empty_cache_changes_nothing(tmp_path, data):
    cached = batch_of(Stream(Pictures(data), 0, cache=cache_of(Latents(), tmp_path / "cache")))
    plain = batch_of(Stream(Pictures(data), 0))
    assert cached.keys() == plain.keys() and torch.equal(cached["frames"], plain["frames"])


def test_fields_can_be_kept_beside_their_outputs(tmp_path, data):
    store = filled(tmp_path / "cache", Pictures(data))
    batch = batch_of(Stream(Pictures(data), 0, cache=store, keep_fields=True))
    plain = batch_of(Stream(Pictures(data), 0))
    assert torch.equal(batch["frames"], plain["frames"]) and batch["frame_moments"].shape == (3, 3, 4, 4, 4)


def test_a_damaged_entry_is_decoded_instead(tmp_path, data, caplog):
    dataset = Pictures(data)
    store = filled(tmp_path / "cache", dataset)
    path = store.path("target_moments", dataset.sources(0)["target"][0].identity)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    batch = batch_of(Stream(dataset, 0, cache=store))
    assert "target" in batch and "target_moments" not in batch and "counts as missing" in caplog.text


def test_a_bad_file_is_replaced_in_the_same_way_with_a_half_full_cache(tmp_path, data):
    """Row 1 cannot be read and is not cached; the others are."""
    whole = Pictures(data)
    store = filled(tmp_path / "cache", whole)
    store.path("target_moments", whole.sources(1)["target"][0].identity).unlink()
    broken = {file for file in data.glob("1_3.raw")}

    class Broken(Pictures):
        def decode(self, file):
            if file in broken:
                raise BadVideoError(file, "is cut off")
            return super().decode(file)

    cached, plain = batch_of(Stream(Broken(data), 0, cache=store)), batch_of(Stream(Broken(data), 0))
    assert cached["name"] == plain["name"] and cached["bad"] == plain["bad"] and len(cached["bad"]) == 1
    assert "row 1" not in cached["name"]
    # With its substitute everything is cached again.
    assert "target_moments" in cached and "target" not in cached


def test_what_is_random_is_never_cached(tmp_path, data):
    class Random(Pictures):
        def source(self, file):
            return Source(None, lambda: self.decode(file))

    batch = batch_of(Stream(Random(data), 0, cache=filled(tmp_path / "cache", Pictures(data))))
    assert "frames" in batch and "frame_moments" not in batch and "prompt_embeds" in batch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_cached_batches(tmp_path, data, workers):
    store = filled(tmp_path / "cache", Pictures(data))
    stream = Stream(Pictures(data), 0, cache=store)
    batches = list(loader(stream, Slices(0, 0, 3, 2, 1, 0, 1), workers=workers, timeout=20))
    assert [batch["frame_moments"].shape for batch in batches] == [(2, 3, 4, 4, 4)] * 3
    assert all(batch["null_prompt_embeds"].shape == (2, 1, 2) for batch in batches)


def test_identities_hold_content_and_decoding_but_no_path(tmp_path, data):
    other = write_pictures(tmp_path / "other place" / "data")
    here, there = Pictures(data).sources(0)["frames"][0], Pictures(other).sources(0)["frames"][0]
    assert here.identity == there.identity and str(tmp_path) not in here.identity
    assert identify("ab", size=[8, 8], flip=True) == identify("ab", flip=True, size=[8, 8])
    assert len({identify("ab"), identify("ac"), identify("ab", flip=True), identify("ab", flip=False)}) == 4
