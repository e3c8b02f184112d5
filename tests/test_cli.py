import json
import subprocess
import sys
import types

import pytest
from PIL import Image

import l4jax
from l4jax import cli

# Verbs that others have written; each must answer --help without jax.
VERBS = sorted(cli.VERBS)


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)])
def test_help_comes_without_jax(arguments):
    code = (
        f"import sys; from l4jax.cli import main; code = main({arguments!r});"
        "heavy = {'jax', 'flax', 'orbax', 'tensorflow', 'torch'} & set(sys.modules);"
        "print(sorted(heavy), file=sys.stderr); sys.exit(code)"
    )
    result = python(code)
    assert (result.returncode, result.stderr) == (0, "[]\n")
    if arguments[0] in VERBS:
        assert "example:\n  l4jax" in result.stdout


def test_importing_l4jax_imports_nothing_heavy():
    assert python("import l4jax, sys; sys.exit('jax' in sys.modules)").returncode == 0


def test_the_public_face():
    from l4jax.config import Llama4Config
    from l4jax.inference.loaded import load
    from l4jax.model.llama4 import Llama4

    assert (l4jax.load, l4jax.Llama4, l4jax.Llama4Config) == (load, Llama4, Llama4Config)
    assert set(l4jax.__all__) <= set(dir(l4jax))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = l4jax.lode


def run(capsys, *arguments):
    code = cli.main(list(arguments))
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generat"], "unknown verb 'generat'; did you mean generate?"),
        (["generate", "-m", "x", "-p", "y", "--temprature", "1"], "--temprature; did you mean --temperature?"),
        (["generate", "-m", "x", "--promt", "y"], "unknown flag --promt; did you mean --prompt?"),
        (["generate", "-m", "x", "-p", "y", "--top_p=1"], "unknown flag --top_p; did you mean --top-p?"),
        (["generate", "-m", "x"], "required: -p/--prompt; see l4jax generate --help"),
        (["generate", "-m", "x", "-p", "y", "-n", "many"], "invalid int value: 'many'; see l4jax generate --help"),
        (["chat", "-m", "x", "--dtype", "int3"], "invalid choice: 'int3'"),
    ],
)  # fmt: skip
def test_wrong_command_lines_end_with_2(capsys, arguments, message):
    code, output = run(capsys, *arguments)
    assert (code, output.out) == (2, "")
    assert output.err.startswith("error: ")
    assert message in output.err
    assert output.err.count("\n") == 1


@pytest.fixture(scope="session")
def small_guard():
    with pytest.warns(UserWarning, match="small-guard is a preset: its weights are random"):
        return l4jax.load("small-guard", max_len=64)


@pytest.fixture
def loaded(monkeypatch, small_guard):
    """Loading takes no time: whatever is asked for is a small model with random weights."""
    monkeypatch.setattr("l4jax.inference.loaded.load", lambda *arguments, **options: small_guard)


@pytest.fixture
def bomb(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (13000, 13000)).save(path)
    return str(path)


@pytest.fixture
def cut_off(tmp_path):
    path = tmp_path / "cut.png"
    Image.effect_noise((100, 100), 50).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    return str(path)


def check_user_errors(capsys, table):
    for message, arguments in table.items():
        code, output = run(capsys, *arguments)
        assert (code, output.err.count("\n"), output.out) == (1, 1, ""), (arguments, output)
        assert output.err.startswith("error: ")
        assert message in output.err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of flax, when layers are stacked
def test_what_users_do_wrong_is_found_before_a_model_is_loaded(capsys, tmp_path, bomb, cut_off):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("no picture")
    prompt = ["generate", "-m", "small-guard", "-p", "x"]
    check_user_errors(
        capsys,
        {
            "neither a directory nor a preset": ["generate", "-m", "nowhere", "-p", "x"],
            "no checkpoint in": ["generate", "-m", str(tmp_path / "empty"), "-p", "x"],
            "temperature=-1.0 must be 0 or more": [*prompt, "--temperature", "-1"],
            "max_len=9999 must be in 2..4,096": [*prompt, "--max-len", "9999"],
            "no picture nothing.png": [*prompt, "--image", "nothing.png"],
            "is not a picture": [*prompt, "--image", str(tmp_path / "note.txt")],
            "more than 36 million pixels": [*prompt, "--image", bomb],
            "cut short": ["chat", "-m", "small-guard", "--image", cut_off],
            "takes pictures, not a video": ["generate", "-m", "x", "-p", "<|image|>", "--video", "v.gif"],
            "the weights of behemoth-estimate-94 in bfloat16 take": [
                *("chat", "-m", "behemoth-estimate-94", "--dtype", "bfloat16"),
            ],
        },
    )


@pytest.mark.usefixtures("loaded")
def test_what_does_not_fit_the_model_ends_with_1_and_one_line(capsys):
    prompt = ["generate", "-m", "small-guard", "-p"]
    check_user_errors(
        capsys,
        {
            "the prompt is 201 tokens, its limit is 64": [*prompt, "x" * 200],
            "has 1 <|image|> placeholders, but 0 pictures": [*prompt, "a <|image|> b"],
            "no video v.mp4": [*prompt, "x", "--video", "v.mp4"],
        },
    )


@pytest.fixture
def verb(monkeypatch):
    """Installs a verb that raises what it is given."""

    def install(error):
        def raise_it(args):
            raise error

        module = types.ModuleType("tests_verb")
        module.add_arguments, module.run = lambda parser: None, raise_it
        monkeypatch.setitem(sys.modules, "tests_verb", module)
        monkeypatch.setitem(cli.VERBS, "explode", cli.Verb("tests_verb", "explode", "l4jax explode"))

    return install


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a is wrong;\n  mend it"), 1, "error: a is wrong; mend it"),
        (KeyError("no such name"), 1, "error: no such name"),
        (FileNotFoundError(2, "No such file or directory", "x.json"), 1, "error: x.json: No such file or directory"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device"),
        (ModuleNotFoundError("needs PyAV; pip install it"), 1, "error: needs PyAV; pip install it"),
        (MemoryError(), 1, "error: not enough memory; choose a smaller --max-len, a smaller dtype or a smaller model"),
        (RuntimeError("RESOURCE_EXHAUSTED: out"), 1, "error: not enough memory; choose a smaller --max-len"),
        (TypeError("oops"), 1, "error: TypeError: oops; this is a mistake in l4jax, --debug shows where"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_error_becomes_one_line_and_a_code(capsys, verb, error, code, line):
    verb(error)
    result, output = run(capsys, "explode")
    assert result == code
    assert output.err.startswith(line)
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.err


def test_debug_shows_the_traceback(capsys, verb):
    verb(ValueError("wrong"))
    code, output = run(capsys, "explode", "--debug")
    assert code == 1
    assert "Traceback" in output.err
    assert output.err.endswith("error: wrong\n")


def test_no_arguments_show_the_verbs(capsys):
    code, output = run(capsys)
    assert code == 2
    assert all(f"  {verb} " in output.out for verb in VERBS)


@pytest.mark.usefixtures("loaded")
def test_generate_writes_text_or_json_and_repeats_itself(capsys):
    arguments = ["generate", "-m", "small-guard", "-p", "hello", "-n", "6"]
    code, text = run(capsys, *arguments)
    assert (code, text.err) == (0, "")
    code, output = run(capsys, *arguments, "--json")
    answer = json.loads(output.out)
    assert (code, answer["text"] + "\n") == (0, text.out)
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": len(answer["ids"])}


@pytest.mark.usefixtures("loaded")
def test_generate_looks_at_pictures(capsys, tmp_path):
    path = str(tmp_path / "grey.png")
    Image.new("L", (56, 56), 90).save(path)
    arguments = ["generate", "-m", "small-guard", "-n", "2", "--json", "--image", path]
    _, alone = run(capsys, *arguments, "-p", "what?")
    _, placed = run(capsys, *arguments, "-p", "<|image|>what?")
    # As a message: header, end of turn and the assistant's header besides.
    assert json.loads(alone.out)["usage"]["prompt_tokens"] > json.loads(placed.out)["usage"]["prompt_tokens"]


def test_doctor_says_what_is_there_and_what_is_missing(capsys, monkeypatch):
    from l4jax import doctor

    code, output = run(capsys, "doctor")
    assert code == 0
    assert "jax " in output.out
    assert "cpu: 8 x cpu" in output.out
    known = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name in ("av", "optax") else known(name))
    code, output = run(capsys, "doctor")
    assert code == 1
    assert "missing      optax: " in output.out
    assert "missing av: " in output.out
    assert "pip install" in output.out
    assert "[video]'" in output.out
