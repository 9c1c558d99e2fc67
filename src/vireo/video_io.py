"""The one door to videos: reading files and folders of frames, writing them, laying clips side by side.

Frames are uint8 RGB tensors (T, C, H, W). Whatever is wrong with a video ends in one exception, `BadVideoError`, whose
reason is written for people.

decord reads the files on which it gives the same bytes as PyAV. PyAV reads the others (see `_PyAVVideo.suits_decord`:
decord shows wrong frames after seeking in an open group of pictures, for one, without an error), and all of them where
decord has no wheel. `VIREO_DECODER=decord|pyav` forces one of the two.
"""

import io
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypeVar

import av
import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor

from vireo.errors import UserError

# Containers that store when each frame is shown. Seeking in others (.avi, .ts) leads both decoders to wrong frames.
VIDEO_SUFFIXES = frozenset({".m4v", ".mkv", ".mov", ".mp4", ".webm"})
IMAGE_SUFFIXES = frozenset({".jpeg", ".jpg", ".png"})

T = TypeVar("T")


class BadVideoError(UserError):
    """A video that cannot be read. `path`: the file or folder; `reason`: why, for people."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)  # both stay in args, so that the error can be pickled on its way out of a worker
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class VideoReader:
    """The frames of one video file, or of one folder of pictures in natural order (frame2 before frame10).

    Open it where it is used, once per sample, and close it (`with`): a decord reader made before a fork hangs in the
    forked worker for ever. It decodes with one thread, since the loader's workers are the parallelism.
    What fails is tried again on a freshly opened file before the file is called bad: decord readers have been seen to
    fail beside a second one in the same process and to work when opened anew.

    path: a video file, or a folder of .jpg or .png. decoder: what `probe` said of this file; without it the file's
    packets are read first to choose one. folder_fps: the frame rate of a folder, whose pictures carry no time (24 is
    DAVIS's). Raises BadVideoError if it cannot be read, UserError for an unknown or missing decoder.
    """

    def __init__(self, path: str | Path, decoder: str | None = None, folder_fps: float = 24.0) -> None:
        self.path = Path(path)
        self._folder_fps = folder_fps
        self._attempts = _attempts(decoder)
        self._video: _Video | None = None
        self._num_frames = self._reading(lambda video: video.num_frames)

    def __len__(self) -> int:
        """Number of frames that are there, not the one that a header announces."""
        return self._num_frames

    @property
    def fps(self) -> float:
        """Average frames a second, 0 if the file does not say. Where the rate varies, `timestamps` is right."""
        return self._reading(lambda video: video.fps)

    @property
    def height(self) -> int:
        return self._reading(lambda video: video.size()[0])

    @property
    def width(self) -> int:
        return self._reading(lambda video: video.size()[1])

    @property
    def timestamps(self) -> Tensor:
        """Seconds from the first frame to each frame, float64 (T,)."""
        seconds = self._reading(lambda video: video.timestamps())
        return torch.from_numpy(seconds - seconds[0])

    def get(self, indices: Sequence[int]) -> Tensor:
        """The frames at these indices, in this order, repeats allowed: uint8 RGB (T, C, H, W).

        Only these frames are decoded, and those that their decoding needs. The memory may be laid out channels-last,
        as decoders give it and as resizing is fastest. Raises IndexError for an index outside the video.
        """
        if not indices or not 0 <= min(indices) <= max(indices) < len(self):
            raise IndexError(f"{self.path}: frames {list(indices)} were asked for, there are 0 to {len(self) - 1}")
        unique = sorted(set(indices))
        frames = self._reading(lambda video: video.read(unique)).permute(0, 3, 1, 2)
        return frames if unique == list(indices) else frames[[unique.index(index) for index in indices]]

    def expect(self, num_frames: int) -> None:
        """Raises BadVideoError if there are fewer frames than when the file was last looked at."""
        if len(self) < num_frames:
            raise BadVideoError(self.path, f"it has {len(self)} frames now, {num_frames} when last looked at")

    def close(self) -> None:
        """Give the file back; asked for more, a closed reader opens it again."""
        if self._video is not None:
            self._video.close()
            self._video = None

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reading(self, read: Callable[["_Video"], T]) -> T:
        """`read` applied to the open video, or after a failure to a fresh one, while attempts are left."""
        while True:
            try:
                if self._video is None:
                    self._video = _open(self.path, self._attempts[0], self._folder_fps)
                return read(self._video)
            except BadVideoError:
                self.close()
                if len(self._attempts) == 1:
                    raise
                self._attempts = self._attempts[1:]


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` learnt. Sizes in pixels as shown (rotated); fps as `VideoReader.fps`; decoder for `VideoReader`."""

    num_frames: int
    fps: float
    height: int
    width: int
    decoder: str


def probe(path: str | Path, folder_fps: float = 24.0) -> VideoInfo:
    """Check one video and describe it, without decoding more than one frame.

    All packets of a file are read, which finds a truncated end, whatever the header says; then its last key frame is
    decoded, which finds a codec that cannot be. Damage between the key frames is not looked for. Of a folder of
    frames the last picture is decoded. Raises BadVideoError.
    """
    path = Path(path)
    video = _FrameFolder(path, folder_fps) if os.path.isdir(path) else _PyAVVideo(path)
    try:
        height, width = video.read([video.last_key])[0].shape[:2]
        decoder = "decord" if video.suits_decord else "pyav"
        return VideoInfo(video.num_frames, video.fps, height, width, decoder)
    finally:
        video.close()


def probe_image(path: str | Path) -> VideoInfo:
    """Decode one picture and describe it, as a video of one frame without a rate. Raises BadVideoError."""
    height, width, _ = _read_image(Path(path)).shape
    return VideoInfo(1, 0.0, height, width, "pillow")


@cache
def decoder_version(decoder: str) -> str:
    """Name and version of what decodes, for identities of what is cached: "pillow 12.0.0".

    decoder: "pillow" for pictures (also those in folders of frames), "pyav" or "decord" for video files, as `probe`
    says. Raises UserError for another one.
    """
    match decoder:
        case "pillow":
            return f"pillow {PIL.__version__}"
        case "pyav":
            return f"pyav {av.__version__}, libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"
        case "decord":
            return f"decord {metadata.version('decord')}"
    raise UserError(f"the decoder is {decoder!r}, expected pillow, pyav or decord")


def read_image(path: str | Path, content: bytes | None = None, over_black: bool = False) -> Tensor:
    """One picture, uint8 RGB (C, H, W). Palettes and grey are expanded.

    content: the bytes of the file if they have been read; `path` then only names it. over_black: what is transparent
    becomes black; without it transparency is dropped. Raises BadVideoError if it cannot be read.
    """
    return torch.from_numpy(_read_image(Path(path), content, over_black)).permute(2, 0, 1)


def is_frame(name: str) -> bool:
    """Whether a file of this name is a frame of the folder it lies in: a picture, and not hidden."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def frame_files(folder: str | Path) -> list[Path]:
    """The pictures directly in a folder in natural order, as `VideoReader` numbers them. Raises BadVideoError."""
    folder = Path(folder)
    try:
        files = sorted((file for file in folder.iterdir() if is_frame(file.name)), key=_natural)
    except OSError as error:
        raise BadVideoError(folder, _first(error)) from error
    if not files:
        raise BadVideoError(folder, "a folder without pictures: expected .jpg or .png frames directly in it")
    return files


def write_video(path: str | Path, frames: Tensor, fps: float) -> None:
    """An H.264 file (yuv420p, plays everywhere) of uint8 RGB frames (T, C, H, W); its folder is made if need be.

    H.264 in yuv420p has even sides: an odd one is padded by repeating its last row or column. The file appears
    complete or not at all. Raises OSError with the path if it cannot be written.
    """
    pixels = _pixels(frames)
    height, width = pixels.shape[1:3]
    pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with _replacing(Path(path)) as unfinished, av.open(str(unfinished), "w", format="mp4") as container:
        options = {"crf": "18", "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_gif(path: str | Path, frames: Tensor, fps: float) -> None:
    """A GIF of uint8 RGB frames (T, C, H, W) that plays for ever, with 256 colours for each frame.

    GIFs count in hundredths of a second, and viewers slow down what is faster than 50 frames a second. Raises OSError
    with the path if it cannot be written.
    """
    first, *rest = [Image.fromarray(picture) for picture in _pixels(frames)]
    duration = 10 * max(2, round(100 / fps))  # ms
    with _replacing(Path(path)) as unfinished:
        first.save(unfinished, format="GIF", save_all=True, append_images=rest, duration=duration, loop=0)


def write_picture(path: str | Path, picture: Tensor) -> None:
    """A PNG of one uint8 RGB picture (C, H, W); its folder is made if need be. Raises OSError with the path."""
    pixels = _pixels(picture[None])[0]
    with _replacing(Path(path)) as unfinished:
        Image.fromarray(pixels).save(unfinished, format="PNG")


def write_grid(path: str | Path, rows: Mapping[str, Tensor], columns: int = 8) -> None:
    """A PNG contact sheet: per row a label and up to `columns` frames of one clip, evenly spaced from first to last.

    rows: uint8 RGB clips (T, C, H, W) by label; their sizes may differ. Raises OSError if it cannot be written.
    """
    strips = []
    for label, clip in rows.items():
        shown = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
        strip = np.concatenate(list(_pixels(clip)[shown]), axis=1)
        strips += [_label(label, strip.shape[1]), strip]
    width = max(strip.shape[1] for strip in strips)
    sheet = np.concatenate([np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0))) for s in strips])
    with _replacing(Path(path)) as unfinished:
        Image.fromarray(sheet).save(unfinished, format="PNG")


def write_row(path: str | Path, columns: Mapping[str, Tensor]) -> None:
    """A PNG of all frames of short clips in one row, each clip under its label.

    columns: uint8 RGB clips (T, C, H, W) by label; a lower one is continued in black. Raises OSError if it cannot be
    written.
    """
    frames = {label: torch.cat(list(clip), dim=-1)[None] for label, clip in columns.items()}  # (1, C, H, T W)
    row = _pixels(side_by_side(frames))[0]
    with _replacing(Path(path)) as unfinished:
        Image.fromarray(row).save(unfinished, format="PNG")


def side_by_side(columns: Mapping[str, Tensor]) -> Tensor:
    """One clip that shows several next to each other under their labels.

    columns: uint8 RGB clips (T, C, H, W) by label. A shorter clip holds its last frame, a lower one is continued in
    black. Returns uint8 RGB (T, C, H + height of the label, sum of W).
    """
    clips = {label: _pixels(clip) for label, clip in columns.items()}
    num_frames = max(len(clip) for clip in clips.values())
    height = max(clip.shape[1] for clip in clips.values())
    panels = []
    for label, clip in clips.items():
        held = np.pad(clip, ((0, num_frames - len(clip)), (0, 0), (0, 0), (0, 0)), mode="edge")
        filled = np.pad(held, ((0, 0), (0, height - clip.shape[1]), (0, 0), (0, 0)))
        bar = np.broadcast_to(_label(label, clip.shape[2]), (num_frames, _LABEL_HEIGHT, clip.shape[2], 3))
        panels.append(np.concatenate([bar, filled], axis=1))
    return torch.from_numpy(np.concatenate(panels, axis=2)).permute(0, 3, 1, 2)


_LABEL_HEIGHT = 14


def _label(text: str, width: int) -> np.ndarray:
    """White on black, uint8 (label height, width, 3), in smaller letters if need be; what does not fit then is cut."""
    bar = Image.new("RGB", (width, _LABEL_HEIGHT))
    fonts = (ImageFont.load_default(size=size) for size in (11, 10, 9, 8))
    font = next((font for font in fonts if font.getlength(text) <= width - 2), ImageFont.load_default(size=8))
    ImageDraw.Draw(bar).text((2, 0), text, fill="white", font=font)
    return np.asarray(bar)


def _pixels(frames: Tensor) -> np.ndarray:
    """uint8 (T, H, W, C) for the encoders."""
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or not len(frames):
        raise TypeError(f"expected uint8 RGB frames (T, 3, H, W), got {frames.dtype} {tuple(frames.shape)}")
    return frames.detach().cpu().permute(0, 2, 3, 1).contiguous().numpy()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write under, moved to `path` on success, else removed; failing to write is an OSError with the path."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, path)
    except (OSError, av.FFmpegError) as error:
        raise OSError(f"could not write {path}: {_first(error)}") from error
    finally:
        if unfinished.exists():
            unfinished.unlink()


class _Video(Protocol):
    """What every kind of video offers. A fault of the file is a BadVideoError and nothing else."""

    num_frames: int
    fps: float

    def size(self) -> tuple[int, int]: ...  # height, width
    def timestamps(self) -> np.ndarray: ...  # seconds, float64 (T,)
    def read(self, indices: list[int]) -> Tensor: ...  # sorted and unique -> uint8 (T, H, W, C)
    def close(self) -> None: ...


def _attempts(decoder: str | None) -> tuple[str, ...]:
    """The decoders to try, one after the other; "auto" looks at the file first."""
    forced = os.environ.get("VIREO_DECODER")
    choice = forced or decoder or "auto"
    if choice not in ("auto", "decord", "pyav"):
        raise UserError(f"the video decoder is {choice!r}, expected decord or pyav (VIREO_DECODER)")
    if forced == "decord" and _decord() is None:
        raise UserError("VIREO_DECODER=decord, but decord cannot be imported: install it, or unset VIREO_DECODER")
    if choice == "pyav" or _decord() is None:
        return ("pyav", "pyav")
    return (choice, choice) if forced else (choice, choice, "pyav")


@cache
def _decord() -> ModuleType | None:
    try:
        import decord
    except (ImportError, OSError):  # no wheel for this platform, or one whose shared libraries are missing
        return None
    decord.logging.set_level(decord.logging.QUIET)  # ffmpeg's remarks; faults come as exceptions
    return decord


def _open(path: Path, decoder: str, folder_fps: float) -> _Video:
    if os.path.isdir(path):
        return _FrameFolder(path, folder_fps)
    if decoder != "decord":
        video = _PyAVVideo(path)
        if decoder == "pyav" or not video.suits_decord:
            return video
        video.close()
    return _DecordVideo(path)


def _check_file(path: Path) -> None:
    """What can be said of a file without opening it."""
    try:
        empty = path.stat().st_size == 0
    except FileNotFoundError as error:
        raise BadVideoError(path, "there is no such file") from error
    except OSError as error:
        raise BadVideoError(path, _first(error)) from error
    if empty:
        raise BadVideoError(path, "the file is empty (0 bytes)")
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise BadVideoError(path, f"expected one of {', '.join(sorted(VIDEO_SUFFIXES))}, or a folder of pictures")


class _DecordVideo:
    def __init__(self, path: Path) -> None:
        _check_file(path)
        decord = _decord()
        assert decord is not None
        self._path = path
        # A file that cannot be opened is a bare RuntimeError, one without frames an assertion.
        self._errors = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError)
        try:
            # fault_tol: left alone, decord puts a neighbour in the place of a frame that it fails to decode. It is a
            # share of the length that must be above 0; this one tolerates no such frame.
            self._reader: Any = decord.VideoReader(str(path), num_threads=1, fault_tol=1e-9)
        except self._errors as error:
            reason = self._complaint() or f"decord cannot open it, PyAV can ({_first(error)})"
            raise BadVideoError(path, reason) from error
        self.num_frames = len(self._reader)
        self.fps = float(self._reader.get_avg_fps())

    def size(self) -> tuple[int, int]:
        _, height, width, _ = self.read([0]).shape
        return height, width

    def timestamps(self) -> np.ndarray:
        return self._reader.get_frame_timestamp(list(range(self.num_frames)))[:, 0].astype(np.float64)

    def read(self, indices: list[int]) -> Tensor:
        try:
            return torch.from_dlpack(self._reader.get_batch(indices).to_dlpack())  # decord's memory, not copied
        except self._errors as error:
            reason = self._complaint() or f"{_span(indices)} cannot be decoded ({_first(error)})"
            raise BadVideoError(self._path, reason) from error

    def close(self) -> None:
        self._reader = None  # its destructor frees the decoder

    def _complaint(self) -> str | None:
        """What PyAV finds wrong with the file, if anything: decord only says where in its source it failed."""
        try:
            _PyAVVideo(self._path).close()
        except BadVideoError as bad:
            return bad.reason
        return None


class _PyAVVideo:
    """Frames are found by their presentation times, which stand in the packets and are read without decoding.

    The header's count is not used, since a truncated file still announces all frames, nor is index / average rate,
    which is wrong where the rate varies.

    suits_decord: whether decord 0.6 gives the same bytes, as far as known. Not for codecs that it lacks (AV1) or whose
    last frames it loses (MPEG-4), more than 8 bits, open groups of pictures (after seeking its frames are wrong or
    missing), edit lists (it shows the frames that they hide) and, known once a frame was decoded, rotated videos (it
    fails at many widths).
    """

    def __init__(self, path: Path) -> None:
        _check_file(path)
        self._path = path
        try:
            self._container = av.open(str(path), metadata_errors="replace")  # titles in another encoding are no fault
        except (av.FFmpegError, OSError) as error:
            reason = f"not a video, or a truncated one whose index at the end is missing ({_first(error)})"
            raise BadVideoError(path, reason) from error
        try:
            self._index_packets()
        except (av.FFmpegError, OSError) as error:
            self.close()
            raise BadVideoError(path, f"the file is damaged ({_first(error)})") from error
        except BadVideoError:
            self.close()
            raise

    def _index_packets(self) -> None:
        if not self._container.streams.video:
            raise BadVideoError(self._path, "there is no video stream in the file (only audio?)")
        stream: Any = self._container.streams.video[0]
        self._stream = stream
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        packets = [_Packet.of(packet, stream) for packet in self._container.demux(stream) if packet.pts is not None]
        shown = [packet for packet in packets if not packet.is_hidden]
        if not shown:
            raise BadVideoError(self._path, "the video stream has no frames")
        # Fewer frames than announced are normal behind an edit list, which shortens the stream's duration as well.
        end = max(packet.end for packet in packets)
        if len(packets) < stream.frames and end < (stream.start_time or 0) + (stream.duration or 0):
            raise BadVideoError(self._path, f"the file is truncated after frame {len(packets)} of {stream.frames}")
        if any(packet.is_corrupt for packet in packets):
            raise BadVideoError(self._path, f"the file is truncated within frame {len(packets)}")

        self._pts = sorted({packet.pts for packet in shown})
        self._index = {pts: index for index, pts in enumerate(self._pts)}
        self._keys = sorted({0} | {self._index[packet.pts] for packet in shown if packet.is_key})
        self._seconds = float(stream.time_base or 1)  # per unit of pts
        self.num_frames = len(self._pts)
        self.fps = float(stream.average_rate or 0)
        self.last_key = self._keys[-1]
        whole = len(shown) == len(packets) and stream.frames in (0, len(packets))
        eight_bits = stream.codec_context.format.components[0].bits == 8
        self.suits_decord = whole and eight_bits and all(packet.is_clean for packet in packets if packet.is_key)

    def size(self) -> tuple[int, int]:
        _, height, width, _ = self.read([0]).shape
        return height, width

    def timestamps(self) -> np.ndarray:
        return np.asarray(self._pts, np.float64) * self._seconds

    def read(self, indices: list[int]) -> Tensor:
        try:
            return _stacked([self._pixels(frame, index) for index, frame in self._decoded(indices)])
        except (av.FFmpegError, OSError) as error:
            raise BadVideoError(self._path, f"{_span(indices)} cannot be decoded ({_first(error)})") from error

    def close(self) -> None:
        self._container.close()

    def _decoded(self, indices: list[int]) -> Iterator[tuple[int, Any]]:
        """Each index with its frame, decoded from the key frame or the decoded frame before it, whichever is later."""
        frames: Iterator[Any] = iter(())
        at = None  # index of the frame decoded last
        for index in indices:
            key = self._keys[bisect_right(self._keys, index) - 1]
            if at is None or key > at + 1:
                self._container.seek(self._pts[key], stream=self._stream)
                frames, at = self._container.decode(self._stream), -1
            while at < index:
                frame = next(frames, None)
                at = self.num_frames if frame is None else self._index.get(frame.pts, at)
            if at > index:
                raise BadVideoError(self._path, f"frame {index} cannot be decoded (not found at its time)")
            yield index, frame

    def _pixels(self, frame: Any, index: int) -> np.ndarray:
        """uint8 (H, W, C), as shown: turned if the file says that the camera was."""
        if frame.is_corrupt:
            raise BadVideoError(self._path, f"frame {index} is damaged")
        pixels = frame.to_ndarray(format="rgb24", width=self._stream.width, height=self._stream.height)
        if not frame.rotation:
            return pixels
        self.suits_decord = False
        return np.rot90(pixels, frame.rotation // 90)


class _Packet(NamedTuple):
    """What is kept of an encoded frame; its data are not, since together they are the file."""

    pts: int
    end: int
    is_key: bool
    is_clean: bool  # a key frame behind which no frame refers to one before it
    is_hidden: bool  # decoded, but not shown
    is_corrupt: bool  # less data than announced

    @staticmethod
    def of(packet: Any, stream: Any) -> "_Packet":
        clean = packet.is_keyframe and _starts_anew(bytes(packet), stream.codec_context)
        end = packet.pts + (packet.duration or 0)
        return _Packet(packet.pts, end, packet.is_keyframe, clean, packet.is_discard, packet.is_corrupt)


def _starts_anew(key_frame: bytes, codec: Any) -> bool:
    """Whether decoding can begin at a key frame without a trace of what was before; False for other codecs than these.

    In H.264 and HEVC these are the IDR pictures, by the types of their NAL units, whose lengths stand before them
    (ISO/IEC 14496-15); key frames of open groups of pictures are none. In VP8 and VP9 all key frames are.
    """
    if codec.name in ("vp8", "vp9"):
        return True
    setup = bytes(codec.extradata or b"")
    if codec.name not in ("h264", "hevc") or len(setup) < 22 or setup[0] != 1:  # 0: start codes instead of lengths
        return False
    size = (setup[4 if codec.name == "h264" else 21] & 3) + 1  # bytes of a length
    types, place = set(), 0
    while place + size < len(key_frame):
        header = key_frame[place + size]
        types.add(header & 31 if codec.name == "h264" else header >> 1 & 63)
        place += size + int.from_bytes(key_frame[place : place + size], "big")
    return bool(types & ({5} if codec.name == "h264" else {19, 20}))


class _FrameFolder:
    def __init__(self, path: Path, fps: float) -> None:
        self._files = frame_files(path)
        self._path = path
        self.num_frames = len(self._files)
        self.fps = fps
        self.last_key = self.num_frames - 1
        self.suits_decord = False

    def size(self) -> tuple[int, int]:
        with _unreadable_image(self._files[0]), Image.open(self._files[0]) as image:
            return image.height, image.width

    def timestamps(self) -> np.ndarray:
        return np.arange(self.num_frames, dtype=np.float64) / self.fps

    def read(self, indices: list[int]) -> Tensor:
        frames = [_read_image(self._files[index]) for index in indices]
        sizes = {f"{frame.shape[1]}x{frame.shape[0]}" for frame in frames}
        if len(sizes) > 1:
            raise BadVideoError(self._path, f"its frames have different sizes: {', '.join(sorted(sizes))}")
        return _stacked(frames)

    def close(self) -> None:
        """Nothing stays open between reads."""


def _stacked(frames: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(frames))


def _read_image(path: Path, content: bytes | None = None, over_black: bool = False) -> np.ndarray:
    """uint8 RGB (H, W, C)."""
    with _unreadable_image(path), Image.open(path if content is None else io.BytesIO(content)) as image:
        if not over_black or not image.has_transparency_data:
            return np.array(image.convert("RGB"))
        *colours, alpha = np.moveaxis(np.array(image.convert("RGBA")).astype(np.uint16), 2, 0)
    return ((np.stack(colours, axis=2) * alpha[..., None] + 254) // 255).astype(np.uint8)


@contextmanager
def _unreadable_image(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise BadVideoError(path, "there is no such picture") from error
    except UnidentifiedImageError as error:
        raise BadVideoError(path, "not a picture, or of an unknown format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PNG faults are SyntaxErrors
        raise BadVideoError(path, f"the picture is damaged ({_first(error)})") from error


def _natural(path: Path) -> tuple[list[int | str], str]:
    """Sorts numbers by value, whatever their number of digits; the plain name decides between equals."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if part.isdecimal() else part for part in parts], path.name


def _span(indices: list[int]) -> str:
    return f"frames {indices[0]} to {indices[-1]}" if len(indices) > 1 else f"frame {indices[0]}"


def _first(error: Exception) -> str:
    """The first line of an error, without the place in the source that decord puts before it and the stack after it."""
    if isinstance(error, (OSError, av.FFmpegError)) and error.strerror:
        return error.strerror
    return re.sub(r"^(\[[\d:]+\] \S+: )+", "", (str(error).strip().splitlines() or [type(error).__name__])[0])
