# Makes and updates .venv in the checkout. demo.sh and test.sh source it; by hand: bash launch/setup_env.sh dev
#
#   source launch/setup_env.sh EXTRA      EXTRA: an extra of setup.cfg (demo, dev, export, conversion, tpu,
#                                        cuda, chips)
#
# Afterwards $PYTHON is the environment's interpreter. Nothing is installed when setup.cfg, the constraints
# and Python are those of the last time. IV3_PYTHON=/path/to/python chooses the interpreter it is made with;
# pip's own PIP_* variables and files choose where packages come from.

_extra=${1:?which extra of setup.cfg? for example: bash launch/setup_env.sh dev}
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
_venv=$_root/.venv
PYTHON=$_venv/bin/python

_say() { echo "[setup] $*"; }
_die() { echo "[setup] error: $*" >&2; exit 1; }
_is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Prints the first interpreter that is new enough and can make environments.
_find_python() {
  local candidate without_venv=
  for candidate in ${IV3_PYTHON:-python3 python python3.13 python3.12 python3.11}; do
    _is_new_enough "$candidate" || continue
    if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then echo "$candidate"; return; fi
    without_venv=$candidate
  done
  [ -z "$without_venv" ] ||
    _die "$without_venv lacks the venv module; install it (Debian: python3-venv) or set IV3_PYTHON"
  _die "no Python 3.11 or newer found (tried ${IV3_PYTHON:-python3 and others}); install one or set IV3_PYTHON"
}

# Changes whenever an install might give something else; an editable install maps top-level packages by name.
_fingerprint() {
  (cd "$_root" && "$PYTHON" - setup.cfg pyproject.toml launch/constraints.txt <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256((sys.version + sys.prefix).encode())
for name in sys.argv[1:]:
    digest.update(pathlib.Path(name).read_bytes())
digest.update(repr(sorted(map(str, pathlib.Path().glob("*/__init__.py")))).encode())
print(digest.hexdigest())
PY
  )
}

_install() {
  local log=$_venv/install.log started=$SECONDS
  _say "installing iv3jax[$_extra] into .venv; the first time takes one to five minutes"
  if ! "$PYTHON" -m pip install --progress-bar off --disable-pip-version-check -c "$_root/launch/constraints.txt" \
      -e "$_root[$_extra]" 2>&1 | tee "$log" |
      awk '/^Collecting/ { print "[setup]   " $2; fflush() }
           /^Installing collected/ { print "[setup]   writing " NF - 3 " packages"; fflush() }'
  then
    grep -E '^ERROR' "$log" >&2 || tail -n 20 "$log" >&2
    _die "pip failed after $((SECONDS - started)) s; its whole output is in .venv/install.log"
  fi
  _say "installed in $((SECONDS - started)) s"
}

_setup() {
  local python stamp fingerprint kept name names=$_extra
  if [ ! -e "$_venv" ]; then
    python=$(_find_python) || exit 1
    _say "making .venv with $("$python" --version)"
    "$python" -m venv "$_venv" || { rm -rf "$_venv"; _die "$python could not make .venv"; }
  fi
  _is_new_enough "$PYTHON" && "$PYTHON" -m pip --version >/dev/null 2>&1 ||
    _die "$_venv has no pip or no Python 3.11; delete that folder and run this again"
  stamp=$_venv/installed # a line per extra: the fingerprint it was installed with, its name
  fingerprint=$(_fingerprint)
  grep -qsx "$fingerprint $_extra" "$stamp" && return
  kept=$(grep -s "^$fingerprint " "$stamp" || true)
  printf '%s' "${kept:+$kept$'\n'}" >"$stamp"
  _install
  [ "$_extra" != dev ] || names="dev demo export conversion" # what dev includes
  for name in $names; do echo "$fingerprint $name" >>"$stamp"; done
}

set -o pipefail
_setup

# Compiled programs are kept between runs, so that only the first one waits for them.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$_root/.cache/jax}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0.5}
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=${JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES:--1}
