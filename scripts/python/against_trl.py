"""GRPO by TRL's trainer: the same tiny policy, tasks, rollouts a step and held-out tasks as the node's co-located learner, in one process.

Prints lines of the same form as the example `learn` of crates/trainer. scripts/python/against_trl runs both, one after the other.
"""

import argparse
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

END = 256
# Tasks in a step, answers to each, tokens of an answer, and steps between two looks at the held-out tasks: as in `learn`.
GROUPS, MEMBERS, TOKENS, LOOK = 16, 8, 4, 50
RATE, RISE, FALL = 6e-4, 10, 4_000


def answer(tokens: list[int]) -> str:
    """The text of an answer's tokens up to the first that is no byte, as the node's own tokenizer has it."""
    end = next((at for at, token in enumerate(tokens) if token >= END), len(tokens))
    return bytes(tokens[:end]).decode(errors="replace")


def reward(tokens: list[int], solution: str) -> float:
    return float(answer(tokens).strip() == solution)


def judge(completion_ids: list[list[int]], solution: list[str], **_: object) -> list[float]:
    return [reward(tokens, right) for tokens, right in zip(completion_ids, solution, strict=True)]


class Look(TrainerCallback):
    """Answers the held-out tasks now and then, and ends the run at its reward or its time."""

    def __init__(self, tokenizer: AutoTokenizer, tasks: list[dict], seconds: float, until: float) -> None:
        self.tokenizer, self.tasks, self.seconds, self.until = tokenizer, tasks, seconds, until
        self.began, self.looking = 0.0, 0.0

    def on_train_begin(self, args, state, control, model=None, **_: object) -> None:
        self.began = time.monotonic()
        self.look(state, control, model)

    def on_step_end(self, args, state, control, model=None, **_: object) -> None:
        if state.global_step % LOOK == 0:
            self.look(state, control, model)

    def look(self, state, control, model) -> None:
        begun = time.monotonic()
        right = held_out(model, self.tokenizer, self.tasks)
        now = time.monotonic()
        self.looking += now - begun
        rollouts = [entry["reward"] for entry in state.log_history[-LOOK:] if "reward" in entry]
        mean = sum(rollouts) / max(len(rollouts), 1)
        elapsed = now - self.began
        print(f"step {state.global_step:5}  {elapsed:6.1f} s (looking {self.looking:.1f})  rollouts {mean:.3f}  held out {right:.3f}", flush=True)
        control.should_training_stop = elapsed > self.seconds or right >= self.until


@torch.no_grad()
def held_out(model, tokenizer: AutoTokenizer, tasks: list[dict]) -> float:
    inputs = tokenizer([task["prompt"] for task in tasks], return_tensors="pt", padding=True, padding_side="left")
    drawn = model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=TOKENS, pad_token_id=END,
    )  # fmt: skip
    answers = drawn[:, inputs.input_ids.shape[1] :].tolist()
    return sum(reward(tokens, task["solution"]) for tokens, task in zip(answers, tasks, strict=True)) / len(tasks)


def read(path: Path) -> dict[str, list[dict]]:
    tasks: dict[str, list[dict]] = {"train": [], "held-out": []}
    for line in path.read_text().splitlines():
        kind, prompt, solution = line.split("\t")
        tasks[kind].append({"prompt": prompt, "solution": solution})
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", required=True, help="directory of the policy to begin with")
    parser.add_argument("--tasks", type=Path, required=True, help="what the example `tasks` printed")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--until", type=float, default=0.95)
    options = parser.parse_args()
    tasks = read(options.tasks)
    tokenizer = AutoTokenizer.from_pretrained(options.policy, pad_token="<|end|>")
    model = AutoModelForCausalLM.from_pretrained(options.policy, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / RISE, 1.0) * 0.1 ** min((step + 1) / FALL, 1.0)
    )
    config = GRPOConfig(
        output_dir="unused", use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", save_strategy="no",
        disable_tqdm=True, logging_steps=1, logging_strategy="steps", seed=1, max_steps=len(tasks["train"]) // GROUPS,
        per_device_train_batch_size=GROUPS * MEMBERS, num_generations=MEMBERS, max_completion_length=TOKENS,
        beta=0.0, epsilon=0.2, epsilon_high=0.28, loss_type="bnpo", max_grad_norm=1.0, temperature=1.0,
    )  # fmt: skip
    look = Look(tokenizer, tasks["held-out"], options.seconds, options.until)
    trainer = GRPOTrainer(
        model=model, reward_funcs=judge, args=config, train_dataset=Dataset.from_list(tasks["train"]),
        processing_class=tokenizer, optimizers=(optimizer, schedule), callbacks=[look],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()


if __name__ == "__main__":
    main()
