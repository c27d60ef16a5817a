"""Chat templates: the same text as transformers renders, and no template that costs more than a conversation is worth."""

from __future__ import annotations

import resource
import time
from datetime import date

import pytest
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from lit_eemllm import limits
from lit_eemllm.inputs.rendering import CLOSE, render

TODAY = date(1999, 12, 31)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What's <this>?\n"},
    {"role": "assistant", "content": "a \"cat\"\n\n"},
    {"role": "user", "content": "äöü {{ 7 * 7 }} 100% %d"},
    {"role": "assistant", "content": "50 %"},
]  # fmt: skip
RICH = """
{%- macro shown(text, width=2) -%}[{{ text | trim | replace('\\n', ' ') | indent(width) }}]{%- endmacro -%}
{%- set ns = namespace(found=false, count=0) -%}
{%- if messages[0]['role'] == 'system' -%}{%- set system, rest = messages[0].content, messages[1:] -%}{%- else -%}{%- set rest = messages -%}{%- endif -%}
{{ bos + system | upper }}{{ {'a': [1, 'é'], 'b': none} | tojson }}{{ '%s-%d' % ('x', 3) }}{{ '{:>4}'.format(7) }}
{%- for m in rest if m.role != 'tool' -%}
  {%- set ns.count = ns.count + loop.index * 2 % 3 -%}
  {%- if loop.first and not ns.found -%}{%- set ns.found = true -%}{{ shown(m.content, width=3) }}
  {%- elif m.role == 'assistant' -%}{% generation %}{{ m['content'].strip().split(' ')[-1] ~ eos }}{% endgeneration %}
  {%- else -%}{{ (m.content[::-1] if 'ö' in m.content else '') + '-' * 3 }}{%- endif -%}
  {%- if loop.index0 == 5 -%}{%- break -%}{%- endif -%}
{%- else -%}none{%- endfor -%}
{{ ns.count }}{{ rest | map(attribute='role') | unique | join(',') }}{{ rest | selectattr('role', 'equalto', 'user') | list | length }}
{%- macro called() -%}<{{ caller('y') }}>{%- endmacro -%}{%- call(x) called() -%}{{ x }}{%- endcall -%}{{ range(3) | list }}{{ dict(a=1).items() | list }}{{ 2 ** 3 }}
{%- if add_generation_prompt %}>{% endif -%}
"""  # fmt: skip


@pytest.mark.parametrize("prompt", [False, True])
def test_the_same_text_as_transformers(prompt: bool) -> None:
    special = {"bos": "<s>", "eos": "</s>"}
    theirs, marks = render_jinja_template(
        [MESSAGES], chat_template=RICH, return_assistant_tokens_mask=True, add_generation_prompt=prompt, **special
    )
    text, found = render(MESSAGES, RICH, prompt, special, TODAY)
    assert text == theirs[0] and found == marks[0] and [text[a:b] for a, b in found] == ['"cat"</s>', "%</s>"]
    for template in ("{% generation %}a", "{{ messages[9].content.x }}", "{{ raise_exception('no') }}"):
        with pytest.raises(TemplateError):
            render(MESSAGES, template, prompt, special, TODAY)


def test_the_clock_tells_the_day_that_it_is_given() -> None:
    assert render([], "{{ strftime_now('%d %b %Y') }}", False, {}, TODAY)[0] == "31 Dec 1999"
    for wide in ("%999999999Y", "%%%999999999Y", "%-+0999999999OY"):
        with pytest.raises(TemplateError, match="width"):
            render([], f"{{{{ strftime_now('{wide}') }}}}", False, {}, TODAY)
    assert render([], "{{ strftime_now('%5%z9999999Y') }}", False, {}, TODAY)[0].endswith("z9999999Y")
    assert render([], "{{ strftime_now('Cutoff 2023, %Y 1000%%') }}", False, {}, TODAY)[0] == "Cutoff 2023, 1999 1000%"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ '**%s**' % 'x' }}", "**x**"),
        ("{{ 'Cutoff 2023 %s' % 'x' }}", "Cutoff 2023 x"),
        ("{{ '100%% of 2023 * %d' | format(3) }}", "100% of 2023 * 3"),
        ("{{ 'Since 2023: {} * {name:*>4}'.format(3, name='a') }}", "Since 2023: 3 * ***a"),
        ("{{ '{{2023}} {:>3}'.format('a') }}", "{2023}   a"),
        ("{{ '%(name)s 2023' % {'name': 'x'} }}", "x 2023"),
    ],
)
def test_only_widths_of_a_format_are_bounded(template: str, text: str) -> None:
    assert render([], template, False, {}, TODAY)[0] == text


def doubled(begin: str, step: str, shown: str) -> str:
    return (
        f"{{% set ns = namespace(x={begin}) %}}{{% for i in range(60) %}}{{% set ns.x = {step} %}}{{% endfor %}}{shown}"
    )


BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops over one text": "".join(f"{{% for a{i} in 'x' * 50 %}}" for i in range(9)) + "{% endfor %}" * 9,
    "a loop whose test fails": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "a recursive loop": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a huge text": "{{ 'a' * 10 ** 10 }}",
    "a huge text, computed": "{% set n = 100000 %}{{ 'a' * (n * n) }}",
    "a huge list": "{{ [1] * 10 ** 10 }}",
    "a huge number": "{% set n = 10 ** 9 %}{{ 10 ** n }}",
    "a squared number": doubled("3", "ns.x * ns.x", ""),
    "a doubled text": doubled("'ab'", "ns.x + ns.x", "{{ ns.x }}"),
    "a doubled text, joined": doubled("'ab'", "ns.x ~ ns.x", "{{ ns.x }}"),
    "a doubled block": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "a doubled list": doubled("[1]", "[ns.x, ns.x]", "{{ ns.x | tojson }}"),
    "a doubled mapping": doubled("{}", "{'a': ns.x, 'b': ns.x}", "{{ ns.x | string }}"),
    "a doubled dict": doubled("{}", "dict(a=ns.x, b=ns.x)", "{{ ns.x }}"),
    "a doubled namespace": doubled("1", "namespace(a=ns.x, b=ns.x)", "{{ ns.x }}"),
    "a width": "{{ 'a' | center(10 ** 10) }}",
    "a width of a method": "{{ 'a'.ljust(10 ** 10) }}",
    "an indentation": "{{ 'a\nb' | indent(10 ** 10) }}",
    "tabs": "{{ '\t'.expandtabs(10 ** 10) }}",
    "a format": "{{ '{:>9999999999}'.format(1) }}",
    "an old format": "{{ '%9999999999d' % 1 }}",
    "a width from a value": "{{ '%*d' % (10 ** 10, 1) }}",
    "a precision": "{{ '%.9999999999f' % 1 }}",
    "a precision from a value": "{{ '%-+ #0.*f' % (10 ** 10, 1) }}",
    "a width of a named value": "{{ '%(a)99999999d' % {'a': 1} }}",
    "a width after a long name": "{{ '%(a(9)d)*d' % {'a(9)d': 1} }}",
    "a width after a percent sign": "{{ '%%%9999999999d' % 1 }}",
    "a width with a length": "{{ '%9999999999ld' % 1 }}",
    "a width in a format": "{{ '{:{}}'.format(1, 10 ** 10) }}",
    "a width of a fill": "{{ '{:a>9999999999}'.format(1) }}",
    "a width from a text": "{{ '{:{}}'.format(1, '9999999999') }}",
    "a width in a nested field": "{{ '{:{:9999999999}}'.format(1, 1) }}",
    "a width in a field": "{{ '{a[}]:9999999999}'.format(a={'}': 1}) }}",
    "a width put together": "{{ '{0:{1}{1}}'.format(1, 99999) }}",
    "a width of the date": "{{ strftime_now('%9999999999Y') }}",
    "a filter of format": "{{ '%9999999999d' | format(1) }}",
    "replaced": "{% set x = 'a' * 10 ** 6 %}{{ x.replace('a', x) }}",
    "replaced by a filter": "{% set x = 'a' * 10 ** 6 %}{{ x | replace('a', x) }}",
    "joined": "{% set x = 'a' * 10 ** 6 %}{{ x.join([''] * 10 ** 6) }}",
    "joined by a filter": "{% set x = 'a' * 10 ** 6 %}{{ range(99999) | join(x) }}",
    "mapped": "{% set x = 'a' * 10 ** 5 %}{{ range(99999) | map('replace', '1', x) | list | length }}",
    "compared": "{% set x = 'a' * 10 ** 7 %}{% set y = x + 'b' %}{% for i in range(99999) %}{% if x == y %}{% endif %}{% endfor %}",
    "searched": "{% set x = 'a' * 10 ** 7 %}{% for i in range(99999) %}{% if 'b' in x %}{% endif %}{% endfor %}",
    "summed": "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "printed long": "{% for i in range(99999) %}" + "x" * 10**5 + "{% endfor %}",
    "nested deeply": "{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}",
    "long": "x" * (limits.TEMPLATE_CHARACTERS + 1),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_work_is_bounded(bomb: str) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(TemplateError, match=r"work|deep|large|namespace|width|characters"):
        render(MESSAGES, BOMBS[bomb], True, {}, TODAY)
    assert time.process_time() - start < 20, "alone, one second or two"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**21, "less than 2 GiB, in KiB"


def test_a_conversation_pays_for_itself() -> None:
    """Long texts and many turns have a budget of their own."""
    template = "{% for m in messages %}{% for x in range(20) %}{% endfor %}{{ m.content | trim | replace('a', 'b') }}{% endfor %}"
    for messages in ([{"role": "user", "content": "a" * 10**6}] * 3, [{"role": "user", "content": "a"}] * 20_000):
        text, _ = render(messages, template, True, {}, TODAY)
        assert text == "b" * sum(len(message["content"]) for message in messages)
    with pytest.raises(TemplateError, match="last two characters of Unicode"):
        render([{"role": "user", "content": f"a{CLOSE}"}], template, True, {}, TODAY)
