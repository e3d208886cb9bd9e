"""Builds the op libraries with CMake and says why when it cannot. All else about the package is in pyproject.toml.

Environment: TOKENOPS_BUILD = auto | none | cpu | cuda, TOKENOPS_SANITIZE = 1, TOKENOPS_EMULATED = 1, MAX_JOBS, CXX, CUDA_HOME,
TORCH_CUDA_ARCH_LIST, TORCH_DIR.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

# without build isolation nobody checks what pyproject.toml asks for, and the errors of an old one are riddles
if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(f"tokenops: building needs setuptools >= 77, got {setuptools.__version__} (pip install --upgrade setuptools)")

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_torch() -> Path | None:
    """The directory of the torch package, found without importing it."""
    if "TORCH_DIR" in os.environ:
        return Path(os.environ["TORCH_DIR"]).resolve()
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).resolve().parent if spec and spec.origin else None


def find_compiler() -> str | None:
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin")) if home else os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))


def wants_cuda(request: str, torch: Path) -> bool:
    """``auto`` builds for CUDA only beside a CUDA torch: an nvcc on the PATH is no reason. Nor is that torch alone, which pip installs on
    machines without a GPU, too."""
    has_kernels = any(ROOT.glob("csrc/cuda/*.cu"))
    if request == "cuda" and not has_kernels:
        sys.exit("tokenops: TOKENOPS_BUILD=cuda, but csrc/cuda holds no kernels")
    wanted = request == "cuda" or (request == "auto" and runpy.run_path(str(torch / "version.py")).get("cuda") is not None)
    if not has_kernels or not wanted:
        return False
    missing = None if find_nvcc() else "nvcc (CUDA_HOME, the PATH or /usr/local/cuda)"
    if missing and request == "cuda":
        sys.exit(f"tokenops: TOKENOPS_BUILD=cuda needs {missing}")
    if missing:
        print(f"tokenops: builds no CUDA library (Triton still works on a GPU). Missing: {missing}", file=sys.stderr)
    return not missing


def cuda_settings() -> dict[str, str]:
    nvcc = find_nvcc()
    assert nvcc
    # sm_100 came with CUDA 12.8. The PTX is for GPUs that are newer than the compiler
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    newest = "100-real;100-virtual" if "compute_100" in known else "90-virtual"
    settings = {"CMAKE_CUDA_COMPILER": nvcc, "CMAKE_CUDA_ARCHITECTURES": f"80-real;90a-real;{newest}"}
    if "TORCH_CUDA_ARCH_LIST" in os.environ:
        # "8.0 9.0a+PTX" -> 80-real;90a-real;90a-virtual
        archs = []
        for name in os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ").replace(".", "").split():
            archs.append(name.removesuffix("+PTX") + "-real")
            if name.endswith("+PTX"):
                archs.append(name.removesuffix("+PTX") + "-virtual")
        settings["CMAKE_CUDA_ARCHITECTURES"] = ";".join(archs)
    return settings


def choose_libraries() -> list[str]:
    """Which op libraries this build makes. ``auto`` leaves out what cannot be built, and says so; an explicit request fails instead."""
    request = os.environ.get("TOKENOPS_BUILD", "auto")
    if request not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"tokenops: TOKENOPS_BUILD must be auto, none, cpu or cuda, got {request!r}")
    if request == "none":
        return []
    torch = find_torch()
    missing = [
        reason
        for reason, found in (
            ("torch >= 2.10 in this environment (pip hides it: use --no-build-isolation, or set TORCH_DIR)", torch),
            ("a C++20 compiler (c++, g++ or clang++ on the PATH, or CXX)", find_compiler()),
            ("cmake on the PATH (pip install cmake)", shutil.which("cmake")),
            ("ninja on the PATH (pip install ninja)", shutil.which("ninja")),
        )
        if not found
    ]
    if missing and request == "auto":
        print(f"tokenops: builds no op library (reference and Triton still work). Missing: {'; '.join(missing)}", file=sys.stderr)
        return []
    if missing:
        sys.exit(f"tokenops: TOKENOPS_BUILD={request} needs {'; '.join(missing)}")
    # for tests: it must not travel in a wheel, and nobody but a developer sets this
    emulated = ["_C_emulated"] * (os.environ.get("TOKENOPS_EMULATED") == "1")
    return ["_C_cpu", *["_C_cuda"] * wants_cuda(request, torch), *emulated]


class BuildEverything(build):
    """``build`` from an empty folder: what an earlier build left there must not travel in this wheel."""

    # build_ext runs even when no library is to be built, so that it can remove a stale one
    sub_commands = (("build_py", None), ("build_ext", None))

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildOpLibraries(build_ext):
    """Configures, builds and installs with CMake; keeps its own build tree, so a second build has nothing to do."""

    def run(self) -> None:
        package = ROOT / "tokenops" if self.inplace else Path(self.build_lib).resolve() / "tokenops"
        libraries = [extension.name.split(".")[-1] for extension in self.extensions]
        for file in package.glob("_C_*"):
            if file.stem not in libraries:
                file.unlink()
        if libraries:
            self.build_with_cmake(libraries, package)

    def build_with_cmake(self, libraries: list[str], package: Path) -> None:
        sanitize = os.environ.get("TOKENOPS_SANITIZE", "0") == "1"
        tree = ROOT / "build" / ("sanitize" if sanitize else "release")
        # every tool by its full path: the one that an isolated build left in the cache is gone by the next build
        settings = {
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "CMAKE_CXX_COMPILER": find_compiler(),
            "TORCH_DIR": find_torch(),
            "TOKENOPS_CUDA": "ON" if "_C_cuda" in libraries else "OFF",
            "TOKENOPS_EMULATED": "ON" if "_C_emulated" in libraries else "OFF",
            "TOKENOPS_SANITIZE": "ON" if sanitize else "OFF",
            **(cuda_settings() if "_C_cuda" in libraries else {}),
        }
        configure = ["cmake", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", *(f"-D{name}={value}" for name, value in settings.items())]
        compile_ = ["cmake", "--build", str(tree)]
        if "MAX_JOBS" in os.environ:
            compile_ += ["--parallel", os.environ["MAX_JOBS"]]
        for command in (configure, compile_, ["cmake", "--install", str(tree), "--prefix", str(package)]):
            if subprocess.run(command, check=False).returncode != 0:
                sys.exit(f"tokenops: {' '.join(command)} failed (above). TOKENOPS_BUILD=none installs without the op libraries.")

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_output_mapping(self) -> dict[str, str]:
        # an editable install has them in the source folder already
        return {}


class TagWheel(bdist_wheel):
    """The libraries hold no Python symbol: one wheel serves every Python 3 of its platform."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform


setup(
    # benchmarks/ lives at the top and is installed inside the package
    packages=["tokenops.benchmarks", *find_packages(include=["tokenops", "tokenops.*"])],
    package_dir={"tokenops.benchmarks": "benchmarks"},
    ext_modules=[Extension(f"tokenops.{library}", sources=[]) for library in choose_libraries()],
    cmdclass={"build": BuildEverything, "build_ext": BuildOpLibraries, "bdist_wheel": TagWheel},
)
