#!/usr/bin/env bash
# Can a stranger install this? Resolves the project against the package index alone, as a machine without this one's
# pip configuration, local wheels and caches would: the base, each extra, and every line of constraints.txt.
#
#   tools/check_install.sh [python ...]     the interpreters to try (default: every Python 3.11 or newer found here)
#   NEWEST=1 tools/check_install.sh         without constraints.txt: the newest versions that the ranges allow
#
# Nothing is installed, but pip downloads what it asks for metadata: 3 GB and about ten minutes a Python.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_CONFIG_FILE=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0
unset PIP_FIND_LINKS PIP_EXTRA_INDEX_URL PIP_CONSTRAINT PIP_NO_INDEX PYTHONPATH

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# One name a version: those on the path, then pyenv's.
find_pythons() {
  { compgen -c python3. || true; } | grep -E '^python3\.[0-9]+$' | sort -u | while read -r name; do command -v "$name"; done
  ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python 2>/dev/null || true
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2] if sys.version_info >= (3, 11) else "")' 2>/dev/null || true; }

extras=$(sed -n '/^\[project.optional-dependencies\]/,/^\[tool/s/^\([a-z0-9]*\) = \[.*/\1/p' pyproject.toml)
declare -A seen=()
failed=0 tried=0

# resolve LABEL ARGUMENT...: one dry run of pip.
resolve() {
  local label=$1
  shift
  if "$work/venv/bin/pip" install --quiet --dry-run --ignore-installed --report "$work/report.json" "$@" >"$work/log" 2>&1; then
    printf '  %-24s %s packages\n' "$label" "$(grep -c '"download_info"' "$work/report.json")"
  else
    failed=1
    printf '  %-24s FAILED\n' "$label"
    sed 's/^/    /' "$work/log"
  fi
}

if [ $# -gt 0 ]; then candidates=("$@"); else mapfile -t candidates < <(find_pythons); fi
for python in "${candidates[@]}"; do
  version=$(version_of "$python")
  if [ -z "$version" ] || [ -n "${seen[$version]:-}" ]; then continue; fi
  seen[$version]=1 tried=1
  echo "Python $version ($python)"
  rm -rf "$work/venv"
  "$python" -m venv "$work/venv"
  pins=(--constraint constraints.txt)
  if [ -n "${NEWEST:-}" ]; then pins=(); fi
  resolve base "${pins[@]}" .
  for extra in $extras; do resolve "[$extra]" "${pins[@]}" ".[$extra]"; done
  if [ -z "${NEWEST:-}" ]; then resolve constraints.txt --requirement constraints.txt; fi
done
if [ "$tried" = 0 ]; then echo "no Python 3.11 or newer found; name one: tools/check_install.sh /path/to/python3" >&2; exit 1; fi
exit "$failed"
