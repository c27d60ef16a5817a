"""A run behind OpenAI's interface: its answers are those of `generate`, whoever asks beside; what may be sent is bounded."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import threading
import time

import pytest
from PIL import Image

from lit_eemllm import cli, limits
from lit_eemllm.config import to_yaml
from lit_eemllm.evaluation.run import UNTRAINED, answer, load
from lit_eemllm.inputs.conversation import IMAGE, Conversation, Turn
from lit_eemllm.serving import api
from lit_eemllm.serving.engine import Engine, Failed, Job


def file_of(colour, size=(40, 20)):
    """A picture's file."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def shown(data):
    """A picture in a request."""
    url = data if isinstance(data, str) else f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def asks(*parts, **more):
    """A request of one message, of pictures and texts."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"model": "ee_mllm", "max_tokens": 6, "messages": [{"role": "user", "content": content}], **more}


def truth(alone, way, tokens, picture, *texts):
    """What `generate` says to the end of a conversation that begins with a picture."""
    alone.switch(way)
    turns = [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate([f"{IMAGE}\n{texts[0]}", *texts[1:]])]
    pictures = [[Image.open(io.BytesIO(picture))]]
    return answer(alone.model, alone.processor, [Conversation("k", tuple(turns), 1)], pictures, tokens)[0]


def sent(address, body, path="/v1/chat/completions", **headers):
    """Status and content of the answer to a request, which is as it stands if it is bytes."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request("POST", path, text, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def pieces(text):
    """What server-sent events say, but for the last, which says that it was the last."""
    *events, done, nothing = text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_answers_are_those_of_generate_whole_and_in_pieces(address, alone):
    red = file_of("red")
    for way in ("ee_mllm", "llava", "vica", "ee_mllm"):
        true = truth(alone, way, 6, red, "What is it?")
        request = asks(shown(red), "What is it?", model=way)
        status, text = sent(address, request)
        found = json.loads(text)
        (choice,) = found["choices"]
        assert (status, found["object"], found["model"]) == (200, "chat.completion", way)
        assert choice["message"] == {"role": "assistant", "content": true} and choice["finish_reason"] == "length"
        streamed = pieces(sent(address, {**request, "stream": True, "stream_options": {"include_usage": True}})[1])
        parts = [event["choices"][0]["delta"].get("content", "") for event in streamed[:-1]]
        assert "".join(parts) == true and len(list(filter(None, parts))) > 2
        assert [event["choices"][0]["finish_reason"] for event in streamed[:-1]] == [
            *[None] * (len(parts) - 1),
            "length",
        ]
        again = streamed[-1]
        assert (again["choices"], again["usage"]["completion_tokens"]) == ([], 6) and again["cost"]["batch"] == 1
        assert (
            set(again["cost"]) == set(found["cost"])
            and again["cost"]["prefill_flops"] == found["cost"]["prefill_flops"] > 0
        )
        assert "usage" not in pieces(sent(address, {**request, "stream": True})[1])[-1]


def test_it_has_answered_about_a_picture_before_anybody_asks(config, caplog):
    """Else the first mechanism that is asked would look slow."""
    engine = Engine(*load(config, UNTRAINED)[:2], config, 4)
    assert engine.model.image_cache.misses == 1 and not caplog.records


def test_turns_and_texts_alone(address, alone):
    red = file_of("red")
    first = truth(alone, "llava", 5, red, "What?")
    turns = [
        *asks(shown(red), "What?")["messages"],
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And now?"},
    ]
    _, text = sent(address, {"model": "llava", "messages": turns, "max_completion_tokens": 7})
    assert json.loads(text)["choices"][0]["message"]["content"] == truth(
        alone, "llava", 7, red, "What?", first, "And now?"
    )
    words = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Is it red?"}]
    found = json.loads(sent(address, {"model": "vica", "messages": words, "max_tokens": 3})[1])
    alone.switch("vica")
    conversation = Conversation("k", (Turn("system", "Be short."), Turn("human", "Is it red?")), 0)
    assert found["choices"][0]["message"]["content"] == answer(alone.model, alone.processor, [conversation], [[]], 3)[0]
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == found["cost"]["visual_tokens"] == 0


def test_a_run_keeps_its_own_options(engine, alone):
    """Its mechanism is not the preset of the same name, also after another was asked."""
    engine._turn_to("llava")
    engine._turn_to("ee_mllm")
    assert not engine.model.mechanism.aligner.ffn and engine.model.mechanism == alone.trained
    assert engine.ways[0] == "ee_mllm" and {"llava", "vica", "fastv"} <= set(engine.ways) and "saisa" not in engine.ways


def test_a_picture_is_computed_once_whoever_asked_in_between(address, engine):
    """Where its states do not depend on the text, for each mechanism; of llava each time."""

    def known(picture, question, way):
        usage = json.loads(sent(address, asks(shown(picture), question, model=way))[1])["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    blue, green, ways = file_of("blue"), file_of("green"), ("ee_mllm", "llava", "naavit")
    asked = [(blue, "What?"), (green, "What?"), (blue, "Is it blue?"), (green, "And this?")]
    found = [[known(*one, way) for way in ways] for one in asked]
    assert found == [[0, 0, 0], [0, 0, 0], [16, 0, 16], [16, 0, 16]]
    both = asks(shown(blue), shown(file_of("black")), "Which is blue?")
    assert json.loads(sent(address, both)[1])["usage"]["prompt_tokens_details"]["cached_tokens"] == 16


def test_an_answer_ends_where_the_decoder_knows_no_position(address):
    red = shown(file_of("red"))
    one, two = (json.loads(sent(address, asks(*[red] * n, "What?"))[1])["usage"]["prompt_tokens"] for n in (1, 2))
    pictures = 1 + (511 - one) // (two - one)
    usage = json.loads(sent(address, asks(*[red] * pictures, "What?", max_tokens=40))[1])["usage"]
    assert usage["total_tokens"] == 512 and 0 < usage["completion_tokens"] < 40


class Asker:
    """Puts questions to an engine without HTTP and keeps what it hears."""

    def __init__(self, engine, way, text, picture, most=5):
        self.heard, self.done = [], threading.Event()
        conversation = Conversation("k", (Turn("human", f"{IMAGE}\n{text}"),), 1)
        self.question = Job(way, conversation, [picture], most, 0.0, self.hear)
        engine.ask(self.question)

    def hear(self, event):
        self.heard.append(event)
        if not isinstance(event, str):
            self.done.set()

    def answer(self):
        assert self.done.wait(60)
        return "".join(self.heard[:-1]), self.heard[-1]


class Slow(Asker):
    """Holds the engine at its first token."""

    def __init__(self, *args, **options):
        self.begun, self.may_go = threading.Event(), threading.Event()
        super().__init__(*args, **options)
        assert self.begun.wait(60)

    def hear(self, event):
        self.begun.set()
        assert self.may_go.wait(60)
        super().hear(event)


def test_those_who_wait_for_the_same_are_answered_together_each_as_alone(engine, alone):
    slow = Slow(engine, "llava", "What?", file_of("red"))
    texts = [
        "What colour is it?",
        "What?",
        "Is it red or green?",
        "And this picture, in which there is a square?",
        "Is it?",
    ]
    asked = [Asker(engine, "ee_mllm", text, file_of((40 * i, 0, 0)), most=3 + i) for i, text in enumerate(texts)]
    other = Asker(engine, "vica", "What?", file_of("red"))
    bad = Asker(engine, "ee_mllm", "</s>", file_of("red"))
    gone = Asker(engine, "ee_mllm", "What?", file_of("red"))
    gone.question.gone.set()
    slow.may_go.set()
    found = [one.answer() for one in asked]
    assert [end.batch for _, end in found] == [4, 4, 4, 4, 1], "four at most; the bad one takes no part"
    for i, (text, end) in enumerate(found):
        assert text == truth(alone, "ee_mllm", 3 + i, file_of((40 * i, 0, 0)), texts[i])
        assert (end.cost.tokens, end.cost.visual, end.reason) == (3 + i, 16, "length")
    lengths = {
        len(alone.processor.template.encode(one.question.conversation, generation=True).ids) - 1 for one in asked
    }
    assert {end.cost.text for _, end in found} == lengths and len(lengths) > 2
    assert other.answer()[1].batch == 1
    assert "control token" in str(bad.answer()[1]) and not gone.heard


def test_who_goes_away_holds_nobody_up(address, engine):
    """While an answer is on its way to a client, and while it waits."""
    asked, ask = [], engine.ask
    engine.ask = lambda question: asked.append(question) or ask(question)
    try:
        slow = Slow(engine, "llava", "What?", file_of("red"))
        for stream in (True, False):
            connection = http.client.HTTPConnection(*address)
            body = json.dumps(asks(shown(file_of("red")), "What?", max_tokens=40, stream=stream))
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            while len(asked) < 2 + (not stream):
                time.sleep(0.01)
            connection.close()
        for question in asked[1:]:
            assert question.gone.wait(5)
        ask(asked[1])  # whoever asks next sees them out
        assert list(engine._line) == [asked[1]]
        slow.may_go.set()
        slow.answer()
    finally:
        del engine.ask
    midway = Slow(engine, "llava", "What?", file_of("red"), most=300)
    midway.question.gone.set()
    midway.may_go.set()
    assert midway.answer()[1].cost.tokens < 5


def test_an_answer_that_fails_is_told_and_the_next_is_given(address, engine, monkeypatch, caplog):
    def broken(*args, **options):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "generate", broken)
        status, text = sent(address, asks("What?"))
        assert status == 500 and json.loads(text)["error"]["type"] == "server_error" and "no room" not in text
        assert "no room" in caplog.text
    assert sent(address, asks("What?"))[0] == 200
    monkeypatch.setattr(engine, "ask", lambda question: [question.tell(event) for event in ("so", Failed("it broke"))])
    status, text = sent(address, asks("What?", stream=True))
    hear = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-1]]
    assert (
        status == 200
        and hear[-2]["choices"][0]["delta"]["content"] == "so"
        and hear[-1]["error"]["message"] == "it broke"
    )


LARGE = file_of("red", (400, 260))
REFUSED = {
    "http": (
        asks(shown("https://example.org/cat.png")),
        r"content.0.image_url.url: found 'https://.*nothing is fetched",
    ),
    "file": (asks(shown("file:///etc/passwd")), "no file is read"),
    "path": (asks(shown("/etc/passwd")), "no file is read"),
    "no base64": (asks(shown("data:image/png,abc")), "expected a picture itself"),
    "bad base64": (asks(shown("data:image/png;base64,a*b")), "not base64"),
    "no picture": (asks(shown(b"hello")), "picture|image"),
    "large": (asks(shown(LARGE)), "more than 100000|100,000"),
    "large together": (
        asks(*[shown(file_of("red", (300, 200)))] * 2),
        "120,000 pixels, more than data.max_image_pixels=100,000",
    ),
    "too many": (asks(*[shown(file_of("red", (1, 1)))] * (limits.ROW_IMAGES + 1)), "at most .* 1,000 pictures"),
    "too long": (asks(*[shown(file_of("red"))] * 31, "What?"), "the decoder knows 512 positions"),
    "very long": (asks("a" * (limits.REQUEST_CHARACTERS + 1)), "at most 1,048,576 characters"),
    "tokens": (asks("What?", max_tokens=41), "max_tokens: found 41, expected at most 40"),
    "no tokens": (asks("What?", max_tokens=0), "max_tokens: .*greater than or equal to 1"),
    "unknown": (asks("What?", model="lava"), "found 'lava', expected one of ee_mllm, .*did you mean llava"),
    "a long key": (asks("What?", **{"k" * 10**6: 1}), "k: not read here"),
    "a long number": (b'{"model": "llava", "messages": [], "max_tokens": 1' + b"0" * 5000 + b"}", "max_tokens|JSON"),
    "no text": (b'{"model": "\xff"}', "JSON|unicode"),
    "tools": (asks("What?", tools=[{}]), "tools: not read here"),
    "two answers": (asks("What?", n=2), "n: Input should be 1"),
    "hot": (asks("What?", temperature=3), "temperature"),
    "not a number": (
        b'{"model": "llava", "messages": [{"role": "user", "content": "What?"}], "temperature": NaN}',
        "temperature|JSON",
    ),
    "mark": (asks(f"{IMAGE} What?"), "placeholders"),
    "nobody asks": (asks("What?") | {"messages": [{"role": "assistant", "content": "Yes."}]}, "expected 'user' last"),
    "two in a row": (asks("What?") | {"messages": asks("What?")["messages"] * 2}, "turns must alternate"),
    "a system's picture": (
        asks("What?") | {"messages": [{"role": "system", "content": [shown(LARGE)]}, *asks("What?")["messages"]]},
        "only human turns show images",
    ),
    "nothing": ({}, "model: Field required; messages: Field required"),
    "no JSON": (b"{", "JSON"),
    "wrong all over": (
        asks("What?") | {"messages": [{"role": "user", "content": [1] * 300}]},
        "30[01] values are not as",
    ),
    "many parts": (asks("What?") | {"messages": [{"role": "user", "content": [1] * 10**5}]}, "content.*at most"),
    "deep": (b"[" * 10**6, "JSON|recursion"),
    "surrogate": (b'{"model": "llava", "messages": [{"role": "user", "content": "\\ud800"}]}', "JSON|string|unicode"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, address):
    body, pattern = REFUSED[name]
    status, text = sent(address, body)
    error = json.loads(text)["error"]
    assert status == (404 if name == "unknown" else 400) and error["type"] == "invalid_request_error"
    assert re.search(pattern, error["message"]) and len(error["message"]) < 500


def test_values_that_ask_for_nothing_are_taken_and_others_named(address):
    """Some clients send all that they know."""
    neutral = {
        "top_p": 1.0,
        "stop": None,
        "presence_penalty": 0,
        "tools": [],
        "response_format": {"type": "text"},
        "seed": None,
    }
    assert sent(address, asks("What?") | neutral)[0] == 200
    status, text = sent(address, asks("What?") | {"top_p": 0.5})
    assert status == 400 and json.loads(text)["error"]["message"] == "top_p: not read here; leave it out"


def test_what_reaches_it(address, monkeypatch):
    """No form of another origin's page, no name of another's, no body without end, and nothing but what there is."""
    good = asks("What?")
    assert sent(address, good, **{"Content-Type": "text/plain"})[0] == 415
    assert sent(address, good, Host="rebound.example")[0] == 400
    assert sent(address, good, Host=f"localhost:{address[1]}")[0] == 200
    assert sent(address, good, "/v1/../etc/passwd")[0] == sent(address, good, "/docs")[0] == 404
    monkeypatch.setattr(limits, "REQUEST_BYTES", 1000)
    status, text = sent(address, asks("What?" * 300))
    assert status == 413 and "more than 1,000 bytes" in json.loads(text)["error"]["message"]


def test_a_temperature_draws(address):
    said = {
        json.loads(sent(address, asks("What?", temperature=2))[1])["choices"][0]["message"]["content"] for _ in range(4)
    }
    assert len(said) > 1


def test_the_page_needs_nothing_from_elsewhere(address):
    connection = http.client.HTTPConnection(*address)
    connection.request("GET", "/")
    response = connection.getresponse()
    page = response.read().decode()
    connection.close()
    policy = response.getheader("Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "connect-src 'self'" in policy and "http" not in policy
    assert page == api.PAGE.read_text() and not re.search(
        r"https?://|//[a-z]|@import|url\(", page.partition("<script>")[0]
    )
    assert set(re.findall(r"fetch\((.*?)[,)]", page)) == {'"/v1/chat/completions"', '"/v1/models"'}


def test_openais_client(address, alone):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{address[1]}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()][:1] == ["ee_mllm"]
    red = file_of("red")
    request = asks(shown(red), "What is it?", model="llava")
    true = truth(alone, "llava", 6, red, "What is it?")
    found = client.chat.completions.create(**request)
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (true, "length")
    assert found.usage.prompt_tokens_details.cached_tokens == 0 and found.cost["visual_tokens"] == 16
    with client.chat.completions.create(**request, stream=True) as events:
        assert "".join(event.choices[0].delta.content or "" for event in events) == true
    with pytest.raises(openai.BadRequestError, match="nothing is fetched"):
        client.chat.completions.create(**asks(shown("https://example.org/cat.png")))
    with pytest.raises(openai.NotFoundError, match="did you mean llava"):
        client.chat.completions.create(**asks("What?", model="lava"))


def test_what_the_commands_refuse(config, address, tmp_path, capsys, monkeypatch):
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    for verb in ("serve", "demo-web"):
        assert cli.main([verb, str(tmp_path), "--port", str(address[1])]) == 2
        assert re.search(r"--port \d+: .*in use; --port 0 takes one that is free", capsys.readouterr().err)
        assert cli.main([verb, str(tmp_path), "--port", "99999"]) == 2
        assert cli.main([verb, str(tmp_path), "--max-new-tokens", "0"]) == 2
    assert cli.main(["serve", str(tmp_path), "--batch", "0"]) == 2
    capsys.readouterr()
    monkeypatch.setattr("lit_eemllm.cli.serve.find_spec", lambda name: None if name == "uvicorn" else name)
    assert cli.main(["demo-web", str(tmp_path)]) == 2
    assert "uvicorn: not installed; pip install 'lit_eemllm[serve]'" in capsys.readouterr().err
