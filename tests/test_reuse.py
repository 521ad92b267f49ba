"""Work that is not done twice: the same numbers, less work, and nothing stale."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import io
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from eager_torch import relative_error
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

from ldm_fast.configs.diffusion import DiffusionConfig
from ldm_fast.configs.first_stage import AutoencoderConfig
from ldm_fast.configs.unet import UNetConfig
from ldm_fast.diffusion.schedule import NoiseSchedule
from ldm_fast.models import attention as attention_layers
from ldm_fast.models import joined
from ldm_fast.models import memory as reuse
from ldm_fast.models.attention import Attention
from ldm_fast.models.autoencoder import AutoencoderKL
from ldm_fast.models.unet import UNet
from ldm_fast.pipelines.latent_diffusion import LatentDiffusion

CONFIG = UNetConfig(
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    layers_per_block=1,
    cross_attention_dim=24,
    num_attention_heads=2,
    norm_num_groups=8,
)
FIRST_STAGE = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=8, layers_per_block=1)
CROSS_ATTENTIONS = 4  # one on the way down, one in the middle, two on the way up
TOLERANCE = 1e-6


@pytest.fixture
def unet() -> UNet:
    """One whose weights need no gradient: then results are kept without a scope."""
    torch.manual_seed(0)
    return UNet(CONFIG).eval().requires_grad_(False)


@pytest.fixture
def context() -> Tensor:
    return torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def projected(monkeypatch) -> list[Tensor]:
    """What keys and values were computed of, in this test so far."""
    sources = []

    def linears(x, layers):
        sources.append(x)
        return joined.linears(x, layers)

    monkeypatch.setattr(attention_layers, "linears", linears)
    return sources


def sample(seed: int = 2, batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(unet: UNet, context: Tensor, timestep: int = 7) -> Tensor:
    return unet(sample(), timestep, context).sample


def fresh(unet: UNet, context: Tensor) -> Tensor:
    """The output of a UNet that has seen nothing before, with these weights and a context of these values."""
    other = copy.deepcopy(unet)
    other.forget()
    return run(other, context.clone())


# ---- keys and values of a context ----


def contexts_projected(projected: list[Tensor], context: Tensor) -> int:
    return sum(x is context for x in projected)


def test_context_is_projected_once_per_prompt(unet, context, projected):
    outputs = [run(unet, context, timestep) for timestep in (900, 500, 100)]
    assert contexts_projected(projected, context) == CROSS_ATTENTIONS
    for timestep, output in zip((900, 500, 100), outputs, strict=True):
        unet.forget()
        assert torch.equal(run(unet, context, timestep), output)  # bit for bit
    assert contexts_projected(projected, context) == 4 * CROSS_ATTENTIONS


def test_two_contexts_in_turn_are_both_remembered(unet, context, projected):
    negative = context.flip(1)
    for _ in range(3):
        assert not torch.equal(run(unet, context), run(unet, negative))
    assert contexts_projected(projected, context) == contexts_projected(projected, negative) == CROSS_ATTENTIONS


def test_memory_is_bounded(unet, context):
    many = [context + i for i in range(5)]
    for one in many:
        run(unet, one)
    assert all(len(layer._memory._entries) <= 2 for layer in unet.modules() if isinstance(layer, Attention))


def cross(unet: UNet) -> Attention:
    return unet.mid_block.attentions[0].transformer_blocks[0].attn2


@torch.no_grad()
def write_context(unet: UNet, context: Tensor) -> None:
    context.mul_(2)


@torch.no_grad()
def write_view_of_context(unet: UNet, context: Tensor) -> None:
    context[1, 2:].add_(1)


@torch.no_grad()
def write_weight(unet: UNet, context: Tensor) -> None:
    cross(unet).to_k.weight.add_(1)


def optimise(unet: UNet, context: Tensor) -> None:
    optimiser = torch.optim.AdamW([cross(unet).to_v.weight], lr=1.0)
    cross(unet).to_v.weight.grad = torch.ones_like(cross(unet).to_v.weight)
    optimiser.step()


@torch.inference_mode()
def write_in_inference_mode(unet: UNet, context: Tensor) -> None:
    context.mul_(2)
    cross(unet).to_k.weight.add_(1)


def load_other_weights(unet: UNet, context: Tensor) -> None:
    torch.manual_seed(9)
    unet.load_state_dict(UNet(CONFIG).state_dict())


def assign_other_weights(unet: UNet, context: Tensor) -> None:
    torch.manual_seed(9)
    unet.load_state_dict(UNet(CONFIG).state_dict(), assign=True)


def exchange_parameter(unet: UNet, context: Tensor) -> None:
    cross(unet).to_v.weight = nn.Parameter(torch.ones_like(cross(unet).to_v.weight))


def exchange_data(unet: UNet, context: Tensor) -> None:
    cross(unet).to_v.weight.data = torch.ones_like(cross(unet).to_v.weight)


def exchange_layer(unet: UNet, context: Tensor) -> None:
    cross(unet).to_v = nn.Linear(24, 32, bias=False)


def wrap_layer(unet: UNet, context: Tensor) -> None:
    cross(unet).to_v = nn.Sequential(cross(unet).to_v, nn.Tanh())


def hook_layer(unet: UNet, context: Tensor) -> None:
    cross(unet).to_v.register_forward_hook(lambda module, inputs, output: 3 * output)


def replace_forward(unet: UNet, context: Tensor) -> None:
    layer = cross(unet).to_v
    layer.forward = lambda x: nn.functional.linear(x, 2 * layer.weight)


def prune(unet: UNet, context: Tensor) -> None:
    l1_unstructured(cross(unet).to_k, "weight", 0.9)


def through_half_precision(unet: UNet, context: Tensor) -> None:
    unet.half().float()  # rounded, and perhaps where they were before


CHANGES = (
    write_context,
    write_view_of_context,
    write_weight,
    optimise,
    write_in_inference_mode,
    load_other_weights,
    assign_other_weights,
    exchange_parameter,
    exchange_data,
    exchange_layer,
    wrap_layer,
    hook_layer,
    replace_forward,
    prune,
    through_half_precision,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(unet, context, change: Callable[[UNet, Tensor], None]):
    before = run(unet, context)
    change(unet, context)
    after = run(unet, context)
    assert not torch.equal(after, before)
    assert relative_error(after, fresh(unet, context)) <= TOLERANCE
    assert torch.equal(run(unet, context), after)


# ---- keys and values by weights that are trained ----


def test_trained_weights_are_taken_for_unchanged_within_one_scope(unet, context, projected):
    unet.requires_grad_()
    for _ in range(2):
        run(unet, context)
    assert contexts_projected(projected, context) == 2 * CROSS_ATTENTIONS
    for scopes in (3, 4):
        with reuse.fixed_weights():
            for _ in range(3):
                run(unet, context)
        assert contexts_projected(projected, context) == scopes * CROSS_ATTENTIONS
    run(unet, context)
    assert contexts_projected(projected, context) == 5 * CROSS_ATTENTIONS


def test_a_trained_context_is_taken_for_unchanged_within_one_scope(unet, context):
    context.requires_grad_()
    for scope in (contextlib.nullcontext, reuse.fixed_weights):
        with scope():
            before = run(unet, context)
        context.data.mul_(2)
        with scope():
            assert relative_error(run(unet, context), before) > 1e-4


def copy_average(unet: UNet, context: Tensor) -> None:
    """As diffusers' EMAModel.copy_to and .restore do."""
    for parameter in unet.parameters():
        parameter.data.copy_(1.1 * parameter.data)


def train_fused(unet: UNet, context: Tensor) -> None:
    """Not counted as a write, in PyTorch 2.13 at least."""
    optimiser = torch.optim.AdamW(unet.parameters(), lr=1e-2, fused=True)
    unet(sample(), 7, context).sample.square().mean().backward()
    optimiser.step()
    optimiser.zero_grad()


def train_compiled(unet: UNet, context: Tensor) -> None:
    torch._dynamo.reset()
    train_fused(torch.compile(unet, backend="aot_eager"), context)


@pytest.mark.parametrize("scope", [contextlib.nullcontext, reuse.fixed_weights], ids=["no scope", "scopes"])
@pytest.mark.parametrize("write", [copy_average, train_fused, train_compiled], ids=lambda write: write.__name__)
def test_writes_without_a_trace(unet, context, write, scope):
    unet.requires_grad_()
    with scope():
        unet.precompute_time([7])
        before = run(unet, context)
    write(unet, context)
    with scope():
        after = run(unet, context)
    assert relative_error(after, before) > 1e-3
    assert relative_error(after, fresh(unet, context)) <= TOLERANCE


def test_lora_loaded_scaled_fused_and_unloaded(unet, context):
    """Fusing writes through `.data`, without a trace in the weight; that its layer was wrapped is trace enough."""
    peft = pytest.importorskip("peft")
    before = run(unet, context)
    targets = ["to_q", "to_k", "to_v"]
    lora = peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    peft.inject_adapter_in_model(lora, unet, "one")
    wrapped = [(p, m) for p in unet.modules() for m in vars(p)["_modules"].values() if hasattr(m, "lora_A")]
    assert len(wrapped) == 6 * CROSS_ATTENTIONS
    seen = [before, run(unet, context)]
    for _, layer in wrapped:
        layer.set_scale("one", 0.5)
    seen.append(run(unet, context))
    for i, one in enumerate(seen):
        assert all(relative_error(one, other) > 1e-4 for other in seen[:i])

    unloaded = copy.deepcopy(unet)  # unloaded, nothing fused
    unload(unloaded)
    assert relative_error(run(unloaded, context), before) <= TOLERANCE
    assert relative_error(fuse_without_a_call(unet, context, before), seen[2]) <= 1e-5


def unload(unet: UNet) -> None:
    for module in list(unet.modules()):
        for name, layer in list(module.named_children()):
            if hasattr(layer, "lora_A"):
                setattr(module, name, layer.get_base_layer())
    del unet.peft_config


def fuse_without_a_call(unet: UNet, context: Tensor, before: Tensor) -> Tensor:
    """Keys and values remembered from before the adapter; it is loaded, fused and unloaded with no call between."""
    import peft

    adapters = {name: p for name, p in unet.state_dict().items() if "lora_" in name}
    scale = next(m for m in unet.modules() if hasattr(m, "lora_A")).scaling["one"]
    unload(unet)
    assert relative_error(run(unet, context), before) <= TOLERANCE  # remembered now
    lora = peft.LoraConfig(r=2, lora_alpha=2 * scale, target_modules=["to_q", "to_k", "to_v"])
    peft.inject_adapter_in_model(lora, unet, "one")
    unet.load_state_dict(adapters, strict=False)
    for layer in [m for m in unet.modules() if hasattr(m, "lora_A")]:
        layer.merge()
    unload(unet)
    return run(unet, context)


def test_projected_context_is_remembered_with_its_keys_and_values(context, projected):
    torch.manual_seed(0)
    wide = dataclasses.replace(CONFIG, encoder_hid_dim=24, encoder_hid_dim_type="text_proj")
    unet = UNet(wide).eval().requires_grad_(False)
    outputs = [run(unet, context) for _ in range(3)]
    assert sum(x.shape == context.shape for x in projected) == CROSS_ATTENTIONS
    with torch.no_grad():
        unet.encoder_hid_proj.bias.add_(1)
    outputs.append(run(unet, context))
    unet.encoder_hid_proj = nn.Linear(24, 24)
    outputs.append(run(unet, context))
    assert torch.equal(outputs[0], outputs[2])
    assert relative_error(outputs[3], outputs[0]) > 1e-4 and relative_error(outputs[4], outputs[3]) > 1e-4
    assert relative_error(outputs[4], fresh(unet, context)) <= TOLERANCE


def test_writing_through_data_needs_forget(unet, context):
    """PyTorch keeps no record of it; a call that records gradients, train() or eval() between will do, too."""
    for tell in (unet.forget, unet.eval, lambda: unet(sample(), 7, context)):
        run(unet, context)
        cross(unet).to_v.weight.data.mul_(1.5)
        tell()
        assert relative_error(run(unet, context), fresh(unet, context)) <= TOLERANCE


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode], ids=["gradients", "inference tensors"])
def test_not_remembered_where_it_could_not_be_checked(unet, context, projected, mode):
    with mode():
        source = context.clone()
        for _ in range(2):
            unet(sample(), 7, source)
    assert contexts_projected(projected, source) == 2 * CROSS_ATTENTIONS


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_inside_vmap(unet, context):
    with torch.no_grad():
        got = torch.vmap(lambda x, c: unet(x[None], 7, c[None]).sample[0])(sample(), context)
    assert relative_error(got, run(unet, context)) <= TOLERANCE


def test_gradients_of_the_context_after_sampling(unet, context):
    unet.requires_grad_()
    with reuse.fixed_weights():
        run(unet, context)
    context.requires_grad_()
    unet(sample(), 7, context).sample.sum().backward()
    assert context.grad.any() and cross(unet).to_k.weight.grad.any()


def test_autocast_keeps_to_itself(unet, context):
    wanted = run(unet, context)
    with torch.autocast("cpu", torch.bfloat16):
        low = run(unet, context)
    assert relative_error(low, wanted) > 1e-4
    assert torch.equal(run(unet, context), wanted)


def test_shapes_alone(unet, context):
    """The meta device knows no autocast: asking whether it is on is an error there."""
    with torch.no_grad():
        out = unet.to("meta")(sample().to("meta"), 3, context.to("meta")).sample
    assert out.is_meta and out.shape == sample().shape


def test_results_live_no_longer_than_their_context(unet, context):
    other = context.flip(1)
    run(unet, context)
    run(unet, other)
    values = [weakref.ref(entry.value[0]) for entry in cross(unet)._memory._entries]
    del other
    assert [value() is None for value in values] == [False, True]
    assert len(cross(unet)._memory._entries) == 1


def test_results_of_what_was_overwritten_are_dropped(unet, context):
    for _ in range(3):
        run(unet, context)
        context.add_(1)
    assert len(cross(unet)._memory._entries) == 1


def test_memory_dies_with_its_model(unet, context):
    """At once, not when the garbage collector comes along: it may be that of a GPU."""
    run(unet, context)
    (entry,) = cross(unet)._memory._entries
    gone = weakref.ref(cross(unet)._memory), weakref.ref(entry.value[0])
    attention = cross(unet)
    attention.forget()  # the entry held here
    del entry
    assert gone[1]() is None
    run(unet, context)
    gone = gone[0], weakref.ref(attention._memory._entries[0].value[0])
    gc.disable()
    try:
        attention._memory = reuse.Memory()
        assert [ref() is None for ref in gone] == [True, True]
    finally:
        gc.enable()


def test_a_write_during_the_computation_counts_as_a_change(unet, context):
    """As another thread's would."""
    layers = (cross(unet).to_k, cross(unet).to_v)
    memory = reuse.Memory()

    def compute():
        value = [layer(context) for layer in layers]
        context.add_(1)
        return value

    with torch.no_grad():
        old = memory.recall(context, layers, compute)
        new = memory.recall(context, layers, lambda: [layer(context) for layer in layers])
    assert not torch.equal(new[0], old[0])


def test_threads_share_a_model(unet):
    contexts = [torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    wanted = [fresh(unet, context) for context in contexts]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: run(unet, contexts[i % 4]), range(16)))
    assert all(torch.equal(output, wanted[i % 4]) for i, output in enumerate(got))


def test_copies_and_pickles_start_empty(unet, context):
    run(unet, context)
    file = io.BytesIO()
    torch.save(unet, file)
    file.seek(0)
    for other in (copy.deepcopy(unet), torch.load(file, weights_only=False)):
        assert cross(other)._memory._entries == []
        assert relative_error(run(other, context), run(unet, context)) <= TOLERANCE


@pytest.mark.filterwarnings("ignore")  # tracing warns of each value that it takes for a constant
def test_traced_graph_does_not_hold_a_context(unet, context):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, x, context):
            return self.unet(x, 7, context, return_dict=False)[0]

    run(unet, context)
    with torch.no_grad():
        traced = torch.jit.trace(Plain(), (sample(), context), check_trace=False)
        other = context.flip(0)
        assert relative_error(traced(sample(), other), fresh(unet, other)) <= 1e-5


# ---- one product ----


def joined_products(unet: UNet, context: Tensor, monkeypatch) -> int:
    """How many products with a weight of several projections one call makes."""
    made = []
    linear = nn.functional.linear
    monkeypatch.setattr(joined, "F", SimpleNamespace(linear=lambda *given: made.append(given) or linear(*given)))
    unet.forget()
    run(unet, context)
    monkeypatch.undo()
    return len(made)


EVERY_PRODUCT = 2 * CROSS_ATTENTIONS  # as many self attentions


def lie_apart(model: nn.Module) -> bool:
    return all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())


def test_joined_projections_are_one_product(unet, context, monkeypatch):
    assert joined_products(unet, context, monkeypatch) == 0 and lie_apart(unet)
    parameters, values = dict(unet.named_parameters()), copy.deepcopy(unet.state_dict())
    apart = run(unet, context)
    unet.join_projections()
    assert joined_products(unet, context, monkeypatch) == EVERY_PRODUCT
    assert relative_error(run(unet, context), apart) <= TOLERANCE
    unet.train()
    assert joined_products(unet.eval(), context, monkeypatch) == 0 and lie_apart(unet)
    assert torch.equal(run(unet, context), apart)
    for name, parameter in unet.named_parameters():
        assert parameters[name] is parameter and torch.equal(parameter, values[name])


def test_joined_through_copies_dtypes_and_other_weights(unet, context, monkeypatch):
    unet.join_projections()
    load_other_weights(unet, context)
    for model in (copy.deepcopy(unet), unet.half().float(), copy.deepcopy(unet)):
        assert joined_products(model, context, monkeypatch) == EVERY_PRODUCT
    before = [p.clone() for p in model.parameters()]
    torch.nn.init.zeros_(cross(unet).to_k.weight)  # not the copy's
    assert all(map(torch.equal, model.parameters(), before))


def test_wrapped_projections_are_taken_apart(unet):
    unet.join_projections()
    attention = cross(unet)
    attention.to_v = nn.Sequential(attention.to_v)
    assert lie_apart(unet.train())


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_training_joined_weights(unet, context, fused):
    """The optimizer's parameters stay the model's, and each is moved by its own gradient alone."""
    apart, trained = copy.deepcopy(unet.requires_grad_()), []
    for model in (unet, apart):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4, fused=fused)
        for step in range(3):
            model(sample(step), 7, context).sample.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if model is unet:
                model.join_projections()
        trained.append(run(model, context))
    assert relative_error(*trained) <= 1e-5
    assert relative_error(trained[0], fresh(unet, context)) <= TOLERANCE
    for name, parameter in unet.named_parameters():
        assert relative_error(parameter, apart.get_parameter(name)) <= 1e-4, name


def trainable(kind: str, state: str) -> nn.Module:
    """A model that somebody is about to train."""
    torch.manual_seed(0)
    model = UNet(CONFIG) if kind == "unet" else AutoencoderKL(FIRST_STAGE)
    if state == "moved":
        model.to(torch.float64).to("cpu")
    elif state == "joined before":
        model.join_projections()
        assert not lie_apart(model)
        model.train()
    return model


MODELS = pytest.mark.parametrize("kind", ["unet", "first stage"])
STATES = pytest.mark.parametrize("state", ["new", "moved", "joined before"])


@MODELS
@STATES
def test_programs_that_look_at_storages_store_every_weight(kind, state, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from safetensors.torch import load_file, save_model

    model = trainable(kind, state)
    values = copy.deepcopy(model.state_dict())
    save_model(model, tmp_path / "saved.safetensors")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.save_model(model, tmp_path / "model")
    for file in (tmp_path / "saved.safetensors", tmp_path / "model" / "model.safetensors"):
        stored = load_file(file)
        assert stored.keys() == values.keys()
        assert all(torch.equal(stored[name], value) for name, value in values.items())

    model = accelerator.prepare(model)
    accelerator.save_state(tmp_path / "state")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path / "state")
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


def test_built_in_inference_mode(unet, context):
    with torch.inference_mode():
        other = UNet(CONFIG).eval()
        other.join_projections()
        other.load_state_dict(unet.state_dict())
        for _ in range(2):
            assert relative_error(other(sample(), 7, context).sample, run(unet, context)) <= TOLERANCE
    other.train()


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@torch.no_grad()
def test_linears(bias):
    torch.manual_seed(0)
    layers = [nn.Linear(6, width, bias=bias) for width in (5, 3, 1)]
    x = torch.randn(2, 7, 6)
    wanted = [layer(x) for layer in layers]
    joined.join(layers)
    got = joined.linears(x, layers)
    assert [t.shape for t in got] == [t.shape for t in wanted]
    assert all(relative_error(g, w) <= TOLERANCE for g, w in zip(got, wanted, strict=True))
    assert got[0].untyped_storage().data_ptr() == got[2].untyped_storage().data_ptr()  # one product indeed
    layers[1].weight.zero_()  # still the layer's own
    assert torch.equal(joined.linears(x, layers)[1], (layers[1].bias if bias else torch.zeros(1)).expand(2, 7, 3))


@pytest.mark.parametrize("which", range(3))
def test_a_wrapped_or_hooked_projection_is_called(which):
    layers = [nn.Linear(6, 4) for _ in range(3)]
    joined.join(layers)
    called = []
    layers[which].register_forward_hook(lambda *_: called.append(which))
    with torch.no_grad():
        joined.linears(torch.ones(1, 6), layers)
    assert called == [which]


@pytest.mark.parametrize("kind", ["hook", "pre_hook"])
def test_hooks_on_every_module_see_the_projections(unet, context, kind):
    unet.join_projections()
    run(unet, context)
    called = []
    handle = getattr(nn.modules.module, f"register_module_forward_{kind}")(lambda module, *_: called.append(module))
    try:
        run(unet, context)
    finally:
        handle.remove()
    attention = cross(unet)
    assert all(any(module is layer for module in called) for layer in (attention.to_q, attention.to_k, attention.to_v))


def test_gradients_reach_every_projection():
    layers = [nn.Linear(6, 4) for _ in range(3)]
    joined.join(layers)
    sum(t.sum() for t in joined.linears(torch.ones(1, 6), layers)).backward()
    assert all(layer.weight.grad.all() and layer.bias.grad.all() for layer in layers)


def test_layers_that_cannot_be_joined_stay_where_they_are():
    for layers in (
        [nn.Linear(6, 4), nn.Linear(6, 4).double()],
        [nn.Linear(6, 4), nn.Sequential(nn.Linear(6, 4))],
        [nn.Linear(6, 4, device="meta"), nn.Linear(6, 4, device="meta")],
        [nn.Linear(6, 4), nn.Linear(6, 4, bias=False)],
    ):
        before = [p.data_ptr() for layer in layers[1:] for p in layer.parameters() if p.ndim == 1 or p.is_meta]
        joined.join(layers)
        assert [p.data_ptr() for layer in layers[1:] for p in layer.parameters() if p.ndim == 1 or p.is_meta] == before
    with torch.no_grad():
        half_joined = joined.linears(torch.ones(1, 6), layers)
        assert torch.equal(half_joined[0], layers[0](torch.ones(1, 6)))


def test_joined_weights_are_stored_as_any_others(unet, tmp_path):
    from safetensors.torch import load_file, save_file

    unet.join_projections()
    save_file(unet.state_dict(), tmp_path / "unet.safetensors")
    torch.save(unet.state_dict(), tmp_path / "unet.pt")
    for stored in (load_file(tmp_path / "unet.safetensors"), torch.load(tmp_path / "unet.pt", weights_only=True)):
        assert all(torch.equal(stored[name], tensor) for name, tensor in unet.state_dict().items())
    size = sum(t.nbytes for t in unet.state_dict().values())
    assert size <= (tmp_path / "unet.safetensors").stat().st_size < size * 1.1 + 30_000


def small_model() -> LatentDiffusion:
    torch.manual_seed(0)
    first_stage = AutoencoderKL(FIRST_STAGE)
    return LatentDiffusion(UNet(CONFIG), first_stage, None, NoiseSchedule(DiffusionConfig())).eval()


def test_a_model_loaded_for_inference_is_joined(tmp_path):
    small_model().save(tmp_path / "model.safetensors")
    model = LatentDiffusion.load(tmp_path / "model.safetensors")
    for part in (model.unet, model.first_stage):
        assert not lie_apart(part) and lie_apart(part.train())


# ---- time embeddings of a schedule ----


@pytest.fixture
def embedded(unet) -> list[int]:
    """How many timesteps each call of the time embedding was given (without a hook, which would be noticed)."""
    counts: list[int] = []

    class Counting(type(unet.time_proj)):
        def forward(self, t):
            counts.append(len(t))
            return super().forward(t)

    unet.time_proj.__class__ = Counting
    return counts


SCHEDULE = [900, 500.5, 100]


def test_a_schedule_is_embedded_at_once(unet, context, embedded):
    wanted = [run(unet, context, t) for t in SCHEDULE]
    embedded.clear()
    unet.precompute_time(SCHEDULE)
    assert embedded == [3]
    both = torch.tensor([500.5, 100.0])
    for t, output in zip(SCHEDULE, wanted, strict=True):
        for form in (t, torch.tensor(t), torch.tensor([t]), torch.tensor([t, t])):
            assert relative_error(run(unet, context, form), output) <= TOLERANCE
    assert relative_error(run(unet, context, both)[1:], wanted[2][1:]) <= TOLERANCE
    assert embedded == [3]
    other = run(unet, context, 7)
    assert embedded == [3, 2]  # a timestep of another schedule is embedded as ever
    assert relative_error(other, wanted[0]) > 1e-3


@torch.no_grad()
def change_time_weight(unet):
    unet.time_embedding.linear_1.weight.mul_(2)


def change_time_layer(unet):
    unet.time_embedding.linear_2.register_forward_hook(lambda m, i, o: 2 * o)


def change_time_weight_unseen(unet):
    """As an adapter does that is loaded, fused and unloaded with no call between."""
    layer = unet.time_embedding.linear_2
    unet.time_embedding.linear_2 = nn.Sequential(layer)
    layer.weight.data.mul_(2)
    unet.time_embedding.linear_2 = layer


def drop_time_bias(unet):
    unet.time_embedding.linear_2.bias = None


CHANGES_OF_TIME = (change_time_weight, change_time_layer, change_time_weight_unseen, drop_time_bias)


@pytest.mark.parametrize("change", CHANGES_OF_TIME, ids=lambda change: change.__name__)
def test_a_change_of_the_time_embedding_is_noticed(unet, context, change):
    unet.precompute_time(SCHEDULE)
    before = run(unet, context, 900)
    change(unet)
    after = run(unet, context, 900)
    assert relative_error(after, before) > 1e-4
    unet.forget()
    assert relative_error(run(unet, context, 900), after) <= TOLERANCE


@pytest.mark.parametrize("tell", ["forget", "eval", "float"])
def test_schedule_is_forgotten(unet, context, embedded, tell):
    unet.precompute_time(SCHEDULE)
    getattr(unet, tell)()
    embedded.clear()
    run(unet, context, 900)
    assert embedded == [2]


@reuse.fixed_weights()
def test_precomputed_times_are_not_used_with_gradients_or_in_another_dtype(unet, context, embedded):
    unet.requires_grad_().precompute_time(SCHEDULE)
    unet(sample(), 900, context).sample.sum().backward()
    assert unet.time_embedding.linear_1.weight.grad.any()
    unet.precompute_time(SCHEDULE)
    embedded.clear()
    with torch.no_grad():
        unet.double()(sample().double(), 900, context.double())
    assert embedded == [2]
