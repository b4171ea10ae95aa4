"""What is shipped is what stands in the repository."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import nnx_fit

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_list_of_packages_is_what_stands_on_the_disk() -> None:
    inits = (ROOT / "nnx_fit").rglob("__init__.py")
    packages = {".".join(file.parent.relative_to(ROOT).parts) for file in inits}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(packages | {"nnx_fit.conf"})


def test_every_folder_with_python_files_is_a_package() -> None:
    folders = {file.parent for file in (ROOT / "nnx_fit").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.slow
def test_wheel_holds_every_module_and_every_config(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("nnx_fit", "conf", "pyproject.toml", "README.md", "LICENSE"):  # building writes next to the sources
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    wheel = tmp_path / f"nnx_fit-{nnx_fit.__version__}-py3-none-any.whl"
    shipped = set(zipfile.ZipFile(wheel).namelist())
    modules = {file.relative_to(ROOT).as_posix() for file in (ROOT / "nnx_fit").rglob("*.py")}
    configs = {f"nnx_fit/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "conf").rglob("*.yaml")}
    assert modules <= shipped
    assert configs <= shipped
    assert {"nnx_fit/py.typed", "nnx_fit/conf/__init__.py"} <= shipped
    assert not [name for name in shipped if name.startswith(("conf/", "tests/"))]
