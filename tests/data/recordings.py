"""Videos and sounds for tests, made here by PyAV."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np


def frames(count: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """Frames of a square that moves over a gradient, uint8 [count, height, width, 3]."""
    width, height = size
    across, down = np.linspace(0, 200, width), np.linspace(0, 200, height)
    still = np.stack([across + 0 * down[:, None], 0 * across + down[:, None], np.full((height, width), 40.0)], -1)
    moving = np.repeat(still[None], count, 0)
    for number in range(count):
        left = 5 * number % max(1, width - 12)
        moving[number, 8:20, left : left + 12] = (250, 60, 8 * number % 250)
    return moving.astype(np.uint8)


def video(
    count: int = 12, fps: int = 4, size: tuple[int, int] = (64, 48), *, form: str = "mp4",
    codec: str = "mpeg4", sound: bool = False, times: list[int] | None = None, path: str | None = None,
) -> bytes:  # fmt: skip
    """An encoded video. sound: with a track of sound. times: of its frames, in `1 / fps`, where these are uneven.
    path: of a file to write it to as well, its header first."""
    buffer = io.BytesIO()
    with av.open(path or buffer, "w", format=form, options={"movflags": "faststart"} if path else {}) as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        track: Any = container.add_stream("aac", rate=16000) if sound else None
        for number, pixels in enumerate(frames(count, size)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number if times is None else times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if track is not None:
            wave = av.AudioFrame.from_ndarray(tone(1.0, 16000)[None], format="fltp", layout="mono")
            wave.sample_rate = 16000
            container.mux(track.encode(wave))
            container.mux(track.encode())
    return Path(path).read_bytes() if path else buffer.getvalue()


def tone(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    """A tone that rises, float32 [samples]."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * (200 + 90 * seed + 150 * time) * time)).astype(np.float32)


def sound(
    seconds: float = 1.0,
    rate: int = 16000,
    *,
    channels: int = 1,
    form: str = "wav",
    codec: str = "pcm_s16le",
    seed: int = 0,
) -> bytes:
    """An encoded sound, the same in every channel."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=rate, layout="mono" if channels == 1 else "stereo")
        samples = np.repeat(tone(seconds, rate, seed)[None], channels, 0)
        kind = stream.format.name if hasattr(stream, "format") else stream.codec_context.format.name
        resampler = av.AudioResampler(format=kind, layout=stream.layout.name, rate=rate)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=stream.layout.name)
        frame.sample_rate = rate
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode())
    return buffer.getvalue()
