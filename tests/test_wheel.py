"""Test the package as it is installed: a wheel in an environment without a checkout.

Run `make test-wheel`. The wheel is built from the source distribution, so both are complete. The
libraries are those of the interpreter that runs the tests, by a path file; the package itself is
the wheel's, which is checked first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from moe_shard import __version__
from moe_shard.cli import COMMANDS
from tests.library.expected import check
from tests.test_train import TINY

pytestmark = pytest.mark.wheel
ROOT = Path(__file__).resolve().parents[1]
BUILT_OF = (
    "moe_shard",
    "configs",
    "tests",
    "tools",
    "benchmarks",
    "docs",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def run(command: list[str] | str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command outside the checkout; a string runs in a shell, as a person pastes it."""
    kept = {name: value for name, value in os.environ.items() if name not in REMOVED}
    return subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=cwd,
        env={**kept, "JAX_PLATFORMS": "cpu", **more},
        capture_output=True,
        text=True,
        timeout=300,
    )


REMOVED = {"PYTHONPATH", "XLA_FLAGS", "VIRTUAL_ENV"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    source.mkdir()
    for name in BUILT_OF:  # a copy: building writes into the source folder
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    done = run([sys.executable, "-c", BUILD_SDIST, str(folder)], source)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder)]
    done = run([*command, str(sdist)], folder)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def commands(wheel: Path) -> Path:
    """Return the folder of commands of an environment that has the wheel."""
    made = wheel.parent / "environment"
    done = run([sys.executable, "-m", "venv", "--without-pip", str(made)], wheel.parent)
    assert done.returncode == 0, done.stderr
    python = made / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    done = run([*pip, str(wheel)], wheel.parent)
    assert done.returncode == 0, done.stderr
    site = Path(sysconfig.get_path("purelib", vars={"base": str(made), "platbase": str(made)}))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    told = run([str(python), "-c", "import moe_shard; print(moe_shard.__file__)"], wheel.parent)
    assert told.stdout.strip() == str(site / "moe_shard" / "__init__.py")
    return python.parent


def test_it_holds_every_module_and_configuration_and_nothing_else(wheel: Path) -> None:
    installed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    configs = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
    assert len(configs) > 30
    modules = [
        path for path in (ROOT / "moe_shard").rglob("*") if path.is_file() and path.suffix != ".pyc"
    ]
    wanted = {f"moe_shard/{path.relative_to(ROOT)}" for path in configs}
    wanted |= {str(path.relative_to(ROOT)) for path in modules}
    assert installed == wanted
    assert "moe_shard/py.typed" in installed


def test_the_source_distribution_holds_no_tests(sdist: Path) -> None:
    with tarfile.open(sdist) as packed:
        names = [name.partition("/")[2] for name in packed.getnames()]
    assert "configs/base.yml" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_configurations_are_found_inside_the_package(commands: Path, tmp_path: Path) -> None:
    code = "import moe_shard, moe_shard.config as c; print(moe_shard.__path__[0], c.configs_dir())"
    done = run([str(commands / "python"), "-c", code], tmp_path)
    package, configs = done.stdout.split()
    assert Path(configs) == Path(package) / "configs", done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(commands: Path, tmp_path: Path, name: str) -> None:
    done = run([str(commands / "moe-shard"), name, "--help"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: moe-shard {name} ")


def test_the_version(commands: Path, tmp_path: Path) -> None:
    for start in (["moe-shard"], ["python", "-m", "moe_shard"]):
        done = run([str(commands / start[0]), *start[1:], "--version"], tmp_path)
        assert done.stdout == f"moe-shard {__version__}\n"


def test_what_a_run_prints_can_be_pasted(commands: Path, tmp_path: Path) -> None:
    moe_shard = str(commands / "moe-shard")
    train = [moe_shard, "train", "mixtral-tiny", *TINY, "steps=0", "dump_hlo=true"]
    watch = [moe_shard, "watch", "--expect", "expert-parallel", "--"]
    done = run([*watch, *train], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "watch: 1 program shown" in done.stderr
    assert "verdict: expert-parallel" in done.stdout
    printed = done.stdout.partition("the same step with the flag off:\n")[2].splitlines()
    pasted = [line for line in printed if line.startswith("  ")]
    assert len(pasted) == 2
    results = [run(line, tmp_path) for line in pasted]
    assert [each.returncode for each in results] == [0, 0], results
    assert "verdict: weight-gathered" in results[1].stdout
    runs = sorted((tmp_path / "outputs").iterdir())
    done = run([moe_shard, "diff", *map(str, runs), "--json"], tmp_path)
    assert json.loads(done.stdout)["same"] is False
    done = run([moe_shard, "explain", str(runs[0] / "config.yml"), "--json"], tmp_path)
    assert re.search(r'"parameters": \d+', done.stdout)


def test_it_runs_from_a_folder_of_packages(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    assert run([*pip, str(wheel)], tmp_path).returncode == 0
    command = [sys.executable, "-P", "-m", "moe_shard", "explain", "mixtral-tiny", "--json"]
    done = run(command, tmp_path, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["totals"]["parameters"] == 3_429_504


LIBRARY = ROOT / "tests" / "library"
EIGHT = "--xla_force_host_platform_device_count=8"
MESHES = {4: "data=2, expert=4", 8: "expert=8"}


@pytest.mark.parametrize("expert", [4, 8])
@pytest.mark.parametrize("explicit", [False, True])
def test_models_of_others(commands: Path, tmp_path: Path, expert: int, explicit: bool) -> None:
    for name in ("placed", "own_model", "linen_model"):
        shutil.copy(LIBRARY / f"{name}.py", tmp_path)
    sizes = MESHES[expert].split(", ")
    command = [str(commands / "python"), "-W", "error", "placed.py", *sizes]
    done = run([*command, *["explicit"] * explicit], tmp_path, XLA_FLAGS=EIGHT)
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout), expert=expert)


@pytest.mark.parametrize("expert", [4, 8])
@pytest.mark.parametrize("explicit", [False, True])
def test_the_readmes_example(commands: Path, tmp_path: Path, expert: int, explicit: bool) -> None:
    text = (LIBRARY / "readme_example.py").read_text()
    call = "ms.make_mesh(data=2, expert=4)"
    assert text.count(call) == 1
    asked = f"ms.make_mesh({MESHES[expert]}, explicit={explicit})"
    places = "print(layer.experts.gate.sharding.spec, layer.router.kernel.sharding.spec)"
    (tmp_path / "example.py").write_text(f"{text.replace(call, asked)}{places}\n")
    done = run([str(commands / "python"), "-W", "error", "example.py"], tmp_path, XLA_FLAGS=EIGHT)
    assert done.returncode == 0, done.stderr
    assert "verdict: expert-parallel" in done.stdout
    assert done.stdout.endswith("P('expert', None, None) P(None, None)\n")


def test_a_test_file_of_others(commands: Path, tmp_path: Path) -> None:
    shutil.copy(LIBRARY / "test_collectives.py", tmp_path)
    command = [str(commands / "python"), "-m", "pytest", "-q", "-W", "error", "test_collectives.py"]
    done = run(command, tmp_path, XLA_FLAGS=EIGHT)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
