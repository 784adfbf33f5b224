"""Stage 2: the generator, a LightningDiT trained by flow matching on the tokenizer's latents (Sec. 4.1).

    python train_dit.py config/shapes_dit.py        # after train_tokenizer.py config/shapes_tokenizer.py
    torchrun --nproc_per_node=8 train_dit.py        # the paper's run

First it encodes all images and their mirror images into latents.cache (ImageNet at 8 × 8 × 128: 42 GB on disk,
memory-mapped). If that is interrupted, the next run continues. The tokenizer's settings come from its checkpoint;
another tokenizer than ours is a Python file (latents.py). Writes out_dir/checkpoint.pt, log.jsonl and samples.png.
"""
import copy
import os

import numpy as np
import torch

import data
import optim
import runtime
from latents import LatentDataset, OtherTokenizer, encode_float16, fill_cache, measure_once, open_tokenizer
from model import LightningDiT, cfg_velocity, compile_blocks, flow_matching_loss, sample_flow, shift_time
from runtime import check

# Data
tokenizer = "out/tokenizer/checkpoint.pt"  # stage 1's checkpoint, or a file.py with another tokenizer
data_dir = ""  # as in stage 1; "" = the tokenizer's own
cache = ""  # the file of latents; "" = out_dir/latents.cache
rebuild_cache = False  # True: encode again, replacing a cache of another tokenizer or other data
cache_latents = True  # False: no cache; encode every batch on the fly, which gives the same batches but is slower
workers = 4  # loading processes per training process; 0 = load in the training process

# Generator
size = "XL"  # S, B, L, XL (675 M) or width/depth/heads such as 192/6/6
label_dropout = 0.1  # share of labels replaced by the null class, for guidance
shift_base = 4096  # latents with more dimensions get t shifted towards noise, by √(dimensions / shift_base)

# Optimisation (RAE's recipe; 80 epochs for the ablations, 800 for Table 4)
epochs = 80  # passes over the data set
batch_size = 1024  # images per step, over all processes
accumulate = 1  # micro-batches per step and process: less memory, the same gradient
learning_rate = 2e-4  # after the warm-up
min_learning_rate = 2e-5  # at the end, if it decays
decay_epoch = 0.0  # from this epoch to the last, the rate falls linearly (40 for RAE's 800 epochs); 0 = constant
warmup_steps = 0  # steps in which the rate rises from 0
optimizer = "adamw"  # or "muon": Muon for matrices in blocks, AdamW for the rest (optim.py)
muon_rate = 3.0  # Muon's learning rate, times learning_rate
betas = (0.9, 0.95)  # AdamW
weight_decay = 0.0  # on all weights
grad_clip = 1.0  # largest norm of the gradient; 0 = no clipping
ema_momentum = 0.9995  # of the weights' moving average, which sample.py uses

# The run
out_dir = "out/dit"
resume = False  # True: continue from out_dir/checkpoint.pt if there is one
seed = 0  # random seed
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # matrix products in bfloat16 or float32; auto = bfloat16 where it is faster
compile = "auto"  # torch.compile the blocks: True, False; auto = on CUDA, or in a long run on a CPU with a C++ compiler
log_every = 100  # steps
save_every = 5000  # steps between checkpoints, each in place of the last
keep_every = 0  # steps between averaged weights that are kept, to sample from, in out_dir/step-N.pt; 0 = none
sample_every = 5000  # steps between pictures of EMA samples
sample_steps = 50  # Euler steps for those pictures
sample_cfg_scale = 1.0  # guidance for those pictures; 1 = none

MAY_CHANGE = {  # with --resume=True; all other constants must be those that the run was begun with
    "out_dir", "resume", "device", "workers", "compile", "accumulate", "log_every", "save_every", "keep_every",
    "sample_every", "sample_steps", "sample_cfg_scale", "data_dir", "cache", "rebuild_cache", "cache_latents",
    "tokenizer"}


def check_constants(dist):
    """Checks across constants. Each message names the constant and says what to do."""
    runtime.check_training(globals(), dist, positive=("accumulate", "sample_every", "sample_steps", "shift_base"))


class Example:
    """Draws what a step needs for an image: the image or its mirror image, a logit-normal(0, 1) time t, noise, and
    whether the label is dropped. Runs in the loading workers; the rng is the image's own in this epoch."""

    def __init__(self, shape, null_class):
        self.shape, self.null_class, self.label_dropout = shape, null_class, label_dropout

    def __call__(self, item, rng):
        """An item of latents.LatentDataset -> its latents (c, h, w) or pixels (H, W, 3), t, noise (c, h, w), label."""
        mirrored = rng.random() < 0.5
        t = 1 / (1 + np.exp(-rng.standard_normal()))
        noise = rng.standard_normal(self.shape, np.float32)
        label = self.null_class if rng.random() < self.label_dropout else item["label"]
        return item["pair"][int(mirrored)], np.float32(t), noise, label


@torch.no_grad()
def draw_samples(ema, tcae, class_names, path, dist):
    """Draws a grid of EMA samples, four of each of the first ten classes, from the same noise every time."""
    rng, columns = np.random.default_rng(seed), min(10, len(class_names))
    labels = torch.arange(columns).repeat(4).to(dist.device)
    noise = torch.from_numpy(rng.standard_normal((len(labels), *tcae.latent_shape), np.float32)).to(dist.device)
    with dist.autocast():
        velocity = cfg_velocity(ema, labels, ema.null_class, sample_cfg_scale)
        z = sample_flow(velocity, noise, sample_steps, shift_base=shift_base)
        images = data.to_uint8(tcae.decode(z)).cpu()
    data.save_grid(path, images, columns, class_names[:columns])


def main():
    constants, dist, path, resumed = runtime.start(globals(), "dit", MAY_CHANGE)  # resumed: a checkpoint or None
    check_constants(dist)
    runtime.make_folder(out_dir, dist)

    # The tokenizer, frozen, and the images it was trained on, or others
    tcae = open_tokenizer(tokenizer, dist, dit_checkpoint=resumed)
    shape = tcae.latent_shape  # (c, h, w)
    source = data.open_split(data_dir or tcae.data_dir, "train", tcae.image_size, tcae.shapes_images)
    data.check_training_images(source, batch_size, resumed)
    steps_per_epoch = len(source) // batch_size
    steps, decay_step = epochs * steps_per_epoch, round((decay_epoch or epochs) * steps_per_epoch)
    check(warmup_steps <= steps, f"warmup_steps={warmup_steps} is more than all {steps} steps")

    # The generator, its averaged weights and its optimizer
    torch.manual_seed(seed)  # again: another tokenizer's file may have used random numbers
    try:
        model = LightningDiT(size, shape[0], shape[1], len(source.classes)).to(dist.device)
    except ValueError as error:  # the message names the constant
        runtime.fail(error)
    ema = copy.deepcopy(model).requires_grad_(False)
    parameters = sum(p.numel() for p in model.parameters())
    optimizers = optim.Optimizer(model, constants, dist)
    dist.print(f"{parameters / 1e6:.1f} M parameters, {len(source)} images of {len(source.classes)} classes as latents "
               f"{' × '.join(map(str, shape))}; {steps} steps of {batch_size}")
    start = resumed["step"] if resumed else 0
    if resumed:
        model.load_state_dict(resumed["model"])
        ema.load_state_dict(resumed["ema"])
        optimizers.load_state_dict(resumed["optimizer"])
    # On a CPU, compiling takes 10 to 40 s and saves an eighth to a quarter of every step: worth it in a run of minutes,
    # which 2e13 operations take. Only constants decide, so a resumed run decides the same.
    operations = 6 * parameters * shape[1] * shape[2] * batch_size * steps  # 6 for each weight and token
    if dist.should_compile(compile, pays=operations > 2e13):
        compile_blocks(model, ema)

    # The data: latents from the cache, or pixels to encode in every step
    cache_path = cache or os.path.join(out_dir, "latents.cache")
    store = None  # without a cache
    try:
        if isinstance(tcae, OtherTokenizer) and not resumed:
            measure_once(f"{cache_path}.statistics", tcae, source, rebuild_cache, workers, dist)
        if cache_latents:
            store = fill_cache(cache_path, tcae, source, rebuild_cache, workers, dist)
    except runtime.Stopped:
        dist.print(f"stopped: what is encoded stays in {cache_path}; the next run continues from there")
        return dist.close()
    latents = LatentDataset(source, tcae.image_size, store)
    wrapped = dist.distribute(model)

    loader = data.TrainLoader(latents, Example(shape, model.null_class), batch_size, start, steps, seed, dist,
                              micro_batches=accumulate, workers=workers, resumed=resumed)
    progress = runtime.Progress(out_dir, start, steps, batch_size, dist)
    picture = os.path.join(out_dir, "samples.png")

    def sampling_state(step):  # what sample.py needs
        return {**runtime.header("dit", constants, dist), "step": step, "finished": step == steps,
                "images": len(source), "classes": source.classes, "latents_of": tcae.latents_of, "latent_shape": shape,
                "latent_mean": tcae.latent_mean, "latent_std": tcae.latent_std, "ema": ema.state_dict()}

    for step in range(start, steps):
        lr = learning_rate
        if step > decay_step:  # falls linearly
            lr += (min_learning_rate - learning_rate) * (step - decay_step) / (steps - decay_step)
        if step < warmup_steps:  # rises linearly
            lr *= (step + 1) / warmup_steps

        total = 0
        for micro_batch in range(accumulate):
            # The latents z of B images, normalised per channel by TCAE.encode; without a cache, x is still pixels.
            x, t, noise, labels = (part.to(dist.device, non_blocking=True) for part in next(loader))
            z = (x if store else encode_float16(tcae, x, dist)).float()  # (B, c, h, w)

            # Flow matching (Sec. 4.1): at z_t = (1 - t) z + t noise the model predicts the velocity noise - z, by mean
            # squared error. t is logit-normal, from Example; the larger the latent, the further it is shifted to 1.
            wrapped.require_backward_grad_sync = micro_batch == accumulate - 1  # DDP exchanges gradients once a step
            with dist.autocast():
                loss = flow_matching_loss(wrapped, z, labels, noise, shift_time(t, shape, shift_base))
            (loss / accumulate).backward()
            total = total + loss.detach() / accumulate

        # Update the weights, and their moving average, which is the one to sample from.
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf"))
        optimizers.step(lr)
        optim.update_ema(ema, model, ema_momentum)
        progress.add({"loss": total, "grad_norm": grad_norm})

        # Log, draw samples, save: nothing else in the loop waits for the device. A NaN ends the run before it is saved,
        # and a run that is saved as finished has its picture.
        done, stopping = step + 1, dist.stop_requested()
        last = done == steps
        drawing = last or done % sample_every == 0 and not stopping
        saving = done % save_every == 0 or stopping or last
        keeping = keep_every > 0 and done % keep_every == 0
        if done % log_every == 0 or saving or drawing or keeping:
            progress.report(lr, loader.waited())
            loader.report_bad_files()
        if drawing:
            if dist.first:
                draw_samples(ema, tcae, source.classes, picture, dist)
            progress.start_clock()
        if keeping and dist.first:
            runtime.save_checkpoint(os.path.join(out_dir, f"step-{done}.pt"), sampling_state(done))
        if saving and dist.first:
            runtime.save_checkpoint(path, {**sampling_state(done), "model": model.state_dict(),
                                           "optimizer": optimizers.state_dict(), "bad_files": loader.reported})
        if stopping and not last:
            return progress.stopped()
    progress.bar.close()
    dist.print(f"wrote {path} and {picture}: step {steps}")
    dist.close()


if __name__ == "__main__":
    main()
