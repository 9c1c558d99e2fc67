"""vireo sample run=<run> [step=500] [clips=4] [weights=<file>] [out=<folder>] [paths.data=<other clips>]

Show what a trained network makes of held-out clips: side-by-side videos and PNG grids, and the further videos that
the recipe's sampler offers, such as roll-outs.
Default folder: <run>/samples/by_hand.
"""

from collections.abc import Sequence
from pathlib import Path

from vireo.verbs import arguments


def main(words: Sequence[str]) -> int:
    given = arguments.read(words, ("step", "clips", "weights", "out"))
    clips = arguments.whole(given.own, "clips", 4)
    from vireo import objects
    from vireo.comparison import show
    from vireo.validation import further_videos, score_clips
    from vireo.verbs import trained

    network, about = trained.network(given)
    encoder = objects.encoder(given.settings)
    encoder.to(trained.device())
    stream = trained.held_out(given.settings, encoder)
    folder = Path(given.own.get("out", (given.folder or Path()) / "samples" / "by_hand"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"weights: {about}")
    sampler = objects.sampler(given.settings)
    fps, gif = (given.settings["validation"][key] for key in ("fps", "gif"))
    some = range(min(clips or 0, len(stream.dataset)))
    batch_size, device = given.settings["batch_size"], trained.device()
    loss, rates = objects.loss(given.settings), {}
    for score, columns in score_clips(network, encoder, loss, sampler, stream, some, batch_size, device):
        rates[score.clip] = fps or score.fps
        written = show(columns, folder / f"clip_{score.clip:03d}", rates[score.clip], gif)
        psnr = f"  {score.measures['psnr']:.2f} dB" if "psnr" in score.measures else ""
        print(f"{', '.join(map(str, written))}  {score.name}{psnr}")
    for clip, title, columns in further_videos(network, encoder, sampler, stream, some, batch_size, device):
        print(*show(columns, folder / f"clip_{clip:03d}_{title}", rates[clip], gif), sep=", ")
    return 0
