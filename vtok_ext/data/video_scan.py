"""What training must know of every video before it begins: is it readable, how long, how large.

Each file is opened and its index read, by several threads, since most of the time goes into waiting
for the storage. An index file remembers what was found, so that a run which goes on opens only
files that have changed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vtok_ext.data.atomic_output import output_file, remove_partials
from vtok_ext.data.video import VideoReadError, read_times
from vtok_ext.data.video_list import VideoItem

_NUM_THREADS = 16
_FORMAT = "vtok_ext.videos"
_VERSION = 1
_MAX_BYTES = 1 << 32
# Between two times that the index is written while a long scan goes on.
_SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class VideoFacts:
    """What a scan finds of a readable video.

    Attributes:
        num_frames: that its index lists.
        duration: from the first to the last of them, in seconds.
        height, width: as shown.
        fps: rate that the file declares, 0 if it does not.
    """

    num_frames: int
    duration: float
    height: int
    width: int
    fps: float


class VideoIndex:
    """Scans videos, and remembers what it found of files as long as they do not change.

    A video is known by its place, its size and the time of its last change. Videos that are
    unreadable are remembered too, or a run that goes on could have other clips than it began with;
    what is remembered wrongly, say after a failure of the storage, goes with the file of the index.

    Args:
        path: file of the index; what cannot be read there counts as nothing. None remembers
            nothing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._known = {} if path is None else _read(path)
        self._num_new, self._saved_at = 0, time.monotonic()

    def scan(self, videos: Sequence[VideoItem]) -> list[VideoFacts | str]:
        """Returns the facts of each video, or the reason why it cannot be read."""
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            found = list(pool.map(self._one, videos))
        if time.monotonic() - self._saved_at > _SAVE_EVERY_S:
            self.save()
        return found

    def save(self) -> None:
        """Returns None when the index is written, if there is anything new."""
        if self.path is None or not self._num_new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_partials(self.path)
        with output_file(self.path, "train") as partial:
            values = {"format": _FORMAT, "version": _VERSION, "videos": self._known}
            partial.write_text(json.dumps(values) + "\n", encoding="utf-8")
        self._num_new, self._saved_at = 0, time.monotonic()

    def _one(self, video: VideoItem) -> VideoFacts | str:
        try:
            state = video.path.stat()
        except OSError as error:
            return str(error)
        place = str(video.path.absolute())
        key = place if video.offset is None else f"{place}:{video.offset}"
        version = [state.st_size if video.size is None else video.size, state.st_mtime_ns]
        known = self._known.get(key)
        if known is not None and known["version"] == version:
            return known["unreadable"] or VideoFacts(**known["facts"])
        try:
            found = _facts(video)
            self._known[key] = {"version": version, "facts": asdict(found), "unreadable": None}
        except VideoReadError as error:
            self._known[key] = {"version": version, "facts": None, "unreadable": str(error)}
            return str(error)
        except OSError as error:
            return str(error)
        finally:
            self._num_new += 1
        return found


def _facts(video: VideoItem) -> VideoFacts:
    times = read_times(video.path, video.content(), decode_first=True)
    seconds = times.seconds()
    duration, fps = seconds[-1] - seconds[0], float(times.fps)
    return VideoFacts(len(seconds), duration, times.height, times.width, fps)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Returns what an index file holds, {} if it is none."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            return {}
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        return {}
    right = values.get("version") == _VERSION and isinstance(values.get("videos"), dict)
    return {key: v for key, v in values["videos"].items() if _is_entry(v)} if right else {}


def _is_entry(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"version", "facts", "unreadable"}:
        return False
    facts, reason = value["facts"], value["unreadable"]
    names = set(VideoFacts.__dataclass_fields__)
    is_known = isinstance(facts, dict) and set(facts) == names and reason is None
    return is_known or (facts is None and isinstance(reason, str) and reason != "")
