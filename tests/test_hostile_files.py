"""Files that somebody made to do harm: no code in them is run, and no memory is taken for what they claim."""

import io
import json
import multiprocessing
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.toys import STATE, ToyNetwork
from vireo import cache, checkpoint, config, json_files, lora, tensor_files, weights
from vireo.errors import UserError
from vireo.models import i3d, inception, saved_networks, wan_weights
from vireo.models.taehv import TAEHV
from vireo.sampling import perceptual

LARGE = 2**29  # bytes that a file of a few claims
ALLOWED = 100 * 2**20  # bytes by which reading it may grow a process


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def bombs(marker: Path) -> dict[str, bytes]:
    """The ways in which a trap can be packed."""
    archive, old = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": {"a": torch.ones(1)}, "trap": Trap(marker)}, archive)
    torch.save({"generator": {"a": Trap(marker)}}, old, _use_new_zipfile_serialization=False)
    return {"pickle": pickle.dumps(Trap(marker)), "archive": archive.getvalue(), "old": old.getvalue()}


def placed(file: Path, content: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def part(folder: Path, content: bytes) -> saved_networks.Part:
    return saved_networks.Part(folder, {}, [placed(folder / "model.safetensors", content)])


def of_a_checkpoint(folder: Path, content: bytes) -> None:
    """With a manifest that is right."""
    checkpoint.save(folder, 1, {"network": {"a": torch.ones(1)}}, STATE)
    made = checkpoint.folder_of(folder, 1)
    placed(made / "network.safetensors", content)
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["files"] = {"network.safetensors": checkpoint._identity(made / "network.safetensors")}
    (made / "manifest.json").write_text(json.dumps(manifest))
    checkpoint.verify(made).tensors("network")


def of_a_cache(folder: Path, content: bytes) -> None:
    kept = cache.Cache(folder, {"latents": "frames"}, {"latents": "encoder"}, memory=0)
    kept.write("latents", "source", torch.ones(2))
    for file in cache.entries(folder):
        file.write_bytes(content)
    if kept.read("latents", "source") is None:
        raise UserError("it counts as missing")


READERS: dict[str, Callable[[Path, bytes], object]] = {
    "weights of TAEHV": lambda folder, c: TAEHV("taecvx", weights=str(placed(folder / "taecvx.pth", c))),
    "init_from": lambda folder, c: weights.initialize_from(TAEHV("taecvx"), placed(folder / "x.pt", c)),
    "safetensors of TAEHV": lambda folder, c: TAEHV("taecvx", weights=str(placed(folder / "x.safetensors", c))),
    "LongLive": lambda folder, c: wan_weights.read(placed(folder / "longlive_base.pt", c)),
    "I3D": lambda folder, c: i3d._load(nn.Linear(1, 1), placed(folder / "rgb_imagenet.pt", c)),
    "Inception": lambda folder, c: inception._load(nn.Linear(1, 1), placed(folder / "inception.pth", c)),
    "AlexNet": lambda folder, c: perceptual._load(nn.Sequential(), placed(folder / "alexnet.pth", c)),
    "a folder of diffusers": lambda folder, c: saved_networks.tensors(part(folder, c)),
    "sizes of a folder": lambda folder, c: saved_networks.count(part(folder, c).weights),
    "an adapter": lambda folder, c: lora.is_file(placed(folder / "adapter.safetensors", c)),
    "resume": of_a_checkpoint,
    "the cache": of_a_cache,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["pickle", "archive", "old"])
def test_no_code_is_run(tmp_path, reader, kind):
    marker = tmp_path / "sprung"
    with pytest.raises(UserError):
        READERS[reader](tmp_path / "files", bombs(marker)[kind])
    assert not marker.exists()


def test_the_trap_works(tmp_path):
    """Or else nothing was tested."""
    pickle.loads(bombs(tmp_path / "sprung")["pickle"])
    assert (tmp_path / "sprung").exists()


# ------------------------------------------------------------ claims


def archive(change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """What torch.save writes of four numbers, with changed members."""
    saved, changed = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.arange(4.0)}, saved)
    with zipfile.ZipFile(saved) as before, zipfile.ZipFile(changed, "w", compression) as after:
        for member in before.infolist():
            after.writestr(member.filename, change(member.filename, before.read(member)))
    return changed.getvalue()


def header(shape: list[int], end: int, length: int | None = None) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(16)


def expanded() -> bytes:
    saved = io.BytesIO()
    torch.save({"a": torch.zeros(1).expand(LARGE // 4)}, saved)
    return saved.getvalue()


def shape_of_pickle(name: str, data: bytes) -> bytes:
    return data.replace(b"K\x04", b"J" + struct.pack("<i", LARGE // 4)) if name.endswith("data.pkl") else data


def zeros(name: str, data: bytes) -> bytes:
    return bytes(LARGE) if name.endswith("data/0") else data


CLAIMS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a shape that the header's offsets belie": ("safetensors", lambda: header([LARGE // 4], 16)),
    "offsets behind the file's end": ("safetensors", lambda: header([LARGE // 4], LARGE)),
    "a header longer than the file": ("safetensors", lambda: header([4], 16, length=LARGE)),
    "a negative shape": ("safetensors", lambda: header([-4], 16)),
    "one number, expanded": ("pth", expanded),
    "a pickled shape that the numbers belie": ("pth", lambda: archive(shape_of_pickle)),
    "compressed zeros": ("pth", lambda: archive(zeros, zipfile.ZIP_DEFLATED)),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_no_memory_is_taken_for_what_a_file_claims(tmp_path, claim):
    suffix, make = CLAIMS[claim]
    file = placed(tmp_path / f"x.{suffix}", make())
    assert file.stat().st_size < 2**21

    def read(answer) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            tensor_files.read(file)
            told = ""
        except UserError as error:
            told = str(error)
        answer.put((told, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))

    fork = multiprocessing.get_context("fork")
    answer = fork.SimpleQueue()
    child = fork.Process(target=read, args=(answer,))
    child.start()
    child.join(60)
    told, grown = answer.get()
    assert str(file) in told and grown < ALLOWED, (told, grown)


def test_honest_files_are_read(tmp_path):
    state = {"a": torch.arange(4.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    tied = {**state, "c": state["a"], "step": 3}
    torch.save(tied, tmp_path / "new.pth")
    torch.save(tied, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "x.safetensors", {"variant": "this"})
    for name in ("new.pth", "old.pt", "x.safetensors"):
        found, metadata = tensor_files.read(tmp_path / name)
        assert torch.equal(found["a"], state["a"]) and torch.equal(found["b"], state["b"])
        assert metadata == ({"variant": "this"} if name == "x.safetensors" else {})


def test_shards_lie_beside_their_index(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    index = tmp_path / f"{saved_networks.WEIGHTS[0]}.index.json"
    for name in ("../secret.safetensors", "/etc/secret.safetensors", "sub/x.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="does not lie beside it"):
            saved_networks.find(tmp_path, "transformer", "key")
    index.write_text('{"weight_map": [1]}')
    with pytest.raises(UserError, match="no weight_map"):
        saved_networks.find(tmp_path, "transformer", "key")


# ------------------------------------------------------------ manifests, JSON, configs


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        ({"files": {"../../secret": {"size": 1, "sha256": ""}}}, "not in its folder"),
        ({"files": {"/etc/passwd": {"size": 1, "sha256": ""}}}, "not in its folder"),
        ({"files": {"..": {"size": 1, "sha256": ""}}}, "not in its folder"),
        ({"files": {"network.safetensors": 7}}, "damaged manifest"),
        ({"files": ["network.safetensors"]}, "damaged manifest"),
        ({"step": 10**400}, "says step|damaged manifest"),
        ({"step": float("inf")}, "damaged manifest"),
        ({"step": 2}, "says step 2"),
        ({"state": 3}, "damaged manifest"),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path, manifest, says):
    checkpoint.save(tmp_path, 1, {"network": {"a": torch.ones(1)}}, STATE)
    file = checkpoint.folder_of(tmp_path, 1) / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **manifest}))
    with pytest.raises(UserError, match=says):
        checkpoint.verify(file.parent)
    assert checkpoint.latest(tmp_path) is None


JSON_BOMBS = {
    "deep": ("[" * 200_000, "is not read"),
    "digits": ('{"step": ' + "9" * 5000 + "}", "is not read"),
    "long": ('{"a": "' + "x" * json_files.SMALL + '"}', "bytes, more than"),
    "not text": ("\udcff", "not UTF-8"),
}


@pytest.mark.parametrize("bomb", JSON_BOMBS)
def test_json_that_would_burst_is_refused(tmp_path, bomb):
    content, says = JSON_BOMBS[bomb]
    checkpoint.save(tmp_path, 1, {}, {})
    manifest = checkpoint.folder_of(tmp_path, 1) / "manifest.json"
    for file in (manifest, tmp_path / "config.json"):
        file.write_bytes(content.encode(errors="surrogateescape"))
    for read in (lambda: checkpoint.verify(manifest.parent), lambda: saved_networks.find_config(tmp_path, "vae", "x")):
        with pytest.raises(UserError, match=says):
            read()
    assert checkpoint.latest(tmp_path) is None


def test_a_config_that_would_burst_is_refused():
    laughs = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
    with pytest.raises(UserError, match="alias"):
        config.from_text(f"a0: &a0 [lol]\n{laughs}\n")
    with pytest.raises(UserError, match="not valid YAML"):
        config.from_text("[" * 20_000)


def test_a_config_of_a_run_may_call_no_more_than_others():
    settings = config.settings(["experiment=taehv"])
    assert config.from_text(config.to_text(settings)) == settings
    for hostile in (
        {"tracker": {"_target_": "os.system", "command": "true"}},
        {"loss": {**settings["loss"], "extra": [{"_target_": "subprocess.run"}]}},
        {"optimizer": {"_target_": "torch.load", "f": "x"}},
        {"optimizer": {"_target_": "vireooo.x"}},
    ):
        with pytest.raises(UserError, match="which no config may call"):
            config.from_text(config.to_text({**settings, **hostile}))


@pytest.mark.parametrize(
    "target",
    [
        "vireo.launch.os.system",  # a module that another one imports
        "torch.nn.modules.module.functools.partial",
        "torch.nn.modules.module.torch.load",
        "vireo.config.instantiation.ModuleType",  # what it imports from one
        "vireo.checkpoint.Path.unlink",
        "vireo.checkpoint.log.info",  # an object of its own, of a class that is not
        "vireo.checkpoint.Checkpoint.__class__",
        "vireo.checkpoint.save.__globals__.get",
        "vireo.checkpoint.__loader__.get_data",
    ],
)
def test_a_target_does_not_lead_out_of_its_package(target):
    with pytest.raises(UserError, match="may not be called by a config: it is of "):
        config.instantiate({"_target_": target})


def test_a_network_of_a_hostile_init_from_keeps_its_weights(tmp_path):
    network = ToyNetwork()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    checkpoint.save(tmp_path, 1, {"network": {"first.weight": torch.ones(2**10)}}, STATE)
    with pytest.raises(UserError, match="does not fit"):
        weights.initialize_from(network, weights.initial(str(tmp_path)))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
