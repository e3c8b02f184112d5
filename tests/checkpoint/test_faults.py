"""Damaged, hostile and unlucky input: one clear line each, nothing executed, nothing left that looks finished."""

import contextlib
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4jax.checkpoint import convert, manifest, pieces, store, zarr
from l4jax.checkpoint.opening import open_checkpoint
from l4jax.checkpoint.pth import read_pth
from l4jax.checkpoint.safetensors import encode_header, read_header
from l4jax.config import preset
from tests.checkpoint.conftest import random_parameters


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint in Hugging Face's format, in several shards."""
    folder, config = tmp_path_factory.mktemp("original"), preset("small-maverick")
    first = store.save(folder / "first", random_parameters(config), config, dtype="bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "SHARD_BYTES", 300_000)
        return convert.convert(first, folder / "hf", to="hf")


@pytest.fixture
def hf(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "hf"))


def refused(source, error, match):
    """Converts and expects one line of complaint and no result."""
    destination = source.parent / "result"
    with pytest.raises(error, match=match) as raised:
        convert.convert(source, destination)
    assert "\n" not in str(raised.value)
    assert not destination.exists()


def second_shard(directory: Path) -> Path:
    return sorted(directory.glob("model-*.safetensors"))[1]


# --- Safetensors --------------------------------------------------------------------------------------------------


def test_a_missing_shard_is_named(hf):
    second_shard(hf).unlink()
    refused(hf, FileNotFoundError, r"model-00002-of-\d+\.safetensors is named in the index but absent")


def test_a_cut_shard_is_named(hf):
    shard = second_shard(hf)
    os.truncate(shard, shard.stat().st_size - 1)
    refused(hf, ValueError, r"model-00002.* has \d+ bytes, its header promises \d+")


def test_a_wrong_shape_is_named(hf):
    shard = second_shard(hf)
    infos = read_header(shard)
    key = next(key for key, info in infos.items() if len(set(info.shape)) == 2)
    described = {name: (info.dtype, info.shape[::-1] if name == key else info.shape) for name, info in infos.items()}
    start = min(info.offset for info in infos.values())
    shard.write_bytes(encode_header(described)[0] + shard.read_bytes()[start:])
    refused(hf, ValueError, r"has shape .* the config asks for")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin"])
def test_an_index_that_points_elsewhere_is_refused(hf, name):
    index = hf / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["language_model.lm_head.weight"] = name
    index.write_text(json.dumps(content))
    refused(hf, ValueError, "expected plain names")


def test_a_header_of_two_to_the_sixty_bytes_is_refused(hf):
    second_shard(hf).write_bytes(struct.pack("<Q", 1 << 60) + b"{}" * 100)
    refused(hf, ValueError, "announce a header of 1152921504606846976 bytes")


def test_a_config_of_a_thousand_million_layers_is_refused(hf):
    content = json.loads((hf / "config.json").read_text())
    content["text_config"]["num_hidden_layers"] = 10**9
    (hf / "config.json").write_text(json.dumps(content))
    refused(hf, ValueError, "num_hidden_layers=1000000000")


def test_an_empty_directory_says_what_was_expected(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", FileNotFoundError, r"expected config\.json and \*\.safetensors")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_header_breaks_the_reader(tmp_path_factory, data):
    """Whatever the bytes: a ValueError, or tensors that lie inside the file."""
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    number = st.integers(-3, 1 << 70)
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "nothing", 3]),
            "shape": st.lists(number, max_size=10) | st.none() | st.just([2, 2]),
            "data_offsets": st.lists(number, max_size=3) | st.just([0, 16]),
        }
    )
    header = data.draw(st.dictionaries(st.text(max_size=5), entry | st.integers(), max_size=3) | st.lists(number))
    text = data.draw(st.just(json.dumps(header).encode()) | st.binary(max_size=64))
    length = data.draw(st.just(len(text)) | st.integers(0, (1 << 64) - 1))
    path.write_bytes(struct.pack("<Q", length) + text + bytes(data.draw(st.integers(0, 64))))
    try:
        infos = read_header(path)
    except ValueError:
        return
    assert all(info.offset >= 0 and info.offset + info.size <= path.stat().st_size for info in infos.values())


# --- Pickles ------------------------------------------------------------------------------------------------------


def text_opcode(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def tensor_opcodes(key: str, offset: int, shape: tuple, strides: tuple) -> bytes:
    """A float32 tensor as torch.save pickles it, by hand."""
    storage = (
        b"(" + text_opcode("storage") + b"ctorch\nFloatStorage\n" + text_opcode(key) + text_opcode("cpu") + b"K\x06tQ"
    )
    numbers = [b"(" + b"".join(b"J" + struct.pack("<i", n) for n in group) + b"t" for group in (shape, strides)]
    rest = b"J" + struct.pack("<i", offset) + numbers[0] + numbers[1] + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def pth_bytes(path: Path, program: bytes, storage: bytes = np.arange(6, dtype="<f4").tobytes()) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", storage)
    return path


def dictionary(tensor: bytes) -> bytes:
    return b"\x80\x02}" + text_opcode("w") + tensor + b"s."


def test_a_tensor_pickled_by_hand_is_read(tmp_path):
    path = pth_bytes(tmp_path / "w.pth", dictionary(tensor_opcodes("0", 1, (2, 2), (1, 2))))
    np.testing.assert_array_equal(read_pth(path)[0]["w"], [[1, 3], [2, 4]])


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (7,), (1,)), (5, (2,), (1,)), (-1, (1,), (1,)), (0, (2,), (-1,)), (0, (2, 2), (1,)), (0, (2**31 - 1,), (0,))],
)
def test_a_tensor_past_its_storage_is_refused(tmp_path, offset, shape, strides):
    path = pth_bytes(tmp_path / "w.pth", dictionary(tensor_opcodes("0", offset, shape, strides)))
    if strides == (0,):  # inside the storage: one value many times
        assert read_pth(path)[0]["w"].shape == shape
        return
    with pytest.raises(ValueError, match=r"w\.pth: broken"):
        read_pth(path)


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_runs_a_program_is_refused_and_not_run(tmp_path):
    (tmp_path / "meta").mkdir()
    marker = tmp_path / "executed"
    pth_bytes(tmp_path / "meta" / "consolidated.00.pth", pickle.dumps({"w": Evil(marker)}))
    (tmp_path / "meta" / "config.json").write_text(json.dumps(preset("small-guard").to_hf()))
    refused(
        tmp_path / "meta", ValueError, r"asks for (posix|os|nt)\.system, which no checkpoint needs; nothing was run"
    )
    assert not marker.exists()


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6), cut=st.integers(0, 200))
def test_no_pth_file_breaks_the_reader(tmp_path_factory, changes, cut):
    path = tmp_path_factory.mktemp("fuzz") / "w.pth"
    data = bytearray(pth_bytes(path, dictionary(tensor_opcodes("0", 0, (2, 3), (3, 1)))).read_bytes())
    for position, value in changes:
        data[position % len(data)] = value
    path.write_bytes(data[: len(data) - cut] if cut > 100 else data)
    with contextlib.suppress(ValueError):
        content, _ = read_pth(path)
        assert all(not isinstance(value, np.ndarray) or value.sum() is not None for value in content.values())


@settings(max_examples=300, deadline=None)
@given(program=st.binary(max_size=200))
def test_no_pickle_breaks_the_reader(tmp_path_factory, program):
    path = pth_bytes(tmp_path_factory.mktemp("fuzz") / "w.pth", b"\x80\x02" + program)
    with contextlib.suppress(ValueError):
        read_pth(path)


# --- Disks and kills ----------------------------------------------------------------------------------------------


def test_too_little_space_is_told_before_anything_is_written(hf, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    refused(hf, OSError, r"0\.00 GB free, 0\.\d+ GB are needed")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("to", ["l4jax", "hf"])
def test_a_disk_that_fills_up_leaves_nothing_finished(hf, mount, monkeypatch, to):
    disk = mount("size=600k")
    monkeypatch.setattr(convert, "check_space", lambda *_: None)  # somebody else took the room in between
    with pytest.raises(OSError, match="No space left on device") as raised:
        convert.convert(hf, disk / "result", to=to)
    assert "\n" not in str(raised.value)
    assert not (disk / "result").exists()
    mount("size=8m")
    assert open_checkpoint(convert.convert(hf, disk / "result", to=to)).arrays


def test_a_read_only_disk_is_named(hf, mount):
    mount("size=600k")
    disk = mount("ro,size=64m")
    with pytest.raises(OSError, match=r"Read-only file system: .*result\.partial"):
        convert.convert(hf, disk / "result")


KILLS = """
import os, random, signal, sys, time
from l4jax.checkpoint import convert, pieces, zarr
source, folder, kills, options = *sys.argv[1:3], int(sys.argv[3]), eval(sys.argv[4])
zarr.PIECE_BYTES, zarr.CHUNK_BYTES = 8192, 2048
def start(name):
    child = os.fork()
    if not child:
        convert.convert(source, f"{folder}/{name}", **options)
        os._exit(0)
    return child
def journal_bytes(name):
    try:
        return os.stat(f"{folder}/{name}.partial/{pieces.JOURNAL}").st_size
    except FileNotFoundError:
        return 0
def runs(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
child, total = start("undisturbed"), 0
while runs(child):
    total = max(total, journal_bytes("undisturbed"))
assert os.waitpid(child, 0)[1] == 0
rng, killed = random.Random(0), 0
for i in range(kills):
    name, moment = f"killed-{i}", rng.uniform(0, total)
    child = start(name)
    # The moment is a share of the work, not of a duration: it comes on a fast machine as on a busy one.
    while journal_bytes(name) < moment and runs(child):
        pass
    time.sleep(rng.uniform(0, 0.002))
    os.kill(child, signal.SIGKILL)
    killed += os.waitpid(child, 0)[1] == signal.SIGKILL
    if not os.path.exists(f"{folder}/{name}"):
        assert os.waitpid(start(name), 0)[1] == 0
print(killed)
"""


@pytest.mark.parametrize(
    ("kills", "options"),
    [(20, {"to": "l4jax"}), (20, {"to": "hf"}), (3, {"quantize": "int8"})],  # the last imports jax in every child
    ids=["l4jax", "hf", "int8"],
)
def test_killed_at_random_moments_the_same_command_gives_the_same_result(hf, tmp_path, kills, options):
    results = tmp_path / "results"
    results.mkdir()
    command = [sys.executable, "-c", KILLS, hf, results, str(kills), repr(options)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert int(done.stdout) >= 0.75 * kills
    expected = manifest.read_manifest(results / "undisturbed")["files"]
    for i in range(kills):
        assert manifest.read_manifest(results / f"killed-{i}")["files"] == expected


def test_a_terminal_shows_progress_with_rate_and_time_left(hf, tmp_path):
    terminal, end = os.openpty()
    command = [sys.executable, "-m", "l4jax", "convert", hf, tmp_path / "result"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(command, stderr=end, stdout=subprocess.DEVNULL, env=environment)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError), open(terminal, "rb", buffering=0) as reader:  # the end of a terminal is an error
        while part := reader.read(4096):
            shown += part
    assert process.wait() == 0
    plain = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", shown.decode())
    assert re.search(r"converting ━+ (\d+\.\d)/\1 \wB \d+\.\d \wB/s 0:00:00", plain), plain


def test_pieces_that_the_disk_lost_are_written_again(hf, tmp_path, monkeypatch):
    """The machine died after the journal was written and before the data was."""
    expected = manifest.read_manifest(convert.convert(hf, tmp_path / "expected"))
    monkeypatch.setattr(zarr, "write_orbax_metadata", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert.convert(hf, tmp_path / "result")
    monkeypatch.undo()
    lost = sorted((tmp_path / "result.partial").rglob("c/0*"))[:3]
    for path in lost:
        for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
            file.write_bytes(b"")
    journal = tmp_path / "result.partial" / pieces.JOURNAL
    journal.write_text(journal.read_text()[:-20])  # a torn last line
    assert manifest.read_manifest(convert.convert(hf, tmp_path / "result"))["files"] == expected["files"]
