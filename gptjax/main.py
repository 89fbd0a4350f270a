"""Trains the run that a config file describes.

python -m gptjax.main --config=configs/gpt2.py:runlocal --workdir=runs/demo
python -m gptjax.main --config=configs/gpt2.py:size=355m --workdir=runs/gpt2 --config.optimizer.peak_lr=3e-4
"""

from absl import flags
from ml_collections import config_flags

from gptjax import cli
from gptjax.config import UserError, resolve
from gptjax.distributed import preemption
from gptjax.files import expand
from gptjax.parallel import program_cache

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, its arguments after a colon.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; a run found there is resumed.")
PROFILE = flags.DEFINE_bool("profile", False, "Write a trace of a few steps to WORKDIR/profile.")
ALLOW_CHANGES = flags.DEFINE_bool("allow_config_changes", False, "Resume a run although its config differs.")
START_OVER = flags.DEFINE_bool(
    "start_over",
    False,
    "Begin anew where steps are recorded but no whole checkpoint is left; WORKDIR/earlier keeps all.",
)


def main() -> None:
    if CONFIG.value is None or WORKDIR.value is None:
        raise UserError("needs --config=FILE and --workdir=DIR, such as --config=configs/gpt2.py:runlocal")
    config = resolve(CONFIG.value)
    with preemption.watch():
        cli.join()
        program_cache.use(expand(config.data.cache_dir))
        from gptjax.run import run  # after the checks: it takes seconds to import

        run(
            config,
            expand(WORKDIR.value),
            profile=PROFILE.value,
            allow_config_changes=ALLOW_CHANGES.value,
            start_over=START_OVER.value,
        )


if __name__ == "__main__":
    cli.run(main, joins=True)
