#!/usr/bin/env bash
# Try the supported pairs of Python and jax: install the project in a fresh environment, import it, train two steps,
# upscale an image, run a quick part of the tests. Prints a table; exits with 1 if anything failed.
#
#     tests/versions.sh [PYTHON:JAX ...]        tests/versions.sh 3.12:0.11.* 3.13:0.12.*
#
# Pythons come from pyenv or PATH; pairs whose Python is missing are reported. Logs: $VERSIONS (default: a new temporary
# folder). Environments are removed after use.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
logs=${VERSIONS:-$(mktemp -d)}
mkdir -p "$logs"
# jax 0.11 needs Python 3.12.
pairs=("$@")
[ $# -gt 0 ] || pairs=(3.11:0.10.2 3.12:0.10.2 '3.12:0.11.*' '3.12:0.12.*' 3.13:0.10.2 '3.13:0.11.*' '3.13:0.12.*')
quick=(tests/test_layers.py tests/test_losses.py tests/test_public_api.py tests/adapters/test_files.py
    tests/imaging/test_network_input.py tests/data/test_loader.py tests/sd/test_backbone.py tests/tiling/test_windows.py)

find_python() {
    local found
    for found in "$(pyenv root 2>/dev/null)"/versions/"$1".*/bin/python "$(command -v "python$1")"; do
        [ -x "$found" ] && "$found" --version >/dev/null 2>&1 && echo "$found" && return
    done
    return 1
}

# The steps of one pair. A step that fails ends it, and its name is the outcome.
try_pair() {
    local environment=$1 python=$2 jax=$3
    echo venv >"$step"
    "$python" -m venv "$environment" && . "$environment/bin/activate" || return
    echo install >"$step"
    pip install --quiet -e "$root[test]" "jax==$jax" || return
    pip list 2>/dev/null | grep -E '^(jax|jaxlib|flax|optax|orbax-checkpoint|grain|numpy) '
    cd "$environment" || return
    echo import >"$step"
    python -c 'import pisa_jax; [getattr(pisa_jax, name) for name in pisa_jax.__all__]' || return
    echo train >"$step"
    XLA_FLAGS=--xla_backend_optimization_level=0 pisa-sr train --config debug --out run --stages.0.steps 1 --stages.1.steps 1 || return
    echo infer >"$step"
    pisa-sr infer -i "$root/tests/assets/lpips_example/ex_p0.png" -o out -s 2 --min-size 64 --compile-cache off || return
    echo tests >"$step"
    cd "$root" && python -m pytest -n 0 -p no:cacheprovider "${quick[@]}" || return
    echo ok >"$step"
}

failed=0
table=$(printf '%-8s %-8s %-8s %s\n' Python jax outcome log)
for pair in "${pairs[@]}"; do
    version=${pair%%:*} jax=${pair#*:}
    log=$logs/$version-${jax//\*/x}.log step=$(mktemp)
    if python=$(find_python "$version"); then
        environment=$(mktemp -d)
        (try_pair "$environment" "$python" "$jax") >"$log" 2>&1
        outcome=$(cat "$step")
        rm -rf "$environment"
        [ "$outcome" = ok ] || outcome="$outcome failed"
    else
        outcome="no Python"
    fi
    [ "$outcome" = ok ] || failed=1
    table+=$'\n'$(printf '%-8s %-8s %-8s %s' "$version" "$jax" "$outcome" "$log")
    rm -f "$step"
done
echo "$table"
exit $failed
