"""The adapter's file: round trips to the bit, refusals with clear words, no raw exception for any bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Generator

from spectral_core.adapter.adapter import Adapter, AdapterLayer, Provenance, Term
from spectral_core.adapter.schedule import Schedule
from spectral_core.errors import SpectralAdapterError
from spectral_core.files import adapter_file as fileformat
from spectral_core.files import container
from spectral_core.files import writing as safewrite
from spectral_core.files.container import open_safely
from spectral_core.methods import LoRAConfig, SpectralRConfig
from tests.core.adapter_cases import ALL, trained

NAME = "unet.down_blocks.0.attn1.to_q"
SHAPES = {"tall": (13, 7), "wide": (6, 11), "conv": (9, 5, 3, 3), "conv1d": (8, 7, 3)}


def weights(shape: tuple[int, ...], name: str = NAME, seed: int = 0) -> dict[str, Any]:
    return {name: torch.randn(shape, generator=Generator().manual_seed(seed))}


def with_gates(adapter: Adapter) -> Adapter:
    """Mean openings as a training leaves them: some rows open, some closed."""

    def move(name: str, term: Term) -> Term:
        params = dict(term.params)
        if "gate.mean_open" in params:
            params["gate.mean_open"] = torch.tensor([0.9, 0.2, 0.7, 0.51])
            params["gate.mu"] = torch.tensor(-1.25)
        return replace(term, params=params)

    return adapter.map_terms(move)


def adapter_of(case: str, shape: str = "tall") -> Adapter:
    return with_gates(trained(ALL[case], weights(SHAPES[shape])))


def everything() -> Adapter:
    """All that an adapter can hold: methods, several terms, rows, tokens, strengths, a schedule."""
    layers: dict[str, AdapterLayer] = {}
    for i, case in enumerate(ALL):
        made = with_gates(trained(ALL[case], weights((8, 9), f"unet.block.{i}.to_q", seed=i)))
        layers |= made.layers
    first, second = (trained(ALL[c], weights((6, 8))).layers[NAME] for c in ("lora", "spectral-a"))
    layers["text_encoder.text_model.encoder.layers.0.mlp.fc1"] = AdapterLayer(
        first.shape, (replace(first.terms[0], weight=0.25), second.terms[0], first.terms[0])
    )
    layers["diffusion_model.double_blocks.0.qkv[6:12]"] = second
    tokens = {"<cat>": {"text_encoder": torch.randn(1, 16), "text_encoder_2": torch.randn(1, 24)},
              "“süß”": {"text_encoder": torch.randn(3, 16)}}  # fmt: skip
    return Adapter(
        layers,
        Provenance(
            "Ein Kätzchen",
            "sd1",
            {"kind": "x", "layers": {}},
            ("<cat>", "cat"),
            {"steps": 10},
            ({"name": "p"},),
        ),
        0.75,
        (("text_encoder*", 0.5), ("unet.*", 1.1)),
        Schedule.window(0.2, 0.8),
        tokens,
    )


def assert_equal(found: Adapter, expected: Adapter) -> None:
    assert found.content_hash == expected.content_hash
    assert list(found.layers) == list(expected.layers)
    for field in ("provenance", "strength", "layer_strengths", "schedule"):
        assert getattr(found, field) == getattr(expected, field), field
    for name, layer in expected.layers.items():
        assert found.layers[name].shape == layer.shape
        for a, b in zip(found.layers[name].terms, layer.terms, strict=True):
            assert a.config == b.config and a.weight == b.weight
            for key in b.params:
                assert a.params[key].dtype == b.params[key].dtype and torch.equal(
                    a.params[key], b.params[key]
                ), key
    assert {w: set(p) for w, p in found.tokens.items()} == {w: set(p) for w, p in expected.tokens.items()}
    for word, parts in expected.tokens.items():
        assert all(torch.equal(found.tokens[word][part], value) for part, value in parts.items())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", ALL)
def test_round_trip_is_equal_to_the_bit(tmp_path: Path, case: str, shape: str) -> None:
    adapter = adapter_of(case, shape)
    path = fileformat.save(adapter, tmp_path / "a.safetensors")
    assert_equal(fileformat.load(path), adapter)


def test_everything_at_once_round_trips(tmp_path: Path) -> None:
    adapter = everything()
    assert_equal(fileformat.load(fileformat.save(adapter, tmp_path / "a.safetensors")), adapter)


def test_rank_one_rotation_has_no_entries_and_round_trips(tmp_path: Path) -> None:
    adapter = trained(SpectralRConfig((1,), train_scale=True), weights((7, 5)))
    loaded = fileformat.load(fileformat.save(adapter, tmp_path / "a.safetensors"))
    assert_equal(loaded, adapter)
    assert next(iter(loaded.layers.values())).terms[0].params["q_u"].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_rounds_matrices_only(tmp_path: Path, dtype: torch.dtype) -> None:
    for case in ("foura-adaptive", "spectral-a-scale", "spectral-r"):
        adapter = adapter_of(case)
        loaded = fileformat.load(fileformat.save(adapter, tmp_path / f"{case}.safetensors", dtype=dtype))
        before, after = (next(iter(a.layers.values())).terms[0].params for a in (adapter, loaded))
        for key, value in before.items():
            is_matrix = value.dim() > 1 and not key.startswith("gate.")
            assert torch.equal(after[key], value.to(dtype) if is_matrix else value), key
    half = trained(LoRAConfig(2), weights((5, 5))).map_terms(
        lambda name, term: replace(term, params={k: v.to(dtype) for k, v in term.params.items()})
    )
    assert_equal(fileformat.load(fileformat.save(half, tmp_path / "half.safetensors")), half)


def test_other_programs_read_the_file(tmp_path: Path) -> None:
    adapter = everything()
    path = fileformat.save(adapter, tmp_path / "a.safetensors")
    tensors = safetensors.torch.load_file(path)
    term = next(iter(adapter.layers.values())).terms[0]
    assert torch.equal(tensors["unet.block.0.to_q.down"], term.params["down"])
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1.term2.up" in tensors
    assert "tokens.text_encoder_2.0" in tensors
    metadata = open_safely(path).metadata
    assert metadata["spectral_adapters.version"] == "1"
    config = json.loads(metadata["spectral_adapters.config"])
    assert len(config["configurations"]) == len(ALL), "each distinct configuration once"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/spectral-adapter"
    assert metadata["modelspec.title"] == "Ein Kätzchen"
    assert metadata["modelspec.trigger_phrase"] == "<cat>, cat"
    assert metadata["ss_base_model_version"] == "sd_v1" and metadata["ss_steps"] == "10"
    assert metadata["ss_network_dim"] == "4" and metadata["ss_network_alpha"] == "Dynamic"


def test_reading_matches_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = {
        "a": torch.randn(3, 2).bfloat16(),
        "b": torch.tensor(2.5),
        "c": torch.zeros(0, 4),
        "d": torch.arange(3),
    }
    safetensors.torch.save_file(values, path)
    read = open_safely(path).read()
    assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in values.items())
    again = safewrite.write(values, {"k": "v"}, tmp_path / "y.safetensors")
    back = safetensors.torch.load_file(again)
    assert all(torch.equal(back[k], v) for k, v in values.items())


def test_same_content_same_bytes(tmp_path: Path) -> None:
    values = {"b": torch.randn(3), "a": torch.randn(2).half()}
    first = safewrite.write(values, {"x": "1", "a": "2"}, tmp_path / "1.safetensors").read_bytes()
    swapped = dict(reversed(values.items()))
    assert safewrite.write(swapped, {"a": "2", "x": "1"}, tmp_path / "2.safetensors").read_bytes() == first


def test_inspect_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fileformat.save(everything(), tmp_path / "a.safetensors")
    monkeypatch.setattr(container.SafeFile, "read", lambda *a: pytest.fail("a tensor was read"))
    summary = fileformat.inspect(path)
    assert (
        summary.name == "Ein Kätzchen"
        and summary.family == "sd1"
        and summary.trigger_words == ("<cat>", "cat")
    )
    assert set(summary.methods) == {"foura", "lora", "spectral_a", "spectral_r"}
    assert summary.parts == ("unet", "text_encoder", "diffusion_model")
    assert summary.ranks == (2, 4) and summary.tokens == ("<cat>", "“süß”")
    assert summary.parameter_count == everything().parameter_count and not summary.is_compact
    assert summary.file_bytes == path.stat().st_size and len(summary.layers) == len(everything().layers)
    assert fileformat.is_adapter_file(path) and not fileformat.is_adapter_file(tmp_path)


def test_loaded_tensors_can_be_trained_though_read_in_inference_mode(tmp_path: Path) -> None:
    path = fileformat.save(adapter_of("lora"), tmp_path / "a.safetensors")
    with torch.inference_mode():
        params = next(iter(fileformat.load(path).layers.values())).terms[0].params
    assert not any(p.is_inference() for p in params.values())


# --- saving ---------------------------------------------------------------------------------------


def test_save_never_overwrites_silently_and_names_a_free_name(tmp_path: Path) -> None:
    first, second = adapter_of("lora"), adapter_of("spectral-a")
    path = fileformat.save(first, tmp_path / "a.safetensors")
    fileformat.save(first, tmp_path / "a-2.safetensors")
    with pytest.raises(
        SpectralAdapterError, match=r"a\.safetensors: exists already; save as a-3\.safetensors"
    ):
        fileformat.save(second, path)
    assert_equal(fileformat.load(path), first)
    assert_equal(fileformat.load(fileformat.save(second, path, overwrite=True)), second)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-2.safetensors", "a.safetensors"]


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_a_full_disk_leaves_no_debris_and_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    path = fileformat.save(adapter_of("lora"), tmp_path / "a.safetensors")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, stage, full)
    with pytest.raises(SpectralAdapterError, match=r"a\.safetensors: cannot be written \(No space left"):
        fileformat.save(adapter_of("spectral-a"), path, overwrite=True)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_that_appears_while_saving_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    monkeypatch.setattr(os, "fsync", lambda *_: path.write_bytes(b"theirs"))
    with pytest.raises(SpectralAdapterError, match="created by another program"):
        fileformat.save(adapter_of("lora"), path)
    assert path.read_bytes() == b"theirs" and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def broken(change: Callable[[Adapter], Adapter]) -> Adapter:
    return change(adapter_of("lora"))


def in_first_term(**tensors: torch.Tensor) -> Callable[[Adapter], Adapter]:
    return lambda a: a.map_terms(lambda n, t: replace(t, params={**t.params, **tensors}))


SAVE_REFUSALS: list[tuple[str, Callable[[Adapter], Adapter], str]] = [
    ("a.safetensors", lambda a: Adapter({}), "nothing to save"),
    ("a.pt", lambda a: a, r"ends in \.safetensors"),
    ("nowhere/a.safetensors", lambda a: a, "folder does not exist"),
    (
        "a.safetensors",
        in_first_term(up=torch.full((13, 3), float("nan"))),
        r"to_q\.up: 39 of 39 values are NaN",
    ),
    (
        "a.safetensors",
        in_first_term(up=torch.zeros(2, 3)),
        r"to_q \(13×7\): tensor up: shape \(2, 3\), expected",
    ),
    ("a.safetensors", in_first_term(extra=torch.zeros(1)), r"tensor extra: shape \(1,\), expected None"),
    ("a.safetensors", lambda a: a.with_provenance(training={"x": float("inf")}), "cannot be written as JSON"),
    ("a.safetensors", lambda a: a.with_provenance(training={"x": object()}), "cannot be written as JSON"),
    ("a.safetensors", lambda a: replace(a, tokens={"x": {"te": torch.zeros(3)}}), r"token 'x'.*\(k, dim\)"),
    (
        "a.safetensors",
        lambda a: Adapter({"tokens.x": next(iter(a.layers.values()))}),
        "kept for trained tokens",
    ),
    ("a.safetensors", lambda a: a.with_provenance(name="\ud800"), "cannot be written as UTF-8"),
]


@pytest.mark.parametrize(("name", "change", "message"), SAVE_REFUSALS)
def test_what_could_not_be_loaded_is_not_saved(
    tmp_path: Path, name: str, change: Callable[[Adapter], Adapter], message: str
) -> None:
    with pytest.raises(SpectralAdapterError, match=message):
        fileformat.save(broken(change), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_words_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    broken = replace(adapter_of("lora"), tokens={"<x>": {"text_encoder": torch.full((1, 4), float("nan"))}})
    with pytest.raises(
        SpectralAdapterError, match=r"a\.safetensors: tensor tokens\.text_encoder.*4 of 4 values are NaN"
    ):
        fileformat.save(broken, tmp_path / "a.safetensors")
    assert not any(tmp_path.iterdir())


def test_float16_overflow_is_refused_with_its_layer(tmp_path: Path) -> None:
    adapter = in_first_term(up=torch.full((13, 3), 1e6))(adapter_of("lora"))
    with pytest.raises(SpectralAdapterError, match=r"to_q\.up.*dtype is too narrow"):
        fileformat.save(adapter, tmp_path / "a.safetensors", dtype=torch.float16)


# --- compact Spectral R ---------------------------------------------------------------------------


def steep(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights with separated singular values, as trained networks have them."""
    generator = Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(48, 40, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(40, 40, generator=generator))[0]
    return {"unet.a.to_q": (u * (10 * 0.7 ** torch.arange(40.0))) @ v.mT}


@pytest.mark.parametrize("scale", [False, True])
def test_compact_files_find_their_basis_again(tmp_path: Path, scale: bool) -> None:
    base = steep()
    adapter = trained(SpectralRConfig((0, 1, 2), train_scale=scale), base)
    path = fileformat.save(adapter, tmp_path / "a.safetensors", compact=True)
    whole = fileformat.save(adapter, tmp_path / "whole.safetensors")
    assert "unet.a.to_q.u" in open_safely(whole).entries and "unet.a.to_q.u" not in open_safely(path).entries
    with pytest.raises(SpectralAdapterError, match=r"compact file.*weights=…\).*unet\.a\.to_q"):
        fileformat.load(path)
    for given_weights in (base, base.__getitem__):
        loaded = fileformat.read(path, given_weights)
        assert loaded.notes == ()
        a, b = (x.layers["unet.a.to_q"].factors() for x in (loaded.adapter, adapter))
        torch.testing.assert_close(a.up @ a.down, b.up @ b.down, atol=2e-4, rtol=1e-4)
    rough = {
        k: v + 0.02 * v.std() * torch.randn(v.shape, generator=Generator().manual_seed(1))
        for k, v in base.items()
    }
    (note,) = fileformat.read(path, rough).notes
    assert "differs a little" in note and "unet.a.to_q" in note
    with pytest.raises(SpectralAdapterError, match=r"unet\.a\.to_q: the model is not the one"):
        fileformat.load(path, steep(seed=5))
    with pytest.raises(SpectralAdapterError, match=r"unet\.a\.to_q: the model's weight is \(3, 3\)"):
        fileformat.load(path, {"unet.a.to_q": torch.zeros(3, 3)})
    with pytest.raises(SpectralAdapterError, match=r"unet\.a\.to_q: its weight is not among"):
        fileformat.load(path, {})


def test_compact_leaves_other_methods_whole(tmp_path: Path) -> None:
    adapter = adapter_of("spectral-a")
    assert_equal(fileformat.load(fileformat.save(adapter, tmp_path / "a.safetensors", compact=True)), adapter)


# --- refusals of the reader -----------------------------------------------------------------------

HEADS: list[tuple[bytes, str]] = [
    (b"", "is empty"),
    (b"PK\x03\x04" + b"\0" * 30, r"\.ckpt.*never read"),
    (b"\x80\x02}q\x00.", "pickle"),
    (b"GGUF\x03\0\0\0" + b"\0" * 8, "GGUF"),
    (b"<!DOCTYPE html><html>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    (b'{"a": 1}', "JSON text"),
    (b"\x00" * 7, "truncated"),
    (b"\xff" * 64, "truncated"),
    ((640).to_bytes(8, "little") + b"{", "truncated"),
]


@pytest.mark.parametrize(("head", "message"), HEADS)
def test_other_kinds_of_files_are_told_by_their_first_bytes(
    tmp_path: Path, head: bytes, message: str
) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(head)
    with pytest.raises(SpectralAdapterError, match=rf"odd\.safetensors: .*{message}"):
        fileformat.load(path)


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = b'{"__metadata__":{}}'
    path.write_bytes(
        (640).to_bytes(8, "little") + header + b" " * (640 - len(header))
    )  # 0x80 0x02, as protocol 2
    with pytest.raises(SpectralAdapterError, match="without any tensor"):
        fileformat.load(path)


FAMILIES = [
    ("lora_unet_a.lora_up.weight", "a LoRA file: import it"),
    ("unet.a.lora_A.weight", "a LoRA file: import it"),
    ("lora_unet_a.dora_scale", "a DoRA file"),
    ("lora_unet_a.hada_w1_a", "a LoHa file"),
    ("lora_unet_a.lokr_w1", "a LoKr file"),
    ("lora_unet_a.oft_blocks", "a BOFT or OFT file"),
    ("emb_params", "textual inversion"),
    ("model.diffusion_model.input_blocks.0.0.weight", "a whole checkpoint"),
    ("down_blocks.0.resnets.0.conv1.weight", "a diffusers UNet"),
    ("something", "not known here"),
]


@pytest.mark.parametrize(("key", "message"), FAMILIES)
def test_other_families_are_told_by_their_tensors(tmp_path: Path, key: str, message: str) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({key: torch.zeros(2, 2)}, path)
    with pytest.raises(SpectralAdapterError, match=message):
        fileformat.load(path)


def test_missing_paths_and_folders(tmp_path: Path) -> None:
    fileformat.save(adapter_of("lora"), tmp_path / "kitten.safetensors")
    with pytest.raises(SpectralAdapterError, match=r"no such file; did you mean kitten\.safetensors"):
        fileformat.load(tmp_path / "kiten.safetensors")
    with pytest.raises(SpectralAdapterError, match=r"nowhere does not exist"):
        fileformat.load(tmp_path / "nowhere" / "a.safetensors")
    with pytest.raises(SpectralAdapterError, match="is a folder"):
        fileformat.load(tmp_path)
    for odd in ("a\0b", "x" * 5000):
        with pytest.raises(SpectralAdapterError):
            fileformat.load(tmp_path / odd)


def rewrite(path: Path, tensors: Callable[[dict[str, Any]], None], config: Callable[[Any], None]) -> Path:
    """The file with its tensors and its configuration edited."""
    file = open_safely(path)
    values = file.read()
    tensors(values)
    parsed = json.loads(file.metadata[fileformat.CONFIG_KEY])
    config(parsed)
    metadata = {**file.metadata, fileformat.CONFIG_KEY: json.dumps(parsed)}
    return safewrite.write(values, metadata, path, overwrite=True)


def nothing(_: Any) -> None:
    return None


def put(place: str, value: Any) -> Callable[[Any], None]:
    """Set an entry of the configuration by its path."""

    def change(config: Any) -> None:
        *path, last = place.split("/")
        for step in path:
            config = config[int(step)] if isinstance(config, list) else config[step]
        config[int(last) if isinstance(config, list) else last] = value

    return change


BAD_TENSORS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("lora", lambda t: t.pop(f"{NAME}.up"), rf"tensor '{NAME}\.up' is missing"),
    ("lora", lambda t: t.update(more=torch.zeros(2)), "tensor 'more' belongs to no layer"),
    (
        "lora",
        lambda t: t.update({f"{NAME}.up": torch.zeros(13, 4)}),
        r"to_q\.up: shape \(13, 4\), expected \(13, 3\)",
    ),
    (
        "lora",
        lambda t: t.update({f"{NAME}.up": torch.zeros(13, 3, dtype=torch.int32)}),
        r"to_q\.up: dtype torch\.int32",
    ),
    (
        "lora",
        lambda t: t[f"{NAME}.up"].__setitem__((2, 1), float("inf")),
        r"to_q\.up: 1 of 39 values are NaN",
    ),
    ("foura-frozen", lambda t: t[f"{NAME}.gate.mask"].fill_(0.5), r"gate\.mask: expected only 0"),
    ("foura-adaptive", lambda t: t[f"{NAME}.gate.mean_open"].fill_(1.5), "mean openings between 0 and 1"),
    ("spectral-a", lambda t: t[f"{NAME}.s"].neg_(), "singular values of at least 0"),
]


@pytest.mark.parametrize(("case", "change", "message"), BAD_TENSORS)
def test_bad_tensors_are_refused_with_their_names(
    tmp_path: Path, case: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = fileformat.save(adapter_of(case), tmp_path / "a.safetensors")
    rewrite(path, change, nothing)
    with pytest.raises(SpectralAdapterError, match=rf"a\.safetensors: .*{message}"):
        fileformat.load(path)


BAD_CONFIGS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("lora", put("configurations/0/method", "magic"), "unknown method 'magic'"),
    ("lora", put("configurations/0/method", []), "a method configuration"),
    ("lora", put("configurations/0/speed", 1), "unknown setting 'speed'"),
    ("lora", put("configurations/0/rank", 0), "rank 0"),
    ("lora", put("configurations/0/rank", 2**62), "expected"),
    ("lora", put("configurations/0/alpha", {}), "alpha"),
    ("lora", put("configurations/0/alpha", "x"), "alpha"),
    ("lora", lambda c: c["configurations"][0].pop("rank"), "incomplete or mistyped"),
    ("spectral-r", put("configurations/0/train_scale", 1), "expected true or false"),
    ("spectral-r", put("configurations/0/columns", [0, 0, 1]), "distinct indices"),
    ("spectral-r", put("configurations/0/columns", [0, 1, 7]), "singular column 7 of 7"),
    ("lora", put(f"layers/{NAME}/shape", [13]), "shape: found"),
    ("lora", put(f"layers/{NAME}/shape", [13, -7]), "shape: found"),
    ("lora", put(f"layers/{NAME}/shape", [13, 8]), r"to_q\.down: shape \(3, 7\), expected \(3, 8\)"),
    ("lora", put(f"layers/{NAME}/terms", [1]), "terms: found"),
    ("lora", put(f"layers/{NAME}/terms", []), "terms: found"),
    ("lora", put(f"layers/{NAME}/terms", [True]), "terms: found"),
    ("lora", put(f"layers/{NAME}/weights", [1, 2]), "weights: found"),
    ("lora", put("layers/noname", {"shape": [1, 1], "terms": [0]}), "layer name 'noname'"),
    ("lora", put("layers/unet.x[0:4]", {"shape": [13, 7], "terms": [0]}), "its rows' count"),
    ("lora", put("layers/unet.x[0:" + "9" * 5000 + "]", {"shape": [13, 7], "terms": [0]}), "1000 letters"),
    ("lora", put("layers/tokens.x", {"shape": [13, 7], "terms": [0]}), "kept for trained tokens"),
    ("lora", put("strength", "strong"), "strength: found 'strong'"),
    ("lora", put("layer_strengths", [["a", "b"]]), "layer_strengths"),
    ("lora", put("schedule", [[0.5, 1], [0.2, 1]]), "ascending"),
    ("lora", put("schedule", [[0.5]]), "schedule"),
    ("lora", put("provenance/name", 3), "provenance: name"),
    ("lora", put("provenance/extra", 3), "provenance"),
    ("lora", put("tokens", [{"token": "", "parts": ["a"]}]), "word that occurs once"),
    ("lora", put("tokens", [{"token": "x", "parts": ["a"]}]), r"tokens\.a\.0' is missing"),
    ("lora", put("compact_seed", -1), "compact_seed"),
    ("lora", put("more", 1), "missing or unknown entries: more"),
    ("lora", lambda c: c.pop("layers"), "missing or unknown entries: layers"),
]


@pytest.mark.parametrize(("case", "change", "message"), BAD_CONFIGS)
def test_bad_configurations_are_refused(
    tmp_path: Path, case: str, change: Callable[[Any], None], message: str
) -> None:
    path = fileformat.save(adapter_of(case), tmp_path / "a.safetensors")
    rewrite(path, nothing, change)
    with pytest.raises(SpectralAdapterError, match=rf"(?s)a\.safetensors: .*{message}"):
        fileformat.load(path)


@pytest.mark.parametrize(
    ("version", "message"),
    [("2", "newer version: update"), ("0", "damaged"), ("x", "damaged"), ("9" * 5000, "damaged")],
)
def test_other_versions(tmp_path: Path, version: str, message: str) -> None:
    path = fileformat.save(adapter_of("lora"), tmp_path / "a.safetensors")
    file = open_safely(path)
    safewrite.write(file.read(), {**file.metadata, fileformat.VERSION_KEY: version}, path, overwrite=True)
    with pytest.raises(SpectralAdapterError, match=rf"format version .*{message}"):
        fileformat.load(path)


def raw(header: str, data: bytes = b"") -> bytes:
    body = header.encode()
    return len(body).to_bytes(8, "little") + body + data


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
BAD_HEADERS = [
    (raw(f'{{"a":{ENTRY},"a":{ENTRY}}}', b"\0" * 4), "'a' is given twice"),
    (raw("[]"), "expected an object"),
    (raw("{ "), "not valid JSON"),
    (raw("{'a':1}"), "not valid JSON"),
    (raw('{"a":' + "[" * 100_000 + "}"), "not valid JSON"),
    (raw('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,NaN]}}'), "NaN is not allowed"),
    (raw('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e999]}}'), "1e999 is not allowed"),
    (raw('{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,4]}}'), "is not allowed"),
    (raw('{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4), "unknown dtype 'F99'"),
    (raw('{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', b"\0" * 4), "unknown dtype"),
    (raw('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"\0" * 4), "needs 8 bytes"),
    (raw('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"\0" * 4), r"shape \[-1\]"),
    (raw('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', b"\0" * 4), r"shape \[True\]"),
    (raw('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', b"\0" * 4), "data_offsets"),
    (raw('{"a":{"dtype":"F32","shape":[1]}}', b"\0" * 4), "expected exactly dtype"),
    (raw(f'{{"a":{ENTRY}}}', b"\0" * 3), "truncated or padded"),
    (raw(f'{{"a":{ENTRY}}}', b"\0" * 9), "truncated or padded"),
    (raw(f'{{"a":{ENTRY},"b":{ENTRY}}}', b"\0" * 8), "an overlap or a gap"),
    (raw('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"\0" * 8), "an overlap or a gap"),
    (raw('{"__metadata__":{"a":1}}'), "not a table of words"),
    (raw('{"__metadata__":[]}'), "not a table of words"),
    (len(b'{"a":"\xff"}').to_bytes(8, "little") + b'{"a":"\xff"}', "not valid JSON"),
]


@pytest.mark.parametrize(("content", "message"), BAD_HEADERS)
def test_bad_headers(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(SpectralAdapterError, match=rf"a\.safetensors: .*{message}"):
        open_safely(path)


# --- any bytes ------------------------------------------------------------------------------------

FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def good_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    adapter = everything().only(["unet.block.0.*", "unet.block.4.*", "unet.block.11.*", "text*"])
    return fileformat.save(adapter, tmp_path_factory.mktemp("good") / "a.safetensors").read_bytes()


def load_or_refuse(path: Path, content: bytes) -> None:
    """Either a sound adapter, which can be folded and saved again, or the one exception."""
    path.write_bytes(content)
    try:
        adapter = fileformat.load(path)
    except SpectralAdapterError as error:
        assert str(path) in str(error)
        return
    for layer in adapter.layers.values():
        for term in layer.terms:
            assert term.factors(layer.shape).shape == layer.shape
    fileformat.inspect(path)


@FEW
@given(data=st.data())
def test_flipped_bytes(tmp_path: Path, good_file: bytes, data: st.DataObject) -> None:
    content = bytearray(good_file)
    header = int.from_bytes(good_file[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(content) - 1)))
        content[place] = data.draw(st.integers(0, 255))
    load_or_refuse(tmp_path / "a.safetensors", bytes(content))


@FEW
@given(data=st.data())
def test_cut_and_joined_bytes(tmp_path: Path, good_file: bytes, data: st.DataObject) -> None:
    cuts = st.integers(0, len(good_file))
    content = good_file[: data.draw(cuts)] + data.draw(st.binary(max_size=40)) + good_file[data.draw(cuts) :]
    load_or_refuse(tmp_path / "a.safetensors", content)


@FEW
@given(st.binary(max_size=200))
def test_arbitrary_bytes(tmp_path: Path, content: bytes) -> None:
    load_or_refuse(tmp_path / "a.safetensors", content)


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


@settings(parent=FEW, max_examples=300)
@given(data=st.data())
def test_arbitrary_json_anywhere_in_the_configuration(
    tmp_path: Path, good_file: bytes, data: st.DataObject
) -> None:
    size = int.from_bytes(good_file[:8], "little")
    header = json.loads(good_file[8 : 8 + size])
    config = json.loads(header["__metadata__"][fileformat.CONFIG_KEY])
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(places(config)[1:]))
        target = config
        for step in place[:-1]:
            target = target[step]
        if data.draw(st.booleans()):
            target[place[-1]] = data.draw(json_values)
        else:
            del target[place[-1]]
    header["__metadata__"][fileformat.CONFIG_KEY] = json.dumps(config)
    body = json.dumps(header).encode()
    load_or_refuse(tmp_path / "a.safetensors", len(body).to_bytes(8, "little") + body + good_file[8 + size :])


@settings(parent=FEW, max_examples=100)
@given(data=st.data())
def test_arbitrary_json_anywhere_in_the_header(tmp_path: Path, good_file: bytes, data: st.DataObject) -> None:
    size = int.from_bytes(good_file[:8], "little")
    header = json.loads(good_file[8 : 8 + size])
    *path, last = data.draw(st.sampled_from(places(header)[1:]))
    target = header
    for step in path:
        target = target[step]
    target[last] = data.draw(json_values)
    body = json.dumps(header).encode("utf-8", "replace")
    load_or_refuse(tmp_path / "a.safetensors", len(body).to_bytes(8, "little") + body + good_file[8 + size :])
