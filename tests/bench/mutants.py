"""Mutants of the code that decides what goes: how many of them the tests notice.

    pip install cosmic-ray coverage
    python tests/bench/mutants.py --count 300 -o mutants.jsonl     # goes on where it was stopped
    python tests/bench/mutants.py --show mutants.jsonl             # the table, and the survivors as patches

Mutations are those of cosmic-ray: operators, comparisons, numbers, booleans, exceptions, loops, keywords. A sample of
them is drawn by seed over all functions of algorithms/, structure/ and graph/, one mutant per line of code; those that
change annotations only, or whether a dataclass is frozen and zip minds lengths, are left out. The tests run once under
coverage; each mutant then runs against those that pass its line, quick ones first, up to the first failure.
"""

from __future__ import annotations

import argparse
import ast
import collections
import difflib
import itertools
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
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS = 200
"""Of processor time that the tests of one mutant may take: it loops otherwise."""

BUDGET = 60
"""Seconds of tests for one mutant, the quickest first."""

ELSEWHERE = {f"graph/{module}": ["tests/test_killed.py"] for module in ("assemble", "files", "saving")}
"""Tests that run a module in other processes, which coverage does not see."""

LEFT_OUT = ("keras", "tf1", "torch", "packaging", "killed", "determinism", "flat_memory", "models", "real_models")
"""Test files, by what their names begin with, that need a framework or run other processes."""


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
        if isinstance(node, ast.ClassDef):
            node.decorator_list = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip":
            node.keywords = []
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


class Told:
    """Says to coverage which test runs, in all its threads, and notes how long each takes."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = collections.defaultdict(float)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration

    def pytest_runtest_logfinish(self) -> None:
        self.coverage.switch_context("")


def passing(folder: Path, target: Path) -> tuple[Any, dict[str, float]]:
    """Coverage by test, and the seconds that each takes; of one run of all tests, kept beside the results."""
    from coverage import Coverage, CoverageData

    data, times = target.with_suffix(".coverage").absolute(), target.with_suffix(".times").absolute()
    if not times.exists() and not (child := os.fork()):
        import pytest

        data.unlink(missing_ok=True)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{folder / 'tests'}"
        sys.path[:0] = [str(folder), str(folder / "tests")]
        coverage = Coverage(data_file=data, source_pkgs=["onnxprune"], config_file=False)
        told = Told(coverage)
        left_out = tuple(f"test_{name}" for name in LEFT_OUT)
        files = [f"tests/{path.name}" for path in sorted(Path("tests").glob("test_*.py"))]
        coverage.start()
        status = pytest.main(
            ["-q", "-p", "no:cacheprovider", *(file for file in files if not file[6:].startswith(left_out))],
            plugins=[told],
        )
        coverage.stop()
        coverage.save()
        if not status:
            times.write_text(json.dumps(told.seconds))
        sys.stdout.flush()
        os._exit(int(status))
    if not times.exists() and os.waitpid(child, 0)[1]:
        raise SystemExit("tests fail without a mutation, too")
    found = CoverageData(str(data))
    found.read()
    return found, json.loads(times.read_text())


def tests(coverage: Any, seconds: dict[str, float], module: str, code: str, changed: str) -> list[str]:
    """The tests that pass the lines of a change, the quickest first, up to the budget."""
    edits = difflib.SequenceMatcher(None, code.splitlines(), changed.splitlines(), autojunk=False).get_opcodes()
    lines = {line for kind, i, j, _, _ in edits if kind != "equal" for line in range(i + 1, max(j, i + 1) + 1)}
    wanted = set(lines)
    for node in ast.walk(ast.parse(code)):  # of a statement on several lines, any of them
        if isinstance(node, (ast.stmt, ast.ExceptHandler)) and node.end_lineno is not None:
            body = getattr(node, "body", None)
            start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            end = body[0].lineno - 1 if isinstance(body, list) and body else node.end_lineno
            if any(start <= line <= end for line in lines):  # all of a function whose head it is: that runs at import
                wanted.update(range(start, (node.end_lineno if isinstance(node, ast.FunctionDef) else end) + 1))
    file = next((f for f in coverage.measured_files() if f.endswith(f"/onnxprune/{module}.py")), "")
    contexts = coverage.contexts_by_lineno(file) if file else {}
    every = [context for found in contexts.values() for context in found]
    found = {context for line in wanted for context in contexts.get(line, ())} - {""} or set(every)  # when imported
    order = sorted(found & seconds.keys(), key=lambda name: (seconds[name], name))
    ends = itertools.accumulate((seconds[name] for name in order), initial=0.0)
    return [name for name, before in zip(order, ends, strict=False) if before < BUDGET] + ELSEWHERE.get(module, [])


def try_all(count: int, seed: int, target: Path) -> None:
    """Try every mutant of a sample that the file does not tell of yet."""
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401
    import pytest  # noqa: F401

    told = [json.loads(line) for line in target.read_text().splitlines()] if target.exists() else []
    known = {tuple(line["mutant"]) for line in told}
    drawn = sample(count, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("onnxprune", "converters", "tests", "models"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"))
        for file in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / file, folder / file)
        (folder / "onnxprune" / "converters").symlink_to(folder / "converters")
        coverage, seconds = passing(folder, target)
        for index, mutant in enumerate(drawn):
            if mutant in known:
                continue
            module, operator, occurrence = mutant
            code, changed = mutated(module, operator, occurrence)
            path = folder / "onnxprune" / f"{module}.py"
            path.write_text(changed)
            began = time.monotonic()
            chosen = tests(coverage, seconds, module, code, changed)
            outcome, where = run(folder, chosen) if chosen else ("survived", "no test passes it")
            path.write_text(code)
            patch = "".join(difflib.unified_diff(code.splitlines(True), changed.splitlines(True), n=1))
            line = {"mutant": mutant, "outcome": outcome, "where": where, "tests": len(chosen), "patch": patch}
            with target.open("a") as out:
                out.write(json.dumps({**line, "seconds": round(time.monotonic() - began, 1)}) + "\n")
            print(f"{index + 1}/{len(drawn)} {outcome} {module} {operator} {where}", flush=True)


def show(target: Path) -> None:
    """The table by folder, and every survivor."""
    told = [json.loads(line) for line in target.read_text().splitlines()]
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
