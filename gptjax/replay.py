"""Recomputes a step whose numbers were not finite, from the debug bundle that the run saved.

python -m gptjax.replay --bundle=runs/gpt2/debug/step_00000123
python -m gptjax.replay --bundle=runs/gpt2/debug/step_00000123 --dtype=float32 --debug_nans
"""

from absl import flags

from gptjax import cli
from gptjax.config import UserError, replace
from gptjax.files import expand

BUNDLE = flags.DEFINE_string("bundle", None, "Debug bundle: a directory WORKDIR/debug/step_....")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "The dtype of activations; default: as trained.")
MESH = flags.DEFINE_string("mesh", "", "Devices by axis, such as fsdp=2,tensor=4; data takes what is left.")
DEBUG_NANS = flags.DEFINE_bool("debug_nans", False, "Stop at the first operation that makes a NaN, with its traceback.")


def main() -> None:
    if BUNDLE.value is None:
        raise UserError("needs --bundle=WORKDIR/debug/step_...")
    import jax  # after the checks: these take seconds to import

    from gptjax.checkpoint.manager import Checkpoints
    from gptjax.checkpoint.state import abstract_state
    from gptjax.parallel.mesh import check_fit, make_mesh
    from gptjax.stages import registry
    from gptjax.stages.saved_weights import load_given
    from gptjax.stages.start import whole_base
    from gptjax.stages.trained_model import parse_mesh
    from gptjax.training.debug_bundles import diagnose, load_bundle

    bundle = expand(BUNDLE.value)
    step, batch = load_bundle(bundle)
    workdir = bundle.absolute().parent.parent
    config, _ = registry.completed_config(workdir)
    dtype = config.model.dtype if DTYPE.value is None else DTYPE.value
    # The attention backend of the machine that trained may not exist on this machine.
    config = replace(config, {"model": {"dtype": dtype, "attention_backend": "auto"}})
    mesh = make_mesh(parse_mesh(MESH.value))
    check_fit(config, mesh)
    jax.config.update("jax_debug_nans", DEBUG_NANS.value)
    objective = registry.objective(config)
    parameters = objective.parameters
    with jax.set_mesh(mesh), Checkpoints(workdir, config.checkpoint, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(abstract_state(parameters, mesh), step)
        if parameters.has_base:
            state = state.replace(base=whole_base(parameters, load_given(parameters, mesh), mesh))
        report = diagnose(objective, state, batch)
    for i, numbers in enumerate(report["microbatches"]):
        print(f"microbatch {i}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}")
    print(f"\nmicrobatch {report['worst']}\n{'parameter':<44} {'norm':>12} {'gradient':>12} {'not finite':>10}")
    for name, row in report["norms"].items():
        norm, gradient = float(row["parameter"]), float(row["gradient"])
        print(f"{name:<44} {norm:>12.4g} {gradient:>12.4g} {row['not_finite']:>10}")


if __name__ == "__main__":
    cli.run(main)
