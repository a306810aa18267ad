"""The sdist builds a wheel, and that one wheel loads beside several torches and Pythons. By hand, it downloads them:

MACHMOE_WHEEL_ENVIRONMENTS="python3.11 torch==2.11.*;python3.12 torch" ./dev python -m pytest tests/packaging
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = os.environ.get("MACHMOE_WHEEL_ENVIRONMENTS", "python3 torch==2.11.*;python3 torch").split(";")
USE = """
import torch, machmoe
moe = machmoe.MoE(16, 8, 4, 2)
moe(torch.randn(32, 16)).sum().backward()
assert all(p.grad.isfinite().all() for p in moe.parameters())
print(torch.__version__, machmoe.build_info(), machmoe.__file__)
"""


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("dist")
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=ROOT)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


@pytest.fixture(scope="session")
def wheel(source):
    """Built from the sdist; without CUDA, which changes nothing in how it is packed."""
    folder = source.parent
    options = ("--no-build-isolation", "--no-deps", "--config-settings=cmake.define.MACHMOE_CUDA=OFF")
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", folder, source, cwd=folder)
    return next(folder.glob("*.whl"))


def test_the_tag_fits_every_python_3(wheel):
    assert wheel.name == "machmoe-0.1.0-py3-none-linux_x86_64.whl"


def test_the_build_leaves_the_sources_alone(source, wheel):
    assert not list((source / "python").rglob("*.so*"))


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_wheel_loads(wheel, environment, tmp_path):
    interpreter, requirement = environment.split()
    run(interpreter, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", "-q", requirement, "numpy", wheel)
    out = run(python, "-c", USE, cwd=tmp_path)
    assert str(tmp_path / "venv") in out
    assert "machmoe" in run(python, "-m", "machmoe", "info", cwd=tmp_path)
    print(out)
