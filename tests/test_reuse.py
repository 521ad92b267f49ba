"""Reuse of earlier results: the numbers are the same, there is less work, and nothing is stale."""

from __future__ import annotations

import contextvars
import copy
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from compare import relative_error
from small_models import KL, UNET, same
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

from ldm_fast.models import attention, joined, memory
from ldm_fast.models.autoencoder import AutoencoderKL
from ldm_fast.models.memory import fixed_weights
from ldm_fast.models.unet import UNet

CROSS_ATTENTIONS = 4  # one on the way down, one in the middle, two on the way up
TOLERANCE = 1e-6


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(UNET).eval()


@pytest.fixture
def context() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def projected(monkeypatch) -> Callable[[Tensor], float]:
    """Counts how often one cross attention has computed the keys and values of a tensor in this test."""
    sources, linears = [], attention.linears
    monkeypatch.setattr(attention, "linears", lambda x, layers: sources.append(x) or linears(x, layers))
    return lambda source: sum(x is source for x in sources) / CROSS_ATTENTIONS


def sample(seed: int = 2) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(unet: UNet, context: Tensor, timestep: int = 7) -> Tensor:
    return unet(sample(), timestep, context).sample


def fresh(unet: UNet, context: Tensor) -> Tensor:
    """Return the output of a copy of the model, which has nothing stored, for a context with the same values."""
    return run(copy.deepcopy(unet), context.clone())


def cross(unet: UNet) -> attention.Attention:
    return unet.mid_block.attentions[0].transformer_blocks[0].attn2


def test_two_contexts_are_projected_once_in_a_scope_and_a_third_replaces_one(unet, context, projected):
    contexts, unets = [context, context.flip(1), context + 1], [unet, UNet(UNET).eval()]
    calls = [(one, c, t) for t in (900, 500) for one in unets for c in contexts[:2]]
    wanted = [run(*call) for call in calls]
    for times in (6, 8):  # twice for each UNet before the scopes, and once in each scope
        with fixed_weights():
            assert all(torch.equal(run(*call), output) for call, output in zip(calls, wanted, strict=True))
        assert [projected(c) for c in contexts] == [times, times, 0]
    with fixed_weights():
        for c in (*contexts, *contexts):
            run(unet, c)
    assert [projected(c) for c in contexts] == [10, 10, 2]


CHANGES = {
    "context written": lambda unet, context: context.mul_(2),
    "view of context written": lambda unet, context: context[1, 2:].add_(1),
    "context written in inference mode": torch.inference_mode()(lambda unet, context: context.mul_(2)),
    "layer exchanged": lambda unet, _: setattr(cross(unet), "to_v", nn.Linear(8, 64, bias=False)),
    "layer wrapped": lambda unet, _: setattr(cross(unet), "to_v", nn.Sequential(cross(unet).to_v, nn.Tanh())),
    "layer hooked": lambda unet, _: cross(unet).to_v.register_forward_hook(lambda module, inputs, out: 3 * out),
    "layer pruned": lambda unet, _: l1_unstructured(cross(unet).to_k, "weight", 0.9),
    "forward replaced": lambda unet, _: setattr(cross(unet).to_v, "forward", nn.Linear(8, 64).forward),
}


@fixed_weights()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_in_a_scope_is_noticed(unet, context, change):
    before = run(unet, context)
    change(unet, context)
    after = run(unet, context)
    assert not torch.equal(after, before)
    assert relative_error(after, fresh(unet, context)) <= TOLERANCE
    assert torch.equal(run(unet, context), after)


WRITES = {
    "to the context": lambda unet, context: context.data.mul_(2),
    "of averages": lambda unet, _: [p.data.copy_(1.1 * p.data) for p in unet.parameters()],  # EMAModel.copy_to
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_untracked_writes_between_scopes_are_noticed(unet, context, write):
    with fixed_weights():
        unet.precompute_time([7])
        before = run(unet, context)
    write(unet, context)
    with fixed_weights():
        after = run(unet, context)
    assert relative_error(after, before) > 1e-3
    assert relative_error(after, fresh(unet, context)) <= TOLERANCE


def test_a_scope_holds_for_its_thread_and_until_its_end(unet, context, projected):
    contexts = [context + i for i in range(4)]
    wanted = [fresh(unet, c) for c in contexts]
    with ThreadPoolExecutor(4) as pool, fixed_weights():
        for _ in range(2):
            run(unet, context)
            with fixed_weights():  # starts empty
                run(unet, context)
        assert projected(context) == 3
        pool.submit(run, unet, context).result()
        assert projected(context) == 4
        inside = contextvars.copy_context()
        pool.submit(inside.run, run, unet, context).result()
        assert projected(context) == 4
        tasks = [pool.submit(contextvars.copy_context().run, run, unet, contexts[i % 4]) for i in range(16)]
        assert all(torch.equal(task.result(), wanted[i % 4]) for i, task in enumerate(tasks))
    for times in (5, 6):
        inside.run(run, unet, context)
        assert projected(context) == times


def test_results_live_until_the_end_of_the_scope(unet, context):
    """They do not wait for the garbage collector, since the memory may be that of a GPU."""
    gc.collect()
    with fixed_weights():
        run(unet, context.clone())
        scope = memory._scope.get()  # as a task that was started inside would hold it
        kept = [weakref.ref(tensor) for results in scope.values() for tensor in (results[0][0], results[0][2][0])]
        assert len(kept) == 2 * CROSS_ATTENTIONS and all(ref() is not None for ref in kept)
    assert all(ref() is None for ref in kept)


@fixed_weights()
def test_lora_loaded_scaled_and_unloaded_in_one_scope(unet, context):
    peft = pytest.importorskip("peft")
    seen, targets = [run(unet, context)], ["to_q", "to_k", "to_v"]
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets, init_lora_weights=False), unet, "one")
    wrapped = [(p, n, m) for p in list(unet.modules()) for n, m in p.named_children() if hasattr(m, "lora_A")]
    for scale in (1.0, 0.5):
        for _, _, layer in wrapped:
            layer.set_scale("one", scale)
        seen.append(run(unet, context))
    assert all(relative_error(one, other) > 1e-4 for i, one in enumerate(seen) for other in seen[:i])
    for parent, name, layer in wrapped:
        setattr(parent, name, layer.get_base_layer())
    assert len(wrapped) == 6 * CROSS_ATTENTIONS and torch.equal(run(unet, context), seen[0])


@fixed_weights()
def test_projected_context_is_remembered_with_its_keys_and_values(context):
    torch.manual_seed(0)
    unet = UNet(replace(UNET, encoder_hid_dim=8, encoder_hid_dim_type="text_proj")).eval()
    assert torch.equal(run(unet, context), run(unet, context))
    assert [len(results) for results in memory._scope.get().values()] == [1] * (1 + CROSS_ATTENTIONS)
    unet.encoder_hid_proj = nn.Linear(8, 8)
    assert relative_error(run(unet, context), fresh(unet, context)) <= TOLERANCE


@fixed_weights()
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
@torch.no_grad()
def test_contexts_that_are_neither_remembered_nor_recalled(unet, context, projected, mode):
    with mode():
        source = context.clone()
    run(unet, source)
    with mode():
        unet(sample(), 7, source), unet(sample(), 7, source)
    assert projected(source) == 3


@fixed_weights()
@torch.no_grad()
def test_a_write_by_another_thread_during_the_computation_counts(unet, context):
    layer = cross(unet).to_k
    old = memory.recall(context, (layer,), lambda: (layer(context), context.add_(1)))
    assert not torch.equal(memory.recall(context, (layer,), lambda: (layer(context),))[0], old[0])


@fixed_weights()
@pytest.mark.filterwarnings("ignore")  # tracing warns about each value that it takes for a constant
@pytest.mark.parametrize(
    "make",
    [
        lambda f: torch.compile(f, backend="eager", fullgraph=True),
        lambda f: torch.jit.trace(f, (sample(), torch.ones(2, 5, 8)), check_trace=False),
        lambda f: torch.vmap(lambda x, c: f(x[None], c[None])[0]),
    ],
)
@torch.no_grad()
def test_compiled_and_traced_models_hold_no_context(unet, context, make):
    run(unet.requires_grad_(False), context)
    function = make(lambda x, c: unet(x, 7, c).sample)
    for one in (context, context, context.flip(0)):
        assert relative_error(function(sample(), one), fresh(unet, one)) <= 1e-5


@fixed_weights()
def test_gradients_and_the_meta_device_after_sampling(unet, context):
    run(unet, context.requires_grad_())
    unet(sample(), 7, context).sample.sum().backward()
    assert context.grad.any() and cross(unet).to_k.weight.grad.any()
    with torch.no_grad():  # the meta device knows no autocast, and asking it is an error
        assert unet.to("meta")(sample().to("meta"), 3, context.to("meta")).sample.is_meta


def joined_products(unet: UNet, context: Tensor, monkeypatch) -> int:
    """Return how many products with the joined weight of several projections one call makes."""
    made, linear = [], nn.functional.linear
    with monkeypatch.context() as patch:
        patch.setattr(joined, "F", SimpleNamespace(linear=lambda *given: made.append(given) or linear(*given)))
        run(unet, context)
    return len(made)


def lie_apart(model: nn.Module) -> bool:
    return all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())


def test_joined_projections_are_one_product(unet, context, monkeypatch):
    assert joined_products(unet, context, monkeypatch) == 0 and lie_apart(unet)
    parameters, values = dict(unet.named_parameters()), copy.deepcopy(unet.state_dict())
    apart = run(unet, context)
    unet.join_projections()
    unet.load_state_dict(unet.state_dict())
    assert relative_error(run(unet, context), apart) <= TOLERANCE
    for model in (unet, copy.deepcopy(unet), copy.deepcopy(unet).half().float()):
        assert joined_products(model, context, monkeypatch) == 2 * CROSS_ATTENTIONS  # there are as many self attentions
    nn.init.zeros_(cross(model).to_k.weight)  # only in the copy
    with nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None):  # it must see every layer
        assert joined_products(unet, context, monkeypatch) == 0
    unet.train()
    assert joined_products(unet.eval(), context, monkeypatch) == 0 and lie_apart(unet)
    assert torch.equal(run(unet, context), apart)
    for name, parameter in unet.named_parameters():
        assert parameters[name] is parameter and torch.equal(parameter, values[name])


def test_built_and_joined_in_inference_mode(unet, context):
    with torch.inference_mode():
        other = UNet(UNET).eval()
        other.join_projections()
        other.load_state_dict(unet.state_dict())
        assert relative_error(other(sample(), 7, context).sample, run(unet, context)) <= TOLERANCE
    cross(other).to_v = nn.Sequential(cross(other).to_v)
    assert lie_apart(other.train())


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_training_joined_weights(unet, context, fused):
    """The optimizer's parameters remain those of the model, and each is moved only by its own gradient."""
    apart = copy.deepcopy(unet)
    for model in (unet, apart):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4, fused=fused)
        for step in range(3):
            model(sample(step), 7, context).sample.square().mean().backward()
            optimizer.step()
            if model is unet:
                model.join_projections()
    for name, parameter in unet.named_parameters():
        assert relative_error(parameter, apart.get_parameter(name)) <= 1e-4, name


@pytest.mark.parametrize("build", [lambda: UNet(UNET), lambda: AutoencoderKL(KL)], ids=["unet", "kl"])
@pytest.mark.parametrize("state", ["new", "moved", "joined before", "joined"])
def test_other_programs_store_every_weight(build, state, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from safetensors.torch import load_file, save_file, save_model

    model = build().double().to("cpu") if state == "moved" else build()
    if "joined" in state:
        model.join_projections()
        assert not lie_apart(model)
    reference = copy.deepcopy(model)
    save_file(model.state_dict(), tmp_path / "file.safetensors")
    torch.save(model.state_dict(), tmp_path / "file.pt")
    stored = [load_file(tmp_path / "file.safetensors"), torch.load(tmp_path / "file.pt")]
    if state != "joined":  # programs that look at storages do not understand joined weights
        model.train()
        save_model(model, tmp_path / "model.safetensors")
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.save_model(model, tmp_path / "model")
        stored += [load_file(tmp_path / file) for file in ("model.safetensors", "model/model.safetensors")]
        model = accelerator.prepare(model)
        accelerator.save_state(tmp_path / "state")
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        accelerator.load_state(tmp_path / "state")
        stored.append(model.state_dict())
    assert all(same(reference, tensors) for tensors in stored)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_linears(bias):
    torch.manual_seed(0)
    layers = [nn.Linear(6, width, bias=bias) for width in (5, 3, 1)]
    x, called = torch.randn(2, 7, 6), []
    wanted = [layer(x) for layer in layers]
    joined.join(layers)
    with torch.no_grad():
        got = joined.linears(x, layers)
    assert all(g.shape == w.shape and relative_error(g, w) <= TOLERANCE for g, w in zip(got, wanted, strict=True))
    assert got[0].untyped_storage().data_ptr() == got[2].untyped_storage().data_ptr()  # views of one product
    sum(t.sum() for t in joined.linears(x, layers)).backward()
    assert all(p.grad.all() for layer in layers for p in layer.parameters())
    nn.init.zeros_(layers[1].weight)  # still the layer's own
    with torch.no_grad():
        assert torch.equal(joined.linears(x, layers)[1], layers[1](x))
        for layer in layers:
            with layer.register_forward_pre_hook(lambda module, *_: called.append(module)):
                joined.linears(x, layers)
    assert called == layers


def test_layers_that_cannot_be_joined_stay_where_they_are():
    (quantized := nn.Linear(6, 4)).weight = nn.Parameter(torch.ones(4, 6).as_subclass(type("Other", (Tensor,), {})))
    subclassed = type("Other", (nn.Linear,), {})(6, 4)
    for other in (nn.Linear(6, 4).double(), nn.Sequential(nn.Linear(6, 4)), quantized, subclassed):
        layers = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4), other])
        joined.join(layers)
        assert lie_apart(layers)
    joined.join(layers := [nn.Linear(6, 4), nn.Linear(6, 4, bias=False)])
    with torch.no_grad():
        assert torch.equal(joined.linears(x := torch.ones(1, 6), layers)[0], layers[0](x))


SCHEDULE = [900, 500.5, 100]


@pytest.fixture
def embedded(unet) -> list[int]:
    counts: list[int] = []  # how many timesteps each call of the time embedding was given
    unet.time_proj.register_forward_hook(lambda module, inputs, output: counts.append(len(output)))
    return counts


def test_a_schedule_is_embedded_at_once(unet, context, embedded):
    wanted = [run(unet, context, t) for t in SCHEDULE]
    with fixed_weights():
        unet.precompute_time(SCHEDULE)
        for t, output in zip(SCHEDULE, wanted, strict=True):
            for form in (t, torch.tensor(t), torch.tensor([t]), torch.tensor([t, t])):
                assert relative_error(run(unet, context, form), output) <= TOLERANCE
        both = run(unet, context, torch.tensor([500.5, 100.0]))
        assert relative_error(both[1:], wanted[2][1:]) <= TOLERANCE and embedded == [2, 2, 2, 3]
        assert relative_error(run(unet, context, 7), wanted[0]) > 1e-3  # of another schedule: embedded as usual
    unet.precompute_time(SCHEDULE)  # without effect outside a scope
    run(unet, context, 900)
    assert embedded == [2, 2, 2, 3, 2, 3, 2]


@fixed_weights()
@pytest.mark.parametrize("change", ["hooked", "exchanged", "another dtype", "gradients"])
def test_precomputed_embeddings_are_not_used(unet, context, embedded, change):
    unet.precompute_time(SCHEDULE)
    layer, x = unet.time_embedding.linear_2, sample()
    if change == "hooked":
        layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif change == "exchanged":
        unet.time_embedding.linear_2 = copy.deepcopy(layer)
    elif change == "another dtype":
        unet.double()
        x, context = x.double(), context.double()
    embedded.clear()
    with torch.set_grad_enabled(change == "gradients"):
        unet(x, 900, context)
    assert embedded == [2]
