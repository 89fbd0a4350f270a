"""Trains the run that a config file describes.

python -m gptjax.main --config=configs/gpt2.py:runlocal --workdir=runs/demo
python -m gptjax.main --config=configs/gpt2.py:size=355m --workdir=runs/gpt2 --config.optimizer.peak_lr=3e-4
python -m gptjax.main --workdir=runs/gpt2          resumes that run
"""

from absl import flags

from gptjax import cli
from gptjax.config import UserError
from gptjax.distributed import preemption
from gptjax.files import expand

CONFIG = cli.ConfigFlag()
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; a run in it is resumed, without --config too.")
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print config, parameters, FLOPs, memory and data, then stop. Prepares data in data.cache_dir."
)
PROFILE = flags.DEFINE_bool("profile", False, "Write a trace of a few steps to WORKDIR/profile.")
ALLOW_CHANGES = flags.DEFINE_bool("allow_config_changes", False, "Resume a run although its config differs.")
START_OVER = flags.DEFINE_bool(
    "start_over",
    False,
    "Start from scratch if no undamaged checkpoint is left; the old files move to WORKDIR/earlier.",
)


def main() -> None:
    if WORKDIR.value is None:
        raise UserError("needs --config=FILE and --workdir=DIR, such as --config=configs/gpt2.py:runlocal")
    workdir = expand(WORKDIR.value)
    config = CONFIG.load(workdir)
    if config is None:
        raise UserError(
            f"needs --config=FILE, such as --config=configs/gpt2.py:runlocal: {workdir} has no run to resume"
        )
    with preemption.watch():
        cli.join()
        from gptjax.parallel import program_cache  # after the checks: these take seconds to import
        from gptjax.run import dry_run, run

        program_cache.use(CONFIG.compiled_programs_dir())
        if DRY_RUN.value:
            print(dry_run(config, workdir, allow_config_changes=ALLOW_CHANGES.value))
            return
        run(
            config,
            workdir,
            profile=PROFILE.value,
            allow_config_changes=ALLOW_CHANGES.value,
            start_over=START_OVER.value,
        )


if __name__ == "__main__":
    cli.run(main, joins=True)
