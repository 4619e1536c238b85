"""Blocks in memory (``lmx.engine.prefix.ram``): what is found, what is copied, and what gives way, in which order.

The blocks here carry the tokens that they stand for, so that whatever is taken can be held against what was asked.
"""

from array import array
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmx.engine.prefix.chain import BLOCK_TOKENS, Chain, common, next_key, root_key
from lmx.engine.prefix.nodes import Node
from lmx.engine.prefix.ram import Found, RamTier

KV_BYTES, WINDOW_BYTES, CHECKPOINT_BYTES = 2, 6, 700


@dataclass(eq=False)
class Tokens:
    """A block of KV, or a checkpoint (which stands for all tokens before it)."""

    tokens: list[int]
    fixed_bytes: int = 0
    window_bytes: int = 0

    @property
    def nbytes(self) -> int:
        return self.fixed_bytes + self.window_bytes

    def drop_window(self) -> None:
        self.window_bytes = 0

    def to_bytes(self) -> bytes:
        return array("I", self.tokens).tobytes()


@dataclass
class Store:
    """A memory tier, used as the store uses it."""

    window: int = 0
    checkpoints: bool = False
    ram: RamTier = field(init=False)
    random: Random = field(default_factory=lambda: Random(7))

    def __post_init__(self) -> None:
        self.ram = RamTier(window=self.window, checkpoints=self.checkpoints)

    def text(self, tokens: int) -> list[int]:
        return [self.random.randrange(1, 2**31) for _ in range(tokens)]

    def chain(self, tokens: list[int], salt: str = "", session: str = "") -> Chain:
        return Chain(root_key("model", salt), list(tokens), session)

    def put(self, chain: Chain, end: int | None = None, *, tail: bool = True) -> list[Node]:
        end = len(chain.tokens) if end is None else end
        if not tail:
            end = end // BLOCK_TOKENS * BLOCK_TOKENS
        spans = self.ram.missing(chain, end, tail=tail)
        window_bytes = WINDOW_BYTES if self.window else 0
        blocks = [Tokens(chain.tokens[a:b], KV_BYTES * (b - a), window_bytes * (b - a)) for a, b in spans]
        checkpoint = Tokens(chain.tokens[:end], CHECKPOINT_BYTES) if self.checkpoints and tail else None
        return self.ram.put(chain, end, spans, blocks, checkpoint)

    def keep(self, tokens: list[int], salt: str = "", session: str = "") -> Chain:
        """All of a sequence, at its end."""
        chain = self.chain(tokens, salt, session)
        self.put(chain)
        return chain

    def turn(self, prompt: list[int], answer: list[int], session: str = "") -> int:
        """A whole request: what it found, is computed, published as its chunks end and at its end."""
        chain = self.chain(prompt, session=session)
        found = self.ram.match(chain, len(prompt) - 1)
        if found.tokens:
            self.take(chain, found)
        if self.checkpoints:
            self.put(chain, len(prompt) - 4)
        self.put(chain, len(prompt), tail=False)
        for token in answer:
            chain.tokens.append(token)
            if len(chain.tokens) % BLOCK_TOKENS == 0:
                self.put(chain, tail=False)
        self.put(chain)
        return found.tokens

    def take(self, chain: Chain, found: Found) -> None:
        """Every token of it is the prompt's own, and every record is there that it needs."""
        blocks, checkpoint = self.ram.take(found, chain)
        tokens: list[int] = []
        for block in blocks:
            assert isinstance(block, Tokens)
            if self.window and len(tokens) + len(block.tokens) > found.tokens - self.window:
                assert block.window_bytes
            tokens += block.tokens
        assert tokens[: found.tokens] == chain.tokens[: found.tokens]
        assert len(tokens) - found.tokens < BLOCK_TOKENS
        if self.checkpoints:
            assert isinstance(checkpoint, Tokens)
            assert checkpoint.tokens == tokens == chain.tokens[: found.tokens]
        else:
            assert checkpoint is None

    def found(self, tokens: list[int], salt: str = "") -> int:
        return self.match(tokens, salt).tokens

    def match(self, tokens: list[int], salt: str = "") -> Found:
        chain = self.chain(tokens, salt)
        return self.ram.match(chain, len(tokens))


# --- finding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 511, 512, 513])
def test_every_length_is_found_whole_and_to_the_first_other_token(tokens: int) -> None:
    store = Store()
    text = store.text(tokens)
    store.keep(text)
    for asked in (text, [*text, 1]):
        found = store.match(asked)
        assert (found.tokens, found.why, found.broke_at) == (tokens, "", -1)
    for place in {0, tokens // 2, tokens - 1}:
        other = [*text[:place], text[place] + 1, *text[place + 1 :], 5, 6]
        found = store.match(other)
        assert (found.tokens, found.why, found.broke_at) == (place, "tokens", place)
        assert store.ram.match(store.chain(text), place).tokens == place


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 511, 512, 513])
def test_checkpoints_serve_where_they_were_made_and_nowhere_else(tokens: int) -> None:
    store = Store(checkpoints=True)
    text = store.text(600)
    chain = store.chain(text)
    store.put(chain, tokens)
    store.put(chain, 600)
    assert store.found(text) == 600
    before = store.match(text[:599])
    assert (before.tokens, before.why, before.broke_at) == (tokens, "checkpoint", -1)
    assert store.found(text[:tokens]) == tokens
    assert store.found(text[: tokens - 1]) == 0
    other = store.match([*text[:tokens], text[tokens] + 1, 5])
    assert (other.tokens, other.why, other.broke_at) == (tokens, "tokens", tokens)
    store.take(store.chain(text), before)


def test_nothing_is_found_under_another_salt_or_model() -> None:
    store = Store()
    text = store.text(700)
    store.keep(text, "a")
    assert [store.found(text, salt) for salt in ("a", "b", "", "\ud800")] == [700, 0, 0, 0]
    assert root_key("model", "a") != root_key("other", "a")


def test_of_thousands_that_follow_a_system_prompt_the_most_alike_is_found() -> None:
    store = Store()
    system = store.text(300)
    asked = [[*system, number, *store.text(30)] for number in range(2000)]
    for text in asked:
        store.keep(text)
    for number in (0, 1, 1000, 1999):
        assert store.found([*asked[number][:320], 1]) == 320
    found = store.match([*system, 5000, 1])
    assert (found.tokens, found.why) == (300, "tokens")


def test_a_prompt_that_only_goes_on_broke_nowhere() -> None:
    store = Store()
    text = store.text(300)
    store.keep(text)
    found = store.match([*text, *store.text(400)])
    assert (found.tokens, found.why, found.broke_at) == (300, "", -1)
    assert store.match(store.text(10)).broke_at == 0


def test_keys_say_everything_before_them() -> None:
    text = list(range(1, 1001))
    chain = Chain(root_key("m", ""), text)
    other = Chain(root_key("m", ""), [2, *text[1:]])
    assert chain.key(1) == next_key(chain.key(0), text[:256])
    assert chain.key(3) != other.key(3)
    assert chain.shared(Chain(root_key("m", ""), [*text[:700], 0, *text[701:]]), 1000) == 700
    assert chain.shared(Chain(root_key("m", ""), text), 999) == 999
    assert chain.shared(Chain(root_key("m", "x"), text), 1000) == chain.shared(other, 1000) == 0
    assert common([1, 2, 3], [1, 2]) == 2
    assert common([], [1]) == common([2], [1]) == 0


# --- keeping ----------------------------------------------------------------------------------------------------------


def test_only_what_is_not_here_is_copied() -> None:
    store = Store()
    text = store.text(1000)
    chain = store.chain(text)
    assert store.ram.missing(chain, 600, tail=False) == [(0, 256), (256, 512)]
    store.put(chain, 600, tail=False)
    assert store.ram.missing(chain, 600, tail=False) == []
    assert store.ram.missing(chain, 600, tail=True) == [(512, 600)]
    assert [node.end for node in store.put(chain, 600)] == [600]
    assert store.ram.missing(chain, 550, tail=True) == []
    assert store.ram.missing(store.chain([*text[:590], 1]), 591, tail=True) == [(512, 591)]


def test_a_tail_that_a_longer_node_covers_goes() -> None:
    store = Store()
    text = store.text(400)
    chain = store.chain(text)
    for end in (260, 300, 400):
        store.put(chain, end)
    assert store.ram.statistics().blocks == 2
    assert store.ram.nbytes == 400 * KV_BYTES
    chain.tokens += store.text(112)
    store.put(chain)
    assert store.ram.nbytes == 512 * KV_BYTES


def test_what_was_evicted_under_a_sequence_is_not_copied_again_with_each_step() -> None:
    store = Store()
    chain = store.chain(store.text(2048))
    store.put(chain, 1024)
    store.ram.shrink(512 * KV_BYTES)
    assert store.ram.missing(chain, 1280, tail=False) == []
    assert store.ram.missing(chain, 1300, tail=True)[0] == (512, 768)


def test_a_checkpoint_that_does_not_belong_to_a_node_s_end_is_not_kept() -> None:
    store = Store(checkpoints=True)
    chain = store.chain(store.text(600))
    store.put(chain, 512, tail=False)
    store.ram.put(chain, 600, [], [], Tokens(chain.tokens[:600], CHECKPOINT_BYTES))
    assert store.found(chain.tokens) == 0
    assert store.ram.nbytes == 512 * KV_BYTES


def test_a_node_that_gets_a_checkpoint_later_is_told() -> None:
    store = Store(checkpoints=True)
    chain = store.chain(store.text(512))
    assert [node.checkpoint for node in store.put(chain, tail=False)] == [None, None]
    (node,) = store.put(chain)
    assert node.end == 512
    assert node.checkpoint is not None


def test_nodes_from_elsewhere_come_under_their_parents() -> None:
    source, store = Store(), Store()
    text = source.text(600)
    nodes = source.put(source.chain(text))
    root = root_key("model", "")
    for node in nodes:
        assert node.parent is not None
        assert node.block is not None
        assert store.ram.adopt(node.parent.key, node.key, node.tokens, node.block, None, uses=3) is None
    store.ram.root(root)
    for node in nodes:
        assert node.parent is not None
        assert node.block is not None
        values = (node.parent.key, node.key, node.tokens, node.block, node.checkpoint)
        adopted = store.ram.adopt(*values, uses=3)
        assert adopted is not None
        assert adopted is store.ram.adopt(*values, uses=1)
        assert (adopted.start, adopted.uses, adopted.anchor) == (node.start, 3, True)
    assert store.ram.nbytes == source.ram.nbytes
    store.take(store.chain(text), store.match(text))


def test_a_block_that_comes_without_its_window_part_is_not_used_for_it() -> None:
    """From the disk, or copied when the sequence's window had moved on."""
    source, store = Store(window=300), Store(window=300)
    text = source.text(1024)
    store.ram.root(root_key("model", ""))
    for node in source.put(source.chain(text)):
        assert node.parent is not None
        assert isinstance(node.block, Tokens)
        if node.start < 512:
            node.block.drop_window()
        store.ram.adopt(node.parent.key, node.key, node.tokens, node.block, None, uses=1)
    assert [store.found(text[:tokens]) for tokens in (1024, 812, 811, 600)] == [1024, 812, 0, 0]
    chain = store.chain(store.text(1024))
    spans = store.ram.missing(chain, 1024, tail=True)
    blocks = [Tokens(chain.tokens[a:b], 500, 0 if a < 512 else 500) for a, b in spans]
    store.ram.put(chain, 1024, spans, blocks)
    assert [store.found(chain.tokens[:tokens]) for tokens in (1024, 811)] == [1024, 0]


# --- conversations ----------------------------------------------------------------------------------------------------


def uses(store: Store, tokens: list[int]) -> list[int]:
    node = store.match(tokens).node
    return [node.uses for node in node.path()] if node else []


def test_uses_count_conversations_not_requests() -> None:
    store = Store()
    system = store.text(600)
    histories = [[*system, *store.text(700)] for _ in range(3)]
    for _ in range(4):
        for history in histories:
            store.turn(history, answer := store.text(100))
            history += [*answer, *store.text(50)]
    assert uses(store, system[:512]) == [3, 3]
    assert uses(store, histories[0])[-3:] == [1, 1, 1]


def test_a_conversation_is_recognised_when_its_answer_comes_back_in_other_words() -> None:
    store = Store()
    prompt = store.text(1500)
    store.turn(prompt, store.text(2000))
    rewritten = [*prompt[:-5], *store.text(300)]
    assert store.turn(rewritten, store.text(10)) == 1495
    assert set(uses(store, rewritten)) == {1}
    # The thoughts that nobody repeats go before another's long conversation, which is older.
    other = Store()
    old = other.text(2000)
    other.keep(old)
    other.turn(prompt, other.text(2000))
    other.turn(rewritten, other.text(10))
    other.ram.shrink(other.ram.nbytes - 2000 * KV_BYTES)
    assert other.found(old) == 2000
    assert other.found(rewritten) == len(rewritten)


def test_side_requests_of_the_same_session_do_not_end_its_conversation() -> None:
    store = Store()
    main = store.text(3000)
    store.turn(main, store.text(100), session="s")
    for _ in range(10):
        store.turn(store.text(200), store.text(10), session="s")
    store.ram.shrink(3100 * KV_BYTES)
    assert store.found(main) == 3000


def test_a_session_that_moves_its_last_message_goes_on() -> None:
    store = Store()
    system, first, second = store.text(2000), store.text(300), store.text(200)
    store.turn([*system, *first], store.text(20), session="s")
    store.turn([*system, *second, *first], store.text(20), session="s")
    assert set(uses(store, system[:1792])) == {1}
    store.turn([*system, *store.text(200), *first], store.text(20), session="t")
    assert set(uses(store, system[:1792])) == {2}


# --- giving way -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("system_tokens", [0, 300, 2000])
def test_ten_side_requests_between_two_long_turns_cost_no_prefill(checkpoints: bool, system_tokens: int) -> None:
    """Whether they share its system prompt or not."""
    store = Store(checkpoints=checkpoints)
    system = store.text(system_tokens)
    history = [*system, *store.text(20_000)]
    store.turn(history, answer := store.text(100))
    budget = store.ram.nbytes + 500 * KV_BYTES
    for _ in range(10):
        store.turn([*system, *store.text(200)], store.text(10))
        store.ram.shrink(budget)
        assert store.ram.nbytes <= budget
    following = [*history, *answer, *store.text(300)]
    assert store.turn(following, store.text(5)) == 20_100 + system_tokens
    # And when the answer came back in other words, no more than that.
    for _ in range(10):
        store.turn([*system, *store.text(200)], store.text(10))
        store.ram.shrink(store.ram.nbytes - 100 * KV_BYTES)
    assert store.found([*following[:-3], *store.text(50)]) >= len(following) - 4


def test_the_least_recently_used_of_long_conversations_goes_first_from_its_end() -> None:
    store = Store()
    a, b = store.text(3000), store.text(3000)
    store.keep(a)
    store.keep(b)
    store.turn([*a, 1], [])
    store.ram.shrink(store.ram.nbytes - 2000 * KV_BYTES)
    assert store.found(a) == 3000
    assert store.found(b) == 768  # of whole blocks
    store.ram.shrink(3001 * KV_BYTES)
    assert (store.found(a), store.found(b)) == (3000, 0)


def test_anchors_go_last() -> None:
    store = Store()
    system = store.text(512)
    for _ in range(2):
        store.keep([*system, *store.text(100)])
    long = store.text(5000)
    store.keep(long)
    store.ram.shrink(4000 * KV_BYTES)
    assert store.found(system) == 512
    store.ram.shrink(512 * KV_BYTES)
    assert (store.found(system), store.found(long)) == (512, 0)


def test_to_begin_with_a_part_of_a_node_is_not_to_share_it() -> None:
    """So short requests that all begin alike do not become a system prompt each."""
    store = Store()
    opening = store.text(100)
    history = store.text(3000)
    store.turn(history, [])
    for _ in range(30):
        store.turn([*opening, *store.text(100)], [])
    store.ram.shrink(3000 * KV_BYTES)
    assert store.found(history) == 3000


def test_what_nobody_comes_back_to_gives_way_in_the_end() -> None:
    store = Store()
    shared, dead = store.text(1024), store.text(2048)
    for _ in range(2):
        store.keep([*shared, *store.text(50)])
    store.keep(dead)
    budget = 4096 * KV_BYTES
    alive = store.text(512)
    lasted: dict[str, int] = {}
    for number in range(1000):
        store.keep([*alive, *store.text(300)])
        store.ram.shrink(budget)
        for name, text in (("shared", shared), ("dead", dead)):
            if not store.found(text):
                lasted.setdefault(name, number)
    assert 100 < lasted["dead"] < lasted["shared"]
    assert store.found(alive) == 512


def test_window_parts_that_were_passed_go_first_but_not_where_a_prompt_is_likely_to_be_left() -> None:
    store = Store(window=500)
    prompt = store.text(3000)
    store.turn(prompt, store.text(3000))
    side = store.text(900)
    store.keep(side)
    before = store.ram.nbytes
    assert store.ram.shrink(before - 1) > 0
    assert store.ram.statistics().evictions == 0  # the side request is here yet
    blocks = store.ram.statistics().blocks
    store.ram.shrink(KV_BYTES * 6900 + WINDOW_BYTES * (900 + 2 * 4 * BLOCK_TOKENS))
    assert store.ram.statistics().blocks == blocks
    rewritten = [*prompt[:-5], *store.text(40)]
    found = store.match(rewritten)
    assert (found.tokens, found.why) == (2995, "tokens")
    store.take(store.chain(rewritten), found)
    middle = store.match(prompt[:1500])
    assert (middle.tokens, middle.why) == (0, "window")


def test_window_parts_stay_before_a_branch_and_come_back_where_one_begins() -> None:
    store = Store(window=300)
    system = store.text(1024)
    for _ in range(2):
        store.keep([*system, *store.text(2000)])
    store.ram.shrink(store.ram.nbytes - 1)
    while store.ram.statistics().evictions == 0:
        assert store.found(system) == 1024
        store.ram.shrink(store.ram.nbytes - 1)
    long = store.text(3000)
    store = Store(window=300)
    store.keep(long)
    store.ram.shrink(store.ram.nbytes - 1)
    store.ram.shrink(KV_BYTES * 3000 + WINDOW_BYTES * 1500)
    assert store.found(long[:1024]) == 0
    branch = store.chain([*long[:1024], *store.text(100)])
    assert store.ram.missing(branch, 1124, tail=True) == [(512, 768), (768, 1024), (1024, 1124)]
    store.put(branch)
    assert store.found(long[:1024]) == 1024
    store.take(branch, store.match(branch.tokens))


def evict_one(store: Store) -> None:
    """After all parts that nobody needs."""
    evictions = store.ram.statistics().evictions
    while store.ram.statistics().evictions == evictions:
        store.ram.shrink(store.ram.nbytes - 1)


def test_window_parts_stay_at_the_end_of_what_was_shared_when_one_branch_is_left() -> None:
    store = Store(window=300)
    system, long = store.text(1024), store.text(4000)
    store.turn([*system, *store.text(40)], [])
    store.turn([*system, *long], [])
    evict_one(store)
    assert store.found([*system, *long]) == 5024
    store.ram.shrink(store.ram.nbytes - 1)
    assert store.found([*system, 1]) == 1024
    store.take(store.chain(system), store.match(system))


def test_window_parts_that_only_a_branch_needed_go_with_it() -> None:
    store = Store(window=300)
    left = store.text(4000)
    store.turn(left, [], session="s")
    way = [*left[:2048], *store.text(30)]
    store.turn(way, [], session="s")
    way += store.text(3000)
    store.turn(way, [], session="s")
    while store.found(left) > 2048:
        assert store.found(left[:2048]) == 2048
        evict_one(store)
    assert store.found(way) == 5078
    store.ram.shrink(store.ram.nbytes - 1)
    assert (store.found(way[:2048]), store.found(way)) == (0, 5078)


def test_with_an_end_all_goes_that_no_sequence_could_go_on_from() -> None:
    store = Store(checkpoints=True)
    chain = store.chain(store.text(4000))
    store.put(chain, 2000)
    store.put(chain, 4000)
    store.ram.shrink(store.ram.nbytes - 1)
    assert store.ram.nbytes == 2000 * KV_BYTES + CHECKPOINT_BYTES
    assert store.found(chain.tokens) == 2000


def test_checkpoints_that_were_passed_go_first() -> None:
    store = Store(checkpoints=True)
    history = store.text(512)
    store.keep(history)
    for _ in range(3):
        history += store.text(512)
        store.turn(history, [])
    before = store.ram.statistics().blocks
    assert store.found(history[:1024]) == 1024
    store.ram.shrink(store.ram.nbytes - 2 * CHECKPOINT_BYTES)
    assert store.ram.statistics() == (before, 0)
    assert store.found(history) == 2048
    assert store.found(history[:1024]) == 1020  # beside the way


@pytest.mark.parametrize(("window", "checkpoints"), [(0, False), (600, False), (0, True), (600, True)])
def test_what_was_found_can_be_taken_after_everything_was_evicted(window: int, checkpoints: bool) -> None:
    store = Store(window, checkpoints)
    text = store.text(2000)
    chain = store.chain(text)
    for end in (1024, 1500, 2000):
        store.put(chain, end)
    asked = [store.chain(text[:end]) for end in (1024, 1500, 2000)]
    found = [store.ram.match(each, len(each.tokens)) for each in asked]
    assert [each.tokens for each in found] == [1024, 1500, 2000]
    store.ram.shrink(store.ram.nbytes * 2 // 3, found)
    store.ram.shrink(0, found)
    assert store.ram.nbytes == 0
    for each, of in zip(asked, found, strict=True):
        store.take(each, of)


# --- anything at all --------------------------------------------------------------------------------------------------

_ALPHABET = 3


class Machine(RuleBasedStateMachine):
    """Against a list of all that was ever published."""

    @initialize(kind=st.sampled_from([(0, False), (200, False), (700, False), (0, True), (300, True)]))
    def begin(self, kind: tuple[int, bool]) -> None:
        self.store = Store(*kind)
        self.published: dict[str, list[list[int]]] = {"": [], "a": []}
        self.chains: list[tuple[Chain, str]] = []
        self.pending: list[tuple[Chain, Found]] = []
        self.removed: list[tuple[bytes, Node]] = []

    def text(self, seed: int, runs: list[int]) -> list[int]:
        """Runs of a few different texts, so that prompts share beginnings of every length."""
        tokens: list[int] = []
        for number, run in enumerate(runs):
            tokens += [1 + (seed >> number) % _ALPHABET] * run
        return tokens

    @rule(
        seed=st.integers(0, 255),
        runs=st.lists(st.sampled_from([1, 4, 60, 200, 255, 256, 257, 512]), min_size=1, max_size=4),
        salt=st.sampled_from(["", "a"]),
        session=st.sampled_from(["", "s"]),
    )
    def enter(self, seed: int, runs: list[int], salt: str, session: str) -> None:
        chain = self.store.chain(self.text(seed, runs), salt, session)
        self.chains = [*self.chains[-5:], (chain, salt)]

    @precondition(lambda self: self.chains)
    @rule(which=st.integers(0, 5), share=st.sampled_from([0.3, 0.7, 1.0]), tail=st.booleans())
    def publish(self, which: int, share: float, tail: bool) -> None:
        chain, salt = self.chains[which % len(self.chains)]
        end = max(int(share * len(chain.tokens)), 1)
        self.store.put(chain, end, tail=tail)
        self.published[salt].append(chain.tokens[:end])

    @precondition(lambda self: self.chains)
    @rule(which=st.integers(0, 5), run=st.sampled_from([1, 30, 256]), token=st.integers(1, _ALPHABET))
    def generate(self, which: int, run: int, token: int) -> None:
        self.chains[which % len(self.chains)][0].tokens.extend([token] * run)

    @precondition(lambda self: self.chains)
    @rule(which=st.integers(0, 5), less=st.sampled_from([0, 1, 100]), now=st.booleans())
    def match(self, which: int, less: int, now: bool) -> None:
        chain, salt = self.chains[which % len(self.chains)]
        most = max(len(chain.tokens) - less, 0)
        found = self.store.ram.match(chain, most)
        true = max((common(chain.tokens[:most], text) for text in self.published[salt]), default=0)
        assert 0 <= found.tokens <= min(true, most)
        if found.broke_at >= 0:
            assert found.tokens <= found.broke_at <= true
            assert found.broke_at < most
        if found.tokens < found.broke_at:
            assert found.why in ("window", "checkpoint")
        best = self.restorable(chain, most)
        assert found.tokens <= best
        if not self.store.window:
            assert found.tokens == best
        if found.tokens and now:
            self.store.take(chain, found)
        elif found.tokens:
            self.pending = [*self.pending[-2:], (chain, found)]

    def restorable(self, chain: Chain, most: int) -> int:
        """The longest prefix that any node serves, each tried."""
        prompt = chain.tokens[:most]
        best = 0
        for node in self.store.ram._tree.nodes.values():
            path = node.path()
            tokens = [token for each in path for token in each.tokens]
            if not path or path[0].parent is not self.store.ram._tree.nodes.get(chain.key(0)):
                continue
            shared = common(tokens, prompt)
            ends = [node.end] if self.store.checkpoints else [shared, *(each.start for each in path)]
            for end in ends:
                least = end - self.store.window
                needed = [each for each in path if each.end > least and each.start < end]
                windows = not self.store.window or not any(each.windowless for each in needed)
                if end <= shared and windows and (node.checkpoint or not self.store.checkpoints):
                    best = max(best, end)
        return best

    @rule(share=st.sampled_from([0.0, 0.2, 0.6, 0.95]))
    def shrink(self, share: float) -> None:
        before = self.store.ram.nbytes
        budget = int(share * before)
        before_nodes = dict(self.store.ram._tree.nodes)
        freed = self.store.ram.shrink(budget, [found for _, found in self.pending])
        assert self.store.ram.nbytes <= budget
        assert freed == before - self.store.ram.nbytes
        now = self.store.ram._tree.nodes
        self.removed = [(key, node) for key, node in before_nodes.items() if key not in now and node.parent]

    @rule()
    def restore(self) -> None:
        """What was found before others were evicted or published."""
        for chain, found in self.pending:
            self.store.take(chain, found)
        self.pending.clear()

    @precondition(lambda self: self.removed)
    @rule(uses=st.integers(0, 3))
    def adopt(self, uses: int) -> None:
        """What was evicted comes back from the disk, parents first."""
        for key, node in sorted(self.removed, key=lambda item: item[1].start):
            assert node.parent is not None
            path = node.path()
            tokens = [token for each in path for token in each.tokens]
            assert path[0].parent is not None
            window_bytes = WINDOW_BYTES if self.store.window and uses else 0
            block = Tokens(list(node.tokens), KV_BYTES, window_bytes)
            checkpoint = Tokens(tokens, CHECKPOINT_BYTES) if self.store.checkpoints and uses > 1 else None
            self.store.ram.root(path[0].parent.key)
            self.store.ram.adopt(node.parent.key, key, node.tokens, block, checkpoint, uses)
        self.removed = []

    @invariant()
    def accounts(self) -> None:
        tree, eviction = self.store.ram._tree, self.store.ram._eviction
        nodes = [node for node in tree.nodes.values() if node.parent is not None]
        assert tree.blocks == len(nodes)
        assert tree.nbytes == sum(node.nbytes for node in nodes) >= 0
        queued = set(eviction._heap)
        for node in nodes:
            parent = node.parent
            assert parent is not None
            assert tree.holds(parent)
            assert node in parent.children
            assert node.nbytes == sum(record.nbytes for record in (node.block, node.checkpoint) if record)
            assert node.start == parent.end
            assert node.uses >= len(node.users)
            if not node.children:
                assert node.queued in queued
            if node.conversation is not None:
                assert node.conversation.ends.count(node) == 1
            assert parent.children == sorted(parent.children, key=lambda child: child.tokens)

    def teardown(self) -> None:
        self.store.ram.shrink(0)
        assert self.store.ram.nbytes == self.store.ram.statistics().blocks == 0
        assert not self.store.ram._eviction._passed


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestMachine = Machine.TestCase
