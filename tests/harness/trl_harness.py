"""A real GRPOTrainer on eight problems, ready to run on a CPU."""

import trl
from datasets import Dataset

from endoreward_fast.integrations.grpo import EndoGRPOMixin
from endoreward_fast.model.checkpoint import pocket_path
from endoreward_fast.pocket.quiz import problems

SETTINGS = {
    "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 10, "max_steps": 2, "beta": 0.01,
    "learning_rate": 1e-3, "temperature": 1.5, "logging_steps": 1, "seed": 3, "use_cpu": True, "bf16": False,
    "report_to": [], "save_strategy": "no", "disable_tqdm": True, "activation_checkpointing": False,
}  # fmt: skip


class Trainer(EndoGRPOMixin, trl.GRPOTrainer):
    pass


class Keeping(Trainer):
    """Keeps the last batch that was trained on."""

    def _generate_and_score_completions(self, inputs):
        self.batch = super()._generate_and_score_completions(inputs)
        return self.batch


def dataset(form):
    """Eight problems of the embedded model's."""
    return Dataset.from_list([{"prompt": p.prompt(form), "answer": p.answer} for p in problems(8, 0, "train")])


def grpo(trainer, folder, rewards, form="chat", options=None, **settings):
    """trainer: GRPOTrainer or a subclass, of which `options` are; settings: GRPOConfig's."""
    args = trl.GRPOConfig(output_dir=str(folder), **SETTINGS | settings)
    rewards = rewards if isinstance(rewards, list) else [rewards]
    return trainer(str(pocket_path()), reward_funcs=rewards, args=args, train_dataset=dataset(form), **options or {})


def batch_of(trainer):
    """The first batch of prompts, as the trainer's own loop would get it."""
    trainer.model.train()
    return next(iter(trainer.get_train_dataloader()))
