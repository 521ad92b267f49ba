"""Makes docs/compatibility.md: what of diffusers' UNets and first stages our models have, found out by trying.

    python docs/tools/compatibility.py            # writes the page
    python docs/tools/compatibility.py --check    # fails if the page is not what it would write

Every public name, configuration key and attention processor of diffusers' classes is listed by diffusers itself. Each
is tried on a small model of theirs and on ours with the same weights, and what then comes out of both is compared. The
tables in capitals hold only what cannot be found out: values to try, arguments to call with, and what is not to be
called.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import inspect
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models import attention_processor
from torch import Tensor, nn

import ldm_fast
from ldm_fast.models import k_blocks, rare_layers, skip_blocks

PAGE = Path(__file__).resolve().parents[1] / "compatibility.md"
TOLERANCE = 1e-4
RARE = tuple(
    cls
    for module in (rare_layers, k_blocks, skip_blocks)
    for cls in vars(module).values()
    if inspect.isclass(cls) and cls.__module__ == module.__name__
)

LEVELS = dict(block_out_channels=(32, 64), layers_per_block=1)
CONTEXT = 32
BASES: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": dict(
        LEVELS,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=CONTEXT,
        attention_head_dim=8,
    ),
    "UNet2DModel": dict(
        LEVELS,
        sample_size=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ),
    "AutoencoderKL": dict(
        LEVELS,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    "VQModel": dict(
        LEVELS,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        num_vq_embeddings=16,
    ),
}
OURS = {"AutoencoderKL": ldm_fast.AutoencoderKL, "VQModel": ldm_fast.VQModel}


def down(*kinds: str, **others: Any) -> dict[str, Any]:
    """The kinds of levels, mirrored on the way up."""
    up = tuple(kind.replace("Down", "Up").replace("Encoder", "Decoder") for kind in reversed(kinds))
    return {"down_block_types": kinds, "up_block_types": up, **others}


SIMPLE = down("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", mid_block_type="UNetMidBlock2DSimpleCrossAttn")
K_BLOCKS = down(
    "KCrossAttnDownBlock2D",
    "KDownBlock2D",
    mid_block_type=None,
    layers_per_block=2,
    act_fn="gelu",
    norm_num_groups=None,
)
SKIP = dict(block_out_channels=(32, 64), time_embedding_type="fourier", norm_num_groups=None)
IMAGES = dict(encoder_hid_dim=16, encoder_hid_dim_type="image_proj")
NUMBERS = dict(
    addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 10
)
# Values of a key besides its default, with the other keys that they need. What is not here gets a value by its type.
VALUES: dict[str, list[dict[str, Any]]] = {
    "down_block_types": [
        down("AttnDownBlock2D", "DownBlock2D"),
        down("ResnetDownsampleBlock2D", "DownBlock2D"),
        SIMPLE,
        K_BLOCKS,
        down("SkipDownBlock2D", "AttnSkipDownBlock2D", **SKIP),
        down("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    ],
    "up_block_types": [
        {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
        {"up_block_types": ("UpBlock2D", "AttnUpBlock2D")},
        {"up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")},
    ],
    "mid_block_type": [{"mid_block_type": None}, {"mid_block_type": "UNetMidBlock2D"}, SIMPLE],
    "block_out_channels": [{"block_out_channels": (64, 32)}],
    "layers_per_block": [{"layers_per_block": 2}, {"layers_per_block": (1, 2)}],
    "sample_size": [{"sample_size": (8, 16)}],
    "act_fn": [{"act_fn": "swish"}, {"act_fn": "gelu"}],
    "time_embedding_type": [
        {"time_embedding_type": "fourier"},
        {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    ],
    "num_train_timesteps": [{"num_train_timesteps": 1000}],
    "time_embedding_dim": [{"time_embedding_dim": 48}],
    "time_embedding_act_fn": [{"time_embedding_act_fn": "gelu"}],
    "timestep_post_act": [{"timestep_post_act": "gelu"}],
    "downsample_padding": [{"downsample_padding": 0}],
    "downsample_type": [{"downsample_type": "resnet", "upsample_type": "resnet"}, {"downsample_type": "resnet"}],
    "upsample_type": [{"downsample_type": "resnet", "upsample_type": "resnet"}, {"upsample_type": "resnet"}],
    "norm_num_groups": [{"norm_num_groups": 16}, K_BLOCKS, down("SkipDownBlock2D", "SkipDownBlock2D", **SKIP)],
    "attn_norm_num_groups": [{"attn_norm_num_groups": 16}],
    "cross_attention_dim": [{"cross_attention_dim": 16}, {"cross_attention_dim": (CONTEXT, CONTEXT)}],
    "transformer_layers_per_block": [{"transformer_layers_per_block": (1, 2)}],
    "reverse_transformer_layers_per_block": [
        {"transformer_layers_per_block": ((1,), 1), "reverse_transformer_layers_per_block": (1, (2, 1))}
    ],
    "encoder_hid_dim": [{"encoder_hid_dim": 16}],
    "encoder_hid_dim_type": [
        {"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"},
        {"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_image_proj"},
        IMAGES,
    ],
    "attention_head_dim": [{"attention_head_dim": 4}, {"attention_head_dim": (4, 8)}, {"attention_head_dim": None}],
    "num_attention_heads": [{"num_attention_heads": 4}],
    "only_cross_attention": [{"only_cross_attention": True}],
    "class_embed_type": [
        {"class_embed_type": "timestep"},
        {"class_embed_type": "identity"},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12},
        {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 12},
    ],
    "addition_embed_type": [
        {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
        NUMBERS,
        {"addition_embed_type": "text_image"},
        {**IMAGES, "addition_embed_type": "image"},
        {**IMAGES, "addition_embed_type": "image_hint", "in_channels": 8},
    ],
    "addition_embed_type_num_heads": [{"addition_embed_type": "text", "addition_embed_type_num_heads": 2}],
    "addition_time_embed_dim": [NUMBERS],
    "projection_class_embeddings_input_dim": [NUMBERS],
    "class_embeddings_concat": [{"class_embeddings_concat": True, "num_class_embeds": 5}],
    "resnet_time_scale_shift": [{"resnet_time_scale_shift": "scale_shift"}],
    "resnet_skip_time_act": [{**SIMPLE, "resnet_skip_time_act": True}],
    "resnet_out_scale_factor": [{**SIMPLE, "resnet_out_scale_factor": 1.5}],
    "mid_block_only_cross_attention": [{**SIMPLE, "mid_block_only_cross_attention": True}],
    "cross_attention_norm": [{**SIMPLE, "cross_attention_norm": "group_norm"}],
    "attention_type": [{"attention_type": "gated"}, {"attention_type": "gated-text-image"}],
    "conv_in_kernel": [{"conv_in_kernel": 1}, {"conv_in_kernel": 5}],
    "conv_out_kernel": [{"conv_out_kernel": 1}, {"conv_out_kernel": 5}],
    "time_cond_proj_dim": [{"time_cond_proj_dim": 8}],
    "norm_type": [{"norm_type": "spatial"}],
    "latents_mean": [{"latents_mean": (0.1,) * 4}],
    "latents_std": [{"latents_std": (0.9,) * 4}],
    "vq_embed_dim": [{"vq_embed_dim": 5}],
    "use_quant_conv": [{"use_quant_conv": False}],
    "use_post_quant_conv": [{"use_post_quant_conv": False}],
}
# What methods are called with, by the names of their parameters; the model and a folder that holds it are given.
ARGUMENTS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "sample": lambda model, folder: inputs(model)["sample"],
    "timestep": lambda model, folder: torch.tensor(7),
    "encoder_hidden_states": lambda model, folder: normal(2, 5, CONTEXT),
    "class_labels": lambda model, folder: None,
    "added_cond_kwargs": lambda model, folder: {},
    "emb": lambda model, folder: normal(2, 128),
    "x": lambda model, folder: normal(2, 3, 16, 16),
    "z": lambda model, folder: normal(2, model.config.latent_channels, 8, 8),
    "h": lambda model, folder: normal(2, model.config.latent_channels, 8, 8),
    "a": lambda model, folder: normal(1, 3, 8, 8),
    "b": lambda model, folder: normal(1, 3, 8, 8) + 1,
    "blend_extent": lambda model, folder: 4,
    "s1": lambda model, folder: 0.9,
    "s2": lambda model, folder: 0.2,
    "b1": lambda model, folder: 1.2,
    "b2": lambda model, folder: 1.4,
    "processor": lambda model, folder: attention_processor.AttnProcessor(),
    "backend": lambda model, folder: "native",
    "valid": lambda model, folder: False,
    "use_xla_flash_attention": lambda model, folder: False,
    "adapter_config": lambda model, folder: lora_config(),
    "adapter_name": lambda model, folder: "default",
    "adapter_names": lambda model, folder: "default",
    "config_dict": lambda model, folder: dict(model.config),
    "config": lambda model, folder: dict(model.config),
    "save_directory": lambda model, folder: folder / "saved",
    "json_file_path": lambda model, folder: folder / "written.json",
    "pretrained_model_name_or_path": lambda model, folder: folder,
}
TOO = {"from_config": ("config",)}  # parameters that have defaults, and are given all the same
AFTER_ADAPTER = (
    "active_adapters delete_adapters disable_adapters disable_lora enable_adapters enable_lora fuse_lora "
    "save_lora_adapter set_adapter set_adapters unfuse_lora unload_lora"
).split()
NOT_CALLED = {
    "compile_repeated_blocks": "compiles",
    "dequantize": "needs a quantised model",
    "disable_npu_flash_attention": "needs an NPU",
    "enable_group_offload": "needs an accelerator",
    "enable_npu_flash_attention": "needs an NPU",
    "enable_parallelism": "needs several processes",
    "enable_xformers_memory_efficient_attention": "needs xformers",
    "enable_xla_flash_attention": "needs XLA",
    "from_single_file": "needs a whole checkpoint",
    "load_attn_procs": "needs files of adapters",
    "load_lora_adapter": "needs files of adapters",
    "push_to_hub": "needs a server",
    "save_attn_procs": "needs adapters of older versions",
    "set_use_npu_flash_attention": "needs an NPU",
    "set_use_xla_flash_attention": "needs XLA",
    "register_for_auto_class": "makes code of a custom class portable",
}


# ---- models and their inputs ----


def normal(*shape: int) -> Tensor:
    """Return random numbers that depend on the shape alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def lora_config() -> Any:
    """Return a LoRA adapter of rank 2."""
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)


def make(kind: str, change: dict[str, Any] | None = None) -> nn.Module:
    """Return diffusers' model with random weights that leave no norm at the identity."""
    torch.manual_seed(0)
    model: nn.Module = getattr(diffusers, kind)(**{**BASES[kind], **(change or {})}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def ours_of(theirs: nn.Module) -> nn.Module:
    """Return our model with weights of its own, in the place of theirs."""
    ours: nn.Module = OURS.get(type(theirs).__name__, ldm_fast.UNet).from_diffusers(copy.deepcopy(theirs))
    return ours


def inputs(model: Any, batch: int = 2) -> dict[str, Any]:
    """Return what a model of diffusers, or ours in its place, is called with."""
    config, kind = dict(model.config), type(model).__name__
    if kind in OURS:
        return {"sample": normal(batch, config["in_channels"], 16, 16)}
    hint = config.get("addition_embed_type") == "image_hint"
    given: dict[str, Any] = {
        "sample": normal(batch, config["in_channels"] - 4 * hint, 8, 8),
        "timestep": torch.arange(batch) * 300 + 7,
    }
    if config.get("num_class_embeds") or config.get("class_embed_type") == "timestep":
        given["class_labels"] = torch.arange(batch) + 1
    elif config.get("class_embed_type") == "identity":
        given["class_labels"] = normal(batch, 4 * config["block_out_channels"][0])
    elif config.get("class_embed_type"):
        given["class_labels"] = normal(batch, config["projection_class_embeddings_input_dim"])
    if kind == "UNet2DModel":
        return given
    width = config["cross_attention_dim"]
    width = width[0] if isinstance(width, list | tuple) else width
    given["encoder_hidden_states"] = normal(batch, 5, config["encoder_hid_dim"] or width)
    if config["time_cond_proj_dim"]:
        given["timestep_cond"] = normal(batch, config["time_cond_proj_dim"])
    images = config["encoder_hid_dim"] if config["encoder_hid_dim_type"] == "image_proj" else width
    given["added_cond_kwargs"] = {"image_embeds": normal(batch, images), "hint": normal(batch, 3, 64, 64)}
    if config["addition_embed_type"] == "text_time":
        given["added_cond_kwargs"] |= {"text_embeds": normal(batch, 10), "time_ids": 100 * normal(batch, 6).abs()}
    if config["addition_embed_type"] == "text_image":
        given["added_cond_kwargs"] |= {"text_embeds": normal(batch, width)}
    if str(config["attention_type"]).startswith("gated"):
        boxes = {"boxes": normal(batch, 3, 4).abs(), "masks": torch.ones(batch, 3)}
        phrases = {"positive_embeddings": normal(batch, 3, width)}
        if config["attention_type"] == "gated-text-image":
            phrases = {"phrases_embeddings": normal(batch, 3, width), "image_embeddings": normal(batch, 3, width)}
            phrases |= {"phrases_masks": torch.ones(batch, 3), "image_masks": torch.ones(batch, 3)}
        given["cross_attention_kwargs"] = {"gligen": {**boxes, **phrases}}
    return given


@torch.no_grad()
def output(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """Return what a model predicts or decodes."""
    result: Tensor = model(**copy.deepcopy(given))[0]
    return result


def same(got: Any, wanted: Any) -> bool:
    """Whether two results are the same: numbers to rounding, of everything else what can be compared."""
    if isinstance(wanted, Tensor):
        if not isinstance(got, Tensor) or got.shape != wanted.shape:
            return False
        return bool((got - wanted).norm() <= TOLERANCE * wanted.norm() + 1e-12)
    if isinstance(wanted, tuple | list):
        return isinstance(got, tuple | list) and len(got) == len(wanted) and all(map(same, got, wanted))
    if hasattr(wanted, "to_tuple"):
        return hasattr(got, "to_tuple") and same(got.to_tuple(), wanted.to_tuple())
    return True if not isinstance(wanted, bool | int | float | str) else bool(got == wanted)


def reason(error: Exception) -> str:
    """Return the first sentence of an error, for a table."""
    text = re.sub(" object at 0x[0-9a-f]+", "", " ".join(str(error).split())).split("; ")[0].replace("|", "\\|")
    return f"{type(error).__name__}: {text[:160]}"


# ---- configurations ----


def values_of(kind: str, key: str, default: Any) -> list[dict[str, Any]]:
    """Return configurations that give the key another value than its default."""
    if key in VALUES:
        return VALUES[key]
    if isinstance(default, bool):
        return [{key: not default}]
    if isinstance(default, int):
        return [{key: default + 1}]
    if isinstance(default, float):
        return [{key: default / 2 if default else 0.5}]
    return [{key: 5}] if default is None else []


def try_configuration(kind: str, change: dict[str, Any]) -> str | None:
    """Return what becomes of a configuration here; None if diffusers' own model does not run with it."""
    try:
        theirs = make(kind, change)
        given = inputs(theirs)
        wanted = output(theirs, given)
    except Exception:
        return None
    try:
        ours = ours_of(theirs)
    except ValueError as error:
        return f"refused ({reason(error)})"
    try:
        got = output(ours, given)
    except Exception as error:
        return f"fails ({reason(error)})"
    if not same(got, wanted):
        return "differs"
    return "reference speed" if any(isinstance(module, RARE) for module in ours.modules()) else "works"


def short(value: Any) -> str:
    """Return a configuration in few words."""
    return ", ".join(f"{name}={v!r}" for name, v in value.items()).replace("'", "")


def configuration_rows(kind: str) -> Iterator[tuple[str, str]]:
    """Yield each configuration key of a class, and what becomes of it."""
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
    for key, parameter in parameters.items():
        if key in ("self", "kwargs"):
            continue
        found = [(change, try_configuration(kind, change)) for change in values_of(kind, key, parameter.default)]
        known = [(change, status) for change, status in found if status is not None]
        if not known:
            yield key, "diffusers' own model runs with its default alone" if found else "not tried"
        elif len({status for _, status in known}) == 1:
            yield key, str(known[0][1])
        else:
            parts = (f"`{short({k: v for k, v in change.items() if k == key or len(change) < 3})}`: {status}"
                     for change, status in known)  # fmt: skip
            yield key, "; ".join(parts)


# ---- methods and attributes ----


def public_names(kind: str) -> list[str]:
    """Return the public names of a class that are not those of every module."""
    cls = getattr(diffusers, kind)
    return [name for name in dir(cls) if not name.startswith("_") and name not in dir(nn.Module)]


def call(model: Any, name: str, folder: Path) -> Any:
    """Call a method by the names that its parameters have in diffusers. LookupError if `ARGUMENTS` lacks one."""
    method, theirs = getattr(model, name), getattr(getattr(diffusers, type(model).__name__), name)
    required = [
        parameter.name
        for parameter in inspect.signature(theirs).parameters.values()
        if parameter.name != "self"
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and (parameter.default is parameter.empty or parameter.name in TOO.get(name, ()))
    ]
    if unknown := [parameter for parameter in required if parameter not in ARGUMENTS]:
        raise LookupError(", ".join(unknown))
    with torch.no_grad():
        if name == "get_config_dict":
            return method(folder)
        return method(**{parameter: ARGUMENTS[parameter](model, folder) for parameter in required})


def try_method(kind: str, name: str) -> str:
    """Return what becomes of a method here: called on theirs and on ours, with the output of both models after it."""
    if name in NOT_CALLED:
        return f"not called: {NOT_CALLED[name]}"
    theirs = make(kind)
    ours = ours_of(theirs)
    if not hasattr(ours, name):
        return "missing"
    results = []
    with tempfile.TemporaryDirectory() as base:
        for model in (theirs, ours):
            folder = Path(base) / f"{len(results)}"
            theirs_again = make(kind)
            theirs_again.save_pretrained(folder)
            torch.manual_seed(0)
            try:
                if name in AFTER_ADAPTER:
                    model.add_adapter(lora_config())
                torch.manual_seed(0)
                result = call(model, name, folder)
                results.append((result, output(model, inputs(model))))
            except LookupError as error:
                return f"not tried: needs {error}"
            except Exception as error:
                if model is theirs:
                    return "fails in diffusers, too" if _fails(ours, name, folder) else "works (fails in diffusers)"
                kind_of = "refused" if isinstance(error, ValueError | NotImplementedError) else "fails"
                return f"{kind_of} ({reason(error)})"
    return "works" if same(results[1], results[0]) else "differs"


def _fails(model: nn.Module, name: str, folder: Path) -> bool:
    try:
        call(model, name, folder)
    except Exception:
        return True
    return False


def method_rows(kind: str) -> Iterator[tuple[str, str]]:
    """Yield each public method of a class, and what becomes of it."""
    for name in public_names(kind):
        if callable(getattr(getattr(diffusers, kind), name)):
            yield name, try_method(kind, name)


def attribute_rows(kind: str) -> Iterator[tuple[str, str]]:
    """Yield each public attribute and part of a class, and what becomes of it."""
    theirs = make(kind)
    ours = ours_of(theirs)
    own = [name for name in vars(theirs) if not name.startswith("_") and name not in vars(nn.Module())]
    names = [name for name in public_names(kind) if not callable(getattr(getattr(diffusers, kind), name))]
    children = [name for name, _ in theirs.named_children()]
    for name in sorted({*own, *names, *children}):
        if not hasattr(ours, name):
            yield name, "missing"
        elif same(getattr(ours, name), getattr(theirs, name)):
            yield name, "works"
        else:
            yield name, f"differs: {getattr(ours, name)!r}, there {getattr(theirs, name)!r}"


# ---- attention processors ----


def processors() -> Iterator[type]:
    """Yield diffusers' classes of attention processors."""
    for name, cls in sorted(vars(attention_processor).items()):
        if inspect.isclass(cls) and cls.__module__ == attention_processor.__name__ and "Processor" in name:
            yield cls


def make_processor(cls: type, layer: Any) -> Any:
    """Return a processor for this attention layer, its weights random."""
    known = {
        "hidden_size": layer.to_q.in_features,
        "cross_attention_dim": layer.to_k.in_features,
        "slice_size": 1,
        "train_kv": True,
        "train_q_out": False,
    }
    given = {name: known[name] for name in inspect.signature(cls).parameters if name in known}
    torch.manual_seed(0)
    return cls(**given)


def try_processor(cls: type) -> str | None:
    """Return what becomes of a processor here; None if diffusers' own UNet does not run with it."""
    found = None
    for place in ("attn1", "attn2"):
        theirs = make("UNet2DConditionModel")
        given = inputs(theirs, batch=6)
        name = f"down_blocks.0.attentions.0.transformer_blocks.0.{place}"
        try:
            processor = make_processor(cls, theirs.get_submodule(name))
            ours = ours_of(theirs)
            theirs.get_submodule(name).set_processor(copy.deepcopy(processor))
            wanted = output(theirs, given)
        except Exception:
            continue
        try:
            chosen = {**ours.attn_processors, f"{name}.processor": processor}
            ours.set_attn_processor(chosen)
            status = "works" if same(output(ours, given), wanted) else "differs"
        except Exception as error:
            status = f"refused ({reason(error)})" if isinstance(error, ValueError) else f"fails ({reason(error)})"
        found = status if found in (None, status) else f"{found} in self attention, {status} in cross attention"
    return found


# ---- the page ----

HEAD = """# Compatibility with diffusers

What diffusers' UNets and first stages have, and what becomes of it in our models in their place
(`from_diffusers`, `accelerate`). `docs/tools/compatibility.py` made this page by trying everything on small models
with the same weights, and CI checks that it is true.

- *works*: the output is that of diffusers, to rounding.
- *reference speed*: so it is, but layers of that kind are plain PyTorch here.
- *refused*: an error says so, before anything is computed.
- *fails*, *differs*: it does not work, and nothing says so in advance.
- *not called*: the script cannot try it, for the reason given.
"""


def table(head: tuple[str, str], rows: Iterator[tuple[str, str]]) -> list[str]:
    """Return the lines of a table."""
    return ["", f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| `{name}` | {status} |" for name, status in rows)]


def page() -> str:
    """Return the whole page."""
    lines = [HEAD, f"Made with diffusers {diffusers.__version__}."]
    for kind in BASES:
        lines += ["", f"## {kind}", "", "### Configuration", *table(("key", "here"), configuration_rows(kind))]
        lines += ["", "### Methods", *table(("method", "here"), method_rows(kind))]
        lines += ["", "### Attributes", *table(("attribute", "here"), attribute_rows(kind))]
    tried = [(cls.__name__, try_processor(cls)) for cls in processors()]
    lines += ["", "## Attention processors", *table(("processor", "here"), ((n, s) for n, s in tried if s))]
    others = ", ".join(f"`{name}`" for name, status in tried if status is None)
    lines += ["", f"diffusers' own UNet2DConditionModel does not run with these: {others}."]
    return "\n".join(lines) + "\n"


def without_version(text: str) -> str:
    """Return the page without the line that names the version of diffusers."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("Made with diffusers"))


def main() -> int:
    """Write the page, or check it."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if importlib.util.find_spec("peft") is None:
        print("compatibility: this needs the package peft, too")
        return 2
    made = page()
    if "--check" in sys.argv[1:]:
        there, now = (without_version(text).splitlines() for text in (PAGE.read_text(encoding="utf-8"), made))
        changes = list(difflib.unified_diff(there, now, "the page", "what is true", lineterm="", n=0))
        print("\n".join(changes))
        return int(bool(changes))
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
