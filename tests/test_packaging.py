"""What is built from the sources is what a user gets: one package, typed, with its licence, that runs."""

from __future__ import annotations

import email
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BUILD = """
import sys
from setuptools import build_meta
where = sys.argv[1]  # setuptools puts its own arguments there
print(build_meta.build_wheel(where), build_meta.build_sdist(where), sep="\\n")
"""

CORE = {
    "onnx", "onnx-ir", "onnxruntime", "numpy", "ml-dtypes", "joblib", "typer", "rich", "pydantic", "pyyaml",
    "tomli",
}  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source distribution, built from a copy of what the repository holds."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    base = tmp_path_factory.mktemp("built")
    source = base / "source"
    ignored = shutil.ignore_patterns("__pycache__", ".git", "*.egg-info", "build", "dist", ".*_cache")
    shutil.copytree(ROOT, source, ignore=ignored)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD, base], cwd=source, capture_output=True, text=True, check=False
    )
    if "setuptools" in done.stderr and "license" in done.stderr:
        pytest.skip("setuptools is older than pyproject.toml asks for")
    assert done.returncode == 0, done.stderr[-2000:]
    wheel, archive = done.stdout.splitlines()[-2:]
    return base / wheel, base / archive


def modules() -> set[str]:
    """What the package consists of, as a wheel names it."""
    own = {f"onnxprune/{p.relative_to(ROOT / 'onnxprune').as_posix()}" for p in (ROOT / "onnxprune").rglob("*.py")}
    bridges = (ROOT / "converters").rglob("*.py")
    return own | {f"onnxprune/converters/{p.relative_to(ROOT / 'converters').as_posix()}" for p in bridges}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
        metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
        entry_points = wheel.read(f"{info}/entry_points.txt").decode()
        licence = wheel.read(f"{info}/licenses/LICENSE")
    assert {name.split("/")[0] for name in names} == {"onnxprune", info}
    package = {name for name in names if name.startswith("onnxprune/")}
    assert package == modules() | {"onnxprune/py.typed", "onnxprune/report/page.css", "onnxprune/report/page.js"}
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "onnxprune = onnxprune.cli:command" in entry_points


@pytest.mark.slow
def test_few_requirements_without_upper_bounds(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        info = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(wheel.read(info))
    required = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    parsed = [re.fullmatch(r"([A-Za-z0-9_.-]+)>=[\d.]+(; python_version < \"3.11\")?", line) for line in required]
    assert all(parsed), required
    assert {match[1].lower().replace("_", "-") for match in parsed if match} == CORE


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(built[1]) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path, **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    tops = {name.split("/", 2)[1] for name in names if "/" in name}
    extra = {"PKG-INFO", "setup.cfg", "onnxprune.egg-info"}
    assert {"onnxprune", "converters", "LICENSE", "README.md", "pyproject.toml"} <= tops
    assert tops <= {"onnxprune", "converters", "LICENSE", "README.md", "pyproject.toml", "tests", *extra}
    (source,) = tmp_path.iterdir()
    (tmp_path / "again").mkdir()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD, tmp_path / "again"], cwd=source, capture_output=True, check=True
    )
    (wheel,) = (tmp_path / "again").glob("*.whl")
    with zipfile.ZipFile(wheel) as again, zipfile.ZipFile(built[0]) as first:
        assert sorted(again.namelist()) == sorted(first.namelist())
        for name in again.namelist():
            if not name.endswith(("RECORD", "METADATA")):
                assert again.read(name) == first.read(name), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 1], ids=["wheel", "source"])
def test_it_installs_and_runs(kind: int, built: tuple[Path, Path], tmp_path: Path) -> None:
    """In an environment of its own, which sees the dependencies of this one and nothing of the checkout."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    roots = [p for p in sys.path if p.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(roots))
    remove = [python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"]  # ours is newer
    subprocess.run(remove, capture_output=True, check=False)
    install = [python, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", built[kind]]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    program = "import onnxprune, onnxprune.converters; print(onnxprune.__file__); print(onnxprune.__version__)"
    told = subprocess.run([python, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[0] == str(site / "onnxprune" / "__init__.py")
    command = [tmp_path / "venv" / "bin" / "onnxprune", "prune", ROOT / "models" / "lenet5.onnx"]
    done = subprocess.run(
        [*command, "-o", "out.onnx", "--sparsity", "0.8", "--no-benchmark"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.onnx").exists()
    names = {p.name.split("-")[0] for p in site.iterdir()}
    assert names - {"pip", "setuptools", "_distutils_hack", "distutils", "pkg_resources", "wheel"} == {
        "onnxprune", "dependencies.pth",
    }  # fmt: skip
