"""An agent that must remember: an LSTM reads, attention looks back over what it read, a policy acts. REINFORCE.

    python docs/examples/agent.py

The game: three boxes are opened one after the other, each with a ball of one of four colours. Then the agent is asked
in random order what was in which box, and gets 1 for a right answer. A blind guess gets 0.25 an answer.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from srm_core.nn import LSTM, Attention

COLOURS, BOXES, HIDDEN, HEADS = 4, 3, 32, 2
SEEN = 1 + BOXES + COLOURS  # "a question", which box, which colour


class Game:
    """Many games at once, a step at a time: `see()` gives (B, SEEN), `act(answers)` the rewards (B,)."""

    def __init__(self, batch: int) -> None:
        self.colours = torch.randint(COLOURS, (batch, BOXES))
        self.asked = torch.rand(batch, BOXES).argsort(1)
        self.rows, self.time = torch.arange(batch), 0

    @property
    def over(self) -> bool:
        return self.time == 2 * BOXES

    @property
    def is_question(self) -> bool:
        return self.time >= BOXES

    @property
    def _box(self) -> Tensor:
        return self.asked[:, self.time - BOXES] if self.is_question else torch.full_like(self.rows, self.time)

    def see(self) -> Tensor:
        seen = torch.zeros(len(self.rows), SEEN)
        seen[self.rows, 1 + self._box] = 1
        if self.is_question:
            seen[:, 0] = 1
        else:
            seen[self.rows, 1 + BOXES + self.colours[:, self.time]] = 1
        return seen

    def act(self, answers: Tensor) -> Tensor:
        right = (answers == self.colours[self.rows, self._box]) & self.is_question
        self.time += 1
        return right.float()


class Agent(nn.Module):
    """What was seen -> logits of the answers: whole games in parallel, or a step at a time with a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.read = LSTM(SEEN, HIDDEN, batch_first=True)
        self.recall = Attention(HIDDEN, HEADS, is_causal=True)
        self.policy = nn.Linear(2 * HIDDEN, COLOURS)

    def forward(self, seen: Tensor) -> Tensor:
        """(B, T, SEEN) -> (B, T, COLOURS)."""
        read, _ = self.read(seen)
        return self.policy(torch.cat([read, self.recall(read)], -1))

    def step(self, seen: Tensor, memory: tuple[object, object] | None) -> tuple[Tensor, tuple[object, object]]:
        """(B, SEEN) -> (B, COLOURS), and what to remember: the LSTM's state, attention's keys and values."""
        state, cache = memory or (None, None)
        read, state = self.read(seen[:, None], state)
        recalled, cache = self.recall.step(read, cache)
        return self.policy(torch.cat([read, recalled], -1))[:, 0], (state, cache)


@torch.no_grad()
def play(agent: Agent, batch: int, greedy: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """What was seen (B, T, SEEN), the answers (B, T) and the rewards (B, T) of `batch` games."""
    game, memory, steps = Game(batch), None, []
    while not game.over:
        seen = game.see()
        logits, memory = agent.step(seen, memory)
        answers = logits.argmax(-1) if greedy else torch.multinomial(logits.softmax(-1), 1)[:, 0]
        steps.append((seen, answers, game.act(answers)))
    seen, answers, rewards = (torch.stack(part, 1) for part in zip(*steps, strict=True))
    return seen, answers, rewards


def learn(agent: Agent, optim: torch.optim.Optimizer, seen: Tensor, answers: Tensor, rewards: Tensor) -> None:
    """REINFORCE: make what was rewarded more than on average likelier, and keep trying other things."""
    seen_again = agent(seen)[:, BOXES:].log_softmax(-1)  # the questions only
    chosen = seen_again.gather(-1, answers[:, BOXES:, None])[..., 0]
    asked = rewards[:, BOXES:]
    entropy = -(seen_again.exp() * seen_again).sum(-1)
    loss = -(chosen * (asked - asked.mean()) + 0.01 * entropy).mean()
    optim.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
    optim.step()


def score(agent: Agent) -> float:
    """The mean reward of an answer, in 512 games."""
    return play(agent, 512, greedy=True)[2][:, BOXES:].mean().item()


def run(updates: int = 400) -> tuple[float, float]:
    """The reward before and after."""
    torch.manual_seed(0)
    agent = Agent()
    optim = torch.optim.AdamW(agent.parameters(), lr=5e-3)
    before = score(agent)
    print(f"before: reward {before:.3f} an answer")
    for update in range(1, updates + 1):
        seen, answers, rewards = play(agent, 256)
        learn(agent, optim, seen, answers, rewards)
        if update % 50 == 0:
            print(f"update {update:4}: {rewards[:, BOXES:].mean().item():.3f}")
    after = score(agent)
    print(f"after: reward {after:.3f} an answer")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=400)
    run(parser.parse_args().updates)
