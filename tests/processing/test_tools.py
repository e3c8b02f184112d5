"""Tool calls: all forms that the models write, round trips, and text that only looks like a call."""

import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4jax.processing.tools import (
    Answer,
    ToolCall,
    add_tools,
    describe_tools,
    parse_answer,
    render_tool_calls,
    tool_call,
)

TOOL = {"name": "get_weather", "description": "Weather of a city", "parameters": {"type": "object"}}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.from_regex(r"[a-z][a-z_]{1,8}[a-z0-9]x", fullmatch=True)  # the x: no word of Python


@pytest.mark.parametrize(
    "text",
    [
        '[get_weather(city="Oslo", days=3)]',
        "[get_weather(city='Oslo', days=3)]<|eot|>",
        '{"name": "get_weather", "parameters": {"city": "Oslo", "days": 3}}<|eom|>',
        '{"type": "function", "name": "get_weather", "parameters": {"city": "Oslo", "days": 3}}',
        ' {"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}\n',
        '[{"name": "get_weather", "parameters": {"city": "Oslo", "days": 3}}]',
        '<function=get_weather>{"city": "Oslo", "days": 3}</function>',
        '<function=get_weather>{"city": "Oslo", "days": 3}<|eot|>',
        '<|python_start|>[get_weather(city="Oslo", days=3)]<|python_end|><|eot|>',
        '<|python_start|>{"name": "get_weather", "parameters": {"city": "Oslo", "days": 3}}',
        '<|python_start|><|python_end|>{"name": "get_weather", "parameters": {"city": "Oslo", "days": 3}}',
    ],
)
def test_every_form_is_read(text):
    assert parse_answer(text) == Answer("", (ToolCall("get_weather", {"city": "Oslo", "days": 3}),))


@pytest.mark.parametrize(
    "text",
    [
        "[f(a=1), g.h(b=[2, {'c': None}])]",
        '{"name": "f", "parameters": {"a": 1}}{"name": "g.h", "arguments": {"b": [2, {"c": null}]}}',
        '{"name": "f", "parameters": {"a": 1}}; {"name": "g.h", "parameters": {"b": [2, {"c": null}]}}',
        '<function=f>{"a": 1}</function>\n<function=g.h>{"b": [2, {"c": null}]}</function>',
    ],
)
def test_several_calls(text):
    assert parse_answer(text).tool_calls == (ToolCall("f", {"a": 1}), ToolCall("g.h", {"b": [2, {"c": None}]}))


def test_words_beside_calls_are_kept():
    call = ToolCall("f", {})
    assert parse_answer("Let me see. <function=f>{}</function>") == Answer("Let me see.", (call,))
    text = '<|python_start|>Let me see.<|python_end|>{"name": "f", "parameters": {}}'
    assert parse_answer(text) == Answer("Let me see.", (call,))


def test_code_is_a_call_of_the_interpreter():
    expected = ToolCall("code_interpreter", {"code": "print(1)\nx = [2]"})
    assert parse_answer("<|python_start|>print(1)\nx = [2]<|python_end|><|eom|>").tool_calls == (expected,)


def test_names_of_json_are_read_in_python_lists():
    calls = parse_answer("[f(a=true, b=[false, null], c=None)]").tool_calls
    assert calls == (ToolCall("f", {"a": True, "b": [False, None], "c": None}),)


def test_warnings_of_the_parser_stay_quiet():
    with warnings.catch_warnings(action="error"):
        assert parse_answer(r'[grep(pattern="\d+")]').tool_calls == (ToolCall("grep", {"pattern": r"\d+"}),)


@pytest.mark.parametrize(
    "text",
    [
        *("", "Hello.", "[1, 2]", "[]", "{}", "[f(1)]", "[f(**{'a': 1})]", "[f(a=g())]", "[f(a=x)]", "f(a=1)"),
        *("[f(a=1)", "[f(a=1)] and so on", '{"name": "f"}', '{"name": 5, "parameters": {}}', '{"a": 1} trailing'),
        *('{"name": "f", "parameters": [1]}', "[f(a=b'x')]", "[f(a={1})]", "[f(a=1j)]", "[(lambda: 0)(a=1)]"),
        *("[__import__('os').system('true')]", "<function=f>{broken}</function>", "[f(a=1e999)]", "[f(a=...)]"),
        *("[" * 5000, "[f(a=" + "(" * 5000, '{"name":' * 5000, "{" * 100_000, "[f(a=" + "-" * 20_000 + "1)]"),
    ],
)
def test_other_text_stays_text(text):
    assert parse_answer(text) == Answer(text.strip())


@given(st.text())
def test_any_text_is_an_answer(text):
    assert isinstance(parse_answer(text), Answer)
    assert isinstance(parse_answer(f"[f(a={text})]"), Answer)
    assert isinstance(parse_answer('{"name": ' + text), Answer)


@given(st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3))
def test_rendered_calls_are_read_back(drawn):
    calls = tuple(ToolCall(name, arguments) for name, arguments in drawn)
    assert parse_answer("".join(render_tool_calls(calls, "json"))).tool_calls == calls
    assert parse_answer("".join(render_tool_calls(calls, "python_list"))).tool_calls == calls


def test_rendered_tags_are_read_back():
    calls = (ToolCall("f", {"a": "x\n"}), ToolCall("g", {}))
    assert parse_answer("".join(render_tool_calls(calls, "function_tag"))).tool_calls == calls


def test_an_answer_can_go_on_as_a_message():
    answer = parse_answer("[f(a=1)]")
    message = answer.to_message()
    assert tuple(map(tool_call, message["tool_calls"])) == answer.tool_calls
    assert parse_answer("Hi").to_message() == {"role": "assistant", "content": "Hi"}


@pytest.mark.parametrize("tool_format", ["json", "python_list", "function_tag"])
def test_tools_are_described_as_json(tool_format):
    text = describe_tools([TOOL, {"type": "function", "function": TOOL}], tool_format)
    start = text.index("[\n")
    assert json.loads(text[start:]) == [TOOL, TOOL]


def test_tools_follow_the_system_text():
    for content in ("Be kind.", [{"type": "text", "text": "Be kind."}]):
        messages = add_tools([{"role": "system", "content": content}, {"role": "user", "content": "Hi"}], [TOOL])
        texts = [item["text"] for item in messages[0]["content"]]
        assert texts[0].startswith("Be kind.")
        assert "get_weather" in texts[-1]
        assert len(messages) == 2
    assert [m["role"] for m in add_tools([{"role": "user", "content": "Hi"}], [TOOL])] == ["system", "user"]


@pytest.mark.parametrize("tools", [[{}], ["f"], [{"function": {"name": 1}}], [{"name": "f", "parameters": {1, 2}}]])
def test_wrong_tools_are_refused(tools):
    with pytest.raises(ValueError, match="tool"):
        describe_tools(tools)


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="tool_format='xml' is not one of json, python_list, function_tag"):
        render_tool_calls([ToolCall("f", {})], "xml")
