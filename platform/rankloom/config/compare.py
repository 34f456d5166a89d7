"""A comparison: several methods on one task, under one budget, with several seeds. `rankloom compare` reads it.

Each method is a recipe of `RECIPES`, or one with other settings. All train on the same rows in the same order, so each
seed gives every method the same tokens. `comparison/studies.py` makes studies without a searcher of it.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from rankloom.config.base import Frozen, parse
from rankloom.config.metric import Metric, Mode, check_mode, choose_mode, is_own
from rankloom.config.recipes import RecipeName, copy_recipe
from rankloom.config.space import Tree, find_knobs, merge
from rankloom.config.study import HostsConfig, TrialFragment
from rankloom.config.trial import NAME_PATTERN, AdapterName, TrialConfig
from rankloom.errors import ConfigError, IncompatibleError

RATE_STEP = 10**0.5
"""Ratio of one learning rate that `tune` tries to the next."""
SET_BY_THE_COMPARISON = {
    "name": "the comparison names its trials itself; remove it",
    "method": "list the methods in methods",
    "quantization": "it belongs to a method; use qlora, or {recipe: lora, quantization: int8} in methods",
    "seed": "set seeds",
    "eval.metric": "set metric",
    "eval.mode": "set mode",
    "eval.patience": "every method gets the whole budget; remove it",
    "output.publish": "set publish",
    "optim.learning_rate": "each method has its own; set one in methods: {recipe: lora, optim: {learning_rate: 1e-3}}",
    "optim.loraplus_ratio": "use lora-plus in methods",
}
"""Settings that the base trial may not have -> what to do instead."""
CHANGE_THE_ROWS = ("batch_size", "group_by_length")
"""Settings of `optim` that would give one method other rows than the others."""


class MethodChoice(Frozen):
    """One method of a comparison: a recipe, perhaps with other settings."""

    recipe: RecipeName
    """The recipe to start from."""
    name: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    """Name in the table, and of its adapter after the comparison's; null: the recipe's."""
    method: dict[str, Any] = {}
    """Settings of the method to change, such as {rank: 8}."""
    quantization: str | dict[str, Any] | None = None
    """Quantisation of the base; null: the recipe's."""
    optim: dict[str, Any] = {}
    """Settings of the optimiser to change. `learning_rate` replaces the recommended one."""

    @model_validator(mode="after")
    def _check_optim(self) -> MethodChoice:
        for key in CHANGE_THE_ROWS:
            if key in self.optim:
                raise ConfigError(
                    f"optim.{key}: all methods read the same rows in the same order; set trial.optim.{key} for all"
                )
        return self

    @property
    def label(self) -> str:
        """Return its name in the table."""
        return self.name or self.recipe

    @property
    def fragment(self) -> Tree:
        """Return its settings as a fragment of a trial, with its recommended learning rate."""
        changed: Tree = {"method": self.method, "optim": self.optim}
        if self.quantization is not None:
            changed["quantization"] = self.quantization
        return merge(copy_recipe(self.recipe), changed)

    @property
    def learning_rate(self) -> float:
        """Return the recommended learning rate, or the one that was set."""
        return float(self.fragment["optim"]["learning_rate"])


def _spell_out(value: Any) -> Any:
    return {"recipe": value} if isinstance(value, str) else value


AnyMethod = Annotated[MethodChoice, BeforeValidator(_spell_out, json_schema_input_type=str | MethodChoice)]
TEN = ("full", "lora", "qlora", "dora", "qdora", "lora-plus", "qlora-lora-plus", "adalora", "galore", "lisa")


class CompareConfig(Frozen):
    """Methods to compare on one task."""

    name: AdapterName
    """Name of the comparison and of its folder, `<output.root>/comparisons/<name>`; each method's best adapter is
    published as `<name>-<method>`."""
    trial: TrialFragment = {}
    """Settings that all methods share: those of a trial, without a name, a method, a quantisation and a seed.
    `budget` is the one budget of all."""
    methods: Annotated[list[AnyMethod], Field(min_length=2)] = [MethodChoice(recipe=name) for name in TEN]
    """Recipes, such as [lora, qlora, dora]; with other settings: {recipe: lora, name: lora-r64, method: {rank: 64}}."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = [0, 1, 2]
    """Seeds; each method trains once with each. With one seed, a difference may be one of chance between two runs."""
    tune: Annotated[int, Field(ge=0, le=9)] = 0
    """Learning rates to try for each method, with the first seed: half a decade apart, around its recommended one. The
    best by `metric` on the validation rows is used for all seeds. 0: the recommended rate. The table counts these
    trials."""
    metric: Metric = "loss"
    """What chooses checkpoints, learning rates and the leader, on the validation rows: loss, accuracy, or a function of
    your own as module:function (see eval.metric)."""
    mode: Mode | None = None
    """max or min, for a metric of your own; null: max."""
    hosts: HostsConfig = HostsConfig()
    publish: bool = True
    """Publish each method's best adapter."""

    @model_validator(mode="after")
    def _check(self) -> CompareConfig:
        check_mode(self.metric, self.mode)
        if self.tune == 1:
            raise ConfigError("tune=1: one learning rate is no choice; use 0 for the recommended one, or 2 to 9")
        if (repeated := _find_repeated(self.seeds)) is not None:
            raise ConfigError(f"seeds: {repeated} stands there twice; each seed gives one trial")
        if repeated := _find_repeated([choice.label for choice in self.methods]):
            raise ConfigError(f"methods: {repeated!r} stands there twice; give one of them another name")
        for key, advice in SET_BY_THE_COMPARISON.items():
            section, _, name = key.partition(".")
            given = self.trial.get(section)
            if given is not None and (not name or (isinstance(given, dict) and name in given)):
                raise ConfigError(f"trial.{key}: {advice}")
        for index, choice in enumerate(self.methods):
            self._check_method(choice, f"methods[{index}] ({choice.label})")
        return self

    def _check_method(self, choice: MethodChoice, origin: str) -> None:
        if knobs := find_knobs(choice.fragment):
            raise ConfigError(f"{origin}: {next(iter(knobs))} has one value in a comparison; rankloom tune searches")
        for rate in self.list_rates(choice):
            try:
                self.resolve(choice, self.seeds[0], rate)
            except IncompatibleError as error:
                raise IncompatibleError(f"{origin}: {error}") from None
            except ConfigError as error:
                raise ConfigError(f"{origin}: {error}") from None

    def list_rates(self, choice: MethodChoice) -> list[float]:
        """Return the learning rates to try for a method, ascending; without `tune`, the recommended one."""
        middle, count = choice.learning_rate, self.tune or 1
        return [float(f"{middle * RATE_STEP ** (i - (count - 1) / 2):.3g}") for i in range(count)]

    def place(self, choice: MethodChoice, seed: int, rate: float) -> Tree:
        """Return one trial's settings, as a study's warm start."""
        return merge(choice.fragment, {"optim": {"learning_rate": rate}, "seed": seed})

    def resolve(self, choice: MethodChoice, seed: int, rate: float) -> TrialConfig:
        """Return one trial of the comparison.

        Raises:
            ConfigError, IncompatibleError: a setting is wrong, or two exclude each other.
        """
        own = {"mode": choose_mode(self.metric, self.mode)} if is_own(self.metric) else {}
        shared = merge(self.trial, {"eval": {"metric": self.metric, **own}})
        return parse(TrialConfig, merge(shared, self.place(choice, seed, rate)) | {"name": self.name}, "trial")

    @property
    def baseline(self) -> TrialConfig:
        """Return the first method's trial with the first seed, for the settings that all share."""
        return self.resolve(self.methods[0], self.seeds[0], self.methods[0].learning_rate)


def _find_repeated(values: list[Any]) -> Any:
    return next((value for index, value in enumerate(values) if value in values[:index]), None)
