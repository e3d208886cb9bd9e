"""What is shipped: the library's symbols and links, the wheel, the sdist, an install without a compiler, the oldest torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import tokenops

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(tokenops.__file__).parent

# in every place where the package was put: a call through the given backend, held against the reference
SMOKE = """
import sys, torch, tokenops
place, version, backend = sys.argv[1:]
assert tokenops.__file__.startswith(place), tokenops.__file__
assert torch.__version__ == version, torch.__version__
query, key, value = torch.randn(3, 2, 4, 37, 16).unbind()
index = torch.tensor([[0, 5, -1, 36], [7, 1, 2, -1]], dtype=torch.int32)
call = dict(q_index=index, kv_index=torch.arange(0, 37, 2, dtype=torch.int32))
torch.testing.assert_close(
    tokenops.sparse_attention(query, key, value, backend=backend, **call),
    tokenops.sparse_attention(query.double(), key.double(), value.double(), backend="reference", **call).float(),
)
"""


def run(*command: str | Path, **environment: str) -> str:
    """The command's output, both streams. The tools that stand beside the interpreter come first, as they do under make."""
    variables = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **environment}
    result = subprocess.run(list(map(str, command)), cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}"
    return result.stdout


def pip(*arguments: str | Path, **environment: str) -> str:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, **environment)


def smoke(place: Path, backend: str, *, torch_version: str = torch.__version__, path: tuple[Path, ...] = ()) -> None:
    """Import tokenops from ``place``, and from nowhere else, and run it."""
    search = os.pathsep.join(map(str, (place, *path)))
    # a script is found beside itself, never in the checkout that we stand in
    script = place / "smoke.py"
    script.write_text(SMOKE)
    run(sys.executable, script, place, torch_version, backend, PYTHONPATH=search)


# what is built for one test serves the others
pytestmark = pytest.mark.xdist_group("package")


def needs(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not on the PATH: {', '.join(missing)}")


@pytest.fixture(scope="module")
def library() -> Path:
    """The op library of this build."""
    file = PACKAGE / "_C_cpu.so"
    if not file.exists():
        pytest.skip("tokenops was built without its op library (TOKENOPS_BUILD=cpu says what is missing)")
    return file


@pytest.fixture(scope="module")
def record(library: Path) -> dict:
    """What the build wrote down about itself, for `tokenops info`."""
    return json.loads(library.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def undefined(library: Path) -> set[str]:
    """Symbols that the library expects from its surroundings, as the linker spells them."""
    needs("nm")
    return {line.split()[-1].split("@")[0] for line in run("nm", "-D", "--undefined-only", library).splitlines()}


@pytest.fixture(scope="module")
def wheel(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("cmake", "ninja")
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, ".", TOKENOPS_BUILD="cpu")
    (file,) = folder.iterdir()
    return file


# --- the library ---


def test_library_depends_on_libtorch_and_not_on_python(library: Path) -> None:
    needs("readelf")
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", library)))
    # libtorch.so by name: on a CUDA torch it is what brings libtorch_cuda
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    assert not [name for name in needed if "python" in name or "c10" in name]
    assert not re.search(r"\((RPATH|RUNPATH)\)", run("readelf", "-d", library))


def test_library_uses_no_unstable_symbol(undefined: set[str]) -> None:
    assert "aoti_torch_library_init_impl" in undefined
    assert not [name for name in undefined if re.match(r"_ZN?K?(St)?(3c10|2at|5torch)|_?Py", name)]


def test_library_uses_only_what_the_target_torch_has(undefined: set[str], record: dict, tmp_path: Path) -> None:
    """A stand-in for running under torch 2.10: each torch symbol in use must be declared by the headers when they are told that the
    oldest torch is the target's. The headers guard every later one by its version (checked once by hand: the declarations left at 2.10
    are all defined by torch 2.10.0's own libtorch_cpu, but for those that need CUDA).
    """
    needs("c++")
    target = "TORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000ULL"
    major, minor = map(int, record["torch_target"].split("."))
    assert (major, minor) == (2, 10)

    def declared(major: int, minor: int) -> set[str]:
        source = tmp_path / "headers.cpp"
        source.write_text("".join(f"#include <torch/csrc/stable/{name}.h>\n" for name in ("library", "ops", "tensor", "accelerator")))
        include = Path(torch.__file__).parent / "include"
        text = run("c++", "-std=c++20", "-E", "-P", f"-I{include}", "-D" + target.format(major, minor), source)
        return set(re.findall(r"\b(?:aoti_)?torch_\w+(?=\s*\()", text))

    available = declared(major, minor)
    used = {name for name in undefined if re.match(r"(aoti_)?torch_", name)}
    assert used
    assert used <= available, f"newer than torch {major}.{minor}: {sorted(used - available)}"
    # the guards work: this one came with 2.13
    assert "torch_exception_get_what" in declared(2, 13) - available


def test_library_does_not_say_where_it_was_built(library: Path) -> None:
    content = library.read_bytes()
    assert b"csrc/cpu/" in content
    for path in (ROOT, Path(torch.__file__).parent, Path.home()):
        assert str(path).encode() not in content, path


def test_record_describes_this_build(record: dict) -> None:
    assert set(record) == {"compiler", "flags", "isas", "torch", "torch_target"}
    assert record["isas"][0] == "generic"
    # the sanitizers' run of this suite must not test an ordinary library, nor the other way round
    assert ("-fsanitize=address" in record["flags"]) == (os.environ.get("TOKENOPS_SANITIZE") == "1")


def isa_objects(isa: str) -> list[Path]:
    needs("nm", "objdump")
    objects = list((ROOT / "build" / "release" / "CMakeFiles" / f"isa_{isa}.dir").rglob("*.o"))
    if not objects:
        pytest.skip("no build tree here")
    return objects


def test_no_code_of_a_newer_instruction_set_can_serve_an_older_one(record: dict) -> None:
    """The linker keeps one copy of an inline function that several objects define. Were that the AVX-512 copy of a shared one, an AVX2
    machine would stop at an illegal instruction; so in those objects, what may be merged carries the instruction set in its name.
    """
    for isa in record["isas"]:
        for file in isa_objects(isa):
            symbols = (line.split()[-2:] for line in run("nm", "--defined-only", file).splitlines() if line)
            # DW.ref.*: a pointer for exception handling, no code
            merged = [name for kind, name in symbols if kind in "WVu" and not name.startswith("DW.ref.")]
            assert not [name for name in merged if f"{len(isa)}{isa}" not in name], file


def test_baseline_code_needs_no_vector_extension(library: Path) -> None:
    baseline = [*isa_objects("generic"), *(ROOT / "build" / "release" / "CMakeFiles" / "_C_cpu.dir").rglob("*.o")]
    for file in baseline:
        assert not re.search(r"%[yz]mm", run("objdump", "-d", file)), file


# --- the wheel ---


def test_wheel_serves_every_python_of_its_platform(wheel: Path) -> None:
    version = re.escape(tokenops.__version__)
    assert re.fullmatch(rf"tokenops-{version}-py3-none-(linux|manylinux|macosx)\w+\.whl", wheel.name)


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))).decode()
        entry_points = archive.read(next(name for name in archive.namelist() if name.endswith("entry_points.txt"))).decode()
    modules = {f"tokenops/{path.relative_to(ROOT / 'tokenops')}" for path in (ROOT / "tokenops").rglob("*.py")}
    modules |= {f"tokenops/benchmarks/{path.relative_to(ROOT / 'benchmarks')}" for path in (ROOT / "benchmarks").glob("*.py")}
    data = {f"tokenops/benchmarks/data/{path.name}" for path in (ROOT / "benchmarks" / "data").iterdir() if path.is_file()}
    assert data
    assert names == modules | data | {"tokenops/py.typed", "tokenops/_C_cpu.so", "tokenops/_C_cpu.json"}
    assert "tokenops = tokenops.benchmarks.__main__:main" in entry_points
    assert "License-Expression: Apache-2.0" in metadata
    # no upper bound: the stable ABI is what it is for
    assert re.findall(r"Requires-Dist: (torch\b.*)", metadata) == ["torch>=2.10"]


def test_wheel_runs_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    pip("install", "--no-deps", "--target", tmp_path, wheel)
    smoke(tmp_path, "cpu")


def test_install_without_the_op_library(tmp_path: Path) -> None:
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ".", TOKENOPS_BUILD="none")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    place = tmp_path / "place"
    pip("install", "--no-deps", "--target", place, wheel)
    assert not list((place / "tokenops").glob("_C_*"))
    smoke(place, "reference")


def test_sdist_can_be_installed(tmp_path: Path) -> None:
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path)
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources
    assert sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", "tokenops/py.typed"} <= names
    assert not [name for name in names if name.endswith(".so")]
    pip("install", "--no-deps", "--no-build-isolation", "--target", tmp_path / "place", file, TOKENOPS_BUILD="none")
    smoke(tmp_path / "place", "reference")


# --- setup.py on machines that lack something ---


def setup_without_tools(request: str, tmp_path: Path) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PATH": str(tmp_path), "TOKENOPS_BUILD": request}
    variables.pop("CXX", None)
    command = [sys.executable, "setup.py", "--name"]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


def test_auto_installs_without_tools_and_says_what_is_missing(tmp_path: Path) -> None:
    result = setup_without_tools("auto", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["tokenops"]
    for missing in ("compiler", "cmake", "ninja"):
        assert missing in result.stderr


def test_an_explicit_build_fails_without_tools(tmp_path: Path) -> None:
    result = setup_without_tools("cpu", tmp_path)
    assert result.returncode != 0
    assert "TOKENOPS_BUILD=cpu needs a C++20 compiler" in result.stderr


@pytest.mark.parametrize("request_", ["auto", "cuda"])
def test_a_torch_with_cuda_needs_nvcc(request_: str, tmp_path: Path) -> None:
    """On PyPI every torch for Linux has CUDA: there ``auto`` builds what can be built, and an explicit request says what is missing."""
    needs("c++", "cmake", "ninja")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("cuda = '13.0'\n")
    variables = {"TORCH_DIR": str(tmp_path / "torch"), "CUDA_HOME": str(tmp_path), "TOKENOPS_BUILD": request_}
    command = [sys.executable, "setup.py", "--name"]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == (request_ == "auto"), result.stderr
    assert ("builds no CUDA library" if request_ == "auto" else "TOKENOPS_BUILD=cuda needs nvcc") in result.stderr


def test_the_cuda_library_and_its_emulated_form_in_one_build(tmp_path: Path) -> None:
    """As `make gpu-test` builds them: the same sources, each by its own compiler."""
    needs("cmake", "ninja", "nvcc")
    torch_dir = Path(torch.__file__).parent
    options = ["-DTOKENOPS_CUDA=ON", "-DTOKENOPS_EMULATED=ON", "-DCMAKE_CUDA_ARCHITECTURES=80-real", f"-DTORCH_DIR={torch_dir}"]
    run("cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options)
    sources = {str(path) for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    commands = [(entry["file"], entry["command"]) for entry in json.loads((tmp_path / "compile_commands.json").read_text())]
    assert {file for file, command in commands if "nvcc" in command} == sources
    assert not [file for file, command in commands if file in sources and "nvcc" not in command]
    assert {Path(file).stem for file, _ in commands if "/emulated/" in file} == {Path(source).stem for source in sources}


def test_an_unknown_build_is_refused(tmp_path: Path) -> None:
    result = setup_without_tools("gpu", tmp_path)
    assert result.returncode != 0
    assert "TOKENOPS_BUILD must be auto, none, cpu or cuda, got 'gpu'" in result.stderr


# --- the oldest torch ---


def cpu_builds_of_torch() -> list[str]:
    """Versions that the registry offers as CPU builds, 2.10 and later, oldest first."""
    extra = ["--extra-index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index", "versions", "torch", *extra]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    line = re.search(r"Available versions: (.*)", result.stdout)
    if not line:
        pytest.skip(f"the registry does not say which versions of torch it has: {result.stderr.strip().splitlines()[-1:]}")
    offered = [version for version in line[1].split(", ") if version.endswith("+cpu")]
    release = {version: tuple(map(int, version.partition("+")[0].split("."))) for version in offered}
    return sorted((version for version in release if release[version] >= (2, 10)), key=release.__getitem__)


def test_library_runs_under_the_oldest_torch(wheel: Path, tmp_path: Path) -> None:
    builds = cpu_builds_of_torch()
    if not builds or builds[0] == torch.__version__:
        pytest.skip(
            f"the registry offers no CPU build of torch from 2.10 on that is older than the {torch.__version__} at hand "
            f"(CPU builds: {', '.join(builds) or 'none'}); test_library_uses_only_what_the_target_torch_has stands in for it"
        )
    old, place = tmp_path / "torch", tmp_path / "place"
    extra = ["--extra-index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    pip("install", "--no-deps", "--target", old, f"torch=={builds[0]}", *extra)
    pip("install", "--no-deps", "--target", place, wheel)
    smoke(place, "cpu", torch_version=builds[0], path=(old,))


# --- what the README says ---


def readme_example(about: str) -> str:
    """The one example in the README that calls this."""
    (example,) = (text for text in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL) if about in text)
    return example


def test_readme_example_of_attention_runs() -> None:
    query, key, value = torch.randn(3, 2, 3, 500, 16).unbind()
    names = {"query": query, "key": key, "value": value, "score": torch.rand(2, 500)}
    exec(readme_example("q_index"), names)
    kept = names["kept"][:, None, :, None].expand(-1, 3, -1, 16)
    wanted = torch.nn.functional.scaled_dot_product_attention(*(grid.gather(2, kept) for grid in (query, key, value)))
    torch.testing.assert_close(names["out"], wanted)


def test_readme_example_of_merging_runs() -> None:
    query, key, value = torch.randn(3, 2, 3, 84, 16).unbind()
    tokens, size = torch.randn(2, 100, 24), torch.ones(2, 100)
    names = {"query": query, "key": key, "value": value, "keys": torch.randn(2, 100, 8), "tokens": tokens, "size": size}
    exec("import tokenops\n" + readme_example("match_tokens"), names)
    assert (names["tokens"].shape, names["dense"].shape) == ((2, 84, 24), (2, 100, 24))
    torch.testing.assert_close((names["tokens"] * names["size"][..., None]).sum(1), tokens.sum(1))
    torch.testing.assert_close(names["out"], tokenops.sparse_attention(query, key, value, kv_bias=names["size"].log()))


def test_readme_example_of_selecting_runs() -> None:
    score, tokens = torch.rand(2, 500), torch.randn(2, 500, 24)
    names = {"score": score, "tokens": tokens, "layer": torch.nn.Identity()}
    exec("import tokenops\n" + readme_example("select_tokens"), names)
    kept = torch.zeros(2, 500, dtype=torch.bool).scatter(1, score[:, 1:].topk(391).indices + 1, True)
    kept[:, 0] = True
    torch.testing.assert_close(names["grid"], tokens * kept[..., None], rtol=0.0, atol=0.0)
    first = torch.sigmoid(10.0 * tokens[..., 0])
    assert names["active"].count.tolist() == (first < 0.99).sum(-1).tolist()
    # the weights of a token sum to 1, and it was the same in both steps
    torch.testing.assert_close(names["state"].out, tokens)


def test_readme_says_in_which_room_a_function_is() -> None:
    readme = (ROOT / "README.md").read_text()
    for room in ("sparse_attention", "token_merge", "token_select", "delta_matmul"):
        (row,) = re.findall(rf"^\| `{room}`[^|]* \| (.*) \|$", readme, re.MULTILINE)
        listed = re.findall(r"`(\w+)`", row)
        public = [name for name in tokenops.__all__ if getattr(tokenops, name).__module__.startswith(f"tokenops.ops.{room}")]
        assert sorted(listed) == sorted(public)


def test_readme_lists_every_environment_variable() -> None:
    readme = (ROOT / "README.md").read_text()
    files = [ROOT / "setup.py", *(ROOT / "tokenops").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    read = {name for file in files for name in re.findall(r"""environ(?:\.get\(|\[)"(TOKENOPS_\w+)\"""", file.read_text())}
    assert {"TOKENOPS_BUILD", "TOKENOPS_CPU_ISA", "TOKENOPS_CHECK"} <= read
    assert [name for name in sorted(read) if f"`{name}`" not in readme] == []
