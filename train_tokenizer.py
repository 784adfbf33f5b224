"""Stage 1: the TC-AE tokenizer, trained jointly with self-supervision (Sec. 3.4 and 3.5).

    python train_tokenizer.py config/shapes_tokenizer.py                      # a laptop, minutes, no data needed
    torchrun --nproc_per_node=8 train_tokenizer.py --data_dir=imagenet        # the paper's run: p = 8, M = 6
    python train_tokenizer.py --data_dir=imagenet --out_dir=out/x --resume=True    # goes on where it stopped
    torchrun --nproc_per_node=8 train_tokenizer.py config/finetune_decoder.py --init_from=out/tokenizer/checkpoint.pt

L = α L_rec + L_iBOT, L_rec = L1 + λ_p LPIPS + λ_q L_adv (Eq. 5 and 6). The defaults are Table 7's left column, where
λ_q is 0; with --init_from the decoder alone is trained on, as in its right column. The adversarial part is the class
Adversary.
Writes out_dir/checkpoint.pt, log.jsonl and reconstructions.png.
"""
import copy
import os
from types import SimpleNamespace

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F

import data
import runtime
import ssl  # ours: see its docstring
from model import (DINO, Discriminator, IBOTHead, JointTokenizer, TCAE, augment_differentiably, compile_blocks,
                   ssl_logits)
from runtime import check

# Data
data_dir = ""  # folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or "shapes" for built-in images
image_size = 256  # side of the reconstructed crop, pixels
shapes_images = 20000  # how many shapes to train on, with data_dir = "shapes"
workers = 8  # loading processes per training process; 0 = load in the training process

# Tokenizer
patch_size = 8  # p, pixels (Table 3: 64, 32, 16, 8)
downsample = 32  # f: pixels per side of one latent position
latent_channels = 128  # c (Table 10: 256, Table 11: 32)
encoder = "S"  # S, B, L or width/depth/heads such as 128/4/4
decoder = "S"  # the same (Fig. 8)
stc_depth = 6  # M: the compression layer stands after block M; 0 = no staged compression (Table 6 calls that M = 12)
compression = "conv"  # or "shuffle" (Table 8)

# Objective
alpha = 0.1  # α, weight of the reconstruction (Table 9)
lpips_weight = 1.0  # λ_p; 0 = no perceptual loss, and no VGG weights needed

# Self-supervision
ssl_method = "ibot"  # or "dino", "dinov2" (Table 6), "none"
prototypes = 8192  # K, outputs of the head
head_hidden = 2048  # width of the head's MLP
global_crop_size = 224  # pixels
global_crop_scale = (0.25, 1.0)  # share of the image's area
local_crops = 10  # how many per image
local_crop_size = 96  # pixels
local_crop_scale = (0.05, 0.25)  # share of the image's area
teacher_momentum = 0.996  # rises to 1 along a cosine
teacher_temp = (0.04, 0.07)  # τ_t at the start and after its warm-up; lower it if teacher_entropy stays near log K
teacher_temp_warmup = 0.0375  # share of training over which τ_t rises (iBOT: 30 of 800 epochs)
freeze_prototypes_epochs = 1.0  # epochs in which the head's last layer stays as it is

# Decoder finetuning (config/finetune_decoder.py; joint training does without)
init_from = ""  # a checkpoint of joint training: its encoder and bottleneck stay, its sizes and data_dir are taken over
adversarial_weight = 0.0  # λ_q; 0 = no discriminator
discriminator_start = 6.0  # epoch from which the discriminator is trained
adversarial_start = 8.0  # epoch from which its loss counts
discriminator_weights = "dino"  # of the frozen ViT-S/8 under the trained heads; "random", for tests and experiments
discriminator_size = "S"  # of that ViT; another one than S only with random weights
discriminator_input = 224  # pixels to which it resizes what it sees
discriminator_augment = True  # DiffAugment: random colours and shifts of all that it sees
decoder_ema = 0.0  # momentum of the averaged decoder, which is the one that is kept; 0 = none

# Optimisation (Table 7, left)
epochs = 50  # passes over the data set
batch_size = 512  # images per step, over all processes
accumulate = 1  # micro-batches per step and process: less memory, the same gradient (not so for dinov2, adversarial)
learning_rate = 1e-3  # at the end of the warm-up
min_learning_rate = 1e-6  # at the end
warmup_epochs = 5.0  # over which the rate rises from 0
optimizer = "adamw"  # or "muon": Muon for the matrices inside blocks and MLPs, AdamW for the rest
muon_rate = 3.0  # Muon's learning rate, times learning_rate
betas = (0.9, 0.95)  # AdamW
weight_decay = 0.04  # of matrices; biases, norms and tokens have none
grad_clip = 3.0  # largest norm of the whole gradient (iBOT's bound is for each tensor's); 0 = any

# The run
out_dir = "out/tokenizer"
resume = False  # True: go on from out_dir/checkpoint.pt if there is one
seed = 0  # of everything random
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # of matrix products: bfloat16 or float32; auto = bfloat16 where it is faster
compile = "auto"  # torch.compile the blocks: True, False; auto = on CUDA, since a CPU gains little
log_every = 50  # steps
save_every = 1000  # steps between checkpoints
eval_every = 1000  # steps between validations, each with a picture
val_images = 1000  # how many images a validation takes; 0 = all
stats_images = 50000  # training images that the latents' mean and std are measured on
pca_baseline = False  # True: at the end print PCA's PSNR with as many values per image; small images only

DINO_WEIGHTS = ("https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
                "")  # no checksum is published; that every name and shape fits is checked

TAKEN_OVER = (*TCAE.CONSTANTS, "shapes_images")  # from the checkpoint that init_from names

FREE = {"out_dir", "resume", "device", "workers", "compile", "accumulate", "log_every", "save_every", "eval_every",
        "val_images", "data_dir"}  # constants that a resumed run may change


def check_constants(processes):
    """What configure() can't know. Each message names the constant and says what to do."""
    check(ssl_method in (*ssl.METHODS, "none"), f"ssl_method={ssl_method!r}: it is {', '.join(ssl.METHODS)} or none")
    check(not adversarial_weight or init_from, f"adversarial_weight={adversarial_weight} needs --init_from=CHECKPOINT")
    check(not init_from or ssl_method == "none", f"init_from={init_from} trains the decoder alone: --ssl_method=none")
    check(discriminator_start <= adversarial_start,
          f"discriminator_start={discriminator_start} must not be later than adversarial_start={adversarial_start}")
    check(discriminator_weights in ("dino", "random"),
          f"discriminator_weights={discriminator_weights!r}: it is 'dino' or 'random'")
    check(discriminator_weights == "random" or (discriminator_size, discriminator_input) == ("S", 224),
          f"discriminator_size={discriminator_size!r}, discriminator_input={discriminator_input}: DINO's weights are "
          "for S and 224; --discriminator_weights=random for others")
    check(optimizer in runtime.OPTIMIZERS, f"optimizer={optimizer!r}: it is {' or '.join(runtime.OPTIMIZERS)}")
    check(optimizer == "adamw" or not init_from, f"optimizer={optimizer!r}: init_from trains the decoder with 'adamw'")
    check(decoder_ema < 1, f"decoder_ema={decoder_ema} must be below 1")
    check(not decoder_ema or init_from, f"decoder_ema={decoder_ema} needs --init_from=CHECKPOINT")
    check(not adversarial_weight or adversarial_start < epochs,
          f"adversarial_start={adversarial_start} must be earlier than epochs={epochs}, or its loss never counts")
    for name in "epochs", "batch_size", "accumulate", "log_every", "save_every", "eval_every", "image_size", \
            "patch_size", "downsample", "latent_channels", "prototypes", "head_hidden", "global_crop_size", \
            "local_crop_size", "stats_images", "shapes_images":
        check(globals()[name] > 0, f"{name}={globals()[name]} must be at least 1")
    shares = processes.count * accumulate
    check(batch_size % shares == 0, f"batch_size={batch_size} must be a multiple of {shares} (processes × accumulate)")
    check(ssl_method != "dinov2" or batch_size > shares,
          f"batch_size={batch_size} must be at least {2 * shares}: KoLeo compares a micro-batch's images")
    for name in ("warmup_epochs",) + (("freeze_prototypes_epochs",) if ssl_method != "none" else ()):
        check(globals()[name] <= epochs, f"{name}={globals()[name]} is more than epochs={epochs}")
    check(not pca_baseline or image_size <= 64, f"pca_baseline=True: image_size={image_size} must be at most 64 for it")
    check(teacher_momentum <= 1, f"teacher_momentum={teacher_momentum} must be between 0 and 1")
    check(len(teacher_temp) == 2 and min(teacher_temp) > 0, f"teacher_temp={teacher_temp} must be two numbers above 0")
    check(len(betas) == 2 and max(betas) < 1, f"betas={betas} must be two numbers, each at least 0 and below 1")
    for name in ("global_crop_scale", "local_crop_scale"):
        pair = globals()[name]
        check(len(pair) == 2 and 0 < pair[0] <= pair[1] <= 1, f"{name}={pair} must be two shares, 0 < low <= high <= 1")
    if ssl_method != "none":
        unit = patch_size * (2 if stc_depth else 1)
        for name in ("global_crop_size", "local_crop_size"):
            size = globals()[name]
            check(size % unit == 0, f"{name}={size} must be a multiple of {unit} pixels (patch_size={patch_size}"
                  f"{' × 2 for staged compression' if stc_depth else ''}): {max(1, size // unit) * unit} or "
                  f"{(size // unit + 1) * unit}")
        check(global_crop_size >= 2 * unit,
              f"global_crop_size={global_crop_size} must be at least {2 * unit}: a single token can't be masked")


class StepViews:
    """All views of one image that a step needs: the crop to reconstruct and, with self-supervision, iBOT's."""

    def __init__(self, multi_crop):
        self.image_size, self.multi_crop = image_size, multi_crop
        self.short_side = max(image_size, multi_crop.short_side if multi_crop else 0)  # of a decoded JPEG

    def __call__(self, image, rng):
        pixels = np.array(image)
        views = {"images": data.random_crop(pixels, self.image_size, rng)}
        return {**views, **self.multi_crop(pixels, rng)} if self.multi_crop else views

    def prepare(self, batch):
        images = batch.pop("images")  # (B, H, W, 3)
        return {"images": images, **(ssl.by_view(batch) if self.multi_crop else {})}


def build_ssl(tcae, processes):
    """What self-supervision takes beside the tokenizer: the heads, the teacher, the loss, and what makes the views."""
    method, on = ssl.METHODS[ssl_method], processes.device
    heads = torch.nn.ModuleList(IBOTHead(tcae.encoder.width, head_hidden, prototypes=prototypes)
                                for _ in range(2 if method["untied"] else 1)).to(on)
    teacher = torch.nn.ModuleDict({"encoder": copy.deepcopy(tcae.encoder), "heads": copy.deepcopy(heads)})
    teacher.requires_grad_(False)
    ibot = ssl.IBOTLoss(prototypes, on, sinkhorn=method["sinkhorn"], koleo_weight=method["koleo_weight"],
                        sum_over_processes=processes.sum)
    multi_crop = ssl.MultiCrop(global_crop_size, global_crop_scale, local_crop_size, local_crop_scale, local_crops,
                               tcae.encoder.output_patch, method["masks"])
    return heads, teacher, ibot, multi_crop


def build_optimizer(model, processes):
    """With weight decay on matrices and convolutions alone."""
    return runtime.Optimizer(model, globals(), processes,
                             undecayed=lambda name, p: p.ndim <= 1 or name.endswith(("cls_token", "mask_token")))


class Adversary:
    """The adversarial part of decoder finetuning: the discriminator, its optimizer, and the decoder's loss against it.

    Called with an epoch before discriminator_start it does nothing, until adversarial_start the discriminator learns
    alone, and from then on its loss counts for the decoder.
    """

    def __init__(self, last_layer, processes):
        torch.manual_seed(seed)  # random weights must be the same ones after a restart
        try:
            dino = DINO(discriminator_size, input_size=discriminator_input)
        except ValueError as error:  # sizes that do not fit; it names the constant
            runtime.fail(error)
        if discriminator_weights == "dino":
            try:
                path = runtime.published(*DINO_WEIGHTS, processes)
            except runtime.MissingWeights as error:
                runtime.fail(f"{error}, or do without: --adversarial_weight=0 (no discriminator), or "
                             "--discriminator_weights=random (an untrained one, for experiments)")
            try:
                dino.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            except Exception as error:
                runtime.fail(f"discriminator_weights=dino: {path} is another file or damaged; remove it and start "
                             f"again ({str(error).splitlines()[0]})", everywhere=False)
        else:
            processes.print("the discriminator stands on random weights, not on DINO's: an experiment")
        self.network = Discriminator(dino).to(processes.device)
        self.last_layer, self.processes = last_layer, processes
        self.optimizer = torch.optim.AdamW(self.network.heads.parameters(), lr=learning_rate, betas=betas,
                                           weight_decay=weight_decay)
        self.trained = processes.distribute(self.network)

    def state_dict(self):
        return {"heads": self.network.heads.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.network.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])

    def __call__(self, rec, images, reconstruction, epoch):
        """rec = L_rec, a scalar; images, reconstruction (B, 3, H, W); epoch, a float -> the decoder's loss, which takes
        the place of L_rec, and terms for the log. The discriminator's own gradients wait in it for step()."""
        terms = self.learn(images, reconstruction) if epoch >= discriminator_start else {}
        if epoch < adversarial_start:
            return rec, terms
        loss, more = self.decoder_loss(rec, reconstruction)
        return loss, {**terms, **more}

    def decoder_loss(self, rec, reconstruction):
        """L_rec + λ_q w L_adv with L_adv = -mean D(reconstruction) and the adaptive weight
        w = ‖∇L_rec‖ / ‖∇L_adv‖ at the weights of the decoder's last layer -> that loss, {L_adv, w}.

        The two gradients at the reconstruction serve twice, for the weight and for the rest of the way back: so LPIPS
        and DINO are gone through backwards only once.
        """
        self.network.eval()  # spectral norm's power iteration goes on in the discriminator's own step
        adversarial = -self.logits(self.network, reconstruction).mean()
        of_rec, = torch.autograd.grad(rec, reconstruction)
        of_adversarial, = torch.autograd.grad(adversarial, reconstruction)
        norms = []
        for gradient in of_rec, of_adversarial:
            at_last, = torch.autograd.grad(reconstruction, self.last_layer, gradient, retain_graph=True)
            norms.append(self.processes.sum(at_last).norm())
        weight = (norms[0] / (norms[1] + 1e-6)).clamp(max=1e4)
        gradient = of_rec + adversarial_weight * weight * of_adversarial
        value = rec.detach() + adversarial_weight * weight * adversarial.detach()
        through = (reconstruction * gradient).sum()  # its gradient is `gradient`, its value of no interest
        return value + (through - through.detach()), {"adversarial": adversarial.detach(), "adaptive_weight": weight}

    def logits(self, network, images):
        with self.processes.autocast():
            return network(augment_differentiably(images) if discriminator_augment else images)  # (B, 5 N)

    def learn(self, images, reconstruction):
        """The hinge loss of one micro-batch, backwards too -> {loss, accuracy} of the discriminator."""
        self.network.train()
        fake = data.to_float(data.to_uint8(reconstruction.detach()), images.device)  # as 8 bits, like what is real
        real, fake = self.logits(self.trained, torch.cat([images, fake])).chunk(2)
        loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        (loss / accumulate).backward()
        accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return {"discriminator": loss.detach(), "discriminator_accuracy": accuracy}

    def step(self, lr):
        """One update with the gradients there are; none while the discriminator does not learn yet."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()


def losses(model, teacher, ibot, perceptual, adversary, views, share_done, processes):
    """The forward pass of one micro-batch -> the loss to minimise, and {name: scalar} of its terms and of what is only
    logged. share_done: how much of the training is done, 0 to 1."""
    images = views["images"]
    with processes.autocast():
        reconstruction, student = model(images, views if ibot else None)
        if ibot:
            with torch.no_grad():  # the teacher sees the global crops unmasked
                target = ssl_logits(teacher["encoder"], teacher["heads"], views["global_crops"], views["positions"])[:2]
    terms = {"l1": F.l1_loss(reconstruction, images)}
    rec = terms["l1"]
    if perceptual:
        terms["lpips"] = perceptual(reconstruction, images).mean()
        rec = rec + lpips_weight * terms["lpips"]
    if adversary:
        rec, adversarial_terms = adversary(rec, images, reconstruction, share_done * epochs)
        terms.update(adversarial_terms)
    loss = alpha * rec  # Eq. 6, then Eq. 5
    if ibot:
        temperature = ssl.teacher_temperature(share_done, teacher_temp_warmup, *teacher_temp)
        ssl_terms, entropies = ibot(student, target, views["weights"], temperature)
        loss = loss + sum(ssl_terms.values())
        terms.update(ssl_terms, **entropies)
    return loss, {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}


@torch.no_grad()
def validate(tcae, source, bad_files, processes, picture):
    """Mean PSNR (dB) of centre crops on 8 bits, None if SIGTERM came first; and a picture of eight originals over their
    reconstructions."""
    def reconstruct(pixels):
        with processes.autocast():
            return data.to_uint8(tcae(data.to_float(pixels, processes.device))).cpu()

    total, bad = torch.zeros(2, dtype=torch.float64), []
    for pixels, _, names in data.in_order(source, image_size, eval_batch(), processes, images=val_images):
        bad += names
        if len(pixels):  # else no file of this batch could be decoded
            psnr = data.psnr(pixels, reconstruct(pixels))
            total += torch.tensor([psnr.sum(), len(psnr)], dtype=torch.float64)
        if processes.stop:
            break
    if processes.stop_requested():
        return None
    bad_files.report(processes.gather(bad), processes)
    psnr_sum, count = processes.sum(total).tolist()
    check(count, "data_dir: no validation image could be decoded")
    alone = SimpleNamespace(rank=0, count=1)  # the picture's eight are spread over the whole split, not over a share
    shown = next(iter(data.in_order(source, image_size, 8, alone, images=8)))[0]
    if processes.first and len(shown):
        data.save_grid(picture, torch.cat([shown, reconstruct(shown)]), columns=len(shown))
    return psnr_sum / count


@torch.no_grad()
def measure_latents(tcae, source, bad_files, processes):
    """Sets latent_mean and latent_std from centre crops of training images, with sums in float64; not after SIGTERM."""
    tcae.latent_mean.zero_(), tcae.latent_std.fill_(1)
    sums, bad = torch.zeros(2, latent_channels, dtype=torch.float64), []
    count = torch.zeros((), dtype=torch.float64)
    for pixels, _, names in runtime.bar(data.in_order(source, image_size, eval_batch(), processes, workers,
                                                      stats_images), processes, desc="latent statistics"):
        bad += names
        if not len(pixels):
            continue
        with processes.autocast():
            z = tcae.encode(data.to_float(pixels, processes.device)).cpu().double()  # (b, c, h, w)
        sums += torch.stack([z.sum((0, 2, 3)), (z**2).sum((0, 2, 3))])
        count += z[:, 0].numel()
        if processes.stop:
            break
    if processes.stop_requested():
        return
    bad_files.report(processes.gather(bad), processes)
    mean, square = processes.sum(sums) / processes.sum(count)
    tcae.latent_mean.copy_(mean[:, None, None])
    tcae.latent_std.copy_((square - mean**2).clamp(min=1e-12).sqrt()[:, None, None])


def eval_batch():
    """Images per batch where there is no gradient."""
    return max(1, min(256, 256**3 // image_size**2))


def pca_psnr(train, val, values, processes):
    """PSNR (dB) of the best linear tokenizer: PCA with `values` numbers per image, fitted on the training images."""
    def rows(source, images):
        for pixels, _, _ in data.in_order(source, image_size, eval_batch(), processes, workers, images):
            if len(pixels):
                yield pixels, data.to_float(pixels, "cpu").flatten(1)

    size = 3 * image_size**2
    count, total, products = torch.zeros(()), torch.zeros(size), torch.zeros(size, size)
    for _, x in rows(train, stats_images):
        count, total, products = count + len(x), total + x.sum(0), products.addmm_(x.T, x)
    count, total, products = (processes.sum(x).double() for x in (count, total, products))
    mean = total / count
    covariance = (products / count - mean[:, None] * mean).float()
    # of the largest eigenvalues alone, which takes half the time
    _, vectors = scipy.linalg.eigh(covariance.numpy(), subset_by_index=[max(0, size - values), size - 1])
    basis, mean = torch.from_numpy(vectors), mean.float()  # (3 H W, values)
    psnr = torch.zeros(2, dtype=torch.float64)
    for pixels, x in rows(val, val_images):
        projected = ((x - mean) @ basis @ basis.T + mean).view(-1, 3, image_size, image_size)
        psnr += torch.tensor([data.psnr(pixels, data.to_uint8(projected)).sum(), len(x)])
    psnr = processes.sum(psnr)
    return (psnr[0] / psnr[1]).item()


def main():
    defaults = {name: globals()[name] for name in TAKEN_OVER}
    constants = runtime.configure(globals())
    path, saved = runtime.open_run(out_dir, resume, "tokenizer")
    given = saved or (runtime.load_checkpoint(init_from, "init_from", kind="tokenizer") if init_from else None)
    if init_from:
        for name in TAKEN_OVER:
            check(constants[name] in (defaults[name], given["constants"][name]), f"{name}={constants[name]}: "
                  f"init_from={init_from} was trained with {given['constants'][name]} and keeps it; leave it out")
        for name in TAKEN_OVER + (() if data_dir else ("data_dir",)):
            globals()[name] = constants[name] = given["constants"][name]
    if saved:
        runtime.check_resumable(saved["constants"], constants, FREE)
    processes = runtime.Processes(device, saved["dtype"] if saved else dtype, seed)
    if saved and saved["finished"]:
        processes.print(f"{path} is finished: step {saved['step']}")
        return processes.close()
    check_constants(processes)
    compiled = processes.compiles(compile)

    train, val = (data.open_split(data_dir, split, image_size, shapes_images) for split in ("train", "val"))
    data.check_same_classes(train, val)
    check(batch_size <= len(train), f"batch_size={batch_size} is more than the {len(train)} training images")
    check(not saved or saved["images"] == len(train),
          f"data_dir={data_dir} has {len(train)} training images; the run in {out_dir} began with "
          f"{saved and saved['images']}")
    steps_per_epoch = len(train) // batch_size
    steps, warmup_steps = epochs * steps_per_epoch, round(warmup_epochs * steps_per_epoch)
    processes.print(f"{len(train)} training and {len(val)} validation images, {len(train.classes)} classes; "
                    f"{steps} steps of {batch_size}")

    on = processes.device
    try:
        tcae = TCAE.from_constants(constants).to(on)
    except ValueError as error:  # sizes that do not fit; it names the constant
        runtime.fail(error)
    heads, teacher, ibot, multi_crop = build_ssl(tcae, processes) if ssl_method != "none" else (None,) * 4
    final = tcae  # the tokenizer that is validated and handed on: with the averaged decoder, if there is one
    if init_from:
        tcae.load_state_dict(given["tokenizer"])
        tcae.requires_grad_(False).decoder.requires_grad_(True)
        final = copy.deepcopy(tcae).requires_grad_(False) if decoder_ema else tcae
    adversary = Adversary(tcae.decoder.head.weight, processes) if adversarial_weight else None
    try:
        perceptual = runtime.load_lpips("vgg", processes) if lpips_weight else None
    except runtime.MissingWeights as error:
        runtime.fail(f"{error}, or do without the perceptual loss: --lpips_weight=0")
    if perceptual:
        runtime.lpips_in_autocast(perceptual, processes)
    model = JointTokenizer(tcae, heads, multi_crop and multi_crop.masks)
    optimizer = build_optimizer(model, processes)
    processes.print(f"parameters: encoder {count_parameters(tcae.encoder, tcae.bottleneck):.1f} M, "
                    f"decoder {count_parameters(tcae.decoder):.1f} M"
                    + (f", head {count_parameters(heads):.1f} M" if heads else ""))

    start = 0
    if saved:
        start = saved["step"]
        final.load_state_dict(saved["tokenizer"])
        tcae.decoder.load_state_dict(saved["decoder"])
        optimizer.load_state_dict(saved["optimizer"])
        if ibot:
            heads.load_state_dict(saved["heads"])
            teacher.load_state_dict(saved["teacher"])
            ibot.centers = {name: center.to(on) for name, center in saved["centers"].items()}
        if adversary:
            adversary.load_state_dict(saved["adversary"])
        processes.print(f"resumed from {path} at step {start}")

    def save(step, finished=False):
        if processes.first:
            runtime.save_checkpoint(path, {
                "kind": "tokenizer", "constants": constants, "dtype": str(processes.dtype).removeprefix("torch."),
                "revision": runtime.git_revision(), "step": step, "finished": finished, "images": len(train),
                "tokenizer": final.state_dict(), "decoder": tcae.decoder.state_dict(),
                "optimizer": optimizer.state_dict(),
                **({"adversary": adversary.state_dict()} if adversary else {}),
                **({"heads": heads.state_dict(), "teacher": teacher.state_dict(), "centers": ibot.centers}
                   if ibot else {})})

    if compiled:
        compile_blocks(*filter(None, (model, teacher, adversary and adversary.network)))
    student = [*tcae.encoder.parameters(), *heads.parameters()] if ibot else []
    teachers = [*teacher["encoder"].parameters(), *teacher["heads"].parameters()] if ibot else []
    model = processes.distribute(model)

    runtime.make_folder(out_dir)
    picture = os.path.join(out_dir, "reconstructions.png")
    bad_files, bad_val_files = data.BadFiles(train), data.BadFiles(val, images=val_images)
    loader = iter(data.batches(train, StepViews(multi_crop), batch_size, start, steps, seed, processes, accumulate,
                               workers))
    progress = runtime.Progress(out_dir, start, steps, batch_size, processes)
    bad = []  # files that could not be decoded since the last report

    done, stopping = start, False
    for step in range(start, steps):
        # for the discriminator's augmentation, or a dropout you may add; images and views have their own, see data.py
        torch.manual_seed(hash((seed, step, processes.rank)) % 2**63)
        lr = runtime.cosine(step, steps, learning_rate, min_learning_rate, warmup_steps)
        step_terms = {}
        for part in range(accumulate):
            views, names = progress.wait_for(loader)
            views = {name: data.to_float(x, on) if x.dtype == torch.uint8 else x.to(on, non_blocking=True)
                     for name, x in views.items()}
            if processes.count > 1:
                model.require_backward_grad_sync = part == accumulate - 1
            loss, terms = losses(model, teacher, ibot, perceptual, adversary, views, step / steps, processes)
            (loss / accumulate).backward()
            step_terms = {name: step_terms.get(name, 0) + term / accumulate for name, term in terms.items()}
            bad += names
        if ibot and step < freeze_prototypes_epochs * steps_per_epoch:
            for head in heads:
                head.prototypes.grad = None
        step_terms["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf"))
        optimizer.step(lr)
        if ibot:
            ibot.update_centers()
            momentum = runtime.cosine(step, steps, teacher_momentum, 1.0)
            runtime.update_average(teachers, student, momentum)
        if adversary:
            adversary.step(lr)
        if decoder_ema:
            runtime.update_average(list(final.decoder.parameters()), list(tcae.decoder.parameters()), decoder_ema)
        progress.add(step_terms)

        done, stopping = step + 1, processes.stop_requested()
        last = done == steps
        evaluating = done % eval_every == 0 and not last
        saving = done % save_every == 0 or stopping or last
        if done % log_every == 0 or saving or evaluating:  # the only place that waits for the device
            progress.report(lr)
            bad_files.report(processes.gather(bad), processes)
            bad = []
        if saving:
            save(done)
        if stopping:
            break
        if evaluating:
            psnr = validate(final, val, bad_val_files, processes, picture)
            if psnr is not None:  # else the next step saves and ends
                progress.write(val_psnr=psnr)
                if processes.first:
                    progress.bar.write(f"step {done}: validation PSNR {psnr:.2f} dB")
            progress.start_clock()
    progress.bar.close()

    if not (init_from or stopping):  # with init_from the latents are as they were
        measure_latents(tcae, train, bad_files, processes)
    if processes.stop_requested():
        processes.print(f"SIGTERM: saved {path} at step {done}; --resume=True goes on from there")
        return processes.close()
    save(steps, finished=True)
    psnr = validate(final, val, bad_val_files, processes, picture)
    if psnr is None:
        processes.print(f"SIGTERM: wrote {path}, which is finished; its PSNR was not measured")
        return processes.close()
    baseline = ""
    if pca_baseline:
        values = latent_channels * (image_size // downsample) ** 2
        baseline = f" (PCA with the same {values} values per image: {pca_psnr(train, val, values, processes):.2f} dB)"
    progress.write(val_psnr=psnr)
    processes.print(f"wrote {path} and {picture}: step {steps}, validation PSNR {psnr:.2f} dB{baseline}")
    processes.close()


def count_parameters(*modules):
    """Millions of parameters."""
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


if __name__ == "__main__":
    main()
