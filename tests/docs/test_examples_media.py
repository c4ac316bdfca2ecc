"""The media example, compared with ffprobe and with the decoded frames of the source."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from batchlab.core.task_context import File
from tests.support.examples import contexts, gathered, handler

pytestmark = [pytest.mark.usefixtures("ffmpeg"), pytest.mark.slow]

segment = handler("media", "video:segment")
transcode = handler("media", "video:transcode")
join = handler("media", "video:join")


def output(*command: str | Path) -> str:
    """Run a command, and return its output."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def probe(path: Path) -> dict[str, dict[str, Any]]:
    """Return ffprobe's description of the streams by kind, with the number of frames."""
    found = output("ffprobe", "-v", "error", "-count_frames", "-show_streams", "-of", "json", path)
    return {stream["codec_type"]: stream for stream in json.loads(found)["streams"]}


def pictures(path: Path) -> list[str]:
    """Return a hash of each decoded frame."""
    found = output("ffmpeg", "-v", "error", "-i", path, "-map", "0:v", "-f", "framemd5", "-")
    return [line.split(",")[-1] for line in found.splitlines() if not line.startswith("#")]


def times(path: Path) -> list[float]:
    """Return the time of each frame, in seconds."""
    entries = ["-select_streams", "v", "-show_entries", "frame=pts_time", "-of", "json"]
    found = output("ffprobe", "-v", "error", *entries, path)
    return [float(frame["pts_time"]) for frame in json.loads(found)["frames"]]


def likeness(result: Path, source: Path) -> list[float]:
    """Compare each frame of the result with the source at 96x72. Return the PSNR in dB of each frame."""
    scaled = "[1:v]scale=96:72[small];[0:v][small]psnr=stats_file=-"
    found = output("ffmpeg", "-v", "error", "-i", result, "-i", source, "-lavfi", scaled, "-f", "null", "-")
    values = re.findall(r"psnr_avg:(\S+)", found)
    return [float(value) for value in values]


def make(path: Path, *, sound: bool) -> File:
    """Write a small video of 3.4 s with 25 frames per second and a single key frame at its beginning."""
    tone = ["-f", "lavfi", "-i", "sine=duration=3.4", "-c:a", "aac"] if sound else []
    picture = ["-f", "lavfi", "-i", "testsrc2=duration=3.4:size=192x144:rate=25"]
    codec = ["-c:v", "libx264", "-preset", "veryfast", "-g", "1000", "-pix_fmt", "yuv420p"]
    output("ffmpeg", "-v", "error", *picture, *tone, *codec, path)
    return File(path)


def run(sources: list[File], folder: Path, segment_s: float = 1) -> list[File]:
    """Run the job without a grid."""
    ctx = contexts(folder, segment_s=segment_s, height=72)
    segmented = [segment(source, next(ctx)) for source in sources]
    done = [transcode(group, next(ctx)) for group in gathered(segmented, by="segment")]
    # The segments may arrive in any order.
    return [join(group, next(ctx)) for group in gathered(done[::-1], by="video")][::-1]


def test_the_result_has_every_picture_of_the_source_at_its_time(tmp_path: Path) -> None:
    source = make(tmp_path / "made.mp4", sound=True)
    [result] = run([source], tmp_path)
    assert result.name == "made.mp4"
    assert times(result.path) == pytest.approx(times(source.path), abs=0.001)
    alike = likeness(result.path, source.path)
    assert len(alike) == 85
    assert min(alike) > 20, "a picture at the wrong place is far below"
    streams = probe(result.path)
    assert streams["video"]["codec_name"] == "h264"
    assert (streams["video"]["width"], streams["video"]["height"]) == (96, 72)
    assert int(streams["video"]["nb_read_frames"]) == 85
    assert float(streams["audio"]["duration"]) == pytest.approx(3.4, abs=0.05)


def test_segments_hold_the_pictures_of_the_source_unchanged(tmp_path: Path) -> None:
    source = make(tmp_path / "made.mp4", sound=False)
    parts = segment(source, next(contexts(tmp_path, segment_s=1)))
    assert [part["segment"] for part in parts] == [f"made-{n:05d}" for n in range(4)]
    found = [picture for part in parts for picture in pictures(part["file"].path)]
    assert found == pictures(source.path)
    assert [len(pictures(part["file"].path)) for part in parts] == [25, 25, 25, 10]


def test_a_video_without_sound_and_one_shorter_than_a_segment(tmp_path: Path) -> None:
    source = make(tmp_path / "silent.mp4", sound=False)
    [result] = run([source], tmp_path, segment_s=10)
    assert probe(result.path).keys() == {"video"}
    assert len(times(result.path)) == 85


def test_videos_of_one_job_are_kept_separate(tmp_path: Path) -> None:
    sources = [make(tmp_path / "a.mp4", sound=True), make(tmp_path / "b.mp4", sound=False)]
    results = run(sources, tmp_path)
    assert {result.name: set(probe(result.path)) for result in results} == {
        "a.mp4": {"video", "audio"},
        "b.mp4": {"video"},
    }


def test_file_that_is_not_a_video_fails(tmp_path: Path) -> None:
    path = tmp_path / "text.mp4"
    path.write_text("no video")
    with pytest.raises(subprocess.CalledProcessError):
        segment(File(path), next(contexts(tmp_path, segment_s=1)))


def test_real_video_keeps_its_pictures_and_length(shared_data: Path, tmp_path: Path) -> None:
    source = File(shared_data / "media" / "bigbuckbunny.mp4")
    before = probe(source.path)
    [result] = run([source], tmp_path)
    after = probe(result.path)
    assert after["video"]["nb_read_frames"] == before["video"]["nb_read_frames"] == "132"
    assert after["video"]["duration"] == before["video"]["duration"]
    assert after["video"]["codec_name"] == "h264"
    assert after["audio"]["channels"] == 2
    assert float(after["audio"]["duration"]) == pytest.approx(float(before["audio"]["duration"]), abs=0.05)
    assert result.size < source.size / 5
