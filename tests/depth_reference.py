"""``lmx/_depth.pxd`` again in plain Python, operation by operation, so that the same floats come out: for
``tests/sched_reference.py``."""

from collections import defaultdict
from dataclasses import dataclass, field

MAX_DEPTH = 15
OWN_KEPT, SOURCE_KEPT, PRIOR_DRAFTS = 0.9, 0.98, 2.0
RATIO_SHARE, LATE_SHARE, CHANGED, CHANGES = 0.125, 0.5, 2.0, 3
WORTH, PROMISE, LOWEST, GUESS = 1.02, 1.1, 0.6, 0.25
EARNED, MOST_CREDIT, MOST_DEBT, FIRST_LOSS = 0.01, 6.0, 8.0, 2.0
FIRST_TOP, FIRST_WAIT, MAX_WAIT, UNHEARD = 3, 256, 16384, 512
LISTED = {1, 2, 3, 4, 5, 7, 11, 15}
GROUPS = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 15))
MOST_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)


@dataclass
class Acceptance:
    right: dict = field(default_factory=lambda: defaultdict(float))
    tried: dict = field(default_factory=lambda: defaultdict(float))

    def learn(self, source, right, wrong, kept):
        for position in range(1, right + wrong + 1):
            key = source, group_of(position)
            self.right[key] = kept * self.right[key] + (position <= right)
            self.tried[key] = kept * self.tried[key] + 1.0
        for group in range(group_of(right + 1) + 1 if wrong else len(GROUPS), len(GROUPS)):
            self.right[source, group] *= kept
            self.tried[source, group] *= kept

    def share(self, source, group, prior, kept):
        right, tried = self.right[source, group], self.tried[source, group]
        weight = PRIOR_DRAFTS * (1.0 - tried * (1.0 - kept))
        return (right + weight * prior) / (tried + weight)


@dataclass
class Cell:
    ratio: float = 0.0
    seen: int = 0
    wait: int = FIRST_WAIT
    due: int = 0


@dataclass
class Offer:
    acceptance: Acceptance
    source: int
    most: int


@dataclass
class Choice:
    depth: int = 0
    asked: int = 0
    probe: bool = False
    gain: float = 1.0


class Depths:
    def __init__(self):
        self.cells = defaultdict(Cell)  # by (draft model asked, bucket, depth)
        self.average = Acceptance()
        self.heard = [0, 0]
        self.steps = 0
        self.credit = MOST_CREDIT
        self.changes = []  # the last measurements, if they were far off in the same direction

    def learn_acceptance(self, acceptance, source, right, wrong):
        acceptance.learn(source, right, wrong, OWN_KEPT)
        self.average.learn(source, right, wrong, SOURCE_KEPT)
        self.heard[source] = self.steps

    def expect(self, offer):
        """For each position how likely its draft, and all before it, are right."""
        usual = own = 0.5
        shares = []
        for group in range(len(GROUPS)):
            before = usual
            usual = self.average.share(offer.source, group, usual, SOURCE_KEPT)
            prior = min(max(usual + (own - before), 0.0), 1.0)
            own = offer.acceptance.share(offer.source, group, prior, OWN_KEPT)
            shares.append(own)
        right, all_right = [], 1.0
        for position in range(1, MAX_DEPTH + 1):
            all_right *= shares[group_of(position)]
            right.append(all_right)
        return right

    def plain_ratio(self, bucket):
        cell = self.cells[0, bucket, 0]
        return cell.ratio if cell.seen else 1.0

    def known_ratio(self, asked, bucket, depth):
        plain = self.plain_ratio(bucket)
        if depth == 0:
            return plain
        for deeper in range(depth, MAX_DEPTH + 1):
            if self.cells[asked, bucket, deeper].seen:
                return self.cells[asked, bucket, deeper].ratio
        others = [i for i in range(len(MOST_ROWS)) if self.cells[asked, i, depth].seen]
        larger, smaller = [i for i in others if i > bucket], [i for i in others if i < bucket]
        if larger:
            return plain * self.cells[asked, larger[0], depth].ratio / self.plain_ratio(larger[0])
        if smaller:
            i = smaller[-1]
            more = max(self.cells[asked, i, depth].ratio / self.plain_ratio(i) - 1.0, 0.0)
            return plain * (1.0 + more * MOST_ROWS[bucket] / MOST_ROWS[i])
        return None

    def expected_ratio(self, asked, rows, depth):
        bucket = bucket_of(rows)
        ratio = self.known_ratio(asked, bucket, depth)
        return self.plain_ratio(bucket) * (1.0 + GUESS * depth) if ratio is None else ratio

    def learn_cell(self, asked, rows, depth, ratio, probe):
        cell = self.cells[asked, bucket_of(rows), depth]
        speed = 1.0
        if cell.seen < 2:
            cell.ratio = min(cell.ratio, ratio) if cell.seen else ratio
        else:
            change = (ratio > CHANGED * cell.ratio) - (ratio * CHANGED < cell.ratio)
            if depth:
                self.changes = [*self.changes, change] if change in self.changes else [change] * abs(change)
                if len(self.changes) == CHANGES:
                    self.changes = []
                    speed = ratio / cell.ratio
                    ratio = cell.ratio
            ratio = min(max(ratio, cell.ratio / CHANGED), cell.ratio * CHANGED)
            cell.ratio += (LATE_SHARE if self.steps >= cell.due else RATIO_SHARE) * (ratio - cell.ratio)
            cell.wait = min(2 * cell.wait, MAX_WAIT) if probe and depth else FIRST_WAIT
        cell.seen = min(cell.seen + 1, 2)
        cell.due = self.steps + cell.wait
        return speed

    def pay(self, asked, rows, depth, lost):
        if self.cells[asked, bucket_of(rows), depth].seen == 0:
            lost = min(lost, FIRST_LOSS)
        self.credit = max(self.credit - max(lost, 0.0), -MOST_DEBT)

    def earn(self):
        self.steps += 1
        self.credit = min(self.credit + EARNED, MOST_CREDIT)

    def choose(self, rows, offers, probes):
        """``offers``: those of sources that cost nothing, or all."""
        bucket = bucket_of(rows)
        plain = self.plain_ratio(bucket)
        choice = Choice(gain=WORTH)
        variants = {}
        for asked in (0, 1):
            its = [offer for offer in offers if offer.source <= asked]
            if any(offer.source == asked for offer in its):
                variants[asked] = list(self.tokens(rows, its))
        for asked, expected in variants.items():
            for depth, tokens in enumerate(expected, 1):
                ratio = self.known_ratio(asked, bucket, depth)
                if ratio is not None and (depth in LISTED or depth == len(expected)):
                    gain = tokens * plain / (rows * ratio)
                    if gain > choice.gain:
                        choice = Choice(depth, asked, False, gain)
        if choice.depth == 0:
            choice.gain = 1.0
        probe = self.find_probe(rows, variants, choice, bucket, plain) if probes and self.credit > 0.0 else None
        return Choice(*probe, True, choice.gain) if probe else choice

    def tokens(self, rows, offers):
        """What is expected with so many drafts: 1, 2, and so on."""
        tokens = float(rows)
        expected = [(self.expect(offer), offer.most) for offer in offers]
        for position in range(1, max(offer.most for offer in offers) + 1):
            at_this = 0.0
            for right, most in expected:
                if most >= position:
                    at_this += right[position - 1]
            tokens += at_this
            yield tokens

    def find_probe(self, rows, variants, choice, bucket, plain):
        for asked, expected in variants.items():
            if self.steps - self.heard[asked] >= UNHEARD:
                return min(len(expected), FIRST_TOP), asked
        cell = self.cells[0, bucket, 0]
        if choice.depth and (cell.seen < 2 or self.steps >= cell.due):
            return 0, 0
        best = PROMISE * choice.gain
        found, probe = 0.0, None
        for asked, expected in variants.items():
            top = max((d for d in range(1, MAX_DEPTH + 1) if self.cells[asked, bucket, d].seen), default=0)
            lowest = likely = plain
            for depth, tokens in enumerate(expected[: max(FIRST_TOP, 2 * top + 1)], 1):
                cell = self.cells[asked, bucket, depth]
                likely = cell.ratio if cell.seen == 2 else likely + GUESS * plain
                least = max(lowest, LOWEST * cell.ratio) if cell.seen == 2 else lowest
                to_be_seen = depth in LISTED and (cell.seen < 2 or self.steps >= cell.due)
                if to_be_seen and tokens * plain / (rows * least) > best and tokens / likely > found:
                    found, probe = tokens / likely, (depth, asked)
                if cell.seen:
                    lowest = max(lowest, cell.ratio)
                    likely = max(likely, lowest)
        return probe


def group_of(position):
    return next(i for i, (first, last) in enumerate(GROUPS) if first <= position <= last)


def bucket_of(rows):
    return next((i for i, most in enumerate(MOST_ROWS) if rows <= most), len(MOST_ROWS) - 1)
