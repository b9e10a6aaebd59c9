"""Trains the tiny llama that lies in the tree with PyTorch, on rollouts that the swarm samples. scripts/python/run starts everything.

The model is written out in plain modules, and GRPO is the node's own: group advantages, truncated importance weights for stale rollouts
and for the sampler's numerics, one pass over a batch (crates/trainer/src/train/grpo.rs has the formulas). Before it learns from a
batch it holds its own log-probabilities against the sampler's: fresh rollouts must agree.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chorus_trainer import Batch, Trainer

END = 256
# Cap of the importance weight, AdamW's rate and the steps of its rise and fall, and the longest gradient: the node's own defaults.
CAP, RATE, RISE, FALL, CLIP = 2.0, 6e-4, 10, 4_000, 1.0
# How far fresh rollouts' mean probability ratio may be from 1.
TOLERANCE = 1e-3


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = linear(width, width), linear(width, width)
        self.v_proj, self.o_proj = linear(width, width), linear(width, width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        rows, places, width = x.shape
        q, k, v = (
            part(x).view(rows, places, self.heads, -1).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, rotary), rotate(k, rotary)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        later = torch.ones(places, places, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -1e9).softmax(-1) @ v
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, places, width))


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotary
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


class Gated(nn.Module):
    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(width, wide), linear(width, wide), linear(wide, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm, self.post_attention_layernorm = Norm(width, eps), Norm(width, eps)
        self.self_attn = Attention(width, config["num_attention_heads"])
        self.mlp = Gated(width, config["intermediate_size"])

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A llama with tied embeddings, its weights named as Hugging Face does."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.model.norm = Norm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, tokens: Tensor) -> Tensor:
        size = self.config["hidden_size"] // self.config["num_attention_heads"]
        speeds = self.config["rope_theta"] ** (-torch.arange(0, size, 2) / size)
        angles = torch.arange(tokens.shape[1])[:, None] * speeds
        x, rotary = self.model.embed_tokens(tokens), (angles.cos(), angles.sin())
        for layer in self.model.layers:
            x = layer(x, rotary)
        return self.model.norm(x) @ self.model.embed_tokens.weight.T

    def load(self, weights: dict[str, np.ndarray]) -> None:
        self.load_state_dict({name: torch.tensor(weight) for name, weight in weights.items()})

    def weights(self) -> dict[str, np.ndarray]:
        return {name: weight.detach().numpy() for name, weight in self.state_dict().items()}


def logprobs(model: Llama, batch: Batch, rows: list[int]) -> Tensor:
    """The logarithm of the probability of each token of these rollouts' answers, in one line."""
    texts = [np.concatenate([batch.prompt(r), batch.answer(r)]).astype(np.int64) for r in rows]
    tokens = torch.full((len(rows), max(map(len, texts))), END)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.from_numpy(text)
    every = F.log_softmax(model(tokens[:, :-1]), -1).gather(2, tokens[:, 1:, None])[..., 0]
    return torch.cat([every[row, len(batch.prompt(r)) - 1 : len(texts[row]) - 1] for row, r in enumerate(rows)])


def spread(values: np.ndarray, batch: Batch, rows: list[int]) -> Tensor:
    """One value a rollout, as one a token."""
    return torch.from_numpy(np.concatenate([np.full(len(batch.answer(r)), values[r], np.float32) for r in rows]))


def share_of_rate(step: int) -> float:
    """The share of the learning rate that a step, the first of which is 0, has."""
    return min((step + 1) / RISE, 1.0) * 0.1 ** min((step + 1) / FALL, 1.0)


class Grpo:
    """One step of the objective at a time."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share_of_rate)
        self.fresh: list[float] = []

    def step(self, batch: Batch) -> tuple[float, float]:
        """Learns from a batch. Returns the gradient's length and the mean importance weight."""
        rows = [r for r in range(len(batch)) if abs(batch.advantage[r]) > 1e-7]
        if not rows:
            return 0.0, 0.0
        now = logprobs(self.model, batch, rows)
        drawn = torch.from_numpy(np.concatenate([batch.logprobs[batch.answer_at(r)] for r in rows]))
        ratio = (now.detach() - drawn).exp()
        fresh = spread(batch.lag, batch, rows) == 0
        if fresh.any():
            self.fresh.append(float((ratio[fresh] - 1).abs().mean()))
        # At the first and only pass the policy's own ratio is 1, so the clip does not act and the gradient is that of the logarithm.
        gain = ratio.clamp(max=CAP) * spread(batch.advantage, batch, rows) * (now - now.detach()).exp()
        self.optimizer.zero_grad()
        (-gain.mean()).backward()
        gradient = float(nn.utils.clip_grad_norm_(self.model.parameters(), CLIP))
        if not math.isfinite(gradient):
            # Publishing the weights as they are passes the batch by.
            return 0.0, float(ratio.mean())
        self.optimizer.step()
        self.schedule.step()
        return gradient, float(ratio.mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:7700", help="the trainer's API")
    parser.add_argument("--token", default="", help="its api.token, if it has one")
    parser.add_argument("--policy", type=Path, required=True, help="directory with the policy's config.json")
    options = parser.parse_args()
    torch.manual_seed(1)
    trainer = Trainer(options.url, options.token)
    model = Llama(json.loads((options.policy / "config.json").read_text()))
    held, weights = trainer.weights()
    model.load(weights)
    grpo, began, busy = Grpo(model), time.monotonic(), 0.0
    for batch in trainer.batches():
        if batch.step != held:
            # The node was started again and goes on from its checkpoint.
            held, weights = trainer.weights()
            model.load(weights)
        begun = time.monotonic()
        gradient, importance = grpo.step(batch)
        busy += time.monotonic() - begun
        held = trainer.publish(batch.step, model.weights(), gradient, importance)
        if batch.step % 50 == 0 and len(batch):
            print(
                f"step {batch.step:5}  {time.monotonic() - began:6.1f} s  rollouts {batch.reward.mean():.3f}  lag {batch.lag.mean():.2f}  "
                f"importance {importance:.4f}  gradient {gradient:.3f}  learning {busy:.1f} s",
                flush=True,
            )
    if not grpo.fresh:
        print("no fresh rollout came, so the two sides' numbers were not compared")
        return 1
    worst = max(grpo.fresh)
    print(f"mean distance of fresh rollouts' probability ratio from 1: {np.mean(grpo.fresh):.2e}, in the worst batch {worst:.2e}")
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
