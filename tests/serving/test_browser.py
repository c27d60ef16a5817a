"""`demo-web` and `serve` as processes: in a real browser a picture is asked about under two mechanisms, and nothing of it is left behind."""

from __future__ import annotations

import re
import shutil
import signal
from contextlib import contextmanager

import pytest
from lib.pages import REPOSITORY
from lib.processes import Started, run_code
from PIL import Image

from lit_eemllm.config import to_yaml
from lit_eemllm.evaluation.run import answer
from lit_eemllm.inputs.conversation import IMAGE, Conversation, Turn

pytestmark = pytest.mark.slow
# As the command line, but it tells of every file that is opened to be written.
COMMAND = """
import os, sys, tempfile
tempfile.tempdir = None  # found anew, by TMPDIR
def told(event, args):
    if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and args[0] != os.devnull:
        os.write(2, f"written: {{args[0]}}\\n".encode())
sys.addaudithook(told)
from lit_eemllm.cli import main
sys.exit(main({words}))
"""


@contextmanager
def running(verb, config, tmp_path, monkeypatch):
    """A command on an untrained run, in an empty folder, which is also where temporary files go; yields its address. It ends as by Ctrl-C,
    and leaves nothing."""
    run, empty = tmp_path / "run", tmp_path / "empty"
    run.mkdir()
    empty.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    monkeypatch.chdir(empty)
    words = [verb, str(run), "--checkpoint", "none", "--port", "0", "--max-new-tokens", "12"]
    process = Started(run_code, COMMAND.format(words=words), TMPDIR=str(empty))
    try:
        first, second = process.stdout.readline(), process.stdout.readline()
        assert first.startswith("before training, as ee_mllm, llava, "), process.said()
        told = process.said()
        assert str(empty) in told, "what is loaded passes through temporary files"
        yield re.match(r"(http://127\.0\.0\.1:\d+)(/v1)?; Ctrl-C ends it", second)[1]
        process.send_signal(signal.SIGINT)
        assert process.communicate(30)[0] == "" and process.returncode == 0
        assert process.said() == told
        assert not list(empty.iterdir()) and [path.name for path in run.iterdir()] == ["config.yaml"]
    finally:
        process.kill()


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, of the extra test")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("needs a browser: chromium and its chromedriver (Debian's packages chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    quiet = ["headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-background-networking", "no-first-run"]
    for option in [*quiet, "window-size=1000,800", f"user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(f"--{option}")
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


class Page:
    """What a person sees and does."""

    def __init__(self, browser, address):
        from selenium.webdriver.support.ui import WebDriverWait

        self.browser, self.wait = browser, WebDriverWait(browser, 60)
        browser.get(address)
        self.wait.until(lambda _: self.all("body[data-ready]"))

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def texts(self, selector):
        return [one.get_attribute("textContent") for one in self.all(selector)]

    def ask(self, question):
        """Press Enter; returns when both have answered."""
        turns = len(self.all(".turn"))
        (field,) = self.all("#question")
        field.clear()
        field.send_keys(question + "\n")
        self.wait.until(lambda _: len(self.all(".turn")) > turns and self.all("#ask:enabled"))


def test_a_picture_in_a_browser(config, alone, browser, tmp_path, monkeypatch):
    red = tmp_path / "red"  # without an extension, as nothing depends on it
    Image.new("RGB", (300, 200), "red").save(red, "PNG")

    def truth(way, *texts):
        alone.switch(way)
        turns = tuple(
            Turn(("human", "gpt")[i % 2], text) for i, text in enumerate([f"{IMAGE}\n{texts[0]}", *texts[1:]])
        )
        return answer(alone.model, alone.processor, [Conversation("k", turns, 1)], [[Image.open(red)]], 12)[0]

    with running("demo-web", config, tmp_path, monkeypatch) as address:
        page = Page(browser, address)
        assert page.texts(".way:first-of-type option")[:2] == ["ee_mllm, as the run was trained", "llava"]
        page.all("#file")[0].send_keys(str(red))
        page.wait.until(lambda _: page.all("#drop img"))
        page.ask("What is it?")
        first = [truth(way, "What is it?") for way in ("ee_mllm", "llava")]
        assert page.texts(".answer") == first and len(page.all(".question img")) == 1
        values = page.texts(".bar b")
        units = [r"[\d.]+ ms", r"[\d.]+ [kM]FLOP", r"[\d.]+ KiB", r"\d+ tokens/s"] * 2
        assert len(values) == 8 and all(map(re.fullmatch, units, values)), values
        assert max(bar.size["width"] for bar in page.all(".side.b .bar i")) > 50
        assert all(" text and 16 visual tokens; answer of 12" in text for text in page.texts(".about"))

        page.ask("And now?")
        again = [
            truth(way, "What is it?", said, "And now?") for way, said in zip(("ee_mllm", "llava"), first, strict=True)
        ]
        assert page.texts(".turn:first-child .answer") == again
        assert ["16 kept from before" in text for text in page.texts(".turn:first-child .about")] == [True, False]

        page.ask("</s>")  # is not asked, and not remembered
        assert (
            all("control token" in text for text in page.texts(".turn:first-child .error"))
            and len(page.all(".error")) == 2
        )
        page.all("#anew")[0].click()
        page.ask("What is it?")
        assert page.texts(".answer") == first
        requests = browser.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
        assert len(requests) == 9 and all(name.startswith(f"{address}/v1/") for name in requests)
        errors = [one["message"] for one in browser.get_log("browser")]
        assert len(errors) == 2 and all("status of 400" in text for text in errors), errors  # of what was not asked


def test_serve_answers_a_client(config, tmp_path, monkeypatch, capsys):
    """Also as docs/chat.md shows it."""
    openai = pytest.importorskip("openai")
    (code,) = re.findall(
        r"```python\n(.*?)```", (REPOSITORY / "docs" / "chat.md").read_text(encoding="utf-8"), re.DOTALL
    )
    Image.new("RGB", (300, 200), "red").save(tmp_path / "cat.jpg")
    with running("serve", config, tmp_path, monkeypatch) as address:
        code = code.replace("http://127.0.0.1:8000", address).replace("cat.jpg", str(tmp_path / "cat.jpg"))
        for known in (0, 16):
            exec(code, {})  # noqa: S102  ours
            assert capsys.readouterr().out.endswith(f" {known}\n")
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        found = client.chat.completions.create(model="llava", messages=[{"role": "user", "content": "What?"}])
        assert found.usage.completion_tokens == 12 and found.choices[0].finish_reason == "length"
        with pytest.raises(openai.NotFoundError):
            client.get("/", cast_to=object)
