"""DC-AE 1.5 f32c128 (Chen et al. 2025, arXiv 2508.00413), Table 4: latents of our shape. After `pip install
diffusers`:

    torchrun --nproc_per_node=8 train_dit.py --tokenizer=runs/tokenizers/dc_ae_1_5.py --out_dir=out/dc_ae_1_5

The weights are downloaded once, by the name that they have in the authors' code (not tried yet). The paper orders the
channels from structure to detail and adds a loss on the first of them to the generator's; train_dit.py treats all
channels alike.
"""
from diffusers import AutoencoderDC

from runs.tokenizers.dc_ae import DCAE


def tokenizer():
    return DCAE(AutoencoderDC.from_pretrained("dc-ai/dc-ae-1.5-f32c128-diffusers", use_safetensors=True))
