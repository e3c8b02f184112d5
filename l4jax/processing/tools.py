"""Functions that the model may call: how they are described to it, and how its calls are written and read.

The three ways of writing a call are those of Meta's `llama3/tool_utils.py`, which Llama 4 shares. What the model
writes is parsed, never run.
"""

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

ToolFormat = Literal["json", "python_list", "function_tag"]

CODE_INTERPRETER = "code_interpreter"
MAX_CALL_CHARS = 100_000  # no parser gets more than this

_HOW_TO_CALL = {
    "json": 'one JSON object for each call, {"type": "function", "name": <name>, "parameters": {<argument>: <value>}}',
    "python_list": "a list of calls in Python's syntax, [name(argument=value), other_name(argument=value)]",
    "function_tag": 'one line for each call, <function=name>{"argument": value}</function>',
}
_FUNCTION_TAG = re.compile(r"<function=([^<>={}\s]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_JSON_NAMES = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class ToolCall:
    """One call of a function."""

    name: str
    arguments: Mapping[str, Any]

    def to_message(self) -> dict[str, Any]:
        """Returns the call as an entry of a message's `tool_calls`."""
        return {"type": "function", "function": {"name": self.name, "arguments": dict(self.arguments)}}


@dataclass(frozen=True)
class Answer:
    """What the model said, and the calls that it asks for."""

    content: str
    tool_calls: tuple[ToolCall, ...] = field(default=())

    def to_message(self) -> dict[str, Any]:
        """Returns the assistant message to append to a conversation."""
        message = {"role": "assistant", "content": self.content}
        return message | ({"tool_calls": [call.to_message() for call in self.tool_calls]} if self.tool_calls else {})


def add_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], tool_format: ToolFormat = "json"
) -> list[Mapping[str, Any]]:
    """Returns `messages` with the description of `tools` at the end of the system message, made if there is none."""
    text = {"type": "text", "text": describe_tools(tools, tool_format)}
    if not messages or messages[0].get("role") != "system":
        return [{"role": "system", "content": [text]}, *messages]
    content = messages[0].get("content") or []
    if isinstance(content, str):
        content = [{"type": "text", "text": content + "\n\n"}]
    elif not isinstance(content, list | tuple):
        content = [content]
    return [{**messages[0], "content": [*content, text]}, *messages[1:]]


def describe_tools(tools: Sequence[Mapping[str, Any]], tool_format: ToolFormat = "json") -> str:
    """Returns the text that tells the model which functions there are and how to call them.

    Args:
        tools: JSON schemas, `{"name", "description", "parameters"}`, bare or under the key `function`.
        tool_format: the form in which the model shall write its calls.

    Raises:
        ValueError: a tool has no name, or cannot be written as JSON.
    """
    _check_format(tool_format)
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("tools must be a list of dicts with 'name', 'description' and 'parameters' (a JSON schema)")
    functions = [tool.get("function", tool) for tool in tools]
    for function in functions:
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError("each of the tools must have a 'name', or a 'function' that has one")
    try:
        listing = json.dumps(functions, indent=4, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the tools cannot be written as JSON: {error}") from None
    return (
        f"You can call the functions below. To call, answer with {_HOW_TO_CALL[tool_format]}, and nothing else. "
        "Write values, not variables. When no function helps or a needed value is unknown, answer in words.\n\n"
        f"{listing}\n"
    )


def tool_call(entry: Mapping[str, Any]) -> ToolCall:
    """Returns an entry of a message's `tool_calls`, whose arguments may be a dict or JSON text.

    Raises:
        ValueError: it has another form.
    """
    function = entry.get("function", entry) if isinstance(entry, Mapping) else {}
    name = function.get("name") if isinstance(function, Mapping) else None
    arguments = function.get("arguments", {}) if name else None
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise ValueError(f"the arguments of the call of {name} are not JSON: {error}") from None
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise ValueError("a tool call must be {'function': {'name': ..., 'arguments': {...}}}")
    return ToolCall(name, arguments)


def render_tool_calls(calls: Sequence[ToolCall], tool_format: ToolFormat = "json") -> list[str]:
    """Returns past calls as text, in pieces that are to be tokenised one by one."""
    _check_format(tool_format)
    if not calls:
        return []
    if tool_format == "python_list":
        texts = [
            f"{call.name}({', '.join(f'{key}={_python(value)}' for key, value in call.arguments.items())})"
            for call in calls
        ]
        return [f"[{', '.join(texts)}]"]
    if tool_format == "function_tag":
        return [f"<function={call.name}>{json.dumps(dict(call.arguments))}</function>" for call in calls]
    return [json.dumps({"type": "function", "name": call.name, "parameters": dict(call.arguments)}) for call in calls]


def _check_format(tool_format: str) -> None:
    if tool_format not in get_args(ToolFormat):
        raise ValueError(f"tool_format={tool_format!r} is not one of {', '.join(get_args(ToolFormat))}")


def _python(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # JSON strings are Python strings, always in double quotes
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_python, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_python(key)}: {_python(item)}' for key, item in value.items())}}}"
    return repr(value)


def parse_answer(text: str) -> Answer:
    """Returns the model's answer, decoded with its control tokens, as words and tool calls.

    Calls are a Python list, JSON objects with `parameters` or `arguments`, or function tags. What stands between
    `<|python_start|>` and `<|python_end|>` and is no call is code: a call of `code_interpreter`. Anything that is
    not wholly a call stays words.
    """
    text = text.strip()
    for stop in ("<|eot|>", "<|eom|>", "<|end_of_text|>"):
        text = text.removesuffix(stop).strip()
    if text.startswith("<|python_start|>"):
        inside, _, after = text.removeprefix("<|python_start|>").partition("<|python_end|>")
        # transformers' template puts words inside and the calls behind; otherwise calls or code are inside.
        if calls := _calls(after):
            return Answer(inside.strip(), calls)
        calls = _calls(inside) or (ToolCall(CODE_INTERPRETER, {"code": inside.strip()}),)
        return Answer(after.strip(), calls)
    if calls := _calls(text):
        return Answer(text[: text.find("<function=")].strip() if "<function=" in text else "", calls)
    return Answer(text)


def _calls(text: str) -> tuple[ToolCall, ...]:
    text = text.strip()
    if len(text) > MAX_CALL_CHARS:
        return ()
    try:
        calls = tuple(_read_calls(text))
        for call in calls:
            json.dumps(call.arguments, allow_nan=False)  # bytes, sets and the like are no arguments
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return ()
    return calls


def _read_calls(text: str) -> Iterator[ToolCall]:
    if text.startswith("{"):
        yield from _json_calls(text)
    elif text.startswith("["):
        yield from _json_calls(text) if re.match(r"\[\s*\{", text) else _python_calls(text)
    else:
        for name, arguments in _FUNCTION_TAG.findall(text):
            yield _named(name, json.loads(arguments))


def _json_calls(text: str) -> Iterator[ToolCall]:
    decoder = json.JSONDecoder()
    while text:
        value, end = decoder.raw_decode(text)
        for entry in value if isinstance(value, list) else [value]:
            if not isinstance(entry, dict):
                raise ValueError("not a JSON object")
            yield _named(entry.get("name"), entry.get("parameters", entry.get("arguments")))
        text = text[end:].lstrip(" \t\r\n,;")


def _python_calls(text: str) -> Iterator[ToolCall]:
    with warnings.catch_warnings(action="ignore"):  # of "\d" in an argument, for one
        tree = ast.parse(text, mode="eval").body
    for node in tree.elts if isinstance(tree, ast.List) else ():
        if not isinstance(node, ast.Call) or node.args:
            raise ValueError("not a call with named arguments")
        values = {keyword.arg: ast.literal_eval(_JsonNames().visit(keyword.value)) for keyword in node.keywords}
        yield _named(ast.unparse(node.func), values)


class _JsonNames(ast.NodeTransformer):
    """Reads true, false and null, which models write in Python lists too."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node


def _named(name: Any, arguments: Any) -> ToolCall:
    if not isinstance(name, str) or not re.fullmatch(r"[\w.\-:/]{1,256}", name):
        raise ValueError("not the name of a function")
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise ValueError("arguments are not named values")
    return ToolCall(name, arguments)
