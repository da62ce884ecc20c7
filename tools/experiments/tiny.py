"""Arms of the experiments at the family's smallest scale: what training, parts of the layer, draws, patterns are worth.

Bytes of books, today's layer, long enough for capacity to matter: a minute or two a training on a core.
"""

from __future__ import annotations

from megassm.config.schema import Config
from megassm.cost import parameters
from tools.experiments.arms import Arm, width_of_size
from tools.experiments.family import overridden, paper_layer, transformer

TINY = (
    "model.d_model=32", "model.mixer_heads=2", "model.d_ffn=96", "model.ffn_elastic=null", "train.steps=1000",
    "train.batch_sequences=8", "train.micro_batch_sequences=2", "budget.strategy=stratified",
)  # fmt: skip
"""Of the family: 0.05M parameters, 41 bytes each; four draws an update."""
FOUR_LAYERS = "train.steps=1800"
"""As many bytes a parameter of four layers."""
ELASTIC = Arm("elastic")


def static_arms(config: Config) -> list[Arm]:
    """Trained at one K and read at all of them, beside the elastic model and a transformer of its size."""
    k_max = config.model.num_channels
    statics = [
        Arm(f"static K={k}", (*overridden(budget__strategy="fixed", budget__k=k), _at_once(config)))
        for k in (k_max, 4, 2)
    ]
    return [ELASTIC, *statics, _transformer(config, "transformer with taps", parameters(config.model, k_max))]


def layer_arms(config: Config) -> list[Arm]:
    """The layer without one of its parts or with one of the paper's, and the paper's own at equal parameters."""
    return [
        ELASTIC,
        Arm("sigma^(1/4)", ("model.sigma_scale=quarter_power",)),
        Arm("softmax gate", ("model.gate=softmax",)),
        Arm("softmax gate, not rescaled", ("model.gate=softmax", "model.gate_rescale=false")),
        Arm("no gate", ("model.gate=none",)),
        Arm("no taps", ("model.input_taps=1",)),
        paper_layer(config, parameters(config.model, config.model.num_channels)),
    ]


def draw_arms(config: Config) -> list[Arm]:
    """Every way to draw budgets, as often in an update; the smallest budget is that of the list."""
    least = f"budget.min_k={min(config.listed_budgets())}"
    weighted = Arm("list, weighted by K^0.5", ("budget.strategy=paper", "budget.sampler=weighted"))
    return [
        Arm("stratified", ELASTIC.overrides),
        weighted,
        weighted.more(_at_once(config), name=f"{weighted.name}, one K an update"),
        Arm("uniform", ("budget.strategy=uniform", least)),
        Arm("log-uniform", ("budget.strategy=log_uniform", least)),
        Arm("sandwich", ("budget.strategy=sandwich", least)),
        Arm("stratified + distillation", ("budget.distill_weight=0.5",)),
    ]


def pattern_arms(config: Config) -> list[Arm]:
    """Patterns of four layers; the feed-forward width makes up for what attention has fewer parameters."""
    return [
        Arm(pattern, overridden(model__n_layers=4, model__pattern=pattern, model__d_ffn=equal_width(config, pattern)))
        for pattern in ("SSSS", "SSSA", "SASA")
    ]


def text_pattern_arms(config: Config) -> list[Arm]:
    """... and attention alone, with the same taps."""
    return [*pattern_arms(config), _transformer(config, "AAAA", _four_spectral(config), n_layers=4)]


def equal_width(config: Config, pattern: str) -> int:
    """The feed-forward width at which `pattern` has nearest to the parameters of four spectral layers at K_max."""
    return width_of_size(config.model.model_copy(update={"n_layers": 4, "pattern": pattern}), _four_spectral(config))


def _four_spectral(config: Config) -> int:
    return parameters(config.model.model_copy(update={"n_layers": 4, "pattern": "S"}), config.model.num_channels)


def _transformer(config: Config, name: str, size: int, **more: int) -> Arm:
    arm = transformer(config, name, size, input_taps=config.model.input_taps, **more)
    return arm.more(_at_once(config))


def _at_once(config: Config) -> str:
    """An update in one pass, at one K: for arms whose draws of an update are all alike."""
    return f"train.micro_batch_sequences={config.train.batch_sequences}"
