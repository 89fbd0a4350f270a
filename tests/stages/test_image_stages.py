"""Images in the chat stages: whole and resumed runs, the parts that LLaVA's two steps train, and user errors."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax import config as c
from gptjax.config import UserError
from gptjax.models import peft
from gptjax.parallel.mesh import make_mesh
from gptjax.run import run
from gptjax.stages.builders import build
from gptjax.stages.registry import completed_config
from gptjax.stages.saved_weights import load_parts, load_weights
from gptjax.training.metrics_file import read_metrics
from tests.tiny_images import image_config
from tests.tiny_tasks import config_module


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A run from a random initialisation."""
    directory = tmp_path_factory.mktemp("images")
    config = image_config(directory)
    run(config, directory / "scratch")
    return config, directory / "scratch"


def parts_of(workdir: Path):
    mesh = make_mesh(c.MeshConfig())
    with jax.set_mesh(mesh):
        return load_parts(workdir, mesh)


def leaves_of(workdir: Path) -> dict[str, np.ndarray]:
    mesh = make_mesh(c.MeshConfig())
    with jax.set_mesh(mesh):
        return {path: np.asarray(leaf) for path, leaf in peft.flatten(load_weights(workdir, mesh).gpt).items()}


@pytest.mark.slow
def test_a_run_reads_the_images(scratch):
    config, workdir = scratch
    first, final = (record["loss"] for record in read_metrics(workdir)[1] if record["split"] == "validation")
    assert final < first
    complete, tokenizer = completed_config(workdir)
    assert complete.model.vision.image_token == tokenizer.vocab_size + 2 == complete.model.vocab_size - 1
    stage = build(config, make_mesh(c.MeshConfig()), None)
    batch = {name: np.asarray(array) for name, array in next(stage.batches(0, None)).arrays.items()}
    parameters = stage.objective.parameters
    params = parameters.join(*(getattr(parts_of(workdir), part) for part in ("base", "trained")))
    tokens_of_images = (batch["tokens"] == complete.model.vision.image_token).sum()
    used = (batch["images"].sum(axis=-1) > 0).sum()
    assert tokens_of_images == used * complete.model.vision.tokens_per_image > 0
    loss = jax.jit(lambda batch: stage.objective.loss(params, batch, None)[0])
    assert loss(batch) != loss(batch | {"images": 255 - batch["images"]})


@pytest.mark.slow
def test_a_run_in_two_parts_is_the_same_run(scratch, tmp_path):
    config, whole = scratch
    first = dataclasses.replace(config, batch=dataclasses.replace(config.batch, epochs=None, total_tokens=1))
    run(first, tmp_path)
    run(config, tmp_path, allow_config_changes=True)
    for once, twice in zip(*(jax.tree.leaves(parts_of(d).trained) for d in (whole, tmp_path)), strict=True):
        np.testing.assert_array_equal(once, twice)


@pytest.mark.slow
def test_align_then_instruct_train_their_parts(pretrained, tmp_path):
    """From a text model: the encoder is new, and so trained by align; instruct trains everything else."""
    gpt4 = config_module("gpt4")
    align = image_config(tmp_path, pretrained)
    align = dataclasses.replace(align, peft=c.PeftConfig(method="parts", trained=(gpt4.PROJECTOR,)))
    run(align, tmp_path / "align")
    instruct = image_config(tmp_path, tmp_path / "align")
    trained = (gpt4.PROJECTOR, gpt4.TEXT_MODEL)
    instruct = dataclasses.replace(instruct, peft=c.PeftConfig(method="parts", trained=trained))
    run(instruct, tmp_path / "instruct")
    given, aligned, instructed = (leaves_of(d) for d in (pretrained, tmp_path / "align", tmp_path / "instruct"))
    for path, leaf in given.items():
        np.testing.assert_array_equal(aligned[path][: len(leaf)], leaf)
    assert aligned.keys() - given.keys() == {path for path in aligned if path.startswith("vision/")}
    changed = {path for path in aligned if not np.array_equal(aligned[path], instructed[path])}
    encoder = {path for path in aligned if path.startswith("vision/") and "projector" not in path}
    assert not changed & encoder
    assert {"vision/projector_1/kernel", "layers/block_0/mlp/up/kernel", "token_embedding/embedding"} <= changed


@pytest.mark.slow
def test_lora_adapts_the_text_model_and_trains_the_projector(scratch, tmp_path):
    config, start = scratch
    lora = c.PeftConfig(method="lora", rank=2, trained=("vision/projector_.*",))
    adapted = dataclasses.replace(config, init_from=str(start), peft=lora)
    mesh = make_mesh(c.MeshConfig())
    stage = build(adapted, mesh, None)
    paths = peft.flatten(stage.objective.parameters.boxed_state.params).keys()
    assert {path for path in paths if "lora" not in path} == {
        f"vision/projector_{i}/{leaf}" for i in (1, 2) for leaf in ("kernel", "bias")
    }
    wrong = build(dataclasses.replace(adapted, peft=dataclasses.replace(lora, trained=("projector",))), mesh, None)
    with pytest.raises(UserError, match="matches no parameter"):
        _ = wrong.objective.parameters.boxed_state


def spoil(config: c.Config, change) -> None:
    """Changes the first record of the training data."""
    path = Path(config.data.source.removeprefix("jsonl:"))
    first, *rest = path.read_text().splitlines()
    record = json.loads(first)
    change(record["messages"])
    path.write_text("\n".join([json.dumps(record), *rest]) + "\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[0].update(content="<image>"), r"chats.jsonl:1: .* has 1 <image> for 0 images"),
        (
            lambda m: m[0]["content"][0]["image_url"].update(url="gone.png"),
            r"chats.jsonl:1: messages\[0\]: there is no image .*gone.png",
        ),
        (
            lambda m: m[0]["content"][0]["image_url"].update(url="http://example.com/a.png"),
            r"chats.jsonl:1: messages\[0\]: the image http://example.com/a.png is remote",
        ),
        (
            lambda m: m[1].update(content=[{"type": "image_url", "image_url": {"url": "0.png"}}]),
            "chats.jsonl:1 has an image in a message of role assistant",
        ),
    ],
)
def test_user_errors_name_the_file_and_line(change, message, tmp_path):
    config = image_config(tmp_path)
    spoil(config, change)
    with pytest.raises(UserError, match=message):
        build(config, make_mesh(c.MeshConfig()), None)


def test_a_text_model_is_given_no_image(tmp_path):
    config = image_config(tmp_path)
    text = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=c.VisionConfig()))
    with pytest.raises(UserError, match=r"chats.jsonl:1: there is an image, but this model reads text alone"):
        build(text, make_mesh(c.MeshConfig()), None)
    with pytest.raises(UserError, match="stage pretrain reads text alone"):
        run(dataclasses.replace(config, stage="pretrain", chat=c.ChatConfig()), tmp_path / "pretrain")
