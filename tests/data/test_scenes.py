import pickle
import sys

import numpy as np
import pytest

from l4jax.data.digits import HELD_OUT, TRAINING
from l4jax.data.scenes import GRIDS, QUESTIONS, SceneSource, Split, answer, build_scenes, conversation, make_scenes

TILE = 28


def test_scenes_have_the_grids_of_their_digits():
    for index, scene in enumerate(make_scenes(Split("train", 40, TRAINING), TILE, seed=0)):
        rows, columns = (side // TILE for side in scene.image.shape)
        assert len(scene.digits) == 1 + index % 4
        assert (rows, columns) in GRIDS[len(scene.digits)]


def test_digits_are_read_row_by_row():
    for scene in make_scenes(Split("train", 40, HELD_OUT), TILE, seed=1):
        rows, columns = (side // TILE for side in scene.image.shape)
        cells = scene.image.reshape(rows, TILE, columns, TILE).max(axis=(1, 3)).reshape(-1)
        assert (cells > 100).sum() == len(scene.digits)
        assert cells[0] > 100


def test_a_scene_depends_on_seed_and_index_alone():
    few = list(make_scenes(Split("train", 4, TRAINING), TILE, seed=0))
    more = list(make_scenes(Split("train", 8, TRAINING), TILE, seed=0))
    other = list(make_scenes(Split("train", 4, TRAINING), TILE, seed=1))
    assert [scene.digits for scene in few] == [scene.digits for scene in more[:4]]
    np.testing.assert_array_equal(few[3].image, more[3].image)
    assert any(a.image.tobytes() != b.image.tobytes() for a, b in zip(few, other, strict=True))


def test_true_answers():
    assert [answer("7312", question) for question in QUESTIONS] == ["7312", "7", "7 +3=10 +1=11 +2=13"]


def test_sum_of_one_digit_is_the_digit():
    assert answer("7", "what is the sum?") == "7"


def test_unknown_question_is_refused():
    with pytest.raises(ValueError, match="no answer is known to 'why\\?'"):
        answer("7", "why?")


def test_dataset_is_built_once_and_read_without_tensorflow(tmp_path, capsys):
    splits = {"train": Split("train", 12, TRAINING), "eval": Split("held_out", 4, HELD_OUT, num_digits=(2,))}
    source = SceneSource(build_scenes(tmp_path, splits=splits, tile_size=TILE, seed=3), "train")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record*")}
    again = build_scenes(tmp_path, splits=splits, tile_size=TILE, seed=3)

    assert len(written) == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record*")} == written
    assert capsys.readouterr().out == ""
    made = {scene.digits: scene.image for scene in make_scenes(splits["train"], TILE, seed=3)}
    read = {digits: np.asarray(image) for image, digits in (source[i] for i in range(len(source)))}
    assert sorted(read) == sorted(made)
    assert len(pickle.dumps(source)) < 20_000
    assert pickle.loads(pickle.dumps(source))[3][1] == source[3][1]
    np.testing.assert_array_equal(read[min(read)], made[min(made)])
    assert {len(digits) for _, digits in (SceneSource(again, "eval")[i] for i in range(4))} == {2}
    assert "tensorflow" not in sys.modules


def test_other_settings_make_another_dataset(tmp_path):
    for seed in (0, 1):
        build_scenes(tmp_path, splits={"train": Split("train", 4, TRAINING)}, tile_size=TILE, seed=seed)
    assert len(list(tmp_path.iterdir())) == 2


def test_conversation_asks_and_answers():
    user, assistant = conversation("picture", "42", "what is the sum?")
    assert [item["type"] for item in user["content"]] == ["image", "text"]
    assert assistant["content"][0]["text"] == "4 +2=6"
