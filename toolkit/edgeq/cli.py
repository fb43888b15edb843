"""The command line: the only file that prints. Data goes to stdout, all else to stderr."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from edgeq.errors import EdgeqError, Interrupted, InvalidMeasurement, UsageFault, from_system
from edgeq.version import VERSION

_SILENCE = 30  # seconds between lines of progress where there is no terminal

app = typer.Typer(
    name="edgeq",
    help="Quantize, build, check and measure small Qwen models for edge devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
targets_app = typer.Typer(help="The devices that edgeq builds for.", no_args_is_help=True)
models_app = typer.Typer(help="The Qwen models that edgeq knows.", no_args_is_help=True)
app.add_typer(targets_app, name="targets")
app.add_typer(models_app, name="models")

Version = Annotated[bool, typer.Option("--version", help="Print edgeq's version.", is_eager=True)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
Accelerator = Annotated[
    bool, typer.Option("--require-accelerator", help="Fail when a layer runs on the CPU.", show_default=False)
]
Bundle = Annotated[Path, typer.Argument(help="Folder that edgeq build made.", metavar="BUNDLE")]


def main(words: list[str] | None = None) -> int:
    """Run one command; returns its exit code (0 done, the others are in `errors`)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app(args=_long(sys.argv[1:] if words is None else words))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except Interrupted as stop:
        _say(f"edgeq: {stop}")
        return stop.exit_code
    except EdgeqError as error:
        return _complain(error)
    except OSError as error:
        if (known := from_system(error)) is None:
            raise
        return _complain(known)
    return 0


@app.callback(invoke_without_command=True)
def root(version: Version = False) -> None:
    """Quantize, build, check and measure small Qwen models for edge devices."""
    if version:
        typer.echo(f"edgeq {VERSION}")
        raise typer.Exit


@app.command()
def build(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder, hub id, catalogue name or demo-qwen3; left out: what recommend chooses."),
    ] = None,
    target: Annotated[str, typer.Option("--target", "-t", help="Device, alias, TOML file or host.")] = "",
    recipe: Annotated[str, typer.Option(help="For example w4g32-e8-rtn; auto: the target's best.")] = "auto",
    backend: Annotated[
        str, typer.Option(help="onnx, llamacpp, mlc or null; auto: the target's first that is installed.")
    ] = "auto",
    context: Annotated[str | None, typer.Option("--context", "-c", help="Tokens of context, such as 4k.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the bundle.")] = None,
    max_size: Annotated[str | None, typer.Option(help="Largest bundle without its reference, such as 450MB.")] = None,
    max_loss: Annotated[float | None, typer.Option(help="Largest KL divergence, nats per token.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text for gptq, guided, tuned, -kv8: FILE, DIR, self (written by the model) or bundled."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built.")] = False,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Quantize a checkpoint, build it for a device, and refuse a broken result."""
    from edgeq import building, choosing, planning, sheets, tables, units

    _need(target, "--target", "edgeq targets list")
    plan = planning.plan(
        model,
        target=target,
        recipe_name=recipe,
        backend=backend,
        context=None if context is None else units.parse_tokens(context),
        out=output,
        max_size=units.parse_bytes(max_size) if max_size else None,
        max_loss=max_loss,
        calibration_text=calibration,
        offline=offline,
    )
    for note in plan.notes:
        _say(note)
    if dry_run:
        with _progress() as progress:
            plan, predicted = choosing.preview(plan, progress)
        _show(sheets.plan(plan, predicted), json, tables.plan)
        return
    with _progress() as progress:
        built = building.build(plan, progress)
    for note in built.notes[len(plan.notes) :]:
        _say(note)
    _show(built, json, tables.built)


@app.command()
def profile(
    bundle: Bundle,
    target: Annotated[str | None, typer.Option("--target", "-t", help="The bundle's own when left out.")] = None,
    prompts: Annotated[str, typer.Option("-p", help="Prompt lengths in tokens.")] = "128,512",
    tokens: Annotated[int, typer.Option("-n", min=2, help="Tokens to decode.")] = 128,
    depths: Annotated[str, typer.Option("-d", help="Tokens already in the cache when decode is timed.")] = "0",
    repetitions: Annotated[int, typer.Option("-r", min=1, help="Undisturbed repetitions wanted.")] = 5,
    accuracy: Annotated[
        str, typer.Option(help="none, quick (the bundle's reference) or full (run it here).")
    ] = "quick",
    text: Annotated[Path | None, typer.Option(help="UTF-8 file to measure accuracy on.")] = None,
    accelerator: Accelerator = False,
    save: Annotated[bool, typer.Option("--save", help="Keep the row in ./profiles/<target>/.")] = False,
    json: Json = False,
) -> None:
    """Measure speed, memory and accuracy loss of a bundle on this machine, in one row."""
    from edgeq import tables
    from edgeq.profiling import measure, run

    plan = measure.Plan(_numbers(prompts), tokens, _numbers(depths), repetitions, accuracy, accelerator)
    with _progress() as progress:
        row = run.profile(bundle, target=target, progress=progress, plan=plan, text=text, save=save)
    _show(row, json, tables.profile)
    if not row.valid:
        raise InvalidMeasurement(
            f"{bundle}: not a valid measurement",
            why="; ".join(row.reasons) + (". Nothing was saved." if save else ""),
            run=_after(row),
        )
    if save:
        _say(f"saved as {run.saved_path(row)}")


@app.command()
def run(
    bundle: Bundle,
    prompt: Annotated[str | None, typer.Argument(help="Chat when left out.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    think: Annotated[bool | None, typer.Option("--think/--no-think", help="Where the template has the switch.")] = None,
    draft: Annotated[
        str | None, typer.Option(help="Guess tokens and check them at once: lookup (what repeats) or head (Qwen3.5's).")
    ] = None,
    accelerator: Accelerator = False,
) -> None:
    """Talk to a bundle through its own chat template."""
    from edgeq.chatting import Chat
    from edgeq.profiles import require_accelerator

    chat = Chat(bundle, draft=draft)
    try:
        if accelerator:
            require_accelerator(chat.placement, chat.target, chat.provider)
        if chat.elsewhere:
            _say(chat.elsewhere)
        if chat.no_draft:
            _say(f"decoding goes token by token: {chat.no_draft}")
        messages: list[dict[str, str]] = []
        for question in [prompt] if prompt is not None else _questions():
            messages.append({"role": "user", "content": question})
            answer = ""
            for piece in chat.reply(messages, max_tokens, think):
                answer += piece
                typer.echo(piece, nl=False)
                sys.stdout.flush()
            typer.echo()
            messages.append({"role": "assistant", "content": answer})
    finally:
        chat.close()


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="Folder with a config.json, hub id, catalogue name or demo-qwen3.")],
    target: Annotated[str, typer.Option("--target", "-t", help="Device, alias, TOML file or host.")] = "",
    recipe: Annotated[
        str, typer.Option(help="For example w4g32-e8-rtn, or a published one such as Q4_K_M; auto: the target's best.")
    ] = "auto",
    backend: Annotated[
        str, typer.Option(help="Backend, or a runtime with published figures (mlx, vllm, ollama); auto: the best.")
    ] = "auto",
    context: Annotated[str | None, typer.Option("--context", "-c", help="Tokens of context, such as 4k.")] = None,
    depth: Annotated[str, typer.Option("--depth", "-d", help="Tokens in the cache when decoding.")] = "0",
    weights_bytes: Annotated[
        str | None, typer.Option(help="Size of a file that exists already, in bytes or such as 450MB.")
    ] = None,
    anchor: Annotated[Path | None, typer.Option(help="Profile of any model on that device and backend.")] = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Say whether a model fits a device and how fast it would be there, without building it."""
    from edgeq import tables, units
    from edgeq.estimating import asked

    _need(target, "--target", "edgeq targets list")
    found = asked.ask(
        model,
        target=target,
        recipe_name=recipe,
        backend=backend,
        context=None if context is None else units.parse_tokens(context),
        depth=0 if depth == "0" else units.parse_tokens(depth),
        weights_bytes=None if weights_bytes is None else _size(weights_bytes),
        anchor=anchor,
        offline=offline,
    )
    _show(found, json, tables.estimate)


@app.command()
def verify(bundle: Bundle, json: Json = False) -> None:
    """Check every digest of a bundle, then load it and compare it with its recorded reference."""
    from edgeq import tables, verifying

    with _progress() as progress:
        found = verifying.verify(bundle, progress)
    _show(found, json, tables.verified)


@app.command()
def doctor(
    target: Annotated[str, typer.Option("--target", "-t", help="Device to check for.")] = "host", json: Json = False
) -> None:
    """Say what is right and wrong with this machine, ready to paste into a report."""
    from edgeq import detect, tables
    from edgeq import doctor as checks

    found = checks.checks(detect.resolve(target))
    _show(found, json, tables.checks)
    if json:
        return
    for check in found:
        if (start := check.remedy.find("CMAKE_ARGS=")) >= 0:
            typer.echo(f"\nto copy, for {check.name}:\n{check.remedy[start:]}")


@app.command()
def recommend(
    target: Annotated[str, typer.Option("--target", "-t", help="Device, alias, TOML file or host.")] = "",
    context: Annotated[str | None, typer.Option("--context", "-c", help="Tokens of context, such as 4k.")] = None,
    min_tps: Annotated[float | None, typer.Option(help="Least tokens per second of decoding.")] = None,
    max_ttft: Annotated[float | None, typer.Option(help="Most seconds to the first token of a prompt of 512.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="Most memory of all, such as 6GB.")] = None,
    max_loss: Annotated[
        str | None, typer.Option(help="Largest share of its quality that quantization may cost, such as 0.05 or 5%.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="open: models for commercial use too.")] = None,
    capability: Annotated[list[str] | None, typer.Option(help="vision, video or thinking; may be repeated.")] = None,
    evidence: Annotated[str, typer.Option(help="measured, estimated or any.")] = "any",
    plot: Annotated[bool, typer.Option("--plot", help="Draw quality over speed.")] = False,
    json: Json = False,
) -> None:
    """Choose model, recipe and backend for a device, and say why, and why not the others."""
    from edgeq import plots, tables, units
    from edgeq.recommending import recommend as advice
    from edgeq.recommending.document import Constraints

    _need(target, "--target", "edgeq targets list")
    wanted = Constraints(
        min_tps=min_tps,
        max_ttft_s=max_ttft,
        max_memory_bytes=units.parse_bytes(max_memory) if max_memory else None,
        max_loss=None if max_loss is None else units.parse_share(max_loss),
        license=license,
        capability=tuple(capability or ()),
        evidence=evidence,
    )
    found = advice.recommend(target, context=None if context is None else units.parse_tokens(context), wanted=wanted)
    _show(found, json, tables.recommendation)
    if plot and not json:
        typer.echo(plots.front(found, shutil.get_terminal_size().columns))
    advice.require(found)


@targets_app.command("list")
def targets_list(json: Json = False) -> None:
    """All devices."""
    from edgeq import tables, target

    _show([target.load(name) for name in target.names()], json, tables.targets)


@targets_app.command("show")
def targets_show(name: str, json: Json = False) -> None:
    """One device, every figure with its source."""
    from edgeq import detect, tables

    _show(detect.resolve(name), json, tables.target)


@targets_app.command("detect")
def targets_detect(json: Json = False) -> None:
    """What this machine is, and which backends work here."""
    from edgeq import machine, sheets, tables

    _show(sheets.detection(machine.this_machine()), json, tables.detected)


@targets_app.command("validate")
def targets_validate(
    file: Annotated[Path | None, typer.Argument(help="All shipped ones when left out.")] = None,
) -> None:
    """Check a target file of your own, or every shipped one."""
    from edgeq import target

    for name in [str(file)] if file else target.names():
        typer.echo(f"{name}: {target.load(name).title} is a valid target")


@models_app.command("list")
def models_list(json: Json = False) -> None:
    """All models of the catalogue and the bundled demos."""
    from edgeq import catalog, tables

    _show(catalog.entries(), json, tables.models)


@models_app.command("show")
def models_show(name: str, offline: Offline = False, json: Json = False) -> None:
    """Shape, licence and size of one model under each recipe."""
    from edgeq import sheets, tables

    _show(sheets.model(name, offline=offline), json, tables.model)


def _long(words: list[str]) -> list[str]:
    """The same words with `-f json`, which other tools of the field use, written as --json."""
    found: list[str] = []
    for word in words:
        if word == "json" and found[-1:] in (["-f"], ["--format"]):
            found[-1] = "--json"
        elif found[-1:] in (["-f"], ["--format"]):
            raise UsageFault(
                f"{word!r} is not a format", why="Documents are tables or JSON.", run="the same with --json"
            )
        else:
            found.append(word)
    return found


def _after(row: Any) -> str:
    """What to do about a row that is not valid."""
    if any("did not run on" in reason for reason in row.reasons):
        return "edgeq doctor says what is missing; for this machine as it is: edgeq build MODEL --target host"
    return "end what else is running, then edgeq profile again"


def _show(document: object, json: bool, table: Callable[[Any], Any]) -> None:
    """Print a document as one JSON line, or as the table that people read."""
    import msgspec

    if json:
        sys.stdout.write(msgspec.json.encode(document).decode() + "\n")
        return
    from rich.console import Console

    from edgeq import tables

    console = Console(highlight=False, markup=False)
    if console.is_terminal:
        console.print(tables.fitting(table(document), console))
    else:
        typer.echo(tables.plain(table(document)))


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on stderr, one for each phase; a line now and then when stderr is no terminal.

    Drawn at each step and never in between: a thread that redraws would disturb what is measured.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, auto_refresh=False) as bars:
        tasks: dict[str, Any] = {}
        said = time.monotonic()

        def step(phase: str, done: int, total: int) -> None:
            nonlocal said
            if not console.is_terminal and time.monotonic() - said >= _SILENCE:
                said = time.monotonic()
                _say(f"{phase} {done} of {total}")
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total, refresh=True)

        yield step


def _questions() -> Iterator[str]:
    """What the user types, until an empty line or the end of input."""
    while True:
        typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _numbers(text: str) -> tuple[int, ...]:
    """Numbers in `128,512`."""
    from edgeq import units

    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise units.fault(text, "a list of numbers", "128,512")
    return tuple(map(int, words))


def _size(text: str) -> int:
    """Bytes in `450MB`, or as a bare number."""
    from edgeq import units

    return units.parse_bytes(f"{text}B" if text.strip().isdecimal() else text)


def _need(value: str | None, word: str, run: str) -> None:
    if not value:
        raise UsageFault(f"{word} is missing", run=run)


def _stop(number: int, _: FrameType | None) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name}")


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _complain(error: EdgeqError) -> int:
    _say(f"edgeq: {error}")
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
