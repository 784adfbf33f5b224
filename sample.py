"""Stage 3: class-conditional samples.

    python sample.py --checkpoint=out/shapes_dit/checkpoint.pt --cfg_scale=2.5                # a picture, ten classes
    python sample.py --checkpoint=out/dit/checkpoint.pt --classes=207,360 --per_class=4       # of these two classes
    torchrun --nproc_per_node=8 sample.py --num_samples=50000 --cfg_scale=1.5                 # an .npz, for FID

Sample i depends on (seed, i) and its class alone; batch size and number of processes change it by rounding at most.
Writes out_dir/samples.png, or out_dir/samples.npz: arr_0 uint8 (N, H, W, 3), what ADM's evaluator reads, and arr_1 the
classes (N,).
"""
import os

import numpy as np
import torch

import data
import runtime
from model import LightningDiT, TCAE, guided, sample_flow
from runtime import check

checkpoint = "out/dit/checkpoint.pt"  # stage 2's
tokenizer = ""  # stage 1's checkpoint, or one whose decoder was finetuned; "" = the one that stage 2 was trained with
use_ema = True  # False: the weights as they were last trained

classes = ""  # which, as 0,5,7; "" = the first ten for the picture, all for an .npz
per_class = 8  # samples of each, for the picture
num_samples = 0  # above 0: write this many to an .npz instead, equally many of each class

steps = 50  # of the sampler
method = "euler"  # or "heun": twice the work per step, error of second order
cfg_scale = 1.0  # classifier-free guidance; 1 = none
cfg_interval = (0.0, 1.0)  # times t, 0 = data, 1 = noise, at which guidance acts
seed = 0  # of the noise

out_dir = "out/samples"
batch_size = 64  # samples at a time, per process
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # of matrix products: bfloat16 or float32; auto = bfloat16 where it is faster


def noise_of(i, shape):
    """The noise that sample i starts from, (c, h, w) float32."""
    return np.random.default_rng([seed, i]).standard_normal(shape, np.float32)


@torch.no_grad()
def draw(dit, tcae, indices, labels, shape, shift_base, processes):
    """Samples `indices` of the classes `labels` -> uint8 (B, H, W, 3) on the CPU."""
    noise = torch.from_numpy(np.stack([noise_of(i, shape) for i in indices])).to(processes.device)
    labels = torch.tensor(labels, device=processes.device)
    with processes.autocast():
        z = sample_flow(guided(dit, labels, dit.null_class, cfg_scale, cfg_interval), noise, steps, method, shift_base)
        return data.to_uint8(tcae.decode(z)).cpu()


def parse_classes(names):
    """The constant `classes` as a list of numbers."""
    if not classes:
        return list(range(len(names) if num_samples else min(10, len(names))))
    chosen = [part.strip() for part in classes.split(",")]
    for part in chosen:
        check(part.isdecimal() and int(part) < len(names),
              f"classes={classes}: {part!r} is not a class, 0 to {len(names) - 1}")
    return [int(part) for part in chosen]


def main():
    constants = runtime.configure(globals())
    check(method in ("euler", "heun"), f"method={method!r}: it is 'euler' or 'heun'")
    check(len(cfg_interval) == 2 and cfg_interval[0] <= cfg_interval[1],
          f"cfg_interval={cfg_interval} must be (low, high)")
    for name in "steps", "batch_size", "per_class":
        check(constants[name] > 0, f"{name}={constants[name]} must be at least 1")
    processes = runtime.Processes(device, dtype, seed)
    saved = runtime.load_checkpoint(checkpoint, "checkpoint", kind="dit")
    tokenizer_path = tokenizer or saved["constants"]["tokenizer"]
    saved_tokenizer = runtime.load_checkpoint(tokenizer_path, "tokenizer", kind="tokenizer")
    check(saved["latents_of"] == runtime.latents_of(saved_tokenizer),
          f"tokenizer={tokenizer_path} has other latents than {checkpoint} was trained on")

    names, shape = saved["classes"], tuple(saved["latent_shape"])
    weights = saved["ema" if use_ema else "model"]
    dit = LightningDiT(saved["constants"]["size"], shape[0], shape[1], len(names))
    dit.load_state_dict(weights)
    dit, tcae = dit.to(processes.device).eval(), TCAE.from_checkpoint(saved_tokenizer).to(processes.device)
    chosen = parse_classes(names)
    labels = np.resize(chosen, num_samples or per_class * len(chosen))  # in turn, over and over

    runtime.make_folder(out_dir)
    path = os.path.join(out_dir, "samples.npz" if num_samples else "samples.png")
    part = os.path.join(out_dir, "samples.part")
    side = saved_tokenizer["constants"]["image_size"]
    about = {"generator": runtime.fingerprint(weights), "tokenizer": runtime.fingerprint(saved_tokenizer["tokenizer"]),
             "labels": runtime.fingerprint({"": torch.from_numpy(labels)}), "steps": steps, "method": method,
             "cfg_scale": cfg_scale, "cfg_interval": list(cfg_interval), "seed": seed, "dtype": dtype}
    if processes.first and data.Store.differences(part, about):
        os.remove(part)  # begun by another call, for other samples
    store = data.Store.shared(part, about, len(labels), (side, side, 3), np.uint8, processes)
    todo = store.to_do(processes)
    for k in runtime.bar(range(0, len(todo), batch_size), processes, desc="sampling", unit="batch"):
        indices = todo[k:k + batch_size]
        store.put(indices, draw(dit, tcae, indices, labels[indices], shape, saved["constants"]["shift_base"],
                                processes).numpy())
        if processes.stop:
            break
    store.flush()
    if processes.stop_requested():  # asked only here, since processes have different numbers of batches
        processes.print(f"SIGTERM: {part} keeps what is drawn; the same command goes on from there")
        return processes.close()
    if processes.first:
        if num_samples:
            np.savez(path, arr_0=store.items, arr_1=labels)
        else:
            columns = len(labels) // per_class
            data.save_grid(path, torch.from_numpy(np.array(store.items)), columns, [names[k] for k in labels[:columns]])
        os.remove(part)
    processes.print(f"wrote {path}: {len(labels)} samples of {len(set(labels.tolist()))} classes, "
                    f"{steps} {method} steps, cfg_scale {cfg_scale}")
    processes.close()


if __name__ == "__main__":
    main()
