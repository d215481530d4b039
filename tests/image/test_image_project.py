from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from image_sources import run_teemate

from teemate.errors import ImageError
from teemate.image.project import new_project


def test_a_new_project_builds_and_its_own_test_passes(tmp_path: Path) -> None:
    done = run_teemate("enclave", "new", "my-shop", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    project = tmp_path / "my-shop"
    assert (project / "my_shop.c").is_file()
    for path in project.rglob("*"):
        assert "@" not in path.name
        assert not path.is_file() or "@NAME@" not in path.read_text()

    built = run_teemate("image", "build", "my_shop.c", "-o", "my_shop.sgxs", cwd=project)
    assert built.returncode == 0, built.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", "."]
    tested = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False, timeout=300)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert " passed" in tested.stdout


@pytest.mark.parametrize("name", ["", "Shop", "1shop", "my shop", "../shop", "shop-", "a" * 41, "töpfe"])
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be a project's name"):
        new_project(name, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ImageError, match="already there"):
        new_project("shop", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
