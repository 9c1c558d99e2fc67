"""vireo sample run=<run> [step=500] [clips=4] [weights=<file>] [out=<folder>] [paths.data=<other clips>]
vireo sample run=<run> prompt="a small red square" [image=<file>] [clips=1 | name=<id>] …
vireo sample run=<run> prompt="a dog runs" reference=<file>,<file> [clips=1 | name=<id>] …
vireo sample run=<run> video=<file> mask=<file> [prior=<file>] [max_side=960] [clips=1] …

Show what a trained network makes of held-out clips: side-by-side videos and PNG grids, and the further videos that
the recipe's sampler offers, such as roll-outs. Or of what is given here, in as many versions as `clips` says: of a
prompt, and for image-to-video a picture, or pictures of subjects; of a video and the hole in it. What people want of
it is clip_000_result.mp4, of a single frame clip_000_result.png; with name=<id> it is <id>.mp4 (or .png) and nothing
else, for benchmarks that score folders of videos. What an earlier call left of a clip of the same number is removed.
A dataset's class takes part by a static method `from_files`, which gets what it names of its node's values and of
these, and returns a sample.
Default folder: <run>/samples/by_hand.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vireo.config.instantiation import locate
from vireo.errors import UserError
from vireo.verbs import arguments

# What a person may give in place of held-out clips.
GIVEN = ("prompt", "image", "video", "mask", "prior", "max_side", "reference")


def main(words: Sequence[str]) -> int:
    by_hand = any(word.partition("=")[0] in GIVEN for word in words)
    own = ("step", "clips", "weights", "out", "name", *GIVEN)
    given = arguments.read(words, own, folders=("weights",) if by_hand else ("data", "weights"))
    files = {name: text for name, text in given.own.items() if name in GIVEN}
    clips = arguments.whole(given.own, "clips", 1 if files else 4)
    name = given.own.get("name")
    if name is not None and (not files or clips != 1):
        raise UserError("name=<id> is for one video of what is given by hand (prompt=…): leave clips out")
    sample = _from_files(given.settings["data"], files) if files else None
    from vireo import objects
    from vireo.comparison import FPS, show
    from vireo.validation import further_videos, score_clips
    from vireo.verbs import trained
    from vireo.video_io import write_picture, write_video

    network, about = trained.network(given)
    encoder = objects.encoder(given.settings)
    encoder.to(trained.device())
    stream = trained.held_out(given.settings, encoder) if sample is None else trained.by_hand(sample, clips or 0)
    folder = Path(given.own.get("out", (given.folder or Path()) / "samples" / "by_hand"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"weights: {about}")
    sampler = objects.sampler(given.settings)
    fps, gif = (given.settings["validation"][key] for key in ("fps", "gif"))
    some = range(min(clips or 0, len(stream.dataset)))
    batch_size, device = given.settings["batch_size"], trained.device()
    loss, rates = objects.loss(given.settings), dict[int, float | None]()
    for score, columns in score_clips(network, encoder, loss, sampler, stream, some, batch_size, device):
        if score.unreadable:
            print(f"clip {score.clip} is left out: {score.name}: {score.unreadable}")
            continue
        rates[score.clip] = (fps or score.fps) if sample is None else (score.fps or fps)  # people's own keep theirs
        stem, result, written = f"clip_{score.clip:03d}", columns[sampler.result], []
        if not name:
            _remove_earlier(folder, stem)
            written += show(columns, folder / stem, rates[score.clip], gif)
        if sample is not None:
            moves = len(result) > 1
            written.append(folder / f"{name or f'{stem}_result'}.{'mp4' if moves else 'png'}")
            if moves:
                write_video(written[-1], result, rates[score.clip] or FPS)
            else:
                write_picture(written[-1], result[0])
        psnr = f"  {score.measures['psnr']:.2f} dB" if "psnr" in score.measures else ""
        print(f"{', '.join(map(str, written))}  {score.name}{psnr}")
    for clip, title, columns in further_videos(network, encoder, sampler, stream, list(rates), batch_size, device):
        print(*show(columns, folder / f"clip_{clip:03d}_{title}", rates[clip], gif), sep=", ")
    return 0


def _remove_earlier(folder: Path, stem: str) -> None:
    """What another call has written of a clip of this number: beside the new files it would pass for theirs.

    Exact names, since people may keep files of theirs, such as clip_000_mask.png, in the same folder.
    """
    for name in (f"{stem}.gif", f"{stem}.mp4", f"{stem}.png", f"{stem}_result.mp4", f"{stem}_result.png"):
        (folder / name).unlink(missing_ok=True)


def _from_files(node: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """The sample that the data's class makes of what a person gave. Raises UserError where it cannot."""
    name = node["_target_"]
    make = getattr(locate(name), "from_files", None)
    if make is None:
        raise UserError(f"{name} makes no samples of {', '.join(files)}: leave it out, and held-out clips are shown")
    takes = inspect.signature(make).parameters
    unknown = files.keys() - takes.keys()
    values = {key: value for key, value in node.items() if key in takes and key not in GIVEN} | dict(files)
    lacking = [key for key, one in takes.items() if one.default is one.empty and key not in values]
    if unknown or lacking:
        problem = f"does not take {', '.join(sorted(unknown))}" if unknown else f"needs {', '.join(lacking)}"
        raise UserError(f"a sample by hand of {name} {problem}; it takes {', '.join(k for k in takes if k in GIVEN)}")
    return make(**values)
