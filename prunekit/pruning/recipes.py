"""Pruning methods, and recipes that assign them to matrices by name.

As YAML (`Recipe.from_dict` takes what a YAML reader returns), either one method for all matrices

    method: wanda
    pattern: "2:4"

or rules, of which the first that matches a matrix's name counts:

    rules:
      "*.mlp.*": {method: sparsegpt, sparsity: 0.6}
      "*": {method: wanda}
    ignore: ["*.layers.0.*"]

Both may hold `budget: owl` or `budget: {outlier: 5, spread: 0.08}`: layers lose more or less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeAlias

from prunekit.errors import PrunekitError
from prunekit.pruning import patterns
from prunekit.pruning.patterns import Pattern

# Routers decide which expert sees a token, and are tiny: pruning them saves nothing.
DEFAULT_IGNORE = ("lm_head", "*.router", "*.gate", "*.shared_expert_gate")

UPDATES = ("admm",)
BITS = (8, 4, "fp8")

# What a method's mask needs to know of a matrix's inputs.
NOTHING, MEAN_SQUARES, HESSIAN = "nothing", "mean squares", "hessian"


@dataclass(frozen=True)
class _Method:
    """The settings that all methods share.

    Attributes:
        sparsity: Fraction of the weights to prune, in (0, 1); None means 0.5, or what the
            pattern implies.
        pattern: "unstructured", or "N:M": N kept of every M in a row.
        update: "admm": once the mask is chosen, give the kept weights the values whose outputs come
            closest to the dense ones' (`prunekit.pruning.admm`). None: what the method leaves.
        bits: 8 or 4: round the kept weights to integers of so many bits and make up for the errors
            of pruning and rounding together (`prunekit.pruning.rounding`); "fp8": to numbers of
            float8_e4m3fn. None: no rounding.
        group: Columns that share a scale; None: a whole row of 8 bits, 128 columns of 4.
    """

    sparsity: float | None = None
    pattern: str = patterns.UNSTRUCTURED
    update: str | None = field(default=None, kw_only=True)
    bits: int | str | None = field(default=None, kw_only=True)
    group: int | None = field(default=None, kw_only=True)

    name: ClassVar[str]
    scored_by: ClassVar[str]  # NOTHING, MEAN_SQUARES or HESSIAN

    def __post_init__(self) -> None:
        patterns.parse(self.pattern, self.sparsity)
        if self.update not in (None, *UPDATES):
            raise PrunekitError(
                f"update '{self.update}' is unknown: use {', '.join(UPDATES)}, or leave it out"
            )
        if self.bits not in (None, *BITS):
            raise PrunekitError(
                f"{self.bits} bits are not supported: use {BITS[0]}, {BITS[1]} or {BITS[2]}"
            )
        if self.group is not None and (self.bits is None or self.group < 1):
            raise PrunekitError(
                f"group {self.group} with bits {self.bits}: give bits 8 or 4 and a group from 1, "
                "such as 128"
            )
        if self.group is not None and self.bits == "fp8":
            raise PrunekitError(
                f"group {self.group} with bits fp8: a row has one scale, leave it out"
            )

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration."""
        return self.scored_by != NOTHING or self.needs_hessian

    @property
    def needs_hessian(self) -> bool:
        """Whether it needs XᵀX of the inputs."""
        return self.scored_by == HESSIAN or self.fits

    @property
    def fits(self) -> bool:
        """Whether values are fitted to XᵀX, which takes as many tokens as inputs."""
        return (self.update, self.bits) != (None, None)

    @property
    def target(self) -> Pattern:
        """The parsed pattern, with its sparsity."""
        return patterns.parse(self.pattern, self.sparsity)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `method_from_dict` reads."""
        return {"method": self.name, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Magnitude(_Method):
    """Prune the weights smallest in |W|, counted over a whole matrix (or its N:M groups).

    Needs no calibration.
    """

    name: ClassVar[str] = "magnitude"
    scored_by: ClassVar[str] = NOTHING


@dataclass(frozen=True)
class Wanda(_Method):
    """Prune the weights smallest in |W| · √(mean x²), counted per output row.

    Source: "A Simple and Effective Pruning Approach for Large Language Models",
    arXiv 2306.11695.

    Attributes:
        variant: Instead of one sparsity for every row, prune each row's smallest scores up to one
            share α of the row's score sum, α such that the matrix has the sparsity. No effect
            under N:M, which fixes every row's count.
    """

    variant: bool = False

    name: ClassVar[str] = "wanda"
    scored_by: ClassVar[str] = MEAN_SQUARES


@dataclass(frozen=True)
class RIA(_Method):
    """Prune the weights smallest in their share of row and column, times (√mean x²)^a.

    Counted over a whole matrix (or its N:M groups). Source: "Plug-and-Play: An Efficient
    Post-training Pruning Method for Large Language Models", ICLR 2024.

    Attributes:
        power: a, from 0 (inputs do not count).
        permute: Under N:M, order the inputs of each gated MLP's last matrix first so that its
            groups hold more of what is worth keeping; the rows of gate and up follow, so the
            model computes the same. Other matrices have inputs that many others share.
    """

    power: float = 0.5
    permute: bool = False

    name: ClassVar[str] = "ria"
    scored_by: ClassVar[str] = MEAN_SQUARES

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.power < float("inf"):
            raise PrunekitError(f"RIA power {self.power} is negative: use for example 0.5")
        if self.permute and not self.target.structured:
            raise PrunekitError(
                f"RIA permute has no effect on pattern '{self.pattern}': use N:M, such as 2:4"
            )


@dataclass(frozen=True)
class SparseGPT(_Method):
    """Prune by W² / diag(chol(H⁻¹))², and make up for it in the weights not yet visited.

    Source: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    arXiv 2301.00774.

    Attributes:
        block: Columns whose pruned weights are chosen together.
        damping: Fraction of the mean of H's diagonal that is added to the diagonal.
        keep_zeros: Whether weights that are zero stay zero. False, as in the research code, lets
            the update bring zeros of an earlier pruning back; the report then counts them.
    """

    block: int = 128
    damping: float = 0.01
    keep_zeros: bool = True

    name: ClassVar[str] = "sparsegpt"
    scored_by: ClassVar[str] = HESSIAN

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise PrunekitError(f"SparseGPT block {self.block} is too small: use for example 128")
        if not 0 < self.damping < float("inf"):
            raise PrunekitError(
                f"SparseGPT damping {self.damping} is not positive: use for example 0.01"
            )


@dataclass(frozen=True)
class ADMM(_Method):
    """Choose masks and values together, in steps of ADMM on XᵀX.

    Counted over a whole matrix (or its N:M groups). Source: "Fast and Optimal Weight Update for
    Pruned Large Language Models", arXiv 2401.02938, section 3.3.

    Attributes:
        damping: Fraction of the mean of XᵀX's diagonal that is added to the diagonal.
    """

    damping: float = 0.01

    name: ClassVar[str] = "admm"
    scored_by: ClassVar[str] = HESSIAN

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping < float("inf"):
            raise PrunekitError(
                f"ADMM damping {self.damping} is not positive: use for example 0.01"
            )

    @property
    def fits(self) -> bool:
        """Whether values are fitted to XᵀX, which takes as many tokens as inputs."""
        return True


Method: TypeAlias = Magnitude | Wanda | RIA | SparseGPT | ADMM
METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Magnitude, Wanda, RIA, SparseGPT, ADMM)
}


def method_from_dict(settings: Mapping[str, Any]) -> Method:
    """Read a method: `{"method": "wanda", "pattern": "2:4"}`.

    Raises:
        PrunekitError: Unknown method or setting, or a value out of range.
    """
    if not isinstance(settings, Mapping):
        raise PrunekitError(f"a method must be a mapping such as {{method: wanda}}, not {settings}")
    name = settings.get("method")
    if name not in METHODS:
        raise PrunekitError(f"method '{name}' is unknown: use one of {', '.join(METHODS)}")
    values = {key: value for key, value in settings.items() if key != "method"}
    fields = [part.name for part in dataclasses.fields(METHODS[name])]
    for key, value in values.items():
        if key not in fields:
            raise PrunekitError(f"{name} has no setting '{key}': use {', '.join(fields)}")
        if not _fits(key, value):
            raise PrunekitError(f"{name} setting '{key}' can't be {value!r}: see its documentation")
    return METHODS[name](**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fits(key: str, value: Any) -> bool:
    """Whether a setting read from a file has its type ('2:4' unquoted is a number in YAML 1.1)."""
    if key in ("sparsity", "damping", "power"):
        return _is_number(value) or (key == "sparsity" and value is None)
    if key in ("update", "bits", "group"):
        kind = str if key == "update" or (key, value) == ("bits", "fp8") else int
        return value is None or type(value) is kind
    kinds: dict[str, type] = {
        "pattern": str,
        "variant": bool,
        "permute": bool,
        "block": int,
        "keep_zeros": bool,
    }
    return type(value) is kinds[key]


@dataclass(frozen=True)
class OWL:
    """Layers with more outliers keep more; in all, as many weights go as without it.

    Source: "Outlier Weighed Layerwise Sparsity (OWL)", arXiv 2310.05175. An outlier is a weight of
    the dense model whose |W| · √(mean x²) is `outlier` times its layer's mean.

    Attributes:
        outlier: M of the source.
        spread: λ of the source: how far a layer's sparsity may lie from the mean.
    """

    outlier: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        numbers = _is_number(self.outlier) and _is_number(self.spread)
        if not numbers or not self.outlier > 0 or not 0 < self.spread < 1:
            raise PrunekitError(
                f"OWL outlier {self.outlier} and spread {self.spread}: use an outlier above 0, "
                "such as 5, and a spread in (0, 1), such as 0.08"
            )

    @classmethod
    def from_setting(cls, setting: Any) -> OWL | None:
        """Read `budget` of a recipe: None, "uniform", "owl", or OWL's settings.

        Raises:
            PrunekitError: It is none of these.
        """
        if setting in (None, "uniform"):
            return None
        if setting == "owl":
            return cls()
        fields = [part.name for part in dataclasses.fields(cls)]
        if not isinstance(setting, Mapping) or not all(
            key in fields and _is_number(value) for key, value in setting.items()
        ):
            raise PrunekitError(
                f"budget can't be {setting!r}: use uniform, owl, or numbers for {', '.join(fields)}"
            )
        return cls(**setting)


@dataclass(frozen=True)
class Recipe:
    """Assigns a method to each matrix by name.

    Attributes:
        rules: Method by name pattern (`*`, `?`, `[…]`, case-sensitive). The first pattern that
            matches a matrix's full name counts; a matrix that none matches stays dense.
        ignore: Name patterns of matrices that stay dense whatever the rules say. Replaces
            `DEFAULT_IGNORE` (MoE routers): extend that to keep it.
        budget: What decides how much of its method's total each layer loses; None: all alike.
    """

    rules: Mapping[str, Method]
    ignore: tuple[str, ...] = field(default=DEFAULT_IGNORE)
    budget: OWL | None = None

    def __post_init__(self) -> None:
        if not self.rules:
            raise PrunekitError('the recipe has no rules: give for example {"*": Wanda()}')
        if not isinstance(self.budget, OWL | None):
            raise PrunekitError(
                f"the recipe's budget can't be {self.budget!r}: give OWL(), or leave it out"
            )

    @classmethod
    def of(cls, recipe: Recipe | Method) -> Recipe:
        """`recipe` itself, or the recipe that prunes every matrix by one method."""
        return recipe if isinstance(recipe, Recipe) else cls({"*": recipe})

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration."""
        return self.budget is not None or any(rule.calibrated for rule in self.rules.values())

    def assign(self, names: Iterable[str]) -> dict[str, Method]:
        """The method of each matrix to prune.

        Args:
            names: Names of a model's prunable matrices.

        Raises:
            PrunekitError: A rule decides about no matrix; lists names that exist.
        """
        names = list(names)
        assigned: dict[str, Method] = {}
        used = set()
        candidates = [name for name in names if not _any_matches(name, self.ignore)]
        for name in candidates:
            rule = next((rule for rule in self.rules if fnmatchcase(name, rule)), None)
            if rule is not None:
                used.add(rule)
                assigned[name] = self.rules[rule]
        for rule in self.rules:
            if rule not in used:
                raise PrunekitError(self._unused(rule, names, candidates))
        return assigned

    def _unused(self, rule: str, names: list[str], candidates: list[str]) -> str:
        matching = [name for name in names if fnmatchcase(name, rule)]
        if not matching:
            examples = ", ".join(dict.fromkeys([*names[:3], *names[-1:]]))
            return f"rule '{rule}' matches no matrix: names look like {examples}"
        if not set(matching) & set(candidates):
            return f"rule '{rule}' matches only ignored matrices: change ignore or the rule"
        return f"rule '{rule}' matches only what earlier rules took: put it before them"

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads."""
        return {
            "rules": {rule: method.to_dict() for rule, method in self.rules.items()},
            "ignore": list(self.ignore),
            "budget": None if self.budget is None else dataclasses.asdict(self.budget),
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Recipe:
        """Read a recipe as the module's docstring shows it.

        Raises:
            PrunekitError: Unknown keys, methods or settings, or values out of range.
        """
        settings = dict(settings)
        ignore = settings.pop("ignore", DEFAULT_IGNORE)
        if isinstance(ignore, str) or not all(isinstance(rule, str) for rule in ignore):
            raise PrunekitError("ignore must be a list of name patterns: write it as ['…']")
        budget = OWL.from_setting(settings.pop("budget", None))
        if "rules" not in settings:
            return cls({"*": method_from_dict(settings)}, tuple(ignore), budget)
        rules = settings.pop("rules")
        if settings:
            raise PrunekitError(
                f"a recipe with rules has no setting '{next(iter(settings))}': put it into a rule"
            )
        if not isinstance(rules, Mapping):
            raise PrunekitError("rules must map name patterns to methods: write '*': {method: …}")
        methods = {str(rule): method_from_dict(rules[rule]) for rule in rules}
        return cls(methods, tuple(ignore), budget)


def _any_matches(name: str, patterns_: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns_)
