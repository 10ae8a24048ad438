"""The rules of the house: who may import whom, how large a thing may be, and what documents say."""

import ast
import importlib.util
import json
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = {"sequence", "allocators", "kv_cache_manager"}
TENSORS = {"attention", "paged_attention", "paged_attention_triton"}
COMMANDS = {"main", "reproduce", "capacity", "sweep", "generate"}
FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "vllm_sim").rglob("*.py")])
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}
# What each folder of the package may import of the house, itself aside.
GROUND = {"workload", "models", "paper", "reporting"}
BELOW = {
    "reporting": set(),
    "paper": set(),
    "workload": {"paper", "reporting"},
    "models": {"paper", "reporting"},
    "serving": CORE | GROUND,
    "playback": CORE | GROUND | {"serving"},
    "scenarios": CORE | TENSORS | GROUND | {"serving", "playback"},
    "engine": CORE | TENSORS | GROUND | {"serving", "playback"},
    "evaluation": CORE | GROUND | {"serving"},
    "sizing": CORE | GROUND | {"serving"},
    "conformance": CORE | GROUND | {"serving"},
}
LATE = {"torch", "transformers", "triton", "matplotlib"}  # may be imported in a function
README = ROOT / "README.md"
WRITTEN = [README, *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*WRITTEN, *sorted((ROOT / "docs" / "results").glob("*.md"))]
WITH_TEXT = [path for path in FILES if path.read_text()]


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="ascii"))


def named(node):
    """The modules that an import may mean."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return set()


def imports(path):
    """What a file imports, wherever in it; not for type checking alone."""
    hidden = {
        id(inner)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    return {m for n in ast.walk(tree(path)) if id(n) not in hidden for m in named(n)}


def folder(name):
    """The part of the house: a folder of the package, or a file at the root."""
    return name.split(".")[1] if name.startswith("vllm_sim.") else name


def arrows():
    """Which parts each part imports."""
    found = {folder(name): set() for name in MODULES}
    for name, path in MODULES.items():
        ours = imports(path) & set(MODULES)
        found[folder(name)] |= {folder(one) for one in ours} - {folder(name), "vllm_sim"}
    return found


def lines_of(paths):
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


# ---- layers ------------------------------------------------------------------------------------


def test_the_root_has_at_most_27_entries():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git here")
    assert len({line.split("/")[0] for line in listed.stdout.splitlines()}) <= 27


@pytest.mark.parametrize("name", sorted(CORE | TENSORS))
def test_the_core_imports_nothing_of_ours_but_itself(name):
    allowed = TENSORS if name in TENSORS else CORE
    assert imports(MODULES[name]) & set(MODULES) <= allowed


@pytest.mark.parametrize("name", sorted(set(MODULES) - COMMANDS))
def test_nothing_imports_a_command(name):
    assert not imports(MODULES[name]) & COMMANDS


@pytest.mark.parametrize("name", BELOW)
def test_folders_of_the_package_import_those_below_alone(name):
    assert arrows()[name] <= BELOW[name]


def test_the_house_has_at_most_seven_floors_and_no_cycle():
    graph, floor = arrows(), {}
    while len(floor) < len(graph):
        ready = [part for part in graph if part not in floor and graph[part] <= set(floor)]
        assert ready, f"a cycle among {sorted(set(graph) - set(floor))}"
        for part in ready:
            floor[part] = 1 + max((floor[one] for one in graph[part]), default=0)
    assert max(floor.values()) <= 7


def test_no_module_is_in_a_cycle():
    left = {name: imports(path) & set(MODULES) - {name} for name, path in MODULES.items()}
    while ready := {name for name, needs in left.items() if not needs & set(left)}:
        left = {name: needs for name, needs in left.items() if name not in ready}
    assert not left


@pytest.mark.parametrize("name", sorted(set(MODULES) - COMMANDS))
def test_functions_import_only_what_would_slow_a_start(name):
    """A command imports the package late, so that its --help is quick."""
    for function in ast.walk(tree(MODULES[name])):
        if isinstance(function, ast.FunctionDef):
            late = {m.split(".")[0] for n in ast.walk(function) for m in named(n)}
            assert late <= LATE | TENSORS, function.name


def test_bookkeeping_and_simulation_start_without_torch(run_script):
    parts = CORE | set(BELOW) - {"scenarios", "engine"}
    names = ", ".join(name for name in MODULES if folder(name) in parts)
    done = run_script("-c", f"import sys; import {names}; print('torch' in sys.modules)")
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_the_commands_start_without_triton(run_script):
    """It comes with torch on a GPU machine, and is in no requirements of a run."""
    code = "import sys; sys.modules['triton'] = None; import main, paged_attention as p"
    done = run_script("-c", f"{code}; print(p.PagedKVCache(2, 2, 1, 4).fused)")
    assert (done.stdout, done.stderr) == ("False\n", "")


# ---- form --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WITH_TEXT, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_opens_with_what_it_is(path):
    text = path.read_text(encoding="ascii")  # raises for anything but ASCII
    assert len(ast.get_docstring(tree(path)) or "") > 80
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


def test_no_file_keeps_its_own_format():
    files = [p for p in ROOT.rglob("*.py") if p.is_file() and ".venv" not in p.parts]
    assert [p for p in files if re.search("# fmt: (skip|off)", p.read_text())] == []


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_commands_are_short(name):
    assert lines_of([MODULES[name]]) < 100


def test_no_published_number_is_repeated_outside_paper():
    """A few that would be easy to write down again: Fig. 2, 13 and 15's values."""
    told = {20.4, 26.8, 38.2, 96.3, 57.3, 41.6, 36.6, 9.81, 13.62, 30.42, 6.09, 8.53, 9.79}
    for name, path in MODULES.items():
        if folder(name) != "paper":
            constants = (n.value for n in ast.walk(tree(path)) if isinstance(n, ast.Constant))
            assert not {value for value in constants if isinstance(value, float)} & told, name


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda p: p.name)
def test_results_say_where_they_come_from(path):
    result = json.loads(path.read_text(encoding="ascii"))
    assert set(result) == {"command", "commit", "device", "versions", "output", "printed"}
    printed_alone = {"serve_saturated_60s.json", "serve_samples.json"}  # their figures were lost
    assert (result["output"] is None) == (path.name in printed_alone)
    assert re.fullmatch(r"[0-9a-f]{40}", result["commit"]), "not measured on a clean commit"


# ---- documents ---------------------------------------------------------------------------------


def test_documents_are_short():
    assert lines_of([README]) <= 170 and len(README.read_text(encoding="utf-8").split()) <= 1800
    assert lines_of(WRITTEN[1:]) <= 1120


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_documents_name_only_files_that_exist(path):
    text = path.read_text(encoding="utf-8")
    names = set(re.findall(r"`([\w./-]+(?:\.(?:py|slurm|txt|sh|toml)|/))`", text))
    names |= set(re.findall(r"(?:python|bash|sbatch) ([\w/]+\.(?:py|sh|slurm))", text))
    assert {name for name in names if not (ROOT / name).exists()} <= {".mutants/"}
    assert "../shared" not in text


def test_every_module_has_its_place_in_a_document():
    text = "".join(path.read_text(encoding="utf-8") for path in (README, ROOT / "docs/code.md"))
    parts = {f"{name}/" if name in BELOW else f"{name}.py" for name in map(folder, MODULES)}
    assert {part for part in parts - {"vllm_sim.py"} if part not in text} == set()


def anchors(path):
    """Of the headings of a document, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    for link in {link for link in links if not link.startswith("https://")}:
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_difference_is_told():
    told = anchors(ROOT / "docs" / "differences.md")
    for path in [*FILES, *(ROOT / "results").glob("*.json")]:
        numbers = set(re.findall(r"\"(D\d+)\"?: ", path.read_text(encoding="ascii")))
        assert {number.lower() for number in numbers} <= told, path


def test_the_readmes_map_names_functions_that_exist():
    section = README.read_text(encoding="utf-8").split("## From the paper to the code")[1]
    names = re.findall(r"`([a-z_]+(?:\.\w+)+)`", section.split("\n## ")[0])
    names = [name for name in names if not name.endswith(".py")]
    assert len(names) > 12
    if not importlib.util.find_spec("transformers"):
        names = [name for name in names if not name.startswith("vllm_sim.engine")]
    for dotted in names:
        name = max((name for name in MODULES if f"{dotted}.".startswith(f"{name}.")), key=len)
        found = importlib.import_module(name)
        for attribute in dotted.removeprefix(name).split(".")[1:]:
            found = getattr(found, attribute)


@pytest.mark.parametrize("path", [README, ROOT / "docs" / "code.md"], ids=lambda path: path.name)
def test_examples_print_what_stands_below_them(path, run_script):
    """From outside the repository too, if Python finds its modules."""
    text = path.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    env = {"PYTHONPATH": ROOT, "PYTHONWARNINGS": "error"}
    done = run_script("-c", code, cwd="/", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    shown = re.findall(r"```\n\n```\n(.*?)```", text, re.DOTALL)[:1] if path == README else []
    shown = shown or re.findall(r"^# (\([\d, ]+\) \d+)", code, re.MULTILINE)
    assert done.stdout.strip() == shown[0].strip()
    assert path != README or len([line for line in code.splitlines() if line]) <= 10
