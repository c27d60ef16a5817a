"""Chat templates, which come with models from anywhere, rendered in Jinja's sandbox with bounded work.

The sandbox keeps a template from the program; it does not keep it from looping for hours or filling the memory. So every step of
a loop and every text or list that comes into being is paid for out of a budget that grows with the conversation. What would be
larger than its parts (``"a" * 10 ** 9``, ``|center(10 ** 9)``, ``replace``) is paid for before it is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from datetime import date
from functools import lru_cache, wraps
from string import Formatter
from typing import Any, cast

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from lit_eemllm.limits import RENDER_ALWAYS, RENDER_PER_CHARACTER, TEMPLATE_CHARACTERS

STEP, ITEM = 100, 60  # of a loop or a call, of a list; a character costs 1
_DATE = re.compile(r"%[-_0^#+]*(\d*)[EO:]*[a-zA-Z%]")
_OLD = re.compile(r"%(?:\([^)]*\))?([-+ #0]*[\d*]*(?:\.[\d*]*)?)[hlL]?.", re.DOTALL)
_WIDE = re.compile(r"\d{4}|\*|\{")  # or a width that a value tells
OPEN, CLOSE = "\U0010fffe", "\U0010ffff"  # signs around what is marked; no text has these characters
_GROWING = frozenset(
    [
        "center",
        "ljust",
        "rjust",
        "zfill",
        "expandtabs",
        "replace",
        "join",
        "format",
        "format_map",
        "translate",
        "indent",
        "wordwrap",
        "batch",
        "slice",
        "tojson",
        "xmlattr",
        "urlize",
        "sum",
        "pprint",
    ]
)  # what is made of a text can be as large as the product of what goes in


def render(
    messages: Sequence[Mapping[str, Any]], source: str, prompt: bool, special: Mapping[str, Any], today: date
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as a template renders it, and (start, end) of what stands between its ``{% generation %}`` marks.

    Args:
        messages: with role and content, which is a text or a list of parts, mappings of texts.
        source: the template.
        prompt: end where the model speaks.
        special: names of special tokens and their texts.
        today: what the template's clock tells.

    Raises:
        TemplateError, TypeError or ValueError, as the template likes, or for too much work.
    """
    texts = [text for message in messages for value in message.values() for text in _texts(value)]
    if any(sign in text for text in texts for sign in (OPEN, CLOSE)):
        raise TemplateError("a text has one of the last two characters of Unicode, which no text may have")

    def told(field: re.Match[str]) -> str:
        if len(field[1]) > 2:
            raise TemplateError("it formats the date to a width of hundreds")
        return today.strftime(field[0])

    def clock(form: str) -> str:
        return _DATE.sub(told, form)  # each by itself: Python drops some, which would join what is around them

    environment, template = _compiled(source)
    environment.work.left = RENDER_ALWAYS + RENDER_PER_CHARACTER * sum(100 + len(text) for text in texts)
    try:
        shown = template.render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=prompt,
            strftime_now=clock,
            **special,
        )
    except (RecursionError, MemoryError, OverflowError) as error:
        raise TemplateError(f"it goes too deep or becomes too large: {type(error).__name__}") from None
    pieces = re.split(f"([{OPEN}{CLOSE}])", shown)
    marks, length = list[int](), 0
    for piece in pieces[::2]:
        length += len(piece)
        marks.append(length)
    if "".join(pieces[1::2]) != (OPEN + CLOSE) * (len(pieces) // 4):
        raise TemplateError("its generation marks are nested or torn apart")
    return "".join(pieces[::2]), list(zip(marks[0:-1:2], marks[1:-1:2], strict=True))


def _texts(value: str | Sequence[Mapping[str, str]]) -> list[str]:
    return [value] if isinstance(value, str) else [text for part in value for text in part.values()]


@lru_cache(maxsize=8)
def _compiled(source: str) -> tuple[_Environment, Any]:
    if len(source) > TEMPLATE_CHARACTERS:
        raise TemplateError(f"it has {len(source):,} characters, at most {TEMPLATE_CHARACTERS:,} are read")
    environment = _Environment()
    try:
        tree = _Paid(environment).visit(environment.parse(source))
        code = environment.compile(tree)
    except (RecursionError, MemoryError, SyntaxError) as error:  # Python's own, of what Jinja makes of it
        raise TemplateError(f"it is nested too deeply: {error}") from None
    return environment, environment.template_class.from_code(environment, code, environment.make_globals(None))


def _old_fields(text: str) -> Iterator[str]:
    """What stands between ``%`` and the letter; all of the text where names in parentheses have parentheses."""
    if re.search(r"%\([^)]*\(", text):
        return iter([text])
    return (found[1] for found in _OLD.finditer(text))


def _fields(text: str) -> Iterator[str]:
    """The specifications of ``str.format``. Raises ValueError, as that does."""
    return (
        (specification or "").replace("*", " ") for _, _, specification, _ in Formatter().parse(text)
    )  # which fills


class _Work:
    """The budget of a rendering."""

    left = 0

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise TemplateError("it asks for far more work than a conversation of this length needs")

    def step(self, amount: int) -> str:
        self.spend(STEP + amount)
        return ""

    def counted(self, value: Any) -> Any:
        self.spend(STEP)
        return value

    def size(self, value: Any) -> int:
        """Characters that a value has as text, about; of what is in it as often as it is in it."""
        if isinstance(value, str):
            return len(value) + 1
        total, waiting = 0, [value]
        while waiting:
            item = waiting.pop()
            if isinstance(item, Namespace):
                raise TemplateError("it shows a namespace as text")
            total += len(item) + 1 if isinstance(item, str) else ITEM
            if isinstance(item, int):
                total += item.bit_length()
            elif isinstance(item, Mapping):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set | frozenset):
                waiting += item
            elif isinstance(item, Sized) and not isinstance(item, str):
                total += len(item)
            if total > self.left:
                self.spend(total)
        return total

    def paid(self, value: Any) -> Any:
        self.spend(self.size(value))
        return value

    def sliced(self, value: Any) -> Any:
        self.spend(len(value) if isinstance(value, Sized) else 1)
        return value

    def times(self, left: Any, right: Any) -> Any:
        counts = [abs(value) if isinstance(value, int) else 1 for value in (left, right)]
        if all(isinstance(value, int) for value in (left, right)):
            self.spend(left.bit_length() * right.bit_length() // 64)
        else:
            self.spend(self.size(left) * counts[1] + self.size(right) * counts[0])
        return left * right

    def power(self, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            self.spend((left.bit_length() * abs(right)) ** 2 // 64)
        return left**right

    def modulo(self, left: Any, right: Any) -> Any:
        self.before("format" if isinstance(left, str) else "mod", left, [right], old=True)
        return left % right

    def before(self, name: str, subject: Any, arguments: Sequence[Any], old: bool = False) -> None:
        """Pay for what a function may make of a text or list; `old`: "format" is that of ``%``."""
        cost = self.size(subject)
        if name in _GROWING:
            for argument in arguments:
                cost *= max(1, abs(argument)) if isinstance(argument, int) else max(1, self.size(argument))
            fields = _old_fields if old else _fields
            if name.startswith("format") and any(_WIDE.search(field) for field in fields(str(subject))):
                raise TemplateError("it formats to a width of thousands, or that a value tells")
        self.spend(cost)


class _Environment(ImmutableSandboxedEnvironment):
    """As transformers' own, with every filter and call paid for."""

    def __init__(self) -> None:
        from lit_eemllm.compat.transformers import template_names

        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        filters, names = template_names()
        self.work = work = _Work()
        self.globals |= names
        self.filters = {name: self._paid_filter(name, function) for name, function in filters.items()}
        # names that no template can write
        self.filters |= {
            f"the {name}": getattr(work, name)
            for name in ("step", "counted", "paid", "sliced", "times", "power", "modulo")
        }

    def _paid_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        contextual = hasattr(function, "jinja_pass_arg")  # then the first argument is no value

        @wraps(function)
        def filtered(*arguments: Any, **named: Any) -> Any:
            lead, (subject, *rest) = arguments[:contextual], arguments[contextual:]
            if isinstance(subject, Iterator) and name in _GROWING:
                subject = list(subject)
            if name in _GROWING:
                self.work.before(name, subject, [*rest, *named.values()], old=True)
            self.work.sliced(subject)
            made = function(*lead, subject, *rest, **named)
            return self.work.sliced(made) if isinstance(made, list | str) else made

        return filtered

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        function = super().wrap_str_format(value)
        if function is None:
            return None

        @wraps(function)
        def formatted(*arguments: Any, **named: Any) -> str:
            self.work.before("format", value.__self__, [*arguments, *named.values()])
            return function(*arguments, **named)

        return formatted

    def call(self, context: Any, function: Any, /, *arguments: Any, **named: Any) -> Any:
        subject, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(subject, str):
            arguments = tuple(list(item) if isinstance(item, Iterator) else item for item in arguments)
            self.work.before(name, subject, [*arguments, *named.values()])
        self.work.step(0)
        made = super().call(context, function, *arguments, **named)
        return made if isinstance(made, Namespace) else self.work.paid(made)


class _Generation(Extension):
    """``{% generation %} … {% endgeneration %}``: what stands between is the assistant's."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(sign)], lineno=line) for sign in (OPEN, CLOSE))
        return nodes.Scope([begin, *body, end], lineno=line)


class _Paid(NodeTransformer):
    """Puts paying into a template's tree."""

    def __init__(self, environment: _Environment) -> None:
        self.environment = environment

    def _filter(self, name: str, node: nodes.Node, *arguments: nodes.Expr) -> nodes.Expr:
        made = nodes.Filter(cast(nodes.Expr, node), f"the {name}", list(arguments), [], None, None, lineno=node.lineno)
        return cast(nodes.Expr, made.set_environment(self.environment))

    def _whole(self, node: Any) -> nodes.Expr:
        return self._filter("paid", self.generic_visit(node))

    visit_Concat = visit_Add = visit_List = visit_Dict = _whole

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        made = self.generic_visit(node)
        return self._filter("paid", made) if node.ctx == "load" else made

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        made = self.generic_visit(node)
        return self._filter("sliced", made) if isinstance(node.arg, nodes.Slice) else made

    def visit_Mul(self, node: nodes.Mul) -> nodes.Expr:
        self.generic_visit(node)
        return self._filter("times", node.left, node.right)

    def visit_Pow(self, node: nodes.Pow) -> nodes.Expr:
        self.generic_visit(node)
        return self._filter("power", node.left, node.right)

    def visit_Mod(self, node: nodes.Mod) -> nodes.Expr:
        self.generic_visit(node)
        return self._filter("modulo", node.left, node.right)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        self.generic_visit(node)
        node.expr = self._filter("paid", node.expr)
        for operand in node.ops:
            operand.expr = self._filter("paid", operand.expr)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [
            item if isinstance(item, nodes.TemplateData) else self._filter("paid", item) for item in node.nodes
        ]
        return node

    def _body(self, node: Any) -> Any:
        """A step of a loop, or a call of a macro."""
        written = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        step = self._filter("step", nodes.Const(written, lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno).set_environment(self.environment))
        return node

    visit_Macro = visit_CallBlock = _body

    def visit_For(self, node: nodes.For) -> nodes.For:
        self._body(node)
        node.test = node.test and self._filter("counted", node.test)
        return node
