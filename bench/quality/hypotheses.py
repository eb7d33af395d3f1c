"""What is compared: the methods of the claims, and the search for what one per cent lacks, as lists of runs."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from sparseft.selection import CRITERIA, lift, sampled

SPARSE_RATES = (5e-3, 1.5e-2, 5e-2)
ADAPTER_RATES = (1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Variant:
    """A method with its options, and the rates that its tuning starts with.

    Attributes:
        method: a name in `methods.METHODS`.
        options: its keyword arguments; a text in OBJECTS stands for the object.
        rates: a single one is not tuned.
    """

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = SPARSE_RATES

    def arguments(self) -> dict[str, Any]:
        """The options, with objects in place of the texts that name them."""
        return {
            key: OBJECTS.get(value, value) if isinstance(value, str) else value for key, value in self.options.items()
        }


# The CSV keeps options as text; these are the ones that are not.
OBJECTS: dict[str, Any] = {
    "lift rank 32": lift(32),
    "drawn by |g|": sampled(CRITERIA["grad"]),
}


@dataclass(frozen=True)
class Hypothesis:
    """A supposed cause, the variants that would show it, and what each is compared with (same task, steps and seeds).

    Attributes:
        base: name of the variant that every one of `variants` is paired with.
        variants: none where the comparison is one of results files, or where something has to be built first.
        needs: what has to be built before it can be run; empty if nothing.
    """

    name: str
    claim: str
    base: str
    variants: tuple[Variant, ...]
    needs: str = ""


def sparse(name: str, **options: Any) -> Variant:
    return Variant(name, "sparse", options)


UNTRAINED = Variant("untrained", "none", rates=(0.0,))
DEFAULT: dict[str, Any] = {
    "criterion": "sampled", "allocation": "layer", "train_norms": True, "train_targets": None
}  # fmt: skip


def variation(name: str, **changes: Any) -> Variant:
    """sparseft's defaults with some options changed."""
    return sparse(name, **(DEFAULT | changes))


SPARSE = variation("sparse-1%")
SHIPPED = replace(SPARSE, name="sparse-1%-default-rate", rates=(1.5e-2,))  # what a user gets who sets nothing

CLAIMS: tuple[Variant, ...] = (
    SPARSE,
    SHIPPED,
    Variant("dense", "dense", rates=(3e-5, 1e-4, 3e-4)),
    Variant("lora-r8", "lora", {"r": 8}, ADAPTER_RATES),
    Variant("lora-r4", "lora", {"r": 4}, ADAPTER_RATES),  # 1.15 times the values of one per cent
    Variant("shira-r4", "shira", {"r": 4}),
    replace(variation("sparse-1%-free", tile_budget=1.0), rates=SHIPPED.rates),  # beside SHIPPED, in tiles
    variation("sparse-as-lora-r8", as_lora=8),
    Variant("shira-r8", "shira", {"r": 8}),
    Variant("supertuning-1%", "supertuning", {"density": 0.01}),
)
DENSITIES = ("density-0.5%", "density-2%", "density-5%")  # whether one rate suits all of them
FINALISTS = ("per-row", *DENSITIES)  # the best screen, and the densities at the default rate
SMALL = ("sparse-1%", "lora-r8", "shira-r4", "supertuning-1%", "dense")  # of the claims, those of the small study

HYPOTHESES: tuple[Hypothesis, ...] = (
    Hypothesis(
        "H01-allocation", "A global budget piles up in a few matrices, and the others cannot learn", "sparse-1%",
        (variation("global", allocation="global"), variation("per-kind", allocation="kind"),
         variation("mixed-50%", allocation="mixed"), variation("per-row", allocation="row")),
    ),
    Hypothesis(
        "H02-norms", "The norm vectors are too few to matter in the budget and move what no weight moves", "sparse-1%",
        (variation("no-norms", train_norms=False),),
    ),
    Hypothesis(
        "H03-whole-rate", "What trains whole (norms, target rows) wants a smaller rate than scattered entries",
        "sparse-1%",
        (variation("equal-rates", density_power=0.0), variation("power-0.5", density_power=0.5),
         variation("power-1", density_power=1.0)),
    ),
    Hypothesis(
        "H04-late-mask", "The first gradients are about the answer's format; later ones choose better", "sparse-1%",
        (variation("score-after-10", score_after=10), variation("score-after-30", score_after=30)),
    ),
    Hypothesis(
        "H05-batches", "Eight batches are too few to tell signal from noise", "sparse-1%",
        (variation("one-batch", batches=1), variation("32-batches", batches=32)),
    ),
    Hypothesis(
        "H06-criterion", "Another score finds entries that learn more", "sparse-1%",
        tuple(variation(criterion, criterion=criterion) for criterion in
              ("grad", "taylor", "fisher", "magnitude", "wanda", "random")),
    ),
    Hypothesis(
        "H07-lift", "Entries of the principal components (LIFT) learn more", "sparse-1%",
        (variation("lift-64", criterion="lift"), variation("lift-32", criterion="lift rank 32")),
    ),
    Hypothesis(
        "H08-lines", "Whole rows or columns change a layer's function more than scattered entries", "sparse-1%",
        (variation("rows", structure="rows"), variation("columns", structure="columns"),
         variation("full-tiles", tile_budget=1e-9)),  # as few tiles as hold the entries: dense blocks
    ),
    Hypothesis(
        "H09-modules", "The budget is better spent in one part of the network", "sparse-1%",
        (variation("attention-only", include="self_attn"), variation("mlp-only", include="mlp"),
         variation("values-and-outputs", include=["v_proj", "o_proj", "down_proj"])),
    ),
    Hypothesis(
        "H10-target-rows", "The output embedding's rows of the words to say are cheap, and no change of the layers "
        "replaces them", "sparse-1%",
        (variation("target-rows", train_targets=True), variation("no-target-rows", train_targets=False),
         variation("no-target-rows-no-norms", train_targets=False, train_norms=False)),
    ),
    Hypothesis(
        "H11-density", "The best rate follows from the density, as density ** -0.75", "sparse-1%",
        tuple(variation(f"density-{100 * d:g}%", density=d) for d in (0.005, 0.02, 0.05)),
    ),
    Hypothesis(
        "H12-betas", "With few steps the second moment of a single entry forgets too slowly", "sparse-1%",
        (variation("beta2-0.99", betas=(0.9, 0.99)), variation("beta2-0.95", betas=(0.9, 0.95))),
    ),
    Hypothesis(
        "H13-decay", "Decay towards the pretrained values holds a sparse change back", "sparse-1%",
        (variation("no-decay", weight_decay=0.0), variation("decay-0.1", weight_decay=0.1)),
    ),
    Hypothesis(
        "H14-lora-target-rows", "LoRA gains as much from the rows of the target tokens", "lora-r4",
        (Variant("lora-r4-target-rows", "lora", {"r": 4, "train_targets": True}),),
    ),
    Hypothesis(
        "H15-reselect", "Selecting again during training, moments and ages carried, mends a wrong first mask",
        "sparse-1%",
        (variation("drop-and-grow", refresh="rigl"), variation("select-again", refresh="select"),
         variation("spiel", refresh="spiel")),
    ),
    Hypothesis(
        "H16-lora-warm-up", "A short LoRA phase shows which entries the task needs (RoSA)", "sparse-1%",
        (), needs="scores from the change that a LoRA phase makes (`lottery` scores a dense phase)",
    ),
    Hypothesis(
        "H17-rows-and-columns", "A few rows and a few columns of the same matrix beat either", "sparse-1%",
        (variation("rows-and-columns", structure="rows-and-columns"),),
    ),
    Hypothesis(
        "H19-columns", "The gradient is largest in the few columns whose inputs are large for any text: "
        "little to learn with, much to forget", "sparse-1%",
        (sparse("grad-alone", allocation="layer"),
         sparse("grad-norms", allocation="layer", train_norms=True, density_power=0.0),
         sparse("grad-norms-target-rows", allocation="layer", train_norms=True, train_targets=True, density_power=0.0)),
    ),
    Hypothesis(
        "H20-draw", "The largest scores choose entries too much alike; a draw by the scores covers more of what there "
        "is to learn", "sparse-1%",
        (variation("balanced", criterion="balanced"), variation("drawn-by-grad", criterion="drawn by |g|")),
    ),
    Hypothesis(
        "H18-rounding", "bf16 weights lose part of each small step", "sparse-1%",
        (),  # the same runs with --model-dtype fp32 in a results file of their own
    ),
)  # fmt: skip


def variants() -> Iterator[Variant]:
    """Every variant, each once, those of the claims first."""
    yield UNTRAINED
    yield from CLAIMS
    for hypothesis in HYPOTHESES:
        yield from hypothesis.variants


def table() -> str:
    """The hypotheses as a Markdown table, for docs/quality.md."""
    lines = ["| hypothesis | supposed | paired with | variants | verdict |", "|---|---|---|---|---|"]
    for h in HYPOTHESES:
        needed = f"none yet: needs {h.needs}" if h.needs else "none: compares results files"
        names = ", ".join(v.name for v in h.variants) or needed
        lines.append(f"| {h.name} | {h.claim} | {h.base} | {names} | not run yet |")
    return "\n".join(lines)
