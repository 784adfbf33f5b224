"""SD-VAE (Rombach et al. 2022, arXiv 2112.10752), as in Table 4's DiT: 256 latent tokens, four times ours. After
`pip install diffusers`:

    torchrun --nproc_per_node=8 train_dit.py --tokenizer=runs/tokenizers/sd_vae.py --out_dir=out/sd_vae

The weights (335 MB) are downloaded once.
"""
from diffusers import AutoencoderKL
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


class SDVAE(nn.Module):
    """2 × 2 of its 32 × 32 × 4 latents are one of ours, as in a DiT of patch size 2."""

    image_size, downsample, latent_channels = 256, 16, 16

    def __init__(self, network):
        super().__init__()
        self.network = network

    def encode(self, images):
        return pixel_unshuffle(self.network.encode(images).latent_dist.mean, 2)

    def decode(self, z):
        return self.network.decode(pixel_shuffle(z, 2)).sample


def tokenizer():
    return SDVAE(AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-ema", use_safetensors=True))
