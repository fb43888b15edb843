from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import checkpoints
from checkpoints import Build, quiet
from edgeq import data
from edgeq.checkpoint import Checkpoint
from edgeq.errors import OutOfMemory
from edgeq.model import read_config
from edgeq.recipe import parse, plain
from edgeq.walk import footprint, sensitivity, windows

TEXT = (data.folder("demo") / "heldout.txt").read_text(encoding="utf-8")
COUNT, LENGTH = 8, 256
PROGRAM = """
import json, sys, threading
from pathlib import Path
import numpy as np
from edgeq import data
from edgeq.checkpoint import Checkpoint
from edgeq.profiling import memory
from edgeq.recipe import parse, plain
from edgeq.walk import run, sensitivity, windows

folder, kept, name, count, length = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:])
done, seen = threading.Event(), [0]

def watch():
    while not done.wait(0.002):
        seen.append(memory.read().anonymous_bytes)

thread = threading.Thread(target=watch)
thread.start()
checkpoint = Checkpoint.open(folder)
held = windows.quick(checkpoint, (data.folder("demo") / "heldout.txt").read_text(encoding="utf-8"), 128)
text = np.random.default_rng(0).integers(0, 256, (count, length)).astype(np.int32)
wanted = parse(name)
quiet = lambda *_: None
if wanted.mixed:
    layouts = [plain(4, 32), plain(8, 32)]
    every, groups = dict.fromkeys(sensitivity.units(checkpoint.model), layouts), dict.fromkeys(layouts, 32)
    texts = [text[: count // 2], text[count // 2 :]]
    sensitivity.measure(checkpoint, every, groups, 16, texts, kept, quiet, feedback=True)
else:
    run.quantize(checkpoint, wanted, held, *((text, kept) if wanted.calibrated else (None, None)), quiet)
done.set()
thread.join()
print(json.dumps(max(seen)))
"""


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of 36 million parameters."""
    folder = checkpoints.write(tmp_path_factory.mktemp("middle") / "middle", "3")
    config = checkpoints.config_of("3") | {
        "hidden_size": 512,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 48_000,
    }
    checkpoints.write_json(folder / "config.json", config)
    tensors = checkpoints.random_tensors(read_config(config), 0, False)
    checkpoints.write_weights(folder, tensors, "BF16", 1)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("name", ["w4g32-e8-rtn", "w4g32-e8-gptq", "w4g32-e8-guided", "w4g32-e8-tuned", "mix4.5-gptq"])
def test_the_prediction_covers_what_a_walk_takes_and_not_much_more(middle: Path, tmp_path: Path, name: str) -> None:
    words = [sys.executable, "-c", PROGRAM, str(middle), str(tmp_path), name, str(COUNT), str(LENGTH)]
    measured = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    checkpoint = Checkpoint.open(middle)
    held = windows.quick(checkpoint, TEXT, 128)
    predicted = footprint.predict(checkpoint.model, held, parse(name), COUNT * LENGTH)
    assert measured <= predicted
    beside_the_library = predicted - footprint._LIBRARY_BYTES
    assert beside_the_library <= 2 * measured


def test_more_of_anything_takes_more(tiny: Build) -> None:
    checkpoint = Checkpoint.open(tiny("3"))
    few, many = (windows.quick(checkpoint, TEXT[:size], 128) for size in (300, 3000))
    names = [None, *map(parse, ("w4g32-e8-rtn", "w4g32-e8-gptq", "w4g32-e8-guided"))]
    sizes = [footprint.predict(checkpoint.model, few, each, 10_000) for each in names]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4
    for each in names:
        assert footprint.predict(checkpoint.model, few, each) < footprint.predict(checkpoint.model, many, each)
    disk = [footprint.disk(checkpoint.model, each, 10_000) for each in names if each is not None]
    assert disk == sorted(disk)
    assert disk[0] == 0 < footprint.disk(checkpoint.model, parse("w4g32-e8-guided"), 9_000) < disk[2]
    tuned = [footprint.disk(checkpoint.model, parse("w4g32-e8-tuned"), 10_000, tokens) for tokens in (0, 40_000)]
    assert disk[2] < tuned[0] < tuned[1]


def test_files_of_a_walk_backwards_are_as_large_as_predicted(tiny: Build, tmp_path: Path) -> None:
    checkpoint, tokens = Checkpoint.open(tiny("3")), windows.drawn(3, 40, 250)
    layouts = [plain(8, 32)]
    every, groups = dict.fromkeys(sensitivity.units(checkpoint.model), layouts), dict.fromkeys(layouts, 0)
    sensitivity.measure(checkpoint, every, groups, 16, [tokens], tmp_path, quiet, feedback=False)
    found = sum(path.stat().st_size for path in tmp_path.iterdir())
    predicted = footprint.gradients(checkpoint.model, tokens.size)
    assert predicted <= found <= predicted + 4000  # headers, markers and costs


def test_a_walk_that_does_not_fit_is_refused_with_both_figures(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(tiny("3"))
    held = windows.quick(checkpoint, TEXT, 128)
    needed = footprint.predict(checkpoint.model, held, None)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=needed))
    footprint.require(checkpoint.model, held, None)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=needed - 1))
    with pytest.raises(OutOfMemory, match=rf"needs about {needed / 1e9:.1f} GB of memory, ") as caught:
        footprint.require(checkpoint.model, held, None)
    assert caught.value.exit_code == 21
