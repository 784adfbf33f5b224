"""Stage 2: the generator, a LightningDiT trained by flow matching on the tokenizer's latents (Sec. 4.1).

    python train_dit.py config/shapes_dit.py                                     # after stage 1's demo
    torchrun --nproc_per_node=8 train_dit.py --tokenizer=out/tokenizer/checkpoint.pt --data_dir=imagenet

The first run encodes the data set and its mirror image once, into latents.cache (ImageNet at 8 × 8 × 128: 42 GB on
disk, memory-mapped, so never in memory); a cut-off encoding goes on where it stopped. What there is to know of the
tokenizer is read from its checkpoint. Writes out_dir/checkpoint.pt, log.jsonl and samples.png.
"""
import copy
import os

import numpy as np
import torch

import data
import runtime
from model import LightningDiT, TCAE, compile_blocks, flow_matching_loss, guided, sample_flow, shift_time
from runtime import check

# Data
tokenizer = "out/tokenizer/checkpoint.pt"  # stage 1's checkpoint
data_dir = ""  # as in stage 1; "" = the tokenizer's own
cache = ""  # the file of latents; "" = out_dir/latents.cache
rebuild_cache = False  # True: encode again although there is a cache (of another tokenizer or data)
cache_latents = True  # False: encode every batch on the fly instead, the same batches without a cache
workers = 4  # loading processes per training process; 0 = load in the training process

# Generator
size = "XL"  # S, B, L, XL (675 M) or width/depth/heads such as 192/6/6
label_dropout = 0.1  # share of labels replaced by the null class, for guidance
shift_base = 4096  # a latent of more numbers has its times shifted towards noise, by √(its numbers / shift_base)

# Optimisation (RAE's recipe; 80 epochs for the ablations, 800 for Table 4)
epochs = 80  # passes over the data set
batch_size = 1024  # images per step, over all processes
accumulate = 1  # micro-batches per step and process
learning_rate = 2e-4  # after the warm-up
min_learning_rate = 2e-5  # at the end, if it decays
decay_epoch = 0.0  # from this epoch to the last the rate falls linearly (Table 4: 40 of 800); 0 = it is constant
warmup_steps = 0  # over which the rate rises from 0
optimizer = "adamw"  # or "muon": Muon for the matrices inside blocks, AdamW for the rest
muon_rate = 3.0  # Muon's learning rate, times learning_rate
betas = (0.9, 0.95)  # AdamW
weight_decay = 0.0  # of all weights
grad_clip = 1.0  # largest norm of the gradient; 0 = any
ema_momentum = 0.9995  # of the averaged weights, which are the ones to sample from

# The run
out_dir = "out/dit"
resume = False  # True: go on from out_dir/checkpoint.pt if there is one
seed = 0  # of everything random
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # of matrix products: bfloat16 or float32; auto = bfloat16 where it is faster
compile = "auto"  # torch.compile the blocks: True, False; auto = on CUDA, in a long run on a CPU with a C++ compiler
log_every = 100  # steps
save_every = 5000  # steps between checkpoints
sample_every = 5000  # steps between pictures of EMA samples
sample_steps = 50  # Euler steps for those pictures
sample_cfg_scale = 1.0  # guidance for those pictures; 1 = none

FREE = {"out_dir", "resume", "device", "workers", "compile", "accumulate", "log_every", "save_every", "sample_every",
        "sample_steps", "sample_cfg_scale", "data_dir", "cache", "rebuild_cache", "cache_latents", "tokenizer"}


def check_constants(processes):
    """What configure() can't know. Each message names the constant."""
    for name in "epochs", "batch_size", "accumulate", "log_every", "save_every", "sample_every", "sample_steps", \
            "shift_base":
        check(globals()[name] > 0, f"{name}={globals()[name]} must be at least 1")
    check(len(betas) == 2 and max(betas) < 1, f"betas={betas} must be two numbers, each at least 0 and below 1")
    shares = processes.count * accumulate
    check(batch_size % shares == 0,
          f"batch_size={batch_size} must be a multiple of {shares} (processes × accumulate)")
    check(optimizer in runtime.OPTIMIZERS, f"optimizer={optimizer!r}: it is {' or '.join(runtime.OPTIMIZERS)}")
    for name in "label_dropout", "ema_momentum":
        check(globals()[name] <= 1, f"{name}={globals()[name]} must be between 0 and 1")
    try:
        with torch.device("meta"):
            LightningDiT(size, 1, 1, 1)
    except ValueError as error:
        runtime.fail(error)
    check(decay_epoch <= epochs, f"decay_epoch={decay_epoch} must not be later than epochs={epochs}")


# ----------------------------------------------------------------------------------------------------------------------
# Latents, once


class Latents:
    """The cache as a source for data.Augmented: load(i) gives (z (2, c, h, w) in float16, normalised, of the image and
    of its mirror image; label)."""

    def __init__(self, store, source):
        self.store, self.source, self.labels = store, source, source.labels

    def __len__(self):
        return len(self.labels)

    def load(self, i):
        if self.store.state[i] != 1:
            raise OSError("this image could not be decoded")
        return self.store.items[i], self.labels[i]

    def blank(self):
        return np.zeros_like(self.store.items[0]), 0

    def name(self, i):
        return self.source.name(i)


class Pairs:
    """A source like Latents, of pixels: load(i) gives ((image, mirror image) uint8 (2, H, W, 3), label). Without a
    cache its batches are encoded on the fly."""

    def __init__(self, source, image_size):
        self.source, self.image_size, self.labels = source, image_size, source.labels

    def __len__(self):
        return len(self.source)

    def load(self, i):
        pixels = data.center_crop(self.source.load(i), self.image_size)
        return np.stack([pixels, pixels[:, ::-1]]), self.labels[i]

    def blank(self):
        return np.zeros((2, self.image_size, self.image_size, 3), np.uint8), 0

    def name(self, i):
        return self.source.name(i)


def encode_pixels(tcae, pixels, processes):
    """uint8 (B, H, W, 3) -> z (B, c, h, w), rounded to float16 as in the cache."""
    with torch.no_grad(), processes.autocast():
        return tcae.encode(data.to_float(pixels, processes.device)).half()


def fill_cache(store, tcae, source, image_size, bad_files, processes):
    """Encodes what the cache still lacks, each process its share."""
    todo, bad = np.array(store.to_do(processes), int), []
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(data.Centered(source, image_size), todo.tolist()),
                                         batch_size=max(1, min(128, 128**3 // image_size**2)), num_workers=workers,
                                         collate_fn=data.collate_centered, worker_init_fn=data.outlive_sigterm)
    for pixels, indices, names in runtime.bar(loader, processes, desc="encoding the data set once"):
        bad += names
        if len(pixels):
            both = torch.stack([pixels, pixels.flip(2)], dim=1).flatten(0, 1)  # (2 b, H, W, 3): image, mirror image, …
            z = encode_pixels(tcae, both, processes).cpu().unflatten(0, (-1, 2))  # (b, 2, c, h, w)
            store.put(indices.numpy(), z.numpy())
        if processes.stop:
            break
    store.flush()
    if processes.stop_requested():  # asked only here, since processes have different numbers of batches
        processes.print(f"SIGTERM: {store.path} keeps what is encoded; the next run goes on from there")
        processes.close()
        raise SystemExit(0)
    bad_files.report(processes.gather(bad), processes)  # if they are too many, the next run tries them again
    store.state[todo[store.state[todo] == 0]] = 2  # those could not be decoded
    store.flush()


class Example:
    """(z pair or pixel pair, label) and an rng -> what one training example takes. Mirror image or not, noise, time and
    the dropped label come from the rng, so that (seed, epoch, image) decides them for any number of processes."""

    def __init__(self, latent_shape, null_class, label_dropout):
        self.latent_shape, self.null_class, self.label_dropout = latent_shape, null_class, label_dropout

    def __call__(self, loaded, rng):
        pair, label = loaded
        example = pair[int(rng.random() < 0.5)]
        t = 1 / (1 + np.exp(-rng.standard_normal()))  # logit-normal(0, 1)
        return {"pixels" if example.dtype == np.uint8 else "z": np.array(example), "t": np.float32(t),
                "noise": rng.standard_normal(self.latent_shape, np.float32),
                "labels": self.null_class if rng.random() < self.label_dropout else label}

    def prepare(self, batch):
        return batch


# ----------------------------------------------------------------------------------------------------------------------
# Training


def open_latents(tcae, saved, processes):
    """The training source, the names of its classes, and the count of its bad files. The source is the cache, made or
    completed if need be, or the images, to be encoded on the fly."""
    constants = saved["constants"]
    where, image_size = data_dir or constants["data_dir"], constants["image_size"]
    source = data.open_split(where, "train", image_size, constants["shapes_images"])
    bad_files = data.BadFiles(source)
    check(batch_size <= len(source), f"batch_size={batch_size} is more than the {len(source)} training images")
    if not cache_latents:
        return Pairs(source, image_size), source.classes, bad_files
    path = cache or os.path.join(out_dir, "latents.cache")
    folder = os.path.dirname(path) or "."
    check(os.path.isdir(folder) and not os.path.isdir(path), f"cache={path} must be a file in a folder that is there")
    about = {"tokenizer": runtime.latents_of(saved), "image_size": image_size, "images": len(source),
             "files": source.fingerprint()}
    if rebuild_cache and processes.first and os.path.exists(path):
        os.remove(path)
    processes.wait()  # nobody may look at the old one
    differences = data.Store.differences(path, about)
    check(not differences, f"cache: {path} was made from something else ({differences}). "
                           "--rebuild_cache=True makes it anew, another --cache keeps both")
    store = data.Store.shared(path, about, len(source), (2, *latent_shape(saved)), np.float16, processes)
    fill_cache(store, tcae, source, image_size, bad_files, processes)
    latents = Latents(store, source)
    return latents, source.classes, data.BadFiles(latents)


def latent_shape(saved):
    """(c, h, w) of a tokenizer's latents."""
    constants = saved["constants"]
    side = constants["image_size"] // constants["downsample"]
    return (constants["latent_channels"], side, side)


@torch.no_grad()
def draw_samples(ema, tcae, shape, class_names, path, processes):
    """A grid of EMA samples, four of each of the first ten classes; the noise is the same every time."""
    rng, columns, null_class = np.random.default_rng(seed), min(10, len(class_names)), len(class_names)
    labels = torch.arange(columns).repeat(4).to(processes.device)
    noise = torch.from_numpy(rng.standard_normal((len(labels), *shape), np.float32)).to(processes.device)
    with processes.autocast():
        z = sample_flow(guided(ema, labels, null_class, sample_cfg_scale), noise, sample_steps, shift_base=shift_base)
        images = data.to_uint8(tcae.decode(z)).cpu()
    data.save_grid(path, images, columns, class_names[:columns])


def main():
    constants = runtime.configure(globals())
    path, resumed = runtime.open_run(out_dir, resume, "dit")
    if resumed:
        runtime.check_resumable(resumed["constants"], constants, FREE)
    processes = runtime.Processes(device, resumed["dtype"] if resumed else dtype, seed)
    if resumed and resumed["finished"]:
        processes.print(f"{path} is finished: step {resumed['step']}")
        return processes.close()
    check_constants(processes)
    processes.compiles(compile)  # where True does not work, this ends it before anything is encoded
    runtime.make_folder(out_dir)

    on = processes.device
    saved = runtime.load_checkpoint(tokenizer, "tokenizer", kind="tokenizer")
    check(not resumed or resumed["latents_of"] == runtime.latents_of(saved),
          f"tokenizer={tokenizer} encodes otherwise than the one that {path} was trained on")
    tcae = TCAE.from_checkpoint(saved).to(on)
    source, class_names, bad_files = open_latents(tcae, saved, processes)
    check(not resumed or (resumed["images"], resumed["classes"]) == (len(source), class_names),
          f"data_dir has {len(source)} training images of {len(class_names)} classes, others than {path} began with")
    shape, classes = latent_shape(saved), len(class_names)
    steps_per_epoch = len(source) // batch_size
    steps, decay_step = epochs * steps_per_epoch, round((decay_epoch or epochs) * steps_per_epoch)

    torch.manual_seed(seed)  # again: how many random numbers encoding took must not matter
    model = LightningDiT(size, shape[0], shape[1], classes).to(on)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = runtime.Optimizer(model, constants, processes)
    processes.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(source)} images of "
                    f"{classes} classes as latents {' × '.join(map(str, shape))}; {steps} steps of {batch_size}")
    start = 0
    if resumed:
        start = resumed["step"]
        model.load_state_dict(resumed["model"])
        ema.load_state_dict(resumed["ema"])
        optimizer.load_state_dict(resumed["optimizer"])
        processes.print(f"resumed from {path} at step {start}")

    def save(step):
        if processes.first:
            runtime.save_checkpoint(path, {
                "kind": "dit", "constants": constants, "dtype": str(processes.dtype).removeprefix("torch."),
                "revision": runtime.git_revision(), "step": step, "finished": step == steps, "images": len(source),
                "latents_of": runtime.latents_of(saved),
                "latent_shape": shape, "classes": class_names, "model": model.state_dict(), "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict()})

    trained, averaged = list(model.parameters()), list(ema.parameters())
    # On a CPU it costs 10 to 40 s, and steps then take 0.65 to 0.8 of the time: it pays where all of them, of six
    # operations per weight and token, take minutes. (By the constants alone, so that a resumed run decides the same.)
    operations = 6 * sum(p.numel() for p in trained) * shape[1] * shape[2] * batch_size * steps
    if processes.compiles(compile, pays=operations > 2e13):
        compile_blocks(model, ema)
    wrapped = processes.distribute(model)

    loader = iter(data.batches(source, Example(shape, classes, label_dropout), batch_size, start, steps, seed,
                               processes, accumulate, workers))
    progress, bad = runtime.Progress(out_dir, start, steps, batch_size, processes), []
    picture = os.path.join(out_dir, "samples.png")

    for step in range(start, steps):
        torch.manual_seed(hash((seed, step, processes.rank)) % 2**63)  # for dropout you may add; all else is in Example
        lr = learning_rate if step < decay_step else learning_rate + (min_learning_rate - learning_rate) * (
            (step - decay_step) / (steps - decay_step))
        lr *= min(1, (step + 1) / max(1, warmup_steps))
        total = 0
        for part in range(accumulate):
            batch, names = progress.wait_for(loader)
            bad += names
            batch = {name: x.to(on, non_blocking=True) for name, x in batch.items()}
            z = (batch["z"] if "z" in batch else encode_pixels(tcae, batch["pixels"], processes)).float()
            if processes.count > 1:
                wrapped.require_backward_grad_sync = part == accumulate - 1
            t = shift_time(batch["t"], shape, shift_base)
            with processes.autocast():
                loss = flow_matching_loss(wrapped, z, batch["labels"], batch["noise"], t)
            (loss / accumulate).backward()
            total = total + loss.detach() / accumulate
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip or float("inf"))
        optimizer.step(lr)
        runtime.update_average(averaged, trained, ema_momentum)
        progress.add({"loss": total, "grad_norm": grad_norm})

        done, stopping = step + 1, processes.stop_requested()
        last = done == steps
        drawing, saving = done % sample_every == 0 or last, done % save_every == 0 or stopping or last
        if done % log_every == 0 or saving or drawing:  # the only place that waits for the device
            progress.report(lr)
            bad_files.report(processes.gather(bad), processes)
            bad = []
        if saving:
            save(done)
        if stopping and not last:
            progress.bar.close()
            processes.print(f"SIGTERM: saved {path} at step {done}; --resume=True goes on from there")
            return processes.close()
        if drawing and processes.first:
            draw_samples(ema, tcae, shape, class_names, picture, processes)
        if drawing:
            progress.start_clock()
    progress.bar.close()
    processes.print(f"wrote {path} and {picture}: step {steps}")
    processes.close()


if __name__ == "__main__":
    main()
