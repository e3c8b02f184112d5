import io
import json

import pytest
from PIL import Image

from l4jax.inference.cli_chat import Chat, lines


class Echo:
    """Stands for a model: says back the text of the last message."""

    def __init__(self, stop_after=None):
        self.stop_after, self.asked = stop_after, []

    def chat(self, messages, stream, **options):
        self.asked.append((messages, options))
        if messages[-1]["content"][-1]["text"] == "too long":
            raise ValueError("the prompt is too long")
        for i, letter in enumerate(messages[-1]["content"][-1]["text"]):
            if i == self.stop_after:
                raise KeyboardInterrupt
            yield letter


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a picture.png"
    Image.new("RGB", (30, 20)).save(path)
    return str(path)


def test_a_conversation_is_remembered_and_reset(capsys):
    chat = Chat(Echo(), {"seed": 1}, system="be brief")
    assert chat.take("hello")
    assert chat.take("again")
    messages, options = chat.model.asked[-1]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[2]["content"] == "hello"
    assert options == {"seed": 1}
    chat.take("/reset")
    assert chat.messages == [{"role": "system", "content": "be brief"}]
    assert capsys.readouterr().out == "hello\nagain\na new conversation\n"


def test_a_picture_goes_with_the_next_message_only(picture, capsys):
    chat = Chat(Echo(), {})
    chat.take(f"/image {picture}")
    assert "30 x 20 pixels" in capsys.readouterr().out
    chat.take("what is it?")
    chat.take("and now?")
    first, second = (messages[-1]["content"] for messages, _ in chat.model.asked)
    assert first == [{"type": "image", "path": picture}, {"type": "text", "text": "what is it?"}]
    assert [part["type"] for part in second] == ["text"]


def test_interrupting_an_answer_keeps_what_was_said(capsys):
    chat = Chat(Echo(stop_after=3), {})
    assert chat.take("a long answer")
    assert chat.messages[-1] == {"role": "assistant", "content": "a l"}
    assert capsys.readouterr().out == "a l [stopped]\n"


def test_a_message_that_fails_is_forgotten_and_the_chat_goes_on(capsys):
    chat = Chat(Echo(), {})
    assert chat.take("too long")
    assert chat.messages == []
    assert chat.take("/image nowhere.png")
    assert chat.take("/image")
    assert chat.take("/unknown")
    output = capsys.readouterr()
    assert output.err == (
        "error: the prompt is too long\n"
        "error: no picture nowhere.png; check the path\n"
        "error: which picture? write /image FILE\n"
    )
    assert "no command /unknown" in output.out


def test_a_conversation_is_saved_as_messages(tmp_path):
    chat = Chat(Echo(), {})
    chat.take("grüß dich")
    chat.take(f"/save {tmp_path / 'talk.json'}")
    assert json.loads((tmp_path / "talk.json").read_text(encoding="utf-8")) == chat.messages


def test_quit_and_the_end_of_a_pipe_leave(monkeypatch):
    assert not Chat(Echo(), {}).take("/quit")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo"))
    assert list(lines()) == ["one", "", "two"]
