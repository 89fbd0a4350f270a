"""The configuration of the optimizer: `Config.optimizer`."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning-rate schedule (in tokens seen), weight decay and gradient clipping."""

    # adamw: Loshchilov & Hutter 2019; muon: Jordan et al. 2024, for the weight matrices of the layers, with AdamW for
    # all other parameters and one learning rate for both (Liu et al. 2025); adafactor: factored second moments (Shazeer
    # & Stern 2018) without relative step sizes (Zhai et al. 2021). All use decoupled weight decay and clip the gradient
    name: Literal["adamw", "muon", "adafactor"] = "adamw"
    peak_lr: float = 6e-4  # learning rate after warmup
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # wsd: warmup, stable, decay
    warmup_tokens: int = 0  # length of the linear warmup, in tokens
    warmup_fraction: float | None = None  # length of the warmup as a fraction of training, in place of warmup_tokens
    warmup_start_fraction: float = 0.0  # initial learning rate of the warmup, as a fraction of peak_lr
    # cosine, linear: tokens seen when the floor is reached; wsd: length of the decay phase. None: the end of training
    # for cosine and linear, the last tenth of training for wsd
    decay_tokens: int | None = None
    decay_fraction: float | None = None  # the same as a fraction of training, in place of decay_tokens
    floor_lr_fraction: float = 0.1  # final learning rate, as a fraction of peak_lr
    beta1: float = 0.9  # decay rate of the first moment; with adafactor, 0 stores no first moment
    beta2: float = 0.95  # decay rate of the second moment; with adafactor, its upper limit
    eps: float = 1e-8  # denominator offset of Adam; not used by adafactor
    muon_momentum: float = 0.95
    # newton_schulz: five equal steps (Jordan et al. 2024); polar_express: five steps that are each optimal for the
    # singular values that the steps before leave (Amsel et al. 2025)
    muon_iteration: Literal["newton_schulz", "polar_express"] = "newton_schulz"
    # NorMuon: decay rate of the mean square of the updates of each neuron, by whose root they are divided (Li et al.
    # 2025); None: plain Muon
    muon_variance_decay: float | None = None
    # Storage dtype of the first moment (and of muon's momentum); param_dtype: that of trained parameters, float32
    first_moment_dtype: Literal["param_dtype", "float32", "bfloat16"] = "param_dtype"
    min_factored_dim: int = 32  # adafactor does not factor the second moments of arrays with a shorter axis
    weight_decay: float = 0.1  # decoupled; multiplied by the learning rate
    # (regex over parameter paths, factor of weight_decay); the first full match applies, every parameter needs one
    decay_rules: tuple[tuple[str, float], ...] = ((".*/(bias|scale)", 0.0), (".*", 1.0))
    cautious_decay: bool = False  # decay only those entries that the update alone reduces too (Chen et al. 2025)
    # (regex over parameter paths, factor of the learning rate and so of weight decay); the first full match applies
    lr_rules: tuple[tuple[str, float], ...] = ()
    clip_norm: float | None = 1.0  # maximum global norm of the gradient; None: no clipping
    # Decay rate per step of an exponential moving average of the parameters, which evaluation and sampling then use
    ema_decay: float | None = None
    layer_lr_decay: float = 1.0  # learning rate of a layer, as a multiple of that of the layer above it
    offload: bool = False  # keep the optimizer state in host memory between steps
