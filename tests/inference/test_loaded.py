import jax
import numpy as np
import pytest

import l4jax
from l4jax.inference import loaded
from l4jax.inference.loaded import LoadedModel, load
from l4jax.processing.tokenizer import ByteTokenizer
from l4jax.sharding import make_mesh
from tests import oracle
from tests.inference.conftest import MAX_LEN


@pytest.fixture(scope="session")
def model(small_model):
    return LoadedModel(small_model, mesh=make_mesh(), max_len=MAX_LEN, tokenizer=ByteTokenizer(512))


MESSAGES = [{"role": "user", "content": "hi"}]
FEW = {"max_new_tokens": 5, "seed": 1}


def test_one_prompt_gives_one_answer_and_several_a_list(model):
    alone = model.generate("hello", **FEW)
    assert alone.completion_tokens <= 5
    assert str(alone) == alone.text
    both = model.generate(["hello", [1, 2, 3]], **FEW)
    assert both[0].ids == alone.ids
    assert both[1].ids == model.generate(np.array([1, 2, 3]), **FEW).ids


def test_streams_join_to_the_answer(model):
    options = {"max_new_tokens": 12, "seed": 3, "temperature": 1.5}
    assert "".join(model.generate("hello", stream=True, **options)) == model.generate("hello", **options).text
    assert "".join(model.chat(MESSAGES, stream=True, **options)) == model.chat(MESSAGES, **options).text


def test_a_chat_is_the_encoded_conversation(model):
    ids = model.processor.encode(MESSAGES).ids
    assert model.chat(MESSAGES, **FEW).ids == model.generate(ids, **FEW).ids


def test_pictures_come_as_files_or_as_tiles(model, tmp_path):
    from PIL import Image

    path = tmp_path / "red.png"
    Image.new("RGB", (112, 56), "red").save(path)
    encoded = model.processor.encode_text("<|image|>?", [path])
    as_file = model.generate("<|image|>?", images=[path], **FEW)
    assert as_file.ids == model.generate(encoded.ids, tiles=encoded.tiles, **FEW).ids
    logits = model.logits(encoded.ids, tiles=encoded.tiles)
    both = model.logits(np.stack([encoded.ids] * 2), tiles=np.concatenate([encoded.tiles] * 2))
    assert logits.shape == (len(encoded.ids), 512)
    np.testing.assert_allclose(both, np.stack([logits] * 2), atol=1e-5)


def test_wrong_calls_are_refused_in_words(model):
    for message, call in {
        "unknown sampling option 'top_q'": lambda: model.generate("x", top_q=1),
        "pictures and streaming are for one prompt": lambda: model.generate(["x", "y"], stream=True),
        "tiles are for a prompt of token ids": lambda: model.generate("x", tiles=np.zeros((1, 3, 56, 56), np.float32)),
        "images are for a prompt of text": lambda: model.generate([1], images=["a.png"]),
        "the prompt has no tokens": lambda: model.generate([]),
        r"expected \[T\] or \[B, T\]": lambda: model.logits(np.zeros((1, 1, 1), np.int32)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_without_a_tokenizer_ids_work_and_words_name_the_missing_file(small_model, tmp_path):
    model = LoadedModel(small_model, mesh=make_mesh(), max_len=MAX_LEN, tokenizer=None, directory=tmp_path)
    assert len(model.generate([1, 2], max_new_tokens=3, temperature=0, eos_token_id=()).ids) == 3
    assert model.logits([1, 2]).shape == (2, 512)
    for call in (lambda: model.generate("x"), lambda: model.chat(MESSAGES)):
        with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*tokenizer\.json"):
            call()


def test_a_saved_model_loads_and_answers_alike(model, tmp_path):
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved", max_len=MAX_LEN)
    np.testing.assert_array_equal(again.logits([5, 6, 7]), model.logits([5, 6, 7]))
    assert again.generate("hello", **FEW) == model.generate("hello", **FEW)
    assert again.config == model.config


def test_bad_arguments_are_refused_before_anything_is_read():
    for message, arguments in {
        "dtype='int7' is not one of": {"dtype": "int7"},
        "mesh='2x2' must be": {"mesh": "2x2"},
        r"max_len=1 must be in 2..4,096": {"max_len": 1},
        r"max_len=5000 must be in 2..4,096": {"max_len": 5000},
    }.items():
        with pytest.raises(ValueError, match=message):
            load("small-guard", **arguments)
    with pytest.raises(FileNotFoundError, match="neither a directory nor a preset; presets are scout"):
        load("llama-5")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_larger_than_memory_is_refused_with_the_sizes(monkeypatch):
    monkeypatch.setattr(loaded, "free_memory", lambda device: 10 << 30)
    with pytest.raises(ValueError, match=r"weights of scout in bfloat16 take 202\.4 GiB, 10\.0 GiB are free"):
        load("scout", dtype="bfloat16")


def test_parameters_are_born_on_the_mesh(recwarn):
    model = load("small-guard", max_len=MAX_LEN, mesh=make_mesh(tensor=2), dtype="bfloat16")
    kernel = model.model.layers.tail[0].self_attn.q_proj.kernel[...]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "tensor", None)
    assert kernel.dtype == jax.numpy.bfloat16
    assert len(kernel.sharding.device_set) == 2


@pytest.mark.oracle
def test_a_hugging_face_directory_gives_the_logits_of_transformers(tmp_path):
    config = oracle.small_config("small-scout", num_hidden_layers=2, moe_layers=(0, 1), no_rope_layers=(1, 0))
    hf = oracle.hf_model(config)
    model = l4jax.load(oracle.save_hf(hf, tmp_path), max_len=MAX_LEN)
    ids = np.random.default_rng(0).integers(0, 256, (2, 19))
    np.testing.assert_allclose(model.logits(ids), oracle.hf_logits(hf, ids), atol=2e-5)
    assert model.tokenizer is None
