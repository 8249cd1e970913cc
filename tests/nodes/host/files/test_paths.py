"""Names of adapter files: listed, found in every spelling, searched for when missing, refused when unsafe."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from tests.nodes.conftest import Pack


@pytest.fixture
def paths(ours: Pack) -> Any:
    return ours.module("nodes.host.files.paths")


def touch(path: Any, text: str = "x") -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_folders_are_registered_with_their_extensions_and_extra_paths_kept(
    paths: Any, folders: SimpleNamespace, tmp_path: Any
) -> None:
    extra = str(tmp_path / "elsewhere")
    folders.host.folder_names_and_paths["spectral_adapters"] = ([extra], set())
    paths.register()
    known, extensions = folders.host.folder_names_and_paths["spectral_adapters"]
    assert known == [extra, str(folders.models), str(folders.saved)]
    assert extensions == {".safetensors"}
    paths.register()
    assert folders.host.folder_names_and_paths["spectral_adapters"][0] == known


def test_listing_has_both_folders_with_subfolders_and_nothing_else(paths: Any, folders: Any) -> None:
    touch(folders.models / "a.safetensors")
    touch(folders.models / "sub" / "b.safetensors")
    touch(folders.saved / "c.safetensors")
    touch(folders.models / "notes.txt")
    assert paths.list_adapters() == ["a.safetensors", "c.safetensors", "sub/b.safetensors"]


def test_a_removed_subfolder_does_not_break_the_list(paths: Any, folders: Any, monkeypatch: Any) -> None:
    def stumble(key: str) -> list[str]:
        raise FileNotFoundError(key)

    touch(folders.models / "a.safetensors")
    monkeypatch.setattr(folders.host, "get_filename_list", stumble)
    assert paths.list_adapters() == ["a.safetensors"]


def test_no_file_gives_a_hint(paths: Any, folders: Any, ours: Pack) -> None:
    (hint,) = paths.list_adapters()
    assert "models/spectral_adapters" in hint
    with pytest.raises(ours.error, match=r"models/spectral_adapters"):
        paths.resolve(hint)


@pytest.mark.parametrize("name", ["sub/b.safetensors", "sub\\b.safetensors", "./sub//b.safetensors"])
def test_every_spelling_finds_the_file(paths: Any, folders: Any, name: str) -> None:
    file = touch(folders.models / "sub" / "b.safetensors")
    found = paths.resolve(name)
    assert found.path == file and found.note == ""


def test_first_folder_wins_for_one_name(paths: Any, folders: Any) -> None:
    file = touch(folders.models / "a.safetensors")
    touch(folders.saved / "a.safetensors")
    assert paths.resolve("a.safetensors").path == file


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "sub/../../a", "..\\a", "/etc/a", "\\a", "C:\\a", "c:a", "", "a\0b", ".", " "],
)
def test_names_that_leave_the_folder_are_refused(paths: Any, folders: Any, ours: Pack, name: str) -> None:
    with pytest.raises(ours.error, match="expected"):
        paths.resolve(name)


def test_a_moved_file_is_found_by_its_base_name(paths: Any, folders: Any) -> None:
    file = touch(folders.saved / "new" / "cat.safetensors")
    found = paths.resolve("old/CAT.safetensors")
    assert found.path == file and "new/cat.safetensors" in found.note


def test_several_of_one_base_name_are_named(paths: Any, folders: Any, ours: Pack) -> None:
    touch(folders.models / "x" / "cat.safetensors", "1")
    touch(folders.models / "y" / "cat.safetensors", "2")
    with pytest.raises(ours.error, match=r"x/cat\.safetensors, y/cat\.safetensors"):
        paths.resolve("cat.safetensors")


def test_the_content_decides_between_them_and_finds_a_renamed_file(
    paths: Any, folders: Any, ours: Pack
) -> None:
    names, store = ours.module("nodes.host.files.names"), ours.module("nodes.host.files.parsed_cache")
    touch(folders.models / "x" / "twin.safetensors", "1")
    wanted = touch(folders.models / "y" / "twin.safetensors", "2")
    names.remember_digest("twin.safetensors", store.digest(wanted))
    assert paths.resolve("twin.safetensors", may_hash=True).path == wanted
    names.remember_digest("gone\\renamed.safetensors", store.digest(wanted))
    found = paths.resolve("gone/renamed.safetensors", may_hash=True)
    assert found.path == wanted and "content" in found.note


def test_a_missing_file_suggests_near_names(paths: Any, folders: Any, ours: Pack) -> None:
    touch(folders.models / "sub" / "fluffy_cat.safetensors")
    touch(folders.models / "zebra.safetensors")
    with pytest.raises(ours.error, match=r"did you mean sub/fluffy_cat\.safetensors\?") as caught:
        paths.resolve("flufy_cat.safetensors")
    assert str(folders.models) in str(caught.value) and "zebra" not in str(caught.value)
    with pytest.raises(ours.error, match=r"there are sub/fluffy_cat\.safetensors, zebra\.safetensors"):
        paths.resolve("0123.safetensors")


def test_without_a_host_there_are_no_files(paths: Any, ours: Pack) -> None:
    assert paths.list_adapters() == [paths.NO_ADAPTER]
    assert paths.list_loras() == ["none"]
    with pytest.raises(ours.error, match="not the host"):
        paths.resolve("a.safetensors")


def test_parsed_once_until_the_file_changes(ours: Pack, tmp_path: Any) -> None:
    store = ours.module("nodes.host.files.parsed_cache").Store()
    file, parsed = touch(tmp_path / "a", "1"), []

    def parse() -> str:
        parsed.append(1)
        return file.read_text()

    assert [store.get("x", file, parse) for _ in range(3)] == ["1"] * 3 and len(parsed) == 1
    assert store.get("y", file, parse) == "1" and len(parsed) == 2
    file.write_text("23")
    assert store.get("x", file, parse) == "23" and len(parsed) == 3
    file.write_text("45")  # same size: told by the time of its change
    os.utime(file, ns=(1, 1))
    assert store.get("x", file, parse) == "45" and len(parsed) == 4


def test_a_file_written_while_it_is_read_is_read_again(ours: Pack, tmp_path: Any) -> None:
    store = ours.module("nodes.host.files.parsed_cache").Store()
    file, rest = touch(tmp_path / "a", "old"), ["newer", "newest!"]

    def parse() -> str:
        text = file.read_text()
        if rest:
            file.write_text(rest.pop(0))
        return text

    assert store.get("x", file, parse) == "newest!"


def test_store_forgets_the_oldest_and_belongs_to_its_models(ours: Pack, tmp_path: Any) -> None:
    store = ours.module("nodes.host.files.parsed_cache").Store(kept=2)
    files, parsed = [touch(tmp_path / name, name * 10) for name in "abc"], []

    class Model:
        pass

    def get(file: Any, *owners: Any) -> Any:
        return store.get("x", file, lambda: parsed.append(file.name) or file.name, owners)

    for file in files:
        get(file)
    get(files[2])
    assert parsed == ["a", "b", "c"]
    get(files[0])
    assert parsed[3:] == ["a"]
    one, two = Model(), Model()
    get(files[0], one), get(files[0], one), get(files[0], two), get(files[0], one)
    assert parsed[4:] == ["a", "a"]


def test_store_does_not_keep_what_is_large_alive(ours: Pack, tmp_path: Any) -> None:
    store = ours.module("nodes.host.files.parsed_cache").Store(keeps_alive=False)
    file, parsed = touch(tmp_path / "a"), []

    class Large:
        def __init__(self) -> None:
            parsed.append(1)

    one = store.get("x", file, Large)
    assert store.get("x", file, Large) is one and len(parsed) == 1
    del one
    store.get("x", file, Large)
    assert len(parsed) == 2


def test_the_digest_follows_the_content(ours: Pack, tmp_path: Any) -> None:
    digest = ours.module("nodes.host.files.parsed_cache").digest
    file = touch(tmp_path / "a", "1")
    first = digest(file)
    assert first == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    file.write_text("12")
    assert digest(file) != first


def test_a_listed_name_can_be_chosen(ours: Pack, folders: Any) -> None:
    """Also one that begins with a space, which somebody's download manager made."""
    (folders.loras / " lead.safetensors").write_bytes(b"x")
    paths = ours.module("nodes.host.files.paths")
    assert " lead.safetensors" in paths.listing("loras")
    assert paths.resolve(" lead.safetensors", "loras").path == folders.loras / " lead.safetensors"
