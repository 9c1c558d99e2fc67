import pytest

from vireo import devices, launch
from vireo.errors import UserError


@pytest.fixture
def machine(monkeypatch):
    """machine(cores, gpus): what this machine seems to have."""

    def pretend(cores: int, gpus: str, threads: str | None = None) -> None:
        monkeypatch.setattr(devices, "cores", lambda: cores)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if threads is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", threads)

    return pretend


def test_gpus_are_divided_without_overlap(machine):
    machine(16, "0,2,5,GPU-8f3a")
    assert devices.visible_gpus() == ["0", "2", "5", "GPU-8f3a"]
    shares = [devices.share(slot, 2, "auto") for slot in (0, 1)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in shares] == ["0,2", "5,GPU-8f3a"]
    assert [one["OMP_NUM_THREADS"] for one in shares] == ["4", "4"]
    assert [devices.share(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "2", "5,GPU-8f3a"]
    with pytest.raises(UserError, match="launcher.jobs=5, but 4 GPUs"):
        devices.share(0, 5)


def test_threads_are_divided_on_a_cpu(machine):
    machine(8, "")
    assert devices.share(1, 2) == {"OMP_NUM_THREADS": "4"}
    assert devices.share(0, 2, 2) == {"OMP_NUM_THREADS": "2"}
    assert devices.share(0, 20) == {"OMP_NUM_THREADS": "1"}
    assert devices.share(0, 1) == {}


def test_threads_that_were_set_stay(machine):
    machine(8, "-1", threads="3")
    assert devices.share(0, 2) == {}


@pytest.fixture
def hardware(tmp_path, monkeypatch):
    """A machine without any GPU, of which no variable says anything; its folders are tmp_path / NVIDIA, AMD, WSL."""
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    for name in ("NVIDIA", "AMD", "WSL"):
        monkeypatch.setattr(devices, name, tmp_path / name)
    devices._count.cache_clear()
    yield tmp_path
    devices._count.cache_clear()


def test_a_machine_without_gpus(hardware):
    assert devices.visible_gpus() == [] and launch.number_of_processes("auto") == 1


def test_nvidia_s_gpus(hardware):
    for bus in ("0000:01:00.0", "0000:02:00.0"):
        (hardware / "NVIDIA" / bus).mkdir(parents=True)
    assert devices.visible_gpus() == ["0", "1"]
    assert launch.number_of_processes("auto") == 2 == launch.number_of_processes("2")
    with pytest.raises(UserError, match="launcher.processes=3, but 2 GPUs are visible"):
        launch.number_of_processes(3)


@pytest.mark.parametrize("asked", [1, "auto"])
def test_idle_gpus_are_told(hardware, monkeypatch, capsys, asked):
    for bus in ("0000:01:00.0", "0000:02:00.0"):
        (hardware / "NVIDIA" / bus).mkdir(parents=True)
    monkeypatch.setattr(launch, "_start_once", lambda *_: 0)
    assert launch.start(hardware / "resolved.yaml", {"restarts": 0, "processes": asked}, 0) == 0
    said = capsys.readouterr().out
    assert ("1 of 2 visible GPUs will be used" in said) if asked == 1 else not said


def test_amd_s_gpus(hardware, monkeypatch):
    for node, units in enumerate((0, 0, 440, 440, 440)):
        (hardware / "AMD" / str(node)).mkdir(parents=True)
        (hardware / "AMD" / str(node) / "properties").write_text(f"cpu_cores_count 8\nsimd_count {units}\n")
    assert devices.visible_gpus() == []  # torch here is another build
    monkeypatch.setattr(devices, "_torch_is_for_amd", lambda: True)
    devices._count.cache_clear()
    assert devices.visible_gpus() == ["0", "1", "2"]
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0,2")
    assert devices.visible_gpus() == ["0", "2"]
    assert devices.share(1, 2)["HIP_VISIBLE_DEVICES"] == "2"


def test_gpus_that_windows_has(hardware, monkeypatch):
    (hardware / "WSL").touch()
    (hardware / "torch.py").write_text("class cuda:\n    device_count = staticmethod(lambda: 2)\n")
    monkeypatch.setenv("PYTHONPATH", str(hardware))
    assert devices.visible_gpus() == ["0", "1"]
