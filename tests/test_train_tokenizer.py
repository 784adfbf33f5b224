"""Stage 1 end to end, with a network of a few thousand parameters: stopped, resumed, split, accumulated, refused."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import lpips
import pytest
import torch
from PIL import Image

import data
import model
import optim
import pretrained
import runtime
import ssl
import train_tokenizer
from conftest import ROOT, clean_environment, fork_two, run_script
from model import TCAE, JointTokenizer

TINY = dict(data_dir="shapes", shapes_images=80, image_size=32, patch_size=4, downsample=8, latent_channels=6,
            encoder="32/2/2", decoder="32/2/2", stc_depth=1, lpips_weight=0, prototypes=64, head_hidden=32,
            global_crop_size=32, local_crops=2, local_crop_size=16, epochs=1, batch_size=8, warmup_epochs=0.2,
            freeze_prototypes_epochs=0, workers=0, device="cpu", dtype="float32", log_every=1, val_images=16,
            stats_images=80)


def arguments(**changes):
    return [f"--{name}={value}" for name, value in {**TINY, **changes}.items()]


@pytest.fixture
def here(monkeypatch):
    """here(**changes) runs train_tokenizer's main() in this process; configure(**changes) sets its constants alone."""
    before, handler = dict(vars(train_tokenizer)), signal.getsignal(signal.SIGTERM)

    def call(**changes):
        monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", *arguments(**changes)])
        train_tokenizer.main()

    yield call
    vars(train_tokenizer).update(before)
    signal.signal(signal.SIGTERM, handler)


def failure(call, **changes):
    """The one line with which a run ends before its first step."""
    with pytest.raises(SystemExit) as error:
        call(**changes)
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def checkpoint(out_dir):
    return runtime.load_checkpoint(out_dir / "checkpoint.pt", "out_dir")


def log(out_dir):
    """The lines of training steps, and those of validations."""
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "val_psnr" in line]


def tensors(state, prefix=""):
    """All tensors of a nested state by their path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {name: tensor for key, value in items for name, tensor in tensors(value, f"{prefix}/{key}").items()}


@contextmanager
def stop_after(step):
    """A run in this process gets SIGTERM at the end of this step."""
    add = runtime.Progress.add

    def add_and_stop(progress, terms):
        add(progress, terms)
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    runtime.Progress.add = add_and_stop
    try:
        yield
    finally:
        runtime.Progress.add = add


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run of 20 steps that nothing interrupted; the prototypes are frozen for the first half."""
    out_dir = tmp_path_factory.mktemp("straight")
    run_script("train_tokenizer.py", *arguments(epochs=2, freeze_prototypes_epochs=1, out_dir=out_dir))
    return out_dir


# ----------------------------------------------------------------------------------------------------------------------
# A run


def test_a_run_leaves_what_it_promises(straight):
    """Every term in the log; a picture; a checkpoint that says it is finished; and nothing else."""
    steps, validations = log(straight)
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert {"l1", "cls", "mim", "teacher_entropy", "batch_entropy", "grad_norm", "lr", "seconds",
            "images_per_second", "waiting"} <= steps[0].keys()
    for line in steps:
        assert line["loss"] == pytest.approx(0.1 * line["l1"] + line["cls"] + line["mim"], abs=1e-4)  # Eq. 5 and 6
    assert [line["lr"] for line in steps[:2]] == pytest.approx([5e-4, 1e-3]) and steps[-1]["lr"] < 3e-5
    assert validations[-1]["step"] == 20 and 5 < validations[-1]["val_psnr"] < 40
    assert Image.open(straight / "reconstructions.png").width >= 8 * 32
    state = checkpoint(straight)
    assert state["finished"] and state["step"] == 20 and state["constants"]["patch_size"] == 4
    assert {path.name for path in straight.glob("[!.]*")} == {"checkpoint.pt", "log.jsonl", "reconstructions.png"}


@pytest.mark.filterwarnings("ignore:.*pretrained:UserWarning", "ignore:.*weight enum:UserWarning")
def test_the_perceptual_loss_counts_and_is_learnt_from(tmp_path, here, monkeypatch):
    """L_rec = L1 + λ_p LPIPS, over random features, since VGG's weights can't be had here: in the log, in the sum, and
    smaller than without λ_p at the end."""
    torch.manual_seed(0)
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).requires_grad_(False)
    for conv in network.net.modules():
        if isinstance(conv, torch.nn.Conv2d):  # so that differences do not fade from layer to layer
            torch.nn.init.kaiming_normal_(conv.weight)
    monkeypatch.setattr(pretrained, "load_lpips", lambda *_: network)
    same = dict(shapes_images=8, epochs=30, learning_rate=3e-3, warmup_epochs=5, ssl_method="none", alpha=1)
    here(**same, lpips_weight=2, dtype="bfloat16", out_dir=tmp_path / "with")
    here(**same, lpips_weight=1e-6, out_dir=tmp_path / "without")
    with_lpips, without = log(tmp_path / "with")[0], log(tmp_path / "without")[0]
    for line in with_lpips:
        assert line["loss"] == pytest.approx(line["l1"] + 2 * line["lpips"], rel=1e-4)
    assert with_lpips[0]["lpips"] == pytest.approx(without[0]["lpips"], rel=0.02) and with_lpips[0]["lpips"] > 0.01
    assert with_lpips[-1]["lpips"] < 0.9 * without[-1]["lpips"]


def test_joint_training_learns_to_reconstruct(tmp_path, here):
    """Eight images by heart, with self-supervision: the reconstruction's gradient gets through beside iBOT's."""
    here(shapes_images=8, epochs=80, warmup_epochs=5, learning_rate=3e-3, log_every=5, out_dir=tmp_path)
    l1 = [line["l1"] for line in log(tmp_path)[0]]
    assert l1[-1] < 0.6 * l1[0]


def test_the_teacher_follows_the_student(straight, tmp_path, here):
    """An average of the student's past, of encoder and head: on the way from where both began, and not yet as far. The
    prototypes are trained from the second epoch on, half of all steps."""
    here(shapes_images=8, learning_rate=0, min_learning_rate=0, out_dir=tmp_path)  # one step that changes nothing
    start, now = checkpoint(tmp_path), checkpoint(straight)
    encoder, prototypes = "encoder.patch_embed.weight", "heads.cls.prototypes"
    cases = [(start["tokenizer"][encoder], now["teacher"][encoder], now["tokenizer"][encoder]),
             (start["heads"]["cls.prototypes"], now["teacher"][prototypes], now["heads"]["cls.prototypes"])]
    for began, teacher, student in cases:
        way, all_the_way = (teacher - began).flatten(), (student - began).flatten()
        assert torch.cosine_similarity(way, all_the_way, dim=0) > 0.5
        assert 0.001 < way.norm() / all_the_way.norm() < 0.2
    assert torch.equal(start["teacher"][encoder], start["tokenizer"][encoder])
    assert {int(each["step"]) for each in now["optimizer"]["adamw"]["state"].values()} == {10, 20}


def test_latents_of_a_finished_run_are_normalised(straight):
    """What stage 2 trains on: mean 0 and deviation 1 per channel over the training images, without doing anything."""
    state = checkpoint(straight)
    tcae = TCAE.from_constants(state["constants"]).requires_grad_(False)
    tcae.load_state_dict(state["tokenizer"])
    source = data.open_split("shapes", "train", 32, 80)
    pixels = torch.from_numpy(np.stack([data.center_crop(source.load(i), 32) for i in range(80)]))
    z = tcae.encode(data.to_float(pixels, "cpu")).double()
    assert z.shape == (80, 6, 4, 4)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(6).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(6).double(), rtol=0, atol=1e-4)
    assert not torch.equal(tcae.latent_std, torch.ones_like(tcae.latent_std))


# ----------------------------------------------------------------------------------------------------------------------
# Stopped and resumed


@pytest.mark.parametrize("place, words", [
    ("runtime.Progress.add", "ValueError: where it says"),
    ("train_tokenizer.Views.__call__", "error: data_dir: 100 images of one micro-batch can't be used: .*Error: where it says")])
def test_an_exception_ends_the_run_at_once(tmp_path, place, words):
    """In the training process or in a loading worker. The workers, which ignore SIGTERM, must neither keep it for half
    a minute nor have the last word."""
    result = run_script("-c", f"""
import os, sys, time, runtime, train_tokenizer

def fail(*_):
    print(time.time(), flush=True)
    raise ValueError("where it says")

{place} = fail
sys.argv = ["train_tokenizer.py", *{arguments(workers=2, out_dir=tmp_path)!r}]
train_tokenizer.main()
""", ok=False)
    assert time.time() - float(result.stdout.split()[-1]) < 5
    assert re.fullmatch(words, result.stderr.splitlines()[-1]) and result.returncode == 1


def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_weights(straight, tmp_path, here):
    """Ctrl-C midway saves and exits 0, though the loading worker gets it too, as from a terminal. Resumed, with other
    workers, every tensor is the same bit for bit. In between, starting again without resume and with another
    constant are both refused and change nothing."""
    same = dict(epochs=2, freeze_prototypes_epochs=1, out_dir=tmp_path)
    process = subprocess.Popen([sys.executable, "train_tokenizer.py", *arguments(**same, workers=1)], cwd=ROOT,
                               text=True, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    path = tmp_path / "log.jsonl"
    while not (path.exists() and path.read_text().count("\n")) and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped: saved" in printed and str(tmp_path / "checkpoint.pt") in printed
    stopped = checkpoint(tmp_path)["step"]
    assert 0 < stopped < 20 and not checkpoint(tmp_path)["finished"]

    before = (tmp_path / "checkpoint.pt").read_bytes()
    refused = failure(here, **same)
    assert f"out_dir={tmp_path}" in refused and "resume" in refused
    refused = failure(here, **{**same, "resume": True, "learning_rate": 0.5})
    assert "learning_rate was 0.001, is 0.5" in refused and "workers" not in refused
    assert (tmp_path / "checkpoint.pt").read_bytes() == before

    resumed = run_script("train_tokenizer.py", *arguments(**same, resume=True, save_every=3))
    assert f"at step {stopped}" in resumed.stdout
    ours, theirs = checkpoint(tmp_path), checkpoint(straight)
    assert {"tokenizer", "heads", "teacher", "centers", "optimizer"} <= ours.keys()
    ours, theirs = tensors(ours), tensors(theirs)
    assert ours.keys() == theirs.keys() and len(ours) > 200
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert [line["step"] for line in log(tmp_path)[0]] == list(range(1, 21))


@pytest.mark.parametrize("method, heads", [("dino", 1), ("dinov2", 2)])
def test_other_methods_train_and_resume(method, heads, tmp_path, here):
    """DINO has no mask token to train, DINOv2 a head of their own for patches, both with their teacher's."""
    here(ssl_method=method, out_dir=tmp_path / "straight")
    with stop_after(4):
        here(ssl_method=method, out_dir=tmp_path / "stopped")
    assert checkpoint(tmp_path / "stopped")["step"] == 4
    here(ssl_method=method, out_dir=tmp_path / "stopped", resume=True)
    state = checkpoint(tmp_path / "stopped")
    ours, theirs = tensors(state), tensors(checkpoint(tmp_path / "straight"))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    for part in state["heads"], {name.removeprefix("heads."): x for name, x in state["teacher"].items()}:
        assert torch.equal(part["cls.prototypes"], part["patch.prototypes"]) == (heads == 1)
    for line in log(tmp_path / "straight")[0]:
        terms = line["cls"] + line["mim"] + line.get("koleo", 0)
        assert line["loss"] == pytest.approx(0.1 * line["l1"] + terms, abs=1e-4)


def test_muon_trains_and_resumes(tmp_path, here):
    """To the same weights, bit for bit, with one Muon's and one AdamW's state."""
    same = dict(optimizer="muon")
    here(**same, out_dir=tmp_path / "straight")
    with stop_after(4):
        here(**same, out_dir=tmp_path / "stopped")
    here(**same, out_dir=tmp_path / "stopped", resume=True)
    ours, theirs = (tensors(checkpoint(tmp_path / name)) for name in ("stopped", "straight"))
    assert ours.keys() == theirs.keys() and any("/muon/" in name for name in ours)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_finished_run_that_is_resumed_changes_nothing(straight, here):
    """A job that is queued again after its end: no further step, no other latents."""
    before = tensors(checkpoint(straight))
    before = {name: tensor.clone() for name, tensor in before.items()}
    with pytest.raises(SystemExit) as end:
        here(epochs=2, freeze_prototypes_epochs=1, out_dir=straight, resume=True)
    assert not end.value.code, "not a failure"
    after = tensors(checkpoint(straight))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


# ----------------------------------------------------------------------------------------------------------------------
# Split


@pytest.fixture(scope="module")
def two_steps():
    """Constants of a run of two steps."""
    return dict(shapes_images=16, stats_images=16, warmup_epochs=0, learning_rate=1e-4)


def assert_the_same_run(one, other):
    """To float tolerance: the loss terms of both steps, the centres, the gradients and the weights. Adam divides each
    gradient by its own size, so that where it is nearly 0 (a key's bias) its rounding decides the sign of an update."""
    for a, b in zip(log(one)[0], log(other)[0], strict=True):
        for name in "loss", "l1", "cls", "mim", "teacher_entropy", "grad_norm":
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=2e-5), name
    a, b = checkpoint(one), checkpoint(other)
    for name in a["centers"]:
        torch.testing.assert_close(a["centers"][name], b["centers"][name], rtol=0, atol=1e-5)
        assert a["centers"][name].abs().max() > 1e-3
    gradients = [torch.cat([mean.flatten() for name, mean in tensors(x["optimizer"]).items()
                            if name.endswith(("/exp_avg", "/mean"))]) for x in (a, b)]
    assert gradients[0].norm() > 0.05
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()
    for part in "tokenizer", "heads", "teacher":
        x, y = (torch.cat([tensor.flatten() for name, tensor in tensors(state[part]).items() if "latent" not in name])
                for state in (a, b))
        assert (x - y).abs().mean() < 2e-7, part  # two updates move each weight by up to 2e-4


@pytest.fixture(scope="module")
def alone(two_steps, tmp_path_factory):
    """The folder of the run in one process, without accumulation."""
    out_dir = tmp_path_factory.mktemp("alone")
    run_script("train_tokenizer.py", *arguments(**two_steps, out_dir=out_dir))
    return out_dir


def test_two_processes_with_half_the_batch_each_do_the_same(alone, two_steps, tmp_path):
    """Loss, gradients, centres: eight GPUs train the same tokenizer as one."""
    run_script("train_tokenizer.py", *arguments(**two_steps, out_dir=tmp_path), nproc=2)
    assert_the_same_run(alone, tmp_path)


def test_accumulation_does_the_same(alone, two_steps, tmp_path, here):
    """Half the memory, the same step: losses and centres are of the whole batch."""
    here(**two_steps, accumulate=2, out_dir=tmp_path)
    assert_the_same_run(alone, tmp_path)


def test_muon_in_two_processes_and_accumulated(two_steps, tmp_path, here):
    """Its update is of the whole batch's gradient, and the same in every process."""
    same = {**two_steps, "optimizer": "muon"}
    here(**same, out_dir=tmp_path / "one")
    here(**same, accumulate=2, out_dir=tmp_path / "accumulated")
    fork_two(here, **same, out_dir=tmp_path / "two")
    for other in "accumulated", "two":
        assert_the_same_run(tmp_path / "one", tmp_path / other)


@pytest.mark.parametrize("method", ["dino", "dinov2"])
def test_other_methods_in_two_processes(method, two_steps, tmp_path, here):
    """DINO is the same run, and so are DINOv2's targets, which the processes find together; KoLeo is each one's own, so
    that DINOv2's second step differs."""
    here(**two_steps, ssl_method=method, out_dir=tmp_path / "one")
    fork_two(here, **two_steps, ssl_method=method, out_dir=tmp_path / "two")
    one, two = (log(tmp_path / name)[0] for name in ("one", "two"))
    for a, b in list(zip(one, two, strict=True))[:2 if method == "dino" else 1]:
        assert ("koleo" in a) == ("koleo" in b) == (method == "dinov2") and (a["mim"] == 0) == (method == "dino")
        for name in ("l1", "cls", "mim", "teacher_entropy") + (("loss", "grad_norm") if method == "dino" else ()):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=2e-5), name


# ----------------------------------------------------------------------------------------------------------------------
# One step, looked at closely


@pytest.mark.parametrize("ssl_method", ["ibot", "none"])
def test_every_trained_parameter_gets_a_gradient_and_the_teacher_none(here, tmp_path, monkeypatch, ssl_method):
    """DistributedDataParallel hangs or fails on parameters without gradient; a teacher with one is no teacher."""
    step, joint, seen = torch.optim.AdamW.step, JointTokenizer.__init__, SimpleNamespace()

    def note_model(model, *arguments):
        joint(model, *arguments)
        seen.model = model

    def check_gradients(optimizer):
        for name, p in seen.model.named_parameters():
            assert (p.grad is not None) == p.requires_grad, name
        encoder = seen.model.tcae.encoder
        assert encoder.mask_token.requires_grad == (ssl_method == "ibot")
        assert ssl_method == "none" or encoder.mask_token.grad.abs().sum() > 0
        return step(optimizer)

    monkeypatch.setattr(JointTokenizer, "__init__", note_model)
    monkeypatch.setattr(torch.optim.AdamW, "step", check_gradients)
    here(ssl_method=ssl_method, shapes_images=16, out_dir=tmp_path)
    assert ("cls" in log(tmp_path)[0][0]) == (ssl_method == "ibot")


def test_the_teacher_sees_what_the_student_must_guess(here, tmp_path, monkeypatch):
    """With other pixels where the student's tokens are masked its logits stay, and the teacher's targets change."""
    output, calls = train_tokenizer.ssl_output, []

    def call_twice(encoder, heads, views, student):
        hidden = views["mask"].repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
        result, crops = output(encoder, heads, views, student), views["global_crops"]
        changed = {**views, "global_crops": torch.where(hidden, -crops, crops)}
        calls.append((student, result, output(encoder, heads, changed, student)))
        return result

    monkeypatch.setattr(train_tokenizer, "ssl_output", call_twice)  # the teacher's call
    monkeypatch.setattr(model, "ssl_output", call_twice)  # the student's
    here(shapes_images=8, out_dir=tmp_path)
    (first, student, student_changed), (second, teacher, teacher_changed) = calls
    assert first and not second and len(student.patch_logits) > 0
    assert (len(student.cls_logits), len(teacher.cls_logits)) == ((2 + 2) * 8, 2 * 8), "local crops are the student's"
    assert torch.equal(student.patch_logits, student_changed.patch_logits)
    assert torch.equal(student.cls, student_changed.cls) and not student.cls.requires_grad == teacher.cls.requires_grad
    assert not torch.isclose(teacher.patch_logits, teacher_changed.patch_logits, atol=1e-6).all(1).any()


# ----------------------------------------------------------------------------------------------------------------------
# Other settings


def test_without_self_supervision_it_trains_on_a_folder_of_images(tmp_path, here):
    """The paper's baseline (Table 2), here without staged compression and on files: odd sizes, grey and colour."""
    for split in "train", "test":
        for k in range(2):
            (tmp_path / split / f"class {k}").mkdir(parents=True)
            for i in range(12):
                image = data.Shapes("train", 100, 40).load(12 * k + i).resize((40 + i, 45))
                path = tmp_path / split / f"class {k}" / f"{i}.{('png', 'jpg', 'webp')[i % 3]}"
                image.convert("L" if i % 4 == 3 else "RGB").save(path)
    out_dir = tmp_path / "out"
    here(data_dir=tmp_path, ssl_method="none", stc_depth=0, compression="shuffle", epochs=5, stats_images=24,
         out_dir=out_dir, eval_every=5)
    steps, validations = log(out_dir)
    assert "cls" not in steps[0] and "grad_norm" in steps[0] and len(steps) == 15
    assert all(line["loss"] == pytest.approx(0.1 * line["l1"], abs=1e-5) for line in steps)
    assert [line["step"] for line in validations] == [5, 10, 15]
    assert "heads" not in checkpoint(out_dir)


def test_without_local_crops_it_trains(tmp_path, here):
    """iBOT's other recipe: two global crops alone."""
    here(local_crops=0, out_dir=tmp_path)
    assert checkpoint(tmp_path)["finished"]


def test_validation_does_not_depend_on_the_log_s_rhythm(tmp_path, here):
    """Each constant counts steps by itself."""
    here(eval_every=3, log_every=4, save_every=100, out_dir=tmp_path)
    assert [line["step"] for line in log(tmp_path)[1]] == [3, 6, 9, 10]


def test_a_validation_batch_without_any_good_image(tmp_path, here, monkeypatch):
    """The last batch may be one broken file: it counts for nothing, and the run goes on."""
    monkeypatch.setattr(data, "eval_batch_size", lambda _: 4)
    monkeypatch.setattr(data, "BAD_SHARE", 0.5)
    for split, count in ("train", 8), ("val", 5):
        (tmp_path / split / "class").mkdir(parents=True)
        for i in range(count):
            data.Shapes(split, 10, 32).load(i).save(tmp_path / split / "class" / f"{i}.png")
    (tmp_path / "val" / "class" / "4.png").write_bytes(b"")
    here(data_dir=tmp_path, out_dir=tmp_path / "out")
    assert checkpoint(tmp_path / "out")["finished"] and log(tmp_path / "out")[1][0]["val_psnr"] > 5


@pytest.mark.parametrize("mended", [False, True])
def test_a_resumed_run_counts_the_bad_files_of_before(tmp_path, here, monkeypatch, mended):
    """One of eight may be bad: one before the stop and one after it are too many, unless the first is mended."""
    monkeypatch.setattr(data, "BAD_SHARE", 0.125)
    for split in "train", "val":
        (tmp_path / split / "class").mkdir(parents=True)
        for i in range(8):
            data.Shapes(split, 10, 32).load(i).save(tmp_path / split / "class" / f"{i}.png")
    bad, good = tmp_path / "train/class/0.png", tmp_path / "train/class/1.png"
    constants = dict(data_dir=tmp_path, out_dir=tmp_path / "out", batch_size=4, epochs=4)
    bad.write_bytes(b"")
    with stop_after(4):
        here(**constants)
    assert list(checkpoint(tmp_path / "out")["bad_files"]) == [str(bad)]
    if mended:
        bad.write_bytes(good.read_bytes())
    good.write_bytes(b"")
    if mended:
        here(**constants, resume=True)
        assert checkpoint(tmp_path / "out")["finished"]
    else:
        with pytest.raises(SystemExit, match=f"2 of 8 images can't be used, over 12%: {bad} .*, {good} "):
            here(**constants, resume=True)


def test_every_step_follows_its_schedules(here, tmp_path, monkeypatch):
    """The rate rises and falls along a cosine, the teacher's momentum rises along one to 1, its temperature along a
    line; and the gradient that reaches the optimizer is no longer than grad_clip."""
    step, average, loss, seen = torch.optim.AdamW.step, optim.update_ema, ssl.IBOTLoss.cls_loss, []

    def call_loss(self, student, teacher, teacher_temp):
        seen.append({"temperature": teacher_temp})
        return loss(self, student, teacher, teacher_temp)

    def make_step(optimizer):
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.cat([p.grad.flatten() for p in trained]).norm().item()
        seen[-1].update(rate=optimizer.param_groups[0]["lr"], norm=norm)
        return step(optimizer)

    def update_ema(averaged, trained, momentum):
        seen[-1]["momentum"] = momentum
        average(averaged, trained, momentum)

    monkeypatch.setattr(ssl.IBOTLoss, "cls_loss", call_loss)
    monkeypatch.setattr(torch.optim.AdamW, "step", make_step)
    monkeypatch.setattr(optim, "update_ema", update_ema)
    here(grad_clip=0.01, teacher_temp_warmup_epochs=0.5, learning_rate=1e-3, min_learning_rate=1e-6,
         teacher_momentum=0.9, out_dir=tmp_path)
    falls = [(1 + np.cos(np.pi * k / 8)) / 2 for k in range(8)]  # after the two steps of warm-up
    for name, expected in {
            "temperature": [*np.linspace(0.04, 0.07, 6), *[0.07] * 4], "norm": [0.01] * 10,
            "rate": [0.5e-3, 1e-3, *(1e-6 + (1e-3 - 1e-6) * x for x in falls)],
            "momentum": [1 - 0.1 * (1 + np.cos(np.pi * k / 10)) / 2 for k in range(10)]}.items():
        assert [each[name] for each in seen] == pytest.approx(expected, rel=1e-3), name


def test_the_defaults_are_the_paper_s():
    """Table 7, left, and Sec. 4.1; iBOT's crops, head and teacher."""
    table = dict(epochs=50, batch_size=512, betas=(0.9, 0.95), weight_decay=0.04, learning_rate=1e-3,
                 min_learning_rate=1e-6, warmup_epochs=5, lpips_weight=1, alpha=0.1,
                 ssl_method="ibot", image_size=256, patch_size=8, downsample=32, latent_channels=128, stc_depth=6,
                 compression="conv", encoder="S", decoder="S", global_crop_size=224, global_crop_scale=(0.25, 1),
                 local_crops=10, local_crop_size=96, local_crop_scale=(0.05, 0.25), prototypes=8192,
                 teacher_momentum=0.996, teacher_temp=(0.04, 0.07), teacher_temp_warmup_epochs=30, grad_clip=3,
                 freeze_prototypes_epochs=1, optimizer="adamw")
    assert {name: getattr(train_tokenizer, name) for name in table} == table


def test_sigterm_in_a_validation_is_not_waited_for(straight, here, tmp_path, monkeypatch):
    """It saves; no PSNR of a part of the images is logged, but after a restart that of all. Resumed it is the run that
    nothing stopped. So it is where the latents are measured, which comes last."""
    same = dict(epochs=2, freeze_prototypes_epochs=1, out_dir=tmp_path, resume=True)
    for place, name, eval_every, step, logged in (
            (data, "psnr", 5, 5, []), (train_tokenizer, "measure_latents", 5, 20, [5, 10, 15])):
        plain = getattr(place, name)
        with monkeypatch.context() as patch:
            patch.setattr(place, name, lambda *given: (signal.raise_signal(signal.SIGTERM), plain(*given))[1])
            here(**same, eval_every=eval_every)
        assert (checkpoint(tmp_path)["step"], checkpoint(tmp_path)["finished"]) == (step, False)
        assert [line["step"] for line in log(tmp_path)[1]] == logged
    here(**same)
    assert [line["step"] for line in log(tmp_path)[1]] == [5, 10, 15, 20]
    ours, theirs = tensors(checkpoint(tmp_path)), tensors(checkpoint(straight))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_a_run_that_another_one_saves_while_this_one_starts(tmp_path, here, monkeypatch):
    """It was being stopped, which takes seconds; its last steps must not be lost."""
    plain = data.open_splits
    monkeypatch.setattr(data, "open_splits", lambda *given: ((tmp_path / "checkpoint.pt").touch(), plain(*given))[1])
    assert "start it again" in failure(here, out_dir=tmp_path)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_loss_that_breaks_stops_the_run_and_keeps_the_checkpoint(tmp_path, here):
    """With the step and the term, and the last checkpoint as it was before."""
    message = failure(here, learning_rate=1e30, warmup_epochs=0, save_every=1, out_dir=tmp_path)
    assert "step 2" in message and "learning_rate" in message and str(tmp_path / "checkpoint.pt") in message
    assert any(f" {term} is " in message for term in ("loss", "l1", "cls", "mim", "grad_norm"))
    assert checkpoint(tmp_path)["step"] == 1
    assert [line["step"] for line in log(tmp_path)[0]] == [1]


def test_vgg_weights_that_can_not_be_had_end_the_run_before_its_first_step(tmp_path):
    """On a machine without network: which file, from where, to which path, and which constant does without it."""
    closed = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    result = run_script("train_tokenizer.py", *arguments(lpips_weight=1, out_dir=tmp_path / "out"), ok=False,
                        TORCH_HOME=tmp_path, no_proxy="", NO_PROXY="", **closed)
    message = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and message.startswith("error: ")
    url = "https://download.pytorch.org/models/vgg16-397923af.pth"
    path = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    assert all(word in message for word in ("vgg16", url, str(path), "lpips_weight=0"))
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes, words", [
    (dict(batch_size=9, accumulate=2), ["batch_size=9", "2"]),
    (dict(batch_size=2, accumulate=2, ssl_method="dinov2"), ["batch_size=2", "4"]),
    (dict(batch_size=0), ["batch_size=0"]),
    (dict(batch_size=96), ["batch_size=96", "80"]),
    (dict(global_crop_size=36), ["global_crop_size=36", "8", "32", "40"]),
    (dict(local_crop_size=12), ["local_crop_size=12", "8", "16"]),
    (dict(patch_size=5, global_crop_size=40, local_crop_size=20), ["patch_size=5"]),
    (dict(patch_size=3, stc_depth=0, ssl_method="none"), ["patch_size=3", "image_size=32"]),
    (dict(downsample=12), ["downsample=12"]),
    (dict(ssl_method="ibto"), ["ssl_method='ibto'", "ibot", "none"]),
    (dict(stc_depth=3), ["stc_depth=3", "2"]),
    (dict(compression="pool"), ["compression='pool'", "conv", "shuffle"]),
    (dict(dtype="float16"), ["dtype='float16'"]), (dict(optimizer="sgd"), ["optimizer='sgd'", "adamw or muon"]),
    (dict(epochs=0), ["epochs=0"]), (dict(save_every=0), ["save_every=0"]), (dict(prototypes=0), ["prototypes=0"]),
    (dict(accumulate=0), ["accumulate=0"]), (dict(shapes_images=0), ["shapes_images=0"]),
    (dict(betas="(0.9, 1.0)"), ["betas=(0.9, 1.0)"]), (dict(betas="('a', 'b')"), ["betas="]),
    (dict(teacher_momentum=1.5), ["teacher_momentum=1.5"]),
    (dict(global_crop_scale="(0.5, 0.2)"), ["global_crop_scale=(0.5, 0.2)"]),
    (dict(data_dir="/nonexistent/images"), ["data_dir=/nonexistent/images"]),
    (dict(patch_sise=8), ["patch_sise", "patch_size"]),
])
def test_a_wrong_constant_is_one_line_that_names_it(here, tmp_path, changes, words):
    """And says what it may be; nothing is written."""
    message = failure(here, **changes, out_dir=tmp_path / "out")
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()
