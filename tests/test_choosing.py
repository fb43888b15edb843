from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from checkpoints import Build, quiet
from edgeq import (
    backends,
    building,
    bundle,
    calibration,
    choosing,
    data,
    hub,
    planning,
    recipe,
    sensitivities,
    sheets,
    size,
    tables,
    units,
)
from edgeq import target as targets
from edgeq.backends.base import Progress
from edgeq.bundle import Source
from edgeq.calibration import Calibration
from edgeq.checkpoint import Checkpoint
from edgeq.choosing import Sensitivities
from edgeq.errors import CorruptInput, DiskFault, Interrupted, MissingTool, NothingFits, UsageFault
from edgeq.planning import Plan
from edgeq.quantize import mix
from edgeq.quantize.mix import Option
from edgeq.walk import footprint, sensitivity, windows

COARSE, FINE = recipe.plain(4, 32), recipe.plain(8, 32)
TEXT = data.held_out()[::-1]


def plan(folder: Path, **words: object) -> Plan:
    return planning.plan(str(folder), target="x86-avx2", context=256, **words)  # type: ignore[arg-type]


def skip_without(backend: str) -> None:
    """Skip a test whose engine is not installed."""
    packages = {"llamacpp": ("llama_cpp", "llama-cpp-python"), "mlc": ("tvm", "apache-tvm")}
    if backend in packages:
        module, name = packages[backend]
        pytest.importorskip(module, reason=f"{name} is not installed", exc_type=ImportError)


def made_up(work: Plan) -> Sensitivities:
    """Sensitivities of which the first unit loses a hundred times as much as each other."""
    units = {name: [name] for name in filter(size.is_quantized, work.shape.tensors())}
    options = {}
    for turn, name in enumerate(units):
        weights = math.prod(work.shape.tensors()[name])
        loss = 1e-2 if turn == 0 else 1e-4
        options[name] = [Option(COARSE, weights * 5 // 8, loss), Option(FINE, weights * 9 // 8, loss / 256)]
    return Sensitivities(options, units, 1000)


@pytest.mark.parametrize(
    ("engine", "target", "layouts", "groups"),
    [
        ("llamacpp", "x86-avx2", ["w4g32", "q5_0", "q4_k"], [32, 32, 256]),
        ("llamacpp", "jetson", ["w4g32", "q5_0", "q4_k"], [32, 32, 32]),
        ("llamacpp", "steamdeck", ["w4g32", "q5_0", "q4_k"], [32, 32, 32]),
        ("llamacpp", "m4", ["w4g32", "q5_0", "q4_k"], [0, 0, 0]),
        ("onnx", "x86-avx2", ["w4g32", "w4g128", "w4ag32", "w8g32"], [32, 128, 32, 32]),
        ("onnx", "pi5", ["w4g32", "w4g128", "w4ag32", "w8g32"], [sys.maxsize, sys.maxsize, 32, 32]),
        ("onnx", "raspberry-pi-4-8gb", ["w4g32", "w4g128"], [32, 128]),
        ("onnx", "steamdeck", ["w4g32", "w8g32"], [0, 0]),
    ],
)
def test_what_engines_round_activations_by_depends_on_the_device(
    engine: str, target: str, layouts: list[str], groups: list[int]
) -> None:
    device = targets.load(target)
    assert [backends.get(engine).activation_group(device, recipe.layout(each)) for each in layouts] == groups


def test_a_loss_is_that_of_the_arithmetic_of_the_gate_too(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    large = recipe.layout("q4_k")
    monkeypatch.setattr("edgeq.backends.llamacpp.tools", lambda _: ())
    for words, group in (({"max_size": 10**6}, 0), ({"max_loss": 0.1}, 256)):
        work = planning.plan(str(tiny("3")), target="m4", context=256, backend="llamacpp", **words)
        assert choosing._activation_groups(work, [large]) == {large: group}


@pytest.mark.parametrize(("activations", "walks"), [(1e-4, 1), (6e-3, 2)])
def test_a_mix_is_chosen_again_when_its_weights_and_its_activations_lose_more_than_the_budget(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activations: float, walks: int
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    work = plan(tiny("3"), max_loss=0.01, calibration_text=str(tmp_path / "text.txt"), out=tmp_path / "bundle")
    found = made_up(work)
    name = next(iter(found.options))
    options = {each: [Option(COARSE, 10, 0.0), Option(FINE, 20, 0.0)] for each in found.options}
    options[name] = [Option(COARSE, 10, 1e-3, activations), Option(FINE, 20, 1e-6, 0.0)]
    monkeypatch.setattr(choosing, "measure", lambda *_: dataclasses.replace(found, options=options))
    seen = []

    def quantize(*given: object) -> object:
        seen.append(dict(given[1].chosen)[name])  # type: ignore[attr-defined]
        if len(seen) > 1:
            raise NothingFits("enough")
        return SimpleNamespace(weights_only=5e-3)

    monkeypatch.setattr("edgeq.walk.run.quantize", quantize)
    with pytest.raises((NothingFits, AttributeError)):
        building.build(work, quiet)
    assert seen == [COARSE, FINE][:walks]


def test_where_activations_are_rounded_coarsely_a_larger_layout_that_rounds_them_finely_is_chosen(tiny: Build) -> None:
    work = plan(tiny("3"), max_size=10**6)
    found = made_up(work)
    first, *rest = found.options
    options = {name: [Option(COARSE, 10, 1e-4, 5e-3), Option(FINE, 20, 1e-6, 1e-5)] for name in rest}
    options[first] = [Option(COARSE, 10, 2e-3, 0.0), Option(FINE, 20, 1e-6, 0.0)]
    room = 10 * len(options) + 10 * len(rest)
    settled, choice = choosing.settle(
        dataclasses.replace(work, max_size=room), dataclasses.replace(found, options=options, other_bytes=0)
    )
    chosen = dict(settled.recipe.chosen)
    assert chosen[first] == COARSE
    assert all(chosen[name] == FINE for name in rest)
    assert choice.loss == pytest.approx(2e-3 + 1e-6 * len(rest))


def test_a_budget_makes_auto_a_mix_with_the_best_recipes_cache_and_no_budget_does_not(tiny: Build) -> None:
    assert str(plan(tiny("3"), max_size=10**6).recipe) == "mix-guided"
    assert str(plan(tiny("3"), max_loss=0.1).recipe) == "mix-guided"
    assert str(plan(tiny("3"), max_size=10**6, backend="llamacpp").recipe) == "mix-guided-kv16"
    assert not plan(tiny("3")).recipe.mixed
    assert plan(tiny("3"), max_size=10**6).calibration == calibration.BUNDLED


def test_a_mix_without_a_budget_is_refused_with_one_that_has(tiny: Build) -> None:
    with pytest.raises(UsageFault, match="needs a budget") as caught:
        plan(tiny("3"), recipe_name="mix-gptq")
    assert "mix4.5-gptq" in caught.value.run


def test_a_backend_with_one_layout_for_all_refuses_a_mix(tiny: Build) -> None:
    with pytest.raises(UsageFault, match="one layout for all matrices"):
        plan(tiny("3"), recipe_name="mix4.5-guided", backend="null")


def test_bytes_go_to_the_matrix_that_needs_them(tiny: Build) -> None:
    work = plan(tiny("3"), max_size=10**6)
    found = made_up(work)
    smallest = sum(options[0].bytes for options in found.options.values())
    first = next(iter(found.options))
    grown = found.options[first][1].bytes - found.options[first][0].bytes
    settled, choice = choosing.settle(dataclasses.replace(work, max_size=smallest + grown + 1000), found)
    assert dict(settled.recipe.chosen)[first] == FINE
    assert {layout for name, layout in settled.recipe.chosen if name != first} == {COARSE}
    assert choice.loss == pytest.approx(sum(options[0].loss for options in found.options.values()), abs=0.0101)
    assert settled.bytes == size.weight_bytes(work.shape, settled.recipe, 32)


def test_a_loss_is_kept_with_the_fewest_bytes_and_a_choice_that_lost_more_is_made_again_with_more(tiny: Build) -> None:
    work = plan(tiny("3"), max_loss=0.01)
    found = made_up(work)
    settled, choice = choosing.settle(work, found)
    assert choice.cost <= 0.01
    again, _ = choosing.settle(work, found, scale=20.0)
    assert again.bytes > settled.bytes


def test_a_budget_that_nothing_keeps_is_refused_with_one_that_works(tiny: Build) -> None:
    work = plan(tiny("3"), max_size=2000)
    with pytest.raises(NothingFits, match=r"no mix of onnx fits 0\.00 MB") as caught:
        choosing.settle(work, made_up(work))
    enough = units.parse_bytes(caught.value.run.rpartition(" ")[2])
    settled, choice = choosing.settle(dataclasses.replace(work, max_size=enough), made_up(work))
    assert choice.bytes + 1000 <= enough <= choice.bytes + 1000 + 20_000
    assert settled.recipe.chosen
    assert caught.value.exit_code == 3
    tight = plan(tiny("3"), max_loss=1e-9)
    with pytest.raises(NothingFits, match="no mix is predicted to lose at most 1e-09"):
        choosing.settle(tight, made_up(tight))


def test_a_prediction_that_is_not_far_above_the_loss_is_left_for_a_walk_to_confirm(tiny: Build) -> None:
    found = made_up(plan(tiny("3"), max_loss=0.01))
    least = sum(options[-1].cost for options in found.options.values())
    for share, scale, refused in [(2.5, None, False), (3.5, None, True), (1.5, 1.0, True)]:
        work = plan(tiny("3"), max_loss=least / share)
        with pytest.raises(NothingFits) if refused else contextlib.nullcontext():
            settled, _ = choosing.settle(work, found, scale)
            assert {layout for _, layout in settled.recipe.chosen} == {FINE}


def test_a_loss_that_nothing_keeps_is_not_told_of_a_size_that_nobody_asked_for(tiny: Build) -> None:
    for size_asked, told in [(None, "--recipe w16"), (10**6, "a larger --max-size")]:
        tight = plan(tiny("3"), max_loss=1e-9, max_size=size_asked)
        with pytest.raises(NothingFits) as caught:
            choosing.settle(tight, made_up(tight))
        assert caught.value.run.endswith(told)


def test_states_lie_beside_the_bundles_place_else_where_they_can(tmp_path: Path) -> None:
    with choosing._scratch(tmp_path / "new" / "bundle", "key") as folder:
        assert folder == tmp_path / "new" / ".edgeq.walk.key"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with choosing._scratch(tmp_path / "file" / "bundle", "key") as folder:
        assert folder.is_dir()
    assert not folder.exists()


@pytest.fixture
def few(tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan whose mix is measured on two windows of a text, and whose bundle's place has no parent yet."""
    monkeypatch.setattr(windows, "FITTED", 2)
    (tmp_path / "text.txt").write_text(TEXT[:3000], encoding="utf-8")
    words = {"recipe_name": "mix6.5-rtn", "calibration_text": str(tmp_path / "text.txt"), "max_loss": 1000.0}
    return plan(tiny("3"), out=tmp_path / "new" / "bundle", **words)


def stop_at(step: int) -> Progress:
    """Progress that is interrupted there while sensitivities are measured."""

    def stop(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("gradients", step):
            raise Interrupted("stopped")

    return stop


def stopped(work: Plan, step: int) -> Path:
    """The folder that a preview which is stopped leaves."""
    with pytest.raises(Interrupted, match="goes on from what is done"):
        choosing.preview(work, stop_at(step))
    (folder,) = work.out.parent.iterdir()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3])
def test_a_preview_that_was_stopped_is_gone_on_with_by_a_build_that_was_stopped_and_another(
    few: Plan, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    folder = stopped(few, step)
    seen: list[int] = []

    def note(phase: str, done: int, total: int) -> None:
        if phase == "gradients":
            seen.append(done)

    with pytest.raises(Interrupted, match="goes on from what is done"):
        building.build(few, stop_at(step + 1))
    assert list(few.out.parent.iterdir()) == [folder]
    building.build(few, note)
    assert seen == list(range(step + 1, 2 * 2 + 1))
    assert list(few.out.parent.iterdir()) == [few.out]
    monkeypatch.setattr(sensitivities, "find", lambda _: None)
    straight, _ = choosing.preview(few, quiet)
    assert bundle.read(few.out).layouts == {name: layout.name for name, layout in straight.recipe.chosen}


def test_what_was_measured_stays_until_it_is_in_the_cache(few: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(key: str, options: object) -> None:
        raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(sensitivities, "keep", stop)
        with pytest.raises(Interrupted):
            choosing.preview(few, quiet)
    choosing.preview(few, stop_at(3))
    assert list(few.out.parent.iterdir()) == []


def test_a_damaged_measurement_is_refused_and_begun_anew(few: Plan) -> None:
    (stopped(few, 3) / "costs.json").write_bytes(b"damaged")
    with pytest.raises(CorruptInput, match="not what a walk kept") as caught:
        choosing.preview(few, quiet)
    assert caught.value.run == "edgeq build ... again, from the start"
    assert list(few.out.parent.iterdir()) == []
    assert choosing.preview(few, quiet)[0].recipe.chosen


def test_a_disk_with_too_little_room_is_refused_before_anything_is_measured(
    few: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = few.shape.context
    needed = footprint.gradients(few.shape, 3 * length) + (64 << 20)
    for free, refused in [(needed - 1, True), (needed, False)]:
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with pytest.raises(DiskFault) if refused else contextlib.nullcontext():
            choosing.preview(few, quiet)


def test_what_a_stopped_measurement_has_on_the_disk_needs_no_more_room(
    few: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped(few, 3)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    with (folder / "spare").open("wb") as stream:
        stream.truncate(footprint.gradients(few.shape, 3 * few.shape.context))
    choosing.preview(few, quiet)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnx", "llamacpp", "mlc"])
def test_a_built_mix_records_its_layouts_and_keeps_its_bits(tiny: Build, tmp_path: Path, backend: str) -> None:
    skip_without(backend)
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    folder = tiny("3")
    work = plan(
        folder, recipe_name="mix7.5-tuned", backend=backend, calibration_text=str(text), out=tmp_path / "bundle"
    )
    built = building.build(work, quiet)
    assert built.gate.passed
    assert built.bits_per_weight <= 7.5
    made = bundle.read(tmp_path / "bundle")
    assert made.layouts is not None
    assert set(made.layouts) == set(filter(size.is_quantized, Checkpoint.open(folder).model.tensors()))
    assert len(set(made.layouts.values())) > 1
    assert made.recipe == "mix7.5-tuned"
    assert not list(tmp_path.glob(".edgeq*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "below", "above"), [("onnx", 0, 200_000), ("llamacpp", 0, 2_000), ("mlc", 60_000, 60_000)]
)
@pytest.mark.parametrize("generation", ["3", "3.5"])
def test_a_bundles_bytes_are_predicted(
    tiny: Build, tmp_path: Path, backend: str, below: int, above: int, generation: str
) -> None:
    skip_without(backend)
    folder = tiny(generation, multimodal=generation == "3.5")
    work = plan(folder, recipe_name="w4g32-e8-rtn", backend=backend, out=tmp_path / "bundle", max_loss=1000.0)
    _, (_, predicted) = choosing.preview(work, quiet)
    assert predicted is not None
    building.build(dataclasses.replace(work, max_size=None), quiet)
    found = bundle.read(tmp_path / "bundle").bytes
    above += sum(path.stat().st_size for path in folder.glob("*.json"))
    assert found - below <= predicted <= found + above


def test_a_preview_settles_a_mix_and_leaves_other_plans_alone(tiny: Build, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    work = plan(tiny("3"), recipe_name="mix8-gptq", calibration_text=str(text), out=tmp_path / "bundle")
    settled, predicted = choosing.preview(work, quiet)
    assert settled.recipe.chosen
    assert predicted.loss is not None
    assert predicted.bytes == choosing._other_bytes(work, Checkpoint.open(tiny("3"))) + (
        settled.bytes - size.float_bytes(work.shape)
    )
    sheet = sheets.plan(dataclasses.replace(settled, max_size=10**6), predicted)
    assert (sheet.predicted_loss, sheet.bundle_bytes) == predicted
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(tables.plan(sheet))
    printed = console.export_text()
    assert f"; of this mix ~{predicted.loss:.2g}" in printed
    assert f"(not built, ~{units.show_bytes(predicted.bytes)} of {units.show_bytes(10**6)})" in printed
    assert not (tmp_path / "bundle").exists()
    other = plan(tiny("3"), recipe_name="w4g32-e8-rtn")
    assert choosing.preview(other, quiet) == (other, (None, choosing.bundle_bytes(other, Checkpoint.open(tiny("3")))))


def test_bytes_of_a_fixed_recipe_are_predicted_where_the_checkpoint_is_in_the_cache_and_nothing_is_fetched(
    tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = planning.plan("qwen3-0.6b", target="x86-avx2", recipe_name="w4g32-e8-rtn", backend="onnx")
    monkeypatch.setattr(hub, "download", lambda *_: pytest.fail("the checkpoint was fetched"))
    monkeypatch.setattr(hub, "cached", lambda *_: tiny("3"))
    assert choosing.preview(work, quiet)[1].bytes == choosing.bundle_bytes(work, Checkpoint.open(tiny("3")))

    def absent(*_: object) -> Path:
        raise MissingTool("not in the cache")

    monkeypatch.setattr(hub, "cached", absent)
    assert choosing.preview(work, quiet) == (work, (None, None))


def test_a_size_that_no_mix_has_is_refused_before_anything_is_measured(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    work = plan(tiny("3"), max_size=2000, calibration_text=str(tmp_path / "text.txt"), out=tmp_path / "bundle")
    monkeypatch.setattr("edgeq.walk.sensitivity.measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(NothingFits, match="no mix of onnx fits"):
        choosing.preview(work, quiet)


def test_where_no_mix_fits_the_advice_keeps_method_and_cache(tiny: Build) -> None:
    work = plan(tiny("3"), recipe_name="mix2.2-tuned-kv16", backend="llamacpp")
    with pytest.raises(NothingFits) as caught:
        choosing.settle(work, made_up(work))
    assert caught.value.run.startswith("edgeq build ... --recipe mix-tuned-kv16 --max-size ")


def test_a_mix_is_measured_on_windows_of_the_text_and_a_quarter_as_many_of_random_tokens(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    work = plan(tiny("3"), recipe_name="mix7.5-rtn", calibration_text=str(tmp_path / "text.txt"), out=tmp_path / "out")
    checkpoint = Checkpoint.open(tiny("3"))
    text = calibration.read(checkpoint, str(tmp_path / "text.txt"), False, 128, quiet)
    monkeypatch.setattr(windows, "FITTED", 5)
    seen: list[Any] = []
    find = sensitivity.measure

    def note(*given: Any, **named: Any) -> list[dict[str, list[Option]]]:
        found = find(*given, **named)
        seen.extend((given[4], found))
        return found

    monkeypatch.setattr(sensitivity, "measure", note)
    found = choosing.measure(work, checkpoint, Source("folder", "tiny", None, ()), text, quiet)
    (read, drawn), (of_text, of_drawn) = seen
    assert len(text.windows) > 5
    assert (read == windows.fitted(text.windows)).all()
    assert (len(read), drawn.shape) == (5, (2, read.shape[1]))
    assert len(np.unique(drawn)) > 0.5 * min(drawn.size, checkpoint.model.vocab)
    assert found.options == mix.hedged(of_text, of_drawn) != of_text


@pytest.mark.parametrize(
    ("name", "count"), [("mix7.5-guided", 2), pytest.param("mix7.5-tuned", 5, marks=pytest.mark.slow)]
)
def test_a_preview_measures_over_the_windows_that_a_build_would(
    tiny: Build, tmp_path: Path, name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "WINDOWS", 2)
    monkeypatch.setattr(calibration, "TUNED", 5)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    seen: list[int] = []
    find = choosing.measure

    def note(
        work: Plan, checkpoint: Checkpoint, source: Source, text: Calibration, progress: Progress
    ) -> Sensitivities:
        seen.append(len(text.windows))
        return find(work, checkpoint, source, text, progress)

    monkeypatch.setattr(choosing, "measure", note)
    work = plan(tiny("3"), recipe_name=name, calibration_text=str(tmp_path / "text.txt"), out=tmp_path / "bundle")
    previewed, predicted = choosing.preview(work, quiet)
    built = building.build(work, quiet)
    assert seen == [count, count]
    made = bundle.read(tmp_path / "bundle")
    assert made.layouts == {each: word.name for each, word in previewed.recipe.chosen}
    assert made.predicted_loss == built.predicted_loss == predicted.loss
    assert predicted.loss is not None
    assert predicted.loss > 0


@pytest.mark.slow
def test_another_budget_or_method_takes_what_was_measured_and_another_model_or_text_is_measured(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("text.txt", TEXT[:1500]), ("other.txt", TEXT[7:1500])):
        (tmp_path / name).write_text(text, encoding="utf-8")
    seen: list[None] = []
    find = sensitivity.measure

    def note(*given: Any, **named: Any) -> Any:
        seen.append(None)
        return find(*given, **named)

    monkeypatch.setattr(sensitivity, "measure", note)

    def previewed(name: str, text: str = "text.txt", **options: Any) -> tuple[Any, int]:
        folder = tiny("3", **options)
        work = plan(folder, recipe_name=name, calibration_text=str(tmp_path / text), out=tmp_path / "out")
        settled, _ = choosing.preview(work, quiet)
        return settled.recipe.chosen, len(seen)

    first, times = previewed("mix6.5-gptq")
    assert (first, times) == (previewed("mix6.5-gptq")[0], 1)
    assert previewed("mix7.5-gptq")[0] != first
    assert previewed("mix6.5-guided")[1] == 1
    assert previewed("mix6.5-rtn")[1] == 2
    assert previewed("mix6.5-gptq", "other.txt")[1] == 3
    assert previewed("mix6.5-gptq", tied=False)[1] == 4
