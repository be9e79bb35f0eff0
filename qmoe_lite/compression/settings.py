"""How to compress, and how far a compression is."""

from __future__ import annotations

from dataclasses import dataclass

from qmoe_lite.compression.rate import check_rate
from qmoe_lite.errors import SettingError

RECIPES = ("default", "paper", "nearest")
TUNE = ("none", "targets", "block")
_CPU_GROUP, _GPU_GROUP = 1 << 30, 4 << 30  # bytes
_CPU_BATCH, _GPU_BATCH = 1024, 16  # tokens; samples
_CPU_CHUNK, _GPU_CHUNK = 1 << 11, 1 << 14  # tokens: what becomes of a CPU's on the way stays in its caches


@dataclass(frozen=True)
class Settings:
    """How to compress; each default is the one that `qmoe compress --help` shows.

    Attributes
    ----------
    recipe : str
        "default"; "paper": its dictionary of 16-bit codewords, and no Hessian borrowed from the layer, whatever
        `codeword_bits` and `blend_tokens` say; or "nearest": round each weight to its nearest level, without text.
    samples : int or None
        Calibration samples; None takes the paper's ratio, 80 for each expert over the experts of a token.
    sequence_length : int
        Tokens of a sample.
    codeword_bits : int or None
        8 to 13, at a rate 9 to 12; None takes 10 at a rate, else chooses for each layer and projection, by what its
        digits take: see `Codebook.choose`.
    dampening : float
        Added to the Hessian's diagonal, as a fraction of its mean ("percdamp" in GPTQ). QMoE, section 3.2: 0.1.
    block_size : int
        Columns that GPTQ rounds between two updates of the rest.
    group_size : int
        Experts quantised together. QMoE, table 1: 16.
    group_bytes : int or None
        Memory for a group; fewer experts are taken together when 16 would need more. None takes 1 GiB on a CPU, where
        larger groups gain nothing, and 4 GiB on a GPU.
    token_cap : float
        An expert's Hessian takes at most this many times the mean number of tokens, drawn at random. QMoE: 4.
    blend_tokens : int
        An expert with n tokens, fewer than its matrix has columns, gets n/(n+n0) of its own Hessian and n0/(n+n0)
        of one from random tokens of the layer; this is n0, and 0 switches it off.
    validation_samples : int
        Samples that ride along for `Report.held_out_error` and enter no Hessian.
    batch_size : int or None
        Samples per pass through a block; None takes as many as make 1,024 tokens on a CPU, where more take memory and
        gain nothing, and 16 on a GPU.
    activations : str
        "float32", or "bfloat16" at half the memory.
    products : str
        What experts and tokens are multiplied in: "float32", or "bfloat16" where the device multiplies it faster.
        Routers, all else that is dense, Hessians and the solver stay in float32.
    seed : int
        Seed for samples, masked spans and drawn tokens.
    rate : float or None
        Stored bits a weight, averaged over all experts of the model, 0.6 to 4, for the uniform grid; None leaves the
        bits to the grid.
    stop_when_bad : bool
        End after the first layer whose held-out error says that the model will be bad; the work can be resumed.
    check_first : bool
        Search all tensors for NaN and infinity before the first layer; costs one reading of the model.
    tune : str or None
        "targets": each expert's last projection is solved for what is missing; "block": its steps and scales are
        trained for that too: see `block_tuning`; or "none". None leaves it to the recipe and the rate.
    sensitivity : dict, experts module to float, or str or None
        What each layer quantised alone loses, by which a rate's bits are shared out: see `sensitivity`; "measured":
        that is found out before the first layer; or "none": all layers have the same step. None leaves it to the
        recipe and the rate.
    device : str
        Where blocks run and experts are solved; activations stay in the CPU's memory.
    """

    recipe: str = "default"
    samples: int | None = None
    sequence_length: int = 512
    codeword_bits: int | None = None
    dampening: float = 0.1
    block_size: int = 128
    group_size: int = 16
    group_bytes: int | None = None
    token_cap: float = 4.0
    blend_tokens: int = 64
    validation_samples: int = 8
    batch_size: int | None = None
    activations: str = "float32"
    products: str = "float32"
    seed: int = 0
    rate: float | None = None
    stop_when_bad: bool = False
    check_first: bool = False
    tune: str | None = None
    sensitivity: dict[str, float] | str | None = None
    device: str = "cpu"

    @property
    def group_room(self) -> int:
        """Bytes that a group may take."""
        return self.group_bytes or (_CPU_GROUP if self.device == "cpu" else _GPU_GROUP)

    @property
    def batch(self) -> int:
        """Samples that pass through a block together."""
        usual = max(1, _CPU_BATCH // self.sequence_length) if self.device == "cpu" else _GPU_BATCH
        return self.batch_size or usual

    @property
    def chunk(self) -> int:
        """Tokens that go through an expert at a time."""
        return _CPU_CHUNK if self.device == "cpu" else _GPU_CHUNK

    def check(self) -> None:
        """Raise SettingError for a value outside its range."""
        ranges: tuple[tuple[str, bool, str], ...] = (
            ("recipe", self.recipe in RECIPES, "one of " + ", ".join(RECIPES)),
            ("samples", self.samples is None or self.samples >= 1, "at least 1"),
            ("sequence_length", self.sequence_length >= 16, "at least 16"),
            ("codeword_bits", self.codeword_bits is None or 8 <= self.codeword_bits <= 13, "8 to 13"),
            ("dampening", 0 < self.dampening <= 1, "above 0, at most 1"),
            ("block_size", self.block_size >= 1, "at least 1"),
            ("group_bytes", self.group_bytes is None or self.group_bytes >= 1, "at least 1"),
            ("seed", self.seed >= 0, "at least 0"),
            ("group_size", self.group_size >= 1, "at least 1"),
            ("token_cap", 0 < self.token_cap < float("inf"), "above 0 and finite"),
            ("blend_tokens", self.blend_tokens >= 0, "at least 0"),
            ("validation_samples", self.validation_samples >= 0, "at least 0"),
            ("batch_size", self.batch_size is None or self.batch_size >= 1, "at least 1"),
            ("activations", self.activations in ("float32", "bfloat16"), "float32 or bfloat16"),
            ("products", self.products in ("float32", "bfloat16"), "float32 or bfloat16"),
            ("tune", self.tune is None or self.tune in TUNE, "none, targets or block"),
        )
        for name, good, expected in ranges:
            if not good:
                raise SettingError(f"{name} is {getattr(self, name)}; expected {expected}.")
        if self.rate is not None:
            check_rate(self.rate)


@dataclass(frozen=True)
class Progress:
    """Where a compression is.

    Attributes
    ----------
    done, total : int
        Groups of experts.
    place : str
        In words.
    warning : str or None
        When one comes up.
    block, group, groups
        The block, and which of its groups was finished, where one was.
    tokens_per_second : float or None
        Through the experts, a token counted for each of its experts, over the run so far.
    seconds_left : float or None
        By the groups measured so far.
    held_out_error : float or None
        Share of the layer's experts' output lost on held-out text, so far.
    memory_bytes : int or None
        Anonymous memory of this process.
    """

    done: int
    total: int
    place: str
    warning: str | None = None
    block: str | None = None
    group: int | None = None
    groups: int | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    held_out_error: float | None = None
    memory_bytes: int | None = None
