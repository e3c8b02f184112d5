"""A video to frames with time stamps: Llama 4 sees a video as pictures in a row, each after a line of text.

Animated GIF and WebP, lists and folders of pictures need nothing but Pillow; other files need PyAV.
"""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from l4jax.processing.image import DECODE_ERRORS, ImageSource, damaged, load_image, open_checked, to_rgb

MAX_FRAMES = 256  # of a video, in one prompt
MAX_SCANNED = 10_000  # frames of an animation that are looked through
ANIMATIONS = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG", ".apng": "PNG"}
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
# Containers whose demuxer opens nothing but the file itself; playlists would open what they name.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg"


@dataclass(frozen=True)
class Frame:
    """One picture of a video."""

    image: Image.Image
    seconds: float
    """Time from the beginning of the video."""

    @property
    def stamp(self) -> str:
        """The text that comes before the frame, such as `[01:05.5]`."""
        minutes, seconds = divmod(round(self.seconds, 1), 60)
        return f"[{int(minutes):02d}:{seconds:04.1f}]"


def load_video(
    source: str | PathLike | Sequence[ImageSource], *, max_frames: int = 16, frames_per_second: float = 1.0
) -> list[Frame]:
    """Returns at most `max_frames` frames, evenly spread over the video, the first among them.

    Args:
        source: a video file, an animated GIF, WebP or PNG, a folder of pictures (in the order of the numbers in
            their names), or a list of pictures.
        max_frames: 1 to 256.
        frames_per_second: of a folder or list, which have no times of their own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no video that can be read, or has no frames.
        ModuleNotFoundError: the file needs PyAV, which is not installed.
    """
    if not 1 <= max_frames <= MAX_FRAMES:
        raise ValueError(f"max_frames={max_frames} must be in 1..{MAX_FRAMES}")
    if isinstance(source, str | PathLike):
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"no video {path}; check the path")
        if path.is_file():
            if path.suffix.lower() in ANIMATIONS:
                return _animation(path, max_frames)
            return _film(path, max_frames)
        source = sorted((p for p in path.iterdir() if p.suffix.lower() in PICTURES), key=_by_number)
        if not source:
            raise ValueError(f"folder {path} holds no pictures ({', '.join(PICTURES)}) to take as frames")
    if not isinstance(source, list | tuple) or not source:
        raise ValueError("a video must be a file, a folder or a list of at least one picture")
    chosen = spread(len(source), max_frames)
    return [Frame(load_image(source[index]), index / frames_per_second) for index in chosen]


def spread(count: int, limit: int) -> list[int]:
    """Returns at most `limit` of the indices 0 to `count` - 1, evenly spaced from 0."""
    limit = min(count, limit)
    return [index * count // limit for index in range(limit)]


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Sorts frame2 before frame10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _animation(path: Path, max_frames: int) -> list[Frame]:
    image = open_checked(io.BytesIO(path.read_bytes()), str(path), (ANIMATIONS[path.suffix.lower()],))
    try:
        count = getattr(image, "n_frames", 1)
        if count > MAX_SCANNED:
            raise ValueError(f"it has {count} frames, more than {MAX_SCANNED}")
        chosen = set(spread(count, max_frames))
        frames, milliseconds = [], 0.0
        for index in range(count):
            image.seek(index)
            image.load()
            if index in chosen:
                frames.append(Frame(to_rgb(image.copy()), milliseconds / 1000))
            milliseconds += image.info.get("duration", 100)
    except DECODE_ERRORS as error:
        raise ValueError(damaged(str(path), error)) from None
    return frames


def _film(path: Path, max_frames: int) -> list[Frame]:
    try:
        import av
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{path} needs PyAV to be read; install it by: pip install 'l4jax[video]'") from None
    try:
        # An open file, not a name: FFmpeg would take names for addresses too.
        with path.open("rb") as file, av.open(file, options={"format_whitelist": CONTAINERS}) as container:
            frames = list(_sampled(container, max_frames)) if container.streams.video else []
    except (av.FFmpegError, OSError) as error:
        raise ValueError(damaged(str(path), error)) from None
    if not frames:
        raise ValueError(f"{path} holds no pictures; give a video")
    return frames


def _sampled(container: Any, max_frames: int) -> Iterator[Frame]:
    """Yields the first frame at or after each of `max_frames` times, spread evenly over the film."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    begin = float((stream.start_time or 0) * stream.time_base)
    length = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
    times = [length * index / max_frames for index in range(max_frames)] if length else [0.0]
    last = -1.0
    for time in times:
        if time <= last:
            continue
        container.seek(int((begin + time) / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            seconds = -1.0 if frame.time is None else frame.time - begin
            if seconds > last and seconds >= time - 1e-3:
                last = seconds
                yield Frame(load_image(frame.to_image()), seconds)
                break
