"""Whether an editor uses what it is given, and how its errors add up when it goes on from its own frames."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vireo.errors import UserError
from vireo.metrics import psnr, ssim
from vireo.pixels import as_8_bit, to_pixels
from vireo.randomness import Draws
from vireo.sampling.columns import Remembered
from vireo.sampling.edits import UNEVEN, EditSampler, evenly_spaced
from vireo.sampling.evaluation import Evaluated

TRUE, OTHER_TEXT, FROZEN = "prediction", "with another clip's text", "with the last frame as all history"


class Counterfactuals:
    """The same clips and noise with another clip's text, and with a history that stands still.

    A network that reads the text is worse with a wrong one; one that looks at more than the last frame is worse without
    the others. Rows: {"line", "psnr", "ssim", "l1", "changed_l1", "changed_psnr", "changed_ssim", "note"}, means over
    the clips; see `EditSampler.measure`. The sampler's other columns and baselines have rows too.

    clips: how many of the held-out clips, from the first; each is sampled three times. None: all. batch_size: clips at
    a time. A clip's other text is that of the next clip, in turn, whose text differs.
    """

    def __init__(self, clips: int | None = 32, batch_size: int = 4) -> None:
        self.clips, self.batch_size = clips, batch_size

    @torch.no_grad()
    def __call__(self, given: Evaluated) -> Sequence[Mapping[str, Any]]:
        """See `vireo.sampling.evaluation.Evaluation`. Raises UserError for a sampler that is no EditSampler."""
        editor = _editor(given.sampler)
        given = _first(given, self.clips)
        # The clips are read twice, since another clip's text may come after the clip.
        texts = [text for _, batch, _ in _batches(given, self.batch_size) for text in batch["prompt"]]
        others = dict(zip(given.indices, other_texts(texts), strict=True))
        found: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        for some, batch, draws in _batches(given, self.batch_size):
            batch = given.encoder(batch, draws)
            columns = {**editor(given.network, given.encoder, batch, draws), **editor.baselines(batch)}
            if (wrong := [others[index] for index in some]) and None not in wrong:
                told = given.encoder(_without_text(batch, given.encoder) | {"prompt": wrong}, draws)
                columns[OTHER_TEXT] = editor.predict(given.network, given.encoder, told, draws)
            history = batch["condition_latents"]
            if history.shape[1] > 1:
                still = {**batch, "condition_latents": history[:, -1:].expand_as(history)}
                columns[FROZEN] = editor.predict(given.network, given.encoder, still, draws)
            for line, measures in _figures(editor, given.network, given.encoder, batch, columns).items():
                for measure, values in measures.items():
                    found[line][measure].append(values)
        if not found:
            return []
        rows = [
            {"line": line, **{name: float(torch.cat(values).mean()) for name, values in measures.items()}, "note": ""}
            for line, measures in found.items()
        ]
        missing = {OTHER_TEXT: "all clips have the same text", FROZEN: "the network sees a single frame"}
        nothing = dict.fromkeys(next(iter(found.values())))
        rows += [{"line": line, **nothing, "note": why} for line, why in missing.items() if line not in found]
        return rows


class RollOut:
    """Each frame of a roll-out, beside holding the last known frame and the oldest one.

    A clip has N + 1 frames, so a roll-out of K frames whose truth is known starts from N + 1 - K; the window's missing
    ones are copies of the oldest, which is harder than what the network was trained on. num_frames: K, at most N.
    Rows: {"frame", "line", "psnr", "ssim", "l1", "changed_l1", "changed_psnr", "changed_ssim", "known_frames"}, means
    over the clips. What changes is counted from the last known frame, see `EditSampler.measure`. known_frames:
    N + 1 - K. Where the frames are not evenly spaced, one row {"frame", "line", "note"} says that nothing is measured.

    clips, batch_size: as for `Counterfactuals`.
    """

    def __init__(self, num_frames: int = 8, clips: int | None = 32, batch_size: int = 4) -> None:
        if num_frames < 1:
            raise UserError(f"a roll-out has at least one frame, got num_frames={num_frames}")
        self.num_frames, self.clips, self.batch_size = num_frames, clips, batch_size

    @torch.no_grad()
    def __call__(self, given: Evaluated) -> Sequence[Mapping[str, Any]]:
        """See `vireo.sampling.evaluation.Evaluation`. Raises UserError for a sampler that is no EditSampler."""
        editor, known = _editor(given.sampler), 0
        found: dict[tuple[int, str], dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        for _, batch, draws in _batches(_first(given, self.clips), self.batch_size):
            if not evenly_spaced(batch):
                return [{"frame": "all", "line": "all", "note": f"not measured: {UNEVEN}"}]
            columns = editor.within(given.network, given.encoder, given.encoder(batch, draws), draws, self.num_frames)
            length = columns["target"].shape[1]
            known = batch["frames"].shape[1] + 1 - length
            truth = torch.cat([batch["frames"], batch["target"][:, None]], dim=1)
            columns["copy-first"] = to_pixels(truth[:, :1], low=0.0).expand_as(columns["target"])
            for number in range(length):
                frame = {name: column[:, number, None] for name, column in columns.items()}
                compared = {"frames": truth[:, known - 1, None], "target": truth[:, known + number]}
                for line, measures in _figures(editor, given.network, given.encoder, compared, frame).items():
                    for measure, values in measures.items():
                        found[number + 1, line][measure].append(values)
        return [
            {
                "frame": number,
                "line": line,
                **{name: float(torch.cat(values).mean()) for name, values in measures.items()},
                "known_frames": known,
            }
            for (number, line), measures in found.items()
        ]


def other_texts(given: Sequence[str]) -> list[str | None]:
    """For each text the next one, in turn, that differs from it; None where there is none."""
    turned = [[*given[place + 1 :], *given[:place]] for place in range(len(given))]
    return [next((text for text in rest if text != own), None) for own, rest in zip(given, turned, strict=True)]


def _editor(sampler: Any) -> EditSampler:
    sampler = sampler.sampler if isinstance(sampler, Remembered) else sampler
    if not isinstance(sampler, EditSampler):
        raise UserError(
            f"this evaluation needs vireo.sampling.edits.EditSampler as model.sampler, got {type(sampler).__name__}: "
            "remove it from model.evaluations"
        )
    return sampler


def _first(given: Evaluated, clips: int | None) -> Evaluated:
    return given._replace(indices=list(given.indices)[:clips])


def _batches(given: Evaluated, size: int) -> Iterator[tuple[list[int], dict[str, Any], Draws]]:
    for start in range(0, len(given.indices), size):
        some = list(given.indices[start : start + size])
        batch = given.stream.batch(some, given.device)
        yield some, batch, Draws(given.stream.seed, batch["position"], given.device)


def _without_text(batch: Mapping[str, Any], encoder: Any) -> dict[str, Any]:
    """The batch without what was computed from its prompts, so that the encoder computes it anew."""
    return {name: value for name, value in batch.items() if encoder.outputs.get(name) != "prompt"}


def _figures(
    editor: EditSampler, network: nn.Module, encoder: Any, batch: dict, columns: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The measures (B,) of each column that can be compared with the target."""
    target = columns["target"]
    lines: dict[str, dict[str, Tensor]] = {}
    for name, column in columns.items():
        if name != "target" and name not in editor.unscored and column.shape == target.shape:
            lines[name] = {"psnr": psnr(as_8_bit(column), target), "ssim": ssim(as_8_bit(column), target)}
    for title, values in editor.measure(network, encoder, batch, columns).items():
        line, _, measure = title.rpartition("/")
        if measure != "changed_fraction":
            lines[line or TRUE][measure] = values
    return lines
