"""The embedded world: everything a mini run reads, made once from seeds and from the small weights in the package.

`ensure()` gives a folder with `data/` and `weights/`, laid out like the real ones, so that a mini run goes through
exactly the code of a real one. It needs neither a network nor a GPU, and neither does it import torch.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vireo import __version__
from vireo.errors import UserError
from vireo.mini import scenes

SHIPPED = Path(__file__).parent / "weights"
MARKER = "mini_world.json"
NUM_CLIPS = 480
FPS = 8

# Where the real weights lie, and which small ones take their place.
WEIGHTS = {
    "taehv": "taehv",
    "sd-vae-ft-mse": "autoencoder_kl",
    "stable-diffusion-v1-5/vae": "autoencoder_kl",
    "instruct-pix2pix/vae": "autoencoder_kl",
    "CogVideoX-2b/vae": "autoencoder_kl_cogvideox",
    "CogVideoX-5b/vae": "autoencoder_kl_cogvideox",
    "CogVideoX-5b-I2V/vae": "autoencoder_kl_cogvideox",
    "CogVideoX1.5-5B/vae": "autoencoder_kl_cogvideox",
    "CogVideoX1.5-5B-I2V/vae": "autoencoder_kl_cogvideox",
    "Wan2.1-T2V-1.3B-Diffusers/vae": "autoencoder_kl_wan",
}


def write_clips(world: Path) -> None:
    """`data/clips/*.mp4` and `data/clips.json`: {"total", "list": [{"path", "text", "task", …}, …]}.

    Paths are relative to `data/`. The k-th clip shows scene k.
    """
    folder = world / "data" / "clips"
    folder.mkdir(parents=True)
    entries = []
    for seed in range(NUM_CLIPS):
        scene = scenes.scene(seed)
        path = folder / f"{seed:05d}.mp4"
        write_video(path, scenes.render(scene))
        entries.append(
            {
                "path": path.relative_to(world / "data").as_posix(),
                "text": scene.text,
                "task": scene.task,
                "frames": scenes.NUM_FRAMES,
                "fps": FPS,
                "height": 64,
                "width": 64,
            }
        )
    _write_json(world / "data" / "clips.json", {"total": len(entries), "list": entries})


def write_weights(world: Path) -> None:
    """`weights/`: the small networks under the real ones' names."""
    for name, shipped in WEIGHTS.items():
        shutil.copytree(SHIPPED / shipped, world / "weights" / name, copy_function=shutil.copyfile)
        if name.startswith("CogVideoX1.5"):
            config = world / "weights" / name / "config.json"
            _write_json(config, json.loads(config.read_text()) | {"invert_scale_latents": True})


# Each part of the world is one function that writes into a folder of its own; a recipe with another layout adds one.
PARTS: tuple[Callable[[Path], None], ...] = (write_clips, write_weights)

# Modules that write a part as a program, given a folder of the world, while this process writes the others: they take
# some seconds each, and what imports torch must not be imported here.
PROGRAMS = {
    "vireo.mini.frame_edits": "data/frame_edits",
    "vireo.mini.captioned_clips": "data/captioned_clips",
    "vireo.mini.masked_clips": "data",
    "vireo.mini.subject_clips": "data/subject_clips",
    "vireo.mini.networks": "weights",
}


def ensure(folder: str | os.PathLike | None = None) -> Path:
    """The folder of the mini world, which is made if it is not there yet.

    folder: default `${XDG_CACHE_HOME:-~/.cache}/vireo/mini-<version>`. Processes that ask at once wait for the one
    that builds, and what is interrupted leaves nothing behind that could be taken for a world.
    Raises UserError if a folder was named that holds something else.
    """
    world = Path(folder).expanduser().absolute() if folder is not None else _cache() / f"mini-{version()}"
    if _complete(world):
        return world
    world.parent.mkdir(parents=True, exist_ok=True)
    with open(world.parent / f".{world.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system when the process ends, however it ends
        if not _complete(world):
            building = world.parent / f".{world.name}.building"
            shutil.rmtree(building, ignore_errors=True)  # left by a process that was killed: the lock is ours
            building.mkdir()
            with _running(PROGRAMS, building):
                for write in PARTS:
                    write(building)
            _write_json(building / MARKER, {"version": version()})
            building.rename(world)
    return world


@contextmanager
def _running(programs: Mapping[str, str], world: Path) -> Iterator[None]:
    """Start the programs, wait for them after the block. Raises RuntimeError with what one that failed has printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    children = {
        module: subprocess.Popen(
            [sys.executable, "-m", module, str(world / folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for module, folder in programs.items()
    }
    try:
        yield
        for module, child in children.items():
            said, _ = child.communicate()
            if child.returncode:
                raise RuntimeError(f"python -m {module} failed with {child.returncode}:\n{said}")
    finally:
        for child in children.values():
            child.kill()
            child.wait()


def version() -> str:
    """Changes whenever vireo, the code of this package or the shipped weights do, so that no world is ever stale."""
    digest = hashlib.blake2b(digest_size=4)
    package = Path(__file__).parent
    for path in sorted(p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(path.relative_to(package).as_posix().encode())
        digest.update(path.read_bytes())
    return f"{__version__}-{digest.hexdigest()}"


def write_video(path: Path, frames, x264_params: str = "") -> None:
    """H.264 of uint8 frames (T, H, W, 3) at 8 frames per second.

    Full-resolution colour at crf 10: at 64x64 the usual half-resolution colour would cost 10 dB. x264_params: more
    settings. With "mbtree=0" the bytes are the same each time; without, some clips were seen to have two versions.
    """
    import av

    options = {"crf": "10", "preset": "veryfast", **({"x264-params": x264_params} if x264_params else {})}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv444p"
        stream.codec_context.thread_count = 1
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vireo"


def _complete(world: Path) -> bool:
    """Whether the world is there. False if there is nothing or an empty folder; UserError for anything else."""
    if (world / MARKER).is_file():
        found = json.loads((world / MARKER).read_text())["version"]
        if found != version():
            raise UserError(f"{world} is the mini world of version {found}, this is {version()}: delete it")
        return True
    if world.exists() and (not world.is_dir() or any(world.iterdir())):
        raise UserError(f"{world} is neither empty nor a mini world (no {MARKER}): name another folder")
    return False


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
