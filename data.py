"""Images in, from folders (folders.py) or the built-in shapes (shapes.py), and the two loaders that read them.

    open_split, open_splits    the training and the validation images of `data_dir`
    center_crop, resize, random_crop, to_float, to_uint8, psnr, save_grid    from image to tensor and back
    TrainLoader                training batches that can be resumed, the same for any number of processes
    eval_loader                every image once, cropped as for evaluation
    validate                   PSNR and a picture of reconstructions
"""
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.data import default_collate

from folders import DEVKIT, KAGGLE_TABLE, ImageFolder, find_split
from runtime import Stopped, bar, check, fail, ignore_signals
from shapes import Shapes

IMAGE_STREAM, ORDER_STREAM = 0, 1  # in an rng's seed: keeps an image's draws apart from those of the epoch's order
BAD_SHARE = 0.01  # a run ends if more than this share of its images can't be used

# ----------------------------------------------------------------------------------------------------------------------
# Sources


def open_split(data_dir, split, image_size, shapes_images):
    """The "train" or "val" images of a data folder or of the built-in shapes.

    data_dir: "shapes", or a folder with train/CLASS/… and val/CLASS/… (or test/CLASS/…), or as folders.py says.
    shapes_images: how many shapes to train on; a tenth as many, at least 500, are for validation.
    """
    if data_dir == "shapes":
        count = shapes_images if split == "train" else max(500, shapes_images // 10)
        return Shapes(split, count, image_size)
    check(Path(data_dir).is_dir(), f"data_dir={data_dir}: there is no such folder. It must hold train/CLASS/ and "
                                   "val/CLASS/ with images, or be a link to them; --data_dir=shapes: built-in images")
    names = ("train",) if split == "train" else ("val", "test")
    folder = find_split(data_dir, names)
    check(folder, f"data_dir={data_dir} has no folder {' or '.join(f'{name}/' for name in names)} "
                  "(it needs train/CLASS/… and val/CLASS/… or test/CLASS/…)")
    return ImageFolder(folder)


def open_splits(data_dir, image_size, shapes_images, batch_size=1, resumed=None):
    """The training and the validation images, which must have the same classes."""
    train, val = (open_split(data_dir, split, image_size, shapes_images) for split in ("train", "val"))
    check(train.classes == val.classes or [""] not in (train.classes, val.classes),
          f"data_dir={data_dir}: only one of train/ and val/ has class folders; sort the other's images into some, or "
          f"put ImageNet's {KAGGLE_TABLE} or {DEVKIT} beside it")
    odd = sorted(set(train.classes) ^ set(val.classes))
    check(not odd, "data_dir: the training and the validation images must have the same classes, but only one of them "
                   f"has {', '.join(odd[:5])}" + (f" and {len(odd) - 5} more" if len(odd) > 5 else ""))
    check_training_images(train, batch_size, resumed)
    return train, val


def check_training_images(train, batch_size, resumed):
    """They must fill a batch and, for a run that resumes from the checkpoint `resumed`, be those that it began with."""
    check(batch_size <= len(train), f"batch_size={batch_size} is more than the {len(train)} training images")
    if resumed:
        check((len(train), train.classes) == (resumed["images"], resumed.get("classes", train.classes)),
              f"data_dir: {len(train)} training images of {len(train.classes)} classes are not the "
              f"{resumed['images']} images, of the same classes, that the run to resume began with")


# ----------------------------------------------------------------------------------------------------------------------
# From image to tensor and back


def center_crop(image, size):
    """ADM's evaluation crop: resizes the short side to `size` and takes the centre, uint8 (size, size, 3)."""
    left, top = (max(0, side // 2 - 4 * min(image.size)) for side in image.size)  # a strip may be 65,000 pixels long
    image = image.crop((left, top, image.width - left, image.height - top))
    while min(image.size) >= 2 * size:
        image = image.resize([side // 2 for side in image.size], Image.BOX)  # not reduce(2), which rounds up
    scale = size / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def resize(pixels, size):
    """uint8 (H, W, 3) -> (size, size, 3), bicubic with antialiasing, like Pillow's but three times as fast (AVX2)."""
    if pixels.shape[:2] == (size, size):
        return pixels
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, H, W), channels last in memory
    return F.interpolate(image, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def random_crop(image, rng, size):
    """The crop that the tokenizer reconstructs, (size, size, 3) uint8: a random square as large as the image's short
    side, resized, and flipped half of the time. (Our choice: the paper doesn't say.)"""
    pixels = np.array(image)  # (H, W, 3)
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
    """Peak signal-to-noise ratio of each pair of uint8 images, dB: (B, H, W, 3) twice -> (B,) float64."""
    mse = (a.double() - b.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / mse.clamp(min=1e-10))


def save_grid(path, images, columns, titles=(), names=()):
    """Writes uint8 images (N, H, W, 3), small ones enlarged, as one PNG, row by row, with `titles` over the columns and
    `names` before the rows."""
    n, height, width, _ = images.shape
    rows, scale = -(-n // columns), max(1, 96 // width)
    top, left = 16 if titles else 0, 8 + 7 * max(map(len, names)) if names else 0
    height, width = height * scale + 2, width * scale + 2  # of a cell
    canvas = Image.new("RGB", (left + columns * width, top + rows * height), "white")
    pen = ImageDraw.Draw(canvas)
    for k, image in enumerate(images.numpy()):
        image = Image.fromarray(image).resize((width - 2, height - 2), Image.NEAREST)
        canvas.paste(image, (left + k % columns * width, top + k // columns * height))
    for k, title in enumerate(titles):
        pen.text((left + k * width + 2, 1), title[:(width - 2) // 7], "black", font_size=12)
    for k, name in enumerate(names):
        pen.text((2, top + k * height + height // 2), name, "black", font_size=12, anchor="lm")
    canvas.save(path)


# ----------------------------------------------------------------------------------------------------------------------
# Loading


class TrainLoader:
    """Yields this process's micro-batches for the steps from `start` to `steps`, `micro_batches` for each step.

    Each is collate([transform(image, rng), …]), made in the loading workers. (seed, epoch) decides the order and (seed,
    epoch, image) the rng, so the training data depends neither on processes or workers nor on a restart. An image that
    can't be used is replaced by another.
    short_side: pixels that a JPEG's short side must keep, see ImageFolder.load; 0 = all. resumed: the checkpoint that
    the run resumes from; its "bad_files" still count, unless they were mended.
    """

    def __init__(self, source, transform, batch_size, start, steps, seed, dist, collate=default_collate, short_side=0,
                 micro_batches=1, workers=0, resumed=None):
        dist.check_same({source.constant: f"{len(source)} images, list {source.fingerprint()}"})
        order = training_order(len(source), batch_size, start, steps, seed, dist.rank, dist.count, micro_batches)
        self.batches = iter(data_loader(TrainBatches(source, transform, seed, collate, short_side), order, workers,
                                        pin_memory=dist.device.type == "cuda"))
        self.source, self.dist, self.seconds, self.bad = source, dist, 0.0, []
        named = resumed["bad_files"] if resumed else {}
        still_bad = []  # without those that were mended meanwhile
        for i in range(len(source) if named else 0):
            if source.name(i) in named:
                try_load(source, i, still_bad, transform, np.random.default_rng(0))
        self.reported = dict(still_bad)  # {name: reason}

    def __iter__(self):
        return self

    def __next__(self):
        began = time.perf_counter()
        batch, bad = next(self.batches)
        self.seconds += time.perf_counter() - began
        self.bad += bad
        if batch is None:
            fail(f"{self.source.constant}: 100 images of one micro-batch can't be used: {' '.join(bad[0])}",
                 everywhere=False)
        return batch

    def waited(self):
        """Seconds spent waiting for data since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def report_bad_files(self):
        """Names files that can't be used, each once; more than 1 % end the run. All processes must call it."""
        report_bad_files(self.source, len(self.source), self.bad, self.reported, self.dist)
        self.bad = []


def data_loader(batches, order, workers, pin_memory=False):
    """The items of `batches` that `order` yields, loaded by so many processes."""
    check(workers <= 1024, f"workers={workers} loading processes would stall any machine; one for each core is enough")
    return torch.utils.data.DataLoader(batches, sampler=order, batch_size=None, num_workers=workers,
                                       worker_init_fn=ignore_signals, pin_memory=pin_memory)


def training_order(images, batch_size, start, steps, seed, rank=0, count=1, micro_batches=1):
    """Yields [(epoch, image), …] for every micro-batch of process `rank`. Each epoch is a new permutation; its last,
    partial batch is dropped."""
    steps_per_epoch = images // batch_size
    for step in range(start, steps):
        epoch, k = divmod(step, steps_per_epoch)
        if step == start or k == 0:
            order = np.random.default_rng([seed, ORDER_STREAM, epoch]).permutation(images)
        batch = order[k * batch_size:(k + 1) * batch_size].reshape(count, micro_batches, -1)
        for micro_batch in batch[rank].tolist():
            yield [(epoch, i) for i in micro_batch]


class TrainBatches(torch.utils.data.Dataset):
    """Item [(epoch, i), …] is (their micro-batch, [(file that can't be used, reason), …]). See TrainLoader."""

    def __init__(self, source, transform, seed, collate=default_collate, short_side=0):
        self.source, self.transform, self.seed, self.collate = source, transform, seed, collate
        self.options = {"short_side": short_side} if short_side else {}

    def __getitem__(self, batch):
        items, bad = [], []
        for epoch, i in batch:
            rng = np.random.default_rng([self.seed, IMAGE_STREAM, epoch, i])
            while (item := try_load(self.source, i, bad, self.transform, rng, **self.options)) is None:
                if len(bad) == 100:
                    return None, bad
                i = int(rng.integers(len(self.source)))  # another image takes its place
            items.append(item)
        return self.collate(items), bad


def eval_loader(source, size, batch_size, dist, workers=0, images=0, title="", indices=None, keep_empty=False):
    """Yields centre crops, uint8 (b, size, size, 3), and their indices (b,), so that all processes together see every
    image once; all must iterate. Files that can't be used are left out and named at the end; more than 1 % end the
    run. After a SIGTERM to any process, that process breaks off, and all raise Stopped when they are through.

    images: how many, evenly spread; 0 = all. indices: which ones, instead. title: of a progress bar; "" = none.
    keep_empty: yield empty batches, too.
    """
    count, bad = min(images or len(source), len(source)), []
    mine = (spread(source, count) if indices is None else indices)[dist.rank::dist.count].tolist()
    parts = [mine[k:k + batch_size] for k in range(0, len(mine), batch_size)]
    loader = data_loader(CenterCrops(source, size), parts, workers)
    for pixels, chosen, names in bar(loader, dist, desc=title) if title else loader:
        bad += names
        if len(pixels) or keep_empty:
            yield pixels, chosen
        if dist.stop:
            break
    if dist.stop_requested():  # only here, since processes may have different numbers of batches
        raise Stopped
    report_bad_files(source, count, bad, {}, dist)


def spread(source, count):
    """The indices of at most `count` images, evenly spread over a source."""
    return np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)


class CenterCrops(torch.utils.data.Dataset):
    """Item [i, …] is (centre crops uint8 (b, size, size, 3), their indices (b,), [(bad file, reason), …])."""

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __getitem__(self, batch):
        crops, indices, bad = [np.zeros((0, self.size, self.size, 3), np.uint8)], [], []
        for i in batch:
            crop = try_load(self.source, i, bad, center_crop, self.size)
            if crop is not None:
                crops.append(crop[None])
                indices.append(i)
        return torch.from_numpy(np.concatenate(crops)), torch.tensor(indices, dtype=torch.long), bad


def try_load(source, i, bad, view, *more, **options):
    """view(source.load(i, **options), *more); None, and (the file, the reason) is added to `bad`, if it fails."""
    try:
        return view(source.load(i, **options), *more)
    except (Exception, SystemExit) as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and others
        bad.append((source.name(i), f"{type(error).__name__}: {error}".splitlines()[0]))


def report_bad_files(source, images, bad, reported, dist):
    """Names all processes' `bad` files, unless they are in `reported`, {name: reason}; over 1 % of `images` fail."""
    new = {name: reason for name, reason in sorted(dist.gather(bad)) if name not in reported}
    for name in new:
        dist.print(f"{source.constant}: {name} can't be used and is left out ({new[name]})")
    reported |= new
    if len(reported) > BAD_SHARE * images:
        fail(f"{source.constant}: {len(reported)} of {images} images can't be used, over {BAD_SHARE:.0%}: "
             + ", ".join(f"{name} ({reason})" for name, reason in sorted(reported.items())[:10])
             + (f" and {len(reported) - 10} more" if len(reported) > 10 else ""))


def eval_batch_size(size):
    """How many images of `size` pixels to process at a time without gradient."""
    return max(1, min(256, 256**3 // size**2))


@torch.no_grad()
def validate(tcae, source, size, images, dist, picture):
    """-> mean PSNR (dB, of 8-bit pixels) of the reconstructions of `images` centre crops (0 = all). Writes a picture of
    eight originals over their reconstructions. Raises Stopped after SIGTERM."""
    def reconstruct(pixels):
        with dist.autocast():
            return to_uint8(tcae(to_float(pixels, dist.device))).cpu()

    total = torch.zeros(2, dtype=torch.float64)
    for pixels, _ in eval_loader(source, size, eval_batch_size(size), dist, images=images):
        values = psnr(pixels, reconstruct(pixels))
        total += torch.tensor([values.sum(), len(values)], dtype=torch.float64)
    psnr_sum, count = dist.sum(total).tolist()
    if dist.first:
        shown, _, _ = CenterCrops(source, size)[spread(source, 8).tolist()]
        save_grid(picture, torch.cat([shown, reconstruct(shown)]), columns=len(shown))
    return psnr_sum / count
