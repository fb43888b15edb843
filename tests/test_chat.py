from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import checkpoints
from edgeq import chat
from edgeq.errors import CorruptInput, UnsafeInput

MESSAGES = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <b>2 & 2</b>?\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFour — 四 🙂"},
    {"role": "user", "content": 'Why "four"? {{ 1 + 1 }} {% raw %}'},
)

MACROS = """\
{%- macro turn(role, content) -%}
<|im_start|>{{ role }}
{{ content | trim }}<|im_end|>
{% endmacro -%}
{%- for message in messages -%}
    {%- if loop.first and message.role != 'system' -%}
        {{- turn('system', 'You are helpful.') -}}
    {%- endif -%}
    {{- turn(message.role, message['content']) -}}
{%- endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""

NAMESPACES = """\
{%- set ns = namespace(last=-1, thinking=enable_thinking | default(true)) %}
{%- for message in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- if message.role == "user" %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "system" %}{% continue %}{% endif %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and "</think>" in content %}
        {%- set content = content.split("</think>")[-1].lstrip("\\n") %}
    {%- endif %}
    {{- "<|im_start|>" + message.role + "\\n" + content + "<|im_end|>\\n" }}
    {%- if loop.index0 == ns.last and loop.last %}
        {{- "<|im_start|>assistant\\n" }}
        {%- if not ns.thinking %}
            {{- "<think>\\n\\n</think>\\n\\n" }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
"""

FILTERS = """\
{% if tools %}never{% endif %}
{% if tools is not none or documents is not none %}never{% endif %}
{{ messages | tojson }}
  {% for message in messages %}
{{ message | tojson(indent=2) }}
{{ {"b": [1, 2.5, none, true], "a": message.content} | tojson(separators=(",", ":"), sort_keys=true) }}
{{ message.role | upper }}: {{ message.content | replace("four", "vier") }}{{ "," if not loop.last }}
  {% endfor %}
{{ messages | tojson(ensure_ascii=true) }}
{{ dict(a=1).items() | list }} {{ range(3) | join("-") }} {{ messages[0].keys() | list }}
"""


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize(
    "template",
    [MACROS, NAMESPACES, FILTERS, checkpoints.CHAT_TEMPLATE],
    ids=["macros", "namespaces", "filters", "plain"],
)
def test_a_template_gives_the_same_text_as_transformers(template: str, thinking: bool | None) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    switch: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    (expected,), _ = render_jinja_template(
        conversations=[list(MESSAGES)], chat_template=template, add_generation_prompt=True, **switch
    )
    assert chat.render(template, MESSAGES, thinking) == expected
    assert "never" not in expected


def test_the_thinking_switch_reaches_the_template() -> None:
    template = "{{ 'default' if enable_thinking is not defined else enable_thinking }}"
    assert [chat.render(template, MESSAGES, switch) for switch in (None, True, False)] == ["default", "True", "False"]


def test_a_template_says_whether_it_has_the_thinking_switch() -> None:
    assert chat.knows_thinking(NAMESPACES)
    assert not chat.knows_thinking(MACROS)


def test_json_is_not_escaped_for_html() -> None:
    assert chat.render("{{ '<é> & ' | tojson }}", MESSAGES) == '"<é> & "'


def test_the_messages_are_data_and_never_code() -> None:
    hostile = [{"role": "user", "content": "{{ messages.__class__ }}{% for i in range(9) %}"}]
    assert chat.render("{{ messages[0].content }}", hostile) == hostile[0]["content"]


def test_any_character_gets_through() -> None:
    text = "\r\n\t\0\x1b\u2028é四🙂\udce9"
    assert chat.render("{{ messages[0].content }}", [{"role": "user", "content": text}]) == text


def test_a_template_for_its_sample_needs_no_system_message() -> None:
    assert chat.render(checkpoints.CHAT_TEMPLATE, chat.SAMPLE) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


WALKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ().__class__.__base__.__subclasses__()[0]('x') }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ messages.append.__self__ }}",
    "{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ joiner.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ namespace.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ raise_exception.__globals__['sys'].modules['os'].system('touch MARKER') }}",
    "{{ raise_exception.__code__.co_consts[0].x() }}",
    "{{ self.__init__.__globals__.__builtins__.open('MARKER', 'w') }}",
    "{{ self._TemplateReference__context.environment.from_string('x').render() }}",
    "{{ dict.mro()[1].__subclasses__() }}",
    "{{ (lipsum | attr('__globals__'))['os'].system('touch MARKER') }}",
    "{{ ('' | attr('__cl' ~ 'ass__')).mro() }}",
    "{{ lipsum['__globals__']['os'].system('touch MARKER') }}",
    "{{ [''] | map(attribute='__class__.__mro__') | first | map(attribute='x') | list }}",
    "{{ (['' ] | map('attr', '__class__') | first).mro() }}",
    "{% set f = 'a'.format_map %}{{ f({'a': 1}).__class__.mro() }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0.__class__.__init__.__globals__[os]}'.format(lipsum)() }}",
    "{{ (messages | tojson(default=lipsum.__globals__['os'].system)) }}",
    "{% for m in messages %}{{ loop.__init__.__globals__.os.system('touch MARKER') }}{% endfor %}",
]
BOMBS = [
    "{% for a in range(10 ** 9) %}x{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10 ** 12 }}",
    "{{ [0] * 10 ** 10 }}",
    "{{ '%1000000000000d' % 1 }}",
    "{{ '{:1000000000000}'.format(1) }}",
    "{{ 'x'.ljust(10 ** 12) }}",
    "{% set ns = namespace(s='xx') %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{{ 10 ** (10 ** 10) }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{% macro a() %}{{ b() }}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{{ a() }}{% endmacro %}{{ a() }}",
    "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
]
MUTATIONS = [
    "{{ messages.append({}) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update(role='x') }}",
    "{{ messages[0].pop('role') }}",
]
ABSENT = [
    "{% macro m() %}{% endmacro %}{{ m.__globals__.os.system('touch MARKER') }}",
    "{{ messages | tojson(cls=cycler) }}",
    "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{% from '/etc/passwd' import x %}",
    "{% do messages.append(1) %}",
    "{% set messages[0].role = 'x' %}",
    "{% set cycler.next = 1 %}",
]
HARMLESS = [
    "{{ ''.__class__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ ('%s' % messages.__class__) }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ open }}{{ os }}{{ __builtins__ }}{{ __import__ }}{{ strftime_now }}",
]


@pytest.mark.parametrize("template", WALKS + BOMBS + MUTATIONS, ids=lambda template: template[:50])
def test_a_hostile_template_is_unsafe_input_and_does_nothing(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafeInput, match="chat template: refused") as caught:
        chat.render(template, MESSAGES)
    assert caught.value.exit_code == 11
    assert caught.value.why
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("template", ABSENT, ids=lambda template: template[:50])
def test_files_modules_and_hooks_are_not_there_for_a_template(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorruptInput, match="chat template: cannot be rendered"):
        chat.render(template, MESSAGES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("template", HARMLESS, ids=lambda template: template[:50])
def test_looking_at_internals_shows_nothing(template: str) -> None:
    shown = chat.render(template, MESSAGES)
    assert set(shown) <= set("[]Undefined, ")


def test_a_prompt_of_millions_of_characters_is_unsafe_input() -> None:
    template = "{% for message in messages %}{{ 'x' * size }}{% endfor %}"
    assert len(chat.render("{% set size = 10 ** 6 %}" + template, MESSAGES)) == 4 * 10**6
    with pytest.raises(UnsafeInput, match="a prompt of 40000000 characters"):
        chat.render("{% set size = 10 ** 7 %}" + template, MESSAGES)


def test_leaving_the_sandbox_is_unsafe_input() -> None:
    with pytest.raises(UnsafeInput, match="__class__") as caught:
        chat.render(WALKS[0], MESSAGES)
    assert caught.value.exit_code == 11


@pytest.mark.parametrize("template", ["{% if %}", "{{", "{% endfor %}", "{{ a b }}", "{% nonsense %}", "{{ 1 / 0 }}"])
def test_a_broken_template_is_corrupt_input(template: str) -> None:
    with pytest.raises(CorruptInput, match="chat template: cannot be rendered") as caught:
        chat.render(template, MESSAGES)
    assert caught.value.exit_code == 10
    assert caught.value.why


def test_a_templates_own_message_is_shown() -> None:
    with pytest.raises(CorruptInput, match=r"TemplateError: Roles must alternate — 四"):
        chat.render("{{ raise_exception('Roles must alternate — 四') }}", MESSAGES)


def test_a_templates_message_cannot_flood_or_steer_the_terminal() -> None:
    with pytest.raises(CorruptInput) as caught:
        chat.render(r"{{ raise_exception('\x1b]0;title\x07\r\nline' + 'x' * 10 ** 6) }}", MESSAGES)
    assert caught.value.why.isprintable()
    assert "title" in caught.value.why
    assert "line" in caught.value.why
    assert len(caught.value.why) < 400


def test_the_locale_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    for locale in ("C", "POSIX", "de_DE.ISO-8859-1"):
        monkeypatch.setenv("LC_ALL", locale)
        assert chat.render("{{ messages[2].content }}é", MESSAGES).endswith("四 🙂é")
        with pytest.raises(CorruptInput, match="é"):
            chat.render("{{ raise_exception('é') }}", MESSAGES)


def test_a_child_that_does_not_end_is_unsafe_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(UnsafeInput, match="did not end"):
        chat.render(checkpoints.CHAT_TEMPLATE, MESSAGES)


def test_python_files_in_the_current_folder_are_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("jinja2.py", "edgeq.py", "json.py", "sitecustomize.py"):
        (tmp_path / name).write_text("import pathlib; pathlib.Path('MARKER').touch()")
    monkeypatch.chdir(tmp_path)
    assert chat.render("{{ messages | length }}", MESSAGES) == "4"
    assert not (tmp_path / "MARKER").exists()


def test_the_parent_never_loads_the_template_engine() -> None:
    code = "import sys; from edgeq import chat; chat.render('x', chat.SAMPLE); sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
