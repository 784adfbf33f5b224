"""Stage 4: how good are reconstructions and samples, and how much structure do the latents keep?

    python eval.py --tokenizer=out/shapes_tokenizer/checkpoint.pt                    # reconstruction and probes
    torchrun --nproc_per_node=8 eval.py --tokenizer=out/tokenizer/checkpoint.pt --data_dir=imagenet
    torchrun --nproc_per_node=8 eval.py --samples=out/samples/samples.npz --reference=VIRTUAL_imagenet256_labeled.npz
    python eval.py --samples=their_reconstructions/ --reference=originals/ --paired=True     # another tokenizer's

Reconstruction: rFID, PSNR, SSIM, LPIPS, sharpness. Generation: gFID, IS and, with a `feature_net` that knows the
generator's classes in the same order, "recognised": the share of samples that it puts in the class they were drawn for,
over all and in the worst class. Linear probes (Table 1): the accuracy R_tok of a linear classifier on average-pooled
tokens, R_lat of one on average-pooled latents, and the structure loss, 1 - R_lat / R_tok; also a probe on [CLS] and
pooled tokens together, as in DINOv2's evaluation.
Prints a table and writes it to eval.json, beside the checkpoint or the samples.
"""
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F

import data
import pretrained
import runtime
from folders import Npz, open_images, side_of
from latents import OtherTokenizer, open_tokenizer
from runtime import check

# What is measured: either a tokenizer on images …
tokenizer = ""  # stage 1's checkpoint, or a file.py with another tokenizer
data_dir = ""  # as in stage 1; "" = the tokenizer's own
val_images = 0  # how many validation images; 0 = all
probe_images = 0  # how many training images to fit the probes on; 0 = all
statistics = ""  # .npz to write the reconstructions' feature statistics to: a `reference` for the generator's own error
pca = False  # True: also the PSNR of PCA with as many values per image, the best linear tokenizer; up to 64 px

# … or samples against a reference
samples = ""  # folder of images, or .npz with arr_0 uint8 (N, H, W, 3) as sample.py writes it
reference = ""  # the same, or .npz of statistics (mu, sigma), or "shapes"; a folder is cropped to the samples' size
paired = False  # True: samples are reconstructions of the reference, matched by path, file name or its last number

# How
feature_net = ""  # "" = FID's Inception; .pt2: uint8 (B, H, W, 3) -> features (B, D), logits (B, K); "none" = no FID
lpips_net = "vgg"  # or "alex"; "none" = no LPIPS
probe_steps = 200  # L-BFGS steps of the probes' multinomial logistic regression, on standardised features
probe_decay = 1e-4  # its L2 penalty
batch_size = 64  # images at a time, per process
workers = 4  # loading processes per process; 0 = load in the process itself
out = ""  # file for the results; "" = eval.json beside the checkpoint or the samples; required for a file.py
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # the tokenizer's matrix products; the metrics themselves are always in float32 or float64


# ----------------------------------------------------------------------------------------------------------------------
# The three evaluations


@torch.no_grad()
def evaluate_tokenizer(dist):
    """Reconstruction and probes -> what was measured, in words; {metric: value, or None if it can't be measured}."""
    tcae = open_tokenizer(tokenizer, dist)
    where, size = data_dir or tcae.data_dir, tcae.image_size
    train, val = data.open_splits(where, size, tcae.shapes_images)
    check(not pca or size <= 64, f"pca=True: {tokenizer} is for images of {size} pixels; 64 are the most for PCA")
    pairs, of_train, of_val = PairMetrics(len(val), size, dist), PooledFeatures(train, tcae), PooledFeatures(val, tcae)
    check(not statistics or pairs.features, f"statistics={statistics}: without a feature_net there are none")

    for pixels, indices in data.eval_loader(val, size, batch_size, dist, workers, val_images, "validation images"):
        with dist.autocast():
            cls, tokens, z = tcae.encode(data.to_float(pixels, dist.device), with_tokens=True)
            reconstructions = data.to_uint8(tcae.decode(z)).cpu()
        of_val.add(cls, tokens, z, indices)
        pairs.add(pixels, reconstructions, indices)
    if len(train.classes) == 1:
        dist.print(f"no probes: {where} has no class folders to tell apart")
    else:
        for pixels, indices in data.eval_loader(train, size, batch_size, dist, workers, probe_images, "for the probes"):
            with dist.autocast():
                of_train.add(*tcae.encode(data.to_float(pixels, dist.device), with_tokens=True), indices)

    count, results = pairs.results(dist)
    if statistics and dist.first:
        mean, covariance = pairs.features[1].mean_and_cov()
        with runtime.whole_file(statistics) as file:
            np.savez(file, mu=mean.cpu(), sigma=covariance.cpu())
    if pca:
        values = int(np.prod(tcae.latent_shape))
        results[f"PSNR of PCA, {values} values"] = pca_psnr(train, val, values, size, dist)
    fitted = int(dist.sum(torch.tensor(float(sum(map(len, of_train.labels))))))
    about = f"{count} images of {where}, {size} px" + (f"; probes fitted on {fitted} training images" if fitted else "")
    return f"{tokenizer}: reconstructions of {about}", {**results, **probes(of_train, of_val, dist)}


@torch.no_grad()
def evaluate_samples(dist):
    """FID, IS and "recognised" of samples against a reference -> what was measured, {metric: value}."""
    images = open_images(samples, "samples")
    size = side_of(images)
    check(len(images) >= FeatureSums.SPLITS,
          f"samples={samples} holds {len(images)} images; IS needs {FeatureSums.SPLITS} at least")
    target = read_statistics(reference)
    other = None if target else open_reference(size)
    network = load_network("FID and IS", "feature_net", lambda: open_feature_net(size, dist), dist, required=True)
    if target:
        mean, cov = (tuple(statistic.shape) for statistic in target)
        check(mean + mean == cov == (network.features,) * 2,
              f"reference={reference}: mu is {mean} and sigma {cov}, but the network has {network.features} features")

    drawn = drawn_classes(images, network.classes) if feature_net else None  # Inception has other classes

    def measure(images, title, labels=None):
        sums = FeatureSums(network, len(images), dist.device, labels)
        for pixels, indices in data.eval_loader(images, size, batch_size, dist, workers, title=title):
            sums.add(pixels, indices)
        return sums, sums.reduce(dist)

    sampled, count = measure(images, "samples", drawn)
    against = "the statistics"
    if other:
        referred, other_count = measure(other, "reference")
        target, against = referred.mean_and_cov(), f"{other_count} images"
    results = {metric_name("gFID"): frechet_distance(sampled.mean_and_cov(), target),
               metric_name("IS"): sampled.inception_score()}
    if drawn is not None:
        results[metric_name("recognised")] = (sampled.right.sum() / sampled.drawn.sum()).item()
        results[metric_name("recognised, worst class")] = (sampled.right / sampled.drawn).nan_to_num(1).min().item()
    return f"{samples}: {count} samples, {size} px, against {against} of {reference}", results


@torch.no_grad()
def evaluate_pairs(dist):
    """rFID, PSNR, SSIM, LPIPS of reconstructions of the reference -> what was measured, {metric: value}."""
    images = open_images(samples, "samples")
    size = side_of(images)
    other = open_reference(size)
    partner = partners(images, other)
    pairs = PairMetrics(len(images), size, dist)
    for (a, index_a), (b, index_b) in zip(
            data.eval_loader(images, size, batch_size, dist, workers, title="pairs", keep_empty=True),
            data.eval_loader(other, size, batch_size, dist, workers, indices=partner, keep_empty=True), strict=True):
        wanted = partner[index_a]  # the indices are of the images that could be decoded
        in_a, in_b = torch.isin(wanted, index_b), torch.isin(index_b, wanted)  # pairs of which both could
        if in_a.any():
            pairs.add(b[in_b], a[in_a], index_a[in_a])
    count, results = pairs.results(dist)
    return f"{samples} as reconstructions of {reference}: {count} pairs, {size} px", results


def read_statistics(path):
    """The mean (D,) and covariance (D, D) in an .npz like ADM's; None if `path` isn't such a file."""
    if os.path.isdir(path) or not zipfile.is_zipfile(path):
        return None
    with np.load(path) as file:
        if not {"mu", "sigma"} <= set(file.files):
            return None
        return tuple(torch.from_numpy(file[name]).double() for name in ("mu", "sigma"))


def open_reference(size):
    """The images of `reference`: in a folder they may have any size, in an .npz they must have the samples'."""
    if reference == "shapes":
        return data.Shapes("val", 5000, size)
    other = open_images(reference, "reference")
    check(not isinstance(other, Npz) or side_of(other) == size,
          f"reference={reference} has images of another size than the samples' {size} pixels")
    return other


def drawn_classes(images, classes):
    """The class each sample was drawn for, arr_1 of an .npz, (N,); None unless it has one of `classes` for each."""
    labels = np.load(images.root).get("arr_1", np.zeros(0)) if isinstance(images, Npz) else np.zeros(0)
    fits = labels.shape == (len(images),) and labels.dtype.kind in "iu" and 0 <= labels.min() <= labels.max() < classes
    return torch.from_numpy(labels).long() if fits else None


def partners(images, other):
    """(N,): the number in `other` of each image's partner: of the same path in its folder, else file name, else last
    number in it."""
    def by_name(source, pattern):  # {what the pattern finds in an image's name: the image's number}
        names = [source.name(i).removeprefix(getattr(source, "root", "")) for i in range(len(source))]
        found = [re.search(pattern, name) for name in names]
        return {match[1]: i for i, match in enumerate(found)} if all(found) else {}

    for pattern in r"^/?(.*)\.\w+$", r"([^/]*)\.\w+$", r"0*(\d+)\D*$":
        a, b = by_name(images, pattern), by_name(other, pattern)
        if a.keys() == b.keys() and len(a) == len(images) == len(other):
            return torch.tensor([b[name] for name in a])
    runtime.fail(f"paired=True: samples={samples}, {len(images)} images, and reference={reference}, {len(other)}, must "
                 "have the same paths, file names or numbers in them (0, 1, … in an .npz)")


# ----------------------------------------------------------------------------------------------------------------------
# Networks, and what the metrics are called


def open_feature_net(size, dist):
    """The network for FID and IS of images of `size` pixels. Raises MissingWeights."""
    if feature_net:
        return pretrained.FeatureNet(feature_net, size, dist.device, FeatureSums.BATCH)
    path = pretrained.download_weights(*pretrained.INCEPTION, dist)
    return pretrained.Inception.pretrained(path).to(dist.device).eval()


def load_network(metric, constant, load, dist, required=False):
    """load(), or None and a message if `constant` is "none" or weights are missing; if required, the run ends then."""
    why = f"{constant}=none"
    if globals()[constant] != "none":
        try:
            return load()
        except pretrained.MissingWeights as error:
            why = error
    check(not required, f"{metric} can't be measured: {why}")
    dist.print(f"{metric} will not be measured: {why}")


def metric_name(metric):
    """FID and IS have these names only with Inception."""
    return f"{metric.replace('FID', 'FD')} ({Path(feature_net).name})" if feature_net not in ("", "none") else metric


# ----------------------------------------------------------------------------------------------------------------------
# Pairs of images (PSNR is in data.py)


def float64_device(device):
    """The device for float64, which MPS does not have."""
    return device if device.type == "cuda" else torch.device("cpu")


def ssim(a, b):
    """Structural similarity of each pair of images, uint8 (B, H, W, 3) twice -> (B,) float64, at most 1.

    Wang et al. 2004: Gaussian window of 11 pixels, σ = 1.5, population statistics; the mean over channels and over all
    positions where the window fits inside. H and W must be at least 11.
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
    """Mean gradient length of uint8 images (B, H, W, 3), from differences of neighbouring pixels -> (B,) float64."""
    x = images.double()
    return torch.hypot(x[:, 1:, :-1] - x[:, :-1, :-1], x[:, :-1, 1:] - x[:, :-1, :-1]).mean((1, 2, 3))


class PairMetrics:
    """rFID, PSNR, SSIM, LPIPS and sharpness of `images` pairs of an original and its reconstruction, kept as sums."""

    def __init__(self, images, size, dist):
        check(size >= 11, f"{'tokenizer' if tokenizer else 'samples'}: {size} pixels are too few, SSIM needs 11")
        self.network = load_network("rFID", "feature_net", lambda: open_feature_net(size, dist), dist)
        self.perceptual = load_network("LPIPS", "lpips_net", lambda: pretrained.load_lpips(lpips_net, dist), dist)
        self.device, self.sums = dist.device, torch.zeros(6, dtype=torch.float64)  # the last is the count
        self.features = []  # of the originals and of the reconstructions
        if self.network:
            self.features = [FeatureSums(self.network, images, dist.device) for _ in range(2)]

    def add(self, originals, reconstructions, indices):
        """uint8 (B, H, W, 3) twice, and their numbers (B,)."""
        a, b = (pixels.to(float64_device(self.device)) for pixels in (originals, reconstructions))
        sums = [data.psnr(a, b).sum(), ssim(a, b).sum(), gradient_magnitude(a).sum(), gradient_magnitude(b).sum()]
        a, b = (data.to_float(pixels, self.device) for pixels in (originals, reconstructions))
        lpips = self.perceptual(a, b).sum() if self.perceptual else 0
        self.sums += torch.tensor([*sums, lpips, len(a)], dtype=torch.float64)
        for features, pixels in zip(self.features, (originals, reconstructions)):
            features.add(pixels, indices)

    def results(self, dist):
        """-> (how many pairs, {metric: value}). Sharpness, a ratio of gradients, is below 1 for blurred images."""
        psnr, similarity, before, after, lpips, count = dist.sum(self.sums).tolist()
        for features in self.features:
            features.reduce(dist)
        rfid = frechet_distance(*(features.mean_and_cov() for features in self.features)) if self.features else None
        return int(count), {metric_name("rFID"): rfid, "PSNR": psnr / count, "SSIM": similarity / count,
                            "LPIPS": lpips / count if self.perceptual else None,
                            "sharpness": after / before if before else None}


def pca_psnr(train, val, values, size, dist):
    """PSNR (dB) of the best linear tokenizer: PCA with `values` numbers per image, fitted on the training images."""
    def rows(source, images, title):
        for pixels, _ in data.eval_loader(source, size, data.eval_batch_size(size), dist, workers, images, title):
            yield pixels, data.to_float(pixels, "cpu").flatten(1)

    width = 3 * size**2
    count, total, products = torch.zeros(()), torch.zeros(width), torch.zeros(width, width)
    for _, x in rows(train, probe_images, "PCA"):
        count, total, products = count + len(x), total + x.sum(0), products.addmm_(x.T, x)
    count, total, products = (dist.sum(x).double() for x in (count, total, products))
    mean = total / count
    covariance = (products / count - mean[:, None] * mean).float()
    # Only the eigenvectors of the largest eigenvalues: half the time.
    _, vectors = scipy.linalg.eigh(covariance.numpy(), subset_by_index=[max(0, width - values), width - 1])
    basis, mean = torch.from_numpy(vectors), mean.float()  # (3 H W, values)
    psnr = torch.zeros(2, dtype=torch.float64)
    for pixels, x in rows(val, val_images, ""):
        projected = ((x - mean) @ basis @ basis.T + mean).view(-1, 3, size, size)
        psnr += torch.tensor([data.psnr(pixels, data.to_uint8(projected)).sum(), len(x)])
    psnr = dist.sum(psnr)
    return (psnr[0] / psnr[1]).item()


# ----------------------------------------------------------------------------------------------------------------------
# Sets of images: Fréchet distance and Inception score


class FeatureSums:
    """What FID and IS need to know of a set of images: float64 sums, whose size does not depend on the set's."""

    SPLITS = 10  # IS is the mean over this many parts of the set, in order
    BATCH = 16  # at a time: Inception takes some 30 MB per image

    def __init__(self, network, images, device, labels=None):
        self.network, self.images, self.device, self.labels = network, images, device, labels

        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.float64, device=float64_device(device))

        self.total, self.products = zeros(network.features), zeros(network.features, network.features)
        self.counts, self.negative_entropies = zeros(self.SPLITS), zeros(self.SPLITS)
        self.probabilities = zeros(self.SPLITS, network.classes)
        self.drawn, self.right = zeros(network.classes), zeros(network.classes)  # samples of each class

    def add(self, pixels, indices):
        """uint8 (B, H, W, 3) of the set's images `indices` (B,)."""
        for batch, which in zip(pixels.split(self.BATCH), indices.split(self.BATCH)):
            features, logits = (x.to(self.total.device).double() for x in self.network(batch.to(self.device)))
            self.total += features.sum(0)  # (D,)
            self.products += features.T @ features  # (D, D)
            split = ((which + 1) * self.SPLITS - 1) // self.images  # part k ends before image (k + 1) N / 10
            parts = F.one_hot(split, self.SPLITS).T.to(logits)  # (10, B)
            p = logits.softmax(1)  # (B, K)
            self.counts += parts.sum(1)
            self.negative_entropies += parts @ (p * logits.log_softmax(1)).sum(1)
            self.probabilities += parts @ p  # (10, K)
            if self.labels is not None:
                drawn = F.one_hot(self.labels[which], p.shape[1]).to(p)  # (B, K)
                self.drawn += drawn.sum(0)
                self.right += drawn[drawn.argmax(1) == p.argmax(1)].sum(0)

    def reduce(self, dist):
        """Adds up the sums of all processes -> how many images there were."""
        for name in "total", "products", "counts", "negative_entropies", "probabilities", "drawn", "right":
            setattr(self, name, dist.sum(getattr(self, name)).cpu())
        count = int(self.counts.sum())
        check(count > 1, f"a Fréchet distance needs at least 2 images, not {count}")
        if count <= len(self.total):
            dist.print(f"warning: {count} images are no more than the network's {len(self.total)} features, so their "
                       "Fréchet distance is too large; compare it only with that of as many images")
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

    tr (Σ₁ Σ₂)^½ is the sum of the square roots of the eigenvalues of Σ₁^½ Σ₂ Σ₁^½. That matrix is symmetric, so the sum
    is real, and well defined even with fewer images than features.
    """
    (mean_1, cov_1), (mean_2, cov_2) = first, second
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    return max(((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross).item(), 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Linear probes (Table 1)


class PooledFeatures:
    """What the probes see of each image, as lists of batches: pooled tokens beside [CLS], pooled latents, the label."""

    def __init__(self, source, tcae):
        self.classes, self.source_labels = len(source.classes), torch.tensor(source.labels)
        width = 0 if isinstance(tcae, OtherTokenizer) else tcae.encoder.width
        self.tokens_and_cls = [torch.zeros(0, 2 * width)]  # a process may have no images
        self.latents, self.labels = [torch.zeros(0, len(tcae.latent_mean))], [self.source_labels[:0]]

    def add(self, cls, tokens, z, indices):
        """[CLS] (B, D) and tokens (B, N, D) from before the bottleneck, latents z (B, c, h, w) from after it."""
        self.tokens_and_cls.append(torch.cat([tokens.float().mean(1), cls.float()], dim=1).cpu())  # (B, 2 D)
        self.latents.append(z.float().mean((2, 3)).cpu())  # (B, c)
        self.labels.append(self.source_labels[indices])


def probes(train, val, dist):
    """Table 1's row and the probe on [CLS] and tokens; see the top of this file. train, val: PooledFeatures."""
    def joined(features):
        return torch.cat(features.tokens_and_cls), torch.cat(features.latents), torch.cat(features.labels)

    (both, latents, labels), (val_both, val_latents, val_labels) = joined(train), joined(val)
    width = both.shape[1] // 2  # the first half is the tokens', the second [CLS]'s

    def accuracy(x, val_x):
        can = x.shape[1] and train.classes > 1
        return probe(x, labels, val_x, val_labels, train.classes, dist) if can else None

    r_tok, r_lat = accuracy(both[:, :width], val_both[:, :width]), accuracy(latents, val_latents)
    return {"probe on tokens": r_tok, "probe on [CLS] and tokens": accuracy(both, val_both),
            "probe on latents": r_lat, "structure loss": 1 - r_lat / r_tok if r_tok else None}


def probe(train, train_labels, val, val_labels, classes, dist):
    """Fits a linear classifier (multinomial logistic regression) on the rows of train (N, D) with labels (N,) -> its
    accuracy on val. L-BFGS on all rows, in chunks; each process holds some of them, and sums are over all processes."""
    device, width = dist.device, train.shape[1]
    sums = torch.zeros(2 * width + 1, dtype=torch.float64)
    for x, _ in chunks(train, train_labels):
        x = x.double()
        sums += torch.cat([x.sum(0), x.square().sum(0), torch.tensor([float(len(x))])])
    total, square, count = dist.sum(sums).split([width, width, 1])
    mean = total / count
    std = (square / count - mean**2).clamp(min=1e-12).sqrt().float().to(device)
    mean, count = mean.float().to(device), count.item()
    weight = torch.zeros(width + 1, classes, device=device, requires_grad=True)  # the last row is the bias
    optimizer = torch.optim.LBFGS([weight], max_iter=probe_steps, history_size=20, line_search_fn="strong_wolfe")

    def logits(x):
        return (x.to(device) - mean) / std @ weight[:-1] + weight[-1]

    def loss():
        weight.grad, value = torch.zeros_like(weight), torch.zeros((), device=device)  # a process may have no rows
        for x, y in chunks(train, train_labels):
            part = F.cross_entropy(logits(x), y.to(device), reduction="sum") / count
            part.backward()
            value += part.detach()
        dist.sum(weight.grad)
        penalty = probe_decay * weight[:-1].square().sum()
        penalty.backward()
        return dist.sum(value) + penalty.detach()

    with torch.enable_grad():
        optimizer.step(loss)
    right = sum((logits(x).argmax(1).cpu() == y).sum() for x, y in chunks(val, val_labels))
    right, seen = dist.sum(torch.tensor([float(right), float(len(val))])).tolist()
    return right / seen


def chunks(features, labels, size=65536):
    return zip((rows.contiguous() for rows in features.split(size)), labels.split(size))


# ----------------------------------------------------------------------------------------------------------------------
# The run


def main():
    constants = runtime.configure(globals())
    runtime.check_positive(constants, "batch_size", "probe_steps")
    check(lpips_net in ("vgg", "alex", "none"), f"lpips_net={lpips_net!r}: it is 'vgg', 'alex' or 'none'")
    check(bool(tokenizer) != bool(samples),
          "give either --tokenizer=CHECKPOINT, or --samples=IMAGES with --reference=IMAGES")
    name, given = ("tokenizer", tokenizer) if tokenizer else ("samples", samples)
    check(os.path.exists(given), f"{name}={given}: there is no such file or folder")
    unread = ("reference", "paired") if tokenizer else ("data_dir", "val_images", "probe_images", "statistics", "pca")
    for other in unread:
        check(not constants[other], f"{other}={constants[other]} has no effect beside --{name}: leave it out")
    check(out or not tokenizer.endswith(".py"), f"out is empty: say where the results of {tokenizer} go")
    path = out or os.path.join(os.path.dirname(given.rstrip("/")), "eval.json")
    for constant, file in ("out", path), ("statistics", statistics):  # now, not after hours
        writable = os.access(os.path.dirname(file) or ".", os.W_OK) and not os.path.isdir(file)
        check(not file or writable, f"{constant}={file} can't be written")
    dist = runtime.Distributed(device, dtype, saves=False)
    torch.set_float32_matmul_precision("highest")  # no TF32 in metrics
    torch.backends.cudnn.allow_tf32 = False
    if tokenizer:
        about, results = evaluate_tokenizer(dist)
    else:
        about, results = evaluate_pairs(dist) if paired else evaluate_samples(dist)
    if dist.first:
        print(about)
        for metric, value in results.items():
            print(f"  {metric:<{max(map(len, results))}}" + ("         –" if value is None else f"{value:10.4f}"))
        with runtime.whole_file(path) as file:
            file.write(json.dumps({"measured": about, **results, "constants": constants}, indent=1).encode())
        print(f"wrote {path}")
    dist.close()


if __name__ == "__main__":
    main()
