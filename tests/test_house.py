"""The rules of the house: who may import whom, and that the README speaks of what is there."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = {
    "sequence",
    "allocators",
    "kv_cache_manager",
    "attention",
    "paged_attention",
    "paged_attention_triton",
}
TENSORS = ("attention", "paged_attention", "paged_attention_triton")
COMMANDS = {"main", "reproduce", "capacity", "sweep", "report"}
FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "vllm_sim").rglob("*.py")])
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}
# Starts at once and runs where there is no torch.
BOOKKEEPING = sorted(
    name
    for name in MODULES
    if name in CORE - set(TENSORS)
    or name.startswith(
        ("vllm_sim.serving", "vllm_sim.workload", "vllm_sim.models", "vllm_sim.paper")
        + ("vllm_sim.evaluation", "vllm_sim.sizing", "vllm_sim.reporting")
    )
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def imports(path):
    """Names of the modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="ascii"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("name", BOOKKEEPING)
def test_bookkeeping_names_no_torch_and_no_tensor_module(name):
    assert not imports(MODULES[name]) & {"torch", "triton", *TENSORS}


def test_bookkeeping_starts_without_torch():
    code = f"import sys; import {', '.join(BOOKKEEPING)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_the_scripts_start_without_triton():
    """It comes with torch on a GPU machine, and is in no requirements of a run."""
    code = "import sys; sys.modules['triton'] = None; import main, paged_attention as p"
    code += "; print(p.PagedKVCache(2, 2, 1, 4).fused)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("name", TENSORS)
def test_cache_and_kernels_know_no_manager(name):
    assert imports(MODULES[name]) & set(MODULES) <= set(TENSORS)


@pytest.mark.parametrize("name", sorted(CORE))
def test_the_core_imports_nothing_of_ours_but_itself(name):
    assert imports(MODULES[name]) & set(MODULES) <= CORE


@pytest.mark.parametrize("name", sorted(set(MODULES) - COMMANDS))
def test_nothing_imports_a_command(name):
    assert not imports(MODULES[name]) & COMMANDS


def test_imports_point_one_way():
    """No cycle among the root modules (type-checking imports aside)."""
    graph = {}
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="ascii"))
        tree.body = [node for node in tree.body if not _type_checking(node)]
        graph[name] = {
            module for node in ast.walk(tree) for module in _modules(node) if module in MODULES
        }
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert ready, f"a cycle among {sorted(set(graph) - done)}"
        done |= ready


def _type_checking(node):
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def _modules(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]


@pytest.mark.parametrize("path", [p for p in FILES if p.read_text()], ids=lambda path: path.name)
def test_every_module_opens_with_what_it_is(path):
    text = path.read_text(encoding="ascii")  # raises for anything but ASCII
    assert len(ast.get_docstring(ast.parse(text)) or "") > 80
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_only_files_that_exist(path):
    text = path.read_text(encoding="utf-8")
    names = set(re.findall(r"`([\w./-]+\.(?:py|slurm|txt|json|sh))`", text))
    missing = {name for name in names if not (ROOT / name).exists()} - {"config.json"}  # a model's
    assert names and not missing


def test_every_module_has_its_place_in_a_document():
    code = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    assert {name for name in MODULES if f"`{name}.py`" not in code} == set()


def anchors(path):
    """Of the headings of a document, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    for link in {link for link in links if not link.startswith("https://")}:
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_difference_is_told():
    told = anchors(ROOT / "docs" / "differences.md")
    for path in [*MODULES.values(), *(ROOT / "results").glob("*.json")]:
        numbers = set(re.findall(r"\"(D\d+): ", path.read_text(encoding="ascii")))
        assert {number.lower() for number in numbers} <= told, path


def test_readme_map_names_functions_that_exist():
    section = README.split("## From the paper to the code")[1].split("\n## ")[0]
    names = [n for n in re.findall(r"`([a-z_]+(?:\.\w+)+)`", section) if not n.endswith(".py")]
    assert len(names) > 15
    for dotted in names:
        module, *attributes = dotted.split(".")
        found = __import__(module)
        for attribute in attributes:
            found = getattr(found, attribute)


def test_example_runs():
    text = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_the_readmes_ten_lines_print_what_stands_below_them():
    """From outside the repository too, if Python finds its modules."""
    section = README.split("### In your own code")[1].split("\n##")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (output,) = re.findall(r"```\n\n```\n(.*?)```", section, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    assert "from serving import simulate" in code
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd="/",
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, output, "")


def test_readme_tables_come_from_the_committed_results():
    done = subprocess.run([sys.executable, "tools/update_readme.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run tools/update_readme.py"


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda p: p.name)
def test_results_say_where_they_come_from(path):
    result = json.loads(path.read_text(encoding="ascii"))
    assert set(result) == {"command", "commit", "device", "versions", "output", "printed"}
    assert re.fullmatch(r"[0-9a-f]{40}", result["commit"]), "not measured on a clean commit"


def test_no_published_number_is_repeated_outside_paper():
    """A few that would be easy to write down again, as text: Fig. 2, 13 and 15's values."""
    for name, path in MODULES.items():
        if name.startswith("vllm_sim.paper") or name.endswith("length_tables"):
            continue
        numbers = {
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="ascii")))
            if isinstance(node, ast.Constant) and isinstance(node.value, float)
        }
        told = {20.4, 26.8, 38.2, 96.3, 57.3, 41.6, 36.6, 9.81, 13.62, 30.42, 6.09, 8.53, 9.79}
        assert not numbers & told, name
