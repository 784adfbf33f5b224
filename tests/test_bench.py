"""bench.py: every table is measured in full, what is compared is the same recipe; and no step waits for its device."""
import os
import signal
import sys
from contextlib import nullcontext

import pytest
import torch
from diffusers import AutoencoderDC
from PIL import Image

import bench
import data
import finetune_decoder
import runtime
import train_dit
import train_tokenizer
from model import TCAE
from runs.tokenizers.dc_ae import DCAE

TINY = dict(data_dir="shapes", image_size=16, patch_size=4, downsample=8, latent_channels=4, encoder="32/2/2",
            decoder="32/2/2", stc_depth=1, lpips_weight=0.0, prototypes=32, head_hidden=32, global_crop_size=16,
            local_crop_size=8, local_crops=2, batch_size=8, shapes_images=8, workers=0, warmup_epochs=0.0,
            freeze_prototypes_epochs=0.0)
DISCRIMINATOR = dict(batch_size=8, lpips_weight=0.0, discriminator_weights="random", discriminator_size="32/4/2",
                     discriminator_input=32, discriminator_start=0.0, adversarial_start=0.0, warmup_epochs=0.0)
GENERATOR = dict(size="32/2/2", batch_size=8)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Configurations so small that a run takes seconds, most of them its start."""
    for script, constants in zip(bench.SHAPES, (TINY, DISCRIMINATOR, GENERATOR)):
        monkeypatch.setitem(bench.SHAPES, script, tmp_path / script)
        (tmp_path / script).write_text("".join(f"{name} = {value!r}\n" for name, value in constants.items()))
    for name, value in dict(sizes="shapes", repeats=1, steps=4, device="cpu", dtype="float32").items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two threads on busy cores wait for each other
    return runtime.Distributed("cpu", "float32")


def positive(cell):
    return float(cell.split(" ")[0]) > 0


def test_steps_table(tiny, monkeypatch):
    """Every step, beside the same in plain float32: the flags of both reach the script. The runs themselves are for the
    next test."""
    runs = []
    monkeypatch.setattr(bench, "train", lambda script, *flags: (runs.append((script, flags)), (5.0, 0.1, 0.0))[1])
    header, *rows = bench.steps_table(tiny, tiny)
    assert [row[0] for row in rows] == ["train_tokenizer.py", "finetune_decoder.py", "train_dit.py", "encode", "decode",
                                        "guided sampling"]
    assert all(len(row) == len(header) and row[1] == 8 and all(map(positive, row[2:])) for row in rows)
    assert [script for script, _ in runs] == [script for script in bench.SHAPES for _ in range(2)]
    assert all(("--dtype=float32" in arguments) == bool(k % 2) for k, (_, arguments) in enumerate(runs))


@pytest.mark.parametrize("script", bench.SHAPES)
def test_a_script_is_timed_as_it_is(tiny, script):
    first, step, waiting = bench.train(script, *bench.arguments_of(script))
    assert 0 < step < first < 100 and 0 <= waiting < 1


def test_a_script_that_fails_says_why(tiny):
    with pytest.raises(SystemExit, match="train_tokenizer.py: error: .*patch_size=5"):
        bench.train(bench.JOINT, *bench.arguments_of(bench.JOINT), "--patch_size=5")


def test_tokens_table(tiny, monkeypatch):
    """p = 16, p = 8 and p = 8 with staged compression; the step's own times are 3, 10 and 4 ms for two images."""
    ms = {("--patch_size=16", "--stc_depth=0"): 3, ("--patch_size=8", "--stc_depth=0"): 10,
          ("--patch_size=8", "--stc_depth=6"): 4}
    monkeypatch.setattr(bench, "train", lambda script, *arguments: (0.0, ms[arguments[1:]] / 1e3, 0.0))
    monkeypatch.setattr(bench, "networks", lambda *_: [lambda: 1.0] * 3)
    header, *rows = bench.tokens_table(tiny, tiny)
    assert [row[:3] for row in rows] == [(16, "–", 256), (8, "–", 1024), (8, 6, 1024)]
    assert [row[-1] for row in rows] == ["1.5 (30%)", "5.0 (100%)", "2.0 (40%)"] and rows[0][3] == "500.0 (100%)"


def test_rival_table(tiny, monkeypatch):
    """Twice 2 images: ours takes 2 + 6 s, the rival 10 + 14. Both are measured by the same code, which takes either."""
    narrow = AutoencoderDC(encoder_block_out_channels=(32,) * 6, decoder_block_out_channels=(32,) * 6)
    theirs, asked, millions = DCAE(narrow), [], f"{sum(p.numel() for p in narrow.parameters()) / 1e6:.0f}"
    monkeypatch.setattr(bench, "batch_size", 2)
    monkeypatch.setattr(bench, "dc_ae", lambda: theirs)
    with monkeypatch.context() as patch:
        patch.setattr(bench, "networks", lambda *given: asked.append(given) or (
            [lambda: 2.0, lambda: 6.0, None] if isinstance(given[-1], TCAE) else [lambda: 10.0, lambda: 14.0, None]))
        header, *rows = bench.rival_table(tiny, tiny)
    assert rows == [("ours, S–B", "123", "1000.0", "3000.0", "0.25", "3.00"),
                    ("DC-AE f32c32", millions, "5000.0", "7000.0", "0.08", "1.00")]
    assert asked[1] == (tiny, False, [], 2, theirs)
    encode, decode, _ = bench.networks(tiny, False, ["--image_size=64"], 2, theirs)
    assert 0 < encode() < 10 and 0 < decode() < 10


def test_both_recipes_give_the_same_views(tiny):
    """As many of each size, as many values each."""
    image = Image.effect_noise((500, 375), 50).convert("RGB")
    theirs = sorted(view.shape[-1] for view in bench.torchvision_views()(image))
    assert theirs == [96] * train_tokenizer.local_crops + [224, 224, 256]


def test_data_and_run_tables(tiny, monkeypatch):
    load, sizes = data.ImageFolder.load, set()

    def note_size(source, i, short_side=0):
        image = load(source, i, short_side)
        sizes.add((short_side > 0, *image.size))
        return image

    monkeypatch.setattr(data.ImageFolder, "load", note_size)
    monkeypatch.setattr(bench, "seconds", lambda task, dist: (task(), 0.5)[1])
    header, *rows = bench.data_table(tiny, tiny)
    assert {(True, 500, 375), (True, 1000, 750), (False, 2000, 1500)} <= sizes, "ours are decoded as in training"
    assert len(rows) == 2 and all(row[1:] == ("62.5", "62.5", "1.00") for row in rows)
    monkeypatch.setattr(bench, "train", lambda *_: (5.0, 0.3, 0.25))
    assert [row[1] for row in bench.run_table(tiny, tiny)][1:] == ["0.5", "5.0", "0.400"]


def test_unknown_table_names_the_constant(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only=speed"])
    with pytest.raises(SystemExit, match="only='speed'"):
        bench.main()


# ----------------------------------------------------------------------------------------------------------------------
# No step waits for its device. On the meta device tensors have no values: what would make the host wait for a GPU, such
# as .item(), .cpu(), an `if` or a mask as an index, is an error there, as is a tensor of the CPU among the device's


@pytest.fixture
def on_meta(tmp_path, monkeypatch):
    """on_meta(script, **constants) runs its main() for two steps on the meta device, up to the checkpoint."""
    def stop_after_two(progress, terms):
        progress.step += 1
        assert all(term.device.type == "meta" for name, term in terms.items())
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has none
    monkeypatch.setattr(runtime.Progress, "add", stop_after_two)
    monkeypatch.setattr(runtime.Progress, "report", lambda *_: None)  # waits, and is meant to
    monkeypatch.setattr(runtime, "save_checkpoint", lambda path, state: saved.append(state))
    constants = runtime.configure({**vars(train_tokenizer)}, [f"--{name}={value}" for name, value in TINY.items()])
    torch.save(dict(kind="tokenizer", finished=True, constants=constants,
                    tokenizer=TCAE.from_constants(constants).state_dict()), tmp_path / "tokenizer.pt")
    modules, saved = (train_tokenizer, finetune_decoder, train_dit), []
    before, handler = [dict(vars(module)) for module in modules], signal.getsignal(signal.SIGTERM)

    def run(script, **changes):
        constants = dict(device="meta", dtype="float32", workers=0, epochs=9, out_dir=tmp_path / "out") | changes
        monkeypatch.setattr(sys, "argv", [script.__file__, *(f"--{name}={value}" for name, value in constants.items())])
        script.main()
        assert [state["step"] for state in saved] == [2]

    yield run
    signal.signal(signal.SIGTERM, handler)
    for module, values in zip(modules, before):
        vars(module).update(values)


@pytest.mark.parametrize("method", ["ibot", "dino", "dinov2", "none"])
def test_no_step_of_joint_training_waits(on_meta, method):
    on_meta(train_tokenizer, **TINY, ssl_method=method)


def test_no_step_of_finetuning_waits(on_meta, tmp_path):
    on_meta(finetune_decoder, **DISCRIMINATOR, init_from=tmp_path / "tokenizer.pt")


def test_no_step_of_the_generator_waits(on_meta, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "fingerprint", lambda weights, without=(): "")
    on_meta(train_dit, **GENERATOR, tokenizer=tmp_path / "tokenizer.pt", cache_latents=False)


def test_no_step_of_coding_and_sampling_waits(tiny, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(bench, "seconds", lambda task, *_: task())
    tiny.device = torch.device("meta")
    for task in bench.networks(tiny, False, bench.arguments_of(bench.JOINT), 4):
        assert task().device.type == "meta"
