"""A chat template as the Jinja text that transformers reads: what an exported model must be prompted with is what it was trained on."""

from __future__ import annotations

import json
import re

from .chat import DAY, PARTS, VICUNA_SYSTEM, WRAPPED, ChatTemplate, JinjaTemplate

_BODIES = {
    "plain": """\
{%- for m in messages -%}
  {%- if m['role'] == 'user' -%}
    {{- '<image>' * m['content'].count('<image>') + '\\n' -}}
  {%- else -%}
    {{- m['content'] + eos_token -}}
  {%- endif -%}
{%- endfor -%}
""",
    "vicuna_v1": f"{{%- set ns.prompt = {json.dumps(VICUNA_SYSTEM + chr(32))} -%}}\n"
    + """\
{%- for m in messages -%}
  {%- set text = m['content'] -%}
  {%- if m['role'] == 'system' -%}
    {%- set ns.prompt = text + ' ' if text else '' -%}
  {%- elif m['role'] == 'user' -%}
    {%- if text.count('<image>') == 1 -%}
      {%- set text = ('<image>\\n' + text.replace('<image>', '').strip()).strip() -%}
    {%- endif -%}
    {{- ns.prompt + 'USER: ' + text + ' ASSISTANT:' -}}
    {%- set ns.prompt = '' -%}
  {%- else -%}
    {{- ns.prompt + ' ' + text + eos_token -}}
    {%- set ns.prompt = '' -%}
  {%- endif -%}
{%- endfor -%}
""",
}


def jinja_of(template: ChatTemplate) -> str:
    """Of messages with texts or typed parts; what the tokenizer puts first is left to it, but for its own template, which writes it."""
    if not isinstance(template, JinjaTemplate):
        return PARTS + _BODIES[template.name]
    day = re.sub(r"""strftime_now\((["'])(.*?)\1\)""", lambda m: repr(DAY.strftime(m[2])), template.source)
    return day if template.in_parts else WRAPPED + day
