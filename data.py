"""Images in: a folder per class, or the built-in shapes; and batches of them, the same for any number of processes.

    ImageFolder, Shapes    sources: len(), classes, labels, load(i) -> a PIL image in RGB, name(i)
    open_split             the training or validation half of `data_dir`
    center_crop, resize, random_crop, to_float, to_uint8, psnr, save_grid    from image to tensor and back
    Store                  an array on disk that many processes fill
    Augmented, Centered    torch datasets over a source
    batches                an endless, resumable stream of training batches
    in_order               every image once, for evaluation
"""
import hashlib
import json
import math
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from runtime import check, fail

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp"}
BAD_SHARE = 0.01  # share of undecodable images above which a run stops

# ----------------------------------------------------------------------------------------------------------------------
# Sources


class ImageFolder:
    """root/CLASS/**/*.jpeg (JPEG, PNG, WebP): classes are the folders in alphabetical order, as in ImageNet."""

    def __init__(self, root):
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self.root, self.paths, self.labels = root, [], []
        check(self.classes, f"data_dir: {root} holds no folders; images stand in one folder per class")
        for label, name in enumerate(self.classes):
            found = sorted(os.path.join(folder, file) for folder, _, files in os.walk(Path(root, name))
                           for file in files if Path(file).suffix.lower() in EXTENSIONS)
            check(found, f"data_dir: the class folder {Path(root, name)} holds no images ({', '.join(EXTENSIONS)})")
            self.paths += found
            self.labels += [label] * len(found)

    def __len__(self):
        return len(self.paths)

    def load(self, i, short_side=0):
        """Image i in RGB, whatever it is on disk. Raises OSError or its kin where the file can't be decoded. With a
        `short_side` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if its shorter side keeps that many pixels."""
        image = Image.open(self.paths[i])
        if short_side:
            image.draft(None, (short_side, short_side))
        return to_rgb(image)

    def blank(self):
        return Image.new("RGB", (256, 256))

    def name(self, i):
        return self.paths[i]

    def fingerprint(self):
        """Tells one list of files from another: a hash of their paths below the root, in order."""
        names = "\n".join(os.path.relpath(path, self.root) for path in self.paths)
        return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]


def to_rgb(image):
    """Grey, 16-bit grey, CMYK, palette and alpha images -> RGB; what is transparent becomes white."""
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip at 255 rather than scale
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class Shapes:
    """Drawn images: image i shows one of ten shapes in a colour, size, place and rotation of its own on a background of
    its own. Nothing but (split, i) decides what it looks like; class = i % 10; the splits share no image."""

    classes = ["disc", "ring", "half disc", "crescent", "square", "triangle", "hexagon", "star", "cross", "bar"]

    def __init__(self, split, count, size):
        self.stream, self.count, self.size = {"train": 0, "val": 1}[split], count, size
        self.labels = [i % len(self.classes) for i in range(count)]

    def __len__(self):
        return self.count

    def load(self, i, short_side=0):
        """Image i, size × size, RGB. (short_side is for JPEGs.)"""
        rng = np.random.default_rng([self.stream, i])
        big = 4 * self.size  # drawn four times as large and averaged: smooth edges
        colour, corner_a, corner_b = contrasting_colours(rng)
        ramp = np.linspace(0, 1, big)[:, None] if rng.random() < 0.5 else np.linspace(0, 1, big)[None]
        background = corner_a + (corner_b - corner_a) * np.broadcast_to(ramp, (big, big))[:, :, None]
        image = Image.fromarray(background.round().astype(np.uint8))
        radius = rng.uniform(0.22, 0.38)
        centre = rng.uniform(radius, 1 - radius, 2)
        stencil = draw_shape(self.classes[i % len(self.classes)], big, centre, radius, rng.uniform(0, 2 * math.pi))
        image.paste(tuple(colour), mask=stencil)
        return image.reduce(4)

    def name(self, i):
        return f"shape {i}"

    def fingerprint(self):
        return "shapes"


def contrasting_colours(rng):
    """A colour (3 ints) and the two ends of a background ramp, all of whose mixtures differ clearly from the colour."""
    while True:
        colour, corner_a, corner_b = rng.integers(32, 224, (3, 3))
        corner_b = 0.6 * corner_a + 0.4 * corner_b  # a gentle ramp
        if min(np.abs(colour - corner_a).sum(), np.abs(colour - corner_b).sum()) > 150:
            return colour.tolist(), corner_a, corner_b


def draw_shape(name, size, centre, radius, angle):
    """One shape as a black and white stencil, PIL mode L. centre and radius are fractions of the side; angle in rad."""
    stencil = Image.new("L", (size, size))
    draw = ImageDraw.Draw(stencil)

    def place(points):  # from the shape's own plane, where it fills the unit circle, onto the canvas
        x, y = np.asarray(points, float).T * radius
        return [tuple(p) for p in size * np.stack([centre[0] + x * math.cos(angle) - y * math.sin(angle),
                                                   centre[1] + x * math.sin(angle) + y * math.cos(angle)], axis=1)]

    def polar(count, radii=(1.0,)):
        return [(radii[k % len(radii)] * math.cos(2 * math.pi * k / count),
                 radii[k % len(radii)] * math.sin(2 * math.pi * k / count)) for k in range(count)]

    def disc(x, y, r, fill):
        (cx, cy), r = place([(x, y)])[0], r * radius * size
        draw.ellipse([cx - r, cy - r, cx + r, cy + r], fill=fill)

    def polygon(points, fill=255):
        draw.polygon(place(points), fill=fill)

    if name == "disc":
        disc(0, 0, 1, 255)
    elif name == "ring":
        disc(0, 0, 1, 255)
        disc(0, 0, 0.55, 0)
    elif name == "half disc":
        disc(0, 0, 1, 255)
        polygon([(-1.1, 0), (1.1, 0), (1.1, 1.2), (-1.1, 1.2)], 0)
    elif name == "crescent":
        disc(0, 0, 1, 255)
        disc(0.55, 0, 0.8, 0)
    elif name == "cross":
        a = 0.3
        polygon([(-a, -1), (a, -1), (a, 1), (-a, 1)])
        polygon([(-1, -a), (1, -a), (1, a), (-1, a)])
    elif name == "bar":
        polygon([(-1, -0.25), (1, -0.25), (1, 0.25), (-1, 0.25)])
    else:
        polygon(polar(**{"square": dict(count=4), "triangle": dict(count=3), "hexagon": dict(count=6),
                         "star": dict(count=10, radii=(1.0, 0.4))}[name]))
    return stencil


def open_split(data_dir, split, image_size, shapes_images):
    """The images of one split, "train" or "val", of a data folder or of the built-in shapes.

    data_dir: "shapes", or a folder with train/CLASS/… and val/CLASS/… (or test/CLASS/…). shapes_images: how many
    shapes to train on; a tenth as many, at least 500, are for validation.
    """
    if data_dir == "shapes":
        count = shapes_images if split == "train" else max(500, shapes_images // 10)
        return Shapes(split, count, image_size)
    check(data_dir, "data_dir is empty: --data_dir=FOLDER with train/CLASS/*.jpg and val/CLASS/*.jpg, "
                    "or --data_dir=shapes for the built-in images")
    check(not Path(data_dir).is_file(), f"data_dir={data_dir} is a file; it must be a folder with train/ and val/")
    check(Path(data_dir).is_dir(), f"data_dir={data_dir}: there is no such folder")
    names = ("train",) if split == "train" else ("val", "test")
    found = [Path(data_dir, name) for name in names if Path(data_dir, name).is_dir()]
    check(found, f"data_dir={data_dir} has no folder {' or '.join(f'{name}/' for name in names)} "
                 "(it needs train/CLASS/… and val/CLASS/… or test/CLASS/…)")
    return ImageFolder(found[0])


def check_same_classes(train, val):
    """Fails, with their names, if a class folder is missing from one of the splits."""
    for here, there, split in (train, val, "validation"), (val, train, "training"):
        missing = sorted(set(here.classes) - set(there.classes))
        check(not missing, f"data_dir: the {split} images lack the class folder {', '.join(missing[:5])}"
                           + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""))


# ----------------------------------------------------------------------------------------------------------------------
# One view of one image


def resize_short_side(image, size):
    """Bicubic, so that the shorter side is `size` pixels. Halved with a box filter first while it is twice that, as ADM
    does for evaluation."""
    while min(image.size) >= 2 * size:
        image = image.resize([side // 2 for side in image.size], Image.BOX)  # not reduce(2), which rounds up
    scale = size / min(image.size)
    return image.resize([round(side * scale) for side in image.size], Image.BICUBIC)


def center_crop(image, size):
    """The centre, size × size, of an image resized to that short side: ADM's crop, (size, size, 3) uint8."""
    image = resize_short_side(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def resize(pixels, size):
    """uint8 (H, W, 3) -> (size, size, 3), bicubic and antialiased: Pillow's arithmetic by torch, with AVX2 three times
    as fast."""
    if pixels.shape[:2] == (size, size):
        return pixels
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, H, W); its strides say that it is (H, W, 3)
    return F.interpolate(image, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def random_crop(pixels, size, rng):
    """The crop that the tokenizer reconstructs: a square of the image's whole short side, anywhere along the long one,
    resized and flipped half the time (our choice: the paper is silent). uint8 (H, W, 3) -> (size, size, 3)."""
    side = min(pixels.shape[:2])
    top, left = (int(rng.integers(0, length - side + 1)) for length in pixels.shape[:2])
    crop = resize(pixels[top:top + side, left:left + side], size)
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)


def to_float(pixels, device):
    """uint8 (…, H, W, 3) on any device -> float32 (…, 3, H, W) in [-1, 1] on `device`."""
    return pixels.to(device, non_blocking=True).movedim(-1, -3).float().div_(127.5).sub_(1)


def to_uint8(images):
    """float (…, 3, H, W) in [-1, 1] -> uint8 (…, H, W, 3), rounded and clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of each pair of uint8 images, (B, H, W, 3) twice -> (B,) float64."""
    mse = (a.double() - b.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / mse.clamp(min=1e-10))


def save_grid(path, images, columns, titles=()):
    """Writes uint8 images (N, H, W, 3) as one PNG, row by row; small ones are enlarged, pixels kept square. `titles`
    stand above the columns."""
    n, height, width, _ = images.shape
    rows, scale, top = -(-n // columns), max(1, 96 // width), 14 if titles else 0
    canvas = Image.new("RGB", (columns * (width * scale + 2), rows * (height * scale + 2) + top), "white")
    for k, image in enumerate(images.numpy()):
        image = Image.fromarray(image).resize((width * scale, height * scale), Image.NEAREST)
        canvas.paste(image, (k % columns * (width * scale + 2), k // columns * (height * scale + 2) + top))
    for k, title in enumerate(titles):
        ImageDraw.Draw(canvas).text((k * (width * scale + 2) + 2, 1), title[:width * scale // 6], fill="black")
    canvas.save(path)


class Store:
    """An array on disk that many processes fill, item by item, and that outlives any of them: 4096 bytes of JSON that
    say what it holds; a byte per item (0 = to do, 1 = done, 2 = can't be done); the items. Memory-mapped: `state`
    (count,) uint8, `items` (count, *shape)."""

    HEADER = 4096

    def __init__(self, path, about, count, shape, dtype):
        self.path, self.given = path, (path, about, count, shape, dtype)
        size = self.HEADER + count + count * math.prod(shape) * np.dtype(dtype).itemsize
        if not os.path.exists(path):
            with open(f"{path}.tmp", "wb") as file:  # sparse: it takes up space as it is filled
                file.write(json.dumps(about).encode().ljust(self.HEADER))
                file.truncate(size)
            os.replace(f"{path}.tmp", path)
        check(os.path.getsize(path) == size,  # memmap would lengthen it with zeros
              f"{path} has {os.path.getsize(path)} bytes, not {size}, a copy of a part: remove it or copy it again")
        self.state = np.memmap(path, np.uint8, "r+", self.HEADER, (count,))
        self.items = np.memmap(path, dtype, "r+", self.HEADER + count, (count, *shape))

    def __reduce__(self):  # to a worker that is not forked goes the name, not the contents
        return Store, self.given

    @classmethod
    def differences(cls, path, about):
        """What the file at `path`, if there is one, says of itself that is not `about`, in words; "" if nothing."""
        if not os.path.exists(path):
            return ""
        with open(path, "rb") as file:
            try:
                says = json.loads(file.read(cls.HEADER))
            except ValueError:
                says = None
        if not isinstance(says, dict):
            return "it is no file of this project"
        return "; ".join(f"{name} was {says.get(name)!r}, is {value!r}" for name, value in about.items()
                         if says.get(name) != value)

    @classmethod
    def shared(cls, path, about, count, shape, dtype, processes):
        """The store at `path` in every process; the first one makes it if need be."""
        if processes.first and not os.path.exists(path):
            cls(path, about, count, shape, dtype)
        processes.wait()
        return cls(path, about, count, shape, dtype)

    def to_do(self, processes):
        """This process's share of the items that are not done, as a list of indices. All must call it together."""
        mine = np.flatnonzero(self.state == 0)[processes.rank::processes.count].tolist()
        processes.wait()  # until all have looked: none may mark items as done before
        return mine

    def put(self, where, items):
        self.items[where] = items
        self.state[where] = 1  # after the items: what is marked is there

    def flush(self):
        self.items.flush(), self.state.flush()


# ----------------------------------------------------------------------------------------------------------------------
# Torch datasets, and the order of the images


class Augmented(torch.utils.data.Dataset):
    """Item (epoch, i) is (`transform(image i, rng)`, bad files), with an rng that only (seed, epoch, i) decides: no
    worker, process or restart changes it. A file that can't be decoded is replaced by another image of the epoch (after
    100 in a row by the source's blank(); their count then ends the run). A transform may have a `short_side`, for
    ImageFolder.load."""

    def __init__(self, source, transform, seed):
        self.source, self.transform, self.seed = source, transform, seed
        self.options = {"short_side": transform.short_side} if hasattr(transform, "short_side") else {}

    def __getitem__(self, position):
        epoch, i = position
        rng = np.random.default_rng([self.seed, 0, epoch, i])
        image, bad = try_load(self.source, i, **self.options)
        while image is None and len(bad) < 100:
            image, more = try_load(self.source, int(rng.integers(len(self.source))), **self.options)
            bad += more
        return self.transform(self.source.blank() if image is None else image, rng), bad


class Centered(torch.utils.data.Dataset):
    """Item i is (image i, centre-cropped, uint8 (size, size, 3), None where it can't be decoded; i; bad files)."""

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        image, bad = try_load(self.source, i)
        return image and center_crop(image, self.size), i, bad


def try_load(source, i, **options):
    """(image i, []) or, where it can't be decoded, (None, [its name])."""
    try:
        return source.load(i, **options), []
    except Exception:  # broken files make Pillow raise OSError, SyntaxError, ValueError, struct.error and others
        return None, [source.name(i)]


class Order:
    """A batch sampler: for every step from `start` on, this process's share of the global batch, in `accumulate` parts.

    Each epoch is a permutation that only (seed, epoch) decides; the last, partial batch of an epoch is left out.
    """

    def __init__(self, images, batch_size, start, steps, seed, rank=0, count=1, accumulate=1):
        self.images, self.batch_size, self.start, self.steps, self.seed = images, batch_size, start, steps, seed
        self.rank, self.count, self.accumulate = rank, count, accumulate

    def __iter__(self):
        steps_per_epoch = self.images // self.batch_size
        share = self.batch_size // (self.count * self.accumulate)
        order_of = None
        for step in range(self.start, self.steps):
            epoch, k = divmod(step, steps_per_epoch)
            if epoch != order_of:
                order_of, order = epoch, np.random.default_rng([self.seed, 1, epoch]).permutation(self.images)
            first = k * self.batch_size + self.rank * self.accumulate * share
            for part in range(self.accumulate):
                chosen = order[first + part * share:first + (part + 1) * share]
                yield [(epoch, int(i)) for i in chosen]

    def __len__(self):
        return (self.steps - self.start) * self.accumulate


def collate_views(prepare, items):
    """[(dict of arrays, bad files), …] -> (`prepare`d dict of tensors, all bad files)."""
    views, bad = zip(*items)
    return prepare(torch.utils.data.default_collate(views)), sum(bad, [])


def collate_centered(items):
    """[(pixels or None, index, bad files), …] -> (uint8 (b, size, size, 3), indices (b,), bad files), of good ones."""
    good = [item for item in items if item[0] is not None]
    pixels = torch.from_numpy(np.stack([item[0] for item in good])) if good else torch.zeros(0, 1, 1, 3).byte()
    return pixels, torch.tensor([item[1] for item in good]), sum((item[2] for item in items), [])


def outlive_sigterm(_):
    """For loading workers: schedulers send SIGTERM to every process of a job, and the training process, which saves
    then, still needs its workers for the step it is in. They end half a minute later."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def batches(source, transform, batch_size, start, steps, seed, processes, accumulate=1, workers=0):
    """A loader of training batches from step `start` to `steps`: this process's share of each, (views, bad files).

    `transform(image, rng)` makes the dict of arrays of one image, `transform.prepare` finishes a batch of them.
    """
    order = Order(len(source), batch_size, start, steps, seed, processes.rank, processes.count, accumulate)
    return torch.utils.data.DataLoader(Augmented(source, transform, seed), batch_sampler=order, num_workers=workers,
                                       collate_fn=partial(collate_views, transform.prepare),
                                       worker_init_fn=outlive_sigterm,
                                       pin_memory=processes.device.type == "cuda")


def in_order(source, size, batch_size, processes, workers=0, images=0):
    """A loader of centre crops, (uint8 (b, size, size, 3), their indices (b,), bad files), each image once; every
    process its share. images: how many, evenly spread over the source; 0 = all."""
    chosen = np.linspace(0, len(source) - 1, min(images or len(source), len(source))).round().astype(int)
    subset = torch.utils.data.Subset(Centered(source, size), chosen[processes.rank::processes.count].tolist())
    return torch.utils.data.DataLoader(subset, batch_size, num_workers=workers, collate_fn=collate_centered,
                                       worker_init_fn=outlive_sigterm)


class BadFiles:
    """Counts the files that could not be decoded, names each once, and stops the run when they are too many.

    `name` is the constant that the source came from; images: how many of it are taken, 0 = all.
    """

    def __init__(self, source, name="data_dir", images=0):
        self.name, self.images, self.seen = name, min(images or len(source), len(source)), set()

    def report(self, names, processes):
        new = sorted(set(names) - self.seen)
        for name in new:
            self.seen.add(name)
            processes.print(f"{self.name}: {name} can't be decoded and is left out ({len(self.seen)} so far)")
        if len(self.seen) > BAD_SHARE * self.images:
            fail(f"{self.name}: {len(self.seen)} of {self.images} images can't be decoded, over {BAD_SHARE:.0%}: "
                 + ", ".join(sorted(self.seen)))
