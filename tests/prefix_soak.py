"""Conversations that must never see each other, thrown at a real engine: joins under eviction, cancels, preemption,
the disk and salts. Called by ``tests/test_prefix_soak.py``; ``make soak`` has it make thousands.

A conversation begins with a system prompt that several share, goes on with tokens of its own (its marker) and with what
was answered. What a prompt is answered alone, with nothing taken or kept, is asked of a second engine, which knows no
store; an answer that was cancelled must be a beginning of that.

llama.cpp computes a row a little differently beside others, with a store and without (shared cells: up to 0.015 between
the two likeliest of a model of random weights). There an answer may go another way at such a place, and only there.
"""

import math
import random
from dataclasses import dataclass, replace

from tests.engine_client import GREEDY, Answer, EngineClient

ANSWER = 6
LONG_ANSWER = 60
VOCABULARY = range(5, 1000)


@dataclass
class Conversation:
    salt: str
    session: str
    history: list[int]


@dataclass
class Asked:
    prompt: list[int]
    count: int
    conversation: Conversation
    cancelled: bool = False


def soak(client: EngineClient, alone: EngineClient, joins: int, seed: int, *, most_tokens: int, tie: float) -> None:
    """``most_tokens``: of a prompt; ``tie``: tokens whose log-probabilities differ by less may be confused.
    Fails with the seed and the sequence of the first wrong answer."""
    choose = random.Random(seed)
    known: dict[tuple[int, ...], Answer] = {}

    def tokens(count: int) -> list[int]:
        return choose.choices(VOCABULARY, k=count)

    systems = [tokens(count) for count in (100, 257, 520)]
    salts = ("", "", "a", "b")

    def begin() -> Conversation:
        marker = tokens(choose.choice((1, 8, 60)))
        return Conversation(choose.choice(salts), choose.choice(("", "s", "t")), choose.choice(systems) + marker)

    conversations = [begin() for _ in range(8)]
    running: dict[int, Asked] = {}

    def check(seq: int) -> None:
        asked, answer = running.pop(seq), client.answers.pop(seq)
        assert answer.failed is None, (seed, seq, answer.failed)
        key, told = tuple(asked.prompt), answer.tokens
        if key not in known or len(known[key].tokens) < asked.count:
            by_itself = alone.submit(asked.prompt, asked.count, replace(GREEDY, logprobs=20))
            alone.wait_freed(by_itself)
            known[key] = alone.answers.pop(by_itself)
        assert asked.cancelled or len(told) == asked.count
        for index, (token, wanted) in enumerate(zip(told, known[key].tokens, strict=False)):
            if token != wanted:
                likeliest = known[key].logprobs[index]
                best = likeliest.top[0]
                near = {other: best - logprob for other, logprob in zip(likeliest.top_ids, likeliest.top, strict=True)}
                assert near.get(token, math.inf) < tie, (seed, seq, len(asked.prompt), index, token, near)
                break
        if not asked.cancelled and asked.conversation.history == asked.prompt:
            asked.conversation.history = asked.prompt + told + tokens(choose.randrange(1, 40))

    for _ in range(joins):
        index = choose.randrange(len(conversations))
        conversation = conversations[index]
        if len(conversation.history) + 300 > most_tokens or choose.random() < 0.1:
            conversation = conversations[index] = begin()
        prompt = conversation.history
        if choose.random() < 0.2:  # another branch: from the middle, or the same again
            prompt = prompt[: choose.randrange(1, len(prompt) + 1)]
        count = choose.choice((1, ANSWER, ANSWER, LONG_ANSWER))
        seq = client.submit(prompt, count, salt=conversation.salt, session=conversation.session)
        running[seq] = Asked(prompt, count, conversation)
        if choose.random() < 0.2 or (count > ANSWER and choose.random() < 0.7):
            if choose.random() < 0.5:
                client.wait(lambda seq=seq: bool(client.answers[seq].tokens or client.answers[seq].freed))
            running[seq].cancelled = True
            client.cancel(seq)
        while len(running) > choose.randrange(1, 8):
            client.wait(lambda: any(client.answers[seq].freed for seq in running))
            for ended in [seq for seq in running if client.answers[seq].freed]:
                check(ended)
        client.steps.clear()
        client.messages.clear()
    client.wait_freed(*running)
    for seq in list(running):
        check(seq)
