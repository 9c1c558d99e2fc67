"""Moving shapes: a clip and its text as a pure function of a seed.

Everything is analytic in position and time: motion is sub-pixel, nothing is interpolated, and a scene can be rendered
at any resolution. Lengths are in units of 1/64 of the picture's height, so at 64x64 they are pixels; y grows downwards.

A scene is a textured background seen by a panning camera, with one to three shaded objects in front. One of them acts,
and only in the last nine of the 21 frames, so that fast motion stays inside the picture and the last frame cannot be
copied from the one before:

    drop_object    "drop the red square"                        falls; reaches the floor one frame after the end
    cover_object   "cover the blue circle with the red square"  slides onto the other; is one frame short of it
    move_object    "move the black triangle to the left"        slides left, right, up or down
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_FRAMES = 21
ACTION_FRAME = 12  # the last frame in which nothing but the camera has moved (a drop may begin two frames later)
TASKS = ("drop_object", "cover_object", "move_object")
SHAPES = ("square", "circle", "triangle")
COLOURS = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.12, 0.65, 0.18),
    "blue": (0.15, 0.25, 0.85),
    "yellow": (0.92, 0.82, 0.12),
    "white": (0.94, 0.94, 0.94),
    "black": (0.06, 0.06, 0.06),
}
DIRECTIONS = {"to the left": (-1.0, 0.0), "to the right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}

HEIGHT = 64.0  # of every picture, in units of length
_SPEED = 4.0  # of an acting object, per frame
_PAN = 2.0  # of the camera at most, per frame
_CONTRAST = 0.24  # of the texture, in the colour channel where it is strongest
_SHADING = 0.18  # how much brighter an object is at one edge than in its middle
_BELOW = {"square": 0.88, "circle": 1.0, "triangle": 0.62}  # from the centre down to the base, in radii

Floats = NDArray[np.float32]
Point = tuple[float, float]


class Thing(NamedTuple):
    """One object: at rest at `start` up to frame `rest`, n frames later `velocity·n + acceleration·n²/2` further."""

    shape: str
    colour: str
    radius: float
    start: Point
    light: float  # the direction in which it gets brighter, radians
    velocity: Point = (0.0, 0.0)
    acceleration: Point = (0.0, 0.0)
    rest: int = ACTION_FRAME

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def centre(self, frames: NDArray) -> Floats:
        """(..., 2): x and y at each frame. All motion ends at frame NUM_FRAMES - 1."""
        n = np.clip(np.asarray(frames, np.float32)[..., None], self.rest, NUM_FRAMES - 1) - self.rest
        path = np.array(self.start) + np.array(self.velocity) * n + np.array(self.acceleration) * n**2 / 2
        return path.astype(np.float32)


class Background(NamedTuple):
    """`colour + contrast · texture`, where the texture is a sum of plane waves over an endless plane."""

    colour: Floats  # (3,)
    contrast: Floats  # (3,)
    waves: Floats  # (4, 3): wave vector x and y in radians per unit of length, phase in radians
    pan: Point  # how far the texture moves in a frame


class Scene(NamedTuple):
    """What a clip shows. The first thing acts and is in front of the others."""

    task: str
    text: str
    things: tuple[Thing, ...]
    background: Background


def scene(seed: int, aspect: float = 1.0) -> Scene:
    """The scene of one seed, for pictures of width = aspect · height."""
    rng = np.random.default_rng(seed)
    width = HEIGHT * aspect
    background = panning_background(rng)
    task = TASKS[rng.integers(len(TASKS))]
    num_things = 2 if task == "cover_object" else int(rng.integers(1, 4))
    things = []
    for colour in rng.permutation(list(COLOURS))[:num_things]:
        radius = rng.uniform(8, 12)
        things.append(Thing(SHAPES[rng.integers(len(SHAPES))], str(colour), radius, (0, 0), rng.uniform(0, 2 * np.pi)))

    if task == "drop_object":
        things[0] = _dropped(rng, things[0], width)
        text = f"drop the {things[0].name}"
    elif task == "cover_object":
        things[1] = things[1]._replace(radius=0.75 * things[0].radius)
        things[1] = things[1]._replace(start=_place(rng, things[1].radius, width))
        things[0] = _covering(rng, things[0], things[1], width)
        text = f"cover the {things[1].name} with the {things[0].name}"
    else:
        direction = list(DIRECTIONS)[rng.integers(len(DIRECTIONS))]
        things[0] = _moved(rng, things[0], DIRECTIONS[direction], width)
        text = f"move the {things[0].name} {direction}"
    if task != "cover_object":
        for i in range(1, num_things):
            things[i] = _bystander(rng, things[i], things[:i], width)
    return Scene(task, text, tuple(things), background)


def panning_background(rng: np.random.Generator) -> Background:
    """A texture of four waves, with a colour and a pan of its own."""
    colour = rng.uniform(0.35, 0.65, 3)
    contrast = rng.normal(size=3)
    contrast *= _CONTRAST / np.abs(contrast).max()
    direction, phase = rng.uniform(0, 2 * np.pi, (2, 4))
    wave_number = 2 * np.pi / rng.uniform(20, 48, 4)
    waves = np.stack([wave_number * np.cos(direction), wave_number * np.sin(direction), phase], axis=1)
    pan_direction, pan = rng.uniform(0, 2 * np.pi), _PAN * rng.uniform(0.5, 1)
    return Background(
        colour.astype(np.float32),
        contrast.astype(np.float32),
        waves.astype(np.float32),
        (pan * np.cos(pan_direction), pan * np.sin(pan_direction)),
    )


def render(scene: Scene, frames: NDArray | None = None, height: int = 64, width: int = 64) -> NDArray[np.uint8]:
    """Pictures of the scene, uint8 (T, H, W, 3). frames: which ones, (T,), fractions allowed; default: all 21."""
    frames = np.arange(NUM_FRAMES) if frames is None else np.asarray(frames)
    x, y = _grid(height, width)
    colour, contrast, waves, pan = scene.background
    shift = frames.astype(np.float32)[:, None, None, None] * (waves[:, :2] @ np.array(pan, np.float32))[:, None, None]
    phase = waves[:, 0, None, None] * x + waves[:, 1, None, None] * y + waves[:, 2, None, None]
    texture = np.sin(phase + shift).sum(axis=1) / 2.8  # (T, H, W)
    pixels = colour + contrast * texture[..., None]
    for thing in reversed(scene.things):
        dx, dy = _offsets(thing, frames, x, y)
        shade = 1 + _SHADING / thing.radius * (np.cos(thing.light) * dx + np.sin(thing.light) * dy)
        alpha = _alpha(thing, dx, dy, height)[..., None]
        pixels += alpha * (np.array(COLOURS[thing.colour], np.float32) * shade[..., None].astype(np.float32) - pixels)
    return (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)


def coverage(
    thing: Thing, frames: NDArray | None = None, height: int = 64, width: int = 64, grow: float = 0.0
) -> Floats:
    """How much of each pixel the thing covers, in [0, 1], (T, H, W), as if nothing were in front of it.

    grow: how much larger than the thing the covered region is made, in units of length.
    """
    frames = np.arange(NUM_FRAMES) if frames is None else np.asarray(frames)
    dx, dy = _offsets(thing, frames, *_grid(height, width))
    return _alpha(thing, dx, dy, height, grow)


def _grid(height: int, width: int) -> tuple[Floats, Floats]:
    """Pixel centres in units of length, (1, W) and (H, 1)."""
    x, y = ((np.arange(n, dtype=np.float32) + 0.5) * np.float32(HEIGHT / height) for n in (width, height))
    return x[None], y[:, None]


def _offsets(thing: Thing, frames: NDArray, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Pixel centres relative to the thing's, (T, 1, W) and (T, H, 1)."""
    centre = thing.centre(frames)[..., None, None]
    return x - centre[:, 0], y - centre[:, 1]


def _alpha(thing: Thing, dx: Floats, dy: Floats, height: int, grow: float = 0.0) -> Floats:
    """Coverage from the signed distance to the outline: the edge is one pixel wide."""
    base = _BELOW[thing.shape] * thing.radius
    if thing.shape == "circle":
        distance = np.hypot(dx, dy) - base
    elif thing.shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - base
    else:
        distance = np.maximum(dy, np.sqrt(np.float32(0.75)) * np.abs(dx) - dy / 2) - base
    return np.clip(0.5 - (distance - np.float32(grow)) * np.float32(height / HEIGHT), 0, 1).astype(np.float32)


def _place(rng: np.random.Generator, radius: float, width: float) -> Point:
    return rng.uniform(radius, width - radius), rng.uniform(radius, HEIGHT - radius)


def _dropped(rng: np.random.Generator, thing: Thing, width: float) -> Thing:
    x, y = rng.uniform(thing.radius, width - thing.radius), rng.uniform(0.8 * thing.radius, HEIGHT / 3)
    rest = int(rng.integers(ACTION_FRAME, ACTION_FRAME + 3))
    floor = HEIGHT - _BELOW[thing.shape] * thing.radius
    return thing._replace(start=(x, y), acceleration=(0.0, 2 * (floor - y) / (NUM_FRAMES - rest) ** 2), rest=rest)


def _covering(rng: np.random.Generator, thing: Thing, other: Thing, width: float) -> Thing:
    """Comes from the direction, of sixteen tried, in which it starts furthest inside the picture."""
    speed = _SPEED * rng.uniform(0.8, 1.2)
    distance = speed * (NUM_FRAMES - ACTION_FRAME)

    def start(angle: float) -> Point:
        return other.start[0] + distance * np.cos(angle), other.start[1] + distance * np.sin(angle)

    def inside(angle: float) -> float:
        x, y = start(angle)
        return min(x, width - x, y, HEIGHT - y, thing.radius)

    angle = max(rng.uniform(0, 2 * np.pi, 16), key=inside)
    return thing._replace(start=start(angle), velocity=(-speed * np.cos(angle), -speed * np.sin(angle)))


def _moved(rng: np.random.Generator, thing: Thing, direction: Point, width: float) -> Thing:
    speed = _SPEED * rng.uniform(0.8, 1.4)
    travel = speed * (NUM_FRAMES - 1 - ACTION_FRAME)
    margin = 0.7 * thing.radius

    def coordinate(sign: float, length: float) -> float:
        return rng.uniform(margin + travel * (sign < 0), length - margin - travel * (sign > 0))

    start = coordinate(direction[0], width), coordinate(direction[1], HEIGHT)
    return thing._replace(start=start, velocity=(speed * direction[0], speed * direction[1]))


def _bystander(rng: np.random.Generator, thing: Thing, others: list[Thing], width: float) -> Thing:
    """Rests where, of eight places tried, it is furthest from where the others are at first."""

    def gap(place: Point) -> float:
        return min(np.hypot(place[0] - o.start[0], place[1] - o.start[1]) - o.radius for o in others)

    return thing._replace(start=max((_place(rng, thing.radius, width) for _ in range(8)), key=gap))
