"""What to try next, drawn by Optuna from what was tried: a function of the trials, the round and a seed alone.

No study outlives a call: each is made anew from the journal, so that a search that was broken off asks what it would
have asked. Optuna is imported when it is needed.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import Unsupported
from .search_space import Choices, Space
from .search_trials import COMPLETE, Trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study

_STARTUP = 8  # trials before Optuna's model of what is good is asked
_ROUNDS = 1_000_003


def need_optuna() -> None:
    """Raise Unsupported where Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise Unsupported("`ahl tune` needs optuna, which is not installed.", "pip install optuna")


def draw(space: Space, trials: Sequence[Trial], count: int, seed: int, turn: int) -> list[dict[str, Any]]:
    """Parameters of the next `count` trials, by the tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011).

    Trials that are drawn together keep away from each other ("constant liar", Ginsbourger et al. 2010). Those that
    failed count as the worst.

    Args:
        turn: number of the round; each has a generator of its own.
    """
    with _quiet():
        import optuna

        sampler = optuna.samplers.TPESampler(
            seed=(seed * _ROUNDS + turn) % 2**32, n_startup_trials=_STARTUP, constant_liar=True, multivariate=False
        )
        study = _study(space, trials, sampler)
        distributions = {path: _distribution(part) for path, part in space.items()}
        return [_tidied(study.ask(distributions).params, space) for _ in range(count)]


def worse_than_median(space: Space, trials: Sequence[Trial], values: Mapping[int, float]) -> bool:
    """Whether Optuna's median rule (Golovin et al., KDD 2017) ends a trial with these losses by evaluation."""
    with _quiet():
        import optuna

        study = _study(space, trials, optuna.samplers.RandomSampler(seed=0))
        pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=1)
        running = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, intermediate_values=dict(values))
        return bool(pruner.prune(study, running))


def _study(space: Space, trials: Sequence[Trial], sampler: Any) -> Study:
    import optuna

    study = optuna.create_study(sampler=sampler, direction="minimize")
    distributions = {path: _distribution(part) for path, part in space.items()}
    for trial in trials:
        complete = trial.state == COMPLETE and trial.loss is not None
        kinds = optuna.trial.TrialState
        study.add_trial(
            optuna.trial.create_trial(
                state=kinds.COMPLETE if complete else kinds.PRUNED,
                value=trial.loss if complete else None,
                params=dict(trial.parameters),
                distributions=distributions,
                intermediate_values={i: one["loss"] for i, one in enumerate(trial.evaluations)},
            )
        )
    return study


def _distribution(part: Any) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(part, Choices):
        return CategoricalDistribution(part.values)
    if part.whole:
        return IntDistribution(int(part.low), int(part.high), log=part.log)
    return FloatDistribution(part.low, part.high, log=part.log)


def _tidied(parameters: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """In the order of the space; fractions with three digits, which are enough and can be read."""
    found = {}
    for path, part in space.items():
        value = parameters[path]
        if isinstance(value, float) and not isinstance(part, Choices):
            value = min(max(float(f"{value:.3g}"), float(part.low)), float(part.high))
        found[path] = value
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna reports through a logger of its own, and warns that options are experimental."""
    logger = logging.getLogger("optuna")
    before = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import optuna

        logger.setLevel(logging.ERROR)
        optuna.logging.disable_propagation()
        try:
            yield
        finally:
            logger.setLevel(before)
