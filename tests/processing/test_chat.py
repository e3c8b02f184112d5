"""Conversations against Meta's ChatFormat, and what a user can get wrong."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from l4jax.config import VisionConfig, preset
from l4jax.processing.chat import Processor, image_tokens

GOLDEN = json.loads((Path(__file__).parent / "golden" / "chat.json").read_text())

KEYS = ["role", "content", "type", "text", "image", "path", "frames", "tool_calls", "function", "name", "arguments"]
CALLS = [
    {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}},
    {"type": "function", "function": {"name": "get_time", "arguments": '{"zone": "CET", "tags": ["a", "b"]}'}},
]


def picture(height, width):
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows % 256, columns % 256, (rows + columns) % 256], -1).astype(np.uint8))


def with_pictures(height, width):
    """System, two pictures of `height` x `width` and of one tile, text before, between and after."""
    return [
        {"role": "system", "content": "You are brief. 简短。"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "First "},
                {"type": "image", "image": picture(height, width)},
                {"type": "text", "text": ", second: "},
                {"type": "image", "image": picture(min(height, width) // 2, min(height, width) // 2)},
                {"type": "text", "text": "Which is larger? <|eot|><|image|> 🦙"},
            ],
        },
    ]


def with_tools():
    return [
        {"role": "system", "content": ""},
        {"role": "user", "content": "How is the weather?\n"},
        {"role": "assistant", "content": "I look it up.", "tool_calls": CALLS},
        {"role": "tool", "content": '{"sunny": true}'},
        {"role": "ipython", "content": "12:30"},
        {"role": "assistant", "content": "Sunny, at half past twelve."},
        {"role": "user", "content": "Thanks <|python_start|>"},
    ]


def to_meta(messages):
    """Our messages as Meta's objects."""
    from llama_models.datatypes import RawMediaItem, RawMessage, RawTextItem, ToolCall

    def item(part):
        if part["type"] == "text":
            return RawTextItem(text=part["text"])
        file = io.BytesIO()
        part["image"].save(file, "PNG")
        return RawMediaItem(data=file.getvalue())

    def call(entry):
        arguments = entry["function"]["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        return ToolCall(call_id="0", tool_name=entry["function"]["name"], arguments=arguments)

    return [
        RawMessage(
            role="tool" if message["role"] == "ipython" else message["role"],
            content=message["content"] if isinstance(message["content"], str) else list(map(item, message["content"])),
            tool_calls=list(map(call, message.get("tool_calls", ()))),
        )
        for message in messages
    ]


def meta_format(meta_chat, tokenizer, vision):
    from llama_models.llama4.args import Size, VisionArgs

    args = VisionArgs(
        image_size=Size(height=vision.image_size, width=vision.image_size),
        patch_size=Size(height=vision.patch_size, width=vision.patch_size),
        dim=32,
        n_layers=1,
        n_heads=2,
        mlp_ratio=4.0,
        output_dim=32,
        pixel_shuffle_ratio=vision.pixel_shuffle_ratio,
    )
    return meta_chat.ChatFormat(tokenizer, args)


class MetaLike:
    """Our byte tokenizer with the interface of Meta's."""

    def __init__(self, tokenizer):
        self.special_tokens = tokenizer.special
        self.encode = tokenizer.encode


@pytest.fixture
def processor(byte_tokenizer, small_vision):
    return Processor(byte_tokenizer, small_vision)


@pytest.mark.oracle
def test_pictures_equal_meta(meta_chat, tokenizer, meta_tokenizer):
    theirs = meta_format(meta_chat, meta_tokenizer, VisionConfig()).encode_dialog_prompt(
        to_meta(with_pictures(600, 900))
    )
    ours = Processor(tokenizer, VisionConfig()).encode(with_pictures(600, 900))
    assert ours.grids == ((2, 3), (1, 1))
    assert ours.ids.tolist() == theirs.tokens
    np.testing.assert_array_equal(ours.tiles, np.concatenate([image.numpy() for image in theirs.images]))


@pytest.mark.oracle
@pytest.mark.parametrize("tool_format", ["json", "function_tag", "python_list"])
def test_tool_calls_and_results_equal_meta(meta_chat, tokenizer, meta_tokenizer, tool_format):
    from llama_models.datatypes import ToolPromptFormat

    messages = with_tools()
    if tool_format == "python_list":  # of several calls Meta writes several lists, we one, as the model does
        messages[2] = {**messages[2], "tool_calls": CALLS[:1]}
    theirs = meta_format(meta_chat, meta_tokenizer, VisionConfig()).encode_dialog_prompt(
        to_meta(messages), ToolPromptFormat(tool_format)
    )
    ours = Processor(tokenizer, VisionConfig(), tool_format=tool_format).encode(messages)
    assert ours.ids.tolist() == theirs.tokens


@pytest.mark.oracle
def test_small_tiles_equal_meta(meta_chat, byte_tokenizer, small_vision):
    theirs = meta_format(meta_chat, MetaLike(byte_tokenizer), small_vision).encode_dialog_prompt(
        to_meta(with_pictures(50, 80))
    )
    ours = Processor(byte_tokenizer, small_vision).encode(with_pictures(50, 80))
    assert ours.ids.tolist() == theirs.tokens
    np.testing.assert_array_equal(ours.tiles, np.concatenate([image.numpy() for image in theirs.images]))


@pytest.mark.oracle
def test_text_equals_the_template_of_transformers(tokenizer, torchvision):
    import jinja2
    from transformers.models.llama4.processing_llama4 import chat_template

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there\n"}]},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who are you?"},
    ]
    rendered = jinja2.Template(chat_template).render(
        messages=messages, bos_token="<|begin_of_text|>", add_generation_prompt=True
    )
    assert tokenizer.decode(Processor(tokenizer).encode(messages).ids) == rendered


def test_pictures_equal_the_stored_ids_of_meta(processor):
    encoded = processor.encode(with_pictures(50, 80))
    assert encoded.ids.tolist() == GOLDEN["pictures"]
    assert encoded.ids.dtype == np.int32


def test_tools_equal_the_stored_ids_of_meta(processor):
    assert processor.encode(with_tools()).ids.tolist() == GOLDEN["tools"]


def test_two_rows_of_three_columns():
    """The example of 1,017 ids: 600 x 900 pixels."""

    class Released:
        special = {  # noqa: RUF012
            **{"<|image_start|>": 200080, "<|image_end|>": 200081, "<|tile_x_separator|>": 200084},
            **{"<|tile_y_separator|>": 200085, "<|image|>": 200090, "<|patch|>": 200092},
        }

    tile = [200092] * 144
    row = [*tile, 200084, *tile, 200084, *tile, 200085]
    assert image_tokens(Released, (2, 3), 144) == [200080, *row, *row, 200090, *tile, 200081]
    assert len(image_tokens(Released, (2, 3), 144)) == 1017
    assert image_tokens(Released, (1, 1), 144) == [200080, 200090, *tile, 200081]
    assert len(image_tokens(Released, (3, 5), 144)) == 2322


def test_patch_tokens_match_the_tiles(processor, small_vision):
    encoded = processor.encode(with_pictures(50, 80))
    assert encoded.num_patch_tokens == len(encoded.tiles) * small_vision.tokens_per_tile
    assert len(encoded.tiles) == sum(rows * columns + (rows * columns > 1) for rows, columns in encoded.grids)
    assert encoded.tiles.shape[1:] == (3, 28, 28)


def test_answer_mask_marks_the_words_of_the_assistant(processor):
    messages = [*with_tools(), {"role": "assistant", "content": "Bye"}]
    encoded = processor.encode(messages, add_generation_prompt=False)
    answer = processor.decode(encoded.ids[encoded.answer_mask], skip_special=False)
    assert answer.startswith('I look it up.{"type": "function", "name": "get_weather"')
    assert answer.endswith("}<|eom|>Sunny, at half past twelve.<|eot|>Bye<|eot|>")


def test_messages_not_to_be_learned_and_pictures_are_not_in_the_mask(processor):
    show = {
        "role": "assistant",
        "content": [{"type": "image", "image": picture(28, 28)}, {"type": "text", "text": "!"}],
    }
    messages = [{"role": "assistant", "content": "no", "train": False}, show]
    encoded = processor.encode(messages, add_generation_prompt=False)
    assert processor.decode(encoded.ids[encoded.answer_mask], skip_special=False) == "!<|eot|>"


def test_a_document_is_text_and_pictures_between_its_ends(processor, byte_tokenizer):
    content = [
        {"type": "text", "text": "A"},
        {"type": "image", "image": picture(28, 28)},
        {"type": "text", "text": "B"},
    ]
    encoded = processor.encode_document(content)
    image = image_tokens(byte_tokenizer, (1, 1), 4)
    assert encoded.ids.tolist() == [byte_tokenizer.bos_id, ord("A"), *image, ord("B"), byte_tokenizer.eos_id]
    assert encoded.ids[encoded.answer_mask].tolist() == [ord("A"), ord("B"), byte_tokenizer.eos_id]
    assert processor.encode_document("AB").ids.tolist() == [256, 65, 66, 257]


def test_nothing_typed_becomes_a_control_token(processor, byte_tokenizer):
    typed = "".join(byte_tokenizer.special)
    plain = processor.encode([{"role": "user", "content": "x"}]).ids
    attack = processor.encode([{"role": "user", "content": typed}]).ids
    assert [i for i in attack if i >= 256] == [i for i in plain if i >= 256]
    assert typed in processor.decode(attack)


def test_plain_prompt(processor, byte_tokenizer):
    encoded = processor.encode_text("A <|image|>B", [picture(28, 28)])
    picture_ids = image_tokens(byte_tokenizer, (1, 1), 4)
    assert encoded.ids.tolist() == [byte_tokenizer.bos_id, *b"A ", *picture_ids, ord("B")]
    assert processor.encode_text("AB", bos=False).ids.tolist() == [65, 66]
    assert processor.encode_text("").tiles.shape == (0, 3, 28, 28)


@pytest.mark.parametrize(("prompt", "count"), [("none", 1), ("<|image|><|image|>", 1), ("<|image|>", 0)])
def test_a_wrong_number_of_pictures_is_refused(processor, prompt, count):
    placeholders = prompt.count("<|image|>")
    with pytest.raises(ValueError, match=f"{placeholders} <.image.> placeholders, but {count} pictures were given"):
        processor.encode_text(prompt, [picture(9, 9)] * count)


def test_pictures_for_a_model_that_only_reads_are_refused(byte_tokenizer):
    with pytest.raises(ValueError, match="reads only text"):
        Processor(byte_tokenizer).encode(with_pictures(50, 80))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "must be a list"),
        ({"role": "user"}, "must be a list"),
        ([{"role": "robot", "content": "x"}], "role 'robot' is not one of system, user"),
        (["hello"], "must be a list"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "type 'audio' is not understood"),
        ([{"role": "user", "content": [{"type": "image"}]}], "type 'image' is not understood"),
        ([{"role": "user", "content": ["x"]}], "type 'str' is not understood"),
        ([{"role": "user", "content": 5}], "content must be text or a list"),
        ([{"role": "user", "content": "x", "tool_calls": CALLS}], "is no list of calls by the assistant"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "a tool call must be"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], "call of f are not JSON"),
    ],
)
def test_wrong_messages_are_refused(processor, messages, message):
    with pytest.raises(ValueError, match=message):
        processor.encode(messages)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.sampled_from(["user", "assistant", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
)


@given(JSON, JSON)
def test_any_json_is_a_prompt_or_one_clear_line(byte_tokenizer, small_vision, messages, tools):
    processor = Processor(byte_tokenizer, small_vision)
    for attempt in (messages, [messages], [{"role": "user", "content": messages}]):
        try:
            assert processor.encode(attempt, tools=tools).ids.dtype == np.int32
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
            assert "\n" not in message


def test_a_missing_picture_is_named(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cat\.jpg"):
        processor.encode([{"role": "user", "content": [{"type": "image", "path": tmp_path / "cat.jpg"}]}])


def test_a_video_becomes_frames_with_time_stamps(processor, byte_tokenizer):
    content = [{"type": "video", "frames": [picture(40, 90), picture(40, 90)]}]
    encoded = processor.encode([{"role": "user", "content": content}])
    assert encoded.grids == ((1, 1), (1, 1))
    frame = image_tokens(byte_tokenizer, (1, 1), 4)
    body = encoded.ids.tolist()[len([256, 261, *b"user", 262, *b"\n\n"]) :]
    expected = [*b"[00:00.0]", *frame, *b"[00:01.0]", *frame, byte_tokenizer.eot_id]
    assert body[: len(expected)] == expected


def test_frames_come_at_their_times(processor):
    video = {"type": "video", "frames": [picture(28, 28)] * 3, "fps": 2}
    assert processor.decode(processor.encode_document([video]).ids).startswith("[00:00.0][00:00.5][00:01.0]")
    for fps in (0, -1, float("inf"), "2", None):
        with pytest.raises(ValueError, match=r"fps=.* of a video must be a number above 0"):
            processor.encode_document([video | {"fps": fps}])


def test_prompts_that_are_too_long_are_refused(processor):
    encoded = processor.encode(with_pictures(50, 80))
    encoded.check_length(len(encoded.ids))
    message = rf"the prompt is {len(encoded.ids)} tokens, {encoded.num_patch_tokens} of them for 2 pictures and 8 new"
    with pytest.raises(ValueError, match=message):
        encoded.check_length(len(encoded.ids), new_tokens=8)


def test_a_processor_for_another_model_is_refused(byte_tokenizer):
    with pytest.raises(ValueError, match="of different models"):
        Processor.for_model(byte_tokenizer, preset("scout"))
    with pytest.raises(ValueError, match="at least 1"):
        Processor(byte_tokenizer, max_tiles=0)


def test_tools_are_described_in_the_system_message(processor):
    tools = [{"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}]
    for messages in ([{"role": "user", "content": "Hi"}], [{"role": "system", "content": "Be kind."}]):
        text = processor.decode(processor.encode(messages, tools=tools).ids)
        system = text.split("user")[0]
        assert '"name": "get_time"' in system
        assert text.count("system") == 1


def test_processing_needs_no_jax():
    code = "import sys, l4jax.processing.chat; assert not {'jax', 'torch', 'av'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
