"""Trains a small classifier of small images, to measure samples by or to train a tokenizer against.

    python runs/features.py --data_dir=cifar10                          # a residual network, for eval.py --feature_net
    python runs/features.py config/cifar10_vgg.py --data_dir=cifar10    # a VGG, for --lpips_net
    python runs/features.py config/shapes_vgg.py                        # one for the shapes, half a minute
    python runs/features.py config/shapes_judge.py                      # a residual network for the demo's samples

The residual network takes uint8 images and returns features and logits, as `feature_net` does; Fréchet distances in its
features are called FD (CIFAR-10 classifier), never FID. The VGG takes images in [-1, 1] and returns its feature maps,
as `lpips_net` does: LPIPS in miniature, where a VGG that has learned ImageNet's classes compares images. The two share
neither architecture nor seed, so what is trained against one is judged by the other.
"""
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import optim
import runtime
from model import TCAE
from runtime import check

tokenizer = ""  # stage 1's checkpoint: learn from its reconstructions of the images, so that blur is forgiven
data_dir = "cifar10"  # holds train/CLASS/ and test/CLASS/; or "shapes"
shapes_images = 16000  # how many shapes to learn from if data_dir = "shapes"
image_size = 32  # pixels; later the network takes any multiple of 8 from 24 on, the VGG any of 4 from 8 on
network = "resnet"  # or "vgg"
width = 64  # channels of its first trained convolutions
out = ""  # the file to write; "" = out/<data_dir's name>_<network>.pt2
epochs = 16
batch_size = 500
optimizer = "muon"  # for kernels, and AdamW for the rest, at a third of the rate; or "sgd", with Nesterov momentum
learning_rate = 0.012  # at its peak, after a fifth of the run
weight_decay = 0.02  # with Muon, of kernels alone
label_smoothing = 0.2
augmented = True  # False: images are neither moved nor mirrored
shift = 2  # pixels that images are moved by at most
seed = 1000  # the VGG takes the next one
device = "auto"
dtype = "auto"


def convolution(before, after, pool=nn.Identity()):
    """3 × 3 convolution, pooling if any, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), pool, nn.BatchNorm2d(after), nn.ReLU())


class ResNet(nn.Module):
    """A residual network of seven convolutions: (B, 3, H, W) in [-1, 1] -> features (B, 4 w), logits (B, K).

    As in Jordan's airbench (arXiv 2404.00498) the first one is fixed: it whitens 2 × 2 patches, which saves epochs."""

    def __init__(self, classes, w):
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2).requires_grad_(False)
        self.stages = nn.ModuleList([nn.ModuleList([convolution(a, b, nn.MaxPool2d(2)), convolution(b, b)])
                                     for a, b in ((24, w), (w, 4 * w), (4 * w, 4 * w))])
        self.head = nn.Linear(4 * w, classes)

    def fit_whitening(self, images):
        """Sets the first layer so that patches of these images, (N, 3, H, W), leave it nearly uncorrelated."""
        patches = F.unfold(images, 2).transpose(1, 2).flatten(0, 1)  # (N (H - 1) (W - 1), 12)
        variances, directions = torch.linalg.eigh(patches.T.cov())
        filters = (directions / (variances + 5e-4).sqrt()).T.view(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))  # both signs, for ReLU
        self.whiten.bias.zero_()

    def forward(self, images):
        x = F.relu(self.whiten(images))  # (B, 24, H - 1, W - 1)
        for down, residual in self.stages:
            x = down(x)  # about half as high and wide: in the end (B, 4 w, H / 8 - 1, W / 8 - 1)
            x = x + residual(x)
        features = x.amax((2, 3))  # (B, 4 w)
        return features, self.head(features)


class VGG(nn.Module):
    """Six convolutions in three stages: (B, 3, H, W) in [-1, 1] -> the stages' maps, at H, H / 2 and H / 4 px."""

    def __init__(self, classes, w):
        super().__init__()
        widths = (3, w, 2 * w, 4 * w)
        self.stages = nn.ModuleList([nn.Sequential(convolution(a, b), convolution(b, b))
                                     for a, b in zip(widths, widths[1:])])
        self.head = nn.Linear(widths[-1], classes)

    def maps(self, x):
        maps = []
        for stage in self.stages:
            x = stage(F.max_pool2d(x, 2) if maps else x)
            maps.append(x)
        return maps

    def forward(self, images):
        features = self.maps(images)[-1].mean((2, 3))
        return features, self.head(features)


class Judge(nn.Module):
    """A network as a `feature_net`: uint8 (B, H, W, 3) -> features, logits, each averaged with its mirror image's."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pixels):
        images = pixels.movedim(-1, 1).float() / 127.5 - 1
        return tuple((a + b) / 2 for a, b in zip(self.net(images), self.net(images.flip(3))))


class Maps(nn.Module):
    """The VGG as a `lpips_net`: (B, 3, H, W) in [-1, 1] -> feature maps."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return tuple(self.net.maps(images))


def read(source):
    """All images of a source, centre crops or their reconstructions: uint8 (N, 3, H, H), and their labels (N,)."""
    pixels = np.stack([data.center_crop(source.load(i), image_size) for i in range(len(source))])
    pixels = torch.from_numpy(pixels)  # (N, H, H, 3)
    if tokenizer:
        saved = runtime.load_checkpoint(tokenizer, "tokenizer", kind="tokenizer")
        check(saved["constants"]["image_size"] == image_size,
              f"image_size={image_size}, but tokenizer={tokenizer} is for {saved['constants']['image_size']} pixels")
        tcae = TCAE.from_checkpoint(saved)
        pixels = torch.cat([data.to_uint8(tcae(data.to_float(part, "cpu"))) for part in pixels.split(200)])
    return pixels.movedim(-1, 1).contiguous(), torch.tensor(source.labels)


def augment(pixels):
    """Moves by up to `shift` pixels and mirrors, each image its own way: (B, 3, H, W) -> the same."""
    b, places = len(pixels), 2 * shift + 1
    padded = F.pad(pixels.float(), (shift,) * 4, mode="reflect")
    windows = padded.unfold(2, image_size, 1).unfold(3, image_size, 1)  # (B, 3, places, places, H, W), a view
    rows, columns = torch.randint(places, (2, b))
    moved = windows[torch.arange(b), :, rows, columns]
    return torch.where((torch.rand(b) < 0.5)[:, None, None, None], moved.flip(3), moved)


@torch.no_grad()
def accuracy(net, pixels, labels, dist):
    right = 0
    for x, y in zip(pixels.split(500), labels.split(500)):
        with dist.autocast():
            right += (Judge(net)(x.movedim(1, -1).to(dist.device))[1].argmax(1).cpu() == y).sum().item()
    return right / len(labels)


def main():
    runtime.configure(globals())
    check(network in ("resnet", "vgg"), f"network={network!r}: it is resnet or vgg")
    check(optimizer in ("muon", "sgd"), f"optimizer={optimizer!r}: it is muon or sgd")
    smallest = 3 if network == "resnet" else 2  # sides, in units of 8 px or, VGG, of 4
    check(image_size % 8 == 0 and image_size >= 8 * smallest,
          f"image_size={image_size} must be a multiple of 8, at least {8 * smallest}")
    path = out or f"out/{Path(data_dir).name}_{network}.pt2"
    check(not os.path.exists(path), f"out={path} is there already: remove it, or give another name")
    dist = runtime.Distributed(device, dtype, seed, saves=False)
    runtime.make_folder(Path(path).parent, constant="out")
    train, val = data.open_splits(data_dir, image_size, shapes_images, batch_size)
    (pixels, labels), (held_out, held_out_labels) = read(train), read(val)
    torch.manual_seed(seed + (network == "vgg"))
    net = (ResNet if network == "resnet" else VGG)(len(train.classes), width)
    if network == "resnet":
        net.fit_whitening(pixels[torch.randperm(len(pixels))[:5000]].float() / 127.5 - 1)
    net = net.to(dist.device, memory_format=torch.channels_last)
    steps_per_epoch = len(pixels) // batch_size
    steps = epochs * steps_per_epoch
    trained = [p for p in net.parameters() if p.requires_grad]
    if optimizer == "muon":
        kernels, rest = [p for p in trained if p.ndim == 4], [p for p in trained if p.ndim != 4]
        optimizers = [optim.Muon(kernels, dist.dtype, learning_rate, weight_decay=weight_decay),
                      torch.optim.AdamW(rest, learning_rate / 3, betas=(0.9, 0.95), weight_decay=0)]
    else:
        optimizers = [torch.optim.SGD(trained, learning_rate, 0.9, nesterov=True, weight_decay=weight_decay)]
    schedules = [torch.optim.lr_scheduler.OneCycleLR(part, part.defaults["lr"], total_steps=steps, pct_start=0.2,
                                                     anneal_strategy="linear", cycle_momentum=False)
                 for part in optimizers]
    began, order = time.perf_counter(), None
    for step in range(steps):
        if step % steps_per_epoch == 0:
            order = torch.randperm(len(pixels))
        chosen = order[step % steps_per_epoch * batch_size:][:batch_size]
        x = augment(pixels[chosen]) if augmented else pixels[chosen].float()
        x = (x / 127.5 - 1).to(dist.device, memory_format=torch.channels_last)
        with dist.autocast():
            logits = net(x)[1]
        loss = F.cross_entropy(logits.float(), labels[chosen].to(dist.device), label_smoothing=label_smoothing)
        net.zero_grad()
        loss.backward()
        for part in optimizers + schedules:  # a schedule follows its optimizer
            part.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{steps}: loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    net.eval()
    print(f"{network} knows {accuracy(net, held_out, held_out_labels, dist):.2%} of {len(held_out)} held-out "
          f"{'reconstructions' if tokenizer else 'images'}")
    net = net.cpu().to(memory_format=torch.contiguous_format).requires_grad_(False)
    batch = torch.export.Dim("batch", min=1)
    h, w = torch.export.Dim("h", min=smallest), torch.export.Dim("w", min=smallest)
    if network == "resnet":
        exported, example = Judge(net), torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
        sizes = {0: batch, 1: 8 * h, 2: 8 * w}
    else:
        exported, example, sizes = Maps(net), torch.zeros(2, 3, image_size, image_size), {0: batch, 2: 4 * h, 3: 4 * w}
    with runtime.whole_file(path) as file:
        torch.export.save(torch.export.export(exported.eval(), (example,), dynamic_shapes=(sizes,)), file)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
