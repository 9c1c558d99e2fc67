"""Configs: composed from YAML files and `key=value` words, validated before anything heavy is imported, resolved.

schema          what vireo itself reads: names, types, meanings, defaults
chains          the stages of a chain as words
search          where the YAML files are
composition     words -> config; mistakes that Hydra cannot compose, told in one message
validation      all mistakes of a composed config (knobs, targets, sizes, defaults lists, interpolations)
signatures      what a `_target_` takes, read from its source
resolution      config -> plain settings, and their file
identity        hash, name and folder of a run; what may differ when it goes on
instantiation   settings -> objects
describe        help texts, a run's first lines
"""

from vireo.config.chains import stages
from vireo.config.composition import compose, explain_mistakes, problems, require_sweeper, swept
from vireo.config.describe import banner, describe_experiments, experiments, public
from vireo.config.identity import (
    cache_name,
    changes,
    config_hash,
    differences,
    files_hash,
    run_folder,
    run_name,
    source_hash,
    text_hash,
)
from vireo.config.instantiation import instantiate
from vireo.config.problems import Problem, report
from vireo.config.resolution import (
    change,
    from_text,
    load_resolved,
    outputs_folder,
    resolve,
    save_resolved,
    settings,
    settled,
    to_text,
)
from vireo.config.search import conf_dir, register
from vireo.config.validation import validate

__all__ = [
    "Problem", "banner", "cache_name", "change", "changes", "compose", "conf_dir", "config_hash",
    "describe_experiments", "differences", "experiments", "explain_mistakes", "files_hash", "from_text",
    "instantiate", "load_resolved", "outputs_folder", "problems", "public", "register", "report", "require_sweeper",
    "resolve", "run_folder", "run_name", "save_resolved", "settings", "settled", "source_hash", "stages", "swept",
    "text_hash", "to_text", "validate",
]  # fmt: skip
