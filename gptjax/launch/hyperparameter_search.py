"""Searches for hyperparameters with Optuna's samplers and pruners, such that a killed search resumes exactly.

Trials are the members of a sweep. Both of Optuna's decisions are functions of the trials' curves alone, not of the
order in which these arrive. So the same trials are run, and stopped at the same place, however often the search is
killed:

- Trials are sampled in rounds. Those of a round are sampled when all trials of the rounds before have ended.
- Whether trial k is stopped at its evaluation e depends on the evaluations up to e of the trials before k, as if Optuna
  had run the trials one after the other. A trial runs on until these are known; its records after e are not used.

ASHA (Li et al. 2020) is Optuna's SuccessiveHalvingPruner, Hyperband that of Li et al. 2018.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.config import Config, UserError
from gptjax.launch import grid
from gptjax.launch.grid import Overrides
from gptjax.launch.members import Member
from gptjax.training.metrics_file import LOWER_IS_BETTER, METRICS_FILE, read_metrics

SAMPLERS, PRUNERS = ("tpe", "random"), ("none", "asha", "hyperband", "median")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a search does, apart from its space.

    Attributes:
      round_size: trials of a round.
      reduction: asha and hyperband continue the best 1 / reduction of the trials at each rung.
      seed: of the sampler.
    """

    sampler: str
    pruner: str
    trials: int
    round_size: int
    reduction: int
    seed: int

    def description(self) -> dict[str, Any]:
        """What may not change when a search is resumed; trials may be added."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "trials"}


class Search:
    """The trials of a search, their curves, and what follows from these.

    Args:
      space: distributions by config key.
      config: of the runs, without what is searched for.

    Raises:
      UserError: Optuna is not installed, or the config evaluates too rarely for a pruner.
    """

    def __init__(self, settings: Settings, space: Mapping[str, grid.Distribution], config: Config) -> None:
        try:
            import optuna
        except ImportError:
            raise UserError("--search needs Optuna: pip install 'gptjax[sweep]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna: Any = optuna
        self._settings, self._space = settings, space
        self._metric = config.evaluation.metric
        self._direction = "minimize" if self._metric in LOWER_IS_BETTER else "maximize"
        every, total = config.evaluation.every_tokens, config.batch.total_tokens
        if settings.pruner != "none" and (every is None or total is None or total // every < 2):
            raise UserError(
                f"--pruner={settings.pruner} stops runs at their evaluations: set batch.total_tokens, and "
                "evaluation.every_tokens to at most half of it"
            )
        self._evaluations = total // every if total and every else 1  # of a run that is not stopped
        self._trials: list[Member] = []
        self._values: dict[str, list[float]] = {}  # by name: the metric at each evaluation
        self._steps: dict[str, list[int]] = {}  # by name: the step of each evaluation
        self._read_at: dict[str, int] = {}  # by name: time of the last change of metrics.jsonl that was read
        self._decided: dict[str, int] = {}  # by name: number of evaluations at which it was decided to continue
        self.stopped: dict[str, int] = {}  # by name: the number of evaluations after which it was stopped

    def sample_round(self, number: int) -> list[Overrides]:
        """Returns the overrides of a round's trials, from the results of all trials added so far."""
        optuna, settings = self._optuna, self._settings
        study = self._study(self._sampler(number), optuna.pruners.NopPruner())
        space = {key: self._distribution(drawn) for key, drawn in self._space.items()}
        for trial in self._trials:
            params = {key: self._index(key, value) for key, value in trial.overrides.items()}
            study.add_trial(self._result(trial, params, space))
        count = min(settings.round_size, settings.trials - number * settings.round_size)
        asked = [study.ask(space) for _ in range(count)]
        return [{key: self._value(key, trial.params[key]) for key in self._space} for trial in asked]

    def add(self, members: Sequence[Member]) -> None:
        """Adds the trials of a round, in order."""
        self._trials += members

    def last_steps(self) -> dict[str, int]:
        """Returns the last step that counts of the trials that were stopped, by name."""
        return {name: self._steps[name][count - 1] for name, count in self.stopped.items()}

    def decide(self, is_over: Callable[[str], bool]) -> list[str]:
        """Reads new records; returns the names of the trials that are to be stopped from now on.

        Args:
          is_over: whether a trial has ended.
        """
        found = []
        over = {trial.name for trial in self._trials if is_over(trial.name)}  # before the records are read
        for trial in self._trials:
            self._read(trial)
        for k, trial in enumerate(self._trials):
            name = trial.name
            if self._settings.pruner == "none" or name in self.stopped:
                continue
            for e in range(self._decided.get(name, 0) + 1, min(len(self._values[name]) + 1, self._evaluations)):
                before = [other.name for other in self._trials[:k]]
                if any(len(self._values[o]) < e and o not in self.stopped and o not in over for o in before):
                    break
                if self._stops([*before, name], e):
                    self.stopped[name] = e
                    found.append(name)
                    break
                self._decided[name] = e
        return found

    def _read(self, trial: Member) -> None:
        """Reads the evaluations of a trial, if its metrics.jsonl has changed."""
        path = Path(trial.workdir) / METRICS_FILE
        self._values.setdefault(trial.name, [])
        try:
            changed = path.stat().st_mtime_ns
        except OSError:
            return
        if self._read_at.get(trial.name) == changed:
            return
        self._read_at[trial.name] = changed
        records = [r for r in read_metrics(trial.workdir)[1] if r["split"] == "validation" and r["step"] > 0]
        values = [r.get(self._metric) for r in records]
        if len(values) >= len(self._values[trial.name]):  # a resumed run repeats its last records
            self._values[trial.name] = [math.nan if value is None else float(value) for value in values]
            self._steps[trial.name] = [r["step"] for r in records]

    def _stops(self, names: Sequence[str], e: int) -> bool:
        """Whether Optuna's pruner stops the last trial at its evaluation `e`, after the others have run up to `e`."""
        optuna = self._optuna
        study = self._study(optuna.samplers.RandomSampler(seed=0), self._pruner())
        for name in names:
            trial, stops = study.ask(), False
            for i, value in enumerate(self._values[name][: min(e, self.stopped.get(name, e))], start=1):
                trial.report(value, i)
                stops = trial.should_prune()
            if name == names[-1]:
                return stops
            values = self._values[name][:e]
            if name in self.stopped and self.stopped[name] <= e:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            elif not values or math.isnan(values[-1]):
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, values[-1])
        raise AssertionError("there is a last trial")

    def _study(self, sampler: Any, pruner: Any) -> Any:
        return self._optuna.create_study(study_name="sweep", direction=self._direction, sampler=sampler, pruner=pruner)

    def _sampler(self, number: int) -> Any:
        """A sampler for a round, whose draws differ from those of the other rounds."""
        seed = self._settings.seed * 1_000_003 + number
        samplers = self._optuna.samplers
        return samplers.TPESampler(seed=seed) if self._settings.sampler == "tpe" else samplers.RandomSampler(seed=seed)

    def _pruner(self) -> Any:
        pruners, reduction = self._optuna.pruners, self._settings.reduction
        if self._settings.pruner == "asha":
            return pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=reduction)
        if self._settings.pruner == "hyperband":
            return pruners.HyperbandPruner(min_resource=1, max_resource=self._evaluations, reduction_factor=reduction)
        return pruners.MedianPruner(n_startup_trials=4)

    def _result(self, trial: Member, params: dict[str, Any], space: dict[str, Any]) -> Any:
        """The trial as Optuna stores it."""
        state = self._optuna.trial.TrialState
        values = self._values[trial.name][: self.stopped.get(trial.name)]
        intermediate = dict(enumerate(values, start=1))
        shared: dict[str, Any] = {"params": params, "distributions": space, "intermediate_values": intermediate}
        if trial.name in self.stopped:
            return self._optuna.trial.create_trial(state=state.PRUNED, **shared)
        if not values or math.isnan(values[-1]):
            return self._optuna.trial.create_trial(state=state.FAIL, **shared)
        return self._optuna.trial.create_trial(state=state.COMPLETE, value=values[-1], **shared)

    # Optuna's categories are numbers or text, and options may be anything: it is given their index.

    def _distribution(self, drawn: grid.Distribution) -> Any:
        distributions = self._optuna.distributions
        if isinstance(drawn, grid.Choice):
            return distributions.CategoricalDistribution(range(len(drawn.options)))
        if isinstance(drawn, grid.Integers):
            return distributions.IntDistribution(drawn.low, drawn.high)
        return distributions.FloatDistribution(drawn.low, drawn.high, log=isinstance(drawn, grid.LogUniform))

    def _value(self, key: str, param: Any) -> Any:
        drawn = self._space[key]
        if isinstance(drawn, grid.Choice):
            return drawn.options[param]
        return param if isinstance(drawn, grid.Integers) else grid.rounded(drawn, param)

    def _index(self, key: str, value: Any) -> Any:
        drawn = self._space[key]
        return drawn.options.index(value) if isinstance(drawn, grid.Choice) else value
