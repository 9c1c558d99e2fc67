import pytest
import torch

from tests.toys import ToyDataset
from vireo.data.source import Source
from vireo.data.stream import Slices, Stream, collate, loader, to_device
from vireo.errors import UserError
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
