"""configs/chatgpt.py: the published recipe, and every argument gives a whole config."""

import pytest

from gptjax import config as c
from gptjax.config import UserError
from gptjax.stages import registry
from gptjax.stages.builders import BUILDERS
from tests.tiny_tasks import MODEL, config_module


@pytest.fixture(scope="module")
def module():
    return config_module("chatgpt")


def test_every_stage_resolves(module, pretrained):
    for stage in (name for name, stage in registry.DEFINITIONS.items() if stage.conversational):
        for end in ("", ",runlocal"):
            end += ",reward=bleu" if stage in ("ppo", "grpo") else ""
            config = c.resolve(module.get_config(f"stage={stage},init_from={pretrained}{end}"))
            registry.check(config)
            registry.check_sections(config)
            assert config.stage == stage
            assert (config.model.context_length, config.model.embed_dim) == (MODEL.context_length, MODEL.embed_dim)
            assert config.data.source == "chatterbot"
            assert (config.chat.random_answers > 0) == (stage in ("reward", "dpo"))
            own = c.resolve(module.get_config(f"stage={stage},data=jsonl:x,init_from={pretrained}{end}"))
            assert (own.data.source, own.chat.random_answers) == ("jsonl:x", 0)
        assert stage in BUILDERS
    with pytest.raises(UserError, match="unknown stage 'rlhf'"):
        module.get_config("stage=rlhf")


def test_dpo_has_no_dropout_and_keeps_the_checkpoint_of_the_lowest_loss(module, pretrained):
    """The margin grows while the policy overfits."""
    for end in ("", ",runlocal"):
        dpo = c.resolve(module.get_config(f"stage=dpo,init_from={pretrained}{end}"))
        assert dpo.evaluation.metric == "loss"
        model = dpo.model
        assert (model.embedding_dropout, model.attention_dropout, model.residual_dropout) == (0, 0, 0)


def test_instructgpts_numbers(module):
    """Ouyang et al. 2022, appendix C."""
    sft, reward = (c.resolve(module.get_config(f"stage={stage}")) for stage in ("sft", "reward"))
    assert (sft.batch.epochs, sft.batch.tokens_per_batch // sft.model.context_length) == (16.0, 32)
    assert (sft.optimizer.peak_lr, sft.model.residual_dropout) == (9.65e-6, 0.2)
    assert (reward.batch.epochs, reward.batch.tokens_per_batch // reward.model.context_length) == (1.0, 64)
    assert (reward.optimizer.peak_lr, reward.model.residual_dropout) == (9e-6, 0.0)
    for config in (sft, reward):
        assert (config.optimizer.beta1, config.optimizer.beta2) == (0.9, 0.95)
        assert (config.optimizer.schedule, config.optimizer.floor_lr_fraction) == ("cosine", 0.1)
        assert config.optimizer.warmup_tokens == 0


def test_instructgpts_numbers_of_ppo(module, pretrained):
    """Ouyang et al. 2022, appendix C.4; text makes it PPO-ptx."""
    argument = f"stage=ppo,init_from={pretrained},reward=model:runs/reward"
    ppo = c.resolve(module.get_config(argument))
    assert (ppo.rl.prompts_per_iteration, ppo.sequences_per_batch, ppo.rl.inner_epochs) == (512, 64, 1)
    assert (ppo.rl.kl_weight, ppo.rl.clip, ppo.ppo.discount, ppo.ppo.value_lr) == (0.02, 0.2, 1.0, 9e-6)
    assert (ppo.optimizer.ema_decay, ppo.optimizer.warmup_start_fraction) == (0.992, 0.1)
    assert (ppo.ppo.value_init, ppo.ppo.pretraining_weight) == ("reward", 0.0)
    ptx = c.resolve(module.get_config(f"{argument},text=sotu"))
    assert (ptx.chat.pretraining_source, ptx.ppo.pretraining_weight, ptx.ppo.pretraining_rows) == ("sotu", 27.8, 8)


def test_a_stage_writes_conversations_as_the_run_it_starts_from(module, pretrained, tmp_path):
    sft = c.resolve(module.get_config(f"stage=sft,template=harmony,init_from={pretrained}"))
    (tmp_path / "config.json").write_text(c.to_json(c.replace(sft, {"chat": {"current_date": "today"}})))
    argument = f"stage=grpo,init_from={tmp_path},reward=bleu,runlocal"
    grpo = c.resolve(module.get_config(argument))
    assert (grpo.chat.template, grpo.chat.current_date) == ("harmony", "today")
    assert grpo.rl.prompt_tokens == 3 * MODEL.context_length // 4  # the system message is in every prompt
    assert c.resolve(module.get_config(f"{argument},template=plain")).chat.template == "plain"
    with pytest.raises(UserError, match=r"chat\.template"):
        c.resolve(module.get_config(f"{argument},template=harmny"))
