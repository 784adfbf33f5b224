"""README.md: what it says of the code is true."""
import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

import runtime
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def commands():
    """Every line of the README's shell blocks that runs a script of the project, without comments and the launcher."""
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            scripts = [k for k, word in enumerate(words) if word.endswith(".py") and not word.startswith("config/")]
            if scripts:
                yield words[scripts[0]:]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_s_constants_exist(words, monkeypatch):
    """Its config file and constants are those of its script, of the right type."""
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("script", ROOT / words[0])
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    runtime.configure(vars(script), words[1:])


def test_the_files_are_about_as_long_as_it_says():
    """All files of the top level are in the map, their lengths within a twentieth."""
    rows = re.findall(r"^\| ((?:`\w+\.py`(?:, )?)+) \| ([\d, ]+) \|", README, re.MULTILINE)
    said = {name: int(lines) for names, numbers in rows
            for name, lines in zip(re.findall(r"\w+\.py", names), numbers.split(", "), strict=True)}
    found = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    assert said == {name: pytest.approx(lines, rel=0.05) for name, lines in found.items()}


SHORTER = {  # for a smoke test: constants alone
    "runs/features.py": dict(shapes_images=128, epochs=1, dtype="float32"),
    "train_tokenizer.py": dict(shapes_images=64, epochs=1, workers=0, warmup_epochs=0.5, val_images=20, stats_images=32,
                               dtype="float32"),
    "train_dit.py": dict(size="32/1/2", epochs=1, decay_epoch=1, warmup_steps=0, batch_size=32, workers=0,
                         sample_steps=2, dtype="float32"),
    "sample.py": dict(steps=2, per_class=1, dtype="float32"),
    "eval.py": dict(val_images=40, probe_images=40, probe_steps=2, workers=0, dtype="float32"),
}


def test_the_stages_one_by_one_run_as_written(tmp_path, monkeypatch):
    """The five laptop commands, in an empty folder beside config/, each with less to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "runs"))
    (tmp_path / "config").symlink_to(ROOT / "config")
    block = next(block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "--pca=True" in block)
    commands = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert [script for script, *_ in commands] == list(SHORTER)
    for script, *words in commands:
        name = Path(script).stem
        module = sys.modules.get(name) or importlib.import_module(name)
        before = dict(vars(module))
        monkeypatch.setattr(sys, "argv", [script, *words, *(f"--{name}={x}" for name, x in SHORTER[script].items())])
        module.main()
        vars(module).update(before)
    for path in ("shapes_tokenizer/checkpoint.pt", "shapes_tokenizer/reconstructions.png", "shapes_dit/samples.png",
                 "samples/samples.png", "shapes_tokenizer/eval.json"):
        assert (tmp_path / "out" / path).stat().st_size > 0


def test_every_equation_is_where_the_table_says():
    """The name is in the file, and the equation's or section's or table's label too."""
    rows = re.findall(r"^\| (.*?) \| `(\S+)`.*? \| `(\w+)` \|$", README, re.MULTILINE)
    labels = [row[0].split(",")[0] for row in rows]
    assert labels[:8] == [*(f"Eq. {k}" for k in range(1, 7)), "Sec. 3.3", "Table 1"] and len(rows) == 13
    for k, (_, file, name) in enumerate(rows):
        source = (ROOT / file).read_text()
        assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE), (file, name)
        assert k >= 8 or labels[k] in source, (labels[k], file)


def test_every_file_that_it_names_is_there():
    for path in re.findall(r"`((?:config|docs|runs|tests)/[\w./]+\.\w+|\w+\.py)`|\]\((docs/[^)#]+)[^)]*\)", README):
        assert (ROOT / (path[0] or path[1])).exists(), path
