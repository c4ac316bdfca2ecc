"""Handlers that transcode a video in parallel: cut the video into segments, transcode each segment, join the segments.

Every frame of the source video is in exactly one segment. The audio track is one piece, because joined pieces of
compressed audio have audible clicks.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchlab import Context, File


def segment(item: File, ctx: Context) -> list[dict[str, Any]]:
    """Return one element per segment, and one element for the audio track if the video has one.

    Segments begin at key frames. So ffmpeg first encodes the video without loss, with a key frame at each cut. A video
    with frequent key frames could be cut with `-c copy`, without encoding.
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
    """Convert one segment, or the audio track, to the target format."""
    [part] = item  # the stage gathers by segment, so each group has one element
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
    """Join all segments and the audio track of one video into one file, without encoding."""
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
    """Return whether the file has an audio track."""
    command = ["ffprobe", "-v", "error", "-select_streams", "a", "-show_entries", "stream=index"]
    found = subprocess.run([*command, "-of", "csv", path], check=True, capture_output=True)
    return bool(found.stdout.strip())


def ffmpeg(*arguments: str | int | Path) -> None:
    """Run ffmpeg on one thread, because a task has one slot. ffmpeg writes errors to the task's log."""
    *options, target = arguments
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y", *options, "-threads", 1, target]
    subprocess.run([str(word) for word in command], check=True)
