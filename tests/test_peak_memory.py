import pytest
import torch

from vireo import peak_memory as module
from vireo.peak_memory import peak_memory

CPU = torch.device("cpu")
MIB = 2**20


def most(call):
    """Of three, since a system that takes idle pages back meanwhile makes one look smaller, but never larger."""
    found = [peak_memory(call, CPU) for _ in range(3)]
    if None in found:
        pytest.skip("this system does not tell the peak")
    return max(found)


def test_what_a_call_holds_at_most():
    def hold(mib):
        first = torch.ones(mib * MIB // 4)
        del first
        return torch.ones(MIB // 4)  # less at the end than in between

    torch.ones(300 * MIB // 4)  # an earlier and higher peak does not count
    for mib in (40, 160):
        found = most(lambda mib=mib: hold(mib))
        assert mib - 2 < found / MIB < mib + 5


def test_memory_that_was_freed_before_counts_again():
    pieces = [torch.ones(MIB // 16) for _ in range(400)]  # 100 MiB in pieces that malloc keeps when they are freed
    keep = pieces[::40]
    del pieces
    found = peak_memory(lambda: [torch.ones(MIB // 16) for _ in range(320)], CPU)
    if found is None:
        pytest.skip("this system does not tell the peak")
    assert 75 < found / MIB < 90 and len(keep) == 10


def test_where_nobody_counts_nothing_is_called_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "CLEAR", tmp_path / "no_such_file")
    assert peak_memory(lambda: pytest.fail("was called"), CPU) is None
