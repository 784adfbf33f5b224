"""Networks with others' weights: downloads with a checksum, LPIPS, the DINO under the discriminator, FID's Inception.

    download_weights             a file in torch.hub's cache
    load_lpips, training_lpips   the perceptual distance
    FeatureNet, FeatureDistance  in the place of FID's Inception and of LPIPS, from files of torch.export
    DINO                         whose features the discriminator looks at
    Inception                    what FID and IS are defined with
"""
import hashlib
import logging
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import Block, init_weights, parse_size, to_tokens
from runtime import check, fail, first_line

DINO_WEIGHTS = ("https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
                "")  # no checksum is published; that every name and shape fits is checked
INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth", "6726825d")


class MissingWeights(Exception):
    """Weights are neither on disk nor can be downloaded; the message says which, from where and to where."""


def download_weights(url, sha256, dist):
    """The path of a file of weights in torch.hub's cache, downloaded by one process of each machine if it isn't there.
    sha256: its checksum or the beginning of it. Raises MissingWeights in every process if any lacks the file."""
    path, error = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1], ""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=True)
            with open(path, "rb") as file:
                digest = hashlib.sha256()
                while block := file.read(1 << 20):
                    digest.update(block)
            if not digest.hexdigest().startswith(sha256):
                error = f"{path} is damaged (its checksum is {digest.hexdigest()[:16]}…); remove it and try again"
        except Exception as problem:
            error = f"{path.name} could not be downloaded from {url} ({problem}); put it at {path}"
    errors = [error for error in dist.gather([error]) if error]
    if errors:
        raise MissingWeights(errors[0])
    return path


def load_lpips(net, dist):
    """LPIPS over VGG-16 ("vgg") or AlexNet ("alex"), frozen: (B, 3, H, W) twice, in [-1, 1] -> (B, 1, 1, 1)."""
    file, sha256 = {"vgg": ("vgg16-397923af.pth", "397923af"), "alex": ("alexnet-owt-7be5be79.pth", "7be5be79")}[net]
    download_weights(f"https://download.pytorch.org/models/{file}", sha256, dist)
    import lpips  # it loads the file that is now there
    return lpips.LPIPS(net=net, verbose=False).to(dist.device).requires_grad_(False)


def training_lpips(net, dist):
    """LPIPS for training: its convolutions run in the processes' precision, its distances in float32. `net`: "vgg",
    "alex", or a .pt2 file, for FeatureDistance."""
    if net.endswith(".pt2"):
        return FeatureDistance(net, dist)
    check(net in ("vgg", "alex"), f"lpips_net={net!r}: it is 'vgg', 'alex' or a .pt2 file")
    try:
        perceptual = load_lpips(net, dist)
    except MissingWeights as error:
        fail(f"{error}, or do without the perceptual loss: --lpips_weight=0")
    convolutions = perceptual.net.to(memory_format=torch.channels_last).forward

    def forward(images):
        with dist.autocast():
            return [features.float() for features in convolutions(images)]

    perceptual.net.forward = forward
    return perceptual


def load_exported(path, constant):
    """A file of torch.export.save. Pickles and compiled code, which it may hold, are not loaded."""
    check(os.path.isfile(path), f"{constant}={path}: there is no such file (runs/features.py makes one)")
    harmful = any(kind in Path(path).read_bytes() for kind in (b"data/aotinductor/", b"opaque_obj_"))
    check(not harmful, f"{constant}={path} holds compiled code or Python objects, which may be harmful")
    return torch.export.load(path)  # torch.load in there is safe, by runtime.py


class FeatureNet:
    """A network from a file of torch.export, in Inception's place, for images of `side` pixels."""

    def __init__(self, path, side, device, largest_batch):
        logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # it would log a traceback
        try:
            exported = load_exported(path, "feature_net")
            if device.type != "cpu":
                from torch.export.passes import move_to_device_pass
                exported = move_to_device_pass(exported, str(device))
            self.net = exported.module()
            for batch in 1, largest_batch:
                features, logits = self.net(torch.zeros(batch, side, side, 3, dtype=torch.uint8, device=device))
                (_, self.features), (_, self.classes) = features.shape, logits.shape
        except Exception as error:
            fail(f"feature_net={path} must be a file of torch.export.save that takes uint8 (B, {side}, {side}, 3) for "
                 f"any B and returns features (B, D) and logits (B, K): {first_line(error)}")

    def __call__(self, pixels):
        return self.net(pixels)


class FeatureDistance:
    """LPIPS's form over any network: (B, 3, H, W) twice, in [-1, 1] -> (B,). At every place of every feature map the
    squared distance between the two unit vectors of channels; means over places, then over maps. LPIPS weights the
    channels by what people judged alike, which nobody has measured for these maps.

    path: a file of torch.export.save, images -> a tuple of feature maps, as runs/features.py writes it.
    """

    def __init__(self, path, dist):
        self.maps = load_exported(path, "lpips_net").module().to(dist.device, memory_format=torch.channels_last)
        self.dist = dist

    def __call__(self, a, b):
        with self.dist.autocast():
            pairs = list(zip(self.maps(a), self.maps(b)))
        return sum((F.normalize(x.float()) - F.normalize(y.float())).square().sum(1).mean((1, 2))
                   for x, y in pairs) / len(pairs)


class DINO(nn.Module):
    """A frozen ViT with the parameter names of Meta's checkpoint: images (B, 3, H, W) in [-1, 1] -> the features
    (B, D, N) of its patch tokens five times: after the last block, then after a quarter, half, three quarters and all
    of the depth. (RAE zeroes the bias of the keys; softmax does not see it.)
    """

    def __init__(self, size="S", input_size=224):
        super().__init__()
        width, depth, heads = parse_size("discriminator_size", size)
        self.input_size, self.width = input_size, width
        self.taps = [max(0, round(depth * k / 4) - 1) for k in (1, 2, 3, 4)]  # of 12 blocks: 2, 5, 8 and 11
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 8, stride=8)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (input_size // 8) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)  # not used here, but in the checkpoint
        self.apply(init_weights)
        self.requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def load_published(self, dist):
        """Loads the weights of DINO's ViT-S/8, which are downloaded if need be."""
        try:
            path = download_weights(*DINO_WEIGHTS, dist)
        except MissingWeights as error:
            fail(f"{error}, or do without: --adversarial_weight=0 (no discriminator), or "
                 "--discriminator_weights=random (an untrained one, for experiments)")
        try:
            self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            fail(f"discriminator_weights=dino: {path} is another file or damaged; remove it and start again "
                 f"({first_line(error)})", everywhere=False)

    def forward(self, images):
        images = F.interpolate(images, (self.input_size, self.input_size), mode="bilinear")
        x = (images / 2 + 0.5 - self.mean) / self.std
        x = to_tokens(self.patch_embed["proj"](x))  # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x[:, 1:].transpose(1, 2))  # (B, D, N)
        return [features[k] for k in (self.taps[-1], *self.taps)]


def resize_like_tensorflow(x, size):
    """Bilinear to size × size, (B, C, H, W), as in TensorFlow 1: output pixel i samples at i · H / size, not at its
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
    (B, 1008). It is torchvision's except for pooling: averages leave out the padding, and the last block takes a
    maximum. IS uses the logits without their bias."""

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
