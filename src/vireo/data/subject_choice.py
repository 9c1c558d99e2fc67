"""Which subjects of an annotated clip become references."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vireo.data.references import tight_box
from vireo.data.subject_annotations import Annotation, Subject
from vireo.randomness import Draws

Selection = Literal["first", "random", "best_score"]
SELECTIONS = ("first", "random", "best_score")


class Filters(NamedTuple):
    """What a subject must be like; by default anything but an empty mask.

    no_background: its class is none of the clip's background. area: smallest and largest share of the picture that its
    box takes. text_score: smallest. overlap: largest intersection over union with a subject that was chosen before.
    with_face: whether a face must lie in it.
    """

    no_background: bool = False
    area: tuple[float, float] | None = None
    text_score: float | None = None
    overlap: float | None = None
    with_face: bool = False


NO_FILTERS = Filters()


class Chosen(NamedTuple):
    subject: Subject
    mask: NDArray[np.bool_]


def choose(
    annotation: Annotation,
    selection: Selection,
    limit: int | None,
    filters: Filters = NO_FILTERS,
    prefer_tagged: bool = False,
    draws: Draws | None = None,
    among: Iterable[str] | None = None,
) -> list[Chosen]:
    """At most `limit` subjects in the order of `selection`: of the masks, of a draw, or of falling aesthetic score.

    prefer_tagged: those whose class is a subject of the clip, or a person, before all others. draws: for "random",
    which draws "subjects"; B is 1. among: ids; None for all. Raises ValueError for a mask that is none.
    """
    allowed = None if among is None else set(among)
    candidates = [s for s in annotation.subjects if allowed is None or s.id in allowed]
    chosen: list[Chosen] = []
    for subject in _ordered(annotation, candidates, selection, prefer_tagged, draws):
        if limit is not None and len(chosen) == limit:
            break
        if is_wanted(subject, annotation, filters) and suits(mask := subject.mask(), annotation, filters, chosen):
            chosen.append(Chosen(subject, mask))
    return chosen


def is_wanted(subject: Subject, annotation: Annotation, filters: Filters) -> bool:
    """Whether a subject passes the filters that need no look at its mask."""
    if filters.no_background and subject.class_name in annotation.background:
        return False
    return filters.text_score is None or subject.text_score >= filters.text_score


def suits(mask: NDArray[np.bool_], annotation: Annotation, filters: Filters, chosen: Sequence[Chosen]) -> bool:
    """Whether a mask passes those that do. chosen: of the same picture, before."""
    box = tight_box(mask)
    if box is None:
        return False
    share = (box[2] - box[0]) * (box[3] - box[1]) / mask.size
    if filters.area is not None and not filters.area[0] <= share <= filters.area[1]:
        return False
    if filters.with_face and not any(_holds(mask, face) for face in annotation.faces):
        return False
    if filters.overlap is None:
        return True
    return all(_overlap(mask, other.mask) <= filters.overlap for other in chosen)


def _ordered(
    annotation: Annotation, subjects: Sequence[Subject], selection: Selection, prefer_tagged: bool, draws: Draws | None
) -> list[Subject]:
    ordered = list(subjects)
    if selection == "best_score":
        ordered.sort(key=lambda subject: -subject.aesthetic_score)
    elif selection == "random":
        assert draws is not None
        ordered = [ordered[place] for place in draws.uniform("subjects", len(ordered))[0].argsort().tolist()]
    if prefer_tagged:
        ordered.sort(key=lambda subject: subject.class_name not in annotation.subject)
    return ordered


def _holds(mask: NDArray[np.bool_], face: Sequence[float]) -> bool:
    """Whether the middle of a box lies in the mask."""
    x, y = int((face[0] + face[2]) / 2), int((face[1] + face[3]) / 2)
    return 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and bool(mask[y, x])


def _overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum()) if a.shape == b.shape else 0.0
