"""Plain PCA as a tokenizer: of every patch its first principal components, as many values an image as ours has.

    python train_dit.py config/shapes_dit.py --tokenizer=runs/tokenizers/pca.py --out_dir=out/pca
    python sample.py --checkpoint=out/pca/checkpoint.pt --cfg_scale=2.5
    python eval.py --tokenizer=runs/tokenizers/pca.py --out=out/pca/eval.json

Fitted the first time, on training images; the mean and the components stay in out/pca_DATA_SIZES.pt: remove it after
other changes here.
"""
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import conv2d, pixel_shuffle, pixel_unshuffle

import data
import runtime

images = 4000  # to fit on


class PCA(nn.Module):
    data_dir, shapes_images, image_size = "shapes", 20800, 32  # as in config/shapes_tokenizer.py
    downsample, latent_channels = 8, 8  # 32 and 128: of whole images

    def __init__(self, mean, basis):
        super().__init__()
        self.register_buffer("mean", mean)  # (3 f², 1, 1) of patches of f × f pixels
        self.register_buffer("basis", basis)  # (c, 3 f²), orthonormal

    def encode(self, images):
        return conv2d(pixel_unshuffle(images, self.downsample) - self.mean, self.basis[:, :, None, None])

    def decode(self, z):
        return pixel_shuffle(conv2d(z, self.basis.T[:, :, None, None]) + self.mean, self.downsample)


def fit():
    source = data.open_split(PCA.data_dir, "train", PCA.image_size, PCA.shapes_images)
    crops = np.stack([data.center_crop(source.load(i), PCA.image_size) for i in data.spread(source, images)])
    patches = pixel_unshuffle(data.to_float(torch.from_numpy(crops), "cpu"), PCA.downsample)  # (N, 3 f², h, w)
    rows = patches.movedim(1, -1).flatten(0, -2)  # (N h w, 3 f²)
    _, vectors = torch.linalg.eigh(rows.T.cov())  # in order of rising variance
    return {"mean": rows.mean(0)[:, None, None], "basis": vectors.T[-PCA.latent_channels:].clone()}


def tokenizer():
    sizes = f"{PCA.image_size}px_f{PCA.downsample}_c{PCA.latent_channels}"
    file = Path("out", f"pca_{Path(PCA.data_dir).name}_{sizes}.pt")
    if not file.exists():
        os.makedirs("out", exist_ok=True)
        runtime.save_checkpoint(file, fit())
    return PCA(**torch.load(file, weights_only=True))
