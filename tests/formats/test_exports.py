"""A model that was written as a LLaVA, used through transformers alone: it is prompted, padded and answers as it was trained."""

import json
import shutil

import pytest
import tiny
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, pipeline

from lit_eemllm.errors import CheckpointError
from lit_eemllm.formats.vlm import check_vlm, save_vlm
from lit_eemllm.inputs.conversation import Conversation, Turn
from lit_eemllm.model.build import build

OWN = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
DATED = "{{ bos_token + 'Today is ' + strftime_now('%d %b %Y') }}" + OWN.replace("{{ bos_token }}", "")
SINGLE = (Turn("human", "<image>\nWhat?"),)
LONGER = (
    Turn("system", "Be short."),
    Turn("human", "<image>\nWhat colour?"),
    Turn("gpt", "Red."),
    Turn("human", "Sure, or is it blue?"),
)


@pytest.fixture(scope="module", params=["vicuna_v1", "plain", "jinja", "jinja, dated"])
def export(request, tmp_path_factory, parts):
    """A folder, the model in it, and what made its prompts in training."""
    folder = tmp_path_factory.mktemp("export")
    shutil.copytree(parts, folder / "parts")
    own = folder / "parts" / "decoder"
    (own / "chat_template.jinja").write_text(DATED if "dated" in request.param else OWN)  # whichever was trained
    settings = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "right", "pad_token": None}))
    template = request.param.partition(",")[0]
    config = tiny.config(folder / "parts", "x", folder, f"model.template={template}", "model.mechanism.preset=llava")
    model, processor = build(config.model)
    (folder / "llava").mkdir()
    save_vlm(model.eval(), processor.tokenizer, folder / "llava", template)
    return folder / "llava", model, processor


def picture(colour):
    return Image.new("RGB", (32, 24), colour)


def messages(turns, image):
    """As transformers has them: typed parts where there is an image."""
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    found = []
    for turn in turns:
        text = turn.text.removeprefix("<image>\n")
        parts = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        found.append({"role": roles[turn.role], "content": text if text == turn.text else parts})
    return found


def chats(processor):
    one = [SINGLE, (Turn("human", "<image>\nWhat colour is it, and where?"),)]
    return one if processor.template.name == "plain" else [*one, LONGER]


def test_prompts_are_those_of_the_training(export):
    folder, _, processor = export
    theirs = AutoProcessor.from_pretrained(folder)
    for turns in chats(processor):
        options = dict(add_generation_prompt=True, return_dict=True, return_tensors="pt")
        found = theirs.apply_chat_template(messages(turns, picture("red")), tokenize=True, **options)
        ours = processor.prompts([Conversation("x", turns, 1)], [[picture("red")]])
        assert found["input_ids"].equal(ours["input_ids"])
        tiny.assert_same_picture(
            found["pixel_values"], processor.transform.views(ours["pixel_values"]), processor.transform.std
        )
        answered = (*turns, Turn("gpt", "Red."))
        text = theirs.apply_chat_template(messages(answered, picture("red")), tokenize=False)
        rendered = "".join(span.text for span in processor.template.render(Conversation("x", answered, 1)))
        assert text == rendered, "and so are conversations that are trained further"


def test_answers_in_a_batch_are_those_of_each_alone(export):
    """As the export's tokenizer pads: prompts of other lengths move no answer."""
    folder, model, processor = export
    theirs, llava = AutoProcessor.from_pretrained(folder), LlavaForConditionalGeneration.from_pretrained(folder).eval()
    conversations = [
        messages(turns, picture(colour))
        for turns, colour in zip(chats(processor), ("red", "blue", "green"), strict=False)
    ]
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    batch = theirs.apply_chat_template(conversations, **options, processor_kwargs={"padding": True})
    assert (batch["attention_mask"] == 0).any() or processor.template.name == "plain", "of other lengths"
    settings = dict(do_sample=False, max_new_tokens=6)
    answers = llava.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    for answer, conversation in zip(answers, conversations, strict=True):
        alone = theirs.apply_chat_template(conversation, **options)
        found = model.generate(**alone, **settings)[0, alone["input_ids"].shape[1] :]
        assert answer[: len(found)].equal(found)


def test_the_pipeline_answers(export):
    folder, model, processor = export
    if processor.template.name != "vicuna_v1":
        pytest.skip("once is enough")
    asked = messages(SINGLE, picture("red"))
    found = pipeline("image-text-to-text", model=str(folder))(
        text=asked, max_new_tokens=6, do_sample=False, return_full_text=False
    )
    theirs = AutoProcessor.from_pretrained(folder)
    given = theirs.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**given, max_new_tokens=6, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert found[0]["generated_text"].strip() == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_other_prompts_are_seen_by_the_check(export, tmp_path):
    folder, model, processor = export
    assert "logits differ" in check_vlm(model, folder, processor)
    shutil.copytree(folder, tmp_path / "wrong")
    file = tmp_path / "wrong" / "chat_template.jinja"
    file.write_text(file.read_text() + "{{ ' ' }}")
    with pytest.raises(CheckpointError, match=r"wrong: transformers prompts otherwise than the model was trained: "):
        check_vlm(model, tmp_path / "wrong", processor)
