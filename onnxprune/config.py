"""The configuration: a list of entries, each naming weights and what to do with them.

The list is NNI's; a mapping around it adds the pruner and the defaults of its entries. Everything is
validated at once, and an error names the entry, the key and the value.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from onnxprune.algorithms.allocate import ALLOCATIONS
from onnxprune.algorithms.patterns import parse as parse_pattern
from onnxprune.algorithms.scores import BN_SCALE, CALIBRATED, CHANNEL_SCORES, SCORES
from onnxprune.errors import PruneError
from onnxprune.graph.roles import DEFAULT_TYPES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ConfigSource = Union[Sequence[Mapping[str, Any]], Mapping[str, Any], str, "os.PathLike[str]"]

Sparsity = Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)]
Time = Annotated[int, Field(ge=0, strict=True)]


class Named(Protocol):
    """What an entry is matched against."""

    @property
    def op_types(self) -> tuple[str, ...]:
        """Operator names."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the weight, its nodes and its module."""


class Entry(BaseModel):
    """One entry: which weights, and what is common to all pruners.

    `op_types` and `op_names` must both match where both are given; with neither, the default types are meant.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    op_types: tuple[str, ...] | None = None
    op_names: tuple[str, ...] | None = None
    exclude: Annotated[bool, Field(strict=True)] = False
    score: str = "magnitude"
    pattern: str = "unstructured"
    allocation: str = "uniform"

    @field_validator("op_types", "op_names", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _score_exists(self) -> Entry:
        coupled = parse_pattern(self.pattern).coupled
        known = {*CALIBRATED, *((*CHANNEL_SCORES, BN_SCALE) if coupled else SCORES)}
        if self.score not in known:
            wide = "" if coupled or self.score not in {*CHANNEL_SCORES, BN_SCALE} else " (that one scores channels)"
            raise ValueError(
                f"score '{self.score}' with pattern '{self.pattern}': expected one of {_names(known)}{wide}"
            )
        return self

    @field_validator("allocation")
    @classmethod
    def _allocation_exists(cls, value: str) -> str:
        return _one_of(value, ALLOCATIONS)

    @field_validator("pattern")
    @classmethod
    def _pattern_exists(cls, value: str) -> str:
        parse_pattern(value)
        return value

    def matches(self, weight: Named) -> bool:
        """Whether the entry names a weight."""
        types = self.op_types if self.op_types is not None or self.op_names is not None else ("default",)
        if types is not None:
            chosen = set(types) | (DEFAULT_TYPES if "default" in types else set())
            if not chosen & set(weight.op_types):
                return False
        if self.op_names is not None:
            return any(_named(weight, pattern) for pattern in self.op_names)
        return True

    def final(self) -> float | None:
        """The sparsity the entry ends at; None where a quality decides."""
        raise NotImplementedError

    def _check_pattern(self, sparsity: float) -> None:
        most = parse_pattern(self.pattern).most
        if sparsity > most:
            raise ValueError(f"sparsity {sparsity} is more than the pattern {self.pattern} allows, {most:.4g}")


class LevelEntry(Entry):
    """Level: the share of each weight that goes."""

    sparsity: Sparsity | None = None

    @model_validator(mode="after")
    def _complete(self) -> LevelEntry:
        if not self.exclude:
            if self.sparsity is None and parse_pattern(self.pattern).most == 1:
                raise ValueError("key 'sparsity' is missing: the share of entries to prune, from 0 to 1")
            self._check_pattern(self.final() or 0.0)
        return self

    def final(self) -> float | None:
        """`sparsity`; a pattern N:M alone implies its own."""
        return parse_pattern(self.pattern).most if self.sparsity is None else self.sparsity


class _Scheduled(Entry):
    initial_sparsity: Sparsity = 0.0
    start_epoch: Time | None = None
    end_epoch: Time | None = None
    start_step: Time | None = None
    end_step: Time | None = None
    frequency: Annotated[int, Field(ge=1, strict=True)] = 1

    @property
    def counts(self) -> Literal["epoch", "step"]:
        """What the schedule's time is counted in."""
        return "step" if self.end_step is not None else "epoch"

    @property
    def span(self) -> tuple[int, int]:
        """Time of the first and of the last update."""
        if self.end_step is not None:
            return self.start_step or 0, self.end_step
        return self.start_epoch or 0, self.end_epoch or self.start_epoch or 0

    @model_validator(mode="after")
    def _one_clock(self) -> _Scheduled:
        epochs = self.start_epoch is not None or self.end_epoch is not None
        steps = self.start_step is not None or self.end_step is not None
        if epochs and steps:
            raise ValueError(
                "a schedule counts epochs (start_epoch, end_epoch) or optimizer steps (start_step, end_step), not both"
            )
        if self.start_step is not None and self.end_step is None:
            raise ValueError("key 'end_step' is missing: the step of the last update")
        start, end = self.span
        if end < start:
            raise ValueError(f"the schedule ends at {end}, before it starts at {start}")
        return self


class AGPEntry(_Scheduled):
    """AGP: from the initial to the final sparsity between two epochs (or optimizer steps)."""

    final_sparsity: Sparsity | None = None
    sparsity: Sparsity | None = None

    @model_validator(mode="after")
    def _complete(self) -> AGPEntry:
        if self.exclude:
            return self
        if self.sparsity is not None and self.final_sparsity is not None:
            raise ValueError("'sparsity' is short for 'final_sparsity': give one of them")
        if self.final() is None:
            raise ValueError("key 'final_sparsity' is missing: the sparsity to end at, from 0 to 1")
        self._check_pattern(self.final() or 0.0)
        if self.initial_sparsity > (self.final() or 0.0):
            raise ValueError(_falls(self.initial_sparsity, self.final()))
        return self

    def final(self) -> float | None:
        """`final_sparsity`."""
        most = parse_pattern(self.pattern).most
        given = self.sparsity if self.final_sparsity is None else self.final_sparsity
        return most if given is None and most < 1 else given


class SensitivityEntry(_Scheduled):
    """Sensitivity: the total sparsity to reach, or the quality factor of every weight's threshold."""

    sparsity: Sparsity | None = None
    quality: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    allocation: Literal["global"] = "global"

    @model_validator(mode="after")
    def _complete(self) -> SensitivityEntry:
        if self.exclude:
            return self
        if self.score in CALIBRATED:
            raise ValueError(f"score '{self.score}': the sensitivity pruner ranks by its own; use level or agp")
        if (self.sparsity is None) == (self.quality is None):
            raise ValueError(
                "exactly one of 'sparsity' (the total to reach) and 'quality' (the factor of the thresholds) is needed"
            )
        if self.quality is not None and self.span != (0, 0):
            raise ValueError("a 'quality' has no schedule; give 'sparsity' to raise it step by step")
        if self.sparsity is not None:
            self._check_pattern(self.sparsity)
            if self.initial_sparsity > self.sparsity:
                raise ValueError(_falls(self.initial_sparsity, self.sparsity))
        return self

    def final(self) -> float | None:
        """`sparsity`."""
        return self.sparsity


class SparseGPTEntry(LevelEntry):
    """SparseGPT: level, with second-order selection and an update of what survives."""

    @model_validator(mode="after")
    def _has_its_own_score(self) -> SparseGPTEntry:
        if self.score != "magnitude":
            raise ValueError(f"score '{self.score}': the sparsegpt pruner selects by its own; leave it out")
        pattern = parse_pattern(self.pattern)
        if pattern.coupled or pattern.fitted is not None:
            raise ValueError(f"pattern '{self.pattern}': the sparsegpt pruner takes entries, N:M and blocks; use level")
        return self


SPARSEGPT = "sparsegpt"

ENTRIES: dict[str, type[Entry]] = {
    "level": LevelEntry,
    "agp": AGPEntry,
    "sensitivity": SensitivityEntry,
    SPARSEGPT: SparseGPTEntry,
}


class Config(BaseModel):
    """A validated configuration."""

    model_config = ConfigDict(frozen=True)

    pruner: str
    entries: tuple[Entry, ...]
    inexact: bool = False
    reconstruct: bool = False
    source: list[dict[str, Any]]

    @property
    def coupled(self) -> bool:
        """Whether any entry takes channels or heads, which the structure of the graph decides about."""
        return any(parse_pattern(entry.pattern).coupled for entry in self.entries if not entry.exclude)

    @property
    def grouped(self) -> bool:
        """Whether any entry asks for grouped inputs, which can be lowered."""
        return any(parse_pattern(entry.pattern).fitted is not None for entry in self.entries if not entry.exclude)

    @property
    def calibrated(self) -> bool:
        """Whether calibration data are needed: for an entry's score, to select by, or to reconstruct."""
        return self.refits or any(entry.score in CALIBRATED for entry in self.entries if not entry.exclude)

    @property
    def measured(self) -> bool:
        """Whether data decide by what the model makes of them: it runs, once and again."""
        asked = any(entry.allocation == "sensitivity" for entry in self.entries if not entry.exclude)
        return asked or self.pruner == "sensitivity"

    @property
    def refits(self) -> bool:
        """Whether the values of what survives change, too."""
        return self.reconstruct or self.pruner == SPARSEGPT

    def assign(self, weights: Iterable[Any]) -> list[tuple[int, list[Any]]]:
        """The weights each entry governs: the last entry that matches a weight wins, whole; exclude leaves it out.

        Raises:
            PruneError: an entry matches no weight; the message lists the nearest names and the types present.
        """
        weights = list(weights)
        for index, entry in enumerate(self.entries):
            if not any(entry.matches(weight) for weight in weights):
                raise PruneError(self._no_match(index, entry, weights))
            for pattern in entry.op_names or ():
                if not any(_named(weight, pattern) for weight in weights):
                    raise PruneError(self._no_match(index, entry.model_copy(update={"op_names": (pattern,)}), weights))
        governed: dict[int, list[Any]] = {index: [] for index in range(len(self.entries))}
        for weight in weights:
            last = max((i for i, entry in enumerate(self.entries) if entry.matches(weight)), default=None)
            if last is not None and not self.entries[last].exclude:
                governed[last].append(weight)
        return [(index, chosen) for index, chosen in governed.items() if chosen]

    def _no_match(self, index: int, entry: Entry, weights: list[Any]) -> str:
        name = f": the name '{entry.op_names[0]}'" if entry.op_names and len(entry.op_names) == 1 else ""
        what = f"config entry {index + 1} ({_short(self.source[index])}){name} matches no weight"
        if not weights:
            return f"{what}: the model has no weights that can be pruned"
        types = sorted({t for w in weights for t in w.op_types})
        names = sorted({name for w in weights for name in w.names})
        near: list[str] = []
        for pattern in entry.op_names or ():
            near += [n for n in difflib.get_close_matches(pattern, names, 5, 0.4) if n not in near]
        listed = f"; nearest names: {', '.join(near or names[:8])}" if entry.op_names else ""
        return f"{what}; types present: {', '.join(types)}{listed}"


def load(source: ConfigSource, **options: Any) -> Config:
    """Validate a configuration.

    Args:
        source: a list of entries; a mapping with `config_list` and optionally `pruner`, `score`, `pattern`,
            `allocation`, `inexact` and `reconstruct`; or the path of a YAML, JSON or TOML file with either.
        options: the mapping's other keys; they go before the mapping's, and after an entry's own. None is not given.

    Raises:
        PruneError: with the entry, the key and the value at fault.
    """
    if isinstance(source, (str, os.PathLike)):
        source = _read(Path(source))
    mapping = dict(source) if isinstance(source, Mapping) else {"config_list": source}
    mapping.update({key: value for key, value in options.items() if value is not None})
    known = {"pruner", "score", "pattern", "allocation", "inexact", "reconstruct", "config_list"}
    if unknown := mapping.keys() - known:
        entry = unknown & {"sparsity", "op_types", "op_names", "final_sparsity"}
        hint = " (an entry of a config list must stand in a list)" if entry else ""
        raise PruneError(f"config key {_names(unknown)} is not known; expected {_names(known)}{hint}")
    pruner = str(mapping.pop("pruner", "level")).lower()
    if pruner not in ENTRIES:
        raise PruneError(f"pruner '{pruner}' is not known; expected {_names(ENTRIES)}")
    flags: dict[str, Any] = {name: mapping.pop(name, False) for name in ("inexact", "reconstruct")}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise PruneError(f"config key '{name}' is {value!r}; expected true or false")
    entries = mapping.pop("config_list", None)
    if not isinstance(entries, Sequence) or isinstance(entries, (str, bytes)) or not entries:
        raise PruneError(f"a config list is a list with at least one entry such as {_EXAMPLE}, not {entries!r}")
    validated, sources = [], []
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise PruneError(f"config entry {index + 1} is {entry!r}; expected a mapping such as {_EXAMPLE}")
        try:
            validated.append(ENTRIES[pruner].model_validate({**mapping, **entry}))
        except ValidationError as error:
            raise PruneError(_explain(index, entry, pruner, error)) from None
        sources.append(dict(entry))
    return Config(pruner=pruner, entries=tuple(validated), source=sources, **flags)


def _named(weight: Named, pattern: str) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for name in weight.names)


_EXAMPLE = "{'sparsity': 0.8, 'op_types': 'default'}"


def _falls(initial: float, final: float | None) -> str:
    return f"initial_sparsity {initial} is above the final sparsity {final}: pruned weights never return"


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PruneError(f"cannot read the configuration '{path}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PruneError(f"the configuration '{path}' is no text: {error}") from error
    try:
        if path.suffix == ".toml":
            return tomllib.loads(text)
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise PruneError(f"the configuration '{path}' cannot be parsed: {' '.join(str(error).split())}") from error


def _explain(index: int, entry: Mapping[str, Any], pruner: str, error: ValidationError) -> str:
    parts = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"][:1])
        if problem["type"] == "extra_forbidden":
            known = list(ENTRIES[pruner].model_fields)
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean '{near[0]}'?" if near else f" ({_names(known)})"
            parts.append(f"key '{key}' is not one of the {pruner} pruner's{hint}")
        else:
            what = f"key '{key}' has the value {problem['input']!r}: " if key else ""
            parts.append(what + problem["msg"].removeprefix("Value error, "))
    return f"config entry {index + 1} ({_short(entry)}): {'; '.join(parts)}"


def _short(entry: Mapping[str, Any]) -> str:
    text = repr(dict(entry))
    return text if len(text) <= 120 else text[:117] + "..."


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names, key=str))


def _one_of(value: str, table: Iterable[str]) -> str:
    if value not in table:
        raise ValueError(f"expected one of {_names(table)}")
    return value
