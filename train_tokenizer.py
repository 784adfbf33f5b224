"""Stage 1: the TC-AE tokenizer, trained jointly with self-supervision (Sec. 3.4 and 3.5).

    python runs/features.py config/shapes_vgg.py                              # a laptop: the perceptual loss, then
    python train_tokenizer.py config/shapes_tokenizer.py
    torchrun --nproc_per_node=8 train_tokenizer.py --patch_size=8             # the paper's run, ImageNet in imagenet/
    python train_tokenizer.py config/shapes_tokenizer.py --resume=True        # continues it after a stop

L = α L_rec + L_iBOT (Eq. 5), L_rec = L1 + λ_p LPIPS (Eq. 6; its adversarial term comes in finetune_decoder.py). The
defaults are Table 7's left column. Writes out_dir/checkpoint.pt, log.jsonl and reconstructions.png.
"""
import copy
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

import data
import optim
import pretrained
import runtime
import ssl  # ours: see its docstring
from latents import measure_latents
from model import IBOTHead, JointTokenizer, TCAE, compile_blocks, output_patch, ssl_output
from runtime import check

# Data
data_dir = "imagenet"  # folder with train/CLASS/ and val/CLASS/, Kaggle's ImageNet, or "shapes" for built-in images
image_size = 256  # side of the crop to reconstruct, pixels
shapes_images = 20000  # how many shapes to train on if data_dir = "shapes"
workers = 8  # loading processes per training process; 0 = load in the training process

# Tokenizer
patch_size = 8  # p, pixels (Table 3: 64, 32, 16, 8)
downsample = 32  # f: side of one latent position, pixels
latent_channels = 128  # c (Table 10: 256, Table 11: 32)
encoder = "S"  # S, B, L or width/depth/heads such as 128/4/4
decoder = "S"  # the same (Fig. 8)
stc_depth = 6  # M: blocks before the compression layer; 0 = none (Table 6's M = 12 and, with patch_size=16, its M = 0)
compression = "conv"  # or "shuffle" (Table 8)

# Objective
alpha = 0.1  # α, weight of L_rec (Table 9). L1 is of pixels in [-1, 1], our choice; in [0, 1] it would be half as large
lpips_weight = 1.0  # λ_p; 0 = no perceptual loss, and no download of VGG
lpips_net = "vgg"  # VGG-16; "alex", AlexNet; or a .pt2 file of feature maps, for other images (runs/features.py)

# Self-supervision
ssl_method = "ibot"  # or "dino", "dinov2" (Table 6), "none"
prototypes = 8192  # K, outputs of the head
head_hidden = 2048  # hidden units of the head's MLP
global_crop_size = 224  # pixels
global_crop_scale = (0.25, 1.0)  # share of the image's area
local_crops = 10  # how many per image
local_crop_size = 96  # pixels
local_crop_scale = (0.05, 0.25)  # share of the image's area
teacher_momentum = 0.996  # rises to 1 along a cosine
teacher_temp = (0.04, 0.07)  # τ_t at the start and after its warm-up; lower it if teacher_entropy stays near log K
teacher_temp_warmup_epochs = 30.0  # epochs in which τ_t rises, however long the run (iBOT)
freeze_prototypes_epochs = 1.0  # epochs in which the head's last layer is frozen

# Optimisation (Table 7, left)
epochs = 50  # passes over the data set
batch_size = 512  # images per step, over all processes
accumulate = 1  # micro-batches per step and process: the same gradient, except for dinov2's KoLeo and Sinkhorn
learning_rate = 1e-3  # at the end of the warm-up
min_learning_rate = 1e-6  # at the end
warmup_epochs = 5.0  # epochs in which the rate rises from 0
optimizer = "adamw"  # or "muon", for matrices in blocks and MLPs and for the compression (optim.py)
muon_rate = 3.0  # Muon's learning rate, times learning_rate
betas = (0.9, 0.95)  # AdamW
weight_decay = 0.04  # on matrices only, not on biases, norms or tokens
grad_clip = 3.0  # largest norm of the whole gradient (iBOT clips each tensor's own); 0 = no clipping

# The run
out_dir = "out/tokenizer"
resume = False  # True: continue from out_dir/checkpoint.pt if there is one
seed = 0  # random seed
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # matrix products in bfloat16 or float32; auto = bfloat16 where it is faster
compile = "auto"  # torch.compile the blocks: True, False; auto = on CUDA, since a CPU gains little
log_every = 50  # steps
save_every = 1000  # steps between checkpoints
eval_every = 1000  # steps between validations, each with a picture
val_images = 1000  # images in a validation; 0 = all
stats_images = 50000  # training images to measure the latents' mean and std on

MAY_CHANGE = {  # with --resume=True; all other constants must be those that the run was begun with
    "out_dir", "resume", "device", "workers", "compile", "accumulate", "log_every", "save_every", "eval_every",
    "val_images", "data_dir"}


def check_constants(dist):
    """Checks across constants. Each message names the constant and says what to do."""
    check(ssl_method in (*ssl.METHODS, "none"), f"ssl_method={ssl_method!r}: it is {', '.join(ssl.METHODS)} or none")
    runtime.check_training(globals(), dist, positive=(
        "accumulate", "eval_every", "image_size", "patch_size", "downsample", "latent_channels", "prototypes",
        "head_hidden", "global_crop_size", "local_crop_size", "stats_images", "shapes_images"))
    micro_batches = dist.count * accumulate
    check(ssl_method != "dinov2" or batch_size > micro_batches,
          f"batch_size={batch_size} must be at least {2 * micro_batches}: KoLeo compares a micro-batch's images")
    check(ssl_method == "none" or freeze_prototypes_epochs <= epochs,
          f"freeze_prototypes_epochs={freeze_prototypes_epochs} is more than epochs={epochs}")
    check(len(teacher_temp) == 2 and min(teacher_temp) > 0, f"teacher_temp={teacher_temp} must be two numbers above 0")
    for name in ("global_crop_scale", "local_crop_scale"):
        pair = globals()[name]
        check(len(pair) == 2 and 0 < pair[0] <= pair[1] <= 1, f"{name}={pair} must be two shares, 0 < low <= high <= 1")
    if ssl_method != "none":
        unit = output_patch(patch_size, stc_depth)
        for name in ("global_crop_size", "local_crop_size") if local_crops else ("global_crop_size",):
            size = globals()[name]
            check(size % unit == 0, f"{name}={size} must be a multiple of the {unit} pixels that a token stands for "
                  f"(patch_size={patch_size}, stc_depth={stc_depth}): {size // unit * unit or unit} or "
                  f"{(size // unit + 1) * unit}")
        check(global_crop_size >= 2 * unit,
              f"global_crop_size={global_crop_size} must be at least {2 * unit}: a single token can't be masked")


class Views:
    """What a step sees of each image: the plain crop to reconstruct and, unless multi_crop is None, ssl.MultiCrop's two
    global crops with their masks and L local crops. Runs in the loading workers."""

    def __init__(self, multi_crop):
        self.image_size, self.multi_crop = image_size, multi_crop  # a spawned worker has default constants
        self.short_side = max(image_size, multi_crop.short_side if multi_crop else 0)  # pixels of a JPEG to decode

    def __call__(self, image, rng):
        """An image -> its views."""
        pixels = np.array(image)
        views = {"images": data.random_crop(pixels, rng, self.image_size)}
        if self.multi_crop:
            views |= self.multi_crop(pixels, rng)
        return views

    def collate(self, examples):
        """The views of B images -> a micro-batch."""
        batch = default_collate(examples)
        images = {"images": batch.pop("images")}
        return images | ssl.collate_crops(batch) if self.multi_crop else images


def main():
    constants, dist, path, resumed = runtime.start(globals(), "tokenizer", MAY_CHANGE)  # resumed: a checkpoint or None
    check_constants(dist)
    compiling = dist.should_compile(compile)  # before the slow parts: compile=True may fail here

    # Images.
    train, val = data.open_splits(data_dir, image_size, shapes_images, batch_size, resumed)
    steps_per_epoch = len(train) // batch_size
    steps, warmup_steps = epochs * steps_per_epoch, round(warmup_epochs * steps_per_epoch)
    dist.print(f"{len(train)} training and {len(val)} validation images, {len(train.classes)} classes; "
               f"{steps} steps of {batch_size}")

    # The tokenizer, and LPIPS, which judges its reconstructions.
    try:
        tcae = TCAE.from_constants(constants).to(dist.device)
    except ValueError as error:  # sizes that do not fit; the message names the constant
        runtime.fail(error)
    perceptual = pretrained.training_lpips(lpips_net, dist) if lpips_weight else None

    # Self-supervision. The student is the tokenizer's own encoder, not a copy, with heads; JointTokenizer runs it. The
    # teacher, a copy of both, follows them as a moving average.
    self_supervised = ssl_method != "none"
    heads = multi_crop = None
    if self_supervised:
        method = ssl.METHODS[ssl_method]
        cls_head = IBOTHead(tcae.encoder.width, head_hidden, prototypes=prototypes)
        patch_head = IBOTHead(tcae.encoder.width, head_hidden, prototypes=prototypes) if method["untied"] else cls_head
        heads = torch.nn.ModuleDict({"cls": cls_head, "patch": patch_head}).to(dist.device)
        student = torch.nn.ModuleDict({"encoder": tcae.encoder, "heads": heads})
        teacher = copy.deepcopy(student).requires_grad_(False)
        ibot = ssl.IBOTLoss(prototypes, dist.device, sinkhorn=method["sinkhorn"], sum_over_processes=dist.sum)
        multi_crop = ssl.MultiCrop(global_crop_size, global_crop_scale, local_crop_size, local_crop_scale, local_crops,
                                   tcae.encoder.output_patch, method["masks"])
    model = JointTokenizer(tcae, heads)
    tcae.encoder.mask_token.requires_grad_(self_supervised and method["masks"])  # DDP refuses unused parameters
    optimizers = optim.Optimizer(model, constants, dist,
                                 undecayed=lambda name, p: p.ndim <= 1 or name.endswith("_token"))
    dist.print(f"parameters: encoder {count_parameters(tcae.encoder, tcae.bottleneck):.1f} M, "
               f"decoder {count_parameters(tcae.decoder):.1f} M"
               + (f", head {count_parameters(heads):.1f} M" if self_supervised else ""))

    start = 0
    if resumed:
        start = resumed["step"]
        tcae.load_state_dict(resumed["tokenizer"])
        optimizers.load_state_dict(resumed["optimizer"])
        if self_supervised:
            heads.load_state_dict(resumed["heads"])
            teacher.load_state_dict(resumed["teacher"])
            ibot.centers = {name: center.to(dist.device) for name, center in resumed["centers"].items()}

    if compiling:
        compile_blocks(model)
        if self_supervised:
            compile_blocks(teacher)
    wrapped = dist.distribute(model)
    runtime.make_folder(out_dir, dist)
    picture = os.path.join(out_dir, "reconstructions.png")
    transform = Views(multi_crop)
    loader = data.TrainLoader(train, transform, batch_size, start, steps, seed, dist, collate=transform.collate,
                              short_side=transform.short_side, micro_batches=accumulate, workers=workers,
                              resumed=resumed)
    progress = runtime.Progress(out_dir, start, steps, batch_size, dist)

    def save(step, finished=False):
        state = {**runtime.header("tokenizer", constants, dist), "step": step, "finished": finished,
                 "images": len(train), "bad_files": loader.reported,
                 "tokenizer": tcae.state_dict(), "optimizer": optimizers.state_dict()}
        if self_supervised:
            state |= {"heads": heads.state_dict(), "teacher": teacher.state_dict(), "centers": ibot.centers}
        if dist.first:
            runtime.save_checkpoint(path, state)

    for step in range(start, steps):  # empty if the run was stopped after its last step
        if step and step % eval_every == 0:  # before the step, so that a run stopped here does it again
            try:
                progress.validated(data.validate(tcae, val, image_size, val_images, dist, picture))
            except runtime.Stopped:
                save(step)
                return progress.stopped()

        lr = optim.cosine(step, steps, learning_rate, min_learning_rate, warmup_steps)
        temperature = ssl.teacher_temperature(step / steps_per_epoch, teacher_temp_warmup_epochs, *teacher_temp)

        step_terms = {}
        for micro_batch in range(accumulate):
            # What Views made of B images: "images" (B, 3, H, W) to reconstruct and, for self-supervision,
            # "global_crops" (2 B, 3, g, g), "local_crops" (L B, 3, l, l), "mask" (2 B, h, h), True = hidden, and of the
            # P hidden tokens "masked_index" (P,) and "mask_weight" (P,).
            views = {name: data.to_float(x, dist.device) if x.dtype == torch.uint8 else
                     x.to(dist.device, non_blocking=True) for name, x in next(loader).items()}
            images = views["images"]
            wrapped.require_backward_grad_sync = micro_batch == accumulate - 1  # DDP exchanges gradients once a step

            # One call, for DDP's sake: tcae reconstructs the images, decode(encode(images)), and its encoder, now the
            # student, sees the masked global crops and the local ones.
            with dist.autocast():
                reconstruction, student_out = wrapped(images, views)

            # Eq. 6: L_rec = L1 + λ_p LPIPS.
            terms = {"l1": F.l1_loss(reconstruction, images)}
            rec = terms["l1"]
            if perceptual:
                terms["lpips"] = perceptual(reconstruction, images).mean()
                rec = rec + lpips_weight * terms["lpips"]
            loss = alpha * rec

            # Eq. 4: L_iBOT = L_[CLS] + L_MIM. The student predicts the teacher's distributions over prototypes: that
            # of [CLS] in each global crop from every *other* crop, and those of hidden tokens from the masked crop
            # (L_MIM is 0 for DINO, which masks nothing). Gradients reach the encoder and the heads only.
            if self_supervised:
                with torch.no_grad(), dist.autocast():
                    teacher_out = ssl_output(teacher["encoder"], teacher["heads"], views, student=False)
                terms["cls"], entropies = ibot.cls_loss(student_out.cls_logits, teacher_out.cls_logits, temperature)
                terms["mim"] = ibot.mim_loss(student_out.patch_logits, teacher_out.patch_logits, views["mask_weight"],
                                             temperature)
                ssl_loss = terms["cls"] + terms["mim"]
                if method["koleo_weight"]:  # DINOv2
                    terms["koleo"] = method["koleo_weight"] * sum(ssl.koleo(crop) for crop in student_out.cls.chunk(2))
                    ssl_loss = ssl_loss + terms["koleo"]
                terms.update(entropies)  # only logged
                loss = loss + ssl_loss  # Eq. 5: L = α L_rec + L_iBOT

            (loss / accumulate).backward()
            for name, term in {"loss": loss, **terms}.items():
                step_terms[name] = step_terms.get(name, 0) + term.detach() / accumulate

        # Freeze the prototypes at first, as DINO does: the teacher's outputs mean nothing yet.
        if self_supervised and step < freeze_prototypes_epochs * steps_per_epoch:
            for head in heads.values():
                head.prototypes.grad = None
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf"))
        optimizers.step(lr)

        # Update the centres, and the teacher as a moving average of the student whose momentum rises to 1.
        if self_supervised:
            ibot.update_centers()
            momentum = optim.cosine(step, steps, teacher_momentum, 1.0)
            optim.update_ema(teacher, student, momentum)
        progress.add({**step_terms, "grad_norm": grad_norm})

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

    # Later stages need latents of mean 0 and variance 1 in every channel: measure latent_mean and latent_std. That
    # takes minutes, so a signal may break it off, too.
    try:
        measure_latents(tcae, train, image_size, stats_images, workers, dist)
        psnr = data.validate(tcae, val, image_size, val_images, dist, picture)
    except runtime.Stopped:
        return progress.stopped()
    progress.write(val_psnr=psnr)
    save(steps, finished=True)
    dist.print(f"wrote {path} and {picture}: step {steps}, validation PSNR {psnr:.2f} dB")
    dist.close()


def count_parameters(*modules):
    """Millions of parameters."""
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


if __name__ == "__main__":
    main()
