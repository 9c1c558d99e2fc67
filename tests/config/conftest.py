"""Each test composes from a copy of conf/ in its own folder, without this machine's settings."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from vireo import config
from vireo.config import places
from vireo.config.search import searching


@pytest.fixture(autouse=True)
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("VIREO_DATA", "VIREO_WEIGHTS", "VIREO_OUTPUTS", "VIDEO_TRAIN_PROCESSES", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "conf"
    shutil.copytree(config.conf_dir(), folder, ignore=shutil.ignore_patterns("default.yaml"))
    main = folder / "config.yaml"  # the smallest recipe is the default here
    main.write_text(main.read_text().replace("- experiment: taehv_seraena", "- experiment: taehv"))
    places._tree.cache_clear()
    with searching(folder):
        yield folder


@pytest.fixture
def full(tmp_path: Path) -> list[str]:
    """The words of size=full with folders in which everything that the shipped recipes read is there."""
    cogvideox = ("CogVideoX-2b", "CogVideoX-5b", "CogVideoX-5b-I2V", "CogVideoX1.5-5B", "CogVideoX1.5-5B-I2V")
    wan = ("Wan2.1-T2V-1.3B-Diffusers", "LongLive-1.3B/models", "SkyReels-A2")
    eraser = ("stable-diffusion-v1-5", "sd-vae-ft-mse", "diffuEraser", "animatediff-motion-adapter-v1-5-2")
    for name in ("taehv", *cogvideox, *wan, "instruct-pix2pix", *eraser):
        (tmp_path / "weights" / name).mkdir(parents=True)
    for name in ("DAVIS", "YouTubeVOS"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for file in ("taehv/taecvx.safetensors", "LongLive-1.3B/models/longlive_base.pt", "LongLive-1.3B/models/lora.pt"):
        (tmp_path / "weights" / file).touch()
    return ["size=full", "paths.data=data", "paths.weights=weights"]
