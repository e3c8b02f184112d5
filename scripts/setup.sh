# Sourced by other scripts: `setup EXTRAS [DIRECTORY]` makes an environment, by default in .venv, and installs the
# project with those extras into it.
# ${PYTHON:-python3} must be 3.11 or newer. What was installed is remembered, so that a second run starts at once.

setup() {
  local python="${PYTHON:-python3}" environment="${2:-.venv}" stamp wanted
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is not Python 3.11 or newer; name one with PYTHON=/path/to/python3.11" >&2
    exit 1
  fi
  [ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
  wanted="$1 $(cksum < pyproject.toml)"
  stamp="$environment/installed"
  if ! grep -qxF -- "$wanted" "$stamp" 2>/dev/null; then
    echo "installing l4jax$1 into $environment (about a minute, once)" >&2
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check -e ".$1"
    echo "$wanted" >> "$stamp"
  fi
}
