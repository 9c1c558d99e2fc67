"""Pictures of subjects in annotated clips, decoded and cut out only when they are needed."""

import hashlib
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vireo.data.references import Background, Cutout, cut_out
from vireo.data.subject_annotations import Subject
from vireo.data.subject_parts import Clip
from vireo.video_io import BadVideoError, VideoReader, decoder_version


class Picture:
    """The annotated frame of a clip, decoded at most once."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """uint8 RGB (h, w, 3), cropped."""
        with VideoReader(self.clip.path) as video:
            number = self.clip.about.frame
            if number >= len(video):
                raise BadVideoError(
                    self.clip.path, f"{len(video)} frames; {self.clip.name} has masks of frame {number}"
                )
            frames = video.get([number])
        top, left, height, width = self.clip.box(frames)
        return frames[0, :, top : top + height, left : left + width].permute(1, 2, 0).numpy()


class Shown(NamedTuple):
    """What a reference shows: a subject of a picture, or without one all of it."""

    picture: Picture
    subject: Subject | None
    mask: NDArray[np.bool_] | None


class Reference:
    """A subject cut out of its picture, at most once for all sizes."""

    def __init__(self, shown: Shown, background: Background) -> None:
        self.shown, self.background = shown, background
        subject = shown.subject
        self.path = shown.picture.clip.path
        self.name = f"{shown.picture.clip.name}, " + (f"mask {subject.id}" if subject else "whole frame")

    @cached_property
    def cutout(self) -> Cutout:
        picture, mask = self.shown.picture.pixels, self.shown.mask
        if mask is None:
            return Cutout(picture, np.ones(picture.shape[:2], bool))
        if mask.shape != picture.shape[:2]:
            own, whole = ("x".join(map(str, shape)) for shape in (mask.shape, picture.shape[:2]))
            raise BadVideoError(self.path, f"{self.name} is {own}, the cropped picture {whole}")
        return cut_out(picture, mask, self.background)

    def identity(self, size: tuple[int, int]) -> str:
        clip, subject = self.shown.picture.clip, self.shown.subject
        mask = None
        if subject is not None:
            mask = [subject.id, hashlib.blake2b(subject.counts.encode(), digest_size=8).hexdigest()]
        return clip.identity(
            entry=clip.about.key,
            frame=clip.about.frame,
            mask=mask,
            background=self.background,
            letterbox=list(size),
            resampler=decoder_version("pillow"),
        )
