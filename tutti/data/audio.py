"""Sounds in rows, decoded with PyAV: WAV, MP3, Ogg, FLAC and whatever else FFmpeg reads, also the sound of video files.

A sound is decoded to mono (the mean of its channels) at the sampling rate of the model's processor. Durations in
headers are often wrong, and the number of tokens depends on the exact length, so measuring a sound decodes it, which is
fast.
"""

from __future__ import annotations

from itertools import chain

import av
import numpy as np

from tutti.core.batch import Media
from tutti.data.media import Source, is_image, name_of, readable
from tutti.data.rows import RowError
from tutti.data.video import open_av

MAX_AUDIO_SECONDS = 3 * 3600
"""A longer sound is rejected as a mistake: decoded it would take a gigabyte."""


def load_sound(medium: Media, rate: int, max_seconds: float | None) -> np.ndarray:
    """The samples of a sound, or of a video's sound, as from `decode_sound`. RowError: it cannot be decoded, or has
    changed."""
    assert not isinstance(medium.source, tuple)
    samples = decode_sound(medium.source, rate, max_seconds)
    if len(samples) != (medium.size[0] if medium.kind == "audio" else medium.sound):
        raise RowError(f"{name_of(medium.source)} has changed during the run")
    return samples


def has_sound(source: Source | tuple[Source, ...]) -> bool:
    """True if a video is a file with a sound track; a list of frames and an animated image have none. RowError: it
    cannot be read."""
    if isinstance(source, tuple) or is_image(source):
        return False
    with readable(source, "a video"), open_av(source) as container:
        return bool(container.streams.audio)


def decode_sound(source: Source, rate: int, max_seconds: float | None) -> np.ndarray:
    """The samples of a sound, float32 [samples], at `rate` per second; only the first `max_seconds`, if given.

    RowError: it cannot be decoded.
    """
    most = round((max_seconds or MAX_AUDIO_SECONDS) * rate)
    pieces: list[np.ndarray] = []
    length = 0
    with readable(source, "a sound"), open_av(source) as container:
        if not container.streams.audio:
            raise RowError(f"{name_of(source)} has no sound")
        resampler = av.AudioResampler(format="fltp", rate=rate)
        for frame in chain(container.decode(container.streams.audio[0]), (None,)):
            for part in resampler.resample(frame):
                pieces.append(part.to_ndarray().mean(0, dtype=np.float32))
                length += len(pieces[-1])
            if length > most:
                break
    if not length:
        raise RowError(f"{name_of(source)} is a sound of no samples")
    if length > most and max_seconds is None:
        raise RowError(
            f"{name_of(source)} is longer than {MAX_AUDIO_SECONDS / 3600:g} hours: set data.audio_max_seconds"
        )
    return np.concatenate(pieces)[:most]
