"""An adapter's file: one ``.safetensors`` for all of it.

Tensors are ``<layer>.<tensor>`` (``unet.down_blocks.0….attn1.to_q.a``), with several terms per layer
``<layer>.term<k>.<tensor>``, and ``tokens.<part>.<index>`` for trained words. The metadata holds
``spectral_adapters.version``, ``spectral_adapters.config`` (:mod:`.config`) and what other programs show
(:mod:`.metadata`). Spectral files carry their basis, because it cannot be found again from a weight that
was rounded; Spectral R may leave it out (``compact``) and carries projections of it instead
(:mod:`..maths.realign`).

With ``config_tensor`` the configuration is in the file a second time, as bytes (n,) uint8, and must agree.

Every tensor is stored in its own dtype, so a round trip is equal to the bit. With a ``dtype`` the matrices
are rounded to it; what is small and decides much stays in float32: gates, singular values, rotations,
projections.

Shapes: those of each method's ``tensor_shapes``; tokens (k, dim).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..adapter.adapter import Adapter, AdapterLayer, Term, require_adapter
from ..errors import SpectralAdapterError
from ..maths.layers import LayerShape
from ..methods import SpectralRConfig, method_of
from ..words import OneLine
from . import checks as file_checks
from . import compact as compact_form
from . import config as file_config
from . import metadata as file_metadata
from . import other_kinds as foreign
from . import writing as safewrite
from .compact import Weights
from .config import FileConfig, LayerPlan, TermPlan
from .container import Entry, SafeFile, open_safely
from .lazy_tensors import FileTensors, LazyParams
from .writing import Later

VERSION = "1"
VERSION_KEY = "spectral_adapters.version"
CONFIG_KEY = "spectral_adapters.config"


@dataclass(frozen=True, repr=False)
class Loaded(OneLine):
    """A file's adapter; ``notes`` says what the user should know (a base that fits only roughly, …)."""

    adapter: Adapter
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Summary(OneLine):
    """What a file says about itself; no tensor was read."""

    path: Path
    name: str
    family: str
    methods: tuple[str, ...]
    parts: tuple[str, ...]
    layers: Mapping[str, LayerPlan]
    ranks: tuple[int, int]
    parameter_count: int
    tokens: tuple[str, ...]
    trigger_words: tuple[str, ...]
    is_compact: bool
    dtypes: tuple[str, ...]
    file_bytes: int
    header_bytes: int
    config: FileConfig
    metadata: Mapping[str, str]

    def __str__(self) -> str:
        low, high = self.ranks
        rank = f"{low}" if low == high else f"{low} to {high}"
        lines = [
            f"{self.name}: {' and '.join(self.methods) or 'no layers'}, {len(self.layers)} layers of "
            f"{', '.join(self.parts) or 'nothing'}, rank {rank}, {self.parameter_count:,} trained numbers, "
            f"{self.file_bytes:,} bytes",
        ]
        words = dict.fromkeys((*self.trigger_words, *self.tokens))
        return "\n".join([*lines, f"words: {', '.join(words)}"] if words else lines)


def save(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    compact: bool = False,
    dtype: torch.dtype | None = None,
    config_tensor: bool = False,
) -> Path:
    """Write an adapter to a ``.safetensors`` file, atomically.

    compact: leave out the bases of Spectral R layers; loading then needs the base model's weights. dtype:
    round the matrices to float16 or bfloat16 (default: every tensor as it is). config_tensor: write the
    configuration a second time, as the bytes of a tensor, for programs that are given tensors only
    (:func:`from_tensors`); a compact file cannot be used so. Raises SpectralAdapterError for a file that
    exists (unless ``overwrite``), a folder that cannot be written, and an adapter that could not be loaded
    again.

    >>> import torch, spectral_core as sc
    >>> adapter = sc.create({"unet.to_q": torch.randn(8, 6)}, sc.LoRAConfig(rank=2))
    >>> sc.load(sc.save(adapter, "new.safetensors")).content_hash == adapter.content_hash
    True
    >>> sc.inspect("new.safetensors").methods
    ('lora',)
    """
    require_adapter(adapter)
    path = Path(path)
    if not adapter.layers and not adapter.tokens:
        raise SpectralAdapterError(
            f"{path}: the adapter has no layers and no tokens: there is nothing to save"
        )
    if dtype is not None and dtype not in file_checks.STORED:
        raise SpectralAdapterError(f"{path}: dtype {dtype}: expected float32, float16 or bfloat16")
    config = file_config.of_adapter(adapter, compact_form.SEED if compact else None)
    tensors: dict[str, Tensor | Later] = {}
    for name, layer in adapter.layers.items():
        file_config.check_name(name)
        for k in range(len(layer.terms)):
            _add(tensors, _term_tensors(path, name, k, layer, dtype, compact))
    words = _token_tensors(adapter, dtype)
    _check_values(path, words)
    _add(tensors, words)
    text = file_config.to_json(config)
    file_config.from_json(text)  # what could not be read again is not written
    if config_tensor and not compact:
        _add(tensors, {CONFIG_KEY: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)})
    shown = file_metadata.describe(adapter, path.stem, "spectral_adapters", "spectral-adapter")
    return safewrite.write(tensors, shown | {VERSION_KEY: VERSION, CONFIG_KEY: text}, path, overwrite)


def load(path: str | os.PathLike[str], weights: Weights | None = None, lazy: bool = False) -> Adapter:
    """The adapter of a file. ``weights`` is needed for compact files only; see :func:`read` for its notes.

    >>> import torch, spectral_core as sc
    >>> made = sc.create({"unet.to_q": torch.randn(8, 6)}, sc.LoRAConfig(rank=2))
    >>> sc.load(sc.save(made, "mine.safetensors"))
    Adapter('': 1 layers, lora)
    """
    return read(path, weights, lazy).adapter


def read(path: str | os.PathLike[str], weights: Weights | None = None, lazy: bool = False) -> Loaded:
    """The adapter of a file, and what the user should know about it. lazy: its tensors are read, and checked,
    whenever they are asked for, for work that goes from layer to layer.

    Raises SpectralAdapterError that names the file and the layer, what was found and what was expected, for
    any file that is not a sound adapter of this format.
    """
    file, config = _open(path)
    expected = _checked_entries(file, config)
    if not lazy:
        return _adapter(file.path, config, file.read(expected), weights)

    def check(key: str, value: Tensor) -> None:
        file_checks.check_values(f"{file.path}: tensor {key}", key, value)

    return _adapter(file.path, config, FileTensors(file, expected, check), weights)


def from_tensors(tensors: Mapping[str, Tensor], name: str) -> Loaded:
    """The adapter of a file that was saved with ``config_tensor``, from its tensors alone.

    name: what the file is called in errors. Raises SpectralAdapterError as :func:`read` does.
    """
    path = Path(name)
    stored = tensors.get(CONFIG_KEY)
    if stored is None or stored.dtype != torch.uint8 or stored.dim() != 1:
        raise SpectralAdapterError(
            f"{path}: no tensor {CONFIG_KEY} of bytes: expected a file saved with its configuration in one"
        )
    config = _config(path, bytes(stored.cpu().numpy()))
    values = {key: value for key, value in tensors.items() if key != CONFIG_KEY}
    entries = {key: Entry(value.dtype, tuple(value.shape), 0, 0) for key, value in values.items()}
    _checked_entries(SafeFile(path, entries, {}, 0), config)
    return _adapter(path, config, values, None)


def _checked_entries(file: SafeFile, config: FileConfig) -> list[str]:
    """The names of the tensors that the configuration promises, each of its shape and dtype."""
    expected = file_checks.expected_tensors(file.path, config)
    file_checks.check_names(file, expected)
    for key, shapes in expected.items():
        file_checks.check_entry(file, key, shapes)
    return list(expected)


def _adapter(
    path: Path, config: FileConfig, tensors: Mapping[str, Tensor], weights: Weights | None
) -> Loaded:
    """The adapter that a configuration and its tensors are."""
    lazy = isinstance(tensors, FileTensors)  # checks each when it is read
    for key, value in () if lazy else tensors.items():
        file_checks.check_values(f"{path}: tensor {key}", key, value)
    layers: dict[str, AdapterLayer] = {}
    notes: list[str] = []
    for name, plan in config.layers.items():
        terms = []
        for k, term in enumerate(plan.terms):
            prefix = file_checks.prefix(name, k, len(plan.terms))
            names = list(file_checks.term_shapes(config, plan.shape, term))
            params: Mapping[str, Tensor] = LazyParams(tensors, prefix, names)
            if not lazy:
                params = {key: tensors[prefix + key] for key in names}
            if file_checks.is_compact(config, term):
                assert isinstance(term.config, SpectralRConfig) and config.compact_seed is not None
                weight = compact_form.base_weight(path, weights, name)
                params, note = compact_form.unpack(
                    term.config, plan.shape, params, f"{path}: layer {name}", weight, config.compact_seed
                )
                notes += [note] if note else []
            terms.append(Term(term.config, params, term.weight))
        layers[name] = AdapterLayer(plan.shape, tuple(terms))
    tokens = {
        word: {part: tensors[file_checks.token_key(part, i)] for part in parts}
        for i, (word, parts) in enumerate(config.tokens)
    }
    adapter = Adapter(
        layers, config.provenance, config.strength, config.layer_strengths, config.schedule, tokens
    )
    return Loaded(adapter, tuple(notes))


def inspect(path: str | os.PathLike[str]) -> Summary:
    """What a file says about itself, from its header alone. Raises as :func:`read` does.

    >>> import torch, spectral_core as sc
    >>> made = sc.create({"unet.to_q": torch.randn(8, 6)}, sc.LoRAConfig(rank=2))
    >>> summary = sc.inspect(sc.save(made, "told.safetensors"))
    >>> summary.methods, summary.parameter_count
    (('lora',), 28)
    """
    file, config = _open(path)
    expected = file_checks.expected_tensors(file.path, config)
    file_checks.check_names(file, expected)
    terms = [(plan.shape, term) for plan in config.layers.values() for term in plan.terms]
    ranks = [term.config.rank for _, term in terms] or [0]
    methods = dict.fromkeys(term.config.method for _, term in terms)
    parts = dict.fromkeys(file_config.check_name(name).part for name in config.layers)
    return Summary(
        file.path,
        config.provenance.name or file.path.stem,
        config.provenance.family,
        tuple(methods),
        tuple(parts),
        config.layers,
        (min(ranks), max(ranks)),
        sum(_trained(shape, term) for shape, term in terms),
        tuple(word for word, _ in config.tokens),
        config.provenance.trigger_words,
        config.compact_seed is not None,
        tuple(sorted({str(e.dtype).removeprefix("torch.") for e in file.entries.values()})),
        file.path.stat().st_size,
        file.data_start,
        config,
        file.metadata,
    )


def is_adapter_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that it is one of this format; never raises, whatever the file is."""
    try:
        return VERSION_KEY in open_safely(path).metadata
    except SpectralAdapterError:
        return False


def _open(path: str | os.PathLike[str]) -> tuple[SafeFile, FileConfig]:
    """The checked header and configuration of a file of this format and version."""
    file = open_safely(path)
    version = file.metadata.get(VERSION_KEY)
    if version is None:
        raise SpectralAdapterError(
            f"{file.path}: is {foreign.family(file.entries)}; expected an adapter saved by this project "
            f"(metadata {VERSION_KEY})"
        )
    if version != VERSION:
        newer = version.isascii() and version.isdecimal() and len(version) < 9 and int(version) > int(VERSION)
        advice = (
            "it was made by a newer version: update this package" if newer else "it is damaged or not of ours"
        )
        raise SpectralAdapterError(
            f"{file.path}: format version {version!r:.40}, expected {VERSION!r}: {advice}"
        )
    if CONFIG_KEY not in file.metadata:
        raise SpectralAdapterError(f"{file.path}: the metadata has no {CONFIG_KEY}: the file is damaged")
    try:
        text = file.metadata[CONFIG_KEY].encode()
    except UnicodeEncodeError as error:
        raise SpectralAdapterError(f"{file.path}: damaged configuration: {error}") from error
    config = _config(file.path, text)
    if CONFIG_KEY in file.entries:
        file = _without_config_tensor(file, text)
    return file, config


def _config(path: Path, text: bytes) -> FileConfig:
    try:
        return file_config.from_json(text.decode())
    except (SpectralAdapterError, UnicodeDecodeError) as error:
        raise SpectralAdapterError(f"{path}: damaged configuration: {error}") from error


def _without_config_tensor(file: SafeFile, text: bytes) -> SafeFile:
    """The file's other tensors; the configuration must be the same in both places."""
    entry = file.entries[CONFIG_KEY]
    fits = entry.dtype == torch.uint8 and entry.shape == (len(text),)
    if not fits or bytes(file.read([CONFIG_KEY])[CONFIG_KEY].numpy()) != text:
        raise SpectralAdapterError(
            f"{file.path}: the tensor {CONFIG_KEY} says something else than the metadata: the file is "
            "damaged or edited"
        )
    return replace(file, entries={key: e for key, e in file.entries.items() if key != CONFIG_KEY})


def _check_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key, value in tensors.items():
        file_checks.check_values(f"{path}: tensor {key}", key, value)


def _term_tensors(
    path: Path, name: str, k: int, layer: AdapterLayer, dtype: torch.dtype | None, compact: bool
) -> dict[str, Tensor | Later]:
    """A term's tensors as they are stored: looked at now, and asked for again when they are written, so that
    an adapter whose tensors are read from files takes the memory of one term, and so does one that is
    rounded."""
    term, prefix = layer.terms[k], file_checks.prefix(name, k, len(layer.terms))
    values = {key: _rounded(key, value, dtype) for key, value in term.params.items()}
    file_checks.check_term(f"{path}: layer {name}", term.config, layer.shape, values)
    is_packed = compact and compact_form.applies(term.config)
    values = compact_form.pack(values) if is_packed else values
    _check_values(path, {prefix + key: value for key, value in values.items()})
    return {prefix + key: v if is_packed else _later(term, key, dtype, v) for key, v in values.items()}


def _later(term: Term, key: str, dtype: torch.dtype | None, now: Tensor) -> Later:
    return Later(now.dtype, tuple(now.shape), lambda: _rounded(key, term.params[key], dtype))


def _add(tensors: dict[str, Tensor | Later], more: Mapping[str, Tensor | Later]) -> None:
    if twice := set(tensors) & set(more):
        raise SpectralAdapterError(f"two tensors would be called {min(twice)!r}: rename one of the layers")
    tensors.update(more)


def _token_tensors(adapter: Adapter, dtype: torch.dtype | None) -> dict[str, Tensor]:
    found = {}
    for i, (word, parts) in enumerate(adapter.tokens.items()):
        for part, rows in parts.items():
            if rows.dim() != 2:
                raise SpectralAdapterError(
                    f"token {word!r} in {part}: shape {tuple(rows.shape)}, expected (k, dim)"
                )
            found[file_checks.token_key(part, i)] = _rounded("", rows, dtype)
    return found


def _rounded(key: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor as it is stored: matrices in ``dtype``, everything else as it is."""
    is_matrix = value.dim() >= 2 and not key.startswith("gate.")
    return value.to(dtype) if dtype is not None and is_matrix else value


def _trained(shape: LayerShape, term: TermPlan) -> int:
    method = method_of(term.config)
    shapes = method.tensor_shapes(term.config, shape)
    return sum(torch.Size(shapes[key]).numel() for key in method.trainable(term.config))
