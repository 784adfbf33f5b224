"""Stage 4: how good is a tokenizer? PSNR of its reconstructions, and linear probes before and after the bottleneck.

    python eval.py --tokenizer=out/shapes_tokenizer/checkpoint.pt
    torchrun --nproc_per_node=8 eval.py --tokenizer=out/tokenizer/checkpoint.pt --data_dir=imagenet

The probes are those of Table 1: a linear classifier on average-pooled image tokens (accuracy R_tok), the same on
average-pooled latents (R_lat), and the structure loss 1 - R_lat / R_tok. Prints a table and writes eval.json beside the
checkpoint.
"""
import json
import os

import torch
from tqdm import tqdm

import data
import runtime
from model import TCAE
from runtime import check

tokenizer = "out/tokenizer/checkpoint.pt"  # stage 1's checkpoint
data_dir = ""  # as in stage 1; "" = the tokenizer's own
val_images = 0  # how many validation images; 0 = all
probe_images = 0  # how many training images the probes are fitted on; 0 = all
probe_steps = 200  # L-BFGS steps of the probes' multinomial logistic regression, on standardised features
probe_decay = 1e-4  # its L2 penalty
batch_size = 128
workers = 4  # loading processes per process; 0 = load in the process itself
seed = 0
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # of matrix products: bfloat16 or float32; auto = bfloat16 where it is faster


@torch.no_grad()
def extract(tcae, source, image_size, images, processes, title):
    """Average-pooled tokens (N, D), average-pooled latents (N, c), labels (N,) and the PSNR of every reconstruction
    (N,), each image once, from all processes."""
    columns, bad = ([], [], [], []), []
    for pixels, labels, names in tqdm(data.in_order(source, image_size, batch_size, processes, workers, images),
                                      desc=title, disable=not processes.first):
        bad += names
        if not len(pixels):
            continue
        with processes.autocast():
            on_device = data.to_float(pixels, processes.device)
            _, tokens = tcae.encoder(on_device)
            z = tcae.encode(on_device)
            psnr = data.psnr(pixels, data.to_uint8(tcae.decode(z)).cpu())
        for column, rows in zip(columns, (tokens.float().mean(1).cpu(), z.mean((2, 3)).cpu(), labels, psnr)):
            column.append(rows)
    bad = processes.gather(bad)
    check(len(bad) < len(source), f"data_dir: no image could be decoded ({', '.join(bad[:3])})")
    if bad:
        processes.print(f"data_dir: {len(bad)} images can't be decoded and are left out: {', '.join(bad[:10])}")
    return [torch.cat(processes.gather(column)) for column in columns]


def probe(train, train_labels, val, val_labels):
    """Accuracy on (val, val_labels) of a linear classifier fitted on (train, train_labels); features (N, D)."""
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, val = (train - mean) / std, (val - mean) / std
    weight = torch.zeros(train.shape[1], int(train_labels.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=probe_steps, history_size=20, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        total = torch.nn.functional.cross_entropy(train @ weight + bias, train_labels) + probe_decay * weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return ((val @ weight + bias).argmax(1) == val_labels).float().mean().item()


def main():
    runtime.configure(globals())
    for name in "batch_size", "probe_steps":
        check(globals()[name] > 0, f"{name}={globals()[name]} must be at least 1")
    saved = runtime.load_checkpoint(tokenizer, "tokenizer", kind="tokenizer")
    processes = runtime.Processes(device, dtype, seed)
    constants = saved["constants"]
    where, size = data_dir or constants["data_dir"], constants["image_size"]
    train, val = (data.open_split(where, split, size, constants["shapes_images"]) for split in ("train", "val"))
    data.check_same_classes(train, val)
    tcae = TCAE.from_checkpoint(saved).to(processes.device)

    train_tokens, train_latents, train_labels, _ = extract(tcae, train, size, probe_images, processes, "training images")
    tokens, latents, labels, psnr = extract(tcae, val, size, val_images, processes, "validation images")
    if processes.first:
        before, after = (probe(a, train_labels, b, labels) for a, b in ((train_tokens, tokens), (train_latents, latents)))
        results = {"psnr": psnr.mean().item(), "probe_tokens": before, "probe_latents": after,
                   "structure_loss": 1 - after / before, "val_images": len(labels), "probe_images": len(train_labels)}
        for name, value in results.items():
            print(f"{name:<16} {value:.4f}" if isinstance(value, float) else f"{name:<16} {value}")
        path = os.path.join(os.path.dirname(tokenizer), "eval.json")
        with open(path, "w") as file:
            json.dump({"tokenizer": tokenizer, "data_dir": where, **results}, file, indent=1)
        print(f"wrote {path}")
    processes.close()


if __name__ == "__main__":
    main()
