"""The settings of all stages: one table, from which all other lists of settings are made.

Each stage (run, train, sample, evaluate, plan, report, compare) has a frozen dataclass of options. Each field is a
setting. Its name is the keyword of the Python call (`harness.run(sampling_steps=...)`) and, with dashes, the flag of
the command line (`--sampling-steps`). The field's metadata (`Setting`) holds the rest: help, accepted values, key in a
study file, whether the setting is frozen when a run is created, and the field of a record that states it. This table
defines the options of the command line, the keys of study files, the commands of a study, the commands that reproduce a
record, and the names in footnotes.

One module holds the flags of one command (`run_flags`, `sample_flags`, ...); what several commands share is in
`training_flags`, `sampling_flags` and `run_files`.

Values are text as on the command line ("400k", "16,32,64") or Python values (400_000, [16, 32, 64]).
"""

from harness.settings.compare_flags import CompareOptions
from harness.settings.evaluate_flags import EvaluateOptions
from harness.settings.plan_flags import PlanOptions
from harness.settings.report_flags import ReportOptions
from harness.settings.run_flags import RunOptions
from harness.settings.sample_flags import SampleOptions
from harness.settings.sampling_flags import SamplingSettings
from harness.settings.setting import (
    Options,
    Setting,
    command_line,
    command_words,
    frozen_settings,
    keyword_options,
    only_one,
    recorded_settings,
    recorded_value,
    settings_of,
    study_settings,
)
from harness.settings.train_flags import TrainOptions
from harness.settings.training_flags import DEFAULT_PROTOCOL

__all__ = [
    "CompareOptions",
    "DEFAULT_PROTOCOL",
    "EvaluateOptions",
    "Options",
    "PlanOptions",
    "ReportOptions",
    "RunOptions",
    "SampleOptions",
    "SamplingSettings",
    "Setting",
    "TrainOptions",
    "command_line",
    "command_words",
    "frozen_settings",
    "keyword_options",
    "only_one",
    "recorded_settings",
    "recorded_value",
    "settings_of",
    "study_settings",
]
