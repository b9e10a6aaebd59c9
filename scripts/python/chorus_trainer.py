"""A Chorus trainer's local API from Python: batches of rollouts out, weights in. Copy this file; it needs NumPy and nothing else.

    trainer = Trainer("http://127.0.0.1:7700")
    step, weights = trainer.weights()
    for batch in trainer.batches():
        weights = learn(weights, batch)
        trainer.publish(batch.step, weights)

The node is started with `chorus trainer run --external`. A batch is given again until its weights were published, so a trainer that is
killed begins again with `weights()` and loses nothing but its optimizer's state, which is its own to keep. The bytes are described in
protocol/spec/rollout.md, "A trainer outside the node".
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

Weights = dict[str, np.ndarray]

MAGIC = b"CHRB"
VERSION = 1
# Seconds for anything that does not wait for rollouts, and tries while the node is busy or being started again.
TIMEOUT = 60.0
TRIES = 30


class Refused(Exception):
    """The node does not do what it was asked. The text says what to do instead."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Batch:
    """Rollouts for one update. Rewards are the node's own, computed again; what it found forged is left out.

    Rollout r answers the prompt `prompt(r)` with the tokens `answer(r)`, drawn with the log-probabilities `logprobs[answer_at(r)]`.
    """

    step: int  # of the weights that this batch updates
    numbers: np.ndarray  # u64 [groups]: the groups' numbers
    prompt_ends: np.ndarray  # u32 [groups]
    prompts: np.ndarray  # u32: the tokens of all prompts
    group: np.ndarray  # u32 [rollouts]: which of the groups
    lag: np.ndarray  # u32 [rollouts]: updates that its oldest weights are behind `step`
    reward: np.ndarray  # f32 [rollouts]
    advantage: np.ndarray  # f32 [rollouts]: (reward - mean of its group) / (deviation in its group + 1e-4)
    answer_ends: np.ndarray  # u32 [rollouts]
    answers: np.ndarray  # u32: the tokens of all answers
    logprobs: np.ndarray  # f32: of each of them, when it was drawn

    def __len__(self) -> int:
        return len(self.group)

    def prompt(self, rollout: int) -> np.ndarray:
        return self.prompts[_span(self.prompt_ends, int(self.group[rollout]))]

    def answer_at(self, rollout: int) -> slice:
        return _span(self.answer_ends, rollout)

    def answer(self, rollout: int) -> np.ndarray:
        return self.answers[self.answer_at(rollout)]


class Trainer:
    """The way to a node that was started with `chorus trainer run --external`."""

    def __init__(self, url: str = "http://127.0.0.1:7700", token: str = "") -> None:
        self.url, self.token = url.rstrip("/"), token

    def status(self) -> dict:
        """Where the run stands, and what it waits for."""
        return json.loads(self._ask("GET", "/v1/training")[1])

    def weights(self) -> tuple[int, Weights]:
        """The weights that the next batch updates, and their step."""
        headers, body = self._ask("GET", "/v1/training/weights")
        return int(headers["x-chorus-step"]), read_safetensors(body)

    def batch(self, wait: int = 20) -> Batch | None:
        """The next batch, the same until its weights are published; None when there is none within `wait` seconds (at most 60)."""
        _, body = self._ask("GET", f"/v1/training/batch?wait_s={wait}", timeout=wait + TIMEOUT)
        return read_batch(body) if body else None

    def batches(self) -> Iterator[Batch]:
        """Batches until the run ends by `trainer.until` or `trainer.steps`."""
        while True:
            batch = self.batch()
            if batch is not None:
                yield batch
            elif not self.status()["state"].startswith("training"):
                return

    def publish(self, step: int, weights: Mapping[str, np.ndarray], gradient: float = 0.0, importance: float = 0.0) -> int:
        """Ends the update of batch `step`. The two figures are for the curve. Returns the step of the weights: `step + 1`."""
        path = f"/v1/training/weights?step={step}&gradient={gradient}&importance={importance}"
        try:
            return json.loads(self._ask("POST", path, write_safetensors(weights))[1])["step"]
        except Refused as refused:
            # Where the answer was lost on its way, the second try finds the weights taken.
            if refused.code == "other_step" and self.weights()[0] == step + 1:
                return step + 1
            raise

    def _ask(self, method: str, path: str, body: bytes | None = None, timeout: float = TIMEOUT) -> tuple[Mapping[str, str], bytes]:
        headers = {"Content-Type": "application/octet-stream"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        request = urllib.request.Request(self.url + path, data=body, method=method, headers=headers)
        for attempt in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=timeout) as response:
                    return response.headers, response.read()
            except urllib.error.HTTPError as error:
                refused = _refused(error)
                if error.code not in (429, 503) or attempt + 1 == TRIES:
                    raise refused from None
            except OSError:
                # The node is being started again, or was ended in the middle of an answer.
                if attempt + 1 == TRIES:
                    raise
            time.sleep(1)
        raise AssertionError("the last try returns or raises")


def _refused(error: urllib.error.HTTPError) -> Refused:
    try:
        found = json.loads(error.read())["error"]
        return Refused(error.code, found["code"], found["message"])
    except (ValueError, KeyError, TypeError):
        return Refused(error.code, "unknown", f"{error.code} {error.reason}: is this a Chorus node of the same release?")


def _span(ends: np.ndarray, at: int) -> slice:
    return slice(int(ends[at - 1]) if at else 0, int(ends[at]))


def read_batch(body: bytes) -> Batch:
    """Maps the columns of a batch; nothing is copied."""
    if body[:4] != MAGIC or int.from_bytes(body[4:8], "little") != VERSION:
        raise ValueError("this is no batch of version 1; use the client of the node's release")
    step = int.from_bytes(body[8:16], "little")
    groups, rollouts, prompts, answers = (int(n) for n in np.frombuffer(body, "<u4", 4, 16))
    layout = [
        ("<u8", groups), ("<u4", groups), ("<u4", prompts), ("<u4", rollouts), ("<u4", rollouts), ("<f4", rollouts),
        ("<f4", rollouts), ("<u4", rollouts), ("<u4", answers), ("<f4", answers),
    ]
    at, columns = 32, []
    for kind, count in layout:
        columns.append(np.frombuffer(body, kind, count, at))
        at += columns[-1].nbytes
    if at != len(body):
        raise ValueError(f"the batch has {len(body)} bytes and its columns {at}")
    return Batch(step, *columns)


def read_safetensors(body: bytes) -> Weights:
    """Reads float32 weights."""
    begin = 8 + int.from_bytes(body[:8], "little")
    weights = {}
    for name, entry in json.loads(body[8:begin]).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "F32":
            raise ValueError(f"{name} is of the type {entry['dtype']}, and only F32 is expected here")
        start, end = entry["data_offsets"]
        weights[name] = np.frombuffer(body[begin + start : begin + end], "<f4").reshape(entry["shape"])
    return weights


def write_safetensors(weights: Mapping[str, np.ndarray]) -> bytes:
    """Writes weights as float32."""
    header, parts, at = {}, [], 0
    for name in sorted(weights):
        part = np.ascontiguousarray(weights[name], dtype="<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(weights[name].shape), "data_offsets": [at, at + len(part)]}
        parts.append(part)
        at += len(part)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])
