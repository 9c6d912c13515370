"""Videos: the frame at each index is the one full decoding gives, its time is true, refusals are clear."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from av.packet import Packet
from media import cut, decode_all, read_number, write_sound, write_video
from PIL import Image

from iv3jax.data import video as module
from iv3jax.data.image import resize
from iv3jax.data.video import probe, read_video
from iv3jax.errors import UserError

BUDGET = {"min_pixels": 1024, "max_pixels": 1 << 26}
X264_OPEN = "open-gop=1:bframes=3:b-adapt=0:keyint=10:min-keyint=10:scenecut=0"
VIDEOS = {
    "one_group.mp4": {"count": 40, "gop": 250},
    "short_groups.mp4": {"count": 60, "gop": 5, "b_frames": 3},
    "no_b_frames.mp4": {"count": 60, "gop": 10, "b_frames": 0},
    "intra.mp4": {"count": 60, "gop": 1, "b_frames": 0},
    "open_group.mkv": {"count": 60, "options": {"x264-params": X264_OPEN}},
    "open_group_hevc.mp4": {
        "count": 60,
        "codec": "libx265",
        "options": {"preset": "ultrafast", "x265-params": f"{X264_OPEN}:log-level=none"},
    },
    "mpeg2.ts": {"count": 60, "codec": "mpeg2video", "gop": 9},
    "late_start.ts": {"count": 60, "ticks": range(1000, 1060)},
    "late_start.mp4": {"count": 60, "ticks": range(100, 160)},
    "edit_list.mp4": {
        "ticks": range(-7, 53),
        "count": 60,
        "container_options": {"avoid_negative_ts": "disabled"},
    },
    "fragmented.mp4": {"count": 60, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "flash.flv": {"count": 60},
    "vp9.webm": {"count": 40, "codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "xvid.avi": {"count": 60, "codec": "mpeg4"},
    "h264.avi": {"count": 60},
    "motion_jpeg.avi": {"count": 40, "codec": "mjpeg", "pix_fmt": "yuvj420p", "b_frames": 0},
    "raw.h264": {"count": 40},
    "program.mpg": {"count": 40, "codec": "mpeg2video"},
    "animated.gif": {"count": 20, "codec": "gif", "pix_fmt": "rgb8", "rate": 10},
    "odd_size.mp4": {"height": 63, "width": 97, "pix_fmt": "yuv444p"},
    "one_frame.mp4": {"count": 1},
    "variable.mp4": {
        "count": 40,
        "ticks": [i * i + 3 * i for i in range(40)],
        "time_base": Fraction(1, 1000),
    },
    "ntsc.mkv": {"count": 60, "rate": Fraction(30000, 1001)},
}


@pytest.mark.parametrize("name", VIDEOS)
def test_same_frames_as_full_decoding(tmp_path, name):
    path = write_video(tmp_path / name, **VIDEOS[name])
    expect, _ = decode_all(path)
    info = probe(path)
    sparse = read_video(path, fps=4.0, min_frames=3, **BUDGET)
    dense = read_video(path, fps=1000.0, **BUDGET)
    assert set(dense.indices.tolist()) == set(range(len(expect)))
    # An edit list hides the first seven; the colours of a GIF are too few to read the number.
    shift = 7 if name == "edit_list.mp4" else 0
    for video in (sparse, dense):
        assert video.total_frames == info.num_frames == len(expect)
        assert video.source_size == expect[0].shape[:2] == (info.height, info.width)
        np.testing.assert_array_equal(video.times, info.times[video.indices])
        for frame, index in zip(video.frames, video.indices.tolist(), strict=True):
            np.testing.assert_array_equal(frame, resize(Image.fromarray(expect[index]), *frame.shape[:2]))
            assert name == "animated.gif" or read_number(frame) == index + shift


def test_skips_groups_without_a_wanted_frame(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 120, gop=12)
    fed = []
    feed = module._Decoder.feed
    monkeypatch.setattr(module._Decoder, "feed", lambda self, p: fed.append(p) or feed(self, p))
    read_video(path, fps=1.0, min_frames=4, **BUDGET)
    assert len(fed) < 70


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.flv", "a.avi", "a.h264", "a.mpg"])
@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30000, 1001)])
def test_constant_rate_is_the_nominal_one(tmp_path, name, rate):
    codec = {"codec": "mpeg2video"} if name == "a.mpg" else {}
    info = probe(write_video(tmp_path / name, 97, rate=rate, **codec))
    assert info.fps == float(rate)
    assert info.times[0] == 0
    tick = 0 if name in ("a.mp4", "a.avi") else 0.001
    np.testing.assert_allclose(info.times, np.arange(97) / float(rate), atol=tick + 1e-9)
    assert info.duration == pytest.approx(97 / rate, abs=0.003)


def test_whole_rates_give_exact_times(tmp_path):
    info = probe(write_video(tmp_path / "a.mp4", 100, rate=24))
    np.testing.assert_array_equal(info.times, np.arange(100) / 24)


def test_variable_rate(tmp_path):
    ticks = [0, 40, 100, 105, 900, 940, 2000, 2010]
    path = write_video(tmp_path / "a.mkv", len(ticks), ticks=ticks, time_base=Fraction(1, 1000))
    video = read_video(path, fps=2.0, **BUDGET)
    np.testing.assert_allclose(probe(path).times, np.array(ticks) / 1000, atol=1e-9)
    np.testing.assert_array_equal(video.indices, [0, 2, 5, 7])
    np.testing.assert_allclose(video.times, [0, 0.1, 0.94, 2.01], atol=1e-9)
    assert video.source_fps == pytest.approx(len(ticks) / video.duration)


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, -90, 180])
def test_rotation(tmp_path, rotation, hflip):
    path = write_video(tmp_path / "a.mp4", 4, rotation=rotation, hflip=hflip)
    stored, _ = decode_all(path)
    video = read_video(path, **BUDGET)
    # `rotation` is counterclockwise, as in numpy; the mirror comes after it.
    expect = np.rot90(stored[0], rotation // 90)
    expect = expect[:, ::-1] if hflip else expect
    assert video.source_size == expect.shape[:2]
    np.testing.assert_array_equal(video.frames[0], expect)


def replace(number: int, data: bytes):
    """An `edit` that puts other bytes into one packet."""

    def edit(packets: list[Packet]) -> list[Packet]:
        old, new = packets[number], Packet(data)
        new.pts, new.dts, new.duration, new.time_base = old.pts, old.dts, old.duration, old.time_base
        new.stream, new.is_keyframe = old.stream, old.is_keyframe
        return [*packets[:number], new, *packets[number + 1 :]]

    return edit


def test_packets_that_are_no_frames(tmp_path):
    # An MPEG-4 packet that says "same picture again" decodes to nothing.
    skipped = replace(7, b"\x00\x00\x01\xb6\x50\x4f")
    path = write_video(tmp_path / "a.mkv", 30, codec="mpeg4", b_frames=0, edit=skipped)
    video = read_video(path, fps=1000.0, **BUDGET)
    assert [read_number(f) for f in video.frames[:8]] == [0, 1, 2, 3, 4, 5, 6, 8]
    assert video.total_frames == 29


def test_hidden_vp8_frames(tmp_path):
    def hide(packets: list[Packet]) -> list[Packet]:
        data = bytearray(bytes(packets[7]))
        data[0] &= ~0x10
        return replace(7, bytes(data))(packets)

    options = {"deadline": "realtime", "cpu-used": "8"}
    path = write_video(tmp_path / "a.webm", 30, codec="libvpx", b_frames=0, options=options, edit=hide)
    assert probe(path).num_frames == len(decode_all(path)[0]) == 29


def test_recording_that_starts_between_keyframes(tmp_path):
    # The first group starts at its fifth packet, so nothing can be shown before frame 12.
    path = write_video(tmp_path / "a.ts", 40, edit=lambda packets: packets[4:])
    video = read_video(path, fps=1000.0, **BUDGET)
    assert [read_number(f) for f in video.frames] == list(range(12, 40))
    assert video.times[0] == 0


def test_joined_recordings(tmp_path):
    path = write_video(tmp_path / "a.ts", 40)
    path.write_bytes(path.read_bytes() * 2)
    video = read_video(path, fps=1000.0, **BUDGET)
    assert [read_number(f) for f in video.frames] == [*range(40)] * 2
    np.testing.assert_allclose(video.times, np.arange(80) / 30, atol=1e-9)


def refused(path: Path, *reasons: str, **options) -> None:
    """Asserts one clear line that starts with the file."""
    for reason in reasons:
        with pytest.raises(UserError, match=reason) as error:
            read_video(path, **(BUDGET | options))
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_not_a_video(tmp_path):
    refused(tmp_path / "missing.mp4", "no such file")
    refused(tmp_path, "folder")
    for name in ("text.mp4", "text.txt"):
        (tmp_path / name).write_text("hello world\n" * 100)
        refused(tmp_path / name, "text file|not a video")
    (tmp_path / "empty.mp4").touch()
    refused(tmp_path / "empty.mp4", "empty")
    for name in ("a.png", "a.jpg", "a.gif", "a.bmp"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
        refused(tmp_path / name, "picture.*pass it as an image")
    refused(write_sound(tmp_path / "a.m4a"), "sound but no picture")
    refused(write_video(tmp_path / "none.mp4", 0), "no video track|neither picture nor sound")
    none = {"movflags": "empty_moov+frag_keyframe"}
    refused(write_video(tmp_path / "none2.mp4", 0, container_options=none), "no frames")


def test_sizes_that_cannot_be_used(tmp_path):
    refused(write_video(tmp_path / "low.mp4", 4, height=16, width=96), "96x16", "scale it up")
    refused(write_video(tmp_path / "long.mkv", 4, codec="ffv1", height=32, width=6402), "aspect", "crop")
    good = write_video(tmp_path / "good.mp4", 4)
    refused(good, "min_pixels", min_pixels=2048, max_pixels=1024)
    refused(good, "min_frames", min_frames=9, max_frames=8)
    refused(good, "fps", fps=0.0)


@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
@pytest.mark.parametrize("name", ["a.mp4", "front.mp4", "fragments.mp4", "a.mkv", "a.avi"])
def test_truncated(tmp_path, name, share):
    flags = {"front.mp4": "faststart", "fragments.mp4": "frag_keyframe+empty_moov"}.get(name)
    options = {"movflags": flags} if flags else {}
    path = write_video(tmp_path / name, 90, height=128, width=160, container_options=options)
    assert probe(path).num_frames == 90
    refused(cut(path, share), "truncated")
    with pytest.raises(UserError, match="truncated"):
        probe(path)


def test_truncated_tells_how_far_it_goes(tmp_path):
    path = write_video(tmp_path / "a.mp4", 90, container_options={"movflags": "faststart"})
    refused(cut(path, 0.7), r"only \d+ of 90 frames, the first [0-2]\.\d seconds")


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_undecodable_packet(tmp_path, name):
    junk = replace(20, b"\x00\x00\x00\x01\x65" + b"\xff" * 60)
    path = write_video(tmp_path / name, 40, edit=junk)
    refused(path, "damaged: only 39 of 40 frames can be decoded; re-encode", fps=1000.0)


def test_damaged_first_keyframe(tmp_path):
    path = write_video(tmp_path / "a.mp4", 40, container_options={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    data[start : start + 600] = bytes(600)
    path.write_bytes(data)
    refused(path, "truncated or damaged: only")


def test_colon_in_the_name(tmp_path):
    path = write_video(tmp_path / "a.mp4", 4)
    renamed = path.rename(tmp_path / "12:30.mp4")
    assert probe(renamed).num_frames == 4
