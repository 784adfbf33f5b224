"""Stage 3: class-conditional samples.

    python sample.py --checkpoint=out/shapes_dit/checkpoint.pt --cfg_scale=2.5                # a picture, ten classes
    python sample.py --checkpoint=out/dit/checkpoint.pt --classes=207,360 --per_class=4       # these two classes
    torchrun --nproc_per_node=8 sample.py --num_samples=50000 --cfg_scale=1.5                 # an .npz, for FID

Sample i depends only on (seed, i) and its class; batch size and number of processes change nothing but rounding.
Writes out_dir/samples.png, or samples.npz: arr_0 uint8 (N, H, W, 3), as ADM's evaluator reads it, arr_1 classes (N,).
"""
import os

import numpy as np
import torch

import data
import runtime
from latents import Store, open_tokenizer
from model import LightningDiT, cfg_velocity, sample_flow
from runtime import check

checkpoint = "out/dit/checkpoint.pt"  # stage 2's, or averaged weights that it kept, step-N.pt
tokenizer = ""  # another one of the same latents, with a finetuned decoder; "" = the one that stage 2 used
use_ema = True  # False: the last step's weights instead of their average

classes = ""  # class numbers, such as 0,5,7; "" = the first ten for the picture, all for an .npz
per_class = 8  # samples of each class in the picture
num_samples = 0  # above 0: write this many samples to an .npz instead, of the classes in turn

steps = 50  # solver steps from noise to data
method = "euler"  # or "heun": second order, at twice the cost per step
cfg_scale = 1.0  # classifier-free guidance; 1 = none
cfg_interval = (0.0, 1.0)  # guidance acts at these (shifted) times t; 0 = data, 1 = noise
seed = 0  # random seed of the noise

out_dir = "out/samples"
batch_size = 64  # samples at a time, per process
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # matrix products in bfloat16 or float32; auto = bfloat16 where it is faster


@torch.no_grad()
def draw(dit, tcae, indices, labels, shift_base, dist):
    """Draws the samples `indices`, of the classes `labels` -> uint8 (B, H, W, 3) on the CPU."""
    noise = np.stack([np.random.default_rng([seed, i]).standard_normal(tcae.latent_shape, np.float32) for i in indices])
    noise, labels = torch.from_numpy(noise).to(dist.device), torch.tensor(labels, device=dist.device)
    with dist.autocast():
        velocity = cfg_velocity(dit, labels, dit.null_class, cfg_scale, cfg_interval)
        return data.to_uint8(tcae.decode(sample_flow(velocity, noise, steps, method, shift_base))).cpu()


def main():
    constants = runtime.configure(globals())
    check(method in ("euler", "heun"), f"method={method!r}: it is 'euler' or 'heun'")
    check(len(cfg_interval) == 2 and cfg_interval[0] <= cfg_interval[1],
          f"cfg_interval={cfg_interval} must be (low, high)")
    runtime.check_positive(constants, "steps", "batch_size", "per_class")
    dist = runtime.Distributed(device, dtype, seed)
    saved = runtime.load_checkpoint(checkpoint, "checkpoint", kind="dit")
    check(use_ema or "model" in saved, f"use_ema=False: {checkpoint} holds averaged weights only")
    tcae = open_tokenizer(tokenizer or saved["constants"]["tokenizer"], dist, dit_checkpoint=saved)
    names, shape = saved["classes"], tcae.latent_shape  # (c, h, w)
    weights = saved["ema" if use_ema else "model"]
    dit = LightningDiT(saved["constants"]["size"], shape[0], shape[1], len(names)).eval().to(dist.device)
    dit.load_state_dict(weights)
    valid = [str(k) for k in range(len(names))]
    chosen = valid if num_samples else valid[:10]
    if classes:
        chosen = [k.strip() for k in classes.split(",")]
    for k in chosen:
        check(k in valid, f"classes={classes}: {k!r} is not a class, 0 to {len(names) - 1}")
    if len(names) == 1 and cfg_scale != 1:
        dist.print(f"cfg_scale={cfg_scale}: the generator knows one class, so guidance has nothing to push towards")
    labels = np.resize([int(k) for k in chosen], num_samples or per_class * len(chosen))  # the classes in turn

    # A picture takes the same path as 50,000 samples: all processes fill one file, and a stopped run can continue.
    runtime.make_folder(out_dir, dist)
    part = os.path.join(out_dir, "samples.part")
    about = {"generator": runtime.fingerprint(weights), "tokenizer": runtime.fingerprint(tcae.state_dict()),
             "labels": runtime.fingerprint({"": torch.from_numpy(labels)}), "steps": steps, "method": method,
             "cfg_scale": cfg_scale, "cfg_interval": list(cfg_interval), "seed": seed, "dtype": str(dist.dtype)}
    if dist.first and (differences := Store.differences(part, about)):
        print(f"{part} held samples of other constants ({differences}): starting over")
        os.remove(part)
    store = Store(part, about, len(labels), (tcae.image_size, tcae.image_size, 3), np.uint8, dist)
    mine = store.to_do(dist)[dist.rank::dist.count]
    for k in runtime.bar(range(0, len(mine), batch_size), dist, desc="sampling", unit="batch"):
        indices = mine[k:k + batch_size]
        images = draw(dit, tcae, indices, labels[indices], saved["constants"]["shift_base"], dist)
        store.put(indices, images.numpy())
        if dist.stop:
            break
    store.flush()
    if dist.stop_requested():  # only here, since processes may have different numbers of batches
        dist.print(f"stopped: {part} keeps what is drawn; the same command continues from there")
        return dist.close()

    path = os.path.join(out_dir, "samples.npz" if num_samples else "samples.png")
    if dist.first:
        if num_samples:
            with runtime.whole_file(path) as file:
                np.savez(file, arr_0=store.items, arr_1=labels)
        else:
            columns = len(chosen)
            data.save_grid(path, torch.from_numpy(np.array(store.items)), columns, [names[k] for k in labels[:columns]])
        os.remove(part)
    dist.print(f"wrote {path}: {len(labels)} samples of {len(set(labels.tolist()))} classes, "
               f"{steps} {method} steps, cfg_scale {cfg_scale}")
    dist.close()


if __name__ == "__main__":
    main()
