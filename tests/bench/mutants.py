"""Mutants of the code that decides what goes: how many of them the tests notice.

    pip install cosmic-ray
    python tests/bench/mutants.py --count 300 -o mutants.jsonl     # goes on where it was stopped
    python tests/bench/mutants.py --show mutants.jsonl             # the table, and the survivors as patches

Mutations are those of cosmic-ray: operators, comparisons, numbers, booleans, exceptions, loops, keywords. A sample of
them is drawn by seed over all functions of algorithms/, structure/ and graph/, one mutant per line of code; those that
change annotations only are left out. Each runs against the test files of its module, quick ones first, up to the first
failure.
"""

from __future__ import annotations

import argparse
import ast
import collections
import difflib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 400
"""Of processor time that the tests of one mutant may take: it loops otherwise."""

WEIGHTS = "weights_operators weights_layouts weights_parts weights_nesting weights_loops weights_types weights_refused"
FILES = "model_files bad_files sparse patching saving masks fuzz"
NETS = "structure_rules_matrices structure_rules_images structure_rules_control structure_quantised structure_contrib"
RULES = "structure_rules_table structure_rules_bugs channels compact structure_tools"

TESTS: dict[str, str] = {
    "algorithms/select": "select pruner",
    "algorithms/cuts": "cuts patching pruner",
    "algorithms/patterns": "patterns pruner config",
    "algorithms/allocate": "allocate pruner search channels",
    "algorithms/schedules": "schedules pruner",
    "algorithms/scores": "scores pruner channels",
    "algorithms/pruner": "pruner allocate cuts api config",
    "algorithms/grouped": "grouped lowering",
    "algorithms/sparsegpt": "sparsegpt",
    "algorithms/reconstruct": "reconstruct sparsegpt",
    "graph/masks": "masks pruner fuzz",
    "graph/wire": "wire patching",
    "graph/assemble": "patching saving model_files",
    "graph/saving": "saving patching model_files killed sparse",
    "graph/stored": "patching saving model_files",
    "graph/values": "cuts patching inspection",
    "graph/sparse": "sparse model_files bad_files",
    "graph/files": "saving masks model_files killed",
    "graph/macs": "inspection",
    "graph/inputs": "calibrate sparsegpt reconstruct",
    "graph/companions": "calibrate reconstruct",
    "graph/shapes": "inspection calibrate",
    "graph/expression": f"expression {WEIGHTS}",
    "graph/roles": f"{WEIGHTS} patterns",
    "graph/loops": f"weights_loops {WEIGHTS}",
    "graph/trace": f"{WEIGHTS} fuzz function_constants",
    "graph/scope": f"weights_nesting {WEIGHTS} function_constants",
    "graph/weights": f"{WEIGHTS} match pruner masks fuzz",
    "graph/schemas": "fuzz",
    "graph": f"{FILES} bad_input function_constants {WEIGHTS}",
    "structure/labels": f"labels {NETS} {RULES}",
    "structure/verify": f"structure_tools channels compact {NETS}",
    "structure/compact": f"compact lowering {NETS}",
    "structure/channels": f"channels {NETS}",
    "structure/rules/recurrent": f"structure_rules_matrices {NETS} {RULES}",
    "structure/rules/quantised": f"structure_quantised structure_tools {RULES}",
    "structure/rules/contrib": f"structure_contrib structure_tools {RULES}",
    "structure/rules/contrib_attention": f"structure_contrib structure_tools {RULES}",
    "structure/rules/contrib_shapes": f"structure_contrib structure_tools {RULES}",
    "structure/control": f"structure_rules_control fuzz {NETS} {RULES}",
    "structure/facts": f"structure_rules_control {NETS} {RULES} fuzz",
    "structure": f"{NETS} {RULES} labels fuzz",
}
"""Module, or the folder of the others -> its test files, quick ones first."""


def tests(module: str) -> list[str]:
    """The test files of a module, each once."""
    key = module
    while key not in TESTS:
        key = key.rpartition("/")[0]
    return [f"tests/test_{name}.py" for name in dict.fromkeys(TESTS[key].split())]


def bare(code: str) -> str:
    """Code without annotations, docstrings and line numbers: what runs."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def mutants(module: str) -> Iterator[tuple[str, int, int]]:
    """Every mutation of a module: operator, occurrence, line."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast_from_path

    tree = get_ast_from_path(ROOT / "onnxprune" / f"{module}.py")
    for name in plugins.operator_names():
        operator = plugins.get_operator(name)
        if operator.arguments():
            continue
        made = operator()
        positions = [start for node in ast_nodes(tree) for start, _ in made.mutation_positions(node)]
        for occurrence, (line, _) in enumerate(positions):
            yield name, occurrence, line


def mutated(module: str, name: str, occurrence: int) -> tuple[str, str]:
    """The module's code, and with a mutation."""
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    code = (ROOT / "onnxprune" / f"{module}.py").read_text()
    changed = mutate_code(code, plugins.get_operator(name)(), occurrence)
    return code, code if changed is None else changed


def sample(count: int, seed: int) -> list[tuple[str, str, int]]:
    """Mutants drawn evenly over the lines that have any: module, operator, occurrence."""
    lines: dict[tuple[str, int], list[tuple[str, str, int]]] = {}
    for folder in ("algorithms", "structure", "graph"):
        for path in sorted((ROOT / "onnxprune" / folder).rglob("*.py")):
            module = path.relative_to(ROOT / "onnxprune").with_suffix("").as_posix()
            if path.name != "__init__.py":
                for name, occurrence, line in mutants(module):
                    lines.setdefault((module, line), []).append((module, name, occurrence))
    rng = random.Random(seed)
    places = sorted(lines)
    rng.shuffle(places)
    drawn: list[tuple[str, str, int]] = []
    for place in places:
        module, name, occurrence = rng.choice(lines[place])
        code, changed = mutated(module, name, occurrence)
        try:
            same = bare(code) == bare(changed)
        except SyntaxError:
            continue
        if not same:
            drawn.append((module, name, occurrence))
        if len(drawn) == count:
            break
    return drawn


def run(folder: Path, files: list[str]) -> tuple[str, str]:
    """Run test files in a child of this process, which has the heavy libraries loaded: what came of it, and where."""
    said = folder / "said"
    child = os.fork()
    if not child:
        os.setsid()
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        sys.path[:0] = [str(folder), str(folder / "tests")]
        with open(said, "w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            import pytest

            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line", *files])
            sys.stdout.flush()
        os._exit(int(status))
    end = time.monotonic() + 4 * SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            lines = said.read_text(errors="replace").splitlines()
            where = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), "")
            return ("survived" if status == 0 else "killed"), where[:200]
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "killed", "it did not end"


def try_all(count: int, seed: int, target: Path) -> None:
    """Try every mutant of a sample that the file does not tell of yet."""
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401
    import pytest  # noqa: F401

    told = [json.loads(line) for line in target.read_text().splitlines()] if target.exists() else []
    known = {tuple(line["mutant"]) for line in told if "mutant" in line}
    passed = {line["passed"] for line in told if "passed" in line}
    drawn = sample(count, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("onnxprune", "converters", "tests", "models"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"))
        for file in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / file, folder / file)
        (folder / "onnxprune" / "converters").symlink_to(folder / "converters")
        for index, mutant in enumerate(drawn):
            if mutant in known:
                continue
            module, operator, occurrence = mutant
            for file in [file for file in tests(module) if file not in passed]:
                outcome, where = run(folder, [file])
                if outcome != "survived":
                    raise SystemExit(f"{file} fails without a mutation, too: {where}")
                passed.add(file)
                with target.open("a") as out:
                    out.write(json.dumps({"passed": file}) + "\n")
            code, changed = mutated(module, operator, occurrence)
            path = folder / "onnxprune" / f"{module}.py"
            path.write_text(changed)
            began = time.monotonic()
            outcome, where = run(folder, tests(module))
            path.write_text(code)
            patch = "".join(difflib.unified_diff(code.splitlines(True), changed.splitlines(True), n=1))
            line = {"mutant": mutant, "outcome": outcome, "where": where, "patch": patch}
            with target.open("a") as out:
                out.write(json.dumps({**line, "seconds": round(time.monotonic() - began, 1)}) + "\n")
            print(f"{index + 1}/{len(drawn)} {outcome} {module} {operator} {where}", flush=True)


def show(target: Path) -> None:
    """The table by folder, and every survivor."""
    told = [line for line in map(json.loads, target.read_text().splitlines()) if "mutant" in line]
    counts = collections.Counter((entry["mutant"][0].split("/")[0], entry["outcome"]) for entry in told)
    print("| folder | mutants | killed | |\n|---|---|---|---|")
    for folder in sorted({folder for folder, _ in counts}):
        killed, all_ = counts[folder, "killed"], counts[folder, "killed"] + counts[folder, "survived"]
        print(f"| {folder}/ | {all_} | {killed} | {killed / all_:.0%} |")
    for entry in told:
        if entry["outcome"] == "survived":
            print(f"\n{entry['mutant']}\n{entry['patch']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--show", type=Path)
    arguments = parser.parse_args()
    if arguments.show:
        show(arguments.show)
    else:
        try_all(arguments.count, arguments.seed, arguments.output)


if __name__ == "__main__":
    main()
