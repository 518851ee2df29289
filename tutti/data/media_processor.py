"""A Hugging Face processor with the interface that the encoder and the loader need, for any family.

A processor replaces each placeholder in a text by as many tokens as the medium takes, and computes values (pixels,
features of sounds) from the media. The number of tokens only depends on the media's sizes, and for a video on the
selected frames. So when rows are encoded, the processor is called with blank media, once for each tuple of sizes, and
its results are cached. The placeholders of a rendered chat are then replaced as the processor would (`expand`), and the
trained spans are shifted.

When a micro batch is loaded, each sample's media are processed together, as for a single sample, and the samples'
values are joined (`values`). Samples with only images go through the processor in one call, which is much faster, if a
trial shows that this gives the same numbers. The dimension along which a value grows with the media is found once, by
processing one and two blanks of each kind; its other dimensions are padded with zeros.

The frames of a video are selected here and passed decoded, by the family's own rule (its `sample_frames`) unless
data.video_fps is set: processors' own handling of files would need additional packages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tutti.config import DataConfig
from tutti.core.batch import Frames, Media, Sample
from tutti.data.audio import decode_sound, has_sound, load_sound
from tutti.data.media import MediaFolder, identity, load_image, measure_image, reference, resized
from tutti.data.media_cache import MediaCache
from tutti.data.media_places import Entry, Span, as_drawn, mismatch
from tutti.data.rows import KINDS, BrokenMediaError, Conversation, RowError
from tutti.data.video import (
    FRAMES_FPS,
    MAX_VIDEO_PIXELS,
    Header,
    describe_video,
    evenly,
    load_video,
    measure_video,
    video_source,
)

_OF_TEXT = ("input_ids", "attention_mask", "text_replacement_offsets", "labels")

_KINDS = (*KINDS, "drawn")

REMEMBERED = 1024
"""Number of tuples of sizes whose replacements are cached; those of a long video may take 100 KB."""


class _Layout(NamedTuple):
    """The form of a processor's values for a kind of media: `dims` along which samples are joined, and for values
    that lie along tokens, their number for a token id (`along`). tokens: the ids that stand for a medium. stacked:
    joined videos need equal numbers of frames."""

    dims: dict[str, int]
    along: dict[str, dict[int, int]]
    tokens: frozenset[int]
    stacked: bool = False


@dataclass
class MediaProcessor:
    """The processor of a multimodal model; picklable.

    limits: the data.image_*, video_* and audio_* limits, to which media are cut or resized. cache: of decoded media.
    decodes_drawn: decode images that the model draws; otherwise they are blank.
    """

    processor: Any
    limits: DataConfig
    cache: MediaCache | None = None
    decodes_drawn: bool = True
    _replacements: dict[Any, tuple[list[str], int]] = field(default_factory=dict, repr=False)
    _layouts: dict[str, _Layout] = field(default_factory=dict, repr=False)
    _mixed: set[frozenset[str]] = field(default_factory=set, repr=False)
    _images_together: bool | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.name = type(self.processor).__name__
        self.markers = {
            kind: token for kind in _KINDS if isinstance(token := getattr(self.processor, f"{kind}_token", None), str)
        }
        self._marker = re.compile("|".join(map(re.escape, self.markers.values())))
        self._kind_of = {token: kind for kind, token in reversed(self.markers.items())}
        self.placeholders = [token for kind in self.markers for token in _placeholder_ids(self.processor, kind)]
        sounds = getattr(self.processor, "audio_processor", None) or getattr(self.processor, "feature_extractor", None)
        self._rate = int(getattr(sounds, "sampling_rate", 0))
        if self.limits.audio_in_video and not _hears_videos(self.processor):
            raise ValueError(f"data.audio_in_video: {self.name} takes no sound of a video; set false")

    def place(self, conversation: Conversation, entries: list[Entry]) -> tuple[Conversation, list[Entry]]:
        """The conversation and its media's entries, with images marked that become codes."""
        if not entries or "drawn" not in self.markers:
            return conversation, entries
        return as_drawn(conversation, entries, everyone=bool(getattr(self.processor, "draws_all", False)))

    def measure(self, kind: str, entry: Any, folder: MediaFolder) -> Media:
        """The medium of an entry, with its size. RowError: it cannot be read, or its kind is not supported."""
        if kind not in self.markers or (kind == "audio" and not self._rate):
            advice = getattr(self.processor, "advice", lambda kind: "")
            raise RowError(f"has {kind}, which {self.name} does not take{advice(kind)}")
        self._layout(kind)  # refuses an unusable processor
        if kind == "video":
            source, fps = video_source(entry, folder)
            header = measure_video(source)
            medium = Media(kind, source, header.size, self._frames(header, fps, listed=isinstance(source, tuple)))
            self._check_decodes(medium)
            if self.limits.audio_in_video and has_sound(source):
                assert not isinstance(source, tuple)
                sound = decode_sound(source, self._rate, self.limits.audio_max_seconds)
                return medium._replace(sound=len(sound))
            return medium
        source = reference(entry, folder)
        if kind == "audio":
            return Media(kind, source, (len(decode_sound(source, self._rate, self.limits.audio_max_seconds)),))
        return Media(kind, source, measure_image(source))

    def _frames(self, header: Header, said: float | None, *, listed: bool) -> Frames:
        """Select the frames of a video. said: the frame rate in its row. listed: the row lists the frames; all are
        used without a rate."""
        total, limits = header.total, self.limits
        fps = said or header.fps or (FRAMES_FPS if listed else 24.0)
        if self._layout("video").stacked:
            if limits.video_max_frames is None or limits.video_fps is not None:
                raise RowError(
                    f"has a video, and {self.name} packs videos of one number of frames alone: set "
                    "data.video_max_frames, of which every video then has exactly so many, and no data.video_fps"
                )
            return Frames(tuple(evenly(limits.video_max_frames, total)), total, fps)
        if listed and said is None:
            indices = list(range(total))
        else:
            number = max(1, round(total / fps * (limits.video_fps or _FPS)))
            indices = self._own_rule(header, fps) or evenly(min(number, total), total)
        if limits.video_max_frames is not None and len(indices) > limits.video_max_frames:
            indices = evenly(limits.video_max_frames, total)
        return Frames(tuple(indices), total, fps)

    def _own_rule(self, header: Header, fps: float) -> list[int]:
        """The frames that the family selects by its own rule; empty if it has none."""
        videos: Any = getattr(self.processor, "video_processor", None)
        has_rule = any(getattr(videos, name, None) for name in ("do_sample_frames", "fps", "num_frames"))
        if self.limits.video_fps is not None or not has_rule:
            return []
        width, height = header.size
        metadata = describe_video(header.total, fps, width, height)
        try:
            return [int(index) for index in videos.sample_frames(metadata)]
        except (ValueError, ZeroDivisionError, RuntimeError):  # too few frames for the rule
            return []

    def _check_decodes(self, video: Media) -> None:
        """Raise RowError if the selected frames of a video would take too much memory."""
        assert video.frames is not None
        width, height = self._size(video)
        if (count := len(video.frames.indices)) * width * height > MAX_VIDEO_PIXELS:
            raise RowError(
                f"has a video of which {count:,} frames of {width} x {height} pixels would be taken, too many to "
                "decode: set data.video_max_frames or data.video_max_pixels"
            )

    def expand(self, text: str, media: Sequence[Media]) -> tuple[str, list[tuple[int, int, int]]]:
        """The text with its placeholders replaced according to the media, and for each of them (begin and end in
        `text`, end in the new text). RowError: the placeholders do not correspond to the media."""
        found = list(self._marker.finditer(text)) if self.markers else []
        kinds = [self._kind_of[match.group()] for match in found]
        if kinds != [medium.kind for medium in media]:
            raise RowError(mismatch(kinds, media))
        if len({medium.sound > 0 for medium in media if medium.kind == "video"}) > 1:
            raise RowError(f"has videos with sound and without, of which {self.name} takes one kind in a row")
        parts: list[str] = []
        places, last, length = [], 0, 0
        for match, replacement in zip(found, self._replaced(media), strict=True):
            parts += (text[last : match.start()], replacement)
            length += match.start() - last + len(replacement)
            last = match.end()
            places.append((match.start(), last, length))
        parts.append(text[last:])
        return "".join(parts), places

    def _replaced(self, media: Sequence[Media]) -> list[str]:
        """The replacement text of each medium."""
        if not media:
            return []
        return [text for group in _groups(media) for text in self._measured(group)[0]]

    def num_values(self, media: Sequence[Media]) -> int:
        """The number of values (such as pixels of patches) that a row's media become, without padding for other
        media."""
        return sum(self._measured(group)[1] for group in _groups(media)) if media else 0

    def _measured(self, media: Sequence[Media]) -> tuple[list[str], int]:
        """The replacement text of each of some media that are processed together, and the number of their values."""
        key = tuple(
            (medium.kind, medium.size if medium.kind == "audio" else self._size(medium), medium.frames, medium.sound)
            for medium in media
        )
        if key not in self._replacements:
            if len(kinds := frozenset(medium.kind for medium in media)) > 1:
                self._check_mix(kinds)
            made = self._made_of_blanks(*media)
            if len(self._replacements) >= REMEMBERED:
                del self._replacements[next(iter(self._replacements))]
            values = sum(one.numel() for one in made.values() if isinstance(one, Tensor) and one.is_floating_point())
            self._replacements[key] = [item["replacement"] for item in made["text_replacement_offsets"]], values
        return self._replacements[key]

    def _size(self, medium: Media) -> tuple[int, int]:
        """The width and height of an image or video within its limits."""
        limits, (width, height) = self.limits, medium.size
        if medium.kind == "drawn":  # has the size that the model draws
            return width, height
        if medium.kind == "video":
            return resized((width, height), limits.video_min_pixels, limits.video_max_pixels)
        return resized((width, height), limits.image_min_pixels, limits.image_max_pixels)

    def _blank(self, medium: Media) -> Any:
        """A blank medium of the same size, in the processor's input format."""
        if medium.kind == "audio":
            return np.zeros(medium.size, np.float32)
        width, height = self._size(medium)
        if medium.frames is not None:
            pixels = np.zeros((len(medium.frames.indices), 3, height, width), np.uint8)
            return _Video(pixels, np.zeros(medium.sound, np.float32))
        return Image.new("RGB", (width, height))

    def _load(self, medium: Media) -> Any:
        """A decoded medium within its limits, in the processor's input format."""
        if medium.kind == "audio":
            return self._kept("audio", medium, self._decode_sound)
        if medium.kind == "drawn" and not self.decodes_drawn:
            return Image.new("RGB", (1, 1))
        pixels = self._kept(medium.kind, medium, self._decode)
        if medium.kind in ("image", "drawn"):
            return Image.fromarray(pixels)
        return _Video(pixels, self._kept("its sound", medium, self._decode_sound) if medium.sound else None)

    def _kept(self, what: str, medium: Media, decode: Callable[[Media], np.ndarray]) -> np.ndarray:
        """The result of `decode`, from the cache if possible. what: which part of the medium it is."""
        if self.cache is None:
            return decode(medium)
        name = f"{what} {medium.size}".encode() + identity(medium)
        if (found := self.cache.get(name)) is None:
            self.cache.put(name, found := decode(medium))
        return found

    def _decode_sound(self, medium: Media) -> np.ndarray:
        return load_sound(medium, self._rate, self.limits.audio_max_seconds)

    def _decode(self, medium: Media) -> np.ndarray:
        """An image [height, width, 3] or the frames of a video, within the limits."""
        size = self._size(medium)
        if medium.frames is not None:
            return load_video(medium, size)
        image = load_image(medium)
        return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))

    def _process(self, media: Sequence[Media], contents: Sequence[Any]) -> dict[str, Any]:
        """Run the processor on one sample's media; returns values as tensors, and how it replaced placeholders."""
        of_kind = {
            kind: [one for medium, one in zip(media, contents, strict=True) if medium.kind == kind] for kind in _KINDS
        }
        options: dict[str, Any] = {}
        if of_kind["video"]:
            metadata = [_metadata(medium) for medium in media if medium.frames is not None]
            options |= {"video_metadata": [metadata], "do_sample_frames": False}
        sounds = of_kind["audio"]
        if any(medium.sound for medium in media):
            heard = [one for medium, one in zip(media, contents, strict=True) if medium.kind != "image"]
            sounds = [one.sound if isinstance(one, _Video) else one for one in heard]
            number = count()
            owners = [next(number) if isinstance(one, _Video) else None for one in heard]
            options |= {"load_audio_from_video": True, "audio_from_video_indices": owners, "fps": _rates(media)[0]}
        if of_kind["drawn"]:
            options["drawn"] = of_kind["drawn"]
        if sounds:
            options["sampling_rate"] = self._rate
        try:
            found = self.processor(
                text=["".join(self.markers[medium.kind] for medium in media)],
                images=[of_kind["image"]] if of_kind["image"] else None,  # a list for one sample
                videos=[[video.pixels for video in of_kind["video"]]] if of_kind["video"] else None,
                audio=sounds or None,
                return_text_replacement_offsets=True,
                return_mm_token_type_ids=True,
                return_tensors="pt",
                **options,
            )
        except Exception as error:  # a processor may fail in any way on a medium it was not made for
            kinds = " and ".join(f"{kind}s" for kind, found in of_kind.items() if found)
            line = (str(error) or repr(error)).splitlines()[0]
            raise RowError(f"{self.name} cannot take its {kinds}: {line}") from None
        if "text_replacement_offsets" not in found:
            raise RowError(f"{self.name} does not tell how it replaces placeholders: it cannot be trained with")
        offsets = found["text_replacement_offsets"][0]
        if len(offsets) != len(media):
            raise RowError(
                f"{self.name} replaces {len(offsets)} of {len(media)} placeholders: it cannot be trained with"
            )
        made = {**found, "text_replacement_offsets": offsets}
        if (seconds := made.get("video_second_per_grid")) is not None:
            # These processors take the rate from one argument for all videos, and otherwise assume a constant.
            patch = self.processor.video_processor.temporal_patch_size
            made["video_second_per_grid"] = torch.tensor([patch / rate for rate in _rates(media)]).to(seconds)
        return made

    def _layout(self, kind: str) -> _Layout:
        """The form of the processor's values for this kind of media."""
        if kind not in self._layouts:
            blank = self._small(kind)
            one, two = self._made_of_blanks(blank), self._made_of_blanks(blank, blank)
            self._check_text(one)
            self._check_contents(blank, one)
            length = one["input_ids"].shape[-1]
            dims: dict[str, int] = {}
            along: dict[str, dict[int, int]] = {}
            for name, value in one.items():
                if name in _OF_TEXT or not isinstance(value, Tensor):
                    continue
                if value.shape == one["input_ids"].shape and two[name].shape[-1] != length:
                    pairs = zip(two["input_ids"].flatten().tolist(), two[name].flatten().tolist(), strict=True)
                    along[name] = {token: kind for token, kind in pairs if kind}
                    continue
                dims[name] = next(iter(_unlike(value, two[name])), 0)
            if kind == "video" and self._takes_for_images(one, dims):
                raise RowError(f"has a video, whose tokens {self.name} marks as an image's: they can't be told apart")
            ids = frozenset(one["input_ids"].flatten().tolist())
            # Some processors do not name the tokens that they write (Ovis 2).
            tokens = ids & {*self.placeholders} or ids & {*self.processor.tokenizer.get_added_vocab().values()}
            self._layouts[kind] = _Layout(dims, along, tokens, kind == "video" and self._stacks(blank, one, dims))
        return self._layouts[kind]

    def _takes_for_images(self, made: Mapping[str, Any], dims: Mapping[str, int]) -> bool:
        """True if a video's tokens are image tokens, although its values are not."""
        text = "".join(item["replacement"] for item in made["text_replacement_offsets"])
        return self.markers.get("image", "\0") in text and dims.keys().isdisjoint(self._layout("image").dims)

    def _check_text(self, made: Mapping[str, Any]) -> None:
        """Raise RowError if the processor adds to a text: the chat would then differ from inference."""
        (item,) = made["text_replacement_offsets"]
        tokens = self.processor.tokenizer(item["replacement"])["input_ids"]
        if made["input_ids"].flatten().tolist() != tokens:
            raise RowError(f"{self.name} writes more into a text than its media: it cannot be trained with")

    def _check_contents(self, blank: Media, made: Mapping[str, Any]) -> None:
        """Raise RowError if the number of a medium's tokens depends on what it shows, and not on its size alone."""
        draws = np.random.default_rng(0)
        noise = self._blank(blank)
        if isinstance(noise, _Video):
            noise = noise._replace(pixels=draws.integers(0, 256, noise.pixels.shape, np.uint8))
        elif isinstance(noise, np.ndarray):
            noise = draws.random(noise.shape, np.float32)
        else:
            noise = Image.fromarray(draws.integers(0, 256, (noise.height, noise.width, 3), np.uint8))
        if self._process([blank], [noise])["text_replacement_offsets"] != made["text_replacement_offsets"]:
            raise RowError(
                f"has {blank.kind}, of which {self.name} makes a number of tokens that depends on its content, while "
                "rows are packed before media are decoded: turn this off in the processor's configuration (VideoLLaMA "
                '3: "use_token_compression": false of its video processor)'
            )

    def _stacks(self, video: Media, made: Mapping[str, Any], dims: Mapping[str, int]) -> bool:
        """True if videos are stacked with a frame dimension that the processor does not pad."""
        shorter = video._replace(frames=Frames((0, 1), 2, 2.0))
        other = self._made_of_blanks(shorter)
        if not any(set(_unlike(made[name], other[name])) - {dim} for name, dim in dims.items()):
            return False
        try:
            self._made_of_blanks(video, shorter)
        except RowError:
            return True
        return False

    def _small(self, kind: str) -> Media:
        """A small medium for trials of the processor."""
        return Media(kind, b"", *_BLANKS.get(kind, ((self._rate,),)))

    def _made_of_blanks(self, *media: Media) -> dict[str, Any]:
        return self._process(media, [self._blank(medium) for medium in media])

    def _check_mix(self, kinds: frozenset[str]) -> None:
        """Raise RowError if the processor loses media of mixed kinds."""
        if kinds in self._mixed:
            return
        layouts = {kind: self._layout(kind) for kind in sorted(kinds)}
        blanks = [self._small(kind) for kind in layouts]
        alone = [self._made_of_blanks(blank) for blank in blanks]
        together = self._made_of_blanks(*blanks)
        for name in {name for layout in layouts.values() for name in layout.dims}:
            size = sum(made[name].numel() for made in alone if name in made)
            if together[name].numel() < size:
                raise RowError(f"has {' and '.join(layouts)}, of which {self.name} takes one kind in a row")
        self._mixed.add(kinds)

    def spans(self, sample: Sample) -> list[Span]:
        """For each medium of a sample, where its tokens begin and end: from its first placeholder to its last."""
        tokens = self._tokens_of(sample.media)
        places = np.flatnonzero(_among(sample.input_ids, tokens))
        texts = {self.processor.tokenizer.convert_ids_to_tokens(token) for token in tokens}
        spans, used = [], 0
        for half in self._halves(sample):
            for replacement in self._replaced(half):
                count = sum(replacement.count(text) for text in texts)
                own = places[used : used + count]
                spans.append((int(own[0]), int(own[-1]) + 1) if len(own) else (0, 0))
                used += count
        return spans

    def count(self, ids: np.ndarray, media: Iterable[Media]) -> int:
        """The number of tokens among `ids` that stand for media of the kinds of `media`."""
        return int(_among(ids, self._tokens_of(media)).sum())

    def _tokens_of(self, media: Iterable[Media]) -> set[int]:
        """The ids that stand for media of the kinds of `media`."""
        kinds = {kind for medium in media for kind in (medium.kind, *(("audio",) if medium.sound else ()))}
        return {token for kind in sorted(kinds) for token in self._layout(kind).tokens}

    def values(self, samples: Sequence[Sample], length: int) -> dict[str, Tensor]:
        """The model's inputs in addition to tokens for samples packed to `length` tokens: values by name, and [1,
        length] along the tokens. Empty without media. BrokenMediaError: one of them cannot be decoded."""
        if not any(sample.media for sample in samples):
            return {}
        made: list[Mapping[str, Any]] = []
        held = ((number, sample) for number, sample in enumerate(samples) if sample.media)
        for of_images, group in groupby(held, lambda item: _has_images_alone(item[1])):
            run = list(group)
            made += self._of_images(run) if of_images else self._one_by_one(run)
        media = [medium for sample in samples for medium in sample.media]
        kinds = {medium.kind for medium in media} | {"audio" for medium in media if medium.sound}
        layouts = [self._layout(kind) for kind in sorted(kinds)]
        dims: dict[str, int] = {}
        for name, dim in (pair for layout in layouts for pair in layout.dims.items()):
            dims[name] = min(dim, dims.get(name, dim))
        extras = {name: _join([one[name] for one in made if name in one], dim) for name, dim in dims.items()}
        ids = np.full(length, -1)
        packed = np.concatenate([sample.input_ids for sample in samples])
        ids[: len(packed)] = packed
        for name in {name for layout in layouts for name in layout.along}:
            lie = np.zeros(len(ids), np.int64)
            for layout in layouts:
                for token, kind in layout.along.get(name, {}).items():
                    lie[ids == token] = kind
            extras[name] = torch.from_numpy(lie)[None]
        return extras

    def _halves(self, sample: Sample) -> list[tuple[Media, ...]]:
        """The media of each of a sample's sequences; both of a pair have the same ones."""
        if not sample.split:
            return [sample.media]
        return [sample.media[: len(sample.media) // 2]] * 2

    def _one_by_one(self, samples: Iterable[tuple[int, Sample]]) -> list[Mapping[str, Any]]:
        """The processor's outputs for the media of numbered samples, each processed separately."""
        made: list[Mapping[str, Any]] = []
        for number, sample in samples:
            try:
                made += self._each(sample)
            except RowError as error:
                raise BrokenMediaError(str(error), number) from None
        return made

    def _of_images(self, samples: list[tuple[int, Sample]]) -> list[Mapping[str, Any]]:
        """The processor's outputs for numbered samples with only images: from a single call, if possible."""
        if len(samples) == 1 or not self._takes_images_together():
            return self._one_by_one(samples)
        try:
            made = self._process_images([[self._load(medium) for medium in sample.media] for _, sample in samples])
        except Exception:  # the sample at fault is found below
            return self._one_by_one(samples)
        replaced = [[item["replacement"] for item in offsets] for offsets in made["text_replacement_offsets"]]
        as_measured = replaced == [self._replaced(sample.media) for _, sample in samples]
        return [made] if as_measured else self._one_by_one(samples)

    def _process_images(self, images: Sequence[Sequence[Image.Image]]) -> Mapping[str, Any]:
        """Run the processor on several samples' images; returns values as tensors, and replacements of placeholders."""
        text = [self.markers["image"] * len(own) for own in images]
        options: dict[str, Any] = {"padding": True, "return_text_replacement_offsets": True, "return_tensors": "pt"}
        found: Mapping[str, Any] = self.processor(text=text, images=list(images), **options)
        return found

    def _takes_images_together(self) -> bool:
        """True if one call for the images of several samples gives the same values as a call per sample. Tested with
        noise of three sizes, one of them twice."""
        if self._images_together is None:
            layout, draws = self._layout("image"), np.random.default_rng(0)
            noise = [
                Image.fromarray(draws.integers(0, 256, (height, width, 3), np.uint8))
                for width, height in ((64, 48), (48, 64), (64, 48), (112, 80))
            ]
            samples = [noise[:1], noise[1:3], noise[3:]]
            alone = [self._process([Media("image", b"", one.size) for one in own], own) for own in samples]
            try:
                together = self._process_images(samples)
            except Exception:  # a processor may fail in any way on unsuitable input
                together = {}
            parts = {name: [made[name] for made in alone if name in made] for name in layout.dims}
            self._images_together = all(
                name in together and torch.equal(together[name], _join(values, layout.dims[name]))
                for name, values in parts.items()
            )
        return self._images_together

    def _each(self, sample: Sample) -> list[Mapping[str, Any]]:
        """The processor's outputs for the media of each of a sample's sequences."""
        halves = self._halves(sample)
        return [self._values(group) for group in _groups(halves[0])] * len(halves)

    def _values(self, media: Sequence[Media]) -> Mapping[str, Any]:
        """The processor's outputs for a sample's media."""
        made = self._process(media, [self._load(medium) for medium in media])
        if [item["replacement"] for item in made["text_replacement_offsets"]] != self._replaced(media):
            raise RowError("a medium takes another number of tokens than its size said: it has changed during the run")
        return made


_FPS = 2.0
"""Frame rate for videos if nothing else determines it."""

_BLANKS: dict[str, tuple[Any, ...]] = {
    "image": ((64, 48),),
    "drawn": ((64, 48),),
    "video": ((64, 48), Frames((0, 1, 2, 3), 4, 2.0)),
}
"""Size and number of frames of media for trials; a sound has one second."""


class _Video(NamedTuple):
    """A decoded video: frames uint8 [frames, 3, height, width], and the samples of its sound, if used."""

    pixels: np.ndarray
    sound: np.ndarray | None


def _placeholder_ids(processor: Any, kind: str) -> list[int]:
    """The ids of this kind's placeholder tokens: those that the processor names, or that of its marker."""
    named = [token for token in getattr(processor, f"{kind}_token_ids", None) or () if token is not None]
    if not named:
        named = [processor.tokenizer.convert_tokens_to_ids(getattr(processor, f"{kind}_token"))]
    return [token for token in named if token is not None]


def _among(ids: np.ndarray, tokens: Iterable[int]) -> np.ndarray:
    """Returns bool [n]: which ids are among `tokens`. Comparing with each token is faster than isin."""
    found = np.zeros(len(ids), bool)
    for token in tokens:
        found |= ids == token
    return found


def _has_images_alone(sample: Sample) -> bool:
    return not sample.split and all(medium.kind == "image" for medium in sample.media)


def _hears_videos(processor: Any) -> bool:
    """True if a processor interleaves the sound of a video with its frames."""
    method = getattr(type(processor), "replace_video_with_audio_token", None)
    return method is not None and not method.__qualname__.startswith("OmniModalProcessorMixin")


def _groups(media: Sequence[Media]) -> list[tuple[Media, ...]]:
    """A row's media, grouped for calls of the processor: all together, except if videos have sound and different
    frame rates, which determine the interleaving. A call only has one rate, so each medium is then processed alone.
    """
    alone = any(medium.sound for medium in media) and len(set(_rates(media))) > 1
    return [(medium,) for medium in media] if alone else [tuple(media)]


def _rates(media: Sequence[Media]) -> list[float]:
    """The frame rate of each video."""
    return [len(one.indices) / one.total * one.fps for one in (medium.frames for medium in media) if one]


def _unlike(value: Tensor, other: Tensor) -> list[int]:
    """The dimensions in which two values have different sizes."""
    return [dim for dim in range(value.ndim) if other.shape[dim] != value.shape[dim]]


def _metadata(video: Media) -> Any:
    assert video.frames is not None
    width, height = video.size
    indices, total, fps = video.frames
    return describe_video(total, fps, width, height, frames_indices=list(indices))


def _join(values: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate values of several samples along `dim`, with other dimensions padded with zeros at their ends."""
    shape = [max(value.shape[d] for value in values) for d in range(values[0].ndim)]
    padded = []
    for value in values:
        pads = [[0, shape[d] - value.shape[d] if d != dim else 0] for d in range(value.ndim)]
        flat = [amount for pair in reversed(pads) for amount in pair]
        padded.append(torch.nn.functional.pad(value, flat) if any(flat) else value)
    return torch.cat(padded, dim) if len(padded) > 1 else padded[0]
