"""The names, paths, commands and links in README and the docs exist; CITATION.cff is up to date."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

import pytest

import epsanet_fused as ef

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks/README.md"]
CODE = ("epsanet_fused", "csrc", "tests", "benchmarks", "recipes")
SUFFIXES = {".py", ".cpp", ".cu", ".h", ".cuh", ".md", ".toml", ".yml", ".csv", ".png", ".cff"}
# Not ours: names of PyTorch and Python, scripts of timm.
ELSEWHERE = {"ContextVar", "__dict__", "train.py"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@functools.cache
def files() -> list[Path]:
    """Return the files and folders of the repository, relative to its root."""
    folders = [ROOT / name for name in (*CODE, "docs", ".ci", ".github")]
    found = [*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]
    return [path.relative_to(ROOT) for path in found]


@functools.cache
def words() -> set[str]:
    """Return all words in the code."""
    code = [p for p in files() if p.suffix in SUFFIXES - {".md", ".png"} or p.name == "Makefile"]
    texts = [(ROOT / p).read_text() for p in code if p.name != Path(__file__).name]
    return {word for text in texts for word in re.findall(r"\w+", text)}


def is_missing(token: str) -> bool:
    """Tell whether a word in backticks names something that does not exist."""
    if token in ELSEWHERE:
        return False
    first, *rest = token.split(".")
    if Path(token).suffix in SUFFIXES or token.endswith("/") or token.split("/")[0] in CODE:
        parts = Path(token).parts
        return not token.endswith(".so") and all(p.parts[-len(parts) :] != parts for p in files())
    if first in ("ef", "epsanet_fused"):
        return not resolves(rest)
    return re.fullmatch(r"\w{3,}", token) is not None and token not in words()


def resolves(names: list[str]) -> bool:
    """Tell whether these names exist in the package; other packages aren't imported for it."""
    folder, depth = ROOT / "epsanet_fused", 0
    while depth < len(names) and (folder / names[depth]).is_dir():
        folder, depth = folder / names[depth], depth + 1
    if depth < len(names) and (folder / f"{names[depth]}.py").is_file():
        folder, depth = folder / names[depth], depth + 1
    if depth == len(names):
        return True
    module = importlib.import_module(".".join(folder.relative_to(ROOT).parts))
    try:
        functools.reduce(getattr, names[depth:], module)
    except AttributeError:
        return False
    return True


@every_page
def test_what_is_in_backticks_exists(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    quoted = re.findall(r"`([^`]+)`", text)
    tokens = [t.rstrip(".") for q in quoted if " " not in q or "(" in q for t in _tokens(q)]
    assert [token for token in tokens if is_missing(token)] == []


def _tokens(quoted: str) -> list[str]:
    """The path or dotted name with which a quotation begins; nothing for options and formulas."""
    found = re.match(r"(?:with )?([\w./-]*\w/?)", quoted)
    return [found[1]] if found and not re.match(r"[-./]", quoted) else []


@every_page
def test_targets_of_make_exist(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^    )make ([\w-]+)", page.read_text(), re.MULTILINE)) <= {
        *targets
    }


@every_page
def test_links_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    local = [link for link in links if not link.startswith("https://")]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def test_the_citation_has_the_version() -> None:
    [version] = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version == ef.__version__
