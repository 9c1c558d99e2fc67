"""vireo sample run=<run> [step=500] [clips=4] [weights=<file>] [out=<folder>] [paths.data=<other clips>]

Show what a trained network makes of held-out clips: side-by-side videos and PNG grids.
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
    from vireo.data.stream import Stream
    from vireo.validation import SEED, score_clips
    from vireo.verbs import trained

    network, about = trained.network(given)
    encoder = objects.encoder(given.settings)
    encoder.to(trained.device())
    stream = Stream(objects.dataset(given.settings, "validation"), SEED, shuffle=False)
    folder = Path(given.own.get("out", (given.folder or Path()) / "samples" / "by_hand"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"weights: {about}")
    scores = score_clips(
        network,
        encoder,
        objects.loss(given.settings),
        objects.sampler(given.settings),
        stream,
        range(min(clips or 0, len(stream.dataset))),
        given.settings["batch_size"],
        trained.device(),
    )
    for score, columns in scores:
        show(columns, folder / f"clip_{score.clip:03d}", given.settings["validation"]["fps"] or score.fps)
        psnr = f"  {score.measures['psnr']:.2f} dB" if "psnr" in score.measures else ""
        print(f"{folder / f'clip_{score.clip:03d}'}.mp4, .png  {score.name}{psnr}")
    return 0
