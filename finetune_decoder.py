"""Stage 1b: the decoder, finetuned against a discriminator on DINO's features (Table 7, right; the recipe is RAE's).

    torchrun --nproc_per_node=8 finetune_decoder.py                           # after the paper's run of stage 1
    python finetune_decoder.py config/cifar10_finetune.py                     # an experiment for two CPU cores

The loss is L_rec = L1 + λ_p LPIPS + λ_q w L_adv (Eq. 6) alone: Table 7 has α = 0 here, which in Eq. 5 would drop L_rec,
and we take it to drop L_iBOT. Encoder and bottleneck are frozen, so the latents do not change and a generator trained
on them still fits. There are three phases: reconstruction alone; from discriminator_start on the discriminator trains
beside it; from adversarial_start on its loss reaches the decoder. Writes out_dir/checkpoint.pt (a tokenizer like stage
1's, with the averaged decoder), log.jsonl and reconstructions.png.
"""
import copy
import functools
import math
import os

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import data
import optim
import pretrained
import runtime
from model import TCAE, compile_blocks
from runtime import check

# Data
init_from = "out/tokenizer/checkpoint.pt"  # the tokenizer to finetune; its checkpoint gives the sizes
data_dir = ""  # as in stage 1; "" = the checkpoint's own
workers = 8  # loading processes per training process; 0 = load in the training process

# Objective
lpips_weight = 1.0  # λ_p; 0 = no perceptual loss, and no download of VGG
lpips_net = "vgg"  # VGG-16, or a .pt2 file of feature maps, as in train_tokenizer.py
adversarial_weight = 0.75  # λ_q; 0 = no discriminator
discriminator_start = 6.0  # epoch from which the discriminator is trained
adversarial_start = 8.0  # epoch from which its loss counts for the decoder
discriminator_weights = "dino"  # the frozen ViT-S/8 under its heads; or "random", for tests and experiments
discriminator_size = "S"  # that ViT's size; other sizes have random weights only
discriminator_input = 224  # DINO's input resolution, pixels
discriminator_augment = True  # DiffAugment: randomly shift and recolour all images that it sees

# Optimisation (Table 7, right)
epochs = 16  # passes over the data set
batch_size = 256  # images per step, over all processes
learning_rate = 2e-4  # at the end of the warm-up
min_learning_rate = 2e-5  # at the end
warmup_epochs = 1.0  # epochs in which the rate rises from 0
betas = (0.9, 0.95)  # AdamW, for the decoder and for the discriminator's heads
weight_decay = 0.0  # on all weights
grad_clip = 0.0  # largest norm of the decoder's gradient; 0 = no clipping (RAE)
decoder_ema = 0.9978  # momentum of the averaged decoder, which is the one to keep (RAE); 0 = the last weights

# The run
out_dir = "out/finetuned"
resume = False  # True: continue from out_dir/checkpoint.pt if there is one
seed = 0  # random seed
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # matrix products in bfloat16 or float32; auto = bfloat16 where it is faster
compile = "auto"  # torch.compile the blocks: True, False; auto = on CUDA, since a CPU gains little
log_every = 50  # steps
save_every = 1000  # steps between checkpoints
eval_every = 1000  # steps between validations, each with a picture
val_images = 1000  # images in a validation; 0 = all

MAY_CHANGE = {  # with --resume=True; all other constants must be those that the run was begun with
    "init_from", "out_dir", "resume", "device", "workers", "compile", "log_every", "save_every", "eval_every",
    "val_images", "data_dir"}

# ----------------------------------------------------------------------------------------------------------------------
# The discriminator: trainable heads on a frozen DINO (which is in pretrained.py)


class ImageNorm(nn.InstanceNorm1d):
    """Instance norm in float32: normalises each channel of (B, D, N) over the tokens of one image. (RAE calls it batch
    norm, but its groups are single images.)"""

    def __init__(self, width):
        super().__init__(width, eps=1e-6, affine=True)

    def forward(self, x):
        return super().forward(x.float())


class DiscriminatorHead(nn.Module):
    """Features (B, D, N) -> logits (B, N): three 1-D convolutions along the tokens with spectral norm and kernels 1, 9
    and 1. The second is a residual branch, whose sum with its input is divided by √2."""

    def __init__(self, width):
        super().__init__()

        def conv(outputs, kernel):
            return spectral_norm(nn.Conv1d(width, outputs, kernel, padding=kernel // 2, padding_mode="circular"))

        def block(kernel):
            return nn.Sequential(conv(width, kernel), ImageNorm(width), nn.LeakyReLU(0.2))

        self.block1, self.block9, self.out = block(1), block(9), conv(1, 1)

    def forward(self, features):
        x = self.block1(features)
        x = (x + self.block9(x)) / 2**0.5
        return self.out(x)[:, 0]


class Discriminator(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> logits (B, 5 N), high where they look real. Only the five heads train."""

    def __init__(self, dino):
        super().__init__()
        self.dino = dino
        self.heads = nn.ModuleList(DiscriminatorHead(dino.width) for _ in range(5))

    def forward(self, images):
        return torch.cat([head(x) for head, x in zip(self.heads, self.dino(images), strict=True)], dim=1).float()


def augment_differentiably(images):
    """DiffAugment: shifts each image of (B, 3, H, W) by up to an eighth of its side, then changes its brightness,
    saturation and contrast. Real images and reconstructions both pass through it, so that the discriminator can't
    memorise the real ones. The shift comes first, as in RAE: what it uncovers is grey when the colours change."""
    B, _, height, width = images.shape
    down, right = (torch.rand(2, B, 1, 1, device=images.device) * 2 - 1) / 8  # as fractions of the sides
    rows = torch.arange(height, device=images.device)[:, None] - (down * height).round().long()  # (B, H, 1)
    columns = torch.arange(width, device=images.device) - (right * width).round().long()  # (B, 1, W)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)  # (B, H, W)
    source = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    x = images.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, 3, -1)).view_as(images) * inside[:, None]
    brightness, saturation, contrast = torch.rand(3, B, 1, 1, 1, device=images.device)
    x = x + brightness - 0.5
    mean = x.mean(1, keepdim=True)
    x = mean + (x - mean) * 2 * saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def check_constants(dist):
    """Checks across constants. Each message names the constant and says what to do."""
    runtime.check_training(globals(), dist, positive=("eval_every",))
    check(discriminator_start <= adversarial_start,
          f"discriminator_start={discriminator_start} must not be later than adversarial_start={adversarial_start}")
    check(not adversarial_weight or adversarial_start < epochs,
          f"adversarial_start={adversarial_start} must be earlier than epochs={epochs}, or its loss is never used")
    check(discriminator_weights in ("dino", "random"),
          f"discriminator_weights={discriminator_weights!r}: it is 'dino' or 'random'")
    check(discriminator_weights == "random" or (discriminator_size, discriminator_input) == ("S", 224),
          f"discriminator_size={discriminator_size!r}, discriminator_input={discriminator_input}: DINO's weights are "
          "for S and 224; --discriminator_weights=random for others")
    check(discriminator_input % 8 == 0 and discriminator_input >= 16,
          f"discriminator_input={discriminator_input} must be a multiple of 8, at least 16")


def main():
    constants, dist, path, resumed = runtime.start(globals(), "tokenizer", MAY_CHANGE)  # resumed: a checkpoint or None
    check_constants(dist)
    compiling = dist.should_compile(compile)  # before the slow parts: compile=True may fail here

    # The images of joint training, unless data_dir names others.
    given = resumed or runtime.load_checkpoint(init_from, "init_from", kind="tokenizer")
    joint = given["constants"]
    where, image_size = data_dir or joint["data_dir"], joint["image_size"]
    train, val = data.open_splits(where, image_size, joint["shapes_images"], batch_size, resumed)
    steps_per_epoch = len(train) // batch_size
    steps, warmup_steps = epochs * steps_per_epoch, round(warmup_epochs * steps_per_epoch)
    dist.print(f"{len(train)} training and {len(val)} validation images; {steps} steps of {batch_size}")

    # The tokenizer, whose decoder alone trains, and a copy that holds the decoder's average: that one is validated and
    # kept. LPIPS and the discriminator judge the reconstructions.
    tcae = TCAE.from_checkpoint(given).to(dist.device)
    averaged = copy.deepcopy(tcae)
    decoder = tcae.decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay,
                                  fused=dist.device.type in ("cuda", "cpu"))
    perceptual = pretrained.training_lpips(lpips_net, dist) if lpips_weight else None
    discriminator = None
    if adversarial_weight:
        torch.manual_seed(seed)  # the same random weights again after a restart
        dino = pretrained.DINO(discriminator_size, input_size=discriminator_input)
        if discriminator_weights == "dino":
            dino.load_published(dist)
        else:
            dist.print("the discriminator's backbone is random, not DINO: an experiment")
        discriminator = Discriminator(dino).to(dist.device)
        discriminator_optimizer = torch.optim.AdamW(discriminator.heads.parameters(), lr=learning_rate, betas=betas,
                                                    weight_decay=weight_decay)
        augment = augment_differentiably if discriminator_augment else nn.Identity()

    start = 0
    if resumed:
        start = resumed["step"]
        decoder.load_state_dict(resumed["decoder"])
        optimizer.load_state_dict(resumed["optimizer"])
        if discriminator:
            discriminator.heads.load_state_dict(resumed["discriminator"])
            discriminator_optimizer.load_state_dict(resumed["discriminator_optimizer"])

    if compiling:
        compile_blocks(tcae)
        if discriminator:
            compile_blocks(discriminator)
    wrapped_decoder = dist.distribute(decoder)
    wrapped_discriminator = dist.distribute(discriminator) if discriminator else None
    runtime.make_folder(out_dir, dist)
    picture = os.path.join(out_dir, "reconstructions.png")
    crop = functools.partial(data.random_crop, size=image_size)
    loader = data.TrainLoader(train, crop, batch_size, start, steps, seed, dist, short_side=image_size, workers=workers,
                              resumed=resumed)
    progress = runtime.Progress(out_dir, start, steps, batch_size, dist)

    def save(step, finished=False):
        state = {**runtime.header("tokenizer", {**joint, **constants, "data_dir": where}, dist), "step": step,
                 "finished": finished, "images": len(train), "bad_files": loader.reported,
                 "tokenizer": averaged.state_dict(), "decoder": decoder.state_dict(),
                 "optimizer": optimizer.state_dict()}
        if discriminator:
            state |= {"discriminator": discriminator.heads.state_dict(),
                      "discriminator_optimizer": discriminator_optimizer.state_dict()}
        if dist.first:
            runtime.save_checkpoint(path, state)

    for step in range(start, steps):  # empty if the run was stopped after its last step
        if step and step % eval_every == 0:  # before the step, so that a run stopped here does it again
            try:
                progress.validated(data.validate(averaged, val, image_size, val_images, dist, picture))
            except runtime.Stopped:
                save(step)
                return progress.stopped()

        torch.manual_seed(hash((seed, step, dist.rank)) % 2**63)  # for the augmentation, the same after a restart
        lr = optim.cosine(step, steps, learning_rate, min_learning_rate, warmup_steps)
        optimizer.param_groups[0]["lr"] = lr
        discriminator_learns = discriminator and step >= discriminator_start * steps_per_epoch
        adversary_counts = discriminator and step >= adversarial_start * steps_per_epoch

        images = data.to_float(next(loader), dist.device)  # (B, 3, H, W)

        # The encoder is frozen. The decoder is called by itself, so the normalisation of z is undone here.
        with dist.autocast():
            with torch.no_grad():
                latents = tcae.encode(images) * tcae.latent_std + tcae.latent_mean
            reconstruction = wrapped_decoder(latents)

        # Eq. 6 without its last term: L1 + λ_p LPIPS, with L1 on pixels in [0, 1] as in RAE. It and the last term meet
        # at the reconstruction: their gradients are added there, and one backward pass through the decoder follows.
        terms = {"l1": F.l1_loss(reconstruction, images)}
        rec = terms["l1"] / 2
        if perceptual:
            terms["lpips"] = perceptual(reconstruction, images).mean()
            rec = rec + lpips_weight * terms["lpips"]
        loss = rec.detach()  # for the log; what is backpropagated is `gradient`
        gradient, = torch.autograd.grad(rec, reconstruction)  # (B, 3, H, W)

        # Eq. 6's last term: λ_q w L_adv, L_adv = -mean D(reconstruction). The adaptive weight w = ‖∇L_rec‖ / ‖∇L_adv‖,
        # both gradients with respect to the weights of the decoder's last layer, makes the two equally strong (VQGAN).
        if adversary_counts:
            discriminator.eval()  # the spectral norms are updated only where the discriminator trains
            with dist.autocast():
                adversarial = -discriminator(augment(reconstruction)).mean()
            adv_grad, = torch.autograd.grad(adversarial, reconstruction)
            last_layer = [torch.autograd.grad(reconstruction, decoder.head.weight, grad, retain_graph=True)[0]
                          for grad in (gradient, adv_grad)]
            rec_norm, adv_norm = (dist.sum(grad).norm() for grad in last_layer)
            weight = (rec_norm / (adv_norm + 1e-6)).clamp(max=1e4)
            gradient = gradient + adversarial_weight * weight * adv_grad
            loss = loss + adversarial_weight * weight * adversarial.detach()
            terms |= {"adversarial": adversarial, "adaptive_weight": weight}

        reconstruction.backward(gradient)

        grad_norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        optim.update_ema(averaged.decoder, decoder, decoder_ema)

        # The discriminator's hinge loss, on new reconstructions by the updated decoder, rounded to 8 bits like the real
        # images. Its rate follows the decoder's schedule from its own start on, so it ends at 8.2e-5 (RAE).
        if discriminator_learns:
            discriminator.train()
            with dist.autocast():
                with torch.no_grad():
                    fake = data.to_float(data.to_uint8(decoder(latents)), dist.device)
                logits = wrapped_discriminator(augment(torch.cat([images, fake])))  # (2 B, 5 N)
            real_logits, fake_logits = logits.chunk(2)
            hinge = (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2
            hinge.backward()
            accuracy = ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean()) / 2
            terms |= {"discriminator": hinge, "discriminator_accuracy": accuracy}
            discriminator_step = step - math.ceil(discriminator_start * steps_per_epoch)
            discriminator_optimizer.param_groups[0]["lr"] = optim.cosine(discriminator_step, steps, learning_rate,
                                                                         min_learning_rate, warmup_steps)
            discriminator_optimizer.step()
            discriminator_optimizer.zero_grad()
        progress.add({"loss": loss, **terms, "grad_norm": grad_norm})

        # Log and save. Nothing in the loop waits for the GPU but this and the validation.
        done, stopping = step + 1, dist.stop_requested()
        saving = done % save_every == 0 or stopping or done == steps
        if done % log_every == 0 or done % eval_every == 0 or saving:
            progress.report(lr, loader.waited())
            loader.report_bad_files()
        if saving:
            save(done)
        if stopping:
            return progress.stopped()
    progress.bar.close()

    try:
        psnr = data.validate(averaged, val, image_size, val_images, dist, picture)
    except runtime.Stopped:
        return progress.stopped()
    progress.write(val_psnr=psnr)
    save(steps, finished=True)
    dist.print(f"wrote {path} and {picture}: step {steps}, validation PSNR {psnr:.2f} dB")
    dist.close()


if __name__ == "__main__":
    main()
