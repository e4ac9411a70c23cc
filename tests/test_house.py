"""The house itself: what may import what, what the compiled objects may hold, where flags and versions stand."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

from cnn_ext import _native
from tests.support.build import kernels_build

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, CSRC = ROOT / "cnn_ext", ROOT / "csrc"

# Each floor of the package, and the modules that it may import besides its own: arrows point down only. `cnn_ext` alone
# is the public interface, which stands last because every other name begins with it.
PYTHON_FLOORS = {
    "cnn_ext.__main__": ["cnn_ext.mnist"],
    "cnn_ext.mnist": ["cnn_ext", "cnn_ext.functional", "cnn_ext.info"],
    "cnn_ext.info": ["cnn_ext.functional", "cnn_ext.inspection"],
    "cnn_ext.inspection": ["cnn_ext._native", "cnn_ext._arguments", "cnn_ext.ops", "cnn_ext.policy"],
    "cnn_ext.nn": [
        "cnn_ext.override",
        "cnn_ext.functional",
        "cnn_ext._arguments",
        "cnn_ext.ops.packing",
        "cnn_ext.ops.shapes",
    ],
    "cnn_ext.override": ["cnn_ext.functional"],
    "cnn_ext.signal": ["cnn_ext.functional", "cnn_ext._arguments", "cnn_ext.ops.shapes"],
    "cnn_ext.functional": ["cnn_ext.autograd", "cnn_ext._arguments", "cnn_ext.ops.shapes", "cnn_ext.policy"],
    "cnn_ext.policy": ["cnn_ext._arguments"],
    "cnn_ext.autograd": ["cnn_ext.ops"],
    "cnn_ext._arguments": ["cnn_ext.ops.shapes", "cnn_ext.ops.sized_shapes", "cnn_ext.ops.transposed_shapes"],
    "cnn_ext.ops": ["cnn_ext._native"],
    "cnn_ext._native": ["cnn_ext._source_hash"],
    "cnn_ext.allocator": [],
    "cnn_ext._source_hash": [],
    "cnn_ext": [
        "cnn_ext.allocator",
        "cnn_ext.functional",
        "cnn_ext.inspection",
        "cnn_ext.nn",
        "cnn_ext.override",
        "cnn_ext.policy",
        "cnn_ext.signal",
    ],
}
# Each part of csrc, by folder, and what its files may include with quotes.
CSRC_FLOORS = {
    "core/": ["core/"],
    "cpu/simd/": ["core/", "cpu/simd/"],
    "cpu/kernels/": [
        "core/",
        "cpu/kernel.h",
        "cpu/sized_pool2d_kernel.h",
        "cpu/float_rows.h",
        "cpu/packed.h",
        "cpu/parallel.h",
        "cpu/peak.h",
        "cpu/simd/",
        "cpu/kernels/",
    ],
    "cpu/": ["core/", "cpu/"],
    "cuda/": ["core/", "cuda/"],
    "bindings/": ["core/", "cpu/", "cuda/", "bindings/"],
    "tests/": ["core/", "cpu/", "cuda/", "tests/"],
}
# What files compiled for an instruction set may include from outside: nothing with a function for the linker to share.
ISA_STANDARD_HEADERS = {"cstdint", "cstddef", "immintrin.h", "arm_neon.h"}
LONGEST_FILE = 400  # lines


def sources(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in suffixes and "__pycache__" not in path.parts)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module of this package that a file imports, also inside functions and as `from package import module`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "cnn_ext")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if node.module.split(".")[0] == "cnn_ext":
                for alias in node.names:
                    below = ROOT.joinpath(*node.module.split("."), alias.name)
                    is_module = below.is_dir() or below.with_suffix(".py").exists() or alias.name in ("_C", "_cuda")
                    yield f"{node.module}.{alias.name}" if is_module else node.module


def is_within(module: str, floor: str) -> bool:
    """`cnn_ext` alone means the package's own namespace, any other floor all that is below it, too."""
    return module == floor or (floor != "cnn_ext" and module.startswith(floor + "."))


@pytest.mark.parametrize("path", sources(PACKAGE, ".py"), ids=module_name)
def test_imports_point_down(path):
    floor = next(floor for floor in PYTHON_FLOORS if is_within(module_name(path), floor))
    allowed = [floor, *PYTHON_FLOORS[floor]]
    wrong = [name for name in imports(path) if not any(is_within(name, below) for below in allowed)]
    assert not wrong, f"{module_name(path)} (floor {floor}) imports {wrong}; it may import {allowed}"


def test_native_is_the_only_importer_of_the_compiled_modules():
    name = re.compile(r"""["'](cnn_ext\.)?(_C|_cuda)["']|import _C\b|import _cuda\b|cnn_ext\._C\b|cnn_ext\._cuda\b""")
    finders = {"inspection.py"}  # asks whether _cuda was built, and does not import it
    for path in [*sources(PACKAGE, ".py"), *sources(ROOT / "benchmarks", ".py")]:
        if path.name != "_native.py" and path.name not in finders:
            assert not name.search(path.read_text()), path
        assert not [found for found in imports(path) if found.endswith(("._C", "._cuda"))], path


def includes(path: Path) -> Iterator[tuple[bool, str]]:
    """Whether in quotes, and the file."""
    for quote, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE):
        yield quote == '"', name


CSRC_FILES = sources(CSRC, ".h", ".inl", ".cpp", ".cu", ".cuh")


@pytest.mark.parametrize("path", CSRC_FILES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_includes_point_down(path):
    relative = path.relative_to(CSRC).as_posix()
    floor = next(floor for floor in CSRC_FLOORS if relative.startswith(floor))
    for quoted, name in includes(path):
        assert not re.match(r"(torch|ATen|c10)/", name), f"{relative} includes {name}"
        if quoted:
            assert name.startswith(tuple(CSRC_FLOORS[floor])), f"{relative} includes {name}"
        elif not relative.startswith("bindings/"):
            assert not name.startswith(("pybind11/", "Python")), f"{relative} includes {name}"
        if not quoted and relative.startswith(("cpu/kernels/", "cpu/simd/", "core/")):
            assert name in ISA_STANDARD_HEADERS, f"{relative} includes <{name}>"


def test_torch_is_no_build_requirement():
    build = (ROOT / "pyproject.toml").read_text().split("[project]")[0]
    assert "requires" in build and "torch" not in build
    for file in ("setup.py", "CMakeLists.txt"):
        assert "torch" not in re.sub(r"(#|\"\"\").*", "", (ROOT / file).read_text()).lower()


def test_openmp_pragmas_stand_in_one_file():
    holders = [path.name for path in CSRC_FILES if re.search(r"^\s*#\s*pragma\s+omp", path.read_text(), re.MULTILINE)]
    assert holders == ["parallel.h"]


def test_instruction_set_flags_stand_in_one_file():
    flag = re.compile(r"(?<![\w-])-m(arch|tune|avx|fma|sse|bmi|amx)\w*|-march=|target\s*\(\s*\"|pragma\s+GCC\s+target")
    build_files = [
        ROOT / "CMakeLists.txt",
        ROOT / "setup.py",
        ROOT / "pyproject.toml",
        *sources(ROOT / "cmake", ".cmake"),
    ]
    holders = {path.name for path in [*build_files, *CSRC_FILES] if flag.search(path.read_text())}
    assert holders == {"isa.cmake"}
    assert "-march" not in (ROOT / "cmake" / "isa.cmake").read_text()


def test_no_file_is_too_long():
    code = [
        *CSRC_FILES,
        *(p for d in ("cnn_ext", "tests", "benchmarks", "cmake") for p in sources(ROOT / d, ".py", ".cmake")),
    ]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in code}
    assert not {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE}


def test_one_version():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert re.search(r"^## \[?([^\] ]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1) == version
    holders = [
        path for path in sources(PACKAGE, ".py") if re.search(rf"[\"']{re.escape(version)}[\"']", path.read_text())
    ]
    assert not holders
    try:
        installed = metadata.version("cnn_ext")
    except metadata.PackageNotFoundError:
        return
    assert installed == version


class IsaObject(NamedTuple):
    """A source under csrc/cpu/kernels, compiled for an instruction set."""

    kernel: str
    isa: str
    path: Path


@pytest.fixture(scope="module", params=["as built", pytest.param("-O0", marks=pytest.mark.everything)])
def isa_objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[IsaObject]:
    """At -O0 nothing is inlined away: every function that could be shared between instruction sets shows."""
    folder = tmp_path_factory.mktemp("isa")

    def object_of(entry: dict) -> IsaObject:
        kernel = Path(entry["file"]).stem
        isa, path = (re.search(form, entry["command"]).group(1) for form in (r"-DCNN_EXT_ISA=(\w+)", r" -o (\S+)"))
        if request.param == "as built":
            return IsaObject(kernel, isa, Path(entry["directory"]) / path)
        made = folder / f"{kernel}_{isa}.o"
        arguments = re.sub(r" -o \S+| -O\d| -Werror", "", entry["command"]).split()
        subprocess.run([*arguments, "-O0", "-o", str(made)], check=True, capture_output=True, cwd=entry["directory"])
        return IsaObject(kernel, isa, made)

    commands = json.loads((kernels_build(tmp_path_factory) / "compile_commands.json").read_text())
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(object_of, [entry for entry in commands if "/csrc/cpu/kernels/" in entry["file"]]))


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """The type letter and the name of every symbol."""
    listing = subprocess.run(["nm", *options, str(path)], check=True, capture_output=True, text=True).stdout
    return [tuple(line.split(maxsplit=2 if line[0] != " " else 1)[-2:]) for line in listing.splitlines()]


def test_isa_objects_share_nothing_with_the_linker(isa_objects):
    for made in isa_objects:
        for letter, name in symbols(made.path, "-C"):
            assert letter not in "WwVvu", f"{made}: weak symbol {name}"
            if letter in "TDRBC":
                assert name.startswith(f"cnn_ext::cpu::{made.isa}::"), f"{made}: global symbol {name}"


def test_isa_objects_run_nothing_at_load_time(isa_objects):
    for made in isa_objects:
        assert not [name for _, name in symbols(made.path) if "_GLOBAL__sub_I" in name], made
        listing = subprocess.run(["readelf", "-SW", str(made.path)], check=True, capture_output=True, text=True)
        assert ".init_array" not in listing.stdout and ".ctors" not in listing.stdout, made


def test_every_row_that_is_compiled_stands_in_the_table(isa_objects):
    """The linker sees to the opposite. (Rows of the matrix unit stand there on a machine that has one.)"""
    made_by_isa = re.compile(r"cnn_ext::cpu::(\w+)::(\w+2d_\w+)")
    found = [
        made_by_isa.fullmatch(name)
        for made in isa_objects
        for letter, name in symbols(made.path, "-C")
        if letter in "DR"
    ]
    names = {(row[2], row[1]) for row in found if row}
    packing = {name for name in names if name[0].endswith("_packing")}
    assert {(name.removesuffix("_packing"), isa) for name, isa in packing} <= names
    compiled = {f"{name}_{isa}" for name, isa in names - packing}
    listed = {row["name"] for row in _native.cpu.kernels() if not re.search(r"_(naive|composed|folded)_", row["name"])}
    assert listed <= compiled
    assert all("_amx_" in name for name in compiled - listed)


def test_the_sets_of_wide_vectors_have_every_kernel_source(isa_objects):
    kernels = {path.stem for path in (CSRC / "cpu" / "kernels").glob("*.cpp")}
    isas = {made.isa for made in isa_objects}
    assert "baseline" in isas
    isas -= {"avx512_bf16"}  # the matrix unit's rows alone
    compiled = {(made.kernel, made.isa) for made in isa_objects}
    lists = (ROOT / "cmake" / "isa.cmake").read_text()
    of_avx2 = re.search(r"set\(CNN_EXT_AVX2_KERNELS ([^)]+)\)", lists).group(1).split()
    assert {isa for kernel, isa in compiled if kernel in of_avx2} <= {"avx2"}
    wanted = {
        (kernel, isa)
        for kernel in kernels
        for isa in isas - {"baseline"} or isas
        if kernel not in of_avx2 or isa == "avx2"
    }
    assert compiled >= wanted


def test_the_compiled_module_needs_neither_torch_nor_an_openmp_runtime_of_its_own():
    module = Path(_native.cpu.__file__)
    dynamic = subprocess.run(["readelf", "-dW", str(module)], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert not [name for name in needed if name.startswith(("libgomp", "libomp", "libiomp", "libtorch", "libc10"))]
    names = [name for _, name in symbols(module, "-D")]
    assert names
    assert not [name for name in names if re.search(r"torch|3c10|N2at|THP", name)]


def copy_of_the_tree(tmp_path: Path) -> Path:
    """The package with its compiled module, and csrc, as in a clone that was built in place."""
    ignore = shutil.ignore_patterns("__pycache__", "mnist")
    shutil.copytree(PACKAGE, tmp_path / "cnn_ext", ignore=ignore)
    shutil.copytree(CSRC, tmp_path / "csrc", ignore=ignore)
    shutil.copy(_native.cpu.__file__, tmp_path / "cnn_ext")
    return tmp_path


def import_in(tree: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", "import cnn_ext; print(cnn_ext.__file__)"]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def test_a_binary_of_other_sources_fails_loudly(tmp_path):
    tree = copy_of_the_tree(tmp_path)
    assert str(tree) in import_in(tree).stdout
    with open(tree / "csrc" / "core" / "shapes.h", "a") as header:
        header.write("// changed\n")
    done = import_in(tree)
    assert done.returncode != 0
    assert "built from other sources" in done.stderr and "pip install -e ." in done.stderr


def test_a_missing_binary_says_what_to_do(tmp_path):
    tree = copy_of_the_tree(tmp_path)
    for module in (tree / "cnn_ext").glob("_C.*.so"):
        module.unlink()
    done = import_in(tree)
    assert done.returncode != 0
    assert "pip install" in done.stderr and "_C" in done.stderr
