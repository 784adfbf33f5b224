"""Between stage 1 and the others: a frozen tokenizer, ours or someone else's, and the data set as its latents.

    open_tokenizer                 from stage 1's checkpoint, or from a Python file (runs/tokenizers/ has examples)
    measure_latents, measure_once  the mean and std of its latents; another tokenizer's are kept beside the cache
    Store                          an array on disk that many processes fill
    fill_cache, LatentDataset, encode_float16    the data set as latents, encoded once into a file, or on the fly
"""
import importlib.util
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn

import data
import runtime
from model import TCAE
from runtime import check


def open_tokenizer(path, dist, dit_checkpoint=None):
    """The tokenizer at `path`, frozen: stage 1's checkpoint, or a Python file whose function `tokenizer()` returns a
    module as OtherTokenizer takes it. (The file is run.) dit_checkpoint: train_dit.py's; the tokenizer must have the
    latents that this generator was trained on.

    -> a module on dist.device with
    encode(images) -> z, decode(z) -> images    as TCAE's, z normalised by latent_mean and latent_std, (c, 1, 1)
    image_size, latent_shape                    pixels; (c, h, w)
    latents_of                                  a fingerprint of the weights that its latents depend on
    data_dir, shapes_images                     what it was trained on, as in train_tokenizer.py
    """
    if Path(path).suffix == ".py":
        if not dist.first:
            dist.wait()  # while the first process downloads what it needs, or fits it
        network = run_file(path)
        if dist.first:
            dist.wait()
        tokenizer, latents_of = OtherTokenizer(network), runtime.fingerprint(network.state_dict())
        settings = {"data_dir": getattr(network, "data_dir", "imagenet"),
                    "shapes_images": getattr(network, "shapes_images", 20000)}
    else:
        saved = runtime.load_checkpoint(path, "tokenizer", kind="tokenizer")
        tokenizer, settings = TCAE.from_checkpoint(saved), saved["constants"]
        latents_of = runtime.fingerprint(saved["tokenizer"], without="decoder.")  # which finetuning changes
    tokenizer.latents_of = latents_of
    tokenizer.data_dir, tokenizer.shapes_images = settings["data_dir"], settings["shapes_images"]
    if dit_checkpoint:
        check(dit_checkpoint["latents_of"] == latents_of, f"tokenizer={path} has other latents than the generator was "
              f"trained on, those of {dit_checkpoint['constants']['tokenizer']}")
        tokenizer.latent_mean, tokenizer.latent_std = dit_checkpoint["latent_mean"], dit_checkpoint["latent_std"]
    return tokenizer.eval().requires_grad_(False).to(dist.device)


def run_file(path):
    """What the function `tokenizer` of a Python file returns."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        check(hasattr(module, "tokenizer"), f"tokenizer={path} has no function tokenizer()")
        network = module.tokenizer()
    except (ImportError, OSError) as error:  # a package that isn't installed, weights that can't be downloaded
        runtime.fail(f"tokenizer={path}: {runtime.first_line(error)}", everywhere=False)
    missing = [name for name in OtherTokenizer.NEEDED if not hasattr(network, name)]
    check(isinstance(network, nn.Module) and not missing, f"tokenizer={path}: tokenizer() must return a "
          f"torch.nn.Module with {', '.join(missing or OtherTokenizer.NEEDED)}")
    return network


class OtherTokenizer(nn.Module):
    """Someone else's tokenizer in TCAE's place. The network has

    encode(images (B, 3, H, W) in [-1, 1]) -> (B, latent_channels, H / downsample, W / downsample), of any scale
    decode(the same) -> images
    image_size, downsample, latent_channels    ints
    data_dir, shapes_images                    optional, as in train_tokenizer.py

    latent_mean and latent_std are 0 and 1 until they are measured. A cache knows it by its weights alone: after a
    change of the file's code, give --rebuild_cache=True.
    """

    NEEDED = "encode", "decode", "image_size", "downsample", "latent_channels"

    def __init__(self, network):
        super().__init__()
        self.network, self.image_size = network, network.image_size
        side = network.image_size // network.downsample
        self.latent_shape = network.latent_channels, side, side
        self.register_buffer("latent_mean", torch.zeros(network.latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(network.latent_channels, 1, 1))

    def encode(self, images, with_tokens=False):
        """As TCAE.encode; [CLS] and tokens, which are not known here, have no width."""
        z = self.network.encode(images).float()
        expected = len(images), *self.latent_shape
        check(z.shape == expected, f"tokenizer: encode returns {tuple(z.shape)} where its constants say {expected}")
        z = (z - self.latent_mean) / self.latent_std
        return (images.new_zeros(len(images), 0), images.new_zeros(len(images), 1, 0), z) if with_tokens else z

    def decode(self, z):
        return self.network.decode(z * self.latent_std + self.latent_mean)


@torch.no_grad()
def measure_latents(tcae, source, image_size, images, workers, dist):
    """Measures latent_mean and latent_std, per channel, on centre crops of `images` training images; sums are in
    float64."""
    tcae.latent_mean.zero_(), tcae.latent_std.fill_(1)
    sums, count = torch.zeros(2, len(tcae.latent_mean), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for pixels, _ in data.eval_loader(source, image_size, data.eval_batch_size(image_size), dist, workers, images,
                                      title="latent statistics"):
        with dist.autocast():
            z = tcae.encode(data.to_float(pixels, dist.device)).cpu().double()  # (b, c, h, w)
        sums += torch.stack([z.sum((0, 2, 3)), (z**2).sum((0, 2, 3))])
        count += z[:, 0].numel()
    mean, square = dist.sum(sums) / dist.sum(count)
    tcae.latent_mean.copy_(mean[:, None, None])
    tcae.latent_std.copy_((square - mean**2).clamp(min=1e-12).sqrt()[:, None, None])


def measure_once(path, tcae, source, rebuild, workers, dist):
    """Measures somebody else's latents, unless the file `path` has their mean and std already."""
    store = open_store(path, tcae, source, rebuild, 1, (2, *tcae.latent_mean.shape), np.float32, dist)
    if len(store.to_do(dist)):
        measure_latents(tcae, source, tcae.image_size, 50000, workers, dist)
        if dist.first:
            store.put([0], torch.stack([tcae.latent_mean, tcae.latent_std]).cpu().numpy())
        dist.wait()
    else:
        tcae.latent_mean, tcae.latent_std = torch.from_numpy(store.items[0].copy()).to(dist.device)


# ----------------------------------------------------------------------------------------------------------------------
# An array on disk


class Store:
    """An array on disk that many processes fill, item by item, over any number of runs. The file is 4096 bytes of JSON
    about its contents, then `state` (count,) uint8 (0 = to do, 1 = done, 2 = failed), then `items` (count, *shape);
    both are memory-mapped. All processes of `dist` must open it together; the first creates it if need be. For several
    nodes it must lie where their memory maps agree: on a parallel file system, not on NFS. An item marked as done was
    written whole; there are no checksums, so what a disk does to it later goes unnoticed."""

    HEADER = 4096

    def __init__(self, path, about, count, shape, dtype, dist=None):
        self.given = path, about, count, shape, dtype
        size = self.HEADER + count + count * math.prod(shape) * np.dtype(dtype).itemsize
        if not os.path.exists(path) and (dist is None or dist.first):
            free = shutil.disk_usage(os.path.dirname(path) or ".").free
            if size > free:
                runtime.fail(f"{path} needs {size / 1e9:.3g} GB, but only {free / 1e9:.3g} are free there",
                             everywhere=False)
            with runtime.whole_file(path) as file:  # sparse: it takes up space only as it is filled
                file.write(json.dumps(about).encode().ljust(self.HEADER))
                file.truncate(size)
        if dist:
            dist.wait()
        check(os.path.getsize(path) == size,  # memmap would pad it with zeros
              f"{path} has {os.path.getsize(path)} bytes, not {size}: a partial copy; remove it or copy it again")
        mode = "r+" if os.access(path, os.W_OK) else "r"  # a complete one may be read-only
        self.state = np.memmap(path, np.uint8, mode, self.HEADER, (count,))
        self.items = np.memmap(path, dtype, mode, self.HEADER + count, (count, *shape))

    def __reduce__(self):  # workers that are not forked get the path, not the contents
        return Store, self.given

    @classmethod
    def differences(cls, path, about):
        """In words, how the file at `path` differs from `about`; "" if it doesn't, or if there is no file."""
        try:
            with open(path, "rb") as file:
                says = dict(json.loads(file.read(cls.HEADER)))
        except FileNotFoundError:
            return ""
        except OSError as error:
            runtime.fail(f"{path} can't be read: {error.strerror}", everywhere=False)
        except (ValueError, TypeError):
            return "it is not a file of this project"
        return "; ".join(f"{name} was {says.get(name)!r}, is {value!r}" for name, value in about.items()
                         if says.get(name) != value)

    def to_do(self, dist):
        """The indices of all items that are not done. All processes must call it before any of them fills one."""
        indices = np.flatnonzero(self.state != 1)
        dist.wait()
        return indices

    def put(self, where, items):
        self.items[where] = items
        self.state[where] = 1  # only now: an item that is marked as done is there

    def flush(self):
        self.items.flush(), self.state.flush()


# ----------------------------------------------------------------------------------------------------------------------
# The data set as latents: encoded once into a cache, or on the fly


class LatentDataset:
    """`source` as latents, for data.TrainLoader. Each item is an image and its mirror image: latents (2, c, h, w)
    float16 from the cache, or, without one, pixels (2, H, W, 3) uint8."""

    def __init__(self, source, image_size, store=None):
        self.source, self.image_size, self.store, self.constant = source, image_size, store, source.constant

    def __len__(self):
        return len(self.source)

    def load(self, i):
        if not self.store:
            pixels = data.center_crop(self.source.load(i), self.image_size)
            pair = np.stack([pixels, pixels[:, ::-1]])
        elif self.store.state[i] == 1:
            pair = np.array(self.store.items[i])
        else:
            raise OSError("this image could not be used when the cache was filled")
        return {"pair": pair, "label": self.source.labels[i]}

    def name(self, i):
        return self.source.name(i)

    def fingerprint(self):
        return self.source.fingerprint()


def encode_float16(tcae, pixels, dist):
    """uint8 (B, H, W, 3) -> z (B, c, h, w), normalised, rounded to float16."""
    with torch.no_grad(), dist.autocast():
        return tcae.encode(data.to_float(pixels, dist.device)).half()


def open_store(path, tcae, source, rebuild, count, shape, dtype, dist):
    """The file at `path`, made if it isn't there, or if `rebuild`; refused if it is of another tokenizer or other
    images. A run that is to fill it has it for itself; a complete one can be shared."""
    about = {"tokenizer": tcae.latents_of, "image_size": tcae.image_size, "images": len(source),
             "files": source.fingerprint()}
    lock_file = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.lock")
    if rebuild or not os.path.exists(path):
        dist.lock(lock_file, f"cache={path}")
    if rebuild and dist.first:
        Path(path).unlink(missing_ok=True)
    dist.wait()  # until the old file is gone
    differences = Store.differences(path, about)
    check(not differences, f"cache={path} was made from something else ({differences}). "
                           "--rebuild_cache=True replaces it, another --cache keeps both")
    store = Store(path, about, count, shape, dtype, dist)
    if (store.state == 0).any():  # items are left to fill
        check(store.items.flags.writeable, f"cache={path} is incomplete, and can't be written")
        dist.lock(lock_file, f"cache={path}")
    return store


def fill_cache(path, tcae, source, rebuild, workers, dist):
    """The cache at `path`, completed: each process encodes its share of what it lacks."""
    store = open_store(path, tcae, source, rebuild, len(source), (2, *tcae.latent_shape), np.float16, dist)
    todo = store.to_do(dist)
    if len(todo) == 0 or not store.items.flags.writeable:  # at most bad files are missing
        return store
    batch = max(1, data.eval_batch_size(tcae.image_size) // 2)  # with the mirror images twice as many
    for pixels, indices in data.eval_loader(source, tcae.image_size, batch, dist, workers, indices=todo,
                                            title="encoding the data set once"):
        both = torch.stack([pixels, pixels.flip(2)], dim=1).flatten(0, 1)  # (2 b, H, W, 3): image, mirror image, …
        z = encode_float16(tcae, both, dist).cpu().unflatten(0, (-1, 2))  # (b, 2, c, h, w)
        store.put(indices.numpy(), z.numpy())
    mine = todo[dist.rank::dist.count]  # as eval_loader divides them
    failed = mine[store.state[mine] != 1]
    store.state[failed] = 2  # could not be used; the next run tries them again
    store.flush()
    return store
