"""The whole model: causality, attention, truncation, initialisation, recomputation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megassm.config.model import ModelConfig
from megassm.errors import UserError
from megassm.layers.attention import Attention, attention_mask, rope_tables
from megassm.layers.context import Context
from megassm.model import LanguageModel, build_model, losses_at, truncate

K_MAX = 6


def config(**changes: object) -> ModelConfig:
    base: dict[str, object] = {
        "vocab_size": 50, "d_model": 16, "n_layers": 4, "pattern": "SA", "seq_len": 24, "num_channels": K_MAX,
        "n_heads": 4, "n_kv_heads": 2, "d_ffn": 32,
    }  # fmt: skip
    return ModelConfig(**(base | changes))  # type: ignore[arg-type]


def ids(length: int = 24, batch: int = 2) -> Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("pattern", ["S", "A", "SA", "SSSA"])
@pytest.mark.parametrize("window", [None, 5])
def test_no_position_sees_the_future(pattern: str, window: int | None) -> None:
    model = build_model(config(pattern=pattern, window=window), seed=0)
    original = ids()
    changed = original.clone()
    changed[:, 13:] = (changed[:, 13:] + 1) % 50
    before, after = model(original, K_MAX), model(changed, K_MAX)
    assert torch.allclose(before[:, :13], after[:, :13], atol=1e-5)
    assert not torch.allclose(before[:, 13:], after[:, 13:], atol=1e-3)


@pytest.mark.parametrize("k", range(1, K_MAX + 1))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gate": "equal", "sigma_scale": ("quarter_power", "none")},
        {"gate": "sigmoid", "mixer_heads": 2, "sigma_scale": "none"},
        {"gate": "softmax", "mixer_heads": 16},
        {"gate": "none", "mixer_heads": 4, "input_taps": 3, "basis": "alternating"},
        {"basis": "hankel_l", "num_channels": K_MAX},
        {"selective": True, "gate": "sigmoid", "mixer_heads": 2, "input_taps": 3},
        {"selective": True, "filterbank": "direct"},
        {"tie_embeddings": False, "sigma_scale": "none"},
        {"d_ffn": 60, "ffn_elastic": {"knee_k": 3, "below": 16, "above": 8}},
        {"d_ffn": 53, "ffn_elastic": {"knee_k": 9, "below": 8, "above": 0}},
    ],
)
def test_model_cut_to_k_equals_the_masked_model(k: int, changes: dict[str, object]) -> None:
    model = build_model(config(**changes), seed=1)
    small = truncate(model, k)
    assert small.config.num_channels == k
    for budget in range(1, k + 1):
        assert torch.allclose(small(ids(), budget), model(ids(), budget), atol=1e-6)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters()) or k == K_MAX
    with pytest.raises(UserError, match=f"between 1 and this model's K_max = {k}"):
        small(ids(), k + 1)


def test_the_scale_of_sigma_is_a_choice_of_each_spectral_layer() -> None:
    mixed = config(n_layers=6, pattern="SSA", sigma_scale=("quarter_power", "none"))
    assert mixed.sigma_scales == ("quarter_power", "none", None) * 2
    one, other = (config(n_layers=6, pattern="SSA", sigma_scale=scale) for scale in mixed.sigma_scale)
    x = torch.randn(2, 24, 16)
    for layer, like in enumerate((one, other, None, one, other, None)):
        if like is not None:
            found, expected = (build_model(c, seed=0) for c in (mixed, like))
            context = found.context(0, 24, 3)
            assert torch.equal(found.blocks[layer](x, context), expected.blocks[layer](x, context))
    for model in (mixed, one):
        assert ModelConfig.model_validate_json(model.model_dump_json()) == model
    assert one.model_dump(mode="json")["sigma_scale"] == "quarter_power", "as in the checkpoints there are"


def test_a_gate_that_was_true_or_false_still_opens() -> None:
    """Checkpoints and exports made before gates had names."""
    for old, name in ((True, "softmax"), (False, "equal")):
        saved = config(gate=name).model_dump_json().replace(f'"gate":"{name}"', f'"gate":{str(old).lower()}')
        assert ModelConfig.model_validate_json(saved) == config(gate=name)
        assert config(gate=old) == config(gate=name)


@pytest.mark.parametrize(("gate", "summands"), [("softmax", 1), ("equal", 1), ("sigmoid", 16), ("none", 16)])
def test_channels_start_so_that_their_sum_has_the_size_of_one(gate: str, summands: int) -> None:
    def std(**changes: object) -> float:
        model = build_model(config(pattern="S", d_model=64, num_channels=16, gate=gate, **changes), 0)
        return float(model.blocks[0].mixer.channels_KDD.detach().std())

    depth = 1 / math.sqrt(8)
    assert std() == pytest.approx(depth / math.sqrt(64 * summands), rel=0.02)
    assert std(mixer_heads=4) == pytest.approx(1 / math.sqrt(16 * summands), rel=0.02), "the projection has the depth"
    assert std(channel_init_std=0.1) == pytest.approx(0.1, rel=0.02), "what is given is what it is"


def test_the_gate_starts_at_its_bias() -> None:
    model = build_model(config(gate_bias_init=-2.0, mixer_heads=2), 0)
    assert (model.blocks[0].mixer.gate.score_bias_K == -2).all()
    assert (model.blocks[0].mixer.gate.hidden.bias == 0).all()


def test_a_selective_layer_is_the_plain_one_that_forgets_slowly_at_first() -> None:
    plain, selective = (build_model(config(selective=chosen, mixer_heads=2), 0) for chosen in (False, True))
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, selective.get_parameter(name)), "each is drawn by its own name"
    log_decay_BLH = selective.blocks[0].mixer.log_decays(torch.randn(2, 24, 16)).detach()
    assert log_decay_BLH.mean().item() == pytest.approx(-1 / 24, rel=0.7)
    assert bool((log_decay_BLH.std((0, 1)) > 0.01).all()), "it depends on the input"
    with torch.no_grad():
        for mixer in (selective.blocks[0].mixer, selective.blocks[2].mixer):
            mixer.decay.bias.fill_(-30)
    assert torch.allclose(plain(ids()), selective(ids()), atol=1e-5)


def test_the_feed_forward_width_follows_the_budget_at_two_rates() -> None:
    elastic = config(d_ffn=72, ffn_elastic={"knee_k": 3, "below": 16, "above": 8})
    widths = [elastic.ffn_width(k) for k in range(1, K_MAX + 1)]
    assert widths == [16, 32, 48, 56, 64, 72]
    for k in range(1, K_MAX + 1):
        assert [elastic.cut(k).ffn_width(smaller) for smaller in range(1, k + 1)] == widths[:k], "whatever it is cut to"
    assert ModelConfig.model_validate_json(elastic.cut(4).model_dump_json()) == elastic.cut(4)


def test_hidden_units_beyond_the_width_are_not_read_and_get_zero_gradients() -> None:
    plain = build_model(config(d_ffn=72), seed=0)
    elastic = build_model(config(d_ffn=72, ffn_elastic={"knee_k": 3, "below": 16, "above": 8}), seed=0)
    assert torch.equal(elastic(ids(), K_MAX), plain(ids(), K_MAX)), "the plain model at K_max"
    assert not torch.allclose(elastic(ids(), 2), plain(ids(), 2), atol=1e-3)
    with torch.no_grad():
        for block in elastic.blocks:
            block.ffn.gate.weight[32:], block.ffn.up.weight[32:], block.ffn.down.weight[:, 32:] = (torch.nan,) * 3
    elastic.losses(ids(), elastic(ids(), 2), ids()).sum().backward()
    for block in elastic.blocks:
        for weight in (block.ffn.gate.weight, block.ffn.up.weight, block.ffn.down.weight.t()):
            assert weight.shape == (72, 16)
        for gradient in (block.ffn.gate.weight.grad, block.ffn.up.weight.grad, block.ffn.down.weight.grad.t()):
            assert torch.isfinite(gradient).all()
            assert (gradient[:32] != 0).any(1).all()
            assert (gradient[32:] == 0).all()


@pytest.mark.parametrize("k", [0, K_MAX + 1])
def test_budget_out_of_range_is_refused(k: int) -> None:
    model = build_model(config(), seed=0)
    with pytest.raises(UserError, match="K_max = 6"):
        model(ids(), k)
    with pytest.raises(UserError, match="K_max = 6"):
        truncate(model, k)


def test_losses_are_the_negative_log_likelihoods() -> None:
    model = build_model(config(), seed=0)
    text = ids(25)
    losses = losses_at(model, text, 3)
    logits = model(text[:, :-1], 3).double()
    expected = -(logits.log_softmax(-1).gather(-1, text[:, 1:, None])[..., 0])
    assert torch.allclose(losses.double(), expected, atol=1e-5)
    assert losses.mean().item() == pytest.approx(math.log(50), rel=0.05)  # nothing learned yet


def test_recomputation_changes_nothing() -> None:
    text = ids(25)
    gradients = []
    for recompute in (False, True):
        model = build_model(config(), seed=0, recompute=recompute)
        losses_at(model, text, 4).mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        assert torch.equal(plain, recomputed)


def test_every_parameter_gets_a_gradient_at_every_budget() -> None:
    for k in (1, K_MAX):
        model = build_model(config(), seed=0)
        model.losses(ids(), model(ids(), k), ids()).mean().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_initialisation_depends_on_seed_and_name_only() -> None:
    first, again, other = (build_model(config(), seed) for seed in (5, 5, 6))
    deeper = build_model(config(n_layers=8), 5)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        if parameter.ndim > 1:
            assert not torch.equal(parameter, other.get_parameter(name))
    assert torch.equal(first.embedding_VD, deeper.embedding_VD)


def test_depth_scaling_keeps_the_residual_stream_bounded() -> None:
    def growth(n_layers: int) -> float:
        model = build_model(config(d_model=64, n_layers=n_layers, embed_init_std=1.0), 0)
        seen: list[Tensor] = []
        model.head_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model(ids(), K_MAX)
        return float(seen[0].detach().std())

    assert growth(32) < 1.5 * growth(2)


def naive_attention(layer: Attention, u_LD: Tensor, theta: float) -> Tensor:
    """Heads, positions and dimensions one at a time, from the papers."""
    length, size = u_LD.shape[0], layer.head_dim
    groups = layer.query.out_features // layer.key.out_features

    def rotated(x: Tensor, t: int) -> Tensor:
        y = x.clone()
        for i in range(size // 2):
            angle = t * theta ** (-2 * i / size)
            a, b = x[i], x[i + size // 2]
            y[i] = a * math.cos(angle) - b * math.sin(angle)
            y[i + size // 2] = a * math.sin(angle) + b * math.cos(angle)
        return y

    queries, keys, values = (linear(u_LD).view(length, -1, size) for linear in (layer.query, layer.key, layer.value))
    out = torch.zeros(length, queries.shape[1], size, dtype=u_LD.dtype)
    for head in range(queries.shape[1]):
        for t in range(length):
            first = 0 if layer.window is None else max(0, t - layer.window + 1)
            query = rotated(queries[t, head], t)
            scores = [query @ rotated(keys[s, head // groups], s) / math.sqrt(size) for s in range(first, t + 1)]
            weights = torch.stack(scores).softmax(0)
            out[t, head] = sum(w * values[first + i, head // groups] for i, w in enumerate(weights))
    return layer.out(out.flatten(1))


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_attention_equals_its_equations(window: int | None, n_kv_heads: int) -> None:
    torch.manual_seed(0)
    layer = Attention(16, 4, n_kv_heads, window).double()
    u_LD = torch.randn(9, 16, dtype=torch.float64)
    rope = rope_tables(torch.arange(9), layer.head_dim, 100.0)
    mask = attention_mask(9, window, None, u_LD)
    found = layer(u_LD[None], Context(1, None, rope, mask))[0]
    assert torch.allclose(found, naive_attention(layer, u_LD, 100.0), atol=1e-6)  # the tables are float32


def test_untied_head_is_its_own_matrix() -> None:
    tied, untied = LanguageModel(config()), LanguageModel(config(tie_embeddings=False))
    assert tied.head_VD is None
    assert untied.head_VD is not None


def test_a_model_taught_at_its_own_budget_has_nothing_to_learn() -> None:
    model = build_model(config(), seed=0)
    text = ids()
    logits_BLV = model(text, 3)
    same = model.divergences(text, logits_BLV, logits_BLV.detach(), 2.0)
    divergence = model.divergences(text, logits_BLV, model(text, K_MAX).detach(), 2.0)
    assert torch.allclose(same, torch.zeros(()), atol=1e-6)
    student, teacher = (model(text, k).double() / 2 for k in (3, K_MAX))
    expected = 4 * (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)
    assert torch.allclose(divergence.double(), expected, atol=5e-6)
    assert divergence.max() > 1e-4
    divergence.sum().backward()
    small = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert small["blocks.0.mixer.channels_KDD"][:3].abs().sum() > 0
    assert small["blocks.0.mixer.channels_KDD"][3:].abs().sum() == 0, "the teacher gets no gradient"
