#!/usr/bin/env bash
# Runs one command on every worker of a TPU slice, or of several slices, from any machine with gcloud; README.md beside
# this file has the commands for each kind of TPU.
#
#   pod.sh create             ask for the TPUs and wait until they are there
#   pod.sh setup              copy the committed code to every worker and install it
#   pod.sh run -- COMMAND     start COMMAND on every worker; it goes on without this terminal
#   pod.sh watch -- COMMAND   all three, and again whenever the TPUs are taken away, until COMMAND has ended well
#   pod.sh logs               follow the output of the first worker
#   pod.sh stop               tell COMMAND to save and end (SIGTERM)
#   pod.sh fetch RUN DIR      copy metrics.jsonl and config.yaml of a run (gs://bucket/run) into DIR
#   pod.sh delete             give the TPUs back
#
# Flags, before the `--`; each can be a variable instead:
#   --project P   TPU_PROJECT     --zone Z      TPU_ZONE       --name N      TPU_NAME
#   --type T      TPU_TYPE        v5litepod-16, v5p-128, v6e-16, ... (create, watch)
#   --slices N    TPU_SLICES      slices of that type, joined by the data axis of the mesh (default 1)
#   --runtime R   TPU_RUNTIME     system image (default: the one for the type)
#   --spot, --reserved            cheaper and preemptible; from a reservation
#   --retries N   TPU_RETRIES     failures that `watch` forgives (default 3); preemptions do not count
#   --poll S      TPU_POLL        seconds between two looks at the TPUs (default 60)
#   --dry-run                     print every command instead of running it
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

say() { echo "$*" >&2; }
fail() {
  say "error: $1"
  exit "${2:-1}"
}

# Prints words so that a shell reads them back unchanged.
quote() {
  local word line="" mark="'" escaped="'\\''"
  for word in "$@"; do
    case "$word" in
      "" | *[!A-Za-z0-9_./:=@,%+-]*) word="$mark${word//$mark/$escaped}$mark" ;;
    esac
    line+="$word "
  done
  printf '%s\n' "${line% }"
}

call() { if [ -n "$dry" ]; then quote "$@"; else "$@"; fi; }

# --- What is asked of gcloud ------------------------------------------------------------------------------------------

queued() { call gcloud compute tpus queued-resources "$@" "--project=$project" "--zone=$zone"; }
on_first() { queued ssh "$name" --node=0 --worker=0 "--command=$1"; }
on_all() { queued ssh "$name" --node=all --worker=all "--command=$1"; }

request() {
  local nodes=("--node-id=$name")
  [ "$slices" = 1 ] || nodes=("--node-count=$slices" "--node-prefix=$name")
  queued create "$name" "--accelerator-type=$type" "--runtime-version=$runtime" "${nodes[@]}" ${tier:+"$tier"}
}

# Sets `state` to that of the request; empty if there is none, or no answer.
look() {
  if [ -n "$dry" ]; then
    queued describe "$name" "--format=value(state.state)"
    state=ACTIVE
  else
    state="$(queued describe "$name" "--format=value(state.state)" 2>/dev/null || true)"
  fi
}

release() { queued delete "$name" --force --quiet; }

# Returns when the TPUs are there; asks again for those that were taken away.
ensure_active() {
  [ -z "$dry" ] || request
  while look && [ "$state" != ACTIVE ]; do
    say "$name: ${state:-not requested yet}"
    case "$state" in
      "") request || say "gcloud could not create $name; trying again in $poll s" ;;
      SUSPENDED) release || true ;;
      FAILED)
        queued describe "$name" >&2 || true
        forgive "the request for $name failed"
        release || true
        ;;
    esac
    sleep "$poll"
  done
}

forgive() {
  failures=$((failures + 1))
  [ "$failures" -le "$retries" ] || fail "$1, and that $failures times"
  say "$1; trying again ($failures of $retries)"
}

# --- What happens on the workers --------------------------------------------------------------------------------------

# The images have Python 3.10; uv brings a newer one. What runs is told to save and end before its code goes.
install='set -e
sudo systemctl stop l4jax 2>/dev/null || true
mkdir -p l4jax
find l4jax -mindepth 1 -maxdepth 1 ! -name .venv ! -name runs -exec rm -rf {} +
tar xzf l4jax.tar.gz -C l4jax
cd l4jax
python3 -m pip install --quiet --user uv
[ -x .venv/bin/python ] || ~/.local/bin/uv venv --quiet --seed --python 3.12 .venv
source scripts/setup.sh
PYTHON=.venv/bin/python setup "[tpu,gcs]"'

setup() {
  local archive="${TMPDIR:-/tmp}/l4jax-$name.tar.gz"
  [ -z "$(git -C "$root" status --porcelain)" ] || say "note: only committed code is copied; there are other changes"
  call git -C "$root" archive --format=tar.gz "--output=$archive" HEAD &&
    queued scp "$archive" "$name:l4jax.tar.gz" --node=all --worker=all &&
    on_all "$install"
}

# shellcheck disable=SC2016 # the worker's shell expands it
# A system service outlives the ssh session and gets SIGTERM when the machine is taken away: training then saves.
start='set -e
sudo systemctl stop l4jax 2>/dev/null || true
sudo systemctl reset-failed l4jax 2>/dev/null || true
sudo systemd-run --unit=l4jax --uid="$USER" --working-directory="$HOME/l4jax" --setenv=HOME="$HOME" \
  --setenv=PATH="$HOME/l4jax/.venv/bin:$PATH" --setenv=L4JAX_DISTRIBUTED=auto --setenv=PYTHONUNBUFFERED=1 \
  -p RemainAfterExit=yes -p KillMode=mixed -p TimeoutStopSec=300 -p LimitMEMLOCK=infinity -p LimitNOFILE=1048576 \
  -p StandardOutput=append:"$HOME/l4jax.log" -p StandardError=append:"$HOME/l4jax.log" \
  bash "$HOME/l4jax.command"'

launch() {
  on_all "cat > ~/l4jax.command <<'END_OF_COMMAND'
exec $(quote "$@")
END_OF_COMMAND
$start"
}

# How the command on the first worker fares, as one line; empty if there is no answer.
command_status() {
  on_first "systemctl show l4jax -p ExecMainStatus -p SubState | sort | tr '\\n' ' '" || true
}

# Repeats create, setup and run until the command has ended well.
watch() {
  local status="" silent
  while :; do
    ensure_active
    [ -n "$dry" ] || status="$(command_status)"
    if [[ "$status" == *=running* || "$status" == *=exited* ]]; then
      say "$name: the command is there already"
    elif ! { setup && launch "$@"; }; then
      forgive "the workers could not be set up"
      sleep "$poll"
      continue
    fi
    silent=0
    while look && [ "$state" = ACTIVE ]; do
      status="$(command_status)"
      if [ -n "$dry" ]; then
        echo "$status"
        return
      fi
      case "$status" in
        *SubState=running*) silent=0 ;;
        "ExecMainStatus=0 SubState=exited "*)
          say "$name: the command has ended well; 'pod.sh delete' gives the TPUs back"
          return
          ;;
        "")
          silent=$((silent + 1))
          if [ "$silent" -ge 10 ]; then # taken away without a word
            release || true
            break
          fi
          ;;
        "ExecMainStatus=143 "* | *SubState=dead*) # told to stop by the machine, which is back
          say "$name: the command was stopped; starting it again"
          launch "$@" || true
          ;;
        *)
          on_first 'tail -n 30 ~/l4jax.log' >&2 || true
          forgive "the command failed ($status)"
          launch "$@" || true
          ;;
      esac
      sleep "$poll"
    done
  done
}

fetch() {
  local from=("$1/metrics.jsonl" "$1/config.yaml")
  call mkdir -p "$2"
  case "$1" in
    *://*) call gcloud storage cp "${from[@]}" "$2" ;;
    *) queued scp "${from[@]/#/$name:l4jax/}" "$2" --node=0 --worker=0 ;;
  esac
}

# --- What was typed ---------------------------------------------------------------------------------------------------

needs() {
  local flag variable
  for flag in "$@"; do
    variable="TPU_$(echo "$flag" | tr '[:lower:]' '[:upper:]')"
    [ -n "${!flag}" ] || fail "--$flag is missing; give it, or set $variable" 2
  done
}

default_runtime() {
  case "$1" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5e-*) fail "gcloud calls $1 v5litepod-${1#v5e-}; give that to --type" 2 ;;
    *) fail "no system image is known for --type $1; name it with --runtime" 2 ;;
  esac
}

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

project="${TPU_PROJECT:-}" zone="${TPU_ZONE:-}" name="${TPU_NAME:-}" type="${TPU_TYPE:-}" slices="${TPU_SLICES:-1}"
runtime="${TPU_RUNTIME:-}" retries="${TPU_RETRIES:-3}" poll="${TPU_POLL:-60}"
tier="" dry="" verb="" words=() failures=0 state=""

while [ $# -gt 0 ]; do
  case "$1" in
    --) break ;;
    --project | --zone | --name | --type | --slices | --runtime | --retries | --poll)
      [ $# -gt 1 ] || fail "$1 needs a value" 2
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --spot | --reserved) tier="$1" ;;
    --dry-run) dry=yes ;;
    -h | --help) verb=help ;;
    -*) fail "unknown flag $1; see pod.sh --help" 2 ;;
    *) if [ -z "$verb" ]; then verb="$1"; else words+=("$1"); fi ;;
  esac
  shift
done
[ $# -eq 0 ] || shift # the --; what is left is the command

case "$verb" in
  help) usage && exit ;;
  "") usage && exit 2 ;;
  create | setup | run | watch | logs | stop | fetch | delete) needs project zone name ;;
  *) fail "unknown verb $verb; see pod.sh --help" 2 ;;
esac
case "$verb" in
  create | watch)
    needs type
    [[ "$slices" =~ ^[1-9][0-9]*$ ]] || fail "--slices $slices must be a whole number from 1 on" 2
    [ -n "$runtime" ] || runtime="$(default_runtime "$type")"
    ;;
esac
case "$verb" in
  run | watch) [ $# -gt 0 ] || fail "$verb needs a command: $verb -- l4jax train CONFIG --out gs://BUCKET/RUN" 2 ;;
  *) [ $# -eq 0 ] || fail "$verb takes no command after --" 2 ;;
esac
case "$verb" in
  fetch) [ ${#words[@]} -eq 2 ] || fail "fetch needs a run and a directory: pod.sh fetch gs://BUCKET/RUN DIR" 2 ;;
  *) [ ${#words[@]} -eq 0 ] || fail "$verb takes no ${words[0]}; a command comes after --" 2 ;;
esac
[ -n "$dry" ] || command -v gcloud >/dev/null || fail "gcloud is missing; see https://cloud.google.com/sdk/docs/install"

case "$verb" in
  create) ensure_active ;;
  setup) setup ;;
  run) launch "$@" ;;
  watch) watch "$@" ;;
  logs) on_first 'tail -n 100 -F ~/l4jax.log' ;;
  stop) on_all 'sudo systemctl stop l4jax' ;;
  fetch) fetch "${words[@]}" ;;
  delete) release ;;
esac
