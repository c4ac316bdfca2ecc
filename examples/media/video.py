"""Transcoding a video in parallel: cut it into segments, transcode each, join them.

Every picture of the source is in exactly one segment. The sound is processed in one piece, because
cutting compressed sound leaves clicks.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchlab import Context, File


def segment(item: File, ctx: Context) -> list[dict[str, Any]]:
    """Return one element per segment, and one for the sound if the video has sound.

    Segments begin at key frames, so the video is first encoded again, without loss, with a key frame
    at each cut. A source with frequent key frames could be cut with `-c copy` instead.
    """
    video, every = Path(item.name).stem, ctx.params["segment_s"]
    ffmpeg(
        "-i",
        item.path,
        "-map",
        "0:v:0",
        "-c:v",
        "libx264",
        "-preset",
        "ultrafast",
        "-qp",
        0,
        "-force_key_frames",
        f"expr:gte(t,n_forced*{every})",
        "-f",
        "segment",
        "-segment_time",
        every,
        "-reset_timestamps",
        1,
        ctx.scratch / "%05d.mkv",
    )
    if has_sound(item.path):
        ffmpeg("-i", item.path, "-map", "0:a:0", "-c", "copy", ctx.scratch / "sound.mka")
    return [
        {"video": video, "segment": f"{video}-{path.stem}", "file": ctx.save(path, path.name)}
        for path in sorted(ctx.scratch.glob("*.mk[va]"))
    ]


def transcode(item: list[dict[str, Any]], ctx: Context) -> dict[str, Any]:
    """One segment, or the sound, in the target format."""
    [part] = item  # gathered by segment, so there is one
    source: File = part["file"]
    if source.name == "sound.mka":
        target = ctx.scratch / "sound.m4a"
        ffmpeg("-i", source.path, "-c:a", "aac", "-ac", 2, "-b:a", "96k", target)
    else:
        target = (ctx.scratch / source.name).with_suffix(".mp4")
        ffmpeg(
            "-i",
            source.path,
            "-vf",
            f"scale=-2:{ctx.params['height']}",
            "-c:v",
            "libx264",
            "-preset",
            "veryfast",
            "-crf",
            26,
            "-pix_fmt",
            "yuv420p",
            target,
        )
    return part | {"file": ctx.save(target, target.name)}


def join(item: list[dict[str, Any]], ctx: Context) -> File:
    """All parts of one video as one file; nothing is encoded again."""
    files: dict[str, File] = {part["segment"]: part["file"] for part in item}
    video = item[0]["video"]
    sound = files.pop(f"{video}-sound", None)
    playlist = ctx.scratch / "segments.txt"
    paths = [str(files[key].path).replace("'", r"'\''") for key in sorted(files)]
    playlist.write_text("".join(f"file '{path}'\n" for path in paths))
    target = ctx.scratch / f"{video}.mp4"
    ffmpeg(
        "-f",
        "concat",
        "-safe",
        0,
        "-i",
        playlist,
        *(("-i", sound.path) if sound else ()),
        "-c",
        "copy",
        "-movflags",
        "+faststart",
        target,
    )
    return ctx.save(target, target.name)


def has_sound(path: Path) -> bool:
    """Whether the file has a stream of sound."""
    command = ["ffprobe", "-v", "error", "-select_streams", "a", "-show_entries", "stream=index"]
    found = subprocess.run([*command, "-of", "csv", path], check=True, capture_output=True)
    return bool(found.stdout.strip())


def ffmpeg(*arguments: str | int | Path) -> None:
    """Run ffmpeg on one thread, as the task holds one slot; its complaints go to the task's log."""
    *options, target = arguments
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y", *options, "-threads", 1, target]
    subprocess.run([str(word) for word in command], check=True)
