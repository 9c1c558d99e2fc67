"""FID, VFID and Inception Score of predictions, and what CLIP says of them. Their weights are the user's files."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vireo.errors import UserError
from vireo.models import i3d
from vireo.models.inception import FILE, Inception
from vireo.pixels import as_8_bit, to_uint8
from vireo.sampling.columns import columns, scored
from vireo.sampling.evaluation import Evaluated

ENOUGH_VIDEOS = 50
ENOUGH = 2000  # pictures below which FID says more about their number than about them
NO_CLIP = "not measured: folder names no CLIP model; openai/clip-vit-large-patch14 is meant"


class InceptionMeasures:
    """FID of every column against the targets (Heusel et al. 2017) and its Inception Score (Salimans et al. 2016).

    Rows: {"column", "fid", "inception_score", "note"}, over all frames of all clips. The Inception Score is that of all
    pictures at once, not the mean of ten random tenths, so that it needs no random numbers.
    weights: the file `vireo.models.inception.FILE`; None measures nothing and says so.
    """

    def __init__(self, weights: str | None = None) -> None:
        self.network = None if weights is None else Inception(weights)

    @torch.no_grad()
    def __call__(self, given: Evaluated) -> Sequence[Mapping[str, Any]]:
        """See `vireo.sampling.evaluation.Evaluation`."""
        if self.network is None:
            why = f"not measured: weights names no file; {FILE} is meant"
            return [{"column": "all", "fid": None, "inception_score": None, "note": why}]
        self.network.to(given.device)
        features: dict[str, list[Tensor]] = {}
        logits: dict[str, list[Tensor]] = {}
        for _, videos in columns(given):
            comparable = scored(videos)
            if comparable:
                comparable["target"] = videos["target"]
            for name, video in comparable.items():
                seen = self.network(to_uint8(video, low=0.0))
                features.setdefault(name, []).append(seen.features)
                logits.setdefault(name, []).append(seen.logits)
        rows = []
        for name in features:
            few = sum(map(len, features[name]))
            distance = None if name == "target" or few < 2 else frechet_distance(features[name], features["target"])
            note = f"{few} pictures: not comparable with figures of other sets below {ENOUGH}" if few < ENOUGH else ""
            score = inception_score(torch.cat(logits[name]))
            rows.append({"column": name, "fid": distance, "inception_score": score, "note": note})
        return rows


class VideoFid:
    """VFID of every column against the targets: FID of I3D's features, one vector a clip (Wang et al. 2018), the same
    features as papers on video inpainting take.

    Rows: {"column", "vfid", "note"}. weights: the file `vireo.models.i3d.FILE`; None measures nothing and says so.
    """

    def __init__(self, weights: str | None = None) -> None:
        self.network = None if weights is None else i3d.I3D(weights)

    @torch.no_grad()
    def __call__(self, given: Evaluated) -> Sequence[Mapping[str, Any]]:
        """See `vireo.sampling.evaluation.Evaluation`."""
        if self.network is None:
            why = f"not measured: weights names no file; {i3d.FILE} is meant"
            return [{"column": "all", "vfid": None, "note": why}]
        self.network.to(given.device)
        features: dict[str, list[Tensor]] = defaultdict(list)
        for _, videos in columns(given):
            for name, video in {**scored(videos), "target": videos["target"]}.items():
                features[name].append(self.network(as_8_bit(video)[None]))
        target, rows = features.pop("target"), []
        few = f"{len(target)} clips: not comparable with figures of other sets" if len(target) < ENOUGH_VIDEOS else ""
        for name, those in features.items():
            distance = frechet_distance(those, target) if len(target) > 1 else None
            rows.append({"column": name, "vfid": distance, "note": few})
        return rows


class ClipSimilarity:
    """Cosines in CLIP's space (Radford et al. 2021), as InstructPix2Pix's protocol has them, means over the clips.

    Rows: {"column", "to_target", "to_input", "to_text", "directional", "note"}: of the column with the target, with the
    column "copy-last", with the instruction. The directional similarity needs captions before and after, which this
    data has not. folder: of a CLIPModel with its tokenizer, as transformers saves them; None measures nothing and says
    so. Raises UserError for a folder that holds none.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.clip = None if folder is None else _Clip(Path(folder).expanduser())

    @torch.no_grad()
    def __call__(self, given: Evaluated) -> Sequence[Mapping[str, Any]]:
        """See `vireo.sampling.evaluation.Evaluation`."""
        none = {"to_target": None, "to_input": None, "to_text": None, "directional": "n/a: no captions"}
        if self.clip is None:
            return [{"column": "all", **none, "note": NO_CLIP}]
        self.clip.to(given.device)
        found: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        for batch, videos in columns(given):
            comparable, [text] = scored(videos), batch["prompt"]
            references = {"to_target": self.clip.pictures(videos["target"]), "to_text": self.clip.text(text)}
            if "copy-last" in comparable:
                references["to_input"] = self.clip.pictures(comparable["copy-last"])
            for name, video in comparable.items():
                seen = self.clip.pictures(video)
                for measure, reference in references.items():
                    found[name][measure].append((seen * reference).sum(dim=-1).mean())
        return [
            {"column": name, **none, **{m: float(torch.stack(each).mean()) for m, each in measures.items()}, "note": ""}
            for name, measures in found.items()
        ]


class TemporalConsistency:
    """Cosines in CLIP's space of successive frames, means over pairs and clips: TC of papers on video inpainting.

    Rows: {"column", "temporal_consistency", "note"}, the target's among them. folder: as for `ClipSimilarity`.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.clip = None if folder is None else _Clip(Path(folder).expanduser())

    @torch.no_grad()
    def __call__(self, given: Evaluated) -> Sequence[Mapping[str, Any]]:
        """See `vireo.sampling.evaluation.Evaluation`. Clips of a single frame have no pair and are left out."""
        if self.clip is None:
            return [{"column": "all", "temporal_consistency": None, "note": NO_CLIP}]
        self.clip.to(given.device)
        found: dict[str, list[Tensor]] = defaultdict(list)
        for _, videos in columns(given):
            if len(videos["target"]) > 1:
                for name, video in {"target": videos["target"], **scored(videos)}.items():
                    seen = self.clip.pictures(video)
                    found[name].append((seen[1:] * seen[:-1]).sum(dim=-1).mean())
        return [
            {"column": name, "temporal_consistency": float(torch.stack(each).mean()), "note": ""}
            for name, each in found.items()
        ]


def frechet_distance(features: Sequence[Tensor], target: Sequence[Tensor]) -> float:
    """Between Gaussians fitted to two sets of features, lists of (N, D); torchmetrics' FID on features."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    given = nn.Identity()
    given.num_features = features[0].shape[1]  # type: ignore[assignment]
    distance = FrechetInceptionDistance(feature=given).to(features[0].device).set_dtype(torch.float64)
    distance.update(torch.cat(list(features)).double(), real=False)
    distance.update(torch.cat(list(target)).double(), real=True)
    return float(distance.compute())


def inception_score(logits: Tensor) -> float:
    """exp of the mean divergence of a picture's classes from those of all pictures; logits: (N, classes)."""
    log_classes = logits.double().log_softmax(dim=1)
    overall = log_classes.exp().mean(dim=0, keepdim=True).log()
    return float((log_classes.exp() * (log_classes - overall)).sum(dim=1).mean().exp())


class _Clip(nn.Module):
    """Unit vectors of pictures and texts."""

    model: Any
    mean: Tensor
    std: Tensor

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        try:
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"CLIP: {folder} is no CLIPModel with its tokenizer: {error}") from None
        self.model.eval().requires_grad_(False)
        self.side = int(self.model.config.vision_config.image_size)
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1))

    def pictures(self, video: Tensor) -> Tensor:
        """(T, 3, H, W) in [0, 1] -> (T, D): the shorter side becomes CLIP's, then the middle is cut out."""
        height, width = video.shape[-2:]
        scale = self.side / min(height, width)
        size = [max(self.side, round(height * scale)), max(self.side, round(width * scale))]
        small = F.interpolate(as_8_bit(video), size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        cut = small[..., top : top + self.side, left : left + self.side]
        pooled = self.model.vision_model(pixel_values=(cut - self.mean) / self.std).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    def text(self, text: str) -> Tensor:
        """(1, D)."""
        tokens = self.tokenizer([text], padding=True, truncation=True, return_tensors="pt").to(self.mean.device)
        pooled = self.model.text_model(**tokens).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)
