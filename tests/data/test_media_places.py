"""Media in messages: all row formats give the same parts and entries, and mismatches are reported."""

from __future__ import annotations

from typing import Any

import pytest

from tutti.data.media_places import place_media
from tutti.data.rows import RowError, fill

ASKED = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
ANSWER = {"role": "assistant", "content": "A dog."}
URL = "data:image/png;base64,AAAA"

SHAPES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "openai": ([{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "What is this?"}], {}, URL),
    "openai, bare": (
        [{"type": "image_url", "image_url": "a.png"}, {"type": "text", "text": "What is this?"}],
        {},
        "a.png",
    ),
    "hugging face": ([{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is this?"}], {}, "a.png"),
    "base64": ([{"type": "image", "base64": "AAAA"}, {"text": "What is this?"}], {}, "data:image/x;base64,AAAA"),
    "a part and a column": (ASKED, {"images": ["a.png"]}, "a.png"),
    "placeholder": ("<image>What is this?", {"images": ["a.png"]}, "a.png"),
    "one image": ("<image>What is this?", {"image": "a.png"}, "a.png"),
    "bytes": ("<image>What is this?", {"image": {"bytes": b"x", "path": None}}, {"bytes": b"x", "path": None}),
    "no place": ("What is this?", {"images": ["a.png"]}, "a.png"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_gives_the_same_parts(name: str) -> None:
    content, columns, entry = SHAPES[name]
    messages, entries = place_media([{"role": "user", "content": content}, ANSWER], columns)
    assert messages == [{"role": "user", "content": ASKED}, ANSWER]
    assert entries == [("image", entry)]


def test_texts_around_placeholders_stay_as_they_are() -> None:
    text = "Compare <image>\nwith <image> and <video>."
    (message,), entries = place_media([{"role": "user", "content": text}], {"images": ["a", "b"]})
    assert message["content"] == [
        {"type": "text", "text": "Compare "}, {"type": "image"}, {"type": "text", "text": "\nwith "}, {"type": "image"},
        {"type": "text", "text": " and <video>."},
    ]  # fmt: skip
    assert entries == [("image", "a"), ("image", "b")]


def test_kinds_and_turns_keep_their_order() -> None:
    chat = [
        {"role": "user", "content": "<audio>and<image>"},
        ANSWER,
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]},
    ]
    _, entries = place_media(chat, {"image": "i", "audios": ["a"]})
    assert entries == [("audio", "a"), ("image", "i"), ("audio", "data:audio/wav;base64,AAAA")]


FRAMES = ["1.png", "2.png", "3.png"]
VIDEO_SHAPES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "openai": ([{"type": "video_url", "video_url": {"url": "a.mp4"}}], {}, "a.mp4"),
    "hugging face": ([{"type": "video", "path": "a.mp4"}], {}, "a.mp4"),
    "frames in a part": ([{"type": "video", "video": FRAMES, "video_fps": 3}], {}, {"frames": FRAMES, "video_fps": 3}),
    "frames by name": ([{"type": "video", "frames": FRAMES}], {}, {"frames": FRAMES, "video_fps": None}),
    "a mapping in a part": ([{"type": "video", "video": {"frames": FRAMES}}], {}, {"frames": FRAMES}),
    "placeholder": ("<video>", {"videos": ["a.mp4"]}, "a.mp4"),
    "one in a list": ("<video>", {"video": ["a.mp4"]}, "a.mp4"),
    "frames in a column": ("<video>", {"video": FRAMES}, FRAMES),
    "frames in columns": ("<video>", {"videos": [FRAMES]}, FRAMES),
    "frames and a rate": (
        "<video>",
        {"videos": [{"frames": FRAMES, "video_fps": 3}]},
        {"frames": FRAMES, "video_fps": 3},
    ),
    "frames without a place": ("", {"video": FRAMES}, FRAMES),
}


@pytest.mark.parametrize("name", VIDEO_SHAPES)
def test_every_shape_of_a_video(name: str) -> None:
    content, columns, entry = VIDEO_SHAPES[name]
    (asked, _), entries = place_media([{"role": "user", "content": content}, ANSWER], columns)
    assert {"type": "video"} in asked["content"] and entries == [("video", entry)]


def test_a_list_with_a_place_for_each_entry_is_of_videos() -> None:
    _, entries = place_media([{"role": "user", "content": "<video><video>"}], {"video": ["a.mp4", "b.mp4"]})
    assert entries == [("video", "a.mp4"), ("video", "b.mp4")]


def test_rows_without_media_are_left_alone() -> None:
    chat = [{"role": "user", "content": "a literal <image> tag"}, ANSWER]
    assert place_media(chat, {}) == (chat, [])
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, ANSWER]
    assert place_media(parts, {}) == ([{"role": "user", "content": "ab"}, ANSWER], [])


@pytest.mark.parametrize(
    ("content", "columns", "reason"),
    [
        ("<image><image>", {"images": ["a"]}, "more places for images than the 1"),
        ("<image>", {"images": ["a", "b"]}, "has 2 images, and places for 1"),
        ([{"type": "image"}], {}, "more places for images than the 0"),
        ([{"type": "video_file", "path": "x"}], {}, "part of type video_file"),
        ([{"type": "image_url", "image_url": {"detail": "low"}}], {}, "without url, path or data"),
        ([{"type": "text"}], {}, "text part without text"),
        ([3], {}, "a part that is"),
    ],
)
def test_what_does_not_add_up_is_said(content: Any, columns: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        place_media([{"role": "user", "content": content}], columns)


@pytest.mark.parametrize("column", ["image", "images", "file_name", "image_file_name", "images_file_names"])
def test_the_image_of_a_table_s_row(column: str) -> None:
    """Its own column, or the path in the metadata of a folder as Hugging Face's datasets read it."""
    value = ["a.png"] if column.endswith("s") else "a.png"
    row = fill({"user": "<image>What is this?", "assistant": "{text}"}, {column: value, "text": "A dog."})
    messages, entries = place_media(row["messages"], row)
    assert messages == [{"role": "user", "content": ASKED}, ANSWER] and entries == [("image", "a.png")]


@pytest.mark.parametrize("row", [{"path": "a.png"}, {"image": ""}, {"images": []}, {"videos": ["a.mp4"]}])
def test_a_table_s_row_without_the_medium_that_its_template_has_a_place_for(row: dict[str, Any]) -> None:
    with pytest.raises(RowError, match="has nothing in a column image, images or file_name for the <image> of data"):
        fill({"user": "<image>What is this?", "assistant": "{text}"}, {**row, "text": "A dog."})
