"""DC-AE f32c32 (Chen et al. 2024, arXiv 2410.10733): Table 11's other row. After `pip install diffusers`:

    torchrun --nproc_per_node=8 train_dit.py --tokenizer=runs/tokenizers/dc_ae.py --out_dir=out/dc_ae

The weights (1.3 GB) are downloaded once. The paper took those trained at 256 px, dc-ae-f32c32-in-1.0-256px.
"""
from diffusers import AutoencoderDC
from torch import nn

# What from_pretrained reads in the weights' config.json; AutoencoderDC(**ARCHITECTURE) is the same network, untrained.
ARCHITECTURE = {
    **{f"{part}_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3 for part in ("encoder", "decoder")},
    **{f"{part}_qkv_multiscales": ((),) * 6 for part in ("encoder", "decoder")},
    "encoder_layers_per_block": (0, 4, 8, 2, 2, 2), "decoder_layers_per_block": (0, 5, 10, 2, 2, 2),
    "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * 3, "decoder_act_fns": ("relu",) * 3 + ("silu",) * 3,
}


class DCAE(nn.Module):
    image_size, downsample = 256, 32

    def __init__(self, network):
        super().__init__()
        self.network, self.latent_channels = network, network.config.latent_channels

    def encode(self, images):
        return self.network.encode(images).latent

    def decode(self, z):
        return self.network.decode(z).sample


def tokenizer():
    name = "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers"
    return DCAE(AutoencoderDC.from_pretrained(name, use_safetensors=True))
