"""Real video files for the tests: good ones of several kinds, and broken ones."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CLOSED_GOP = {"g": "10", "keyint_min": "10", "bf": "3", "preset": "veryfast"}


def pictures(num_frames: int = 40, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 (T, H, W, 3): blocks that move, and a corner whose grey level, 6 more each time, tells the frame."""
    blocks = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    blocks = blocks.repeat(8, 0).repeat(8, 1)
    frames = np.stack([np.roll(blocks, (3 * k, 5 * k), (0, 1)) for k in range(num_frames)])
    frames[:, : height // 2, : width // 2] = (6 * np.arange(num_frames) % 256)[:, None, None, None]
    return frames


def write(
    path: Path,
    frames: np.ndarray | None = None,
    codec: str = "libx264",
    options: dict | None = None,
    container: dict | None = None,
    pix_fmt: str = "yuv420p",
    fps: int = 25,
    times: list[int] | None = None,
) -> Path:
    """Encode frames with PyAV; `times` are their presentation times in units of 1 / fps."""
    frames = pictures() if frames is None else frames
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=fps, options=CLOSED_GOP if options is None else options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        stream.codec_context.thread_count = 1
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = times[number] if times else number, Fraction(1, fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def write_flat(path: Path, num_frames: int, height: int = 48, width: int = 64, first: int = 0) -> Path:
    """A video whose frame k is plain grey of level 4 * (k + first), so that a mean tells the frame."""
    levels = 4 * (np.arange(num_frames) + first)
    assert levels[-1] < 256
    return write(path, np.broadcast_to(levels.astype(np.uint8)[:, None, None, None], (num_frames, height, width, 3)))


def variable_rate(path: Path) -> tuple[Path, list[int]]:
    """A video that waits five units after every seventh frame, and its times."""
    times = [k + 5 * (k // 7) for k in range(40)]
    return write(path, times=times), times


def rotated(path: Path) -> Path:
    """A video that a player turns by 90 degrees, as phones write it: the matrix of the track header is replaced."""
    write(path)
    content = bytearray(path.read_bytes())
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    start = content.index(upright, content.index(b"tkhd"))
    content[start : start + len(upright)] = turned
    path.write_bytes(content)
    return path


def cut_without_encoding(path: Path) -> Path:
    """A video that begins at frame 30 of another, between its key frames: an edit list hides what comes before."""
    source = write(path.with_name("whole.mp4"), pictures(60), options={**CLOSED_GOP, "g": "20", "keyint_min": "20"})
    with av.open(str(source)) as whole, av.open(str(path), "w") as cut:
        track = whole.streams.video[0]
        copy = cut.add_stream_from_template(track)
        begin = int(Fraction(30, 25) / track.time_base)
        whole.seek(begin, stream=track)
        for packet in whole.demux(track):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - begin, packet.dts - begin, copy
                cut.mux(packet)
    source.unlink()
    return path


def audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        stream.layout = "mono"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        file.mux(stream.encode(silence))
        file.mux(stream.encode())
    return path


def broken(folder: Path) -> dict[str, Path]:
    """Every kind of file that cannot be read, by what is wrong with it."""
    folder.mkdir(parents=True, exist_ok=True)
    at_end = write(folder / "index_at_end.mp4").read_bytes()
    at_front = write(folder / "index_at_front.mp4", container={"movflags": "faststart"}).read_bytes()
    with av.open(str(folder / "index_at_front.mp4")) as file:
        ends = sorted(packet.pos + packet.size for packet in file.demux(video=0) if packet.pts is not None)
    contents = {
        "truncated, index at end": at_end[: len(at_end) * 6 // 10],
        "truncated a little, index at end": at_end[:-600],
        "truncated, index at front": at_front[: len(at_front) * 6 // 10],
        "truncated a little, index at front": at_front[:-20],
        "truncated between frames, index at front": at_front[: ends[29]],
        "empty": b"",
        "text": b"this is no video\n" * 100,
    }
    files = {kind: folder / f"{kind.replace(', ', '_').replace(' ', '_')}.mp4" for kind in contents}
    for kind, content in contents.items():
        files[kind].write_bytes(content)
    files["audio only"] = audio_only(folder / "audio.mp4")
    files["missing"] = folder / "missing.mp4"
    files["other container"] = write(folder / "other.avi", codec="mpeg4", options={})
    files["folder without pictures"] = folder / "no_pictures"
    files["folder without pictures"].mkdir()
    (files["folder without pictures"] / "notes.txt").write_text("nothing to see")
    (folder / "index_at_end.mp4").unlink()
    (folder / "index_at_front.mp4").unlink()
    return files


REASONS = {
    "truncated, index at end": "truncated one whose index at the end is missing",
    "truncated a little, index at end": "truncated one whose index at the end is missing",
    "truncated, index at front": "truncated (after|within) frame",
    "truncated a little, index at front": "truncated within frame 40",
    "truncated between frames, index at front": "truncated after frame 30 of 40",
    "empty": "empty",
    "text": "not a video",
    "audio only": "no video stream",
    "missing": "no such file",
    "other container": "expected one of .m4v",
    "folder without pictures": "without pictures",
}


def damaged(path: Path, whole: Path) -> Path:
    """A copy of a video of 40 frames whose frames 15 to 18 are overwritten with zeros."""
    with av.open(str(whole)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.pts is not None]
        spans = [(packet.pos, packet.size) for packet in packets if 15 <= packet.pts // packet.duration < 19]
    content = bytearray(whole.read_bytes())
    for position, size in spans:
        content[position : position + size] = bytes(size)
    path.write_bytes(content)
    return path
