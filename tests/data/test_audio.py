"""Audio of any format is read as one channel at the requested rate; unreadable files give a one-line error."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.recordings import sound, tone, video
from tutti.core.batch import Media
from tutti.data import audio
from tutti.data.audio import decode_sound, load_sound
from tutti.data.rows import RowError

FORMATS = {
    "wav": sound(),
    "stereo": sound(channels=2),
    "flac": sound(form="flac", codec="flac"),
    "mp3": sound(form="mp3", codec="libmp3lame"),
    "48 kHz": sound(rate=48000),
    "8 kHz": sound(rate=8000),
    "ogg": sound(rate=48000, form="ogg", codec="libopus"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_sounds_of_any_format_are_alike(name: str) -> None:
    samples = decode_sound(FORMATS[name], 16000, None)
    assert samples.shape == (16000,) and samples.dtype == np.float32
    lossless = name in ("wav", "stereo", "flac")
    assert np.abs(samples - tone(1.0, 16000))[800:-800].max() < (1e-4 if lossless else 0.1)


def test_short_sounds_and_the_sound_of_a_video() -> None:
    assert decode_sound(sound(0.01, 8000), 16000, None).shape == (160,)
    assert abs(len(decode_sound(video(sound=True), 16000, None)) - 16000) <= 2048  # whole frames of its codec


def test_a_sound_ends_at_its_limit() -> None:
    whole = decode_sound(FORMATS["wav"], 16000, None)
    assert np.array_equal(decode_sound(FORMATS["wav"], 16000, 0.25), whole[:4000])


def test_what_cannot_be_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = {b"hello": "cannot be read as a sound: Invalid data", video(): "has no sound", sound()[:40]: "as a sound"}
    for source, reason in odd.items():
        with pytest.raises(RowError, match=reason):
            decode_sound(source, 16000, None)
    monkeypatch.setattr(audio, "MAX_AUDIO_SECONDS", 0.5)
    with pytest.raises(RowError, match=r"is longer than .* set data\.audio_max_seconds"):
        decode_sound(sound(), 16000, None)


def test_a_changed_sound_is_noticed() -> None:
    with pytest.raises(RowError, match="has changed"):
        load_sound(Media("audio", sound(), (100,)), 16000, None)
