"""Attention, embeddings and LayerNorm streams: what can be removed; the rest computes the same."""

import copy
import json
import math
import struct

import pytest
import torch
from cutting import at_random, build, check, difference, free, images, rebuilt
from torch import nn
from torch.nn import functional

import secateur
from secateur.base import plugin
from secateur.base.errors import CheckpointError, PruningError
from secateur.base.torchvision_import import import_torchvision
from secateur.channels import graph as channels
from secateur.nn import attention, checkpoint, cost, norms
from secateur.pruning import proof, removal
from secateur.pruning.apply import apply_decision
from secateur.pruning.decision import PruningContext, PruningDecision
from secateur.sparsity import masks
from secateur.training import penalty as penalties

import_torchvision()

from torchvision.models.convnext import CNBlockConfig, ConvNeXt  # noqa: E402
from torchvision.models.swin_transformer import (  # noqa: E402
    ShiftedWindowAttention,
    SwinTransformer,
)
from torchvision.models.vision_transformer import VisionTransformer  # noqa: E402

CLASSES = 5


class Written(nn.Module):
    """One block with separate layers for queries, keys and values, and einsum."""

    def __init__(self, split, scaled=lambda _, scores: scores / math.sqrt(4)):
        super().__init__()
        self.split, self.scaled, self.heads, self.width = split, scaled, 3, 4
        self.patches = nn.Conv2d(3, 10, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 10))
        self.norm = nn.LayerNorm(10)
        self.q, self.k, self.v = (nn.Linear(10, 12) for _ in range(3))
        self.out = nn.Linear(12, 10)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        y = self.norm(x)
        q, k, v = (self.split(self, layer(y)) for layer in (self.q, self.k, self.v))
        scores = self.scaled(self, torch.einsum("bqhd,bkhd->bhqk", q, k))
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        return self.head((x + self.out(mixed))[:, 0])


class Tied(nn.Module):
    """The head width is computed from the embedding width, as in the first DeiT."""

    def __init__(self):
        super().__init__()
        self.heads = 3
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.grow, self.shrink = nn.Linear(12, 9), nn.Linear(9, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        n, count, width = x.shape
        qkv = self.qkv(x).reshape(n, count, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(n, count, width))
        return self.head((x + self.shrink(functional.gelu(self.grow(x)))).mean(1))


def written():
    return Written(lambda net, x: x.view(x.size(0), x.size(1), net.heads, net.width))


def deduced():
    return Written(lambda net, x: x.unflatten(-1, (net.heads, -1)))


def vit():
    return VisionTransformer(8, 4, 2, 3, 24, 16, num_classes=CLASSES)


def swin():
    return SwinTransformer([4, 4], 8, [2, 1], [2, 4], [2, 2], mlp_ratio=1, num_classes=CLASSES)


def deit():
    timm = pytest.importorskip("timm.models.vision_transformer")
    return timm.VisionTransformer(
        img_size=8,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
        mlp_ratio=1,
        num_classes=CLASSES,
    )


def convnext():
    rows = [CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)]
    return ConvNeXt(rows, num_classes=CLASSES)


NETWORKS = [(written, 8), (deduced, 8), (vit, 8), (swin, 20), (deit, 8), (convnext, 32)]
networks = pytest.mark.parametrize(
    ("make", "side"), [pytest.param(m, s, id=m.__name__) for m, s in NETWORKS]
)


def followed(make, side, seed=0):
    model, batch = build(make, seed), images(2, side, seed)
    return model, batch, channels.build_channel_graph(model, batch)


# ---- the same code with free sizes ------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"batch_first": False}])
def test_free_attention_computes_what_torchs_does(options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(12, 3, **{"batch_first": True, **options}).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = module(x, x, x, need_weights=False)[0]
    actual = attention.free_class(module).forward(module, x, x, x, need_weights=False)[0]
    assert torch.allclose(actual, expected, atol=1e-12, rtol=0)


ATTENTION_MASKS = {
    "bool": lambda: torch.ones(5, 5).triu(1).bool(),
    "float": lambda: torch.randn(5, 5).double(),
    "bool_by_head": lambda: torch.rand(2 * 3, 5, 5) > 0.8,
    "float_by_head": lambda: torch.randn(2 * 3, 5, 5).double(),
}


@pytest.mark.parametrize("kind", ATTENTION_MASKS)
def test_free_attention_takes_masks_as_torchs_does(kind):
    """In a bool mask, True is for positions that take no part."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(12, 3, batch_first=True).double().eval()
    mask = ATTENTION_MASKS[kind]()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = module(x, x, x, attn_mask=mask)[0]
    actual = attention.free_class(module).forward(module, x, x, x, attn_mask=mask)[0]
    assert not torch.allclose(expected, module(x, x, x)[0], atol=1e-3)
    assert torch.allclose(actual, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("size", "shift"), [((8, 8), 0), ((8, 8), 2), ((7, 9), 2), ((4, 8), 2), ((3, 3), 2)]
)
def test_free_window_attention_computes_what_torchvisions_does(size, shift):
    """Shifted or not, padded, and with images that are smaller than the window."""
    torch.manual_seed(0)
    module = ShiftedWindowAttention(12, [4, 4], [shift, shift], 3).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    actual = attention.free_class(module).forward(module, x)
    assert torch.allclose(actual, module(x), atol=1e-12, rtol=0)


def test_a_masked_layer_norm_is_that_of_the_channels_that_remain():
    torch.manual_seed(0)
    norm = nn.LayerNorm(6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, kept = torch.randn(3, 6, dtype=torch.float64), [0, 2, 5]
    before = norm(x)
    norms.mask_layer_norm(norm, torch.tensor([1, 4]))
    norms.mask_layer_norm(norm, torch.tensor([3]))
    out = copy.deepcopy(norm)(x)
    expected = functional.layer_norm(x[:, kept], (3,), norm.weight[kept], norm.bias[kept])
    assert torch.allclose(out[:, kept], expected, atol=1e-12, rtol=0)
    assert not out[:, [1, 3, 4]].any()
    norms.unmask_layer_norm(norm)
    assert torch.equal(norm(x), before)


# ---- what can be removed -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "side", "sizes"),
    [
        (written, 8, [10, 3]),
        (deduced, 8, [10, 3]),
        (vit, 8, [24, 3, 16, 3, 16]),
        (swin, 20, [8, 2, 8, 2, 8, 16, 4, 16]),
        (deit, 8, [24, 3, 24, 3, 24]),
        (convnext, 32, [8, 32, 12, 48]),
    ],
)
def test_heads_widths_and_embeddings_are_groups(make, side, sizes):
    """The embedding once per stage; then, for each block, its heads and the width of its MLP."""
    _, _, graph = followed(make, side)
    assert [group.size for group in free(graph)] == sizes
    assert {g.locked for g in graph.groups} == {
        None,
        "an input of the network",
        "an output of the network",
    }


def test_a_head_is_all_rows_of_its_queries_keys_and_values():
    _, _, graph = followed(vit, 8)
    group = next(g for g in free(graph) if g.name.endswith("0.self_attention.in_proj_weight"))
    rows = {m.tensor.rpartition(".")[2]: m.index[1].tolist() for m in group.members}
    head = [*range(8, 16)]
    three = [*head, *(24 + k for k in head), *(48 + k for k in head)]
    assert rows == {"in_proj_weight": three, "in_proj_bias": three, "weight": head}
    embedding = graph.group("conv_proj")
    kinds = {member.tensor: member.kind for member in embedding.members}
    assert kinds["class_token"] == kinds["encoder.pos_embedding"] == "scale"


def test_heads_whose_width_follows_from_the_embedding_are_locked_with_it():
    model, batch, graph = followed(Tied, 8)
    assert [group.name for group in free(graph)] == ["grow"]
    assert "counts other channels" in graph.group("qkv").locked
    assert "counts other channels" in graph.group("patches").locked
    check(model, graph, {"grow": torch.tensor([0, 4])}, batch)


def test_heads_whose_number_is_hard_coded_are_locked():
    _, _, graph = followed(lambda: Written(lambda _, x: x.unflatten(-1, (3, -1))), 8)
    assert [group.name for group in free(graph)] == ["patches"]
    assert "hard-coded" in graph.group("q").locked


CALCULATED = {
    "divided": lambda net, scores: scores / math.sqrt(12 // net.heads),
    "root": lambda net, scores: scores / math.sqrt(net.heads),
    "power": lambda net, scores: scores * net.heads**-0.5,
    "factor": lambda net, scores: scores * net.heads,
    "sizes": lambda net, scores: scores * (scores.shape[-1] // net.heads),
}


@pytest.mark.parametrize("kind", CALCULATED)
def test_heads_whose_number_the_code_calculates_with_are_locked(kind):
    """The scale keeps its value, so the network computes the same without the other channels."""

    def make():
        return Written(lambda net, x: x.unflatten(-1, (net.heads, -1)), CALCULATED[kind])

    model, batch, graph = followed(make, 8)
    assert [group.name for group in free(graph)] == ["patches"]
    assert graph.group("q").locked == "the code calculates with heads"
    check(model, graph, {"patches": torch.tensor([1, 4, 6])}, batch)


def test_a_width_that_the_code_calculates_from_the_number_of_heads_locks_them():
    _, _, graph = followed(
        lambda: Written(lambda n, x: x.unflatten(-1, (n.heads, 12 // n.heads))), 8
    )
    assert graph.group("q").locked == "the code calculates with heads"


@pytest.mark.parametrize("key", ["k", "mask"])
def test_attention_that_is_not_covered_is_named(key):
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(3, 1, batch_first=True, add_zero_attn=key != "k")

        def forward(self, x):
            x = x.flatten(2).transpose(1, 2)
            return self.attention(x, x + 1 if key == "k" else x, x)[0]

    with pytest.raises(PruningError, match=r"a MultiheadAttention .* is not covered"):
        channels.build_channel_graph(Crossed(), images())


class Causal(nn.Module):
    """Attention with a bool mask: a buffer, made by the code, or with an entry for every head."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, CLASSES)
        mask = torch.ones(4, 4).triu(1).bool()
        self.register_buffer("mask", mask if kind == "buffer" else mask.repeat(2 * 3, 1, 1))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        mask = torch.ones(4, 4).triu(1).bool() if self.kind == "code" else self.mask
        x, weights = self.attention(x, x, x, attn_mask=mask)
        if self.kind == "use":
            x = x * weights.mean()
        return (self.head(x.mean(1)), weights) if self.kind == "weights" else self.head(x.mean(1))


@pytest.mark.parametrize("kind", ["buffer", "code"])
def test_attention_with_a_bool_mask_is_pruned(kind):
    model, batch, graph = followed(lambda: Causal(kind), 8)
    assert [group.size for group in free(graph)] == [12, 3, 12]
    chosen = {"patches": torch.arange(5), "attention.in_proj_weight": torch.tensor([1])}
    check(model, graph, chosen, batch)


def test_heads_with_masks_of_their_own_are_locked():
    model, batch, graph = followed(lambda: Causal("heads"), 8)
    assert "entries for each head" in graph.group("attention.in_proj_weight").locked
    check(model, graph, {"patches": torch.arange(5)}, batch)


def test_a_network_that_returns_attention_weights_is_told_that_the_compact_one_does_not():
    model, batch = build(lambda: Causal("weights")).float(), images(2, 8).float()
    with pytest.raises(PruningError, match=r"returns 2 tensors, the compact network 1: a Multih"):
        secateur.prune(model, batch, secateur.pruners.magnitude(granularity="group", ratios=0.5))


def test_a_network_that_uses_attention_weights_is_told_that_this_is_not_covered():
    with pytest.raises(PruningError, match=r"uses attention weights of a Mult.* not covered"):
        secateur.channel_graph(build(lambda: Causal("use")).float(), images(2, 8).float())


# ---- masked equals compact ---------------------------------------------------------------------


@networks
@pytest.mark.parametrize("seed", range(2))
def test_masked_equals_compact(make, side, seed):
    model, batch, graph = followed(make, side, seed)
    _, compact = check(model, graph, at_random(graph, seed), batch)
    assert difference(compact.model, rebuilt(make, compact), batch) == 0


@pytest.mark.slow
@networks
def test_masked_equals_compact_many_times(make, side):
    model, batch, graph = followed(make, side)
    for seed in range(200):
        check(model, graph, at_random(graph, seed), batch)


@pytest.mark.parametrize(("make", "side"), [(written, 8), (vit, 8), (swin, 20)])
def test_every_group_alone_and_down_to_one_channel(make, side):
    model, batch, graph = followed(make, side)
    for group in free(graph)[:3]:
        check(model, graph, {group.name: torch.arange(1, group.size)}, batch)


def test_a_compact_attention_has_fewer_heads_of_the_old_width():
    model, batch, graph = followed(vit, 8)
    name = "encoder.layers.encoder_layer_1.self_attention"
    chosen = {f"{name}.in_proj_weight": torch.tensor([0, 2]), "conv_proj": torch.arange(5)}
    _, compact = check(model, graph, chosen, batch)
    small = compact.model.get_submodule(name)
    assert (small.num_heads, small.embed_dim) == (1, 19)
    assert small.in_proj_weight.shape == (24, 19)
    assert small.out_proj.weight.shape == (19, 8)
    assert compact.model.hidden_dim == 19
    assert model.hidden_dim == 24  # the dense network is unchanged
    assert type(model.get_submodule(name)) is nn.MultiheadAttention


# ---- dead channels -----------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "side"), [(vit, 8), (deit, 8), (written, 8), (swin, 20)])
def test_a_head_that_nothing_reads_is_dead(make, side):
    model, batch, graph = followed(make, side)
    group = next(g for g in free(graph) if g.size in (2, 3))
    readers = [m for m in group.members if m.kind == "in"]
    with torch.no_grad():
        for member in readers:
            model.get_parameter(member.tensor)[:, member.index[1]] = 0
    compact = removal.remove_dead(model, {}, batch[:1])
    assert proof.verify(model, compact, batch, proof.FLOAT64_TOLERANCE) < 1e-9
    after = channels.build_channel_graph(compact.model, batch)
    assert after.group(group.name).size == group.size - 1
    assert cost.parameters(compact.model) < cost.parameters(model)


def test_values_that_are_constant_are_folded_behind_attention():
    """Attention weights sum to one, so a constant value passes through unchanged."""
    model, batch, _ = followed(deit, 8)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[56:64] = 0  # values of the second of three heads
    compact = removal.remove_dead(model, {}, batch[:1])
    assert proof.verify(model, compact, batch, proof.FLOAT64_TOLERANCE) < 1e-9
    assert compact.model.blocks[0].attn.num_heads == 2
    assert model.blocks[0].attn.qkv.bias[56:64].all()


@pytest.mark.parametrize(("make", "side"), [(vit, 8), (convnext, 32)])
def test_a_channel_of_a_layer_norm_is_not_dead_though_nothing_else_reads_it(make, side):
    model, batch, graph = followed(make, side)
    group = next(g for g in free(graph) if bool(graph.normalised[g.ids].all()))
    with torch.no_grad():
        for member in group.members:
            model.get_parameter(member.tensor).index_fill_(member.axis, member.index[2], 0.0)
    compact = removal.remove_dead(model, {}, batch[:1])
    assert proof.verify(model, compact, batch, proof.FLOAT64_TOLERANCE) < 1e-9
    after = channels.build_channel_graph(compact.model, batch)
    assert after.group(group.name).size == group.size


def test_zeros_at_random_leave_an_equal_network():
    model, batch, _ = followed(vit, 8)
    chance = torch.Generator().manual_seed(5)
    chosen = {
        name: torch.rand(p.shape, generator=chance) > 0.9
        for name, p in masks.prunable(model, "weights_and_biases").items()
    }
    masks.apply(model, chosen)
    compact = removal.remove_dead(model, chosen, batch[:1])
    assert proof.verify(model, compact, batch, proof.FLOAT64_TOLERANCE) < 1e-9


# ---- no parameter is passed over in silence ----------------------------------------------------


def test_weights_that_attention_holds_itself_can_be_masked():
    model = vit()
    block = "encoder.layers.encoder_layer_0.self_attention."
    weights = masks.prunable(model, "weights")
    assert weights[f"{block}in_proj_weight"] is model.get_parameter(f"{block}in_proj_weight")
    assert f"{block}in_proj_bias" in masks.prunable(model, "weights_and_biases")
    covered = dict.fromkeys(weights, torch.ones(1))
    left = {"class_token": 24, "encoder.pos_embedding": 5 * 24}
    assert masks.passed_over(model, covered) == left
    del covered[f"{block}in_proj_weight"]
    assert masks.passed_over(model, covered) == left | {f"{block}in_proj_weight": 72 * 24}


def test_macs_of_attention_by_hand():
    """5 positions: 4 patches and the class token; the classifier reads only the class token."""
    model = vit()
    macs = {row.layer: row.macs_dense for row in cost.layer_costs(model, torch.zeros(1, 3, 8, 8))}
    block = "encoder.layers.encoder_layer_0"
    assert macs["conv_proj"] == 4 * 24 * 3 * 16
    assert macs[f"{block}.self_attention.in_proj_weight"] == 5 * 3 * 24 * 24
    assert macs[f"{block}.self_attention.out_proj"] == 5 * 24 * 24
    assert macs[f"{block}.mlp.0"] == macs[f"{block}.mlp.3"] == 5 * 24 * 16
    assert macs["heads.head"] == 24 * CLASSES


def test_macs_of_windows_by_hand():
    """5 x 5 positions, padded to 6 x 6 for the windows; the MLP reads no padding."""
    rows = {r.layer: r.macs_dense for r in cost.layer_costs(swin(), torch.zeros(1, 3, 20, 20))}
    assert rows["features.0.0"] == 25 * 8 * 3 * 16
    assert rows["features.1.0.attn.qkv"] == 36 * 8 * 24
    assert rows["features.1.0.mlp.0"] == 25 * 8 * 8


def test_costs_of_the_compact_network_are_those_of_fewer_heads():
    model, batch, graph = followed(vit, 8)
    name = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    small = removal.remove(model, {name: torch.tensor([1])}, batch, {}, graph).model
    before, after = (
        {row.layer: row.macs_dense for row in cost.layer_costs(m, batch[:1])}
        for m in (model, small)
    )
    assert after[name] * 3 == before[name] * 2
    assert sum(after.values()) == sum(before.values()) - 5 * 24 * 8 * 4


# ---- files -------------------------------------------------------------------------------------


def header():
    names = [str(k) for k in range(CLASSES)]
    return checkpoint.Header("own", {}, names, [3, 8, 8], [0.0], [1.0], "", "prune")


def saved(make, folder, monkeypatch):
    model, batch, graph = followed(make, 8)
    decision = PruningDecision(channels=at_random(graph, 3))
    pruned = apply_decision(model.float(), decision, batch.float(), remove_dead=False)
    assert pruned.differences["difference_float64"] < 1e-9
    checkpoint.save(folder / "m.safetensors", header(), pruned.model, {})
    monkeypatch.setattr(checkpoint, "build_architecture", lambda _: build(make, 8).float())
    return pruned.model, batch.float()


@pytest.mark.parametrize("make", [vit, deit])
def test_a_network_with_fewer_heads_comes_back_from_its_file(make, tmp_path, monkeypatch):
    small, batch = saved(make, tmp_path, monkeypatch)
    loaded = checkpoint.load(tmp_path / "m.safetensors")
    assert any("size:num_heads" in known for known in loaded.header.layers.values())
    again = loaded.model()
    assert difference(small, again, batch) == 0
    graph = channels.build_channel_graph(again, batch)  # the compact network can be pruned again
    more = removal.remove(again, at_random(graph, 7), batch, {}, graph).model
    checkpoint.save(tmp_path / "m.safetensors", header(), more, {})
    assert difference(more, checkpoint.load(tmp_path / "m.safetensors").model(), batch) == 0


@pytest.mark.parametrize(
    ("module", "sizes"),
    [
        ("encoder", {"size:num_heads": 2}),
        ("", {"size:hidden_dim": 10**6}),
        ("", {"size:forward": 1}),
        ("", {"size:training": 1}),
    ],
)
def test_sizes_of_a_file_that_the_network_does_not_have_are_refused(
    module, sizes, tmp_path, monkeypatch
):
    saved(vit, tmp_path, monkeypatch)
    file = tmp_path / "m.safetensors"
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    fields = json.loads(content[8 : 8 + length])
    own = json.loads(fields["__metadata__"]["secateur"])
    own["layers"][module] = own["layers"].get(module, {}) | sizes
    fields["__metadata__"]["secateur"] = json.dumps(own)
    changed = json.dumps(fields).encode()
    file.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + length :])
    with pytest.raises(CheckpointError, match="has no size"):
        checkpoint.load(file).model()


# ---- heads are chosen like other groups ---------------------------------------------------------


@pytest.mark.parametrize("skip", [[], ["*.in_proj_weight"]])
def test_heads_have_the_ratio_that_is_meant_for_all_and_can_be_skipped(skip):
    model = build(vit, 0)
    pruner = secateur.pruners.magnitude(granularity="group", ratios=0.5, skip=skip)
    found = secateur.prune(model.float(), images(2, 8, 0).float(), pruner).model
    heads = [m.num_heads for m in found.modules() if isinstance(m, nn.MultiheadAttention)]
    assert heads == ([3, 3] if skip else [1, 1])  # half of 3 is removed, rounded up
    assert found.hidden_dim == 12


@pytest.mark.parametrize("name", ["greg1", "gradual"])
def test_heads_that_a_penalty_has_chosen_are_removed(name):
    """The choice uses names of parameters: `in_proj_weight` is a weight without a layer."""
    model = build(vit, 0).float()
    module = plugin.load("penalties", name)
    chosen = module.Settings(granularity="group", ratios=0.5)
    penalty = penalties.build(name, chosen, model, 1e-3, [3, 8, 8])
    penalty.pruned.choose()
    context = PruningContext(model, images(2, 8, 0).float(), None, penalty.choices())
    decision = plugin.load("pruners", "chosen").prune(None, context)
    heads = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    assert len(decision.channels[heads]) == 2
    assert not decision.masks
