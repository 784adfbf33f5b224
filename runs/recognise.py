"""How many samples of the built-in shapes show the class they were asked for?

    python runs/recognise.py --tokenizer=out/shapes_tokenizer/checkpoint.pt --samples=out/samples/samples.npz

Trains a small CNN on the tokenizer's *reconstructions* of shapes, or with --originals=True on the crisp originals, which
measures the blur too. Says how many held-out ones it knows, and how many of the samples. Writes the network as
`feature_net`, in the form that eval.py takes: features and logits of uint8 images.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import runtime
from model import TCAE
from runtime import check

tokenizer = "out/shapes_tokenizer/checkpoint.pt"
samples = ""  # .npz of sample.py; "" = train the network only
feature_net = "out/shapes_classifier.pt2"  # where to write it
originals = False  # True: learn from the crisp originals instead of the reconstructions
images = 16000  # to learn from
epochs = 8
batch_size = 64
learning_rate = 2e-3
seed = 0


class Classifier(nn.Module):
    """uint8 (B, 32, 32, 3) -> features (B, 128), logits (B, 10)."""

    def __init__(self, classes):
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        self.layers = nn.Sequential(*[nn.Sequential(nn.Conv2d(a, b, 3, stride=1 if a == 3 else 2, padding=1),
                                                    nn.BatchNorm2d(b), nn.ReLU()) for a, b in zip(widths, widths[1:])])
        self.hidden, self.head = nn.Linear(128 * 16, 128), nn.Linear(128, classes)

    def forward(self, pixels):
        x = self.layers(pixels.movedim(-1, 1) / 127.5 - 1)  # (B, 128, 4, 4)
        features = F.relu(self.hidden(x.flatten(1)))
        return features, self.head(features)


@torch.no_grad()
def examples(tcae, split, count, size):
    """Reconstructions or originals: uint8 (count, size, size, 3), labels (count,)."""
    source, out = data.Shapes(split, count, size), []
    for k in tqdm(range(0, count, 200), desc=f"images of {split}", disable=None):
        pixels = torch.from_numpy(np.stack([np.asarray(source.load(i)) for i in range(k, min(k + 200, count))]))
        out.append(pixels if originals else data.to_uint8(tcae(data.to_float(pixels, "cpu"))))
    return torch.cat(out), torch.tensor(source.labels)


def main():
    runtime.configure(globals())
    saved = runtime.load_checkpoint(tokenizer, "tokenizer", kind="tokenizer")
    check(saved["constants"]["data_dir"] == "shapes", f"tokenizer={tokenizer} was not trained on the shapes")
    tcae, size = TCAE.from_checkpoint(saved), saved["constants"]["image_size"]
    check(size == 32, f"tokenizer={tokenizer}: the classifier is made for images of 32 pixels, not {size}")
    runtime.make_folder(Path(feature_net).parent, constant="feature_net")
    names = data.Shapes.classes
    pixels, labels = examples(tcae, "train", images, size)
    torch.manual_seed(seed)
    network, steps = Classifier(len(names)), epochs * (len(pixels) // batch_size)
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for step in tqdm(range(steps), desc="classifier", disable=None):
        chosen = torch.randint(len(pixels), (batch_size,))
        x = pixels[chosen]
        for axis in 1, 2:  # every shape stays one of its class when mirrored
            x = x.flip(axis) if torch.rand(()) < 0.5 else x
        loss = F.cross_entropy(network(x)[1], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        pixels, labels = examples(tcae, "val", 2000, size)
        known = (network(pixels)[1].argmax(1) == labels).float().mean()
        print(f"of 2000 {'originals' if originals else 'reconstructions'} of held-out shapes it knows {known:.1%}")
        if samples:
            with np.load(samples) as file:
                pixels, labels = torch.from_numpy(file["arr_0"]), torch.from_numpy(file["arr_1"])
            right = network(pixels)[1].argmax(1) == labels
            each = ", ".join(f"{name} {right[labels == k].float().mean():.0%}" for k, name in enumerate(names))
            print(f"of {len(labels)} samples it recognises {right.float().mean():.1%} ({each})")
    example, batch = torch.zeros(2, size, size, 3, dtype=torch.uint8), torch.export.Dim("batch", min=1)
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=({0: batch},)), feature_net)
    print(f"wrote {feature_net}")


if __name__ == "__main__":
    main()
