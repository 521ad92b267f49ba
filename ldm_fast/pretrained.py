"""`Pretrained`: how UNet and first stages are made from, and written as, what other programs read and write.

The imports are inside the functions: the models themselves derive from this class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ldm_fast.weights import Config

M = TypeVar("M", bound="Pretrained")

SAVED_LAYOUTS = ("diffusers", "compvis")
WEIGHTS = "diffusion_pytorch_model"  # diffusers' name of the file
COMPVIS_WEIGHTS = "model.safetensors"
STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # what can be computed in as it is


def check_positive(config: Any, *names: str) -> None:
    """ValueError where one of these fields of a configuration is not a whole number above 0."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(config).__name__}: {name} must be a positive number, got {value!r}")


class Pretrained(nn.Module):
    """Models that diffusers and the original code know, too. A subclass is built from its configuration alone.

    Loaded models are in eval mode and have the checkpoint's dtype.
    """

    @classmethod
    def from_config(cls: type[M], config: Mapping[str, Any]) -> M:
        """A model with random weights from a dictionary as in diffusers' config.json.

        Keys that start with "_" are ignored, but for `_class_name`. ValueError names a key that we do not know or whose
        value we cannot honour.
        """
        return cls(read_config(cls, config))

    @classmethod
    def from_pretrained(
        cls: type[M],
        path: str | Path,
        subfolder: str | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> M:
        """The model in a folder as diffusers writes it (config.json and weights), or `save_pretrained` does.

        Only local folders are read. `variant` is a part of the weights' file name ("fp16"), `torch_dtype` what the
        weights are cast to. The weights are mapped into memory: the file has to stay as it is while they are in use.

        Raises:
            FileNotFoundError: there is no such folder.
            CheckpointError (a ValueError): config or weights are missing, damaged or do not fit; every key is named.
        """
        from ldm_fast.files import CheckpointError
        from ldm_fast.weights import compvis_to_ours, current_names

        folder = Path(path) if subfolder is None else Path(path) / subfolder
        values, layout, tensors = read_folder(folder, variant)
        try:
            config = read_config(cls, values)
        except ValueError as error:
            raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
        tensors = compvis_to_ours(tensors, config) if layout == "compvis" else current_names(tensors)
        return assemble(cls, config, tensors, torch_dtype, str(folder))

    def save_pretrained(self, path: str | Path, layout: str = "diffusers") -> None:
        """Writes a folder with config.json and the weights as .safetensors, each file whole or not at all.

        layout: "diffusers", a folder that diffusers' `from_pretrained` opens; or "compvis", with the parameter names of
        the original code, as its programs read them (a UNet under `model.diffusion_model.`).

        Raises CheckpointError (a ValueError) where adapters are in the model: they are to be merged or unloaded first.
        """
        from ldm_fast import configs
        from ldm_fast.files import write_atomically
        from ldm_fast.tensor_files import write_tensors
        from ldm_fast.unet import UNet
        from ldm_fast.weights import UNET_PREFIX, check_names, without_training_state
        from ldm_fast.weights import layout as tensors_of

        if layout not in SAVED_LAYOUTS:
            raise ValueError(f"save_pretrained: layout must be one of {', '.join(SAVED_LAYOUTS)}, got {layout!r}")
        config = self._own_config()
        if layout == "diffusers":
            name, tensors = f"{WEIGHTS}.safetensors", without_training_state(self.state_dict())
            shapes = {ours: entry.our_shape for entry in tensors_of(config) for ours in entry.ours}
            check_names(tensors, shapes, f"{type(self).__name__} to save; adapters are to be merged or unloaded first")
        else:
            prefix = UNET_PREFIX if isinstance(self, UNet) else ""
            name, tensors = COMPVIS_WEIGHTS, {prefix + key: tensor for key, tensor in self.to_compvis().items()}
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / name, tensors, {"format": "pt"})
        for other in {f"{WEIGHTS}.safetensors", COMPVIS_WEIGHTS} - {name}:
            (folder / other).unlink(
                missing_ok=True
            )  # of a model saved here before: from_pretrained would not know which
        content = {"_class_name": None, **configs.config_to_diffusers(config)}
        write_atomically(folder / "config.json", (json.dumps(content, indent=2) + "\n").encode())

    @classmethod
    def from_compvis(cls: type[M], params: Mapping[str, Any] | Config, state_dict: Mapping[str, Tensor]) -> M:
        """The model of the original code with these constructor parameters and weights, which are shared where they are
        laid out alike.

        params: what the original's constructor was given (for a first stage embed_dim, ddconfig and, with a codebook,
        n_embed), or our configuration. state_dict: the original's parameter names, without the prefix that a
        checkpoint puts before them.

        Raises:
            ValueError: a parameter we cannot honour.
            CheckpointError (a ValueError): every key that is missing, unexpected or of the wrong shape.
        """
        from ldm_fast import configs
        from ldm_fast.unet import UNet
        from ldm_fast.weights import compvis_to_ours

        if isinstance(params, Mapping):
            unet = issubclass(cls, UNet)
            read = configs.unet_config_from_compvis if unet else configs.autoencoder_config_from_compvis
            params = read(params)
        _insist_on_class(cls, params)
        return assemble(cls, params, compvis_to_ours(state_dict, params), None, f"{cls.__name__}.from_compvis")

    def to_compvis(self) -> dict[str, Tensor]:
        """The state dict under the names and in the shapes of the original code."""
        from ldm_fast.weights import ours_to_compvis

        return ours_to_compvis(self.state_dict(), self._own_config())

    @classmethod
    def from_diffusers(cls, module: nn.Module) -> Any:
        """Our model with the configuration and the weights of a diffusers module: the tensors are shared, not copied.

        What comes back stands for the module in diffusers' pipelines, too (see `drop_in`).

        Raises:
            TypeError: the module is none of those that this class stands for.
            ValueError: a configuration we cannot honour, or weights that are wrapped (LoRA, offloading).
        """
        from ldm_fast import drop_in

        kind = type(module).__name__
        if kind not in drop_in.REPLACED or not issubclass(drop_in.REPLACED[kind], cls):
            known = [name for name, ours in drop_in.REPLACED.items() if issubclass(ours, cls)]
            raise TypeError(f"{cls.__name__}.from_diffusers: module must be a {' or '.join(known)}, got {kind}")
        config = read_config(cls, {**module.config, "_class_name": kind})
        if any(tensor.is_meta for tensor in module.parameters()):
            raise ValueError(f"{cls.__name__}.from_diffusers: the module is offloaded; bring its weights back first")
        build = drop_in.pipeline_class(kind)
        model = assemble(build, config, module.state_dict(), None, f"{cls.__name__}.from_diffusers", mixed=True)
        trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        model.describe_as(dict(module.config))
        return model.train(module.training)

    def _own_config(self) -> Config:
        """`config`, which in a pipeline of diffusers is their dictionary."""
        if isinstance(self.config, Mapping):
            return read_config(type(self), self.config)
        return self.config


def read_config(cls: type[Pretrained], config: Mapping[str, Any]) -> Config:
    """Our configuration from a dictionary of diffusers, for a model of the class `cls`."""
    from ldm_fast.configs import config_from_diffusers

    if not isinstance(config, Mapping):
        raise TypeError(f"{cls.__name__}: config must be a dictionary, got {type(config).__name__}")
    if "_class_name" not in config:
        config = {**config, "_class_name": _class_name(cls, config)}
    ours = config_from_diffusers(config)
    _insist_on_class(cls, ours)
    return ours


def _class_name(cls: type[Pretrained], config: Mapping[str, Any]) -> str:
    """Which of diffusers' classes a dictionary that does not say so is of."""
    from ldm_fast.unet import UNet

    if not issubclass(cls, UNet):
        return next(base.__name__ for base in cls.__mro__ if base.__name__ in ("AutoencoderKL", "VQModel"))
    only_there = {"add_attention", "attn_norm_num_groups", "downsample_type", "upsample_type", "num_train_timesteps"}
    unconditional = only_there & config.keys() or "AttnDownBlock2D" in config.get("down_block_types", ())
    return "UNet2DModel" if unconditional else "UNet2DConditionModel"


def _insist_on_class(cls: type[nn.Module], config: Config) -> None:
    from ldm_fast.weights import LAYOUTS

    if type(config) not in LAYOUTS or not issubclass(cls, LAYOUTS[type(config)][0]):
        raise ValueError(f"{cls.__name__}: the configuration is that of another model, {type(config).__name__}")


def read_folder(folder: Path, variant: str | None) -> tuple[dict[str, Any], str, dict[str, Tensor]]:
    """(config.json, whose names the weights have, weights without prefix) of a model's folder."""
    from ldm_fast.files import CheckpointError
    from ldm_fast.tensor_files import read_json, read_shards, read_tensors
    from ldm_fast.weights import UNET_PREFIX

    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; models are read from local folders, nothing is downloaded")
    config = read_json(folder / "config.json")
    middle = f".{variant}" if variant else ""
    for kind in ("safetensors", "bin"):
        file, index = folder / f"{WEIGHTS}{middle}.{kind}", folder / f"{WEIGHTS}.{kind}.index{middle}.json"
        if file.is_file():
            return config, "diffusers", read_tensors(file).tensors
        if index.is_file():
            return config, "diffusers", read_shards(index).tensors
    if not variant and (folder / COMPVIS_WEIGHTS).is_file():
        tensors = read_tensors(folder / COMPVIS_WEIGHTS).tensors
        return config, "compvis", {name.removeprefix(UNET_PREFIX): tensor for name, tensor in tensors.items()}
    there = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    wanted = f"{WEIGHTS}{middle}.safetensors"
    raise CheckpointError(f"{folder} holds no {wanted}; weights there: {', '.join(there) or 'none'}")


def assemble(
    cls: type[M],
    config: Config,
    state_dict: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    origin: str,
    mixed: bool = False,
) -> M:
    """cls(config) around these very tensors, none of them copied (but to another `dtype`), in eval mode.

    Nothing is allocated: the model is built on the meta device. `origin` is named in errors. With `mixed`, tensors
    may be of different dtypes.

    Raises CheckpointError: keys missing, unexpected or of the wrong shape, all named; dtypes that differ.
    """
    from ldm_fast.weights import check_names

    with torch.device("meta"):
        model = cls(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_names(state_dict, expected, f"state dict of this {cls.__name__}, {origin}")
    if not mixed:
        state_dict = one_dtype(state_dict, dtype, origin)
    model.load_state_dict(state_dict, assign=True)
    return model.eval()


def one_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, origin: str) -> dict[str, Tensor]:
    """The tensors in `dtype`; where none is given in their own, if that is one. CheckpointError otherwise."""
    from ldm_fast.files import CheckpointError

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
        raise CheckpointError(f"{origin}: weights of different dtypes: {kinds}; say by torch_dtype which it shall be")
    if not found.keys() <= set(STORED):
        raise CheckpointError(f"{origin}: weights are {next(iter(found))}; say by torch_dtype what to compute in")
    return dict(tensors)
