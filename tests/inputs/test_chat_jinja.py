"""Chat templates in Jinja: what is trained, that rendering stays cheap, and what is refused."""

from __future__ import annotations

import pytest
from lib.chat import CHATML, INST, MARKED, talk, targets, until, with_template
from tokenizers import normalizers

from lit_eemllm.errors import SampleError, UserError
from lit_eemllm.inputs import rendering
from lit_eemllm.inputs.chat import get_template
from lit_eemllm.inputs.conversation import IMAGE
from lit_eemllm.model import Processor


def test_generation_marks_say_what_is_trained() -> None:
    conversation = talk(f"{IMAGE}\nwhat?", "a cat", "and?", "a sofa")
    plain, marked = (get_template("jinja", with_template(source)) for source in (CHATML, MARKED))
    assert marked.encode(conversation) == plain.encode(conversation)
    assert marked.encode(conversation, generation=True) == plain.encode(conversation, generation=True)
    thinking = MARKED.replace("{% generation %}", "{% generation %}{% if loop.last %}(well) {% endif %}")
    marked = get_template("jinja", with_template(thinking))  # earlier text changes, but the marks know
    assert targets(marked.tokenizer, marked.encode(conversation)) == ["a cat<|im_end|>", "(well) a sofa<|im_end|>"]


QWEN3 = (  # its logic: no reasoning in earlier answers, a thinking block, even an empty one, in the last
    "{%- set ns = namespace(last=messages|length - 1, seek=true) %}{%- for m in messages[::-1] %}"
    "{%- if ns.seek and m.role == 'user' %}{%- set ns.seek = false %}{%- set ns.last = messages|length - loop.index %}{%- endif %}"
    "{%- endfor %}{%- for m in messages %}{%- if m.role != 'assistant' %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%- else %}"
    "{%- set content = m.content %}{%- set reasoning = '' %}{%- if '</think>' in m.content %}"
    "{%- set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- set reasoning = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last %}{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + "
    "content.lstrip('\n') }}{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)


def test_a_template_that_writes_more_before_the_last_answer() -> None:
    """Qwen3's: text and prompts are the template's own, and what the last answer adds to its prompt is trained."""
    tokenizer = with_template(QWEN3)
    chat = get_template("jinja", tokenizer)
    for texts in (["what?", "a cat"], [f"{IMAGE}\nwhat? ", "a cat ", "and?", " \n", "so?", "a sofa", "why?", "it is"]):
        conversation = talk(*texts, system="s")
        messages = [{"role": {"human": "user", "gpt": "assistant"}.get(t.role, t.role), "content": t.text} for t in conversation.turns]  # fmt: skip
        full = tokenizer.apply_chat_template(messages, tokenize=False)
        assert "".join(span.text for span in chat.render(conversation)) == full
        answers = [turn.text + "<|im_end|>" for turn in conversation.turns if turn.role == "gpt" and turn.text.strip()]
        answers[-1] = f"<think>\n\n</think>\n\n{answers[-1]}"
        encoded = chat.encode(conversation)
        assert targets(tokenizer, encoded) == answers
        for number in range(2, len(conversation.turns), 2):
            prompt = chat.encode(until(conversation, number), generation=True)
            text = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
            assert "".join(span.text for span in chat.render(until(conversation, number))) == text
            assert encoded.ids[: len(prompt.ids)] == prompt.ids
    reasoned = "<think>\nis it?\n</think>\n\na cat"
    assert targets(tokenizer, chat.encode(talk("what?", reasoned))) == [f"{reasoned}<|im_end|>"]
    with pytest.raises(SampleError, match="changes earlier text or an answer"):  # training would drop what the row says
        chat.encode(talk("what?", reasoned, "and?", "a sofa"))
    processor = Processor(tokenizer, "jinja", None, 0)
    said = tokenizer(
        "<think>\n\n</think>\n\na cat<|im_end|>\nx", add_special_tokens=False, return_tensors="pt"
    ).input_ids
    plain = tokenizer("a cat", add_special_tokens=False, return_tensors="pt").input_ids
    assert processor.answers(said, 0) + processor.answers(plain, 0) == ["a cat", "a cat"]


@pytest.mark.parametrize("source", [CHATML, MARKED, QWEN3])
def test_the_cost_of_rendering_is_linear(source, monkeypatch) -> None:
    chat, render, count = get_template("jinja", with_template(source)), rendering.render, []
    monkeypatch.setattr(
        rendering, "render", lambda messages, *rest: count.append(len(messages)) or render(messages, *rest)
    )
    conversation = talk(*(f"text {i}" for i in range(400)))
    assert len(targets(chat.tokenizer, chat.encode(conversation))) == 200
    assert sum(count) <= 4 * 400


@pytest.mark.parametrize("turns", range(4, 12, 2))
def test_a_template_that_shows_long_conversations_differently_is_refused(turns) -> None:
    chat = get_template(
        "jinja", with_template("{% if messages|length > " + str(turns) + " %}<|im_start|>long{% endif %}" + CHATML)
    )
    chat.encode(talk(*["a", "b"] * (turns // 2)))
    with pytest.raises(SampleError, match="changes earlier text"):
        chat.encode(talk(*["a", "b"] * (turns // 2 + 1)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param(None, "no chat template", id="none"),
        pytest.param(
            CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content | upper }}"),
            "changes earlier text",
            id="unstable",
        ),
        pytest.param(
            CHATML.replace("assistant\n{% endif", "assistant\n(think){% endif"),
            "changes earlier text",
            id="other-prompt",
        ),
        pytest.param(
            MARKED.replace("assistant\n{% endif", "assistant\n(think){% endif"), r"\(think\)", id="marked-prompt"
        ),
        pytest.param(CHATML.partition("{% if add_gen")[0], "right after the generation prompt", id="prompt-ignored"),
        pytest.param("{% for m in messages %}{{ m.content }}{% endfor %}", "end-of-turn", id="no-end"),
        pytest.param(
            MARKED.replace("<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n"),
            "marks",
            id="end-unmarked",
        ),
        pytest.param(MARKED.replace("'assistant'", "'model'"), "marks", id="nothing-marked"),
        pytest.param("{{ raise_exception('only tools') }}", "only tools", id="raises"),
        pytest.param("{{ messages.__class__.__mro__ }}" + CHATML, "unsafe", id="sandboxed"),
        pytest.param("{% for", "refuses it", id="syntax"),
    ],
)
def test_unsuitable_jinja_templates_are_refused_at_once(source, message) -> None:
    with pytest.raises(UserError, match=message):
        get_template("jinja", with_template(source))


def test_a_template_that_asks_for_today_gets_one_day_for_ever() -> None:
    """Else a run that goes on tomorrow would train on other prompts."""
    dated = CHATML.replace("{%", "{{ strftime_now('%d %b %Y') }}{%", 1)
    rendered = get_template("jinja", with_template(dated)).render(talk("a", "b"))
    assert rendered[0].text.startswith("26 Jul 2024<|im_start|>user\na")


def test_a_fingerprint_is_of_all_that_decides_ids() -> None:
    """The template's text, and the tokenizer beyond its vocabulary."""

    def fingerprint(template: str = CHATML, lower: bool = False) -> str:
        tokenizer = with_template(template)
        if lower:
            tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        return get_template("jinja", tokenizer).fingerprint()

    assert fingerprint() == fingerprint()
    other = fingerprint("{# edited #}" + CHATML), fingerprint(lower=True)
    assert len({fingerprint(), *other, get_template("vicuna_v1", with_template(CHATML)).fingerprint()}) == 4


def test_several_templates_none_of_which_is_the_default() -> None:
    with pytest.raises(UserError, match=r"'tool_use', 'rag'.*none is called 'default'.*model.tokenizer"):
        get_template("jinja", with_template({"tool_use": CHATML, "rag": CHATML}))
    assert get_template("jinja", with_template({"rag": INST, "default": CHATML})).source == CHATML


def test_jinja_refusals_of_single_samples() -> None:
    forgets = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('=>')[-1] }}")
    chat = get_template("jinja", with_template(forgets))
    chat.encode(talk("a", "b", "c", "so => d"))
    with pytest.raises(SampleError, match="'k'") as caught:
        chat.encode(talk("a", "so => b", "c", "d"))
    assert caught.value.reason == "unstable_template"
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    with pytest.raises(SampleError, match="no system turn") as caught:
        get_template("jinja", with_template(no_system)).encode(talk("a", "b", system="c"))
    assert caught.value.reason == "bad_conversation"
    loses = CHATML.replace("{{ m.content }}", "{{ m.content.replace('<image>', '') }}")
    with pytest.raises(SampleError, match="rendered 0") as caught:
        get_template("jinja", with_template(loses)).encode(talk(f"{IMAGE} a", "b"))
    assert caught.value.reason == "placeholder_mismatch"
