"""The step loop on simulated devices (``tests/sim.py``): what it must reach, and what it promises to who cancels."""

import random
from dataclasses import replace

import pytest

from lmx.protocol import Freed
from tests import sim
from tests.sim import DEVICES, Costs, Device, LoopKind, Ran, Request, Simulation

ITL_TARGET_MS = 250.0
LATE_MS = 5.0
# "blocks, slow host" is for looking at: while a start blocks Python cannot make the next step, and what is left of a
# step is shorter than that takes. The device then idles for the difference, whatever the loop does.
HIDES_THE_HOST = ["apart", "blocks"]
LOOPS: list[LoopKind] = ["auto", "overlapped", "plain"]


@pytest.fixture(params=HIDES_THE_HOST)
def device(request: pytest.FixtureRequest) -> Device:
    return DEVICES[request.param]


# --- the targets ------------------------------------------------------------------------------------------------------


def test_eight_streams(device: Device) -> None:
    outcome = sim.steady(device)
    assert outcome.report.idle_share <= 0.05
    assert outcome.report.late_ms.worst <= LATE_MS
    assert outcome.report.worst_gap_ms(outcome.streams) <= 1.2 * max(step.busy_s * 1e3 for step in outcome.report.steps)
    assert outcome.report.learnt(8, 300) == pytest.approx(1.0, abs=0.1)


def test_a_first_long_prompt_alone(device: Device) -> None:
    outcome = sim.long_alone(device)
    assert outcome.ttft_ratio <= 1.15
    assert outcome.report.late_ms.worst <= LATE_MS


def test_a_first_long_prompt_beside_streams(device: Device) -> None:
    outcome = sim.long_beside(device)
    assert outcome.ttft_ratio <= 1.15
    assert outcome.report.idle_share <= 0.05
    assert outcome.report.late_ms.worst <= LATE_MS
    assert outcome.report.worst_gap_ms(outcome.streams) <= 1.5 * ITL_TARGET_MS
    assert outcome.report.learnt(0, 0, (4096, 1024)) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize(
    "costs",
    [
        Costs(prefill_pass=3, token=0.04, token_context=1.4e-6),
        Costs(prefill_pass=100, token=0.1),
        Costs(token=0.6, token_context=0),
    ],
)
def test_predictions_of_one_kind_of_step_are_no_reason_to_sleep_in_the_other(device: Device, costs: Costs) -> None:
    """Decoding is well predicted when the first large chunk comes, whose cost is still an extrapolation."""
    outcome = sim.long_beside(replace(device, costs=costs))
    assert outcome.ttft_ratio <= 1.15
    assert outcome.report.late_ms.worst <= LATE_MS
    assert outcome.report.worst_gap_ms(outcome.streams) <= 1.5 * ITL_TARGET_MS


@pytest.mark.parametrize("name", DEVICES)
def test_drafts_that_are_right_gain_and_those_that_are_wrong_cost_nothing(name: str) -> None:
    device = DEVICES[name]
    plain = sim.drafted(device, right=None).tokens_per_s
    assert sim.drafted(device).tokens_per_s > 2.5 * plain
    assert sim.prose(device).tokens_per_s > 0.99 * plain
    assert sim.by_turns(device).tokens_per_s > 2.0 * plain


def test_a_cliff_in_what_drafts_cost_is_found_and_kept_to(device: Device) -> None:
    for cliff_depth in (3, 8):
        costs = Costs(draft=0.02, cliff_depth=cliff_depth, cliff=8.0)
        steps = sim.drafted(replace(device, costs=costs)).report.steps
        assert sum(step.depth >= cliff_depth for step in steps) <= 3
        assert sum(0 < step.depth < cliff_depth for step in steps) > 0.9 * len(steps)


def test_verified_steps_are_told_in_time(device: Device) -> None:
    assert sim.drafted(device).report.late_ms.worst <= LATE_MS


@pytest.mark.parametrize("loop", LOOPS)
def test_streams_that_join_leave_and_are_cancelled_while_drafts_are_verified(device: Device, loop: LoopKind) -> None:
    calls = random.Random(2)
    simulation = Simulation(device, loop=loop, drafts=lambda now_s: 0.9, max_rows=4)
    stops = {seq: calls.choice([None, 7, 150]) for seq in range(1, 25)}
    requests = [
        simulation.request(at_s=calls.uniform(0, 6), prompt=calls.randint(1, 900), answer=300, stop_after=stop)
        for stop in stops.values()
    ]
    for request in requests[::3]:
        simulation.cancel(request, request.asked_s + calls.uniform(0.0, 4.0))
    report = simulation.run()
    assert sum(step.depth > 0 for step in report.steps) > 100
    for request in requests:
        if request.cancelled_s is None:
            assert len(request.token_s) == (stops[request.seq] or 300)
        else:
            later = [step for step in report.steps if step.asked_s > request.cancelled_s and request.seq in step.seqs]
            assert len(later) <= 1, "it was in no step that was made after that"


def test_nobody_sleeps_by_a_prediction_that_three_slow_steps_made(device: Device) -> None:
    """Pages that come back, a kernel compiled late: then the device is as fast as before, and the prediction is not."""
    simulation = Simulation(replace(device, speeds=((3.0, 100.0), (7.5, 1.0))))
    for _ in range(8):
        simulation.request(prompt=60, answer=400)
    report = simulation.run()
    assert len([step for step in report.steps if step.busy_s > 1]) >= 3
    assert report.learnt(8, 300) == pytest.approx(1.0, abs=0.1)
    assert report.since(7.5).late_ms.worst <= LATE_MS


def test_cold_first_steps_are_forgotten_in_a_few(device: Device) -> None:
    outcome = sim.cold(device)
    slow = [late for late in outcome.report.late_ms.values if late > LATE_MS]
    assert len(slow) <= 2
    assert outcome.report.worst_gap_ms(outcome.streams) <= 1.5 * ITL_TARGET_MS
    assert outcome.report.idle_share <= 0.05


def test_a_long_prompt_after_a_cold_start(device: Device) -> None:
    outcome = sim.cold_then_long(device)
    assert outcome.ttft_ratio <= 1.15
    assert outcome.report.late_ms.worst <= LATE_MS
    assert outcome.report.worst_gap_ms(outcome.streams) <= 1.5 * ITL_TARGET_MS


def test_a_prediction_that_became_too_long_heals_in_a_few_steps(device: Device) -> None:
    outcome = sim.throttled(device)
    slow = [late for late in outcome.report.late_ms.values if late > LATE_MS]
    assert len(slow) <= 2 * 2, "two changes to a faster device"
    assert outcome.report.late_ms.worst <= 0.75 * 3 * 25
    assert outcome.report.idle_share <= 0.05


def test_full_rows_are_refilled_at_once(device: Device) -> None:
    """With one row the device must idle between two requests, for as long as Python takes to make a step."""
    assert sim.full_rows(device).report.idle_share <= 0.05
    one_row = sim.one_row().report
    assert one_row.idle_share * one_row.seconds <= 40 * (2 * Device().build_ms + 1) / 1e3


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", DEVICES)
def test_a_burst_starts_together(name: str, loop: LoopKind) -> None:
    """All eight are in the first step after the gathering, from the second burst on, when costs are known; and nobody
    waits for his tokens beyond the device's time, the gathering, and a step made by Python."""
    outcome = sim.bursts(DEVICES[name], loop)
    report = outcome.report
    for burst in (outcome.streams[i : i + 8] for i in range(8, len(outcome.streams), 8)):
        assert max(report.ttft_ms(one) for one in burst) <= report.device_ms(burst[0]) + 4.5 * 2 + 10 + LATE_MS


@pytest.mark.parametrize(("prompt", "apart_s", "count"), [(200, 0.004, 8), (200, 0.02, 1), (40, 0.004, 1)])
def test_gathering_ends_when_nothing_came_for_a_moment_or_after_a_tenth_of_the_work(
    prompt: int, apart_s: float, count: int
) -> None:
    simulation = Simulation(DEVICES["apart"])
    simulation.request(prompt=5000, answer=2)  # so the cost of prompts is known
    trickle = [simulation.request(at_s=5 + apart_s * i, prompt=prompt, answer=2) for i in range(8)]
    report = simulation.run()
    first = next(step for step in report.steps if trickle[0].seq in step.seqs)
    together = [one for one in trickle if one.seq in first.seqs]
    waited_s = first.asked_s - trickle[0].asked_s
    assert len(together) == count
    assert first.asked_s - together[-1].asked_s <= 0.015 + 0.003
    assert waited_s <= 0.1 * report.device_ms(trickle[0]) / 1e3 + 0.003


def test_gathering_has_one_deadline() -> None:
    """Much work, and somebody comes before each silence is long enough."""
    simulation = Simulation(DEVICES["apart"], max_rows=16)
    simulation.request(prompt=5000, answer=2)
    trickle = [simulation.request(at_s=5 + 0.0125 * i, prompt=2000, answer=2) for i in range(16)]
    report = simulation.run()
    first = next(step for step in report.steps if trickle[0].seq in step.seqs)
    assert 0.06 <= first.asked_s - trickle[0].asked_s <= 0.08 + 0.003


# --- every loop does the same work ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEVICES)
def test_all_loops_give_the_same_answers(name: str) -> None:
    """EOS, a row of non-finite logits, deadlines and preemption included; the simulated backend checks each launch."""
    outcomes = [_mixed(DEVICES[name], loop) for loop in LOOPS]
    assert outcomes[0] == outcomes[1] == outcomes[2]


def _mixed(device: Device, loop: LoopKind) -> list[tuple[int, str | None, str | None]]:
    simulation = Simulation(device, loop=loop, max_rows=4, kv_tokens=6 * 256)
    for i in range(40):  # short answers, and then long ones, which are not expected and need more KV than there is
        simulation.request(at_s=0.05 * i, prompt=40 + 30 * (i % 3), answer=9, stop_after=7, bad=i == 5)
    for i in range(4):
        simulation.request(at_s=4.0, prompt=200, answer=700, stop_after=(None, 660)[i % 2])
    late = simulation.request(at_s=0.5, prompt=1200, answer=30, submit={"deadline_s": 0.2})
    refused = simulation.request(at_s=0.6, prompt=4000, answer=1)
    report = simulation.run()
    assert simulation.loop._scheduler.statistics().preemptions > 0
    for failed, code in ((late, "timeout"), (refused, "never_fits")):
        assert failed.failed is not None
        assert failed.failed.code == code
    return [
        (len(one.token_s), one.finish, one.failed.code if one.failed else None)
        for one in report.requests
        if one is not late
    ]


# --- cancellation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", DEVICES)
def test_who_is_cancelled_is_in_no_step_made_after_that(name: str, loop: LoopKind) -> None:
    """At 120 moments from being queued to the end of the answer, beside three streams: what was made until then runs,
    at most one step beside the running one, and the KV is free when that is done."""
    for i in range(120):
        simulation = Simulation(DEVICES[name], loop=loop, max_rows=4)
        streams = [simulation.request(prompt=60, answer=60) for _ in range(3)]
        target = simulation.request(at_s=0.3, prompt=3000, answer=20)
        others = [simulation.request(at_s=0.31, prompt=100, answer=3)]  # queued until a row is free
        simulation.cancel(target, at_s=0.3003 + 0.0149 * i)
        report = simulation.run()
        _check_cancelled(target, report.steps)
        assert all(len(one.token_s) == one.answer for one in (*streams, *others))


def _check_cancelled(target: Request, steps: list[Ran]) -> None:
    assert target.cancelled_s is not None
    assert target.freed_s is not None
    mine = [step for step in steps if target.seq in step.seqs]
    after = [step for step in mine if step.done_s > target.cancelled_s]
    assert not [step for step in mine if step.asked_s > target.cancelled_s + 0.0002], (
        "messages are read before each plan"
    )
    assert len(after) <= 2
    if after:
        assert target.freed_s <= max(after[-1].told_s, target.cancelled_s) + 0.001
    assert not [moment for moment in target.token_s if moment > max(target.cancelled_s, *(s.told_s for s in mine), 0)]


def test_until_three_quarters_of_a_step_a_cancellation_reaches_the_next() -> None:
    """Once the times are known: at 40 moments of a step of eight streams on a device that runs apart from Python."""
    reached = []
    for i in range(40):
        simulation = Simulation(DEVICES["apart"])
        streams = [simulation.request(prompt=60, answer=150) for _ in range(8)]
        at_s = 1.9 + 0.00053 * i
        simulation.cancel(streams[0], at_s)
        steps = simulation.run().steps
        running = next(step for step in steps if step.start_s <= at_s < step.done_s)
        share = (at_s - running.start_s) / (running.done_s - running.start_s)
        following = steps[steps.index(running) + 1]
        reached.append((share, streams[0].seq not in following.seqs))
    host_share = 2 * 4.5 / 21.0
    assert all(reached_next for share, reached_next in reached if share < 0.68 - host_share)
    assert not all(reached_next for _, reached_next in reached), "the moments cover a whole step"


def test_a_cancelled_prompt_alone_costs_its_running_chunk(device: Device) -> None:
    """Nobody decodes, so nothing is made ahead: chunks of a second are not run for nobody."""
    simulation = Simulation(device)
    target = simulation.request(prompt=30_000, answer=5)
    simulation.cancel(target, at_s=4.321)
    steps = simulation.run().steps
    assert len([step for step in steps if step.done_s > 4.321]) == 1


# --- requests that cannot be served -----------------------------------------------------------------------------------


def test_bad_is_what_the_simulated_model_calls_non_finite() -> None:
    simulation = Simulation()
    bad = simulation.request(prompt=10, answer=5, bad=True)
    good = simulation.request(prompt=10, answer=5)
    simulation.run()
    assert bad.failed is not None
    assert bad.failed.code == "non_finite"
    assert len(good.token_s) == 5


# --- grammars ---------------------------------------------------------------------------------------------------------


def test_masks_that_fit_beside_the_forward_cost_nothing(device: Device) -> None:
    free, held = sim.steady(device), sim.constrained(device)
    assert held.report.seconds <= 1.01 * free.report.seconds
    assert held.report.idle_share <= free.report.idle_share + 0.01
    assert held.report.late_ms.worst <= LATE_MS
    assert held.report.worst_gap_ms(held.streams) <= free.report.worst_gap_ms(free.streams) + 1.0


def test_rows_without_a_grammar_are_not_late_beside_slow_masks(device: Device) -> None:
    """8 ms of masks in four rows; a device that blocks leaves 14 % of a step beside which they can be made."""
    outcome = sim.slow_masks(device)
    free = outcome.streams[4:]
    assert outcome.report.late_ms.worst <= LATE_MS
    step_ms = max(step.busy_s * 1e3 for step in outcome.report.steps)
    unhidden_ms = max(0.0, 4 * 2.0 - (1 - device.launch_share) * step_ms)
    assert outcome.report.worst_gap_ms(free) <= step_ms + unhidden_ms + device.build_ms + 1.0


def test_masks_longer_than_the_forward_cost_what_does_not_fit() -> None:
    """The host is the slower one then: a step lasts as long as its masks, the next step's graph, and a draw."""
    device = replace(DEVICES["apart"], mask_ms=4.0)
    held = sim.constrained(device)
    step_ms = 8 * device.mask_ms + device.build_ms + device.draw_ms
    assert held.report.seconds * 1e3 <= len(held.report.steps) * (step_ms + 0.2)
    assert held.report.late_ms.worst <= LATE_MS


@pytest.mark.parametrize("name", DEVICES)
def test_all_loops_give_the_same_answers_with_grammars(name: str) -> None:
    """Answers that are complete, cut, preempted, failed and cancelled, beside free ones; the simulated backend checks
    that each mask's token before is known, and the simulated matcher keeps what it was told."""

    def mixed(loop: LoopKind) -> list[tuple[int, str | None, str | None]]:
        simulation = Simulation(DEVICES[name], loop=loop, max_rows=4, kv_tokens=6 * 256)
        for i in range(40):
            grammar = ("0 9", "30 1000", "10 bad", "")[i % 4]
            simulation.request(
                at_s=0.05 * i, prompt=40 + 30 * (i % 3), answer=12, bad=i == 5, submit={"grammar": grammar}
            )
        for i in range(4):
            simulation.request(at_s=4.0, prompt=200, answer=700, submit={"grammar": ("0 660", "")[i % 2]})
        report = simulation.run()
        assert simulation.loop._scheduler.statistics().preemptions > 0
        return [(len(one.token_s), one.finish, one.failed.code if one.failed else None) for one in report.requests]

    outcomes = [mixed(loop) for loop in LOOPS]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[0][:5] == [
        (9, "complete", None), (12, "length", None), (0, None, "grammar_invalid"), (12, "length", None),
        (9, "complete", None),
    ]  # fmt: skip
    assert outcomes[0][5] == (0, None, "non_finite")


@pytest.mark.parametrize("loop", LOOPS)
def test_nobody_waits_while_a_grammar_compiles(loop: LoopKind) -> None:
    simulation = Simulation(DEVICES["apart"], loop=loop)
    streams = [simulation.request(prompt=60, answer=150) for _ in range(4)]
    late = simulation.request(at_s=1.0, prompt=60, answer=5, submit={"grammar": "700 4"})
    report = simulation.run().since(0.5)
    assert report.worst_gap_ms(streams) <= 1.5 * ITL_TARGET_MS
    assert 700 <= report.ttft_ms(late) <= 700 + 250
    assert late.finish == "complete"


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("loop", LOOPS)
def test_who_waits_for_a_grammar_can_go_at_any_moment(loop: LoopKind, busy: bool) -> None:
    """Cancelled or overdue, it is freed within a step or, where none runs, within the time between two looks at the
    deadlines; an idle engine is woken by what is compiled."""
    simulation = Simulation(DEVICES["apart"], loop=loop)
    if busy:
        simulation.request(prompt=60, answer=200)
    slow = {"grammar": "2000 5"}
    gone = simulation.request(at_s=1.0, prompt=60, answer=5, submit=slow)
    overdue = simulation.request(at_s=1.0, prompt=60, answer=5, submit={**slow, "deadline_s": 0.3})
    stays = simulation.request(at_s=1.0, prompt=60, answer=9, submit=slow)
    simulation.cancel(gone, at_s=1.2)
    simulation.run()
    assert gone.freed_s is not None
    assert overdue.freed_s is not None
    assert gone.freed_s <= 1.2 + 0.06
    assert overdue.failed is not None
    assert (overdue.failed.code, overdue.freed_s <= 1.3 + 0.06) == ("timeout", True)
    assert (stays.finish, stays.token_s[0] <= 3.0 + 0.15) == ("complete", True)
    assert not gone.token_s


@pytest.mark.parametrize("loop", LOOPS)
def test_a_grammar_that_compiles_for_too_long_fails_its_request(loop: LoopKind) -> None:
    simulation = Simulation(loop=loop)
    request = simulation.request(prompt=60, answer=5, submit={"grammar": "60000 5"})
    simulation.run()
    assert request.failed is not None
    assert request.failed.code == "grammar_too_complex"
    assert request.freed_s is not None
    assert request.freed_s <= 10.1


# --- several answers of a prompt ----------------------------------------------------------------------


@pytest.mark.parametrize("device", ["apart", "blocks", "all blocks"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_prompt_is_computed_once_for_all_its_answers(loop: LoopKind, device: str) -> None:
    simulation = Simulation(DEVICES[device], loop=loop, max_rows=8)
    other = simulation.request(prompt=60, answer=300)
    first = simulation.request(at_s=0.5, prompt=3000, answer=20)
    others = [simulation.request(at_s=0.5, prompt=3000, answer=20, submit={"parent": first.seq}) for _ in range(5)]
    simulation.run()
    computed = {
        message.seq: message.prompt_tokens_computed for _, message in simulation.messages if isinstance(message, Freed)
    }
    assert [computed[one.seq] for one in (first, *others)] == [3000, 1, 1, 1, 1, 1]
    assert [len(one.token_s) for one in (other, first, *others)] == [300] + [20] * 6


@pytest.mark.parametrize("loop", LOOPS)
def test_families_keep_their_answers_where_memory_is_short_and_some_go(loop: LoopKind) -> None:
    """Preempted, cancelled and overdue ones among them: the simulated device holds each to its own positions."""
    for seed in range(12):
        random_ = random.Random(seed)
        simulation = Simulation(DEVICES["apart"], loop=loop, max_rows=4, kv_tokens=2048)
        members = []
        for _ in range(6):
            at_s, prompt = random_.uniform(0, 3), random_.choice([40, 300, 900])
            first = simulation.request(at_s=at_s, prompt=prompt, answer=random_.choice([1, 30, 500]))
            members.append(first)
            for _ in range(3):
                options = random_.choice([{}, {}, {"deadline_s": 1.0}, {"priority": 1}])
                submit = {"parent": first.seq, **options}
                members.append(simulation.request(at_s=at_s, prompt=prompt, answer=30, submit=submit))
        gone = random_.sample(members, 6)
        for one in gone:
            simulation.cancel(one, at_s=random_.uniform(0, 6))
        simulation.run()
        for one in members:
            assert one.freed_s is not None
            assert one.finish == "length" or one.failed is not None or one in gone
            if one.finish == "length":
                assert len(one.token_s) == one.answer
