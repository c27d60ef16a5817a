"""Rows of JSON as people have them, to the one form that is read everywhere: LLaVA's.

::

    {"image": "a.jpg" or ["a.jpg", …], "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", …}]}      LLaVA
    {"images": ["a.jpg"], "conversations": …, "system": "…"}                                                LLaMA-Factory
    {"images": ["a.jpg" or {"path": "a.jpg"}], "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", …}]}  ms-swift
    {"images": ["a.jpg"], "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}, …]}     TRL

Videos are named likewise, under ``video`` or ``videos``, and shown by ``<video>``, or as LLaVA-Video has it by ``<image>``; `video` makes images
of them. What would change what is trained and is not read is an error by its key, above all pictures under a name that nobody looks at:
without a placeholder such a row would pass as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from lit_eemllm import limits
from lit_eemllm.errors import SampleError
from lit_eemllm.inputs.conversation import IMAGE

ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
PICTURES = ("image", "images", "image_path")
VIDEOS = ("video", "videos")
DESCRIBE = "Describe this image in detail."  # our prompt for captions that come without one
VIDEO = "<video>"  # placeholder of one video in the text of a human turn
_UNREAD = re.compile(r"audios?|tools|history|chosen|rejected(_.*)?")
_EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]", "{}")  # say nothing, as a list or as a list written as text
_OF_MEDIA = re.compile(r"image|img|picture|photo|video|audio|pixel", re.IGNORECASE)
_MEDIA = re.compile(r"(image|img|picture|photo|video|audio)s?([_ -]?(path|file|url)s?)?", re.IGNORECASE)
_DATA = re.compile(r"data:|\w+://|[\w+/=-]{100}")  # an address, or base64
_FILE = re.compile(r".+\.(jpe?g|png|webp|gif|bmp|tiff?|mp4|avi|mov|mkv|webm|mp3|wav|flac)", re.IGNORECASE)


def as_llava(row: Mapping[str, Any], key: str, members: int = 0) -> dict[str, Any]:
    """The row in LLaVA's form, with all its other fields; one in that form, or a question without turns, stays as it is.

    Pictures and videos that no placeholder shows (of `images`, `videos` or `messages`) go before the first question, as ms-swift and TRL
    have it, and ``<image>`` that can only mean a video becomes ``<video>``; the row names that in ``mended``.

    Args:
        row: as above.
        key: names it in messages.
        members: pictures that come with it otherwise, as in a shard.

    Raises:
        SampleError: ``unread_key``, or ``bad_conversation`` for what has the wrong form.
    """
    wrong = [name for name, value in row.items() if value and value not in _EMPTY and _UNREAD.fullmatch(name)]
    if wrong:
        raise _error("unread_key", key, f"it has {wrong[0]!r}, which is not read; remove the key, or leave the row out")
    found = dict(row)
    listed, named = _named(found, PICTURES, "pictures", key, members)
    filmed, videos = _named(found, VIDEOS, "videos", key)
    if (messages := found.pop("messages", None)) not in _EMPTY:
        if found.get("conversations") not in _EMPTY:
            raise _error("unread_key", key, "it has both 'messages' and 'conversations'; keep one of them")
        of_parts, films, order = list[str](), list[str](), list[Any]()
        found["conversations"] = [
            _turn(message, key, of_parts, films, order) for message in _list(messages, "messages", key)
        ]
        if other := [i for i, index in enumerate(order) if index not in (None, i)]:
            found_index = f"picture {other[0]} has the 'index' {str(order[other[0]])[:80]!a}"
            raise _error(
                "unread_key", key, f"{found_index}; pictures must be shown in the order in which they are named"
            )
        for parts, known, names in ((of_parts, named, listed), (films, videos, filmed)):
            if parts and known and parts != known:
                raise _error("unread_key", key, f"its messages name other files than {next(iter(names))!r}; keep one")
        named, videos = named or of_parts, videos or films
    turns = found.get("conversations")
    if system := found.pop("system", None):
        if not isinstance(system, str) or (isinstance(turns, list) and {"system"} & {_speaker(turn) for turn in turns}):
            raise _error("unread_key", key, "it has 'system' beside a system turn, or one that is no text; keep one")
        found["conversations"] = turns = [{"from": "system", "value": system}, *_list(turns, "conversations", key)]
    if not (named or members or videos) and (name := next(_like_pictures(found), None)):
        how = "name the pictures under 'image' or 'images', videos under 'video' or 'videos', or remove the key"
        raise _error("unread_key", key, f"{name!r} looks like pictures, which are not read under this name; {how}")
    if named:
        found["image"] = named[0] if isinstance(row.get("image"), str) else named
    if videos:
        found["video"] = videos
        if isinstance(turns, list) and not (named or members):
            _mean_videos(found, turns, len(videos))
    for mark, count, asked in (
        (VIDEO, len(videos), "videos" in filmed),
        (IMAGE, len(named) or members, "images" in listed),
    ):
        if (asked or messages not in _EMPTY) and isinstance(turns := found.get("conversations"), list):
            _show(found, turns, mark, count)
    return found


def videos_of(row: Mapping[str, Any]) -> list[str]:
    """The videos of a row in LLaVA's form."""
    listed = row.get("video") or []
    return listed if isinstance(listed, list) else [listed]


def show(text: str, mark: str, count: int) -> str:
    """A question with so many placeholders: those that it lacks come first, a line each."""
    return f"{mark}\n" * max(0, count - text.count(mark)) + text


def paths_of(row: Mapping[str, Any]) -> list[str]:
    """The pictures of a row in LLaVA's form."""
    listed = row.get("image") or []
    return listed if isinstance(listed, list) else [listed]


def encoded(row: Mapping[str, Any], key: str, errors: str = "strict") -> bytes:
    """The row as it is written. Raises SampleError if it cannot be, or has more bytes than are read."""
    try:
        data = json.dumps(row, ensure_ascii=False, sort_keys=True).encode(errors=errors)
    except (UnicodeEncodeError, RecursionError) as error:
        raise _error("bad_json", key, str(error)) from None
    if len(data) > limits.ROW_BYTES:
        largest = max(row, key=lambda name: len(str(row[name])))
        found = (
            f"its row has {len(data):,} bytes, most of them under {largest!r}; at most {limits.ROW_BYTES:,} are read"
        )
        raise _error("bad_json", key, found)
    return data


def _named(
    row: dict[str, Any], names: Sequence[str], what: str, key: str, members: int = 0
) -> tuple[dict[str, list[str]], list[str]]:
    """The paths under each of these names, and the one list that they are; taken out of the row."""
    said = {name: row.pop(name, None) for name in names}
    if members:  # how many there are, or that there are some
        said = {name: value for name, value in said.items() if not isinstance(value, int | float)}
    listed = {name: paths for name, value in said.items() if (paths := _paths(value, name, key))}
    named = next(iter(listed.values()), [])
    if not all(_same(paths, named) for paths in listed.values()):
        raise _error(
            "unread_key", key, f"it names different {what} under {' and '.join(map(repr, listed))}; keep one key"
        )
    return listed, named


def _mean_videos(row: dict[str, Any], turns: list[Any], videos: int) -> None:
    """LLaVA-Video's form: a row without images has an image's placeholder for each video."""
    texts = [turn.get("value") for turn in turns if isinstance(turn, Mapping)]
    said = "".join(text for text in texts if isinstance(text, str))
    if VIDEO not in said and said.count(IMAGE) == videos:
        row["conversations"] = [
            {**turn, "value": turn["value"].replace(IMAGE, VIDEO)}
            if _speaker(turn) == "human" and isinstance(turn.get("value"), str)
            else turn
            for turn in turns
        ]
        mend(row, "image_for_video")


def mend(row: dict[str, Any], what: str) -> None:
    mended = row.get("mended")
    row["mended"] = [*(mended if isinstance(mended, list) else []), what]


def _show(row: dict[str, Any], turns: list[Any], mark: str, count: int) -> None:
    """Put placeholders before the first question, if there is none anywhere."""
    asked = next((i for i, turn in enumerate(turns) if _speaker(turn) == "human"), None)
    texts = [turn.get("value") for turn in turns if isinstance(turn, Mapping)]
    if count and asked is not None and all(isinstance(text, str) and mark not in text for text in texts):
        shown = {**turns[asked], "value": show(turns[asked]["value"], mark, count)}
        row["conversations"] = [*turns[:asked], shown, *turns[asked + 1 :]]
        mend(row, "placeholder")


def _speaker(turn: Any) -> Any:
    return turn.get("from") if isinstance(turn, Mapping) else None


def _turn(message: Any, key: str, pictures: list[str], videos: list[str], order: list[Any]) -> dict[str, str]:
    """A message as a turn; the paths that its parts name are added to `pictures` and `videos`, of which of the row's pictures they show to
    `order`."""
    message = _mapping(message, "a message", {"role", "content"}, key)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _error("bad_conversation", key, f"a message's role is {str(role)[:80]!r}, expected {', '.join(ROLES)}")
    if isinstance(content, str):
        return {"from": ROLES[role], "value": content}
    text = ""
    for part in _list(content, "content", key):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            added = _mapping(part, "a part of text", {"type", "text", "index"}, key).get("text")
            if not isinstance(added, str):
                raise _error("bad_conversation", key, f"the 'text' of a part is {str(added)[:80]!a}, expected a text")
            separate = text.endswith(IMAGE) and not added.startswith("\n")
            text += "\n" * separate + added
        elif kind in ("image", "image_url"):
            part = _mapping(part, "a part of an image", {"type", "image", "path", "url", "image_url", "index"}, key)
            order.append(part.get("index"))
            path = next((part[name] for name in ("image", "path", "url", "image_url") if part.get(name)), None)
            pictures += _paths(
                {"path": path.get("url")} if kind == "image_url" and isinstance(path, Mapping) else path, kind, key
            )
            text += "\n" * text.endswith(IMAGE) + IMAGE
        elif kind == "video":
            part = _mapping(part, "a part of a video", {"type", "video", "path", "url"}, key)
            videos += _paths(next((part[name] for name in ("video", "path", "url") if part.get(name)), None), kind, key)
            text += "\n" * text.endswith(IMAGE) + VIDEO
        else:
            found = f"a part of a message has the type {str(kind)[:80]!r}; only text, image and video are read"
            raise _error("unread_key", key, found)
    return {"from": ROLES[role], "value": text}


def _paths(value: Any, name: str, key: str) -> list[str]:
    """The paths in a path, a mapping with one, or a list of such. None and empty values give none."""
    found = []
    for item in value if isinstance(value, list) else [value] if value and value not in _EMPTY else []:
        path = _mapping(item, f"{name!r}", {"path"}, key).get("path") if isinstance(item, Mapping) else item
        if not isinstance(path, str):
            raise _error(
                "bad_conversation", key, f"{name!r} is {str(value)[:80]!a}, expected a path or a list of paths"
            )
        found.append(path)
    return found


def _same(paths: list[str], others: list[str]) -> bool:
    """Whether they are the same, of which one list may have the folder that those of the other are in."""
    pairs = zip(paths, others, strict=False)
    return len(paths) == len(others) and all(f"/{a}".endswith(f"/{b}") or f"/{b}".endswith(f"/{a}") for a, b in pairs)


def _like_pictures(row: Mapping[str, Any]) -> Iterator[str]:
    """Fields that look like pictures or other media, by their name or by what they hold."""
    for name, value in row.items():
        item = value[0] if isinstance(value, list) and value else value
        if name in ("conversations", "id") or item in _EMPTY or not isinstance(item, str | Mapping):
            continue
        alike = max(SequenceMatcher(None, name.lower(), word).ratio() for word in ("image", "images"))
        typo = len(name) < 8 and alike >= 0.8
        holds = isinstance(item, Mapping) or _DATA.match(item)
        file = isinstance(item, str) and _FILE.fullmatch(item)
        if file or typo or _MEDIA.fullmatch(name) or (holds and _OF_MEDIA.search(name)):
            yield name


def _list(value: Any, name: str, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise _error("bad_conversation", key, f"{name!r} is {str(value)[:80]!a}, expected a list")
    return value


def _mapping(value: Any, name: str, known: set[str], key: str) -> Mapping[str, Any]:
    """A mapping that says nothing but what is read; a field without a value says nothing."""
    if not isinstance(value, Mapping):
        raise _error("bad_conversation", key, f"{name} is {str(value)[:80]!a}, expected a mapping")
    if unread := [field for field, said in value.items() if field not in known and said not in _EMPTY]:
        raise _error("unread_key", key, f"{name} has {unread[0]!r}, which is not read; remove it")
    return value


def _error(reason: str, key: str, message: str) -> SampleError:
    return SampleError(reason, f"sample {key!r}: {message}")
