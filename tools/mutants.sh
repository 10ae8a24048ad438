#!/usr/bin/env bash
# The mutants of one module, by cosmic-ray: one change at a time, and does a test notice?
#
#     bash tools/mutants.sh                     # the modules that there are (tools/mutants.toml)
#     bash tools/mutants.sh allocators.py       # this one; a run that was ended goes on
#     WORKERS=8 bash tools/mutants.sh sequence.py
#
# Works in .mutants/MODULE/, on a copy of the checkout for each worker. Prints how many mutants there
# are and how many tests noticed, and exits with 1 if that is under 95 %. Every survivor counts, also
# one that behaves as the code does: `cr-report --surviving-only --show-diff .mutants/*/last.sqlite`.
# (cr-rate would count the operators that are left out as noticed.)
set -euo pipefail

PYTHON=${PYTHON:-python3}
WORKERS=${WORKERS:-1}

# Of a copy: each file of tests is a process of its own, so a mutant ends with the first that fails.
# A mutant may never end: the limit is of CPU time, which other work leaves as it is.
if [ "${1:-}" = --tests ]; then
    shift
    export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 OMP_NUM_THREADS=1
    ulimit -t 60 -v $((3 << 20))
    for tests; do # no conftest.py, which loads torch
        "$PYTHON" -m pytest --noconftest -p mutants_plugin -x -m "not slow" "tests/$tests.py"
    done
    exit
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# = 0 ]; then
    sed -n '/^\[tests\]/,$ s/^"\(.*\)" = .*/\1/p' tools/mutants.toml
    exit
fi

root=$PWD module=$1
PYTHON=$(command -v "$PYTHON")
PATH=$(dirname "$PYTHON"):$PATH
export PYTHON PATH PYTHONPATH=
folder=$root/.mutants/${module//\//-}
session=$folder/session.sqlite
tests=$(sed -n "s|^\"$module\" = \"\(.*\)\"|\1|p" tools/mutants.toml)
[ -n "$tests" ] || { echo "mutants.sh: error: no tests for $module in tools/mutants.toml" >&2; exit 2; }

# Mutants are of one text: another begins again.
cmp -s "$module" "$folder/module.py" || rm -rf "$folder"
mkdir -p "$folder"
cp "$module" "$folder/module.py"

copy() { # a copy of the checkout, without mutant and bytecode
    rm -rf "$1"
    mkdir -p "$1"
    cp -r ./*.py pyproject.toml vllm_sim tests tools "$1"
    find "$1/${module%/*}" -name "$(basename "${module%.py}").*.pyc" -delete 2>/dev/null || true
    cat >"$1/mutants_plugin.py" <<'END'
"""Hypothesis finds a failing example, the same one in every run; a small one is of no use."""

import pytest
from hypothesis import Phase, settings

settings.register_profile("mutants", derandomize=True, database=None, deadline=None,
                          phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutants")


@pytest.fixture
def figure():
    return lambda name, **numbers: None
END
}

urls=() workers=()
end() { kill "${workers[@]}" 2>/dev/null || true; }
trap end EXIT
for ((i = 0; i < WORKERS; i++)); do
    copy "$folder/worker-$i"
    port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    (cd "$folder/worker-$i" && exec cosmic-ray http-worker --port "$port") >"$folder/worker-$i.log" 2>&1 &
    workers+=($!)
    urls+=("http://localhost:$port")
    until grep -q "Running on .*:$port" "$folder/worker-$i.log"; do
        kill -0 $! || { tail -n 1 "$folder/worker-$i.log" >&2; exit 1; }
        sleep 0.2
    done
done

cd "$folder/worker-0"
list=$(printf '", "%s' "${urls[@]}")
sed "s|@MODULE@|$module|; s|@TESTS@|$tests|; s|@URLS@|${list#????}|" tools/mutants.toml >../mutants.toml
# shellcheck disable=SC2086
bash tools/mutants.sh --tests $tests >../baseline.log || { tail -n 30 ../baseline.log >&2; exit 1; }
if [ ! -e "$session" ]; then
    cosmic-ray init ../mutants.toml ../new.sqlite
    cr-filter-operators ../new.sqlite ../mutants.toml
    mv ../new.sqlite "$session"
fi
cosmic-ray exec ../mutants.toml "$session"
mv "$session" ../last.sqlite # the next run begins again

"$PYTHON" - "$module" ../last.sqlite <<'END'
import sys

from cosmic_ray.work_db import WorkDB, use_db

module, session = sys.argv[1:]
with use_db(session, WorkDB.Mode.open) as found:
    ended = [one for _, one in found.results if one.worker_outcome != "skipped"]
    left = sum(1 for _ in found.pending_work_items)
odd = sum(one.worker_outcome != "normal" for one in ended) + left
noticed = sum(one.worker_outcome == "normal" and one.is_killed for one in ended)
share = noticed / max(1, len(ended) + left)
print(f"{module}: {noticed} of {len(ended) + left} mutants noticed, {share:.1%}; {odd} not run")
sys.exit(share < 0.95)
END
