"""How answers are read: normalised for comparison, searched for the option they name, cut into words. Strings only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

_LETTER = re.compile(r"[\W_]*([A-Za-z])[\W_]*")  # the whole answer: B, (b), **B.**
_LEADING = re.compile(r"[\W_]*([A-Z](?=\s*[.:])|[A-Za-z](?=\s*[)\]]))\s*.(?=[\W_]|$)")  # B. a cat, (b) a cat
_OPTION = r"(?:[B-HJ-Z]|[AI](?!\s+(?!(?:or|nor|and|is|because)\b)[a-z]))(?![\w'])"  # a letter, not "A cat" or "I think"
_NAMED = re.compile(rf"(?i:answer|option|choice)(?:\s+is)?[\s:*(\[]+({_OPTION})")  # the answer is (B)
_ALONE = re.compile(rf"(?<![\w']){_OPTION}")

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = ("a", "an", "the")
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_WHOLE = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's "
    "how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock "
    "oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd "
    "someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's "
    "they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's "
    "where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've "
    "y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)
# The official table is these words, each under what is left without one of its apostrophes, and an entry the wrong way round.
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _WHOLE.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}

_CLITICS = r"'(?:s|re|ve|ll|d|m)\b"
_WORDS = re.compile(rf"\w+?(?=n't\b)|n't\b|{_CLITICS}|\w+(?:[-./:]\w+|,\d+|(?!{_CLITICS})'\w+)*|[$%&#@*+=]")


def normalise(answer: str) -> str:
    """Case, surrounding white space and a final full stop do not count."""
    return " ".join(answer.lower().split()).removesuffix(".")


def vqa_normalise(answer: str) -> str:
    """As the official VQA evaluation: punctuation, number words, articles, contractions.

    Its quirks are kept: a mark is a space between two letters, but nothing beside a space, or anywhere if digits are
    joined by a comma; every full stop goes that no digit follows.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    thousands = re.search(r"\d,\d", text)
    bare = text
    for mark in _PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if beside or thousands else " ")
    words = [_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", bare).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def chosen_letter(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that an answer names; None if it names none (a refusal, say) or several.

    The first of these that finds one: the answer is a letter; it is an option's text; it begins with a letter and a mark;
    it says which option the answer is; one letter stands alone in it; one option's text does. Our reading: it takes what
    LLaVA's ScienceQA evaluation and VLMEvalKit take without asking another model.

    Args:
        answer: of the model.
        choices: the options' texts, A first; none = not known, any letter may be named.
    """
    letters = ascii_uppercase[: len(choices)] if choices else ascii_uppercase
    if (match := _LETTER.fullmatch(answer)) and match[1].upper() in letters:
        return match[1].upper()
    texts = {letter: normalise(choice) for letter, choice in zip(letters, choices, strict=False)}
    same = [letter for letter, text in texts.items() if text == normalise(answer)]
    if same:
        return same[0] if len(same) == 1 else None
    if (match := _LEADING.match(answer)) and match[1].upper() in letters:
        return match[1].upper()
    named = set(_NAMED.findall(answer)) & set(letters)
    if len(named) == 1:
        return named.pop()
    rest, said = answer, set()
    for letter, text in sorted(texts.items(), key=lambda pair: -len(pair[1])):  # "dark red" before "red"
        pattern = rf"(?<!\w){re.escape(text)}(?!\w)"
        if text and re.search(pattern, rest, re.IGNORECASE):
            said.add(letter)
            rest = re.sub(pattern, "x", rest, flags=re.IGNORECASE)
    alone = set(_ALONE.findall(rest)) & set(letters)
    found = alone or said
    return found.pop() if len(found) == 1 else None


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's. (That of torchmetrics 1.9 searches a beam only and is too large for long texts that differ.)"""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def caption_words(caption: str) -> str:
    """Words with spaces between, much as the Penn Treebank tokeniser of COCO's caption evaluation, without its Java.

    Lower case, clitics apart ("is n't", "dog 's"), punctuation left out.
    """
    return " ".join(_WORDS.findall(caption.lower()))
