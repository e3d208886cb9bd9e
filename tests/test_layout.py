"""The rules that hold the house up: one stem in every wing, imports in one direction, no hidden copies of names."""

from __future__ import annotations

import ast
import doctest
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tokenops

PACKAGE = Path(tokenops.__file__).parent
ROOT = PACKAGE.parent
ROOMS = {"delta_matmul", "sparse_attention", "token_merge", "token_select"}
# public names whose docstring has an example
EXAMPLES = (
    "sparse_attention",
    "index_from_mask",
    "patch_sdpa",
    "select_tokens",
    "halt_tokens",
    "pack_tokens",
    "unpack_tokens",
    "pairwise_argmax",
    "match_tokens",
    "plan_from_parents",
    "plan_from_slots",
    "merge_schedule",
    "merge_tokens",
    "unmerge_tokens",
    "soft_merge",
    "delta_attention",
    "delta_gate",
    "delta_window_attention",
    "gathered_linear",
    "gathered_mlp",
    "update_tokens",
)
WINGS = ("reference", "triton")
# what the rooms of a wing share
SHARED = {"launch"}
# what a file of this part of the package may import of it
MAY_IMPORT = {
    "types": set(),
    "dispatch": set(),
    "native": set(),
    "reference": {"types", "reference"},
    "triton": {"types", "triton"},
    "ops": {"types", "dispatch", "native", "reference", "triton", "ops"},
    "models": {"types", "ops", "models"},
}


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The parts of tokenops that a file imports, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    parts = [name.split(".") for name in names]
    return {part[1] if len(part) > 1 else "tokenops" for part in parts if part[0] == "tokenops"}


@pytest.mark.parametrize("path", modules(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_one_way(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in MAY_IMPORT:
        assert imported(path) <= MAY_IMPORT[part]


def test_a_room_has_one_stem_in_every_wing() -> None:
    for wing in WINGS:
        stems = {path.stem for path in (PACKAGE / wing).iterdir() if path.stem not in ("__init__", "__pycache__")}
        assert stems <= ROOMS | SHARED, f"tokenops/{wing} has files that belong to no room: {stems - ROOMS - SHARED}"
    for room in ROOMS:
        for wing in ("reference", "ops"):
            assert (PACKAGE / wing / f"{room}.py").exists() or (PACKAGE / wing / room).is_dir(), f"{room} is missing in {wing}"
        assert list((ROOT / "tests").glob(f"test_{room}*.py")), f"{room} has no tests"
        if (ROOT / "csrc").exists():
            assert (ROOT / "csrc" / "cpu" / f"{room}.cpp").exists(), f"{room} is missing in csrc/cpu"


def test_ops_stays_empty() -> None:
    """A function re-exported there would hide the module of its name."""
    assert (PACKAGE / "ops" / "__init__.py").read_text().strip() == ""


def test_every_public_name_exists_and_is_documented() -> None:
    for name in tokenops.__all__:
        assert getattr(tokenops, name).__doc__, f"tokenops.{name} has no docstring"
    public = {name for name in vars(tokenops) if not name.startswith("_")}
    # benchmarks/ lives at the top, is installed inside the package, and shows here once any test imported it
    submodules = {path.stem for path in PACKAGE.iterdir()} | {"benchmarks"}
    assert public - submodules == set(tokenops.__all__)


def test_kernels_are_registered_in_their_own_file() -> None:
    for path in (ROOT / "csrc").rglob("*.cpp"):
        text = path.read_text()
        if "STABLE_TORCH_LIBRARY" in text:
            last = text.rindex("STABLE_TORCH_LIBRARY")
            assert text[last:].count("\n") < 16, f"{path.name}: the registration stands at the end"


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_run(name: str) -> None:
    names = {
        "torch": torch,
        "tokenops": tokenops,
        "video": torch.zeros(1, 2, 5, 8),
        "model": lambda x: F.scaled_dot_product_attention(x, x, x),
    }
    [example] = doctest.DocTestFinder(recurse=False).find(getattr(tokenops, name), name, globs=names)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
