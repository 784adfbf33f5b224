"""Stage 4: how good are reconstructions and samples, and what do the latents know?

    python eval.py --tokenizer=out/shapes_tokenizer/checkpoint.pt                    # reconstruction and probes
    torchrun --nproc_per_node=8 eval.py --tokenizer=out/tokenizer/checkpoint.pt --data_dir=imagenet
    torchrun --nproc_per_node=8 eval.py --samples=out/samples/samples.npz --reference=VIRTUAL_imagenet256_labeled.npz
    python eval.py --samples=their_reconstructions/ --reference=originals/ --paired=True     # another tokenizer's

Reconstruction: rFID, PSNR, SSIM, LPIPS. Generation: gFID, IS. Linear probes as in Table 1: a linear classifier on
average-pooled image tokens (accuracy R_tok), the same on average-pooled latents (R_lat), and the structure loss,
1 - R_lat / R_tok; and, as DINOv2 is measured, one on [CLS] beside the pooled tokens.
Prints a table and writes it to eval.json, beside the checkpoint or the samples.
"""
import json
import logging
import os
import signal
import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import runtime
from model import TCAE
from runtime import check

# What is measured: either a tokenizer on images …
tokenizer = ""  # stage 1's checkpoint
data_dir = ""  # as in stage 1; "" = the tokenizer's own
val_images = 0  # how many validation images; 0 = all
probe_images = 0  # how many training images the probes are fitted on; 0 = all

# … or samples against a reference
samples = ""  # folder of images, or .npz with arr_0 uint8 (N, H, W, 3) as sample.py writes it
reference = ""  # the same, or .npz of statistics (mu, sigma), or "shapes"; a folder's are cropped to the samples' size
paired = False  # True: image i of one is the reconstruction of image i of the other (in order of file names)

# How
feature_net = ""  # "" = FID's Inception; .pt2: uint8 (B, H, W, 3) -> features (B, D), logits (B, K); "none" = no FID
lpips_net = "vgg"  # or "alex"; "none" = no LPIPS
probe_steps = 200  # L-BFGS steps of the probes' multinomial logistic regression, on standardised features
probe_decay = 1e-4  # its L2 penalty
batch_size = 64  # images at a time, per process
workers = 4  # loading processes per process; 0 = load in the process itself
out = ""  # the file of results; "" = eval.json beside the checkpoint or the samples
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # of the tokenizer's matrix products; all that measures is float32 or float64

INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth", "6726825d")

# ----------------------------------------------------------------------------------------------------------------------
# Images of a folder or an .npz


class Folder:
    """All images below a folder, in order of their paths."""

    def __init__(self, root, name):
        self.constant = name
        self.paths = sorted(path for path in Path(root).rglob("*") if path.suffix.lower() in data.EXTENSIONS)
        check(self.paths, f"{name}={root} holds no images ({', '.join(sorted(data.EXTENSIONS))})")

    def __len__(self):
        return len(self.paths)

    def load(self, i):
        return data.to_rgb(Image.open(self.paths[i]))

    def name(self, i):
        return str(self.paths[i])

    def side(self):
        """The side of all images in pixels; they must be squares of one size. Undecodable files are left for later."""
        first = None
        for path in self.paths:
            try:
                with Image.open(path) as image:
                    size = image.size
            except Exception:
                continue
            first = first or (path, *size)
            check(size == first[1:] and size[0] == size[1],
                  f"{self.constant}: all images must be squares of one size, but {first[0]} is {first[1]} × {first[2]} "
                  f"and {path} is {size[0]} × {size[1]} pixels")
        check(first, f"{self.constant}: none of {len(self.paths)} images can be decoded, {self.paths[0]} to begin with")
        return first[1]


class Npz:
    """The images arr_0, uint8 (N, H, H, 3), of an .npz file, memory-mapped: files of any size take no memory."""

    def __init__(self, path, name):
        with zipfile.ZipFile(path) as archive:
            names = [member.filename for member in archive.infolist()]
            check("arr_0.npy" in names, f"{name}={path} has no arr_0 but {', '.join(names[:5]) or 'nothing'}")
            member = archive.getinfo("arr_0.npy")
        check(member.compress_type == zipfile.ZIP_STORED,
              f"{name}={path} is compressed; write it with numpy.savez instead of savez_compressed")
        with open(path, "rb") as file:
            file.seek(member.header_offset + 26)
            file.seek(sum(struct.unpack("<2H", file.read(4))), os.SEEK_CUR)  # past the member's name and extra field
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, kind = read(file)
            check(kind == np.uint8 and len(shape) == 4 and shape[0] and shape[1] == shape[2] and shape[3] == 3,
                  f"{name}={path}: arr_0 is {kind} {shape}; it must be uint8 (N, H, H, 3)")
            check(not fortran, f"{name}={path}: arr_0 is in Fortran's order; write it with numpy.ascontiguousarray")
            self.images = np.memmap(path, kind, "r", file.tell(), shape)
        self.path, self.constant = path, name

    def __reduce__(self):  # to a worker that is not forked goes the name, not the contents
        return Npz, (self.path, self.constant)

    def __len__(self):
        return len(self.images)

    def load(self, i):
        return Image.fromarray(self.images[i])

    def name(self, i):
        return f"{self.path}[{i}]"

    def side(self):
        return self.images.shape[1]


def open_images(path, name):
    """The images at `path`, which came from the constant `name`."""
    check(path, f"{name} is empty: a folder of images or an .npz file")
    check(os.path.exists(path), f"{name}={path}: there is no such file or folder")
    if os.path.isdir(path):
        return Folder(path, name)
    check(zipfile.is_zipfile(path), f"{name}={path} is neither a folder nor a whole .npz file")
    return Npz(path, name)


def has_statistics(path):
    """Whether `path` is an .npz with mu and sigma, such as ADM's."""
    if os.path.isdir(path) or not zipfile.is_zipfile(path):
        return False
    with np.load(path) as file:
        return {"mu", "sigma"} <= set(file.files)


def read_statistics(path, features):
    """Such a file's mean (D,) and covariance (D, D)."""
    with np.load(path) as file:
        mean, cov = file["mu"], file["sigma"]
    check(mean.shape == (features,) and cov.shape == (features, features),
          f"reference={path}: mu is {mean.shape} and sigma {cov.shape}, but the network has {features} features")
    return torch.from_numpy(mean).double(), torch.from_numpy(cov).double()


# ----------------------------------------------------------------------------------------------------------------------
# Pairs of images: PSNR is in data.py


def float64_place(on):
    """The device for float64: MPS has none."""
    return on if on.type == "cuda" else torch.device("cpu")


def ssim(a, b):
    """Structural similarity of each pair of images, uint8 (B, H, W, 3) twice -> (B,) float64, at most 1.

    Wang et al. 2004: Gaussian window of 11 pixels, σ = 1.5, population statistics, mean over the places where the
    window fits and over the channels. H and W must be at least 11.
    """
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-offsets**2 / (2 * 1.5**2))
    window = window / window.sum()

    def blur(x):  # (B, 3, H, W) -> (B, 3, H - 10, W - 10)
        x = F.conv2d(x.flatten(0, 1)[:, None], window.view(1, 1, 11, 1).to(x))
        return F.conv2d(x, window.view(1, 1, 1, 11).to(x)).unflatten(0, (-1, 3))[:, :, 0]

    a, b = a.movedim(-1, 1).double(), b.movedim(-1, 1).double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    local = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return local.mean((1, 2, 3))


def gradient_magnitude(images):
    """Mean length of the gradient of uint8 (B, H, W, 3), by differences to the next pixel -> (B,) float64."""
    x = images.double()
    return torch.hypot(x[:, 1:, :-1] - x[:, :-1, :-1], x[:, :-1, 1:] - x[:, :-1, :-1]).mean((1, 2, 3))


class PairSums:
    """Sums over image pairs of PSNR, SSIM, the gradients for the sharpness and, if there is a network for it, LPIPS."""

    def __init__(self, perceptual, on):
        self.perceptual, self.on = perceptual, on
        self.place = float64_place(on)
        self.sums = torch.zeros(6, dtype=torch.float64)  # the last is the count

    def add(self, a, b):
        """Originals and their reconstructions, uint8 (B, H, W, 3) each."""
        here = a.to(self.place), b.to(self.place)
        sums = [data.psnr(*here).sum(), ssim(*here).sum(), *(gradient_magnitude(x).sum() for x in here)]
        lpips = self.perceptual(data.to_float(a, self.on), data.to_float(b, self.on)).sum() if self.perceptual else 0
        self.sums += torch.tensor([*sums, lpips, len(a)], dtype=torch.float64)

    def means(self, processes):
        """-> (how many pairs, {name of the metric: its mean over them}). Sharpness: gradients of the reconstructions in
        units of the originals'; below 1 they are blurred."""
        psnr, similarity, before, after, lpips, count = processes.sum(self.sums).tolist()
        return int(count), {"PSNR": psnr / count, "SSIM": similarity / count,
                            "LPIPS": lpips / count if self.perceptual else None,
                            "sharpness": after / before if before else None}


# ----------------------------------------------------------------------------------------------------------------------
# Sets of images: Fréchet distance and Inception score


def resize_like_tensorflow(x, size):
    """Bilinear to size × size, (B, C, H, W), as TensorFlow 1 did: output pixel i looks at i · H / size, not at its
    centre, and nothing is averaged on the way down. FID is defined with it."""
    def neighbours(length):
        place = torch.arange(size, dtype=torch.float32, device=x.device) * (length / size)
        low = place.long()
        return low, (low + 1).clamp(max=length - 1), place - low

    low, high, share = neighbours(x.shape[3])
    x = torch.lerp(x[..., low], x[..., high], share)  # (B, C, H, size)
    low, high, share = neighbours(x.shape[2])
    return torch.lerp(x[:, :, low], x[:, :, high], share[:, None])


def repooled(block, pool):
    """torchvision's Inception block `block`, but with its last branch fed by `pool`."""
    class Repooled(block):
        def forward(self, x):
            last = self.branch_pool(pool(x))
            return torch.cat([super().forward(x)[:, :-last.shape[1]], last], dim=1)
    return Repooled


class Inception(nn.Module):
    """The Inception-v3 of 2015 that FID and IS are defined with: uint8 (B, H, W, 3) -> features (B, 2048), logits
    (B, 1008). It is torchvision's but for the pools: averages leave out the padding, and one is a maximum. IS takes the
    logits without their bias."""

    def __init__(self):
        super().__init__()
        from torchvision.models import inception as tv

        def average(x):
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

        def maximum(x):
            return F.max_pool2d(x, 3, stride=1, padding=1)

        self.net = tv.Inception3(1008, aux_logits=False, init_weights=False, inception_blocks=[
            tv.BasicConv2d, repooled(tv.InceptionA, average), tv.InceptionB, repooled(tv.InceptionC, average),
            tv.InceptionD, repooled(tv.InceptionE, average), tv.InceptionAux])
        self.net.Mixed_7c = repooled(tv.InceptionE, maximum)(2048)
        self.classifier, self.net.fc = self.net.fc, nn.Identity()
        self.features, self.classes = 2048, 1008

    @classmethod
    def pretrained(cls, path):
        """With the published weights."""
        inception, weights = cls(), torch.load(path, map_location="cpu", weights_only=True)
        inception.classifier.load_state_dict({name[3:]: weights.pop(name) for name in ("fc.weight", "fc.bias")})
        inception.net.load_state_dict(weights)
        return inception

    def forward(self, pixels):
        x = resize_like_tensorflow(pixels.movedim(-1, 1).float(), 299)
        features = self.net((x - 128) / 128)  # (B, 2048)
        return features, features @ self.classifier.weight.T


class FeatureNet:
    """A network saved by torch.export, used like Inception for images of `side` pixels."""

    def __init__(self, path, side, on):
        check(Path(path).is_file(), f"feature_net={path}: there is no such file")
        logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # it logs a traceback of its own
        try:
            exported = torch.export.load(path)
            if on.type != "cpu":
                from torch.export.passes import move_to_device_pass
                exported = move_to_device_pass(exported, str(on))
            self.net = exported.module()
        except Exception as error:
            runtime.fail(f"feature_net={path} is not a file of torch.export.save: {first_line(error)}")
        try:
            for batch in 1, FeatureSums.BATCH:
                features, logits = self.net(torch.zeros(batch, side, side, 3, dtype=torch.uint8, device=on))
                self.features, self.classes = features.shape[1], logits.shape[1]
                assert features.shape == (batch, self.features) and logits.shape == (batch, self.classes)
        except Exception as error:
            runtime.fail(f"feature_net={path} must take uint8 (B, {side}, {side}, 3) for any B and return features "
                         f"(B, D) and logits (B, K): {first_line(error)}")

    def __call__(self, pixels):
        return self.net(pixels)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class FeatureSums:
    """What FID and IS need of a set of images, as sums in float64: their size does not grow with the set's."""

    SPLITS = 10  # IS is the mean over so many parts of the set, in order
    BATCH = 16  # at a time: Inception takes some 30 MB per image

    def __init__(self, network, images, on):
        self.network, self.images, self.on, self.place = network, images, on, float64_place(on)

        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.float64, device=self.place)

        self.total, self.products = zeros(network.features), zeros(network.features, network.features)
        self.counts, self.negative_entropies = zeros(self.SPLITS), zeros(self.SPLITS)
        self.probabilities = zeros(self.SPLITS, network.classes)

    def add(self, pixels, indices):
        """uint8 (B, H, W, 3) of the set's images `indices` (B,)."""
        for pixels, indices in zip(pixels.split(self.BATCH), indices.split(self.BATCH)):
            features, logits = (x.to(self.place).double() for x in self.network(pixels.to(self.on)))
            self.total += features.sum(0)  # (D,)
            self.products += features.T @ features  # (D, D)
            split = ((indices + 1) * self.SPLITS - 1) // self.images  # part k ends before image (k + 1) N / 10
            parts = F.one_hot(split, self.SPLITS).T.to(logits)  # (10, B)
            p = logits.softmax(1)  # (B, K)
            self.counts += parts.sum(1)
            self.negative_entropies += parts @ (p * logits.log_softmax(1)).sum(1)
            self.probabilities += parts @ p  # (10, K)

    def reduce(self, processes):
        """Adds up the sums of all processes -> how many images there were."""
        for name in "total", "products", "counts", "negative_entropies", "probabilities":
            setattr(self, name, processes.sum(getattr(self, name)).cpu())
        count = int(self.counts.sum())
        check(count > 1, f"a Fréchet distance needs at least 2 images, not {count}")
        if count <= len(self.total):
            processes.print(f"warning: {count} images are not more than the network's {len(self.total)} features: "
                            "their Fréchet distance comes out too large, and compares only with as many images")
        return count

    def mean_and_cov(self):
        """(D,) and (D, D), once reduced."""
        count = self.counts.sum()
        mean = self.total / count
        return mean, (self.products - count * torch.outer(mean, mean)) / (count - 1)

    def inception_score(self):
        """exp E KL(p(y|x) ‖ p(y)), the mean over the splits, once reduced."""
        mean = self.probabilities / self.counts[:, None]
        divergence = self.negative_entropies / self.counts - torch.special.xlogy(mean, mean).sum(1)
        return divergence.exp().mean().item()


def frechet_distance(first, second):
    """‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½) of two (mean (D,), covariance (D, D)) in float64.

    The last trace is the sum of the roots of the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric: unlike a general
    matrix root this is real, and well defined for covariances of fewer images than features.
    """
    (mean_1, cov_1), (mean_2, cov_2) = first, second
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    return max(((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross).item(), 0.0)


def distance_between(first, second, processes):
    """Fréchet distance of two FeatureSums, of which each process holds a part."""
    first.reduce(processes)
    second.reduce(processes)
    return frechet_distance(first.mean_and_cov(), second.mean_and_cov())


# ----------------------------------------------------------------------------------------------------------------------
# Linear probes (Table 1)


def fit_probe(features, labels, classes, processes):
    """A linear classifier by multinomial logistic regression -> a function from features (B, D) to class (B,).

    features (N, D) and labels (N,) of this process; the sums are over all. L-BFGS over the whole set, in chunks, so
    that memory-mapped features are read piece by piece.
    """
    on, width = processes.device, features.shape[1]
    sums = torch.zeros(2 * width + 1, dtype=torch.float64)
    for x, _ in chunks(features, labels):
        x = x.double()
        sums += torch.cat([x.sum(0), x.square().sum(0), torch.tensor([float(len(x))])])
    total, square, count = processes.sum(sums).split([width, width, 1])
    mean = total / count
    std = (square / count - mean**2).clamp(min=1e-12).sqrt().float().to(on)
    mean, count = mean.float().to(on), count.item()
    weight = torch.zeros(width + 1, classes, device=on, requires_grad=True)  # the last row is the bias
    optimizer = torch.optim.LBFGS([weight], max_iter=probe_steps, history_size=20, line_search_fn="strong_wolfe")

    def logits(x):
        return (x.to(on) - mean) / std @ weight[:-1] + weight[-1]

    def loss():
        weight.grad, total = torch.zeros_like(weight), torch.zeros((), device=on)  # a process may have no rows
        for x, y in chunks(features, labels):
            part = F.cross_entropy(logits(x), y.to(on), reduction="sum") / count
            part.backward()
            total += part.detach()
        processes.sum(weight.grad)
        penalty = probe_decay * weight[:-1].square().sum()
        penalty.backward()
        return processes.sum(total) + penalty.detach()

    with torch.enable_grad():
        optimizer.step(loss)
    return lambda x: logits(x).argmax(1).cpu()


def chunks(features, labels, size=65536):
    """(features (size, D), labels (size,)) from the beginning to the end."""
    for k in range(0, len(features), size):
        yield torch.from_numpy(np.array(features[k:k + size])), labels[k:k + size]


def probe(train, train_labels, val, val_labels, classes, processes):
    """Accuracy on the second set of a classifier fitted on the first; each process has its own part of both."""
    classify = fit_probe(train, train_labels, classes, processes)
    right = sum((classify(x) == y).sum() for x, y in chunks(val, val_labels))
    right, count = processes.sum(torch.tensor([float(right), float(len(val))])).tolist()
    return right / count


class Rows:
    """Rows of float32 in a temporary file, (N, width): features take disk, not memory."""

    def __init__(self, width):
        self.width, self.file = width, tempfile.TemporaryFile()

    def append(self, rows):
        self.file.write(rows.float().cpu().numpy().tobytes())

    def array(self):
        self.file.flush()
        count = self.file.tell() // (4 * self.width)
        return np.memmap(self.file, np.float32, "r", shape=(count, self.width)) if count else \
            np.zeros((0, self.width), np.float32)


class PooledFeatures:
    """Of every image: average-pooled tokens and [CLS] (2 D,), average-pooled latents (c,), and the label."""

    def __init__(self, source, tcae):
        self.classes, self.source_labels = len(source.classes), torch.tensor(source.labels)
        self.labels = [self.source_labels[:0]]
        self.width = tcae.encoder.width
        self.tokens_and_cls, self.latents = Rows(2 * self.width), Rows(len(tcae.latent_mean))

    def add(self, cls, tokens, z, indices):
        self.tokens_and_cls.append(torch.cat([tokens.float().mean(1), cls.float()], dim=1))
        self.latents.append(z.mean((2, 3)))
        self.labels.append(self.source_labels[indices])

    def inputs(self):
        """Of each probe, its inputs (N, ...) by name."""
        both = self.tokens_and_cls.array()
        return {"tokens": both[:, :self.width], "[CLS] and tokens": both, "latents": self.latents.array()}

    def count(self, processes):
        return int(processes.sum(torch.tensor(float(sum(map(len, self.labels))))))


def probes(train, val, processes):
    """Table 1's row and one more probe, on [CLS] and tokens, for two PooledFeatures."""
    of_train, of_val = train.inputs(), val.inputs()
    found = {f"probe on {name}": probe(of_train[name], torch.cat(train.labels), of_val[name], torch.cat(val.labels),
                                       train.classes, processes) for name in of_train}
    before, after = found["probe on tokens"], found["probe on latents"]
    return {**found, "structure loss": 1 - after / before if before else None}


# ----------------------------------------------------------------------------------------------------------------------
# The three evaluations


def cropped(source, name, size, processes, images=0, title="", keep_empty=False):
    """Batches of a source's centre crops, (uint8 (b, size, size, 3), their indices (b,)), this process's share. Names
    undecodable files, which are left out, and stops if they are more than 1 %. `name`: the constant it came from."""
    bad, loader = [], data.in_order(source, size, batch_size, processes, workers, images)
    for pixels, indices, names in runtime.bar(loader, processes, desc=title) if title else loader:
        bad += names
        if len(pixels) or keep_empty:
            yield pixels, indices
    data.BadFiles(source, name, images).report(processes.gather(bad), processes)


def open_feature_net(processes, side):
    """Raises MissingWeights."""
    if feature_net == "none":
        raise runtime.MissingWeights("feature_net=none (else it takes Inception's weights, 95 MB)")
    if feature_net:
        return FeatureNet(feature_net, side, processes.device)
    return Inception.pretrained(runtime.published(*INCEPTION, processes)).to(processes.device).eval()


def open_lpips(processes):
    """Raises MissingWeights."""
    if lpips_net == "none":
        raise runtime.MissingWeights("lpips_net=none (else it takes VGG's weights, 550 MB)")
    return runtime.load_lpips(lpips_net, processes)


def open_networks(processes, side):
    """-> (network for FID or None, network for LPIPS or None); says what is missing, now rather than after an hour."""
    found, missing = [], []
    for metric, load in (("FID", lambda: open_feature_net(processes, side)),
                         ("LPIPS", lambda: open_lpips(processes))):
        try:
            found.append(load())
        except runtime.MissingWeights as error:
            found.append(None)
            missing.append(f"{metric}: {error}")
    if missing:
        processes.print("will not be measured, for want of weights: " + "; ".join(missing))
    return found


def metric_name(metric):
    """The name of a metric that is only called FID or IS if the network is Inception."""
    return f"{metric.replace('FID', 'FD')} ({Path(feature_net).name})" if feature_net not in ("", "none") else metric


@torch.no_grad()
def evaluate_tokenizer(processes):
    """-> what was measured, in words; {name: value, None where weights are missing}."""
    saved = runtime.load_checkpoint(tokenizer, "tokenizer", kind="tokenizer")
    constants, on = saved["constants"], processes.device
    where, size = data_dir or constants["data_dir"], constants["image_size"]
    train, val = (data.open_split(where, split, size, constants["shapes_images"]) for split in ("train", "val"))
    data.check_same_classes(train, val)
    check_size(size)
    tcae = TCAE.from_checkpoint(saved).to(on)
    network, perceptual = open_networks(processes, size)

    def encode(pixels):
        with processes.autocast():
            return tcae.encode_with_tokens(data.to_float(pixels, on))

    pairs, of_train, of_val = PairSums(perceptual, on), PooledFeatures(train, tcae), PooledFeatures(val, tcae)
    if network:
        originals, reconstructions = (FeatureSums(network, len(val), on) for _ in range(2))
    for pixels, indices in cropped(val, "data_dir", size, processes, val_images, "validation images"):
        cls, tokens, z = encode(pixels)
        with processes.autocast():
            reconstruction = data.to_uint8(tcae.decode(z)).cpu()
        of_val.add(cls, tokens, z, indices)
        pairs.add(pixels, reconstruction)
        if network:
            originals.add(pixels, indices)
            reconstructions.add(reconstruction, indices)
    for pixels, indices in cropped(train, "data_dir", size, processes, probe_images, "training images"):
        of_train.add(*encode(pixels), indices)

    count, means = pairs.means(processes)
    rfid = distance_between(originals, reconstructions, processes) if network else None
    about = (f"{tokenizer}: reconstructions of {count} images of {where}, {size} px; probes fitted on "
             f"{of_train.count(processes)} training images")
    return about, {metric_name("rFID"): rfid, **means, **probes(of_train, of_val, processes)}


@torch.no_grad()
def evaluate_samples(processes):
    """-> the same as evaluate_tokenizer, of samples as they are: FID and IS."""
    images, on = open_images(samples, "samples"), processes.device
    size = images.side()
    check(len(images) >= FeatureSums.SPLITS,
          f"samples={samples} holds {len(images)} images; IS needs {FeatureSums.SPLITS} at least")
    statistics = has_statistics(reference)
    other = None if statistics else open_reference(size)
    try:
        network = open_feature_net(processes, size)
    except runtime.MissingWeights as error:
        runtime.fail(f"FID and IS need weights: {error}")
    if statistics:
        target, against = read_statistics(reference, network.features), "the statistics"

    sampled = FeatureSums(network, len(images), on)
    for pixels, indices in cropped(images, "samples", size, processes, title="samples"):
        sampled.add(pixels, indices)
    count = sampled.reduce(processes)
    if not statistics:
        referred = FeatureSums(network, len(other), on)
        for pixels, indices in cropped(other, "reference", size, processes, title="reference"):
            referred.add(pixels, indices)
        against, target = f"{referred.reduce(processes)} images", referred.mean_and_cov()
    return f"{samples}: {count} samples, {size} px, against {against} of {reference}", \
        {metric_name("gFID"): frechet_distance(sampled.mean_and_cov(), target),
         metric_name("IS"): sampled.inception_score()}


@torch.no_grad()
def evaluate_pairs(processes):
    """-> the same, of samples that are reconstructions of the reference: rFID, PSNR, SSIM, LPIPS."""
    images, on = open_images(samples, "samples"), processes.device
    size = images.side()
    check_size(size)
    other = open_reference(size)
    check(len(other) == len(images),
          f"paired=True: samples={samples} holds {len(images)} images, reference={reference} {len(other)}")
    network, perceptual = open_networks(processes, size)
    pairs = PairSums(perceptual, on)
    if network:
        reconstructions, originals = (FeatureSums(network, len(images), on) for _ in range(2))
    for (a, of_a), (b, of_b) in zip(cropped(images, "samples", size, processes, title="pairs", keep_empty=True),
                                    cropped(other, "reference", size, processes, keep_empty=True), strict=True):
        in_a, in_b = torch.isin(of_a, of_b), torch.isin(of_b, of_a)  # both of a pair could be decoded
        if in_a.any():
            a, b, indices = a[in_a], b[in_b], of_a[in_a]
            pairs.add(b, a)
            if network:
                reconstructions.add(a, indices)
                originals.add(b, indices)
    count, means = pairs.means(processes)
    rfid = distance_between(originals, reconstructions, processes) if network else None
    return f"{samples} as reconstructions of {reference}: {count} pairs, {size} px", \
        {metric_name("rFID"): rfid, **means}


def open_reference(size):
    """The images of `reference`; those of a folder may have any size, those of an .npz must have the samples'."""
    if reference == "shapes":
        return data.Shapes("val", 5000, size)  # built-in images
    other = open_images(reference, "reference")
    check(isinstance(other, Folder) or other.side() == size,
          f"reference={reference} has images of another size than the samples' {size} pixels")
    return other


def check_size(size):
    check(size >= 11, f"{'tokenizer' if tokenizer else 'samples'}: SSIM's window does not fit images of {size} pixels; "
          "11 are the least")


def main():
    constants = runtime.configure(globals())
    for name in "batch_size", "probe_steps":
        check(constants[name] > 0, f"{name}={constants[name]} must be at least 1")
    check(lpips_net in ("vgg", "alex", "none"), f"lpips_net={lpips_net!r}: it is 'vgg', 'alex' or 'none'")
    check(bool(tokenizer) != bool(samples),
          "give either --tokenizer=CHECKPOINT, or --samples=IMAGES with --reference=IMAGES")
    for name in "tokenizer", "samples":
        given = constants[name]
        check(not given or os.path.exists(given), f"{name}={given}: there is no such file or folder")
    path = out or os.path.join(os.path.dirname((tokenizer or samples).rstrip("/")), "eval.json")
    check(os.access(os.path.dirname(path) or ".", os.W_OK) and not os.path.isdir(path), f"out={path} can't be written")
    processes = runtime.Processes(device, dtype)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing to save
    torch.set_float32_matmul_precision("highest")  # no TF32 in what measures
    torch.backends.cudnn.allow_tf32 = False
    evaluate = evaluate_tokenizer if tokenizer else evaluate_pairs if paired else evaluate_samples
    about, results = evaluate(processes)
    if processes.first:
        print(about)
        for name, value in results.items():
            print(f"  {name:<{max(map(len, results))}}" + ("         –" if value is None else f"{value:10.4f}"))
        with open(path, "w") as file:
            json.dump({"measured": about, **results, "constants": constants}, file, indent=1)
        print(f"wrote {path}")
    processes.close()


if __name__ == "__main__":
    main()
