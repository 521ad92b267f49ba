"""`Pretrained`: what the UNet and the first stages share to be made from, and written as, what other programs know."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ldm_fast.configs.first_stage import VQConfig
from ldm_fast.files.atomic import write_atomically
from ldm_fast.files.model_folder import remove_weights, weight_files, write_weights
from ldm_fast.files.tensors import CheckpointError, read_json, read_shards, read_tensors, write_tensors
from ldm_fast.interop import compvis, diffusers
from ldm_fast.interop.diffusers import ModelConfig
from ldm_fast.interop.layer_stand_ins import stand_in_layers
from ldm_fast.interop.names import (
    UNET_PREFIX,
    Config,
    Entry,
    check_names,
    current_names,
    from_compvis,
    layout,
    to_compvis,
    without_training_state,
)
from ldm_fast.interop.stand_ins import entries_of, stand_in
from ldm_fast.models.recompute import set_recompute

M = TypeVar("M", bound="Pretrained")
N = TypeVar("N", bound=nn.Module)

SAVED_LAYOUTS = ("diffusers", "compvis")
COMPVIS_WEIGHTS = "model.safetensors"
STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # dtypes that a model can compute in


class Pretrained(nn.Module):
    """A model that diffusers and the original code know, too. A subclass is built from its configuration alone.

    Loaded models are in eval mode and have the checkpoint's dtype.
    """

    config_class: ClassVar[type]
    stands_for: ClassVar[tuple[str, ...]]  # names of the classes of diffusers whose place it takes
    compvis_prefix: ClassVar[str] = ""  # of parameter names in a file of the original code that holds this model alone
    config: Any  # of `config_class`; that of a model in a diffusers pipeline is the pipeline's dictionary

    @classmethod
    def from_config(cls: type[M], config: Mapping[str, Any]) -> M:
        """Build a model with random weights from a dictionary like diffusers' config.json.

        Keys that start with "_" are ignored, but for `_class_name`. ValueError names a key that we do not know or whose
        value we cannot honour.
        """
        return cls(cls._read_config(config))

    @classmethod
    def from_pretrained(
        cls: type[M],
        path: str | Path,
        subfolder: str | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> M:
        """Load the model from a folder that diffusers or `save_pretrained` wrote (config.json and weights).

        Only local folders are read. `variant` is a part of the weights' file name ("fp16"); the weights are cast to
        `torch_dtype`. They are mapped into memory: the file must stay as it is while they are in use.

        Raises:
            FileNotFoundError: there is no such folder.
            CheckpointError (a ValueError): config or weights are missing, damaged or do not fit; every key is named.
        """
        folder = Path(path) if subfolder is None else Path(path) / subfolder
        values, names, tensors = read_folder(folder, variant)
        try:
            config = cls._read_config(values)
        except ValueError as error:
            raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
        if names == "compvis":
            tensors = from_compvis(tensors, layout_of(cls, config), cls.__name__)
        else:
            tensors = current_names(tensors)
        return assemble(cls, config, tensors, torch_dtype, str(folder))

    @classmethod
    def from_compvis(cls: type[M], params: Mapping[str, Any] | ModelConfig, state_dict: Mapping[str, Tensor]) -> M:
        """Build the model around weights of the original code, which are shared if both lay them out alike.

        params: what the original's constructor was given (for a first stage embed_dim, ddconfig and, with a codebook,
        n_embed), or our configuration. state_dict: the original's parameter names, without the prefix that a
        checkpoint puts before them.

        Raises:
            ValueError: a parameter we cannot honour.
            CheckpointError (a ValueError): every key that is missing, unexpected or of the wrong shape.
        """
        config = cls._own(compvis.MODEL_READERS[cls.config_class](params) if isinstance(params, Mapping) else params)
        tensors = from_compvis(state_dict, layout_of(cls, config), cls.__name__)
        return assemble(cls, config, tensors, None, f"{cls.__name__}.from_compvis")

    @classmethod
    def from_diffusers(cls, module: nn.Module) -> Any:
        """Build our model with the configuration and the weights of a diffusers module; the tensors are shared.

        The result also stands for the module in diffusers' pipelines (see `interop.stand_ins`).

        Raises:
            TypeError: the module's class is not one that this class stands for.
            ValueError: a configuration we cannot honour, or weights that are wrapped (LoRA, offloading).
        """
        kind, theirs = type(module).__name__, cls.__name__ + ".from_diffusers"
        if kind not in cls.stands_for:
            raise TypeError(f"{theirs}: module must be a {' or '.join(cls.stands_for)}, got {kind}")
        values: Mapping[str, Any] = module.config  # type: ignore[assignment]  # diffusers' modules have one
        config = cls._read_config(entries_of(type(module), values))
        if any(tensor.is_meta for tensor in module.parameters()):
            raise CheckpointError(f"{theirs}: the module is offloaded; bring its weights back first")
        weights, shared = _without_adapters(module)
        model: Any = assemble(stand_in(cls, kind), config, weights, None, theirs, mixed=True)
        trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        model.describe_as(dict(values))
        for name, part in shared.items():
            setattr(model, name, part)
            model.config.encoder_hid_dim_type = "ip_image_proj"  # which loaders set as an attribute alone
        stand_in_layers(model)
        for name, layer in model.named_modules():
            if hasattr(layer, "set_processor"):  # those of others go on computing their layers
                layer.set_processor(module.get_submodule(name).get_processor())  # type: ignore[operator]
        return model.train(module.training)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        *,
        layout: str = "diffusers",
    ) -> None:
        """Write a folder with config.json and the weights, each file whole or not at all. Arguments as in diffusers.

        Args:
            save_directory: the folder.
            is_main_process: False writes the weights alone and removes nothing.
            save_function: without effect, as in diffusers.
            safe_serialization: .safetensors files; if False, pickles (.bin).
            variant: a part of the weights' file names ("fp16"); the weights keep their dtype.
            max_shard_size: larger weights are split into files of this size, in bytes or as a string ("5GB").
            push_to_hub: refused, unless the model stands in for one of diffusers.
            layout: "diffusers", a folder that diffusers' `from_pretrained` opens; or "compvis", one .safetensors file
                with the parameter names of the original code, as its programs read them (a UNet under
                `model.diffusion_model.`).

        Raises:
            ValueError: an argument that cannot be honoured.
            CheckpointError (a ValueError): there are adapters in the model; merge or unload them first.
        """
        if layout not in SAVED_LAYOUTS:
            raise ValueError(f"save_pretrained: layout must be one of {', '.join(SAVED_LAYOUTS)}, got {layout!r}")
        if push_to_hub:
            raise ValueError("save_pretrained: push_to_hub is not supported; upload the folder once it is written")
        compvis_file = layout == "compvis"
        if compvis_file and (variant or not safe_serialization):
            raise ValueError("save_pretrained: layout='compvis' takes neither a variant nor safe_serialization=False")
        tensors = self._tensors_to_save(layout)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if compvis_file:
            write_tensors(folder / COMPVIS_WEIGHTS, tensors, {"format": "pt"})
            written = {COMPVIS_WEIGHTS}
        else:
            kind = "safetensors" if safe_serialization else "bin"
            written = write_weights(folder, tensors, kind, variant, max_shard_size)
        if not is_main_process:
            return
        for kind in ("safetensors",) if safe_serialization and not compvis_file else ("safetensors", "bin"):
            remove_weights(folder, kind, variant, keep=written)
        if not compvis_file and not variant:
            (folder / COMPVIS_WEIGHTS).unlink(missing_ok=True)
        write_atomically(folder / "config.json", self._config_text().encode())

    def _tensors_to_save(self, layout: str) -> dict[str, Tensor]:
        """Return the state dict without what only training needs. CheckpointError if there are adapters in it."""
        if layout == "compvis":
            return {self.compvis_prefix + key: tensor for key, tensor in self.to_compvis().items()}
        tensors = without_training_state(self.state_dict())
        model = _on_meta(type(self), self._own_config())  # `layout` names only what the original code has
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        check_names(tensors, shapes, f"{type(self).__name__} to save; adapters are to be merged or unloaded first")
        return tensors

    def _config_text(self) -> str:
        return json.dumps(diffusers.config_to_diffusers(self._own_config()), indent=2) + "\n"

    def to_compvis(self) -> dict[str, Tensor]:
        """Return the state dict under the names and in the shapes of the original code."""
        cls = type(self)
        return to_compvis(self.state_dict(), layout_of(cls, self._own_config()), cls.__name__)

    _supports_gradient_checkpointing = True  # diffusers asks for this name

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """In training, compute the inside of blocks twice instead of storing it; gradients are the same bit for bit.

        `gradient_checkpointing_func(module, *inputs)` takes the place of PyTorch's `checkpoint`.
        """
        set_recompute(self, True, gradient_checkpointing_func)

    def disable_gradient_checkpointing(self) -> None:
        set_recompute(self, False, None)

    @classmethod
    def _read_config(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Return our configuration, given diffusers' dictionary for a model of this class."""
        if not isinstance(config, Mapping):
            raise TypeError(f"{cls.__name__}: config must be a dictionary, got {type(config).__name__}")
        if "_class_name" not in config:
            config = {**config, "_class_name": diffusers.described_class(config, cls.stands_for)}
        return cls._own(diffusers.config_from_diffusers(config))

    @classmethod
    def _own(cls, config: ModelConfig) -> ModelConfig:
        """Return the configuration. ValueError if it is that of another model."""
        if type(config) is not cls.config_class:
            raise ValueError(f"{cls.__name__}: the configuration is that of another model, {type(config).__name__}")
        return config

    def _own_config(self) -> ModelConfig:
        return self._read_config(self.config) if isinstance(self.config, Mapping) else self._own(self.config)


def _without_adapters(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, nn.Module]]:
    """Return the weights of a diffusers module but those in processors, and the modules that IP-Adapters added."""
    shared: dict[str, nn.Module] = {}
    if getattr(module.config, "encoder_hid_dim_type", None) == "ip_image_proj":
        names = ("encoder_hid_proj", "text_encoder_hid_proj")
        shared = {name: part for name, part in module.named_children() if name in names}
    left = tuple(f"{name}." for name in shared)
    state = module.state_dict()
    weights = {name: t for name, t in state.items() if ".processor." not in name and not name.startswith(left)}
    return weights, shared


def read_folder(folder: Path, variant: str | None) -> tuple[dict[str, Any], str, dict[str, Tensor]]:
    """Return (config.json, whose names the weights have, weights without prefix) of a model's folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; models are read from local folders, nothing is downloaded")
    config = read_json(folder / "config.json")
    for kind in ("safetensors", "bin"):
        file, index = (folder / name for name in weight_files(kind, variant))
        if file.is_file():
            return config, "diffusers", read_tensors(file).tensors
        if index.is_file():
            return config, "diffusers", read_shards(index).tensors
    if not variant and (folder / COMPVIS_WEIGHTS).is_file():
        tensors = read_tensors(folder / COMPVIS_WEIGHTS).tensors
        return config, "compvis", {name.removeprefix(UNET_PREFIX): tensor for name, tensor in tensors.items()}
    there = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    wanted, _ = weight_files("safetensors", variant)
    raise CheckpointError(f"{folder} holds no {wanted}; weights there: {', '.join(there) or 'none'}")


def layout_of(build: Callable[[Any], nn.Module], config: Config) -> tuple[Entry, ...]:
    """Return the `layout` of the model that `build` makes of `config`, without allocating weights."""
    return _layout_of(build, config)


@functools.lru_cache(maxsize=32)
def _layout_of(build: Callable[[Any], nn.Module], config: Config) -> tuple[Entry, ...]:
    return layout(_on_meta(build, config), config)


def _on_meta(build: Callable[[Any], N], config: Any) -> N:
    """Return the trained model that `build` makes of `config`, without memory for weights."""
    with torch.device("meta"):
        return build(config.trained if isinstance(config, VQConfig) else config)


def assemble(
    build: type[N],
    config: Any,
    state_dict: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    origin: str,
    mixed: bool = False,
) -> N:
    """Return build(config) around these very tensors, not copied (unless cast to `dtype`), in eval mode.

    The model is built on the meta device, so nothing is allocated for it. `origin` is named in errors. With `mixed`,
    tensors may be of different dtypes.

    Raises CheckpointError: keys missing, unexpected or of the wrong shape, all named; dtypes that differ.
    """
    with torch.device("meta"):
        model = build(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_names(state_dict, expected, f"state dict of this {build.__name__}, {origin}")
    model.load_state_dict(state_dict if mixed else one_dtype(state_dict, dtype, origin), assign=True)
    return model.eval()


def one_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, origin: str) -> dict[str, Tensor]:
    """Return the tensors in `dtype`, or by default in their own. CheckpointError if they have several."""
    found: dict[torch.dtype, list[str]] = {}
    for name, tensor in tensors.items():
        found.setdefault(tensor.dtype, []).append(name)
    whole = [names[0] for kind, names in found.items() if not kind.is_floating_point]
    if whole:
        raise CheckpointError(
            f"{origin}: weights must be floating point numbers, but {whole[0]} is {tensors[whole[0]].dtype}"
        )
    if dtype is not None:
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if len(found) > 1:
        kinds = ", ".join(f"{len(names)} {kind} ({names[0]}, …)" for kind, names in found.items())
        raise CheckpointError(f"{origin}: weights of different dtypes: {kinds}; choose one by torch_dtype")
    if not found.keys() <= set(STORED):
        raise CheckpointError(f"{origin}: weights are {next(iter(found))}; choose by torch_dtype what to compute in")
    return dict(tensors)
