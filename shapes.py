"""The built-in images: coloured shapes on a background, for the demo and the tests. Nothing of the method is here."""
import math

import numpy as np
from PIL import Image, ImageDraw


class Shapes:
    """Drawn images: one of ten shapes with random colour, size, place and tilt on a random background. Image i is
    decided by (split, i) alone; its class is i % 10. The splits share no image."""

    classes = ["disc", "ring", "half disc", "crescent", "square", "triangle", "hexagon", "star", "cross", "bar"]
    constant = "data_dir"

    def __init__(self, split, count, size):
        self.stream, self.count, self.size = {"train": 0, "val": 1}[split], count, size
        self.labels = [i % len(self.classes) for i in range(count)]

    def __len__(self):
        return self.count

    def load(self, i, short_side=0):
        """Image i, size × size, RGB. (short_side is for JPEGs.)"""
        rng = np.random.default_rng([self.stream, i])
        big = 4 * self.size  # drawn at four times the size and averaged, for smooth edges
        colour, corner_a, corner_b = contrasting_colours(rng)
        ramp = corner_a + (corner_b - corner_a) * np.linspace(0, 1, big)[:, None]  # (big, 3)
        ramp = ramp.round().astype(np.uint8)
        background = np.broadcast_to(ramp[:, None] if rng.random() < 0.5 else ramp, (big, big, 3))
        image = Image.fromarray(np.ascontiguousarray(background))
        radius = rng.uniform(0.3, 0.42)
        centre = rng.uniform(radius, 1 - radius, 2)
        tilt = rng.uniform(-math.pi / 12, math.pi / 12)  # at any angle, minutes give no corners (docs/LOG.md)
        stencil = draw_shape(self.classes[i % len(self.classes)], big, centre, radius, tilt)
        image.paste(tuple(colour), mask=stencil)
        return image.reduce(4)

    def name(self, i):
        return f"shape {i}"

    def fingerprint(self):
        return "shapes"


def contrasting_colours(rng):
    """A colour (3 ints) and the two ends of a background ramp that differs clearly from it everywhere."""
    while True:
        colour, corner_a, corner_b = rng.integers(32, 224, (3, 3))
        corner_b = 0.6 * corner_a + 0.4 * corner_b  # a gentle ramp
        if min(np.abs(colour - corner_a).sum(), np.abs(colour - corner_b).sum()) > 150:
            return colour.tolist(), corner_a, corner_b


def draw_shape(name, size, centre, radius, angle):
    """A shape as a stencil, PIL mode L, white on black. centre and radius: fractions of the side; angle: radians, from
    upright."""
    def polygon(count, radii=(1.0,)):  # its first corner on top
        return [(radii[k % len(radii)] * math.sin(2 * math.pi * k / count),
                 -radii[k % len(radii)] * math.cos(2 * math.pi * k / count)) for k in range(count)]

    def place(points):  # from the shape's own plane, where it fills the unit circle, onto the canvas
        x, y = np.asarray(points, float).T * radius
        return [tuple(p) for p in size * np.stack([centre[0] + x * math.cos(angle) - y * math.sin(angle),
                                                   centre[1] + x * math.sin(angle) + y * math.cos(angle)], axis=1)]

    white, black, disc, a, b = 255, 0, (0, 0, 1), 0.3, 0.7  # b: 1 / √2
    parts = {  # discs (x, y, radius) and polygons [corners]; black ones cut away
        "disc": [(disc, white)],
        "ring": [(disc, white), ((0, 0, 0.55), black)],
        "half disc": [(disc, white), ([(-1.1, 0), (1.1, 0), (1.1, 1.2), (-1.1, 1.2)], black)],
        "crescent": [(disc, white), ((0, -0.55, 0.8), black)],
        "square": [([(-b, -b), (b, -b), (b, b), (-b, b)], white)],
        "triangle": [(polygon(3), white)],
        "hexagon": [(polygon(6), white)],
        "star": [(polygon(10, (1.0, 0.4)), white)],
        "cross": [([(-a, -1), (a, -1), (a, 1), (-a, 1)], white), ([(-1, -a), (1, -a), (1, a), (-1, a)], white)],
        "bar": [([(-1, -0.25), (1, -0.25), (1, 0.25), (-1, 0.25)], white)],
    }
    stencil = Image.new("L", (size, size))
    draw = ImageDraw.Draw(stencil)
    for outline, fill in parts[name]:
        if isinstance(outline, tuple):
            (x, y), r = place([outline[:2]])[0], outline[2] * radius * size
            draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)
        else:
            draw.polygon(place(outline), fill=fill)
    return stencil
