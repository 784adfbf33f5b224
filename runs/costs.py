"""What every configuration of the paper's tables costs: parameters, operations, hours on 8 H100. Computed, not typed.

    python runs/costs.py

Operations are counted on the networks themselves, on images of 256 px: two per multiply-add of matrix products,
convolutions and attention; norms, activations and the optimizer are left out. Training counts three forwards for what
is trained (one forward, two backward), two for what is frozen but passed on the way back, and one for what is only run.
Nothing is computed with real numbers: all tensors are on PyTorch's meta device, so this takes a minute and no memory.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

import runtime
import train_tokenizer as stage1
from model import DINO, DiscriminatorHead, IBOTHead, LightningDiT, TCAE

images = 1281167  # ImageNet's training split
gpus = 8
peak = 989.0  # TFLOP/s of bfloat16 products, one H100
utilisation = 0.4  # share of the peak that a run reaches

ROWS = [  # name, constants of train_tokenizer.py that differ from the defaults
    ("p = 64", dict(patch_size=64, stc_depth=0, global_crop_size=256, local_crop_size=128)),
    ("p = 32", dict(patch_size=32, stc_depth=0)),
    ("p = 16 (M = 0)", dict(patch_size=16, stc_depth=0)),
    ("p = 8, no STC (M = 12)", dict(stc_depth=0)),
    ("p = 8, M = 3", dict(stc_depth=3)),
    ("p = 8, M = 6, the default", dict()),
    ("p = 8, M = 9", dict(stc_depth=9)),
    ("p = 8, M = 6, shuffle", dict(compression="shuffle")),
    ("p = 8, M = 6, c = 256", dict(latent_channels=256)),
    ("p = 8, M = 6, c = 32, S–B (Table 11)", dict(latent_channels=32, decoder="B")),
    ("p = 8, M = 6, S–B", dict(decoder="B")),
    ("p = 8, M = 6, S–L", dict(decoder="L")),
    ("p = 8, M = 6, B–B", dict(encoder="B", decoder="B")),
]
ROWS += [(f"{name}, S–{size}", {**changes, "decoder": size}) for name, changes in ROWS[:3] for size in "BL"]  # Figure 8


def count(function):
    """Operations of a call, and of its attention's products alone."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    each = counter.get_flop_counts()["Global"]
    return sum(each.values()), sum(n for name, n in each.items() if "bmm" in str(name) or "attention" in str(name))


def tokenizer_row(changes):
    """-> parameters of encoder and decoder; operations for one image: encode, decode, attention, a joint step, a step
    without self-supervision."""
    constants = {**vars(stage1), **changes}
    tcae = TCAE.from_constants(constants)
    image = torch.zeros(1, 3, 256, 256)
    z = tcae.encode(image)
    (encode, attention_1), (decode, attention_2) = count(lambda: tcae.encode(image)), count(lambda: tcae.decode(z))
    sizes = constants["global_crop_size"], constants["local_crop_size"]
    global_crop, local_crop = (count(lambda: tcae.encoder(torch.zeros(1, 3, size, size)))[0] for size in sizes)
    head = IBOTHead(tcae.encoder.width, stage1.head_hidden, prototypes=stage1.prototypes)
    masked = 0.15 * (sizes[0] // tcae.encoder.output_patch) ** 2  # half of the crops hide 30 % of their tokens
    one = count(lambda: head.mlp(torch.zeros(1, tcae.encoder.width)))[0] + 2 * head.prototypes.numel()  # for one token
    student = 2 * global_crop + stage1.local_crops * local_crop + (2 + stage1.local_crops + 2 * masked) * one
    teacher = 2 * global_crop + 2 * (1 + masked) * one
    without_ssl = 3 * (encode + decode) + lpips(image)
    encoder, decoder = (sum(p.numel() for part in parts for p in part.parameters())
                        for parts in ((tcae.encoder, tcae.bottleneck), (tcae.decoder,)))
    return encoder, decoder, encode, decode, attention_1 + attention_2, without_ssl + 3 * student + teacher, without_ssl


def lpips(image):
    """Of both images forwards, of the reconstruction backwards too; VGG is frozen."""
    vgg = vgg16().features
    return 3 * count(lambda: vgg(image))[0]


def finetuning_row(constants):
    """Decoder finetuning (Table 7, right) -> operations for one image until the discriminator starts, while it learns
    alone, and from when its loss counts; and their mean over the epochs."""
    tcae, image = TCAE.from_constants(constants), torch.zeros(1, 3, constants["image_size"], constants["image_size"])
    z = tcae.encode(image)
    plain = count(lambda: tcae.encode(image))[0] + 3 * count(lambda: tcae.decode(z))[0] + lpips(image)
    network = DINO(constants["discriminator_size"], input_size=constants["discriminator_input"])
    features = network(image)
    dino, attention = count(lambda: network(image))
    head = DiscriminatorHead(network.width)
    heads = sum(count(lambda: head(x))[0] for x in features)
    # The discriminator learns from the real image and the generated one, with DINO only run; the decoder's loss then
    # goes forwards and backwards through all of it (attention takes two products, and four back).
    alone = plain + 2 * (dino + 3 * heads)
    both = alone + 2 * dino + attention + 2 * heads
    epochs, start, counts = (constants[name] for name in ("epochs", "discriminator_start", "adversarial_start"))
    return plain, alone, both, (start * plain + (counts - start) * alone + (epochs - counts) * both) / epochs


def hours(operations_per_image, epochs):
    return operations_per_image * images * epochs / (gpus * peak * 1e12 * utilisation) / 3600


def main():
    runtime.configure(globals())
    for name in "images", "gpus", "peak", "utilisation":
        runtime.check(globals()[name] > 0, f"{name}={globals()[name]} must be above 0")
    torch.set_default_device("meta")
    print(f"GFLOPs for one image of 256 px, two per multiply-add; hours on {gpus} GPUs of {peak:.0f} TFLOP/s at "
          f"{utilisation:.0%} of it\n")
    print("| tokenizer | encoder M | decoder M | encode | decode | both | without attention | one per multiply-add | "
          f"joint step | hours for {stage1.epochs} epochs | step without SSL | hours |\n" + "|---" * 12 + "|")
    for name, changes in ROWS:
        encoder, decoder, encode, decode, attention, step, without_ssl = tokenizer_row(changes)
        both = encode + decode
        numbers = (encoder / 1e6, decoder / 1e6, encode / 1e9, decode / 1e9, both / 1e9, (both - attention) / 1e9,
                   both / 2e9, step / 1e9, hours(step, stage1.epochs), without_ssl / 1e9,
                   hours(without_ssl, stage1.epochs))
        print(f"| {name} | " + " | ".join(f"{n:.1f}" for n in numbers) + " |")
    constants = runtime.configure(vars(stage1).copy(), [str(ROOT / "config" / "finetune_decoder.py")])
    start, counts, epochs = (f"{constants[name]:g}" for name in ("discriminator_start", "adversarial_start", "epochs"))
    print(f"\n| decoder finetuning | until epoch {start} | until {counts} | until {epochs} | mean | "
          f"hours for {epochs} epochs |\n|---|---|---|---|---|---|")
    for name, decoder in ("S–S", "S"), ("S–B (Table 4)", "B"):
        operations = finetuning_row({**constants, "decoder": decoder})
        numbers = *(n / 1e9 for n in operations), hours(operations[-1], constants["epochs"])
        print(f"| {name} | " + " | ".join(f"{n:.1f}" for n in numbers) + " |")
    print("\n| generator | parameters M | one evaluation | 50 steps with guidance | hours for 80 epochs | for 800 |\n"
          "|---|---|---|---|---|---|")
    for size in "S", "B", "L", "XL":
        dit = LightningDiT(size, 128, 8, 1000)
        forward = count(lambda: dit(torch.zeros(1, 128, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long)))[0]
        numbers = (sum(p.numel() for p in dit.parameters()) / 1e6, forward / 1e9, 100 * forward / 1e9,
                   hours(3 * forward, 80), hours(3 * forward, 800))
        print(f"| {size} | " + " | ".join(f"{n:.1f}" for n in numbers) + " |")


if __name__ == "__main__":
    main()
