"""`scripts/tpu/pod.sh`: what it would do, told by --dry-run, and what it does, with a gcloud that only writes down."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

POD = Path(__file__).parents[2] / "scripts" / "tpu" / "pod.sh"
WHERE = ("--project", "my-project", "--zone", "us-east5-a", "--name", "pod")
TRAIN = ("l4jax", "train", "configs/demo.yaml", "--out", "gs://bucket/run")


def pod(*words: str, path: Path | None = None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run(["bash", POD, *words], env=environment, capture_output=True, text=True, timeout=60)


def dry_run(*words: str) -> list[list[str]]:
    """Returns the commands that would run, each as its words."""
    verb, *rest = words
    result = pod(verb, *WHERE, "--dry-run", *rest)
    assert result.returncode == 0, result.stderr
    commands, current = [], []
    for word in shlex.split(result.stdout):
        if word in ("gcloud", "git", "mkdir") and current:
            commands.append(current)
            current = []
        current.append(word)
    return [*commands, current]


@pytest.mark.parametrize(
    ("tpu", "runtime"),
    [("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-128", "v2-alpha-tpuv5"), ("v6e-16", "v2-alpha-tpuv6e")],
)
def test_a_slice_is_asked_for_in_the_queue(tpu, runtime):
    request, look = dry_run("create", "--type", tpu, "--spot")
    assert request == [
        *("gcloud", "compute", "tpus", "queued-resources", "create", "pod"),
        *(f"--accelerator-type={tpu}", f"--runtime-version={runtime}", "--node-id=pod", "--spot"),
        *("--project=my-project", "--zone=us-east5-a"),
    ]
    assert look[4:6] == ["describe", "pod"]


def test_several_slices_are_nodes_of_one_request():
    request, _ = dry_run("create", "--type", "v5p-128", "--slices", "4")
    assert request[8:10] == ["--node-count=4", "--node-prefix=pod"]


def test_every_worker_of_every_slice_gets_code_and_command():
    archive, copy, install = dry_run("setup")
    assert archive[0] == "git"
    assert archive[-1] == "HEAD"
    assert copy[4] == "scp"
    assert copy[6] == "pod:l4jax.tar.gz"
    (start,) = dry_run("run", "--", *TRAIN)
    for command in (copy, install, start):
        assert {"--node=all", "--worker=all"} <= set(command)
    assert 'setup "[tpu,gcs]"' in install[8]
    assert "exec l4jax train configs/demo.yaml --out gs://bucket/run\n" in start[8]
    assert "--setenv=L4JAX_DISTRIBUTED=auto" in start[8]


def test_watch_does_everything_in_order():
    verbs = [command[4] for command in dry_run("watch", "--type", "v6e-16", "--", *TRAIN) if command[0] == "gcloud"]
    assert verbs == ["create", "describe", "scp", "ssh", "ssh", "describe", "ssh"]


def test_the_rest_of_the_verbs():
    assert dry_run("stop")[0][8] == "--command=sudo systemctl stop l4jax"
    assert dry_run("delete")[0][4:8] == ["delete", "pod", "--force", "--quiet"]
    assert "tail -n 100 -F" in dry_run("logs")[0][8]
    _, copy = dry_run("fetch", "gs://bucket/run", "here")
    assert copy == ["gcloud", "storage", "cp", "gs://bucket/run/metrics.jsonl", "gs://bucket/run/config.yaml", "here"]
    _, copy = dry_run("fetch", "runs/a", "here")
    assert copy[5:8] == ["pod:l4jax/runs/a/metrics.jsonl", "pod:l4jax/runs/a/config.yaml", "here"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("create", "--zone", "z", "--name", "n"), "--project is missing; give it, or set TPU_PROJECT"),
        (("create", *WHERE), "--type is missing; give it, or set TPU_TYPE"),
        (("create", *WHERE, "--type", "v5e-16"), "gcloud calls v5e-16 v5litepod-16; give that to --type"),
        (("create", *WHERE, "--type", "v9-4"), "no system image is known for --type v9-4; name it with --runtime"),
        (("create", *WHERE, "--type", "v6e-8", "--slices", "two"), "--slices two must be a whole number from 1 on"),
        (("create", *WHERE, "--type"), "--type needs a value"),
        (("run", *WHERE), "run needs a command: run -- l4jax train CONFIG --out gs://BUCKET/RUN"),
        (("run", *WHERE, "l4jax"), "run needs a command"),
        (("setup", *WHERE, "--", "l4jax"), "setup takes no command after --"),
        (("fetch", *WHERE, "gs://bucket/run"), "fetch needs a run and a directory"),
        (("destroy", *WHERE), "unknown verb destroy"),
        (("create", "--zones", "z"), "unknown flag --zones"),
    ],
)
def test_mistakes_are_one_line(words, message):
    result = pod(*words)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


def test_help_lists_every_verb():
    help_text = pod("--help").stdout
    for verb in ("create", "setup", "run", "watch", "logs", "stop", "fetch", "delete"):
        assert f"  pod.sh {verb} " in help_text


def remote_command(words: list[str]) -> str:
    (command,) = (word for word in words if word.startswith("--command="))
    return command.removeprefix("--command=")


def install_tool(folder: Path, name: str, script: str) -> None:
    tool = folder / name
    tool.write_text(f"#!/usr/bin/env bash\n{script}")
    tool.chmod(0o755)


def test_the_words_of_a_command_arrive_unchanged(tmp_path, monkeypatch):
    """The remote part runs here, with a systemd-run that runs its last two words."""
    words = ["printf", "<%s>", "a b", "it's", "", '"$HOME"', "x=[1, 2]", "back\\slash", "new\nline", "*"]
    (start,) = dry_run("run", "--", *words)
    install_tool(tmp_path, "sudo", 'if [ "$1" = systemd-run ]; then exec "${@: -2:1}" "${@: -1}"; fi')
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = subprocess.run(["bash", "-c", remote_command(start)], capture_output=True, text=True, check=True)
    assert done.stdout == "".join(f"<{word}>" for word in words[2:])


GCLOUD = r"""
echo "$4 $5" >> {log}
next() {{ head -n 1 "{folder}/$1"; sed -i 1d "{folder}/$1"; }}
case "$*" in
  *" describe "*) next states ;;
  *"systemctl show"*) next statuses ;;
esac
"""


def watched(tmp_path: Path, states: list[str], statuses: list[str]) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Returns how `watch` ended, and the verbs it gave to a gcloud with these answers."""
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    (tmp_path / "statuses").write_text("\n".join(statuses) + "\n")
    install_tool(tmp_path, "gcloud", GCLOUD.format(log=tmp_path / "log", folder=tmp_path))
    words = ("watch", *WHERE, "--type", "v6e-16", "--poll", "0", "--retries", "1", "--", *TRAIN)
    result = pod(*words, path=tmp_path)
    return result, [line.split()[0] for line in (tmp_path / "log").read_text().splitlines() if "describe" not in line]


FRESH = "ExecMainStatus=0 SubState=dead "
RUNNING, ENDED = "ExecMainStatus=0 SubState=running ", "ExecMainStatus=0 SubState=exited "
STOPPED, BROKEN = "ExecMainStatus=143 SubState=failed ", "ExecMainStatus=1 SubState=failed "
SET_UP = ["ssh", "scp", "ssh", "ssh"]  # look, copy, install, start


def test_watch_asks_again_for_what_was_taken_away(tmp_path):
    states = ["", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "", "ACTIVE", "ACTIVE"]
    result, verbs = watched(tmp_path, states, [FRESH, RUNNING, FRESH, ENDED])
    assert result.returncode == 0, result.stderr
    assert verbs == ["create", *SET_UP, "ssh", "delete", "create", *SET_UP, "ssh"]


def test_watch_starts_a_stopped_command_again_and_forgives_few_failures(tmp_path):
    result, verbs = watched(tmp_path, ["ACTIVE"] * 9, [FRESH, STOPPED, BROKEN, RUNNING, BROKEN])
    assert result.returncode == 1
    assert "error: the command failed (ExecMainStatus=1 SubState=failed ), and that 2 times" in result.stderr
    assert verbs == [*SET_UP, "ssh", "ssh", "ssh", "ssh", "ssh", "ssh", "ssh", "ssh"]


def test_watch_finds_a_command_that_runs_already(tmp_path):
    result, verbs = watched(tmp_path, ["ACTIVE"] * 4, [RUNNING, RUNNING, ENDED])
    assert result.returncode == 0, result.stderr
    assert verbs == ["ssh"] * 3
