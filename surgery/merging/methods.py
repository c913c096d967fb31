"""The registry of merge methods: what each is called, takes, is good for, and comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from surgery.errors import ArgumentError
from surgery.merging import builders
from surgery.merging.job import Job
from surgery.merging.parameters import Parameter, unknown
from surgery.tensor import LazyTensor


@dataclass(frozen=True)
class Method:
    """A merge method. `base` says whether it works on updates from a base; `models` is the least
    and the largest number of models beside it (None: any)."""

    name: str
    summary: str
    paper: str | None
    base: Literal["needed", "optional", "none"]
    models: tuple[int, int | None]
    parameters: tuple[Parameter, ...]
    build: Callable[[Job], LazyTensor]
    random: bool = False
    """Whether it draws random numbers, from the seed."""

    @property
    def needs_base(self) -> bool:
        return self.base == "needed"


WEIGHT = Parameter("weight", 1.0, "how much of each model", per_model=True)
LAMBDA = Parameter("lambda", 1.0, "factor on the merged update")
SUM = Parameter("normalize", False, "divide by the sum of the weights")
MEAN = Parameter("normalize", True, "divide by the sum of the weights that counted")
RESCALE = Parameter("rescale", True, "divide what is kept by the probability to keep it")
DENSITY = Parameter(
    "density", None, "the part of each update to keep", True, low=0, high=1, above_low=True
)
EPSILON = Parameter(
    "epsilon", 0.15,
    "keep the smallest of a row with density - epsilon, the largest with + epsilon",
    True, low=0, high=1,
)  # fmt: skip
TRIM = Parameter("density", 0.2, DENSITY.doc, True, low=0, high=1, above_low=True)
WHOLE = Parameter("density", 1.0, DENSITY.doc, True, low=0, high=1, above_low=True)
CRUMBS = Parameter("density", 0.9, DENSITY.doc, True, low=0, high=1, above_low=True)
GAMMA = Parameter("gamma", 0.01, "the part to drop that is largest", True, low=0, high=1)

ANY = (1, None)
SEVERAL = (2, None)
TWO = (2, 2)
ONE = (1, 1)

_ALL = (
    Method(
        "linear", "the weighted average: soups of fine-tunes that are near each other",
        "2203.05482", "none", ANY,
        (WEIGHT, Parameter("normalize", True, "divide by the sum of the weights")),
        builders.linear,
    ),
    Method(
        "slerp", "from the base to one model along the sphere, which keeps norms",
        None, "needed", ONE,
        (Parameter("t", 0.5, "0 is the base, 1 the model", low=0, high=1),),
        builders.slerp,
    ),
    Method(
        "nuslerp", "two models along the sphere, or their updates if there is a base",
        None, "optional", TWO, (WEIGHT,), builders.nuslerp,
    ),
    Method(
        "multislerp", "several models on the sphere, or their updates if there is a base",
        None, "optional", ANY,
        (WEIGHT, Parameter("normalize_weights", True, "make the weights add up to 1")),
        builders.multislerp,
    ),
    Method(
        "karcher", "the mean of several models on the sphere, whatever their order",
        "2603.04972", "none", ANY,
        (
            Parameter("weight", 1.0, WEIGHT.doc, True, low=0),
            Parameter("max_iter", 10, "steps towards the mean", low=1),
            Parameter("tol", 1e-5, "the length of a step that is the last", low=0),
        ),
        builders.karcher,
    ),
    Method(
        "model_stock", "the average pulled to the base, by the angles between updates",
        "2403.19522", "needed", SEVERAL, (), builders.model_stock,
    ),
    Method(
        "task_arithmetic", "add updates up: several skills at once, or one negative to unlearn",
        "2212.04089", "needed", ANY, (WEIGHT, SUM, LAMBDA), builders.task_arithmetic,
    ),
    Method(
        "wise_ft", "part of the way from base to fine-tune: robustness out of distribution",
        "2109.01903", "needed", ONE,
        (Parameter("alpha", 0.5, "0 is the base, 1 the fine-tune", low=0, high=1),),
        builders.wise_ft,
    ),
    Method(
        "expo", "beyond an aligned model, away from the model before alignment (the base)",
        "2404.16792", "needed", ONE,
        (Parameter("alpha", 0.3, "how far beyond, in lengths of the update", low=0),),
        builders.expo,
    ),
    Method(
        "ties", "drop small updates, agree on signs, average: less interference",
        "2306.01708", "needed", ANY, (WEIGHT, TRIM, MEAN, LAMBDA), builders.ties,
    ),
    Method(
        "dare_linear", "drop updates at random, rescale the rest, add up",
        "2311.03099", "needed", ANY, (WEIGHT, DENSITY, RESCALE, SUM, LAMBDA),
        partial(builders.dropped, elect=False, by_rank=False), random=True,
    ),
    Method(
        "dare_ties", "drop updates at random, rescale the rest, agree on signs",
        "2311.03099", "needed", ANY, (WEIGHT, DENSITY, RESCALE, SUM, LAMBDA),
        partial(builders.dropped, elect=True, by_rank=False), random=True,
    ),
    Method(
        "della", "like dare_ties, but what is large is dropped less often",
        "2406.11617", "needed", ANY, (WEIGHT, DENSITY, EPSILON, RESCALE, MEAN, LAMBDA),
        partial(builders.dropped, elect=True, by_rank=True), random=True,
    ),
    Method(
        "della_linear", "like dare_linear, but what is large is dropped less often",
        "2406.11617", "needed", ANY, (WEIGHT, DENSITY, EPSILON, RESCALE, SUM, LAMBDA),
        partial(builders.dropped, elect=False, by_rank=True), random=True,
    ),
    Method(
        "breadcrumbs", "drop the smallest and the largest updates, add up: many tasks, no tuning",
        "2312.06795", "needed", ANY, (WEIGHT, CRUMBS, GAMMA, SUM, LAMBDA),
        partial(builders.breadcrumbs, elect=False),
    ),
    Method(
        "breadcrumbs_ties", "drop the smallest and the largest updates, agree on signs",
        "2312.06795", "needed", ANY, (WEIGHT, CRUMBS, GAMMA, SUM, LAMBDA),
        partial(builders.breadcrumbs, elect=True),
    ),
    Method(
        "consensus", "keep what matters to several tasks (TALL masks), drop what to one or none",
        "2405.07813", "needed", SEVERAL,
        (
            WEIGHT,
            Parameter("mask", 0.4, "a task keeps |tau_i| >= mask * |tau - tau_i|", low=0),
            Parameter("agreement", 2, "tasks that have to keep an entry", low=1),
            LAMBDA,
        ),
        builders.consensus,
    ),
    Method(
        "magmax", "of every entry the largest update: fine-tunes made one after another",
        "2407.06322", "needed", ANY, (LAMBDA,), builders.magmax,
    ),
    Method(
        "sce", "weigh models, matrix by matrix, by where they differ most",
        "2408.07990", "needed", ANY,
        (Parameter("select_topk", 1.0, "the part of entries, by variance", low=0, high=1),),
        builders.sce,
    ),
    Method(
        "nearswap", "take a model's values where they are near the base's",
        None, "needed", ONE,
        (Parameter("t", None, "how near; farther ones move by this much", low=0),),
        builders.nearswap,
    ),
    Method(
        "arcee_fusion", "take over only the updates that stand out",
        None, "needed", ONE, (), builders.arcee_fusion,
    ),
    Method(
        "ram", "average what several agents changed, keep whole what one alone did",
        "2601.13572", "needed", ANY,
        (Parameter("epsilon", 1e-5, "a smaller update is none", low=0),),
        partial(builders.ram, local=False),
    ),
    Method(
        "ramplus_tl", "like ram, with what one agent alone changed made larger",
        "2601.13572", "needed", ANY,
        (
            Parameter("r", 0.1, "how much larger, by the ratio of shared to own", low=0),
            Parameter("alpha", 0.2, "the largest ratio that counts", low=0),
            Parameter("epsilon", 1e-5, "a smaller update is none", low=0),
        ),
        partial(builders.ram, local=True),
    ),
    Method(
        "tsv_m", "the first singular vectors of every task, made orthogonal to each other",
        "2412.00081", "needed", ANY, (LAMBDA,), partial(builders.spectral, method="tsv_m"),
    ),
    Method(
        "iso_c", "the sum of updates with all singular values alike: no task dominates",
        "2502.04959", "needed", ANY, (LAMBDA,), partial(builders.spectral, method="iso_c"),
    ),
    Method(
        "iso_cts", "like iso_c, with directions for what each task has of its own",
        "2502.04959", "needed", ANY,
        (Parameter("common", 0.8, "the part of directions from the sum", low=0, high=1), LAMBDA),
        partial(builders.spectral, method="iso_cts"),
    ),
    Method(
        "wudi", "the update that interferes least with what each layer is given",
        "2503.08099", "needed", ANY, (LAMBDA,), partial(builders.spectral, method="wudi"),
    ),
    Method(
        "knots_ties", "TIES in directions that all updates share: for fine-tunes by LoRA",
        "2410.19735", "needed", ANY, (WEIGHT, WHOLE, LAMBDA),
        partial(builders.spectral, method="knots_ties"),
    ),
    Method(
        "passthrough", "one model as it is, or scaled",
        None, "none", ONE, (Parameter("scale", 1.0, "factor on every weight"),),
        builders.passthrough,
    ),
)  # fmt: skip
METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}
"""Every merge method by name."""


def find_method(name: str) -> Method:
    """The method of that name. Raises ArgumentError with the nearest one."""
    if name not in METHODS:
        raise ArgumentError(unknown("merge method", name, METHODS) + "; see `surgery methods`")
    return METHODS[name]


def joint_problems(method: Method, values: Mapping[str, Any], models: int) -> list[str]:
    """What is wrong with parameters that are fine one by one."""
    problems = []
    densities, spreads = values.get("density"), values.get("epsilon")
    if isinstance(densities, tuple) and isinstance(spreads, tuple):
        problems += [
            f"density {density:g} and epsilon {spread:g}: density - epsilon and density + epsilon "
            f"have to be in (0, 1)"
            for density, spread in dict.fromkeys(zip(densities, spreads, strict=True))
            if density < 1 and not 0 < density - spread <= density + spread < 1
        ]
    weights = values.get("weight")
    averaged = method.name in ("linear", "karcher") and values.get("normalize", True)
    if averaged and isinstance(weights, tuple) and abs(sum(weights)) < 1e-8:
        problems.append("the weights add up to 0, and an average divides by their sum")
    agreement = values.get("agreement")
    if agreement is not None and agreement > models:
        problems.append(f"agreement is {agreement}, and there are {models} models")
    return problems
