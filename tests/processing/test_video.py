"""Videos as frames: animations, folders, lists, films by PyAV, and files that are none of them."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from l4jax.processing.video import MAX_FRAMES, Frame, load_video, spread


def grey(level, size=(32, 24)):
    return Image.new("RGB", size, (level,) * 3)


def levels(frames):
    return [frame.image.getpixel((0, 0))[0] for frame in frames]


@pytest.mark.parametrize(("suffix", "options"), [("gif", {}), ("webp", {"lossless": True}), ("png", {})])
def test_animations_keep_their_times(tmp_path, suffix, options):
    path = tmp_path / f"film.{suffix}"
    pictures = [grey(level) for level in (0, 85, 170, 255)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[500, 250, 250, 1000], **options)
    frames = load_video(path)
    assert levels(frames) == [0, 85, 170, 255]
    assert [frame.seconds for frame in frames] == [0, 0.5, 0.75, 1]
    assert levels(load_video(path, max_frames=2)) == [0, 170]
    assert all(frame.image.mode == "RGB" for frame in frames)


def test_a_still_picture_is_a_video_of_one_frame(tmp_path):
    grey(9).save(tmp_path / "still.png")
    assert levels(load_video(tmp_path / "still.png")) == [9]


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    for index in (10, 9, 2, 1):
        grey(index).save(tmp_path / f"frame{index}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    frames = load_video(tmp_path, frames_per_second=2)
    assert levels(frames) == [1, 2, 9, 10]
    assert [frame.seconds for frame in frames] == [0, 0.5, 1, 1.5]


def test_a_list_of_pictures(tmp_path):
    grey(3).save(tmp_path / "a.png")
    frames = load_video([grey(1), tmp_path / "a.png", (tmp_path / "a.png").read_bytes()])
    assert levels(frames) == [1, 3, 3]


@pytest.mark.parametrize(("seconds", "stamp"), [(0, "[00:00.0]"), (65.46, "[01:05.5]"), (59.96, "[01:00.0]")])
def test_time_stamps(seconds, stamp):
    assert Frame(grey(0), seconds).stamp == stamp


@given(st.integers(1, 10_000), st.integers(1, MAX_FRAMES))
def test_frames_are_spread_evenly(count, limit):
    indices = spread(count, limit)
    assert indices[0] == 0
    assert len(indices) == min(count, limit)
    gaps = np.diff([*indices, count])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_film_is_sampled_over_its_length(tmp_path, suffix):
    av = pytest.importorskip("av", reason="PyAV is an extra: pip install 'l4jax[video]'")
    path = tmp_path / f"film.{suffix}"
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(40):
            container.mux(stream.encode(av.VideoFrame.from_image(grey(index * 6, (64, 48)))))
        container.mux(stream.encode())
    frames = load_video(path, max_frames=4)
    assert [frame.seconds for frame in frames] == pytest.approx([0, 1, 2, 3], abs=0.11)
    assert levels(frames) == pytest.approx([0, 60, 120, 180], abs=12)
    assert len(load_video(path, max_frames=64)) == 40


def test_a_film_without_pictures_is_refused(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is an extra: pip install 'l4jax[video]'")
    with av.open(tmp_path / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="holds no pictures; give a video"):
        load_video(tmp_path / "sound.mp4")


def test_a_film_without_pyav_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "film.mp4").write_bytes(b"0" * 100)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'l4jax\[video\]'"):
        load_video(tmp_path / "film.mp4")


def test_what_is_no_video_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no video .*film\.mp4"):
        load_video(tmp_path / "film.mp4")
    with pytest.raises(ValueError, match="holds no pictures"):
        load_video(tmp_path)
    with pytest.raises(ValueError, match="at least one picture"):
        load_video([])
    (tmp_path / "film.gif").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"film\.gif is "):
        load_video(tmp_path / "film.gif")


def test_files_that_name_other_files_are_refused(tmp_path):
    pytest.importorskip("av", reason="PyAV is an extra: pip install 'l4jax[video]'")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n")
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile other.mp4\n")
    for name in ("list.m3u8", "list.ffconcat"):
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            load_video(tmp_path / name)


@pytest.mark.parametrize("max_frames", [0, MAX_FRAMES + 1])
def test_the_number_of_frames_is_bounded(max_frames):
    with pytest.raises(ValueError, match=r"must be in 1\.\.256"):
        load_video([grey(0)], max_frames=max_frames)
