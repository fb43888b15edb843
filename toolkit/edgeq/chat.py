"""Chat templates of checkpoints: rendered by sandboxed Jinja in a child with limits on time and memory.

A template is code from a stranger. `python -m edgeq.chat` is that child; `render` is its parent.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from edgeq.errors import CorruptInput, MissingTool, UnsafeInput

LIMIT_S = 1.0
_MEMORY_BYTES = 1 << 30
_LONGEST = 1 << 24
_LONGEST_MESSAGE = 300
_START_S = 30.0
_SECURITY, _TEMPLATE = 3, 4
SAMPLE = ({"role": "user", "content": "Hello"},)


def render(template: str, messages: Sequence[Mapping[str, str]], thinking: bool | None = None) -> str:
    """Prompt that a template makes of messages, ending where the assistant begins.

    `thinking` sets the template's `enable_thinking`; None leaves its default. Raises UnsafeInput when the template
    leaves the sandbox, takes more than a second of processor time, 1 GiB or 16 million characters, or recurses without
    end; CorruptInput when it is no valid template; MissingTool when this Python cannot start that process.
    """
    request = {"template": template, "messages": list(messages), "thinking": thinking}
    command = [sys.executable, "-P", "-X", "utf8", "-m", "edgeq.chat"]
    try:
        child = subprocess.run(
            command, input=json.dumps(request), capture_output=True, encoding="utf-8", timeout=_START_S
        )
    except subprocess.TimeoutExpired as error:
        raise UnsafeInput("chat template: did not end", run="edgeq run with another checkpoint") from error
    if child.returncode == 0:
        return str(json.loads(child.stdout))
    why = child.stderr.strip().splitlines()[-1:] or [f"It ran over {LIMIT_S:g} s or 1 GiB of memory."]
    if child.returncode == _TEMPLATE:
        raise CorruptInput("chat template: cannot be rendered", why=why[0], run="download the checkpoint again")
    if child.returncode > 0 and child.returncode != _SECURITY:
        raise MissingTool("chat template: the process that renders it cannot start", why=why[0], run="edgeq doctor")
    raise UnsafeInput("chat template: refused", why=why[0], run="take the checkpoint from its original publisher")


def knows_thinking(template: str) -> bool:
    """Whether a template has the switch that --think and --no-think set."""
    return "enable_thinking" in template


def _child() -> None:
    import signal

    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    request: dict[str, Any] = json.load(sys.stdin)
    _limit_memory()
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = _to_json
    switch = {} if request["thinking"] is None else {"enable_thinking": request["thinking"]}
    try:
        text = environment.from_string(request["template"]).render(
            messages=request["messages"], tools=None, documents=None, add_generation_prompt=True, **switch
        )
        if len(text) > _LONGEST:
            raise SecurityError(f"It made a prompt of {len(text)} characters.")
    except (SecurityError, MemoryError, OverflowError, RecursionError) as error:
        sys.exit(_fail(_SECURITY, error))
    except Exception as error:
        sys.exit(_fail(_TEMPLATE, error))
    sys.stdout.write(json.dumps(text))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The `tojson` of transformers: Jinja's own would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


def _fail(code: int, error: Exception) -> int:
    """Say why on one line, without what a terminal would take for a command."""
    words = f"{type(error).__name__}: {str(error)[:_LONGEST_MESSAGE]}"
    sys.stderr.write("".join(letter if letter.isprintable() else " " for letter in words).rstrip() + "\n")
    return code


if __name__ == "__main__":
    _child()
